"""Some rungs of the ladder in a process of their own.

On a small model most of the time is compiling, on a large one much of it copying: each on one core. Which rungs of a
small model take longest depends on its features, so that both processes take the next one when they are free. Of a
large one each has its own, for the memory that a rung needs is then not needed twice.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import torch

from twinformer.errors import TwinformerError
from twinformer.memory import keep_freed_memory
from twinformer.parity.case import Case
from twinformer.parity.verdict import Rung

#: rungs that use nothing of the others' runs, of a large model about half of the time
APART = (
    *(
        "precision",
        "stochastic",
        "nonfinite",
        "rounding",
        "decoding",
        "training",
        "accumulation",
        "sampling",
        "beams",
        "calls",
    ),
    *("persistence", "resumption", "adapters", "long"),
)
#: of a small model these use nothing that takes long either; in the order in which they are begun, the longest first
_IF_SMALL = ("precision", "stochastic", "nonfinite", "decoding", "calls", "optimizer", "training", "sampling")
# weights of a model whose programs take longer to compile than to run
_SMALL = 2_000_000
# bytes for each weight that the two processes hold between them: runs in float64, and the gradients of every weight
_BYTES_A_WEIGHT = 800

Climb = Callable[[Case, Iterator[str]], dict[str, Rung]]


def is_worth_it(case: Case) -> bool:
    """Whether there are two cores, and memory for two of everything."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores > 1 and (is_small(case) or _weights(case) * _BYTES_A_WEIGHT < _free_memory())


def apart(case: Case) -> tuple[str, ...]:
    """The rungs that may run in the other process, in the order in which they are begun."""
    if not is_small(case):
        return APART
    return (*_IF_SMALL, *(name for name in APART if name not in _IF_SMALL))


def is_small(case: Case) -> bool:
    """Whether its programs take longer to compile than to run."""
    return _weights(case) < _SMALL


def _weights(case: Case) -> int:
    return sum(tensor.size for tensor in case.tensors.values())


def _free_memory() -> int:
    """In bytes; 0 where the system does not say."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    return 0


class Others:
    """The other process: ``take()`` what it has not begun yet, ``wait()`` for what it has found."""

    def __init__(self, pipe: Any, process: Any, names: Sequence[str], begun: Any) -> None:
        self._pipe, self._process, self._names, self._begun = pipe, process, names, begun

    def take(self) -> Iterator[str]:
        """One name after the other, each given to one of the two processes only."""
        return _taken(self._names, self._begun)

    def wait(self) -> dict[str, Rung]:
        """What was found there. What was raised is raised: a TwinformerError as it is, all else as RuntimeError."""
        if self._process is None:
            return {}
        try:
            found = self._pipe.recv()
        except EOFError:
            self._process.join()
            what = f"the process of the rungs {', '.join(self._names)}"
            raise RuntimeError(f"{what} ended with exit code {self._process.exitcode}") from None
        if isinstance(found, TwinformerError):
            raise found
        if isinstance(found, str):
            raise RuntimeError(found)
        rungs: dict[str, Rung] = found
        return rungs


@contextlib.contextmanager
def beside(climb: Climb, case: Case, names: Sequence[str]) -> Iterator[Others]:
    """Start ``climb(case, names)`` in another process, which takes the names one by one. Leaving ends the process.

    The other process starts anew, so ``climb`` must be found by its name, and the program that calls this must be safe
    to import.
    """
    if not names:
        yield Others(None, None, (), None)
        return
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    begun = context.Value("i", 0)
    wide = bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]
    process = context.Process(target=_work, args=(theirs, climb, case, tuple(names), begun, wide), daemon=True)
    process.start()
    theirs.close()
    # PyTorch's threads wait by spinning: two processes with one for each core stand in each other's way
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        yield Others(ours, process, tuple(names), begun)
    finally:
        torch.set_num_threads(threads)
        process.terminate()
        process.join()
        ours.close()


def _taken(names: Sequence[str], begun: Any) -> Iterator[str]:
    while names:
        with begun.get_lock():
            place = begun.value
            begun.value = place + 1
        if place >= len(names):
            return
        yield names[place]


def _work(pipe: Any, climb: Climb, case: Case, names: Sequence[str], begun: Any, wide: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    jax.config.update("jax_enable_x64", wide)  # type: ignore[no-untyped-call]
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    keep_freed_memory()
    try:
        pipe.send(climb(case, _taken(names, begun)))
    except TwinformerError as error:
        pipe.send(error)
    except Exception:
        pipe.send(traceback.format_exc())
