"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108) as ``transformers`` publishes it: ``DistilBertModel`` and its heads.

As BERT, without token types and poolers, with eps 1e-12 always. Labels of a sequence: the first token through a dense
layer with ReLU. Positions that were made as sinusoids stand in the file like learned ones.

It drops nothing from what attention gives before the residual sum, where ours drops: it matters in training only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twinformer.config import Head, ModelConfig
from twinformer.errors import ConfigError, Problems
from twinformer.pretrained import bert
from twinformer.pretrained.activations import ACTIVATIONS, published_activation
from twinformer.pretrained.family import Family, Field, Name, only

_STEM = "DistilBert"
_EPS = 1e-12
_ANSWERS = f"{_STEM}ForQuestionAnswering"


def _to_config(values: Mapping[str, Any]) -> dict[str, Any]:
    problems = Problems("distilbert", ConfigError)
    D, A, rate = values["dim"], values["n_heads"], values["dropout"]
    problems.expect(D % A == 0, f"dim: expected a multiple of n_heads={A}, got {D}")
    head = bert.head_of(_STEM, {**values, "hidden_dropout_prob": rate, "classifier_dropout": None})
    if values["architectures"] == [_ANSWERS]:
        head |= {"head_dropout": values["qa_dropout"]}
        problems.expect(head["num_labels"] == 2, f"num_labels: expected 2 for {_ANSWERS}, got {head['num_labels']}")
    elif head["head"] == "sequence":
        head |= {"pooler": "relu", "head_dropout": values["seq_classif_dropout"]}
    problems.raise_if_any()
    return {
        "architecture": "encoder",
        "vocab_size": values["vocab_size"],
        "context_length": values["max_position_embeddings"],
        "model_dim": D,
        "key_dim": D // A,
        "hidden_dim": values["hidden_dim"],
        "num_heads": A,
        "num_layers": values["n_layers"],
        "norm": "layernorm",
        "norm_eps": _EPS,
        "norm_placement": "post",
        "final_norm": False,
        "activation": ACTIVATIONS[values["activation"]],
        "feedforward_bias": True,
        "qkv_bias": True,
        "output_bias": True,
        "positions": "learned",
        "position_counting": "places",
        "embedding_norm": True,
        "dropout": rate,
        "attention_dropout": values["attention_dropout"],
        "initializer": "normal",
        "initializer_std": values["initializer_range"],
        **head,
    }


def _are_answers(config: ModelConfig) -> bool:
    """Whether labels of tokens can only be written as the two ends of an answer, which have a rate of their own."""
    return config.head == "tokens" and config.num_labels == 2 and config.head_dropout != config.dropout


def _from_config(config: ModelConfig) -> dict[str, Any]:
    values = bert.class_of(_STEM, config)
    values.pop("classifier_dropout", None)
    if config.head == "sequence":
        values["seq_classif_dropout"] = config.head_dropout
    if _are_answers(config):
        values |= {"architectures": [_ANSWERS], "qa_dropout": config.head_dropout}
    return {
        "model_type": "distilbert",
        **values,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "dim": config.model_dim,
        "hidden_dim": config.hidden_dim,
        "n_heads": config.num_heads,
        "n_layers": config.num_layers,
        "activation": published_activation(config.activation),
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.initializer_std,
        "sinusoidal_pos_embds": False,
    }


class _DistilBert(Family):
    """The matrix of labels has another name where they are the ends of an answer."""

    def written(self, name: Name, config: ModelConfig) -> str:
        found = super().written(name, config)
        return found.replace("classifier.", "qa_outputs.") if _are_answers(config) else found


_MASKED: tuple[Head, ...] = ("tied", "untied")
_OURS, _THEIRS = "stack.blocks.{layer}.", "transformer.layer.{layer}."
_PARTS = {
    "attention.q_lin": "attention.query",
    "attention.k_lin": "attention.key",
    "attention.v_lin": "attention.value",
    "attention.out_lin": "attention.output",
    "sa_layer_norm": "attention_norm",
    "ffn.lin1": "feedforward.up",
    "ffn.lin2": "feedforward.down",
    "output_layer_norm": "feedforward_norm",
}

FAMILY = _DistilBert(
    model_type="distilbert",
    fields={
        "vocab_size": Field(int, minimum=1),
        "dim": Field(int, minimum=1),
        "n_layers": Field(int, minimum=1),
        "n_heads": Field(int, minimum=1),
        "hidden_dim": Field(int, minimum=1),
        "max_position_embeddings": Field(int, minimum=1),
        "activation": Field(str, default="gelu", allowed=tuple(ACTIVATIONS)),
        "dropout": Field(float, default=0.1),
        "attention_dropout": Field(float, default=0.1),
        "seq_classif_dropout": Field(float, default=0.2),
        "qa_dropout": Field(float, default=0.1),
        "initializer_range": Field(float, default=0.02),
        **{name: field for name, field in bert.HEAD_FIELDS.items() if name != "classifier_dropout"},
        "is_decoder": only(False),
        "is_encoder_decoder": only(False),
        "add_cross_attention": only(False),
        "pruned_heads": only({}, None),
        "quantization_config": only(None),
    },
    # how the table of positions began, and words of its first releases
    without_effect=frozenset(["output_past", "sinusoidal_pos_embds", "tie_weights_"]),
    to_config=_to_config,
    from_config=_from_config,
    names=(
        Name("embeddings.word_embeddings.weight", "embedding.tokens.weight"),
        Name("embeddings.position_embeddings.weight", "embedding.positions.weight"),
        *bert.pair("embeddings.LayerNorm", "embedding.norm"),
        *(name for theirs, ours in _PARTS.items() for name in bert.pair(_THEIRS + theirs, _OURS + ours)),
        *bert.pair("vocab_transform", "head.transform", beside=True),
        *bert.pair("vocab_layer_norm", "head.norm", beside=True),
        Name("vocab_projector.bias", "head.bias", heads=_MASKED, beside=True),
        Name("vocab_projector.weight", "head.weight", heads=("untied",), beside=True),
        *bert.pair("pre_classifier", "head.pooler", beside=True),
        *bert.pair("classifier", "head", heads=("sequence", "tokens"), beside=True),
    ),
    prefixes=("distilbert.",),
    body_prefix="distilbert.",
    old_endings=bert.OLD_ENDINGS,
    counting_buffers=("embeddings.position_ids",),
    copies={"vocab_projector.weight": "embeddings.word_embeddings.weight"},
    left_out=("vocab_transform.", "vocab_layer_norm.", "vocab_projector.", "pre_classifier.", "classifier."),
)
