"""Positions: sinusoids, learned rows, rotations, relative buckets, ALiBi; by the papers and against published code."""

import functools
import math

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama
from transformers.models.m2m_100.modeling_m2m_100 import M2M100SinusoidalPositionalEmbedding
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.t5.modeling_t5 import T5Attention

from parity_tests.helpers import (
    FLAX,
    FLOAT64,
    TORCH,
    assert_close,
    assert_twins_agree,
    both,
    parameters,
    random_array,
    reference_dropout,
    reference_key,
    scatter_parameters,
    set_parameters,
    to_numpy,
)
from twinformer.config import RotaryScaling
from twinformer.errors import InputError

# ---- sinusoids


def sinusoids(positions, D, *, layout="interleaved", spacing="textbook", offset=0):
    """Vaswani et al. 2017, section 3.5, one number at a time."""
    H = -(-D // 2)
    table = np.zeros((len(positions), D))
    for row, position in enumerate(positions):
        for i in range(H):
            if spacing == "textbook":
                frequency = 10000.0 ** (-2 * i / D)
            else:
                frequency = 10000.0 ** (-i / (H - 1)) if H > 1 else 1.0
            angle = (position + offset) * frequency
            sine, cosine = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, H + i)
            table[row, sine] = math.sin(angle)
            if cosine < D:
                table[row, cosine] = math.cos(angle)
    return table


def encoding(twin, D, **choices):
    return twin.file("positions").PositionalEncoding(D, **choices)


@both
def test_sinusoid_by_hand(twin):
    """D = 4: frequencies 1 and 1/100. Position 0 is (0, 1, 0, 1); the input is added."""
    X = np.zeros((1, 3, 4))
    X[0, 0] = [10.0, 20.0, 30.0, 40.0]
    expected = np.array(
        [
            [10.0, 21.0, 30.0, 41.0],
            [math.sin(1), math.cos(1), math.sin(0.01), math.cos(0.01)],
            [math.sin(2), math.cos(2), math.sin(0.02), math.cos(0.02)],
        ]
    )
    assert_close(encoding(twin, 4)(twin.array(X)), expected[None])
    halves = encoding(twin, 4, layout="halves")(twin.array(X))
    assert_close(to_numpy(halves)[0, 1], expected[1][[0, 2, 1, 3]])


@both
@pytest.mark.parametrize("D", [1, 6, 7])
@pytest.mark.parametrize("layout", ["interleaved", "halves"])
@pytest.mark.parametrize("spacing", ["textbook", "endpoint"])
def test_sinusoids(twin, D, layout, spacing):
    """Odd widths too; positions far beyond 256; one row of positions for all, and one for each entry of the batch."""
    X = random_array(1, 2, 4, D)
    choices = {"layout": layout, "spacing": spacing}
    layer = encoding(twin, D, **choices)
    assert_close(layer(twin.array(X)), X + sinusoids(range(4), D, **choices))
    given = np.array([[4999, 257, 0, 1023], [3, 3, 2, 700]])
    expected = np.stack([sinusoids(row, D, **choices) for row in given])
    assert_close(layer(twin.array(X), twin.array(given)), X + expected)
    assert_close(layer(twin.array(X), twin.array(given[:1])), X + expected[:1])


@both
def test_offset(twin):
    """Counted from 2: position 0 has the angles of 2."""
    X = np.zeros((1, 3, 6))
    for layout in ("interleaved", "halves"):
        moved = encoding(twin, 6, offset=2, layout=layout)(twin.array(X))
        assert_close(moved, sinusoids([2, 3, 4], 6, layout=layout)[None])


@both
def test_sinusoids_against_marian(twin):
    """Marian: textbook spacing, in halves. Its table is held in float32: half a unit in the last place of 1."""
    D, T = 10, 300
    table = MarianSinusoidalPositionalEmbedding(T, D).create_weight().double().numpy()
    ours = to_numpy(encoding(twin, D, layout="halves")(twin.array(np.zeros((1, T, D)))))
    assert np.abs(ours[0] - table).max() < 2.0**-24


