"""Positions: where a token is taken to be, and how that is said."""

from __future__ import annotations

from typing import Any

import numpy as np

from parity_tests.mutants.patching import Patch
from parity_tests.mutants.registry import control, mutant
from twinformer.config import RotaryScaling

_MODEL = "the model itself"
_ROTARY = "*.rotary"


@mutant("P1", case="decoder", culprits=_MODEL)
def padding_counted(patch: Patch) -> None:
    def wrong(_: Any) -> Any:
        return lambda real: patch.arange(real.shape[1])[None]

    patch.function("masks", "positions_from", wrong)


@mutant("P2", case="explicit-positions", culprits=_MODEL)
def given_positions_ignored(patch: Patch) -> None:
    """The model counts for itself whatever it is told."""

    def wrong(call: Any) -> Any:
        def model(self: Any, tokens: Any, **options: Any) -> Any:
            return call(self, tokens, **(options | {"positions": None}))

        return model

    patch.method("models", "LanguageModel", wrong)


def _turn(patch: Patch, X: Any, angles: Any, turn: Any) -> Any:
    """``turn(a, b, cos, sin)`` on the halves of X."""
    R = X.shape[-1] // 2
    join = patch.xp.cat if patch.is_torch else patch.xp.concatenate
    return join(turn(X[..., :R], X[..., R:], patch.xp.cos(angles), patch.xp.sin(angles)), -1)


def _frequencies(patch: Patch, self: Any, X: Any) -> Any:
    exact = self.exact if patch.is_torch else self._frequencies()
    return patch.array(np.asarray(exact), X)


@mutant("P3", case="llama", culprits=_ROTARY)
def halves_with_interleaved_frequencies(patch: Patch) -> None:
    """Each frequency is repeated for neighbours, as the interleaved convention wants it, and the halves are turned."""

    def wrong(_: Any) -> Any:
        def rotary(self: Any, X: Any, positions: Any) -> Any:
            f = _frequencies(patch, self, X)
            laid_out = patch.xp.stack((f, f), -1).reshape(-1)
            angles = patch.array(positions, X)[:, None, :, None] * laid_out
            R = X.shape[-1] // 2
            join = patch.xp.cat if patch.is_torch else patch.xp.concatenate
            turned = join((-X[..., R:], X[..., :R]), -1)
            return X * patch.xp.cos(angles) + turned * patch.xp.sin(angles)

        return rotary

    patch.method("positions", "RotaryEncoding", wrong)


@mutant("P9", case="long-rotary", culprits=_ROTARY, rungs=("forward",))
def whole_head_rotated(patch: Patch) -> None:
    """The fraction of the head that turns is forgotten."""

    def wrong(init: Any) -> Any:
        return lambda self, rotary_dim, **options: init(self, 6, **options)

    patch.method("positions", "RotaryEncoding", wrong, "__init__")


@mutant("P13", case="decoder", culprits=("embedding.positions",))
def sines_then_cosines(patch: Patch) -> None:
    def wrong(init: Any) -> Any:
        return lambda self, *args, **options: init(self, *args, **(options | {"layout": "halves"}))

    patch.method("positions", "PositionalEncoding", wrong, "__init__")


@mutant("P14", case="unknown-token", rungs=("refusal",))
def unknown_token_clamped(patch: Patch) -> None:
    """An id that the table does not have is taken for the last one, with no word about it."""

    def wrong(call: Any) -> Any:
        def model(self: Any, tokens: Any, **options: Any) -> Any:
            return call(self, tokens.clip(0, self.config.vocab_size - 1), **options)

        return model

    patch.method("models", "LanguageModel", wrong)
    check = "check_ids" if patch.is_torch else "_check_ids"
    patch.function("models", check, lambda _: lambda *args, **options: None, quiet=True)


@mutant("T33", case="decoder", culprits=("embedding.positions",))
def sinusoids_from_one(patch: Patch) -> None:
    def wrong(init: Any) -> Any:
        return lambda self, *args, **options: init(self, *args, **(options | {"offset": 1}))

    patch.method("positions", "PositionalEncoding", wrong, "__init__")


