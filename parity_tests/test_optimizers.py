"""AdamW, SGD, Adafactor, clipping and averaging: from the equations in NumPy, against torch's and optax's own.

What is compared is the update, new minus old, never the parameters: their size would hide it.
"""

import ml_dtypes
import numpy as np
import optax
import pytest
import torch

from parity_tests.helpers import FLAX, TORCH, assert_close, both, random_array, shape_hook_off, to_numpy, to_torch
from twinformer.errors import InputError
from twinformer.learning import OptimizerConfig, ScheduleConfig

BF16 = ml_dtypes.bfloat16
SHAPES = {
    "stack.up.weight": (5, 3),
    "stack.up.bias": (5,),
    "norm.weight": (3,),
    "head.weight": (3, 3),
    "kernel.weight": (2, 3, 2),
}
DECAYED = {"stack.up.weight", "head.weight", "kernel.weight"}
STEPS = 8
SCHEDULE = ScheduleConfig(name="cosine", peak=0.2, warmup_steps=3, total_steps=STEPS, final_fraction=0.1)
RATES = [SCHEDULE.learning_rate(step) for step in range(STEPS)]


def start(seed=1, shapes=SHAPES):
    return {path: random_array(100 * seed + i, *shape, scale=0.5) for i, (path, shape) in enumerate(shapes.items())}


#: norms from far below to far above 1, so that clipping at 1 acts on some steps only; single gradients to 1e-12
def gradients_of(step):
    scale = [0.05, 3.0, 1e-12, 0.2, 10.0, 1e-3, 0.1, 1.0][step]
    return {path: random_array(1000 + 100 * step + i, *s, scale=scale) for i, (path, s) in enumerate(SHAPES.items())}


# ---- the reference, in float64, from the contract's equations; each fault is one that real ports had


def reference(config, parameters, all_gradients, rates, fault=None):
    """Updates of every step by path, and the averages after the last."""
    w = {path: value.astype(np.float64) for path, value in parameters.items()}
    memory = {path: {} for path in w}
    ema = {path: np.zeros_like(v) if fault == "ema from zero" else v.copy() for path, v in w.items()}
    updates = []
    for step, (found, lr) in enumerate(zip(all_gradients, rates, strict=True)):
        g = {path: value.astype(np.float64) for path, value in found.items()}
        if config.clip_norm is not None:
            norm = np.sqrt(sum((value**2).sum() for value in g.values()))
            if fault == "clip + 1e-6":
                g = {path: value * min(1.0, config.clip_norm / (norm + 1e-6)) for path, value in g.items()}
            elif norm > config.clip_norm or fault == "clip always":
                g = {path: value * (config.clip_norm / norm) for path, value in g.items()}
        new = {}
        for path in w:
            decay = config.weight_decay if path in DECAYED or fault == "decay of all" else 0.0
            rule = {"adamw": adamw, "sgd": sgd, "adafactor": adafactor}[config.name]
            given = g[path] + decay * w[path] if fault == "L2" else g[path]
            change = rule(config, w[path], given, memory[path], step + 1, fault, lr)
            if fault == "decay on the new weights":
                moved = w[path] - change
                new[path] = moved - lr * decay * moved
            else:
                new[path] = w[path] - change - (0.0 if fault == "L2" else lr * decay) * w[path]
        updates.append({path: new[path] - w[path] for path in w})
        w = new
        if config.ema_decay is not None:
            ema = {path: config.ema_decay * ema[path] + (1 - config.ema_decay) * w[path] for path in w}
    return updates, w, ema


def adamw(config, w, g, memory, t, fault, lr):
    if fault == "bias correction off by one":
        t = t + 1
    memory["m"] = config.beta1 * memory.get("m", 0.0) + (1 - config.beta1) * g
    memory["v"] = config.beta2 * memory.get("v", 0.0) + (1 - config.beta2) * g**2
    m, v = memory["m"] / (1 - config.beta1**t), memory["v"] / (1 - config.beta2**t)
    if fault == "eps inside the root":
        return lr * m / np.sqrt(v + config.eps)
    if fault == "eps before the correction":
        return lr * m / ((np.sqrt(memory["v"]) + config.eps) / np.sqrt(1 - config.beta2**t))
    return lr * m / (np.sqrt(v) + config.eps)


def sgd(config, w, g, memory, t, fault, lr):
    memory["b"] = config.momentum * memory.get("b", 0.0) + (1 - config.momentum * (fault == "dampening")) * g
    return lr * (g + config.momentum * memory["b"] if config.nesterov else memory["b"])


