"""Masked language modelling: what is hidden, how often, and that nothing but (seed, epoch, piece, place) decides."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinformer.data.masked import MaskedText, philox
from twinformer.data.token_writing import write_tokens
from twinformer.data.tokens import TokenFile, Vocabulary
from twinformer.errors import InputError

PAD, BEGIN, END, MASK, SPECIAL, FIRST = 0, 1, 2, 4, 5, 6
V = 200


def token_file(place, documents):
    return write_tokens(place / "x.tokens", documents, Vocabulary(V))


def masked(file, **options):
    usual = {"length": 16, "batch_size": 4, "mask_id": MASK, "begin_id": BEGIN, "end_id": END, "seed": 3}
    return MaskedText(file, **{**usual, "special_ids": range(FIRST), **options})


def epoch_of(data, epoch=0):
    return [data.batch(epoch * data.steps_per_epoch + step) for step in range(data.steps_per_epoch)]


def pieces_of(batches):
    """``(tokens, targets, chosen)`` of each piece of the batches."""
    found = []
    for batch in batches:
        for b, segments in enumerate(batch.inputs["segments"]):
            for segment in range(1, segments.max(initial=0) + 1):
                here = segments == segment
                found.append((batch.inputs["tokens"][b, here], batch.targets[b, here], batch.real[b, here]))
    return found


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any), st.booleans(), st.integers(1, 5))
def test_each_token_is_in_one_piece_and_each_piece_hides_some(tmp_path_factory, lengths, bounded, batch_size):
    ends = np.cumsum([0, *lengths])
    documents = [[FIRST + i % (V - FIRST) for i in range(ends[n], ends[n + 1])] for n in range(len(lengths))]
    file = token_file(tmp_path_factory.mktemp("x"), documents)
    options = {} if bounded else {"begin_id": None, "end_id": None}
    data = masked(file, batch_size=batch_size, **options)
    seen = []
    for tokens, targets, chosen in pieces_of(epoch_of(data)):
        if bounded:
            assert (targets[0], targets[-1]) == (BEGIN, END)
            assert not chosen[[0, -1]].any()
        inside = targets[1:-1] if bounded else targets
        assert chosen.sum() == max(1, np.rint(0.15 * len(inside)))
        assert np.array_equal(tokens[~chosen], targets[~chosen])
        assert set(tokens[chosen]) <= {MASK, *range(FIRST, V)}
        seen += inside.tolist()
    assert sorted(seen) == sorted(i for ids in documents for i in ids)
    for batch in epoch_of(data):
        assert not batch.real[batch.inputs["segments"] == 0].any()
        assert (batch.inputs["tokens"][batch.inputs["segments"] == 0] == PAD).all()


def test_the_shares_are_those_of_the_paper(tmp_path):
    """15 % chosen; of them 80 % the mask, 10 % drawn, 10 % kept: within four standard deviations. Each place alike."""
    documents = [[FIRST + 7] * 100] * 600
    data = masked(token_file(tmp_path, documents), length=102, batch_size=50)
    tokens, _, chosen = (np.stack(arrays) for arrays in zip(*pieces_of(epoch_of(data)), strict=True))
    assert chosen.sum() == 15 * 600
    found = tokens[chosen]
    n = len(found)
    for share, expected in (((found == MASK).mean(), 0.8), ((found == FIRST + 7).mean(), 0.1 + 0.1 / (V - FIRST))):
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / n)
    drawn = found[(found != MASK) & (found != FIRST + 7)]
    assert drawn.min() >= FIRST, "no special token"
    counts = np.bincount(drawn, minlength=V)[FIRST:]
    assert (counts > 0).sum() > 0.9 * (V - FIRST), "drawn from all ordinary tokens"
    assert counts.max() < 20, "and evenly: 4.6 expected"
    by_place = chosen[:, 1:-1].sum(axis=0)
    assert abs(by_place - 90).max() < 4.5 * np.sqrt(600 * 0.15 * 0.85)


def test_special_tokens_are_never_chosen_nor_drawn(tmp_path):
    documents = [[SPECIAL, FIRST, SPECIAL, MASK, BEGIN], [SPECIAL, SPECIAL], [FIRST]]
    data = masked(token_file(tmp_path, documents))
    for epoch in range(30):
        for tokens, targets, chosen in pieces_of(epoch_of(data, epoch)):
            assert set(targets[chosen]) <= {FIRST}
            assert set(tokens[chosen]) <= {MASK, *range(FIRST, V)}
            assert chosen.any() == (FIRST in targets), "at least one where there is one"


def test_nothing_else_decides(tmp_path):
    """Another batch size, another order: in an epoch each document is hidden in the same places."""
    documents = [[FIRST + n] * (5 + n % 9) for n in range(40)]
    file = token_file(tmp_path, documents)

    def hidden(data, epoch):
        return {int(targets[1]): tokens.tolist() for tokens, targets, _ in pieces_of(epoch_of(data, epoch))}

    data = masked(file, length=20)
    first = hidden(data, 0)
    assert len(first) == 40
    assert hidden(masked(TokenFile(file.file), length=20, batch_size=7), 0) == first
    assert hidden(masked(file, length=20, shuffle=False), 0) == first
    assert hidden(data, 1) != first
    assert hidden(masked(file, length=20, seed=4), 0) != first
    steps = range(2 * data.steps_per_epoch)
    sequential = [data.batch(step) for step in steps]
    for step in reversed(steps):
        alone = masked(file, length=20).batch(step)
        assert np.array_equal(alone.inputs["tokens"], sequential[step].inputs["tokens"])
        assert np.array_equal(alone.real, sequential[step].real)


def test_a_piece_in_each_row_has_a_padding_mask(tmp_path):
    data = masked(token_file(tmp_path, [[7, 8], [9] * 20, [10]]), share=False)
    batches = epoch_of(data)
    assert data.part.size == 4
    assert all(set(batch.inputs) == {"tokens", "padding_mask"} for batch in batches)
    lengths = sorted(int(n) for batch in batches for n in batch.inputs["padding_mask"].sum(axis=1))
    assert lengths == [3, 4, 8, 16]


def test_the_generator_gives_the_known_answers():
    """The vectors of the paper's library, as in the contract of the twins."""
    ones = 2**32 - 1
    pi = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
    for counter, key, expected in (
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ones,) * 4, (ones,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (*pi, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ):
        words = philox(tuple(np.array([word]) for word in counter), np.array(key, np.uint64))
        assert " ".join(f"{int(word[0]):08x}" for word in words) == expected


def test_long_documents(tmp_path):
    file = token_file(tmp_path, [[7] * 14, [8] * 15])
    assert masked(file).part.notes == ("1 of 2 documents longer than 14 tokens cut",)
    left = masked(file, long="skip")
    assert left.part.notes == ("1 of 2 documents longer than 14 tokens left out",)
    assert {8} & {int(i) for batch in epoch_of(left) for i in batch.targets.ravel()} == set()
    with pytest.raises(InputError, match="long: expected 'cut' or 'skip' for 1 of 2 documents longer than 14 tokens"):
        masked(file, long="refuse")


REFUSED = {
    "no room": ({"length": 2}, "length: expected a whole number from 3, got 2"),
    "no rate": ({"rate": 0}, r"rate: expected a number in \(0, 1\], got 0"),
    "a mask beyond": ({"mask_id": V}, f"mask_id: expected an id from 0 to {V - 1}, got {V}"),
    "a special token beyond": ({"special_ids": [1, -1]}, r"special_ids\[1\]: expected an id from 0 to 199, got -1"),
    "all special": ({"special_ids": range(V)}, "special_ids: expected an ordinary token among 200, got none"),
    "no way": ({"long": "drop"}, "long: expected one of cut, refuse, skip, got 'drop'"),
    "all left out": ({"long": "skip", "length": 4}, "tokens: expected a document with a token, got none"),
    "no batch": ({"batch_size": 0}, "batch_size: expected a whole number from 1, got 0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_refused(what, tmp_path):
    options, message = REFUSED[what]
    with pytest.raises(InputError, match=message):
        masked(token_file(tmp_path, [[7] * 5]), **options)
