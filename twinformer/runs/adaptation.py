"""Dynamic evaluation: a decoder learns from a piece while it predicts it.

Every token is predicted by a model that has seen only what stands before it: ``stride`` tokens are scored, then the
model takes one step on the window that ends with them. Each piece begins with the weights as they were (Krause et al.
2018, arXiv:1709.07432). The model reads the piece in several transpositions at once, learns from all of them, and what
it says of a token is the mean of the probabilities that it gives in each.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from twinformer.data.batch import Batch
from twinformer.data.guitar.tokens import room, transpose
from twinformer.errors import InputError, Problems
from twinformer.learning import OptimizerConfig, ScheduleConfig, Trainer, TrainingConfig

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# windows are padded to one of so many lengths, for each of which Flax compiles
_LENGTHS = 4


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """How a model adapts: tokens from one step to the next, AdamW's rate and its mean of squares, and the
    transpositions, from ``-transposition`` to ``+transposition`` half-tones.
    """

    stride: int = 32
    learning_rate: float = 2e-4
    beta2: float = 0.98
    transposition: int = 4

    def __post_init__(self) -> None:
        problems = Problems(type(self).__name__, InputError)
        for name, least in (("stride", 1), ("transposition", 0)):
            value = getattr(self, name)
            problems.expect(
                isinstance(value, int) and value >= least,
                f"{name}: expected a whole number from {least}, got {value!r}",
            )
        problems.raise_if_any()
        self.training()  # which judges the others

    def training(self) -> TrainingConfig:
        """AdamW without momentum, decay and clipping at a constant rate; no dropout."""
        return TrainingConfig(
            optimizer=OptimizerConfig(beta1=0.0, beta2=self.beta2, weight_decay=0.0, clip_norm=None),
            schedule=ScheduleConfig(name="constant", peak=self.learning_rate),
            dropout=False,
        )


def log_probabilities(
    trainer: Trainer,
    weights: Mapping[str, Any],
    ids: Ids,
    adaptation: Adaptation,
    *,
    context_length: int,
    pad_id: int,
) -> Floats:
    """``[n - 1]``: ln p of each token of a piece but the first. ``trainer``: one of ``adaptation.training()``."""
    moves = range(-adaptation.transposition, adaptation.transposition + 1)
    copies, reach = _copies(ids, moves, pad_id)
    n = len(ids) - 1
    found = np.empty(n)
    state = trainer.init(weights)
    for start in range(0, n, adaptation.stride):
        end = min(start + adaptation.stride, n)
        begin = max(0, end - context_length)
        window = _window(copies[:, begin : end + 1], reach - begin, context_length, pad_id)
        logs = np.asarray(trainer.log_probabilities(state, window), np.float64)[:, start - begin : end - begin]
        places = np.arange(start, end)
        # a copy that cannot spell a token gives it no chance, and has no say in what comes after it
        logs = np.where(places + 1 < reach[:, None], logs, -np.inf)
        found[start:end] = np.logaddexp.reduce(logs, 0) - np.log((places < reach[:, None]).sum(0))
        if end < n:
            state, _ = trainer.step(state, [window])
    return found


def adapted_total(
    trainer: Trainer,
    weights: Mapping[str, Any],
    pieces: Sequence[Ids],
    adaptation: Adaptation,
    *,
    context_length: int,
    pad_id: int,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[float, int]:
    """Nats over all predicted tokens of the pieces, and their number; ``tell`` hears how many pieces are done."""
    nats, count = 0.0, 0
    for number, ids in enumerate(pieces):
        tell(number, len(pieces))
        logs = log_probabilities(trainer, weights, ids, adaptation, context_length=context_length, pad_id=pad_id)
        nats, count = nats - float(logs.sum()), count + len(logs)
    return nats, count


def _copies(ids: Ids, moves: Sequence[int], pad_id: int) -> tuple[Ids, Ids]:
    """``[moves, n]`` a piece in each transposition, and how many tokens of each the vocabulary holds; padding follows.

    Nothing of a copy tells what comes later in the piece.
    """
    copies = np.full((len(moves), len(ids)), pad_id, np.int64)
    reach = np.zeros(len(moves), np.int64)
    for row, move in enumerate(moves):
        lost = bisect.bisect_left(range(len(ids) + 1), True, key=lambda n: move not in room(ids[:n], abs(move)))
        reach[row] = lost - 1
        copies[row, : lost - 1] = transpose(ids[: lost - 1], move)
    return copies, reach


def _window(copies: Ids, reach: Ids, context_length: int, pad_id: int) -> Batch:
    """Tokens and the next ones of all copies, padded in both directions; all that are there count."""
    unit = max(1, context_length // _LENGTHS)
    n = copies.shape[1] - 1
    length = min(-(-n // unit) * unit, context_length)
    tokens, targets = (np.full((len(copies), length), pad_id, np.int64) for _ in range(2))
    tokens[:, :n], targets[:, :n] = copies[:, :-1], copies[:, 1:]
    places = np.arange(length)
    is_token, is_target = (places + ahead < np.minimum(reach[:, None], n + ahead) for ahead in (0, 1))
    return Batch({"tokens": tokens, "padding_mask": is_token}, targets, is_target)
