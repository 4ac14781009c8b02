"""The feed-forward layer: the same two or three matrices at every position."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

from flax_impl.dropout import Dropout, Key
from flax_impl.linear import Linear, check_choices, check_dtypes
from flax_impl.weights import initialize
from twinformer.checks import check_sizes, check_width
from twinformer.config import Activation, DType


def activate(X: Float[Array | np.ndarray, "*n"], name: Activation) -> Float[Array, "*n"]:
    """The non-linearity, in the dtype of X.

    ``relu``: ``max(x, 0)``; ``gelu``: ``x Φ(x)`` (Hendrycks & Gimpel 2016, arXiv:1606.08415);
    ``gelu_tanh``: ``x/2 (1 + tanh(sqrt(2/π) (x + 0.044715 x³)))`` (same, section 2); ``silu``: ``x σ(x)``.
    Raises ConfigError for any other name.
    """
    check_choices("activate", name=(name, Activation))
    X = jnp.asarray(X)
    if name == "relu":
        return jax.nn.relu(X)
    if name == "gelu":
        return X / 2 * jax.lax.erfc(-X * math.sqrt(0.5))  # erfc(-x/√2) = 1 + erf(x/√2), exact far below 0 too
    if name == "gelu_tanh":
        return X / 2 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (X + 0.044715 * X * X * X)))
    return X * jax.nn.sigmoid(X)


class FeedForward(nnx.Module):
    """``down(dropout(f(up X)))``, or gated ``down(dropout(f(gate X) · up X))``.

    ``X [..., D] -> [..., D]`` in ``compute_dtype``. Raises InputError for another width or no float dtype,
    ConfigError for an unknown activation.

    Source: book, "Feedforward layer"; gated: Shazeer 2020, arXiv:2002.05202.
    """

    def __init__(
        self,
        model_dim: int,
        hidden_dim: int,
        *,
        activation: Activation = "relu",
        gated: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        param_dtype: DType = "float32",
        compute_dtype: DType = "float32",
        seed: int | None = 0,
    ) -> None:
        check_sizes("FeedForward", model_dim=model_dim, hidden_dim=hidden_dim)
        check_choices("FeedForward", activation=(activation, Activation))
        check_dtypes("FeedForward", param_dtype=param_dtype, compute_dtype=compute_dtype)

        linear = functools.partial(Linear, bias=bias, param_dtype=param_dtype, compute_dtype=compute_dtype, seed=None)
        self.model_dim, self.activation = model_dim, activation
        self.up = linear(model_dim, hidden_dim)
        self.gate = linear(model_dim, hidden_dim) if gated else None
        self.down = linear(hidden_dim, model_dim)
        self.dropout = Dropout(dropout)
        if seed is not None:
            initialize(self, seed)

    def __call__(self, X: Float[Array | np.ndarray, "*n D"], *, rng: Key | None = None) -> Float[Array, "*n D"]:
        check_width("FeedForward", X=X, width=self.model_dim)
        if self.gate is None:
            hidden = activate(self.up(X), self.activation)
        else:
            hidden = activate(self.gate(X), self.activation) * self.up(X)
        return self.down(self.dropout(hidden, rng))
