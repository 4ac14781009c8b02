"""Rung 0: both twins hold exactly the contract's leaves, with the right values in the right layout."""

from __future__ import annotations

import numpy as np

from twinformer.parameters import model_parameters
from twinformer.parity.case import Case, with_all_digits
from twinformer.parity.compare import Comparison, compare, set_problems, widened
from twinformer.parity.evidence import Evidence
from twinformer.parity.twins import in_pytorch_layout
from twinformer.parity.verdict import Rung, rung_of

_KEPT = "wrote it, once the model has other weights"


def check(evidence: Evidence) -> Rung:
    """Compare sets, then values, with the tensors that went in.

    Layout is proved by values: each framework's own leaf, read by the judge's own rule and not by the twin's bridge,
    must hold the tensor element by element, so a square matrix left untransposed is found. What was written is a copy:
    it stays as it is when the model takes other weights. A matrix that equals its
    own transpose cannot prove its layout: the rung then cannot tell, and says for which. The culprits are the modules
    that own the leaves which are wrong.
    """
    case = with_all_digits(evidence.case.in_dtype("float64"))
    wanted = model_parameters(case.config)
    problems = set_problems("parameter", case.tensors, wanted, ("the weights given", "the contract"))
    comparisons: list[Comparison] = []
    wrong: list[str] = []
    shared = False
    for twin in evidence.twins:
        native = in_pytorch_layout(twin.leaves(case))
        exported = twin.exported(case)
        for what, leaves in (
            ("holds it", native),
            ("writes it back", exported),
            (_KEPT, twin.kept(case)),
        ):
            problems += set_problems("parameter", leaves, wanted, (twin.name, "the contract"))
            found = {
                path: compare(f"{path} as {twin.name} {what}", leaves[path], case.tensors[path], bound=0.0)
                for path in wanted
                if path in leaves and path in case.tensors
            }
            comparisons += found.values()
            lost = [path for path, comparison in found.items() if not comparison.agrees]
            shared |= what == _KEPT and bool(lost) and not wrong
            wrong += [*lost, *(set(leaves) ^ set(wanted))]
    checked = f"{len(wanted)} leaves, {sum(int(np.prod(p.shape)) for p in wanted.values()):,} parameters"
    refusals = _unrefused(evidence, case) if not problems else []
    rung = rung_of(checked, comparisons, problems + refusals)
    rung.culprits = ["export_weights"] if shared else _owners(wrong) or ["load_weights"] * bool(refusals)
    mute = (
        [
            path
            for path, tensor in case.tensors.items()
            if wanted[path].kind == "linear" and _is_symmetric(widened(tensor))
        ]
        if not problems
        else []
    )
    if rung.verdict == "agree" and mute:
        rung.verdict = "cannot tell"
        rung.problems = [f"{path}: equals its own transpose, so that its layout shows nowhere" for path in mute]
    return rung


def _unrefused(evidence: Evidence, case: Case) -> list[str]:
    """What a twin does not say of tensors with four faults: one too many, one missing, one mis-shaped, one with NaN."""
    tensors = dict(case.tensors)
    first, second, third = list(tensors)[:3]
    del tensors[first]
    tensors[second] = np.zeros((*tensors[second].shape, 2))
    tensors[third] = np.full(tensors[third].shape, np.nan)
    tensors["none.of.its.leaves"] = np.zeros(1)
    told = [twin.refusal(case, tensors) for twin in evidence.twins]
    problems = [
        f"{twin.name}: of wrong tensors: expected a refusal that names {path}, got {text or 'none'}"
        for twin, text in zip(evidence.twins, told, strict=True)
        for path in (first, second, third, "none.of.its.leaves")
        if path not in text
    ]
    if not problems and told[0] != told[1]:
        problems.append(f"of wrong tensors: expected the same words of both twins, got {told[0]!r} and {told[1]!r}")
    return problems


def _owners(paths: list[str]) -> list[str]:
    """The modules that own these leaves, each once."""
    return list(dict.fromkeys(path.rpartition(".")[0] for path in paths))


def _is_symmetric(matrix: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> bool:
    return matrix.shape[0] == matrix.shape[1] > 1 and np.array_equal(matrix, matrix.T)
