"""Block of both twins: against torch.nn's layers, against the sum of its parts, and dropout at its six places."""

import numpy as np
import pytest
import torch

from parity_tests import references
from parity_tests.comparisons import assert_gradients_close
from parity_tests.helpers import (
    FLAX,
    TORCH,
    assert_close,
    both,
    gradients,
    random_array,
    scatter_parameters,
    to_numpy,
)
from twinformer import StackConfig
from twinformer.parameters import block_parameters

B, T, S = 2, 5, 4
SIZES = {"context_length": 8, "model_dim": 12, "key_dim": 4, "hidden_dim": 7, "num_heads": 3, "num_layers": 2}
LIKE_TORCH = {"qkv_bias": True, "output_bias": True, "param_dtype": "float64", "compute_dtype": "float64"}


def config_of(**choices):
    return StackConfig(**(SIZES | LIKE_TORCH | choices))


def block_of(twin, config, **options):
    return twin.file("block").Block(config, **options)


def part(values, prefix):
    """The entries below ``prefix.``, named from there."""
    return {path.removeprefix(f"{prefix}."): v for path, v in values.items() if path.startswith(f"{prefix}.")}


# ---- torch.nn.TransformerEncoderLayer and TransformerDecoderLayer


def torch_attention(witness, values):
    names = ("query", "key", "value")
    return {
        f"{witness}.in_proj_weight": np.concatenate([values[f"{n}.weight"] for n in names]),
        f"{witness}.in_proj_bias": np.concatenate([values[f"{n}.bias"] for n in names]),
        f"{witness}.out_proj.weight": values["output.weight"],
        f"{witness}.out_proj.bias": values["output.bias"],
    }


def torch_names(values, *, cross):
    """Our block's weights under the names of ``torch.nn.TransformerEncoderLayer`` or ``TransformerDecoderLayer``."""
    norms = ["attention_norm", *(["cross_attention_norm"] if cross else []), "feedforward_norm"]
    found = torch_attention("self_attn", part(values, "attention"))
    if cross:
        found |= torch_attention("multihead_attn", part(values, "cross_attention"))
    for i, name in enumerate(norms):
        found |= {f"norm{i + 1}.{leaf}": v for leaf, v in part(values, name).items()}
    for i, name in enumerate(("up", "down")):
        found |= {f"linear{i + 1}.{leaf}": v for leaf, v in part(values, f"feedforward.{name}").items()}
    return found


def witness_of(values, config, *, cross):
    kind = torch.nn.TransformerDecoderLayer if cross else torch.nn.TransformerEncoderLayer
    witness = kind(
        config.model_dim,
        config.num_heads,
        config.hidden_dim,
        dropout=0.0,
        activation=config.activation,
        layer_norm_eps=config.norm_eps,
        batch_first=True,
        norm_first=config.norm_placement == "pre",
        dtype=torch.float64,
    )
    named = {name: torch.from_numpy(v.copy()) for name, v in torch_names(values, cross=cross).items()}
    witness.load_state_dict(named, strict=True)
    return witness.train()  # the fast path of eval mode is another implementation


@both
@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("cross", [False, True], ids=["encoder", "decoder"])
def test_against_torch_nn(twin, placement, activation, cross):
    config = config_of(norm_placement=placement, activation=activation, norm_eps=1e-4)
    block = block_of(twin, config, causal=cross, cross_attention=cross)
    values = scatter_parameters(block, 3)
    witness = witness_of(values, config, cross=cross)
    inputs = {"X": random_array(1, B, T, 12, scale=2.0)}
    native = {"X": torch.from_numpy(inputs["X"].copy()).requires_grad_(True)}
    cotangent = random_array(2, B, T, 12)
    if cross:
        inputs["H_enc"] = random_array(3, B, S, 12)
        native["H_enc"] = torch.from_numpy(inputs["H_enc"].copy()).requires_grad_(True)
        real = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
        masks = {"memory_mask": real[:, None, None]}
        expected = witness(
            native["X"],
            native["H_enc"],
            tgt_mask=torch.triu(torch.ones(T, T, dtype=torch.bool), 1),
            memory_key_padding_mask=torch.from_numpy(~real),
        )
    else:
        real = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], bool)
        masks = {"mask": real[:, None, None]}
        expected = witness(native["X"], src_key_padding_mask=torch.from_numpy(~real))
    arguments = {name: twin.array(mask) for name, mask in masks.items()}
    out, grads = gradients(twin, lambda m, **kw: m(**kw, **arguments), inputs, block, cotangent)
    (expected * torch.from_numpy(cotangent)).sum().backward()
    assert_close(out, expected)
    named = {name: p.grad.numpy() for name, p in witness.named_parameters()}
    ours = torch_names({path: g for path, g in grads.items() if "." in path}, cross=cross)
    assert_close(ours, named, 1e-11)  # their in_proj holds query, key and value: the key bias is measured with them
    assert_close({n: grads[n] for n in native}, {n: v.grad.numpy() for n, v in native.items()}, 1e-11)


