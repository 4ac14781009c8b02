"""Rung 10: spread over several devices, a model computes what it computes on one.

Each twin is held against itself, as on rung 4: output and every gradient in float64. Flax runs on four devices of the
CPU under ``jax.jit`` with sharded parameters, rows and dropout under one key (the elements that are dropped must not
depend on where they lie); PyTorch in two processes under ``fully_shard``, half of the rows each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from twinformer.parity.case import Case
from twinformer.parity.compare import Comparison
from twinformer.parity.evidence import Evidence
from twinformer.parity.rungs.itself import against_itself
from twinformer.parity.rungs.stochastic import with_dropout
from twinformer.parity.twins import Run, in_pytorch_layout
from twinformer.parity.verdict import Rung, rung_of
from twinformer.sharded import RANKS, Arrays, parts

_FRAMEWORKS = {"torch_impl": "torch", "flax_impl": "flax"}
# far more than it takes; a process that waits for another that has died would wait for ever
_SECONDS = 600.0


def check(evidence: Evidence, *, prepare: str = "") -> Rung:
    """Compare each twin's sharded run with its usual one. ``prepare``: see ``twinformer/sharded.py``."""
    comparisons: list[Comparison] = []
    problems: list[str] = []
    notes: list[str] = []
    failed: list[str] = []
    for twin in evidence.twins:
        framework = _FRAMEWORKS[twin.name]
        case = evidence.case.in_dtype("float64")
        if framework == "flax":
            case = with_dropout(case)
            usual = twin.run(case, gradients=True, detail="blocks")
        else:
            usual = evidence.runs("float64", gradients=True)[evidence.twins.index(twin)]
        evidence.progress(f"{twin.name}: on several devices")
        try:
            run, spread = sharded(framework, case, prepare)
        except RuntimeError as error:
            failed.append(f"{twin.name}: {error}")
            continue
        notes.append(f"{twin.name}: {spread}")
        found, wrong = against_itself(f"{twin.name}, sharded", run, usual, ("sharded", "on one device"))
        comparisons, problems = comparisons + found, problems + wrong
    rung = rung_of(f"{len(evidence.twins) - len(failed)} twins, {len(comparisons)} tensors", comparisons, problems)
    rung.notes += notes
    if failed and rung.verdict == "differ":
        rung.notes += failed
    elif failed:
        rung.verdict, rung.problems = "cannot tell", failed
    return rung


def sharded(framework: str, case: Case, prepare: str = "") -> tuple[Run, str]:
    """The run of a float64 case on several devices, and how it was spread.

    Raises RuntimeError with the last line that a process said, where one failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        (place / "config.json").write_text(json.dumps(case.config.to_dict()))
        given: Arrays = {f"tensor/{path}": tensor for path, tensor in case.tensors.items()}
        given |= {f"input/{name}": np.asarray(value) for name, value in case.inputs.items()}
        given["cotangent"] = case.cotangent
        save_file({name: np.ascontiguousarray(value) for name, value in given.items()}, place / "case.safetensors")
        ranks = range(RANKS[framework])
        command = [sys.executable, "-m", "twinformer.sharded", framework, scratch]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
        logs = [place / f"{framework}-{rank}.log" for rank in ranks]
        processes = []
        for rank, log in zip(ranks, logs, strict=True):
            extra = [str(rank), *([prepare] if prepare else [])]
            with log.open("wb") as said:
                processes.append(subprocess.Popen([*command, *extra], stdout=said, stderr=said, env=environment))
        try:
            codes = [process.wait(_SECONDS) for process in processes]
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"expected {framework} on several devices within {_SECONDS:.0f} s") from None
        finally:
            for process in processes:
                process.kill()
                process.wait()
        for code, log in zip(codes, logs, strict=True):
            if code:
                lines = log.read_text(errors="replace").strip().splitlines() or [f"ended with {code}"]
                raise RuntimeError(lines[-1])
        return _joined(framework, [load_file(place / f"{framework}-{rank}.safetensors") for rank in ranks])


def _joined(framework: str, found: list[Arrays]) -> tuple[Run, str]:
    rows = sorted(found, key=lambda one: int(one["first"][0]))
    leaves = parts(found[0], "gradient")
    gradients = in_pytorch_layout(leaves) if framework == "flax" else leaves
    run = Run(np.concatenate([one["output"] for one in rows]), {}, gradients)
    count = int(found[0]["spread"][0])
    if framework == "flax":
        return run, f"4 devices, {count} parameters cut"
    return run, f"2 processes, {count} blocks and the model sharded"
