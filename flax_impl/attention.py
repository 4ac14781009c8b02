"""Attention: every position looks at others and takes a weighted sum of what it finds."""

import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Integer

from flax_impl.dropout import Dropout, Key
from flax_impl.linear import Linear, check_dtypes, in_training, matmul, wide_dtype
from flax_impl.masks import causal_mask, exposed, masked_softmax, quarantine, window_mask
from flax_impl.norms import LayerNorm, RMSNorm
from flax_impl.positions import Positions, RotaryEncoding
from flax_impl.weights import initialize
from twinformer.checks import check_activations, check_sizes
from twinformer.config import DType
from twinformer.errors import ConfigError, Problems

Mask = Bool[Array | np.ndarray, "..."] | Float[Array | np.ndarray, "..."]
Allowed = Bool[Array, "..."]
Added = Float[Array, "..."]

# K Qᵀ reads the keys as they lie: with few queries several times faster on a CPU than Q Kᵀ, which is the same product
_FEW_ROWS = 16

# from so many queries on, causal self-attention is trained by pieces of them; more pieces take longer to compile
_LONG, _PIECES, _MOST_ROWS = 256, 4, 512


def attend(
    Q: Float[Array | np.ndarray, "B A T K"],
    K: Float[Array | np.ndarray, "B G S K"],
    V: Float[Array | np.ndarray, "B G S J"],
    *,
    scale: float,
    softcap: float | None = None,
    bias: Float[Array | np.ndarray, "..."] | None = None,
    allowed: Bool[Array | np.ndarray, "..."] | None = None,
    dropout: Dropout | None = None,
    rng: Key | None = None,
) -> Float[Array, "B A T J"]:
    """``softmax(scale · Q Kᵀ + bias) V``, over the allowed keys; query head a uses key/value head ``a // (A // G)``.

    ``softcap`` c turns a scaled score s into ``c · tanh(s / c)`` before the bias is added. Scores and softmax are wide,
    the two products in the dtype of Q. A query with nothing allowed gives 0, with zero gradient.

    Source: book, "Multi-head attention"; Vaswani et al. 2017, eq. 1; heads in groups: Ainslie et al. 2023,
    arXiv:2305.13245.
    """
    Q, K, V = jnp.asarray(Q), jnp.asarray(K), jnp.asarray(V)
    B, A, T, _ = Q.shape
    G, S = K.shape[1:3]
    # the A // G query heads of a group lie side by side: as one tall matrix they meet their key head in one product
    rows = Q.reshape(B, G, A // G * T, -1)
    if rows.shape[2] <= _FEW_ROWS:
        scores = matmul(K, rows.swapaxes(-1, -2)).swapaxes(-1, -2)
    else:
        scores = matmul(rows, K.swapaxes(-1, -2))
    scores = scores.reshape(B, A, T, S).astype(wide_dtype(Q.dtype)) * scale
    if softcap is not None:
        if allowed is not None:
            scores = jnp.where(allowed, scores, 0)  # a hidden score that overflowed would spoil the gradient of tanh
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + jnp.asarray(bias, scores.dtype)
    P = masked_softmax(scores, allowed)
    if dropout is not None:
        P = dropout(P, rng)
    return matmul(P.astype(Q.dtype).reshape(B, G, A // G * T, S), V).reshape(B, A, T, -1)


def attend_causally(
    Q: Float[Array | np.ndarray, "B A T K"],
    K: Float[Array | np.ndarray, "B G T K"],
    V: Float[Array | np.ndarray, "B G T J"],
    *,
    scale: float,
    softcap: float | None = None,
    bias: Float[Array | np.ndarray, "..."] | None = None,
    allowed: Bool[Array | np.ndarray, "..."],
    window: int | None = None,
) -> Float[Array, "B A T J"]:
    """What ``attend`` gives where ``allowed`` hides the future (and with a window, the past), in less time and memory.

    Queries go in pieces, and each piece meets only the keys that some query of it may see. XLA on a CPU writes the
    scores to memory several times over: of four pieces, six in sixteen are never made.
    """
    T = Q.shape[2]
    rows = min(-(-T // _PIECES), _MOST_ROWS)
    pieces = []
    for begin in range(0, T, rows):
        end = min(begin + rows, T)
        first = 0 if window is None else max(0, begin - window + 1)
        pieces.append(
            attend(
                Q[:, :, begin:end],
                K[:, :, first:end],
                V[:, :, first:end],
                scale=scale,
                softcap=softcap,
                bias=None if bias is None else _part(jnp.asarray(bias), begin, first, end),
                allowed=_part(jnp.asarray(allowed), begin, first, end),
            )
        )
    return jnp.concatenate(pieces, axis=2)


def _part(values: Array, begin: int, first: int, end: int) -> Array:
    """Of what broadcasts to ``[B, A, T, S]``: the rows ``begin … end - 1`` and the columns ``first … end - 1``."""
    rows = slice(begin, end) if values.ndim > 1 and values.shape[-2] > 1 else slice(None)
    columns = slice(first, end) if values.ndim > 0 and values.shape[-1] > 1 else slice(None)
    return values[..., rows, columns] if values.ndim > 1 else values[..., columns]


class AttentionLayer(nnx.Module):
    """Multi-head attention of X to itself, or to ``H_enc``: ``Z W^O`` with ``Z`` from ``attend``.

    ``Q = X W^Q``, ``K = M W^K``, ``V = M W^V`` with ``M = X`` (self-attention) or ``M = H_enc`` (cross-attention). In
    self-attention ``mask``, ``causal``, ``window``, ``bias`` and ``rotary`` apply, in cross-attention only
    ``memory_mask``. ``X [B, T, D]``, ``H_enc [B, S, D] -> [B, T, D]`` in ``compute_dtype``.

    A key that is hidden from a query contributes exactly nothing to it, forward and backward, NaN included. A query
    that may attend to a non-finite row, or is one itself, gives NaN. Raises InputError.

    Source: book, "Multi-head attention" and "Cross-attention".
    """

    def __init__(
        self,
        model_dim: int,
        key_dim: int,
        num_heads: int,
        *,
        value_dim: int | None = None,
        num_kv_heads: int | None = None,
        qkv_bias: bool = False,
        output_bias: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        query_norm: LayerNorm | RMSNorm | None = None,
        key_norm: LayerNorm | RMSNorm | None = None,
        rotary: RotaryEncoding | None = None,
        causal: bool = False,
        window: int | None = None,
        dropout: float = 0.0,
        param_dtype: DType = "float32",
        compute_dtype: DType = "float32",
        seed: int | None = 0,
    ) -> None:
        D, K, A = model_dim, key_dim, num_heads
        J = key_dim if value_dim is None else value_dim
        G = num_heads if num_kv_heads is None else num_kv_heads
        check_sizes("AttentionLayer", model_dim=D, key_dim=K, num_heads=A, value_dim=J, num_kv_heads=G)
        check_dtypes("AttentionLayer", param_dtype=param_dtype, compute_dtype=compute_dtype)
        problems = Problems("AttentionLayer", ConfigError)
        problems.expect(A % G == 0, f"num_kv_heads: expected a divisor of num_heads={A}, got {G}")
        problems.expect(window is None or window >= 1, f"window: expected at least 1 or None, got {window}")
        problems.raise_if_any()

        self.model_dim, self.num_heads, self.num_kv_heads = D, A, G
        self.scale = 1 / math.sqrt(key_dim) if scale is None else scale
        self.softcap, self.causal, self.window = softcap, causal, window
        self.compute_dtype = compute_dtype
        linear = functools.partial(Linear, param_dtype=param_dtype, compute_dtype=compute_dtype, seed=None)
        self.query = linear(D, A * K, bias=qkv_bias)
        self.key = linear(D, G * K, bias=qkv_bias)
        self.value = linear(D, G * J, bias=qkv_bias)
        self.output = linear(A * J, D, bias=output_bias)
        self.query_norm, self.key_norm, self.rotary = query_norm, key_norm, rotary
        self.dropout = Dropout(dropout)
        if seed is not None:
            initialize(self, seed)

    def __call__(
        self,
        X: Float[Array | np.ndarray, "B T D"],
        H_enc: Float[Array | np.ndarray, "B S D"] | None = None,
        mask: Mask | None = None,
        memory_mask: Mask | None = None,
        *,
        positions: Positions | None = None,
        bias: Float[Array | np.ndarray, "..."] | None = None,
        rng: Key | None = None,
    ) -> Float[Array, "B T D"]:
        check_activations(
            "AttentionLayer",
            X=X,
            model_dim=self.model_dim,
            H_enc=H_enc,
            mask=mask,
            memory_mask=memory_mask,
            num_heads=self.num_heads,
            positions=positions,
            bias=bias,
        )
        if H_enc is None:
            positions = jnp.arange(X.shape[1])[None] if positions is None else positions
            K, V, broken = self.remember(X, positions=positions)
            allowed, added = self._seen(X.shape[1], mask, bias)
        else:
            positions = None
            K, V, broken = self.remember(H_enc)
            allowed, added = self._read(memory_mask)
        return self.recall(X, K, V, broken, positions=positions, bias=added, allowed=allowed, rng=rng)

    def remember(
        self, M: Float[Array | np.ndarray, "B S D"], *, positions: Integer[Array | np.ndarray, "#B S"] | None = None
    ) -> tuple[Float[Array, "B G S K"], Float[Array, "B G S J"], Bool[Array, "B S"]]:
        """Keys and values of M as a cache keeps them (after norm and rotary), and the places that are not finite.

        Self-attention passes the positions of M, by which its keys turn; cross-attention has none. Raises InputError.
        """
        check_activations("AttentionLayer", X=M, model_dim=self.model_dim, positions=positions)
        M, broken = quarantine(jnp.asarray(M, self.compute_dtype))
        # finite rows can overflow in a product: those are broken too
        rows_K, broken_K = quarantine(self.key(M))
        rows_V, broken_V = quarantine(self.value(M))
        K, V = self._heads(rows_K, self.num_kv_heads), self._heads(rows_V, self.num_kv_heads)
        if self.key_norm is not None:
            K = self.key_norm(K)
        if self.rotary is not None and positions is not None:
            K = self.rotary(K, positions)
        return K, V, broken | broken_K | broken_V

    def recall(
        self,
        X: Float[Array | np.ndarray, "B T D"],
        K: Float[Array, "B G S K"],
        V: Float[Array, "B G S J"],
        broken: Bool[Array, "B S"],
        *,
        positions: Positions | None = None,
        bias: Float[Array | np.ndarray, "..."] | None = None,
        allowed: Bool[Array | np.ndarray, "..."] | None = None,
        rng: Key | None = None,
    ) -> Float[Array, "B T D"]:
        """The queries of X on what ``remember`` gave: ``[B, T, D]``.

        ``allowed`` is boolean and broadcasts to ``[B, A, T, S]``, as ``bias`` does, which is added to the scores.
        ``positions`` are those of X, by which its queries turn (self-attention). Raises InputError.
        """
        check_activations("AttentionLayer", X=X, model_dim=self.model_dim, positions=positions)
        X, lost = quarantine(jnp.asarray(X, self.compute_dtype))
        rows_Q, broken_Q = quarantine(self.query(X))
        Q = self._heads(rows_Q, self.num_heads)
        if self.query_norm is not None:
            Q = self.query_norm(Q)
        if self.rotary is not None and positions is not None:
            Q = self.rotary(Q, positions)
        how: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap, "bias": bias}
        drops = self.dropout.rate > 0 and rng is not None  # what is dropped goes by place in all of the scores
        # training has no cache: with positions, and as many keys, they are those of X itself
        is_own = self.causal and positions is not None and in_training() and K.shape[2] == X.shape[1]
        if is_own and allowed is not None and X.shape[1] >= _LONG and not drops:
            Z = attend_causally(Q, K, V, allowed=allowed, window=self.window, **how)
        else:
            Z = attend(Q, K, V, allowed=allowed, dropout=self.dropout, rng=rng, **how)
        Y = self.output(Z.swapaxes(1, 2).reshape(*X.shape[:2], -1))
        lost = lost | broken_Q | exposed(broken, allowed)
        return jnp.where(lost[..., None], jnp.nan, Y)

    def _heads(self, Y: Float[Array, "B S AK"], heads: int) -> Float[Array, "B {heads} S K"]:
        """Head a owns columns ``a·K … (a+1)·K - 1``."""
        return Y.reshape(*Y.shape[:2], heads, -1).swapaxes(1, 2)

    def _seen(
        self, T: int, mask: Mask | None, bias: Float[Array | np.ndarray, "..."] | None
    ) -> tuple[Allowed | None, Added | None]:
        """What self-attention may see, and what is added to its scores."""
        allowed, added = self._read(mask)
        if self.causal:
            allowed = _both(allowed, causal_mask(T, T, window=self.window))
        elif self.window is not None:
            allowed = _both(allowed, window_mask(T, T, window=self.window))
        if bias is not None:
            bias = jnp.asarray(bias, wide_dtype(self.compute_dtype))
            added = bias if added is None else added + bias
        return allowed, added

    def _read(self, mask: Mask | None) -> tuple[Allowed | None, Added | None]:
        """A mask as (what it allows, what it adds): ``-inf`` in a float mask hides."""
        if mask is None:
            return None, None
        mask = jnp.asarray(mask)
        if mask.dtype == jnp.bool_:
            return mask, None
        added = mask.astype(wide_dtype(self.compute_dtype))
        return added != -jnp.inf, added


def _both(first: Allowed | None, second: Allowed) -> Allowed:
    return second if first is None else first & second
