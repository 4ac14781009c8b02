"""How a model writes: prompts in, tokens out, the whole loop one compiled program.

Real tokens of the prompts are moved to the right end, and lengths are rounded up to a multiple of a bucket, so that one
program serves all prompts of a bucket. What is padded is hidden: results do not depend on it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int, Integer

from flax_impl.cache import _empty_cache, _is_ring, _packed_cache, _unpacked_cache
from flax_impl.heads import check_predicts_tokens
from flax_impl.linear import extremes, wide_dtype
from flax_impl.models import EncoderDecoder, LanguageModel
from flax_impl.sampling import draw, greedy, processors, sequence_keys, uniforms
from twinformer.checks import INTEGERS, check_tokens, dtype_name
from twinformer.config import ModelConfig
from twinformer.decoding import Generated, SamplingConfig, StopConfig, check_cache, check_prompts, check_room
from twinformer.errors import InputError, Problems

Writer = LanguageModel | EncoderDecoder
Prompts = Integer[Array | np.ndarray, "B T"]
Real = Bool[Array | np.ndarray, "B T"]
Sources = Integer[Array | np.ndarray, "B S"]
SourceReal = Bool[Array | np.ndarray, "B S"]
Allowed = Bool[Array | np.ndarray, "#B M V"]
Advance = Callable[[Int[Array, " B"], Bool[Array, " B"], Any], tuple[Float[Array, "B V"], Any]]


class Generator:
    """Writes with a model: ``generator(prompts, …) -> Generated``.

    ``slots``: how many positions a prompt and what is written may take together (None: the context length; under a
    window of at most ``slots`` they may take all of it). The weights are those of the moment when the generator is
    made. ``compile`` is for the twin's sake: here everything is compiled.
    """

    def __init__(self, model: Writer, *, slots: int | None = None, bucket: int = 32, compile: bool = False) -> None:
        del compile
        _check_writer("Generator", model, slots, bucket)
        self.config, self.slots, self.bucket = model.config, slots, bucket
        graphdef, state = nnx.split(model)
        self._leaves, treedef = jax.tree.flatten(state)
        self._programs = 0

        def begin(leaves: list[Array], ask: _Ask, sampling: SamplingConfig | None) -> tuple[_Written, Any, Advance]:
            self._programs += 1  # runs once for each program: while it is traced
            model = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
            logits, cache = _read_prompts(model, ask, self._cache_slots())
            written = _start(ask, sampling, logits, self._room())
            return _write(logits, written, ask, sampling), cache, _advance_of(model)

        def whole(leaves: list[Array], ask: _Ask, sampling: SamplingConfig | None) -> _Written:
            return _write_on(*begin(leaves, ask, sampling), ask, sampling)

        def first(leaves: list[Array], ask: _Ask, sampling: SamplingConfig | None) -> tuple[_Written, Any]:
            return begin(leaves, ask, sampling)[:2]

        def further(
            going: tuple[_Written, Any], leaves: list[Array], ask: _Ask, sampling: SamplingConfig | None
        ) -> tuple[_Written, Any]:
            self._programs += 1
            model = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
            return _next(*going, _advance_of(model), ask, sampling)

        self._whole = jax.jit(whole, static_argnames="sampling")
        self._first = jax.jit(first, static_argnames="sampling")
        self._further = jax.jit(further, static_argnames="sampling", donate_argnums=0)

    def __call__(
        self,
        prompts: Prompts,
        *,
        padding_mask: Real | None = None,
        source: Sources | None = None,
        source_padding_mask: SourceReal | None = None,
        max_new_tokens: int = 32,
        sampling: SamplingConfig | None = None,
        stop: StopConfig = StopConfig(),  # noqa: B008 (frozen)
        seed: int = 0,
        rows: Integer[Array | np.ndarray, " B"] | None = None,
        allowed: Allowed | None = None,
        pad_id: int = 0,
    ) -> Generated:
        """What is written after each prompt. ``sampling`` None: greedy.

        ``allowed [B or 1, M, V]`` says which tokens may be the t-th that is written. The random numbers of a row depend
        on the seed, its number in ``rows`` (None: ``0 … B-1``) and t alone. A finished row writes ``pad_id``. Raises
        InputError.
        """
        ask = self._ask(
            prompts,
            padding_mask,
            source,
            source_padding_mask,
            max_new_tokens=max_new_tokens,
            stop=stop,
            seed=seed,
            rows=rows,
            allowed=allowed,
            pad_id=pad_id,
        )
        written = self._whole(self._leaves, ask, sampling=sampling)
        lengths = np.asarray(written.lengths).astype(np.int64)
        longest = int(lengths.max())
        return Generated(
            tokens=np.asarray(written.tokens)[:, :longest].astype(np.int64),
            lengths=lengths,
            finished=np.array(written.finished),
            logprobs=np.array(written.logprobs)[:, :longest],
        )

    def stream(
        self,
        prompts: Prompts,
        *,
        padding_mask: Real | None = None,
        source: Sources | None = None,
        source_padding_mask: SourceReal | None = None,
        max_new_tokens: int = 32,
        sampling: SamplingConfig | None = None,
        stop: StopConfig = StopConfig(),  # noqa: B008 (frozen)
        seed: int = 0,
        rows: Integer[Array | np.ndarray, " B"] | None = None,
        allowed: Allowed | None = None,
        pad_id: int = 0,
    ) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]]:
        """The same, token by token: ``(tokens [B], live [B])`` after each step, ``live`` the rows that wrote."""
        ask = self._ask(
            prompts,
            padding_mask,
            source,
            source_padding_mask,
            max_new_tokens=max_new_tokens,
            stop=stop,
            seed=seed,
            rows=rows,
            allowed=allowed,
            pad_id=pad_id,
        )
        return self._stream(ask, max_new_tokens, sampling)

    @property
    def compilations(self) -> int:
        """How many programs have been compiled so far."""
        return self._programs

    def _stream(
        self, ask: _Ask, count: int, sampling: SamplingConfig | None
    ) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]]:
        going: tuple[_Written, Any] = self._first(self._leaves, ask, sampling=sampling)
        live = np.ones(len(ask.prompts), bool)
        for t in range(count):
            if t:
                going = self._further(going, self._leaves, ask, sampling=sampling)
            finished = np.array(going[0].finished)
            yield np.asarray(going[0].last).astype(np.int64), live
            if finished.all():
                return
            live = ~finished

    def _ask(self, prompts: Any, real: Any, source: Any, source_real: Any, **choices: Any) -> _Ask:
        room, bucket = self._room(), self.bucket
        return _asked("Generator", self.config, prompts, real, source, source_real, room=room, bucket=bucket, **choices)

    def _room(self) -> int:
        """How many positions a prompt and what is written may take."""
        slots = self.config.context_length if self.slots is None else self.slots
        return self.config.context_length if _is_ring(self.config, slots) else slots

    def _cache_slots(self) -> int:
        slots = self.config.context_length if self.slots is None else self.slots
        window = self.config.ring_window
        if window is not None and _is_ring(self.config, slots):
            return window  # older positions are not seen any more
        return slots + min(self.bucket, slots) - 1  # what rounding adds to the longest prompt is padding


def score(
    model: Writer,
    prompts: Prompts,
    continuations: Integer[Array | np.ndarray, "B M"],
    *,
    padding_mask: Real | None = None,
    continuation_mask: Bool[Array | np.ndarray, "B M"] | None = None,
    source: Sources | None = None,
    source_padding_mask: SourceReal | None = None,
) -> Float[Array, "B M"]:
    """The log-probability of each token of the continuations, given what is before it: wide, and 0 at padding.

    One call of the model, which sees all but the last token. Raises InputError.
    """
    _check_writer("score", model)
    config = model.config
    before = _checked_texts("score", config, prompts, padding_mask, source, source_padding_mask)
    _check_text("score", "continuations", continuations, config.vocab_size, continuation_mask, "continuation_mask")
    after = _pair(continuations, continuation_mask)
    problems = Problems("score", InputError)
    B, got, N = prompts.shape[0], continuations.shape[0], config.context_length
    if problems.expect(got == B, f"continuations: expected the batch of prompts, B={B}, got {got}"):
        longest = int((_kept(config, before.real).sum(1) + after.real.sum(1)).max())
        problems.expect(
            longest <= N + 1,
            f"continuations: expected at most {N + 1} tokens with the prompt (context_length={N}), got {longest}",
        )
    problems.raise_if_any()
    kept = np.concatenate([_kept(config, before.real), after.real], 1)
    both = _Text(np.concatenate([before.ids, after.ids], 1), np.concatenate([before.real, after.real], 1))
    packed = _packed(both, kept, max(longest, 2), left=True)
    # place i of the logits is about the packed token i + 1
    asked = _kept(config, before.real).sum(1)[:, None] + np.cumsum(after.real, axis=1) - 1
    places = (np.clip(asked, 1, packed.ids.shape[1] - 1) - 1).astype(np.int32)
    ids, real, targets = packed.ids[:, :-1], packed.real[:, :-1], packed.ids[:, 1:]
    if source is None:
        inputs = {"tokens": ids, "padding_mask": real}
    else:
        encoded = _pair(source, source_padding_mask)
        inputs = {
            "source": encoded.ids,
            "source_padding_mask": encoded.real,
            "target": ids,
            "target_padding_mask": real,
        }
    graphdef, state = nnx.split(model)
    found: Array = _scored(graphdef, state, inputs, targets, places, after.real)
    return found


@functools.partial(jax.jit, static_argnums=0)
def _scored(graphdef: Any, state: Any, inputs: Any, targets: Array, places: Array, real: Array) -> Float[Array, "B M"]:
    logits = nnx.merge(graphdef, state)(**inputs)
    logprobs = jnp.take_along_axis(_logprobs(logits), targets[..., None], axis=-1)[..., 0]
    return jnp.where(real, jnp.take_along_axis(logprobs, places, axis=1), 0)


# ---- what is asked, from the host to the device


class _Text(NamedTuple):
    """Ids and which of them are real."""

    ids: Integer[np.ndarray, "B T"]
    real: Bool[np.ndarray, "B T"]


class _Ask(NamedTuple):
    """All that a call is about, as arrays: another value needs no other program."""

    prompts: Int[Array, "B T"]  # padding on the left
    begin: Int[Array, " B"]  # the position of the first place: 0, or with places counted that of a row as it was given
    real: Bool[Array, "B T"]
    source: Int[Array, "B S"] | None  # padding on the right
    source_real: Bool[Array, "B S"] | None
    limit: Int[Array, ""]  # max_new_tokens
    stops: Bool[Array, " V"]
    sequences: tuple[Int[Array, " n"], ...]
    keys: Integer[Array, "B 2"]
    allowed: Bool[Array, "#B M V"] | None
    pad: Int[Array, ""]


def _asked(
    where: str,
    config: ModelConfig,
    prompts: Any,
    real: Any,
    source: Any,
    source_real: Any,
    *,
    room: int,
    bucket: int,
    max_new_tokens: int,
    stop: StopConfig,
    seed: int = 0,
    rows: Any = None,
    allowed: Any = None,
    pad_id: int = 0,
) -> _Ask:
    """A call, checked, packed and padded to full buckets. Raises InputError."""
    N, V = config.context_length, config.vocab_size
    check_prompts(
        where,
        prompts=prompts,
        vocab_size=V,
        context_length=N,
        max_new_tokens=max_new_tokens,
        stop=stop,
        seed=seed,
        allowed=allowed,
    )
    text = _checked_texts(where, config, prompts, real, source, source_real)
    kept = _kept(config, text.real)
    B, longest = len(text.ids), _longest(kept)
    check_room(where, longest=longest, max_new_tokens=max_new_tokens, slots=room)
    rows = np.arange(B) if rows is None else rows
    problems = Problems(where, InputError)
    good = tuple(rows.shape) == (B,) and dtype_name(rows) in INTEGERS
    problems.expect(good, f"rows: expected whole numbers of shape [B] = {(B,)}, got {dtype_name(rows)} {rows.shape}")
    is_whole = isinstance(pad_id, int) and not isinstance(pad_id, bool) and abs(pad_id) < 2**31
    problems.expect(is_whole, f"pad_id: expected a whole number of 32 bits, got {pad_id!r}")
    problems.raise_if_any()
    prompt = _packed(text, kept, min(_rounded(longest, bucket), room), left=False)
    begin = np.zeros(B, int) if config.position_counting == "real" else kept.sum(1) - prompt.ids.shape[1]
    encoded = None
    if source is not None:
        encoded = _pair(source, source_real)
        whole = _kept(config, encoded.real)
        encoded = _packed(encoded, whole, min(_rounded(_longest(whole), bucket), N), left=True)
    if allowed is not None:
        allowed = np.asarray(allowed)[:, :max_new_tokens]
        filled = _rounded(max_new_tokens, bucket) - max_new_tokens
        allowed = np.pad(allowed, ((0, 0), (0, filled), (0, 0)), constant_values=True)
    stops = np.zeros(V, bool)
    stops[list(stop.tokens)] = True
    return _Ask(
        prompts=jnp.asarray(prompt.ids),
        begin=jnp.asarray(begin, jnp.int32),
        real=jnp.asarray(prompt.real),
        source=None if encoded is None else jnp.asarray(encoded.ids),
        source_real=None if encoded is None else jnp.asarray(encoded.real),
        limit=jnp.int32(max_new_tokens),
        stops=jnp.asarray(stops),
        sequences=tuple(jnp.asarray(sequence, jnp.int32) for sequence in stop.sequences),
        keys=sequence_keys(seed, np.asarray(rows)),
        allowed=None if allowed is None else jnp.asarray(allowed),
        pad=jnp.int32(pad_id),
    )


def _pair(ids: Any, real: Any) -> _Text:
    ids = np.asarray(ids).astype(np.int32)
    return _Text(ids, np.ones(ids.shape, bool) if real is None else np.asarray(real))


def _kept(config: ModelConfig, real: Bool[np.ndarray, "B T"]) -> Bool[np.ndarray, "B T"]:
    """What the model is given of each row: its real tokens, or all that stands before its end where places count."""
    if config.position_counting == "real":
        return real
    place = np.arange(real.shape[1])
    ends: npt.NDArray[np.int64] = np.where(real, place + 1, 0).max(axis=1, initial=0)
    return place < ends[:, None]


def _longest(kept: Bool[np.ndarray, "B T"]) -> int:
    return int(kept.sum(axis=1).max())


def _rounded(length: int, bucket: int) -> int:
    """Up to a full bucket, and at least to one."""
    return max(-(-length // bucket), 1) * bucket


def _packed(text: _Text, kept: Bool[np.ndarray, "B T"], width: int, *, left: bool) -> _Text:
    """What is kept side by side at the left or the right end of ``width`` columns, in its order; padding has id 0."""
    order = np.argsort(~kept if left else kept, axis=1, kind="stable")
    ids, real = (np.take_along_axis(array, order, axis=1) for array in text)
    ids = np.where(real, ids, 0)
    missing = max(width - ids.shape[1], 0)
    margin = ((0, 0), (0, missing) if left else (missing, 0))
    end = slice(0, width) if left else slice(ids.shape[1] + missing - width, None)
    return _Text(np.pad(ids, margin)[:, end], np.pad(real, margin)[:, end])


def _check_writer(where: str, model: Any, slots: int | None = None, bucket: int = 1) -> None:
    problems = Problems(where, InputError)
    good = isinstance(model, (LanguageModel, EncoderDecoder))
    problems.expect(good, f"model: expected a LanguageModel or an EncoderDecoder, got {type(model).__name__}")
    is_whole = isinstance(bucket, int) and not isinstance(bucket, bool) and bucket >= 1
    problems.expect(is_whole, f"bucket: expected a whole number from 1, got {bucket!r}")
    problems.raise_if_any()
    check_predicts_tokens(where, model.config)
    if slots is not None:
        check_cache(where, batch=1, slots=slots, context_length=model.config.context_length)


def _checked_texts(where: str, config: ModelConfig, prompts: Any, real: Any, source: Any, source_real: Any) -> _Text:
    """The prompts, once they and the source are seen to be right. Raises InputError."""
    two, N = config.architecture == "encoder-decoder", config.context_length
    problems = Problems(where, InputError)
    problems.expect(source is not None or not two, "source: expected ids [B, S] for an EncoderDecoder, got None")
    problems.expect(source is None or two, "source: expected None (there is no encoder here), got ids")
    problems.expect(
        source_real is None or source is not None, "source_padding_mask: expected None without source, got a mask"
    )
    problems.raise_if_any()
    _check_text(where, "prompts", prompts, config.vocab_size, real, "padding_mask")
    text = _pair(prompts, real)
    empty = int((~text.real.any(axis=1)).sum())
    problems.expect(empty == 0, f"prompts: expected a real token in each row, got {empty} rows with none")
    if source is not None:
        _check_text(where, "source", source, config.source_vocab_size, source_real, "source_padding_mask")
        B, got = len(text.ids), source.shape[0]
        problems.expect(got == B, f"source: expected the batch of prompts, B={B}, got {got}")
        longest = _longest(_kept(config, _pair(source, source_real).real))
        counted = "real tokens" if config.position_counting == "real" else "places up to the last token"
        problems.expect(longest <= N, f"source: expected at most context_length={N} {counted}, got {longest}")
    problems.raise_if_any()
    return text


def _check_text(where: str, name: str, ids: Any, vocab_size: int, real: Any, mask_name: str) -> None:
    """``ids`` are of the vocabulary where they are real, and the mask is one for them."""
    T = ids.shape[1] if len(ids.shape) == 2 else 1
    check_tokens(where, tokens=ids, name=name, vocab_size=vocab_size, context_length=T, lowest=None, highest=None)
    problems = Problems(where, InputError)
    if real is not None:
        have, want = tuple(real.shape), tuple(ids.shape)
        problems.expect(have == want, f"{mask_name}: expected shape {want} as of {name}, got {have}")
        kind = dtype_name(real)
        problems.expect(kind == "bool", f"{mask_name}: expected bool (True = real token), got {kind}")
        problems.raise_if_any()
        ids = np.asarray(ids)[np.asarray(real)]
    lowest, highest = extremes(ids)
    if lowest is not None and highest is not None:
        problems.expect(
            lowest >= 0 and highest < vocab_size,
            f"{name}: expected ids from 0 to {vocab_size - 1}, got values from {lowest} to {highest}",
        )
    problems.raise_if_any()


# ---- the loop; ``advance(tokens, live, state)`` is a model, or anything that gives logits and a new state


class _Written(NamedTuple):
    """What has been written so far. ``seen`` only where a processor asks for it."""

    t: Int[Array, ""]
    last: Int[Array, " B"]
    tokens: Int[Array, "B M"]
    logprobs: Float[Array, "B M"]
    lengths: Int[Array, " B"]
    finished: Bool[Array, " B"]
    seen: Bool[Array, "B V"] | None


def _read_prompts(model: Writer, ask: _Ask, slots: int) -> tuple[Float[Array, "B V"], Any]:
    """The logits after the prompts, and the cache that holds them, packed."""
    B, T = ask.prompts.shape
    H_enc = None
    if isinstance(model, EncoderDecoder):
        assert ask.source is not None
        H_enc = model.encode(ask.source, source_padding_mask=ask.source_real)
    cache = _empty_cache(model, B, slots, H_enc, ask.source_real) | {"counted": ask.begin}
    last = jnp.full(B, T - 1, jnp.int32)
    logits, cache = model._step(ask.prompts, cache, ask.real, None, last, fresh=True)
    return logits[:, 0], _packed_cache(cache)


def _advance_of(model: Writer) -> Advance:
    """One more token of each row, on a packed cache; rows that are not live get padding."""

    def advance(tokens: Int[Array, " B"], live: Bool[Array, " B"], cache: Any) -> tuple[Float[Array, "B V"], Any]:
        whole = _unpacked_cache(cache, len(tokens), model.config.num_kv_heads)
        logits, cache = model._step(tokens[:, None], whole, live[:, None], None, None)
        return logits[:, 0], _packed_cache(cache)

    return advance


def _start(ask: _Ask, sampling: SamplingConfig | None, logits: Float[Array, "B V"], room: int) -> _Written:
    """Nothing yet, and room for so many tokens."""
    B = len(logits)
    seen = None
    if sampling is not None and sampling.repetition_penalty != 1:
        rows = jnp.arange(B, dtype=jnp.int32)[:, None]
        seen = jnp.zeros(logits.shape, bool).at[rows, ask.prompts].max(ask.real)
    return _Written(
        t=jnp.zeros((), jnp.int32),
        last=jnp.zeros(B, jnp.int32),
        tokens=jnp.full((B, room), ask.pad, jnp.int32),
        logprobs=jnp.zeros((B, room), wide_dtype(logits.dtype)),
        lengths=jnp.zeros(B, jnp.int32),
        finished=jnp.zeros(B, bool),
        seen=seen,
    )


def _write(logits: Float[Array, "B V"], written: _Written, ask: _Ask, sampling: SamplingConfig | None) -> _Written:
    """Token t of each row that is not finished."""
    t, live = written.t, ~written.finished
    given = logits.astype(wide_dtype(logits.dtype))
    shown = given
    if ask.allowed is not None:
        shown = jnp.where(jax.lax.dynamic_index_in_dim(ask.allowed, t, axis=1, keepdims=False), shown, -jnp.inf)
    if sampling is None:
        chosen = greedy(shown)
    else:
        seen = jnp.zeros((1, shown.shape[1]), bool) if written.seen is None else written.seen
        for process in processors(sampling):
            shown = process(shown, seen)
        chosen = draw(shown, uniforms(ask.keys, t))
    row = jnp.take_along_axis(_logprobs(given), jnp.maximum(chosen, 0)[:, None], axis=1)[:, 0]
    logprob = jnp.where(live, jnp.where(chosen < 0, jnp.nan, row), 0)
    token = jnp.where(live, chosen, ask.pad)
    tokens = jax.lax.dynamic_update_slice_in_dim(written.tokens, token[:, None], t, axis=1)
    ends = (chosen >= 0) & ask.stops[jnp.maximum(chosen, 0)]
    for sequence in ask.sequences:
        ends |= _ends_with(tokens, sequence, t + 1)
    marked = written.seen
    if marked is not None:
        marked = marked | (live[:, None] & (chosen[:, None] == jnp.arange(marked.shape[1], dtype=jnp.int32)))
    return _Written(
        t=t + 1,
        last=token,
        tokens=tokens,
        logprobs=jax.lax.dynamic_update_slice_in_dim(written.logprobs, logprob[:, None], t, axis=1),
        lengths=written.lengths + live,
        finished=written.finished | (live & ends),
        seen=marked,
    )


def _next(
    written: _Written, state: Any, advance: Advance, ask: _Ask, sampling: SamplingConfig | None
) -> tuple[_Written, Any]:
    live = ~written.finished
    logits, state = advance(jnp.where(live, written.last, 0), live, state)
    return _write(logits, written, ask, sampling), state


def _write_on(written: _Written, state: Any, advance: Advance, ask: _Ask, sampling: SamplingConfig | None) -> _Written:
    """Until every row is finished or as many tokens are written as were asked for."""

    def goes_on(going: tuple[_Written, Any]) -> Bool[Array, ""]:
        return (going[0].t < ask.limit) & ~jnp.all(going[0].finished)

    def step(going: tuple[_Written, Any]) -> tuple[_Written, Any]:
        return _next(*going, advance, ask, sampling)

    return jax.lax.while_loop(goes_on, step, (written, state))[0]


def _ends_with(tokens: Int[Array, "B M"], sequence: Int[Array, " n"], length: Int[Array, ""]) -> Bool[Array, " B"]:
    """Whether the first ``length`` tokens of a row end with a sequence."""
    n = len(sequence)
    if n > tokens.shape[1]:
        return jnp.zeros(len(tokens), bool)
    tail = jax.lax.dynamic_slice_in_dim(tokens, length - n, n, axis=1)
    return (length >= n) & jnp.all(tail == sequence, axis=1)


def _logprobs(logits: Float[Array, "*n V"]) -> Float[Array, "*n V"]:
    logprobs: Array = jax.nn.log_softmax(logits.astype(wide_dtype(logits.dtype)), axis=-1)
    return logprobs
