"""Twenty training steps of ``transformers``' GPT-2 under torch.optim.AdamW, and the same by ``Trainer``, in float64.

The witness has its own schedule, clipping, accumulation, averaging (``torch.optim.swa_utils``) and adapters (a
parametrization of the fused matrix). Each of its faults below is one that real training loops had, and must be seen.
"""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from parity_tests import witness_models
from torch_impl.dropout import fold, random_key
from torch_impl.models import build
from torch_impl.training import Trainer
from torch_impl.weights import load_weights
from twinformer.data.batch import Batch
from twinformer.learning import LoraConfig, OptimizerConfig, ScheduleConfig, TrainingConfig

STEPS, WARMUP, PEAK = 20, 4, 3e-3
BETAS, EPS, DECAY, EMA = (0.85, 0.97), 1e-7, 0.1, 0.8
MAX_NORM = {False: 1.5, True: 0.7}  # with adapters: gradients are smaller
BOUND = 1e-11  # relative, on each step's loss and gradient norm; they differ by 1e-15
LORA = LoraConfig(rank=3, alpha=5.0, targets=("query", "value"))


@functools.cache
def batches(step):
    """Two micro-batches of another shape and token count each, padded on the right."""
    rng = np.random.default_rng(step)
    found = []
    for B, T in ((3, 9), (2, 12)):
        tokens = rng.integers(2, 29, (B, T + 1))
        tokens[:, 1::2] = (tokens[:, 0::2][:, : (T + 1) // 2] * 7 + 3) % 29  # something to learn
        lengths = rng.integers(3, T + 2, B)
        found.append((tokens, np.arange(T + 1) < lengths[:, None]))
    return found


def ours(tokens, real):
    return Batch(
        inputs={"tokens": tokens[:, :-1], "padding_mask": real[:, :-1]},
        targets=tokens[:, 1:],
        real=real[:, :-1] & real[:, 1:],
    )


def training(lora=None):
    return TrainingConfig(
        optimizer=OptimizerConfig(
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=EPS,
            weight_decay=DECAY,
            clip_norm=MAX_NORM[lora is not None],
            ema_decay=EMA,
        ),
        schedule=ScheduleConfig(name="cosine", peak=PEAK, warmup_steps=WARMUP, total_steps=STEPS, final_fraction=0.1),
        accumulation=2,
        lora=lora,
    )


# ---- the witness


class Adapters(nn.Module):
    """``W + alpha / rank · (B A)ᵀ`` on the query's and the value's columns of the fused matrix ``[in, 3 out]``."""

    def __init__(self, adapters, prefix):
        super().__init__()
        names = [f"{part}.{leaf}" for part in ("query", "value") for leaf in ("lora_a", "lora_b")]
        self.parts = nn.ParameterList([nn.Parameter(torch.from_numpy(adapters[f"{prefix}.{n}"])) for n in names])

    def forward(self, W):
        query_a, query_b, value_a, value_b = self.parts
        query, value = (query_b @ query_a).T, (value_b @ value_a).T
        return W + LORA.alpha / LORA.rank * torch.cat((query, torch.zeros_like(query), value), 1)


def rate(step, fault=None):
    if step < WARMUP:
        return (step + (fault != "warm-up from 0")) / WARMUP
    return 0.1 + 0.9 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - 1 - WARMUP))) / 2


def loss_of(model, tokens, real, count):
    """The sum over the batch's targets, over ``count``. (``transformers``' own loss is in float32.)"""
    mask = torch.from_numpy(real.astype(np.int64))
    logits = model(input_ids=torch.from_numpy(tokens), attention_mask=mask).logits
    labels = torch.from_numpy(np.where(real, tokens, -100))
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / count


