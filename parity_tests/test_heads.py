"""What models make of their hidden states: against plain formulas in NumPy, under padding on either side."""

import contextlib
import math

import jax
import numpy as np
import pytest
from flax import nnx

from parity_tests import references
from parity_tests.helpers import FLAX, both, gradients, random_array, scatter_parameters
from parity_tests.helpers import assert_close as close
from twinformer import ConfigError, InputError, ModelConfig
from twinformer.decoding import BeamConfig
from twinformer.learning import TrainingConfig
from twinformer.parameters import model_parameters
from twinformer.parity.haste import hurried

B, T, D, V = 4, 5, 6, 11
TOKENS = np.random.default_rng(1).integers(0, V, (B, T))
#: none, right, left, and nothing at all
REAL = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
KINDS = ["first", "last", "mean", "max"]


def config_of(**choices):
    sizes = {"vocab_size": V, "context_length": 8, "model_dim": D, "key_dim": 3, "hidden_dim": 7, "num_heads": 2}
    wide = {"param_dtype": "float64", "compute_dtype": "float64"}
    return ModelConfig(**({"architecture": "encoder", "num_layers": 1, **sizes, **wide} | choices))


def model_of(twin, config, seed=5):
    model = twin.file("models").build(config, seed=None)
    values = scatter_parameters(model, seed)
    assert {path: value.shape for path, value in values.items()} == {
        path: parameter.shape for path, parameter in model_parameters(config).items()
    }
    return model, values


def states(twin, config, values):
    """What the stack gives under the same weights."""
    bare = config.replace(
        head="none",
        head_bias=False,
        head_transform=False,
        head_scale=None,
        head_dropout=0.0,
        num_labels=0,
        pool="none",
        pooler="none",
        pool_normalize=False,
    )
    model = twin.file("models").build(bare, seed=None)
    twin.file("weights").load_weights(model, {k: v for k, v in values.items() if not k.startswith("head.")})
    return np.array(numpy_of(model(twin.array(TOKENS), padding_mask=twin.array(REAL))))


def numpy_of(array):
    return array.detach().numpy() if hasattr(array, "detach") else np.asarray(array)


def pooled(h, real, kind):
    """One row at a time."""
    rows = []
    for states, there in zip(h, real, strict=True):
        chosen = states[there]
        if len(chosen) == 0:
            rows.append(np.zeros(h.shape[-1]))
        else:
            rows.append({"first": chosen[0], "last": chosen[-1], "mean": chosen.mean(0), "max": chosen.max(0)}[kind])
    return np.stack(rows)


@both
@pytest.mark.parametrize("kind", KINDS)
def test_pools(twin, kind):
    h = random_array(2, B, T, D)
    h[0, 0, 0] = -7.0  # all real rows can be negative: 0 is no neutral element of a maximum
    h[1] = -np.abs(h[1])
    pool = twin.file("heads").pool
    out, grads = gradients(twin, lambda h: pool(h, twin.array(REAL), kind), {"h": h}, cotangent=random_array(3, B, D))
    close(out, pooled(h, REAL, kind))
    assert np.isfinite(grads["h"]).all()
    assert (grads["h"][~REAL] == 0).all()
    close(pool(twin.array(h), None, kind), pooled(h, np.ones((B, T), bool), kind))


@both
def test_the_first_of_equal_largest_has_the_gradient(twin):
    h = np.zeros((1, 3, 2))
    h[0, :, 1] = 1, 3, 3
    _, grads = gradients(twin, lambda h: twin.file("heads").pool(h, None, "max"), {"h": h}, cotangent=np.ones((1, 2)))
    assert grads["h"].tolist() == [[[1, 0], [0, 1], [0, 0]]]


@pytest.mark.parametrize("few", [False, True])
def test_the_gradient_of_the_largest_is_the_same_compiled(few):
    """XLA may compute the states twice, rounded differently: whoever looks for the largest by its value finds none."""
    config = config_of(architecture="encoder", head="sequence", num_labels=3, pool="max", pooler="relu")
    model, _ = model_of(FLAX, config)
    graph, state = nnx.split(model)

    def loss(state):
        return (nnx.merge(graph, state)(FLAX.array(TOKENS), padding_mask=FLAX.array(REAL)) ** 2).sum()

    eager = jax.grad(loss)(state)
    with hurried({}) if few else contextlib.nullcontext():
        compiled = jax.jit(jax.grad(loss))(state)
    for path, leaf in nnx.to_flat_state(eager):
        np.testing.assert_allclose(
            dict(nnx.to_flat_state(compiled))[path][...],
            leaf[...],
            rtol=0,
            atol=1e-11 * abs(leaf[...]).max(),
            err_msg=path,
        )


