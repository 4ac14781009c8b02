"""Decoder-only families as config.json: every field accounted for, every refusal named with its value."""

import dataclasses

import numpy as np
import pytest
import transformers

from parity_tests.published_decoders import KINDS, ROPES
from twinformer import pretrained
from twinformer.errors import ConfigError
from twinformer.parameters import model_parameters
from twinformer.pretrained import published
from twinformer.pretrained.family import BOOKKEEPING

families = pytest.mark.parametrize("family", KINDS)


def config_of(family, **changes):
    """The published settings of a family's first case, changed, as our configuration; ``...`` takes a field away."""
    kind = KINDS[family]
    settings = {**kind.settings(next(iter(kind.cases))), **changes}
    config, unknown = published.translate(
        pretrained.FAMILIES[family], {name: value for name, value in settings.items() if value is not ...}
    )
    assert unknown == []
    return config


def problems_of(family, **changes):
    with pytest.raises(ConfigError) as caught:
        config_of(family, **changes)
    return list(caught.value.problems)


# ---- fields


@families
def test_every_field_of_the_published_class_is_accounted_for(family):
    """Used (or refused), declared to play no part, or bookkeeping of the library."""
    declared = pretrained.FAMILIES[family]
    known = declared.fields.keys() | declared.without_effect | BOOKKEEPING
    theirs = {field.name for field in dataclasses.fields(getattr(transformers, KINDS[family].config))}
    assert theirs - known == set()
    assert declared.fields.keys() & declared.without_effect == set()


@families
def test_absent_fields_mean_what_the_published_class_says(family):
    """A file with the sizes only is the class with the sizes only."""
    required = {name for name, field in pretrained.FAMILIES[family].fields.items() if field.required}
    kind = KINDS[family]
    sizes = {name: value for name, value in kind.base.items() if name in required}
    if family != "gpt2":
        sizes |= {"num_attention_heads": 32, "hidden_size": 64}  # a multiple of the groups that are the default
    theirs = getattr(transformers, kind.config)(**sizes).to_dict()
    theirs["architectures"] = [kind.classes[0]]
    bare, _ = published.translate(pretrained.FAMILIES[family], sizes)
    full, unknown = published.translate(pretrained.FAMILIES[family], theirs)
    assert unknown == []
    assert bare == full


