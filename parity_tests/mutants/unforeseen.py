"""Faults that reviewers thought of and that the ladder of their time passed over: each has a check since."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from parity_tests.mutants.altered import alone, update
from parity_tests.mutants.decoding import _allowed
from parity_tests.mutants.dropout import _dropout
from parity_tests.mutants.patching import Patch
from parity_tests.mutants.registry import mutant
from parity_tests.mutants.sampling import _generator, _hide, _processor

_MANY = 256  # tokens from which on a row is long
_LONG, _SAMPLING, _ADAPTERS = ("long",), ("sampling",), ("adapters",)
_ALL = "every update"


# ---- long rows


def _masked(patch: Patch, change: Any) -> None:
    """``change(allowed) -> allowed`` of long rows, in the kernel that a twin takes for these."""

    def wrong(attention: Any) -> Any:
        def changed(Q: Any, K: Any, V: Any, **options: Any) -> Any:
            allowed = options.get("allowed")
            if allowed is not None and Q.shape[2] >= _MANY and allowed.shape[-2:] == (Q.shape[2], K.shape[2]):
                patch.reached()
                options["allowed"] = change(patch.xp.asarray(allowed))
            return attention(Q, K, V, **options)

        return changed

    file, name = ("fused", "attention") if patch.is_torch else ("attention", "attend_causally")
    patch.function(file, name, wrong, quiet=True)


@mutant("T136", case="long-window", culprits=("stack", "*.attention"), rungs=_LONG)
def window_one_narrower_in_long_rows(patch: Patch) -> None:
    """A key is hidden where the one before it is: the first that a query sees, unless it is the row's first."""

    def change(allowed: Any) -> Any:
        before = patch.xp.roll(allowed, 1, -1)
        return allowed & (before | (patch.arange(allowed.shape[-1]) == 0))

    _masked(patch, change)


@mutant("T137", case="long-dropout", culprits="*.attention", rungs=_LONG)
def weights_of_long_rows_not_dropped(patch: Patch) -> None:
    def wrong(attend: Any) -> Any:
        def changed(Q: Any, *args: Any, **options: Any) -> Any:
            is_long = Q.shape[2] >= _MANY
            return attend(Q, *args, **(options | {"rng": None} if is_long else options))

        return changed

    patch.function("attention", "attend", wrong)


@mutant("T138", case="long-window", culprits=("stack", "*.attention"), rungs=_LONG)
def window_taken_for_the_causal_mask(patch: Patch) -> None:
    """Nothing of the future and the whole diagonal: that must be it."""
    _masked(patch, lambda allowed: patch.xp.tril(patch.xp.ones_like(allowed)))


@mutant("T139", case="long-dropout", culprits="*.dropout", rungs=_LONG)
def pieces_dropped_under_one_key(patch: Patch) -> None:
    """Rows in pieces of 128 tokens, all of them with the same numbers."""

    def change(call: Any, self: Any, X: Any, rng: Any) -> Any:
        if X.ndim != 3 or X.shape[1] <= 128:
            return call(self, X, rng)
        pieces = [call(self, X[:, begin : begin + 128], rng) for begin in range(0, X.shape[1], 128)]
        return patch.xp.concatenate(pieces, 1)

    _dropout(patch, change)


# ---- ways of running it


@mutant(
    "T140", case="dropout-layers", culprits="flax_impl, scan of remat", rungs=("compilation",), twins=("flax_impl",)
)
def one_key_for_all_turns_of_remat(patch: Patch) -> None:
    """In a loop over blocks that are computed again every block drops what the first one does."""

    def scanned(call: Any) -> Any:
        def first(run: Any, blocks: Any, keys: Any, *args: Any) -> Any:
            is_remat = run is patch.file("stack")._rematerialised
            return call(run, blocks, [keys[0]] * len(keys) if is_remat else keys, *args)

        return first

    patch.function("stack", "_scanned", scanned)


@mutant(
    "T153",
    case="dropout-layers",
    culprits="torch_impl, compiled trainer",
    rungs=("compilation",),
    twins=("torch_impl",),
)
def compiled_trainer_keeps_its_first_key(patch: Patch) -> None:
    def wrong(compiled: Any) -> Any:
        def made(function: Any, **options: Any) -> Any:
            call, kept = compiled(function, **options), []

            def baked(*args: Any) -> Any:
                kept.append(args[-1])
                return call(*args[:-1], kept[0])

            return baked

        return made

    patch.function("training", "_compiled", wrong)


@mutant("T141", case="dropout", culprits="dropout", rungs=("stochastic",))
def factor_of_dropout_rounded(patch: Patch) -> None:
    def change(call: Any, self: Any, X: Any, rng: Any) -> Any:
        kept = call(self, patch.xp.ones_like(X), rng) != 0
        return patch.xp.where(kept, X * patch.array(np.float64(1 / (1 - self.rate)), X), patch.xp.zeros_like(X))

    _dropout(patch, change)


@mutant("T142", case="decoder", culprits="*.attention", rungs=("nonfinite",))
def overflowing_values_not_marked(patch: Patch) -> None:
    """A row is broken where it comes so or its key overflows; of a value that does, 0 is left."""

    def remember(call: Any) -> Any:
        def changed(self: Any, M: Any, **options: Any) -> Any:
            quarantine = patch.file("attention").quarantine
            K, V, _ = call(self, M, **options)
            M, broken = quarantine(M)
            return K, V, broken | quarantine(M @ patch.weight(self.key).T)[1]

        return changed

    patch.method("attention", "AttentionLayer", remember, name="remember")


