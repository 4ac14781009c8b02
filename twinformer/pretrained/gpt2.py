"""GPT-2 (Radford et al. 2019), as ``transformers`` publishes it: ``GPT2LMHeadModel`` and its kin.

Pre-norm blocks with LayerNorm and a final norm; learned positions; biases everywhere but in the head. Matrices are
stored ``[in, out]`` (the library's ``Conv1D``), and queries, keys and values are one of them, side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twinformer.config import ModelConfig
from twinformer.errors import ConfigError
from twinformer.pretrained.activations import ACTIVATIONS, published_activation
from twinformer.pretrained.decoder import Heads
from twinformer.pretrained.family import TURNED, Family, Field, Name, only

_HEADS = Heads(
    "GPT2Model",
    "GPT2LMHeadModel",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    tied=True,
    tokens_name="classifier",
)


def _to_config(values: Mapping[str, Any]) -> dict[str, Any]:
    D, A = values["n_embd"], values["n_head"]
    if D % A != 0:
        raise ConfigError("gpt2", [f"n_embd: expected a multiple of n_head={A}, got {D}"])
    return {
        "architecture": "decoder",
        "vocab_size": values["vocab_size"],
        "context_length": values["n_positions"],
        "model_dim": D,
        "key_dim": D // A,
        "hidden_dim": 4 * D if values["n_inner"] is None else values["n_inner"],
        "num_heads": A,
        "num_layers": values["n_layer"],
        "norm": "layernorm",
        "norm_eps": values["layer_norm_epsilon"],
        "activation": ACTIVATIONS[values["activation_function"]],
        "feedforward_bias": True,
        "qkv_bias": True,
        "output_bias": True,
        "attention_scale": None if values["scale_attn_weights"] else 1.0,
        "positions": "learned",
        "dropout": values["resid_pdrop"],
        "attention_dropout": values["attn_pdrop"],
        "embedding_dropout": values["embd_pdrop"],
        "initializer": "normal",
        "initializer_std": values["initializer_range"],
        "initializer_scale_residual": True,
        **_HEADS.to_config(values),
    }


def _from_config(config: ModelConfig) -> dict[str, Any]:
    rate = config.embedding_dropout
    return {
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_ctx": config.context_length,
        "n_embd": config.model_dim,
        "n_inner": config.hidden_dim,
        "n_head": config.num_heads,
        "n_layer": config.num_layers,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": published_activation(config.activation),
        "scale_attn_weights": config.attention_scale != 1.0,
        "resid_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
        "embd_pdrop": config.dropout if rate is None else rate,
        "initializer_range": config.initializer_std,
        **_HEADS.from_config(config),
    }


# the summary is a part of GPT2DoubleHeadsModel, which we do not read; n_ctx repeats n_positions in older files;
# reorder_and_upcast_attn computes the same scores in float32, as ours are
_WITHOUT_EFFECT = """
n_ctx reorder_and_upcast_attn
summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
"""

_OURS = "stack.blocks.{layer}."
_THEIRS = "h.{layer}."
_QKV = ("query", "key", "value")


def _both(theirs: str, ours: str, turned: bool = False) -> tuple[Name, Name]:
    weight = (
        Name(f"{theirs}.weight", f"{ours}.weight", TURNED) if turned else Name(f"{theirs}.weight", f"{ours}.weight")
    )
    return weight, Name(f"{theirs}.bias", f"{ours}.bias")


FAMILY = Family(
    model_type="gpt2",
    fields={
        **{name: Field(int, minimum=1) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")},
        "n_inner": Field(int, default=None, nullable=True, minimum=1),
        "activation_function": Field(str, default="gelu_new", allowed=tuple(ACTIVATIONS)),
        **{name: Field(float, default=0.1) for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")},
        "layer_norm_epsilon": Field(float, default=1e-5),
        "initializer_range": Field(float, default=0.02),
        "scale_attn_weights": Field(bool, default=True),
        "scale_attn_by_inverse_layer_idx": only(False),
        **_HEADS.fields(),
        "add_cross_attention": only(False),
        "is_decoder": only(False, True),
        "is_encoder_decoder": only(False),
        "pruned_heads": only({}, None),
        "quantization_config": only(None),
        "per_layer_config": only(None),
    },
    without_effect=frozenset(_WITHOUT_EFFECT.split()),
    to_config=_to_config,
    from_config=_from_config,
    names=(
        Name("wte.weight", "embedding.tokens.weight"),
        Name("wpe.weight", "embedding.positions.weight"),
        *_both(_THEIRS + "ln_1", _OURS + "attention_norm"),
        Name(_THEIRS + "attn.c_attn.weight", tuple(f"{_OURS}attention.{part}.weight" for part in _QKV), TURNED),
        Name(_THEIRS + "attn.c_attn.bias", tuple(f"{_OURS}attention.{part}.bias" for part in _QKV)),
        *_both(_THEIRS + "attn.c_proj", _OURS + "attention.output", turned=True),
        *_both(_THEIRS + "ln_2", _OURS + "feedforward_norm"),
        *_both(_THEIRS + "mlp.c_fc", _OURS + "feedforward.up", turned=True),
        *_both(_THEIRS + "mlp.c_proj", _OURS + "feedforward.down", turned=True),
        *_both("ln_f", "stack.final_norm"),
        *_HEADS.names(),
    ),
    prefixes=("transformer.",),
    body_prefix="transformer.",
    copies={"lm_head.weight": "wte.weight"},
    # the causal mask and its value, which older files hold as buffers of each block
    left_out=(_THEIRS + "attn.bias", _THEIRS + "attn.masked_bias"),
)
