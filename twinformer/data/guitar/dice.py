"""Random choices that stay the same: from raw words of Philox, whose stream NumPy promises to keep.

NumPy's ``Generator`` methods may draw differently in a later version; a data set must not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from twinformer.initializers import stream

T = TypeVar("T")


class Dice:
    """Draws that are a function of (seed, path) and of how many were made before."""

    def __init__(self, seed: int, path: str) -> None:
        self._bits = stream(seed, path).bit_generator

    def below(self, n: int) -> int:
        """A whole number from 0 to n - 1, n >= 1. (The remainder's bias is below n / 2⁶⁴.)"""
        return int(self._bits.random_raw()) % n

    def choice(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def permutation(self, n: int) -> npt.NDArray[np.int64]:
        """The numbers 0 to n - 1 in random order."""
        words = np.asarray(self._bits.random_raw(n), np.uint64)
        return np.argsort(words, kind="stable").astype(np.int64)
