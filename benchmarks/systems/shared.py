"""What both twins are told: an optimizer as the peers have it, the same batch, the same beam."""

from __future__ import annotations

import numpy as np

from benchmarks.cases import LEARNING_RATE, WEIGHT_DECAY, Case
from twinformer.data.batch import Batch
from twinformer.decoding import BeamConfig
from twinformer.learning import OptimizerConfig, ScheduleConfig, TrainingConfig

BEAM = BeamConfig(width=4, length_penalty="mean", alpha=1.0, early_stopping=False)


def training_config() -> TrainingConfig:
    """AdamW as the peers have it: every leaf decays, nothing is clipped."""
    optimizer = OptimizerConfig(
        beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=WEIGHT_DECAY, decay="all", clip_norm=None
    )
    return TrainingConfig(
        optimizer=optimizer,
        schedule=ScheduleConfig(name="constant", peak=LEARNING_RATE, warmup_steps=0, total_steps=10**6),
        seed=0,
    )


def batch_of(case: Case) -> Batch:
    return Batch(inputs=case.inputs(), targets=case.targets(), real=np.ones((case.B, case.T), np.bool_))
