"""From logits to a token: what is hidden from a draw, and the draw itself.

Logits ``[B, V]`` are taken wide. The order of tokens is: higher logit first, lower id first among equals. Hidden tokens
have ``-inf``. From a row whose highest logit is not finite (NaN, where there is one, is the highest) nothing is chosen,
whatever processors make of its other tokens. Processors are small objects made from a number and called with
``(logits, seen)``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Integer, UInt32

from flax_impl.dropout import fold, philox, random_key
from flax_impl.linear import wide_dtype
from twinformer.decoding import SamplingConfig

Logits = Float[Array | np.ndarray, "B V"]
Seen = Bool[Array | np.ndarray, "#B V"]
Processor = Callable[[Float[Array, "B V"], Bool[Array, "#B V"]], Float[Array, "B V"]]

# so many of the first tokens are looked at before all are sorted: on a CPU that takes 50 times as long
_HEAD = 1024


@dataclass(frozen=True)
class RepetitionPenalty:
    """Tokens that were seen: ``x / penalty`` where ``x > 0``, else ``x · penalty``.

    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1, with a rule for the sign.
    """

    penalty: float

    def __call__(self, logits: Logits, seen: Seen) -> Float[Array, "B V"]:
        x = _wide(logits)
        return jnp.where(jnp.asarray(seen), jnp.where(x > 0, x / self.penalty, x * self.penalty), x)


@dataclass(frozen=True)
class Temperature:
    """``x / t``."""

    t: float

    def __call__(self, logits: Logits, seen: Seen) -> Float[Array, "B V"]:
        return _wide(logits) / self.t


@dataclass(frozen=True)
class TopK:
    """The first ``k`` tokens of the order stay; all of them where there are no more than k."""

    k: int

    def __call__(self, logits: Logits, seen: Seen) -> Float[Array, "B V"]:
        x = _wide(logits)
        if self.k >= x.shape[-1]:
            return x
        return _left(x, _marked(_first_tokens(x, self.k)[1], x))


@dataclass(frozen=True)
class TopP:
    """The smallest set of first tokens whose mass reaches ``p``: a token stays iff the mass before it is below p.

    The mass is that of the softmax of what has been left. Source: Holtzman et al. 2020, arXiv:1904.09751.
    """

    p: float

    def __call__(self, logits: Logits, seen: Seen) -> Float[Array, "B V"]:
        x = _wide(logits)
        if self.p >= 1:
            return x  # before every token lies less than all of the mass, whatever rounding makes of it
        V = x.shape[-1]
        if V <= _HEAD:
            return self._first(x, V)[0]
        left, reached = self._first(x, _HEAD)
        kept: Array = jax.lax.cond(jnp.all(reached), lambda: left, lambda: self._first(x, V)[0])
        return kept

    def _first(self, x: Float[Array, "B V"], count: int) -> tuple[Float[Array, "B V"], Bool[Array, " B"]]:
        """What stays of the first ``count`` tokens, and whether their mass reaches p (or there is nothing to reach)."""
        masses = _masses(x)
        total = jnp.sum(masses, axis=-1, keepdims=True)
        first, ids = _first_tokens(x, count)
        mass = jnp.cumsum(_masses(first) / total, axis=-1)
        before = jnp.pad(mass[:, :-1], ((0, 0), (1, 0)))
        kept = jnp.sum(before < self.p, axis=-1, keepdims=True, dtype=jnp.int32)
        stays = _marked(ids, x, jnp.arange(count, dtype=jnp.int32) < kept)
        return _left(x, stays), (mass[:, -1] >= self.p) | ~_is_drawable(x)


@dataclass(frozen=True)
class MinP:
    """A token stays iff its probability is at least ``p`` times the highest.

    Source: Nguyen et al. 2024, arXiv:2407.01082.
    """

    p: float

    def __call__(self, logits: Logits, seen: Seen) -> Float[Array, "B V"]:
        x = _wide(logits)
        return _left(x, _masses(x) >= self.p)


def processors(config: SamplingConfig) -> tuple[Processor, ...]:
    """What a configuration calls for, in its order."""
    found: list[Processor] = []
    if config.repetition_penalty != 1:
        found.append(RepetitionPenalty(config.repetition_penalty))
    if config.temperature != 1:
        found.append(Temperature(config.temperature))
    if config.top_k is not None:
        found.append(TopK(config.top_k))
    if config.top_p is not None:
        found.append(TopP(config.top_p))
    if config.min_p is not None:
        found.append(MinP(config.min_p))
    return tuple(found)


def greedy(logits: Logits) -> Int[Array, " B"]:
    """The first token of the order; -1 for a row whose highest logit is not finite."""
    x = _wide(logits)
    return jnp.where(_is_drawable(x), jnp.argmax(x, axis=-1).astype(jnp.int32), -1)


def draw(logits: Logits, uniforms: Float[Array | np.ndarray, " B"]) -> Int[Array, " B"]:
    """The first id whose cumulative mass is above ``u · total``, with masses ``exp(x - max)``.

    Where rounding leaves none it is the last id with a mass; -1 for a row whose highest logit is not finite.
    """
    x = _wide(logits)
    masses = _masses(x)
    cumulative = jnp.cumsum(masses, axis=-1)
    bound = jnp.asarray(uniforms).astype(x.dtype)[:, None] * cumulative[:, -1:]
    # a sum made in parts may differ in its last digit where nothing was added: only a token with a mass is drawn
    passed = (cumulative > bound) & (masses > 0)
    last = x.shape[-1] - 1 - jnp.argmax(masses[:, ::-1] > 0, axis=-1)
    found = jnp.where(jnp.any(passed, axis=-1), jnp.argmax(passed, axis=-1), last)
    return jnp.where(_is_drawable(x), found.astype(jnp.int32), -1)


def sequence_keys(seed: int, rows: Integer[Array | np.ndarray, " B"]) -> UInt32[Array, "B 2"]:
    """A key for each sequence: ``fold(random_key(seed), row)``. Raises InputError for a seed that is none."""
    keys: Array = jax.vmap(fold, (None, 0))(random_key(seed), jnp.asarray(rows))
    return keys


def uniforms(
    keys: Integer[Array | np.ndarray, "B 2"], step: int | Integer[Array | np.ndarray, ""]
) -> Float[Array, " B"]:
    """A multiple of 2^-24 in [0, 1) for each sequence: the upper 24 bits of word 0 of ``philox((step, 0, 0, 2), key)``.

    ``step`` counts the tokens that the sequence has written, and may be traced.
    """
    numbers: Array = _uniforms(jnp.asarray(keys), jnp.asarray(step).astype(jnp.uint32))
    return numbers


@jax.jit
def _uniforms(keys: Integer[Array, "B 2"], step: UInt32[Array, ""]) -> Float[Array, " B"]:
    zero = jnp.zeros_like(step)
    counter = jnp.stack([step, zero, zero, zero + 2])
    words = jax.vmap(lambda key: philox(counter, key)[0])(keys)
    numbers: Array = (words >> 8).astype(jnp.float32) * jnp.float32(2**-24)
    return numbers


def _wide(logits: Logits) -> Float[Array, "B V"]:
    logits = jnp.asarray(logits)
    return logits.astype(wide_dtype(logits.dtype))


def _masses(x: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """``exp(x - max)``: 1 for the highest, and 0 for what is hidden, in a row without a finite logit too."""
    highest = jnp.max(x, axis=-1, keepdims=True)
    return jnp.exp(x - jnp.where(jnp.isfinite(highest), highest, 0))


def _first_tokens(x: Float[Array, "B V"], count: int) -> tuple[Float[Array, "B n"], Int[Array, "B n"]]:
    """Logits and ids of the first ``count`` of the order: ``top_k`` gives the lower of equal ids first.

    But it takes 0 for more than -0. And where only a slice of it is used XLA sorts everything: take all of it or none.
    """
    first, ids = jax.lax.top_k(jnp.where(x == 0, 0, x), count)
    return first, ids


def _marked(
    ids: Int[Array, "B n"], x: Float[Array, "B V"], which: Bool[Array, "B n"] | bool = True
) -> Bool[Array, "B V"]:
    """True at those ids of each row."""
    rows = jnp.arange(len(x), dtype=jnp.int32)[:, None]
    return jnp.zeros(x.shape, bool).at[rows, ids].set(which)


def _is_drawable(x: Float[Array, "B V"]) -> Bool[Array, " B"]:
    """The maximum of numbers among which is NaN is NaN."""
    return jnp.isfinite(jnp.max(x, axis=-1))


def _left(x: Float[Array, "B V"], stays: Bool[Array, "B V"]) -> Float[Array, "B V"]:
    """What does not stay is hidden; NaN is not hidden, for a row that has one is not drawn from."""
    return jnp.where(stays | jnp.isnan(x), x, -jnp.inf)
