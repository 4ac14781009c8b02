"""How much of a difference is chance: the same model in another order, and its nearest neighbours.

A transformer is unchanged when its features are renumbered: the units of each feed-forward layer, the value features
of each head, the batch rows and, unless fixed sinusoids are added, the features of the residual stream.
The renumbered model is the same function with its sums taken in another order; what comes out otherwise, after the
numbers are put back, is what the order of summation makes of the computation: the noise floor, about 1e-15 in float64.

In low precision most rounding does not depend on the order (products are summed wide and rounded once), and an error
can be large because a single value falls just short of a threshold, of a ReLU say. Whether it is chance shows in
the model's neighbours: weights that differ by about a hundredth, each with a truth of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from twinformer.initializers import stream
from twinformer.parameters import model_parameters
from twinformer.parity.case import Case
from twinformer.parity.compare import FloatArray
from twinformer.parity.twins import Run

Order = npt.NDArray[np.intp]


@dataclasses.dataclass(frozen=True)
class Reordered:
    """A renumbered case, and ``restore``, which puts a run on it back into the first numbering and empties it."""

    case: Case
    restore: Callable[[Run], Run]


def neighbour(case: Case, draw: int) -> Case:
    """The case with every weight changed by up to 2⁻⁶ of itself, in the dtype it has."""

    def moved(path: str, tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
        change = stream(draw, f"neighbour/{path}").uniform(-(2.0**-6), 2.0**-6, tensor.shape)
        return (tensor.astype(np.float64) * (1 + change)).astype(tensor.dtype)

    return dataclasses.replace(case, tensors={path: moved(path, tensor) for path, tensor in case.tensors.items()})


def nudged(case: Case, draw: int = 0) -> Case:
    """The case with every weight moved by one rounding: for a case with a dropout key, whose order has to stay."""
    tensors = {path: _nudged(tensor, stream(draw, f"nudged/{path}")) for path, tensor in case.tensors.items()}
    return dataclasses.replace(case, tensors=tensors)


def reordered(case: Case, draw: int = 1, *, last_place: bool = False) -> Reordered:
    """The case in the ``draw``-th other order, the same for the same ``draw``.

    ``last_place``: every weight is moved by a rounding (2⁻⁵³ of itself) as well, up or down. Some sums have no other
    order (over the features of a query, whose rotation goes by number); what rounding does to those shows in this way.
    Not for a case with a dropout key: what is dropped goes by position and would be something else.
    """
    orders = {path: _orders(path, case, draw) for path in model_parameters(case.config)}
    batch = stream(draw, "reordered/batch").permutation(len(case.cotangent))
    if np.array_equal(batch, np.arange(len(batch))):
        batch = batch[::-1]
    stream_order = _residual(case, draw)
    # the output has the features of the residual stream only without a matrix of a head
    features = stream_order if case.config.head in ("none", "pooled") else np.arange(case.cotangent.shape[-1])
    tensors = {path: tensor[np.ix_(*orders[path])] for path, tensor in case.tensors.items()}
    if last_place:
        tensors = {path: _nudged(tensor, stream(draw, f"nudged/{path}")) for path, tensor in tensors.items()}
    inputs = {
        name: value[batch] if np.ndim(value) == 2 and len(value) == len(batch) else value
        for name, value in case.inputs.items()
    }
    other = dataclasses.replace(case, tensors=tensors, inputs=inputs, cotangent=case.cotangent[batch][..., features])

    def restore(run: Run) -> Run:
        return Run(
            _back(_back(run.output, batch, 0), features, -1),
            {path: _module_back(path, seen, case, batch, draw) for path, seen in _taken(run.modules)},
            {path: _all_back(gradient, orders[path]) for path, gradient in _taken(run.gradients)},
            {path: _module_back(path, seen, case, batch, draw) for path, seen in _taken(run.module_gradients)},
        )

    return Reordered(other, restore)


def _taken(tensors: dict[str, FloatArray]) -> Iterator[tuple[str, FloatArray]]:
    """One after the other, each gone when the next one comes: of a large model two sets are too many."""
    for path in list(tensors):
        yield path, tensors.pop(path)


def _nudged(tensor: npt.NDArray[Any], rng: np.random.Generator) -> npt.NDArray[Any]:
    there = np.where(rng.random(tensor.shape) < 0.5, -np.inf, np.inf)
    moved: npt.NDArray[Any] = np.where(tensor != 0, np.nextafter(tensor, there), tensor)
    return moved


def _residual(case: Case, draw: int) -> Order:
    """Sinusoids are added to the features by number: these cannot be renumbered then."""
    D = case.config.model_dim
    return np.arange(D) if case.config.positions == "sinusoidal" else _shuffled(draw, "residual", D)


def _orders(path: str, case: Case, draw: int) -> tuple[Order, ...]:
    """For each axis of a parameter the order in which its elements are taken."""
    config = case.config
    shape = model_parameters(config)[path].shape
    keep = tuple(np.arange(size) for size in shape)
    residual = _residual(case, draw)
    owner, _, kind = path.rpartition(".")
    parent, _, name = owner.rpartition(".")
    is_bias = kind == "bias"
    if name in ("up", "gate", "down"):
        hidden = _shuffled(draw, f"{parent}/hidden", config.hidden_dim)
        first, second = (residual, hidden) if name == "down" else (hidden, residual)
        return (first,) if is_bias else (first, second)
    if name in ("query", "key", "value", "output"):
        inside = _shuffled(draw, f"{parent}/values", config.value_dim)
        if name == "value":
            rows = _per_head(inside, config.num_kv_heads)
            return (rows,) if is_bias else (rows, residual)
        if name == "output":
            return (residual,) if is_bias else (residual, _per_head(inside, config.num_heads))
        return keep if is_bias else (keep[0], residual)
    if name in ("query_norm", "key_norm", "relative_bias"):
        return keep
    if name == "head":
        return keep if is_bias else (keep[0], residual)
    if name in ("transform", "pooler"):
        return (residual,) if is_bias else (residual, residual)
    return (*keep[:-1], residual)  # tables of embeddings and the norms of the residual stream


def _module_back(path: str, seen: FloatArray, case: Case, batch: Order, draw: int) -> FloatArray:
    """A module's output in the first numbering; what all rows of the batch share has one row."""
    if len(seen) == len(batch):
        seen = _back(seen, batch, 0)
    name = path.partition("#")[0]
    parent, _, last = name.rpartition(".")
    config = case.config
    if last == "value":
        inside = _shuffled(draw, f"{parent}/values", config.value_dim)
        return _back(seen, _per_head(inside, config.num_kv_heads), -1)
    if last in ("up", "gate") or name.endswith("feedforward.dropout"):
        owner = parent if last != "dropout" else name.removesuffix(".dropout")
        return _back(seen, _shuffled(draw, f"{owner}/hidden", config.hidden_dim), -1)
    is_inside_attention = last in ("query", "key", "query_norm", "key_norm", "rotary", "relative_bias")
    if is_inside_attention or name.endswith("attention.dropout"):
        return seen
    if name == "head" and config.head not in ("none", "pooled"):
        return seen
    return _back(seen, _residual(case, draw), -1)


def _per_head(inside: Order, heads: int) -> Order:
    return np.concatenate([head * len(inside) + inside for head in range(heads)])


def _shuffled(draw: int, name: str, size: int) -> Order:
    return stream(draw, f"reordered/{name}").permutation(size)


def _back(array: FloatArray, order: Order, axis: int) -> FloatArray:
    found: FloatArray = np.take(array, np.argsort(order), axis=axis)
    return found


def _all_back(array: FloatArray, orders: tuple[Order, ...]) -> FloatArray:
    back: Any = np.ix_(*(np.argsort(order) for order in orders))
    found: FloatArray = array[back]
    return found
