"""Samples of what a model writes while it learns: text, where the twin can decode."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from twinformer.config import ModelConfig
from twinformer.data.batch import Dataset
from twinformer.decoding import SamplingConfig, StopConfig
from twinformer.learning import Trainer
from twinformer.runs import backends

#: (twin, its model, how many) -> lines to show
Show = Callable[[str, Any, int], Sequence[str]]

_PROMPT, _NEW = 8, 24


def sampler(
    show: Show, count: int, config: ModelConfig, trainers: Mapping[str, Trainer]
) -> Callable[[Mapping[str, Any]], Sequence[str]]:
    """What a run calls at each validation: the first twin's weights of that moment in a model that is shown."""
    name, trainer = next(iter(trainers.items()))

    def sample(states: Mapping[str, Any]) -> Sequence[str]:
        if importlib.util.find_spec(f"{name}_impl.generation") is None:
            return ["no samples: this twin cannot decode"]
        return show(name, backends.make_model(name, config, trainer.weights(states[name])), count)

    return sample


def continuations(valid: Dataset, spell: Callable[[Sequence[int]], str], end_id: int) -> Show:
    """For language models: beginnings of validation rows, and how they go on."""

    def show(backend: str, model: Any, count: int) -> list[str]:
        batch = valid.batch(0)
        tokens = batch.inputs["tokens"]
        prompt = min(_PROMPT, tokens.shape[1] // 2)
        full = np.flatnonzero(batch.real[:, :prompt].all(1))[:count]
        if len(full) == 0:
            return []
        prompts = tokens[full, :prompt]
        found = backends.make_generator(backend, model)(
            prompts,
            max_new_tokens=min(_NEW, tokens.shape[1] - prompt),
            sampling=SamplingConfig(temperature=0.8),
            stop=StopConfig(tokens=(end_id,)),
        )
        return [
            f"  sample: {spell(row.tolist())} | {spell(new[:length].tolist())}"
            for row, new, length in zip(prompts, found.tokens, found.lengths, strict=True)
        ]

    return show


def translations(valid: Dataset, spell: Callable[[Sequence[int]], str], end_id: int) -> Show:
    """For encoder-decoders: sources of validation, and what is made of them, greedily."""

    def show(backend: str, model: Any, count: int) -> list[str]:
        batch = valid.batch(0)
        real = batch.inputs["source_padding_mask"]
        rows = np.flatnonzero(real.any(1))[:count]
        source, target = batch.inputs["source"][rows], batch.inputs["target"][rows]
        found = backends.make_generator(backend, model)(
            target[:, :1],
            source=source,
            source_padding_mask=real[rows],
            max_new_tokens=target.shape[1] - 1,
            stop=StopConfig(tokens=(end_id,)),
        )
        return [
            f"  sample: {spell(row[mask].tolist())} -> {spell(new[:length].tolist())}"
            for row, mask, new, length in zip(source, real[rows], found.tokens, found.lengths, strict=True)
        ]

    return show
