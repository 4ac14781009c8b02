"""AttentionLayer of both twins: by hand, against torch.nn and loops in NumPy, and where rows see nothing or NaN."""

import numpy as np
import pytest
import torch

from parity_tests import references
from parity_tests.comparisons import assert_gradients_close
from parity_tests.helpers import (
    FLAX,
    FLOAT64,
    TORCH,
    assert_close,
    both,
    gradients,
    parameters,
    random_array,
    scatter_parameters,
    set_parameters,
    to_numpy,
)
from parity_tests.modes import MODES, eager, every_mode, torch_compiled

B, T, S = 2, 5, 4
LN3 = np.log(3.0)


def attention(twin, D, K, A, **options):
    return twin.file("attention").AttentionLayer(D, K, A, **FLOAT64, **options)


def as_arrays(twin, values):
    return {name: twin.array(value) for name, value in values.items()}


# ---- by hand: matrices that copy, one-hot tokens, and scores of 0 or ln 3, so that every weight is a plain fraction


def identity_layer(twin, *, size, **options):
    """W^Q = 2 ln 3 · I, the others I: with K = 4 and one-hot rows the scaled score is ln 3 for a token and itself."""
    layer = attention(twin, size, size, 1, **options)
    eye = np.eye(size)
    set_parameters(
        layer,
        {
            "query.weight": np.sqrt(size) * LN3 * eye,
            "key.weight": eye,
            "value.weight": eye,
            "output.weight": eye,
        },
    )
    return layer


@both
def test_by_hand_two_tokens(twin):
    """exp(ln 3) = 3 for a token with itself, exp(0) = 1 for the other: weights 3/4 and 1/4."""
    X = np.array([[[1.0, 0, 0, 0], [0, 1.0, 0, 0]]])
    expected = np.array([[[0.75, 0.25, 0, 0], [0.25, 0.75, 0, 0]]])
    assert_close(identity_layer(twin, size=4)(twin.array(X)), expected, 1e-15)


@both
def test_by_hand_causal(twin):
    """Row 0 sees one key, row 1 two (1 : 3), row 2 three (1 : 1 : 3)."""
    X = np.eye(4)[None, :3]
    expected = np.array([[[1, 0, 0, 0], [1 / 4, 3 / 4, 0, 0], [1 / 5, 1 / 5, 3 / 5, 0]]])
    assert_close(identity_layer(twin, size=4, causal=True)(twin.array(X)), expected, 1e-15)


@both
def test_by_hand_causal_window(twin):
    """A window of 2 sees itself and the one key before it."""
    X = np.eye(4)[None]
    expected = np.array([[[1, 0, 0, 0], [1 / 4, 3 / 4, 0, 0], [0, 1 / 4, 3 / 4, 0], [0, 0, 1 / 4, 3 / 4]]])
    assert_close(identity_layer(twin, size=4, causal=True, window=2)(twin.array(X)), expected, 1e-15)


@both
def test_by_hand_window_both_ways(twin):
    X = np.eye(4)[None]
    expected = np.array(
        [[[3 / 4, 1 / 4, 0, 0], [1 / 5, 3 / 5, 1 / 5, 0], [0, 1 / 5, 3 / 5, 1 / 5], [0, 0, 1 / 4, 3 / 4]]]
    )
    assert_close(identity_layer(twin, size=4, window=2)(twin.array(X)), expected, 1e-15)


@both
def test_by_hand_additive_mask(twin):
    """Adding ln 3 to the other token's score makes both 3: half and half. Adding -inf hides."""
    X = np.array([[[1.0, 0, 0, 0], [0, 1.0, 0, 0]]])
    mask = np.array([[0, LN3], [-np.inf, 0]])
    expected = np.array([[[0.5, 0.5, 0, 0], [0, 1.0, 0, 0]]])
    assert_close(identity_layer(twin, size=4)(twin.array(X), mask=twin.array(mask)), expected, 1e-15)


@both
def test_by_hand_cross_attention(twin):
    """The query is token 1; the encoder holds tokens 1, 2 and 1: 3 : 1 : 3."""
    X = np.eye(4)[None, 1:2]
    H = np.eye(4)[None, [1, 2, 1]]
    expected = np.array([[[0, 6 / 7, 1 / 7, 0]]])
    assert_close(identity_layer(twin, size=4)(twin.array(X), twin.array(H)), expected, 1e-15)


