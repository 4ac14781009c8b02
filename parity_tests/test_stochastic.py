"""Dropout judged: the two twins under one key, and each twin's counts, every one of them seen to fail."""

import dataclasses

import numpy as np
import pytest

from parity_tests.mutants import CASES, MUTANTS
from twinformer.parity import judge, random_case
from twinformer.parity.evidence import Evidence
from twinformer.parity.rungs import long
from twinformer.parity.rungs.stochastic import _counts, with_dropout
from twinformer.parity.twins import FlaxTwin, TorchTwin
from twinformer.presets import preset


@pytest.fixture(scope="module")
def case():
    config = preset("gpt2").replace(num_layers=1)
    return random_case("small", config, seed=3, batch=2, length=6)


def test_the_twins_agree_under_dropout(case):
    report = judge(case, rungs=["stochastic"])
    report.assert_agrees()
    assert len(report.rungs["stochastic"].comparisons) > 40


def test_a_model_without_dropout_is_given_some(case):
    noisy = with_dropout(case)
    assert (noisy.config.dropout, noisy.config.attention_dropout, noisy.config.hidden_dropout) == (0.1, 0.1, 0.1)
    kept = with_dropout(dataclasses.replace(case, config=case.config.replace(dropout=0.3)))
    assert (kept.config.dropout, kept.config.attention_dropout) == (0.3, 0.0)


def test_the_case_really_drops(case):
    twin = TorchTwin()
    still, noisy = (twin.run(one.in_dtype("float64")).output for one in (case, with_dropout(case)))
    assert not np.allclose(still, noisy)


@pytest.mark.parametrize("twin", [TorchTwin(), FlaxTwin()], ids=lambda twin: twin.name)
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_counts_of_right_masks_agree(twin, rate):
    assert all(count.agrees for count in _counts(twin, rate))


class Drops:
    """Dropout as a function of the random numbers that it is given, one for each element."""

    name = "made_up"

    def __init__(self, mask):
        self.mask = mask

    def drop(self, rate, values, seed):
        mask = self.mask(np.random.default_rng(seed), rate, values.shape)
        if values.dtype == np.float64:
            return values * mask
        return (values.astype(np.float32) * mask.astype(np.float32)).astype(values.dtype).astype(np.float64)


def right(rng, rate, shape):
    return (rng.random(shape) >= rate) / (1 - rate)


def test_long_rows_agree_with_and_without_dropout():
    config = preset("gpt2").replace(num_layers=2, context_length=272, window=100)
    rung = long.check(Evidence(random_case("long", config, seed=3, batch=2, length=6)))
    assert rung.verdict == "agree", rung.problems
    assert rung.checked.startswith("without dropout, with dropout")
    assert rung.notes == ["a model of 1 of 2 layers and a window of 32 instead of 100 stands for the whole"]
    short = config.replace(context_length=long.LENGTH - 1)
    assert long.check(Evidence(random_case("short", short, length=6))).verdict == "does not apply"


@pytest.mark.parametrize("name", ["T136", "T137"])
def test_what_only_training_does_is_looked_at(name):
    """Flax's attention by pieces, and its dropout, where nothing but the judge's own way to call it leads there."""
    mutant = next(one for one in MUTANTS if (one.id, one.twin) == (name, "flax_impl"))
    with mutant.plant():
        rung = long.check(Evidence(CASES[mutant.case]()))
    assert rung.verdict == "differ"
    assert rung.culprits == ["stack.blocks.0.attention"]


def test_every_long_call_can_fail():
    """PyTorch's kernel takes every mask for the causal one: without a window it is, but for what is hidden besides."""
    mutant = next(one for one in MUTANTS if (one.id, one.twin) == ("T138", "torch_impl"))
    case, calls = CASES["long-window"](), {"without dropout", "with padding", "documents in a row"}
    for window, wrong in ((32, calls), (None, calls - {"without dropout"})):
        with mutant.plant():
            rung = long.check(Evidence(dataclasses.replace(case, config=case.config.replace(window=window))))
        failing = {one.name.rpartition(" (")[2].rstrip(")") for one in rung.comparisons if not one.agrees}
        assert failing == wrong


WRONG = {
    "factor": lambda rng, rate, shape: right(rng, rate, shape) * (1 - rate),
    "share dropped": lambda rng, rate, shape: (rng.random(shape) >= rate * 1.2) / (1 - rate),
    "neighbours among batch": lambda rng, rate, shape: right(rng, rate, (1, *shape[1:])).repeat(shape[0], 0),
    "neighbours among heads": lambda rng, rate, shape: right(rng, rate, (shape[0], 1, *shape[2:])).repeat(shape[1], 1),
    "neighbours among queries": lambda rng, rate, shape: right(rng, rate, (*shape[:2], 1, shape[3])).repeat(
        shape[2], 2
    ),
    "neighbours among keys": lambda rng, rate, shape: right(rng, rate, (*shape[:3], 1)).repeat(shape[3], 3),
    "values in bfloat16": lambda rng, rate, shape: right(rng, rate, shape) * (1 + 2.0**-7),
    "under two keys": lambda rng, rate, shape: right(np.random.default_rng(0), rate, shape),
}


@pytest.mark.parametrize("what", WRONG)
def test_every_count_can_fail(what):
    assert all(count.agrees for count in _counts(Drops(right), 0.2))
    failed = [count.name for count in _counts(Drops(WRONG[what]), 0.2) if not count.agrees]
    assert any(what in name for name in failed), failed


def test_a_case_that_has_a_key_gets_the_rungs_own(case):
    """A key has one axis, and no tokens to cut (found by chance)."""
    keyed = with_dropout(dataclasses.replace(case, inputs=case.inputs | {"rng": np.array([1, 2])}))
    assert np.array_equal(keyed.inputs["rng"], with_dropout(case).inputs["rng"])
    assert set(keyed.inputs) == {*case.inputs, "rng"}
