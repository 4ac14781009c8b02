"""Vocabularies: tokenizers trained on texts by the ``tokenizers`` library, with special tokens that have names.

What is trained adds no special tokens to a text of itself: the data sets put begin, end and separator in their places.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from twinformer.data.choices import check_option
from twinformer.data.order import is_whole
from twinformer.errors import InputError, Problems
from twinformer.tokenization import Tokenizer

#: byte-level BPE (Radford et al. 2019), WordPiece as BERT splits text, Unigram (Kudo 2018), symbols between blanks,
#: characters
VocabularyKind = Literal["bpe", "wordpiece", "unigram", "words", "characters"]


@dataclass(frozen=True)
class SpecialTokens:
    """Special tokens by what they are for. They have the ids 0 … 5, in this order."""

    pad: str = "<pad>"
    begin: str = "<s>"
    end: str = "</s>"
    unknown: str = "<unk>"
    mask: str = "<mask>"
    separator: str = "<sep>"

    def __post_init__(self) -> None:
        problems = Problems("SpecialTokens", InputError)
        tokens = asdict(self)
        for role, token in tokens.items():
            problems.expect(isinstance(token, str) and token.strip() != "", f"{role}: expected a token, got {token!r}")
            others = [other for other in tokens if tokens[other] == token and other != role]
            problems.expect(not others, f"{role}: expected a token of its own, got {token!r}, as {', '.join(others)}")
        problems.raise_if_any()

    @property
    def tokens(self) -> list[str]:
        return list(asdict(self).values())

    @property
    def names(self) -> dict[str, str]:
        """The tokens as the settings of a tokenizer name them."""
        return {
            "pad_token": self.pad,
            "bos_token": self.begin,
            "eos_token": self.end,
            "unk_token": self.unknown,
            "mask_token": self.mask,
            "sep_token": self.separator,
        }


def train_tokenizer(
    kind: VocabularyKind,
    texts: Iterable[str],
    *,
    vocab_size: int,
    special: SpecialTokens | None = None,
    min_frequency: int = 1,
    lowercase: bool = False,
) -> Tokenizer:
    """A tokenizer of at most ``vocab_size`` tokens, special ones included, trained on texts.

    ``min_frequency``: how often a token (a pair, for ``bpe`` and ``wordpiece``) must occur; Unigram has none.
    ``wordpiece`` cleans text as BERT does. Of ``words`` and ``characters`` the most frequent are kept; of those that
    have no place the count cannot be known here: ``Encoder(unknown="refuse")`` tells. The same texts give the same
    tokenizer, except with ``wordpiece`` and ``unigram``, which the library trains in an order of chance: keep the file.
    Raises InputError for texts without a token, and for a ``vocab_size`` that has no room for bytes or letters.
    """
    special = SpecialTokens() if special is None else special
    problems = Problems("train_tokenizer", InputError)
    check_option(problems, "kind", VocabularyKind, kind)
    count = len(special.tokens)
    problems.expect(
        is_whole(vocab_size, count + 1), f"vocab_size: expected a whole number from {count + 1}, got {vocab_size!r}"
    )
    problems.expect(is_whole(min_frequency, 1), f"min_frequency: expected at least 1, got {min_frequency!r}")
    problems.expect(not isinstance(texts, str), "texts: expected texts, got one")
    problems.raise_if_any()
    tokenizer, trainer = _parts(kind, special, vocab_size, min_frequency)
    if lowercase:
        lower = normalizers.Lowercase()
        first = tokenizer.normalizer
        tokenizer.normalizer = lower if first is None else normalizers.Sequence([first, lower])
    seen = False

    def counted() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen = seen or text.strip() != ""
            yield text

    try:
        tokenizer.train_from_iterator(counted(), trainer)
    except InputError:
        raise
    except Exception as error:  # the library raises plain exceptions
        raise InputError("train_tokenizer", [f"expected texts to train on, got: {error}"]) from error
    found = tokenizer.get_vocab_size(with_added_tokens=True)
    problems.expect(seen, "texts: expected a text that holds something, got none")
    problems.expect(
        found <= vocab_size, f"vocab_size: expected at least {found} (special tokens and letters), got {vocab_size}"
    )
    problems.expect(not seen or found > count, f"texts: expected tokens that occur {min_frequency} times, got none")
    problems.raise_if_any()
    if kind == "unigram":
        tokenizer = _rounded(tokenizer)
    return Tokenizer(tokenizer, pad_id=special.tokens.index(special.pad), names=special.names)


def _parts(
    kind: VocabularyKind, special: SpecialTokens, vocab_size: int, min_frequency: int
) -> tuple[tokenizers.Tokenizer, Any]:
    """The library's tokenizer, untrained, and its trainer."""
    common: dict[str, Any] = {"vocab_size": vocab_size, "special_tokens": special.tokens, "show_progress": False}
    frequent: dict[str, Any] = {**common, "min_frequency": min_frequency}
    match kind:
        case "bpe":
            tokenizer = tokenizers.Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            # all 256 bytes are tokens, so that no text is unknown
            alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
            return tokenizer, trainers.BpeTrainer(initial_alphabet=alphabet, **frequent)
        case "wordpiece":
            tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token=special.unknown))
            tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
            tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            tokenizer.decoder = decoders.WordPiece()
            return tokenizer, trainers.WordPieceTrainer(**frequent)
        case "unigram":
            tokenizer = tokenizers.Tokenizer(models.Unigram())
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
            tokenizer.decoder = decoders.Metaspace()
            return tokenizer, trainers.UnigramTrainer(unk_token=special.unknown, **common)
        case "words":
            tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token=special.unknown))
            tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        case "characters":
            tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token=special.unknown))
            tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
            tokenizer.decoder = decoders.Fuse()
    return tokenizer, trainers.WordLevelTrainer(**frequent)


def _rounded(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A Unigram tokenizer with scores of six decimals, which the library reads back exactly, unlike longer ones."""
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"] = [[piece, round(score, 6)] for piece, score in content["model"]["vocab"]]
    return tokenizers.Tokenizer.from_str(json.dumps(content))
