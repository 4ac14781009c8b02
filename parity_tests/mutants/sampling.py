"""Sampling and beam search: processors, draws, numbers, ends, hypotheses."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

from parity_tests.mutants.patching import Patch
from parity_tests.mutants.registry import mutant
from twinformer.decoding import BeamConfig, StopConfig

_RUNGS, _BEAMS = ("sampling",), ("beams",)
_CASE = "write-decoder"


def _processor(patch: Patch, name: str, change: Any) -> None:
    """``change(call, self, x, seen)`` in the place of a processor; x is wide."""

    def wrong(call: Any) -> Any:
        return lambda self, logits, seen: change(call, self, patch.file("sampling")._wide(logits), seen)

    patch.method("sampling", name, wrong, name="__call__")


def _hide(patch: Patch, x: Any, kept: Any) -> Any:
    return patch.xp.where(kept, x, patch.xp.full_like(x, -patch.xp.inf))


@mutant("C6", case=_CASE, culprits="TopP", rungs=_RUNGS)
def crossing_token_dropped(patch: Patch) -> None:
    """What reaches p is not part of the set, unless it is alone."""

    def change(call: Any, self: Any, x: Any, seen: Any) -> Any:
        y = call(self, x, seen)
        if self.p == 1:
            return y
        kept = y > -patch.xp.inf
        V = y.shape[-1]
        # the last of the order: the lowest logit, and of equals the highest id
        lowest = patch.flip(patch.xp.where(kept, y, patch.xp.full_like(y, patch.xp.inf)), -1).argmin(-1)
        is_last = patch.arange(V) == (V - 1 - lowest)[..., None]
        return _hide(patch, y, kept & ~(is_last & (kept.sum(-1) > 1)[..., None]))

    _processor(patch, "TopP", change)


@mutant("C11", case=_CASE, culprits="processors", rungs=_RUNGS)
def nucleus_of_all_logits(patch: Patch) -> None:
    """Top-p looks at the whole distribution, top-k comes after it."""

    def wrong(processors: Any) -> Any:
        def exchanged(config: Any) -> Any:
            made = list(processors(config))
            names = [type(one).__name__ for one in made]
            if "TopK" in names and "TopP" in names:
                i, j = names.index("TopK"), names.index("TopP")
                made[i], made[j] = made[j], made[i]
            return tuple(made)

        return exchanged

    patch.function("sampling", "processors", wrong)


@mutant("T106", case=_CASE, culprits="processors", rungs=_RUNGS)
def processors_in_reverse(patch: Patch) -> None:
    patch.function("sampling", "processors", lambda processors: lambda config: tuple(reversed(processors(config))))


@mutant("T107", case=_CASE, culprits="TopK", rungs=_RUNGS)
def ties_stay(patch: Patch) -> None:
    """All tokens as high as the k-th stay."""

    def change(call: Any, self: Any, x: Any, seen: Any) -> Any:
        y = call(self, x, seen)
        lowest = patch.xp.where(y > -patch.xp.inf, y, patch.xp.full_like(y, patch.xp.inf))
        lowest = lowest.amin(-1) if patch.is_torch else lowest.min(-1)
        return _hide(patch, x, x >= lowest[..., None])

    _processor(patch, "TopK", change)


@mutant("T108", case=_CASE, culprits="MinP", rungs=_RUNGS)
def share_of_the_whole(patch: Patch) -> None:
    """min-p held against the probability itself, not against the highest."""

    def change(call: Any, self: Any, x: Any, seen: Any) -> Any:
        highest = (x.amax(-1) if patch.is_torch else x.max(-1))[..., None]
        mass = patch.xp.exp(x - highest)
        share = mass / mass.sum(-1)[..., None]
        return _hide(patch, x, (share >= self.p) | (x == highest))

    _processor(patch, "MinP", change)


@mutant("T109", case=_CASE, culprits="RepetitionPenalty", rungs=_RUNGS)
def negative_logits_divided_too(patch: Patch) -> None:
    """A negative logit that is divided becomes likelier."""
    _processor(
        patch,
        "RepetitionPenalty",
        lambda call, self, x, seen: patch.xp.where(
            seen if patch.is_torch else patch.xp.asarray(seen), x / self.penalty, x
        ),
    )


@mutant("T110", case=_CASE, culprits="Temperature", rungs=_RUNGS)
def multiplied_by_the_temperature(patch: Patch) -> None:
    _processor(patch, "Temperature", lambda call, self, x, seen: x * self.t)


@mutant("T111", case=_CASE, culprits="greedy", rungs=_RUNGS)
def last_of_equals(patch: Patch) -> None:
    def wrong(greedy: Any) -> Any:
        def last(logits: Any) -> Any:
            found = greedy(patch.flip(logits, -1))
            return patch.xp.where(found < 0, found, logits.shape[-1] - 1 - found)

        return last

    patch.function("sampling", "greedy", wrong)


@mutant("T112", case=_CASE, culprits="draw", rungs=_RUNGS)
def at_least_instead_of_above(patch: Patch) -> None:
    """``cumulative >= u · total``: a number on the boundary belongs to the token before it."""
    patch.function(
        "sampling",
        "draw",
        lambda draw: lambda logits, uniforms: draw(logits, patch.cast(uniforms, "float64") - 2.0**-40),
    )


@mutant("T113", case=_CASE, culprits="draw", rungs=_RUNGS)
def drawn_in_the_order_of_logits(patch: Patch) -> None:
    """The cumulative sum runs over sorted tokens: as likely, and others."""

    def wrong(draw: Any) -> Any:
        def ordered(logits: Any, uniforms: Any) -> Any:
            order = patch.xp.argsort(-logits, -1)
            take = patch.xp.take_along_dim if patch.is_torch else patch.xp.take_along_axis
            place = draw(take(logits, order, -1), uniforms)
            first = patch.xp.where(place < 0, place * 0, place)[..., None]
            return patch.xp.where(place < 0, place, take(order, first, -1)[..., 0])

        return ordered

    patch.function("sampling", "draw", wrong)


@mutant("T114", case=_CASE, culprits="uniforms", rungs=_RUNGS)
def steps_counted_from_one(patch: Patch) -> None:
    patch.function("sampling", "uniforms", lambda uniforms: lambda keys, step: uniforms(keys, step + 1))


@mutant("T115", case=_CASE, culprits="uniforms", rungs=_RUNGS)
def half_of_the_seed(patch: Patch) -> None:
    """Only 32 bits of it."""
    patch.function("sampling", "sequence_keys", lambda keys: lambda seed, rows: keys(seed % 2**32, rows))


@mutant("T116", case=_CASE, culprits="uniforms", rungs=_RUNGS)
def numbers_by_the_place_in_the_batch(patch: Patch) -> None:
    """A sequence is continued otherwise in other company."""
    patch.function("sampling", "sequence_keys", lambda keys: lambda seed, rows: keys(seed, patch.arange(rows.shape[0])))


@mutant("T117", case=_CASE, culprits="uniforms", rungs=_RUNGS)
def one_number_for_all_rows(patch: Patch) -> None:
    patch.function("sampling", "sequence_keys", lambda keys: lambda seed, rows: keys(seed, rows * 0))


def _generator(patch: Patch, change: Any) -> None:
    """``change(call, self, prompts, options)`` in the place of a generator's call."""

    def wrong(call: Any) -> Any:
        return lambda self, prompts, **options: change(call, self, prompts, options)

    patch.method("generation", "Generator", wrong, name="__call__")


