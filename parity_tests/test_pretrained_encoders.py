"""BERT, DistilBERT and RoBERTa with heads: both twins against ``transformers`` in float64, gradients too, and back."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from parity_tests.helpers import FLAX, TORCH, assert_close, both, gradients, random_array, to_numpy
from parity_tests.published_witness import errors, in_our_terms, scattered, wide
from parity_tests.readers import build, walk
from twinformer import ConfigError, WeightsError, pretrained

BOUND = 1e-11
B, T = 4, 9
SIZES = {
    "vocab_size": 37,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
}
HEADS = {
    "Model": "none",
    "ForMaskedLM": "tied",
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "tokens",
    "ForQuestionAnswering": "tokens",
}
SETTINGS = {
    "bert": {"type_vocab_size": 3, "layer_norm_eps": 1e-3},
    "roberta": {"type_vocab_size": 1, "pad_token_id": 1},
    "distilbert": {"hidden_dim": 20, "dropout": 0.25, "qa_dropout": 0.375, "seq_classif_dropout": 0.5},
}
STEMS = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}
#: further settings of DistilBERT: one head, odd and wide; sinusoids; each activation
DISTILBERTS = {
    "one head": {
        "num_attention_heads": 1,
        "hidden_size": 7,
        "hidden_dim": 3,
        "num_hidden_layers": 1,
        "activation": "relu",
    },
    "sinusoids": {"sinusoidal_pos_embds": True, "activation": "gelu_new", "num_hidden_layers": 3},
    "untied": {"tie_word_embeddings": False, "activation": "silu"},
}


pytestmark = pytest.mark.usefixtures("one_thread")


def published(family, head, place, **changes):
    """A random model of the library, saved."""
    labels = {"num_labels": 3} if "Classification" in head else {}
    sizes = {name: size for name, size in SIZES.items() if family != "distilbert" or name != "intermediate_size"}
    config = getattr(transformers, f"{STEMS[family]}Config")(**sizes | SETTINGS[family] | labels | changes)
    model = scattered(getattr(transformers, f"{STEMS[family]}{head}"), config)
    if hasattr(model, "cls") and not config.tie_word_embeddings:  # one bias, of two names
        model.cls.predictions.bias.data = model.cls.predictions.decoder.bias.data.clone()
    if hasattr(model, "lm_head") and not config.tie_word_embeddings:
        model.lm_head.bias.data = model.lm_head.decoder.bias.data.clone()
    if head == "Model":  # nothing reads the pooler here
        model.pooler = None
    model.save_pretrained(place)
    return model


def drawn(family, seed):
    """A random class of the library, and random settings, as far as it has them."""
    rng = np.random.default_rng(seed)
    heads, act = int(rng.integers(1, 5)), str(rng.choice(["gelu", "gelu_new", "relu", "silu"]))
    head = str(rng.choice(list(HEADS)))
    found = {
        # at least 4: a norm of fewer numbers leaves little but their signs, and rounding for a gradient
        "hidden_size": heads * int(rng.integers(4, 8)),
        "num_hidden_layers": int(rng.integers(1, 4)),
        "num_attention_heads": heads,
        "max_position_embeddings": int(rng.integers(T + 3, 30)),
    }
    if head == "ForMaskedLM" and act == "relu":
        # where a narrow head's ReLU lets hardly anything through, the gradients behind it are rounding: the library's
        # own change by 1e-4 of themselves where weights change in their last bit
        act = "silu"
    inner, tied = int(rng.integers(2, 30)), bool(rng.integers(2))
    if family == "distilbert":
        found |= {"hidden_dim": inner, "activation": act, "sinusoidal_pos_embds": bool(rng.integers(2))}
    else:
        found |= {"intermediate_size": inner, "layer_norm_eps": float(rng.choice([1e-12, 1e-5, 1e-3]))}
        # (RoBERTa's head of masked tokens has the erf GELU always)
        found["hidden_act"] = "gelu" if (family, head) == ("roberta", "ForMaskedLM") else act
        found["type_vocab_size"] = int(rng.integers(1, 4))
    return head, found | ({"tie_word_embeddings": tied} if head == "ForMaskedLM" else {})


def inputs(left=True):
    """A full row, one padded on the right, one on the left (or on the right), one with a hole and padding around."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(2, 37, (B, T))
    real = np.ones((B, T), bool)
    real[1, 6:] = False
    real[2, 1:] = False
    if left:
        real[2] = ~real[2]
        real[3, [0, 4, 5, 8]] = False
    tokens[~real] = 1  # what RoBERTa takes for padding
    return tokens, real


