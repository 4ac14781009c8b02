"""BERT (Devlin et al. 2019, arXiv:1810.04805) as the ``transformers`` library publishes it: ``BertModel``.

An encoder with post-norm blocks and no final norm; learned positions counted over all places of a row, padding
included, unless they are given; two token types; a norm over the embeddings; biases everywhere; erf GELU; head a of a
projection owns its rows ``a·K … (a+1)·K - 1``, as ours does. The class that was saved decides the head: masked tokens
(dense, activation, norm, the table of tokens and a bias), labels of a sequence (the first token through a dense layer
with tanh), labels of each token, both ends of an answer. ``BertModel`` gives hidden states ``[B, T, D]``; its pooler,
and parts of classes that we have no head for, are left out, and named in ``Pretrained.left_out``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twinformer.config import Head, ModelConfig
from twinformer.errors import ConfigError
from twinformer.pretrained import published
from twinformer.pretrained.family import Array, Family, Field, Name, only

#: the activations of ``transformers`` (as of 5.0) that are one of ours, the name that we write first
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def _to_config(values: Mapping[str, Any]) -> dict[str, Any]:
    D, A = values["hidden_size"], values["num_attention_heads"]
    if D % A != 0:
        raise ConfigError("bert", [f"hidden_size: expected a multiple of num_attention_heads={A}, got {D}"])
    return {
        "architecture": "encoder",
        "vocab_size": values["vocab_size"],
        "context_length": values["max_position_embeddings"],
        "model_dim": D,
        "key_dim": D // A,
        "hidden_dim": values["intermediate_size"],
        "num_heads": A,
        "num_layers": values["num_hidden_layers"],
        "norm": "layernorm",
        "norm_eps": values["layer_norm_eps"],
        "norm_placement": "post",
        "final_norm": False,
        "activation": _ACTIVATIONS[values["hidden_act"]],
        "feedforward_bias": True,
        "qkv_bias": True,
        "output_bias": True,
        "positions": "learned",
        "position_counting": "places",
        "num_token_types": values["type_vocab_size"],
        "embedding_norm": True,
        "dropout": values["hidden_dropout_prob"],
        "attention_dropout": values["attention_probs_dropout_prob"],
        "initializer": "normal",
        "initializer_std": values["initializer_range"],
        **head_of("Bert", values),
    }


def head_of(stem: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Our head for the class of a family of this kind (``stem`` is Bert or Roberta) that was saved."""
    names = values["architectures"] or []
    name = names[0].removeprefix(stem) if len(names) == 1 and isinstance(names[0], str) else ""
    if name in ("ForMaskedLM", "ForPreTraining"):
        tied: Head = "tied" if values["tie_word_embeddings"] else "untied"
        return {"head": tied, "head_transform": True, "head_bias": True}
    labels = values["id2label"]
    count = len(labels) if labels is not None else values["num_labels"] or 2
    rate = values["hidden_dropout_prob"] if values["classifier_dropout"] is None else values["classifier_dropout"]
    if name == "ForSequenceClassification":
        pooled = {"pool": "first", "pooler": "tanh"}
        return {"head": "sequence", "num_labels": count, "head_bias": True, "head_dropout": rate, **pooled}
    if name == "ForTokenClassification":
        return {"head": "tokens", "num_labels": count, "head_bias": True, "head_dropout": rate}
    if name == "ForQuestionAnswering":  # the begin and the end of the answer; nothing is dropped
        return {"head": "tokens", "num_labels": count, "head_bias": True}
    return {"head": "none"}


def class_of(stem: str, config: ModelConfig) -> dict[str, Any]:
    """``architectures`` and what goes with it."""
    kinds = {"tied": "ForMaskedLM", "untied": "ForMaskedLM", "sequence": "ForSequenceClassification"}
    kinds |= {"tokens": "ForTokenClassification"}
    values: dict[str, Any] = {
        "architectures": [stem + kinds.get(config.head, "Model")],
        "tie_word_embeddings": config.head != "untied",
    }
    if config.num_labels:
        names = [f"LABEL_{i}" for i in range(config.num_labels)]
        values["id2label"] = {str(i): name for i, name in enumerate(names)}
        values["label2id"] = {name: i for i, name in enumerate(names)}
        values["classifier_dropout"] = config.head_dropout
    return values


#: what decides the head
HEAD_FIELDS = {
    "architectures": Field(list, default=None, nullable=True),
    "tie_word_embeddings": Field(bool, default=True),
    "id2label": Field(dict, default=None, nullable=True),
    "num_labels": Field(int, default=None, nullable=True, minimum=1),
    "classifier_dropout": Field(float, default=None, nullable=True),
}


def pair(theirs: str, ours: str, **choices: Any) -> tuple[Name, Name]:
    """Weight and bias of one part."""
    return Name(f"{theirs}.weight", f"{ours}.weight", **choices), Name(f"{theirs}.bias", f"{ours}.bias", **choices)


def _from_config(config: ModelConfig) -> dict[str, Any]:
    activation = next(name for name, ours in _ACTIVATIONS.items() if ours == config.activation)
    return {
        "model_type": "bert",
        **class_of("Bert", config),
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.model_dim,
        "intermediate_size": config.hidden_dim,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "type_vocab_size": config.num_token_types,
        "hidden_act": activation,
        "layer_norm_eps": config.norm_eps,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "initializer_range": config.initializer_std,
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
    }


