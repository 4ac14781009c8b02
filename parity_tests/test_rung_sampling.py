"""Rung 8: the references are right, right twins agree with them, and every definition is seen to fail."""

import dataclasses
import itertools
import sys

import numpy as np
import pytest

import torch_impl
from parity_tests.mutants import MUTANTS
from parity_tests.mutants.cases import CASES
from parity_tests.torch_twice import UNHARMED, Other, Second, torch_twice
from twinformer.decoding import BeamConfig, SamplingConfig, StopConfig
from twinformer.parity import philox, random_case, writing_checks
from twinformer.parity import sampling_reference as reference
from twinformer.parity.evidence import Evidence
from twinformer.parity.rungs import beams, sampling
from twinformer.parity.sampling_tables import CHAINS, HOPELESS, TABLES, UNIFORMS
from twinformer.parity.scenarios import BEAMS, BLOCK, PROMPT, long_search, searches, writing_for
from twinformer.parity.twins import TorchTwin
from twinformer.parity.writing_checks import compared
from twinformer.presets import preset

# checks of shapes at every call, which other tests make, take most of the time here
pytestmark = pytest.mark.usefixtures("without_shape_hook")
HIDDEN = -np.inf


def small(name: str, **changes):
    config = preset(name)
    sizes = {"model_dim": 12, "hidden_dim": 16, "num_layers": 1, "vocab_size": 23, "context_length": 32}
    if config.architecture == "encoder-decoder":
        sizes |= {"num_encoder_layers": 1, "source_vocab_size": 23}
    return random_case(name, config.replace(**(sizes | changes)), seed=3, length=12)


def planted(name, twin="torch_impl"):
    return next(mutant for mutant in MUTANTS if (mutant.id, mutant.twin) == (name, twin))


# ---- the references, against what can be counted on the fingers


def kept(x, **choices):
    row = np.array(x, np.float64)
    left = reference.processed(row, np.zeros(len(row), bool), SamplingConfig(**choices))
    assert np.array_equal(left[np.isfinite(left)], row[np.isfinite(left)])
    return np.flatnonzero(np.isfinite(left)).tolist()


@pytest.mark.parametrize(
    ("x", "choices", "ids"),
    [
        (np.zeros(16), {"top_p": 0.5}, list(range(8))),
        (np.zeros(16), {"top_p": 0.5 + 1e-9}, list(range(9))),
        (np.zeros(16), {"top_p": 1 / 16}, [0]),
        (np.zeros(16), {"top_p": 1.0}, list(range(16))),
        ([HIDDEN, 1.0, 1.0, 1.0, 1.0], {"top_p": 0.75}, [1, 2, 3]),
        (np.log([0.1, 0.6, 0.3]), {"top_p": 0.65}, [1, 2]),
        ([1.0, 2.0, 2.0, 2.0, 0.0], {"top_k": 2}, [1, 2]),
        ([1.0, 2.0], {"top_k": 5}, [0, 1]),
        ([3.0, 3.0, 2.9], {"min_p": 1.0}, [0, 1]),
        (np.log([0.5, 0.26, 0.24]), {"min_p": 0.5}, [0, 1]),
        (np.log([0.4, 0.3, 0.2, 0.1]), {"top_k": 2, "top_p": 0.5}, [0]),
    ],
)
def test_what_is_left(x, choices, ids):
    assert kept(x, **choices) == ids


def test_repetition_goes_by_the_sign():
    x, seen = np.array([2.0, -2.0, 0.0, 2.0, HIDDEN]), np.array([True, True, True, False, True])
    left = reference.processed(x, seen, SamplingConfig(repetition_penalty=2.0))
    assert left.tolist() == [1.0, -4.0, 0.0, 2.0, HIDDEN]


