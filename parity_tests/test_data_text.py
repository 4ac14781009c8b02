"""Text for a decoder: what is read from files, what is kept on disk, and rows in which nothing is lost or twice."""

import hashlib
import itertools
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinformer.data import token_writing
from twinformer.data.documents import TextFiles
from twinformer.data.encoding import Encoder
from twinformer.data.packing import pack
from twinformer.data.text import PackedText
from twinformer.data.token_writing import write_pieces, write_text, write_tokens
from twinformer.data.tokens import TokenFile, Vocabulary
from twinformer.data.vocabulary import train_tokenizer
from twinformer.errors import InputError
from twinformer.presets import preset

BEGIN, END, PAD, FIRST = 1, 2, 0, 3


def unlike(lengths):
    """Documents of these lengths in which no token comes twice."""
    ends = np.cumsum([0, *lengths]) + FIRST
    return [list(range(ends[i], ends[i + 1])) for i in range(len(lengths))]


def token_file(place, documents, size=100_000):
    return write_tokens(place / "x.tokens", documents, Vocabulary(size))


def epoch_of(data, epoch=0):
    return [data.batch(epoch * data.steps_per_epoch + step) for step in range(data.steps_per_epoch)]


lengths_of_documents = st.lists(st.integers(0, 25), min_size=1, max_size=12).filter(any)


# ---- rows packed from documents


@given(lengths_of_documents, st.integers(1, 12), st.integers(1, 4), st.booleans(), st.booleans())
def test_each_token_is_a_target_once_and_never_across_documents(tmp_path_factory, lengths, T, B, begins, ends):
    documents = unlike(lengths)
    options = {"begin_id": BEGIN if begins else None, "end_id": END if ends else None}
    file = token_file(tmp_path_factory.mktemp("x"), documents)
    if max(lengths) + begins + ends < 2:
        with pytest.raises(InputError, match="expected a document with a target, got none"):
            PackedText(file, length=T, batch_size=B, short="skip", **options)
        return
    data = PackedText(file, length=T, batch_size=B, short="skip", seed=3, **options)
    # what each token of a document must be followed by; begin and end are told apart by their document
    expected = []
    for number, ids in enumerate(documents):
        whole = [(number, BEGIN)] * begins + [(number, i) for i in ids] + [(number, END)] * ends
        expected += itertools.pairwise(whole)
    owner = {i: number for number, ids in enumerate(documents) for i in ids}
    for epoch in (0, 1):
        found = []
        for batch in epoch_of(data, epoch):
            segments, tokens = batch.inputs["segments"], batch.inputs["tokens"]
            assert tokens.shape == (B, T)
            assert np.array_equal(batch.real, segments > 0)
            assert (tokens[~batch.real] == PAD).all()
            for b in range(B):
                for segment in range(1, segments[b].max(initial=0) + 1):
                    places = np.flatnonzero(segments[b] == segment)
                    assert places.tolist() == list(range(places[0], places[-1] + 1)), "a document is one run"
                    pairs = list(zip(tokens[b, places].tolist(), batch.targets[b, places].tolist(), strict=True))
                    owners = {owner[i] for pair in pairs for i in pair if i >= FIRST}
                    if not owners:  # begin and end alone: an empty document
                        assert pairs == [(BEGIN, END)]
                        owners = {next(n for n, ids in enumerate(documents) if not ids)}
                    (number,) = owners
                    found += [((number, one), (number, other)) for one, other in pairs]
        if begins and ends:  # empty documents are alike
            empty = {n for n, ids in enumerate(documents) if not ids}
            assert sum(pair[0][0] in empty for pair in found) == len(empty)
            found = [pair for pair in found if pair[0][0] not in empty]
            expected = [pair for pair in expected if pair[0][0] not in empty]
        assert sorted(found) == sorted(expected)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any), st.integers(3, 12), st.integers(0, 2))
