"""The loss of predicting tokens, as a sum and the number of places that it is over.

Sums, so that micro-batches can be added up and divided once, by ``mean_loss``. Computed wide. What stands at a place
that does not count plays no part, forward and backward, whatever it holds.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch.autograd.function import once_differentiable

from torch_impl.linear import wide_dtype
from torch_impl.positions import extremes
from twinformer.checks import check_cross_entropy, check_next_tokens


def cross_entropy(
    logits: Float[Tensor, "B T V"],
    targets: Integer[Tensor, "B T"],
    *,
    real: Bool[Tensor, "B T"] | None = None,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Float[Tensor, ""], Integer[Tensor, ""]]:
    """The sum over the places where ``real`` is True (None: all), wide, and how many they are.

    With ``p = softmax(logits)``, ε the smoothing and z the z_loss, each place adds

        (1 - ε) (-ln p[target]) + ε mean_v(-ln p[v]) + z (ln Σ_v exp logits[v])²

    Smoothing: Szegedy et al. 2016, section 7 (each of the V tokens has ε/V, the target too); z_loss: Chowdhery et al.
    2022, arXiv:2204.02311, section 5. Differentiable once, in the logits. Raises InputError for shapes, dtypes, rates
    and targets of another kind; while compiled, a real target out of range gives NaN.
    """
    if not torch.compiler.is_compiling():
        # other shapes cannot be indexed with: the check names them, and targets are then not looked at
        fits = real is None or (real.dtype == torch.bool and real.shape == targets.shape)
        lowest, highest = extremes(targets if real is None else targets[real]) if fits else (None, None)
        check_cross_entropy(
            "cross_entropy",
            logits=logits,
            targets=targets,
            real=real,
            smoothing=smoothing,
            z_loss=z_loss,
            lowest=lowest,
            highest=highest,
        )
    if real is None:
        real = torch.ones_like(targets, dtype=torch.bool)
    total: Tensor = _CrossEntropy.apply(logits, targets.long(), real, float(smoothing), float(z_loss))  # type: ignore[no-untyped-call]
    return total, real.sum()


class _CrossEntropy(torch.autograd.Function):
    """The sum with its gradient by hand: autograd's own would keep three wide copies of the logits, this needs one.

    With ``lse = ln Σ exp x``: ``d/dx_v = p_v (1 + 2 z lse) - (1 - ε) [v = target] - ε/V``.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, real: Tensor, smoothing: float, z_loss: float) -> Tensor:
        V = logits.shape[-1]
        x = logits.to(wide_dtype(logits.dtype))
        peak = x.amax(-1)
        x = x - peak[..., None]
        known = (targets >= 0) & (targets < V)
        targets = targets.clamp(0, V - 1)
        chosen = x.gather(-1, targets[..., None])[..., 0]
        average = x.mean(-1) if smoothing else None
        log_sum = torch.where(known, x.exp_().sum(-1).log(), torch.nan)  # of exp(x - peak)
        losses = (1 - smoothing) * (log_sum - chosen)
        if average is not None:  # not 0 · mean: a logit may be -inf
            losses = losses + smoothing * (log_sum - average)
        if z_loss:
            losses = losses + z_loss * (peak + log_sum).square()
        ctx.save_for_backward(logits, targets, real, peak, log_sum)
        ctx.smoothing, ctx.z_loss = smoothing, z_loss
        return losses.masked_fill(~real, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, real, peak, log_sum = ctx.saved_tensors
        x = logits.to(peak.dtype) - peak[..., None]
        x = x.sub_(log_sum[..., None]).exp_()  # p
        if ctx.z_loss:
            x = x.mul_(1 + 2 * ctx.z_loss * (peak + log_sum)[..., None])
        if ctx.smoothing:
            x = x.sub_(ctx.smoothing / logits.shape[-1])
        x = x.scatter_add_(-1, targets[..., None], x.new_full((*targets.shape, 1), ctx.smoothing - 1))
        x = x.mul_(cotangent).masked_fill_(~real[..., None], 0.0)
        return x.to(logits.dtype), None, None, None, None


def mean_loss(total: Float[Tensor, ""], count: Integer[Tensor, ""] | int) -> Float[Tensor, ""]:
    """``total / count``, and 0 where count is 0."""
    places = torch.as_tensor(count, device=total.device)
    return torch.where(places > 0, total / places.clamp(min=1), 0.0)


def next_tokens(
    tokens: Integer[Tensor, "B T"], real: Bool[Tensor, "B T"] | None = None
) -> tuple[Integer[Tensor, "B T-1"], Integer[Tensor, "B T-1"], Bool[Tensor, "B T-1"]]:
    """``(inputs, targets, real)``: each token and the one after it, and where both are real.

    Raises InputError for another rank or dtype.
    """
    if not torch.compiler.is_compiling():
        check_next_tokens("next_tokens", tokens=tokens, real=real)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if real is None:
        return inputs, targets, torch.ones_like(targets, dtype=torch.bool)
    return inputs, targets, real[:, :-1] & real[:, 1:]
