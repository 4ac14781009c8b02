"""Rung 1, continued: the other ways to call the same model.

The case gives every optional input that it can. Here the model is called without any of them, which is the commonest
call of all, with positions of its own for every row, in no order, and with several documents in a row: what is done by
default is written down in other lines than what is done with what was given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from twinformer.initializers import stream
from twinformer.parity.case import Arrays, Case
from twinformer.parity.compare import Comparison, compare, flowing_through, set_problems, sibling_scales
from twinformer.parity.evidence import Evidence
from twinformer.parity.kinks import without_ties
from twinformer.parity.rungs import forward, gradients
from twinformer.parity.verdict import Rung, rung_of

# tokens of each call: defaults do not depend on length, and every call is compiled anew
_LENGTH = 24
# at most so many in a row
_DOCUMENTS = 3
_TOKENS = ("tokens", "source", "target")


def check(evidence: Evidence) -> Rung:
    """Compare outputs, blocks and every parameter's gradient for each call in float64."""
    case = evidence.case.in_dtype("float64")
    rung = compared(evidence, calls(case))
    rung.add(_float_mask(evidence, case), forward.module_of)
    return rung


def compared(evidence: Evidence, called: Mapping[str, Case]) -> Rung:
    """Both twins on each of these cases: outputs, blocks and gradients."""
    comparisons: list[Comparison] = []
    problems: list[str] = []
    notes: list[str] = []
    culprits: list[str] = []
    for what, call in called.items():
        ours, theirs = (twin.run(call, gradients=True, detail="blocks") for twin in evidence.twins)
        sides = (evidence.twins[0].name, evidence.twins[1].name)
        problems += [f"{what}: {text}" for text in set_problems("module", ours.modules, theirs.modules, sides)]
        problems += [f"{what}: {text}" for text in set_problems("gradient", ours.gradients, theirs.gradients, sides)]
        call, tied = without_ties(call, (ours, theirs))
        if tied:
            notes.append(f"{what}: gradients left out, for tokens tie under max pooling: rows {tied}")
            ours, theirs = (twin.run(call, gradients=True, detail="blocks") for twin in evidence.twins)
        scales = sibling_scales(theirs.gradients, flowing=flowing_through({}, call.cotangent))
        found = [compare(f"output ({what})", ours.output, theirs.output, bound=forward.BOUND)]
        found += [
            compare(f"{path} ({what})", seen, theirs.modules[path], bound=forward.BOUND)
            for path, seen in ours.modules.items()
            if path in theirs.modules
        ]
        pulled = [
            compare(
                f"gradient of {path} ({what})", one, theirs.gradients[path], bound=gradients.BOUND, scale=scales[path]
            )
            for path, one in ours.gradients.items()
            if path in theirs.gradients
        ]
        other = Evidence(call, evidence.twins, with_gradients=True, progress=evidence.progress)
        least = np.finfo(np.float64).eps * flowing_through({}, call.cotangent)
        found = forward.with_noise_where_failing(other, found, _tensor)
        pulled = forward.with_noise_where_failing(other, pulled, _tensor, least=least)
        comparisons += [*found, *pulled]
        rung = rung_of(what, [*found, *pulled])
        if rung.verdict == "differ":
            is_backward = all(one.agrees or one.within_noise for one in found)
            forward.blame(rung, other, backward=is_backward, bound=gradients.BOUND if is_backward else forward.BOUND)
            culprits += rung.culprits
    rung = rung_of(f"{', '.join(called)}: {len(comparisons)} tensors", comparisons, problems)
    rung.culprits = list(dict.fromkeys(culprits))
    rung.notes += notes
    return rung


def _tensor(comparison: Comparison) -> str:
    """What it is of, by the names of ``tensors_of``."""
    name = forward.module_of(comparison)
    if name.startswith("gradient of "):
        return f"gradient {name.removeprefix('gradient of ')}"
    return "output" if name == "output" else f"module {name}"


def _float_mask(evidence: Evidence, case: Case) -> list[Comparison]:
    """The first self-attention with a mask that is added, beside whatever else is added; -inf hides."""
    call = evidence.self_attention(case)
    if call is None:
        return []
    X = call.arguments[0][:, :_LENGTH]
    T = X.shape[1]
    rng = stream(0, "calls/mask")
    mask = np.where((rng.random((T, T)) < 0.3) & ~np.eye(T, dtype=bool), -np.inf, rng.normal(0, 2, (T, T)))
    options = {
        name: value for name, value in call.options.items() if name in ("bias", "positions") and value is not None
    }
    if "bias" in options:
        options["bias"] = options["bias"][..., :T, :T]
    if "positions" in options:
        options["positions"] = options["positions"][:, :T]
    given = dataclasses.replace(call, arguments=(X,), options=options | {"mask": mask})
    return [forward.alone(evidence, case, given, "a mask that is added")]


def calls(case: Case) -> dict[str, Case]:
    """The case cut to its first tokens: nothing but tokens, positions in no order, several documents in a row."""
    names = [name for name in _TOKENS if name in case.inputs]
    plain: Arrays = {name: case.inputs[name][:, :_LENGTH] for name in names}
    cotangent = case.cotangent if case.cotangent.ndim == 2 else case.cotangent[:, :_LENGTH]
    short = dataclasses.replace(case, inputs=plain, cotangent=cotangent)
    masks: Arrays = {name: value[:, -_LENGTH:] for name, value in case.inputs.items() if name.endswith("padding_mask")}
    places: Arrays = {}
    for name in names:
        where = "positions" if name == "tokens" else f"{name}_positions"
        places[where] = stream(0, f"calls/{where}").integers(0, case.config.context_length, plain[name].shape)
    types = {name: value[:, :_LENGTH] for name, value in case.inputs.items() if name == "token_types"}
    placed = dataclasses.replace(short, inputs=plain | masks | places | types)
    found = {"tokens only": short, "positions given": placed}
    if names == ["tokens"]:
        of_all = {name: value[:1] for name, value in places.items()}
        found["positions and no mask"] = dataclasses.replace(short, inputs=plain | of_all | types)
    else:
        source = {name: mask for name, mask in masks.items() if name.startswith("source")}
        found["positions and the source's mask"] = dataclasses.replace(short, inputs=plain | places | source)
    if names == ["tokens"] and case.config.head not in ("pooled", "sequence"):
        packed = plain | types | {"segments": _documents(*plain["tokens"].shape)}
        found["documents in a row"] = dataclasses.replace(short, inputs=packed)
        found["documents with positions"] = dataclasses.replace(short, inputs=packed | places)
    return found


def _documents(rows: int, length: int) -> npt.NDArray[np.int64]:
    """``[rows, length]``: three documents in the first row, two in the next, and so on; then padding, or none.

    Numbers fall and rise from one document to the next: they are names. The first document of a row has a hole. The
    last row has two documents, with as much padding after each.
    """
    found = np.zeros((rows, length), np.int64)
    for row in range(rows):
        count = max(1, _DOCUMENTS - row)
        ends = np.linspace(0, length - row % 2, count + 1).astype(int)
        for number, begin, end in zip((5, 2, 9), ends[:-1], ends[1:], strict=False):
            found[row, begin:end] = number
        if row % 2 == 0 and length > 4:
            found[row, 2] = 0
    if rows > 1 and length >= 8:  # padding of several places, between documents and after them
        found[-1] = np.repeat([5, 0, 2, 0], np.diff(np.linspace(0, length, 5).astype(int)))
    return found
