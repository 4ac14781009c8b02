"""mBART (Liu et al. 2020, arXiv:2001.08210; Tang et al. 2020, arXiv:2008.00401) as ``transformers`` publishes it:
``MBartForConditionalGeneration``.

As BART, but with the norms before the branches and one after each stack; that over the embeddings stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twinformer.config import ModelConfig
from twinformer.pretrained import bart, bart_like
from twinformer.pretrained.family import Family, only

_CLASSES = ("MBartForConditionalGeneration",)


def _to_config(values: Mapping[str, Any]) -> dict[str, Any]:
    return bart_like.to_config("mbart", values) | {
        "norm_placement": "pre",
        "final_norm": True,
        "positions": "learned",
        "position_offset": bart.OFFSET,
        "embedding_norm": True,
    }


def _from_config(config: ModelConfig) -> dict[str, Any]:
    return bart_like.from_config(config, "mbart", _CLASSES[0])


FAMILY = Family(
    model_type="mbart",
    fields={
        **bart_like.fields(_CLASSES),
        "add_final_layer_norm": only(True),
        "normalize_before": only(True),
        "normalize_embedding": only(True),
        "static_position_embeddings": only(False),
    },
    without_effect=bart_like.WITHOUT_EFFECT | {"output_past"},
    to_config=_to_config,
    from_config=_from_config,
    names=bart.NAMES,
    copies=bart_like.COPIES,
)
