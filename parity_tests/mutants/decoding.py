"""Decoding with a cache: masks, positions and what is remembered, where the full forward is right."""

from __future__ import annotations

import dataclasses
from typing import Any

from parity_tests.mutants.patching import Patch
from parity_tests.mutants.registry import mutant

_RUNGS = ("decoding",)
_ATTENTION = "*.attention"
_MODEL, _CACHE = "the model itself", "the cache"


def _recall(patch: Patch, change: Any) -> None:
    """``change(X, K, V, broken, options) -> (K, V, broken, options)`` in steps of decoding, of either attention."""
    depth: list[None] = []

    def stack(call: Any) -> Any:
        def stepping(self: Any, *args: Any, **options: Any) -> Any:
            depth.append(None)
            try:
                return call(self, *args, **options)
            finally:
                depth.pop()

        return stepping

    def recall(call: Any) -> Any:
        def changed(self: Any, X: Any, K: Any, V: Any, broken: Any, **options: Any) -> Any:
            if depth:
                new = change(X, K, V, broken, options)
                if new is not None:
                    patch.reached()
                    K, V, broken, options = new
            return call(self, X, K, V, broken, **options)

        return changed

    patch.method("stack", "TransformerStack", stack, name="_step", quiet=True)
    patch.method("attention", "AttentionLayer", recall, name="recall", quiet=True)


def _is_self(options: dict[str, Any]) -> bool:
    """Cross-attention has no positions."""
    return options.get("positions") is not None


def _allowed(patch: Patch, change: Any) -> None:
    """``change(allowed, X) -> allowed`` or None, in self-attention."""

    def changed(X: Any, K: Any, V: Any, broken: Any, options: dict[str, Any]) -> Any:
        new = change(options["allowed"], X) if _is_self(options) else None
        return None if new is None else (K, V, broken, options | {"allowed": new})

    _recall(patch, changed)


@mutant("M10", case="decoder", culprits=_ATTENTION, rungs=_RUNGS)
def mask_inverted_for_one_token(patch: Patch) -> None:
    """True = hidden, in the branch for single tokens."""
    _allowed(patch, lambda allowed, X: ~allowed if X.shape[1] == 1 else None)


@mutant("M19", case="llama", culprits=_ATTENTION, rungs=_RUNGS)
def causal_from_the_top_left(patch: Patch) -> None:
    """Query i of a chunk sees the keys up to i, whatever came before."""

    def change(allowed: Any, X: Any) -> Any:
        T, S = allowed.shape[-2:]
        return allowed & (patch.arange(S)[None, :] <= patch.arange(T)[:, None]) if 1 < T < S else None

    _allowed(patch, change)


@mutant("M20", case="decoder", culprits=_ATTENTION, rungs=_RUNGS)
def causal_flag_passed_on(patch: Patch) -> None:
    """A single query under a causal mask of its own: it sees the first key only."""
    _allowed(patch, lambda allowed, X: allowed & (patch.arange(allowed.shape[-1]) == 0) if X.shape[1] == 1 else None)


@mutant("M22", case="llama", culprits=_ATTENTION, rungs=_RUNGS)
def not_causal_with_a_cache(patch: Patch) -> None:
    """Several tokens at a time see one another, later ones too."""
    _allowed(patch, lambda allowed, X: allowed.any(-2)[..., None, :] if X.shape[1] > 1 else None)


@mutant("C1", case="decoder", culprits=_ATTENTION, rungs=_RUNGS)
def mask_of_another_offset(patch: Patch) -> None:
    """With padding on the left the mask is off by one slot."""
    _allowed(
        patch, lambda allowed, X: patch.xp.roll(allowed, 1, -1) | allowed if allowed.shape[-1] > X.shape[1] else None
    )


@mutant("C5", case="decoder", culprits=_ATTENTION, rungs=_RUNGS)
def another_kernel_for_one_query(patch: Patch) -> None:
    """Scores of a single query are not scaled."""

    def wrong(attend: Any) -> Any:
        def one(Q: Any, K: Any, V: Any, **options: Any) -> Any:
            if Q.shape[2] == 1 and K.shape[2] > 1:
                patch.reached()
                options["scale"] = 1.0
            return attend(Q, K, V, **options)

        return one

    patch.function("attention", "attend", wrong, quiet=True)


