"""From logits to a token: what is done to the logits first, and how one is drawn.

Logits ``[B, V]`` are taken wide. The order of tokens is: higher logit first, the lower id first among equals; hidden
tokens have ``-inf``. From a row whose highest logit is not finite (NaN, where there is one, is the highest) nothing is
chosen, whatever processors make of its other tokens. The random numbers are a function of (seed, row, step), the same
in all dtypes and frameworks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Int64, Integer
from torch import Tensor

from torch_impl.dropout import WORD, philox_rows, random_key
from torch_impl.linear import wide_dtype
from torch_impl.positions import extremes
from twinformer.decoding import SamplingConfig
from twinformer.errors import InputError

_FEW = 1024  # tokens that hold the mass p of most distributions: finding them is much faster than sorting all

Processor = Callable[[Tensor, Tensor], Tensor]  # (logits, seen) -> logits


@dataclass(frozen=True)
class RepetitionPenalty:
    """Logits x of tokens ``seen`` become ``x / penalty`` where ``x > 0``, else ``x · penalty``.

    Keskar et al. 2019, arXiv:1909.05858, section 4.1; the rule for negative logits as ``transformers`` has it.
    """

    penalty: float

    def __post_init__(self) -> None:
        SamplingConfig(repetition_penalty=self.penalty)

    def __call__(self, logits: Float[Tensor, "B V"], seen: Bool[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        x = _wide(logits)
        return torch.where(seen, torch.where(x > 0, x / self.penalty, x * self.penalty), x)


@dataclass(frozen=True)
class Temperature:
    """``x / t``."""

    t: float

    def __post_init__(self) -> None:
        SamplingConfig(temperature=self.t)

    def __call__(self, logits: Float[Tensor, "B V"], seen: Bool[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        return _wide(logits) / self.t


@dataclass(frozen=True)
class TopK:
    """The first k of the order stay; all if there are no more than k."""

    k: int

    def __post_init__(self) -> None:
        SamplingConfig(top_k=self.k)

    def __call__(self, logits: Float[Tensor, "B V"], seen: Bool[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        x = _wide(logits)
        if x.shape[-1] <= self.k:
            return x
        return _hide_after(x, x.topk(self.k).values[:, -1:], torch.full_like(x[:, :1], self.k))


@dataclass(frozen=True)
class TopP:
    """The smallest set of first tokens whose mass reaches p, the crossing token included.

    A token stays iff the mass before it, in the softmax of what has been left, is below p (Holtzman et al. 2020,
    arXiv:1904.09751).
    """

    p: float

    def __post_init__(self) -> None:
        SamplingConfig(top_p=self.p)

    def __call__(self, logits: Float[Tensor, "B V"], seen: Bool[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        x = _wide(logits)
        if self.p == 1:  # the mass before a token is below 1, whatever rounding makes of it
            return x
        total = (x - x.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True)
        ordered = x.topk(min(_FEW, x.shape[-1])).values
        mass = _mass_up_to(ordered, total)
        if torch.compiler.is_compiling() or not (mass[:, -1] >= self.p).all():  # then the few do not do
            ordered = x.sort(descending=True).values
            mass = _mass_up_to(ordered, total)
        count = 1 + (mass[:, :-1] < self.p).sum(-1, keepdim=True)  # the mass before the first token is 0
        return _hide_after(x, ordered.gather(-1, count - 1), count)


@dataclass(frozen=True)
class MinP:
    """A token stays iff its probability is at least p times the highest (Nguyen et al. 2024, arXiv:2407.01082)."""

    p: float

    def __post_init__(self) -> None:
        SamplingConfig(min_p=self.p)

    def __call__(self, logits: Float[Tensor, "B V"], seen: Bool[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        x = _wide(logits)
        return x.masked_fill((x - x.amax(-1, keepdim=True)).exp() < self.p, -torch.inf)


def processors(config: SamplingConfig) -> tuple[Processor, ...]:
    """Those that the config calls for, in its order."""
    made: list[Processor] = []
    if config.repetition_penalty != 1:
        made.append(RepetitionPenalty(config.repetition_penalty))
    if config.temperature != 1:
        made.append(Temperature(config.temperature))
    if config.top_k is not None:
        made.append(TopK(config.top_k))
    if config.top_p is not None:
        made.append(TopP(config.top_p))
    if config.min_p is not None:
        made.append(MinP(config.min_p))
    return tuple(made)


def greedy(logits: Float[Tensor, "B V"]) -> Int[Tensor, " B"]:
    """The first token of the order; -1 for a row whose highest logit is not finite."""
    highest, first = _wide(logits).max(-1)
    return first.masked_fill(~highest.isfinite(), -1)


def draw(logits: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The first token v, in the order of ids, with ``cumulative(v) > u · total``.

    ``cumulative`` sums ``exp(x - max)``, wide; where rounding leaves no such token it is the last that has any mass.
    -1 for a row whose highest logit is not finite: there no mass is a number above 0.
    """
    x = _wide(logits)
    mass = (x - x.amax(-1, keepdim=True)).exp()
    cumulative = mass.cumsum(-1)
    V, ids = x.shape[-1], torch.arange(x.shape[-1], device=x.device)
    reached = (mass > 0) & (cumulative > uniforms.to(x.dtype)[:, None] * cumulative[:, -1:])
    first = torch.where(reached, ids, V).amin(-1)
    last = torch.where(mass > 0, ids, -1).amax(-1)
    return torch.where(first < V, first, last)


