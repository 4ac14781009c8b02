"""A PyTorch model watched call by call, and a Flax port whose modules are each given what PyTorch's were given.

The port computes with its own modules, but every module's output is replaced by what PyTorch's module gave, and on
the way back every module gets the cotangent that PyTorch's got. So each is judged on the same inputs and cotangents,
however much differs around it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from twinformer.parity.values import Array, Arrays, is_float, named, replaced, to_numpy


@dataclass
class Call:
    """One call of one module: arrays in and out in the order in which they stand in the call.

    ``whole`` are the inputs that are whole numbers. ``pulled`` are the gradients that this call sends to its
    floating-point inputs, ``cotangents`` those that come back to its outputs.
    """

    path: str
    caller: str
    inputs: list[Any] = field(default_factory=list)
    whole: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    pulled: list[Any] = field(default_factory=list)
    cotangents: list[Any] = field(default_factory=list)


Calls = dict[str, Call]


def name_of_call(calls: Mapping[str, Any], path: str) -> str:
    """The name under which the next call of ``path`` is kept: ``path#2`` for the second."""
    name, n = path, 2
    while name in calls:
        name, n = f"{path}#{n}", n + 1
    return name


@contextlib.contextmanager
def torch_watched(model: torch.nn.Module, paths: Mapping[str, Any]) -> Iterator[Calls]:
    """Record every call of the modules in ``paths``; ``finish`` turns what was kept into NumPy after backward."""
    calls: Calls = {}
    active: list[str] = []

    def before(path: str) -> Any:
        def hook(module: Any, arguments: Any, options: Any) -> Any:
            name = name_of_call(calls, path)
            calls[name] = call = Call(path, active[-1] if active else "")
            active.append(name)

            def take(_: str, tensor: torch.Tensor) -> torch.Tensor:
                if tensor.is_floating_point():
                    tensor = _of_its_own(tensor)
                    call.inputs.append(tensor)
                elif tensor.dtype != torch.bool:
                    call.whole.append(tensor.clone())
                return tensor

            return replaced((arguments, options), take)

        return hook

    def after(path: str) -> Any:
        def hook(module: Any, arguments: Any, options: Any, output: Any) -> Any:
            name = active.pop()
            calls[name] = call = calls.pop(name)  # in the order in which they finish

            def give(_: str, tensor: torch.Tensor) -> torch.Tensor:
                if tensor.is_floating_point():
                    tensor = _of_its_own(tensor)
                    call.outputs.append(tensor)
                return tensor

            return replaced(output, give)

        return hook

    handles: list[Any] = []
    for path in paths:
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
        handles.append(module.register_forward_hook(after(path), with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _of_its_own(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of this call alone, whose gradient is that of this call and no other."""
    if not torch.is_grad_enabled():
        return tensor.clone()
    if not tensor.requires_grad:
        tensor = tensor.detach().requires_grad_()
    own = tensor.clone()
    own.retain_grad()
    return own


def finished(calls: Calls) -> Calls:
    """The recorded calls in NumPy; where no gradient came it is zero."""

    def gradient(tensor: torch.Tensor) -> Array:
        grad = tensor.grad if tensor.requires_grad else None
        return to_numpy(torch.zeros_like(tensor) if grad is None else grad)

    return {
        name: Call(
            call.path,
            call.caller,
            [to_numpy(one) for one in call.inputs],
            [to_numpy(one) for one in call.whole],
            [to_numpy(one) for one in call.outputs],
            [gradient(one) for one in call.inputs],
            [gradient(one) for one in call.outputs],
        )
        for name, call in calls.items()
    }


@jax.custom_vjp
def _stand_in(own: Any, recorded: Any, cotangent: Any) -> Any:
    """``recorded`` in the place of ``own``; backward ``own`` gets ``cotangent``, whatever comes."""
    return recorded


def _stand_in_forward(own: Any, recorded: Any, cotangent: Any) -> Any:
    return recorded, cotangent


def _stand_in_backward(cotangent: Any, _: Any) -> Any:
    return cotangent, jnp.zeros_like(cotangent), jnp.zeros_like(cotangent)


_stand_in.defvjp(_stand_in_forward, _stand_in_backward)


@jax.custom_vjp
def _handed(own: Any, recorded: Any) -> Any:
    """``recorded`` in the place of ``own``, with the gradient passed on as if nothing had been replaced."""
    return recorded


_handed.defvjp(lambda own, recorded: (recorded, None), lambda _, g: (g, jnp.zeros_like(g)))


@dataclass
class Substitution:
    """What stands in for what. All by the name of the call, in the order of its arrays.

    ``inputs``: for each call the places of its inputs that are replaced, with what replaces them. ``probes`` are zeros
    added to inputs and outputs, whose gradients tell what is sent back there.
    """

    outputs: dict[str, list[Any]] = field(default_factory=dict)
    cotangents: dict[str, list[Any]] = field(default_factory=dict)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    probes: dict[str, Any] = field(default_factory=dict)
    # what stood in: backward goes through each even where nothing downstream asks for it
    stood_in: list[Any] = field(default_factory=list)


@contextlib.contextmanager
def flax_watched(model: nnx.Module, paths: Mapping[str, str], substitution: Substitution) -> Iterator[Calls]:
    """Keep what the modules in ``paths`` (Flax path to PyTorch path) are given and give, with the substitution."""
    known = {
        id(module): paths[path]
        for path, module in ((".".join(map(str, parts)), module) for parts, module in nnx.iter_modules(model))
        if path in paths
    }
    classes = {type(module) for _, module in nnx.iter_modules(model) if id(module) in known}
    originals = {cls: cls.__dict__["__call__"] for one in classes for cls in one.__mro__ if "__call__" in cls.__dict__}
    calls: Calls = {}
    active: list[tuple[int, str]] = []
    state_of_trace: Any = jax.extend.core.get_opaque_trace_state
    trace = state_of_trace()

    def watched(original: Any) -> Any:
        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            is_inside = any(number == id(self) for number, _ in active)  # a call of the class above
            # inside a transformation of its own a module's values cannot be taken out
            if id(self) not in known or is_inside or state_of_trace() != trace:
                return original(self, *arguments, **options)
            path = known[id(self)]
            name = name_of_call(calls, path)
            calls[name] = seen = Call(path, active[-1][1] if active else "")
            arguments, options = replaced((arguments, options), lambda _, one: _taken(name, seen, one, substitution))
            active.append((id(self), name))
            with jax.named_scope(f"<{path}>"):
                output = original(self, *arguments, **options)
            active.pop()
            return replaced(output, lambda _, one: _given(name, seen, one, substitution))

        return call

    for cls, original in originals.items():
        setattr(cls, "__call__", watched(original))  # noqa: B010
    try:
        yield calls
    finally:
        for cls, original in originals.items():
            setattr(cls, "__call__", original)  # noqa: B010


def _taken(name: str, seen: Call, one: Any, substitution: Substitution) -> Any:
    """An array on its way into a module."""
    if not is_float(one):
        if one.dtype != bool:
            seen.whole.append(one)
        return one
    place = str(len(seen.inputs))
    seen.inputs.append(one)
    if place in substitution.inputs.get(name, {}):
        one = _handed(one, substitution.inputs[name][place].astype(one.dtype))
    probe = substitution.probes.get(f"{name}<{place}")
    return one if probe is None else one + probe


def _given(name: str, seen: Call, one: Any, substitution: Substitution) -> Any:
    """An array on its way out of a module."""
    if not is_float(one):
        return one
    place = len(seen.outputs)
    seen.outputs.append(one)
    if name in substitution.outputs and place < len(substitution.outputs[name]):
        recorded, cotangent = substitution.outputs[name][place], substitution.cotangents[name][place]
        one = _stand_in(one, recorded.astype(one.dtype), cotangent.astype(one.dtype))
        substitution.stood_in.append(one)
    probe = substitution.probes.get(f"{name}>{place}")
    return one if probe is None else one + probe


@dataclass
class TorchRun:
    """What the PyTorch model gave, in NumPy."""

    outputs: Arrays
    gradients: Arrays
    input_gradients: Arrays
    calls: Calls


def run_torch(
    model: torch.nn.Module, inputs: Any, cotangents: Mapping[str, Array] | None, paths: Mapping[str, Any]
) -> TorchRun:
    """Run a model that is ready (its dtype, evaluation); ``inputs`` hold tensors, floats are made leaves here."""
    floats: dict[str, torch.Tensor] = {}

    def ready(path: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            floats[path] = tensor = tensor.detach().clone().requires_grad_()
        return tensor

    arguments, options = replaced(inputs, ready)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch_watched(model, paths) as calls:
        output = model(*arguments, **options)
        outputs = dict(named(output))
        if cotangents is not None:
            wide = {path: one for path, one in outputs.items() if path in cotangents and one.requires_grad}
            scalars = [
                (one * torch.from_numpy(cotangents[path]).to(one.dtype)).to(torch.float64).sum()
                for path, one in wide.items()
            ]
            if scalars:
                total: Any = torch.stack(scalars).sum()
                total.backward()
    gradients = {
        name: to_numpy(torch.zeros_like(one) if one.grad is None else one.grad)
        for name, one in model.named_parameters()
    }
    pulled = {path: to_numpy(torch.zeros_like(one) if one.grad is None else one.grad) for path, one in floats.items()}
    return TorchRun({path: to_numpy(one) for path, one in outputs.items()}, gradients, pulled, finished(calls))


def zeros(calls: Calls) -> dict[str, Any]:
    """Probes for every floating-point input and output of these calls (of arrays or their shapes)."""
    return {
        f"{name}{side}{place}": jnp.zeros(one.shape, one.dtype)
        for name, call in calls.items()
        for side, arrays in (("<", call.inputs), (">", call.outputs))
        for place, one in enumerate(arrays)
    }


def same_value(one: Array, other: Array) -> bool:
    """Whether two inputs are the same apart from rounding and from dimensions of length 1."""
    a, b = np.squeeze(one), np.squeeze(other)
    if a.shape != b.shape:
        return False
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)):
        return False
    scale = float(np.abs(a[finite]).max(initial=0.0))
    return bool(np.abs(a[finite] - b[finite]).max(initial=0.0) <= 1e-9 * scale) and np.array_equal(
        a[~finite], b[~finite], equal_nan=True
    )
