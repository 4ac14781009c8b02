"""What is timed, as data: a model, its weights by seed, inputs by seed, and the bound that its outputs must keep.

Every case is a model that the peers can express too, so that all systems compute the same function with the same
weights. ``quick`` has the same kinds of work at sizes that a minute can hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from twinformer.config import ModelConfig

Kind = Literal["forward", "train", "prefill", "decode", "beam", "dispatch", "micro"]
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Case:
    """One piece of work. ``T`` and ``S`` are lengths of target and source, ``new`` tokens that are written.

    ``bound``: the largest error against the float64 truth, relative to the largest magnitude of each output, with which
    a system may be timed at all. ``op`` names a micro-operation.
    """

    name: str
    kind: Kind
    config: ModelConfig
    B: int
    T: int
    S: int = 0
    new: int = 0
    op: str = ""
    bound: float = 1e-4

    def inputs(self) -> Arrays:
        """Token ids, the same for every system."""
        rng = np.random.default_rng(11)
        tokens = rng.integers(0, self.config.vocab_size, (self.B, self.T))
        if self.config.architecture != "encoder-decoder":
            return {"tokens": tokens}
        source = rng.integers(0, self.config.source_vocab_size, (self.B, self.S))
        return {"source": source, "target": tokens}

    def targets(self) -> npt.NDArray[np.int64]:
        """``[B, T]``: what a training step should have predicted."""
        return np.random.default_rng(12).integers(0, self.config.vocab_size, (self.B, self.T))


LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.01


def _gpt2(D: int, L: int, N: int, V: int) -> ModelConfig:
    """GPT-2 with the erf GELU, which all peers have."""
    return ModelConfig(
        architecture="decoder",
        vocab_size=V,
        context_length=N,
        model_dim=D,
        key_dim=min(64, D),
        hidden_dim=4 * D,
        num_heads=max(1, D // 64),
        num_layers=L,
        activation="gelu",
        qkv_bias=True,
        output_bias=True,
        positions="learned",
    )


def _bert(D: int, L: int, N: int, V: int) -> ModelConfig:
    return _gpt2(D, L, N, V).replace(
        architecture="encoder", norm_placement="post", final_norm=False, embedding_norm=True, norm_eps=1e-12
    )


def _bart(D: int, L: int, N: int, V: int) -> ModelConfig:
    return _gpt2(D, L, N, V).replace(
        architecture="encoder-decoder",
        norm_placement="post",
        final_norm=False,
        embedding_norm=True,
        position_offset=2,
        share_embeddings=True,
        source_vocab_size=V,
        num_encoder_layers=L,
    )


def _llama(D: int, L: int, N: int, V: int) -> ModelConfig:
    return ModelConfig(
        architecture="decoder",
        vocab_size=V,
        context_length=N,
        model_dim=D,
        key_dim=min(64, D),
        hidden_dim=-(-8 * D // 3 // 32) * 32,
        num_heads=max(1, D // 64),
        num_layers=L,
        norm="rmsnorm",
        norm_bias=False,
        norm_cast="before_weight",
        activation="silu",
        gated=True,
        feedforward_bias=False,
        positions="rotary",
        head="untied",
    )


def _micro(D: int, B: int, T: int, V: int, A: int) -> list[Case]:
    config = _gpt2(D, 1, T, V).replace(num_heads=A, key_dim=D // A)
    ops = ("matmul", "matmul-dx", "matmul-dw", "matvec", "attention", "attention-grad", "norm", "gelu", "loss", "adamw")
    return [Case(f"micro-{op}", "micro", config, B=B, T=T, op=op) for op in ops]


#: at the sizes of the measuring notes; the decoder's training step is the reference case
FULL = (
    Case("encoder-forward", "forward", _bert(512, 6, 128, 8192), B=8, T=128),
    Case("encoder-train", "train", _bert(512, 6, 128, 8192), B=8, T=128),
    Case("decoder-train", "train", _gpt2(512, 6, 256, 8192), B=4, T=256),
    Case("seq2seq-train", "train", _bart(512, 3, 128, 8192), B=8, T=64, S=96),
    Case("prefill", "prefill", _llama(512, 6, 512, 8192), B=1, T=256),
    Case("decode-1", "decode", _llama(512, 6, 512, 8192), B=1, T=64, new=64),
    Case("decode-2", "decode", _llama(512, 6, 512, 8192), B=2, T=64, new=64),
    Case("decode-4", "decode", _llama(512, 6, 512, 8192), B=4, T=64, new=64),
    Case("decode-8", "decode", _llama(512, 6, 512, 8192), B=8, T=64, new=64),
    Case("beam", "beam", _bart(256, 3, 128, 4096), B=2, T=1, S=48, new=32),
    Case("dispatch-train", "dispatch", _gpt2(8, 12, 8, 16), B=1, T=4),
    Case("dispatch-forward", "dispatch", _gpt2(8, 12, 8, 16), B=1, T=4),
    *_micro(512, 4, 256, 8192, 8),
)

QUICK = (
    Case("encoder-forward", "forward", _bert(128, 2, 64, 512), B=8, T=64),
    Case("encoder-train", "train", _bert(128, 2, 64, 512), B=8, T=64),
    Case("decoder-train", "train", _gpt2(128, 2, 64, 512), B=8, T=64),
    Case("seq2seq-train", "train", _bart(128, 2, 64, 512), B=8, T=32, S=48),
    Case("prefill", "prefill", _llama(128, 2, 256, 512), B=1, T=128),
    Case("decode-1", "decode", _llama(128, 2, 256, 512), B=1, T=16, new=32),
    Case("beam", "beam", _bart(64, 1, 64, 256), B=2, T=1, S=16, new=12),
    Case("dispatch-train", "dispatch", _gpt2(8, 12, 8, 16), B=1, T=4),
    Case("dispatch-forward", "dispatch", _gpt2(8, 12, 8, 16), B=1, T=4),
    *_micro(128, 8, 64, 512, 2),
)
