"""Rung 9: a model saved by one twin and loaded by the other is the same bit for bit; in another dtype, rounded once."""

from __future__ import annotations

import tempfile
from pathlib import Path

from twinformer.checkpoint import read_model
from twinformer.config import DType, ModelConfig
from twinformer.parity.case import Arrays, Case, with_all_digits
from twinformer.parity.compare import Comparison, compare, set_problems
from twinformer.parity.evidence import Evidence
from twinformer.parity.verdict import Rung, rung_of

DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "float64")


def check(evidence: Evidence) -> Rung:
    """Save each twin's model in each dtype, load it with both, and compare configuration, dtypes and every bit.

    That of float32 each loads once more as bfloat16.
    """
    comparisons: list[Comparison] = []
    problems: list[str] = []
    ways = 0
    for dtype in DTYPES:
        case = evidence.case.in_dtype(dtype)
        if dtype == "float64":
            case = with_all_digits(case)
        for saver in evidence.twins:
            evidence.progress(f"{saver.name}: saved and loaded in {dtype}")
            with tempfile.TemporaryDirectory() as scratch:
                directory = Path(scratch) / "model"
                saver.save(case, directory)
                config, written = read_model(directory)
                if config != case.config:
                    problems.append(f"{dtype}: the configuration that {saver.name} wrote is another one")
                problems += [
                    f"{dtype}, {saver.name}: {path}: expected {case.tensors[path].dtype} on disk, got {leaf.dtype}"
                    for path, leaf in written.items()
                    if path in case.tensors and leaf.dtype != case.tensors[path].dtype
                ]
                for loader in evidence.twins:
                    label = f"{dtype}, {saver.name} to {loader.name}"
                    found = _loaded(label, loader.loaded(directory), case)
                    comparisons, problems = comparisons + found[0], problems + found[1]
                    ways += 1
                if dtype == "float32":
                    other = case.in_dtype("bfloat16")
                    found = _loaded(f"{saver.name}, as bfloat16", saver.loaded(directory, "bfloat16"), other)
                    comparisons, problems = comparisons + found[0], problems + found[1]
                    ways += 1
    rung = rung_of(f"{ways} ways, {len(comparisons)} tensors", comparisons, problems)
    told = [problem.partition(": ")[0] for problem in problems]
    told += [one.name.rpartition(" (")[2].rstrip(")") for one in comparisons if not one.agrees]
    rung.culprits = list(dict.fromkeys(told))  # which ways
    return rung


def _loaded(label: str, model: tuple[ModelConfig, Arrays], case: Case) -> tuple[list[Comparison], list[str]]:
    """What was loaded against the case: the same configuration, leaves, dtypes and bits."""
    config, leaves = model
    problems = [] if config == case.config else [f"{label}: the model's configuration is another one"]
    problems += [
        f"{label}: {problem}"
        for problem in set_problems("parameter", leaves, case.tensors, ("the loaded model", "the case"))
    ]
    shared = [path for path in case.tensors if path in leaves]
    problems += [
        f"{label}: {path}: expected {case.tensors[path].dtype}, got {leaves[path].dtype} in the model"
        for path in shared
        if leaves[path].dtype != case.tensors[path].dtype
    ]
    return [compare(f"{path} ({label})", leaves[path], case.tensors[path], bound=0.0) for path in shared], problems
