"""Whole models: an encoder, a language model (decoder only), an encoder with a decoder."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Integer

from flax_impl import masks
from flax_impl.cache import Cache, _is_ring, _open_cache
from flax_impl.dropout import Key, fold_all
from flax_impl.embeddings import Embeddings, Ids
from flax_impl.heads import Head, check_predicts_tokens
from flax_impl.linear import Outline, bounds, check_dtypes, check_ids, extremes
from flax_impl.positions import Positions
from flax_impl.stack import TransformerStack
from flax_impl.weights import initialize
from twinformer.checks import check_activations, check_segments, check_tokens
from twinformer.config import Architecture, ModelConfig
from twinformer.decoding import check_step
from twinformer.errors import ConfigError, InputError, Problems

Real = Bool[Array | np.ndarray, "B T"]
SourceIds = Integer[Array | np.ndarray, "B S"]
SourceReal = Bool[Array | np.ndarray, "B S"]
SourcePositions = Integer[Array | np.ndarray, "#B S"]


class EncoderModel(nnx.Module):
    """Every position sees every real token: ``tokens [B, T]`` to hidden states ``[B, T, D]``, or logits with a head.

    ``padding_mask [B, T]``, True = real token, hides padded keys; positions are counted unless given: over real
    tokens, or over all places, as ``config.position_counting`` says.
    ``segments [B, T]`` instead of it: several documents in a row, a number each, 0 for padding. Each sees only itself
    and counts its positions from 0. Raises ConfigError for another architecture, InputError.

    Source: book, "Masked language models".
    """

    def __init__(self, config: ModelConfig, *, seed: int | None = 0) -> None:
        _expect_architecture(self, config, "encoder")
        self.config = config
        self.embedding = Embeddings(config, config.vocab_size, seed=None)
        self.stack = TransformerStack.from_config(config, config.num_layers, causal=False, cross_attention=False)
        self.head = _head(config)
        if seed is not None:
            initialize(self, seed, config=config)

    def __call__(
        self,
        tokens: Ids,
        *,
        padding_mask: Real | None = None,
        positions: Positions | None = None,
        token_types: Ids | None = None,
        segments: Ids | None = None,
        rng: Key | None = None,
    ) -> Float[Array, "..."]:
        self._check(tokens, padding_mask=padding_mask, positions=positions, token_types=token_types, segments=segments)
        mask, positions = _places(self.config, padding_mask, positions, segments)
        rngs = fold_all(rng, 3)
        X = self.embedding(tokens, positions, token_types, rng=rngs[0])
        h = self.stack(X, mask=mask, positions=positions, rng=rngs[1])
        return _headed(h, self.embedding, self.head, self.config, padding_mask, rngs[2])

    def _check(
        self,
        tokens: Any,
        *,
        padding_mask: Any = None,
        positions: Any = None,
        token_types: Any = None,
        segments: Any = None,
        rng: Any = None,
    ) -> None:
        del rng
        _check_ids(self.config, "EncoderModel", "tokens", tokens, padding_mask, positions, token_types)
        _check_documents("EncoderModel", self.config, tokens, segments, padding_mask)


class LanguageModel(nnx.Module):
    """Every position sees itself and what came before: ``tokens [B, T]`` to logits ``[B, T, V]`` of the next token, or
    to what another head makes of the states.

    ``padding_mask``, positions and ``segments`` as in ``EncoderModel``. Raises ConfigError for another architecture,
    InputError.

    Source: book, "The language modeling head".
    """

    def __init__(self, config: ModelConfig, *, seed: int | None = 0) -> None:
        _expect_architecture(self, config, "decoder")
        self.config = config
        self.embedding = Embeddings(config, config.vocab_size, seed=None)
        self.stack = TransformerStack.from_config(config, config.num_layers, causal=True, cross_attention=False)
        self.head = _head(config)
        if seed is not None:
            initialize(self, seed, config=config)

    def __call__(
        self,
        tokens: Ids,
        *,
        padding_mask: Real | None = None,
        positions: Positions | None = None,
        segments: Ids | None = None,
        rng: Key | None = None,
    ) -> Float[Array, "..."]:
        self._check(tokens, padding_mask=padding_mask, positions=positions, segments=segments)
        mask, positions = _places(self.config, padding_mask, positions, segments)
        rngs = fold_all(rng, 3)
        X = self.embedding(tokens, positions, rng=rngs[0])
        h = self.stack(X, mask=mask, positions=positions, rng=rngs[1])
        return _headed(h, self.embedding, self.head, self.config, padding_mask, rngs[2])

    def step(
        self,
        tokens: Ids,
        cache: Mapping[str, Any],
        *,
        padding_mask: Real | None = None,
        positions: Positions | None = None,
        at: Integer[Array | np.ndarray, " B"] | None = None,
    ) -> tuple[Float[Array, "B T_or_1 V"], Cache]:
        """``T >= 1`` further tokens: their logits, as a call with the whole sequence gives them, and the new cache.

        Positions are counted on from what the cache has counted, unless given. With ``at`` only the
        logits of one place of each row. No dropout. Raises InputError; where values cannot be seen, positions for which
        the cache has no room have NaN.
        """
        _check_step(self.config, "LanguageModel", "tokens", tokens, cache, padding_mask, positions, at)
        logits, new = self._step(tokens, cache, padding_mask, positions, at)
        return _with_room(self.config, logits, tokens, cache), new

    def _step(
        self, tokens: Ids, cache: Mapping[str, Any], real: Any, positions: Any, at: Any, *, fresh: bool = False
    ) -> tuple[Float[Array, "B T_or_1 V"], Cache]:
        return _step(self.stack, self.embedding, self.embedding, self.head, tokens, cache, real, positions, at, fresh)

    def _check(
        self,
        tokens: Any,
        *,
        padding_mask: Any = None,
        positions: Any = None,
        segments: Any = None,
        rng: Any = None,
    ) -> None:
        del rng
        _check_ids(self.config, "LanguageModel", "tokens", tokens, padding_mask, positions)
        _check_documents("LanguageModel", self.config, tokens, segments, padding_mask)


class EncoderDecoder(nnx.Module):
    """A decoder that also sees what an encoder made of the source.

    ``source [B, S]`` and ``target [B, T]`` give the logits ``[B, T, V]`` of the next target tokens.

    Padding masks and positions as in ``EncoderModel``, one each for source and target. Raises ConfigError for another
    architecture, InputError.

    Source: book, "Machine Translation", "Encoder-decoder"; Vaswani et al. 2017.
    """

    def __init__(self, config: ModelConfig, *, seed: int | None = 0) -> None:
        _expect_architecture(self, config, "encoder-decoder")
        self.config = config
        self.source_embedding = Embeddings(config, config.source_vocab_size, seed=None)
        self.encoder = TransformerStack.from_config(
            config, config.num_encoder_layers, causal=False, cross_attention=False
        )
        self.target_embedding = Embeddings(config, 0 if config.share_embeddings else config.vocab_size, seed=None)
        self.decoder = TransformerStack.from_config(config, config.num_layers, causal=True, cross_attention=True)
        self.head = _head(config)
        if seed is not None:
            initialize(self, seed, config=config)

    def __call__(
        self,
        source: SourceIds,
        target: Ids,
        *,
        source_padding_mask: SourceReal | None = None,
        target_padding_mask: Real | None = None,
        source_positions: SourcePositions | None = None,
        target_positions: Positions | None = None,
        rng: Key | None = None,
    ) -> Float[Array, "B T V"]:
        self._check(
            source,
            target,
            source_padding_mask=source_padding_mask,
            target_padding_mask=target_padding_mask,
            source_positions=source_positions,
            target_positions=target_positions,
        )
        H_enc = self.encode(source, source_padding_mask=source_padding_mask, source_positions=source_positions, rng=rng)
        return self.decode(
            target,
            H_enc,
            memory_padding_mask=source_padding_mask,
            target_padding_mask=target_padding_mask,
            target_positions=target_positions,
            rng=rng,
        )

    def encode(
        self,
        source: SourceIds,
        *,
        source_padding_mask: SourceReal | None = None,
        source_positions: SourcePositions | None = None,
        rng: Key | None = None,
    ) -> Float[Array, "B S D"]:
        """The states ``H_enc`` of the encoder. ``rng`` is the model's, not the encoder's own."""
        _check_ids(self.config, "EncoderDecoder", "source", source, source_padding_mask, source_positions)
        mask, positions = _places(self.config, source_padding_mask, source_positions)
        rngs = fold_all(rng, 4)
        X = self.source_embedding(source, positions, rng=rngs[0])
        return self.encoder(X, mask=mask, positions=positions, rng=rngs[1])

    def decode(
        self,
        target: Ids,
        H_enc: Float[Array | np.ndarray, "B S D"],
        *,
        memory_padding_mask: SourceReal | None = None,
        target_padding_mask: Real | None = None,
        target_positions: Positions | None = None,
        rng: Key | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the next target tokens, given the encoder's states. ``rng`` is the model's."""
        _check_ids(self.config, "EncoderDecoder", "target", target, target_padding_mask, target_positions)
        _check_memory(self.config, target, H_enc, memory_padding_mask)
        memory_mask = None if memory_padding_mask is None else masks.padding_mask(memory_padding_mask)
        mask, positions = _places(self.config, target_padding_mask, target_positions)
        owner = self.source_embedding if self.config.share_embeddings else self.target_embedding
        table = _table(owner) if self.config.share_embeddings else None
        rngs = fold_all(rng, 4)
        X = self.target_embedding(target, positions, table=table, rng=rngs[2])
        h = self.decoder(X, H_enc, mask, memory_mask, positions=positions, rng=rngs[3])
        return _logits(h, owner, self.head, self.config)

    def step(
        self,
        target: Ids,
        cache: Mapping[str, Any],
        *,
        target_padding_mask: Real | None = None,
        target_positions: Positions | None = None,
        at: Integer[Array | np.ndarray, " B"] | None = None,
    ) -> tuple[Float[Array, "B T_or_1 V"], Cache]:
        """As ``LanguageModel.step``, with the memory that the cache holds of the encoder."""
        _check_step(self.config, "EncoderDecoder", "target", target, cache, target_padding_mask, target_positions, at)
        logits, new = self._step(target, cache, target_padding_mask, target_positions, at)
        return _with_room(self.config, logits, target, cache), new

    def _step(
        self, target: Ids, cache: Mapping[str, Any], real: Any, positions: Any, at: Any, *, fresh: bool = False
    ) -> tuple[Float[Array, "B T_or_1 V"], Cache]:
        owner = self.source_embedding if self.config.share_embeddings else self.target_embedding
        return _step(self.decoder, self.target_embedding, owner, self.head, target, cache, real, positions, at, fresh)

    def _check(
        self,
        source: Any,
        target: Any,
        *,
        source_padding_mask: Any = None,
        target_padding_mask: Any = None,
        source_positions: Any = None,
        target_positions: Any = None,
        rng: Any = None,
    ) -> None:
        del rng
        _check_ids(self.config, "EncoderDecoder", "source", source, source_padding_mask, source_positions)
        _check_ids(self.config, "EncoderDecoder", "target", target, target_padding_mask, target_positions)


