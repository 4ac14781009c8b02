"""The loss: by hand, from the equations in NumPy, against torch's and optax's own, and what must play no part."""

import warnings

import ml_dtypes
import numpy as np
import optax
import pytest
import torch

from parity_tests.helpers import (
    FLAX,
    TORCH,
    assert_close,
    assert_twins_agree,
    both,
    gradients,
    random_array,
    shape_hook_off,
    to_numpy,
)
from parity_tests.modes import compiler_warnings
from twinformer.errors import InputError

B, T, V = 3, 5, 7
REAL = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0]], bool)
RATES = [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.3, 1e-2), (1.0, 0.0)]


def inputs(scale=3.0):
    return random_array(1, B, T, V, scale=scale), np.random.default_rng(2).integers(0, V, (B, T))


def reference(logits, targets, real, smoothing=0.0, z_loss=0.0):
    """Total and its gradient, place by place, from the contract's equation."""
    total, gradient = 0.0, np.zeros(logits.shape)
    for place in np.argwhere(real):
        b, t = place
        x = logits[b, t].astype(np.float64)
        log_z = x.max() + np.log(np.exp(x - x.max()).sum())
        p = np.exp(x - log_z)
        wanted = np.full(len(x), smoothing / len(x))
        wanted[targets[b, t]] += 1 - smoothing
        total += -(wanted * (x - log_z)).sum() + z_loss * log_z**2
        gradient[b, t] = p - wanted + 2 * z_loss * log_z * p
    return np.float64(total), gradient


def total_of(twin, logits, targets, real=None, **rates):
    real = None if real is None else twin.array(real)
    total, count = twin.file("losses").cross_entropy(twin.array(logits), twin.array(targets), real=real, **rates)
    return total, int(count)


def outcome(twin, logits, targets, real, **rates):
    """Total and its gradient."""
    found, grads = gradients(
        twin,
        lambda logits: twin.file("losses").cross_entropy(
            logits, twin.array(targets), real=None if real is None else twin.array(real), **rates
        )[0],
        {"logits": logits},
        cotangent=np.float64(1.0),
    )
    return found, grads["logits"]


@both
def test_by_hand(twin):
    """ln p = (0, ln 3) - ln 4; the second place costs ln 4 for its first token, the third does not count."""
    logits = np.log(np.array([[[1.0, 3.0], [1.0, 3.0], [5.0, 1.0]]]))
    targets, real = np.array([[1, 0, 0]]), np.array([[True, True, False]])
    total, count = total_of(twin, logits, targets, real)
    assert count == 2
    assert_close(total, np.log(4 / 3) + np.log(4))
    # smoothing 1/2: half of each place's own, half of the mean over both tokens
    both_tokens = (np.log(4) + np.log(4 / 3)) / 2
    total, _ = total_of(twin, logits, targets, real, smoothing=0.5)
    assert_close(total, 0.5 * (np.log(4 / 3) + np.log(4)) + 0.5 * 2 * both_tokens)
    # Σ exp = 4 at both places
    total, _ = total_of(twin, logits, targets, real, z_loss=0.25)
    assert_close(total, np.log(4 / 3) + np.log(4) + 0.25 * 2 * np.log(4) ** 2)


@both
@pytest.mark.parametrize(("smoothing", "z_loss"), RATES)
@pytest.mark.parametrize("real", [None, REAL], ids=["all", "some"])
def test_by_the_equations(twin, smoothing, z_loss, real):
    logits, targets = inputs()
    found, gradient = outcome(twin, logits, targets, real, smoothing=smoothing, z_loss=z_loss)
    total, expected = reference(logits, targets, np.ones((B, T)) if real is None else real, smoothing, z_loss)
    assert_close(found, total)
    assert_close(gradient, expected)
    _, count = total_of(twin, logits, targets, real)
    assert count == (15 if real is None else 9)


