"""Logits that tell definitions apart: equal ones, hidden ones, masses that are exactly p, and some drawn at random.

Where probabilities have to be exact, all logits that count are equal: ``exp(0)`` is 1, and sixteenths add up without
rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from twinformer.decoding import SamplingConfig
from twinformer.initializers import stream
from twinformer.parity.compare import FloatArray

V = 16
_HIDDEN = -np.inf


@dataclass(frozen=True)
class Table:
    """Rows of logits ``[R, V]`` and which tokens were seen."""

    name: str
    logits: FloatArray
    seen: npt.NDArray[np.bool_]


def _table(name: str, rows: list[FloatArray]) -> Table:
    seen = np.zeros((len(rows), V), np.bool_)
    seen[:, ::3] = True
    return Table(name, np.stack(rows).astype(np.float64), seen)


def _only(ids: npt.ArrayLike, value: float = 0.0) -> FloatArray:
    row = np.full(V, _HIDDEN)
    row[np.asarray(ids)] = value
    return row


_RANDOM = stream(0, "sampling tables")
# all of one shape, so that each program is compiled once
TABLES = (
    _table(
        "equal",
        [
            np.zeros(V),  # sixteenths
            _only(np.arange(1, V, 2), -3.5),  # eighths, the first id hidden
            _only([2, 3, 8, 15], 7.0),  # quarters
            _only([5, 11]),
            _only([9], -700.0),
            np.repeat([2.0, 1.0, 2.0, 0.0], 4),  # ties at every level
            np.repeat([-1.0, 0.0, 1.0, -1.0], 4),  # of both signs, and zero
            np.concatenate(([1.0], np.full(V - 1, 1.0 + 2.0**-40))),  # the lowest id comes last
        ],
    ),
    _table("random", list(_RANDOM.standard_normal((8, V)) * np.array([0.1, 0.5, 1, 2, 3, 5, 10, 40])[:, None])),
    _table(
        "hidden at random",
        list(np.where(_RANDOM.random((8, V)) < 0.4, _HIDDEN, _RANDOM.standard_normal((8, V)) * 3 - 5)),
    ),
)
# rows from which nothing can be chosen, and between them two from which something can
HOPELESS = np.stack(
    [
        np.full(V, _HIDDEN),
        np.where(np.arange(V) == 3, np.nan, 1.0),
        _only([0]),
        np.where(np.arange(V) == 3, np.inf, 1.0),
        np.where(np.arange(V) % 5 == 2, np.inf, 1.0),  # more than one
        np.zeros(V),
        np.where(np.arange(V) % 2 == 1, np.inf, _HIDDEN),
        np.where(np.arange(V) == 3, np.inf, np.where(np.arange(V) == 9, np.nan, 1.0)),
    ]
)

# more tokens than a search for the likeliest few looks: rows of which few are enough beside rows that need nearly all
WIDE_V = 1500
WIDE = _RANDOM.standard_normal((5, WIDE_V)) * np.array([0.01, 30, 0.3, 3, 0.01])[:, None]
WIDE_CHAINS = (
    ("TopP", SamplingConfig(top_p=0.9)),
    ("TopK", SamplingConfig(top_k=1100)),
    ("MinP", SamplingConfig(min_p=0.5)),
    ("processors", SamplingConfig(temperature=3.0, top_k=1400, top_p=0.95)),
)

# boundaries: k sixteenths exactly, and one step of 2^-24 before; both ends
UNIFORMS = np.array(
    [k / 16 for k in range(16)] + [k / 16 - 2.0**-24 for k in range(1, 17)] + [0.3, 0.7, 1 / 3], np.float32
)
SEEDS, ROWS, STEPS = (0, 2**40 + 7, 2**64 - 1), np.array([0, 1, 7, 2**31 + 5]), (0, 1, 2, 31, 32, 1000)

# place (what is named where it differs) and configurations
CHAINS: dict[str, tuple[SamplingConfig, ...]] = {
    "RepetitionPenalty": (SamplingConfig(repetition_penalty=1.7), SamplingConfig(repetition_penalty=0.6)),
    "Temperature": (SamplingConfig(temperature=0.3), SamplingConfig(temperature=4.0)),
    "TopK": tuple(SamplingConfig(top_k=k) for k in (1, 3, 8, 40)),
    "TopP": tuple(SamplingConfig(top_p=p) for p in (2.0**-4, 0.25, 0.5, 0.5 + 2.0**-30, 0.75, 0.9, 1.0)),
    "MinP": tuple(SamplingConfig(min_p=p) for p in (0.0, 0.05, 0.5, 1.0)),
    "processors": (
        SamplingConfig(top_k=5, top_p=0.6),
        SamplingConfig(temperature=2.5, top_p=0.7, min_p=0.3),
        SamplingConfig(repetition_penalty=1.4, temperature=0.7, top_k=9, top_p=0.8, min_p=0.1),
    ),
}
