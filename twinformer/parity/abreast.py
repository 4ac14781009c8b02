"""Some rungs of the ladder in a process of their own.

On a small model most of the time is compiling, on a large one much of it copying: each on one core.
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
from twinformer.parity.case import Case
from twinformer.parity.verdict import Rung

#: rungs that use nothing of the others' runs, about half of the time
APART = ("stochastic", "training", "accumulation", "decoding", "sampling", "beams", "persistence", "resumption")
#: of a large model they are the smaller part, and these the larger
_IF_LARGE = ("nonfinite", "rounding", "precision")
# weights of a model whose programs take longer to compile than to run
_SMALL = 2_000_000
# bytes for each weight that the two processes hold between them: runs in float64, and the gradients of every weight
_BYTES_A_WEIGHT = 800

Climb = Callable[[Case, Sequence[str]], dict[str, Rung]]


def is_worth_it(case: Case) -> bool:
    """Whether there are two cores, and memory for two of everything."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores > 1 and (_is_small(case) or _weights(case) * _BYTES_A_WEIGHT < _free_memory())


def apart(case: Case) -> tuple[str, ...]:
    """The rungs to run in the other process, so that both are about equally busy."""
    return APART if _is_small(case) else (*APART, *_IF_LARGE)


def _is_small(case: Case) -> bool:
    return _weights(case) < _SMALL


def _weights(case: Case) -> int:
    return sum(tensor.size for tensor in case.tensors.values())


def _free_memory() -> int:
    """In bytes; 0 where the system does not say."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    return 0


@contextlib.contextmanager
def beside(climb: Climb, case: Case, names: Sequence[str]) -> Iterator[Callable[[], dict[str, Rung]]]:
    """Start ``climb(case, names)`` in another process; what this gives waits for the rungs. Leaving ends the process.

    The other process starts anew, so ``climb`` must be found by its name, and the program that calls this must be safe
    to import. What it raises is raised here: a TwinformerError as it is, all else as RuntimeError.
    """
    if not names:
        yield dict
        return
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    wide = bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]
    process = context.Process(target=_work, args=(theirs, climb, case, tuple(names), wide), daemon=True)
    process.start()
    theirs.close()
    # PyTorch's threads wait by spinning: two processes with one for each core stand in each other's way
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))

    def wait() -> dict[str, Rung]:
        try:
            found = ours.recv()
        except EOFError:
            process.join()
            what = f"the process of the rungs {', '.join(names)}"
            raise RuntimeError(f"{what} ended with exit code {process.exitcode}") from None
        if isinstance(found, TwinformerError):
            raise found
        if isinstance(found, str):
            raise RuntimeError(found)
        rungs: dict[str, Rung] = found
        return rungs

    try:
        yield wait
    finally:
        torch.set_num_threads(threads)
        process.terminate()
        process.join()
        ours.close()


def _work(pipe: Any, climb: Climb, case: Case, names: Sequence[str], wide: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    jax.config.update("jax_enable_x64", wide)  # type: ignore[no-untyped-call]
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    try:
        pipe.send(climb(case, names))
    except TwinformerError as error:
        pipe.send(error)
    except Exception:
        pipe.send(traceback.format_exc())
