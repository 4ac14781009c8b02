"""Strips of cells as SVG: one cell for each module, coloured by the logarithm of its error."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

# from nothing to everything: pale, blue, amber, red, dark red
_STOPS = (
    (0.0, (226, 236, 243)),
    (0.30, (116, 169, 207)),
    (0.45, (253, 196, 106)),
    (0.65, (240, 100, 60)),
    (1.0, (120, 10, 20)),
)
_WIDTH, _LABEL, _HEIGHT, _GAP = 1080, 150, 26, 8


@dataclass(frozen=True)
class Cell:
    """``value`` is relative; infinite where nothing could be compared. ``told`` is what pointing at it shows."""

    name: str
    value: float
    is_beyond: bool
    is_culprit: bool
    told: str


@dataclass(frozen=True)
class Strip:
    label: str
    cells: list[Cell]


def draw(strips: Sequence[Strip], *, low: float, high: float, bound: float | None = None) -> str:
    """The strips below one another with a scale from 10^low to 10^high; ``bound`` is marked on the scale."""
    parts: list[str] = []
    y = 10  # room for the marks above the first
    for strip in strips:
        parts += _strip(strip, y, low, high)
        y += _HEIGHT + _GAP + 14
    parts += _scale(y + 4, low, high, bound)
    height = y + 46
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" class="strips" xmlns="http://www.w3.org/2000/svg">'
        f"{''.join(parts)}</svg>"
    )


def _strip(strip: Strip, y: int, low: float, high: float) -> Iterator[str]:
    yield f'<text x="0" y="{y + _HEIGHT / 2 + 4:.0f}" class="label">{escape(strip.label)}</text>'
    if not strip.cells:
        return
    width = (_WIDTH - _LABEL) / len(strip.cells)
    for i, cell in enumerate(strip.cells):
        x = _LABEL + i * width
        under = f'<rect x="{x:.2f}" y="{y + _HEIGHT - 3}" width="{width:.2f}" height="3" class="beyond"/>'
        yield (
            f'<rect x="{x:.2f}" y="{y}" width="{max(width - 0.6, 0.4):.2f}" height="{_HEIGHT}" '
            f'fill="{colour(cell.value, low, high)}"><title>{escape(cell.told)}</title></rect>'
            f"{under if cell.is_beyond else ''}"
        )
        if cell.is_culprit:
            middle = x + width / 2
            yield f'<path d="M{middle - 5:.1f} {y - 7} h10 l-5 6 z" class="mark"/>'
    yield from _groups(strip, y, width)


def _groups(strip: Strip, y: int, width: float) -> Iterator[str]:
    """Below the cells, a tick where a part of the model begins and its name where there is room for it."""
    start = 0
    for group, cells in itertools.groupby(strip.cells, key=lambda cell: group_of(cell.name)):
        count = len(list(cells))
        x, room = _LABEL + start * width, count * width
        start += count
        yield f'<line x1="{x:.2f}" x2="{x:.2f}" y1="{y + _HEIGHT}" y2="{y + _HEIGHT + 4}" class="tick"/>'
        if room > 5.2 * len(group) + 6:
            at = f'x="{x + room / 2:.2f}" y="{y + _HEIGHT + 12}"'
            yield f'<text {at} class="group" text-anchor="middle">{escape(group)}</text>'


def group_of(name: str) -> str:
    """The part of the model that a module belongs to: a block by its number, or the first part of its path."""
    path = name.removeprefix("gradient of ").partition(" ")[0]
    parts = path.split(".")
    if "blocks" in parts[:-1]:
        at = parts.index("blocks")
        return ".".join([*parts[:at], parts[at + 1]]).removeprefix("stack.")
    return parts[0]


def _scale(y: int, low: float, high: float, bound: float | None) -> Iterator[str]:
    steps, width = 60, 420
    for i in range(steps):
        value = 10 ** (low + (high - low) * i / (steps - 1))
        x = _LABEL + i * width / steps
        yield (
            f'<rect x="{x:.1f}" y="{y}" width="{width / steps + 0.3:.2f}" height="10" '
            f'fill="{colour(value, low, high)}"/>'
        )
    for exponent in range(int(low), int(high) + 1, 2 if high - low < 10 else 4):
        x = _LABEL + (exponent - low) / (high - low) * width
        yield f'<text x="{x:.1f}" y="{y + 24}" class="group" text-anchor="middle">1e{exponent}</text>'
    if bound is not None:
        x = _LABEL + (bound - low) / (high - low) * width
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 3}" y2="{y + 13}" class="bound"/>'
        yield f'<text x="{x:.1f}" y="{y + 36}" class="group" text-anchor="middle">bound 1e{bound:.0f}</text>'


def colour(value: float, low: float, high: float) -> str:
    """The colour of a value on a logarithmic scale; black where nothing could be compared."""
    if math.isnan(value) or math.isinf(value):
        return "#000"
    place = 0.0 if value <= 0 else min(1.0, max(0.0, (math.log10(value) - low) / (high - low)))
    for (before, first), (after, second) in itertools.pairwise(_STOPS):
        if place <= after:
            part = (place - before) / (after - before)
            mixed = [round(a + part * (b - a)) for a, b in zip(first, second, strict=True)]
            return "#{:02x}{:02x}{:02x}".format(*mixed)
    return "#000"
