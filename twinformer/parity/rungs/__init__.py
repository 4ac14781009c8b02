"""The ladder: each rung a module with one entry point, ``check(evidence) -> Rung``.

The report lists the whole ladder: rungs that were not run are named as such.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from twinformer.parity.evidence import Evidence
from twinformer.parity.rungs import forward, gradients, parameters, precision
from twinformer.parity.verdict import Rung


@dataclass(frozen=True)
class Step:
    """One rung of the ladder. ``check`` is None where there is nothing that runs it yet."""

    number: int
    name: str
    asks: str
    check: Callable[[Evidence], Rung] | None = None


LADDER = (
    Step(0, "parameters", "the same leaves, each used once, layouts proved by values", parameters.check),
    Step(1, "forward", "every module's output in float64", forward.check),
    Step(2, "gradients", "every parameter's and every module output's gradient in float64", gradients.check),
    Step(3, "precision", "float32 and bfloat16 errors against the float64 truth", precision.check),
    Step(4, "compilation", "eager = jit = torch.compile; remat and scan change nothing"),
    Step(5, "optimizer", "update vectors over at least 8 steps"),
    Step(6, "training", "the same run, dropout on, loss and gradient norm at every step"),
    Step(7, "decoding", "prefill, chunks and single tokens = full forward"),
    Step(8, "sampling", "sampling and beam search on ties and boundaries"),
    Step(9, "persistence", "saved by one, loaded by the other, bit for bit"),
    Step(10, "sharding", "sharded = single device"),
)

RUNNABLE = tuple(step.name for step in LADDER if step.check is not None)

__all__ = ["LADDER", "RUNNABLE", "Step"]
