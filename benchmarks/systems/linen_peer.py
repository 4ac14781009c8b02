"""Flax Linen as its guides write it: ``nn.MultiHeadDotProductAttention``, ``TrainState``, ``jax.jit`` with donation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen
from flax.training.train_state import TrainState

from benchmarks.cases import LEARNING_RATE, WEIGHT_DECAY, Arrays, Case
from twinformer.config import ModelConfig


class Layer(linen.Module):
    config: ModelConfig

    @linen.compact
    def __call__(self, x: Any, mask: Any) -> Any:
        config = self.config
        y = linen.LayerNorm(epsilon=config.norm_eps)(x)
        x = x + linen.MultiHeadDotProductAttention(num_heads=config.num_heads)(y, mask=mask)
        y = linen.Dense(config.hidden_dim)(linen.LayerNorm(epsilon=config.norm_eps)(x))
        return x + linen.Dense(config.model_dim)(linen.gelu(y, approximate=False))


class Model(linen.Module):
    config: ModelConfig

    @linen.compact
    def __call__(self, tokens: Any) -> Any:
        config = self.config
        table = linen.Embed(config.vocab_size, config.model_dim)
        x = table(tokens) + linen.Embed(config.context_length, config.model_dim)(jnp.arange(tokens.shape[1]))
        mask = linen.make_causal_mask(tokens)
        for _ in range(config.num_layers):
            x = Layer(config)(x, mask)
        return table.attend(linen.LayerNorm(epsilon=config.norm_eps)(x))


def make(case: Case, weights: Arrays, variant: str) -> Any:
    return Training(case, weights)


class Training:
    def __init__(self, case: Case, weights: Arrays) -> None:
        model = Model(case.config)
        self._tokens, self._targets = jnp.asarray(case.inputs()["tokens"]), jnp.asarray(case.targets())
        self._state = TrainState.create(
            apply_fn=model.apply,
            params=_filled(case.config, weights),
            tx=optax.adamw(LEARNING_RATE, b1=0.9, b2=0.999, eps=1e-8, weight_decay=WEIGHT_DECAY),
        )

        def loss_of(params: Any, tokens: Any, targets: Any) -> Any:
            logits = model.apply({"params": params}, tokens)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        def step(state: TrainState, tokens: Any, targets: Any) -> Any:
            loss, gradients = jax.value_and_grad(loss_of)(state.params, tokens, targets)
            return state.apply_gradients(grads=gradients), loss, optax.global_norm(gradients)

        self._model, self._loss_of, self._step = model, loss_of, jax.jit(step, donate_argnums=0)

    def outputs(self) -> Arrays:
        logits = jax.jit(self._model.apply)({"params": self._state.params}, self._tokens)
        self._state, before, norm = self._step(self._state, self._tokens, self._targets)
        after = jax.jit(self._loss_of)(self._state.params, self._tokens, self._targets)
        return {
            "logits": np.asarray(logits, np.float64),
            "loss": np.array(float(before)),
            "gradient norm": np.array(float(norm)),
            "loss after a step": np.array(float(after)),
        }

    def run(self) -> None:
        self._state, loss, _ = self._step(self._state, self._tokens, self._targets)
        float(loss)


def _filled(config: ModelConfig, weights: Arrays) -> Any:
    A, K, D = config.num_heads, config.key_dim, config.model_dim

    def norm(path: str) -> Any:
        return {"scale": jnp.asarray(weights[f"{path}.weight"]), "bias": jnp.asarray(weights[f"{path}.bias"])}

    def dense(path: str) -> Any:
        return {"kernel": jnp.asarray(weights[f"{path}.weight"].T), "bias": jnp.asarray(weights[f"{path}.bias"])}

    params: dict[str, Any] = {
        "Embed_0": {"embedding": jnp.asarray(weights["embedding.tokens.weight"])},
        "Embed_1": {"embedding": jnp.asarray(weights["embedding.positions.weight"])},
        "LayerNorm_0": norm("stack.final_norm"),
    }
    for i in range(config.num_layers):
        ours = f"stack.blocks.{i}."
        heads = {
            name: {
                "kernel": jnp.asarray(weights[f"{ours}attention.{name}.weight"].T.reshape(D, A, K)),
                "bias": jnp.asarray(weights[f"{ours}attention.{name}.bias"].reshape(A, K)),
            }
            for name in ("query", "key", "value")
        }
        out = {
            "kernel": jnp.asarray(weights[f"{ours}attention.output.weight"].T.reshape(A, K, D)),
            "bias": jnp.asarray(weights[f"{ours}attention.output.bias"]),
        }
        params[f"Layer_{i}"] = {
            "LayerNorm_0": norm(f"{ours}attention_norm"),
            "MultiHeadDotProductAttention_0": {**heads, "out": out},
            "LayerNorm_1": norm(f"{ours}feedforward_norm"),
            "Dense_0": dense(f"{ours}feedforward.up"),
            "Dense_1": dense(f"{ours}feedforward.down"),
        }
    return params
