"""Discrete outcomes: which token, which set, which beam. A tolerance has no meaning there, a margin has.

Two right programs may choose differently where the choice hangs on less than rounding. So a choice is compared
together with the scores that it was made from: different choices agree only if both are within ``noise`` of the best
under *both* programs' scores. Everything beyond is a difference, and a choice that its own program's scores do
not bear out is one in any case.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from twinformer.parity.compare import FloatArray, widened

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Choices:
    """What was found: how many choices were compared, how many were ties, and every difference."""

    compared: int
    ties: int
    problems: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        return self.compared > 0 and not self.problems


def compare_argmax(name: str, one: npt.NDArray[Any], other: npt.NDArray[Any], *, noise: float) -> Choices:
    """Do two arrays of scores ``[..., V]`` choose the same? ``noise`` is the largest error of a single score."""
    return compare_top_k(name, one, other, k=1, noise=noise)


def compare_top_k(name: str, one: npt.NDArray[Any], other: npt.NDArray[Any], *, k: int, noise: float) -> Choices:
    """Do two arrays of scores ``[..., V]`` have the same ``k`` best?

    An element that is among the best of one only is a tie if in both it lies within ``2 · noise`` of the ``k``-th
    best: each score may be off by ``noise``, and so may the one that it is held against.
    """
    first, second, problems = _paired(name, one, other)
    if problems:
        return Choices(0, 0, tuple(problems))
    if not 1 <= k <= first.shape[-1]:
        return Choices(0, 0, (f"{name}: expected k from 1 to {first.shape[-1]}, got {k}",))
    ties, found = 0, []
    for place in np.ndindex(first.shape[:-1]):
        a, b = first[place], second[place]
        bars = [np.partition(scores, -k)[-k] for scores in (a, b)]
        only = _best(a, k) ^ _best(b, k)
        far = [
            i
            for i in sorted(only)
            if any(abs(scores[i] - bar) > 2 * noise for scores, bar in zip((a, b), bars, strict=True))
        ]
        if far:
            i = far[0]
            found.append(
                f"{name} at {list(place)}: element {i} is among the {k} best of one only: {a[i] - bars[0]:+.2e} and "
                f"{b[i] - bars[1]:+.2e} from the last that is, noise {noise:.0e}"
            )
        ties += bool(only) and not far
    return Choices(int(np.prod(first.shape[:-1], dtype=np.int64)), ties, tuple(found))


def compare_nucleus(name: str, one: npt.NDArray[Any], other: npt.NDArray[Any], *, p: float, noise: float) -> Choices:
    """Are the top-p sets of two arrays of probabilities ``[..., V]`` the same: the smallest whose mass reaches ``p``?

    The crossing element belongs to the set. An element in one set only is a tie if in both the mass of all that
    rank before it lies within ``V · noise`` of ``p`` (it may or may not be needed), or if it ties, within ``2 noise``,
    with an element on the other side of the edge.
    """
    first, second, problems = _paired(name, one, other)
    if problems:
        return Choices(0, 0, tuple(problems))
    slack = first.shape[-1] * noise
    ties, found = 0, []
    for place in np.ndindex(first.shape[:-1]):
        a, b = first[place], second[place]
        only = _nucleus(a, p) ^ _nucleus(b, p)
        far = [i for i in sorted(only) if not all(_on_the_edge(x, i, p, slack, noise) for x in (a, b))]
        if far:
            i = far[0]
            found.append(
                f"{name} at {list(place)}: element {i} is in one top-{p} set only: mass before it {_mass(a, i):.12g} "
                f"and {_mass(b, i):.12g}, slack {slack:.0e}"
            )
        ties += bool(only) and not far
    return Choices(int(np.prod(first.shape[:-1], dtype=np.int64)), ties, tuple(found))


def compare_tokens(
    name: str, one: Tokens, other: Tokens, scores: tuple[npt.NDArray[Any], npt.NDArray[Any]], *, noise: float
) -> Choices:
    """Sequences of tokens ``[B, T]`` that each program chose from its scores ``[B, T, V]``, greedily.

    Up to the first place where a row differs both saw the same text and scores are comparable; there the two tokens
    must tie under both. What comes after follows from it and is not looked at. A token that is not the best of its own
    program's scores, beyond a tie, is a difference too.
    """
    if one.shape != other.shape or one.ndim != 2 or not one.size:
        return Choices(0, 0, (f"{name}: expected two equal shapes [B, T], got {one.shape} and {other.shape}",))
    tables, expected = [widened(table) for table in scores], (*one.shape,)
    if any(table.ndim != 3 or table.shape[:2] != expected for table in tables) or tables[0].shape != tables[1].shape:
        return Choices(0, 0, (f"{name}: expected scores [B, T, V], got {[table.shape for table in tables]}",))
    ties, compared, found = 0, 0, []
    for row in range(len(one)):
        for step in range(one.shape[1]):
            compared += 1
            tokens = int(one[row, step]), int(other[row, step])
            margins = [float(table[row, step].max() - table[row, step, token]) for table in tables for token in tokens]
            own = margins[0], margins[3]
            if not max(own) <= 2 * noise:
                found.append(f"{name} at {[row, step]}: chosen against its own scores, by {max(own):.2e}")
                break
            if tokens[0] == tokens[1]:
                continue
            if not max(margins) <= 2 * noise:
                found.append(
                    f"{name} at {[row, step]}: {tokens[0]} against {tokens[1]}, margin {max(margins):.2e}, "
                    f"noise {noise:.0e}"
                )
            else:
                ties += 1
            break
    return Choices(compared, ties, tuple(found))


def compare_beams(
    name: str,
    one: Sequence[tuple[Sequence[int], float]],
    other: Sequence[tuple[Sequence[int], float]],
    *,
    noise: float,
) -> Choices:
    """Lists of hypotheses, best first, each with its score.

    The same hypotheses must have scores within ``noise``; the lists may differ in order only between hypotheses that
    tie, and in their last members only where those tie with what the other list ends with.
    """
    if len(one) != len(other) or not one:
        return Choices(0, 0, (f"{name}: expected as many hypotheses, at least one, got {len(one)} and {len(other)}",))
    found, ties = [], 0
    tables = [{tuple(tokens): score for tokens, score in beams} for beams in (one, other)]
    for side, (beams, table) in enumerate(zip((one, other), tables, strict=True)):
        if len(table) != len(beams):
            found.append(f"{name}: list {side} holds a hypothesis twice")
        scores = [score for _, score in beams]
        if not all(after <= before for before, after in itertools.pairwise(scores)):
            found.append(f"{name}: list {side} is not in order of its scores, or holds NaN")
    for rank, ((tokens, score), (theirs, their_score)) in enumerate(zip(one, other, strict=True)):
        if tuple(tokens) == tuple(theirs):
            if not abs(score - their_score) <= noise:
                found.append(f"{name} at rank {rank}: scores {score:.12g} and {their_score:.12g}, noise {noise:.0e}")
        elif abs(score - their_score) <= 2 * noise:
            ties += 1
        else:
            found.append(
                f"{name} at rank {rank}: {list(tokens)} ({score:.12g}) against {list(theirs)} ({their_score:.12g})"
            )
    found += [
        f"{name}: {list(tokens)} scores {tables[0][tokens]:.12g} and {tables[1][tokens]:.12g}"
        for tokens in sorted(tables[0].keys() & tables[1].keys())
        if not abs(tables[0][tokens] - tables[1][tokens]) <= noise
    ]
    return Choices(len(one), ties, tuple(found))


def _paired(name: str, one: npt.NDArray[Any], other: npt.NDArray[Any]) -> tuple[FloatArray, FloatArray, list[str]]:
    first, second = widened(one), widened(other)
    problems = []
    if first.shape != second.shape:
        problems.append(f"{name}: shapes differ: {first.shape} against {second.shape}")
    elif not first.size:
        problems.append(f"{name}: nothing to compare")
    elif np.isnan(first).any() or np.isnan(second).any():
        problems.append(f"{name}: NaN among the scores, which no choice can be made from")
    elif not np.array_equal(np.isneginf(first), np.isneginf(second)):
        problems.append(f"{name}: other elements are ruled out (-inf)")
    return first, second, problems


def _best(scores: FloatArray, k: int) -> set[int]:
    return {int(i) for i in np.argsort(-scores, kind="stable")[:k]}


def _nucleus(probabilities: FloatArray, p: float) -> set[int]:
    order = np.argsort(-probabilities, kind="stable")
    mass_before = np.cumsum(probabilities[order]) - probabilities[order]
    return {int(i) for i in order[mass_before < p]}


def _mass(probabilities: FloatArray, i: int) -> float:
    """The mass of all that rank before element ``i``."""
    order = list(np.argsort(-probabilities, kind="stable"))
    return float(probabilities[order[: order.index(i)]].sum())


def _on_the_edge(probabilities: FloatArray, i: int, p: float, slack: float, noise: float) -> bool:
    if abs(_mass(probabilities, i) - p) <= slack:
        return True
    kept = _nucleus(probabilities, p)
    rivals = [probabilities[j] for j in range(len(probabilities)) if (j in kept) != (i in kept)]
    return bool(rivals) and min(abs(rival - probabilities[i]) for rival in rivals) <= 2 * noise
