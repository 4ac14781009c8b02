"""Who may attend to whom: all of the library's masks, and the softmax under a mask.

A boolean mask says True = may attend. A float mask is added to the wide scores, and ``-inf`` in it hides. Both
broadcast to ``[B, A, T, S]``.
"""

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from torch_impl import fused

Mask = Bool[Tensor, "..."] | Float[Tensor, "..."]


def causal_mask(
    T: int, S: int, *, window: int | None = None, device: torch.device | str | None = None
) -> Bool[Tensor, "T S"]:
    """Query i sees keys ``j <= i + S - T``: the two sequences are aligned at their ends.

    With a window w also ``j > i + S - T - w``: itself and the w - 1 keys before it.
    """
    ahead = _key_minus_query(T, S, device)
    return ahead <= 0 if window is None else (ahead <= 0) & (ahead > -window)


def window_mask(T: int, S: int, *, window: int, device: torch.device | str | None = None) -> Bool[Tensor, "T S"]:
    """Query i sees keys with ``|j - (i + S - T)| < window``, on both sides."""
    return _key_minus_query(T, S, device).abs() < window


def _key_minus_query(T: int, S: int, device: torch.device | str | None) -> Int[Tensor, "T S"]:
    query = torch.arange(T, device=device) + (S - T)
    return torch.arange(S, device=device) - query[:, None]


def padding_mask(real: Bool[Tensor, "B S"]) -> Bool[Tensor, "B 1 1 S"]:
    """Keys that are real tokens may be attended to, by every head and query."""
    return real[:, None, None, :]


def positions_from(real: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Positions counted over real tokens, ``max(cumsum(real) - 1, 0)``: padding on either side shifts nothing."""
    return (real.cumsum(-1) - 1).clamp(min=0)


def segment_mask(segments: Integer[Tensor, "B T"]) -> Bool[Tensor, "B 1 T T"]:
    """Keys of the query's own document, for rows that hold several: one number each, in ``segments``.

    0 is padding, which sees nothing and which nothing sees.
    """
    same = segments[:, :, None] == segments[:, None, :]
    return (same & (segments != 0)[:, :, None])[:, None]


def segment_positions(segments: Integer[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Positions that begin anew, from 0, with each run of equal numbers; padding (0) has 0."""
    place = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    start = place.masked_fill(~first, 0).cummax(-1).values  # of the run that a place is in
    return (place - start).masked_fill(segments == 0, 0)


def split_mask(mask: Mask | None, wide: torch.dtype) -> tuple[Bool[Tensor, "..."] | None, Float[Tensor, "..."] | None]:
    """A mask of either kind as (what may be attended to, what is added to the scores in the wide dtype)."""
    if mask is None or mask.dtype == torch.bool:
        return mask, None
    added = mask.to(wide)
    return added != -torch.inf, added


def both(left: Bool[Tensor, "..."] | None, right: Bool[Tensor, "..."] | None) -> Bool[Tensor, "..."] | None:
    """What both masks allow; None allows everything."""
    if left is None or right is None:
        return right if left is None else left
    return left & right


def masked_softmax(
    scores: Float[Tensor, "*heads T S"], allowed: Bool[Tensor, "..."] | None
) -> Float[Tensor, "*heads T S"]:
    """Softmax over the allowed keys; a row that has none (or only scores of ``-inf``) is 0, with gradient 0.

    Forbidden keys are filled in before the softmax, so that their scores do not matter, and once more after it, so
    that their gradients do not: 0 · NaN and 0 · inf would otherwise spread to the whole row.
    """
    hidden = None if allowed is None else ~allowed
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    empty = scores.detach().amax(-1, keepdim=True) == -torch.inf
    weights = scores.masked_fill(empty, 0.0).softmax(-1)
    return weights.masked_fill(empty if hidden is None else empty | hidden, 0.0)


def quarantine(X: Float[Tensor, "B S D"]) -> tuple[Float[Tensor, "B S D"], Bool[Tensor, "B S"]]:
    """Rows of X that hold anything but finite numbers replaced by 0, and their places.

    A hidden key contributes ``0 · value`` to a sum, and that is NaN where the value is NaN or infinite. With such rows
    taken out, nothing can spread from them, forward or backward; ``exposed`` says who must see them all the same.
    """
    if fused.may_look(X) and fused.is_finite(X):
        return X, torch.zeros(X.shape[:-1], dtype=torch.bool)
    there = X.detach()
    broken = (there - there).sum(-1).isnan()  # a number less itself is 0, or NaN where it is not finite
    return X.masked_fill(broken[..., None], 0.0), broken


def exposed(broken: Bool[Tensor, "B S"], allowed: Bool[Tensor, "..."] | None) -> Bool[Tensor, "B ..."]:
    """Queries that may attend, in any head, to a broken key."""
    if allowed is None or (fused.may_look(broken) and not broken.any()):
        return broken.any(-1, keepdim=True)
    return (allowed & padding_mask(broken)).any((1, 3))  # [B, A or 1, T or 1, S] -> [B, T or 1]
