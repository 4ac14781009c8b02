"""Beam search: several hypotheses at a time, so that a good one is not lost for its first token."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from torch_impl.generation import AnyFlags, AnyIds, Ids, _host, _Runner, _Task, _Writer
from torch_impl.linear import wide_dtype
from torch_impl.models import EncoderDecoder, LanguageModel
from torch_impl.sampling import _first
from twinformer.decoding import BeamConfig, Beams, StopConfig
from twinformer.errors import InputError

Floats = npt.NDArray[np.floating[Any]]


def beam_search(
    model: LanguageModel | EncoderDecoder,
    prompts: AnyIds,
    *,
    padding_mask: AnyFlags | None = None,
    source: AnyIds | None = None,
    source_padding_mask: AnyFlags | None = None,
    max_new_tokens: int = 32,
    beam: BeamConfig = BeamConfig(),  # noqa: B008 (it is frozen)
    stop: StopConfig = StopConfig(),  # noqa: B008 (it is frozen)
    allowed: AnyFlags | None = None,
    pad_id: int = 0,
    slots: int | None = None,
    bucket: int = 32,
) -> Beams:
    """The ``beam.num_best`` best continuations of each prompt ``[B, T]`` (or targets of each source), best first.

    Book, chapter "Machine Translation", "Beam Search". In each step every continuation of a live hypothesis has the sum
    of log-probabilities; they are ranked by it, then by hypothesis, then by token. Of the first ``width``, those that
    end in a token of ``stop`` finish, with their sum over ``beam.length_factor`` as score; the first ``width`` that do
    not end so live on. With ``shrink`` the width falls by one with each that finishes. Each row searches by itself.

    Other arguments, and errors, as in ``Generator``; stop sequences are an InputError.
    """
    if stop.sequences:
        raise InputError("beam_search", [f"stop: expected tokens only, got {len(stop.sequences)} sequences"])
    runner = _Runner("beam_search", model, slots, bucket, False)
    task = runner.task(prompts, padding_mask, source, source_padding_mask, max_new_tokens, stop, allowed=allowed)
    hidden = None if allowed is None else torch.from_numpy(~_host(allowed)).to(runner.device)
    return _search(runner.start(task, max_new_tokens), task, hidden, max_new_tokens, beam, stop, pad_id, runner.device)


@dataclass(frozen=True)
class _Hypothesis:
    tokens: Ids
    total: np.floating[Any]  # the sum of log-probabilities
    score: np.floating[Any]
    finished: bool


class _Row:
    """The search of one row, but for its live hypotheses: how many there may be, and the pool of those that ended."""

    def __init__(self, beam: BeamConfig, max_new_tokens: int) -> None:
        self._beam, self._max_new_tokens = beam, max_new_tokens
        self.width = beam.width
        self.pool: list[_Hypothesis] = []  # best first

    def enter(self, tokens: Ids, total: np.floating[Any], *, finished: bool) -> None:
        """The pool keeps the best ``width``; of equals the one that entered first."""
        score = total / self._beam.length_factor(len(tokens))
        place = sum(bool(other.score >= score) for other in self.pool)
        self.pool.insert(place, _Hypothesis(tokens, total, score, finished))
        del self.pool[self._beam.width :]
        if finished and self._beam.shrink:
            self.width -= 1

    def is_settled(self, best: np.floating[Any]) -> bool:
        """Nothing that lives can still come among the best: ``best`` is its highest sum, and sums only fall."""
        n = self._beam.num_best
        if not self._beam.early_stopping or len(self.pool) < n:
            return False
        return bool(self.pool[n - 1].score >= best / self._beam.length_factor(self._max_new_tokens))


@dataclass(frozen=True)
class _Ranking:
    """Continuations in their order, for each row: hypothesis, token, sum (``-inf``: there is none), each ``[B, n]``."""

    parents: Ids
    tokens: Ids
    sums: Floats


def _search(
    writer: _Writer,
    task: _Task,
    hidden: Bool[Tensor, "#B M V"] | None,
    max_new_tokens: int,
    beam: BeamConfig,
    stop: StopConfig,
    pad_id: int,
    device: torch.device,
) -> Beams:
    B, W = len(task.prompts), beam.width
    rows = [_Row(beam, max_new_tokens) for _ in range(B)]
    with torch.no_grad():
        logits = writer.step(torch.from_numpy(task.prompts).to(device), torch.from_numpy(task.real).to(device))
        writer.reorder(np.arange(B).repeat(W))
        logits = logits.to(wide_dtype(logits.dtype)).repeat_interleave(W, 0)
        sums = np.full((B, W), -np.inf, _numpy_dtype(logits))
        sums[:, 0] = 0  # one hypothesis at first: the prompt
        written = np.zeros((B, W, 0), np.int64)
        for t in range(max_new_tokens):
            ranked, going = _ranked(logits, sums, None if hidden is None else hidden[:, t], stop.tokens)
            sums = going.sums.copy()
            for b, row in enumerate(rows):
                for i in range(row.width):  # as it was before this step
                    parent, token, total = ranked.parents[b, i], ranked.tokens[b, i], ranked.sums[b, i]
                    if token in stop.tokens and np.isfinite(total):
                        row.enter(np.append(written[b, parent], token), total, finished=True)
                sums[b, row.width :] = -np.inf
                if np.isfinite(sums[b, 0]) and row.is_settled(sums[b, 0]):
                    sums[b] = -np.inf
            written = np.concatenate(
                (np.take_along_axis(written, going.parents[..., None], 1), going.tokens[..., None]), -1
            )
            live = np.isfinite(sums)
            if not live.any() or t + 1 == max_new_tokens:
                break
            writer.reorder((np.arange(B)[:, None] * W + going.parents).reshape(-1))
            tokens = np.where(live, going.tokens, 0).reshape(-1, 1)
            logits = writer.step(torch.from_numpy(tokens).to(device), torch.from_numpy(live.reshape(-1, 1)).to(device))
            logits = logits.to(wide_dtype(logits.dtype))
    for b, row in enumerate(rows):
        for tokens_of, total in zip(written[b], sums[b], strict=True):
            if np.isfinite(total):
                row.enter(tokens_of, total, finished=False)
    return _gathered([row.pool[: beam.num_best] for row in rows], beam.num_best, pad_id, sums.dtype)


def _ranked(
    logits: Float[Tensor, "BW V"], sums: Floats, hidden: Bool[Tensor, "#B V"] | None, stop: tuple[int, ...]
) -> tuple[_Ranking, _Ranking]:
    """The first W continuations of each row, and the first W that do not end in a stop token."""
    B, W = sums.shape
    before = torch.from_numpy(sums).to(logits.device)[..., None]
    totals = before + logits.log_softmax(-1).view(B, W, -1)
    lives = before > -torch.inf
    lost = (lives & totals.isnan()).flatten(1).any(-1)
    if lost.any():
        wanted = (
            f"logits: expected numbers, a finite one among them, got others in rows {lost.nonzero()[:, 0].tolist()}"
        )
        raise InputError("beam_search", [wanted])
    nowhere = ~lives if hidden is None else ~lives | hidden[:, None]
    totals = totals.masked_fill(nowhere, -torch.inf)
    ranked = _ranking(totals, W)
    if not stop:
        return ranked, ranked
    totals[..., list(stop)] = -torch.inf
    return ranked, _ranking(totals, W)


def _ranking(totals: Float[Tensor, "B W V"], count: int) -> _Ranking:
    V, flat = totals.shape[-1], totals.flatten(1)
    places = _first(flat, count)
    found = places.cpu().numpy()
    return _Ranking(found // V, found % V, flat.gather(-1, places).cpu().numpy())


def _gathered(pools: list[list[_Hypothesis]], n: int, pad_id: int, dtype: np.dtype[Any]) -> Beams:
    B = len(pools)
    longest = max((len(one.tokens) for pool in pools for one in pool), default=0)
    beams = Beams(
        tokens=np.full((B, n, longest), pad_id, np.int64),
        lengths=np.zeros((B, n), np.int64),
        scores=np.full((B, n), -np.inf, dtype),
        logprobs=np.full((B, n), -np.inf, dtype),
        finished=np.zeros((B, n), np.bool_),
    )
    for b, pool in enumerate(pools):
        for i, one in enumerate(pool):
            beams.tokens[b, i, : len(one.tokens)] = one.tokens
            beams.lengths[b, i] = len(one.tokens)
            beams.scores[b, i], beams.logprobs[b, i] = one.score, one.total
            beams.finished[b, i] = one.finished
    return beams


def _numpy_dtype(logits: Tensor) -> type[np.floating[Any]]:
    return np.float64 if logits.dtype == torch.float64 else np.float32
