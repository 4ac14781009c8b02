"""Training runs: of either twin's trainer, and one put together by the judge in NumPy.

The judge's own run takes nothing from a trainer: the model's output and gradients come from the runs that the rungs
below have judged, keys, loss, sums, division, clipping and AdamW are written here from ``docs/contract.md``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from twinformer.data.batch import Batch
from twinformer.initializers import stream
from twinformer.learning import Evaluation, LoraConfig, Trainer, TrainingConfig
from twinformer.parity.case import Case
from twinformer.parity.compare import FloatArray, widened
from twinformer.parity.philox import fold, random_key

if TYPE_CHECKING:
    from twinformer.parity.twins import Twin

Leaves = dict[str, FloatArray]


@dataclass(frozen=True)
class Step:
    """What one step told, and by how much it moved every parameter."""

    loss: float
    gradient_norm: float
    count: float
    learning_rate: float
    updates: Leaves
    step: int


@dataclass(frozen=True)
class Trained:
    """A run. ``state``: what is kept besides the parameters, by name, after the last step; ``weights``: what would be
    saved; ``evaluation`` and ``logs``, the targets' log-probabilities: of the first micro-batch, with those (None: not
    asked for); ``exported``: all that a trainer needs to go on."""

    steps: tuple[Step, ...]
    state: Leaves
    weights: Leaves
    evaluation: Evaluation | None = None
    logs: FloatArray | None = None
    exported: dict[str, npt.NDArray[Any]] = dataclasses.field(default_factory=dict)


def train(
    trainer: Trainer,
    tensors: Mapping[str, Any],
    lessons: Sequence[Sequence[Batch]],
    *,
    evaluate: bool,
    begin: Mapping[str, Any] | None = None,
) -> Trained:
    """Every step of a twin's trainer, from these weights, or from where another run was left (its ``exported``)."""
    state = trainer.init(tensors) if begin is None else trainer.import_state(begin)
    before = _parameters(trainer.export_state(state))
    steps = []
    for batches in lessons:
        state, metrics = trainer.step(state, batches)
        after = _parameters(trainer.export_state(state))
        steps.append(
            Step(
                float(metrics.loss),
                float(metrics.gradient_norm),
                float(metrics.count),
                metrics.learning_rate,
                {path: leaf - before[path] for path, leaf in after.items() if path in before},
                metrics.step,
            )
        )
        before = after
    exported = {name: np.array(leaf) for name, leaf in trainer.export_state(state).items()}
    kept = {name: widened(leaf) for name, leaf in exported.items() if name.startswith("optimizer/")}
    weights = {path: widened(leaf) for path, leaf in trainer.weights(state).items()}
    evaluation = trainer.evaluate(state, lessons[0][0]) if evaluate else None
    logs = widened(trainer.log_probabilities(state, lessons[0][0])) if evaluate else None
    return Trained(tuple(steps), kept, weights, evaluation, logs, exported)


def fresh(trainer: Trainer) -> dict[str, npt.NDArray[Any]]:
    """The parameters that a trainer begins with where nobody gives any."""
    prefix = "parameters/"
    exported = trainer.export_state(trainer.init())
    return {name.removeprefix(prefix): np.array(x) for name, x in exported.items() if name.startswith(prefix)}


def _parameters(exported: Mapping[str, npt.NDArray[Any]]) -> Leaves:
    prefix = "parameters/"
    return {name.removeprefix(prefix): widened(x) for name, x in exported.items() if name.startswith(prefix)}


# ---- the judge's own


def train_by_hand(twin: Twin, case: Case, training: TrainingConfig, lessons: Sequence[Sequence[Batch]]) -> Trained:
    """The same run, put together from ``twin``'s model and AdamW in NumPy, in float64.

    With adapters they are what is stepped: the model has their product added to its weights.
    """
    case = case.in_dtype("float64")
    whole = {path: widened(tensor) for path, tensor in case.tensors.items()}
    lora = training.lora
    w = whole if lora is None else first_adapters(whole, lora, training.seed)
    m, v = ({path: np.zeros_like(leaf) for path, leaf in w.items()} for _ in range(2))
    ema = {path: leaf.copy() for path, leaf in w.items()}
    config, decay = training.optimizer, training.optimizer.ema_decay or 0.0
    steps = []
    for s, batches in enumerate(lessons):
        tensors = dict(w) if lora is None else merged(whole, w, lora)
        loss, norm, count, g = mean_gradients(twin, dataclasses.replace(case, tensors=tensors), training, batches, s)
        if lora is not None:
            g = _to_adapters(g, w, lora)
            norm = math.sqrt(sum(float((leaf**2).sum()) for leaf in g.values()))
        if config.clip_norm is not None and norm > config.clip_norm:
            g = {path: leaf * (config.clip_norm / norm) for path, leaf in g.items()}
        rate = training.schedule.learning_rate(s)
        updates = {}
        for path, leaf in g.items():
            m[path] = config.beta1 * m[path] + (1 - config.beta1) * leaf
            v[path] = config.beta2 * v[path] + (1 - config.beta2) * leaf**2
            m_hat, v_hat = m[path] / (1 - config.beta1 ** (s + 1)), v[path] / (1 - config.beta2 ** (s + 1))
            d = m_hat / (np.sqrt(v_hat) + config.eps)
            new = w[path] - rate * (d + (config.weight_decay * w[path] if config.decays(path) else 0.0))
            updates[path], w[path] = new - w[path], new
            ema[path] = decay * ema[path] + (1 - decay) * new
        steps.append(Step(loss, norm, count, rate, updates, s))
    kept = {f"optimizer/exp_avg/{path}": leaf for path, leaf in m.items()}
    kept |= {f"optimizer/exp_avg_sq/{path}": leaf for path, leaf in v.items()}
    kept |= {f"optimizer/ema/{path}": leaf for path, leaf in ema.items()}
    kept["optimizer/step"] = np.array(float(len(lessons)))
    final = ema if lora is None else merged(whole, ema, lora)
    evaluated = _evaluated(twin, dataclasses.replace(case, tensors=dict(final)), lessons[0][0])
    return Trained(tuple(steps), kept, final, *evaluated)


