"""Who is timed: our twins, and the peers that people would use instead, with the same weights.

A system is found by its name; ``needs`` are the packages without which it is listed as absent. ``tuned`` marks what a
user has to know about: the others are used as their documentation shows.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.cases import Arrays, Case


class Running(Protocol):
    """One system on one case, ready to run."""

    def outputs(self) -> Arrays:
        """What the gate compares with the float64 truth. Called once, before anything is timed."""

    def run(self) -> None:
        """One unit of work, to its end."""


@dataclass(frozen=True)
class System:
    """``module`` of this package has a function ``make(case, weights, variant) -> Running``."""

    name: str
    framework: str
    module: str
    variant: str
    cases: tuple[str, ...]
    needs: tuple[str, ...]
    tuned: bool = False
    settings: tuple[tuple[str, str], ...] = ()  # of the environment

    def absent(self) -> list[str]:
        return [package for package in self.needs if importlib.util.find_spec(package) is None]

    def make(self, case: Case, weights: Arrays) -> Running:
        module = importlib.import_module(f"benchmarks.systems.{self.module}")
        made: Callable[[Case, Arrays, str], Any] = module.make
        running: Running = made(case, weights, self.variant)
        return running


_TRAIN = ("encoder-train", "decoder-train", "seq2seq-train")
_DECODE = ("decode-1", "decode-2", "decode-4", "decode-8")
_MODEL = ("encoder-forward", *_TRAIN, "prefill", *_DECODE, "beam")
_NO_BEAM = tuple(name for name in _MODEL if name != "beam")  # x_transformers_peer says why
_DISPATCH = ("dispatch-train", "dispatch-forward")
_MICRO = tuple(
    f"micro-{op}"
    for op in (
        "matmul",
        "matmul-dx",
        "matmul-dw",
        "matvec",
        "attention",
        "attention-grad",
        "norm",
        "gelu",
        "loss",
        "adamw",
    )
)
# large blocks stay with the process instead of going back to the kernel and coming again page by page
ALLOCATOR = (
    (
        "GLIBC_TUNABLES",
        "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184:"
        "glibc.malloc.top_pad=268435456:glibc.malloc.hugetlb=1",
    ),
)
# JAX runs a longer program in a thread of its own on a CPU, whose heap of 64 MB no setting of the allocator widens. It
# reads no variable for this: the worker does (worker.py).
JAX_ALLOCATOR = (*ALLOCATOR, ("TWINFORMER_BENCH_DISPATCH", "synchronous"))
_X, _KERAS, _OPTAX = ("torch", "x_transformers"), ("keras", "keras_hub"), ("jax", "flax", "optax")


def _backend(name: str) -> tuple[tuple[str, str], ...]:
    return (("KERAS_BACKEND", name),)


SYSTEMS = (
    System("torch_impl", "torch", "torch_twin", "eager", (*_MODEL, *_DISPATCH, *_MICRO), ("torch",)),
    System("torch_impl compiled", "torch", "torch_twin", "compiled", (*_MODEL, *_DISPATCH), ("torch",)),
    System("torch_impl tuned", "torch", "torch_twin", "eager", _MODEL, ("torch",), tuned=True, settings=ALLOCATOR),
    System("flax_impl", "jax", "flax_twin", "jit", (*_MODEL, *_DISPATCH, *_MICRO), ("jax", "flax")),
    System("flax_impl tuned", "jax", "flax_twin", "jit", _MODEL, ("jax", "flax"), tuned=True, settings=JAX_ALLOCATOR),
    System("flax_impl scan", "jax", "flax_twin", "scan", ("encoder-forward", *_TRAIN, *_DISPATCH), ("jax", "flax")),
    System(
        "flax_impl scan tuned", "jax", "flax_twin", "scan", _TRAIN, ("jax", "flax"), tuned=True, settings=JAX_ALLOCATOR
    ),
    System("torch.nn", "torch", "torch_nn", "plain", ("encoder-forward", *_TRAIN), ("torch",)),
    System("torch.nn tuned", "torch", "torch_nn", "fused", _TRAIN, ("torch",), tuned=True),
    System("transformers eager", "torch", "hugging_face", "eager", _MODEL, ("torch", "transformers")),
    System("transformers sdpa", "torch", "hugging_face", "sdpa", _MODEL, ("torch", "transformers")),
    System("transformers tuned", "torch", "hugging_face", "tuned", _MODEL, ("torch", "transformers"), tuned=True),
    System("x-transformers", "torch", "x_transformers_peer", "plain", _NO_BEAM, _X),
    System("x-transformers tuned", "torch", "x_transformers_peer", "tuned", _NO_BEAM, _X, tuned=True),
    System(
        "keras-hub torch", "torch", "keras_hub_peer", "torch", _MODEL, ("torch", *_KERAS), settings=_backend("torch")
    ),
    System("keras-hub jax", "jax", "keras_hub_peer", "jax", _MODEL, ("jax", *_KERAS), settings=_backend("jax")),
    System("nnx as written", "jax", "nnx_peer", "nnx.jit", ("decoder-train", *_DISPATCH), _OPTAX),
    System("linen", "jax", "linen_peer", "jit", ("decoder-train",), _OPTAX),
    System("linen tuned", "jax", "linen_peer", "jit", ("decoder-train",), _OPTAX, tuned=True, settings=JAX_ALLOCATOR),
    System("jax raw jit", "jax", "flax_twin", "raw", _DISPATCH, ("jax", "flax"), tuned=True),
)


def by_name(name: str) -> System:
    """The system of that name. Raises KeyError."""
    return {system.name: system for system in SYSTEMS}[name]
