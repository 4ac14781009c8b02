"""Masks: who may attend to whom, and what happens where nobody may."""

from __future__ import annotations

from typing import Any

import numpy as np

from parity_tests.mutants.patching import Patch
from parity_tests.mutants.registry import mutant

_ATTENTION = ("*.attention", "*.cross_attention")
_MODEL = "the model itself"


def _softmax(patch: Patch, formula: Any) -> None:
    """``formula(scores, allowed)`` for the softmax under a mask; ``allowed`` has the shape of the scores."""

    def wrong(_: Any) -> Any:
        def softmax(scores: Any, allowed: Any) -> Any:
            allowed = scores > -np.inf if allowed is None else patch.xp.broadcast_to(allowed, scores.shape)
            return formula(scores, allowed)

        return softmax

    patch.function("masks", "masked_softmax", wrong)


def _plain(patch: Patch, scores: Any) -> Any:
    """``exp(s) / Σ exp(s)`` with no care for empty rows."""
    highest = patch.stopped(scores.amax(-1, keepdim=True) if patch.is_torch else scores.max(-1, keepdims=True))
    exps = patch.xp.exp(scores - highest)
    return exps / exps.sum(-1)[..., None]


@mutant("M1", case="encoder", culprits=_ATTENTION)
def nan_where_all_is_hidden(patch: Patch) -> None:
    _softmax(patch, lambda scores, allowed: _plain(patch, patch.xp.where(allowed, scores, -np.inf)))


@mutant("T26", case="encoder", culprits=_ATTENTION)
def mean_where_all_is_hidden(patch: Patch) -> None:
    """A row with nothing allowed becomes the mean of the values: the lowest number of the format for minus infinity."""
    _softmax(patch, lambda scores, allowed: _plain(patch, patch.xp.where(allowed, scores, -1e300)))


@mutant("M2", case="broken-padding", culprits=(*_ATTENTION, _MODEL), rungs=("forward",))
def broken_rows_leak(patch: Patch) -> None:
    """Rows that are not finite are multiplied by a weight of 0 instead of being taken out."""

    def wrong(_: Any) -> Any:
        return lambda X: (X, patch.xp.zeros_like(X[..., 0]) != 0)

    patch.function("masks", "quarantine", wrong)


@mutant("M3", case="encoder", culprits=_ATTENTION)
def nan_gradient_of_empty_rows(patch: Patch) -> None:
    """NaN is replaced after the softmax: the values are right, and the gradient is NaN all the same."""

    def formula(scores: Any, allowed: Any) -> Any:
        weights = _plain(patch, scores + patch.xp.where(allowed, 0.0, -np.inf))
        return patch.xp.where(patch.xp.isnan(weights), patch.xp.zeros_like(weights), weights)

    _softmax(patch, formula)


@mutant("M4", case="encoder", culprits=_ATTENTION)
def nan_gradient_of_a_guarded_division(patch: Patch) -> None:
    """``where(total == 0, 0, exps / total)``: the branch that is not taken still divides 0 by 0 on the way back."""

    def formula(scores: Any, allowed: Any) -> Any:
        xp = patch.xp
        highest = patch.stopped(scores.amax(-1, keepdim=True) if patch.is_torch else scores.max(-1, keepdims=True))
        exps = xp.exp(scores - highest) * allowed
        total = exps.sum(-1)[..., None]
        return xp.where(total == 0, xp.zeros_like(exps), exps / total)

    _softmax(patch, formula)


@mutant("M5", case="decoder", culprits=_ATTENTION)
def lowest_numbers_added(patch: Patch) -> None:
    """Causal mask and padding each add the lowest number of the format: both together are minus infinity."""

    def wrong(_: Any) -> Any:
        def masks(self: Any, X: Any, mask: Any, *rest: Any) -> Any:
            T = X if isinstance(X, int) else X.shape[1]
            lowest = np.finfo(np.float64).min
            zero = patch.xp.zeros((T, T), dtype=patch.xp.float64)
            added = patch.xp.where(patch.file("masks").causal_mask(T, T), zero, zero + lowest)
            if mask is not None:
                added = added + patch.xp.where(mask, zero, zero + lowest)
            return None, added

        return masks

    patch.method("attention", "AttentionLayer", wrong, "_self_attention_masks" if patch.is_torch else "_seen")


@mutant("M6", case="encoder", culprits=_ATTENTION)
def sentinel_too_weak(patch: Patch) -> None:
    """Hidden scores are lowered by 1e4, not filled in."""
    _softmax(patch, lambda scores, allowed: _plain(patch, scores + patch.xp.where(allowed, 0.0, -1e4)))


