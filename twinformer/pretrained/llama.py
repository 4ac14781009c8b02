"""Llama 1 to 3 (Touvron et al. 2023, arXiv:2302.13971; Grattafiori et al. 2024, arXiv:2407.21783), as ``transformers``
publishes it: ``LlamaForCausalLM`` and its kin.

What differs from its kin: biases of all attention projections, or of the whole feed-forward, by configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twinformer.config import ModelConfig
from twinformer.pretrained import llama_like as shared
from twinformer.pretrained.decoder import Heads
from twinformer.pretrained.family import Family, Field
from twinformer.pretrained.rope import rope_fields, rope_from_config, rope_to_config

_HEADS = Heads("LlamaModel", "LlamaForCausalLM", "LlamaForSequenceClassification", "LlamaForTokenClassification")


def _to_config(values: Mapping[str, Any]) -> dict[str, Any]:
    shared.divisible(values, "llama")
    return {
        **shared.llama_to_config(values, _HEADS),
        **rope_to_config("llama", values, shared.key_dim(values)),
        "qkv_bias": values["attention_bias"],
        "output_bias": values["attention_bias"],
        "feedforward_bias": values["mlp_bias"],
    }


def _from_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **shared.llama_from_config(config, "llama", _HEADS),
        **rope_from_config(config),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.feedforward_bias,
    }


FAMILY = Family(
    model_type="llama",
    fields={
        **shared.llama_fields(_HEADS),
        **rope_fields(),
        "attention_bias": Field(bool, default=False),
        "mlp_bias": Field(bool, default=False),
    },
    # how the library once cut its products
    without_effect=frozenset(["pretraining_tp"]),
    to_config=_to_config,
    from_config=_from_config,
    names=(*shared.OUTER, *shared.PRE_NORMS, *shared.ATTENTION, *shared.FEEDFORWARD, *_HEADS.names()),
    prefixes=(shared.PREFIX,),
    body_prefix=shared.PREFIX,
    copies=shared.COPIES,
    left_out=shared.LEFT_OUT,
    buffers=shared.BUFFERS,
)
