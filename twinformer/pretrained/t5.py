"""T5 (Raffel et al. 2020, arXiv:1910.10683) as ``transformers`` publishes it: ``T5ForConditionalGeneration``.

Pre-norm blocks with RMSNorm and no biases at all; relative positions, counted over all places of a row, with a table
for each stack, held by its first block; scores are not scaled; one table of tokens. Version 1.0 has ReLU and a tied
head whose states are multiplied by ``D^-0.5``; version 1.1 (and Flan) a gated GELU and a head of its own, unscaled.
Which head it is the tensors tell: one that differs from the table of tokens is its own, whatever config.json says, as
the library has it.

Its dropout of the last states of each stack has no place in our model: it matters in training only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from twinformer.config import Activation, ModelConfig
from twinformer.errors import ConfigError
from twinformer.pretrained.family import Family, Field, Name, one_of, only
from twinformer.pretrained.files import Stored

#: how a file says which activation, with or without a gate
_PROJECTIONS: dict[str, tuple[Activation, bool]] = {
    "relu": ("relu", False),
    "gated-gelu": ("gelu_tanh", True),  # what older files call so is the tanh form
    "gated-gelu_new": ("gelu_tanh", True),
    "gelu_new": ("gelu_tanh", False),
    "gelu": ("gelu", False),
    "gated-relu": ("relu", True),
    "silu": ("silu", False),
    "gated-silu": ("silu", True),
}
_CLASSES = ("T5ForConditionalGeneration", "T5WithLMHeadModel")


def to_config(subject: str, values: Mapping[str, Any]) -> dict[str, Any]:
    activation, gated = _PROJECTIONS[values["feed_forward_proj"]]
    is_tied, scaled = values["tie_word_embeddings"], values["scale_decoder_outputs"]
    scaled = is_tied if scaled is None else scaled
    D, rate, layers = values["d_model"], values["dropout_rate"], values["num_layers"]
    if values["relative_attention_num_buckets"] % 4:
        got = values["relative_attention_num_buckets"]
        raise ConfigError(subject, [f"relative_attention_num_buckets: expected a multiple of 4, got {got}"])
    return {
        "architecture": "encoder-decoder",
        "vocab_size": values["vocab_size"],
        "context_length": values["n_positions"],
        "model_dim": D,
        "key_dim": values["d_kv"],
        "hidden_dim": values["d_ff"],
        "num_heads": values["num_heads"],
        "num_encoder_layers": layers,
        "num_layers": layers if values["num_decoder_layers"] is None else values["num_decoder_layers"],
        "norm": "rmsnorm",
        "norm_bias": False,
        "norm_eps": values["layer_norm_epsilon"],
        "norm_cast": "before_weight",
        "activation": activation,
        "gated": gated,
        "feedforward_bias": False,
        "attention_scale": 1.0,
        "positions": "relative",
        "position_counting": "places",
        "relative_buckets": values["relative_attention_num_buckets"],
        "relative_max_distance": values["relative_attention_max_distance"],
        "share_embeddings": True,
        "dropout": rate,
        "attention_dropout": rate,
        "hidden_dropout": rate,
        "head": "tied" if is_tied else "untied",
        "head_scale": D**-0.5 if scaled else None,
    }


def from_config(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    asked = (config.activation, config.gated)
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "d_model": config.model_dim,
        "d_kv": config.key_dim,
        "d_ff": config.hidden_dim,
        "num_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_layers,
        "layer_norm_epsilon": config.norm_eps,
        "feed_forward_proj": next((name for name, have in _PROJECTIONS.items() if have == asked), "none"),
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "dropout_rate": config.dropout,
        "initializer_factor": 1.0,
        "tie_word_embeddings": config.head == "tied",
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
        "eos_token_id": None,
    }


# what follows from feed_forward_proj, tasks of the published models, and labels that we have no head for
_WITHOUT_EFFECT = """
classifier_dropout decoder_start_token_id dense_act_fn initializer_factor is_gated_act output_past
"""
WITHOUT_EFFECT = frozenset(_WITHOUT_EFFECT.split())


def _block(theirs: str, ours: str, feedforward: int) -> tuple[Name, ...]:
    """A block of either stack; ``feedforward`` is the number of its last sub-layer."""
    attention, last = f"{theirs}layer.0.", f"{theirs}layer.{feedforward}."
    names = [
        *_attention(f"{attention}SelfAttention.", f"{ours}attention."),
        Name(f"{attention}layer_norm.weight", f"{ours}attention_norm.weight"),
        Name(f"{last}layer_norm.weight", f"{ours}feedforward_norm.weight"),
        Name(f"{last}DenseReluDense.wo.weight", f"{ours}feedforward.down.weight"),
    ]
    if feedforward == 2:
        names += [
            *_attention(f"{theirs}layer.1.EncDecAttention.", f"{ours}cross_attention."),
            Name(f"{theirs}layer.1.layer_norm.weight", f"{ours}cross_attention_norm.weight"),
        ]
    return tuple(names)


def _attention(theirs: str, ours: str) -> tuple[Name, ...]:
    parts = {"q": "query", "k": "key", "v": "value", "o": "output"}
    return tuple(Name(f"{theirs}{short}.weight", f"{ours}{name}.weight") for short, name in parts.items())


class T5Like(Family):
    """Its input matrix has one name without a gate and two with one; its tensors tell whether its head is its own."""

    def expected(self, config: ModelConfig) -> dict[str, Name]:
        return Family.expected(dataclasses.replace(self, names=names(config.gated)), config)

    def settled(self, config: ModelConfig, tensors: Mapping[str, Stored]) -> ModelConfig:
        head, table = tensors.get("lm_head.weight"), tensors.get("shared.weight")
        if config.head != "tied" or head is None or table is None:
            return config
        same_kind = (head.dtype, head.shape) == (table.dtype, table.shape)
        if not same_kind or head.read().tobytes() == table.read().tobytes():
            return config
        return config.replace(head="untied")


def names(gated: bool) -> tuple[Name, ...]:
    """Every tensor, with or without a gate."""
    found: list[Name] = [Name("shared.weight", "source_embedding.tokens.weight")]
    for side, layer, last in (("encoder", "{encoder_layer}", 1), ("decoder", "{layer}", 2)):
        theirs, ours = f"{side}.block.{layer}.", f"{side}.blocks.{layer}."
        feed = f"{theirs}layer.{last}.DenseReluDense."
        table = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        found += [
            Name(table, f"{side}.relative_bias.weight"),
            *_block(theirs, ours, last),
            Name(f"{side}.final_layer_norm.weight", f"{side}.final_norm.weight"),
        ]
        if gated:
            found += [
                Name(f"{feed}wi_0.weight", f"{ours}feedforward.gate.weight"),
                Name(f"{feed}wi_1.weight", f"{ours}feedforward.up.weight"),
            ]
        else:
            found += [Name(f"{feed}wi.weight", f"{ours}feedforward.up.weight")]
    return (*found, Name("lm_head.weight", "head.weight", heads=("untied",)))


def fields(classes: tuple[str, ...], projection: str) -> dict[str, Field]:
    """The fields of T5 and mT5; ``classes`` are those that are read, ``projection`` what an absent one means."""

    def check(names: Any) -> str | None:
        good = len(names) == 1 and names[0] in classes
        return None if good else f"expected a list with {one_of(classes)}, got {names!r}"

    sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    return {
        **{name: Field(int, minimum=1) for name in sizes},
        "num_decoder_layers": Field(int, default=None, nullable=True, minimum=1),
        "n_positions": Field(int, default=512, minimum=1),
        "relative_attention_num_buckets": Field(int, default=32, minimum=4),
        "relative_attention_max_distance": Field(int, default=128, minimum=1),
        "dropout_rate": Field(float, default=0.1),
        "layer_norm_epsilon": Field(float, default=1e-6),
        "feed_forward_proj": Field(str, default=projection, allowed=tuple(_PROJECTIONS)),
        "tie_word_embeddings": Field(bool, default=True),
        "architectures": Field(list, default=None, nullable=True, check=check),
        "is_encoder_decoder": only(True),
        "is_decoder": only(False),
        "pruned_heads": only({}, None),
        "quantization_config": only(None),
    }


def _to_config(values: Mapping[str, Any]) -> dict[str, Any]:
    return to_config("t5", values)


def _from_config(config: ModelConfig) -> dict[str, Any]:
    return from_config(config, "t5", _CLASSES[0]) | {"scale_decoder_outputs": config.head_scale is not None}


#: what repeats the one table of tokens
COPIES = {
    "encoder.embed_tokens.weight": "shared.weight",
    "decoder.embed_tokens.weight": "shared.weight",
    "lm_head.weight": "shared.weight",
}
#: a table that old files hold and nothing reads: cross-attention has no positions
LEFT_OUT = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)

FAMILY = T5Like(
    model_type="t5",
    fields=fields(_CLASSES, "relu") | {"scale_decoder_outputs": Field(bool, default=None, nullable=True)},
    without_effect=WITHOUT_EFFECT,
    to_config=_to_config,
    from_config=_from_config,
    names=names(False),
    copies=COPIES,
    left_out=LEFT_OUT,
)
