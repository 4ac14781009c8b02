"""Writing: streams, scores, searches and second calls, where what is usually asked does not show a fault."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from parity_tests.mutants.patching import Patch
from parity_tests.mutants.registry import mutant
from parity_tests.mutants.sampling import _generator
from twinformer.decoding import StopConfig

_SAMPLING, _BEAMS = ("sampling",), ("beams",)
_CASE = "write-decoder"
_BLOCK = 64  # slots that are looked at, or moved, at a time


# ---- streams


def _stream(patch: Patch, **other: Any) -> None:
    """A stream that is asked for something else."""
    patch.method(
        "generation",
        "Generator",
        lambda call: lambda self, prompts, **options: call(self, prompts, **(options | other)),
        name="stream",
    )


@mutant("T160", case=_CASE, culprits="Generator.stream", rungs=_BEAMS)
def streams_are_greedy(patch: Patch) -> None:
    _stream(patch, sampling=None)


@mutant("T161", case=_CASE, culprits="Generator.stream", rungs=_BEAMS)
def streams_number_their_rows_anew(patch: Patch) -> None:
    _stream(patch, rows=None)


# ---- scores


def _score(patch: Patch, change: Any) -> None:
    """``change(score, model, args, options)`` in its place."""
    patch.function(
        "generation",
        "score",
        lambda score: lambda model, *args, **options: change(score, model, args, options),
    )


@mutant("T162", case=_CASE, culprits="score", rungs=_BEAMS)
def holes_of_continuations_read(patch: Patch) -> None:
    """Only padding at the end is left out; what stands before a real token is taken for one."""

    def change(score: Any, model: Any, args: Any, options: Any) -> Any:
        mask = np.asarray(options["continuation_mask"])
        filled = np.logical_or.accumulate(mask[:, ::-1], 1)[:, ::-1].copy()
        found = score(model, *args, **(options | {"continuation_mask": filled}))
        return found * patch.array(mask, found)

    _score(patch, change)


@mutant("T166", case=_CASE, culprits="score", rungs=_BEAMS)
def scores_in_the_dtype_of_the_model(patch: Patch) -> None:
    def change(score: Any, model: Any, args: Any, options: Any) -> Any:
        return patch.cast(score(model, *args, **options), model.config.compute_dtype)

    _score(patch, change)


@mutant("T172", case=_CASE, culprits="score", rungs=_BEAMS)
def scores_widened_too_late(patch: Patch) -> None:
    """In a wide dtype, with the digits of the narrow one."""

    def change(score: Any, model: Any, args: Any, options: Any) -> Any:
        found = score(model, *args, **options)
        return patch.array(patch.cast(found, model.config.compute_dtype), found)

    _score(patch, change)


# ---- generators


@mutant("T163", case="train-encoder-decoder", culprits="Generator", rungs=_SAMPLING)
def first_source_of_a_shape_kept(patch: Patch) -> None:
    def change(call: Any, self: Any, prompts: Any, options: Any) -> Any:
        source = options["source"]
        kept = self.__dict__.setdefault("_kept", {}).setdefault(source.shape, source)
        return call(self, prompts, **(options | {"source": kept}))

    _generator(patch, change)


@mutant("T169", case=_CASE, culprits="Generator", rungs=_SAMPLING)
def numbers_of_the_first_call_kept(patch: Patch) -> None:
    def change(call: Any, self: Any, prompts: Any, options: Any) -> Any:
        rows = self.__dict__.setdefault("_kept", options.get("rows"))
        return call(self, prompts, **(options | {"rows": rows}))

    _generator(patch, change)


@mutant("T164", case=_CASE, culprits="Generator", rungs=_SAMPLING)
def first_stop_token_only(patch: Patch) -> None:
    def change(call: Any, self: Any, prompts: Any, options: Any) -> Any:
        stop = options.get("stop", StopConfig())
        return call(self, prompts, **(options | {"stop": dataclasses.replace(stop, tokens=stop.tokens[:1])}))

    _generator(patch, change)


@mutant("T168", case=_CASE, culprits="Generator", rungs=_SAMPLING)
def one_step_after_all_rows_are_finished(patch: Patch) -> None:
    def change(call: Any, self: Any, prompts: Any, options: Any) -> Any:
        found = call(self, prompts, **options)
        filler = np.full((len(found.tokens), 1), options.get("pad_id", 0))
        return dataclasses.replace(
            found,
            tokens=np.concatenate((found.tokens, filler), 1),
            logprobs=np.concatenate((found.logprobs, np.zeros_like(found.logprobs[:, :1])), 1),
        )

    _generator(patch, change)


# ---- choices


def _highest_where_infinite(patch: Patch, logits: Any, found: Any) -> Any:
    x = patch.xp.asarray(logits)
    return patch.xp.where((x == patch.xp.inf).any(-1), patch.array(x.argmax(-1), found), found)


@mutant("T170", case=_CASE, culprits="greedy", rungs=_SAMPLING)
def infinity_is_the_likeliest(patch: Patch) -> None:
    patch.function(
        "sampling",
        "greedy",
        lambda greedy: lambda logits: _highest_where_infinite(patch, logits, greedy(logits)),
    )


@mutant("T171", case=_CASE, culprits="draw", rungs=_SAMPLING)
def infinity_is_drawn(patch: Patch) -> None:
    patch.function(
        "sampling",
        "draw",
        lambda draw: lambda logits, uniforms: _highest_where_infinite(patch, logits, draw(logits, uniforms)),
    )


# ---- beams


@mutant("T165", case=_CASE, culprits="beam_search", rungs=_BEAMS)
def beams_of_all_rows_allowed_what_the_first_is(patch: Patch) -> None:
    def wrong(search: Any) -> Any:
        return lambda *args, **options: search(*args, **(options | {"allowed": options["allowed"][:1]}))

    patch.function("beam", "beam_search", wrong)


@mutant("T167", case="low-decoder", culprits="beam_search", rungs=_BEAMS)
def beams_exchanged_in_the_first_block_of_slots(patch: Patch) -> None:
    """What a hypothesis remembers beyond is another's."""

    def within(call: Any) -> Any:
        return lambda cache, rows, end, *, memory: call(cache, rows, min(end, _BLOCK), memory=memory)

    def reordered(call: Any) -> Any:
        def changed(cache: Any, rows: Any) -> Any:
            new = call(cache, rows)
            if new["real"].shape != cache["real"].shape:
                return new  # from prompts to hypotheses
            blocks = {
                i: {
                    name: joined(part, cache["blocks"][i][name], 1 if name == "broken" else 2)
                    for name, part in of.items()
                }
                for i, of in new["blocks"].items()
            }
            marks = {name: joined(new[name], cache[name], 1) for name in ("real", "positions")}
            return {**new, **marks, "blocks": blocks}

        return changed

    def joined(new: Any, old: Any, axis: int) -> Any:
        everywhere = (slice(None),) * axis
        parts = new[(*everywhere, slice(_BLOCK))], old[(*everywhere, slice(_BLOCK, None))]
        return patch.xp.concatenate(parts, axis)

    if patch.is_torch:
        patch.function("cache", "_reorder_within", within)
    else:
        patch.function("cache", "reorder_cache", reordered)
