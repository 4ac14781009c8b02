"""Rung 7: decoding with remembered keys and values gives what one call of the same model gives.

The matrix: {one prefill, chunks, token by token} x {no padding, left, right, holes} x {a new cache, one that another
sequence was decoded with}, and beside it positions that are given, rows that are exchanged as beams are, logits of one
place, and NaN in sight and in padding. Each twin is held against itself, for the full forward has been judged on the
rungs below, and then against the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import numpy as np

from twinformer.config import ModelConfig
from twinformer.errors import InputError
from twinformer.parity.case import Case
from twinformer.parity.compare import Comparison, FloatArray, compare, set_problems, widened
from twinformer.parity.cut import cut, describe
from twinformer.parity.decoders import Decoder
from twinformer.parity.decoding_culprit import Found, find
from twinformer.parity.decoding_runs import PADDINGS, POISON, Decoded, Plan, decode, in_steps, plan_for, start
from twinformer.parity.evidence import Evidence
from twinformer.parity.rungs.forward import BOUND, blame
from twinformer.parity.twins import Twin
from twinformer.parity.verdict import Rung, does_not_apply, rung_of

_WINDOW = 5


def check(evidence: Evidence) -> Rung:
    """Compare every cell of the matrix with the full forward, row by row, and the twins with each other."""
    whole = evidence.case
    if whole.config.architecture == "encoder":
        return does_not_apply("an encoder writes no tokens: there is nothing to remember")
    if not whole.config.predicts_tokens:
        return does_not_apply("the model predicts no tokens: there is nothing to remember")
    case, plan = prepared(whole)
    decoded = []
    problems: list[str] = []
    for twin in evidence.twins:
        evidence.progress(f"{twin.name}: decoding in steps")
        wrong, found = twin.once("decoding", case, partial(run, twin, case, plan))
        problems += [f"{twin.name}: {text}" for text in wrong]
        if found is not None:
            decoded.append((twin, found))
    comparisons = [one for twin, found in decoded for one in _with_itself(twin.name, found)]
    comparisons += _with_each_other(decoded)
    cells = sum(one.name.startswith(evidence.twins[0].name) for one in comparisons)
    rung = rung_of(f"{cells} cells of each twin, {plan.length} tokens", comparisons, problems)
    if rung.verdict == "differ":
        _blame(rung, evidence, case, plan)
    elif rung.verdict == "agree":
        _look_for_vacuous(rung, evidence.twins[0], case, plan, decoded[0][1])
    rung.notes += describe(case.config, whole.config)
    return rung


def prepared(whole: Case) -> tuple[Case, Plan]:
    """The model cut down, in float64, and what is decoded with it; a window is one that the tokens leave."""
    whole = with_small_window(whole)
    sized = cut(whole, plan_for(whole.config).inputs(*_few())).config
    plan = plan_for(sized)
    return cut(whole, plan.inputs(plan.tokens, plan.real)).in_dtype("float64"), plan


def with_small_window(case: Case) -> Case:
    """The window, if there is one, cut to one that a few tokens leave."""
    if case.config.window is None or case.config.window <= _WINDOW:
        return case
    return dataclasses.replace(case, config=case.config.replace(window=_WINDOW))


def run(twin: Twin, case: Case, plan: Plan) -> tuple[list[str], Decoded | None]:
    """All cells of one twin; none where its caches are not those of the contract."""
    with twin.decoders(case) as make:
        wrong = _layout(twin.name, make(case), case.config, plan)
        if wrong:
            return wrong, None
        found = decode(lambda is_poisoned: make(poisoned(case) if is_poisoned else case), plan)
        moved = [f"{leaf} of a cache changed with the one that was made by exchanging its rows" for leaf in found.moved]
        return moved + _without_room(make(case), case.config, plan), found


def _without_room(decoder: Decoder, config: ModelConfig, plan: Plan) -> list[str]:
    """Two tokens where one more has room: refused where values can be seen, else NaN, and never logits."""
    if plan.length < 2 or (config.ring_window is not None and plan.slots <= config.ring_window):
        return []  # old positions make room in a ring
    lengths = [*plan.cuts["chunks"][:-1], *[1] * (plan.cuts["chunks"][-1] - 1)]
    kept = sum(lengths)
    _, cache = in_steps(decoder, start(decoder, plan), plan.tokens[:, :kept], plan.real[:, :kept], lengths)
    try:
        logits, _, _ = decoder.step(cache, plan.tokens[:, :2], plan.real[:, :2])
    except InputError:
        return []
    shown = int(np.isfinite(widened(logits)).sum())
    return [f"two tokens where one has room: expected NaN, got {shown} finite logits"] if shown else []


def poisoned(case: Case) -> Case:
    """The last token's embedding holds NaN and infinities."""
    table = "target_embedding" if case.config.architecture == "encoder-decoder" else "embedding"
    path = f"{'source_embedding' if case.config.share_embeddings else table}.tokens.weight"
    row = case.tensors[path].copy()
    row[-1, : len(POISON)] = POISON[: row.shape[1]]
    return dataclasses.replace(case, tensors=case.tensors | {path: row}, finite=False)


# ---- the comparisons


