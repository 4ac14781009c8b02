"""Random members of the whole space of ModelConfig, at sizes that take milliseconds, with inputs for them.

Sizes are small but never all equal: D, A·K, G·K, A·J and F differ as a rule, so that a transposition or a wrong
reshape shows. Widths that a norm divides by its own spread are at least 3 (at 1 or 2 a LayerNorm gives ±1 or 0
whatever comes in: its true gradient is zero and only rounding noise is left to compare).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from twinformer.config import ModelConfig, RotaryScaling

Ids = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Case:
    """A configuration and what its draw of weights and inputs depends on: enough to run it again."""

    config: ModelConfig
    seed: int
    batch: int
    lengths: tuple[int, int]  # T, and S where there are two stacks
    padding: str  # "none", "right", "left", "holes", "empty" (one row of the batch has no real token)
    explicit_positions: bool
    dropout_seed: int | None


def _pick(draw: st.DrawFn, *options: Any) -> Any:
    return draw(st.sampled_from(options))


def _scalings() -> st.SearchStrategy[RotaryScaling]:
    return st.sampled_from(
        [
            RotaryScaling(),
            RotaryScaling(kind="linear", factor=2.5),
            RotaryScaling(
                kind="llama3", factor=8.0, original_context_length=16, low_freq_factor=1.0, high_freq_factor=4.0
            ),
            RotaryScaling(
                kind="yarn",
                factor=4.0,
                original_context_length=32,
                beta_fast=3.0,
                beta_slow=0.5,
                attention_factor=1.1386,
                truncate=True,
            ),
            RotaryScaling(
                kind="yarn", factor=4.0, original_context_length=32, beta_fast=3.0, beta_slow=0.5, truncate=False
            ),
        ]
    )


@st.composite
def configs(draw: st.DrawFn, *, dropout: bool = True) -> ModelConfig:
    """Any valid ModelConfig in float64, small."""
    architecture = _pick(draw, "encoder", "decoder", "encoder-decoder")
    two = architecture == "encoder-decoder"
    positions = _pick(draw, "none", "sinusoidal", "learned", "rotary", "relative", "alibi")
    qk_norm = _pick(draw, "none", "none", "layernorm", "rmsnorm")
    key_dim = _pick(draw, 3, 4, 5, 6) if qk_norm != "none" else _pick(draw, 2, 3, 4, 6)
    A, G = _pick(draw, (1, 1), (2, 1), (2, 2), (3, 3), (4, 2), (6, 2), (6, 3))
    norm = _pick(draw, "layernorm", "rmsnorm")
    choices: dict[str, Any] = {}
    if positions in ("sinusoidal", "learned"):
        choices["position_offset"] = _pick(draw, 0, 0, 1, 2)
    if positions == "sinusoidal":
        choices["sinusoid_layout"] = _pick(draw, "interleaved", "halves")
        choices["sinusoid_spacing"] = _pick(draw, "textbook", "endpoint")
    if positions == "rotary":
        choices["rotary_dim"] = 2 * draw(st.integers(1, key_dim // 2))
        choices["rotary_convention"] = _pick(draw, "half", "interleaved")
        choices["rotary_base"] = _pick(draw, 10000.0, 500000.0, 37.0)
        choices["rotary_scaling"] = draw(_scalings())
    if positions == "relative":
        choices["relative_buckets"] = _pick(draw, 4, 8, 32)
        choices["relative_max_distance"] = _pick(draw, 17, 20, 128)
    if dropout and draw(st.booleans()):
        choices["dropout"] = _pick(draw, 0.0, 0.1, 0.5)
        choices["attention_dropout"] = _pick(draw, 0.0, 0.25)
        choices["hidden_dropout"] = _pick(draw, 0.0, 0.4)
    vocab_size = _pick(draw, 7, 11)
    head = _pick(draw, "tied", "untied", *(["none"] if architecture == "encoder" else []))
    if head != "none":
        choices["head_bias"] = draw(st.booleans())
        choices["head_scale"] = _pick(draw, None, 0.5)
        choices["head_softcap"] = _pick(draw, None, 2.0)
    if two:
        choices["share_embeddings"] = draw(st.booleans())
        choices["source_vocab_size"] = vocab_size if choices["share_embeddings"] else _pick(draw, 5, 13)
        choices["num_encoder_layers"] = _pick(draw, 1, 2)
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        context_length=_pick(draw, 6, 9),
        model_dim=_pick(draw, 3, 4, 5, 8, 12),
        key_dim=key_dim,
        value_dim=_pick(draw, 1, 2, 3, 4, key_dim),
        hidden_dim=_pick(draw, 1, 4, 5, 8, 12),
        num_heads=A,
        num_kv_heads=G,
        num_layers=_pick(draw, 1, 2),
        norm=norm,
        norm_eps=_pick(draw, 1e-5, 1e-6, 1e-12, 0.1),
        norm_bias=norm == "layernorm" and draw(st.booleans()),
        norm_weight=_pick(draw, "plain", "one_plus"),
        norm_cast=_pick(draw, "after_weight", "before_weight"),
        norm_placement=_pick(draw, "pre", "post"),
        final_norm=draw(st.booleans()),
        activation=_pick(draw, "relu", "gelu", "gelu_tanh", "silu"),
        gated=draw(st.booleans()),
        feedforward_bias=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        output_bias=draw(st.booleans()),
        attention_scale=_pick(draw, None, None, 0.3, 1.0),
        attention_softcap=_pick(draw, None, None, 1.5),
        qk_norm=qk_norm,
        window=_pick(draw, None, None, 1, 2, 3),
        positions=positions,
        remat=_pick(draw, False, False, False, True),
        embedding_scale=_pick(draw, None, 2.5),
        embedding_norm=draw(st.booleans()),
        num_token_types=_pick(draw, 0, 3) if architecture == "encoder" else 0,
        head=head,
        param_dtype="float64",
        compute_dtype="float64",
        **choices,
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A configuration with everything that one comparison of the twins needs."""
    config = draw(configs())
    rates = (config.dropout, config.attention_dropout, config.hidden_dropout)
    return Case(
        config=config,
        seed=draw(st.integers(0, 2**31 - 1)),
        batch=_pick(draw, 1, 3),
        lengths=(_pick(draw, 1, 4, 6), _pick(draw, 1, 3, 5)),
        padding=_pick(draw, "none", "right", "left", "holes", "empty"),
        explicit_positions=draw(st.booleans()),
        dropout_seed=draw(st.integers(0, 2**64 - 1)) if any(rates) and draw(st.booleans()) else None,
    )


