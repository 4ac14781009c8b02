"""KerasHub on PyTorch and on JAX: its layers, its Llama and its BART with our weights, trained as Keras trains.

One process holds one backend; ``KERAS_BACKEND`` chooses it before the import. GPT-2's and BERT's choices are put
together from ``TransformerDecoder`` and ``TransformerEncoder``: the library's own GPT-2 has another GELU, its own BERT
token types.

Keras adds AdamW's epsilon before the correction of the second moment, not after: for the same first step, which the
gate looks at, it is given ``epsilon * sqrt(1 - beta2)``. (Its 1e-8 would be 3e-7 in ours there; at the full sizes the
loss after a step is then off by up to 5e-4.)
"""

from __future__ import annotations

import math
from typing import Any

import keras
import keras_hub
import numpy as np

from benchmarks.cases import LEARNING_RATE, WEIGHT_DECAY, Arrays, Case
from twinformer.config import ModelConfig

BEAMS = 4


def make(case: Case, weights: Arrays, variant: str) -> Any:
    if keras.backend.backend() != variant:
        raise RuntimeError(f"KERAS_BACKEND: expected {variant}, got {keras.backend.backend()}")
    config = case.config
    build = _bart if config.architecture == "encoder-decoder" else _llama if config.norm == "rmsnorm" else _stack
    model = build(config, weights)
    if case.kind == "train":
        return Training(case, model)
    if case.kind in ("decode", "beam"):
        return Writing(case, model)
    return Forward(case, model)


def _given(case: Case, more: int = 0) -> Any:
    """The inputs under the library's names; ``more`` empty places after them, to be written."""
    arrays = case.inputs()
    if case.config.architecture == "encoder-decoder":
        return {
            "encoder_token_ids": arrays["source"].astype(np.int32),
            "encoder_padding_mask": np.ones(arrays["source"].shape, np.int32),
        } | _padded("decoder_", arrays["target"], more)
    if case.config.norm == "rmsnorm":
        return _padded("", arrays["tokens"], more)
    return arrays["tokens"].astype(np.int32)


def _padded(prefix: str, tokens: Any, more: int) -> Arrays:
    room = ((0, 0), (0, more))
    return {
        f"{prefix}token_ids": np.pad(tokens.astype(np.int32), room),
        f"{prefix}padding_mask": np.pad(np.ones(tokens.shape, np.int32), room),
    }


class Forward:
    def __init__(self, case: Case, model: Any) -> None:
        self._model, self._inputs = model, _given(case)

    def outputs(self) -> Arrays:
        return {"logits": np.asarray(self._model.predict_on_batch(self._inputs), np.float64)}

    def run(self) -> None:
        self._model.predict_on_batch(self._inputs)


class Writing:
    """``generate`` without an end token: greedily, or with the library's beam."""

    def __init__(self, case: Case, model: Any) -> None:
        sampler = keras_hub.samplers.BeamSampler(num_beams=BEAMS) if case.kind == "beam" else "greedy"
        model.compile(sampler=sampler)
        self._model, self._inputs, self._start = model, _given(case, case.new), case.T
        self._name = "decoder_token_ids" if case.kind == "beam" else "token_ids"

    def outputs(self) -> Arrays:
        return {"tokens": self._written()}

    def run(self) -> None:
        self._written()

    def _written(self) -> Any:
        return self._model.generate(self._inputs, stop_token_ids=None)[self._name][:, self._start :]


class Training:
    """``train_on_batch``; what it gives back, the loss, is on the host."""

    def __init__(self, case: Case, model: Any) -> None:
        self._model, self._inputs, self._targets = model, _given(case), case.targets()
        self._loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        epsilon = 1e-8 * math.sqrt(1 - 0.999)
        optimizer = keras.optimizers.AdamW(
            LEARNING_RATE, weight_decay=WEIGHT_DECAY, beta_1=0.9, beta_2=0.999, epsilon=epsilon
        )
        model.compile(optimizer=optimizer, loss=self._loss, weighted_metrics=[])

    def outputs(self) -> Arrays:
        logits = np.asarray(self._model.predict_on_batch(self._inputs), np.float64)
        before = self._tested()
        norm = self._gradient_norm()
        self._model.train_on_batch(self._inputs, self._targets)
        after = self._tested()
        return {
            "logits": logits,
            "loss": np.array(before),
            "gradient norm": np.array(norm),
            "loss after a step": np.array(after),
        }

    def run(self) -> None:
        self._model.train_on_batch(self._inputs, self._targets)

    def _tested(self) -> float:
        return float(self._model.test_on_batch(self._inputs, self._targets, return_dict=True)["loss"])

    def _gradient_norm(self) -> float:
        """Keras itself does not show gradients: its backend does."""
        model = self._model
        if keras.backend.backend() == "torch":
            self._loss(self._targets, model(self._inputs, training=True)).backward()
            gradients = [v.value.grad.detach().cpu().numpy() for v in model.trainable_variables]
            model.zero_grad()
        else:
            import jax

            def loss_of(trainable: Any, others: Any) -> Any:
                return self._loss(self._targets, model.stateless_call(trainable, others, self._inputs)[0])

            values = [[v.value for v in found] for found in (model.trainable_variables, model.non_trainable_variables)]
            gradients = jax.jit(jax.grad(loss_of))(*values)
        return math.sqrt(sum(float(np.square(np.asarray(g, np.float64)).sum()) for g in gradients))


# ---- models


