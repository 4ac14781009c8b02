"""Note tokens: their grammar in two spellings, windows over pieces, attributions, and n-gram baselines."""

import functools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from parity_tests.guitar_files import SHARED_GUITAR, needs_guitar, small_piece
from twinformer.data.guitar.ngram import NGram, augmented
from twinformer.data.guitar.notes import Note, Piece
from twinformer.data.guitar.pieces import (
    PUBLIC_DOMAIN,
    GuitarPieces,
    load_pieces,
    nats_per_note,
    read_attributions,
    suggested_config,
    with_licence,
)
from twinformer.data.guitar.tokens import (
    PITCHES,
    count_notes,
    exchanged,
    mend,
    note_vocabulary,
    paced,
    paces,
    parse,
    piece_of,
    read_pieces,
    room,
    tokens_of,
    transpose,
)
from twinformer.errors import InputError
from twinformer.parameters import model_parameters

WORDS = note_vocabulary()
WALTZ = "PIECE_START TS=3_8 BAR_START ON=45 ON=64 TD=6 OFF=64 ON=66 TD=12 OFF=45 OFF=66 BAR_END PIECE_END"
mutopia = needs_guitar("mutopia_train.txt", "mutopia_valid.txt", "mutopia_attribution.tsv")


@functools.cache
def published(split):
    """The pieces of a published split, read once."""
    return read_pieces(SHARED_GUITAR / f"mutopia_{split}.txt")


def tune(bars, pitch=60):
    """A piece of so many bars of three tokens and bar lines, two at its beginning, one at its end."""
    bar = f"BAR_START ON={pitch} TD=12 OFF={pitch} BAR_END"
    return tuple(f"PIECE_START TS=2_4 {' '.join([bar] * bars)} PIECE_END".split())


# ---- tokens


def test_a_piece_by_hand():
    piece = piece_of(WALTZ.split())
    assert piece.notes == (Note(0, 45, 18), Note(0, 64, 6), Note(6, 66, 12))
    assert (piece.time_signature, piece.bars, piece.end) == ((3, 8), (0,), 18)
    assert " ".join(tokens_of(piece)) == WALTZ
    assert count_notes(WALTZ.split()) == 3


def test_notes_are_split_at_bar_lines_and_a_unison_is_on_twice():
    assert " ".join(tokens_of(small_piece())) == (
        "PIECE_START TS=3_4 BAR_START ON=64 TD=12 OFF=64 BAR_END "
        "BAR_START ON=43 ON=55 TD=12 OFF=43 ON=71 TD=4 OFF=71 ON=69 TD=4 OFF=69 ON=67 TD=4 OFF=55 OFF=67 "
        "ON=64 ON=64 TD=12 OFF=64 OFF=64 BAR_END "
        "BAR_START ON=48 TD=9 ON=52 TD=3 OFF=52 TD=24 OFF=48 BAR_END PIECE_END"
    )


def test_bars_that_are_too_short_or_too_long():
    text = "PIECE_START TS=2_4 BAR_START ON=60 TD=6 OFF=60 BAR_END {} PIECE_END"
    upbeat = piece_of(text.format("BAR_START ON=60 TD=24 OFF=60 BAR_END BAR_START ON=60 TD=30 OFF=60 BAR_END").split())
    assert (upbeat.bars, upbeat.end) == ((0, 6, 30), 60)
    short = piece_of(text.format("BAR_START ON=60 TD=3 OFF=60 BAR_END BAR_START BAR_END").split())
    assert (short.bars, short.end) == ((0, 6, 30), 54)  # silence before a bar line is not written
    assert piece_of(text.format("").split()).end == 24  # a single bar is no upbeat


def test_long_waits_are_written_as_several():
    piece = Piece((Note(0, 60, 200),), (12, 2), (0,), 288)
    assert tokens_of(piece)[3:-2] == ("ON=60", "TD=96", "TD=96", "TD=8", "OFF=60")
    assert piece_of(tokens_of(piece)).notes == piece.notes