Model = EncoderModel | LanguageModel | EncoderDecoder


def build(config: ModelConfig, *, seed: int | None = 0) -> Model:
    """The model that a configuration names."""
    classes: dict[Architecture, type[Model]] = {
        "encoder": EncoderModel,
        "decoder": LanguageModel,
        "encoder-decoder": EncoderDecoder,
    }
    return classes[config.architecture](config, seed=seed)


def skeleton(config: ModelConfig) -> Model:
    """The model that a configuration names without any weight: parameters are shapes and dtypes, to be set."""
    model: Model = nnx.eval_shape(lambda: build(config, seed=None))
    return model


def compiled(model: Model) -> Callable[..., Array]:
    """The model as one compiled program: same arguments, same result, and concrete inputs are checked first.

    The weights are those of the moment when ``compiled`` is called: a model that is changed afterwards has to be
    compiled again.
    """
    graphdef, state = nnx.split(model)
    leaves, treedef = jax.tree.flatten(state)

    @jax.jit
    def run(leaves: list[Array], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Array:
        return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))(*args, **kwargs)

    def call(*args: Any, **kwargs: Any) -> Array:
        model._check(*args, **kwargs)
        Y: Array = run(leaves, args, kwargs)
        return Y

    return functools.update_wrapper(call, model.__call__)


