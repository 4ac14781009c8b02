"""From token ids to vectors, and from vectors back to a score for every token."""

import math
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Integer

from flax_impl.dropout import Dropout, Key
from flax_impl.linear import bounds, check_dtypes, check_ids, matmul, take_rows, wide_dtype
from flax_impl.norms import make_norm
from flax_impl.positions import LearnedPositions, PositionalEncoding, Positions
from flax_impl.weights import initialize
from twinformer.checks import check_sizes, check_tokens
from twinformer.config import DType, ModelConfig
from twinformer.errors import InputError, Problems

Ids = Integer[Array | np.ndarray, "B T"]


class TokenEmbedding(nnx.Module):
    """Row ``id`` of a table ``[V, D]``: ids ``[...] -> [..., D]`` in ``compute_dtype``.

    Raises InputError for ids outside ``0 … V - 1``; NaN for them where they cannot be seen.

    Source: book, "The input: embeddings for token and position".
    """

    kind: ClassVar[Literal["embedding"]] = "embedding"

    def __init__(
        self,
        vocab_size: int,
        model_dim: int,
        *,
        param_dtype: DType = "float32",
        compute_dtype: DType = "float32",
        seed: int | None = 0,
    ) -> None:
        check_sizes("TokenEmbedding", vocab_size=vocab_size, model_dim=model_dim)
        check_dtypes("TokenEmbedding", param_dtype=param_dtype, compute_dtype=compute_dtype)
        self.vocab_size = vocab_size
        self.compute_dtype = compute_dtype
        self.embedding = nnx.Param(jnp.zeros((vocab_size, model_dim), param_dtype))
        if seed is not None:
            initialize(self, seed)

    def __call__(self, ids: Integer[Array | np.ndarray, "*n"]) -> Float[Array, "*n D"]:
        check_ids("TokenEmbedding", "ids", ids, self.vocab_size)
        return take_rows(self.embedding[...], ids).astype(self.compute_dtype)


