"""Every way to decode one batch: cut into steps, padded, with a cache that is new or was used before.

A cell of the matrix is named ``cut, padding, cache``. What each has to give is what one call of the same model gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from twinformer.config import ModelConfig, PositionCounting
from twinformer.initializers import stream
from twinformer.parity.case import Arrays
from twinformer.parity.compare import FloatArray, widened
from twinformer.parity.decoders import Array, Decoder, Seen

ROWS, LENGTH, CHUNK = 4, 12, 4
PADDINGS = ("no padding", "left", "right", "holes")
# rows after a reorder: two exchanged, one of them twice
ORDER = (1, 0, 0, 3)
POISON = (np.nan, np.inf, -np.inf)


@dataclass(frozen=True)
class Plan:
    """What is decoded: tokens with and without padding, what the caches held before, and how many slots they have.

    ``poisoned`` tokens have the one token whose embedding is not finite in the padding of some rows, in sight in one.
    """

    tokens: Array
    real: npt.NDArray[np.bool_]
    other: Array
    poisoned: Array
    positions: Array
    at: Array
    slots: int
    source: Array | None
    source_real: npt.NDArray[np.bool_] | None
    counting: PositionCounting = "real"

    @property
    def length(self) -> int:
        return int(self.tokens.shape[1])

    @property
    def cuts(self) -> dict[str, list[int]]:
        T = self.length
        return {"one prefill": [T], "chunks": _chunks(T), "token by token": [1] * T}

    def inputs(self, tokens: Array, real: Array | None, positions: Array | None = None) -> Arrays:
        """Of one call of the model."""
        two = self.source is not None
        prefix = "target_" if two else ""
        given = {"target" if two else "tokens": tokens, f"{prefix}padding_mask": real, f"{prefix}positions": positions}
        given |= {"source": self.source, "source_padding_mask": self.source_real}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Decoded:
    """``full`` and ``cells`` by name: logits ``[B, T, V]``; a cell's name begins with that of what it has to equal, and
    a colon. ``moved``: leaves of a cache that changed while another, made from it, was used."""

    full: dict[str, FloatArray]
    cells: dict[str, FloatArray]
    moved: list[str]


def plan_for(config: ModelConfig) -> Plan:
    """Twelve tokens in four rows, in the smallest caches that the contract allows."""
    T = min(LENGTH, config.context_length)
    T -= T % min(CHUNK, T)
    rng = stream(0, "decoding")
    poison = config.vocab_size - 1
    tokens, other = (rng.integers(0, max(1, poison), (ROWS, T)) for _ in range(2))
    real = np.ones((ROWS, T), np.bool_)
    real[1, : max(1, T // 3)] = False
    real[2, T - max(1, T // 3) :] = False
    real[3, [0, T // 3, T // 2]] = False
    poisoned = np.where(real, tokens, poison)
    poisoned[0, T // 2] = poison
    window = config.ring_window
    source = source_real = None
    if config.architecture == "encoder-decoder":
        S = max(1, T - 3)
        source = rng.integers(0, config.source_vocab_size, (ROWS, S))
        source_real = np.ones((ROWS, S), np.bool_)
        source_real[1, : max(1, S // 3)] = False
        source_real[2, S - S // 3 :] = False
        source_real[3] = False
    return Plan(
        tokens,
        real,
        other,
        poisoned,
        np.stack([rng.permutation(T) for _ in range(ROWS)]),
        rng.integers(0, T, ROWS),
        slots=window if window is not None and window < T else T,
        source=source,
        source_real=source_real,
        counting=config.position_counting,
    )


def _chunks(length: int) -> list[int]:
    """Of a few tokens and of half as many by turns: a ring has to make room for each of them."""
    found: list[int] = []
    while sum(found) < length:
        found.append(min(length - sum(found), CHUNK if len(found) % 2 == 0 else CHUNK // 2))
    return found


def decode(make: Callable[[bool], Decoder], plan: Plan) -> Decoded:
    """Every cell. ``make(poisoned)`` gives the twin's decoder, with weights of which one row is not finite, or not."""
    sound, poisoned = make(False), make(True)
    everything = np.ones_like(plan.real)
    counted = positions_of if plan.counting == "real" else _places

    def whole(decoder: Decoder, tokens: Array, real: npt.NDArray[np.bool_], positions: Array) -> FloatArray:
        return widened(decoder.full(plan.inputs(tokens, real, positions))[0])

    # positions are always given here, as the contract counts them, and a mask, be it one that hides nothing: other ways
    # to say the same have been judged, and one program serves all
    full = {
        "masked": whole(sound, plan.tokens, plan.real, counted(plan.real)),
        "bare": whole(sound, plan.tokens, everything, counted(everything)),
        "placed": whole(sound, plan.tokens, plan.real, plan.positions),
        "poisoned": whole(poisoned, plan.poisoned, plan.real, counted(plan.real)),
    }
    full["reordered"] = full["masked"][list(ORDER)]
    full["alone"] = full["masked"][:1]
    full["placed"] = np.take_along_axis(full["placed"], plan.at[:, None, None], 1)
    return Decoded(full, *_cells(sound, poisoned, plan))