def _expect_architecture(model: nnx.Module, config: ModelConfig, architecture: Architecture) -> None:
    name = type(model).__name__
    problems = Problems(name, ConfigError)
    problems.expect(
        config.architecture == architecture, f"architecture: expected {architecture!r}, got {config.architecture!r}"
    )
    problems.raise_if_any()
    check_dtypes(name, param_dtype=config.param_dtype, compute_dtype=config.compute_dtype)


def _head(config: ModelConfig) -> Head | None:
    """The head, if it owns anything."""
    head = Head(config)
    parts = (head.transform, head.norm, head.pooler, head.kernel, head.bias)
    return None if all(part is None for part in parts) else head


def _table(embedding: Embeddings) -> Float[Array, "V D"]:
    assert embedding.tokens is not None
    return embedding.tokens.embedding[...]


def _headed(
    h: Float[Array, "B T D"],
    tied: Embeddings,
    head: Head | None,
    config: ModelConfig,
    real: Real | None = None,
    rng: Key | None = None,
) -> Float[Array, "..."]:
    """What the head makes of the states; one that owns nothing is made on the spot."""
    return (Head(config) if head is None else head)(h, _table(tied), real, rng)


def _logits(
    h: Float[Array, "B T D"], tied: Embeddings, head: Head | None, config: ModelConfig
) -> Float[Array, "B T V"]:
    return _headed(h, tied, head, config)


