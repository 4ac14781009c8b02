"""Pairs of texts on disk: a TSV or JSON Lines file, or a token file of pairs. Any pair can be read alone.

A text file is read once when it is opened: every line is checked and encoded, and only its place and its two lengths
are kept (16 bytes a pair). From then on it is mapped into memory, and a pair is encoded when it is asked for.
``write_pairs`` saves that second encoding.
"""

from __future__ import annotations

import array
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from twinformer.data.batch import Ids
from twinformer.data.encoding import Encoder
from twinformer.data.lines import Line, LineProblems, left_out_notes, read_lines, without_end
from twinformer.data.pair_format import PairFormat
from twinformer.data.token_writing import write_pieces
from twinformer.data.tokens import TokenFile, Vocabulary
from twinformer.errors import InputError, Problems

#: lines that are encoded at a time
_BATCH = 1024


class PairSource(Protocol):
    """Pairs of sequences of ids, in the order of their file."""

    @property
    def vocab_sizes(self) -> tuple[int, int]: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    def lengths(self) -> tuple[Ids, Ids]:
        """Tokens of each source and of each target: ``[n]``, ``[n]``."""

    def pairs(self, indices: Ids) -> list[tuple[Ids, Ids]]:
        """The ids of these pairs, without special tokens."""


class PairTokens:
    """The pairs of a token file that ``write_pairs`` wrote."""

    def __init__(self, tokens: TokenFile) -> None:
        problems = Problems("PairTokens", InputError)
        count = len(tokens.vocabularies)
        problems.expect(count == 2, f"tokens: expected a file of pairs, got one with {count} vocabulary: {tokens.file}")
        problems.raise_if_any()
        self._tokens = tokens

    @property
    def vocab_sizes(self) -> tuple[int, int]:
        source, target = self._tokens.vocabularies
        return source.size, target.size

    @property
    def notes(self) -> tuple[str, ...]:
        return self._tokens.notes

    def lengths(self) -> tuple[Ids, Ids]:
        lengths = self._tokens.lengths()
        return lengths[0::2], lengths[1::2]

    def pairs(self, indices: Ids) -> list[tuple[Ids, Ids]]:
        return [(self._tokens.document(2 * i), self._tokens.document(2 * i + 1)) for i in map(int, indices)]


class PairLines:
    """The pairs of a TSV or JSON Lines file, encoded when they are asked for.

    Raises one InputError for all lines that are wrong (not UTF-8, malformed, empty where that is refused, symbols that
    an encoder refuses), for no pair at all, and, later, where the file is no longer as long as it was.
    """

    def __init__(self, file: str | Path, source: Encoder, target: Encoder, *, form: PairFormat | None = None) -> None:
        self.file = Path(file)
        self._encoders = (source, target)
        self._form = PairFormat() if form is None else form
        starts, sources, targets = array.array("Q"), array.array("I"), array.array("I")
        reading = _Reading(self.file, self._encoders, self._form)
        for pair in reading:
            starts.append(pair.start)
            sources.append(len(pair.source))
            targets.append(len(pair.target))
        self._left_out = reading.left_out
        self._starts = np.array(starts, np.uint64)
        self._lengths = (np.array(sources, np.uint32), np.array(targets, np.uint32))
        self._size = self.file.stat().st_size
        with self.file.open("rb") as handle:
            self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)

    @property
    def vocab_sizes(self) -> tuple[int, int]:
        source, target = (encoder.tokenizer.vocab_size for encoder in self._encoders)
        return source, target

    @property
    def notes(self) -> tuple[str, ...]:
        return left_out_notes(self._left_out)

    def lengths(self) -> tuple[Ids, Ids]:
        source, target = (lengths.astype(np.int64) for lengths in self._lengths)
        return source, target

    def pairs(self, indices: Ids) -> list[tuple[Ids, Ids]]:
        size = self.file.stat().st_size
        if size != self._size:
            raise InputError(str(self.file), [f"expected {self._size} bytes as when it was opened, got {size}"])
        texts = [self._texts(int(self._starts[i])) for i in indices]
        sides = [encoder.encode([pair[s] for pair in texts]) for s, encoder in enumerate(self._encoders)]
        found = [
            (np.array(source, np.int64), np.array(target, np.int64)) for source, target in zip(*sides, strict=True)
        ]
        for i, pair in zip(indices, found, strict=True):
            lengths = tuple(len(ids) for ids in pair)
            expected = tuple(int(lengths[i]) for lengths in self._lengths)
            if lengths != expected:
                raise InputError(
                    str(self.file), [f"pair {i}: expected {expected} tokens as when opened, got {lengths}"]
                )
        return found

    def _texts(self, start: int) -> list[str]:
        end = self._map.find(b"\n", start)
        line = self._map[start : end if end >= 0 else len(self._map)]
        found = self._form.texts(without_end(line).decode("utf-8", errors="replace"))
        if isinstance(found, str) or not found:
            raise InputError(str(self.file), [f"byte {start}: expected the pair that was there when it was opened"])
        return found


def write_pairs(
    to: str | Path, file: str | Path, source: Encoder, target: Encoder, *, form: PairFormat | None = None
) -> TokenFile:
    """Write the pairs of a text file as ids, source and target in turn. Raises what ``PairLines`` raises."""
    reading = _Reading(Path(file), (source, target), PairFormat() if form is None else form)

    def pieces() -> Iterator[tuple[Sequence[int], bool]]:
        for pair in reading:
            yield pair.source, True
            yield pair.target, True

    vocabularies = [Vocabulary.of(encoder.tokenizer) for encoder in (source, target)]
    return write_pieces(to, pieces(), vocabularies, left_out=reading.left_out)


class _Encoded(NamedTuple):
    start: int
    source: list[int]
    target: list[int]


class _Reading:
    """One pass over a file: its pairs, and at the end one InputError for all that is wrong."""

    def __init__(self, file: Path, encoders: tuple[Encoder, Encoder], form: PairFormat) -> None:
        self.left_out: dict[str, int] = {}
        self._file = file
        self._encoders = encoders
        self._form = form

    def __iter__(self) -> Iterator[_Encoded]:
        problems = LineProblems("pairs", limit=self._form.limit)
        some = False
        waiting: list[tuple[Line, list[str]]] = []
        for line in read_lines(self._file, problems):
            found = self._form.texts(line.text)
            if isinstance(found, str):
                problems.at(self._file, line.number, found)
            elif not found:
                self.left_out["empty pairs"] = self.left_out.get("empty pairs", 0) + 1
            else:
                waiting.append((line, found))
            if len(waiting) == _BATCH:
                some = True
                yield from self._encode(waiting, problems)
                waiting = []
        if waiting:
            some = True
            yield from self._encode(waiting, problems)
        problems.raise_if_any()
        if not some:
            told = "".join(f" ({note})" for note in left_out_notes(self.left_out))
            problems.add(f"{self._file}: expected at least one pair, got none{told}")
        problems.raise_if_any()

    def _encode(self, waiting: list[tuple[Line, list[str]]], problems: LineProblems) -> Iterator[_Encoded]:
        def encoded(side: int) -> list[list[int] | None]:
            def note(index: int, line: int, what: str) -> None:
                problems.at(self._file, waiting[index][0].number, f"{('source', 'target')[side]}: {what}")

            return self._encoders[side].encode([texts[side] for _, texts in waiting], note)

        source, target = encoded(0), encoded(1)
        for (line, _), one, other in zip(waiting, source, target, strict=True):
            if one is not None and other is not None:
                yield _Encoded(line.start, one, other)
