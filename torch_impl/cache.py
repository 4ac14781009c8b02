"""Keys and values that are remembered, so that the next token costs one position and not all of them.

A cache of C slots is a plain mapping:

    blocks    for each block ("0", "1", …): keys [B, G, C, K], values [B, G, C, J], broken Bool[B, C]
    real      Bool[B, C]: slots that hold a real token
    positions Int[B, C]: the positions of what the slots hold
    counted   Int[B]: the position that comes next: real tokens so far, or all places (config.position_counting)
    step      a 0-dimensional whole number: positions seen so far, padding included
    memory    of an encoder-decoder: its blocks (keys, values and broken of the source), and real Bool[B, S]

Slot s holds the latest position whose index is ``s`` modulo C. A cache is full after C positions, unless every block
has a window of at most C: then the slots are a ring. A query of index i sees a slot iff the slot's index j has been
seen, ``j <= i``, in a block with a window w also ``j > i - w``, and a real token is there.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn

from torch_impl.heads import check_writes
from torch_impl.linear import DTYPES
from torch_impl.masks import padding_mask
from torch_impl.positions import check_rows, extremes
from twinformer.checks import INTEGERS, check_activations, dtype_name
from twinformer.config import ModelConfig
from twinformer.decoding import check_cache, check_step
from twinformer.errors import InputError, Problems

Cache = dict[str, Any]

_BLOCK = 64  # slots: eager steps look at no more of a cache than is in use, rounded up to these


def init_cache(
    model: nn.Module,
    batch: int,
    slots: int,
    *,
    H_enc: Float[Tensor, "B S D"] | None = None,
    memory_padding_mask: Bool[Tensor, "B S"] | None = None,
) -> Cache:
    """An empty cache for a ``LanguageModel``, or for an ``EncoderDecoder`` with what its encoder made of the source.

    Keys and values of the cross-attention are computed here, once. Raises InputError for sizes and states that do not
    fit the model.
    """
    problems = Problems("init_cache", InputError)
    architecture = getattr(getattr(model, "config", None), "architecture", None)
    problems.expect(
        architecture in ("decoder", "encoder-decoder"),
        f"model: expected a LanguageModel or an EncoderDecoder, got {type(model).__name__}",
    )
    problems.raise_if_any()
    config: ModelConfig = model.config  # type: ignore[assignment]
    check_writes("init_cache", config)
    check_cache("init_cache", batch=batch, slots=slots, context_length=config.context_length)
    _check_memory(config, batch, H_enc, memory_padding_mask)
    return _empty_cache(model, batch, slots, H_enc, memory_padding_mask)


def reset_cache(cache: Cache) -> Cache:
    """The same buffers, empty again for the next sequences; the memory is kept. What they hold stays there, unseen."""
    for name in ("real", "counted", "step"):
        cache[name].zero_()
    return cache


def reorder_cache(cache: Cache, rows: Integer[Tensor, " R"]) -> Cache:
    """A cache whose row r is a copy of row ``rows[r]``, in everything that has rows.

    Raises InputError for rows that are not there.
    """
    if not torch.compiler.is_compiling():
        if rows.ndim != 1:
            raise InputError("reorder_cache", [f"rows: expected rank 1, got shape {tuple(rows.shape)}"])
        check_rows("reorder_cache", "rows", rows, cache["real"].shape[0])
    rows = rows.long()
    return _each(cache, lambda leaf: leaf.index_select(0, rows) if leaf.ndim else leaf.clone())


def _each(tree: Mapping[str, Any], change: Any) -> Cache:
    return {name: _each(leaf, change) if isinstance(leaf, Mapping) else change(leaf) for name, leaf in tree.items()}


# ---- what the models are made of


class _Step(NamedTuple):
    """What the blocks share in one step of T positions, of which S are looked at."""

    positions: Integer[Tensor, "#B T"]  # of the new tokens
    key_positions: Integer[Tensor, "#B S"]
    allowed: Bool[Tensor, "B 1 T S"]
    unbounded: Bool[Tensor, "B 1 T S"] | None  # of blocks without the window, where only some have it
    slots: Int[Tensor, " R"]  # where the last R of the new tokens are kept
    used: int  # the slots that are looked at, from the first on
    older_first: bool  # look at what the slots hold and at the new tokens, before these take the place of old ones
    memory_allowed: Bool[Tensor, "B 1 1 S"] | None


@torch.no_grad()
def _empty_cache(
    model: Any, batch: int, slots: int, H_enc: Tensor | None = None, memory_real: Tensor | None = None
) -> Cache:
    """``init_cache``, unchecked; slots beyond the context length serve for padding."""
    config: ModelConfig = model.config
    stack = model.stack if H_enc is None else model.decoder
    dtype, device = DTYPES[config.compute_dtype], next(model.parameters()).device
    G = config.num_kv_heads

    def block() -> Cache:
        return {
            "keys": torch.zeros(batch, G, slots, config.key_dim, dtype=dtype, device=device),
            "values": torch.zeros(batch, G, slots, config.value_dim, dtype=dtype, device=device),
            "broken": torch.zeros(batch, slots, dtype=torch.bool, device=device),
        }

    cache: Cache = {
        "blocks": {str(i): block() for i in range(len(stack.blocks))},
        "real": torch.zeros(batch, slots, dtype=torch.bool, device=device),
        "positions": torch.zeros(batch, slots, dtype=torch.int64, device=device),
        "counted": torch.zeros(batch, dtype=torch.int64, device=device),
        "step": torch.zeros((), dtype=torch.int64, device=device),
    }
    if H_enc is not None:
        real = (
            torch.ones(H_enc.shape[:2], dtype=torch.bool, device=device) if memory_real is None else memory_real.clone()
        )
        kept = [block.cross_attention.remember(H_enc) for block in stack.blocks]
        cache["memory"] = {
            "blocks": {
                str(i): dict(zip(("keys", "values", "broken"), rows, strict=True)) for i, rows in enumerate(kept)
            },
            "real": real,
        }
    return cache


def _begin(
    cache: Cache,
    config: ModelConfig,
    T: int,
    real: Bool[Tensor, "B T"] | None,
    positions: Integer[Tensor, "#B T"] | None,
    end: int | None,
) -> _Step:
    """Take T further positions into the cache, and say what their queries see.

    ``end``: how many positions the cache has seen after them; None where that cannot be known (while compiled).
    """
    device = cache["real"].device
    B, C = cache["real"].shape
    new = torch.arange(T, device=device)
    in_places = config.position_counting == "places"
    if positions is None:
        counted = cache["counted"][:, None]
        ahead = new if real is None or in_places else real.cumsum(-1) - 1
        positions = (counted + ahead).clamp(min=0)
    positions = positions.long()
    if real is None:
        real = torch.ones(B, T, dtype=torch.bool, device=device)
    index = cache["step"] + new  # of the new positions
    ring = _is_ring(config, C) and (end is None or end > C)  # until then a ring is a row like any other
    older_first = ring and T > 1

    # what the slots hold: index j of slot s, the latest that is s modulo C
    held = torch.arange(C if end is None else min(_round_up(end, _BLOCK), C), device=device)
    if ring:
        last = index[-1] - T if older_first else index[-1]
        held = last - (last - held) % C
    kept = min(T, C)
    slots = index[-kept:] % C if ring else index
    rows = positions.expand(B, T)
    if older_first:
        seen_real = torch.cat((cache["real"], real), -1)
        key_positions = torch.cat((cache["positions"], rows), -1)
        held = torch.cat((held, index))
    cache["real"].index_copy_(1, slots, real[:, -kept:])
    cache["positions"].index_copy_(1, slots, rows[:, -kept:])
    if not older_first:
        seen_real, key_positions = cache["real"][:, : len(held)], cache["positions"][:, : len(held)]
    sees = held <= index[:, None]
    if ring:
        sees = sees & (held >= 0)
    unbounded = sees & padding_mask(seen_real) if config.window_layers is not None else None
    if config.window is not None:
        sees = sees & (held > index[:, None] - config.window)
    cache["counted"] += T if in_places else real.sum(-1)
    cache["step"] += T
    memory = cache.get("memory")
    return _Step(
        positions=positions,
        key_positions=key_positions,
        allowed=sees & padding_mask(seen_real),
        unbounded=unbounded,
        slots=slots,
        used=len(held),
        older_first=older_first,
        memory_allowed=None if memory is None else padding_mask(memory["real"]),
    )


def _keep(
    kept: Mapping[str, Tensor], step: _Step, K: Tensor, V: Tensor, broken: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Put the keys and values of new tokens into their slots; gives those to look at."""
    new = (("keys", K, 2), ("values", V, 2), ("broken", broken, 1))
    if step.older_first:
        seen = [torch.cat((kept[name], rows), axis) for name, rows, axis in new]
    count = len(step.slots)
    for name, rows, axis in new:
        kept[name].index_copy_(axis, step.slots, rows.narrow(axis, rows.shape[axis] - count, count))
    if not step.older_first:
        seen = [kept[name].narrow(axis, 0, step.used) for name, _, axis in new]
    keys, values, lost = seen
    return keys, values, lost