@mutant("M7", case="encoder", culprits=_ATTENTION)
def sentinel_beyond_half_precision(patch: Patch) -> None:
    """-1e10 passes through float16 on its way to the scores, and is minus infinity from there on."""

    def formula(scores: Any, allowed: Any) -> Any:
        with np.errstate(over="ignore"):
            sentinel = float(np.float16(-1e10))
        return _plain(patch, patch.xp.where(allowed, scores, sentinel))

    _softmax(patch, formula)


def _padding(patch: Patch, formula: Any) -> None:
    """The mask that a model makes of its padding; the one by which broken rows are found stays as it is."""
    patch.bound("models", "masks", "padding_mask", lambda _: lambda real: formula(patch.xp.asarray(real)))


@mutant("M11", case="encoder", culprits=_MODEL)
def mask_of_ones_added(patch: Patch) -> None:
    """A float mask of ones and zeros is added to the scores: nothing is hidden, and real keys gain 1."""
    _padding(patch, lambda real: patch.cast(real, "float32")[:, None, None, :])


@mutant("M12", case="encoder", culprits=_MODEL)
def padding_inverted(patch: Patch) -> None:
    _padding(patch, lambda real: ~real[:, None, None, :])


@mutant("M13", case="encoder-decoder", culprits="decoder.blocks.*")
def memory_mask_lost(patch: Patch) -> None:
    def wrong(call: Any) -> Any:
        def block(
            self: Any, X: Any, H_enc: Any = None, mask: Any = None, memory_mask: Any = None, **options: Any
        ) -> Any:
            return call(self, X, H_enc, mask, None, **options)

        return block

    patch.method("block", "Block", wrong)


@mutant("M14", case="encoder", culprits=_MODEL)
def padding_sees_padding(patch: Patch) -> None:
    """Allowed where both are real or both are padding: only rows of padding differ."""
    _padding(patch, lambda real: real[:, None, :, None] == real[:, None, None, :])


@mutant("M15", case="encoder", culprits=_MODEL)
def lengths_ignored(patch: Patch) -> None:
    _padding(patch, lambda real: (real | True)[:, None, None, :])


def _wider(patch: Patch, by: int | None) -> None:
    def wrong(mask: Any) -> Any:
        def widened(T: int, S: int, *, window: int | None = None, **options: Any) -> Any:
            if window is not None:
                window = max(T, S) if by is None else window + by
            return mask(T, S, window=window, **options)

        return widened

    for name in ("causal_mask", "window_mask"):
        patch.function("masks", name, wrong)


@mutant("M16", case="window", culprits=_ATTENTION)
def window_one_too_wide(patch: Patch) -> None:
    _wider(patch, 1)


@mutant("T27", case="window-encoder", culprits=_ATTENTION)
def window_one_too_narrow(patch: Patch) -> None:
    _wider(patch, -1)


@mutant("T28", case="window", culprits=_ATTENTION)
def window_ignored(patch: Patch) -> None:
    _wider(patch, None)


@mutant("T29", case="window-encoder", culprits=_ATTENTION)
def window_on_one_side_only(patch: Patch) -> None:
    def wrong(_: Any) -> Any:
        return lambda T, S, *, window, **options: patch.file("masks").causal_mask(T, S, window=window)

    patch.function("masks", "window_mask", wrong)


@mutant("M21", case="decoder", culprits=_ATTENTION)
def next_token_seen(patch: Patch) -> None:
    def wrong(mask: Any) -> Any:
        return lambda T, S, **options: mask(T, S + 1, **options)[:, :-1]

    patch.function("masks", "causal_mask", wrong)


@mutant("T30", case="decoder", culprits=_ATTENTION)
def own_token_hidden(patch: Patch) -> None:
    """Strictly before, where up to and including is meant."""

    def wrong(mask: Any) -> Any:
        return lambda T, S, **options: mask(T, S, **options) & ~(patch.xp.eye(T) > 0)

    patch.function("masks", "causal_mask", wrong)


@mutant("T31", case="encoder-decoder", culprits=("decoder", "decoder.blocks.*", "decoder.blocks.*.attention"))
def decoder_not_causal(patch: Patch) -> None:
    patch.function("masks", "causal_mask", lambda mask: lambda T, S, **options: mask(T, S, **options) | True)


@mutant("T32", case="decoder", culprits=_ATTENTION)
def scores_of_hidden_keys_count(patch: Patch) -> None:
    """Hidden weights are set to 0 after the softmax, and those that are left do not sum to 1."""
    _softmax(patch, lambda scores, allowed: _plain(patch, scores) * allowed)
