"""Initial weights: the same bits in both twins, independent by path, with the statistics that their names promise."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from parity_tests.helpers import assert_close, both, parameters
from twinformer import initializers
from twinformer.config import ModelConfig
from twinformer.initializers import draw_weights, initial_weights, stream
from twinformer.parameters import Parameter, model_parameters

WIDE = Parameter((300, 700), "linear")  # 210 000 values; not square, so that fan-in and fan-out differ
COUNT = 300 * 700
DOWN = Parameter((300, 700), "linear", residual=True)
TABLE = Parameter((300, 700), "embedding")


def draw_one(parameter, seed=0, path="w", **choices):
    return draw_weights({path: parameter}, seed, **choices)[path]


def small_config(**changes):
    sizes = {"context_length": 8, "model_dim": 12, "key_dim": 4, "hidden_dim": 10, "num_heads": 3, "num_layers": 2}
    return ModelConfig(**(sizes | {"architecture": "decoder", "vocab_size": 11, "dropout": 0.1} | changes))


# ---- the twins


@both
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_weight": "one_plus", "positions": "learned", "head": "untied", "head_bias": True, "qkv_bias": True},
        {"architecture": "encoder-decoder", "positions": "relative", "initializer": "xavier_uniform"},
        {"initializer": "truncated_normal", "initializer_scale_residual": True, "embedding_norm": True},
    ],
    ids=["plain", "everything", "two stacks", "truncated"],
)
def test_models_hold_the_drawn_bits(twin, changes):
    config = small_config(**changes)
    model = twin.file("models").build(config, seed=7)
    held = parameters(model)
    assert_close(held, initial_weights(config, 7), rtol=0)
    other = parameters(twin.file("models").build(config, seed=8))
    drawn = [p for p, parameter in model_parameters(config).items() if parameter.kind in ("linear", "embedding")]
    assert all((held[path] != other[path]).mean() > 0.99 for path in drawn)


@both
def test_model_in_another_dtype_holds_the_same_values_rounded(twin):
    config = small_config().with_dtype("bfloat16")
    held = parameters(twin.file("models").build(config, seed=7))
    drawn = initial_weights(config, 7)
    assert_close(held, {path: value.astype(held[path].dtype) for path, value in drawn.items()}, rtol=0)
    assert {str(value.dtype) for value in held.values()} == {"bfloat16"}


@both
def test_building_blocks_are_xavier_uniform_by_path(twin):
    """A FeedForward on its own: each path from its own root, Glorot & Bengio's bound, biases 0."""
    layer = twin.file("feedforward").FeedForward(5, 7, gated=True, seed=3)
    shapes = {
        "up.weight": Parameter((7, 5), "linear"),
        "up.bias": Parameter((7,), "bias"),
        "gate.weight": Parameter((7, 5), "linear"),
        "gate.bias": Parameter((7,), "bias"),
        "down.weight": Parameter((5, 7), "linear", residual=True),
        "down.bias": Parameter((5,), "bias"),
    }
    assert_close(parameters(layer), draw_weights(shapes, 3, initializer="xavier_uniform"), rtol=0)
    assert not np.array_equal(parameters(layer)["up.weight"], parameters(layer)["gate.weight"])


@both
def test_seed_none_leaves_zeros(twin):
    for held in (
        parameters(twin.file("feedforward").FeedForward(5, 7, seed=None)),
        parameters(twin.file("models").build(small_config(), seed=None)),
    ):
        assert all((value == 0).all() for value in held.values())


# ---- streams


def test_each_path_has_its_own_stream():
    """Adding, removing or reordering parameters leaves all others as they were."""
    config = small_config()
    drawn = initial_weights(config, 5)
    deeper = initial_weights(config.replace(num_layers=3, qkv_bias=True, head="untied"), 5)
    assert set(drawn) < set(deeper)
    assert_close({path: deeper[path] for path in drawn}, drawn, rtol=0)
    wanted = model_parameters(config)
    assert_close(draw_weights(dict(reversed(wanted.items())), 5, initializer="normal"), drawn, rtol=0)


def test_paths_and_seeds_are_independent():
    by_path = [draw_one(WIDE, path=path) for path in ("blocks.0.w", "blocks.1.w", "blocks.0.v")]
    by_seed = [draw_one(WIDE, seed=seed, path="blocks.0.w") for seed in (1, 2, 2**63)]
    found = np.corrcoef(np.stack([values.ravel() for values in by_path + by_seed]).astype(np.float64))
    between = found[~np.eye(len(found), dtype=bool)]
    assert np.abs(between).max() < 5 / math.sqrt(COUNT)


def test_seed_and_path_do_not_run_together():
    """Seed 1 with path "1/w" is another stream than seed 11 with "/w" or seed 1 with "w"."""
    drawn = [stream(seed, path).random() for seed, path in ((1, "1/w"), (11, "/w"), (1, "w"), (11, "w"), (1, "1w"))]
    assert len(set(drawn)) == 5


def test_same_seed_same_bits():
    assert_close(draw_one(WIDE, seed=4), draw_one(WIDE, seed=4), rtol=0)


def test_the_stream_has_not_changed():
    """These figures were written down once: a checkpoint-free run must start the same in every later version."""
    first = [[-1.1598123, 1.0853945], [0.9017096, 0.9543068]]
    assert_close(draw_one(Parameter((2, 2), "linear"), seed=0), np.array(first, np.float32), rtol=1e-7)