def adafactor(config, w, g, memory, t, fault, lr):
    beta = 1 - float(t + (fault == "t off by one")) ** -config.decay_rate
    s = g**2 + config.eps_gradient
    if g.ndim == 2:
        memory["R"] = beta * memory.get("R", 0.0) + (1 - beta) * s.mean(1)
        memory["C"] = beta * memory.get("C", 0.0) + (1 - beta) * s.mean(0)
        v = np.outer(memory["R"], memory["C"]) / memory["R"].mean()
        if fault == "row and column exchanged" and v.shape[0] == v.shape[1]:
            v = v.T
    else:
        memory["v"] = beta * memory.get("v", 0.0) + (1 - beta) * s
        v = memory["v"]
    u = g / np.sqrt(v)
    if fault != "update not clipped":
        u = u / max(1.0, np.sqrt((u**2).mean()) / config.clip_threshold)
    scale = 1.0 if fault == "rate not relative" else max(config.eps_parameter, np.sqrt((w**2).mean()))
    return lr * scale * u


# ---- running a twin


def native(twin, leaves, dtype=None):
    return {path: twin.array(np.asarray(v) if dtype is None else v.astype(dtype)) for path, v in leaves.items()}


def copied(leaves):
    return {path: np.array(to_numpy(v)) for path, v in leaves.items()}


def run(twin, config, parameters, all_gradients, rates, dtype=np.float64, gradient_dtype=None):
    """Updates of every step, in the dtype of the parameters, and the state after the last."""
    optimizer = twin.file("optimizers").Optimizer(config)
    held = native(twin, parameters, dtype)
    state = optimizer.init(held)
    updates = []
    for found, lr in zip(all_gradients, rates, strict=True):
        before = copied(held)
        given = native(twin, found, gradient_dtype or dtype)
        untouched = copied(given)
        held, state = optimizer.update(held, given, state, lr)
        updates.append({path: to_numpy(v) - before[path] for path, v in held.items()})
        assert_close(copied(given), untouched, rtol=0)
    return updates, copied(held), state


def assert_updates_close(actual, expected, rtol, atol=2e-15):
    """Within ``rtol`` of the leaf's largest update, and ``atol``: a few times the rounding of the weights (up to 4),
    to which the difference of two of them is known. It decides only where an update is that small."""
    assert len(actual) == len(expected) == STEPS
    for step, (have, want) in enumerate(zip(actual, expected, strict=True)):
        assert set(have) == set(want) == set(SHAPES)
        for path, value in want.items():
            assert have[path].shape == value.shape
            assert np.isfinite(value).all()
            off, largest = np.abs(have[path].astype(np.float64) - value).max(), np.abs(value).max()
            assert off <= rtol * largest + atol, f"step {step}: {path}: off by {off:.3e}, the largest is {largest:.3e}"


GRADIENTS = [gradients_of(step) for step in range(STEPS)]
CONFIGS = {
    "adamw": OptimizerConfig(weight_decay=0.1),
    "adamw, large eps": OptimizerConfig(weight_decay=0.1, eps=1e-3, beta2=0.95, clip_norm=None, ema_decay=0.9),
    "adamw, no decay": OptimizerConfig(decay="none", beta1=0.0),
    "sgd": OptimizerConfig(name="sgd", weight_decay=0.1, clip_norm=None),
    "sgd, nesterov": OptimizerConfig(name="sgd", weight_decay=0.1, nesterov=True, ema_decay=0.5),
    "sgd, nesterov, unclipped": OptimizerConfig(name="sgd", nesterov=True, clip_norm=None),
    "sgd, plain": OptimizerConfig(name="sgd", weight_decay=0.1, momentum=0.0),
    "adafactor": OptimizerConfig(name="adafactor", weight_decay=0.1, clip_norm=None),
    "adafactor, clipped": OptimizerConfig(name="adafactor", weight_decay=0.1, clip_threshold=0.5, ema_decay=0.9),
    "adafactor, small": OptimizerConfig(name="adafactor", weight_decay=0.0, eps_parameter=2.0, eps_gradient=1e-3),
}


def reference_decay(config):
    return config if config.decay != "none" else OptimizerConfig(**{**vars(config), "weight_decay": 0.0})