def first_adapters(weights: Leaves, lora: LoraConfig, seed: int) -> Leaves:
    """A drawn from the stream of its path, with deviation 1 / sqrt(in), in float32; B zero."""
    found: Leaves = {}
    for path, W in weights.items():
        if lora.adapts(path):
            owner = path.removesuffix(".weight")
            A = stream(seed, f"{owner}.lora_a").standard_normal((lora.rank, W.shape[1])) / math.sqrt(W.shape[1])
            found[f"{owner}.lora_a"] = A.astype(np.float32).astype(np.float64)
            found[f"{owner}.lora_b"] = np.zeros((W.shape[0], lora.rank))
    return found


def merged(weights: Leaves, adapters: Leaves, lora: LoraConfig) -> Leaves:
    """``W + alpha / rank · B A``."""
    found = dict(weights)
    for owner in (path.removesuffix(".lora_a") for path in adapters if path.endswith(".lora_a")):
        product = adapters[f"{owner}.lora_b"] @ adapters[f"{owner}.lora_a"]
        found[f"{owner}.weight"] = weights[f"{owner}.weight"] + lora.alpha / lora.rank * product
    return found


def _to_adapters(gradients: Leaves, adapters: Leaves, lora: LoraConfig) -> Leaves:
    """``dA = alpha / rank · Bᵀ dW``, ``dB = alpha / rank · dW Aᵀ``."""
    found: Leaves = {}
    for path in adapters:
        owner, _, leaf = path.rpartition(".")
        dW = lora.alpha / lora.rank * gradients[f"{owner}.weight"]
        a, b = adapters[f"{owner}.lora_a"], adapters[f"{owner}.lora_b"]
        found[path] = b.T @ dW if leaf == "lora_a" else dW @ a.T
    return found


def mean_gradients(
    twin: Twin, case: Case, training: TrainingConfig, batches: Sequence[Batch], s: int
) -> tuple[float, float, float, Leaves]:
    """Loss, norm, number of targets and gradient of the mean over all targets of the micro-batches of step ``s``."""
    total, count, sums = 0.0, 0, {path: np.zeros(leaf.shape) for path, leaf in case.tensors.items()}
    for place, batch in enumerate(batches):
        key = fold(fold(random_key(training.seed), s), place)
        inputs = batch.inputs | ({"rng": np.array(key, np.int64)} if training.dropout else {})
        asked = dataclasses.replace(case, inputs=inputs)
        logits = _possible(twin.run(asked, detail="blocks").output, batch)
        loss, slope = cross_entropy(logits, batch, training.smoothing, training.z_loss)
        total, count = total + loss, count + batch.count
        if batch.count:
            pulled = twin.run(dataclasses.replace(asked, cotangent=slope), gradients=True, detail="blocks")
            sums = {path: leaf + pulled.gradients[path] for path, leaf in sums.items()}
    if not count:
        return 0.0, 0.0, 0.0, sums
    means = {path: leaf / count for path, leaf in sums.items()}
    norm = math.sqrt(sum(float((leaf**2).sum()) for leaf in means.values()))
    return total / count, norm, float(count), means


def _possible(logits: FloatArray, batch: Batch) -> FloatArray:
    """With -inf for tokens that are not allowed."""
    return logits if batch.allowed is None else np.where(batch.allowed, logits, -np.inf)


def cross_entropy(logits: FloatArray, batch: Batch, smoothing: float, z_loss: float) -> tuple[float, FloatArray]:
    """The sum over the places that count, and its gradient with respect to the logits."""
    V = logits.shape[-1]
    real = batch.real
    peak = logits.max(-1, keepdims=True)
    log_sum = peak + np.log(np.exp(logits - peak).sum(-1, keepdims=True))
    targets = np.where(real, batch.targets, 0)[..., None]
    losses = (1 - smoothing) * (log_sum - np.take_along_axis(logits, targets, -1))
    if smoothing:  # not 0 times the mean: a logit may be -inf
        losses = losses + smoothing * (log_sum - logits.mean(-1, keepdims=True))
    losses = losses + z_loss * log_sum**2
    wanted = np.full_like(logits, smoothing / V)
    np.put_along_axis(wanted, targets, np.take_along_axis(wanted, targets, -1) + 1 - smoothing, -1)
    slope = np.exp(logits - log_sum) * (1 + 2 * z_loss * log_sum) - wanted
    return float(losses[..., 0][real].sum()), np.where(real[..., None], slope, 0.0)


def _evaluated(twin: Twin, case: Case, batch: Batch) -> tuple[Evaluation, FloatArray]:
    """Sums over the targets that count, and ln p of each."""
    logits = _possible(twin.run(dataclasses.replace(case, inputs=batch.inputs), detail="blocks").output, batch)
    total, _ = cross_entropy(logits, batch, 0.0, 0.0)
    correct = int((logits.argmax(-1) == batch.targets)[batch.real].sum())
    peak = logits.max(-1, keepdims=True)
    logs = logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))
    chosen = np.take_along_axis(logs, np.where(batch.real, batch.targets, 0)[..., None], -1)[..., 0]
    return Evaluation(total, batch.count, correct), np.where(batch.real, chosen, 0.0)