# ---- writing


@mutant("T143", case="write-decoder", culprits="Generator", rungs=_SAMPLING)
def stop_sequence_begins_in_the_prompt(patch: Patch) -> None:
    def change(call: Any, self: Any, prompts: Any, options: Any) -> Any:
        found = call(self, prompts, **options)
        lengths, finished = found.lengths.copy(), found.finished.copy()
        for sequence in options["stop"].sequences if "stop" in options else ():
            for b, row in enumerate(found.tokens):
                across = (*prompts[b].tolist(), *row.tolist())
                for end in range(1, min(len(sequence), int(lengths[b]) + 1)):
                    whole = prompts.shape[1] + end
                    if across[whole - len(sequence) : whole] == tuple(sequence):
                        lengths[b], finished[b] = end, True
        return dataclasses.replace(found, lengths=lengths, finished=finished)

    _generator(patch, change)


@mutant("T144", case="write-decoder", culprits="TopP", rungs=_SAMPLING)
def all_rows_cut_with_the_first_that_is_content(patch: Patch) -> None:
    """The likeliest 1,024 tokens are enough for all rows if they are for one."""

    def change(call: Any, self: Any, x: Any, seen: Any) -> Any:
        y = call(self, x, seen)
        if y.shape[-1] <= 1024:
            return y
        kept = y > -patch.xp.inf
        ordered = patch.xp.sort(y, -1)
        least = (ordered.values if patch.is_torch else ordered)[..., -1024][..., None]
        return _hide(patch, y, kept & ((y >= least) | ~(kept.sum(-1) <= 1024).any()))

    _processor(patch, "TopP", change)


@mutant("T145", case="write-decoder", culprits=("draw", "RepetitionPenalty", "Temperature", "TopP"), rungs=_SAMPLING)
def logits_not_widened(patch: Patch) -> None:
    patch.function("sampling", "_wide", lambda wide: lambda logits: logits)


@mutant("T146", case="decode-window", culprits="*.attention", rungs=("decoding",))
def chunk_of_two_overwrites_what_it_needs(patch: Patch) -> None:
    """The ring has room for one: what only the first of two queries sees is gone."""

    def change(allowed: Any, X: Any) -> Any:
        if X.shape[1] != 2:
            return None
        return allowed & (allowed[..., 1:, :] | (patch.arange(2)[:, None] == 1))

    _allowed(patch, change)


# ---- training


@mutant("T147", case="train-decoder", culprits="evaluation*", rungs=_ADAPTERS)
def evaluation_over_all_tokens(patch: Patch) -> None:
    def wrong(call: Any) -> Any:
        return lambda self, state, batch: call(self, state, dataclasses.replace(batch, allowed=None))

    patch.method("training", "Trainer", wrong, name="evaluate")


@mutant("T148", case="train-decoder", culprits="loss", rungs=_ADAPTERS)
def loss_over_all_tokens(patch: Patch) -> None:
    def wrong(call: Any) -> Any:
        return lambda self, state, batches: call(self, state, [dataclasses.replace(b, allowed=None) for b in batches])

    patch.method("training", "Trainer", wrong, name="step")


@mutant("T149", case="train-decoder", culprits=("gradient norm", "loss"), rungs=_ADAPTERS)
def adapters_scaled_by_the_root_of_the_rank(patch: Patch) -> None:
    def wrong(merge: Any) -> Any:
        def scaled(weights: Any, adapters: Any, config: Any) -> Any:
            return merge(weights, adapters, dataclasses.replace(config, alpha=config.alpha * math.sqrt(config.rank)))

        return scaled

    patch.function("lora", "merge", wrong)


@mutant("T150", case="train-decoder", culprits="adamw in float32", rungs=("optimizer",))
def bias_correction_cancels(patch: Patch) -> None:
    """``1 - beta2ᵗ`` in float32: right to four digits."""

    def change(call: Any, self: Any, parameters: Any, gradients: Any, state: Any, lr: Any) -> Any:
        before = {path: leaf + 0 for path, leaf in parameters.items()}
        t = state["step"] + 1
        after, state = call(self, parameters, gradients, state, lr)
        if self.config.name != "adamw":
            return after, state
        # the update goes with the root of what its square is divided by
        factors = {
            path: ((1 - patch.array(np.float64(self.config.beta2), leaf) ** t) / (1 - self.config.beta2**t)) ** 0.5
            for path, leaf in after.items()
        }
        return {path: before[path] + (leaf - before[path]) * factors[path] for path, leaf in after.items()}, state

    update(patch, change)


@mutant("T151", case="train-decoder", culprits="sgd without a look ahead", rungs=("optimizer",))
def momentum_with_dampening(patch: Patch) -> None:
    """``b ← μ b + (1 - μ) g`` where there is no look ahead."""

    def change(call: Any, self: Any, parameters: Any, gradients: Any, state: Any, lr: Any) -> Any:
        if self.config.name == "sgd" and not self.config.nesterov:
            gradients = {path: g * (1 - self.config.momentum) for path, g in gradients.items()}
        return call(self, parameters, gradients, state, lr)

    update(patch, change)


@mutant("T152", case="train-decoder", culprits=("loss", "gradient"), rungs=("accumulation",))
def loss_not_widened(patch: Patch) -> None:
    alone(patch, "losses", "wide_dtype", lambda wide: lambda dtype: dtype)
