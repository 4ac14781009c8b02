"""Dropout: what is dropped, by what factor, and under which key."""

from __future__ import annotations

from typing import Any

import numpy as np

from parity_tests.mutants.patching import Patch
from parity_tests.mutants.registry import mutant

_DROPOUT = "*.dropout"
_RUNGS = ("stochastic",)


def _dropout(patch: Patch, change: Any) -> None:
    """``change(call, self, X, rng)`` where there is something to drop."""

    def wrong(call: Any) -> Any:
        def dropout(self: Any, X: Any, rng: Any = None) -> Any:
            if rng is None or self.rate == 0:
                return call(self, X, rng)
            patch.reached()
            return change(call, self, X, rng)

        return dropout

    patch.method("dropout", "Dropout", wrong, quiet=True)


@mutant("A12", case="dropout", culprits="*.attention", rungs=_RUNGS)
def weights_never_dropped(patch: Patch) -> None:
    def wrong(attend: Any) -> Any:
        return lambda *args, **options: attend(*args, **(options | {"rng": None}))

    patch.function("attention", "attend", wrong)


@mutant("A13", case="dropout", culprits=_DROPOUT, rungs=_RUNGS)
def backward_factor_wrong(patch: Patch) -> None:
    """The gradient of what is kept is multiplied by the rate, not by 1 / (1 - rate)."""

    def change(call: Any, self: Any, X: Any, rng: Any) -> Any:
        Y = call(self, X, rng)
        factor = self.rate * (1 - self.rate)
        still = patch.stopped(Y)
        return still + (Y - still) * factor

    _dropout(patch, change)


@mutant("A14", case="dropout", culprits=("*.dropout", "*.attention"), rungs=_RUNGS)
def one_mask_for_all_heads(patch: Patch) -> None:
    """One mask, broadcast over batch and heads."""

    def change(call: Any, self: Any, X: Any, rng: Any) -> Any:
        ones = patch.xp.ones_like(X[:1, :1] if len(X.shape) == 4 else X[:1])
        return X * call(self, ones, rng)

    _dropout(patch, change)


@mutant("T65", case="dropout", culprits=_DROPOUT, rungs=_RUNGS)
def factor_forgotten(patch: Patch) -> None:
    _dropout(patch, lambda call, self, X, rng: call(self, X, rng) * (1 - self.rate))


@mutant("T66", case="dropout", culprits=_DROPOUT, rungs=_RUNGS)
def rate_taken_for_what_is_kept(patch: Patch) -> None:
    def change(call: Any, self: Any, X: Any, rng: Any) -> Any:
        rate, self.rate = self.rate, 1 - self.rate
        try:
            return call(self, X, rng)
        finally:
            self.rate = rate

    _dropout(patch, change)


@mutant("T67", case="dropout-layers", culprits=("stack",), rungs=_RUNGS)
def one_key_for_all_blocks(patch: Patch) -> None:
    """A key that is not folded: every block drops the same elements."""
    first: list[Any] = []

    def block(call: Any) -> Any:
        def reusing(self: Any, *args: Any, rng: Any = None, **options: Any) -> Any:
            if rng is not None and first:
                if first[-1] is None:
                    first[-1] = rng
                else:
                    patch.reached()
                rng = first[-1]
            return call(self, *args, rng=rng, **options)

        return reusing

    def stack(call: Any) -> Any:
        def starting(self: Any, *args: Any, **options: Any) -> Any:
            first.append(None)
            try:
                return call(self, *args, **options)
            finally:
                first.pop()

        return starting

    patch.method("block", "Block", block, quiet=True)
    patch.method("stack", "TransformerStack", stack, quiet=True)


@mutant("T68", case="dropout", culprits=("stack.blocks.*",), rungs=_RUNGS)
def sublayers_exchange_their_keys(patch: Patch) -> None:
    """Within a block the keys are dealt out the other way round."""
    name = "places" if patch.is_torch else "fold_all"

    def wrong(deal: Any) -> Any:
        def dealt(rng: Any, count: int) -> Any:
            keys = list(deal(rng, count))
            return keys[::-1] if count == 6 else keys

        return dealt

    patch.function("dropout", name, wrong)


@mutant("T69", case="dropout", culprits=("*.blocks.*",), rungs=_RUNGS)
def sublayers_not_dropped(patch: Patch) -> None:
    """The output of each sub-layer goes into the sum whole."""

    def wrong(call: Any) -> Any:
        def block(self: Any, *args: Any, **options: Any) -> Any:
            rate, self.dropout.rate = self.dropout.rate, 0.0
            try:
                return call(self, *args, **options)
            finally:
                self.dropout.rate = rate

        return block

    patch.method("block", "Block", wrong)


@mutant("T70", case="dropout", culprits=_DROPOUT, rungs=_RUNGS)
def stream_of_another_generator(patch: Patch) -> None:
    """Random numbers of the framework's own: the right rate and factor, and other elements."""

    def change(call: Any, self: Any, X: Any, rng: Any) -> Any:
        kept = np.random.default_rng(0).random(tuple(X.shape)) >= self.rate
        return X * patch.array(kept / (1 - self.rate), X)

    _dropout(patch, change)


@mutant("T74", case="gemma", culprits="embedding")
def embedding_scaled_after_its_dropout(patch: Patch) -> None:
    """Two parts in the wrong order, which the output of their owner does not show."""

    def wrong(call: Any) -> Any:
        def embeddings(self: Any, *args: Any, **options: Any) -> Any:
            config = self.config
            self.config = config.replace(embedding_scale=None)
            try:
                return call(self, *args, **options) * config.embedding_scale
            finally:
                self.config = config

        return embeddings

    patch.method("embeddings", "Embeddings", wrong)
