"""Rung 3: in float32 and bfloat16 each twin's error against the float64 truth.

Two right programs differ in low precision because they round in another order. So the question is not
how far they are from each other but how far each is from the truth: they agree when neither error is more than a
small multiple of the other, down to the level where both are as good as rounding the truth itself.
"""

from __future__ import annotations

from twinformer.config import DType
from twinformer.parity.compare import ErrorPair, FloatArray, compare, set_problems, sibling_scales
from twinformer.parity.evidence import Evidence, Variant
from twinformer.parity.twins import Precision, Run, is_block_level
from twinformer.parity.verdict import Rung, rung_of

# How many times the other's error a twin's may be: docs/precision.md has the figures behind both
LARGEST_RATIO = 16.0
RMS_RATIO = 4.0
DTYPES: tuple[DType, ...] = ("float32", "bfloat16")


# neighbours of the case that are asked where the case itself leaves a doubt
NEIGHBOURS = 3

Tensors = dict[str, FloatArray]


def check(evidence: Evidence) -> Rung:
    """Compare the errors of the output, of every block's output and of every parameter's gradient.

    Both dtypes are run as users run them and at the highest matrix-product precision. The truth is the
    float64 run on weights rounded to the dtype, so that only arithmetic is measured. Every run is made a second time in
    another order of summation, for the noise floor. Where a ratio is beyond its bound, neighbouring weights
    are run as well: an error that was large by chance is not large every time.
    """
    pairs: list[ErrorPair] = []
    problems: list[str] = []
    in_doubt = False
    for dtype in DTYPES:
        for precision in evidence.precisions():
            found, wrong = _pairs(evidence, dtype, precision, neighbours=0)
            if not wrong and not all(pair.agrees for pair in found):
                in_doubt = True
                found, wrong = _pairs(evidence, dtype, precision, neighbours=NEIGHBOURS)
            pairs += found
            problems += wrong
    rung = rung_of(f"{len(pairs)} pairs of errors", pairs, problems)
    if in_doubt:
        rung.notes.append(f"beyond a bound at first: {NEIGHBOURS} neighbouring sets of weights were run as well")
    if evidence.precisions() == ("default",):
        rung.notes.append("on the CPU the default precision of matrix products is the highest: run once")
    return rung


def _pairs(
    evidence: Evidence, dtype: DType, precision: Precision, *, neighbours: int
) -> tuple[list[ErrorPair], list[str]]:
    names = tuple(twin.name for twin in evidence.twins)
    label = f"{dtype}, {precision}"
    draws = [_draw(evidence, dtype, precision, draw) for draw in range(1 + neighbours)]
    once = draws[0][1]
    again = [_tensors(run) for run in evidence.runs(dtype, gradients=True, precision=precision, variant="reordered")]
    problems = [
        f"{label}: {problem}"
        for truth, found, _ in (*draws, (draws[0][0], again, {}))
        for one, twin in zip(found, names, strict=True)
        for problem in set_problems("tensor", one, truth, (twin, "the truth"))
    ]
    if problems:
        return [], sorted(set(problems))
    pairs = []
    for name in draws[0][0]:
        errors = [
            [compare(name, one[name], truth[name], bound=1.0, scale=scales.get(name), dtype=dtype) for one in found]
            for truth, found, scales in draws
        ]
        floors = [
            compare(name, there[name], here[name], bound=1.0, scale=draws[0][2].get(name)).relative
            for here, there in zip(once, again, strict=True)
        ]
        pair = ErrorPair.of(
            f"{name} ({label})",
            names,
            errors[0],
            rounding=ROUNDING[dtype],
            bound=LARGEST_RATIO,
            rms_bound=RMS_RATIO,
            again=errors[1:],
            noise=floors,
        )
        pairs.append(pair)
    return pairs, []


def _draw(
    evidence: Evidence, dtype: DType, precision: Precision, draw: int
) -> tuple[Tensors, list[Tensors], dict[str, float]]:
    """The truth, what the twins found, and the gradients' scales; draw 0 is the case itself."""
    variant: Variant = "neighbour" if draw else "plain"
    truth = evidence.truth(dtype, variant=variant, draw=draw)
    runs = evidence.runs(dtype, gradients=True, precision=precision, variant=variant, draw=draw)
    scales = {_GRADIENT + path: scale for path, scale in sibling_scales(truth.gradients).items()}
    return _tensors(truth), [_tensors(run) for run in runs], scales


_GRADIENT = "gradient of "
# half a unit in the last place of 1: the error that one rounding can make
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-9}


def _tensors(run: Run) -> dict[str, FloatArray]:
    gradients = {_GRADIENT + path: gradient for path, gradient in run.gradients.items()}
    return {"output": run.output} | _blocks(run.modules) | gradients


def _blocks(modules: dict[str, FloatArray]) -> dict[str, FloatArray]:
    return {path: seen for path, seen in modules.items() if is_block_level(path)}
