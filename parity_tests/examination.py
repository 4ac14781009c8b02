"""Examinations that a checker has to pass: wrong models which it must refuse, without any framework behind them.

Each is a function without arguments that asserts what the judge makes of prepared evidence. ``test_defects.py`` runs
them on the judge as it is, where all must pass, and on copies with a known defect, where at least one must not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from twinformer.parity import culprit, verdict
from twinformer.parity.culprit import Suspect
from twinformer.parity.evidence import Evidence
from twinformer.parity.power import Power
from twinformer.parity.rungs import forward, gradients
from twinformer.parity.twins import Call, Replay, Run

EXAMINATIONS: dict[str, Callable[[], None]] = {}
MODULES = ("embedding", "stack.blocks.0.attention", "stack.blocks.0", "stack.blocks.1.attention", "stack.blocks.1")


def examination(function: Callable[[], None]) -> Callable[[], None]:
    EXAMINATIONS[function.__name__] = function
    return function


def array(name: str, *shape: int) -> np.ndarray:
    return np.random.default_rng(sum(map(ord, name))).standard_normal(shape or (4, 6, 8))


def right_run() -> Run:
    return Run(
        array("output"),
        {path: array(path) for path in MODULES},
        {f"{path}.weight": array(f"gradient {path}", 8, 8) for path in MODULES},
        {path: array(f"cotangent {path}") for path in MODULES},
    )


class Prepared:
    """Evidence that was prepared: two runs, and what a replay of each module's calls gives."""

    def __init__(self, one: Run, other: Run, replays: dict[str, tuple[Replay, Replay]] | None = None) -> None:
        self._runs = one, other
        self._replays = replays or {path: (replay(path), replay(path)) for path in MODULES}
        config = SimpleNamespace(window=None, pool="none")
        self.case = SimpleNamespace(
            in_dtype=lambda dtype: self.case, tensors={}, config=config, cotangent=np.zeros((1, 1, 1))
        )
        self.twins = self._twin(0), self._twin(1)
        self.notices = 1e-9

    def _twin(self, side: int) -> Any:
        def replayed(case: Any, calls: list[Call], **options: Any) -> list[Replay]:
            return [self._replays[call.path][side] for call in calls]

        calls = [
            Call(path=path, name=path, kind="", arguments=(), options={}, output=array(path), cotangent=array(path))
            for path in self._replays
        ]
        return SimpleNamespace(name=("torch_impl", "flax_impl")[side], record=lambda case: calls, replay=replayed)

    def progress(self, text: str) -> None:
        pass

    def runs(self, dtype: str, **options: Any) -> tuple[Run, Run]:
        return self._runs

    def noise(self, **options: Any) -> list[Any]:
        return []

    def power(self, bound: float) -> Power:
        names = ["output", *(f"module {path}" for path in MODULES)]
        return Power(dict.fromkeys(names, 1e-3 * bound / self.notices), {})


def replay(path: str) -> Replay:
    return Replay(
        array(path), {"0": array(f"input gradient {path}")}, {"weight": array(f"parameter gradient {path}", 8, 8)}
    )


def changed(run: Run, path: str, change: Callable[[np.ndarray], np.ndarray]) -> Run:
    """The run with one module's output changed in place."""
    return dataclasses.replace(run, modules=run.modules | {path: change(run.modules[path].copy())})


def check_forward(other: Run, **options: Any) -> verdict.Rung:
    return forward.check(Prepared(right_run(), other, **options))  # type: ignore[arg-type]


def is_refused(other: Run) -> None:
    assert check_forward(other).verdict == "differ"


@examination
def equal_runs_agree() -> None:
    """A checker that refuses everything is no use either."""
    assert check_forward(right_run()).verdict == "agree"


@examination
def one_element_off() -> None:
    def change(a: np.ndarray) -> np.ndarray:
        a[3, 5, 7] *= 1 + 1e-8
        return a

    is_refused(changed(right_run(), "stack.blocks.0", change))


@examination
def last_module_off_by_little() -> None:
    is_refused(changed(right_run(), MODULES[-1], lambda a: a * (1 + 1e-9)))


@examination
def first_module_off_by_much() -> None:
    is_refused(changed(right_run(), MODULES[0], lambda a: 2 * a))


@examination
def small_values_all_wrong() -> None:
    """Uniform probabilities of 2e-5 against others of that size: far below an absolute tolerance of 1e-2."""
    one, other = right_run(), right_run()
    one.modules["embedding"] = np.full((4, 6, 8), 2e-5)
    other.modules["embedding"] = np.linspace(1e-5, 3e-5, 192).reshape(4, 6, 8)
    assert forward.check(Prepared(one, other)).verdict == "differ"  # type: ignore[arg-type]


@examination
def difference_of_one_sign() -> None:
    """To whichever side: a signed sum sees one of them as small."""
    is_refused(changed(right_run(), "embedding", lambda a: a - 1.0))
    is_refused(changed(right_run(), "embedding", lambda a: a + 1.0))


@examination
def differences_that_cancel() -> None:
    def change(a: np.ndarray) -> np.ndarray:
        a[0, 0, 0] += 1.0
        a[0, 0, 1] -= 1.0
        return a

    is_refused(changed(right_run(), "embedding", change))


@examination
def permuted() -> None:
    is_refused(changed(right_run(), "embedding", lambda a: a[::-1]))


@examination
def one_nan() -> None:
    def change(a: np.ndarray) -> np.ndarray:
        a[1, 2, 3] = np.nan
        return a

    is_refused(changed(right_run(), "embedding", change))


@examination
def nan_for_zero() -> None:
    """What zeroing NaN makes equal."""
    one, other = right_run(), right_run()
    one.modules["embedding"][1, 2] = 0.0
    other.modules["embedding"][1, 2] = np.nan
    assert forward.check(Prepared(one, other)).verdict == "differ"  # type: ignore[arg-type]


