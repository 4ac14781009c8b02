"""Decoder-only families as published: both twins against ``transformers`` in float64, every gradient, and back."""

import dataclasses
import functools

import pytest
import torch
from safetensors.numpy import load_file

from parity_tests.helpers import FLAX, TORCH, assert_close
from parity_tests.published_decoders import KINDS, publish
from parity_tests.published_witness import errors, examine, in_our_terms, ours, padded, theirs, wide
from twinformer import pretrained

#: relative to the largest magnitude of each tensor: rounding stays at 1e-14, a mistake is far above
BOUND = 1e-11
CASES = [
    (family, case)
    for family, kind in KINDS.items()
    for case in kind.cases
    if case not in ("linear, new", "llama3, new")  # test_pretrained_decoder_fields.py: the same as in old spelling
]
#: compiled once for each family, so that each has one rich case in Flax
RICH = {
    "gpt2": "untied",
    "llama": "biases",
    "mistral": "window",
    "qwen2": "window by block",
    "qwen3": "window above",
    "gemma": "biases",
    "gemma2": "plain",
    "gemma3_text": "new bases",
    "phi3": "window",
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A model, its directory as the library saves it, tokens and padding, and what the model makes of them."""

    @functools.cache
    def make(family, name, which=0):
        kind = KINDS[family]
        settings = kind.settings(name)
        model = kind.model(settings, class_name=kind.classes[which])
        directory = publish(model, tmp_path_factory.mktemp(family))
        tokens, real = padded(3, model.config.vocab_size, 17)
        return model, directory, tokens, real, theirs(model, tokens, real)

    return make


def assert_small(found):
    worst = max(found, key=lambda name: found[name])
    assert found[worst] <= BOUND, f"{worst}: off by {found[worst]:.3e} of its largest magnitude"


@pytest.mark.parametrize(("family", "name"), CASES)
def test_all_that_transformers_computes(family, name, case):
    """Every layer's output, logits, loss and gradients; from the directory as saved, and from settings as spelled."""
    model, directory, tokens, real, expected = case(family, name)
    found = examine(TORCH, directory, model, tokens, real, expected)
    assert {"layer 0", "layer 2", "output", "loss", "gradient embedding.tokens.weight"} <= found.keys()
    assert_small(found)
    read = pretrained.read(directory)
    assert (read.family, read.unknown_fields, read.left_out) == (family, (), ())
    kind = KINDS[family]
    spelled = publish(model, directory.with_name(directory.name + "-spelled"), kind.settings(name))
    assert pretrained.read(spelled).config == read.config


@pytest.mark.parametrize("family", KINDS)
def test_all_that_transformers_computes_in_flax(family, case):
    model, directory, tokens, real, expected = case(family, RICH[family])
    assert_small(examine(FLAX, directory, model, tokens, real, expected))


@pytest.mark.parametrize(
    ("family", "which"), [(family, i) for family, kind in KINDS.items() for i in range(1, len(kind.classes))]
)
def test_each_head(family, which, case):
    """The bare model, labels of a sequence, labels of each token: there and back."""
    model, directory, tokens, real, expected = case(family, RICH[family], which)
    read = pretrained.read(directory)
    assert read.config.head == ("none", "sequence", "tokens")[which - 1]
    assert_small(examine(TORCH, directory, model, tokens, real, expected))
    assert_returns(model, directory, tokens, real, expected)


def assert_returns(model, directory, tokens, real, expected):
    """Written again: the same file bit for bit, which the library loads whole and computes the same with."""
    read = pretrained.read(directory)
    back = directory.with_name(directory.name + "-back")
    pretrained.write(back, read.config, read.tensors, family=read.family)
    before, after = load_file(directory / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert (array.dtype, array.shape, array.tobytes()) == (
            after[name].dtype,
            after[name].shape,
            after[name].tobytes(),
        ), name
    assert pretrained.read(back).config == read.config
    with wide():
        loaded, report = type(model).from_pretrained(
            back, dtype=torch.float64, attn_implementation="eager", output_loading_info=True
        )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    loaded.config.pad_token_id = model.config.pad_token_id  # whose row says where a sequence ends: not the model's
    again = theirs(loaded.eval(), tokens, real)
    assert_close(
        again["output"][real] if again["output"].ndim == 3 else again["output"],
        expected["output"][real] if expected["output"].ndim == 3 else expected["output"],
        1e-14,
    )


@pytest.mark.parametrize(("family", "name"), CASES)
def test_there_and_back(family, name, case):
    assert_returns(*case(family, name))


# ---- what the comparison is worth


def _swap(first, second):
    return lambda config, tensors: (config, tensors | {first: tensors[second], second: tensors[first]})


def _choose(**changes):
    return lambda config, tensors: (config.replace(**changes), tensors)


def _scale(path, factor=1 + 1e-9):
    return lambda config, tensors: (config, tensors | {path: tensors[path] * factor})


_QKV = "stack.blocks.1.attention."
FAULTS = {
    ("gpt2", "untied"): {
        "query and key swapped": _swap(_QKV + "query.weight", _QKV + "key.weight"),
        "other gelu": _choose(activation="gelu_tanh"),
        "a head off by 1e-9": _scale("head.weight"),
    },
    ("gpt2", "unscaled"): {"scaled": _choose(attention_scale=None)},
    ("llama", "yarn, whole"): {
        "ends rounded": lambda config, tensors: (
            config.replace(rotary_scaling=dataclasses.replace(config.rotary_scaling, truncate=True)),
            tensors,
        ),
        "base off by 1e-9": _choose(rotary_base=300.0 * (1 + 1e-9)),
        "pairs side by side": _choose(rotary_convention="interleaved"),
    },
    ("mistral", "window"): {"window of 5": _choose(window=5), "no window": _choose(window=None)},
    ("phi3", "a part turns"): {"less turns": _choose(rotary_dim=4)},
    ("gemma", "plain"): {
        "plain norm weights": _choose(norm_weight="plain"),
        "scale off by 1e-9": _choose(embedding_scale=31**0.5 * (1 + 1e-9)),
    },
    ("gemma2", "plain"): {
        "windows elsewhere": _choose(window_layers=(1,)),
        "norms swapped": _swap("stack.blocks.0.attention_norm.weight", "stack.blocks.0.attention_post_norm.weight"),
        "scores not capped": _choose(attention_softcap=None),
        "logits not capped": _choose(head_softcap=None),
        "scale of the head": _choose(attention_scale=None),
    },
    ("gemma3_text", "new bases"): {
        "one base": _choose(window_rotary_base=None),
        "head norms swapped": _swap(_QKV + "query_norm.weight", _QKV + "key_norm.weight"),
    },
}


@pytest.mark.parametrize(
    ("family", "name", "fault"), [(*where, fault) for where, faults in FAULTS.items() for fault in faults]
)
def test_a_planted_fault_is_seen(family, name, fault, case):
    _, directory, tokens, real, expected = case(family, name)
    read = pretrained.read(directory)
    config, tensors = FAULTS[family, name][fault](read.config, read.tensors)
    found = errors(ours(TORCH, config, tensors, tokens, real), in_our_terms(read, expected), real)
    assert max(found.values()) > 10 * BOUND
