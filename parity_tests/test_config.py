"""ModelConfig: what it accepts, what it refuses and in which words, and the file that it becomes."""

import dataclasses
import json
import math

import pytest

from twinformer.config import ModelConfig, RotaryScaling, StackConfig
from twinformer.errors import ConfigError, TwinformerError

SIZES = {
    "context_length": 16,
    "model_dim": 24,
    "key_dim": 6,
    "hidden_dim": 32,
    "num_heads": 6,
    "num_layers": 2,
}
MODEL = SIZES | {"architecture": "encoder", "vocab_size": 50}


def config(**changes):
    return ModelConfig(**(MODEL | changes))


# no field has its default value, and each has a value that no other field of its type has, where types allow
FAR_FROM_DEFAULT = ModelConfig(
    context_length=17,
    model_dim=26,
    key_dim=8,
    hidden_dim=34,
    num_heads=6,
    num_layers=3,
    value_dim=5,
    num_kv_heads=2,
    norm="rmsnorm",
    norm_eps=1e-6,
    norm_bias=False,
    norm_weight="one_plus",
    norm_cast="before_weight",
    norm_placement="post",
    final_norm=False,
    activation="gelu_tanh",
    gated=True,
    feedforward_bias=False,
    qkv_bias=True,
    output_bias=True,
    attention_scale=0.3,
    attention_softcap=50.0,
    qk_norm="rmsnorm",
    window=7,
    positions="rotary",
    position_counting="places",
    position_offset=0,  # only 0 goes with rotary; see the second configuration
    sinusoid_layout="halves",
    sinusoid_spacing="endpoint",
    rotary_convention="interleaved",
    rotary_base=500000.0,
    rotary_dim=4,
    rotary_scaling=RotaryScaling(
        kind="yarn",
        factor=8.0,
        original_context_length=8192,
        low_freq_factor=1.5,
        high_freq_factor=4.5,
        beta_fast=31.0,
        beta_slow=1.25,
        attention_factor=1.2,
        truncate=False,
    ),
    relative_buckets=36,
    relative_max_distance=130,
    window_rotary_base=20.0,
    dropout=0.1,
    attention_dropout=0.2,
    hidden_dropout=0.3,
    embedding_dropout=0.05,
    head_transform=True,
    param_dtype="bfloat16",
    compute_dtype="float16",
    remat=True,
    scan_layers=True,
    architecture="encoder-decoder",
    vocab_size=101,
    source_vocab_size=101,
    num_encoder_layers=4,
    share_embeddings=True,
    embedding_scale=2.5,
    embedding_norm=True,
    num_token_types=0,  # only an encoder takes them
    head="untied",
    head_bias=True,
    head_scale=0.7,
    head_softcap=30.0,
    initializer="truncated_normal",
    initializer_std=0.01,
    initializer_scale_residual=True,
)
TOKEN_TYPES = config(num_token_types=3, head="none", positions="learned", position_offset=2)
_LABELLED = {"context_length": 9, "model_dim": 8, "key_dim": 4, "hidden_dim": 8, "num_heads": 2, "num_layers": 3}
LABELS = ModelConfig(
    **_LABELLED,
    architecture="decoder",
    vocab_size=5,
    window=2,
    window_layers=(0, 2),
    head="sequence",
    head_dropout=0.3,
    num_labels=4,
    pool="last",
    pooler="tanh",
)
VECTORS = ModelConfig(
    **_LABELLED, architecture="encoder", vocab_size=5, head="pooled", pool="mean", pool_normalize=True
)


def problem_fields(error):
    """The fields that the problems speak of, each problem starting with its field's name."""
    return [problem.split(":")[0] for problem in error.problems]


# ---- the file


def test_defaults_are_the_books():
    """Jurafsky & Martin, "Transformers": pre-norm, LayerNorm, ReLU, attention without biases, 1/sqrt(d_k)."""
    plain = StackConfig(**SIZES)
    chosen = {name: getattr(plain, name) for name in ("norm", "norm_placement", "activation", "gated", "final_norm")}
    assert chosen == {
        "norm": "layernorm",
        "norm_placement": "pre",
        "activation": "relu",
        "gated": False,
        "final_norm": True,
    }
    assert (plain.qkv_bias, plain.output_bias, plain.attention_scale) == (False, False, None)
    assert (plain.norm_eps, plain.feedforward_bias, plain.dropout) == (1e-5, True, 0.0)