def test_rows_are_packed_without_loss(units, width, overhead):
    units = np.array(units)
    packing = pack(units, width, overhead=overhead)
    sizes = np.add.reduceat(packing.counts + overhead, packing.rows[:-1])
    assert sizes.max() <= width
    places = sorted(
        (int(d), int(u))
        for d, b, c in zip(packing.documents, packing.begins, packing.counts, strict=True)
        for u in range(b, b + c)
    )
    assert places == [(d, u) for d, n in enumerate(units) for u in range(n)]
    # two rows that would fit into one are never left apart
    assert len(sizes) < 2 or np.sort(sizes)[:2].sum() > width
    alone = pack(units, width, overhead=overhead, share=False)
    assert alone.num_rows == len(alone.counts) == len(packing.counts)


def test_packing_fills_rows():
    """Best fit in decreasing order is within 11/9 of the best (Johnson 1973); these lengths it fills almost wholly."""
    # the 3 belongs beside the 7: beside the 6, where it fits as well, it would leave no room for both 2
    assert pack(np.array([7, 6, 3, 2, 2]), 10).num_rows == 2
    units = np.minimum(np.random.default_rng(0).geometric(1 / 100, 20_000), 1000)
    packing = pack(units, 256)
    assert packing.num_rows <= 1.001 * np.ceil(units.sum() / 256)


def test_a_packed_row_gives_what_its_documents_give_alone(tmp_path):
    """The model sees no neighbour, and counts positions from 0 in each document."""
    import torch

    from torch_impl import LanguageModel

    config = preset("gpt2").replace(vocab_size=40, context_length=12, num_layers=2, initializer_std=0.3)
    model = LanguageModel(config.replace(param_dtype="float64", compute_dtype="float64"), seed=1)
    data = PackedText(
        token_file(tmp_path, unlike([3, 5, 2, 7]), 40), length=12, batch_size=3, begin_id=BEGIN, end_id=END
    )
    batch = data.batch(0)
    tokens, segments = batch.inputs["tokens"], batch.inputs["segments"]
    assert segments.max() >= 2
    logits = model(torch.from_numpy(tokens), segments=torch.from_numpy(segments)).detach().numpy()
    for b in range(3):
        for segment in range(1, segments[b].max() + 1):
            places = segments[b] == segment
            alone = model(torch.from_numpy(tokens[b : b + 1, places])).detach().numpy()[0]
            assert np.abs(logits[b, places] - alone).max() < 1e-12 * np.abs(alone).max()


# ---- one stream


@given(lengths_of_documents, st.integers(1, 12), st.integers(1, 4))
def test_the_stream_is_cut_and_nothing_else(tmp_path_factory, lengths, T, B):
    documents = unlike(lengths)
    file = token_file(tmp_path_factory.mktemp("x"), documents)
    data = PackedText(file, length=T, batch_size=B, mode="stream", end_id=END, shuffle=False)
    stream = [END] + [i for ids in documents for i in [*ids, END]]
    batches = epoch_of(data)
    assert all(set(batch.inputs) == {"tokens"} for batch in batches)
    tokens = np.concatenate([batch.inputs["tokens"] for batch in batches])
    targets = np.concatenate([batch.targets for batch in batches])
    real = np.concatenate([batch.real for batch in batches])
    assert tokens[real].tolist() == stream[:-1]
    assert targets[real].tolist() == stream[1:]
    assert real.ravel().tolist() == [True] * (len(stream) - 1) + [False] * (real.size - len(stream) + 1)
    # in another order: the same rows
    shuffled = PackedText(file, length=T, batch_size=B, mode="stream", end_id=END, seed=5)
    for epoch in (0, 1):
        rows = np.concatenate([batch.targets[batch.real] for batch in epoch_of(shuffled, epoch)])
        assert sorted(rows.tolist()) == sorted(stream[1:])


# ---- order


@pytest.mark.parametrize("mode", ["documents", "stream"])
def test_a_batch_is_the_same_whatever_came_before(mode, tmp_path):
    file = token_file(tmp_path, unlike([3, 9, 1, 4, 30, 2, 2, 8]))
    options = {"length": 6, "batch_size": 2, "mode": mode, "end_id": END, "seed": 4}
    data = PackedText(file, **options)
    steps = list(range(3 * data.steps_per_epoch))
    sequential = [data.batch(step) for step in steps]
    for step in reversed(steps):
        alone = PackedText(TokenFile(file.file), **options).batch(step)
        assert same(alone, sequential[step])
    epochs = [epoch_of(data, epoch) for epoch in (0, 1)]
    assert not all(same(one, other) for one, other in zip(*epochs, strict=True))
    assert not all(
        same(one, data.batch(i)) for i, one in enumerate(epoch_of(PackedText(file, **options | {"seed": 5})))
    )


