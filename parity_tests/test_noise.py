"""The noise floor and the neighbours: what chance does to right programs, and what is beyond it."""

import dataclasses

import numpy as np
import pytest

from twinformer.parity import compare, random_case
from twinformer.parity.compare import Comparison, ErrorPair, sibling_scales, unit_in_the_last_place
from twinformer.parity.evidence import Evidence
from twinformer.parity.noise import neighbour, reordered
from twinformer.parity.rungs import forward, precision
from twinformer.parity.twins import TorchTwin
from twinformer.parity.verdict import rung_of
from twinformer.presets import PRESETS, preset


def small(name: str, seed: int = 3, length: int = 12):
    return random_case(name, preset(name), seed=seed, length=length)


@pytest.mark.parametrize("name", PRESETS)
def test_the_reordered_model_is_the_same_function(name):
    """Every parameter that can be renumbered is, and output, blocks and gradients come out as before."""
    case = small(name).in_dtype("float64")
    other = reordered(case)
    moved = [path for path, tensor in case.tensors.items() if not np.array_equal(tensor, other.case.tensors[path])]
    assert len(moved) > len(case.tensors) / 3
    assert not np.array_equal(other.case.inputs[next(iter(case.inputs))], case.inputs[next(iter(case.inputs))])
    twin = TorchTwin()
    before = twin.run(case, gradients=True)
    after = other.restore(twin.run(other.case, gradients=True))
    scales = sibling_scales(before.gradients)
    assert after.modules.keys() == before.modules.keys()
    assert after.gradients.keys() == before.gradients.keys()
    found = [compare("output", after.output, before.output, bound=1e-12)]
    found += [compare(path, after.modules[path], seen, bound=1e-12) for path, seen in before.modules.items()]
    found += [
        compare(path, after.gradients[path], gradient, bound=1e-11, scale=scales[path])
        for path, gradient in before.gradients.items()
    ]
    found += [
        compare(path, after.module_gradients[path], gradient, bound=1e-11)
        for path, gradient in before.module_gradients.items()
    ]
    assert after.module_gradients.keys() == before.module_gradients.keys()
    assert [one.describe() for one in found if not one.agrees] == []
    assert max(one.relative for one in found) > 0, "nothing was summed in another order"


def test_a_difference_within_the_noise_floor_is_no_verdict():
    near, far = compare("x", np.array([1 + 4e-12]), np.ones(1), bound=1e-12), 5e-13
    noisy = dataclasses.replace(near, noise=1e-12)
    assert rung_of("", [near]).verdict == "differ"
    assert rung_of("", [noisy]).verdict == "cannot tell"
    assert "ill-conditioned" in rung_of("", [noisy]).problems[0]
    assert rung_of("", [dataclasses.replace(near, noise=far / 10)]).verdict == "differ"
    assert rung_of("", [noisy, near]).verdict == "differ"
    assert rung_of("", [noisy], ["a leaf is missing"]).verdict == "differ"


def test_noise_never_excuses_what_cannot_be_compared():
    problem = dataclasses.replace(compare("x", np.ones(2), np.ones(3), bound=1.0), noise=1e9)
    assert rung_of("", [problem]).verdict == "differ"


def test_a_neighbour_differs_everywhere_by_little():
    case = small("gpt2")
    other = neighbour(case, 1)
    for path, tensor in case.tensors.items():
        change = np.abs(other.tensors[path] - tensor)
        assert change.max() > 0, path
        assert (change <= 2.0**-6 * np.abs(tensor) * (1 + 1e-6)).all(), path
    path = "stack.final_norm.weight"
    assert not np.array_equal(neighbour(case, 2).tensors[path], other.tensors[path])


def test_the_ratio_of_errors_needs_every_draw():
    """Worse once is chance; worse in every draw is not."""

    def pair(*draws):
        first, *again = draws
        return ErrorPair(
            "x",
            ("torch", "flax"),
            first,
            first,
            2.0**-24,
            8.0,
            4.0,
            again=tuple(tuple((error, error) for error in draw) for draw in again),
        )

    assert not pair((1e-6, 9e-6)).agrees
    assert pair((1e-6, 9e-6), (1e-6, 1e-6)).agrees
    assert not pair((1e-6, 9e-6), (1e-6, 2e-5)).agrees
    assert pair((1e-6, 9e-6), (9e-6, 1e-6)).agrees
    assert pair((1e-6, 9e-6), (9e-6, 1e-6)).ratio == 1.0


def test_rung_3_gives_no_false_alarm_where_a_value_falls_short_of_a_threshold():
    """A known case: in bfloat16 one unit of a ReLU is off in one twin only, its gradient error seven times larger."""
    case = small("textbook-encoder", seed=1)
    rung = precision.check(Evidence(case, with_gradients=True))
    assert rung.verdict == "agree", rung.problems
    assert any("neighbouring" in note for note in rung.notes)
    with_neighbours = [one for one in rung.comparisons if isinstance(one, ErrorPair) and one.again]
    assert with_neighbours
    first = [dataclasses.replace(one, again=()) for one in with_neighbours]
    assert not all(one.agrees for one in first), "the case no longer shows what it is kept for"


def test_units_in_the_last_place():
    assert unit_in_the_last_place(1.0, "float64") == 2.0**-52
    assert unit_in_the_last_place(-1.0, "float32") == 2.0**-23
    assert unit_in_the_last_place(1.999, "bfloat16") == 2.0**-7
    assert unit_in_the_last_place(0.0, "float64") == 2.0**-1074
    assert compare("x", np.array([1 + 2.0**-50]), np.ones(1), bound=0.0).ulps == 4.0
    assert compare("x", np.array([1 + 2.0**-20]), np.ones(1), bound=0.0, dtype="float32").ulps == 8.0


def test_rung_1_shows_the_noise_floor():
    rung = forward.check(Evidence(small("t5"), with_gradients=True))
    measured = [one.noise for one in rung.comparisons if isinstance(one, Comparison) and one.noise is not None]
    assert len(measured) == len(rung.comparisons)
    assert 0 < max(measured) < 1e-12