def test_choices():
    assert reference.greedy(np.array([0.0, 3.0, 3.0])) == 1
    assert reference.greedy(np.array([HIDDEN, HIDDEN])) == -1
    assert reference.greedy(np.array([1.0, np.nan])) == -1
    assert reference.greedy(np.array([np.inf, 1.0])) == -1
    assert reference.draw(np.array([1.0, np.inf]), 0.5) == -1
    quarters = np.zeros(4)
    assert [reference.draw(quarters, u) for u in (0.0, 0.25 - 2.0**-24, 0.25, 0.5, 1 - 2.0**-24)] == [0, 0, 1, 2, 3]
    assert reference.draw(np.array([HIDDEN, 0.0, 0.0]), 0.0) == 1
    assert reference.draw(np.array([0.0, HIDDEN]), 1 - 2.0**-24) == 0
    assert reference.draw(np.array([np.nan, 0.0]), 0.5) == -1


def test_numbers_are_fractions_of_24_bits():
    numbers = philox.uniforms(2**40 + 7, np.arange(200), 3)
    assert numbers.dtype == np.float32
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert (numbers * 2.0**24 == np.floor(numbers * 2.0**24)).all()
    assert abs(numbers.mean() - 0.5) < 0.1
    assert len({*philox.uniforms(0, [0], 0), *philox.uniforms(0, [1], 0), *philox.uniforms(1, [0], 0)}) == 3


def test_where_writing_ends():
    stop = StopConfig(tokens=(9,), sequences=((1, 2), (4,)))
    assert reference.written_length([1, 1, 2, 3], stop) == (3, True)
    assert reference.written_length([9, 9], stop) == (1, True)
    assert reference.written_length([2, 1, 4], stop) == (3, True)
    assert reference.written_length([1, 3, 2], stop) == (3, False)


@pytest.mark.parametrize("penalty", ["none", "mean", "gnmt"])
def test_a_beam_as_wide_as_everything_finds_the_best(penalty):
    """Against every text that there is."""
    V, M, stop = 3, 4, (2,)
    rng = np.random.default_rng(1)
    table = {text: rng.standard_normal(V) for n in range(M) for text in itertools.product(range(V), repeat=n)}
    beam = BeamConfig(width=V**M, num_best=5, length_penalty=penalty, alpha=0.8)

    def logits_after(hypotheses):
        return np.stack([table[text] for text in hypotheses])

    found = reference.search(logits_after, max_new_tokens=M, beam=beam, stop=stop)
    texts = [
        text
        for n in range(1, M + 1)
        for text in itertools.product(range(V), repeat=n)
        if not set(text[:-1]) & set(stop) and (text[-1] in stop or n == M)
    ]

    def score(text):
        total = sum(reference.log_softmax(table[text[:i]])[token] for i, token in enumerate(text))
        return total / beam.length_factor(len(text))

    assert [one.tokens for one in found] == sorted(texts, key=score, reverse=True)[:5]
    assert np.allclose([one.score for one in found], sorted(map(score, texts), reverse=True)[:5])
    assert all(one.finished == (one.tokens[-1] in stop) for one in found)


def test_a_beam_that_shrinks_ends_with_its_last_hypothesis():
    beam = BeamConfig(width=2, num_best=2, length_penalty="none", shrink=True)
    equal = np.zeros((1, 3))
    found = reference.search(lambda live: np.repeat(equal, len(live), 0), max_new_tokens=4, beam=beam, stop=(0,))
    # step 1: (0) finishes, one goes on: (1); step 2: (1, 0) finishes, none is left
    assert [one.tokens for one in found] == [(0,), (1, 0)]
    assert all(one.finished for one in found)


# ---- what is asked