@both
def test_by_hand_softcap(twin):
    """A cap of c = 2 ln 3 turns (ln 3)² into ln 3: (ln 3)²/c = (ln 3)/2 = artanh(1/2), and c/2 = ln 3."""
    layer = identity_layer(twin, size=4, softcap=2 * LN3)
    set_parameters(layer, parameters(layer) | {"query.weight": 2 * LN3 * LN3 * np.eye(4)})
    X = np.array([[[1.0, 0, 0, 0], [0, 1.0, 0, 0]]])
    expected = np.array([[[0.75, 0.25, 0, 0], [0.25, 0.75, 0, 0]]])
    assert_close(layer(twin.array(X)), expected, 1e-15)


@both
def test_by_hand_four_heads_share_two_keys(twin):
    """Values: key head 0 reads entry 0 of a token, key head 1 entry 1. Query heads 0, 1 use the first, 2, 3 the second.

    All scores are 0 (W^Q = 0), so a head gives the mean of its values over the two tokens (1, 10) and (3, 30): 2, 2,
    20, 20 when heads are shared in runs, and 2, 20, 2, 20 if they were dealt in turn.
    """
    layer = attention(twin, 4, 1, 4, num_kv_heads=2)
    V = np.zeros((2, 4))
    V[0, 0] = V[1, 1] = 1.0
    set_parameters(
        layer,
        {
            "query.weight": np.zeros((4, 4)),
            "key.weight": np.ones((2, 4)),
            "value.weight": V,
            "output.weight": np.eye(4),
        },
    )
    X = np.array([[[1.0, 10, 5, 7], [3.0, 30, 6, 8]]])
    expected = np.array([[[2.0, 2, 20, 20], [2.0, 2, 20, 20]]])
    assert_close(layer(twin.array(X)), expected, 1e-15)


@both
def test_by_hand_scale(twin):
    """key_dim is 4 but model_dim 2: the score is divided by sqrt(4), not by sqrt(2)."""
    layer = attention(twin, 2, 4, 1, value_dim=2)
    into_four = np.array([[1.0, 0], [0, 1], [0, 0], [0, 0]])
    values = {"query.weight": 2 * LN3 * into_four, "key.weight": into_four}
    set_parameters(layer, values | {"value.weight": np.eye(2), "output.weight": np.eye(2)})
    assert_close(layer(twin.array(np.eye(2)[None])), np.array([[[3 / 4, 1 / 4], [1 / 4, 3 / 4]]]), 1e-15)
    layer = attention(twin, 2, 4, 1, value_dim=2, scale=1.0)
    values["query.weight"] = LN3 * into_four
    set_parameters(layer, values | {"value.weight": np.eye(2), "output.weight": np.eye(2)})
    assert_close(layer(twin.array(np.eye(2)[None])), np.array([[[3 / 4, 1 / 4], [1 / 4, 3 / 4]]]), 1e-15)


# ---- torch.nn.MultiheadAttention


def torch_witness(D, A, values, *, bias):
    """``torch.nn.MultiheadAttention`` with our weights: its in_proj is query, key and value one above the other."""
    witness = torch.nn.MultiheadAttention(D, A, bias=bias, batch_first=True, dtype=torch.float64)
    names = ("query", "key", "value")
    with torch.no_grad():
        witness.in_proj_weight.copy_(torch.from_numpy(np.concatenate([values[f"{n}.weight"] for n in names])))
        witness.out_proj.weight.copy_(torch.from_numpy(values["output.weight"]))
        if bias:
            witness.in_proj_bias.copy_(torch.from_numpy(np.concatenate([values[f"{n}.bias"] for n in names])))
            witness.out_proj.bias.copy_(torch.from_numpy(values["output.bias"]))
    return witness


def witness_gradients(witness, D):
    grads = {"output.weight": witness.out_proj.weight.grad}
    for i, name in enumerate(("query", "key", "value")):
        grads[f"{name}.weight"] = witness.in_proj_weight.grad[i * D : (i + 1) * D]
        if witness.in_proj_bias is not None:
            grads[f"{name}.bias"] = witness.in_proj_bias.grad[i * D : (i + 1) * D]
    if witness.in_proj_bias is not None:
        grads["output.bias"] = witness.out_proj.bias.grad
    return {name: grad.numpy() for name, grad in grads.items()}


# a causal mask belongs to self-attention
HIDDEN = [("self", kind) for kind in ("nothing", "causal", "padding", "causal-and-padding", "additive")]
HIDDEN += [("cross", kind) for kind in ("nothing", "padding", "additive")]


