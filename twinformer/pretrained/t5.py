"""T5 (Raffel et al. 2020, arXiv:1910.10683) as ``transformers`` publishes it: ``T5ForConditionalGeneration``.

Pre-norm blocks with RMSNorm and no biases at all; relative positions, counted over all places of a row, with a table
for each stack, held by its first block; scores are not scaled; one table of tokens. Version 1.0 has ReLU and a tied
head whose states are multiplied by ``D^-0.5``; version 1.1 (and Flan) a gated GELU and a head of its own, unscaled.

Its dropout of the last states of each stack has no place in our model: it matters in training only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twinformer.config import Activation, ModelConfig
from twinformer.errors import ConfigError
from twinformer.pretrained.family import Family, Field, Name, one_of, only

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


def _check_classes(names: Any) -> str | None:
    good = len(names) == 1 and names[0] in _CLASSES
    return None if good else f"expected a list with {one_of(_CLASSES)}, got {names!r}"


def _to_config(values: Mapping[str, Any]) -> dict[str, Any]:
    activation, gated = _PROJECTIONS[values["feed_forward_proj"]]
    is_tied, scaled = values["tie_word_embeddings"], values["scale_decoder_outputs"]
    scaled = is_tied if scaled is None else scaled
    D, rate, layers = values["d_model"], values["dropout_rate"], values["num_layers"]
    if values["relative_attention_num_buckets"] % 4:
        got = values["relative_attention_num_buckets"]
        raise ConfigError("t5", [f"relative_attention_num_buckets: expected a multiple of 4, got {got}"])
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


def _from_config(config: ModelConfig) -> dict[str, Any]:
    asked = (config.activation, config.gated)
    return {
        "architectures": [_CLASSES[0]],
        "model_type": "t5",
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
        "scale_decoder_outputs": config.head_scale is not None,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
        "eos_token_id": None,
    }


# what follows from feed_forward_proj, tasks of the published models, and labels that we have no head for
_WITHOUT_EFFECT = """
classifier_dropout decoder_start_token_id dense_act_fn initializer_factor is_gated_act output_past
"""


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


class _T5(Family):
    """Its input matrix has one name without a gate and two with one."""

    def expected(self, config: ModelConfig) -> dict[str, Name]:
        return _with_gate(config.gated).expected(config)


def _names(gated: bool) -> tuple[Name, ...]:
    names: list[Name] = [Name("shared.weight", "source_embedding.tokens.weight")]
    for side, layer, last in (("encoder", "{encoder_layer}", 1), ("decoder", "{layer}", 2)):
        theirs, ours = f"{side}.block.{layer}.", f"{side}.blocks.{layer}."
        feed = f"{theirs}layer.{last}.DenseReluDense."
        table = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        names += [
            Name(table, f"{side}.relative_bias.weight"),
            *_block(theirs, ours, last),
            Name(f"{side}.final_layer_norm.weight", f"{side}.final_norm.weight"),
        ]
        if gated:
            names += [
                Name(f"{feed}wi_0.weight", f"{ours}feedforward.gate.weight"),
                Name(f"{feed}wi_1.weight", f"{ours}feedforward.up.weight"),
            ]
        else:
            names += [Name(f"{feed}wi.weight", f"{ours}feedforward.up.weight")]
    return (*names, Name("lm_head.weight", "head.weight", heads=("untied",)))


def _with_gate(gated: bool) -> Family:
    return Family(model_type="t5", names=_names(gated), **_REST)


_REST: dict[str, Any] = {
    "fields": {
        **{
            name: Field(int, minimum=1) for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
        },
        "num_decoder_layers": Field(int, default=None, nullable=True, minimum=1),
        "n_positions": Field(int, default=512, minimum=1),
        "relative_attention_num_buckets": Field(int, default=32, minimum=4),
        "relative_attention_max_distance": Field(int, default=128, minimum=1),
        "dropout_rate": Field(float, default=0.1),
        "layer_norm_epsilon": Field(float, default=1e-6),
        "feed_forward_proj": Field(str, default="relu", allowed=tuple(_PROJECTIONS)),
        "tie_word_embeddings": Field(bool, default=True),
        "scale_decoder_outputs": Field(bool, default=None, nullable=True),
        "architectures": Field(list, default=None, nullable=True, check=_check_classes),
        "is_encoder_decoder": only(True),
        "is_decoder": only(False),
        "pruned_heads": only({}, None),
        "quantization_config": only(None),
    },
    "without_effect": frozenset(_WITHOUT_EFFECT.split()),
    "to_config": _to_config,
    "from_config": _from_config,
    "copies": {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
    },
    # a table that old files hold and nothing reads: cross-attention has no positions
    "left_out": ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
}

FAMILY = _T5(model_type="t5", names=_names(False), **_REST)
