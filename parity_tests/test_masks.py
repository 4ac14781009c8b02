"""Masks against loops, the softmax over allowed keys, and the quarantine of rows that are not finite."""

import jax
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parity_tests.helpers import (
    FLAX,
    TORCH,
    assert_close,
    assert_twins_agree,
    both,
    gradients,
    random_array,
    to_numpy,
)

# few shapes, as each is compiled anew
shapes = st.sampled_from([(1, 1), (1, 6), (4, 4), (3, 7), (7, 3)])
windows = st.integers(1, 12)


def by_loop(T, S, rule):
    return np.array([[rule(i, j) for j in range(S)] for i in range(T)], dtype=bool)


def booleans(*shape):
    count = int(np.prod(shape))
    return st.lists(st.booleans(), min_size=count, max_size=count).map(lambda flat: np.array(flat).reshape(shape))


# ---- which keys a query sees


@both
def test_causal_by_hand(twin):
    causal_mask = twin.file("masks").causal_mask
    assert_close(causal_mask(3, 3), np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1]], bool))
    # aligned at the end: one query beside four keys is the last position and sees them all
    assert_close(causal_mask(1, 4), np.array([[1, 1, 1, 1]], bool))
    assert_close(causal_mask(2, 4), np.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool))
    # more queries than keys: the first ones are before every key
    assert_close(causal_mask(3, 2), np.array([[0, 0], [1, 0], [1, 1]], bool))
    # a window of 2 is the query itself and the one key before it
    assert_close(causal_mask(4, 4, window=2), np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]], bool))


@both
def test_window_by_hand(twin):
    window_mask = twin.file("masks").window_mask
    assert_close(window_mask(4, 4, window=1), np.eye(4, dtype=bool))
    assert_close(window_mask(4, 4, window=2), np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]], bool))
    assert_close(window_mask(1, 4, window=2), np.array([[0, 0, 1, 1]], bool))


@both
@given(shape=shapes, window=st.none() | windows)
def test_causal_mask(twin, shape, window):
    T, S = shape

    def rule(i, j):
        here = i + S - T
        return j <= here and (window is None or here - j < window)

    assert_close(twin.file("masks").causal_mask(T, S, window=window), by_loop(T, S, rule))


@both
@given(shape=shapes, window=windows)
def test_window_mask(twin, shape, window):
    T, S = shape
    assert_close(
        twin.file("masks").window_mask(T, S, window=window), by_loop(T, S, lambda i, j: abs(j - (i + S - T)) < window)
    )


@both
def test_causal_window_is_causal_and_window(twin):
    masks = twin.file("masks")
    causal, window = to_numpy(masks.causal_mask(7, 9)), to_numpy(masks.window_mask(7, 9, window=3))
    assert_close(masks.causal_mask(7, 9, window=3), causal & window)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda i, j: j <= i,  # aligned at the start
        lambda i, j: j < i + 2,  # one short
        lambda i, j: j <= i + 3,  # one too far
        lambda i, j: j <= i + 2 and i + 2 - j <= 3,  # window of w + 1
        lambda i, j: j <= i + 2 and i + 2 - j < 2,  # window of w - 1
    ],
    ids=range(5),
)
@both
def test_causal_mask_can_fail(twin, wrong):
    with pytest.raises(AssertionError):
        assert_close(twin.file("masks").causal_mask(5, 7, window=3), by_loop(5, 7, wrong))


@both
def test_padding_mask(twin):
    real = np.array([[True, True, False], [False, True, True]])
    assert_close(twin.file("masks").padding_mask(twin.array(real)), real.reshape(2, 1, 1, 3))


# ---- positions


@both
def test_positions_by_hand(twin):
    real = np.array([[1, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]], bool)
    expected = np.array([[0, 1, 2, 2], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]])
    positions = to_numpy(twin.file("masks").positions_from(twin.array(real)))
    assert np.issubdtype(positions.dtype, np.integer)
    assert_close(positions.astype(np.int64), expected)


@both
@given(real=booleans(1, 1) | booleans(3, 6))
def test_positions_from(twin, real):
    """Real token number n of a row has position n; the others never leave the range of the real ones."""
    positions = to_numpy(twin.file("masks").positions_from(twin.array(real))).astype(np.int64)
    expected = []
    for row in real:
        seen = 0
        expected.append([])
        for token in row:
            seen += token
            expected[-1].append(max(seen - 1, 0))
    assert_close(positions, np.array(expected))


@both
def test_positions_of_many_tokens(twin):
    """Counted in whole numbers that hold more than a byte or a 16-bit float would."""
    positions = twin.file("masks").positions_from(twin.array(np.ones((1, 70_000), bool)))
    assert_close(to_numpy(positions).astype(np.int64), np.arange(70_000)[None])


# ---- softmax


def softmax_by_loop(scores, allowed):
    """Row by row, in float64, over the allowed keys alone."""
    allowed = np.broadcast_to(np.ones(1, bool) if allowed is None else allowed, scores.shape)
    result = np.zeros(scores.shape)
    for row in np.ndindex(scores.shape[:-1]):
        keys = np.flatnonzero(allowed[row])
        if keys.size:
            weights = np.exp(scores[row][keys] - scores[row][keys].max())
            result[row][keys] = weights / weights.sum()
    return result


