"""The two systems under judgement behind one interface: NumPy in, NumPy out.

This is the one place of the project that sees both frameworks. A run gives the output, what every module gave
on the way (by path, in the order in which they finished) and, on request, the gradients with respect to
every parameter and to every module's output.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import flax
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import torch
from flax import nnx

import flax_impl
import flax_impl.training as flax_training
import torch_impl
import torch_impl.training as torch_training
from twinformer.checks import dtype_name
from twinformer.config import DType, ModelConfig
from twinformer.data.batch import Batch
from twinformer.errors import WeightsError
from twinformer.learning import TrainingConfig
from twinformer.parity.case import Arrays, Case
from twinformer.parity.compare import FloatArray, widened
from twinformer.parity.decoders import Decoder, FlaxDecoder, TorchDecoder
from twinformer.parity.haste import hurried, little_care
from twinformer.parity.tensors import from_torch, to_torch
from twinformer.parity.training_runs import Trained, fresh, train
from twinformer.parity.writers import Chooser, FlaxChooser, FlaxWriter, TorchChooser, TorchWriter, Writer

Precision = Literal["default", "highest"]
# every module with its output's gradient, or only embeddings, blocks and stacks without
Detail = Literal["modules", "blocks"]
# lengths of prompts are rounded up to this
BUCKET = 8


@dataclass
class Run:
    """What one twin did with a case. Modules are named ``path`` or ``path#n`` from their second call on."""

    output: FloatArray
    modules: dict[str, FloatArray]
    gradients: dict[str, FloatArray] = field(default_factory=dict)
    module_gradients: dict[str, FloatArray] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """One call of one module, as one twin made it: arguments, output and the gradient that came back to it.

    ``arguments`` and ``options`` are the positional and keyword arguments with NumPy in the place of tensors. ``kind``
    is the name of the module's class.
    """

    path: str
    name: str
    kind: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    output: FloatArray
    cotangent: FloatArray


@dataclass(frozen=True)
class Replay:
    """What a twin's module makes of somebody's recorded call; the gradients only where they were asked for."""

    output: FloatArray
    input_gradients: dict[str, FloatArray]
    parameter_gradients: dict[str, FloatArray]
    dtype: str = ""


class Twin(Protocol):
    """One of the two implementations."""

    @property
    def name(self) -> str:
        """The name of its package."""

    @property
    def on_cpu(self) -> bool:
        """Whether it computes on the CPU, where matrix products know one precision only."""

    def leaves(self, case: Case) -> dict[str, npt.NDArray[Any]]:
        """The framework's own leaves after loading, under the framework's own names and layouts."""

    def exported(self, case: Case) -> dict[str, npt.NDArray[Any]]:
        """The leaves as the twin's bridge writes them."""

    def kept(self, case: Case) -> dict[str, npt.NDArray[Any]]:
        """What the bridge wrote, once the model that it wrote has taken other weights."""

    def run(
        self, case: Case, *, gradients: bool = False, precision: Precision = "highest", detail: Detail = "modules"
    ) -> Run:
        """Run the model on the case's inputs."""

    def record(self, case: Case, *, gradients: bool = True) -> list[Call]:
        """Every call of every module, the model itself (path ``""``) last, in the order in which they finished.

        Without ``gradients`` the calls' cotangents are 0.
        """

    def replay(
        self, case: Case, calls: Sequence[Call], *, gradients: bool = True, compiled: bool = True
    ) -> list[Replay]:
        """Make recorded calls with this twin's modules of their paths, and pull the cotangents back through them.

        Not ``compiled``: operation by operation, where a compiler might leave out roundings.
        """

    def plain(self, case: Case) -> FloatArray:
        """The output of a call as a user makes it: unwatched, and compiled where users compile."""

    def drop(self, rate: float, values: npt.NDArray[Any], seed: int) -> FloatArray:
        """What this twin's dropout makes of values, in the dtype that they have."""

    def loss(
        self, logits: npt.NDArray[Any], batch: Batch, smoothing: float, z_loss: float, cotangent: float
    ) -> tuple[FloatArray, FloatArray]:
        """The sum of its cross-entropy, of logits in the dtype that they have, and a cotangent pulled back to them."""

    def next_tokens(self, tokens: npt.NDArray[Any], real: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[Any], ...]:
        """Inputs and targets of language modelling, and where both are real."""

    def refusal(self, case: Case, tensors: Mapping[str, npt.NDArray[Any]]) -> str:
        """What it says of tensors that are not the model's leaves, or hold what is no number; empty if nothing."""

    def save(self, case: Case, directory: Path) -> None:
        """Write the case's model as a model directory with the twin's own means."""

    def loaded(self, directory: Path, dtype: DType | None = None) -> tuple[ModelConfig, dict[str, npt.NDArray[Any]]]:
        """What the twin loads from a model directory, in another dtype if asked, as its bridge gives it back."""

    def fresh(self, case: Case, training: TrainingConfig) -> Arrays:
        """The parameters that its trainer begins with where nobody gives any."""

    def train(
        self,
        case: Case,
        training: TrainingConfig,
        runs: Sequence[Sequence[Sequence[Batch]]],
        *,
        evaluate: bool = True,
        begin: Arrays | None = None,
    ) -> list[Trained]:
        """Runs of one trainer: steps of micro-batches, each from the case's weights, or from ``begin``, where another
        run was left. No module is watched."""

    def decoders(self, case: Case) -> contextlib.AbstractContextManager[Callable[[Case], Decoder]]:
        """Within, what makes decoders of cases that differ from ``case`` in weights and inputs only."""

    def chooser(self, case: Case) -> contextlib.AbstractContextManager[Chooser]:
        """Within, what chooses tokens from logits in the case's dtype."""

    def writers(self, case: Case) -> contextlib.AbstractContextManager[Callable[[Case], Writer]]:
        """Within, what makes writers of such cases."""

    def once(self, what: str, case: Case, ask: Callable[[], Any]) -> Any:
        """``ask()``. A twin that remembers its answers asks once for each ``what`` and case."""

    def versions(self) -> dict[str, str]:
        """The framework's versions and device."""


