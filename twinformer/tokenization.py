"""Text <-> token ids: a thin wrapper over the ``tokenizers`` library, which does all the work.

Read from a model directory: ``tokenizer.json``, or ``vocab.txt`` for BERT's WordPiece; both are plain text. Padding and
truncation that a file may carry are switched off: they are arguments here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from twinformer.checkpoint import read_text, write_atomically
from twinformer.errors import CheckpointError, InputError, Problems

TOKENIZER_FILE = "tokenizer.json"
VOCABULARY_FILE = "vocab.txt"
_SETTINGS_FILE = "tokenizer_config.json"
_SPECIAL_FILE = "special_tokens_map.json"

Side = Literal["left", "right"]

#: what a special token is for, and the names that settings give it, the first that is there
_ROLES = {
    "pad": ("pad_token",),
    "begin": ("bos_token", "cls_token"),
    "end": ("eos_token", "sep_token"),
    "unknown": ("unk_token",),
    "mask": ("mask_token",),
    "separator": ("sep_token",),
}

#: BERT's, where the settings of a vocab.txt name no others
_WORD_PIECE_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "cls_token": "[CLS]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
}


@dataclass(frozen=True)
class Encoded:
    """A batch of B texts, padded to T tokens. All arrays are ``[B, T]``.

    ``padding_mask`` is True at real tokens. ``token_types`` says of which text of a pair a token is (0 in padding).
    """

    ids: npt.NDArray[np.int64]
    padding_mask: npt.NDArray[np.bool_]
    token_types: npt.NDArray[np.int64]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Real tokens in each row: ``[B]``."""
        counts: npt.NDArray[np.int64] = self.padding_mask.sum(axis=1, dtype=np.int64)
        return counts


