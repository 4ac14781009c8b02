"""Weights for somebody's model under which no mistake hides, and which of its own would hide one."""

from __future__ import annotations

import numpy as np
import torch

from twinformer.initializers import stream
from twinformer.parity.values import Array, Arrays, to_numpy

_SHOWN = 6


def told(model: torch.nn.Module, seed: int) -> Arrays:
    """Weights for every parameter, each from a stream of its own.

    Norm weights are away from 1, biases away from 0, every matrix has a scale and an offset of its own, so that a
    forgotten bias, a swapped norm or a wrong activation changes the output.
    """
    owners = dict(model.named_modules())
    made = {name: _draw(name, owners, to_numpy(one), seed) for name, one in model.named_parameters()}
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            low, high = (0.5, 1.5) if name.endswith("var") else (-0.5, 0.5)
            drawn = stream(seed, f"telling/{name}").uniform(low, high, tuple(buffer.shape))
            made[name] = drawn.astype(to_numpy(buffer).dtype)
    return made


def _draw(name: str, owners: dict[str, torch.nn.Module], like: Array, seed: int) -> Array:
    rng = stream(seed, f"telling/{name}")
    owner, _, last = name.rpartition(".")
    if like.ndim < 2 and "bias" not in last:
        drawn = 1.0 + rng.uniform(-0.5, 0.5, like.shape)
    elif like.ndim < 2:
        drawn = rng.normal(rng.uniform(-0.2, 0.2), 0.3, like.shape)
    elif isinstance(owners[owner], torch.nn.Embedding):
        drawn = rng.normal(0, 1, like.shape)
    else:
        spread = rng.uniform(0.6, 1.4) / np.sqrt(np.prod(like.shape[1:]))
        drawn = rng.normal(rng.uniform(-0.1, 0.1) * spread, spread, like.shape)
    return np.asarray(drawn).astype(like.dtype)


def hidden(model: torch.nn.Module, weights: Arrays) -> list[str]:
    """Parameters whose elements are all the same: most often norms of one and biases of zero."""
    found = [name for name, _ in model.named_parameters() if _is_constant(weights[name])]
    return [*found[:_SHOWN], f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else found


def _is_constant(array: Array) -> bool:
    return array.size > 0 and bool((array == array.reshape(-1)[0]).all())
