"""Other ways to run the same model: compiled where the judge is eager, eager where it compiles, unwatched, remat,
and blocks in a loop."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from flax import nnx

import flax_impl
import torch_impl
import torch_impl.generation
import torch_impl.training
from twinformer.data.batch import Batch
from twinformer.decoding import Generated
from twinformer.learning import TrainingConfig
from twinformer.parity.case import Arrays, Case
from twinformer.parity.compare import FloatArray, widened
from twinformer.parity.scenarios import Writing
from twinformer.parity.training_runs import Trained, train
from twinformer.parity.twins import BUCKET, Run, TorchTwin, Twin, in_pytorch_layout

Mode = Literal["torch.compile", "remat", "scan", "scan of remat", "eager", "unwatched"]
# with these a block has to drop what it drops otherwise
WITH_DROPOUT: tuple[Mode, ...] = ("remat", "scan", "scan of remat")
MODES: dict[str, tuple[Mode, ...]] = {
    "torch_impl": ("torch.compile", "remat"),
    # to watch a module pins what it returns, which XLA may otherwise compute twice, rounded differently
    "flax_impl": ("unwatched", "eager", "remat", "scan", "scan of remat"),
}


def run_in_mode(twin: Twin, case: Case, mode: Mode) -> Run:
    """Output and gradients of ``sum(output * cotangent)`` with respect to every parameter; no modules are watched."""
    if twin.name == TorchTwin.name:
        return _run_torch(twin, case, mode)
    with jax.enable_x64(case.config.compute_dtype == "float64"), jax.default_matmul_precision("highest"):
        return _run_flax(twin, case, mode)


def train_compiled(case: Case, training: TrainingConfig, lessons: Sequence[Sequence[Batch]]) -> Trained:
    """PyTorch's trainer with its loss and gradients under ``torch.compile``; Flax's is compiled always.

    Traced and differentiated ahead of time as always, but run operation by operation: the code that the compiler writes
    is that of ``torch.compile`` by itself, and takes a minute.
    """
    trainer = torch_impl.training.Trainer(case.config, training, compile=True)
    trainer._loss = torch_impl.training._compiled(trainer._eager_loss, backend="aot_eager")
    with _quiet():
        return train(trainer, case.tensors, lessons, evaluate=False)


def write_compiled(twin: Twin, case: Case, writing: Writing, new: int) -> Generated:
    """What PyTorch's compiled generator writes, greedily. Traced as always, and then run operation by operation."""
    generator = torch_impl.generation.Generator(twin._model(case), bucket=BUCKET, compile=True)  # type: ignore[attr-defined]
    runner = generator._runner
    runner._read = runner._program(runner._read_source, "eager")
    runner._next = runner._program(runner._next_logits, "eager")
    with _quiet():
        return generator(writing.prompts, max_new_tokens=new, **writing.options())


def outputs_after_casts(twin: Twin, case: Case) -> tuple[FloatArray, FloatArray]:
    """Of a PyTorch module in float32 that has just taken its weights: as it was built, and cast to bfloat16 and back
    before it took them. What is no parameter (the frequencies of positions) may not be rounded on the way."""
    model = twin._model(case.in_dtype("float32"))  # type: ignore[attr-defined]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = {name: torch.from_numpy(np.array(value)) for name, value in case.inputs.items()}
    with torch.no_grad():
        before = widened(model(**inputs).numpy().copy())
        model = model.to(torch.bfloat16).to(torch.float32)
        model.load_state_dict(weights)
        return before, widened(model(**inputs).numpy())


