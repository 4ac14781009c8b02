"""Arpeggio tablature: the pitches of four broken chords, and the string that each was played on.

Real fingerings from the chord table, picking invented here: semi-synthetic, and no claim about how people play. A
pitch alone does not tell its string (most have several); the shape that its neighbours make does.

A sequence: a shape is chosen evenly among those of the part, then one of its places on the neck; it is arpeggiated in
one of five patterns; the next shape lies within three frets of the hand; four chords. The parts share no shape.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from twinformer.data.guitar.chords import PartName, load_chords, part_of, shape_of
from twinformer.data.guitar.dice import Dice
from twinformer.data.guitar.fretboard import STANDARD, hand_position, span, strings_for
from twinformer.data.guitar.inventions import inventions
from twinformer.data.guitar.notes import QUARTER, Note, Piece
from twinformer.errors import InputError

SIZES: dict[PartName, int] = {"train": 12_000, "valid": 500, "test": 500}
CHORDS = 4
#: how far the hand moves between two shapes at most, in frets
REACH = 3
PATTERNS = ("up", "down", "up and down", "alternating bass", "random after the bass")
# of a variation: strings that are left at least, frets that fingers are apart at most, the highest fret
_FEWEST, _SPAN, _TOP = 3, 3, 15
# of the chords that are not the table's, one in so many is a variation
_ONE_IN = 4
#: notes of the two patterns that do not end by themselves
_PICKS = 6
#: the longest sequence: six strings, up and down, four times
MAX_NOTES = CHORDS * 10

Frets = tuple[int, ...]


@dataclass(frozen=True)
class Arpeggio:
    """One sequence: for each note its pitch and the string (0 the lowest) it was played on; ``shapes`` in order."""

    pitches: tuple[int, ...]
    strings: tuple[int, ...]
    shapes: tuple[Frets, ...]

    @property
    def frets(self) -> tuple[int, ...]:
        """They follow from pitch and string."""
        return tuple(pitch - STANDARD[string] for pitch, string in zip(self.pitches, self.strings, strict=True))

    def piece(self, strings: Sequence[int] | None = None, title: str = "") -> Piece:
        """As eighth notes; ``strings`` in place of those that were played."""
        step = QUARTER // 2
        notes = tuple(
            Note(i * step, pitch, step, string, pitch - STANDARD[string])
            for i, (pitch, string) in enumerate(zip(self.pitches, strings or self.strings, strict=True))
        )
        return Piece(notes, title=title)


@dataclass(frozen=True)
class Score:
    """How many strings are right: ``right`` of ``notes``, ``whole`` of ``sequences`` without a mistake."""

    notes: int
    right: int
    sequences: int
    whole: int

    @property
    def accuracy(self) -> float:
        return self.right / self.notes

    @property
    def whole_accuracy(self) -> float:
        return self.whole / self.sequences


def pick(frets: Sequence[int], pattern: str, dice: Dice) -> list[int]:
    """The strings of a shape in the order of a pattern. Raises InputError for a pattern that is not known."""
    played = [string for string, fret in enumerate(frets) if fret >= 0]
    match pattern:
        case "up":
            return played
        case "down":
            return played[::-1]
        case "up and down":  # the top once, and not back to the bass: the pattern would begin with it again
            return played + played[-2:0:-1]
        case "alternating bass":
            high = played[2:]
            return [played[turn // 2 % 2] if turn % 2 == 0 else high[turn // 2 % len(high)] for turn in range(_PICKS)]
        case "random after the bass":
            return [played[0]] + [dice.choice(played[1:]) for _ in range(_PICKS - 1)]
    raise InputError("arpeggio", [f"pattern: expected one of {', '.join(PATTERNS)}, got {pattern!r}"])


@functools.cache
def _shapes(part: PartName) -> dict[Frets, tuple[Frets, ...]]:
    """The places on the neck of each shape of a part, both in a fixed order."""
    places = sorted({chord.frets for chord in load_chords().part(part)})
    found: dict[Frets, list[Frets]] = {}
    for frets in places:
        found.setdefault(shape_of(frets), []).append(frets)
    return {shape: tuple(found[shape]) for shape in sorted(found)}


@functools.cache
def _variations() -> dict[Frets, tuple[Frets, ...]]:
    """Shapes near those of the training part, wherever on the neck they can be had: for training only.

    A shape without one or two of its strings (three are left), or with one finger one or two frets away (the span is
    kept), and the shapes themselves; those without an open string at every place. A shape of another part (the hash
    decides, as for those of the table) is none.
    """
    found: dict[Frets, set[Frets]] = {}
    for places in _shapes("train").values():
        for frets in places:
            for near in _near_to(frets):
                shape = shape_of(near)
                if part_of(shape) == "train":
                    found.setdefault(shape, set()).update(_slid(near))
    return {shape: tuple(sorted(found[shape])) for shape in sorted(found)}


def _near_to(frets: Frets) -> list[Frets]:
    played = [string for string, fret in enumerate(frets) if fret >= 0]
    found = [frets]
    for count in (1, 2):
        if len(played) - count >= _FEWEST:
            found += [
                tuple(-1 if string in gone else fret for string, fret in enumerate(frets))
                for gone in itertools.combinations(played, count)
            ]
    for string in played:
        for step in (-2, -1, 1, 2):
            moved = (*frets[:string], frets[string] + step, *frets[string + 1 :])
            if 0 <= moved[string] <= _TOP and span(moved) <= _SPAN:
                found.append(moved)
    return found


def _slid(frets: Frets) -> list[Frets]:
    """At every place on the neck; where it is, with an open string."""
    stopped = [fret for fret in frets if fret >= 0]
    if min(stopped) == 0:
        return [frets]
    steps = range(1 - min(stopped), _TOP - max(stopped) + 1)
    return [tuple(fret + step if fret >= 0 else fret for fret in frets) for step in steps]


@functools.cache
def _near(part: PartName | None, hand: int) -> tuple[tuple[Frets, ...], ...]:
    """For each shape of a part (None: of the variations) that can be had within reach of the hand: its places there."""
    near = (
        tuple(frets for frets in places if abs(hand_position(frets) - hand) <= REACH)
        for places in (_variations() if part is None else _shapes(part)).values()
    )
    return tuple(places for places in near if places)


@functools.cache
def _names(part: PartName | None) -> tuple[Frets, ...]:
    return tuple(_variations() if part is None else _shapes(part))


def _chord(part: PartName, dice: Dice, variety: float, hand: int | None) -> Frets:
    """The next fingering, within reach of the hand where there is one already."""
    pool: PartName | None = part
    if variety and dice.below(2**32) < variety * 2**32:
        if dice.below(_ONE_IN):
            return inventions().draw(dice, hand, REACH)
        pool = None
    if hand is not None:
        return dice.choice(dice.choice(_near(pool, hand)))
    return dice.choice((_variations() if pool is None else _shapes(pool))[dice.choice(_names(pool))])


def _sequence(part: PartName, dice: Dice, variety: float = 0.0) -> Arpeggio:
    """``variety``: the share of the chords that are not the table's, one in four a variation, the others inventions."""
    frets = _chord(part, dice, variety, None)
    pitches: list[int] = []
    strings: list[int] = []
    chords = []
    for turn in range(CHORDS):
        if turn:
            before = frets
            while frets == before:
                frets = _chord(part, dice, variety, hand_position(before))
        picked = pick(frets, dice.choice(PATTERNS), dice)
        strings += picked
        pitches += [STANDARD[string] + frets[string] for string in picked]
        chords.append(frets)
    return Arpeggio(tuple(pitches), tuple(strings), tuple(chords))