@both
def test_sinusoids_against_tensor2tensors(twin):
    """M2M100 keeps tensor2tensor's table: spaced to the end point, in halves, counted from 2.

    It computes angles in float32: an angle up to 302 is off by up to 302 units of 2⁻²⁴, times the few roundings of the
    frequency.
    """
    D, T = 10, 300
    table = M2M100SinusoidalPositionalEmbedding.get_embedding(T + 2, D).double().numpy()
    layer = encoding(twin, D, layout="halves", spacing="endpoint", offset=2)
    ours = to_numpy(layer(twin.array(np.zeros((1, T, D)))))
    assert np.abs(ours[0] - table[2:]).max() < 302 * 4 * 2.0**-24
    textbook = encoding(twin, D, layout="halves", offset=2)(twin.array(np.zeros((1, T, D))))
    assert np.abs(to_numpy(textbook)[0] - table[2:]).max() > 0.5  # and the bound would show the other spacing


@both
def test_sinusoids_in_float32_and_bfloat16(twin):
    """The angle is computed in float32 even for a bfloat16 input, in which whole numbers above 256 run together."""
    positions = np.array([[0, 255, 257, 1001, 4001]])
    truth = sinusoids(positions[0], 8)
    for dtype, allowed in ((np.float32, 4002 * 2.0**-23), (ml_dtypes.bfloat16, 2.0**-8)):
        layer = encoding(twin, 8)
        ours = to_numpy(layer(twin.array(np.zeros((1, 5, 8), dtype)), twin.array(positions)))
        assert ours.dtype == dtype
        assert np.abs(ours[0].astype(np.float64) - truth).max() < allowed


@both
def test_dropout_after_the_sum(twin):
    """Default rate 0.1, with the key as it comes; without a key none at all."""
    X = random_array(2, 2, 5, 6)
    summed = X + sinusoids(range(5), 6)
    assert_close(encoding(twin, 6)(twin.array(X)), summed)
    for layer, rate in ((encoding(twin, 6), 0.1), (encoding(twin, 6, dropout=0.5), 0.5)):
        dropped = layer(twin.array(X), rng=twin.key(3))
        assert_close(dropped, reference_dropout(summed, rate, reference_key(3)))


def test_sinusoid_twins_agree():
    given = np.array([[0, 1, 1000], [7, 5, 4999]])
    call = lambda twin, layer, X, positions: layer(X, positions, rng=twin.key(1))  # noqa: E731
    inputs = {"X": random_array(2, 2, 3, 7), "positions": given}
    _, grads = assert_twins_agree(call, inputs, lambda twin: encoding(twin, 7, dropout=0.25))
    assert set(grads) == {"X"}  # nothing is learned


@pytest.mark.parametrize(
    "wrong",
    [{"layout": "halves"}, {"spacing": "endpoint"}, {"offset": 1}],
    ids=lambda choices: str(choices),
)
@both
def test_sinusoids_can_fail(twin, wrong):
    with pytest.raises(AssertionError):
        assert_close(encoding(twin, 6)(twin.array(np.zeros((1, 3, 6)))), sinusoids(range(3), 6, **wrong)[None])


@pytest.mark.usefixtures("without_shape_hook")
def test_sequence_too_long():
    messages = []
    for twin in (TORCH, FLAX):
        layer = twin.file("positions").PositionalEncoding(4, max_len=5)
        layer(twin.array(np.zeros((1, 5, 4))))
        with pytest.raises(InputError, match="at most max_len=5 positions, got T=6") as refusal:
            layer(twin.array(np.zeros((1, 6, 4))))
        messages.append(str(refusal.value))
    assert messages[0] == messages[1]


# ---- learned positions


@both
@pytest.mark.parametrize("offset", [0, 2])
def test_learned_positions(twin, offset):
    """Row ``position + offset`` of the table, whose rows count the offset too."""
    layer = twin.file("positions").LearnedPositions(6 + offset, 3, offset=offset, **FLOAT64)
    table = np.arange(3.0 * (6 + offset)).reshape(6 + offset, 3)
    set_parameters(layer, {"weight": table})
    given = np.array([[0, 5, 1], [2, 2, 0]])
    assert_close(layer(twin.array(given)), table[given + offset], rtol=0)
    assert_close(layer(twin.array(given[:1])), table[given[:1] + offset], rtol=0)


