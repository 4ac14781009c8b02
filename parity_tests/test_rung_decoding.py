"""Rung 7: every way to cut a sequence gives what one call gives; each cell is seen to fail, and the place is named."""

import dataclasses

import numpy as np
import pytest

import flax_impl
import torch_impl
from parity_tests.mutants import MUTANTS
from parity_tests.mutants.cases import CASES
from parity_tests.torch_twice import UNHARMED, Other, Second, torch_twice
from twinformer.parity import random_case
from twinformer.parity.decoding_runs import PADDINGS, plan_for
from twinformer.parity.evidence import Evidence
from twinformer.parity.rungs import decoding
from twinformer.parity.twins import TorchTwin
from twinformer.presets import preset

# checks of shapes at every call, which other tests make, take most of the time here
pytestmark = pytest.mark.usefixtures("without_shape_hook")


def small(name: str, **changes):
    config = preset(name)
    sizes = {"model_dim": 12, "hidden_dim": 16, "num_layers": 1, "vocab_size": 23, "context_length": 48}
    if config.architecture == "encoder-decoder":
        sizes |= {"num_encoder_layers": 1, "source_vocab_size": 23}
    return random_case(name, config.replace(**(sizes | changes)), seed=3, length=12)


def planted(name, twin="torch_impl"):
    return next(mutant for mutant in MUTANTS if (mutant.id, mutant.twin) == (name, twin))


# ---- agreement


def test_a_batch_of_one_is_looked_at(monkeypatch):
    """The product with one row, without the bias."""
    row = flax_impl.heads._unembed_row
    monkeypatch.setattr(flax_impl.heads, "_unembed_row", lambda *args, bias=None, **options: row(*args, **options))
    rung = decoding.check(Evidence(small("llama", head="untied", head_bias=True)))
    assert rung.verdict == "differ"
    assert all("a batch of one" in problem for problem in rung.problems)


def test_a_window_is_left_while_decoding(monkeypatch):
    """While decoding, a window in every block, though one has none; the window is longer than what is decoded."""
    step = torch_impl.Block._step

    def narrow(self, X, kept, memory, now, bias):
        return step(self, X, kept, memory, now._replace(unbounded=None), bias)

    monkeypatch.setattr(torch_impl.Block, "_step", narrow)
    rung = decoding.check(Evidence(small("gemma", num_layers=2, window=32, window_layers=(0,))))
    assert rung.verdict == "differ"
    assert any("a window of 5 instead of 32" in note for note in rung.notes)


def test_both_twins_decode_in_steps():
    rung = decoding.check(Evidence(small("textbook-decoder", num_layers=2)))
    assert rung.verdict == "agree", rung.problems
    names = {one.name for one in rung.comparisons}
    for twin in ("torch_impl", "flax_impl"):
        for cut in ("one prefill", "chunks", "token by token"):
            for cache in ("fresh cache", "reused cache"):
                assert {f"{twin}: {cut}, {cache}, {padding}" for padding in PADDINGS} <= names
        assert f"{twin}: token by token, fresh cache, no mask" in names
        assert f"{twin}: chunks, rows exchanged" in names
        assert f"{twin}: token by token, a batch of one" in names
        assert f"{twin}: one prefill, positions given, logits of one place" in names
        assert {f"{twin}: token by token, NaN and infinities, {padding}" for padding in PADDINGS} <= names
    assert any(name.startswith("torch_impl, flax_impl: ") for name in names)
    assert any("another token before the last moves its logits" in note for note in rung.notes)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("textbook-encoder-decoder", {}),
        ("t5", {}),
        ("llama", {"window": 3}),
        ("gpt2", {"window": 5}),
        ("gpt2", {"window": 1}),
        ("textbook-decoder", {"positions": "alibi"}),
        ("gpt2", {"context_length": 3}),
        ("llama", {"context_length": 1}),
        ("llama", {"vocab_size": 1}),
    ],
)
def test_other_models_decode_in_steps(name, changes):
    rung = decoding.check(Evidence(small(name, **changes), (TorchTwin(), Second())))
    assert rung.verdict == "agree", rung.problems


def test_an_encoder_does_not_apply():
    assert decoding.check(torch_twice(small("bert"))).verdict == "does not apply"