class Embeddings(nnx.Module):
    """``dropout(norm(scale · E[tokens] + P[positions] + E_type[token_types]))``, without the parts not configured.

    ``tokens [B, T] -> [B, T, D]`` in ``compute_dtype``. Positions are ``0 … T-1`` when None, token types all 0. With
    ``vocab_size`` 0 it has no table of its own: one is passed in. Rotary, relative and ALiBi positions belong to
    the stack. Raises InputError.

    Source: book, "The input: embeddings for token and position"; token types: Devlin et al. 2019, section 3.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, *, seed: int | None = 0) -> None:
        dtypes: dict[str, DType] = {"param_dtype": config.param_dtype, "compute_dtype": config.compute_dtype}
        check_dtypes("Embeddings", **dtypes)
        D, N, offset = config.model_dim, config.context_length, config.position_offset
        self.config = config
        self.tokens = TokenEmbedding(vocab_size, D, **dtypes, seed=None) if vocab_size else None
        positions: LearnedPositions | PositionalEncoding | None = None
        if config.positions == "learned":
            positions = LearnedPositions(N + offset, D, offset=offset, **dtypes, seed=None)
        elif config.positions == "sinusoidal":
            positions = PositionalEncoding(
                D, 0.0, N, layout=config.sinusoid_layout, spacing=config.sinusoid_spacing, offset=offset
            )
        self.positions = positions
        types = config.num_token_types
        self.token_types = TokenEmbedding(types, D, **dtypes, seed=None) if types else None
        self.norm = make_norm(D, config) if config.embedding_norm else None
        self.dropout = Dropout(config.dropout if config.embedding_dropout is None else config.embedding_dropout)
        if seed is not None:
            initialize(self, seed)

    def __call__(
        self,
        tokens: Ids,
        positions: Positions | None = None,
        token_types: Ids | None = None,
        *,
        table: Float[Array | np.ndarray, "V D"] | None = None,
        rng: Key | None = None,
    ) -> Float[Array, "B T D"]:
        config = self.config
        rows = self._table(table)
        check_tokens(
            "Embeddings",
            tokens=tokens,
            vocab_size=rows.shape[0],
            context_length=config.context_length,
            positions=positions,
            token_types=token_types,
            num_token_types=config.num_token_types,
            **bounds(tokens, positions, token_types),
        )
        if table is None and self.tokens is not None:
            X = self.tokens(tokens)
        else:
            X = take_rows(rows, tokens).astype(config.compute_dtype)
        if config.embedding_scale is not None:
            X = X * jnp.asarray(config.embedding_scale, X.dtype)
        positions = jnp.arange(X.shape[1])[None] if positions is None else positions
        if isinstance(self.positions, LearnedPositions):
            X = X + self.positions(positions)
        elif self.positions is not None:
            X = self.positions(X, positions)
        if self.token_types is not None:
            X = X + self.token_types(jnp.zeros((1, 1), jnp.int32) if token_types is None else token_types)
        if self.norm is not None:
            X = self.norm(X)
        return self.dropout(X, rng)

    def _table(self, table: Float[Array | np.ndarray, "V D"] | None) -> Float[Array, "V D"]:
        problems = Problems("Embeddings", InputError)
        D = self.config.model_dim
        if table is None:
            problems.expect(self.tokens is not None, "table: expected [V, D] (there is no table here), got None")
        else:
            shape = tuple(table.shape)
            problems.expect(len(shape) == 2 and shape[1] == D, f"table: expected shape [V, {D}], got {shape}")
        problems.raise_if_any()
        if table is None and self.tokens is not None:
            return self.tokens.embedding[...]
        return jnp.asarray(table)


def unembed(
    h: Float[Array | np.ndarray, "*n D"],
    E: Float[Array | np.ndarray, "V D"],
    *,
    scale: float | None = None,
    bias: Float[Array | np.ndarray, " V"] | None = None,
    softcap: float | None = None,
) -> Float[Array, "*n V"]:
    """Logits ``(scale · h) Eᵀ + bias``, then ``softcap · tanh(logits / softcap)``, in the dtype of h.

    The scale is rounded to that dtype, the soft cap is computed wide. Tied by function: E is the table of the
    embeddings, passed in.

    Source: book, "The language modeling head"; tied: Press & Wolf 2017, arXiv:1608.05859.
    """
    h = _scaled(h, scale)
    E = jnp.asarray(E, h.dtype)
    # E hᵀ reads a table as it lies: for one row several times faster on a CPU than h Eᵀ, which is the same product
    logits = matmul(E, h.reshape(-1)).reshape(*h.shape[:-1], -1) if _is_one_row(h) else matmul(h, E.T)
    return _finished(logits, bias, softcap)


def _unembed_row(
    h: Float[Array, "1 1 D"],
    kernel: Float[Array, "D V"],
    *,
    scale: float | None = None,
    bias: Float[Array, " V"] | None = None,
    softcap: float | None = None,
) -> Float[Array, "1 1 V"]:
    """``unembed`` of one row by a head's own matrix, which lies the other way round than a table."""
    h = _scaled(h, scale)
    return _finished(matmul(h, jnp.asarray(kernel, h.dtype)), bias, softcap)


def _is_one_row(h: Float[Array, "*n D"]) -> bool:
    return math.prod(h.shape[:-1]) == 1


def _scaled(h: Float[Array | np.ndarray, "*n D"], scale: float | None) -> Float[Array, "*n D"]:
    h = jnp.asarray(h)
    return h if scale is None else h * jnp.asarray(scale, h.dtype)


def _finished(
    logits: Float[Array, "*n V"], bias: Float[Array | np.ndarray, " V"] | None, softcap: float | None
) -> Float[Array, "*n V"]:
    if bias is not None:
        logits = logits + jnp.asarray(bias, logits.dtype)
    if softcap is not None:
        capped = softcap * jnp.tanh(logits.astype(wide_dtype(logits.dtype)) / softcap)
        logits = capped.astype(logits.dtype)
    return logits
