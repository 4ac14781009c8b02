"""What a published model writes, token after token, and the same from the cache of either twin, in float64.

The witness says two things: the tokens that the library's ``generate`` writes, and the logits that one call of it
*without a cache* gives over prompt and tokens together. Of a twin's ``Generator`` both are kept: the tokens, and the
logits that it chose each of them from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch

from parity_tests.helpers import Twin, to_numpy
from parity_tests.published_seq2seq import inputs_of
from parity_tests.published_witness import Arrays, positions_of, wide

#: prompts and sources are longer than one bucket, and end within one
BUCKET = 4
NEW = 12


@dataclass(frozen=True)
class Task:
    """What is written on from. ``inputs`` are options of a ``Generator``; ``banned`` is never chosen.

    ``start`` and ``forced`` are the family's ``decoder_start_token_id`` and ``forced_bos_token_id`` (or None).
    """

    prompts: np.ndarray
    inputs: Arrays
    banned: int
    new: int = NEW
    start: int | None = None
    forced: int | None = None


@dataclass(frozen=True)
class Written:
    """Tokens ``[B, M]``, and the logits ``[B, M, V]`` that each was chosen from."""

    tokens: np.ndarray
    logits: np.ndarray


def prompted(model: Any, seed: int = 5) -> Task:
    """Prompts for a model without encoder: one whole, two padded on the left; padding has an id of its own."""
    V = model.config.vocab_size
    tokens, real = np.random.default_rng(seed).integers(0, V - 1, (3, 11)), np.ones((3, 11), bool)
    real[1, :4], real[2, :7] = False, False
    tokens[~real] = V - 1
    return Task(tokens, {"padding_mask": real}, banned=V - 1)


#: as the published models of each family have them; T5, mT5 and Marian start with padding and force nothing
STARTS: dict[str, tuple[int, int]] = {"bart": (2, 0), "mbart": (2, 5), "m2m_100": (2, 7)}


def sourced(family: str, model: Any, seed: int = 3) -> Task:
    """Sources without padding, with it on the right, on the left and within; the beginning is the family's own.

    The id of padding is never written: M2M-100 takes it for padding wherever it stands.
    """
    given = inputs_of(model, seed)
    pad = model.config.pad_token_id
    # (where an odd id of padding is one of them: another)
    begin = [token + 9 if token == pad else token for token in STARTS[family]] if family in STARTS else [pad]
    context = getattr(model.config, "max_position_embeddings", NEW + len(begin))
    return Task(
        np.tile(begin, (len(given["source"]), 1)),
        {name: given[name] for name in ("source", "source_padding_mask")},
        banned=pad,
        new=min(NEW, context - len(begin)),
        start=begin[0],
        forced=begin[1] if len(begin) > 1 else None,
    )


def lively(model: Any) -> Any:
    """A random encoder-decoder whose tokens hang on what it reads: few of its choices are made by biases alone."""
    with torch.no_grad():
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.mul_(0.1)
        for name, leaf in model.named_parameters():
            if ".decoder.layers." in name:
                leaf.mul_(3.0 if leaf.ndim == 2 else 0.3 if name.endswith("bias") else 1.0)
    return model


# ---- theirs


def has_right_cache(config: Any) -> bool:
    """Whether the library's own cache can be asked. It has too few blocks for a T5 whose decoder has more than its
    encoder, and keeps everything where a window of 1 sees no other position (transformers 5.23)."""
    return (getattr(config, "num_decoder_layers", None) or 0) <= config.num_hidden_layers and (
        getattr(config, "sliding_window", None) != 1
    )


def theirs(model: Any, task: Task, *, use_cache: bool = True) -> Written:
    """Tokens of ``generate``, greedy; logits of one call without a cache, over everything that was written."""
    begun = task.prompts.shape[1]
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "suppress_tokens": [task.banned]}
    options |= {"eos_token_id": None, "use_cache": use_cache}
    native = {name: torch.from_numpy(array.astype(np.int64)) for name, array in task.inputs.items()}
    if task.start is None:
        given = {"input_ids": torch.from_numpy(task.prompts), "attention_mask": native["padding_mask"]}
    else:
        given = {"input_ids": native["source"], "attention_mask": native["source_padding_mask"]}
        options |= {"decoder_start_token_id": task.start, "forced_bos_token_id": task.forced}
        options |= {"forced_eos_token_id": None, "bad_words_ids": None}
    options["max_new_tokens"] = task.new + (task.forced is not None)
    with wide(), torch.no_grad():
        texts = to_numpy(model.generate(**given, **options))
        assert texts.shape[1] == begun + task.new, (texts.shape, begun, task.new)
        seen = torch.from_numpy(texts[:, :-1].copy())
        if task.start is None:
            real = np.concatenate([task.inputs["padding_mask"], np.ones((len(texts), task.new - 1), bool)], 1)
            given = {"input_ids": seen, "attention_mask": torch.from_numpy(real.astype(np.int64))}
            given |= {"position_ids": torch.from_numpy(positions_of(real))}
        else:
            given |= {"decoder_input_ids": seen}
        logits = to_numpy(model(**given, use_cache=False).logits)
    return Written(texts[:, begun:], logits[:, begun - 1 :])


# ---- ours


def ours(twin: Twin, model: Any, task: Task) -> Written:
    """What the twin's generator writes, from its cache."""
    allowed = np.ones((1, task.new, model.config.vocab_size), bool)
    allowed[..., task.banned] = False
    generator = twin.file("generation").Generator(model, bucket=BUCKET)
    with _listening(twin) as heard:
        found = generator(task.prompts, max_new_tokens=task.new, allowed=allowed, **task.inputs)
    logits = np.stack(heard, 1) if twin.name == "torch" else found.logprobs
    return Written(found.tokens, logits)


