"""``check`` on other people's ports: right ones agree, and every planted fault is named."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn
from torch.nn import functional

from twinformer.parity import Inputs, Leaf, NamesError, PortError, check

WIDTH = 6


class TorchLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class TorchModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = TorchLayer()
        self.norm = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(0.5)
        self.second = TorchLayer()

    def forward(self, x):
        x = self.norm(x + self.first(x))
        return self.second(self.dropout(x))


class Plain(nnx.Linear):
    """A linear layer with a place for a fault."""

    def __init__(self, rngs, fault=lambda x: x, before=lambda x: x):
        super().__init__(WIDTH, WIDTH, rngs=rngs)
        self.fault, self.before = fault, before

    def __call__(self, x):
        return self.fault(super().__call__(self.before(x)))


class FlaxLayer(nnx.Module):
    def __init__(self, rngs, up=lambda x: x, before_down=lambda x: x, between=lambda x: x):
        self.up = Plain(rngs, up)
        self.down = Plain(rngs, before=before_down)
        self.between = between

    def __call__(self, x):
        return self.down(self.between(jax.nn.relu(self.up(x))))


class FlaxModel(nnx.Module):
    def __init__(self, *, residual=True, eps=1e-5, deterministic=None, first=None, handed=lambda x: x):
        rngs = nnx.Rngs(0)
        self.residual, self.forced, self.handed = residual, deterministic, handed
        self.first = FlaxLayer(rngs, **(first or {}))
        self.norm = nnx.LayerNorm(WIDTH, epsilon=eps, use_fast_variance=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = FlaxLayer(rngs)

    def __call__(self, x):
        made = self.first(x)
        x = self.norm(x + made if self.residual else made)
        return self.second(self.handed(self.dropout(x, deterministic=self.forced)))


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    return TorchModel()


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(3, 5, WIDTH)).astype(np.float32)


def judged(original, port, x, **options):
    return check(original, port, inputs=x, **({"weights": "telling", "precision": False} | options))


def double(x):
    return 2 * x


def halve(x):
    return x / 2


@jax.custom_vjp
def half_gradient(x):
    return x


half_gradient.defvjp(lambda x: (x, None), lambda _, g: (g / 2,))


def poisoned(x):
    return x.at[0, 0, 0].set(jnp.nan)


def test_a_right_port_agrees_on_every_rung(original, x):
    report = judged(original, FlaxModel(), x, precision=["float32", "bfloat16"])
    report.assert_agrees()
    assert list(report.rungs) == ["parameters", "forward", "gradients", "precision"]
    names = {one.name for one in report.rungs["forward"].comparisons}
    modules = {"first", "first.up", "first.down", "norm", "dropout", "second", "second.up", "second.down"}
    assert names == modules | {"output", "the model itself"}
    assert "input 0" in {one.name for one in report.rungs["gradients"].comparisons}
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["verdict"] == "agree"


@pytest.mark.parametrize(
    ("faults", "culprits"),
    [
        ({"eps": 1e-6}, ["norm"]),
        ({"residual": False}, ["the model itself"]),
        ({"deterministic": False}, ["dropout"]),
        ({"first": {"between": jnp.sin}}, ["first"]),
        ({"first": {"up": double, "before_down": halve}}, ["first.up", "first.down"]),
        ({"first": {"up": poisoned}}, ["first.up"]),
        ({"first": {"between": jnp.zeros_like}}, ["first"]),
        ({"eps": 1e-6, "first": {"between": jnp.sin}}, ["first", "norm"]),
        ({"handed": double}, ["the model itself"]),
    ],
)
def test_a_fault_in_the_forward_pass_is_named(faults, culprits, original, x):
    report = judged(original, FlaxModel(**faults), x)
    assert report.rungs["forward"].verdict == "differ"
    assert report.rungs["forward"].culprits == culprits
    with pytest.raises(AssertionError, match="culprit"):
        report.assert_agrees()


@pytest.mark.parametrize(
    ("faults", "culprits"),
    [
        ({"first": {"up": half_gradient}}, ["first.up"]),
        ({"first": {"between": half_gradient}}, ["first"]),
        ({"first": {"before_down": jax.lax.stop_gradient}}, ["first.down"]),
        ({"handed": half_gradient}, ["the model itself"]),
    ],
)
def test_a_fault_in_the_backward_pass_is_named(faults, culprits, original, x):
    report = judged(original, FlaxModel(**faults), x)
    assert report.rungs["forward"].verdict == "agree"
    assert report.rungs["gradients"].verdict == "differ"
    assert report.rungs["gradients"].culprits == culprits


def test_a_square_matrix_left_untransposed_is_told(original, x):
    report = judged(original, FlaxModel(), x, names={"second.up.weight": Leaf("second.up.kernel", "same")})
    assert report.rungs["forward"].culprits == ["second.up"]
    assert (
        "second.up agrees when second.up.kernel is transposed: its layout is wrong" in report.rungs["forward"].problems
    )


def test_exchanged_leaves_are_named(original, x):
    names = {"first.up.weight": "second.up.kernel", "second.up.weight": "first.up.kernel"}
    report = judged(original, FlaxModel(), x, names=names)
    assert report.rungs["forward"].verdict == "differ"


def port_with_its_own_weights(original):
    port = FlaxModel()
    for layer in ("first", "second"):
        for part in ("up", "down"):
            ours = getattr(getattr(original, layer), part)
            theirs = getattr(getattr(port, layer), part)
            theirs.kernel[...] = jnp.asarray(ours.weight.detach().numpy().T)
            theirs.bias[...] = jnp.asarray(ours.bias.detach().numpy())
    return port


def test_the_ports_own_weights_are_compared_leaf_by_leaf(original, x):
    port = port_with_its_own_weights(original)
    judged(original, port, x, weights="compare").assert_agrees()
    port.first.up.kernel[...] = port.first.up.kernel[...].T
    port.second.up.kernel[...], port.second.down.kernel[...] = port.second.down.kernel[...], port.second.up.kernel[...]
    report = judged(original, port, x, weights="compare")
    assert report.rungs["parameters"].culprits == ["first.up", "second.up", "second.down"]
    told = report.rungs["parameters"].problems
    assert "first.up.kernel holds first.up.weight in the other orientation: its layout is wrong" in told
    assert "second.up.kernel holds the values of second.down.weight instead of second.up.weight" in told


def test_a_symmetric_matrix_cannot_tell(x):
    model = TorchModel()
    model.first.up.weight.data = torch.eye(WIDTH)
    report = check(model, FlaxModel(), inputs=x, precision=False)
    assert report.rungs["parameters"].verdict == "cannot tell"
    assert report.rungs["parameters"].problems == [
        "first.up.weight: equals its own transpose, so that its layout shows nowhere"
    ]
    assert any("norm.weight, norm.bias" in note for note in report.rungs["parameters"].notes)


def test_every_mistake_in_the_names_is_raised_at_once(original, x):
    names = {
        "first.upp.weight": "first.up.kernel",
        "first.up.weight": "first.up.kernle",
        "second.down.weight": Leaf("second.down.kernel", lambda w: w[:2]),
        "second.up.weight": Leaf("second.up.kernel", lambda w: w + 1),
    }
    with pytest.raises(NamesError) as caught:
        judged(original, FlaxModel(), x, names=names)
    for word in (
        "first.upp.weight: no such parameter",
        "no leaf first.up.kernle",
        "first.up.kernel: Flax leaf is not in the map",
        "expected shape (6, 6) for second.down.kernel, got (2, 6)",
        "changes values",
    ):
        assert word in str(caught.value)


def test_a_leaf_used_twice_and_a_part_left_over(original, x):
    names = {
        "first.up.weight": [Leaf("first.up.kernel", lambda w: w[:3].T, into=np.s_[:, :3])],
        "second.up.bias": [Leaf("second.up.bias"), Leaf("second.up.bias")],
    }
    with pytest.raises(NamesError) as caught:
        judged(original, FlaxModel(), x, names=names)
    assert "first.up.weight: 18 of 36 elements are never used" in str(caught.value)
    assert "6 of 6 elements are filled more than once" in str(caught.value)


def test_weights_that_are_not_finite_are_refused(x):
    model = TorchModel()
    model.norm.weight.data[2] = torch.nan
    with pytest.raises(NamesError, match=r"norm\.weight: expected finite values, got 1"):
        check(model, FlaxModel(), inputs=x)


def test_inputs_and_outputs_that_do_not_fit_are_refused(original, x):
    with pytest.raises(PortError, match="the PyTorch model refuses them"):
        judged(original, FlaxModel(), x[..., :2])
    with pytest.raises(PortError, match="expected an array, a tuple or a dict, got str"):
        judged(original, FlaxModel(), "text")
    with pytest.raises(PortError, match="output only in PyTorch"):
        judged(
            nn.Sequential(nn.Linear(WIDTH, 2)),
            lambda p, x: {"logits": x @ p["w"] + p["b"]},
            x,
            params=LINEAR,
            names=NAMES,
        )
    with pytest.raises(PortError, match="expected params with a function"):
        judged(original, lambda p, x: x, x)


LINEAR = {"w": np.zeros((WIDTH, 2), np.float32), "b": np.zeros(2, np.float32)}
NAMES = {"0.weight": Leaf("w", "transpose"), "0.bias": "b"}


def test_a_function_with_parameters(x):
    model = nn.Sequential(nn.Linear(WIDTH, 2))
    judged(model, lambda p, x: x @ p["w"] + p["b"], x, params=LINEAR, names=NAMES).assert_agrees()
    report = judged(model, lambda p, x: x @ p["w"], x, params=LINEAR, names=NAMES)
    assert report.verdict == "differ"
    assert any("0.bias" in note for note in report.rungs["gradients"].notes)
    with pytest.raises(NamesError, match="layout in w is not known"):
        judged(model, lambda p, x: x, x, params=LINEAR, names={"0.weight": "w", "0.bias": "b"})


def test_parameters_nested_as_linen_has_them(x):
    """What Linen's ``module.apply`` takes: a dict of dicts under "params"."""
    params = {"params": {"Dense_0": {"kernel": LINEAR["w"], "bias": LINEAR["b"]}}}

    def apply(variables, x):
        dense = variables["params"]["Dense_0"]
        return x @ dense["kernel"] + dense["bias"]

    judged(nn.Sequential(nn.Linear(WIDTH, 2)), apply, x, params=params, modules={"0": "params.Dense_0"}).assert_agrees()


class TorchAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class FlaxAttention(nnx.Module):
    """``nnx.MultiHeadAttention``'s own attention computes in float32 whatever it is given."""

    def __init__(self, **options):
        self.attention = nnx.MultiHeadAttention(3, 12, decode=False, rngs=nnx.Rngs(0), **options)

    def __call__(self, x):
        return self.attention(x)


def exact_attention(query, key, value, **options):
    scores = jnp.einsum("...tak,...sak->...ats", query, key) / query.shape[-1] ** 0.5
    return jnp.einsum("...ats,...sak->...tak", jax.nn.softmax(scores), value)


def test_fused_attention_is_carried_and_judged():
    x = np.random.default_rng(1).normal(size=(2, 5, 12))
    report = judged(TorchAttention(), FlaxAttention(), x)
    assert report.verdict == "cannot tell"
    assert "attention (float32)" in report.rungs["forward"].problems[0]
    report = judged(TorchAttention(), FlaxAttention(attention_fn=exact_attention), x)
    report.assert_agrees()
    assert "attention" in {one.name for one in report.rungs["forward"].comparisons}
    by_hand = {
        "attention.in_proj_weight": [
            Leaf(f"attention.{name}.kernel", lambda w, n=n: w[12 * n : 12 * n + 12].T.reshape(12, 3, 4))
            for n, name in enumerate(("query", "key", "value"))
        ]
    }
    judged(TorchAttention(), FlaxAttention(attention_fn=exact_attention), x, names=by_hand).assert_agrees()
    by_hand["attention.in_proj_weight"].reverse()
    by_hand["attention.in_proj_weight"][0] = Leaf(
        "attention.value.kernel", lambda w: w[24:].T.reshape(12, 4, 3).transpose(0, 2, 1)
    )
    report = judged(TorchAttention(), FlaxAttention(attention_fn=exact_attention), x, names=by_hand)
    assert report.culprits == ["attention"]


