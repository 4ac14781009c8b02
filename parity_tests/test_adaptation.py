"""Dynamic evaluation: a model learns from a piece while it predicts it, in both twins, and nothing from later on."""

import functools

import numpy as np
import pytest

import flax_impl
import torch_impl
from twinformer.config import ModelConfig
from twinformer.data.guitar.tokens import PITCHES, note_vocabulary, transpose
from twinformer.errors import ConfigError, InputError
from twinformer.initializers import initial_weights
from twinformer.runs.adaptation import Adaptation, adapted_total, log_probabilities

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
TWINS = {"torch": torch_impl, "flax": flax_impl}


def piece(*pitches):
    notes = " ".join(f"ON={pitch} TD=6 OFF={pitch}" for pitch in pitches)
    return WORDS.encode(f"PIECE_START TS=2_4 BAR_START {notes} BAR_END PIECE_END".split())


TUNE = piece(*[60, 62, 64] * 6)


@functools.cache
def trainer_of(twin, adaptation=ADAPTATION):
    """One for all tests: it keeps nothing but programs."""
    return TWINS[twin].training.Trainer(CONFIG, adaptation.training())


def said(twin, ids, adaptation=ADAPTATION, weights=WEIGHTS):
    trainer = trainer_of(twin, adaptation)
    return log_probabilities(trainer, weights, ids, adaptation, context_length=CONTEXT, pad_id=PAD)


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
def test_without_steps_it_is_the_mean_over_the_transpositions(twin):
    still = Adaptation(stride=ADAPTATION.stride, learning_rate=1e-300, transposition=2)
    wanted = np.logaddexp.reduce([plain(TUNE, move) for move in (-2, -1, 0, 1, 2)]) - np.log(5)
    np.testing.assert_allclose(said(twin, TUNE, still), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("twin", TWINS)
def test_what_comes_again_is_learnt(twin):
    found, before = said(twin, TUNE), plain(TUNE)
    first = ADAPTATION.stride
    assert (found[4 * first : -2] > before[4 * first : -2]).all()  # but for the two that end the piece
    assert found[first:].mean() > before[first:].mean() + 0.4
    assert abs(found[:first].mean() - before[:first].mean()) < 0.2  # nothing has been learnt yet


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("place", [1, 7, 20, 41])
def test_nothing_is_known_before_it_comes(twin, place):
    """Whatever stands from some place on, and whatever transpositions that leaves, nothing before it changes."""
    other = TUNE.copy()
    other[place:] = WORDS.id(f"ON={PITCHES[-1]}")
    one, two = said(twin, TUNE), said(twin, other)
    np.testing.assert_array_equal(one[: place - 1], two[: place - 1])
    assert one[place - 1] != two[place - 1]
    assert np.isfinite(two).all()


@pytest.mark.parametrize("twin", TWINS)
def test_a_transposition_that_the_vocabulary_lacks_has_no_say_after_it(twin):
    """The last pitch but one moves up by 1 but not by 2: that copy gives the first such token no chance."""
    high = piece(PITCHES[-1] - 1, PITCHES[-1] - 1)
    still = Adaptation(stride=len(high), learning_rate=1e-300, transposition=2)
    logs = said(twin, high, still)
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


@pytest.mark.parametrize("twin", TWINS)
def test_every_piece_begins_with_the_weights_as_they_were(twin):
    trainer = trainer_of(twin)
    heard = []
    pieces = [TUNE, piece(50, 57, 50), TUNE]
    nats, count = adapted_total(
        trainer, WEIGHTS, pieces, ADAPTATION, context_length=CONTEXT, pad_id=PAD, tell=lambda *seen: heard.append(seen)
    )
    apart = [said(twin, ids) for ids in pieces]
    assert (nats, count) == (pytest.approx(-sum(logs.sum() for logs in apart), rel=1e-14), sum(map(len, apart)))
    assert heard == [(0, 3), (1, 3), (2, 3)]


def test_what_cannot_be():
    with pytest.raises(InputError, match=r"(?s)2 problems.*stride: expected.*got 0.*transposition: expected.*got -1"):
        Adaptation(stride=0, transposition=-1)
    with pytest.raises(ConfigError, match="peak: expected a positive number, got 0"):
        Adaptation(learning_rate=0)
    with pytest.raises(ConfigError, match="beta2"):
        Adaptation(beta2=1.0)
