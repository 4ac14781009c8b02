"""A batch, and what every data set is: batches in an order that depends on nothing but (seed, epoch)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from twinformer.errors import InputError, Problems

Ids = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Batch:
    """What a model is called with, and what it should have said.

    ``inputs``: the arguments of the model's call by name (``tokens``, ``padding_mask``, ``segments``, ``positions``;
    ``source``, ``target``, ``source_padding_mask``, ``target_padding_mask`` …). ``targets [B, T]`` token ids,
    ``real [B, T]`` True where they count. ``allowed [B, T, V]``: tokens that are possible there; the logits of others
    are taken to be ``-inf``.
    """

    inputs: dict[str, npt.NDArray[Any]]
    targets: Ids
    real: Flags
    allowed: Flags | None = None

    def __post_init__(self) -> None:
        problems = Problems("Batch", InputError)
        shape = self.targets.shape
        problems.expect(len(shape) == 2, f"targets: expected rank 2 [B, T], got shape {shape}")
        problems.expect(self.real.shape == shape, f"real: expected shape {shape}, got {self.real.shape}")
        problems.expect(self.real.dtype == np.bool_, f"real: expected bool, got {self.real.dtype}")
        for name, value in self.inputs.items():
            problems.expect(
                value.ndim >= 1 and value.shape[0] in (1, shape[0]),
                f"inputs: {name}: expected a batch of {shape[0]}, got shape {value.shape}",
            )
        if self.allowed is not None:
            problems.expect(
                self.allowed.ndim == 3 and self.allowed.shape[:2] == shape and self.allowed.dtype == np.bool_,
                f"allowed: expected bool [B, T, V] = {(*shape, 'V')}, got {self.allowed.dtype} {self.allowed.shape}",
            )
        problems.raise_if_any()

    @property
    def count(self) -> int:
        """How many places count."""
        return int(self.real.sum())


@dataclass(frozen=True)
class Part:
    """One of the parts of a data set: training, validation or test. ``notes`` says what was left out and why."""

    name: str
    size: int
    notes: tuple[str, ...] = field(default=())


class Dataset(Protocol):
    """Batches of one part of some data, in an order that is a pure function of (seed, epoch).

    A resumed run, and the other framework, see the same batches: ``batch(step)`` gives the batch of a step directly,
    whatever came before it.
    """

    @property
    def vocab_size(self) -> int:
        """V, of the target where there are two vocabularies."""

    @property
    def steps_per_epoch(self) -> int:
        """How many batches make an epoch."""

    def batch(self, step: int) -> Batch:
        """The batch of ``step``, counted from 0 over all epochs."""
