"""Real trained weights for the tests: small readers, and one walk through a model that keeps every block's output.

The files lie in ``shared/weights`` beside the repository and are not part of it. A test that uses one carries the mark
``needs_shared`` and is skipped, with the reason, where they are absent.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parity_tests.helpers import Twin, to_numpy
from twinformer.config import ModelConfig
from twinformer.parameters import model_parameters
from twinformer.pretrained.family import Family, Field, Name
from twinformer.pretrained.files import Stored
from twinformer.pretrained.published import to_ours, translate

SHARED_WEIGHTS = Path(__file__).parents[2] / "shared" / "weights"


def needs_shared(*names: str) -> pytest.MarkDecorator:
    """Skip where one of these files is absent."""
    absent = [name for name in names if not (SHARED_WEIGHTS / name).is_file()]
    return pytest.mark.skipif(bool(absent), reason=f"real weights absent from shared/weights: {', '.join(absent)}")


# ---- a model, step by step


def build(twin: Twin, config: ModelConfig, tensors: Mapping[str, np.ndarray], dtype: str = "float64") -> Any:
    """The model of this configuration with these weights, parameters and arithmetic in ``dtype``."""
    model = twin.file("models").build(config.with_dtype(dtype), seed=None)
    twin.file("weights").load_weights(model, tensors)
    return model


def run(twin: Twin, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call with NumPy arrays, without gradients; NumPy arrays back."""
    native = [twin.array(a) if isinstance(a, np.ndarray) else a for a in args]
    named = {k: twin.array(v) if isinstance(v, np.ndarray) else v for k, v in kwargs.items()}
    with torch.no_grad():
        return to_numpy(function(*native, **named))


def walk(
    twin: Twin,
    model: Any,
    tokens: np.ndarray,
    padding_mask: np.ndarray | None = None,
    token_types: np.ndarray | None = None,
    positions: np.ndarray | None = None,
) -> list[np.ndarray]:
    """The embeddings' output, then every block's, of a model with one stack: ``L + 1`` arrays ``[B, T, D]``.

    ``positions`` None: counted as the configuration says.
    """
    masks = twin.file("masks")
    with torch.no_grad():
        native = twin.array(tokens)
        mask, places = None, twin.array(np.arange(tokens.shape[1])[None])
        if padding_mask is not None:
            real = twin.array(padding_mask)
            mask = masks.padding_mask(real)
            places = masks.positions_from(real) if model.config.position_counting == "real" else places
        places = places if positions is None else twin.array(positions)
        types = None if token_types is None else twin.array(token_types)
        X = model.embedding(native, places, types)
        states = [to_numpy(X)]
        for block in model.stack.blocks:
            X = block(X, mask=mask, positions=places)
            states.append(to_numpy(X))
    return states


# ---- gpt-nano-sort: six letters of three, sorted (trained with minGPT; published by B. Bycroft)

_GPT = "transformer.h.{layer}."
_BLOCK = "stack.blocks.{layer}."


def _nano_config(values: Mapping[str, Any]) -> dict[str, Any]:
    D, A = values["n_embd"], values["n_head"]
    return {
        "architecture": "decoder",
        "vocab_size": values["vocab_size"],
        "context_length": values["block_size"],
        "model_dim": D,
        "key_dim": D // A,
        "hidden_dim": 4 * D,
        "num_heads": A,
        "num_layers": values["n_layer"],
        "activation": "gelu_tanh",
        "qkv_bias": True,
        "output_bias": True,
        "positions": "learned",
        "dropout": values["resid_pdrop"],
        "attention_dropout": values["attn_pdrop"],
        "head": "untied",
    }


def _pairs(published: str, ours: str) -> tuple[Name, Name]:
    return tuple(Name(f"{published}.{leaf}", f"{ours}.{leaf}") for leaf in ("weight", "bias"))


