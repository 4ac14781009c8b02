"""A piece read in several transpositions, and dynamic evaluation: a model learns from a piece while it predicts it, in
both twins, and nothing from later on.
"""

import functools

import numpy as np
import pytest

import flax_impl
import torch_impl
from twinformer.config import ModelConfig
from twinformer.data.batch import Batch
from twinformer.data.guitar.pieces import GuitarPieces
from twinformer.data.guitar.tokens import PITCHES, note_vocabulary, transpose
from twinformer.errors import ConfigError, InputError
from twinformer.initializers import initial_weights
from twinformer.learning import Evaluation, TrainingConfig
from twinformer.runs.adaptation import Adaptation, Reading, log_probabilities, read_total

WORDS = note_vocabulary()
PAD = WORDS.id("<pad>")
CONTEXT = 16
CONFIG = ModelConfig(
    architecture="decoder",
    vocab_size=len(WORDS),
    context_length=CONTEXT,
    model_dim=16,
    key_dim=8,
    hidden_dim=32,
    num_heads=2,
    num_layers=2,
    positions="rotary",
    dropout=0.1,
    param_dtype="float64",
    compute_dtype="float64",
)
WEIGHTS = initial_weights(CONFIG, 3)
ADAPTATION = Adaptation(stride=6, learning_rate=3e-3, transposition=2)
STILL = Reading(stride=6, transposition=2)
TWINS = {"torch": torch_impl, "flax": flax_impl}


def piece(*pitches):
    notes = " ".join(f"ON={pitch} TD=6 OFF={pitch}" for pitch in pitches)
    return WORDS.encode(f"PIECE_START TS=2_4 BAR_START {notes} BAR_END PIECE_END".split())


TUNE = piece(*[60, 62, 64] * 6)


@functools.cache
def trainer_of(twin, reading=ADAPTATION):
    """One for all tests: it keeps nothing but programs."""
    return TWINS[twin].training.Trainer(CONFIG, reading.training())


def said(twin, ids, reading=ADAPTATION):
    return log_probabilities(trainer_of(twin, reading), WEIGHTS, ids, reading, context_length=CONTEXT, pad_id=PAD)


def plain(ids, move=0):
    """``[n - 1]`` of the model as it is, window for window, by PyTorch's module."""
    model = torch_impl.build(CONFIG, seed=None)
    torch_impl.load_weights(model, WEIGHTS)
    moved = transpose(ids, move)
    found = []
    for start in range(0, len(ids) - 1, ADAPTATION.stride):
        end = min(start + ADAPTATION.stride, len(ids) - 1)
        begin = max(0, end - CONTEXT)
        logits = model(torch_impl.weights._tensor(moved[None, begin:end])).detach().numpy()[0]
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        found += list(logs[np.arange(end - begin), moved[begin + 1 : end + 1]][start - begin :])
    return np.array(found)


def test_the_twins_adapt_alike():
    ours, theirs = said("torch", TUNE), said("flax", TUNE)
    assert len(ours) == len(TUNE) - 1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("twin", TWINS)
