"""Flax NNX as its guides write it: ``nnx.MultiHeadAttention``, ``nnx.Optimizer``, ``nnx.jit`` around it all."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.cases import LEARNING_RATE, WEIGHT_DECAY, Arrays, Case
from benchmarks.systems.flax_twin import Call
from twinformer.config import ModelConfig


class Layer(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        D = config.model_dim
        self.norm1 = nnx.LayerNorm(D, epsilon=config.norm_eps, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=config.num_heads, in_features=D, qkv_features=D, decode=False, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(D, epsilon=config.norm_eps, rngs=rngs)
        self.up = nnx.Linear(D, config.hidden_dim, rngs=rngs)
        self.down = nnx.Linear(config.hidden_dim, D, rngs=rngs)

    def __call__(self, x: Any, mask: Any) -> Any:
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x)), approximate=False))


class Model(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.tokens = nnx.Embed(config.vocab_size, config.model_dim, rngs=rngs)
        self.positions = nnx.Embed(config.context_length, config.model_dim, rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.num_layers)])
        self.norm = nnx.LayerNorm(config.model_dim, epsilon=config.norm_eps, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        mask = nnx.make_causal_mask(tokens)
        for layer in self.layers:
            x = layer(x, mask)
        return self.tokens.attend(self.norm(x))


def make(case: Case, weights: Arrays, variant: str) -> Any:
    model = Model(case.config, nnx.Rngs(0))
    _fill(model, case.config, weights)
    if case.kind == "train" or case.name == "dispatch-train":
        return Training(case, model)
    tokens = jnp.asarray(case.inputs()["tokens"])
    call = nnx.jit(lambda model, tokens: model(tokens))
    return Call(lambda: call(model, tokens))


class Training:
    def __init__(self, case: Case, model: Model) -> None:
        self._model = model
        self._optimizer = nnx.Optimizer(
            model, optax.adamw(LEARNING_RATE, b1=0.9, b2=0.999, eps=1e-8, weight_decay=WEIGHT_DECAY), wrt=nnx.Param
        )
        self._tokens, self._targets = jnp.asarray(case.inputs()["tokens"]), jnp.asarray(case.targets())

        def loss_of(model: Model, tokens: Any, targets: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(model(tokens), targets).mean()

        @nnx.jit
        def step(model: Model, optimizer: Any, tokens: Any, targets: Any) -> Any:
            loss, gradients = nnx.value_and_grad(loss_of)(model, tokens, targets)
            optimizer.update(model, gradients)
            return loss

        self._loss_of, self._step = loss_of, step

    def outputs(self) -> Arrays:
        logits = nnx.jit(lambda model, tokens: model(tokens))(self._model, self._tokens)
        gradients = nnx.jit(nnx.grad(self._loss_of))(self._model, self._tokens, self._targets)
        before = self._step(self._model, self._optimizer, self._tokens, self._targets)
        after = nnx.jit(self._loss_of)(self._model, self._tokens, self._targets)
        return {
            "logits": np.asarray(logits, np.float64),
            "loss": np.array(float(before)),
            "gradient norm": np.array(float(optax.global_norm(gradients))),
            "loss after a step": np.array(float(after)),
        }

    def run(self) -> None:
        float(self._step(self._model, self._optimizer, self._tokens, self._targets))


def _fill(model: Model, config: ModelConfig, weights: Arrays) -> None:
    A, K, D = config.num_heads, config.key_dim, config.model_dim

    def put(parameter: Any, array: Any) -> None:
        value = jnp.asarray(np.array(array), jnp.float32)
        assert parameter[...].shape == value.shape, (parameter[...].shape, value.shape)
        parameter.set_value(value)

    put(model.tokens.embedding, weights["embedding.tokens.weight"])
    put(model.positions.embedding, weights["embedding.positions.weight"])
    put(model.norm.scale, weights["stack.final_norm.weight"])
    put(model.norm.bias, weights["stack.final_norm.bias"])
    for i, layer in enumerate(model.layers):
        ours = f"stack.blocks.{i}."
        for norm, name in ((layer.norm1, "attention_norm"), (layer.norm2, "feedforward_norm")):
            put(norm.scale, weights[f"{ours}{name}.weight"])
            put(norm.bias, weights[f"{ours}{name}.bias"])
        for name in ("query", "key", "value"):
            put(getattr(layer.attention, name).kernel, weights[f"{ours}attention.{name}.weight"].T.reshape(D, A, K))
            put(getattr(layer.attention, name).bias, weights[f"{ours}attention.{name}.bias"].reshape(A, K))
        put(layer.attention.out.kernel, weights[f"{ours}attention.output.weight"].T.reshape(A, K, D))
        put(layer.attention.out.bias, weights[f"{ours}attention.output.bias"])
        for linear, name in ((layer.up, "up"), (layer.down, "down")):
            put(linear.kernel, weights[f"{ours}feedforward.{name}.weight"].T)
            put(linear.bias, weights[f"{ours}feedforward.{name}.bias"])