def test_tables_have_what_shows():
    rows = np.concatenate([table.logits for table in TABLES])
    assert any(np.isinf(row).any() for row in rows)
    assert sum(len(set(row[np.isfinite(row)])) == 1 for row in rows) >= 4
    assert {reference.greedy(row) for row in HOPELESS} == {-1, 0}
    assert {int(np.isposinf(row).sum()) for row in HOPELESS} >= {0, 1, 3}
    assert {k / 16 for k in range(16)} <= set(UNIFORMS.tolist())
    assert {type(one).__name__ for configs in CHAINS.values() for one in configs} == {"SamplingConfig"}
    assert {"RepetitionPenalty", "Temperature", "TopK", "TopP", "MinP", "processors"} == set(CHAINS)


def test_searches_have_both_penalties_and_ties():
    config = small("llama").config
    asked = searches(config, writing_for(config), (4,))
    assert {search.beam.length_penalty for search in asked} == {"mean", "gnmt"}
    assert {search.weights for search in asked} == {"plain", "flat", "zero"}
    assert {search.beam.shrink for search in asked} == {True, False}
    assert len({(beam.width, beam.num_best) for beam in BEAMS.values()}) == 1
    assert any((search.allowed[0] != search.allowed[1]).any() for search in asked)


def test_a_long_search_where_there_is_room():
    """So long that something is left to move beyond the first block of slots."""
    config = small("llama").config
    assert long_search(config, writing_for(config)) is None
    config = config.replace(context_length=96)
    search = long_search(config, writing_for(config))
    assert search.new > BLOCK
    assert search.new + PROMPT <= 96


# ---- agreement


def test_both_twins_write_alike():
    rung = sampling.check(Evidence(small("textbook-decoder")))
    assert rung.verdict == "agree", rung.problems
    assert rung.checked.startswith("24 rows of logits, ")
    names = {one.name for one in rung.comparisons}
    for twin in ("torch_impl", "flax_impl"):
        assert {f"Generator (logprobs, sampled{again}, {twin})" for again in ("", ", a second call")} <= names


def test_both_twins_search_alike():
    rung = beams.check(Evidence(small("textbook-decoder")))
    assert rung.verdict == "agree", rung.problems
    assert rung.checked.startswith("80 hypotheses, ")
    names = {one.name for one in rung.comparisons}
    for twin in ("torch_impl", "flax_impl"):
        assert {f"Generator (logprobs, greedy, {twin})", f"score (greedy, {twin})"} <= names
        assert f"score (bfloat16, {twin})" in names


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("t5", {}),
        ("textbook-encoder-decoder", {}),
        ("llama", {"window": 3}),
        ("gpt2", {"context_length": 6}),
        ("llama", {"vocab_size": 3}),
        ("gpt2", {"position_counting": "places"}),
        ("llama", {"position_counting": "places", "window": 3}),
        ("t5", {"position_counting": "places"}),
        ("textbook-encoder-decoder", {"position_counting": "places"}),
    ],
)
@pytest.mark.parametrize("rung", [sampling, beams])
def test_other_models_write_as_the_reference_has_it(rung, name, changes):
    found = rung.check(torch_twice(small(name, **changes)))
    assert found.verdict == "agree", found.problems


@pytest.mark.parametrize(("rung", "searches"), [(sampling, 0), (beams, 5)])
def test_what_both_twins_are_held_against_is_computed_once(rung, searches, monkeypatch):
    """Where the texts end, and every search by hand."""
    asked = {"with_ends": 0, "by_hand": 0}

    def counted(name):
        ask = getattr(writing_checks, name)

        def counting(*arguments):
            asked[name] += 1
            return ask(*arguments)

        return counting

    for name in asked:
        monkeypatch.setattr(writing_checks, name, counted(name))
    assert rung.check(Evidence(small("textbook-decoder"), (TorchTwin(), Second()))).verdict == "agree"
    assert asked == {"with_ends": 1, "by_hand": searches}


@pytest.mark.parametrize("rung", [sampling, beams])
def test_an_encoder_does_not_apply(rung):
    assert rung.check(torch_twice(small("bert"))).verdict == "does not apply"


