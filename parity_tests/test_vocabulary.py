"""Vocabularies: trained, saved and read back; special tokens by name; what a vocabulary lacks is said."""

import json

import pytest
import tokenizers

from twinformer.data.documents import TextFiles
from twinformer.data.encoding import Encoder
from twinformer.data.vocabulary import SpecialTokens, train_tokenizer
from twinformer.errors import CheckpointError, InputError
from twinformer.tokenization import Tokenizer

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "a cat, a dog; an ox", "é ü 東"] * 5
SIZES = {"bpe": 280, "wordpiece": 70, "unigram": 60, "words": 40, "characters": 40}
ROLES = {"pad": 0, "begin": 1, "end": 2, "unknown": 3, "mask": 4, "separator": 5}


@pytest.fixture(scope="module")
def trained():
    return {kind: train_tokenizer(kind, TEXTS, vocab_size=size) for kind, size in SIZES.items()}


@pytest.mark.parametrize("kind", SIZES)
def test_a_vocabulary_is_the_same_after_saving(kind, trained, tmp_path):
    tokenizer = trained[kind]
    tokenizer.save(tmp_path / "new" / "model")
    read = Tokenizer.load(tmp_path / "new" / "model")
    assert read.roles == tokenizer.roles == ROLES
    assert read.special_ids == frozenset(range(6))
    assert read.pad_id == tokenizer.pad_id == 0
    assert read.fingerprint == tokenizer.fingerprint
    assert read.library.to_str() == tokenizer.library.to_str()
    assert 6 < read.vocab_size == tokenizer.vocab_size <= SIZES[kind]
    assert Encoder(read).encode(TEXTS) == Encoder(tokenizer).encode(TEXTS)
    assert json.loads((tmp_path / "new" / "model" / "tokenizer.json").read_text())["model"]
    # the way back: these texts hold single blanks and no letter that is unknown
    ids = Encoder(read, unknown="refuse").encode(TEXTS)
    assert read.decode(ids) == (
        TEXTS if kind != "wordpiece" else [text.replace(" ,", ",") for text in read.decode(ids)]
    )


@pytest.mark.parametrize("kind", ["bpe", "words", "characters"])
def test_training_again_gives_the_same(kind, trained):
    """Not so the others, which the library trains in an order of chance."""
    again = train_tokenizer(kind, iter(TEXTS), vocab_size=SIZES[kind])
    assert again.fingerprint == trained[kind].fingerprint


def test_what_a_kind_takes_for_a_token(trained):
    def tokens(kind, text):
        return trained[kind].tokens(Encoder(trained[kind]).encode([text])[0])

    assert tokens("words", "the cat, a") == ["the", "cat,", "a"]
    assert tokens("characters", "a é\n") == ["a", " ", "é", "<unk>"]
    assert tokens("wordpiece", "the cat,") == ["the", "cat", ","]
    assert all(token.startswith("##") for token in tokens("wordpiece", "thecat")[1:])
    assert tokens("unigram", "the cat")[0].startswith("▁")
    assert "".join(tokens("bpe", "zé")) == "zÃ©", "bytes that no text had"


def test_frequencies_sizes_and_case():
    texts = ["a a a b b c", "A"]
    words = train_tokenizer("words", texts, vocab_size=8)
    assert [words.token_id(token) for token in "abcA"] == [6, 7, None, None]
    words = train_tokenizer("words", texts, vocab_size=20, min_frequency=2)
    assert [words.token_id(token) for token in "abcA"] == [6, 7, None, None]
    words = train_tokenizer("words", texts, vocab_size=20, lowercase=True)
    assert Encoder(words, unknown="refuse").encode(["A B"]) == [[6, 7]]
    named = SpecialTokens(pad="[PAD]", begin="[CLS]", separator="[SEP]", end="[END]", unknown="?", mask="[MASK]")
    words = train_tokenizer("words", texts, vocab_size=20, special=named)
    assert [words.token_id(token) for token in ("[PAD]", "[CLS]", "[END]", "?", "[MASK]", "[SEP]")] == list(range(6))


