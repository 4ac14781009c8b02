"""Guitar Pro 3 to 5, through PyGuitarPro (LGPL: the extra ``guitarpro``).

Guitar Pro counts strings from the highest, 1. Ties are joined, dead notes left out, repeats not unrolled, a capo
counts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from twinformer.data.guitar.notes import QUARTER, Note, Piece
from twinformer.errors import InputError

_TICKS = 960  # in a quarter
_MAX_BYTES = 20_000_000


def read_guitarpro(file: str | Path, *, track: int | None = None) -> Piece:
    """One track (the first that is no percussion and has six strings, unless one is named).

    Raises InputError where PyGuitarPro is absent, the file does not read, or the track has no notes.
    """
    try:
        import guitarpro
    except ImportError as error:
        raise InputError(
            str(file),
            ["expected PyGuitarPro to be installed for Guitar Pro files: pip install 'twinformer[guitarpro]'"],
        ) from error
    file = Path(file)
    try:
        size = file.stat().st_size
        if size > _MAX_BYTES:
            raise InputError(str(file), [f"expected at most {_MAX_BYTES} bytes, got {size}"])
        with file.open("rb") as stream:
            song = guitarpro.parse(stream)
    except InputError:
        raise
    except Exception as error:  # a broken file may trip it anywhere
        raise InputError(
            str(file), [f"expected Guitar Pro 3 to 5, got a file that does not read: {error!r}"]
        ) from error
    tracks = song.tracks
    if track is None:
        usual = [i for i, each in enumerate(tracks) if not each.isPercussionTrack and len(each.strings) == 6]
        track = next(iter(usual), None)
    if track is None or not 0 <= track < len(tracks):
        names = ", ".join(f"{i} {each.name!r} ({len(each.strings)} strings)" for i, each in enumerate(tracks))
        raise InputError(str(file), [f"track: expected one with six strings of: {names}; got {track}"])
    return _piece(str(file), song, tracks[track])


def _piece(name: str, song: Any, track: Any) -> Piece:
    tuning = tuple(string.value for string in sorted(track.strings, key=lambda s: -s.number))
    tuning = tuple(low + track.offset for low in tuning)
    notes: list[Note] = []
    bars = []
    sounding: dict[tuple[int, int], int] = {}  # voice, string: the place of the note that a tie would go on with
    remarks: Counter[str] = Counter()
    start = 0
    for measure in track.measures:
        bars.append(_twelfths(start))
        for number, voice in enumerate(measure.voices):
            now = start
            for beat in voice.beats:
                length = beat.duration.time if beat.status.name != "empty" else 0
                first, last = _twelfths(now), _twelfths(now + length)
                remarks["beats moved to the nearest twelfth of a quarter"] += now * QUARTER % _TICKS != 0
                for note in beat.notes:
                    string = len(tuning) - note.string
                    if not 0 <= string < len(tuning) or note.type.name == "dead":
                        remarks["dead notes left out"] += 1
                    elif note.type.name == "tie" and (number, string) in sounding:
                        held = sounding[number, string]
                        notes[held] = replace(notes[held], duration=max(1, last - notes[held].start))
                    else:
                        sounding[number, string] = len(notes)
                        notes.append(Note(first, tuning[string] + note.value, max(1, last - first), string, note.value))
                now += length
        start += measure.header.length
    if not notes:
        raise InputError(name, ["expected a track with notes, got none"])
    signature = track.measures[0].header.timeSignature
    end = max(_twelfths(start), max(note.end for note in notes))
    said = tuple(f"{count} × {text}" for text, count in sorted(remarks.items()) if count)
    times = (signature.numerator, signature.denominator.value)
    return Piece(tuple(notes), times, tuple(bars), end, float(song.tempo), tuning, song.title, said)


def _twelfths(ticks: int) -> int:
    return round(ticks * QUARTER / _TICKS)
