"""Training: a state and some micro-batches go in, one optimizer step later the state comes out.

The modules are the readable definition of the model. Here it is split once, into its structure and plain leaves, and
what runs are compiled functions of arrays, which take the leaves of a state as one tuple (a nested one costs more to
pass than a small step takes) and use its memory again.

A state holds arrays by path, in Flax's orientation, under the names of PyTorch::

    parameters  what is trained: the model's weights, or the adapters
    frozen      the model's weights, where adapters are trained
    optimizer   what flax_impl/optimizers.py keeps; its "step" stays on the host, where the learning rate is looked up
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from jax import Array
from jaxtyping import Float

from flax_impl.dropout import Key, fold, random_key
from flax_impl.linear import Outline, extremes, first_gradients, wide_dtype
from flax_impl.lora import init_adapters, merge
from flax_impl.losses import cross_entropy, mean_loss
from flax_impl.models import skeleton
from flax_impl.optimizers import Optimizer, global_norm
from flax_impl.weights import _leaves, load_weights
from twinformer.checks import FLOATS, INTEGERS, check_cross_entropy, check_tensors, dtype_name
from twinformer.config import ModelConfig
from twinformer.data.batch import Batch
from twinformer.errors import ConfigError, InputError, Problems, WeightsError
from twinformer.initializers import initial_weights
from twinformer.learning import Evaluation, LoraConfig, Metrics, TrainingConfig

State = dict[str, Any]
Leaves = dict[str, Array]  # by path
Flat = tuple[Array, ...]
Values = Array | npt.NDArray[Any]
Arrays = tuple[Mapping[str, Values], Values, Values, Values | None]  # what a batch holds
Sums = tuple[Array, Array, Leaves]  # of losses, of targets, of gradients

_EXCHANGED = {"row": "column", "column": "row"}  # Adafactor's means, of a matrix that is held transposed


class Trainer:
    """What ``twinformer.learning.Trainer`` describes. Nothing is kept but compiled programs.

    ``step`` takes the memory of the state that it is given, which must not be used again. ``compile`` is a choice of
    PyTorch's; here everything is compiled. Raises ConfigError for a model that gives no scores of tokens.
    """

    def __init__(self, config: ModelConfig, training: TrainingConfig, *, compile: bool = False) -> None:
        del compile
        problems = Problems("Trainer", ConfigError)
        problems.expect(
            config.head in ("tied", "untied"),
            f"head: expected 'tied' or 'untied', got {config.head!r}: it predicts no tokens",
        )
        problems.raise_if_any()
        self.config, self.training = config, training
        self._optimizer = Optimizer(training.optimizer)
        self._key = random_key(training.seed)
        self._split()
        # every leaf of a state, as it is held, which is the order in which they are passed, and as it is stored
        self._held, self._stored = self._outline(), self._outline(stored=True)
        self._one_step = jax.jit(self._run_step, donate_argnums=0)
        self._start = jax.jit(self._run_start)
        self._add = jax.jit(self._run_add, donate_argnums=0)
        self._finish = jax.jit(self._run_finish, donate_argnums=0)
        self._judge = jax.jit(self._run_evaluation)

    def init(self, tensors: Mapping[str, Any] | None = None) -> State:
        """The state before the first step, from weights by path in PyTorch's orientation, or freshly drawn ones.

        Raises one WeightsError for all weights that are missing, unexpected, mis-shaped or no floats.
        """
        training = self.training
        model = skeleton(self.config)
        load_weights(model, initial_weights(self.config, training.seed) if tensors is None else tensors)
        weights = {path: leaf.param[...] for path, leaf in _leaves(model)}
        if training.lora is None:
            return _counted({"parameters": weights, "optimizer": self._optimizer.init(weights)}, 0)
        adapters = init_adapters(self._adapted(weights, training.lora), training.lora, training.seed)
        return _counted({"parameters": adapters, "frozen": weights, "optimizer": self._optimizer.init(adapters)}, 0)

    def step(self, state: State, batches: Sequence[Batch]) -> tuple[State, Metrics]:
        """One optimizer step over ``accumulation`` micro-batches, or fewer where the data end. Raises InputError.

        Losses and gradients are summed over the micro-batches, then divided once by the number of targets in all.
        """
        training = self.training
        self._check_batches("Trainer.step", batches, training.accumulation, training.smoothing)
        self._check_state("Trainer.step", state)
        done = int(state["optimizer"]["step"])
        rate = training.schedule.learning_rate(done)
        s, lr = np.int32(done), np.asarray(rate, jax.dtypes.canonicalize_dtype("float64"))
        changing, frozen = self._changing(state), self._frozen(state)
        if training.accumulation == 1:
            changing, seen = self._one_step(changing, frozen, s, lr, _arrays(batches[0]))
        else:
            sums = self._start()
            for place, batch in enumerate(batches):
                sums = self._add(sums, changing, frozen, s, np.int32(place), _arrays(batch))
            changing, seen = self._finish(changing, sums, s, lr)
        loss, norm, count = seen
        return _counted(self._unflatten(changing, frozen), done + 1), Metrics(done, loss, norm, count, rate)

    def evaluate(self, state: State, batch: Batch) -> Evaluation:
        """Without dropout, smoothing and z-loss; with the averaged weights where there are any. Raises InputError."""
        self._check_batches("Trainer.evaluate", [batch], 1, 0.0)
        self._check_state("Trainer.evaluate", state)
        total, count, correct, _ = self._judge(self._changing(state), self._frozen(state), _arrays(batch))
        return Evaluation(total=float(total), count=int(count), correct=int(correct))

    def log_probabilities(self, state: State, batch: Batch) -> npt.NDArray[Any]:
        """``[B, T]``: the natural logarithm of each real target's probability, elsewhere 0; as in ``evaluate``.

        In the wide dtype. Raises InputError.
        """
        self._check_batches("Trainer.log_probabilities", [batch], 1, 0.0)
        self._check_state("Trainer.log_probabilities", state)
        *_, found = self._judge(self._changing(state), self._frozen(state), _arrays(batch))
        return np.asarray(found)

    def export_state(self, state: State) -> dict[str, npt.NDArray[Any]]:
        """All of the state by name (``optimizer/exp_avg/<path>``), a copy in PyTorch's orientation, dtypes kept."""
        self._check_state("Trainer.export_state", state)
        tensors = {
            self._name(place, path): self._stored_form(path, leaf)
            for place in self._held
            for path, leaf in _at(state, place).items()
        }
        return tensors | {"optimizer/step": np.array(state["optimizer"]["step"], np.int64)}

    def import_state(self, tensors: Mapping[str, Any]) -> State:
        """The state that ``export_state`` gave, of either twin, bit for bit.

        Raises one WeightsError for all names that are missing, unexpected, mis-shaped or of another dtype.
        """
        self._check_tensors("Trainer.import_state", tensors)
        # copies, each its own: their memory is given away by the first step
        leaves = {
            place: [jnp.array(self._stored_form(path, tensors[self._name(place, path)])) for path in paths]
            for place, paths in self._held.items()
        }
        frozen = tuple(leaves.pop("frozen", ()))
        changing = tuple(leaf for group in leaves.values() for leaf in group)
        return _counted(self._unflatten(changing, frozen), int(tensors["optimizer/step"]))

    def weights(self, state: State) -> dict[str, npt.NDArray[Any]]:
        """The model's weights for ``write_model``: averaged where there is an average, adapters merged."""
        self._check_state("Trainer.weights", state)
        return {path: self._stored_form(path, leaf) for path, leaf in self._weights(state, averaged=True).items()}

    # ---- the programs

    def _run_step(self, changing: Flat, frozen: Flat, s: Array, lr: Array, arrays: Arrays) -> tuple[Flat, Flat]:
        return self._run_finish(changing, self._sums(changing, frozen, s, 0, arrays), s, lr)

    def _run_start(self) -> Sums:
        """Nothing summed yet."""
        gradients = {path: jnp.zeros(x.shape, wide_dtype(x.dtype)) for path, x in self._held["parameters"].items()}
        return jnp.zeros((), wide_dtype(self.config.compute_dtype)), jnp.zeros((), jnp.int32), gradients

    def _run_add(self, sums: Sums, changing: Flat, frozen: Flat, s: Array, place: Array, arrays: Arrays) -> Sums:
        added: Sums = jax.tree.map(jnp.add, sums, self._sums(changing, frozen, s, place, arrays))
        return added

    def _run_finish(self, changing: Flat, sums: Sums, s: Array, lr: Array) -> tuple[Flat, Flat]:
        """Divide by the number of targets, then update. Beside the leaves: loss, norm of the gradient, number."""
        total, count, gradients = sums
        mean = {
            path: jnp.where(count > 0, g / jnp.maximum(count, 1).astype(g.dtype), 0) for path, g in gradients.items()
        }
        state = _counted(self._unflatten(changing, ()), s)
        state["parameters"], state["optimizer"] = self._optimizer.update(
            state["parameters"], mean, state["optimizer"], lr
        )
        return self._changing(state), (mean_loss(total, count), global_norm(mean), count)

    def _run_evaluation(self, changing: Flat, frozen: Flat, arrays: Arrays) -> Flat:
        _, targets, real, _ = arrays
        logits = self._logits(self._weights(self._unflatten(changing, frozen), averaged=True), arrays, None)
        total, count = cross_entropy(logits, targets, real=real)
        hit = (jnp.argmax(logits, axis=-1) == targets) & ~jnp.any(jnp.isnan(logits), axis=-1)
        # each target's own, beside their sum, which is what training adds up
        logs = jax.nn.log_softmax(logits.astype(wide_dtype(logits.dtype)))
        own = jnp.take_along_axis(logs, jnp.where(real, targets, 0)[..., None], axis=-1)[..., 0]
        return total, count, jnp.sum(hit & real, dtype=jnp.int32), jnp.where(real, own, 0)

    def _sums(self, changing: Flat, frozen: Flat, s: Array, place: Array | int, arrays: Arrays) -> Sums:
        """Loss and targets of one micro-batch, summed, and the gradient of the loss, wide."""
        training, state = self.training, self._unflatten(changing, frozen)
        _, targets, real, _ = arrays
        rng = fold(fold(self._key, s), place) if training.dropout else None

        def loss(parameters: Leaves) -> tuple[Array, Array]:
            logits = self._logits(self._weights({**state, "parameters": parameters}), arrays, rng)
            return cross_entropy(logits, targets, real=real, smoothing=training.smoothing, z_loss=training.z_loss)

        with first_gradients():
            (total, count), gradients = jax.value_and_grad(loss, has_aux=True)(state["parameters"])
        return total, count, {path: g.astype(wide_dtype(g.dtype)) for path, g in gradients.items()}

    def _logits(self, weights: Leaves, arrays: Arrays, rng: Key | None) -> Float[Array, "B T V"]:
        """The model's scores, ``-inf`` where they are not allowed."""
        inputs, _, _, allowed = arrays
        model = nnx.merge(self._graph, jax.tree.unflatten(self._tree, [weights[path] for path in self._order]))
        logits: Array = model(**inputs, rng=rng)
        return logits if allowed is None else jnp.where(allowed, logits, -jnp.inf)

    def _weights(self, state: State, *, averaged: bool = False) -> Leaves:
        """The model's weights: what is trained (or its running average, in the same dtype), or frozen and merged."""
        trained: Leaves = state["parameters"]
        if averaged and "ema" in state["optimizer"]:
            trained = {path: state["optimizer"]["ema"][path].astype(leaf.dtype) for path, leaf in trained.items()}
        if (adapters := self.training.lora) is None:
            return trained
        frozen = state["frozen"]
        return {**frozen, **self._turned(merge(self._adapted(frozen, adapters), trained, adapters))}

    def _adapted(self, weights: Leaves, config: LoraConfig) -> Leaves:
        """The weights that have adapters, in PyTorch's orientation."""
        return self._turned({path: leaf for path, leaf in weights.items() if config.adapts(path)})

    def _turned(self, weights: Leaves) -> Leaves:
        """From Flax's orientation to PyTorch's, and back."""
        return {path: leaf.T if path in self._matrices else leaf for path, leaf in weights.items()}

    # ---- the form of a state

    def _split(self) -> None:
        """The model's structure. Numbers in place of its weights tell in which order the structure wants them."""
        model = skeleton(self.config)
        leaves = dict(_leaves(model))
        self._shapes = {path: (leaf.shape, leaf.param.dtype) for path, leaf in leaves.items()}
        self._matrices = frozenset(path for path, leaf in leaves.items() if leaf.kind == "linear")
        for number, leaf in enumerate(leaves.values()):
            leaf.param.set_value(jnp.asarray(number))
        self._model = model
        arguments = inspect.signature(model.__call__).parameters.values()
        self._arguments = {x.name: x.default is not x.empty for x in arguments if x.name != "rng"}  # may be left out?
        self._graph, numbered = nnx.split(model)
        numbers, self._tree = jax.tree.flatten(numbered)
        self._order = [list(leaves)[int(number)] for number in numbers]

    def _outline(self, *, stored: bool = False) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Shape and dtype of everything but the step, as it is held or (PyTorch's orientation) as it is stored."""

        def outline() -> State:
            tensors = {path: jnp.zeros(*like) for path, like in self._shapes.items()}
            weights = tensors if stored else self._turned(tensors)
            if self.training.lora is None:
                return {"parameters": weights, "optimizer": self._optimizer.init(weights)}
            adapters = init_adapters(tensors, self.training.lora, self.training.seed)
            return {"parameters": adapters, "frozen": weights, "optimizer": self._optimizer.init(adapters)}

        state: State = jax.eval_shape(outline)
        slots = {f"optimizer/{name}": leaves for name, leaves in state.pop("optimizer").items() if name != "step"}
        return {**state, **slots}

    def _changing(self, state: State) -> Flat:
        """The leaves that a step changes."""
        groups = [(_at(state, place), paths) for place, paths in self._held.items() if place != "frozen"]
        return tuple([leaves[path] for leaves, paths in groups for path in paths])

    def _frozen(self, state: State) -> Flat:
        return tuple([state["frozen"][path] for path in self._held.get("frozen", ())])

    def _unflatten(self, changing: Flat, frozen: Flat) -> State:
        """The state of these leaves, without the step."""
        state: State = {"optimizer": {}}
        rest = iter(changing)
        for place, paths in self._held.items():
            group, _, slot = place.partition("/")
            owner = state[group] if slot else state
            owner[slot or group] = dict(zip(paths, frozen if group == "frozen" else rest, strict=False))
        return state

    def _name(self, place: str, path: str) -> str:
        """What a leaf of a state is called where it is stored."""
        group, _, slot = place.partition("/")
        if slot in _EXCHANGED and path in self._matrices:
            return f"{group}/{_EXCHANGED[slot]}/{path}"
        return f"{place}/{path}"

    def _stored_form(self, path: str, leaf: Any) -> npt.NDArray[Any]:
        """A copy in PyTorch's orientation of a leaf in Flax's, or the other way round."""
        return np.array(np.asarray(leaf).T if path in self._matrices else leaf, order="C")

    # ---- checks, all before anything is changed

    def _check_state(self, where: str, state: State) -> None:
        """Every leaf is there, and none besides."""
        problems = Problems(where, InputError)
        places = {name for name in state if name != "optimizer"}
        places |= {f"optimizer/{name}" for name in state.get("optimizer", {})}
        for place in sorted({*places, *self._held, "optimizer/step"}):
            if place not in places:
                problems.add(f"state: {place}: missing")
            elif place in self._held:
                paths, wanted = _at(state, place).keys(), self._held[place].keys()
                if paths != wanted:
                    problems.found += [f"state: {place}: {path}: missing" for path in sorted(wanted - paths)]
                    problems.found += [f"state: {place}: {path}: unexpected" for path in sorted(paths - wanted)]
            else:
                problems.expect(place == "optimizer/step", f"state: {place}: unexpected")
        problems.raise_if_any()

    def _check_tensors(self, where: str, tensors: Mapping[str, Any]) -> None:
        problems = Problems(where, WeightsError)
        wanted = {f"{place}/{path}": x for place, leaves in self._stored.items() for path, x in leaves.items()}
        step = tensors.get("optimizer/step")
        try:
            leaves = {name: tensor for name, tensor in tensors.items() if name != "optimizer/step"}
            check_tensors(where, leaves, {name: like.shape for name, like in wanted.items()})
        except WeightsError as error:
            problems.found += error.problems
        for name in sorted(wanted.keys() & tensors.keys()):
            want, got = str(wanted[name].dtype), dtype_name(tensors[name])
            problems.expect(want == got or got not in FLOATS, f"{name}: expected dtype {want}, got {got}")
        if step is None:
            problems.add("optimizer/step: missing, expected shape ()")
        else:
            whole = tuple(step.shape) == () and dtype_name(step) in INTEGERS and 0 <= int(step) < 2**31
            problems.expect(whole, f"optimizer/step: expected a whole number from 0, got {step!r}")
        problems.raise_if_any()

    def _check_batches(self, where: str, batches: Sequence[Batch], most: int, smoothing: float) -> None:
        problems = Problems(where, InputError)
        wanted = "one batch" if most == 1 else f"1 to {most} batches"
        problems.expect(1 <= len(batches) <= most, f"batches: expected {wanted}, got {len(batches)}")
        for i, batch in enumerate(batches):
            try:
                self._check_batch(batch, smoothing)
            except InputError as error:
                problems.found += [f"batches[{i}]: {problem}" for problem in error.problems]
        problems.raise_if_any()

    def _check_batch(self, batch: Batch, smoothing: float) -> None:
        problems = Problems("batch", InputError)
        V, arguments = self.config.vocab_size, self._arguments
        for name in batch.inputs:
            problems.expect(name in arguments, f"inputs: {name}: unexpected by {type(self._model).__name__}")
        for name, optional in arguments.items():
            problems.expect(optional or name in batch.inputs, f"inputs: {name}: missing")
        if batch.allowed is not None:
            shape = batch.allowed.shape
            problems.expect(shape[2] == V, f"allowed: expected shape [B, T, V] with V={V}, got {shape}")
            problems.expect(smoothing == 0, f"smoothing: expected 0 where tokens are not allowed, got {smoothing}")
        problems.raise_if_any()
        self._model._check(**batch.inputs)
        read = batch.inputs["target" if "target" in arguments else "tokens"]
        lowest, highest = extremes(np.asarray(batch.targets)[np.asarray(batch.real)])
        check_cross_entropy(
            "batch",
            logits=Outline((*read.shape, V), self.config.compute_dtype),
            targets=batch.targets,
            real=batch.real,
            lowest=lowest,
            highest=highest,
        )


def _at(state: State, place: str) -> Any:
    group, _, slot = place.partition("/")
    return state[group][slot] if slot else state[group]


def _counted(state: State, step: int | Array) -> State:
    """With the number of steps done. A number is kept on the host, where asking for it waits for nothing."""
    count = np.asarray(step, np.int32) if isinstance(step, int) else step
    return {**state, "optimizer": {**state["optimizer"], "step": count}}


def _arrays(batch: Batch) -> Arrays:
    """Copies: a program that has not run yet reads the very memory that it was given, which may be used again.

    Whole numbers are narrowed, for the program to be the same and no slower where JAX has 64 bits.
    """
    inputs = {name: _copy(value) for name, value in batch.inputs.items()}
    return inputs, _copy(batch.targets), _copy(batch.real), None if batch.allowed is None else _copy(batch.allowed)


def _copy(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.array(values, np.int32 if dtype_name(values) in INTEGERS else None)
