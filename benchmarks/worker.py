"""One system on one case in a process of its own: ``python -m benchmarks.worker CASE SYSTEM``.

It speaks JSON, a line each way. First it tells what its outputs were (in a file) and how its start went; then, for each
``{"samples": n}``, it runs and answers with wall and CPU time, page faults and how many units each sample held.
Whatever a library prints goes to standard error.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

LEAST = 0.05  # seconds that a sample lasts at least
STEADY, MOST, SECONDS = 0.05, 12, 30.0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("case")
    parser.add_argument("system")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--outputs", type=Path, required=True)
    parser.add_argument(
        "--slower", type=float, default=0.0, help="make every unit longer by this share: a planted fault"
    )
    options = parser.parse_args()
    # before any framework is imported: both size their pools by the cores that they see
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    answers, sys.stdout = sys.stdout, sys.stderr

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    try:
        running, told = start(options)
        answer(**told)
    except Exception as error:  # a peer that does not run is a result too; the orchestrator says so
        answer(failed=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
        return 1
    unit = warm_up(running)
    answer(warm=unit)
    gc.collect()
    gc.freeze()
    inner = max(1, round(LEAST / unit))
    for line in sys.stdin:
        asked = json.loads(line)
        answer(samples=[sample(running, inner, options.slower) for _ in range(asked["samples"])], rss=peak())
    return 0


def start(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The system ready to run, and what its start cost: import, making, the first call (compilation in it)."""
    begun = time.perf_counter()
    if os.environ.get("TWINFORMER_BENCH_FRAMEWORK") == "torch":
        import torch

        torch.set_num_threads(options.threads)
    dispatch()
    from benchmarks import cases
    from benchmarks.systems import by_name

    case = {one.name: one for one in (cases.QUICK if options.quick else cases.FULL)}[options.case]
    with np.load(options.weights) as file:
        weights = dict(file)
    system = by_name(options.system)
    running = system.make(case, weights)
    made = time.perf_counter()
    outputs = running.outputs()
    np.savez(options.outputs, **outputs)  # type: ignore[arg-type]
    judged = time.perf_counter()
    running.run()
    first = time.perf_counter()
    return running, {
        "made": made - begun,
        "outputs": judged - made,
        "first_run": first - judged,
        "rss": peak(),
    }


def dispatch() -> None:
    """Programs of JAX in the thread that calls them, where the system's settings say so."""
    if os.environ.get("TWINFORMER_BENCH_DISPATCH") == "synchronous":
        import jax

        jax.config.update("jax_cpu_enable_async_dispatch", False)  # type: ignore[no-untyped-call]


def warm_up(running: Any) -> float:
    """Run until three units in a row are within 5 % of each other; gives the seconds of one."""
    units: list[float] = []
    begun = time.perf_counter()
    while len(units) < MOST and time.perf_counter() - begun < SECONDS:
        before = time.perf_counter()
        running.run()
        units.append(time.perf_counter() - before)
        last = units[-3:]
        if len(last) == 3 and max(last) <= (1 + STEADY) * min(last):
            break
    return float(np.median(units[-3:]))


def sample(running: Any, inner: int, slower: float) -> dict[str, float]:
    """``inner`` units, per unit: wall and CPU seconds, page faults."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(inner):
        running.run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if slower:
        until = time.perf_counter() + slower * wall
        while time.perf_counter() < until:
            pass
        wall, cpu = wall * (1 + slower), cpu * (1 + slower)
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "wall": wall / inner,
        "cpu": cpu / inner,
        "faults": (after.ru_minflt - usage.ru_minflt) / inner,
        "system": (after.ru_stime - usage.ru_stime) / inner,
    }


def peak() -> int:
    """The most memory that the process has held, in bytes."""
    # (what getrusage calls so is inherited from the parent)
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("expected VmHWM in /proc/self/status, got none")


if __name__ == "__main__":
    sys.exit(main())