def test_unknown_symbols_are_tokens_or_problems(trained):
    words = trained["words"]
    assert Encoder(words).encode(["the emu", "ox"]) == [[words.token_id("the"), 3], [words.token_id("ox")]]
    with pytest.raises(InputError) as caught:
        Encoder(words, unknown="refuse").encode(["the cat sat", "the\ncat emu sat gnu", "yak"])
    assert caught.value.problems == (
        "text 1, line 2: expected a symbol of the vocabulary, got 'emu' at place 5",
        "text 2, line 1: expected a symbol of the vocabulary, got 'yak' at place 1",
    )
    told = []
    found = Encoder(words, unknown="refuse").encode(["yak", "ox"], lambda *what: told.append(what))
    assert found == [None, [words.token_id("ox")]]
    assert told == [(0, 0, "expected a symbol of the vocabulary, got 'yak' at place 1")]


def test_a_vocabulary_without_an_unknown_token_says_which_text(trained):
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    encoder = Encoder(Tokenizer(plain))
    assert encoder.encode(["a a"]) == [[0, 0]]
    with pytest.raises(InputError, match="1 problem\n  - text 1, line 1: expected text that can be encoded"):
        encoder.encode(["a", "b", "a a"])


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("text", ["the </s> cat", "</s>"])
def test_special_tokens_spelled_in_a_text_are_not_let_through(kind, text, trained):
    """As text where letters can spell it; otherwise a problem. Never the end of a document in its middle."""
    tokenizer = trained[kind]
    told = []
    (ids,) = Encoder(tokenizer).encode([text], lambda *what: told.append(what))
    assert tokenizer.library.encode_special_tokens is False, "as it was"
    if kind in ("words", "unigram"):
        assert ids is None
        assert told == [(0, 0, f"expected text, got the special token '</s>' at place {text.index('<') + 1}")]
    else:
        assert not told
        assert set(ids) & {0, 1, 2, 4, 5} == set()
    (ids,) = Encoder(tokenizer, special="allow").encode([text])
    assert ids.count(ROLES["end"]) == 1


def test_texts_of_files_train(tmp_path):
    (tmp_path / "a.txt").write_text("b c\n\nc\n")
    texts = TextFiles([tmp_path / "a.txt"])
    assert train_tokenizer("words", texts.texts(), vocab_size=9).vocab_size == 8
    assert texts.left_out == {"empty documents": 1}
    (tmp_path / "a.txt").write_bytes(b"b c\n\xff\n")
    with pytest.raises(InputError, match=r"a\.txt: line 2: expected UTF-8, got byte 0xff"):
        train_tokenizer("words", texts.texts(), vocab_size=9)


REFUSED = {
    "a kind of no name": (lambda: train_tokenizer("bytes", TEXTS, vocab_size=300), "kind: expected one of bpe, wordp"),
    "no room": (lambda: train_tokenizer("words", TEXTS, vocab_size=6), "vocab_size: expected a whole number from 7"),
    "no room for bytes": (lambda: train_tokenizer("bpe", TEXTS, vocab_size=100), "expected at least 262"),
    "no texts": (lambda: train_tokenizer("bpe", [], vocab_size=300), "expected a text that holds something, got none"),
    "blank texts": (lambda: train_tokenizer("characters", [" ", ""], vocab_size=30), "a text that holds something"),
    "one text": (lambda: train_tokenizer("words", "a b", vocab_size=30), "texts: expected texts, got one"),
    "nothing often": (
        lambda: train_tokenizer("words", ["a b"], vocab_size=30, min_frequency=2),
        "expected tokens that occur 2 times, got none",
    ),
    "never": (lambda: train_tokenizer("words", TEXTS, vocab_size=30, min_frequency=0), "min_frequency: expected at"),
    "no text": (lambda: train_tokenizer("words", [3], vocab_size=30), "expected"),
    "an empty token": (lambda: SpecialTokens(pad=""), "pad: expected a token, got ''"),
    "a token twice": (lambda: SpecialTokens(pad="<s>"), "pad: expected a token of its own, got '<s>', as begin"),
    "unknown to chance": (
        lambda: Encoder(train_tokenizer("words", TEXTS, vocab_size=30), unknown="skip"),
        "unknown: expected 'token' or 'refuse', got 'skip'",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_refused(what):
    call, message = REFUSED[what]
    with pytest.raises(InputError, match=message):
        call()


def test_a_place_that_cannot_be_written_is_said(trained, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="expected a place that can be written"):
        trained["words"].save(tmp_path / "file" / "model")
