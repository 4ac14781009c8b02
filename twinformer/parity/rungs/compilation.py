"""Rung 4: compiled or not, with or without remat or a loop over blocks, a model computes the same.

The judge runs PyTorch eagerly and Flax under ``jax.jit``, and watches their modules. Here each twin is held against
itself: PyTorch under ``torch.compile``; Flax under jit with nobody watching, without any jit, and with its blocks in
one compiled loop; and both with every block computed again in the backward pass. PyTorch's trainer and generator are
asked compiled too, and a module that was cast to bfloat16 and back before it took its weights. Where parameters are
wider than the arithmetic, norms have to see all of their digits, in a loop over blocks as well.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np

from twinformer.decoding import Generated
from twinformer.parity.compare import Comparison, compare
from twinformer.parity.evidence import Evidence
from twinformer.parity.modes import (
    MODES,
    WITH_DROPOUT,
    cpp_compiler,
    norms_seen_wide,
    outputs_after_casts,
    run_in_mode,
    train_compiled,
    write_compiled,
)
from twinformer.parity.rungs import decoding, sampling, training
from twinformer.parity.rungs.itself import against_itself, mode_of
from twinformer.parity.rungs.stochastic import with_dropout
from twinformer.parity.verdict import Rung, rung_of
from twinformer.parity.writing_checks import compared

CAST = "torch_impl, cast and back"
COMPILED_TRAINER = "torch_impl, compiled trainer"
COMPILED_GENERATOR = "torch_impl, compiled generator"
MIXED = "parameters in float32, arithmetic in bfloat16"
_NEW = 8


def check(evidence: Evidence) -> Rung:
    """Compare the output and every parameter's gradient in float64, each mode with the same twin's usual run."""
    case = evidence.case.in_dtype("float64")
    comparisons: list[Comparison] = []
    problems: list[str] = []
    reasons: list[str] = []
    modes = 0
    for twin, plain in zip(evidence.twins, evidence.runs("float64", gradients=True), strict=True):
        for mode in MODES[twin.name]:
            if mode == "torch.compile" and cpp_compiler() is None:
                reasons.append("torch.compile: expected a C++ compiler (g++, clang++ or CXX), got none")
                continue
            modes += 1
            evidence.progress(f"{twin.name}: {mode}")
            label = f"{twin.name}, {mode}"
            if mode in WITH_DROPOUT:
                noisy = with_dropout(case)
                usual, asked = twin.run(noisy, gradients=True, detail="blocks"), noisy
            else:
                usual, asked = plain, case
            run = twin.once(mode, asked, partial(run_in_mode, twin, asked, mode))
            found, wrong = against_itself(label, run, usual, (mode, "usual"))
            comparisons, problems = comparisons + found, problems + wrong
    if evidence.case.config.predicts_tokens and cpp_compiler() is not None:
        modes += 1
        evidence.progress("torch_impl: a compiled trainer")
        comparisons += _trained(evidence)
    modes += 1
    evidence.progress("torch_impl: cast and back")
    torch_twin = evidence.twins[0]
    cast = torch_twin.once("casts", evidence.case, lambda: outputs_after_casts(torch_twin, evidence.case))
    comparisons.append(compare(f"output ({CAST})", *reversed(cast), bound=0.0))
    modes += 1
    evidence.progress(MIXED)
    comparisons += _mixed(evidence)
    config = evidence.case.config
    if config.predicts_tokens and config.architecture != "encoder" and cpp_compiler() is not None:
        modes += 1
        evidence.progress("torch_impl: a compiled generator")
        comparisons += _written(evidence)
    rung = rung_of(f"{modes} modes, {len(comparisons)} tensors", comparisons, problems)
    if rung.verdict == "differ":  # which way of running it, of which twin
        rung.culprits = list(dict.fromkeys(mode_of(one.name) for one in comparisons if not one.agrees))
    if reasons and rung.verdict == "agree":
        rung.verdict, rung.problems = "cannot tell", reasons
    else:
        rung.notes += reasons
    return rung


def _mixed(evidence: Evidence) -> list[Comparison]:
    """Which norms show digits beyond those of the arithmetic: what one way of running sees, every way has to see."""
    asked = {f"{twin.name}, {MIXED}": (twin, False) for twin in evidence.twins}
    asked[f"{evidence.twins[1].name}, scan, {MIXED}"] = (evidence.twins[1], True)
    seen = {
        label: twin.once(label, evidence.case, partial(norms_seen_wide, twin, evidence.case, scan=scan))
        for label, (twin, scan) in asked.items()
    }
    return [
        compare(
            f"{norm} shows its digits ({label})",
            np.array([float(shows)]),
            np.array([float(any(other[norm] for other in seen.values()))]),
            bound=0.0,
        )
        for label, found in seen.items()
        for norm, shows in found.items()
    ]


def _trained(evidence: Evidence) -> list[Comparison]:
    """Two steps of PyTorch's compiled trainer, with dropout, against those of the eager one."""
    case, batches = training.prepared(evidence.case)
    lessons = [[batches[step][0]] for step in (0, 4)]
    plan = dataclasses.replace(training.TRAINING, accumulation=1)
    twin = evidence.twins[0]
    (usual,) = twin.once("usual trainer", case, lambda: twin.train(case, plan, [lessons], evaluate=False))
    compiled = twin.once("compiled trainer", case, lambda: train_compiled(case, plan, lessons))
    found = training.compared(COMPILED_TRAINER, compiled, usual)
    return [dataclasses.replace(one, name=f"{one.name.rpartition(' (')[0]} ({COMPILED_TRAINER})") for one in found]


def _written(evidence: Evidence) -> list[Comparison]:
    """What PyTorch's compiled generator writes, past the window if there is one, against the eager one."""
    case, writing = sampling.prepared(decoding.with_small_window(evidence.case))
    twin = evidence.twins[0]

    def ask() -> Generated:
        with twin.writers(case) as make:
            return make(case).generate(writing.prompts, max_new_tokens=_NEW, **writing.options())

    usual = twin.once("usual generator", case, ask)
    found = twin.once("compiled generator", case, lambda: write_compiled(twin, case, writing, _NEW))
    pairs = {name: (getattr(found, name), getattr(usual, name)) for name in ("tokens", "lengths", "logprobs")}
    logprobs = pairs.pop("logprobs")
    exact = [compare(f"{name} ({COMPILED_GENERATOR})", *pair, bound=0.0) for name, pair in pairs.items()]
    return [*exact, compared(f"logprobs ({COMPILED_GENERATOR})", *logprobs)]
