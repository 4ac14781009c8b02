"""Cached decoding in both frameworks behind one interface: NumPy in, NumPy out, the cache in the twin's own arrays.

``watch`` keeps what modules are given and give on the way: modules by path, and of every attention layer its two
halves, ``PATH.remember`` and ``PATH.recall``, which the full forward is made of as well.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import torch
from flax import nnx

import flax_impl.attention
import flax_impl.cache
import torch_impl.attention
import torch_impl.cache
from twinformer.parity.case import Arrays
from twinformer.parity.haste import little_care

Array = npt.NDArray[Any]
HALVES = ("remember", "recall")


@dataclass(frozen=True)
class Seen:
    """One call of a module or of a half of attention: its arguments by name, and its outputs."""

    path: str
    kind: str
    arguments: dict[str, Array]
    outputs: tuple[Array, ...]


class Decoder(Protocol):
    """A twin's model and what it decodes with. ``source`` and ``source_mask`` are None for a decoder alone."""

    def full(self, inputs: Arrays, *, watch: bool = False) -> tuple[Array, list[Seen]]:
        """Logits of one call of the model."""

    def start(self, batch: int, slots: int, source: Array | None, source_mask: Array | None) -> Any:
        """An empty cache."""

    def step(
        self,
        cache: Any,
        tokens: Array,
        mask: Array | None,
        positions: Array | None = None,
        at: Array | None = None,
        *,
        watch: bool = False,
    ) -> tuple[Array, Any, list[Seen]]:
        """Logits for further tokens, and the cache."""

    def reset(self, cache: Any) -> Any:
        """The cache, empty."""

    def reorder(self, cache: Any, rows: Array) -> Any:
        """The cache with other rows."""

    def leaves(self, cache: Any) -> Arrays:
        """Everything that is in the cache, by ``/``-separated names."""


class TorchDecoder:
    def __init__(self, model: Any) -> None:
        self.model = model
        self.two = model.config.architecture == "encoder-decoder"

    @torch.no_grad()
    def full(self, inputs: Arrays, *, watch: bool = False) -> tuple[Array, list[Seen]]:
        seen: list[Seen] = []
        with (
            _watched(_torch_modules(self.model), torch_impl.attention.AttentionLayer, seen, _numpy)
            if watch
            else _none()
        ):
            logits = self.model(**{name: _tensor(value) for name, value in inputs.items()})
        return logits.numpy().copy(), seen

    @torch.no_grad()
    def start(self, batch: int, slots: int, source: Array | None, source_mask: Array | None) -> Any:
        if source is None:
            return torch_impl.cache.init_cache(self.model, batch, slots)
        real = None if source_mask is None else _tensor(source_mask)
        H_enc = self.model.encode(_tensor(source), source_padding_mask=real)
        return torch_impl.cache.init_cache(self.model, batch, slots, H_enc=H_enc, memory_padding_mask=real)

    def step(
        self,
        cache: Any,
        tokens: Array,
        mask: Array | None,
        positions: Array | None = None,
        at: Array | None = None,
        *,
        watch: bool = False,
    ) -> tuple[Array, Any, list[Seen]]:
        seen: list[Seen] = []
        options = {name: _tensor(value) for name, value in _options(self.two, mask, positions, at).items()}
        with (
            _watched(_torch_modules(self.model), torch_impl.attention.AttentionLayer, seen, _numpy)
            if watch
            else _none()
        ):
            logits, cache = self.model.step(_tensor(tokens), cache, **options)
        return logits.detach().numpy().copy(), cache, seen

    def reset(self, cache: Any) -> Any:
        return torch_impl.cache.reset_cache(cache)

    def reorder(self, cache: Any, rows: Array) -> Any:
        return torch_impl.cache.reorder_cache(cache, _tensor(rows))

    def leaves(self, cache: Any) -> Arrays:
        return _flat(cache, lambda leaf: leaf.detach().numpy())


