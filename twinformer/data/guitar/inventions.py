"""Shapes that the chord table does not have but might: every playable one, weighted to be like the known ones.

A learner that has seen 557 shapes only knows those; the hand knows many more. So shapes are invented for training:
all that a hand can hold, each with a weight such that what a guitarist would look at (how many strings, where the bass
is, which strings are left out, how many fingers, how far apart, which intervals sound) is as frequent among them as
among the known shapes. The weights are found by iterative proportional fitting (Deming and Stephan, "On a least squares
adjustment of a sampled frequency table", 1940).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from twinformer.data.guitar.chords import load_chords, part_of
from twinformer.data.guitar.dice import Dice
from twinformer.data.guitar.fretboard import FRETS, STANDARD, STRINGS

Frets = tuple[int, ...]

# strings at least, strings left out between others at most, fingers besides a barre in the nut's place, and the frets
# that these are apart
_FEWEST, _LEFT_OUT, _FINGERS, _SPAN = 3, 2, 4, 3
_ROUNDS = 6
# so many shapes of the table are thought to be spread evenly over all values of a feature: none is impossible
_UNSEEN = 0.5
_DRAWS = 2**53


@dataclass(frozen=True, eq=False)
class Inventions:
    """``shapes [N, strings]``: the frets less the lowest one, −1 not played; a weight each.

    A shape is had with its zeros as open strings, at one place; and, if its frets are at most three apart, without open
    strings wherever it fits on the neck: a barre then lies where the nut was.
    """

    shapes: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]

    def draw(self, dice: Dice, hand: int | None = None, reach: int = 0) -> Frets:
        """The six frets of a shape by its weight, then of one of its places evenly.

        With ``hand``, the position of the hand, only of places at most ``reach`` frets from it: some have to be there.
        """
        number = dice.below(_DRAWS) / _DRAWS
        live, total = self._near(hand, reach)
        chosen = int(live[np.searchsorted(total, number * total[-1], side="right")])
        shape = self.shapes[chosen]
        steps = self._steps(hand, reach)[:, chosen]
        step = dice.choice(np.flatnonzero(steps).tolist())
        return tuple(int(fret) + step if fret >= 0 else -1 for fret in shape)

    @functools.cached_property
    def _hands(self) -> npt.NDArray[np.int64]:
        """``[FRETS, N]``: the hand's position with the shape moved by so many frets; −1 where it does not fit."""
        stopped = np.where(self.shapes > 0, self.shapes, FRETS + 1).min(axis=1)
        highest = self.shapes.max(axis=1)
        steps = np.arange(FRETS)[:, None]
        fits = (steps == 0) | ((highest <= _SPAN) & (steps + highest <= FRETS))
        hands = np.where(steps == 0, np.where(stopped > FRETS, 0, stopped), steps)
        return np.where(fits, hands, -1)

    # a handful of hands, for as long as the shapes are there
    @functools.cache  # noqa: B019
    def _steps(self, hand: int | None, reach: int) -> npt.NDArray[np.bool_]:
        there = self._hands >= 0
        return there if hand is None else there & (abs(self._hands - hand) <= reach)

    @functools.cache  # noqa: B019
    def _near(self, hand: int | None, reach: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        live = np.flatnonzero(self._steps(hand, reach).any(axis=0))
        return live, np.cumsum(self.weights[live])


@functools.cache
def inventions() -> Inventions:
    """Those for training: a shape of another part (the hash decides, as for those of the table) is none of them."""
    shapes = np.array([shape for shape in _playable() if part_of(shape) == "train"])
    known = {chord.shape for chord in load_chords().part("train")}
    return Inventions(shapes, _weights(shapes, known))


def _playable() -> list[Frets]:
    found: set[Frets] = set()
    for lowest in range(1, FRETS - _SPAN + 1):
        stopped = range(lowest, lowest + _SPAN + 1)
        found.update(
            shape
            for shape in itertools.product((-1, 0, *stopped), repeat=STRINGS)
            if 0 in shape and (lowest == 1 or lowest in shape) and _can_be_held(shape)
        )
    return sorted(found)


def _can_be_held(shape: Frets) -> bool:
    played = STRINGS - shape.count(-1)
    return played >= _FEWEST and _left_out(shape) <= _LEFT_OUT and _fingers(shape) <= _FINGERS


def _left_out(shape: Frets) -> int:
    """Strings that are not played between others that are."""
    played = [string for string, fret in enumerate(shape) if fret >= 0]
    return played[-1] - played[0] + 1 - len(played)


def _fingers(shape: Frets) -> int:
    """What the frets above the lowest take; one more lies across the lowest."""
    stopped = [fret for fret in shape if fret > 0]
    return 1 + sum(fret > min(stopped) for fret in stopped) if stopped else 0


def _hold(shape: Frets) -> Hashable:
    played = [string for string, fret in enumerate(shape) if fret >= 0]
    return len(played), _left_out(shape), played[0], _fingers(shape)


def _reach(shape: Frets) -> Hashable:
    stopped = [fret for fret in shape if fret > 0]
    return (shape.count(0) if stopped else 0), max(stopped, default=0) - min(stopped, default=0)


def _intervals(shape: Frets) -> Hashable:
    """The pitch classes above the bass."""
    pitches = [low + fret for low, fret in zip(STANDARD, shape, strict=True) if fret >= 0]
    return tuple(sorted({(pitch - pitches[0]) % 12 for pitch in pitches}))


def _weights(shapes: npt.NDArray[np.int64], known: set[Frets]) -> npt.NDArray[np.float64]:
    """So that every feature's values are as frequent as among the known shapes."""
    rows: Sequence[Frets] = [tuple(shape) for shape in shapes.tolist()]
    like = np.array([row in known for row in rows])
    features: tuple[Callable[[Frets], Hashable], ...] = (_hold, _reach, _intervals)
    values = [_numbered([feature(row) for row in rows]) for feature in features]
    weights = np.ones(len(rows))
    for _ in range(_ROUNDS):
        for value in values:
            kinds = int(value.max()) + 1
            wanted = np.bincount(value[like], minlength=kinds) + _UNSEEN / kinds
            had = np.bincount(value, weights=weights, minlength=kinds)
            weights = weights * (wanted / had)[value]
    return weights


def _numbered(values: Sequence[Hashable]) -> npt.NDArray[np.int64]:
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values])
