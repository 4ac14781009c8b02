"""Two smaller tasks on the chord table, each beside a rule of a few lines that a model has to beat.

The parts are small (some 200 fingerings), so that a few points are luck: pool valid and test, and print the rule beside
the model (``report``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from twinformer.data.guitar.chords import PARTS, Chord, PartName, load_chords
from twinformer.data.guitar.fretboard import STANDARD, STRINGS, span, strings_for
from twinformer.errors import InputError

#: the widest stretch that the rule for frets allows
_STRETCH = 4

Six = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """One example as texts of tokens, for any data set of pairs."""

    source: str
    target: str


def notes_to_frets(chord: Chord) -> Pair:
    """Sorted pitches -> six frets, ``x`` for a string that is not played."""
    return Pair(" ".join(map(str, sorted(chord.pitches))), " ".join("x" if f < 0 else str(f) for f in chord.frets))


def frets_to_fingers(chord: Chord) -> Pair:
    """Six frets -> six fingers."""
    return Pair(" ".join("x" if f < 0 else str(f) for f in chord.frets), " ".join(map(str, chord.fingers)))


def frets_by_rule(pitches: Sequence[int]) -> Six:
    """The playable assignment of pitches to strings with the lowest frets, by their sum, then from the lowest string.

    Raises InputError where none is playable.
    """
    found: list[Six] = []
    for strings in itertools.product(*(strings_for(pitch) for pitch in pitches)):
        if len(set(strings)) == len(strings):
            frets = [-1] * STRINGS
            for string, pitch in zip(strings, pitches, strict=True):
                frets[string] = pitch - STANDARD[string]
            if span(frets) <= _STRETCH:
                found.append(tuple(frets))
    if not found:
        raise InputError("frets", [f"expected pitches that one hand can play together, got {list(pitches)}"])
    return min(found, key=lambda frets: (sum(fret for fret in frets if fret > 0), frets))


def fingers_by_rule(frets: Sequence[int]) -> Six:
    """One finger a fret from the lowest stopped one on, in the order of frets, then of strings, while fingers are left.

    The index finger lies across the lowest fret where that is wanted on several strings that are neighbours, or more
    than four strings are stopped, and no string between them is open.
    """
    stopped = sorted((fret, string) for string, fret in enumerate(frets) if fret > 0)
    if not stopped:
        return (0,) * STRINGS
    lowest = stopped[0][0]
    first = [string for fret, string in stopped if fret == lowest]
    covered = frets[first[0] : first[-1] + 1]
    are_neighbours = len(covered) == len(first)
    is_barre = len(first) > 1 and 0 not in covered and (are_neighbours or len(stopped) > 4)
    fingers = [0] * STRINGS
    used = 0
    for place, (fret, string) in enumerate(stopped):
        if not (is_barre and fret == lowest and used):
            to_come = len(stopped) - place - 1
            used = min(4, max(used + 1, min(fret - lowest + 1, 4 - to_come)))
        fingers[string] = used
    return tuple(fingers)


def report() -> dict[str, dict[str, float]]:
    """The rules' exact matches in percent, of all sound records and of each part."""
    chords = load_chords()
    groups: dict[str, tuple[Chord, ...]] = {"all": chords.chords, **{name: chords.part(name) for name in PARTS}}
    rules: dict[str, Callable[[Chord], bool]] = {
        "notes to frets": lambda chord: frets_by_rule(sorted(chord.pitches)) == chord.frets,
        "frets to fingers": lambda chord: fingers_by_rule(chord.frets) == chord.fingers,
    }
    return {
        task: {name: 100 * sum(map(is_right, group)) / len(group) for name, group in groups.items()}
        for task, is_right in rules.items()
    }


def pairs(task: str, part: PartName) -> list[Pair]:
    """The examples of a part. Raises InputError for a task that is not known."""
    makers = {"notes to frets": notes_to_frets, "frets to fingers": frets_to_fingers}
    if task not in makers:
        raise InputError("chord task", [f"expected one of {', '.join(makers)}, got {task!r}"])
    return [makers[task](chord) for chord in load_chords().part(part)]