# ---- the sum of its parts, in NumPy, for what torch.nn does not have


def numpy_block(X, values, config, *, H_enc=None, masks=None, factors=None, causal=False, **attention):
    """A block's three sub-layers from the loops of ``references``. ``factors`` are dropout's, by place 0 … 5.
    ``attention``: what else the self-attention of ``references`` is told."""
    factors = {i: 1.0 for i in range(6)} | (factors or {})
    masks = masks or {}

    def norm(name, x):
        p = part(values, name)
        weight = p["weight"] + (1.0 if config.norm_weight == "one_plus" else 0.0)
        if config.norm == "rmsnorm":
            return references.rms_norm(x, weight, config.norm_eps)
        return references.layer_norm(x, weight, p.get("bias", 0.0), config.norm_eps)

    def attend(name, x, place, **keywords):
        keep = None if np.isscalar(factors[place]) else factors[place]
        known = {"A": config.num_heads, "K": config.key_dim, "G": config.num_kv_heads, "J": config.value_dim}
        return references.attention(x, part(values, name), **known, keep=keep, **keywords)

    def feed(x):
        p = part(values, "feedforward")
        up = x @ p["up.weight"].T + p.get("up.bias", 0.0)
        if config.gated:
            hidden = references.activate(x @ p["gate.weight"].T + p.get("gate.bias", 0.0), config.activation) * up
        else:
            hidden = references.activate(up, config.activation)
        return (hidden * factors[4]) @ p["down.weight"].T + p.get("down.bias", 0.0)

    own = {"causal": causal, "mask": masks.get("mask"), **attention}
    branches = [("attention_norm", lambda x: attend("attention", x, 0, **own), 1)]
    if H_enc is not None:
        branches.append(
            (
                "cross_attention_norm",
                lambda x: attend("cross_attention", x, 2, H_enc=H_enc, memory_mask=masks.get("memory_mask")),
                3,
            )
        )
    branches.append(("feedforward_norm", feed, 5))
    for name, branch, place in branches:
        if config.norm_placement == "pre":
            X = X + branch(norm(name, X)) * factors[place]
        elif config.norm_placement == "sandwich":
            X = X + norm(name.replace("_norm", "_post_norm"), branch(norm(name, X))) * factors[place]
        else:
            X = norm(name, X + branch(X) * factors[place])
    return X


CHOICES = {
    "rmsnorm, gated silu, no biases": {
        "norm": "rmsnorm",
        "norm_bias": False,
        "activation": "silu",
        "gated": True,
        "feedforward_bias": False,
        "qkv_bias": False,
        "output_bias": False,
    },
    "one_plus, gelu_tanh": {
        "norm": "rmsnorm",
        "norm_bias": False,
        "norm_weight": "one_plus",
        "activation": "gelu_tanh",
    },
    "one_plus layernorm without bias": {"norm_bias": False, "norm_weight": "one_plus", "norm_eps": 0.3},
    "grouped, J is not K": {"num_heads": 6, "num_kv_heads": 2, "key_dim": 3, "value_dim": 5, "gated": True},
}