@pytest.mark.parametrize("fault", ["V - 1", "smoothing not masked", "mean over padding", "z without square"])
def test_the_equations_can_fail(fault):
    """What real ports did wrong is far outside the bound."""
    logits, targets = inputs()
    right, _ = reference(logits, targets, REAL, 0.3, 1e-2)
    hard, _ = reference(logits, targets, REAL, 0.0, 0.0)
    if fault == "V - 1":  # the smoothing shared by the others: ε/(V - 1), none for the target
        uniform, _ = reference(logits, targets, REAL, 1.0)
        z_part = right - (0.7 * hard + 0.3 * uniform)
        wrong = 0.7 * hard + 0.3 * (V * uniform - hard) / (V - 1) + z_part
    elif fault == "smoothing not masked":
        wrong = right + 0.3 * (reference(logits, targets, ~REAL, 1.0)[0])
    elif fault == "mean over padding":
        right, wrong = right / REAL.sum(), right / REAL.size
    else:
        wrong = right + sum(1e-2 * (z - z**2) for z in np.log(np.exp(logits[REAL]).sum(-1)))
    with pytest.raises(AssertionError, match="off by"):
        assert_close(np.float64(wrong), np.float64(right))


@both
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_against_torch(twin, smoothing):
    """torch.nn.functional.cross_entropy, with its ignore_index for what does not count."""
    logits, targets = inputs()
    leaf = torch.from_numpy(logits).requires_grad_()
    ignored = torch.from_numpy(np.where(REAL, targets, -100))
    witness = torch.nn.functional.cross_entropy(
        leaf.flatten(0, 1), ignored.flatten(), label_smoothing=smoothing, ignore_index=-100, reduction="none"
    ).sum()
    witness.backward()
    found, gradient = outcome(twin, logits, np.where(REAL, targets, -100), REAL, smoothing=smoothing)
    assert_close(found, witness)
    assert_close(gradient, leaf.grad)
    mean = torch.nn.functional.cross_entropy(leaf.flatten(0, 1), ignored.flatten(), ignore_index=-100)
    total, count = twin.file("losses").cross_entropy(
        twin.array(logits), twin.array(targets), real=twin.array(REAL), smoothing=0.0
    )
    assert_close(twin.file("losses").mean_loss(total, count), mean)


@both
def test_against_optax(twin):
    logits, targets = inputs()
    total, _ = total_of(twin, logits, targets)
    assert_close(total, optax.softmax_cross_entropy_with_integer_labels(logits, targets).sum())


@pytest.mark.parametrize(("smoothing", "z_loss"), RATES)
def test_twins_agree(smoothing, z_loss):
    logits, targets = inputs()

    def call(twin, logits):
        return twin.file("losses").cross_entropy(
            logits, twin.array(targets), real=twin.array(REAL), smoothing=smoothing, z_loss=z_loss
        )[0]

    assert_twins_agree(call, {"logits": logits})


def test_twins_agree_can_fail():
    logits, targets = inputs()

    def call(twin, logits):
        return twin.file("losses").cross_entropy(
            logits, twin.array(targets), real=twin.array(REAL), smoothing=0.1 if twin is TORCH else 0.1 * V / (V - 1)
        )[0]

    with pytest.raises(AssertionError, match="output: element"):
        assert_twins_agree(call, {"logits": logits})


@both
@pytest.mark.parametrize("content", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.3, 1e-2)])
def test_what_does_not_count_plays_no_part(twin, content, smoothing, z_loss):
    """Any id and any logits there: the same total to the last bit, and gradient exactly zero."""
    logits, targets = inputs()
    total, gradient = outcome(twin, logits, targets, REAL, smoothing=smoothing, z_loss=z_loss)
    spoilt, ids = logits.copy(), np.where(REAL, targets, -100)
    spoilt[~REAL] = content
    ids[2, 0] = 10**6
    found, found_gradient = outcome(twin, spoilt, ids, REAL, smoothing=smoothing, z_loss=z_loss)
    assert_close(found, total, rtol=0)
    assert_close(found_gradient, gradient, rtol=0)
    assert (found_gradient[~REAL] == 0).all()
    assert (found_gradient[REAL] != 0).any(-1).all()


