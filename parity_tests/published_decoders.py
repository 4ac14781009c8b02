"""Tiny decoder-only models of every published family: named cases.

A case is the settings of a published ``config.json``, as a file would hold them: old and new spellings, odd sizes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from parity_tests.published_witness import scattered

Settings = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """One family: its classes in ``transformers``, settings that every case has, and cases by name."""

    config: str
    classes: tuple[str, ...]  # causal, bare, sequence labels, token labels
    base: Settings
    cases: dict[str, Settings]

    def settings(self, case: str) -> Settings:
        return {**self.base, **self.cases[case]}

    def model(self, settings: Settings, seed: int = 0, class_name: str | None = None) -> Any:
        """A random model with these settings (of a copy: the library changes what it is given)."""
        config = getattr(transformers, self.config)(**json.loads(json.dumps(settings)))
        return scattered(getattr(transformers, class_name or self.classes[0]), config, seed)


def publish(model: Any, directory: Path, settings: Settings | None = None) -> Path:
    """Save a model as the library does; with settings its config.json holds these as they are, in old spellings too."""
    model.save_pretrained(directory)
    if settings is not None:
        file = directory / "config.json"
        saved = json.loads(file.read_text())
        own = {name: saved[name] for name in ("model_type", "architectures", "dtype")}
        file.write_text(json.dumps({**settings, **own}))
    return Path(directory)


def classes_of(stem: str, text: str = "") -> tuple[str, ...]:
    return (
        f"{stem}ForCausalLM",
        f"{stem}{text}Model",
        f"{stem}{text}ForSequenceClassification",
        f"{stem}ForTokenClassification",
    )


# ---- settings

LLAMA = {
    "vocab_size": 31,
    "max_position_embeddings": 40,
    "hidden_size": 30,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 30,
    "bos_token_id": 0,
    "eos_token_id": None,
}
GPT2 = {
    "vocab_size": 29,
    "n_positions": 40,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "pad_token_id": 28,
    "bos_token_id": 0,
    "eos_token_id": None,
}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 64}

ROPES: dict[str, Settings] = {
    "base": {"rope_theta": 500000.0},
    "new": {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
    "linear": {"rope_theta": 1234.5, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "linear, new": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1234.5, "factor": 2.5}},
    "llama3": {"rope_theta": 50.0, "rope_scaling": {"rope_type": "llama3", **_LLAMA3}},
    "llama3, new": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 50.0, **_LLAMA3}},
    "yarn": {"rope_theta": 100.0, "rope_scaling": {"type": "yarn", **_YARN}},
    "yarn, weighed": {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, **_YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    },
    "yarn, whole": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 300.0,
            **_YARN,
            "attention_factor": 0.8,
            "beta_fast": 8.0,
            "beta_slow": 1.5,
            "truncate": False,
        },
    },
    "yarn, of its length": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
}


# ---- the families

_QWEN_CASES: dict[str, Settings] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True, "rope_theta": 1e6},
    "window above": {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "window everywhere": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    "window unused": {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0},
    "window by block": {
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "yarn": {"num_key_value_heads": None, **ROPES["yarn"]},
}

KINDS: dict[str, Kind] = {
    "gpt2": Kind(
        "GPT2Config",
        ("GPT2LMHeadModel", "GPT2Model", "GPT2ForSequenceClassification", "GPT2ForTokenClassification"),
        GPT2,
        {
            "plain": {},
            "narrow": {"n_inner": 7, "n_head": 1, "activation_function": "relu", "layer_norm_epsilon": 1e-2},
            "untied": {"tie_word_embeddings": False, "activation_function": "gelu", "n_layer": 3},
            "unscaled": {"scale_attn_weights": False, "n_inner": 50, "activation_function": "swish"},
        },
    ),
    "llama": Kind(
        "LlamaConfig",
        classes_of("Llama"),
        LLAMA,
        {
            "plain": {},
            "biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu"},
            "one head of its width": {"num_attention_heads": 1, "num_key_value_heads": None, "head_dim": None},
            **ROPES,
        },
    ),
    "mistral": Kind(
        "MistralConfig",
        classes_of("Mistral"),
        {**LLAMA, "hidden_size": 31},
        {
            "window": {"sliding_window": 4},
            "no window": {"sliding_window": None, "tie_word_embeddings": True},
            "window of one": {"sliding_window": 1, **ROPES["llama3"]},
        },
    ),
    "qwen2": Kind("Qwen2Config", classes_of("Qwen2"), {**LLAMA, "hidden_size": 31}, _QWEN_CASES),
    "qwen3": Kind(
        "Qwen3Config",
        classes_of("Qwen3"),
        {**LLAMA, "hidden_size": 31},
        {
            "plain": {},
            "window above": _QWEN_CASES["window above"],
            "biases": {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 6},
        },
    ),
    "gemma": Kind(
        "GemmaConfig",
        classes_of("Gemma"),
        {**LLAMA, "hidden_size": 31},
        {
            "plain": {},
            "biases": {"attention_bias": True, "tie_word_embeddings": False, "hidden_act": "gelu"},
            "linear": {"num_key_value_heads": 6, **ROPES["linear"]},
        },
    ),
    "gemma2": Kind(
        "Gemma2Config",
        classes_of("Gemma2"),
        {**LLAMA, "sliding_window": 4, "query_pre_attn_scalar": 11, "final_logit_softcapping": 2.5},
        {
            "plain": {"num_hidden_layers": 3, "attn_logit_softcapping": 1.5},
            "no caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 8},
            "untied": {"tie_word_embeddings": False, "attention_bias": True, **ROPES["linear, new"]},
            "all full": {"layer_types": ["full_attention"] * 2},
            "all sliding": {"layer_types": ["sliding_attention"] * 2},
        },
    ),
    "gemma3_text": Kind(
        "Gemma3TextConfig",
        ("Gemma3ForCausalLM", "Gemma3TextModel", "Gemma3TextForSequenceClassification"),
        {**LLAMA, "num_hidden_layers": 4, "sliding_window": 4, "query_pre_attn_scalar": 11},
        {
            "plain": {"sliding_window_pattern": 3},
            "old bases": {"sliding_window_pattern": 2, "rope_theta": 5000.0, "rope_local_base_freq": 60.0},
            "scaled": {
                "sliding_window_pattern": 2,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "attention_bias": True,
            },
            "new bases": {
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
                "rope_parameters": {
                    "full_attention": {"rope_type": "llama3", "rope_theta": 70.0, **_LLAMA3},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 44.0},
                },
            },
            "all sliding": {"final_logit_softcapping": 2.5, "tie_word_embeddings": False},
            "all full": {"sliding_window_pattern": 1},
        },
    ),
    "phi3": Kind(
        "Phi3Config",
        classes_of("Phi3"),
        {**LLAMA, "hidden_size": 31},
        {
            "plain": {},
            "a part turns": {"partial_rotary_factor": 0.76, "rope_theta": 300.0, "head_dim": 9},
            "window": {"sliding_window": 4, "tie_word_embeddings": True, "resid_pdrop": 0.25, "embd_pdrop": 0.5},
        },
    ),
}