def sequence_keys(seed: int, rows: Integer[Tensor, " B"]) -> Int64[Tensor, "B 2"]:
    """``fold(random_key(seed), row)`` for each row: a key for every sequence.

    Raises InputError for a seed that is none, and for rows outside of 0 … 2³² - 1.
    """
    lowest, highest = extremes(rows)
    if lowest is not None and highest is not None and (lowest < 0 or highest > WORD):
        wanted = f"rows: expected whole numbers from 0 to 2**32 - 1, got values from {lowest} to {highest}"
        raise InputError("sequence_keys", [wanted])
    return philox_rows(random_key(seed).to(rows.device)[None], rows.long(), 1)


def uniforms(
    keys: Int64[Tensor, "B 2"], step: int | Integer[Tensor, ""] | Integer[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """A number in [0, 1) for each sequence's token number ``step`` (one for all, or each its own).

    A multiple of 2^-24 in float32: ``floor(word / 2^8) / 2^24``, with word 0 of ``philox((step, 0, 0, 2), key)``.
    """
    steps = torch.as_tensor(step, dtype=torch.int64, device=keys.device)
    words: Tensor = philox_rows(keys, steps.expand(keys.shape[0]), 2)[:, 0]
    return (words >> 8).to(torch.float32) * 2.0**-24


def _wide(logits: Tensor) -> Tensor:
    return logits.to(wide_dtype(logits.dtype))


def _mass_up_to(ordered: Float[Tensor, "B n"], total: Float[Tensor, "B 1"]) -> Float[Tensor, "B n"]:
    """The probability of the first tokens up to each; ``total`` sums ``exp(x - max)`` over all."""
    return ((ordered - ordered[:, :1]).exp() / total).cumsum(-1)


def _hide_after(x: Float[Tensor, "B V"], last: Float[Tensor, "B 1"], count: Tensor) -> Float[Tensor, "B V"]:
    """The first ``count [B, 1]`` of the order stay, the last of which has the logit ``last``; NaN stays."""
    tied = x == last
    room = count - (x > last).sum(-1, keepdim=True)  # for those that tie with the last
    return x.masked_fill((x < last) | (tied & (tied.cumsum(-1) > room)), -torch.inf)


def _first(x: Float[Tensor, "B N"], count: int) -> Int64[Tensor, "B n"]:
    """Places of the first ``count`` of the order: higher first, the lower place first among equals (``-inf`` aside)."""
    N = x.shape[-1]
    values, places = x.topk(min(count + 1, N))
    if not ((values[:, :-1] == values[:, 1:]) & (values[:, 1:] > -torch.inf)).any():
        return places[:, :count]
    # ``topk`` says nothing about the order of equals: once more with numbers that are all different
    last = values[:, count - 1 : count]
    tied = x == last
    room = count - (x > last).sum(-1, keepdim=True)
    chosen = (x > last) | (tied & (tied.cumsum(-1) <= room))
    places = torch.where(chosen, torch.arange(N, 0, -1, device=x.device), 0).topk(count).indices
    order = x.gather(-1, places).sort(descending=True, stable=True).indices
    return places.gather(-1, order)
