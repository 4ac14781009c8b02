"""Rung 9: a model saved by one twin and loaded by the other is the same, bit for bit."""

from __future__ import annotations

import tempfile
from pathlib import Path

from twinformer.checkpoint import read_model
from twinformer.config import DType
from twinformer.parity.case import with_all_digits
from twinformer.parity.compare import Comparison, compare, set_problems
from twinformer.parity.evidence import Evidence
from twinformer.parity.verdict import Rung, rung_of

DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "float64")


def check(evidence: Evidence) -> Rung:
    """Save each twin's model in each dtype, load it with both, and compare configuration, dtypes and every bit."""
    comparisons: list[Comparison] = []
    problems: list[str] = []
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
                for loader in evidence.twins:
                    leaves = loader.loaded(directory)
                    label = f"{dtype}, {saver.name} to {loader.name}"
                    problems += [
                        f"{label}: {problem}"
                        for problem in set_problems("parameter", leaves, case.tensors, ("the loaded model", "the case"))
                    ]
                    for path, tensor in case.tensors.items():
                        if path not in leaves:
                            continue
                        if not leaves[path].dtype == written[path].dtype == tensor.dtype:
                            problems.append(
                                f"{label}: {path}: expected {tensor.dtype}, got {written[path].dtype} on disk and "
                                f"{leaves[path].dtype} in the model"
                            )
                        comparisons.append(compare(f"{path} ({label})", leaves[path], tensor, bound=0.0))
    return rung_of(f"{2 * 2 * len(DTYPES)} ways, {len(comparisons)} tensors", comparisons, problems)
