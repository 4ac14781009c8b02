"""What a report says beside its verdict: where to look, and where not."""

import dataclasses

import numpy as np
import pytest
import torch

import flax_impl.norms
import torch_impl
from parity_tests.test_judge import Faulty
from twinformer.parity import judge, random_case
from twinformer.parity.evidence import Evidence
from twinformer.parity.judge import _where_else
from twinformer.parity.report import Report
from twinformer.parity.rungs import calls, forward, parameters, stochastic
from twinformer.parity.twins import FlaxTwin, TorchTwin
from twinformer.parity.verdict import Rung
from twinformer.parity.writing_checks import _first_other
from twinformer.presets import preset


def small(name, **changes):
    return random_case(name, preset(name).replace(num_layers=1, **changes), seed=3, batch=3, length=9)


def reported(**verdicts):
    report = Report(subject="x", description="", rungs={}, config={})
    report.rungs = {name: Rung(verdict.replace("_", " "), "") for name, verdict in verdicts.items()}
    _where_else(report)
    return report.rungs["training"].notes


def test_a_run_that_differs_alone_is_the_steps_own():
    (note,) = reported(forward="agree", gradients="agree", calls="agree", training="differ")
    assert note.startswith(
        "forward, calls, gradients agree: the step itself is the place (keys, the loss and its gradient"
    )


@pytest.mark.parametrize("wrong", ["parameters", "forward", "calls", "gradients", "stochastic", "optimizer"])
def test_a_run_that_differs_for_what_it_is_made_of_says_so(wrong):
    below = {"forward": "agree", "gradients": "agree"} | {wrong: "differ"}
    (note,) = reported(**below, training="differ")
    assert note.startswith(f"{wrong} differ already: follow the culprits there")


def test_what_was_not_judged_gives_no_advice():
    assert reported(forward="agree", training="differ") == []
    assert reported(forward="agree", gradients="cannot_tell", training="differ") == []
    assert reported(forward="differ", gradients="agree", training="agree") == []


def test_precision_that_differs_has_a_culprit(monkeypatch):
    """Of whole runs no module can be named: the modules are asked by themselves."""

    def rough(normal, *arguments):
        found = flax_impl.norms.__dict__["_right"](normal, *arguments)
        return found * (1 + 2.0**-10) if found.dtype == "float32" else found

    monkeypatch.setattr(flax_impl.norms, "_right", flax_impl.norms._weighted, raising=False)
    monkeypatch.setattr(flax_impl.norms, "_weighted", rough)
    rung = judge(small("textbook-encoder"), rungs=("precision",)).rungs["precision"]
    assert rung.verdict == "differ"
    assert {name.rpartition(".")[2] for name in rung.culprits} == {"attention_norm", "feedforward_norm", "final_norm"}
    assert any(note.startswith("by themselves (rung rounding): ") for note in rung.notes)


def test_weights_of_zero_are_not_said_to_have_no_effect():
    case = small("bert")
    path = "stack.blocks.0.attention.query.bias"
    zero = case.tensors | {path: np.zeros_like(case.tensors[path])}
    notes = forward.check(Evidence(dataclasses.replace(case, tensors=zero))).notes
    assert f"0 everywhere, so that no change relative to itself was tried: {path}" in notes
    assert not any(path in note for note in notes if note.startswith("no change of a weight was seen"))


def test_the_first_place_of_a_stream_is_named():
    wanted = np.array([[1, 2, 3], [4, 5, 6]])
    assert _first_other(np.array([[1, 2, 3], [4, 0, 7]]), wanted) == (
        "expected 5, got 0 in row 1, step 1, the first of 2 places"
    )
    assert _first_other(wanted[:, :2], wanted) == "expected shape (2, 3), got (2, 2)"


# ---- what a fourth reviewer found missing


def test_a_row_of_documents_has_padding_of_several_places():
    found = calls._documents(4, 24)
    assert found[-1].tolist() == [5] * 6 + [0] * 6 + [2] * 6 + [0] * 6
    assert len({tuple(row) for row in found}) == 4
    assert calls._documents(1, 24)[0].tolist() == [5, 5, 0, *[5] * 5, *[2] * 8, *[9] * 8]
    assert calls._documents(3, 7)[-1].tolist() == [5, 5, 0, 5, 5, 5, 5]  # too short for it


class Shares(TorchTwin):
    def kept(self, case):
        return {path: tensor + path.endswith("final_norm.bias") for path, tensor in super().kept(case).items()}


def test_what_was_written_stays():
    case = small("textbook-decoder")
    rung = parameters.check(Evidence(case, (Shares(), FlaxTwin())))
    assert rung.verdict == "differ"
    assert rung.culprits == ["export_weights"]
    assert "stack.final_norm.bias as torch_impl wrote it, once the model has other weights" in rung.problems[0]
    for twin in (TorchTwin(), FlaxTwin()):
        kept = twin.kept(case)
        assert all(np.array_equal(kept[path], tensor) for path, tensor in case.tensors.items())


def test_a_leaf_that_is_wrong_from_the_first_is_not_said_to_be_shared():
    def plant(model):
        with torch.no_grad():
            dict(model.named_modules())["stack.blocks.0.attention.value"].weight[3, 2] *= 1 + 1e-6

    rung = parameters.check(Evidence(small("textbook-decoder"), (Faulty(plant), FlaxTwin())))
    assert rung.culprits == ["stack.blocks.0.attention.value"]


@pytest.mark.parametrize(
    ("changes", "modes"),
    [
        ({}, []),
        ({"remat": True}, ["torch_impl, remat", "flax_impl, remat"]),
        ({"scan_layers": True}, ["flax_impl, scan"]),
        ({"remat": True, "scan_layers": True}, ["torch_impl, remat", "flax_impl, scan of remat"]),
    ],
)
def test_dropout_in_a_loop_or_remat_is_asked_of_who_has_it(changes, modes, monkeypatch):
    asked = []
    right = stochastic.run_in_mode

    def seen(twin, case, mode):
        asked.append(f"{twin.name}, {mode}")
        return right(twin, case, mode)

    monkeypatch.setattr(stochastic, "run_in_mode", seen)
    case = random_case("x", preset("textbook-decoder").replace(num_layers=2, **changes), seed=3, batch=2, length=6)
    rung = stochastic.check(Evidence(case))
    assert rung.verdict == "agree", rung.problems
    assert asked == modes
    assert {one.name.rpartition(" (")[2].rstrip(")") for one in rung.comparisons if " (" in one.name} == set(modes)


def test_remat_that_draws_anew_is_found_where_it_is_configured(monkeypatch):
    right = stochastic.run_in_mode

    def other_key(twin, case, mode):
        return right(twin, dataclasses.replace(case, inputs=case.inputs | {"rng": np.array([1, 1])}), mode)

    monkeypatch.setattr(stochastic, "run_in_mode", other_key)
    rung = stochastic.check(Evidence(small("textbook-decoder", remat=True)))
    assert rung.verdict == "differ"
    assert rung.culprits == ["torch_impl, remat", "flax_impl, remat"]


def test_positions_of_padding_within_a_row_are_found(monkeypatch):
    right = torch_impl.masks.segment_positions
    wrong = lambda segments: right(segments + 1)  # noqa: E731
    for module in (torch_impl.masks, torch_impl.embeddings, torch_impl.models, torch_impl.stack):
        if getattr(module, "segment_positions", None) is right:
            monkeypatch.setattr(module, "segment_positions", wrong)
    rung = calls.check(Evidence(small("gpt2")))
    assert rung.verdict == "differ"
    assert all("documents in a row" in problem for problem in rung.problems)