def _reorder_within(cache: Cache, rows: Int[Tensor, " B"], end: int, *, memory: bool) -> None:
    """``reorder_cache`` in place, for as many rows as there were; ``end`` positions have been seen."""

    def move(leaf: Tensor, axis: int | None = None) -> None:
        part = leaf if axis is None else leaf.narrow(axis, 0, min(end, leaf.shape[axis]))
        part.copy_(part.index_select(0, rows))

    for block in cache["blocks"].values():
        move(block["keys"], 2)
        move(block["values"], 2)
        move(block["broken"], 1)
    for leaf, axis in (("real", 1), ("positions", 1), ("counted", None)):
        move(cache[leaf], axis)
    if memory:
        _each(cache["memory"], move)


def _is_ring(config: ModelConfig, slots: int) -> bool:
    """Old positions make room for new ones."""
    return config.ring_window is not None and config.ring_window <= slots


def _room(config: ModelConfig, slots: int) -> int | None:
    """How many positions a cache can take: None where old ones make room."""
    return None if _is_ring(config, slots) else slots


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _check(where: str, config: ModelConfig, cache: Cache, tokens: Tensor, at: Tensor | None) -> int | None:
    """Raise InputError for tokens that the cache has no room for; gives ``end`` for ``_begin``."""
    B, C = cache["real"].shape
    step = None if cache["step"].is_meta else int(cache["step"])
    check_step(where, tokens=tokens, batch=B, step=step, slots=_room(config, C), context_length=config.context_length)
    if at is not None:
        problems = Problems(where, InputError)
        have = tuple(at.shape)
        problems.expect(have == (B,), f"at: expected shape [B] = {(B,)}, got {have}")
        kind = dtype_name(at)
        problems.expect(kind in INTEGERS, f"at: expected whole numbers, got dtype {kind}")
        lowest, highest = extremes(at)
        if lowest is not None and highest is not None:
            problems.expect(
                lowest >= 0 and highest < tokens.shape[1],
                f"at: expected places from 0 to {tokens.shape[1] - 1}, got values from {lowest} to {highest}",
            )
        problems.raise_if_any()
    return None if step is None else step + tokens.shape[1]


def _check_memory(config: ModelConfig, batch: int, H_enc: Tensor | None, real: Tensor | None) -> None:
    """In the words that a stack has for its inputs."""
    two = config.architecture == "encoder-decoder"
    X = torch.empty(batch, 1, config.model_dim, device="meta")
    check_activations("init_cache", X=X, model_dim=config.model_dim, H_enc=H_enc, needs_memory=two, takes_memory=two)
    if real is None:
        return
    problems = Problems("init_cache", InputError)
    if H_enc is None:
        problems.add("memory_padding_mask: expected None without H_enc, got a mask")
    else:
        have, want = tuple(real.shape), tuple(H_enc.shape[:2])
        problems.expect(have == want, f"memory_padding_mask: expected shape [B, S] = {want}, got {have}")
    problems.expect(
        real.dtype == torch.bool, f"memory_padding_mask: expected bool (True = real token), got {dtype_name(real)}"
    )
    problems.raise_if_any()