def test_a_trap_is_seen():
    """Hiding NaN after the softmax leaves it in the gradient (NaN · 0): what the test above must be able to see."""
    logits, targets = inputs()
    logits[~REAL] = np.nan
    leaf = torch.from_numpy(logits).requires_grad_()
    losses = -leaf.log_softmax(-1).gather(-1, torch.from_numpy(targets)[..., None])[..., 0]
    torch.where(torch.from_numpy(REAL), losses, 0.0).sum().backward()
    with pytest.raises(AssertionError, match="NaN in one only"):
        assert_close(leaf.grad, reference(np.nan_to_num(logits), targets, REAL)[1])


@both
def test_what_counts_is_not_hidden(twin):
    logits, targets = inputs()
    logits[0, 1, 2] = np.nan
    found, gradient = outcome(twin, logits, targets, REAL)
    assert np.isnan(found)
    assert np.isnan(gradient[0, 1]).all()
    assert np.isfinite(gradient[0, 2]).all()


@both
def test_nothing_counts(twin):
    logits, targets = inputs()
    none = np.zeros((B, T), bool)
    for content in (logits, np.full(logits.shape, np.nan)):
        found, gradient = outcome(twin, content, targets, none, smoothing=0.1, z_loss=0.1)
        assert_close(found, np.float64(0.0))
        assert_close(gradient, np.zeros(logits.shape))
    losses = twin.file("losses")
    total, count = losses.cross_entropy(twin.array(logits), twin.array(targets), real=twin.array(none))
    assert int(count) == 0
    assert_close(losses.mean_loss(total, count), np.float64(0.0))
    for T_ in (0,):  # no place at all in the shapes
        total, count = losses.cross_entropy(twin.array(logits[:, :T_]), twin.array(targets[:, :T_]))
        assert (float(total), int(count)) == (0.0, 0)


@both
def test_hidden_tokens_of_the_vocabulary(twin):
    """A logit of -inf has probability 0: it costs nothing while smoothing is 0, and infinitely much with it."""
    logits, targets = inputs()
    logits[..., 3] = -np.inf
    targets[targets == 3] = 4
    found, gradient = outcome(twin, logits, targets, REAL)
    total, expected = reference(np.where(np.isinf(logits), -1e5, logits), targets, REAL)
    assert_close(found, total)
    assert_close(gradient, expected)
    assert np.isposinf(outcome(twin, logits, targets, REAL, smoothing=0.1)[0])


@both
def test_micro_batches_are_summed_then_divided_once(twin):
    """9 places in 3 batches of 5, 3 and 1: the mean of their means is something else."""
    logits, targets = inputs()
    losses = twin.file("losses")
    parts = [
        losses.cross_entropy(
            twin.array(logits[b : b + 1]), twin.array(targets[b : b + 1]), real=twin.array(REAL[b : b + 1])
        )
        for b in range(B)
    ]
    mean = losses.mean_loss(sum(total for total, _ in parts), sum(count for _, count in parts))
    right = reference(logits, targets, REAL)[0] / 9
    assert_close(mean, right)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(np.mean([to_numpy(losses.mean_loss(*part)) for part in parts]), right)


@both
def test_mean_loss(twin):
    mean_loss = twin.file("losses").mean_loss
    assert_close(mean_loss(twin.array(np.float64(6.0)), 4), np.float64(1.5), rtol=0)
    assert_close(mean_loss(twin.array(np.float32(6.0)), twin.array(np.int32(4))), np.float32(1.5), rtol=0)
    assert_close(mean_loss(twin.array(np.float64(0.0)), 0), np.float64(0.0), rtol=0)
    for count, expected in ((4, 0.25), (0, 0.0)):
        _, grads = gradients(
            twin, lambda total, n=count: mean_loss(total, n), {"total": np.float64(3.0)}, cotangent=np.float64(1.0)
        )
        assert_close(grads["total"], np.float64(expected), rtol=0)


