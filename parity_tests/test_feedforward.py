"""FeedForward: down(dropout(f(up X))), gated or not, with the activations that the papers define."""

import math

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from scipy.special import erf

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
    reference_dropout,
    reference_key,
    scatter_parameters,
    set_parameters,
    to_numpy,
    to_torch,
)
from twinformer.errors import InputError

ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0.0),
    "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
}
TORCHS = {
    "relu": torch.relu,
    "gelu": lambda x: torch.nn.functional.gelu(x, approximate="none"),
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}
JAXS = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}


def build(twin, *sizes, **choices):
    return twin.file("feedforward").FeedForward(*sizes, **(FLOAT64 | choices))


def reference(X, held, activation="relu", gated=False, rate=0.0, key=None):
    f = ACTIVATIONS[activation]
    hidden = X @ held["up.weight"].T + held.get("up.bias", 0.0)
    hidden = f(X @ held["gate.weight"].T + held.get("gate.bias", 0.0)) * hidden if gated else f(hidden)
    if key is not None:
        hidden = reference_dropout(hidden, rate, key)
    return hidden @ held["down.weight"].T + held.get("down.bias", 0.0)


# ---- activations


@both
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activate(twin, name):
    """From the papers' equations, from the other framework's own functions, and with their gradients."""
    activate = twin.file("feedforward").activate
    x = np.concatenate([np.linspace(-6, 6, 49), [0.5, -0.5, 1e-3, -1e-3]])
    output, grads = gradients(twin, lambda x: activate(x, name), {"x": x}, cotangent=np.ones(x.size))
    assert_close(output, ACTIVATIONS[name](x))
    witness = to_torch(x).requires_grad_(True)
    TORCHS[name](witness).sum().backward()
    assert_close(output, TORCHS[name](witness))
    assert_close(output, JAXS[name](x))
    if name != "relu":
        assert_close(grads["x"], witness.grad, rtol=1e-11)


@both
def test_activate_by_hand(twin):
    activate = twin.file("feedforward").activate
    x = twin.array(np.array([1.0]))
    assert_close(activate(x, "gelu"), np.array([0.8413447460685429]))  # Φ(1)
    assert_close(activate(x, "silu"), np.array([1 / (1 + math.exp(-1))]))
    assert_close(activate(x, "gelu_tanh"), np.array([0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * 1.044715))]))
    # the derivative of relu: 0 below 0, 1 above
    _, grads = gradients(
        twin, lambda x: activate(x, "relu"), {"x": np.array([-1.0, -1e-300, 1e-300, 2.0])}, cotangent=np.ones(4)
    )
    assert_close(grads["x"], np.array([0.0, 0.0, 1.0, 1.0]), rtol=0)


@both
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activate_far_out(twin, name):
    """±1000: 0 and the number itself; gradients 0 and 1; no overflow on the way."""
    call = lambda x: twin.file("feedforward").activate(x, name)  # noqa: E731
    output, grads = gradients(twin, call, {"x": np.array([-1000.0, 1000.0])}, cotangent=np.ones(2))
    assert_close(output, np.array([0.0, 1000.0]))
    assert_close(grads["x"], np.array([0.0, 1.0]))


@both
@pytest.mark.parametrize("right", ACTIVATIONS)
@pytest.mark.parametrize("wrong", ACTIVATIONS)
def test_activations_are_told_apart(twin, right, wrong):
    """The two gelus differ by 5e-4 at most: far above the tolerance, far below what a loose one would let pass."""
    x = np.linspace(-4, 4, 17)
    ours = to_numpy(twin.file("feedforward").activate(twin.array(x), right))
    if right == wrong:
        assert_close(ours, ACTIVATIONS[wrong](x))
        return
    with pytest.raises(AssertionError):
        assert_close(ours, ACTIVATIONS[wrong](x), rtol=5e-5)


# ---- the layer


@both
def test_by_hand(twin):
    """One input, two hidden units, one output; then the same with a gate."""
    layer = build(twin, 1, 2)
    held = {
        "up.weight": np.array([[1.0], [-1.0]]),
        "up.bias": np.array([1.0, 0.5]),
        "down.weight": np.array([[10.0, 100.0]]),
        "down.bias": np.array([7.0]),
    }
    set_parameters(layer, held)
    # x = 2: hidden 3 and relu(-1.5) = 0, so 30 + 7; x = -3: relu(-2) = 0 and 3.5, so 350 + 7
    assert_close(layer(twin.array(np.array([[2.0], [-3.0]]))), np.array([[37.0], [357.0]]))
    gated = build(twin, 1, 2, gated=True)
    set_parameters(gated, held | {"gate.weight": np.array([[2.0], [1.0]]), "gate.bias": np.array([0.0, -1.0])})
    # x = 2: gate relu(4), relu(1); up 3, -1.5; 12·10 - 1.5·100 + 7 = -23: the activation is the gate's alone
    assert_close(gated(twin.array(np.array([[2.0]]))), np.array([[-23.0]]))


