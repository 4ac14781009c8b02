"""The guitar data of a run: tablature that is built in, and pieces of a file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from twinformer.checkpoint import write_atomically
from twinformer.data.guitar.arpeggio import Arpeggio
from twinformer.data.guitar.arpeggio_data import ArpeggioTabs, Form, suggested_config
from twinformer.data.guitar.fretboard import NAMES, STRINGS
from twinformer.data.guitar.pieces import GuitarPieces, load_pieces
from twinformer.data.guitar.pieces import suggested_config as suggested_decoder
from twinformer.decoding import StopConfig
from twinformer.errors import ConfigError
from twinformer.runs import backends
from twinformer.runs.data import RunData
from twinformer.runs.options import RunOptions
from twinformer.runs.sampling import continuations

Tokens = tuple[str, ...]

#: beside a model of pieces: its note tokens in the order of their ids
VOCABULARY_FILE = "vocabulary.json"

#: sizes that follow from others, so that a change of these changes them too
_DERIVED = ("key_dim", "value_dim", "hidden_dim", "num_kv_heads", "rotary_dim", "num_encoder_layers")
_SIZES = ("architecture", "vocab_size", "source_vocab_size", "context_length")
#: notes that a sample shows
_SHOWN = 24


def tablature(options: RunOptions) -> RunData:
    """Arpeggios with the string of each note, in the form of the architecture."""
    form = cast(Form, options.architecture)
    assert options.batch_size is not None
    variety = options.variety or 0.0
    train = ArpeggioTabs("train", form, batch_size=options.batch_size, seed=options.seed, variety=variety)
    valid = ArpeggioTabs("valid", form, batch_size=options.batch_size)
    proposed = suggested_config(form).to_dict()
    return RunData(
        train,
        valid,
        {name: proposed[name] for name in _SIZES},
        usual={name: value for name, value in proposed.items() if name not in (*_SIZES, *_DERIVED)},
        notes=(f"{len(train.sequences):,} sequences for training, {len(valid.sequences)} for validation",),
        show=lambda backend, model, count: _tabs(valid, backend, model, count),
    )


def pieces(options: RunOptions, file: Path, place: Path) -> RunData:
    """Pieces as note tokens, one a line; in training transposed at random, and varied if asked."""
    B, T = options.batch_shape
    train, valid = own_pieces(options, file, place)
    aside = GuitarPieces(valid, context_length=T, batch_size=B, training=False, stride=T)
    inside = GuitarPieces(
        train,
        context_length=T,
        batch_size=B,
        seed=options.seed,
        variety=options.variety or 0.0,
        exchange=options.exchange,
        exchange_epochs=options.exchange_epochs,
    )
    proposed = suggested_decoder(T).to_dict()
    vocabulary = inside.vocabulary
    return RunData(
        inside,
        aside,
        {name: proposed[name] for name in ("architecture", "vocab_size", "context_length")},
        usual={name: value for name, value in proposed.items() if name not in (*_SIZES, *_DERIVED)},
        notes=tuple(f"{part.part.size} pieces for {part.part.name}: {part.part.notes[0]}" for part in (inside, aside)),
        beside={VOCABULARY_FILE: vocabulary.to_json().encode()},
        show=continuations(aside, lambda ids: " ".join(vocabulary.decode(ids)), inside.end_id),
    )


def own_pieces(options: RunOptions, file: Path, place: Path) -> tuple[list[Tokens], list[Tokens]]:
    """Training and validation, kept in the run. Without a file for it, one piece of ten is kept aside, by a hash."""
    train, valid = place / "train.txt", place / "valid.txt"
    if not (train.is_file() and valid.is_file()):
        inside, aside = load_pieces(file), None if options.valid is None else load_pieces(options.valid)
        if aside is None:
            aside = [tokens for tokens in inside if _is_aside(tokens)]
            inside = [tokens for tokens in inside if not _is_aside(tokens)]
            if not inside or not aside:
                raise ConfigError("data", ["expected a file for validation (valid), or more pieces to keep some aside"])
        for part, found in ((valid, aside), (train, inside)):
            text = "".join(" ".join(tokens) + "\n" for tokens in found)
            write_atomically(part, lambda one, text=text: one.write_text(text, encoding="utf-8"))  # type: ignore[misc]
    return load_pieces(train), load_pieces(valid)


def _is_aside(tokens: Tokens) -> bool:
    return hashlib.sha256(" ".join(tokens).encode()).digest()[0] % 10 == 0


def predict(data: ArpeggioTabs, chosen: Sequence[Arpeggio], backend: str, model: Any) -> list[list[tuple[int, int]]]:
    """(string, fret) of every note as the model plays it: an encoder at once, others token by token, greedily.

    Only positions that sound the pitch are allowed, as in training.
    """
    if data.form == "encoder":
        return _said_at_once(data, chosen, backend, model)
    generator = backends.make_generator(backend, model, bucket=8)
    found: list[list[tuple[int, int]]] = []
    for start in range(0, len(chosen), data.batch_size):
        some = chosen[start : start + data.batch_size]
        found += _written(data, some, generator)
    return found


def _said_at_once(
    data: ArpeggioTabs, chosen: Sequence[Arpeggio], backend: str, model: Any
) -> list[list[tuple[int, int]]]:
    call = backends.caller(backend, model)
    found = []
    for start in range(0, len(chosen), data.batch_size):
        some = chosen[start : start + data.batch_size]
        batch = data.batch_of(some)
        assert batch.allowed is not None
        logits = np.where(batch.allowed, call(**batch.inputs), -np.inf)
        for sequence, row in zip(some, logits.argmax(-1), strict=False):
            found.append(data.positions(sequence.pitches, row[: len(sequence.pitches)].tolist()))
    return found


def _written(data: ArpeggioTabs, some: Sequence[Arpeggio], generator: Any) -> list[list[tuple[int, int]]]:
    """A batch of them. After its last note a row may only say that it has ended."""
    B, most = len(some), max(len(sequence.pitches) for sequence in some)
    sources = [data.source(sequence.pitches) for sequence in some]
    begun = [np.array([data.begin_id])] * B
    prompts = [np.concatenate(pair) for pair in zip(sources, begun, strict=True)] if data.form == "decoder" else begun
    allowed = np.zeros((B, most, data.vocab_size), np.bool_)
    allowed[:, :, data.end_id] = True
    for b, sequence in enumerate(some):
        allowed[b, : len(sequence.pitches)] = data.allowed(sequence.pitches)
    tokens, mask = _padded(prompts, data.pad_id)
    arguments: dict[str, Any] = {"padding_mask": mask}
    if data.source_vocabulary is not None:
        source, source_mask = _padded(sources, 0)
        arguments |= {"source": source, "source_padding_mask": source_mask}
    written = generator(
        tokens, max_new_tokens=most, allowed=allowed, stop=StopConfig(tokens=(cast(int, data.end_id),)), **arguments
    )
    return [
        data.positions(sequence.pitches, row[: len(sequence.pitches)].tolist())
        for sequence, row in zip(some, written.tokens, strict=True)
    ]


def _padded(rows: Sequence[Any], pad: int) -> tuple[Any, Any]:
    longest = max(len(row) for row in rows)
    tokens = np.full((len(rows), longest), pad, np.int64)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
    return tokens, np.arange(longest) < np.array([len(row) for row in rows])[:, None]


def _tabs(data: ArpeggioTabs, backend: str, model: Any, count: int) -> list[str]:
    """Samples as tablature: the six strings, the highest first; ``!`` beside a note that was played elsewhere."""
    lines: list[str] = []
    chosen = data.sequences[:count]
    for sequence, found in zip(chosen, predict(data, chosen, backend, model), strict=True):
        lines.append("")
        lines += draw_tab(found[:_SHOWN], sequence.strings[:_SHOWN])
    return lines


def draw_tab(found: Sequence[tuple[int, int]], right: Sequence[int]) -> list[str]:
    """Six lines, the highest string first. A note on another string than the right one is marked."""
    cells = [
        (string, f"{fret}{'' if string == wanted else '!'}")
        for (string, fret), wanted in zip(found, right, strict=True)
    ]
    lines = []
    for string in reversed(range(STRINGS)):
        row = "-".join((text if on == string else "").ljust(len(text), "-") for on, text in cells)
        lines.append(f"  {NAMES[string]}|{row}|")
    return lines
