"""TransformerStack of both twins: against torch.nn's stacks, the notebook's cells, position bias, remat and dropout."""

import sys

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from parity_tests import references
from parity_tests.comparisons import assert_gradients_close
from parity_tests.helpers import (
    FLAX,
    TORCH,
    assert_close,
    both,
    gradients,
    parameters,
    random_array,
    scatter_parameters,
    set_parameters,
    shape_hook_off,
    to_numpy,
)
from parity_tests.modes import jitted, torch_compiled
from parity_tests.test_block import LIKE_TORCH, SIZES, numpy_block, part, torch_names, witness_of
from twinformer import ConfigError, StackConfig
from twinformer.config import RotaryScaling
from twinformer.initializers import draw_weights
from twinformer.parameters import stack_parameters

B, T, S = 2, 5, 4


def config_of(**choices):
    return StackConfig(**(SIZES | LIKE_TORCH | choices))


def stack_of(twin, config, *, causal=False, cross_attention=False, num_layers=None):
    return twin.file("stack").TransformerStack.from_config(
        config, num_layers or config.num_layers, causal=causal, cross_attention=cross_attention
    )


# ---- torch.nn.TransformerEncoder and TransformerDecoder


@both
@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("cross", [False, True], ids=["encoder", "decoder"])
def test_against_torch_nn(twin, placement, activation, cross):
    config = config_of(norm_placement=placement, activation=activation, num_layers=3)
    stack = stack_of(twin, config, causal=cross, cross_attention=cross)
    values = scatter_parameters(stack, 21)
    kind = torch.nn.TransformerDecoder if cross else torch.nn.TransformerEncoder
    options = {} if cross else {"enable_nested_tensor": False}
    norm = torch.nn.LayerNorm(12, eps=config.norm_eps, dtype=torch.float64)
    witness = kind(witness_of(part(values, "blocks.0"), config, cross=cross), 3, norm=norm, **options)

    def named(leaves):
        found = {f"norm.{leaf}": v for leaf, v in part(leaves, "final_norm").items()}
        for i in range(3):
            block = torch_names(part(leaves, f"blocks.{i}"), cross=cross)
            found |= {f"layers.{i}.{name}": v for name, v in block.items()}
        return found

    witness.load_state_dict({name: torch.from_numpy(v.copy()) for name, v in named(values).items()}, strict=True)
    witness.train()
    inputs = {"X": random_array(1, B, T, 12, scale=2.0)}
    native = {"X": torch.from_numpy(inputs["X"].copy()).requires_grad_(True)}
    if cross:
        inputs["H_enc"] = random_array(2, B, S, 12)
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
    cotangent = random_array(3, B, T, 12)
    arguments = {name: twin.array(mask) for name, mask in masks.items()}
    out, grads = gradients(twin, lambda m, **kw: m(**kw, **arguments), inputs, stack, cotangent)
    (expected * torch.from_numpy(cotangent)).sum().backward()
    assert_close(out, expected)
    witness_grads = {name: p.grad.numpy() for name, p in witness.named_parameters()}
    assert_close(named({p: g for p, g in grads.items() if "." in p}), witness_grads, 1e-11)
    assert_close({n: grads[n] for n in native}, {n: v.grad.numpy() for n, v in native.items()}, 1e-11)


# ---- the notebook's cells


@both
def test_notebook_cells(twin):
    """``TransformerStack(N=10, …)(X)`` and the same with a mask and encoder states, in float32 as in the notebook."""
    X = twin.array(random_array(4, 10, 10, 24).astype(np.float32))
    Y = twin.array(random_array(5, 10, 8, 24).astype(np.float32))
    mask = twin.array(np.array([[0 if i >= j else -np.inf for j in range(10)] for i in range(10)], np.float32))
    TransformerStack = twin.file("stack").TransformerStack
    sizes = {"N": 10, "model_dim": 24, "key_dim": 3, "hidden_dim": 8, "num_heads": 4, "num_stack": 9}
    stack = TransformerStack(**sizes)
    out = stack(X)
    assert tuple(out.shape) == (10, 10, 24)
    assert to_numpy(out).dtype == np.float32
    assert np.isfinite(to_numpy(out)).all()
    assert len(stack.blocks) == 9
    causal = TransformerStack(**sizes, causal=True)
    assert_close(stack(X, mask=mask), causal(X), 1e-5)
    decoder = TransformerStack(10, 24, 3, 8, 4, 9, cross_attention=True)
    assert tuple(decoder(X, H_enc=Y, mask=mask).shape) == (10, 10, 24)


