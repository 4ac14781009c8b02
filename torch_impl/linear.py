"""Matrix products, and the dtypes that every module speaks of.

Parameters are stored in ``param_dtype`` and cast, with the input, to ``compute_dtype`` when they are used. *Wide*
is float64 when computing in float64, else float32: norm statistics, angles, scores and softmax are wide.
"""

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own name for it)
from jaxtyping import Float
from torch import Tensor, nn

from torch_impl.weights import initialize
from twinformer.checks import check_sizes, check_width
from twinformer.config import DType

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def new_parameter(*shape: int, dtype: DType) -> nn.Parameter:
    """A parameter at zero, for its owner or a checkpoint to fill."""
    return nn.Parameter(torch.zeros(shape, dtype=DTYPES[dtype]))


class Linear(nn.Module):
    """``Y = X Wᵀ + b`` with ``W [out, in]``, for ``X [..., in]``.

    Raises InputError for another width or a dtype that is no float.
    """

    kind = "linear"

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
        super().__init__()
        check_sizes("Linear", in_dim=in_dim, out_dim=out_dim)
        self.in_dim, self.out_dim = in_dim, out_dim
        self.compute_dtype = DTYPES[compute_dtype]
        self.weight = new_parameter(out_dim, in_dim, dtype=param_dtype)
        self.bias = new_parameter(out_dim, dtype=param_dtype) if bias else None
        initialize(self, seed)

    def forward(self, X: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        if not torch.compiler.is_compiling():
            check_width("Linear", X=X, width=self.in_dim)
        dtype = self.compute_dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(X.to(dtype), self.weight.to(dtype), bias)

    def extra_repr(self) -> str:
        return f"{self.in_dim}, {self.out_dim}, bias={self.bias is not None}"