@both
@pytest.mark.parametrize("cross", [False, True], ids=["self-only", "with-cross"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_sandwich_norms(twin, norm, cross):
    """A norm before each branch and another of what it gives, before that is added; dropout comes after it."""
    config = config_of(norm_placement="sandwich", norm=norm, norm_bias=norm == "layernorm", dropout=0.3)
    block = block_of(twin, config, cross_attention=cross)
    values = scatter_parameters(block, 8)
    assert set(values) == set(block_parameters(config, cross_attention=cross))
    X, H = random_array(5, B, T, 12), random_array(6, B, S, 12) if cross else None
    given = {} if H is None else {"H_enc": twin.array(H)}
    assert_close(block(twin.array(X), **given), numpy_block(X, values, config, H_enc=H))
    places = [1, *([3] if cross else []), 5]
    factors = {place: references.dropout_factors(references.key_of(4, place), (B, T, 12), 0.3) for place in places}
    expected = numpy_block(X, values, config, H_enc=H, factors=factors)
    assert_close(block(twin.array(X), **given, rng=twin.key(4)), expected)


@both
@pytest.mark.parametrize("cross", [False, True], ids=["self-only", "with-cross"])
@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_against_its_parts(twin, choices, placement, cross):
    config = config_of(norm_placement=placement, **choices)
    block = block_of(twin, config, causal=True, cross_attention=cross)
    values = scatter_parameters(block, 4)
    assert {path: v.shape for path, v in values.items()} == {
        path: p.shape for path, p in block_parameters(config, cross_attention=cross).items()
    }
    X, H = random_array(5, B, T, 12), random_array(6, B, S, 12) if cross else None
    mask = random_array(7, B, 1, T, T) > -0.8
    mask[0, 0, 2] = False  # this query sees nothing
    masks = {"mask": mask} | ({"memory_mask": random_array(8, B, 1, T, S) > -0.5} if cross else {})
    arguments = {name: twin.array(m) for name, m in masks.items()} | ({"H_enc": twin.array(H)} if cross else {})
    expected = numpy_block(X, values, config, H_enc=H, masks=masks, causal=True)
    assert_close(block(twin.array(X), **arguments), expected)


# ---- dropout


RATES = {
    0: ("attention_dropout", (B, 3, T, T)),
    1: ("dropout", (B, T, 12)),
    2: ("attention_dropout", (B, 3, T, S)),
    3: ("dropout", (B, T, 12)),
    4: ("hidden_dropout", (B, T, 7)),
    5: ("dropout", (B, T, 12)),
}


@both
@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("cross", [False, True], ids=["self-only", "with-cross"])
def test_dropout_is_where_the_contract_says(twin, placement, cross):
    """Place i of a block draws from ``fold(rng, i)``; the attention weights, the branches' ends, the hidden units."""
    rates = {"dropout": 0.3, "attention_dropout": 0.2, "hidden_dropout": 0.5}
    config = config_of(norm_placement=placement, **rates)
    block = block_of(twin, config, cross_attention=cross)
    values = scatter_parameters(block, 5)
    X, H = random_array(9, B, T, 12), random_array(10, B, S, 12) if cross else None
    seed = 99
    factors = {
        place: references.dropout_factors(references.key_of(seed, place), shape, rates[name])
        for place, (name, shape) in RATES.items()
    }
    arguments = {"H_enc": twin.array(H)} if cross else {}
    out = block(twin.array(X), **arguments, rng=twin.key(seed))
    assert_close(out, numpy_block(X, values, config, H_enc=H, factors=factors))
    assert_close(block(twin.array(X), **arguments), numpy_block(X, values, config, H_enc=H), name="rng None")


def test_mode_of_the_module_does_not_matter():
    """``train()`` and ``eval()`` change nothing: randomness is the argument ``rng``."""
    config = config_of(dropout=0.5, attention_dropout=0.5, hidden_dropout=0.5)
    block = block_of(TORCH, config)
    scatter_parameters(block, 6)
    X = TORCH.array(random_array(11, B, T, 12))
    calm = block(X)
    assert_close(block.train()(X), calm, 0.0)
    assert_close(block.eval()(X), calm, 0.0)
    dropped = block.eval()(X, rng=TORCH.key(1))
    assert_close(block.train()(X, rng=TORCH.key(1)), dropped, 0.0)
    assert abs(to_numpy(dropped) - to_numpy(calm)).max() > 0.1
    flax_block = block_of(FLAX, config)
    scatter_parameters(flax_block, 6)
    X = FLAX.array(random_array(11, B, T, 12))
    calm = to_numpy(flax_block(X))
    flax_block.train()
    assert_close(flax_block(X), calm, 0.0)
    flax_block.eval()
    assert_close(flax_block(X), calm, 0.0)
    assert_close(flax_block(X, rng=FLAX.key(1)), dropped)


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_twins_agree_with_dropout(norm, placement):
    config = config_of(
        norm=norm,
        norm_bias=norm == "layernorm",
        norm_placement=placement,
        activation="gelu",
        gated=True,
        dropout=0.1,
        attention_dropout=0.2,
        hidden_dropout=0.3,
    )

    inputs = {
        "X": random_array(12, B, T, 12),
        "H_enc": random_array(13, B, S, 12),
        "mask": random_array(14, B, 3, T, T) > -1,
        "bias": random_array(15, 1, 3, T, T),
    }
    results = []
    for twin in (TORCH, FLAX):
        block = block_of(twin, config, causal=True, cross_attention=True)
        scatter_parameters(block, 7)
        results.append(gradients(twin, lambda m, t=twin, **kw: m(**kw, rng=t.key(8)), inputs, block))
    (out, grads), (flax_out, flax_grads) = results
    assert_close(flax_out, out)
    assert_gradients_close(flax_grads, grads)


# ---- content that may not be seen, through a whole block


@both
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_hidden_content_stays_in_its_row(twin, placement):
    """NaN in padded keys and encoder padding: the other rows are those of finite padding."""
    config = config_of(norm_placement=placement)
    block = block_of(twin, config, cross_attention=True)
    scatter_parameters(block, 9)
    X, H = random_array(16, B, T, 12), random_array(17, B, S, 12)
    real, real_source = np.ones((B, T), bool), np.ones((B, S), bool)
    real[0, 3:] = real[1, 0] = real_source[0, 1] = real_source[1, 3] = False
    masks = {"mask": twin.array(real[:, None, None]), "memory_mask": twin.array(real_source[:, None, None])}
    clean = to_numpy(block(twin.array(X), twin.array(H), **masks))
    X[~real], H[~real_source] = np.nan, np.inf
    dirty = to_numpy(block(twin.array(X), twin.array(H), **masks))
    assert np.isfinite(dirty[real]).all()
    assert_close(dirty[real], clean[real], 1e-14)
    assert np.isnan(dirty[~real]).all()
