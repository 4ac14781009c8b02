"""Attention: its scale, its heads, what goes in and what comes out."""

from __future__ import annotations

from typing import Any

import numpy as np

from parity_tests.mutants.patching import Patch, halved_gradient
from parity_tests.mutants.registry import control, mutant

_ATTENTION = ("*.attention", "*.cross_attention")


def _attend(patch: Patch, change: Any) -> None:
    """``change(Q, K, V, options) -> (Q, K, V, options)`` before the formula is applied."""

    def wrong(attend: Any) -> Any:
        def changed(Q: Any, K: Any, V: Any, **options: Any) -> Any:
            Q, K, V, options = change(Q, K, V, options)
            return attend(Q, K, V, **options)

        return changed

    patch.function("attention", "attend", wrong)


@mutant("A1", case="encoder-decoder", culprits="*.cross_attention")
def scale_missing_in_cross_attention(patch: Patch) -> None:
    """In one code path only: where queries and keys are of different lengths."""
    _attend(patch, lambda Q, K, V, o: (Q, K, V, o | ({"scale": 1.0} if Q.shape[2] != K.shape[2] else {})))


@mutant("A2", case="decoder", culprits=_ATTENTION)
def scaled_twice(patch: Patch) -> None:
    _attend(patch, lambda Q, K, V, o: (Q * o["scale"], K, V, o))


@mutant("A3", case="decoder", culprits=_ATTENTION)
def scaled_by_the_width_of_the_model(patch: Patch) -> None:
    _attend(patch, lambda Q, K, V, o: (Q, K, V, o | {"scale": 24**-0.5}))


@mutant("A5", case="t5", culprits=_ATTENTION)
def scaled_though_the_model_is_not(patch: Patch) -> None:
    _attend(patch, lambda Q, K, V, o: (Q, K, V, o | {"scale": Q.shape[-1] ** -0.5}))


@mutant("A7", case="decoder", culprits=_ATTENTION)
def key_heads_tiled(patch: Patch) -> None:
    """Query head a reads key head ``a % G``."""

    def wrong(attend: Any) -> Any:
        def tiled(Q: Any, K: Any, V: Any, **options: Any) -> Any:
            A, G = Q.shape[1], K.shape[1]
            order = np.array(sorted(range(A), key=lambda a: a % G))
            return attend(Q[:, order], K, V, **options)[:, np.argsort(order)]

        return tiled

    patch.function("attention", "attend", wrong)


@mutant("A9", case="decoder", culprits=_ATTENTION)
def key_heads_not_repeated(patch: Patch) -> None:
    """Broadcasting hides it: every query head reads the first key head."""
    first = np.array([0, 0])
    _attend(patch, lambda Q, K, V, o: (Q, K[:, first], V[:, first], o))


@control("A11", case="low-decoder")
def summed_in_another_order(patch: Patch) -> None:
    """What a kernel switch does: with more than 8 queries the sums in scores and softmax run the other way."""

    def change(Q: Any, K: Any, V: Any, options: dict[str, Any]) -> Any:
        return (patch.flip(Q, -1), patch.flip(K, -1), V, options) if Q.shape[2] > 8 else (Q, K, V, options)

    def softmax(original: Any) -> Any:
        def backwards(scores: Any, allowed: Any) -> Any:
            allowed = patch.xp.broadcast_to(allowed, scores.shape)
            return patch.flip(original(patch.flip(scores, -1), patch.flip(allowed, -1)), -1)

        return backwards

    _attend(patch, change)
    patch.function("masks", "masked_softmax", softmax)


@control("X7", case="low-decoder")
def padded_further(patch: Patch) -> None:
    """Scores padded to a round number of keys, as kernels and caches do, and hidden there."""

    def softmax(original: Any) -> Any:
        def padded(scores: Any, allowed: Any) -> Any:
            S = scores.shape[-1]
            allowed = patch.xp.broadcast_to(allowed, scores.shape)
            join = patch.xp.cat if patch.is_torch else patch.xp.concatenate
            more = join((scores, scores[..., :7]), -1), join((allowed, allowed[..., :7] & False), -1)
            return original(*more)[..., :S]

        return padded

    patch.function("masks", "masked_softmax", softmax)


@mutant("A15", case="encoder-decoder", culprits="decoder")
def memory_hidden_by_the_target(patch: Patch) -> None:
    """Cross-attention with the padding of the queries, cut to the length of the keys."""

    def wrong(call: Any) -> Any:
        def stack(
            self: Any, X: Any, H_enc: Any = None, mask: Any = None, memory_mask: Any = None, **options: Any
        ) -> Any:
            if H_enc is not None and mask is not None:
                memory_mask = mask[..., : H_enc.shape[1]]
            return call(self, X, H_enc, mask, memory_mask, **options)

        return stack

    patch.method("stack", "TransformerStack", wrong)


@mutant("A16", case="llama", culprits=("*.query", "*.key", "*.value", "*.output", "*.up", "*.gate", "*.down"))
def bias_that_is_not_there(patch: Patch) -> None:
    """Without a bias, whatever lies in memory is added: here the first column of the matrix."""

    def wrong(call: Any) -> Any:
        def linear(self: Any, X: Any) -> Any:
            Y = call(self, X)
            return Y if self.bias is not None else Y + patch.cast(patch.weight(self)[:, 0], str(Y.dtype).split(".")[-1])

        return linear

    patch.method("linear", "Linear", wrong)


