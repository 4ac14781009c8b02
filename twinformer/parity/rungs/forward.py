"""Rung 1: the output and every module's output in float64."""

from __future__ import annotations

from twinformer.parity.compare import Comparison, compare, set_problems
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
    return rung_of(f"{len(comparisons)} outputs", comparisons, problems, first_to_differ(comparisons))


def first_to_differ(comparisons: list[Comparison]) -> str:
    """The first module that finished with another output. Parts finish before the whole, so it is the deepest."""
    return next((comparison.name for comparison in comparisons if not comparison.agrees), "")
