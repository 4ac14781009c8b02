"""Tablature as a picture (SVG, PNG or PDF), through matplotlib without its global state."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from pathlib import Path
from typing import Any

from twinformer.checkpoint import write_atomically
from twinformer.data.guitar.fretboard import pitch_name
from twinformer.data.guitar.notes import QUARTER, Piece
from twinformer.errors import InputError

KINDS = ("svg", "png", "pdf")
_INK, _LINE, _WRONG, _PALE = "#1a1a1a", "#b8b8b8", "#c62828", "#6b6b6b"
#: inches: of a quarter note at least and as a rule, between two notes that follow, a bar's edge
_NARROW, _QUARTER_WIDTH, _NOTE_GAP, _EDGE = 0.2, 0.5, 0.12, 0.16
#: inches: between two strings, around everything, for the strings' names, between two systems, and what a page can hold
_STRING_GAP, _MARGIN, _NAMES, _SYSTEM_GAP, _MAX_HEIGHT = 0.14, 0.35, 0.3, 0.62, 400.0


def draw_tab(piece: Piece, *, width: float = 10.0, marked: Collection[int] = (), caption: str = "") -> Any:
    """A matplotlib ``Figure`` of ``width`` inches, as high as the piece needs.

    ``marked``: numbers of notes to show in red, for example those that a model got wrong. Raises InputError where a
    note has no string or a bar is longer than the page is wide.
    """
    from matplotlib.figure import Figure

    if not piece.has_tab:
        raise InputError("picture", ["expected a string and a fret for every note, got notes without"])
    room = width - 2 * _MARGIN - _NAMES
    scale = _scale(piece, room)
    systems = _systems(piece, room, scale)
    strings = len(piece.tuning)
    head = 0.45 if piece.title or caption else 0.1
    row = (strings - 1) * _STRING_GAP + _SYSTEM_GAP
    height = head + len(systems) * row + _MARGIN
    if height > _MAX_HEIGHT:
        raise InputError(
            "picture", [f"expected at most {_MAX_HEIGHT:.0f} inches of height, got {height:.0f}: draw less"]
        )
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    axes.text(_MARGIN, height - 0.3, piece.title, size=12, weight="bold", color=_INK, va="center")
    axes.text(width - _MARGIN, height - 0.3, caption, size=8, color=_PALE, va="center", ha="right")
    for number, bars in enumerate(systems):
        bottom = height - head - (number + 1) * row + _SYSTEM_GAP / 2 - 0.1
        length = piece.bar_ends[bars[-1]] - piece.bars[bars[0]]
        filled = (room - 2 * _EDGE * len(bars)) / length * QUARTER  # as wide as the page, but for a short last line
        stretched = filled if filled < 1.5 * scale else scale
        _draw_system(axes, piece, bars, bottom, stretched, marked, first=number == 0)
    return figure


def write_picture(
    piece: Piece, file: str | Path, *, width: float = 10.0, marked: Collection[int] = (), caption: str = ""
) -> None:
    """Write ``draw_tab`` as the kind of picture that the file's name ends in."""
    file = Path(file)
    kind = file.suffix.lower().lstrip(".")
    if kind not in KINDS:
        raise InputError(str(file), [f"expected a name that ends in one of {', '.join(KINDS)}, got {file.suffix!r}"])
    figure = draw_tab(piece, width=width, marked=marked, caption=caption)
    write_atomically(file, lambda part: figure.savefig(part, format=kind))


def _scale(piece: Piece, room: float) -> float:
    """Inches of a quarter: so much that notes that follow keep apart, if the longest bar then has room."""
    starts = sorted({note.start for note in piece.notes})
    gap = min((b - a for a, b in itertools.pairwise(starts)), default=QUARTER)
    longest = max(end - start for start, end in zip(piece.bars, piece.bar_ends, strict=True))
    digits = max((len(str(note.fret)) for note in piece.notes), default=1)
    wanted = max(_QUARTER_WIDTH, _NOTE_GAP * digits / gap * QUARTER)
    return max(_NARROW, min(wanted, (room - 2 * _EDGE) / longest * QUARTER))


def _bar_width(length: int, scale: float) -> float:
    return length / QUARTER * scale + 2 * _EDGE


def _systems(piece: Piece, room: float, scale: float) -> list[list[int]]:
    """The numbers of the bars in each line."""
    systems: list[list[int]] = []
    used = room
    for number, (start, end) in enumerate(zip(piece.bars, piece.bar_ends, strict=True)):
        wanted = _bar_width(end - start, scale)
        if wanted > room + 1e-9:
            raise InputError("picture", [f"bar {number}: expected at most {room:.1f} inches, got {wanted:.1f}: widen"])
        if used + wanted > room + 1e-9:
            systems.append([])
            used = 0.0
        systems[-1].append(number)
        used += wanted
    return systems


def _draw_system(
    axes: Any, piece: Piece, bars: list[int], bottom: float, scale: float, marked: Collection[int], *, first: bool
) -> None:
    strings = len(piece.tuning)
    top = bottom + (strings - 1) * _STRING_GAP
    left = _MARGIN + _NAMES
    right = left + sum(_bar_width(piece.bar_ends[b] - piece.bars[b], scale) for b in bars)
    for string, low in enumerate(piece.tuning):
        y = bottom + string * _STRING_GAP
        axes.plot((left, right), (y, y), color=_LINE, linewidth=0.7, zorder=1, solid_capstyle="butt")
        axes.text(left - 0.06, y, pitch_name(low)[:-1], size=6, color=_PALE, va="center", ha="right")
    axes.plot((left, left), (bottom, top), color=_INK, linewidth=0.9, zorder=2)
    if first:
        axes.text(left, top + 0.12, "{}/{}".format(*piece.time_signature), size=7, color=_PALE, va="bottom")
    x = left
    for bar in bars:
        start, end = piece.bars[bar], piece.bar_ends[bar]
        if bar != 0:
            axes.text(x, top + 0.05, str(bar + 1), size=5.5, color=_PALE, va="bottom", ha="center")
        for number, note in enumerate(piece.notes):
            if start <= note.start < end and note.string is not None:
                where = x + _EDGE + (note.start - start) / QUARTER * scale
                is_marked = number in marked
                axes.text(
                    where,
                    bottom + note.string * _STRING_GAP,
                    str(note.fret),
                    size=8,
                    family="DejaVu Sans",
                    weight="bold" if is_marked else "normal",
                    color=_WRONG if is_marked else _INK,
                    ha="center",
                    va="center_baseline",
                    zorder=3,
                    bbox={"boxstyle": "square,pad=0.08", "facecolor": "white", "edgecolor": "none"},
                )
        x += _bar_width(end - start, scale)
        is_last = bar == len(piece.bars) - 1
        axes.plot((x, x), (bottom, top), color=_INK, linewidth=2.2 if is_last else 0.9, zorder=2)
