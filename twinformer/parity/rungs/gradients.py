"""Rung 2: the gradient of every parameter and of every module's output in float64."""

from __future__ import annotations

import numpy as np

from twinformer.parity.compare import compare, set_problems, sibling_scales
from twinformer.parity.evidence import Evidence
from twinformer.parity.rungs.forward import blame
from twinformer.parity.verdict import Rung, rung_of

# one order above the forward bound: a gradient sums over all positions of the batch
BOUND = 1e-11


def check(evidence: Evidence) -> Rung:
    """Compare gradients of ``sum(output * cotangent)``.

    Gradients of module outputs include those of the embeddings, which are the inputs as far as calculus sees
    them. A parameter's error is measured against the largest gradient within its module (``sibling_scales``).
    A parameter without any gradient is named: nothing here would notice it.
    """
    torch_run, flax_run = evidence.runs("float64", gradients=True)
    first, second = (twin.name for twin in evidence.twins)
    problems = set_problems("gradient of parameter", torch_run.gradients, flax_run.gradients, (first, second))
    problems += set_problems(
        "gradient of output", torch_run.module_gradients, flax_run.module_gradients, (first, second)
    )
    outputs = [
        compare(f"output of {path}", gradient, flax_run.module_gradients[path], bound=BOUND)
        for path, gradient in torch_run.module_gradients.items()
        if path in flax_run.module_gradients
    ]
    scales = sibling_scales(flax_run.gradients)
    parameters = [
        compare(path, gradient, flax_run.gradients[path], bound=BOUND, scale=scales[path])
        for path, gradient in torch_run.gradients.items()
        if path in flax_run.gradients
    ]
    rung = rung_of(f"{len(parameters)} parameters, {len(outputs)} outputs", [*parameters, *outputs], problems)
    if rung.verdict == "differ":
        blame(rung, evidence, backward=True, bound=BOUND)
    idle = [path for path, gradient in torch_run.gradients.items() if not np.any(gradient)]
    if idle:
        rung.notes.append(f"no gradient at all on these inputs: {', '.join(idle)}")
    return rung
