"""The strict comparison refuses planted faults; the gradients and parameters it is fed are the right ones."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from parity_tests.helpers import (
    FLAX,
    TORCH,
    WITHOUT_SHAPE_HOOK,
    assert_close,
    gradients,
    random_array,
    shape_hook_off,
    to_jax,
    to_numpy,
    to_torch,
)

X = random_array(0, 4, 3)


def changed(values, place, value):
    values = values.copy()
    values[place] = value
    return values


def test_equal_passes():
    assert_close(X, X)
    assert_close(to_torch(X), X)
    assert_close(to_jax(X), to_torch(X))
    assert_close({"a": X, "b": {"c": to_jax(X)}}, {"b": {"c": X}, "a": to_torch(X)})
    special = np.array([np.nan, np.inf, -np.inf, 1.0])
    assert_close(special, special)
    assert_close(X * (1 + 1e-13), X)
    assert_close(np.arange(3), np.arange(3))


REFUSED = {
    "one element wrong": (changed(X, (2, 1), X[2, 1] + 1e-9), X, r"element \(2, 1\)"),
    "one small element wrong": (np.array([1.0, 2e-9]), np.array([1.0, 1e-9]), "off by"),
    "nothing but zero expected": (np.array([0.0, 1e-300]), np.zeros(2), "off by"),
    "NaN in actual": (changed(X, (0, 0), np.nan), X, "NaN in one only"),
    "NaN in expected": (X, changed(X, (0, 0), np.nan), "NaN in one only"),
    "infinity in actual": (changed(X, (0, 0), np.inf), X, "inf in one only"),
    "sign of infinity": (changed(X, (0, 0), -np.inf), changed(X, (0, 0), np.inf), "inf in one only"),
    "broadcast": (np.ones((1, 3)), np.ones((4, 3)), "shape"),
    "rank": (np.ones(3), np.ones((1, 3)), "shape"),
    "scalar": (np.float64(1), np.ones(1), "shape"),
    "transposed square": (X[:3].T, X[:3], "element"),
    "rows exchanged": (X[[1, 0, 2, 3]], X, "element"),
    "sign flipped, same mean of squares": (-X, X, "element"),
    "empty against full": (np.ones((0, 3)), np.ones((4, 3)), "shape"),
    "nothing to compare": (np.ones((0, 3)), np.ones((0, 3)), "nothing to compare"),
    "dtype": (X.astype(np.float32), X, "dtype"),
    "integers": (np.array([1, 2, 3]), np.array([1, 2, 4]), "not equal at 1 of 3"),
    "booleans": (np.array([True, False]), np.array([True, True]), "not equal"),
    "bool for int": (np.array([True]), np.array([1]), "dtype"),
    "bfloat16": (np.array([1.0], ml_dtypes.bfloat16), np.array([1.0078125], ml_dtypes.bfloat16), "off by"),
    "truncated mapping": ({"a": X}, {"a": X, "b": X}, r"missing \['b'\]"),
    "surplus leaf": ({"a": X, "b": X}, {"a": X}, r"unexpected \['b'\]"),
    "empty mapping": ({}, {}, "nothing to compare"),
    "wrong leaf": ({"a": X, "b": X + 1e-6}, {"a": X, "b": X}, "b: element"),
    "mapping for array": ({"a": X}, X, "expected one array"),
    "array for mapping": (X, {"a": X}, "expected a mapping"),
    "strings": (np.array(["a"]), np.array(["a"]), "no rule"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    actual, expected, message = REFUSED[case]
    with pytest.raises(AssertionError, match=message):
        assert_close(actual, expected)


def test_message_gives_place_and_figures():
    with pytest.raises(AssertionError) as refusal:
        assert_close(changed(X, (3, 2), 7.0), X, name="logits")
    message = str(refusal.value)
    assert message.startswith("logits: element (3, 2) is ")
    assert f"{abs(7.0 - X[3, 2]):.3e}" in message
    assert "1 of 12" in message


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.bool_])
def test_arrays_go_and_come_back(dtype):
    values = (X * 3).astype(dtype)
    for there in (to_torch, to_jax):
        back = to_numpy(there(values))
        assert back.dtype == values.dtype
        assert back.tobytes() == values.tobytes()


@pytest.mark.parametrize("twin", [TORCH, FLAX], ids=["torch", "flax"])
def test_gradients_of_a_known_function(twin):
    cotangent = np.array([1.0, 10.0])
    output, grads = gradients(
        twin,
        lambda a, b, unused, n: a * b * n,
        {"a": np.array([2.0, 3.0]), "b": np.array([5.0, 7.0]), "unused": np.ones(1), "n": np.array([1, 2])},
        cotangent=cotangent,
    )
    assert_close(output, np.array([10.0, 42.0]))
    expected = {"a": np.array([5.0, 140.0]), "b": np.array([2.0, 60.0]), "unused": np.zeros(1)}
    assert_close(grads, expected)


def test_files_without_the_shape_hook_are_there():
    here = {file.stem for file in Path(__file__).parent.glob("test_*.py")}
    assert here >= WITHOUT_SHAPE_HOOK
    assert not {"test_attention", "test_models", "test_configurations", "test_cache"} & WITHOUT_SHAPE_HOOK


def test_shape_hook_is_on_and_can_be_off():
    """A wrong shape meets jaxtyping first; within ``shape_hook_off`` it meets the project's own error."""
    import jaxtyping

    from twinformer.errors import InputError

    for twin in (TORCH, FLAX):
        make = twin.file("masks").padding_mask
        flat = twin.array(np.ones(3, bool))
        with pytest.raises(jaxtyping.TypeCheckError):
            make(flat)
        with shape_hook_off():
            layer = twin.file("linear").Linear(3, 2)
            with pytest.raises(InputError):
                layer(twin.array(np.ones((2, 4), np.float32)))
        assert not jaxtyping.config.jaxtyping_disable
