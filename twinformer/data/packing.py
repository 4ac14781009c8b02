"""Rows of at most T places made of pieces of documents, so that little is padding.

A document that does not fit into a row is cut into pieces that do. What is shorter than a row shares one with others:
best fit in decreasing order of length, done on the histogram of lengths (Krell et al. 2021, "Efficient sequence packing
without cross-contamination", arXiv:2107.02027), so that the work does not depend on how many documents there are.
Pure functions of the lengths. About 40 bytes a piece are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from twinformer.data.batch import Ids


@dataclass(frozen=True)
class Packing:
    """R rows of P pieces. Row r has the pieces ``rows[r] … rows[r + 1] - 1``, ``rows [R + 1]``.

    Piece p is ``counts[p]`` units of document ``documents[p]``, from unit ``begins[p]`` on, all ``[P]``.
    """

    rows: Ids
    documents: Ids
    begins: Ids
    counts: Ids

    @property
    def num_rows(self) -> int:
        return len(self.rows) - 1


def pack(units: Ids, width: int, *, overhead: int = 0, share: bool = True) -> Packing:
    """Pieces of documents of ``units [M]`` units in rows of ``width`` places; a piece takes ``overhead`` places more
    than it has units. Each unit is in exactly one piece; a document without units has none. ``share=False``: one piece
    in each row.
    """
    most = width - overhead
    documents, begins, counts = _cut(units, most)
    if not share:
        return Packing(np.arange(len(documents) + 1), documents, begins, counts)
    rows, order = _best_fit(counts + overhead, width)
    return Packing(rows, documents[order], begins[order], counts[order])


def _cut(units: Ids, most: int) -> tuple[Ids, Ids, Ids]:
    """Pieces of at most ``most`` units, in the order of documents: document, first unit, number of units."""
    pieces = -(-units // most)
    documents = np.repeat(np.arange(len(units)), pieces)
    first = np.cumsum(pieces) - pieces
    begins = (np.arange(len(documents)) - first[documents]) * most
    return documents, begins, np.minimum(units[documents] - begins, most)


def _best_fit(sizes: Ids, width: int) -> tuple[Ids, Ids]:
    """Pieces ``[P]`` of 1 … width places: the pieces in the order of their rows, and where rows begin in it."""
    # rows of the same make-up are told together: how many there are, and (size, how often) of what is in them
    open_: list[list[tuple[int, tuple[tuple[int, int], ...]]]] = [[] for _ in range(width + 1)]
    spaces = 0  # bit s is set where rows with s places left are open
    histogram = np.bincount(sizes, minlength=width + 1)
    for size in range(width, 0, -1):
        left = int(histogram[size])
        while left:
            fitting = spaces >> size
            if fitting:
                space = size + (fitting & -fitting).bit_length() - 1
                rows, makeup = open_[space].pop()
                times = min(space // size, left)
                used = min(rows, left // times)
                if used < rows:
                    open_[space].append((rows - used, makeup))
            else:
                space, makeup = width, ()
                times = min(width // size, left)
                used = left // times
            if space < width and not open_[space]:
                spaces &= ~(1 << space)
            left -= used * times
            rest = space - times * size
            open_[rest].append((used, (*makeup, (size, times))))
            spaces |= 1 << rest
    return _rows([entry for entries in open_ for entry in entries], sizes, width)


def _rows(makeups: list[tuple[int, tuple[tuple[int, int], ...]]], sizes: Ids, width: int) -> tuple[Ids, Ids]:
    """Rows of these make-ups, each filled with the next pieces of the sizes that it calls for."""
    by_size = np.argsort(sizes, kind="stable")
    next_ = np.concatenate([[0], np.cumsum(np.bincount(sizes, minlength=width + 1))])
    orders, lengths = [np.zeros(0, np.int64)], [np.zeros(1, np.int64)]
    for rows, makeup in makeups:
        columns = []
        for size, times in makeup:
            taken = by_size[next_[size] : next_[size] + rows * times]
            columns.append(taken.reshape(rows, times))
            next_[size] += rows * times
        orders.append(np.concatenate(columns, axis=1).ravel())
        lengths.append(np.full(rows, sum(times for _, times in makeup)))
    return np.cumsum(np.concatenate(lengths)), np.concatenate(orders)