NANO = Family(
    model_type="gpt-nano",
    fields={
        **{name: Field(int, minimum=1) for name in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")},
        **{name: Field(float) for name in ("embd_pdrop", "resid_pdrop", "attn_pdrop")},
    },
    without_effect=frozenset(["B"]),  # the batch of the partials
    to_config=_nano_config,
    from_config=lambda config: {},
    names=(
        Name("transformer.wte.weight", "embedding.tokens.weight"),
        Name("transformer.wpe.weight", "embedding.positions.weight"),
        *_pairs(_GPT + "ln_1", _BLOCK + "attention_norm"),
        *(
            Name(
                f"{_GPT}attn.c_attn.{leaf}",
                tuple(f"{_BLOCK}attention.{part}.{leaf}" for part in ("query", "key", "value")),
            )
            for leaf in ("weight", "bias")
        ),
        *_pairs(_GPT + "attn.c_proj", _BLOCK + "attention.output"),
        *_pairs(_GPT + "ln_2", _BLOCK + "feedforward_norm"),
        *_pairs(_GPT + "mlp.c_fc", _BLOCK + "feedforward.up"),
        *_pairs(_GPT + "mlp.c_proj", _BLOCK + "feedforward.down"),
        *_pairs("transformer.ln_f", "stack.final_norm"),
        Name("lm_head.weight", "head.weight"),
    ),
    left_out=(_GPT + "attn.bias",),  # the causal mask
)


def _arrays(file: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config and the arrays of a JSON file with little-endian float32 in base64."""
    values = json.loads((SHARED_WEIGHTS / file).read_text())
    config = values.pop("config")
    arrays = {}
    for name, entry in values.items():
        assert entry["dtype"] == "torch.float32", (name, entry["dtype"])
        arrays[name] = np.frombuffer(base64.b64decode(entry["data"], validate=True), "<f4").reshape(entry["shape"])
    return config, arrays


@functools.cache
def read_nano_sort() -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """gpt-nano-sort in our terms."""
    values, arrays = _arrays("gpt-nano-sort-model.json")
    config, unknown = translate(NANO, values)
    assert not unknown, unknown
    stored = {name: Stored("F32", a.shape, functools.partial(np.copy, a)) for name, a in arrays.items()}
    tensors, left_out = to_ours(NANO, config, stored)
    assert left_out == [f"transformer.h.{i}.attn.bias" for i in range(config.num_layers)]
    return config, tensors


@functools.cache
def read_nano_sort_partials() -> dict[str, np.ndarray]:
    """The published activations of gpt-nano-sort for the tokens ``idx [3, 11]``; those not numbered: block 0."""
    _, arrays = _arrays("gpt-nano-sort-partials.json")
    tokens = arrays.pop("idx")
    return {"idx": tokens.astype(np.int64), **arrays}


# ---- stories260K (A. Karpathy's llama2.c, version 0 of its export)


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The vocabulary of tok512.bin: decoding only. Id 1 begins a text, 2 ends it."""

    pieces: tuple[bytes, ...]
    beginning: int = 1
    end: int = 2

    def decode(self, ids: np.ndarray) -> str:
        """Text of the ids ``[T]`` that follow BOS (whose leading space is dropped, as SentencePiece does)."""
        text = b""
        for i in ids:
            piece = self.pieces[int(i)]
            byte = re.fullmatch(rb"<0x([0-9A-F]{2})>", piece)
            text += bytes([int(byte[1], 16)]) if byte else piece
        return text.decode("utf-8").removeprefix(" ")


@functools.cache
def read_stories() -> tuple[ModelConfig, dict[str, np.ndarray], Pieces]:
    """stories260K in our terms."""
    data = (SHARED_WEIGHTS / "stories260K.bin").read_bytes()
    D, F, L, A, G, V, N = struct.unpack_from("<7i", data)
    assert V > 0, "a negative vocabulary would mean an untied head"
    K = D // A
    config = ModelConfig(
        architecture="decoder",
        vocab_size=V,
        context_length=N,
        model_dim=D,
        key_dim=K,
        hidden_dim=F,
        num_heads=A,
        num_kv_heads=G,
        num_layers=L,
        norm="rmsnorm",
        norm_bias=False,
        norm_eps=1e-5,
        activation="silu",
        gated=True,
        feedforward_bias=False,
        positions="rotary",
        rotary_convention="interleaved",
        head="tied",
    )
    leaves = model_parameters(config)
    flat = np.frombuffer(data, "<f4", offset=28)
    tensors, start = {}, 0
    order = [
        "attention_norm attention.query attention.key attention.value attention.output",
        "feedforward_norm feedforward.gate feedforward.down feedforward.up",  # w1, w2, w3
    ]
    paths = ["embedding.tokens.weight"]
    paths += [f"stack.blocks.{i}.{part}.weight" for parts in order for part in parts.split() for i in range(L)]
    for path in [*paths, "stack.final_norm.weight"]:
        size = int(np.prod(leaves[path].shape))
        tensors[path] = flat[start : start + size].reshape(leaves[path].shape)
        start += size
    assert tensors.keys() == leaves.keys()
    assert flat.size - start == 2 * N * K // 2, "the two unused rotary tables, and nothing else"
    return config, tensors, _read_pieces(V)


def _read_pieces(count: int) -> Pieces:
    """int32 longest piece, then for each piece float32 score, int32 length, bytes."""
    data = (SHARED_WEIGHTS / "tok512.bin").read_bytes()
    pieces, at = [], 4
    for _ in range(count):
        (length,) = struct.unpack_from("<i", data, at + 4)
        pieces.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    assert at == len(data), (at, len(data))
    return Pieces(tuple(pieces))
