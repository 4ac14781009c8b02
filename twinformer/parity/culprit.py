"""The culprit: the module that introduces a difference.

Downstream of a fault everything differs, and two faults can cancel in the module that holds both. So the modules are
compared one by one, both twins' on the *same* inputs, those that the first twin recorded on its way, and backward on
the same cotangents. A module is a culprit if it differs on the same inputs and none of the parts that it called does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from twinformer.initializers import stream
from twinformer.parity.compare import Comparison, FloatArray, compare, set_problems
from twinformer.parity.evidence import Evidence
from twinformer.parity.twins import Call, Replay


@dataclass(frozen=True)
class Suspect:
    """One call of one module: what differed on the same inputs (and cotangent), if anything."""

    name: str
    differences: tuple[str, ...]

    @property
    def is_wrong(self) -> bool:
        return bool(self.differences)


def culprits(evidence: Evidence, *, backward: bool, bound: float) -> list[Suspect]:
    """The modules that introduce a difference, in the order in which they finished.

    ``backward`` compares gradients with respect to the module's inputs and parameters as well; without it only
    outputs are looked at. Empty where every module agrees with its twin on the same inputs: then the difference is
    in how the modules are put together by one that cannot be called alone.
    """
    first, second = evidence.twins
    case = evidence.case.in_dtype("float64")
    calls = [_pulling_finite(call, number) for number, call in enumerate(first.record(case))]
    suspects = [
        _examine(call, one, other, backward=backward, bound=bound)
        for call, one, other in zip(
            calls,
            first.replay(case, calls, gradients=backward),
            second.replay(case, calls, gradients=backward),
            strict=True,
        )
    ]
    wrong = [suspect for suspect in suspects if suspect.is_wrong]
    return [suspect for suspect in wrong if not any(_is_part(other.name, suspect.name) for other in wrong)]


def _pulling_finite(call: Call, number: int) -> Call:
    """The call with another cotangent where the recorded one is not finite.

    A gradient that turned NaN somewhere is NaN in every module before it, and NaN shows nothing about them. Any
    cotangent will do to compare two modules, as long as both get the same.
    """
    if np.isfinite(call.cotangent).all():
        return call
    return dataclasses.replace(
        call, cotangent=stream(number, "cotangent of a call").standard_normal(call.cotangent.shape)
    )


def _examine(call: Call, one: Replay, other: Replay, *, backward: bool, bound: float) -> Suspect:
    if _shows_nothing(one.output, other.output):
        return Suspect(call.name, ())
    found: list[Comparison] = [compare("output", one.output, other.output, bound=bound)]
    problems: list[str] = []
    if backward:
        for what, ours, theirs in (
            ("parameter", one.parameter_gradients, other.parameter_gradients),
            ("input", one.input_gradients, other.input_gradients),
        ):
            problems += set_problems(f"gradient of {what}", ours, theirs, ("the first", "the second"))
            scale = _largest([*ours.values(), *theirs.values()])
            found += [
                compare(f"gradient of {what} {name}", ours[name], theirs[name], bound=bound, scale=scale)
                for name in ours
                if name in theirs
            ]
    problems += [comparison.describe() for comparison in found if not comparison.agrees]
    return Suspect(call.name, tuple(problems))


def _shows_nothing(one: FloatArray, other: FloatArray) -> bool:
    """Whether both made NaN of everything, as they have to downstream of a module that did."""
    return one.shape == other.shape and bool(np.isnan(one).all() and np.isnan(other).all())


def _largest(arrays: Sequence[FloatArray]) -> float:
    return max((float(abs(array).max(initial=0.0)) for array in arrays), default=0.0)


def _is_part(name: str, whole: str) -> bool:
    """Whether the module of one call lies within that of another. Calls are named ``path`` or ``path#n``."""
    part, owner = name.partition("#")[0], whole.partition("#")[0]
    return part != owner and (owner == "" or part.startswith(f"{owner}."))