class TorchTwin:
    """``torch_impl``, eager, watched through forward hooks."""

    name = "torch_impl"
    on_cpu = True

    def _model(self, case: Case, *, as_configured: bool = False) -> torch.nn.Module:
        """Without remat, which hides modules from those who watch; ``as_configured``: with what the case says."""
        model: torch.nn.Module = torch_impl.build(_config(case, as_configured), seed=None)
        torch_impl.load_weights(model, case.tensors, finite=case.finite)
        return model

    def leaves(self, case: Case) -> dict[str, npt.NDArray[Any]]:
        return {path: from_torch(leaf) for path, leaf in self._model(case).state_dict().items()}

    def exported(self, case: Case) -> dict[str, npt.NDArray[Any]]:
        return torch_impl.export_weights(self._model(case))

    def kept(self, case: Case) -> dict[str, npt.NDArray[Any]]:
        return _kept(torch_impl, self._model(case), case)

    def run(
        self, case: Case, *, gradients: bool = False, precision: Precision = "highest", detail: Detail = "modules"
    ) -> Run:
        model = self._model(case)
        inputs = {name: torch.from_numpy(np.array(value)) for name, value in case.inputs.items()}
        calls: dict[str, torch.Tensor] = {}
        with _torch_precision(precision), _torch_watch(model, calls, detail), torch.set_grad_enabled(gradients):
            output = model(**inputs)
            if gradients and detail == "modules":
                for seen in calls.values():
                    if seen.requires_grad:
                        seen.retain_grad()
            if gradients:
                (output.to(torch.float64) * torch.from_numpy(case.cotangent)).sum().backward()
        run = Run(widened(from_torch(output)), {name: widened(from_torch(seen)) for name, seen in calls.items()})
        if gradients:
            for path, parameter in model.named_parameters():
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                run.gradients[path] = widened(from_torch(gradient))
        if gradients and detail == "modules":
            run.module_gradients = {
                name: widened(from_torch(seen.grad)) for name, seen in calls.items() if seen.grad is not None
            }
        return run

    def record(self, case: Case, *, gradients: bool = True) -> list[Call]:
        model = self._model(case)
        inputs = {name: torch.from_numpy(np.array(value)) for name, value in case.inputs.items()}
        kept: dict[str, tuple[str, str, tuple[Any, ...], dict[str, Any], torch.Tensor]] = {}

        def hook(path: str) -> Any:
            def keep(module: Any, arguments: Any, options: Any, output: torch.Tensor) -> torch.Tensor:
                seen = output.clone()
                if gradients:
                    seen.retain_grad()
                kept[_nth(kept, path)] = (path, type(module).__name__, _numpied(arguments), _numpied(options), seen)
                return seen

            return keep

        handles = [
            module.register_forward_hook(hook(path), with_kwargs=True)
            for path, module in model.named_modules()
            if _runs(module)
        ]
        try:
            with torch.set_grad_enabled(gradients):
                output = model(**inputs)
            if gradients:
                (output.to(torch.float64) * torch.from_numpy(case.cotangent)).sum().backward()
        finally:
            for handle in handles:
                handle.remove()
        return [
            Call(
                path,
                name,
                kind,
                arguments,
                options,
                widened(from_torch(seen)),
                widened(from_torch(torch.zeros_like(seen) if seen.grad is None else seen.grad)),
            )
            for name, (path, kind, arguments, options, seen) in kept.items()
        ]

    def replay(
        self, case: Case, calls: Sequence[Call], *, gradients: bool = True, compiled: bool = True
    ) -> list[Replay]:
        model = self._model(case)
        with torch.set_grad_enabled(gradients):
            return [self._replay(model.get_submodule(call.path), call, gradients) for call in calls]

    def _replay(self, module: torch.nn.Module, call: Call, gradients: bool) -> Replay:
        given, structure = _flattened(call)
        made = [to_torch(part) if isinstance(part, np.ndarray) else part for part in given]
        floats = {str(place): part.requires_grad_() for place, part in enumerate(made) if _is_float_tensor(part)}
        arguments, options = jax.tree.unflatten(structure, made)
        output = module(*arguments, **options)
        if not gradients:
            return Replay(widened(from_torch(output)), {}, {}, dtype_name(output))
        parameters = dict(module.named_parameters())
        pulled = torch.autograd.grad(
            output,
            [*floats.values(), *parameters.values()],
            torch.from_numpy(call.cotangent).to(output.dtype),
            allow_unused=True,
            materialize_grads=True,
        )
        found = [widened(from_torch(gradient)) for gradient in pulled]
        return Replay(
            widened(from_torch(output)),
            dict(zip(floats, found[: len(floats)], strict=True)),
            dict(zip(parameters, found[len(floats) :], strict=True)),
            dtype_name(output),
        )

    def plain(self, case: Case) -> FloatArray:
        inputs = {name: torch.from_numpy(np.array(value)) for name, value in case.inputs.items()}
        with torch.no_grad():
            return widened(from_torch(self._model(case)(**inputs)))

    def drop(self, rate: float, values: npt.NDArray[Any], seed: int) -> FloatArray:
        return widened(from_torch(torch_impl.Dropout(rate)(to_torch(values), torch_impl.random_key(seed))))

    def loss(
        self, logits: npt.NDArray[Any], batch: Batch, smoothing: float, z_loss: float, cotangent: float
    ) -> tuple[FloatArray, FloatArray]:
        X = to_torch(logits).requires_grad_()
        targets, real = to_torch(batch.targets), to_torch(batch.real)
        total, _ = torch_impl.cross_entropy(X, targets, real=real, smoothing=smoothing, z_loss=z_loss)
        (slope,) = torch.autograd.grad(total, X, torch.full_like(total, cotangent))
        return widened(from_torch(total)), widened(from_torch(slope))

    def next_tokens(self, tokens: npt.NDArray[Any], real: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[Any], ...]:
        return tuple(part.numpy() for part in torch_impl.next_tokens(to_torch(tokens), to_torch(real)))

    def refusal(self, case: Case, tensors: Mapping[str, npt.NDArray[Any]]) -> str:
        return _refusal(torch_impl, case, tensors)

    def save(self, case: Case, directory: Path) -> None:
        torch_impl.save(self._model(case, as_configured=True), directory)

    def loaded(self, directory: Path, dtype: DType | None = None) -> tuple[ModelConfig, dict[str, npt.NDArray[Any]]]:
        model: Any = torch_impl.load(directory, dtype=dtype)
        return model.config, torch_impl.export_weights(model)

    def fresh(self, case: Case, training: TrainingConfig) -> Arrays:
        return fresh(torch_training.Trainer(case.config, training))

    def train(
        self,
        case: Case,
        training: TrainingConfig,
        runs: Sequence[Sequence[Sequence[Batch]]],
        *,
        evaluate: bool = True,
        begin: Arrays | None = None,
    ) -> list[Trained]:
        trainer = torch_training.Trainer(case.config, training)
        return [train(trainer, case.tensors, lessons, evaluate=evaluate, begin=begin) for lessons in runs]

    @contextlib.contextmanager
    def decoders(self, case: Case) -> Iterator[Callable[[Case], Decoder]]:
        yield lambda case: TorchDecoder(self._model(case))

    @contextlib.contextmanager
    def chooser(self, case: Case) -> Iterator[Chooser]:
        yield TorchChooser()

    @contextlib.contextmanager
    def writers(self, case: Case) -> Iterator[Callable[[Case], Writer]]:
        yield lambda case: TorchWriter(self._model(case), BUCKET)

    def once(self, what: str, case: Case, ask: Callable[[], Any]) -> Any:
        return ask()

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__, "device": "cpu", "threads": str(torch.get_num_threads())}