@functools.cache
def sequences(part: PartName, size: int | None = None, seed: int = 0) -> tuple[Arpeggio, ...]:
    """The sequences of a part; the first ``size`` of them, where given. Each depends on (seed, part, its number) only.

    Raises InputError for a part that is not there or a size below 1.
    """
    if part not in SIZES or (size is not None and size < 1):
        raise InputError("arpeggio", [f"expected a part of {', '.join(SIZES)} and a size from 1, got {part!r}, {size}"])
    count = SIZES[part] if size is None else size
    return tuple(_sequence(part, Dice(seed, f"arpeggio/{part}/{number}")) for number in range(count))


def varied_sequences(epoch: int, variety: float, size: int | None = None, seed: int = 0) -> tuple[Arpeggio, ...]:
    """Training sequences that are others in every epoch, in which ``variety`` of the chords are not the table's.

    They are variations of the table's shapes, and inventions (``twinformer.data.guitar.inventions``).

    Each depends on (seed, epoch, its number, variety) only. Raises InputError for a share that is none.
    """
    if not 0 < variety <= 1 or epoch < 0 or (size is not None and size < 1):
        wanted = f"a variety in (0, 1], an epoch from 0 and a size from 1, got {variety}, {epoch}, {size}"
        raise InputError("arpeggio", [f"expected {wanted}"])
    count = SIZES["train"] if size is None else size
    dice = (Dice(seed, f"arpeggio/varied/{epoch}/{number}") for number in range(count))
    return tuple(_sequence("train", one, variety) for one in dice)


def ambiguity(data: Sequence[Arpeggio]) -> float:
    """The share of notes that more than one string can sound."""
    pitches = [pitch for sequence in data for pitch in sequence.pitches]
    return sum(len(strings_for(pitch)) > 1 for pitch in pitches) / len(pitches)


def score(data: Sequence[Arpeggio], predicted: Sequence[Sequence[int]]) -> Score:
    """Compare strings with those that were played. Raises InputError where the lengths differ."""
    wrong = [i for i, (a, p) in enumerate(zip(data, predicted, strict=False)) if len(a.strings) != len(p)]
    if len(data) != len(predicted) or wrong:
        raise InputError(
            "arpeggio",
            [f"sequences: expected {len(data)}, got {len(predicted)}"] * (len(data) != len(predicted))
            + [f"sequence {i}: expected {len(data[i].strings)} strings, got {len(predicted[i])}" for i in wrong[:20]],
        )
    hits = [sum(a == b for a, b in zip(s.strings, p, strict=True)) for s, p in zip(data, predicted, strict=True)]
    lengths = [len(sequence.strings) for sequence in data]
    whole = sum(hit == length for hit, length in zip(hits, lengths, strict=True))
    return Score(sum(lengths), sum(hits), len(data), whole)