def test_the_other_spelling_is_the_same_piece():
    text = (
        "PIECE_START TIME_SIGNATURE=3_8 BPM=74 TRACK_START INST=0 DENSITY=4 BAR_START NOTE_ON=64 NOTE_ON=45 "
        "TIME_DELTA=2.0 NOTE_ON=66 NOTE_OFF=64 TIME_DELTA=4.000001 NOTE_OFF=45 NOTE_OFF=66 BAR_END TRACK_END"
    )
    assert " ".join(parse(text)) == WALTZ
    assert piece_of(text.split()).tempo == 74
    assert " ".join(parse(text.replace("TRACK_END", "TRACK_END PIECE_END"))) == WALTZ


def test_the_noise_of_deltas_is_rounded_away():
    """Three triplets of a quarter, as thirds of four sixteenths, spelled with whatever noise: 4 twelfths each."""
    line = "PIECE_START BAR_START " + " ".join(
        f"NOTE_ON=60 TIME_DELTA={d} NOTE_OFF=60" for d in ("1.3333", "1.33334", "1.33")
    )
    assert parse(line + " BAR_END PIECE_END").count("TD=4") == 3
    tiny = piece_of((line + " NOTE_ON=62 TIME_DELTA=0.05 NOTE_OFF=62 BAR_END PIECE_END").split())
    assert tiny.notes[-1].duration == 1
    assert any("shorter" in remark for remark in tiny.remarks)
    assert any("no time signature" in remark for remark in tiny.remarks)


def test_notes_held_over_a_bar_line_are_split_when_read():
    text = "PIECE_START BAR_START NOTE_ON=60 TIME_DELTA=16 BAR_END BAR_START TIME_DELTA=8 NOTE_OFF=60 BAR_END TRACK_END"
    assert parse(text)[2:-1] == (
        *("BAR_START", "ON=60", "TD=48", "OFF=60", "BAR_END"),
        *("BAR_START", "ON=60", "TD=24", "OFF=60", "BAR_END"),
    )


WRONG = {
    "ON=64 TD=6": ("ON=6x TD=6", "token 4, 'ON=6x': expected a pitch from 24 to 100"),
    "TD=12": ("TD=0", "token 8, 'TD=0': expected a positive time, a whole number of twelfths"),
    "TD=6": ("TD=1.5", "token 5, 'TD=1.5': expected a positive time"),
    "OFF=64": ("OFF=65", "token 6, 'OFF=65': expected a note of this pitch to be on"),
    "OFF=45 ": ("", "token 10, 'BAR_END': expected OFF before it for 45"),
    "TS=3_8": ("TS=3_7", "token 1, 'TS=3_7': expected a time signature"),
    "TS=3_8 ": ("", "expected TS= before the first bar"),
    " PIECE_END": ("", "expected PIECE_END at the end, got none in 12 tokens"),
    "PIECE_START ": ("", "token 0, 'TS=3_8': expected PIECE_START first"),
    "BAR_END ": ("", "token 11, 'PIECE_END': expected BAR_END before it"),
    "BAR_START": ("BAR_END", "token 2, 'BAR_END': expected BAR_START before it"),
    "BAR_START ": ("BAR_START BAR_START ", "token 3, 'BAR_START': expected BAR_END before it"),
    "ON=66": ("VELOCITY=66", "token 7, 'VELOCITY=66': expected a token of one of the two spellings"),
    "PIECE_END": ("PIECE_END BAR_START", "token 13, 'BAR_START': expected nothing after the end"),
    "TD=6 ": ("", "token 5, 'OFF=64': expected some time between its ON and its OFF"),
}


@pytest.mark.parametrize("place", WRONG)
def test_what_is_wrong_is_named_with_its_line_and_place(place, tmp_path):
    changed, said = WRONG[place]
    file = tmp_path / "pieces.txt"
    file.write_text(f"{WALTZ}\n{WALTZ.replace(place, changed, 1)}\n{WALTZ}\n")
    with pytest.raises(InputError) as caught:
        read_pieces(file)
    assert any(f"line 2: {said}" in problem for problem in caught.value.problems), caught.value
    assert all(problem.startswith("line 2: ") for problem in caught.value.problems)


