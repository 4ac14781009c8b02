"""Every published family that writes, token for token: both twins' caches against ``transformers``, in float64.

Greedy, from prompts padded on the left or from sources padded on every side, past windows and buckets. Each step's
logits are those of one call of the library without a cache.
"""

import functools

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import torch_impl
from parity_tests import published_decoders as decoders
from parity_tests import published_seq2seq as seq2seq
from parity_tests.helpers import FLAX, TORCH
from parity_tests.published_decoders import publish
from parity_tests.published_witness import wide
from parity_tests.published_writing import (
    Written,
    errors,
    examine,
    has_right_cache,
    lively,
    ours,
    prompted,
    sourced,
    theirs,
)
from parity_tests.readers import build
from twinformer import pretrained

#: relative to the largest magnitude of each step's logits
BOUND = 1e-11
OWN_HEAD = "1.1, a head of its own"
CASES = [(family, name) for family, kind in decoders.KINDS.items() for name in list(kind.cases)[:2]]
CASES += [("mistral", "window of one"), ("phi3", "window"), ("qwen2", "window by block"), ("t5", OWN_HEAD)]
CASES += [(family, name) for family, kind in seq2seq.KINDS.items() for name in kind.cases]
#: one case of each family, compiled
FLAX_CASES = {
    "gpt2": "untied",
    "llama": "biases",
    "mistral": "window",
    "qwen2": "window by block",
    "qwen3": "window above",
    "gemma": "biases",
    "gemma2": "plain",
    "gemma3_text": "new bases",
    "phi3": "window",
    "mt5": "plain",
    "bart": "scaled",
    "mbart": "scaled",
    "marian": "two vocabularies",
    "m2m_100": "plain",
}
#: of weights under which more than one text is written
SEEDS = {("mbart", "plain"): 1, ("marian", "plain"): 1, ("marian", "scaled swish"): 1}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A directory as the library saves it, what is asked, and what the library writes."""

    @functools.cache
    def make(family, name):
        place = tmp_path_factory.mktemp(family) / "model"
        if family in decoders.KINDS:
            kind = decoders.KINDS[family]
            model = kind.model(kind.settings(name))
            publish(model, place)
            task = prompted(model)
        else:
            if name == OWN_HEAD:
                model = with_own_head(place)
            else:
                model = lively(seq2seq.KINDS[family].make(name, SEEDS.get((family, name), 0)))
                model.save_pretrained(place)
            task = sourced(family, model)
        return place, task, theirs(model, task, use_cache=has_right_cache(model.config))

    return make


def with_own_head(place):
    """T5 1.1 as published: a gated GELU, and a head that repeats nothing and is not scaled."""
    settings = seq2seq.KINDS["t5"].cases["gated, unscaled"]
    model = seq2seq.KINDS["t5"].make(settings)
    model.save_pretrained(place)
    tensors = load_file(place / "model.safetensors")
    own = np.random.default_rng(0).standard_normal(tensors["shared.weight"].shape) * 0.3
    save_file(tensors | {"lm_head.weight": own}, place / "model.safetensors", {"format": "pt"})
    with wide():
        loaded = type(model).from_pretrained(place, dtype=torch.float64, attn_implementation="eager").eval()
    assert np.array_equal(loaded.lm_head.weight.detach().numpy(), own)
    assert pretrained.read(place).config.head == "untied"
    return loaded


def assert_the_same(found):
    assert found["tokens"] == 0, f"{found['tokens']:.0f} tokens differ"
    worst = max(found, key=lambda name: found[name])
    assert found[worst] <= BOUND, f"{worst}: off by {found[worst]:.3e} of its largest magnitude"


@pytest.mark.parametrize(("family", "name"), CASES)
def test_tokens_and_logits_of_every_step(family, name, case):
    place, task, wanted = case(family, name)
    assert len({tuple(row) for row in wanted.tokens.tolist()}) > 1, "prompts and sources that matter"
    assert_the_same(examine(TORCH, place, task, wanted))


@pytest.mark.parametrize(("family", "name"), [*FLAX_CASES.items(), ("t5", "1.0"), ("t5", OWN_HEAD)])
def test_tokens_and_logits_of_every_step_in_flax(family, name, case):
    place, task, wanted = case(family, name)
    assert_the_same(examine(FLAX, place, task, wanted))


def test_every_family_that_writes_is_here():
    writes = {name for name, family in pretrained.FAMILIES.items() if name not in ("bert", "distilbert", "roberta")}
    assert {family for family, _ in CASES} == {*FLAX_CASES, "t5"} == writes


# ---- what the comparison is worth


def _choose(**changes):
    return lambda config, tensors: (config.replace(**changes), tensors)


def _scale(path, factor=1 + 1e-9):
    return lambda config, tensors: (config, tensors | {path: tensors[path] * factor})


FAULTS = {
    ("gpt2", "untied"): {
        "places counted": _choose(position_counting="places"),
        "a head off by 1e-9": _scale("head.weight"),
    },
    ("mistral", "window"): {"window of 5": _choose(window=5), "no window": _choose(window=None)},
    ("gemma2", "plain"): {"windows elsewhere": _choose(window_layers=(1,))},
    ("gemma3_text", "new bases"): {"one base": _choose(window_rotary_base=None)},
    ("phi3", "window"): {"window of 3": _choose(window=3)},
    ("t5", OWN_HEAD): {"scaled": _choose(head_scale=12**-0.5)},
    ("mt5", "plain"): {"real tokens counted": _choose(position_counting="real")},
    ("bart", "scaled"): {"real tokens counted": _choose(position_counting="real")},
    ("marian", "plain"): {"spaced otherwise": _choose(sinusoid_spacing="endpoint")},
    ("m2m_100", "plain"): {
        "places counted": _choose(position_counting="places"),
        "a table off by 1e-9": _scale("source_embedding.tokens.weight"),
    },
}


@pytest.mark.parametrize(
    ("family", "name", "fault"), [(*where, fault) for where, faults in FAULTS.items() for fault in faults]
)
def test_a_planted_fault_is_seen(family, name, fault, case):
    place, task, wanted = case(family, name)
    read = pretrained.read(place)
    found = errors(ours(TORCH, build(TORCH, *FAULTS[family, name][fault](read.config, read.tensors)), task), wanted)
    assert max(error for told, error in found.items() if told != "tokens") > 10 * BOUND
    assert found["tokens"] == 0 or "1e-9" not in fault, "so little no token shows"
    with pytest.raises(AssertionError, match=r"tokens differ|off by"):
        assert_the_same(found)


def _beside(cache, config, T, real, positions, end, right=torch_impl.cache._begin):
    """Every token after the prompt stands one place too far, in rows that were padded."""
    if T > 1:
        cache["padded"] = ~real.all(-1)
        return right(cache, config, T, real, positions, end)
    return right(cache, config, T, real, (cache["counted"] + cache["padded"])[:, None], end)


def test_a_wrong_place_after_padding_is_seen_from_the_first_step_that_has_it(case, monkeypatch):
    place, task, wanted = case("gpt2", "untied")
    monkeypatch.setattr(torch_impl.cache, "_begin", _beside)
    found = examine(TORCH, place, task, wanted)
    assert found["logits 0"] <= BOUND
    assert all(found[f"logits {t}"] > 1e-3 for t in range(1, task.new))
    assert found["tokens"] > 0


def test_another_beginning_or_an_unhidden_source_is_seen(case):
    place, task, wanted = case("m2m_100", "plain")
    read = pretrained.read(place)
    model = build(TORCH, read.config, read.tensors)
    for changes in (
        {"prompts": task.prompts[:, :1]},
        {"prompts": np.where(np.arange(2) == 1, 9, task.prompts)},
        {"prompts": np.where(np.arange(2) == 0, 3, task.prompts)},
        {"inputs": {"source": task.inputs["source"]}},
    ):
        other = type(task)(**{**vars(task), **changes})
        assert errors(ours(TORCH, model, other), wanted)["logits 0"] > 1e-3


@pytest.mark.parametrize("place", [(0, 0, 0), (1, 3, 4), (-1, -1, -1)])
def test_one_logit_of_one_step_counts(place, case):
    _, _, wanted = case("llama", "plain")
    logits = wanted.logits.copy()
    logits[place] += 1.01e-11 * np.abs(logits[:, place[1]]).max()
    off = [name for name, error in errors(Written(wanted.tokens, logits), wanted).items() if error > BOUND]
    assert off == [f"logits {place[1] % logits.shape[1]}"]