def norms_seen_wide(twin: Twin, case: Case, *, scan: bool = False) -> dict[str, bool]:
    """Which of the blocks' norms count with more digits than bfloat16 has, where only the arithmetic is in bfloat16.

    Norms compute wide, so that theirs are the weights whose further digits show. They are taken away from one
    parameter of all blocks at a time; ``scan``: Flax with its blocks in a loop. Blocks go by the name ``*``.
    """
    config = case.in_dtype("float32").config.replace(compute_dtype="bfloat16", scan_layers=scan)
    mixed = dataclasses.replace(case.in_dtype("float32"), config=config)
    groups: dict[str, list[str]] = {}
    for path in mixed.tensors:
        if ".blocks." in path and path.rpartition(".")[0].endswith("norm"):
            groups.setdefault(re.sub(r"\.blocks\.\d+\.", ".blocks.*.", path), []).append(path)
    call = _torch_call(mixed) if twin.name == TorchTwin.name else _flax_call(mixed)
    whole = call(mixed.tensors)
    return {
        group: not np.array_equal(whole, call(mixed.tensors | {path: _short(mixed.tensors[path]) for path in paths}))
        for group, paths in groups.items()
    }


def _short(tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Without the digits that bfloat16 has no room for."""
    return tensor.astype(ml_dtypes.bfloat16).astype(tensor.dtype)


def _torch_call(case: Case) -> Callable[[Arrays], FloatArray]:
    model = torch_impl.build(case.config, seed=None)
    inputs = {name: torch.from_numpy(np.array(value)) for name, value in case.inputs.items()}

    def call(tensors: Arrays) -> FloatArray:
        torch_impl.load_weights(model, tensors, finite=case.finite)
        with torch.no_grad():
            return widened(model(**inputs).to(torch.float64).numpy())

    return call


def _flax_call(case: Case) -> Callable[[Arrays], FloatArray]:
    model = flax_impl.models.skeleton(case.config)

    @jax.jit
    def forward(state: Any) -> Any:
        return nnx.merge(graphdef, state)(**case.inputs)

    flax_impl.load_weights(model, case.tensors, finite=case.finite)
    graphdef: Any = nnx.split(model)[0]

    def call(tensors: Arrays) -> FloatArray:
        flax_impl.load_weights(model, tensors, finite=case.finite)
        return widened(np.asarray(forward(nnx.split(model)[1])))

    return call


def cpp_compiler() -> str | None:
    """The compiler that ``torch.compile`` needs on a CPU, or None where there is none."""
    named = os.environ.get("CXX")
    return next((found for name in (named, "g++", "clang++", "c++") if name and (found := shutil.which(name))), None)


def _run_torch(twin: Any, case: Case, mode: Mode) -> Run:
    model = torch_impl.build(case.config.replace(remat=mode == "remat"), seed=None)
    model.load_state_dict(twin._model(case).state_dict())
    inputs = {name: torch.from_numpy(np.array(value)) for name, value in case.inputs.items()}
    call: Any = torch_impl.compiled(model) if mode == "torch.compile" else model
    with _quiet():
        output = call(**inputs)
        (output.to(torch.float64) * torch.from_numpy(case.cotangent)).sum().backward()
    run = Run(widened(output.detach().numpy()), {})
    for path, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        run.gradients[path] = widened(gradient.numpy())
    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch's compiler warns of what it uses itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        warnings.filterwarnings(
            "ignore", ".*autograd.function.Function.* should not be instantiated", DeprecationWarning
        )
        yield


def _run_flax(twin: Any, case: Case, mode: Mode) -> Run:
    model = twin._model(case)
    graphdef: Any
    graphdef, state = nnx.split(model)
    if mode in WITH_DROPOUT:
        config = case.config.replace(remat="remat" in mode, scan_layers="scan" in mode)
        graphdef = nnx.split(flax_impl.build(config, seed=None))[0]
    inputs = {name: jnp.asarray(value) for name, value in case.inputs.items()}
    cotangent = jnp.asarray(case.cotangent)

    def scalar(state: Any) -> tuple[Any, Any]:
        output: Any = nnx.merge(graphdef, state)(**inputs)
        return (output * cotangent).sum(), output

    differentiated = jax.value_and_grad(scalar, has_aux=True)
    (_, output), of_state = (differentiated if mode == "eager" else jax.jit(differentiated))(state)
    leaves = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(of_state)}
    return Run(
        widened(np.asarray(output)),
        {},
        {path: widened(leaf) for path, leaf in in_pytorch_layout(leaves).items()},
    )