def test_hostile_lines(tmp_path):
    file = tmp_path / "pieces.txt"
    for text, said in (
        ("", "expected one piece a line, got an empty file"),
        (f"{WALTZ}\n\n{WALTZ}", "line 2: expected PIECE_START first"),
        ("PIECE_START TS=4_4 BAR_START " + "TD=10000 " * 200 + "BAR_END PIECE_END", "at most 1000000 twelfths"),
        ("PIECE_START BAR_START NOTE_ON=60 TIME_DELTA=nan NOTE_OFF=60 BAR_END TRACK_END", "positive time"),
        ("PIECE_START BAR_START NOTE_ON=60 TIME_DELTA=1e300 NOTE_OFF=60 BAR_END TRACK_END", "positive time"),
        ("PIECE_START TS=4_4 BAR_START ON=٣ BAR_END PIECE_END", "expected a pitch"),
        ("\n".join(["nonsense"] * 1000), "and 2980 more"),
    ):
        file.write_text(text)
        with pytest.raises(InputError) as caught:
            read_pieces(file)
        assert said in str(caught.value)
        assert len(str(caught.value)) < 5000


def test_what_a_model_writes_is_mended():
    tokens = "PIECE_START TS=4_4 BAR_START ON=40 TD=3 OFF=40 OFF=41 BAR_START ON=44 TD=4 BAR_END FOO ON=50 "
    tokens += "BAR_START ON=50 TD=2"
    piece, repairs = mend(tokens.split())
    assert piece.notes == (Note(0, 40, 3), Note(3, 44, 4), Note(7, 50, 2))  # the first bar is an upbeat
    assert repairs == Counter(
        {"left out OFF": 1, "left out BAR_START": 1, "left out FOO": 1, "left out ON": 1, "ended at the bar line": 2}
        | {"added BAR_END": 1}
    )
    assert parse(" ".join(tokens_of(piece))) == tokens_of(piece)
    assert mend(WALTZ.split()) == (piece_of(WALTZ.split()), Counter())
    assert mend([])[0].notes == ()


@mutopia
def test_every_published_line_is_read_and_written_back_as_it_was():
    for name, pieces, tokens, notes in (("train", 250, 286_441, 97_855), ("valid", 24, 30_006, 10_145)):
        file = SHARED_GUITAR / f"mutopia_{name}.txt"
        read = published(name)
        assert [" ".join(piece) for piece in read] == file.read_text().splitlines()
        assert (len(read), sum(map(len, read)), sum(map(count_notes, read))) == (pieces, tokens, notes)
        for piece in read:
            WORDS.encode(piece)


# ---- transposition


def test_transposition_moves_pitches_and_nothing_else():
    ids = WORDS.encode(WALTZ.split())
    moved = WORDS.decode(transpose(ids, -4))
    assert " ".join(moved) == WALTZ.replace("=45", "=41").replace("=64", "=60").replace("=66", "=62")
    assert np.array_equal(transpose(transpose(ids, 3), -3), ids)
    low = WORDS.encode(["PIECE_START", "TS=2_4", "BAR_START", "ON=26", "TD=3", "OFF=26", "BAR_END", "PIECE_END"])
    assert room(low, 4) == (-2, -1, 0, 1, 2, 3, 4)
    with pytest.raises(InputError, match="stay within 24 to 100 when moved by -3, got ON=26, OFF=26"):
        transpose(low, -3)


# ---- other note values


def test_notes_twice_as_long_are_the_same_music():
    ids = WORDS.encode(WALTZ.split())
    slow = " ".join(WORDS.decode(paced(ids, 2.0)))
    assert slow == WALTZ.replace("TS=3_8", "TS=3_4").replace("TD=12", "TD=24").replace("TD=6 ", "TD=12 ")
    assert np.array_equal(paced(paced(ids, 2.0), 0.5), ids)
    piece, other = piece_of(WALTZ.split()), piece_of(slow.split())
    assert other.time_signature == (3, 4)
    assert other.notes == tuple(Note(2 * note.start, note.pitch, 2 * note.duration) for note in piece.notes)
    assert other.end == 2 * piece.end


@pytest.mark.parametrize(
    ("signature", "wait", "possible"),
    [
        ("2_4", 12, (0.5, 2.0)),
        ("2_4", 3, (2.0,)),  # a half of an odd number
        ("2_4", 50, (0.5,)),  # longer than the longest wait
        ("2_4", 96, (0.5,)),
        ("2_16", 12, (2.0,)),
        ("2_2", 12, (0.5,)),
    ],
)
def test_pieces_that_cannot_be_written_otherwise(signature, wait, possible):
    ids = WORDS.encode(f"PIECE_START TS={signature} BAR_START ON=60 TD={wait} OFF=60 BAR_END PIECE_END".split())
    assert paces(ids) == possible
    for factor in {0.5, 2.0} - set(possible):
        with pytest.raises(InputError, match="times as long"):
            paced(ids, factor)


