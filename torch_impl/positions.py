"""Where a token stands: five ways to say it.

Sinusoids and learned rows are added to the embeddings, rotations turn queries and keys, relative buckets and ALiBi
are biases on the scores. Frequencies and slopes are computed in float64 on the host and rounded once to the wide
dtype; an angle is position · frequency in the wide dtype.
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Float64, Int64, Integer
from torch import Tensor, nn

from torch_impl.dropout import Dropout, Key
from torch_impl.linear import DTYPES, new_parameter, wide_dtype
from torch_impl.weights import initialize
from twinformer.checks import INTEGERS, check_sequence, check_sizes, check_tokens, dtype_name
from twinformer.config import DType, RotaryConvention, RotaryScaling, SinusoidLayout, SinusoidSpacing
from twinformer.errors import InputError


class _Frequencies(nn.Module):
    """Frequencies that follow their module from device to device, but that no cast of the module rounds."""

    rounded: Tensor

    def __init__(self, frequencies: npt.NDArray[np.float64]) -> None:
        super().__init__()
        self.exact = frequencies.tolist()
        self.register_buffer("rounded", torch.tensor(self.exact, dtype=torch.float32), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.rounded = torch.tensor(self.exact, dtype=torch.float32, device=self.rounded.device)
        return self

    def _angles(self, positions: Tensor, wide: torch.dtype) -> Tensor:
        """``[…] -> […, number of frequencies]``"""
        if wide == torch.float64:
            frequencies = torch.tensor(self.exact, dtype=wide, device=self.rounded.device)
        else:
            frequencies = self.rounded
        return positions[..., None].to(wide) * frequencies.to(positions.device)


class PositionalEncoding(_Frequencies):
    """``dropout(X + P[positions])``, with P the sinusoids of Vaswani et al. 2017, section 3.5; for ``X [B, T, D]``.

    Frequency i of ``H = ceil(D/2)``: ``10000^(-2i/D)`` (``textbook``), or ``10000^(-i/(H-1))`` (``endpoint``,
    tensor2tensor's; 1 for H = 1). Angle = (position + offset) · frequency. Columns: ``[sin_0, cos_0, sin_1, …]``
    (``interleaved``) or ``[sin_0 … sin_{H-1}, cos_0 …]`` (``halves``), cut to D. Sines are computed wide, then cast to
    the dtype of X. Raises InputError for a wrong shape or more than ``max_len`` positions; a position that P does not
    have gives NaN.
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
        half = (model_dim + 1) // 2
        step = 2 / model_dim if spacing == "textbook" else 1 / max(half - 1, 1)
        super().__init__(10000.0 ** (-np.arange(half, dtype=np.float64) * step))
        self.model_dim, self.max_len, self.offset = model_dim, max_len, offset
        self.layout: SinusoidLayout = layout
        self.dropout = Dropout(dropout)

    def forward(
        self,
        X: Float[Tensor, "B T D"],
        positions: Integer[Tensor, "#B T"] | None = None,
        *,
        rng: Key | None = None,
    ) -> Float[Tensor, "B T D"]:
        if not torch.compiler.is_compiling():
            check_sequence(
                "PositionalEncoding", X=X, model_dim=self.model_dim, max_len=self.max_len, positions=positions
            )
        wide = wide_dtype(X.dtype)
        if positions is None:
            angle = self._angles(torch.arange(X.shape[1], device=X.device)[None] + self.offset, wide)
        else:
            positions = positions.long()  # small whole numbers would wrap in the comparison
            absent = (positions < 0) | (positions >= self.max_len)
            angle = self._angles(positions + self.offset, wide).masked_fill(absent[..., None], torch.nan)
        sine, cosine = angle.sin(), angle.cos()
        if self.layout == "interleaved":
            P = torch.stack((sine, cosine), -1).flatten(-2)
        else:
            P = torch.cat((sine, cosine), -1)
        Y: Tensor = self.dropout(X + P[..., : self.model_dim].to(X.dtype), rng)
        return Y


class LearnedPositions(nn.Module):
    """Rows ``positions + offset`` of ``weight [num_positions, D]``, for ``positions [B or 1, T]``.

    ``num_positions`` counts the first ``offset`` rows, which no position has. Raises InputError for a position
    out of range; inside ``torch.compile``, where positions cannot be seen, it gives NaN.
    """

    kind = "embedding"

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
        super().__init__()
        check_sizes("LearnedPositions", num_positions=num_positions, model_dim=model_dim)
        self.num_positions, self.offset = num_positions, offset
        self.compute_dtype = DTYPES[compute_dtype]
        self.weight = new_parameter(num_positions, model_dim, dtype=param_dtype)
        initialize(self, seed)

    def forward(self, positions: Integer[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        if not torch.compiler.is_compiling():
            check_rows("LearnedPositions", "positions", positions, self.num_positions - self.offset)
        return look_up(self.weight[self.offset :], positions, self.compute_dtype)


def check_rows(where: str, name: str, ids: Tensor, size: int) -> None:
    """Raise InputError unless ``ids``, of any shape, are whole numbers from 0 to ``size - 1``."""
    if ids.numel():
        lowest, highest = extremes(ids)
        flat = ids.reshape(1, -1)
        check_tokens(
            where,
            tokens=flat,
            vocab_size=size,
            context_length=flat.shape[1],
            lowest=lowest,
            highest=highest,
            name=name,
        )


def extremes(ids: Tensor | None) -> tuple[int, int] | tuple[None, None]:
    """The lowest and the highest id, or None for each where there is none to be seen."""
    if ids is None or ids.numel() == 0 or ids.is_meta or dtype_name(ids) not in INTEGERS:
        return None, None
    lowest, highest = torch.stack(ids.long().aminmax()).tolist()  # one transfer from the device, not two
    return lowest, highest


def look_up(table: Float[Tensor, "V D"], ids: Integer[Tensor, "*rows"], dtype: torch.dtype) -> Float[Tensor, "*rows D"]:
    """Rows of a table, cast to ``dtype``; an id out of range gives NaN, never another row's value."""
    size = table.shape[0]
    ids = ids.long()  # small whole numbers would wrap in the comparison
    absent = (ids < 0) | (ids >= size)
    rows = F.embedding(ids.clamp(0, size - 1), table).to(dtype)
    return rows.masked_fill(absent[..., None], torch.nan)


class RotaryEncoding(_Frequencies):
    """Rotates pairs of the first ``rotary_dim = R`` entries of each head by angle position · frequency; the rest pass.

    Su et al. 2021, arXiv:2104.09864. Frequency i of R/2: ``base^(-2i/R)``, then scaled (``scale_frequencies``). Pair i
    is ``(x_i, x_{i+R/2})`` (``half``) or ``(x_{2i}, x_{2i+1})`` (``interleaved``), and
    ``(a, b) -> (a cos - b sin, b cos + a sin)``. Computed wide, then cast back to the dtype of X.
    """

    def __init__(
        self,
        rotary_dim: int,
        *,
        base: float = 10000.0,
        convention: RotaryConvention = "half",
        scaling: RotaryScaling = RotaryScaling(),  # noqa: B008 (it is frozen)
    ) -> None:
        check_sizes("RotaryEncoding", rotary_dim=rotary_dim)
        if rotary_dim % 2:
            raise InputError("RotaryEncoding", [f"rotary_dim: expected an even number, got {rotary_dim}"])
        super().__init__(
            scale_frequencies(base ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim), base, scaling)
        )
        self.rotary_dim = rotary_dim
        self.convention: RotaryConvention = convention
        self.factor = scaling.attention_factor if scaling.kind == "yarn" else 1.0

    def forward(self, X: Float[Tensor, "B A T K"], positions: Integer[Tensor, "#B T"]) -> Float[Tensor, "B A T K"]:
        R = self.rotary_dim
        wide = wide_dtype(X.dtype)
        angle = self._angles(positions, wide)[:, None]  # the same for all heads
        cosine, sine = angle.cos() * self.factor, angle.sin() * self.factor
        turning, rest = X[..., :R].to(wide), X[..., R:]
        if self.convention == "half":
            a, b = turning.chunk(2, -1)
            turned = torch.cat((a * cosine - b * sine, b * cosine + a * sine), -1)
        else:
            a, b = turning[..., 0::2], turning[..., 1::2]
            turned = torch.stack((a * cosine - b * sine, b * cosine + a * sine), -1).flatten(-2)
        return torch.cat((turned.to(X.dtype), rest), -1)


def scale_frequencies(
    frequencies: npt.NDArray[np.float64], base: float, scaling: RotaryScaling
) -> npt.NDArray[np.float64]:
    """Rotary frequencies f stretched for longer texts.

    - ``linear`` (Chen et al. 2023, arXiv:2306.15595): ``f / factor``.
    - ``llama3``: by wavelength ``2π/f``: long ones as linear, short ones kept, a blend between.
    - ``yarn`` (Peng et al. 2023, arXiv:2309.00071, "NTK-by-parts"): a ramp over the dimensions, from those that turn
      ``beta_fast`` times over the original length (kept) to those that turn ``beta_slow`` times (as linear).
    """
    f, original = frequencies, scaling.original_context_length
    match scaling.kind:
        case "linear":
            return f / scaling.factor
        case "llama3":
            wavelength = 2 * np.pi / f
            low, high = original / scaling.low_freq_factor, original / scaling.high_freq_factor
            s = (original / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
            blend = (1 - s) * f / scaling.factor + s * f
            return np.asarray(np.where(wavelength > low, f / scaling.factor, np.where(wavelength < high, f, blend)))
        case "yarn":
            R = 2 * len(f)

            def dimension(rotations: float) -> float:
                """The dimension that turns so many times over the original length."""
                return R * math.log(original / (2 * math.pi * rotations)) / (2 * math.log(base))

            lo, hi = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
            if scaling.truncate:
                lo, hi = math.floor(lo), math.ceil(hi)
            lo, hi = max(lo, 0), min(hi, R - 1)
            if lo == hi:
                hi += 0.001
            ramp = np.clip((np.arange(R // 2, dtype=np.float64) - lo) / (hi - lo), 0, 1)
            return np.asarray(f / scaling.factor * ramp + f * (1 - ramp))
    return f


class RelativeBias(nn.Module):
    """A learned bias for each head and each bucket of distances.

    T5: Raffel et al. 2020, arXiv:1910.10683, section 2.1, and its released code, but that the floor is exact here. With
    ``n = key - query``. Bidirectional: the buckets halve, ``n > 0`` takes the second half, and ``d = |n|``; one way:
    ``d = max(-n, 0)``. Of the ``buckets`` then left, the first ``m = buckets/2`` are one distance each, the others
    grow: ``m + floor(ln(d/m) / ln(max_distance/m) · (buckets - m))``, at most ``buckets - 1``.
    """

    kind = "embedding"

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
        super().__init__()
        check_sizes("RelativeBias", num_buckets=num_buckets, num_heads=num_heads, max_distance=max_distance)
        self.bidirectional = bidirectional
        self.buckets = num_buckets // 2 if bidirectional else num_buckets
        self.starts = bucket_starts(self.buckets, max_distance)
        self.wide = wide_dtype(DTYPES[compute_dtype])
        self.weight = new_parameter(num_buckets, num_heads, dtype=param_dtype)
        initialize(self, seed)

    def _bucket(
        self, query_positions: Integer[Tensor, "#B T"], key_positions: Integer[Tensor, "#B S"]
    ) -> Int64[Tensor, "#B T S"]:
        """The bucket of each pair of positions."""
        n = key_positions[:, None, :].long() - query_positions[:, :, None].long()
        distance = n.abs() if self.bidirectional else (-n).clamp(min=0)
        starts = torch.tensor(self.starts, dtype=torch.int64, device=n.device)
        bucket = torch.bucketize(distance, starts, right=True)
        return bucket + self.buckets * (n > 0) if self.bidirectional else bucket

    def forward(
        self, query_positions: Integer[Tensor, "#B T"], key_positions: Integer[Tensor, "#B S"]
    ) -> Float[Tensor, "#B A T S"]:
        return F.embedding(self._bucket(query_positions, key_positions), self.weight.to(self.wide)).permute(0, 3, 1, 2)


def bucket_starts(buckets: int, max_distance: int) -> list[int]:
    """The least distance of every bucket but the first; a distance's bucket is the number of starts up to it.

    ``ln(d/m) / ln(max/m) · (buckets - m) >= k`` is ``d^(buckets-m) · m^k >= max^k · m^(buckets-m)``: whole numbers,
    so that no logarithm is rounded at a power.
    """
    m = buckets // 2
    grown = buckets - m
    starts = list(range(1, m + 1))
    for k in range(1, grown):
        d = starts[-1]
        while d**grown * m**k < max_distance**k * m**grown:
            d += 1
        starts.append(d)
    return starts


def alibi_slopes(num_heads: int) -> Float64[Tensor, " A"]:
    """The slope of each head (Press et al. 2022, arXiv:2108.12409, section 3).

    ``2^(-8(a+1)/A)`` for A a power of two; otherwise those of the next lower power P, then every other slope of 2P,
    from the first, until there are A (the paper's released code).
    """

    return torch.tensor(_slopes(num_heads), dtype=torch.float64)


def _slopes(num_heads: int) -> list[float]:
    power = 1 << (num_heads.bit_length() - 1)
    slopes = _geometric(power) + _geometric(2 * power)[::2]
    return slopes[:num_heads]


def _geometric(heads: int) -> list[float]:
    return [2.0 ** (-8 * a / heads) for a in range(1, heads + 1)]


def alibi_bias(
    num_heads: int,
    query_positions: Integer[Tensor, "#B T"],
    key_positions: Integer[Tensor, "#B S"],
    *,
    compute_dtype: DType = "float32",
) -> Float[Tensor, "#B A T S"]:
    """``-slope_a · |query - key|``, in the wide dtype of ``compute_dtype``."""
    wide = wide_dtype(DTYPES[compute_dtype])
    distance = (query_positions[:, None, :, None].long() - key_positions[:, None, None, :].long()).abs()
    slopes = torch.tensor(_slopes(num_heads), dtype=wide, device=distance.device)
    return -slopes[:, None, None] * distance.to(wide)
