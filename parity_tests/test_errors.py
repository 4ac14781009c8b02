"""What a wrong call is told: expected and got, with numbers, all problems at once, in the same words by both twins.

One table: a call, the error, and what its text must hold. jaxtyping's hook is off, so that the project's own checks
are what is met. While a function is traced or compiled, values cannot be seen: an id out of range gives a NaN row then.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from parity_tests.helpers import FLAX, TORCH, assert_close, both, random_array, scatter_parameters, to_numpy
from parity_tests.modes import jitted, torch_compiled
from twinformer import ConfigError, InputError, ModelConfig, StackConfig, TwinformerError

pytestmark = pytest.mark.usefixtures("without_shape_hook")

SIZES = {"context_length": 6, "model_dim": 8, "key_dim": 4, "hidden_dim": 5, "num_heads": 2, "num_layers": 1}


def X(*shape, dtype=np.float32):
    return random_array(1, *shape).astype(dtype)


def ids(*shape, highest=9):
    return np.arange(np.prod(shape)).reshape(shape) % (highest + 1)


def attention(twin):
    return twin.file("attention").AttentionLayer(8, 4, 2)


def block(twin):
    return twin.file("block").Block(StackConfig(**SIZES))


def decoder_block(twin):
    return twin.file("block").Block(StackConfig(**SIZES), cross_attention=True)


def stack(twin):
    return twin.file("stack").TransformerStack(6, 8, 4, 5, 2, 1)


def model(architecture="decoder", **choices):
    config = ModelConfig(**(SIZES | {"architecture": architecture, "vocab_size": 10} | choices))
    return lambda twin: twin.file("models").build(config)


@dataclass
class Wrong:
    """``build(twin)`` is called with the arguments; the text of ``error`` must hold every one of ``says``."""

    build: Callable[[Any], Any]
    arguments: dict[str, Any]
    says: tuple[str, ...]
    problems: int = 1
    error: type[TwinformerError] = InputError


H = X(2, 3, 8)
CALLS = {
    # layers
    "rank 2": Wrong(attention, {"X": X(3, 8)}, ("AttentionLayer", "X: expected rank 3 [B, T, D]", "(3, 8)")),
    "rank 4": Wrong(stack, {"X": X(1, 2, 3, 8)}, ("TransformerStack", "rank 3", "(1, 2, 3, 8)")),
    "width": Wrong(block, {"X": X(2, 3, 7)}, ("Block", "width D=8", "got 7 in shape (2, 3, 7)")),
    "no positions": Wrong(block, {"X": X(2, 0, 8)}, ("at least one position", "(2, 0, 8)")),
    "whole numbers for X": Wrong(attention, {"X": np.zeros((2, 3, 8), np.int64)}, ("X: expected a float", "int64")),
    "boolean X": Wrong(stack, {"X": np.zeros((2, 3, 8), bool)}, ("X: expected a float dtype, got bool",)),
    "too long": Wrong(stack, {"X": X(1, 7, 8)}, ("at most context_length=6", "got T=7")),
    "H_enc of another width": Wrong(attention, {"X": X(2, 3, 8), "H_enc": X(2, 3, 6)}, ("H_enc", "D=8", "got 6")),
    "H_enc of another batch": Wrong(
        attention, {"X": X(2, 3, 8), "H_enc": X(3, 4, 8)}, ("H_enc: expected the batch of X, B=2, got 3", "(3, 4, 8)")
    ),
    "missing H_enc": Wrong(decoder_block, {"X": X(2, 3, 8)}, ("H_enc: expected encoder states", "got None")),
    "H_enc where there is no cross-attention": Wrong(
        stack, {"X": X(2, 3, 8), "H_enc": H}, ("H_enc: expected None", "no cross-attention")
    ),
    "memory_mask without H_enc": Wrong(
        attention, {"X": X(2, 3, 8), "memory_mask": np.ones((2, 1, 1, 3), bool)}, ("memory_mask: expected None",)
    ),
    "mask of whole numbers": Wrong(
        attention, {"X": X(2, 3, 8), "mask": np.ones((3, 3), np.int64)}, ("mask: expected bool", "got int64")
    ),
    "memory_mask of whole numbers": Wrong(
        decoder_block,
        {"X": X(2, 4, 8), "H_enc": H, "memory_mask": np.ones((2, 1, 4, 3), np.int32)},
        ("memory_mask: expected bool", "got int32"),
    ),
    "mask of the wrong shape": Wrong(
        block, {"X": X(2, 3, 8), "mask": np.ones((2, 3), bool)}, ("(2, 2, 3, 3)", "got (2, 3)")
    ),
    "mask of five axes": Wrong(
        stack, {"X": X(2, 3, 8), "mask": np.ones((1, 2, 2, 3, 3), bool)}, ("mask", "broadcasts")
    ),
    "memory_mask of X's length": Wrong(
        decoder_block,
        {"X": X(2, 4, 8), "H_enc": H, "memory_mask": np.ones((2, 1, 4, 4), bool)},
        ("memory_mask", "(2, 2, 4, 3)", "got (2, 1, 4, 4)"),
    ),
    "boolean bias": Wrong(
        block, {"X": X(2, 3, 8), "bias": np.ones((1, 2, 3, 3), bool)}, ("bias: expected a float dtype, got bool",)
    ),
    "positions of the wrong length": Wrong(
        block, {"X": X(2, 3, 8), "positions": ids(2, 4)}, ("positions: expected shape [B or 1, T]", "got (2, 4)")
    ),
    "fractional positions": Wrong(
        stack, {"X": X(2, 3, 8), "positions": X(2, 3)}, ("positions: expected whole numbers", "float32")
    ),
    "all at once": Wrong(
        attention,
        {"X": X(2, 3, 7), "H_enc": np.zeros((3, 4), np.int32), "memory_mask": np.ones(3, bool)},
        ("width D=8", "H_enc: expected rank 3 [B, S, D]", "H_enc: expected a float dtype, got int32"),
        problems=3,
    ),
    # models
    "a token too high": Wrong(
        model(), {"tokens": np.array([[0, 10]])}, ("tokens: expected ids from 0 to 9", "0 to 10")
    ),
    "a negative token": Wrong(model(), {"tokens": np.array([[-1, 9]])}, ("from 0 to 9", "from -1 to 9")),
    "one axis of tokens": Wrong(model(), {"tokens": ids(4)}, ("tokens: expected rank 2 [B, T]", "(4,)")),
    "fractional tokens": Wrong(model(), {"tokens": X(2, 3)}, ("tokens: expected whole numbers", "float32")),
    "too many tokens": Wrong(model(), {"tokens": ids(1, 7)}, ("LanguageModel", "context_length=6", "T=7")),
    "no tokens": Wrong(model(), {"tokens": np.zeros((1, 0), np.int64)}, ("at least one position", "T=0")),
    "padding mask of whole numbers": Wrong(
        model(),
        {"tokens": ids(2, 3), "padding_mask": np.ones((2, 3), np.int64)},
        ("padding_mask: expected bool", "int64"),
    ),
    "padding mask of another shape": Wrong(
        model(), {"tokens": ids(2, 3), "padding_mask": np.ones((2, 4), bool)}, ("[B, T] = (2, 3)", "got (2, 4)")
    ),
    "a position too high": Wrong(
        model(positions="learned"),
        {"tokens": ids(1, 3), "positions": np.array([[0, 1, 6]])},
        ("positions: expected ids from 0 to 5", "from 0 to 6"),
    ),
    "token types of a model without": Wrong(
        model("encoder"), {"tokens": ids(1, 3), "token_types": ids(1, 3, highest=1)}, ("token_types: expected None",)
    ),
    "a token type too high": Wrong(
        model("encoder", num_token_types=2),
        {"tokens": ids(1, 3), "token_types": np.array([[0, 1, 2]])},
        ("token_types: expected ids from 0 to 1", "from 0 to 2"),
    ),
    "a source token too high": Wrong(
        model("encoder-decoder", source_vocab_size=5),
        {"source": np.array([[5, 1]]), "target": np.array([[9, 1]])},
        ("source: expected ids from 0 to 4", "from 1 to 5"),
    ),
    "a target token too high": Wrong(
        model("encoder-decoder"), {"source": ids(1, 2), "target": np.array([[0, 11]])}, ("target: expected", "0 to 11")
    ),
    "source padding of another shape": Wrong(
        model("encoder-decoder"),
        {"source": ids(2, 3), "target": ids(2, 4), "source_padding_mask": np.ones((2, 4), bool)},
        ("source_padding_mask", "(2, 3)", "(2, 4)"),
    ),
    "all of a model's at once": Wrong(
        model(positions="learned"),
        {
            "tokens": np.full((2, 7), 12),
            "padding_mask": np.ones((2, 6), np.int32),
            "positions": np.full((3, 7), -1),
        },
        ("from 12 to 12", "T=7", "(2, 6)", "int32", "(3, 7)", "from -1 to -1"),
        problems=6,
    ),
    # parts
    "width of a norm": Wrong(
        lambda twin: twin.file("norms").LayerNorm(8), {"X": X(2, 7)}, ("LayerNorm", "[..., 8]", "(2, 7)")
    ),
    "width of a feed-forward": Wrong(
        lambda twin: twin.file("feedforward").FeedForward(8, 5), {"X": X(2, 3, 9)}, ("FeedForward", "8", "(2, 3, 9)")
    ),
    "too long for the encoding": Wrong(
        lambda twin: twin.file("positions").PositionalEncoding(8, max_len=4), {"X": X(1, 5, 8)}, ("max_len=4", "T=5")
    ),
}


def given(twin, arguments):
    return {name: twin.array(value) for name, value in arguments.items()}


@pytest.mark.parametrize("wrong", CALLS.values(), ids=CALLS)
def test_a_wrong_call(wrong):
    texts = []
    for twin in (TORCH, FLAX):
        built = wrong.build(twin)
        with pytest.raises(wrong.error) as caught:
            built(**given(twin, wrong.arguments))
        assert len(caught.value.problems) == wrong.problems, str(caught.value)
        for words in wrong.says:
            assert words in str(caught.value), str(caught.value)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


# ---- constructors


CONSTRUCTORS = {
    "no heads": (lambda t: t.file("attention").AttentionLayer(8, 4, 0), InputError, ("num_heads", "got 0")),
    "fractional width": (
        lambda t: t.file("attention").AttentionLayer(8, 4.5, 2),
        InputError,
        ("key_dim: expected a whole number", "4.5"),
    ),
    "unknown choice": (
        lambda t: t.file("stack").TransformerStack(6, 8, 4, 5, 2, 1, nrom="rmsnorm"),
        ConfigError,
        ("nrom",),
    ),
    "contradictory choice": (
        lambda t: t.file("stack").TransformerStack(6, 8, 4, 5, 2, 1, norm="rmsnorm", num_kv_heads=3),
        ConfigError,
        ("norm_bias: expected False with norm='rmsnorm'", "num_kv_heads: expected a divisor of num_heads=2, got 3"),
    ),
    "another architecture": (
        lambda t: t.file("models").LanguageModel(ModelConfig(**SIZES, architecture="encoder", vocab_size=10)),
        ConfigError,
        ("architecture", "'decoder'", "'encoder'"),
    ),
    "an encoder for two stacks": (
        lambda t: t.file("models").EncoderModel(ModelConfig(**SIZES, architecture="encoder-decoder", vocab_size=9)),
        ConfigError,
        ("architecture", "'encoder'", "'encoder-decoder'"),
    ),
    "two stacks for a decoder": (
        lambda t: t.file("models").EncoderDecoder(ModelConfig(**SIZES, architecture="decoder", vocab_size=10)),
        ConfigError,
        ("architecture", "'encoder-decoder'", "'decoder'"),
    ),
    "heads that do not divide": (
        lambda t: t.file("attention").AttentionLayer(8, 4, 4, num_kv_heads=3),
        TwinformerError,
        ("num_kv_heads", "4", "3"),
    ),
    "linear of no width": (lambda t: t.file("linear").Linear(0, 3), InputError, ("in_dim", "got 0")),
    "unknown activation": (
        lambda t: t.file("feedforward").FeedForward(8, 4, activation="swish"),
        TwinformerError,
        ("activation", "'swish'"),
    ),
    "seed below zero": (lambda t: t.file("dropout").random_key(-1), TwinformerError, ("seed", "-1")),
    "rate of one": (lambda t: t.file("dropout").Dropout(1.0), TwinformerError, ("rate", "1.0")),
}


@pytest.mark.parametrize(("construct", "error", "says"), CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_a_wrong_construction(construct, error, says):
    texts = []
    for twin in (TORCH, FLAX):
        with pytest.raises(error) as caught:
            construct(twin)
        for words in says:
            assert words in str(caught.value), str(caught.value)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_contradictory_config():
    """Every problem of a configuration in one error."""
    with pytest.raises(ConfigError) as caught:
        ModelConfig(
            **(SIZES | {"num_heads": 3}),
            architecture="decoder",
            vocab_size=0,
            num_kv_heads=2,
            norm="rmsnorm",
            window=0,
            positions="rotary",
            rotary_dim=3,
            dropout=1.0,
            share_embeddings=True,
            num_token_types=2,
        )
    named = {problem.partition(":")[0] for problem in caught.value.problems}
    assert named == {
        "vocab_size",
        "num_kv_heads",
        "norm_bias",
        "window",
        "rotary_dim",
        "dropout",
        "share_embeddings",
        "num_token_types",
    }


@both
def test_checks_come_before_arithmetic(twin):
    """A model that is told nothing wrong says nothing: each right call of the table's builders passes."""
    right = [
        (attention, {"X": X(2, 3, 8), "mask": np.ones((3, 3), bool)}),
        (decoder_block, {"X": X(2, 4, 8), "H_enc": H, "memory_mask": np.ones((2, 1, 4, 3), bool)}),
        (stack, {"X": X(2, 6, 8), "positions": ids(1, 6), "bias": X(1, 2, 6, 6)}),
        (model(positions="learned"), {"tokens": ids(2, 3), "padding_mask": np.ones((2, 3), bool)}),
        (model("encoder", num_token_types=2), {"tokens": ids(2, 3), "token_types": ids(2, 3, highest=1)}),
    ]
    for build, arguments in right:
        assert np.isfinite(to_numpy(build(twin)(**given(twin, arguments)))).all()