@both
@pytest.mark.parametrize("name", CONFIGS)
def test_eight_steps(twin, name):
    """Through warm-up, with clipping active on some steps and not on others."""
    config = CONFIGS[name]
    expected, weights, ema = reference(reference_decay(config), start(), GRADIENTS, RATES)
    updates, held, state = run(twin, config, start(), GRADIENTS, RATES)
    assert_updates_close(updates, expected, 1e-13)
    assert int(state["step"]) == STEPS
    if config.ema_decay is not None:
        assert_close(state["ema"], ema, 1e-13)
    assert_close(held, weights, 1e-13)


def test_clipping_acts_on_some_steps_only():
    norms = [np.sqrt(sum((g**2).sum() for g in found.values())) for found in GRADIENTS]
    assert {bool(norm > 1) for norm in norms[: SCHEDULE.warmup_steps]} == {True, False}
    assert {bool(norm > 1) for norm in norms[SCHEDULE.warmup_steps :]} == {True, False}


FAULTS = {
    "adamw": [
        "eps inside the root",
        "eps before the correction",
        "L2",
        "decay on the new weights",
        "decay of all",
        "bias correction off by one",
        "clip + 1e-6",
        "clip always",
    ],
    "sgd": ["L2", "decay on the new weights", "dampening"],
    "adafactor": [
        "row and column exchanged",
        "t off by one",
        "update not clipped",
        "rate not relative",
        "decay on the new weights",
    ],
}


@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name, faults in FAULTS.items() for fault in faults])
def test_eight_steps_can_fail(name, fault):
    """Each fault, planted in the reference, is refused: by a factor of a thousand at least."""
    wrong, _, _ = reference(CONFIGS[name], start(), GRADIENTS, RATES, fault)
    updates, _, _ = run(TORCH, CONFIGS[name], start(), GRADIENTS, RATES)
    with pytest.raises(AssertionError, match="off by"):
        assert_updates_close(updates, wrong, 1e-10)


