"""A vocabulary: tokens and their ids, as a plain list that JSON can hold."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from twinformer.errors import InputError, Problems


class Vocabulary:
    """Token ``tokens[i]`` has the id i. Raises InputError where a token stands twice or is not text."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self.tokens = tuple(tokens)
        problems = Problems("Vocabulary", InputError)
        self._ids: dict[str, int] = {}
        for place, token in enumerate(self.tokens):
            is_text = isinstance(token, str) and token != "" and not any(c.isspace() for c in token)
            if problems.expect(is_text, f"token {place}: expected text without blanks, got {token!r}"):
                first = self._ids.setdefault(token, place)
                problems.expect(first == place, f"token {place}: expected another than token {first}, got {token!r}")
        problems.raise_if_any()

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, token: object) -> bool:
        return token in self._ids

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.tokens == other.tokens

    def __hash__(self) -> int:
        return hash(self.tokens)

    def id(self, token: str) -> int:
        """The id of a token. Raises InputError for one that is not there."""
        return int(self.encode([token])[0])

    def encode(self, tokens: Sequence[str]) -> npt.NDArray[np.int64]:
        """``[T]`` ids. Raises InputError naming every token that is not there and its place."""
        unknown = [(place, token) for place, token in enumerate(tokens) if token not in self._ids]
        if unknown:
            shown = [
                f"place {place}: expected a token of the vocabulary, got {token!r}" for place, token in unknown[:20]
            ]
            if len(unknown) > 20:
                shown.append(f"and {len(unknown) - 20} more")
            raise InputError("Vocabulary", shown)
        return np.array([self._ids[token] for token in tokens], np.int64)

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The tokens of ids. Raises InputError for an id out of range."""
        wanted = [int(i) for i in ids]
        wrong = [i for i in wanted if not 0 <= i < len(self.tokens)]
        if wrong:
            raise InputError("Vocabulary", [f"id: expected 0 to {len(self) - 1}, got {i}" for i in wrong[:20]])
        return [self.tokens[i] for i in wanted]

    def to_json(self) -> str:
        return json.dumps(list(self.tokens), ensure_ascii=False, indent=0) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Vocabulary:
        """From a JSON list of strings. Raises InputError for anything else."""
        try:
            tokens = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError("Vocabulary", [f"expected a JSON list of strings, got: {error}"]) from None
        if not isinstance(tokens, list):
            raise InputError("Vocabulary", [f"expected a JSON list of strings, got {type(tokens).__name__}"])
        return cls(tokens)
