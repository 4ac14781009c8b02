"""Tiny encoder-decoders of the published families: both twins against ``transformers`` in float64.

Padding stands on the right, on the left and within, of the source and of the target. Most of these models count
positions over all places, M2M-100 over real tokens, by the id of padding: none is told any.
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
from parity_tests.published_witness import Arrays, errors, in_our_terms, positions_of, scattered, wide
from parity_tests.readers import build
from twinformer import pretrained
from twinformer.config import ModelConfig

Settings = dict[str, Any]
B, S, T = 4, 9, 7
SIDES = (("encoder", "source"), ("decoder", "target"))


@dataclass(frozen=True)
class Kind:
    """A family: its classes in ``transformers``, and settings by case."""

    config: str
    model: str
    cases: dict[str, Settings]

    def make(self, case: str | Settings, seed: int = 0) -> Any:
        """A random model; what is a buffer and plays the part of a weight is random too."""
        settings = self.cases[case] if isinstance(case, str) else case
        model = scattered(getattr(transformers, self.model), getattr(transformers, self.config)(**settings), seed)
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
_MORE_DECODER = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 9, "decoder_ffn_dim": 9}
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
    "mt5": Kind(
        "MT5Config",
        "MT5ForConditionalGeneration",
        {
            "plain": _T5,
            "relu": _T5 | {"feed_forward_proj": "relu", "num_layers": 3, "num_decoder_layers": 1, "d_kv": 7},
        },
    ),
    "bart": Kind(
        "BartConfig",
        "BartForConditionalGeneration",
        {
            "plain": _BART,
            "scaled": _BART | {"scale_embedding": True, "activation_function": "relu"},
            "more blocks in the decoder": _BART | _MORE_DECODER | {"activation_function": "gelu_new"},
        },
    ),
    "mbart": Kind(
        "MBartConfig",
        "MBartForConditionalGeneration",
        {
            "plain": _BART,
            "scaled": _BART | _MORE_DECODER | {"scale_embedding": True, "activation_function": "relu"},
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
    "m2m_100": Kind(
        "M2M100Config",
        "M2M100ForConditionalGeneration",
        {
            "plain": _BART,
            "unscaled": _BART | _MORE_DECODER | {"scale_embedding": False, "activation_function": "gelu"},
            "counted from 0": _BART
            | {"pad_token_id": 0, "d_model": 4, "encoder_attention_heads": 1}
            | {"decoder_attention_heads": 1},
        },
    ),
}


def drawn(family: str, seed: int) -> Settings:
    """Random settings, as far as the published class has them."""
    rng = np.random.default_rng(seed)

    def flip() -> bool:
        return bool(rng.integers(2))

    def layers() -> int:
        return int(rng.integers(1, 4))

    A, F, V = int(rng.integers(1, 5)), int(rng.integers(2, 30)), int(rng.integers(20, 60))
    # a norm of fewer than 4 numbers leaves little but their signs, and rounding for a gradient
    D = A * 2 * int(rng.integers(2, 6))
    if "t5" in family:
        act = str(rng.choice(["relu", "gated-gelu", "gelu_new", "gelu", "gated-relu", "silu", "gated-silu"]))
        own = {"tie_word_embeddings": flip()} if family == "t5" else {}
        buckets = {"relative_attention_num_buckets": 4 * int(rng.integers(1, 9))}
        return (
            own
            | buckets
            | {
                "vocab_size": V,
                "d_model": D + int(rng.integers(2)),
                "d_kv": int(rng.integers(1, 9)),
                "d_ff": F,
                "num_layers": layers(),
                "num_decoder_layers": layers(),
                "num_heads": A,
                "relative_attention_max_distance": int(rng.integers(20, 60)),
                "layer_norm_epsilon": float(rng.choice([1e-6, 1e-3])),
                "feed_forward_proj": act,
            }
        )
    found = {
        "vocab_size": V,
        "max_position_embeddings": int(rng.integers(S, 3 * S)),
        "d_model": D,
        "encoder_layers": layers(),
        "decoder_layers": layers(),
        "scale_embedding": flip(),
        "activation_function": str(rng.choice(["gelu", "gelu_new", "relu", "silu"])),
        "pad_token_id": V - 1 if family == "marian" else int(rng.integers(0, 3)),
    }
    for side, _ in SIDES:
        found |= {f"{side}_attention_heads": A, f"{side}_ffn_dim": F}
    if family == "marian":
        found |= {"decoder_start_token_id": V - 1, "eos_token_id": 0}
        if flip():
            found |= {"decoder_vocab_size": V + int(rng.integers(9)), "share_encoder_decoder_embeddings": False}
    return found


def inputs_of(model: Any, seed: int = 3) -> Arrays:
    """Source and target: a full row, padding on the right, on the left, and a hole with padding on both sides.

    The id of padding stands at padding, and only there: M2M-100 finds it so. The labels are the target, one further on.
    """
    rng = np.random.default_rng(seed)
    target_size = getattr(model.config, "decoder_vocab_size", None) or model.config.vocab_size
    pad = model.config.pad_token_id
    found = {}
    for side, size, length in (("source", model.config.vocab_size, S), ("target", target_size, T + 1)):
        tokens = rng.integers(3, size - 1, (B, length))
        tokens[tokens == pad] = 3 if pad != 3 else 4
        real = np.ones((B, length), bool)
        real[1, length // 2 :] = False
        real[2, : length // 3 + 1] = False
        real[3, [0, 3, length - 1]] = False
        tokens[~real] = pad
        found |= {side: tokens, f"{side}_padding_mask": real}
    return found


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

        def keep_input(_: Any, given: Any, options: Any, name: str = f"{side} embeddings") -> None:
            states[name] = given[0] if given else options["hidden_states"]

        hooks.append(blocks[0].register_forward_pre_hook(keep_input, with_kwargs=True))
    # a buffer in theirs, a weight in ours
    bias = {"final_logits_bias": model.final_logits_bias} if hasattr(model, "final_logits_bias") else {}
    for buffer in bias.values():
        buffer.requires_grad_(True)
    with wide():
        found = model(
            input_ids=torch.from_numpy(given["source"]),
            attention_mask=torch.from_numpy(given["source_padding_mask"].astype(np.int64)),
            decoder_input_ids=torch.from_numpy(given["target"][:, :-1].copy()),
            decoder_attention_mask=torch.from_numpy(given["target_padding_mask"][:, :-1].astype(np.int64)),
            labels=torch.from_numpy(np.where(_wanted(given), given["target"][:, 1:], -100)),
            use_cache=False,
        )
        named = {name: leaf for name, leaf in model.named_parameters() if leaf.requires_grad} | bias
        grads = torch.autograd.grad(found.loss, list(named.values()), allow_unused=True, materialize_grads=True)
    for hook in hooks:
        hook.remove()
    for buffer in bias.values():
        buffer.requires_grad_(False)
    result = {name: to_numpy(state) for name, state in states.items()}
    result |= {"encoder output": to_numpy(found.encoder_last_hidden_state)}
    result |= {"output": to_numpy(found.logits), "loss": to_numpy(found.loss)}
    return result | {f"gradient {name}": to_numpy(grad) for name, grad in zip(named, grads, strict=True)}


def _wanted(given: Arrays) -> Any:
    """Which labels count: real ones, of real places."""
    real = given["target_padding_mask"]
    return real[:, 1:] & real[:, :-1]


def ours(twin: Twin, config: ModelConfig, tensors: Mapping[str, np.ndarray], given: Arrays) -> Arrays:
    """The same by our names; gradients by path."""
    model = build(twin, config, tensors)
    native = {name: twin.array(array) for name, array in given.items()}
    masks, losses = twin.file("masks"), twin.file("losses")

    def _places(real: Any) -> Any:
        everywhere = np.ones_like(real) if config.position_counting == "places" else real
        return twin.array(positions_of(everywhere))

    def measured(model: Any) -> tuple[Any, dict[str, Any]]:
        source, real = native["source"], native["source_padding_mask"]
        target, wanted = native["target"][:, :-1], native["target"][:, 1:]
        target_real = native["target_padding_mask"][:, :-1]
        told: dict[str, Any] = {}
        places = _places(given["source_padding_mask"])
        X = told["encoder embeddings"] = model.source_embedding(source, places)
        bias = _bias(model.encoder, places)
        for i, block in enumerate(model.encoder.blocks):
            X = told[f"encoder {i}"] = block(X, mask=masks.padding_mask(real), positions=places, bias=bias)
        H_enc = told["encoder output"] = model.encode(source, source_padding_mask=real)
        places = _places(given["target_padding_mask"][:, :-1])
        table = model.source_embedding.tokens if config.share_embeddings else model.target_embedding.tokens
        table = table.weight if twin.name == "torch" else table.embedding[...]
        X = told["decoder embeddings"] = model.target_embedding(target, places, table=table)
        bias = _bias(model.decoder, places)
        for i, block in enumerate(model.decoder.blocks):
            X = told[f"decoder {i}"] = block(
                X,
                H_enc,
                mask=masks.padding_mask(target_real),
                memory_mask=masks.padding_mask(real),
                positions=places,
                bias=bias,
            )
        output = told["output"] = model(source, target, source_padding_mask=real, target_padding_mask=target_real)
        total, count = losses.cross_entropy(output, wanted, real=twin.array(_wanted(given)))
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
    for found in (got, expected):  # at padding theirs has values of its own, which nothing reads
        for name in found:
            if name.startswith(("encoder ", "decoder ", "output")):
                side = "source" if name.startswith("encoder ") else "target"
                real = given[f"{side}_padding_mask"]
                found[name] = found[name] * (real if side == "source" else real[:, :-1])[..., None]
    return errors(got, expected, slice(None))