def test_average_can_fail():
    config = CONFIGS["adamw, large eps"]
    *_, wrong = reference(config, start(), GRADIENTS, RATES, "ema from zero")
    *_, state = run(TORCH, config, start(), GRADIENTS, RATES)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(state["ema"], wrong, 1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_twins_agree(name):
    config = CONFIGS[name]
    ours, theirs = (run(twin, config, start(), GRADIENTS, RATES) for twin in (TORCH, FLAX))
    assert_updates_close(theirs[0], ours[0], 1e-13)
    assert set(ours[2]) == set(theirs[2])
    for part in set(ours[2]) - {"step"}:
        assert_close(theirs[2][part], ours[2][part], 1e-12)


# ---- by hand


def one_step(twin, config, w, g, lr, steps=1):
    optimizer = twin.file("optimizers").Optimizer(config)
    held = {"a.weight": twin.array(np.array(w))}
    state = optimizer.init(held)
    for _ in range(steps):
        held, state = optimizer.update(held, {"a.weight": twin.array(np.array(g))}, state, lr)
    return to_numpy(held["a.weight"]), state


@both
def test_first_adamw_step_by_hand(twin):
    """m̂ = g = 2, v̂ = 4: w - 0.1 (2 / (2 + 0.5) + 0.3 · 5) = 5 - 0.1 · 2.3."""
    config = OptimizerConfig(eps=0.5, weight_decay=0.3, clip_norm=None)
    w, state = one_step(twin, config, [5.0], [2.0], 0.1)
    assert_close(w, np.array([4.77]), 1e-15)
    assert_close(state["exp_avg"]["a.weight"], np.array([0.2]), 1e-15)
    assert_close(state["exp_avg_sq"]["a.weight"], np.array([0.004]), 1e-15)


@both
def test_two_nesterov_steps_by_hand(twin):
    """b = 2, d = 2 + 2/2 = 3, w = 10 - 3 - 1 = 6; then b = 3, d = 3.5, w = 6 - 3.5 - 0.6 = 1.9 (rate 1, decay 0.1)."""
    config = OptimizerConfig(name="sgd", momentum=0.5, nesterov=True, weight_decay=0.1, clip_norm=None)
    assert_close(one_step(twin, config, [10.0], [2.0], 1.0)[0], np.array([6.0]), 1e-15)
    assert_close(one_step(twin, config, [10.0], [2.0], 1.0, steps=2)[0], np.array([1.9]), 1e-15)


@both
def test_first_adafactor_step_by_hand(twin):
    """g² = [[1, 9], [4, 36]] has rank one: R = (5, 20), C = (2.5, 22.5), so v̂ = g² and u is the signs.

    Root mean square of w is 5: w - 0.1 · 5 · u, unclipped as rms(u) = 1.
    """
    config = OptimizerConfig(name="adafactor", weight_decay=0.0, clip_norm=None)
    w, state = one_step(twin, config, [[1.0, 7.0], [7.0, 1.0]], [[1.0, -3.0], [-2.0, 6.0]], 0.1)
    assert_close(w, np.array([[0.5, 7.5], [7.5, 0.5]]), 1e-15)
    assert_close(state["row"]["a.weight"], np.array([5.0, 20.0]), 1e-15)
    assert_close(state["column"]["a.weight"], np.array([2.5, 22.5]), 1e-15)


@both
def test_adafactor_with_gradients_of_zero(twin):
    """R and C are then 1e-30 each, and their product is nothing in float32: 0/0 unless the roots come first."""
    config = OptimizerConfig(name="adafactor", weight_decay=0.0)
    w = np.array([[1.0, 7.0], [7.0, 1.0]], np.float32)
    found, _ = one_step(twin, config, w, np.zeros((2, 2), np.float32), 0.1, steps=3)
    assert_close(found, w, rtol=0)
    tiny = np.full(2, 1e-30, np.float32)
    with np.errstate(invalid="ignore", under="ignore"):
        assert np.isnan(np.float32(0) / np.sqrt(np.outer(tiny, tiny) / tiny.mean())).all()


# ---- state


@both
def test_state(twin):
    """What there is at first, by name, shape and dtype; names that would hold nothing are left out."""

    def shapes(config, dtype=np.float32):
        state = twin.file("optimizers").Optimizer(config).init(native(twin, start(), dtype))
        step = state.pop("step")
        assert int(step) == 0
        assert isinstance(step, int) if twin is TORCH else (step.dtype, step.shape) == (np.int32, ())
        kinds = {to_numpy(leaf).dtype for leaves in state.values() for leaf in leaves.values()}
        assert kinds <= {np.dtype(np.float64 if dtype is np.float64 else np.float32)}
        for name in set(state) - {"ema", "master"}:
            assert all((to_numpy(leaf) == 0).all() for leaf in state[name].values())
        for name in set(state) & {"ema", "master"}:
            as_held = {path: value.astype(dtype) for path, value in start().items()}
            wide = np.float64 if dtype is np.float64 else np.float32
            assert_close(state[name], {path: value.astype(wide) for path, value in as_held.items()}, rtol=0)
        return {name: {path: tuple(leaf.shape) for path, leaf in leaves.items()} for name, leaves in state.items()}

    matrices = {path: shape for path, shape in SHAPES.items() if len(shape) == 2}
    others = {path: shape for path, shape in SHAPES.items() if len(shape) != 2}
    assert shapes(OptimizerConfig()) == {"exp_avg": SHAPES, "exp_avg_sq": SHAPES}
    assert shapes(OptimizerConfig(), np.float64) == {"exp_avg": SHAPES, "exp_avg_sq": SHAPES}
    assert shapes(OptimizerConfig(name="sgd")) == {"momentum": SHAPES}
    assert shapes(OptimizerConfig(name="sgd", momentum=0.0)) == {}
    assert shapes(OptimizerConfig(name="sgd", ema_decay=0.9), BF16) == {
        "momentum": SHAPES,
        "master": SHAPES,
        "ema": SHAPES,
    }
    assert shapes(OptimizerConfig(name="adafactor")) == {
        "row": {path: shape[:1] for path, shape in matrices.items()},
        "column": {path: shape[1:] for path, shape in matrices.items()},
        "exp_avg_sq": others,
    }


@both
@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_masters(twin, name):
    """bfloat16: steps too small to move a rounded weight add up in the master; the weight is the master rounded."""
    config = OptimizerConfig(name=name, weight_decay=0.0, clip_norm=None, ema_decay=0.9)
    w = np.ones((2, 2), BF16)
    g = np.array([[0.5, -0.5], [0.25, -0.25]], BF16)
    optimizer = twin.file("optimizers").Optimizer(config)
    held = {"a.weight": twin.array(w)}
    state = optimizer.init(held)
    lr = {"adamw": 1e-4, "sgd": 1e-4, "adafactor": 1e-4}[name]
    gradient = {"a.weight": g.astype(np.float64)}
    steps = 40
    expected, master, ema = reference(config, {"a.weight": w.astype(np.float64)}, [gradient] * steps, [lr] * steps)
    for _ in range(steps):
        held, state = optimizer.update(held, {"a.weight": twin.array(g)}, state, lr)
    assert_close(state["master"]["a.weight"], master["a.weight"].astype(np.float32), 1e-5)
    assert_close(state["ema"]["a.weight"], ema["a.weight"].astype(np.float32), 1e-5)
    rounded = to_numpy(state["master"]["a.weight"]).astype(BF16)
    assert_close(held["a.weight"], rounded, rtol=0)
    # without a master no step would have been seen
    alone = w.copy()
    for update in expected:
        alone = (alone.astype(np.float64) + update["a.weight"]).astype(BF16)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(alone, rounded, rtol=1e-3)


@both
def test_masters_only_where_needed_and_clipped_wide(twin):
    """Mixed dtypes: one master; the norm is over all; narrow gradients are clipped in the wide dtype, not rounded."""
    config = OptimizerConfig(name="sgd", momentum=0.0, weight_decay=0.0, clip_norm=1.0)
    w = {"a.weight": np.zeros((1, 2), BF16), "b.weight": np.zeros((1, 1), np.float32)}
    g = {"a.weight": np.array([[3.0, 7.0]], BF16), "b.weight": np.array([[5.0]], np.float32)}
    optimizer = twin.file("optimizers").Optimizer(config)
    held = native(twin, w)
    state = optimizer.init(held)
    assert set(state["master"]) == {"a.weight"}
    held, state = optimizer.update(held, native(twin, g), state, 1.0)
    expected = np.array([[-3.0, -7.0]]) / np.sqrt(83.0)
    assert_close(state["master"]["a.weight"], expected.astype(np.float32), 1e-6)
    assert_close(held["a.weight"], expected.astype(BF16), rtol=0)
    assert_close(held["b.weight"], np.array([[-5.0 / np.sqrt(83.0)]], np.float32), 1e-6)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(state["master"]["a.weight"], expected.astype(BF16).astype(np.float32), 1e-4)


@both
def test_rate_zero_and_no_parameters(twin):
    optimizer = twin.file("optimizers").Optimizer(OptimizerConfig())
    held = native(twin, start())
    found, state = optimizer.update(held, native(twin, GRADIENTS[0]), optimizer.init(held), 0.0)
    assert_close(copied(found), start(), rtol=0)
    assert int(state["step"]) == 1
    parameters, state = optimizer.update({}, {}, optimizer.init({}), 0.1)
    assert (dict(parameters), int(state["step"])) == ({}, 1)


@both
def test_a_run_that_is_taken_up_again(twin):
    """State out and in through NumPy: the same to the last bit."""
    config = CONFIGS["adamw, large eps"]
    optimizer = twin.file("optimizers").Optimizer(config)
    whole, *_ = run(twin, config, start(), GRADIENTS, RATES)
    held = native(twin, start())
    state = optimizer.init(held)
    for step in range(STEPS):
        before = copied(held)
        held, state = optimizer.update(held, native(twin, GRADIENTS[step]), state, RATES[step])
        assert_close({p: to_numpy(v) - before[p] for p, v in held.items()}, whole[step], rtol=0)
        held = native(twin, copied(held))
        state = {
            name: native(twin, copied(part)) if name != "step" else (int(part) if twin is TORCH else part)
            for name, part in state.items()
        }


# ---- norm and clipping


@both
def test_global_norm(twin):
    norm = twin.file("optimizers").global_norm
    g = {"b": np.array([3.0, 4.0]), "a": np.array([[12.0]])}
    assert_close(norm(native(twin, g)), np.float64(13.0), 1e-15)
    assert_close(norm(native(twin, g, BF16)), np.float32(13.0), 1e-6)
    assert_close(norm({"a": twin.array(np.float32(3.0)), "b": twin.array(np.float64(4.0))}), np.float64(5.0), 1e-15)
    # summed wide: 4096 ones and 1/8 each have a sum that bfloat16 does not know
    many = {"a": np.full(4097, 1.0, BF16), "b": np.full(3, 0.125, BF16)}
    assert_close(norm(native(twin, many)), np.float32(np.sqrt(4097 + 3 / 64)), 1e-6)
    assert float(norm({})) == 0.0


@both
def test_clip(twin):
    clip = twin.file("optimizers").clip
    g = {"b": np.array([3.0, 4.0]), "a": np.array([[12.0]])}
    found, norm = clip(native(twin, g), 6.5)
    assert_close(norm, np.float64(13.0), 1e-15)
    assert_close(copied(found), {"b": np.array([1.5, 2.0]), "a": np.array([[6.0]])}, 1e-15)
    for limit in (13.0, 14.0):  # not above it: not a bit is changed
        found, norm = clip(native(twin, g), limit)
        assert_close(copied(found), g, rtol=0)
        assert_close(norm, np.float64(13.0), 1e-15)
    found, _ = clip(native(twin, g, BF16), 6.5)
    assert_close(copied(found), {"b": np.array([1.5, 2.0], BF16), "a": np.array([[6.0]], BF16)}, rtol=0)
    nothing = {"a": np.zeros(3)}
    found, norm = clip(native(twin, nothing), 1.0)
    assert_close(copied(found), nothing, rtol=0)
    assert float(norm) == 0.0


@both
@pytest.mark.parametrize("content", [np.nan, np.inf, -np.inf, 1e200])
def test_a_norm_that_is_not_finite(twin, content):
    """Also where the squares alone overflow (1e200): never gradients of 0."""
    found, norm = twin.file("optimizers").clip(native(twin, {"a": np.array([1.0, content]), "b": np.ones(2)}), 1.0)
    assert not np.isfinite(to_numpy(norm))
    assert not np.isfinite(to_numpy(found["a"])).all()
    assert not any((to_numpy(leaf) == 0).any() for leaf in found.values())


@both
def test_clip_against_torch(twin):
    """torch.nn.utils.clip_grad_norm_ adds 1e-6 to the norm: near to ours, and not the same."""
    leaf = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    leaf.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    theirs_norm = torch.nn.utils.clip_grad_norm_([leaf], 1.0)
    found, norm = twin.file("optimizers").clip({"a": twin.array(np.array([3.0, 4.0]))}, 1.0)
    assert_close(norm, theirs_norm, 1e-15)
    assert_close(found["a"], np.array([0.6, 0.8]), 1e-15)
    assert_close(found["a"], leaf.grad, 1e-6)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(found["a"], leaf.grad, 1e-8)


# ---- witnesses


def witnessed_by_torch(make, config, dtype):
    """Updates of a module's parameters by torch's own optimizer, in two groups, with and without decay."""
    leaves = {path: torch.nn.Parameter(to_torch(v.astype(dtype))) for path, v in start().items()}
    groups = [
        {"params": [leaf for path, leaf in leaves.items() if config.decays(path)], "weight_decay": config.weight_decay},
        {"params": [leaf for path, leaf in leaves.items() if not config.decays(path)], "weight_decay": 0.0},
    ]
    optimizer = make(groups)
    updates = []
    for found, lr in zip(GRADIENTS, RATES, strict=True):
        before = copied(leaves)
        for path, leaf in leaves.items():
            leaf.grad = to_torch(found[path].astype(dtype))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        updates.append({path: to_numpy(leaf) - before[path] for path, leaf in leaves.items()})
    return updates


@both
def test_adamw_against_torch(twin):
    config = OptimizerConfig(weight_decay=0.1, clip_norm=None)
    expected = witnessed_by_torch(
        lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8), config, np.float64
    )
    assert_updates_close(run(twin, config, start(), GRADIENTS, RATES)[0], expected, 1e-13)
    wrong = witnessed_by_torch(
        lambda groups: torch.optim.Adam(groups, betas=(0.9, 0.999), eps=1e-8), config, np.float64
    )
    with pytest.raises(AssertionError, match="off by"):
        assert_updates_close(run(twin, config, start(), GRADIENTS, RATES)[0], wrong, 1e-3)