class FlaxTwin:
    """``flax_impl``, compiled by ``jax.jit``, watched by wrapping the calls of its modules while it is traced."""

    name = "flax_impl"

    def __init__(self) -> None:
        self._programs: dict[tuple[Any, Detail, bool], tuple[Any, Any]] = {}

    @property
    def on_cpu(self) -> bool:
        return jax.default_backend() == "cpu"

    def _model(self, case: Case, *, as_configured: bool = False) -> nnx.Module:
        """Without remat and loops, under which nobody can watch; ``as_configured``: with what the case says."""
        model = flax_impl.models.skeleton(_config(case, as_configured))
        flax_impl.load_weights(model, case.tensors, finite=case.finite)
        return model

    def leaves(self, case: Case) -> dict[str, npt.NDArray[Any]]:
        with _x64(case):
            return _named_leaves(nnx.state(self._model(case)))

    def exported(self, case: Case) -> dict[str, npt.NDArray[Any]]:
        with _x64(case):
            exported: dict[str, npt.NDArray[Any]] = flax_impl.export_weights(self._model(case))
            return exported

    def kept(self, case: Case) -> dict[str, npt.NDArray[Any]]:
        with _x64(case):
            return _kept(flax_impl, self._model(case), case)

    def run(
        self, case: Case, *, gradients: bool = False, precision: Precision = "highest", detail: Detail = "modules"
    ) -> Run:
        setting = None if precision == "default" else precision
        with _x64(case), jax.default_matmul_precision(setting):
            return self._run(case, gradients, detail)

    def _run(self, case: Case, gradients: bool, detail: Detail) -> Run:
        graphdef, state = nnx.split(self._model(case))
        inputs = {name: jnp.asarray(value) for name, value in case.inputs.items()}
        wide = jnp.float64 if case.config.compute_dtype == "float64" else jnp.float32
        cotangent = jnp.asarray(case.cotangent, wide)
        # rung 3 is about what users get; in float64 nobody looks at more than the values
        options = little_care(case.tensors) if case.config.compute_dtype == "float64" else {}
        forward, differentiated = self._program(graphdef, detail, options, case.training)
        if not gradients:
            output, calls = forward(state, inputs, cotangent)
            return Run(widened(np.asarray(output)), {name: widened(np.asarray(seen)) for name, seen in calls.items()})
        probes: Any = ()
        if detail == "modules":
            shapes = jax.eval_shape(forward, state, inputs, cotangent)[1]
            probes = tuple(
                (name, shape.shape, shape.dtype)
                for name, shape in shapes.items()
                if jnp.issubdtype(shape.dtype, jnp.floating)
            )
        (_, (output, calls)), (of_state, of_modules) = differentiated(state, probes, inputs, cotangent)
        run = Run(widened(np.asarray(output)), {name: widened(np.asarray(seen)) for name, seen in calls.items()})
        run.gradients = {path: widened(leaf) for path, leaf in in_pytorch_layout(_named_leaves(of_state)).items()}
        run.module_gradients = {name: widened(np.asarray(leaf)) for name, leaf in of_modules.items()}
        return run

    def _program(
        self, graphdef: Any, detail: Detail, options: dict[str, bool | int], training: bool
    ) -> tuple[Any, Any]:
        """The compiled forward pass and the compiled gradients, kept for other weights and inputs of the same shapes.

        Kept in this object, not for the process: a program outlives the code that it was traced from.
        """
        which = (graphdef, detail, training)
        if which not in self._programs:

            def scalar(state: Any, probes: Any, inputs: Any, cotangent: Any) -> tuple[Any, Any]:
                model = nnx.merge(graphdef, state)
                calls: dict[str, Any] = {}
                with _flax_watch(model, calls, probes, detail), _as_called(training):
                    output = model(**inputs)
                return (output.astype(cotangent.dtype) * cotangent).sum(), (output, calls)

            def differentiated(state: Any, probes: Any, inputs: Any, cotangent: Any) -> Any:
                # made in here, the zeros take no memory
                zeros = {name: jnp.zeros(shape, dtype) for name, shape, dtype in probes}
                return jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True)(state, zeros, inputs, cotangent)

            self._programs[which] = (
                jax.jit(
                    lambda state, inputs, cotangent: scalar(state, {}, inputs, cotangent)[1], compiler_options=options
                ),
                jax.jit(differentiated, static_argnums=1, compiler_options=options),
            )
        return self._programs[which]

    def record(self, case: Case, *, gradients: bool = True) -> list[Call]:
        raise NotImplementedError("calls are recorded in PyTorch, where they are made one by one")

    def replay(
        self, case: Case, calls: Sequence[Call], *, gradients: bool = True, compiled: bool = True
    ) -> list[Replay]:
        with _x64(case), jax.default_matmul_precision("highest"), jax.disable_jit(not compiled):
            model = self._model(case)
            return [self._replay(_submodule(model, call.path), call, gradients, case.training) for call in calls]

    def _replay(self, module: nnx.Module, call: Call, gradients: bool, training: bool) -> Replay:
        graphdef, state = nnx.split(module)
        given, structure = _flattened(call)
        floats, others, constants = {}, {}, []
        for place, part in enumerate(given):
            if not isinstance(part, np.ndarray):
                constants.append((place, part))
            elif np.issubdtype(part.dtype, np.floating):
                floats[str(place)] = jnp.asarray(part)
            else:
                others[str(place)] = jnp.asarray(part)
        static = (graphdef, structure, tuple(constants), training)
        if not gradients:
            output = _called(*static, state, floats, others)
            return Replay(widened(np.asarray(output)), {}, {}, dtype_name(output))
        output, (of_state, of_inputs) = _pulled_back(*static, state, floats, others, jnp.asarray(call.cotangent))
        return Replay(
            widened(np.asarray(output)),
            {name: widened(np.asarray(gradient)) for name, gradient in of_inputs.items()},
            {path: widened(leaf) for path, leaf in in_pytorch_layout(_named_leaves(of_state)).items()},
            dtype_name(output),
        )

    def plain(self, case: Case) -> FloatArray:
        with _x64(case), jax.default_matmul_precision("highest"):
            model: Any = self._model(case)
            return widened(np.asarray(flax_impl.compiled(model)(**case.inputs)))

    def drop(self, rate: float, values: npt.NDArray[Any], seed: int) -> FloatArray:
        with jax.enable_x64(True):
            return widened(np.asarray(flax_impl.Dropout(rate)(jnp.asarray(values), flax_impl.random_key(seed))))

    def loss(
        self, logits: npt.NDArray[Any], batch: Batch, smoothing: float, z_loss: float, cotangent: float
    ) -> tuple[FloatArray, FloatArray]:
        def total(X: Any) -> Any:
            return flax_impl.cross_entropy(X, batch.targets, real=batch.real, smoothing=smoothing, z_loss=z_loss)[0]

        value, pull = jax.vjp(jax.jit(total), jnp.asarray(logits))
        (slope,) = pull(jnp.full_like(value, cotangent))
        return widened(np.asarray(value)), widened(np.asarray(slope))

    def next_tokens(self, tokens: npt.NDArray[Any], real: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[Any], ...]:
        return tuple(np.asarray(part) for part in flax_impl.next_tokens(tokens, real))

    def refusal(self, case: Case, tensors: Mapping[str, npt.NDArray[Any]]) -> str:
        with _x64(case):
            return _refusal(flax_impl, case, tensors)

    def save(self, case: Case, directory: Path) -> None:
        with _x64(case):
            model: Any = self._model(case, as_configured=True)
            flax_impl.save(model, directory)

    def loaded(self, directory: Path, dtype: DType | None = None) -> tuple[ModelConfig, dict[str, npt.NDArray[Any]]]:
        with jax.enable_x64(True):  # for a model in float64; others stay what they are
            model: Any = flax_impl.load(directory, dtype=dtype)
            return model.config, flax_impl.export_weights(model)

    def fresh(self, case: Case, training: TrainingConfig) -> Arrays:
        with _x64(case):
            return fresh(flax_training.Trainer(case.config, training))

    def train(
        self,
        case: Case,
        training: TrainingConfig,
        runs: Sequence[Sequence[Sequence[Batch]]],
        *,
        evaluate: bool = True,
        begin: Arrays | None = None,
    ) -> list[Trained]:
        with _x64(case), hurried(case.tensors), jax.default_matmul_precision("highest"):
            trainer = flax_training.Trainer(case.config, training)
            return [train(trainer, case.tensors, lessons, evaluate=evaluate, begin=begin) for lessons in runs]

    @contextlib.contextmanager
    def decoders(self, case: Case) -> Iterator[Callable[[Case], Decoder]]:
        programs: dict[Any, Any] = {}
        with _x64(case), jax.default_matmul_precision("highest"):
            yield lambda case: FlaxDecoder(self._model(case), programs)

    @contextlib.contextmanager
    def chooser(self, case: Case) -> Iterator[Chooser]:
        with _x64(case):
            yield FlaxChooser(little_care(case.tensors) if case.config.compute_dtype == "float64" else {})

    @contextlib.contextmanager
    def writers(self, case: Case) -> Iterator[Callable[[Case], Writer]]:
        with _x64(case), jax.default_matmul_precision("highest"):
            yield lambda case: FlaxWriter(self._model(case), BUCKET)

    def once(self, what: str, case: Case, ask: Callable[[], Any]) -> Any:
        return ask()

    def versions(self) -> dict[str, str]:
        return {"jax": jax.__version__, "flax": flax.__version__, "device": jax.default_backend()}


