"""How a case is measured: a process for each system, a gate, then rounds in which every system is visited once.

Nothing is timed before a system's outputs agree with the float64 truth. Visits of a round follow each other in random
order on the same cores. The first system of a case is run a second time under another name (the A/A run): how far
that differs from 1 is the noise floor. While a visit lasts, the CPU time that others use is watched.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.cases import Arrays, Case
from benchmarks.systems import System
from twinformer.initializers import stream
from twinformer.parameters import model_parameters

ROOT = Path(__file__).resolve().parent.parent
AGAIN = " (again)"
TRUTH = "torch_impl"


@dataclass
class Visited:
    """Everything that one system gave on one case."""

    name: str
    system: System
    errors: dict[str, float] = field(default_factory=dict)
    problem: str | None = None
    start: dict[str, float] = field(default_factory=dict)
    rss: int = 0
    visits: list[list[dict[str, float]]] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)


class Worker:
    """A child process that runs one system."""

    def __init__(
        self, case: Case, visited: Visited, place: Path, *, quick: bool, threads: int, slower: float = 0.0
    ) -> None:
        self.visited = visited
        self.outputs = place / f"{visited.name.replace(' ', '_')}.npz"
        self._log = (place / f"{self.outputs.stem}.log").open("w")
        system = visited.system
        environment = dict(os.environ) | dict(system.settings)
        environment |= {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "NPROC": str(threads),
            "JAX_PLATFORMS": environment.get("JAX_PLATFORMS", "cpu"),
            "TWINFORMER_BENCH_FRAMEWORK": system.framework,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH")))),
            "HF_HUB_OFFLINE": "1",
        }
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.worker", case.name, system.name),
                *("--threads", str(threads), "--weights", str(place / "weights.npz"), "--outputs", str(self.outputs)),
                *(["--quick"] if quick else []),
                *("--slower", str(slower)),
            ],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def hear(self) -> dict[str, Any]:
        """The next answer; where the process ended instead, that it did."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            return {"failed": f"the process ended with {self.process.wait()}; see {self.outputs.stem}.log"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, samples: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"samples": samples}) + "\n")
        self.process.stdin.flush()
        return self.hear()

    def end(self) -> None:
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._log.close()


def weights_of(case: Case) -> Arrays:
    """Float32 weights of a case, the same for all systems: moderate, so that float32 says something."""
    found: Arrays = {}
    for path, parameter in model_parameters(case.config).items():
        drawn = stream(1, path).standard_normal(parameter.shape)
        scale, shift = {"norm": (0.1, 1.0), "bias": (0.02, 0.0), "embedding": (0.5, 0.0), "linear": (0.0, 0.0)}[
            parameter.kind
        ]
        if parameter.kind == "linear":
            scale = parameter.shape[1] ** -0.5
        found[path] = (shift + scale * drawn).astype(np.float32)
    return found


def truth_of(case: Case, weights: Arrays) -> Arrays:
    """The outputs in float64, by the PyTorch twin (that both twins agree there is what the judge shows)."""
    import torch

    from benchmarks.systems import torch_twin

    if case.kind == "micro":
        torch.set_default_dtype(torch.float64)
        try:
            return torch_twin.Micro(case, wide=True).outputs()
        finally:
            torch.set_default_dtype(torch.float32)
    wide = _wide(case)
    running = torch_twin.make(wide, {path: w.astype(np.float64) for path, w in weights.items()}, "eager")
    found: Arrays = running.outputs()
    return found


def _wide(case: Case) -> Case:
    import dataclasses

    return dataclasses.replace(case, config=case.config.with_dtype("float64"))


def errors_of(found: Arrays, truth: Arrays) -> dict[str, float]:
    """The largest error of each output, relative to its largest magnitude; tokens: the share that differs."""
    errors = {}
    for name, wanted in truth.items():
        got = found.get(name)
        if got is None or got.shape != wanted.shape or not np.isfinite(got).all():
            errors[name] = float("inf")
        elif name == "tokens":
            errors[name] = float((got != wanted).mean())
        else:
            errors[name] = float(np.abs(got - wanted).max() / max(float(np.abs(wanted).max()), 1e-30))
    return errors


def measure(
    case: Case,
    systems: Sequence[System],
    *,
    rounds: int,
    samples: int,
    threads: int,
    quick: bool = False,
    planted: float | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Visited]:
    """All systems on one case. ``planted``: the A/A run is made slower by this share, to see whether it is noticed."""
    with tempfile.TemporaryDirectory(prefix="twinformer-bench-") as name:
        place = Path(name)
        weights = {} if case.kind == "micro" else weights_of(case)
        np.savez(place / "weights.npz", **weights)  # type: ignore[arg-type]
        progress("the float64 truth")
        truth = truth_of(case, weights)
        found = [Visited(system.name, system) for system in systems]
        present = [one for one in found if not one.system.absent()]
        if present:
            found.append(Visited(present[0].name + AGAIN, present[0].system))
        workers = _start(case, found, truth, place, quick, threads, planted, progress)
        try:
            for turn in _turns(workers, rounds, seed):
                progress(f"round {turn[0] + 1} of {rounds}: {turn[1].visited.name}")
                _visit(turn[1], workers, samples)
        finally:
            for worker in workers:
                worker.end()
    return found


def _start(
    case: Case,
    found: list[Visited],
    truth: Arrays,
    place: Path,
    quick: bool,
    threads: int,
    planted: float | None,
    progress: Callable[[str], None],
) -> list[Worker]:
    """One process after the other, through the gate: those that do not agree, or do not run, are not timed."""
    workers = []
    for visited in found:
        absent = visited.system.absent()
        if absent:
            visited.problem = f"absent: {', '.join(absent)} not installed"
            continue
        progress(f"starting {visited.name}")
        slower = planted or 0.0 if visited.name.endswith(AGAIN) else 0.0
        worker = Worker(case, visited, place, quick=quick, threads=threads, slower=slower)
        told = worker.hear()
        if "failed" in told:
            visited.problem = f"did not run: {told['failed']}"
            worker.end()
            continue
        visited.start = {name: told[name] for name in ("made", "outputs", "first_run")}
        with np.load(worker.outputs) as outputs:
            visited.errors = errors_of(dict(outputs), truth)
        wrong = {name: error for name, error in visited.errors.items() if not error <= case.bound}
        if wrong:
            shown = ", ".join(f"{name} {error:.2g}" for name, error in wrong.items())
            visited.problem = f"does not agree with the float64 truth: {shown}, expected at most {case.bound:g}"
            worker.end()
            continue
        warm = worker.hear()
        if "failed" in warm:
            visited.problem = f"did not run: {warm['failed']}"
            worker.end()
            continue
        workers.append(worker)
    return workers


def _turns(workers: list[Worker], rounds: int, seed: int) -> Iterator[tuple[int, Worker]]:
    order = random.Random(seed)
    for number in range(rounds):
        for worker in order.sample(workers, len(workers)):
            yield number, worker


def _visit(worker: Worker, workers: list[Worker], samples: int) -> None:
    pids = [one.process.pid for one in workers]
    before = machine.load(pids)
    answer = worker.ask(samples)
    after = machine.load(pids)
    if "failed" in answer:
        worker.visited.problem = answer["failed"]
        return
    worker.visited.visits.append(answer["samples"])
    worker.visited.rss = answer["rss"]
    worker.visited.busy.append(machine.others_share(before, after))
    time.sleep(0.01)