def test_pitches_are_exchanged_and_nothing_else():
    chord = "PIECE_START TS=3_8 BAR_START ON=45 ON=64 TD=6 OFF=64 ON=66 TD=12 OFF=45 OFF=66 BAR_END PIECE_END"
    ids = WORDS.encode(chord.split())
    found = " ".join(WORDS.decode(exchanged(ids, lambda n: np.array([2, 0, 1])[:n])))
    # 45 becomes 66, 64 becomes 45, 66 becomes 64; at once in rising order
    assert found == ("PIECE_START TS=3_8 BAR_START ON=45 ON=66 TD=6 OFF=45 ON=64 TD=12 OFF=64 OFF=66 BAR_END PIECE_END")
    assert np.array_equal(exchanged(ids, np.arange), ids)
    nothing = WORDS.encode(["PIECE_START", "TS=2_4", "BAR_START", "TD=3", "BAR_END", "PIECE_END"])
    assert np.array_equal(exchanged(nothing, np.arange), nothing)


@mutopia
def test_exchanged_pieces_are_pieces():
    """Of the published ones: they read, and last as long; twice exchanged back they are what they were."""
    rng = np.random.default_rng(3)
    for tokens in published("valid")[:6]:
        ids, order = WORDS.encode(tokens), rng.permutation(len(PITCHES))
        ranks = [lambda n, o=order: np.argsort(np.argsort(o[:n])), lambda n, o=order: np.argsort(o[:n])]
        other = exchanged(ids, ranks[0])
        assert (other != ids).any()
        assert np.array_equal(exchanged(other, ranks[1]), ids)
        before, after = piece_of(tokens), piece_of(WORDS.decode(other))
        assert sorted((n.start, n.duration) for n in before.notes) == sorted((n.start, n.duration) for n in after.notes)
        assert {n.pitch for n in before.notes} == {n.pitch for n in after.notes}


def test_a_share_of_the_pieces_is_varied():
    pieces = [tune(5, 50), tune(5, 60), tuple(token.replace("TD=12", "TD=3") for token in tune(5, 65))]
    options = {"context_length": 64, "batch_size": 3, "seed": 5}
    data, plain = GuitarPieces(pieces, variety=0.4, **options), GuitarPieces(pieces, **options)
    waits = [[wait_in(data.varied(epoch, piece)) for piece in range(3)] for epoch in range(400)]
    assert {wait for row in waits for wait in row[:2]} == {6, 12, 24}
    assert {row[2] for row in waits} == {3, 6}  # an odd number has no half
    assert abs(np.mean([row[i] != 12 for row in waits for i in range(2)]) - 0.4) < 0.05
    assert abs(np.mean([row[2] == 6 for row in waits]) - 0.2) < 0.05
    assert any(row[0] != row[1] for row in waits)  # each piece by itself
    assert {wait_in(plain.varied(epoch, 0)) for epoch in range(50)} == {12}
    epoch = next(epoch for epoch, row in enumerate(waits) if row[0] == 24)
    rows = data.batch(epoch * data.steps_per_epoch).inputs["tokens"].tolist()
    expected = data.varied(epoch, 0)[:-1].tolist()
    assert any(row[: len(expected)] == expected for row in rows)


def wait_in(ids):
    (wait,) = {token for token in WORDS.decode(ids) if token.startswith("TD=")}
    return int(wait[3:])


def test_pitches_are_exchanged_in_the_first_epochs():
    scale = [f"ON={pitch} TD=6 OFF={pitch}" for pitch in (50, 53, 57, 62, 65, 69)]
    piece = tuple(f"PIECE_START TS=2_4 BAR_START {' '.join(scale)} BAR_END PIECE_END".split())
    options = {"context_length": 64, "batch_size": 1, "seed": 5, "transposition": 0}

    def rises(data):
        pitches = [
            [int(token[3:]) for token in WORDS.decode(data.varied(epoch, 0)) if token.startswith("ON=")]
            for epoch in range(300)
        ]
        return np.array([row == sorted(row) for row in pitches])

    always, early = (
        GuitarPieces([piece], exchange=0.5, **options),
        GuitarPieces([piece], exchange=0.5, exchange_epochs=100, **options),
    )
    assert abs(rises(always).mean() - 0.5) < 0.08
    assert np.array_equal(rises(early)[:100], rises(always)[:100])
    assert rises(early)[100:].all()
    assert rises(GuitarPieces([piece], **options)).all()