def test_learned_positions_gradients():
    """A row that is used twice gathers both cotangents; one that is not used gets 0."""

    def build(twin):
        layer = twin.file("positions").LearnedPositions(8, 3, offset=2, **FLOAT64)
        scatter_parameters(layer)
        return layer

    given = np.array([[0, 5, 1], [5, 5, 0]])
    _, grads = assert_twins_agree(lambda twin, layer, positions: layer(positions), {"positions": given}, build)
    expected = np.zeros((8, 3))
    np.add.at(expected, given + 2, random_array(4242, 2, 3, 3))
    assert_close(grads, {"weight": expected})


@pytest.mark.usefixtures("without_shape_hook")
@pytest.mark.parametrize("bad", [6, -1, 1000])
def test_position_out_of_range(bad):
    """Refused where it can be seen, with or without an offset: never another row's value."""
    for offset in (0, 2):
        messages = []
        for twin in (TORCH, FLAX):
            layer = twin.file("positions").LearnedPositions(6 + offset, 3, offset=offset)
            with pytest.raises(InputError, match="expected") as refusal:
                layer(twin.array(np.array([[0, bad, 1]])))
            messages.append(str(refusal.value))
        assert messages[0] == messages[1]
        assert str(bad) in messages[0]


@pytest.mark.parametrize("bad", [6, -1, -2, -3, 1000])
def test_position_out_of_range_while_traced(bad):
    """A compiled function cannot see the values: that row is NaN, and the others are what they are."""
    layer = FLAX.file("positions").LearnedPositions(8, 3, offset=2, **FLOAT64)
    table = scatter_parameters(layer)["weight"]
    rows = to_numpy(jax.jit(layer)(FLAX.array(np.array([[0, bad, 5]]))))
    assert_close(rows[0], np.stack([table[2], np.full(3, np.nan), table[7]]), rtol=0)


# ---- rotary


