"""Random members of the whole space of ModelConfig, at small sizes, with inputs for them.

Every choice is drawn freely; sizes are drawn as one of a few sets, because JAX compiles each operation once for each
shape that it meets, and that is where the time goes. In most sets D, A·K, G·K, A·J and F all differ, so that a
transposition or a wrong reshape shows; one is all squares, where only values can show it. Widths that a norm divides
by their own spread are at least 3 (at 1 or 2 a LayerNorm gives ±1 or 0 whatever comes in: its true gradient is zero
and only rounding noise is left to compare). For the same reason branches of one or two dimensions have no norm at
their end: what a single number scales, an RMSNorm makes the same whatever the number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from twinformer.config import ModelConfig, RotaryScaling

Ids = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Sizes:
    """B, T, S and the sizes of a configuration."""

    batch: int
    T: int
    S: int
    config: dict[str, int]


def _sizes(B: int, T: int, S: int, N: int, D: int, K: int, J: int, F: int, A: int, G: int, V: int) -> Sizes:
    config = {"context_length": N, "model_dim": D, "key_dim": K, "value_dim": J, "hidden_dim": F}
    return Sizes(B, T, S, config | {"num_heads": A, "num_kv_heads": G, "vocab_size": V})


SIZES = [
    _sizes(B=2, T=5, S=4, N=9, D=8, K=4, J=3, F=12, A=6, G=2, V=11),
    _sizes(B=3, T=4, S=6, N=6, D=5, K=3, J=5, F=4, A=2, G=1, V=7),
    _sizes(B=2, T=6, S=3, N=8, D=6, K=6, J=2, F=9, A=3, G=3, V=13),
    _sizes(B=2, T=4, S=4, N=8, D=8, K=4, J=4, F=8, A=2, G=2, V=8),  # every matrix is square
    _sizes(B=1, T=1, S=1, N=4, D=7, K=5, J=1, F=2, A=1, G=1, V=5),
]


@dataclass(frozen=True)
class Case:
    """A configuration and what its draw of weights and inputs depends on: enough to run it again."""

    config: ModelConfig
    seed: int
    sizes: Sizes
    padding: str  # "none", "right", "left", "holes", "empty" (one row of the batch has no real token)
    explicit_positions: bool
    dropout_seed: int | None


SCALINGS = [
    RotaryScaling(),
    RotaryScaling(kind="linear", factor=2.5),
    RotaryScaling(kind="llama3", factor=8.0, original_context_length=16, low_freq_factor=1.0, high_freq_factor=4.0),
    RotaryScaling(
        kind="yarn",
        factor=4.0,
        original_context_length=32,
        beta_fast=3.0,
        beta_slow=0.5,
        attention_factor=1.1386,
        truncate=True,
    ),
    RotaryScaling(kind="yarn", factor=4.0, original_context_length=32, beta_fast=3.0, beta_slow=0.5, truncate=False),
]

Pick = Callable[..., Any]  # one of its arguments


def _config(pick: Pick, sizes: Sizes) -> ModelConfig:
    key_dim, vocab_size = sizes.config["key_dim"], sizes.config["vocab_size"]
    architecture = pick("encoder", "decoder", "encoder-decoder")
    two = architecture == "encoder-decoder"
    positions = pick("none", "sinusoidal", "learned", "rotary", "relative", "alibi")
    norm = pick("layernorm", "rmsnorm")
    choices: dict[str, Any] = {}
    if positions in ("sinusoidal", "learned"):
        choices["position_offset"] = pick(0, 0, 1, 2)
    if positions == "sinusoidal":
        choices["sinusoid_layout"] = pick("interleaved", "halves")
        choices["sinusoid_spacing"] = pick("textbook", "endpoint")
    if positions == "rotary":
        choices["rotary_dim"] = pick(*range(2, key_dim + 1, 2))
        choices["rotary_convention"] = pick("half", "interleaved")
        choices["rotary_base"] = pick(10000.0, 500000.0, 37.0)
        choices["rotary_scaling"] = pick(*SCALINGS)
    if positions == "relative":
        choices["relative_buckets"] = pick(4, 8, 32)
        choices["relative_max_distance"] = pick(17, 20, 128)
    for place in ("dropout", "attention_dropout", "hidden_dropout"):
        choices[place] = pick(0.0, 0.0, 0.0, 0.3)
    choices["embedding_dropout"] = pick(None, None, 0.0, 0.2)
    head = pick("tied", "untied", *([] if two else ["none", "pooled", "sequence", "tokens"]))
    if head in ("tied", "untied"):
        choices["head_bias"] = pick(False, True)
        choices["head_scale"] = pick(None, 0.5)
        choices["head_softcap"] = pick(None, 2.0)
        choices["head_transform"] = pick(False, False, True)
    if head in ("sequence", "tokens"):
        choices["num_labels"] = pick(1, 3)
        choices["head_bias"] = pick(False, True)
        choices["head_dropout"] = pick(0.0, 0.0, 0.3)
    if head in ("pooled", "sequence"):
        choices["pool"] = pick("first", "last", "mean", "max")
        choices["pooler"] = pick("none", "tanh", "relu")
    if head == "pooled":
        choices["pool_normalize"] = pick(False, True)
    branch = min(sizes.config["num_heads"] * sizes.config["value_dim"], sizes.config["hidden_dim"])
    placements = ["pre", "post", *(["sandwich"] if branch >= 3 else [])]
    num_layers, window = pick(1, 1, 2, 3), pick(None, None, 1, 2, 3)
    if window is not None and num_layers > 1 and not two:
        choices["window_layers"] = pick(None, (0,), (num_layers - 1,))
    if window is not None and positions == "rotary":
        choices["window_rotary_base"] = pick(None, 50.0)
    if two:
        choices["share_embeddings"] = pick(False, True)
        choices["source_vocab_size"] = vocab_size if choices["share_embeddings"] else vocab_size + 2
        choices["num_encoder_layers"] = pick(1, 1, 2)
    return ModelConfig(
        architecture=architecture,
        num_layers=num_layers,
        norm=norm,
        norm_eps=pick(1e-5, 1e-6, 1e-12, 0.1),
        norm_bias=norm == "layernorm" and pick(False, True),
        norm_weight=pick("plain", "one_plus"),
        norm_cast=pick("after_weight", "before_weight"),
        norm_placement=pick(*placements),
        final_norm=pick(False, True),
        activation=pick("relu", "gelu", "gelu_tanh", "silu"),
        gated=pick(False, True),
        feedforward_bias=pick(False, True),
        qkv_bias=pick(False, True),
        output_bias=pick(False, True),
        attention_scale=pick(None, None, 0.3, 1.0),
        attention_softcap=pick(None, None, 1.5),
        qk_norm=pick("none", "none", "layernorm", "rmsnorm"),
        window=window,
        positions=positions,
        remat=pick(*[False] * 7, True),
        scan_layers=pick(*[False] * 3, True),
        embedding_scale=pick(None, 2.5),
        embedding_norm=pick(False, True),
        num_token_types=pick(0, 3) if architecture == "encoder" else 0,
        head=head,
        param_dtype="float64",
        compute_dtype="float64",
        position_counting=pick("real", "real", "places"),
        **sizes.config,
        **choices,
    )


def _case(pick: Pick) -> Case:
    sizes = pick(*SIZES)
    config = _config(pick, sizes)
    rates = (config.dropout, config.attention_dropout, config.hidden_dropout)
    rates += (config.embedding_dropout or 0.0, config.head_dropout)
    return Case(
        config=config,
        seed=pick(*range(1000)),
        sizes=sizes,
        padding=pick("none", "right", "left", "holes", "empty"),
        explicit_positions=pick(False, True),
        dropout_seed=pick(5, 2**63 + 11) if any(rates) else None,
    )


def _picker(draw: st.DrawFn) -> Pick:
    return lambda *options: draw(st.sampled_from(options))


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Any valid ModelConfig in float64, of one of ``SIZES``."""
    return _config(_picker(draw), draw(st.sampled_from(SIZES)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A configuration with everything that one comparison of the twins needs."""
    return _case(_picker(draw))


def seeded_cases(count: int, seed: int) -> list[Case]:
    """Cases of the same space, each drawn by itself: hypothesis likes to repeat itself with small changes."""
    rng = np.random.default_rng(seed)
    return [_case(lambda *options: options[rng.integers(len(options))]) for _ in range(count)]


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
    B, T, S = case.sizes.batch, case.sizes.T, case.sizes.S

    def sequence(length: int, vocabulary: int) -> tuple[Ids, Flags | None, Ids | None]:
        tokens = rng.integers(0, vocabulary, (B, length))
        real = padding_of(case.padding, B, length, rng)
        places = None
        if case.explicit_positions:
            rows = 1 if rng.random() < 0.3 else B
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
