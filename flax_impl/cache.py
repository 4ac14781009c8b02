"""Decoding with remembered keys and values: every position is computed once.

A cache is a plain nested mapping of arrays that goes in and comes out. With C slots::

    blocks    by number: keys [B, G, C, K], values [B, G, C, J] (after norm and rotary), broken Bool[B, C]
    real      Bool[B, C]      which slots hold real tokens
    positions Int[B, C]       for relative and ALiBi biases
    counted   Int[B]          real tokens so far, or all places, as config.position_counting says
    step      Int[]           positions seen so far, padding included
    memory    of an encoder-decoder: blocks by number (the same with S for C), and real Bool[B, S]

Slot s holds the latest position with an index ``i ≡ s (mod C)``. Where every block has a window of at most C the slots
are a ring, in which old positions make room; otherwise a cache is full after C positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Integer

from flax_impl.linear import Outline, check_ids
from twinformer.checks import check_activations, check_tokens
from twinformer.config import ModelConfig
from twinformer.decoding import check_cache
from twinformer.errors import ConfigError, InputError, Problems

if TYPE_CHECKING:
    from flax_impl.models import EncoderDecoder, LanguageModel

Cache = dict[str, Any]


def init_cache(
    model: LanguageModel | EncoderDecoder,
    batch: int,
    slots: int,
    *,
    H_enc: Float[Array | np.ndarray, "{batch} S D"] | None = None,
    memory_padding_mask: Bool[Array | np.ndarray, "{batch} S"] | None = None,
) -> Cache:
    """An empty cache of ``slots`` slots for ``batch`` sequences.

    An EncoderDecoder needs the encoder's states ``H_enc``: the keys and values of its cross-attention are computed
    here, once. Raises InputError.
    """
    config = model.config
    two = config.architecture == "encoder-decoder"
    problems = Problems("init_cache", InputError)
    problems.expect(
        config.architecture != "encoder",
        f"model: expected a LanguageModel or an EncoderDecoder, got {type(model).__name__}",
    )
    problems.expect(
        memory_padding_mask is None or H_enc is not None, "memory_padding_mask: expected None without H_enc, got a mask"
    )
    problems.raise_if_any()
    if config.head not in ("tied", "untied"):
        wanted = f"head: expected 'tied' or 'untied', got {config.head!r}: it predicts no tokens"
        raise ConfigError("init_cache", [wanted])
    check_cache("init_cache", batch=batch, slots=slots, context_length=config.context_length)
    X = Outline((batch, 1, config.model_dim), config.compute_dtype)
    check_activations("init_cache", X=X, model_dim=config.model_dim, H_enc=H_enc, needs_memory=two, takes_memory=two)
    if H_enc is not None:
        S = H_enc.shape[1]
        check_tokens(
            "init_cache",
            tokens=Outline((batch, S), "int32"),
            name="memory",
            vocab_size=1,
            context_length=S,
            lowest=None,
            highest=None,
            padding_mask=memory_padding_mask,
        )
    return _empty_cache(model, batch, slots, H_enc, memory_padding_mask)


def reset_cache(cache: Mapping[str, Any]) -> Cache:
    """Empty again, for the next sequences. The memory is kept; what lies in the buffers stays there, unseen."""
    emptied = {name: jnp.zeros_like(cache[name]) for name in ("real", "positions", "counted", "step")}
    return {**cache, **emptied}


def reorder_cache(cache: Mapping[str, Any], rows: Integer[Array | np.ndarray, " B_new"]) -> Cache:
    """Row b of the new cache is a copy of row ``rows[b]``, of everything that has rows. Raises InputError."""
    problems = Problems("reorder_cache", InputError)
    problems.expect(len(rows.shape) == 1, f"rows: expected rank 1 [B], got shape {tuple(rows.shape)}")
    problems.raise_if_any()
    check_ids("reorder_cache", "rows", rows, cache["counted"].shape[0])
    rows = jnp.asarray(rows)
    return {**jax.tree.map(lambda buffer: buffer[rows], {**cache, "step": ()}), "step": cache["step"]}


@dataclass(frozen=True)
class _Slots:
    """Where T further positions go, after ``step`` others.

    ``sees`` says which keys their queries meet: all ``"slots"``, once the new ones are written; ``"both"``, what the
    slots held before and the new ones, where writing overwrites what the first of the new ones still need; or only the
    ``"new"`` ones, in a cache that was empty.
    """

    step: Int[Array, ""]
    count: int
    ring: bool
    sees: Literal["slots", "both", "new"]

    def put(self, old: Array, new: Array, axis: int) -> tuple[Array, Array]:
        """A buffer with the new entries along ``axis``, and the entries that the queries meet."""
        written = self._written(old, new, axis)
        if self.sees == "both":
            return written, jnp.concatenate([old, new], axis)
        return written, written if self.sees == "slots" else new

    def _written(self, old: Array, new: Array, axis: int) -> Array:
        T = new.shape[axis]
        if T == 1 or not self.ring:
            start = self.step % self.count if self.ring else self.step
            core = _core(old)
            return jax.lax.dynamic_update_slice_in_dim(core, _core(new), start, axis + core.ndim - old.ndim).reshape(
                old.shape
            )
        # the last of the new ones that falls into each slot
        source = T - 1 - (self.step + T - 1 - jnp.arange(self.count, dtype=jnp.int32)) % self.count
        shape = [self.count if i == axis else 1 for i in range(old.ndim)]
        taken = jnp.take(new, jnp.maximum(source, 0), axis=axis)
        return jnp.where((source >= 0).reshape(shape), taken, old)


@dataclass(frozen=True)
class _Places:
    """The slots of T further positions, and the keys that they may see: made once for a step, for every block."""

    slots: _Slots
    positions: Int[Array, "B T"]
    key_positions: Int[Array, "B seen"]
    allowed: Bool[Array, "B 1 T seen"]  # in a block with the window, if there is one
    unbounded: Bool[Array, "B 1 T seen"]  # in a block without

    def keep(
        self,
        kept: Mapping[str, Array],
        K: Float[Array, "B G T K"],
        V: Float[Array, "B G T J"],
        broken: Bool[Array, "B T"],
    ) -> tuple[dict[str, Array], tuple[Array, Array, Array]]:
        """A block's buffers with what is new, and the keys, values and broken places that the queries meet."""
        keys, K = self.slots.put(kept["keys"], K, 2)
        values, V = self.slots.put(kept["values"], V, 2)
        marks, broken = self.slots.put(kept["broken"], broken, 1)
        return {"keys": keys, "values": values, "broken": marks}, (K, V, broken)


