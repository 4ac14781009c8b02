"""The three models: an encoder, a language model, and an encoder with a decoder."""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from torch_impl import cache as caches
from torch_impl import masks
from torch_impl.cache import Cache
from torch_impl.dropout import Key, places
from torch_impl.embeddings import Embeddings, check_ids
from torch_impl.heads import Head, check_writes
from torch_impl.linear import DTYPES
from torch_impl.positions import extremes
from torch_impl.stack import TransformerStack
from torch_impl.weights import initialize
from twinformer.checks import check_segments, dtype_name
from twinformer.config import Architecture, ModelConfig
from twinformer.errors import ConfigError, InputError, Problems


class _Model(nn.Module):
    """What the three have in common: a config, a head, and checks that ``compiled`` can run beforehand."""

    architecture: Architecture

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.architecture != self.architecture:
            wanted = f"architecture: expected {self.architecture!r}, got {config.architecture!r}"
            raise ConfigError(type(self).__name__, [wanted])
        self.config = config
        self.compute_dtype = DTYPES[config.compute_dtype]

    def _finish(self, seed: int | None) -> None:
        """The head, last in the order of parameters, and then the weights."""
        head = Head(self.config)
        self.head = head if any(True for _ in head.parameters()) else None
        # not a part of the tree where it owns nothing
        self._made = (head,)
        initialize(self, seed, config=self.config)

    def _logits(self, h: Tensor, table: Tensor, real: Tensor | None = None, rng: Tensor | None = None) -> Tensor:
        """What the head makes of h; logits, where it predicts tokens."""
        head = self._made[0] if self.head is None else self.head
        found: Tensor = head(h, table, real, rng)
        return found

    def _check(self, *args: Any, **kwargs: Any) -> None:
        """Raise InputError for wrong arguments of ``forward``."""
        raise NotImplementedError


class _OneStack(_Model):
    """Embeddings, one stack, and a head."""

    def __init__(self, config: ModelConfig, *, seed: int | None = 0) -> None:
        super().__init__(config)
        self.embedding = Embeddings(config, config.vocab_size, seed=None)
        self.stack = TransformerStack.from_config(config, config.num_layers, causal=self.architecture == "decoder")
        self._finish(seed)

    def _check(
        self,
        tokens: Tensor,
        *,
        padding_mask: Tensor | None = None,
        positions: Tensor | None = None,
        token_types: Tensor | None = None,
        segments: Tensor | None = None,
        rng: Tensor | None = None,
    ) -> None:
        name = type(self).__name__
        if segments is not None:
            if self.config.head in ("pooled", "sequence"):
                wanted = (
                    f"segments: expected None with head={self.config.head!r} (one vector a row), got {segments.shape}"
                )
                raise InputError(name, [wanted])
            lowest, _ = extremes(segments)
            check_segments(name, tokens=tokens, segments=segments, padding_mask=padding_mask, lowest=lowest)
        check_ids(
            name,
            self.config,
            tokens,
            vocab_size=self.config.vocab_size,
            padding_mask=padding_mask,
            positions=positions,
            token_types=token_types,
        )

    def _run(
        self,
        tokens: Tensor,
        real: Tensor | None,
        positions: Tensor | None,
        types: Tensor | None,
        segments: Tensor | None,
        rng: Tensor | None,
    ) -> Tensor:
        key = places(rng, 3)
        mask = None
        if real is not None:
            mask = masks.padding_mask(real)
            positions = _counted(self.config, real, positions)
        elif segments is not None:
            mask = masks.segment_mask(segments)
            positions = masks.segment_positions(segments) if positions is None else positions
        X = self.embedding(tokens, positions, types, rng=key[0])
        h: Tensor = self.stack(X, mask=mask, positions=positions, rng=key[1])
        return self._logits(h, self._table, real, key[2])

    @property
    def _table(self) -> Tensor:
        assert self.embedding.tokens is not None
        return self.embedding.tokens.weight


