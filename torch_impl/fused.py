"""Fast paths beside the explicit formulas: PyTorch's own kernels, where they compute the same function.

They stand on a look at values (is anything not finite? is this mask the causal one?), which costs nothing in eager
PyTorch on a CPU; while a function is compiled, and on other devices, the formulas run as they are written. Within
``explicit_formulas()`` they do so everywhere: a test compares the two.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own name for it)
from jaxtyping import Bool, Float
from torch import Tensor, nn

_explicit = 0  # blocks of ``explicit_formulas`` that are open


@contextlib.contextmanager
def explicit_formulas() -> Iterator[None]:
    """Within, no fast path is taken."""
    global _explicit
    _explicit += 1
    try:
        yield
    finally:
        _explicit -= 1


def may_be_fast() -> bool:
    """Whether a faster way to the same values may be taken at all."""
    return not _explicit


def may_look(X: Tensor) -> bool:
    """Whether values may decide which way is taken."""
    return not _explicit and X.device.type == "cpu" and not torch.compiler.is_compiling()


def may_pass_by(module: nn.Module, rate: float, rng: Tensor | None) -> bool:
    """Whether a dropout need not be called: it would change nothing, and nobody watches it."""
    return (rate == 0 or rng is None) and not module._forward_hooks and not module._forward_pre_hooks


def is_finite(X: Tensor) -> bool:
    """Whether all of X surely is: a sum of finite numbers that overflows counts as a no."""
    return bool(X.detach().sum().isfinite())


def attention(
    Q: Float[Tensor, "B A T K"],
    K: Float[Tensor, "B G S K"],
    V: Float[Tensor, "B G S J"],
    *,
    scale: float,
    allowed: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, "B A T J"] | None:
    """``softmax(Q Kᵀ · scale) V`` over the allowed keys in one kernel; None where it cannot be taken.

    That is where anything overflows: PyTorch adds -inf to hidden scores, and one that is inf would spread. Scores
    ``[B, A, T, S]`` are never held. A query with nothing to attend to gives 0, with gradient 0 (PyTorch from 2.5 on).
    """
    if Q.shape[-1] != V.shape[-1] or not may_look(Q):
        return None
    T, S = Q.shape[2], K.shape[2]
    causal = False
    if allowed is not None and T == S and allowed.shape[-2:] == (T, S) and allowed.numel() == T * S:
        causal = torch.equal(allowed.view(T, S), torch.ones(T, S, dtype=torch.bool).tril_())
    Z = F.scaled_dot_product_attention(
        Q,
        K,
        V,
        attn_mask=None if causal else allowed,
        is_causal=causal,
        scale=scale,
        enable_gqa=K.shape[1] != Q.shape[1],
    )
    return Z if is_finite(Z) else None


def layer_norm(
    x: Float[Tensor, "*rows D"], factor: Float[Tensor, " D"], bias: Float[Tensor, " D"] | None, eps: float
) -> Float[Tensor, "*rows D"] | None:
    """``(x - mean) / sqrt(var + eps) · factor + bias`` in one kernel; None where it is not taken."""
    if not may_look(x):
        return None
    return F.layer_norm(x, x.shape[-1:], factor, bias, eps)
