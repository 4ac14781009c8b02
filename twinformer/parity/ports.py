"""Other people's ports: any PyTorch module against any Flax NNX module, or a JAX function with parameters."""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import flax
import jax
import numpy as np
import torch

from twinformer.errors import Problems, TwinformerError
from twinformer.initializers import stream
from twinformer.parity import blame
from twinformer.parity.carry import Names, Plan, make_plan
from twinformer.parity.compare import Comparison, ErrorPair, compare, set_problems, sibling_scales, widened
from twinformer.parity.matching import match_modules
from twinformer.parity.portside import FlaxRun, Port
from twinformer.parity.report import Report
from twinformer.parity.telling import hidden, told
from twinformer.parity.values import Array, Arrays, in_dtype, is_array, is_float, named, replaced, to_numpy, to_torch
from twinformer.parity.verdict import Rung, rung_of
from twinformer.parity.watch import Substitution, TorchRun, run_torch, zeros

Weights = Literal["carry", "telling", "compare"]
BOUND = 1e-12
GRADIENT_BOUND = 1e-11
# how far a computation that is float32 somewhere may be from one that is float64 throughout
_NARROW = 1e-4
_RATIO, _RMS_RATIO = 16.0, 4.0
_ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-9}
_DRAWS = 3


class PortError(TwinformerError):
    """A check that cannot be made: inputs that a model refuses, outputs of other structures, unknown settings."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of two models that are called differently: for each an array, a tuple or a dict."""

    torch: Any
    flax: Any


def check(
    torch_model: torch.nn.Module,
    flax_model: Any,
    *,
    inputs: Any,
    names: Names | None = None,
    modules: Mapping[str, str | None] | None = None,
    weights: Weights = "carry",
    params: Any = None,
    precision: bool | Sequence[str] = True,
    name: str = "port",
    seed: int = 0,
    bound: float = BOUND,
    gradient_bound: float = GRADIENT_BOUND,
) -> Report:
    """Compare a port with its original: parameters, outputs, gradients and precision, with the culprit by name.

    ``flax_model`` is an ``nnx.Module``, or a function ``f(params, *args, **kwargs)`` with its ``params``, a nested
    dict. ``inputs``: an array, a tuple of positional or a dict of keyword arguments, or ``Inputs``
    where the two differ.
    ``names``: PyTorch parameter to Flax leaf (a path, a ``Leaf``, or a list of Leafs for the parts of a fused
    weight); what is left out is derived. ``modules``: PyTorch module to Flax module, where their paths differ; None
    keeps a module from being compared by itself. ``weights``: ``"carry"`` copies PyTorch's weights over,
    ``"telling"`` first draws weights that hide nothing, ``"compare"`` judges the weights that the port has.
    ``precision``: True for float32, or the dtypes. Neither model is changed.
    Raises NamesError or PortError, with all problems, where there is nothing that can be compared.
    """
    started = time.perf_counter()
    dtypes = (["float32"] if precision is True else []) if isinstance(precision, bool) else list(precision)
    _check_settings(flax_model, params, weights, dtypes)
    side = Port(flax_model, params)
    plan = make_plan(torch_model, side.leaves, side.optional, names, modules)
    evidence = _Evidence(torch_model, side, plan, inputs, weights, modules, seed, bound, gradient_bound)
    count = sum(int(np.prod(one)) for one in plan.flax_shapes.values())
    report = Report(
        subject=name,
        description=f"{type(torch_model).__name__} against {evidence.flax_name(flax_model)}, {count:,} parameters",
        rungs={},
    )
    for rung, run in (
        ("parameters", evidence.parameters),
        ("forward", evidence.forward),
        ("gradients", evidence.gradients),
    ):
        began = time.perf_counter()
        report.rungs[rung] = run()
        report.rungs[rung].seconds = time.perf_counter() - began
    if dtypes and report.verdict != "differ":
        began = time.perf_counter()
        report.rungs["precision"] = evidence.precision(dtypes)
        report.rungs["precision"].seconds = time.perf_counter() - began
    elif dtypes:
        report.notes.append("precision was not run: it compares errors of models that agree in float64")
    report.notes += evidence.notes
    report.settings = {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}
    report.settings |= {"jax": jax.__version__, "flax": flax.__version__, "device": jax.default_backend()}
    report.settings |= {"weights": weights}
    report.seconds = time.perf_counter() - started
    return report