def padding_of(kind: str, B: int, T: int, rng: np.random.Generator) -> Flags | None:
    """``[B, T]``, True = real token; None where nothing is padded."""
    if kind == "none":
        return None
    lengths = rng.integers(1, T + 1, B)
    columns = np.arange(T)
    if kind == "right":
        return columns < lengths[:, None]
    if kind == "left":
        return columns >= T - lengths[:, None]
    if kind == "holes":
        return rng.random((B, T)) < 0.7
    if kind == "empty":
        real = columns < lengths[:, None]
        real[-1] = False
        return real
    raise ValueError(f"padding: expected a known kind, got {kind!r}")


def inputs_of(case: Case) -> dict[str, Any]:
    """The model's arguments by name: NumPy arrays, or None."""
    config = case.config
    rng = np.random.default_rng(case.seed)
    T, S = case.lengths

    def sequence(length: int, vocabulary: int) -> tuple[Ids, Flags | None, Ids | None]:
        tokens = rng.integers(0, vocabulary, (case.batch, length))
        real = padding_of(case.padding, case.batch, length, rng)
        places = None
        if case.explicit_positions:
            rows = 1 if rng.random() < 0.3 else case.batch
            places = rng.integers(0, config.context_length, (rows, length))
        return tokens, real, places

    if config.architecture == "encoder-decoder":
        source, source_real, source_positions = sequence(S, config.source_vocab_size)
        target, target_real, target_positions = sequence(T, config.vocab_size)
        return {
            "source": source,
            "target": target,
            "source_padding_mask": source_real,
            "target_padding_mask": target_real,
            "source_positions": source_positions,
            "target_positions": target_positions,
        }
    tokens, real, places = sequence(T, config.vocab_size)
    arguments: dict[str, Any] = {"tokens": tokens, "padding_mask": real, "positions": places}
    if config.architecture == "encoder":
        types = None
        if config.num_token_types and rng.random() < 0.7:
            types = rng.integers(0, config.num_token_types, tokens.shape)
        arguments["token_types"] = types
    return arguments
