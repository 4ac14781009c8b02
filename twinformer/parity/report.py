"""The report: the whole ladder, what was found on each rung, and what was not checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from twinformer.parity.compare import Comparison, ErrorPair
from twinformer.parity.rungs import LADDER
from twinformer.parity.verdict import Rung, Verdict

SCHEMA = 1
_STYLES: dict[Verdict, str] = {"agree": "green", "differ": "bold red", "cannot tell": "yellow", "not run": "dim"}
_EXIT: dict[Verdict, int] = {"agree": 0, "differ": 1, "cannot tell": 2, "not run": 2}
# problems shown in the terminal for one rung; the JSON file has all
_SHOWN = 6


@dataclass
class Report:
    """What the judge found.

    ``rungs`` holds the outcome of each rung that was run, by name; ``witnesses`` outcomes beside the ladder
    (other people's implementations, published answers); ``answers`` rows of ``(what, published, found by
    each)`` that were looked up along the way.
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

    @property
    def verdict(self) -> Verdict:
        """Differ if anything differs, cannot tell if anything cannot, agree only if all that was run agrees."""
        verdicts = [rung.verdict for rung in (*self.rungs.values(), *self.witnesses.values())]
        for verdict in ("differ", "cannot tell"):
            if verdict in verdicts:
                return verdict
        return "agree" if verdicts else "not run"

    @property
    def exit_code(self) -> int:
        """0 agree, 1 differ, 2 cannot tell."""
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

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [Text(f"{self.subject}: {self.description}", style="bold"), self._table()]
        if self.answers:
            parts.append(self._answers())
        for name, rung in {**self.rungs, **self.witnesses}.items():
            parts += _details(name, rung)
        parts += [Text(f"note: {note}", style="dim") for note in self.notes]
        parts.append(Text(f"not run: {', '.join(self.not_run)}", style="dim"))
        parts.append(Text(", ".join(f"{key} {value}" for key, value in self.settings.items()), style="dim"))
        verdict = Text.assemble("verdict: ", (self.verdict, _STYLES[self.verdict]), f"  ({self.seconds:.1f} s)")
        parts.append(verdict)
        return Group(*parts)

    def _table(self) -> Table:
        table = Table(show_edge=False, pad_edge=False)
        for column, justify in (("rung", "left"), ("checked", "left"), ("worst", "right"), ("bound", "right")):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        table.add_column("where", overflow="fold")
        table.add_column("verdict", no_wrap=True)
        for step in LADDER:
            table.add_row(*_row(f"{step.number} {step.name}", self.rungs.get(step.name)))
        for name, rung in self.witnesses.items():
            table.add_row(*_row(name, rung))
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
        return (Text(name, style="dim"), "", "", "", "", Text("not run", style="dim"))
    worst = rung.worst
    verdict = Text(rung.verdict, style=_STYLES[rung.verdict])
    if worst is None:
        return (name, rung.checked, "", "", "", verdict)
    if isinstance(worst, ErrorPair):
        rms_is_nearer = worst.rms_ratio / worst.rms_bound > worst.ratio / worst.bound
        nearer = (worst.rms_ratio, worst.rms_bound) if rms_is_nearer else (worst.ratio, worst.bound)
        figures = (f"×{nearer[0]:.2f}", f"×{nearer[1]:.0f}")
    else:
        figures = (_short(worst.relative), _short(worst.bound))
    return (name, rung.checked, *figures, worst.name, verdict)


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
        }
    else:
        figures = {
            "shape": list(comparison.shape),
            "largest": _number(comparison.largest),
            "scale": _number(comparison.scale),
            "relative": _number(comparison.relative),
            "worst": list(comparison.worst),
        }
    return {
        "name": comparison.name,
        "agrees": comparison.agrees,
        **figures,
        "bound": comparison.bound,
        "problem": comparison.problem,
    }


def _number(value: float) -> float | None:
    """JSON has no infinities: they become null, beside the problem that explains them."""
    return value if math.isfinite(value) else None
