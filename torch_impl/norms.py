"""Layer norm and RMS norm, computed wide.

``weight="one_plus"``: the factor is ``1 + w``, summed wide. ``cast="after_weight"``: weight and bias are applied wide,
and the result is cast to compute_dtype (Llama's order is ``"before_weight"``: the normalised value is cast first,
then multiplied by the cast factor and added to the cast bias).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_impl import fused
from torch_impl.linear import DTYPES, new_parameter, wide_dtype
from torch_impl.weights import initialize
from twinformer.checks import check_sizes, check_width
from twinformer.config import DType, NormCast, NormWeight, StackConfig


class _Norm(nn.Module):
    """What the two have in common: weight, bias, and the two orders of casting."""

    kind = "norm"

    def __init__(
        self,
        width: int,
        eps: float,
        bias: bool,
        weight: NormWeight,
        cast: NormCast,
        param_dtype: DType,
        compute_dtype: DType,
        seed: int | None,
    ) -> None:
        super().__init__()
        check_sizes(type(self).__name__, width=width)
        self.width = width
        self.eps = eps
        self.norm_weight: NormWeight = weight
        self.cast: NormCast = cast
        self.compute_dtype = DTYPES[compute_dtype]
        self.wide = wide_dtype(self.compute_dtype)
        self.weight = new_parameter(width, dtype=param_dtype)
        self.bias = new_parameter(width, dtype=param_dtype) if bias else None
        initialize(self, seed)

    def _normalised(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        raise NotImplementedError

    def _fused(self, x: Float[Tensor, "*rows D"], factor: Float[Tensor, " D"]) -> Float[Tensor, "*rows D"] | None:
        """Norm, factor and bias in one kernel, where there is one."""
        return None

    def forward(self, X: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        if not torch.compiler.is_compiling():
            check_width(type(self).__name__, X=X, width=self.width)
        x = X.to(self.compute_dtype).to(self.wide)
        factor = self.weight.to(self.wide)
        if self.norm_weight == "one_plus":
            factor = 1 + factor
        if self.cast == "after_weight" and (whole := self._fused(x, factor)) is not None:
            return whole.to(self.compute_dtype)
        Y = self._normalised(x)
        dtype = self.wide if self.cast == "after_weight" else self.compute_dtype
        Y = Y.to(dtype) * factor.to(dtype)
        if self.bias is not None:
            Y = Y + self.bias.to(dtype)
        return Y.to(self.compute_dtype)

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}, bias={self.bias is not None}"


class LayerNorm(_Norm):
    """``(x - mean) / sqrt(var + eps) · w + b`` over the last axis, population variance in two passes.

    Book, chapter "Transformers", "Layer norm"; Ba, Kiros & Hinton 2016. Raises InputError for another width or a dtype
    that is no float.
    """

    def __init__(
        self,
        width: int,
        *,
        eps: float = 1e-5,
        bias: bool = True,
        weight: NormWeight = "plain",
        cast: NormCast = "after_weight",
        param_dtype: DType = "float32",
        compute_dtype: DType = "float32",
        seed: int | None = 0,
    ) -> None:
        super().__init__(width, eps, bias, weight, cast, param_dtype, compute_dtype, seed)

    def _normalised(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        """``(x - mean) / sqrt(var + eps)``."""
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + self.eps)

    def _fused(self, x: Float[Tensor, "*rows D"], factor: Float[Tensor, " D"]) -> Float[Tensor, "*rows D"] | None:
        return fused.layer_norm(x, factor, None if self.bias is None else self.bias.to(self.wide), self.eps)


class RMSNorm(_Norm):
    """``x / sqrt(mean(x²) + eps) · w`` over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467).

    Raises InputError for another width or a dtype that is no float.
    """

    def __init__(
        self,
        width: int,
        *,
        eps: float = 1e-5,
        weight: NormWeight = "plain",
        cast: NormCast = "after_weight",
        param_dtype: DType = "float32",
        compute_dtype: DType = "float32",
        seed: int | None = 0,
    ) -> None:
        super().__init__(width, eps, False, weight, cast, param_dtype, compute_dtype, seed)

    def _normalised(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        """``x / sqrt(mean(x²) + eps)``."""
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + self.eps)


def make_norm(width: int, config: StackConfig) -> LayerNorm | RMSNorm:
    """The norm that the config asks for, as a part: its weights are for the owner to fill."""
    return _make(config.norm, width, config)


def make_head_norm(config: StackConfig) -> LayerNorm | RMSNorm | None:
    """The norm of each head's query or key vector, width K; None where the config asks for none."""
    return None if config.qk_norm == "none" else _make(config.qk_norm, config.key_dim, config)


def _make(name: str, width: int, config: StackConfig) -> LayerNorm | RMSNorm:
    if name == "layernorm":
        return LayerNorm(
            width,
            eps=config.norm_eps,
            bias=config.norm_bias,
            weight=config.norm_weight,
            cast=config.norm_cast,
            param_dtype=config.param_dtype,
            compute_dtype=config.compute_dtype,
            seed=None,
        )
    return RMSNorm(
        width,
        eps=config.norm_eps,
        weight=config.norm_weight,
        cast=config.norm_cast,
        param_dtype=config.param_dtype,
        compute_dtype=config.compute_dtype,
        seed=None,
    )
