"""BERT and RoBERTa with their heads: both twins against ``transformers`` in float64, every gradient, and back."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from parity_tests.helpers import FLAX, TORCH, assert_close, gradients, random_array, to_numpy
from parity_tests.published_witness import errors, in_our_terms, scattered, wide
from parity_tests.readers import build
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
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices are so small here that a second thread costs more than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def published(family, head, place, **changes):
    """A random model of the library, saved."""
    labels = {"num_labels": 3} if "Classification" in head else {}
    config = getattr(transformers, f"{family.capitalize()}Config")(**SIZES | SETTINGS[family] | labels | changes)
    model = scattered(getattr(transformers, f"{family.capitalize()}{head}"), config)
    if head == "Model":  # nothing reads the pooler here
        model.pooler = None
    model.save_pretrained(place)
    return model


def inputs():
    rng = np.random.default_rng(3)
    tokens = rng.integers(2, 37, (B, T))
    real = np.ones((B, T), bool)
    real[1, 6:] = False
    real[2, 1:] = False
    tokens[~real] = 1  # what RoBERTa takes for padding
    return tokens, real


def output_of(found):
    if hasattr(found, "start_logits"):
        return torch.stack((found.start_logits, found.end_logits), -1)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def theirs(model, cotangent):
    tokens, real = inputs()
    with wide():
        found = model(torch.from_numpy(tokens), attention_mask=torch.from_numpy(real.astype(np.int64)))
        output = output_of(found)
        named = dict(model.named_parameters())
        loss = (output * torch.from_numpy(cotangent)).sum()
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    result = {"output": to_numpy(output)}
    return result | {f"gradient {name}": to_numpy(grad) for name, grad in zip(named, grads, strict=True)}


def examine(twin, model, place):
    """The largest error of the output and of every gradient, relative to the largest magnitude there."""
    read = pretrained.read(place)
    tokens, real = inputs()
    shape = read.config.output_shape(B, T)
    cotangent = random_array(7, *shape) * (real[..., None] if len(shape) == 3 else 1.0)
    expected = in_our_terms(read, theirs(model, cotangent))
    native, mask = twin.array(tokens), twin.array(real)
    ours = build(twin, read.config, read.tensors)
    out, grads = gradients(twin, lambda m: m(native, padding_mask=mask), {}, ours, cotangent)
    return errors({"output": out} | {f"gradient {path}": grad for path, grad in grads.items()}, expected, real)


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
    renamed = {name.replace("qa_outputs", "classifier"): array for name, array in before.items()}
    assert {name: array.tobytes() for name, array in renamed.items()} == {n: a.tobytes() for n, a in after.items()}
    again = pretrained.read(back).config
    if head == "ForQuestionAnswering":  # written as labels of tokens, which is what they are
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


@pytest.mark.parametrize("family", SETTINGS)
def test_heads_in_flax(family, tmp_path):
    for head in ("ForMaskedLM", "ForSequenceClassification"):
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
