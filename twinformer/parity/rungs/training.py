"""Rung 6: the same run in both twins, dropout on, step by step, and the same once more put together by the judge.

What is compared is what a step tells (loss, norm of the gradient, number of targets, learning rate) and by how much it
moves every parameter; the parameters themselves would hide a step that does nothing. The judge's own run
(``training_runs.py``) is the third opinion: it takes output and gradients from the model, as the rungs below have
judged them, and does keys, sums, division, clipping and update in NumPy, so that two wrong trainers do not agree by
being wrong alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from twinformer.data.batch import Batch
from twinformer.initializers import initial_weights
from twinformer.learning import OptimizerConfig, ScheduleConfig, TrainingConfig
from twinformer.parity.case import Case
from twinformer.parity.compare import Comparison, compare, set_problems, sibling_scales, widened
from twinformer.parity.cut import cut, describe
from twinformer.parity.evidence import Evidence
from twinformer.parity.lessons import ACCUMULATION, SHARES, lessons
from twinformer.parity.training_runs import Leaves, Trained, first_adapters, mean_gradients, train_by_hand
from twinformer.parity.twins import Twin
from twinformer.parity.verdict import Rung, does_not_apply, rung_of

STEPS = len(SHARES)
# A gradient agrees to 1e-14 of the module's largest; AdamW divides it by its own size, at least eps = 1e-4, which takes
# an element that is noise to 1e-12 of an update, and twelve steps through one another to 1e-10 at the worst.
BOUND = 1e-9
SCHEDULE = ScheduleConfig(name="cosine", peak=1e-2, warmup_steps=3, total_steps=STEPS, final_fraction=0.1)
# a seed that needs both words of a key
TRAINING = TrainingConfig(
    optimizer=OptimizerConfig(weight_decay=0.1, eps=1e-4, ema_decay=0.8),
    schedule=SCHEDULE,
    accumulation=ACCUMULATION,
    smoothing=0.1,
    z_loss=1e-3,
    seed=2**33 + 7,
)
# of a model without dropout, in one place: which keys go where is asked by the rung of dropout, here to which step
_RATES = {"dropout": 0.0, "attention_dropout": 0.0, "hidden_dropout": 0.2}
_TOLD = ("step", "count", "learning_rate", "loss", "gradient_norm")


def check(evidence: Evidence) -> Rung:
    """Compare both runs with each other, and with the judge's."""
    whole = evidence.case
    if not whole.config.predicts_tokens:
        return does_not_apply("the model predicts no tokens")
    case, batches = prepared(whole)
    training = _training(evidence.twins[0], case, batches)
    rung = judged(evidence, case, training, batches)
    rung.notes += describe(case.config, whole.config)
    return rung


def judged(evidence: Evidence, case: Case, training: TrainingConfig, batches: Sequence[Sequence[Batch]]) -> Rung:
    """This run in both twins and by hand."""
    evidence.progress(f"the judge: {len(batches)} steps by hand")
    by_hand = train_by_hand(evidence.twins[0], case, training, batches)
    for _ in range(2):
        if _kinds(by_hand, training) == {True, False}:
            break
        # the norms moved away from where they began: clip in the middle of what they came to be
        training = _clipping_at(
            training, float(np.median([step.gradient_norm for step in by_hand.steps if step.count]))
        )
        by_hand = train_by_hand(evidence.twins[0], case, training, batches)
    runs = []
    begin = [
        compare(f"{twin.name}: weights of seed {training.seed}: {path}", leaf, drawn, bound=0.0)
        for twin in evidence.twins
        for path, leaf, drawn in _begun(twin, case, training)
    ]
    for twin in evidence.twins:
        evidence.progress(f"{twin.name}: {len(batches)} steps")
        what = f"training {training.lora}"
        runs += twin.once(what, case, partial(twin.train, case, training, [batches]))
    first, second = (twin.name for twin in evidence.twins)
    pairs = {
        f"{first}, {second}": (runs[0], runs[1], first, second),
        f"{first}, by hand": (runs[0], by_hand, first, "by hand"),
    }
    comparisons: list[Comparison] = []
    problems: list[str] = []
    for label, (one, other, left, right) in pairs.items():
        problems += state_problems(label, one, other, (left, right))
        comparisons += compared(label, one, other)
    if first_parted(comparisons):  # whose step is it?
        more = compared(f"{second}, by hand", runs[1], by_hand)
        comparisons += [] if all(one.agrees for one in more) else more
    parted = first_parted(comparisons)
    rung = rung_of(f"{len(batches)} steps, {len(comparisons)} figures", [*comparisons, *begin], problems)
    if rung.verdict == "agree" and _kinds(by_hand, training) != {True, False}:
        rung.verdict, rung.problems = "cannot tell", ["clipping: expected active and inactive steps, got one kind only"]
    if rung.verdict == "differ":
        _blame(rung, parted, len(batches))
        if not all(one.agrees for one in begin):
            rung.culprits.append("initial weights")
    return rung


def _begun(twin: Twin, case: Case, training: TrainingConfig) -> Iterator[tuple[str, Any, Any]]:
    """Path, the twin's value and the contract's, of all weights where nobody gives any."""
    drawn: Leaves = {path: widened(leaf) for path, leaf in initial_weights(case.config, training.seed).items()}
    if training.lora is not None:
        drawn = first_adapters(drawn, training.lora, training.seed)
    for path, leaf in twin.fresh(case, training).items():
        yield path, leaf, drawn.get(path, np.empty(0))


