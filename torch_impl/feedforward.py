"""The feed-forward layer: the same small network at every position."""

import functools
from typing import get_args

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor, nn

from torch_impl.dropout import Dropout, Key
from torch_impl.linear import Linear
from torch_impl.weights import initialize
from twinformer.checks import check_sizes, check_width
from twinformer.config import Activation, DType
from twinformer.errors import ConfigError


def activate(X: Float[Tensor, "*shape"], name: Activation) -> Float[Tensor, "*shape"]:
    """The activation by its name; ConfigError for an unknown one.

    - ``relu``: ``max(x, 0)``
    - ``gelu``: ``x Φ(x) = x/2 (1 + erf(x / sqrt(2)))``
    - ``gelu_tanh``: ``x/2 (1 + tanh(sqrt(2/π) (x + 0.044715 x³)))``
    - ``silu``: ``x σ(x)``
    """
    match name:
        case "relu":
            return F.relu(X)
        case "gelu":
            return F.gelu(X)
        case "gelu_tanh":
            return F.gelu(X, approximate="tanh")
        case "silu":
            return F.silu(X)
    raise ConfigError("activate", [f"name: expected one of 'relu', 'gelu', 'gelu_tanh', 'silu', got {name!r}"])


class FeedForward(nn.Module):
    """``down(dropout(f(up X)))``; gated: ``down(dropout(f(gate X) · up X))``, for ``X [..., D]``.

    Book, chapter "Transformers", "Feedforward layer"; gates: Shazeer 2020, arXiv:2002.05202. Raises InputError for
    another width or a dtype that is no float.
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
        super().__init__()
        check_sizes("FeedForward", model_dim=model_dim, hidden_dim=hidden_dim)
        self.model_dim = model_dim
        self.activation: Activation = activation

        linear = functools.partial(Linear, bias=bias, param_dtype=param_dtype, compute_dtype=compute_dtype, seed=None)
        self.up = linear(model_dim, hidden_dim)
        self.gate = linear(model_dim, hidden_dim) if gated else None
        self.down = linear(hidden_dim, model_dim)
        self.dropout = Dropout(dropout)
        if activation not in get_args(Activation):
            options = ", ".join(repr(name) for name in get_args(Activation))
            raise ConfigError("FeedForward", [f"activation: expected one of {options}, got {activation!r}"])
        initialize(self, seed)

    def forward(self, X: Float[Tensor, "*rows D"], *, rng: Key | None = None) -> Float[Tensor, "*rows D"]:
        if not torch.compiler.is_compiling():
            check_width("FeedForward", X=X, width=self.model_dim)
        if self.gate is None:
            hidden = activate(self.up(X), self.activation)
        else:
            hidden = activate(self.gate(X), self.activation) * self.up(X)
        Y: Tensor = self.down(self.dropout(hidden, rng))
        return Y
