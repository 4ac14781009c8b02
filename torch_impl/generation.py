"""A model that writes: token after token, and what it thinks of what others wrote."""

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int64, Integer
from torch import Tensor

from torch_impl import cache as caches
from torch_impl.cache import Cache
from torch_impl.heads import check_writes
from torch_impl.linear import wide_dtype
from torch_impl.models import EncoderDecoder, LanguageModel
from torch_impl.positions import extremes
from torch_impl.sampling import Processor, draw, greedy, processors, sequence_keys, uniforms
from twinformer.checks import INTEGERS, check_sizes, check_tokens, dtype_name
from twinformer.decoding import Generated, SamplingConfig, StopConfig, check_cache, check_prompts, check_room
from twinformer.errors import InputError, Problems

Ids = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
AnyIds = Integer[Tensor, "..."] | npt.NDArray[Any]
AnyFlags = Bool[Tensor, "..."] | npt.NDArray[np.bool_]

_STEPS = 32  # steps whose random numbers are made at a time


class Generator:
    """Writes on from prompts with a ``LanguageModel``, or a target for each source with an ``EncoderDecoder``.

    ``slots`` (None: the context length) is the room for prompt and new tokens; with a window of at most so many, old
    positions make room. Prompts are padded on the left, sources on the right, to a multiple of ``bucket``: what is
    written does not depend on it. With ``compile`` one program (``torch.compile``) is compiled for each such length and
    batch, and one for single tokens; ``compilations`` counts them. The model's weights are read as they are at each
    call.

    Raises InputError for sizes, prompts, ids, seeds and masks that are wrong, for a prompt without a real token, where
    prompt and new tokens find no room, and where the model gives a row no finite logit to choose from.
    """

    def __init__(
        self,
        model: LanguageModel | EncoderDecoder,
        *,
        slots: int | None = None,
        bucket: int = 32,
        compile: bool = False,
    ) -> None:
        self._runner = _Runner("Generator", model, slots, bucket, compile)

    def __call__(
        self,
        prompts: AnyIds,
        *,
        padding_mask: AnyFlags | None = None,
        source: AnyIds | None = None,
        source_padding_mask: AnyFlags | None = None,
        max_new_tokens: int = 32,
        sampling: SamplingConfig | None = None,
        stop: StopConfig = StopConfig(),  # noqa: B008 (it is frozen)
        seed: int = 0,
        rows: AnyIds | None = None,
        allowed: AnyFlags | None = None,
        pad_id: int = 0,
    ) -> Generated:
        """What is written after each prompt ``[B, T]``. ``sampling`` None: the likeliest token at each place.

        Token t of a row is chosen from the logits after what stands before it, hidden where ``allowed [B or 1, M, V]``
        is False at t, then processed as ``sampling`` says. Its random numbers depend on seed, row (``rows [B]``; None:
        ``0 … B - 1``) and t alone.
        """
        asked = (prompts, padding_mask, source, source_padding_mask, max_new_tokens, sampling, stop, seed, rows)
        return _gathered(list(self._steps(*asked, allowed, pad_id)))

    def stream(
        self,
        prompts: AnyIds,
        *,
        padding_mask: AnyFlags | None = None,
        source: AnyIds | None = None,
        source_padding_mask: AnyFlags | None = None,
        max_new_tokens: int = 32,
        sampling: SamplingConfig | None = None,
        stop: StopConfig = StopConfig(),  # noqa: B008 (it is frozen)
        seed: int = 0,
        rows: AnyIds | None = None,
        allowed: AnyFlags | None = None,
        pad_id: int = 0,
    ) -> Iterator[tuple[Ids, Flags]]:
        """The same tokens as they are written: after each step ``(tokens [B], live [B])``, live rows being those that
        wrote them."""
        asked = (prompts, padding_mask, source, source_padding_mask, max_new_tokens, sampling, stop, seed, rows)
        return ((step.tokens, step.live) for step in self._steps(*asked, allowed, pad_id))

    @property
    def compilations(self) -> int:
        """Programs compiled so far; 0 without ``compile``."""
        return self._runner.compilations

    def _steps(
        self,
        prompts: AnyIds,
        padding_mask: AnyFlags | None,
        source: AnyIds | None,
        source_padding_mask: AnyFlags | None,
        max_new_tokens: int,
        sampling: SamplingConfig | None,
        stop: StopConfig,
        seed: int,
        rows: AnyIds | None,
        allowed: AnyFlags | None,
        pad_id: int,
    ) -> "Iterator[_Written]":
        """Everything is checked here, at the call; the rest happens as it is asked for."""
        runner = self._runner
        vocab_size = runner.model.config.vocab_size
        task = runner.task(
            prompts, padding_mask, source, source_padding_mask, max_new_tokens, stop, seed=seed, allowed=allowed
        )
        B = len(task.prompts)
        chooser = _Chooser(
            sampling,
            sequence_keys(seed, _checked_rows(rows, B)).to(runner.device),
            _seen(task, vocab_size).to(runner.device) if sampling and sampling.repetition_penalty != 1 else None,
            None if allowed is None else torch.from_numpy(_host(allowed).copy()).to(runner.device),
        )
        return _write(runner.start(task, max_new_tokens), task, chooser, max_new_tokens, stop, pad_id)


