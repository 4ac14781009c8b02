"""A piece read in several transpositions at once: the mean of what is said of each token in all of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from twinformer.data.guitar.tokens import moves

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def transpositions(ids: Ids, most: int, *, pad_id: int) -> tuple[Ids, Ids]:
    """``[M, T]`` a piece moved by −most … +most half-tones, and ``[M]`` how many tokens of each the vocabulary holds;
    padding follows.

    Nothing of a copy tells what comes later in the piece.
    """
    copies = np.array([moves(semitones)[ids] for semitones in range(-most, most + 1)])
    lost = np.logical_or.accumulate(copies < 0, 1)
    return np.where(lost, pad_id, copies), (~lost).sum(1)


def mixture(logs: Floats, reach: Ids, *, start: int = 0) -> Floats:
    """``[T]``: ln of the mean of the probabilities of the tokens from ``start + 1`` on, from ``[M, T]`` ln p in each
    transposition and ``reach``.

    A copy that cannot spell a token gives it no chance, and has no say in what comes after it.
    """
    places = np.arange(start, start + logs.shape[1])
    spelt = np.where(places + 1 < reach[:, None], logs, -np.inf)
    found: Floats = np.logaddexp.reduce(spelt, 0) - np.log((places < reach[:, None]).sum(0))
    return found
