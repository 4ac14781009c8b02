"""Flax's Trainer against a training loop of plain JAX and optax, written as a user of optax writes it, in float64.

Both train our LanguageModel; nothing of losses.py, optimizers.py and training.py is in the plain loop. It sees all
micro-batches as one batch: sums that are divided once must come to the same. (With 64 bits on, optax computes its
``1 - beta^t`` in float64: its chain is used as it is.)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from flax_impl import optimizers, training
from flax_impl.models import LanguageModel
from flax_impl.weights import export_weights
from parity_tests.helpers import FLOAT64
from twinformer import ModelConfig
from twinformer.data.batch import Batch
from twinformer.learning import OptimizerConfig, ScheduleConfig, TrainingConfig

STEPS, B, T, V = 20, 2, 5, 11
CONFIG = ModelConfig(
    architecture="decoder",
    vocab_size=V,
    context_length=T,
    model_dim=6,
    key_dim=3,
    hidden_dim=10,
    num_heads=2,
    num_layers=1,
    positions="learned",
    output_bias=True,  # not qkv_bias: the gradient of a key's bias is zero by mathematics, its update all rounding
    initializer="xavier_uniform",
    initializer_std=0.5,
    **FLOAT64,
)
OPTIMIZER = OptimizerConfig(beta1=0.8, beta2=0.97, eps=1e-6, weight_decay=0.1, clip_norm=1.5)
SCHEDULE = ScheduleConfig(name="cosine", peak=0.02, warmup_steps=4, total_steps=STEPS, final_fraction=0.1)
TRAINING = TrainingConfig(optimizer=OPTIMIZER, schedule=SCHEDULE, accumulation=2)
SEED = 3


@functools.cache
def batches():
    """Two micro-batches a step, with unequal numbers of targets and some padding; -100 where there is no target."""
    rng = np.random.default_rng(5)
    found = []
    for _ in range(STEPS):
        pair = []
        for share in (0.9, 0.4):
            real = rng.random((B, T)) < share
            real[0, 0] = True
            targets = np.where(real, rng.integers(0, V, (B, T)), -100)
            inputs = {"tokens": rng.integers(0, V, (B, T)), "padding_mask": rng.random((B, T)) < 0.9}
            pair.append(Batch(inputs, targets, real))
        found.append(pair)
    return found


# ---- the two loops: loss, norm and count of every step, and the update of every weight


def plain_loop():
    graph, weights = nnx.split(LanguageModel(CONFIG, seed=SEED))
    rates = jnp.asarray([SCHEDULE.learning_rate(step) for step in range(STEPS)])
    chain = optax.chain(
        optax.clip_by_global_norm(OPTIMIZER.clip_norm),
        optax.adamw(
            lambda count: rates[count],
            b1=OPTIMIZER.beta1,
            b2=OPTIMIZER.beta2,
            eps=OPTIMIZER.eps,
            weight_decay=OPTIMIZER.weight_decay,
            mask=jax.tree.map(lambda leaf: leaf.ndim == 2, weights),
        ),
    )

    @jax.jit
    def step(weights, memory, inputs, targets, real):
        def loss(weights):
            logits = nnx.merge(graph, weights)(**inputs)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(real, targets, 0))
            return jnp.sum(losses * real) / jnp.sum(real)

        value, gradient = jax.value_and_grad(loss)(weights)
        change, memory = chain.update(gradient, memory, weights)
        return optax.apply_updates(weights, change), memory, value, optax.tree.norm(gradient)

    memory, seen = chain.init(weights), []
    for pair in batches():
        before = export_weights(nnx.merge(graph, weights))
        inputs = {name: np.concatenate([batch.inputs[name] for batch in pair]) for name in pair[0].inputs}
        targets, real = (np.concatenate([getattr(batch, name) for batch in pair]) for name in ("targets", "real"))
        weights, memory, loss, norm = step(weights, memory, inputs, targets, real)
        after = export_weights(nnx.merge(graph, weights))
        seen.append(as_seen(loss, norm, real.sum(), before, after))
    return seen


def our_loop(trainer):
    state, seen = trainer.init(export_weights(LanguageModel(CONFIG, seed=SEED))), []
    for pair in batches():
        before = trainer.weights(state)
        state, metrics = trainer.step(state, pair)
        seen.append(as_seen(metrics.loss, metrics.gradient_norm, metrics.count, before, trainer.weights(state)))
    return seen


def as_seen(loss, norm, count, before, after):
    updates = {path: after[path] - before[path] for path in before}
    return {"loss": np.asarray(loss), "norm": np.asarray(norm), "count": np.asarray(count), **updates}


def first_differences(ours, plain, rtol=1e-9):
    """What differs → the first step where it does; "update" stands for any weight's. Relative to the largest entry."""
    assert len(ours) == len(plain) == STEPS
    found = {}
    for step, (mine, theirs) in enumerate(zip(ours, plain, strict=True)):
        assert mine.keys() == theirs.keys()
        for name, expected in theirs.items():
            assert mine[name].shape == expected.shape
            size = np.abs(expected).max()
            assert size > 0, f"{name} of step {step}: nothing to compare"
            if not np.abs(mine[name] - expected).max() <= rtol * size:
                found.setdefault("update" if "." in name else name, step)
    return found


