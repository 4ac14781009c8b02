"""The ladder: each rung a module with one entry point, ``check(evidence) -> Rung``.

The report lists the whole ladder: rungs that were not run are named as such.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from twinformer.parity.evidence import Evidence
from twinformer.parity.rungs import (
    accumulation,
    adapters,
    beams,
    calls,
    compilation,
    decoding,
    forward,
    gradients,
    long,
    nonfinite,
    optimizer,
    parameters,
    persistence,
    precision,
    resumption,
    rounding,
    sampling,
    sharding,
    stochastic,
    training,
)
from twinformer.parity.verdict import Rung


@dataclass(frozen=True)
class Step:
    """One rung of the ladder. ``by_default``: run where nobody names rungs. What takes long is run when asked for."""

    number: int
    name: str
    asks: str
    check: Callable[[Evidence], Rung]
    by_default: bool = True


LADDER = (
    Step(0, "parameters", "the same leaves, each used once, layouts proved by values", parameters.check),
    Step(1, "forward", "every module's output in float64", forward.check),
    Step(1, "calls", "the model called with tokens only, and with positions in no order", calls.check),
    Step(1, "nonfinite", "NaN and infinities: hidden in padding unseen, in sight at the same places", nonfinite.check),
    Step(2, "gradients", "every parameter's and every module output's gradient in float64", gradients.check),
    Step(2, "stochastic", "the same with dropout, under one key; rate, factor and independence", stochastic.check),
    Step(2, "long", "rows as long as in training, called as a trainer calls", long.check, by_default=False),
    Step(3, "rounding", "each module by itself, in float32 and bfloat16", rounding.check, by_default=False),
    Step(3, "precision", "float32 and bfloat16 errors against the float64 truth", precision.check),
    Step(
        4,
        "compilation",
        "eager = jit = torch.compile; remat and loops over blocks change nothing",
        compilation.check,
        by_default=False,
    ),
    Step(5, "optimizer", "update vectors over ten steps: warm-up, clipping, decay", optimizer.check),
    Step(6, "training", "the same run, dropout on: loss, gradient norm and every update", training.check),
    Step(6, "adapters", "the same run of low-rank adapters, over allowed tokens", adapters.check, by_default=False),
    Step(6, "accumulation", "in bfloat16 losses and sums are wide", accumulation.check, by_default=False),
    Step(7, "decoding", "prefill, chunks and single tokens = full forward", decoding.check),
    Step(8, "sampling", "what is drawn, on ties and boundaries, and what is written with it", sampling.check),
    Step(8, "beams", "beam search; greedy texts, streams and scores", beams.check, by_default=False),
    Step(9, "persistence", "saved by one, loaded by the other, bit for bit", persistence.check),
    Step(9, "resumption", "a run that was stopped goes on in either twin", resumption.check, by_default=False),
    Step(10, "sharding", "sharded = single device", sharding.check, by_default=False),
)

BY_DEFAULT = tuple(step.name for step in LADDER if step.by_default)

__all__ = ["BY_DEFAULT", "LADDER", "Step"]
