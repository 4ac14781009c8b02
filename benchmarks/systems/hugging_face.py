"""The ``transformers`` library: GPT-2, BERT, Llama and BART with our weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from torch import Tensor

from benchmarks.cases import Arrays, Case
from benchmarks.systems.torch_work import Call, Step, Written, tensors
from twinformer.config import ModelConfig


def make(case: Case, weights: Arrays, variant: str) -> Any:
    attention = "eager" if variant == "eager" else "sdpa"
    config = case.config
    kind = {"encoder": _bert, "encoder-decoder": _bart}.get(
        config.architecture, _llama if config.norm == "rmsnorm" else _gpt2
    )
    model, logits = kind(config, weights, attention)
    inputs = tensors(case.inputs())
    if case.kind == "train":
        model.train()
        return Step(case, lambda: logits(inputs), model.parameters(), fused=variant == "tuned")
    model.eval()
    if case.kind in ("decode", "beam"):
        return Written(lambda: _generate(model, case, inputs, variant))
    return Call(lambda: logits(inputs))


def _generate(model: Any, case: Case, inputs: dict[str, Tensor], variant: str) -> Any:
    options: dict[str, Any] = {
        "max_new_tokens": case.new,
        "min_new_tokens": case.new,
        "do_sample": False,
        "use_cache": True,
        "pad_token_id": 0,
    }
    if variant == "tuned" and case.kind == "decode":
        options["cache_implementation"] = "static"
    if case.kind == "beam":
        options |= {"num_beams": 4, "length_penalty": 1.0, "early_stopping": False}
        # what does not begin with the start token gets one put before it
        options |= {"decoder_input_ids": inputs["target"], "decoder_start_token_id": inputs["target"][:, 0].tolist()}
    given = inputs["source"] if case.kind == "beam" else inputs["tokens"]
    with torch.inference_mode():
        written = model.generate(given, attention_mask=torch.ones_like(given), **options)
    return written[:, case.T :].numpy()


Made = tuple[Any, Callable[[dict[str, Tensor]], Tensor]]
_NO_ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def _fill(model: Any, names: dict[str, Any], also: dict[str, Any] | None = None) -> None:
    """Every tensor of the model from ours, and nothing left; ``also``: what ours does not have."""
    state = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in names.items()} | (also or {})
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"}
    assert not unexpected, unexpected
    assert set(missing) <= tied, missing


def _gpt2(config: ModelConfig, weights: Arrays, attention: str) -> Made:
    theirs = transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.context_length,
        n_embd=config.model_dim,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        activation_function="gelu",
        layer_norm_epsilon=config.norm_eps,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation=attention,
        **_NO_ENDS,
    )
    model = transformers.GPT2LMHeadModel(theirs)
    names = {
        "transformer.wte.weight": weights["embedding.tokens.weight"],
        "transformer.wpe.weight": weights["embedding.positions.weight"],
    }
    for leaf in ("weight", "bias"):
        names[f"transformer.ln_f.{leaf}"] = weights[f"stack.final_norm.{leaf}"]
        for i in range(config.num_layers):
            ours, to = f"stack.blocks.{i}.", f"transformer.h.{i}."
            names[f"{to}ln_1.{leaf}"] = weights[f"{ours}attention_norm.{leaf}"]
            names[f"{to}ln_2.{leaf}"] = weights[f"{ours}feedforward_norm.{leaf}"]
            fused = np.concatenate([weights[f"{ours}attention.{name}.{leaf}"] for name in ("query", "key", "value")])
            names[f"{to}attn.c_attn.{leaf}"] = fused.T  # [in, out]
            names[f"{to}attn.c_proj.{leaf}"] = weights[f"{ours}attention.output.{leaf}"].T
            names[f"{to}mlp.c_fc.{leaf}"] = weights[f"{ours}feedforward.up.{leaf}"].T
            names[f"{to}mlp.c_proj.{leaf}"] = weights[f"{ours}feedforward.down.{leaf}"].T
    _fill(model, names)
    return model, lambda inputs: model(inputs["tokens"], use_cache=False).logits


def _bert(config: ModelConfig, weights: Arrays, attention: str) -> Made:
    theirs = transformers.BertConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.context_length,
        hidden_size=config.model_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.hidden_dim,
        hidden_act="gelu",
        layer_norm_eps=config.norm_eps,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation=attention,
    )
    model = transformers.BertModel(theirs, add_pooling_layer=False)
    parts = {
        "attention.query": "attention.self.query",
        "attention.key": "attention.self.key",
        "attention.value": "attention.self.value",
        "attention.output": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "feedforward.up": "intermediate.dense",
        "feedforward.down": "output.dense",
        "feedforward_norm": "output.LayerNorm",
    }
    names = {
        "embeddings.word_embeddings.weight": weights["embedding.tokens.weight"],
        "embeddings.position_embeddings.weight": weights["embedding.positions.weight"],
    }
    for leaf in ("weight", "bias"):
        names[f"embeddings.LayerNorm.{leaf}"] = weights[f"embedding.norm.{leaf}"]
        for i in range(config.num_layers):
            for ours, to in parts.items():
                names[f"encoder.layer.{i}.{to}.{leaf}"] = weights[f"stack.blocks.{i}.{ours}.{leaf}"]
    # it has token types and ours has none
    _fill(model, names, {"embeddings.token_type_embeddings.weight": torch.zeros(1, config.model_dim)})
    table = model.embeddings.word_embeddings
    model.embeddings.token_type_embeddings.weight.requires_grad_(False)
    return model, lambda inputs: model(inputs["tokens"]).last_hidden_state @ table.weight.T


def _llama(config: ModelConfig, weights: Arrays, attention: str) -> Made:
    theirs = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.context_length,
        hidden_size=config.model_dim,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.key_dim,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=False,
        attn_implementation=attention,
        **_NO_ENDS,
    )
    model = transformers.LlamaForCausalLM(theirs)
    parts = {
        "attention_norm": "input_layernorm",
        "feedforward_norm": "post_attention_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "feedforward.up": "mlp.up_proj",
        "feedforward.gate": "mlp.gate_proj",
        "feedforward.down": "mlp.down_proj",
    }
    names = {
        "model.embed_tokens.weight": weights["embedding.tokens.weight"],
        "model.norm.weight": weights["stack.final_norm.weight"],
        "lm_head.weight": weights["head.weight"],
    }
    for i in range(config.num_layers):
        for ours, to in parts.items():
            names[f"model.layers.{i}.{to}.weight"] = weights[f"stack.blocks.{i}.{ours}.weight"]
    _fill(model, names)
    return model, lambda inputs: model(inputs["tokens"], use_cache=False).logits


def _bart(config: ModelConfig, weights: Arrays, attention: str) -> Made:
    theirs = transformers.BartConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.context_length,
        d_model=config.model_dim,
        encoder_layers=config.num_encoder_layers,
        decoder_layers=config.num_layers,
        encoder_attention_heads=config.num_heads,
        decoder_attention_heads=config.num_heads,
        encoder_ffn_dim=config.hidden_dim,
        decoder_ffn_dim=config.hidden_dim,
        activation_function="gelu",
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        attn_implementation=attention,
        forced_eos_token_id=None,
        decoder_start_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.BartForConditionalGeneration(theirs)
    names = {"model.shared.weight": weights["source_embedding.tokens.weight"]}
    sides = {
        "encoder": ("source_embedding", config.num_encoder_layers, {"attention": "self_attn"}),
        "decoder": (
            "target_embedding",
            config.num_layers,
            {"attention": "self_attn", "cross_attention": "encoder_attn"},
        ),
    }
    for side, (embedding, layers, attentions) in sides.items():
        names[f"model.{side}.embed_positions.weight"] = weights[f"{embedding}.positions.weight"]
        for leaf in ("weight", "bias"):
            names[f"model.{side}.layernorm_embedding.{leaf}"] = weights[f"{embedding}.norm.{leaf}"]
            for i in range(layers):
                ours, to = f"{side}.blocks.{i}.", f"model.{side}.layers.{i}."
                for mine, theirs_name in attentions.items():
                    for part, proj in (
                        ("query", "q_proj"),
                        ("key", "k_proj"),
                        ("value", "v_proj"),
                        ("output", "out_proj"),
                    ):
                        names[f"{to}{theirs_name}.{proj}.{leaf}"] = weights[f"{ours}{mine}.{part}.{leaf}"]
                    names[f"{to}{theirs_name}_layer_norm.{leaf}"] = weights[f"{ours}{mine}_norm.{leaf}"]
                names[f"{to}fc1.{leaf}"] = weights[f"{ours}feedforward.up.{leaf}"]
                names[f"{to}fc2.{leaf}"] = weights[f"{ours}feedforward.down.{leaf}"]
                names[f"{to}final_layer_norm.{leaf}"] = weights[f"{ours}feedforward_norm.{leaf}"]
    _fill(model, names, {"final_logits_bias": torch.zeros(1, config.vocab_size)})
    return (
        model,
        lambda inputs: model(input_ids=inputs["source"], decoder_input_ids=inputs["target"], use_cache=False).logits,
    )
