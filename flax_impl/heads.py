"""Heads: what the last hidden states are turned into. Scores of tokens or of labels, or one vector of a sequence."""

import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float

from flax_impl.dropout import Dropout, Key
from flax_impl.embeddings import _is_one_row, _unembed_row, unembed
from flax_impl.feedforward import activate
from flax_impl.linear import Linear, wide_dtype
from flax_impl.norms import make_norm
from twinformer.config import ModelConfig
from twinformer.errors import ConfigError

#: the least that a vector is divided by
_TINY = 1e-12


class Head(nnx.Module):
    """The parts of a head that the configuration calls for: ``transform`` and ``norm`` (masked tokens), ``pooler``, the
    matrix ``[D, rows]`` and a bias of tokens or labels.

    ``h [B, T, D]`` becomes logits ``[B, T, V]`` (``tied``, with the table; ``untied``), scores of labels
    ``[B, T, num_labels]`` (``tokens``) or ``[B, num_labels]`` (``sequence``), a vector ``[B, D]`` (``pooled``), or
    stays (``none``).

    Source: Devlin et al. 2019, arXiv:1810.04805; sentence vectors: Reimers & Gurevych 2019, arXiv:1908.10084.
    """

    kind: ClassVar[Literal["linear"]] = "linear"

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        D, dtype = config.model_dim, config.param_dtype
        rows = config.num_labels if config.num_labels else config.vocab_size

        dense = functools.partial(Linear, D, D, param_dtype=dtype, compute_dtype=config.compute_dtype, seed=None)
        self.transform = dense() if config.head_transform else None
        self.norm = make_norm(D, config) if config.head_transform else None
        self.pooler = None if config.pooler == "none" else dense()
        has_matrix = config.head not in ("none", "tied", "pooled")
        self.kernel = nnx.Param(jnp.zeros((D, rows), dtype)) if has_matrix else None
        self.bias = nnx.Param(jnp.zeros(rows, dtype)) if config.head_bias else None
        self.dropout = Dropout(config.head_dropout)

    def __call__(
        self,
        h: Float[Array, "B T D"],
        table: Float[Array, "V D"],
        real: Bool[Array | np.ndarray, "B T"] | None = None,
        rng: Key | None = None,
    ) -> Float[Array, "..."]:
        match self.config.head:
            case "none":
                return h
            case "pooled":
                return self._vector(h, real)
            case "sequence":
                return self._scores(self.dropout(self._vector(h, real), rng))
            case "tokens":
                return self._scores(self.dropout(h, rng))
        return self._logits(h, table)

    def _logits(self, h: Float[Array, "B T D"], table: Float[Array, "V D"]) -> Float[Array, "B T V"]:
        config = self.config
        if self.transform is not None and self.norm is not None:
            h = self.norm(activate(self.transform(h), config.activation))
        bias = None if self.bias is None else self.bias[...]
        if self.kernel is None:
            return unembed(h, table, scale=config.head_scale, bias=bias, softcap=config.head_softcap)
        kernel = self.kernel[...]
        if _is_one_row(h):
            return _unembed_row(h, kernel, scale=config.head_scale, bias=bias, softcap=config.head_softcap)
        return unembed(h, kernel.T, scale=config.head_scale, bias=bias, softcap=config.head_softcap)

    def _scores(self, x: Float[Array, "*n D"]) -> Float[Array, "*n labels"]:
        assert self.kernel is not None
        return unembed(x, self.kernel[...].T, bias=None if self.bias is None else self.bias[...])

    def _vector(self, h: Float[Array, "B T D"], real: Bool[Array | np.ndarray, "B T"] | None) -> Float[Array, "B D"]:
        """One vector a row: pooled, through the pooler if there is one, at length 1 if asked for."""
        config = self.config
        assert config.pool != "none"
        v = pool(h, real, config.pool)
        if self.pooler is not None:
            v = self.pooler(v)
            v = jnp.tanh(v) if config.pooler == "tanh" else jax.nn.relu(v)
        if not config.pool_normalize:
            return v
        wide = v.astype(wide_dtype(v.dtype))
        square = jnp.sum(wide * wide, axis=-1, keepdims=True)
        # the root has no gradient at 0
        length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
        return (wide / jnp.maximum(length, _TINY)).astype(v.dtype)


def pool(
    h: Float[Array | np.ndarray, "B T D"],
    real: Bool[Array | np.ndarray, "B T"] | None,
    kind: Literal["first", "last", "mean", "max"],
) -> Float[Array, "B D"]:
    """The ``first`` or ``last`` real token of each row, the ``mean`` (wide) of all, or the ``max`` of each feature.

    Without ``real`` every token is one. A row that has none gives 0, and so does its gradient. Where several are the
    largest, the first has the gradient.
    """
    h = jnp.asarray(h)
    T = h.shape[1]
    real = jnp.ones(h.shape[:2], bool) if real is None else jnp.asarray(real)
    any_real = jnp.any(real, axis=1)[:, None]
    if kind in ("first", "last"):
        place = jnp.argmax(real, axis=1) if kind == "first" else T - 1 - jnp.argmax(real[:, ::-1], axis=1)
        found = jnp.take_along_axis(h, place[:, None, None], axis=1)[:, 0]
        return jnp.where(any_real, found, 0)
    if kind == "max":
        # by index: the pull-back of jnp.max compares values that jit may compute twice, rounded differently
        seen = jnp.where(real[..., None], h, -jnp.inf)
        place = jnp.argmax(jax.lax.stop_gradient(seen), axis=1, keepdims=True)
        return jnp.where(any_real, jnp.take_along_axis(seen, place, axis=1)[:, 0], 0)
    wide = jnp.where(real[..., None], h.astype(wide_dtype(h.dtype)), 0)
    count = jnp.maximum(jnp.sum(real, axis=1), 1)[:, None]
    return (jnp.sum(wide, axis=1) / count.astype(wide.dtype)).astype(h.dtype)


def check_predicts_tokens(where: str, config: ModelConfig) -> None:
    """Raise ConfigError for a head that gives something else than scores of tokens."""
    if config.head not in ("tied", "untied"):
        raise ConfigError(where, [f"head: expected 'tied' or 'untied', got {config.head!r}: it predicts no tokens"])
