"""Low precision: a rounding too many, or in the wrong place. In float64 all of these are right."""

from __future__ import annotations

from typing import Any

import numpy as np

from parity_tests.mutants.patching import Patch
from parity_tests.mutants.registry import LOW, mutant

_NORMS = ("*_norm", "*.norm")


def _name(X: Any) -> str:
    return str(getattr(X, "dtype", X)).split(".")[-1]


def _narrow(patch: Patch, X: Any) -> Any:
    """Rounded to bfloat16 and back, unless the computation is in float64."""
    name = _name(X)
    return X if name == "float64" else patch.cast(patch.cast(X, "bfloat16"), name)


@mutant("N6", case="low-gemma", culprits=_NORMS, rungs=LOW)
def cast_before_the_weight(patch: Patch) -> None:
    patch.function("norms", "_make", lambda make: lambda n, w, c: make(n, w, c.replace(norm_cast="before_weight")))


@mutant("N11", case="low-llama", culprits=_NORMS, rungs=LOW)
def cast_after_the_weight(patch: Patch) -> None:
    """The other way round: the reference casts first, the port does not."""
    patch.function("norms", "_make", lambda make: lambda n, w, c: make(n, w, c.replace(norm_cast="after_weight")))


def _rms(patch: Patch, formula: Any) -> None:
    """``formula(x, w, eps, dtype)`` with x in the dtype computed in and w as stored."""

    def wrong(_: Any) -> Any:
        def norm(self: Any, X: Any) -> Any:
            dtype = str(self.compute_dtype).removeprefix("torch.")
            w = self.weight if patch.is_torch else self.scale[...]
            return patch.cast(formula(patch.cast(X, dtype), patch.cast(w, dtype), self.eps, dtype), dtype)

        return norm

    patch.method("norms", "RMSNorm", wrong)


