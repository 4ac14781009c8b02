"""MusicXML, with ``<string>`` and ``<fret>`` where a score has them; through ``defusedxml``.

A string's number counts from the highest, 1. Where a note has a string and a fret they say what sounds, and its
written pitch is not asked: guitar scores are written an octave higher, and many do not say so. Of a score with a
staff of notes and one of tablature for the same music, the tablature is read. Ties are joined, grace notes left out,
repeats not unrolled. Compressed files (``.mxl``) are read too.
"""

from __future__ import annotations

import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from twinformer.data.guitar.fretboard import STANDARD
from twinformer.data.guitar.notes import MAX_TWELFTHS, QUARTER, Note, Piece
from twinformer.errors import InputError, Problems

_STEPS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
_MAX_BYTES = 50_000_000
_SHOWN = 20


def read_musicxml(file: str | Path, *, part: int | None = None) -> Piece:
    """One part (the first that has tablature, else the first with notes) of a score-partwise file.

    Raises InputError where the file is no such score, holds entities or is too large, or a note does not parse.
    """
    file = Path(file)
    root = _parse(file)
    if root.tag != "score-partwise":
        raise InputError(str(file), [f"expected MusicXML with the root <score-partwise>, got <{root.tag}>"])
    parts = root.findall("part")
    if part is not None and not 0 <= part < len(parts):
        raise InputError(str(file), [f"part: expected 0 to {len(parts) - 1}, got {part}"])
    chosen = [parts[part]] if part is not None else parts
    chosen = [p for p in chosen if p.find(".//note//technical/fret") is not None] or [
        p for p in chosen if p.find(".//note/pitch") is not None
    ]
    if not chosen:
        raise InputError(str(file), ["expected a part with notes, got none"])
    title = root.findtext("work/work-title") or root.findtext("movement-title") or ""
    return _Reading(str(file)).piece(chosen[0], title.strip())


def _parse(file: Path) -> Any:
    from defusedxml import DefusedXmlException, ElementTree

    try:
        return ElementTree.fromstring(_content(file))
    except DefusedXmlException as error:
        raise InputError(
            str(file), [f"expected XML without entities and outside references, got: {error!r}"]
        ) from error
    except (ElementTree.ParseError, LookupError, ValueError, RecursionError) as error:
        raise InputError(str(file), [f"expected XML, got text that does not parse: {error}"]) from error


def _content(file: Path) -> bytes:
    """The score's bytes, out of the archive where it is one, never more than a limit."""
    try:
        if not zipfile.is_zipfile(file):
            with file.open("rb") as stream:
                data = stream.read(_MAX_BYTES + 1)
        else:
            with zipfile.ZipFile(file) as archive:
                names = [
                    n for n in archive.namelist() if n.endswith((".xml", ".musicxml")) and not n.startswith("META-INF")
                ]
                if not names:
                    raise InputError(str(file), ["expected an archive with a score in it, got none"])
                with archive.open(names[0]) as stream:
                    data = stream.read(_MAX_BYTES + 1)
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
        raise InputError(str(file), [f"expected a file that can be read, got: {error!r}"]) from error
    if len(data) > _MAX_BYTES:
        raise InputError(str(file), [f"expected at most {_MAX_BYTES} bytes of score, got more"])
    return data


