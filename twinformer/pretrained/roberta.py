"""RoBERTa (Liu et al. 2019, arXiv:1907.11692) as ``transformers`` publishes it: ``RobertaModel`` and its heads.

As BERT, with one token type, positions counted from ``pad_token_id + 1`` over real tokens, and heads of other names:
that of masked tokens has the erf GELU whatever the blocks have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twinformer.config import ModelConfig
from twinformer.errors import ConfigError, Problems
from twinformer.pretrained import bert
from twinformer.pretrained.family import Family, Field, Name


def _to_config(values: Mapping[str, Any]) -> dict[str, Any]:
    problems = Problems("roberta", ConfigError)
    rows, offset = values["max_position_embeddings"], values["pad_token_id"] + 1
    problems.expect(
        rows > offset, f"max_position_embeddings: expected more than pad_token_id + 1 = {offset}, got {rows}"
    )
    found = bert.FAMILY.to_config({**values, "max_position_embeddings": max(rows - offset, 1), "architectures": None})
    found |= bert.head_of("Roberta", values) | {"position_offset": offset, "position_counting": "real"}
    if found["head"] in ("tied", "untied"):
        activation = values["hidden_act"]
        problems.expect(
            found["activation"] == "gelu",
            f"hidden_act: expected 'gelu' with a head of masked tokens, which has it always, got {activation!r}",
        )
    problems.raise_if_any()
    return found


def _from_config(config: ModelConfig) -> dict[str, Any]:
    return bert.FAMILY.from_config(config) | {
        "model_type": "roberta",
        "max_position_embeddings": config.context_length + config.position_offset,
        "pad_token_id": config.position_offset - 1,
        "bos_token_id": None,
        "eos_token_id": None,
        **bert.class_of("Roberta", config),
    }


_BODY = tuple(name for name in bert.FAMILY.names if name.published.startswith(("embeddings.", "encoder.")))

FAMILY = Family(
    model_type="roberta",
    fields={**bert.FAMILY.fields, "pad_token_id": Field(int, default=1, minimum=0)},
    without_effect=bert.FAMILY.without_effect,
    to_config=_to_config,
    from_config=_from_config,
    names=(
        *_BODY,
        *bert.pair("lm_head.dense", "head.transform", beside=True),
        *bert.pair("lm_head.layer_norm", "head.norm", beside=True),
        Name("lm_head.bias", "head.bias", heads=("tied", "untied"), beside=True),
        Name("lm_head.decoder.weight", "head.weight", heads=("untied",), beside=True),
        *bert.pair("classifier.dense", "head.pooler", beside=True),
        *bert.pair("classifier.out_proj", "head", heads=("sequence",), beside=True),
        *bert.pair("classifier", "head", heads=("tokens",), beside=True),
    ),
    prefixes=("roberta.",),
    body_prefix="roberta.",
    old_endings=bert.OLD_ENDINGS,
    counting_buffers=bert.FAMILY.counting_buffers,
    copies={"lm_head.decoder.weight": "embeddings.word_embeddings.weight", "lm_head.decoder.bias": "lm_head.bias"},
    left_out=("pooler.", "lm_head.", "classifier."),
)