@both
def test_building_by_sizes_is_building_from_config(twin):
    """Further choices by keyword; weights by ``xavier_uniform`` from the seed, by path."""
    choices = {"norm": "rmsnorm", "norm_bias": False, "gated": True, "num_kv_heads": 1, "positions": "relative"}
    stack = twin.file("stack").TransformerStack(9, 12, 4, 7, 3, 2, causal=True, seed=5, **choices)
    config = StackConfig(**SIZES | {"context_length": 9}, **choices)
    expected = draw_weights(stack_parameters(config, 2, cross_attention=False), 5)
    assert_close(parameters(stack), expected, 0.0)
    same = stack_of(twin, config, causal=True)
    assert all((v == 0).all() for v in parameters(same).values()), "from_config leaves the weights to the owner"
    set_parameters(same, expected)
    X = twin.array(random_array(6, B, T, 12).astype(np.float32))
    assert_close(same(X), stack(X), 0.0)


@both
def test_unknown_choice(twin):
    with pytest.raises(ConfigError) as caught:
        twin.file("stack").TransformerStack(9, 12, 4, 7, 3, 2, colour="red", normm="rmsnorm", dropout=1.5)
    text = str(caught.value)
    assert "colour" in text
    assert "normm" in text


# ---- the stack is its blocks and one bias


def numpy_stack(X, values, config, bias, *, causal):
    for i in range(config.num_layers):
        block = part(values, f"blocks.{i}")
        X = numpy_block(X, block, config, masks={"mask": bias}, causal=causal)
    final = part(values, "final_norm")
    return references.layer_norm(X, final["weight"], final["bias"], config.norm_eps) if final else X


def position_bias(config, values, positions, *, causal):
    """``[rows, A, T, T]`` by the formulas of T5 and of ALiBi."""
    A, (rows, T) = config.num_heads, positions.shape
    out = np.zeros((rows, A, T, T))
    for b, a, i, j in np.ndindex(*out.shape):
        n = int(positions[b, j] - positions[b, i])
        if config.positions == "alibi":
            out[b, a, i, j] = -references.alibi_slopes(A)[a] * abs(n)
        elif config.positions == "relative":
            bucket = references.relative_bucket(
                n, config.relative_buckets, config.relative_max_distance, bidirectional=not causal
            )
            out[b, a, i, j] = values["relative_bias.weight"][bucket, a]
    return out


@both
@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("kind", ["relative", "alibi"])
@pytest.mark.parametrize("places", ["default", "given", "one row"])
def test_position_bias_is_added_once_in_every_block(twin, kind, causal, places):
    """The same bias reaches block 0 and block 1, once; a bias given by the caller is added to it."""
    config = config_of(positions=kind, relative_buckets=8, relative_max_distance=9, context_length=40)
    stack = stack_of(twin, config, causal=causal)
    values = scatter_parameters(stack, 22)
    X = random_array(7, B, T, 12)
    given = {
        "default": None,
        "given": np.array([[0, 1, 2, 3, 30], [5, 3, 9, 21, 0]]),
        "one row": np.array([[0, 2, 4, 8, 16]]),
    }[places]
    positions = np.arange(T)[None] if given is None else given
    bias = position_bias(config, values, positions, causal=causal)
    arguments = {} if given is None else {"positions": twin.array(given)}
    assert_close(stack(twin.array(X), **arguments), numpy_stack(X, values, config, bias, causal=causal))
    more = random_array(8, 1, 3, T, T)
    out = stack(twin.array(X), bias=twin.array(more), **arguments)
    assert_close(out, numpy_stack(X, values, config, bias + more, causal=causal), name="with a bias from the caller")


@both
def test_cross_attention_has_no_position_bias(twin):
    """T5's decoder: the relative bias belongs to self-attention alone."""
    config = config_of(positions="relative", relative_buckets=8, relative_max_distance=9, num_layers=1)
    stack = stack_of(twin, config, causal=True, cross_attention=True)
    values = scatter_parameters(stack, 23)
    X, H = random_array(9, B, T, 12), random_array(10, B, T, 12)
    bias = position_bias(config, values, np.arange(T)[None], causal=True)
    block = part(values, "blocks.0")
    expected = numpy_block(X, block, config, H_enc=H, masks={"mask": bias}, causal=True)
    final = part(values, "final_norm")
    expected = references.layer_norm(expected, final["weight"], final["bias"], config.norm_eps)
    assert_close(stack(twin.array(X), twin.array(H)), expected)


