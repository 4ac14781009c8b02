"""Rung 1: the output and every module's output in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from twinformer.parity.case import Case
from twinformer.parity.compare import Comparison, compare, relative_to, set_problems
from twinformer.parity.culprit import culprits
from twinformer.parity.evidence import Evidence
from twinformer.parity.power import CHANGE, is_still, is_vacuous, vacuous
from twinformer.parity.twins import Call
from twinformer.parity.verdict import Rung, rung_of

# float64 rounds at 1.1e-16; sums of a few thousand terms through a few dozen layers stay below 1e-12
BOUND = 1e-12
# A floor is one draw of a random quantity: where a difference is beyond it, but by no more than this many times, more
# are made. Further away no draw will bring it.
_BEYOND, DRAWS = 100.0, 5
# and what no noise explains is not held against one
HOPELESS = 1e-3


def check(evidence: Evidence) -> Rung:
    """Compare every module's output, then the model's. Non-finite values must stand at the same places."""
    torch_run, flax_run = evidence.runs("float64")
    first, second = (twin.name for twin in evidence.twins)
    problems = set_problems("module", torch_run.modules, flax_run.modules, (first, second))
    noise = evidence.noise()
    comparisons = [
        with_noise(compare(path, torch_run.modules[path], flax_run.modules[path], bound=BOUND), noise, f"module {path}")
        for path in torch_run.modules
        if path in flax_run.modules
    ]
    output = compare("output", torch_run.output, flax_run.output, bound=BOUND)
    comparisons.append(with_noise(output, noise, "output"))
    comparisons = with_noise_where_failing(evidence, comparisons, tensor_of, gradients=False)
    rung = rung_of(f"{len(comparisons)} outputs", comparisons, problems)
    if rung.verdict == "differ":
        blame(rung, evidence, backward=False, bound=BOUND)
    elif rung.verdict == "agree":
        _look_for_vacuous(rung, evidence)
    window, length = evidence.case.config.window, torch_run.output.shape[1]
    if torch_run.output.ndim == 2:  # one vector a row
        length = evidence.case.inputs["tokens"].shape[1]
    if window is not None and window >= length:
        rung.notes.append(f"the window of {window} hides nothing from {length} tokens: it was not checked")
    return rung


def with_noise(
    comparison: Comparison, noise: Sequence[Mapping[str, float]], tensor: str, *, least: float = 0.0
) -> Comparison:
    """The comparison with its noise floor, where the computations in another order have that tensor.

    The smaller of the twins' two: a fault can depend on the order itself, and must not excuse itself by that.
    ``least`` is an absolute difference that rounding can always make.
    """
    floors = [floor[tensor] for floor in noise if tensor in floor]
    if comparison.problem or len(floors) < len(noise) or not floors:
        return comparison
    floor = relative_to(min(floors), comparison.scale)
    return dataclasses.replace(comparison, noise=max(floor, least / comparison.scale if comparison.scale else 0.0))


def tensor_of(comparison: Comparison) -> str:
    """What a comparison of this rung is of, by the names of ``power.tensors_of``."""
    return "output" if comparison.name == "output" else f"module {comparison.name}"


def with_noise_where_failing(
    evidence: Evidence,
    comparisons: list[Comparison],
    tensor: Callable[[Comparison], str],
    *,
    least: float = 0.0,
    gradients: bool = True,
) -> list[Comparison]:
    """The comparisons, those that fail with their noise floor, for which more than one draw is made if that may help.

    ``tensor`` is the name of what a comparison is of, ``least`` as for ``with_noise``.
    """
    if all(one.agrees for one in comparisons) or any(one.problem or one.relative > HOPELESS for one in comparisons):
        return comparisons
    for draws in (1, DRAWS):
        noise = evidence.noise(gradients=gradients, draws=draws)
        told = [one if one.agrees else with_noise(one, noise, tensor(one), least=least) for one in comparisons]
        doubtful = [one for one in told if not (one.agrees or one.within_noise)]
        if not doubtful or any(one.problem or one.relative > _BEYOND * (one.noise or 0.0) for one in doubtful):
            break
    return told


def _look_for_vacuous(rung: Rung, evidence: Evidence) -> None:
    """Measure what each comparison would have noticed; one that would not notice a changed weight cannot tell."""
    power = evidence.power(BOUND)
    rung.comparisons = [power.noticed(one, tensor_of(one)) for one in rung.comparisons if isinstance(one, Comparison)]
    compared = [one for one in rung.comparisons if isinstance(one, Comparison)]
    problems = [vacuous(one) for one in compared if is_vacuous(one)]
    still = [one.name for one in compared if is_still(one) and one.name != "output"]
    if still:
        rung.notes.append(f"moved by no weight that was changed: {', '.join(still)}")
    zero = [path for path in power.parameters if not np.any(evidence.case.tensors[path])]
    mute = [path for path, smallest in power.parameters.items() if not smallest <= CHANGE and path not in zero]
    seen = [smallest for smallest in power.parameters.values() if smallest <= CHANGE]
    if seen:
        rung.notes.append(
            f"in each of {len(seen)} parameters one weight changed by {max(seen):.0e} of itself would have been noticed"
        )
    if mute:
        rung.notes.append(f"no change of a weight was seen on these inputs: {', '.join(mute)}")
    if zero:
        rung.notes.append(f"0 everywhere, so that no change relative to itself was tried: {', '.join(zero)}")
    if problems:
        rung.verdict = "cannot tell"
        rung.problems = problems


def alone(evidence: Evidence, case: Case, call: Call, what: str) -> Comparison:
    """One module's output in both twins, on what this call gives it."""
    ours, theirs = (twin.replay(case, [call], gradients=False)[0].output for twin in evidence.twins)
    return compare(f"{call.path} ({what})", ours, theirs, bound=BOUND)


def module_of(comparison: Comparison) -> str:
    """The path in the name of such a comparison."""
    return comparison.name.partition(" (")[0]


def blame(rung: Rung, evidence: Evidence, *, backward: bool, bound: float) -> None:
    """Name the modules that introduce a difference.

    Where none does alone, something was handed to one of them that should not have been: the module around the first
    whose output differs put its parts together otherwise, in a way that its own output does not show.
    """
    suspects = culprits(evidence, backward=backward, bound=bound)
    rung.culprits = [suspect.name or "the model itself" for suspect in suspects]
    rung.notes += [f"{suspect.name or 'the model itself'}: {suspect.differences[0]}" for suspect in suspects]
    if not suspects:
        rung.notes.append("on the same inputs every module agrees with its twin: parts are put together otherwise")
        differing = [one.name for one in rung.comparisons if isinstance(one, Comparison) and not one.agrees]
        owners = [name.removeprefix("output of ").rpartition(".")[0] for name in differing if name != "output"]
        rung.culprits = [owner or "the model itself" for owner in owners[:1]]
