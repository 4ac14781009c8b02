"""A transformer block: attention, cross-attention where there is an encoder, feed-forward, each beside the residual."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from torch_impl import cache as caches
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
    al. 2017): ``norm(X + dropout(f(X)))``; sandwich (Gemma 2, arXiv:2408.00118): ``X + dropout(norm2(f(norm(X))))``.
    ``layer``, its place in the stack, decides whether the block has the window, and with it a rotary base of its own.
    A block built with ``cross_attention`` needs ``H_enc``. Arguments are those of ``AttentionLayer``. Raises InputError
    for wrong shapes or dtypes.
    """

    def __init__(
        self,
        config: StackConfig,
        *,
        causal: bool = False,
        cross_attention: bool = False,
        layer: int = 0,
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.norms_before = config.norm_placement != "post"
        self.norms_after = config.norm_placement == "post"
        self.has_window = config.has_window(layer)
        self.attention_norm = make_norm(config.model_dim, config)
        self.attention = _attention(
            config,
            causal=causal,
            window=config.window if self.has_window else None,
            rotary=_rotary(config, self.has_window) if config.positions == "rotary" else None,
        )
        self.attention_post_norm = self._post_norm()
        self.cross_attention_norm = make_norm(config.model_dim, config) if cross_attention else None
        self.cross_attention = _attention(config) if cross_attention else None
        self.cross_attention_post_norm = self._post_norm() if cross_attention else None
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
        self.feedforward_post_norm = self._post_norm()
        self.dropout = Dropout(config.dropout)
        initialize(self, seed)

    def _post_norm(self) -> nn.Module | None:
        """The norm of what a branch gives, in a sandwich."""
        config = self.config
        return make_norm(config.model_dim, config) if config.norm_placement == "sandwich" else None

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
        crossing = self.cross_attention
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
                needs_memory=crossing is not None,
                takes_memory=crossing is not None,
            )
        X = X.to(DTYPES[self.config.compute_dtype])
        key = places(rng, 6)
        return self._branches(
            X,
            lambda Y: self.attention(Y, None, mask, positions=positions, bias=bias, rng=key[0]),
            None if crossing is None else lambda Y: crossing(Y, H_enc, memory_mask=memory_mask, rng=key[2]),
            key,
        )

    def _step(
        self,
        X: Float[Tensor, "B T D"],
        kept: Mapping[str, Tensor],
        memory: Mapping[str, Tensor] | None,
        step: caches._Step,
        bias: Float[Tensor, "..."] | None,
    ) -> Float[Tensor, "B T D"]:
        """The block on T further positions: what came before is in ``kept``, the source in ``memory``."""
        crossing = self.cross_attention
        return self._branches(
            X,
            lambda Y: self.attention.recall(
                Y,
                *caches._keep(kept, step, *self.attention.remember(Y, positions=step.positions)),
                positions=step.positions,
                bias=bias,
                allowed=step.allowed if self.has_window or step.unbounded is None else step.unbounded,
            ),
            None
            if crossing is None or memory is None
            else lambda Y: crossing.recall(
                Y, memory["keys"], memory["values"], memory["broken"], allowed=step.memory_allowed
            ),
            places(None, 6),
        )

    def _branches(
        self,
        X: Float[Tensor, "B T D"],
        attend: Callable[[Tensor], Tensor],
        cross: Callable[[Tensor], Tensor] | None,
        key: Sequence[Key | None],
    ) -> Float[Tensor, "B T D"]:
        """The three branches, one after the other."""
        Y = _through(self.attention_post_norm, attend(self._before(self.attention_norm, X)))
        X = self._after(self.attention_norm, X + self.dropout(Y, key[1]))
        if cross is not None and self.cross_attention_norm is not None:
            Y = _through(self.cross_attention_post_norm, cross(self._before(self.cross_attention_norm, X)))
            X = self._after(self.cross_attention_norm, X + self.dropout(Y, key[3]))
        Y = self.feedforward(self._before(self.feedforward_norm, X), rng=key[4])
        Y = _through(self.feedforward_post_norm, Y)
        return self._after(self.feedforward_norm, X + self.dropout(Y, key[5]))

    def _before(self, norm: nn.Module, X: Tensor) -> Tensor:
        """What the branch is given: the normed X, but for a post-norm block, whose X is normed."""
        return norm(X) if self.norms_before else X

    def _after(self, norm: nn.Module, X: Tensor) -> Tensor:
        """What the block goes on with: the normed X in a post-norm block, else X."""
        return norm(X) if self.norms_after else X


def _through(norm: nn.Module | None, Y: Tensor) -> Tensor:
    return Y if norm is None else norm(Y)


def _attention(
    config: StackConfig, *, causal: bool = False, window: int | None = None, rotary: RotaryEncoding | None = None
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
        rotary=rotary,
        causal=causal,
        window=window,
        dropout=config.attention_dropout,
        param_dtype=config.param_dtype,
        compute_dtype=config.compute_dtype,
        seed=None,
    )


def _rotary(config: StackConfig, has_window: bool) -> RotaryEncoding:
    if has_window and config.window_rotary_base is not None:
        return RotaryEncoding(config.rotary_dim, base=config.window_rotary_base, convention=config.rotary_convention)
    return RotaryEncoding(
        config.rotary_dim,
        base=config.rotary_base,
        convention=config.rotary_convention,
        scaling=config.rotary_scaling,
    )