@functools.cache
def witness(with_adapters=False, fault=None):
    """Loss and gradient norm of every step, the loss of the averaged model on the first batch, its embedding."""
    model, _, _ = witness_models.gpt2(seed=3)
    if with_adapters:
        model.requires_grad_(False)
        adapters = first_adapters()
        for i, block in enumerate(model.transformer.h):
            parts = Adapters(adapters, f"stack.blocks.{i}.attention")
            nn.utils.parametrize.register_parametrization(block.attn.c_attn, "weight", parts)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for p in trained.values() if p.ndim == 2 and not with_adapters]
    others = [p for p in trained.values() if not any(p is m for m in matrices)]
    groups = [
        {"params": matrices, "weight_decay": DECAY},
        {"params": others, "weight_decay": DECAY if fault == "decay of all" else 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=PEAK, betas=BETAS, eps=EPS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(rate, fault=fault))
    averaging = torch.optim.swa_utils.get_ema_multi_avg_fn(EMA)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=averaging)
    averaged.n_averaged += fault != "average from the first step"  # it begins as the first weights
    max_norm = MAX_NORM[with_adapters]
    losses, norms = [], []
    for step in range(STEPS):
        counts = [ours(*batch).count for batch in batches(step)]
        optimizer.zero_grad()
        total = 0.0
        for (tokens, real), count in zip(batches(step), counts, strict=True):
            loss = loss_of(model, tokens, real, 2 * count if fault == "mean of means" else sum(counts))
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained.values()]).item()
        if fault == "clip + 1e-6":
            torch.nn.utils.clip_grad_norm_(trained.values(), max_norm)
        elif fault != "no clipping" and norm > max_norm:
            for p in trained.values():
                p.grad.mul_(max_norm / norm)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(model)
        losses.append(total)
        norms.append(norm)
    tokens, real = batches(0)[0]
    with torch.no_grad():
        final = loss_of(averaged.module, tokens, real, ours(tokens, real).count).item()
        fused = averaged.module.transformer.h[0].attn.c_attn.weight.numpy()
    return losses, norms, final, fused[:, :24].T


# ---- ours


@functools.cache
def first_adapters():
    state = start(LORA)[1]
    return {path: adapter.numpy().copy() for path, adapter in state["parameters"].items()}


def start(lora=None):
    _, config, tensors = witness_models.gpt2(seed=3)
    trainer = Trainer(config, training(lora))
    return trainer, trainer.init(tensors)


@functools.cache
def trained(with_adapters=False):
    trainer, state = start(LORA if with_adapters else None)
    losses, norms = [], []
    for step in range(STEPS):
        state, metrics = trainer.step(state, [ours(*batch) for batch in batches(step)])
        assert metrics.step == step
        losses.append(float(metrics.loss))
        norms.append(float(metrics.gradient_norm))
    final = trainer.evaluate(state, ours(*batches(0)[0])).loss
    return losses, norms, final, trainer.weights(state)["stack.blocks.0.attention.query.weight"]


def differences(found, expected):
    """The largest relative difference of: losses, gradient norms, the averaged model's loss and its weights."""
    return {
        name: np.max(np.abs(np.subtract(f, e))) / np.max(np.abs(e))
        for name, f, e in zip(("loss", "norm", "averaged loss", "weights"), found, expected, strict=True)
    }


@pytest.mark.parametrize("with_adapters", [False, True], ids=["all weights", "adapters"])
def test_twenty_steps_are_those_of_the_witness(with_adapters):
    losses, norms, *_ = expected = witness(with_adapters)
    assert np.ptp(losses) > 0.2 * losses[0]  # it learns
    assert min(norms) < MAX_NORM[with_adapters] < max(norms)  # clipping acts, and not always
    found = trained(with_adapters)
    for step in range(STEPS):
        assert found[0][step] == pytest.approx(losses[step], rel=BOUND, abs=0), step
        assert found[1][step] == pytest.approx(norms[step], rel=BOUND, abs=0), step
    assert max(differences(found, expected).values()) < BOUND, differences(found, expected)


