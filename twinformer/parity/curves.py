"""The training rung as curves in SVG: what both twins told, over each other, and how far apart they were.

The first twin is a broad pale line, the second a thin dark one on it, the judge's own run dots: where they agree one
sees one line. Below, on a logarithmic scale, the relative difference of each step, with the bound.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from html import escape

from twinformer.parity.compare import Comparison
from twinformer.parity.verdict import Rung

_NAME = re.compile(r"(?P<what>.+) \(step (?P<step>\d+), (?P<first>[^,]+), (?P<second>[^,]+)\)")
_WIDTH, _LEFT, _RIGHT = 1080, 150, 20
_TALL, _LOW, _GAP = 120, 70, 26
_SMALLEST = 1e-17
Points = list[tuple[int, float]]


def draw(rung: Rung) -> str:
    """Loss, norm of the gradient and their differences; nothing where the rung compared no steps."""
    found = _by_pair(rung)
    (first, second), own = next(iter(found.items()), (("", ""), {}))
    if "loss" not in own:
        return ""
    by_hand = next((seen for pair, seen in found.items() if pair[1] == "by hand"), {})
    steps = max(step for step, _ in own["loss"])
    parts: list[str] = []
    y = 8
    for what in ("loss", "gradient norm"):
        lines = {
            "first": [(step, one.actual_at_worst) for step, one in own.get(what, [])],
            "second": [(step, one.expected_at_worst) for step, one in own.get(what, [])],
        }
        dots = [(step, one.expected_at_worst) for step, one in by_hand.get(what, [])]
        parts += _values(what, lines, dots, y, steps)
        y += _TALL + _GAP
    differences = {
        "loss": [(step, one.relative) for step, one in own.get("loss", [])],
        "norm": [(step, one.relative) for step, one in own.get("gradient norm", [])],
        "update": _largest(own),
    }
    bound = next(one.bound for seen in own.values() for _, one in seen if one.bound > 0)
    parts += _differences(differences, y, steps, bound)
    y += _LOW + _GAP
    parts += _axis(y - 8, steps)
    legend = (
        f'<p class="legend">Broad: {escape(first)}; thin: {escape(second)}; dots: the same steps put together by the '
        "judge. Below: the relative difference of the two, of the loss (solid), of the norm (dashed) and of the update "
        "that differs most within its module (dotted). A step without targets has loss and norm 0.</p>"
    )
    svg = (
        f'<svg viewBox="0 0 {_WIDTH} {y + 12}" role="img" class="curves" xmlns="http://www.w3.org/2000/svg">'
        f"{''.join(parts)}</svg>"
    )
    return f"<section><h2>Training, step by step</h2>{legend}{svg}</section>"


def _by_pair(rung: Rung) -> dict[tuple[str, str], dict[str, list[tuple[int, Comparison]]]]:
    """Comparisons of steps by the two runs that they are between, then by what is compared."""
    found: dict[tuple[str, str], dict[str, list[tuple[int, Comparison]]]] = {}
    for one in rung.comparisons:
        match = _NAME.fullmatch(one.name)
        if isinstance(one, Comparison) and match:
            pair = found.setdefault((match["first"], match["second"]), {})
            pair.setdefault(match["what"], []).append((int(match["step"]), one))
    return found


def _largest(own: dict[str, list[tuple[int, Comparison]]]) -> Points:
    """Of each step the largest difference of an update."""
    largest: dict[int, float] = {}
    for what, seen in own.items():
        if what.startswith("update of "):
            for step, one in seen:
                largest[step] = max(largest.get(step, 0.0), one.relative)
    return sorted(largest.items())


def _values(what: str, lines: dict[str, Points], dots: Points, y: int, steps: int) -> list[str]:
    values = [value for line in (*lines.values(), dots) for _, value in line if math.isfinite(value)]
    top = max(values, default=1.0) or 1.0

    def place(value: float) -> float:
        return y + _TALL * (1 - value / top)

    parts = [f'<text x="0" y="{y + _TALL / 2:.0f}" class="label">{escape(what)}</text>', *_frame(y, _TALL)]
    parts += [
        f'<text x="{_LEFT - 6}" y="{place(value) + 4:.1f}" class="group" text-anchor="end">{value:.3g}</text>'
        for value in (0.0, top)
    ]
    parts += [_line(line, place, steps, kind) for kind, line in lines.items()]
    parts += [
        f'<circle cx="{_across(step, steps):.1f}" cy="{place(value):.1f}" r="2.6" class="hand"/>'
        for step, value in dots
        if math.isfinite(value)
    ]
    return parts


def _differences(lines: dict[str, Points], y: int, steps: int, bound: float) -> list[str]:
    finite = [value for line in lines.values() for _, value in line if math.isfinite(value) and value > 0]
    high = max(1.0, *finite) if finite and max(finite) > bound else bound * 10

    def place(value: float) -> float:
        low = math.log10(_SMALLEST)
        part = (math.log10(max(value, _SMALLEST)) - low) / (math.log10(high) - low)
        return y + _LOW * (1 - min(part, 1.0))

    at = place(bound)
    parts = [f'<text x="0" y="{y + _LOW / 2:.0f}" class="label">difference</text>', *_frame(y, _LOW)]
    parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" class="limit"/>')
    parts += [
        f'<text x="{_LEFT - 6}" y="{place(value) + 4:.1f}" class="group" text-anchor="end">{told}</text>'
        for value, told in ((_SMALLEST, "1e-17 or less"), (bound, f"bound {bound:.0e}"))
    ]
    # what could not be compared at all stands at the top
    return [
        *parts,
        *(_line(line, place, steps, kind, shown=lambda value: min(value, high)) for kind, line in lines.items()),
    ]


def _line(
    line: Points,
    place: Callable[[float], float],
    steps: int,
    kind: str,
    shown: Callable[[float], float] = lambda value: value,
) -> str:
    points = [
        f"{_across(step, steps):.1f},{place(shown(value)):.1f}" for step, value in line if math.isfinite(shown(value))
    ]
    return f'<polyline points="{" ".join(points)}" class="{kind}"/>'


def _frame(y: int, height: int) -> list[str]:
    return [f'<rect x="{_LEFT}" y="{y}" width="{_WIDTH - _LEFT - _RIGHT}" height="{height}" class="frame"/>']


def _axis(y: int, steps: int) -> list[str]:
    places: Sequence[int] = range(0, steps + 1, max(1, steps // 12))
    return [
        f'<text x="{_across(step, steps):.1f}" y="{y}" class="group" text-anchor="middle">{step}</text>'
        for step in places
    ]


def _across(step: int, steps: int) -> float:
    return _LEFT + 10 + (_WIDTH - _LEFT - _RIGHT - 20) * step / max(steps, 1)
