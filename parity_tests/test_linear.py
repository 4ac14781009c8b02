"""Linear: Y = X Wᵀ + b."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

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
)
from twinformer.errors import InputError

W = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
b = np.array([10.0, 20.0])


@both
def test_by_hand(twin):
    layer = twin.file("linear").Linear(3, 2, **FLOAT64)
    set_parameters(layer, {"weight": W, "bias": b})
    # 1·1 - 1·3 + 10 = 8 and 1·4 - 1·6 + 20 = 18; then the columns of W one by one
    X = np.array([[1.0, 0.0, -1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert_close(layer(twin.array(X)), np.array([[8.0, 18.0], [11.0, 24.0], [12.0, 25.0], [13.0, 26.0]]), rtol=0)


@both
def test_without_bias(twin):
    layer = twin.file("linear").Linear(3, 2, bias=False, **FLOAT64)
    set_parameters(layer, {"weight": W})
    assert_close(layer(twin.array(np.array([1.0, 0.0, -1.0]))), np.array([-2.0, -2.0]), rtol=0)


def test_storage():
    """``weight [out, in]`` in PyTorch, ``kernel [in, out]`` in Flax."""
    assert tuple(TORCH.file("linear").Linear(3, 2).weight.shape) == (2, 3)
    assert tuple(FLAX.file("linear").Linear(3, 2).kernel.shape) == (3, 2)
    for twin in (TORCH, FLAX):
        assert {p: v.shape for p, v in parameters(twin.file("linear").Linear(3, 2)).items()} == {
            "weight": (2, 3),
            "bias": (2,),
        }


@both
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 1, 3), (0, 3)])
@pytest.mark.parametrize("square", [False, True])
def test_against_torch(twin, lead, square):
    """Any number of leading axes; in the square case only values can show a transposed matrix."""
    inputs, outputs = (5, 5) if square else (5, 7)
    layer = twin.file("linear").Linear(inputs, outputs, **FLOAT64)
    values = scatter_parameters(layer, seed=2)
    witness = torch.nn.Linear(inputs, outputs, dtype=torch.float64)
    set_parameters(witness, values)
    X = random_array(3, *lead, inputs)
    actual, expected = layer(twin.array(X)), witness(torch.from_numpy(X))
    if X.size:
        assert_close(actual, expected)
        assert_close(actual, X @ values["weight"].T + values["bias"])
    else:
        assert tuple(actual.shape) == (*lead, outputs)


@both
def test_gradients_by_the_equations(twin):
    """With cotangent C: dX = C W, dW = Cᵀ X, db = the column sums of C."""
    layer = twin.file("linear").Linear(5, 7, **FLOAT64)
    values = scatter_parameters(layer, seed=2)
    X, C = random_array(3, 4, 5), random_array(4, 4, 7)
    _, grads = gradients(twin, lambda layer, X: layer(X), {"X": X}, layer, cotangent=C)
    assert_close(grads, {"X": C @ values["weight"], "weight": C.T @ X, "bias": C.sum(0)})


@pytest.mark.parametrize("bias", [True, False])
def test_twins_agree(bias):
    def build(twin):
        layer = twin.file("linear").Linear(5, 7, bias=bias, **FLOAT64)
        scatter_parameters(layer, seed=1)
        return layer

    _, grads = assert_twins_agree(lambda twin, layer, X: layer(X), {"X": random_array(5, 2, 3, 5)}, build)
    assert set(grads) == {"X", "weight"} | ({"bias"} if bias else set())


def test_twins_agree_can_fail(monkeypatch):
    """A kernel that is transposed twice, on a square matrix: the shapes fit, the values do not."""

    def build(twin):
        layer = twin.file("linear").Linear(5, 5, **FLOAT64)
        values = scatter_parameters(layer, seed=1)
        if twin is FLAX:
            set_parameters(layer, values | {"weight": values["weight"].T})
        return layer

    with pytest.raises(AssertionError, match="output: element"):
        assert_twins_agree(lambda twin, layer, X: layer(X), {"X": random_array(5, 2, 5)}, build)


@both
def test_same_seed_same_weights_in_both(twin):
    held = parameters(twin.file("linear").Linear(4, 3, seed=9))
    assert_close(held, parameters(TORCH.file("linear").Linear(4, 3, seed=9)), rtol=0)
    assert not np.array_equal(held["weight"], parameters(twin.file("linear").Linear(4, 3, seed=10))["weight"])
    assert np.abs(held["weight"]).max() <= np.sqrt(6 / 7)
    assert (held["bias"] == 0).all()
    empty = parameters(twin.file("linear").Linear(4, 3, seed=None))
    assert all((value == 0).all() for value in empty.values())


@both
@pytest.mark.parametrize("param_dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("compute_dtype", ["float64", "float32", "bfloat16", "float16"])
def test_dtypes(twin, param_dtype, compute_dtype):
    """Parameters are held in one dtype, and cast, with the input, to the other; that is what comes out."""
    layer = twin.file("linear").Linear(3, 2, param_dtype=param_dtype, compute_dtype=compute_dtype)
    assert {str(value.dtype) for value in parameters(layer).values()} == {param_dtype}
    set_parameters(layer, {"weight": W, "bias": b})
    for given in (np.float32, np.float64, ml_dtypes.bfloat16):
        Y = layer(twin.array(np.array([1.0, 0.0, -1.0], given)))
        # small whole numbers: exact in each of these dtypes
        assert_close(Y, np.array([8.0, 18.0]).astype(np.dtype(compute_dtype)), rtol=0)


@both
def test_weights_and_input_are_rounded_to_compute_dtype(twin):
    """1 + 2⁻⁹ is 1 in bfloat16, as weight, as bias and as input."""
    more = 1 + 2.0**-9
    pair = twin.file("linear").Linear(2, 1, param_dtype="float32", compute_dtype="bfloat16")
    set_parameters(pair, {"weight": np.array([[more, 1.0]]), "bias": np.array([0.0])})
    zero = np.array([0.0], ml_dtypes.bfloat16)  # each would be 2⁻⁹ without the rounding
    assert_close(pair(twin.array(np.array([1.0, -1.0], np.float32))), zero, rtol=0)
    layer = twin.file("linear").Linear(1, 1, param_dtype="float32", compute_dtype="bfloat16")
    set_parameters(layer, {"weight": np.array([[1.0]]), "bias": np.array([more])})
    assert_close(layer(twin.array(np.array([-1.0], np.float32))), zero, rtol=0)
    set_parameters(layer, {"weight": np.array([[1.0]]), "bias": np.array([-1.0])})
    assert_close(layer(twin.array(np.array([more], np.float32))), zero, rtol=0)
    # and to compute_dtype only: a bfloat16 input does not round the weight of a float32 layer
    exact = twin.file("linear").Linear(1, 1, bias=False)
    set_parameters(exact, {"weight": np.array([[more]])})
    assert_close(exact(twin.array(np.array([1.0], ml_dtypes.bfloat16))), np.array([more], np.float32), rtol=0)


@pytest.mark.usefixtures("without_shape_hook")
@pytest.mark.parametrize(
    ("X", "words"),
    [
        (np.ones((2, 4), np.float32), r"X: expected \[\.\.\., 3\], got shape \(2, 4\)"),
        (np.float32(1.0), r"X: expected \[\.\.\., 3\], got shape \(\)"),
        (np.ones((2, 3), np.int64), "X: expected a float dtype, got int64"),
        (np.ones((2, 4), bool), "got shape"),
    ],
    ids=["width", "rank 0", "integers", "both at once"],
)
def test_wrong_input(X, words):
    """The same words in both twins."""
    messages = []
    for twin in (TORCH, FLAX):
        with pytest.raises(InputError, match=words) as refusal:
            twin.file("linear").Linear(3, 2)(twin.array(X))
        messages.append(str(refusal.value))
    assert messages[0] == messages[1]


@pytest.mark.usefixtures("without_shape_hook")
@pytest.mark.parametrize("sizes", [(0, 2), (3, 0), (-1, 2), (2.5, 2)])
def test_wrong_sizes(sizes):
    messages = []
    for twin in (TORCH, FLAX):
        with pytest.raises(InputError, match="expected a whole number of at least 1") as refusal:
            twin.file("linear").Linear(*sizes)
        messages.append(str(refusal.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("shape", [(2, 64), (2, 1, 64), (1, 2, 64), (1, 64), (3, 64)])
def test_two_rows_are_multiplied_one_by_one(shape):
    """In Flax, with a large matrix on a CPU: read once for each, which takes less time than XLA's product of two."""
    rng = np.random.default_rng(0)
    X, matrix = rng.standard_normal(shape), rng.standard_normal((64, 1024))
    matmul = FLAX.file("linear").matmul
    assert_close(matmul(jnp.asarray(X), jnp.asarray(matrix)), X @ matrix, rtol=1e-14)
    products = str(jax.make_jaxpr(matmul)(X, matrix)).count("dot_general")
    assert products == (2 if X.size == 128 else 1)
    with FLAX.file("linear").first_gradients():
        assert str(jax.make_jaxpr(lambda X, Y: matmul(X, Y))(X, matrix)).count("concatenate") == 0