@dataclass(frozen=True)
class _Task:
    """Prompts and sources as they are given to the model, as NumPy arrays: real tokens side by side, rounded up.

    Where places are counted tokens stay as far apart as they were, and padding before them counts.
    """

    prompts: Ids  # [B, T], padding on the left
    real: Flags
    source: Ids | None  # [B, S], padding on the right
    source_real: Flags | None
    begin: Ids | None  # [B], where places are counted: the position of the first place, negative before them all


@dataclass(frozen=True)
class _Written:
    """One step: the tokens ``[B]``, the rows that wrote them, their log-probabilities, the rows that it finished."""

    tokens: Ids
    live: Flags
    logprobs: npt.NDArray[np.floating[Any]]
    finished: Flags


@runtime_checkable
class _Writer(Protocol):
    """A model in the middle of writing."""

    def step(self, tokens: Int64[Tensor, "B T"], real: Bool[Tensor, "B T"]) -> Float[Tensor, "B V"]:
        """Logits of what comes after T further tokens."""

    def reorder(self, rows: Ids) -> None:
        """From now on row r is what row ``rows[r]`` was."""


# ---- the loop


@dataclass
class _Chooser:
    """Which token comes next."""

    sampling: SamplingConfig | None
    keys: Int64[Tensor, "B 2"]
    seen: Bool[Tensor, "B V"] | None  # kept where a processor asks for it
    allowed: Bool[Tensor, "#B M V"] | None

    def __post_init__(self) -> None:
        self._processors: tuple[Processor, ...] = () if self.sampling is None else processors(self.sampling)
        self._numbers: list[Tensor] = []

    def choose(self, logits: Float[Tensor, "B V"], t: int) -> tuple[Int64[Tensor, " B"], Float[Tensor, " B"]]:
        """Token number t of each row, and the model's log-probability of it."""
        logits = logits.to(wide_dtype(logits.dtype))
        x = logits if self.allowed is None else logits.masked_fill(~self.allowed[:, t], -torch.inf)
        for process in self._processors:
            x = process(x, torch.zeros_like(x, dtype=torch.bool) if self.seen is None else self.seen)
        chosen = greedy(x) if self.sampling is None else draw(x, self._uniforms(t))
        places = chosen.clamp(min=0)[:, None]
        if self.seen is not None:
            self.seen.scatter_(1, places, True)
        return chosen, logits.gather(1, places)[:, 0] - logits.logsumexp(-1)

    def _uniforms(self, t: int) -> Float[Tensor, " B"]:
        if t % _STEPS == 0:  # for the next steps all at once
            B = len(self.keys)
            steps = torch.arange(t, t + _STEPS, device=self.keys.device).repeat_interleave(B)
            self._numbers = list(uniforms(self.keys.repeat(_STEPS, 1), steps).view(_STEPS, B))
        return self._numbers[t % _STEPS]


