"""A token file: the ids of many documents on disk, mapped into memory, so that their number is limited by the disk.

One file, little-endian: 4096 bytes of JSON (blanks after it) that say what follows; the ids of all documents, uint16
or uint32, one after the other, filled up to a multiple of 8 bytes; ``documents + 1`` offsets, uint64: document i is
``ids[offsets[i] : offsets[i + 1]]``. A file of pairs holds source and target in turn, each with its vocabulary.

Written by ``token_writing``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twinformer.data.batch import Ids
from twinformer.data.lines import left_out_notes
from twinformer.data.order import is_whole
from twinformer.errors import InputError, Problems
from twinformer.tokenization import Tokenizer

FORMAT = "twinformer tokens"
VERSION = 1
HEADER = 4096
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
OFFSET: np.dtype[Any] = np.dtype("<u8")
#: ids or documents that are in memory at a time
CHUNK = 1 << 16
#: problems that one error tells
_LIMIT = 20


@dataclass(frozen=True)
class Vocabulary:
    """What the ids of a token file mean: V, and the fingerprint of the tokenizer (empty: not known)."""

    size: int
    tokenizer: str = ""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        return cls(tokenizer.vocab_size, tokenizer.fingerprint)


class TokenFile:
    """A token file, open for reading; nothing of it is in memory. ``left_out`` counts what the writer left out.

    Raises InputError for a file that is none, or whose size is not what it says. Whether its content is what was
    written, ``verify`` tells.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        problems = Problems(str(self.file), InputError)
        try:
            size = self.file.stat().st_size
            with self.file.open("rb") as handle:
                header = _read_header(handle.read(HEADER), problems)
        except OSError as error:
            raise InputError(str(self.file), [f"expected a token file, got: {error}"]) from error
        self.vocabularies = tuple(Vocabulary(**vocabulary) for vocabulary in header["vocabularies"])
        self.left_out: dict[str, int] = header["left_out"]
        self.num_tokens: int = header["tokens"]
        self.num_documents: int = header["documents"]
        self._sha256: str = header["sha256"]
        dtype = DTYPES[header["dtype"]]
        place = offsets_at(self.num_tokens, dtype)
        expected = place + (self.num_documents + 1) * OFFSET.itemsize
        problems.expect(size == expected, f"size: expected {expected} bytes for what the header tells, got {size}")
        problems.raise_if_any()
        self.ids = np.memmap(self.file, dtype, "r", offset=HEADER, shape=(self.num_tokens,))
        self.offsets = np.memmap(self.file, OFFSET, "r", offset=place, shape=(self.num_documents + 1,))
        first, last = int(self.offsets[0]), int(self.offsets[-1])
        problems.expect(
            (first, last) == (0, self.num_tokens),
            f"offsets: expected them to go from 0 to {self.num_tokens}, got {first} to {last}",
        )
        problems.raise_if_any()

    @property
    def vocab_size(self) -> int:
        """V, of the last vocabulary (the target's) where there are two."""
        return self.vocabularies[-1].size

    @property
    def notes(self) -> tuple[str, ...]:
        """What the writer left out, in words."""
        return left_out_notes(self.left_out)

    def document(self, index: int) -> Ids:
        """The ids of a document ``[n]``."""
        return self.slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def slice(self, first: int, end: int) -> Ids:
        """The ids from place ``first`` of the file to before ``end``, in memory: ``[end - first]``."""
        found: Ids = self.ids[first:end].astype(np.int64)
        return found

    def lengths(self) -> Ids:
        """The number of ids of each document. Raises InputError for offsets that are not in order."""
        lengths = np.diff(self.offsets.astype(np.int64))
        if (lengths < 0).any():
            raise InputError(str(self.file), ["offsets: expected them in order, got one below the one before it"])
        return lengths

    def expect(self, *tokenizers: Tokenizer) -> None:
        """Raise InputError unless the ids were made with these tokenizers."""
        theirs = [Vocabulary.of(tokenizer) for tokenizer in tokenizers]
        if theirs != list(self.vocabularies):
            raise InputError(
                str(self.file), [f"tokenizer: expected {list(self.vocabularies)}, which wrote the file, got {theirs}"]
            )

    def verify(self) -> None:
        """Read all of it: the checksum, and every id in its vocabulary. Raises InputError."""
        problems = Problems(str(self.file), InputError)
        digest = hashlib.sha256()
        for values in (self.ids, self.offsets):
            for first in range(0, len(values), CHUNK):
                digest.update(np.asarray(values[first : first + CHUNK]).tobytes())
        found = digest.hexdigest()
        problems.expect(found == self._sha256, f"sha256: expected {self._sha256}, got {found}")
        self.lengths()
        for first in range(0, self.num_documents, CHUNK):
            bounds = self.offsets[first : first + CHUNK + 1].astype(np.int64)
            ids = self.ids[bounds[0] : bounds[-1]].astype(np.int64)
            check_ids(problems, ids, bounds - bounds[0], first, self.vocabularies)
        problems.raise_if_any()


def offsets_at(tokens: int, dtype: np.dtype[Any]) -> int:
    """The first byte of the offsets: the next multiple of their size."""
    end = HEADER + tokens * dtype.itemsize
    return -(-end // OFFSET.itemsize) * OFFSET.itemsize


def check_ids(
    problems: Problems,
    ids: Ids,
    bounds: npt.NDArray[np.int64],
    first: int,
    vocabularies: tuple[Vocabulary, ...],
) -> None:
    """Ids of the documents from ``first`` on, which begin at ``bounds``: those that their vocabulary has not."""
    sizes = np.array([vocabulary.size for vocabulary in vocabularies])
    if len(ids) == 0 or (ids.min() >= 0 and ids.max() < sizes.min()):
        return
    documents = np.searchsorted(bounds, np.arange(len(ids)), side="right") - 1 + first
    own = sizes[documents % len(sizes)]
    for i in np.flatnonzero((ids < 0) | (ids >= own))[:_LIMIT]:
        problems.add(f"document {documents[i]}: expected ids from 0 to {own[i] - 1}, got {ids[i]}")


def _read_header(data: bytes, problems: Problems) -> dict[str, Any]:
    """The header, every field of the right kind. Raises what ``problems`` raises."""
    try:
        header: Any = json.loads(data.decode("utf-8")) if len(data) == HEADER else None
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        problems.add(f"expected a token file, got one that does not begin with its {HEADER} bytes of JSON")
        problems.raise_if_any()
    version = header.get("version")
    problems.expect(version == VERSION, f"version: expected {VERSION}, got {version!r}")
    problems.raise_if_any()
    dtype = header.get("dtype")
    problems.expect(dtype in tuple(DTYPES), f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    for name in ("tokens", "documents"):
        value = header.get(name)
        problems.expect(is_whole(value, 1), f"{name}: expected a whole number from 1, got {value!r}")
    problems.expect(isinstance(header.get("sha256"), str), f"sha256: expected text, got {header.get('sha256')!r}")
    left_out = header.get("left_out")
    problems.expect(
        isinstance(left_out, dict) and all(is_whole(count, 0) for count in left_out.values()),
        f"left_out: expected counts by name, got {left_out!r}",
    )
    found = header.get("vocabularies")
    problems.expect(
        isinstance(found, list)
        and len(found) in (1, 2)
        and all(isinstance(v, dict) and set(v) == {"size", "tokenizer"} for v in found)
        and all(is_whole(v["size"], 1) and isinstance(v["tokenizer"], str) for v in found),
        f"vocabularies: expected one or two, each with size and tokenizer, got {found!r}",
    )
    problems.raise_if_any()
    checked: dict[str, Any] = header
    return checked
