"""Known defects of other projects' checkers, each planted in a copy of ours: the examinations refuse every one.

The ids are those under which the defects were found in the wild; each let a wrong model pass.
"""

import contextlib
import dataclasses
import importlib
import pkgutil

import numpy as np
import pytest

import twinformer.parity
from parity_tests.examination import EXAMINATIONS
from twinformer.parity.compare import compare
from twinformer.parity.culprit import culprits
from twinformer.parity.evidence import Evidence
from twinformer.parity.rungs import forward
from twinformer.parity.verdict import Rung, rung_of

PACKAGE = twinformer.parity.__name__


def everywhere(monkeypatch, name, replacement):
    """Put the replacement wherever the judge's modules know the function by that name."""
    planted = 0
    for found in pkgutil.walk_packages(twinformer.parity.__path__, f"{PACKAGE}."):
        module = importlib.import_module(found.name)
        if callable(getattr(module, name, None)) and name in vars(module):
            monkeypatch.setattr(module, name, replacement)
            planted += 1
    assert planted, name


def agreeing(name, bound=1.0):
    return dataclasses.replace(compare(name, np.ones(1), np.ones(1), bound=bound))


def never_called(name, actual, expected, **options):
    """The comparison sits in a function inside the function, which nobody calls."""

    def really(a, b):
        return compare(name, a, b, **options)

    assert really
    return agreeing(name)


def nan_zeroed(name, actual, expected, **options):
    return compare(name, np.nan_to_num(actual), np.nan_to_num(expected), **options)


def nan_zeroed_in_both(name, actual, expected, **options):
    zeroed = [np.where(np.isnan(a), 0.0, a) for a in (actual, expected)]
    return compare(name, *zeroed, **options)


def signed_sum(name, actual, expected, *, bound, **options):
    if actual.shape != expected.shape:
        return compare(name, actual, expected, bound=bound)
    found = agreeing(name, bound)
    return dataclasses.replace(found, relative=float((actual - expected).sum()), bound=1e-3)


def shape_only(name, actual, expected, *, bound, **options):
    if actual.shape != expected.shape:
        return compare(name, actual, expected, bound=bound)
    return agreeing(name)


def itself(name, actual, expected, **options):
    """q_norm is compared with q_norm."""
    return compare(name, expected, expected, **options)


def bound_of(width):
    def wide(name, actual, expected, *, bound, **options):
        return compare(name, actual, expected, bound=width, **options)

    return wide


def absolute(name, actual, expected, *, bound, **options):
    return compare(name, actual, expected, bound=1e-2, scale=1.0)


def numbers_only(name, actual, expected, *, bound, **options):
    """Shape and finiteness are asserted, values are not."""
    if actual.shape != expected.shape or np.isfinite(actual).all() != np.isfinite(expected).all():
        return compare(name, actual, expected, bound=bound)
    return agreeing(name)


def means(name, actual, expected, **options):
    return compare(name, np.array([np.mean(actual)]), np.array([np.mean(expected)]), **options)


def most_elements(name, actual, expected, *, bound, **options):
    """More than 99.5 % of the elements are near."""
    if actual.shape != expected.shape:
        return compare(name, actual, expected, bound=bound)
    near = np.isclose(actual, expected, atol=0.125, equal_nan=True).mean()
    return agreeing(name) if near > 0.99 else compare(name, actual, expected, bound=bound)


def equal_nan(name, actual, expected, *, bound, **options):
    """NaN equals NaN, and where all is NaN all is well; where one side is NaN the difference is not above the bound."""
    if actual.shape != expected.shape:
        return compare(name, actual, expected, bound=bound)
    difference = np.abs(actual - expected)
    return agreeing(name) if not (difference > bound).any() else compare(name, actual, expected, bound=bound)


def broadcasting(name, actual, expected, *, bound, **options):
    return compare(name, *np.broadcast_arrays(actual, expected), bound=bound)


def prints_only(checked, comparisons, problems=()):
    """Differences are reported, nothing is made of them."""
    rung = rung_of(checked, comparisons, problems)
    return dataclasses.replace(rung, verdict="agree")


def last_only(checked, comparisons, problems=()):
    return rung_of(checked, comparisons[-1:], problems)


def first_only(checked, comparisons, problems=()):
    return rung_of(checked, comparisons[:1], problems)


def nothing_is_fine(checked, comparisons, problems=()):
    return rung_of(checked, comparisons, problems) if comparisons else Rung("agree", checked)


def swallowed(monkeypatch):
    check = forward.check

    def quiet(evidence):
        with contextlib.suppress(Exception):
            return check(evidence)
        return Rung("agree", "whatever was there")

    monkeypatch.setattr(forward, "check", quiet)


def stale(monkeypatch):
    """What an earlier run left is compared."""
    run = Evidence._run

    def kept(self, twin, *arguments, **options):
        if not any(key[0] == twin.name for key in self._runs):
            run(self, twin, *arguments, **options)
        return next(found for key, found in self._runs.items() if key[0] == twin.name)

    monkeypatch.setattr(Evidence, "_run", kept)


