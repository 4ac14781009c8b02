"""Rung 9, continued: a run that was stopped goes on in either framework as if nothing had happened.

Each twin runs to the end, and once more to the middle, where all that its trainer needs is written to a file. Both
twins go on from both files. In the framework that wrote it the rest is the same bit for bit; in the
other one it is that one's own run within the bound of rung 6. What Adafactor keeps of a matrix has an orientation: a
step of it is compared too.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from twinformer.data.batch import Batch
from twinformer.learning import OptimizerConfig
from twinformer.parity.case import Arrays, Case
from twinformer.parity.compare import Comparison, compare, widened
from twinformer.parity.cut import describe
from twinformer.parity.evidence import Evidence
from twinformer.parity.rungs import training as rung_6
from twinformer.parity.verdict import Rung, does_not_apply, rung_of

STEPS, STOP = 6, 3
_FACTORS = tuple(f"optimizer/{name}/" for name in ("row", "column", "exp_avg_sq"))


def check(evidence: Evidence) -> Rung:
    """Compare what the remaining steps tell and move, and what is left at the end."""
    whole = evidence.case
    if not whole.config.predicts_tokens:
        return does_not_apply("the model predicts no tokens")
    case, batches = rung_6.prepared(whole)
    training, lessons = rung_6.TRAINING, batches[:STEPS]
    comparisons: list[Comparison] = []
    problems: list[str] = []
    full, left = {}, {}
    for twin in evidence.twins:
        evidence.progress(f"{twin.name}: {STEPS} steps, and {STOP} of them")
        full[twin.name], half = twin.train(case, training, [lessons, lessons[:STOP]], evaluate=False)
        left[twin.name] = _through_a_file(half.exported)
    for saver, state in left.items():
        for twin in evidence.twins:
            evidence.progress(f"{twin.name}: goes on where {saver} stopped")
            (rest,) = twin.train(case, training, [lessons[STOP:]], evaluate=False, begin=state)
            label = f"{saver} to {twin.name}"
            wanted = dataclasses.replace(full[twin.name], steps=full[twin.name].steps[STOP:])
            problems += rung_6.state_problems(label, rest, wanted, ("resumed", "without a stop"))
            found = rung_6.compared(label, rest, wanted)
            if saver == twin.name:
                found = [dataclasses.replace(one, bound=0.0) for one in found]
            comparisons += found
    found, wrong = _factors(evidence, case, lessons[:1])
    comparisons, problems = comparisons + found + _masters(evidence, whole, lessons[:1]), problems + wrong
    rung = rung_of(f"4 ways, {len(comparisons)} figures", comparisons, problems)
    told = [one.name.rpartition(" (")[2].rstrip(")") for one in comparisons if not one.agrees]
    rung.culprits = list(dict.fromkeys(re.sub(r"^step \d+, ", "", label) for label in told))  # which ways
    rung.notes += describe(case.config, whole.config)
    return rung


def _factors(evidence: Evidence, case: Case, lessons: list[list[Batch]]) -> tuple[list[Comparison], list[str]]:
    """What Adafactor keeps after a step: of rows or of columns, as PyTorch orients a matrix, in either twin's file.

    Not the step: it divides by its own size a gradient that is zero by mathematics.
    """
    training = dataclasses.replace(rung_6.TRAINING, optimizer=OptimizerConfig(name="adafactor", weight_decay=0.1))
    first, second = (twin.name for twin in evidence.twins)
    ours, theirs = (twin.train(case, training, [lessons], evaluate=False)[0] for twin in evidence.twins)
    label = f"adafactor, {first}, {second}"
    kept = [one for one in rung_6.compared(label, ours, theirs) if one.name.startswith(_FACTORS)]
    return kept, rung_6.state_problems(label, ours, theirs, (first, second))


def _masters(evidence: Evidence, whole: Case, lessons: list[list[Batch]]) -> list[Comparison]:
    """In bfloat16 a state has more digits than its parameters: read and written again by either twin, it keeps them."""
    case = rung_6.prepared(whole)[0].in_dtype("bfloat16")
    found = []
    for saver in evidence.twins:
        (run,) = saver.train(case, rung_6.TRAINING, [lessons], evaluate=False)
        kept = _through_a_file(run.exported)
        for reader in evidence.twins:
            (again,) = reader.train(case, rung_6.TRAINING, [[]], evaluate=False, begin=kept)
            found += [
                compare(
                    f"{name} (bfloat16, {saver.name} to {reader.name})", widened(leaf), widened(kept[name]), bound=0.0
                )
                for name, leaf in again.exported.items()
            ]
    return found


def _through_a_file(state: Arrays) -> Arrays:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "state.safetensors"
        save_file({name: np.asarray(leaf, order="C") for name, leaf in state.items()}, file)
        return load_file(file)
