"""Lines of UTF-8 files, one at a time, with every problem named by file and line, up to a limit."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from twinformer.errors import InputError, Problems

#: what becomes of an empty line or field: left out and counted, a problem, or taken as it is
Empty = Literal["skip", "refuse", "keep"]

#: bytes of the longest line that is read: a file without line ends is no text, and memory stays bounded
_LONGEST = 1 << 26


class Line(NamedTuple):
    """A line without its end. ``number`` counts from 1, ``start`` is its first byte's place in the file."""

    number: int
    start: int
    text: str


class LineProblems(Problems):
    """Problems of files, by line. Reading ends with an error as soon as there are ``limit`` of them."""

    def __init__(self, subject: str, *, limit: int = 20) -> None:
        super().__init__(subject, InputError)
        self._limit = limit

    def at(self, file: Path | str, number: int, problem: str) -> None:
        self.add(f"{file}: line {number}: {problem}")

    def add(self, problem: str) -> None:
        super().add(problem)
        if len(self.found) >= self._limit:
            self.found.append(f"there may be more: reading ended at {self._limit} problems")
            self.raise_if_any()

    def expect(self, condition: bool, problem: str) -> bool:
        if not condition:
            self.add(problem)
        return condition


def read_lines(file: Path, problems: LineProblems) -> Iterator[Line]:
    """The lines of a file, which end in LF or CR LF. Those that are not UTF-8 are noted in ``problems``."""
    try:
        with file.open("rb") as handle:
            start = len(codecs.BOM_UTF8) if handle.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
            handle.seek(start)
            number = 0
            while line := handle.readline(_LONGEST + 1):
                number += 1
                if len(line) > _LONGEST:
                    problems.at(file, number, f"expected at most {_LONGEST} bytes, got more")
                    return
                try:
                    yield Line(number, start, without_end(line).decode("utf-8"))
                except UnicodeDecodeError as error:
                    problems.at(
                        file, number, f"expected UTF-8, got byte 0x{line[error.start]:02x} at place {error.start + 1}"
                    )
                start += len(line)
    except OSError as error:
        problems.add(f"{file}: expected a file that can be read, got: {error}")


def without_end(line: bytes) -> bytes:
    return line.removesuffix(b"\n").removesuffix(b"\r")


def json_texts(text: str, fields: tuple[str, ...]) -> list[str] | str:
    """The texts in these fields of a JSON object, or what is wrong with it."""
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"expected a JSON object, got text that does not parse: {error}"
    if not isinstance(value, dict):
        return f"expected a JSON object, got {type(value).__name__}"
    for field in fields:
        if field not in value:
            return f"expected the field {field!r}, got {', '.join(map(repr, value)) or 'none'}"
        if not isinstance(value[field], str):
            return f"field {field!r}: expected text, got {type(value[field]).__name__}"
        # JSON can spell half of a pair of surrogates, which is no character
        if any("\ud800" <= character <= "\udfff" for character in value[field]):
            return f"field {field!r}: expected text, got half a surrogate pair"
    return [value[field] for field in fields]


def left_out_notes(counts: Mapping[str, int]) -> tuple[str, ...]:
    """Counts of what was left out, in words."""
    return tuple(f"{count} {what} left out" for what, count in counts.items())
