"""What the twins are asked to write: prompts padded everywhere, ends at different places, allowed tokens, beams."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from twinformer.config import ModelConfig
from twinformer.decoding import BeamConfig, SamplingConfig, StopConfig
from twinformer.initializers import stream
from twinformer.parity.case import Arrays
from twinformer.parity.writers import Array

# so many new tokens that whoever works in blocks (of steps, of slots) comes to a second and a third one
ROWS, PROMPT, NEW, SEARCHED = 4, 5, 62, 5
# prompt and hypotheses that take more slots than are looked at, or moved, at a time
LONG, BLOCK = 84, 64
# a row's numbers depend on these, not on its place
SEQUENCES = (5, 0, 2**31 + 1, 3)
_PLAIN = tuple(range(ROWS))
SAMPLING = SamplingConfig(temperature=2.0, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.3)
# all but greedy, among so few tokens that it shows which of them count as seen: what was seen is wanted most
PENALISED, FEW = SamplingConfig(temperature=0.01, repetition_penalty=0.01), 4
SEED = 2**40 + 7
PAD = 1
# of one width, so that one program serves all
BEAMS = {
    "mean": BeamConfig(width=3, num_best=2, length_penalty="mean", alpha=1.0),
    "tied": BeamConfig(width=3, num_best=2, length_penalty="mean", alpha=0.7),
    "gnmt": BeamConfig(width=3, num_best=2, length_penalty="gnmt", alpha=0.6, shrink=True, early_stopping=False),
}


@dataclass(frozen=True)
class Writing:
    """Prompts ``[B, T]``, what of them is real, the sources that they belong to, and how the model counts."""

    prompts: Array
    real: Array
    source: Array | None
    source_real: Array | None
    counting: Literal["real", "places"] = "real"

    def in_reverse(self) -> Writing:
        """The last row first."""
        source, source_real = (part if part is None else part[::-1] for part in (self.source, self.source_real))
        return Writing(self.prompts[::-1], self.real[::-1], source, source_real, self.counting)

    def options(self) -> dict[str, Any]:
        """Of a generator or a search."""
        given = {
            "padding_mask": self.real,
            "source": self.source,
            "source_padding_mask": self.source_real,
        }
        return {name: value for name, value in given.items() if value is not None}

    def inputs(self, rows: Array | None = None, tokens: Array | None = None, real: Array | None = None) -> Arrays:
        """Of one call of the model with the prompts of these rows and what was written after them, if anything.

        What a row has stands side by side from its first place on, as the contract packs it: real tokens alone, or,
        where places are counted, all up to the prompt's last real token. Under a window it matters how far away they
        are.
        """
        rows = np.arange(len(self.prompts)) if rows is None else rows
        tokens = self.prompts[rows, :0] if tokens is None else tokens
        real = self.real[rows, :0] if real is None else real
        kept = np.concatenate((self._kept()[rows], real), 1)
        order = np.argsort(~kept, axis=1, kind="stable")[:, : kept.sum(1).max()]
        whole = np.take_along_axis(np.concatenate((self.prompts[rows], tokens), 1), order, 1)
        mask = np.take_along_axis(np.concatenate((self.real[rows], real), 1), order, 1)
        if self.source is None or self.source_real is None:
            return {"tokens": whole, "padding_mask": mask}
        return {
            "source": self.source[rows],
            "source_padding_mask": self.source_real[rows],
            "target": whole,
            "target_padding_mask": mask,
        }

    def places(self, rows: Array, real: Array) -> Array:
        """``[B, M]``: where in these inputs the token stands that each written one comes after; any for padding."""
        after: Array = self._kept()[rows].sum(1)[:, None] + real.cumsum(1) - 2
        return np.where(real, after, 0)

    def _kept(self) -> Array:
        """What of a prompt the model is given."""
        if self.counting == "real":
            return self.real
        kept: Array = np.logical_or.accumulate(self.real[:, ::-1], 1)[:, ::-1]
        return kept


@dataclass(frozen=True)
class Scenario:
    """One call of a generator, besides the prompts."""

    name: str
    new: int
    sampling: SamplingConfig | None = None
    stop: StopConfig = field(default_factory=StopConfig)
    allowed: Array | None = None
    sequences: tuple[int, ...] = _PLAIN

    def options(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self.new,
            "sampling": self.sampling,
            "stop": self.stop,
            "seed": SEED,
            "rows": None if self.sequences == _PLAIN else np.array(self.sequences),
            "allowed": self.allowed,
            "pad_id": PAD,
        }

    def in_reverse(self) -> Scenario:
        """The same of each row, the last row first."""
        allowed = None if self.allowed is None else self.allowed[::-1]
        return dataclasses.replace(self, allowed=allowed, sequences=self.sequences[::-1])

    def ending(self, stop: StopConfig) -> Scenario:
        return dataclasses.replace(self, stop=stop)


@dataclass(frozen=True)
class Search:
    """One beam search, besides the prompts. ``allowed [B or 1, M, V]``.

    ``weights``: those of the case, or ``flat``, with which tokens are nearly equally likely, or ``zero``, with which
    they are equally likely.
    """

    name: str
    beam: BeamConfig
    new: int
    stop: tuple[int, ...]
    allowed: Array
    weights: Literal["plain", "flat", "zero"] = "plain"


def writing_for(config: ModelConfig) -> Writing:
    """Prompts with padding on the left, on the right with a hole, and two without, as the context has room for them."""
    rng = stream(0, "scenarios")
    T = max(1, min(PROMPT, config.context_length // 2))
    real = np.ones((ROWS, T), np.bool_)
    real[1, : T // 2] = False
    real[2, [T - 1, T // 3] if T > 3 else []] = False
    prompts = rng.integers(0, config.vocab_size, (ROWS, T))
    source = source_real = None
    if config.architecture == "encoder-decoder":
        S = min(7, config.context_length)
        source = rng.integers(0, config.source_vocab_size, (ROWS, S))
        source_real = np.ones((ROWS, S), np.bool_)
        source_real[1, : S // 3] = False
        source_real[2, S - S // 3 :] = False
    return Writing(prompts, real, source, source_real, config.position_counting)


def scenarios(config: ModelConfig, writing: Writing) -> list[Scenario]:
    """Greedy with a stop token, and sampled with everything, before anybody knows where they end; and few tokens, of
    which those that were seen come first."""
    new = min(NEW, config.context_length - writing.prompts.shape[1])
    allowed = stream(0, "scenarios/allowed").random((ROWS, new, config.vocab_size)) < 0.7
    allowed[..., 0] = True
    few = np.zeros((ROWS, min(FEW, new), config.vocab_size), np.bool_)
    for row, prompt, real in zip(few, writing.prompts, writing.real, strict=True):
        unseen = np.setdiff1d(np.arange(config.vocab_size), prompt[real])
        row[:, unseen[:FEW] if len(unseen) else 0] = True
    return [
        Scenario("greedy", new),
        Scenario("sampled", new, SAMPLING, allowed=allowed, sequences=SEQUENCES),
        Scenario("penalised", few.shape[1], PENALISED, allowed=few),
    ]


def searches(config: ModelConfig, writing: Writing, stop: tuple[int, ...]) -> list[Search]:
    """Both penalties on the case's model, one where much depends on a little, one where every continuation ties."""
    new = min(SEARCHED, config.context_length - writing.prompts.shape[1])
    allowed = stream(0, "scenarios/beams").random((ROWS, new, config.vocab_size)) < 0.8
    allowed[..., 0] = True
    everything = np.ones_like(allowed)
    # with all sums equal the first ids go on: a stop token among them, and more tokens than the beam is wide
    tied_stop = tuple(token for token in (1,) if token < config.vocab_size)
    # so many ends that the pool is full at once, while longer hypotheses can still be better
    often = tuple(range(0, config.vocab_size, 3))
    # several hypotheses of a beam that shrinks end in one step
    together = tuple(range(1, config.vocab_size, 3))
    return [
        Search("mean", BEAMS["mean"], new, stop, everything),
        Search("gnmt", BEAMS["gnmt"], new, stop, allowed),
        Search("ends together", BEAMS["gnmt"], new, together, allowed),
        Search("nearly equal", BEAMS["mean"], new, often, everything, "flat"),
        Search("all equal", BEAMS["tied"], new, tied_stop, everything, "zero"),
    ]


def long_search(config: ModelConfig, writing: Writing) -> Search | None:
    """One that has to move more slots than there are in a block, where the context has so many: the beam changes its
    mind to the end, since tokens are nearly equally likely."""
    T = writing.prompts.shape[1]
    new = min(LONG, config.context_length - T)
    if T + new < BLOCK + SEARCHED:
        return None
    allowed = stream(0, "scenarios/long beams").random((1, new, config.vocab_size)) < 0.8
    allowed[..., 0] = True
    return Search("long", BEAMS["mean"], new, (), allowed, "flat")
