"""Rung 2, once more with dropout: the same key drops the same elements, and each twin drops as it should.

Both twins draw from one stream of random numbers, so that a model with dropout is as deterministic as one without:
outputs and gradients agree within the bounds of rungs 1 and 2. What both could get wrong together (a rate, a factor,
one mask shared by a whole row) is held against the binomial distribution, for each twin by itself.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import cast

import ml_dtypes
import numpy as np

from twinformer.config import ModelConfig
from twinformer.initializers import stream
from twinformer.parity.case import Case
from twinformer.parity.compare import (
    Comparison,
    FloatArray,
    compare,
    flowing_through,
    output_scales,
    set_problems,
    sibling_scales,
    widened,
)
from twinformer.parity.evidence import Evidence
from twinformer.parity.kinks import settled
from twinformer.parity.modes import Mode, run_in_mode
from twinformer.parity.rungs import forward, gradients
from twinformer.parity.rungs.itself import against_itself, mode_of
from twinformer.parity.twins import Run, Twin
from twinformer.parity.verdict import Rung, rung_of

# the key that both twins are given: two 32-bit words
_KEY = (2026, 7)
# tokens that are looked at: random numbers cost time; one long mask is compared by itself
_LENGTH = 48
# the rates of a model that has none of its own
_RATES = {"dropout": 0.1, "attention_dropout": 0.1, "hidden_dropout": 0.1}
# batch, heads, queries, keys: what one mask of attention has to cover
_SHAPE = (4, 6, 32, 32)
_LONG, _LONG_SEED = 2**17 + 2**16 + 3, 2**40 + 7
# by how many standard deviations a count may be off: once in 500 million draws
_DEVIATIONS = 6.0


def check(evidence: Evidence) -> Rung:
    """Compare outputs and gradients under one key, then count what each twin drops.

    A model in another order has other elements dropped: the noise floor is that of weights moved by a rounding.
    """
    noisy, tied = settled(Evidence(with_dropout(evidence.case), evidence.twins, with_gradients=True))
    torch_run, flax_run = noisy.runs("float64", gradients=True)
    sides = (noisy.twins[0].name, noisy.twins[1].name)
    problems = set_problems("module", torch_run.modules, flax_run.modules, sides)
    outputs = [
        compare(path, torch_run.modules[path], flax_run.modules[path], bound=forward.BOUND)
        for path in torch_run.modules
        if path in flax_run.modules
    ]
    outputs.append(compare("output", torch_run.output, flax_run.output, bound=forward.BOUND))
    flowing = flowing_through(torch_run.module_gradients, noisy.case.cotangent)
    scales = output_scales(flax_run.module_gradients, flowing=flowing)
    pulled = _gradients(torch_run.module_gradients, flax_run.module_gradients, "output of ", scales)
    scales = sibling_scales(flax_run.gradients, flowing=flowing)
    pulled += _gradients(torch_run.gradients, flax_run.gradients, "", scales)
    least = np.finfo(np.float64).eps * flowing
    outputs = forward.with_noise_where_failing(noisy, outputs, forward.tensor_of)
    pulled = forward.with_noise_where_failing(noisy, pulled, gradients.tensor_of, least=least)
    itself, more = _as_configured(noisy, (torch_run, flax_run))
    problems += more
    config = noisy.case.config
    rates = sorted({config.dropout, config.attention_dropout, config.hidden_dropout} - {0.0})
    counts = [found for twin in evidence.twins for rate in rates for found in _counts(twin, rate)]
    counts.append(_long_mask(evidence.twins))
    checked = f"{len(outputs)} outputs, {len(pulled)} gradients, {len(counts)} counts"
    rung = rung_of(checked, [*outputs, *pulled, *itself, *counts], problems)
    if rung.verdict == "differ":
        if problems or not all(found.agrees or found.within_noise for found in outputs):
            forward.blame(rung, noisy, backward=False, bound=forward.BOUND)
        elif not all(found.agrees or found.within_noise for found in pulled):
            forward.blame(rung, noisy, backward=True, bound=gradients.BOUND)
        else:
            rung.culprits = list(dict.fromkeys(mode_of(one.name) for one in itself if not one.agrees)) or ["dropout"]
    if tied:
        rung.notes.append(f"gradients left out, for tokens tie under max pooling: rows {tied}")
    return rung


def _as_configured(noisy: Evidence, usual: tuple[Run, Run]) -> tuple[list[Comparison], list[str]]:
    """Where the configuration asks for remat or a loop over blocks, which nobody can watch: against the usual run."""
    config = noisy.case.config
    remat = "remat" if config.remat else None
    of_flax = " of ".join(["scan"] * config.scan_layers + ["remat"] * config.remat) or None
    comparisons: list[Comparison] = []
    problems: list[str] = []
    for twin, run, mode in zip(noisy.twins, usual, (remat, of_flax), strict=True):
        if mode is None:
            continue
        case = noisy.case.in_dtype("float64")
        found = twin.once(mode, case, partial(run_in_mode, twin, case, cast(Mode, mode)))
        more, wrong = against_itself(f"{twin.name}, {mode}", found, run, (mode, "usual"))
        comparisons, problems = comparisons + more, problems + wrong
    return comparisons, problems


def _gradients(
    ours: dict[str, FloatArray], theirs: dict[str, FloatArray], prefix: str, scales: dict[str, float]
) -> list[Comparison]:
    return [
        compare(
            f"{prefix}{path}",
            gradient,
            theirs[path],
            bound=gradients.BOUND,
            scale=scales[path],
        )
        for path, gradient in ours.items()
        if path in theirs
    ]


def with_dropout(case: Case) -> Case:
    """The last tokens of the case with a key, and with dropout everywhere where it has none."""
    config = with_rates(case.config)
    inputs = {name: values[:, -_LENGTH:] for name, values in case.inputs.items() if name != "rng"}
    inputs["rng"] = np.array(_KEY, np.int64)
    cotangent = case.cotangent if case.cotangent.ndim == 2 else case.cotangent[:, -_LENGTH:]
    return dataclasses.replace(case, config=config, inputs=inputs, cotangent=cotangent)


def with_rates(config: ModelConfig) -> ModelConfig:
    """With dropout everywhere where it has none."""
    if not any((config.dropout, config.attention_dropout, config.hidden_dropout, config.embedding_dropout)):
        config = config.replace(**_RATES)
    if config.head in ("sequence", "tokens") and not config.head_dropout:
        config = config.replace(head_dropout=0.1)
    return config


def _long_mask(twins: tuple[Twin, Twin]) -> Comparison:
    """One mask longer than either twin draws in one go, under a seed that needs both words of a key."""
    one, other = (twin.drop(0.5, np.ones(_LONG), _LONG_SEED) for twin in twins)
    return compare(f"one mask of {_LONG:,} elements", one, other, bound=1e-15)


def _counts(twin: Twin, rate: float) -> list[Comparison]:
    """Rate, factor and independence of one twin's masks."""
    masks = [twin.drop(rate, np.ones(_SHAPE), seed) for seed in _KEY]
    dropped = [mask == 0 for mask in masks]
    name = f"{twin.name}, dropout {rate}"
    kept = masks[0][~dropped[0]]
    factor = compare(f"{name}: factor", kept, np.full_like(kept, 1 / (1 - rate)), bound=1e-15)
    found = [factor, _share(f"{name}: share dropped", dropped[0], rate), _low(twin, rate)]
    # where two neighbours along an axis are independent both are dropped in rate² of all places
    for axis, what in enumerate(("batch", "heads", "queries", "keys")):
        pairs = np.moveaxis(dropped[0], axis, 0)
        pairs = pairs[: len(pairs) // 2 * 2]
        found.append(_share(f"{name}: dropped in neighbours among {what}", pairs[::2] & pairs[1::2], rate**2))
    found.append(_share(f"{name}: dropped under two keys", dropped[0] & dropped[1], rate**2))
    return found


def _low(twin: Twin, rate: float) -> Comparison:
    """Values in bfloat16 are multiplied wide and rounded once: the factor itself has too many digits for them."""
    values = stream(0, "stochastic/low").uniform(1, 2, (2, 4, 8, 8)).astype(ml_dtypes.bfloat16)
    got = twin.drop(rate, values, _KEY[0])
    product = values.astype(np.float32) * np.float32(1 / (1 - rate))
    expected = np.where(got == 0, 0.0, widened(product.astype(ml_dtypes.bfloat16)))
    return compare(f"{twin.name}, dropout {rate}: values in bfloat16", got, expected, bound=0.0)


def _share(name: str, dropped: np.ndarray[tuple[int, ...], np.dtype[np.bool_]], expected: float) -> Comparison:
    """The share of True against ``expected``, within what a binomial distribution allows."""
    share: FloatArray = np.array([dropped.mean()])
    deviation = math.sqrt(expected * (1 - expected) / dropped.size)
    return compare(name, share, np.array([expected]), bound=_DEVIATIONS * deviation, scale=1.0)
