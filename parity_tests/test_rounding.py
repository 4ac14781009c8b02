"""Modules by themselves in low precision: agreement where there is agreement, and each finding seen to fail."""

import dataclasses

import ml_dtypes
import pytest
import torch

from parity_tests import fuzz
from parity_tests.strategies import seeded_cases
from twinformer.parity import random_case
from twinformer.parity.compare import widened
from twinformer.parity.culprit import culprits
from twinformer.parity.evidence import Evidence
from twinformer.parity.rungs import forward, parameters, precision, rounding
from twinformer.parity.twins import FlaxTwin, TorchTwin
from twinformer.presets import preset


@pytest.fixture(scope="module")
def case():
    return random_case("small", preset("llama").replace(num_layers=1), seed=3, batch=4, length=64)


class Faulty(TorchTwin):
    """A PyTorch twin with one fault, given as what happens to the model after its weights are loaded."""

    def __init__(self, plant):
        self.plant = plant

    def _model(self, case):
        model = super()._model(case)
        self.plant(dict(model.named_modules()))
        return model


def under(case, plant):
    return Evidence(case, (Faulty(plant), FlaxTwin()))


def after(path, change):
    """A plant that changes what a module gives, except in float64."""

    def plant(modules):
        modules[path].register_forward_hook(
            lambda module, inputs, output: output if output.dtype == torch.float64 else change(output)
        )

    return plant


def test_right_twins_agree(case):
    rung = rounding.check(Evidence(case))
    assert rung.verdict == "agree", rung.problems
    assert rung.culprits == []
    shares = [one for one in rung.comparisons if "share unequal" in one.name]
    assert len(shares) >= 5
    assert max(share.relative for share in shares) < rounding.UNEQUAL / 5


def test_a_rounding_too_many_is_found_and_named(case):
    """In float32 the query is rounded to bfloat16 on its way."""
    path = "stack.blocks.0.attention.query"
    rung = rounding.check(under(case, after(path, lambda Y: Y.to(torch.bfloat16).to(Y.dtype))))
    assert rung.verdict == "differ"
    assert rung.culprits == [path]


def test_one_rounding_where_two_are_laid_down_is_found(case):
    """A last digit of bfloat16, up or down: far too little for any ratio of errors."""
    path = "stack.final_norm"
    rung = rounding.check(under(case, after(path, lambda Y: Y * 1.004 if Y.dtype == torch.bfloat16 else Y)))
    assert rung.verdict == "differ"
    assert rung.culprits == [path]
    assert any("share unequal" in problem for problem in rung.problems)


def test_another_dtype_is_found_even_if_nothing_is_lost(case):
    path = "stack.final_norm"
    rung = rounding.check(under(case, after(path, lambda Y: Y.float())))
    assert rung.verdict == "differ"
    assert any("float32 against bfloat16" in problem for problem in rung.problems)


# ---- whom rungs 0 to 2 name


def test_rung_0_names_the_owner_of_a_wrong_leaf(case):
    path = "stack.blocks.0.feedforward.gate"

    def plant(modules):
        with torch.no_grad():
            modules[path].weight[0, 0] += 1

    assert parameters.check(under(case, plant)).culprits == [path]


def test_a_gradient_that_turns_nan_does_not_hide_its_culprit(case):
    """Every module before it is handed NaN; each is examined with another cotangent."""
    path = "stack.blocks.0.attention.output"

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.nan

    def plant(modules):
        modules[path].register_forward_hook(lambda module, inputs, output: Broken.apply(output))

    found = culprits(under(case, plant), backward=True, bound=1e-11)
    assert [suspect.name for suspect in found] == [path]


def test_parts_put_together_otherwise_are_their_owners_fault(case):
    """What one part gains its successor loses, outside of both: each is right by itself, and so is their owner."""
    layer = "stack.blocks.0.feedforward"

    def plant(modules):
        dropout = modules[f"{layer}.dropout"]
        forward_of = modules[layer].forward

        def doubled(X, *, rng=None):
            before = modules[f"{layer}.down"].register_forward_pre_hook(lambda module, inputs: (inputs[0] / 2,))
            during = dropout.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2, *inputs[1:]))
            try:
                return forward_of(X, rng=rng)
            finally:
                before.remove()
                during.remove()

        modules[layer].forward = doubled

    rung = forward.check(under(case, plant))
    assert rung.verdict == "differ"
    assert rung.culprits == [layer]


# ---- what rounding alone can do, found by chance: random configuration 42/5


@pytest.fixture(scope="module")
def few():
    """The mean of five numbers near 75, of little spread: exact by luck in one twin, and in the other not."""
    return fuzz.subject_of(seeded_cases(1, seed=42_000_005)[0], "42/5")


