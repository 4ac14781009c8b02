"""A twin against itself, where it is run in another way."""

from __future__ import annotations

from twinformer.parity.compare import Comparison, compare, set_problems, sibling_scales
from twinformer.parity.rungs import forward, gradients
from twinformer.parity.twins import Run


def against_itself(label: str, run: Run, usual: Run, sides: tuple[str, str]) -> tuple[list[Comparison], list[str]]:
    """Another run of the same twin: its output and every parameter's gradient; and gradients on one side only."""
    problems = [
        f"{label}: {problem}"
        for problem in set_problems("gradient of parameter", run.gradients, usual.gradients, sides)
    ]
    scales = sibling_scales(usual.gradients)
    comparisons = [compare(f"output ({label})", run.output, usual.output, bound=forward.BOUND)]
    comparisons += [
        compare(f"{path} ({label})", run.gradients[path], gradient, bound=gradients.BOUND, scale=scales[path])
        for path, gradient in usual.gradients.items()
        if path in run.gradients
    ]
    return comparisons, problems


def mode_of(name: str) -> str:
    """Of a comparison called ``tensor (twin, mode)``."""
    return name.rpartition(" (")[2].rstrip(")")
