"""What the sweep of decoding calls equal, tied and explained, and what it does not."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from parity_tests.decoding_pair import Pair, _log_probability, explained, tied
from parity_tests.helpers import shape_hook_off
from parity_tests.sweep_decoding import DRAWS, NEW, differences, drawn, judged


@pytest.fixture(scope="module")
def model():
    """A configuration and what it is asked, its float64 and float32 models, and what float64 writes greedily."""
    config, asked = drawn(0, 1)
    wide, narrow = (Pair(config.with_dtype(dtype), 0) for dtype in ("float64", "float32"))
    asked["stop"] = config.vocab_size - 1
    return asked, wide, narrow


def written(texts):
    """A result of one row and these hypotheses (or one text)."""
    tokens = np.array([texts])
    return SimpleNamespace(tokens=tokens, lengths=np.full(tokens.shape[:-1], tokens.shape[-1]))


def greedily(wide, asked, count):
    text = []
    for _ in range(count):
        text.append(int(wide.logits(0, asked, 0, text)[-1].argmax()))
    return text


def one_row(asked):
    return asked | {"prompts": asked["prompts"][:1]}


def test_four_models_of_a_configuration_differ_in_all_but_it():
    (config, asked), (other, others) = drawn(DRAWS, 3), drawn(DRAWS + 1, 3)
    assert config == other
    assert not np.array_equal(asked["prompts"], others["prompts"])
    assert asked["seed"] != others["seed"]
    assert drawn(DRAWS + DRAWS, 3)[0] != config


def test_differences():
    def result(**changes):
        found = {"tokens": np.array([[1, 2]]), "lengths": np.array([2]), "finished": np.array([True])}
        return SimpleNamespace(**{**found, "logprobs": np.array([[-1.0, -2.0]]), **changes})

    assert differences(result(), result()) == []
    assert differences(result(), result(tokens=np.array([[1, 3]])))[0].startswith("tokens: expected [[1, 2]]")
    assert differences(result(), result(finished=np.array([False])))[0].startswith("finished")
    assert differences(result(), result(logprobs=np.array([[-1.0, -2.0 - 1e-10]])))[0].startswith("logprobs")
    assert differences(result(), result(logprobs=np.array([[-1.0, -np.inf]])))[0].startswith("logprobs")


def test_a_greedy_text_is_explained_by_rounding_alone(model):
    asked, wide, narrow = model
    asked = one_row(asked)
    with shape_hook_off():
        text = greedily(wide, asked, 3)
        assert explained("greedy", wide, narrow, asked, (written(text), written(text))) == "explained"
        worst = wide.logits(0, asked, 0, text[:2])[-1].argsort()[0]
        other = [*text[:2], int(worst)]
        assert explained("greedy", wide, narrow, asked, (written(text), written(other))) == "not explained"


def test_hypotheses_are_tied_only_if_they_are_equally_likely(model):
    asked, wide, _ = model
    asked = one_row(asked)
    with shape_hook_off():
        text = greedily(wide, asked, 2)
        others = [[text[0], token] for token in range(wide.config.vocab_size) if token != text[1]]
        apart = [abs(_log_probability(wide, asked, 0, one) - _log_probability(wide, asked, 0, text)) for one in others]
        other = others[int(np.argmax(apart))]
        assert max(apart) > 1e-6
        assert tied(wide, asked, (written([text, other]), written([text, other])))
        assert not tied(wide, asked, (written([text, other]), written([other, text])))
        assert not tied(wide, asked, (written([text]), written([text[:1]])))


def test_a_twin_that_writes_something_else_is_a_problem(monkeypatch):
    """One token of Flax's greedy texts changed: nothing explains it."""
    whole = Pair.written

    def faulty(self, way, asked):
        one, other = whole(self, way, asked) if way == "greedy" else whole(self, "greedy", asked)
        if way == "greedy":
            tokens = other.tokens.copy()
            tokens[0, 0] = (tokens[0, 0] + 1) % self.config.vocab_size
            other = dataclasses.replace(other, tokens=tokens)
        return one, other

    monkeypatch.setattr(Pair, "written", faulty)
    with shape_hook_off():
        (line,) = judged(((0,), 1))
    assert line["problems"][0].startswith("greedy: tokens: expected")
    assert line["float32"]["greedy"] == "not explained"
    assert line["tokens"] <= 3 * NEW
