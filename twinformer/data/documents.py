"""Documents of text files, in bounded memory: what a vocabulary is trained on and a token file is written from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from twinformer.data.choices import check_option
from twinformer.data.lines import Empty, Line, LineProblems, json_texts, read_lines
from twinformer.errors import InputError, Problems

#: what a document is: a line; lines up to a blank one; a whole file; a field of the JSON object on each line
Kind = Literal["lines", "paragraphs", "file", "jsonl"]

#: characters after which a document of many lines is handed on in part, at the end of a line
_PIECE = 1 << 18


class Piece(NamedTuple):
    """A document, or a part of one, from this line on; ``ends``: the document ends here."""

    text: str
    file: Path
    line: int
    ends: bool


class TextFiles:
    """The documents of some UTF-8 text files.

    A document of many lines comes in pieces of about 256 K characters that end at line ends, so that no file is too
    large; its last line end is no part of it. ``empty``: what becomes of empty documents (of blanks only), which
    ``left_out`` counts after reading. ``limit``: problems after which reading ends.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        *,
        kind: Kind = "lines",
        field: str = "text",
        empty: Empty = "skip",
        limit: int = 20,
    ) -> None:
        problems = Problems("TextFiles", InputError)
        problems.expect(
            not isinstance(files, (str, Path)) and len(files) > 0, f"files: expected a list of files, got {files!r}"
        )
        check_option(problems, "kind", Kind, kind)
        check_option(problems, "empty", Empty, empty)
        problems.expect(limit >= 1, f"limit: expected at least 1, got {limit}")
        problems.raise_if_any()
        self.files = tuple(Path(file) for file in files)
        self.limit = limit
        self.left_out: dict[str, int] = {}
        self._kind = kind
        self._field = field
        self._empty = empty

    def texts(self) -> Iterator[str]:
        """The pieces' texts. Raises one InputError for all problems, at the end or for as many as ``limit``."""
        problems = LineProblems("TextFiles", limit=self.limit)
        for piece in self.read(problems):
            yield piece.text
        problems.raise_if_any()

    def read(self, problems: LineProblems) -> Iterator[Piece]:
        """All documents, in order. What is wrong is noted in ``problems`` and left out."""
        self.left_out.clear()
        inside = False  # the piece before was the beginning of the same document
        for file in self.files:
            for piece in self._pieces(file, read_lines(file, problems), problems):
                if piece.ends and not inside and not piece.text.strip():
                    if self._empty == "skip":
                        self.left_out["empty documents"] = self.left_out.get("empty documents", 0) + 1
                        continue
                    if self._empty == "refuse":
                        problems.at(file, piece.line, "expected a document, got an empty one")
                        continue
                inside = not piece.ends
                yield piece

    def _pieces(self, file: Path, lines: Iterator[Line], problems: LineProblems) -> Iterator[Piece]:
        match self._kind:
            case "lines":
                for line in lines:
                    yield Piece(line.text, file, line.number, True)
            case "jsonl":
                for line in lines:
                    if not line.text.strip():
                        yield Piece("", file, line.number, True)
                        continue
                    found = json_texts(line.text, (self._field,))
                    if isinstance(found, str):
                        problems.at(file, line.number, found)
                    else:
                        yield Piece(found[0], file, line.number, True)
            case "file":
                yield from _joined(file, lines, blank_ends=False)
            case "paragraphs":
                yield from _joined(file, lines, blank_ends=True)


def _joined(file: Path, lines: Iterator[Line], *, blank_ends: bool) -> Iterator[Piece]:
    """Documents of many lines: a whole file, or what stands between blank lines."""
    kept: list[str] = []
    size = first = 0
    for line in lines:
        if blank_ends and not line.text.strip():
            if kept:
                yield Piece("\n".join(kept), file, first, True)
            kept, size = [], 0
            continue
        if size >= _PIECE:
            yield Piece("\n".join(kept) + "\n", file, first, False)
            kept, size = [], 0
        if not kept:
            first = line.number
        kept.append(line.text)
        size += len(line.text) + 1
    if kept or not blank_ends:
        yield Piece("\n".join(kept), file, max(first, 1), True)