@both
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_against_torch(twin, nesterov):
    """Without decay, which torch's SGD puts into the gradient: with it the two differ."""
    plain = OptimizerConfig(name="sgd", weight_decay=0.0, nesterov=nesterov, clip_norm=None)
    decayed = OptimizerConfig(name="sgd", weight_decay=0.1, nesterov=nesterov, clip_norm=None)

    def make(groups):
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=nesterov)

    assert_updates_close(
        run(twin, plain, start(), GRADIENTS, RATES)[0], witnessed_by_torch(make, plain, np.float64), 1e-13
    )
    with pytest.raises(AssertionError, match="off by"):
        assert_updates_close(
            run(twin, decayed, start(), GRADIENTS, RATES)[0], witnessed_by_torch(make, decayed, np.float64), 1e-3
        )


def witnessed_by_optax(make, config):
    """optax's own, with the decay mask by path; its rate is set at every step."""
    mask = {path: config.decays(path) for path in SHAPES}
    held = native(FLAX, start())
    state = make(RATES[0], mask).init(held)
    updates = []
    for found, lr in zip(GRADIENTS, RATES, strict=True):
        change, state = make(lr, mask).update(native(FLAX, found), state, held)
        held = optax.apply_updates(held, change)
        updates.append(copied(change))
    return updates