# ---- windows


def covered(data):
    """How often each target of each piece is counted, by the piece's own tokens, in one epoch without shuffling."""
    batches = [data.batch(step) for step in range(data.steps_per_epoch)]
    return [row for b in batches for row in zip(b.inputs["tokens"], b.targets, b.real, strict=True)]


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_measuring_counts_every_token_once_with_enough_before_it(stride):
    pieces = [tune(1), tune(2, 61), tune(9, 62), tune(3, 63)]  # 8, 13, 48, 18 tokens
    data = GuitarPieces(pieces, context_length=8, batch_size=3, training=False, stride=stride)
    found = []
    counted = []
    for tokens, targets, real in covered(data):
        seen = int((tokens != data.pad_id).sum())
        assert (tokens[seen:] == data.pad_id).all()  # padding comes last
        assert np.array_equal(tokens[1:seen], targets[: seen - 1])  # each target is the next token
        assert not real[seen:].any()
        places = real.nonzero()[0]
        found += targets[real].tolist()
        if len(places) and tokens[0] != data.begin_id:
            counted.append(places[0])
    assert found == [int(i) for piece in pieces for i in WORDS.encode(piece)[1:]]
    assert min(counted) >= 8 - stride  # the context of a token that does not stand at the beginning


def test_training_windows_cover_each_piece():
    T = 8
    pieces = [tune(1), tune(9, 62), tune(30, 64)]
    data = GuitarPieces(pieces, context_length=T, batch_size=2, transposition=0, seed=3)
    starts = [[start for start, _ in data._starts(epoch, 2)] for epoch in range(4)]
    n = len(pieces[2]) - 1
    for s in starts:
        assert (s[0], s[-1], len(s)) == (0, n - T, math.ceil(n / T))
        assert s == sorted(s)
    assert len({tuple(s) for s in starts}) == 4  # they move from epoch to epoch
    total = sum(data.batch(step).count for step in range(data.steps_per_epoch))
    assert total == sum(T * math.ceil((len(p) - 1) / T) if len(p) > T else len(p) - 1 for p in pieces)


def test_augmentation_is_a_function_of_seed_epoch_and_piece():
    pieces = [tune(5, pitch) for pitch in (50, 55, 60, 65)]
    data = GuitarPieces(pieces, context_length=16, batch_size=4, seed=5)
    moves = [[data.transposition(epoch, piece) for piece in range(4)] for epoch in range(60)]
    assert {move for row in moves for move in row} == set(range(-4, 5))
    assert any(len(set(row)) == 4 for row in moves)  # each piece by itself
    alone = GuitarPieces(pieces[:2], context_length=16, batch_size=1, seed=5)
    assert [alone.transposition(7, piece) for piece in range(2)] == moves[7][:2]  # whatever the other pieces are
    step = 2 * data.steps_per_epoch + 1
    assert np.array_equal(
        GuitarPieces(pieces, context_length=16, batch_size=4, seed=5).batch(step).targets, data.batch(step).targets
    )
    assert (
        moves[0] != [GuitarPieces(pieces, seed=6).transposition(0, piece) for piece in range(4)] or moves[0] != moves[1]
    )
    measured = GuitarPieces(pieces, context_length=16, training=False)
    assert {measured.transposition(epoch, 0) for epoch in range(9)} == {0}