def _refusal(twin: Any, case: Case, tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    model = twin.build(case.config, seed=None)
    try:
        twin.load_weights(model, tensors, finite=True)
    except WeightsError as refused:
        return str(refused)
    return ""


def _kept(twin: Any, model: Any, case: Case) -> dict[str, npt.NDArray[Any]]:
    written: dict[str, npt.NDArray[Any]] = twin.export_weights(model)
    twin.load_weights(model, {path: tensor + 1 for path, tensor in case.tensors.items()}, finite=case.finite)
    return written


def _config(case: Case, as_configured: bool) -> ModelConfig:
    return case.config if as_configured else case.config.replace(remat=False, scan_layers=False)


def in_pytorch_layout(leaves: Arrays) -> Arrays:
    """Flax leaves under PyTorch's names and layouts: the judge's own reading of the suffix rules."""
    found: Arrays = {}
    for path, leaf in leaves.items():
        owner, dot, name = path.rpartition(".")
        if name == "kernel":
            found[f"{owner}{dot}weight"] = leaf.T
        elif name in ("scale", "embedding"):
            found[f"{owner}{dot}weight"] = leaf
        else:
            found[path] = leaf
    return found


def _flattened(call: Call) -> tuple[list[Any], Any]:
    """A call's arguments as a list, with the structure to put them together again."""
    return jax.tree.flatten((call.arguments, call.options), is_leaf=lambda part: part is None)


def _numpied(value: Any) -> Any:
    """Arguments with copies in NumPy in the place of tensors."""
    return jax.tree.map(lambda part: np.array(from_torch(part)) if isinstance(part, torch.Tensor) else part, value)


def _is_float_tensor(part: Any) -> bool:
    return isinstance(part, torch.Tensor) and part.is_floating_point()


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _called(graphdef: Any, structure: Any, constants: Any, training: bool, state: Any, floats: Any, others: Any) -> Any:
    """A module's output; modules of one definition and shape compile once."""
    parts = dict(constants) | {int(place): part for place, part in (floats | others).items()}
    arguments, options = jax.tree.unflatten(structure, [parts[place] for place in sorted(parts)])
    with _as_called(training):
        return nnx.merge(graphdef, state)(*arguments, **options)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _pulled_back(
    graphdef: Any,
    structure: Any,
    constants: Any,
    training: bool,
    state: Any,
    floats: Any,
    others: Any,
    cotangent: Any,
) -> Any:
    """A module's output and the cotangent pulled back."""
    output, pull = jax.vjp(
        lambda state, floats: _called(graphdef, structure, constants, training, state, floats, others), state, floats
    )
    return output, pull(cotangent.astype(output.dtype))


def _as_called(training: bool) -> contextlib.AbstractContextManager[None]:
    """Around what is traced: as a trainer calls it, or as everybody does."""
    return flax_impl.linear.first_gradients() if training else contextlib.nullcontext()


def forget_compiled() -> None:
    """Drop every compiled program that outlives a run: a fault that is planted later would not be in it."""
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "flax_impl"]
    for owner in (*modules, sys.modules[__name__]):
        for value in vars(owner).values():
            if callable(getattr(value, "clear_cache", None)):
                value.clear_cache()


