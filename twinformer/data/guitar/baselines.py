"""What rules without learning reach on arpeggio tablature: the lowest fret, and a Viterbi path over hand positions."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from twinformer.data.guitar.arpeggio import Arpeggio, score
from twinformer.data.guitar.fretboard import FRETS, STRINGS, frets_on, playable_range, sounding
from twinformer.errors import InputError, Problems

#: the first finger lies at one of the frets 1 … 15; the fourth reaches three frets further
_HANDS = np.arange(1, FRETS + 1)
_SPAN = 3
_AT_ONCE = 250  # sequences computed together

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Costs:
    """What a path pays: ``height`` for each fret of a stopped note, ``movement`` for each fret that the hand moves,
    ``same_string`` for a note on the string of the note before it. Only their ratios matter; the defaults are those
    that ``tune`` finds on valid among ``grid()``."""

    height: float = 0.0125
    movement: float = 1.0
    same_string: float = 1.5


def grid() -> list[Costs]:
    """The choices that the defaults were picked from, for ``tune``."""
    heights, same_strings = (0.0, 0.0125, 0.025, 0.05, 0.1), (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    return [Costs(height, 1.0, same) for height, same in itertools.product(heights, same_strings)]


def lowest_fret(pitches: Sequence[int]) -> list[int]:
    """For each pitch the string that sounds it at the lowest fret."""
    _check([pitches])
    frets = np.where(sounding(pitches), frets_on(pitches), FRETS + 1)
    return [int(string) for string in frets.argmin(axis=-1)]


def viterbi(data: Sequence[Sequence[int]], costs: Costs = Costs()) -> list[list[int]]:
    """The strings of the cheapest path for each sequence of pitches (Viterbi 1967).

    A state is (string, hand): a stopped note lies at the hand's fret or up to three above it, an open string goes
    with any hand; so the hand is remembered while open strings sound. Among equal paths the lower hand, then the
    lower string wins.
    """
    _check(data)
    order = sorted((i for i in range(len(data)) if len(data[i])), key=lambda i: len(data[i]))
    found: list[list[int]] = [[] for _ in data]
    for start in range(0, len(order), _AT_ONCE):
        group = order[start : start + _AT_ONCE]
        for i, path in zip(group, _paths([data[i] for i in group], costs), strict=True):
            found[i] = path
    return found


def tune(data: Sequence[Arpeggio], choices: Iterable[Costs]) -> tuple[Costs, float]:
    """The costs with the highest share of right strings (the first of equals), and that share."""
    pitches = [sequence.pitches for sequence in data]
    tried = [(costs, score(data, viterbi(pitches, costs)).accuracy) for costs in choices]
    if not tried:
        raise InputError("tune", ["choices: expected at least one, got none"])
    return max(tried, key=lambda pair: pair[1])


def _paths(data: Sequence[Sequence[int]], costs: Costs) -> list[list[int]]:
    """Rows of different lengths: a row that has ended pays nothing more and stays where it is."""
    B, T, H = len(data), max(map(len, data)), len(_HANDS)
    rows, hands = np.arange(B), np.arange(H)
    lengths = np.array([len(pitches) for pitches in data])
    moves = costs.movement * np.abs(_HANDS[:, None] - _HANDS[None, :])  # [new hand, old hand]
    repeats = costs.same_string * np.eye(STRINGS)
    total = np.zeros((B, STRINGS, H))
    from_hand = np.zeros((T, B, STRINGS, H), np.int8)
    from_string = np.zeros((T, B, STRINGS, H), np.int8)
    for t in range(T):
        own = _own_costs(np.array([pitches[t] if t < len(pitches) else -1 for pitches in data]), costs)
        if t == 0:
            total = own
            continue
        by_string = total[:, None, :, :] + repeats[None, :, :, None]  # [B, new string, old string, old hand]
        best_string = by_string.argmin(axis=2)
        through = np.take_along_axis(by_string, best_string[:, :, None, :], axis=2)[
            :, :, 0
        ]  # [B, new string, old hand]
        by_hand = through[:, :, None, :] + moves[None, None]  # [B, new string, new hand, old hand]
        best_hand = by_hand.argmin(axis=3)
        step = np.take_along_axis(by_hand, best_hand[..., None], axis=3)[..., 0] + own
        live = (t < lengths)[:, None, None]
        from_hand[t] = np.where(live, best_hand, hands)
        best = np.take_along_axis(best_string, best_hand, axis=2)
        from_string[t] = np.where(live, best, np.arange(STRINGS)[None, :, None])
        total = np.where(live, step, total)
    last = total.transpose(0, 2, 1).reshape(B, -1).argmin(axis=1)  # the lower hand first, then the lower string
    hand, string = np.divmod(last, STRINGS)
    path = np.zeros((B, T), np.int64)
    for t in range(T - 1, -1, -1):
        path[:, t] = string
        hand, string = from_hand[t, rows, string, hand].astype(int), from_string[t, rows, string, hand].astype(int)
    return [path[b, :length].tolist() for b, length in enumerate(lengths)]


def _own_costs(pitches: npt.NDArray[np.int64], costs: Costs) -> Floats:
    """``pitches [B]`` -> ``[B, strings, hands]``: what a note costs by itself; infinite where it cannot be had."""
    frets = frets_on(pitches)[:, :, None]
    reached = (frets == 0) | ((frets >= _HANDS) & (frets <= _HANDS + _SPAN))
    possible = sounding(pitches)[:, :, None] & reached
    return np.where(possible, costs.height * frets, np.inf)


def _check(data: Sequence[Sequence[int]]) -> None:
    low, high = playable_range()
    problems = Problems("tablature", InputError)
    for i, pitches in enumerate(data):
        for place, pitch in enumerate(pitches):
            problems.expect(
                low <= pitch <= high, f"sequence {i}, note {place}: expected a pitch from {low} to {high}, got {pitch}"
            )
    problems.raise_if_any()
