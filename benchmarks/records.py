"""Results as JSON Lines, one row for each system on each case, raw samples and all; and what is derived from them.

Schema (``SCHEMA``): ``schema``, ``run`` (when it began, UTC), ``environment`` (machine.environment()), ``case`` (name,
kind, sizes, threads, quick), ``system``, ``framework``, ``tuned``, ``settings``, ``problem`` (why it was not timed, or
null), ``errors`` (of each output against the float64 truth), ``start`` (seconds: made, outputs, first_run), ``rss``
(bytes), ``visits`` (by round, by sample: wall, cpu, faults, system, per unit), ``busy`` (by round: the share of the
cores that others used), ``ceiling`` (operations and bytes a second, measured in the same run), ``work`` (operations by
both conventions, bytes, tokens, per unit), ``derived`` (below). ``verify`` computes ``derived`` anew from the rest.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import figures
from benchmarks.cases import Case
from benchmarks.figures import Ratio
from benchmarks.machine import BUSY
from benchmarks.protocol import AGAIN, Visited
from benchmarks.work import work_of

SCHEMA = 1
Row = dict[str, Any]
#: what comparisons are made of: wall time, or CPU time where others were at work
CLOCKS = ("wall", "cpu")
#: an A/A interval wider than this (half of it, as a share) says nothing about small differences
NOISE = 0.03


def rows_of(
    case: Case,
    visited: Sequence[Visited],
    *,
    run: str,
    environment: Mapping[str, Any],
    threads: int,
    quick: bool,
    ceiling: Mapping[str, Any] | None,
) -> list[Row]:
    """One row for each system, derived figures included."""
    sizes = {"B": case.B, "T": case.T, "S": case.S, "new": case.new}
    rows: list[Row] = [
        {
            "schema": SCHEMA,
            "run": run,
            "environment": dict(environment),
            "case": {"name": case.name, "kind": case.kind, **sizes, "threads": threads, "quick": quick},
            "config": {} if case.kind == "micro" else case.config.to_dict(),
            "system": one.name,
            "framework": one.system.framework,
            "tuned": one.system.tuned,
            "settings": dict(one.system.settings),
            "problem": one.problem,
            "errors": {name: None if not np.isfinite(error) else error for name, error in one.errors.items()},
            "start": one.start,
            "rss": one.rss,
            "visits": one.visits,
            "busy": one.busy,
            "ceiling": None if ceiling is None else dict(ceiling),
            "work": dataclasses.asdict(work_of(case)),
        }
        for one in visited
    ]
    return with_derived(rows)


def with_derived(rows: Sequence[Row]) -> list[Row]:
    """The rows of one case with ``derived``, which depends on nothing but them."""
    timed = [row for row in rows if row["visits"] and row["problem"] is None]
    reference = next((row for row in timed if not row["system"].endswith(AGAIN)), None)
    ratios: dict[str, dict[str, Ratio]] = {clock: {} for clock in CLOCKS}
    for row in timed:
        if reference is not None and row is not reference:
            for clock in CLOCKS:
                ratios[clock][row["system"]] = figures.ratio(_samples(row, clock), _samples(reference, clock))
    again = {
        clock: next((r for name, r in found.items() if name.endswith(AGAIN)), None) for clock, found in ratios.items()
    }
    significant = {clock: figures.holm({name: r.p for name, r in found.items()}) for clock, found in ratios.items()}
    return [row | {"derived": _derived(row, reference, ratios, again, significant)} for row in rows]


def _derived(
    row: Row,
    reference: Row | None,
    ratios: Mapping[str, Mapping[str, Ratio]],
    again: Mapping[str, Ratio | None],
    significant: Mapping[str, Mapping[str, bool]],
) -> dict[str, Any] | None:
    if not row["visits"] or row["problem"] is not None or reference is None:
        return None
    wall, cpu = (figures.median(_samples(row, clock)) for clock in CLOCKS)
    work, ceiling = row["work"], row["ceiling"]
    share = max(float(np.median(row["busy"])), float(np.median(reference["busy"])))
    is_busy = share > BUSY
    found: dict[str, Any] = {
        "wall": wall,
        "cpu": cpu,
        "tokens_per_second": work["tokens"] / wall,
        "outliers": figures.outliers(_samples(row, "wall")),
        "busy": share,
        "flops_per_second": work["flops"] / wall,
        "bytes_per_second": work["bytes"] / wall,
    }
    if ceiling is not None:
        found |= {
            "of_products": work["flops"] / wall / ceiling["flops"],
            "of_products_full_square": work["flops_full"] / wall / ceiling["flops"],
            "of_bandwidth": work["bytes"] / wall / ceiling["bytes"],
            "of_roofline": max(work["flops"] / ceiling["flops"], work["bytes"] / ceiling["bytes"]) / wall,
        }
    for clock in CLOCKS:
        if row["system"] not in ratios[clock]:
            continue
        one = ratios[clock][row["system"]]
        noise = again[clock]
        said: str = figures.verdict(one, is_significant=significant[clock][row["system"]])
        if clock == "wall" and is_busy:
            said = "busy"
        elif noise is not None and noise.half_width > NOISE and said == "same":
            said = "cannot tell"
        found[f"{clock}_ratio"] = {
            "to": reference["system"],
            "value": one.value,
            "low": one.low,
            "high": one.high,
            "p": one.p,
            "verdict": said,
        }
    return found


def _samples(row: Row, clock: str) -> list[list[float]]:
    return [[sample[clock] for sample in visit] for visit in row["visits"]]


# ---- files


def write(file: Path, rows: Iterable[Row]) -> None:
    """Add rows at the end of a file: a run that is stopped keeps the cases that are done."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, allow_nan=False) + "\n")
        out.flush()