#: what each fault must be seen by
FAULTS = {
    "warm-up from 0": {"loss", "norm", "averaged loss", "weights"},
    "mean of means": {"loss", "norm", "averaged loss", "weights"},
    "decay of all": {"loss", "norm", "averaged loss", "weights"},
    "no clipping": {"loss", "norm", "averaged loss", "weights"},
    "clip + 1e-6": {"loss", "norm", "averaged loss", "weights"},
    "average from the first step": {"averaged loss", "weights"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_witness_are_seen(fault):
    found = differences(trained(), witness(fault=fault))
    assert {name for name, difference in found.items() if difference > BOUND} == FAULTS[fault], found


# ---- dropout and impossible tokens, whose losses are computed here from the model's logits


def loss_by_hand(config, tensors, micro, step, *, seed=7, order=(0, 1)):
    model = build(config, seed=None)
    load_weights(model, tensors)
    total = 0.0
    for batch, m in zip(micro, order, strict=True):
        key = fold(fold(random_key(seed), step), m)
        with torch.no_grad():
            logits = model(**{name: torch.from_numpy(a) for name, a in batch.inputs.items()}, rng=key).numpy()
        logits, allowed, targets = (a[batch.real] for a in (logits, batch.allowed, batch.targets))
        lse = np.log(np.where(allowed, np.exp(logits), 0.0).sum(-1))
        total += (lse - np.take_along_axis(logits, targets[:, None], -1)[:, 0] + 1e-2 * lse**2).sum()
    return total / sum(batch.count for batch in micro)


@pytest.mark.parametrize(
    "rates",
    [{"dropout": 0.2, "attention_dropout": 0.1, "hidden_dropout": 0.1}, {"embedding_dropout": 0.2}],
    ids=["blocks", "embeddings alone"],
)
def test_dropout_keys_and_allowed_tokens(rates):
    _, config, tensors = witness_models.gpt2(seed=3)
    assert (config.dropout, config.attention_dropout, config.hidden_dropout) == (0, 0, 0)
    config = config.replace(**rates)
    trainer = Trainer(config, TrainingConfig(accumulation=2, seed=7, z_loss=1e-2))
    state = trainer.init(tensors)
    for step in range(2):
        micro = []
        for batch in (ours(*pair) for pair in batches(step)):
            allowed = np.random.default_rng(step).random((*batch.targets.shape, config.vocab_size)) < 0.5
            np.put_along_axis(allowed, batch.targets[..., None], batch.real[..., None], -1)
            allowed &= batch.real[..., None]  # where nothing is to be said, nothing is possible
            micro.append(dataclasses.replace(batch, allowed=allowed))
        before = trainer.weights(state)
        state, metrics = trainer.step(state, micro)
        assert float(metrics.loss) == pytest.approx(loss_by_hand(config, before, micro, step), rel=1e-13, abs=0)
        everything = [dataclasses.replace(batch, allowed=np.ones_like(batch.allowed)) for batch in micro]
        for wrong in (
            loss_by_hand(config, before, micro, step + 1),
            loss_by_hand(config, before, micro, step, seed=8),
            loss_by_hand(config, before, micro, step, order=(1, 0)),
            loss_by_hand(config, before, everything, step),
        ):
            assert float(metrics.loss) != pytest.approx(wrong, rel=1e-6, abs=0)
        assert np.isfinite(float(metrics.gradient_norm))


# ---- a run that stops and goes on


def run(states, first, last, lora):
    """The exported state after steps ``first … last - 1``, in float32 with dropout, by a trainer of its own."""
    _, config, tensors = witness_models.gpt2(seed=3)
    config = config.with_dtype("float32").replace(dropout=0.2, attention_dropout=0.1, hidden_dropout=0.1)
    trainer = Trainer(config, training(lora))
    state = trainer.init(tensors) if states is None else trainer.import_state(states)
    for step in range(first, last):
        state, _ = trainer.step(state, [ours(*batch) for batch in batches(step)])
    return trainer.export_state(state)


def differing(found, expected):
    assert found.keys() == expected.keys()
    assert {name: a.dtype for name, a in found.items()} == {name: a.dtype for name, a in expected.items()}
    return {name for name in found if found[name].tobytes() != expected[name].tobytes()}


@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "adapters"])
def test_a_stopped_run_goes_on_bit_for_bit(lora):
    whole, stopped = run(None, 0, 6, lora), run(None, 0, 3, lora)
    assert differing(stopped, whole)  # steps change something
    assert differing(run(stopped, 3, 6, lora), whole) == set()
    for group in {name.rpartition("/")[0] for name in stopped} - {"frozen", "optimizer"}:
        broken = {n: np.zeros_like(a) if n.rpartition("/")[0] == group else a for n, a in stopped.items()}
        assert differing(run(broken, 3, 6, lora), whole), group  # nothing that is kept is kept in vain
    late = stopped | {"optimizer/step": stopped["optimizer/step"] + 1}
    assert differing(run(late, 3, 6, lora), whole) > {"optimizer/step"}  # schedule, correction and dropout count steps