class EncoderModel(_OneStack):
    """Every token sees every other (book, chapter "Masked Language Models"): hidden states, or what the head makes.

    ``padding_mask`` is True at real tokens: padded keys are hidden, and positions are counted as
    ``config.position_counting`` says (over real tokens, or over all places) unless they are given. ``segments`` says
    which of several documents in a row a token belongs to (0: padding): it sees its own only, and positions count from
    0 in each. Raises ConfigError for a config of another architecture, InputError for wrong shapes, dtypes and ids;
    inside ``torch.compile``, where ids cannot be seen, an id out of range gives NaN.
    """

    architecture = "encoder"

    def forward(
        self,
        tokens: Integer[Tensor, "B T"],
        *,
        padding_mask: Bool[Tensor, "B T"] | None = None,
        positions: Integer[Tensor, "#B T"] | None = None,
        token_types: Integer[Tensor, "B T"] | None = None,
        segments: Integer[Tensor, "B T"] | None = None,
        rng: Key | None = None,
    ) -> Float[Tensor, "..."]:
        if not torch.compiler.is_compiling():
            self._check(
                tokens, padding_mask=padding_mask, positions=positions, token_types=token_types, segments=segments
            )
        return self._run(tokens, padding_mask, positions, token_types, segments, rng)


class LanguageModel(_OneStack):
    """Each token sees itself and those before it (book, chapter "Transformers"): logits of the next token, or what the
    head makes.

    ``padding_mask``, ``segments`` and errors as in ``EncoderModel``. ``step`` takes a sequence in parts.
    """

    architecture = "decoder"

    def forward(
        self,
        tokens: Integer[Tensor, "B T"],
        *,
        padding_mask: Bool[Tensor, "B T"] | None = None,
        positions: Integer[Tensor, "#B T"] | None = None,
        segments: Integer[Tensor, "B T"] | None = None,
        rng: Key | None = None,
    ) -> Float[Tensor, "..."]:
        if not torch.compiler.is_compiling():
            self._check(tokens, padding_mask=padding_mask, positions=positions, segments=segments)
        return self._run(tokens, padding_mask, positions, None, segments, rng)

    def step(
        self,
        tokens: Integer[Tensor, "B T"],
        cache: Cache,
        *,
        padding_mask: Bool[Tensor, "B T"] | None = None,
        positions: Integer[Tensor, "#B T"] | None = None,
        at: Integer[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B P V"], Cache]:
        """Logits for T further positions of the sequences in the cache (``init_cache``), which takes them in.

        Any cut of a sequence into steps gives what one call of the model gives. With ``at`` logits of one place of each
        row, ``[B, 1, V]``. The cache is changed in place and given back; nothing is recorded for gradients. Raises
        InputError where the cache has no room.
        """
        end = None
        if not torch.compiler.is_compiling():
            check_writes("LanguageModel", self.config)
            self._check(tokens, padding_mask=padding_mask, positions=positions)
            end = caches._check("LanguageModel", self.config, cache, tokens, at)
        with torch.no_grad():
            h = self._step(tokens, cache, padding_mask, positions, end)
            return self._logits(_pick(h, at), self._table), cache

    def _step(
        self, tokens: Tensor, cache: Cache, real: Tensor | None, positions: Tensor | None, end: int | None
    ) -> Tensor:
        step = caches._begin(cache, self.config, tokens.shape[1], real, positions, end)
        X = self.embedding._embed(tokens, step.positions, table=self._table)
        return self.stack._step(X, cache, step)


class EncoderDecoder(_Model):
    """An encoder reads the source; a decoder sees it, itself and what it has written.

    Book, chapter "Machine Translation". Called as a whole, or in two parts: ``encode``, then ``decode``, or
    ``step`` after step. Masks and errors as in ``EncoderModel``.
    """

    architecture = "encoder-decoder"

    def __init__(self, config: ModelConfig, *, seed: int | None = 0) -> None:
        super().__init__(config)
        self.source_embedding = Embeddings(config, config.source_vocab_size, seed=None)
        self.encoder = TransformerStack.from_config(config, config.num_encoder_layers)
        self.target_embedding = Embeddings(config, 0 if config.share_embeddings else config.vocab_size, seed=None)
        self.decoder = TransformerStack.from_config(config, config.num_layers, causal=True, cross_attention=True)
        self._finish(seed)

    def forward(
        self,
        source: Integer[Tensor, "B S"],
        target: Integer[Tensor, "B T"],
        *,
        source_padding_mask: Bool[Tensor, "B S"] | None = None,
        target_padding_mask: Bool[Tensor, "B T"] | None = None,
        source_positions: Integer[Tensor, "#B S"] | None = None,
        target_positions: Integer[Tensor, "#B T"] | None = None,
        rng: Key | None = None,
    ) -> Float[Tensor, "B T V"]:
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
        source: Integer[Tensor, "B S"],
        *,
        source_padding_mask: Bool[Tensor, "B S"] | None = None,
        source_positions: Integer[Tensor, "#B S"] | None = None,
        rng: Key | None = None,
    ) -> Float[Tensor, "B S D"]:
        """What the encoder makes of the source: ``H_enc``."""
        if not torch.compiler.is_compiling():
            self._check_source(source, source_padding_mask, source_positions)
        key = places(rng, 4)
        mask = None
        if source_padding_mask is not None:
            mask = masks.padding_mask(source_padding_mask)
            source_positions = _counted(self.config, source_padding_mask, source_positions)
        X = self.source_embedding(source, source_positions, rng=key[0])
        H_enc: Tensor = self.encoder(X, mask=mask, positions=source_positions, rng=key[1])
        return H_enc

    def decode(
        self,
        target: Integer[Tensor, "B T"],
        H_enc: Float[Tensor, "B S D"],
        *,
        memory_padding_mask: Bool[Tensor, "B S"] | None = None,
        target_padding_mask: Bool[Tensor, "B T"] | None = None,
        target_positions: Integer[Tensor, "#B T"] | None = None,
        rng: Key | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits of the token after each token of the target. ``memory_padding_mask`` is that of the source."""
        if not torch.compiler.is_compiling():
            self._check_target(target, target_padding_mask, target_positions)
            _check_memory_padding(memory_padding_mask, H_enc)
        key = places(rng, 4)
        mask = None
        if target_padding_mask is not None:
            mask = masks.padding_mask(target_padding_mask)
            target_positions = _counted(self.config, target_padding_mask, target_positions)
        memory_mask = None if memory_padding_mask is None else masks.padding_mask(memory_padding_mask)
        shared = self._table if self.config.share_embeddings else None
        X = self.target_embedding(target, target_positions, table=shared, rng=key[2])
        h = self.decoder(X, H_enc, mask, memory_mask, positions=target_positions, rng=key[3])
        return self._logits(h, self._table)

    def step(
        self,
        target: Integer[Tensor, "B T"],
        cache: Cache,
        *,
        target_padding_mask: Bool[Tensor, "B T"] | None = None,
        target_positions: Integer[Tensor, "#B T"] | None = None,
        at: Integer[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B P V"], Cache]:
        """Logits for T further positions of the target, as ``LanguageModel.step``; the source is in the cache."""
        end = None
        if not torch.compiler.is_compiling():
            self._check_target(target, target_padding_mask, target_positions)
            end = caches._check("EncoderDecoder", self.config, cache, target, at)
        with torch.no_grad():
            h = self._step(target, cache, target_padding_mask, target_positions, end)
            return self._logits(_pick(h, at), self._table), cache

    def _step(
        self, target: Tensor, cache: Cache, real: Tensor | None, positions: Tensor | None, end: int | None
    ) -> Tensor:
        step = caches._begin(cache, self.config, target.shape[1], real, positions, end)
        X = self.target_embedding._embed(target, step.positions, table=self._table)
        return self.decoder._step(X, cache, step)

    @property
    def _table(self) -> Tensor:
        """The rows of the target's tokens, which are the source's when both share."""
        owner = self.source_embedding if self.config.share_embeddings else self.target_embedding
        assert owner.tokens is not None
        return owner.tokens.weight

    def _check(
        self,
        source: Tensor,
        target: Tensor,
        *,
        source_padding_mask: Tensor | None = None,
        target_padding_mask: Tensor | None = None,
        source_positions: Tensor | None = None,
        target_positions: Tensor | None = None,
        rng: Tensor | None = None,
    ) -> None:
        self._check_source(source, source_padding_mask, source_positions)
        self._check_target(target, target_padding_mask, target_positions)

    def _check_source(self, source: Tensor, padding_mask: Tensor | None, positions: Tensor | None) -> None:
        check_ids(
            "EncoderDecoder",
            self.config,
            source,
            vocab_size=self.config.source_vocab_size,
            name="source",
            padding_mask=padding_mask,
            positions=positions,
        )

    def _check_target(self, target: Tensor, padding_mask: Tensor | None, positions: Tensor | None) -> None:
        check_ids(
            "EncoderDecoder",
            self.config,
            target,
            vocab_size=self.config.vocab_size,
            name="target",
            padding_mask=padding_mask,
            positions=positions,
        )


def _pick(h: Float[Tensor, "B T D"], at: Integer[Tensor, " B"] | None) -> Float[Tensor, "B P D"]:
    """One place of each row, ``[B, 1, D]``; a place that is not there gives NaN. Without ``at`` all."""
    if at is None:
        return h
    at = at.long()[:, None, None]
    absent = (at < 0) | (at >= h.shape[1])
    return h.take_along_dim(at.clamp(0, h.shape[1] - 1), 1).masked_fill(absent, torch.nan)


def _counted(config: ModelConfig, real: Tensor, positions: Tensor | None) -> Tensor | None:
    """The positions that are given, or those of real tokens; None: the places themselves."""
    if positions is None and config.position_counting == "real":
        return masks.positions_from(real)
    return positions


def _check_memory_padding(mask: Tensor | None, H_enc: Tensor) -> None:
    if mask is None:
        return
    problems = Problems("EncoderDecoder", InputError)
    have, want = tuple(mask.shape), tuple(H_enc.shape[:2])
    problems.expect(have == want, f"memory_padding_mask: expected shape [B, S] = {want}, got {have}")
    problems.expect(
        mask.dtype == torch.bool,
        f"memory_padding_mask: expected bool (True = real token), got {dtype_name(mask)}",
    )
    problems.raise_if_any()


def build(config: ModelConfig, *, seed: int | None = 0) -> EncoderModel | LanguageModel | EncoderDecoder:
    """The model that the config names."""
    match config.architecture:
        case "encoder":
            return EncoderModel(config, seed=seed)
        case "decoder":
            return LanguageModel(config, seed=seed)
        case "encoder-decoder":
            return EncoderDecoder(config, seed=seed)


def compiled(model: EncoderModel | LanguageModel | EncoderDecoder) -> Callable[..., Tensor]:
    """A callable with the model's signature: it checks its inputs, then runs one compiled program.

    The program (``torch.compile``, fullgraph) is compiled at the first call, and anew for other arguments or
    the first change of shape. It reads the model's parameters as they are at each call.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    # PyTorch keeps and counts programs by code object, and all models of a class share that of ``forward``
    run = types.FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)
    program = torch.compile(run, fullgraph=True)

    @functools.wraps(model.forward)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        model._check(*args, **kwargs)
        with torch._dynamo.config.patch(recompile_limit=64):  # with and without masks, rng, gradients: 8 is too few
            logits: Tensor = program(*args, **kwargs)
        return logits

    return call
