"""A decoder reads a piece in several transpositions at once, and may learn from it while it predicts it.

What it says of a token is the mean of the probabilities that it gives in each transposition. Dynamic evaluation (Krause
et al. 2018, arXiv:1709.07432): ``stride`` tokens are scored, then the model takes one step on the window that ends with
them, in all transpositions. Every token is predicted by a model that has seen only what stands before it, and each
piece begins with the weights as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from twinformer.data.batch import Batch
from twinformer.data.guitar.tokens import PITCHES
from twinformer.data.guitar.transpositions import mixture, transpositions
from twinformer.errors import InputError, Problems
from twinformer.learning import OptimizerConfig, ScheduleConfig, Trainer, TrainingConfig

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# windows are padded to one of so many lengths, for each of which Flax compiles
_LENGTHS = 4


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How pieces are read: tokens from one window to the next, and the transpositions, from ``-transposition`` to
    ``+transposition`` half-tones.
    """

    stride: int
    transposition: int = 4

    def __post_init__(self) -> None:
        problems = Problems(type(self).__name__, InputError)
        for name, least, most in (("stride", 1, None), ("transposition", 0, len(PITCHES) - 1)):
            value = getattr(self, name)
            fits = isinstance(value, int) and least <= value and (most is None or value <= most)
            upto = "" if most is None else f" to {most}"
            problems.expect(fits, f"{name}: expected a whole number from {least}{upto}, got {value!r}")
        problems.raise_if_any()

    def training(self) -> TrainingConfig:
        """Of the trainer that gives the probabilities."""
        return TrainingConfig(dropout=False)


@dataclass(frozen=True, kw_only=True)
class Adaptation(Reading):
    """A reading with a step of learning after each stride: AdamW's rate and its mean of squares."""

    stride: int = 32
    learning_rate: float = 2e-4
    beta2: float = 0.98

    def __post_init__(self) -> None:
        super().__post_init__()
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
    reading: Reading,
    *,
    context_length: int,
    pad_id: int,
) -> Floats:
    """``[n - 1]``: ln p of each token of a piece but the first. ``trainer``: one of ``reading.training()``.

    A token has ``context_length - reading.stride`` tokens before it where the piece has them. Raises InputError for a
    stride that is longer than the context.
    """
    if reading.stride > context_length:
        raise InputError("log_probabilities", [f"stride: expected 1 to {context_length}, got {reading.stride}"])
    copies, reach = transpositions(ids, reading.transposition, pad_id=pad_id)
    n = len(ids) - 1
    found = np.empty(n)
    state = trainer.init(weights)
    for start in range(0, n, reading.stride):
        end = min(start + reading.stride, n)
        begin = max(0, end - context_length)
        window = _window(copies[:, begin : end + 1], reach - begin, context_length, pad_id)
        logs = np.asarray(trainer.log_probabilities(state, window), np.float64)[:, start - begin : end - begin]
        found[start:end] = mixture(logs, reach, start=start)
        if end < n and isinstance(reading, Adaptation):
            state, _ = trainer.step(state, [window])
    return found


def read_total(
    trainer: Trainer,
    weights: Mapping[str, Any],
    pieces: Sequence[Ids],
    reading: Reading,
    *,
    context_length: int,
    pad_id: int,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[float, int]:
    """Nats over all predicted tokens of the pieces, and their number; ``tell`` hears how many pieces are done."""
    nats, count = 0.0, 0
    for number, ids in enumerate(pieces):
        tell(number, len(pieces))
        logs = log_probabilities(trainer, weights, ids, reading, context_length=context_length, pad_id=pad_id)
        nats, count = nats - float(logs.sum()), count + len(logs)
    return nats, count


def _window(copies: Ids, reach: Ids, context_length: int, pad_id: int) -> Batch:
    """Tokens and the next ones of all copies, padded in both directions; all that are there count.

    Padding comes last, where a causal model cannot see it.
    """
    unit = max(1, context_length // _LENGTHS)
    n = copies.shape[1] - 1
    length = min(-(-n // unit) * unit, context_length)
    tokens, targets = (np.full((len(copies), length), pad_id, np.int64) for _ in range(2))
    tokens[:, :n], targets[:, :n] = copies[:, :-1], copies[:, 1:]
    is_target = np.arange(length) + 1 < np.minimum(reach[:, None], n + 1)
    return Batch({"tokens": tokens}, targets, is_target)
