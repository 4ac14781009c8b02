"""Random settings of every published decoder-only family, for the sweep."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from parity_tests.published_decoders import GPT2, LLAMA, ROPES, Settings


def _sizes(rng: np.random.Generator, whole: bool = False) -> Settings:
    """``whole``: the published class wants a width that its heads divide."""
    groups, per_group = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    A = groups * per_group
    # at least 4: a norm of two numbers leaves little but their signs, and rounding for a gradient
    D = A * int(rng.integers(-(-4 // A), 7)) if whole else int(rng.integers(4, 34))
    return {
        **LLAMA,
        "hidden_size": D,
        "intermediate_size": int(rng.integers(1, 40)),
        "num_hidden_layers": int(rng.integers(1, 5)),
        "num_attention_heads": A,
        "num_key_value_heads": groups,
        "head_dim": 2 * int(rng.integers(1, 7)),
        "rms_norm_eps": float(rng.choice([1e-6, 1e-5, 1e-2])),
        "tie_word_embeddings": _flip(rng),
    }


def _flip(rng: np.random.Generator) -> bool:
    return bool(rng.integers(2))


def _rope(rng: np.random.Generator) -> Settings:
    return dict(ROPES[str(rng.choice(list(ROPES)))]) if _flip(rng) else {}


def _act(rng: np.random.Generator) -> str:
    return str(rng.choice(["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"]))


def _window(rng: np.random.Generator) -> int:
    return int(rng.integers(1, 12))


def _types(rng: np.random.Generator, blocks: int) -> list[str]:
    return [str(rng.choice(["full_attention", "sliding_attention"])) for _ in range(blocks)]


def _draw_gpt2(rng: np.random.Generator) -> Settings:
    A = int(rng.integers(1, 5))
    return {
        **GPT2,
        # at least 4: LayerNorm leaves of two numbers a sign only, and its gradients are rounding
        "n_embd": A * int(rng.integers(4 if A < 4 else 1, 9)),
        "n_head": A,
        "n_layer": int(rng.integers(1, 4)),
        "n_inner": None if _flip(rng) else int(rng.integers(1, 40)),
        "activation_function": _act(rng),
        "layer_norm_epsilon": float(rng.choice([1e-6, 1e-5, 1e-2])),
        "scale_attn_weights": _flip(rng),
        "tie_word_embeddings": _flip(rng),
    }


def _draw_llama(rng: np.random.Generator) -> Settings:
    biases = {"attention_bias": _flip(rng), "mlp_bias": _flip(rng), "hidden_act": _act(rng)}
    return {**_sizes(rng, whole=True), **_rope(rng), **biases}


def _draw_mistral(rng: np.random.Generator) -> Settings:
    return {**_sizes(rng), **_rope(rng), "sliding_window": _window(rng) if _flip(rng) else None}


def _draw_qwen(rng: np.random.Generator) -> Settings:
    found = {**_sizes(rng), **_rope(rng), "use_sliding_window": _flip(rng), "sliding_window": _window(rng)}
    if _flip(rng):
        return {**found, "max_window_layers": int(rng.integers(0, 5))}
    if found["use_sliding_window"]:
        return {**found, "layer_types": _types(rng, found["num_hidden_layers"])}
    return found


def _draw_qwen3(rng: np.random.Generator) -> Settings:
    return {**_draw_qwen(rng), "attention_bias": _flip(rng)}


def _draw_gemma(rng: np.random.Generator) -> Settings:
    act = str(rng.choice(["gelu", "gelu_pytorch_tanh", "silu"]))
    return {**_sizes(rng), **_rope(rng), "attention_bias": _flip(rng), "hidden_act": act}


def _draw_gemma2(rng: np.random.Generator) -> Settings:
    found = {
        **_sizes(rng, whole=True),
        **_rope(rng),
        # not 1: the norm after the branch would take away all but a sign, and leave rounding for a gradient
        "intermediate_size": int(rng.integers(3, 40)),
        "attention_bias": _flip(rng),
        "query_pre_attn_scalar": int(rng.integers(1, 20)),
        "final_logit_softcapping": 2.5 if _flip(rng) else None,
        "attn_logit_softcapping": 1.5 if _flip(rng) else None,
        "sliding_window": _window(rng),
    }
    return {**found, "layer_types": _types(rng, found["num_hidden_layers"])} if _flip(rng) else found


def _draw_gemma3(rng: np.random.Generator) -> Settings:
    found = {
        **_draw_gemma2(rng),
        "attn_logit_softcapping": None,
        "sliding_window_pattern": int(rng.integers(1, 4)),
        "rope_local_base_freq": float(rng.choice([50.0, 10000.0])),
    }
    old, new = found.get("rope_scaling"), found.pop("rope_parameters", None)
    if old is not None:
        found["rope_scaling"] = {("rope_type" if name == "type" else name): value for name, value in old.items()}
    if new is not None:
        new = {name: value for name, value in new.items() if name != "truncate"}
        del found["rope_local_base_freq"]
        local = {"rope_type": "default", "rope_theta": 321.0}
        found["rope_parameters"] = {"full_attention": new, "sliding_attention": local}
    return found


def _draw_phi3(rng: np.random.Generator) -> Settings:
    found = {**_sizes(rng), "sliding_window": _window(rng) if _flip(rng) else None, "hidden_act": _act(rng)}
    K = found["head_dim"]
    return {**found, "partial_rotary_factor": (2 * int(rng.integers(1, K // 2 + 1)) + 0.01) / (K + 0.01)}


DRAWS: dict[str, Callable[[np.random.Generator], Settings]] = {
    "gpt2": _draw_gpt2,
    "llama": _draw_llama,
    "mistral": _draw_mistral,
    "qwen2": _draw_qwen,
    "qwen3": _draw_qwen3,
    "gemma": _draw_gemma,
    "gemma2": _draw_gemma2,
    "gemma3_text": _draw_gemma3,
    "phi3": _draw_phi3,
}
