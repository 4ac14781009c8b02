"""The fault catalogue run in worker processes: one thread each, a case and its faults at a time."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import queue
import signal
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from twinformer.parity.haste import LITTLE_CARE
from twinformer.parity.mutation import Baseline, Bench, Catalogue, Outcome, Planted

ROOT = Path(__file__).resolve().parents[2]
_CATALOGUE = "parity_tests.mutants"
# how long one message may take before it is asked whether the workers still live
_PATIENCE = 2.0

# nearly all the time goes into compiling programs that run once: the costly optimisations of machine code are off
_XLA_FLAGS = (
    "--xla_cpu_multi_thread_eigen=false",
    *(f"--{name}={str(value).lower()}" for name, value in LITTLE_CARE.items()),
)

Message = Baseline | Outcome | None
Task = tuple[str, tuple[tuple[str, str], ...]]


def find_catalogue() -> Catalogue | None:
    """The catalogue of this checkout; None where the package was installed without its tests."""
    if not (ROOT / "parity_tests" / "mutants" / "__init__.py").is_file():
        return None
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    catalogue: Catalogue = importlib.import_module(_CATALOGUE).CATALOGUE
    return catalogue


def tasks(chosen: Sequence[Planted]) -> list[Task]:
    """One task for each case: what is planted in it, PyTorch first; the longest tasks first.

    A fault in PyTorch leaves Flax's compiled programs as they are, so that these come cheaply one after the other.
    """
    by_case: dict[str, list[Planted]] = {}
    for planted in chosen:
        by_case.setdefault(planted.case, []).append(planted)
    found = []
    for case, group in by_case.items():
        group.sort(key=lambda planted: planted.twin != "torch_impl")
        found.append((case, tuple((planted.id, planted.twin) for planted in group)))
    return sorted(found, key=lambda task: -sum(twin == "flax_impl" for _, twin in task[1]))


def run(chosen: Sequence[Planted], jobs: int) -> Generator[Baseline | Outcome, None, None]:
    """Baselines and outcomes as they come, in no fixed order. Closing the iterator ends the workers.

    Raises RuntimeError where a worker died, naming the case it was at.
    """
    context = multiprocessing.get_context("spawn")
    todo: Any = context.Queue()
    done: Any = context.Queue()
    waiting = tasks(chosen)
    if not waiting:
        return
    for task in waiting:
        todo.put(task)
    jobs = max(1, min(jobs, len(waiting)))
    for _ in range(jobs):
        todo.put(None)
    with _environment(), tempfile.TemporaryDirectory(prefix="twinformer-") as programs:
        workers = [context.Process(target=_work, args=(todo, done, programs), daemon=True) for _ in range(jobs)]
        for worker in workers:
            worker.start()
        try:
            yield from _messages(done, workers)
        finally:
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.join()


def _messages(done: Any, workers: Sequence[BaseProcess]) -> Iterator[Baseline | Outcome]:
    running = len(workers)
    while running:
        try:
            message: Message = done.get(timeout=_PATIENCE)
        except queue.Empty:
            dead = [worker for worker in workers if worker.exitcode not in (None, 0)]
            if dead:
                raise RuntimeError(f"a worker process ended with exit code {dead[0].exitcode}") from None
            continue
        if message is None:
            running -= 1
        else:
            yield message


@contextmanager
def _environment() -> Iterator[None]:
    """One thread for each worker, and programs compiled quickly: read when the frameworks start, and so set before."""
    wanted = {
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": " ".join([*os.environ.get("XLA_FLAGS", "").split(), *_XLA_FLAGS]),
        "JAX_ENABLE_X64": "1",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _work(todo: Any, done: Any, programs: str) -> None:
    """Take tasks until there are none. ``programs``: where compiled programs are shared, by what they compute."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    import jax
    import torch

    torch.set_num_threads(1)
    for option, value in (
        ("jax_enable_x64", True),
        ("jax_compilation_cache_dir", programs),
        ("jax_persistent_cache_min_compile_time_secs", 0.0),
        ("jax_persistent_cache_min_entry_size_bytes", -1),
    ):
        jax.config.update(option, value)  # type: ignore[no-untyped-call]
    catalogue = find_catalogue()
    assert catalogue is not None
    every = {(planted.id, planted.twin): planted for planted in catalogue.chosen((), None)}
    while (task := todo.get()) is not None:
        climb(task, every, Bench(catalogue.cases), done.put)
    done.put(None)


def climb(task: Task, every: dict[Any, Planted], bench: Bench, tell: Callable[[Baseline | Outcome], None]) -> None:
    """One case under each of its faults, and what it was without them."""
    for name in task[1]:
        tell(bench.try_(every[name]))
    for baseline in bench.baselines.values():
        tell(baseline)
