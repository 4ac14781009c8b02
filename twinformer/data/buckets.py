"""Buckets: examples of like length padded to one shape, so that few programs are compiled and little is padding."""

from __future__ import annotations

import numpy as np

from twinformer.data.batch import Ids


def bucket_edges(lengths: Ids, num_buckets: int, multiple: int) -> list[int]:
    """At most ``num_buckets`` lengths, multiples of ``multiple``, in order, the last for the longest: those for which
    padding each of ``lengths [n]`` to the next edge takes the fewest places. Exact, by dynamic programming."""
    rounded = -(-np.maximum(lengths, 1) // multiple)
    levels = np.flatnonzero(np.bincount(rounded))
    counts = np.bincount(rounded)[levels]
    total = np.concatenate([[0], np.cumsum(counts)])
    # cost[j]: places that the examples of the first j levels take in k buckets; came[k]: where the last of these begins
    cost = np.where(np.arange(len(levels) + 1) == 0, 0.0, np.inf)
    came: list[Ids] = []
    for _ in range(min(num_buckets, len(levels))):
        # from i to j: a bucket of the levels i … j - 1, padded to the last of them
        table = cost[:, None] + (total[None, 1:] - total[:, None]) * levels[None, :]
        table[np.arange(len(levels) + 1)[:, None] > np.arange(len(levels))[None, :]] = np.inf
        came.append(table.argmin(axis=0))
        cost = np.concatenate([[np.inf], table.min(axis=0)])
    edges, j = [], len(levels)
    for begins in reversed(came):
        edges.append(int(levels[j - 1]) * multiple)
        j = int(begins[j - 1])
    return edges[::-1]


def buckets(taken: Ids, num_buckets: int, multiple: int, room: tuple[int, int]) -> list[tuple[Ids, tuple[int, int]]]:
    """The examples of each bucket and its shape ``(S, T)``, from the places ``taken [n, 2]`` by source and target.

    The longer of both decides on the bucket. A shape is the bucket's longest source and longest target, each rounded
    up to ``multiple``, but no more than ``room``.
    """
    longest = taken.max(axis=1)
    numbers = np.searchsorted(bucket_edges(longest, num_buckets, multiple), longest)
    found = []
    for b in range(int(numbers.max()) + 1):
        inside = np.flatnonzero(numbers == b)
        S, T = (
            min(int(-(-max(1, n) // multiple) * multiple), most)
            for n, most in zip(taken[inside].max(axis=0), room, strict=True)
        )
        found.append((inside, (S, T)))
    return found