@pytest.mark.parametrize(
    "original",
    [config(), FAR_FROM_DEFAULT, TOKEN_TYPES, LABELS, VECTORS],
    ids=["plain", "far", "token types", "labels", "vectors"],
)
def test_json_round_trip(original):
    text = original.to_json()
    back = ModelConfig.from_json(text)
    assert back == original
    assert isinstance(back.rotary_scaling, RotaryScaling)
    assert back.to_json() == text
    assert text.endswith("}\n")
    assert ModelConfig.from_dict(original.to_dict()) == original


def test_stack_config_round_trip():
    original = StackConfig(**SIZES, dropout=0.5)
    assert StackConfig.from_json(original.to_json()) == original


def test_far_from_default_is_far():
    """The round trip would hide a field that is dropped and refilled with its default."""
    same = [
        f.name
        for f in dataclasses.fields(ModelConfig)
        if f.default is not dataclasses.MISSING and getattr(FAR_FROM_DEFAULT, f.name) == f.default
    ]
    others = (TOKEN_TYPES, LABELS, VECTORS)
    defaults = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
    assert [name for name in same if all(getattr(other, name) == defaults[name] for other in others)] == []
    assert len(same) < 10


def test_file_names_every_field_and_resolved_values():
    values = json.loads(config(positions="rotary").to_json())
    assert set(values) == {f.name for f in dataclasses.fields(ModelConfig)}
    assert set(values["rotary_scaling"]) == {f.name for f in dataclasses.fields(RotaryScaling)}
    assert values["value_dim"] == 6
    assert values["num_kv_heads"] == 6
    assert values["rotary_dim"] == 6
    assert values["source_vocab_size"] == 0
    assert values["num_encoder_layers"] == 0


def test_none_is_resolved_at_once():
    two = config(architecture="encoder-decoder")
    assert (two.source_vocab_size, two.num_encoder_layers) == (50, 2)
    assert (config().rotary_dim, config(positions="rotary").rotary_dim) == (0, 6)
    assert (config(value_dim=5).value_dim, config(num_kv_heads=2).num_kv_heads) == (5, 2)


def test_files_of_before_a_field_was_there():
    """What a field was added for was not done then."""
    values = FAR_FROM_DEFAULT.to_dict()
    del values["scan_layers"]
    assert ModelConfig.from_dict(values) == FAR_FROM_DEFAULT.replace(scan_layers=False)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(ModelConfig) if f.name != "scan_layers"])
def test_missing_field(name):
    values = FAR_FROM_DEFAULT.to_dict()
    del values[name]
    with pytest.raises(ConfigError) as refusal:
        ModelConfig.from_dict(values)
    assert refusal.value.problems == (f"{name}: missing",)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(RotaryScaling)])
def test_missing_field_of_scaling(name):
    values = FAR_FROM_DEFAULT.to_dict()
    del values["rotary_scaling"][name]
    with pytest.raises(ConfigError) as refusal:
        ModelConfig.from_dict(values)
    assert refusal.value.problems == (f"rotary_scaling.{name}: missing",)


def test_unknown_fields():
    values = FAR_FROM_DEFAULT.to_dict() | {"model_dims": 3, "n_head": 6}
    values["rotary_scaling"]["mscale"] = 1.0
    with pytest.raises(ConfigError) as refusal:
        ModelConfig.from_dict(values)
    assert sorted(refusal.value.problems) == [
        "model_dims: unknown field",
        "n_head: unknown field",
        "rotary_scaling.mscale: unknown field",
    ]


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3", "null", '"encoder"', "[" * 100_000], ids=range(7))
def test_not_a_json_object(text):
    with pytest.raises(ConfigError, match="expected"):
        ModelConfig.from_json(text)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(ModelConfig) if "float" in str(f.type)])
def test_no_number_in_the_file_is_not_finite(name, literal):
    values = FAR_FROM_DEFAULT.to_dict() | {name: "here"}
    with pytest.raises(ConfigError) as refusal:
        ModelConfig.from_json(json.dumps(values).replace('"here"', literal))
    assert problem_fields(refusal.value) == [name]


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(ModelConfig) if "float" in str(f.type)])
def test_whole_numbers_are_floats_too_but_not_enormous_ones(name):
    """JSON writes 1.0 as 1 in some hands. A whole number that no float can hold is a problem like any other."""
    values = FAR_FROM_DEFAULT.to_dict()
    whole = 2 if "dropout" not in name else 0
    assert getattr(ModelConfig.from_dict(values | {name: whole}), name) == whole
    with pytest.raises(ConfigError) as refusal:
        ModelConfig.from_dict(values | {name: 10**400})
    assert problem_fields(refusal.value) == [name]


