"""Mistral (Jiang et al. 2023, arXiv:2310.06825), as ``transformers`` publishes it: ``MistralForCausalLM`` and its kin.

What differs from Llama: every block sees through a window, where there is one; no biases.
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
    "MistralModel", "MistralForCausalLM", "MistralForSequenceClassification", "MistralForTokenClassification"
)


def _to_config(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **shared.llama_to_config(values, _HEADS),
        **rope_to_config("mistral", values, shared.key_dim(values)),
        "window": values["sliding_window"],
    }


def _from_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **shared.llama_from_config(config, "mistral", _HEADS),
        **rope_from_config(config),
        "sliding_window": config.window,
    }


FAMILY = Family(
    model_type="mistral",
    fields={
        **shared.llama_fields(_HEADS, kv_heads=8),
        **rope_fields(),
        "sliding_window": Field(int, default=4096, nullable=True, minimum=1),
        "layer_types": only(None),  # MistralModel does not heed it
    },
    without_effect=frozenset(),
    to_config=_to_config,
    from_config=_from_config,
    names=(*shared.OUTER, *shared.PRE_NORMS, *shared.ATTENTION, *shared.FEEDFORWARD, *_HEADS.names()),
    prefixes=(shared.PREFIX,),
    body_prefix=shared.PREFIX,
    copies=shared.COPIES,
    left_out=shared.LEFT_OUT,
    buffers=shared.BUFFERS,
)