@examination
def nan_at_other_places() -> None:
    one, other = right_run(), right_run()
    one.modules["embedding"][1, 2] = np.nan
    other.modules["embedding"][2, 1] = np.nan
    assert forward.check(Prepared(one, other)).verdict == "differ"  # type: ignore[arg-type]


@examination
def nan_everywhere_in_both() -> None:
    one, other = right_run(), right_run()
    for run in (one, other):
        run.modules["embedding"][:] = np.nan
    assert forward.check(Prepared(one, other)).verdict == "differ"  # type: ignore[arg-type]


@examination
def infinities_of_other_sign() -> None:
    one, other = right_run(), right_run()
    one.modules["embedding"][1, 2, 3] = np.inf
    other.modules["embedding"][1, 2, 3] = -np.inf
    assert forward.check(Prepared(one, other)).verdict == "differ"  # type: ignore[arg-type]


@examination
def one_module_missing() -> None:
    """The last by name, so that pairs of sorted names are right as far as they go."""
    other = right_run()
    del other.modules[max(MODULES)]
    is_refused(other)


@examination
def another_shape_that_broadcasts() -> None:
    one, other = right_run(), right_run()
    one.modules["embedding"][:] = one.modules["embedding"][:1]
    other.modules["embedding"] = one.modules["embedding"][:1].copy()
    assert forward.check(Prepared(one, other)).verdict == "differ"  # type: ignore[arg-type]


@examination
def one_gradient_wrong() -> None:
    other = right_run()
    other.gradients["stack.blocks.1.attention.weight"] = -other.gradients["stack.blocks.1.attention.weight"]
    assert gradients.check(Prepared(right_run(), other)).verdict == "differ"  # type: ignore[arg-type]


@examination
def a_fault_that_depends_on_the_order() -> None:
    """The wrong twin is far from itself in another order: that is its fault, and no noise floor."""
    other = changed(right_run(), "embedding", lambda a: a * (1 + 1e-6))
    prepared = Prepared(right_run(), other)
    wrong = {f"module {path}": 1e-6 * float(abs(seen).max()) for path, seen in right_run().modules.items()}
    prepared.noise = lambda **options: [wrong, dict.fromkeys(wrong, 0.0)]  # type: ignore[method-assign]
    assert forward.check(prepared).verdict == "differ"  # type: ignore[arg-type]


@examination
def nothing_compared() -> None:
    """Outputs of a type that nobody handles leave nothing to compare: that is no agreement."""
    assert verdict.rung_of("nothing", []).verdict != "agree"


@examination
def a_crash_is_not_swallowed() -> None:
    class Broken(Prepared):
        def runs(self, dtype: str, **options: Any) -> tuple[Run, Run]:
            raise RuntimeError("the model crashed")

    try:
        found = forward.check(Broken(right_run(), right_run()))  # type: ignore[arg-type]
    except RuntimeError:
        return
    raise AssertionError(f"a crash became {found.verdict!r}")


@examination
def no_run_of_another_case_is_taken() -> None:
    """What was computed for one dtype is not compared for another."""

    class Counts:
        def __init__(self, name: str) -> None:
            self.name, self.asked = name, []

        def run(self, case: Any, **options: Any) -> Run:
            self.asked.append(case.config.compute_dtype)
            return right_run()

    def case_in(dtype: str) -> Any:
        config = SimpleNamespace(compute_dtype=dtype)
        return SimpleNamespace(config=config, in_dtype=case_in, tensors={})

    twins = Counts("torch_impl"), Counts("flax_impl")
    evidence = Evidence(case_in("float32"), twins)  # type: ignore[arg-type]
    for dtype in ("float64", "float32", "bfloat16"):
        evidence.runs(dtype)  # type: ignore[arg-type]
    assert twins[0].asked == ["float64", "float32", "bfloat16"]


@examination
def a_bound_that_cannot_be_missed() -> None:
    """An Adam step moves a weight by at most lr: compared within 2 lr nothing can fail."""
    prepared = Prepared(right_run(), right_run())
    prepared.notices = 2.0
    assert forward.check(prepared).verdict == "cannot tell"  # type: ignore[arg-type]


def _culprits(replays: dict[str, tuple[Replay, Replay]], *, backward: bool) -> list[str]:
    prepared: Any = Prepared(right_run(), right_run(), replays)
    found: list[Suspect] = culprit.culprits(prepared, backward=backward, bound=1e-12)
    return [suspect.name for suspect in found]


def _scaled(good: Replay, name: str) -> Replay:
    value = getattr(good, name)
    wrong = {key: 2 * one for key, one in value.items()} if isinstance(value, dict) else 2 * value
    return dataclasses.replace(good, **{name: wrong})


@examination
def errors_that_cancel_in_their_parent() -> None:
    """The parent agrees; both of its parts are wrong and must be named."""
    paths = ("stack.blocks.0.up", "stack.blocks.0.down", "stack.blocks.0")
    replays = {path: (replay(path), replay(path)) for path in paths}
    for path in paths[:2]:
        replays[path] = replay(path), _scaled(replay(path), "output")
    assert _culprits(replays, backward=False) == list(paths[:2])


@examination
def a_fault_of_the_backward_pass_only() -> None:
    """Forward everything agrees, and so do the parts: the backward comparison has to look at gradients itself."""
    for name in ("input_gradients", "parameter_gradients"):
        replays = {path: (replay(path), replay(path)) for path in MODULES}
        path = "stack.blocks.1.attention"
        replays[path] = replay(path), _scaled(replay(path), name)
        assert _culprits(replays, backward=True) == [path]