def _write(
    writer: _Writer, task: _Task, chooser: _Chooser, max_new_tokens: int, stop: StopConfig, pad_id: int
) -> Iterator[_Written]:
    """Step after step, until every row is finished or has ``max_new_tokens``."""
    device = chooser.keys.device
    tokens, real = torch.from_numpy(task.prompts).to(device), torch.from_numpy(task.real).to(device)
    live = np.ones(len(task.prompts), np.bool_)
    longest = max((len(sequence) for sequence in stop.sequences), default=0)
    tail = np.full((len(live), longest), -1, np.int64)  # the last tokens that each row has written
    for t in range(max_new_tokens):
        with torch.no_grad():
            chosen, logprobs = chooser.choose(writer.step(tokens, real), t)
        written, scores = chosen.cpu().numpy(), logprobs.cpu().numpy()
        lost = live & (written < 0)
        if lost.any():
            raise InputError("Generator", [f"logits: expected a finite one to choose, got none in rows {_list(lost)}"])
        tail = np.concatenate((tail, written[:, None]), 1)[:, 1:]
        ends = live & (np.isin(written, stop.tokens) | _ends_with(tail, stop.sequences))
        yield _Written(np.where(live, written, pad_id), live, np.where(live, scores, 0).astype(scores.dtype), ends)
        live = live & ~ends
        if not live.any():
            return
        tokens = torch.from_numpy(np.where(live, written, 0)[:, None]).to(device)
        real = torch.from_numpy(live[:, None]).to(device)


def _ends_with(tail: Ids, sequences: tuple[tuple[int, ...], ...]) -> Flags:
    ends = np.zeros(len(tail), np.bool_)
    for sequence in sequences:
        ends |= (tail[:, -len(sequence) :] == sequence).all(-1)
    return ends


def _gathered(steps: list[_Written]) -> Generated:
    live = np.stack([step.live for step in steps], 1)
    return Generated(
        tokens=np.stack([step.tokens for step in steps], 1),
        lengths=live.sum(1),
        finished=np.logical_or.reduce([step.finished for step in steps]),
        logprobs=np.stack([step.logprobs for step in steps], 1),
    )


def _seen(task: _Task, vocab_size: int) -> Bool[Tensor, "B V"]:
    """The tokens of each prompt."""
    seen = np.zeros((len(task.prompts), vocab_size), np.bool_)
    row, place = np.nonzero(task.real)
    seen[row, task.prompts[row, place]] = True
    return torch.from_numpy(seen)


# ---- the model


