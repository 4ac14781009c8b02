"""Tiny random models of `transformers`, and the same weights under our names: outside witnesses for decoding.

Each function gives ``(model, config, tensors)``: a model in float64 and evaluation mode, our configuration for the same
function, and its weights by our paths.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers

from twinformer.config import ModelConfig
from twinformer.parameters import model_parameters

Tensors = dict[str, np.ndarray]


def gpt2(seed: int = 0, vocab_size: int = 29) -> tuple[Any, ModelConfig, Tensors]:
    """GPT-2: 2 layers, D 24, 3 heads, learned positions, tied head."""
    theirs = transformers.GPT2Config(
        vocab_size=vocab_size,
        n_positions=48,
        n_embd=24,
        n_layer=2,
        n_head=3,
        n_inner=40,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = _random(transformers.GPT2LMHeadModel(theirs), seed)
    config = ModelConfig(
        architecture="decoder",
        vocab_size=vocab_size,
        context_length=48,
        model_dim=24,
        key_dim=8,
        hidden_dim=40,
        num_heads=3,
        num_layers=2,
        activation="gelu_tanh",
        qkv_bias=True,
        output_bias=True,
        positions="learned",
        param_dtype="float64",
        compute_dtype="float64",
    )
    state = _numpy(model)
    found = {
        "embedding.tokens.weight": state["transformer.wte.weight"],
        "embedding.positions.weight": state["transformer.wpe.weight"],
    }
    for i in range(2):
        old, new = f"transformer.h.{i}.", f"stack.blocks.{i}."
        for leaf in ("weight", "bias"):
            found[f"{new}attention_norm.{leaf}"] = state[f"{old}ln_1.{leaf}"]
            found[f"{new}feedforward_norm.{leaf}"] = state[f"{old}ln_2.{leaf}"]
            for name, part in zip(
                ("query", "key", "value"), np.split(state[f"{old}attn.c_attn.{leaf}"], 3, -1), strict=True
            ):
                found[f"{new}attention.{name}.{leaf}"] = part.T
            found[f"{new}attention.output.{leaf}"] = state[f"{old}attn.c_proj.{leaf}"].T
            found[f"{new}feedforward.up.{leaf}"] = state[f"{old}mlp.c_fc.{leaf}"].T
            found[f"{new}feedforward.down.{leaf}"] = state[f"{old}mlp.c_proj.{leaf}"].T
    for leaf in ("weight", "bias"):
        found[f"stack.final_norm.{leaf}"] = state[f"transformer.ln_f.{leaf}"]
    return model, config, _whole(config, found)


def llama(seed: int = 0, vocab_size: int = 31) -> tuple[Any, ModelConfig, Tensors]:
    """Llama: 2 layers, D 24, 4 query heads on 2 key/value heads, rotary, untied head."""
    theirs = transformers.LlamaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=48,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = _random(transformers.LlamaForCausalLM(theirs), seed)
    config = ModelConfig(
        architecture="decoder",
        vocab_size=vocab_size,
        context_length=48,
        model_dim=24,
        key_dim=6,
        hidden_dim=36,
        num_heads=4,
        num_kv_heads=2,
        num_layers=2,
        norm="rmsnorm",
        norm_bias=False,
        norm_cast="before_weight",
        activation="silu",
        gated=True,
        feedforward_bias=False,
        positions="rotary",
        head="untied",
        param_dtype="float64",
        compute_dtype="float64",
    )
    state = _numpy(model)
    found = {
        "embedding.tokens.weight": state["model.embed_tokens.weight"],
        "stack.final_norm.weight": state["model.norm.weight"],
        "head.weight": state["lm_head.weight"],
    }
    names = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "feedforward_norm",
        "self_attn.q_proj": "attention.query",
        "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value",
        "self_attn.o_proj": "attention.output",
        "mlp.up_proj": "feedforward.up",
        "mlp.gate_proj": "feedforward.gate",
        "mlp.down_proj": "feedforward.down",
    }
    for i in range(2):
        for old, new in names.items():
            found[f"stack.blocks.{i}.{new}.weight"] = state[f"model.layers.{i}.{old}.weight"]
    return model, config, _whole(config, found)


def t5(seed: int = 0, vocab_size: int = 27) -> tuple[Any, ModelConfig, Tensors]:
    """T5: 2 + 2 layers, D 20, 3 heads of 6, relative positions, shared and tied embeddings."""
    theirs = transformers.T5Config(
        vocab_size=vocab_size,
        d_model=20,
        d_kv=6,
        d_ff=32,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        feed_forward_proj="relu",
        tie_word_embeddings=True,
        decoder_start_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = _random(transformers.T5ForConditionalGeneration(theirs), seed, spread=0.9)
    config = ModelConfig(
        architecture="encoder-decoder",
        vocab_size=vocab_size,
        context_length=48,
        model_dim=20,
        key_dim=6,
        hidden_dim=32,
        num_heads=3,
        num_layers=2,
        num_encoder_layers=2,
        norm="rmsnorm",
        norm_eps=1e-6,
        norm_bias=False,
        norm_cast="before_weight",
        activation="relu",
        feedforward_bias=False,
        attention_scale=1.0,
        positions="relative",
        relative_buckets=8,
        relative_max_distance=20,
        share_embeddings=True,
        head="tied",
        head_scale=20**-0.5,
        param_dtype="float64",
        compute_dtype="float64",
    )
    state = _numpy(model)
    found = {"source_embedding.tokens.weight": state["shared.weight"]}
    for side in ("encoder", "decoder"):
        found[f"{side}.relative_bias.weight"] = state[
            f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        ]
        found[f"{side}.final_norm.weight"] = state[f"{side}.final_layer_norm.weight"]
        parts = [("0", "SelfAttention", "attention")]
        if side == "decoder":
            parts.append(("1", "EncDecAttention", "cross_attention"))
        for i in range(2):
            old, new = f"{side}.block.{i}.layer.", f"{side}.blocks.{i}."
            for place, theirs_name, ours in parts:
                found[f"{new}{ours}_norm.weight"] = state[f"{old}{place}.layer_norm.weight"]
                for short, long in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
                    found[f"{new}{ours}.{long}.weight"] = state[f"{old}{place}.{theirs_name}.{short}.weight"]
            last = f"{old}{len(parts)}."
            found[f"{new}feedforward_norm.weight"] = state[f"{last}layer_norm.weight"]
            found[f"{new}feedforward.up.weight"] = state[f"{last}DenseReluDense.wi.weight"]
            found[f"{new}feedforward.down.weight"] = state[f"{last}DenseReluDense.wo.weight"]
    return model, config, _whole(config, found)


WITNESSES: dict[str, Callable[..., tuple[Any, ModelConfig, Tensors]]] = {"gpt2": gpt2, "llama": llama, "t5": t5}


def _random(model: Any, seed: int, spread: float = 0.3) -> Any:
    """Weights under which choices are neither all alike nor certain: N(0, spread²), norms about 1; float64."""
    model = model.to(torch.float64).eval()
    _widen(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if is_norm else spread * noise)
    return model


def _widen(model: Any) -> None:
    """Let the parts that compute in float32 whatever they are given (norms, rotary angles) compute in float64."""

    def norm(module: Any, eps: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda h: module.weight * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps))

    def rotary(dim: int, base: float) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        def angles(x: torch.Tensor, position_ids: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
            frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            angle = position_ids[..., None].to(torch.float64) * frequencies
            angle = torch.cat((angle, angle), -1)
            return angle.cos().to(x.dtype), angle.sin().to(x.dtype)

        return angles

    for module in model.modules():
        match type(module).__name__:
            case "LlamaRMSNorm" | "T5LayerNorm":
                module.forward = norm(module, module.variance_epsilon)
            case "LlamaRotaryEmbedding":
                module.forward = rotary(6, 10000.0)


def _numpy(model: Any) -> Tensors:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def _whole(config: ModelConfig, found: Mapping[str, np.ndarray]) -> Tensors:
    """``found`` in the contract's order; that it is whole is asserted here, not at its first use."""
    wanted = model_parameters(config)
    assert set(found) == set(wanted), sorted(set(found) ^ set(wanted))
    return {path: np.ascontiguousarray(found[path]) for path in wanted}