# ---- values that cannot be seen


TRACED = pytest.mark.parametrize(("twin", "call"), [(TORCH, torch_compiled), (FLAX, jitted)], ids=["torch", "flax"])


@TRACED
def test_ids_out_of_range_give_nan_rows_when_traced(twin, call):
    """A table's row is NaN for -1, for V and beyond: no other row's value, and the other rows are right."""
    table = twin.file("embeddings").TokenEmbedding(10, 8)
    scatter_parameters(table, 3)
    tokens = np.array([[0, 9, 10, 3], [-1, 5, 1000, -10]])
    out = to_numpy(call(table, ids=twin.array(tokens)))
    wrong = (tokens < 0) | (tokens > 9)
    assert np.isnan(out[wrong]).all()
    assert_close(out[~wrong], to_numpy(table(twin.array(tokens[~wrong][None])))[0], 0.0)
    with pytest.raises(InputError, match="from -10 to 1000"):
        table(twin.array(tokens))


@TRACED
@torch.no_grad()  # a compiler would make the backward program as well
def test_a_bad_token_spoils_its_own_row_and_what_sees_it(twin, call):
    """Through a causal model: tokens before the bad one are right, itself and those after are NaN."""
    built = model(positions="learned", head="untied")(twin)
    scatter_parameters(built, 4)
    tokens = np.array([[1, 2, 77, 3], [4, 5, 6, 7]])
    out = to_numpy(call(built, tokens=twin.array(tokens)))
    right = to_numpy(built(twin.array(np.where(tokens > 9, 0, tokens))))
    assert np.isnan(out[0, 2:]).all()
    assert_close(out[0, :2], right[0, :2], 1e-5)
    assert_close(out[1], right[1], 1e-5)


@TRACED
def test_positions_out_of_range_give_nan_rows_when_traced(twin, call):
    table = twin.file("positions").LearnedPositions(6, 8, offset=2)
    scatter_parameters(table, 5)
    positions = np.array([[0, 3, 4, -1, -2, -3]])  # rows 2 … 5 are positions 0 … 3
    out = to_numpy(call(table, positions=twin.array(positions)))
    wrong = (positions < 0) | (positions > 3)
    assert np.isnan(out[wrong]).all()
    assert np.isfinite(out[~wrong]).all()
    with pytest.raises(InputError, match="from -3 to 4"):
        table(twin.array(positions))


@both
def test_compiled_models_check_what_is_concrete(twin):
    """``compiled`` is called with concrete arrays: it refuses an id out of range instead of giving NaN."""
    built = model()(twin)
    run = twin.file("models").compiled(built)
    said = []
    for call in (run, built):
        with pytest.raises(InputError) as caught:
            call(twin.array(np.array([[0, 10]])))
        said.append(str(caught.value))
    assert said[0] == said[1]
