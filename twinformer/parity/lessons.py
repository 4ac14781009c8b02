"""Batches that a training run is judged on: every step another number of targets, padding everywhere, none by heart.

What stands where nothing counts is -100, an id that no table has: it must play no part.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from twinformer.config import ModelConfig
from twinformer.data.batch import Batch
from twinformer.initializers import stream
from twinformer.parity.case import Arrays

IGNORED = -100
ROWS, LENGTH = 3, 11
# share of the places that count, by step and micro-batch: many and few in turn, so that the norm of the gradient is on
# both sides of the clipping; a micro-batch without any target, a step without any, and a last step with one micro-batch
SHARES: tuple[tuple[float, ...], ...] = (
    (1.0, 0.5),
    (0.1, 0.1),
    (0.4, 0.9),
    (0.1, 0.0),
    (0.8, 0.2),
    (0.0, 0.0),
    (0.1, 0.2),
    (0.7, 0.7),
    (0.1, 0.1),
    (1.0, 0.3),
    (0.2, 0.1),
    (0.6,),
)
ACCUMULATION = max(map(len, SHARES))


def lessons(config: ModelConfig, shares: Sequence[Sequence[float]] = SHARES) -> list[list[Batch]]:
    """The micro-batches of every step."""
    return [
        [_batch(config, step, place, share) for place, share in enumerate(of_step)]
        for step, of_step in enumerate(shares)
    ]


def _batch(config: ModelConfig, step: int, place: int, share: float) -> Batch:
    """Language models predict the next token, encoders those that were covered up."""
    rng = stream(step, f"lessons/{place}")
    length = min(LENGTH, config.context_length)
    tokens = rng.integers(0, config.vocab_size, (ROWS, length + 1))
    real = _padded(length + 1, ROWS, first=step + place)
    inputs: Arrays
    if config.architecture == "encoder":
        tokens, real = tokens[:, :length], real[:, :length]
        counted = _some(real, share, rng)
        inputs = {"tokens": np.where(counted, 0, tokens), "padding_mask": real}
        if config.num_token_types:
            inputs["token_types"] = rng.integers(0, config.num_token_types, tokens.shape)
        targets = tokens
    else:
        counted = _some(real[:, :-1] & real[:, 1:], share, rng)
        targets = tokens[:, 1:]
        inputs = {"tokens": tokens[:, :-1], "padding_mask": real[:, :-1]}
        if config.architecture == "encoder-decoder":
            width = max(1, length - 2)
            inputs = {
                "source": rng.integers(0, config.source_vocab_size, (ROWS, width)),
                "source_padding_mask": _padded(width, ROWS, first=step + place + 1),
                "target": inputs["tokens"],
                "target_padding_mask": inputs["padding_mask"],
            }
    return Batch(inputs, np.where(counted, targets, IGNORED), counted)


def _padded(length: int, rows: int, *, first: int) -> npt.NDArray[np.bool_]:
    """Rows without padding, with it on the left and on the right, by turns."""
    real = np.ones((rows, length), np.bool_)
    pad = max(1, length // 4)
    for row in range(rows):
        kind = (row + first) % 3
        if kind == 1:
            real[row, :pad] = False
        if kind == 2:
            real[row, length - pad :] = False
    return real


def _some(places: npt.NDArray[np.bool_], share: float, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """That share of the places, at least one unless it is none."""
    chosen = np.zeros_like(places)
    there = np.argwhere(places)
    count = 0 if share == 0 else max(1, round(share * len(there)))
    for row, column in rng.permutation(there)[:count]:
        chosen[row, column] = True
    return chosen
