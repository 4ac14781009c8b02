"""Named configurations at tiny size, for judging and for first steps.

The three ``textbook-*`` presets are the book's architecture at sizes that show mistakes which round sizes hide:
6 query heads on 2 key/value heads, ``A·K != D``, ``J != K``. The others have the choices of the published
families at small, mostly published proportions. All have more than 256 positions: bfloat16 cannot count further.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twinformer.config import ModelConfig, RotaryScaling
from twinformer.errors import ConfigError

_CONTEXT = 272


def _textbook(**choices: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 61,
        "context_length": _CONTEXT,
        "model_dim": 40,
        "key_dim": 10,
        "value_dim": 7,
        "hidden_dim": 72,
        "num_heads": 6,
        "num_kv_heads": 2,
        "num_layers": 2,
        "positions": "sinusoidal",
    }
    return ModelConfig(**(sizes | choices))


def _gpt2() -> ModelConfig:
    return ModelConfig(
        architecture="decoder",
        vocab_size=97,
        context_length=_CONTEXT,
        model_dim=48,
        key_dim=16,
        hidden_dim=192,
        num_heads=3,
        num_layers=3,
        activation="gelu_tanh",
        qkv_bias=True,
        output_bias=True,
        positions="learned",
        initializer_scale_residual=True,
    )


def _llama() -> ModelConfig:
    return ModelConfig(
        architecture="decoder",
        vocab_size=97,
        context_length=_CONTEXT,
        model_dim=48,
        key_dim=8,
        hidden_dim=112,
        num_heads=6,
        num_kv_heads=2,
        num_layers=3,
        norm="rmsnorm",
        norm_bias=False,
        norm_cast="before_weight",
        activation="silu",
        gated=True,
        feedforward_bias=False,
        positions="rotary",
        rotary_base=500000.0,
        rotary_scaling=RotaryScaling(kind="llama3", factor=8.0, original_context_length=64),
        head="untied",
    )


def _gemma() -> ModelConfig:
    """Gemma 2 and 3 in one: sandwich norms, soft caps, norms of queries and keys, the window in some blocks only."""
    return ModelConfig(
        architecture="decoder",
        vocab_size=97,
        context_length=_CONTEXT,
        model_dim=48,
        key_dim=10,
        hidden_dim=96,
        num_heads=6,
        num_kv_heads=2,
        num_layers=3,
        norm="rmsnorm",
        norm_bias=False,
        norm_weight="one_plus",
        norm_eps=1e-6,
        norm_placement="sandwich",
        activation="gelu_tanh",
        gated=True,
        feedforward_bias=False,
        attention_scale=0.25,
        attention_softcap=50.0,
        qk_norm="rmsnorm",
        window=32,
        window_layers=(0, 2),
        positions="rotary",
        rotary_base=1e6,
        rotary_scaling=RotaryScaling(kind="linear", factor=8.0),
        window_rotary_base=1e4,
        embedding_scale=48**0.5,
        head_softcap=30.0,
    )


def _bert() -> ModelConfig:
    return ModelConfig(
        architecture="encoder",
        vocab_size=97,
        context_length=_CONTEXT,
        model_dim=48,
        key_dim=16,
        hidden_dim=192,
        num_heads=3,
        num_layers=3,
        norm_eps=1e-12,
        norm_placement="post",
        final_norm=False,
        activation="gelu",
        qkv_bias=True,
        output_bias=True,
        positions="learned",
        embedding_norm=True,
        num_token_types=2,
        head="tied",
        head_bias=True,
    )


def _t5() -> ModelConfig:
    return ModelConfig(
        architecture="encoder-decoder",
        vocab_size=97,
        context_length=_CONTEXT,
        model_dim=48,
        key_dim=8,
        hidden_dim=96,
        num_heads=5,
        num_layers=3,
        num_encoder_layers=2,
        norm="rmsnorm",
        norm_eps=1e-6,
        norm_bias=False,
        norm_cast="before_weight",
        activation="relu",
        feedforward_bias=False,
        attention_scale=1.0,
        positions="relative",
        share_embeddings=True,
        head="tied",
        head_scale=48**-0.5,
        initializer_std=0.05,
    )


_PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "textbook-encoder": lambda: _textbook(architecture="encoder"),
    "textbook-decoder": lambda: _textbook(architecture="decoder"),
    "textbook-encoder-decoder": lambda: _textbook(architecture="encoder-decoder", source_vocab_size=53),
    "gpt2": _gpt2,
    "llama": _llama,
    "gemma": _gemma,
    "bert": _bert,
    "t5": _t5,
}

PRESETS = tuple(_PRESETS)


def preset(name: str) -> ModelConfig:
    """The configuration of a preset. Raises ConfigError naming the presets there are."""
    if name not in _PRESETS:
        raise ConfigError("preset", [f"expected one of {', '.join(PRESETS)}, got {name!r}"])
    return _PRESETS[name]()