#: settings of each family that we do not have, and how the error speaks of them
_COMMON = {
    "is_encoder_decoder": (True, "got True"),
    "add_cross_attention": (True, "got True"),
    "quantization_config": ({"bits": 4}, "got {'bits': 4}"),
    "per_layer_config": ({"0": {}}, "got {'0': {}}"),
    "pruned_heads": ({"0": [1]}, "got {'0': [1]}"),
    "architectures": (["GPT2DoubleHeadsModel"], "got ['GPT2DoubleHeadsModel']"),
    "vocab_size": (0, "expected at least 1, got 0"),
    "initializer_range": ("0.02", "got '0.02'"),
    "num_labels": (0, "expected at least 1, got 0"),
    "tie_word_embeddings": (None, "got None"),
}
_LLAMA = {
    "hidden_act": ("gelu_fast", "got 'gelu_fast'"),
    "rope_scaling": ({"rope_type": "dynamic", "factor": 2.0}, "got 'dynamic'"),
    "rope_parameters": ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}, "got 'longrope'"),
    "rope_theta": ("high", "got 'high'"),
    "attention_dropout": (None, "got None"),
    "rms_norm_eps": (None, "got None"),
    "num_key_value_heads": (0, "expected at least 1, got 0"),
}
_PARTIAL = {"partial_rotary_factor": (0.5, "got 0.5")}
_TYPES = {"layer_types": (["full_attention", "chunked_attention"], "'chunked_attention'")}
_BOTH_WAYS = {"use_bidirectional_attention": (True, "got True")}
_GEMMA2 = {
    **{name: entry for name, entry in (_LLAMA | _TYPES | _BOTH_WAYS).items() if name != "hidden_act"},
    "hidden_activation": ("quick_gelu", "got 'quick_gelu'"),
    "query_pre_attn_scalar": (0.5, "got 0.5"),
    "sliding_window": (0, "expected at least 1, got 0"),
}
REFUSED = {
    "gpt2": {
        "activation_function": ("gelu_fast", "got 'gelu_fast'"),
        "scale_attn_by_inverse_layer_idx": (True, "got True"),
        "scale_attn_weights": (1, "got 1"),
        "n_inner": (0, "expected at least 1, got 0"),
        "embd_pdrop": (None, "got None"),
    },
    "llama": {**_LLAMA, **_PARTIAL, "mlp_bias": (1, "got 1")},
    "mistral": {
        **_LLAMA,
        **_PARTIAL,
        "sliding_window": (0, "expected at least 1, got 0"),
        "layer_types": (["full_attention"] * 2, "got ['full_attention', 'full_attention']"),
    },
    "qwen2": {**_LLAMA, **_PARTIAL, **_TYPES, "use_sliding_window": ("yes", "got 'yes'")},
    "qwen3": {**_LLAMA, **_PARTIAL, **_TYPES, "head_dim": (None, "got None")},
    "gemma": {**_LLAMA, **_PARTIAL, **_BOTH_WAYS, "hidden_activation": ("relu", "got 'relu'")},
    "gemma2": {**_GEMMA2, **_PARTIAL},
    "gemma3_text": {
        **_GEMMA2,
        "attn_logit_softcapping": (50.0, "got 50.0"),
        "rope_parameters": ({"sliding_attention": {"rope_type": "linear", "factor": 2.0}}, "got 'linear'"),
        "rope_local_base_freq": ("low", "got 'low'"),
    },
    "phi3": {**_LLAMA, "resid_pdrop": (None, "got None"), "partial_rotary_factor": ("half", "got 'half'")},
}


@families
def test_what_we_do_not_have_is_refused_by_name_and_value_all_at_once(family):
    wanted = _COMMON | REFUSED[family]
    found = problems_of(family, **{name: value for name, (value, _) in wanted.items()})
    assert len(found) == len(wanted), found
    for name, (_, told) in wanted.items():
        (problem,) = [problem for problem in found if problem.startswith(f"{name}: ")]
        assert told in problem, problem


def test_what_the_scaled_kinds_of_phi3_are_called_is_refused():
    for kind in ("su", "longrope", "yarn"):
        (problem,) = problems_of("phi3", rope_scaling={"type": kind, "short_factor": [1.0], "long_factor": [1.0]})
        assert problem == f"rope_scaling: expected rope_type 'default', got {kind!r}"


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("llama", {"hidden_size": 31}, "hidden_size: expected a multiple of num_attention_heads=6, got 31"),
        ("gpt2", {"n_embd": 25}, "n_embd: expected a multiple of n_head=3, got 25"),
        ("llama", {"head_dim": 9}, "rotary_dim: expected an even number from 2 to key_dim=9, got 9"),
        ("phi3", {"partial_rotary_factor": 0.4}, "rotary_dim: expected an even number from 2 to key_dim=8, got 3"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types: expected 2 kinds (num_hidden_layers), got 1"),
        (
            "qwen3",
            {"layer_types": ["sliding_attention"] * 2},
            "sliding_window: expected a whole number with 'sliding_attention' blocks, got None",
        ),
        (
            "llama",
            {"rope_theta": 10.0, "rope_parameters": {"rope_type": "default", "rope_theta": 20.0}},
            "rope_theta: expected 20.0 (as in rope_parameters), got 10.0",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 20.0}},
            "rope_parameters: expected rope_scaling's {'rope_type': 'linear', 'factor': 2.0}, got {'rope_theta': 20.0}",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "high_freq_factor": "4", "spin": 1}},
            "rope_scaling: low_freq_factor: missing (rope_type 'llama3' needs it); "
            "high_freq_factor: expected a number, got '4'; spin: unexpected, got 1",
        ),
        (
            "llama",
            {"rope_parameters": {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}},
            "rope_parameters: partial_rotary_factor: expected one of None, 1.0, 1, got 0.5; mrope_section: expected "
            "None, got [1, 1, 2]",
        ),
        (
            "gemma3_text",
            {"rope_local_base_freq": 5.0, "rope_parameters": {"sliding_attention": {"rope_theta": 6.0}}},
            "rope_local_base_freq: expected 6.0 (as in rope_parameters), got 5.0",
        ),
        (
            "gemma3_text",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling: expected rope_type, which is what counts here, got type 'linear' alone",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}},
            "rope_parameters: full_attention: truncate: expected True, got False",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"rope_theta": 6.0}},
            "rope_parameters: rope_theta: unexpected, got 6.0",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(family, changes, told):
    assert problems_of(family, **changes) == [told]


