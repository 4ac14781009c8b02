"""Beam search: the best few continuations at once, instead of one token after the other."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from flax_impl.cache import _is_ring, _packed_cache, _unpacked_cache, reorder_cache
from flax_impl.generation import (
    Allowed,
    Prompts,
    Real,
    SourceReal,
    Sources,
    Writer,
    _advance_of,
    _Ask,
    _asked,
    _check_writer,
    _logprobs,
    _read_prompts,
    _rounded,
)
from twinformer.decoding import BeamConfig, Beams, StopConfig
from twinformer.errors import InputError, Problems

# what makes ``tokens [B, W]``, the continuations of the hypotheses ``parents [B, W]``, into logits and a new state
AdvanceBeams = Callable[
    [Int[Array, "B W"], Int[Array, "B W"], Bool[Array, "B W"], Any], tuple[Float[Array, "B W V"], Any]
]


def beam_search(
    model: Writer,
    prompts: Prompts,
    *,
    padding_mask: Real | None = None,
    source: Sources | None = None,
    source_padding_mask: SourceReal | None = None,
    max_new_tokens: int = 32,
    beam: BeamConfig = BeamConfig(),  # noqa: B008 (frozen)
    stop: StopConfig = StopConfig(),  # noqa: B008 (frozen)
    allowed: Allowed | None = None,
    pad_id: int = 0,
    slots: int | None = None,
    bucket: int = 32,
) -> Beams:
    """The ``beam.num_best`` best continuations of each prompt that a beam of ``beam.width`` hypotheses meets.

    In each step the continuations of all live hypotheses are ranked by their sums of log-probabilities (then by
    hypothesis, then by token). Of the first ``width``, those that end in a stop token are finished: their sum over
    ``length_factor`` is their score. The first ``width`` that do not live on. Only ``stop.tokens`` can stop. Arguments
    as for a ``Generator``. Raises InputError.

    Source: book, chapter "Machine Translation", "Beam search".
    """
    _check_writer("beam_search", model, slots, bucket)
    problems = Problems("beam_search", InputError)
    problems.expect(not stop.sequences, f"stop: expected tokens only, got {len(stop.sequences)} sequences")
    problems.raise_if_any()
    config = model.config
    count = config.context_length if slots is None else slots
    room = config.context_length if _is_ring(config, count) else count
    ask = _asked(
        "beam_search",
        config,
        prompts,
        padding_mask,
        source,
        source_padding_mask,
        room=room,
        bucket=bucket,
        max_new_tokens=max_new_tokens,
        stop=stop,
        allowed=allowed,
        pad_id=pad_id,
    )
    M = _rounded(max_new_tokens, bucket)
    graphdef, state = nnx.split(model)
    leaves, treedef = jax.tree.flatten(state)
    pool = _run(graphdef, treedef, beam.width, beam.num_best, M, leaves, ask, _rules(beam, M))
    return _beams(pool, beam.num_best, pad_id)


class _Rules(NamedTuple):
    """A BeamConfig as values that can be traced; ``factors[n]`` is the length factor of n tokens."""

    factors: Float[Array, " lengths"]
    shrink: Bool[Array, ""]
    early: Bool[Array, ""]


class _Pool(NamedTuple):
    """The best hypotheses so far, best first; a score of ``-inf``, a length of 0 where there is none."""

    scores: Float[Array, "B W"]
    sums: Float[Array, "B W"]
    lengths: Int[Array, "B W"]
    finished: Bool[Array, "B W"]
    tokens: Int[Array, "B W M"]


class _Live(NamedTuple):
    """The hypotheses that go on, best first; a sum of ``-inf`` where there is none. ``width [B]``: how many may."""

    t: Int[Array, ""]
    width: Int[Array, " B"]
    sums: Float[Array, "B W"]
    parents: Int[Array, "B W"]
    last: Int[Array, "B W"]
    tokens: Int[Array, "B W M"]


def _rules(beam: BeamConfig, M: int) -> _Rules:
    # nothing has length 0
    factors = np.array([1.0, *(beam.length_factor(n) for n in range(1, M + 1))])
    return _Rules(jnp.asarray(factors), jnp.asarray(beam.shrink), jnp.asarray(beam.early_stopping))


def _beams(pool: _Pool, num_best: int, pad_id: int) -> Beams:
    scores, sums, lengths, finished, tokens = (np.asarray(part)[:, :num_best] for part in pool)
    M = int(lengths.max())
    shown = np.where(np.arange(M) < lengths[..., None], tokens[..., :M], pad_id)
    return Beams(
        tokens=shown.astype(np.int64),
        lengths=lengths.astype(np.int64),
        scores=np.array(scores),
        logprobs=np.array(sums),
        finished=np.array(finished),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _run(
    graphdef: Any, treedef: Any, W: int, num_best: int, M: int, leaves: list[Array], ask: _Ask, rules: _Rules
) -> _Pool:
    """The whole search as one program, for all prompts and numbers of tokens within their buckets."""
    model = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
    B, T = ask.prompts.shape
    logits, cache = _read_prompts(model, ask, _slots(model, T + M))
    G = model.config.num_kv_heads
    cache = reorder_cache(_unpacked_cache(cache, B, G), jnp.repeat(jnp.arange(B, dtype=jnp.int32), W))
    step = _advance_of(model)

    def advance(
        tokens: Int[Array, "B W"], parents: Int[Array, "B W"], live: Bool[Array, "B W"], cache: Any
    ) -> tuple[Float[Array, "B W V"], Any]:
        rows = (jnp.arange(B, dtype=jnp.int32)[:, None] * W + parents).reshape(-1)
        whole = _unpacked_cache(cache, B * W, G)
        own = {name: part for name, part in whole.items() if name != "memory"}  # a row's hypotheses share one memory
        reordered = _packed_cache({**whole, **reorder_cache(own, rows)})
        logits, cache = step(tokens.reshape(-1), live.reshape(-1), reordered)
        return logits.reshape(B, W, -1), cache

    logits = jnp.broadcast_to(logits[:, None], (B, W, logits.shape[-1]))
    return _search(logits, _packed_cache(cache), advance, ask, rules, num_best, M)


def _slots(model: Writer, needed: int) -> int:
    window = model.config.ring_window
    return needed if window is None else min(needed, window)


def _search(
    logits: Float[Array, "B W V"],
    state: Any,
    advance: AdvanceBeams,
    ask: _Ask,
    rules: _Rules,
    num_best: int,
    M: int,
) -> _Pool:
    """From the logits after the prompts, the same for all W hypotheses, to the pool at the end."""
    B, W, _ = logits.shape
    wide = _logprobs(logits[:1, :1]).dtype
    rules = rules._replace(factors=rules.factors.astype(wide))
    none = jnp.full((B, W), -jnp.inf, wide)
    zeros, empty = jnp.zeros((B, W), jnp.int32), jnp.zeros((B, W, M), jnp.int32)
    pool = _Pool(scores=none, sums=none, lengths=zeros, finished=jnp.zeros((B, W), bool), tokens=empty)
    live = _Live(
        t=jnp.zeros((), jnp.int32),
        width=jnp.full(B, W, jnp.int32),
        sums=none.at[:, 0].set(0),  # at first the prompt alone
        parents=zeros,
        last=zeros,
        tokens=empty,
    )

    def goes_on(going: tuple[_Live, _Pool, Any]) -> Bool[Array, ""]:
        live = going[0]
        return (live.t < ask.limit) & jnp.any(live.sums > -jnp.inf)

    def step(going: tuple[_Live, _Pool, Any]) -> tuple[_Live, _Pool, Any]:
        live, pool, state = going
        logits, state = advance(live.last, live.parents, live.sums > -jnp.inf, state)
        return (*_select(logits, live, pool, ask, rules, num_best), state)

    started = (*_select(logits, live, pool, ask, rules, num_best), state)
    return jax.lax.while_loop(goes_on, step, started)[1]


def _select(
    logits: Float[Array, "B W V"], live: _Live, pool: _Pool, ask: _Ask, rules: _Rules, num_best: int
) -> tuple[_Live, _Pool]:
    """One step of the search, in the numbers of the contract."""
    B, W, V = logits.shape
    t, length = live.t, live.t + 1
    rank = jnp.arange(W, dtype=jnp.int32)
    logprobs = _logprobs(logits)
    if ask.allowed is not None:
        shown = jax.lax.dynamic_index_in_dim(ask.allowed, t, axis=1)
        logprobs = jnp.where(shown, logprobs, -jnp.inf)
    # 1: all continuations, ranked; NaN is no continuation. Of equals, top_k gives the lower index first
    sums = live.sums[:, :, None] + logprobs
    sums = jnp.where(jnp.isnan(sums), -jnp.inf, sums)
    first, places = jax.lax.top_k(sums.reshape(B, W * V), W)
    onward, onward_places = jax.lax.top_k(jnp.where(ask.stops, -jnp.inf, sums).reshape(B, W * V), W)
    # 2: those that finish, and those that go on
    ends = ask.stops[places % V] & (rank < live.width[:, None]) & (first > -jnp.inf)
    width = live.width - jnp.where(rules.shrink, jnp.sum(ends, axis=1, dtype=jnp.int32), 0)
    onward = jnp.where(rank < width[:, None], onward, -jnp.inf)
    going = _Live(
        t=length,
        width=width,
        sums=onward,
        parents=(onward_places // V).astype(jnp.int32),
        last=(onward_places % V).astype(jnp.int32),
        tokens=_extended(live, onward_places, V),
    )
    # 3: the pool
    pool = _enter(pool, jnp.where(ends, first, -jnp.inf), _extended(live, places, V), length, True, rules)
    # 4: the end of the search, for each row by itself
    is_last = length >= ask.limit
    left = jnp.where(is_last, onward, -jnp.inf)
    pool = _enter(pool, left, going.tokens, length, False, rules)
    best = onward[:, 0] / rules.factors[jnp.minimum(ask.limit, len(rules.factors) - 1)]
    worst = pool.scores[:, num_best - 1]
    done = is_last | (rules.early & (worst > -jnp.inf) & (worst >= best))
    return going._replace(sums=jnp.where(done[:, None], -jnp.inf, onward)), pool


def _extended(live: _Live, places: Int[Array, "B W"], V: int) -> Int[Array, "B W M"]:
    """The tokens of the continuations at these places of the ranking."""
    tokens = jnp.take_along_axis(live.tokens, (places // V)[:, :, None], axis=1)
    new = (places % V).astype(jnp.int32)[:, :, None]
    return jax.lax.dynamic_update_slice_in_dim(tokens, new, live.t, axis=2)


def _enter(
    pool: _Pool,
    sums: Float[Array, "B W"],
    tokens: Int[Array, "B W M"],
    length: Int[Array, ""],
    finished: bool,
    rules: _Rules,
) -> _Pool:
    """The pool with some more, of which it keeps the best: of equals those that were there before, then by rank."""
    exists = sums > -jnp.inf
    new = _Pool(
        scores=sums / rules.factors[length],
        sums=sums,
        lengths=jnp.where(exists, length, 0),
        finished=exists & finished,
        tokens=tokens,
    )
    both = jax.tree.map(lambda old, more: jnp.concatenate([old, more], axis=1), pool, new)
    _, kept = jax.lax.top_k(both.scores, sums.shape[1])

    def chosen(part: Array) -> Array:
        return jnp.take_along_axis(part, kept.reshape(*kept.shape, *[1] * (part.ndim - 2)), axis=1)

    kept_pool: _Pool = jax.tree.map(chosen, both)
    return kept_pool
