"""Our Flax twin; ``scan``: its blocks as one loop; ``raw``: its compiled program alone, called on flat leaves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import flax_impl
from benchmarks.cases import LEARNING_RATE, Arrays, Case
from benchmarks.systems.shared import BEAM, batch_of, training_config
from flax_impl.attention import attend
from flax_impl.beam import beam_search
from flax_impl.feedforward import activate
from flax_impl.generation import Generator
from flax_impl.losses import cross_entropy
from flax_impl.masks import causal_mask
from flax_impl.norms import LayerNorm
from flax_impl.optimizers import Optimizer


def make(case: Case, weights: Arrays, variant: str) -> Any:
    if case.kind == "micro":
        return Micro(case)
    if variant == "scan":
        case = dataclasses.replace(case, config=case.config.replace(scan_layers=True))
    if case.kind == "train" or case.name == "dispatch-train":
        return RawTraining(case, weights) if variant == "raw" else Training(case, weights)
    model = flax_impl.build(case.config, seed=None)
    flax_impl.load_weights(model, weights)
    if case.kind in ("decode", "beam"):
        return Written(decoding(case, model))
    inputs = {name: jnp.asarray(array) for name, array in case.inputs().items()}
    if variant == "raw":
        graphdef, state = nnx.split(model)
        leaves, tree = jax.tree.flatten(state)
        program = jax.jit(lambda leaves, inputs: nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))(**inputs))
        return Call(lambda: program(leaves, inputs))
    call = flax_impl.compiled(model)
    return Call(lambda: call(**inputs))


def decoding(case: Case, model: Any) -> Callable[[], Any]:
    inputs = case.inputs()
    if case.kind == "beam":
        return lambda: beam_search(
            model, inputs["target"], source=inputs["source"], max_new_tokens=case.new, beam=BEAM
        ).tokens[:, 0]
    generator = Generator(model, slots=case.T + case.new, bucket=case.T)
    return lambda: generator(inputs["tokens"], max_new_tokens=case.new).tokens


class Call:
    """One compiled call, waited for."""

    def __init__(self, call: Callable[[], Any], name: str = "logits") -> None:
        self._call, self._name = call, name

    def outputs(self) -> Arrays:
        return {self._name: np.asarray(self._call(), np.float64)}

    def run(self) -> None:
        jax.block_until_ready(self._call())


class Written:
    """Tokens; they are on the host when the call returns."""

    def __init__(self, write: Callable[[], Any]) -> None:
        self._write = write

    def outputs(self) -> Arrays:
        return {"tokens": np.asarray(self._write())}

    def run(self) -> None:
        self._write()


class Training:
    """A whole step of ``Trainer``; its metrics are those that a user reads."""

    def __init__(self, case: Case, weights: Arrays) -> None:
        self._trainer = flax_impl.Trainer(case.config, training_config())
        self._case, self._batch = case, batch_of(case)
        self._state = self._trainer.init(weights)

    def outputs(self) -> Arrays:
        model = flax_impl.build(self._case.config, seed=None)
        flax_impl.load_weights(model, self._trainer.weights(self._state))
        inputs = {name: jnp.asarray(array) for name, array in self._case.inputs().items()}
        logits = np.asarray(flax_impl.compiled(model)(**inputs), np.float64)
        self._state, before = self._trainer.step(self._state, [self._batch])
        after = self._trainer.evaluate(self._state, self._batch)
        return {
            "logits": logits,
            "loss": np.array(float(before.loss)),
            "gradient norm": np.array(float(before.gradient_norm)),
            "loss after a step": np.array(after.loss),
        }

    def run(self) -> None:
        self._state, metrics = self._trainer.step(self._state, [self._batch])
        float(metrics.loss)


class RawTraining(Training):
    """The same program without the trainer: leaves in, leaves out."""

    def outputs(self) -> Arrays:
        found = super().outputs()
        trainer: Any = self._trainer
        self._leaves = trainer._changing(self._state)
        self._frozen = trainer._frozen(self._state)
        batch = self._batch
        inputs = {name: jnp.asarray(array) for name, array in batch.inputs.items()}
        self._arrays = (inputs, jnp.asarray(batch.targets), jnp.asarray(batch.real), None)
        self._number, self._rate = jnp.asarray(1, jnp.int32), jnp.asarray(LEARNING_RATE)
        return found

    def run(self) -> None:
        trainer: Any = self._trainer
        self._leaves, seen = trainer._one_step(self._leaves, self._frozen, self._number, self._rate, self._arrays)
        float(seen[0])


class Micro:
    """One operation at the reference case's shapes, compiled; gradients where the name says so."""

    def __init__(self, case: Case) -> None:
        config, N = case.config, case.B * case.T
        D, F, V, A, K = config.model_dim, config.hidden_dim, config.vocab_size, config.num_heads, config.key_dim
        rng = np.random.default_rng(13)

        def drawn(*shape: int) -> jax.Array:
            return jnp.asarray(rng.standard_normal(shape).astype(np.float32))

        # the twins hold a matrix the other way round
        x, w, dy = drawn(N, D), drawn(F, D).T.copy(), drawn(N, F)
        Q, K_, V_ = drawn(case.B, A, case.T, K), drawn(case.B, A, case.T, K), drawn(case.B, A, case.T, K)
        logits, table, one = drawn(1, N, V), drawn(V, D).T.copy(), drawn(1, D)
        targets = jnp.asarray(rng.integers(0, V, (1, N)))
        allowed = causal_mask(case.T, case.T)
        norm, scale = LayerNorm(D), 1 / math.sqrt(K)
        wide, gradient = drawn(F, D), drawn(F, D)
        optimizer = Optimizer(training_config().optimizer)
        held = {"w.weight": wide}
        state = optimizer.init(held)

        def attention(Q: jax.Array, K_: jax.Array, V_: jax.Array) -> jax.Array:
            return attend(Q, K_, V_, scale=scale, allowed=allowed)

        def attention_gradient(Q: jax.Array, K_: jax.Array, V_: jax.Array) -> Any:
            return jax.vjp(attention, Q, K_, V_)[1](Q)

        operations: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
            "matmul": (jnp.matmul, (x, w)),
            "matmul-dx": (lambda dy, w: dy @ w.T, (dy, w)),
            "matmul-dw": (lambda x, dy: x.T @ dy, (x, dy)),
            "matvec": (jnp.matmul, (one, table)),
            "attention": (attention, (Q, K_, V_)),
            "attention-grad": (attention_gradient, (Q, K_, V_)),
            "norm": (norm, (x,)),
            "gelu": (lambda dy: activate(dy, "gelu"), (dy,)),
            "loss": (jax.grad(lambda logits: cross_entropy(logits, targets)[0]), (logits,)),
            "adamw": (
                lambda held, state: optimizer.update(held, {"w.weight": gradient}, state, LEARNING_RATE)[0],
                (held, {**state, "step": jnp.asarray(1, jnp.int32)}),
            ),
        }
        self._op = case.op
        function, self._arguments = operations[case.op]
        self._function = jax.jit(function)

    def outputs(self) -> Arrays:
        found = self._function(*self._arguments)
        found = found[0] if self._op == "attention-grad" else found
        found = found["w.weight"] if self._op == "adamw" else found
        # as PyTorch has the gradient of a matrix
        found = found.T if self._op == "matmul-dw" else found
        return {"result": np.asarray(found, np.float64)}

    def run(self) -> None:
        jax.block_until_ready(self._function(*self._arguments))
