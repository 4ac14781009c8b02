"""A training step: losses and gradients of micro-batches added up, divided once, and given to the optimizer.

The state goes in and comes out, a mapping of plain tensors: ``{"parameters": {path: tensor}, "optimizer": …}``. With
adapters (``lora.py``) ``parameters`` are the adapters, and ``frozen`` holds the model's weights.
"""

import contextlib
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from torch_impl.dropout import Key, fold, random_key
from torch_impl.heads import check_writes
from torch_impl.linear import DTYPES, wide_dtype
from torch_impl.lora import adapter_shapes, init_adapters, merge
from torch_impl.losses import cross_entropy, mean_loss
from torch_impl.models import build
from torch_impl.optimizers import Optimizer, global_norm
from torch_impl.weights import _array, _tensor, load_weights
from twinformer.checks import INTEGERS, dtype_name
from twinformer.config import ModelConfig
from twinformer.data.batch import Batch
from twinformer.errors import InputError, Problems, WeightsError
from twinformer.learning import Evaluation, Metrics, TrainingConfig

Tensors = dict[str, Float[Tensor, "..."]]
State = dict[str, Any]


class Trainer:
    """Trains the model of ``config`` as ``training`` says; ``twinformer.learning.Trainer`` describes the methods.

    It holds its configs, the model's structure without weights and, with ``compile``, the program of the loss and its
    gradients (``torch.compile``, fullgraph). Weights and work are on ``device``. The same state and batches give the
    same bits. Raises ConfigError for a model without a head, and for adapters that fit no weight.
    """

    def __init__(
        self,
        config: ModelConfig,
        training: TrainingConfig,
        *,
        compile: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        check_writes("Trainer", config)
        self.config = config
        self.training = training
        self.device = torch.device("cpu" if device is None else device)
        self._key = random_key(training.seed)
        self._optimizer = Optimizer(training.optimizer)
        self._model = build(config, seed=None).to(self.device)
        self._shapes = {path: tuple(weight.shape) for path, weight in self._model.named_parameters()}
        self._trained = self._shapes if training.lora is None else adapter_shapes(self._shapes, training.lora)
        arguments = inspect.signature(self._model.forward).parameters.values()
        self._arguments = {a.name: a.default is a.empty for a in arguments if a.name != "rng"}  # is it needed?
        self._owners = {
            f"{prefix}.{name}".removeprefix("."): (owner, name)
            for prefix, owner in self._model.named_modules()
            for name, _ in owner.named_parameters(recurse=False)
        }
        self._put({path: torch.empty(shape, device="meta") for path, shape in self._shapes.items()})
        self._loss = _compiled(self._eager_loss) if compile else self._eager_loss
        self._is_compiled = compile

    def init(self, tensors: Mapping[str, Any] | None = None) -> State:
        """The state before the first step, from a copy of ``tensors`` by path, or from the config's initializer.

        Raises WeightsError as ``load_weights`` does.
        """
        model = build(self.config, seed=self.training.seed if tensors is None else None)
        if tensors is not None:
            load_weights(model, tensors)
        weights = {path: weight.detach().to(self.device) for path, weight in model.named_parameters()}
        if self.training.lora is None:
            return {"parameters": weights, "optimizer": self._optimizer.init(weights)}
        adapters = init_adapters(weights, self.training.lora, self.training.seed)
        return {"parameters": adapters, "frozen": weights, "optimizer": self._optimizer.init(adapters)}

    def step(self, state: State, batches: Sequence[Batch]) -> tuple[State, Metrics]:
        """One optimizer step over ``accumulation`` micro-batches, or fewer at the end of the data.

        Learning rate and dropout masks are those of the step, counted from 0. The state's tensors are changed in
        place. Raises InputError, with nothing changed, for batches that do not fit the model.
        """
        most = self.training.accumulation
        if not 1 <= len(batches) <= most:
            wanted = "1" if most == 1 else f"1 to {most}"
            raise InputError("Trainer.step", [f"batches: expected {wanted}, got {len(batches)}"])
        self._check("Trainer.step", batches, smoothing=self.training.smoothing)
        parameters, optimizer = state["parameters"], state["optimizer"]
        self._optimizer._check(parameters, parameters, optimizer, 0.0)
        number, count = int(optimizer["step"]), sum(batch.count for batch in batches)
        lr = self.training.schedule.learning_rate(number)
        total, gradients = self._sums(state, batches, fold(self._key, number))
        for gradient in gradients.values():
            gradient.div_(count) if count else gradient.zero_()
        norm = global_norm(gradients)
        parameters, optimizer = self._optimizer._advance(parameters, gradients, optimizer, lr, norm)
        metrics = Metrics(number, mean_loss(total, count), norm, count, lr)
        return {**state, "parameters": parameters, "optimizer": optimizer}, metrics

    @torch.no_grad()
    def evaluate(self, state: State, batch: Batch) -> Evaluation:
        """Sums over the batch's targets, of the weights that ``weights`` gives: no dropout, smoothing and z-loss.

        Raises InputError for a batch that does not fit the model.
        """
        self._check("Trainer.evaluate", [batch], smoothing=0.0)
        inputs, targets, real, allowed = self._native(batch)
        with self._weights_in_place(self._final(state)):
            logits = self._logits(inputs, allowed, None)
        total, count = cross_entropy(logits, targets, real=real)
        # the first of equals; a row with NaN has none
        correct = (logits.argmax(-1) == targets) & real & ~logits.isnan().any(-1)
        return Evaluation(float(total), int(count), int(correct.sum()))

    @torch.no_grad()
    def log_probabilities(self, state: State, batch: Batch) -> npt.NDArray[Any]:
        """``[B, T]``, wide: ``ln p[target]``, of the weights that ``weights`` gives; 0 where a target does not count.

        Minus their sum is the total that ``evaluate`` gives. Raises InputError for a batch that does not fit the model.
        """
        self._check("Trainer.log_probabilities", [batch], smoothing=0.0)
        inputs, targets, real, allowed = self._native(batch)
        with self._weights_in_place(self._final(state)):
            logits = self._logits(inputs, allowed, None)
        # what stands where no target counts is no token, and may be out of range
        chosen = torch.where(real, targets, 0)[..., None].long()
        logs = logits.to(wide_dtype(logits.dtype)).log_softmax(-1).gather(-1, chosen)[..., 0]
        return _array(torch.where(real, logs, 0).cpu())

    def export_state(self, state: State) -> dict[str, npt.NDArray[Any]]:
        """All of the state as copies in NumPy: ``parameters/<path>``, ``frozen/<path>``, ``optimizer/<slot>/<path>``,
        and ``optimizer/step``, an int64.
        """
        arrays: dict[str, npt.NDArray[Any]] = {"optimizer/step": np.array(state["optimizer"]["step"], np.int64)}
        for name, tensor in _flat(state).items():
            arrays[name] = _array(tensor.detach().cpu())
        return arrays

    def import_state(self, tensors: Mapping[str, Any]) -> State:
        """The state that ``export_state`` gave, bit for bit.

        Raises one WeightsError with every name that is missing, unexpected, or of another shape or dtype.
        """
        wanted = self._wanted()
        _check_state(wanted, tensors)
        state: State = {"parameters": {}, "optimizer": {"step": int(tensors["optimizer/step"])}}
        for name in wanted:
            group, _, path = name.rpartition("/")
            place = state
            for part in group.split("/"):
                place = place.setdefault(part, {})
            # a clone: how PyTorch aligns its memory is part of how it rounds
            place[path] = _tensor(tensors[name]).clone().to(self.device)
        return state

    def weights(self, state: State) -> dict[str, npt.NDArray[Any]]:
        """The model's weights in NumPy, for ``write_model``: averaged where there is an average, adapters merged."""
        return {path: _array(weight.detach().cpu()) for path, weight in self._final(state).items()}

    # ---- the loss and its gradients

    def _sums(self, state: State, batches: Sequence[Batch], key: Key) -> tuple[Float[Tensor, ""], Tensors]:
        """The sum of all losses and its gradients, wide."""
        total = torch.zeros((), device=self.device)
        sums: Tensors = {}
        for m, batch in enumerate(batches):
            loss, gradients = self._gradients(state, batch, fold(key, m))
            total = total + loss
            for path, gradient in gradients.items():
                sums[path] = sums[path].add_(gradient) if path in sums else gradient
        return total, sums

    def _gradients(self, state: State, batch: Batch, key: Key) -> tuple[Float[Tensor, ""], Tensors]:
        """The sum of one batch's losses and its gradients, wide, each in memory of its own."""
        leaves = {path: w.detach().requires_grad_() for path, w in state["parameters"].items()}
        weights = leaves
        if self.training.lora is not None:
            weights = merge(state["frozen"], leaves, self.training.lora)
        config = self.config
        rates = (config.dropout, config.attention_dropout, config.hidden_dropout, config.embedding_dropout or 0.0)
        drops = self.training.dropout and any(rates)
        with self._weights_in_place(weights):  # in the backward pass too: remat runs the blocks again
            loss = self._loss(*self._native(batch), key if drops else None)
            found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        return loss.detach(), dict(zip(leaves, _owned(found), strict=True))

    def _eager_loss(
        self,
        inputs: dict[str, Tensor],
        targets: Integer[Tensor, "B T"],
        real: Bool[Tensor, "B T"],
        allowed: Bool[Tensor, "B T V"] | None,
        rng: Key | None,
    ) -> Float[Tensor, ""]:
        logits = self._logits(inputs, allowed, rng)
        smoothing, z_loss = self.training.smoothing, self.training.z_loss
        return cross_entropy(logits, targets, real=real, smoothing=smoothing, z_loss=z_loss)[0]

    def _logits(
        self, inputs: dict[str, Tensor], allowed: Bool[Tensor, "B T V"] | None, rng: Key | None
    ) -> Float[Tensor, "B T V"]:
        logits: Tensor = self._model(**inputs, rng=rng)
        return logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)

    # ---- weights

    def _final(self, state: State) -> Tensors:
        """The weights that the state stands for, in param_dtype."""
        weights = state["optimizer"].get("ema", state["parameters"])
        if self.training.lora is not None:
            return merge(state["frozen"], weights, self.training.lora)
        return {path: weight.to(DTYPES[self.config.param_dtype]) for path, weight in weights.items()}

    @contextlib.contextmanager
    def _weights_in_place(self, weights: Tensors) -> Iterator[None]:
        """Within, the model has these weights; afterwards none. They may be results of a computation."""
        before = self._put(weights)
        try:
            yield
        finally:
            self._put(before)

    def _put(self, weights: Mapping[str, Tensor]) -> Tensors:
        # as torch.func.functional_call does, which looks for all parameters and buffers anew at every call
        before = {}
        for path, (owner, name) in self._owners.items():
            before[path] = owner._parameters[name]
            owner._parameters[name] = weights[path]
        return before

    def _wanted(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of everything that a state holds, besides the step, by its name in ``export_state``."""
        dtype = DTYPES[self.config.param_dtype]
        empty = {path: torch.empty(shape, dtype=dtype, device="meta") for path, shape in self._trained.items()}
        state: State = {"parameters": empty, "optimizer": self._optimizer.init(empty)}
        if self.training.lora is not None:
            state["frozen"] = {p: torch.empty(s, dtype=dtype, device="meta") for p, s in self._shapes.items()}
        return {name: (tuple(tensor.shape), dtype_name(tensor)) for name, tensor in _flat(state).items()}

    # ---- batches

    def _native(
        self, batch: Batch
    ) -> tuple[dict[str, Tensor], Integer[Tensor, "B T"], Bool[Tensor, "B T"], Bool[Tensor, "B T V"] | None]:
        inputs = {name: self._tensor(array) for name, array in batch.inputs.items()}
        allowed = None if batch.allowed is None else self._tensor(batch.allowed)
        return inputs, self._tensor(batch.targets), self._tensor(batch.real), allowed

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        return _tensor(array).to(self.device)

    def _check(self, where: str, batches: Sequence[Batch], *, smoothing: float) -> None:
        """Raise InputError for batches that the model cannot be called with, or whose loss has no meaning."""
        read = "target" if self.config.architecture == "encoder-decoder" else "tokens"
        V = self.config.vocab_size
        problems = Problems(where, InputError)
        for m, batch in enumerate(batches):
            at = "" if len(batches) == 1 else f"batch {m}: "
            for name, is_needed in self._arguments.items():
                problems.expect(not is_needed or name in batch.inputs, f"{at}inputs: {name}: missing")
            for name in batch.inputs:
                is_known = name in self._arguments
                problems.expect(is_known, f"{at}inputs: {name}: not an argument of {type(self._model).__name__}")
            if read in batch.inputs:
                want, got = batch.inputs[read].shape, batch.targets.shape
                problems.expect(want == got, f"{at}targets: expected the shape of {read} {want}, got {got}")
            ids = batch.targets[batch.real]
            if ids.size and not (ids.min() >= 0 and ids.max() < V):
                problems.add(f"{at}targets: expected ids from 0 to {V - 1}, got {ids.min()} to {ids.max()}")
            if batch.allowed is not None:
                got = batch.allowed.shape
                problems.expect(got[-1] == V, f"{at}allowed: expected [B, T, V] with V={V}, got shape {got}")
                problems.expect(smoothing == 0, f"{at}allowed: expected None with smoothing={smoothing}, got a mask")
        problems.raise_if_any()
        if self._is_compiled:  # values cannot be seen in there
            for batch in batches:
                self._model._check(**self._native(batch)[0])


def _compiled(function: Callable[..., Tensor], backend: str = "inductor") -> Callable[..., Tensor]:
    def run(*args: Any) -> Tensor:
        return function(*args)

    # PyTorch keeps and counts programs by code object: this one is the trainer's own
    run = types.FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)
    program = torch.compile(run, fullgraph=True, backend=backend)

    def call(*args: Any) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=64):  # with and without masks: 8 is too few
            loss: Tensor = program(*args)
        return loss

    return call


def _owned(gradients: Sequence[Float[Tensor, "..."]]) -> list[Float[Tensor, "..."]]:
    """Wide and contiguous, no two in the same memory, so that they can be changed in place.

    Autograd promises none of it: its gradients of a and b in ``a + b`` are one tensor.
    """
    seen: set[int] = set()
    owned = []
    for gradient in gradients:
        wide = gradient.to(wide_dtype(gradient.dtype)).contiguous()
        memory = wide.untyped_storage().data_ptr()
        owned.append(wide.clone() if memory in seen else wide)
        seen.add(memory)
    return owned


def _flat(state: State) -> Tensors:
    """The tensors of a state by their names in ``export_state``."""
    groups: dict[str, Tensors] = {name: state[name] for name in ("parameters", "frozen") if name in state}
    groups |= {f"optimizer/{slot}": leaves for slot, leaves in state["optimizer"].items() if slot != "step"}
    return {f"{group}/{path}": tensor for group, leaves in groups.items() for path, tensor in leaves.items()}


def _check_state(wanted: Mapping[str, tuple[tuple[int, ...], str]], tensors: Mapping[str, Any]) -> None:
    problems = Problems("Trainer.import_state", WeightsError)
    for name, (shape, kind) in wanted.items():
        if name not in tensors:
            problems.add(f"{name}: missing, expected {kind} of shape {shape}")
            continue
        got, found = tuple(tensors[name].shape), dtype_name(tensors[name])
        problems.expect(
            (got, found) == (shape, kind), f"{name}: expected {kind} of shape {shape}, got {found} of shape {got}"
        )
    for name in tensors:
        problems.expect(name in wanted or name == "optimizer/step", f"{name}: unexpected")
    step = tensors.get("optimizer/step")
    is_number = step is not None and tuple(step.shape) == () and dtype_name(step) in INTEGERS and step >= 0
    problems.expect(is_number, f"optimizer/step: expected a whole number from 0, got {step!r}")
    problems.raise_if_any()