def _stack(config: ModelConfig, weights: Arrays) -> Any:
    """An encoder or a decoder from the library's layers."""
    is_encoder = config.architecture == "encoder"
    embedding = keras_hub.layers.TokenAndPositionEmbedding(
        config.vocab_size, config.context_length, config.model_dim, name="embedding"
    )
    kind = keras_hub.layers.TransformerEncoder if is_encoder else keras_hub.layers.TransformerDecoder
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    h = embedding(tokens)
    if config.embedding_norm:
        h = keras.layers.LayerNormalization(epsilon=config.norm_eps, name="embedding_norm")(h)
    for i in range(config.num_layers):
        layer = kind(
            config.hidden_dim,
            config.num_heads,
            activation="gelu",
            layer_norm_epsilon=config.norm_eps,
            normalize_first=config.norm_placement == "pre",
            name=f"block_{i}",
        )
        h = layer(h)
    if config.final_norm:
        h = keras.layers.LayerNormalization(epsilon=config.norm_eps, name="final_norm")(h)
    model = keras.Model(tokens, embedding.token_embedding(h, reverse=True))
    names = {
        "embedding/token_embedding": "embedding.tokens",
        "embedding/position_embedding": "embedding.positions",
        "embedding_norm": "embedding.norm",
        "final_norm": "stack.final_norm",
    }
    for i in range(config.num_layers):
        names |= _block(f"block_{i}", f"stack.blocks.{i}", "self_attention_layer" if is_encoder else "self_attention")
    _fill(model, names, weights)
    return model


def _bart(config: ModelConfig, weights: Arrays) -> Any:
    # the library's BART has one number of layers for both sides, and this epsilon
    assert (config.num_encoder_layers, config.norm_eps) == (config.num_layers, 1e-5)
    backbone = keras_hub.models.BartBackbone(
        vocabulary_size=config.vocab_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        hidden_dim=config.model_dim,
        intermediate_dim=config.hidden_dim,
        dropout=0.0,
        max_sequence_length=config.context_length,
    )
    model = keras_hub.models.BartSeq2SeqLM(backbone=backbone)
    names = {"token_embedding": "source_embedding.tokens"}
    # the first rows of ours belong to no position: that is how BART's offset is stored
    weights = dict(weights)
    for theirs, ours in (("encoder", "source"), ("decoder", "target")):
        path = f"{ours}_embedding.positions.weight"
        weights[path] = weights[path][config.position_offset :]
        names[f"{theirs}_position_embedding"] = f"{ours}_embedding.positions"
        names[f"{theirs}_embeddings_layer_norm"] = f"{ours}_embedding.norm"
    for i in range(config.num_layers):
        names |= _block(f"transformer_encoder_layer_{i}", f"encoder.blocks.{i}", "self_attention_layer")
        names |= _block(f"transformer_decoder_layer_{i}", f"decoder.blocks.{i}", "self_attention", crossing=True)
    _fill(model, names, weights)
    return model


def _llama(config: ModelConfig, weights: Arrays) -> Any:
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=config.vocab_size,
        num_layers=config.num_layers,
        num_query_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        hidden_dim=config.model_dim,
        intermediate_dim=config.hidden_dim,
        layer_norm_epsilon=config.norm_eps,
    )
    model = keras_hub.models.LlamaCausalLM(backbone=backbone)
    names = {"token_embedding": "embedding.tokens", "sequence_output_layernorm": "stack.final_norm"}
    for i in range(config.num_layers):
        theirs, ours = f"transformer_layer_{i}", f"stack.blocks.{i}"
        names |= _attention(f"{theirs}/self_attention", f"{ours}.attention", "layernorm")
        names |= _feedforward(theirs, ours, "layernorm")
        names[f"{theirs}/feedforward_gate_dense"] = f"{ours}.feedforward.gate"
    _fill(model, names, weights)
    return model


# ---- weights


def _block(theirs: str, ours: str, attention: str, *, crossing: bool = False) -> dict[str, str]:
    names = _attention(f"{theirs}/{attention}", f"{ours}.attention", "layer_norm")
    if attention == "self_attention_layer":
        names[f"{theirs}/self_attention_layer_norm"] = names.pop(f"{theirs}/self_attention_layer_layer_norm")
    if crossing:
        names |= _attention(f"{theirs}/cross_attention", f"{ours}.cross_attention", "layer_norm")
    return names | _feedforward(theirs, ours, "layer_norm")


def _attention(theirs: str, ours: str, norm: str) -> dict[str, str]:
    names = {f"{theirs}/{name}": f"{ours}.{name}" for name in ("query", "key", "value")}
    return names | {f"{theirs}/attention_output": f"{ours}.output", f"{theirs}_{norm}": f"{ours}_norm"}


def _feedforward(theirs: str, ours: str, norm: str) -> dict[str, str]:
    return {
        f"{theirs}/feedforward_intermediate_dense": f"{ours}.feedforward.up",
        f"{theirs}/feedforward_output_dense": f"{ours}.feedforward.down",
        f"{theirs}/feedforward_{norm}": f"{ours}.feedforward_norm",
    }


def _fill(model: Any, names: dict[str, str], weights: Arrays) -> None:
    """Every variable of the model from ours by its path, and every weight of ours used once."""
    left = dict(weights)
    for variable in model.weights:
        layer, _, leaf = variable.path.rpartition("/")
        if leaf == "reverse_embeddings":
            array = left.pop("head.weight").T
        else:
            array = left.pop(f"{names[layer]}.{'bias' if leaf in ('bias', 'beta') else 'weight'}")
            # a kernel is [in, out], and the side of the heads is split; halves of a head are turned as ours are
            array = array.T if leaf == "kernel" else array
        assert array.size == math.prod(variable.shape), (variable.path, variable.shape, array.shape)
        variable.assign(np.ascontiguousarray(array).reshape(variable.shape))
    assert not left, f"expected every weight to be used, left: {sorted(left)}"