def same(one, other):
    return (
        set(one.inputs) == set(other.inputs)
        and all(np.array_equal(one.inputs[name], other.inputs[name]) for name in one.inputs)
        and np.array_equal(one.targets, other.targets)
        and np.array_equal(one.real, other.real)
    )


ELSEWHERE = """
import hashlib, sys
from pathlib import Path
from parity_tests.test_data_text import digest_of_everything
print(digest_of_everything(Path(sys.argv[1])))
"""


def digest_of_everything(place):
    """A text file, its vocabulary, its token file, and the batches of all data sets, in one number."""
    from twinformer.data.masked import MaskedText
    from twinformer.data.pair_files import PairLines
    from twinformer.data.pairs import Pairs

    digest = hashlib.sha256()
    (place / "x.txt").write_text("".join(f"{'a b c'[: n % 7]} w{n % 11} w{n % 5}\n" for n in range(60)))
    (place / "x.tsv").write_text("".join(f"w{n % 5} {'a ' * (n % 9)}\tw{n % 7}{' b' * (n % 4)}\n" for n in range(60)))
    tokenizer = train_tokenizer("words", TextFiles([place / "x.txt", place / "x.tsv"]).texts(), vocab_size=40)
    file = write_text(place / "x.tokens", TextFiles([place / "x.txt"]), Encoder(tokenizer))
    digest.update(file.file.read_bytes())
    pairs = PairLines(place / "x.tsv", Encoder(tokenizer), Encoder(tokenizer))
    datasets = [
        PackedText(file, length=16, batch_size=4, begin_id=BEGIN, end_id=END, seed=9),
        MaskedText(file, length=16, batch_size=4, mask_id=4, special_ids=range(6), seed=9),
        Pairs(pairs, max_source=20, max_target=20, batch_tokens=64, begin_id=BEGIN, end_id=END, seed=9),
    ]
    for data in datasets:
        for step in range(2 * data.steps_per_epoch):
            batch = data.batch(step)
            for array in (*batch.inputs.values(), batch.targets, batch.real):
                digest.update(repr(array.shape).encode() + array.tobytes())
    return digest.hexdigest()


def test_another_process_sees_the_same(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "there")],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONHASHSEED": "77", "RAYON_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == digest_of_everything(tmp_path / "here")


# ---- what is too long, too short, or not there


def test_long_documents_are_cut_or_left_out_or_refused(tmp_path):
    file = token_file(tmp_path, unlike([3, 9, 4, 30]))
    options = {"length": 4, "batch_size": 2, "begin_id": BEGIN}
    cut = PackedText(file, **options)
    assert cut.part.notes == ("2 of 4 documents longer than 4 tokens cut",)
    assert sum(batch.count for batch in epoch_of(cut)) == 46
    left = PackedText(file, long="skip", **options)
    assert left.part.notes == ("2 of 4 documents longer than 4 tokens left out",)
    assert sum(batch.count for batch in epoch_of(left)) == 7
    with pytest.raises(InputError) as caught:
        PackedText(file, long="refuse", **options)
    assert caught.value.problems == (
        "long: expected 'cut' or 'skip' for 2 of 4 documents longer than 4 tokens (the longest 30; the first, counted "
        "from 0: 1, 3)",
    )


def test_documents_of_one_token(tmp_path):
    file = token_file(tmp_path, unlike([1, 4, 1, 0]))
    with pytest.raises(InputError, match=r"short: expected a begin_id or an end_id, or 'skip', for 3 of 4 documents"):
        PackedText(file, length=4, batch_size=1)
    data = PackedText(file, length=4, batch_size=1, short="skip")
    assert data.part.notes == ("3 of 4 documents of one token or none, in which nothing comes next, left out",)
    assert sum(batch.count for batch in epoch_of(data)) == 3
    assert (
        sum(batch.count for batch in epoch_of(PackedText(file, length=4, batch_size=1, end_id=END, short="skip"))) == 6
    )