class Tokenizer:
    """The tokenizer of a model directory.

    ``pad_id`` is the id that padding is filled with: that of the padding token where the directory names one, else 0
    (padding is masked: which id stands there changes nothing). ``names`` are the special tokens as settings name them
    (``"bos_token"``: ``"<s>"``); those that the vocabulary lacks count as not named.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, *, pad_id: int = 0, names: Mapping[str, str] | None = None
    ) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.pad_id = pad_id
        known = {name for candidates in _ROLES.values() for name in candidates}
        self._names = {name: token for name, token in (names or {}).items() if name in known}

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """The tokenizer in ``tokenizer.json``, else in ``vocab.txt``.

        Raises CheckpointError where neither is there, or one does not read.
        """
        directory = Path(directory)
        settings = _json_object(directory / _SPECIAL_FILE) | _json_object(directory / _SETTINGS_FILE)
        if (directory / TOKENIZER_FILE).is_file():
            tokenizer = _from_json(directory / TOKENIZER_FILE)
        elif (directory / VOCABULARY_FILE).is_file():
            tokenizer = _from_vocabulary(directory / VOCABULARY_FILE, settings)
        else:
            raise CheckpointError(
                str(directory), [f"expected {TOKENIZER_FILE} or {VOCABULARY_FILE}, got nothing by these names"]
            )
        padding: dict[str, Any] = tokenizer.padding or {}
        pad_token = _content(settings.get("pad_token", padding.get("pad_token")))
        pad_id = None if pad_token is None else tokenizer.token_to_id(pad_token)
        usual = {} if (directory / TOKENIZER_FILE).is_file() else _WORD_PIECE_TOKENS
        named = {name: token for name in settings if (token := _content(settings[name])) is not None}
        return cls(tokenizer, pad_id=padding.get("pad_id", 0) if pad_id is None else pad_id, names={**usual, **named})

    def save(self, directory: str | Path) -> None:
        """Write ``tokenizer.json`` and the names of its special tokens into a directory, which is made if need be.

        Raises CheckpointError where the place cannot be written.
        """
        directory = Path(directory)
        special = json.dumps(self._names, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for name, text in ((TOKENIZER_FILE, self._tokenizer.to_str(pretty=True)), (_SPECIAL_FILE, special)):
                write_atomically(directory / name, lambda part, text=text: part.write_text(text, encoding="utf-8"))  # type: ignore[misc]
        except OSError as error:
            raise CheckpointError(str(directory), [f"expected a place that can be written, got: {error}"]) from error

    @property
    def library(self) -> tokenizers.Tokenizer:
        """The library's own object."""
        return self._tokenizer

    @property
    def roles(self) -> dict[str, int]:
        """The ids of the special tokens that are named, by what they are for: ``pad``, ``begin``, ``end``,
        ``unknown``, ``mask``, ``separator``. BERT's ``[CLS]`` begins and ``[SEP]`` ends where no others are named."""
        found = {}
        for role, candidates in _ROLES.items():
            ids = (self.token_id(self._names[name]) for name in candidates if name in self._names)
            id_ = next((i for i in ids if i is not None), None)
            if id_ is not None:
                found[role] = id_
        return found

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of all special tokens, named or not."""
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(int(i) for i, token in added.items() if token.special) | frozenset(self.roles.values())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that the ids depend on; of scores six decimals, since more are not read back exactly."""
        content = json.loads(self._tokenizer.to_str())
        if content["model"]["type"] == "Unigram":
            content["model"]["vocab"] = [[piece, round(score, 6)] for piece, score in content["model"]["vocab"]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """The number of ids, added tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it, or None."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def tokens(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> list[str]:
        """The tokens with these ids ``[T]``, as the vocabulary spells them. Raises InputError for ids that it lacks."""
        whole = self._ids(ids)
        return [str(self._tokenizer.id_to_token(i)) for i in whole]

    def encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        side: Side = "right",
        length: int | None = None,
        max_length: int | None = None,
        special_tokens: bool = True,
    ) -> Encoded:
        """Texts (or pairs of texts) as ids, padded on ``side`` to the longest, or to ``length``.

        ``max_length`` cuts longer texts, special tokens kept (the longer text of a pair first); without it nothing is
        cut. Raises InputError for no texts, pairs of another number, a text longer than ``length``, and where
        nothing at all is left to encode.
        """
        problems = Problems("Tokenizer.encode", InputError)
        problems.expect(
            not isinstance(texts, str) and len(texts) > 0, f"texts: expected a list of texts, got {texts!r}"
        )
        problems.expect(side in ("left", "right"), f"side: expected 'left' or 'right', got {side!r}")
        problems.expect(
            pairs is None or len(pairs) == len(texts),
            f"pairs: expected {len(texts)} texts, got {0 if pairs is None else len(pairs)}",
        )
        for name, value in (("length", length), ("max_length", max_length)):
            problems.expect(value is None or value >= 1, f"{name}: expected at least 1, got {value}")
        problems.raise_if_any()
        encodings = self._encode(
            texts if pairs is None else list(zip(texts, pairs, strict=True)), max_length, special_tokens
        )
        longest = max(len(encoding.ids) for encoding in encodings)
        T = longest if length is None else length
        problems.expect(longest <= T, f"texts: expected at most length={length} tokens, got {longest}")
        problems.expect(longest > 0, "texts: expected at least one token, got none")
        problems.expect(
            max_length is None or longest <= max_length,
            f"max_length: expected room for the special tokens, got {max_length}",
        )
        problems.raise_if_any()
        ids = np.full((len(encodings), T), self.pad_id, np.int64)
        token_types = np.zeros_like(ids)
        real = np.zeros(ids.shape, np.bool_)
        for row, encoding in enumerate(encodings):
            count = len(encoding.ids)
            place = slice(T - count, T) if side == "left" else slice(0, count)
            ids[row, place] = encoding.ids
            token_types[row, place] = encoding.type_ids
            real[row, place] = True
        return Encoded(ids=ids, padding_mask=real, token_types=token_types)

    def decode(
        self,
        ids: npt.NDArray[np.integer[Any]] | Sequence[Sequence[int]],
        padding_mask: npt.NDArray[np.bool_] | None = None,
        *,
        special_tokens: bool = False,
    ) -> list[str]:
        """Texts of a batch of ids ``[B, T]`` (rows may differ in length), padding and special tokens left out.

        ``padding_mask [B, T]``: True at real tokens. Raises InputError for ids that the vocabulary lacks.
        """
        rows = [self._ids(row) for row in ids]
        if padding_mask is not None:
            shape, wanted = np.shape(padding_mask), (len(rows), *{len(row) for row in rows})
            if shape != wanted:
                raise InputError("Tokenizer.decode", [f"padding_mask: expected the shape of ids {wanted}, got {shape}"])
            rows = [
                [i for i, real in zip(row, keep, strict=True) if real]
                for row, keep in zip(rows, padding_mask, strict=True)
            ]
        return [str(text) for text in self._tokenizer.decode_batch(rows, skip_special_tokens=not special_tokens)]

    def _encode(self, texts: Sequence[Any], max_length: int | None, special_tokens: bool) -> list[tokenizers.Encoding]:
        try:
            if max_length is not None:
                self._tokenizer.enable_truncation(max_length)
            found: list[tokenizers.Encoding] = self._tokenizer.encode_batch(
                list(texts), add_special_tokens=special_tokens
            )
            return found
        except Exception as error:  # the library raises plain exceptions, TypeErrors and panics' messages
            raise InputError("Tokenizer.encode", [f"expected texts that can be encoded, got: {error}"]) from error
        finally:
            self._tokenizer.no_truncation()

    def _ids(self, row: Any) -> list[int]:
        array = np.asarray(row)
        if array.size == 0:
            return []
        problems = Problems("Tokenizer", InputError)
        good = problems.expect(
            array.ndim == 1 and array.dtype.kind in "iu",
            f"ids: expected whole numbers [T], got {array.dtype} {array.shape}",
        )
        if good:
            lowest, highest = int(array.min()), int(array.max())
            known = lowest >= 0 and all(self._tokenizer.id_to_token(int(i)) is not None for i in np.unique(array))
            problems.expect(
                known, f"ids: expected ids of the vocabulary ({self.vocab_size}), got values from {lowest} to {highest}"
            )
        problems.raise_if_any()
        return [int(i) for i in array]


def _from_json(file: Path) -> tokenizers.Tokenizer:
    text = read_text(file)
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(str(file), [f"expected a tokenizer, got a file that does not read: {error}"]) from error


def _from_vocabulary(file: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """BERT's WordPiece: a line a token, its number the id (Devlin et al. 2019, section 3)."""
    lines = read_text(file).split("\n")
    lines = [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    problems = Problems(str(file), CheckpointError)
    vocabulary: dict[str, int] = {}
    for number, token in enumerate(lines):
        first = vocabulary.setdefault(token, number)
        problems.expect(
            first == number, f"line {number + 1}: expected a token of its own, got {token!r} of line {first + 1}"
        )
    special = {name: _content(settings.get(name)) or usual for name, usual in _WORD_PIECE_TOKENS.items()}
    for name in ("unk_token", "sep_token", "cls_token"):
        problems.expect(
            special[name] in vocabulary,
            f"{name}: expected {special[name]!r} in the vocabulary of {len(lines)}, got none",
        )
    switches = {"do_lower_case": True, "tokenize_chinese_chars": True, "strip_accents": None}
    values = {name: settings.get(name, usual) for name, usual in switches.items()}
    for name, value in values.items():
        problems.expect(
            value is None or isinstance(value, bool), f"{name}: expected true, false or null, got {value!r}"
        )
    basic = settings.get("do_basic_tokenize", True)
    problems.expect(basic is True, f"do_basic_tokenize: expected true, got {basic!r}")
    problems.raise_if_any()
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=special["unk_token"]))
    tokenizer.add_special_tokens([token for token in special.values() if token in vocabulary])
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(values["tokenize_chinese_chars"]),
        strip_accents=values["strip_accents"],
        lowercase=bool(values["do_lower_case"]),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    sep, cls = ((special[name], vocabulary[special[name]]) for name in ("sep_token", "cls_token"))
    tokenizer.post_processor = processors.BertProcessing(sep, cls)
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _content(token: Any) -> str | None:
    """A special token as settings give it: a string, or an object with its ``content``."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _json_object(file: Path) -> dict[str, Any]:
    """A JSON object, or nothing where there is no such file."""
    if not file.is_file():
        return {}
    try:
        values = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:  # JSONDecodeError, and whole numbers of too many digits
        raise CheckpointError(str(file), [f"expected JSON, got text that does not parse: {error}"]) from None
    if not isinstance(values, dict):
        raise CheckpointError(str(file), [f"expected a JSON object, got {type(values).__name__}"])
    return values