def softmax(twin, scores, allowed):
    return twin.file("masks").masked_softmax(twin.array(scores), None if allowed is None else twin.array(allowed))


@both
def test_softmax_by_hand(twin):
    scores = np.log(np.array([[1.0, 2.0, 5.0], [1.0, 1.0, 2.0], [3.0, 4.0, 5.0]]))
    allowed = np.array([[1, 1, 1], [0, 1, 1], [0, 0, 0]], bool)
    expected = np.array([[1 / 8, 2 / 8, 5 / 8], [0, 1 / 3, 2 / 3], [0, 0, 0]])
    assert_close(softmax(twin, scores, allowed), expected)


SCORES = random_array(1, 2, 6, 4, 5, scale=3.0)
ALLOWED = {
    "none": None,
    "per query and key": np.tril(np.ones((4, 5), bool), -1),  # the first query sees nothing
    "per batch": np.array([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0]], bool).reshape(
        2, 1, 1, 5
    ),  # the second entry sees nothing
    "per head": np.random.default_rng(3).random((1, 6, 4, 5)) < 0.4,
    "full": np.random.default_rng(4).random((2, 6, 4, 5)) < 0.3,
}


@both
@pytest.mark.parametrize("allowed", ALLOWED.values(), ids=ALLOWED)
def test_softmax_against_the_loop_and_torch(twin, allowed):
    actual = softmax(twin, SCORES, allowed)
    assert_close(actual, softmax_by_loop(SCORES, allowed))
    if allowed is None:
        assert_close(actual, torch.softmax(torch.from_numpy(SCORES), -1))


@pytest.mark.parametrize("allowed", ALLOWED.values(), ids=ALLOWED)
def test_softmax_gradients(allowed):
    """p_j (c_j - Σ p c) over the allowed keys; 0 at hidden keys and in rows that see nothing."""
    C = random_array(5, *SCORES.shape)
    expected = softmax_by_loop(SCORES, allowed)
    expected_grad = expected * (C - (expected * C).sum(-1, keepdims=True))
    for twin in (TORCH, FLAX):
        _, grads = gradients(
            twin,
            lambda scores, twin=twin: twin.file("masks").masked_softmax(
                scores, None if allowed is None else twin.array(allowed)
            ),
            {"scores": SCORES},
            cotangent=C,
        )
        assert_close(grads, {"scores": expected_grad})
        if allowed is not None:
            hidden = ~np.broadcast_to(allowed, SCORES.shape)
            assert (grads["scores"][hidden] == 0).all()


@both
@pytest.mark.parametrize("content", [np.nan, np.inf, -np.inf, 1e308, -1e308])
def test_hidden_scores_play_no_part(twin, content):
    """Forward and backward, whatever they are, in a row that sees some keys and in one that sees none."""
    allowed = np.array([[1, 0, 1], [0, 0, 0]], bool)
    plain = np.array([[0.5, 0.0, 1.5], [0.0, 0.0, 0.0]])
    filled = np.where(allowed, plain, content)
    call = lambda scores: twin.file("masks").masked_softmax(scores, twin.array(allowed))  # noqa: E731
    output, grads = gradients(twin, call, {"scores": filled})
    plain_output, plain_grads = gradients(twin, call, {"scores": plain})
    assert_close(output, plain_output, rtol=0)
    assert_close(grads, plain_grads, rtol=0)
    assert (output[1] == 0).all()


@both
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_softmax_keeps_its_dtype_and_does_not_overflow(twin, dtype):
    scores = np.array([[1000.0, 1000.0, -1000.0], [-3e38, -3e38, -3e38]], dtype)
    expected = np.array([[0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]], dtype)
    assert_close(softmax(twin, scores, None), expected, rtol=1e-7)


@both
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_an_allowed_score_can_be_the_lowest_number(twin, dtype):
    """Hidden keys are not hidden by a low score, which this key would share its weight with."""
    lowest = np.finfo(dtype).min
    scores, allowed = np.array([[lowest, lowest, lowest, 0.0]], dtype), np.array([[True, False, True, False]])
    assert_close(softmax(twin, scores, allowed), np.array([[0.5, 0.0, 0.5, 0.0]], dtype), rtol=1e-7)


@both
@pytest.mark.parametrize("allowed", [None, np.array([[True, True], [True, False]])], ids=["no mask", "mask"])
def test_a_row_of_minus_infinity_sees_nothing(twin, allowed):
    """A float mask hides with -inf; where it hides every key the row is empty as with a boolean mask: 0, gradient 0."""
    scores = np.array([[-np.inf, -np.inf], [-np.inf, 0.0]] if allowed is None else [[0.0, 0.0], [-np.inf, 0.0]])
    expected = np.array([[0.0, 0.0], [0.0, 1.0]] if allowed is None else [[0.5, 0.5], [0.0, 0.0]])
    call = lambda scores: twin.file("masks").masked_softmax(scores, None if allowed is None else twin.array(allowed))  # noqa: E731
    output, grads = gradients(twin, call, {"scores": scores}, cotangent=np.array([[1.0, 1.0], [3.0, 3.0]]))
    assert_close(output, expected)
    assert_close(grads["scores"], np.zeros((2, 2)))


