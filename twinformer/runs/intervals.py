"""95 % intervals of shares and means."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_Z = 1.959963984540054  # of the normal distribution, 97.5 %
_DRAWS = 2000

Interval = tuple[float, float]


def wilson(right: int, count: int) -> Interval:
    """Of a share, where every case is one by itself (Wilson 1927)."""
    if count == 0:
        return (0.0, 1.0)
    share, extra = right / count, _Z**2 / count
    middle = (share + extra / 2) / (1 + extra)
    half = _Z / (1 + extra) * math.sqrt(share * (1 - share) / count + extra / (4 * count))
    return (max(0.0, middle - half), min(1.0, middle + half))


def clustered(values: npt.ArrayLike, sizes: npt.ArrayLike) -> Interval:
    """Of ``Σ values / Σ sizes`` where cases come in groups that are alike inside: whole groups are drawn anew, with
    replacement, 2,000 times (bootstrap, Efron 1979; percentiles). The draws are the same in every call.
    """
    tops, counts = np.asarray(values, np.float64), np.asarray(sizes, np.float64)
    rng = np.random.Generator(np.random.Philox(0))
    chosen = rng.integers(len(tops), size=(_DRAWS, len(tops)))
    shares = tops[chosen].sum(1) / counts[chosen].sum(1)
    low, high = np.quantile(shares, [0.025, 0.975])
    return (float(low), float(high))