def _places(
    config: ModelConfig, real: Real | None, positions: Positions | None, segments: Ids | None = None
) -> tuple[Bool[Array, "B 1 T_or_1 T"] | None, Positions | None]:
    """The mask over padded keys or between documents, and the positions: those given, else counted."""
    if segments is not None:
        return masks.segment_mask(segments), masks.segment_positions(segments) if positions is None else positions
    if real is None:
        return None, positions
    if positions is None and config.position_counting == "real":
        positions = masks.positions_from(real)
    return masks.padding_mask(real), positions


def _step(
    stack: TransformerStack,
    embedding: Embeddings,
    owner: Embeddings,
    head: Head | None,
    tokens: Ids,
    cache: Mapping[str, Any],
    real: Real | None,
    positions: Positions | None,
    at: Integer[Array | np.ndarray, " B"] | None,
    fresh: bool,
) -> tuple[Float[Array, "B T_or_1 V"], Cache]:
    """T further positions through embedding, stack and head. ``owner`` has the table; ``fresh``: the cache is empty."""
    config, shape = embedding.config, tuple(tokens.shape)
    real = jnp.ones(shape, bool) if real is None else jnp.asarray(real)
    if positions is None:
        ahead = real if config.position_counting == "real" else jnp.ones(shape, bool)
        positions = jnp.maximum(cache["counted"][:, None] + jnp.cumsum(ahead, axis=1, dtype=jnp.int32) - 1, 0)
    positions = jnp.broadcast_to(jnp.asarray(positions).astype(jnp.int32), shape)
    places, opened = _open_cache(cache, real, positions, config=config, fresh=fresh)
    X = embedding(tokens, positions, table=None if owner is embedding else _table(owner))
    h, blocks = stack._step(X, opened, places)
    if at is not None:
        where = jnp.asarray(at).astype(jnp.int32)[:, None, None]
        good = (where >= 0) & (where < shape[1])
        h = jnp.where(good, jnp.take_along_axis(h, jnp.where(good, where, 0), axis=1), jnp.nan)
    return _logits(h, owner, head, config), {**opened, "blocks": blocks}


