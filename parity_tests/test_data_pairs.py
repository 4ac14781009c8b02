"""Pairs: what is read from files, and batches in which each pair is once, in few shapes, with bounded padding."""

import itertools
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinformer.data.buckets import bucket_edges
from twinformer.data.encoding import Encoder
from twinformer.data.pair_files import PairLines, PairTokens, write_pairs
from twinformer.data.pair_format import PairFormat
from twinformer.data.pairs import Pairs
from twinformer.data.token_writing import write_tokens
from twinformer.data.tokens import TokenFile, Vocabulary
from twinformer.data.vocabulary import train_tokenizer
from twinformer.errors import InputError

PAD, BEGIN, END, SEPARATOR, FIRST = 0, 1, 2, 5, 6
V = 10_000


def unlike(lengths):
    """Sources and targets of these lengths in which no token comes twice."""
    counts = itertools.count(FIRST)
    return [tuple([next(counts) for _ in range(n)] for n in pair) for pair in lengths]


def stored(place, pairs, sizes=(V, V)):
    return PairTokens(
        write_tokens(place / "x", [ids for pair in pairs for ids in pair], [Vocabulary(n) for n in sizes])
    )


def pairs_of(source, **options):
    usual = {"max_source": 60, "max_target": 60, "begin_id": BEGIN, "end_id": END, "seed": 3}
    if "batch_tokens" not in options:
        usual["batch_size"] = 4
    return Pairs(source, **{**usual, **options})


def epoch_of(data, epoch=0):
    return [data.batch(epoch * data.steps_per_epoch + step) for step in range(data.steps_per_epoch)]


lengths_of_pairs = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=25).filter(
    lambda pairs: any(map(any, pairs))
)


@given(
    lengths_of_pairs,
    st.sampled_from([{"batch_size": 1}, {"batch_size": 5}, {"batch_tokens": 50}]),
    st.integers(1, 5),
    st.sampled_from([1, 8]),
    st.booleans(),
)
def test_each_pair_is_in_one_batch(tmp_path_factory, lengths, size, num_buckets, multiple, ends):
    pairs = unlike(lengths)
    options = {**size, "num_buckets": num_buckets, "multiple": multiple, "source_end_id": END if ends else None}
    data = pairs_of(stored(tmp_path_factory.mktemp("x"), pairs), **options)
    assert len(data.shapes) <= num_buckets
    for epoch in (0, 1):
        found = []
        for batch in epoch_of(data, epoch):
            source, target = batch.inputs["source"], batch.inputs["target"]
            source_real, target_real = batch.inputs["source_padding_mask"], batch.inputs["target_padding_mask"]
            assert (*source.shape, target.shape[1]) in data.shapes
            assert np.array_equal(batch.real, target_real)
            for mask in (source_real, target_real):
                assert (np.diff(mask.astype(int), axis=1) <= 0).all(), "padding on the right"
            assert (source[~source_real] == PAD).all()
            assert (target[~target_real] == PAD).all()
            for b in np.flatnonzero(target_real.any(axis=1)):
                seen, said = source[b, source_real[b]].tolist(), target[b, target_real[b]].tolist()
                wanted = batch.targets[b, batch.real[b]].tolist()
                assert said[0] == BEGIN
                assert wanted == [*said[1:], END]
                if ends:
                    assert seen.pop() == END
                found.append((seen, said[1:]))
        assert sorted(found) == sorted((list(one), list(other)) for one, other in pairs)


@given(lengths_of_pairs, st.booleans(), st.integers(1, 4))
def test_one_behind_the_other(tmp_path_factory, lengths, begins, batch_size):
    pairs = unlike(lengths)
    options = {"form": "decoder", "separator_id": SEPARATOR, "begin_id": BEGIN if begins else None}
    data = pairs_of(stored(tmp_path_factory.mktemp("x"), pairs), batch_size=batch_size, **options)
    found = []
    for batch in epoch_of(data):
        assert batch.inputs["tokens"].shape in data.shapes
        assert set(batch.inputs) == {"tokens"}
        for b in np.flatnonzero(batch.real.any(axis=1)):
            real = np.flatnonzero(batch.real[b])
            assert real.tolist() == list(range(real[0], real[-1] + 1))
            tokens = batch.inputs["tokens"][b, : real[-1] + 1].tolist()
            assert np.array_equal(batch.targets[b, : real[-1]], tokens[1:]), "the next token"
            place = tokens.index(SEPARATOR)
            assert real[0] == place, "the separator says the first token of the target"
            assert batch.targets[b, real].tolist() == [*tokens[place + 1 :], END]
            found.append((tokens[begins:place], tokens[place + 1 :]))
            assert not begins or tokens[0] == BEGIN
    assert sorted(found) == sorted((list(one), list(other)) for one, other in pairs)


