"""The comparison: one function for every pair of arrays that the judge looks at.

Its rules, each because a checker somewhere passed a wrong model without it: shapes are equal, never broadcast;
NaN and infinities stand at the same places with the same signs before any value is compared; the
measure is the largest difference, never a mean, a sum or an angle; there is something to compare.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

# how many noise floors apart two right programs may be: the floor is one draw of a random quantity, and so are they
NOISE_MARGIN = 8.0
# a gradient this much smaller than the model's largest is what rounding left of zero
ROUNDING_NOISE = 1e-13
# binary digits of the significand, the hidden one included
DIGITS = {"float64": 53, "float32": 24, "bfloat16": 8, "float16": 11}


@dataclass(frozen=True)
class Comparison:
    """What was found between two arrays of one name.

    ``relative`` is ``largest / scale``: the largest absolute difference over the scale, which is the largest
    magnitude of the expected array unless the caller had a reason for another one. ``relative_rms`` is the root of the
    mean square difference over the same scale; no verdict rests on it alone. ``ulps`` is the largest difference in
    units in the last place that the expected value there has in the dtype computed in. ``problem`` says why the
    values could not be compared at all (then ``relative`` is infinite).

    Filled in by those who measured it: ``noise``, the relative difference that the same computation in another order
    makes; ``notices``, the smallest relative change of a single weight that would have carried the difference over the
    bound.
    """

    name: str
    shape: tuple[int, ...]
    largest: float
    scale: float
    relative: float
    relative_rms: float
    worst: tuple[int, ...]
    actual_at_worst: float
    expected_at_worst: float
    bound: float
    problem: str = ""
    ulps: float = math.nan
    noise: float | None = None
    notices: float | None = None

    @property
    def agrees(self) -> bool:
        return not self.problem and self.relative <= self.bound

    @property
    def within_noise(self) -> bool:
        """Beyond the bound, but no further than rounding alone takes this computation: it cannot tell."""
        is_measured = not self.problem and self.noise is not None and not self.agrees
        return is_measured and self.relative <= NOISE_MARGIN * (self.noise or 0.0)

    @property
    def severity(self) -> float:
        """How near to its bound: 1 is at the bound, more is beyond."""
        if self.problem:
            return math.inf
        return self.relative / self.bound if self.bound > 0 else (0.0 if self.relative == 0 else math.inf)

    def describe(self) -> str:
        """One line with figures and names."""
        if self.problem:
            return f"{self.name}: {self.problem}"
        noise = "" if self.noise is None else f", noise floor {self.noise:.0e}"
        return (
            f"{self.name}: largest difference {self.largest:.2e} at {list(self.worst)} "
            f"({self.actual_at_worst:.9g} against {self.expected_at_worst:.9g}), "
            f"{self.relative:.2e} of scale {self.scale:.3g}, bound {self.bound:.0e}{noise}"
        )


@dataclass(frozen=True)
class ErrorPair:
    """The errors of two systems against the truth, for one tensor, relative to its scale.

    Two measures, because each misses what the other sees: the root of the mean square, over all elements, is steady
    where both systems are right; the largest error shows a fault in a single place. Each is compared as a ratio, the
    larger over the smaller, where an error below one rounding counts as one rounding: being better than
    the format can show is no merit. ``bound`` is on the ratio of the largest errors, ``rms_bound`` on the other.

    An error in low precision is one draw of a random quantity. ``again`` holds the errors of the same systems computing
    the same thing in other orders (``noise.py``): for each draw the largest and the rms error of each system. The ratio
    is then the smallest error of the worse over the largest error of the better, so that it is large only where every
    draw of the one is worse than every draw of the other. ``noise`` is what another order changes in each system, and
    ``first`` has all figures of the first draw.
    """

    name: str
    systems: tuple[str, ...]
    errors: tuple[float, ...]
    rms_errors: tuple[float, ...]
    rounding: float
    bound: float
    rms_bound: float
    problem: str = ""
    again: tuple[tuple[tuple[float, float], ...], ...] = ()
    noise: tuple[float, ...] = ()
    first: tuple[Comparison, ...] = ()
    notices: float | None = None

    @classmethod
    def of(
        cls,
        name: str,
        systems: tuple[str, ...],
        errors: Sequence[Comparison],
        *,
        rounding: float,
        bound: float,
        rms_bound: float,
        again: Sequence[Sequence[Comparison]] = (),
        noise: Sequence[float] = (),
    ) -> ErrorPair:
        """From each system's comparison with the truth; ``again`` has further draws, each with one for each system."""
        problems = [
            f"{who}: {error.problem}"
            for draw in (errors, *again)
            for who, error in zip(systems, draw, strict=True)
            if error.problem
        ]
        return cls(
            name,
            systems,
            tuple(error.relative for error in errors),
            tuple(error.relative_rms for error in errors),
            rounding,
            bound,
            rms_bound,
            "; ".join(problems),
            tuple(tuple((error.relative, error.relative_rms) for error in draw) for draw in again),
            tuple(noise),
            tuple(errors),
        )

    @property
    def ratio(self) -> float:
        """Of the largest errors."""
        return _ratio([self.errors, *(tuple(error[0] for error in draw) for draw in self.again)], self.rounding)

    @property
    def rms_ratio(self) -> float:
        return _ratio([self.rms_errors, *(tuple(error[1] for error in draw) for draw in self.again)], self.rounding)

    @property
    def noticeable(self) -> float:
        """The largest error that the worse system could have had without being told apart."""
        better = min(max(error, self.rounding) for error in self.errors)
        return self.bound * better

    @property
    def agrees(self) -> bool:
        return not self.problem and self.ratio <= self.bound and self.rms_ratio <= self.rms_bound

    @property
    def severity(self) -> float:
        """How near to its bounds: 1 is at the nearer one, more is beyond."""
        return math.inf if self.problem else max(self.ratio / self.bound, self.rms_ratio / self.rms_bound)

    def describe(self) -> str:
        """One line with figures and names."""
        if self.problem:
            return f"{self.name}: {self.problem}"
        errors = ", ".join(
            f"{who} {error:.2e} (rms {rms:.2e})"
            for who, error, rms in zip(self.systems, self.errors, self.rms_errors, strict=True)
        )
        return (
            f"{self.name}: errors against the truth {errors}: ratio {self.ratio:.2f}, bound {self.bound:.1f}; "
            f"rms ratio {self.rms_ratio:.2f}, bound {self.rms_bound:.1f}; {1 + len(self.again)} draws of each"
        )


