"""Where decoding in steps leaves the full forward: the first module that gives something else, or was given it.

Both are watched on the same tokens, module by module, and the steps put side by side. What attention was handed is
looked at before what it gave: positions come from the model, masks and biases from the stack, keys and values from
the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from twinformer.parity.compare import compare
from twinformer.parity.decoders import Array, Decoder, Seen
from twinformer.parity.decoding_runs import ROWS, Plan, in_steps

_BOUND = 1e-12
MODEL, CACHE = "the model itself", "the cache"
# kinds whose outputs have their positions on axis 2
_BY_HEAD = ("RotaryEncoding",)
_HEAD_NORMS = ("query_norm", "key_norm")


@dataclass(frozen=True)
class Found:
    culprit: str
    told: str


def find(decoder: Decoder, plan: Plan, cells: Sequence[str]) -> list[Found]:
    """The culprit of the first cell that fails on a new cache; empty where only used caches or exchanged rows fail."""
    for name, cut in plan.cuts.items():
        for real in (plan.real, None):
            ending = ", no mask" if real is None else ""
            if not any(cell.startswith(f"{name}, fresh cache") and cell.endswith(ending) for cell in cells):
                continue
            shown = np.ones_like(plan.real) if real is None else real
            _, whole = decoder.full(plan.inputs(plan.tokens, shown), watch=True)
            steps: list[list[Seen]] = []
            cache = decoder.start(ROWS, plan.slots, plan.source, plan.source_real)
            in_steps(decoder, cache, plan.tokens, real, cut, watched=steps)
            found = _first(whole, steps, cut)
            if found is not None:
                return [found]
    if any("positions given" in cell for cell in cells):
        return [Found(MODEL, "positions that are given are not those that the full forward uses")]
    return []


def _first(whole: Sequence[Seen], steps: Sequence[Sequence[Seen]], cut: Sequence[int]) -> Found | None:
    """Of the calls that both made, in the order of the full forward, the first in which they part.

    Within attention the query, the sum over the values and the output finish before attention does: what it was handed
    is looked at first.
    """
    by_step = [_numbered(seen) for seen in steps]
    calls = _numbered(whole)
    for name, one in calls.items():
        parts = _in_all(by_step, name)
        if parts is None or not _differs(one, parts, cut):
            continue
        layer = one.path.removesuffix(".recall") if one.path.endswith(".recall") else one.path.rpartition(".")[0]
        recall, remembered = f"{layer}.recall", one.path.endswith(".remember")
        handed = None if remembered else _in_all(by_step, recall)
        if recall in calls and handed is not None:
            return _recalled(calls[recall], handed, cut)
        return _named(one, parts, calls, by_step, cut)
    return None


def _named(
    one: Seen, parts: Sequence[Seen], calls: dict[str, Seen], by_step: Sequence[dict[str, Seen]], cut: Sequence[int]
) -> Found:
    """The module, or where it was handed something else the one around it, as far up as that can be seen."""
    given = _other_arguments(one, parts, cut)
    if "positions" in given or "ids" in given:
        return Found(MODEL, f"{one.path}: it is handed other positions than in the full forward")
    path = one.path.removesuffix(".remember")
    if not given:
        return Found(path, f"{one.path}: the first output that differs, on the same arguments")
    owner = path.rpartition(".")[0]
    around = _in_all(by_step, owner) if owner in calls else None
    if around is not None:
        return _named(calls[owner], around, calls, by_step, cut)
    return Found(owner or MODEL, f"{one.path}: its arguments differ first ({', '.join(given)})")


def _in_all(by_step: Sequence[dict[str, Seen]], name: str) -> list[Seen] | None:
    """That call in every step; None where some step has none."""
    found = [seen[name] for seen in by_step if name in seen]
    return found if len(found) == len(by_step) else None


def _differs(one: Seen, parts: Sequence[Seen], cut: Sequence[int]) -> bool:
    axis = 2 if one.kind in _BY_HEAD or one.path.rpartition(".")[2] in _HEAD_NORMS else 1
    places = (2, 2, 1) if one.path.endswith(".remember") else (axis,)
    return not all(
        _same(output, [part.outputs[k] for part in parts], place, cut)
        for k, (output, place) in enumerate(zip(one.outputs, places, strict=False))
    )


def _recalled(one: Seen, parts: Sequence[Seen], cut: Sequence[int]) -> Found:
    """Attention to what is remembered: what it was handed, then what it gave."""
    layer = one.path.removesuffix(".recall")
    stack = layer.partition(".blocks.")[0]
    given = _other_arguments(one, parts, cut)
    if "positions" in given:
        return Found(MODEL, f"{layer}: its queries are handed other positions than in the full forward")
    if given:
        return Found(layer.rpartition(".")[0], f"{layer}: its arguments differ first ({', '.join(given)})")
    if "allowed" not in one.arguments:
        return Found(layer, f"{layer}: the first output that differs")
    S, at = one.arguments["K"].shape[2], 0
    for part, length in zip(parts, cut, strict=True):
        rows = slice(at, at + length)
        at += length
        B, T = part.arguments["X"].shape[:2]
        keys = part.arguments["K"].shape[2]
        if "memory" in _kind(one, part):
            seen = slice(0, S)
        elif keys < at:  # a ring: which slot is which is not seen from here
            return Found(layer, f"{layer}: the first output that differs, in a ring of slots")
        else:
            seen = slice(0, min(S, keys))
        ours = _spread(part.arguments["allowed"], B, T, keys)[..., seen]
        theirs = _spread(one.arguments["allowed"], B, one.arguments["X"].shape[1], S)
        theirs = theirs[:, :, rows, seen] if theirs.shape[2] != 1 else theirs[..., seen]
        if not np.array_equal(np.broadcast_to(ours, theirs.shape), theirs):
            return Found(stack, f"{layer}: other keys are allowed than in the full forward")
        visible: Array = np.any(theirs, axis=(1, 2))
        for what in ("K", "V"):
            have, want = part.arguments[what][:, :, seen], one.arguments[what][:, :, seen]
            shown = visible[:, None, :, None]
            if not _close(np.where(shown, have, 0), np.where(shown, want, 0)):
                return Found(CACHE, f"{layer}: remembered {what} are not those of the full forward")
        if ("bias" in part.arguments) != ("bias" in one.arguments):
            return Found(stack, f"{layer}: a bias of positions on one way only")
        if "bias" in one.arguments:
            have = np.broadcast_to(part.arguments["bias"], (B, *part.arguments["bias"].shape[1:]))
            want = np.broadcast_to(one.arguments["bias"], (B, *one.arguments["bias"].shape[1:]))
            if have.shape[-1] != keys or not _close(
                np.where(theirs, have[..., seen], 0), np.where(theirs, want[:, :, rows, seen], 0)
            ):
                return Found(stack, f"{layer}: the bias of positions is not that of the full forward")
    return Found(layer, f"{layer}: the first output that differs, on the same arguments")


def _kind(one: Seen, part: Seen) -> str:
    """Cross-attention sees the same keys in every step."""
    same = one.arguments["K"].shape[2] == part.arguments["K"].shape[2] and "cross_attention" in one.path
    return "memory" if same else "own"


def _spread(allowed: Array, B: int, T: int, S: int) -> Array:
    """As ``[B, 1, T or 1, S]``."""
    while allowed.ndim < 4:
        allowed = allowed[None]
    return np.broadcast_to(allowed, (B, 1, allowed.shape[2], S))


def _other_arguments(one: Seen, parts: Sequence[Seen], cut: Sequence[int]) -> list[str]:
    """Names of arguments, of those that have the positions of the tokens, which differ from the full forward's."""
    found = []
    for name, whole in one.arguments.items():
        if name in ("K", "V", "broken", "bias", "allowed", "mask", "memory_mask", "H_enc", "table"):
            continue
        mine = [part.arguments[name] for part in parts if name in part.arguments]
        axis = 1 if whole.ndim < 4 else 2
        is_along = whole.ndim > axis and whole.shape[axis] == sum(cut)
        if is_along and (len(mine) != len(parts) or not _same(whole, mine, axis, cut)):
            found.append(name)
    return found


def _same(whole: Array, parts: Sequence[Array], axis: int, cut: Sequence[int]) -> bool:
    """Whether the parts side by side are the whole; what has no such axis is not looked at."""
    if any(part.ndim != whole.ndim for part in parts) or whole.ndim <= axis:
        return True
    if [part.shape[axis] for part in parts] != list(cut) or whole.shape[axis] != sum(cut):
        return True
    rows = max(len(whole), *(len(part) for part in parts))
    joined = np.concatenate([np.broadcast_to(part, (rows, *part.shape[1:])) for part in parts], axis)
    return joined.shape[1:] == whole.shape[1:] and _close(joined, np.broadcast_to(whole, joined.shape))


def _close(one: Array, other: Array) -> bool:
    if one.dtype == np.bool_ or not np.issubdtype(one.dtype, np.floating):
        return bool(np.array_equal(one, other))
    if not np.any(other) and not np.any(one):
        return True
    return compare("", one, other, bound=_BOUND).agrees


def _numbered(seen: Sequence[Seen]) -> dict[str, Seen]:
    found: dict[str, Seen] = {}
    for one in seen:
        name, n = one.path, 2
        while name in found:
            name, n = f"{one.path}#{n}", n + 1
        found[name] = one
    return found