class _Runner:
    """A model, its programs, and the room that it has."""

    def __init__(
        self, where: str, model: LanguageModel | EncoderDecoder, slots: int | None, bucket: int, compile: bool
    ) -> None:
        given: object = model
        if not isinstance(given, (LanguageModel, EncoderDecoder)):
            wanted = f"model: expected a LanguageModel or an EncoderDecoder, got {type(given).__name__}"
            raise InputError(where, [wanted])
        check_writes(where, model.config)
        N = model.config.context_length
        self.where, self.model, self.bucket = where, model, bucket
        self.slots = N if slots is None else slots
        check_cache(where, batch=1, slots=self.slots, context_length=N)
        check_sizes(where, bucket=bucket)
        self.compile = compile
        self.compilations = 0
        self._read = self._program(self._read_source)
        self._next = self._program(self._next_logits)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def task(
        self,
        prompts: AnyIds,
        padding_mask: AnyFlags | None,
        source: AnyIds | None,
        source_padding_mask: AnyFlags | None,
        max_new_tokens: int,
        stop: StopConfig,
        *,
        seed: int = 0,
        allowed: AnyFlags | None = None,
    ) -> _Task:
        """What was asked for, checked and brought into shape."""
        where, config = self.where, self.model.config
        N = config.context_length
        check_prompts(
            where,
            prompts=prompts,
            vocab_size=config.vocab_size,
            context_length=N,
            max_new_tokens=max_new_tokens,
            stop=stop,
            seed=seed,
            allowed=None if allowed is None else _host(allowed),
        )
        tokens, real = self.read_prompts(prompts, padding_mask)
        kept = self.kept(real)
        lengths = kept.sum(-1)
        longest = int(lengths.max())
        ring = caches._is_ring(config, self.slots)
        check_room(where, longest=longest, max_new_tokens=max_new_tokens, slots=N if ring else self.slots)
        width = min(caches._round_up(longest, self.bucket), N)
        packed = _pack(tokens, real, kept, width, left=False)
        begin = lengths - width if config.position_counting == "places" else None
        read, read_real = self.read_source(source, source_padding_mask, len(tokens))
        return _Task(*packed, read, read_real, begin)

    def kept(self, real: Flags) -> Flags:
        """What of a row is given to the model: its real tokens, or, where places are counted, all up to the last."""
        if self.model.config.position_counting == "real":
            return real
        return np.logical_or.accumulate(real[:, ::-1], 1)[:, ::-1]

    def read_prompts(self, prompts: AnyIds, padding_mask: AnyFlags | None) -> tuple[Ids, Flags]:
        """Prompts and their real tokens, checked, as they came."""
        _check_ids(self.where, "prompts", prompts, padding_mask, self.model.config.vocab_size, "padding_mask")
        tokens, real = _on_host(prompts, padding_mask)
        empty: Flags = ~np.logical_or.reduce(real, -1)
        if empty.any():
            wanted = f"prompts: expected a real token in every row, got none in rows {_list(empty)}"
            raise InputError(self.where, [wanted])
        return tokens, real

    def read_source(
        self, source: AnyIds | None, padding_mask: AnyFlags | None, batch: int
    ) -> tuple[Ids, Flags] | tuple[None, None]:
        """Sources and their real tokens, checked, side by side and rounded up."""
        problems = Problems(self.where, InputError)
        crossing = isinstance(self.model, EncoderDecoder)
        problems.expect(source is not None or not crossing, "source: expected [B, S] whole numbers, got None")
        problems.expect(source is None or crossing, "source: expected None without an encoder, got an array")
        problems.expect(
            source is not None or padding_mask is None,
            "source_padding_mask: expected None without a source, got a mask",
        )
        problems.raise_if_any()
        if source is None:
            return None, None
        V = self.model.config.source_vocab_size
        _check_ids(self.where, "source", source, padding_mask, V, "source_padding_mask")
        tokens, real = _on_host(source, padding_mask)
        kept = self.kept(real)
        N, longest = self.model.config.context_length, max(int(kept.sum(-1).max(initial=0)), 1)
        counted = "real tokens" if self.model.config.position_counting == "real" else "places up to the last token"
        problems.expect(len(tokens) == batch, f"source: expected the batch of prompts, B={batch}, got {len(tokens)}")
        problems.expect(longest <= N, f"source: expected at most context_length={N} {counted}, got {longest}")
        problems.raise_if_any()
        return _pack(tokens, real, kept, min(caches._round_up(longest, self.bucket), N), left=True)

    @torch.no_grad()
    def start(self, task: _Task, max_new_tokens: int) -> "_Cached":
        """A writer for the prompts of the task."""
        config = self.model.config
        # rounding a prompt up costs slots that hold nothing; compiled programs need a size that is always the same
        slots = self.slots + self.bucket - 1
        if not self.compile:
            slots = min(slots, caches._round_up(task.prompts.shape[1] + max_new_tokens, caches._BLOCK))
        if config.ring_window is not None:
            slots = min(slots, config.ring_window)
        H_enc = source_real = None
        if task.source is not None and task.source_real is not None:
            source_real = torch.from_numpy(task.source_real).to(self.device)
            H_enc = self._read(torch.from_numpy(task.source).to(self.device), source_real)
        cache = caches._empty_cache(self.model, len(task.prompts), slots, H_enc, source_real)
        if task.begin is not None:
            cache["counted"] += torch.from_numpy(task.begin).to(self.device)
        return _Cached(self, cache)

    def _read_source(self, source: Tensor, real: Tensor) -> Tensor:
        assert isinstance(self.model, EncoderDecoder)
        return self.model.encode(source, source_padding_mask=real)

    def _next_logits(self, tokens: Tensor, real: Tensor, cache: Cache, end: int | None) -> Tensor:
        """Logits of what comes after the last of the tokens."""
        model = self.model
        h = model._step(tokens, cache, real, None, end)
        return model._logits(h[:, -1:], model._table)[:, 0]

    def _program(self, function: Callable[..., Tensor], name: str = "inductor") -> Callable[..., Tensor]:
        """The function, compiled once for each set of shapes where programs are wanted; ``name``: by which backend."""
        if not self.compile:
            return function

        def run(*args: Any) -> Any:
            return function(*args)

        # PyTorch keeps and counts programs by code object
        run = types.FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)
        chosen = torch._dynamo.lookup_backend(name)

        def backend(graph: Any, inputs: Any) -> Any:
            self.compilations += 1
            return chosen(graph, inputs)

        program = torch.compile(run, fullgraph=True, dynamic=False, backend=backend)
        met = set()

        def call(*args: Any) -> Tensor:
            shapes = _shapes(args)
            if shapes in met:
                logits: Tensor = program(*args)
                return logits
            with torch._dynamo.config.patch(recompile_limit=10**6, accumulated_recompile_limit=10**6):
                logits = program(*args)
            met.add(shapes)
            return logits

        return call


