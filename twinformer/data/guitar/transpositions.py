"""A piece read in several transpositions at once: the mean of what is said of each token in all of them."""

from __future__ import annotations

import bisect

import numpy as np
import numpy.typing as npt

from twinformer.data.guitar.tokens import room, transpose

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def transpositions(ids: Ids, most: int, *, pad_id: int) -> tuple[Ids, Ids]:
    """``[M, T]`` a piece moved by −most … +most half-tones, and ``[M]`` how many tokens of each the vocabulary holds;
    padding follows.

    Nothing of a copy tells what comes later in the piece.
    """
    moves = range(-most, most + 1)
    copies = np.full((len(moves), len(ids)), pad_id, np.int64)
    reach = np.zeros(len(moves), np.int64)
    for row, move in enumerate(moves):
        lost = bisect.bisect_left(range(len(ids) + 1), True, key=lambda n: move not in room(ids[:n], abs(move)))
        reach[row] = lost - 1
        copies[row, : lost - 1] = transpose(ids[: lost - 1], move)
    return copies, reach


def mixture(logs: Floats, reach: Ids, *, start: int = 0) -> Floats:
    """``[T]``: ln of the mean of the probabilities of the tokens from ``start + 1`` on, from ``[M, T]`` ln p in each
    transposition and ``reach``.

    A copy that cannot spell a token gives it no chance, and has no say in what comes after it.
    """
    places = np.arange(start, start + logs.shape[1])
    spelt = np.where(places + 1 < reach[:, None], logs, -np.inf)
    found: Floats = np.logaddexp.reduce(spelt, 0) - np.log((places < reach[:, None]).sum(0))
    return found
