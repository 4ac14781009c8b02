"""What BART, mBART, Marian and M2M-100 share: stacks with biases, one set of names, a tied head.

BART and Marian norm after the sum, and end without a norm; mBART and M2M-100 norm before, and end with one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from twinformer.config import ModelConfig
from twinformer.errors import ConfigError, Problems
from twinformer.pretrained.activations import ACTIVATIONS, published_activation
from twinformer.pretrained.family import Array, Field, Layout, Name, Shape, one_of, only


class Row(Layout):
    """A vector as a matrix of one row."""

    def shape(self, leaves: Sequence[Shape]) -> Shape:
        return (1, *super().shape(leaves))

    def pack(self, leaves: Sequence[Array]) -> Array:
        return super().pack(leaves)[None]

    def unpack(self, array: Array, leaves: Sequence[Shape]) -> list[Array]:
        return super().unpack(array[0], leaves)


def fields(classes: tuple[str, ...]) -> dict[str, Field]:
    """The fields that all have; ``classes`` are those that are read."""

    def check(names: Any) -> str | None:
        good = len(names) == 1 and names[0] in classes
        return None if good else f"expected a list with {one_of(classes)}, got {names!r}"

    sizes = ["vocab_size", "max_position_embeddings", "d_model"]
    sizes += [f"{side}_{what}" for side in ("encoder", "decoder") for what in ("layers", "ffn_dim", "attention_heads")]
    return {
        **{name: Field(int, minimum=1) for name in sizes},
        "activation_function": Field(str, default="gelu", allowed=tuple(ACTIVATIONS)),
        "dropout": Field(float, default=0.1),
        "attention_dropout": Field(float, default=0.0),
        "activation_dropout": Field(float, default=0.0),
        "init_std": Field(float, default=0.02),
        "scale_embedding": Field(bool, default=False),
        "tie_word_embeddings": only(True),
        "architectures": Field(list, default=None, nullable=True, check=check),
        "is_encoder_decoder": only(True),
        "is_decoder": only(False),
        "add_final_layer_norm": only(False),
        "normalize_before": only(False),
        "add_bias_logits": only(False),
        "pruned_heads": only({}, None),
        "quantization_config": only(None),
    }


#: how labels are dropped, how a decoder is started and ended, how layers are left out in training; heads and layers
#: that other names say already
_WITHOUT_EFFECT = """
bad_words_ids classif_dropout classifier_dropout decoder_layerdrop decoder_start_token_id early_stopping
encoder_layerdrop extra_pos_embeddings force_bos_token_to_be_generated forced_bos_token_id forced_eos_token_id
length_penalty min_length no_repeat_ngram_size num_beams num_hidden_layers
"""
WITHOUT_EFFECT = frozenset(_WITHOUT_EFFECT.split())


def to_config(subject: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Raises ConfigError where the stacks differ in their heads or widths, or D is no multiple of the heads."""
    problems = Problems(subject, ConfigError)
    D, A = values["d_model"], values["encoder_attention_heads"]
    for what in ("ffn_dim", "attention_heads"):
        one, other = values[f"encoder_{what}"], values[f"decoder_{what}"]
        problems.expect(one == other, f"decoder_{what}: expected encoder_{what}={one}, got {other}")
    problems.expect(D % A == 0, f"d_model: expected a multiple of encoder_attention_heads={A}, got {D}")
    problems.raise_if_any()
    return {
        "architecture": "encoder-decoder",
        "vocab_size": values["vocab_size"],
        "context_length": values["max_position_embeddings"],
        "model_dim": D,
        "key_dim": D // A,
        "hidden_dim": values["encoder_ffn_dim"],
        "num_heads": A,
        "num_encoder_layers": values["encoder_layers"],
        "num_layers": values["decoder_layers"],
        "norm": "layernorm",
        "norm_eps": 1e-5,
        "norm_placement": "post",
        "final_norm": False,
        "activation": ACTIVATIONS[values["activation_function"]],
        "feedforward_bias": True,
        "qkv_bias": True,
        "output_bias": True,
        "position_counting": "places",
        "share_embeddings": True,
        "embedding_scale": D**0.5 if values["scale_embedding"] else None,
        "dropout": values["dropout"],
        "attention_dropout": values["attention_dropout"],
        "hidden_dropout": values["activation_dropout"],
        "head": "tied",
        "head_bias": True,
        "initializer": "normal",
        "initializer_std": values["init_std"],
    }


def from_config(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    values: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "d_model": config.model_dim,
        "encoder_layers": config.num_encoder_layers,
        "decoder_layers": config.num_layers,
        "activation_function": published_activation(config.activation),
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": config.hidden_dropout,
        "init_std": config.initializer_std,
        "scale_embedding": config.embedding_scale is not None,
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "forced_eos_token_id")),
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    }
    for side in ("encoder", "decoder"):
        values |= {f"{side}_ffn_dim": config.hidden_dim, f"{side}_attention_heads": config.num_heads}
    return values


def names() -> tuple[Name, ...]:
    """Every tensor of the two stacks that some of these families have, and the bias of the logits."""
    found = [Name("final_logits_bias", "head.bias", Row())]
    for side, layer in (("encoder", "{encoder_layer}"), ("decoder", "{layer}")):
        theirs, ours = f"model.{side}.layers.{layer}.", f"{side}.blocks.{layer}."
        attentions = {"self_attn": "attention"} | ({"encoder_attn": "cross_attention"} if side == "decoder" else {})
        pairs = {"fc1": "feedforward.up", "fc2": "feedforward.down", "final_layer_norm": "feedforward_norm"}
        for their_name, our_name in attentions.items():
            pairs[f"{their_name}_layer_norm"] = f"{our_name}_norm"
            parts = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "output"}
            pairs |= {f"{their_name}.{short}": f"{our_name}.{name}" for short, name in parts.items()}
        for leaf in ("weight", "bias"):
            found += [Name(f"{theirs}{name}.{leaf}", f"{ours}{our_name}.{leaf}") for name, our_name in pairs.items()]
            found += [Name(f"model.{side}.layer_norm.{leaf}", f"{side}.final_norm.{leaf}")]
    return tuple(found)


#: what repeats the one table of tokens
COPIES = {
    "model.encoder.embed_tokens.weight": "model.shared.weight",
    "model.decoder.embed_tokens.weight": "model.shared.weight",
    "lm_head.weight": "model.shared.weight",
}
