"""What both twins write with, behind one interface: NumPy in, NumPy out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import torch

import flax_impl.beam
import flax_impl.generation
import flax_impl.sampling
import torch_impl.beam
import torch_impl.generation
import torch_impl.sampling
from twinformer.decoding import Beams, Generated, SamplingConfig
from twinformer.parity.tensors import from_torch, to_torch

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]


class Chooser(Protocol):
    """From logits ``[B, V]`` to tokens."""

    def processed(self, configs: Sequence[SamplingConfig], logits: Array, seen: Array) -> list[Array]:
        """What the processors of each config make of logits, which are given in the dtype that they have."""

    def greedy(self, logits: Array) -> Ids:
        """The first token of each row."""

    def draw(self, logits: Array, uniforms: Array) -> Ids:
        """The token that each number leads to."""

    def uniforms(self, seed: int, rows: Array, step: int) -> Array:
        """The numbers of these rows' token ``step``."""


class Writer(Protocol):
    """A model that writes. Options are those of ``Generator`` and of ``beam_search``."""

    def generate(self, prompts: Array, **options: Any) -> Generated:
        """Tokens after each prompt."""

    def stream(self, prompts: Array, **options: Any) -> list[tuple[Array, Array]]:
        """The same, step by step."""

    def score(self, prompts: Array, continuations: Array, **options: Any) -> Array:
        """Log-probabilities of what somebody wrote."""

    def search(self, prompts: Array, **options: Any) -> Beams:
        """The best continuations of each prompt."""


class TorchChooser:
    def processed(self, configs: Sequence[SamplingConfig], logits: Array, seen: Array) -> list[Array]:
        found = []
        for config in configs:
            x, marks = to_torch(logits), to_torch(seen)
            for process in torch_impl.sampling.processors(config):
                x = process(x, marks)
            found.append(from_torch(x))
        return found

    def greedy(self, logits: Array) -> Ids:
        return torch_impl.sampling.greedy(to_torch(logits)).numpy().astype(np.int64)

    def draw(self, logits: Array, uniforms: Array) -> Ids:
        return torch_impl.sampling.draw(to_torch(logits), to_torch(uniforms)).numpy().astype(np.int64)

    def uniforms(self, seed: int, rows: Array, step: int) -> Array:
        keys = torch_impl.sampling.sequence_keys(seed, torch.from_numpy(np.array(rows)))
        return torch_impl.sampling.uniforms(keys, step).numpy()


class FlaxChooser:
    """Compiled, as all of it is where it is used. ``options`` are those of the compiler."""

    def __init__(self, options: dict[str, bool | int]) -> None:
        self._options = options
        self._greedy, self._draw = (
            jax.jit(function, compiler_options=options)
            for function in (flax_impl.sampling.greedy, flax_impl.sampling.draw)
        )

    def processed(self, configs: Sequence[SamplingConfig], logits: Array, seen: Array) -> list[Array]:
        def every(logits: Any, seen: Any) -> list[Any]:
            found = []
            for config in configs:
                x = logits
                for process in flax_impl.sampling.processors(config):
                    x = process(x, seen)
                found.append(x)
            return found

        return [np.asarray(x) for x in jax.jit(every, compiler_options=self._options)(logits, seen)]

    def greedy(self, logits: Array) -> Ids:
        return np.asarray(self._greedy(logits)).astype(np.int64)

    def draw(self, logits: Array, uniforms: Array) -> Ids:
        return np.asarray(self._draw(logits, uniforms)).astype(np.int64)

    def uniforms(self, seed: int, rows: Array, step: int) -> Array:
        keys = flax_impl.sampling.sequence_keys(seed, jnp.asarray(rows))
        return np.asarray(flax_impl.sampling.uniforms(keys, step))


class ModelWriter:
    """Either twin's: generators and beam searches take NumPy and give NumPy."""

    def __init__(self, model: Any, generation: Any, beam: Any, bucket: int) -> None:
        self._model, self._generation, self._beam, self._bucket = model, generation, beam, bucket
        self._generator = generation.Generator(model, bucket=bucket)

    def generate(self, prompts: Array, **options: Any) -> Generated:
        written: Generated = self._generator(prompts, **options)
        return written

    def stream(self, prompts: Array, **options: Any) -> list[tuple[Array, Array]]:
        return [(np.array(tokens), np.array(live)) for tokens, live in self._generator.stream(prompts, **options)]

    def score(self, prompts: Array, continuations: Array, **options: Any) -> Array:
        native = {name: self._native(value) for name, value in options.items()}
        scores = self._generation.score(self._model, self._native(prompts), self._native(continuations), **native)
        return from_torch(scores) if isinstance(scores, torch.Tensor) else np.asarray(scores)

    def search(self, prompts: Array, **options: Any) -> Beams:
        found: Beams = self._beam.beam_search(self._model, prompts, bucket=self._bucket, **options)
        return found

    def _native(self, array: Array | None) -> Any:
        return array


class TorchWriter(ModelWriter):
    def __init__(self, model: Any, bucket: int) -> None:
        super().__init__(model, torch_impl.generation, torch_impl.beam, bucket)

    def _native(self, array: Array | None) -> Any:
        return None if array is None else torch.from_numpy(np.array(array))


class FlaxWriter(ModelWriter):
    def __init__(self, model: Any, bucket: int) -> None:
        super().__init__(model, flax_impl.generation, flax_impl.beam, bucket)
