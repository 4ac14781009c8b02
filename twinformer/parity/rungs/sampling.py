"""Rung 8: what is done to logits, which token is drawn, and when writing ends.

There are two parts. Definitions, on tables of logits with exact ties and boundaries, against a reference in NumPy
(``sampling_reference.py``), so that two twins that are wrong alike are found; the numbers in [0, 1) bit for bit. Then
both twins write with the case's model: every token is looked up in the logits of one full forward over what was
written, with the reference's own processors, numbers and stopping.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import ml_dtypes
import numpy as np

from twinformer.decoding import SamplingConfig
from twinformer.parity import philox
from twinformer.parity import sampling_reference as reference
from twinformer.parity.case import Case
from twinformer.parity.compare import Comparison, FloatArray, compare, widened
from twinformer.parity.cut import cut, describe
from twinformer.parity.evidence import Evidence
from twinformer.parity.remembered import Remembered
from twinformer.parity.sampling_tables import (
    CHAINS,
    HOPELESS,
    ROWS,
    SEEDS,
    STEPS,
    TABLES,
    UNIFORMS,
    WIDE,
    WIDE_CHAINS,
)
from twinformer.parity.scenarios import Writing, writing_for
from twinformer.parity.twins import Twin
from twinformer.parity.verdict import Rung, does_not_apply, rung_of
from twinformer.parity.writers import Chooser
from twinformer.parity.writing_checks import BOUND, NOISE, Problems, written

# what a token is made by, in its order: a chain is wrong because of its parts, a generator because of both
_PARTS = ("uniforms", "greedy", "draw", "RepetitionPenalty", "Temperature", "TopK", "TopP", "MinP")


def check(evidence: Evidence) -> Rung:
    """Definitions, then writing: each twin against the references, and through them with the other."""
    whole = evidence.case
    if whole.config.architecture == "encoder":
        return does_not_apply("an encoder writes no tokens: there is nothing to draw")
    if not whole.config.predicts_tokens:
        return does_not_apply("the model predicts no tokens: there is nothing to draw")
    case, writing = prepared(whole)
    comparisons: list[Comparison] = []
    problems: Problems = {}
    tokens = 0
    twins = (Remembered(evidence.twins[0]), evidence.twins[1])  # both are held against what the first gives
    for twin in twins:
        evidence.progress(f"{twin.name}: definitions of sampling")
        figures, wrong = definitions(twin, case)
        comparisons += figures
        add(problems, twin.name, wrong)
        if wrong or not all(one.agrees for one in figures):
            continue  # what is written with them would say it again, if anything could be written
        evidence.progress(f"{twin.name}: writing")
        for which in ("sampled", "penalised"):
            figures, wrong, count = written(twin, twins[0], case, writing, which)
            comparisons += figures
            add(problems, twin.name, wrong)
            tokens += count
    rows = sum(len(table.logits) for table in TABLES)
    return verdict(f"{rows} rows of logits, {tokens} tokens written", comparisons, problems, case, whole)


def verdict(checked: str, comparisons: Sequence[Comparison], problems: Problems, case: Case, whole: Case) -> Rung:
    """The rung, with the parts that are wrong as culprits."""
    rung = rung_of(checked, comparisons, [text for texts in problems.values() for text in texts])
    if rung.verdict == "differ":
        places = [one.name.partition(" (")[0] for one in comparisons if not one.agrees]
        rung.culprits = _first_cause([*problems, *places])
    rung.notes += describe(case.config, whole.config)
    return rung


def add(problems: Problems, name: str, wrong: Problems) -> None:
    """More problems, each with the name of the twin that has it."""
    for place, texts in wrong.items():
        problems.setdefault(place, []).extend(f"{name}: {text}" for text in texts)


def prepared(whole: Case) -> tuple[Case, Writing]:
    """The model cut down, in float64, and what it is asked to write."""
    writing = writing_for(whole.config)
    sized = cut(whole, writing.inputs(), layers=1).config
    writing = writing_for(sized)
    return cut(whole, writing.inputs(), layers=1).in_dtype("float64"), writing


def _first_cause(places: Sequence[str]) -> list[str]:
    parts = [part for part in _PARTS if part in places]
    return parts or [place for place in dict.fromkeys(places) if place == "processors"] or list(dict.fromkeys(places))


# ---- definitions


def definitions(twin: Twin, case: Case) -> tuple[list[Comparison], Problems]:
    """One twin against the reference: figures, and problems by what they are about."""
    with twin.chooser(case) as chooser:
        comparisons, lost = _processors(twin.name, chooser)
        comparisons += [*_wide_rows(twin.name, chooser), *_low(twin.name, chooser)]
        wrong = {"uniforms": list(_numbers(chooser)), "greedy": list(_greedy(chooser)), "draw": list(_draws(chooser))}
    return comparisons, lost | {place: texts for place, texts in wrong.items() if texts}


def _processors(name: str, chooser: Chooser) -> tuple[list[Comparison], Problems]:
    """Every processor and chain on every table: which tokens are left, and their values.

    Of rows from which nothing can be chosen this is all that is asked: that nothing can be chosen afterwards.
    """
    logits, seen = (np.concatenate(parts) for parts in zip(*((one.logits, one.seen) for one in TABLES), strict=True))
    count = len(logits)
    logits, seen = np.concatenate((logits, HOPELESS)), np.concatenate((seen, seen[: len(HOPELESS)]))
    comparisons: list[Comparison] = []
    problems: Problems = {}
    asked = [(place, config) for place, configs in CHAINS.items() for config in configs]
    found = chooser.processed([config for _, config in asked], logits, seen)
    for (place, config), got in zip(asked, found, strict=True):
        rows = zip(logits[:count], seen[:count], strict=True)
        expected = np.stack([reference.processed(*row, config) for row in rows])
        label = f"{place} ({_choices(config)}, {name})"
        comparisons.append(compare(label, got[:count], expected, bound=BOUND, scale=max(1.0, _largest(expected))))
        for row, (before, after) in enumerate(zip(HOPELESS, got[count:], strict=True)):
            if reference.is_hopeful(after) != reference.is_hopeful(before):
                wanted = "something" if reference.is_hopeful(before) else "nothing"
                text = f"{place} ({_choices(config)}) of hopeless logits, row {row}: expected {wanted} left to choose"
                problems.setdefault(place, []).append(text)
    return comparisons, problems


def _wide_rows(name: str, chooser: Chooser) -> Iterator[Comparison]:
    """More tokens than the tables have, of which a row needs few or nearly all."""
    seen = np.zeros(WIDE.shape, np.bool_)
    found = chooser.processed([config for _, config in WIDE_CHAINS], WIDE, seen)
    for (place, config), got in zip(WIDE_CHAINS, found, strict=True):
        expected = np.stack([reference.processed(*row, config) for row in zip(WIDE, seen, strict=True)])
        label = f"{place} ({_choices(config)}, {WIDE.shape[1]:,} tokens, {name})"
        yield compare(label, got, expected, bound=BOUND, scale=_largest(expected))


def _low(name: str, chooser: Chooser) -> Iterator[Comparison]:
    """Logits in bfloat16 are widened first: what is made of them is what is made of the same values in float32."""
    narrow = np.concatenate([table.logits for table in TABLES]).astype(ml_dtypes.bfloat16)
    seen = np.concatenate([table.seen for table in TABLES])
    configs = [(place, config) for place, chain in CHAINS.items() for config in chain]
    asked = [config for _, config in configs]
    low, same = (chooser.processed(asked, logits, seen) for logits in (narrow, narrow.astype(np.float32)))
    for (place, config), got, expected in zip(configs, low, same, strict=True):
        label = f"{place} ({_choices(config)}, bfloat16, {name})"
        yield compare(label, widened(got), widened(expected), bound=0.0)
    for uniform in UNIFORMS[::4]:
        numbers = np.full(len(narrow), uniform, np.float32)
        one, other = (chooser.draw(logits, numbers) for logits in (narrow, narrow.astype(np.float32)))
        label = f"draw (at {float(uniform)!r}, bfloat16, {name})"
        yield compare(label, one.astype(np.float64), other.astype(np.float64), bound=0.0)


def _numbers(chooser: Chooser) -> Iterator[str]:
    """Bit for bit: a number decides, and two that are nearly equal can decide differently."""
    for seed in SEEDS:
        for step in STEPS:
            got, expected = chooser.uniforms(seed, ROWS, step), philox.uniforms(seed, ROWS, step)
            if got.dtype != np.float32:
                yield f"uniforms: expected float32, got {got.dtype}"
            elif not np.array_equal(got, expected):
                yield (
                    f"uniforms of seed {seed}, rows {ROWS.tolist()}, step {step}: expected {expected.tolist()}, "
                    f"got {got.tolist()}"
                )


def _greedy(chooser: Chooser) -> Iterator[str]:
    logits, where = _rows()
    for row, one in enumerate(chooser.greedy(logits).tolist()):
        expected = reference.greedy(logits[row])
        if one != expected:
            yield f"greedy on {where[row]}: expected {expected}, got {one}"


def _draws(chooser: Chooser) -> Iterator[str]:
    """On equal logits every number is a boundary or next to one; elsewhere one within rounding of it says nothing."""
    logits, where = _rows()
    is_exact = [len({x for x in row if np.isfinite(x)}) <= 1 for row in logits]
    for uniform in UNIFORMS:
        got = chooser.draw(logits, np.full(len(logits), uniform, np.float32)).tolist()
        for row, one in enumerate(got):
            expected = reference.draw(logits[row], float(uniform))
            if one != expected and (is_exact[row] or reference.draw_margin(logits[row], float(uniform)) > NOISE):
                yield f"draw from {where[row]}, at {float(uniform)!r}: expected {expected}, got {one}"


def _rows() -> tuple[FloatArray, list[str]]:
    """All rows of logits, and where each is from."""
    tables = {"hopeless": HOPELESS} | {table.name: table.logits for table in TABLES}
    where = [f"{name} logits, row {row}" for name, table in tables.items() for row in range(len(table))]
    return np.concatenate(list(tables.values())), where


def _choices(config: SamplingConfig) -> str:
    plain = SamplingConfig()
    names = [field.name for field in dataclasses.fields(config)]
    changed = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(plain, name)}
    return ", ".join(f"{name}={value:.9g}" for name, value in changed.items())


def _largest(array: FloatArray) -> float:
    return float(np.abs(array[np.isfinite(array)]).max(initial=0.0))
