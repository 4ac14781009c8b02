"""Encoder-decoders as published: both twins against ``transformers`` in float64, every gradient, and back."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from parity_tests.helpers import FLAX, TORCH, assert_close, to_numpy
from parity_tests.published_seq2seq import KINDS, drawn, examine, inputs_of, ours, theirs
from parity_tests.published_witness import in_our_terms, wide
from parity_tests.readers import build
from twinformer import ConfigError, WeightsError, pretrained

BOUND = 1e-11
CASES = [(family, case) for family, kind in KINDS.items() for case in kind.cases]
RICH = {"t5": "gated, unscaled", "bart": "scaled", "marian": "two vocabularies"}
RICH |= {"mt5": "relu", "mbart": "scaled", "m2m_100": "unscaled"}


pytestmark = pytest.mark.usefixtures("one_thread")


def published(family, case, place):
    model = KINDS[family].make(case)
    model.save_pretrained(place)
    return model, place


def assert_small(found):
    worst = max(found, key=lambda name: found[name])
    assert found[worst] <= BOUND, f"{worst}: off by {found[worst]:.3e} of its largest magnitude"


@pytest.mark.parametrize(("family", "case"), CASES)
def test_all_that_transformers_computes(family, case, tmp_path):
    model, place = published(family, case, tmp_path / "model")
    found = examine(TORCH, place, model)
    states = {f"{side} {what}" for side in ("encoder", "decoder") for what in ("embeddings", "0")}
    assert states | {"output", "loss", "gradient source_embedding.tokens.weight"} <= found.keys()
    assert_small(found)
    read = pretrained.read(place)
    assert (read.family, read.unknown_fields) == (family, ())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("family", KINDS)
def test_random_settings(family, seed, tmp_path):
    """Of all that the published class has; and written again, bit for bit, of the same meaning."""
    model = KINDS[family].make(drawn(family, seed), seed)
    model.save_pretrained(tmp_path / "model")
    assert_small(examine(TORCH, tmp_path / "model", model))
    read = pretrained.read(tmp_path / "model")
    pretrained.write(tmp_path / "back", read.config, read.tensors, family=family)
    again = pretrained.read(tmp_path / "back")
    assert (again.config, again.unknown_fields) == (read.config, ())
    assert {path: leaf.tobytes() for path, leaf in again.tensors.items()} == {
        path: leaf.tobytes() for path, leaf in read.tensors.items()
    }


@pytest.mark.parametrize("family", KINDS)
def test_all_that_transformers_computes_in_flax(family, tmp_path):
    model, place = published(family, RICH[family], tmp_path / "model")
    assert_small(examine(FLAX, place, model))


@pytest.mark.parametrize(("family", "case"), CASES)
def test_there_and_back(family, case, tmp_path):
    """Written again: the same bits, which the library loads whole and computes the same with."""
    model, place = published(family, case, tmp_path / "model")
    read = pretrained.read(place)
    pretrained.write(tmp_path / "back", read.config, read.tensors, family=family)
    before, after = load_file(place / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    positions = {name for name in before if "embed_positions" in name and family == "marian"}
    assert before.keys() - positions == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in after)
    assert pretrained.read(tmp_path / "back").config == read.config
    given = inputs_of(model)
    arguments = {
        "input_ids": torch.from_numpy(given["source"]),
        "attention_mask": torch.from_numpy(given["source_padding_mask"].astype(np.int64)),
        "decoder_input_ids": torch.from_numpy(given["target"][:, :-1].copy()),
    }
    with wide(), torch.no_grad():
        loaded, report = type(model).from_pretrained(
            tmp_path / "back", dtype=torch.float64, attn_implementation="eager", output_loading_info=True
        )
        assert not any(report[kind] for kind in ("unexpected_keys", "mismatched_keys", "error_msgs"))
        # (Marian's sinusoids are made anew, in float32)
        rounding = 1e-5 if family == "marian" else 1e-13
        assert_close(loaded.eval()(**arguments).logits, model(**arguments).logits, rounding)


def test_version_1_1_of_t5_has_a_head_of_its_own(tmp_path):
    """Published so, with ``tie_word_embeddings`` false: nothing is shared, nothing is scaled."""
    model, place = published("t5", "gated", tmp_path / "model")
    config = json.loads((place / "config.json").read_text())
    del config["scale_decoder_outputs"]
    (place / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    tensors = load_file(place / "model.safetensors")
    own = np.random.default_rng(0).standard_normal(tensors["shared.weight"].shape)
    save_file(tensors | {"lm_head.weight": own}, place / "model.safetensors")
    read = pretrained.read(place)
    assert (read.config.head, read.config.head_scale) == ("untied", None)
    given = inputs_of(model)
    ours = build(TORCH, read.config, read.tensors)
    arrays = {name: TORCH.array(array) for name, array in given.items()}
    logits = ours(arrays["source"], arrays["target"], source_padding_mask=arrays["source_padding_mask"])
    with wide(), torch.no_grad():
        states = model(
            input_ids=torch.from_numpy(given["source"]),
            attention_mask=torch.from_numpy(given["source_padding_mask"].astype(np.int64)),
            decoder_input_ids=torch.from_numpy(given["target"]),
            output_hidden_states=True,
        ).decoder_hidden_states[-1]
    assert_close(logits, to_numpy(states) @ own.T, 1e-11)


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("t5", {"feed_forward_proj": "quick_gelu", "is_decoder": True}, ["feed_forward_proj", "is_decoder"]),
        ("bart", {"decoder_ffn_dim": 7, "decoder_attention_heads": 4}, ["decoder_ffn_dim", "decoder_attention_heads"]),
        ("bart", {"normalize_before": True, "activation_function": "gelu_fast"}, ["normalize_before", "gelu_fast"]),
        ("marian", {"decoder_vocab_size": 99}, ["decoder_vocab_size: expected vocab_size=37"]),
        ("marian", {"tie_word_embeddings": False}, ["tie_word_embeddings"]),
        ("mt5", {"architectures": ["T5ForConditionalGeneration"]}, ["'MT5ForConditionalGeneration', got ['T5For"]),
        ("mt5", {"relative_attention_num_buckets": 6}, ["relative_attention_num_buckets: expected a multiple of 4"]),
        ("mbart", {"normalize_before": False, "add_final_layer_norm": False}, ["normalize_before", "add_final_layer"]),
        ("m2m_100", {"d_model": 15}, ["d_model: expected an even number from 4, got 15"]),
        ("m2m_100", {"pad_token_id": -1, "activation_function": "tanh"}, ["pad_token_id: expected at least 0", "tanh"]),
    ],
)
def test_what_is_not_supported_is_refused_with_its_values(family, changes, told, tmp_path):
    _, place = published(family, next(iter(KINDS[family].cases)), tmp_path / "model")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ConfigError) as caught:
        pretrained.read(place)
    assert all(text in str(caught.value) for text in told)


def test_a_table_that_repeats_another_is_compared(tmp_path):
    _, place = published("bart", "plain", tmp_path / "model")
    tensors = load_file(place / "model.safetensors")
    copy = tensors["model.shared.weight"].copy()
    copy[3, 4] += 1
    save_file(tensors | {"model.encoder.embed_tokens.weight": copy}, place / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model.encoder.embed_tokens.weight: expected the values of model.shared"):
        pretrained.read(place)


@pytest.mark.parametrize("family", ["t5", "mt5"])
def test_a_head_that_differs_is_its_own_whatever_the_file_says(family, tmp_path):
    """Files of the library say ``tie_word_embeddings`` always; it unties what it finds different, and so do we."""
    model, place = published(family, next(iter(KINDS[family].cases)), tmp_path / "model")
    tensors = load_file(place / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["shared.weight"]}, place / "model.safetensors")
    tied = pretrained.read(place)
    assert (tied.config.head, tied.left_out) == ("tied", ())
    own = np.random.default_rng(0).standard_normal(tensors["shared.weight"].shape)
    save_file(tensors | {"lm_head.weight": own}, place / "model.safetensors", {"format": "pt"})
    assert json.loads((place / "config.json").read_text())["tie_word_embeddings"] is True
    read = pretrained.read(place)
    assert read.config == tied.config.replace(head="untied")
    pretrained.write(tmp_path / "back", read.config, read.tensors, family=family)
    given = inputs_of(model)
    arrays = {name: TORCH.array(array) for name, array in given.items()}
    ours = build(TORCH, read.config, read.tensors)
    logits = ours(arrays["source"], arrays["target"], source_padding_mask=arrays["source_padding_mask"])
    for saved in (place, tmp_path / "back"):
        with wide(), torch.no_grad():
            loaded = type(model).from_pretrained(saved, dtype=torch.float64, attn_implementation="eager").eval()
            assert_close(loaded.lm_head.weight, own, 0.0)
            expected = loaded(
                input_ids=torch.from_numpy(given["source"]),
                attention_mask=torch.from_numpy(given["source_padding_mask"].astype(np.int64)),
                decoder_input_ids=torch.from_numpy(given["target"]),
                decoder_attention_mask=torch.ones(given["target"].shape, dtype=torch.int64),
            ).logits
        assert_close(logits, expected, 1e-11, name=saved.name)
    assert pretrained.read(tmp_path / "back").config == read.config


def test_positions_of_m2m_100_are_counted_from_its_padding_id(tmp_path):
    model = KINDS["m2m_100"].make(KINDS["m2m_100"].cases["plain"] | {"pad_token_id": 4})
    model.save_pretrained(tmp_path)
    assert pretrained.read(tmp_path).config.position_offset == 5
    assert_small(examine(TORCH, tmp_path, model))


#: other choices of the tests below that the family has too, in another file
EXPRESSIBLE = {("m2m_100", "position_offset"), ("m2m_100", "embedding_scale"), ("t5", "head_scale")}


@pytest.mark.parametrize(
    ("family", "choice", "other"),
    [(family, "position_counting", "real") for family in ("bart", "mbart", "marian", "t5", "mt5")]
    + [
        ("m2m_100", "position_counting", "places"),
        ("m2m_100", "position_offset", 1),
        ("m2m_100", "sinusoid_spacing", "textbook"),
        ("m2m_100", "sinusoid_layout", "interleaved"),
        ("m2m_100", "embedding_scale", None),
        ("mbart", "norm_placement", "post"),
        ("marian", "sinusoid_spacing", "endpoint"),
        ("mt5", "head_scale", 12**-0.5),
        ("t5", "head_scale", None),
    ],
)
def test_another_choice_shows(family, choice, other, tmp_path):
    """Each choice that the families make for themselves moves the logits; and it is not lost on the way back."""
    model, place = published(family, next(iter(KINDS[family].cases)), tmp_path / "model")
    read = pretrained.read(place)
    assert getattr(read.config, choice) != other
    given = inputs_of(model)
    expected = in_our_terms(read, theirs(model, given))
    config = read.config.replace(**{choice: other})
    got = ours(TORCH, config, read.tensors, given)
    real = given["target_padding_mask"][:, :-1]
    assert np.abs(got["output"] - expected["output"])[real].max() > 1e-3
    if (family, choice) in EXPRESSIBLE:
        pretrained.write(tmp_path / "back", config, read.tensors, family=family)
        assert pretrained.read(tmp_path / "back").config == config
    else:
        with pytest.raises(ConfigError, match=f"{choice}: expected .*, got {other!r}"):
            pretrained.write(tmp_path / "back", config, read.tensors, family=family)