@mutant("T34", case="decoder", culprits=("embedding.positions",))
def sinusoids_spaced_to_the_end(patch: Patch) -> None:
    """The frequencies of tensor2tensor for those of the paper."""

    def wrong(init: Any) -> Any:
        return lambda self, *args, **options: init(self, *args, **(options | {"spacing": "endpoint"}))

    patch.method("positions", "PositionalEncoding", wrong, "__init__")


@mutant("T35", case="bert", culprits=("embedding.positions",))
def offset_of_learned_positions_ignored(patch: Patch) -> None:
    def wrong(call: Any) -> Any:
        def learned(self: Any, positions: Any) -> Any:
            offset, self.offset = self.offset, 0
            try:
                return call(self, positions)
            finally:
                self.offset = offset

        return learned

    patch.method("positions", "LearnedPositions", wrong)


@mutant("T36", case="partial-rotary", culprits=_ROTARY)
def last_part_rotated(patch: Patch) -> None:
    """The right number of entries turns, at the wrong end of the head."""

    def wrong(call: Any) -> Any:
        def rotary(self: Any, X: Any, positions: Any) -> Any:
            R = self.rotary_dim
            join = patch.xp.cat if patch.is_torch else patch.xp.concatenate
            turned = call(self, join((X[..., -R:], X[..., :-R]), -1), positions)
            return join((turned[..., R:], turned[..., :R]), -1)

        return rotary

    patch.method("positions", "RotaryEncoding", wrong)


@mutant("T37", case="llama", culprits=_ROTARY)
def rotated_the_other_way(patch: Patch) -> None:
    """Queries and keys both: their products hardly notice, for only differences of positions count."""
    patch.method("positions", "RotaryEncoding", lambda call: lambda self, X, positions: call(self, X, -positions))


@mutant("T38", case="interleaved-rotary", culprits=_ROTARY)
def interleaved_taken_for_halves(patch: Patch) -> None:
    def wrong(init: Any) -> Any:
        return lambda self, rotary_dim, **options: init(self, rotary_dim, **(options | {"convention": "half"}))

    patch.method("positions", "RotaryEncoding", wrong, "__init__")


def _scaled(patch: Patch, change: Any) -> None:
    def wrong(init: Any) -> Any:
        def rotary(self: Any, rotary_dim: int, *, scaling: RotaryScaling, **options: Any) -> None:
            init(self, rotary_dim, scaling=change(scaling), **options)

        return rotary

    patch.method("positions", "RotaryEncoding", wrong, "__init__")


@mutant("T39", case="llama3", culprits=_ROTARY)
def rotary_scaling_ignored(patch: Patch) -> None:
    _scaled(patch, lambda scaling: RotaryScaling())


@mutant("T40", case="llama3", culprits=_ROTARY)
def every_frequency_scaled(patch: Patch) -> None:
    _scaled(patch, lambda scaling: RotaryScaling(kind="linear", factor=scaling.factor))


@mutant("T41", case="yarn", culprits=_ROTARY)
def attention_factor_forgotten(patch: Patch) -> None:
    import dataclasses

    _scaled(patch, lambda scaling: dataclasses.replace(scaling, attention_factor=1.0))


@mutant("T42", case="llama", culprits="*.attention")
def values_rotated_too(patch: Patch) -> None:
    """Rotary in the formula, on all three; here the values are turned by the positions of their keys."""

    def wrong(attend: Any) -> Any:
        def turned(Q: Any, K: Any, V: Any, **options: Any) -> Any:
            S = V.shape[2]
            angles = patch.array(patch.arange(S), V)[:, None] * patch.array(np.array([1.0, 0.1]), V)
            head = _turn(patch, V[..., :4], angles, lambda a, b, c, s: (a * c - b * s, b * c + a * s))
            join = patch.xp.cat if patch.is_torch else patch.xp.concatenate
            return attend(Q, K, join((head, V[..., 4:]), -1), **options)

        return turned

    patch.function("attention", "attend", wrong)


