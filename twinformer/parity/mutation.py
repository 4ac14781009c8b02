"""Faults planted on purpose, one twin at a time: does the judge find each of them, and name the right module?

A ``Mutant`` has to be found, a ``Control`` (a difference that is no fault, such as another order of summation) must
not be. The faults themselves are kept with the tests (``parity_tests/mutants``); here is what runs them. A mutant
counts as killed only if a rung says "differ": a crash is an error of its own, and so is a fault whose code was never
reached. Each case is first shown to agree without any fault: a kill would mean nothing otherwise.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol

from twinformer.errors import InputError
from twinformer.parity.case import Case
from twinformer.parity.judge import judge
from twinformer.parity.remembered import Remembered
from twinformer.parity.report import Report
from twinformer.parity.rungs import LADDER
from twinformer.parity.twins import FlaxTwin, TorchTwin, Twin, forget_compiled

TwinName = Literal["torch_impl", "flax_impl"]
TWINS: tuple[TwinName, ...] = ("torch_impl", "flax_impl")
State = Literal["killed", "survived", "green", "alarm", "error"]

# Not on the ladder: both twins must refuse a case in the same words.
REFUSAL = "refusal"
USUAL = ("parameters", "forward", "gradients")


class Reached(Protocol):
    """What a plant gives to its block: how often the faulty code was called."""

    calls: int


@dataclass(frozen=True)
class Planted:
    """A change of one twin's code: where it is known from, what plants it, and the case and rungs it is tried on."""

    id: str
    twin: TwinName
    mechanism: str
    source: str
    classes: tuple[str, ...]
    plant: Callable[[], AbstractContextManager[Reached]]
    case: str
    rungs: tuple[str, ...] = USUAL

    @property
    def label(self) -> str:
        return f"{self.id} in {self.twin}"


@dataclass(frozen=True)
class Mutant(Planted):
    """A fault. ``culprits`` are the modules that may rightly be named for it, as patterns (``*.attention``)."""

    culprits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Control(Planted):
    """A difference that is none: no rung may say "differ"."""


@dataclass(frozen=True)
class Catalogue:
    """Everything that can be planted, and the cases by name. ``does_not_apply``: id -> why not."""

    mutants: tuple[Mutant, ...]
    controls: tuple[Control, ...]
    cases: Mapping[str, Callable[[], Case]]
    does_not_apply: Mapping[str, str]

    def chosen(self, ids: Sequence[str], twin: str | None) -> tuple[Planted, ...]:
        """What is planted under these ids (all, where none is given), in one twin or in both."""
        every: tuple[Planted, ...] = (*self.mutants, *self.controls)
        return tuple(p for p in every if (not ids or p.id in ids) and twin in (None, p.twin))

    def unknown(self, ids: Sequence[str]) -> list[str]:
        known = {planted.id for planted in (*self.mutants, *self.controls)}
        return [name for name in ids if name not in known and name not in self.does_not_apply]


@dataclass(frozen=True)
class Climbed:
    """One rung under a planted fault. ``margin``: the worst difference in units of its bound; infinite where
    values could not even be compared (other shapes, NaN at other places, other names)."""

    rung: str
    verdict: str
    margin: float
    where: str