def test_padding_that_comes_last_needs_no_mask(twin):
    """Batches of pieces have none: loss, gradients and the step are what they are with one. Not so if it came first."""
    data = GuitarPieces([tuple(WORDS.decode(piece(50, 57)))], context_length=CONTEXT, batch_size=2)
    batch = data.batch(0)
    real = batch.inputs["tokens"] != PAD
    assert list(batch.inputs) == ["tokens"]
    assert 0 < real[0].sum() < CONTEXT

    def stepped(shift, mask):
        tokens, targets, counts = (
            np.roll(one, shift, 1) for one in (batch.inputs["tokens"], batch.targets, batch.real)
        )
        inputs = {"tokens": tokens} | ({"padding_mask": np.roll(real, shift, 1)} if mask else {})
        trainer = TWINS[twin].training.Trainer(CONFIG, TrainingConfig())
        state, found = trainer.step(trainer.init(WEIGHTS), [Batch(inputs, targets, counts)])
        return trainer.weights(state) | {"loss": found.loss, "norm": found.gradient_norm}

    compare = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13)
    with_mask, without = stepped(0, True), stepped(0, False)
    for name, value in with_mask.items():
        compare(without[name], value, err_msg=name)
    first, unseen = stepped(CONTEXT - int(real[0].sum()), True), stepped(CONTEXT - int(real[0].sum()), False)
    assert abs(first["loss"] - unseen["loss"]) > 1e-3


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("reading", [STILL, Adaptation(stride=6, learning_rate=1e-300, transposition=2)], ids=repr)
def test_without_steps_it_is_the_mean_over_the_transpositions(twin, reading):
    wanted = np.logaddexp.reduce([plain(TUNE, move) for move in (-2, -1, 0, 1, 2)]) - np.log(5)
    np.testing.assert_allclose(said(twin, TUNE, reading), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("twin", TWINS)
def test_of_the_piece_as_it_is_and_without_steps_it_is_what_the_model_says(twin):
    """Windows that advance by one token are the same ones wherever a piece ends."""
    pieces = [TUNE, piece(50, 57, 50)]
    still = Reading(stride=1, transposition=0)
    texts = [tuple(WORDS.decode(ids)) for ids in pieces]
    data = GuitarPieces(texts, context_length=CONTEXT, batch_size=4, training=False, stride=1)
    trainer = trainer_of(twin, still)
    state, wanted = trainer.init(WEIGHTS), Evaluation()
    for number in range(data.steps_per_epoch):
        wanted += trainer.evaluate(state, data.batch(number))
    found = read_total(trainer, WEIGHTS, pieces, still, context_length=CONTEXT, pad_id=PAD)
    assert found == (pytest.approx(wanted.total, rel=1e-12), wanted.count)


@pytest.mark.parametrize("twin", TWINS)
def test_what_comes_again_is_learnt(twin):
    found, before = said(twin, TUNE), plain(TUNE)
    first = ADAPTATION.stride
    assert (found[4 * first : -2] > before[4 * first : -2]).all()  # but for the two that end the piece
    assert found[first:].mean() > before[first:].mean() + 0.4
    assert abs(found[:first].mean() - before[:first].mean()) < 0.2  # nothing has been learnt yet


@pytest.mark.parametrize("reading", [STILL, ADAPTATION], ids=["still", "adapting"])
@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("place", [1, 7, 20, 41])
def test_nothing_is_known_before_it_comes(twin, place, reading):
    """Whatever stands from some place on, and whatever transpositions that leaves, nothing before it changes."""
    other = TUNE.copy()
    other[place:] = WORDS.id(f"ON={PITCHES[-1]}")
    one, two = said(twin, TUNE, reading), said(twin, other, reading)
    np.testing.assert_array_equal(one[: place - 1], two[: place - 1])
    assert one[place - 1] != two[place - 1]
    assert np.isfinite(two).all()
    assert (two < 0).all()


@pytest.mark.parametrize("stride", [4, CONTEXT])
@pytest.mark.parametrize("twin", TWINS)
def test_a_transposition_that_the_vocabulary_lacks_has_no_say_after_it(twin, stride):
    """The last pitch but one moves up by 1 but not by 2: that copy gives the first such token no chance."""
    high = piece(PITCHES[-1] - 1, PITCHES[-1] - 1)
    logs = said(twin, high, Reading(stride=stride, transposition=2))
    copies = np.array([plain_of(high, move) for move in (-2, -1, 0, 1)])
    both = np.logaddexp.reduce(copies)
    # TS, BAR_START come before any pitch: what the fifth copy says of them is that of one without pitches
    bare = plain_of(high[:3], 0)
    np.testing.assert_allclose(logs[:2], np.logaddexp.reduce([*copies[:, :2], bare]) - np.log(5), rtol=0, atol=1e-12)
    np.testing.assert_allclose(logs[2], both[2] - np.log(5), rtol=0, atol=1e-12)
    np.testing.assert_allclose(logs[3:], both[3:] - np.log(4), rtol=0, atol=1e-12)


def plain_of(ids, move):
    """``[n - 1]`` of a piece that fits one window."""
    model = torch_impl.build(CONFIG, seed=None)
    torch_impl.load_weights(model, WEIGHTS)
    moved = transpose(ids, move)
    logits = model(torch_impl.weights._tensor(moved[None, :-1])).detach().numpy()[0]
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logs[np.arange(len(ids) - 1), moved[1:]]


def test_nothing_is_learnt_of_a_copy_that_was_lost():
    """Every copy is learnt from up to the first token that it cannot spell, and never its padding."""
    tune = piece(*[60, 62] * 3, PITCHES[-1] - 1, *[60, 62] * 3)  # +2 is lost at its ON, and so is no other
    lost = 3 + 6 * 3  # its place in the piece
    taught = []

    class Recorded:
        def __init__(self, trainer):
            self.init, self.log_probabilities, self.trainer = trainer.init, trainer.log_probabilities, trainer

        def step(self, state, batches):
            taught.extend(batches)
            return self.trainer.step(state, batches)

    reading = Adaptation(stride=6, transposition=2)
    trainer = Recorded(trainer_of("torch", reading))
    log_probabilities(trainer, WEIGHTS, tune, reading, context_length=CONTEXT, pad_id=PAD)
    assert len(taught) == -(-(len(tune) - 1) // 6) - 1
    for number, batch in enumerate(taught):
        end = 6 * (number + 1)
        begin = max(0, end - CONTEXT)
        for row, move in enumerate((-2, -1, 0, 1, 2)):
            reach = min(end + 1, lost) if move == 2 else end + 1
            wanted = tune[begin + 1 : reach]
            found = batch.targets[row][batch.real[row]]
            np.testing.assert_array_equal(found, transpose(wanted, move) if len(wanted) else [])


@pytest.mark.parametrize("twin", TWINS)
def test_every_piece_begins_with_the_weights_as_they_were(twin):
    trainer = trainer_of(twin)
    heard = []
    pieces = [TUNE, piece(50, 57, 50), TUNE]
    nats, count = read_total(
        trainer, WEIGHTS, pieces, ADAPTATION, context_length=CONTEXT, pad_id=PAD, tell=lambda *seen: heard.append(seen)
    )
    apart = [said(twin, ids) for ids in pieces]
    assert (nats, count) == (pytest.approx(-sum(logs.sum() for logs in apart), rel=1e-14), sum(map(len, apart)))
    assert heard == [(0, 3), (1, 3), (2, 3)]


def test_what_cannot_be():
    with pytest.raises(InputError, match=r"(?s)2 problems.*stride: expected.*got 0.*transposition: expected.*got -1"):
        Adaptation(stride=0, transposition=-1)
    with pytest.raises(InputError, match=r"(?s)^Reading.*2 problems.*stride: expected.*transposition: expected"):
        Reading(stride=0, transposition=-1)
    with pytest.raises(InputError, match="transposition: expected a whole number from 0 to 76, got 77"):
        Reading(stride=1, transposition=77)
    with pytest.raises(InputError, match="stride: expected 1 to 16, got 17"):
        said("torch", TUNE, Reading(stride=17, transposition=2))
    with pytest.raises(ConfigError, match="peak: expected a positive number, got 0"):
        Adaptation(learning_rate=0)
    with pytest.raises(ConfigError, match="beta2"):
        Adaptation(beta2=1.0)