def test_luck_in_a_mean_of_a_few_large_numbers_is_no_difference(few, monkeypatch):
    monkeypatch.setattr(rounding, "settings", lambda case: [("float32", "float32")])
    rung = rounding.check(Evidence(few))
    assert rung.verdict == "agree", rung.problems
    norm = next(one for one in rung.comparisons if one.name == "embedding.norm (by itself, float32)")
    ours, theirs = norm.errors
    assert max(ours, theirs) > 100 * min(ours, theirs)
    assert 1 <= len(norm.again) <= precision.NEIGHBOURS
    monkeypatch.setattr(rounding, "settings", lambda case: [("bfloat16", "bfloat16")])
    value = rounding.check(Evidence(fuzz.subject_of(seeded_cases(1, seed=42_000_057)[0], "42/57")))
    assert value.verdict == "agree", value.problems  # one number, which cancellation leaves of larger ones


@pytest.mark.parametrize("path", ["embedding.norm", "stack.blocks.0.feedforward_norm"])
def test_what_luck_cannot_do_is_found_there(few, path, monkeypatch):
    """More than 16 times what luck does to the one norm; of the other far less is seen."""
    monkeypatch.setattr(rounding, "settings", lambda case: [("float32", "float32")])
    factor = 1 + (2e-3 if path == "embedding.norm" else 1e-4)
    rung = rounding.check(under(few, after(path, lambda Y: Y * factor if Y.dtype == torch.float32 else Y)))
    assert rung.verdict == "differ"
    assert path in rung.culprits


# ---- parameters in one dtype, arithmetic in another


@pytest.fixture(scope="module")
def mixed():
    config = preset("textbook-decoder").replace(num_layers=1, compute_dtype="bfloat16")
    return random_case("mixed", config, seed=3, batch=4, length=64)


@pytest.mark.parametrize(
    ("parameters_in", "computed_in", "asked"),
    [
        ("float32", "float32", []),
        ("bfloat16", "bfloat16", []),
        ("float32", "float64", []),
        ("float64", "float64", []),
        ("float32", "bfloat16", [("bfloat16", "float32")]),
        ("float64", "float32", [("float32", "float64")]),
        ("float16", "float16", [("float16", "float16")]),
        ("float32", "float16", [("float16", "float16"), ("float16", "float32")]),
    ],
)
def test_settings_of_a_configuration(case, parameters_in, computed_in, asked):
    config = case.config.replace(param_dtype=parameters_in, compute_dtype=computed_in)
    found = precision.settings(dataclasses.replace(case, config=config))
    assert found == [("float32", "float32"), ("bfloat16", "bfloat16"), *asked]


def test_mixed_precision_agrees(mixed):
    evidence = Evidence(mixed)
    for rung in (rounding.check(evidence), precision.check(evidence)):
        assert rung.verdict == "agree", rung.problems
        assert sum("bfloat16 on float32 parameters" in one.name for one in rung.comparisons) >= 15


def test_parameters_keep_their_digits_in_mixed_precision(mixed):
    """The run has the float32 weights: another than that on weights rounded to bfloat16."""
    evidence = Evidence(mixed)
    kept = evidence.runs("bfloat16", parameters="float32")
    rounded = evidence.runs("bfloat16")
    for one, other in zip(kept, rounded, strict=True):
        assert (one.output != other.output).any()
        assert (one.output == widened(one.output.astype(ml_dtypes.bfloat16))).all()


@pytest.mark.parametrize("rung", [rounding, precision])
def test_a_fault_of_mixed_precision_only_is_found(mixed, rung):
    """A weight that the arithmetic rounds is rounded to less where parameters have more digits."""

    def plant(modules):
        linear = modules["stack.blocks.0.feedforward.up"]
        if linear.weight.dtype == torch.float32 and linear.compute_dtype == torch.bfloat16:
            coarse = linear.weight.to(torch.float8_e4m3fn).to(torch.float32)
            linear.weight.data = coarse * (1 + 2.0**-2)

    found = rung.check(under(mixed, plant))
    assert found.verdict == "differ"
    assert all("bfloat16 on float32 parameters" in problem for problem in found.problems)


def test_a_wider_output_of_mixed_precision_is_found(mixed):
    def plant(modules):
        up = modules["stack.blocks.0.feedforward.up"]
        if up.weight.dtype != up.compute_dtype:
            up.register_forward_hook(lambda module, inputs, output: output.to(module.weight.dtype))

    found = rounding.check(under(mixed, plant))
    assert found.verdict == "differ"
    assert found.culprits == ["stack.blocks.0.feedforward.up"]
    assert "(bfloat16 on float32 parameters): output in float32 against bfloat16" in found.problems[0]
