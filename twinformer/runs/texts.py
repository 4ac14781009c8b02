"""Texts, pairs and masked texts of a file: a tokenizer, ids on disk, a part kept aside, and the data sets.

What is made of the file once lies in the run's directory, and a run that goes on reads it there: the file itself may
have changed, or be gone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from twinformer.data.batch import Ids
from twinformer.data.documents import TextFiles
from twinformer.data.encoding import Encoder
from twinformer.data.masked import MaskedText
from twinformer.data.pair_files import PairTokens, write_pairs
from twinformer.data.pair_format import PairFormat
from twinformer.data.pairs import Pairs
from twinformer.data.text import PackedText
from twinformer.data.token_writing import write_text, write_tokens
from twinformer.data.tokens import TokenFile
from twinformer.data.vocabulary import train_tokenizer
from twinformer.errors import ConfigError, Problems
from twinformer.runs.data import RunData
from twinformer.runs.options import RunOptions
from twinformer.runs.sampling import continuations, translations
from twinformer.tokenization import TOKENIZER_FILE, VOCABULARY_FILE, Tokenizer

#: one document of so many is kept aside for validation
_ONE_OF = 20
_TOKENIZER = "tokenizer"


def text(options: RunOptions, file: Path, place: Path) -> RunData:
    """For a decoder: every token of every document is predicted."""
    B, T = options.batch_shape
    tokenizer = _tokenizer(options, place, lambda: _text_files(options, file).texts())
    train, valid = _ids("text", options, place, tokenizer, file)
    choices = text_choices(tokenizer, options.mode)
    sizes: dict[str, Any] = {"length": T, "batch_size": B, **choices}
    aside = PackedText(valid, **sizes, shuffle=False, name="validation")
    return RunData(
        PackedText(train, **sizes, seed=options.seed),
        aside,
        {"architecture": "decoder", "vocab_size": tokenizer.vocab_size, "context_length": T},
        notes=_notes(tokenizer, train, valid),
        beside=files_of(place / _TOKENIZER),
        show=continuations(aside, lambda ids: tokenizer.decode([ids])[0], choices["end_id"]),
    )


def masked(options: RunOptions, file: Path, place: Path) -> RunData:
    """For an encoder with a head: some tokens are hidden and predicted."""
    B, T = options.batch_shape
    tokenizer = _tokenizer(options, place, lambda: _text_files(options, file).texts())
    train, valid = _ids("text", options, place, tokenizer, file)
    sizes: dict[str, Any] = {
        "length": T,
        "batch_size": B,
        **masked_choices(tokenizer),
    }
    return RunData(
        MaskedText(train, **sizes, seed=options.seed),
        MaskedText(valid, **sizes, shuffle=False, name="validation"),
        {"architecture": "encoder", "vocab_size": tokenizer.vocab_size, "context_length": T},
        notes=_notes(tokenizer, train, valid),
        beside=files_of(place / _TOKENIZER),
    )


def pairs(options: RunOptions, file: Path, place: Path) -> RunData:
    """For an encoder-decoder, or source and target one behind the other for a decoder; one vocabulary for both."""
    B, T = options.batch_shape
    tokenizer = _tokenizer(options, place, lambda: _sides(file))
    train, valid = _ids("pairs", options, place, tokenizer, file)
    two = options.architecture == "encoder-decoder"
    choices = pair_choices(tokenizer, "encoder-decoder" if two else "decoder", T)
    sizes: dict[str, Any] = {"batch_size": B, **choices}
    model: dict[str, Any] = {
        "architecture": options.architecture,
        "vocab_size": tokenizer.vocab_size,
        "context_length": T if two else 2 * T + 2,
    }
    if two:
        model |= {"source_vocab_size": tokenizer.vocab_size, "share_embeddings": True}
    aside = Pairs(PairTokens(valid), **sizes, shuffle=False, name="validation")
    return RunData(
        Pairs(PairTokens(train), **sizes, seed=options.seed),
        aside,
        model,
        notes=_notes(tokenizer, train, valid),
        beside=files_of(place / _TOKENIZER),
        show=translations(aside, lambda ids: tokenizer.decode([ids])[0], choices["end_id"]) if two else None,
    )


# ---- the special tokens that each data set uses


def text_choices(tokenizer: Tokenizer, mode: str) -> dict[str, Any]:
    roles = _need(tokenizer, "end", *(("begin",) if mode == "documents" else ()))
    begin = roles["begin"] if mode == "documents" else None
    return {"mode": mode, "begin_id": begin, "end_id": roles["end"], "pad_id": tokenizer.pad_id}


def masked_choices(tokenizer: Tokenizer) -> dict[str, Any]:
    roles = _need(tokenizer, "mask", "begin", "end")
    return {
        "mask_id": roles["mask"],
        "begin_id": roles["begin"],
        "end_id": roles["end"],
        "pad_id": tokenizer.pad_id,
        "special_ids": sorted(tokenizer.special_ids),
    }


def pair_choices(tokenizer: Tokenizer, form: str, length: int) -> dict[str, Any]:
    needed = ("begin", "end") if form == "encoder-decoder" else ("begin", "end", "separator")
    roles = _need(tokenizer, *needed)
    return {
        "form": form,
        "max_source": length,
        "max_target": length,
        "begin_id": roles["begin"],
        "end_id": roles["end"],
        "separator_id": roles["separator"] if form == "decoder" else None,
        "source_end_id": roles["end"] if form == "encoder-decoder" else None,
        "source_pad_id": tokenizer.pad_id,
        "pad_id": tokenizer.pad_id,
        "long": "skip",
    }


def _need(tokenizer: Tokenizer, *names: str) -> dict[str, int]:
    roles = tokenizer.roles
    problems = Problems("tokenizer", ConfigError)
    for name in names:
        problems.expect(name in roles, f"expected a special token for {name!r}, got one without")
    problems.raise_if_any()
    return roles


# ---- the tokenizer


def _tokenizer(options: RunOptions, place: Path, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """That of the run, if it has one by now; one that is given; or one trained on the texts, and kept."""
    own = place / _TOKENIZER
    if has_tokenizer(own):
        return Tokenizer.load(own)
    given = options.tokenizer
    if given is None and options.start_from is not None and has_tokenizer(Path(options.start_from)):
        given = options.start_from
    if given is not None:
        tokenizer = Tokenizer.load(given)
    else:
        tokenizer = train_tokenizer(options.vocabulary, texts(), vocab_size=options.vocab_size)
    tokenizer.save(own)
    return Tokenizer.load(own)


def has_tokenizer(directory: Path) -> bool:
    return (directory / TOKENIZER_FILE).is_file() or (directory / VOCABULARY_FILE).is_file()


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file of a directory of a few small ones."""
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir()) if file.is_file()}


