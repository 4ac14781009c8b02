"""One block of the residual stream: attention, (attention to the encoder,) feed-forward."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float

from flax_impl.attention import AttentionLayer, Mask
from flax_impl.cache import _Places
from flax_impl.dropout import Dropout, Key, fold_all
from flax_impl.feedforward import FeedForward
from flax_impl.linear import check_dtypes
from flax_impl.norms import LayerNorm, RMSNorm, make_head_norm, make_norm
from flax_impl.positions import Positions, RotaryEncoding
from flax_impl.weights import initialize
from twinformer.checks import check_activations
from twinformer.config import StackConfig


class Block(nnx.Module):
    """Residual branches around attention, cross-attention (if any) and feed-forward, in that order.

    pre-norm: ``X + dropout(f(norm(X)))``; post-norm: ``norm(X + dropout(f(X)))``; sandwich: ``X + dropout(post_norm(f(
    norm(X))))``. ``X [B, T, D] -> [B, T, D]`` in ``compute_dtype``; the arguments are those of ``AttentionLayer``. A
    block built with ``cross_attention`` needs ``H_enc``. ``layer`` is its number in the stack: some blocks have the
    window, and then perhaps a rotary base of their own. Raises InputError.

    Source: book, "Transformer blocks"; pre-norm: Xiong et al. 2020, arXiv:2002.04745; sandwich: Gemma Team 2024,
    arXiv:2408.00118.
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
        check_dtypes("Block", param_dtype=config.param_dtype, compute_dtype=config.compute_dtype)
        self.config = config
        D, is_sandwich = config.model_dim, config.norm_placement == "sandwich"
        self.is_local = config.has_window(layer)
        self.attention_norm = make_norm(D, config)
        window = config.window if self.is_local else None
        self.attention = _attention(config, causal=causal, window=window, rotary=_rotary(config, self.is_local))
        self.attention_post_norm = make_norm(D, config) if is_sandwich else None
        self.cross_attention_norm = make_norm(D, config) if cross_attention else None
        self.cross_attention = _attention(config) if cross_attention else None
        self.cross_attention_post_norm = make_norm(D, config) if is_sandwich and cross_attention else None
        self.feedforward_norm = make_norm(D, config)
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
        self.feedforward_post_norm = make_norm(D, config) if is_sandwich else None
        self.dropout = Dropout(config.dropout)
        if seed is not None:
            initialize(self, seed)

    def __call__(
        self,
        X: Float[Array | np.ndarray, "B T D"],
        H_enc: Float[Array | np.ndarray, "B S D"] | None = None,
        mask: Mask | None = None,
        memory_mask: Mask | None = None,
        *,
        positions: Positions | None = None,
        bias: Float[Array | np.ndarray, "..."] | None = None,
        rng: Key | None = None,
    ) -> Float[Array, "B T D"]:
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
            needs_memory=self.cross_attention is not None,
            takes_memory=self.cross_attention is not None,
        )
        X = jnp.asarray(X, self.config.compute_dtype)
        rngs = fold_all(rng, 6)
        X = self._branch(
            X,
            self.attention_norm,
            lambda X: self.attention(X, mask=mask, positions=positions, bias=bias, rng=rngs[0]),
            rngs[1],
            self.attention_post_norm,
        )
        if (cross := self.cross_attention) is not None and self.cross_attention_norm is not None:
            X = self._branch(
                X,
                self.cross_attention_norm,
                lambda X: cross(X, H_enc, memory_mask=memory_mask, rng=rngs[2]),
                rngs[3],
                self.cross_attention_post_norm,
            )
        return self._branch(
            X,
            self.feedforward_norm,
            lambda X: self.feedforward(X, rng=rngs[4]),
            rngs[5],
            self.feedforward_post_norm,
        )

    def _step(
        self,
        X: Float[Array, "B T D"],
        kept: Mapping[str, Array],
        places: _Places,
        memory: Mapping[str, Array] | None = None,
        memory_allowed: Bool[Array, "B 1 1 S"] | None = None,
        *,
        bias: Float[Array, "..."] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """The same for T further positions, with the buffers of this block, which come back with what is new."""
        written: dict[str, Array] = {}

        def attention(X: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
            new, seen = places.keep(kept, *self.attention.remember(X, positions=places.positions))
            written.update(new)
            allowed = places.allowed if self.is_local else places.unbounded
            return self.attention.recall(X, *seen, positions=places.positions, bias=bias, allowed=allowed)

        X = self._branch(X, self.attention_norm, attention, None, self.attention_post_norm)
        if (cross := self.cross_attention) is not None and self.cross_attention_norm is not None:
            assert memory is not None
            seen = (memory["keys"], memory["values"], memory["broken"])
            X = self._branch(
                X,
                self.cross_attention_norm,
                lambda X: cross.recall(X, *seen, allowed=memory_allowed),
                None,
                self.cross_attention_post_norm,
            )
        return self._branch(X, self.feedforward_norm, self.feedforward, None, self.feedforward_post_norm), written

    def _branch(
        self,
        X: Float[Array, "B T D"],
        norm: LayerNorm | RMSNorm,
        layer: Callable[[Float[Array, "B T D"]], Float[Array, "B T D"]],
        rng: Key | None,
        post_norm: LayerNorm | RMSNorm | None,
    ) -> Float[Array, "B T D"]:
        if self.config.norm_placement == "post":
            return norm(X + self.dropout(layer(X), rng))
        Y = layer(norm(X))
        return X + self.dropout(Y if post_norm is None else post_norm(Y), rng)


def _rotary(config: StackConfig, is_local: bool) -> RotaryEncoding | None:
    if config.positions != "rotary":
        return None
    if is_local and config.window_rotary_base is not None:
        return RotaryEncoding(config.rotary_dim, base=config.window_rotary_base, convention=config.rotary_convention)
    return RotaryEncoding(
        config.rotary_dim,
        base=config.rotary_base,
        convention=config.rotary_convention,
        scaling=config.rotary_scaling,
    )


def _attention(
    config: StackConfig, *, causal: bool = False, window: int | None = None, rotary: RotaryEncoding | None = None
) -> AttentionLayer:
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
        query_norm=make_head_norm(config),
        key_norm=make_head_norm(config),
        rotary=rotary,
        causal=causal,
        window=window,
        dropout=config.attention_dropout,
        param_dtype=config.param_dtype,
        compute_dtype=config.compute_dtype,
        seed=None,
    )
