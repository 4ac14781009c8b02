"""Tablature as text: six lines, the highest string on top, bars between ``|``.

Written with a first line that says how to read it back: time signature, tempo, tuning, the width of a column, and the
bars' lengths where they do not follow from the time signature. Within a bar all columns last equally long; how long a
note lasts is not written, so that a note is read to last until the next one on its string or the end of its bar.

Tablature without that line, as people type it, is read as well: the order of notes is certain, their time is not.
Each place with a number is then taken to last ``step`` twelfths.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from twinformer.checkpoint import read_text, write_atomically
from twinformer.data.guitar.fretboard import NAMES, STANDARD, STRINGS
from twinformer.data.guitar.notes import QUARTER, Note, Piece, bar_length
from twinformer.errors import InputError, Problems

_HEADER = re.compile(
    r"twinformer tablature: (\d{1,2})/(\d{1,2}), tempo (\d{1,4}(?:\.\d{1,3})?), tuning ([\d ]{1,40}), width ([1-4])"
    r"(?:, bars ([\d ]+))?"
)
_LINE = re.compile(r"\s*[A-Ga-g]?[#b]?\s*[|:]{1,2}(.*)")
_PLAYED = re.compile(r"\d+")
_MAX_CHARACTERS = 5_000_000


def tab_text(piece: Piece, *, line_width: int = 100) -> str:
    """The piece as text, in systems of at most ``line_width`` characters (one bar at least).

    Raises InputError where a note has no string or two notes want the same string at once.
    """
    placed = _placed(piece)
    width = max((len(str(fret)) for bar in placed for row in bar for fret in row.values()), default=1) + 1
    beats, unit = piece.time_signature
    lengths = [end - start for start, end in zip(piece.bars, piece.bar_ends, strict=True)]
    usual = bar_length(piece.time_signature)
    tuning = " ".join(map(str, piece.tuning))
    header = f"twinformer tablature: {beats}/{unit}, tempo {piece.tempo:g}, tuning {tuning}, width {width}"
    if any(length != usual for length in lengths):
        header += f", bars {' '.join(map(str, lengths))}"
    drawn = [_draw(bar, length, width) for bar, length in zip(placed, lengths, strict=True)]
    names = NAMES if len(piece.tuning) == STRINGS else tuple(map(str, range(len(piece.tuning))))
    blocks = [header]
    for system in _systems(drawn, line_width - 2):
        rows = [
            "|".join((names[string], *(bar[string] for bar in system))) + "|" for string in range(len(piece.tuning))
        ]
        blocks.append("\n".join(reversed(rows)))
    return "\n\n".join(([piece.title] if piece.title else []) + blocks) + "\n"


def write_tab(piece: Piece, file: str | Path, *, line_width: int = 100) -> None:
    """Write ``tab_text``."""
    text = tab_text(piece, line_width=line_width)
    write_atomically(Path(file), lambda part: part.write_text(text, encoding="utf-8"))


def read_tab(file: str | Path, *, step: int = QUARTER // 2) -> Piece:
    """A piece from a file of tablature; see ``parse_tab``."""
    return parse_tab(read_text(Path(file)), step=step, name=str(file))


def parse_tab(text: str, *, step: int = QUARTER // 2, name: str = "tablature") -> Piece:
    """A piece from text. ``step``: how long each place lasts where the text has no header.

    Raises InputError where there is no system of six lines, one has lines with different bars, or a column does not
    fit.
    """
    problems = Problems(name, InputError)
    problems.expect(len(text) <= _MAX_CHARACTERS, f"expected at most {_MAX_CHARACTERS} characters, got {len(text)}")
    problems.expect(step >= 1, f"step: expected at least 1, got {step}")
    problems.raise_if_any()
    lines = text.splitlines()
    header = next((found for line in lines[:3] if (found := _HEADER.fullmatch(line.strip()))), None)
    strings = len(header[4].split()) if header else STRINGS
    bars = [bar for system in _read_systems(lines, strings, problems) for bar in system]
    problems.expect(bool(bars) or bool(problems.found), f"expected tablature, lines of {strings} strings, got none")
    problems.raise_if_any()
    return _with_header(header, bars, lines, problems) if header else _without_header(bars, step, problems)


def _placed(piece: Piece) -> list[list[dict[int, int]]]:
    """For each bar and string: the fret at each time since the bar began."""
    problems = Problems("tablature", InputError)
    found: list[list[dict[int, int]]] = [[{} for _ in piece.tuning] for _ in piece.bars]
    bar = 0
    for i, note in enumerate(piece.notes):
        while note.start >= piece.bar_ends[bar]:
            bar += 1
        if note.string is None or note.fret is None:
            problems.add(f"note {i}: expected a string and a fret, got none")
            continue
        row = found[bar][note.string]
        place = note.start - piece.bars[bar]
        free = row.setdefault(place, note.fret) == note.fret
        problems.expect(
            free, f"note {i}: expected string {note.string} to be free at {note.start}, got two notes on it"
        )
    problems.raise_if_any()
    return found


def _draw(bar: Sequence[dict[int, int]], length: int, width: int) -> list[str]:
    """One string of text a string, all equally long; a dash first, so that numbers keep off the bar line."""
    column = math.gcd(length, QUARTER, *(time for row in bar for time in row))
    return ["-" + "".join(str(row.get(time, "")).ljust(width, "-") for time in range(0, length, column)) for row in bar]


def _systems(bars: Sequence[list[str]], width: int) -> Iterator[list[list[str]]]:
    system: list[list[str]] = []
    used = 0
    for bar in bars:
        if system and used + len(bar[0]) + 1 > width:
            yield system
            system, used = [], 0
        system.append(bar)
        used += len(bar[0]) + 1
    if system:
        yield system


def _read_systems(lines: Sequence[str], strings: int, problems: Problems) -> Iterator[list[list[str]]]:
    """The bars of each system, each a list of text by string, the lowest first."""
    group: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        found = _LINE.fullmatch(line)
        if found and ("-" in line or found[1].strip("| ")):
            group.append(found[1].rstrip().rstrip("|"))
            continue
        if group:
            split = [row.split("|") for row in reversed(group)]
            same = {tuple(map(len, row)) for row in split}
            if problems.expect(
                len(group) == strings and len(same) == 1,
                f"line {number - 1}: expected {strings} lines with bars equally long, got {len(group)} lines, "
                f"bars of {sorted(same)[:3]} characters",
            ):
                yield [list(bar) for bar in zip(*split, strict=True) if bar[0].strip(":")]
        group = []


def _with_header(header: re.Match[str], bars: Sequence[list[str]], lines: Sequence[str], problems: Problems) -> Piece:
    signature = int(header[1]), int(header[2])
    tuning, width = tuple(map(int, header[4].split())), int(header[5])
    usual = bar_length(signature) if signature[1] else 0
    lengths = [int(length) for length in header[6].split()] if header[6] else [usual] * len(bars)
    problems.expect(
        len(lengths) == len(bars) and all(0 < length <= 10_000 for length in lengths),
        f"bars: expected a length of each of {len(bars)}, got {lengths[:20]}",
    )
    problems.raise_if_any()
    starts = [0]
    found: list[tuple[int, int, int, int]] = []  # start, end of its bar, string, fret
    for number, (bar, length) in enumerate(zip(bars, lengths, strict=True)):
        columns, rest = divmod(len(bar[0]) - 1, width)
        if problems.expect(
            rest == 0 and columns >= 1 and length % columns == 0,
            f"bar {number}: expected columns of {width} characters that divide {length}, got {len(bar[0])} characters",
        ):
            for string, row in enumerate(bar):
                for played in _PLAYED.finditer(row):
                    place, off = divmod(played.start() - 1, width)
                    fits = off == 0 and len(played[0]) < width
                    if problems.expect(fits, f"bar {number}: expected {played[0]!r} at the start of a column"):
                        found.append(
                            (starts[-1] + place * length // columns, starts[-1] + length, string, int(played[0]))
                        )
        starts.append(starts[-1] + length)
    problems.raise_if_any()
    title = lines[0].strip() if not _HEADER.fullmatch(lines[0].strip()) else ""
    return Piece(
        _lasting(found, tuning), signature, tuple(starts[:-1]), starts[-1], float(header[3]), tuning, title.strip()
    )


def _without_header(bars: Sequence[list[str]], step: int, problems: Problems) -> Piece:
    starts = [0]
    found = []
    for bar in bars:
        played = [
            (match.start(), string, int(match[0])) for string, row in enumerate(bar) for match in _PLAYED.finditer(row)
        ]
        problems.expect(all(fret <= 36 for _, _, fret in played), f"expected frets up to 36, got {bar}")
        places = sorted({place for place, _, _ in played})
        end = starts[-1] + max(len(places), 1) * step
        found += [(starts[-1] + places.index(place) * step, end, string, fret) for place, string, fret in played]
        starts.append(end)
    problems.raise_if_any()
    remark = f"no header: each place is taken to last {step} twelfths, a bar as long as its places"
    return Piece(_lasting(found, STANDARD), (4, 4), tuple(starts[:-1]), starts[-1], remarks=(remark,))


def _lasting(found: Sequence[tuple[int, int, int, int]], tuning: Sequence[int]) -> tuple[Note, ...]:
    """Notes that last until the next on their string, or the end of their bar."""
    notes = []
    following: dict[int, int] = {}
    for start, bar_end, string, fret in sorted(found, reverse=True):
        end = min(bar_end, following.get(string, bar_end))
        notes.append(Note(start, tuning[string] + fret, end - start, string, fret))
        following[string] = start
    return tuple(notes)
