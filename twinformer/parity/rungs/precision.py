"""Rung 3: in float32 and bfloat16 each twin's error against the float64 truth.

Two right programs differ in low precision because they round in another order. So the question is not
how far they are from each other but how far each is from the truth: they agree when neither error is more than a
small multiple of the other, down to the level where both are as good as rounding the truth itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from twinformer.config import DType
from twinformer.parity.case import Case
from twinformer.parity.compare import Comparison, ErrorPair, FloatArray, compare, set_problems, sibling_scales
from twinformer.parity.evidence import Evidence, Variant
from twinformer.parity.twins import Precision, Run, is_block_level
from twinformer.parity.verdict import Rung, rung_of

# How many times the other's error a twin's may be: docs/precision.md has the figures behind both
LARGEST_RATIO = 16.0
RMS_RATIO = 4.0
_DTYPES: tuple[DType, ...] = ("float32", "bfloat16")


# neighbours of the case that are asked where the case itself leaves a doubt
NEIGHBOURS = 3

Tensors = dict[str, FloatArray]


def check(evidence: Evidence) -> Rung:
    """Compare the errors of the output, of every block's output and of every parameter's gradient.

    Both dtypes, and those of the configuration where parameters have another one than the arithmetic, are run as users
    run them and at the highest matrix-product precision. The truth is the float64 run on weights rounded to the dtype
    of the parameters, so that only arithmetic is measured. Every run is made a second time in another order of
    summation, for the noise floor. Where a ratio is beyond its bound, neighbouring weights are run as well: an error
    that was large by chance is not large every time.
    """
    pairs: list[ErrorPair] = []
    problems: list[str] = []
    most = 0
    for dtype, parameters in settings(evidence.case):
        for precision in evidence.precisions():
            found, wrong, neighbours = _pairs(evidence, dtype, parameters, precision)
            most = max(most, neighbours)
            pairs += found
            problems += wrong
    rung = rung_of(f"{len(pairs)} pairs of errors", pairs, problems)
    if most:
        rung.notes.append(f"beyond a bound at first: up to {most} neighbouring sets of weights were run as well")
    if evidence.precisions() == ("default",):
        rung.notes.append("on the CPU the default precision of matrix products is the highest: run once")
    return rung


def settings(case: Case) -> list[tuple[DType, DType]]:
    """The dtypes of the arithmetic and of the parameters.

    Two are asked of every model; float16, which most weights overflow, of one that is configured so; and those of the
    configuration where these are two. What computes in float64 is what is measured against.
    """
    compute, parameters = case.config.compute_dtype, case.config.param_dtype
    found: list[tuple[DType, DType]] = [(dtype, dtype) for dtype in _DTYPES]
    if "float16" in (parameters, compute):
        found.append(("float16", "float16"))
    if compute not in (parameters, "float64"):
        found.append((compute, parameters))
    return found


def label_of(dtype: DType, parameters: DType) -> str:
    return dtype if dtype == parameters else f"{dtype} on {parameters} parameters"


def _pairs(
    evidence: Evidence, dtype: DType, parameters: DType, precision: Precision
) -> tuple[list[ErrorPair], list[str], int]:
    """The pairs, what makes them impossible, and how many neighbours were asked.

    A ratio only falls with each further neighbour, so that one asks no more once all ratios are within their bounds.
    """
    names = tuple(twin.name for twin in evidence.twins)
    label = f"{label_of(dtype, parameters)}, {precision}"
    truth, once, scales = _draw(evidence, dtype, parameters, precision, 0)
    another = evidence.runs(dtype, parameters=parameters, gradients=True, precision=precision, variant="reordered")
    again = [_tensors(run) for run in another]
    draws = [(truth, once, scales)]
    problems = _set_problems(label, names, truth, [once, again])
    errors: list[dict[str, list[Comparison]]] = []
    pairs: list[ErrorPair] = []
    floors: dict[str, list[float]] = {}
    while not problems:
        errors.append(_errors(draws[-1], dtype))
        if not floors:
            floors = {
                name: [
                    compare(name, there[name], here[name], bound=1.0, scale=scales.get(name)).relative
                    for here, there in zip(once, again, strict=True)
                ]
                for name in truth
            }
        pairs = [
            ErrorPair.of(
                f"{name} ({label})",
                names,
                errors[0][name],
                rounding=ROUNDING[dtype],
                bound=LARGEST_RATIO,
                rms_bound=RMS_RATIO,
                again=[further[name] for further in errors[1:]],
                noise=floors[name],
            )
            for name in truth
        ]
        if len(errors) > NEIGHBOURS or all(pair.agrees for pair in pairs):
            return pairs, [], len(errors) - 1
        draws.append(_draw(evidence, dtype, parameters, precision, len(errors)))
        problems = _set_problems(label, names, draws[-1][0], [draws[-1][1]])
    return [], problems, 0


def _set_problems(label: str, names: tuple[str, ...], truth: Tensors, found: Sequence[Sequence[Tensors]]) -> list[str]:
    return sorted(
        {
            f"{label}: {problem}"
            for ones in found
            for one, twin in zip(ones, names, strict=True)
            for problem in set_problems("tensor", one, truth, (twin, "the truth"))
        }
    )


def _errors(draw: tuple[Tensors, list[Tensors], dict[str, float]], dtype: DType) -> dict[str, list[Comparison]]:
    truth, found, scales = draw
    return {
        name: [compare(name, one[name], truth[name], bound=1.0, scale=scales.get(name), dtype=dtype) for one in found]
        for name in truth
    }


def _draw(
    evidence: Evidence, dtype: DType, parameters: DType, precision: Precision, draw: int
) -> tuple[Tensors, list[Tensors], dict[str, float]]:
    """The truth, what the twins found, and the gradients' scales; draw 0 is the case itself."""
    variant: Variant = "neighbour" if draw else "plain"
    truth = evidence.truth(parameters, variant=variant, draw=draw)
    runs = evidence.runs(dtype, parameters=parameters, gradients=True, precision=precision, variant=variant, draw=draw)
    scales = {_GRADIENT + path: scale for path, scale in sibling_scales(truth.gradients).items()}
    return _tensors(truth), [_tensors(run) for run in runs], scales


_GRADIENT = "gradient of "
# half a unit in the last place of 1: the error that one rounding can make
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-12}


def _tensors(run: Run) -> dict[str, FloatArray]:
    gradients = {_GRADIENT + path: gradient for path, gradient in run.gradients.items()}
    return {"output": run.output} | _blocks(run.modules) | gradients


def _blocks(modules: dict[str, FloatArray]) -> dict[str, FloatArray]:
    return {path: seen for path, seen in modules.items() if is_block_level(path)}
