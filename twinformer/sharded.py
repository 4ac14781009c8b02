"""One model spread over several devices of a CPU, in processes of their own: what rung 10 starts.

``python -m twinformer.sharded flax|torch DIRECTORY RANK [MODULE:FUNCTION]`` reads ``case.safetensors`` and
``config.json`` in the directory and writes ``{framework}-{rank}.safetensors``: the output (of rows ``first`` on) and,
from rank 0, the gradient of every parameter under its twin's own name. ``MODULE:FUNCTION`` is called before anything
else; tests plant faults with it. A process loads its own framework alone, which is most of the time that it takes.

- Flax: one process with four devices, two by two. Every parameter is cut along each axis that can be halved, one axis
  for either dimension of the mesh; rows of the batch lie along the first. XLA inserts what has to be sent.
- PyTorch: two processes (gloo), ``torch.distributed.fsdp.fully_shard`` on every block and on the model, half of the
  rows each, gradients summed.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from twinformer.config import ModelConfig

RANKS = {"flax": 1, "torch": 2}
#: a mesh of Flax's devices: rows of the batch, and the model
MESH = (2, 2)

Arrays = dict[str, npt.NDArray[Any]]


def parts(found: Arrays, kind: str) -> Arrays:
    """Those whose names begin with ``kind/``, without it."""
    return {name.removeprefix(f"{kind}/"): value for name, value in found.items() if name.startswith(f"{kind}/")}


def _flax(config: ModelConfig, tensors: Arrays, inputs: Arrays, cotangent: Any) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import flax_impl

    settings = {
        "jax_platforms": "cpu",
        "jax_num_cpu_devices": MESH[0] * MESH[1],
        "jax_enable_x64": True,
        "jax_default_matmul_precision": "highest",
    }
    for name, value in settings.items():
        jax.config.update(name, value)  # type: ignore[no-untyped-call]
    model: Any = flax_impl.build(config.replace(remat=False), seed=None)
    flax_impl.load_weights(model, tensors)
    graphdef, state = nnx.split(model)
    mesh = Mesh(np.array(jax.devices()).reshape(MESH), ("rows", "model"))

    def placed(leaf: Any, axes: Any) -> Any:
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axes)))  # type: ignore[no-untyped-call]

    def over_rows(leaf: Any) -> Any:
        rows = "rows" if leaf.ndim and leaf.shape[0] == B and B % MESH[0] == 0 else None
        return placed(leaf, [rows])

    def over_both(leaf: Any) -> Any:
        names = iter(("model", "rows"))
        cut = [next(names, None) if size % 2 == 0 and size else None for size in leaf.shape[::-1]]
        return placed(leaf, cut[::-1])

    def scalar(state: Any, inputs: Any, cotangent: Any) -> tuple[Any, Any]:
        output: Any = nnx.merge(graphdef, state)(**inputs)
        return (output * cotangent).sum(), output

    B = len(cotangent)
    state = jax.tree.map(over_both, state)
    spread = [leaf for leaf in jax.tree.leaves(state) if not leaf.sharding.is_fully_replicated]
    given = {name: jnp.asarray(value) if name == "rng" else over_rows(value) for name, value in inputs.items()}
    run = jax.jit(jax.value_and_grad(scalar, has_aux=True))
    (_, output), of_state = run(state, given, over_rows(cotangent))
    leaves = nnx.to_flat_state(of_state)
    gradients = {f"gradient/{'.'.join(map(str, path))}": np.asarray(leaf[...]) for path, leaf in leaves}
    return {"output": np.asarray(output), "first": np.array([0]), "spread": np.array([len(spread)]), **gradients}


def _torch(config: ModelConfig, tensors: Arrays, inputs: Arrays, cotangent: Any, place: Path, rank: int) -> Arrays:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    import torch_impl

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    ranks = RANKS["torch"]
    dist.init_process_group("gloo", init_method=f"file://{place}/rendezvous", rank=rank, world_size=ranks)
    try:
        mesh = init_device_mesh("cpu", (ranks,))
        model: Any = torch_impl.build(config.replace(remat=False), seed=None)
        torch_impl.load_weights(model, tensors)
        units = [module for module in model.modules() if isinstance(module, torch_impl.Block)]
        for unit in (*units, model):
            fully_shard(unit, mesh=mesh)
            unit.set_gradient_divide_factor(1.0)
        B = len(cotangent)
        first, end = rank * B // ranks, (rank + 1) * B // ranks
        mine = {
            name: torch.from_numpy(value[first:end] if len(value) == B else value) for name, value in inputs.items()
        }
        output = model(**mine)
        (output * torch.from_numpy(cotangent[first:end])).sum().backward()
        found = {"output": output.detach().numpy(), "first": np.array([first]), "spread": np.array([len(units)])}
        for path, parameter in model.named_parameters():
            gradient = None if parameter.grad is None else parameter.grad.full_tensor()
            shape = tuple(parameter.shape)
            found[f"gradient/{path}"] = np.zeros(shape) if gradient is None else gradient.numpy()
        return found if rank == 0 else {name: found[name] for name in ("output", "first", "spread")}
    finally:
        dist.destroy_process_group()


def main(framework: str, directory: str, rank: str, prepare: str = "") -> None:
    """What one process does."""
    if prepare:
        module, _, function = prepare.partition(":")
        getattr(importlib.import_module(module), function)()
    place = Path(directory)
    config = ModelConfig.from_dict(json.loads((place / "config.json").read_text()))
    read = load_file(place / "case.safetensors")
    given = (config, parts(read, "tensor"), parts(read, "input"), read["cotangent"])
    found = _flax(*given) if framework == "flax" else _torch(*given, place, int(rank))
    made = {name: np.ascontiguousarray(value) for name, value in found.items()}
    save_file(made, place / f"{framework}-{rank}.safetensors")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:  # the last line is what the parent tells
        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
