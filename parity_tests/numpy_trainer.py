"""A trainer in NumPy, for tests of runs: the next token's logits are a row of a table, learnt by momentum.

It keeps the contract of ``twinformer.learning.Trainer`` in what a run can see: state in and out, accumulation, noise
that is a function of (seed, step, micro-batch).
"""

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from twinformer.config import ModelConfig
from twinformer.data.batch import Batch
from twinformer.learning import Evaluation, Metrics


@contextlib.contextmanager
def in_memory(otherwise: Path):
    """A directory in memory where the system has such a place: flushing to a disk is most of what a save takes."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else otherwise) as place:
        yield Path(place)


def tiny_config(vocabulary: int = 13, context_length: int = 6) -> ModelConfig:
    sizes = {"model_dim": 8, "key_dim": 4, "hidden_dim": 8, "num_heads": 2, "num_layers": 1}
    return ModelConfig(
        architecture="decoder", vocab_size=vocabulary, context_length=context_length, positions="sinusoidal", **sizes
    )


class Tokens:
    """A Dataset: walks around a ring of tokens with a few jumps; every batch a function of (seed, step)."""

    def __init__(
        self, vocabulary: int = 13, *, rows: int = 4, length: int = 6, seed: int = 0, steps_per_epoch: int = 5
    ):
        self.vocab_size, self.rows, self.length, self.seed = vocabulary, rows, length, seed
        self.steps_per_epoch = steps_per_epoch
        self.asked = []

    def batch(self, step: int) -> Batch:
        self.asked.append(step)
        rng = np.random.default_rng([self.seed, step])
        moves = np.where(rng.random((self.rows, self.length)) < 0.2, rng.integers(self.vocab_size), 1)
        walk = (rng.integers(self.vocab_size, size=(self.rows, 1)) + moves.cumsum(1)) % self.vocab_size
        real = np.ones((self.rows, self.length - 1), bool)
        return Batch({"tokens": walk[:, :-1]}, walk[:, 1:], real)


class NumpyTrainer:
    """``spoil``: {step: what}, with ``loss``, ``gradient_norm`` or ``weights`` (a NaN there)."""

    def __init__(self, config, training, *, spoil: Mapping[int, str] | None = None, noise: float = 0.1):
        self.config, self.training, self.spoil, self.noise = config, training, dict(spoil or {}), noise

    def init(self, tensors=None):
        V = self.config.vocab_size
        table = np.zeros((V, V)) if tensors is None else np.array(tensors["table.weight"])
        return {"table": table, "momentum": np.zeros_like(table), "step": 0}

    def step(self, state, batches):
        s = state["step"]
        total, count, gradient = 0.0, 0, np.zeros_like(state["table"])
        for number, batch in enumerate(batches):
            noise = np.random.default_rng([self.training.seed, s, number]).normal(size=gradient.shape)
            part = self._loss(state["table"] + self.noise * noise, batch)
            total, count, gradient = total + part[0], count + part[1], gradient + part[2]
        rate = self.training.schedule.learning_rate(s)
        momentum = 0.9 * state["momentum"] + gradient / count
        table = state["table"] - rate * momentum
        loss, norm = total / count, float(np.sqrt((gradient**2).sum()) / count)
        what = self.spoil.get(s)
        if what == "weights":
            table[0, 0] = np.nan
        loss, norm = (np.nan if what == "loss" else loss), (np.inf if what == "gradient_norm" else norm)
        return {"table": table, "momentum": momentum, "step": s + 1}, Metrics(s, loss, norm, count, rate)

    def _loss(self, table, batch):
        logits = table[batch.inputs["tokens"]]
        logits = logits - logits.max(-1, keepdims=True)
        p = np.exp(logits)
        p /= p.sum(-1, keepdims=True)
        one = np.eye(self.config.vocab_size)[batch.targets]
        gradient = np.zeros_like(table)
        np.add.at(gradient, batch.inputs["tokens"], p - one)
        return float(-np.log((p * one).sum(-1)).sum()), batch.count, gradient

    def evaluate(self, state, batch):
        total, count, _ = self._loss(state["table"], batch)
        correct = (state["table"][batch.inputs["tokens"]].argmax(-1) == batch.targets).sum()
        return Evaluation(total, count, int(correct))

    def export_state(self, state):
        return {
            "parameters/table.weight": state["table"].copy(),
            "optimizer/momentum/table.weight": state["momentum"].copy(),
            "optimizer/step": np.array(state["step"], np.int64),
        }

    def import_state(self, tensors):
        step = tensors["optimizer/step"]
        assert step.shape == (), step.shape
        table, momentum = tensors["parameters/table.weight"], tensors["optimizer/momentum/table.weight"]
        return {"table": np.array(table), "momentum": np.array(momentum), "step": int(step)}

    def weights(self, state):
        return {"table.weight": state["table"].copy()}
