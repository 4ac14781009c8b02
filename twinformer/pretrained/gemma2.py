"""Gemma 2 (Gemma Team 2024, arXiv:2408.00118), as ``transformers`` publishes it: ``Gemma2ForCausalLM`` and its kin.

What differs from Gemma 1: a norm before and after each branch; every second block, the first among them, sees
through a window; soft caps of scores and logits; scores times ``query_pre_attn_scalar ** -0.5``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twinformer.config import ModelConfig
from twinformer.pretrained import llama_like as shared
from twinformer.pretrained.decoder import FULL, SLIDING, WINDOW_FIELDS, Heads, layer_types, windows
from twinformer.pretrained.family import Family, Field, only
from twinformer.pretrained.gemma import TANH, gemma_choices
from twinformer.pretrained.rope import rope_fields, rope_from_config, rope_to_config

_HEADS = Heads(
    "Gemma2Model",
    "Gemma2ForCausalLM",
    "Gemma2ForSequenceClassification",
    "Gemma2ForTokenClassification",
    tied=True,
)

#: the fields that Gemma 2 has beyond Gemma 1, and Gemma 3 too
GEMMA2_FIELDS = {
    **WINDOW_FIELDS,
    "sliding_window": Field(int, default=4096, nullable=True, minimum=1),
    "attention_bias": Field(bool, default=False),
    "query_pre_attn_scalar": Field(int, default=256, minimum=1),
    "final_logit_softcapping": Field(float, default=30.0, nullable=True),
    "attn_logit_softcapping": Field(float, default=50.0, nullable=True),
    "use_bidirectional_attention": only(None, False),
}


def gemma2_choices(values: Mapping[str, Any], head: str) -> dict[str, Any]:
    """What Gemma 2 and 3 share. Only logits over the vocabulary are capped."""
    scalar = values["query_pre_attn_scalar"]
    return {
        **gemma_choices(values),
        "norm_placement": "sandwich",
        "attention_scale": None if scalar == values["head_dim"] else scalar**-0.5,
        "head_softcap": values["final_logit_softcapping"] if head in ("tied", "untied") else None,
    }


def gemma2_values(config: ModelConfig) -> dict[str, Any]:
    """The fields that Gemma 2 and 3 share."""
    scale = config.attention_scale
    return {
        "attention_bias": config.qkv_bias,
        "query_pre_attn_scalar": config.key_dim if scale is None else max(round(scale**-2), 1),
        "final_logit_softcapping": config.head_softcap,
        # the library makes the window's mask whether or not a block uses it
        "sliding_window": config.context_length if config.window is None else config.window,
        "layer_types": layer_types(config),
    }


def _to_config(values: Mapping[str, Any]) -> dict[str, Any]:
    shared.divisible(values, "gemma2")
    choices = shared.llama_to_config(values, _HEADS, "hidden_activation")
    L = values["num_hidden_layers"]
    types = values["layer_types"]
    if types is None:
        types = [SLIDING if layer % 2 == 0 else FULL for layer in range(L)]
    return {
        **choices,
        **rope_to_config("gemma2", values, values["head_dim"]),
        **gemma2_choices(values, choices["head"]),
        **windows("gemma2", types, values["sliding_window"], L),
        "attention_softcap": values["attn_logit_softcapping"],
    }


def _from_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **shared.llama_from_config(config, "gemma2", _HEADS, "hidden_activation"),
        **rope_from_config(config),
        **gemma2_values(config),
        "attn_logit_softcapping": config.attention_softcap,
    }


FAMILY = Family(
    model_type="gemma2",
    fields={
        **shared.llama_fields(_HEADS, kv_heads=4, head_dim=256, activation=TANH, activation_field="hidden_activation"),
        **rope_fields(),
        **GEMMA2_FIELDS,
    },
    # hidden_activation is what counts; the window has one size
    without_effect=frozenset(["cache_implementation", "hidden_act", "sliding_window_size"]),
    to_config=_to_config,
    from_config=_from_config,
    names=(*shared.OUTER, *shared.SANDWICH_NORMS, *shared.ATTENTION, *shared.FEEDFORWARD, *_HEADS.names()),
    prefixes=(shared.PREFIX,),
    body_prefix=shared.PREFIX,
    copies=shared.COPIES,
    left_out=shared.LEFT_OUT,
    buffers=shared.BUFFERS,
)
