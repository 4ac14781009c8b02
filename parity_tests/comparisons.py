"""How gradients are compared leaf by leaf: what rounding is measured by, and that nothing is left out."""

from collections.abc import Mapping

import numpy as np

from parity_tests.helpers import assert_close

LEAVES = ("weight", "bias")


def scale_of(path: str, grads: Mapping[str, np.ndarray]) -> float:
    """What rounding in the gradient of one leaf is measured by: its own largest element, as a rule.

    The gradients of queries and keys (their norms too) and of the position bias pass through the softmax, whose
    pull-back subtracts a mean. Where that cancels to nothing (the key bias always; all of them where a query sees a
    single key, or all keys share a bucket) what is left is rounding of terms as large as the values' gradient. So they
    are measured by the largest gradient of the same attention layer, the bias of a stack by that of all its layers, and
    so is the norm before a cross-attention, which gives queries only.
    """
    owner = path.rpartition(".")[0]  # "blocks.0.attention.query"
    layer, _, name = owner.rpartition(".")
    below = f"{layer}." if layer else ""
    if name in ("query", "key", "query_norm", "key_norm"):
        measures = [f"{below}{part}.{leaf}" for part in ("query", "key", "value", "output") for leaf in LEAVES]
    elif name == "cross_attention_norm":
        measures = [f"{below}cross_attention.{part}.{leaf}" for part in ("value", "output") for leaf in LEAVES] + [path]
    elif name == "relative_bias":
        measures = [p for p in grads if p.startswith(f"{below}blocks.") and ".attention." in p]
    else:
        measures = [path]
    return max(abs(grads[p]).max() for p in measures if p in grads)


def assert_gradients_close(
    actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], rtol: float = 1e-11
) -> None:
    """Same leaves, same shapes, all finite, each within ``rtol`` of its scale; every leaf that is off is named."""
    missing, surplus = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
    assert missing + surplus == [], f"gradients: missing {missing}, unexpected {surplus}"
    assert len(expected) > 0, "no gradients to compare"
    wrong = {}
    for path, grad in expected.items():
        assert actual[path].shape == grad.shape, f"gradients: {path}: {actual[path].shape}, expected {grad.shape}"
        assert np.isfinite(grad).all(), f"gradients: {path}: expected values are not finite"
        worst, scale = abs(actual[path] - grad).max(), scale_of(path, expected)
        if not worst <= rtol * scale:  # written so that NaN is refused
            wrong[path] = f"off by {worst:.3e} on a scale of {scale:.3e}"
    assert not wrong, f"gradients: {wrong}"


def assert_outcomes_close(
    actual: tuple[np.ndarray, Mapping[str, np.ndarray]], expected: tuple[np.ndarray, Mapping[str, np.ndarray]]
) -> None:
    """Outputs within 1e-12 and every gradient within 1e-11; all finite."""
    (out, grads), (expected_out, expected_grads) = actual, expected
    assert np.isfinite(expected_out).all()
    assert_close(out, expected_out, name="output")
    assert_gradients_close(grads, expected_grads)
