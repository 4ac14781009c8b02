"""What a run writes down as it goes: metrics.jsonl, TensorBoard events, and curves as a picture.

``metrics.jsonl`` has one JSON object a line: ``{"kind": "train" | "valid", "step": …, "torch": {"loss": …}, …}``, with
what a twin found under its name. It is the source of the curves. Where the disk is full, lines wait in memory and are
written when there is room again: the run itself goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from twinformer.checkpoint import write_atomically
from twinformer.runs.events import EventFile, append

METRICS_FILE = "metrics.jsonl"
EVENTS_DIRECTORY = "tensorboard"
CURVES = ("curves.png", "curves.svg")

Record = dict[str, Any]


class MetricsLog:
    """metrics.jsonl of a run and its events. ``tell`` is given messages for people."""

    def __init__(self, run: Path, *, start: int = 0, tell: Callable[[str], None] = lambda _: None) -> None:
        self.file = run / METRICS_FILE
        self.tell = tell
        self._cut(start)
        self._events = EventFile(run / EVENTS_DIRECTORY, start=start)
        self._lines: list[str] = []
        self._told = False

    def add(self, record: Mapping[str, Any]) -> None:
        self._lines.append(json.dumps(record, allow_nan=False) + "\n")
        self._events.add(record["step"], numbers(record))

    def flush(self) -> None:
        """Write what waits, whole lines or nothing."""
        try:
            append(self.file, "".join(self._lines).encode())
            self._lines.clear()
            self._events.flush()
        except OSError as error:
            if not self._told:
                self.tell(f"the log cannot be written, its lines wait in memory: {error}")
            self._told = True
        else:
            self._told = False

    def _cut(self, step: int) -> None:
        """Forget what was noted after ``step``, since it will be done again; and a line that a kill cut short."""
        if self.file.is_file():
            kept = [json.dumps(record) + "\n" for record in read_metrics(self.file) if record["step"] <= step]
            write_atomically(self.file, lambda part: part.write_text("".join(kept), encoding="utf-8"))


def read_metrics(file: Path) -> list[Record]:
    """Every whole line of a metrics.jsonl; a last line that was cut short is no line."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found.append(record)
    return found


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record as TensorBoard calls them: ``train/loss/torch`` …"""
    found = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            for inner, number in value.items():
                found[f"{record['kind']}/{inner}/{name}"] = number
        elif name != "step":
            found[f"{record['kind']}/{name}"] = value
    return {tag: float(value) for tag, value in found.items() if isinstance(value, (int, float))}


_COLOURS = {"torch": "#d1495b", "flax": "#2e6f95"}
_STYLES = ("-", "--")


def draw_curves(records: Sequence[Record], files: Sequence[Path], *, title: str) -> None:
    """Loss by step, training (thin) and validation (with marks); two twins over each other, and below, how far they are
    apart: the relative difference of their training losses.
    """
    from matplotlib.figure import Figure

    twins = [name for name in _COLOURS if any(name in record for record in records)]
    train = [record for record in records if record["kind"] == "train"]
    apart = [(record["step"], record["difference"]) for record in train if record.get("difference")]
    figure = Figure(figsize=(8, 6 if apart else 4.5), layout="constrained")
    rows = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1], squeeze=False) if apart else None
    axes = figure.add_subplot() if rows is None else rows[0, 0]
    for name, style in zip(twins, _STYLES, strict=False):
        colour = _COLOURS[name]
        losses = [(r["step"], r[name]["loss"]) for r in train if name in r]
        axes.plot(*_columns(losses), style, color=colour, lw=0.5, alpha=0.35)
        axes.plot(*_columns(_smooth(losses)), style, color=colour, lw=1.5, label=f"{name}, training")
        checks = [(r["step"], r[name]["loss"]) for r in records if r["kind"] == "valid" and name in r]
        if checks:
            mark = "o" if style == "-" else "x"
            axes.plot(*_columns(checks), color=colour, label=f"{name}, validation", marker=mark, ls=style, ms=5, lw=1)
    axes.set(title=title, ylabel="loss, nats per target")
    axes.grid(alpha=0.25)
    axes.legend()
    if rows is not None:
        rows[1, 0].semilogy(*_columns(apart), ".", ms=2, color="#444444")
        rows[1, 0].set(ylabel="relative\ndifference")
        rows[1, 0].grid(alpha=0.25)
    (axes if rows is None else rows[1, 0]).set(xlabel="step")
    for file in files:
        kind = file.suffix.removeprefix(".")
        write_atomically(file, lambda part, kind=kind: figure.savefig(part, format=kind, dpi=150))  # type: ignore[misc]


def _columns(pairs: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in pairs], [value for _, value in pairs]


def _smooth(pairs: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Exponential average over about a fiftieth of the run, begun without a bias towards its first value."""
    keep = 1 - 1 / max(1.0, len(pairs) / 50)
    found, mean, weight = [], 0.0, 0.0
    for step, value in pairs:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        found.append((step, mean / weight))
    return found
