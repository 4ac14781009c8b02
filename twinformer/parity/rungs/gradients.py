"""Rung 2: the gradient of every parameter and of every module's output in float64."""

from __future__ import annotations

import numpy as np

from twinformer.parity.compare import (
    ROUNDING_NOISE,
    Comparison,
    compare,
    flowing_through,
    output_scales,
    set_problems,
    sibling_scales,
)
from twinformer.parity.evidence import Evidence
from twinformer.parity.kinks import settled
from twinformer.parity.power import is_still, is_vacuous, vacuous
from twinformer.parity.rungs.forward import BOUND as FORWARD_BOUND
from twinformer.parity.rungs.forward import blame, with_noise, with_noise_where_failing
from twinformer.parity.verdict import Rung, rung_of

# one order above the forward bound: a gradient sums over all positions of the batch
BOUND = 1e-11


def check(evidence: Evidence) -> Rung:
    """Compare gradients of ``sum(output * cotangent)``.

    Gradients of module outputs include those of the embeddings, which are the inputs as far as calculus sees
    them. A parameter's error is measured against the largest gradient within its module (``sibling_scales``).
    A parameter without any gradient is named: nothing here would notice it. Rows that tie under max pooling are left
    out (``kinks.py``).
    """
    evidence, tied = settled(evidence)
    torch_run, flax_run = evidence.runs("float64", gradients=True)
    first, second = (twin.name for twin in evidence.twins)
    problems = set_problems("gradient of parameter", torch_run.gradients, flax_run.gradients, (first, second))
    problems += set_problems(
        "gradient of output", torch_run.module_gradients, flax_run.module_gradients, (first, second)
    )
    noise = evidence.noise(gradients=True)
    # where a soft cap is saturated, or next to the root of an activation's derivative, a gradient is what cancellation
    # leaves of a far larger one: the rounding of that is in it, in whatever order the sums were taken
    flowing = flowing_through(torch_run.module_gradients, evidence.case.cotangent)
    rounding = np.finfo(np.float64).eps * flowing
    scales = output_scales(flax_run.module_gradients, flowing=flowing)
    outputs = [
        with_noise(
            compare(f"output of {path}", gradient, flax_run.module_gradients[path], bound=BOUND, scale=scales[path]),
            noise,
            f"gradient of output {path}",
            least=rounding,
        )
        for path, gradient in torch_run.module_gradients.items()
        if path in flax_run.module_gradients
    ]
    scales = sibling_scales(flax_run.gradients, flowing=flowing)
    parameters = [
        with_noise(
            compare(path, gradient, flax_run.gradients[path], bound=BOUND, scale=scales[path]),
            noise,
            f"gradient {path}",
            least=rounding,
        )
        for path, gradient in torch_run.gradients.items()
        if path in flax_run.gradients
    ]
    parameters = with_noise_where_failing(evidence, parameters, tensor_of, least=rounding)
    outputs = with_noise_where_failing(evidence, outputs, tensor_of, least=rounding)
    rung = rung_of(f"{len(parameters)} parameters, {len(outputs)} outputs", [*parameters, *outputs], problems)
    if rung.verdict == "differ":
        blame(rung, evidence, backward=True, bound=BOUND)
    elif rung.verdict == "agree":
        _look_for_vacuous(rung, evidence)
        largest = flowing_through(torch_run.gradients, np.zeros(1))
        if largest <= ROUNDING_NOISE * flowing:
            rung.verdict = "cannot tell"
            rung.problems.append(
                f"no parameter has a gradient beyond rounding: {largest:.1e} at most, beside {flowing:.1e} of outputs"
            )
    if tied:
        rung.notes.append(f"left out, for the largest features of two tokens tie under max pooling: rows {tied}")
    idle = [path for path, gradient in torch_run.gradients.items() if not np.any(gradient)]
    if idle:
        rung.notes.append(f"no gradient at all on these inputs: {', '.join(idle)}")
    return rung


def tensor_of(comparison: Comparison) -> str:
    """What a comparison of this rung is of, by the names of ``tensors_of``."""
    is_output = comparison.name.startswith("output of ")
    return f"gradient {'of ' if is_output else ''}{comparison.name}"


def _look_for_vacuous(rung: Rung, evidence: Evidence) -> None:
    """Measure what each comparison would have noticed.

    Some gradients cannot move: those that are zero by mathematics (biases of keys), and those in which no weight takes
    part (a head's bias). They are named; of all others a changed weight must be seen.
    """
    power = evidence.power(FORWARD_BOUND)
    rung.comparisons = [power.noticed(one, tensor_of(one)) for one in rung.comparisons if isinstance(one, Comparison)]
    compared = [one for one in rung.comparisons if isinstance(one, Comparison)]
    still = [one.name for one in compared if is_still(one)]
    if still:
        rung.notes.append(f"moved by no weight that was changed: {', '.join(still)}")
    problems = [vacuous(one) for one in compared if is_vacuous(one)]
    if problems:
        rung.verdict = "cannot tell"
        rung.problems = problems
