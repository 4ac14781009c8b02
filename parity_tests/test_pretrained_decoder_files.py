"""Decoder-only families as files: every leaf in its place, old names and buffers, heads by class."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from parity_tests.helpers import assert_close
from parity_tests.published_decoders import KINDS, publish
from parity_tests.test_pretrained_decoder_fields import config_of, families
from parity_tests.witness_models import WITNESSES
from twinformer import pretrained
from twinformer.errors import WeightsError


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_leaf_holds_the_values_that_a_mapping_by_hand_gives_it(family, tmp_path):
    model, config, tensors = WITNESSES[family]()
    model.save_pretrained(tmp_path)
    read = pretrained.read(tmp_path)
    assert_close(read.tensors, tensors, 0.0)
    differing = [
        field.name
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(read.config, field.name)
    ]
    untold = {"dropout", "attention_dropout", "embedding_dropout", "initializer_scale_residual", "norm_eps"}
    assert set(differing) <= untold, differing


def test_fused_matrices_are_taken_apart_in_order(tmp_path):
    kind = KINDS["phi3"]
    model = kind.model(kind.settings("plain"))
    read = pretrained.read(publish(model, tmp_path))
    block, ours = model.model.layers[1], "stack.blocks.1."
    A, G, K = read.config.num_heads, read.config.num_kv_heads, read.config.key_dim
    fused = block.self_attn.qkv_proj.weight.detach().numpy()
    for name, rows in (
        ("query", slice(0, A * K)),
        ("key", slice(A * K, (A + G) * K)),
        ("value", slice((A + G) * K, (A + 2 * G) * K)),
    ):
        assert_close(read.tensors[f"{ours}attention.{name}.weight"], fused[rows], 0.0, name=name)
    F = read.config.hidden_dim
    fused = block.mlp.gate_up_proj.weight.detach().numpy()
    assert_close(read.tensors[f"{ours}feedforward.gate.weight"], fused[:F], 0.0)
    assert_close(read.tensors[f"{ours}feedforward.up.weight"], fused[F:], 0.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_fused_and_turned_matrices_return_in_each_dtype(family, dtype, tmp_path):
    kind = KINDS[family]
    directory = publish(kind.model(kind.settings("plain")).to(getattr(torch, dtype)), tmp_path / "theirs")
    read = pretrained.read(directory)
    assert {str(leaf.dtype) for leaf in read.tensors.values()} == {dtype}
    assert read.config.param_dtype == dtype
    pretrained.write(tmp_path / "back", read.config, read.tensors, family=family)
    before, after = load_file(directory / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert {name: (str(a.dtype), a.shape, a.tobytes()) for name, a in before.items()} == {
        name: (str(a.dtype), a.shape, a.tobytes()) for name, a in after.items()
    }


def test_the_four_norms_of_a_gemma_block_are_told_apart(tmp_path):
    kind = KINDS["gemma3_text"]
    model = kind.model(kind.settings("plain"))
    tensors = pretrained.read(publish(model, tmp_path)).tensors
    block, ours = model.model.layers[2], "stack.blocks.2."
    for theirs, name in (
        (block.input_layernorm, "attention_norm"),
        (block.post_attention_layernorm, "attention_post_norm"),
        (block.pre_feedforward_layernorm, "feedforward_norm"),
        (block.post_feedforward_layernorm, "feedforward_post_norm"),
        (block.self_attn.q_norm, "attention.query_norm"),
        (block.self_attn.k_norm, "attention.key_norm"),
    ):
        assert_close(tensors[f"{ours}{name}.weight"], theirs.weight.detach().numpy(), 0.0, name=name)


def edited(directory, change):
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("family", "buffers"),
    [
        ("gpt2", {"transformer.h.1.attn.bias": np.tri(40)[None, None], "transformer.h.0.attn.masked_bias": -1e4}),
        ("llama", {"model.layers.1.self_attn.rotary_emb.inv_freq": [1.0, 0.1, 0.01, 0.001]}),
    ],
)
def test_buffers_of_older_files_are_left_out_by_name(family, buffers, tmp_path):
    kind = KINDS[family]
    directory = publish(kind.model(kind.settings("plain")), tmp_path)
    plain = pretrained.read(directory)
    added = {name: np.asarray(value, np.float32) for name, value in buffers.items()}
    read = pretrained.read(edited(directory, lambda tensors: tensors | added))
    assert read.left_out == tuple(sorted(buffers))
    assert_close(read.tensors, plain.tensors, 0.0)


def test_frequencies_of_an_older_file_are_those_of_its_configuration(tmp_path):
    """A base that the configuration forgot would be heard at long positions only."""
    kind = KINDS["llama"]
    directory = publish(kind.model(kind.settings("plain")), tmp_path)
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    exact = 10000.0 ** -(np.arange(4) / 4)
    pretrained.read(edited(directory, lambda tensors: tensors | {name: (exact * 1.001).astype(np.float16)}))
    with pytest.raises(WeightsError, match=rf"{name}: expected \[0.1\] at place 1 by the configuration, got \[0.0316"):
        pretrained.read(edited(directory, lambda tensors: tensors | {name: 1e6 ** -(np.arange(4) / 4)}))
    with pytest.raises(WeightsError, match=r"expected a float dtype and shape \(4,\), got F64 and \(3,\)"):
        pretrained.read(edited(directory, lambda tensors: tensors | {name: exact[:3]}))


@families
def test_a_tied_table_written_twice_must_be_one(family, tmp_path):
    kind = KINDS[family]
    model = kind.model({**kind.base, "tie_word_embeddings": True})
    directory = publish(model, tmp_path)
    table = next(name for name in load_file(tmp_path / "model.safetensors") if "embed_tokens" in name or "wte" in name)
    copied = pretrained.read(edited(directory, lambda tensors: tensors | {"lm_head.weight": tensors[table].copy()}))
    assert copied.config.head == "tied"
    with pytest.raises(WeightsError, match=r"lm_head.weight: expected the values of .* \(tied weights\), got others"):
        pretrained.read(edited(directory, lambda tensors: tensors | {"lm_head.weight": tensors[table] + 1}))


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_names_without_the_prefix_of_the_body_are_understood(family, tmp_path):
    """As the first files of GPT-2 have them."""
    kind = KINDS[family]
    directory = publish(kind.model(kind.settings("plain")), tmp_path)
    before = pretrained.read(directory)
    prefix = pretrained.FAMILIES[family].body_prefix
    bare = pretrained.read(edited(directory, lambda ts: {name.removeprefix(prefix): t for name, t in ts.items()}))
    assert_close(bare.tensors, before.tensors, 0.0)
    assert bare.config == before.config


def test_labels_are_counted_and_the_head_of_a_class_is_its_own(tmp_path):
    assert config_of("llama", architectures=["LlamaForSequenceClassification"]).num_labels == 2
    assert config_of("llama", architectures=["LlamaForSequenceClassification"], num_labels=3).num_labels == 3
    labels = {str(i): f"label {i}" for i in range(5)}
    tokens = config_of("llama", architectures=["LlamaForTokenClassification"], id2label=labels, hidden_dropout=0.25)
    assert (tokens.head, tokens.num_labels, tokens.head_bias, tokens.head_dropout) == ("tokens", 5, True, 0.25)
    untold = config_of("gpt2", architectures=["GPT2ForTokenClassification"], num_labels=3)
    told = config_of("gpt2", architectures=["GPT2ForTokenClassification"], classifier_dropout=0.5, hidden_dropout=0.25)
    assert (untold.head_dropout, told.head_dropout) == (0.1, 0.5)
    assert config_of("llama", architectures=...).head == config_of("llama", architectures=None).head == "untied"
    kind = KINDS["llama"]
    directory = publish(kind.model(kind.settings("plain"), class_name="LlamaForSequenceClassification"), tmp_path)
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(WeightsError) as caught:
        pretrained.read(directory)
    assert list(caught.value.problems) == [
        "score.weight: unexpected, of shape (2, 30)",
        "lm_head.weight: missing (head.weight)",
    ]