def test_scenarios_end_at_different_places():
    case, writing = sampling.prepared(small("textbook-decoder"))
    from twinformer.parity.writing_checks import with_ends

    greedy, sampled, _ = with_ends(TorchTwin(), case, writing)
    with TorchTwin().writers(case) as make:
        found = [
            make(case).generate(writing.prompts, **writing.options(), **one.options()) for one in (greedy, sampled)
        ]
    for one in found:
        assert one.finished.any()
        assert len(set(one.lengths.tolist())) > 1
    assert len(sampled.stop.tokens) > 1
    last = [row[length - 1] for row, length in zip(found[1].tokens, found[1].lengths, strict=True)]
    assert set(last) & set(sampled.stop.tokens[1:])


# ---- it can fail

DEFINITIONS = {
    "C6": "TopP",
    "C11": "processors",
    "T106": "processors",
    "T107": "TopK",
    "T108": "MinP",
    "T109": "RepetitionPenalty",
    "T110": "Temperature",
    "T111": "greedy",
    "T112": "draw",
    "T113": "draw",
    "T114": "uniforms",
    "T115": "uniforms",
    "T116": "uniforms",
    "T117": "uniforms",
    "T118": "Generator",
    "T119": "Generator",
    "T120": "Generator",
    "T121": "Generator",
    "T122": "Generator",
    "T163": "Generator",
    "T164": "Generator",
    "T168": "Generator",
    "T169": "Generator",
    "T170": "greedy",
    "T171": "draw",
}
SEARCHES = {
    "C8": "beam_search",
    "C10": "beam_search",
    "T123": "score",
    "T124": "beam_search",
    "T125": "beam_search",
    "T126": "beam_search",
    "T127": "beam_search",
    "T128": "beam_search",
    "T160": "Generator.stream",
    "T161": "Generator.stream",
    "T162": "score",
    "T165": "beam_search",
    "T166": "score",
    "T167": "beam_search",
    "T172": "score",
}


@pytest.mark.parametrize("name", [*DEFINITIONS, *SEARCHES])
def test_two_that_are_wrong_alike_are_found(name):
    rung = sampling if name in DEFINITIONS else beams
    mutant = planted(name)
    with mutant.plant():
        found = rung.check(torch_twice(CASES[mutant.case]()))
    assert found.verdict == "differ"
    assert found.culprits == [(DEFINITIONS | SEARCHES)[name]]


def numbers_of_the_first_steps_again(monkeypatch):
    right = torch_impl.generation.uniforms
    monkeypatch.setattr(torch_impl.generation, "uniforms", lambda keys, steps: right(keys, steps % 32))


