"""The parameters that a configuration calls for: path, shape and kind, in PyTorch's orientation.

This is the contract's side of rung 0: both twins must hold exactly these leaves. The path of a parameter
is the path of attributes that leads to it, the same in both twins and on disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from twinformer.config import ModelConfig, StackConfig

Kind = Literal["linear", "bias", "norm", "embedding"]


@dataclass(frozen=True)
class Parameter:
    """One leaf: its shape as stored (Linear weights are ``[out, in]``) and what it is.

    ``residual`` marks the matrices whose product is added to the residual stream (attention output and
    feed-forward down), which some initialisers make smaller.
    """

    shape: tuple[int, ...]
    kind: Kind
    residual: bool = False


def model_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Every parameter of the model, by path, in reading order."""
    found: dict[str, Parameter] = {}
    if config.architecture == "encoder-decoder":
        found |= _embeddings("source_embedding", config, config.source_vocab_size)
        found |= stack_parameters(config, config.num_encoder_layers, cross_attention=False, prefix="encoder.")
        target_vocabulary = 0 if config.share_embeddings else config.vocab_size
        found |= _embeddings("target_embedding", config, target_vocabulary)
        found |= stack_parameters(config, config.num_layers, cross_attention=True, prefix="decoder.")
    else:
        found |= _embeddings("embedding", config, config.vocab_size)
        found |= stack_parameters(config, config.num_layers, cross_attention=False, prefix="stack.")
    found |= _head("head", config)
    return found


def stack_parameters(
    config: StackConfig, num_layers: int, *, cross_attention: bool, prefix: str = ""
) -> dict[str, Parameter]:
    """Every parameter of one ``TransformerStack``, causal or not."""
    found: dict[str, Parameter] = {}
    if config.positions == "relative":
        found[f"{prefix}relative_bias.weight"] = Parameter((config.relative_buckets, config.num_heads), "embedding")
    for layer in range(num_layers):
        found |= block_parameters(config, cross_attention=cross_attention, prefix=f"{prefix}blocks.{layer}.")
    if config.final_norm:
        found |= _norm(f"{prefix}final_norm", config, config.model_dim)
    return found


def block_parameters(config: StackConfig, *, cross_attention: bool, prefix: str = "") -> dict[str, Parameter]:
    """Every parameter of one ``Block``."""
    branches = {"attention": attention_parameters(config, prefix=f"{prefix}attention.")}
    if cross_attention:
        branches["cross_attention"] = attention_parameters(config, prefix=f"{prefix}cross_attention.")
    branches["feedforward"] = feedforward_parameters(config, prefix=f"{prefix}feedforward.")
    found: dict[str, Parameter] = {}
    for name, own in branches.items():
        found |= _norm(f"{prefix}{name}_norm", config, config.model_dim)
        found |= own
        if config.norm_placement == "sandwich":
            found |= _norm(f"{prefix}{name}_post_norm", config, config.model_dim)
    return found


def attention_parameters(config: StackConfig, *, prefix: str = "") -> dict[str, Parameter]:
    """Every parameter of one ``AttentionLayer``."""
    D, A, G, K, J = config.model_dim, config.num_heads, config.num_kv_heads, config.key_dim, config.value_dim
    found = _linear(f"{prefix}query", D, A * K, config.qkv_bias)
    found |= _linear(f"{prefix}key", D, G * K, config.qkv_bias)
    found |= _linear(f"{prefix}value", D, G * J, config.qkv_bias)
    found |= _linear(f"{prefix}output", A * J, D, config.output_bias, residual=True)
    if config.qk_norm != "none":
        bias = config.qk_norm == "layernorm" and config.norm_bias
        for name in ("query_norm", "key_norm"):
            found[f"{prefix}{name}.weight"] = Parameter((K,), "norm")
            if bias:
                found[f"{prefix}{name}.bias"] = Parameter((K,), "bias")
    return found


def feedforward_parameters(config: StackConfig, *, prefix: str = "") -> dict[str, Parameter]:
    """Every parameter of one ``FeedForward``."""
    D, F, bias = config.model_dim, config.hidden_dim, config.feedforward_bias
    found = _linear(f"{prefix}up", D, F, bias)
    if config.gated:
        found |= _linear(f"{prefix}gate", D, F, bias)
    return found | _linear(f"{prefix}down", F, D, bias, residual=True)


def _linear(path: str, inputs: int, outputs: int, bias: bool, residual: bool = False) -> dict[str, Parameter]:
    found = {f"{path}.weight": Parameter((outputs, inputs), "linear", residual)}
    if bias:
        found[f"{path}.bias"] = Parameter((outputs,), "bias")
    return found


def _norm(path: str, config: StackConfig, width: int) -> dict[str, Parameter]:
    found = {f"{path}.weight": Parameter((width,), "norm")}
    if config.norm_bias:
        found[f"{path}.bias"] = Parameter((width,), "bias")
    return found


def _embeddings(path: str, config: ModelConfig, vocabulary: int) -> dict[str, Parameter]:
    """``vocabulary`` 0: the token table belongs to somebody else."""
    D = config.model_dim
    found: dict[str, Parameter] = {}
    if vocabulary:
        found[f"{path}.tokens.weight"] = Parameter((vocabulary, D), "embedding")
    if config.positions == "learned":
        rows = config.context_length + config.position_offset
        found[f"{path}.positions.weight"] = Parameter((rows, D), "embedding")
    if config.num_token_types:
        found[f"{path}.token_types.weight"] = Parameter((config.num_token_types, D), "embedding")
    if config.embedding_norm:
        found |= _norm(f"{path}.norm", config, D)
    return found


def _head(path: str, config: ModelConfig) -> dict[str, Parameter]:
    """What the head owns; a tied one without bias and transform owns nothing."""
    D = config.model_dim
    found: dict[str, Parameter] = {}
    if config.head_transform:
        found |= _linear(f"{path}.transform", D, D, True)
        found |= _norm(f"{path}.norm", config, D)
    if config.pooler != "none":
        found |= _linear(f"{path}.pooler", D, D, True)
    rows = config.num_labels or config.vocab_size
    if config.head in ("untied", "sequence", "tokens"):
        found[f"{path}.weight"] = Parameter((rows, D), "linear")
    if config.head_bias:
        found[f"{path}.bias"] = Parameter((rows,), "bias")
    return found