@both
@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16, np.float16])
def test_computed_wide(twin, dtype):
    """The total is wide, and as near to the truth as the wide dtype allows; the gradient has the logits' dtype."""
    logits, targets = inputs()
    logits = logits.astype(dtype)
    wide = np.float64 if dtype == np.float64 else np.float32
    total, _ = total_of(twin, logits, targets, REAL, smoothing=0.1)
    right, _ = reference(logits, targets, REAL, 0.1)
    assert_close(total, wide(right), rtol=1e-12 if wide == np.float64 else 1e-6)
    if dtype == ml_dtypes.bfloat16:
        native = twin.array(logits)
        narrow = to_numpy(native).astype(np.float64)
        log_p = narrow - np.log(np.exp(narrow).sum(-1, keepdims=True)).astype(dtype).astype(np.float64)
        shortcut = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0][REAL].sum()
        with pytest.raises(AssertionError, match="off by"):
            assert_close(np.float32(shortcut), np.float32(reference(logits, targets, REAL)[0]), rtol=1e-6)


@both
def test_large_and_far_logits(twin):
    """Nothing overflows, and an offset shared by all of a row costs no digits of the loss."""
    logits, targets = inputs(scale=1.0)
    right, expected = reference(logits, targets, REAL)
    for offset in (1e4, -1e4):
        found, gradient = outcome(twin, logits + offset, targets, REAL)
        assert_close(found, right, rtol=1e-11)
        assert_close(gradient, expected, rtol=1e-11)
    found, _ = outcome(twin, logits * 1e5, targets, REAL)
    assert_close(found, reference(logits * 1e5, targets, REAL)[0])


@both
@pytest.mark.parametrize("kind", [np.int32, np.int8, np.uint8, np.int64])
def test_targets_of_every_whole_kind(twin, kind):
    logits, targets = inputs()
    total, _ = total_of(twin, logits, targets.astype(kind), REAL)
    assert_close(total, reference(logits, targets, REAL)[0])


@both
def test_next_tokens(twin):
    tokens = np.array([[4, 5, 6, 0], [0, 7, 8, 9]])
    real = np.array([[1, 1, 1, 0], [0, 1, 1, 1]], bool)
    found = twin.file("losses").next_tokens(twin.array(tokens), twin.array(real))
    expected = [[4, 5, 6], [0, 7, 8]], [[5, 6, 0], [7, 8, 9]], [[True, True, False], [False, True, True]]
    for have, want in zip(found, expected, strict=True):
        assert (to_numpy(have) == np.array(want)).all()
        assert to_numpy(have).shape == (2, 3)
    assert to_numpy(found[2]).dtype == np.bool_
    *_, all_real = twin.file("losses").next_tokens(twin.array(tokens))
    assert_close(all_real, np.ones((2, 3), bool))


# ---- refusals, in the same words


def refusal(twin, function, *arguments, **options):
    arguments = [twin.array(value) for value in arguments]
    options = {name: twin.array(v) if isinstance(v, np.ndarray) else v for name, v in options.items()}
    with pytest.raises(InputError) as caught:
        getattr(twin.file("losses"), function)(*arguments, **options)
    return caught.value.problems


LOGITS, TARGETS = inputs()
WRONG = {
    "rank": (LOGITS[0], TARGETS, {}, ("logits: expected rank 3 [B, T, V], got shape (5, 7)",)),
    "dtypes": (
        LOGITS.astype(np.int32),
        TARGETS.astype(np.float32),
        {},
        (
            "logits: expected a float dtype, got int32",
            "targets: expected whole numbers, got dtype float32",
        ),
    ),
    "shapes": (
        LOGITS,
        TARGETS[:, :4],
        {"real": REAL[:2]},
        (
            "targets: expected shape [B, T] = (3, 5) as in logits, got (3, 4)",
            "real: expected shape [B, T] = (3, 5), got (2, 5)",
        ),
    ),
    "real": (
        LOGITS,
        TARGETS,
        {"real": REAL.astype(np.int32)},
        ("real: expected bool (True = real token), got int32",),
    ),
    "high": (LOGITS, TARGETS + 1, {}, ("targets: expected ids from 0 to 6, got values from 1 to 7",)),
    "ignored": (
        LOGITS,
        np.where(REAL, TARGETS, -100),
        {},
        (f"targets: expected ids from 0 to 6, got values from -100 to {TARGETS[REAL].max()}",),
    ),
    "rates": (
        LOGITS,
        TARGETS,
        {"smoothing": 1.5, "z_loss": float("nan")},
        (
            "smoothing: expected a number in [0, 1], got 1.5",
            "z_loss: expected 0 or a positive number, got nan",
        ),
    ),
    "all at once": (
        LOGITS,
        TARGETS - 1,
        {"smoothing": True, "real": REAL.astype(np.float32)},
        (
            "real: expected bool (True = real token), got float32",
            "smoothing: expected a number in [0, 1], got True",
        ),
    ),
}


