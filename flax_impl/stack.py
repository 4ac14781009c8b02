"""A stack of blocks over one residual stream."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Integer

from flax_impl.attention import Mask
from flax_impl.block import Block
from flax_impl.cache import _Places
from flax_impl.dropout import Key, fold_all
from flax_impl.linear import check_dtypes
from flax_impl.masks import padding_mask
from flax_impl.norms import make_norm
from flax_impl.positions import Positions, RelativeBias, alibi_bias
from flax_impl.weights import initialize
from twinformer.checks import check_activations
from twinformer.config import StackConfig
from twinformer.errors import ConfigError, Problems

# the fields of a StackConfig that a stack takes under names of its own
_NAMED = {
    "context_length": "N",
    "model_dim": "model_dim",
    "key_dim": "key_dim",
    "hidden_dim": "hidden_dim",
    "num_heads": "num_heads",
    "num_layers": "num_stack",
}


class TransformerStack(nnx.Module):
    """``num_stack`` blocks one after the other, then the final norm (if any).

    ``choices`` are further fields of ``StackConfig``. ``X [B, T, D] -> [B, T, D]`` in ``compute_dtype``, ``T <= N``.
    The arguments are those of a block, ``positions`` are ``0 … T-1`` when None. A relative or ALiBi bias is computed
    once, for every block's self-attention, and ``bias`` is added to it; sinusoidal and learned positions belong to
    the embeddings. With ``remat`` each block is computed again in the backward pass. With ``scan_layers`` blocks that
    are built alike (or every second one, or every third, …) run as one ``jax.lax.scan``. Raises ConfigError,
    InputError.

    Source: book, "Transformer blocks".
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
        config = self.config = _checked_config(
            choices,
            context_length=N,
            model_dim=model_dim,
            key_dim=key_dim,
            hidden_dim=hidden_dim,
            num_heads=num_heads,
            num_layers=num_stack,
        )
        check_dtypes("TransformerStack", param_dtype=config.param_dtype, compute_dtype=config.compute_dtype)
        self.causal, self.takes_memory = causal, cross_attention
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
        self.blocks = nnx.List(
            [
                Block(config, causal=causal, cross_attention=cross_attention, layer=layer, seed=None)
                for layer in range(num_stack)
            ]
        )
        self.final_norm = make_norm(config.model_dim, config) if config.final_norm else None
        if seed is not None:
            initialize(self, seed)

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
        """The stack of ``num_layers`` blocks that a configuration describes."""
        values = {f.name: getattr(config, f.name) for f in fields(StackConfig)} | {"num_layers": num_layers}
        named = {_NAMED.get(name, name): value for name, value in values.items()}
        return cls(causal=causal, cross_attention=cross_attention, seed=seed, **named)

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
            needs_memory=self.takes_memory,
            takes_memory=self.takes_memory,
        )
        X = jnp.asarray(X, self.config.compute_dtype)
        positions = jnp.arange(X.shape[1])[None] if positions is None else jnp.asarray(positions)
        bias = self._bias(positions, positions, bias)
        run = _rematerialised if self.config.remat else _plain
        blocks, keys = list(self.blocks), fold_all(rng, len(self.blocks))
        if self.config.scan_layers:
            X, done = _scanned(run, blocks, keys, X, H_enc, mask, memory_mask, positions, bias)
            blocks, keys = blocks[done:], keys[done:]
        for block, key in zip(blocks, keys, strict=True):
            X = run(block, X, H_enc, mask, memory_mask, positions, bias, key)
        return X if self.final_norm is None else self.final_norm(X)

    def _step(
        self, X: Float[Array, "B T D"], cache: Mapping[str, Any], places: _Places
    ) -> tuple[Float[Array, "B T D"], dict[int, dict[str, Array]]]:
        """The same for T further positions: what the cache holds is seen, and the blocks' buffers come back."""
        bias = self._bias(places.positions, places.key_positions)
        memory, memory_allowed = {}, None
        if self.takes_memory:
            memory, memory_allowed = cache["memory"]["blocks"], padding_mask(cache["memory"]["real"])
        kept: dict[int, dict[str, Array]] = {}
        for i, block in enumerate(self.blocks):
            X, kept[i] = block._step(X, cache["blocks"][i], places, memory.get(i), memory_allowed, bias=bias)
        return X if self.final_norm is None else self.final_norm(X), kept

    def _memories(self, H_enc: Float[Array | np.ndarray, "B S D"]) -> dict[int, dict[str, Array]]:
        """What every block's cross-attention remembers of the encoder's states."""
        kept: dict[int, dict[str, Array]] = {}
        for i, block in enumerate(self.blocks):
            assert block.cross_attention is not None
            keys, values, broken = block.cross_attention.remember(H_enc)
            kept[i] = {"keys": keys, "values": values, "broken": broken}
        return kept

    def _bias(
        self,
        query: Positions,
        key: Integer[Array | np.ndarray, "#B S"],
        bias: Float[Array | np.ndarray, "..."] | None = None,
    ) -> Float[Array, "..."] | None:
        """The bias of the positions of queries and keys, wide, plus that of the caller."""
        if self.relative_bias is not None:
            own = self.relative_bias(query, key)
        elif self.config.positions == "alibi":
            own = alibi_bias(self.config.num_heads, query, key, compute_dtype=self.config.compute_dtype)
        else:
            return None if bias is None else jnp.asarray(bias)
        return own if bias is None else own + jnp.asarray(bias, own.dtype)


