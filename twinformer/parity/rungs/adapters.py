"""Rung 6, continued: the same run once more, of low-rank adapters, with losses over the tokens that are allowed.

``alpha / rank`` is not 1, and a rank that is not a power of two keeps a scale by another formula apart. What is told of
a step is the loss of the model with the adapters; what would be saved, and is evaluated, has them merged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from twinformer.data.batch import Batch
from twinformer.initializers import stream
from twinformer.learning import LoraConfig
from twinformer.parity.case import Case
from twinformer.parity.compare import Comparison, compare, widened
from twinformer.parity.cut import describe
from twinformer.parity.evidence import Evidence
from twinformer.parity.rungs import training
from twinformer.parity.training_runs import merged
from twinformer.parity.twins import Twin
from twinformer.parity.verdict import Rung, does_not_apply

STEPS = 4
LORA = LoraConfig(rank=3, alpha=5.0, targets=("query", "value", "output", "down"))


def check(evidence: Evidence) -> Rung:
    """Compare four steps of both twins with each other, and with the judge's own."""
    whole = evidence.case
    if not whole.config.predicts_tokens:
        return does_not_apply("the model predicts no tokens")
    case, batches = training.prepared(whole)
    plan = dataclasses.replace(training.TRAINING, lora=LORA, smoothing=0.0, accumulation=1)
    single = [micro_batches[:1] for micro_batches in batches[:STEPS]]
    rung = training.judged(evidence, case, plan, _restricted(single, case.config.vocab_size))
    for twin in evidence.twins:
        rung.add(_merged(twin, case.in_dtype("bfloat16")), lambda _: "merged weights")
    rung.notes += describe(case.config, whole.config)
    return rung


def _merged(twin: Twin, case: Case) -> list[Comparison]:
    """In bfloat16: ``W + alpha / rank · B A`` is rounded once, not the product first."""
    plan = dataclasses.replace(
        training.TRAINING, lora=LORA, optimizer=dataclasses.replace(training.TRAINING.optimizer, ema_decay=None)
    )
    (fresh,) = twin.train(case, plan, [[]], evaluate=False)
    state, adapters = dict(fresh.exported), {}
    for name in [name for name in state if name.startswith("parameters/")]:
        path = name.removeprefix("parameters/")
        drawn = stream(0, f"adapters/{path}").normal(0, 0.5, state[name].shape).astype(state[name].dtype)
        state[name], adapters[path] = drawn, widened(drawn)
        state[f"optimizer/master/{path}"] = drawn.astype(np.float32)
    (again,) = twin.train(case, plan, [[]], evaluate=False, begin=state)
    exact = merged({path: widened(tensor) for path, tensor in case.tensors.items()}, adapters, LORA)
    found = []
    for path in (path for path in exact if LORA.adapts(path)):
        nearest = widened(exact[path].astype(ml_dtypes.bfloat16))
        got = again.weights[path]
        # where two numbers are equally near but for rounding in float32, either will do
        is_tie = np.abs(got - exact[path]) <= np.abs(nearest - exact[path]) + 1e-6 * np.abs(exact[path]).max()
        found.append(
            compare(f"merged {path} (bfloat16, {twin.name})", np.where(is_tie, nearest, got), nearest, bound=0.0)
        )
    return found


def _restricted(batches: Sequence[Sequence[Batch]], vocab_size: int) -> list[list[Batch]]:
    """The batches with half of the tokens possible at every place, the target among them."""
    rng = stream(0, "adapters/allowed")
    found: list[list[Batch]] = []
    for micro_batches in batches:
        found.append([])
        for batch in micro_batches:
            allowed = rng.random((*batch.targets.shape, vocab_size)) < 0.5
            np.put_along_axis(allowed, np.where(batch.real, batch.targets, 0)[..., None], True, -1)
            found[-1].append(dataclasses.replace(batch, allowed=allowed))
    return found
