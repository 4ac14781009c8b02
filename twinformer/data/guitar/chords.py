"""The chord table: 2,069 fingerings of 529 chords, from chords-db (MIT; the licence lies beside it).

Some records are wrong. ``load_chords`` finds them by two checks and leaves them out, with the reason: fingers that
contradict the frets, and notes that the chord's name does not have.

The split is by *shape*, since shapes slide along the neck: in a random split most of the test's shapes are in train.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from twinformer.checkpoint import read_text
from twinformer.data.guitar.fretboard import STANDARD, STRINGS, hand_position, pitch_name
from twinformer.data.guitar.make_chords import HEADER, TABLE
from twinformer.errors import InputError, Problems

PartName = Literal["train", "valid", "test"]
PARTS: tuple[PartName, ...] = ("train", "valid", "test")

#: the pitch class of a root by every name that it has; chords-db's own keys spell two of them with letters
ROOTS = {
    "C": 0,
    "D": 2,
    "E": 4,
    "F": 5,
    "G": 7,
    "A": 9,
    "B": 11,
    "C#": 1,
    "D#": 3,
    "F#": 6,
    "G#": 8,
    "A#": 10,
    "Db": 1,
    "Eb": 3,
    "Gb": 6,
    "Ab": 8,
    "Bb": 10,
    "Csharp": 1,
    "Fsharp": 6,
}
#: the table's own name of each pitch class
_ROOT_NAMES = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")

#: the intervals, in half-tones above the root, that a suffix allows; ``alt`` and ``7sg`` as this table means them
INTERVALS: dict[str, tuple[int, ...]] = {
    "major": (0, 4, 7),
    "minor": (0, 3, 7),
    "dim": (0, 3, 6),
    "dim7": (0, 3, 6, 9),
    "sus2": (0, 2, 7),
    "sus4": (0, 5, 7),
    "7sus4": (0, 5, 7, 10),
    "7sg": (0, 2, 4, 6, 7, 10),
    "alt": (0, 4, 6, 10),
    "aug": (0, 4, 8),
    "6": (0, 4, 7, 9),
    "69": (0, 2, 4, 7, 9),
    "7": (0, 4, 7, 10),
    "7b5": (0, 4, 6, 10),
    "aug7": (0, 4, 8, 10),
    "9": (0, 2, 4, 7, 10),
    "9b5": (0, 2, 4, 6, 10),
    "aug9": (0, 2, 4, 8, 10),
    "7b9": (0, 1, 4, 7, 10),
    "7#9": (0, 3, 4, 7, 10),
    "11": (0, 2, 4, 5, 7, 10),
    "9#11": (0, 2, 4, 6, 7, 10),
    "13": (0, 2, 4, 5, 7, 9, 10),
    "maj7": (0, 4, 7, 11),
    "maj7b5": (0, 4, 6, 11),
    "maj7#5": (0, 4, 8, 11),
    "maj9": (0, 2, 4, 7, 11),
    "maj11": (0, 2, 4, 5, 7, 11),
    "maj13": (0, 2, 4, 5, 7, 9, 11),
    "m6": (0, 3, 7, 9),
    "m69": (0, 2, 3, 7, 9),
    "m7": (0, 3, 7, 10),
    "m7b5": (0, 3, 6, 10),
    "m9": (0, 2, 3, 7, 10),
    "m11": (0, 2, 3, 5, 7, 10),
    "mmaj7": (0, 3, 7, 11),
    "mmaj7b5": (0, 3, 6, 11),
    "mmaj9": (0, 2, 3, 7, 11),
    "mmaj11": (0, 2, 3, 5, 7, 11),
    "add9": (0, 2, 4, 7),
    "madd9": (0, 2, 3, 7),
}


@dataclass(frozen=True)
class Chord:
    """A fingering: absolute frets and fingers of the six strings, the lowest first.

    Fret −1 is not played, 0 open; finger 0 is none, 1 the index finger. ``line`` is that of the table.
    """

    root: str
    suffix: str
    frets: tuple[int, ...]
    fingers: tuple[int, ...]
    line: int = 0

    @property
    def name(self) -> str:
        return f"{self.root} {self.suffix}"

    @property
    def pitches(self) -> tuple[int, ...]:
        """Of the strings that are played, the lowest string first."""
        return tuple(low + fret for low, fret in zip(STANDARD, self.frets, strict=True) if fret >= 0)

    @property
    def hand(self) -> int:
        return hand_position(self.frets)

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.frets)

    @property
    def part(self) -> PartName:
        return part_of(self.shape)


@dataclass(frozen=True)
class ChordTable:
    """``chords`` that are sound, and those left out, each with its reasons."""

    chords: tuple[Chord, ...]
    left_out: tuple[tuple[Chord, tuple[str, ...]], ...]

    def part(self, name: PartName) -> tuple[Chord, ...]:
        """The sound chords of one part."""
        return tuple(chord for chord in self.chords if chord.part == name)

    def named(self, root: str, suffix: str = "major") -> tuple[Chord, ...]:
        """The fingerings of a chord, by any spelling of its root (C#, Db, Csharp)."""
        wanted = root_name(root)
        return tuple(chord for chord in self.chords if (chord.root, chord.suffix) == (wanted, suffix))


def root_name(root: str) -> str:
    """The table's spelling of a root. Raises InputError for a name that is none."""
    if root not in ROOTS:
        raise InputError("chord", [f"root: expected one of {', '.join(ROOTS)}, got {root!r}"])
    return _ROOT_NAMES[ROOTS[root]]


def shape_of(frets: Sequence[int]) -> tuple[int, ...]:
    """What stays when a fingering slides: the frets minus the lowest one; with an open string it cannot slide."""
    lowest = min((fret for fret in frets if fret >= 0), default=0)
    return tuple(fret - lowest if fret >= 0 else fret for fret in frets)


def part_of(shape: Sequence[int]) -> PartName:
    """SHA-256 of the shape's numbers with a blank between them, as one whole number, mod 10: 0 test, 1 valid."""
    digest = hashlib.sha256(" ".join(map(str, shape)).encode()).hexdigest()
    rest = int(digest, 16) % 10
    return "test" if rest == 0 else "valid" if rest == 1 else "train"


def allowed_classes(root: str, suffix: str) -> frozenset[int]:
    """The pitch classes of a chord; after a slash stands the bass. Raises InputError for a suffix that is not known."""
    base = ROOTS[root_name(root)]
    kind, slash, bass = suffix.partition("/")
    name = {"": "major", "m": "minor"}.get(kind, "") if slash else suffix
    if name not in INTERVALS or (slash and bass not in ROOTS):
        raise InputError(
            "chord", [f"suffix: expected one of {', '.join(INTERVALS)} or /BASS or m/BASS, got {suffix!r}"]
        )
    return frozenset((base + interval) % 12 for interval in INTERVALS[name]) | ({ROOTS[bass]} if slash else frozenset())


def faults(chord: Chord) -> tuple[str, ...]:
    """Why a record is wrong; nothing where it is sound."""
    found = []
    by_finger: dict[int, set[int]] = {}
    for string, (fret, finger) in enumerate(zip(chord.frets, chord.fingers, strict=True)):
        if fret > 0 and finger == 0:
            found.append(f"fingers: string {string} is stopped at fret {fret} without a finger")
        elif fret <= 0 and finger > 0:
            found.append(
                f"fingers: string {string} is {'open' if fret == 0 else 'not played'} with finger {finger} on it"
            )
        elif finger > 0:
            by_finger.setdefault(finger, set()).add(fret)
    for finger, places in sorted(by_finger.items()):
        if len(places) > 1:
            found.append(f"fingers: finger {finger} is at frets {' and '.join(map(str, sorted(places)))} at once")
    allowed = allowed_classes(chord.root, chord.suffix)
    wrong = [pitch_name(pitch) for pitch in chord.pitches if pitch % 12 not in allowed]
    if wrong:
        found.append(f"notes: {chord.name} does not have {', '.join(wrong)}")
    return tuple(found)


def read_table(file: Path = TABLE) -> tuple[Chord, ...]:
    """Every record of the table, faulty ones included. Raises InputError naming every line that does not parse."""
    lines = read_text(file).splitlines()
    problems = Problems(str(file), InputError)
    header = "\t".join(HEADER)
    problems.expect(lines[:1] == [header], f"line 1: expected {header!r}, got {lines[0] if lines else ''!r}")
    chords = []
    for number, line in enumerate(lines[1:], start=2):
        fields = line.split("\t")
        if not problems.expect(
            len(fields) == len(HEADER), f"line {number}: expected {len(HEADER)} fields, got {len(fields)}"
        ):
            continue
        root, suffix, base, frets, fingers = fields
        known = root in _ROOT_NAMES and base.isdecimal() and int(base) >= 1
        shaped = len(frets) == STRINGS and all(c == "x" or c.isdecimal() for c in frets)
        held = len(fingers) == STRINGS and all(c in "01234" for c in fingers)
        problems.expect(known, f"line {number}: expected a root and a base fret from 1, got {root!r} and {base!r}")
        problems.expect(shaped, f"line {number}: expected six frets, each a digit or x, got {frets!r}")
        problems.expect(held, f"line {number}: expected six fingers, each 0 to 4, got {fingers!r}")
        if known and shaped and held:
            absolute = tuple(-1 if c == "x" else int(c) + (int(base) - 1 if c != "0" else 0) for c in frets)
            chords.append(Chord(root, suffix, absolute, tuple(map(int, fingers)), number))
    problems.raise_if_any()
    return tuple(chords)


@functools.cache
def load_chords(file: Path = TABLE) -> ChordTable:
    """The table, judged. Raises InputError where it does not parse, CheckpointError where it is absent."""
    judged = [(chord, faults(chord)) for chord in read_table(file)]
    return ChordTable(
        tuple(chord for chord, wrong in judged if not wrong), tuple((chord, wrong) for chord, wrong in judged if wrong)
    )