class Narrow(nnx.Module):
    def __init__(self):
        self.up = nnx.Linear(WIDTH, WIDTH, dtype=jnp.float32, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.up(x)


class TorchNarrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.up(x)


def test_a_port_that_is_float32_inside_cannot_be_judged_below_that(x):
    report = judged(TorchNarrow(), Narrow(), x)
    assert report.rungs["forward"].verdict == "cannot tell"
    assert "up (float32)" in report.rungs["forward"].problems[0]


class Pair(nn.Module):
    def forward(self, states, bias):
        return {"sum": states + bias, "gelu": functional.gelu(states)}


def test_structures_and_other_signatures(x):
    port = {"sum": lambda p, h, add: {"sum": h + add, "gelu": jax.nn.gelu(h, approximate=False)}}["sum"]
    bias = np.ones(WIDTH, np.float32)
    inputs = Inputs(torch={"states": x, "bias": bias}, flax=(x, bias))
    report = judged(Pair(), port, inputs, params={})
    assert report.rungs["forward"].verdict == "agree"
    assert {one.name for one in report.rungs["forward"].comparisons} == {"output sum", "output gelu"}


def test_the_users_models_stay_as_they_are(original, x):
    port = FlaxModel()
    port.train()
    original.train()
    before = {name: one.clone() for name, one in original.state_dict().items()}
    state = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(port, nnx.Param))]
    count = int(port.dropout.rngs.count[...])
    random = torch.get_rng_state()
    judged(original, port, x)
    assert original.training
    assert port.dropout.deterministic is False
    assert int(port.dropout.rngs.count[...]) == count
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], one) for name, one in original.state_dict().items())
    after = jax.tree.leaves(nnx.state(port, nnx.Param))
    assert all(np.array_equal(a, b) for a, b in zip(state, after, strict=True))
    assert all(one.grad is None for one in original.parameters())
    assert FlaxLayer.__call__.__qualname__ == "FlaxLayer.__call__", "the wrapped calls were not put back"