@mutant("T43", case="t5", culprits="*.relative_bias")
def bucket_off_by_one(patch: Patch) -> None:
    """Far distances fall one bucket short: ``<=`` for ``<`` at the edges of the logarithmic buckets."""

    def torch_edges(starts: Any) -> Any:
        def moved(buckets: int, max_distance: int) -> list[int]:
            m = buckets // 2
            right: list[int] = starts(buckets, max_distance)
            return right[:m] + [start + 1 for start in right[m:]]

        return moved

    if patch.is_torch:
        patch.function("positions", "bucket_starts", torch_edges)
    else:
        patch.function("positions", "_bucket_edges", lambda edges: lambda *args: edges(*args) + 1)


@mutant("T44", case="t5", culprits="*.relative_bias")
def query_minus_key(patch: Patch) -> None:
    """The sign of the distance: what lies ahead is taken for what lies behind."""
    patch.method("positions", "RelativeBias", lambda call: lambda self, query, key: call(self, -query, -key))


@mutant("T45", case="t5", culprits="encoder.relative_bias")
def encoder_buckets_one_way(patch: Patch) -> None:
    def wrong(init: Any) -> Any:
        return lambda self, *args, **options: init(self, *args, **(options | {"bidirectional": False}))

    patch.method("positions", "RelativeBias", wrong, "__init__")


@mutant("T46", case="alibi", culprits="stack")
def alibi_slopes_by_the_formula_for_powers_of_two(patch: Patch) -> None:
    def wrong(_: Any) -> Any:
        def slopes(num_heads: int) -> Any:
            values = [2.0 ** (-8 * (a + 1) / num_heads) for a in range(num_heads)]
            return values if patch.is_torch else np.array(values)

        return slopes

    patch.function("positions", "_slopes" if patch.is_torch else "alibi_slopes", wrong)


@mutant("T47", case="alibi-encoder", culprits="stack")
def alibi_with_the_sign_of_the_distance(patch: Patch) -> None:
    def wrong(bias: Any) -> Any:
        def signed(num_heads: int, query: Any, key: Any, **options: Any) -> Any:
            ahead = patch.xp.where((key[:, None, None, :] > query[:, None, :, None]), -1.0, 1.0)
            return bias(num_heads, query, key, **options) * ahead

        return signed

    patch.function("positions", "alibi_bias", wrong)


@mutant("T48", case="alibi", culprits="stack")
def alibi_added_instead_of_subtracted(patch: Patch) -> None:
    patch.function("positions", "alibi_bias", lambda bias: lambda *args, **options: -bias(*args, **options))


@mutant("T49", case="decoder", culprits=("embedding.positions",))
def sinusoids_in_single_precision(patch: Patch) -> None:
    """A table made in float32 under a model in float64: six digits are right."""

    def wrong(call: Any) -> Any:
        def encoding(self: Any, X: Any, positions: Any = None, **options: Any) -> Any:
            P = call(self, X, positions, **options) - X
            return X + patch.cast(patch.cast(P, "float32"), str(X.dtype).split(".")[-1])

        return encoding

    patch.method("positions", "PositionalEncoding", wrong)


@control("X5", case="low-llama")
def rotation_contracted(patch: Patch) -> None:
    """``a cos - b sin`` with the products in another order, as fused multiply-adds round it."""

    def wrong(_: Any) -> Any:
        def rotary(self: Any, X: Any, positions: Any) -> Any:
            name = str(X.dtype).split(".")[-1]
            x = patch.cast(X, "float64" if name == "float64" else "float32")
            angles = patch.array(positions, x)[:, None, :, None] * _frequencies(patch, self, x)
            turned = _turn(patch, x, angles, lambda a, b, c, s: (-(b * s - a * c), -(-(a * s) - b * c)))
            return patch.cast(turned, name)

        return rotary

    patch.method("positions", "RotaryEncoding", wrong)
