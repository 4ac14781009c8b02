"""Embeddings of both twins against the formula: rows, scale, positions, token types, norm, dropout; and unembed."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from parity_tests import references
from parity_tests.helpers import (
    FLOAT64,
    assert_close,
    assert_twins_agree,
    both,
    parameters,
    random_array,
    scatter_parameters,
    set_parameters,
    to_numpy,
)
from twinformer import ModelConfig

B, T, V, D = 2, 5, 11, 7
TOKENS = np.array([[0, 3, 10, 3, 1], [7, 7, 2, 0, 9]])


def config_of(**choices):
    sizes = {"context_length": 9, "key_dim": 2, "hidden_dim": 3, "num_heads": 2, "num_layers": 1, "vocab_size": V}
    return ModelConfig(**({"architecture": "encoder", "model_dim": D} | sizes | FLOAT64 | choices))


def embeddings_of(twin, config, vocab_size=V):
    module = twin.file("embeddings").Embeddings(config, vocab_size)
    return module, scatter_parameters(module, 31)


def formula(values, config, tokens, positions=None, token_types=None, table=None):
    """``tokens · scale + position + token type``, then the norm."""
    table = values["tokens.weight"] if table is None else table
    out = table[tokens] * (1.0 if config.embedding_scale is None else config.embedding_scale)
    positions = np.arange(tokens.shape[1])[None] if positions is None else positions
    if config.positions == "learned":
        out = out + values["positions.weight"][positions + config.position_offset]
    if config.positions == "sinusoidal":
        out = out + references.sinusoids(
            positions,
            config.model_dim,
            layout=config.sinusoid_layout,
            spacing=config.sinusoid_spacing,
            offset=config.position_offset,
        )
    if config.num_token_types:
        types = np.zeros_like(tokens) if token_types is None else token_types
        out = out + values["token_types.weight"][types]
    if config.embedding_norm and config.norm == "rmsnorm":
        return references.rms_norm(out, values["norm.weight"], config.norm_eps)
    if config.embedding_norm:
        return references.layer_norm(out, values["norm.weight"], values["norm.bias"], config.norm_eps)
    return out


CHOICES = {
    "tokens alone": {},
    "scaled": {"embedding_scale": 3.7},
    "learned": {"positions": "learned"},
    "learned, counted from 2": {"positions": "learned", "position_offset": 2, "embedding_scale": 0.3},
    "token types": {"num_token_types": 3},
    "norm": {"embedding_norm": True, "norm_eps": 1e-3},
    "rmsnorm": {"embedding_norm": True, "norm": "rmsnorm", "norm_bias": False},
    "BERT": {"positions": "learned", "num_token_types": 2, "embedding_norm": True},
    "everything": {
        "positions": "sinusoidal",
        "position_offset": 1,
        "num_token_types": 3,
        "embedding_norm": True,
        "embedding_scale": 2.5,
    },
}
for _layout, _spacing, _offset, _D in itertools.product(
    ("interleaved", "halves"), ("textbook", "endpoint"), (0, 1), (7, 8)
):
    CHOICES[f"sinusoidal {_layout} {_spacing} from {_offset}, D = {_D}"] = {
        "positions": "sinusoidal",
        "sinusoid_layout": _layout,
        "sinusoid_spacing": _spacing,
        "position_offset": _offset,
        "model_dim": _D,
    }


@both
@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_against_the_formula(twin, choices):
    config = config_of(**choices)
    module, values = embeddings_of(twin, config)
    tokens = twin.array(TOKENS)
    assert_close(module(tokens), formula(values, config, TOKENS))
    for positions in (np.array([[8, 0, 3, 3, 1], [2, 4, 6, 8, 0]]), np.array([[8, 7, 6, 5, 4]])):
        out = module(tokens, twin.array(positions))
        assert_close(out, formula(values, config, TOKENS, positions), name="positions given")
    if config.num_token_types:
        types = (TOKENS + 1) % config.num_token_types
        out = module(tokens, None, twin.array(types))
        assert_close(out, formula(values, config, TOKENS, token_types=types), name="token types given")


@both
def test_the_table_can_be_somebody_elses(twin):
    config = config_of(positions="learned")
    module, values = embeddings_of(twin, config, vocab_size=0)
    assert set(values) == {"positions.weight"}
    assert module.tokens is None
    table = random_array(1, 13, D)
    assert_close(module(twin.array(TOKENS), table=twin.array(table)), formula(values, config, TOKENS, table=table))


@both
def test_absent_parts_are_none(twin):
    module, _ = embeddings_of(twin, config_of())
    assert [module.positions, module.token_types, module.norm] == [None, None, None]


@both
def test_dropout(twin):
    """The key is used as it comes."""
    config = config_of(dropout=0.4, embedding_norm=True)
    module, values = embeddings_of(twin, config)
    factors = references.dropout_factors(references.key_of(12), (B, T, D), 0.4)
    assert_close(module(twin.array(TOKENS), rng=twin.key(12)), formula(values, config, TOKENS) * factors)
    assert_close(module(twin.array(TOKENS)), formula(values, config, TOKENS))


@both
def test_embedding_dropout(twin):
    """A rate of its own, also 0 where the blocks drop."""
    for rate in (0.4, 0.0):
        config = config_of(dropout=0.2, embedding_dropout=rate)
        module, values = embeddings_of(twin, config)
        factors = references.dropout_factors(references.key_of(12), (B, T, D), rate) if rate else 1.0
        assert_close(module(twin.array(TOKENS), rng=twin.key(12)), formula(values, config, TOKENS) * factors)


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_twins_agree(choices):
    config = config_of(**choices, dropout=0.2)
    assert_twins_agree(
        lambda twin, module, **kw: module(**kw, rng=twin.key(3)),
        {"tokens": TOKENS},
        lambda twin: embeddings_of(twin, config)[0],
    )


@both
def test_scale_is_rounded_to_the_compute_dtype(twin):
    """sqrt(1152) = 33.9411… is 34 in bfloat16: published models were trained with the rounded number."""
    config = config_of(embedding_scale=1152**0.5).with_dtype("bfloat16")
    module = twin.file("embeddings").Embeddings(config, V)
    table = random_array(2, V, D).astype(ml_dtypes.bfloat16)
    set_parameters(module, {"tokens.weight": table})
    expected = (table.astype(np.float64) * 34.0).astype(ml_dtypes.bfloat16)[TOKENS]
    assert_close(module(twin.array(TOKENS)), expected, 0.0)
    unrounded = (table.astype(np.float64) * 1152**0.5).astype(ml_dtypes.bfloat16)[TOKENS]
    assert (unrounded != expected).any(), "the two conventions cannot be told apart here"


@both
def test_table_is_cast_to_the_compute_dtype(twin):
    table = random_array(3, V, D)
    module = twin.file("embeddings").TokenEmbedding(V, D, param_dtype="float64", compute_dtype="float32")
    set_parameters(module, {"weight": table})
    assert {path: v.dtype for path, v in parameters(module).items()} == {"weight": np.dtype(np.float64)}
    assert_close(module(twin.array(TOKENS)), table.astype(np.float32)[TOKENS], 0.0)


# ---- unembed


@both
@pytest.mark.parametrize("softcap", [None, 1.3])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("scale", [None, 0.4])
def test_unembed(twin, scale, bias, softcap):
    h, E, b = random_array(4, B, T, D), random_array(5, V, D), random_array(6, V) if bias else None
    expected = (h * (1.0 if scale is None else scale)) @ E.T + (0.0 if b is None else b)
    if softcap is not None:
        expected = softcap * np.tanh(expected / softcap)
    unembed = twin.file("embeddings").unembed
    out = unembed(twin.array(h), twin.array(E), scale=scale, bias=None if b is None else twin.array(b), softcap=softcap)
    assert_close(out, expected)


@both
def test_unembed_square(twin):
    """V = D: the table is not turned because it happens to be square."""
    h, E = random_array(7, B, T, D), random_array(8, D, D)
    assert_close(twin.file("embeddings").unembed(twin.array(h), twin.array(E)), h @ E.T)


@both
def test_unembed_softcap_is_wide(twin):
    """In bfloat16 the cap is computed wide and rounded once: each element within half a unit in its last place."""
    h, E = random_array(9, B, T, D).astype(ml_dtypes.bfloat16), random_array(10, V, D).astype(ml_dtypes.bfloat16)
    unembed = twin.file("embeddings").unembed
    plain = to_numpy(unembed(twin.array(h), twin.array(E)))
    assert plain.dtype == ml_dtypes.bfloat16
    capped = to_numpy(unembed(twin.array(h), twin.array(E), softcap=3.0))
    assert capped.dtype == ml_dtypes.bfloat16
    wide = 3.0 * np.tanh(plain.astype(np.float64) / 3.0)
    assert (abs(capped.astype(np.float64) - wide) <= 2**-8 * 1.001 * abs(wide)).all()
