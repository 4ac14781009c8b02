"""Both twins of one model as writers, and whether rounding explains that they wrote different texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import flax_impl
import torch_impl
from parity_tests.sweep_decoding import BOUND, BUCKET, NEW, TRIALS
from twinformer.config import ModelConfig
from twinformer.decoding import SamplingConfig, StopConfig
from twinformer.parity import sampling_reference as reference
from twinformer.parity.case import telling_weights
from twinformer.parity.writers import FlaxWriter, TorchWriter

_MARGIN = 1e-9  # of what the search in float64 itself rounds


class Pair:
    """The torch and the Flax model of one configuration and one draw of weights.

    ``like``: one of the same configuration, whose compiled program of Flax's generator is used again.
    """

    def __init__(self, config: ModelConfig, seed: int, *, like: Pair | None = None) -> None:
        self.config = config
        weights = telling_weights(config, seed)
        with self._x64():
            self.models = []
            for twin in (torch_impl, flax_impl):
                model = twin.build(config, seed=None)
                twin.load_weights(model, weights)
                self.models.append(model)
            self.writers = (TorchWriter(self.models[0], BUCKET), FlaxWriter(self.models[1], BUCKET))
        if like is not None:
            assert like.config == config
            self.writers[1]._generator._whole = like.writers[1]._generator._whole

    def _x64(self) -> Any:
        return jax.enable_x64(self.config.compute_dtype == "float64")

    def written(self, way: str, asked: dict[str, Any]) -> tuple[Any, Any]:
        """What torch and what Flax write, with the stop token of the case."""
        given = {name: asked[name] for name in ("padding_mask", "source", "source_padding_mask") if name in asked}
        stop = StopConfig(tokens=(asked["stop"],))
        with self._x64():
            if way == "beam":
                one, other = (
                    writer.search(asked["prompts"], max_new_tokens=NEW, beam=asked["beam"], stop=stop, **given)
                    for writer in self.writers
                )
                return one, other
            sampling = asked["sampling"] if way == "sampled" else None
            one, other = (
                writer.generate(
                    asked["prompts"], max_new_tokens=NEW, sampling=sampling, stop=stop, seed=asked["seed"], **given
                )
                for writer in self.writers
            )
            return one, other

    def logits(self, twin: int, asked: dict[str, Any], row: int, written: Sequence[int]) -> Any:
        """``[len(written) + 1, V]``: what one twin says after the prompt of a row and after each written token."""
        name, mask = ("target", "target_padding_mask") if "source" in asked else ("tokens", "padding_mask")
        prompt, real = self._kept(asked["prompts"][row], asked.get("padding_mask"), row)
        inputs: dict[str, Any] = {name: np.concatenate((prompt, np.asarray(written, np.int64)))[None]}
        inputs[mask] = np.concatenate((real, np.ones(len(written), np.bool_)))[None]
        if "source" in asked:
            source, source_real = self._kept(asked["source"][row], asked.get("source_padding_mask"), row)
            inputs |= {"source": source[None], "source_padding_mask": source_real[None]}
        with self._x64():
            if twin == 0:
                import torch

                with torch.no_grad():
                    found = self.models[0](**{key: torch.from_numpy(np.array(x)) for key, x in inputs.items()}).numpy()
            else:
                found = np.asarray(self.models[1](**inputs))
        return found[0, len(prompt) - 1 :].astype(np.float64)

    def _kept(self, ids: Any, padding_mask: Any, row: int) -> tuple[Any, Any]:
        """What of a row a model is given: its real tokens or, where places are counted, all up to the last of them."""
        real = np.ones(ids.shape, np.bool_) if padding_mask is None else padding_mask[row]
        kept = real if self.config.position_counting == "real" else np.arange(len(ids)) <= np.flatnonzero(real)[-1]
        return ids[kept], real[kept]


def explained(way: str, wide: Pair, narrow: Pair, asked: dict[str, Any], results: tuple[Any, Any]) -> str:
    """Whether a float64 search comes to each twin's texts when its logits are moved by the error that was measured."""
    for row in range(len(asked["prompts"])):
        texts = [_texts(found, row) for found in results]
        if texts[0] == texts[1]:
            continue
        noise = _MARGIN + max(
            np.abs(narrow.logits(twin, asked, row, text) - wide.logits(0, asked, row, text)).max()
            for twin, found in enumerate(texts)
            for text in found
            if text
        )
        if way == "greedy":
            if not all(_is_near_the_best(wide, asked, row, text, 2 * noise) for (text,) in texts):
                return "not explained"
            continue
        rng = np.random.default_rng(row)
        wanted = {tuple(found) for found in texts}
        for _ in range(TRIALS):
            wanted.discard(_searched(way, wide, asked, row, noise, rng))
            if not wanted:
                break
        else:
            return "not explained"
    return "explained"


