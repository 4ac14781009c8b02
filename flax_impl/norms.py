"""Normalisation of a vector to a common scale. Statistics are wide, the variance in two passes."""

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

from flax_impl.linear import check_choices, check_dtypes, wide_dtype
from flax_impl.weights import initialize
from twinformer.checks import check_sizes, check_width
from twinformer.config import DType, NormCast, NormWeight, StackConfig


class LayerNorm(nnx.Module):
    """``(x - mean) / sqrt(var + eps) · w + b`` over the last axis, with the population variance.

    ``X [..., width] -> [..., width]`` in ``compute_dtype``. ``weight="one_plus"``: the factor is ``1 + w``.
    ``cast="before_weight"``: the normalised value is cast to ``compute_dtype`` first, then multiplied by the cast
    factor and added to the cast bias. Raises InputError for another width or no float dtype.

    Source: Ba et al. 2016, arXiv:1607.06450; book, "Layer norm".
    """

    kind: ClassVar[Literal["norm"]] = "norm"

    def __init__(
        self,
        width: int,
        *,
        eps: float = 1e-5,
        bias: bool = True,
        weight: NormWeight = "plain",
        cast: NormCast = "after_weight",
        param_dtype: DType = "float32",
        compute_dtype: DType = "float32",
        seed: int | None = 0,
    ) -> None:
        check_sizes("LayerNorm", width=width)
        check_choices("LayerNorm", weight=(weight, NormWeight), cast=(cast, NormCast))
        check_dtypes("LayerNorm", param_dtype=param_dtype, compute_dtype=compute_dtype)
        self.width, self.eps, self.norm_weight, self.cast = width, eps, weight, cast
        self.compute_dtype = compute_dtype
        self.scale = nnx.Param(jnp.zeros(width, param_dtype))
        self.bias = nnx.Param(jnp.zeros(width, param_dtype)) if bias else None
        if seed is not None:
            initialize(self, seed)

    def __call__(self, X: Float[Array | np.ndarray, "*n width"]) -> Float[Array, "*n width"]:
        check_width("LayerNorm", X=X, width=self.width)
        x = _widened(X, self.compute_dtype)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(variance + self.eps)
        return _weighted(normal, self.scale, self.bias, self.norm_weight, self.cast, self.compute_dtype)


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x²) + eps) · w`` over the last axis; ``weight`` and ``cast`` as in ``LayerNorm``.

    ``X [..., width] -> [..., width]`` in ``compute_dtype``. Raises InputError for another width or no float dtype.

    Source: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.
    """

    kind: ClassVar[Literal["norm"]] = "norm"

    def __init__(
        self,
        width: int,
        *,
        eps: float = 1e-5,
        weight: NormWeight = "plain",
        cast: NormCast = "after_weight",
        param_dtype: DType = "float32",
        compute_dtype: DType = "float32",
        seed: int | None = 0,
    ) -> None:
        check_sizes("RMSNorm", width=width)
        check_choices("RMSNorm", weight=(weight, NormWeight), cast=(cast, NormCast))
        check_dtypes("RMSNorm", param_dtype=param_dtype, compute_dtype=compute_dtype)
        self.width, self.eps, self.norm_weight, self.cast = width, eps, weight, cast
        self.compute_dtype = compute_dtype
        self.scale = nnx.Param(jnp.zeros(width, param_dtype))
        if seed is not None:
            initialize(self, seed)

    def __call__(self, X: Float[Array | np.ndarray, "*n width"]) -> Float[Array, "*n width"]:
        check_width("RMSNorm", X=X, width=self.width)
        x = _widened(X, self.compute_dtype)
        normal = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return _weighted(normal, self.scale, None, self.norm_weight, self.cast, self.compute_dtype)


def make_norm(width: int, config: StackConfig) -> LayerNorm | RMSNorm:
    """The norm that a configuration asks for, its weights left to the owner."""
    return _make(config.norm, width, config)


def make_head_norm(config: StackConfig) -> LayerNorm | RMSNorm | None:
    """The norm of each head's query or key, of width K; None where the configuration asks for none."""
    return None if config.qk_norm == "none" else _make(config.qk_norm, config.key_dim, config)


def _make(norm: Literal["layernorm", "rmsnorm"], width: int, config: StackConfig) -> LayerNorm | RMSNorm:
    eps, weight, cast = config.norm_eps, config.norm_weight, config.norm_cast
    param_dtype, compute_dtype = config.param_dtype, config.compute_dtype
    if norm == "layernorm":
        return LayerNorm(
            width,
            eps=eps,
            bias=config.norm_bias,
            weight=weight,
            cast=cast,
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
            seed=None,
        )
    return RMSNorm(
        width, eps=eps, weight=weight, cast=cast, param_dtype=param_dtype, compute_dtype=compute_dtype, seed=None
    )


def _widened(X: Float[Array | np.ndarray, "*n width"], compute_dtype: DType) -> Float[Array, "*n width"]:
    return jnp.asarray(X, compute_dtype).astype(wide_dtype(compute_dtype))


def _weighted(
    normal: Float[Array, "*n width"],
    scale: nnx.Param[Array],
    bias: nnx.Param[Array] | None,
    weight: NormWeight,
    cast: NormCast,
    compute_dtype: DType,
) -> Float[Array, "*n width"]:
    """``normal · w + b``, cast to compute_dtype after (the usual) or before."""
    factor = jnp.asarray(scale[...], normal.dtype)
    if weight == "one_plus":
        factor = 1 + factor
    work = normal.dtype if cast == "after_weight" else np.dtype(compute_dtype)
    Y = normal.astype(work) * factor.astype(work)
    if bias is not None:
        Y = Y + jnp.asarray(bias[...], work)
    return Y.astype(compute_dtype)
