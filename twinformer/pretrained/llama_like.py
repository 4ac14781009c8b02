"""What the descendants of Llama share: fields, names, and the way there and back.

Pre-norm blocks with RMSNorm; rotary positions in halves; query heads in groups; a gated feed-forward; no dropout but
on the attention weights. A family file says what differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twinformer.config import ModelConfig
from twinformer.errors import ConfigError
from twinformer.pretrained.activations import ACTIVATIONS, published_activation
from twinformer.pretrained.decoder import Heads
from twinformer.pretrained.family import Field, Name, only
from twinformer.pretrained.rope import frequencies

OURS = "stack.blocks.{layer}."
THEIRS = "layers.{layer}."


def llama_fields(
    heads: Heads,
    *,
    eps: float = 1e-6,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    activation: str = "silu",
    activation_field: str = "hidden_act",
) -> dict[str, Field]:
    """The fields of every family; the arguments are what the absence of a field means in its published class.

    ``kv_heads`` None: as many as query heads. ``head_dim`` None: the width over the number of heads.
    """
    return {
        **{name: Field(int, minimum=1) for name in ("vocab_size", "hidden_size", "intermediate_size")},
        **{name: Field(int, minimum=1) for name in ("num_hidden_layers", "num_attention_heads")},
        "max_position_embeddings": Field(int, minimum=1),
        "num_key_value_heads": Field(int, default=kv_heads, minimum=1, nullable=True),
        "head_dim": Field(int, default=head_dim, minimum=1, nullable=head_dim is None),
        activation_field: Field(str, default=activation, allowed=tuple(ACTIVATIONS)),
        "rms_norm_eps": Field(float, default=eps),
        "attention_dropout": Field(float, default=0.0),
        "initializer_range": Field(float, default=0.02),
        **heads.fields(),
        "is_decoder": only(True, False),
        "is_encoder_decoder": only(False),
        "add_cross_attention": only(False),
        "pruned_heads": only({}, None),
        "quantization_config": only(None),
        "per_layer_config": only(None),
    }


def key_dim(values: Mapping[str, Any]) -> int:
    """The width of a head."""
    given = values["head_dim"]
    return int(values["hidden_size"] // values["num_attention_heads"] if given is None else given)


def divisible(values: Mapping[str, Any], subject: str) -> None:
    """Some published classes want whole heads even where ``head_dim`` says how wide they are."""
    D, A = values["hidden_size"], values["num_attention_heads"]
    if D % A != 0:
        raise ConfigError(subject, [f"hidden_size: expected a multiple of num_attention_heads={A}, got {D}"])


def llama_to_config(values: Mapping[str, Any], heads: Heads, activation_field: str = "hidden_act") -> dict[str, Any]:
    """The choices of every family, but for positions and windows."""
    return {
        "architecture": "decoder",
        "vocab_size": values["vocab_size"],
        "context_length": values["max_position_embeddings"],
        "model_dim": values["hidden_size"],
        "key_dim": key_dim(values),
        "hidden_dim": values["intermediate_size"],
        "num_heads": values["num_attention_heads"],
        "num_kv_heads": values["num_key_value_heads"],
        "num_layers": values["num_hidden_layers"],
        "norm": "rmsnorm",
        "norm_eps": values["rms_norm_eps"],
        "norm_bias": False,
        "norm_cast": "before_weight",
        "activation": ACTIVATIONS[values[activation_field]],
        "gated": True,
        "feedforward_bias": False,
        "attention_dropout": values["attention_dropout"],
        "initializer": "normal",
        "initializer_std": values["initializer_range"],
        **heads.to_config(values),
    }


def llama_from_config(
    config: ModelConfig, model_type: str, heads: Heads, activation_field: str = "hidden_act"
) -> dict[str, Any]:
    """The fields of every family, but for positions and windows."""
    return {
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.model_dim,
        "head_dim": config.key_dim,
        "intermediate_size": config.hidden_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "num_hidden_layers": config.num_layers,
        "rms_norm_eps": config.norm_eps,
        activation_field: published_activation(config.activation),
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.initializer_std,
        **heads.from_config(config),
    }


# ---- names


def linear(theirs: str, ours: str) -> tuple[Name, ...]:
    """Weight and bias of one matrix; a bias that the model does not have plays no part."""
    return tuple(Name(f"{THEIRS}{theirs}.{leaf}", f"{OURS}{ours}.{leaf}") for leaf in ("weight", "bias"))


OUTER = (
    Name("embed_tokens.weight", "embedding.tokens.weight"),
    Name("norm.weight", "stack.final_norm.weight"),
)
ATTENTION = (
    *linear("self_attn.q_proj", "attention.query"),
    *linear("self_attn.k_proj", "attention.key"),
    *linear("self_attn.v_proj", "attention.value"),
    *linear("self_attn.o_proj", "attention.output"),
)
HEAD_NORMS = (
    Name(THEIRS + "self_attn.q_norm.weight", OURS + "attention.query_norm.weight"),
    Name(THEIRS + "self_attn.k_norm.weight", OURS + "attention.key_norm.weight"),
)
FEEDFORWARD = (
    *linear("mlp.gate_proj", "feedforward.gate"),
    *linear("mlp.up_proj", "feedforward.up"),
    *linear("mlp.down_proj", "feedforward.down"),
)
PRE_NORMS = (
    Name(THEIRS + "input_layernorm.weight", OURS + "attention_norm.weight"),
    Name(THEIRS + "post_attention_layernorm.weight", OURS + "feedforward_norm.weight"),
)
SANDWICH_NORMS = (
    Name(THEIRS + "input_layernorm.weight", OURS + "attention_norm.weight"),
    Name(THEIRS + "post_attention_layernorm.weight", OURS + "attention_post_norm.weight"),
    Name(THEIRS + "pre_feedforward_layernorm.weight", OURS + "feedforward_norm.weight"),
    Name(THEIRS + "post_feedforward_layernorm.weight", OURS + "feedforward_post_norm.weight"),
)

# how the tensors of all of them are saved
PREFIX = "model."
COPIES = {"lm_head.weight": "embed_tokens.weight"}
#: rotary frequencies, which older files hold as buffers of each block
LEFT_OUT = (THEIRS + "self_attn.rotary_emb.inv_freq",)
BUFFERS = {"rotary_emb.inv_freq": frequencies}
