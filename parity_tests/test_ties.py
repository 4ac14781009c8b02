"""Discrete outcomes: equal choices agree, ties are counted as ties, and nothing else passes."""

import numpy as np
import pytest

from twinformer.parity.ties import compare_argmax, compare_beams, compare_nucleus, compare_tokens, compare_top_k

NOISE = 1e-6


def scores(*rows):
    return np.array(rows, np.float64)


def test_the_same_choice_agrees():
    found = compare_argmax("x", scores([0, 2, 1]), scores([0, 2.1, 1]), noise=NOISE)
    assert found.agrees
    assert (found.compared, found.ties) == (1, 0)


def test_another_choice_beyond_the_margin_differs():
    found = compare_argmax("x", scores([1, 1 + 1e-4]), scores([1 + 1e-4, 1]), noise=NOISE)
    assert not found.agrees
    assert "x at [0]" in found.problems[0]


def test_another_choice_within_the_margin_is_a_tie():
    found = compare_argmax("x", scores([1, 1 + 1e-7]), scores([1 + 1e-7, 1]), noise=NOISE)
    assert found.agrees
    assert found.ties == 1


def test_a_tie_under_one_program_only_is_a_difference():
    """The second is nearly as good for the one, far behind for the other."""
    found = compare_argmax("x", scores([1, 1 + 1e-7]), scores([1, 0.5]), noise=NOISE)
    assert not found.agrees


def test_every_place_is_looked_at():
    one = np.tile(np.arange(5.0), (4, 3, 1))
    other = one.copy()
    other[3, 2] = other[3, 2][::-1]
    found = compare_argmax("x", one, other, noise=NOISE)
    assert found.compared == 12
    assert found.problems[0].startswith("x at [3, 2]")


@pytest.mark.parametrize("check", [compare_argmax, lambda *a, **kw: compare_nucleus(*a, p=0.5, **kw)])
def test_what_cannot_be_compared_is_no_agreement(check):
    good = scores([0.2, 0.3, 0.5])
    assert "shapes differ" in check("x", good, scores([1, 2]), noise=NOISE).problems[0]
    assert "NaN" in check("x", good, scores([0.2, np.nan, 0.5]), noise=NOISE).problems[0]
    assert "NaN" in check("x", scores([np.nan] * 3), scores([np.nan] * 3), noise=NOISE).problems[0]
    assert "-inf" in check("x", good, scores([0.2, -np.inf, 0.5]), noise=NOISE).problems[0]
    assert not check("x", np.ones((0, 3)), np.ones((0, 3)), noise=NOISE).agrees


def test_top_k_sets():
    one = scores([5, 4, 3, 2])
    assert compare_top_k("x", one, one[:, [1, 0, 2, 3]], k=2, noise=NOISE).agrees
    assert not compare_top_k("x", one, scores([5, 3, 4, 2]), k=2, noise=NOISE).agrees
    assert compare_top_k("x", scores([5, 3, 3 + 1e-7, 2]), scores([5, 3 + 1e-7, 3, 2]), k=2, noise=NOISE).ties == 1
    assert "expected k from 1 to 4" in compare_top_k("x", one, one, k=5, noise=NOISE).problems[0]


def test_top_p_takes_the_crossing_element():
    """0.5 + 0.3 reaches 0.8 exactly: the third is not needed; without the crossing element the set would be smaller."""
    one = scores([0.5, 0.25, 0.125, 0.125])
    assert compare_nucleus("x", one, one, p=0.75, noise=0.0).agrees
    less = scores([0.5, 0.25 - 1e-3, 0.125 + 1e-3, 0.125])
    assert not compare_nucleus("x", one, less, p=0.75, noise=1e-9).agrees
    barely = scores([0.5, 0.25 - 1e-10, 0.125 + 1e-10, 0.125])
    assert compare_nucleus("x", one, barely, p=0.75, noise=1e-9).ties == 1


def test_tokens_are_followed_to_the_first_tie():
    table = np.zeros((1, 3, 2))
    table[0, :, 1] = [1.0, 1e-7, 1.0]
    flipped = table.copy()
    flipped[0, 1] = [1e-7, 0.0]
    flipped[0, 2] = [1.0, 0.0]  # another text by now: not comparable, not compared
    found = compare_tokens("x", np.array([[1, 1, 1]]), np.array([[1, 0, 0]]), (table, flipped), noise=NOISE)
    assert found.agrees
    assert (found.compared, found.ties) == (2, 1)


def test_tokens_that_differ_by_more_than_a_tie():
    table = np.zeros((1, 2, 2))
    table[0, :, 1] = 1.0
    other = table[:, :, ::-1].copy()
    found = compare_tokens("x", np.array([[1, 1]]), np.array([[0, 0]]), (table, other), noise=NOISE)
    assert "x at [0, 0]: 1 against 0" in found.problems[0]


def test_tokens_chosen_against_their_own_scores():
    """Both programs give the same wrong tokens: equal, and still not what the scores say."""
    table = np.zeros((1, 2, 2))
    table[0, :, 1] = 1.0
    wrong = np.array([[1, 0]])
    found = compare_tokens("x", wrong, wrong, (table, table), noise=NOISE)
    assert "against its own scores" in found.problems[0]


def test_tokens_need_scores_of_their_shape():
    tokens = np.array([[1, 1]])
    assert not compare_tokens("x", tokens, tokens, (np.ones((1, 1, 2)), np.ones((1, 1, 2))), noise=NOISE).agrees
    assert not compare_tokens("x", tokens, tokens[:, :1], (np.ones((1, 2, 2)),) * 2, noise=NOISE).agrees


def test_beams():
    one = [((1, 2), -0.5), ((1, 3), -1.0), ((2, 2), -1.0 - 1e-8)]
    swapped = [one[0], ((2, 2), -1.0), ((1, 3), -1.0 - 1e-8)]
    assert compare_beams("x", one, one, noise=NOISE).agrees
    assert compare_beams("x", one, swapped, noise=NOISE).ties == 2
    other = [((1, 2), -0.5), ((1, 3), -1.0), ((4, 4), -1.2)]
    assert "rank 2" in compare_beams("x", one, other, noise=NOISE).problems[0]
    assert compare_beams("x", one, [((1, 2), -0.6), *one[1:]], noise=NOISE).problems
    assert not compare_beams("x", one, one[:2], noise=NOISE).agrees
    assert not compare_beams("x", [], [], noise=NOISE).agrees
    assert "twice" in compare_beams("x", [one[0], one[0]], [one[0], one[0]], noise=NOISE).problems[0]
    assert "not in order" in compare_beams("x", one[::-1], one[::-1], noise=NOISE).problems[0]
    nan = [((1, 2), float("nan")), ((1, 3), -1.0)]
    assert not compare_beams("x", nan, nan, noise=NOISE).agrees


def test_scores_of_a_shared_hypothesis_are_compared_at_any_rank():
    one = [((1,), -1.0), ((2,), -1.0 - 1.5e-6)]
    other = [((2,), -1.0), ((1,), -1.0 - 1.5e-6)]
    assert compare_beams("x", one, other, noise=NOISE).problems