def _shapes(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What decides whether a program serves: the shapes of tensors (of a cache its size), and other values."""
    found: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            found.append(tuple(argument.shape))
        elif isinstance(argument, dict):
            found.append(tuple(argument["real"].shape))
            found.append(tuple(argument["memory"]["real"].shape) if "memory" in argument else None)
        else:
            found.append(argument)
    return tuple(found)


class _Cached:
    """A model in the middle of writing, with what it remembers."""

    def __init__(self, runner: _Runner, cache: Cache) -> None:
        self._runner, self._cache = runner, cache
        self._seen = 0  # positions
        self._origin = np.arange(len(cache["real"]))  # the row of the task that a row has its source from

    def step(self, tokens: Int64[Tensor, "B T"], real: Bool[Tensor, "B T"]) -> Float[Tensor, "B V"]:
        T = tokens.shape[1]
        self._seen += T
        # while compiled a number that grows would be a program each; that of the first step goes with its T
        end = None if self._runner.compile and self._seen > T else self._seen
        return self._runner._next(tokens, real, self._cache, end)

    def reorder(self, rows: Ids) -> None:
        if np.array_equal(rows, np.arange(len(self._origin))):
            return
        origin = self._origin[rows]
        places = torch.from_numpy(rows).to(self._runner.device)
        if len(rows) != len(self._origin):
            self._cache = caches.reorder_cache(self._cache, places)
        else:
            caches._reorder_within(self._cache, places, self._seen, memory=not np.array_equal(origin, self._origin))
        self._origin = origin


# ---- ids and masks


def _host(values: AnyIds | AnyFlags) -> npt.NDArray[Any]:
    return values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _on_host(ids: AnyIds, mask: AnyFlags | None) -> tuple[Ids, Flags]:
    tokens = _host(ids).astype(np.int64)
    return tokens, np.ones(tokens.shape, np.bool_) if mask is None else _host(mask)


def _pack(tokens: Ids, real: Flags, kept: Flags, length: int, *, left: bool) -> tuple[Ids, Flags]:
    """What is kept side by side at one end of ``length`` places; padding holds 0."""
    packed = np.zeros((len(tokens), length), np.int64)
    packed_real = np.zeros(packed.shape, np.bool_)
    for row, (ids, there, keep) in enumerate(zip(np.where(real, tokens, 0), real, kept, strict=True)):
        count = int(keep.sum())
        place = slice(0, count) if left else slice(length - count, length)
        packed[row, place] = ids[keep]
        packed_real[row, place] = there[keep]
    return packed, packed_real


def _check_ids(where: str, name: str, ids: AnyIds, mask: AnyFlags | None, vocab_size: int, mask_name: str) -> None:
    """Shapes, dtypes, and the range of the ids that are real."""
    problems = Problems(where, InputError)
    shape, kind = tuple(ids.shape), dtype_name(ids)
    if mask is not None:
        have, what = tuple(mask.shape), dtype_name(mask)
        problems.expect(have == shape, f"{mask_name}: expected shape [B, T] = {shape}, got {have}")
        problems.expect(what == "bool", f"{mask_name}: expected bool (True = real token), got {what}")
    lowest = highest = None
    if not problems.found and kind in INTEGERS:
        tokens, real = _on_host(ids, mask)
        lowest, highest = extremes(torch.from_numpy(tokens[real]))
    try:
        check_tokens(
            where,
            tokens=ids,
            vocab_size=vocab_size,
            context_length=shape[1] if len(shape) == 2 else 1,  # what is too long is seen when padding is gone
            lowest=lowest,
            highest=highest,
            name=name,
        )
    except InputError as error:
        problems.found.extend(error.problems)
    problems.raise_if_any()


def _checked_rows(rows: AnyIds | None, B: int) -> Int64[Tensor, " B"]:
    if rows is None:
        return torch.arange(B)
    problems = Problems("Generator", InputError)
    have = tuple(rows.shape)
    problems.expect(have == (B,), f"rows: expected shape [B] = {(B,)}, got {have}")
    kind = dtype_name(rows)
    problems.expect(kind in INTEGERS, f"rows: expected whole numbers, got dtype {kind}")
    problems.raise_if_any()
    return torch.from_numpy(_host(rows).astype(np.int64))


def _list(flags: Flags) -> list[int]:
    places: list[int] = np.flatnonzero(flags).tolist()
    return places


# ---- what others wrote


def score(
    model: LanguageModel | EncoderDecoder,
    prompts: AnyIds,
    continuations: AnyIds,
    *,
    padding_mask: AnyFlags | None = None,
    continuation_mask: AnyFlags | None = None,
    source: AnyIds | None = None,
    source_padding_mask: AnyFlags | None = None,
) -> Float[Tensor, "B M"]:
    """Log-probability of each token of the continuations ``[B, M]`` given all real tokens before it; 0 at padding.

    Wide, in one call of the model, which sees all but the last token; as ``Generator`` gives them for what it wrote.
    Raises InputError for shapes, dtypes and ids that are wrong, for a prompt without a real token, and where more than
    one token is beyond the context.
    """
    runner = _Runner("score", model, None, 1, False)
    N, V = model.config.context_length, model.config.vocab_size
    tokens, real = runner.read_prompts(prompts, padding_mask)
    _check_ids("score", "continuations", continuations, continuation_mask, V, "continuation_mask")
    others, others_real = _on_host(continuations, continuation_mask)
    problems = Problems("score", InputError)
    problems.expect(
        len(others) == len(tokens), f"continuations: expected the batch of prompts, B={len(tokens)}, got {len(others)}"
    )
    problems.raise_if_any()
    kept = runner.kept(real)
    before = kept.sum(-1, keepdims=True)
    longest = int((before + others_real.sum(-1, keepdims=True)).max())
    problems.expect(
        longest <= N + 1,
        f"continuations: expected at most {N + 1} tokens with the prompt (context_length={N}), got {longest}",
    )
    problems.raise_if_any()
    read, read_real = runner.read_source(source, source_padding_mask, len(tokens))
    packed, packed_real = _pack(
        np.concatenate((tokens, others), 1),
        np.concatenate((real, others_real), 1),
        np.concatenate((kept, others_real), 1),
        max(longest, 2),
        left=True,
    )

    def on_device(values: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(runner.device)

    # place i of the logits is about token i + 1: nothing comes after the last
    whole, mask = on_device(packed[:, :-1]), on_device(packed_real[:, :-1])
    if isinstance(model, EncoderDecoder):
        assert read is not None
        assert read_real is not None
        logits = model(on_device(read), whole, source_padding_mask=on_device(read_real), target_padding_mask=mask)
    else:
        logits = model(whole, padding_mask=mask)
    logits = logits.to(wide_dtype(logits.dtype))
    logprobs = logits.gather(-1, on_device(packed[:, 1:, None]))[..., 0] - logits.logsumexp(-1)
    # token m of the continuation follows on the prompt and on those of its tokens that are real
    places = np.where(others_real, before + others_real.cumsum(-1) - 2, 0)
    scores: Tensor = logprobs.gather(-1, on_device(places)).masked_fill(~on_device(others_real), 0.0)
    return scores