@mutant("P11", case="alibi", culprits="stack", rungs=_RUNGS)
def bias_over_the_queries(patch: Patch) -> None:
    """ALiBi for one query and one key: 0, which broadcasting spreads over all keys."""

    def wrong(call: Any) -> Any:
        def bias(self: Any, queries: Any, keys: Any, *more: Any) -> Any:
            return call(self, queries, queries if queries.shape[1] == 1 else keys, *more)

        return bias

    patch.method("stack", "TransformerStack", wrong, name="_position_bias" if patch.is_torch else "_bias")


@mutant("T92", case="decoder", culprits=_MODEL, rungs=_RUNGS)
def positions_begin_anew(patch: Patch) -> None:
    """Every step counts from 0."""

    def wrong(call: Any) -> Any:
        def step(self: Any, tokens: Any, cache: Any, *, positions: Any = None, **options: Any) -> Any:
            positions = patch.arange(tokens.shape[1])[None] if positions is None else positions
            return call(self, tokens, cache, positions=positions, **options)

        return step

    patch.method("models", "LanguageModel", wrong, name="step")


@mutant("T93", case="llama", culprits=_MODEL, rungs=_RUNGS)
def padding_has_positions(patch: Patch) -> None:
    """Positions follow the slots, not the real tokens."""

    def wrong(call: Any) -> Any:
        def step(self: Any, tokens: Any, cache: Any, *, positions: Any = None, **options: Any) -> Any:
            if positions is None:
                positions = patch.arange(tokens.shape[1])[None] + cache["step"]
            return call(self, tokens, cache, positions=positions, **options)

        return step

    patch.method("models", "LanguageModel", wrong, name="step")


@mutant("T94", case="decoder", culprits=_MODEL, rungs=_RUNGS)
def padding_counts(patch: Patch) -> None:
    """Within a step positions are right; what is counted for the next one includes the padding."""

    def wrong(call: Any) -> Any:
        def step(self: Any, tokens: Any, cache: Any, **options: Any) -> Any:
            before = cache["counted"] + 0
            logits, after = call(self, tokens, cache, **options)
            return logits, {**after, "counted": before + tokens.shape[1]}

        return step

    patch.method("models", "LanguageModel", wrong, name="step")


@mutant("T95", case="window", culprits=(_ATTENTION, "stack"), rungs=_RUNGS)
def window_of_the_cache_too_narrow(patch: Patch) -> None:
    """Off by one in the cached path only."""

    def torch_begin(call: Any) -> Any:
        return lambda cache, config, *more: call(cache, config.replace(window=config.window - 1), *more)

    def flax_open(call: Any) -> Any:
        return lambda *args, config, **options: call(*args, config=config.replace(window=config.window - 1), **options)

    if patch.is_torch:
        patch.function("cache", "_begin", torch_begin)
    else:
        patch.function("cache", "_open_cache", flax_open)


def _slots(patch: Patch, off: int) -> None:
    """Keys and values are written ``off`` slots from where the mask believes them."""

    def torch_begin(call: Any) -> Any:
        def begin(cache: Any, *more: Any) -> Any:
            step = call(cache, *more)
            return step._replace(slots=(step.slots + off) % cache["real"].shape[1])

        return begin

    def flax_keep(call: Any) -> Any:
        def keep(self: Any, *args: Any) -> Any:
            slots = dataclasses.replace(self.slots, step=self.slots.step + off)
            return call(dataclasses.replace(self, slots=slots), *args)

        return keep

    if patch.is_torch:
        patch.function("cache", "_begin", torch_begin)
    else:
        patch.method("cache", "_Places", flax_keep, name="keep")


@mutant("T96", case="window", culprits=(_ATTENTION, "stack", _CACHE), rungs=_RUNGS)
def ring_off_by_one(patch: Patch) -> None:
    _slots(patch, 1)


def _reset(patch: Patch, *kept: str) -> None:
    """These parts of a cache stay as they are."""

    def wrong(reset: Any) -> Any:
        def incomplete(cache: Any) -> Any:
            before = {name: cache[name] + 0 for name in kept}
            return {**reset(cache), **before}

        return incomplete

    patch.function("cache", "reset_cache", wrong)


@mutant("C3", case="decode-window", culprits=_CACHE, rungs=_RUNGS)
def nothing_reset(patch: Patch) -> None:
    """The flag of another object is reset: what was there is seen by the next sequence."""
    patch.function("cache", "reset_cache", lambda reset: lambda cache: cache)


@mutant("T97", case="decoder", culprits=_CACHE, rungs=_RUNGS)
def count_not_reset(patch: Patch) -> None:
    """The next sequence goes on with the positions of the last."""
    _reset(patch, "counted")


