"""Pairs of a source and a target: for an encoder-decoder, or one behind the other for a decoder.

Batches have few shapes. Examples of like length share a bucket, whose batches are padded to the bucket's longest,
rounded up; each epoch orders the examples of a bucket, and then the batches of all buckets, anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from twinformer.data.batch import Batch, Ids, Part
from twinformer.data.buckets import buckets
from twinformer.data.choices import Long, check_ids, check_option, settle_long
from twinformer.data.order import Order, epoch_and_place, is_whole
from twinformer.data.pair_files import PairSource
from twinformer.errors import InputError, Problems

Form = Literal["encoder-decoder", "decoder"]


class Pairs:
    """A data set for ``EncoderDecoder`` (form ``encoder-decoder``) or ``LanguageModel`` (form ``decoder``).

    The target is ``begin_id``, its tokens, ``end_id``; each token of it and the end is a target once in an epoch.

    ``encoder-decoder``: inputs ``source [B, S]``, ``target [B, T]`` and their padding masks, both padded on the right.
    With ``source_end_id`` the source has that at its end.
    ``decoder``: input ``tokens [B, T]``: ``begin_id`` (if given), source, ``separator_id``, target. Only target tokens
    and the end are targets. Padding, on the right, is seen by no token and has no mask.

    ``max_source`` and ``max_target`` bound the tokens of each (of the source with its end, of the target with its end).
    What is longer is a problem, or with ``long`` cut at its end (a target that is cut does not end), or left out.

    Size of a batch: ``batch_size`` rows, or as many as have ``batch_tokens`` places in the longer of source and target
    (one at least). The last batch of a bucket is filled up with rows of padding. About 24 bytes are kept for each pair.
    """

    def __init__(
        self,
        pairs: PairSource,
        *,
        form: Form = "encoder-decoder",
        max_source: int,
        max_target: int,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        begin_id: int | None,
        end_id: int,
        separator_id: int | None = None,
        source_end_id: int | None = None,
        source_pad_id: int = 0,
        pad_id: int = 0,
        long: Long = "refuse",
        num_buckets: int = 4,
        multiple: int = 8,
        seed: int = 0,
        shuffle: bool = True,
        name: str = "training",
    ) -> None:
        problems = Problems("Pairs", InputError)
        check_option(problems, "form", Form, form)
        check_option(problems, "long", Long, long)
        sizes = {"max_source": max_source, "max_target": max_target, "num_buckets": num_buckets, "multiple": multiple}
        if batch_size is None and batch_tokens is None:
            problems.add("batch_size: expected it or batch_tokens, got neither")
        elif batch_size is not None and batch_tokens is not None:
            problems.add(f"batch_size: expected it or batch_tokens, got both, {batch_size!r} and {batch_tokens!r}")
        sizes |= {k: v for k, v in (("batch_size", batch_size), ("batch_tokens", batch_tokens)) if v is not None}
        for what, value in sizes.items():
            problems.expect(is_whole(value, 1), f"{what}: expected a whole number from 1, got {value!r}")
        source_size, V = pairs.vocab_sizes
        check_ids(problems, source_size, source_end_id=source_end_id, source_pad_id=source_pad_id)
        check_ids(problems, V, begin_id=begin_id, end_id=end_id, separator_id=separator_id, pad_id=pad_id)
        if form == "decoder":
            problems.expect(separator_id is not None, "separator_id: expected an id in form 'decoder', got None")
            problems.expect(
                source_end_id is None, f"source_end_id: expected None in form 'decoder', got {source_end_id}"
            )
            problems.expect(
                source_size == V, f"pairs: expected one vocabulary in form 'decoder', got {source_size} and {V}"
            )
        else:
            problems.expect(begin_id is not None, "begin_id: expected an id in form 'encoder-decoder', got None")
            problems.expect(separator_id is None, f"separator_id: expected None in form {form!r}, got {separator_id}")
        problems.raise_if_any()
        self.vocab_size = V
        self._pairs = pairs
        self._decoder = form == "decoder"
        self._max = (max_source, max_target)
        self._begin, self._end, self._separator = _ids(begin_id), _ids(end_id), _ids(separator_id)
        self._source_end = _ids(source_end_id)
        self._pads = (source_pad_id, pad_id)
        notes = list(pairs.notes)
        examples, taken = self._examples(problems, notes, long)
        problems.raise_if_any()
        self.part = Part(name, len(examples), tuple(notes))
        room = (max_source, len(self._begin) + max_source + max_target if self._decoder else max_target)
        self._buckets = [
            _Bucket(
                examples[inside],
                (S, T),
                batch_size if batch_size is not None else max(1, (batch_tokens or 1) // max(S, T)),
                Order(len(inside), seed, name=f"bucket {b}", shuffle=shuffle),
            )
            for b, (inside, (S, T)) in enumerate(buckets(taken, num_buckets, multiple, room))
        ]
        steps = [bucket.num_batches for bucket in self._buckets]
        self._first = np.concatenate([[0], np.cumsum(steps)])
        self._order = Order(sum(steps), seed, name="batches", shuffle=shuffle)

    @property
    def steps_per_epoch(self) -> int:
        return int(self._first[-1])

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes that batches have: ``(B, S, T)``, or ``(B, T)`` in form ``decoder``."""
        return [
            (bucket.rows, *bucket.shape[1:]) if self._decoder else (bucket.rows, *bucket.shape)
            for bucket in self._buckets
        ]

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0 over all epochs."""
        epoch, place = epoch_and_place(step, self.steps_per_epoch)
        number = int(self._order.at(epoch, [place])[0])
        b = int(np.searchsorted(self._first, number, side="right")) - 1
        bucket = self._buckets[b]
        first = (number - int(self._first[b])) * bucket.rows
        places = np.arange(first, min(first + bucket.rows, len(bucket.examples)))
        chosen = self._pairs.pairs(bucket.examples[bucket.order.at(epoch, places)])
        return self._joined(chosen, bucket) if self._decoder else self._apart(chosen, bucket)

    def _apart(self, pairs: list[tuple[Ids, Ids]], bucket: _Bucket) -> Batch:
        S, T = bucket.shape
        source, source_real = np.full((bucket.rows, S), self._pads[0], np.int64), np.zeros((bucket.rows, S), np.bool_)
        inputs, targets = (np.full((bucket.rows, T), self._pads[1], np.int64) for _ in range(2))
        real = np.zeros((bucket.rows, T), np.bool_)
        for b, (one, other) in enumerate(pairs):
            seen = np.concatenate([one, self._source_end])[: self._max[0]]
            source[b, : len(seen)], source_real[b, : len(seen)] = seen, True
            said = np.concatenate([self._begin, other, self._end])[: self._max[1] + 1]
            count = len(said) - 1
            inputs[b, :count], targets[b, :count], real[b, :count] = said[:-1], said[1:], True
        masks = {"source_padding_mask": source_real, "target_padding_mask": real}
        return Batch({"source": source, "target": inputs, **masks}, targets, real)

    def _joined(self, pairs: list[tuple[Ids, Ids]], bucket: _Bucket) -> Batch:
        shape = (bucket.rows, bucket.shape[1])
        tokens, targets = (np.full(shape, self._pads[1], np.int64) for _ in range(2))
        real = np.zeros(shape, np.bool_)
        for b, (one, other) in enumerate(pairs):
            seen = np.concatenate([self._begin, one[: self._max[0]], self._separator])
            said = np.concatenate([seen, np.concatenate([other, self._end])[: self._max[1]]])
            count = len(said) - 1
            tokens[b, :count], targets[b, :count] = said[:-1], said[1:]
            real[b, len(seen) - 1 : count] = True
        return Batch({"tokens": tokens}, targets, real)

    def _examples(self, problems: Problems, notes: list[str], long: Long) -> tuple[Ids, Ids]:
        """The pairs that are used ``[n]``, and the places that each takes ``[n, 2]``: source, target."""
        source, target = self._pairs.lengths()
        source, target = source + len(self._source_end), target + len(self._end)
        fits = settle_long(problems, notes, "sources", source, self._max[0], long)
        fits = fits & settle_long(problems, notes, "targets", target, self._max[1], long)
        examples = np.flatnonzero(fits)
        told = "".join(f"; {note}" for note in notes)
        problems.expect(len(examples) > 0, f"pairs: expected at least one that is used, got none{told}")
        taken = np.stack([np.minimum(source, self._max[0]), np.minimum(target, self._max[1])], axis=1)[examples]
        if self._decoder:
            taken[:, 1] += taken[:, 0] + len(self._begin)
            taken[:, 0] = 0
        return examples, taken


@dataclass(frozen=True)
class _Bucket:
    """Examples ``[n]`` (indices of pairs) whose batches have this many rows and this shape of (source, target)."""

    examples: Ids
    shape: tuple[int, int]
    rows: int
    order: Order

    @property
    def num_batches(self) -> int:
        return -(-len(self.examples) // self.rows)


def _ids(value: int | None) -> Ids:
    return np.array([] if value is None else [value], np.int64)
