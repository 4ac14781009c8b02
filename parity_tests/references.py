"""The equations once more, in NumPy float64 with explicit loops: slow, and short enough to be checked by eye.

Nothing here knows how a twin does it. One number is computed at a time, and only for keys that a query may attend to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Vector = np.ndarray
Weights = Mapping[str, np.ndarray]


# ---- attention (Jurafsky & Martin, "Multi-head attention")


def may_attend(i: int, j: int, T: int, S: int, *, causal: bool, window: int | None) -> bool:
    """Query i of T and key j of S, aligned at the end."""
    here = i + S - T
    if causal:
        return j <= here and (window is None or j > here - window)
    return window is None or abs(j - here) < window


def attention(
    X: np.ndarray,
    weights: Weights,
    *,
    A: int,
    K: int,
    G: int | None = None,
    J: int | None = None,
    H_enc: np.ndarray | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    causal: bool = False,
    window: int | None = None,
    mask: np.ndarray | None = None,
    memory_mask: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    query_norm: Callable[[Vector], Vector] = lambda q: q,
    key_norm: Callable[[Vector], Vector] = lambda k: k,
    rotate: Callable[[Vector, int], Vector] = lambda x, position: x,
    positions: np.ndarray | None = None,
    keep: np.ndarray | None = None,
) -> np.ndarray:
    """``[B, T, D]``. ``keep [B, A, T, S]`` multiplies the attention weights (dropout, already scaled)."""
    G, J = G or A, J or K
    scale = 1 / math.sqrt(K) if scale is None else scale
    cross = H_enc is not None
    M = H_enc if cross else X
    (B, T, D), S = X.shape, M.shape[1]
    places = np.broadcast_to(np.arange(T)[None] if positions is None else positions, (B, T))
    given = memory_mask if cross else mask
    given = None if given is None else np.broadcast_to(given, (B, A, T, S))
    added = None if bias is None or cross else np.broadcast_to(bias, (B, A, T, S))
    out = np.zeros((B, T, D))
    for b in range(B):
        for i in range(T):
            heads = np.zeros(A * J)
            for a in range(A):
                g = a // (A // G)
                q = query_norm(_project(X[b, i], weights, "query", a, K))
                q = q if cross else rotate(q, places[b, i])
                scores: dict[int, float] = {}
                for j in range(S):
                    if not cross and not may_attend(i, j, T, S, causal=causal, window=window):
                        continue
                    if given is not None and (given[b, a, i, j] == (False if given.dtype == np.bool_ else -np.inf)):
                        continue
                    k = key_norm(_project(M[b, j], weights, "key", g, K))
                    k = k if cross else rotate(k, places[b, j])
                    score = sum(q[d] * k[d] for d in range(K)) * scale
                    score = score if softcap is None else softcap * math.tanh(score / softcap)
                    score = score if added is None else score + added[b, a, i, j]
                    scores[j] = score if given is None or given.dtype == np.bool_ else score + given[b, a, i, j]
                total = sum(math.exp(score) for score in scores.values())
                for j, score in scores.items():
                    weight = math.exp(score) / total * (1.0 if keep is None else keep[b, a, i, j])
                    heads[a * J : (a + 1) * J] += weight * _project(M[b, j], weights, "value", g, J)
            out[b, i] = weights["output.weight"] @ heads + weights.get("output.bias", 0.0)
    return out


def _project(x: Vector, weights: Weights, name: str, head: int, width: int) -> Vector:
    """Head ``head`` owns rows ``head·width … (head+1)·width - 1`` of the matrix."""
    rows = slice(head * width, (head + 1) * width)
    bias = weights.get(f"{name}.bias")
    return weights[f"{name}.weight"][rows] @ x + (0.0 if bias is None else bias[rows])


def rotation(R: int, *, base: float = 10000.0, convention: str = "half") -> Callable[[Vector, int], Vector]:
    """Su et al. 2021, eq. 15, on the first R entries of a vector."""

    def rotate(x: Vector, position: int) -> Vector:
        y = x.copy()
        for i in range(R // 2):
            first, second = (i, i + R // 2) if convention == "half" else (2 * i, 2 * i + 1)
            angle = position * base ** (-2 * i / R)
            y[first] = x[first] * math.cos(angle) - x[second] * math.sin(angle)
            y[second] = x[second] * math.cos(angle) + x[first] * math.sin(angle)
        return y

    return rotate


# ---- norms, activations, feed-forward


def layer_norm(x: np.ndarray, weight: Any, bias: Any = 0.0, eps: float = 1e-5) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


def rms_norm(x: np.ndarray, weight: Any, eps: float = 1e-5) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def activate(x: np.ndarray, name: str) -> np.ndarray:
    one = {
        "relu": lambda v: max(v, 0.0),
        "gelu": lambda v: v * 0.5 * math.erfc(-v / math.sqrt(2)),
        "gelu_tanh": lambda v: v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
        "silu": lambda v: v / (1 + math.exp(-v)),
    }[name]
    return np.vectorize(one, otypes=[np.float64])(x)


def feed_forward(x: np.ndarray, weights: Weights, activation: str, *, gated: bool = False) -> np.ndarray:
    up = x @ weights["up.weight"].T + weights.get("up.bias", 0.0)
    if gated:
        hidden = activate(x @ weights["gate.weight"].T + weights.get("gate.bias", 0.0), activation) * up
    else:
        hidden = activate(up, activation)
    return hidden @ weights["down.weight"].T + weights.get("down.bias", 0.0)


# ---- positions


def sinusoids(
    positions: np.ndarray, D: int, *, layout: str = "interleaved", spacing: str = "textbook", offset: int = 0
) -> np.ndarray:
    """Vaswani et al. 2017, section 3.5: ``positions.shape + (D,)``."""
    H = (D + 1) // 2
    out = np.zeros((*positions.shape, D))
    for place, position in np.ndenumerate(positions):
        for i in range(H):
            if spacing == "textbook":
                frequency = 10000.0 ** (-2 * i / D)
            else:
                frequency = 1.0 if H == 1 else 10000.0 ** (-i / (H - 1))
            angle = (position + offset) * frequency
            columns = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, H + i)
            for column, value in zip(columns, (math.sin(angle), math.cos(angle)), strict=True):
                if column < D:
                    out[(*place, column)] = value
    return out


def relative_bucket(n: int, num_buckets: int, max_distance: int, *, bidirectional: bool) -> int:
    """T5's bucket of ``n = key - query``, its floor decided in whole numbers.

    ``m + floor(ln(d/m) / ln(M/m) · (b - m))`` is m plus the largest e with ``(M/m)^e <= (d/m)^(b-m)``, that is with
    ``M^e · m^(b-m-e) <= d^(b-m)``.
    """
    b, first = num_buckets, 0
    if bidirectional:
        b //= 2
        first = b if n > 0 else 0
        d = abs(n)
    else:
        d = max(-n, 0)
    m = b // 2
    if d < m:
        return first + d
    e = 0
    while e + 1 <= b - m and max_distance ** (e + 1) * m ** (b - m - e - 1) <= d ** (b - m):
        e += 1
    return first + min(m + e, b - 1)


def alibi_slopes(A: int) -> list[float]:
    """Press et al. 2022: a geometric sequence for a power of two, else filled up from twice the next lower power."""
    power = 2 ** int(math.log2(A))
    slopes = [2.0 ** (-8 * (a + 1) / power) for a in range(power)]
    return slopes + [2.0 ** (-8 * (a + 1) / (2 * power)) for a in range(0, 2 * (A - power), 2)]


# ---- random numbers (Salmon et al. 2011)


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    word = 0xFFFFFFFF
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p, q = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (q >> 32) ^ c1 ^ k0, q & word, (p >> 32) ^ c3 ^ k1, p & word
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return c0, c1, c2, c3


def key_of(seed: int, *folds: int) -> tuple[int, int]:
    """``random_key(seed)``, folded by each number in turn."""
    key = (seed & 0xFFFFFFFF, seed >> 32)
    for number in folds:
        key = philox((number, 0, 0, 1), key)[:2]
    return key


def dropout_factors(key: tuple[int, int], shape: tuple[int, ...], rate: float) -> np.ndarray:
    """What an inverted dropout multiplies by: ``1 / (1 - rate)`` where kept, else 0."""
    size = math.prod(shape)
    words = [word for i in range((size + 3) // 4) for word in philox((i, 0, 0, 0), key)][:size]
    kept = np.array([word >= math.floor(rate * 2**32) for word in words], dtype=np.float64)
    return kept.reshape(shape) / (1 - rate)
