"""The judge: agreement where there is agreement, and each rung seen to fail on a fault planted in one twin."""

import contextlib
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console

import flax_impl
import torch_impl
from twinformer.learning import OptimizerConfig
from twinformer.parity import CannotJudgeError, judge, random_case, stepping, twins
from twinformer.parity.case import telling_inputs
from twinformer.parity.compare import compare
from twinformer.parity.culprit import culprits
from twinformer.parity.evidence import Evidence
from twinformer.parity.rungs import BY_DEFAULT, LADDER, forward, gradients, parameters, precision
from twinformer.parity.twins import FlaxTwin, TorchTwin
from twinformer.parity.verdict import rung_of
from twinformer.presets import PRESETS, preset


def small(name: str, length: int = 12):
    return random_case(name, preset(name), seed=3, batch=4, length=length)


#: every preset on these, some on rungs that look at what is their own besides; all rungs of a trained encoder are what
#: ``make parity`` judges, of a decoder ``test_cli.py``, of every preset ``make presets``. Poison in the others is in
#: ``test_rungs.py``, in rows of twelve tokens
EVERYWHERE = ("parameters", "forward", "gradients")
MORE = {
    "textbook-encoder": ("nonfinite",),
    "textbook-decoder": ("nonfinite",),
    "gpt2": ("nonfinite",),
    "llama": ("precision", "decoding"),
    "gemma": ("nonfinite", "precision"),
    "bert": ("precision",),
    "t5": ("precision",),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_agree_at_full_length(name):
    wanted = (*EVERYWHERE, *MORE.get(name, ()))
    rungs = [rung for rung in BY_DEFAULT if rung in wanted]
    report = judge(random_case(name, preset(name)), rungs=rungs)
    report.assert_agrees()
    assert report.exit_code == 0
    assert list(report.rungs) == rungs
    assert set(report.not_run) == {step.name for step in LADDER} - set(rungs)
    for rung_name, rung in report.rungs.items():
        assert rung.verdict == "agree", rung_name
        assert rung.comparisons


def test_what_is_run_by_default():
    assert set(BY_DEFAULT) == {step.name for step in LADDER} - {
        "long",
        "rounding",
        "compilation",
        "adapters",
        "accumulation",
        "beams",
        "resumption",
        "sharding",
    }


@pytest.fixture(scope="module")
def case():
    return small("textbook-encoder-decoder")


class Faulty(TorchTwin):
    """A PyTorch twin with one fault, given as what happens to the model after its weights are loaded."""

    def __init__(self, plant):
        self.plant = plant

    def _model(self, case, **options):
        model = super()._model(case, **options)
        self.plant(model)
        return model


#: its programs serve all tests whose fault is in the other twin
UNHARMED = FlaxTwin()


def with_fault(case, plant):
    return Evidence(case, (Faulty(plant), UNHARMED))


def module_of(model, path):
    return dict(model.named_modules())[path]


def test_rung_0_finds_one_changed_weight(case):
    def plant(model):
        with torch.no_grad():
            module_of(model, "decoder.blocks.1.cross_attention.value").weight[3, 2] *= 1 + 1e-6

    rung = parameters.check(with_fault(case, plant))
    assert rung.verdict == "differ"
    assert any(
        "decoder.blocks.1.cross_attention.value.weight" in problem and "[3, 2]" in problem for problem in rung.problems
    )


def test_rung_0_finds_a_square_matrix_left_transposed():
    case = small("gpt2")
    path = "stack.blocks.0.attention.output.weight"
    assert case.tensors[path].shape == (48, 48)

    def plant(model):
        layer = module_of(model, path.removesuffix(".weight"))
        layer.weight.data = layer.weight.data.T.contiguous()

    rung = parameters.check(with_fault(case, plant))
    assert rung.verdict == "differ"
    assert all(path in problem for problem in rung.problems)


def test_rung_0_finds_missing_and_surplus_leaves(case):
    class Renamed(TorchTwin):
        def leaves(self, case):
            leaves = super().leaves(case)
            leaves["decoder.final_norm.gain"] = leaves.pop("decoder.final_norm.weight")
            return leaves

    rung = parameters.check(Evidence(case, (Renamed(), FlaxTwin())))
    assert rung.verdict == "differ"
    assert "parameter only in torch_impl: decoder.final_norm.gain" in rung.problems
    assert "parameter only in the contract: decoder.final_norm.weight" in rung.problems


def test_different_parameter_sets_stop_the_climb_and_say_so(case, monkeypatch):
    original = TorchTwin.exported
    monkeypatch.setattr(TorchTwin, "exported", lambda self, case: original(self, case) | {"surplus": np.ones(1)})
    report = judge(case)
    assert report.verdict == "differ"
    assert list(report.rungs) == ["parameters"]
    assert set(report.not_run) >= {"forward", "gradients", "precision"}
    assert any("not run" in note for note in report.notes)


def test_rung_0_finds_a_symmetric_matrix_left_transposed():
    """Its own values say nothing about its layout; digits that only float64 has are added to it."""
    case = small("gpt2")
    path = "stack.blocks.0.attention.query.weight"
    case.tensors[path] = case.tensors[path] + case.tensors[path].T
    assert parameters.check(Evidence(case)).verdict == "agree"

    def plant(model):
        layer = module_of(model, path.removesuffix(".weight"))
        layer.weight.data = layer.weight.data.T.contiguous()

    rung = parameters.check(with_fault(case, plant))
    assert rung.verdict == "differ"
    assert all(path in problem for problem in rung.problems)


def test_rung_0_finds_a_detour_over_float32():
    class Narrow(TorchTwin):
        def leaves(self, case):
            return {path: leaf.astype(np.float32).astype(np.float64) for path, leaf in super().leaves(case).items()}

    assert parameters.check(Evidence(small("gpt2"), (Narrow(), FlaxTwin()))).verdict == "differ"


def test_rung_0_cannot_tell_the_layout_of_zeros():
    case = small("gpt2")
    path = "stack.blocks.0.attention.query.weight"
    case.tensors[path] = np.zeros_like(case.tensors[path])
    rung = parameters.check(Evidence(case))
    assert rung.verdict == "cannot tell"
    assert [problem for problem in rung.problems if path in problem]


def test_a_window_that_hides_nothing_is_named():
    case = random_case("x", preset("llama").replace(window=64), length=12)
    rung = forward.check(Evidence(case))
    assert any("window of 64 hides nothing from 12 tokens" in note for note in rung.notes)
    assert telling_inputs(preset("llama").replace(window=400, context_length=1024), 0)["tokens"].shape[1] == 408


def test_without_agreement_in_float64_there_is_no_truth(case):
    def plant(model):
        module_of(model, "encoder.final_norm").eps *= 2

    report = judge(case, rungs=["forward", "precision"], twins=(Faulty(plant), FlaxTwin()))
    assert report.rungs["precision"].verdict == "cannot tell"
    assert "there is no truth" in report.rungs["precision"].problems[0]
    assert report.verdict == "differ"


def test_rung_1_names_the_module_that_is_wrong(case):
    def plant(model):
        module_of(model, "decoder.blocks.0.feedforward_norm").eps *= 10

    rung = forward.check(with_fault(case, plant))
    assert rung.verdict == "differ"
    assert rung.culprits == ["decoder.blocks.0.feedforward_norm"]


def test_rung_1_names_two_faults_that_cancel_in_their_parent(case):
    """Up's output is doubled and down's input halved: the feed-forward layer as a whole agrees (ReLU scales)."""

    def plant(model):
        layer = module_of(model, "encoder.blocks.0.feedforward")
        layer.up.register_forward_hook(lambda module, inputs, output: 2 * output)
        layer.down.register_forward_pre_hook(lambda module, inputs: (inputs[0] / 2,))

    rung = forward.check(with_fault(case, plant))
    assert rung.verdict == "differ"
    assert rung.culprits == ["encoder.blocks.0.feedforward.up", "encoder.blocks.0.feedforward.down"]


def test_no_module_is_blamed_where_all_agree(case):
    assert culprits(Evidence(case), backward=True, bound=gradients.BOUND) == []


def test_rung_1_finds_a_nan_on_one_side(case):
    def plant(model):
        module_of(model, "decoder.final_norm").register_forward_hook(
            lambda module, inputs, output: output.index_put(
                (torch.tensor(0), torch.tensor(0)), torch.tensor(math.nan).double()
            )
        )

    rung = forward.check(with_fault(case, plant))
    assert rung.verdict == "differ"
    assert any("NaN at different places" in problem for problem in rung.problems)


def test_rung_1_finds_a_module_that_is_not_called(case):
    class Skips(TorchTwin):
        def run(self, case, **options):
            run = super().run(case, **options)
            del run.modules["encoder.blocks.0.attention"]
            return run

    rung = forward.check(Evidence(case, (Skips(), FlaxTwin())))
    assert "module only in flax_impl: encoder.blocks.0.attention" in rung.problems


class _HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


def test_rung_2_finds_a_backward_fault_that_no_forward_shows(case):
    def plant(model):
        module_of(model, "encoder.blocks.1.attention.value").register_forward_hook(
            lambda module, inputs, output: _HalfGradient.apply(output)
        )

    evidence = with_fault(case, plant)
    assert forward.check(evidence).verdict == "agree"
    rung = gradients.check(evidence)
    assert rung.verdict == "differ"
    assert rung.culprits == ["encoder.blocks.1.attention.value"]
    assert any(problem.startswith("encoder.blocks.1.attention.value.weight") for problem in rung.problems)
    assert not any(problem.startswith("decoder.") for problem in rung.problems)


def test_rung_3_finds_low_precision_where_wide_was_promised(case):
    """A softmax input rounded to bfloat16 is invisible in float64 and the float32 run is far off."""

    def plant(model):
        for path, module in model.named_modules():
            if path.endswith("attention.query"):
                module.register_forward_hook(
                    lambda module, inputs, output: (
                        output if output.dtype == torch.float64 else output.to(torch.bfloat16).to(output.dtype)
                    )
                )

    evidence = with_fault(case, plant)
    assert forward.check(evidence).verdict == "agree"
    rung = precision.check(evidence)
    assert rung.verdict == "differ"
    assert any("float32" in problem for problem in rung.problems)


@pytest.mark.parametrize("rungs", [["forwards"], ["parameters", "shards"], []])
def test_unknown_rungs_are_refused_before_any_work(rungs, case):
    with pytest.raises(CannotJudgeError, match="rungs"):
        judge(case, rungs=rungs)


def test_a_rung_that_was_not_asked_for_is_listed_as_not_run(case):
    report = judge(case, rungs=["parameters"])
    assert report.verdict == "agree"
    assert report.not_run == [step.name for step in LADDER[1:]]
    assert {row["verdict"] for row in report.to_dict()["rungs"][1:]} == {"not run"}


def test_watching_changes_nothing(case):
    """Hooks, wrapped calls and probes leave the output as it is, bit for bit."""
    wide = case.in_dtype("float64")
    twin = TorchTwin()
    inputs = {name: torch.from_numpy(np.array(value)) for name, value in case.inputs.items()}
    plain = twin._model(wide)(**inputs).detach().numpy()
    assert np.array_equal(plain, twin.run(wide).output)
    assert np.array_equal(plain, twin.run(wide, gradients=True).output)
    flax_twin = FlaxTwin()
    plain_flax = flax_twin.plain(wide)
    assert np.array_equal(plain_flax, flax_twin.run(wide).output)
    assert np.array_equal(plain_flax, flax_twin.plain(wide)), "the wrapped calls were not put back"
    model = flax_twin._model(wide)
    # with all of the compiler's optimizations, which the judge leaves out for small models, sums are rounded otherwise
    as_users_run_it = np.asarray(flax_impl.compiled(model)(**case.inputs))
    assert np.abs(plain_flax - as_users_run_it).max() <= 1e-13 * np.abs(plain_flax).max()


def test_the_report_reads_and_is_json(case):
    report = judge(case, rungs=["parameters", "forward"])
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert json.loads(text)["verdict"] == "agree"
    console = Console(width=120)
    with console.capture() as captured:
        console.print(report)
    shown = captured.get()
    for word in ("parameters", "forward", "gradients", "not run", "verdict: agree"):
        assert word in shown


def test_assert_agrees_raises_with_the_table(case):
    def plant(model):
        module_of(model, "encoder.final_norm").eps *= 2

    report = judge(case, rungs=["parameters"])
    report.rungs["forward"] = forward.check(with_fault(case, plant))
    assert report.verdict == "differ"
    assert report.exit_code == 1
    assert report.culprits == ["encoder.final_norm"]
    with pytest.raises(AssertionError, match=r"encoder\.final_norm"):
        report.assert_agrees()


def test_the_watch_sees_every_module_that_has_parameters(case):
    run = TorchTwin().run(case.in_dtype("float64"))
    model = torch_impl.build(case.config, seed=None)
    owners = {path.rpartition(".")[0] for path, _ in model.named_parameters()}
    assert owners - set(run.modules) <= {"head"}


def test_low_precision_is_compiled_as_users_have_it(case, monkeypatch):
    """Only float64 programs are compiled with little care."""
    asked = []

    def told(options):
        return lambda tensors: asked.append(options) or options

    monkeypatch.setattr(twins, "little_care", told({}))
    monkeypatch.setattr(twins, "hurried", told(contextlib.nullcontext()))
    monkeypatch.setattr(stepping, "little_care", told({}))
    monkeypatch.setattr(stepping, "hurried", told(contextlib.nullcontext()))
    for dtype in ("float32", "bfloat16"):
        FlaxTwin().run(case.in_dtype(dtype), detail="blocks")
    weights = {"a": np.ones(3)}
    stepping.steps("flax_impl", OptimizerConfig(), weights, [weights], [0.1], "float32")
    assert not asked
    FlaxTwin().run(case.in_dtype("float64"), detail="blocks")
    stepping.steps("flax_impl", OptimizerConfig(), weights, [weights], [0.1], "float64")
    assert len(asked) == 4


def test_what_is_added_to_a_rung_decides():
    """A failing comparison is not lost in a rung that could not tell."""
    right, wrong = (compare(f"module ({x})", np.array([x]), np.array([1.0]), bound=0.0) for x in (1.0, 2.0))
    rung = rung_of("nothing", [])
    rung.add([right], lambda one: one.name)
    assert (rung.verdict, rung.culprits) == ("cannot tell", [])
    rung.add([right, wrong], lambda one: one.name)
    assert (rung.verdict, rung.culprits) == ("differ", ["module (2.0)"])
    assert rung.problems == [wrong.describe()]
    assert rung.notes == ["nothing was compared"]