# ---- ids on disk


def _ids(kind: str, options: RunOptions, place: Path, tokenizer: Tokenizer, file: Path) -> tuple[TokenFile, TokenFile]:
    """Training and validation as ids, written once. The parts are renamed into place last of all, together."""
    train, valid = place / "train.tokens", place / "valid.tokens"
    if not (train.is_file() and valid.is_file()):
        if options.valid is not None:
            write(kind, options, valid, Path(options.valid), tokenizer)
            write(kind, options, train, file, tokenizer)
        else:
            whole = write(kind, options, place / "all.tokens", file, tokenizer)
            inside, aside = split(whole)
            vocabularies = whole.vocabularies
            write_tokens(valid, aside, vocabularies, left_out={})
            write_tokens(train, inside, vocabularies, left_out=whole.left_out)
            (place / "all.tokens").unlink()
    found = TokenFile(train), TokenFile(valid)
    for one in found:
        one.expect(*[tokenizer] * len(one.vocabularies))
    return found


def write(kind: str, options: RunOptions, to: Path, file: Path, tokenizer: Tokenizer) -> TokenFile:
    """The documents, or with kind ``pairs`` the pairs, of a file as ids."""
    encoder = Encoder(tokenizer)
    if kind == "pairs":
        return write_pairs(to, file, encoder, encoder, form=_pair_format(file))
    return write_text(to, _text_files(options, file), encoder)


def split(tokens: TokenFile) -> tuple[Iterator[list[int]], Iterator[list[int]]]:
    """Training and validation: one document (or pair) of twenty is kept aside, by a hash of what it says, so that
    equals come to the same side. Of fewer than forty documents the last twentieth of the tokens is, cut off.
    """
    width = len(tokens.vocabularies)
    groups = range(0, tokens.num_documents, width)
    is_aside = [_hash(tokens.document(first)) % _ONE_OF == 0 for first in groups]
    if len(groups) >= 2 * _ONE_OF and any(is_aside) and not all(is_aside):
        inside, aside = (
            [first + i for first, one in zip(groups, is_aside, strict=True) if one == wanted for i in range(width)]
            for wanted in (False, True)
        )
        return (tokens.document(i).tolist() for i in inside), (tokens.document(i).tolist() for i in aside)
    if width == 2:
        raise ConfigError("data", [f"expected a file for validation (valid) or more pairs, got {len(groups)} pairs"])
    end = tokens.num_tokens - max(2, tokens.num_tokens // _ONE_OF)
    documents = [(tokens.document(i).tolist(), int(tokens.offsets[i])) for i in range(tokens.num_documents)]
    before = [ids[: max(0, end - start)] for ids, start in documents]
    after = [ids[max(0, end - start) :] for ids, start in documents]
    return (ids for ids in before if ids), (ids for ids in after if ids)


def _hash(ids: Ids) -> int:
    return int.from_bytes(hashlib.sha256(np.asarray(ids, "<i8").tobytes()).digest()[:8], "little")


def _text_files(options: RunOptions, file: Path) -> TextFiles:
    return TextFiles([file], kind=options.documents or ("jsonl" if file.suffix == ".jsonl" else "lines"))


def _pair_format(file: Path) -> PairFormat:
    return PairFormat("jsonl" if file.suffix == ".jsonl" else "tsv")


def _sides(file: Path) -> Iterator[str]:
    """Both texts of every line that has two; what is wrong with others is told when the ids are written."""
    form = _pair_format(file)
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            found = form.texts(line.rstrip("\r\n"))
            if not isinstance(found, str):
                yield from found


def _notes(tokenizer: Tokenizer, train: TokenFile, valid: TokenFile) -> tuple[str, ...]:
    sizes = " and ".join(
        f"{part.num_tokens:,} tokens in {part.num_documents // len(part.vocabularies):,} "
        f"{'documents' if len(part.vocabularies) == 1 else 'pairs'} for {name}"
        for name, part in (("training", train), ("validation", valid))
    )
    return (f"vocabulary of {tokenizer.vocab_size}; {sizes}", *train.notes)