def first_parted(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """What differs first: of the earliest step the first kind of figure that does, in the order of a step."""
    differing = [one for one in comparisons if not one.agrees]
    if not differing:
        return []
    earliest = min(map(_when, differing))
    return [one for one in differing if _when(one) == earliest]


def prepared(whole: Case) -> tuple[Case, list[list[Batch]]]:
    """The model cut down, in float64 and with dropout, and what it is taught."""
    config = whole.config
    if not any((config.dropout, config.attention_dropout, config.hidden_dropout, config.embedding_dropout)):
        config = config.replace(**_RATES)
    small = dataclasses.replace(whole, config=config)
    sized = cut(small, lessons(config, ((1.0,),))[0][0].inputs, layers=1).config
    batches = lessons(sized)
    return cut(small, batches[0][0].inputs, layers=1).in_dtype("float64"), batches


def _training(twin: Twin, case: Case, batches: Sequence[Sequence[Batch]]) -> TrainingConfig:
    """Clipping between the norms of a step with many targets and of one with few."""
    norms = [mean_gradients(twin, case, TRAINING, batches[step], step)[1] for step in (0, 1)]
    clip_norm = math.sqrt(norms[0] * norms[1]) or 1.0
    return _clipping_at(TRAINING, clip_norm)


def _clipping_at(training: TrainingConfig, norm: float) -> TrainingConfig:
    return dataclasses.replace(training, optimizer=dataclasses.replace(training.optimizer, clip_norm=norm))


def _kinds(run: Trained, training: TrainingConfig) -> set[bool]:
    """Whether clipping was active, in any step that has targets."""
    return {step.gradient_norm > (training.optimizer.clip_norm or math.inf) for step in run.steps if step.count}


def compared(label: str, one: Trained, other: Trained) -> list[Comparison]:
    """Step by step what was told and every update, then what is left at the end."""
    found = []
    for step, (ours, theirs) in enumerate(zip(one.steps, other.steps, strict=True)):
        at = f"step {step}, {label}"
        found += [
            compare(f"{name.replace('_', ' ')} ({at})", np.array([a]), np.array([b]), bound=BOUND if b else 0.0)
            for name in _TOLD
            for a, b in [(getattr(ours, name), getattr(theirs, name))]
        ]
        found += _leaves("update of ", at, ours.updates, theirs.updates)
    at = f"step {len(one.steps)}, {label}"  # after the last
    found += _leaves("", at, one.state, other.state)
    found += _leaves("saved ", at, one.weights, other.weights)
    if one.evaluation is None and other.evaluation is None:
        return found
    for name in ("total", "count", "correct"):
        a, b = (np.array([float(getattr(run.evaluation, name))]) for run in (one, other))
        found.append(compare(f"evaluation: {name} ({at})", a, b, bound=BOUND if name == "total" else 0.0))
    if one.logs is not None and other.logs is not None:
        found.append(compare(f"evaluation: log-probabilities ({at})", one.logs, other.logs, bound=BOUND))
    return found


def _leaves(prefix: str, at: str, ours: Leaves, theirs: Leaves) -> list[Comparison]:
    """Relative to the largest within the module: what is zero by mathematics is noise (``sibling_scales``)."""
    scales = sibling_scales(theirs)
    return [
        compare(f"{prefix}{path} ({at})", leaf, theirs[path], bound=BOUND, scale=scales[path])
        for path, leaf in ours.items()
        if path in theirs
    ]


def state_problems(label: str, one: Trained, other: Trained, sides: tuple[str, str]) -> list[str]:
    problems = set_problems(f"{label}: state", one.state, other.state, sides)
    problems += set_problems(f"{label}: saved weights", one.weights, other.weights, sides)
    for ours, theirs in zip(one.steps[:1], other.steps[:1], strict=True):
        problems += set_problems(f"{label}: update", ours.updates, theirs.updates, sides)
    return problems


# ---- what parted first

_ORDER = ("step", "count", "learning rate", "loss", "gradient norm", "update of ", "optimizer/", "saved ", "evaluation")


def _when(one: Comparison) -> tuple[int, int]:
    step = int(one.name.rpartition("(step ")[2].partition(",")[0])
    kind = next((place for place, name in enumerate(_ORDER) if one.name.startswith(name)), len(_ORDER))
    return step, kind


def _blame(rung: Rung, parted: Sequence[Comparison], steps: int) -> None:
    """Name what parted first, and whose step is not that of the judge."""
    if not parted:
        return
    step, _ = _when(parted[0])
    paths = list(dict.fromkeys(one.name.rpartition(" (step ")[0] for one in parted))
    total = {one.name.rpartition(" (step ")[0] for one in rung.comparisons if f"(step {step}," in one.name}
    updates = [name for name in total if name.startswith("update of ")]
    rung.culprits = ["every update"] if len(paths) == len(updates) > 1 else paths
    sides = [one.name.rpartition(", ")[0].rpartition(", ")[2] for one in parted if one.name.endswith("by hand)")]
    where = f"at step {step}" if step < steps else "after the last step"
    rung.notes.append(f"parted first {where}: {parted[0].describe()}")
    if sides:
        rung.notes.append(f"not as the judge has it by hand: {', '.join(dict.fromkeys(sides))}")
