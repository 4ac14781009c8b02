"""Ties under max pooling and gradients that are rounding: no alarm where twins are right, and none hidden where not."""

import dataclasses

import numpy as np
import pytest
import torch

import flax_impl.heads
import torch_impl.heads
from parity_tests import fuzz
from parity_tests.strategies import seeded_cases
from twinformer.parity import judge, random_case
from twinformer.parity.compare import flowing_through, output_scales, sibling_scales
from twinformer.parity.evidence import Evidence
from twinformer.parity.kinks import TIE, without_ties
from twinformer.parity.rungs import gradients
from twinformer.parity.twins import Run
from twinformer.presets import preset

POOLED = preset("bert").replace(
    head="pooled", pool="max", pooler="none", num_layers=1, head_bias=False, head_transform=False
)


def drawn(number: int, seed: int = 31):
    return fuzz.subject_of(seeded_cases(1, seed=seed * 1_000_000 + number)[0], f"{seed}/{number}")


def case_with(rows: int, **inputs):
    case = random_case("max", POOLED, batch=rows)
    return dataclasses.replace(case, inputs=inputs, cotangent=np.ones((rows, 2)))


def run_of(states):
    return Run(np.zeros(1), {"stack": np.array(states, np.float64)})


def tied(one, other=None, **inputs):
    runs = (run_of(one), run_of(one if other is None else other))
    case = case_with(len(one), **inputs)
    settled, rows = without_ties(case, runs)
    expected = case.cotangent.copy()
    expected[rows] = 0
    np.testing.assert_array_equal(settled.cotangent, expected)
    np.testing.assert_array_equal(case.cotangent, 1.0)
    return rows


# [B 3, T 3, D 2]
PLAIN = [[[1.0, 2.0], [0.0, 4.0], [-1.0, 3.0]]] * 3


def changed(row, token, feature, value, states=PLAIN):
    found = np.array(states)
    found[row, token, feature] = value
    return found


@pytest.mark.parametrize("gap", [1e-16, 3.9 * TIE, -3.9 * TIE])
@pytest.mark.parametrize("side", [0, 1])
def test_tokens_that_tie_in_either_twin_take_their_row_out(gap, side):
    near = changed(1, 2, 1, 4.0 + gap)
    pair = (near, PLAIN) if side == 0 else (PLAIN, near)
    assert tied(*pair) == [1]


def test_what_does_not_tie_stays():
    assert tied(PLAIN) == []
    assert tied(changed(1, 2, 1, 4.0 + 4.1 * TIE)) == []  # of the largest magnitude, which is 4
    assert tied(changed(1, 2, 1, 2.0)) == []  # two that are not the largest


def test_tokens_equal_to_the_last_bit_are_the_convention_to_check():
    equal = changed(1, 2, 1, 4.0)
    assert tied(equal, equal) == []
    assert tied(equal, changed(1, 2, 1, np.nextafter(4.0, 5.0))) == [1]
    first_and_last = changed(1, 0, 1, 4.0, changed(1, 1, 1, 3.0, equal))
    assert tied(equal, first_and_last) == [1]  # exact in both, and yet other tokens


def test_padding_ties_with_nothing():
    equal = (changed(2, 2, 1, 4.0), changed(2, 2, 1, np.nextafter(4.0, 5.0)))
    mask = np.ones((3, 3), bool)
    assert tied(*equal, padding_mask=mask) == [2]
    mask[2, 2] = False
    assert tied(*equal, padding_mask=mask) == []
    mask[:] = False
    assert tied(*equal, padding_mask=mask) == []


def test_one_token_and_other_pools_are_left_alone():
    assert tied(np.array(PLAIN)[:, :1]) == []
    other = case_with(3)
    other = dataclasses.replace(other, config=other.config.replace(pool="mean"))
    near = run_of(changed(1, 2, 1, np.nextafter(4.0, 5.0)))
    settled, rows = without_ties(other, (run_of(PLAIN), near))
    assert settled is other
    assert rows == []


def test_what_is_not_finite_is_no_tie():
    for value in (np.nan, np.inf):
        assert tied(changed(1, 2, 1, value)) == []