def _ratio(draws: Sequence[tuple[float, ...]], rounding: float) -> float:
    """The smallest error of the worst system over the largest of the best; 1 where their draws overlap."""
    by_system = [[max(error, rounding) for error in system] for system in zip(*draws, strict=True)]
    ratios = [min(one) / max(other) for one in by_system for other in by_system if one is not other]
    return float(max([1.0, *ratios]))


def compare(
    name: str,
    actual: npt.NDArray[Any],
    expected: npt.NDArray[Any],
    *,
    bound: float,
    scale: float | None = None,
    dtype: str = "float64",
) -> Comparison:
    """Compare two arrays of any numeric dtype, exactly converted to float64.

    ``bound`` is on ``largest difference / scale``; ``scale`` defaults to the largest finite magnitude of
    ``expected``. A bound of 0 asks for equality. ``dtype`` is the one computed in, whose last place ``ulps`` counts.
    """
    found = _Findings(name, tuple(actual.shape), bound)
    if actual.shape != expected.shape:
        return found.problem(f"shapes differ: {tuple(actual.shape)} against {tuple(expected.shape)}")
    if actual.size == 0:
        return found.problem("nothing to compare: the arrays are empty")
    a, b = widened(actual), widened(expected)
    magnitude = float(np.maximum(b.max(), -b.min()))
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.asarray(a - b)
    np.abs(difference, out=difference)
    place = int(difference.argmax())  # the first NaN, where there is one
    # nearly always, and large arrays take their time: a NaN or an infinity on either side would show in these two
    is_plain = math.isfinite(magnitude) and math.isfinite(difference.flat[place])
    if not is_plain:
        finite = np.isfinite(b)
        for kind, where in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
            in_a, in_b = where(a), where(b)
            if not np.array_equal(in_a, in_b):
                first = [int(i) for i in np.argwhere(in_a != in_b)[0]]
                return found.problem(
                    f"{kind} at different places: {int(in_a.sum())} against {int(in_b.sum())}, "
                    f"first difference at {first}"
                )
        if not finite.any():
            return found.problem("nothing to compare: no finite value on either side")
        difference = np.where(finite, difference, 0.0)
        place = int(difference.argmax())
        magnitude = float(np.abs(b[finite]).max())
    worst = np.unravel_index(place, difference.shape)
    largest = float(difference[worst])
    with np.errstate(over="ignore"):  # an infinite rms is what such a difference deserves
        counted = difference.reshape(-1) if is_plain else difference[finite]
        rms = math.sqrt(float(counted @ counted) / counted.size)
    if scale is None:
        scale = magnitude
    return Comparison(
        name=name,
        shape=tuple(actual.shape),
        largest=largest,
        scale=scale,
        relative=relative_to(largest, scale),
        relative_rms=relative_to(rms, scale),
        worst=tuple(int(i) for i in worst),
        actual_at_worst=float(a[worst]),
        expected_at_worst=float(b[worst]),
        bound=bound,
        ulps=largest / unit_in_the_last_place(float(b[worst]), dtype),
    )


def largest_difference(actual: FloatArray, expected: FloatArray) -> float:
    """``compare``'s, without the rest; infinite where there is a problem."""
    found = compare("", actual, expected, bound=0.0, scale=1.0)
    return math.inf if found.problem else found.largest


