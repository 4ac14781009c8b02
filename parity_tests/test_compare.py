"""The judge's comparison refuses what it must refuse, and says where."""

import math

import ml_dtypes
import numpy as np
import pytest

from twinformer.parity.compare import (
    ErrorPair,
    compare,
    largest_difference,
    relative_move,
    set_problems,
    sibling_scales,
    widened,
    worst_of,
)

BOUND = 1e-12


def sample() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((4, 5))


def test_equal_arrays_agree():
    found = compare("x", sample(), sample(), bound=0.0)
    assert found.agrees
    assert found.largest == 0.0
    assert found.relative == 0.0


@pytest.mark.parametrize("place", [(0, 0), (3, 4), (2, 1)])
def test_one_wrong_element_is_found_and_named(place):
    wrong = sample()
    wrong[place] += 1e-10
    found = compare("x", wrong, sample(), bound=BOUND)
    assert not found.agrees
    assert found.worst == place
    assert found.largest == pytest.approx(1e-10, rel=1e-5)
    assert str(list(place)) in found.describe()


def test_differences_that_cancel_in_a_sum_or_a_mean_are_found():
    wrong = sample()
    wrong[0, 0] += 1.0
    wrong[0, 1] -= 1.0
    assert wrong.sum() == pytest.approx(sample().sum())
    assert not compare("x", wrong, sample(), bound=BOUND).agrees


def test_a_permutation_is_found():
    assert not compare("x", sample()[::-1], sample(), bound=BOUND).agrees


def test_a_transposed_square_is_found():
    square = np.random.default_rng(1).standard_normal((5, 5))
    assert not compare("x", square.T, square, bound=BOUND).agrees


def test_a_scaled_array_is_found():
    # the angle between the two is 0: a cosine would see nothing
    assert not compare("x", 1.001 * sample(), sample(), bound=BOUND).agrees


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_non_finite_value_on_one_side_is_a_problem(bad, side):
    pair = [sample(), sample()]
    pair[side][1, 2] = bad
    found = compare("x", *pair, bound=1e9)
    assert not found.agrees
    assert "different places" in found.problem
    assert "[1, 2]" in found.problem


def test_infinities_of_other_sign_are_a_problem():
    one, other = sample(), sample()
    one[0, 0], other[0, 0] = math.inf, -math.inf
    assert not compare("x", one, other, bound=1e9).agrees


def test_non_finite_values_at_the_same_places_are_compared_around():
    one, other = sample(), sample()
    one[0, 0] = other[0, 0] = math.nan
    one[0, 1] = other[0, 1] = -math.inf
    assert compare("x", one, other, bound=0.0).agrees
    one[3, 3] += 1e-9
    assert not compare("x", one, other, bound=BOUND).agrees


def test_nothing_finite_is_nothing_compared():
    nothing = np.full((2, 2), np.nan)
    assert not compare("x", nothing, nothing, bound=1e9).agrees


def test_shapes_are_never_broadcast():
    found = compare("x", np.ones((1, 5)), np.ones((4, 5)), bound=1e9)
    assert not found.agrees
    assert "(1, 5)" in found.problem
    assert "(4, 5)" in found.problem


def test_empty_arrays_are_not_agreement():
    found = compare("x", np.ones((0, 5)), np.ones((0, 5)), bound=1e9)
    assert not found.agrees
    assert "empty" in found.problem


def test_all_zero_expected_asks_for_zero():
    assert compare("x", np.zeros(3), np.zeros(3), bound=BOUND).agrees
    assert not compare("x", np.array([0, 0, 1e-300]), np.zeros(3), bound=BOUND).agrees


def test_bfloat16_and_whole_numbers_are_widened_exactly():
    assert compare("x", np.ones(3, ml_dtypes.bfloat16), np.ones(3), bound=0.0).agrees
    assert not compare("x", np.array([1, 2]), np.array([1, 3]), bound=0.1).agrees
    with pytest.raises(ValueError, match="2\\*\\*53"):
        widened(np.array([2**60 + 1]))