def read(file: Path) -> list[Row]:
    """Raises ValueError naming every line that is not a row of this schema."""
    rows, problems = [], []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: expected JSON, got text that does not parse: {error}")
            continue
        if not isinstance(row, dict) or row.get("schema") != SCHEMA:
            got = row.get("schema") if isinstance(row, dict) else type(row).__name__
            problems.append(f"line {number}: expected a row of schema {SCHEMA}, got {got!r}")
            continue
        rows.append(row)
    if problems:
        raise ValueError("\n".join(problems))
    return rows


def by_case(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows that were measured together: by run and case."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["run"], row["case"]["name"]), []).append(row)
    return found


def verify(rows: Sequence[Row]) -> list[str]:
    """Every derived number that does not follow from the raw samples."""
    problems = []
    for (run, case), group in by_case(rows).items():
        anew = with_derived([{key: value for key, value in row.items() if key != "derived"} for row in group])
        for row, again in zip(group, anew, strict=True):
            problems += _unequal(f"{run} {case} {row['system']}", row.get("derived"), again["derived"])
    return problems


def _unequal(where: str, have: Any, want: Any) -> list[str]:
    if isinstance(have, dict) and isinstance(want, dict):
        problems = [f"{where}: {name}: missing or unexpected" for name in sorted(set(have) ^ set(want))]
        for name in sorted(set(have) & set(want)):
            problems += _unequal(f"{where}: {name}", have[name], want[name])
        return problems
    if isinstance(have, float) and isinstance(want, float):
        close = abs(have - want) <= 1e-9 * max(abs(have), abs(want))
        return [] if close else [f"{where}: expected {want!r}, got {have!r}"]
    return [] if have == want else [f"{where}: expected {want!r}, got {have!r}"]


def compare(before: Sequence[Row], after: Sequence[Row]) -> list[dict[str, Any]]:
    """Two runs, by case and system: each one's ratio to the reference of its own run, so that the machine's speed drops
    out, and whether the second is slower beyond both intervals and the band."""
    found = []
    mine, theirs = ({(r["case"]["name"], r["case"]["quick"], r["system"]): r for r in rows} for rows in (before, after))
    for key in mine:
        one, other = mine[key]["derived"], theirs.get(key, {}).get("derived")
        clock = "cpu_ratio"
        if one is None or other is None or clock not in one or clock not in other:
            continue
        a, b = one[clock], other[clock]
        change = b["value"] / a["value"]
        apart = a["high"] < b["low"] or b["high"] < a["low"]
        said = "same"
        if apart and abs(np.log(change)) > np.log(1 + figures.BAND):
            said = "slower" if change > 1 else "faster"
        found.append(
            {"case": key[0], "system": key[2], "before": a["value"], "after": b["value"], "change": change}
            | {"verdict": said}
        )
    return found
