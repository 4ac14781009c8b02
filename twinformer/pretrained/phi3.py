"""Phi-3 (Abdin et al. 2024, arXiv:2404.14219), as ``transformers`` publishes it: ``Phi3ForCausalLM`` and its kin.

What differs from Llama: queries, keys and values are one matrix, gate and up another; a part of each head may turn;
dropout of the residual branches. The scaled rotary kind of this family, ``longrope`` (``su`` and ``yarn`` in older
files), is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from twinformer.config import ModelConfig
from twinformer.pretrained import llama_like as shared
from twinformer.pretrained.decoder import Heads
from twinformer.pretrained.family import Family, Field, Name, only
from twinformer.pretrained.llama_like import OURS, THEIRS
from twinformer.pretrained.rope import rope_fields, rope_from_config, rope_to_config

_HEADS = Heads("Phi3Model", "Phi3ForCausalLM", "Phi3ForSequenceClassification", "Phi3ForTokenClassification")


def _to_config(values: Mapping[str, Any]) -> dict[str, Any]:
    rate = values["resid_pdrop"]
    return {
        **shared.llama_to_config(values, _HEADS),
        **rope_to_config("phi3", values, shared.key_dim(values)),
        "window": values["sliding_window"],
        "dropout": rate,
        "embedding_dropout": 0.0 if rate else None,
    }


def _from_config(config: ModelConfig) -> dict[str, Any]:
    part = config.rotary_dim / config.key_dim
    while int(config.key_dim * part) < config.rotary_dim:  # the quotient was rounded down
        part = math.nextafter(part, math.inf)
    return {
        **shared.llama_from_config(config, "phi3", _HEADS),
        **rope_from_config(config),
        "partial_rotary_factor": part,
        "original_max_position_embeddings": config.context_length,
        "sliding_window": config.window,
        "resid_pdrop": config.dropout,
    }


FAMILY = Family(
    model_type="phi3",
    fields={
        **shared.llama_fields(_HEADS, eps=1e-5),
        **rope_fields(("default",), partial=True),
        "sliding_window": Field(int, default=None, nullable=True, minimum=1),
        "resid_pdrop": Field(float, default=0.0),
        "attention_bias": only(False, None),
    },
    # the library reads embd_pdrop and applies it nowhere
    without_effect=frozenset(["embd_pdrop"]),
    to_config=_to_config,
    from_config=_from_config,
    names=(
        *shared.OUTER,
        *shared.PRE_NORMS,
        Name(
            THEIRS + "self_attn.qkv_proj.weight",
            tuple(f"{OURS}attention.{part}.weight" for part in ("query", "key", "value")),
        ),
        Name(THEIRS + "self_attn.o_proj.weight", OURS + "attention.output.weight"),
        Name(THEIRS + "mlp.gate_up_proj.weight", tuple(f"{OURS}feedforward.{part}.weight" for part in ("gate", "up"))),
        Name(THEIRS + "mlp.down_proj.weight", OURS + "feedforward.down.weight"),
        *_HEADS.names(),
    ),
    prefixes=(shared.PREFIX,),
    body_prefix=shared.PREFIX,
    copies=shared.COPIES,
    left_out=shared.LEFT_OUT,
    buffers=shared.BUFFERS,
)