@pytest.mark.parametrize(("old", "new"), [("linear", "linear, new"), ("llama3", "llama3, new"), ("base", None)])
def test_old_and_new_spellings_of_rotary_positions_say_the_same(old, new):
    spelled = ROPES[new] if new else {"rope_parameters": {"rope_type": "default", **ROPES[old]}}
    assert config_of("llama", **ROPES[old]) == config_of("llama", **spelled) != config_of("llama")


@families
def test_what_no_comparison_in_float64_can_see(family):
    """Where the norms round, what is dropped in training, how weights began: no two rates alike."""
    rates = {
        "gpt2": {"resid_pdrop": 0.1, "attn_pdrop": 0.2, "embd_pdrop": 0.3},
        "phi3": {"resid_pdrop": 0.1, "attention_dropout": 0.2, "embd_pdrop": 0.3},
    }
    config = config_of(family, initializer_range=0.5, **rates.get(family, {"attention_dropout": 0.2}))
    dropout, embedding_dropout = {"gpt2": (0.1, 0.3), "phi3": (0.1, 0.0)}.get(family, (0.0, None))
    assert (config.dropout, config.attention_dropout, config.hidden_dropout) == (dropout, 0.2, 0.0)
    assert config.embedding_dropout == embedding_dropout
    own_weight = family.startswith("gemma")
    assert config.norm_cast == ("after_weight" if own_weight or family == "gpt2" else "before_weight")
    assert config.norm_weight == ("one_plus" if own_weight else "plain")
    assert (config.initializer, config.initializer_std) == ("normal", 0.5)
    assert config.initializer_scale_residual == (family == "gpt2")


# ---- what we cannot say in a family's terms


@families
@pytest.mark.parametrize(
    "changes",
    [
        {"norm_placement": "post"},
        {"final_norm": False},
        {"embedding_norm": True},
        {"head_bias": True},
        {"head_scale": 0.5},
        {"hidden_dropout": 0.25},
        {"norm_weight": "other"},
        {"positions": "alibi", "rotary_dim": 0, "window_rotary_base": None},
        {"embedding_scale": 0.125},
        {"attention_scale": 0.8},
        {"head": "none", "head_softcap": None, "output_bias": "other"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_a_family_cannot_express_is_not_written(family, changes):
    config = config_of(family)
    own = {
        "norm_weight": "plain" if config.norm_weight == "one_plus" else "one_plus",
        "output_bias": not config.output_bias,
    }
    changed = {name: own[name] if value == "other" else value for name, value in changes.items()}
    if config.positions != "rotary":
        changed.pop("window_rotary_base", None)
    config = config.replace(
        **changed, **({"rotary_scaling": type(config.rotary_scaling)()} if "positions" in changed else {})
    )
    tensors = {path: np.zeros(leaf.shape) for path, leaf in model_parameters(config).items()}
    with pytest.raises(ConfigError) as caught:
        pretrained.to_published(config, tensors, family=family)
    named = {problem.split(":")[0] for problem in caught.value.problems}
    assert named & changes.keys() or "qkv_bias" in named, named