# ---- found by chance: random configurations 31/344, 31/61, 31/606


def test_a_tie_is_no_difference():
    """Row 0 has one token twice in a model without positions, and it is the largest."""
    report = judge(drawn(344), rungs=("forward", "calls", "gradients", "stochastic"))
    assert report.verdict == "agree"
    for rung in ("calls", "gradients", "stochastic"):
        notes = " ".join(report.rungs[rung].notes)
        assert ("rows [0]" in notes) == (rung != "stochastic")  # dropout makes the two tokens two


@pytest.mark.parametrize("module", [torch_impl.heads, flax_impl.heads], ids=["torch", "flax"])
def test_a_tie_in_one_row_hides_no_fault_in_another(module, monkeypatch):
    """The gradient is divided among equals, or its factor is wrong: the row without a tie shows it."""
    right = module.pool

    def halved(h, real, kind):
        found = right(h, real, kind)
        still = found.detach() if isinstance(found, torch.Tensor) else flax_impl.heads.jax.lax.stop_gradient(found)
        return 0.5 * found + 0.5 * still

    monkeypatch.setattr(module, "pool", halved)
    rung = gradients.check(Evidence(drawn(344)))
    assert rung.verdict == "differ"
    assert any("rows [0]" in note for note in rung.notes)


def test_where_every_row_ties_gradients_cannot_tell():
    case = drawn(344)
    both = dataclasses.replace(case, inputs={name: value[[0, 0]] for name, value in case.inputs.items()})
    rung = gradients.check(Evidence(both))
    assert rung.verdict == "cannot tell"
    assert rung.problems == ["no parameter has a gradient beyond rounding: 0.0e+00 at most, beside 0.0e+00 of outputs"]
    assert any("rows [0, 1]" in note for note in rung.notes)


def test_gradients_behind_a_saturated_function_cannot_tell():
    """The pooler's tanh is at 1: what comes back through it is the rounding of 1 - 1."""
    report = judge(drawn(61), rungs=("forward", "gradients"))
    assert report.verdict == "cannot tell"
    assert "vacuous" in report.rungs["forward"].problems[0]
    assert "no parameter has a gradient beyond rounding" in report.rungs["gradients"].problems[0]


def test_a_gradient_that_is_zero_by_mathematics_is_held_against_the_others():
    """Every query sees one key: one twin computes 0 for what comes back to it, the other 2e-18."""
    rung = gradients.check(Evidence(drawn(606)))
    assert rung.verdict == "agree", rung.problems


# ---- scales


def test_scales_know_what_flows_through_the_model():
    outputs = {"a": np.array([[0.5, np.inf]]), "b": np.array([[1e-14, -1e-14]]), "c": np.array([[-2e-13]])}
    cotangent = np.array([-2.0, np.nan])
    flowing = flowing_through(outputs, cotangent)
    assert flowing == 2.0
    assert flowing_through({"a": np.array([3.0])}, cotangent) == 3.0
    assert output_scales(outputs, flowing=1.0) == {"a": 0.5, "b": 1.0, "c": 2e-13}
    parameters = {"x.weight": np.array([1e-14]), "x.bias": np.array([2e-15]), "y.weight": np.array([1e-12])}
    assert sibling_scales(parameters, flowing=1.0) == {"x.weight": 1.0, "x.bias": 1.0, "y.weight": 1e-12}
    assert sibling_scales(parameters) == {"x.weight": 1e-14, "x.bias": 1e-14, "y.weight": 1e-12}


@pytest.mark.parametrize("twin", [0, 1])
def test_a_gradient_that_does_not_flow_in_one_twin_is_a_difference(twin, monkeypatch):
    """0 on one side, and on the other as much as anywhere: no scale excuses that."""
    case = random_case("max", preset("textbook-encoder"), batch=2, length=6)
    evidence = Evidence(case)
    run = evidence.runs("float64", gradients=True)[twin]
    name = "stack.blocks.0.attention.query"
    run.module_gradients[name] = np.zeros_like(run.module_gradients[name])
    rung = gradients.check(evidence)
    assert rung.verdict == "differ"
    assert any(f"output of {name}:" in problem for problem in rung.problems)
