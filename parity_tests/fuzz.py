"""Random configurations by the thousand: ``python -m parity_tests.fuzz --cases 1000 --out FILE``.

Each is judged in float64 (parameters, forward, gradients) like any other subject, or on the rungs that ``--rungs``
names, where a right model must not be called wrong: a rung that cannot be climbed is written down as well. One line of
JSON is written for each as it is done; what FILE already holds is not judged again, so a run can be stopped and taken
up at any time.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress

from parity_tests.quick_programs import XLA_FLAGS

Todo, Found = TypeVar("Todo"), TypeVar("Found")

RUNGS = ("parameters", "forward", "gradients")
LOW = {"precision", "rounding", "optimizer", "accumulation"}


def subject_of(drawn: Any, name: str) -> Any:
    """The judge's case of a drawn configuration, with telling weights."""
    import numpy as np

    from parity_tests.strategies import inputs_of
    from twinformer.parity.case import make_case, telling_weights

    inputs = {key: value for key, value in inputs_of(drawn).items() if value is not None}
    if drawn.dropout_seed is not None:
        inputs["rng"] = np.array([drawn.dropout_seed & 0xFFFFFFFF, drawn.dropout_seed >> 32], np.int64)
    return make_case(name, drawn.config, telling_weights(drawn.config, drawn.seed), inputs, drawn.seed)


def judged(asked: tuple[int, int, tuple[str, ...]]) -> dict[str, Any]:
    """One line: the verdict, the worst figure of each rung, and what was drawn where it is not agreement."""
    import gc

    import jax

    from parity_tests.strategies import seeded_cases
    from twinformer.parity import judge

    number, seed, rungs = asked
    drawn = seeded_cases(1, seed=seed * 1_000_000 + number)[0]
    try:
        report = judge(subject_of(drawn, f"{seed}/{number}"), rungs=rungs)
    except Exception as error:  # it is what is looked for
        problem = f"{type(error).__name__}: {error}"
        config = dataclasses.asdict(drawn.config)
        return {"case": f"{seed}/{number}", "verdict": "crash", "problems": [problem], "config": config}
    line: dict[str, Any] = {"case": f"{seed}/{number}", "verdict": report.verdict, "seconds": round(report.seconds, 2)}
    for name, rung in report.rungs.items():
        worst = rung.worst
        line[name] = None if worst is None else {"relative": getattr(worst, "relative", None), "where": worst.name}
    if report.verdict != "agree":
        line["rungs"] = {name: rung.verdict for name, rung in report.rungs.items() if rung.verdict == "differ"}
        line["problems"] = [text for rung in report.rungs.values() for text in rung.problems][:8]
        line["config"] = dataclasses.asdict(drawn.config)
        line["padding"] = drawn.padding
    if number % 25 == 24:  # compiled programs are kept for the life of the process otherwise
        jax.clear_caches()
        gc.collect()
    return line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rungs", default=",".join(RUNGS), help="separated by commas; default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON Lines, continued where it ends")
    options = parser.parse_args()
    if LOW & set(options.rungs.split(",")):  # programs made with little care round more than those that users have
        os.environ.setdefault("XLA_FLAGS", "")
    lines = read_lines(options.out)
    done = {line["case"] for line in lines}
    rungs = tuple(options.rungs.split(","))
    todo = [(number, options.seed, rungs) for number in range(options.cases) if f"{options.seed}/{number}" not in done]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    with options.out.open("a", encoding="utf-8") as out, Progress(console=console) as progress:
        task = progress.add_task("judged", total=options.cases, completed=options.cases - len(todo))
        try:
            for line in run_all(judged, todo, options.jobs):
                out.write(json.dumps(line) + "\n")
                out.flush()
                lines.append(line)
                progress.advance(task)
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on from here")
    return summarize(lines)


def summarize(lines: list[dict[str, Any]]) -> int:
    """Print what was found; 0 only if no case differs. Where rounding alone explains a difference, that is said."""
    verdicts = collections.Counter(line["verdict"] for line in lines)
    console = Console()
    console.print(f"{len(lines)} configurations: " + ", ".join(f"{n} {verdict}" for verdict, n in verdicts.items()))
    for name in RUNGS[1:]:
        judged_there = [line for line in lines if line.get(name)]
        if judged_there:
            worst = max(judged_there, key=lambda line: line[name]["relative"] or 0.0)
            console.print(f"{name}: largest {worst[name]['relative']:.1e} ({worst['case']}, {worst[name]['where']})")
    for line in lines:
        if line["verdict"] != "agree":
            style = "yellow" if line["verdict"] == "cannot tell" else "red"
            console.print(f"{line['case']}: {line['verdict']}: {line['problems'][0]}", style=style)
    return 0 if verdicts["agree"] and not verdicts["differ"] and not verdicts["crash"] else 1


def run_all(judge: Callable[[Todo], Found], todo: list[Todo], jobs: int) -> Iterator[Found]:
    """What ``judge`` finds of each, in worker processes, as they are done."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, initializer=_prepare, maxtasksperchild=100) as pool:
        yield from pool.imap_unordered(judge, todo)


def _prepare() -> None:
    os.environ["JAX_ENABLE_X64"] = "1"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", XLA_FLAGS)
    import torch

    torch.set_num_threads(1)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines that are there; a last one that was cut off is dropped from the file."""
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, encoding="utf-8")
    return [json.loads(row) for row in whole.splitlines()]


if __name__ == "__main__":
    sys.exit(main())