@both
@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
def test_window_layers(twin, causal):
    """Blocks 0 and 2 see through the window, block 1 sees everything."""
    config = config_of(num_layers=3, window=2, window_layers=(0, 2))
    stack = stack_of(twin, config, causal=causal)
    values = scatter_parameters(stack, 31)
    X = random_array(32, B, T, 12)
    expected = X
    near = np.abs(np.arange(T)[None, :] - np.arange(T)[:, None]) < 2
    for i in range(3):
        mask = near[None, None] if i in (0, 2) else np.ones((1, 1, T, T), bool)
        expected = numpy_block(expected, part(values, f"blocks.{i}"), config, masks={"mask": mask}, causal=causal)
    final = part(values, "final_norm")
    assert_close(stack(twin.array(X)), references.layer_norm(expected, final["weight"], final["bias"], config.norm_eps))


@both
def test_window_rotary_base(twin):
    """A block with the window turns by its own base, unscaled; the others by the base and the scaling of the model."""
    config = config_of(
        positions="rotary",
        num_layers=2,
        final_norm=False,
        window=3,
        window_layers=(1,),
        rotary_base=500.0,
        rotary_scaling=RotaryScaling(kind="linear", factor=4.0),
        window_rotary_base=37.0,
    )
    stack = stack_of(twin, config, causal=True)
    values = scatter_parameters(stack, 33)
    X = random_array(34, B, T, 12)
    K = config.key_dim
    far, near = references.rotation(K, base=500.0), references.rotation(K, base=37.0)

    def formula(**local):
        h = numpy_block(X, part(values, "blocks.0"), config, causal=True, rotate=scaled)
        return numpy_block(h, part(values, "blocks.1"), config, causal=True, window=3, **local)

    def scaled(x, position):
        return far(x, position / 4)

    assert_close(stack(twin.array(X)), formula(rotate=near))
    stack = stack_of(twin, config.replace(window_rotary_base=None), causal=True)
    set_parameters(stack, values)
    assert_close(stack(twin.array(X)), formula(rotate=scaled))


@both
def test_without_final_norm(twin):
    config = config_of(final_norm=False)
    stack = stack_of(twin, config)
    assert stack.final_norm is None
    values = scatter_parameters(stack, 24)
    X = random_array(11, B, T, 12)
    assert_close(stack(twin.array(X)), numpy_stack(X, values, config, None, causal=False))


@both
def test_sinusoidal_and_learned_positions_are_not_the_stacks(twin):
    X = random_array(12, B, T, 12)
    outs = []
    for kind in ("none", "sinusoidal", "learned"):
        stack = stack_of(twin, config_of(positions=kind))
        scatter_parameters(stack, 25)
        outs.append(to_numpy(stack(twin.array(X))))
    assert_close(outs[1], outs[0], 0.0)
    assert_close(outs[2], outs[0], 0.0)


# ---- remat


RICH = {
    "positions": "relative",
    "relative_buckets": 8,
    "relative_max_distance": 20,
    "dropout": 0.2,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.3,
    "gated": True,
    "activation": "gelu",
}


@both
@pytest.mark.parametrize("dropout", [False, True], ids=["calm", "dropout"])
def test_remat_changes_nothing(twin, dropout):
    """Output and every gradient, with dropout too: the blocks that are run again draw the same numbers."""
    results = []
    for remat in (False, True):
        stack = stack_of(twin, config_of(remat=remat, **RICH), causal=True, cross_attention=True)
        scatter_parameters(stack, 26)
        inputs = {"X": random_array(13, B, T, 12), "H_enc": random_array(14, B, S, 12)}
        key = twin.key(77) if dropout else None
        results.append(gradients(twin, lambda m, k=key, **kw: m(**kw, rng=k), inputs, stack))
    (out, grads), (remat_out, remat_grads) = results
    assert_close(remat_out, out, 1e-15)
    assert_gradients_close(remat_grads, grads, 1e-13)


@pytest.mark.parametrize(
    ("window", "remat", "dropout", "turns"),
    [(None, False, False, [5]), ((1, 3), True, True, [2]), ((0, 1), False, False, [])],
    ids=["alike", "turns of two, remat, dropout", "never again"],
)
def test_a_loop_over_blocks_changes_nothing(window, remat, dropout, turns):
    """Output and every gradient, of five blocks: two turns of two leave one, and what never comes again is no loop."""
    results, loops = [], []
    for scan in (False, True):
        local = {} if window is None else {"window": 2, "window_layers": window}
        config = config_of(scan_layers=scan, remat=remat, num_layers=5, **RICH, **local)
        stack = stack_of(FLAX, config, causal=True, cross_attention=True)
        scatter_parameters(stack, 26)
        inputs = {"X": random_array(13, B, T, 12), "H_enc": random_array(14, B, S, 12)}
        key = FLAX.key(77) if dropout else None
        results.append(gradients(FLAX, lambda m, k=key, **kw: m(**kw, rng=k), inputs, stack))
        graph, state = nnx.split(stack)
        with shape_hook_off():
            program = jax.make_jaxpr(lambda s, g=graph, k=key, i=inputs: nnx.merge(g, s)(**i, rng=k))(state)
        loops.append([equation.params["length"] for equation in program.eqns if equation.primitive.name == "scan"])
    (out, grads), (scan_out, scan_grads) = results
    assert_close(scan_out, out, 1e-15)
    assert_gradients_close(scan_grads, grads, 1e-13)
    assert loops == [[], turns]


