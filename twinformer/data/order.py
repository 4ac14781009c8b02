"""The order of examples: a shuffle that is a function of (seed, epoch, place), so that any step can be asked for alone.

Nothing is kept for each example, whatever their number: a place is sent through the rounds of a *swap-or-not* shuffle
(Hoang, Morris & Rogaway, "An enciphering scheme based on a card shuffle", CRYPTO 2012), which is a permutation of
``0 … size - 1`` for every size. Round r pairs each x with ``K_r - x (mod size)``, and a pair is exchanged or not by a
bit drawn for the two together; so an element that does not know the others still finds its place. Only whole-number
arithmetic is used: the order is the same on every machine, with every version of NumPy.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from twinformer.data.batch import Ids
from twinformer.errors import InputError, Problems
from twinformer.initializers import stream

Words = npt.NDArray[np.uint64]

#: an element has stayed where it was through r rounds with a probability of 2^-r
_ROUNDS = 64

#: places that are worked out together and kept for the next steps
_BLOCK = 1024


class Order:
    """A permutation of ``0 … size - 1`` for each epoch. ``shuffle=False``: the order as it is, in each epoch.

    ``name`` sets apart orders that are drawn under the same seed.
    """

    def __init__(self, size: int, seed: int, *, name: str = "examples", shuffle: bool = True) -> None:
        problems = Problems("Order", InputError)
        problems.expect(is_whole(size, 1) and size < 2**62, f"size: expected a whole number from 1, got {size!r}")
        problems.expect(is_whole(seed, 0), f"seed: expected a whole number from 0, got {seed!r}")
        problems.raise_if_any()
        self.size = size
        self._seed = seed
        self._name = name
        self._shuffle = shuffle

    def at(self, epoch: int, places: npt.ArrayLike) -> Ids:
        """The examples at these places ``[n]`` of an epoch. Raises InputError for places that it has not."""
        wanted = np.asarray(places)
        problems = Problems("Order.at", InputError)
        problems.expect(is_whole(epoch, 0), f"epoch: expected a whole number from 0, got {epoch!r}")
        if problems.expect(
            wanted.ndim == 1 and (wanted.dtype.kind in "iu" or wanted.size == 0),
            f"places: expected whole numbers [n], got {wanted.dtype} {wanted.shape}",
        ):
            lowest, highest = (int(wanted.min()), int(wanted.max())) if wanted.size else (0, 0)
            problems.expect(
                lowest >= 0 and highest < self.size,
                f"places: expected places from 0 to {self.size - 1}, got {lowest} to {highest}",
            )
        problems.raise_if_any()
        wanted = wanted.astype(np.int64)
        if not self._shuffle:
            return wanted
        found = np.empty_like(wanted)
        blocks = wanted // _BLOCK
        for block in dict.fromkeys(blocks.tolist()):
            inside = blocks == block
            found[inside] = _block(self._seed, self._name, epoch, self.size, block)[wanted[inside] - block * _BLOCK]
        return found


class Steps:
    """Which examples a step takes: ``batch_size`` of each epoch's order, fewer in its last step; nothing left out."""

    def __init__(self, order: Order, batch_size: int) -> None:
        if not is_whole(batch_size, 1):
            raise InputError("Steps", [f"batch_size: expected a whole number from 1, got {batch_size!r}"])
        self._order = order
        self._batch_size = batch_size

    @property
    def per_epoch(self) -> int:
        return -(-self._order.size // self._batch_size)

    def examples(self, step: int) -> tuple[int, Ids]:
        """The epoch of a step, counted from 0 over all epochs, and its examples."""
        epoch, place = epoch_and_place(step, self.per_epoch)
        first = place * self._batch_size
        return epoch, self._order.at(epoch, np.arange(first, min(first + self._batch_size, self._order.size)))


def epoch_and_place(step: int, steps_per_epoch: int) -> tuple[int, int]:
    """The epoch of a step and its place there. Raises InputError for a step that is none."""
    if not is_whole(step, 0):
        raise InputError("batch", [f"step: expected a whole number from 0, got {step!r}"])
    return divmod(int(step), steps_per_epoch)


def mix(words: Words) -> Words:
    """A permutation of the 64-bit words that looks like chance (Steele et al., "Fast splittable pseudorandom number
    generators", OOPSLA 2014: the finalizer of SplitMix64 in Stafford's variant 13)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Words = words ^ (words >> np.uint64(31))
    return mixed


def is_whole(value: Any, least: int) -> bool:
    """Whether a value is a whole number from ``least``, of Python's or NumPy's."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) >= least


@functools.lru_cache(maxsize=64)
def _block(seed: int, name: str, epoch: int, size: int, block: int) -> Ids:
    """The examples at the places from ``block · _BLOCK`` on."""
    x = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, size), dtype=np.uint64)
    offsets, keys = _rounds(seed, name, epoch, size)
    n = np.uint64(size)
    for offset, key in zip(offsets, keys, strict=True):
        partner = offset + (n - x)
        partner = np.where(partner >= n, partner - n, partner)
        swapped = mix(np.maximum(x, partner) ^ key) >> np.uint64(63) == 1
        x = np.where(swapped, partner, x)
    return x.astype(np.int64)


def _rounds(seed: int, name: str, epoch: int, size: int) -> tuple[Words, Words]:
    """The offset and the key of each round. Raw words, since NumPy keeps those the same from version to version."""
    words = stream(seed, f"order/{name}/{epoch}").bit_generator.random_raw(2 * _ROUNDS)
    return words[:_ROUNDS] % np.uint64(size), words[_ROUNDS:]
