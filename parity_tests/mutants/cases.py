"""The cases that faults are planted in: small models, each with the choices that some faults need to show.

All have 6 query heads on 2 key/value heads, ``A·K != D`` and ``J != K``, unless the name says otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from twinformer.config import ModelConfig, RotaryScaling
from twinformer.initializers import initial_weights, stream
from twinformer.parity import Case, make_case, random_case
from twinformer.parity.case import telling_inputs, telling_weights

_SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "context_length": 32,
    "model_dim": 24,
    "key_dim": 6,
    "value_dim": 5,
    "hidden_dim": 40,
    "num_heads": 6,
    "num_kv_heads": 2,
    "num_layers": 2,
}
_DECODER: dict[str, Any] = {
    "architecture": "decoder",
    "activation": "gelu",
    "qkv_bias": True,
    "output_bias": True,
    "positions": "sinusoidal",
    "head_bias": True,
}
_LLAMA: dict[str, Any] = {
    "architecture": "decoder",
    "norm": "rmsnorm",
    "norm_bias": False,
    "norm_cast": "before_weight",
    "activation": "silu",
    "gated": True,
    "feedforward_bias": False,
    "positions": "rotary",
    "head": "untied",
}
_GEMMA: dict[str, Any] = _LLAMA | {
    "norm_weight": "one_plus",
    "norm_cast": "after_weight",
    "activation": "gelu_tanh",
    "qk_norm": "rmsnorm",
    "attention_softcap": 1.5,
    "head": "tied",
    "head_softcap": 3.0,
    "embedding_scale": 55.4256,  # bfloat16 has 55.5
}
_BERT: dict[str, Any] = {
    "architecture": "encoder",
    "norm_placement": "post",
    "final_norm": False,
    "activation": "gelu",
    "qkv_bias": True,
    "output_bias": True,
    "positions": "learned",
    "position_offset": 2,
    "embedding_norm": True,
    "num_token_types": 2,
}
_BOTH: dict[str, Any] = {
    "architecture": "encoder-decoder",
    "source_vocab_size": 29,
    "qkv_bias": True,
    "output_bias": True,
    "positions": "sinusoidal",
}
_T5: dict[str, Any] = {
    "architecture": "encoder-decoder",
    "norm": "rmsnorm",
    "norm_bias": False,
    "feedforward_bias": False,
    "attention_scale": 1.0,
    "positions": "relative",
    "relative_buckets": 8,
    "relative_max_distance": 20,
    "share_embeddings": True,
    "head_scale": 0.2,
}
_DROPOUT: dict[str, Any] = {"dropout": 0.1, "attention_dropout": 0.2, "hidden_dropout": 0.3}
_LENGTH = 13


def _config(choices: dict[str, Any], **more: Any) -> ModelConfig:
    return ModelConfig(**(_SIZES | choices | more))


def _plain(choices: dict[str, Any], *, length: int = _LENGTH, **more: Any) -> Callable[[str], Case]:
    return lambda name: random_case(name, _config(choices, **more), seed=1, length=length)


def _initial(name: str) -> Case:
    """Weights as they are before training: much smaller activations."""
    config = _config(_DECODER)
    return make_case(name, config, initial_weights(config, 1), telling_inputs(config, 1, length=_LENGTH), 1)


def _constant_rows(name: str) -> Case:
    """Embedding rows of ``m ± 1`` with m odd and near 2^30: mean and variance are exact in two passes."""
    config = _config(_BERT, positions="none", position_offset=0, num_token_types=0)
    tensors: dict[str, Any] = dict(telling_weights(config, 1))
    rng = stream(1, "constant rows")
    table = tensors["embedding.tokens.weight"].astype(np.float64)
    for row in range(8):
        signs = rng.permutation(np.repeat([-1.0, 1.0], config.model_dim // 2))
        table[row] = 2.0**30 + rng.integers(1, 2**28) * 2 + 1 + signs
    tensors["embedding.tokens.weight"] = table
    return make_case(name, config, tensors, telling_inputs(config, 1, length=_LENGTH), 1)


def _broken_padding(name: str) -> Case:
    """Padding whose embedding is infinite, in a model that may not let it out: the scale takes row 0 over the top."""
    config = _config(_DECODER | {"architecture": "encoder", "head": "none", "head_bias": False}, embedding_scale=1e10)
    tensors: dict[str, Any] = {path: tensor.astype(np.float64) for path, tensor in telling_weights(config, 1).items()}
    tensors["embedding.tokens.weight"][0] = 1e300
    inputs = telling_inputs(config, 1, length=_LENGTH)
    inputs["tokens"] = np.where(inputs["padding_mask"], np.maximum(inputs["tokens"], 1), 0)
    return make_case(name, config, tensors, inputs, 1)


def _explicit_positions(name: str) -> Case:
    case = random_case(name, _config(_LLAMA), seed=1, length=_LENGTH)
    rng = stream(1, "positions")
    places = np.sort(rng.integers(0, case.config.context_length, case.inputs["tokens"].shape), axis=1)
    return dataclasses.replace(case, inputs=case.inputs | {"positions": places})


def _unknown_token(name: str) -> Case:
    case = random_case(name, _config(_DECODER), seed=1, length=_LENGTH)
    tokens = case.inputs["tokens"].copy()
    tokens[2, 1] = case.config.vocab_size
    return dataclasses.replace(case, inputs=case.inputs | {"tokens": tokens})


_MAKERS: dict[str, Callable[[str], Case]] = {
    "decoder": _plain(_DECODER),
    "small-initial": _initial,
    "gelu_tanh": _plain(_DECODER, activation="gelu_tanh"),
    "geglu": _plain(_LLAMA, activation="gelu"),
    "llama": _plain(_LLAMA),
    "llama3": _plain(
        _LLAMA, rotary_scaling=RotaryScaling(kind="llama3", factor=8.0, original_context_length=16), length=24
    ),
    "yarn": _plain(
        _LLAMA,
        rotary_scaling=RotaryScaling(kind="yarn", factor=4.0, original_context_length=16, attention_factor=1.2),
        length=24,
    ),
    "partial-rotary": _plain(_LLAMA, rotary_dim=4),
    "interleaved-rotary": _plain(_LLAMA, rotary_convention="interleaved"),
    "gemma": _plain(_GEMMA),
    "sandwich": _plain(_GEMMA, norm_placement="sandwich"),
    "windows": _plain(_LLAMA, window=4, window_layers=(0,), window_rotary_base=50.0),
    "bert": _plain(_BERT),
    "masked-tokens": _plain(_BERT, head="tied", head_transform=True, head_bias=True),
    "labels": _plain(_BERT, head="sequence", head_bias=True, num_labels=3, pool="mean", pooler="tanh"),
    "largest": _plain(_BERT, num_layers=1, head="sequence", num_labels=3, pool="max", pooler="relu"),
    "encoder": _plain(_DECODER | {"architecture": "encoder"}),
    "constant-rows": _constant_rows,
    "broken-padding": _broken_padding,
    "explicit-positions": _explicit_positions,
    "unknown-token": _unknown_token,
    "encoder-decoder": _plain(_BOTH),
    "t5": _plain(_T5, length=30),
    "alibi": _plain(_DECODER, positions="alibi"),
    "alibi-encoder": _plain(_DECODER, architecture="encoder", positions="alibi"),
    "window": _plain(_DECODER, window=4),
    "window-encoder": _plain(_DECODER, architecture="encoder", window=4),
    # every projection square, every head with a key head of its own: a wrong order of axes keeps all shapes
    "square": _plain(_DECODER, key_dim=4, value_dim=4, num_kv_heads=6, hidden_dim=24),
    "untied": _plain(_DECODER, head="untied"),
    "dropout": _plain(_DECODER | _DROPOUT, num_layers=1),
    "loop": _plain(
        _LLAMA, num_layers=4, window=4, window_layers=(0, 2), hidden_dropout=0.3, remat=True, scan_layers=True
    ),
    "dropout-layers": _plain(_LLAMA, hidden_dropout=0.3),
    # one layer: what is asked of a training step, and of what is written, needs no more
    "train-decoder": _plain(_DECODER, num_layers=1),
    "train-encoder": _plain(_BERT, num_layers=1),
    "train-encoder-decoder": _plain(_BOTH, num_layers=1, num_encoder_layers=1),
    # room for three sequences where nothing makes room
    "decode-window": _plain(_DECODER, window=4, context_length=48),
    "write-decoder": _plain(_DECODER, num_layers=1),
    # more than 256 positions
    "long-rotary": _plain(_LLAMA, context_length=272, num_layers=1, rotary_dim=4, length=264),
    "long-decoder": _plain(_DECODER, context_length=272, num_layers=1, length=264),
    # of equal head widths, as PyTorch's kernel wants them
    "long-window": _plain(_LLAMA, key_dim=6, value_dim=6, window=32, context_length=272, num_layers=1, length=_LENGTH),
    "wide-window": _plain(_LLAMA, key_dim=6, value_dim=6, window=100, context_length=272, num_layers=1, length=_LENGTH),
    "long-dropout": _plain(_DECODER | _DROPOUT, context_length=272, num_layers=1, length=_LENGTH),
    "half-llama": _plain(_LLAMA, num_layers=1, param_dtype="float16", compute_dtype="float16"),
    "mixed-decoder": _plain(_DECODER, num_layers=1, param_dtype="float32", compute_dtype="bfloat16"),
    # for low precision: enough tokens for steady statistics
    "low-llama": _plain(_LLAMA, context_length=96, length=96),
    "low-gemma": _plain(_GEMMA, context_length=96, length=96),
    "low-decoder": _plain(_DECODER, context_length=96, length=96),
    "low-encoder": _plain(_DECODER | {"architecture": "encoder"}, context_length=96, length=96),
    "low-long": _plain(_LLAMA, context_length=400, num_layers=1, length=264),
}

CASES: dict[str, Callable[[], Case]] = {
    name: (lambda name=name, make=make: make(name)) for name, make in _MAKERS.items()
}
