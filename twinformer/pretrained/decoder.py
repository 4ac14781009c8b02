"""What the decoder-only families share: heads by the class that was saved, and windows by block.

A published directory says which class it holds in ``architectures``: the bare model, or the model with a head that
predicts tokens, that labels a sequence by its last real token, or that labels each token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twinformer.config import Head, ModelConfig
from twinformer.errors import ConfigError
from twinformer.pretrained.family import Field, Name, one_of

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Heads:
    """The classes of one family: what each head is called, and how its parameters are.

    ``tied`` is what the absence of ``tie_word_embeddings`` means; ``tokens`` may be absent; ``tokens_name`` is the
    published name of the head that labels tokens.
    """

    model: str
    causal: str
    sequence: str
    tokens: str | None
    tied: bool = False
    tokens_name: str = "score"

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(name for name in (self.causal, self.model, self.sequence, self.tokens) if name is not None)

    def fields(self) -> dict[str, Field]:
        def check(names: Any) -> str | None:
            good = len(names) == 1 and names[0] in self.classes
            return None if good else f"expected a list with {one_of(self.classes)}, got {names!r}"

        return {
            "architectures": Field(list, default=None, nullable=True, check=check),
            "tie_word_embeddings": Field(bool, default=self.tied),
            "id2label": Field(dict, default=None, nullable=True),
            "num_labels": Field(int, default=None, nullable=True, minimum=1),
            "classifier_dropout": Field(float, default=None, nullable=True),
            "hidden_dropout": Field(float, default=None, nullable=True),
        }

    def names(self) -> tuple[Name, ...]:
        return (
            Name("lm_head.weight", "head.weight", heads=("untied",), beside=True),
            Name("score.weight", "head.weight", heads=("sequence",), beside=True),
            Name(f"{self.tokens_name}.weight", "head.weight", heads=("tokens",), beside=True),
            Name(f"{self.tokens_name}.bias", "head.bias", heads=("tokens",), beside=True),
        )

    def to_config(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Our head. Without ``architectures`` it is the one that predicts tokens."""
        given = values["architectures"]
        name = self.causal if given is None else given[0]
        if name == self.model:
            return {"head": "none"}
        if name == self.causal:
            return {"head": "tied" if values["tie_word_embeddings"] else "untied"}
        labels = values["id2label"]
        count = len(labels) if labels is not None else values["num_labels"] or 2
        if name == self.sequence:
            return {"head": "sequence", "num_labels": count, "pool": "last"}
        rate = next((r for r in (values["classifier_dropout"], values["hidden_dropout"]) if r is not None), 0.1)
        return {"head": "tokens", "num_labels": count, "head_bias": True, "head_dropout": rate}

    def from_config(self, config: ModelConfig) -> dict[str, Any]:
        """``architectures`` and what goes with it. A head that the family lacks is written as the one for tokens.

        The ids of special tokens are the tokenizer's, not the model's: null, since the published classes' own defaults
        may lie beyond this vocabulary.
        """
        names: dict[Head, str | None] = {"none": self.model, "sequence": self.sequence, "tokens": self.tokens}
        values: dict[str, Any] = {
            "architectures": [names.get(config.head) or self.causal],
            "tie_word_embeddings": config.head != "untied",
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        }
        if config.num_labels:
            labels = [f"LABEL_{i}" for i in range(config.num_labels)]
            values["id2label"] = {str(i): label for i, label in enumerate(labels)}
            values["label2id"] = {label: i for i, label in enumerate(labels)}
        if config.head == "tokens":
            values["classifier_dropout"] = config.head_dropout
        return values


# ---- windows by block


def _check_types(types: Any) -> str | None:
    wrong = sorted({repr(kind) for kind in types if kind not in (FULL, SLIDING)})
    return f"expected {FULL!r} or {SLIDING!r} for each block, got {', '.join(wrong)} too" if wrong else None


WINDOW_FIELDS = {
    "sliding_window": Field(int, default=None, nullable=True, minimum=1),
    "layer_types": Field(list, default=None, nullable=True, check=_check_types),
}


def windows(subject: str, types: Sequence[str], window: int | None, blocks: int) -> dict[str, Any]:
    """Our ``window`` and ``window_layers`` for the kind of each block.

    Raises ConfigError where the list is not as long as the stack, or a block slides and there is no window.
    """
    if len(types) != blocks:
        raise ConfigError(subject, [f"layer_types: expected {blocks} kinds (num_hidden_layers), got {len(types)}"])
    layers = tuple(layer for layer, kind in enumerate(types) if kind == SLIDING)
    if not layers:
        return {}
    if window is None:
        raise ConfigError(subject, [f"sliding_window: expected a whole number with {SLIDING!r} blocks, got {window!r}"])
    return {"window": window, "window_layers": None if len(layers) == blocks else layers}


def layer_types(config: ModelConfig) -> list[str]:
    """The kind of each block, as published."""
    return [SLIDING if config.has_window(layer) else FULL for layer in range(config.num_layers)]
