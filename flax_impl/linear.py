"""Matrices at work: the product with a matrix, the look-up of its rows, and the numbers that they are made of.

*Wide* is the dtype of everything that must not be rounded early (norm statistics, angles, scores, softmax):
float64 when a module computes in float64, else float32.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Integer

from flax_impl.weights import initialize
from twinformer.checks import FLOATS, INTEGERS, check_sizes, check_tokens, check_width, dtype_name
from twinformer.config import DType
from twinformer.errors import ConfigError, Problems


def wide_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """float64 for float64, else float32."""
    return jnp.promote_types(dtype, jnp.float32)


def check_dtypes(where: str, **dtypes: str) -> None:
    """Raise ConfigError for a dtype that is not one of ours, and for float64 while JAX has it switched off.

    Without ``jax_enable_x64`` JAX would compute in float32 and say nothing.
    """
    problems = Problems(where, ConfigError)
    for name, dtype in dtypes.items():
        problems.expect(dtype in FLOATS, f"{name}: expected one of {', '.join(map(repr, FLOATS))}, got {dtype!r}")
        problems.expect(
            dtype != "float64" or jax.dtypes.canonicalize_dtype("float64") == "float64",
            f"{name}: expected jax_enable_x64 to be on for 'float64' "
            "(jax.config.update('jax_enable_x64', True)), got it off",
        )
    problems.raise_if_any()


def check_choices(where: str, **choices: tuple[Any, Any]) -> None:
    """Raise ConfigError unless every ``name=(value, Literal[...])`` holds one of its choices."""
    problems = Problems(where, ConfigError)
    for name, (value, options) in choices.items():
        wanted = get_args(options)
        problems.expect(value in wanted, f"{name}: expected one of {', '.join(map(repr, wanted))}, got {value!r}")
    problems.raise_if_any()


_LARGE = 1 << 16  # numbers of a matrix that is worth reading twice, once for each of two rows


def matmul(X: Float[Array, "..."], Y: Float[Array, "..."]) -> Float[Array, "..."]:
    """``X Y``, batched over the leading axes: every matrix product of this package.

    The one place where its precision is decided: JAX's own setting (``jax.default_matmul_precision``).
    """
    is_plain = Y.ndim == 2 or X.shape[:-2] == Y.shape[:-2]
    if _first_gradients and is_plain:
        return _product(X, Y)
    # two rows cost XLA on a CPU nearly three times one row, from memory twice what they need
    if Y.ndim == 2 and Y.size >= _LARGE and X.size == 2 * X.shape[-1] and jax.default_backend() == "cpu":
        rows = X.reshape(2, X.shape[-1])
        return jnp.concatenate([rows[:1] @ Y, rows[1:] @ Y]).reshape(*X.shape[:-1], Y.shape[-1])
    return jnp.matmul(X, Y)


def in_training() -> bool:
    """Whether what is traced now is within ``first_gradients``: no module is looked at there from outside."""
    return _first_gradients > 0


_first_gradients = 0  # blocks of ``first_gradients`` that are open


@contextlib.contextmanager
def first_gradients() -> Iterator[None]:
    """Functions traced within are differentiated once and backwards, as training does, and nothing else.

    The gradient of the right operand, ``Xᵀ dY``, is then taken from a transposed copy of X: on a CPU, XLA's product
    with a transposed operand costs up to three times one without. Values are the same.
    """
    global _first_gradients
    _first_gradients += 1
    try:
        yield
    finally:
        _first_gradients -= 1


@jax.custom_vjp
def _product(X: Float[Array, "*n rows in"], Y: Float[Array, "*m in out"]) -> Float[Array, "*n rows out"]:
    """``X Y``, with its gradients by hand: such a function has no forward mode and no second derivative."""
    return jnp.matmul(X, Y)


def _product_forward(X: Array, Y: Array) -> tuple[Array, tuple[Array, Array]]:
    return jnp.matmul(X, Y), (X, Y)


def _product_backward(kept: tuple[Array, Array], dZ: Array) -> tuple[Array, Array]:
    X, Y = kept
    dX = jnp.matmul(dZ, Y.swapaxes(-1, -2))
    if Y.ndim == 2:  # one matrix for all rows
        X, dZ = X.reshape(-1, X.shape[-1]), dZ.reshape(-1, dZ.shape[-1])
    # the barrier keeps XLA from undoing the copy
    turned = jax.lax.optimization_barrier(X.swapaxes(-1, -2))  # type: ignore[no-untyped-call]
    return dX, jnp.matmul(turned, dZ)


_product.defvjp(_product_forward, _product_backward)


class Outline(NamedTuple):
    """Shape and dtype of an array, which is all that most checks look at."""

    shape: tuple[int, ...]
    dtype: Any


def extremes(ids: Any) -> tuple[int | None, int | None]:
    """Lowest and highest of some ids; None where they cannot be known (traced, empty, or no whole numbers)."""
    if ids is None or isinstance(ids, jax.core.Tracer) or ids.size == 0 or dtype_name(ids) not in INTEGERS:
        return None, None
    values = np.asarray(ids)
    return int(values.min()), int(values.max())


def bounds(tokens: Any, positions: Any = None, token_types: Any = None) -> dict[str, Any]:
    """The extremes of what an embedding looks up, by the names that ``twinformer.checks.check_tokens`` has for them."""
    found: dict[str, Any] = {}
    for name, ids in (("", tokens), ("_position", positions), ("_type", token_types)):
        found[f"lowest{name}"], found[f"highest{name}"] = extremes(ids)
    return found


def check_ids(where: str, name: str, ids: Any, size: int) -> None:
    """Raise InputError unless ``ids``, of any shape, are whole numbers from 0 to ``size - 1`` as far as can be seen."""
    count = max(1, int(np.prod(ids.shape)))
    line = Outline((1, count), ids.dtype)
    check_tokens(where, tokens=line, name=name, vocab_size=size, context_length=count, **bounds(ids))


def take_rows(
    table: Float[Array | np.ndarray, "V D"], ids: Integer[Array | np.ndarray, "*n"], offset: int = 0
) -> Float[Array, "*n D"]:
    """Rows ``ids + offset`` of a table; NaN for ids below 0 or too high (JAX alone would count back from the end)."""
    table, ids = jnp.asarray(table), jnp.asarray(ids)
    if ids.dtype.itemsize < 4:  # the number of rows need not fit
        ids = ids.astype(jnp.int32)
    good = (ids >= 0) & (ids < table.shape[0] - offset)
    rows = jnp.where(good, ids, 0) + offset
    found = table.at[rows].get(mode="promise_in_bounds")
    return jnp.where(good[..., None], found, jnp.nan)


class Linear(nnx.Module):
    """``Y = X W + b`` with ``W [in, out]``, on the last axis.

    ``X [..., in] -> [..., out]`` in ``compute_dtype``. Raises InputError for another width or no float dtype.
    """

    kind: ClassVar[Literal["linear"]] = "linear"

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        bias: bool = True,
        param_dtype: DType = "float32",
        compute_dtype: DType = "float32",
        seed: int | None = 0,
    ) -> None:
        check_sizes("Linear", in_dim=in_dim, out_dim=out_dim)
        check_dtypes("Linear", param_dtype=param_dtype, compute_dtype=compute_dtype)
        self.in_dim = in_dim
        self.compute_dtype = compute_dtype
        self.kernel = nnx.Param(jnp.zeros((in_dim, out_dim), param_dtype))
        self.bias = nnx.Param(jnp.zeros(out_dim, param_dtype)) if bias else None
        if seed is not None:
            initialize(self, seed)

    def __call__(self, X: Float[Array | np.ndarray, "*n in"]) -> Float[Array, "*n out"]:
        check_width("Linear", X=X, width=self.in_dim)
        dtype = self.compute_dtype
        Y = matmul(jnp.asarray(X, dtype), jnp.asarray(self.kernel[...], dtype))
        return Y if self.bias is None else Y + jnp.asarray(self.bias[...], dtype)
