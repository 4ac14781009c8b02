"""LayerNorm and RMSNorm: by hand, against both frameworks' own, and where each convention shows."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx

from parity_tests.helpers import (
    FLAX,
    FLOAT64,
    TORCH,
    assert_close,
    assert_twins_agree,
    both,
    gradients,
    parameters,
    random_array,
    scatter_parameters,
    set_parameters,
    to_numpy,
)
from twinformer.config import StackConfig
from twinformer.errors import InputError

NORMS = ["LayerNorm", "RMSNorm"]
BF16 = ml_dtypes.bfloat16


def build(twin, name, width, **choices):
    return getattr(twin.file("norms"), name)(width, **(FLOAT64 | choices))


def normalised(name, x, eps):
    """Book, "Layer norm" (population variance, in two passes); Zhang & Sennrich 2019 for RMSNorm."""
    x = np.asarray(x, np.float64)
    if name == "RMSNorm":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)


def hard_rows():
    """Plain, far from zero against the spread, spread near sqrt(eps), constant, zero, large."""
    rows = random_array(1, 6, 7)
    rows[1] = 1000.0 + 1e-2 * rows[1]
    rows[2] *= 3e-3
    rows[3] = 2.5
    rows[4] = 0.0
    rows[5] *= 1e4
    return rows.reshape(2, 3, 7)


@both
def test_layernorm_by_hand(twin):
    """Mean 3, population variance ((-2)² + 0 + 2² + 0)/4 = 2; with eps 2 the divisor is 2."""
    layer = build(twin, "LayerNorm", 4, eps=2.0)
    set_parameters(layer, {"weight": np.array([1.0, 2.0, 3.0, 4.0]), "bias": np.array([10.0, 20.0, 30.0, 40.0])})
    # (x - 3)/2 = -1, 0, 1, 0
    assert_close(layer(twin.array(np.array([1.0, 3.0, 5.0, 3.0]))), np.array([9.0, 20.0, 33.0, 40.0]))


@both
def test_rmsnorm_by_hand(twin):
    """Mean square (1 + 49 + 1 + 9)/4 = 15; with eps 1 the divisor is 4."""
    layer = build(twin, "RMSNorm", 4, eps=1.0)
    set_parameters(layer, {"weight": np.array([1.0, 2.0, 3.0, 4.0])})
    assert_close(layer(twin.array(np.array([1.0, 7.0, -1.0, 3.0]))), np.array([0.25, 3.5, -0.75, 3.0]))
    plus = build(twin, "RMSNorm", 4, eps=1.0, weight="one_plus")
    set_parameters(plus, {"weight": np.array([1.0, 2.0, 3.0, 4.0])})
    assert_close(plus(twin.array(np.array([1.0, 7.0, -1.0, 3.0]))), np.array([0.5, 5.25, -1.0, 3.75]))


@both
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("weight", ["plain", "one_plus"])
@pytest.mark.parametrize("cast", ["after_weight", "before_weight"])
def test_against_the_equations(twin, name, weight, cast):
    """In float64 the place of the cast changes nothing."""
    layer = build(twin, name, 7, eps=1e-5, weight=weight, cast=cast)
    held = scatter_parameters(layer, seed=3)
    X = hard_rows()
    factor = held["weight"] + (1 if weight == "one_plus" else 0)
    expected = normalised(name, X, 1e-5) * factor + held.get("bias", 0.0)
    for row in np.ndindex(2, 3):  # each row by its own size: a large one would hide the others
        assert_close(to_numpy(layer(twin.array(X)))[row], expected[row], rtol=1e-10 if row == (0, 1) else 1e-12)


def witness_of(name, eps, held, framework):
    """The framework's own layer with the same weights, as a function of a native array."""
    weight, bias = held["weight"], held.get("bias")
    if framework == "torch":
        kind = torch.nn.LayerNorm if name == "LayerNorm" else torch.nn.RMSNorm
        layer = kind(weight.size, eps=eps, dtype=torch.float64)
        set_parameters(layer, held)
        return layer
    kind = nnx.LayerNorm if name == "LayerNorm" else nnx.RMSNorm
    layer = kind(
        weight.size, epsilon=eps, use_fast_variance=False, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    set_parameters(layer, {"weight": weight} | ({} if bias is None else {"bias": bias}))
    return layer


@both
@pytest.mark.parametrize("name", NORMS)
def test_against_the_frameworks_own(twin, name):
    """torch.nn's and flax.nnx's layers, each set to this eps and to two passes: outputs and every gradient."""
    layer = build(twin, name, 7, eps=1e-3)
    held = scatter_parameters(layer, seed=4)
    X = hard_rows()
    witness = witness_of(name, 1e-3, held, twin.name)
    output, grads = gradients(twin, lambda layer, X: layer(X), {"X": X}, layer)
    other, other_grads = gradients(twin, lambda layer, X: layer(X), {"X": X}, witness)
    assert set(grads) == {"X", *held}
    for leaf in held:
        assert_close(grads[leaf], other_grads[leaf], rtol=1e-10)
    for row in np.ndindex(2, 3):
        assert_close(output[row], other[row], rtol=1e-10 if row == (0, 1) else 1e-12)
        assert_close(grads["X"][row], other_grads["X"][row], rtol=1e-9 if row in ((0, 1), (1, 0)) else 1e-11)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("weight", ["plain", "one_plus"])
@pytest.mark.parametrize("cast", ["after_weight", "before_weight"])
def test_twins_agree(name, weight, cast):
    def make(twin):
        layer = build(twin, name, 7, weight=weight, cast=cast)
        scatter_parameters(layer, seed=5)
        return layer

    _, grads = assert_twins_agree(lambda twin, layer, X: layer(X), {"X": random_array(2, 2, 3, 7)}, make)
    assert set(grads) == {"X", "weight"} | ({"bias"} if name == "LayerNorm" else set())


@pytest.mark.parametrize("name", NORMS)
def test_twins_agree_on_hard_rows(name):
    """Row by row, as the gradients of these rows differ in size by many orders."""
    results = []
    for twin in (TORCH, FLAX):
        layer = build(twin, name, 7)
        scatter_parameters(layer, seed=5)
        results.append(gradients(twin, lambda layer, X: layer(X), {"X": hard_rows()}, layer))
    (torch_out, torch_grads), (flax_out, flax_grads) = results
    for row in np.ndindex(2, 3):
        assert_close(flax_out[row], torch_out[row], rtol=1e-10 if row == (0, 1) else 1e-12)
        if row not in ((1, 0), (0, 1)) or name == "RMSNorm":  # of a constant row the gradient is a difference of equals
            assert_close(flax_grads["X"][row], torch_grads["X"][row], rtol=1e-9)


@both
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_eps(twin, name, eps):
    """Rows whose variance is near eps: a factor of ten in eps, or eps outside the root, is anything but small there."""
    X = random_array(6, 3, 7, scale=3e-3)
    right = build(twin, name, 7, eps=eps)(twin.array(X))
    assert_close(right, normalised(name, X, eps))
    centred = X if name == "RMSNorm" else X - X.mean(-1, keepdims=True)
    outside_the_root = centred / (np.sqrt((centred**2).mean(-1, keepdims=True)) + eps)
    for wrong in (normalised(name, X, eps * 10), outside_the_root):
        with pytest.raises(AssertionError):
            assert_close(right, wrong)


@both
@pytest.mark.parametrize("name", NORMS)
def test_default_eps(twin, name):
    """1e-5 in both; flax.nnx's own default is 1e-6."""
    layer = getattr(twin.file("norms"), name)(7, **FLOAT64)
    X = random_array(6, 3, 7, scale=3e-3)
    assert_close(layer(twin.array(X)), normalised(name, X, 1e-5))


@both
def test_population_variance(twin):
    """Divided by D, not by D - 1."""
    X = random_array(7, 2, 3)
    right = build(twin, "LayerNorm", 3)(twin.array(X))
    assert_close(right, normalised("LayerNorm", X, 1e-5))
    with pytest.raises(AssertionError):
        assert_close(right, (X - X.mean(-1, keepdims=True)) / np.sqrt(X.var(-1, ddof=1, keepdims=True) + 1e-5))


@both
@pytest.mark.parametrize("width", [1, 2, 64])
def test_variance_in_two_passes(twin, width):
    """In float32, mean 1000 against a spread of 0.01: E[x²] - E[x]² has no correct digit, two passes have five."""
    X = (1000.0 + 0.01 * random_array(8, 5, width)).astype(np.float32)
    layer = build(twin, "LayerNorm", width, param_dtype="float32", compute_dtype="float32")
    truth = normalised("LayerNorm", X, 1e-5)
    ours = to_numpy(layer(twin.array(X)))
    # the mean is off by up to half a unit in the last place of 1000 and a few of the sum, 2⁻¹⁴; the spread is 0.01
    assert np.abs(ours - truth).max() < 0.02
    if width == 64:
        fast = (X**2).mean(-1, keepdims=True, dtype=np.float32) - X.mean(-1, keepdims=True, dtype=np.float32) ** 2
        naive = (X - X.mean(-1, keepdims=True)) / np.sqrt(np.maximum(fast, 0) + 1e-5)
        assert np.abs(naive - truth).max() > 0.5  # the fault that the bound is there for


@both
@pytest.mark.parametrize("name", NORMS)
def test_constant_rows(twin, name):
    """A constant row gives the bias (LayerNorm) or about the weight (RMSNorm), and a row of zeros no NaN."""
    layer = build(twin, name, 5)
    held = scatter_parameters(layer, seed=1)
    X = np.array([[3.0] * 5, [0.0] * 5])
    expected = normalised(name, X, 1e-5) * held["weight"] + held.get("bias", 0.0)
    output, grads = gradients(twin, lambda layer, X: layer(X), {"X": X}, layer)
    assert_close(output, expected)
    assert all(np.isfinite(g).all() for g in grads.values())


@both
@pytest.mark.parametrize("name", NORMS)
def test_statistics_are_float32_in_16_bits(twin, name):
    """Squares of 1e-3 and 300 leave float16; means of 256 and 258 leave bfloat16."""
    for dtype, X in (
        (np.float16, np.array([[300.0, -299.0, 298.0, 5.0], [1e-3, 2e-3, -3e-3, 1e-3]])),
        (BF16, np.array([[256.0, 258.0, 260.0, 264.0], [1e-4, 2e-4, -3e-4, 1e-4]])),
    ):
        dtype_name = np.dtype(dtype).name
        layer = build(twin, name, 4, eps=1e-8, param_dtype=dtype_name, compute_dtype=dtype_name)
        given = X.astype(dtype)
        ours = to_numpy(layer(twin.array(given)))
        truth = normalised(name, given, 1e-8)
        assert_close(ours, truth.astype(dtype), rtol=2 * float(ml_dtypes.finfo(dtype).eps))
        assert np.isfinite(ours.astype(np.float64)).all()


@both
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("weight", ["plain", "one_plus"])
def test_place_of_the_cast(twin, name, weight):
    """bfloat16 arithmetic around float32 parameters: one rounding at the end, or one at every step."""
    X = random_array(9, 20, 16).astype(BF16)
    results = {}
    for cast in ("after_weight", "before_weight"):
        layer = build(twin, name, 16, weight=weight, cast=cast, param_dtype="float32", compute_dtype="bfloat16")
        held = {path: value.astype(np.float32) for path, value in scatter_parameters(layer, seed=2).items()}
        factor = held["weight"] + np.float32(1 if weight == "one_plus" else 0)
        bias = held.get("bias", np.zeros(16, np.float32))
        value = normalised(name, X, 1e-5)
        if cast == "after_weight":
            expected = (value * factor + bias).astype(BF16)
        else:
            expected = value.astype(BF16) * factor.astype(BF16)
            if name == "LayerNorm":
                expected = expected + bias.astype(BF16)
        # the float32 statistics may fall on the other side of a rounding bound, so rarely that here none does
        results[cast] = expected
        assert_close(layer(twin.array(X)), expected, rtol=0)
    assert (results["after_weight"] != results["before_weight"]).mean() > 0.1


@both
def test_one_plus_is_summed_wide(twin):
    """1 + 15.8125 is 16.8125, which bfloat16 does not hold: 16.75 or 16.875 (vLLM, pull request 29810)."""
    X = np.array([4.0, -4.0]).astype(BF16)  # normalised: 1, -1 as near as float32 can tell
    for cast, factor in (("after_weight", 16.8125), ("before_weight", 16.8125)):
        layer = build(
            twin, "RMSNorm", 2, eps=1e-12, weight="one_plus", cast=cast, param_dtype="bfloat16", compute_dtype="float32"
        )
        set_parameters(layer, {"weight": np.array([15.8125, 15.8125])})
        assert_close(layer(twin.array(X)), np.array([factor, -factor], np.float32), rtol=1e-6)


@both
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("compute_dtype", ["float64", "float32", "bfloat16", "float16"])
def test_dtypes(twin, name, compute_dtype):
    for param_dtype in ("float32", "bfloat16"):
        layer = build(twin, name, 4, param_dtype=param_dtype, compute_dtype=compute_dtype)
        assert {str(value.dtype) for value in parameters(layer).values()} == {param_dtype}
        for given in (np.float32, BF16):
            X = np.array([3.0, -1.0, 1.0, -3.0], given)
            assert to_numpy(layer(twin.array(X))).dtype.name == compute_dtype


@both
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("weight", ["plain", "one_plus"])
def test_starts_as_the_identity(twin, name, weight):
    layer = build(twin, name, 5, weight=weight)
    expected = {"weight": np.full(5, 1.0 if weight == "plain" else 0.0)}
    assert_close(parameters(layer), expected | ({"bias": np.zeros(5)} if name == "LayerNorm" else {}), rtol=0)
    X = random_array(3, 2, 5)
    assert_close(layer(twin.array(X)), normalised(name, X, 1e-5))


@both
def test_storage(twin):
    """``weight`` in PyTorch, ``scale`` in Flax; no bias where none is asked for."""
    layer = build(twin, "LayerNorm", 5)
    assert tuple((layer.weight if twin is TORCH else layer.scale).shape) == (5,)
    assert set(parameters(build(twin, "LayerNorm", 5, bias=False))) == {"weight"}
    assert set(parameters(build(twin, "RMSNorm", 5))) == {"weight"}


# ---- from a configuration

SIZES = {"context_length": 8, "model_dim": 12, "key_dim": 6, "hidden_dim": 10, "num_heads": 6, "num_layers": 2}


def stack_config(**changes):
    return StackConfig(**(SIZES | {"param_dtype": "float64", "compute_dtype": "float64"} | changes))


@both
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("weight", ["plain", "one_plus"])
def test_make_norm(twin, norm, weight):
    """Width, eps, bias and conventions all come from the configuration."""
    for bias in (False,) if norm == "rmsnorm" else (True, False):
        config = stack_config(norm=norm, norm_eps=1e-3, norm_bias=bias, norm_weight=weight)
        layer = twin.file("norms").make_norm(7, config)
        held = scatter_parameters(layer, seed=6)
        assert set(held) == {"weight", "bias"} if bias else {"weight"}
        X = random_array(7, 3, 7, scale=0.05)
        factor = held["weight"] + (weight == "one_plus")
        name = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[norm]
        assert_close(layer(twin.array(X)), normalised(name, X, 1e-3) * factor + held.get("bias", 0.0))


@both
def test_make_norm_takes_cast_and_dtypes(twin):
    X = random_array(9, 20, 16).astype(BF16)
    outputs = []
    for cast in ("after_weight", "before_weight"):
        config = stack_config(norm_cast=cast, param_dtype="float32", compute_dtype="bfloat16")
        layer, direct = (
            twin.file("norms").make_norm(16, config),
            build(twin, "LayerNorm", 16, cast=cast, param_dtype="float32", compute_dtype="bfloat16"),
        )
        scatter_parameters(layer, seed=2)
        scatter_parameters(direct, seed=2)
        assert_close(layer(twin.array(X)), direct(twin.array(X)), rtol=0)
        outputs.append(to_numpy(layer(twin.array(X))))
    assert (outputs[0] != outputs[1]).any()


@both
def test_make_head_norm(twin):
    """Of width K; by ``qk_norm``, not by ``norm``; a bias for LayerNorm where norms have one."""
    make = twin.file("norms").make_head_norm
    assert make(stack_config()) is None
    X = random_array(7, 2, 6, 3, 6, scale=0.05)
    for changes, name, leaves in (
        ({"qk_norm": "layernorm"}, "LayerNorm", {"weight", "bias"}),
        ({"qk_norm": "layernorm", "norm_bias": False}, "LayerNorm", {"weight"}),
        ({"qk_norm": "rmsnorm"}, "RMSNorm", {"weight"}),
        ({"qk_norm": "layernorm", "norm": "rmsnorm", "norm_bias": False}, "LayerNorm", {"weight"}),
        ({"qk_norm": "rmsnorm", "norm_weight": "one_plus"}, "RMSNorm", {"weight"}),
    ):
        layer = make(stack_config(norm_eps=1e-3, **changes))
        held = scatter_parameters(layer, seed=6)
        assert set(held) == leaves
        factor = held["weight"] + ("norm_weight" in changes)
        assert_close(layer(twin.array(X)), normalised(name, X, 1e-3) * factor + held.get("bias", 0.0))


# ---- faults and refusals


@pytest.mark.parametrize("fault", ["eps", "weight", "bias", "variance"])
def test_twins_agree_can_fail(fault, monkeypatch):
    """One twin with a fault of the kind that real ports had: the comparison refuses it."""

    def make(twin):
        eps = 1e-6 if fault == "eps" and twin is FLAX else 1e-5
        layer = build(twin, "LayerNorm", 7, eps=eps)
        held = scatter_parameters(layer, seed=5)
        if twin is FLAX and fault in held:
            set_parameters(layer, held | {fault: held[fault][::-1]})
        return layer

    def call(twin, layer, X):
        factor = np.sqrt(6 / 7) if fault == "variance" and twin is FLAX else 1.0
        return layer(X) * factor

    with pytest.raises(AssertionError, match="output: element"):
        assert_twins_agree(call, {"X": random_array(2, 3, 7)}, make)


@pytest.mark.usefixtures("without_shape_hook")
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(
    "X", [np.ones((2, 4)), np.float64(1.0), np.ones((2, 5), np.int32), np.ones((2, 5), bool)], ids=range(4)
)
def test_wrong_input(name, X):
    messages = []
    for twin in (TORCH, FLAX):
        with pytest.raises(InputError, match="X: expected") as refusal:
            build(twin, name, 5)(twin.array(X))
        messages.append(str(refusal.value))
    assert messages[0] == messages[1]


@pytest.mark.usefixtures("without_shape_hook")
@pytest.mark.parametrize("name", NORMS)
def test_wrong_width(name):
    for twin in (TORCH, FLAX):
        with pytest.raises(InputError, match="width: expected a whole number of at least 1, got 0"):
            build(twin, name, 0)
