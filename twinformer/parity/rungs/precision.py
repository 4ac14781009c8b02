"""Rung 3: in float32 and bfloat16 each twin's error against the float64 truth.

Two right programs differ in low precision because they round in another order. So the question is not
how far they are from each other but how far each is from the truth: they agree when neither error is more than a
small multiple of the other, down to the level where both are as good as rounding the truth itself.
"""

from __future__ import annotations

from twinformer.parity.compare import ErrorPair, FloatArray, compare, set_problems, sibling_scales
from twinformer.parity.evidence import Evidence
from twinformer.parity.twins import Run, is_block_level
from twinformer.parity.verdict import Rung, rung_of

# How many times the other's error a twin's may be: docs/precision.md has the figures behind both
LARGEST_RATIO = 16.0
RMS_RATIO = 4.0


def check(evidence: Evidence) -> Rung:
    """Compare the errors of the output, of every block's output and of every parameter's gradient.

    Both dtypes are run as users run them and at the highest matrix-product precision. The truth is the
    float64 run on weights rounded to the dtype, so that only arithmetic is measured.
    """
    pairs: list[ErrorPair] = []
    problems: list[str] = []
    names = tuple(twin.name for twin in evidence.twins)
    for dtype in ("float32", "bfloat16"):
        truth = evidence.truth(dtype)
        scales = sibling_scales(truth.gradients)
        expected = _tensors(truth)
        for precision in evidence.precisions():
            found = [_tensors(run) for run in evidence.runs(dtype, gradients=True, precision=precision)]
            label = f"{dtype}, {precision}"
            for one, twin in zip(found, names, strict=True):
                problems += [f"{label}: {p}" for p in set_problems("tensor", one, expected, (twin, "the truth"))]
            for name, tensor in expected.items():
                if all(name in one for one in found):
                    scale = scales.get(name.removeprefix(_GRADIENT))
                    errors = [compare(name, one[name], tensor, bound=1.0, scale=scale) for one in found]
                    pair = ErrorPair.of(
                        f"{name} ({label})",
                        names,
                        errors,
                        rounding=ROUNDING[dtype],
                        bound=LARGEST_RATIO,
                        rms_bound=RMS_RATIO,
                    )
                    pairs.append(pair)
    rung = rung_of(f"{len(pairs)} pairs of errors", pairs, problems)
    if evidence.precisions() == ("default",):
        rung.notes.append("on the CPU the default precision of matrix products is the highest: run once")
    return rung


_GRADIENT = "gradient of "
# half a unit in the last place of 1: the error that one rounding can make
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-9}


def _tensors(run: Run) -> dict[str, FloatArray]:
    gradients = {_GRADIENT + path: gradient for path, gradient in run.gradients.items()}
    return {"output": run.output} | _blocks(run.modules) | gradients


def _blocks(modules: dict[str, FloatArray]) -> dict[str, FloatArray]:
    return {path: seen for path, seen in modules.items() if is_block_level(path)}
