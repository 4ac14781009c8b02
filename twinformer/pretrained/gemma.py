"""Gemma 1 (Gemma Team 2024, arXiv:2403.08295), as ``transformers`` publishes it: ``GemmaForCausalLM`` and its kin.

What differs from Llama: embeddings times sqrt(D); norms multiply by ``1 + w`` before they are cast back; tanh GELU
(``gelu`` in older files means it too); heads 256 wide unless ``head_dim`` says otherwise; tied embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twinformer.config import ModelConfig
from twinformer.pretrained import llama_like as shared
from twinformer.pretrained.decoder import Heads
from twinformer.pretrained.family import Family, Field, only
from twinformer.pretrained.rope import rope_fields, rope_from_config, rope_to_config

_HEADS = Heads(
    "GemmaModel",
    "GemmaForCausalLM",
    "GemmaForSequenceClassification",
    "GemmaForTokenClassification",
    tied=True,
)

TANH = "gelu_pytorch_tanh"


def gemma_choices(values: Mapping[str, Any]) -> dict[str, Any]:
    """What all Gemmas share beyond Llama."""
    return {
        "embedding_scale": values["hidden_size"] ** 0.5,
        "norm_weight": "one_plus",
        "norm_cast": "after_weight",
        "qkv_bias": values["attention_bias"],
        "output_bias": values["attention_bias"],
    }


def _to_config(values: Mapping[str, Any]) -> dict[str, Any]:
    choices = shared.llama_to_config(values, _HEADS)
    if values["hidden_act"] == "gelu":
        choices["activation"] = "gelu_tanh"
    return {**choices, **rope_to_config("gemma", values, values["head_dim"]), **gemma_choices(values)}


def _from_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **shared.llama_from_config(config, "gemma", _HEADS),
        **rope_from_config(config),
        "attention_bias": config.qkv_bias,
    }


FAMILY = Family(
    model_type="gemma",
    fields={
        **shared.llama_fields(_HEADS, kv_heads=16, head_dim=256, activation=TANH),
        **rope_fields(),
        "attention_bias": Field(bool, default=False),
        # older versions let it overrule hidden_act
        "hidden_activation": only(None, TANH),
        "use_bidirectional_attention": only(None, False),
    },
    without_effect=frozenset(["cache_implementation"]),
    to_config=_to_config,
    from_config=_from_config,
    names=(*shared.OUTER, *shared.PRE_NORMS, *shared.ATTENTION, *shared.FEEDFORWARD, *_HEADS.names()),
    prefixes=(shared.PREFIX,),
    body_prefix=shared.PREFIX,
    copies=shared.COPIES,
    left_out=shared.LEFT_OUT,
    buffers=shared.BUFFERS,
)
