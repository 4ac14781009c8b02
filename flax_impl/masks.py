"""Masks: who may attend to whom. True = may attend; all masks of the library are made here.

A mask broadcasts to ``[B, A, T, S]``. The softmax over a mask and the quarantine of broken rows are here too,
for they keep the promise that hidden means hidden: a key that a query may not attend to contributes exactly
nothing to it, forward and backward, whatever the key holds.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Integer


def causal_mask(T: int, S: int, *, window: int | None = None) -> Bool[Array, "{T} {S}"]:
    """Query i sees the keys ``j <= i + S - T`` (aligned at the end); with a window w, only ``j > i + S - T - w``.

    Book, "Masking out the future". A window of w is the query's own place and the w - 1 keys before it.
    """
    distance = _distance(T, S)
    seen = distance <= 0
    return seen if window is None else seen & (distance > -window)


def window_mask(T: int, S: int, *, window: int) -> Bool[Array, "{T} {S}"]:
    """Query i sees the keys with ``|j - (i + S - T)| < window``, on both sides."""
    return jnp.abs(_distance(T, S)) < window


def padding_mask(real: Bool[Array | np.ndarray, "B S"]) -> Bool[Array, "B 1 1 S"]:
    """Every query sees the keys that are real tokens."""
    return jnp.asarray(real)[:, None, None, :]


def positions_from(real: Bool[Array | np.ndarray, "B T"]) -> Int[Array, "B T"]:
    """Positions counted over real tokens, ``max(cumsum(real) - 1, 0)``: padding does not move a sentence."""
    return jnp.maximum(jnp.cumsum(jnp.asarray(real), axis=1, dtype=jnp.int32) - 1, 0)


def segment_mask(segments: Integer[Array | np.ndarray, "B T"]) -> Bool[Array, "B 1 T T"]:
    """Several documents in one row: a query sees the keys of its own number. 0 is padding: nothing sees it, and it sees
    nothing.
    """
    segments = jnp.asarray(segments)
    same = segments[:, :, None] == segments[:, None, :]
    return (same & (segments != 0)[:, None, :])[:, None]


def segment_positions(segments: Integer[Array | np.ndarray, "B T"]) -> Int[Array, "B T"]:
    """Positions within each run of equal numbers, from 0; padding, number 0, has 0."""
    segments = jnp.asarray(segments)
    begins = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)
    first = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    return jnp.where(segments == 0, 0, index - first)


def masked_softmax(
    scores: Float[Array | np.ndarray, "*n T S"], allowed: Bool[Array | np.ndarray, "..."] | None
) -> Float[Array, "*n T S"]:
    """``exp(s_j) / Σ exp(s_k)`` over the allowed keys of each row, 0 elsewhere.

    A row with nothing allowed, or with scores of ``-inf`` only, is all zeros, with zero gradient.
    """
    scores = jnp.asarray(scores)
    allowed = scores != -jnp.inf if allowed is None else (scores != -jnp.inf) & allowed
    # constant for the gradient, which no shift of a row can change
    highest = jnp.max(jax.lax.stop_gradient(scores), axis=-1, keepdims=True, where=allowed, initial=-jnp.inf)
    exps = jnp.exp(jnp.where(allowed, scores - highest, -jnp.inf))
    total = jnp.sum(exps, axis=-1, keepdims=True)
    # hidden weights are 0 already; saying so again keeps the gradient out that the value of a hidden key sends back
    return jnp.where(allowed, exps / jnp.where(total == 0, 1, total), 0)


def quarantine(X: Float[Array | np.ndarray, "B S D"]) -> tuple[Float[Array, "B S D"], Bool[Array, "B S"]]:
    """X with every row that holds a non-finite value replaced by 0, and where those rows were.

    0 · NaN is NaN: a row that is hidden by a weight of 0 has to be taken out before it is multiplied.
    """
    X = jnp.asarray(X)
    broken = ~jnp.all(jnp.isfinite(X), axis=-1)
    return jnp.where(broken[..., None], 0, X), broken


def exposed(
    broken: Bool[Array | np.ndarray, "B S"], allowed: Bool[Array | np.ndarray, "..."] | None
) -> Bool[Array, "B T_or_1"]:
    """The queries that may attend to a broken row, in any head. Without a mask all may: one entry stands for all."""
    seen = jnp.asarray(broken)[:, None, None, :]
    if allowed is not None:
        seen = seen & allowed
    return jnp.any(seen, axis=(1, 3))


def _distance(T: int, S: int) -> Int[Array, "{T} {S}"]:
    """``j - (i + S - T)``: how far key j lies after query i."""
    return jnp.arange(S)[None, :] - (jnp.arange(T)[:, None] + S - T)
