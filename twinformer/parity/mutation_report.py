"""What became of the fault catalogue: the matrix, its sums, and the verdict."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from twinformer.parity.mutation import REFUSAL, Baseline, Climbed, Outcome, State
from twinformer.parity.rungs import LADDER

SCHEMA = 1
# the share of killed mutants whose culprit has to be named rightly
RIGHT = 0.95
_STYLES: dict[State, str] = {
    "killed": "green",
    "green": "green",
    "survived": "bold red",
    "alarm": "bold red",
    "error": "bold red",
}
_HEADINGS = {
    "parameters": "param",
    "forward": "forw",
    "gradients": "grad",
    "stochastic": "drop",
    "rounding": "round",
    "precision": "prec",
    REFUSAL: "refus",
}
_SHORT = {"torch_impl": "torch", "flax_impl": "flax"}


@dataclass
class MutationReport:
    """``wanted``: how many outcomes there will be when all is done. ``does_not_apply``: id -> why not."""

    wanted: int
    does_not_apply: Mapping[str, str]
    outcomes: list[Outcome] = field(default_factory=list)
    baselines: list[Baseline] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, found: Baseline | Outcome) -> None:
        if isinstance(found, Baseline):
            self.baselines.append(found)
        else:
            self.outcomes.append(found)

    @property
    def mutants(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.kind == "mutant"]

    @property
    def controls(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.kind == "control"]

    @property
    def killed(self) -> list[Outcome]:
        return [outcome for outcome in self.mutants if outcome.state == "killed"]

    @property
    def named(self) -> list[Outcome]:
        """Those killed for which a culprit has to be named."""
        return [outcome for outcome in self.killed if outcome.right is not None]

    @property
    def right(self) -> list[Outcome]:
        return [outcome for outcome in self.named if outcome.right]

    @property
    def problems(self) -> list[str]:
        """Why the catalogue as a whole is not good."""
        problems = [f"{one.case}: differs without any fault: {one.message}" for one in self.baselines if not one.agrees]
        problems += [
            f"{one.id} in {one.twin}: {one.state}{': ' + one.message if one.message else ''}"
            for one in self.outcomes
            if not one.is_good
        ]
        if len(self.right) < RIGHT * len(self.named):
            problems.append(
                f"culprits: expected at least {RIGHT:.0%} named rightly, got {len(self.right)} of {len(self.named)}"
            )
        if len(self.outcomes) < self.wanted:
            problems.append(f"expected {self.wanted} outcomes, got {len(self.outcomes)}")
        return problems

    @property
    def exit_code(self) -> int:
        """0: every mutant killed, no control alarmed, enough culprits right; 1 otherwise."""
        return 1 if self.problems else 0

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {
            "schema": SCHEMA,
            "mutants": len(self.mutants),
            "killed": len(self.killed),
            "culprits_named": len(self.named),
            "culprits_right": len(self.right),
            "controls": len(self.controls),
            "alarms": sum(outcome.state != "green" for outcome in self.controls),
            "seconds": round(self.seconds, 3),
            "problems": self.problems,
            "outcomes": [outcome.to_dict() for outcome in sorted(self.outcomes, key=_order)],
            "baselines": [vars(baseline) for baseline in self.baselines],
            "does_not_apply": dict(self.does_not_apply),
            "settings": versions(),
        }

    def __rich__(self) -> RenderableType:
        table = Table(show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), expand=True)
        used = {climbed.rung for outcome in self.outcomes for climbed in outcome.rungs}
        rungs = [rung for rung in (REFUSAL, *(step.name for step in LADDER)) if rung in used]
        table.add_column("id", no_wrap=True)
        table.add_column("twin", no_wrap=True)
        table.add_column("fault", no_wrap=True, overflow="ellipsis", ratio=1, min_width=12)
        for rung in rungs:
            table.add_column(_HEADINGS.get(rung, rung), justify="right", no_wrap=True)
        table.add_column("outcome", no_wrap=True)
        table.add_column("culprit", overflow="fold")
        for outcome in sorted(self.outcomes, key=_order):
            table.add_row(*_row(outcome, rungs))
        parts: list[RenderableType] = [table]
        if self.does_not_apply:
            parts.append(Text("does not apply:", style="bold"))
            parts += [Text(f"  {reason}: {ids}", style="dim") for reason, ids in self._reasons().items()]
        parts.append(Text("figures: the worst difference in units of its bound; a dot: no difference", style="dim"))
        parts += [Text(problem, style="bold red") for problem in self.problems]
        parts.append(Text(self.sums()))
        return Group(*parts)

    def sums(self) -> str:
        """One line of figures."""
        alarms = sum(outcome.state != "green" for outcome in self.controls)
        cases = {baseline.case for baseline in self.baselines}
        differing = {baseline.case for baseline in self.baselines if not baseline.agrees}
        return (
            f"{len(self.killed)} of {len(self.mutants)} mutants killed, "
            f"{len(self.right)} of {len(self.named)} culprits named rightly, "
            f"{alarms} alarms on {len(self.controls)} controls, "
            f"{len(cases - differing)} of {len(cases)} cases agree without a fault, "
            f"{len(self.does_not_apply)} entries do not apply ({self.seconds:.0f} s)"
        )

    def _reasons(self) -> dict[str, str]:
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.does_not_apply.items():
            by_reason.setdefault(reason, []).append(name)
        return {reason: ", ".join(names) for reason, names in by_reason.items()}


def versions() -> dict[str, str]:
    """What the outcomes were found with."""
    packages = ("twinformer", "torch", "jax", "jaxlib", "flax", "numpy")
    return {"python": platform.python_version(), "machine": platform.machine()} | {
        package: importlib.metadata.version(package) for package in packages
    }


def _order(outcome: Outcome) -> tuple[Any, ...]:
    letters = outcome.id.rstrip("0123456789")
    return (outcome.kind == "control", letters, int(outcome.id.removeprefix(letters) or 0), outcome.twin)


def _row(outcome: Outcome, rungs: Sequence[str]) -> tuple[RenderableType, ...]:
    climbed = {one.rung: one for one in outcome.rungs}
    culprit = {None: Text(""), True: Text("right", style="green"), False: Text("wrong", style="red")}[outcome.right]
    if outcome.right is False:
        culprit.append(f": {', '.join(outcome.culprits[:2]) or 'none'}")
    return (
        outcome.id,
        _SHORT.get(outcome.twin, outcome.twin),
        Text(outcome.mechanism),
        *(_cell(climbed.get(rung)) for rung in rungs),
        Text(outcome.state, style=_STYLES[outcome.state]),
        culprit,
    )


def _cell(climbed: Climbed | None) -> Text:
    """The margin where the rung differs, a dot where it does not, nothing where it was not climbed."""
    if climbed is None:
        return Text("")
    if climbed.verdict != "differ":
        return Text("·", style="dim")
    return Text(f"{climbed.margin:.0e}" if math.isfinite(climbed.margin) else "∞")