# ---- statistics: each bound is five standard errors of the figure that it bounds


def test_normal():
    values = draw_one(WIDE, initializer="normal", std=0.03).astype(np.float64) / 0.03
    assert abs(values.mean()) < 5 / math.sqrt(COUNT)
    assert abs(values.std() - 1) < 5 / math.sqrt(2 * COUNT)
    assert np.abs(values).max() > 4  # not cut off
    assert stats.kstest(values.ravel(), stats.norm.cdf).pvalue > 1e-3


def test_truncated_normal_has_the_asked_for_standard_deviation():
    """Cut off at two standard deviations of the normal that was cut, then widened so that what results has ``std``."""
    std = 0.03
    values = draw_one(WIDE, initializer="truncated_normal", std=std).astype(np.float64)
    parent = std / stats.truncnorm.std(-2, 2)
    assert abs(values.mean()) < 5 * std / math.sqrt(COUNT)
    # relative standard error of a standard deviation: sqrt((kurtosis - 1) / 4n), smaller than the normal's
    assert abs(values.std() / std - 1) < 5 / math.sqrt(2 * COUNT)
    assert 1.99 * parent < np.abs(values).max() <= 2 * parent * (1 + 1e-6)
    assert stats.kstest(values.ravel() / parent, stats.truncnorm(-2, 2).cdf).pvalue > 1e-3


def test_truncated_normal_can_fail(monkeypatch):
    """Without the compensation the standard deviation is 0.88 of what was asked for."""
    monkeypatch.setattr(initializers, "_TRUNCATED_STD", 1.0)
    with pytest.raises(AssertionError):
        test_truncated_normal_has_the_asked_for_standard_deviation()


def test_xavier_uniform():
    """Glorot & Bengio 2010, eq. 16: U(-a, a) with a = sqrt(6 / (in + out)) = sqrt(6/1000)."""
    values = draw_one(WIDE, initializer="xavier_uniform").astype(np.float64)
    bound = math.sqrt(0.006)
    assert 0.9999 * bound < values.max() <= bound * (1 + 1e-6)
    assert -0.9999 * bound > values.min() >= -bound * (1 + 1e-6)
    assert abs(values.mean()) < 5 * bound / math.sqrt(3 * COUNT)
    assert abs(values.var() / (bound**2 / 3) - 1) < 5 * math.sqrt(0.8 / COUNT)
    assert stats.kstest(values.ravel(), stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    ("initializer", "cut"), [("normal", False), ("xavier_uniform", False), ("truncated_normal", True)]
)
def test_embeddings_are_normal_whatever_the_matrices_are(initializer, cut):
    values = draw_one(TABLE, initializer=initializer, std=0.05).astype(np.float64)
    assert abs(values.std() / 0.05 - 1) < 5 / math.sqrt(2 * COUNT)
    assert (np.abs(values).max() <= 2 * 0.05 / 0.879) == cut


def test_norms_start_as_the_identity_and_biases_at_zero():
    norm, bias = Parameter((5,), "norm"), Parameter((5,), "bias")
    for initializer in ("normal", "truncated_normal", "xavier_uniform"):
        assert_close(draw_one(norm, initializer=initializer), np.ones(5, np.float32), rtol=0)
        assert_close(draw_one(norm, initializer=initializer, norm_weight="one_plus"), np.zeros(5, np.float32), rtol=0)
        assert_close(draw_one(bias, initializer=initializer), np.zeros(5, np.float32), rtol=0)


@pytest.mark.parametrize("initializer", ["normal", "truncated_normal", "xavier_uniform"])
def test_residual_scale(initializer):
    """Only the matrices that add to the residual stream, and by the factor exactly (one float32 rounding)."""
    plain = draw_one(DOWN, initializer=initializer)
    scaled = draw_one(DOWN, initializer=initializer, residual_scale=0.3)
    assert_close(scaled.astype(np.float64), plain.astype(np.float64) * 0.3, rtol=2.0**-23)
    assert_close(draw_one(WIDE, initializer=initializer, residual_scale=0.3), plain, rtol=0)


def test_residual_scale_of_a_model_is_gpt2s():
    """Radford et al. 2019: 1/sqrt(N) with N residual layers, two to a block; 1/sqrt(2·2) = 1/2 here, exactly."""
    config = small_config()
    plain = initial_weights(config, 1)
    scaled = initial_weights(config.replace(initializer_scale_residual=True), 1)
    smaller = {path for path in plain if not np.array_equal(plain[path], scaled[path])}
    assert smaller == {
        f"stack.blocks.{i}.{name}.weight" for i in (0, 1) for name in ("attention.output", "feedforward.down")
    }
    for path in smaller:
        assert_close(scaled[path], plain[path] / 2, rtol=0)


def test_float32_in_pytorchs_orientation():
    config = small_config()
    drawn = initial_weights(config, 0)
    assert {value.dtype.name for value in drawn.values()} == {"float32"}
    assert drawn["stack.blocks.0.feedforward.up.weight"].shape == (10, 12)
    assert drawn["embedding.tokens.weight"].shape == (11, 12)
    assert {path: value.shape for path, value in drawn.items()} == {
        path: parameter.shape for path, parameter in model_parameters(config).items()
    }
    assert dataclasses.asdict(Parameter((1,), "bias"))["residual"] is False
