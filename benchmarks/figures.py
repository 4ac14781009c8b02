"""From raw samples to ratios, intervals and verdicts.

Rounds are paired blocks: in each, every system is visited once, in random order. The estimate is the geometric mean of
the rounds' ratios of per-visit medians; its interval comes from a hierarchical bootstrap (rounds, then samples within
each visit). Nothing is dropped: outliers are counted and kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Verdict = Literal["faster", "slower", "same", "cannot tell"]
Samples = Sequence[Sequence[float]]  # by round, then by sample

#: two systems within this of each other count as equally fast
BAND = 0.03
RESAMPLES = 10_000


@dataclass(frozen=True)
class Ratio:
    """Time of one system over that of another: below 1 is faster. ``p`` is that of a ratio of 1, two-sided."""

    value: float
    low: float
    high: float
    p: float

    @property
    def half_width(self) -> float:
        """Half of the interval, as a share of the estimate."""
        return (self.high - self.low) / 2 / self.value


def ratio(one: Samples, other: Samples, *, level: float = 0.95, seed: int = 0) -> Ratio:
    """The time of ``one`` over that of ``other``, round by round."""
    value = float(np.exp(np.mean(_log_ratios(one, other))))
    drawn = np.exp(_bootstrap(one, other, np.random.default_rng(seed)))
    tail = (1 - level) / 2
    low, high = (float(x) for x in np.quantile(drawn, [tail, 1 - tail]))
    # two-sided, and never 0: RESAMPLES draws cannot show less than one of them
    p = 2 * min(float(np.mean(drawn <= 1)), float(np.mean(drawn >= 1)))
    return Ratio(value, low, high, min(1.0, max(p, 2 / RESAMPLES)))


def verdict(found: Ratio, *, band: float = BAND, is_significant: bool = True) -> Verdict:
    """``faster`` or ``slower``: beyond the band with the whole interval beyond 1; ``same``: the whole interval within
    the band. ``is_significant``: what is left of the ratio's p after Holm's correction over the table."""
    if 1 / (1 + band) <= found.low and found.high <= 1 + band:
        return "same"
    if is_significant and found.high < 1 and found.value < 1 / (1 + band):
        return "faster"
    if is_significant and found.low > 1 and found.value > 1 + band:
        return "slower"
    return "cannot tell"


def holm(p: Mapping[str, float], *, alpha: float = 0.05) -> dict[str, bool]:
    """Which of several p values hold together (Holm 1979)."""
    order = sorted(p, key=lambda name: p[name])
    kept: dict[str, bool] = {}
    goes_on = True
    for i, name in enumerate(order):
        goes_on = goes_on and p[name] <= alpha / (len(order) - i)
        kept[name] = goes_on
    return {name: kept[name] for name in p}


def median(samples: Samples) -> float:
    """Of the medians of the visits."""
    return float(np.median([np.median(visit) for visit in samples]))


def outliers(samples: Samples) -> int:
    """Samples beyond Tukey's fences (1.5 interquartile ranges) of all of them."""
    flat = np.concatenate([np.asarray(visit) for visit in samples])
    low, high = np.quantile(flat, [0.25, 0.75])
    reach = 1.5 * (high - low)
    return int(((flat < low - reach) | (flat > high + reach)).sum())


def _log_ratios(one: Samples, other: Samples) -> npt.NDArray[np.float64]:
    return np.array(
        [np.log(np.median(mine) / np.median(theirs)) for mine, theirs in zip(one, other, strict=True)], np.float64
    )


def _bootstrap(one: Samples, other: Samples, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Means of log ratios under resampled rounds and, within them, resampled samples."""
    rounds = len(one)
    logs = np.empty((RESAMPLES, rounds))
    medians = []
    for visits in (one, other):
        # the medians of resampled visits, for each round
        table = np.empty((RESAMPLES, rounds))
        for r, visit in enumerate(visits):
            values = np.asarray(visit, np.float64)
            drawn = values[rng.integers(0, len(values), (RESAMPLES, len(values)))]
            table[:, r] = np.median(drawn, axis=1)
        medians.append(table)
    logs = np.log(medians[0] / medians[1])
    chosen = rng.integers(0, rounds, (RESAMPLES, rounds))
    found: npt.NDArray[np.float64] = np.take_along_axis(logs, chosen, axis=1).mean(axis=1)
    return found
