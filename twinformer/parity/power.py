"""Detection power: what a comparison would have noticed.

A comparison that agrees says something only if it could have failed. So single weights are changed by a thousandth, one
run for each, and for every comparison it is measured how far that takes the compared tensor. Differences that
small are linear, so the figure scales: a comparison whose tensor moves by 1e-5 of its scale, with a bound of 1e-12,
would have noticed a change of that weight by 1e-10 of itself.

Beside the comparisons the parameters are looked at one by one: a weight of each is changed and the module that owns it
is called again on its recorded inputs. A parameter that no change makes visible is one that nothing here checks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from twinformer.parity.case import Case
from twinformer.parity.compare import (
    Comparison,
    FloatArray,
    flowing_through,
    output_scales,
    relative_move,
    sibling_scales,
)
from twinformer.parity.twins import Call, Replay, Run, Twin

if TYPE_CHECKING:
    from twinformer.parity.evidence import Evidence

# the relative change of one weight that every comparison has to notice
CHANGE = 1e-3
# a tensor that moves by no more than this is not moved: it is a constant, or zero by mathematics (the bias of a key)
STILL = 1e-11
# runs with one weight changed; the first alone moves nearly everything that lies downstream of the embeddings, and
# with the second nearly every gradient. Of a large model's further runs the gradients are not asked for.
_RUNS, _RUNS_IF_LARGE, _LARGE = 6, 3, 5_000_000
_WITH_GRADIENTS = 2


@dataclasses.dataclass(frozen=True)
class Power:
    """``moves``: for each tensor of a run, by the names of ``tensors_of``, its largest relative move by ``CHANGE``.

    ``parameters``: for each parameter the smallest relative change of one of its weights that the output of its module
    would have shown beyond the bound of rung 1; infinite where none was seen.
    """

    moves: Mapping[str, float]
    parameters: Mapping[str, float]

    def noticed(self, comparison: Comparison, tensor: str) -> Comparison:
        """The comparison with the smallest relative change of a single weight that it would have noticed."""
        move = self.moves.get(tensor)
        if move is None:
            return comparison
        smallest = CHANGE * comparison.bound / move if move > STILL else math.inf
        return dataclasses.replace(comparison, notices=smallest)


def measure(evidence: Evidence, *, bound: float, gradients: bool) -> Power:
    """Change single weights in the first twin, in float64, and see what moves."""
    case = evidence.case.in_dtype("float64")
    twin = evidence.twins[0]
    before = evidence.runs("float64", gradients=gradients)[0]
    gradients = bool(before.gradients)
    still = tensors_of(before)
    scales = _scales(before, case)
    moves = dict.fromkeys(still, 0.0)
    weights = {path: _a_weight(path, case, before) for path in case.tensors}
    runs = 0
    is_large = sum(tensor.size for tensor in case.tensors.values()) >= _LARGE
    limit = _RUNS_IF_LARGE if is_large else _RUNS
    paths = list(weights)
    # the first moves what lies downstream of it, the last the output; the others are for what these two leave
    for path in [paths[0], *paths[:0:-1][:1], *paths[1:-1]]:
        place = weights[path]
        if place is None or runs == limit or not _could_move_more(path, moves):
            continue
        runs += 1
        changed = with_change(case, {path: place})
        after = tensors_of(twin.run(changed, gradients=gradients and not (is_large and runs > _WITH_GRADIENTS)))
        for name in after:
            moves[name] = max(moves[name], relative_move(after[name], still[name], scales.get(name)))
    return Power(moves, _by_parameter(evidence, case, weights, bound))


def tensors_of(run: Run) -> dict[str, FloatArray]:
    """Everything that rungs 1 and 2 compare, by names of its own."""
    return (
        {f"module {path}": seen for path, seen in run.modules.items()}
        | {"output": run.output}
        | {f"gradient {path}": gradient for path, gradient in run.gradients.items()}
        | {f"gradient of output {path}": gradient for path, gradient in run.module_gradients.items()}
    )


def with_change(case: Case, places: Mapping[str, tuple[int, ...]]) -> Case:
    """The case with one weight of each named parameter larger by ``CHANGE`` of itself."""
    tensors = dict(case.tensors)
    for path, place in places.items():
        tensor = tensors[path].copy()
        tensor[place] *= 1 + CHANGE
        tensors[path] = tensor
    return dataclasses.replace(case, tensors=tensors)


def _scales(run: Run, case: Case) -> dict[str, float]:
    """Those of rung 2."""
    flowing = flowing_through(run.module_gradients, case.cotangent)
    return {f"gradient {path}": scale for path, scale in sibling_scales(run.gradients, flowing=flowing).items()} | {
        f"gradient of output {path}": scale
        for path, scale in output_scales(run.module_gradients, flowing=flowing).items()
    }


def _a_weight(path: str, case: Case, run: Run) -> tuple[int, ...] | None:
    """The place of a weight like most: of median magnitude among those that are not 0.

    In a table only rows count that the inputs use: that of a token which they begin with, or, in other tables, those
    with a gradient. (A tied table has gradients everywhere, from the head.)
    """
    tensor = case.tensors[path]
    counts = tensor != 0
    gradient = run.gradients.get(path)
    if path.endswith("tokens.weight"):
        name = next(name for name in (path.partition("_embedding")[0], "tokens") if name in case.inputs)
        counts &= (np.arange(len(tensor)) == int(case.inputs[name][0, 0]))[:, None]
    elif tensor.ndim == 2 and gradient is not None:
        used = np.any(gradient != 0, axis=1)
        counts &= used[:, None] if used.any() else True
    if not counts.any():
        return None
    places = np.argwhere(counts)
    magnitudes = np.abs(tensor[counts])
    middle = int(np.argsort(magnitudes, kind="stable")[len(magnitudes) // 2])
    return tuple(int(i) for i in places[middle])


def _could_move_more(path: str, moves: Mapping[str, float]) -> bool:
    """Whether a change of this parameter could move a module's output that nothing moved so far."""
    owner = path.rpartition(".")[0]
    return any(move == 0 and (name.startswith(f"module {owner}") or name == "output") for name, move in moves.items())


