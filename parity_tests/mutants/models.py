"""Embeddings and heads: scales, types, ties."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from parity_tests.mutants.patching import Patch
from parity_tests.mutants.registry import control, mutant

_MODEL = "the model itself"


def _embeddings(patch: Patch, **changes: Any) -> None:
    """The embeddings as if their configuration had said something else."""

    def wrong(call: Any) -> Any:
        def embeddings(self: Any, *args: Any, **options: Any) -> Any:
            config = self.config
            self.config = config.replace(**changes)
            try:
                return call(self, *args, **options)
            finally:
                self.config = config

        return embeddings

    patch.method("embeddings", "Embeddings", wrong)


@mutant("T55", case="gemma", culprits="embedding")
def embedding_scale_missing(patch: Patch) -> None:
    _embeddings(patch, embedding_scale=None)


@mutant("T56", case="gemma", culprits=_MODEL)
def head_scaled_like_the_embedding(patch: Patch) -> None:
    """One table, used twice: the scale belongs to one use only."""

    def wrong(unembed: Any) -> Any:
        return lambda h, E, **options: unembed(h, E, **(options | {"scale": 55.4256}))

    patch.function("embeddings", "unembed", wrong)


@mutant("T57", case="bert", culprits="embedding")
def token_types_ignored(patch: Patch) -> None:
    def wrong(call: Any) -> Any:
        def embeddings(self: Any, tokens: Any, positions: Any = None, token_types: Any = None, **options: Any) -> Any:
            return call(self, tokens, positions, None, **options)

        return embeddings

    patch.method("embeddings", "Embeddings", wrong)


def _unembed(patch: Patch, **changes: Any) -> None:
    def wrong(unembed: Any) -> Any:
        return lambda h, E, **options: unembed(h, E, **(options | changes))

    patch.function("embeddings", "unembed", wrong)


@mutant("T58", case="gemma", culprits=_MODEL)
def softcap_of_the_head_forgotten(patch: Patch) -> None:
    _unembed(patch, softcap=None)


@mutant("T59", case="decoder", culprits=(_MODEL, "head"))
def bias_of_the_head_forgotten(patch: Patch) -> None:
    _unembed(patch, bias=None)


@mutant("T60", case="t5", culprits=_MODEL)
def scale_of_the_head_forgotten(patch: Patch) -> None:
    _unembed(patch, scale=None)


@mutant("T61", case="decoder", culprits=(_MODEL, "head"))
def no_gradient_through_the_tied_head(patch: Patch) -> None:
    """A table used twice whose gradient comes from one use only: the values are right."""
    patch.function(
        "embeddings", "unembed", lambda unembed: lambda h, E, **options: unembed(h, patch.stopped(E), **options)
    )


@mutant("T62", case="t5", culprits=("target_embedding", _MODEL))
def scale_between_two_uses_of_a_table(patch: Patch) -> None:
    """The shared table is scaled for the decoder and not for the encoder."""

    def wrong(call: Any) -> Any:
        def embeddings(self: Any, *args: Any, table: Any = None, **options: Any) -> Any:
            return call(self, *args, table=None if table is None else table * 2, **options)

        return embeddings

    patch.method("embeddings", "Embeddings", wrong)


@mutant("T63", case="encoder-decoder", culprits=("encoder",))
def final_norm_of_the_encoder_missing(patch: Patch) -> None:
    def wrong(call: Any) -> Any:
        def stack(self: Any, X: Any, H_enc: Any = None, *args: Any, **options: Any) -> Any:
            norm = self.final_norm
            self.final_norm = norm if H_enc is not None else None
            try:
                return call(self, X, H_enc, *args, **options)
            finally:
                self.final_norm = norm

        return stack

    patch.method("stack", "TransformerStack", wrong)


@mutant("X9", case="dropout", culprits=("*.dropout",))
def dropout_though_nobody_asked(patch: Patch) -> None:
    """Dropout in a call without a key, as a module left in training mode has it."""

    def wrong(call: Any) -> Any:
        def dropout(self: Any, X: Any, rng: Any = None) -> Any:
            return call(self, X, patch.file("dropout").random_key(0) if rng is None else rng)

        return dropout

    patch.method("dropout", "Dropout", wrong)


@control("X6", case="low-decoder", twins=("torch_impl",))
def evaluation_mode(patch: Patch) -> None:
    """The model in evaluation mode, where PyTorch may choose other kernels."""
    patch.function("models", "build", lambda build: lambda *args, **options: build(*args, **options).eval())


@control("T64", case="low-gemma")
def another_order_of_summation(patch: Patch) -> None:
    """Every matrix product in two halves, added at the end."""

    def halves(self: Any, X: Any) -> Any:
        dtype = str(self.compute_dtype).removeprefix("torch.")
        W, X = patch.cast(patch.weight(self), dtype), patch.cast(X, dtype)
        middle = X.shape[-1] // 2
        # in the wide dtype, as one product sums too
        wide = "float64" if dtype == "float64" else "float32"
        W, X = patch.cast(W, wide), patch.cast(X, wide)
        Y = X[..., middle:] @ W[:, middle:].T + X[..., :middle] @ W[:, :middle].T
        bias = self.bias
        if bias is not None:
            Y = Y + patch.cast(bias if patch.is_torch else bias[...], wide)
        return patch.cast(Y, dtype)

    patch.method("linear", "Linear", lambda _: halves)


def _block_init(patch: Patch, change: Any) -> None:
    """``change(init, self, config, options)`` in place of a block's making."""

    def wrong(init: Any) -> Any:
        def made(self: Any, config: Any, **options: Any) -> Any:
            return change(init, self, config, options)

        return made

    patch.method("block", "Block", wrong, "__init__")