@both
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(("attends", "hidden"), HIDDEN)
def test_against_torch_nn(twin, bias, attends, hidden):
    D, A, cross = 12, 3, attends == "cross"
    layer = attention(twin, D, D // A, A, qkv_bias=bias, output_bias=bias, causal="causal" in hidden)
    values = scatter_parameters(layer, 1)
    witness = torch_witness(D, A, values, bias=bias)
    X, H = random_array(2, B, T, D), random_array(3, B, S, D)
    length = S if cross else T
    real = np.ones((B, length), bool)
    if "padding" in hidden:
        real[0, -2:] = False
        real[1, -1:] = False
    mask = real[:, None, None, :] if "padding" in hidden else None
    if hidden == "additive":
        mask = random_array(4, B, A, T, length)
    # True in torch.nn's masks hides; a query must see something there, so padding is on the right
    witness_mask = None
    if "causal" in hidden:
        witness_mask = torch.triu(torch.ones(T, T, dtype=torch.bool), 1)
    if hidden == "additive":
        witness_mask = torch.from_numpy(mask.reshape(B * A, T, length))
    inputs = {"X": X} | ({"H_enc": H} if cross else {})
    arguments = {} if mask is None else {"memory_mask" if cross else "mask": twin.array(mask)}
    cotangent = random_array(5, B, T, D)
    out, grads = gradients(twin, lambda m, **kw: eager(m, **kw, **arguments), inputs, layer, cotangent)

    native = {name: torch.from_numpy(value.copy()).requires_grad_(True) for name, value in inputs.items()}
    M = native.get("H_enc", native["X"])
    padded = torch.from_numpy(~real) if "padding" in hidden else None
    expected, _ = witness(native["X"], M, M, key_padding_mask=padded, attn_mask=witness_mask, need_weights=True)
    (expected * torch.from_numpy(cotangent)).sum().backward()
    assert_close(out, expected)
    expected_grads = witness_gradients(witness, D) | {name: value.grad.numpy() for name, value in native.items()}
    assert_gradients_close(grads, expected_grads, 1e-12)


# ---- loops in NumPy, over everything that torch.nn does not have


def key_padding(A):
    mask = np.ones((B, 1, 1, T), bool)
    mask[0, ..., :2] = False
    mask[1, ..., 3] = False
    return mask


def additive(A):
    mask = random_array(7, B, A, T, T)
    mask[0, 0, 1, 2] = mask[1, :, 2, 1:] = -np.inf
    return mask


LAYERS = {
    "plain": {},
    "grouped 6 over 2": {"num_heads": 6, "num_kv_heads": 2},
    "one key head": {"num_heads": 4, "num_kv_heads": 1},
    "K is not D/A": {"key_dim": 3, "num_heads": 4},
    "J is not K": {"key_dim": 4, "value_dim": 7},
    "J of 1": {"value_dim": 1, "num_heads": 6, "num_kv_heads": 3},
    "biases": {"qkv_bias": True, "output_bias": True, "num_heads": 4, "num_kv_heads": 2},
    "scale": {"scale": 0.9},
    "softcap": {"softcap": 0.7, "scale": 1.0},
    "causal": {"causal": True},
    "window 1": {"window": 1},
    "window 2": {"window": 2},
    "causal window 1": {"causal": True, "window": 1},
    "causal window 3": {"causal": True, "window": 3},
    "window beyond T": {"causal": True, "window": 50},
    "rmsnorm on q and k": {"qk_norm": "rmsnorm", "num_heads": 4, "num_kv_heads": 2},
    "layernorm on q and k": {"qk_norm": "layernorm", "qkv_bias": True},
    "rotary": {"rotary": 4, "causal": True},
    "rotary on a part": {"rotary": 2, "key_dim": 6},
    "rotary interleaved": {"rotary": 4, "key_dim": 5, "convention": "interleaved", "num_heads": 4, "num_kv_heads": 2},
    "norm, then rotary": {"rotary": 4, "qk_norm": "layernorm"},
    "everything": {
        "num_heads": 6,
        "num_kv_heads": 2,
        "key_dim": 6,
        "value_dim": 3,
        "qkv_bias": True,
        "output_bias": True,
        "scale": 0.6,
        "softcap": 1.3,
        "causal": True,
        "window": 3,
        "rotary": 4,
        "qk_norm": "rmsnorm",
    },
}
D = 10


def build(twin, options):
    """The layer and what the reference needs to know about it."""
    options = dict(options)
    A, K = options.pop("num_heads", 2), options.pop("key_dim", 4)
    kind, R, convention = options.pop("qk_norm", None), options.pop("rotary", None), options.pop("convention", "half")
    known = {"A": A, "K": K, "G": options.get("num_kv_heads"), "J": options.get("value_dim")}
    known |= {name: options[name] for name in ("scale", "softcap", "causal", "window") if name in options}
    if kind:
        norm = twin.file("norms").RMSNorm if kind == "rmsnorm" else twin.file("norms").LayerNorm
        options |= {"query_norm": norm(K, **FLOAT64), "key_norm": norm(K, **FLOAT64)}
    if R:
        options["rotary"] = twin.file("positions").RotaryEncoding(R, base=37.0, convention=convention)
        known["rotate"] = references.rotation(R, base=37.0, convention=convention)
    layer = attention(twin, D, K, A, **options)
    values = scatter_parameters(layer, 11)
    if kind == "rmsnorm":
        known["query_norm"] = lambda q: references.rms_norm(q, values["query_norm.weight"])
        known["key_norm"] = lambda k: references.rms_norm(k, values["key_norm.weight"])
    if kind == "layernorm":
        for name in ("query_norm", "key_norm"):
            known[name] = lambda x, n=name: references.layer_norm(x, values[f"{n}.weight"], values[f"{n}.bias"])
    return layer, values, known


SELF_MASKS = {
    "no mask": lambda A: {},
    "boolean": lambda A: {"mask": key_padding(A)},
    "boolean [T, S]": lambda A: {"mask": random_array(6, T, T) > -0.5},
    "additive": lambda A: {"mask": additive(A)},
    "bias": lambda A: {"bias": random_array(8, 1, A, T, T)},
    "bias and boolean": lambda A: {"bias": random_array(8, B, A, T, T), "mask": random_array(9, B, A, T, T) > 0},
    "positions": lambda A: {"positions": np.array([[0, 0, 1, 2, 3], [4, 7, 1, 0, 9]])},
    "one row of positions": lambda A: {"positions": np.array([[3, 4, 5, 6, 7]])},
}


def pairs(masks, usual):
    """Every layer with the usual masks, and two of the layers with every mask."""
    return [(name, mask) for name in LAYERS for mask in masks if mask in usual or name in ("plain", "everything")]


@both
@pytest.mark.parametrize(("name", "mask"), pairs(SELF_MASKS, ("no mask", "bias and boolean")))
def test_self_attention_against_loops(twin, name, mask):
    layer, values, known = build(twin, LAYERS[name])
    X, extra = random_array(20, B, T, D), SELF_MASKS[mask](known["A"])
    expected = references.attention(X, values, **known, **extra)
    assert_close(layer(twin.array(X), **as_arrays(twin, extra)), expected)


CAUSAL = ("causal", "causal window 1", "causal window 3", "everything")
IN_PIECES = [(name, mask) for name in CAUSAL for mask in ("no mask", "boolean", "additive", "bias and boolean")]


@pytest.mark.parametrize(("name", "mask"), IN_PIECES)
def test_queries_in_pieces_change_nothing(name, mask, monkeypatch):
    """What Flax does in training from 256 queries on, with five: the output of the loops, and the same gradients."""
    layer, values, known = build(FLAX, LAYERS[name])
    extra, file = SELF_MASKS[mask](known["A"]), FLAX.file("attention")
    X, cotangent = random_array(20, B, T, D), random_array(22, B, T, D)
    made = []
    monkeypatch.setattr(file, "attend", lambda Q, *M, attend=file.attend, **kw: made.append(Q) or attend(Q, *M, **kw))

    def run(m, **inputs):
        return m(**inputs, **as_arrays(FLAX, extra))

    whole = gradients(FLAX, run, {"X": X}, layer, cotangent)
    monkeypatch.setattr(file, "_LONG", T)
    assert {Q.shape[2] for Q in made} == {T}
    made.clear()
    gradients(FLAX, run, {"X": X}, layer, cotangent)
    assert {Q.shape[2] for Q in made} == {T}, "outside of training there are no pieces"
    made.clear()
    with FLAX.file("linear").first_gradients():
        out, grads = gradients(FLAX, run, {"X": X}, layer, cotangent)
    assert {Q.shape[2] for Q in made} == {1, 2}
    assert_close(out, references.attention(X, values, **known, **extra))
    assert_gradients_close(grads, whole[1], 1e-13)


@pytest.mark.parametrize("fault", ["a key is left out", "the window begins late", "rows of a mask stay"])
def test_pieces_that_are_cut_elsewhere_are_noticed(fault, monkeypatch):
    layer, _, known = build(FLAX, LAYERS["everything"])
    extra, file = as_arrays(FLAX, SELF_MASKS["bias and boolean"](known["A"])), FLAX.file("attention")
    X = FLAX.array(random_array(20, B, T, D))
    right = layer(X, **extra)
    monkeypatch.setattr(file, "_LONG", T)
    monkeypatch.setattr(file, "in_training", lambda: True)
    assert_close(layer(X, **extra), right, 1e-14)
    if fault == "rows of a mask stay":
        whole = file._part
        monkeypatch.setattr(file, "_part", lambda v, begin, first, end: whole(v, 0, first, end)[..., : end - begin, :])
    else:
        late = fault == "the window begins late"

        def attend(Q, K, V, *, allowed, attend=file.attend, **how):
            seen = allowed.at[..., 0 if late else -1].set(False)
            return attend(Q, K, V, allowed=seen, **how)

        monkeypatch.setattr(file, "attend", attend)
    with pytest.raises(AssertionError):
        assert_close(layer(X, **extra), right, 1e-14)


CROSS_MASKS = {
    "no mask": lambda A: {},
    "padding": lambda A: {"memory_mask": np.array([[1, 1, 0, 0], [0, 1, 1, 1]], bool)[:, None, None]},
    "full boolean": lambda A: {"memory_mask": random_array(30, B, A, T, S) > 0},
    "additive": lambda A: {"memory_mask": np.where(random_array(31, A, T, S) > 1, -np.inf, random_array(32, A, T, S))},
}


@both
@pytest.mark.parametrize(("name", "mask"), pairs(CROSS_MASKS, ("full boolean",)))
def test_cross_attention_against_loops(twin, name, mask):
    """What is about the positions of X (causal, window, rotary, mask, bias, positions) plays no part with H_enc."""
    layer, values, known = build(twin, LAYERS[name])
    A = known["A"]
    X, H, extra = random_array(20, B, T, D), random_array(21, B, S, D), CROSS_MASKS[mask](A)
    about_X = {"causal", "window", "rotate"}
    expected = references.attention(X, values, H_enc=H, **{k: v for k, v in known.items() if k not in about_X}, **extra)
    native = as_arrays(twin, extra)
    assert_close(layer(twin.array(X), twin.array(H), **native), expected)
    unused = {
        "mask": random_array(33, B, A, T, T) > 0,
        "bias": random_array(34, 1, A, T, T),
        "positions": np.array([[5, 3, 1, 0, 2]]),
    }
    with_unused = layer(twin.array(X), twin.array(H), **native, **as_arrays(twin, unused))
    assert_close(with_unused, expected, name="mask, bias and positions with H_enc")
    unused["mask"] = np.full((T, T), -np.inf)
    assert_close(layer(twin.array(X), twin.array(H), **native, **as_arrays(twin, unused)), expected)


@both
def test_notebook_cell(twin):
    """The notebook's layer: ``mask`` [T, T] is for self-attention, here given together with H_enc of another length."""
    layer = twin.file("attention").AttentionLayer(model_dim=24, key_dim=3, num_heads=4)
    X = random_array(1, 10, 10, 24).astype(np.float32)
    Y = random_array(2, 10, 8, 24).astype(np.float32)
    mask = np.array([[0 if i >= j else -np.inf for j in range(10)] for i in range(10)], np.float32)
    crossed = layer(twin.array(X), H_enc=twin.array(Y), mask=twin.array(mask))
    assert tuple(crossed.shape) == (10, 10, 24)
    assert_close(crossed, layer(twin.array(X), H_enc=twin.array(Y)), 0.0)
    causal = twin.file("attention").AttentionLayer(model_dim=24, key_dim=3, num_heads=4, causal=True)
    assert_close(layer(twin.array(X), mask=twin.array(mask)), causal(twin.array(X)), 1e-6)


# ---- the twins against each other, gradients included


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_twins_agree(options, cross):
    A = options.get("num_heads", 2)
    inputs = {"X": random_array(40, B, T, D, scale=2.0)}
    if cross:
        inputs |= {"H_enc": random_array(41, B, S, D), "memory_mask": random_array(42, A, T, S)}
    else:
        inputs |= {"mask": random_array(43, B, A, T, T) > -0.7, "bias": random_array(44, 1, A, T, T)}
    calls = {}
    for twin in (TORCH, FLAX):
        layer, values, _ = build(twin, options)
        calls[twin.name] = (*gradients(twin, eager, inputs, layer), values)
    (out, grads, values), (flax_out, flax_grads, flax_values) = calls["torch"], calls["flax"]
    assert_close(flax_values, values, 0.0)
    assert_close(flax_out, out, name="output")
    assert_gradients_close(flax_grads, grads)


@both
def test_gradient_is_the_slope(twin):
    """Central differences along one random direction of all parameters and inputs, an empty row included."""
    layer, values, _ = build(twin, LAYERS["everything"])
    mask = np.ones((B, 1, T, T), bool)
    mask[0, 0, 2] = False
    inputs = {"X": random_array(50, B, T, D), "bias": random_array(51, 1, 6, T, T)}
    cotangent = random_array(52, B, T, D)

    def value(step):
        set_parameters(layer, {p: v + step * directions[p] for p, v in values.items()})
        moved = {n: v + step * directions[n] for n, v in inputs.items()}
        out = layer(**as_arrays(twin, moved), mask=twin.array(mask))
        return float((to_numpy(out) * cotangent).sum())

    _, grads = gradients(twin, lambda m, **kw: eager(m, **kw, mask=twin.array(mask)), inputs, layer, cotangent)
    directions = {n: random_array(60 + i, *g.shape) for i, (n, g) in enumerate(sorted(grads.items()))}
    h = 1e-5
    # fourth order: the error is about h^4 from the formula and 1e-16/h from rounding
    slope = (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)
    expected = sum((grads[n] * directions[n]).sum() for n in grads)
    assert abs(slope - expected) <= 1e-8 * abs(expected)


# ---- rows with nothing to attend to


def empty_rows(kind, cross):
    """The arguments that leave query 1 of row 0 and every query of row 1 without a key."""
    length = S if cross else T
    allowed = np.ones((B, 1, T, length), bool)
    allowed[0, 0, 1] = False
    allowed[1] = False
    mask = allowed if kind == "bool" else np.where(allowed, 0.0, -np.inf)
    empty = np.zeros((B, T), bool)
    empty[0, 1] = empty[1] = True
    return {"memory_mask" if cross else "mask": mask}, empty


# the compiled layer is asked once each way: it takes seconds to compile
EMPTY = [
    (*mode, kind, cross)
    for mode in MODES
    for kind, cross in (("bool", False), ("-inf", True), ("-inf", False), ("bool", True))
    if mode[1] is not torch_compiled or (kind, cross) in (("bool", False), ("-inf", True))
]


def name_of(twin, call, kind, cross, *junk):
    return "-".join((twin.name, call.__name__, kind, "cross" if cross else "self", *junk))


@pytest.mark.parametrize(("twin", "call", "kind", "cross"), EMPTY, ids=[name_of(*case) for case in EMPTY])
def test_nothing_to_attend_to(twin, call, kind, cross):
    """The weighted sum is 0, so the layer gives its output bias; and no gradient passes but that of the output bias."""
    options = {"num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "output_bias": True, "softcap": 2.0}
    layer, values, known = build(twin, options)
    masks, empty = empty_rows(kind, cross)
    arguments = as_arrays(twin, masks)
    inputs = {"X": random_array(70, B, T, D)} | ({"H_enc": random_array(71, B, S, D)} if cross else {})

    def run(module, **kw):
        return call(module, **kw, **arguments)

    cotangent = random_array(72, B, T, D)
    out, grads = gradients(twin, run, inputs, layer, cotangent)
    expected = references.attention(inputs["X"], values, **known, H_enc=inputs.get("H_enc"), **masks)
    assert_close(out, expected)
    assert_close(out[empty], np.broadcast_to(values["output.bias"], out[empty].shape), 0.0)
    assert all(np.isfinite(g).all() for g in grads.values())

    only_empty = np.where(empty[..., None], cotangent, 0.0)
    _, grads = gradients(twin, run, inputs, layer, only_empty)
    assert_close(grads.pop("output.bias"), only_empty.sum((0, 1)))
    for name, grad in grads.items():
        assert (grad == 0).all(), f"{name}: a row that sees nothing has a gradient of {abs(grad).max()}"


def test_twins_agree_on_empty_rows():
    for kind in ("bool", "-inf"):
        for cross in (False, True):
            masks, _ = empty_rows(kind, cross)
            inputs = {"X": random_array(70, B, T, D)} | ({"H_enc": random_array(71, B, S, D)} if cross else {})
            results = []
            for twin in (TORCH, FLAX):
                layer, _, _ = build(twin, LAYERS["biases"])
                native = as_arrays(twin, masks)
                results.append(gradients(twin, lambda m, n=native, **kw: eager(m, **kw, **n), inputs, layer))
            (out, grads), (flax_out, flax_grads) = results
            assert_close(flax_out, out)
            assert_gradients_close(flax_grads, grads)


# ---- content that may not be seen


JUNK = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}
# NaN in every mode; the infinities, which go the same way, in the eager layers
LEAKS = [(*case, junk) for case in EMPTY for junk in JUNK if junk == "nan" or case[1] is eager]


def clean_and_dirty(place, junk, *, cross):
    """Inputs that differ in hidden rows only: small numbers in one, ``junk`` in the other; and the hidden rows."""
    X, H = random_array(80, B, T, D), random_array(81, B, S, D)
    if cross:
        hidden = np.array([[0, 0, 1, 0], [1, 0, 0, 1]], bool)
        dirty = H.copy()
        dirty[hidden] = junk
        if place == "one entry":
            dirty = H.copy()
            dirty[hidden, 3] = junk
        return {"X": X, "H_enc": H}, {"X": X, "H_enc": dirty}, hidden
    hidden = np.array([[0, 0, 0, 1, 1], [1, 0, 0, 0, 0]], bool)
    dirty = X.copy()
    dirty[hidden] = junk
    if place == "one entry":
        dirty = X.copy()
        dirty[hidden, 3] = junk
    return {"X": X}, {"X": dirty}, hidden


@pytest.mark.parametrize(("twin", "call", "kind", "cross", "junk"), LEAKS, ids=[name_of(*case) for case in LEAKS])
def test_hidden_content_does_not_leak(twin, call, kind, cross, junk):
    """Hidden rows hold NaN or infinity: the other rows, and every gradient of them, are those of finite rows."""
    layer, _, _ = build(twin, LAYERS["biases"] | {"softcap": 2.0})
    for place in ("whole row", "one entry"):
        clean, dirty, hidden = clean_and_dirty(place, JUNK[junk], cross=cross)
        allowed = np.broadcast_to(~hidden[:, None, None], (B, 1, T, hidden.shape[1]))
        mask = allowed if kind == "bool" else np.where(allowed, 0.0, -np.inf)
        arguments = as_arrays(twin, {"memory_mask" if cross else "mask": mask})
        # in self-attention the hidden rows are queries too, and rightly NaN: the loss leaves them out
        looked_at = np.ones((B, T), bool) if cross else ~hidden
        cotangent = np.where(looked_at[..., None], random_array(82, B, T, D), 0.0)

        def run(module, _arguments=arguments, **kw):
            return call(module, **kw, **_arguments)

        clean_out, clean_grads = gradients(twin, run, clean, layer, cotangent)
        out, grads = gradients(twin, run, dirty, layer, cotangent)
        assert np.isfinite(clean_out).all()
        assert_close(out[looked_at], clean_out[looked_at], 1e-14)
        if not cross:
            assert np.isnan(out[hidden]).all(), "a query that is itself not finite gives NaN"
        name = "H_enc" if cross else "X"
        assert (grads[name][hidden] == 0).all(), "hidden rows have a gradient"
        assert_gradients_close(grads, clean_grads, 1e-13)


@every_mode
@pytest.mark.parametrize("window", [None, 2], ids=["causal", "causal-window"])
def test_future_does_not_leak_under_causal(twin, call, window):
    """NaN in row 2: queries 0 and 1 do not see it, 2 and 3 do, and 4 does without the window."""
    layer, _, _ = build(twin, LAYERS["biases"] | {"causal": True, "window": window})
    X = random_array(83, B, T, D)
    dirty = X.copy()
    dirty[:, 2, 5] = np.nan
    seen = np.zeros(T, bool)
    seen[2 : (4 if window else 5)] = True
    cotangent = np.where(seen[None, :, None], 0.0, random_array(84, B, T, D))
    clean_out, clean_grads = gradients(twin, call, {"X": X}, layer, cotangent)
    out, grads = gradients(twin, call, {"X": dirty}, layer, cotangent)
    assert np.isnan(out[:, seen]).all()
    assert_close(out[:, ~seen], clean_out[:, ~seen], 1e-14)
    assert (clean_grads["X"][:, 2] == 0).all()
    assert (grads["X"][:, 2] == 0).all()
    assert_gradients_close(grads, clean_grads, 1e-13)


@every_mode
@torch.no_grad()  # a compiler would make the backward program as well
def test_visible_nan_shows(twin, call):
    """A query that may attend to a row that is not finite gives NaN; each head's own mask decides."""
    layer, _, _ = build(twin, {"num_heads": 2})
    X, H = random_array(85, B, T, D), random_array(86, B, S, D)
    H[0, 1, 2] = np.inf
    allowed = np.ones((B, 2, T, S), bool)
    allowed[0, :, 0, 1] = False  # query 0 is blind to it in both heads
    allowed[0, 0, 3, 1] = False  # query 3 in the first head only
    out = to_numpy(call(layer, **as_arrays(twin, {"X": X, "H_enc": H, "memory_mask": allowed})))
    assert np.isfinite(out[1]).all()
    assert np.isfinite(out[0, 0]).all()
    assert np.isnan(out[0, 1:]).all()
    additive = np.where(allowed, -1e30, -np.inf)  # very small is not hidden
    out = to_numpy(call(layer, **as_arrays(twin, {"X": X, "H_enc": H, "memory_mask": additive})))
    assert np.isfinite(out[0, 0]).all()
    assert np.isnan(out[0, 1:]).all()


@both
def test_a_query_that_is_not_finite_gives_nan_even_with_nothing_to_attend_to(twin):
    layer, values, _ = build(twin, {"output_bias": True})
    X = random_array(87, B, T, D)
    X[0, 0, 0] = np.nan
    mask = np.zeros((B, 1, T, T), bool)
    out = np.asarray(
        layer(twin.array(X), mask=twin.array(mask)).detach()
        if twin is TORCH
        else layer(twin.array(X), mask=twin.array(mask))
    )
    assert np.isnan(out[0, 0]).all()
    assert_close(out[0, 1:], np.broadcast_to(values["output.bias"], (T - 1, D)), 0.0)


# ---- dropout of the attention weights


@both
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_dropout_of_weights(twin, cross):
    """One word of the stream for each element of [B, A, T, S]; kept weights are divided by 1 - rate."""
    rate, seed, A = 0.3, 2**40 + 17, 4
    options = {"num_heads": A, "num_kv_heads": 2, "value_dim": 3}
    layer, values, known = build(twin, options | {"dropout": rate})
    X, H = random_array(90, B, T, D), random_array(91, B, S, D) if cross else None
    keep = references.dropout_factors(references.key_of(seed), (B, A, T, S if cross else T), rate)
    assert 0 < (keep == 0).sum() < keep.size
    expected = references.attention(X, values, **known, H_enc=H, keep=keep)
    arguments = {"H_enc": twin.array(H)} if cross else {}
    assert_close(layer(twin.array(X), **arguments, rng=twin.key(seed)), expected)
    plain = references.attention(X, values, **known, H_enc=H)
    assert_close(layer(twin.array(X), **arguments), plain, name="rng None: no dropout")


def test_twins_drop_the_same():
    inputs = {"X": random_array(92, B, T, D), "mask": random_array(93, B, 6, T, T) > -1}
    results = []
    for twin in (TORCH, FLAX):
        layer, _, _ = build(twin, LAYERS["everything"] | {"dropout": 0.4})
        results.append(gradients(twin, lambda m, t=twin, **kw: m(**kw, rng=t.key(5)), inputs, layer))
    (out, grads), (flax_out, flax_grads) = results
    assert_close(flax_out, out)
    assert_gradients_close(flax_grads, grads)


# ---- attend: the explicit formula by itself


@both
def test_attend(twin):
    A, G, K, J = 4, 2, 3, 5
    Q, Ks, V = random_array(100, B, A, T, K), random_array(101, B, G, S, K), random_array(102, B, G, S, J)
    bias, allowed = random_array(103, 1, A, T, S), random_array(104, B, 1, T, S) > -0.5
    allowed[0, 0, 3] = False
    expected = np.zeros((B, A, T, J))
    for b, a, i in np.ndindex(B, A, T):
        g = a // 2
        scores = {
            j: 1.7 * np.tanh(sum(Q[b, a, i] * Ks[b, g, j]) * 0.8 / 1.7) + bias[0, a, i, j]
            for j in range(S)
            if allowed[b, 0, i, j]
        }
        total = sum(np.exp(s) for s in scores.values())
        for j, score in scores.items():
            expected[b, a, i] += np.exp(score) / total * V[b, g, j]
    given = as_arrays(twin, {"Q": Q, "K": Ks, "V": V, "bias": bias, "allowed": allowed})
    masks = {"bias": given["bias"], "allowed": given["allowed"]}
    out = twin.file("attention").attend(given["Q"], given["K"], given["V"], scale=0.8, softcap=1.7, **masks)
    assert_close(out, expected)
