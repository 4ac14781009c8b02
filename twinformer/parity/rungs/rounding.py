"""Rung 3, module by module: in float32 and bfloat16 each module, on the same inputs, against the float64 truth.

Where rung 3 looks at a whole run, errors have piled up, and a rounding too many in one place drowns in them. Here every
module of both twins is called, operation by operation, with what the first twin recorded in low precision, and
its error is compared with that of its twin. Norms, embeddings and rotations round in places that the contract
names: there nearly all elements have to be equal. This is also what names the culprit of a fault of low precision.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from twinformer.config import DType
from twinformer.initializers import stream
from twinformer.parity.case import Case, computing_in
from twinformer.parity.compare import Comparison, ErrorPair, compare
from twinformer.parity.evidence import Evidence
from twinformer.parity.rungs.precision import LARGEST_RATIO, NEIGHBOURS, RMS_RATIO, ROUNDING, label_of, settings
from twinformer.parity.twins import Call, Replay
from twinformer.parity.verdict import Rung, rung_of

# modules whose every rounding is laid down
LAID_DOWN = frozenset(
    {"Embeddings", "LayerNorm", "LearnedPositions", "PositionalEncoding", "RMSNorm", "RotaryEncoding", "TokenEmbedding"}
)
# The share of elements that may be another number all the same: values made in float32 differ in the last of 24
# digits, and some fall on the other side of a boundary between numbers of 8 digits. 0.02 % is the most that was seen; a
# rounding too many changes a fifth or more.
UNEQUAL = 0.05
# by how much of themselves inputs and weights are moved where a ratio may be luck
_MOVES = {"float32": 2.0**-12, "bfloat16": 2.0**-6, "float16": 2.0**-8}
# so many times its bound a ratio is no luck
_BEYOND_LUCK = 100.0
# those that only put others together: rung 3 looks at them, for norms within them make much of little errors by chance
COMPOSED = frozenset({"Block", "EncoderDecoder", "EncoderModel", "LanguageModel", "TransformerStack"})


def check(evidence: Evidence) -> Rung:
    """Compare the dtypes of every call of every module, and the errors of those that compute something themselves."""
    findings: list[Comparison | ErrorPair] = []
    problems: list[str] = []
    culprits: list[str] = []
    for dtype, parameters in settings(evidence.case):
        found, wrong = _in(evidence, dtype, parameters)
        findings += [one for of_call in found.values() for one in of_call]
        problems += [
            f"{name or 'the model itself'} ({label_of(dtype, parameters)}): {problem}"
            for name, problem in wrong.items()
        ]
        suspects = [*(name for name, of_call in found.items() if not all(one.agrees for one in of_call)), *wrong]
        culprits += [name for name in suspects if not any(_is_part(other, name) for other in suspects)]
    rung = rung_of(f"{len(findings)} findings on calls of modules", findings, problems)
    if rung.verdict == "differ":
        rung.culprits = [name or "the model itself" for name in dict.fromkeys(culprits)]
    return rung


def _in(
    evidence: Evidence, dtype: DType, parameters: DType
) -> tuple[dict[str, list[Comparison | ErrorPair]], dict[str, str]]:
    """The errors of every call in ``dtype``, and the calls whose outputs are of different dtypes."""
    first, second = evidence.twins
    case = computing_in(evidence.case.in_dtype(parameters), dtype)
    calls = first.record(case)
    truth = first.replay(case.in_dtype("float64"), [_widened(call) for call in calls], gradients=False)
    ours = first.replay(case, calls, gradients=False, compiled=False)
    theirs = second.replay(case, calls, gradients=False, compiled=False)
    found: dict[str, list[Comparison | ErrorPair]] = {}
    problems = {}
    for call, right, one, other in zip(calls, truth, ours, theirs, strict=True):
        if not np.isfinite(right.output).any():
            continue  # NaN came in, NaN goes out
        if call.kind not in COMPOSED:
            draws = [_errors(call.name, right, one, other)]
            found[call.name] = [_pair(evidence, case, call, label_of(dtype, parameters), draws)]
        if call.kind in LAID_DOWN and dtype != "float32" and one.output.shape == other.output.shape:
            found[call.name].append(_unequal(call, one, other))
        if one.dtype != other.dtype:
            problems[call.name] = f"output in {one.dtype} against {other.dtype}"
    return found, problems


def _pair(evidence: Evidence, case: Case, call: Call, label: str, draws: list[list[Comparison]]) -> ErrorPair:
    """Where a ratio is beyond its bound, inputs and weights nearby are asked as well: luck does not come again."""
    dtype = case.config.compute_dtype
    while True:
        pair = ErrorPair.of(
            f"{call.name} (by itself, {label})",
            tuple(twin.name for twin in evidence.twins),
            draws[0],
            rounding=ROUNDING[dtype],
            bound=LARGEST_RATIO,
            rms_bound=RMS_RATIO,
            again=draws[1:],
        )
        if pair.agrees or pair.severity > _BEYOND_LUCK or len(draws) > NEIGHBOURS:
            return pair
        near, moved = _nearby(case, call, len(draws))
        (right,) = evidence.twins[0].replay(near.in_dtype("float64"), [_widened(moved)], gradients=False)
        both = [twin.replay(near, [moved], gradients=False, compiled=False)[0] for twin in evidence.twins]
        draws.append(_errors(call.name, right, *both))


def _errors(name: str, right: Replay, *both: Replay) -> list[Comparison]:
    return [compare(name, replay.output, right.output, bound=1.0) for replay in both]


def _nearby(case: Case, call: Call, draw: int) -> tuple[Case, Call]:
    """The call and the weights moved by a few places of the dtype; what a row is like (of little spread) it stays."""
    by = _MOVES[case.config.compute_dtype]

    def moved(part: Any) -> Any:
        if not isinstance(part, np.ndarray) or part.dtype.kind in "biu":
            return part
        change = stream(draw, f"rounding/{part.shape}").uniform(-by, by, part.shape)
        return (part.astype(np.float64) * (1 + change)).astype(part.dtype)

    arguments, options = jax.tree.map(moved, (call.arguments, call.options), is_leaf=lambda part: part is None)
    tensors = {path: moved(tensor) for path, tensor in case.tensors.items()}
    return dataclasses.replace(case, tensors=tensors), dataclasses.replace(call, arguments=arguments, options=options)


def _unequal(call: Call, one: Replay, other: Replay) -> Comparison:
    """The share of elements in which the two differ at all."""
    same = (one.output == other.output) | (np.isnan(one.output) & np.isnan(other.output))
    share = np.array([1 - same.mean()])
    return compare(f"{call.name} (by itself, share unequal)", share, np.zeros(1), bound=UNEQUAL, scale=1.0)


def _widened(call: Call) -> Call:
    """The call with its floats in float64."""

    def wide(part: Any) -> Any:
        is_float = isinstance(part, np.ndarray) and part.dtype.kind not in "biu"
        return part.astype(np.float64) if is_float else part

    arguments, options = jax.tree.map(wide, (call.arguments, call.options), is_leaf=lambda part: part is None)
    return dataclasses.replace(call, arguments=arguments, options=options)


def _is_part(name: str, whole: str) -> bool:
    part, owner = name.partition("#")[0], whole.partition("#")[0]
    return part != owner and (owner == "" or part.startswith(f"{owner}."))