def _wide(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


@mutant("N7", case="low-gemma", culprits=_NORMS, rungs=LOW)
def one_plus_in_low_precision(patch: Patch) -> None:
    """1 + w is summed before it is widened."""

    def formula(x: Any, w: Any, eps: float, dtype: str) -> Any:
        x = patch.cast(x, _wide(dtype))
        return x / ((x * x).mean(-1)[..., None] + eps) ** 0.5 * patch.cast(1 + w, _wide(dtype))

    _rms(patch, formula)


@mutant("N9", case="low-llama", culprits=_NORMS, rungs=LOW)
def statistics_in_low_precision(patch: Patch) -> None:
    """The square and its mean are not widened."""

    def formula(x: Any, w: Any, eps: float, dtype: str) -> Any:
        return x * (1 / ((x * x).mean(-1)[..., None] + eps) ** 0.5) * w

    _rms(patch, formula)


def _rotary(patch: Patch, change: Any) -> None:
    """``change(positions, frequencies) -> angles``, from there as it should be."""

    def wrong(_: Any) -> Any:
        def rotary(self: Any, X: Any, positions: Any) -> Any:
            x = patch.cast(X, _wide(_name(X)))
            exact = self.exact if patch.is_torch else self._frequencies()
            f = patch.array(np.asarray(exact), x)
            angles = change(patch.array(positions, x)[:, None, :, None], f)
            cos, sin = patch.xp.cos(angles), patch.xp.sin(angles)
            R = x.shape[-1] // 2
            a, b = x[..., :R], x[..., R:]
            join = patch.xp.cat if patch.is_torch else patch.xp.concatenate
            return patch.cast(join((a * cos - b * sin, b * cos + a * sin), -1), _name(X))

        return rotary

    patch.method("positions", "RotaryEncoding", wrong)


@mutant("P5", case="low-long", culprits="*.rotary", rungs=LOW)
def frequencies_in_low_precision(patch: Patch) -> None:
    _rotary(patch, lambda positions, f: positions * _narrow(patch, f))


@mutant("P6", case="low-long", culprits="*.rotary", rungs=LOW)
def positions_in_low_precision(patch: Patch) -> None:
    """Above 256 bfloat16 has no odd numbers."""
    _rotary(patch, lambda positions, f: _narrow(patch, positions) * f)


@mutant("P7", case="low-llama", culprits="*.rotary", rungs=LOW)
def angles_in_low_precision(patch: Patch) -> None:
    _rotary(patch, lambda positions, f: _narrow(patch, positions * f))


@mutant("W1", case="low-gemma", culprits="embedding", rungs=LOW)
def embedding_scale_not_rounded(patch: Patch) -> None:
    """The scale stays in float32; the contract has it rounded first."""

    def wrong(make: Any) -> Any:
        def scalar(value: Any, dtype: Any = None) -> Any:
            is_scale = isinstance(value, float) and _name(dtype) == "bfloat16"
            return make(value, dtype=patch.xp.float32) if is_scale else make(value, dtype=dtype)

        return scalar

    patch.bound("embeddings", *(("torch", "tensor") if patch.is_torch else ("jnp", "asarray")), wrong)


@mutant("W11", case="low-decoder", culprits=("head", "the model itself"), rungs=LOW)
def logits_left_wide(patch: Patch) -> None:
    """The last product is made, and given back, in float32."""

    def wrong(unembed: Any) -> Any:
        def logits(h: Any, E: Any, **options: Any) -> Any:
            wide = _wide(_name(h))
            return unembed(patch.cast(h, wide), patch.cast(E, wide), **options)

        return logits

    patch.function("embeddings", "unembed", wrong)


@mutant("T71", case="low-decoder", culprits="*.attention", rungs=LOW)
def scores_in_low_precision(patch: Patch) -> None:
    """The softmax is not widened."""
    patch.function("masks", "masked_softmax", lambda softmax: lambda s, allowed: softmax(_narrow(patch, s), allowed))


@mutant("T72", case="low-decoder", culprits=("*.attention_norm", "*.feedforward_norm", "*.final_norm"), rungs=LOW)
def variance_in_one_pass_in_single_precision(patch: Patch) -> None:
    """E[x²] - E[x]² where x is wide in low precision only: float64 still has two passes."""

    def wrong(call: Any) -> Any:
        def norm(self: Any, X: Any) -> Any:
            dtype = str(self.compute_dtype).removeprefix("torch.")
            if dtype == "float64":
                return call(self, X)
            x = patch.cast(patch.cast(X, dtype), "float32")
            mean = x.mean(-1)[..., None]
            variance = (x * x).mean(-1)[..., None] - mean * mean
            w, b = (self.weight, self.bias) if patch.is_torch else (self.scale[...], self.bias[...])
            scaled = (x - mean) / (variance * (variance > 0) + self.eps) ** 0.5
            return patch.cast(scaled * patch.cast(w, "float32") + patch.cast(b, "float32"), dtype)

        return norm

    patch.method("norms", "LayerNorm", wrong)


@mutant("T73", case="low-decoder", culprits="embedding.positions", rungs=LOW)
def sinusoids_at_low_precision_angles(patch: Patch) -> None:
    """Angles in bfloat16: sines are right at the first positions only."""

    def wrong(call: Any) -> Any:
        def encoding(self: Any, X: Any, positions: Any = None, **options: Any) -> Any:
            if _name(X) == "float64":
                return call(self, X, positions, **options)
            exact = self.exact if patch.is_torch else self._frequencies()
            wide = patch.cast(X, "float32")
            places = patch.arange(X.shape[1])[None] if positions is None else positions
            angles = _narrow(patch, patch.array(places, wide)[..., None] * patch.array(np.asarray(exact), wide))
            P = patch.xp.stack((patch.xp.sin(angles), patch.xp.cos(angles)), -1)
            return X + patch.cast(P.reshape(*angles.shape[:-1], -1), _name(X))

        return encoding

    patch.method("positions", "PositionalEncoding", wrong)