def test_wrong_arguments_of_the_data_set():
    with pytest.raises(
        InputError, match=r"(?s)3 problems.*context_length.*got 1.*batch_size.*got 0.*stride: expected 1 to 1"
    ):
        GuitarPieces([tune(1)], context_length=1, batch_size=0, stride=2)
    with pytest.raises(InputError, match="piece 1: expected tokens from PIECE_START to PIECE_END"):
        GuitarPieces([tune(1), tune(2)[:-1]])
    with pytest.raises(InputError, match="expected a token of the vocabulary, got 'TD=97'"):
        GuitarPieces([(*tune(1)[:4], "TD=97", *tune(1)[5:])])
    with pytest.raises(InputError, match="pieces: expected at least one"):
        GuitarPieces([])
    with pytest.raises(InputError, match=r"variety: expected a share from 0 to 1, got 1.5"):
        GuitarPieces([tune(1)], variety=1.5)
    with pytest.raises(InputError, match=r"variety: expected 0 without training, got 0.5"):
        GuitarPieces([tune(1)], training=False, variety=0.5)
    with pytest.raises(InputError, match=r"(?s)exchange: expected a share.*got -1.*exchange_epochs: .*got -2"):
        GuitarPieces([tune(1)], exchange=-1, exchange_epochs=-2)


def test_the_suggested_model():
    config = suggested_config()
    assert 0.8e6 < sum(int(np.prod(p.shape)) for p in model_parameters(config).values()) < 0.9e6
    assert config.vocab_size == len(WORDS)


# ---- attributions


@mutopia
def test_only_the_lines_of_a_licence():
    table = read_attributions(SHARED_GUITAR / "mutopia_attribution.tsv")
    counts = Counter(entry.licence for entry in table)
    assert counts == {PUBLIC_DOMAIN: 80, "CC BY": 25, "CC BY-SA": 169}
    for split, number in (("train", 71), ("valid", 9)):
        pieces = published(split)
        chosen = with_licence(pieces, table, split)
        assert len(chosen) == number
        for tokens, entry in chosen:
            assert entry.licence == PUBLIC_DOMAIN
            assert pieces[entry.line - 1] == tokens
    file = SHARED_GUITAR / "mutopia_valid.txt"
    assert len(load_pieces(file, attributions=SHARED_GUITAR / "mutopia_attribution.tsv")) == 9
    assert len(load_pieces(file)) == 24


def test_attributions_that_do_not_fit(tmp_path):
    file = tmp_path / "attribution.tsv"
    header = "split\tline\tsource file in the Mutopia Project\tcomposer\ttitle\tlicence"
    row = "train\t{}\ta.ly\tSor\tStudy\t{}"
    file.write_text("\n".join([header, row.format(1, "Public Domain"), row.format(2, "CC BY")]))
    table = read_attributions(file)
    pieces = [tune(1), tune(2)]
    assert [tokens for tokens, _ in with_licence(pieces, table, "train")] == pieces[:1]
    for wrong in (pieces[:1], [*pieces, tune(3)]):
        with pytest.raises(InputError, match="expected an entry for each line from 1 to"):
            with_licence(wrong, table, "train")
    with pytest.raises(InputError, match=r"licence: expected one of \['CC BY', 'Public Domain'\], got 'CC0'"):
        with_licence(pieces, table, "train", ["CC0"])
    file.write_text(
        "\n".join([header, row.format(1, "CC BY"), row.format(1, "CC BY"), row.format("x", "CC BY"), "train\t2"])
    )
    with pytest.raises(InputError, match=r"(?s)3 problems.*line 3: expected one entry.*line 4: .*line 5: "):
        read_attributions(file)


# ---- n-grams


def ids(*numbers):
    return np.array(numbers, np.int64)


def test_witten_bell_by_hand():
    """Pieces 0 1 2 1 2 and 0 1 1 over V = 3 tokens; the first token of each is given.

    Unigrams: 1 four times, 2 twice, u = 2: P(1) = (4 + 2/3) / 8, P(2) = (2 + 2/3) / 8, P(0) = (2/3) / 8.
    After 1: 2 twice, 1 once, u = 2. After 0: 1 twice, u = 1. After 2: 1 once, u = 1.
    """
    pieces = [ids(0, 1, 2, 1, 2), ids(0, 1, 1)]
    p1, p2 = Fraction(14, 24), Fraction(8, 24)
    one = NGram(pieces, 3, 1)
    assert one.probabilities(ids(0, 1, 2, 0)) == pytest.approx([float(p) for p in (p1, p2, Fraction(2, 24))], abs=1e-15)
    two = NGram(pieces, 3, 2)
    wanted = [(2 + p1) / 3, (2 + 2 * p2) / 5, (1 + p1) / 2, (1 + 2 * p1) / 5]
    assert two.probabilities(ids(0, 1, 2, 1, 1)) == pytest.approx([float(p) for p in wanted], abs=1e-15)
    total, count = two.total([ids(0, 1, 2)])
    assert (total, count) == (pytest.approx(-math.log(wanted[0] * wanted[1])), 2)