@pytest.mark.usefixtures("without_shape_hook")
@both
@pytest.mark.parametrize("case", WRONG)
def test_refusals(twin, case):
    logits, targets, options, problems = WRONG[case]
    assert refusal(twin, "cross_entropy", logits, targets, **options) == problems


@pytest.mark.usefixtures("without_shape_hook")
@both
def test_refusals_of_next_tokens(twin):
    assert refusal(twin, "next_tokens", np.ones(3, np.float32)) == (
        "tokens: expected rank 2 [B, T], got shape (3,)",
        "tokens: expected whole numbers, got dtype float32",
    )
    assert refusal(twin, "next_tokens", TARGETS, real=REAL[:, 1:]) == (
        "real: expected shape [B, T] = (3, 5), got (3, 4)",
    )


def test_compiled_torch_gives_the_same_and_names_an_id_out_of_range_by_nan():
    """fullgraph, with gradient; ids cannot be seen then, and a wrong one where it counts is NaN in its row."""
    losses = TORCH.file("losses")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(logits, targets, real):
        return losses.cross_entropy(logits, targets, real=real, smoothing=0.1, z_loss=0.01)

    logits, targets = inputs()
    outcomes = []
    for ids in (np.where(REAL, targets, -100), np.where(REAL & (np.arange(T) == 1), V, targets)):
        leaf = torch.from_numpy(logits.copy()).requires_grad_()
        with shape_hook_off(), compiler_warnings(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)  # its own doing too
            total, count = run(leaf, torch.from_numpy(ids), torch.from_numpy(REAL))
            total.backward()
        outcomes.append((total, int(count), leaf.grad))
    total, expected = reference(logits, targets, REAL, 0.1, 0.01)
    assert_close(outcomes[0][0], total)
    assert outcomes[0][1] == 9
    assert_close(outcomes[0][2], expected)
    assert torch.isnan(outcomes[1][0])
    broken = REAL & (np.arange(T) == 1)
    assert np.isnan(to_numpy(outcomes[1][2])[broken]).all()
    assert_close(to_numpy(outcomes[1][2])[~broken], expected[~broken])


def test_jitted_flax_names_an_id_out_of_range_by_nan():
    import jax

    logits, targets = inputs()
    run = jax.jit(lambda *given: FLAX.file("losses").cross_entropy(*given[:2], real=given[2]))
    total, count = run(logits, np.where(REAL, targets, -100), REAL)
    assert_close(total, reference(logits, targets, REAL)[0])
    assert int(count) == 9
    total, _ = run(logits, np.where(REAL, V, targets), REAL)
    assert np.isnan(total)


def test_only_one_wide_copy_in_torch():
    """Largest memory of forward and of backward above what is given and given back, in copies of the wide logits."""
    logits = torch.randn(1, 64, 4096).to(torch.bfloat16).requires_grad_()
    targets = torch.randint(0, 4096, (1, 64))
    wide = logits.numel() * 4
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        total, _ = TORCH.file("losses").cross_entropy(logits, targets, smoothing=0.1, z_loss=1e-4)
        total.backward()
    held = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert most > 0
    assert most < 2.6 * wide  # logits of a float32 copy beside x, or the gradient in bfloat16 beside p