@both
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_against_the_equations(twin, activation, gated, bias):
    layer = build(twin, 5, 7, activation=activation, gated=gated, bias=bias)
    held = scatter_parameters(layer, seed=1)
    names = ["up", "down", "gate"] if gated else ["up", "down"]
    assert set(held) == {f"{name}.{leaf}" for name in names for leaf in (("weight", "bias") if bias else ("weight",))}
    X = random_array(2, 2, 3, 5, scale=2.0)
    assert_close(layer(twin.array(X)), reference(X, held, activation, gated))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_twins_agree(activation, gated):
    """Outputs and the gradients of the input and of every parameter, with dropout on its hidden units."""

    def make(twin):
        layer = build(twin, 5, 7, activation=activation, gated=gated, dropout=0.25)
        scatter_parameters(layer, seed=1)
        return layer

    call = lambda twin, layer, X: layer(X, rng=twin.key(3))  # noqa: E731
    _, grads = assert_twins_agree(call, {"X": random_array(2, 2, 3, 5)}, make)
    assert len(grads) == (7 if gated else 5)


@both
@pytest.mark.parametrize("gated", [False, True])
def test_dropout_of_the_hidden_units(twin, gated):
    """After the activation and the gate, before ``down``, with the key as it comes; none without a key."""
    layer = build(twin, 5, 7, activation="silu", gated=gated, dropout=0.4)
    held = scatter_parameters(layer, seed=1)
    X = random_array(2, 2, 3, 5)
    dropped = layer(twin.array(X), rng=twin.key(9))
    assert_close(dropped, reference(X, held, "silu", gated, rate=0.4, key=reference_key(9)))
    assert_close(layer(twin.array(X)), reference(X, held, "silu", gated))
    with pytest.raises(AssertionError):
        assert_close(dropped, reference_dropout(reference(X, held, "silu", gated), 0.4, reference_key(9)))
    never = build(twin, 5, 7, activation="silu", gated=gated)
    set_parameters(never, held)
    assert_close(never(twin.array(X), rng=twin.key(9)), reference(X, held, "silu", gated))


@both
def test_default_is_the_books(twin):
    """relu, no gate, biases, no dropout."""
    layer = twin.file("feedforward").FeedForward(5, 7, **FLOAT64)
    held = scatter_parameters(layer, seed=4)
    X = random_array(2, 2, 3, 5)
    assert_close(layer(twin.array(X), rng=twin.key(0)), reference(X, held))


@both
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(twin, compute_dtype):
    """Every step in compute_dtype: the parameters rounded to it, the hidden units, the result."""
    layer = build(twin, 5, 7, activation="relu", param_dtype="float32", compute_dtype=compute_dtype)
    held = {path: value.astype(np.float32) for path, value in scatter_parameters(layer, seed=1).items()}
    assert {str(value.dtype) for value in parameters(layer).values()} == {"float32"}
    X = random_array(2, 2, 3, 5).astype(np.float32)
    ours = to_numpy(layer(twin.array(X)))
    assert ours.dtype.name == compute_dtype
    eps = float(ml_dtypes.finfo(compute_dtype).eps)
    truth = reference(X.astype(np.float64), held)
    assert np.abs(ours.astype(np.float64) - truth).max() < 8 * eps * np.abs(truth).max()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_in_bfloat16(name):
    """Within two roundings of the truth, in both."""
    x = np.linspace(-4, 4, 65).astype(ml_dtypes.bfloat16)
    truth = ACTIVATIONS[name](x.astype(np.float64))
    for twin in (TORCH, FLAX):
        ours = to_numpy(twin.file("feedforward").activate(twin.array(x), name))
        assert ours.dtype == ml_dtypes.bfloat16
        assert np.abs(ours.astype(np.float64) - truth).max() <= 2 * 2.0**-8 * np.abs(truth).max()


@pytest.mark.parametrize("fault", ["activation", "gate exchanged", "transposed"])
def test_twins_agree_can_fail(fault):
    def make(twin):
        wrong = twin is FLAX
        activation = "gelu_tanh" if wrong and fault == "activation" else "gelu"
        layer = build(twin, 5, 5, activation=activation, gated=True)
        held = scatter_parameters(layer, seed=1)
        if wrong and fault == "gate exchanged":
            set_parameters(layer, held | {"up.weight": held["gate.weight"], "gate.weight": held["up.weight"]})
        if wrong and fault == "transposed":
            set_parameters(layer, held | {"down.weight": held["down.weight"].T})
        return layer

    with pytest.raises(AssertionError, match="output: element"):
        assert_twins_agree(lambda twin, layer, X: layer(X), {"X": random_array(2, 3, 5)}, make)


@pytest.mark.usefixtures("without_shape_hook")
@pytest.mark.parametrize("X", [np.ones((2, 4)), np.float64(1.0), np.ones((2, 5), np.int32)], ids=range(3))
def test_wrong_input(X):
    messages = []
    for twin in (TORCH, FLAX):
        with pytest.raises(InputError, match="X: expected") as refusal:
            build(twin, 5, 7)(twin.array(X))
        messages.append(str(refusal.value))
    assert messages[0] == messages[1]


@pytest.mark.usefixtures("without_shape_hook")
@pytest.mark.parametrize("sizes", [(0, 7), (5, 0)])
def test_wrong_sizes(sizes):
    for twin in (TORCH, FLAX):
        with pytest.raises(InputError, match="expected a whole number of at least 1, got 0"):
            build(twin, *sizes)


def test_the_torch_twin_is_a_plain_module():
    """Its parts are found by name, as the paths promise."""
    layer = TORCH.file("feedforward").FeedForward(5, 7, gated=True)
    assert isinstance(layer, torch.nn.Module)
    assert {name for name, _ in layer.named_children()} >= {"up", "gate", "down"}
    assert all(hasattr(FLAX.file("feedforward").FeedForward(5, 7, gated=True), name) for name in ("up", "gate", "down"))
