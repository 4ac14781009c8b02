"""The JAX side of a port, whatever it is made of: leaves by name, and runs under ``jax.jit``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from flax import nnx

from twinformer.parity.values import Array, Arrays, in_dtype, is_array, is_float, named, replaced, to_numpy
from twinformer.parity.watch import Call, Calls, Substitution, flax_watched


@dataclass
class FlaxRun:
    """What the port gave, in NumPy. ``pulled`` are the gradients of the substitution's probes, by their names."""

    outputs: Arrays
    gradients: Arrays
    input_gradients: Arrays
    calls: Calls
    pulled: Arrays


class Port:
    """An NNX module, or a function of parameters. The user's own model is read, never changed."""

    def __init__(self, model: Any, params: Any) -> None:
        self._function: Callable[..., Any] | None = None
        self._others: dict[tuple[Any, ...], Any] = {}
        if isinstance(model, nnx.Module):
            copy: Any = nnx.clone(model)
            copy.eval()
            for _, module in nnx.iter_modules(copy):
                if isinstance(module, nnx.Embed) and module.dtype == module.embedding[...].dtype:
                    module.dtype = None  # it takes its weight's dtype when built: let it take the one that it has
            self._graphdef, state = nnx.split(copy)
            self._flat = dict(nnx.to_flat_state(state))
            self._keys = {}
            for parts, leaf in self._flat.items():
                if isinstance(leaf, nnx.RngState) or not _is_numeric(leaf):
                    self._others[parts] = leaf
                else:
                    self._keys[".".join(map(str, parts))] = parts
            self.leaves = {path: to_numpy(_value(self._flat[parts])) for path, parts in self._keys.items()}
            self.optional = {path for path, parts in self._keys.items() if not isinstance(self._flat[parts], nnx.Param)}
            self.paths = [
                ".".join(map(str, parts))
                for parts, module in nnx.iter_modules(copy)
                if any("__call__" in vars(one) for one in type(module).__mro__)
            ]
        else:
            self._function, self._params = model, params
            self.leaves = {path: to_numpy(leaf) for path, leaf in named(params)}
            self.optional = set()
            self.paths = []
        self._programs: dict[Any, Any] = {}
        self._narrow: dict[str, None] = {}

    def narrow(self, inputs: Any, paths: dict[str, str]) -> list[str]:
        """The modules (by PyTorch path) that compute in less than float64 although all they are given is float64."""
        with jax.enable_x64(True):
            weights = {path: jnp.asarray(in_dtype(leaf, "float64")) for path, leaf in self.leaves.items()}
            given = {path: jnp.asarray(in_dtype(one, "float64")) for path, one in named(inputs)}
            floats = {path: one for path, one in given.items() if is_float(one)}
            whole = {path: one for path, one in given.items() if not is_float(one)}
            forward = self._forward(inputs, paths, {})
            traced = jax.make_jaxpr(forward)(weights, floats, {}, whole, ({}, {}, {}), {})
        return list(dict.fromkeys(_narrow_places(traced.jaxpr)))

    @property
    def has_modules(self) -> bool:
        return self._function is None

    def run(
        self,
        leaves: Mapping[str, Array],
        inputs: Any,
        *,
        dtype: str,
        cotangents: Mapping[str, Array] | None = None,
        paths: Mapping[str, str] | None = None,
        substitution: Substitution | None = None,
    ) -> FlaxRun:
        """Run with these leaves (those not given stay the port's own). ``paths``: modules to watch."""
        with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
            weights = {path: jnp.asarray(in_dtype(leaf, dtype)) for path, leaf in (self.leaves | dict(leaves)).items()}
            given = {path: jnp.asarray(in_dtype(one, dtype)) for path, one in named(inputs)}
            floats = {path: one for path, one in given.items() if is_float(one)}
            whole = {path: one for path, one in given.items() if not is_float(one)}
            used = substitution or Substitution()
            wide = {path: jnp.asarray(one) for path, one in (cotangents or {}).items()}
            operands = (
                {name: [jnp.asarray(one) for one in arrays] for name, arrays in used.outputs.items()},
                {name: [jnp.asarray(one) for one in arrays] for name, arrays in used.cotangents.items()},
                {name: {p: jnp.asarray(one) for p, one in places.items()} for name, places in used.inputs.items()},
            )
            # the key holds what the program was traced for, beside shapes
            key = (dtype, cotangents is not None, tuple((paths or {}).items()), substitution is not None)
            if key not in self._programs:
                self._programs[key] = self._program(inputs, dict(paths or {}), cotangents is not None)
            found = self._programs[key](weights, floats, used.probes, whole, operands, wide)
            (outputs, calls), (of_weights, of_inputs, of_probes) = jax.device_get(found)
            return FlaxRun(
                _arrays(outputs),
                _arrays(of_weights),
                _arrays(of_inputs),
                calls={name: Call(*parts) for name, parts in calls.items()},
                pulled=_arrays(of_probes),
            )

    def _program(self, inputs: Any, paths: dict[str, str], gradients: bool) -> Any:
        names: dict[str, tuple[str, str]] = {}
        forward = self._forward(inputs, paths, names)
        if gradients:
            differentiated = jax.value_and_grad(forward, argnums=(0, 1, 2), has_aux=True, allow_int=True)
            compiled = jax.jit(differentiated)
        else:
            compiled = jax.jit(lambda *operands: (forward(*operands), ({}, {}, {})))

        def run(*operands: Any) -> Any:
            (_, (outputs, calls)), pulled = compiled(*operands)
            return (outputs, {name: (*names[name], *parts) for name, parts in calls.items()}), pulled

        return run

    def _forward(self, inputs: Any, paths: dict[str, str], names: dict[str, tuple[str, str]]) -> Any:
        """The function that is traced: the scalar, the outputs and the calls, whose paths go into ``names``."""

        def forward(weights: Any, floats: Any, probes: Any, whole: Any, operands: Any, cotangents: Any) -> Any:
            arguments, options = replaced(inputs, lambda path, _: floats[path] if path in floats else whole[path])
            used = Substitution(operands[0], operands[1], operands[2], probes)
            names.clear()
            if self._function is not None:
                bound = replaced(self._params, lambda path, _: weights[path])
                output, calls = self._function(bound, *arguments, **options), {}
            else:
                state = {parts: _with(self._flat[parts], weights[path]) for path, parts in self._keys.items()}
                others = {parts: _with(leaf, _value(leaf)) for parts, leaf in self._others.items()}
                model: Any = nnx.merge(self._graphdef, nnx.from_flat_state(others | state))
                with flax_watched(model, paths, used) as calls:
                    output = model(*arguments, **options)
            outputs = dict(named(output))
            scalar = sum(
                ((outputs[path] * one.astype(outputs[path].dtype)).sum() for path, one in cotangents.items()),
                start=jnp.zeros((), jnp.float32),
            )
            scalar += sum(((one * 0).sum() for one in used.stood_in), start=jnp.zeros((), scalar.dtype))
            names.update({name: (call.path, call.caller) for name, call in calls.items()})
            return scalar, (outputs, {name: (call.inputs, call.whole, call.outputs) for name, call in calls.items()})

        return forward


def _arrays(found: Mapping[str, Any]) -> Arrays:
    return {name: np.asarray(one) for name, one in found.items()}


def _value(leaf: Any) -> Any:
    return leaf[...] if isinstance(leaf, nnx.Variable) else leaf


def _with(leaf: Any, value: Any) -> Any:
    return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value


def _is_numeric(leaf: Any) -> bool:
    value = _value(leaf)
    return is_array(value) and not jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def _narrow_places(jaxpr: Any, outside: str = "") -> Iterator[str]:
    """Innermost watched module, and dtype, of every operation that gives an array of less than float64."""
    for equation in jaxpr.eqns:
        place = outside + str(equation.source_info.name_stack)
        for found in equation.outvars:
            dtype = getattr(found.aval, "dtype", None)
            if dtype is not None and found.aval.shape and jnp.issubdtype(dtype, jnp.floating) and dtype != jnp.float64:
                inside = re.findall(r"<([^<>]*)>", place)
                yield f"{(inside[-1] if inside else '') or 'the model itself'} ({dtype})"
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _narrow_places(inner, f"{place}/")