def output_of(found):
    if hasattr(found, "start_logits"):
        return torch.stack((found.start_logits, found.end_logits), -1)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def labels_of(model, tokens, real):
    """What the library takes for labels, where we have the same loss: of tokens, of masked tokens, of a sequence."""
    rng = np.random.default_rng(8)
    name = type(model).__name__
    if name.endswith("MaskedLM"):
        return np.where(real & (rng.random(tokens.shape) < 0.6), tokens, -100)
    if name.endswith("TokenClassification"):
        return np.where(real, rng.integers(0, 3, tokens.shape), -100)
    return rng.integers(0, 3, len(tokens)) if name.endswith("SequenceClassification") else None


def theirs(model, cotangent, tokens, real):
    labels = labels_of(model, tokens, real)
    with wide():
        found = model(
            torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(real.astype(np.int64)),
            output_hidden_states=True,
            **({} if labels is None else {"labels": torch.from_numpy(labels)}),
        )
        output = output_of(found)
        named = dict(model.named_parameters())
        loss = (output * torch.from_numpy(cotangent)).sum()
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    result = {f"layer {i}": to_numpy(state) for i, state in enumerate(found.hidden_states)}
    result |= {"output": to_numpy(output)} | ({} if labels is None else {"loss": to_numpy(found.loss)})
    return result | {f"gradient {name}": to_numpy(grad) for name, grad in zip(named, grads, strict=True)}


def examine(twin, model, place):
    """The largest error of every layer, output, loss and gradient, relative to the largest magnitude there."""
    read = pretrained.read(place)
    # the library labels a sequence by what stands in its first place, be it padding
    tokens, real = inputs(left=read.config.head != "sequence")
    shape = read.config.output_shape(B, T)
    cotangent = random_array(7, *shape) * (real[..., None] if len(shape) == 3 else 1.0)
    expected = in_our_terms(read, theirs(model, cotangent, tokens, real))
    native, mask = twin.array(tokens), twin.array(real)
    ours = build(twin, read.config, read.tensors)
    out, grads = gradients(twin, lambda m: m(native, padding_mask=mask), {}, ours, cotangent)
    states = {f"layer {i}": state for i, state in enumerate(walk(twin, ours, tokens, real))}
    labels = labels_of(model, tokens, real)
    if labels is not None:
        cross_entropy, mean_loss = twin.file("losses").cross_entropy, twin.file("losses").mean_loss
        logits = out if out.ndim == 3 else out[:, None]
        labels = labels if out.ndim == 3 else labels[:, None]
        total, count = cross_entropy(
            twin.array(logits), twin.array(np.maximum(labels, 0)), real=twin.array(labels >= 0)
        )
        states["loss"] = to_numpy(mean_loss(total, count))
    return errors(states | {"output": out} | {f"gradient {path}": grad for path, grad in grads.items()}, expected, real)


def assert_small(found):
    worst = max(found, key=lambda name: found[name])
    assert found[worst] <= BOUND, f"{worst}: off by {found[worst]:.3e} of its largest magnitude"


@pytest.mark.parametrize("family", SETTINGS)
@pytest.mark.parametrize("head", HEADS)
def test_each_head(family, head, tmp_path):
    """Output and every gradient; then written again, which the library loads whole and computes the same with."""
    model = published(family, head, tmp_path / "model")
    read = pretrained.read(tmp_path / "model")
    assert (read.config.head, read.unknown_fields, read.left_out) == (HEADS[head], (), ())
    assert_small(examine(TORCH, model, tmp_path / "model"))
    back = tmp_path / "back"
    pretrained.write(back, read.config, read.tensors, family=family)
    before, after = load_file(tmp_path / "model" / "model.safetensors"), load_file(back / "model.safetensors")
    answers = family != "distilbert"  # DistilBERT's have a rate of their own, which those of tokens cannot have
    renamed = {name.replace("qa_outputs", "classifier") if answers else name: a for name, a in before.items()}
    assert {name: array.tobytes() for name, array in renamed.items()} == {n: a.tobytes() for n, a in after.items()}
    again = pretrained.read(back).config
    if head == "ForQuestionAnswering" and answers:  # written as labels of tokens, which is what they are
        assert again.num_labels == 2
        return
    assert again == read.config
    if head == "Model":  # the library would make a pooler of its own
        return
    tokens, real = inputs()
    arguments = (torch.from_numpy(tokens), torch.from_numpy(real.astype(np.int64)))
    with wide(), torch.no_grad():
        loaded, report = type(model).from_pretrained(
            back, dtype=torch.float64, attn_implementation="eager", output_loading_info=True
        )
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
        assert_close(output_of(loaded.eval()(*arguments)), output_of(model(*arguments)), 1e-13)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("family", SETTINGS)
