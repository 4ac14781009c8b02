"""mT5 (Xue et al. 2021, arXiv:2010.11934) as ``transformers`` publishes it: ``MT5ForConditionalGeneration``.

As T5 1.1; its logits are never scaled, be its head its own, as published, or tied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twinformer.config import ModelConfig
from twinformer.pretrained import t5

_CLASSES = ("MT5ForConditionalGeneration",)


def _to_config(values: Mapping[str, Any]) -> dict[str, Any]:
    return t5.to_config("mt5", {**values, "scale_decoder_outputs": False})


def _from_config(config: ModelConfig) -> dict[str, Any]:
    return t5.from_config(config, "mt5", _CLASSES[0])


FAMILY = t5.T5Like(
    model_type="mt5",
    fields=t5.fields(_CLASSES, "gated-gelu"),
    without_effect=t5.WITHOUT_EFFECT,
    to_config=_to_config,
    from_config=_from_config,
    names=t5.names(True),
    copies=t5.COPIES,
    left_out=t5.LEFT_OUT,
)
