"""A model cut down: what a rung asks that needs no depth is asked of the first layers and the first tokens.

Training, decoding and sampling run many steps, and what they ask (is a key folded, does a position go on) is the same
for a model of two layers as for one of fifty. Every module of every kind stays, with the case's own weights.
"""

from __future__ import annotations

from typing import Any

from twinformer.config import ModelConfig
from twinformer.parameters import model_parameters
from twinformer.parity.case import Arrays, Case, make_case

LAYERS, TOKENS = 2, 512


def cut(case: Case, inputs: Arrays, *, layers: int = LAYERS) -> Case:
    """The case with at most ``layers`` layers in each stack, ``TOKENS`` tokens, and these inputs (ids below that)."""
    config = case.config
    smaller: dict[str, Any] = {"num_layers": min(config.num_layers, layers)}
    smaller |= _windows(config, smaller["num_layers"])
    smaller["vocab_size"] = min(config.vocab_size, TOKENS)
    if config.architecture == "encoder-decoder":
        smaller["num_encoder_layers"] = min(config.num_encoder_layers, layers)
        smaller["source_vocab_size"] = min(config.source_vocab_size, TOKENS)
    config = config.replace(**smaller)
    tensors: Arrays = {}
    for path, parameter in model_parameters(config).items():
        tensors[path] = case.tensors[path][tuple(slice(size) for size in parameter.shape)]
    return make_case(case.name, config, tensors, inputs)


def _windows(config: ModelConfig, layers: int) -> dict[str, Any]:
    """Which of the first layers have the window: some, all (None), or none (no window then)."""
    if config.window_layers is None:
        return {}
    left = tuple(layer for layer in config.window_layers if layer < layers)
    if not left:
        return {"window": None, "window_layers": None, "window_rotary_base": None}
    return {"window_layers": None if len(left) == layers else left}


def describe(config: ModelConfig, whole: ModelConfig) -> list[str]:
    """What was left out, for a report's notes."""
    told = []
    if (config.num_layers, config.num_encoder_layers) != (whole.num_layers, whole.num_encoder_layers):
        told.append(f"{config.num_layers} of {whole.num_layers} layers")
    if config.vocab_size != whole.vocab_size:
        told.append(f"{config.vocab_size} of {whole.vocab_size:,} tokens")
    if config.window is not None and config.window != whole.window:
        told.append(f"a window of {config.window} instead of {whole.window}")
    return [f"a model of {' and '.join(told)} stands for the whole"] if told else []
