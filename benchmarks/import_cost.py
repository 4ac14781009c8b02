"""What importing a twin costs beyond importing its framework, in CPU time.

Three statements are timed, each in fresh interpreters: nothing at all, the framework alone, and the twin. Runs are
interleaved (one round runs every statement once, in a shuffled order), so that a slow minute of the machine falls on
all of them; each figure is the median over the rounds of user + system time of the child process, less that of an empty
interpreter. One round is run first and thrown away: it fills the file cache and the byte-code cache.

    python benchmarks/import_cost.py [--rounds 9] [--json]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STATEMENTS = {
    "empty": "pass",
    "torch": "import torch",
    "torch_impl": "import torch_impl",
    "jax+flax": "import jax, jax.numpy, flax, flax.nnx",
    "flax_impl": "import flax_impl",
}
PAIRS = {"torch_impl": "torch", "flax_impl": "jax+flax"}
LIMIT = 0.10  # a twin may cost this share of its framework's import on top of it

# the child reports its own CPU time, its start included
REPORT = "; import resource as r; u = r.getrusage(r.RUSAGE_SELF); print(u.ru_utime + u.ru_stime)"


def cpu_seconds(statement: str) -> float:
    """User + system time of one fresh interpreter that runs ``statement``."""
    done = subprocess.run(
        [sys.executable, "-c", statement + REPORT], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return float(done.stdout.strip().splitlines()[-1])


def measure(rounds: int, *, seed: int = 0) -> dict[str, list[float]]:
    """CPU seconds per statement, one entry for each round."""
    order = random.Random(seed)
    for statement in STATEMENTS.values():
        cpu_seconds(statement)
    found: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(rounds):
        for name in order.sample(list(STATEMENTS), len(STATEMENTS)):
            found[name].append(cpu_seconds(STATEMENTS[name]))
    return found


def summarise(found: dict[str, list[float]]) -> list[dict[str, object]]:
    """One row for each twin: medians above an empty interpreter, and the share that the twin adds.

    The added time is the median of the differences within a round, not the difference of the medians.
    """
    rows: list[dict[str, object]] = []
    for twin, framework in PAIRS.items():
        base = statistics.median(f - e for f, e in zip(found[framework], found["empty"], strict=True))
        added = [t - f for t, f in zip(found[twin], found[framework], strict=True)]
        low, middle, high = min(added), statistics.median(added), max(added)
        rows.append(
            {
                "twin": twin,
                "framework": framework,
                "framework_seconds": round(base, 4),
                "added_seconds": round(middle, 4),
                "added_seconds_lowest": round(low, 4),
                "added_seconds_highest": round(high, 4),
                "added_share": round(middle / base, 4),
                "limit": LIMIT,
                "holds": middle / base < LIMIT,
            }
        )
    return rows


def table(rows: Sequence[dict[str, object]], rounds: int) -> str:
    lines = [
        f"CPU seconds (user + system) above an empty interpreter, median of {rounds} interleaved rounds",
        "",
        "| twin | framework | framework s | twin adds s (lowest to highest) | share | limit | holds |",
        "|---|---|---|---|---|---|---|",
    ]
    line = (
        "| {twin} | {framework} | {framework_seconds:.3f} | {added_seconds:.3f} ({added_seconds_lowest:.3f} to "
        "{added_seconds_highest:.3f}) | {added_share:.1%} | {limit:.0%} | {verdict} |"
    )
    lines += [line.format(**row, verdict="yes" if row["holds"] else "NO") for row in rows]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds that count (default 9)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(arguments)
    found = measure(options.rounds)
    rows = summarise(found)
    if options.json:
        sys.stdout.write(json.dumps({"rounds": options.rounds, "rows": rows, "cpu_seconds": found}, indent=2) + "\n")
    else:
        sys.stdout.write(table(rows, options.rounds) + "\n")
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