@both
@pytest.mark.parametrize("name", ["adamw", "sgd", "nesterov"])
def test_against_optax(twin, name):
    if name == "adamw":
        config = OptimizerConfig(weight_decay=0.1, clip_norm=None)

        def make(lr, mask):
            return optax.adamw(lr, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.1, mask=mask)
    else:
        config = OptimizerConfig(name="sgd", weight_decay=0.1, nesterov=name == "nesterov", clip_norm=None)

        def make(lr, mask):
            return optax.chain(
                optax.trace(0.9, nesterov=name == "nesterov"),
                optax.add_decayed_weights(0.1, mask),
                optax.scale(-lr),
            )

    updates = run(twin, config, start(), GRADIENTS, RATES)[0]
    assert_updates_close(updates, witnessed_by_optax(make, config), 1e-13)


@both
def test_average_against_optax(twin):
    """optax.ema starts from zero; without debiasing, and started from the parameters, it is ours."""
    config = OptimizerConfig(name="sgd", momentum=0.0, weight_decay=0.0, clip_norm=None, ema_decay=0.9)
    optimizer = twin.file("optimizers").Optimizer(config)
    held = native(twin, start())
    state = optimizer.init(held)
    witness = optax.ema(0.9, debias=False)
    theirs = witness.init(native(FLAX, start()))
    begun = theirs._replace(ema=native(FLAX, start()))
    for found, lr in zip(GRADIENTS, RATES, strict=True):
        held, state = optimizer.update(held, native(twin, found), state, lr)
        _, begun = witness.update(native(FLAX, copied(held)), begun)
        _, theirs = witness.update(native(FLAX, copied(held)), theirs)
    assert_close(copied(state["ema"]), copied(begun.ema), 1e-13)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(copied(state["ema"]), copied(theirs.ema), 1e-3)


