"""Low-rank adapters: a frozen matrix learns a change of rank r, ``W + alpha / r · B A``, of which A and B are trained.

Everything here is in PyTorch's orientation, that of ``export_weights`` and of files: ``W [out, in]``, ``A [r, in]``,
``B [out, r]``. The adapters of the weight ``….query.weight`` are ``….query.lora_a`` and ``….query.lora_b``.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from flax_impl.linear import matmul, wide_dtype
from twinformer.checks import check_tensors
from twinformer.errors import ConfigError, Problems
from twinformer.initializers import stream
from twinformer.learning import LoraConfig

Leaves = Mapping[str, Float[Array | np.ndarray, "..."]]


def init_adapters(weights: Leaves, config: LoraConfig, seed: int) -> dict[str, Array]:
    """Adapters that change nothing yet: ``A ~ N(0, 1 / in)``, each from the stream of its own path; ``B = 0``.

    In the dtype of their weight. Raises ConfigError where no weight is a target.
    """
    adapters: dict[str, Array] = {}
    for owner, shapes in _shapes("init_adapters", weights, config).items():
        dtype = weights[f"{owner}.weight"].dtype
        for path, shape in shapes.items():
            values = np.zeros(shape)
            if path.endswith(".lora_a"):
                values = stream(seed, path).standard_normal(shape) * (1 / math.sqrt(shape[1]))
            adapters[path] = jnp.array(values.astype(np.float32), dtype)
    return adapters


def merge(weights: Leaves, adapters: Leaves, config: LoraConfig) -> dict[str, Any]:
    """All the weights, with ``W + scale · B A`` for those that have adapters: computed wide, rounded once.

    Can be differentiated. Raises ConfigError where no weight is a target, one WeightsError for all adapters that are
    missing, unexpected or mis-shaped.
    """
    wanted = _shapes("merge", weights, config)
    check_tensors("merge", adapters, {path: shape for shapes in wanted.values() for path, shape in shapes.items()})
    merged: dict[str, Any] = dict(weights)
    for owner in wanted:
        W = jnp.asarray(weights[f"{owner}.weight"])
        A, B = (jnp.asarray(adapters[f"{owner}.{name}"], wide_dtype(W.dtype)) for name in ("lora_a", "lora_b"))
        merged[f"{owner}.weight"] = (W.astype(A.dtype) + config.scale * matmul(B, A)).astype(W.dtype)
    return merged


def _shapes(where: str, weights: Leaves, config: LoraConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Linear layer → path → shape of its two adapters."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for path in weights:
        if config.adapts(path):
            owner, (outputs, inputs) = path.removesuffix(".weight"), weights[path].shape
            found[owner] = {f"{owner}.lora_a": (config.rank, inputs), f"{owner}.lora_b": (outputs, config.rank)}
    problems = Problems(where, ConfigError)
    wanted = ", ".join(config.targets)
    problems.expect(len(found) > 0, f"targets: expected at least one weight of a layer {wanted}, got none")
    problems.raise_if_any()
    return found