@mutant("T129", case="sandwich", culprits="*.attention_post_norm")
def norm_after_a_branch_has_a_default_eps(patch: Patch) -> None:
    def change(init: Any, self: Any, config: Any, options: Any) -> None:
        init(self, config, **options)
        self.attention_post_norm.eps = 1e-3

    _block_init(patch, change)


@mutant("T130", case="windows", culprits=("*.attention", "stack.blocks.*"))
def other_blocks_have_the_window(patch: Patch) -> None:
    """Counted from 1."""
    _block_init(
        patch, lambda init, self, config, options: init(self, config, **(options | {"layer": options["layer"] + 1}))
    )


@mutant("T131", case="windows", culprits="*.rotary")
def one_rotary_base_for_all_blocks(patch: Patch) -> None:
    _block_init(
        patch, lambda init, self, config, options: init(self, config.replace(window_rotary_base=None), **options)
    )


@mutant("T132", case="masked-tokens", culprits="head")
def transform_of_the_head_has_another_activation(patch: Patch) -> None:
    def wrong(call: Any) -> Any:
        def head(self: Any, *args: Any, **options: Any) -> Any:
            config = self.config
            self.config = config.replace(activation="gelu_tanh")
            try:
                return call(self, *args, **options)
            finally:
                self.config = config

        return head

    patch.method("heads", "Head", wrong)


@mutant("T133", case="labels", culprits="head")
def padding_is_pooled_too(patch: Patch) -> None:
    patch.function("heads", "pool", lambda pool: lambda h, real, kind: pool(h, None, kind))


@mutant(
    "T134",
    case="largest",
    culprits=("flax_impl, unwatched", "flax_impl, remat", "flax_impl, scan", "flax_impl, scan of remat"),
    rungs=("compilation",),
    twins=("flax_impl",),
)
def maximum_pulled_back_by_comparing_values(patch: Patch) -> None:
    """What jnp.max does: jit may compute ``h`` twice, rounded differently, and then nothing equals the largest."""

    def wrong(pool: Any) -> Any:
        def by_value(h: Any, real: Any, kind: Any) -> Any:
            if kind != "max":
                return pool(h, real, kind)
            there = jnp.ones(h.shape[:2], bool) if real is None else jnp.asarray(real)
            largest = jnp.max(jnp.where(there[..., None], h, -jnp.inf), axis=1)
            return jnp.where(jnp.any(there, axis=1)[:, None], largest, 0)

        return by_value

    patch.function("heads", "pool", wrong)