def backward_looks_forward(evidence, *, backward, bound):
    return culprits(evidence, backward=False, bound=bound)


def prunes(evidence, *, backward, bound):
    """Where the parent agrees its parts are not looked at."""
    found = culprits(evidence, backward=backward, bound=bound)
    calls = evidence.twins[0].record(None)
    sides = [twin.replay(None, calls) for twin in evidence.twins]
    right = [
        call.path
        for call, one, other in zip(calls, *sides, strict=True)
        if np.array_equal(one.output, other.output) and not backward
    ]
    return [suspect for suspect in found if not any(suspect.name.startswith(f"{path}.") for path in right)]


def truncating_zip(what, actual, expected, sides):
    """Leaves are paired until the shorter list ends."""
    return [f"{what}: {a}" for a, b in zip(sorted(actual), sorted(expected), strict=False) if a != b]


def of(function):
    name = "compare" if function not in (prints_only, last_only, first_only, nothing_is_fine) else "rung_of"
    name = {truncating_zip: "set_problems", backward_looks_forward: "culprits", prunes: "culprits"}.get(function, name)
    return lambda monkeypatch: everywhere(monkeypatch, name, function)


#: the defect, how it is planted, and an examination that it fails
DEFECTS = {
    "D-H1 never called": (of(never_called), "first_module_off_by_much"),
    "D-H2 NaN zeroed in both": (of(nan_zeroed_in_both), "nan_for_zero"),
    "D-H3 signed sum": (of(signed_sum), "difference_of_one_sign"),
    "D-H4 shape only": (of(shape_only), "first_module_off_by_much"),
    "D-H5 nothing was checked": (of(nothing_is_fine), "nothing_compared"),
    "D-H6 overridden by a weaker one": (of(bound_of(1e-4)), "last_module_off_by_little"),
    "D-A1 prints, asserts nothing": (of(prints_only), "one_element_off"),
    "D-A2 within 100 %": (of(bound_of(1.0)), "one_element_off"),
    "D-A2 only the last": (of(last_only), "first_module_off_by_much"),
    "D-A3 crash swallowed": (swallowed, "a_crash_is_not_swallowed"),
    "D-A3 stale run": (stale, "no_run_of_another_case_is_taken"),
    "D-B1 with itself": (of(itself), "first_module_off_by_much"),
    "D-B2 atol 0.1": (of(bound_of(0.1)), "one_element_off"),
    "D-B3 float64 at 1e-2": (of(bound_of(1e-2)), "one_element_off"),
    "D-B4 no numbers": (of(numbers_only), "permuted"),
    "D-L1 bound beyond the largest difference": (
        lambda monkeypatch: everywhere(monkeypatch, "is_vacuous", lambda comparison: False),
        "a_bound_that_cannot_be_missed",
    ),
    "D-L2 absolute on small values": (of(absolute), "small_values_all_wrong"),
    "D-K1 assertion caught": (swallowed, "a_crash_is_not_swallowed"),
    "D-P1 means": (of(means), "permuted"),
    "D-P2 only the first": (of(first_only), "last_module_off_by_little"),
    "D-P3 backward looks forward": (of(backward_looks_forward), "a_fault_of_the_backward_pass_only"),
    "D-P4 pruned where the parent agrees": (of(prunes), "errors_that_cancel_in_their_parent"),
    "D-E1 most elements": (of(most_elements), "one_element_off"),
    "D-T1 NaN is no difference": (of(equal_nan), "nan_everywhere_in_both"),
    "D-M1 zip truncates": (of(truncating_zip), "one_module_missing"),
    "D-X1 nan_to_num": (of(nan_zeroed), "nan_for_zero"),
    "noise of the wrong twin": (
        lambda monkeypatch: monkeypatch.setattr(forward, "min", max, raising=False),
        "a_fault_that_depends_on_the_order",
    ),
    "broadcast": (of(broadcasting), "another_shape_that_broadcasts"),
}


@pytest.mark.parametrize("name", EXAMINATIONS)
def test_the_judge_passes_every_examination(name):
    EXAMINATIONS[name]()


@pytest.mark.parametrize("defect", DEFECTS)
def test_no_defect_passes(defect, monkeypatch):
    plant, failed = DEFECTS[defect]
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        EXAMINATIONS[failed]()


def test_every_known_defect_is_planted():
    counts = {"H": 6, "A": 3, "B": 4, "L": 2, "K": 1, "P": 4, "E": 1, "T": 1, "M": 1, "X": 1}
    ids = [f"{letter}{number}" for letter, count in counts.items() for number in range(1, count + 1)]
    planted = {defect.split()[0].removeprefix("D-") for defect in DEFECTS if defect.startswith("D-")}
    assert planted == set(ids)


def test_every_examination_but_the_first_is_needed_by_some_defect_or_stands_for_a_kind():
    used = {failed for _, failed in DEFECTS.values()}
    kinds = {
        "equal_runs_agree",
        "differences_that_cancel",
        "one_nan",
        "nan_at_other_places",
        "infinities_of_other_sign",
    }
    assert set(EXAMINATIONS) - used <= kinds | {"one_gradient_wrong"}