@both
def test_minus_infinity_hides_a_key(twin):
    """As a float mask does: weight 0 exactly, and a gradient that is 0, not NaN."""
    scores = np.array([[0.0, -np.inf, np.log(3.0)]])
    output, grads = gradients(
        twin,
        lambda scores: twin.file("masks").masked_softmax(scores, None),
        {"scores": scores},
        cotangent=np.ones((1, 3)) * 2,
    )
    assert_close(output, np.array([[0.25, 0.0, 0.75]]))
    assert np.abs(grads["scores"]).max() < 1e-15


@given(
    data=st.lists(st.floats(-50, 50), min_size=12, max_size=12),
    allowed=booleans(3, 4),
    shift=st.floats(-100, 100),
)
def test_softmax_rows(data, allowed, shift):
    """Rows sum to 1, or to 0 where nothing is allowed; adding a number to a row changes nothing; the twins agree."""
    scores = np.array(data).reshape(3, 4)
    rows = [to_numpy(softmax(twin, scores, allowed)) for twin in (TORCH, FLAX)]
    assert_close(rows[1], rows[0])
    assert_close(rows[0].sum(-1), allowed.any(-1).astype(np.float64))
    assert (rows[0][~allowed] == 0).all()
    assert (rows[0] >= 0).all()
    shifted = to_numpy(softmax(TORCH, scores + shift, allowed))
    assert np.abs(shifted - rows[0]).max() < 1e-12


@both
def test_softmax_can_fail(twin):
    """What real ports do with an empty row (NaN, the mean) and with a hidden key (a weak sentinel) is told apart."""
    allowed = np.array([[1, 1, 0], [0, 0, 0]], bool)
    scores = np.array([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    right = softmax(twin, scores, allowed)
    with np.errstate(invalid="ignore"):
        empty_is_nan = torch.softmax(torch.from_numpy(np.where(allowed, scores, -np.inf)), -1)
    empty_is_mean = torch.softmax(torch.from_numpy(np.where(allowed, scores, np.finfo(float).min)), -1)
    weak = torch.softmax(torch.from_numpy(np.where(allowed, scores, scores - 20.0)), -1) * torch.tensor([[1.0], [0.0]])
    for wrong in (empty_is_nan, empty_is_mean, weak):
        with pytest.raises(AssertionError):
            assert_close(right, wrong)


# ---- quarantine


@both
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_quarantine(twin, bad):
    X = random_array(7, 2, 4, 3)
    X[0, 2, 1] = bad
    X[1, 0] = bad
    clean, broken = twin.file("masks").quarantine(twin.array(X))
    expected = np.zeros((2, 4), bool)
    expected[0, 2] = expected[1, 0] = True
    assert_close(broken, expected)
    assert_close(clean, np.where(expected[..., None], 0.0, X), rtol=0)


@both
def test_quarantine_leaves_finite_rows_alone(twin):
    X = np.array([[[1e308, 1e308, 1e308], [5e-324, -0.0, 0.0]]])  # their sum overflows; they are finite all the same
    clean, broken = twin.file("masks").quarantine(twin.array(X))
    assert_close(broken, np.zeros((1, 2), bool))
    assert to_numpy(clean).tobytes() == X.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_quarantine_gradient(bad):
    """The identity for finite rows, 0 for broken ones."""
    X, C = random_array(7, 2, 4, 3), random_array(8, 2, 4, 3)
    X[0, 2, 1] = bad
    expected = C.copy()
    expected[0, 2] = 0
    for twin in (TORCH, FLAX):
        _, grads = gradients(twin, lambda X, twin=twin: twin.file("masks").quarantine(X)[0], {"X": X}, cotangent=C)
        assert_close(grads["X"], expected, rtol=0)


def test_twins_agree_on_a_masked_weighted_sum():
    """Mask, softmax and sum together: outputs and gradients."""
    allowed = np.asarray(ALLOWED["full"])

    def call(twin, scores, values):
        return twin.file("masks").masked_softmax(scores, twin.array(allowed)) @ values

    assert_twins_agree(call, {"scores": SCORES, "values": random_array(9, 2, 6, 5, 3)})


def test_masks_under_jit():
    """The same inside one compiled program."""
    masks = FLAX.file("masks")
    real = np.array([[1, 1, 0, 0], [0, 1, 1, 1]], bool)

    def run(scores, real):
        allowed = masks.causal_mask(4, 4, window=2) & masks.padding_mask(real)
        return masks.masked_softmax(scores, allowed), masks.positions_from(real)

    scores = random_array(10, 2, 1, 4, 4)
    weights, positions = jax.jit(run)(scores, real)
    band = by_loop(4, 4, lambda i, j: j <= i and i - j < 2)
    assert_close(weights, softmax_by_loop(scores, band & real[:, None, None]))
    assert_close(to_numpy(positions).astype(np.int64), np.array([[0, 1, 1, 1], [0, 0, 1, 2]]))
