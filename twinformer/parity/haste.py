"""Programs of small models compiled with little care: where nobody looks at speed, compiling is most of the time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import jax

# weights of a model whose programs take longer to compile well than to run
_SMALL = 2_000_000


# what XLA for the CPU calls it; the last halves the time, and there is no such option but in jaxlib 0.10
LITTLE_CARE: dict[str, bool | int] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
}
if version("jaxlib").startswith("0.10."):
    LITTLE_CARE["xla_cpu_use_fusion_emitters"] = False


def little_care(tensors: Mapping[Any, Any]) -> dict[str, bool | int]:
    """``compiler_options`` for ``jax.jit`` that say the same, and more of it; none on other devices than the CPU."""
    is_small = sum(tensor.size for tensor in tensors.values()) < _SMALL
    return dict(LITTLE_CARE) if is_small and jax.default_backend() == "cpu" else {}


@contextlib.contextmanager
def hurried(tensors: Mapping[str, Any]) -> Iterator[None]:
    """Within, XLA leaves out most optimizations, if the model of these weights is small."""
    before = jax.config.read("jax_disable_most_optimizations")  # type: ignore[no-untyped-call]
    is_small = sum(tensor.size for tensor in tensors.values()) < _SMALL
    jax.config.update("jax_disable_most_optimizations", before or is_small)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)  # type: ignore[no-untyped-call]
