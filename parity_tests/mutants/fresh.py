"""Faults that a third reviewer thought of without having read the judge, and that it passed over then."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

from parity_tests.mutants.optimizers import _factor
from parity_tests.mutants.patching import Patch
from parity_tests.mutants.registry import mutant
from twinformer.parameters import model_parameters

_LINEARS = ("*.query", "*.key", "*.value", "*.output", "*.up", "*.down")


@mutant("T197", case="decoder", culprits="*.attention", rungs=("nonfinite",))
def what_the_first_head_sees_decides(patch: Patch) -> None:
    """A row that is not finite reaches a query that meets it in any head; here only the first head's mask is asked."""

    def wrong(exposed: Any) -> Any:
        return lambda broken, allowed: exposed(broken, None if allowed is None else allowed[:, :1])

    patch.function("masks", "exposed", wrong)


@mutant("T198", case="decoder", culprits="the cache", rungs=("decoding",), twins=("torch_impl",))
def step_shared_with_the_cache_before(patch: Patch) -> None:
    """Buffers are changed in place: a cache made from another needs its own."""

    def wrong(reorder: Any) -> Any:
        return lambda cache, rows: reorder(cache, rows) | {"step": cache["step"]}

    patch.function("cache", "reorder_cache", wrong)


@mutant("T199", case="write-decoder", culprits="beam_search", rungs=("beams",), twins=("torch_impl",))
def second_end_in_a_step_is_lost(patch: Patch) -> None:
    """The beam shrinks while its ends are collected, which then are fewer."""

    def wrong(enter: Any) -> Any:
        def changed(self: Any, tokens: Any, total: Any, *, finished: bool) -> None:
            is_second = finished and self._beam.shrink and getattr(self, "_ended", None) == len(tokens)
            if finished:
                self._ended = len(tokens)
            if is_second:
                patch.reached()
                return
            enter(self, tokens, total, finished=finished)

        return changed

    patch.method("beam", "_Row", wrong, "enter", quiet=True)


@mutant("T200", case="train-decoder", culprits="places", rungs=("accumulation",))
def next_tokens_after_padding(patch: Patch) -> None:
    """Only the target has to be real."""

    def wrong(next_tokens: Any) -> Any:
        def changed(tokens: Any, real: Any = None) -> Any:
            inputs, targets, places = next_tokens(tokens, real)
            return inputs, targets, places if real is None else patch.xp.asarray(real)[:, 1:]

        return changed

    patch.function("losses", "next_tokens", wrong)


@mutant("T201", case="train-decoder", culprits="clipped sum", rungs=("accumulation",))
def clipped_by_a_rounded_factor(patch: Patch) -> None:
    """In bfloat16, as its gradients were before they were summed."""

    def factor(norm: Any, most: Any) -> Any:
        found = patch.xp.where(norm > most, most / norm, 1.0)
        return found if "float64" in str(norm.dtype) else patch.cast(patch.cast(found, "bfloat16"), "float32")

    _factor(patch, factor)


@mutant("T202", case="write-decoder", culprits="Generator", rungs=("sampling",))
def padding_is_penalised_as_token_0(patch: Patch) -> None:
    def torch_seen(seen: Any) -> Any:
        def changed(task: Any, vocab_size: int) -> Any:
            found = seen(task, vocab_size)
            found[:, 0] |= torch.from_numpy(~task.real.all(1))
            return found

        return changed

    def flax_start(start: Any) -> Any:
        def changed(ask: Any, *args: Any) -> Any:
            written = start(ask, *args)
            if written.seen is None:
                return written
            return written._replace(seen=written.seen.at[:, 0].max(~ask.real.all(1)))

        return changed

    if patch.is_torch:
        patch.function("generation", "_seen", torch_seen)
    else:
        patch.function("generation", "_start", flax_start)


@mutant("T203", case="decoder", culprits="load_weights", rungs=("parameters",))
def unexpected_leaves_are_ignored(patch: Patch) -> None:
    def wrong(load_weights: Any) -> Any:
        def changed(model: Any, tensors: Any, **options: Any) -> None:
            wanted = model_parameters(model.config)
            load_weights(model, {path: np.asarray(leaf) for path, leaf in tensors.items() if path in wanted}, **options)

        return changed

    patch.function("weights", "load_weights", wrong)


