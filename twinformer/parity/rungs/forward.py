"""Rung 1: the output and every module's output in float64."""

from __future__ import annotations

from twinformer.parity.compare import compare, set_problems
from twinformer.parity.culprit import culprits
from twinformer.parity.evidence import Evidence
from twinformer.parity.verdict import Rung, rung_of

# float64 rounds at 1.1e-16; sums of a few thousand terms through a few dozen layers stay below 1e-12
BOUND = 1e-12


def check(evidence: Evidence) -> Rung:
    """Compare every module's output, then the model's. Non-finite values must stand at the same places."""
    torch_run, flax_run = evidence.runs("float64")
    first, second = (twin.name for twin in evidence.twins)
    problems = set_problems("module", torch_run.modules, flax_run.modules, (first, second))
    comparisons = [
        compare(path, torch_run.modules[path], flax_run.modules[path], bound=BOUND)
        for path in torch_run.modules
        if path in flax_run.modules
    ]
    comparisons.append(compare("output", torch_run.output, flax_run.output, bound=BOUND))
    rung = rung_of(f"{len(comparisons)} outputs", comparisons, problems)
    if rung.verdict == "differ":
        blame(rung, evidence, backward=False, bound=BOUND)
    return rung


def blame(rung: Rung, evidence: Evidence, *, backward: bool, bound: float) -> None:
    """Name the modules that introduce a difference; where none does alone, say so."""
    suspects = culprits(evidence, backward=backward, bound=bound)
    rung.culprits = [suspect.name or "the model itself" for suspect in suspects]
    rung.notes += [f"{suspect.name or 'the model itself'}: {suspect.differences[0]}" for suspect in suspects]
    if not suspects:
        rung.notes.append("on the same inputs every module agrees with its twin: no culprit found")