def _with_room(
    config: ModelConfig, logits: Float[Array, "B T_or_1 V"], tokens: Ids, cache: Mapping[str, Any]
) -> Float[Array, "B T_or_1 V"]:
    """The logits; NaN where the step was traced and the cache was too full for it."""
    step = cache["step"]
    if not isinstance(step, jax.core.Tracer):
        return logits
    fits = step + tokens.shape[1] <= _room(config, cache)
    return jnp.where(fits, logits, jnp.nan)


def _room(config: ModelConfig, cache: Mapping[str, Any]) -> int:
    """How many positions a cache can see: as many as it has slots, or with a ring as the context has."""
    slots: int = cache["real"].shape[1]
    return config.context_length if _is_ring(config, slots) else slots


def _check_step(
    config: ModelConfig,
    where: str,
    name: str,
    tokens: Any,
    cache: Mapping[str, Any],
    padding_mask: Any,
    positions: Any,
    at: Any,
) -> None:
    check_predicts_tokens(where, config)
    _check_ids(config, where, name, tokens, padding_mask, positions)
    slots, step = cache["real"].shape[1], cache["step"]
    check_step(
        where,
        tokens=tokens,
        batch=cache["real"].shape[0],
        # a step that is too long for an empty cache is too long at any time
        step=0 if isinstance(step, jax.core.Tracer) else int(step),
        slots=None if _is_ring(config, slots) else slots,
        context_length=config.context_length,
    )
    if at is not None:
        problems = Problems(where, InputError)
        B = tokens.shape[0]
        problems.expect(tuple(at.shape) == (B,), f"at: expected shape [B] = {(B,)}, got {tuple(at.shape)}")
        problems.raise_if_any()
        check_ids(where, "at", at, tokens.shape[1])


def _check_documents(where: str, config: ModelConfig, tokens: Any, segments: Any, padding_mask: Any) -> None:
    if segments is not None:
        if config.head in ("pooled", "sequence"):
            wanted = f"segments: expected None with head={config.head!r} (one vector a row), got {segments.shape}"
            raise InputError(where, [wanted])
        lowest, _ = extremes(segments)
        check_segments(where, tokens=tokens, segments=segments, padding_mask=padding_mask, lowest=lowest)


def _check_ids(
    config: ModelConfig,
    where: str,
    name: str,
    tokens: Any,
    padding_mask: Any,
    positions: Any,
    token_types: Any = None,
) -> None:
    check_tokens(
        where,
        tokens=tokens,
        vocab_size=config.source_vocab_size if name == "source" else config.vocab_size,
        context_length=config.context_length,
        name=name,
        padding_mask=padding_mask,
        positions=positions,
        token_types=token_types,
        num_token_types=config.num_token_types,
        **bounds(tokens, positions, token_types),
    )


def _check_memory(config: ModelConfig, target: Any, H_enc: Any, real: Any) -> None:
    """``H_enc [B, S, D]`` beside ``target [B, T]``, and the padding mask of its S positions."""
    X = Outline((*target.shape, config.model_dim), config.compute_dtype)
    check_activations("EncoderDecoder", X=X, model_dim=config.model_dim, H_enc=H_enc)
    B, S = H_enc.shape[:2]
    check_tokens(
        "EncoderDecoder",
        tokens=Outline((B, S), "int32"),
        name="memory",
        vocab_size=1,
        context_length=S,
        lowest=None,
        highest=None,
        padding_mask=real,
    )