@pytest.fixture(scope="module")
def plain():
    return plain_loop()


@pytest.fixture
def trainer():
    return training.Trainer(CONFIG, TRAINING)


def test_losses_and_updates_are_those_of_plain_jax_and_optax(trainer, plain):
    norms = [float(step["norm"]) for step in plain]
    assert min(norms) < OPTIMIZER.clip_norm < max(norms)  # clipped in some steps, not in others
    assert first_differences(our_loop(trainer), plain) == {}


# ---- the test can fail: a fault in the Trainer, and what it shows first


def decay_of_all(trainer, monkeypatch):
    trainer._optimizer = optimizers.Optimizer(OptimizerConfig(**{**vars(OPTIMIZER), "decay": "all"}))


def bias_correction_in_float32(trainer, monkeypatch):
    monkeypatch.setattr(optimizers, "_one_minus_power", lambda beta, t: 1 - jnp.float32(beta) ** t.astype(jnp.float32))


def clip_adds_a_constant(trainer, monkeypatch):
    def clip(gradients, max_norm):
        norm = optimizers.global_norm(gradients)
        return {path: g * jnp.minimum(1, max_norm / (norm + 1e-6)) for path, g in gradients.items()}, norm

    monkeypatch.setattr(optimizers, "clip", clip)


def rate_of_the_next_step(trainer, monkeypatch):
    rate = ScheduleConfig.learning_rate
    monkeypatch.setattr(ScheduleConfig, "learning_rate", lambda self, step: rate(self, step + 1))


def norm_after_clipping(trainer, monkeypatch):
    norm = optimizers.global_norm
    monkeypatch.setattr(training, "global_norm", lambda gradients: jnp.minimum(norm(gradients), OPTIMIZER.clip_norm))


def means_of_micro_batches_added(trainer, monkeypatch):
    run = trainer._add

    def add(sums, *arguments):
        total, count, gradients = run(trainer._start(), *arguments)
        mean = (total / count, count / count, {path: g / count for path, g in gradients.items()})
        return jax.tree.map(lambda old, new: (old + new).astype(old.dtype), sums, mean)

    trainer._add = add


def target_left_out(trainer, monkeypatch):
    arrays = training._arrays

    def fewer(batch):
        inputs, targets, real, allowed = arrays(batch)
        real[0, 0] = False
        return inputs, targets, real, allowed

    monkeypatch.setattr(training, "_arrays", fewer)


@pytest.mark.parametrize(
    ("fault", "first"),
    [
        (decay_of_all, {"update": 0}),
        (bias_correction_in_float32, {"update": 0}),
        (clip_adds_a_constant, {"update": 0}),
        (rate_of_the_next_step, {"update": 0}),
        (norm_after_clipping, {"norm": 0}),
        (means_of_micro_batches_added, {"loss": 0, "norm": 0, "count": 0, "update": 0}),
        (target_left_out, {"loss": 0, "norm": 0, "count": 0, "update": 0}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_witness_can_fail(fault, first, trainer, plain, monkeypatch):
    fault(trainer, monkeypatch)
    trainer._finish = jax.jit(trainer._run_finish, donate_argnums=0)
    found = first_differences(our_loop(trainer), plain)
    assert {name: step for name, step in found.items() if step == min(found.values())} == first
