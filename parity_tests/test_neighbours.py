"""Rung 3 asks neighbouring weights only where there is a doubt, and no longer than there is one."""

import types

import numpy as np
import pytest

from twinformer.parity.rungs import precision

TWINS = [types.SimpleNamespace(name="torch_impl"), types.SimpleNamespace(name="flax_impl")]


class Prepared:
    """Evidence whose second twin's error in each draw is given; the first's is 1e-6 always. The truth is 1."""

    twins = TWINS

    def __init__(self, monkeypatch, errors):
        self.asked = []

        def draw(evidence, dtype, parameters, setting, number):
            self.asked.append(number)
            return {"output": np.ones(3)}, self.found(errors[number]), {}

        monkeypatch.setattr(precision, "_draw", draw)
        monkeypatch.setattr(precision, "_tensors", lambda run: run)

    def found(self, error):
        return [{"output": np.ones(3) + np.array([0, 1e-6, 0])}, {"output": np.ones(3) + np.array([0, error, 0])}]

    def runs(self, *arguments, **options):
        return self.found(1e-6)


@pytest.mark.parametrize(
    ("errors", "asked", "agrees"),
    [
        ([1e-6, None, None, None], [0], True),
        ([1e-3, 1e-6, None, None], [0, 1], True),
        ([1e-3, 1e-3, 1e-3, 1e-6], [0, 1, 2, 3], True),
        ([1e-3, 1e-3, 1e-3, 1e-3], [0, 1, 2, 3], False),
        ([np.nan, 1e-6, 1e-6, 1e-6], [0, 1, 2, 3], False),
        ([1e-3, np.nan, 1e-6, 1e-6], [0, 1, 2, 3], False),
    ],
)
def test_neighbours_are_asked_while_there_is_a_doubt(errors, asked, agrees, monkeypatch):
    prepared = Prepared(monkeypatch, errors)
    pairs, problems, neighbours = precision._pairs(prepared, "float32", "float32", "default")
    assert prepared.asked == asked
    assert neighbours == len(asked) - 1
    assert [pair.agrees for pair in pairs] == [agrees]
    assert problems == []


def test_a_tensor_that_a_neighbour_lacks_is_a_problem(monkeypatch):
    prepared = Prepared(monkeypatch, [1e-3, 1e-6, 1e-6, 1e-6])
    whole = precision._draw

    def torn(evidence, dtype, parameters, setting, number):
        truth, found, scales = whole(evidence, dtype, parameters, setting, number)
        return truth, [found[0], {}] if number == 1 else found, scales

    monkeypatch.setattr(precision, "_draw", torn)
    pairs, problems, _ = precision._pairs(prepared, "float32", "float32", "default")
    assert pairs == []
    assert problems == ["float32, default: tensor only in the truth: output"]
