"""Faults that reviewers thought of and that the ladder of their time passed over: each has a check since."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import torch

from parity_tests.mutants.altered import alone, optimizer, update
from parity_tests.mutants.decoding import _allowed
from parity_tests.mutants.dropout import _dropout
from parity_tests.mutants.optimizers import _factor
from parity_tests.mutants.patching import Patch
from parity_tests.mutants.registry import mutant
from parity_tests.mutants.sampling import _generator, _hide, _processor
from twinformer.learning import OptimizerConfig

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


@mutant("T149", case="train-decoder", culprits=("gradient norm", "merged weights"), rungs=_ADAPTERS)
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


# ---- where every option is as nobody leaves it


@mutant("T176", case="long-window", culprits=("stack", "*.attention"), rungs=_LONG)
def padding_of_other_rows_in_long_rows(patch: Patch) -> None:
    """One mask for all rows of a batch: what any of them sees."""
    _masked(patch, lambda allowed: patch.xp.ones_like(allowed) & allowed.any(0)[None])


@mutant("T177", case="wide-window", culprits=("stack", "*.attention"), rungs=_LONG)
def piece_meets_one_before_it(patch: Patch) -> None:
    """However far the window reaches, a query sees 67 keys at most."""

    def change(allowed: Any) -> Any:
        place = patch.arange(allowed.shape[-1])
        return allowed & (place[:, None] - place < 67)

    _masked(patch, change)


@mutant("T178", case="train-decoder", culprits=("loss", "gradient norm"), rungs=_ADAPTERS)
def one_key_for_steps_of_one_batch(patch: Patch) -> None:
    """Keys are folded where gradients are accumulated, and nowhere else."""
    single: list[bool] = [False]

    def step(call: Any) -> Any:
        def watching(self: Any, state: Any, batches: Any) -> Any:
            single[0] = len(batches) == 1
            return call(self, state, batches)

        return watching

    patch.method("training", "Trainer", step, name="step", quiet=True)
    alone(patch, "training", "fold", lambda fold: lambda key, number: fold(key, number * (0 if single[0] else 1)))


@mutant("T179", case="train-decoder", culprits="parameter", rungs=("accumulation",))
def parameters_not_rounded_from_masters(patch: Patch) -> None:
    def change(call: Any, self: Any, parameters: Any, gradients: Any, state: Any, lr: Any) -> Any:
        before = {path: leaf + 0 for path, leaf in parameters.items()}
        after, state = call(self, parameters, gradients, state, lr)
        if not state.get("master"):
            return after, state
        if patch.is_torch:
            for path, leaf in after.items():
                leaf.data.copy_(before[path])
            return after, state
        return before, state

    update(patch, change)


@mutant("T180", case="train-decoder", culprits="gradient", rungs=("accumulation",))
def cotangent_of_the_loss_ignored(patch: Patch) -> None:
    class One(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, cotangent: Any) -> Any:
            return torch.ones_like(cotangent)

    @jax.custom_vjp
    def one(x: Any) -> Any:
        return x

    one.defvjp(lambda x: (x, None), lambda _, cotangent: (cotangent * 0 + 1,))

    def wrong(cross_entropy: Any) -> Any:
        def ignoring(*args: Any, **options: Any) -> Any:
            total, count = cross_entropy(*args, **options)
            return (One.apply(total) if patch.is_torch else one(total)), count

        return ignoring

    patch.function("losses", "cross_entropy", wrong)


@mutant("T181", case="train-decoder", culprits="clipping", rungs=("optimizer",))
def norm_that_is_not_finite_let_through(patch: Patch) -> None:
    """The leaf that overflowed is lost, the others are stepped."""
    _factor(patch, lambda norm, most: patch.xp.where(norm > most, most / norm, 1.0))


@mutant("T182", case="train-decoder", culprits="step", rungs=("training",))
def steps_told_from_one(patch: Patch) -> None:
    def wrong(call: Any) -> Any:
        def step(self: Any, state: Any, batches: Any) -> Any:
            state, metrics = call(self, state, batches)
            return state, dataclasses.replace(metrics, step=metrics.step + 1)

        return step

    patch.method("training", "Trainer", wrong, name="step")


@mutant("T183", case="train-decoder", culprits="adafactor", rungs=("optimizer",))
def adafactor_decays_matrices_only(patch: Patch) -> None:
    """Whatever ``decay`` says."""
    matrices = OptimizerConfig().decays
    optimizer(patch, lambda config, step: {"decays": matrices} if config.name == "adafactor" else {})


@mutant("T184", case="train-decoder", culprits="adafactor", rungs=("optimizer",))
def clip_threshold_ignored(patch: Patch) -> None:
    optimizer(patch, lambda config, step: {"clip_threshold": 1.0} if config.name == "adafactor" else {})


@mutant("T185", case="train-decoder", culprits="merged weights", rungs=_ADAPTERS)
def product_of_adapters_rounded_first(patch: Patch) -> None:
    def wrong(merge: Any) -> Any:
        def narrow(weights: Any, adapters: Any, config: Any) -> Any:
            products = merge({path: leaf * 0 for path, leaf in weights.items()}, adapters, config)
            return {path: leaf + products[path] for path, leaf in weights.items()}

        return narrow

    patch.function("lora", "merge", wrong)


@mutant("T186", case="train-decoder", culprits="bfloat16, *", rungs=("resumption",))
def masters_made_anew(patch: Patch) -> None:
    """From the parameters that they were rounded to."""

    def wrong(call: Any) -> Any:
        def import_state(self: Any, tensors: Any) -> Any:
            changed = dict(tensors)
            for name in changed:
                if name.startswith("optimizer/master/"):
                    changed[name] = np.asarray(
                        changed["parameters" + name.removeprefix("optimizer/master")], np.float32
                    )
            return call(self, changed)

        return import_state

    patch.method("training", "Trainer", wrong, name="import_state")


@mutant("T187", case="long-window", culprits="*.attention", rungs=("nonfinite",), twins=("torch_impl",))
def kernel_trusted_where_it_overflows(patch: Patch) -> None:
    """PyTorch's kernel adds -inf to a hidden score, which does not hide one that is inf."""
    patch.function("fused", "is_finite", lambda finite: lambda X: True)


