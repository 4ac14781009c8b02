"""Rung 6, continued: in bfloat16 losses are computed wide, gradients of micro-batches summed wide, and divided once.

Two trainings in bfloat16 differ by rounding, so each twin is held against itself: one step over three micro-batches
against a step over each of them. The gradients of a micro-batch are the same numbers both times, and what is done with
them is float32 arithmetic. A gradient is read where it is kept, in a momentum that was 0 before. The average of the
weights is that of the float32 masters. A sum is clipped as it is, wide.
"""

from __future__ import annotations

import dataclasses
import math

import ml_dtypes
import numpy as np

from twinformer.data.batch import Batch
from twinformer.initializers import stream
from twinformer.learning import OptimizerConfig, ScheduleConfig, TrainingConfig
from twinformer.parity.case import Case
from twinformer.parity.compare import Comparison, compare, sibling_scales, widened
from twinformer.parity.cut import cut
from twinformer.parity.evidence import Evidence
from twinformer.parity.lessons import lessons
from twinformer.parity.training_runs import Leaves, Trained, cross_entropy
from twinformer.parity.twins import Twin
from twinformer.parity.verdict import Rung, does_not_apply, rung_of

# a few roundings of 6e-8 of the largest; one in bfloat16 makes 4e-3
BOUND = 1e-5
# what is left of an update with rate 1 in the difference of two float32 weights, the largest of which are about 30
MOVE_BOUND = 1e-3
_DECAY = 0.5
# what a loss is divided by comes back to it: not 1
_COTANGENT = 0.375
# the rate of the first step is the peak, without a warm-up
TRAINING = TrainingConfig(
    optimizer=OptimizerConfig(name="sgd", momentum=0.5, weight_decay=0.0, clip_norm=None, ema_decay=_DECAY),
    schedule=ScheduleConfig(name="constant", peak=1.0, warmup_steps=0, total_steps=1),
    accumulation=3,
    dropout=False,
)
_SHARES = ((1.0, 0.1, 0.4),)


def check(evidence: Evidence) -> Rung:
    """Compare the sum's gradient, its norm, the first move and the average of every weight with those of the parts."""
    if not evidence.case.config.predicts_tokens:
        return does_not_apply("the model predicts no tokens")
    comparisons = []
    for twin in evidence.twins:
        evidence.progress(f"{twin.name}: sums of micro-batches in bfloat16")
        comparisons += [*losses(twin), *of_twin(twin, evidence.case)]
    rung = rung_of(f"{len(comparisons)} losses, sums, moves and averages of each twin by itself", comparisons)
    if rung.verdict == "differ":
        rung.culprits = list(dict.fromkeys(one.name.partition(" of ")[0] for one in comparisons if not one.agrees))
    return rung


def losses(twin: Twin) -> list[Comparison]:
    """Of logits in low precision the loss is that of the same logits widened; its gradient is rounded once."""
    rng = stream(0, "accumulation/losses")
    shape = (2, 5, 61)
    batch = Batch({}, rng.integers(0, shape[-1], shape[:2]), rng.random(shape[:2]) < 0.8)
    found = []
    for dtype, rounding in (("float32", 2.0**-23), ("bfloat16", 2.0**-8)):
        logits = (rng.standard_normal(shape) * 6).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        for smoothing, z_loss in ((0.0, 0.0), (0.1, 1e-3)):
            label = f"({dtype}, smoothing={smoothing:g}, z_loss={z_loss:g}, {twin.name})"
            total, slope = twin.loss(logits, batch, smoothing, z_loss, _COTANGENT)
            expected, by_hand = cross_entropy(widened(logits), batch, smoothing, z_loss)
            found.append(compare(f"loss of logits {label}", total, np.array(expected), bound=BOUND))
            found.append(compare(f"gradient of logits {label}", slope, _COTANGENT * by_hand, bound=rounding + BOUND))
    return [*found, *_next_tokens(twin)]