@mutant("T118", case=_CASE, culprits="Generator", rungs=_RUNGS)
def stop_token_not_counted(patch: Patch) -> None:
    def change(call: Any, self: Any, prompts: Any, options: Any) -> Any:
        found = call(self, prompts, **options)
        return dataclasses.replace(found, lengths=found.lengths - found.finished)

    _generator(patch, change)


@mutant("T119", case=_CASE, culprits="Generator", rungs=_RUNGS)
def stop_sequences_ignored(patch: Patch) -> None:
    def change(call: Any, self: Any, prompts: Any, options: Any) -> Any:
        stop = options.get("stop", StopConfig())
        return call(self, prompts, **(options | {"stop": dataclasses.replace(stop, sequences=())}))

    _generator(patch, change)


@mutant("T120", case=_CASE, culprits="Generator", rungs=_RUNGS)
def everything_allowed(patch: Patch) -> None:
    _generator(patch, lambda call, self, prompts, options: call(self, prompts, **(options | {"allowed": None})))


@mutant("T121", case=_CASE, culprits="Generator", rungs=_RUNGS)
def padding_of_prompts_read(patch: Patch) -> None:
    _generator(patch, lambda call, self, prompts, options: call(self, prompts, **(options | {"padding_mask": None})))


@mutant("T122", case=_CASE, culprits="Generator", rungs=_RUNGS)
def last_stop_sequence_only(patch: Patch) -> None:
    """All rows end where the first sequence is found, and the others are not looked for."""

    def change(call: Any, self: Any, prompts: Any, options: Any) -> Any:
        stop = options.get("stop", StopConfig())
        return call(self, prompts, **(options | {"stop": dataclasses.replace(stop, sequences=stop.sequences[-1:])}))

    _generator(patch, change)


