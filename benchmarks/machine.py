"""What the machine is, and whether somebody else was using it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "jax", "jaxlib", "flax", "optax", "numpy", "transformers", "x-transformers", "keras", "keras-hub")
#: others may use this share of the cores while something is timed
BUSY = 0.05
_TICKS = os.sysconf("SC_CLK_TCK")


def environment() -> dict[str, Any]:
    """Everything that a result depends on besides the code: kept with every result."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": _git(),
        "settings": {name: os.environ.get(name) for name in ("XLA_FLAGS", "GLIBC_TUNABLES", "OMP_NUM_THREADS")},
    }


def fingerprint(found: dict[str, Any]) -> str:
    """What must be the same for times to be compared at all."""
    return f"{found['cpu']}, {found['cores']} cores"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


@dataclass(frozen=True)
class Load:
    """CPU seconds that all processes had used at a moment, and those of some."""

    at: float
    all: float
    own: float


def load(pids: list[int]) -> Load:
    """The machine's CPU time so far, and that of these processes."""
    fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, irq, soft, steal = (int(x) for x in fields[:8])
    own = sum(_used(pid) for pid in [os.getpid(), *pids])
    return Load(time.monotonic(), (user + nice + system + irq + soft + steal) / _TICKS, own)


def _used(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def others_share(before: Load, after: Load) -> float:
    """The share of the cores that somebody else used between two moments."""
    span = max(after.at - before.at, 1e-9) * len(os.sched_getaffinity(0))
    return max(0.0, (after.all - before.all - (after.own - before.own)) / span)