def test_random_settings(family, seed, tmp_path):
    head, settings = drawn(family, seed)
    model = published(family, head, tmp_path / "model", **settings)
    assert_small(examine(TORCH, model, tmp_path / "model"))
    read = pretrained.read(tmp_path / "model")
    pretrained.write(tmp_path / "back", read.config, read.tensors, family=family)
    again = pretrained.read(tmp_path / "back")
    assert all(again.tensors[path].tobytes() == leaf.tobytes() for path, leaf in read.tensors.items())
    if head != "ForQuestionAnswering":  # written as labels of tokens, which drop something
        assert again.config == read.config


@pytest.mark.parametrize("family", SETTINGS)
def test_heads_in_flax(family, tmp_path):
    for head in HEADS if family == "distilbert" else ("ForMaskedLM", "ForSequenceClassification"):
        model = published(family, head, tmp_path / head)
        assert_small(examine(FLAX, model, tmp_path / head))


def test_positions_of_roberta_are_counted_from_its_padding_id(tmp_path):
    published("roberta", "Model", tmp_path / "model", pad_token_id=4)
    config = pretrained.read(tmp_path / "model").config
    assert (config.position_offset, config.context_length) == (5, 11)


def test_what_cannot_be(tmp_path):
    published("roberta", "ForMaskedLM", tmp_path / "model", hidden_act="relu")
    with pytest.raises(ConfigError, match=r"hidden_act: expected 'gelu' with a head of masked tokens.*got 'relu'"):
        pretrained.read(tmp_path / "model")
    published("roberta", "ForMaskedLM", tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    wrong = tensors["lm_head.bias"] + 1
    save_file(tensors | {"lm_head.decoder.bias": wrong}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(WeightsError, match=r"lm_head.decoder.bias: expected the values of lm_head.bias"):
        pretrained.read(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2}))
    with pytest.raises(ConfigError, match=r"max_position_embeddings: expected more than pad_token_id \+ 1 = 2, got 2"):
        pretrained.read(tmp_path / "other")


@both
@pytest.mark.parametrize("case", DISTILBERTS)
def test_distilberts(twin, case, tmp_path):
    model = published("distilbert", "ForMaskedLM", tmp_path / "model", **DISTILBERTS[case])
    assert_small(examine(twin, model, tmp_path / "model"))
    read = pretrained.read(tmp_path / "model")
    assert (read.unknown_fields, read.left_out) == ((), ())
    pretrained.write(tmp_path / "back", read.config, read.tensors, family="distilbert")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "back"))
    assert {name: a.tobytes() for name, a in before.items()} == {name: a.tobytes() for name, a in after.items()}
    assert pretrained.read(tmp_path / "back").config == read.config


def test_rates_of_distilbert(tmp_path):
    """Each head has its own; labels of tokens that are written as such have that of the blocks."""
    rates = {"ForMaskedLM": 0.0, "ForTokenClassification": 0.25, "ForQuestionAnswering": 0.375}
    for head, rate in (rates | {"ForSequenceClassification": 0.5}).items():
        published("distilbert", head, tmp_path / head)
        config = pretrained.read(tmp_path / head).config
        assert (config.head_dropout, config.dropout, config.norm_eps) == (rate, 0.25, 1e-12)
    config = pretrained.read(tmp_path / "ForTokenClassification").config.replace(head_dropout=0.125)
    leaves = pretrained.read(tmp_path / "ForTokenClassification").tensors
    with pytest.raises(ConfigError, match=r"head_dropout: expected 0.25, got 0.125"):
        pretrained.write(tmp_path / "no", config, leaves, family="distilbert")


