"""How a model writes: the choices of sampling, of stopping and of beam search, as plain values; and what both twins
check before they decode.

No tensors here: the arithmetic is in the twins' ``cache.py``, ``sampling.py``, ``beam.py`` and ``generation.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from twinformer.checks import INTEGERS, dtype_name
from twinformer.errors import ConfigError, InputError, Problems

LengthPenalty = Literal["none", "mean", "gnmt"]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """What is done to the logits before a token is drawn.

    In this order: ``repetition_penalty``, ``temperature``, ``top_k``, ``top_p``, ``min_p``. ``None`` (or 1 for the
    first two) leaves them as they are.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        problems = Problems(type(self).__name__, ConfigError)
        for name in ("temperature", "repetition_penalty"):
            _number(problems, name, getattr(self, name), "a positive number", lambda x: x > 0)
        _whole(problems, "top_k", self.top_k, 1, none=True)
        _number(problems, "top_p", self.top_p, "a number in (0, 1] or None", lambda x: 0 < x <= 1, none=True)
        _number(problems, "min_p", self.min_p, "a number in [0, 1] or None", lambda x: 0 <= x <= 1, none=True)
        problems.raise_if_any()


@dataclass(frozen=True, kw_only=True)
class StopConfig:
    """When a sequence is finished: after one of ``tokens``, or when what was written ends with one of ``sequences``.

    What stops a sequence is part of it.
    """

    tokens: tuple[int, ...] = ()
    sequences: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        problems = Problems(type(self).__name__, ConfigError)
        for token in self.tokens:
            _whole(problems, "tokens", token, 0)
        for sequence in self.sequences:
            problems.expect(len(sequence) > 0, "sequences: expected at least one token in each, got an empty one")
            for token in sequence:
                _whole(problems, "sequences", token, 0)
        problems.raise_if_any()


@dataclass(frozen=True, kw_only=True)
class BeamConfig:
    """Beam search: ``width`` hypotheses, scored by the sum of log-probabilities over ``length_factor``.

    ``shrink``: the beam narrows by one with each hypothesis that finishes (book, chapter "Machine Translation", beam
    search), instead of keeping its width. ``early_stopping``: end as soon as no live hypothesis can still enter the
    ``num_best`` that are returned; it changes nothing but the time.
    """

    width: int = 4
    num_best: int = 1
    length_penalty: LengthPenalty = "mean"
    alpha: float = 1.0
    shrink: bool = False
    early_stopping: bool = True

    def __post_init__(self) -> None:
        problems = Problems(type(self).__name__, ConfigError)
        _whole(problems, "width", self.width, 1)
        _whole(problems, "num_best", self.num_best, 1)
        if not problems.found:
            problems.expect(
                self.num_best <= self.width, f"num_best: expected at most width={self.width}, got {self.num_best}"
            )
        options = ("none", "mean", "gnmt")
        problems.expect(
            self.length_penalty in options,
            f"length_penalty: expected one of {', '.join(options)}, got {self.length_penalty!r}",
        )
        _number(problems, "alpha", self.alpha, "0 or a positive number", lambda x: x >= 0)
        problems.raise_if_any()

    def length_factor(self, length: int) -> float:
        """What the sum of log-probabilities of ``length`` written tokens, the stop token included, is divided by.

        ``mean``: ``length^alpha``. ``gnmt``: ``((5 + length) / 6)^alpha`` (Wu et al. 2016, arXiv:1609.08144, eq. 14).
        ``none``: 1.
        """
        if self.length_penalty == "mean":
            return math.pow(length, self.alpha)
        if self.length_penalty == "gnmt":
            return math.pow((5 + length) / 6, self.alpha)
        return 1.0


@dataclass(frozen=True)
class Generated:
    """What was written. ``tokens [B, M]`` (after a row's end: the pad id), M the longest.

    ``lengths [B]`` counts what stopped it. ``finished [B]``: ended by a stop token or sequence, not for lack of room.
    ``logprobs [B, M]``: the model's log-probability of each token, 0 after the end.
    """

    tokens: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    finished: npt.NDArray[np.bool_]
    logprobs: npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Beams:
    """The n best hypotheses of each row, best first.

    ``tokens [B, n, M]``, ``lengths [B, n]`` (the stop token counted, 0 where there is no such hypothesis),
    ``scores [B, n]`` (sum over length factor, ``-inf`` where there is none), ``logprobs [B, n]`` the sums,
    ``finished [B, n]``.
    """

    tokens: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    scores: npt.NDArray[np.floating[Any]]
    logprobs: npt.NDArray[np.floating[Any]]
    finished: npt.NDArray[np.bool_]