@pytest.mark.parametrize("wrong", [lambda keys: keys[::-1], lambda keys: keys[:1] * len(keys)], ids=["order", "one"])
def test_a_loop_with_other_keys_is_noticed(wrong, monkeypatch):
    """What the test above would see if a block drew with another's key."""
    stack = sys.modules["flax_impl.stack"]
    config = config_of(scan_layers=True, num_layers=3, dropout=0.4)
    made = stack_of(FLAX, config)
    scatter_parameters(made, 26)
    X, key = random_array(13, B, T, 12), FLAX.key(77)
    right = made(X, rng=key)
    monkeypatch.setattr(stack, "fold_all", lambda rng, count, whole=stack.fold_all: wrong(whole(rng, count)))
    with pytest.raises(AssertionError):
        assert_close(made(X, rng=key), right, 1e-15)


def test_remat_does_recompute():
    """With remat a block's body is entered twice, forward and backward; without, once."""
    counts = {}
    for remat in (False, True):
        stack = stack_of(TORCH, config_of(remat=remat))
        scatter_parameters(stack, 27)
        calls = []
        stack.blocks[0].feedforward.register_forward_pre_hook(lambda *_, log=calls: log.append(1))
        gradients(TORCH, lambda m, **kw: m(**kw), {"X": random_array(15, B, T, 12)}, stack)
        counts[remat] = len(calls)
    assert counts == {False: 1, True: 2}
    programs = {}
    for remat in (False, True):
        stack = stack_of(FLAX, config_of(remat=remat))
        graph, state = nnx.split(stack)
        X = FLAX.array(random_array(15, B, T, 12))
        with shape_hook_off():
            programs[remat] = str(jax.make_jaxpr(jax.grad(lambda s, g=graph, X=X: nnx.merge(g, s)(X).sum()))(state))
    assert "remat" in programs[True] or "checkpoint" in programs[True]
    assert "remat" not in programs[False]
    assert "checkpoint" not in programs[False]


# ---- dropout


def test_twins_agree_with_dropout():
    inputs = {"X": random_array(16, B, T, 12), "H_enc": random_array(17, B, S, 12)}
    results = []
    for twin in (TORCH, FLAX):
        stack = stack_of(twin, config_of(**RICH), causal=True, cross_attention=True)
        scatter_parameters(stack, 28)
        results.append(gradients(twin, lambda m, t=twin, **kw: m(**kw, rng=t.key(2**63 + 5)), inputs, stack))
    (out, grads), (flax_out, flax_grads) = results
    assert_close(flax_out, out)
    assert_gradients_close(flax_grads, grads)


@both
def test_each_block_has_its_own_masks(twin):
    """Block i draws from ``fold(rng, i)``: the loops agree with those factors, not with block 0's in both."""
    rate, seed = 0.4, 3
    config = config_of(dropout=rate, final_norm=False)
    stack = stack_of(twin, config)
    values = scatter_parameters(stack, 29)
    X = random_array(18, B, T, 12)

    def expected(block_of_key):
        out = X
        for i in range(2):
            factors = {
                place: references.dropout_factors(references.key_of(seed, block_of_key(i), place), (B, T, 12), rate)
                for place in (1, 5)
            }
            out = numpy_block(out, part(values, f"blocks.{i}"), config, factors=factors)
        return out

    out = stack(twin.array(X), rng=twin.key(seed))
    assert_close(out, expected(lambda i: i))
    with pytest.raises(AssertionError, match="off by"):
        assert_close(out, expected(lambda i: 0))


# ---- compiled and not


@pytest.mark.parametrize(("twin", "call"), [(TORCH, torch_compiled), (FLAX, jitted)], ids=["torch", "flax"])
def test_eager_is_compiled(twin, call):
    stack = stack_of(twin, config_of(**RICH, remat=True), causal=True, cross_attention=True)
    scatter_parameters(stack, 30)
    inputs = {"X": twin.array(random_array(19, B, T, 12)), "H_enc": twin.array(random_array(20, B, S, 12))}
    assert_close(call(stack, **inputs, rng=twin.key(4)), stack(**inputs, rng=twin.key(4)))
