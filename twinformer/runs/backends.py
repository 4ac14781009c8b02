"""The twins by name. A run knows them by what they offer; the framework behind a name is looked up here, when asked.

Nothing is imported before it is needed: a run of one twin does not load the other's framework.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from twinformer.config import ModelConfig
from twinformer.decoding import Beams, Generated
from twinformer.errors import Problems, TwinformerError
from twinformer.learning import Trainer, TrainingConfig

_PACKAGES = {"torch": ("torch",), "flax": ("jax", "flax")}


def prepare(backends: Sequence[str], dtype: str) -> None:
    """Before any array is made: the frameworks are there, JAX has float64 where it is asked for, and on a CPU it runs
    programs in the thread that calls them. Raises one TwinformerError for all packages that are absent.
    """
    problems = Problems("installation", TwinformerError)
    for backend in backends:
        for package in _PACKAGES[backend]:
            there = importlib.util.find_spec(package) is not None
            problems.expect(there, f"{package}: expected it installed (pip install 'twinformer[{backend}]')")
    problems.raise_if_any()
    if "flax" in backends:
        config = importlib.import_module("jax").config
        if dtype == "float64":
            config.update("jax_enable_x64", True)
        # in a thread of JAX's own the memory of a program, 1.4 GB for a step of the larger decoders, is asked of the
        # system anew each time (see twinformer/memory.py), a fifth of the time
        config.update("jax_cpu_enable_async_dispatch", False)


def make_trainer(backend: str, config: ModelConfig, training: TrainingConfig, *, compile: bool = False) -> Trainer:
    """The twin's ``training.Trainer``, on the accelerator where there is one."""
    module = importlib.import_module(f"{backend}_impl.training")
    place = {"device": _torch_device()} if backend == "torch" else {}  # JAX places arrays by itself
    trainer: Trainer = module.Trainer(config, training, compile=compile, **place)
    return trainer


def _torch_device() -> str:
    return "cuda" if importlib.import_module("torch").cuda.is_available() else "cpu"


def make_model(backend: str, config: ModelConfig, weights: Mapping[str, npt.NDArray[Any]]) -> Any:
    """The twin's model with these weights."""
    twin = importlib.import_module(f"{backend}_impl")
    model = twin.build(config, seed=None)
    twin.load_weights(model, weights)
    return model


def caller(backend: str, model: Any) -> Callable[..., npt.NDArray[Any]]:
    """The model's call from NumPy arrays to NumPy arrays, without gradients."""
    return _torch_caller(model) if backend == "torch" else _flax_caller(model)


def _torch_caller(model: Any) -> Callable[..., npt.NDArray[Any]]:
    torch = importlib.import_module("torch")

    def call(**inputs: npt.NDArray[Any]) -> npt.NDArray[Any]:
        with torch.no_grad():
            out = model(**{name: torch.from_numpy(np.array(value, order="C")) for name, value in inputs.items()})
        found: npt.NDArray[Any] = (out if out.dtype == torch.float64 else out.float()).numpy()
        return found

    return call


def _flax_caller(model: Any) -> Callable[..., npt.NDArray[Any]]:
    jax = importlib.import_module("jax")
    program = importlib.import_module("flax_impl").compiled(model)

    def call(**inputs: npt.NDArray[Any]) -> npt.NDArray[Any]:
        out = program(**{name: jax.numpy.asarray(value) for name, value in inputs.items()})
        return np.asarray(out, np.float64 if out.dtype == np.float64 else np.float32)

    return call


def make_generator(backend: str, model: Any, *, bucket: int = 32) -> Any:
    """The twin's ``generation.Generator``."""
    return importlib.import_module(f"{backend}_impl.generation").Generator(model, bucket=bucket)


def product_rate(backend: str, dtype: str, *, size: int = 1024, seconds: float = 0.2) -> float:
    """Operations a second of a square matrix product, the best of several: the ceiling that a step is held against."""
    if backend == "torch":
        torch = importlib.import_module("torch")
        X = torch.ones(size, size, dtype=getattr(torch, dtype), device=_torch_device())

        def once() -> None:
            (X @ X)[0, 0].item()  # waits

    else:
        jax = importlib.import_module("jax")
        X = jax.numpy.ones((size, size), dtype)
        product = jax.jit(lambda X: X @ X)

        def once() -> None:
            product(X).block_until_ready()

    once()
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        once()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def versions(backends: Sequence[str]) -> dict[str, str]:
    """What a run was made with."""
    packages = ("twinformer", "numpy", *(package for backend in backends for package in _PACKAGES[backend]))
    found = {"python": platform.python_version()}
    for package in packages:
        if importlib.util.find_spec(package) is not None:
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
                found[package] = "unknown"
    return found


def default_backend() -> str:
    """PyTorch where it is installed, else Flax."""
    return "torch" if importlib.util.find_spec("torch") is not None or not _has_flax() else "flax"


def _has_flax() -> bool:
    return all(importlib.util.find_spec(package) is not None for package in _PACKAGES["flax"])


def beam_search(backend: str, model: Any, prompts: npt.NDArray[Any], **arguments: Any) -> Beams:
    """The twin's ``beam.beam_search``."""
    found: Beams = importlib.import_module(f"{backend}_impl.beam").beam_search(model, prompts, **arguments)
    return found


def best_of(beams: Beams) -> Generated:
    """The best hypothesis of each row, its log-probability as a whole at its first token."""
    first = np.zeros(beams.tokens[:, 0].shape, beams.logprobs.dtype)
    first[:, 0] = beams.logprobs[:, 0]
    return Generated(beams.tokens[:, 0], beams.lengths[:, 0], beams.finished[:, 0], first)


def next_logprobs(
    backend: str,
    model: Any,
    prompts: npt.NDArray[Any],
    arguments: Mapping[str, Any],
    row: int,
    ids: Sequence[int],
) -> npt.NDArray[np.float64]:
    """``[V]``: log-probabilities of the token after a prompt and these ids, tokens that are not allowed ruled out."""
    real = arguments["padding_mask"][row] if "padding_mask" in arguments else np.ones(prompts.shape[1], np.bool_)
    tokens = np.concatenate((prompts[row][real], np.asarray(ids, prompts.dtype)))[None]
    call = caller(backend, model)
    if "source" in arguments:
        place = slice(row, row + 1)
        logits = call(
            source=arguments["source"][place],
            target=tokens,
            source_padding_mask=arguments["source_padding_mask"][place],
        )
    else:
        logits = call(tokens=tokens)
    last = logits[0, -1].astype(np.float64)
    if "allowed" in arguments:
        last = np.where(arguments["allowed"][row, len(ids)], last, -np.inf)
    shifted = last - last.max()
    found: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return found
