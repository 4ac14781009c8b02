"""A report of measurements, for people and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from twinformer.runs.intervals import Interval


@dataclass(frozen=True)
class Measure:
    """One line of a report: a share or a number of one system, with a 95 % interval where there is one."""

    system: str
    name: str
    value: float
    interval: Interval | None = None
    share: bool = False


@dataclass
class Report:
    """Everything that was measured. ``facts`` say on what."""

    title: str
    facts: dict[str, Any] = field(default_factory=dict)
    measures: list[Measure] = field(default_factory=list)

    def add(
        self, system: str, name: str, value: float, interval: Interval | None = None, *, share: bool = False
    ) -> None:
        self.measures.append(Measure(system, name, value, interval, share))

    def to_dict(self) -> dict[str, Any]:
        found = [
            {"system": one.system, "name": one.name, "value": one.value, "interval": one.interval}
            for one in self.measures
        ]
        return {"title": self.title, **self.facts, "measures": found}


def as_rows(report: Report) -> list[Mapping[str, str]]:
    """The measures as text, for a table."""

    def shown(value: float, share: bool) -> str:
        return f"{value:.1%}" if share else f"{value:.4g}"

    return [
        {
            "system": one.system,
            "measure": one.name,
            "value": shown(one.value, one.share),
            "95 % interval": "" if one.interval is None else " to ".join(shown(x, one.share) for x in one.interval),
        }
        for one in report.measures
    ]
