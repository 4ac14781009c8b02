"""BART (Lewis et al. 2020, arXiv:1910.13461) as ``transformers`` publishes it: ``BartForConditionalGeneration``.

Post-norm stacks; learned positions counted from 2; a norm over the embeddings of each side; one table of tokens, tied
to the head, whose logits have a bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twinformer.config import ModelConfig
from twinformer.pretrained import bart_like
from twinformer.pretrained.family import Family, Name, only

_CLASSES = ("BartForConditionalGeneration",)
#: rows of the table of positions that nothing reads
OFFSET = 2


def _to_config(values: Mapping[str, Any]) -> dict[str, Any]:
    return bart_like.to_config("bart", values) | {
        "positions": "learned",
        "position_offset": OFFSET,
        "embedding_norm": True,
    }


def _from_config(config: ModelConfig) -> dict[str, Any]:
    return bart_like.from_config(config, "bart", _CLASSES[0])


_SIDES = {"encoder": "source_embedding", "decoder": "target_embedding"}

#: the tensors, of mBART too
NAMES = (
    Name("model.shared.weight", "source_embedding.tokens.weight"),
    *(Name(f"model.{side}.embed_positions.weight", f"{ours}.positions.weight") for side, ours in _SIDES.items()),
    *(
        Name(f"model.{side}.layernorm_embedding.{leaf}", f"{ours}.norm.{leaf}")
        for side, ours in _SIDES.items()
        for leaf in ("weight", "bias")
    ),
    *bart_like.names(),
)

FAMILY = Family(
    model_type="bart",
    fields={
        **bart_like.fields(_CLASSES),
        "normalize_embedding": only(True),
        "static_position_embeddings": only(False),
    },
    without_effect=bart_like.WITHOUT_EFFECT,
    to_config=_to_config,
    from_config=_from_config,
    names=NAMES,
    copies=bart_like.COPIES,
)