@both
@pytest.mark.parametrize("pooler", ["none", "tanh", "relu"])
@pytest.mark.parametrize("normalize", [False, True])
def test_vectors(twin, pooler, normalize):
    config = config_of(head="pooled", pool="mean", pooler=pooler, pool_normalize=normalize)
    model, values = model_of(twin, config)
    v = pooled(states(twin, config, values), REAL, "mean")
    if pooler != "none":
        v = v @ values["head.pooler.weight"].T + values["head.pooler.bias"]
        v = np.tanh(v) if pooler == "tanh" else np.maximum(v, 0)
    if normalize:
        v = v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-12)
    out, grads = gradients(
        twin, lambda m: m(twin.array(TOKENS), padding_mask=twin.array(REAL)), {}, model, random_array(3, B, D)
    )
    close(out, v)
    assert all(np.isfinite(gradient).all() for gradient in grads.values())


@both
@pytest.mark.parametrize("architecture", ["encoder", "decoder"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head", ["sequence", "tokens"])
def test_labels(twin, head, bias, architecture):
    choices = {"pool": "last", "pooler": "tanh"} if head == "sequence" else {}
    config = config_of(architecture=architecture, head=head, num_labels=3, head_bias=bias, **choices)
    model, values = model_of(twin, config)
    x = states(twin, config, values)
    if head == "sequence":
        x = np.tanh(pooled(x, REAL, "last") @ values["head.pooler.weight"].T + values["head.pooler.bias"])
    expected = x @ values["head.weight"].T + values.get("head.bias", 0.0)
    close(model(twin.array(TOKENS), padding_mask=twin.array(REAL)), expected)


@both
@pytest.mark.parametrize("head", ["tied", "untied"])
def test_transform(twin, head):
    """Dense, activation, norm, and then the scores of tokens."""
    config = config_of(head=head, head_transform=True, head_bias=True, head_scale=0.5, activation="gelu", norm_eps=1e-3)
    model, values = model_of(twin, config)
    h = states(twin, config, values) @ values["head.transform.weight"].T + values["head.transform.bias"]
    gelu = np.vectorize(lambda x: x / 2 * (1 + math.erf(x / math.sqrt(2))))
    h = references.layer_norm(gelu(h), values["head.norm.weight"], values["head.norm.bias"], 1e-3)
    table = values["embedding.tokens.weight"] if head == "tied" else values["head.weight"]
    out = model(twin.array(TOKENS), padding_mask=twin.array(REAL))
    close(out, 0.5 * h @ table.T + values["head.bias"])


@both
@pytest.mark.parametrize("head", ["sequence", "tokens"])
def test_dropout(twin, head):
    """Before the matrix of labels, under the key ``fold(rng, 2)``."""
    choices = {"pool": "first"} if head == "sequence" else {}
    config = config_of(head=head, num_labels=3, head_dropout=0.4, **choices)
    model, values = model_of(twin, config)
    x = states(twin, config, values)
    x = pooled(x, REAL, "first") if head == "sequence" else x
    factors = references.dropout_factors(references.key_of(9, 2), x.shape, 0.4)
    out = model(twin.array(TOKENS), padding_mask=twin.array(REAL), rng=twin.key(9))
    close(out, (x * factors) @ values["head.weight"].T)


@both
def test_one_vector_of_several_documents_is_refused(twin):
    model, _ = model_of(twin, config_of(head="pooled", pool="mean"))
    with pytest.raises(InputError, match="segments: expected None with head='pooled'"):
        model(twin.array(TOKENS), segments=twin.array(np.ones((B, T), np.int64)))


@both
@pytest.mark.parametrize(
    "choices",
    [{"head": "none"}, {"head": "tokens", "num_labels": 2}, {"head": "sequence", "num_labels": 2, "pool": "last"}],
    ids=["none", "tokens", "sequence"],
)
def test_what_predicts_no_tokens_cannot_write_or_be_trained(twin, choices):
    config = config_of(architecture="decoder", **choices)
    model, _ = model_of(twin, config)
    tokens = twin.array(TOKENS)
    calls = {
        "Generator": lambda: twin.file("generation").Generator(model),
        "score": lambda: twin.file("generation").score(model, TOKENS, TOKENS[:, :1]),
        "beam_search": lambda: twin.file("beam").beam_search(model, TOKENS, beam=BeamConfig(width=1)),
        "init_cache": lambda: twin.file("cache").init_cache(model, B, 8),
        "Trainer": lambda: twin.file("training").Trainer(config, TrainingConfig()),
        "LanguageModel": lambda: model.step(tokens, {}),
    }
    for where, call in calls.items():
        wanted = rf"{where}(.step)?: .*\n?.*head: expected 'tied' or 'untied', got '{config.head}'"
        with pytest.raises(ConfigError, match=wanted):
            call()
