"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv:2407.10671), as ``transformers`` publishes it: ``Qwen2ForCausalLM`` and
its kin.

What differs from Llama: queries, keys and values have biases and the output none; with ``use_sliding_window`` the
blocks from ``max_window_layers`` on (or those that ``layer_types`` names) see through a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twinformer.config import ModelConfig
from twinformer.pretrained import llama_like as shared
from twinformer.pretrained.decoder import FULL, SLIDING, WINDOW_FIELDS, Heads, layer_types, windows
from twinformer.pretrained.family import Family, Field, only
from twinformer.pretrained.rope import rope_fields, rope_from_config, rope_to_config

_HEADS = Heads("Qwen2Model", "Qwen2ForCausalLM", "Qwen2ForSequenceClassification", "Qwen2ForTokenClassification")

QWEN_WINDOW_FIELDS = {
    **WINDOW_FIELDS,
    "sliding_window": Field(int, default=4096, nullable=True, minimum=1),
    "use_sliding_window": Field(bool, default=False),
    "max_window_layers": Field(int, default=28, minimum=0),
}


def qwen_windows(subject: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """``window`` and ``window_layers`` of Qwen2 and Qwen3."""
    L = values["num_hidden_layers"]
    window = values["sliding_window"] if values["use_sliding_window"] else None
    types = values["layer_types"]
    if types is None:
        first = L if window is None else values["max_window_layers"]
        types = [SLIDING if layer >= first else FULL for layer in range(L)]
    return windows(subject, types, window, L)


def qwen_window_values(config: ModelConfig) -> dict[str, Any]:
    """The fields of the window as Qwen2 and Qwen3 publish them."""
    first = min((layer for layer in range(config.num_layers) if config.has_window(layer)), default=config.num_layers)
    return {
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "max_window_layers": first,
        "layer_types": layer_types(config),
    }


def _to_config(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **shared.llama_to_config(values, _HEADS),
        **rope_to_config("qwen2", values, shared.key_dim(values)),
        **qwen_windows("qwen2", values),
        "qkv_bias": True,
    }


def _from_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **shared.llama_from_config(config, "qwen2", _HEADS),
        **rope_from_config(config),
        **qwen_window_values(config),
    }


FAMILY = Family(
    model_type="qwen2",
    fields={
        **shared.llama_fields(_HEADS, kv_heads=32),
        **rope_fields(),
        **QWEN_WINDOW_FIELDS,
        "use_mrope": only(False),  # positions of pictures
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
