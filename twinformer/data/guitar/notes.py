"""Notes and pieces: what every file is read into and written from."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from twinformer.data.guitar.fretboard import STANDARD
from twinformer.errors import InputError, Problems

#: time is counted in twelfths of a quarter note
QUARTER = 12
#: the longest piece: a file that claims more is broken or hostile
MAX_TWELFTHS = 1_000_000


@dataclass(frozen=True)
class Note:
    """From ``start`` for ``duration`` twelfths; ``string`` (0 the lowest) and ``fret`` where they are known."""

    start: int
    pitch: int
    duration: int
    string: int | None = None
    fret: int | None = None

    @property
    def end(self) -> int:
        return self.start + self.duration


@dataclass(frozen=True)
class Piece:
    """Notes in the order of (start, pitch), bars by their starts, and the end of the last bar.

    ``bars`` empty: whole bars of the time signature from 0, as many as the notes need. ``tempo`` in quarters a minute.
    ``remarks``: what a reader rounded or left out. Raises InputError naming every note that cannot be.
    """

    notes: tuple[Note, ...]
    time_signature: tuple[int, int] = (4, 4)
    bars: tuple[int, ...] = ()
    end: int = 0
    tempo: float = 120.0
    tuning: tuple[int, ...] = STANDARD
    title: str = ""
    remarks: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    def __post_init__(self) -> None:
        problems = Problems(f"piece {self.title!r}" if self.title else "piece", InputError)
        beats, unit = self.time_signature
        good = problems.expect(
            1 <= beats <= 64 and unit in (1, 2, 4, 8, 16),
            f"time_signature: expected 1 to 64 over 1, 2, 4, 8 or 16, got {beats}/{unit}",
        )
        problems.expect(0 < self.tempo < 1e4, f"tempo: expected a positive number below 10000, got {self.tempo}")
        for i, note in enumerate(self.notes):
            _check(problems, f"note {i}", note, self.tuning)
        object.__setattr__(self, "notes", tuple(sorted(self.notes, key=_order)))
        last = max((note.end for note in self.notes), default=0)
        fits = max(last, self.end) <= MAX_TWELFTHS
        problems.expect(fits, f"expected a piece of at most {MAX_TWELFTHS} twelfths, got {max(last, self.end)}")
        good = good and fits
        if good and not self.bars:
            length = bar_length(self.time_signature)
            count = max(1, -(-max(last, self.end) // length))
            object.__setattr__(self, "bars", tuple(range(0, count * length, length)))
            object.__setattr__(self, "end", count * length)
        rising = all(a < b for a, b in itertools.pairwise((*self.bars, self.end)))
        problems.expect(
            (self.bars[0] == 0 and rising) if self.bars else not good,
            "bars: expected starts that rise from 0 and lie before the end",
        )
        problems.expect(self.end >= last, f"end: expected at least that of the last note, {last}, got {self.end}")
        problems.raise_if_any()

    @property
    def has_tab(self) -> bool:
        """Whether every note has a string and there is one."""
        return bool(self.notes) and all(note.string is not None for note in self.notes)

    @property
    def bar_ends(self) -> tuple[int, ...]:
        return (*self.bars[1:], self.end)


def bar_length(time_signature: tuple[int, int]) -> int:
    """Twelfths in a whole bar."""
    beats, unit = time_signature
    return beats * 4 * QUARTER // unit


def bar_starts(changes: Sequence[tuple[int, tuple[int, int]]], end: int) -> tuple[tuple[int, ...], int]:
    """Bars under time signatures that change at the given times (the first at 0), and the end of the last one.

    The bar in which a signature changes ends there. Raises InputError for a signature that cannot be and for an end
    beyond the longest piece.
    """
    problems = Problems("bars", InputError)
    problems.expect(end <= MAX_TWELFTHS, f"expected a piece of at most {MAX_TWELFTHS} twelfths, got {end}")
    for time, signature in changes:
        beats, unit = signature
        wanted = beats >= 1 and unit in (1, 2, 4, 8, 16, 32) and bar_length(signature) >= 1
        problems.expect(wanted, f"time signature at {time}: expected one such as 3/4, got {beats}/{unit}")
    problems.raise_if_any()
    starts: list[int] = []
    used = [change for change in changes if change[0] < max(end, 1)]
    for i, (time, signature) in enumerate(used):
        until = used[i + 1][0] if i + 1 < len(used) else max(end, time + 1)
        starts += range(time, until, bar_length(signature))
    return tuple(starts), starts[-1] + bar_length(used[-1][1])


def with_tab(piece: Piece, positions: Iterable[tuple[int, int]]) -> Piece:
    """The piece with (string, fret) for each note, in the order of its notes. Raises InputError where they do not
    sound it.
    """
    given = list(positions)
    if len(given) != len(piece.notes):
        raise InputError("tablature", [f"positions: expected one a note, {len(piece.notes)}, got {len(given)}"])
    notes = tuple(
        dataclasses.replace(note, string=string, fret=fret)
        for note, (string, fret) in zip(piece.notes, given, strict=True)
    )
    return dataclasses.replace(piece, notes=notes)


def _order(note: Note) -> tuple[int, int, int, int]:
    return note.start, note.pitch, note.duration, -1 if note.string is None else note.string


def _check(problems: Problems, name: str, note: Note, tuning: tuple[int, ...]) -> None:
    problems.expect(note.start >= 0, f"{name}: start: expected a whole number from 0, got {note.start}")
    problems.expect(note.duration >= 1, f"{name}: duration: expected at least 1, got {note.duration}")
    problems.expect(0 <= note.pitch <= 127, f"{name}: pitch: expected 0 to 127, got {note.pitch}")
    if note.string is None or note.fret is None:
        both = note.string is None and note.fret is None
        problems.expect(both, f"{name}: expected string and fret together, got {note.string} and {note.fret}")
        return
    if problems.expect(
        0 <= note.string < len(tuning), f"{name}: string: expected 0 to {len(tuning) - 1}, got {note.string}"
    ):
        sounds = tuning[note.string] + note.fret
        problems.expect(
            note.fret >= 0 and sounds == note.pitch,
            f"{name}: expected a place that sounds {note.pitch}, got string {note.string}, fret {note.fret}: {sounds}",
        )