REFUSED = {
    "no length": ({"length": 0}, "length: expected a whole number from 1, got 0"),
    "no batch": ({"batch_size": 0}, "batch_size: expected a whole number from 1, got 0"),
    "a mode of no name": ({"mode": "rows"}, "mode: expected one of documents, stream, got 'rows'"),
    "an end beyond": ({"end_id": 50}, "end_id: expected an id from 0 to 49, got 50"),
    "no end of the stream": ({"mode": "stream"}, "end_id: expected an id in mode 'stream', got None"),
    "a begin in the stream": (
        {"mode": "stream", "end_id": 2, "begin_id": 1},
        "begin_id: expected None in mode 'stream'",
    ),
    "a seed below 0": ({"seed": -1}, "seed: expected a whole number from 0, got -1"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_refused(what, tmp_path):
    options, message = REFUSED[what]
    file = token_file(tmp_path, unlike([3, 4]), 50)
    with pytest.raises(InputError, match=message):
        PackedText(file, **{"length": 4, "batch_size": 2, **options})
    with pytest.raises(InputError, match="step: expected a whole number from 0, got -1"):
        PackedText(file, length=4, batch_size=2).batch(-1)


# ---- token files


@given(st.lists(st.lists(st.integers(0, 69_999), max_size=9), min_size=1, max_size=9).filter(any), st.booleans())
def test_what_is_written_is_read(tmp_path_factory, documents, small):
    size = 65_536 if small else 70_000
    documents = [[i % size for i in ids] for ids in documents]
    file = token_file(tmp_path_factory.mktemp("x"), documents, size)
    file.verify()
    assert file.ids.dtype == (np.uint16 if small else np.uint32)
    assert (file.num_documents, file.num_tokens) == (len(documents), sum(map(len, documents)))
    assert [file.document(i).tolist() for i in range(len(documents))] == documents
    assert file.lengths().tolist() == [len(ids) for ids in documents]


def test_pieces_are_joined_wherever_the_buffer_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(token_writing, "CHUNK", 4)
    pieces = [([1, 2, 3], False), ([4, 5], False), ([], False), ([6], True), ([7] * 9, True), ([], True), ([8], True)]
    file = write_pieces(tmp_path / "x", pieces, Vocabulary(20))
    file.verify()
    assert [file.document(i).tolist() for i in range(4)] == [[1, 2, 3, 4, 5, 6], [7] * 9, [], [8]]
    with pytest.raises(InputError, match="document 2: expected ids from 0 to 19, got 20"):
        write_pieces(tmp_path / "x", [*pieces[:5], ([8, 9, 9, 9, 20], True)], Vocabulary(20))
    with pytest.raises(InputError, match="documents: expected the last one to end"):
        write_pieces(tmp_path / "x", [([1], True), ([1], False)], Vocabulary(20))


@pytest.mark.parametrize("documents", [[], [[]], [[1, 20]], [[-1]], [[1], ["a"]], [[0.5]], [[2**70]]])
def test_a_file_that_cannot_be_written_leaves_the_old_one(documents, tmp_path):
    old = token_file(tmp_path, [[1, 2]]).file.read_bytes()
    with pytest.raises(InputError, match="expected"):
        token_file(tmp_path, documents, 20)
    assert (tmp_path / "x.tokens").read_bytes() == old
    assert os.listdir(tmp_path) == ["x.tokens"]


def test_a_run_that_was_stopped_leaves_nothing(tmp_path):
    def stops():
        yield [1, 2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        token_file(tmp_path, stops())
    assert os.listdir(tmp_path) == []


def damage(data, what):
    if what == "cut":
        return data[:-1]
    if what == "longer":
        return data + b"\0"
    if what == "no header":
        return data[:100]
    if what == "not JSON":
        return b"\x80" + data[1:]
    if what == "another format":
        return data.replace(b"twinformer tokens", b"tokens twinformer")
    if what == "a later version":
        return data.replace(b'"version": 1', b'"version": 2')
    if what == "another dtype":
        return data.replace(b'"uint16"', b'"object"')
    if what == "more tokens":
        return data.replace(b'"tokens": 5', b'"tokens": 9')
    if what == "a count that is none":
        return data.replace(b'"tokens": 5', b'"tokens":-5')
    if what == "no vocabulary":
        return data.replace(b'"size": 20', b'"size": 00').replace(b'"size": 00', b'"size":  0')
    return data[:-8] + b"\x04" + data[-7:]  # the last offset


DAMAGES = {
    "cut": "size: expected",
    "longer": "size: expected",
    "no header": "expected a token file",
    "not JSON": "expected a token file",
    "another format": "expected a token file",
    "a later version": "version: expected 1, got 2",
    "another dtype": "dtype: expected one of uint16, uint32, got 'object'",
    "more tokens": "size: expected",
    "a count that is none": "tokens: expected a whole number from 1, got -5",
    "no vocabulary": "vocabularies: expected one or two",
    "an end elsewhere": "offsets: expected them to go from 0 to 5, got 0 to 4",
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_file_is_refused(what, tmp_path):
    file = token_file(tmp_path, [[1, 2, 3], [4, 5]], 20).file
    file.write_bytes(damage(file.read_bytes(), what))
    with pytest.raises(InputError, match=DAMAGES[what]):
        TokenFile(file)


def test_what_the_size_does_not_show_verify_finds(tmp_path):
    file = token_file(tmp_path, [[1, 2, 3], [4, 5]], 20).file
    data = file.read_bytes()
    file.write_bytes(data[:4096] + b"\x63\x00" + data[4098:])
    with pytest.raises(InputError, match=r"(?s)sha256: expected .*document 0: expected ids from 0 to 19, got 99"):
        TokenFile(file).verify()
    offsets = np.array([0, 9, 5], "<u8").tobytes()
    file.write_bytes(data[: -len(offsets)] + offsets)
    with pytest.raises(InputError, match="offsets: expected them in order"):
        PackedText(TokenFile(file), length=4, batch_size=1)
    with pytest.raises(InputError, match="expected a token file, got: "):
        TokenFile(tmp_path / "none")


# ---- from text


@pytest.fixture(scope="module")
def characters():
    return train_tokenizer("characters", ["abcdefghij klmnopqrstuvwxyz\n"], vocab_size=40)


def written(place, data, encoder, **options):
    (place / "x.txt").write_bytes(data)
    file = write_text(place / "x.tokens", TextFiles([place / "x.txt"], **options), encoder)
    file.verify()
    file.expect(encoder.tokenizer)
    return file, encoder.tokenizer.decode([file.document(i) for i in range(file.num_documents)])


def test_what_a_document_is(characters, tmp_path):
    encoder = Encoder(characters, unknown="refuse")
    data = b"\xef\xbb\xbfab c\r\nd\n\n  \n e\nf"
    assert written(tmp_path, data, encoder)[1] == ["ab c", "d", " e", "f"]
    assert written(tmp_path, data, encoder, kind="paragraphs")[1] == ["ab c\nd", " e\nf"]
    file, texts = written(tmp_path, data, encoder, kind="file")
    assert texts == ["ab c\nd\n\n  \n e\nf"]
    assert (file.left_out, file.vocab_size) == ({}, characters.vocab_size)
    assert written(tmp_path, b'{"text": "a\\nb"}\n{"n": 1, "text": "c"}\n', encoder, kind="jsonl")[1] == ["a\nb", "c"]
    assert written(tmp_path, b'{"t": "a"}', encoder, kind="jsonl", field="t")[1] == ["a"]


def test_empty_documents_are_left_out_kept_or_refused(characters, tmp_path):
    encoder = Encoder(characters)
    data = b"a\n\n  \nb\n"
    file, texts = written(tmp_path, data, encoder)
    assert (texts, file.left_out, file.notes) == (["a", "b"], {"empty documents": 2}, ("2 empty documents left out",))
    assert written(tmp_path, data, encoder, empty="keep")[1] == ["a", "", "  ", "b"]
    with pytest.raises(InputError) as caught:
        written(tmp_path, data, encoder, empty="refuse")
    assert [problem.split(".txt: ")[1] for problem in caught.value.problems] == [
        "line 2: expected a document, got an empty one",
        "line 3: expected a document, got an empty one",
    ]
    for kind in ("lines", "paragraphs", "file", "jsonl"):
        with pytest.raises(InputError, match="documents: expected at least one, got none"):
            written(tmp_path, b"\n \n", encoder, kind=kind)


def test_all_problems_of_a_text_are_told_by_line(characters, tmp_path):
    encoder = Encoder(characters, unknown="refuse")
    with pytest.raises(InputError) as caught:
        written(tmp_path, b"a\nb\xffc\nd!e\nf\n\xc3\n", encoder)
    assert sorted(problem.split(".txt: ")[1] for problem in caught.value.problems) == [
        "line 2: expected UTF-8, got byte 0xff at place 2",
        "line 3: expected a symbol of the vocabulary, got '!' at place 2",
        "line 5: expected UTF-8, got byte 0xc3 at place 1",
    ]
    with pytest.raises(InputError, match=r"line 4: expected a symbol of the vocabulary, got '!' at place 3"):
        written(tmp_path, b"\na\nb\ncd!\n", encoder, kind="file")
    with pytest.raises(InputError) as caught:
        written(tmp_path, b"\xff\n" * 50, encoder, limit=3)
    assert len(caught.value.problems) == 4
    assert caught.value.problems[3] == "there may be more: reading ended at 3 problems"
    with pytest.raises(InputError, match="expected a file that can be read"):
        write_text(tmp_path / "y", TextFiles([tmp_path / "none"]), encoder)
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "expected a JSON object, got list"),
        ("{", "expected a JSON object, got text that does not parse"),
        ("[" * 100_000, "expected a JSON object, got text that does not parse"),
        ('{"a": 1}', "expected the field 'text', got 'a'"),
        ("{}", "expected the field 'text', got none"),
        ('{"text": 1}', "field 'text': expected text, got int"),
        (r'{"text": "\ud800"}', "field 'text': expected text, got half a surrogate pair"),
    ],
)
def test_malformed_json_lines_are_told(line, message, characters, tmp_path):
    with pytest.raises(InputError, match=f"line 2: {message}".replace("[", r"\[")):
        written(tmp_path, f'{{"text": "a"}}\n{line}\n'.encode(), Encoder(characters), kind="jsonl")


def test_a_line_without_end_is_refused(characters, tmp_path, monkeypatch):
    monkeypatch.setattr("twinformer.data.lines._LONGEST", 10)
    assert written(tmp_path, b"abcdefghi\nab\n", Encoder(characters))[1] == ["abcdefghi", "ab"]
    with pytest.raises(InputError, match="line 2: expected at most 10 bytes, got more"):
        written(tmp_path, b"ab\nabcdefghijk\n", Encoder(characters))


@pytest.mark.parametrize("kind", ["lines", "file"])
def test_memory_stays_bounded(kind, tmp_path, monkeypatch):
    """With small buffers, a file of 800 kB takes no more memory than one of 200 kB, and half of what it has."""
    for name, value in (("token_writing._BATCH", 4096), ("token_writing.CHUNK", 4096), ("documents._PIECE", 4096)):
        monkeypatch.setattr(f"twinformer.data.{name}", value)
    encoder = Encoder(train_tokenizer("words", ["long words"], vocab_size=20))
    peaks = []
    for lines in (2000, 8000):
        (tmp_path / "x.txt").write_text(("long" * 11 + " words " + "long " * 9 + "\n") * lines)
        tracemalloc.start()
        file = write_text(tmp_path / "x.tokens", TextFiles([tmp_path / "x.txt"], kind=kind), encoder)
        PackedText(file, length=64, batch_size=4, mode="stream", end_id=END).batch(0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert file.num_tokens >= 11 * lines
    assert peaks[1] < 1.2 * peaks[0]
    assert peaks[1] < 400_000


def test_a_file_of_other_tokenizers_is_refused(characters, tmp_path):
    file, _ = written(tmp_path, b"abc\n", Encoder(characters))
    with pytest.raises(InputError, match="tokenizer: expected"):
        file.expect(train_tokenizer("characters", ["abcd"], vocab_size=40))
    pairs = write_tokens(tmp_path / "pairs", [[1], [2]], [Vocabulary(5), Vocabulary(5)])
    with pytest.raises(InputError, match="expected a file of text, got one of pairs"):
        PackedText(pairs, length=4, batch_size=1)
