"""Rung 2, continued: rows as long as those that models are trained on, called as a trainer calls.

From some length on a twin may go another way to the same values: attention by pieces of the queries, a kernel that
knows the causal mask, random numbers drawn in parts. Here one row without padding is that long, with dropout and
without it, and Flax is traced as in training, where some of these ways are taken and nowhere else. Then rows with
padding, and with several documents, under a window that reaches beyond the piece before.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from twinformer.config import ModelConfig
from twinformer.initializers import stream
from twinformer.parity.case import Arrays, Case
from twinformer.parity.cut import cut, describe
from twinformer.parity.evidence import Evidence
from twinformer.parity.rungs.calls import compared
from twinformer.parity.rungs.stochastic import with_rates
from twinformer.parity.verdict import Rung, does_not_apply

# beyond 256 tokens, where pieces begin, and not a multiple of theirs; the window, so that pieces leave keys out
LENGTH, WINDOW, WIDE_WINDOW = 266, 32, 100


def check(evidence: Evidence) -> Rung:
    """Compare outputs, blocks and gradients in float64, without and with dropout."""
    whole = evidence.case
    if whole.config.context_length < LENGTH:
        return does_not_apply(f"the context is {whole.config.context_length} tokens, of {LENGTH} that are asked for")
    case = _long(whole)
    key = stream(0, "long/key").integers(0, 2**32, 2)
    dropping = dataclasses.replace(case, config=with_rates(case.config), inputs=case.inputs | {"rng": key})
    called = {"without dropout": case, "with dropout": dropping, "with padding": _padded(case, whole.config)}
    if whole.config.architecture != "encoder-decoder" and whole.config.head not in ("pooled", "sequence"):
        called["documents in a row"] = _packed(case)
    rung = compared(evidence, called)
    rung.notes += describe(case.config, whole.config)
    return rung


def _long(whole: Case) -> Case:
    config = whole.config
    if config.window is not None and config.window > WINDOW:
        config = config.replace(window=WINDOW)
    smaller = dataclasses.replace(whole, config=config)
    sized = cut(smaller, _inputs(config, 1), layers=1).config
    case = cut(smaller, _inputs(sized, LENGTH), layers=1)
    return dataclasses.replace(case, training=True).in_dtype("float64")


def _padded(case: Case, whole: ModelConfig) -> Case:
    """Padding on the left, and on the right with holes; with a window longer than a piece, if it has one so long."""
    config = case.config
    if config.window is not None and whole.window is not None:
        config = config.replace(window=min(whole.window, WIDE_WINDOW))
    inputs = {name: np.concatenate([tokens, tokens[:, ::-1]]) for name, tokens in case.inputs.items()}
    real = np.ones((2, LENGTH), np.bool_)
    real[0, :70] = False
    real[1, [3, 64, 65, 66, 130, *range(250, LENGTH)]] = False
    masks = {"padding_mask" if name == "tokens" else f"{name}_padding_mask": real for name in inputs}
    cotangent = np.concatenate([case.cotangent, -case.cotangent])
    return dataclasses.replace(case, config=config, inputs=inputs | masks, cotangent=cotangent)


def _packed(case: Case) -> Case:
    """Three documents, one of them longer than a piece."""
    segments = np.repeat([4, 1, 7], [50, 150, LENGTH - 200])[None]
    return dataclasses.replace(case, inputs=case.inputs | {"segments": segments})


def _inputs(config: ModelConfig, length: int) -> Arrays:
    """One row of tokens, and what it cannot do without."""
    rng = stream(0, "long/tokens")
    if config.architecture == "encoder-decoder":
        sizes = {"source": config.source_vocab_size, "target": config.vocab_size}
    else:
        sizes = {"tokens": config.vocab_size}
    return {name: rng.integers(0, size, (1, length)) for name, size in sizes.items()}
