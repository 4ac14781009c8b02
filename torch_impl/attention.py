"""Multi-head attention: the formula, and the layer around it."""

import functools
import math

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from torch_impl import fused, masks
from torch_impl.dropout import Dropout, Key
from torch_impl.linear import DTYPES, Linear, wide_dtype
from torch_impl.masks import Mask, masked_softmax, quarantine
from torch_impl.weights import initialize
from twinformer.checks import check_activations, check_sizes
from twinformer.config import DType
from twinformer.errors import InputError, Problems


def attend(
    Q: Float[Tensor, "B A T K"],
    K: Float[Tensor, "B G S K"],
    V: Float[Tensor, "B G S J"],
    *,
    scale: float,
    softcap: float | None = None,
    bias: Float[Tensor, "..."] | None = None,
    allowed: Bool[Tensor, "..."] | None = None,
    dropout: Dropout | None = None,
    rng: Key | None = None,
) -> Float[Tensor, "B A T J"]:
    """``Z = softmax(Q Kᵀ · scale + bias) V`` over the allowed keys; query head a uses key head ``a // (A // G)``.

    Products are in the dtype of Q, all between them is wide: scaling, softcap c (``c · tanh(scores / c)``), bias,
    softmax and dropout of its weights. Where scores need nothing between the products but their scale, one kernel does
    it all (``fused.attention``).
    """
    is_plain = softcap is None and bias is None and (dropout is None or fused.may_pass_by(dropout, dropout.rate, rng))
    if is_plain and Q.shape[2] > 1:
        Z = fused.attention(Q, K, V, scale=scale, allowed=allowed)
        if Z is not None:
            return Z
    B, A, T, _ = Q.shape
    G, S = K.shape[1:3]
    wide = wide_dtype(Q.dtype)
    # the A // G query heads that share a key head stand below each other: one product, and no copy of K or V
    grouped = (B, G, (A // G) * T, -1)
    scores = (Q.reshape(grouped) @ K.mT).view(B, A, T, S).to(wide) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(wide)
    weights = masked_softmax(scores, allowed)
    if dropout is not None:
        weights = dropout(weights, rng)
    return (weights.to(Q.dtype).view(grouped) @ V).view(B, A, T, -1)


class AttentionLayer(nn.Module):
    """Multi-head attention (book, chapter "Transformers", "Multi-head attention"; cross-attention: chapter "Machine
    Translation").

    ``Q = X W^Q``, ``K = M W^K``, ``V = M W^V`` with ``M = X``, or ``M = H_enc`` when it is given; head a owns rows
    ``a·K … (a+1)·K - 1`` of the matrix. Norms of each head's query and key, then rotary (self-attention only), then
    ``attend``; the heads side by side times ``W^O``.

    Self-attention obeys ``mask``, ``causal``, ``window``, ``bias`` and ``rotary``; cross-attention only
    ``memory_mask``. A query with nothing to attend to has Z = 0, with zero gradient. A key that a query may not attend
    to contributes exactly nothing to it, forward and backward, whatever it holds; a query that may attend to a row that
    is not finite, or that is one itself, gives NaN.

    The two halves of it, ``remember`` and ``recall``, are what decoding step by step is made of.

    Raises InputError for wrong shapes or dtypes.
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
        query_norm: nn.Module | None = None,
        key_norm: nn.Module | None = None,
        rotary: nn.Module | None = None,
        causal: bool = False,
        window: int | None = None,
        dropout: float = 0.0,
        param_dtype: DType = "float32",
        compute_dtype: DType = "float32",
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        value_dim = key_dim if value_dim is None else value_dim
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_sizes(
            "AttentionLayer",
            model_dim=model_dim,
            key_dim=key_dim,
            num_heads=num_heads,
            value_dim=value_dim,
            num_kv_heads=num_kv_heads,
            window=1 if window is None else window,
        )
        if num_heads % num_kv_heads:
            wanted = f"num_kv_heads: expected a divisor of num_heads={num_heads}, got {num_kv_heads}"
            raise InputError("AttentionLayer", [wanted])
        self.model_dim, self.num_heads, self.num_kv_heads = model_dim, num_heads, num_kv_heads
        self.scale = 1 / math.sqrt(key_dim) if scale is None else scale
        self.softcap = softcap
        self.causal = causal
        self.window = window
        self.dropout = Dropout(dropout)
        self.compute_dtype = DTYPES[compute_dtype]

        linear = functools.partial(Linear, param_dtype=param_dtype, compute_dtype=compute_dtype, seed=None)
        self.query = linear(model_dim, num_heads * key_dim, bias=qkv_bias)
        self.key = linear(model_dim, num_kv_heads * key_dim, bias=qkv_bias)
        self.value = linear(model_dim, num_kv_heads * value_dim, bias=qkv_bias)
        self.output = linear(num_heads * value_dim, model_dim, bias=output_bias)
        self.query_norm = query_norm
        self.key_norm = key_norm
        self.rotary = rotary
        initialize(self, seed)

    def forward(
        self,
        X: Float[Tensor, "B T D"],
        H_enc: Float[Tensor, "B S D"] | None = None,
        mask: Mask | None = None,
        memory_mask: Mask | None = None,
        *,
        positions: Integer[Tensor, "#B T"] | None = None,
        bias: Float[Tensor, "..."] | None = None,
        rng: Key | None = None,
    ) -> Float[Tensor, "B T D"]:
        if not torch.compiler.is_compiling():
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
        wide = wide_dtype(self.compute_dtype)
        if H_enc is None:
            if self.rotary is not None and positions is None:
                positions = torch.arange(X.shape[1], device=X.device)[None]
            allowed, bias = self._self_attention_masks(X, mask, bias, wide)
            K, V, broken = self.remember(X, positions=positions)
        else:
            allowed, bias = masks.split_mask(memory_mask, wide)
            positions = None
            K, V, broken = self.remember(H_enc)
        return self.recall(X, K, V, broken, positions=positions, bias=bias, allowed=allowed, rng=rng)

    def remember(
        self, M: Float[Tensor, "B S D"], *, positions: Integer[Tensor, "#B S"] | None = None
    ) -> tuple[Float[Tensor, "B G S K"], Float[Tensor, "B G S J"], Bool[Tensor, "B S"]]:
        """Keys and values of M as a cache keeps them, after norm and rotation, and the rows that are not finite.

        With ``positions`` the keys are turned, where the layer turns any; for cross-attention there are none.
        """
        if not torch.compiler.is_compiling():
            check_activations("AttentionLayer", X=M, model_dim=self.model_dim, positions=positions)
        M, broken = quarantine(M.to(self.compute_dtype))
        # a finite row can still overflow in a product, and must not spread either
        K, broken_key = quarantine(self.key(M))
        V, broken_value = quarantine(self.value(M))
        K, V = self._heads(K, self.num_kv_heads), self._heads(V, self.num_kv_heads)
        if self.key_norm is not None:
            K = self.key_norm(K)
        if self.rotary is not None and positions is not None:
            K = self.rotary(K, positions)
        return K, V, broken | broken_key | broken_value

    def recall(
        self,
        X: Float[Tensor, "B T D"],
        K: Float[Tensor, "B G S K"],
        V: Float[Tensor, "B G S J"],
        broken: Bool[Tensor, "B S"],
        *,
        positions: Integer[Tensor, "#B T"] | None = None,
        bias: Float[Tensor, "..."] | None = None,
        allowed: Bool[Tensor, "..."] | None = None,
        rng: Key | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Attention of the queries of X to keys and values that ``remember`` gave.

        ``allowed`` (None: everything) and ``bias`` broadcast to ``[B, A, T, S]``; ``positions`` are those of X, where
        its queries are to be turned.
        """
        if not torch.compiler.is_compiling():
            check_activations("AttentionLayer", X=X, model_dim=self.model_dim, positions=positions)
            _check_kept(X, K, V, broken, self.num_kv_heads)
        X, lost = quarantine(X.to(self.compute_dtype))
        Q, broken_query = quarantine(self.query(X))
        Q = self._heads(Q, self.num_heads)
        if self.query_norm is not None:
            Q = self.query_norm(Q)
        if self.rotary is not None and positions is not None:
            Q = self.rotary(Q, positions)
        Z = attend(
            Q,
            K,
            V,
            scale=self.scale,
            softcap=self.softcap,
            bias=bias,
            allowed=allowed,
            dropout=self.dropout,
            rng=rng,
        )
        Y: Tensor = self.output(Z.transpose(1, 2).flatten(2))
        lost = lost | broken_query | masks.exposed(broken, allowed)
        if fused.may_look(lost) and not lost.any():
            return Y
        return Y.masked_fill(lost[..., None], torch.nan)

    def _heads(self, rows: Float[Tensor, "B S AK"], heads: int) -> Float[Tensor, "B A S K"]:
        return rows.view(*rows.shape[:2], heads, -1).transpose(1, 2)

    def _self_attention_masks(
        self, X: Tensor, mask: Tensor | None, bias: Tensor | None, wide: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        """What each query may attend to, and what is added to its scores."""
        T = X.shape[1]
        allowed, added = masks.split_mask(mask, wide)
        if self.causal:
            allowed = masks.both(allowed, masks.causal_mask(T, T, window=self.window, device=X.device))
        elif self.window is not None:
            allowed = masks.both(allowed, masks.window_mask(T, T, window=self.window, device=X.device))
        if bias is not None:
            added = bias.to(wide) if added is None else bias.to(wide) + added
        return allowed, added


def _check_kept(X: Tensor, K: Tensor, V: Tensor, broken: Tensor, heads: int) -> None:
    """Raise InputError unless keys, values and broken rows are of one batch, that of X, and of one length."""
    rows = (X.shape[0], heads, K.shape[2] if K.ndim == 4 else 0)
    if K.shape[:3] == rows == V.shape[:3] and broken.shape == (rows[0], rows[2]):
        return
    problems = Problems("AttentionLayer", InputError)
    have, want = tuple(K.shape), rows[:2]
    problems.expect(have[:2] == want, f"K: expected [B, G, S, K] with B, G = {want}, got shape {have}")
    have = tuple(V.shape)
    problems.expect(have[:3] == rows, f"V: expected [B, G, S, J] with B, G, S = {rows}, got shape {have}")
    have = tuple(broken.shape)
    problems.expect(have == rows[::2], f"broken: expected shape [B, S] = {rows[::2]}, got {have}")
    problems.raise_if_any()