@mutant("T188", case="decoder", culprits="*, as bfloat16", rungs=("persistence",))
def loaded_in_a_dtype_but_computes_in_another(patch: Patch) -> None:
    def wrong(load: Any) -> Any:
        def loaded(directory: Any, *, dtype: Any = None, **options: Any) -> Any:
            model = load(directory, dtype=dtype, **options)
            if dtype is not None:
                model.config = model.config.replace(compute_dtype="float32")
            return model

        return loaded

    patch.function("weights", "load", wrong)


def _called(patch: Patch, model: str, change: Any) -> None:
    """``change(options) -> options`` of a model's call."""

    def wrong(call: Any) -> Any:
        return lambda self, *args, **options: call(self, *args, **change(options))

    patch.method("models", model, wrong)


@mutant("T189", case="encoder-decoder", culprits=("encoder*", "decoder*", "the model itself"), rungs=("calls",))
def mask_of_the_source_needs_one_of_the_target(patch: Patch) -> None:
    def change(options: Any) -> Any:
        return options if options.get("target_padding_mask") is not None else options | {"source_padding_mask": None}

    _called(patch, "EncoderDecoder", change)


@mutant("T190", case="decoder", culprits=("embedding", "the model itself"), rungs=("calls",))
def positions_need_a_mask(patch: Patch) -> None:
    def change(options: Any) -> Any:
        is_bare = options.get("padding_mask") is None and options.get("segments") is None
        return options | {"positions": None} if is_bare else options

    _called(patch, "LanguageModel", change)


@mutant("T191", case="decoder", culprits=("embedding", "the model itself"), rungs=("calls",))
def documents_override_positions(patch: Patch) -> None:
    _called(
        patch,
        "LanguageModel",
        lambda options: options if options.get("segments") is None else options | {"positions": None},
    )


@mutant("T192", case="decoder", culprits=("stack", "the model itself"), rungs=("calls",))
def documents_end_where_padding_begins(patch: Patch) -> None:
    """Told apart by runs of equal numbers, not by the numbers."""

    def wrong(segment_mask: Any) -> Any:
        def by_runs(segments: Any) -> Any:
            segments = patch.xp.asarray(segments)
            begins = patch.xp.concatenate([segments[:, :1] * 0 + 1, (segments[:, 1:] != segments[:, :-1]) * 1], 1)
            return segment_mask(patch.xp.where(segments == 0, segments, begins.cumsum(1)))

        return by_runs

    patch.function("masks", "segment_mask", wrong)


@mutant("T193", case="alibi", culprits="*.attention", rungs=("calls",))
def bias_in_the_place_of_a_mask(patch: Patch) -> None:
    """Of two things to be added the first is forgotten."""

    def wrong(call: Any) -> Any:
        def changed(self: Any, X: Any, H_enc: Any = None, mask: Any = None, *args: Any, **options: Any) -> Any:
            is_added = mask is not None and "bool" not in str(mask.dtype)
            return call(
                self, X, H_enc, None if is_added and options.get("bias") is not None else mask, *args, **options
            )

        return changed

    patch.method("attention", "AttentionLayer", wrong)


# ---- what is full, what is compiled, what is cast


@mutant("T194", case="decoder", culprits="the cache", rungs=("decoding",), twins=("flax_impl",))
def traced_step_looks_for_its_first_token_only(patch: Patch) -> None:
    """Where values cannot be seen, what has no room has to give NaN: here the last tokens of a step do not count."""

    def wrong(with_room: Any) -> Any:
        return lambda config, logits, tokens, cache: with_room(config, logits, tokens[:, :1], cache)

    patch.function("models", "_with_room", wrong)


@mutant(
    "T195",
    case="dropout-layers",
    culprits="torch_impl, compiled generator",
    rungs=("compilation",),
    twins=("torch_impl",),
)
def compiled_steps_see_padding(patch: Patch) -> None:
    """And slots that nobody has written to, wherever the end of what is in use is unknown, as it is while compiled."""

    def wrong(begin: Any) -> Any:
        def changed(cache: Any, config: Any, T: int, real: Any, positions: Any, end: Any) -> Any:
            step = begin(cache, config, T, real, positions, end)
            if end is not None:
                return step
            patch.reached()
            return step._replace(allowed=torch.ones_like(step.allowed))

        return changed

    patch.function("cache", "_begin", wrong, quiet=True)


@mutant(
    "T196", case="dropout-layers", culprits="torch_impl, cast and back", rungs=("compilation",), twins=("torch_impl",)
)
def frequencies_rounded_by_a_cast(patch: Patch) -> None:
    def wrong(apply: Any) -> Any:
        return lambda self, fn, recurse=True: torch.nn.Module._apply(self, fn, recurse)

    patch.method("positions", "_Frequencies", wrong, "_apply")
