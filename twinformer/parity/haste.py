"""Programs of small models compiled with little care: where nobody looks at speed, compiling is most of the time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

# weights of a model whose programs take longer to compile well than to run
_SMALL = 2_000_000


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