def test_the_plan_has_everything_that_shows():
    plan = plan_for(small("llama").config)
    assert plan.real[0].all()
    assert not plan.real[1, 0]
    assert not plan.real[2, -1]
    assert plan.real[3, -1]
    assert not plan.real[3].all()
    assert sum(plan.cuts["chunks"]) == sum(plan.cuts["token by token"]) == plan.length
    assert len(plan.cuts["chunks"]) > 2
    assert plan.slots == plan.length
    assert plan_for(small("llama", window=5).config).slots == 5
    poison = small("llama").config.vocab_size - 1
    assert poison not in plan.tokens
    assert (plan.poisoned[0] == poison).sum() == 1
    assert (plan.poisoned[~plan.real] == poison).all()


# ---- it can fail

FAULTS = {
    "M10": "stack.blocks.0.attention",
    "M19": "stack.blocks.0.attention",
    "M22": "stack.blocks.0.attention",
    "C1": "stack.blocks.0.attention",
    "C2": "the cache",
    "C3": "the cache",
    "C5": "stack.blocks.0.attention",
    "P11": "stack",
    "T92": "the model itself",
    "T94": "the model itself",
    "T95": "stack",
    "T97": "the cache",
    "T98": "the cache",
    "T99": "the cache",
    "T101": "decoder.blocks.0.cross_attention",
    "T102": "the cache",
    "T103": "decoder",
    "T104": "the model itself",
}


@pytest.mark.parametrize("name", FAULTS)
def test_two_that_are_wrong_alike_are_found(name):
    """Each is held against its own full forward: that both decode alike says nothing."""
    mutant = planted(name)
    with mutant.plant():
        rung = decoding.check(torch_twice(CASES[mutant.case]()))
    assert rung.verdict == "differ"
    assert rung.culprits == [FAULTS[name]]


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("T97", "reused cache"),
        ("T99", "rows exchanged"),
        ("T102", "NaN and infinities"),
        ("T104", "logits of one place"),
        ("T94", "fresh cache"),
    ],
)
def test_cells_that_fail_are_named(name, cells):
    mutant = planted(name)
    with mutant.plant():
        rung = decoding.check(torch_twice(CASES[mutant.case]()))
    failing = [one.name for one in rung.comparisons if not one.agrees]
    assert any(cells in cell for cell in failing)
    if name != "T94":
        assert all(cells in cell for cell in failing)
    assert any(note.startswith("torch_impl: ") and "cells fail" in note for note in rung.notes)


class Shifts(Other):
    """All that it decodes is off by a share of its scale, in one cell."""

    def __init__(self, share):
        super().__init__(UNHARMED)
        self.share = share

    def once(self, what, case, ask):
        problems, found = super().once(what, case, ask)
        cell = "masked: token by token, reused cache"
        moved = found.cells[cell].copy()
        moved[3, -1, 0] += self.share * np.abs(moved).max()
        return problems, dataclasses.replace(found, cells=found.cells | {cell: moved})


def test_little_is_enough_and_rounding_is_not():
    case = small("llama")
    rung = decoding.check(Evidence(case, (UNHARMED, Shifts(1e-11))))
    assert rung.verdict == "differ"
    assert [one.name for one in rung.comparisons if not one.agrees] == [
        "other: token by token, reused cache, holes",
        "torch_impl, other: token by token, reused cache",
    ]
    assert rung.culprits == ["the cache"]
    assert decoding.check(Evidence(case, (UNHARMED, Shifts(1e-13)))).verdict == "agree"


def test_a_history_that_nobody_looks_at_cannot_tell():
    """With no values every token is alone: then a cache that is never read is as good as any."""
    case = small("llama")
    path = "stack.blocks.0.attention.value.weight"
    case = dataclasses.replace(case, tensors=case.tensors | {path: np.zeros_like(case.tensors[path])})
    rung = decoding.check(torch_twice(case))
    assert rung.verdict == "cannot tell"
    assert "vacuous" in rung.problems[0]


def test_models_that_differ_are_not_the_cache():
    """Each twin decodes as it computes, but a norm computes something else."""
    mutant = planted("N1")
    with mutant.plant():
        rung = decoding.check(Evidence(CASES[mutant.case]()))
    assert rung.verdict == "differ"
    assert rung.culprits
    assert all(name.partition("#")[0].endswith("norm") for name in rung.culprits)
