"""Which modules of a port introduce a difference: each call judged on what PyTorch's call was given.

Forward, a module is a culprit if it differs although its parts gave what PyTorch's gave. Where a module is handed other
inputs than its twin, and agrees on its twin's, the one that called it is. Backward, what a module sends back passes
through its parts, so that it is a culprit only if none of them differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from twinformer.parity.compare import Comparison, FloatArray, compare, sibling_scales, widened
from twinformer.parity.values import Array, Arrays
from twinformer.parity.watch import Call, Calls, same_value


@dataclass
class Finding:
    """What was found about one call: comparisons of its outputs, of what it sends back, and of what it hands on."""

    forward: list[Comparison] = field(default_factory=list)
    backward: list[Comparison] = field(default_factory=list)
    handed: list[str] = field(default_factory=list)

    @property
    def differs(self) -> bool:
        return bool(self.handed) or any(not one.agrees for one in self.forward)

    @property
    def differs_backward(self) -> bool:
        return any(not one.agrees for one in self.backward)


Findings = dict[str, Finding]


def comparable(torch_calls: Calls, flax_calls: Calls) -> tuple[list[str], list[str]]:
    """The calls that can be judged, and why others cannot."""
    notes = []
    judged = []
    for path in dict.fromkeys(call.path for call in torch_calls.values()):
        ours = [name for name, call in torch_calls.items() if call.path == path]
        theirs = [name for name, call in flax_calls.items() if call.path == path]
        if len(ours) != len(theirs):
            notes.append(
                f"{path or 'the model itself'}: called {len(ours)} times in PyTorch, {len(theirs)} times in Flax: "
                "not judged by itself"
            )
            continue
        for name in ours:
            made = [tuple(one.shape) for one in torch_calls[name].outputs]
            found = [tuple(one.shape) for one in flax_calls[name].outputs]
            count = min(len(made), len(found))
            if count and made[:count] == found[:count]:
                judged.append(name)
            else:
                notes.append(f"{name}: gives shapes {made} in PyTorch, {found} in Flax: not judged by itself")
    return judged, notes


def other_inputs(one: Call, other: Call) -> dict[str, Array]:
    """By place in the Flax call: the inputs that are not those of the PyTorch call, with what those were."""
    left = [given for given in one.inputs if not any(same_value(given, theirs) for theirs in other.inputs)]
    found: dict[str, Array] = {}
    for place, theirs in enumerate(other.inputs):
        if any(same_value(given, theirs) for given in one.inputs):
            continue
        partner = next((at for at, given in enumerate(left) if given.shape == theirs.shape), None)
        if partner is not None:
            found[str(place)] = left.pop(partner)
    return found


def other_numbers(one: Call, other: Call) -> bool:
    """Whether the Flax call was given other whole numbers of a shape that the PyTorch call was given."""
    return any(
        any(np.squeeze(theirs).shape == np.squeeze(given).shape for given in one.whole)
        and not any(same_value(given, theirs) for given in one.whole)
        for theirs in other.whole
    )


def handed_otherwise(
    judged: list[str], torch_calls: Calls, flax_calls: Calls, put_in: Mapping[str, Any]
) -> dict[str, dict[str, Array]]:
    """Calls that are given other inputs by a caller that is given the right ones, with what to put in instead."""
    found = {name: other_inputs(torch_calls[name], flax_calls[name]) for name in judged if name and name not in put_in}
    found = {name: places for name, places in found.items() if places}
    return {
        name: places
        for name, places in found.items()
        if not any(_is_within(name, other, torch_calls) for other in found if other != name)
    }


def blame_callers(
    findings: Findings,
    names: Mapping[str, Any],
    torch_calls: Calls,
    before: Calls,
    after: Calls,
    *,
    bound: float,
) -> None:
    """Of calls whose inputs were put right: where that changed an output which differed, the caller is to blame."""
    for name in names:
        for inside in findings:
            if inside != name and not _is_within(inside, name, torch_calls):
                continue
            wrong = [one for one in _outputs(inside, torch_calls, before, bound) if not one.agrees]
            moved = [one for one in _outputs(inside, before, after, bound) if not one.agrees]
            if wrong and moved and torch_calls[name].caller in findings:
                text = f"hands {name} other inputs than in PyTorch ({wrong[0].describe()})"
                findings[torch_calls[name].caller].handed.append(text)
                break


def judge_outputs(findings: Findings, torch_calls: Calls, flax_calls: Calls, *, bound: float) -> None:
    """Compare outputs, of Flax calls that were given PyTorch's inputs; whole numbers are the caller's to give."""
    for name, finding in findings.items():
        found = _outputs(name, torch_calls, flax_calls, bound)
        wrong = [one for one in found if not one.agrees]
        caller = findings.get(torch_calls[name].caller)
        if wrong and name and caller is not None and other_numbers(torch_calls[name], flax_calls[name]):
            caller.handed.append(f"hands {name} other whole numbers than in PyTorch ({wrong[0].describe()})")
        else:
            finding.forward = found


def _outputs(name: str, expected: Calls, actual: Calls, bound: float) -> list[Comparison]:
    pairs = list(zip(expected[name].outputs, actual[name].outputs, strict=False))
    return [
        compare(_label(name, place, len(pairs)), widened(found), widened(wanted), bound=bound)
        for place, (wanted, found) in enumerate(pairs)
        if not _shows_nothing(found, wanted)
    ]


def judge_gradients(
    findings: Findings,
    torch_calls: Calls,
    flax_calls: Calls,
    pulled: Arrays,
    gradients: tuple[Mapping[str, Array], Mapping[str, Array]],
    *,
    bound: float,
) -> None:
    """What each call sends back to its inputs and leaves in its parameters, and what comes back between its parts."""
    wide_ours = {name: widened(one) for name, one in gradients[0].items()}
    wide_theirs = {name: widened(one) for name, one in gradients[1].items()}
    paths = {torch_calls[name].path: name for name in findings}
    scales = sibling_scales(wide_ours)
    for name, ours in wide_ours.items():
        owner = name.rpartition(".")[0]
        while owner and owner not in paths:
            owner = owner.rpartition(".")[0]
        if name in wide_theirs and owner in paths:
            one = compare(f"gradient of {name}", wide_theirs[name], ours, bound=bound, scale=scales[name])
            findings[paths[owner]].backward.append(one)
    for name, finding in findings.items():
        ours_call, theirs_call = torch_calls[name], flax_calls[name]
        back = [pulled[f"{name}<{place}"] for place in range(len(theirs_call.inputs))]
        own = [scales[path] for path in wide_ours if path.rpartition(".")[0] == ours_call.path]
        scale = max([*own, *(_magnitude(part) for part in ours_call.pulled)], default=0.0)
        for place, (expected, actual) in enumerate(_paired(ours_call, theirs_call, back)):
            label = f"gradient that {name or 'the model'} sends to its input {place}"
            finding.backward.append(compare(label, actual, expected, bound=bound, scale=scale))
        siblings = [
            torch_calls[other_name] for other_name in findings if torch_calls[other_name].caller == ours_call.caller
        ]
        scale = max((_magnitude(part) for call in siblings for part in (*call.cotangents, *call.pulled)), default=0.0)
        caller = findings.get(ours_call.caller)
        if name and caller is not None:
            for place, expected in enumerate(ours_call.cotangents[: len(theirs_call.outputs)]):
                label = f"gradient that {ours_call.caller or 'the model'} sends back to {name}"
                actual = widened(pulled[f"{name}>{place}"])
                caller.backward.append(compare(label, actual, widened(expected), bound=bound, scale=scale))


def _paired(one: Call, other: Call, back: list[Array]) -> list[tuple[FloatArray, FloatArray]]:
    """Gradients of inputs of equal value, added on each side: one call may take once what the other takes thrice."""
    pairs = []
    done: list[Array] = []
    for given in one.inputs:
        if any(same_value(given, before) for before in done):
            continue
        done.append(given)
        ours = [grad for value, grad in zip(one.inputs, one.pulled, strict=True) if same_value(given, value)]
        theirs = [grad for value, grad in zip(other.inputs, back, strict=True) if same_value(given, value)]
        if theirs:
            actual = sum((widened(grad).reshape(given.shape) for grad in theirs), start=np.zeros(given.shape))
            expected = sum((widened(grad).reshape(given.shape) for grad in ours), start=np.zeros(given.shape))
            pairs.append((expected, actual))
    return pairs


def culprits(findings: Findings, torch_calls: Calls, *, backward: bool) -> dict[str, list[str]]:
    """By path: the modules that introduce a difference, each with what it is."""
    wrong = [name for name, found in findings.items() if (found.differs_backward if backward else found.differs)]
    named: dict[str, list[str]] = {}
    for name in wrong:
        if backward and any(other != name and _is_within(other, name, torch_calls) for other in wrong):
            continue
        found = findings[name]
        compared = [one.describe() for one in (found.backward if backward else found.forward) if not one.agrees]
        named.setdefault(torch_calls[name].path, []).extend([*([] if backward else found.handed), *compared])
    return named


def _is_within(name: str, owner: str, calls: Calls) -> bool:
    while name:
        name = calls[name].caller
        if name == owner:
            return True
    return False


def _label(name: str, place: int, count: int) -> str:
    return (name or "the model itself") + (f" (output {place})" if count > 1 else "")


def _shows_nothing(one: Array, other: Array) -> bool:
    return one.shape == other.shape and bool(np.isnan(widened(one)).all() and np.isnan(widened(other)).all())


def _magnitude(array: Array) -> float:
    wide = widened(array)
    return float(np.abs(wide[np.isfinite(wide)]).max(initial=0.0))
