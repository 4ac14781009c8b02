"""A stack of blocks."""

from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torch_impl import cache as caches
from torch_impl.block import Block
from torch_impl.dropout import Key, places
from torch_impl.linear import DTYPES
from torch_impl.masks import Mask
from torch_impl.norms import make_norm
from torch_impl.positions import RelativeBias, alibi_bias
from torch_impl.weights import initialize
from twinformer.checks import check_activations
from twinformer.config import StackConfig
from twinformer.errors import ConfigError


class TransformerStack(nn.Module):
    """``num_stack`` blocks, one after the other, then a final norm where the config asks for one.

    ``N`` is the context length: the most positions that X may have. ``choices`` are further fields of ``StackConfig``;
    ConfigError names every unknown and every wrong one. Called like a ``Block``.

    The stack makes the position bias (relative or ALiBi) once, from ``positions`` (``0 … T-1`` when None), for the
    self-attention of every block; a ``bias`` of the caller is added to it. Sinusoidal and learned positions belong to
    the embeddings. With ``remat`` each block is computed anew in the backward pass instead of being remembered;
    ``scan_layers`` is for Flax, and has no effect here.
    """

    def __init__(
        self,
        N: int,
        model_dim: int,
        key_dim: int,
        hidden_dim: int,
        num_heads: int,
        num_stack: int,
        *,
        causal: bool = False,
        cross_attention: bool = False,
        seed: int | None = 0,
        **choices: Any,
    ) -> None:
        sizes: dict[str, Any] = {
            "context_length": N,
            "model_dim": model_dim,
            "key_dim": key_dim,
            "hidden_dim": hidden_dim,
            "num_heads": num_heads,
            "num_layers": num_stack,
        }
        super().__init__()
        self._build(_config(sizes, choices), num_stack, causal, cross_attention, seed)

    @classmethod
    def from_config(
        cls,
        config: StackConfig,
        num_layers: int,
        *,
        causal: bool = False,
        cross_attention: bool = False,
        seed: int | None = None,
    ) -> "TransformerStack":
        """A stack of ``num_layers`` blocks of this config, as a part: its weights are for the owner to fill."""
        stack = cls.__new__(cls)
        nn.Module.__init__(stack)
        stack._build(config, num_layers, causal, cross_attention, seed)
        return stack

    def _build(
        self, config: StackConfig, num_layers: int, causal: bool, cross_attention: bool, seed: int | None
    ) -> None:
        self.config = config
        self.cross_attention = cross_attention
        self.relative_bias = (
            RelativeBias(
                config.relative_buckets,
                config.num_heads,
                max_distance=config.relative_max_distance,
                bidirectional=not causal,
                param_dtype=config.param_dtype,
                compute_dtype=config.compute_dtype,
                seed=None,
            )
            if config.positions == "relative"
            else None
        )
        self.blocks = nn.ModuleList(
            Block(config, causal=causal, cross_attention=cross_attention, layer=layer, seed=None)
            for layer in range(num_layers)
        )
        self.final_norm = make_norm(config.model_dim, config) if config.final_norm else None
        initialize(self, seed)

    def forward(
        self,
        X: Float[Tensor, "B T D"],
        H_enc: Float[Tensor, "B S D"] | None = None,
        mask: Mask | None = None,
        memory_mask: Mask | None = None,
        *,
        positions: Integer[Tensor, "#B T"] | None = None,
        bias: Float[Tensor, "..."] | None = None,
        rng: Key | None = None,
    ) -> Float[Tensor, "B T D"]:
        if not torch.compiler.is_compiling():
            check_activations(
                "TransformerStack",
                X=X,
                model_dim=self.config.model_dim,
                H_enc=H_enc,
                mask=mask,
                memory_mask=memory_mask,
                num_heads=self.config.num_heads,
                positions=positions,
                bias=bias,
                context_length=self.config.context_length,
                needs_memory=self.cross_attention,
                takes_memory=self.cross_attention,
            )
        X = X.to(DTYPES[self.config.compute_dtype])
        if positions is None:
            positions = torch.arange(X.shape[1], device=X.device)[None]
        position_bias = self._position_bias(positions, positions)
        if position_bias is not None:
            bias = position_bias if bias is None else position_bias + bias.to(position_bias.dtype)
        for block, key in zip(self.blocks, places(rng, len(self.blocks)), strict=True):
            if self.config.remat and torch.is_grad_enabled():
                # the randomness is in the key: there is no generator whose state would have to be kept
                X = checkpoint(
                    block,
                    X,
                    H_enc,
                    mask,
                    memory_mask,
                    positions=positions,
                    bias=bias,
                    rng=key,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                X = block(X, H_enc, mask, memory_mask, positions=positions, bias=bias, rng=key)
        return X if self.final_norm is None else self.final_norm(X)

    def _step(self, X: Float[Tensor, "B T D"], cache: caches.Cache, step: caches._Step) -> Float[Tensor, "B T D"]:
        """The stack on T further positions, whose keys and values go into the cache."""
        bias = self._position_bias(step.positions, step.key_positions)
        memory = cache["memory"]["blocks"] if self.cross_attention else {}
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            X = block._step(X, cache["blocks"][str(i)], memory.get(str(i)), step, bias)
        return X if self.final_norm is None else self.final_norm(X)

    def _position_bias(
        self, queries: Integer[Tensor, "#B T"], keys: Integer[Tensor, "#B S"]
    ) -> Float[Tensor, "#B A T S"] | None:
        """The bias of the scores, from the positions of queries and keys."""
        if self.relative_bias is not None:
            bias: Tensor = self.relative_bias(queries, keys)
            return bias
        if self.config.positions == "alibi":
            return alibi_bias(self.config.num_heads, queries, keys, compute_dtype=self.config.compute_dtype)
        return None


def _config(sizes: dict[str, Any], choices: dict[str, Any]) -> StackConfig:
    known = {field.name for field in fields(StackConfig)} - set(sizes)
    problems = [f"{name}: unknown field" for name in choices if name not in known]
    try:
        config = StackConfig(**sizes, **{name: value for name, value in choices.items() if name in known})
    except ConfigError as error:
        raise ConfigError("TransformerStack", [*problems, *error.problems]) from None
    if problems:
        raise ConfigError("TransformerStack", problems)
    return config