@mutant("C2", case="decoder", culprits=_CACHE, rungs=_RUNGS)
def buffers_of_another_shape(patch: Patch) -> None:
    """Keys as wide as all heads together, in a framework that writes what fits."""

    def wrong(init: Any) -> Any:
        def wide(model: Any, batch: Any, slots: Any, **options: Any) -> Any:
            cache = init(model, batch, slots, **options)
            for block in cache["blocks"].values():
                join = patch.xp.cat if patch.is_torch else patch.xp.concatenate
                block["keys"] = join((block["keys"], block["keys"]), -1)
            return cache

        return wide

    patch.function("cache", "init_cache", wrong)


def _reordered(patch: Patch, change: Any) -> None:
    """``change(before, after)`` of the cache when its rows are exchanged."""

    def wrong(reorder: Any) -> Any:
        return lambda cache, rows: change(cache, reorder(cache, rows))

    patch.function("cache", "reorder_cache", wrong)


@mutant("T98", case="encoder-decoder", culprits=_CACHE, rungs=_RUNGS)
def memory_not_reordered(patch: Patch) -> None:
    """Rows are exchanged, and read the source of those that stood there before."""
    _reordered(patch, lambda before, after: {**after, "memory": before["memory"]})


@mutant("T99", case="decoder", culprits=_CACHE, rungs=_RUNGS)
def values_not_reordered(patch: Patch) -> None:
    def change(before: Any, after: Any) -> Any:
        blocks = {
            name: {**block, "values": before["blocks"][name]["values"]} for name, block in after["blocks"].items()
        }
        return {**after, "blocks": blocks}

    _reordered(patch, change)


@mutant("T100", case="llama", culprits=_CACHE, rungs=_RUNGS)
def counts_not_reordered(patch: Patch) -> None:
    _reordered(patch, lambda before, after: {**after, "counted": before["counted"]})


@mutant("T101", case="encoder-decoder", culprits="*.cross_attention", rungs=_RUNGS)
def source_padding_seen(patch: Patch) -> None:
    """The mask of the memory is left out in steps."""

    def change(X: Any, K: Any, V: Any, broken: Any, options: dict[str, Any]) -> Any:
        return None if _is_self(options) else (K, V, broken, options | {"allowed": None})

    _recall(patch, change)


@mutant("T102", case="decoder", culprits=_CACHE, rungs=_RUNGS)
def broken_keys_forgotten(patch: Patch) -> None:
    """A token that is not finite leaves zeros in the cache, and nobody knows."""
    _recall(patch, lambda X, K, V, broken, options: (K, V, broken & False, options) if _is_self(options) else None)


@mutant("T103", case="t5", culprits="decoder", rungs=_RUNGS)
def bias_by_slots(patch: Patch) -> None:
    """Relative positions of what is remembered, counted over slots."""

    def wrong(call: Any) -> Any:
        def bias(self: Any, queries: Any, keys: Any, *more: Any) -> Any:
            if keys is not queries and keys.shape[1] != queries.shape[1]:
                keys = patch.arange(keys.shape[1])[None]
            return call(self, queries, keys, *more)

        return bias

    patch.method("stack", "TransformerStack", wrong, name="_position_bias" if patch.is_torch else "_bias")


@mutant("T104", case="decoder", culprits=_MODEL, rungs=_RUNGS)
def always_the_last_place(patch: Patch) -> None:
    """Logits of the last place, whichever was asked for."""

    def wrong(call: Any) -> Any:
        def step(self: Any, tokens: Any, cache: Any, *, at: Any = None, **options: Any) -> Any:
            at = at if at is None else at * 0 + (tokens.shape[1] - 1)
            return call(self, tokens, cache, at=at, **options)

        return step

    patch.method("models", "LanguageModel", wrong, name="step")


@mutant("T105", case="llama", culprits=(_CACHE, "*.attention", _MODEL), rungs=_RUNGS)
def keys_not_turned(patch: Patch) -> None:
    """Rotary for queries only: keys are kept as they were before."""
    depth: list[None] = []

    def stack(call: Any) -> Any:
        def stepping(self: Any, *args: Any, **options: Any) -> Any:
            depth.append(None)
            try:
                return call(self, *args, **options)
            finally:
                depth.pop()

        return stepping

    def remember(call: Any) -> Any:
        def unturned(self: Any, M: Any, *, positions: Any = None) -> Any:
            if depth:
                patch.reached()
            return call(self, M, positions=None if depth else positions)

        return unturned

    patch.method("stack", "TransformerStack", stack, name="_step", quiet=True)
    patch.method("attention", "AttentionLayer", remember, name="remember", quiet=True)