def _next_tokens(twin: Twin) -> list[Comparison]:
    """Of rows with padding on the left, on the right and in between."""
    tokens = stream(0, "accumulation/tokens").integers(0, 61, (3, 6))
    real = np.ones(tokens.shape, np.bool_)
    real[0, :2] = real[1, 4:] = real[2, 3] = False
    expected = (tokens[:, :-1], tokens[:, 1:], real[:, :-1] & real[:, 1:])
    names = ("inputs", "targets", "places")
    return [
        compare(f"{name} of next_tokens ({twin.name})", widened(part.astype(float)), wanted.astype(float), bound=0.0)
        for name, part, wanted in zip(names, twin.next_tokens(tokens, real), expected, strict=True)
    ]


def of_twin(twin: Twin, whole: Case) -> list[Comparison]:
    """With a model of one layer."""
    sized = cut(whole, lessons(whole.config, ((1.0,),))[0][0].inputs, layers=1).config
    batches = lessons(sized, _SHARES)[0]
    case = cut(whole, batches[0].inputs, layers=1).in_dtype("bfloat16")
    *parts, together = twin.once(
        "accumulation",
        case,
        lambda: twin.train(case, TRAINING, [[[one]] for one in batches] + [[batches]], evaluate=False),
    )
    counts = [batch.count for batch in batches]
    means = _mean([_momentum(part) for part in parts], counts)
    scales = sibling_scales(means)
    sums = _momentum(together)
    found = [
        compare(f"sum of {path} ({twin.name})", sums[path], mean, bound=BOUND, scale=scales[path])
        for path, mean in means.items()
    ]
    cut_to = 0.25 * float(f"{together.steps[0].gradient_norm:.2g}")
    clipping = dataclasses.replace(TRAINING, optimizer=dataclasses.replace(TRAINING.optimizer, clip_norm=cut_to))
    (clipped,) = twin.once(
        f"accumulation, clipped to {cut_to}",
        case,
        lambda: twin.train(case, clipping, [[batches]], evaluate=False),
    )
    factor = cut_to / together.steps[0].gradient_norm
    found += [
        compare(
            f"clipped sum of {path} ({twin.name})", leaf, factor * sums[path], bound=BOUND, scale=factor * scales[path]
        )
        for path, leaf in _momentum(clipped).items()
    ]
    norm = math.sqrt(sum(float((leaf**2).sum()) for leaf in sums.values()))
    told = together.steps[0].gradient_norm
    found.append(compare(f"norm of the sum ({twin.name})", np.array([told]), np.array([norm]), bound=BOUND))
    found += [
        compare(f"move of {path} ({twin.name})", move, -sums[path], bound=MOVE_BOUND, scale=scales[path])
        for path, move in _moves(together, case).items()
    ]
    averages, masters = _slot(together, "ema"), _slot(together, "master")
    found += [
        compare(
            f"parameter of {path} ({twin.name})",
            widened(together.exported[f"parameters/{path}"]),
            widened(master.astype(np.float32).astype(ml_dtypes.bfloat16)),
            bound=0.0,
        )
        for path, master in masters.items()
    ]
    found += [
        compare(
            f"average of {path} ({twin.name})",
            average,
            _DECAY * case.tensors[path].astype(np.float64) + (1 - _DECAY) * masters[path],
            bound=BOUND,
        )
        for path, average in averages.items()
    ]
    return found


def _mean(parts: list[Leaves], counts: list[int]) -> Leaves:
    """Over all targets, of means over the targets of each part."""
    share = np.array(counts) / sum(counts)
    return {path: np.tensordot(share, np.stack([part[path] for part in parts]), 1) for path in parts[0]}


def _momentum(run: Trained) -> Leaves:
    return _slot(run, "momentum")


def _moves(run: Trained, case: Case) -> Leaves:
    """By how much the float32 masters moved from the weights that they began as."""
    return {path: leaf - case.tensors[path].astype(np.float64) for path, leaf in _slot(run, "master").items()}


def _slot(run: Trained, name: str) -> Leaves:
    prefix = f"optimizer/{name}/"
    return {path.removeprefix(prefix): leaf for path, leaf in run.state.items() if path.startswith(prefix)}