@mutant("A17", case="t5", culprits="decoder.blocks.*")
def position_bias_in_cross_attention(patch: Patch) -> None:
    """The block hands the bias of its self-attention on to cross-attention, where it is a float mask like any other."""
    bias_of_the_block: list[Any] = []

    def block(call: Any) -> Any:
        def remembering(self: Any, *args: Any, **options: Any) -> Any:
            bias_of_the_block.append(options.get("bias"))
            try:
                return call(self, *args, **options)
            finally:
                bias_of_the_block.pop()

        return remembering

    def attention(call: Any) -> Any:
        def biased(
            self: Any, X: Any, H_enc: Any = None, mask: Any = None, memory_mask: Any = None, **options: Any
        ) -> Any:
            bias = bias_of_the_block[-1] if bias_of_the_block else None
            if H_enc is not None and bias is not None:
                patch.reached()
                bias = bias[..., : H_enc.shape[1]]
                memory_mask = bias if memory_mask is None else patch.xp.where(memory_mask, bias, -np.inf)
            return call(self, X, H_enc, mask, memory_mask, **options)

        return biased

    patch.method("block", "Block", block, quiet=True)
    patch.method("attention", "AttentionLayer", attention, quiet=True)


@mutant("A18", case="alibi", culprits="stack")
def weights_taken_for_the_position_bias(patch: Patch) -> None:
    """One off in a tuple: what the first layer returns as its weights is added to the scores of the next."""
    weights: list[Any] = []

    def softmax(original: Any) -> Any:
        def keeping(scores: Any, allowed: Any) -> Any:
            P = original(scores, allowed)
            if weights:
                weights[-1] = P
            return P

        return keeping

    def block(call: Any) -> Any:
        def biased(self: Any, *args: Any, **options: Any) -> Any:
            if weights and weights[-1] is not None:
                patch.reached()
                options["bias"] = weights[-1]
            return call(self, *args, **options)

        return biased

    def stack(call: Any) -> Any:
        def starting(self: Any, *args: Any, **options: Any) -> Any:
            weights.append(None)
            try:
                return call(self, *args, **options)
            finally:
                weights.pop()

        return starting

    patch.function("masks", "masked_softmax", softmax, quiet=True)
    patch.method("block", "Block", block, quiet=True)
    patch.method("stack", "TransformerStack", stack, quiet=True)


@mutant("T16", case="decoder", culprits=_ATTENTION)
def heads_merged_in_the_wrong_order(patch: Patch) -> None:
    """The axes of heads and positions are not exchanged back: the numbers are dealt out in the order they lie in."""

    def wrong(attend: Any) -> Any:
        def merged(Q: Any, K: Any, V: Any, **options: Any) -> Any:
            Z = attend(Q, K, V, **options)
            B, A, T, J = Z.shape
            return Z.reshape(B, T, A, J).swapaxes(1, 2)

        return merged

    patch.function("attention", "attend", wrong)


@mutant("T17", case="square", culprits=_ATTENTION)
def heads_reversed_in_the_output(patch: Patch) -> None:
    patch.function(
        "attention", "attend", lambda attend: lambda *args, **options: patch.flip(attend(*args, **options), 1)
    )


@mutant("T18", case="gemma", culprits=_ATTENTION)
def softcap_forgotten(patch: Patch) -> None:
    _attend(patch, lambda Q, K, V, o: (Q, K, V, o | {"softcap": None}))


@mutant("T19", case="gemma", culprits=_ATTENTION)
def softcap_before_the_scale(patch: Patch) -> None:
    _attend(patch, lambda Q, K, V, o: (Q, K, V, o | {"softcap": o["softcap"] / o["scale"]}))


@mutant("T20", case="decoder", culprits=_ATTENTION)
def no_gradient_through_the_values(patch: Patch) -> None:
    _attend(patch, lambda Q, K, V, o: (Q, K, patch.stopped(V), o))


@mutant("T21", case="decoder", culprits=_ATTENTION)
def half_the_gradient_of_the_keys(patch: Patch) -> None:
    _attend(patch, lambda Q, K, V, o: (Q, halved_gradient(patch, K), V, o))


@mutant("T22", case="square", culprits=_ATTENTION)
def keys_and_values_exchanged(patch: Patch) -> None:
    _attend(patch, lambda Q, K, V, o: (Q, V, K, o))


@mutant("T23", case="decoder", culprits=_ATTENTION)
def value_heads_reversed(patch: Patch) -> None:
    _attend(patch, lambda Q, K, V, o: (Q, K, patch.flip(V, 1), o))


@mutant("T24", case="encoder-decoder", culprits="decoder.blocks.*")
def cross_attention_sees_the_target(patch: Patch) -> None:
    """The block gives its own stream for the encoder's states, cut to their length."""

    def wrong(call: Any) -> Any:
        def block(self: Any, X: Any, H_enc: Any = None, *args: Any, **options: Any) -> Any:
            return call(self, X, None if H_enc is None else X[:, : H_enc.shape[1]], *args, **options)

        return block

    patch.method("block", "Block", wrong)


@mutant("T25", case="decoder", culprits=("*.key",))
def bias_of_the_keys_exchanged(patch: Patch) -> None:
    """A bias in the other direction: invisible in the output of attention, which no constant score can change."""

    def wrong(call: Any) -> Any:
        def linear(self: Any, X: Any) -> Any:
            Y = call(self, X)
            if Y.shape[-1] != 12:
                return Y
            bias = self.bias if patch.is_torch else self.bias[...]
            return Y - 2 * bias

        return linear

    patch.method("linear", "Linear", wrong)