class _Reading:
    def __init__(self, name: str) -> None:
        self.name = name
        self.problems = Problems(name, InputError)
        self.divisions = 1.0  # in a quarter
        self.transposition = 0
        self.tuning = list(STANDARD)
        self.signature: tuple[int, int] | None = None
        self.tempo: float | None = None
        self.notes: list[tuple[int, Note]] = []  # with its staff
        self.tied: dict[tuple[int, str, int], int] = {}  # staff, voice, pitch: the place of the note that goes on
        self.remarks: Counter[str] = Counter()

    def piece(self, part: Any, title: str) -> Piece:
        bars = []
        start = 0.0  # in quarters: a score may count in sevenths
        for number, measure in enumerate(part.findall("measure")):
            length = self._measure(f"measure {measure.get('number') or number}", measure, start)
            if length > 0 and round(start * QUARTER) < round((start + length) * QUARTER):
                bars.append(round(start * QUARTER))
            start += length
            if start * QUARTER > MAX_TWELFTHS:
                self.problems.add(f"expected a piece of at most {MAX_TWELFTHS} twelfths, got more")
                break
        if len(self.problems.found) > _SHOWN:
            self.problems.found[_SHOWN:] = [f"and {len(self.problems.found) - _SHOWN} more"]
        self.problems.raise_if_any()
        notes = self._without_double_staff()
        if not notes:
            raise InputError(self.name, ["expected a part with notes, got none that last"])
        end = max(round(start * QUARTER), max(note.end for note in notes))
        remarks = tuple(f"{count} × {text}" for text, count in sorted(self.remarks.items()) if count)
        return Piece(
            tuple(notes),
            self.signature or (4, 4),
            tuple(bars),
            end,
            self.tempo or 120.0,
            tuple(self.tuning),
            title,
            remarks,
        )

    def _measure(self, where: str, measure: Any, start: float) -> float:
        """Take a measure's notes; gives its length in quarters."""
        now = longest = begun = 0.0  # begun: where the last note did, for those that sound with it
        for element in measure:
            match element.tag:
                case "attributes":
                    self._attributes(where, element)
                case "sound" | "direction":
                    sound = element if element.tag == "sound" else element.find("sound")
                    tempo = (
                        None if sound is None or self.tempo else self._number(where, sound.get("tempo"), optional=True)
                    )
                    self.tempo = tempo if tempo and 0 < tempo < 1e4 else self.tempo
                case "backup" | "forward":
                    moved = self._number(where, element.findtext("duration")) / self.divisions
                    now = max(0.0, now + (moved if element.tag == "forward" else -moved))
                case "note" if element.find("grace") is not None or element.find("cue") is not None:
                    self.remarks["grace and cue notes left out"] += 1
                case "note":
                    duration = self._number(where, element.findtext("duration")) / self.divisions
                    is_chord = element.find("chord") is not None
                    begun = begun if is_chord else now
                    self._note(where, element, start + begun, duration)
                    now = now if is_chord else now + duration
            longest = max(longest, now)
        return longest

    def _attributes(self, where: str, element: Any) -> None:
        if element.find("divisions") is not None:
            divisions = self._number(where, element.findtext("divisions"))
            if self.problems.expect(divisions > 0, f"{where}: divisions: expected a positive number, got {divisions}"):
                self.divisions = divisions
        time = element.find("time")
        if time is not None and time.find("beats") is not None and self.signature is None:
            beats, unit = (self._number(where, time.findtext(name)) for name in ("beats", "beat-type"))
            self.signature = int(beats), int(unit)
        transpose = element.find("transpose")
        if transpose is not None:
            octaves = self._number(where, transpose.findtext("octave-change"), optional=True)
            self.transposition = int(self._number(where, transpose.findtext("chromatic")) + 12 * octaves)
        for tuning in element.findall("staff-details/staff-tuning"):
            line = int(self._number(where, tuning.get("line")))
            if self.problems.expect(
                1 <= line <= 12, f"{where}: staff-tuning: expected a line from 1 to 12, got {line}"
            ):
                self.tuning += [0] * (line - len(self.tuning))
                self.tuning[line - 1] = self._pitch(where, tuning, "tuning-")

    def _note(self, where: str, element: Any, start: float, duration: float) -> None:
        if element.find("rest") is not None or duration <= 0:
            return
        pitch: int | None = None
        if element.find("pitch") is not None:
            pitch = self._pitch(where, element.find("pitch")) + self.transposition
        technical = element.find("notations/technical")
        string = fret = None
        if technical is not None and technical.find("string") is not None and technical.find("fret") is not None:
            number, stop = (int(self._number(where, technical.findtext(name))) for name in ("string", "fret"))
            strings = len(self.tuning)
            if self.problems.expect(
                1 <= number <= strings and 0 <= stop <= 36,
                f"{where}: expected string 1 to {strings} and fret 0 to 36, got {number} and {stop}",
            ):
                string, fret = strings - number, stop
                self.remarks["notes whose written pitch is not that of their string and fret"] += (
                    pitch is not None and pitch != self.tuning[string] + fret
                )
                pitch = self.tuning[string] + fret
        if pitch is None:
            self.remarks["notes without a pitch left out"] += 1
            return
        first, last = round(start * QUARTER), round((start + duration) * QUARTER)
        self.remarks["notes moved to the nearest twelfth of a quarter"] += (
            abs(start * QUARTER - first) > 1e-6 or abs((start + duration) * QUARTER - last) > 1e-6
        )
        staff = int(self._number(where, element.findtext("staff"), optional=True)) or 1
        key = (staff, element.findtext("voice") or "1", pitch)
        ties = {tie.get("type") for tie in element.findall("tie")}
        before = self.tied.pop(key, None) if "stop" in ties else None
        if before is not None and self.notes[before][1].end == first:
            joined = self.notes[before][1]
            self.notes[before] = (staff, replace(joined, duration=max(last - joined.start, 1)))
        else:
            before = len(self.notes)
            self.notes.append((staff, Note(first, pitch, max(1, last - first), string, fret)))
        if "start" in ties:
            self.tied[key] = before

    def _without_double_staff(self) -> list[Note]:
        """All notes, or those of the one staff that is tablature throughout where others have none."""
        staves = {staff for staff, _ in self.notes}
        full = [s for s in staves if all(note.fret is not None for staff, note in self.notes if staff == s)]
        bare = [s for s in staves if all(note.fret is None for staff, note in self.notes if staff == s)]
        if len(staves) > 1 and full and len(full) + len(bare) == len(staves):
            left_out = sum(staff in bare for staff, _ in self.notes)
            self.remarks["notes of a staff without tablature left out"] += left_out
            return [note for staff, note in self.notes if staff in full]
        return [note for _, note in self.notes]

    def _pitch(self, where: str, element: Any, prefix: str = "") -> int:
        step = (element.findtext(f"{prefix}step") or "").strip()
        if not self.problems.expect(step in _STEPS, f"{where}: step: expected one of A to G, got {step!r}"):
            return 0
        alter = self._number(where, element.findtext(f"{prefix}alter"), optional=True)
        return int(12 * (self._number(where, element.findtext(f"{prefix}octave")) + 1) + _STEPS[step] + alter)

    def _number(self, where: str, text: str | None, *, optional: bool = False) -> float:
        if text is None and optional:
            return 0.0
        try:
            number = float((text or "").strip())
        except ValueError:
            number = float("nan")
        if self.problems.expect(abs(number) < 1e6, f"{where}: expected a number, got {text!r}"):
            return number
        return 1.0
