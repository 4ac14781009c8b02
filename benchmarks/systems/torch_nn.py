"""PyTorch's own layers, put together as its documentation does: ``torch.nn.TransformerEncoder`` and ``…Decoder``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cases import Arrays, Case
from benchmarks.systems.torch_work import Call, Step, tensors
from twinformer.config import ModelConfig


def make(case: Case, weights: Arrays, variant: str) -> Any:
    model = Model(case.config)
    fill(model, case.config, weights)
    inputs = tensors(case.inputs())
    if case.kind == "train":
        model.train()
        return Step(case, lambda: model(**inputs), model.parameters(), fused=variant == "fused")
    model.eval()
    return Call(lambda: model(**inputs))


class Embedding(nn.Module):
    """Token and position, then the norm where there is one."""

    def __init__(self, config: ModelConfig, tokens: nn.Embedding) -> None:
        super().__init__()
        self.offset = config.position_offset
        self.tokens = tokens
        self.positions = nn.Embedding(config.context_length + config.position_offset, config.model_dim)
        self.norm = nn.LayerNorm(config.model_dim, eps=config.norm_eps) if config.embedding_norm else nn.Identity()

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1]) + self.offset
        found: Tensor = self.norm(self.tokens(ids) + self.positions(places))
        return found


class Model(nn.Module):
    """An encoder, a decoder without cross-attention, or both stacks; logits by the table of tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        choices: dict[str, Any] = {
            "d_model": config.model_dim,
            "nhead": config.num_heads,
            "dim_feedforward": config.hidden_dim,
            "dropout": 0.0,
            "activation": config.activation,
            "layer_norm_eps": config.norm_eps,
            "batch_first": True,
            "norm_first": config.norm_placement == "pre",
        }
        self.config = config
        table = nn.Embedding(config.vocab_size, config.model_dim)
        self.embedding = Embedding(config, table)
        two = config.architecture == "encoder-decoder"
        final = nn.LayerNorm(config.model_dim, eps=config.norm_eps) if config.final_norm else None
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**choices),
            config.num_encoder_layers if two else config.num_layers,
            norm=final,
            enable_nested_tensor=False,
        )
        self.target_embedding = Embedding(config, table) if two else None
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**choices), config.num_layers) if two else None

    def forward(
        self, tokens: Tensor | None = None, source: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        is_causal = self.config.architecture == "decoder"
        ids = source if tokens is None else tokens
        assert ids is not None
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1]) if is_causal else None
        h = self.encoder(self.embedding(ids), mask=mask, is_causal=is_causal)
        if self.decoder is not None and self.target_embedding is not None:
            assert target is not None
            mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
            h = self.decoder(self.target_embedding(target), h, tgt_mask=mask, tgt_is_causal=True)
        logits: Tensor = h @ self.embedding.tokens.weight.T
        return logits


def fill(model: Model, config: ModelConfig, weights: Arrays) -> None:
    """Our weights by path into PyTorch's layers; every leaf is used once."""
    left = dict(weights)
    state: dict[str, Any] = {}
    two = config.architecture == "encoder-decoder"

    def put(theirs: str, *ours: str) -> None:
        state[theirs] = torch.from_numpy(np.concatenate([left.pop(path) for path in ours]))

    stacks = [("encoder", "encoder", "source_embedding", "embedding")] if two else []
    stacks += [("decoder", "decoder", "target_embedding", "target_embedding")] if two else []
    for ours, theirs, embedded, embedding in stacks or [("stack", "encoder", "embedding", "embedding")]:
        if f"{embedded}.tokens.weight" in left:
            put("embedding.tokens.weight", f"{embedded}.tokens.weight")
        put(f"{embedding}.positions.weight", f"{embedded}.positions.weight")
        for leaf in ("weight", "bias"):
            if config.embedding_norm:
                put(f"{embedding}.norm.{leaf}", f"{embedded}.norm.{leaf}")
            if config.final_norm:
                put(f"{theirs}.norm.{leaf}", f"{ours}.final_norm.{leaf}")
        count = config.num_encoder_layers if ours == "encoder" else config.num_layers
        for layer in range(count):
            _fill_layer(put, f"{ours}.blocks.{layer}.", f"{theirs}.layers.{layer}.", crossing=ours == "decoder")
    if two:
        state["target_embedding.tokens.weight"] = state["embedding.tokens.weight"]
    assert not left, f"expected every weight to be used, left: {sorted(left)}"
    model.load_state_dict(state, strict=True)


def _fill_layer(put: Any, ours: str, theirs: str, *, crossing: bool) -> None:
    parts = [("attention", "self_attn"), *([("cross_attention", "multihead_attn")] if crossing else [])]
    norms = ["attention_norm", *(["cross_attention_norm"] if crossing else []), "feedforward_norm"]
    for leaf in ("weight", "bias"):
        for mine, layer in parts:
            put(
                f"{theirs}{layer}.in_proj_{leaf}",
                *(f"{ours}{mine}.{name}.{leaf}" for name in ("query", "key", "value")),
            )
            put(f"{theirs}{layer}.out_proj.{leaf}", f"{ours}{mine}.output.{leaf}")
        put(f"{theirs}linear1.{leaf}", f"{ours}feedforward.up.{leaf}")
        put(f"{theirs}linear2.{leaf}", f"{ours}feedforward.down.{leaf}")
        for number, norm in enumerate(norms, start=1):
            put(f"{theirs}norm{number}.{leaf}", f"{ours}{norm}.{leaf}")