def positions_of(real: npt.NDArray[np.bool_]) -> Array:
    """Positions over real tokens."""
    positions: Array = np.maximum(np.cumsum(real, 1) - 1, 0)
    return positions


def _places(real: npt.NDArray[np.bool_]) -> Array:
    return positions_of(np.ones_like(real))


def _cells(sound: Decoder, poisoned: Decoder, plan: Plan) -> tuple[dict[str, FloatArray], list[str]]:
    """The cells, and the leaves that moved."""
    found: dict[str, FloatArray] = {}
    moved: list[str] = []
    for name, cut in plan.cuts.items():
        cache = start(sound, plan)
        found[f"masked: {name}, fresh cache"], cache = in_steps(sound, cache, plan.tokens, plan.real, cut)
        # what the cache is left with is another sequence, with rows that are not finite
        _, cache = in_steps(poisoned, poisoned.reset(cache), plan.poisoned[::-1], plan.real, plan.cuts["one prefill"])
        found[f"masked: {name}, reused cache"], _ = in_steps(sound, sound.reset(cache), plan.tokens, plan.real, cut)
    by_token = plan.cuts["token by token"]
    found["bare: token by token, fresh cache"], _ = in_steps(sound, start(sound, plan), plan.tokens, None, by_token)
    # products with one row are computed in another way
    alone = sound.start(1, plan.slots, *(None if x is None else x[:1] for x in (plan.source, plan.source_real)))
    found["alone: token by token, a batch of one"], _ = in_steps(sound, alone, plan.tokens[:1], plan.real[:1], by_token)
    chunks = plan.cuts["chunks"]
    for name in ("chunks", "token by token"):
        cache = start(poisoned, plan)
        found[f"poisoned: {name}, NaN and infinities"], _ = in_steps(
            poisoned, cache, plan.poisoned, plan.real, plan.cuts[name]
        )
    one_place, _, _ = sound.step(start(sound, plan), plan.tokens, plan.real, plan.positions, plan.at)
    found["placed: one prefill, positions given, logits of one place"] = widened(one_place)
    if len(chunks) > 1:
        found["reordered: chunks, rows exchanged"], moved = _reordered(sound, plan, chunks)
    return found, moved


def _reordered(sound: Decoder, plan: Plan, chunks: list[int]) -> tuple[FloatArray, list[str]]:
    """The last chunk after the rows were exchanged, as beams are; what comes before is that of the new row.

    Also which leaves of the cache from before moved with it: that one is another's, and stays what it was.
    """
    order, kept = np.array(ORDER), plan.length - chunks[-1]
    first, cache = in_steps(sound, start(sound, plan), plan.tokens[:, :kept], plan.real[:, :kept], chunks[:-1])
    old, before = cache, {name: leaf.copy() for name, leaf in sound.leaves(cache).items()}
    cache = sound.reorder(cache, order)
    rest = slice(kept, None)
    last, _ = in_steps(sound, cache, plan.tokens[order][:, rest], plan.real[order][:, rest], chunks[-1:])
    moved = [name for name, leaf in sound.leaves(old).items() if not np.array_equal(leaf, before[name])]
    return np.concatenate([first[order], last], 1), moved


def start(decoder: Decoder, plan: Plan) -> Any:
    """An empty cache for the plan's rows."""
    return decoder.start(ROWS, plan.slots, plan.source, plan.source_real)


def in_steps(
    decoder: Decoder,
    cache: Any,
    tokens: Array,
    real: Array | None,
    cut: list[int],
    *,
    watched: list[list[Seen]] | None = None,
) -> tuple[FloatArray, Any]:
    """The logits of all steps side by side, and the cache. ``watched`` takes what was seen in each step."""
    parts, at = [], 0
    for length in cut:
        now = slice(at, at + length)
        logits, cache, seen = decoder.step(
            cache,
            tokens[:, now],
            None if real is None else real[:, now],
            watch=watched is not None,
        )
        if watched is not None:
            watched.append(seen)
        parts.append(widened(logits))
        at += length
    return np.concatenate(parts, 1), cache