def _with_itself(name: str, found: Decoded) -> list[Comparison]:
    """Row by row, because rows differ by their padding; the scale is that of the whole."""
    comparisons = []
    for cell, logits in found.cells.items():
        of, _, label = cell.partition(": ")
        expected = found.full[of]
        scale = float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0)) or None
        ending = ", no mask" if of == "bare" else ""
        if of not in ("masked", "poisoned") or logits.shape != expected.shape:
            comparisons.append(compare(f"{name}: {label}{ending}", logits, expected, bound=BOUND, scale=scale))
            continue
        comparisons += [
            compare(f"{name}: {label}, {padding}", logits[row], expected[row], bound=BOUND, scale=scale)
            for row, padding in enumerate(PADDINGS)
            if _shows(logits[row], expected[row])
        ]
    return comparisons


def _with_each_other(decoded: Sequence[tuple[Twin, Decoded]]) -> list[Comparison]:
    if len(decoded) < 2:
        return []
    (first, one), (second, other) = decoded
    return [
        compare(f"{first.name}, {second.name}: {cell.partition(': ')[2]}", logits, other.cells[cell], bound=BOUND)
        for cell, logits in one.cells.items()
        if _shows(logits, other.cells[cell])
    ]


def _shows(one: FloatArray, other: FloatArray) -> bool:
    """Whether there is anything but NaN: a model of one token is poisoned as a whole."""
    return bool(np.isfinite(one).any() or np.isfinite(other).any())


def _layout(name: str, decoder: Decoder, config: ModelConfig, plan: Plan) -> list[str]:
    """The leaves of a new cache against the contract: a buffer of another shape can still take what is written."""
    leaves = decoder.leaves(decoder.start(len(plan.tokens), plan.slots, plan.source, plan.source_real))
    wanted = layout(config, plan)
    problems = set_problems("leaf of the cache", leaves, wanted, (name, "the contract"))
    return problems + [
        f"cache: {leaf}: expected shape {shape}, got {tuple(leaves[leaf].shape)}"
        for leaf, shape in wanted.items()
        if leaf in leaves and tuple(leaves[leaf].shape) != shape
    ]


def layout(config: ModelConfig, plan: Plan) -> dict[str, tuple[int, ...]]:
    """What ``docs/contract.md`` says that a cache holds."""
    B, C, G = len(plan.tokens), plan.slots, config.num_kv_heads
    found: dict[str, tuple[int, ...]] = {"real": (B, C), "positions": (B, C), "counted": (B,), "step": ()}
    parts = {"": C}
    if plan.source is not None:
        S = plan.source.shape[1]
        found["memory/real"] = (B, S)
        parts["memory/"] = S
    for prefix, width in parts.items():
        for layer in range(config.num_layers):
            block = f"{prefix}blocks/{layer}"
            found[f"{block}/keys"] = (B, G, width, config.key_dim)
            found[f"{block}/values"] = (B, G, width, config.value_dim)
            found[f"{block}/broken"] = (B, width)
    return found


def _look_for_vacuous(rung: Rung, twin: Twin, case: Case, plan: Plan, found: Decoded) -> None:
    """A history that nobody looks at would be the same cached or not: another token before the last has to be seen."""
    if case.config.ring_window == 1:
        rung.notes.append("with a window of 1 no token sees another: what is remembered is its own")
        return
    tokens = plan.tokens.copy()
    tokens[0, -2:-1] = (tokens[0, -2:-1] + 1) % max(1, case.config.vocab_size - 1)
    if np.array_equal(tokens, plan.tokens):
        return  # one token long, or with one token to choose from
    after = twin.run(dataclasses.replace(case, inputs=plan.inputs(tokens, plan.real)), detail="blocks").output
    moved = compare("history", after[0, -1], found.full["masked"][0, -1], bound=0.0).relative
    if not moved > 10 * BOUND:
        rung.verdict = "cannot tell"
        rung.problems = [f"vacuous: another token before the last moves its logits by {moved:.0e} of their scale only"]
    else:
        rung.notes.append(f"another token before the last moves its logits by {moved:.0e} of their scale")


# ---- the culprit


def _blame(rung: Rung, evidence: Evidence, case: Case, plan: Plan) -> None:
    """Which cells fail, and for the first of them where the steps leave the full forward."""
    differing = [one for one in rung.comparisons if isinstance(one, Comparison) and not one.agrees]
    names = list(dict.fromkeys(one.name for one in differing))
    found: list[Found] = []
    for twin in evidence.twins:
        own = [name.removeprefix(f"{twin.name}: ") for name in names if name.startswith(f"{twin.name}: ")]
        if not own:
            continue
        rung.notes.append(f"{twin.name}: {len(own)} cells fail: {_axes(own)}")
        with twin.decoders(case) as make:
            found += find(make(case), plan, own)
    rung.culprits = list(dict.fromkeys(one.culprit for one in found))
    rung.notes += list(dict.fromkeys(one.told for one in found))
    if names and all(name.startswith(f"{evidence.twins[0].name}, ") for name in names):
        # each twin decodes as it computes: the models differ
        full = dataclasses.replace(case, inputs=plan.inputs(plan.tokens, plan.real))
        blame(rung, Evidence(full, evidence.twins, progress=evidence.progress), backward=False, bound=BOUND)
    elif not rung.culprits:
        rung.culprits = ["the cache"]


def _axes(cells: Sequence[str]) -> str:
    """The values of each axis that fail."""
    parts = [cell.split(", ") for cell in cells]
    axes = [list(dict.fromkeys(part[axis] for part in parts if axis < len(part))) for axis in range(3)]
    return "; ".join(", ".join(values) for values in axes if values)


def _few() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((1, 1), np.int64), np.ones((1, 1), np.bool_)
