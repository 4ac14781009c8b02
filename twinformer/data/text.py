"""Text for a decoder: rows of T tokens and, at each place, the token that comes next.

Two modes. ``documents``: rows are packed from documents that know nothing of each other; ``segments`` tells them apart,
and the model counts positions from 0 in each. ``stream``: one long text, an end token after each document, cut every
T tokens; what comes before in a row is seen, whichever document it is of.
"""

from __future__ import annotations

import bisect
from typing import Literal, Protocol

import numpy as np

from twinformer.data.batch import Batch, Ids, Part
from twinformer.data.choices import Long, check_ids, check_option, settle_long
from twinformer.data.order import Order, Steps, is_whole
from twinformer.data.packing import pack
from twinformer.data.tokens import TokenFile
from twinformer.errors import InputError, Problems

Mode = Literal["documents", "stream"]

#: a document in which nothing comes next (a token alone, without begin and end): a problem, or left out and counted
Short = Literal["refuse", "skip"]


class PackedText:
    """A data set for ``LanguageModel``: inputs ``tokens [B, T]``, and ``segments [B, T]`` in mode ``documents``.

    ``documents``: a document is ``begin_id`` (if given), its tokens, ``end_id`` (if given), and each of these is a
    target exactly once in an epoch, except the first, which nothing comes before: the begin token, or without one the
    document's first token. One longer than a row is cut (``long``): the next row begins with the last target as its
    first input, so no target is lost. About 40 bytes are kept for each document, or piece of one.

    ``stream``: ``end_id`` is needed; it also begins the stream, so that every token, and the end token of every
    document, is a target exactly once. No memory is kept. The last row is filled up with padding.

    The last batch of an epoch is filled up with rows of padding, so that all have the shape ``[batch_size, length]``.
    """

    def __init__(
        self,
        tokens: TokenFile,
        *,
        length: int,
        batch_size: int,
        mode: Mode = "documents",
        begin_id: int | None = None,
        end_id: int | None = None,
        pad_id: int = 0,
        long: Long = "cut",
        short: Short = "refuse",
        seed: int = 0,
        shuffle: bool = True,
        name: str = "training",
    ) -> None:
        problems = Problems("PackedText", InputError)
        V = tokens.vocab_size
        problems.expect(
            len(tokens.vocabularies) == 1, f"tokens: expected a file of text, got one of pairs: {tokens.file}"
        )
        problems.expect(is_whole(length, 1), f"length: expected a whole number from 1, got {length!r}")
        for role, options, value in (("mode", Mode, mode), ("long", Long, long), ("short", Short, short)):
            check_option(problems, role, options, value)
        check_ids(problems, V, begin_id=begin_id, end_id=end_id, pad_id=pad_id)
        if mode == "stream":
            problems.expect(end_id is not None, "end_id: expected an id in mode 'stream', got None")
            problems.expect(begin_id is None, f"begin_id: expected None in mode 'stream', got {begin_id!r}")
        problems.raise_if_any()
        notes = list(tokens.notes)
        self._rows: _Rows
        if end_id is not None and mode == "stream":
            self._rows = _Stream(tokens, length, end_id)
        else:
            self._rows = _Documents(tokens, length, begin_id, end_id, long, short, notes)
        self.length = length
        self.vocab_size = V
        self.part = Part(name, self._rows.num_rows, tuple(notes))
        self._batch_size = batch_size
        self._pad_id = pad_id
        self._packed = mode == "documents"
        self._steps = Steps(Order(self._rows.num_rows, seed, shuffle=shuffle), batch_size)

    @property
    def steps_per_epoch(self) -> int:
        return self._steps.per_epoch

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0 over all epochs."""
        _, rows = self._steps.examples(step)
        shape = (self._batch_size, self.length)
        tokens, targets = (np.full(shape, self._pad_id, np.int64) for _ in range(2))
        segments = np.zeros(shape, np.int64)
        for b, row in enumerate(rows):
            place = 0
            for number, span in enumerate(self._rows.spans(int(row)), 1):
                end = place + len(span) - 1
                tokens[b, place:end] = span[:-1]
                targets[b, place:end] = span[1:]
                segments[b, place:end] = number
                place = end
        inputs = {"tokens": tokens, "segments": segments} if self._packed else {"tokens": tokens}
        return Batch(inputs, targets, segments > 0)


class _Rows(Protocol):
    """Where the tokens of each row come from."""

    @property
    def num_rows(self) -> int: ...

    def spans(self, row: int) -> list[Ids]:
        """Runs of tokens ``[n + 1]``: n inputs and, one place on, their n targets."""


class _Stream:
    """The end token, then all documents, the end token after each: token p of the stream is followed by p + 1."""

    def __init__(self, tokens: TokenFile, length: int, end_id: int) -> None:
        self._tokens = tokens
        self._length = length
        self._end_id = end_id
        self._size = tokens.num_tokens + tokens.num_documents + 1
        self.num_rows = -(-(self._size - 1) // length)

    def spans(self, row: int) -> list[Ids]:
        first = row * self._length
        last = min(first + self._length + 1, self._size)
        found = np.full(last - first, self._end_id, np.int64)
        offsets, ids = self._tokens.offsets, self._tokens.ids
        # document d, behind the end token that comes before it, begins at this place of the stream
        document = bisect.bisect_right(range(self._tokens.num_documents), first, key=lambda d: int(offsets[d]) + d) - 1
        while document < self._tokens.num_documents:
            start, end = int(offsets[document]), int(offsets[document + 1])
            shift = document + 1
            if start + shift >= last:
                break
            low, high = max(start, first - shift), min(end, last - shift)
            if low < high:
                found[low + shift - first : high + shift - first] = ids[low:high]
            document += 1
        return [found]


class _Documents:
    """Rows packed from documents: the units of the packing are pairs of a token and the next one."""

    def __init__(
        self,
        tokens: TokenFile,
        length: int,
        begin_id: int | None,
        end_id: int | None,
        long: Long,
        short: Short,
        notes: list[str],
    ) -> None:
        self._tokens = tokens
        self._begin = [] if begin_id is None else [begin_id]
        self._end = [] if end_id is None else [end_id]
        pairs = np.maximum(tokens.lengths() + (len(self._begin) + len(self._end) - 1), 0)
        problems = Problems("PackedText", InputError)
        alone = np.flatnonzero(pairs == 0)
        if len(alone):
            what = f"{len(alone)} of {len(pairs)} documents of one token or none, in which nothing comes next"
            problems.expect(
                short == "skip",
                f"short: expected a begin_id or an end_id, or 'skip', for {what} (the first: document {alone[0]})",
            )
            notes.append(f"{what}, left out")
        pairs = np.where(settle_long(problems, notes, "documents", pairs, length, long), pairs, 0)
        problems.raise_if_any()
        problems.expect(bool(pairs.any()), f"tokens: expected a document with a target, got none in {tokens.file}")
        problems.raise_if_any()
        self._packing = pack(pairs, length)
        self.num_rows = self._packing.num_rows

    def spans(self, row: int) -> list[Ids]:
        packing = self._packing
        pieces = range(int(packing.rows[row]), int(packing.rows[row + 1]))
        return [
            self._span(int(packing.documents[p]), int(packing.begins[p]), int(packing.begins[p] + packing.counts[p]))
            for p in pieces
        ]

    def _span(self, document: int, first: int, last: int) -> Ids:
        """Tokens ``first … last`` (inclusive) of a document with its begin and end."""
        start, end = int(self._tokens.offsets[document]), int(self._tokens.offsets[document + 1])
        shift = start - len(self._begin)
        ids = self._tokens.slice(max(start, shift + first), min(end, shift + last + 1))
        before = self._begin if first == 0 else []
        after = self._end if shift + last >= end else []
        return np.concatenate([np.array(before, np.int64), ids, np.array(after, np.int64)])