@mutant("T123", case=_CASE, culprits="score", rungs=_BEAMS)
def score_reads_padding(patch: Patch) -> None:
    def wrong(score: Any) -> Any:
        return lambda *args, **options: score(*args, **(options | {"padding_mask": None}))

    patch.function("generation", "score", wrong)


# ---- beams


def _beam(patch: Patch, change: Any) -> None:
    """``change(beam) -> beam`` before a search."""

    def wrong(search: Any) -> Any:
        return lambda *args, beam, **options: search(*args, beam=change(beam), **options)

    patch.function("beam", "beam_search", wrong)


@mutant("C8", case=_CASE, culprits="beam_search", rungs=_BEAMS)
def penalties_exchanged(patch: Patch) -> None:
    """``length^alpha`` and ``((5 + length) / 6)^alpha``."""
    others = {"mean": "gnmt", "gnmt": "mean"}
    _beam(patch, lambda beam: dataclasses.replace(beam, length_penalty=others.get(beam.length_penalty, "none")))


@mutant("C10", case=_CASE, culprits="beam_search", rungs=_BEAMS)
def best_possible_score_too_low(patch: Patch) -> None:
    """What a live hypothesis can reach, over the factor of a length of 1: the search ends too early."""

    def settled(call: Any) -> Any:
        def early(self: Any, best: Any) -> Any:
            factors = self._beam.length_factor(self._max_new_tokens) / self._beam.length_factor(1)
            return call(self, best * factors)

        return early

    def select(call: Any) -> Any:
        def early(logits: Any, live: Any, pool: Any, ask: Any, rules: Any, num_best: int) -> Any:
            return call(logits, live, pool, ask, rules._replace(factors=_Third(rules.factors)), num_best)

        return early

    if patch.is_torch:
        patch.method("beam", "_Row", settled, name="is_settled")
    else:
        patch.function("beam", "_select", select)


class _Third:
    """Factors by length, of which the third that is asked for is the one of length 1."""

    def __init__(self, factors: Any) -> None:
        self._factors, self._asked = factors, 0

    def __len__(self) -> int:
        return len(self._factors)

    def __getitem__(self, length: Any) -> Any:
        self._asked += 1
        return self._factors[1] if self._asked == 3 else self._factors[length]


class _Short(BeamConfig):
    def length_factor(self, length: int) -> float:
        return super().length_factor(max(length - 1, 1))


@mutant("T124", case=_CASE, culprits="beam_search", rungs=_BEAMS)
def length_without_the_stop_token(patch: Patch) -> None:
    _beam(patch, lambda beam: _Short(**vars(beam)))


@mutant("T125", case=_CASE, culprits="beam_search", rungs=_BEAMS)
def beam_keeps_its_width(patch: Patch) -> None:
    """A hypothesis that finishes makes room for another, though the beam should shrink."""
    _beam(patch, lambda beam: dataclasses.replace(beam, shrink=False))


@mutant("T126", case=_CASE, culprits="beam_search", rungs=_BEAMS)
def ties_in_reverse(patch: Patch) -> None:
    """Of equal continuations the last comes first."""

    def torch_first(first: Any) -> Any:
        return lambda x, count: x.shape[-1] - 1 - first(x.flip(-1), count)

    def top_k(x: Any, count: int) -> Any:
        import jax

        patch.reached()
        values, places = jax.lax.top_k(patch.flip(x, -1), count)
        return values, x.shape[-1] - 1 - places

    if patch.is_torch:
        patch.function("sampling", "_first", torch_first)
    else:
        whole = patch.file("beam").jax
        lax = types.SimpleNamespace(**(vars(whole.lax) | {"top_k": top_k}))
        patch._set(patch.file("beam"), "jax", types.SimpleNamespace(**(vars(whole) | {"lax": lax})))


@mutant("T127", case=_CASE, culprits="beam_search", rungs=_BEAMS)
def beams_write_what_is_not_allowed(patch: Patch) -> None:
    def wrong(search: Any) -> Any:
        return lambda *args, **options: search(*args, **(options | {"allowed": None}))

    patch.function("beam", "beam_search", wrong)


@mutant("T128", case=_CASE, culprits="beam_search", rungs=_BEAMS)
def one_hypothesis_fewer(patch: Patch) -> None:
    """A beam one narrower, filled up with its last hypothesis."""

    def wrong(search: Any) -> Any:
        def narrow(*args: Any, beam: Any, **options: Any) -> Any:
            width = beam.width - 1
            found = search(
                *args, beam=dataclasses.replace(beam, width=width, num_best=min(beam.num_best, width)), **options
            )
            rows = [*range(found.lengths.shape[1]), found.lengths.shape[1] - 1][: beam.num_best]
            return dataclasses.replace(found, **{name: part[:, rows] for name, part in vars(found).items()})

        return narrow

    patch.function("beam", "beam_search", wrong)