class FlaxDecoder:
    """Programs are compiled by this object, one for each kind of call; weights are arguments."""

    def __init__(self, model: Any, programs: dict[Any, Any]) -> None:
        self.config = model.config
        self.two = model.config.architecture == "encoder-decoder"
        self.graphdef, self.state = nnx.split(model)
        self._programs = programs
        wide = model.config.compute_dtype == "float64"
        self._care = little_care(dict(enumerate(jax.tree.leaves(self.state)))) if wide else {}
        self._reset, self._reorder = jax.jit(flax_impl.cache.reset_cache), jax.jit(flax_impl.cache.reorder_cache)

    def full(self, inputs: Arrays, *, watch: bool = False) -> tuple[Array, list[Seen]]:
        logits, seen = self._run("full", watch, lambda model, inputs: model(**inputs), inputs)
        return np.asarray(logits), seen

    def start(self, batch: int, slots: int, source: Array | None, source_mask: Array | None) -> Any:
        def start(model: Any, source: Any, real: Any) -> Any:
            if source is None:
                return flax_impl.cache.init_cache(model, batch, slots)
            H_enc = model.encode(source, source_padding_mask=real)
            return flax_impl.cache.init_cache(model, batch, slots, H_enc=H_enc, memory_padding_mask=real)

        return self._run(("start", batch, slots), False, start, source, source_mask)[0]

    def step(
        self,
        cache: Any,
        tokens: Array,
        mask: Array | None,
        positions: Array | None = None,
        at: Array | None = None,
        *,
        watch: bool = False,
    ) -> tuple[Array, Any, list[Seen]]:
        def step(model: Any, cache: Any, tokens: Any, options: Any) -> Any:
            return model.step(tokens, cache, **options)

        options = _options(self.two, mask, positions, at)
        (logits, cache), seen = self._run("step", watch, step, cache, tokens, options)
        return np.asarray(logits), cache, seen

    def reset(self, cache: Any) -> Any:
        return self._reset(cache)

    def reorder(self, cache: Any, rows: Array) -> Any:
        return self._reorder(cache, rows)

    def leaves(self, cache: Any) -> Arrays:
        return _flat(cache, np.asarray)

    def _run(self, what: Any, watch: bool, function: Callable[..., Any], *arguments: Any) -> tuple[Any, list[Seen]]:
        """One compiled call of ``function(model, *arguments)``; the second part is what was seen on the way."""
        key = (self.graphdef, what, watch)
        if key not in self._programs:
            names: list[tuple[str, str]] = []

            def call(state: Any, *arguments: Any) -> Any:
                model = nnx.merge(self.graphdef, state)
                seen: list[Seen] = []
                layer = flax_impl.attention.AttentionLayer
                with _watched(_flax_modules(model), layer, seen, lambda x: x) if watch else _none():
                    result = function(model, *arguments)
                names[:] = [(one.path, one.kind) for one in seen]
                return result, [(one.arguments, one.outputs) for one in seen]

            self._programs[key] = (jax.jit(call, compiler_options=self._care), names)
        program, names = self._programs[key]
        result, kept = program(self.state, *arguments)
        kept = jax.tree.map(np.asarray, kept)
        return result, [Seen(*name, *one) for name, one in zip(names, kept, strict=True)] if watch else []


def _options(two: bool, mask: Array | None, positions: Array | None, at: Array | None) -> Arrays:
    prefix = "target_" if two else ""
    given = {f"{prefix}padding_mask": mask, f"{prefix}positions": positions, "at": at}
    return {name: value for name, value in given.items() if value is not None}


def _tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def _numpy(tensor: Any) -> Array:
    copy: Array = tensor.detach().numpy().copy()
    return copy


def _flat(tree: Mapping[Any, Any], read: Callable[[Any], Array], prefix: str = "") -> Arrays:
    found: Arrays = {}
    for name, leaf in tree.items():
        if isinstance(leaf, Mapping):
            found |= _flat(leaf, read, f"{prefix}{name}/")
        else:
            found[f"{prefix}{name}"] = read(leaf)
    return found


# ---- watching


def _torch_modules(model: torch.nn.Module) -> dict[int, tuple[str, Any]]:
    return {id(module): (path, module) for path, module in model.named_modules() if path}


def _flax_modules(model: nnx.Module) -> dict[int, tuple[str, Any]]:
    return {id(module): (".".join(map(str, path)), module) for path, module in nnx.iter_modules(model) if path}


@contextlib.contextmanager
def _none() -> Iterator[None]:
    yield


@contextlib.contextmanager
def _watched(
    modules: dict[int, tuple[str, Any]], layer: type, seen: list[Seen], read: Callable[[Any], Any]
) -> Iterator[None]:
    """Within, calls of these modules and of the halves of attention are kept in ``seen``, as they finish."""
    undo: list[tuple[type, str, Any]] = []

    def wrap(cls: type, name: str, suffix: str) -> None:
        original = cls.__dict__[name]
        signature = inspect.signature(original)

        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            output = original(self, *arguments, **options)
            path, _ = modules.get(id(self), ("", None))
            if path:
                given = signature.bind(self, *arguments, **options).arguments
                outputs = output if isinstance(output, tuple) else (output,)
                seen.append(
                    Seen(
                        f"{path}{suffix}",
                        type(self).__name__,
                        {key: read(value) for key, value in given.items() if _is_array(value)},
                        tuple(read(part) for part in outputs),
                    )
                )
            return output

        undo.append((cls, name, original))
        setattr(cls, name, call)

    classes = {cls for _, module in modules.values() for cls in type(module).__mro__}
    for cls in classes:
        for name in ("forward", "__call__"):
            if name in cls.__dict__ and cls.__module__.partition(".")[0] in ("torch_impl", "flax_impl"):
                wrap(cls, name, "")
    for half in HALVES:
        wrap(layer, half, f".{half}")
    try:
        yield
    finally:
        for cls, name, original in reversed(undo):
            setattr(cls, name, original)


def _is_array(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, np.ndarray, jnp.ndarray, jax.Array))
