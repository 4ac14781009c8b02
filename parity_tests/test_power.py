"""Detection power: what each comparison would have noticed, and comparisons that could notice nothing."""

import dataclasses

import numpy as np
import pytest

from twinformer.parity import judge, random_case
from twinformer.parity.compare import Comparison
from twinformer.parity.evidence import Evidence
from twinformer.parity.power import CHANGE, measure, tensors_of, with_change
from twinformer.parity.rungs import forward, gradients
from twinformer.parity.twins import TorchTwin
from twinformer.presets import PRESETS, preset


def small(name: str):
    return random_case(name, preset(name), seed=3, length=12)


@pytest.mark.parametrize("name", PRESETS)
def test_every_comparison_and_every_parameter_would_notice(name):
    evidence = Evidence(small(name), with_gradients=True)
    rung = forward.check(evidence)
    assert rung.verdict == "agree", rung.problems
    for one in rung.comparisons:
        assert isinstance(one, Comparison)
        assert one.notices is not None, one.name
        assert one.notices < CHANGE / 1000, one.name
    power = evidence.power(forward.BOUND)
    assert power.parameters.keys() == evidence.case.tensors.keys()
    assert max(power.parameters.values()) < CHANGE / 1000


def test_the_figure_is_right():
    """A change of twice the figure is over the bound, one of half of it is not."""
    case = small("gpt2").in_dtype("float64")
    evidence = Evidence(case, with_gradients=True)
    path = "stack.blocks.1.feedforward.up.weight"
    smallest = measure(evidence, bound=1e-9, gradients=False).parameters[path]
    twin = TorchTwin()
    place = _median(case.tensors[path])
    call = next(call for call in twin.record(case) if call.path == path.removesuffix(".weight"))
    before = twin.replay(case, [call])[0].output
    for factor, seen in ((2.0, True), (0.5, False)):
        changed = dict(case.tensors)
        changed[path] = changed[path].copy()
        changed[path][place] *= 1 + factor * smallest
        other = twin.replay(_with(case, changed), [call])[0].output
        assert (np.abs(other - before).max() / np.abs(before).max() > 1e-9) == seen


def _median(tensor):
    order = np.argsort(np.abs(tensor).ravel(), kind="stable")
    return np.unravel_index(order[tensor.size // 2], tensor.shape)


def _with(case, tensors):
    return dataclasses.replace(case, tensors=tensors)


def test_with_change_changes_one_weight_by_a_thousandth():
    case = small("gpt2")
    path = "stack.blocks.0.attention.key.weight"
    other = with_change(case, {path: (3, 2)})
    changed = other.tensors[path] != case.tensors[path]
    assert changed.sum() == 1
    assert changed[3, 2]
    assert other.tensors[path][3, 2] / case.tensors[path][3, 2] == pytest.approx(1 + CHANGE, rel=1e-6)
    assert all(other.tensors[name] is case.tensors[name] for name in case.tensors if name != path)


@pytest.mark.parametrize(("rung", "name"), [(forward, "forward"), (gradients, "gradients")])
def test_a_bound_so_wide_that_nothing_could_fail_is_no_agreement(rung, name, monkeypatch):
    monkeypatch.setattr(rung, "BOUND", 0.5)
    report = judge(small("textbook-decoder"), rungs=[name])
    assert report.rungs[name].verdict == "cannot tell"
    assert report.exit_code == 2
    assert all("vacuous" in problem for problem in report.rungs[name].problems)


def test_a_model_whose_output_depends_on_nothing_is_no_agreement():
    """With a head of zeros every output is 0 and agrees with any other such model."""
    case = small("llama")
    case.tensors["head.weight"] = np.zeros_like(case.tensors["head.weight"])
    rung = forward.check(Evidence(case))
    assert rung.verdict == "cannot tell"
    assert rung.problems[0].startswith("output: vacuous")


def test_what_no_weight_can_move_is_named():
    rung = gradients.check(Evidence(small("gpt2"), with_gradients=True))
    assert rung.verdict == "agree"
    note = next(note for note in rung.notes if note.startswith("moved by no weight"))
    assert [name.strip() for name in note.partition(":")[2].split(",")] == [
        f"stack.blocks.{layer}.attention.key.bias" for layer in range(preset("gpt2").num_layers)
    ]


def test_every_compared_tensor_is_measured():
    run = TorchTwin().run(small("t5").in_dtype("float64"), gradients=True)
    names = tensors_of(run)
    assert len(names) == 1 + len(run.modules) + len(run.gradients) + len(run.module_gradients)