def last_slots_not_looked_at(monkeypatch):
    right = torch_impl.cache._round_up

    def down(count, multiple):
        looks = sys._getframe(1).f_globals["__name__"] == "torch_impl.cache"  # a generator makes caches with it
        return max(count // multiple, 1) * multiple if looks else right(count, multiple)

    monkeypatch.setattr(torch_impl.cache, "_round_up", down)


@pytest.mark.parametrize("plant", [numbers_of_the_first_steps_again, last_slots_not_looked_at])
def test_texts_are_longer_than_what_is_made_at_a_time(plant, monkeypatch):
    """Random numbers come for 32 steps at a time, slots of a cache are looked at by 64."""
    plant(monkeypatch)
    rung = sampling.check(torch_twice(small("gpt2", vocab_size=400, context_length=80)))
    assert rung.verdict == "differ"
    assert rung.culprits[0] == "Generator"


@pytest.mark.parametrize("name", ["gpt2", "textbook-encoder-decoder"])
@pytest.mark.parametrize("counting", ["real", "places"])
def test_prompts_packed_as_the_other_counting_has_it(name, counting, monkeypatch):
    """Holes closed where they count as places, or left open where they do not."""
    case = small(name, position_counting=counting, **({"window": 3} if counting == "real" else {}))
    right = torch_impl.generation._Runner.kept

    def all_up_to_the_last(real):
        return np.logical_or.accumulate(real[:, ::-1], 1)[:, ::-1]

    def wrong(self, real):
        return real if counting == "places" else all_up_to_the_last(real)

    monkeypatch.setattr(torch_impl.generation._Runner, "kept", wrong)
    rung = sampling.check(torch_twice(case))
    assert rung.verdict == "differ"
    assert rung.culprits == ["Generator"]
    monkeypatch.setattr(torch_impl.generation._Runner, "kept", right)
    assert sampling.check(torch_twice(case)).verdict == "agree"


def test_both_twins_count_places():
    case = small("gpt2", position_counting="places")
    for rung in (sampling, beams):
        found = rung.check(Evidence(case))
        assert found.verdict == "agree", found.problems


class Changed(Other):
    """What it wrote, or found, is changed afterwards."""

    def __init__(self, what, change):
        super().__init__(UNHARMED)
        self.what, self.change = what, change

    def once(self, what, case, ask):
        found = super().once(what, case, ask)
        return self.change(found) if what.startswith(self.what) else found


def moved(name, place, off):
    def change(found):
        values = getattr(found, name).copy()
        values[place] += off
        return dataclasses.replace(found, **{name: values})

    return change


@pytest.mark.parametrize(
    ("rung", "what", "change", "named"),
    [
        (beams, "write greedy", moved("logprobs", (0, 0), 1e-10), "Generator"),
        (beams, "write greedy", moved("lengths", 0, -1), "Generator"),
        (sampling, "write sampled", moved("logprobs", (0, 0), 1e-10), "Generator"),
        (sampling, "write sampled", moved("tokens", (1, 0), 1), "Generator"),
        (sampling, "write sampled", lambda found: dataclasses.replace(found, finished=~found.finished), "Generator"),
        (beams, "search mean", moved("scores", (0, 1), 1e-8), "beam_search"),
        (beams, "search mean", moved("logprobs", (2, 0), -1e-8), "beam_search"),
        (beams, "search gnmt", lambda found: dataclasses.replace(found, finished=~found.finished), "beam_search"),
        (
            beams,
            "search all equal",
            lambda found: dataclasses.replace(found, tokens=found.tokens[:, ::-1]),
            "beam_search",
        ),
        (beams, "score", lambda found: found * (1 + 1e-11), "score"),
        (beams, "stream", lambda steps: [(tokens + 1, live) for tokens, live in steps], "Generator.stream"),
        (beams, "stream sampled", lambda steps: [(tokens, ~live) for tokens, live in steps], "Generator.stream"),
        (beams, "search long", moved("logprobs", (0, 1), 1e-7), "beam_search"),
    ],
)
def test_little_is_enough(rung, what, change, named):
    case = small("textbook-decoder", context_length=80 if what == "search long" else 32)
    found = rung.check(Evidence(case, (UNHARMED, Changed(what, change))))
    assert found.verdict == "differ"
    assert found.culprits == [named]
    assert all(text.startswith("other: ") or "other" in text for text in found.problems)


def test_rounding_is_no_difference():
    twins = (UNHARMED, Changed("write sampled", moved("logprobs", (0, 0), 1e-13)))
    assert sampling.check(Evidence(small("textbook-decoder"), twins)).verdict == "agree"
    twins = (UNHARMED, Changed("search mean", moved("scores", (0, 1), 1e-12)))
    assert beams.check(Evidence(small("textbook-decoder"), twins)).verdict == "agree"


def test_log_probabilities_near_0_keep_the_rounding_of_logits():
    """Of a model that is certain they are differences of nearly equal numbers (found by chance)."""
    expected = np.array([[-2e-8, 0.0]])
    assert compared("certain", expected + 2e-15, expected).agrees
    assert not compared("certain", expected + 2e-12, expected).agrees
    assert not compared("not so", np.array([-20.0]) + 1e-10, np.array([-20.0])).agrees
