"""Guitar data for the tests: where it lies, and small pieces.

The files lie in ``shared/guitar`` beside the repository and are not part of it. A test that uses one carries the mark
``needs_guitar`` and is skipped, with the reason, where they are absent.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from twinformer.data.guitar.fretboard import STANDARD
from twinformer.data.guitar.notes import Note, Piece

SHARED_GUITAR = Path(__file__).parents[2] / "shared" / "guitar"


def needs_guitar(*names: str) -> pytest.MarkDecorator:
    """Skip where one of these files is absent."""
    absent = [name for name in names if not (SHARED_GUITAR / name).is_file()]
    return pytest.mark.skipif(bool(absent), reason=f"guitar data absent from shared/guitar: {', '.join(absent)}")


def note(start: int, duration: int, string: int, fret: int) -> Note:
    """A note by its place on the standard fretboard."""
    return Note(start, STANDARD[string] + fret, duration, string, fret)


def small_piece() -> Piece:
    """An upbeat, chords, a triplet, a two-digit fret, a unison on two strings, a bar longer than the others."""
    notes = (
        note(0, 12, 5, 0),
        note(12, 12, 0, 3),
        note(12, 24, 3, 0),
        note(24, 4, 4, 12),
        note(28, 4, 4, 10),
        note(32, 4, 4, 8),
        note(36, 12, 4, 5),
        note(36, 12, 5, 0),
        note(48, 36, 1, 3),
        note(57, 3, 2, 2),
    )
    return Piece(notes, (3, 4), (0, 12, 48), 96, 90.0, title="Small piece")