def test_kneser_ney_by_hand():
    """The same pieces. Bigrams: 01 twice, 12 twice, 21 once, 11 once: n1 = 2, n2 = 2, d = 2/6. Below: 1 follows three
    different tokens (0, 2, 1), 2 follows one: n1 = 1, n2 = 0, d = 1.
    P(1) = (3 - 1)/4 + 1·2/4·1/3, P(2) = 0 + 2/4·1/3; P(2 | 1) = (2 - 1/3)/3 + 1/3·2/3·P(2)."""
    pieces = [ids(0, 1, 2, 1, 2), ids(0, 1, 1)]
    p1, p2 = Fraction(2, 4) + Fraction(1, 6), Fraction(1, 6)
    wanted = [(2 - Fraction(1, 3)) / 2 + Fraction(1, 3) / 2 * p1, (2 - Fraction(1, 3)) / 3 + Fraction(2, 9) * p2]
    found = NGram(pieces, 3, 2, "kneser-ney").probabilities(ids(0, 1, 2))
    assert found == pytest.approx([float(p) for p in wanted], abs=1e-15)


def test_an_adapting_n_gram_by_hand():
    """The unigrams of ``test_witten_bell_by_hand``, and pairs and triples of the piece 0 1 2 1 2 2 2 before each place.

    Third place: nothing has followed 1 but 2. There 1 was followed by 2 once, u = 1, so (1 + P(2)) / 2; the triple 2 1
    is new. The last but one: after 2 came 1 once: (0 + P(2)) / 2; after 1 2 came 1 once: the same again of that. The
    last: after 2 came 1 and 2, once each, u = 2: (1 + 2 P(2)) / 4; after 2 2 came nothing.
    """
    model = NGram([ids(0, 1, 2, 1, 2), ids(0, 1, 1)], 3, 1)
    p1, p2 = Fraction(14, 24), Fraction(8, 24)
    wanted = [p1, p2, p1, (1 + p2) / 2, p2 / 4, (1 + 2 * p2) / 4]
    found = model.adapting(ids(0, 1, 2, 1, 2, 2, 2), orders=(2, 3))
    assert found == pytest.approx([float(p) for p in wanted], abs=1e-15)
    alone = [math.log(p) for p in wanted]
    assert NGram([ids(0, 1, 2, 1, 2), ids(0, 1, 1)], 3, 1).total([ids(0, 1)], adapting=True) == (
        pytest.approx(-alone[0]),
        1,
    )
    with pytest.raises(InputError, match=r"orders: expected 1 <= first <= last, got \(3, 2\)"):
        model.adapting(ids(0, 1), orders=(3, 2))


HIGH = PITCHES[-1]


def noted(*pitches):
    return WORDS.encode(["PIECE_START", "TS=4_4", "BAR_START", *(f"ON={pitch}" for pitch in pitches)])


def test_an_n_gram_reads_a_piece_in_several_transpositions():
    """One that the vocabulary cannot spell gives the first such token no chance, and has no say in what follows."""
    model = NGram([noted(60, 64, 67, 62), noted(HIGH, HIGH - 4, 60)], len(WORDS), 3, "kneser-ney")
    middle = noted(60, 62, 64, 60)
    copies = [model.probabilities(transpose(middle, move)) for move in (-2, -1, 0, 1, 2)]
    np.testing.assert_allclose(model.transposed(middle, 2), np.mean(copies, 0), rtol=1e-13)
    np.testing.assert_allclose(model.transposed(middle, 0), model.probabilities(middle), rtol=1e-13)
    high = noted(60, HIGH, 62)  # the last but one cannot be moved up
    down = np.array([model.probabilities(transpose(high, move)) for move in (-1, 0)])
    up = model.probabilities(transpose(high[:-2], 1))
    wanted = [*np.mean([*down[:, :3], up], 0), down[:, 3].sum() / 3, down[:, 4].sum() / 2]
    np.testing.assert_allclose(model.transposed(high, 1), wanted, rtol=1e-13)
    for read in (lambda ids: model.transposed(ids, 3), lambda ids: model.adapting(ids, (2, 3), transposition=3)):
        every = [read(np.append(middle, token))[-1] for token in range(len(WORDS))]
        assert 0.95 < sum(every) <= 1 + 1e-12  # some tokens cannot be spelt in every copy
    total, count = model.total([middle, high], transposition=2)
    assert total == pytest.approx(-sum(np.log(model.transposed(one, 2)).sum() for one in (middle, high)))
    assert count == len(middle) + len(high) - 2


