"""Where a gradient is a matter of choice: tokens that tie under max pooling.

Two tokens of a row can be the same by mathematics: one token twice, where nothing tells places apart. Which of
them comes out larger, rounding decides, and the whole gradient of the feature goes there. Such rows show nothing about
gradients. Tokens that are equal to the last bit in both twins are no matter of choice: the first of them has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from twinformer.parity.case import Case
from twinformer.parity.compare import FloatArray
from twinformer.parity.evidence import Evidence
from twinformer.parity.twins import Run

# of the largest magnitude: ten times what the twins' outputs may differ by (rung 1)
TIE = 1e-11


def settled(evidence: Evidence) -> tuple[Evidence, list[int]]:
    """Evidence on the same case without the rows whose gradients are a matter of choice, and which these are."""
    if evidence.case.config.pool != "max":
        return evidence, []
    case, rows = without_ties(evidence.case, evidence.runs("float64", gradients=True))
    if not rows:
        return evidence, []
    return Evidence(case, evidence.twins, with_gradients=True, progress=evidence.progress), rows


def without_ties(case: Case, runs: Sequence[Run]) -> tuple[Case, list[int]]:
    """The case with a cotangent of 0 for rows in which features tie under max pooling, and which these are."""
    if case.config.pool != "max":
        return case, []
    pooled = "decoder" if case.config.architecture == "encoder-decoder" else "stack"
    mask = case.inputs.get("target_padding_mask" if pooled == "decoder" else "padding_mask")
    rows = _tied([run.modules[pooled] for run in runs if pooled in run.modules], mask)
    if not rows:
        return case, []
    cotangent = case.cotangent.copy()
    cotangent[rows] = 0.0
    return dataclasses.replace(case, cotangent=cotangent), rows


def _tied(states: Sequence[FloatArray], mask: FloatArray | None) -> list[int]:
    """Rows of ``[B, T, D]`` in which some feature's two largest tie, but not exactly and at the same places in all."""
    if not states or states[0].shape[1] < 2:
        return []
    real = np.ones(states[0].shape[:2], np.bool_) if mask is None else np.asarray(mask, np.bool_)
    seen = [np.where(real[..., None], state, -np.inf) for state in states]
    two = [np.sort(one, axis=1)[:, -2:] for one in seen]
    with np.errstate(invalid="ignore"):  # rows of padding only, and of one token
        gaps = [high - low for low, high in (np.moveaxis(pair, 1, 0) for pair in two)]
    near = np.any([gap <= TIE * _largest(state) for gap, state in zip(gaps, states, strict=True)], axis=0)
    places = [one.argmax(1) for one in seen]
    is_exact = np.all([gap == 0 for gap in gaps], axis=0) & np.all([one == places[0] for one in places], axis=0)
    return [int(row) for row in np.flatnonzero((near & ~is_exact).any(-1))]


def _largest(state: FloatArray) -> float:
    return float(np.abs(state[np.isfinite(state)]).max(initial=0.0))
