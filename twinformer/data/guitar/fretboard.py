"""The fretboard: which strings can sound a pitch, and at which fret."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from twinformer.errors import InputError, Problems

#: E2 A2 D3 G3 B3 E4, from the lowest string to the highest
STANDARD: tuple[int, ...] = (40, 45, 50, 55, 59, 64)
STRINGS = len(STANDARD)
#: the highest fret of the chord table
FRETS = 15
#: the strings' names from the lowest to the highest, as tablature writes them
NAMES = ("E", "A", "D", "G", "B", "e")
_SHARPS = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")


def pitch_of(string: int, fret: int, tuning: Sequence[int] = STANDARD) -> int:
    """The pitch of a string stopped at a fret. Raises InputError for a string or fret that is not there."""
    problems = Problems("fretboard", InputError)
    problems.expect(0 <= string < len(tuning), f"string: expected 0 to {len(tuning) - 1}, got {string}")
    problems.expect(fret >= 0, f"fret: expected a whole number from 0, got {fret}")
    problems.raise_if_any()
    return tuning[string] + fret


def strings_for(pitch: int, tuning: Sequence[int] = STANDARD, frets: int = FRETS) -> tuple[int, ...]:
    """The strings that can sound a pitch, the lowest first; none outside the playable range."""
    return tuple(string for string, low in enumerate(tuning) if 0 <= pitch - low <= frets)


def playable_range(tuning: Sequence[int] = STANDARD, frets: int = FRETS) -> tuple[int, int]:
    """The lowest and the highest pitch."""
    return min(tuning), max(tuning) + frets


def sounding(pitches: npt.ArrayLike, tuning: Sequence[int] = STANDARD, frets: int = FRETS) -> npt.NDArray[np.bool_]:
    """``pitches [...]`` -> ``[..., strings]``: True where the string can sound the pitch."""
    found = frets_on(pitches, tuning)
    return (found >= 0) & (found <= frets)


def frets_on(pitches: npt.ArrayLike, tuning: Sequence[int] = STANDARD) -> npt.NDArray[np.int64]:
    """``pitches [...]`` -> ``[..., strings]``: the fret at which each string would sound it, below 0 where none
    does.
    """
    return np.asarray(pitches, np.int64)[..., None] - np.asarray(tuning, np.int64)


def hand_position(frets: Sequence[int]) -> int:
    """Where the hand is: the lowest stopped fret; 0 with open strings only. −1 is a string that is not played."""
    return min((fret for fret in frets if fret > 0), default=0)


def span(frets: Sequence[int]) -> int:
    """How many frets lie between the lowest and the highest stopped one."""
    stopped = [fret for fret in frets if fret > 0]
    return max(stopped) - min(stopped) if stopped else 0


def pitch_name(pitch: int) -> str:
    """Scientific name, with sharps: 60 is C4."""
    return f"{_SHARPS[pitch % 12]}{pitch // 12 - 1}"