class _Evidence:
    """What the rungs look at: both models on the same weights and inputs."""

    def __init__(
        self,
        model: torch.nn.Module,
        side: Port,
        plan: Plan,
        inputs: Any,
        weights: Weights,
        modules: Mapping[str, str | None] | None,
        seed: int,
        bound: float,
        gradient_bound: float,
    ) -> None:
        self.side, self.plan, self.kind, self.seed = side, plan, weights, seed
        self.bound, self.gradient_bound = bound, gradient_bound
        self.notes: list[str] = []
        self.model = copy.deepcopy(model).eval()
        self.weights = {name: to_numpy(one) for name, one in self.model.named_parameters()}
        self.weights |= {name: to_numpy(one) for name, one in self.model.named_buffers()}
        if weights == "telling":
            self.weights |= told(self.model, seed)
        given = inputs if isinstance(inputs, Inputs) else Inputs(inputs, inputs)
        self.torch_inputs = replaced(_as_call(given.torch), lambda _, one: to_numpy(one))
        self.flax_inputs = replaced(_as_call(given.flax), lambda _, one: to_numpy(one))
        self.same_inputs = not isinstance(inputs, Inputs)
        plain = self._torch("float64", None, {})
        self.cotangents = {
            path: stream(seed, f"cotangent/{path}").standard_normal(one.shape)
            for path, one in plain.outputs.items()
            if is_float(one)
        }
        paths = [path for path, one in model.named_modules() if type(one).forward is not torch.nn.Module.forward]
        self.pairs = match_modules(plan, paths, side.paths, modules) if side.has_modules else {}
        self.torch_run = self._torch("float64", self.cotangents, self.pairs)
        for path, one in plain.outputs.items():
            if not np.array_equal(one, self.torch_run.outputs[path], equal_nan=is_float(one)):
                raise PortError(name_of(path), ["watching changes the PyTorch model's output: does it work in place?"])
        self.leaves = side.leaves if weights == "compare" else plan.carried(self.weights)
        shapes = self._flax_forward({})
        self._expect_same_outputs(plain.outputs, shapes.outputs)
        self.flax_run = side.run(self.leaves, self.flax_inputs, dtype="float64", cotangents=self.cotangents)
        self.watched = self._watched(shapes)
        self.findings: blame.Findings = {}
        self.judged: list[str] = []
        self.other: dict[str, dict[str, Array]] = {}
        self._note_what_is_left(model, paths)

    def flax_name(self, flax_model: Any) -> str:
        return type(flax_model).__name__ if self.side.has_modules else getattr(flax_model, "__name__", "a function")

    # ---- running

    def _torch(
        self, dtype: str, cotangents: Arrays | None, paths: Mapping[str, Any], weights: Arrays | None = None
    ) -> TorchRun:
        model = copy.deepcopy(self.model).to(getattr(torch, dtype))
        own = dict(model.named_parameters()) | dict(model.named_buffers())
        with torch.no_grad():
            for name, one in (weights or self.weights).items():
                own[name].copy_(to_torch(in_dtype(one, dtype)))
        inputs = replaced(self.torch_inputs, lambda _, one: to_torch(in_dtype(one, dtype)))
        try:
            return run_torch(model, inputs, cotangents, paths)
        except (TypeError, RuntimeError, IndexError, ValueError) as error:
            given = ", ".join(f"{path} {one.dtype}{list(one.shape)}" for path, one in named(self.torch_inputs))
            raise PortError("inputs", [f"the PyTorch model refuses them ({given}): {error}"]) from error

    def _flax_forward(self, paths: Mapping[str, str]) -> FlaxRun:
        return self.side.run(self.leaves, self.flax_inputs, dtype="float64", paths=paths)

    def _watched(self, plain: FlaxRun) -> FlaxRun | None:
        """The port with its modules watched and nothing replaced, which must change nothing."""
        if not self.side.has_modules:
            return None
        run = self._flax_forward({theirs: ours for ours, theirs in self.pairs.items()})
        for path, one in plain.outputs.items():
            found = run.outputs[path]
            if np.array_equal(one, found, equal_nan=is_float(one)):
                continue
            difference = compare(name_of(path), widened(found), widened(one), bound=0.1 * self.bound)
            if not difference.agrees:
                raise PortError(name_of(path), [f"watching changes the port's output: {difference.describe()}"])
            self.notes.append(f"watching the port changes its rounding: {difference.describe()}")
        return run

    def _substituted(
        self, leaves: Mapping[str, Array], judged: list[str], inputs: dict[str, dict[str, Array]], *, gradients: bool
    ) -> FlaxRun:
        calls = self.torch_run.calls
        used = Substitution(
            {name: calls[name].outputs for name in judged}, {name: calls[name].cotangents for name in judged}, inputs
        )
        if gradients and self.watched is not None:
            with jax.enable_x64(True):
                used.probes = zeros({name: self.watched.calls[name] for name in judged})
        return self.side.run(
            leaves,
            self.flax_inputs,
            dtype="float64",
            cotangents=self.cotangents if gradients else None,
            paths={theirs: ours for ours, theirs in self.pairs.items()},
            substitution=used,
        )

    # ---- the rungs

    def parameters(self) -> Rung:
        """Every leaf used once is the plan's own condition; here the values, and whether they can show their layout."""
        expected = self.plan.carried(self.weights)
        hints: list[str] = []
        if self.kind == "compare":
            compared = [compare(path, self.leaves[path], expected[path], bound=0.0) for path in expected]
            hints = [self._what_it_holds(one, expected) for one in compared if not one.agrees]
        else:
            back = self.plan.brought_back(self.leaves)
            shared = {name for name in back if sum(self.plan.canonical[m.torch] == name for m in self.plan.moves) > 1}
            compared = [
                compare(name, one, widened(self.weights[name]), bound=0.0)
                for name, one in back.items()
                if name not in shared
                or len({m.torch for m in self.plan.moves if self.plan.canonical[m.torch] == name}) == 1
            ]
        rung = rung_of(f"{len(expected)} leaves", compared, [hint for hint in hints if hint])
        wrong = [one.name for one in compared if not one.agrees]
        owners = [source.rpartition(".")[0] for path in wrong for source in self.plan.sources_of(path)]
        rung.culprits = [self._label(path) for path in dict.fromkeys(owners)]
        mute = [
            move.torch
            for move in self.plan.moves
            if _is_square(shape := self.plan.flax_shapes[move.flax])
            and move.target.size == int(np.prod(shape))
            and np.array_equal(expected[move.flax], expected[move.flax].T)
        ]
        if rung.verdict == "agree" and mute:
            rung.verdict = "cannot tell"
            rung.problems = [f"{path}: equals its own transpose, so that its layout shows nowhere" for path in mute]
        if self.kind == "carry" and (found := hidden(self.model, self.weights)):
            rung.notes.append(f'these would hide a mistake; weights="telling" draws others: {", ".join(found)}')
        return rung

    def _what_it_holds(self, one: Comparison, expected: Arrays) -> str:
        """Where the wrong values of a leaf come from, if that can be seen."""
        leaf = self.leaves[one.name]
        wanted = expected[one.name]
        sources = ", ".join(self.plan.sources_of(one.name))
        if leaf.ndim == 2 and leaf.shape == wanted.T.shape and np.array_equal(leaf, wanted.T):
            return f"{one.name} holds {sources} in the other orientation: its layout is wrong"
        for path, other in expected.items():
            if path != one.name and other.shape == leaf.shape and np.array_equal(other, leaf):
                return f"{one.name} holds the values of {', '.join(self.plan.sources_of(path))} instead of {sources}"
        if np.array_equal(np.sort(leaf, axis=None), np.sort(wanted, axis=None)):
            return f"{one.name} holds the values of {sources} in another order"
        return ""

    def forward(self) -> Rung:
        outputs = [
            compare(name_of(path), widened(self.flax_run.outputs[path]), widened(one), bound=self.bound)
            for path, one in self.torch_run.outputs.items()
        ]
        notes: list[str] = []
        if self.watched is not None:
            calls = self.torch_run.calls
            self.judged, notes = blame.comparable(calls, self.watched.calls)
            self.findings = {name: blame.Finding() for name in self.judged}
            run = self._substituted(self.leaves, self.judged, {}, gradients=False)
            while found := blame.handed_otherwise(self.judged, calls, run.calls, self.other):
                self.other |= found
                after = self._substituted(self.leaves, self.judged, self.other, gradients=False)
                blame.blame_callers(self.findings, found, calls, run.calls, after.calls, bound=self.bound)
                run = after
            blame.judge_outputs(self.findings, calls, run.calls, bound=self.bound)
        compared = [*(one for found in self.findings.values() for one in found.forward), *outputs]
        named_culprits = blame.culprits(self.findings, self.torch_run.calls, backward=False)
        handed = [
            f"{self._label(path)} {text}"
            for path, texts in named_culprits.items()
            for text in texts
            if "hands " in text
        ]
        rung = rung_of(f"{len(compared)} outputs", compared, handed)
        rung.notes += notes
        rung.culprits = [self._label(path) for path in named_culprits]
        if rung.verdict == "differ":
            rung.problems = [*self._layout_hints(list(named_culprits)), *rung.problems]
            self._weigh_narrow(rung)
            if rung.verdict == "differ" and not self.side.has_modules:
                rung.notes.append("a function has no modules to look into")
            elif rung.verdict == "differ" and not named_culprits:
                rung.notes.append(
                    "on the same inputs every module agrees: what differs is rounding that grows on the way"
                )
        return rung

    def _layout_hints(self, paths: list[str]) -> list[str]:
        """Square matrices of the culprits that put things right when transposed."""
        flax_paths = [self.pairs[path] for path in paths] if self.side.has_modules else None
        hints = []
        for leaf, shape in self.plan.flax_shapes.items():
            owner = leaf.rpartition(".")[0]
            if not _is_square(shape) or leaf not in self.leaves or (flax_paths is not None and owner not in flax_paths):
                continue
            turned = {**self.leaves, leaf: self.leaves[leaf].T}
            if flax_paths is None:
                run = self.side.run(turned, self.flax_inputs, dtype="float64")
                cured = all(
                    compare(path, widened(run.outputs[path]), widened(one), bound=self.bound).agrees
                    for path, one in self.torch_run.outputs.items()
                )
            else:
                path = paths[flax_paths.index(owner)]
                run = self._substituted(turned, self.judged, self.other, gradients=False)
                findings = {name: blame.Finding() for name in self.judged}
                blame.judge_outputs(findings, self.torch_run.calls, run.calls, bound=self.bound)
                cured = path not in blame.culprits(findings, self.torch_run.calls, backward=False)
            if cured:
                hints.append(f"{owner or 'the model'} agrees when {leaf} is transposed: its layout is wrong")
        return hints

    def gradients(self) -> Rung:
        ours, theirs = self.torch_run.gradients, self.plan.brought_back(self.flax_run.gradients)
        compared = _gradients(ours, theirs, self.gradient_bound)
        problems: list[str] = []
        back, flax_back = self.torch_run.input_gradients, self.flax_run.input_gradients
        if self.same_inputs or set(back) == set(flax_back):
            problems = set_problems("gradient of input", back, flax_back, ("PyTorch", "Flax"))
            compared += [
                compare(f"input {_argument(path)}", widened(flax_back[path]), widened(one), bound=self.gradient_bound)
                for path, one in back.items()
                if path in flax_back
            ]
        if self.findings and self.watched is not None:
            run = self._substituted(self.leaves, self.judged, self.other, gradients=True)
            blame.judge_gradients(
                self.findings,
                self.torch_run.calls,
                run.calls,
                run.pulled,
                (ours, self.plan.brought_back(run.gradients)),
                bound=self.gradient_bound,
            )
            compared += [one for found in self.findings.values() for one in found.backward if "that" in one.name]
        rung = rung_of(f"{len(ours)} parameters, {len(compared) - len(ours)} others", compared, problems)
        rung.culprits = [
            self._label(path) for path in blame.culprits(self.findings, self.torch_run.calls, backward=True)
        ]
        if rung.verdict == "differ" and not self.side.has_modules:
            wrong = [one.name for one in compared if not one.agrees and one.name in ours]
            rung.notes.append(f"no modules to look into; the gradients that differ: {', '.join(wrong)}")
        if rung.verdict == "differ":
            self._weigh_narrow(rung)
        idle = [name for name, one in (ours | {f"input {p}": g for p, g in back.items()}).items() if not np.any(one)]
        if idle:
            rung.notes.append(f"no gradient at all on these inputs: {', '.join(idle)}")
        return rung

    def precision(self, dtypes: Sequence[str]) -> Rung:
        """Errors of both against the float64 truth on weights and inputs rounded to the dtype."""
        pairs: list[ErrorPair] = []
        doubted = False
        for dtype in dtypes:
            draws = [self._errors(dtype, 0)]
            found = self._pairs(dtype, draws)
            if not all(pair.agrees for pair in found):
                doubted = True
                draws += [self._errors(dtype, draw) for draw in range(1, 1 + _DRAWS)]
                found = self._pairs(dtype, draws)
            pairs += found
        rung = rung_of(f"{len(pairs)} pairs of errors", pairs)
        if doubted:
            rung.notes.append(f"beyond a bound at first: {_DRAWS} neighbouring sets of weights were run as well")
        return rung

    def _pairs(self, dtype: str, draws: list[dict[str, list[Comparison]]]) -> list[ErrorPair]:
        return [
            ErrorPair.of(
                f"{name} ({dtype})",
                ("PyTorch", "Flax"),
                errors,
                rounding=_ROUNDING[dtype],
                bound=_RATIO,
                rms_bound=_RMS_RATIO,
                again=[draw[name] for draw in draws[1:]],
            )
            for name, errors in draws[0].items()
        ]

    def _errors(self, dtype: str, draw: int) -> dict[str, list[Comparison]]:
        weights = {
            name: in_dtype(
                one * (1 + 1e-3 * _noise(self.seed, draw, name, one)) if draw and is_float(one) else one, dtype
            )
            for name, one in self.weights.items()
        }
        leaves = self.plan.carried(weights)
        saved = self.torch_inputs, self.flax_inputs
        self.torch_inputs, self.flax_inputs = (replaced(one, lambda _, a: in_dtype(a, dtype)) for one in saved)
        truth = self._torch("float64", self.cotangents, {}, weights)
        one = self._torch(dtype, self.cotangents, {}, weights)
        cotangents = {path: in_dtype(c, dtype) for path, c in self.cotangents.items()}
        other = self.side.run(leaves, self.flax_inputs, dtype=dtype, cotangents=cotangents)
        self.torch_inputs, self.flax_inputs = saved
        scales = sibling_scales({name: widened(g) for name, g in truth.gradients.items()})
        theirs = self.plan.brought_back(other.gradients)
        found = {
            name_of(path): [
                compare(path, widened(run.outputs[path]), widened(expected), bound=1.0) for run in (one, other)
            ]
            for path, expected in truth.outputs.items()
            if path in self.cotangents
        }
        found |= {
            f"gradient of {name}": [
                compare(name, widened(run[name]), widened(expected), bound=1.0, scale=scales[name])
                for run in (one.gradients, theirs)
            ]
            for name, expected in truth.gradients.items()
            if name in theirs
        }
        return found

    # ---- what is said

    def _weigh_narrow(self, rung: Rung) -> None:
        """Where the port is float32 inside whatever it is given, a small difference says nothing."""
        failed = [one for one in rung.comparisons if isinstance(one, Comparison) and not one.agrees]
        if not failed or any(one.problem or one.relative > _NARROW for one in failed):
            return
        if narrow := self.side.narrow(self.flax_inputs, {theirs: ours for ours, theirs in self.pairs.items()}):
            why = (
                f"computes in less than float64 whatever it is given: {', '.join(narrow)}; no mistake shows below that"
            )
            rung.verdict, rung.culprits, rung.problems = "cannot tell", [], [why, *rung.problems]

    def _label(self, path: str) -> str:
        theirs = self.pairs.get(path, path)
        return (path or "the model itself") if path == theirs else f"{path} (Flax: {theirs})"

    def _note_what_is_left(self, model: torch.nn.Module, paths: list[str]) -> None:
        carried = {move.torch for move in self.plan.moves}
        buffers = [name for name, _ in model.named_buffers() if name not in carried]
        own = sorted(self.side.optional - {move.flax for move in self.plan.moves})
        if buffers:
            self.notes.append(f"buffers that stay in PyTorch: {', '.join(buffers)}")
        if own:
            self.notes.append(f"leaves that the port keeps as they are: {', '.join(own)}")
        alone = [path for path in paths if path not in self.pairs]
        if alone and self.side.has_modules:
            self.notes.append(f"modules without partner, looked into as part of the one around: {', '.join(alone)}")

    def _expect_same_outputs(self, ours: Arrays, theirs: Arrays) -> None:
        problems = Problems("outputs", PortError)
        for problem in set_problems("output", map(name_of, ours), map(name_of, theirs), ("PyTorch", "Flax")):
            problems.add(problem)
        for path in ours:
            if path in theirs and ours[path].shape != theirs[path].shape:
                problems.add(
                    f"{name_of(path)}: expected shape {ours[path].shape} as in PyTorch, got {theirs[path].shape}"
                )
        problems.expect(bool(ours), "the PyTorch model gives no array")
        problems.raise_if_any()


