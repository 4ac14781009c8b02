"""Tiny encoder-decoders of the published families: both twins against ``transformers`` in float64.

Padding stands on the right: these models count positions over all places, and cannot be told others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from flax import nnx

from parity_tests.helpers import Twin, _flax_leaves, _turned, random_array, to_numpy
from parity_tests.published_witness import Arrays, errors, in_our_terms, scattered, wide
from parity_tests.readers import build
from twinformer import pretrained
from twinformer.config import ModelConfig

Settings = dict[str, Any]
B, S, T = 3, 9, 7
SIDES = (("encoder", "source"), ("decoder", "target"))


@dataclass(frozen=True)
class Kind:
    """A family: its classes in ``transformers``, and settings by case."""

    config: str
    model: str
    cases: dict[str, Settings]

    def make(self, case: str, seed: int = 0) -> Any:
        """A random model; what is a buffer and plays the part of a weight is random too."""
        model = scattered(
            getattr(transformers, self.model), getattr(transformers, self.config)(**self.cases[case]), seed
        )
        if hasattr(model, "final_logits_bias"):
            with torch.no_grad():
                model.final_logits_bias.copy_(torch.from_numpy(random_array(5, *model.final_logits_bias.shape)))
        if "Marian" in self.model:  # sinusoids are no weights; theirs are rounded to float32 when they are made
            for side, _ in SIDES:
                table = getattr(model.model, side).embed_positions.weight
                N, D = table.shape
                angles = np.arange(N)[:, None] / 10000.0 ** (2 * np.arange(D // 2) / D)
                with torch.no_grad():
                    table.copy_(torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], 1)))
        return model


_T5 = {"vocab_size": 37, "d_model": 12, "d_kv": 5, "d_ff": 20, "num_layers": 2, "num_heads": 3}
_T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 17}
_BART = {
    "vocab_size": 37,
    "max_position_embeddings": 16,
    "d_model": 12,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "pad_token_id": 1,
}
_MARIAN = _BART | {"pad_token_id": 36, "decoder_start_token_id": 36, "eos_token_id": 0}
KINDS = {
    "t5": Kind(
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "1.0": _T5,
            "more blocks in the decoder": _T5 | {"num_decoder_layers": 3, "num_layers": 1},
            "gated": _T5 | {"feed_forward_proj": "gated-gelu"},
            "gated, unscaled": _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
            "silu, wide heads": _T5 | {"feed_forward_proj": "gated-silu", "d_kv": 7, "layer_norm_epsilon": 1e-3},
        },
    ),
    "bart": Kind(
        "BartConfig",
        "BartForConditionalGeneration",
        {
            "plain": _BART,
            "scaled": _BART | {"scale_embedding": True, "activation_function": "relu"},
            "more blocks in the decoder": _BART
            | {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 9}
            | {"decoder_ffn_dim": 9, "activation_function": "gelu_new"},
        },
    ),
    "marian": Kind(
        "MarianConfig",
        "MarianMTModel",
        {
            "plain": _MARIAN,
            "scaled swish": _MARIAN | {"scale_embedding": True, "activation_function": "swish"},
            "two vocabularies": _MARIAN | {"decoder_vocab_size": 41, "share_encoder_decoder_embeddings": False},
        },
    ),
}


def inputs_of(model: Any, seed: int = 3) -> Arrays:
    """Source, target, and the padding of the source; the target has none."""
    rng = np.random.default_rng(seed)
    target_size = getattr(model.config, "decoder_vocab_size", None) or model.config.vocab_size
    real = np.ones((B, S), bool)
    real[1, 5:] = False
    real[2, 1:] = False
    pad = model.config.pad_token_id
    source = rng.integers(2, model.config.vocab_size - 1, (B, S))
    source[~real] = pad
    return {"source": source, "source_padding_mask": real, "target": rng.integers(2, target_size - 1, (B, T + 1))}


def theirs(model: Any, given: Arrays) -> Arrays:
    """Layers of both stacks, logits, loss, and its gradients by published name."""
    body = getattr(model, "model", model)
    states: dict[str, torch.Tensor] = {}
    hooks = []
    for side, _ in SIDES:
        stack = getattr(body, side)
        blocks = stack.block if hasattr(stack, "block") else stack.layers
        for i, block in enumerate(blocks):

            def keep(_: Any, __: Any, out: Any, name: str = f"{side} {i}") -> None:
                states[name] = out if isinstance(out, torch.Tensor) else out[0]

            hooks.append(block.register_forward_hook(keep))
    # a buffer in theirs, a weight in ours
    bias = {"final_logits_bias": model.final_logits_bias} if hasattr(model, "final_logits_bias") else {}
    for buffer in bias.values():
        buffer.requires_grad_(True)
    with wide():
        found = model(
            input_ids=torch.from_numpy(given["source"]),
            attention_mask=torch.from_numpy(given["source_padding_mask"].astype(np.int64)),
            decoder_input_ids=torch.from_numpy(given["target"][:, :-1].copy()),
            labels=torch.from_numpy(given["target"][:, 1:].copy()),
            use_cache=False,
        )
        named = {name: leaf for name, leaf in model.named_parameters() if leaf.requires_grad} | bias
        grads = torch.autograd.grad(found.loss, list(named.values()), allow_unused=True, materialize_grads=True)
    for hook in hooks:
        hook.remove()
    for buffer in bias.values():
        buffer.requires_grad_(False)
    result = {name: to_numpy(state) for name, state in states.items()}
    result |= {"output": to_numpy(found.logits), "loss": to_numpy(found.loss)}
    return result | {f"gradient {name}": to_numpy(grad) for name, grad in zip(named, grads, strict=True)}


def ours(twin: Twin, config: ModelConfig, tensors: Mapping[str, np.ndarray], given: Arrays) -> Arrays:
    """The same by our names; gradients by path."""
    model = build(twin, config, tensors)
    native = {name: twin.array(array) for name, array in given.items()}
    masks, losses = twin.file("masks"), twin.file("losses")

    def measured(model: Any) -> tuple[Any, dict[str, Any]]:
        source, real = native["source"], native["source_padding_mask"]
        target, wanted = native["target"][:, :-1], native["target"][:, 1:]
        told: dict[str, Any] = {}
        places = twin.array(np.arange(S)[None])
        X = model.source_embedding(source, places)
        bias = _bias(model.encoder, places)
        for i, block in enumerate(model.encoder.blocks):
            X = told[f"encoder {i}"] = block(X, mask=masks.padding_mask(real), positions=places, bias=bias)
        H_enc = model.encode(source, source_padding_mask=real)
        places = twin.array(np.arange(T)[None])
        table = model.source_embedding.tokens if config.share_embeddings else model.target_embedding.tokens
        table = table.weight if twin.name == "torch" else table.embedding[...]
        X = model.target_embedding(target, places, table=table)
        bias = _bias(model.decoder, places)
        for i, block in enumerate(model.decoder.blocks):
            X = told[f"decoder {i}"] = block(
                X, H_enc, memory_mask=masks.padding_mask(real), positions=places, bias=bias
            )
        output = told["output"] = model(source, target, source_padding_mask=real)
        total, count = losses.cross_entropy(output, wanted)
        told["loss"] = losses.mean_loss(total, count)
        return told["loss"], told

    if twin.name == "torch":
        loss, found = measured(model)
        leaves = dict(model.named_parameters())
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        gradients = {path: to_numpy(grad) for path, grad in zip(leaves, grads, strict=True)}
    else:
        graph, state = nnx.split(model)
        program = jax.jit(jax.value_and_grad(lambda state: measured(nnx.merge(graph, state)), has_aux=True))
        (_, found), turned = program(state)
        gradients = {path: _turned(parts, grad) for path, parts, grad in _flax_leaves(turned)}
    result = {name: to_numpy(value) for name, value in found.items()}
    return result | {f"gradient {path}": grad for path, grad in gradients.items()}


def _bias(stack: Any, places: Any) -> Any:
    return None if stack.relative_bias is None else stack.relative_bias(places, places)


def examine(twin: Twin, directory: Path, model: Any) -> dict[str, float]:
    """The largest error of each name, relative to the largest magnitude there."""
    read = pretrained.read(directory)
    given = inputs_of(model)
    expected = in_our_terms(read, theirs(model, given))
    got = ours(twin, read.config, read.tensors, given)
    real = given["source_padding_mask"]
    for found in (got, expected):  # at padding theirs has values of its own, which nothing reads
        for name in [name for name in found if name.startswith("encoder ")]:
            found[name] = found[name] * real[..., None]
    return errors(got, expected, np.ones((B, T), bool) if real.shape == (B, T) else slice(None))
