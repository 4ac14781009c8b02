"""The report: the whole ladder, what was found on each rung, and what was not checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from twinformer.parity.compare import Comparison, ErrorPair
from twinformer.parity.power import CHANGE
from twinformer.parity.rungs import LADDER
from twinformer.parity.verdict import Rung, Verdict

SCHEMA = 1
_STYLES: dict[Verdict, str] = {
    "agree": "green",
    "differ": "bold red",
    "cannot tell": "yellow",
    "does not apply": "dim",
    "not run": "dim",
}
_EXIT: dict[Verdict, int] = {"agree": 0, "differ": 1, "cannot tell": 2, "does not apply": 2, "not run": 2}
_WORST_FIRST: tuple[Verdict, ...] = ("differ", "cannot tell", "agree", "does not apply")
# from this width on there is room for the names of the worst places
_WIDE = 110
# problems shown in the terminal for one rung; the JSON file has all
_SHOWN = 6


@dataclass
class Report:
    """What the judge found.

    ``rungs`` holds the outcome of each rung that was run, by name; ``witnesses`` outcomes beside the ladder
    (other people's implementations, published answers); ``answers`` rows of ``(what, published, found by
    each)`` that were looked up along the way. ``command`` repeats it.
    """

    subject: str
    description: str
    rungs: dict[str, Rung]
    witnesses: dict[str, Rung] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    command: str = ""

    @property
    def verdict(self) -> Verdict:
        """Differ if anything differs, cannot tell if anything cannot, agree only if all that was run agrees.

        What does not apply says nothing about the others.
        """
        verdicts = [rung.verdict for rung in (*self.rungs.values(), *self.witnesses.values())]
        for verdict in _WORST_FIRST:
            if verdict in verdicts:
                return verdict
        return "not run"

    @property
    def exit_code(self) -> int:
        """0 agree, 1 differ, 2 cannot tell or nothing was checked."""
        return _EXIT[self.verdict]

    @property
    def not_run(self) -> list[str]:
        """The rungs of the ladder that this report says nothing about."""
        return [step.name for step in LADDER if step.name not in self.rungs]

    @property
    def culprits(self) -> list[str]:
        """The modules that introduce a difference, as the first rung that found any names them."""
        return next((rung.culprits for rung in self.rungs.values() if rung.culprits), [])

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {
            "schema": SCHEMA,
            "subject": self.subject,
            "description": self.description,
            "verdict": self.verdict,
            "culprits": self.culprits,
            "seconds": round(self.seconds, 3),
            "command": self.command,
            "rungs": [
                {"number": step.number, "name": step.name, "asks": step.asks, **_rung_dict(self.rungs.get(step.name))}
                for step in LADDER
            ],
            "witnesses": [{"name": name, **_rung_dict(rung)} for name, rung in self.witnesses.items()],
            "answers": self.answers,
            "not_run": self.not_run,
            "notes": self.notes,
            "settings": self.settings,
            "config": self.config,
        }

    def assert_agrees(self) -> None:
        """Raise AssertionError with the table where the verdict is not agreement."""
        if self.verdict != "agree":
            console = Console(width=140, force_terminal=False, no_color=True)
            with console.capture() as captured:
                console.print(self)
            raise AssertionError(f"verdict: {self.verdict}\n{captured.get()}")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"{self.subject}: {self.description}", style="bold")
        yield self._table(with_places=options.max_width >= _WIDE)
        if self.answers:
            yield self._answers()
        for name, rung in {**self.rungs, **self.witnesses}.items():
            yield from _details(name, rung)
        for note in self.notes:
            yield Text(f"note: {note}", style="dim")
        yield Text(f"not run: {', '.join(self.not_run)}", style="dim")
        yield Text(", ".join(f"{key} {value}" for key, value in self.settings.items()), style="dim")
        yield Text.assemble("verdict: ", (self.verdict, _STYLES[self.verdict]), f"  ({self.seconds:.1f} s)")

    def _table(self, *, with_places: bool) -> Table:
        """``noise`` is the noise floor, ``notices`` the change of one weight that the least sensitive would notice."""
        table = Table(show_edge=False, pad_edge=False)
        table.add_column("rung", no_wrap=True)
        table.add_column("checked")
        for column in ("worst", "bound", "noise", "notices"):
            table.add_column(column, justify="right", no_wrap=True)
        if with_places:
            table.add_column("where", overflow="fold")
        table.add_column("verdict", no_wrap=True)
        rows = [(f"{step.number} {step.name}", self.rungs.get(step.name)) for step in LADDER]
        for name, rung in [*rows, *self.witnesses.items()]:
            *cells, where, verdict = _row(name, rung)
            table.add_row(*cells, *([where] if with_places else []), verdict)
        return table

    def _answers(self) -> Table:
        table = Table(show_edge=False, pad_edge=False)
        for column in self.answers[0]:
            table.add_column(column, justify="left" if column == "what" else "right")
        for answer in self.answers:
            table.add_row(*(value if isinstance(value, str) else f"{value:.4f}" for value in answer.values()))
        return table


def _row(name: str, rung: Rung | None) -> tuple[RenderableType, ...]:
    if rung is None:
        return (Text(name, style="dim"), "", "", "", "", "", "", Text("not run", style="dim"))
    worst = rung.worst
    verdict = Text(rung.verdict, style=_STYLES[rung.verdict])
    if worst is None:
        return (name, rung.checked, "", "", "", "", "", verdict)
    if isinstance(worst, ErrorPair):
        rms_is_nearer = worst.rms_ratio / worst.rms_bound > worst.ratio / worst.bound
        nearer = (worst.rms_ratio, worst.rms_bound) if rms_is_nearer else (worst.ratio, worst.bound)
        figures = [f"×{nearer[0]:.2f}", f"×{nearer[1]:.0f}", _short(max(worst.noise)) if worst.noise else ""]
    else:
        figures = [
            _short(worst.relative),
            f"{worst.bound:.0e}" if worst.bound else "0",
            "" if worst.noise is None else _short(worst.noise),
        ]
    return (name, rung.checked, *figures, least_noticed(rung), worst.name, verdict)


def least_noticed(rung: Rung) -> str:
    """The relative change of a single weight that the least sensitive of the comparisons would have noticed."""
    measured = [one.notices for one in rung.comparisons if one.notices is not None and math.isfinite(one.notices)]
    telling = [smallest for smallest in measured if smallest <= CHANGE]
    return _short(max(telling)) if telling else ""


def _short(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.1e}" if math.isfinite(value) else "-"


def _details(name: str, rung: Rung) -> list[RenderableType]:
    lines: list[RenderableType] = []
    if rung.culprits:
        lines.append(Text(f"{name}: culprit: {', '.join(rung.culprits)}", style="bold red"))
    lines += [Text(f"{name}: {problem}", style=_STYLES[rung.verdict]) for problem in rung.problems[:_SHOWN]]
    if len(rung.problems) > _SHOWN:
        lines.append(Text(f"{name}: and {len(rung.problems) - _SHOWN} more (--json FILE has all)"))
    lines += [Text(f"{name}: note: {note}", style="dim") for note in rung.notes]
    return lines


def _rung_dict(rung: Rung | None) -> dict[str, Any]:
    if rung is None:
        return {"verdict": "not run"}
    return {
        "verdict": rung.verdict,
        "checked": rung.checked,
        "seconds": round(rung.seconds, 3),
        "culprits": rung.culprits,
        "problems": rung.problems,
        "notes": rung.notes,
        "comparisons": [_comparison_dict(comparison) for comparison in rung.comparisons],
    }


def _comparison_dict(comparison: Comparison | ErrorPair) -> dict[str, Any]:
    if isinstance(comparison, ErrorPair):
        figures: Mapping[str, Any] = {
            "errors": {who: _number(e) for who, e in zip(comparison.systems, comparison.errors, strict=True)},
            "rms_errors": {who: _number(e) for who, e in zip(comparison.systems, comparison.rms_errors, strict=True)},
            "ratio": _number(comparison.ratio),
            "rms_ratio": _number(comparison.rms_ratio),
            "rms_bound": comparison.rms_bound,
            "noise": {who: _number(floor) for who, floor in zip(comparison.systems, comparison.noise, strict=False)},
            "draws": 1 + len(comparison.again),
            "first": {who: _figures(error) for who, error in zip(comparison.systems, comparison.first, strict=False)},
        }
    else:
        figures = _figures(comparison) | {"noise": _maybe(comparison.noise)}
    return {
        "name": comparison.name,
        "agrees": comparison.agrees,
        **figures,
        "bound": comparison.bound,
        "notices": _maybe(comparison.notices),
        "problem": comparison.problem,
    }


def _figures(comparison: Comparison) -> dict[str, Any]:
    return {
        "shape": list(comparison.shape),
        "largest": _number(comparison.largest),
        "scale": _number(comparison.scale),
        "relative": _number(comparison.relative),
        "relative_rms": _number(comparison.relative_rms),
        "ulps": _number(comparison.ulps),
        "worst": list(comparison.worst),
        "actual_at_worst": _number(comparison.actual_at_worst),
        "expected_at_worst": _number(comparison.expected_at_worst),
    }


def _maybe(value: float | None) -> float | None:
    return None if value is None else _number(value)


def _number(value: float) -> float | None:
    """JSON has no infinities: they become null, beside the problem that explains them."""
    return value if math.isfinite(value) else None
