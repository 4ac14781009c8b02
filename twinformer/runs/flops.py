"""How much arithmetic a training step is, counted by hand: matrix products only, two operations a multiply-add.

A training step is three forward passes (the backward pass is two). Attention of a decoder counts the pairs that it may
see, half of the square; lookups in embedding tables count nothing, the head counts although its table may be tied.
What is counted is what is computed: padding is not left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twinformer.config import ModelConfig


def training_flops(config: ModelConfig, inputs: Mapping[str, Any]) -> int:
    """Of one batch: ``inputs`` as the model is called, of which only shapes are read."""
    return 3 * forward_flops(config, inputs)


def forward_flops(config: ModelConfig, inputs: Mapping[str, Any]) -> int:
    """One forward pass of a whole model."""
    if config.architecture == "encoder-decoder":
        (B, S), T = _shape(inputs["source"]), _shape(inputs["target"])[1]
        encoder = config.num_encoder_layers * (_attention(config, B, S, S, S * S) + _feedforward(config, B * S))
        crossing = _attention(config, B, T, S, T * S)
        decoder = config.num_layers * (
            _attention(config, B, T, T, T * (T + 1) // 2) + crossing + _feedforward(config, B * T)
        )
        return encoder + decoder + _head(config, B, T)
    B, T = _shape(inputs["tokens"])
    pairs = T * (T + 1) // 2 if config.architecture == "decoder" else T * T
    blocks = config.num_layers * (_attention(config, B, T, T, pairs) + _feedforward(config, B * T))
    return blocks + _head(config, B, T)


def _shape(tokens: Any) -> tuple[int, int]:
    B, T = tokens.shape
    return B, T


def _attention(config: ModelConfig, B: int, T: int, S: int, pairs: int) -> int:
    D, A, G, K, J = config.model_dim, config.num_heads, config.num_kv_heads, config.key_dim, config.value_dim
    on_queries = 2 * B * T * D * A * (K + J)
    on_keys = 2 * B * S * D * G * (K + J)
    return on_queries + on_keys + 2 * B * A * (K + J) * pairs


def _feedforward(config: ModelConfig, tokens: int) -> int:
    return 2 * tokens * config.model_dim * config.hidden_dim * (3 if config.gated else 2)


def _head(config: ModelConfig, B: int, T: int) -> int:
    """Its matrices: of the transform on every token, the pooler on every row, and the scores of tokens or labels."""
    D, vector = config.model_dim, config.head in ("pooled", "sequence")
    scores = 0 if config.head in ("none", "pooled") else config.num_labels or config.vocab_size
    squares = D * D * (config.head_transform + (config.pooler != "none"))
    return 2 * (B if vector else B * T) * (squares + D * scores)