def _plain(
    block: Block,
    X: Array,
    H_enc: Any,
    mask: Any,
    memory_mask: Any,
    positions: Any,
    bias: Any,
    rng: Any,
) -> Array:
    return block(X, H_enc, mask, memory_mask, positions=positions, bias=bias, rng=rng)


def _rematerialised(block: Block, *inputs: Any) -> Array:
    """The same, with nothing kept for the backward pass but the weights and the inputs."""
    graphdef, state = nnx.split(block)

    def run(state: Any, *inputs: Any) -> Array:
        return _plain(nnx.merge(graphdef, state), *inputs)

    X: Array = jax.checkpoint(run)(state, *inputs)
    return X


def _scanned(
    run: Callable[..., Array], blocks: Sequence[Block], keys: Sequence[Any], X: Array, *inputs: Any
) -> tuple[Array, int]:
    """The first blocks in one compiled loop, and how many these were: whole turns of the shortest pattern, if any.

    A turn is one block, or where some blocks have a window, a few: ``wide, local, wide, local`` are two turns of two.
    """
    split = [nnx.split(block) for block in blocks]
    graphs = [graph for graph, _ in split]
    turn = _turn(graphs)
    turns = len(blocks) // turn
    if turns < 2:
        return X, 0
    states = [
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *(state for _, state in split[place : turns * turn : turn]))
        for place in range(turn)
    ]
    drawn = None if keys[0] is None else jnp.stack(keys[: turns * turn]).reshape(turns, turn, 2)

    def one_turn(X: Array, now: Any) -> tuple[Array, None]:
        states, keys = now
        for place, (graph, state) in enumerate(zip(graphs, states, strict=False)):
            X = run(nnx.merge(graph, state), X, *inputs, None if keys is None else keys[place])
        return X, None

    X, _ = jax.lax.scan(one_turn, X, (states, drawn))
    return X, turns * turn


def _turn(graphs: Sequence[Any]) -> int:
    """After how many blocks the same structures come again; all of them where they never do."""
    for turn in range(1, len(graphs)):
        turns = len(graphs) // turn * turn
        if all(graph == graphs[place % turn] for place, graph in enumerate(graphs[:turns])):
            return turn
    return len(graphs)


def _checked_config(choices: dict[str, Any], **sizes: Any) -> StackConfig:
    """The configuration of these choices. Raises one ConfigError for unknown names and wrong values together."""
    problems = Problems("TransformerStack", ConfigError)
    known = {f.name for f in fields(StackConfig)} - set(sizes)
    for name in choices:
        problems.expect(name in known, f"{name}: unknown field")
    try:
        config = StackConfig(**sizes, **{name: value for name, value in choices.items() if name in known})
    except ConfigError as error:
        for problem in error.problems:
            problems.add(problem)
    problems.raise_if_any()
    return config