def test_an_adapting_n_gram_may_read_several_transpositions():
    """What the piece says is laid over the mean of them: the third 60 has followed a 62 once, and nothing else has."""
    model = NGram([noted(60, 64, 67, 62), noted(67, 69)], len(WORDS), 3)
    piece = noted(60, 62, 60, 62, 60)
    before = model.transposed(piece, 4)
    found = model.adapting(piece, (2, 2), transposition=4)
    np.testing.assert_allclose(found[:5], before[:5], rtol=1e-13)
    np.testing.assert_allclose(found[5:], (1 + before[5:]) / 2, rtol=1e-13)
    assert not np.isclose(before, model.probabilities(piece))[2:].any()
    total, count = model.total([piece], adapting=True, transposition=4)
    assert (total, count) == (pytest.approx(-np.log(model.adapting(piece, transposition=4)).sum()), 7)


def test_an_adapting_n_gram_adds_up_to_one():
    rng = np.random.default_rng(5)
    model = NGram([rng.integers(0, 6, size=60) for _ in range(4)], 7, 3, "kneser-ney")
    context = np.tile(rng.integers(0, 6, size=7), 3)
    chances = [model.adapting(np.append(context, token))[-1] for token in range(7)]
    assert sum(chances) == pytest.approx(1, abs=1e-12)
    several = rng.integers(0, 2, size=200)  # after which both have come, in every order
    assert sum(model.adapting(np.append(several, token))[-1] for token in range(7)) == pytest.approx(1, abs=1e-12)
    assert chances[context[0]] > 0.5 > model.probabilities(np.append(context, context[0]))[-1]


@pytest.mark.parametrize("smoothing", ["witten-bell", "kneser-ney"])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_probabilities_add_up_to_one(smoothing, n):
    rng = np.random.default_rng(n)
    pieces = [rng.integers(0, 6, size=60) for _ in range(4)]
    model = NGram(pieces, 7, n, smoothing)  # token 6 never comes
    for context in (pieces[0][:1], pieces[1][:9], ids(6, 6, 6)):
        chances = [model.probabilities(np.append(context, token))[-1] for token in range(7)]
        assert sum(chances) == pytest.approx(1, abs=1e-12)
        assert min(chances) > 0


def test_n_grams_that_cannot_be():
    with pytest.raises(InputError, match=r"(?s)2 problems.*n: expected at least 1.*pieces: expected at least one"):
        NGram([], 3, 0)
    with pytest.raises(InputError, match=r"below 2\^63, got V=295, n=8"):
        NGram([ids(0, 1)], 295, 8)


@mutopia
def test_the_n_grams_on_the_validation_pieces():
    """Noted for other, hidden pieces: unigram 4.07, best interpolated n-gram 2.49, with augmentation 2.27 nats a token.
    These validation pieces are easier for every order but the first."""
    train = [WORDS.encode(tokens) for tokens in published("train")]
    pieces = published("valid")
    valid = [WORDS.encode(tokens) for tokens in pieces]
    measured = {}
    for name, data, n, smoothing in (
        ("unigram", train, 1, "witten-bell"),
        ("4-gram", train, 4, "witten-bell"),
        ("5-gram", train, 5, "kneser-ney"),
        ("augmented", augmented(train), 5, "kneser-ney"),
    ):
        total, count = NGram(data, len(WORDS), n, smoothing).total(valid)
        assert count == 30_006 - 24
        measured[name] = total / count
        if name == "unigram":
            assert nats_per_note(total, pieces) == pytest.approx(total / 10_145)
    assert measured == {name: pytest.approx(value, abs=5e-4) for name, value in VALID.items()}
    assert abs(measured["unigram"] - 4.07) < 0.05


VALID = {"unigram": 4.0638, "4-gram": 2.2554, "5-gram": 2.0648, "augmented": 1.7651}
