"""A transformer block: attention, cross-attention where there is an encoder, feed-forward, each beside the residual."""

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from torch_impl.attention import AttentionLayer
from torch_impl.dropout import Dropout, Key, places
from torch_impl.feedforward import FeedForward
from torch_impl.linear import DTYPES
from torch_impl.masks import Mask
from torch_impl.norms import make_head_norm, make_norm
from torch_impl.positions import RotaryEncoding
from torch_impl.weights import initialize
from twinformer.checks import check_activations
from twinformer.config import StackConfig


class Block(nn.Module):
    """Three residual branches f, in the order attention, cross-attention, feed-forward.

    Pre-norm (book, chapter "Transformers", "Transformer Blocks"): ``X + dropout(f(norm(X)))``; post-norm (Vaswani et
    al. 2017): ``norm(X + dropout(f(X)))``. A block built with ``cross_attention`` needs ``H_enc``. Arguments are
    those of ``AttentionLayer``. Raises InputError for wrong shapes or dtypes.
    """

    def __init__(
        self, config: StackConfig, *, causal: bool = False, cross_attention: bool = False, seed: int | None = 0
    ) -> None:
        super().__init__()
        self.config = config
        self.pre_norm = config.norm_placement == "pre"
        self.attention_norm = make_norm(config.model_dim, config)
        self.attention = _attention(config, causal=causal, window=config.window, rotary=config.positions == "rotary")
        self.cross_attention_norm = make_norm(config.model_dim, config) if cross_attention else None
        self.cross_attention = _attention(config) if cross_attention else None
        self.feedforward_norm = make_norm(config.model_dim, config)
        self.feedforward = FeedForward(
            config.model_dim,
            config.hidden_dim,
            activation=config.activation,
            gated=config.gated,
            bias=config.feedforward_bias,
            dropout=config.hidden_dropout,
            param_dtype=config.param_dtype,
            compute_dtype=config.compute_dtype,
            seed=None,
        )
        self.dropout = Dropout(config.dropout)
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
        crossing = self.cross_attention is not None
        if not torch.compiler.is_compiling():
            check_activations(
                "Block",
                X=X,
                model_dim=self.config.model_dim,
                H_enc=H_enc,
                mask=mask,
                memory_mask=memory_mask,
                num_heads=self.config.num_heads,
                positions=positions,
                bias=bias,
                needs_memory=crossing,
                takes_memory=crossing,
            )
        X = X.to(DTYPES[self.config.compute_dtype])
        key = places(rng, 6)

        Y = self.attention(self._before(self.attention_norm, X), None, mask, positions=positions, bias=bias, rng=key[0])
        X = self._after(self.attention_norm, X + self.dropout(Y, key[1]))
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            Y = self.cross_attention(
                self._before(self.cross_attention_norm, X), H_enc, memory_mask=memory_mask, rng=key[2]
            )
            X = self._after(self.cross_attention_norm, X + self.dropout(Y, key[3]))
        Y = self.feedforward(self._before(self.feedforward_norm, X), rng=key[4])
        return self._after(self.feedforward_norm, X + self.dropout(Y, key[5]))

    def _before(self, norm: nn.Module, X: Tensor) -> Tensor:
        """What the branch is given: the normed X in a pre-norm block, else X."""
        return norm(X) if self.pre_norm else X

    def _after(self, norm: nn.Module, X: Tensor) -> Tensor:
        """What the block goes on with: X in a pre-norm block, else the normed X."""
        return X if self.pre_norm else norm(X)


def _attention(
    config: StackConfig, *, causal: bool = False, window: int | None = None, rotary: bool = False
) -> AttentionLayer:
    query_norm, key_norm = make_head_norm(config), make_head_norm(config)
    return AttentionLayer(
        config.model_dim,
        config.key_dim,
        config.num_heads,
        value_dim=config.value_dim,
        num_kv_heads=config.num_kv_heads,
        qkv_bias=config.qkv_bias,
        output_bias=config.output_bias,
        scale=config.attention_scale,
        softcap=config.attention_softcap,
        query_norm=query_norm,
        key_norm=key_norm,
        rotary=_rotary(config) if rotary else None,
        causal=causal,
        window=window,
        dropout=config.attention_dropout,
        param_dtype=config.param_dtype,
        compute_dtype=config.compute_dtype,
        seed=None,
    )


def _rotary(config: StackConfig) -> RotaryEncoding:
    return RotaryEncoding(
        config.rotary_dim,
        base=config.rotary_base,
        convention=config.rotary_convention,
        scaling=config.rotary_scaling,
    )