def _by_parameter(
    evidence: Evidence, case: Case, weights: Mapping[str, tuple[int, ...] | None], bound: float
) -> dict[str, float]:
    """Replay each module on its recorded inputs with one weight of one of its parameters changed."""
    twin = evidence.twins[0]
    calls: dict[str, Call] = {}
    for call in twin.record(case, gradients=False):
        calls.setdefault(call.path, call)
    found = dict.fromkeys(case.tensors, math.inf)
    todo: dict[str, list[str]] = {}
    for path, place in weights.items():
        owner = path.rpartition(".")[0]
        while owner not in calls:  # a head without a call of its own is used by the model itself
            owner = owner.rpartition(".")[0]
        if place is not None:
            todo.setdefault(owner, []).append(path)
    before = {call.path: seen.output for call, seen in _replayed(twin, case, [calls[owner] for owner in todo])}
    while todo:  # one parameter of each module in one pass: modules replayed alone do not see each other's weights
        now = {owner: paths.pop() for owner, paths in todo.items()}
        changed = with_change(case, {path: weights[path] or () for path in now.values()})
        for call, seen in _replayed(twin, changed, [calls[owner] for owner in now]):
            moved = relative_move(seen.output, before[call.path])
            if moved > 0:
                found[now[call.path]] = CHANGE * bound / moved
        todo = {owner: paths for owner, paths in todo.items() if paths}
    return found


def is_still(comparison: Comparison) -> bool:
    """Whether no change of a weight moves what is compared: of such a tensor only the value can be wrong."""
    return comparison.notices == math.inf


def is_vacuous(comparison: Comparison) -> bool:
    """Whether one weight changed by ``CHANGE`` moves the tensor, but not over the bound; not measured is not vacuous.

    A model's output has to move: an output that depends on no weight agrees with that of any other such model.
    """
    notices = comparison.notices
    if notices is None or (is_still(comparison) and comparison.name != "output"):
        return False
    return not notices <= CHANGE


def vacuous(comparison: Comparison) -> str:
    return (
        f"{comparison.name}: vacuous, one weight changed by {CHANGE:.0e} of itself does not carry it over the bound "
        f"{comparison.bound:.0e}"
    )


def _replayed(twin: Twin, case: Case, calls: Sequence[Call]) -> list[tuple[Call, Replay]]:
    return list(zip(calls, twin.replay(case, calls, gradients=False), strict=True))
