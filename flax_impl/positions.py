"""Where a token is: sinusoids, learned rows, rotations of queries and keys, and biases on the scores.

Frequencies and slopes are computed in float64 on the host and rounded once to the wide dtype.
"""

import bisect
import math
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Float64, Int, Integer

from flax_impl.dropout import Dropout, Key
from flax_impl.linear import check_choices, check_dtypes, check_ids, take_rows, wide_dtype
from flax_impl.weights import initialize
from twinformer.checks import check_sequence, check_sizes
from twinformer.config import DType, RotaryConvention, RotaryScaling, SinusoidLayout, SinusoidSpacing
from twinformer.errors import InputError, Problems

Positions = Integer[Array | np.ndarray, "#B T"]


class PositionalEncoding(nnx.Module):
    """``dropout(X + P[positions])``, positions ``0 … T-1`` when None.

    ``P[p]`` holds the sine and cosine of ``(p + offset) · f_i`` for the frequencies i of ``H = ceil(D/2)``:
    ``f_i = 10000^(-2i/D)`` (``textbook``) or ``10000^(-i/(H-1))`` (``endpoint``, tensor2tensor's), laid out as
    ``[sin_0, cos_0, sin_1, …]`` (``interleaved``) or ``[sin_0 … sin_{H-1}, cos_0 …]`` (``halves``), cut to D columns.
    ``X [B, T, D] -> [B, T, D]`` in the dtype of X. A position outside ``0 … max_len - 1`` gives NaN. Raises
    InputError for another width or more than ``max_len`` positions.

    Source: Vaswani et al. 2017, section 3.5; book, "Position embeddings".
    """

    def __init__(
        self,
        model_dim: int,
        dropout: float = 0.1,
        max_len: int = 5000,
        *,
        layout: SinusoidLayout = "interleaved",
        spacing: SinusoidSpacing = "textbook",
        offset: int = 0,
    ) -> None:
        check_sizes("PositionalEncoding", model_dim=model_dim, max_len=max_len)
        check_choices("PositionalEncoding", layout=(layout, SinusoidLayout), spacing=(spacing, SinusoidSpacing))
        self.model_dim, self.max_len = model_dim, max_len
        self.layout, self.spacing, self.offset = layout, spacing, offset
        self.dropout = Dropout(dropout)

    def __call__(
        self,
        X: Float[Array | np.ndarray, "B T D"],
        positions: Positions | None = None,
        *,
        rng: Key | None = None,
    ) -> Float[Array, "B T D"]:
        check_sequence("PositionalEncoding", X=X, model_dim=self.model_dim, max_len=self.max_len, positions=positions)
        X = jnp.asarray(X)
        positions = jnp.arange(X.shape[1])[None] if positions is None else jnp.asarray(positions)
        return self.dropout(X + self._rows(positions, wide_dtype(X.dtype)).astype(X.dtype), rng)

    def _frequencies(self) -> Float64[np.ndarray, " H"]:
        """One frequency for each pair of columns."""
        D, H = self.model_dim, -(-self.model_dim // 2)
        i = np.arange(H)
        return 10000.0 ** (-2 * i / D if self.spacing == "textbook" else -i / max(H - 1, 1))

    def _rows(self, positions: Positions, wide: np.dtype[Any]) -> Float[Array, "#B T D"]:
        angles = (positions.astype(wide) + self.offset)[..., None] * jnp.asarray(self._frequencies(), wide)
        sin, cos = jnp.sin(angles), jnp.cos(angles)
        if self.layout == "interleaved":
            P = jnp.stack([sin, cos], axis=-1).reshape(*positions.shape, -1)
        else:
            P = jnp.concatenate([sin, cos], axis=-1)
        good = (positions >= 0) & (positions.astype(wide) < self.max_len)
        return jnp.where(good[..., None], P[..., : self.model_dim], jnp.nan)


class LearnedPositions(nnx.Module):
    """Row ``position + offset`` of a table ``[num_positions, D]``, whose first ``offset`` rows no position uses.

    ``positions [B or 1, T] -> [B or 1, T, D]`` in ``compute_dtype``. Raises InputError for positions outside
    ``0 … num_positions - offset - 1``; NaN for them where they cannot be seen.

    Source: Gehring et al. 2017; book, "Position embeddings".
    """

    kind: ClassVar[Literal["embedding"]] = "embedding"

    def __init__(
        self,
        num_positions: int,
        model_dim: int,
        *,
        offset: int = 0,
        param_dtype: DType = "float32",
        compute_dtype: DType = "float32",
        seed: int | None = 0,
    ) -> None:
        check_sizes("LearnedPositions", num_positions=num_positions, model_dim=model_dim)
        check_dtypes("LearnedPositions", param_dtype=param_dtype, compute_dtype=compute_dtype)
        self.num_positions, self.offset = num_positions, offset
        self.compute_dtype = compute_dtype
        self.embedding = nnx.Param(jnp.zeros((num_positions, model_dim), param_dtype))
        if seed is not None:
            initialize(self, seed)

    def __call__(self, positions: Positions) -> Float[Array, "#B T D"]:
        check_ids("LearnedPositions", "positions", positions, self.num_positions - self.offset)
        return take_rows(self.embedding[...], positions, self.offset).astype(self.compute_dtype)


class RotaryEncoding(nnx.Module):
    """Rotates pair i of the first ``R = rotary_dim`` entries of each head by ``position · base^(-2i/R)``.

    ``(a, b) → (a cos - b sin, b cos + a sin)`` for the pairs ``(x_i, x_{i+R/2})`` (``half``) or
    ``(x_{2i}, x_{2i+1})`` (``interleaved``); the rest of the head passes. Frequencies are scaled as
    ``RotaryScaling`` says. ``X [B, A, T, K]`` and ``positions [B or 1, T]`` give ``[B, A, T, K]`` in the dtype of X;
    angles and rotation are wide.

    Source: Su et al. 2021, arXiv:2104.09864, eq. 34.
    """

    def __init__(
        self,
        rotary_dim: int,
        *,
        base: float = 10000.0,
        convention: RotaryConvention = "half",
        scaling: RotaryScaling = RotaryScaling(),  # noqa: B008 (frozen)
    ) -> None:
        check_sizes("RotaryEncoding", rotary_dim=rotary_dim)
        check_choices("RotaryEncoding", convention=(convention, RotaryConvention))
        problems = Problems("RotaryEncoding", InputError)
        problems.expect(rotary_dim % 2 == 0, f"rotary_dim: expected an even number, got {rotary_dim}")
        problems.raise_if_any()
        self.rotary_dim, self.base, self.convention, self.scaling = rotary_dim, base, convention, scaling

    def __call__(self, X: Float[Array | np.ndarray, "B A T K"], positions: Positions) -> Float[Array, "B A T K"]:
        X = jnp.asarray(X)
        R, wide = self.rotary_dim, wide_dtype(X.dtype)
        angles = jnp.asarray(positions).astype(wide)[:, None, :, None] * jnp.asarray(self._frequencies(), wide)
        stretch = self.scaling.attention_factor if self.scaling.kind == "yarn" else 1.0
        cos, sin = jnp.cos(angles) * stretch, jnp.sin(angles) * stretch
        turning = X[..., :R].astype(wide)
        if self.convention == "half":
            a, b = turning[..., : R // 2], turning[..., R // 2 :]
            turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        else:
            a, b = turning[..., 0::2], turning[..., 1::2]
            turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turning.shape)
        return jnp.concatenate([turned.astype(X.dtype), X[..., R:]], axis=-1)

    def _frequencies(self) -> Float64[np.ndarray, " R_half"]:
        """One frequency for each pair, scaled as ``RotaryScaling`` says and cites."""
        R, scaling = self.rotary_dim, self.scaling
        i = np.arange(R // 2)
        f: Float64[np.ndarray, " R_half"] = self.base ** (-2 * i / R)
        slow = f / scaling.factor
        original = scaling.original_context_length
        if scaling.kind == "linear":
            return slow
        if scaling.kind == "llama3":
            wavelength = 2 * math.pi / f
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            s = (original / wavelength - low) / (high - low)
            between = (1 - s) * slow + s * f
            return np.where(wavelength > original / low, slow, np.where(wavelength < original / high, f, between))
        if scaling.kind == "yarn":
            lo, hi = (self._dimension_of(rotations) for rotations in (scaling.beta_fast, scaling.beta_slow))
            if scaling.truncate:
                lo, hi = math.floor(lo), math.ceil(hi)
            lo, hi = max(lo, 0), min(hi, R - 1)
            if lo == hi:
                hi += 0.001
            ramp = np.clip((i - lo) / (hi - lo), 0, 1)
            f = slow * ramp + f * (1 - ramp)
        return f

    def _dimension_of(self, rotations: float) -> float:
        """yarn: the dimension at which the original length holds so many rotations."""
        length = self.scaling.original_context_length
        return self.rotary_dim * math.log(length / (2 * math.pi * rotations)) / (2 * math.log(self.base))


class RelativeBias(nnx.Module):
    """A learned number for each head and each bucket of the distance ``key - query``, to add to the scores.

    Small distances have a bucket each; from m on, buckets grow by equal ratios up to ``max_distance``:
    ``m + floor(ln(d/m) / ln(max_distance/m) · (buckets - m))``, at most ``buckets - 1``. Both ways, half of the buckets
    are for keys after the query. ``query_positions [B or 1, T]`` and ``key_positions [B or 1, S]`` give
    ``[B or 1, A, T, S]``, wide.

    Source: Raffel et al. 2020 (T5), arXiv:1910.10683, section 2.1, and the code released with it.
    """

    kind: ClassVar[Literal["embedding"]] = "embedding"

    def __init__(
        self,
        num_buckets: int,
        num_heads: int,
        *,
        max_distance: int = 128,
        bidirectional: bool,
        param_dtype: DType = "float32",
        compute_dtype: DType = "float32",
        seed: int | None = 0,
    ) -> None:
        check_sizes("RelativeBias", num_buckets=num_buckets, num_heads=num_heads, max_distance=max_distance)
        check_dtypes("RelativeBias", param_dtype=param_dtype, compute_dtype=compute_dtype)
        problems = Problems("RelativeBias", InputError)
        problems.expect(num_buckets % 4 == 0, f"num_buckets: expected a multiple of 4, got {num_buckets}")
        problems.expect(
            max_distance > num_buckets // 2,
            f"max_distance: expected more than num_buckets // 2 = {num_buckets // 2}, got {max_distance}",
        )
        problems.raise_if_any()
        self.num_buckets, self.max_distance, self.bidirectional = num_buckets, max_distance, bidirectional
        self.compute_dtype = compute_dtype
        self.embedding = nnx.Param(jnp.zeros((num_buckets, num_heads), param_dtype))
        if seed is not None:
            initialize(self, seed)

    def __call__(
        self, query_positions: Positions, key_positions: Integer[Array | np.ndarray, "#B S"]
    ) -> Float[Array, "#B A T S"]:
        table = jnp.asarray(self.embedding[...], wide_dtype(self.compute_dtype))
        n = _distance(query_positions, key_positions)
        return jnp.moveaxis(table.at[self._buckets(n)].get(mode="promise_in_bounds"), -1, 1)

    def _buckets(self, n: Int[Array | np.ndarray, "*n"]) -> Int[Array, "*n"]:
        """The bucket of each ``n = key - query``."""
        n = jnp.asarray(n)
        buckets, first = self.num_buckets, jnp.zeros_like(n)
        if self.bidirectional:
            buckets //= 2
            first = jnp.where(n > 0, buckets, 0)
            d = jnp.abs(n)
        else:
            d = jnp.maximum(-n, 0)
        m = buckets // 2
        reached: Bool[Array, "*n edges"] = d[..., None] >= jnp.asarray(_bucket_edges(buckets, m, self.max_distance))
        return first + jnp.minimum(d, m) + jnp.sum(reached, axis=-1, dtype=n.dtype)


def alibi_slopes(num_heads: int) -> Float64[np.ndarray, " A"]:
    """``2^(-8(a+1)/A)`` for A a power of two; else those of the power P below, then every other one of 2P.

    Source: Press et al. 2022, arXiv:2108.12409, and the code released with it.
    """
    check_sizes("alibi_slopes", num_heads=num_heads)
    P = 2 ** (num_heads.bit_length() - 1)
    slopes = 2.0 ** (-8 * (np.arange(P) + 1) / P)
    finer = 2.0 ** (-8 * (np.arange(2 * P) + 1) / (2 * P))
    return np.concatenate([slopes, finer[0::2]])[:num_heads]


def alibi_bias(
    num_heads: int,
    query_positions: Positions,
    key_positions: Integer[Array | np.ndarray, "#B S"],
    *,
    compute_dtype: DType = "float32",
) -> Float[Array, "#B A T S"]:
    """``-slope_a · |query - key|``, wide for ``compute_dtype``. Source: as ``alibi_slopes``."""
    wide = wide_dtype(compute_dtype)
    slopes = jnp.asarray(alibi_slopes(num_heads), wide)[:, None, None]
    return -slopes * jnp.abs(_distance(query_positions, key_positions))[:, None].astype(wide)


def _distance(query_positions: Positions, key_positions: Integer[Array | np.ndarray, "#B S"]) -> Int[Array, "#B T S"]:
    """``key - query``, signed whatever the dtype of the positions."""
    query, key = (jnp.asarray(positions).astype(jnp.int32) for positions in (query_positions, key_positions))
    return key[:, None, :] - query[:, :, None]


def _bucket_edges(buckets: int, m: int, max_distance: int) -> Int[np.ndarray, " edges"]:
    """The smallest distance of each bucket after the m-th.

    ``ln(d/m) / ln(max/m) · (buckets - m) >= k`` is ``d^(buckets-m) m^k >= max^k m^(buckets-m)``: a question for
    whole numbers, so that a distance which is exactly a power falls on the right side.
    """
    n = buckets - m

    def edge(k: int) -> int:
        bound = max_distance**k * m**n
        return bisect.bisect_left(range(max_distance + 1), True, key=lambda d: d**n * m**k >= bound)

    return np.array([edge(k) for k in range(1, n)], np.int32)
