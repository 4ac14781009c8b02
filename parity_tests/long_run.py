"""The same training run in both frameworks, over hundreds of steps: what parts, by how much, and where.

``python -m parity_tests.long_run [PRESET …]``: dropout on, warm-up, clipping, weight decay, accumulation with unequal
counts of targets (some micro-batches without any). In float64 loss, norm and every update of the twins are compared
step by step. In float32 each twin's losses are held against its own float64 run, and the twins against each other.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from twinformer.checkpoint import write_atomically
from twinformer.initializers import initial_weights
from twinformer.learning import OptimizerConfig, ScheduleConfig, TrainingConfig
from twinformer.parity.case import Case, make_case
from twinformer.parity.compare import sibling_scales
from twinformer.parity.lessons import ACCUMULATION, SHARES, lessons
from twinformer.parity.training_runs import Trained
from twinformer.parity.twins import FlaxTwin, TorchTwin, Twin
from twinformer.presets import preset

PRESETS = ("textbook-encoder-decoder", "gpt2", "llama")
STEPS = 204
_RATES = {"dropout": 0.1, "attention_dropout": 0.1, "hidden_dropout": 0.1}


@dataclass(frozen=True)
class Parted:
    """Largest relative differences over a run, and at which step: of the losses, norms and update vectors.

    An update is relative to the largest of its module: what is zero by mathematics is noise.
    """

    steps: int
    loss: tuple[float, int]
    norm: tuple[float, int]
    update: tuple[float, int, str]
    clipped: int
    unclipped: int


def case_of(name: str, **sizes: int) -> Case:
    config = preset(name).replace(**_RATES, **sizes)
    batch = lessons(config, ((1.0,),))[0][0]
    return make_case(name, config, initial_weights(config, 7), batch.inputs)


def training_of(steps: int, clip_norm: float | None, eps: float = 1e-8) -> TrainingConfig:
    """AdamW as it is used; the seed needs both words of a key."""
    return TrainingConfig(
        optimizer=OptimizerConfig(weight_decay=0.1, beta2=0.98, eps=eps, ema_decay=0.99, clip_norm=clip_norm),
        schedule=ScheduleConfig(name="cosine", peak=3e-3, warmup_steps=steps // 10, total_steps=steps),
        accumulation=ACCUMULATION,
        smoothing=0.1,
        z_loss=1e-4,
        seed=2**33 + 11,
    )


def run(twin: Twin, case: Case, training: TrainingConfig, steps: int) -> Trained:
    shares = [SHARES[step % len(SHARES)] for step in range(steps)]
    (done,) = twin.train(case, training, [lessons(case.config, shares)], evaluate=False)
    return done


def parted(ours: Trained, theirs: Trained, clip_norm: float) -> Parted:
    """The twins' runs against each other. Raises ValueError where the sets of updates differ."""
    loss, norm, update = (0.0, 0), (0.0, 0), (0.0, 0, "")
    for step, (a, b) in enumerate(zip(ours.steps, theirs.steps, strict=True)):
        if a.updates.keys() != b.updates.keys() or a.count != b.count or a.learning_rate != b.learning_rate:
            raise ValueError(f"step {step}: expected the same updates, counts and rates")
        loss = _larger(loss, (_relative(a.loss, b.loss), step))
        norm = _larger(norm, (_relative(a.gradient_norm, b.gradient_norm), step))
        scales = sibling_scales(b.updates)
        for path, leaf in a.updates.items():
            difference = float(np.abs(leaf - b.updates[path]).max())
            relative = difference / scales[path] if scales[path] else (math.inf if difference else 0.0)
            if not relative <= update[0]:  # NaN too
                update = (relative, step, path)
    counted = [one.gradient_norm > clip_norm for one in theirs.steps if one.count]
    return Parted(len(theirs.steps), loss, norm, update, sum(counted), len(counted) - sum(counted))


def _larger(kept: tuple[float, int], found: tuple[float, int]) -> tuple[float, int]:
    return kept if found[0] <= kept[0] else found


def _relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b) if b else (0.0 if a == b else math.inf)


def losses(run: Trained) -> np.ndarray:
    return np.array([step.loss for step in run.steps])


@dataclass(frozen=True)
class Curves:
    """Root mean squares over the steps: of the differences of float32 losses from the float64 ones, each twin's own,
    and of the twins' float32 losses from each other."""

    torch: float
    flax: float
    between: float


def curves(torch_32: Trained, torch_64: Trained, flax_32: Trained, flax_64: Trained) -> Curves:
    def rms(one: Trained, other: Trained) -> float:
        return float(np.sqrt(np.mean((losses(one) - losses(other)) ** 2)))

    return Curves(rms(torch_32, torch_64), rms(flax_32, flax_64), rms(torch_32, flax_32))


def both(
    case: Case, steps: int = STEPS, eps: float = 1e-8, twins: tuple[Twin, Twin] | None = None
) -> tuple[Parted, Curves]:
    """Both twins in both dtypes. Clipping lies in the middle of the norms that a run without it has."""
    twins = twins or (TorchTwin(), FlaxTwin())
    wide = case.in_dtype("float64")
    free = run(twins[0], wide, training_of(steps, None, eps), steps)
    clip_norm = float(np.median([one.gradient_norm for one in free.steps if one.count]))
    training = training_of(steps, clip_norm, eps)
    torch_64, flax_64 = (run(twin, wide, training, steps) for twin in twins)
    torch_32, flax_32 = (run(twin, case.in_dtype("float32"), training, steps) for twin in twins)
    return parted(torch_64, flax_64, clip_norm), curves(torch_32, torch_64, flax_32, flax_64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("presets", nargs="*", default=PRESETS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--eps", type=float, default=1e-8)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    rows = []
    for name in options.presets:
        found, drawn = both(case_of(name), options.steps, options.eps)
        rows.append({"preset": name, "eps": options.eps, **vars(found), "float32": vars(drawn)})
        print(json.dumps(rows[-1]), flush=True)  # noqa: T201
    if options.out is not None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(options.out, lambda file: file.write_text(text))


if __name__ == "__main__":
    main()
