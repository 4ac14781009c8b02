"""What can be wrong with a published directory, and the machinery that reads it: settings, tensors, files, pooling."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from parity_tests.helpers import assert_close, random_array
from parity_tests.tiny_berts import CONFIG, TINY, edit_config, edit_tensors, leaves_of, scattered, tiny_directory
from twinformer import pretrained
from twinformer.errors import CheckpointError, ConfigError, WeightsError
from twinformer.parameters import model_parameters
from twinformer.pretrained import bert, files, published
from twinformer.pretrained.family import AS_STORED, TURNED, Family, Field, Name, only
from twinformer.pretrained.files import Stored

# ---- the configuration


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
    # no labels: two, of these names
    assert theirs.pop("id2label") == {0: "LABEL_0", 1: "LABEL_1"}
    for name in optional:
        assert theirs.get(name, bert.FAMILY.fields[name].default) == bert.FAMILY.fields[name].default, name
    config = pretrained.read(directory).config
    assert (config.norm_eps, config.activation, config.dropout, config.num_token_types) == (1e-12, "gelu", 0.1, 2)


@pytest.mark.parametrize("kind", ["ForSequenceClassification", "ForTokenClassification"])
def test_absent_labels_are_two_of_the_names_that_the_published_class_gives(kind, tmp_path):
    published = scattered(getattr(transformers, f"Bert{kind}"), **TINY["small"])
    published.save_pretrained(tmp_path / "model")
    edit_config(tmp_path / "model", id2label=..., label2id=..., num_labels=...)
    read = pretrained.read(tmp_path / "model")
    assert read.config.num_labels == 2
    pretrained.write(tmp_path / "back", read.config, read.tensors, family="bert")
    assert transformers.BertConfig.from_pretrained(tmp_path / "back").id2label == {0: "LABEL_0", 1: "LABEL_1"}
    edit_config(tmp_path / "model", num_labels=3)  # which the tensors contradict
    with pytest.raises(WeightsError, match=r"classifier.weight: expected shape \(3, 24\), got \(2, 24\)"):
        pretrained.read(tmp_path / "model")


def test_every_field_of_the_published_class_is_accounted_for():
    known = bert.FAMILY.fields.keys() | bert.FAMILY.without_effect
    values = transformers.BertConfig().to_dict()
    assert published.translate(bert.FAMILY, values)[1] == []
    assert not known & {"model_type"}


def test_another_family_is_refused(tmp_path):
    directory = tiny_directory(tmp_path)
    edit_config(directory, model_type="convbert")
    assert pretrained.is_published(directory)
    with pytest.raises(ConfigError, match=r"model_type: expected .*'bert'.*, got 'convbert'"):
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
    "only a pickle": (_only_pickle, "got only pytorch_model.bin, which take PyTorch to read"),
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


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", "[" * 100_000, '{"a": ' + "1" * 5000 + "}"])
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
    with pytest.raises(CheckpointError, match=r"expected the name of a \.safetensors file beside the index"):
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


def test_no_framework_is_needed(tmp_path):
    """In a fresh interpreter: bfloat16 is read, and neither PyTorch nor JAX is imported."""
    scattered(dtype=torch.bfloat16, **TINY["small"]).save_pretrained(tmp_path)
    program = (
        "import sys\n"
        "from twinformer import pretrained, tokenization\n"
        "read = pretrained.read(sys.argv[1])\n"
        "assert {str(a.dtype) for a in read.tensors.values()} == {'bfloat16'} == {read.config.param_dtype}\n"
        "found = {name.split('.')[0] for name in sys.modules} & {'torch', 'jax', 'flax', 'transformers'}\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
