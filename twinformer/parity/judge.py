"""The judge: takes a subject, climbs the ladder, returns a report."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from twinformer.config import ModelConfig
from twinformer.errors import Problems, TwinformerError
from twinformer.parity.abreast import apart, beside, is_small
from twinformer.parity.case import Case
from twinformer.parity.evidence import Evidence, Progress
from twinformer.parity.report import Report
from twinformer.parity.rungs import BY_DEFAULT, LADDER, rounding
from twinformer.parity.twins import Twin
from twinformer.parity.verdict import Rung


class CannotJudgeError(TwinformerError):
    """There is nothing to judge: an unknown subject or rung, or a framework that is not installed."""


def judge(
    case: Case,
    *,
    rungs: Sequence[str] = BY_DEFAULT,
    witnesses: Sequence[Callable[[Evidence, Report], None]] = (),
    twins: tuple[Twin, Twin] | None = None,
    progress: Progress = lambda _: None,
    abreast: bool = False,
) -> Report:
    """Run the named rungs of the ladder on a case, in the ladder's order.

    Where rung 0 finds other parameter sets, the rungs above would compare different models: they are left
    out, and the report says so. ``witnesses`` are called with the evidence and the report, to add to it. ``twins``
    stand in for the two implementations as they are. ``abreast``: some of the rungs run in another process
    (``abreast.beside`` says what that asks of the caller); never with ``twins``.
    Raises CannotJudgeError for rungs that there are not.
    """
    check_rungs(rungs)
    started = time.perf_counter()
    needs_gradients = bool({"gradients", "precision", "compilation", "optimizer"} & set(rungs))
    evidence = Evidence(case, twins, with_gradients=needs_gradients, progress=progress)
    report = Report(subject=case.name, description=describe(case.config), rungs={}, config=case.config.to_dict())
    elsewhere = [name for name in apart(case) if name in rungs and abreast and twins is None]
    with beside(climb_apart, case, elsewhere) as others:
        _climb(evidence, report, [name for name in rungs if name not in elsewhere])
        if "parameters" in report.rungs and _different_models(report.rungs["parameters"]):
            report.notes.append("the twins hold different parameters: the rungs above were not run")
        else:
            if is_small(case):
                for name in others.take():
                    _climb(evidence, report, [name])
            progress(f"waiting for {', '.join(name for name in elsewhere if name not in report.rungs)}")
            found = report.rungs | others.wait()
            report.rungs = {step.name: found[step.name] for step in LADDER if step.name in found}
            _without_truth(report, elsewhere)
            if "training" in report.rungs:
                _where_else(report)
            for witness in witnesses:
                witness(evidence, report)
        report.settings = {"python": platform.python_version(), "numpy": np.__version__, "machine": platform.machine()}
        for twin in evidence.twins:
            report.settings |= twin.versions()
    report.seconds = time.perf_counter() - started
    return report


def climb_apart(case: Case, names: Iterable[str]) -> dict[str, Rung]:
    """Rungs that need no other's verdict, on twins of their own."""
    report = Report(subject=case.name, description="", rungs={}, config={})
    evidence = Evidence(case)
    for name in names:
        _climb(evidence, report, [name])
    return report.rungs


def _climb(evidence: Evidence, report: Report, names: Sequence[str]) -> None:
    """Add the rungs to the report, in the ladder's order, up to one that leaves nothing to compare above."""
    for step in LADDER:
        if step.name not in names:
            continue
        evidence.progress(f"rung {step.number}: {step.name}")
        began = time.perf_counter()
        report.rungs[step.name] = _no_truth(report, step.name) or step.check(evidence)
        if step.name == "precision" and _differs(report.rungs[step.name]):
            _ask_modules(evidence, report.rungs[step.name])
        report.rungs[step.name].seconds = time.perf_counter() - began
        if step.name == "parameters" and _different_models(report.rungs[step.name]):
            return


def _ask_modules(evidence: Evidence, precision: Rung) -> None:
    """Whole runs say that something is less precise; the modules by themselves, which."""
    modules = rounding.check(evidence)
    if _differs(modules):
        precision.culprits = modules.culprits
        precision.notes += [f"by themselves (rung rounding): {problem}" for problem in modules.problems[:3]]


def _no_truth(report: Report, name: str) -> Rung | None:
    """What a rung that measures errors against float64 is where float64 already differs."""
    if name not in ("precision", "rounding"):
        return None
    below = [rung for rung in ("forward", "calls", "gradients") if rung in report.rungs]
    wrong = [rung for rung in below if _differs(report.rungs[rung])]
    if not wrong:
        return None
    reason = f"the twins differ in float64 ({', '.join(wrong)}): there is no truth to measure errors against"
    return Rung("cannot tell", "", problems=[reason])


def _without_truth(report: Report, elsewhere: Sequence[str]) -> None:
    """Those that were run in another process, before anything was known of float64."""
    for name in elsewhere:
        report.rungs[name] = _no_truth(report, name) or report.rungs[name]


def check_rungs(rungs: Sequence[str]) -> None:
    """Raise CannotJudgeError naming every rung that does not exist."""
    problems = Problems("rungs", CannotJudgeError)
    known = [step.name for step in LADDER]
    for name in rungs:
        if name not in known:
            problems.add(f"expected rungs of the ladder ({', '.join(known)}), got {name!r}")
    problems.expect(bool(rungs), f"expected at least one of {', '.join(known)}, got none")
    problems.raise_if_any()


def describe(config: ModelConfig) -> str:
    """One line about a configuration."""
    layers = f"{config.num_layers} layers"
    if config.architecture == "encoder-decoder":
        layers = f"{config.num_encoder_layers} + {config.num_layers} layers"
    heads = f"{config.num_heads} heads"
    if config.num_kv_heads != config.num_heads:
        heads += f" on {config.num_kv_heads}"
    gate = "gated " if config.gated else ""
    return (
        f"{config.architecture}, {layers}, width {config.model_dim}, {heads}, {config.norm_placement}-{config.norm}, "
        f"{gate}{config.activation}, {config.positions} positions, {config.vocab_size:,} tokens"
    )


def _differs(rung: Rung) -> bool:
    return rung.verdict == "differ"


def _where_else(report: Report) -> None:
    """Where a training run differs and what it is made of does not, the step itself is the place.

    Where what it is made of differs, so does the run, and the one by hand, which is put together from it.
    """
    training = report.rungs["training"]
    made_of = ("parameters", "forward", "calls", "gradients", "stochastic", "optimizer")
    below = [name for name in made_of if name in report.rungs]
    wrong = [name for name in below if _differs(report.rungs[name])]
    if not _differs(training):
        return
    if wrong:
        training.notes.append(
            f"{', '.join(wrong)} differ already: follow the culprits there (the run by hand is made of what the first "
            "twin computes, so that either twin may be named here for a fault of the other)"
        )
    elif {"forward", "gradients"} <= set(below) and all(report.rungs[name].verdict == "agree" for name in below):
        training.notes.append(
            f"{', '.join(below)} agree: the step itself is the place (keys, the loss and its gradient, sums, division, "
            "schedule, clipping, or what it hands out of its state)"
        )


def _different_models(parameters: Rung) -> bool:
    return parameters.verdict == "differ" and any(" only in " in problem for problem in parameters.problems)
