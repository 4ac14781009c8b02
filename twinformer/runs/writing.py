"""What ``twinformer generate`` asks of a model: prompts as ids for it, and its ids as something to read or to hear.

What a model writes follows from what lies beside it: a vocabulary of note tokens (solo pieces), a tokenizer (text), or
neither, with the vocabulary of tablature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from twinformer.checkpoint import read_text
from twinformer.config import ModelConfig
from twinformer.data.guitar.arpeggio_data import ArpeggioTabs, vocabularies
from twinformer.data.guitar.formats import read_music, write_music
from twinformer.data.guitar.notes import Note, Piece, with_tab
from twinformer.data.guitar.tablature import tab_text
from twinformer.data.guitar.tokens import PIECE_END, PIECE_START, mend, tokens_of
from twinformer.data.guitar.vocabulary import Vocabulary
from twinformer.decoding import Generated, StopConfig
from twinformer.errors import CheckpointError, InputError, Problems
from twinformer.runs.guitar import VOCABULARY_FILE
from twinformer.tokenization import TOKENIZER_FILE, Tokenizer
from twinformer.tokenization import VOCABULARY_FILE as WORD_PIECES

Kind = Literal["text", "notes", "tab"]
Ids = npt.NDArray[np.int64]

#: duration of a note of a tab whose input says none: a quaver, in twelfths of a quarter note
_QUAVER = 6


@dataclass(frozen=True)
class Request:
    """Prompts as arrays for a ``Generator``: ``arguments`` are its own, by name; ``at_most`` new tokens make sense."""

    prompts: Ids
    arguments: Mapping[str, Any]
    at_most: int | None = None


@dataclass(frozen=True)
class Writer:
    """What a model writes. ``request`` makes prompts of texts, ``spell`` reads what was written for one of them."""

    kind: Kind
    request: Callable[[Sequence[str]], Request]
    spell: Callable[[str, Sequence[int]], str]
    piece: Callable[[str, Sequence[int]], Piece] | None = None


def writer_for(directory: Path, config: ModelConfig) -> Writer:
    """What the model in this directory writes. Raises CheckpointError where nothing says how its ids are spelled."""
    problems = Problems(str(directory), CheckpointError)
    if (directory / VOCABULARY_FILE).is_file():
        notes = Vocabulary.from_json(read_text(directory / VOCABULARY_FILE))
        have = len(notes)
        problems.expect(
            have == config.vocab_size, f"{VOCABULARY_FILE}: expected {config.vocab_size} tokens, got {have}"
        )
        problems.raise_if_any()
        return _notes(notes, config)
    if any((directory / name).is_file() for name in (TOKENIZER_FILE, WORD_PIECES)):
        tokenizer = Tokenizer.load(directory)
        have = tokenizer.vocab_size
        problems.expect(have <= config.vocab_size, f"tokenizer: expected {config.vocab_size} ids at most, got {have}")
        problems.raise_if_any()
        return _text(tokenizer, config)
    if {name: len(words) for name, words in vocabularies(config.architecture).items()} == _sizes(config):
        return _tab(ArpeggioTabs("test", config.architecture, size=1), config)
    raise CheckpointError(
        str(directory),
        [
            f"expected {TOKENIZER_FILE}, {WORD_PIECES} or {VOCABULARY_FILE} beside the model, or the vocabulary of "
            f"tablature, got none of them and {config.vocab_size} ids"
        ],
    )


def _sizes(config: ModelConfig) -> dict[str, int]:
    both = config.architecture == "encoder-decoder"
    return {"target": config.vocab_size} | ({"source": config.source_vocab_size} if both else {})


def _padded(rows: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[Ids, npt.NDArray[np.bool_]]:
    T = max(map(len, rows))
    tokens, real = np.full((len(rows), T), pad, np.int64), np.zeros((len(rows), T), np.bool_)
    for b, row in enumerate(rows):
        place = slice(T - len(row), T) if left else slice(0, len(row))
        tokens[b, place], real[b, place] = row, True
    return tokens, real


# ---- text


def _text(tokenizer: Tokenizer, config: ModelConfig) -> Writer:
    roles = tokenizer.roles
    stop = StopConfig(tokens=(roles["end"],) if "end" in roles else ())
    two = config.architecture == "encoder-decoder"

    def request(texts: Sequence[str]) -> Request:
        rows = []
        for text in texts:
            ids = [] if text == "" else tokenizer.encode([text], special_tokens=False).ids[0].tolist()
            rows.append(ids if two or "begin" not in roles else [roles["begin"], *ids])
        empty = [b for b, row in enumerate(rows) if not row]
        if empty:
            raise InputError("prompts", [f"prompt {b}: expected at least one token, got none" for b in empty])
        if not two:
            tokens, real = _padded(rows, tokenizer.pad_id, left=True)
            return Request(tokens, {"padding_mask": real, "stop": stop, "pad_id": tokenizer.pad_id})
        source, real = _padded(rows, tokenizer.pad_id, left=False)
        begin = np.full((len(rows), 1), roles.get("begin", tokenizer.pad_id), np.int64)
        options = {"source": source, "source_padding_mask": real, "stop": stop, "pad_id": tokenizer.pad_id}
        return Request(begin, options)

    def spell(prompt: str, ids: Sequence[int]) -> str:
        return tokenizer.decode([list(ids)])[0] if ids else ""

    return Writer("text", request, spell)


# ---- solo pieces as note tokens


def _notes(vocabulary: Vocabulary, config: ModelConfig) -> Writer:
    if config.architecture != "decoder":
        wanted = f"architecture: expected 'decoder' with a vocabulary of notes, got {config.architecture!r}"
        raise CheckpointError("generate", [wanted])
    stop = StopConfig(tokens=(vocabulary.id(PIECE_END),))

    def begun(prompt: str) -> list[str]:
        """Note tokens, or the music of a file without its end; nothing begins a piece."""
        if Path(prompt).suffix and Path(prompt).is_file():
            return [token for token in tokens_of(read_music(prompt)[0]) if token != PIECE_END]
        tokens = prompt.split()
        return tokens if tokens[:1] == [PIECE_START] else [PIECE_START, *tokens]

    def request(texts: Sequence[str]) -> Request:
        tokens, real = _padded([vocabulary.encode(begun(text)).tolist() for text in texts], 0, left=True)
        return Request(tokens, {"padding_mask": real, "stop": stop})

    def spell(prompt: str, ids: Sequence[int]) -> str:
        return " ".join(vocabulary.decode(ids))

    def piece(prompt: str, ids: Sequence[int]) -> Piece:
        return mend([*begun(prompt), *vocabulary.decode(ids)])[0]

    return Writer("notes", request, spell, piece)


# ---- tablature


def _tab(data: ArpeggioTabs, config: ModelConfig) -> Writer:
    if config.architecture == "encoder":
        raise CheckpointError(
            "generate", ["architecture: expected a model that writes, got 'encoder' (see twinformer evaluate)"]
        )

    def melody(prompt: str) -> Piece:
        """Pitches separated by blanks, or the notes of a music file, one after the other."""
        if Path(prompt).suffix and Path(prompt).is_file():
            return read_music(prompt)[0]
        problems = Problems(f"prompt {prompt!r}", InputError)
        pitches = []
        for place, word in enumerate(prompt.split()):
            if problems.expect(word.isdecimal(), f"place {place}: expected a MIDI pitch, got {word!r}"):
                pitches.append(int(word))
        problems.expect(bool(pitches) or bool(problems.found), "expected at least one pitch, got none")
        problems.raise_if_any()
        notes = tuple(Note(i * _QUAVER, pitch, _QUAVER) for i, pitch in enumerate(pitches))
        return Piece(notes)

    def pitches_of(prompt: str) -> list[int]:
        return [note.pitch for note in melody(prompt).notes]

    def request(texts: Sequence[str]) -> Request:
        melodies = [pitches_of(text) for text in texts]
        most = max(map(len, melodies))
        room = config.context_length if data.form == "encoder-decoder" else (config.context_length - 1) // 2
        problems = Problems("prompts", InputError)
        for b, one in enumerate(melodies):
            problems.expect(len(one) <= room, f"prompt {b}: expected at most {room} notes, got {len(one)}")
        problems.raise_if_any()
        sources = [data.source(one).tolist() for one in melodies]
        begin, end = cast(int, data.begin_id), cast(int, data.end_id)
        allowed = np.zeros((len(melodies), most, data.vocab_size), np.bool_)
        allowed[:, :, end] = True
        for b, one in enumerate(melodies):
            allowed[b, : len(one)] = data.allowed(one)
        arguments: dict[str, Any] = {"allowed": allowed, "stop": StopConfig(tokens=(end,)), "pad_id": data.pad_id}
        if data.form == "decoder":
            prompts, real = _padded([[*source, begin] for source in sources], data.pad_id, left=True)
            return Request(prompts, arguments | {"padding_mask": real}, most)
        source, real = _padded(sources, 0, left=False)
        prompts = np.full((len(sources), 1), begin, np.int64)
        return Request(prompts, arguments | {"source": source, "source_padding_mask": real}, most)

    def piece(prompt: str, ids: Sequence[int]) -> Piece:
        played = melody(prompt)
        pitches = [note.pitch for note in played.notes]
        return with_tab(played, data.positions(pitches, list(ids)[: len(pitches)]))

    def spell(prompt: str, ids: Sequence[int]) -> str:
        return tab_text(piece(prompt, ids))

    return Writer("tab", request, spell, piece)


# ---- two backends beside each other


@dataclass(frozen=True)
class Parting:
    """The first token in which two backends' texts differ, and how near each was to the other's choice.

    ``margins``: by backend, the log-probability that it gave to its own token minus that of the other's.
    """

    row: int
    place: int
    tokens: Mapping[str, int]
    margins: Mapping[str, float]


def partings(
    written: Mapping[str, Generated], logprobs: Callable[[str, int, Sequence[int]], npt.NDArray[np.floating[Any]]]
) -> Iterator[Parting]:
    """Where the two part, for each row in which they do.

    ``logprobs(backend, row, ids)`` gives the log-probabilities of all V tokens after these ids of the row.
    """
    (one, first), (other, second) = written.items()
    for row in range(len(first.tokens)):
        mine = first.tokens[row, : first.lengths[row]].tolist()
        yours = second.tokens[row, : second.lengths[row]].tolist()
        place = next((i for i, (a, b) in enumerate(zip(mine, yours, strict=False)) if a != b), None)
        if place is None:
            if len(mine) == len(yours):
                continue
            raise InputError(
                "generate", [f"row {row}: expected texts that end alike, got {len(mine)} and {len(yours)}"]
            )
        chosen = {one: mine[place], other: yours[place]}
        margins = {}
        for backend, rival in ((one, other), (other, one)):
            scores = logprobs(backend, row, mine[:place])
            margins[backend] = float(scores[chosen[backend]] - scores[chosen[rival]])
        yield Parting(row, place, chosen, margins)


def save_pieces(writer: Writer, prompts: Sequence[str], ids: Sequence[Sequence[int]], file: Path) -> list[Path]:
    """Write what was written as music or a picture: ``file``, or ``file`` with a number where there are several."""
    if writer.piece is None:
        raise InputError(str(file), ["expected a model that writes music for --out with this name, got one of text"])
    places = [file] if len(ids) == 1 else [file.with_stem(f"{file.stem}-{i + 1}") for i in range(len(ids))]
    for place, prompt, one in zip(places, prompts, ids, strict=True):
        write_music(writer.piece(prompt, one), place)
    return places


__all__ = ["Parting", "Request", "Writer", "partings", "save_pieces", "writer_for"]
