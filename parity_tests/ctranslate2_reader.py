"""A trained encoder-decoder as CTranslate2 stores it: aren-transliteration (OpenNMT; Arabic letters to Latin ones).

The file (binary version 2) is a list of named arrays, and says nothing of the architecture but a name,
``TransformerBase``, which stands for eight heads. The rest is what CTranslate2 computes with such a file: pre-norm
blocks with ReLU; LayerNorm with eps 1e-5 (OpenNMT-tf trained with 1e-6; the file names neither); embeddings times
sqrt(D); sinusoids in halves, counted from 1. It begins a target with ``<s>`` and ends it with ``</s>``; a source is
its letters, and nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from parity_tests.readers import SHARED_WEIGHTS
from twinformer.config import ModelConfig
from twinformer.pretrained.family import Family, Name
from twinformer.pretrained.files import Stored
from twinformer.pretrained.published import to_ours

DIRECTORY = "aren-transliteration"
FILES = tuple(f"{DIRECTORY}/{name}" for name in ("model.bin", "source_vocabulary.txt", "target_vocabulary.txt"))
HEADS = {"TransformerBase": 8}


@dataclasses.dataclass(frozen=True)
class Letters:
    """A vocabulary of letters. Id 0 pads, 1 begins a text, 2 ends it; the last, ``<unk>``, is not in the file."""

    letters: tuple[str, ...]
    blank: int = 0
    beginning: int = 1
    end: int = 2

    def encode(self, word: str) -> list[int]:
        """The ids of a word's letters. Raises ValueError for a letter that is not in the file."""
        return [self.letters.index(letter) for letter in word]

    def decode(self, ids: Iterable[int]) -> str:
        """The letters up to the end."""
        found = list(ids)
        return "".join(self.letters[i] for i in found[: found.index(self.end) if self.end in found else None])


def padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of several lengths as ``[B, T]``, padding (id 0) on the right, and where they are real."""
    real = np.arange(max(map(len, rows))) < np.array([[len(row)] for row in rows])
    ids = np.zeros(real.shape, np.int64)
    ids[real] = np.concatenate([np.array(row, np.int64) for row in rows])
    return ids, real


def read_arrays() -> tuple[str, dict[str, np.ndarray]]:
    """The name of the architecture, and every array of the file by name."""
    data = (SHARED_WEIGHTS / FILES[0]).read_bytes()
    at = 0

    def number(kind: str) -> int:
        nonlocal at
        (found,) = struct.unpack_from(f"<{kind}", data, at)
        at += struct.calcsize(f"<{kind}")
        return int(found)

    def text() -> str:  # its length, which counts the zero at its end
        nonlocal at
        length = number("H")
        at += length
        assert data[at - 1] == 0, at
        return data[at - length : at - 1].decode("ascii")

    assert number("I") == 2, "the version of the format"
    kind = text()
    assert number("I") == 2, "the revision of the names"
    arrays = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        assert number("B") == 4, f"{name}: bytes of a number; 4 stand for float32"
        count = number("I")
        assert name not in arrays, name
        arrays[name] = np.frombuffer(data, "<f4", count, at).reshape(shape)
        at += 4 * count
    assert at == len(data), (at, len(data))
    return kind, arrays


def _linear(published: str, *ours: str) -> list[Name]:
    """Weight and bias; several of ours are stacked in that order."""
    return [Name(f"{published}/{leaf}", tuple(f"{path}.{leaf}" for path in ours)) for leaf in ("weight", "bias")]


def _norm(published: str, ours: str) -> list[Name]:
    return [Name(f"{published}/gamma", f"{ours}.weight"), Name(f"{published}/beta", f"{ours}.bias")]


def _side(side: str, embedding: str, layer: str) -> list[Name]:
    theirs, block = f"{side}/layer_{layer}", f"{side}.blocks.{layer}"
    attention = f"{block}.attention"
    return [
        Name(f"{side}/embeddings/weight", f"{embedding}.tokens.weight"),
        *_norm(f"{theirs}/self_attention/layer_norm", f"{block}.attention_norm"),
        *_linear(f"{theirs}/self_attention/linear_0", *(f"{attention}.{part}" for part in ("query", "key", "value"))),
        *_linear(f"{theirs}/self_attention/linear_1", f"{attention}.output"),
        *_norm(f"{theirs}/ffn/layer_norm", f"{block}.feedforward_norm"),
        *_linear(f"{theirs}/ffn/linear_0", f"{block}.feedforward.up"),
        *_linear(f"{theirs}/ffn/linear_1", f"{block}.feedforward.down"),
        *_norm(f"{side}/layer_norm", f"{side}.final_norm"),
    ]


_CROSS, _OURS = "decoder/layer_{layer}/attention", "decoder.blocks.{layer}.cross_attention"


def _nothing(_: object) -> dict[str, Any]:
    return {}  # there is no configuration in the file: see ``_config``


FAMILY = Family(
    model_type="CTranslate2's TransformerBase",
    fields={},
    without_effect=frozenset(),
    to_config=_nothing,
    from_config=_nothing,
    names=(
        *_side("encoder", "source_embedding", "{encoder_layer}"),
        *_side("decoder", "target_embedding", "{layer}"),
        *_norm(f"{_CROSS}/layer_norm", f"{_OURS}_norm"),
        *_linear(f"{_CROSS}/linear_0", f"{_OURS}.query"),
        *_linear(f"{_CROSS}/linear_1", f"{_OURS}.key", f"{_OURS}.value"),
        *_linear(f"{_CROSS}/linear_2", f"{_OURS}.output"),
        *_linear("decoder/projection", "head"),
    ),
)


def _config(kind: str, arrays: dict[str, np.ndarray]) -> ModelConfig:
    V, D = arrays["decoder/embeddings/weight"].shape
    A = HEADS[kind]

    def layers(side: str) -> int:
        return sum(name.startswith(f"{side}/layer_") and name.endswith("/ffn/linear_0/bias") for name in arrays)

    return ModelConfig(
        architecture="encoder-decoder",
        vocab_size=V,
        source_vocab_size=len(arrays["encoder/embeddings/weight"]),
        context_length=500,  # CTranslate2's first table of positions; it has no longest text
        model_dim=D,
        key_dim=D // A,
        hidden_dim=len(arrays["encoder/layer_0/ffn/linear_0/bias"]),
        num_heads=A,
        num_layers=layers("decoder"),
        num_encoder_layers=layers("encoder"),
        qkv_bias=True,
        output_bias=True,
        norm_eps=1e-5,
        positions="sinusoidal",
        position_offset=1,
        sinusoid_layout="halves",
        sinusoid_spacing="endpoint",
        embedding_scale=math.sqrt(D),
        head="untied",
        head_bias=True,
    )


def in_our_terms(config: ModelConfig, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every leaf by our path. Raises WeightsError for a name or a shape that there is no place for, or that lacks."""
    stored = {name: Stored("F32", array.shape, functools.partial(np.copy, array)) for name, array in arrays.items()}
    tensors, left_out = to_ours(FAMILY, config, stored, FILES[0])
    assert left_out == [], left_out
    return tensors


def _letters(file: str, size: int) -> Letters:
    found = (*(SHARED_WEIGHTS / file).read_text(encoding="utf-8").removesuffix("\n").split("\n"), "<unk>")
    assert found[:3] == ("<blank>", "<s>", "</s>"), found[:3]
    assert len(found) == size == len(set(found)), (len(found), size)
    return Letters(found)


@functools.cache
def read_transliteration() -> tuple[ModelConfig, dict[str, np.ndarray], Letters, Letters]:
    """aren-transliteration in our terms, and the letters of its sources and of its targets."""
    kind, arrays = read_arrays()
    config = _config(kind, arrays)
    tensors = in_our_terms(config, arrays)
    return config, tensors, _letters(FILES[1], config.source_vocab_size), _letters(FILES[2], config.vocab_size)
