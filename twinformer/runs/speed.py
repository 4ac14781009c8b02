"""How fast a run is: real tokens a second, and arithmetic against what the machine can do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from twinformer.config import ModelConfig
from twinformer.data.batch import Batch
from twinformer.runs.flops import training_flops


class Speed:
    """Tokens and arithmetic a second since the last look, without validations and checkpoints."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.restart()

    def restart(self) -> None:
        self.since, self.tokens, self.flops = self.clock(), 0, 0

    def add(self, config: ModelConfig, batches: Sequence[Batch]) -> None:
        for batch in batches:
            self.tokens += real_tokens(batch)
            self.flops += training_flops(config, batch.inputs)

    def measure(self, ceiling: float | None, *, count: bool) -> dict[str, float]:
        """The first step compiles: it does not ``count``."""
        seconds = self.clock() - self.since
        found = {}
        if count and seconds > 0 and self.tokens:
            found["tokens_per_second"] = self.tokens / seconds
            if ceiling is not None:
                found["utilisation"] = self.flops / seconds / ceiling
        self.restart()
        return found


def real_tokens(batch: Batch) -> int:
    """Tokens that go into the model, without padding. Where there is neither mask nor segments, padding is taken to be
    all that follows a row's last target that counts.
    """
    total = 0
    for name, mask in (
        ("tokens", "padding_mask"),
        ("source", "source_padding_mask"),
        ("target", "target_padding_mask"),
    ):
        if name not in batch.inputs:
            continue
        if mask in batch.inputs:
            total += int(batch.inputs[mask].sum())
        elif name == "tokens" and "segments" in batch.inputs:
            total += int(np.count_nonzero(batch.inputs["segments"]))
        elif name == "tokens":
            total += int(batch.real[:, ::-1].cumsum(1).astype(bool).sum())
        else:
            total += batch.inputs[name].size
    return total