def test_sets_are_compared_by_name():
    assert set_problems("leaf", ["a", "b"], ["b", "c"], ("left", "right")) == [
        "leaf only in left: a",
        "leaf only in right: c",
    ]
    assert set_problems("leaf", ["a"], ["a"], ("left", "right")) == []


def test_sibling_scales_look_no_further_than_the_module():
    scales = sibling_scales(
        {"a.key.weight": np.array([3.0, -4.0]), "a.key.bias": np.array([1e-17]), "b.weight": np.ones(2)}
    )
    assert scales == {"a.key.weight": 4.0, "a.key.bias": 4.0, "b.weight": 1.0}


def pair(torch: float, flax: float, rms: tuple[float, float] = (1e-7, 1e-7)) -> ErrorPair:
    return ErrorPair("x", ("torch", "flax"), (torch, flax), rms, 2.0**-24, 8.0, 4.0)


def test_error_pairs_agree_within_a_small_multiple_only():
    assert pair(1e-6, 7.9e-6).agrees
    assert pair(7.9e-6, 1e-6).agrees
    assert not pair(1e-6, 8.1e-6).agrees
    assert not pair(8.1e-6, 1e-6).agrees
    assert pair(1e-6, 1e-6, (1e-6, 3.9e-6)).agrees
    assert not pair(1e-6, 1e-6, (1e-6, 4.1e-6)).agrees
    assert not pair(1e-6, 1e-6, (4.1e-6, 1e-6)).agrees


def test_error_pairs_count_errors_below_one_rounding_as_one_rounding():
    assert pair(0.0, 2.0**-22).agrees
    assert not pair(0.0, 2.0**-20).agrees


def test_error_pairs_carry_problems_of_either_side():
    good = compare("x", sample(), sample(), bound=1.0)
    bad = compare("x", np.full((4, 5), np.nan), sample(), bound=1.0)
    for errors in ([good, bad], [bad, good]):
        found = ErrorPair.of("x", ("torch", "flax"), errors, rounding=2.0**-24, bound=8.0, rms_bound=4.0)
        assert not found.agrees
        assert "NaN" in found.describe()


def test_the_worst_is_the_one_nearest_to_its_own_bound():
    tight = compare("tight", sample() + 1e-13, sample(), bound=1e-13)
    loose = compare("loose", sample() + 1e-3, sample(), bound=1.0)
    broken = compare("broken", np.ones(2), np.ones(3), bound=1.0)
    assert worst_of([tight, loose]) is tight
    assert worst_of([tight, broken, loose]) is broken
    assert worst_of([]) is None


def test_a_module_without_gradient_is_measured_against_the_model():
    scales = sibling_scales({"a.weight": np.array([2.0]), "b.weight": np.array([1e-16]), "c.weight": np.array([1e-12])})
    assert scales == {"a.weight": 2.0, "b.weight": 2.0, "c.weight": 1e-12}


# ---- the shorter ways to a figure


@pytest.mark.parametrize("bad", [None, np.nan, np.inf])
@pytest.mark.parametrize("scale", [None, 3.0])
def test_a_move_is_what_compare_says(bad, scale):
    rng = np.random.default_rng(5)
    expected = rng.normal(size=(4, 7))
    actual = expected + 1e-9 * rng.normal(size=(4, 7))
    actual[2, 3] -= 1e-6  # the largest difference is a negative one
    if bad is not None:
        expected[0, 1] = actual[0, 1] = bad
    found = compare("x", actual, expected, bound=0.0, scale=scale)
    assert found.worst == (2, 3)
    assert relative_move(actual, expected, scale) == found.relative
    assert largest_difference(actual, expected) == found.largest


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_in_one_only_is_no_move_and_no_floor(bad):
    expected = np.ones((3, 2))
    actual = expected.copy()
    actual[1, 1] = bad
    for one, other in ((actual, expected), (expected, actual)):
        assert relative_move(one, other) == 0.0
        assert largest_difference(one, other) == np.inf