def _open_cache(
    cache: Mapping[str, Any],
    real: Bool[Array, "B T"],
    positions: Int[Array, "B T"],
    *,
    config: ModelConfig,
    fresh: bool = False,
) -> tuple[_Places, Cache]:
    """The places of T further positions, and the cache with all but its blocks brought up to date.

    A query with index i sees the key with index j iff that was seen, ``j <= i``, it is real, and, in a block with a
    window, ``j > i - window``. ``fresh``: the cache is known to be empty.
    """
    window, in_places = config.window, config.position_counting == "places"
    T, C = real.shape[1], cache["real"].shape[1]
    step = jnp.zeros((), jnp.int32) if fresh else cache["step"]
    ring = _is_ring(config, C)
    overwrites = ring and window is not None and T > 1 and T + window - 1 > C
    slots = _Slots(step, C, ring, "new" if fresh else "both" if overwrites else "slots")
    query = step + jnp.arange(T, dtype=jnp.int32)
    if slots.sees == "slots":
        key = _indices(step + T, C)
    else:
        key = query if fresh else jnp.concatenate([_indices(step, C), query])
    distance = key[None, :] - query[:, None]
    seen = (key >= 0) & (distance <= 0)
    everything = seen
    if window is not None:
        seen = seen & (distance > -window)
    all_real, real_keys = slots.put(cache["real"], real, 1)
    all_positions, key_positions = slots.put(cache["positions"], positions, 1)
    opened = {
        **cache,
        "real": all_real,
        "positions": all_positions,
        "counted": cache["counted"] + (T if in_places else jnp.sum(real, axis=1, dtype=jnp.int32)),
        "step": step + T,
    }
    allowed, unbounded = ((kind & real_keys[:, None, :])[:, None] for kind in (seen, everything))
    return _Places(slots, positions, key_positions, allowed, unbounded), opened


def _core(buffer: Array) -> Array:
    """A buffer without axes of size 1 before the last two."""
    return buffer.reshape(*(n for n in buffer.shape[:-2] if n != 1), *buffer.shape[-2:])


def _packed_cache(cache: Mapping[str, Any]) -> Cache:
    """For a compiled loop: buffers in the form in which they are written and multiplied.

    XLA drops axes of size 1 before it multiplies. If a loop carried them, it would make the form that is multiplied and
    the form that is carried from the old buffer one by one, and copy the buffer for each.
    """
    return {
        **cache,
        "blocks": {i: {name: _core(part) for name, part in kept.items()} for i, kept in cache["blocks"].items()},
    }


def _unpacked_cache(cache: Mapping[str, Any], batch: int, groups: int) -> Cache:
    """The cache that ``_packed_cache`` was given."""

    def whole(name: str, part: Array) -> Array:
        return part if name == "broken" else part.reshape(batch, groups, *part.shape[-2:])

    return {
        **cache,
        "blocks": {i: {name: whole(name, part) for name, part in kept.items()} for i, kept in cache["blocks"].items()},
    }


def _indices(step: Int[Array, ""], C: int) -> Int[Array, " {C}"]:
    """The index of the position that each slot holds after ``step`` positions; negative where there is none."""
    last = step - 1
    return last - (last - jnp.arange(C, dtype=jnp.int32)) % C


def _is_ring(config: ModelConfig, slots: int) -> bool:
    """Old positions make room for new ones: no block can see them any more."""
    return config.ring_window is not None and config.ring_window <= slots


def _empty_cache(
    model: LanguageModel | EncoderDecoder, batch: int, slots: int, H_enc: Any = None, memory_real: Any = None
) -> Cache:
    """As ``init_cache``, unchecked: a generator's padding takes slots beyond the context length."""
    config: ModelConfig = model.config
    G, dtype = config.num_kv_heads, config.compute_dtype
    cache: Cache = {
        "blocks": {
            i: {
                "keys": jnp.zeros((batch, G, slots, config.key_dim), dtype),
                "values": jnp.zeros((batch, G, slots, config.value_dim), dtype),
                "broken": jnp.zeros((batch, slots), bool),
            }
            for i in range(config.num_layers)
        },
        "real": jnp.zeros((batch, slots), bool),
        "positions": jnp.zeros((batch, slots), jnp.int32),
        "counted": jnp.zeros(batch, jnp.int32),
        "step": jnp.zeros((), jnp.int32),
    }
    if H_enc is not None:
        real = jnp.ones(H_enc.shape[:2], bool) if memory_real is None else jnp.asarray(memory_real)
        cache["memory"] = {"blocks": model.decoder._memories(H_enc), "real": real}  # type: ignore[union-attr]
    return cache
