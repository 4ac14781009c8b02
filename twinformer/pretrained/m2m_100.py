"""M2M-100 (Fan et al. 2020, arXiv:2010.11125) and NLLB-200 (arXiv:2207.04672) as ``transformers`` publishes them:
``M2M100ForConditionalGeneration``.

Norms before the branches and one after each stack; sinusoids as tensor2tensor has them, all sines first, counted from
``pad_token_id + 1`` over real tokens; embeddings scaled; a tied head without a bias. NLLB's mixtures of experts are
another family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twinformer.config import ModelConfig
from twinformer.errors import ConfigError
from twinformer.pretrained import bart_like
from twinformer.pretrained.activations import ACTIVATIONS
from twinformer.pretrained.family import Family, Field, Name, only

_CLASSES = ("M2M100ForConditionalGeneration",)


def _to_config(values: Mapping[str, Any]) -> dict[str, Any]:
    D = values["d_model"]
    if D % 2 or D < 4:
        # an odd one ends with a column of zeros there, and two columns have no frequencies between the ends
        raise ConfigError("m2m_100", [f"d_model: expected an even number from 4, got {D}"])
    return bart_like.to_config("m2m_100", values) | {
        "norm_placement": "pre",
        "final_norm": True,
        "positions": "sinusoidal",
        "sinusoid_layout": "halves",
        "sinusoid_spacing": "endpoint",
        "position_counting": "real",
        "position_offset": values["pad_token_id"] + 1,
        "head_bias": False,
    }


def _from_config(config: ModelConfig) -> dict[str, Any]:
    return bart_like.from_config(config, "m2m_100", _CLASSES[0]) | {"pad_token_id": config.position_offset - 1}


FAMILY = Family(
    model_type="m2m_100",
    fields={
        **bart_like.fields(_CLASSES),
        "activation_function": Field(str, default="relu", allowed=tuple(ACTIVATIONS)),
        "attention_dropout": Field(float, default=0.1),
        "scale_embedding": Field(bool, default=True),
        "pad_token_id": Field(int, default=1, minimum=0),
        "add_final_layer_norm": only(True),
        "normalize_before": only(True),
        "normalize_embedding": only(False),
        "static_position_embeddings": only(True),
    },
    without_effect=bart_like.WITHOUT_EFFECT,
    to_config=_to_config,
    from_config=_from_config,
    names=(Name("model.shared.weight", "source_embedding.tokens.weight"), *bart_like.names()),
    copies=bart_like.COPIES,
)
