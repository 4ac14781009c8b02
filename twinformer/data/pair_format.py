"""How a line of text holds a pair: columns between tabs, or fields of a JSON object."""

from __future__ import annotations

from typing import Literal

from twinformer.data.choices import check_option
from twinformer.data.lines import Empty, json_texts
from twinformer.errors import InputError, Problems

Kind = Literal["tsv", "jsonl"]


class PairFormat:
    """How a line holds a source and a target.

    ``tsv``: two columns between tabs, or, with ``columns``, these (counted from 0) of as many as there are; no quoting.
    ``jsonl``: a JSON object with texts in ``fields``. ``empty``: what becomes of a blank line, and of a pair of which
    one text holds nothing but blanks (a blank line of JSON Lines holds no pair that could be kept).
    """

    def __init__(
        self,
        kind: Kind = "tsv",
        *,
        columns: tuple[int, int] | None = None,
        fields: tuple[str, str] = ("source", "target"),
        empty: Empty = "refuse",
        limit: int = 20,
    ) -> None:
        problems = Problems("PairFormat", InputError)
        check_option(problems, "kind", Kind, kind)
        check_option(problems, "empty", Empty, empty)
        problems.expect(
            columns is None or (len(columns) == 2 and min(columns) >= 0),
            f"columns: expected two numbers from 0, got {columns!r}",
        )
        problems.expect(len(fields) == 2, f"fields: expected two names, got {fields!r}")
        problems.expect(limit >= 1, f"limit: expected at least 1, got {limit}")
        problems.raise_if_any()
        self.limit = limit
        self._kind = kind
        self._columns = columns
        self._fields = fields
        self._empty = empty

    def texts(self, line: str) -> list[str] | str:
        """Source and target of a line, or what is wrong with it. Where they are to be left out: nothing."""
        blank = not line.strip()
        found = self._split(line) if not blank else ["", ""]
        if isinstance(found, str):
            return found
        empty = [name for name, text in zip(("source", "target"), found, strict=True) if not text.strip()]
        if empty and self._empty == "skip":
            return []
        if (empty and self._empty == "refuse") or (blank and self._kind == "jsonl"):
            return f"expected a source and a target, got an empty {'line' if blank else ' and '.join(empty)}"
        return found

    def _split(self, line: str) -> list[str] | str:
        if self._kind == "jsonl":
            return json_texts(line, self._fields)
        cells = line.split("\t")
        if self._columns is None:
            return cells if len(cells) == 2 else f"expected 2 columns between tabs, got {len(cells)}"
        if max(self._columns) >= len(cells):
            return f"expected at least {max(self._columns) + 1} columns between tabs, got {len(cells)}"
        return [cells[column] for column in self._columns]