def _gradients(ours: Arrays, theirs: Mapping[str, Array], bound: float) -> list[Comparison | ErrorPair]:
    scales = sibling_scales({name: widened(one) for name, one in ours.items()})
    return [
        compare(name, widened(theirs[name]), widened(one), bound=bound, scale=scales[name])
        for name, one in ours.items()
        if name in theirs
    ]


def _check_settings(flax_model: Any, params: Any, weights: str, dtypes: Sequence[str]) -> None:
    problems = Problems("check", PortError)
    is_module = isinstance(flax_model, flax.nnx.Module)
    problems.expect(
        weights in ("carry", "telling", "compare"), f'expected weights "carry", "telling" or "compare", got {weights!r}'
    )
    problems.expect(
        is_module or callable(flax_model), f"expected an nnx.Module or a function, got {type(flax_model).__name__}"
    )
    problems.expect(is_module == (params is None), "expected params with a function, and none with an nnx.Module")
    for dtype in dtypes:
        problems.expect(dtype in _ROUNDING, f"expected precision of {', '.join(_ROUNDING)}, got {dtype!r}")
    problems.raise_if_any()


def _as_call(value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(value, tuple):
        return value, {}
    if isinstance(value, Mapping):
        return (), dict(value)
    if not is_array(value):
        raise PortError("inputs", [f"expected an array, a tuple or a dict, got {type(value).__name__}"])
    return (value,), {}


def _argument(path: str) -> str:
    return path.partition(".")[2]


def name_of(path: str) -> str:
    return f"output {path}" if path else "output"


def _is_square(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[0] == shape[1] > 1


def _noise(seed: int, draw: int, name: str, like: Array) -> Array:
    return stream(seed, f"neighbour {draw}/{name}").standard_normal(like.shape)
