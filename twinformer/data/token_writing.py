"""Writing token files: in one pass and in bounded memory, from ids or from text, whole or not at all.

A file is written under another name and takes its own when it is complete: a run that was stopped begins again, and
until then the file that was there before can be read.
"""

from __future__ import annotations

import array
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np

from twinformer.checkpoint import write_atomically
from twinformer.data.documents import Piece, TextFiles
from twinformer.data.encoding import Encoder
from twinformer.data.lines import LineProblems
from twinformer.data.tokens import (
    CHUNK,
    DTYPES,
    FORMAT,
    HEADER,
    OFFSET,
    VERSION,
    TokenFile,
    Vocabulary,
    check_ids,
    offsets_at,
)
from twinformer.errors import InputError, Problems

#: characters that are encoded at a time
_BATCH = 1 << 18


def write_text(file: str | Path, texts: TextFiles, encoder: Encoder) -> TokenFile:
    """Write the documents of text files as ids, without special tokens: the data sets add those.

    Raises one InputError for all problems of the text, by file and line (at once for as many as ``texts.limit``).
    """
    problems = LineProblems("write_text", limit=texts.limit)

    def pieces() -> Iterator[tuple[Sequence[int], bool]]:
        waiting: list[Piece] = []
        size = 0
        for piece in texts.read(problems):
            waiting.append(piece)
            size += len(piece.text) + 1
            if size >= _BATCH:
                yield from _encoded(waiting, encoder, problems)
                waiting, size = [], 0
        if waiting:
            yield from _encoded(waiting, encoder, problems)
        problems.raise_if_any()

    return write_pieces(file, pieces(), Vocabulary.of(encoder.tokenizer), left_out=texts.left_out)


def _encoded(pieces: list[Piece], encoder: Encoder, problems: LineProblems) -> Iterator[tuple[Sequence[int], bool]]:
    def note(index: int, line: int, what: str) -> None:
        problems.at(pieces[index].file, pieces[index].line + line, what)

    found = encoder.encode([piece.text for piece in pieces], note)
    for piece, ids in zip(pieces, found, strict=True):
        yield ids or [], piece.ends


def write_tokens(
    file: str | Path,
    documents: Iterable[Sequence[int]],
    vocabularies: Vocabulary | Sequence[Vocabulary],
    *,
    left_out: Mapping[str, int] | None = None,
) -> TokenFile:
    """Write the ids of documents, in bounded memory. With two vocabularies documents are source and target in turn.

    Raises InputError for no documents, no ids, ids that the vocabulary has not, and a place that cannot be written; a
    file that was there before is then still there.
    """
    return write_pieces(file, ((ids, True) for ids in documents), vocabularies, left_out=left_out)


def write_pieces(
    file: str | Path,
    pieces: Iterable[tuple[Sequence[int], bool]],
    vocabularies: Vocabulary | Sequence[Vocabulary],
    *,
    left_out: Mapping[str, int] | None = None,
) -> TokenFile:
    """``write_tokens`` for documents that come in pieces: ids, and whether the document ends with them.

    ``left_out`` is read when the last piece has come.
    """
    file = Path(file)
    both = (vocabularies,) if isinstance(vocabularies, Vocabulary) else tuple(vocabularies)

    def fill(part: Path) -> None:
        with part.open("r+b") as handle, tempfile.TemporaryFile(dir=file.parent) as spool:
            _fill(handle, spool, pieces, both, {} if left_out is None else left_out, str(file))

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, fill)
    except OSError as error:
        raise InputError(str(file), [f"expected a place that can be written, got: {error}"]) from error
    return TokenFile(file)


def _fill(
    handle: IO[bytes],
    spool: IO[bytes],
    pieces: Iterable[tuple[Sequence[int], bool]],
    vocabularies: tuple[Vocabulary, ...],
    left_out: Mapping[str, int],
    where: str,
) -> None:
    """Ids go into their place; offsets into ``spool``, and behind the ids at the end; the header last."""
    dtype = DTYPES["uint16" if max(vocabulary.size for vocabulary in vocabularies) <= 1 << 16 else "uint32"]
    digest = hashlib.sha256()
    problems = Problems(where, InputError)
    ids = array.array("q")
    bounds = array.array("q", [0])  # where documents begin, counted from the first id of `ids`
    tokens = documents = 0

    def flush() -> None:
        nonlocal tokens, documents
        values, ends = np.array(ids, np.int64), np.array(bounds, np.int64)
        check_ids(problems, values, ends, documents, vocabularies)
        problems.raise_if_any()
        data = values.astype(dtype).tobytes()
        digest.update(data)
        handle.write(data)
        spool.write((ends[1:] + tokens).astype(OFFSET).tobytes())
        tokens += len(values)
        documents += len(ends) - 1
        # of a document that is still open, the beginning is written: what comes next is the rest
        bounds[:] = array.array("q", [0])
        del ids[:]

    handle.seek(HEADER)
    spool.write(np.zeros(1, OFFSET).tobytes())
    open_ids = False
    for piece, ends in pieces:
        try:
            ids.extend(piece)
        except (TypeError, OverflowError) as error:
            raise InputError(where, [f"document {documents + len(bounds) - 1}: expected ids, got: {error}"]) from error
        open_ids = not ends
        if ends:
            bounds.append(len(ids))
        if len(ids) >= CHUNK or len(bounds) >= CHUNK:
            flush()
    flush()
    problems.expect(not open_ids, "documents: expected the last one to end, got an open one")
    problems.expect(documents > 0, "documents: expected at least one, got none")
    problems.expect(documents == 0 or tokens > 0, f"ids: expected at least one, got {documents} empty documents")
    problems.expect(
        documents % len(vocabularies) == 0, f"documents: expected source and target in turn, got {documents}"
    )
    problems.raise_if_any()
    handle.write(b"\0" * (offsets_at(tokens, dtype) - handle.tell()))
    spool.seek(0)
    while chunk := spool.read(CHUNK * OFFSET.itemsize):
        digest.update(chunk)
    spool.seek(0)
    shutil.copyfileobj(spool, handle)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": "uint16" if dtype.itemsize == 2 else "uint32",
        "tokens": tokens,
        "documents": documents,
        "vocabularies": [asdict(vocabulary) for vocabulary in vocabularies],
        "left_out": dict(left_out),
        "sha256": digest.hexdigest(),
    }
    text = json.dumps(header).encode()
    if len(text) >= HEADER:
        raise InputError(where, [f"left_out: expected a header of less than {HEADER} bytes, got {len(text)}"])
    handle.seek(0)
    handle.write(text.ljust(HEADER - 1) + b"\n")