def tied(wide: Pair, asked: dict[str, Any], results: tuple[Any, Any]) -> bool:
    """Whether the beams differ in float64 only where hypotheses of equal length have equal log-probabilities."""
    for row in range(len(asked["prompts"])):
        for mine, theirs in zip(*(_texts(found, row) for found in results), strict=True):
            if len(mine) != len(theirs):
                return False
            totals = [_log_probability(wide, asked, row, text) for text in (mine, theirs)]
            if not abs(totals[0] - totals[1]) <= BOUND * max(1.0, abs(totals[0])):
                return False
    return True


def _log_probability(wide: Pair, asked: dict[str, Any], row: int, text: Sequence[int]) -> float:
    logits = wide.logits(0, asked, row, text)[:-1]
    return float(sum(reference.log_softmax(x)[token] for x, token in zip(logits, text, strict=True)))


def _is_near_the_best(wide: Pair, asked: dict[str, Any], row: int, text: Sequence[int], margin: float) -> bool:
    """Whether every token of a text is one that logits moved by half of the margin can make the best."""
    logits = wide.logits(0, asked, row, text)[:-1]
    return all(x.max() - x[token] <= margin for x, token in zip(logits, text, strict=True))


def _texts(found: Any, row: int) -> list[tuple[int, ...]]:
    """The text of a row, or the hypotheses of it, best first."""
    if found.tokens.ndim == 2:
        return [tuple(found.tokens[row, : found.lengths[row]].tolist())]
    rows = zip(found.tokens[row], found.lengths[row], strict=True)
    return [tuple(tokens[:length].tolist()) for tokens, length in rows]


def _searched(
    way: str, wide: Pair, asked: dict[str, Any], row: int, noise: float, rng: np.random.Generator
) -> tuple[tuple[int, ...], ...]:
    def moved(text: tuple[int, ...]) -> Any:
        logits = wide.logits(0, asked, row, text)[-1]
        return logits + rng.uniform(-noise, noise, logits.shape)

    if way == "beam":
        found = reference.search(
            lambda texts: np.stack([moved(text) for text in texts]),
            max_new_tokens=NEW,
            beam=dataclasses.replace(asked["beam"], early_stopping=False),
            stop=(asked["stop"],),
        )
        texts = [one.tokens for one in found]
        return tuple(texts + [()] * (asked["beam"].num_best - len(texts)))
    return (_one_text(way, moved, wide, asked, row),)


def _one_text(way: str, moved: Any, wide: Pair, asked: dict[str, Any], row: int) -> tuple[int, ...]:
    import torch

    keys = torch_impl.sampling.sequence_keys(asked["seed"], torch.arange(len(asked["prompts"])))
    seen = np.zeros(wide.config.vocab_size, np.bool_)
    real = asked.get("padding_mask")
    seen[asked["prompts"][row] if real is None else asked["prompts"][row][real[row]]] = True
    text: tuple[int, ...] = ()
    while len(text) < NEW and not (text and text[-1] == asked["stop"]):
        logits = moved(text)
        if way == "greedy":
            token = reference.greedy(logits)
        else:
            sampling: SamplingConfig = asked["sampling"]
            uniform = float(torch_impl.sampling.uniforms(keys, len(text))[row])
            token = reference.draw(reference.processed(logits, seen, sampling), uniform)
        text = (*text, token)
        seen[token] = True
    return text