@both
@pytest.mark.parametrize("name", ["adamw", "sgd, nesterov", "adafactor"])
def test_float32_is_near_the_truth(twin, name):
    config = CONFIGS[name]
    expected, *_ = reference(config, start(), GRADIENTS, RATES)
    updates, *_ = run(twin, config, start(), GRADIENTS, RATES, np.float32)
    assert {value.dtype for update in updates for value in update.values()} == {np.dtype(np.float32)}
    assert_updates_close(updates, expected, 3e-5, atol=1e-6)


# ---- PyTorch's own


@pytest.mark.parametrize("name", CONFIGS)
def test_strides_in_torch(name):
    """Transposed parameters and gradients: torch's fused kernel would take them for what lies in memory."""
    config = CONFIGS[name]
    expected, *_ = reference(reference_decay(config), start(), GRADIENTS, RATES)
    for which in ("parameters", "gradients"):
        optimizer = TORCH.file("optimizers").Optimizer(config)

        def turned(leaves):
            found = {path: to_torch(np.ascontiguousarray(v.T)) for path, v in leaves.items()}
            found = {path: leaf.permute(*range(leaf.ndim - 1, -1, -1)) for path, leaf in found.items()}
            assert not found["head.weight"].is_contiguous()
            return found

        held = turned(start()) if which == "parameters" else native(TORCH, start())
        state = optimizer.init(held)
        updates = []
        for step in range(STEPS):
            before = copied(held)
            given = turned(GRADIENTS[step]) if which == "gradients" else native(TORCH, GRADIENTS[step])
            untouched = copied(given)
            held, state = optimizer.update(held, given, state, RATES[step])
            updates.append({path: to_numpy(v) - before[path] for path, v in held.items()})
            assert_close(copied(given), untouched, rtol=0)
        assert_updates_close(updates, expected, 1e-13)


