"""Qwen3 (Yang et al. 2025, arXiv:2505.09388; the dense models), as ``transformers`` publishes it: ``Qwen3ForCausalLM``
and its kin.

What differs from Qwen2: RMSNorm on each query and key before it turns; heads 128 wide unless ``head_dim`` says
otherwise; biases of all attention projections only with ``attention_bias``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twinformer.config import ModelConfig
from twinformer.pretrained import llama_like as shared
from twinformer.pretrained.decoder import Heads
from twinformer.pretrained.family import Family, Field
from twinformer.pretrained.qwen2 import QWEN_WINDOW_FIELDS, qwen_window_values, qwen_windows
from twinformer.pretrained.rope import rope_fields, rope_from_config, rope_to_config

_HEADS = Heads("Qwen3Model", "Qwen3ForCausalLM", "Qwen3ForSequenceClassification", "Qwen3ForTokenClassification")


def _to_config(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **shared.llama_to_config(values, _HEADS),
        **rope_to_config("qwen3", values, shared.key_dim(values)),
        **qwen_windows("qwen3", values),
        "qk_norm": "rmsnorm",
        "qkv_bias": values["attention_bias"],
        "output_bias": values["attention_bias"],
    }


def _from_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **shared.llama_from_config(config, "qwen3", _HEADS),
        **rope_from_config(config),
        **qwen_window_values(config),
        "attention_bias": config.qkv_bias,
    }


FAMILY = Family(
    model_type="qwen3",
    fields={
        **shared.llama_fields(_HEADS, kv_heads=32, head_dim=128),
        **rope_fields(),
        **QWEN_WINDOW_FIELDS,
        "attention_bias": Field(bool, default=False),
    },
    without_effect=frozenset(),
    to_config=_to_config,
    from_config=_from_config,
    names=(
        *shared.OUTER,
        *shared.PRE_NORMS,
        *shared.ATTENTION,
        *shared.HEAD_NORMS,
        *shared.FEEDFORWARD,
        *_HEADS.names(),
    ),
    prefixes=(shared.PREFIX,),
    body_prefix=shared.PREFIX,
    copies=shared.COPIES,
    left_out=shared.LEFT_OUT,
    buffers=shared.BUFFERS,
)
