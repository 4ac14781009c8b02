"""Sampling and beam search once more, in NumPy, from ``docs/contract.md``: the third opinion of the sampling rung.

Written one row at a time and for reading, not for speed. The order of tokens: higher logit first, the lower id first
among equals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from twinformer.decoding import BeamConfig, SamplingConfig, StopConfig
from twinformer.parity.compare import FloatArray

Ids = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


def in_order(logits: FloatArray) -> Ids:
    return np.argsort(-logits, kind="stable")


def processed(logits: FloatArray, seen: Flags, config: SamplingConfig) -> FloatArray:
    """One row of logits ``[V]`` under every choice of the configuration, in its order."""
    x = logits.copy()
    if config.repetition_penalty != 1:
        x = np.where(seen, np.where(x > 0, x / config.repetition_penalty, x * config.repetition_penalty), x)
    x = x / config.temperature
    if config.top_k is not None:
        x = _only(x, in_order(x)[: config.top_k])
    if config.top_p is not None:
        order = in_order(x)
        probabilities = softmax(x)[order]
        before = np.concatenate(([0.0], np.cumsum(probabilities)[:-1]))
        x = _only(x, order[(before < config.top_p) | (config.top_p == 1)])
    if config.min_p is not None:
        probabilities = softmax(x)
        x = _only(x, np.flatnonzero(probabilities >= config.min_p * probabilities.max()))
    return x


def softmax(x: FloatArray) -> FloatArray:
    mass = np.exp(x - x.max())
    share: FloatArray = mass / mass.sum()
    return share


def log_softmax(x: FloatArray) -> FloatArray:
    peak = x.max(-1, keepdims=True)
    lowered: FloatArray = x - peak - np.log(np.exp(x - peak).sum(-1, keepdims=True))
    return lowered


def greedy(x: FloatArray) -> int:
    return int(in_order(x)[0]) if is_hopeful(x) else -1


def is_hopeful(x: FloatArray) -> bool:
    """Something can be chosen: the highest logit is finite, NaN being higher than all."""
    return bool(np.isfinite(x.max()))


def draw(x: FloatArray, uniform: float) -> int:
    """The first id whose cumulative mass is above ``uniform`` of the total; the last with mass where none is."""
    if not is_hopeful(x):
        return -1
    mass = np.exp(x - x.max())
    cumulative = np.cumsum(mass)
    reached = np.flatnonzero((cumulative > uniform * cumulative[-1]) & (mass > 0))
    return int(reached[0] if len(reached) else np.flatnonzero(mass)[-1])


def draw_margin(x: FloatArray, uniform: float) -> float:
    """How near ``uniform`` is to where another token would have been drawn, as a share of the whole mass."""
    cumulative = np.cumsum(softmax(x))
    return float(np.abs(cumulative[:-1] - uniform).min(initial=1.0))


def written_length(tokens: Sequence[int], stop: StopConfig) -> tuple[int, bool]:
    """How many tokens are written until something stops them, and whether something does."""
    for length in range(1, len(tokens) + 1):
        so_far = tuple(tokens[:length])
        ends = any(so_far[-len(sequence) :] == tuple(sequence) for sequence in stop.sequences)
        if so_far[-1] in stop.tokens or ends:
            return length, True
    return len(tokens), False


def _only(x: FloatArray, kept: Ids) -> FloatArray:
    left = np.full_like(x, -np.inf)
    left[kept] = x[kept]
    return left


# ---- beam search


@dataclass(frozen=True)
class Hypothesis:
    tokens: tuple[int, ...]
    total: float
    score: float = -np.inf
    finished: bool = False


def search(
    logits_after: Callable[[Sequence[tuple[int, ...]]], FloatArray],
    *,
    max_new_tokens: int,
    beam: BeamConfig,
    stop: Sequence[int],
    allowed: Flags | None = None,
) -> list[Hypothesis]:
    """The best ``num_best`` of one prompt. ``logits_after`` gives the logits ``[n, V]`` after each of n hypotheses.

    Without early stopping, which must change nothing but the time.
    """
    live, pool, width = [Hypothesis((), 0.0)], list[Hypothesis](), beam.width
    for step in range(max_new_tokens):
        logprobs = log_softmax(logits_after([one.tokens for one in live]))
        if allowed is not None:
            logprobs = np.where(allowed[step], logprobs, -np.inf)
        found = [
            (one.total + float(logprobs[i, v]), i, v) for i, one in enumerate(live) for v in range(logprobs.shape[1])
        ]
        ranking = sorted((one for one in found if one[0] > -np.inf), key=lambda one: (-one[0], one[1], one[2]))
        ended = [one for one in ranking[:width] if one[2] in stop]
        pool += [_finished(live, one, beam, finished=True) for one in ended]
        if beam.shrink:
            width -= len(ended)
        going = [one for one in ranking if one[2] not in stop][: max(width, 0)]
        live = [Hypothesis((*live[i].tokens, v), total) for total, i, v in going]
        # of equals the one that entered first: Python's sort keeps their order
        pool = sorted(pool, key=lambda one: -one.score)[: beam.width]
        if not live:
            break
    pool += [_scored(one, beam, finished=False) for one in live]
    return sorted(pool, key=lambda one: -one.score)[: beam.width][: beam.num_best]


def _finished(
    live: Sequence[Hypothesis], ended: tuple[float, int, int], beam: BeamConfig, *, finished: bool
) -> Hypothesis:
    total, i, v = ended
    return _scored(Hypothesis((*live[i].tokens, v), total), beam, finished=finished)


def _scored(one: Hypothesis, beam: BeamConfig, *, finished: bool) -> Hypothesis:
    score = one.total / beam.length_factor(len(one.tokens))
    return Hypothesis(one.tokens, one.total, score, finished)
