"""Matrix products, and the dtypes that every module speaks of.

Parameters are stored in ``param_dtype`` and cast, with the input, to ``compute_dtype`` when they are used. *Wide*
is float64 when computing in float64, else float32: norm statistics, angles, scores and softmax are wide.
"""

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own name for it)
from jaxtyping import Float
from torch import Tensor, nn

from torch_impl import fused
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


# of what is multiplied in parts: rows at most, elements of the matrix at least, and how many parts
_FEW_ROWS, _LARGE, _PARTS = 16, 1 << 16, 8
# numbers in the rows up to which the matrix may stand on the left
_SMALL = 4096


def affine(
    X: Float[Tensor, "*rows in"], W: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*rows out"]:
    """``X Wᵀ + b``, for a few rows on a CPU where no gradient is wanted as a batch of products with parts of W.

    PyTorch's product of one row with a matrix reads memory at a third of its speed there, the batch at all of it;
    writing text is reading the weights once a token. For a few short rows ``(W Xᵀ)ᵀ`` takes down to a third of the time
    of ``X Wᵀ``; for more or longer ones it takes longer.
    """
    rows = X.numel() // max(X.shape[-1], 1)
    is_few = 0 < rows <= _FEW_ROWS and W.numel() >= _LARGE and W.shape[0] % _PARTS == 0 and W.is_contiguous()
    is_plain = X.device.type == "cpu" and X.dtype in (torch.float32, torch.float64) and not torch.is_grad_enabled()
    if not (is_few and is_plain and fused.may_be_fast()):
        return F.linear(X, W, bias)
    parts, matrix = W.view(_PARTS, -1, W.shape[1]), X.reshape(rows, -1)
    if rows == 1 or X.numel() <= _SMALL:
        Y = torch.bmm(parts, matrix.t().expand(_PARTS, -1, -1)).reshape(W.shape[0], rows).t()
    else:
        Y = torch.bmm(matrix.expand(_PARTS, -1, -1), parts.transpose(1, 2)).transpose(0, 1)
    Y = Y.reshape(*X.shape[:-1], W.shape[0])
    return Y if bias is None else Y + bias


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
        return affine(X.to(dtype), self.weight.to(dtype), bias)

    def extra_repr(self) -> str:
        return f"{self.in_dim}, {self.out_dim}, bias={self.bias is not None}"