def relative_move(actual: FloatArray, expected: FloatArray, scale: float | None = None) -> float:
    """``compare``'s relative difference without the rest; 0 where there is a problem."""
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.subtract(actual, expected)
    largest = float(np.maximum(difference.max(), -difference.min()))
    magnitude = float(np.maximum(expected.max(), -expected.min())) if scale is None else scale
    if not (math.isfinite(largest) and math.isfinite(magnitude)):
        found = compare("", actual, expected, bound=0.0, scale=scale)
        return 0.0 if found.problem else found.relative
    return relative_to(largest, magnitude)


def unit_in_the_last_place(value: float, dtype: str) -> float:
    """The distance between neighbouring numbers of ``dtype`` at ``value`` (subnormal numbers are not looked into)."""
    smallest = {"float64": -1022, "float32": -126, "bfloat16": -126, "float16": -14}[dtype]
    exponent = max(math.frexp(value)[1] - 1, smallest) if value else smallest
    return math.ldexp(1.0, max(exponent - DIGITS[dtype] + 1, -1074))


def set_problems(what: str, actual: Iterable[str], expected: Iterable[str], sides: tuple[str, str]) -> list[str]:
    """Every name that stands on one side only: sets are compared before values."""
    actual, expected = set(actual), set(expected)
    return [f"{what} only in {sides[0]}: {name}" for name in sorted(actual - expected)] + [
        f"{what} only in {sides[1]}: {name}" for name in sorted(expected - actual)
    ]


def relative_to(largest: float, scale: float) -> float:
    """``largest / scale``; with a scale of 0 only equality is no difference."""
    if scale > 0:
        return largest / scale
    return 0.0 if largest == 0 else math.inf


def widened(array: npt.NDArray[Any]) -> FloatArray:
    """As float64. Whole numbers beyond 2**53 would lose digits: refuse them."""
    if array.dtype.kind in "iu" and array.size and max(abs(int(array.max())), abs(int(array.min()))) > 2**53:
        raise ValueError(f"expected whole numbers within 2**53, got dtype {array.dtype} with larger ones")
    return np.asarray(array, dtype=np.float64)


def worst_of(findings: Sequence[Comparison | ErrorPair]) -> Comparison | ErrorPair | None:
    """The finding nearest to its bound, or furthest beyond it; a problem is beyond all."""
    return max(findings, key=lambda finding: finding.severity, default=None)


def sibling_scales(gradients: Mapping[str, FloatArray], *, flowing: float = 0.0) -> dict[str, float]:
    """For each parameter the largest gradient within the module that owns it.

    A gradient can be zero by mathematics: the softmax does not see a constant added to all keys' scores, so
    the bias of the keys gets none. What is computed for it is the rounding noise of sums as large as those
    behind the weight beside it; relative to itself that noise would look like an error of 100 %. Where a whole module
    has no more than ``ROUNDING_NOISE`` of the model's largest gradient, that largest is its scale: there is only noise.
    ``flowing`` is the largest gradient that came to any module's output (``flowing_through``): behind a function that
    is saturated no parameter may have more than noise.
    """
    largest: dict[str, float] = {}
    for path, gradient in gradients.items():
        owner = path.rpartition(".")[0]
        largest[owner] = max(largest.get(owner, 0.0), _magnitude(gradient))
    overall = max([flowing, *largest.values()])
    scales = {owner: _or_noise(size, overall) for owner, size in largest.items()}
    return {path: scales[path.rpartition(".")[0]] for path in gradients}


def output_scales(gradients: Mapping[str, FloatArray], *, flowing: float) -> dict[str, float]:
    """For the gradient of each module's output its largest magnitude, or ``flowing`` where that is only noise.

    Queries that see one key have a gradient of 0 by mathematics: one program may compute 0 and another 1e-18.
    """
    return {path: _or_noise(_magnitude(gradient), flowing) for path, gradient in gradients.items()}


def flowing_through(gradients: Mapping[str, FloatArray], cotangent: FloatArray) -> float:
    """The largest finite gradient of a module's output, the model's among them."""
    return max(_magnitude(cotangent), *(_magnitude(gradient) for gradient in gradients.values()), 0.0)


def _or_noise(size: float, overall: float) -> float:
    return size if size > ROUNDING_NOISE * overall else overall


def _magnitude(gradient: FloatArray) -> float:
    """The largest finite one."""
    return float(np.abs(gradient[np.isfinite(gradient)]).max(initial=0.0))


@dataclass(frozen=True)
class _Findings:
    name: str
    shape: tuple[int, ...]
    bound: float

    def problem(self, text: str) -> Comparison:
        nan = math.nan
        return Comparison(self.name, self.shape, nan, nan, math.inf, math.inf, (), nan, nan, self.bound, text)
