"""All cases, one after the other: ceilings, measurement, rows. What is done is on disk before the next begins."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cases, machine, protocol, records
from benchmarks.cases import Case
from benchmarks.systems import SYSTEMS, System


def chosen(names: Sequence[str], systems: Sequence[str], *, quick: bool) -> list[tuple[Case, list[System]]]:
    """The cases of these names (all if none) with the systems that take part. Raises ValueError naming unknown ones."""
    table = cases.QUICK if quick else cases.FULL
    problems = [
        f"case: expected one of {', '.join(case.name for case in table)}, got {name!r}"
        for name in names
        if name not in {case.name for case in table}
    ]
    problems += [
        f"system: expected one of {', '.join(system.name for system in SYSTEMS)}, got {name!r}"
        for name in systems
        if name not in {system.name for system in SYSTEMS}
    ]
    if problems:
        raise ValueError("\n".join(problems))
    found = []
    for case in table:
        if names and case.name not in names:
            continue
        taking_part = [one for one in SYSTEMS if case.name in one.cases and (not systems or one.name in systems)]
        if quick:  # compiling PyTorch takes longer than everything else of a quick run together
            taking_part = [one for one in taking_part if one.variant != "compiled" or one.name in systems]
        if taking_part:
            found.append((case, taking_part))
    return found


def run(
    work: Sequence[tuple[Case, list[System]]],
    out: Path,
    *,
    rounds: int,
    samples: int,
    threads: int,
    quick: bool,
    planted: float | None = None,
    progress: Callable[[str], None] = lambda text: None,
    done: Callable[[Case, list[records.Row]], None] = lambda case, rows: None,
) -> list[records.Row]:
    """Rows of all cases, written to ``out`` as they come."""
    environment = machine.environment()
    began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    rows: list[records.Row] = []
    for case, systems in work:
        progress(f"{case.name}: what the machine can do")
        ceiling = None if case.kind in ("micro", "dispatch") else ceiling_of(case, threads, quick)
        visited = protocol.measure(
            case,
            systems,
            rounds=rounds,
            samples=samples,
            threads=threads,
            quick=quick,
            planted=planted,
            progress=lambda text, case=case: progress(f"{case.name}: {text}"),  # type: ignore[misc]
        )
        found = records.rows_of(
            case, visited, run=began, environment=environment, threads=threads, quick=quick, ceiling=ceiling
        )
        records.write(out, found)
        rows += found
        done(case, found)
    return rows


def ceiling_of(case: Case, threads: int, quick: bool) -> dict[str, Any]:
    """``benchmarks.ceilings`` in a process of its own."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.ceilings", case.name, "--threads", str(threads)),
            *(["--quick"] if quick else []),
        ],
        cwd=protocol.ROOT,
        env=dict(os.environ) | {"OMP_NUM_THREADS": str(threads), "NPROC": str(threads), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