# the pooler's old settings (in Google's files)
_WITHOUT_EFFECT = """
directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type
"""

#: older files' names of norms; and the two ends of an answer, which are two labels of each token
OLD_ENDINGS = {
    "LayerNorm.gamma": "LayerNorm.weight",
    "LayerNorm.beta": "LayerNorm.bias",
    "qa_outputs.weight": "classifier.weight",
    "qa_outputs.bias": "classifier.bias",
}
_MASKED: tuple[Head, ...] = ("tied", "untied")
_OURS = "stack.blocks.{layer}."
_THEIRS = "encoder.layer.{layer}."

FAMILY = Family(
    model_type="bert",
    fields={
        "vocab_size": Field(int, minimum=1),
        "hidden_size": Field(int, minimum=1),
        "num_hidden_layers": Field(int, minimum=1),
        "num_attention_heads": Field(int, minimum=1),
        "intermediate_size": Field(int, minimum=1),
        "max_position_embeddings": Field(int, minimum=1),
        # the defaults are those of the published class, which old files rely on
        "type_vocab_size": Field(int, default=2, minimum=1),
        "hidden_act": Field(str, default="gelu", allowed=tuple(_ACTIVATIONS)),
        "layer_norm_eps": Field(float, default=1e-12),
        "hidden_dropout_prob": Field(float, default=0.1),
        "attention_probs_dropout_prob": Field(float, default=0.1),
        "initializer_range": Field(float, default=0.02),
        **HEAD_FIELDS,
        "position_embedding_type": only("absolute"),
        "is_decoder": only(False),
        "is_encoder_decoder": only(False),
        "add_cross_attention": only(False),
        "pruned_heads": only({}, None),
        "quantization_config": only(None),
    },
    without_effect=frozenset(_WITHOUT_EFFECT.split()),
    to_config=_to_config,
    from_config=_from_config,
    names=(
        Name("embeddings.word_embeddings.weight", "embedding.tokens.weight"),
        Name("embeddings.position_embeddings.weight", "embedding.positions.weight"),
        Name("embeddings.token_type_embeddings.weight", "embedding.token_types.weight"),
        Name("embeddings.LayerNorm.weight", "embedding.norm.weight"),
        Name("embeddings.LayerNorm.bias", "embedding.norm.bias"),
        Name(_THEIRS + "attention.self.query.weight", _OURS + "attention.query.weight"),
        Name(_THEIRS + "attention.self.query.bias", _OURS + "attention.query.bias"),
        Name(_THEIRS + "attention.self.key.weight", _OURS + "attention.key.weight"),
        Name(_THEIRS + "attention.self.key.bias", _OURS + "attention.key.bias"),
        Name(_THEIRS + "attention.self.value.weight", _OURS + "attention.value.weight"),
        Name(_THEIRS + "attention.self.value.bias", _OURS + "attention.value.bias"),
        Name(_THEIRS + "attention.output.dense.weight", _OURS + "attention.output.weight"),
        Name(_THEIRS + "attention.output.dense.bias", _OURS + "attention.output.bias"),
        Name(_THEIRS + "attention.output.LayerNorm.weight", _OURS + "attention_norm.weight"),
        Name(_THEIRS + "attention.output.LayerNorm.bias", _OURS + "attention_norm.bias"),
        Name(_THEIRS + "intermediate.dense.weight", _OURS + "feedforward.up.weight"),
        Name(_THEIRS + "intermediate.dense.bias", _OURS + "feedforward.up.bias"),
        Name(_THEIRS + "output.dense.weight", _OURS + "feedforward.down.weight"),
        Name(_THEIRS + "output.dense.bias", _OURS + "feedforward.down.bias"),
        Name(_THEIRS + "output.LayerNorm.weight", _OURS + "feedforward_norm.weight"),
        Name(_THEIRS + "output.LayerNorm.bias", _OURS + "feedforward_norm.bias"),
        *pair("cls.predictions.transform.dense", "head.transform", beside=True),
        *pair("cls.predictions.transform.LayerNorm", "head.norm", beside=True),
        Name("cls.predictions.bias", "head.bias", heads=_MASKED, beside=True),
        Name("cls.predictions.decoder.weight", "head.weight", heads=("untied",), beside=True),
        *pair("pooler.dense", "head.pooler"),
        *pair("classifier", "head", heads=("sequence", "tokens"), beside=True),
    ),
    prefixes=("bert.",),
    body_prefix="bert.",
    copies={
        "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    old_endings=OLD_ENDINGS,
    counting_buffers=("embeddings.position_ids",),
    left_out=("pooler.", "cls.", "classifier."),
)


def to_published(config: ModelConfig, tensors: Mapping[str, Array]) -> tuple[dict[str, Any], dict[str, Array]]:
    """``config.json`` and the tensors of a ``BertModel`` (without pooler) that holds this model, bit for bit.

    Raises ConfigError naming every choice that BERT cannot express, WeightsError naming every wrong leaf.
    """
    result = published.to_published(FAMILY, config, tensors)
    return result.config, result.tensors