def _submodule(model: nnx.Module, path: str) -> Any:
    found: Any = model
    for part in path.split(".") if path else ():
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    return found


def _named_leaves(state: Any) -> Arrays:
    return {".".join(str(part) for part in path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


def _nth(calls: dict[str, Any], path: str) -> str:
    """The name under which the next call of ``path`` is kept."""
    name, n = path, 2
    while name in calls:
        name, n = f"{path}#{n}", n + 1
    return name


def is_block_level(path: str) -> bool:
    """Whether a path is that of an embedding, a stack or a whole block."""
    return "." not in path or path.split(".")[-2] == "blocks"


@contextlib.contextmanager
def _torch_watch(model: torch.nn.Module, calls: dict[str, torch.Tensor], detail: Detail) -> Iterator[None]:
    def hook(path: str) -> Any:
        def keep(module: torch.nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
            # a tensor of its own: a module may return what it was given, whose gradient is another one
            calls[_nth(calls, path)] = seen = output.clone()
            return seen

        return keep

    handles = [
        module.register_forward_hook(hook(path))
        for path, module in model.named_modules()
        if path and _runs(module) and (detail == "modules" or is_block_level(path))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _runs(module: torch.nn.Module) -> bool:
    return not isinstance(module, torch.nn.ModuleList)


@contextlib.contextmanager
def _flax_watch(model: nnx.Module, calls: dict[str, Any], probes: dict[str, Any], detail: Detail) -> Iterator[None]:
    """Keep what each module returns; add ``probes`` (zeros) to it, whose gradients are those of the outputs."""
    paths = {id(module): ".".join(map(str, path)) for path, module in nnx.iter_modules(model) if path}
    originals = {
        cls: cls.__dict__["__call__"]
        for path, module in nnx.iter_modules(model)
        for cls in type(module).__mro__
        if path and "__call__" in cls.__dict__
    }

    def watched(original: Any) -> Any:
        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            output = original(self, *arguments, **options)
            path = paths.get(id(self))
            if path is None or (detail == "blocks" and not is_block_level(path)):
                return output
            name = _nth(calls, path)
            calls[name] = output = output + probes[name] if name in probes else output
            return output

        return call

    for cls, original in originals.items():
        setattr(cls, "__call__", watched(original))  # noqa: B010
    try:
        yield
    finally:
        for cls, original in originals.items():
            setattr(cls, "__call__", original)  # noqa: B010


@contextlib.contextmanager
def _torch_precision(precision: Precision) -> Iterator[None]:
    """PyTorch's own default is the highest precision; asking for it again must not leave a mark."""
    before = torch.get_float32_matmul_precision()
    if precision == "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _x64(case: Case) -> Iterator[None]:
    """64-bit JAX only for a float64 case: others run as users run them, and are compiled as well."""
    is_wide = case.config.compute_dtype == "float64"
    with jax.enable_x64(is_wide), hurried(case.tensors) if is_wide else contextlib.nullcontext():
        yield