def minimum_bayes_risk(
    candidates: Sequence[Any],
    utility: Callable[[Any, Any], float],
    *,
    weights: Sequence[float] | None = None,
) -> tuple[int, npt.NDArray[np.float64]]:
    """The candidate with the highest expected utility against all candidates, and every candidate's.

    ``utility(hypothesis, reference)``; ``weights`` are the candidates' probabilities as references, equal when None;
    they are divided by their sum. The first of equal candidates wins. (Book, chapter "Machine Translation", minimum
    Bayes risk decoding; Kumar & Byrne 2004.) Raises InputError for no candidates, or weights that are none.
    """
    problems = Problems("minimum_bayes_risk", InputError)
    count = len(candidates)
    problems.expect(count > 0, "candidates: expected at least one, got none")
    if weights is not None:
        problems.expect(len(weights) == count, f"weights: expected {count}, got {len(weights)}")
        good = all(math.isfinite(w) and w >= 0 for w in weights) and sum(weights) > 0
        problems.expect(good, f"weights: expected numbers from 0 with a positive sum, got {list(weights)}")
    problems.raise_if_any()
    share = np.full(count, 1.0) if weights is None else np.asarray(weights, np.float64)
    share = share / share.sum()
    table = np.array([[utility(one, other) for other in candidates] for one in candidates], np.float64)
    problems.expect(bool(np.isfinite(table).all()), "utility: expected finite numbers, got one that is not")
    problems.raise_if_any()
    expected = table @ share
    return int(expected.argmax()), expected


def check_step(
    where: str, *, tokens: Any, batch: int, step: int | None, slots: int | None, context_length: int
) -> None:
    """Inputs of a step of cached decoding besides those of ``check_tokens``: the batch, and room for the tokens.

    ``step`` is how many positions the cache has seen, None where it cannot be known; ``slots`` how many it can hold,
    None where old ones make room (a window).
    """
    problems = Problems(where, InputError)
    shape = tuple(tokens.shape)
    if len(shape) == 2:
        problems.expect(shape[0] == batch, f"tokens: expected the batch of the cache, B={batch}, got {shape[0]}")
        if step is not None:
            need = step + shape[1]
            if slots is not None:
                problems.expect(
                    need <= slots,
                    f"cache: expected room for {need} positions ({step} seen and {shape[1]} new), got {slots} slots",
                )
            problems.expect(
                need <= context_length,
                f"cache: expected at most context_length={context_length} positions, got {need} "
                f"({step} seen and {shape[1]} new)",
            )
    problems.raise_if_any()


def check_cache(where: str, *, batch: int, slots: int, context_length: int) -> None:
    """Sizes of a cache that is to be made: from 1 to ``context_length`` slots."""
    problems = Problems(where, InputError)
    _whole(problems, "batch", batch, 1)
    _whole(problems, "slots", slots, 1)
    if not problems.found:
        problems.expect(
            slots <= context_length, f"slots: expected at most context_length={context_length}, got {slots}"
        )
    problems.raise_if_any()


def check_prompts(
    where: str,
    *,
    prompts: Any,
    vocab_size: int,
    context_length: int,
    max_new_tokens: int,
    stop: StopConfig,
    seed: int = 0,
    allowed: Any = None,
) -> None:
    """What ``Generator`` is asked. ``prompts [B, T]`` whole numbers; ``allowed [B or 1, M, V]`` bool, concrete."""
    problems = Problems(where, InputError)
    shape = tuple(prompts.shape)
    good = problems.expect(len(shape) == 2, f"prompts: expected rank 2 [B, T], got shape {shape}")
    problems.expect(
        dtype_name(prompts) in INTEGERS, f"prompts: expected whole numbers, got dtype {dtype_name(prompts)}"
    )
    _whole(problems, "max_new_tokens", max_new_tokens, 1)
    if good:
        problems.expect(min(shape) >= 1, f"prompts: expected at least one token, got shape {shape}")
    for token in {*stop.tokens, *(token for sequence in stop.sequences for token in sequence)}:
        problems.expect(token < vocab_size, f"stop: expected ids from 0 to {vocab_size - 1}, got {token}")
    problems.expect(0 <= seed < 2**64, f"seed: expected a whole number from 0 to 2**64 - 1, got {seed}")
    if allowed is not None:
        have = tuple(allowed.shape)
        problems.expect(
            len(have) == 3 and have[0] in (1, shape[0]) and have[1] >= max_new_tokens and have[2] == vocab_size,
            f"allowed: expected shape [B or 1, M, V] = [{shape[0] if shape else 0} or 1, at least {max_new_tokens}, "
            f"{vocab_size}], got {have}",
        )
        kind = problems.expect(dtype_name(allowed) == "bool", f"allowed: expected bool, got {dtype_name(allowed)}")
        if kind and len(have) == 3:
            empty = int((~np.asarray(allowed).any(-1)).sum())
            problems.expect(empty == 0, f"allowed: expected a token everywhere, got {empty} places with none")
    problems.raise_if_any()


def check_room(where: str, *, longest: int, max_new_tokens: int, slots: int) -> None:
    """Prompt and new tokens fit. ``longest`` counts the real tokens of the longest prompt."""
    problems = Problems(where, InputError)
    problems.expect(
        longest + max_new_tokens <= slots,
        f"max_new_tokens: expected at most {max(slots - longest, 0)} ({slots} slots, {longest} taken by the prompt), "
        f"got {max_new_tokens}",
    )
    problems.raise_if_any()


def _number(
    problems: Problems, name: str, value: Any, wanted: str, is_right: Callable[[Any], bool], *, none: bool = False
) -> None:
    if value is None and none:
        return
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    problems.expect(is_number and is_right(value), f"{name}: expected {wanted}, got {value!r}")


def _whole(problems: Problems, name: str, value: Any, least: int, *, none: bool = False) -> None:
    if value is None and none:
        return
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    problems.expect(is_whole and value >= least, f"{name}: expected a whole number from {least}, got {value!r}")
