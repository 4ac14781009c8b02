"""Memory of a training step alone: ``python -m benchmarks.step_memory [--case NAME] [--out FILE]``.

What ``bench run`` notes as a worker's peak holds what the gate asked for too: logits, and a second set of weights. Here
each system is a process that does nothing but a few steps. Beside its peak stands, for JAX, what XLA says that the
compiled step needs (arguments and temporary buffers). The twins are also measured with rematerialisation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import cases
from benchmarks.protocol import weights_of
from benchmarks.systems import by_name

SYSTEMS = (
    *("torch_impl", "torch_impl remat", "torch.nn"),
    *("flax_impl", "flax_impl remat", "flax_impl scan", "flax_impl scan remat", "linen"),
)
TRAINING = tuple(case.name for case in cases.FULL if case.kind == "train")
STEPS = 3


def measured(system: str, name: str, batch: int | None, length: int | None) -> dict[str, Any]:
    """In this process: the peak after the steps, and XLA's own figures."""
    case = next(case for case in cases.FULL if case.name == name)
    case = dataclasses.replace(case, B=batch or case.B, T=length or case.T)
    found: dict[str, Any] = {"system": system, "case": name, "batch": case.B, "length": case.T}
    system, *choices = system.split()
    config = case.config.replace(
        remat="remat" in choices,
        scan_layers="scan" in choices,
        context_length=max(case.T, case.config.context_length),
    )
    case = dataclasses.replace(case, config=config)
    running = by_name(system).make(case, weights_of(case))
    program = _program(system, running)
    if program is not None:
        analysis = program.memory_analysis()
        found["arguments"] = analysis.argument_size_in_bytes
        found["temporary"] = analysis.temp_size_in_bytes
    for _ in range(STEPS):
        running.run()
    # (what getrusage calls the most memory is inherited from the parent)
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return found | {"peak": 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))}


def _program(system: str, running: Any) -> Any:
    """The compiled step of a system in JAX."""
    if system == "linen":
        return running._step.lower(running._state, running._tokens, running._targets).compile()
    if system == "flax_impl":
        from flax_impl.training import _arrays

        trainer, state = running._trainer, running._state
        leaves = trainer._changing(state), trainer._frozen(state)
        rate = np.asarray(trainer.training.schedule.learning_rate(0), np.float32)
        return trainer._one_step.lower(*leaves, np.int32(0), rate, _arrays(running._batch)).compile()
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=TRAINING, default="decoder-train")
    parser.add_argument("--batch", type=int, help="rows, if not the case's")
    parser.add_argument("--length", type=int, help="tokens of a row, if not the case's")
    parser.add_argument("--system", choices=SYSTEMS, help="measure this one, in this process")
    parser.add_argument("--out", type=Path, metavar="FILE", help="add a line of JSON for each system")
    options = parser.parse_args()
    if options.system:
        sys.stdout.write(json.dumps(measured(options.system, options.case, options.batch, options.length)) + "\n")
        return
    for system in SYSTEMS:
        command = [sys.executable, "-m", "benchmarks.step_memory", "--case", options.case, "--system", system]
        for name in ("batch", "length"):
            if (value := getattr(options, name)) is not None:
                command += [f"--{name}", str(value)]
        line = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