@given(st.lists(st.integers(1, 25), min_size=1, max_size=20), st.integers(1, 4), st.integers(1, 3))
def test_edges_are_the_best_that_there_are(lengths, num_buckets, multiple):
    """Compared with every other choice."""
    lengths = np.array(lengths)
    levels = sorted({-(-int(n) // multiple) * multiple for n in lengths})

    def places(edges):
        return sum(min(edge for edge in edges if edge >= n) for n in lengths)

    found = bucket_edges(lengths, num_buckets, multiple)
    choices = [
        (*some, levels[-1])
        for count in range(min(num_buckets, len(levels)))
        for some in itertools.combinations(levels[:-1], count)
    ]
    assert set(found) <= set(levels)
    assert found == sorted(set(found))
    assert len(found) <= num_buckets
    assert places(found) == min(places(edges) for edges in choices)


def test_more_buckets_less_padding(tmp_path):
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(1 / 12, 2000), 55)
    source = stored(tmp_path, unlike([(int(n), int(n)) for n in lengths]), (60_000, 60_000))
    shares = []
    for num_buckets in (1, 4, 8):
        data = pairs_of(source, batch_size=8, num_buckets=num_buckets)
        batches = epoch_of(data)
        shares.append(sum(batch.count for batch in batches) / sum(batch.real.size for batch in batches))
        assert {(*b.inputs["source"].shape, b.targets.shape[1]) for b in batches} == set(data.shapes)
    assert shares[0] < 0.3
    assert shares[1] > 0.65
    assert shares[2] > 0.75
    budget = pairs_of(source, batch_tokens=256, num_buckets=4)
    assert all(128 < rows * max(S, T) <= 256 for rows, S, T in budget.shapes)


@pytest.mark.parametrize("form", ["encoder-decoder", "decoder"])
def test_a_batch_is_the_same_whatever_came_before(form, tmp_path):
    source = stored(tmp_path, unlike([(n % 29, n % 31) for n in range(50)]))
    options = {"form": form, "separator_id": SEPARATOR if form == "decoder" else None}
    data = pairs_of(source, **options)
    steps = range(2 * data.steps_per_epoch)
    sequential = [data.batch(step) for step in steps]
    for step in reversed(steps):
        alone = pairs_of(source, **options).batch(step)
        assert all(np.array_equal(alone.inputs[name], sequential[step].inputs[name]) for name in alone.inputs)
        assert np.array_equal(alone.targets, sequential[step].targets)
    half = data.steps_per_epoch
    assert any(not np.array_equal(sequential[i].targets, sequential[half + i].targets) for i in range(half))
    together = [{tuple(map(bytes, batch.targets)) for batch in epoch_of(data, epoch)} for epoch in (0, 1)]
    assert together[0] & together[1] == set(), "other pairs share a batch in another epoch"
    shapes = [batch.targets.shape for batch in sequential[:half]]
    assert shapes != sorted(shapes), "batches of all buckets are mixed"


def test_long_pairs_are_cut_or_left_out_or_refused(tmp_path):
    source = stored(tmp_path, [([6] * 3, [7] * 4), ([8] * 9, [9] * 2), ([10] * 2, [11] * 9), ([12], [13] * 5)])
    options = {"max_source": 4, "max_target": 5, "batch_size": 4, "shuffle": False, "num_buckets": 1}
    with pytest.raises(InputError) as caught:
        pairs_of(source, **options)
    assert [problem.split(" (")[0] for problem in caught.value.problems] == [
        "long: expected 'cut' or 'skip' for 1 of 4 sources longer than 4 tokens",
        "long: expected 'cut' or 'skip' for 2 of 4 targets longer than 5 tokens",
    ]
    left = pairs_of(source, **options, long="skip")
    assert left.part.notes == (
        "1 of 4 sources longer than 4 tokens left out",
        "2 of 4 targets longer than 5 tokens left out",
    )
    assert left.part.size == 1
    cut = pairs_of(source, **options, long="cut")
    assert cut.shapes == [(4, 4, 5)], "no shape beyond what there is room for"
    batch = cut.batch(0)
    rows = [batch.targets[b, batch.real[b]].tolist() for b in range(4)]
    assert rows == [[7] * 4 + [END], [9] * 2 + [END], [11] * 5, [13] * 5]
    seen = batch.inputs["source_padding_mask"].sum(axis=1)
    assert seen.tolist() == [3, 4, 2, 1]
    joined = pairs_of(source, **options, long="cut", form="decoder", separator_id=SEPARATOR)
    assert joined.shapes == [(4, 10)]
    batch = joined.batch(0)
    assert [batch.targets[b, batch.real[b]].tolist() for b in range(4)] == rows
    with pytest.raises(
        InputError, match=r"pairs: expected at least one that is used, got none; .*; 4 of 4 targets longer"
    ):
        pairs_of(source, **options | {"max_target": 1}, long="skip")


# ---- files


@pytest.fixture(scope="module")
def encoders():
    source = train_tokenizer("words", ["a b c d"], vocab_size=20)
    target = train_tokenizer("words", ["x y z"], vocab_size=20)
    return Encoder(source, unknown="refuse"), Encoder(target, unknown="refuse")


def decoded(source, encoders):
    found = source.pairs(np.arange(len(source.lengths()[0])))
    return [tuple(e.tokenizer.decode([ids])[0] for e, ids in zip(encoders, pair, strict=True)) for pair in found]


FORMS = {
    "tsv": (b"\xef\xbb\xbfa b\tx\r\nc\ty z\n", PairFormat()),
    "columns": (b"1\tx\ta b\n2\ty z\tc\tmore\n", PairFormat(columns=(2, 1))),
    "jsonl": (b'{"source": "a b", "target": "x"}\n{"target": "y z", "n": 1, "source": "c"}', PairFormat("jsonl")),
    "fields": (b'{"s": "a b", "t": "x"}\n{"s": "c", "t": "y z"}\n', PairFormat("jsonl", fields=("s", "t"))),
}


@pytest.mark.parametrize("name", FORMS)
def test_pairs_are_read_as_they_stand(name, encoders, tmp_path):
    data, form = FORMS[name]
    (tmp_path / "x").write_bytes(data)
    lines = PairLines(tmp_path / "x", *encoders, form=form)
    assert decoded(lines, encoders) == [("a b", "x"), ("c", "y z")]
    assert [lengths.tolist() for lengths in lines.lengths()] == [[2, 1], [1, 2]]
    assert lines.vocab_sizes == (10, 9)
    write_pairs(tmp_path / "tokens", tmp_path / "x", *encoders, form=form)
    tokens = PairTokens(TokenFile(tmp_path / "tokens"))
    TokenFile(tmp_path / "tokens").verify()
    TokenFile(tmp_path / "tokens").expect(*(encoder.tokenizer for encoder in encoders))
    assert decoded(tokens, encoders) == decoded(lines, encoders)
    assert tokens.vocab_sizes == lines.vocab_sizes
    for one, other in zip(epoch_of(pairs_of(lines)), epoch_of(pairs_of(tokens)), strict=True):
        assert np.array_equal(one.targets, other.targets)
        assert np.array_equal(one.inputs["source"], other.inputs["source"])


def test_any_line_is_found_alone(encoders, tmp_path):
    texts = [(" ".join("abcd"[: 1 + n % 4]), " ".join("xyz"[: 1 + n % 3])) for n in range(2500)]
    (tmp_path / "x").write_text("".join(f"{one}\t{other}\n" for one, other in texts))
    lines = PairLines(tmp_path / "x", *encoders)
    for i in (2499, 0, 1024, 1023, 7):
        pair = lines.pairs(np.array([i]))[0]
        assert tuple(e.tokenizer.decode([ids])[0] for e, ids in zip(encoders, pair, strict=True)) == texts[i]


def test_empty_texts_are_left_out_kept_or_refused(encoders, tmp_path):
    (tmp_path / "x").write_bytes(b"a\tx\n\n\ty\nb\t \n")
    with pytest.raises(InputError) as caught:
        PairLines(tmp_path / "x", *encoders)
    assert [problem.split("x: ")[1] for problem in caught.value.problems] == [
        "line 2: expected a source and a target, got an empty line",
        "line 3: expected a source and a target, got an empty source",
        "line 4: expected a source and a target, got an empty target",
    ]
    left = PairLines(tmp_path / "x", *encoders, form=PairFormat(empty="skip"))
    assert decoded(left, encoders) == [("a", "x")]
    assert left.notes == pairs_of(left).part.notes == ("3 empty pairs left out",)
    kept = PairLines(tmp_path / "x", *encoders, form=PairFormat(empty="keep"))
    assert decoded(kept, encoders) == [("a", "x"), ("", ""), ("", "y"), ("b", "")]
    written = write_pairs(tmp_path / "tokens", tmp_path / "x", *encoders, form=PairFormat(empty="skip"))
    assert written.left_out == {"empty pairs": 3}
    (tmp_path / "x").write_bytes(b"\n\t\n")
    with pytest.raises(InputError, match=r"expected at least one pair, got none \(2 empty pairs left out\)"):
        PairLines(tmp_path / "x", *encoders, form=PairFormat(empty="skip"))
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(InputError, match="expected at least one pair, got none"):
        PairLines(tmp_path / "x", *encoders)


def test_all_problems_of_a_file_are_told_by_line(encoders, tmp_path):
    (tmp_path / "x").write_bytes(b"a\tx\na x\na\tx\ty\na\t\xff\nq\tx\na\ty w\nb\tz\n")
    with pytest.raises(InputError) as caught:
        PairLines(tmp_path / "x", *encoders)
    assert sorted(problem.split("x: ", 1)[1] for problem in caught.value.problems) == [
        "line 2: expected 2 columns between tabs, got 1",
        "line 3: expected 2 columns between tabs, got 3",
        "line 4: expected UTF-8, got byte 0xff at place 3",
        "line 5: source: expected a symbol of the vocabulary, got 'q' at place 1",
        "line 6: target: expected a symbol of the vocabulary, got 'w' at place 3",
    ]
    with pytest.raises(InputError, match="line 1: expected at least 4 columns between tabs, got 2"):
        PairLines(tmp_path / "x", *encoders, form=PairFormat(columns=(0, 3)))
    with pytest.raises(InputError, match="5 problems"):
        write_pairs(tmp_path / "tokens", tmp_path / "x", *encoders)
    assert not (tmp_path / "tokens").exists()
    (tmp_path / "x").write_text("".join(json.dumps({"source": "a", "target": n}) + "\n" for n in range(100)))
    with pytest.raises(
        InputError, match=r"(?s)3 problems.*line 2: field 'target': expected text, got int.*there may be"
    ):
        PairLines(tmp_path / "x", *encoders, form=PairFormat("jsonl", limit=2))


def test_a_file_that_changed_is_noticed(encoders, tmp_path):
    (tmp_path / "x").write_text("a\tx\nb\ty\n")
    lines = PairLines(tmp_path / "x", *encoders)
    (tmp_path / "x").write_text("a\tx\nb c\ty\n")
    with pytest.raises(InputError, match="expected 8 bytes as when it was opened, got 10"):
        lines.pairs(np.array([0]))


def test_memory_stays_bounded(encoders, tmp_path):
    """16 bytes a pair, whatever its length: a line of 400 bytes takes no more than one of 40."""
    peaks = []
    for words in (10, 100):
        (tmp_path / "x").write_text(("a b " * (words // 2) + "\t" + "x y " * (words // 2) + "\n") * 1500)
        tracemalloc.start()
        lines = PairLines(tmp_path / "x", *encoders)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert lines.lengths()[0].tolist() == [words] * 1500
        peaks.append(held)
    assert max(peaks) < 1500 * 16 + 60_000


REFUSED = {
    "no size": ({"batch_size": None}, "batch_size: expected it or batch_tokens, got neither"),
    "two sizes": ({"batch_size": 1, "batch_tokens": 2}, "batch_size: expected it or batch_tokens, got both, 1 and 2"),
    "an empty size": ({"batch_tokens": 0, "batch_size": None}, "batch_tokens: expected a whole number from 1, got 0"),
    "no room": ({"max_source": 0}, "max_source: expected a whole number from 1, got 0"),
    "a form of no name": ({"form": "encoder"}, "form: expected one of encoder-decoder, decoder, got 'encoder'"),
    "no begin": ({"begin_id": None}, "begin_id: expected an id in form 'encoder-decoder', got None"),
    "no separator": ({"form": "decoder"}, "separator_id: expected an id in form 'decoder', got None"),
    "a separator": ({"separator_id": 1}, "separator_id: expected None in form 'encoder-decoder', got 1"),
    "an end beyond": ({"end_id": 50}, "end_id: expected an id from 0 to 49, got 50"),
    "a source's end beyond": ({"source_end_id": 40}, "source_end_id: expected an id from 0 to 39, got 40"),
    "two vocabularies": (
        {"form": "decoder", "separator_id": 5},
        "expected one vocabulary in form 'decoder', got 40 and",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_refused(what, tmp_path):
    options, message = REFUSED[what]
    source = stored(tmp_path, [([6], [7])], (40, 50))
    assert pairs_of(source).vocab_size == 50
    with pytest.raises(InputError, match=message):
        pairs_of(source, **{"batch_size": 4, **options})


def test_files_of_another_kind_are_refused(encoders, tmp_path):
    text = write_tokens(tmp_path / "x", [[1], [2]], Vocabulary(5))
    with pytest.raises(InputError, match="expected a file of pairs, got one with 1 vocabulary"):
        PairTokens(text)
    with pytest.raises(InputError, match="expected source and target in turn, got 3"):
        write_tokens(tmp_path / "x", [[1], [2], [3]], [Vocabulary(5), Vocabulary(5)])
    with pytest.raises(InputError, match="document 1: expected ids from 0 to 3, got 4"):
        write_tokens(tmp_path / "x", [[4], [4]], [Vocabulary(5), Vocabulary(4)])
    with pytest.raises(InputError, match="expected a file that can be read"):
        PairLines(tmp_path / "none", *encoders)
    with pytest.raises(InputError, match="kind: expected one of tsv, jsonl, got 'csv'"):
        PairFormat("csv")