@contextlib.contextmanager
def _listening(twin: Twin) -> Iterator[list[np.ndarray]]:
    """Within, the logits of every step are kept: in the list, or (in Flax, where the loop is one program) in what is
    given back in the place of log-probabilities."""
    generation, heard = twin.file("generation"), []
    if twin.name == "torch":
        choose = generation._Chooser.choose

        def choosing(self: Any, logits: Any, t: int) -> Any:
            heard.append(to_numpy(logits).copy())
            return choose(self, logits, t)

        with mock.patch.object(generation._Chooser, "choose", choosing):
            yield heard
        return
    start, write = generation._start, generation._write

    def starting(ask: Any, sampling: Any, logits: Any, room: int) -> Any:
        begun = start(ask, sampling, logits, room)
        return begun._replace(logprobs=jnp.zeros((*begun.logprobs.shape, logits.shape[-1]), logits.dtype))

    def writing(logits: Any, written: Any, ask: Any, sampling: Any) -> Any:
        kept = jax.lax.dynamic_update_slice_in_dim(written.logprobs, logits[:, None], written.t, axis=1)
        further = write(logits, written._replace(logprobs=written.logprobs[..., 0]), ask, sampling)
        return further._replace(logprobs=kept)

    with mock.patch.object(generation, "_start", starting), mock.patch.object(generation, "_write", writing):
        yield heard


# ---- the two together


def errors(found: Written, wanted: Written) -> dict[str, float]:
    """``tokens``: how many differ; ``logits t``: the largest error of a step, relative to its largest magnitude."""
    for got, expected, kind in ((found.tokens, wanted.tokens, "i"), (found.logits, wanted.logits, "f")):
        assert got.shape == expected.shape, (got.shape, expected.shape)
        assert got.dtype.kind == expected.dtype.kind == kind, (got.dtype, expected.dtype)
    assert found.logits.dtype == wanted.logits.dtype == np.float64, (found.logits.dtype, wanted.logits.dtype)
    assert np.isfinite(wanted.logits).all()
    off = np.abs(found.logits - wanted.logits).max((0, 2)) / np.abs(wanted.logits).max((0, 2))
    assert off.size > 0
    told = {f"logits {t}": float(error) if np.isfinite(error) else np.inf for t, error in enumerate(off)}
    return {"tokens": float((found.tokens != wanted.tokens).sum()), **told}


def examine(twin: Twin, directory: Path, task: Task, wanted: Written) -> dict[str, float]:
    """What ``twin``'s ``from_pretrained`` makes of ``directory``, writing, against what its model wrote."""
    return errors(ours(twin, twin.file("weights").from_pretrained(directory, dtype="float64"), task), wanted)