@mutant("T204", case="half-llama", culprits=("*norm", "*.rotary", "*.attention"), rungs=("rounding",))
def float16_is_not_widened(patch: Patch) -> None:
    """What is wide of bfloat16 is taken to be wide enough of float16."""

    def wrong(wide_dtype: Any) -> Any:
        return lambda dtype: dtype if "float16" in str(dtype) and "bf" not in str(dtype) else wide_dtype(dtype)

    patch.function("linear", "wide_dtype", wrong)


@mutant("T207", case="decoder", culprits="flax_impl, scan, *", rungs=("compilation",), twins=("flax_impl",))
def loop_over_rounded_weights(patch: Patch) -> None:
    """Stacked for the loop in the dtype of the arithmetic, where parameters have a wider one."""

    def wrong(scanned: Any) -> Any:
        def changed(run: Any, blocks: Any, keys: Any, X: Any, *args: Any) -> Any:
            rounded = []
            for block in blocks:
                graph, state = nnx.split(block)
                rounded.append(nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(X.dtype), state)))
            return scanned(run, rounded, keys, X, *args)

        return changed

    patch.function("stack", "_scanned", wrong)


@mutant("T208", case="decoder", culprits="*arithmetic in bfloat16", rungs=("compilation",))
def norms_round_their_weights(patch: Patch) -> None:
    """To the dtype of the arithmetic, before they are applied wide."""

    def torch_call(call: Any) -> Any:
        def changed(self: Any, X: Any) -> Any:
            weight = self.weight.data
            self.weight.data = weight.to(self.compute_dtype).to(weight.dtype)
            try:
                return call(self, X)
            finally:
                self.weight.data = weight

        return changed

    def flax_weighted(weighted: Any) -> Any:
        def changed(normal: Any, scale: Any, bias: Any, weight: Any, cast: Any, compute_dtype: Any) -> Any:
            short = jax.lax.reduce_precision(scale[...], 8, 7) if compute_dtype == "bfloat16" else scale
            return weighted(normal, short, bias, weight, cast, compute_dtype)

        return changed

    if patch.is_torch:
        patch.method("norms", "LayerNorm", torch_call)
    else:
        patch.function("norms", "_weighted", flax_weighted)


@mutant("T209", case="mixed-decoder", culprits=_LINEARS, rungs=("rounding",))
def wider_bias_promotes(patch: Patch) -> None:
    """What is added in the dtype of the parameters takes the sum with it, and all that follows."""

    def wrong(call: Any) -> Any:
        def changed(self: Any, X: Any) -> Any:
            Y = call(self, X)
            if self.bias is None:
                return Y
            return patch.cast(Y, str(self.bias.dtype).removeprefix("torch."))

        return changed

    patch.method("linear", "Linear", wrong)


# ---- and a fourth one


@mutant("T210", case="decoder", culprits=("embedding", "the model itself"), rungs=("calls",))
def padding_has_a_place_in_its_run(patch: Patch) -> None:
    """Of a row of documents: padding stands at position 0, not where it is in the run of padding."""

    def wrong(segment_positions: Any) -> Any:
        return lambda segments: segment_positions(segments + 1)

    patch.function("masks", "segment_positions", wrong)


@mutant("T211", case="decoder", culprits="export_weights", rungs=("parameters",), twins=("torch_impl",))
def what_was_written_goes_on_changing(patch: Patch) -> None:
    """Arrays that share their memory with the parameters."""
    patch.function("weights", "_array", lambda array: lambda tensor: tensor.detach().numpy())


@mutant("T212", case="loop", culprits="flax_impl, scan of remat", rungs=("stochastic",), twins=("flax_impl",))
def keys_of_a_pattern_in_another_order(patch: Patch) -> None:
    """In a loop over turns of two blocks the keys go by place in the turn first."""

    def wrong(scanned: Any) -> Any:
        def changed(run: Any, blocks: Any, keys: Any, *args: Any) -> Any:
            return scanned(run, blocks, [*keys[0::2], *keys[1::2]], *args)

        return changed

    patch.function("stack", "_scanned", wrong)
