"""n-gram models of note tokens, the baselines for pieces: interpolated by Witten and Bell, or by Kneser and Ney.

Contexts are whole numbers in base V, counted by sorting: a few hundred thousand tokens take a second. Each piece is
read from its ``PIECE_START``, which is given and not predicted; before it stands nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from twinformer.data.guitar.tokens import room, transpose
from twinformer.data.guitar.transpositions import mixture, transpositions
from twinformer.errors import InputError, Problems

Smoothing = Literal["witten-bell", "kneser-ney"]

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Order:
    """Counts of one order: sorted codes of (context, token), their counts, and by context the sums and numbers of
    types.
    """

    grams: Ids
    counts: Ids
    contexts: Ids
    sums: Ids
    types: Ids


class NGram:
    """``P(token | the n - 1 tokens before it)``, interpolated down to the uniform distribution over V tokens.

    With c(h, w) the count of token w after context h, c(h) its sum over w, u(h) the number of different tokens after h,
    and h' the context without its first token:

    - ``witten-bell`` (Witten & Bell 1991, method C): ``(c(h, w) + u(h) P(w | h')) / (c(h) + u(h))``;
    - ``kneser-ney`` (Kneser & Ney 1995, interpolated as in Chen & Goodman 1999):
      ``(max(c(h, w) - d, 0) + d u(h) P(w | h')) / c(h)`` with ``d = n1 / (n1 + 2 n2)`` of each order; below the highest
      order c counts the different tokens before.

    A context that never came is left out: ``P(w | h) = P(w | h')``.
    """

    def __init__(self, pieces: Sequence[Ids], vocab_size: int, n: int, smoothing: Smoothing = "witten-bell") -> None:
        problems = Problems("NGram", InputError)
        problems.expect(n >= 1, f"n: expected at least 1, got {n}")
        problems.expect(smoothing in ("witten-bell", "kneser-ney"), f"smoothing: got {smoothing!r}")
        problems.expect(len(pieces) > 0, "pieces: expected at least one, got none")
        problems.expect((vocab_size + 1) ** n < 2**63, f"n: expected (V + 1)^n below 2^63, got V={vocab_size}, n={n}")
        problems.raise_if_any()
        self.vocab_size, self.n, self.smoothing = vocab_size, n, smoothing
        codes = [np.concatenate([_grams(ids, k, vocab_size) for ids in pieces]) for k in range(1, n + 1)]
        self._orders: list[_Order] = []
        self._discounts: list[float] = []
        above: Ids | None = None  # the different grams of the order above
        for k in range(n, 0, -1):
            if smoothing == "kneser-ney" and above is not None:
                grams, counts = np.unique(above % (vocab_size + 1) ** k, return_counts=True)
            else:
                grams, counts = np.unique(codes[k - 1], return_counts=True)
            above = grams
            contexts, places = np.unique(grams // (vocab_size + 1), return_inverse=True)
            sums = np.bincount(places, counts).astype(np.int64)
            self._orders.insert(0, _Order(grams, counts.astype(np.int64), contexts, sums, np.bincount(places)))
            once, twice = int((counts == 1).sum()), int((counts == 2).sum())
            self._discounts.insert(0, once / (once + 2 * twice) if once else 0.5)

    def probabilities(self, ids: Ids) -> Floats:
        """``[T - 1]``: of each token of a piece but the first, given those before it."""
        found = np.full(max(len(ids) - 1, 0), 1 / self.vocab_size)
        for k, (order, discount) in enumerate(zip(self._orders, self._discounts, strict=True), start=1):
            grams = _grams(ids, k, self.vocab_size)
            own = _look_up(order.grams, order.counts, grams)
            total = _look_up(order.contexts, order.sums, grams // (self.vocab_size + 1))
            types = _look_up(order.contexts, order.types, grams // (self.vocab_size + 1))
            seen = total > 0
            if self.smoothing == "witten-bell":
                mixed = (own + types * found) / np.maximum(total + types, 1)
            else:
                mixed = (np.maximum(own - discount, 0) + discount * types * found) / np.maximum(total, 1)
            found = np.where(seen, mixed, found)
        return found

    def transposed(self, ids: Ids, most: int) -> Floats:
        """``[T - 1]``: the mean of the probabilities of a piece of note tokens moved by −most … +most half-tones."""
        copies, reach = transpositions(ids, most, pad_id=0)
        logs = np.full((len(copies), max(len(ids) - 1, 0)), -np.inf)
        for row, (copy, length) in enumerate(zip(copies, reach, strict=True)):
            logs[row, : max(length - 1, 0)] = np.log(self.probabilities(copy[:length]))
        return np.exp(mixture(logs, reach))

    def adapting(self, ids: Ids, orders: tuple[int, int] = (4, 8), *, transposition: int = 0) -> Floats:
        """``[T - 1]``: as ``transposed`` (as ``probabilities`` by 0), then interpolated with what the piece itself has
        said before.

        Of each order k from the first to the last of ``orders``, by Witten and Bell, with counts of the piece so far:
        ``(c(h, w) + u(h) P(w)) / (c(h) + u(h))``, P of the order below, at first that of the n-gram model.
        """
        first, last = orders
        if not 1 <= first <= last:
            raise InputError("NGram.adapting", [f"orders: expected 1 <= first <= last, got {orders}"])
        counts: dict[tuple[int, ...], dict[int, int]] = {}
        text = tuple(int(token) for token in ids)
        found = self._read(ids, transposition)
        for place in range(1, len(text)):
            token, p = text[place], found[place - 1]
            contexts = [text[place - k + 1 : place] for k in range(first, min(last, place + 1) + 1)]
            for h in contexts:
                seen = counts.get(h)
                if seen:
                    p = (seen.get(token, 0) + len(seen) * p) / (sum(seen.values()) + len(seen))
            found[place - 1] = p
            for h in contexts:
                own = counts.setdefault(h, {})
                own[token] = own.get(token, 0) + 1
        return found

    def _read(self, ids: Ids, transposition: int) -> Floats:
        return self.transposed(ids, transposition) if transposition else self.probabilities(ids)

    def total(self, pieces: Sequence[Ids], *, transposition: int = 0, adapting: bool = False) -> tuple[float, int]:
        """Nats over all predicted tokens of the pieces, and their number."""
        logs = [
            np.log(self.adapting(ids, transposition=transposition) if adapting else self._read(ids, transposition))
            for ids in pieces
        ]
        return -float(sum(log.sum() for log in logs)), sum(map(len, logs))


def augmented(pieces: Sequence[Ids], most: int = 4) -> list[Ids]:
    """Every piece in each transposition from −most to +most that the vocabulary of note tokens holds."""
    return [transpose(ids, move) for ids in pieces for move in room(ids, most)]


def _grams(ids: Ids, k: int, vocab_size: int) -> Ids:
    """``[T - 1]``: for each token but the first, the code of it and the k - 1 before it; V stands before the
    beginning.
    """
    base = vocab_size + 1
    padded = np.concatenate([np.full(max(k - 2, 0), vocab_size, np.int64), ids])
    codes = np.zeros(max(len(ids) - 1, 0), np.int64)
    first = len(padded) - len(codes) - (k - 1)
    for place in range(k):
        codes = codes * base + padded[first + place : first + place + len(codes)]
    return codes


def _look_up(keys: Ids, values: Ids, wanted: Ids) -> Ids:
    """The value of each key, 0 where it is absent."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
