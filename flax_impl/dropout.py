"""Dropout, and the one stream of random numbers that both twins draw from.

A key is an array of two 32-bit words. Every place in a model that needs random numbers folds its own number
into the key of its owner, so that a mask depends on nothing but (seed, place, index of the element).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Integer, UInt32

from twinformer.checks import INTEGERS, dtype_name
from twinformer.errors import ConfigError, InputError, Problems

Key = Integer[Array | np.ndarray, "2"]
Words = tuple[UInt32[Array, "*n"], UInt32[Array, "*n"], UInt32[Array, "*n"], UInt32[Array, "*n"]]


def philox(counter: Integer[Array | np.ndarray, "*n 4"], key: Key) -> UInt32[Array, "*n 4"]:
    """Philox4x32-10: ten rounds that turn a counter of four words into four random words.

    One round, with 64-bit products ``(h0, l0) = 0xD2511F53 · c0`` and ``(h1, l1) = 0xCD9E8D57 · c2``::

        c ← (h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0)        then k0 += 0x9E3779B9, k1 += 0xBB67AE85  (mod 2³²)

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c = jnp.asarray(counter).astype(jnp.uint32)
    return jnp.stack(_rounds((c[..., 0], c[..., 1], c[..., 2], c[..., 3]), _words(key)), axis=-1)


def random_key(seed: int) -> UInt32[Array, "2"]:
    """The key ``(seed mod 2³², seed >> 32)`` of a seed from 0 to 2⁶⁴ - 1. Raises InputError for any other seed."""
    problems = Problems("random_key", InputError)
    problems.expect(0 <= seed < 2**64, f"seed: expected a whole number from 0 to 2**64 - 1, got {seed}")
    problems.raise_if_any()
    return jnp.asarray(np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32))


def fold(key: Key, number: int | np.integer[Any] | Integer[Array | np.ndarray, ""]) -> UInt32[Array, "2"]:
    """The key of the place ``number`` under ``key``: two words of ``philox((number, 0, 0, 1), key)``.

    ``number`` is a 32-bit word and may be traced. Raises InputError for a key of another shape.
    """
    word = jnp.uint32(number) if isinstance(number, int) else jnp.asarray(number).astype(jnp.uint32)
    folded: Array = _fold(_words(key), word)
    return folded


def fold_all(key: Key | None, count: int) -> list[UInt32[Array, "2"] | None]:
    """The keys of the places ``0 … count - 1``, in one go. Without a key (no dropout) there are none for any place."""
    if key is None:
        return [None] * count
    return list(_fold(_words(key), jnp.arange(count, dtype=jnp.uint32)))


def random_words(key: Key, shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Words of 32 random bits: element i (row-major) is word ``i mod 4`` of ``philox((i // 4, 0, 0, 0), key)``.

    Raises InputError for a key of another shape, or for 2³² elements and more.
    """
    size = math.prod(shape)
    problems = Problems("random_words", InputError)
    problems.expect(size < 2**32, f"shape: expected fewer than 2**32 elements, got {size} in {shape}")
    problems.raise_if_any()
    words: Array = _fill(_words(key), shape)
    return words


class Dropout(nnx.Module):
    """Each element is kept with probability ``1 - rate`` and then multiplied by ``1 / (1 - rate)``; others become 0.

    An element is kept iff its word is at least ``floor(rate · 2³²)``. A NaN that is dropped is 0. With rate 0,
    or without a key, X is given back as it is. Raises ConfigError for a rate outside [0, 1).

    Source: Srivastava et al. 2014, in the form that leaves inference alone.
    """

    def __init__(self, rate: float) -> None:
        problems = Problems("Dropout", ConfigError)
        problems.expect(0 <= rate < 1, f"rate: expected a rate in [0, 1), got {rate}")
        problems.raise_if_any()
        self.rate = float(rate)

    def __call__(self, X: Float[Array | np.ndarray, "*shape"], rng: Key | None = None) -> Float[Array, "*shape"]:
        X = jnp.asarray(X)
        if self.rate == 0 or rng is None:
            return X
        kept = random_words(rng, X.shape) >= jnp.uint32(int(self.rate * 2**32))
        wide = jnp.promote_types(X.dtype, jnp.float32)  # so that 1 / (1 - rate) is not rounded to 8 bits first
        scaled = (X.astype(wide) * (1 / (1 - self.rate))).astype(X.dtype)
        return jnp.where(kept, scaled, jnp.zeros_like(X))


@jax.jit
def _fold(key: UInt32[Array, "2"], number: UInt32[Array, "*n"]) -> UInt32[Array, "*n 2"]:
    zero = jnp.zeros_like(number)
    return jnp.stack(_rounds((number, zero, zero, zero + 1), key)[:2], axis=-1)


@functools.partial(jax.jit, static_argnums=1)
def _fill(key: UInt32[Array, "2"], shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    i = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    zero = jnp.zeros_like(i)
    # every element computes its block of four anew: cheap arithmetic that XLA fuses into the one loop that uses it
    w0, w1, w2, w3 = _rounds((i >> 2, zero, zero, zero), key)
    place = i & 3
    return jnp.where(place < 2, jnp.where(place == 0, w0, w1), jnp.where(place == 2, w2, w3))


def _rounds(counter: Words, key: UInt32[Array, "2"]) -> Words:
    c0, c1, c2, c3 = counter
    k0, k1 = key[0], key[1]
    for _ in range(10):
        (h0, l0), (h1, l1) = _product(0xD2511F53, c0), _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = k0 + jnp.uint32(0x9E3779B9), k1 + jnp.uint32(0xBB67AE85)
    return c0, c1, c2, c3


def _product(a: int, b: UInt32[Array, "*n"]) -> tuple[UInt32[Array, "*n"], UInt32[Array, "*n"]]:
    """High and low word of the 64-bit product a · b: JAX has no 64-bit integers unless told."""
    # one instruction, but one that XLA does not spread over several devices ("Unable to convert MHLO to StableHLO")
    high = jax.lax.mulhi(jnp.uint32(a), b) if jax.device_count() == 1 else _high_word(a, b)
    return high, jnp.uint32(a) * b


def _high_word(a: int, b: UInt32[Array, "*n"]) -> UInt32[Array, "*n"]:
    """High word of a · b from products of halves, none of which exceeds 32 bits."""
    a1, a0 = jnp.uint32(a >> 16), jnp.uint32(a & 0xFFFF)
    b1, b0 = b >> 16, b & 0xFFFF
    carried = (a0 * b0 >> 16) + (a1 * b0 & 0xFFFF) + (a0 * b1 & 0xFFFF)
    high: Array = a1 * b1 + (a1 * b0 >> 16) + (a0 * b1 >> 16) + (carried >> 16)
    return high


def _words(key: Key) -> UInt32[Array, "2"]:
    problems = Problems("rng", InputError)
    problems.expect(
        tuple(key.shape) == (2,) and dtype_name(key) in INTEGERS,
        f"rng: expected a key of two 32-bit words (see random_key), got {dtype_name(key)} of shape {tuple(key.shape)}",
    )
    problems.raise_if_any()
    return jnp.asarray(key).astype(jnp.uint32)