@pytest.mark.parametrize(
    ("head", "changes", "told"),
    [
        ("Model", {"dim": 13, "activation": "quick_gelu"}, ["activation: expected one of"]),
        ("Model", {"dim": 13}, ["dim: expected a multiple of n_heads=3, got 13"]),
        ("Model", {"pruned_heads": {"0": [1]}, "is_decoder": True, "n_layers": 0}, ["pruned_heads", "is_decoder"]),
        ("ForQuestionAnswering", {"id2label": {"0": "a", "1": "b", "2": "c"}}, ["num_labels: expected 2", "got 3"]),
        ("Model", {"dropout": 1.5, "attention_dropout": -1}, ["dropout: expected a rate", "attention_dropout: expec"]),
    ],
)
def test_what_distilbert_cannot_be(head, changes, told, tmp_path):
    """Refused before the weights are opened: there are none."""
    published("distilbert", head, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ConfigError) as caught:
        pretrained.read(tmp_path)
    assert all(text in str(caught.value) for text in told), str(caught.value)


@both
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_head_of_its_own_with_both_names_of_its_bias(twin, family, tmp_path):
    """Untied, the file holds the bias of the logits twice: as the head's and as the matrix's, which is the one used."""
    model = published(family, "ForMaskedLM", tmp_path / "model", tie_word_embeddings=False)
    assert {"decoder.bias", "decoder.weight"} <= {
        ".".join(name.split(".")[-2:]) for name in load_file(tmp_path / "model" / "model.safetensors")
    }
    read = pretrained.read(tmp_path / "model")
    assert (read.config.head, read.left_out) == ("untied", ())
    tokens, real = inputs()
    with wide(), torch.no_grad():
        expected = model(torch.from_numpy(tokens), attention_mask=torch.from_numpy(real.astype(np.int64))).logits
    ours = twin.file("weights").from_pretrained(tmp_path / "model", dtype="float64")
    assert_close(
        to_numpy(ours(twin.array(tokens), padding_mask=twin.array(real)))[real], to_numpy(expected)[real], 1e-11
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("family", "bias", "copy"),
    [
        ("bert", "cls.predictions.bias", "cls.predictions.decoder.bias"),
        ("roberta", "lm_head.bias", "lm_head.decoder.bias"),
    ],
)
def test_the_other_name_of_the_bias_repeats_it_or_is_refused(family, bias, copy, tied, tmp_path):
    published(family, "ForMaskedLM", tmp_path, tie_word_embeddings=tied)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {copy: tensors[bias]}, tmp_path / "model.safetensors")
    read = pretrained.read(tmp_path)
    assert_close(read.tensors["head.bias"], tensors[bias], 0.0)
    assert read.left_out == ()
    other = tensors[bias].copy()
    other[3] += 1e-12
    save_file(tensors | {copy: other}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=f"{copy}: expected the values of {bias} .tied weights., got others"):
        pretrained.read(tmp_path)
    save_file({name: a for name, a in tensors.items() if name != copy}, tmp_path / "model.safetensors")
    assert_close(pretrained.read(tmp_path).tensors["head.bias"], tensors[bias], 0.0)


@pytest.mark.parametrize(("family", "other"), [("bert", "real"), ("distilbert", "real"), ("roberta", "places")])
def test_another_counting_of_positions_shows(family, other, tmp_path):
    """With padding on the left and in between; and the family cannot express it."""
    model = published(family, "Model", tmp_path / "model")
    read = pretrained.read(tmp_path / "model")
    tokens, real = inputs()
    with wide(), torch.no_grad():
        expected = model(torch.from_numpy(tokens), attention_mask=torch.from_numpy(real.astype(np.int64)))
    config = read.config.replace(position_counting=other)
    ours = build(TORCH, config, read.tensors)
    found = to_numpy(ours(TORCH.array(tokens), padding_mask=TORCH.array(real)))
    off = np.abs(found - to_numpy(expected.last_hidden_state)).max(-1)
    assert off[:2][real[:2]].max() < 1e-11  # where there is none, or on the right
    assert min(off[2][real[2]].min(), off[3][real[3]].max()) > 1e-3
    with pytest.raises(ConfigError, match=f"position_counting: expected .*, got '{other}'"):
        pretrained.write(tmp_path / "back", config, read.tensors, family=family)
