"""Rung 6, continued: the same run once more, of low-rank adapters, with losses over the tokens that are allowed.

``alpha / rank`` is not 1, and a rank that is not a power of two keeps a scale by another formula apart. What is told of
a step is the loss of the model with the adapters; what would be saved, and is evaluated, has them merged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from twinformer.data.batch import Batch
from twinformer.initializers import stream
from twinformer.learning import LoraConfig
from twinformer.parity.cut import describe
from twinformer.parity.evidence import Evidence
from twinformer.parity.rungs import training
from twinformer.parity.verdict import Rung, does_not_apply

STEPS = 4
LORA = LoraConfig(rank=3, alpha=5.0, targets=("query", "value", "output", "down"))


def check(evidence: Evidence) -> Rung:
    """Compare four steps of both twins with each other, and with the judge's own."""
    whole = evidence.case
    if not whole.config.predicts_tokens:
        return does_not_apply("the model predicts no tokens")
    case, batches = training.prepared(whole)
    plan = dataclasses.replace(training.TRAINING, lora=LORA, smoothing=0.0)
    rung = training.judged(evidence, case, plan, _restricted(batches[:STEPS], case.config.vocab_size))
    rung.notes += describe(case.config, whole.config)
    return rung


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