def test_in_place_in_torch():
    """Parameters of a module are changed where they are, without a graph; those given back are the same tensors."""
    module = torch.nn.Linear(3, 2, dtype=torch.float64)
    held = dict(module.named_parameters())
    optimizer = TORCH.file("optimizers").Optimizer(OptimizerConfig())
    state = optimizer.init(held)
    assert not any(leaf.requires_grad for leaf in state["exp_avg"].values())
    module(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    before = copied(held)
    found, state = optimizer.update(held, {path: leaf.grad for path, leaf in held.items()}, state, 0.1)
    assert all(found[path] is leaf for path, leaf in module.named_parameters())
    assert all(leaf.requires_grad and leaf.is_leaf for leaf in found.values())
    assert not np.array_equal(before["weight"], to_numpy(module.weight))


def test_jitted_flax_is_the_same():
    import jax

    optimizer = FLAX.file("optimizers").Optimizer(CONFIGS["adamw"])
    expected, *_ = reference(CONFIGS["adamw"], start(), GRADIENTS, RATES)
    step = jax.jit(optimizer.update)
    held = native(FLAX, start())
    state = optimizer.init(held)
    updates = []
    for number in range(STEPS):
        before = copied(held)
        held, state = step(held, native(FLAX, GRADIENTS[number]), state, RATES[number])
        updates.append({path: to_numpy(v) - before[path] for path, v in held.items()})
    assert_updates_close(updates, expected, 1e-13)


# ---- refusals, in the same words


def problems_of(twin, call):
    with shape_hook_off(), pytest.raises(InputError) as caught:
        call(twin.file("optimizers"))
    return caught.value.problems


@both
def test_all_wrong_paths_at_once(twin):
    """Missing and unexpected on every side, wrong shapes and dtypes: one error; nothing has changed."""
    optimizer = twin.file("optimizers").Optimizer(OptimizerConfig())
    held = native(twin, {"a.weight": np.ones((2, 3)), "b.bias": np.ones(2)})
    state = optimizer.init(held)
    state["exp_avg"] = {"b.bias": twin.array(np.zeros(3)), "d": twin.array(np.zeros(1))}
    state["extra"] = {}
    del state["exp_avg_sq"]
    g = native(twin, {"b.bias": np.ones(2, np.int32), "c": np.ones(1)})
    problems = problems_of(twin, lambda file: file.Optimizer(OptimizerConfig()).update(held, g, state, -1.0))
    assert problems == (
        "gradients: b.bias: expected a float dtype, got int32",
        "gradients: a.weight: missing, expected shape (2, 3)",
        "gradients: c: unexpected",
        "state: exp_avg: a.weight: missing, expected shape (2, 3)",
        "state: exp_avg: b.bias: expected float64 of shape (2,), got float64 of shape (3,)",
        "state: exp_avg: d: unexpected",
        "state: exp_avg_sq: missing",
        "state: extra: unexpected",
        "lr: expected 0 or a positive number, got -1.0",
    )
    assert_close(copied(held), {"a.weight": np.ones((2, 3)), "b.bias": np.ones(2)}, rtol=0)


@both
def test_wrong_shape_and_wrong_state(twin):
    held = native(twin, {"a.weight": np.ones((2, 3), np.float32)})

    def update(file, gradient, state, lr=0.1):
        return file.Optimizer(OptimizerConfig(name="sgd")).update(held, native(twin, gradient), state, lr)

    state = twin.file("optimizers").Optimizer(OptimizerConfig(name="sgd")).init(held)
    good = {"a.weight": np.ones((2, 3), np.float32)}
    assert problems_of(twin, lambda file: update(file, {"a.weight": np.ones((3, 2))}, state)) == (
        "gradients: a.weight: expected shape (2, 3), got (3, 2)",
    )
    of_adamw = twin.file("optimizers").Optimizer(OptimizerConfig()).init(held)
    assert problems_of(twin, lambda file: update(file, good, of_adamw)) == (
        "state: exp_avg: unexpected",
        "state: exp_avg_sq: unexpected",
        "state: momentum: missing",
    )
    wide = state | {"momentum": native(twin, {"a.weight": np.zeros((2, 3))})}
    assert problems_of(twin, lambda file: update(file, good, wide)) == (
        "state: momentum: a.weight: expected float32 of shape (2, 3), got float64 of shape (2, 3)",
    )
    bare = {"momentum": state["momentum"]}
    assert problems_of(twin, lambda file: update(file, good, bare, float("nan"))) == (
        "state: step: missing",
        "lr: expected 0 or a positive number, got nan",
    )


@both
def test_wrong_leaves(twin):
    whole = {"a": twin.array(np.ones(2, np.int32)), "b": twin.array(np.ones(2, bool))}
    words = ("a: expected a float dtype, got int32", "b: expected a float dtype, got bool")
    assert problems_of(twin, lambda file: file.global_norm(whole)) == tuple(f"gradients: {w}" for w in words)
    assert problems_of(twin, lambda file: file.clip(whole, 0.0)) == (
        *(f"gradients: {w}" for w in words),
        "max_norm: expected a positive number, got 0.0",
    )
    assert problems_of(twin, lambda file: file.Optimizer(OptimizerConfig()).init(whole)) == tuple(
        f"parameters: {w}" for w in words
    )
