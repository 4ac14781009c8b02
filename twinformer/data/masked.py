"""Masked language modelling (Devlin et al. 2019, section 3.1): some tokens are hidden, the model says what they were.

Which tokens, and what stands in their place, is drawn by Philox with (seed; epoch, piece, place), the generator of the
twins' dropout (Salmon et al. 2011): it depends on nothing else, not on the batch nor on the order of batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from twinformer.data.batch import Batch, Ids, Part
from twinformer.data.choices import Long, check_ids, check_option, settle_long
from twinformer.data.order import Order, Steps, is_whole
from twinformer.data.packing import pack
from twinformer.data.tokens import TokenFile
from twinformer.errors import InputError, Problems
from twinformer.initializers import stream

Words = npt.NDArray[np.uint64]

_WORD = np.uint64(0xFFFFFFFF)


class MaskedText:
    """A data set for ``EncoderModel`` with a head: rows of at most T places, packed from pieces of documents.

    A piece is ``begin_id`` (if given), tokens, ``end_id`` (if given). In each, ``rate`` of the tokens are chosen,
    rounded, and at least one; of the chosen, 80 % become ``mask_id``, 10 % a token drawn evenly, 10 % stay. Tokens of
    ``special_ids`` (and begin, end, mask) are neither chosen nor drawn; a piece of nothing else has no target.

    Inputs are ``tokens [B, T]`` and ``segments [B, T]``, a number for each piece of a row; with ``share=False`` a row
    has one piece, and ``padding_mask [B, T]`` comes in place of segments. Targets are the tokens as they were; ``real``
    is True at the chosen. The last batch of an epoch is filled up with rows of padding.
    """

    def __init__(
        self,
        tokens: TokenFile,
        *,
        length: int,
        batch_size: int,
        mask_id: int,
        begin_id: int | None = None,
        end_id: int | None = None,
        pad_id: int = 0,
        special_ids: Sequence[int] = (),
        rate: float = 0.15,
        share: bool = True,
        long: Long = "cut",
        seed: int = 0,
        shuffle: bool = True,
        name: str = "training",
    ) -> None:
        problems = Problems("MaskedText", InputError)
        V = tokens.vocab_size
        problems.expect(
            len(tokens.vocabularies) == 1, f"tokens: expected a file of text, got one of pairs: {tokens.file}"
        )
        overhead = (begin_id is not None) + (end_id is not None)
        problems.expect(
            is_whole(length, overhead + 1), f"length: expected a whole number from {overhead + 1}, got {length!r}"
        )
        problems.expect(0 < rate <= 1, f"rate: expected a number in (0, 1], got {rate!r}")
        check_option(problems, "long", Long, long)
        check_ids(problems, V, mask_id=mask_id, begin_id=begin_id, end_id=end_id, pad_id=pad_id)
        check_ids(problems, V, **{f"special_ids[{i}]": value for i, value in enumerate(special_ids)})
        problems.raise_if_any()
        notes = list(tokens.notes)
        units = tokens.lengths()
        units = np.where(settle_long(problems, notes, "documents", units, length - overhead, long), units, 0)
        problems.expect(bool(units.any()), f"tokens: expected a document with a token, got none in {tokens.file}")
        ordinary = np.ones(V, np.bool_)
        ordinary[[i for i in (*special_ids, mask_id, begin_id, end_id) if i is not None]] = False
        problems.expect(bool(ordinary.any()), f"special_ids: expected an ordinary token among {V}, got none")
        problems.raise_if_any()
        self.length = length
        self.vocab_size = V
        self._tokens = tokens
        self._packing = pack(units, length, overhead=overhead, share=share)
        self.part = Part(name, self._packing.num_rows, tuple(notes))
        self._ordinary = ordinary
        self._drawn = np.flatnonzero(ordinary)
        self._mask_id, self._pad_id = mask_id, pad_id
        self._begin = [] if begin_id is None else [begin_id]
        self._end = [] if end_id is None else [end_id]
        self._rate = rate
        self._share = share
        self._batch_size = batch_size
        self._steps = Steps(Order(self._packing.num_rows, seed, shuffle=shuffle), batch_size)
        self._key = stream(seed, "masked").bit_generator.random_raw(2) & _WORD

    @property
    def steps_per_epoch(self) -> int:
        return self._steps.per_epoch

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0 over all epochs."""
        epoch, rows = self._steps.examples(step)
        shape = (self._batch_size, self.length)
        targets = np.full(shape, self._pad_id, np.int64)
        segments, pieces, places = (np.zeros(shape, np.int64) for _ in range(3))
        for b, row in enumerate(rows):
            start = 0
            for number, piece in enumerate(range(self._packing.rows[row], self._packing.rows[row + 1]), 1):
                ids = self._piece(piece)
                end = start + len(ids)
                targets[b, start:end] = ids
                segments[b, start:end] = number
                pieces[b, start:end] = piece
                places[b, start:end] = np.arange(len(ids))
                start = end
        may = (segments > 0) & self._ordinary[targets]
        chosen = np.zeros(shape, np.bool_)
        tokens = targets.copy()
        chosen[may], tokens[may] = self._masked(targets[may], epoch, pieces[may], places[may])
        seen = {"segments": segments} if self._share else {"padding_mask": segments > 0}
        return Batch({"tokens": tokens, **seen}, targets, chosen)

    def _piece(self, piece: int) -> Ids:
        packing = self._packing
        first = int(self._tokens.offsets[packing.documents[piece]]) + int(packing.begins[piece])
        ids = self._tokens.slice(first, first + int(packing.counts[piece]))
        return np.concatenate([np.array(self._begin, np.int64), ids, np.array(self._end, np.int64)])

    def _masked(self, ids: Ids, epoch: int, pieces: Ids, places: Ids) -> tuple[npt.NDArray[np.bool_], Ids]:
        """Which of the ordinary tokens ``[n]``, each of a piece and a place in it, are chosen, and what they become."""
        first, second, third, _ = philox(
            (places, pieces & int(_WORD), pieces >> 32, np.full_like(places, epoch)), self._key
        )
        # rank of each token in its piece, by its first word: the lowest are chosen
        order = np.lexsort((places, first, pieces))
        _, where, counts = np.unique(pieces[order], return_index=True, return_counts=True)
        ranks = np.empty_like(places)
        ranks[order] = np.arange(len(ids)) - np.repeat(where, counts)
        wanted = np.maximum(np.rint(counts * self._rate), 1)
        chosen = np.empty(len(ids), np.bool_)
        chosen[order] = ranks[order] < np.repeat(wanted, counts)
        share = second / 2**32
        drawn = self._drawn[third * np.uint64(len(self._drawn)) >> np.uint64(32)]
        replaced = np.where(share < 0.8, self._mask_id, np.where(share < 0.9, drawn, ids))
        return chosen, np.where(chosen, replaced, ids)


def philox(counter: tuple[Ids, Ids, Ids, Ids], key: Words) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10 of counters of four 32-bit words, each ``[n]``, under a key of two: four words each."""
    c0, c1, c2, c3 = (np.asarray(word).astype(np.uint64) for word in counter)
    k0, k1 = int(key[0]), int(key[1])
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & _WORD,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & int(_WORD), (k1 + 0xBB67AE85) & int(_WORD)
    return c0, c1, c2, c3
