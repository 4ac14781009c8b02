"""Texts to ids, each of its own length, for data on disk: no special tokens added, nothing unseen let through."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Literal

from twinformer.errors import InputError, Problems
from twinformer.tokenization import Tokenizer

#: a symbol that the vocabulary lacks: the unknown token, or a problem
Unknown = Literal["token", "refuse"]

#: a special token that is spelled out in a text: a problem, or the special token
Special = Literal["refuse", "allow"]

#: told of a text that cannot be encoded: its index, the line in it, counted from 0, and what is wrong
Note = Callable[[int, int, str], None]

#: problems of one call that are told
_LIMIT = 20


class Encoder:
    """A tokenizer with its choices about what must not happen silently.

    ``unknown="refuse"`` names the symbol that the vocabulary lacks. ``special="refuse"``: text is text; where it spells
    a special token, ``</s>`` say, its letters are encoded, and it is a problem where the vocabulary cannot do that.
    """

    def __init__(self, tokenizer: Tokenizer, *, unknown: Unknown = "token", special: Special = "refuse") -> None:
        problems = Problems("Encoder", InputError)
        problems.expect(unknown in ("token", "refuse"), f"unknown: expected 'token' or 'refuse', got {unknown!r}")
        problems.expect(special in ("refuse", "allow"), f"special: expected 'refuse' or 'allow', got {special!r}")
        problems.raise_if_any()
        self.tokenizer = tokenizer
        self._unknown = unknown
        self._allow = special == "allow"
        unknown_token = getattr(tokenizer.library.model, "unk_token", None)
        self._unknown_id = tokenizer.roles.get("unknown", unknown_token and tokenizer.token_id(unknown_token))
        self._special_ids = tokenizer.special_ids - {self._unknown_id}

    def encode(self, texts: Sequence[str], note: Note | None = None) -> list[list[int] | None]:
        """The ids of each text. ``note`` is told of one that has none: its place holds None. Without it, InputError."""
        if note is not None:
            return self._all(texts, note)
        problems = Problems("Encoder.encode", InputError)

        def collect(index: int, line: int, what: str) -> None:
            if len(problems.found) < _LIMIT:
                problems.add(f"text {index}, line {line + 1}: {what}")

        found = self._all(texts, collect)
        problems.raise_if_any()
        return found

    def _all(self, texts: Sequence[str], note: Note) -> list[list[int] | None]:
        found: list[list[int] | None] = []
        for index, ids in enumerate(self._batch(list(texts))):
            wrong = (0, ids) if isinstance(ids, str) else self._wrong(texts[index], ids)
            if wrong is not None:
                note(index, *wrong)
            found.append(None if wrong is not None or isinstance(ids, str) else ids)
        return found

    def _batch(self, texts: list[str]) -> list[list[int] | str]:
        library = self.tokenizer.library
        before = library.encode_special_tokens
        library.encode_special_tokens = not self._allow
        try:
            return [encoding.ids for encoding in library.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as error:  # the library raises plain exceptions, for the batch as a whole
            if len(texts) == 1:
                return [f"expected text that can be encoded, got: {error}"]
        finally:
            library.encode_special_tokens = before
        return [ids for text in texts for ids in self._batch([text])]

    def _wrong(self, text: str, ids: list[int]) -> tuple[int, str] | None:
        """The line of the text, from 0, where something stands that may not, and what."""
        if self._unknown == "refuse" and self._unknown_id is not None and self._unknown_id in ids:
            return self._spelled(text, {self._unknown_id}, "expected a symbol of the vocabulary, got")
        if not self._allow and not self._special_ids.isdisjoint(ids):
            return self._spelled(text, self._special_ids, "expected text, got the special token")
        return None

    def _spelled(self, text: str, wanted: Set[int], what: str) -> tuple[int, str]:
        """How the text spells the first token of these ids, and where."""
        library = self.tokenizer.library
        before = library.encode_special_tokens
        library.encode_special_tokens = not self._allow
        try:
            encoding = library.encode(text, add_special_tokens=False)
        finally:
            library.encode_special_tokens = before
        first, last = next(span for i, span in zip(encoding.ids, encoding.offsets, strict=True) if i in wanted)
        start = text.rfind("\n", 0, first) + 1
        return text.count("\n", 0, first), f"{what} {text[first:last]!r} at place {first - start + 1}"
