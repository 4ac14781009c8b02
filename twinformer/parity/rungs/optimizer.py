"""Rung 5: the same gradients move the weights of both twins by the same vectors.

What is compared is the update, the difference of two parameters, never the parameter: a step changes a weight by so
little that an update twice as large, or none at all, would be lost in it. The gradients are those of the model, scaled
from step to step by powers of ten, so that clipping is active in some steps and not in others and eps matters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from twinformer.initializers import stream
from twinformer.learning import OptimizerConfig, ScheduleConfig
from twinformer.parity.compare import Comparison, FloatArray, compare, set_problems
from twinformer.parity.evidence import Evidence
from twinformer.parity.stepping import Leaves, steps
from twinformer.parity.verdict import Rung, rung_of

STEPS = 10
# A parameter of size 1 that moves by a thousandth keeps 13 of 16 digits of its update.
BOUND = 1e-10
# of one step in float32 from parameters that are 0, so that the update itself can be read: a few roundings of 6e-8
LOW_BOUND = 1e-6
# parameters that are stepped whole; of larger models so many rows
_MOST, _ROWS = 2_000_000, 64
# powers of ten by which the gradients are scaled, step by step: the norm ends up on both sides of clip_norm
_SCALES = (0, 1, -2, -1, 2, -4, 0, -8, 1, 0)
CONFIGS = {
    "adamw": OptimizerConfig(name="adamw", weight_decay=0.1, ema_decay=0.9),
    "sgd": OptimizerConfig(name="sgd", momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd without a look ahead": OptimizerConfig(
        name="sgd", momentum=0.8, nesterov=False, weight_decay=0.1, decay="all", clip_norm=None
    ),
    # no choice as it is where nobody makes one
    "adafactor": OptimizerConfig(
        name="adafactor",
        weight_decay=0.1,
        decay="all",
        decay_rate=0.7,
        eps_gradient=1e-6,
        eps_parameter=0.3,
        clip_threshold=0.25,
    ),
}
SCHEDULE = ScheduleConfig(name="cosine", peak=1e-2, warmup_steps=3, total_steps=STEPS, final_fraction=0.1)


def check(evidence: Evidence) -> Rung:
    """Compare the update of every parameter in every step, for each optimizer, in float64."""
    run = evidence.truth("float64")
    case = evidence.case.in_dtype("float64")
    # an update goes by elements, or by rows and columns: of a large model a part of each matrix says as much
    total = sum(tensor.size for tensor in case.tensors.values())
    rows = None if total <= _MOST else _ROWS
    parameters = {path: tensor[:rows] for path, tensor in case.tensors.items()}
    gradients = [_gradients({path: g[:rows] for path, g in run.gradients.items()}, step) for step in range(STEPS)]
    rates = [SCHEDULE.learning_rate(step) for step in range(STEPS)]
    first, second = (twin.name for twin in evidence.twins)
    comparisons: list[Comparison] = []
    problems: list[str] = []
    for name, config in CONFIGS.items():
        evidence.progress(f"{name}: {STEPS} steps")
        one, other = (steps(twin, config, parameters, gradients, rates) for twin in (first, second))
        for step in range(STEPS):
            ours, theirs = (_updates(seen, step) for seen in (one, other))
            label = f"{name}, step {step}"
            problems += [f"{label}: {text}" for text in set_problems("update", ours, theirs, (first, second))]
            comparisons += [
                compare(f"update of {path} ({label})", update, theirs[path], bound=BOUND)
                for path, update in ours.items()
                if path in theirs
            ]
        comparisons += [found for twin in evidence.twins for found in _low(twin.name, name, config, gradients, rates)]
    for twin in evidence.twins:
        problems += _not_finite(twin.name, gradients, rates)
    checked = f"{len(CONFIGS)} optimizers, {STEPS} steps, {len(comparisons)} updates"
    rung = rung_of(checked, comparisons, problems)
    if rung.verdict == "differ":
        wrong = [one.name.partition("(")[2].partition(",")[0] for one in comparisons if not one.agrees]
        wrong = wrong or ["clipping"]
        rung.culprits = list(dict.fromkeys(wrong))
    if rows is not None:
        rung.notes.append(f"of {total:,} parameters the first {rows} rows of each matrix were stepped")
    return rung


def _low(
    twin: str, name: str, config: OptimizerConfig, gradients: Sequence[Leaves], rates: Sequence[float]
) -> list[Comparison]:
    """The first step in float32 against the same in float64: what is small (1 - beta2ᵗ) is not lost in rounding.

    Compiled with care, as users have it, and so of one parameter of each rank: rounding is the same in all of them.
    """
    rounded = {path: leaf.astype(np.float32).astype(np.float64) for path, leaf in _one_of_each_rank(gradients[0])}
    nothing = {path: np.zeros_like(leaf) for path, leaf in rounded.items()}
    low, exact = (steps(twin, config, nothing, [rounded], rates[-2:-1], dtype)[1] for dtype in ("float32", "float64"))
    return [
        compare(f"update of {path} ({name} in float32, {twin})", leaf.astype(np.float64), exact[path], bound=LOW_BOUND)
        for path, leaf in low.items()
    ]


def _not_finite(twin: str, gradients: Sequence[Leaves], rates: Sequence[float]) -> Iterator[str]:
    """One gradient that is not finite makes the norm so: everything is lost, not one leaf, and nothing goes on."""
    for bad in (np.nan, np.inf):
        given = {path: leaf.copy() for path, leaf in _one_of_each_rank(gradients[0])}
        next(iter(given.values())).flat[0] = bad
        nothing = {path: np.zeros_like(leaf) for path, leaf in given.items()}
        for path, leaf in steps(twin, OptimizerConfig(), nothing, [given], rates[-2:-1])[1].items():
            if not np.isnan(leaf).all():
                left = int((~np.isnan(leaf)).sum())
                yield f"update of {path} (adamw, {twin}): expected NaN for a gradient with {bad}, got {left} others"


def _one_of_each_rank(leaves: Leaves) -> list[tuple[str, FloatArray]]:
    return list({leaf.ndim: (path, leaf) for path, leaf in reversed(leaves.items())}.values())


def _gradients(leaves: Leaves, step: int) -> Leaves:
    """The model's gradients, each element changed at random from step to step, and all of them scaled.

    An element that is zero stays so: a token that was not seen.
    """
    norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in leaves.values())) or 1.0
    return {
        path: leaf / norm * 10.0 ** _SCALES[step] * stream(step, f"optimizer/{path}").uniform(0.5, 1.5, leaf.shape)
        for path, leaf in leaves.items()
    }


def _updates(seen: list[Leaves], step: int) -> Leaves:
    return {path: leaf - seen[step][path] for path, leaf in seen[step + 1].items() if path in seen[step]}
