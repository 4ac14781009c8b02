"""A published directory as users open it: what ``from_pretrained`` of each twin makes of it.

The rungs judge models that the judge has filled itself. Here every leaf that the public function holds is compared with
what the file says, bit for bit, and the model is run once, which shows what is no leaf: tables that are computed, a
part that was left on another device.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

import flax_impl
import torch_impl
from twinformer.parity.case import Case
from twinformer.parity.compare import Comparison, FloatArray, compare, set_problems, widened
from twinformer.parity.evidence import Evidence
from twinformer.parity.report import Report
from twinformer.parity.rungs.forward import BOUND
from twinformer.parity.verdict import rung_of

NAME = "from_pretrained"


def check_opened(directory: Path, evidence: Evidence, report: Report) -> None:
    """Add to the report's witnesses what both twins' ``from_pretrained`` give, on the first row of the case."""
    began = time.perf_counter()
    case = evidence.case
    row = {name: value[:1] for name, value in case.inputs.items()}
    runs = evidence.runs("float64")
    found: list[Comparison] = []
    problems: list[str] = []
    notes: list[str] = []
    for twin, usual in zip(evidence.twins, runs, strict=True):
        evidence.progress(f"{twin.name}: {NAME}")
        package: Any = torch_impl if twin.name == "torch_impl" else flax_impl
        if package is flax_impl and not any(directory.glob("*.safetensors")):
            notes.append(f"{twin.name}: pickled weights take PyTorch to read")
            continue
        with jax.enable_x64(True):
            leaves = package.export_weights(package.from_pretrained(directory))
            output = _output(package, package.from_pretrained(directory, dtype="float64"), row)
        problems += [
            f"{twin.name}: {text}"
            for text in set_problems("parameter", leaves, case.tensors, ("the opened model", "the case"))
        ]
        problems += _other_dtypes(twin.name, leaves, case)
        found += [
            compare(f"{path} of {twin.name}", leaves[path], tensor, bound=0.0)
            for path, tensor in case.tensors.items()
            if path in leaves
        ]
        found.append(compare(f"output of {twin.name}", output, usual.output[:1], bound=BOUND))
    rung = rung_of(f"{len(found)} tensors", found, problems)
    rung.notes += notes
    rung.seconds = time.perf_counter() - began
    report.witnesses[NAME] = rung


def _output(package: Any, model: Any, inputs: dict[str, Any]) -> FloatArray:
    if package is flax_impl:
        return widened(np.asarray(flax_impl.compiled(model)(**inputs)))
    with torch.no_grad():
        return widened(model(**{name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}).numpy())


def _other_dtypes(name: str, leaves: dict[str, Any], case: Case) -> list[str]:
    """Leaves of the opened model that are not in the configuration's dtype."""
    wanted, got = case.config.param_dtype, {path: str(leaf.dtype) for path, leaf in leaves.items()}
    return [f"{name}: {path}: expected {wanted}, got {dtype}" for path, dtype in got.items() if dtype != wanted]