# ---- types


RESOLVED = ("value_dim", "num_kv_heads", "rotary_dim", "source_vocab_size", "num_encoder_layers")


def wrong_values(name, hint):
    """Values that a field of this annotation must refuse."""
    if hint == "bool":
        return [1, 0, "true", None, 1.0]
    if hint.startswith("int"):
        return [1.5, 2.0, "3", True, [3], math.nan] + ([] if "None" in hint or name in RESOLVED else [None])
    if hint.startswith("float"):
        return ["0.5", True, [0.5], {"value": 0.5}] + ([] if "None" in hint else [None])
    if hint.startswith("tuple"):
        return [3, "01", True, ["relu"], [0.5], {"0": 1}]
    if hint == "RotaryScaling":
        return [None, "yarn", 3, ["yarn"]]
    return ["nonsense", None, 3, True, ["relu"], ""]


TYPED = [(f.name, value) for f in dataclasses.fields(ModelConfig) for value in wrong_values(f.name, f.type)]


@pytest.mark.parametrize(("name", "value"), TYPED, ids=[f"{name}={value!r}" for name, value in TYPED])
def test_wrong_type(name, value):
    """By keyword and from a mapping: exactly one problem, which names the field and shows the value."""
    fields = {f.name: getattr(FAR_FROM_DEFAULT, f.name) for f in dataclasses.fields(ModelConfig)} | {name: value}
    values = FAR_FROM_DEFAULT.to_dict() | {name: value}
    for make in (lambda: ModelConfig(**fields), lambda: ModelConfig.from_dict(values)):
        with pytest.raises(ConfigError) as refusal:
            make()
        assert problem_fields(refusal.value) == [name]
        assert repr(value) in str(refusal.value)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("kind", "ntk"),
        ("factor", "8"),
        ("original_context_length", 8192.0),
        ("low_freq_factor", None),
        ("high_freq_factor", True),
        ("beta_fast", [32]),
        ("beta_slow", "1"),
        ("attention_factor", None),
        ("truncate", 1),
    ],
)
def test_wrong_type_in_scaling(part, value):
    values = FAR_FROM_DEFAULT.to_dict()
    values["rotary_scaling"][part] = value
    with pytest.raises(ConfigError) as refusal:
        ModelConfig.from_dict(values)
    assert problem_fields(refusal.value) == [f"rotary_scaling.{part}"]