def frequencies(R, base=10000.0):
    return np.array([base ** (-2 * i / R) for i in range(R // 2)])


def rotated(X, positions, scaled, convention, attention_factor=1.0):
    """Su et al. 2021: pair i turned by position · frequency_i, one pair at a time; what is not rotated passes."""
    R = 2 * len(scaled)
    result = X.copy()
    for place in np.ndindex(X.shape[:3]):
        position = np.broadcast_to(positions, (X.shape[0], X.shape[2]))[place[0], place[2]]
        for i, frequency in enumerate(scaled):
            first, second = (i, i + R // 2) if convention == "half" else (2 * i, 2 * i + 1)
            a, b = X[place][first], X[place][second]
            cos, sin = (attention_factor * f(position * frequency) for f in (math.cos, math.sin))
            result[place][first], result[place][second] = a * cos - b * sin, b * cos + a * sin
    return result


def rotary(twin, R, **choices):
    return twin.file("positions").RotaryEncoding(R, **choices)


@both
def test_rotary_by_hand(twin):
    """R = 4, base 100: frequencies 1 and 1/10. Unit vectors turn into columns of the rotation."""
    X = np.eye(4).reshape(1, 1, 4, 4)
    turned = {}
    for convention in ("half", "interleaved"):
        layer = rotary(twin, 4, base=100.0, convention=convention)
        turned[convention] = to_numpy(layer(twin.array(X), twin.array(np.full((1, 4), 3))))[0, 0]
    c, s, c2, s2 = math.cos(3), math.sin(3), math.cos(0.3), math.sin(0.3)
    assert_close(turned["half"], np.array([[c, 0, s, 0], [0, c2, 0, s2], [-s, 0, c, 0], [0, -s2, 0, c2]]))
    assert_close(turned["interleaved"], np.array([[c, s, 0, 0], [-s, c, 0, 0], [0, 0, c2, s2], [0, 0, -s2, c2]]))


@both
@pytest.mark.parametrize("convention", ["half", "interleaved"])
@pytest.mark.parametrize(("K", "R"), [(6, 6), (8, 4), (5, 2)], ids=["whole", "partial", "odd rest"])
def test_rotary(twin, convention, K, R):
    X = random_array(3, 2, 3, 4, K)
    given = np.array([[0, 1, 300, 4000], [5, 4, 3, 70_000]])
    layer = rotary(twin, R, base=500.0, convention=convention)
    expected = rotated(X, given, frequencies(R, 500.0), convention)
    actual = layer(twin.array(X), twin.array(given))
    assert_close(actual, expected, rtol=1e-11)  # 70 000 · 2⁻⁵³ and its roundings
    assert to_numpy(actual)[..., R:].tobytes() == X[..., R:].tobytes()
    assert_close(to_numpy(actual)[0, :, 0], X[0, :, 0], rtol=0)  # position 0 turns nothing
    assert_close(layer(twin.array(X), twin.array(given[:1])), rotated(X, given[:1], frequencies(R, 500.0), convention))


@both
@pytest.mark.parametrize("convention", ["half", "interleaved"])
def test_rotary_against_published_code(twin, convention):
    """Llama's code rotates halves, GPT-J's neighbours; both are given cosines and sines in float64."""
    B, A, T, K = 2, 3, 5, 8
    X = random_array(4, B, A, T, K)
    given = np.array([[0, 1, 2, 3, 4], [9, 300, 7, 6, 5]])
    angles = torch.from_numpy(given[..., None] * frequencies(K))
    if convention == "half":
        whole = torch.cat([angles, angles], -1)
        witness, _ = modeling_llama.apply_rotary_pos_emb(
            torch.from_numpy(X), torch.from_numpy(X), whole.cos(), whole.sin()
        )
    else:
        heads_last = torch.from_numpy(X).transpose(1, 2)
        witness = modeling_gptj.apply_rotary_pos_emb(heads_last, angles.sin(), angles.cos()).transpose(1, 2)
    assert_close(rotary(twin, K, convention=convention)(twin.array(X), twin.array(given)), witness)


@functools.cache
def frequencies_of(twin, R, **choices):
    """What a layer turns by: the angle of (1, 0) at position 1. Any common factor of cosine and sine drops out."""
    X = np.zeros((1, 1, 1, R))
    X[..., : R // 2] = 1
    turned = to_numpy(rotary(twin, R, **choices)(twin.array(X), twin.array(np.ones((1, 1), np.int64))))[0, 0, 0]
    cosines, sines = turned[: R // 2], turned[R // 2 :]
    return np.arctan2(sines, cosines), np.hypot(sines, cosines)


def scaled_by_contract(f, R, base, s):
    """The equations of the contract, written out."""
    if s.kind == "none":
        return f
    if s.kind == "linear":
        return f / s.factor
    if s.kind == "llama3":
        low, high = s.original_context_length / s.low_freq_factor, s.original_context_length / s.high_freq_factor
        result = []
        for frequency in f:
            w = 2 * math.pi / frequency
            if w > low:
                result.append(frequency / s.factor)
            elif w < high:
                result.append(frequency)
            else:
                share = (s.original_context_length / w - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
                result.append((1 - share) * frequency / s.factor + share * frequency)
        return np.array(result)
    ends = [
        R * math.log(s.original_context_length / (2 * math.pi * r)) / (2 * math.log(base))
        for r in (s.beta_fast, s.beta_slow)
    ]
    lo, hi = (math.floor(ends[0]), math.ceil(ends[1])) if s.truncate else ends
    lo, hi = max(lo, 0), min(hi, R - 1)
    if lo == hi:
        hi += 0.001
    ramp = np.clip((np.arange(R // 2) - lo) / (hi - lo), 0, 1)
    return f / s.factor * ramp + f * (1 - ramp)


SCALINGS = {
    "none": (16, 10000.0, RotaryScaling()),
    "linear": (16, 10000.0, RotaryScaling(kind="linear", factor=4.0)),
    "llama3": (64, 500000.0, RotaryScaling(kind="llama3", factor=8.0, original_context_length=8192)),
    "llama3 other": (
        32,
        10000.0,
        RotaryScaling(
            kind="llama3", factor=3.0, original_context_length=100, low_freq_factor=1.5, high_freq_factor=6.0
        ),
    ),
    "yarn": (
        64,
        10000.0,
        RotaryScaling(kind="yarn", factor=16.0, original_context_length=4096, attention_factor=1.2772588),
    ),
    "yarn untruncated": (
        32,
        150000.0,
        RotaryScaling(
            kind="yarn", factor=32.0, original_context_length=4096, truncate=False, attention_factor=1.3465736
        ),
    ),
    "yarn clamped": (  # short: both ends of the ramp would lie below dimension 0
        16,
        10000.0,
        RotaryScaling(kind="yarn", factor=4.0, original_context_length=6, beta_fast=2.0, attention_factor=0.7),
    ),
    "yarn long": (  # long: the upper end, 7.6 rounded up to 8, is kept to the last dimension, 7
        8,
        100.0,
        RotaryScaling(kind="yarn", factor=4.0, original_context_length=40000, beta_fast=2000.0),
    ),
}


@both
@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_frequencies(twin, name):
    R, base, scaling = SCALINGS[name]
    expected = scaled_by_contract(frequencies(R, base), R, base, scaling)
    found, size = frequencies_of(twin, R, base=base, scaling=scaling)
    assert np.abs(found / expected - 1).max() < 1e-12  # each frequency by its own size
    assert_close(size, np.full(R // 2, scaling.attention_factor if scaling.kind == "yarn" else 1.0))
    if scaling.kind != "none":
        assert np.abs(frequencies(R, base) / expected - 1).max() > 0.2


@both
@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "none"])
def test_scaled_frequencies_against_transformers(twin, name):
    """It computes in float32, a power and a handful of products: 16 units in the last place of each frequency."""
    R, base, s = SCALINGS[name]
    given = {"rope_type": s.kind, "rope_theta": base, "factor": s.factor}
    if s.kind == "llama3":
        given |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
    if s.kind == "yarn":
        given |= {name: getattr(s, name) for name in ("beta_fast", "beta_slow", "attention_factor", "truncate")}
    if s.kind != "linear":
        given |= {"original_max_position_embeddings": s.original_context_length}
    config = LlamaConfig(
        hidden_size=2 * R,
        num_attention_heads=2,
        head_dim=R,
        max_position_embeddings=int(s.original_context_length * s.factor) or 4096,
        rope_parameters=given,
    )
    witness, factor = ROPE_INIT_FUNCTIONS[s.kind](config, torch.device("cpu"))
    found, size = frequencies_of(twin, R, base=base, scaling=s)
    assert np.abs(found / witness.double().numpy() - 1).max() < 16 * 2.0**-24
    assert_close(size, np.full(R // 2, float(factor)))


@pytest.mark.parametrize("convention", ["half", "interleaved"])
@pytest.mark.parametrize("name", ["none", "yarn clamped"])
def test_rotary_twins_agree(convention, name):
    R, base, scaling = SCALINGS[name]
    given = np.array([[0, 1, 2], [700, 4095, 257]])
    inputs = {"X": random_array(5, 2, 6, 3, R + 2), "positions": given}
    assert_twins_agree(
        lambda twin, layer, X, positions: layer(X, positions),
        inputs,
        lambda twin: rotary(twin, R, base=base, convention=convention, scaling=scaling),
    )


@both
@pytest.mark.parametrize("convention", ["half", "interleaved"])
def test_scores_depend_on_the_distance_alone(twin, convention):
    """Su et al. 2021, equation 16; and a rotation keeps every length."""
    Q, K = random_array(6, 1, 1, 4, 8), random_array(7, 1, 1, 4, 8)
    layer = rotary(twin, 8, convention=convention)

    def scores(shift):
        places = twin.array(np.arange(4)[None] + shift)
        return to_numpy(layer(twin.array(Q), places))[0, 0] @ to_numpy(layer(twin.array(K), places))[0, 0].T

    assert_close(scores(1000), scores(0))
    turned = to_numpy(layer(twin.array(Q), twin.array(np.array([[5, 600, 7, 80]]))))
    assert_close(np.linalg.norm(turned, axis=-1), np.linalg.norm(Q, axis=-1))
    assert np.abs(turned - Q).max() > 0.5


@both
@pytest.mark.parametrize(
    ("dtype", "allowed"), [(ml_dtypes.bfloat16, 2.0**-7), (np.float16, 2.0**-10), (np.float32, 1e-3)]
)
def test_rotary_angles_are_wide(twin, dtype, allowed):
    """Whole numbers above 256 run together in bfloat16, and so would the angles; they are float32."""
    given = np.array([[255, 257, 1001, 4001, 8191]])
    X = random_array(8, 1, 2, 5, 8).astype(dtype)
    truth = rotated(X.astype(np.float64), given, frequencies(8), "half")
    turned = to_numpy(rotary(twin, 8)(twin.array(X), twin.array(given)))
    assert turned.dtype == dtype
    assert np.abs(turned.astype(np.float64) - truth).max() <= allowed * np.abs(truth).max()
    narrow = rotated(X.astype(np.float64), given.astype(dtype).astype(np.float64), frequencies(8), "half")
    if dtype is ml_dtypes.bfloat16:
        assert np.abs(narrow - truth).max() > 0.5  # the fault that the bound is there for


@both
@pytest.mark.parametrize("wrong", ["convention", "rotary_dim", "base", "sign", "offset"])
def test_rotary_can_fail(twin, wrong):
    X, given = random_array(9, 1, 2, 3, 8), np.array([[0, 1, 2]])
    right = rotary(twin, 4)(twin.array(X), twin.array(given))
    assert_close(right, rotated(X, given, frequencies(4), "half"))
    planted = {
        "convention": lambda: rotated(X, given, frequencies(4), "interleaved"),
        "rotary_dim": lambda: rotated(X, given, frequencies(8), "half"),
        "base": lambda: rotated(X, given, frequencies(4, 10001.0), "half"),
        "sign": lambda: rotated(X, -given, frequencies(4), "half"),
        "offset": lambda: rotated(X, given + 1, frequencies(4), "half"),
    }
    with pytest.raises(AssertionError):
        assert_close(right, planted[wrong]())


# ---- relative positions


def bucket_by_whole_numbers(n, num_buckets, max_distance, bidirectional):
    """Raffel et al. 2020, section 2.1, with the floor in exact arithmetic.

    floor(ln(d/m) / ln(M/m) · c) is the largest k with (d/m)^c >= (M/m)^k, a comparison of whole numbers.
    """
    if bidirectional:
        num_buckets //= 2
        start, d = (num_buckets if n > 0 else 0), abs(n)
    else:
        start, d = 0, max(-n, 0)
    m = num_buckets // 2
    if d < m:
        return start + d
    c, k = num_buckets - m, 0
    while k < c - 1 and d**c * m ** (k + 1) >= max_distance ** (k + 1) * m**c:
        k += 1
    return start + m + k


def buckets_of(twin, distances, num_buckets, max_distance, bidirectional):
    """The bucket of every ``key - query``, read off a table that holds the number of each row."""
    layer = twin.file("positions").RelativeBias(
        num_buckets, 1, max_distance=max_distance, bidirectional=bidirectional, **FLOAT64
    )
    set_parameters(layer, {"weight": np.arange(float(num_buckets))[:, None]})
    asked = np.zeros(601, np.int64)  # always as many, so that only one shape is compiled
    asked[: len(distances)] = distances
    base = max(0, -int(asked.min()))
    bias = layer(twin.array(np.array([[base]])), twin.array(asked[None] + base))
    return to_numpy(bias)[0, 0, 0].astype(np.int64)[: len(distances)]


@both
def test_buckets_by_hand(twin):
    """Eight buckets to distance 16. Both ways four each: 0, 1, [2, 5], [6, …), as 2·√8 = 5.66; later keys add 4."""
    found = buckets_of(twin, range(-8, 9), 8, 16, True)
    assert_close(found, np.array([3, 3, 3, 2, 2, 2, 2, 1, 0, 5, 6, 6, 6, 6, 7, 7, 7]))
    # one way: 0 … 3, then [4, 5], [6, 7], [8, 11], [12, …), as the bounds are 4·√2 = 5.66, 8 and 11.3; later keys are 0
    found = buckets_of(twin, range(-20, 3), 8, 16, False)
    assert_close(found, np.array([7] * 9 + [6] * 4 + [5] * 2 + [4] * 2 + [3, 2, 1, 0, 0, 0])[:23])


@both
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 16), (12, 100), (4, 3), (36, 1000)])
def test_buckets(twin, num_buckets, max_distance, bidirectional):
    distances = np.arange(-300, 301)
    expected = [bucket_by_whole_numbers(int(n), num_buckets, max_distance, bidirectional) for n in distances]
    assert_close(buckets_of(twin, distances, num_buckets, max_distance, bidirectional), np.array(expected))


@both
@pytest.mark.parametrize(
    ("m", "root", "powers", "step"), [(16, 2, 16, 1), (6, 3, 6, 1), (4, 5, 4, 1), (10, 10, 5, 2), (32, 2, 8, 4)]
)
def test_bucket_floor_is_exact(twin, m, root, powers, step):
    """At every power the logarithms give a whole number, which rounding can miss on either side."""
    num_buckets = 2 * m
    assert powers * step == m
    max_distance = m * root**powers
    edges = [m * root**k + shift for k in range(powers + 1) for shift in (-1, 0, 1)]
    distances = -np.array(edges)
    expected = [bucket_by_whole_numbers(int(n), num_buckets, max_distance, False) for n in distances]
    assert_close(buckets_of(twin, distances, num_buckets, max_distance, False), np.array(expected))


@both
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_against_t5(twin, bidirectional):
    """T5 as released, 32 buckets to 128; its float32 logarithms happen to land on the right side everywhere."""
    distances = torch.arange(-300, 301)
    witness = T5Attention._relative_position_bucket(distances, bidirectional, 32, 128)
    assert_close(buckets_of(twin, distances.numpy(), 32, 128, bidirectional), witness)


@both
def test_relative_bias_is_the_buckets_row(twin):
    """[B, A, T, S] from positions of any kind; 6 heads."""
    layer = twin.file("positions").RelativeBias(8, 6, max_distance=16, bidirectional=True, **FLOAT64)
    table = scatter_parameters(layer)["weight"]
    assert table.shape == (8, 6)
    queries, keys = np.array([[3, 4], [0, 100]]), np.array([[0, 1, 2, 3, 4], [9, 3, 100, 101, 50]])
    bias = to_numpy(layer(twin.array(queries), twin.array(keys)))
    expected = np.zeros((2, 6, 2, 5))
    for b, a, i, j in np.ndindex(expected.shape):
        expected[b, a, i, j] = table[bucket_by_whole_numbers(int(keys[b, j] - queries[b, i]), 8, 16, True), a]
    assert_close(bias, expected, rtol=0)
    assert_close(layer(twin.array(queries[:1]), twin.array(keys[:1])), expected[:1], rtol=0)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_bias_twins_agree(bidirectional):
    def build(twin):
        layer = twin.file("positions").RelativeBias(8, 6, max_distance=16, bidirectional=bidirectional, **FLOAT64)
        scatter_parameters(layer)
        return layer

    positions = {"queries": np.array([[3, 4], [0, 30]]), "keys": np.array([[0, 1, 2], [9, 3, 50]])}
    _, grads = assert_twins_agree(lambda twin, layer, queries, keys: layer(queries, keys), positions, build)
    assert set(grads) == {"weight"}


@both
@pytest.mark.parametrize(
    ("compute", "wide"), [("bfloat16", np.float32), ("float32", np.float32), ("float64", np.float64)]
)
def test_relative_bias_is_wide(twin, compute, wide):
    layer = twin.file("positions").RelativeBias(8, 2, bidirectional=False, compute_dtype=compute)
    positions = twin.array(np.array([[0, 1]]))
    assert to_numpy(layer(positions, positions)).dtype == wide


@both
def test_buckets_can_fail(twin):
    """The other direction, the other sign, a ceiling for the floor, one bucket more: each shows."""
    distances = np.arange(-40, 41)
    right = buckets_of(twin, distances, 32, 128, True)
    wrong = [
        [bucket_by_whole_numbers(int(n), 32, 128, False) for n in distances],
        [bucket_by_whole_numbers(int(-n), 32, 128, True) for n in distances],
        [bucket_by_whole_numbers(int(n), 32, 129, True) for n in distances],
        [bucket_by_whole_numbers(int(n) - 1, 32, 128, True) for n in distances],
    ]
    for planted in wrong:
        with pytest.raises(AssertionError):
            assert_close(right, np.array(planted))


# ---- ALiBi

SLOPES = {
    1: [2.0**-8],
    2: [2.0**-4, 2.0**-8],
    8: [2.0**-k for k in range(1, 9)],  # Press et al. 2022: 1/2, 1/4, …, 1/256
    16: [2.0 ** (-k / 2) for k in range(1, 17)],  # 1/√2, 1/2, 1/(2√2), …, 1/256
    3: [2.0**-4, 2.0**-8, 2.0**-2],
    6: [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3],
    12: [2.0**-k for k in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5],  # as BLOOM and MPT have them
}


@both
@pytest.mark.parametrize("num_heads", SLOPES)
def test_alibi_slopes(twin, num_heads):
    slopes = to_numpy(twin.file("positions").alibi_slopes(num_heads)).astype(np.float64)
    # powers of two are exact; the others are rounded to float32 where that is the wide dtype
    assert_close(slopes, np.array(SLOPES[num_heads]), rtol=2.0**-24)


@both
def test_alibi_bias(twin):
    """-slope · |query - key|, both ways, for positions of each batch entry, a single query at the end among them."""
    queries, keys = np.array([[2], [300]]), np.array([[0, 1, 2, 3], [0, 257, 300, 301]])
    bias = to_numpy(twin.file("positions").alibi_bias(6, twin.array(queries), twin.array(keys)))
    distance = np.array([[2, 1, 0, 1], [300, 43, 0, 1]])
    expected = -np.array(SLOPES[6])[None, :, None, None] * distance[:, None, None]
    assert bias.dtype in (np.float32, np.float64)
    assert_close(bias.astype(np.float64), expected, rtol=0)  # powers of two times small whole numbers: exact
    one = twin.file("positions").alibi_bias(6, twin.array(queries[:1]), twin.array(keys[:1]))
    assert_close(to_numpy(one).astype(np.float64), expected[:1], rtol=0)


@both
def test_alibi_can_fail(twin):
    """Interpolation as a geometric sequence over 12 heads, which some ports have, is another thing."""
    slopes = to_numpy(twin.file("positions").alibi_slopes(12)).astype(np.float64)
    with pytest.raises(AssertionError):
        assert_close(slopes, np.array([2.0 ** (-8 * (a + 1) / 12) for a in range(12)]), rtol=2.0**-24)
    with pytest.raises(AssertionError):
        assert_close(slopes, np.array(sorted(SLOPES[12], reverse=True)), rtol=2.0**-24)


# ---- what is learned, and from which seed


def test_learned_tables_are_the_same_in_both():
    for make in (
        lambda positions, seed: positions.LearnedPositions(7, 3, seed=seed),
        lambda positions, seed: positions.RelativeBias(8, 3, bidirectional=True, seed=seed),
    ):
        held = [parameters(make(twin.file("positions"), 4)) for twin in (TORCH, FLAX)]
        assert_close(held[0], held[1], rtol=0)
        assert held[0]["weight"].std() > 0.01
        assert (parameters(make(FLAX.file("positions"), None))["weight"] == 0).all()
        assert (parameters(make(TORCH.file("positions"), None))["weight"] == 0).all()


# ---- positions of every integer dtype, and those that do not exist


@both
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "uint64"])
def test_positions_of_any_integer_dtype(twin, dtype):
    """The same numbers give the same result as in int64: nothing wraps around, differences are signed."""
    positions, file = np.array([[0, 3, 120, 100, 127]]), twin.file("positions")
    X = np.zeros((1, 5, 4))
    bias = file.RelativeBias(8, 2, max_distance=16, bidirectional=True, **FLOAT64)
    learned = file.LearnedPositions(1000, 3, offset=2, **FLOAT64)
    scatter_parameters(bias)
    scatter_parameters(learned)
    for call in (
        lambda p: encoding(twin, 4, offset=2)(twin.array(X), p),
        lambda p: rotary(twin, 4)(twin.array(np.ones((1, 2, 5, 4))), p),
        lambda p: bias(p, p),
        lambda p: file.alibi_bias(2, p, p),
        learned,
    ):
        assert_close(call(twin.array(positions.astype(dtype))), call(twin.array(positions)), rtol=0)


@both
def test_sinusoid_out_of_range(twin):
    """P has ``max_len`` rows: a position before or after them gives NaN, never a sinusoid that nobody asked for."""
    layer = twin.file("positions").PositionalEncoding(4, max_len=5, offset=2)
    summed = to_numpy(layer(twin.array(np.zeros((1, 4, 4))), twin.array(np.array([[4, 5, -1, 0]]))))
    truth = sinusoids([6, 7, 1, 2], 4)
    truth[1:3] = np.nan
    assert_close(summed[0], truth)


@both
def test_alibi_bias_in_float64(twin):
    """Slopes such as 1/√2 are rounded once, to the wide dtype: here not at all."""
    positions = twin.array(np.array([[0, 3]]))
    bias = twin.file("positions").alibi_bias(12, positions, positions, compute_dtype="float64")
    assert_close(to_numpy(bias)[0, :, 0, 1], -3 * np.array(SLOPES[12]), rtol=1e-15)
