"""Marian (Junczys-Dowmunt et al. 2018, arXiv:1804.00344; the OPUS-MT models) as ``transformers`` publishes it:
``MarianMTModel``.

As BART, without a norm over the embeddings, and with sinusoids: all sines first, then all cosines. The two sides share
one table of tokens, or have one each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from twinformer.config import ModelConfig
from twinformer.errors import ConfigError
from twinformer.pretrained import bart_like
from twinformer.pretrained.family import Array, Family, Field, Name, only

_CLASSES = ("MarianMTModel",)


def _to_config(values: Mapping[str, Any]) -> dict[str, Any]:
    source, target = values["vocab_size"], values["decoder_vocab_size"]
    target = source if target is None else target
    is_shared = values["share_encoder_decoder_embeddings"]
    if is_shared and target != source:
        wanted = (
            f"decoder_vocab_size: expected vocab_size={source} where the sides share their embeddings, got {target}"
        )
        raise ConfigError("marian", [wanted])
    return bart_like.to_config("marian", values) | {
        "vocab_size": target,
        "source_vocab_size": source,
        "share_embeddings": is_shared,
        "positions": "sinusoidal",
        "sinusoid_layout": "halves",
    }


def _from_config(config: ModelConfig) -> dict[str, Any]:
    return bart_like.from_config(config, "marian", _CLASSES[0]) | {
        "vocab_size": config.source_vocab_size,
        "decoder_vocab_size": config.vocab_size,
        "share_encoder_decoder_embeddings": config.share_embeddings,
    }


def _sinusoids(config: ModelConfig) -> Array:
    """The table that older files hold: ``[N, D]``."""
    N, D = config.context_length, config.model_dim
    angles = np.arange(N)[:, None] / np.power(10000.0, 2 * np.arange((D + 1) // 2) / D)
    return np.concatenate([np.sin(angles), np.cos(angles)], 1)[:, :D].astype(np.float32)


class _Marian(Family):
    """The table of tokens is called otherwise where each side has its own."""

    def expected(self, config: ModelConfig) -> dict[str, Name]:
        return (_SHARED if config.share_embeddings else _APART).expected(config)


_TABLES = {"encoder": "source_embedding.tokens.weight", "decoder": "target_embedding.tokens.weight"}
_ONE = (Name("model.shared.weight", "source_embedding.tokens.weight"),)
_TWO = tuple(Name(f"model.{side}.embed_tokens.weight", ours) for side, ours in _TABLES.items())
_REST: dict[str, Any] = {
    "fields": {
        **bart_like.fields(_CLASSES),
        "decoder_vocab_size": Field(int, default=None, nullable=True, minimum=1),
        "share_encoder_decoder_embeddings": Field(bool, default=True),
        "normalize_embedding": only(False),
        "static_position_embeddings": only(True),
    },
    "without_effect": bart_like.WITHOUT_EFFECT,
    "to_config": _to_config,
    "from_config": _from_config,
    # the sinusoids, which older files hold as weights
    "left_out": ("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"),
}
_SHARED = Family(model_type="marian", names=(*_ONE, *bart_like.names()), **_REST)
_APART = Family(model_type="marian", names=(*_TWO, *bart_like.names()), **_REST)

FAMILY = _Marian(
    model_type="marian",
    names=_SHARED.names,
    copies={**bart_like.COPIES, "lm_head.weight": "model.shared.weight"},
    buffers={"embed_positions.weight": _sinusoids},
    **_REST,
)