CHOICES = {
    "architecture": ("encoder", "decoder", "encoder-decoder"),
    "norm": ("layernorm", "rmsnorm"),
    "norm_weight": ("plain", "one_plus"),
    "norm_cast": ("after_weight", "before_weight"),
    "norm_placement": ("pre", "post"),
    "activation": ("relu", "gelu", "gelu_tanh", "silu"),
    "qk_norm": ("none", "layernorm", "rmsnorm"),
    "positions": ("none", "sinusoidal", "learned", "rotary", "relative", "alibi"),
    "sinusoid_layout": ("interleaved", "halves"),
    "sinusoid_spacing": ("textbook", "endpoint"),
    "rotary_convention": ("half", "interleaved"),
    "head": ("none", "tied", "untied"),
    "param_dtype": ("float64", "float32", "bfloat16", "float16"),
    "compute_dtype": ("float64", "float32", "bfloat16", "float16"),
    "initializer": ("normal", "truncated_normal", "xavier_uniform"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_accepted_and_others_are_listed(name):
    for choice in CHOICES[name]:
        extra = {"norm_bias": False} if choice == "rmsnorm" and name == "norm" else {}
        assert getattr(config(**{name: choice}, **extra), name) == choice
    with pytest.raises(ConfigError) as refusal:
        config(**{name: "Encoder"})
    assert all(repr(choice) in str(refusal.value) for choice in CHOICES[name])


# ---- values

ROTARY = {"positions": "rotary"}
TWO = {"architecture": "encoder-decoder"}


def scaled(kind="yarn", **parts):
    return ROTARY | {"rotary_scaling": RotaryScaling(kind=kind, **({"original_context_length": 64} | parts))}


WRONG_VALUES = [
    *[({name: bad}, name) for name in SIZES for bad in (0, -1)],
    ({"value_dim": 0}, "value_dim"),
    ({"num_kv_heads": 0}, "num_kv_heads"),
    ({"num_kv_heads": 4}, "num_kv_heads"),
    ({"num_kv_heads": 12}, "num_kv_heads"),
    ({"vocab_size": 0}, "vocab_size"),
    ({"norm_eps": 0.0}, "norm_eps"),
    ({"norm_eps": -1e-5}, "norm_eps"),
    ({"norm": "rmsnorm"}, "norm_bias"),
    ({"attention_scale": 0.0}, "attention_scale"),
    ({"attention_scale": -1.0}, "attention_scale"),
    ({"attention_softcap": 0.0}, "attention_softcap"),
    ({"attention_softcap": math.inf}, "attention_softcap"),
    ({"window": 0}, "window"),
    *[({name: bad}, name) for name in ("dropout", "attention_dropout", "hidden_dropout") for bad in (1, 1.5, -0.1)],
    ({"dropout": math.nan}, "dropout"),
    ({"position_offset": -1, "positions": "learned"}, "position_offset"),
    *[
        ({"position_offset": 2, "positions": kind}, "position_offset")
        for kind in ("none", "rotary", "relative", "alibi")
    ],
    ({"relative_buckets": 0}, "relative_buckets"),
    ({"relative_buckets": 30}, "relative_buckets"),
    ({"relative_buckets": -4}, "relative_buckets"),
    ({"relative_max_distance": 16}, "relative_max_distance"),
    ({"rotary_base": 1.0}, "rotary_base"),
    ({"rotary_base": math.nan}, "rotary_base"),
    (ROTARY | {"rotary_dim": 3}, "rotary_dim"),
    (ROTARY | {"rotary_dim": 8}, "rotary_dim"),
    (ROTARY | {"rotary_dim": 0}, "rotary_dim"),
    (ROTARY | {"key_dim": 5}, "rotary_dim"),
    ({"rotary_dim": 4}, "rotary_dim"),
    ({"rotary_scaling": RotaryScaling(kind="linear", factor=2.0)}, "rotary_scaling"),
    *[
        (scaled(**{part: bad}), f"rotary_scaling.{part}")
        for part in ("factor", "low_freq_factor", "attention_factor", "beta_slow")
        for bad in (0.0, -1.0, math.inf)
    ],
    (scaled("yarn", original_context_length=0), "rotary_scaling.original_context_length"),
    (scaled("llama3", original_context_length=0), "rotary_scaling.original_context_length"),
    (scaled("llama3", high_freq_factor=1.0), "rotary_scaling.high_freq_factor"),
    (scaled("yarn", beta_fast=1.0), "rotary_scaling.beta_fast"),
    ({"source_vocab_size": 50}, "source_vocab_size"),
    ({"num_encoder_layers": 2}, "num_encoder_layers"),
    (TWO | {"source_vocab_size": 0}, "source_vocab_size"),
    (TWO | {"num_encoder_layers": 0}, "num_encoder_layers"),
    ({"share_embeddings": True}, "share_embeddings"),
    (TWO | {"share_embeddings": True, "source_vocab_size": 40}, "share_embeddings"),
    ({"num_token_types": -1}, "num_token_types"),
    ({"num_token_types": 2, "architecture": "decoder"}, "num_token_types"),
    (TWO | {"num_token_types": 2}, "num_token_types"),
    (TWO | {"head": "none"}, "head"),
    ({"head": "none", "head_bias": True}, "head_bias"),
    ({"head": "none", "head_scale": 2.0}, "head_scale"),
    ({"head": "none", "head_softcap": 2.0}, "head_softcap"),
    *[
        ({name: bad}, name)
        for name in ("embedding_scale", "head_scale", "head_softcap")
        for bad in (0.0, -1.0, math.nan)
    ],
    ({"initializer_std": 0.0}, "initializer_std"),
]
IDS = [
    " ".join(f"{k}={v}" for k, v in changes.items() if k != "rotary_scaling") + f"-{i}"
    for i, (changes, _) in enumerate(WRONG_VALUES)
]


@pytest.mark.parametrize(("changes", "field"), WRONG_VALUES, ids=IDS)
def test_wrong_value(changes, field):
    with pytest.raises(ConfigError) as refusal:
        config(**changes)
    # one mistake can break two rules at once (window=0 cannot; an infinite factor can); the field is among them
    assert field in problem_fields(refusal.value)
    assert len(refusal.value.problems) <= 2
    assert "expected" in str(refusal.value)


def test_wrong_value_can_fail(monkeypatch):
    """Without the rules all of these are accepted: it is each rule that refuses."""
    monkeypatch.setattr(ModelConfig, "_check", lambda self, problems: None)
    for changes, _ in WRONG_VALUES:
        config(**changes)


RIGHT_VALUES = [
    {"window": 1},
    {"dropout": 0, "attention_dropout": 0.999, "hidden_dropout": 0.5},
    {"num_kv_heads": 1},
    {"num_kv_heads": 2},
    {"relative_buckets": 4, "relative_max_distance": 3},
    {"relative_max_distance": 17},
    ROTARY | {"rotary_dim": 2},
    ROTARY | {"rotary_dim": 6},
    ROTARY | {"key_dim": 5, "rotary_dim": 4},
    scaled("llama3"),
    scaled("yarn"),
    scaled("linear", original_context_length=0),
    {"positions": "learned", "position_offset": 2},
    {"positions": "sinusoidal", "position_offset": 1},
    TWO | {"share_embeddings": True},
    TWO | {"source_vocab_size": 40, "num_encoder_layers": 5},
    {"head": "none", "num_token_types": 2},
    {"key_dim": 5, "value_dim": 7, "model_dim": 1, "hidden_dim": 1},
    {"norm": "rmsnorm", "norm_bias": False},
    {"window": 1000},
]


@pytest.mark.parametrize("changes", RIGHT_VALUES, ids=range(len(RIGHT_VALUES)))
def test_right_value(changes):
    """The rules refuse no more than they say: the last good value beside each bad one."""
    made = config(**changes)
    assert {name: getattr(made, name) for name in changes} == changes


# ---- errors and copies


def test_all_problems_in_one_error():
    with pytest.raises(ConfigError) as refusal:
        config(model_dim=0, num_kv_heads=4, dropout=1.0, activation="swish", window="3", head_scale=-1.0)
    assert isinstance(refusal.value, TwinformerError)
    assert isinstance(refusal.value, ValueError)
    assert sorted(problem_fields(refusal.value)) == [
        "activation",
        "dropout",
        "head_scale",
        "model_dim",
        "num_kv_heads",
        "window",
    ]
    message = str(refusal.value)
    assert message.startswith("ModelConfig: 6 problems\n")
    assert "num_heads=6, got 4" in message
    assert all(problem in message for problem in refusal.value.problems)


def test_all_problems_of_a_file_in_one_error():
    values = config().to_dict() | {"n_layer": 3, "activation": "swish", "dropout": -1, "norm_eps": "small"}
    del values["model_dim"], values["head"]
    with pytest.raises(ConfigError) as refusal:
        ModelConfig.from_dict(values)
    assert sorted(problem_fields(refusal.value)) == [
        "activation",
        "dropout",
        "head",
        "model_dim",
        "n_layer",
        "norm_eps",
    ]


def test_one_problem_is_not_said_twice():
    """A field of the wrong type is not also accused by the rules that rest on it."""
    with pytest.raises(ConfigError) as refusal:
        config(num_heads="6", num_kv_heads=2)
    assert problem_fields(refusal.value) == ["num_heads"]
    assert str(refusal.value).startswith("ModelConfig: 1 problem\n")


def test_python_leaves_out_no_required_field():
    with pytest.raises(TypeError, match="model_dim"):
        ModelConfig(**{name: value for name, value in MODEL.items() if name != "model_dim"})
    with pytest.raises(TypeError, match="n_head"):
        config(n_head=3)


def test_replace_is_validated_anew():
    assert config().replace(dropout=0.25).dropout == 0.25
    assert config().dropout == 0.0
    with pytest.raises(ConfigError, match="dropout"):
        config().replace(dropout=2.0)


def test_with_dtype():
    changed = FAR_FROM_DEFAULT.with_dtype("float64")
    assert (changed.param_dtype, changed.compute_dtype) == ("float64", "float64")
    assert changed.replace(param_dtype="bfloat16", compute_dtype="float16") == FAR_FROM_DEFAULT


def test_configurations_are_values():
    assert config() == config()
    assert hash(config()) == hash(config())
    assert config() != config(dropout=0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().dropout = 0.5