@dataclass(frozen=True)
class Outcome:
    """What became of one planted change. ``right``: the culprits named are all among those expected (None: none had
    to be named)."""

    id: str
    twin: str
    kind: Literal["mutant", "control"]
    case: str
    classes: tuple[str, ...]
    mechanism: str
    state: State
    rungs: tuple[Climbed, ...] = ()
    culprits: tuple[str, ...] = ()
    expected: tuple[str, ...] = ()
    right: bool | None = None
    reached: int = 0
    seconds: float = 0.0
    message: str = ""

    @property
    def margin(self) -> float:
        """Of the rung that decided, else the largest of all."""
        found = [climbed.margin for climbed in self.rungs if climbed.verdict == "differ"]
        return found[0] if found else max((climbed.margin for climbed in self.rungs), default=0.0)

    @property
    def is_good(self) -> bool:
        return self.state in ("killed", "green")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; an infinite margin is null."""
        values = dataclasses.asdict(self)
        for climbed in values["rungs"]:
            climbed["margin"] = climbed["margin"] if math.isfinite(climbed["margin"]) else None
        values["seconds"] = round(self.seconds, 3)
        return values


@dataclass(frozen=True)
class Baseline:
    """A case without any fault: whether it agrees on a rung that its mutants are tried on."""

    case: str
    rung: str
    agrees: bool
    seconds: float
    message: str = ""


class Bench:
    """Where faults are planted and tried, case by case. Keeps what the twins do without a fault."""

    def __init__(self, cases: Mapping[str, Callable[[], Case]]) -> None:
        self._makers = cases
        self._cases: dict[str, Case] = {}
        self._clean: dict[tuple[str, str], Twin] = {}
        self.baselines: dict[tuple[str, str], Baseline] = {}

    def case(self, name: str) -> Case:
        if name not in self._cases:
            self._cases[name] = self._makers[name]()
        return self._cases[name]

    def baseline(self, name: str, rung: str) -> Baseline:
        """The case as it is, on this rung; asked once."""
        if (name, rung) not in self.baselines:
            started = time.perf_counter()
            agrees, message = True, ""
            try:
                found, _ = self._climb(name, rung, None)
                if found.verdict not in ("agree", "cannot tell"):
                    agrees, message = False, f"{rung} says {found.verdict} at {found.where}"
            except Exception as error:
                agrees, message = False, _told(error)
            seconds = time.perf_counter() - started
            self.baselines[name, rung] = Baseline(name, rung, agrees, seconds, message)
        return self.baselines[name, rung]

    def try_(self, planted: Planted) -> Outcome:
        """Plant it and climb its rungs, up to the first that says "differ"; each without the fault first."""
        started = time.perf_counter()
        climbed: list[Climbed] = []
        named: tuple[str, ...] = ()
        message, calls = "", 0
        for rung in (step for step in (REFUSAL, *_ORDER) if step in planted.rungs):
            before = self.baseline(planted.case, rung)
            if not before.agrees:
                message = f"the case differs without any fault: {before.message}"
                break
            try:
                found, culprits, reached = self._planted(planted, rung)
            except Exception as error:
                message = _told(error)
                break
            climbed.append(found)
            calls += reached
            if found.verdict == "differ":
                named = culprits
                break
        if not message and calls == 0:
            message = "the faulty code was never reached"
        outcome = Outcome(
            planted.id,
            planted.twin,
            "mutant" if isinstance(planted, Mutant) else "control",
            planted.case,
            planted.classes,
            planted.mechanism,
            "error",
            tuple(climbed),
            named,
            planted.culprits if isinstance(planted, Mutant) else (),
            None,
            calls,
            time.perf_counter() - started,
            message,
        )
        return outcome if message else _decided(outcome)

    def _planted(self, planted: Planted, rung: str) -> tuple[Climbed, tuple[str, ...], int]:
        """One rung under the fault. Compiled programs are dropped before, for the fault is not in them, and after."""
        if planted.twin == "flax_impl":
            forget_compiled()
        try:
            with planted.plant() as reached:
                found, culprits = self._climb(planted.case, rung, planted.twin)
                return found, culprits, reached.calls
        finally:
            if planted.twin == "flax_impl":
                forget_compiled()

    def _climb(self, name: str, rung: str, faulty: str | None) -> tuple[Climbed, tuple[str, ...]]:
        """One rung, with the ``faulty`` twin asked anew and the other remembered."""
        case = self.case(name)
        twins = self._twins(name, faulty)
        if rung == REFUSAL:
            return _compare_refusals(case, twins), ()
        report: Report = judge(case, rungs=(rung,), twins=twins)
        found = report.rungs[rung]
        worst = found.worst
        margin = 0.0 if worst is None else worst.severity
        if found.verdict == "differ" and margin <= 1:  # other names or dtypes: no figure says how far
            margin = math.inf
        where = worst.name if worst is not None else found.problems[0] if found.problems else ""
        return Climbed(rung, found.verdict, margin, where), tuple(report.culprits)

    def _twins(self, name: str, faulty: str | None) -> tuple[Twin, Twin]:
        kinds: tuple[type[TorchTwin] | type[FlaxTwin], ...] = (TorchTwin, FlaxTwin)
        first, second = (
            kind() if kind.name == faulty else self._clean.setdefault((kind.name, name), Remembered(kind()))
            for kind in kinds
        )
        return first, second


def _decided(outcome: Outcome) -> Outcome:
    """The outcome of a climb in which nothing went wrong."""
    differs = any(found.verdict == "differ" for found in outcome.rungs)
    if outcome.kind == "control":
        return dataclasses.replace(outcome, state="alarm" if differs else "green")
    right = is_right(outcome.culprits, outcome.expected) if differs and outcome.expected else None
    return dataclasses.replace(outcome, state="killed" if differs else "survived", right=right)


def is_right(named: Sequence[str], expected: Sequence[str]) -> bool:
    """Some module is named, and none that is not expected. ``path#2`` is a second call of ``path``."""
    return bool(named) and all(
        any(fnmatchcase(name.partition("#")[0], pattern) for pattern in expected) for name in named
    )


def _compare_refusals(case: Case, twins: tuple[Twin, Twin]) -> Climbed:
    """Both twins must refuse the case, with the same error."""
    told = []
    for twin in twins:
        try:
            twin.plain(case.in_dtype("float64"))
            told.append("no refusal")
        except InputError as refusal:
            told.append(str(refusal))
    if told[0] == told[1] != "no refusal":
        return Climbed(REFUSAL, "agree", 0.0, "")
    return Climbed(REFUSAL, "differ", math.inf, f"{told[0]!r} against {told[1]!r}")


_ORDER = tuple(step.name for step in LADDER)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
