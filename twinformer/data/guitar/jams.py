"""GuitarSet's JAMS files: plain JSON, a list of notes for each string, time in seconds, pitches with fractions.

Strings are told by ``data_source`` "0" to "5", the lowest first (Xi et al. 2018, "GuitarSet"). Time becomes twelfths
of a quarter by the annotated beats where there are some, else by the annotated tempo, else by the one that is given.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from twinformer.checkpoint import read_text
from twinformer.data.guitar.fretboard import STANDARD, STRINGS
from twinformer.data.guitar.notes import QUARTER, Note, Piece
from twinformer.errors import InputError, Problems

_MAX_BYTES = 100_000_000
_SHOWN = 20
_FIELDS = ("time", "duration", "value")


def read_jams(file: str | Path, *, tempo: float | None = None) -> Piece:
    """A piece with tablature from a JAMS file; ``tempo`` in quarters a minute, where the file has neither beats nor
    tempo.

    Raises InputError naming what is not as it should be, CheckpointError where the file is absent or no text.
    """
    file = Path(file)
    if file.is_file() and file.stat().st_size > _MAX_BYTES:
        raise InputError(str(file), [f"expected at most {_MAX_BYTES} bytes, got {file.stat().st_size}"])
    text = read_text(file)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(str(file), [f"expected JSON, got text that does not parse: {error}"]) from None
    annotations = document.get("annotations") if isinstance(document, dict) else None
    if not isinstance(annotations, list) or not all(isinstance(entry, dict) for entry in annotations):
        raise InputError(str(file), ["expected JAMS: an object with a list of annotations, got something else"])
    problems = Problems(str(file), InputError)
    lists: dict[int, list[tuple[float, float, float]]] = {}
    for place, entry in enumerate(annotations):
        if entry.get("namespace") != "note_midi":
            continue
        about = entry.get("annotation_metadata")
        source = str(about.get("data_source", "")) if isinstance(about, dict) else ""
        known = source.isdecimal() and int(source) < STRINGS and int(source) not in lists
        if problems.expect(known, f"annotation {place}: data_source: expected another string, 0 to 5, got {source!r}"):
            lists[int(source)] = _rows(problems, f"annotation {place}", entry.get("data"))
    problems.expect(any(lists.values()), "expected annotations of the namespace note_midi with notes, got none")
    beats = _beats(problems, annotations)
    found_tempo = tempo or _tempo(problems, annotations)
    problems.expect(
        len(beats) > 1 or found_tempo is not None,
        "tempo: expected annotated beats or a tempo, got neither: give tempo=",
    )
    if len(problems.found) > _SHOWN:
        problems.found[_SHOWN:] = [f"and {len(problems.found) - _SHOWN} more"]
    problems.raise_if_any()
    return _piece(file.stem, lists, beats, found_tempo)


def _piece(
    title: str,
    lists: dict[int, list[tuple[float, float, float]]],
    beats: list[tuple[float, int, int]],
    tempo: float | None,
) -> Piece:
    remarks: Counter[str] = Counter()
    if len(beats) > 1:
        times = np.array([time for time, _, _ in beats])
        per_beat = float(np.median(np.diff(times)))
        tempo = 60 / per_beat
        first = min(time for rows in lists.values() for time, _, _ in rows)
        origin = max(0, math.ceil((times[0] - first) / per_beat - 0.25))  # beats before the first one annotated
    else:
        assert tempo is not None
        times, per_beat, origin = np.array([0.0, 60 / tempo]), 60 / tempo, 0

    def twelfths(seconds: float) -> int:
        """On the line through the beats, continued at its ends at the usual speed."""
        if seconds < times[0]:
            place = (seconds - times[0]) / per_beat
        elif seconds > times[-1]:
            place = len(times) - 1 + (seconds - times[-1]) / per_beat
        else:
            place = float(np.interp(seconds, times, np.arange(len(times))))
        nearest: int = round((place + origin) * QUARTER)
        return nearest

    notes = []
    for string, rows in sorted(lists.items()):
        for time, duration, value in rows:
            start, end = max(0, twelfths(time)), twelfths(time + duration)
            pitch = round(value)
            if pitch < STANDARD[string]:
                remarks["notes below their string left out"] += 1
                continue
            notes.append(Note(start, pitch, max(1, end - start), string, pitch - STANDARD[string]))
    if not notes:
        raise InputError(title, ["expected notes on their strings, got none"])
    remarks["notes moved to the nearest twelfth of a quarter"] = len(notes)
    end = max(note.end for note in notes)
    signature = (max((number for _, _, number in beats), default=4), 4)
    bars: tuple[int, ...] = ()
    if len(beats) > 1:
        downs = [(i + origin) * QUARTER for i, (_, position, _) in enumerate(beats) if position == 1]
        bars = tuple(sorted({0, *(down for down in downs if down < end)}))
    said = tuple(f"{count} × {text}" for text, count in sorted(remarks.items()) if count)
    return Piece(tuple(notes), signature, bars, end if bars else 0, round(tempo, 3), title=title, remarks=said)


def _rows(problems: Problems, where: str, data: Any) -> list[tuple[float, float, float]]:
    """(time, duration, value) of each note: JAMS has a list of objects, or an object of lists."""
    if isinstance(data, dict):
        columns: list[Any] = [data.get(name) for name in _FIELDS]
        if not all(isinstance(column, list) for column in columns):
            problems.add(f"{where}: expected lists of time, duration and value")
            return []
        data = [dict(zip(_FIELDS, row, strict=False)) for row in zip(*columns, strict=False)]
    if not isinstance(data, list):
        problems.add(f"{where}: data: expected a list, got {type(data).__name__}")
        return []
    rows = []
    for place, entry in enumerate(data):
        values: list[Any] = [entry.get(name) for name in _FIELDS] if isinstance(entry, dict) else []
        good = len(values) == 3 and all(_is_number(value) for value in values)
        good = good and values[0] >= 0 and values[1] >= 0 and 0 <= values[2] <= 127.4
        if problems.expect(
            good, f"{where}, note {place}: expected time, duration from 0, value 0 to 127, got {values}"
        ):
            rows.append((float(values[0]), float(values[1]), float(values[2])))
    return rows


def _beats(problems: Problems, annotations: list[dict[str, Any]]) -> list[tuple[float, int, int]]:
    """(time, position in the bar, beats in the bar) of the first annotation of beats, in rising time."""
    for entry in annotations:
        if entry.get("namespace") != "beat_position" or not isinstance(entry.get("data"), list):
            continue
        found: list[tuple[float, int, int]] = []
        for place, beat in enumerate(entry["data"]):
            value = beat.get("value") if isinstance(beat, dict) else None
            numbers: list[Any] = (
                [value.get(name) for name in ("position", "num_beats")] if isinstance(value, dict) else []
            )
            good = (
                len(numbers) == 2
                and all(_is_number(n) and 1 <= n <= 64 for n in numbers)
                and _is_number(beat.get("time"))
            )
            rises = good and (not found or beat["time"] > found[-1][0])
            if problems.expect(
                rises, f"beat {place}: expected a later time, position and num_beats from 1, got {beat}"
            ):
                found.append((float(beat["time"]), int(numbers[0]), int(numbers[1])))
        return found
    return []


def _tempo(problems: Problems, annotations: list[dict[str, Any]]) -> float | None:
    for entry in annotations:
        data = entry.get("data")
        if entry.get("namespace") == "tempo" and isinstance(data, list) and data and isinstance(data[0], dict):
            value: Any = data[0].get("value")
            if problems.expect(
                _is_number(value) and 0 < value < 1e4, f"tempo: expected a positive number, got {value}"
            ):
                return float(value)
    return None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
