"""What a model makes of its last hidden states: scores of tokens, labels, or one vector of a sequence."""

import functools
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from torch_impl.dropout import Dropout, Key
from torch_impl.embeddings import unembed
from torch_impl.feedforward import activate
from torch_impl.linear import Linear, new_parameter, wide_dtype
from torch_impl.norms import make_norm
from twinformer.config import ModelConfig
from twinformer.errors import ConfigError

#: what there is for a vector of zeros to be divided by
_LEAST = 1e-12


class Head(nn.Module):
    """What the head owns, as the config calls for it: ``transform`` and ``norm`` before the scores of tokens,
    ``pooler``, ``weight`` and ``bias`` of tokens or labels.

    Called ``(h [B, T, D], table, real, rng)``. ``tied``, ``untied``: logits ``[B, T, V]``. ``tokens``: scores of labels
    ``[B, T, num_labels]``. ``sequence``: ``[B, num_labels]``. ``pooled``: ``[B, D]``. ``none``: h. (Devlin et al. 2019,
    arXiv:1810.04805.)
    """

    kind = "linear"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        D, dtype = config.model_dim, config.param_dtype

        dense = functools.partial(Linear, D, D, param_dtype=dtype, compute_dtype=config.compute_dtype, seed=None)
        self.transform = dense() if config.head_transform else None
        self.norm = make_norm(D, config) if config.head_transform else None
        self.pooler = dense() if config.pooler != "none" else None
        rows = config.num_labels or config.vocab_size
        owns = config.head in ("untied", "sequence", "tokens")
        self.weight = new_parameter(rows, D, dtype=dtype) if owns else None
        self.bias = new_parameter(rows, dtype=dtype) if config.head_bias else None
        self.dropout = Dropout(config.head_dropout)

    def forward(
        self,
        h: Float[Tensor, "B T D"],
        table: Float[Tensor, "V D"],
        real: Bool[Tensor, "B T"] | None = None,
        rng: Key | None = None,
    ) -> Float[Tensor, "..."]:
        config = self.config
        if config.head in ("pooled", "sequence"):
            h = self._vector(h, real)
        if config.head in ("pooled", "none"):
            return h
        if config.head in ("sequence", "tokens"):
            assert self.weight is not None
            return unembed(self.dropout(h, rng), self.weight, bias=self.bias)
        if self.transform is not None and self.norm is not None:
            h = self.norm(activate(self.transform(h), config.activation))
        E = table if self.weight is None else self.weight
        return unembed(h, E, scale=config.head_scale, bias=self.bias, softcap=config.head_softcap)

    def _vector(self, h: Float[Tensor, "B T D"], real: Bool[Tensor, "B T"] | None) -> Float[Tensor, "B D"]:
        """One vector of each row: pooled, through the pooler, divided by its length."""
        config = self.config
        assert config.pool != "none"
        v = pool(h, real, config.pool)
        if self.pooler is not None:
            v = self.pooler(v)
            v = torch.tanh(v) if config.pooler == "tanh" else torch.relu(v)
        if config.pool_normalize:
            wide = v.to(wide_dtype(v.dtype))
            v = (wide / wide.norm(dim=-1, keepdim=True).clamp(min=_LEAST)).to(v.dtype)
        return v


def pool(
    h: Float[Tensor, "B T D"], real: Bool[Tensor, "B T"] | None, kind: Literal["first", "last", "mean", "max"]
) -> Float[Tensor, "B D"]:
    """One vector of the real tokens of each row (``real`` None: all): ``first``, ``last``, ``mean`` (summed and divided
    wide) or the ``max`` of each feature. A row without a real token gives 0. Where several are the largest, the first
    has the gradient.
    """
    if real is None:
        real = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
    there = real[..., None]
    some = real.any(-1)[:, None]
    if kind == "mean":
        wide = h.to(wide_dtype(h.dtype)).masked_fill(~there, 0.0)
        return (wide.sum(1) / there.sum(1).clamp(min=1)).to(h.dtype)
    if kind == "max":
        seen = h.masked_fill(~there, -torch.inf)
        return seen.take_along_dim(seen.detach().argmax(1, keepdim=True), 1)[:, 0].masked_fill(~some, 0.0)
    places = torch.arange(h.shape[1], device=h.device)
    if kind == "first":
        place = places.masked_fill(~real, h.shape[1]).amin(-1).clamp(max=h.shape[1] - 1)
    else:
        place = places.masked_fill(~real, -1).amax(-1).clamp(min=0)
    chosen = h.take_along_dim(place[:, None, None], 1)[:, 0]
    return chosen.masked_fill(~some, 0.0)


def check_writes(where: str, config: ModelConfig) -> None:
    """Raise ConfigError for a model whose head does not predict tokens."""
    if config.head not in ("tied", "untied"):
        raise ConfigError(where, [f"head: expected 'tied' or 'untied', got {config.head!r}: it predicts no tokens"])
