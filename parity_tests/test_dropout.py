"""One stream of random numbers: Philox4x32-10, bit for bit in both twins; dropout made of it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flax_impl.dropout import _high_word as high_word
from parity_tests.helpers import (
    FLAX,
    TORCH,
    assert_close,
    both,
    gradients,
    philox,
    random_array,
    reference_dropout,
    reference_fold,
    reference_key,
    reference_words,
    to_numpy,
)
from twinformer.errors import InputError, TwinformerError

# Salmon et al. 2011, the authors' known answers (Random123, kat_vectors)
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = [0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**63 + 12345, 2**64 - 1]


def integers(array):
    return to_numpy(array).astype(np.int64)


# ---- the reference, then the stream


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_reference_gives_the_known_answers(counter, key, answer):
    assert philox(counter, key) == answer


@both
def test_known_answer_of_each_twin(twin):
    """The first known answer, as the words of key 0."""
    assert_close(integers(twin.file("dropout").random_words(twin.key(0), (4,))), np.array(KNOWN[0][2]))


@both
@pytest.mark.parametrize("seed", SEEDS)
def test_random_key(twin, seed):
    key = twin.key(seed)
    assert_close(integers(key), np.array(reference_key(seed)))
    assert str(to_numpy(key).dtype) == ("int64" if twin is TORCH else "uint32")


@both
@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range(twin, seed):
    with pytest.raises(InputError, match="seed"):
        twin.key(seed)


@both
@pytest.mark.parametrize("seed", SEEDS)
def test_random_words(twin, seed):
    """17 words: four whole blocks and one word of a fifth; keys up to the last bit."""
    words = twin.file("dropout").random_words(twin.key(seed), (17,))
    assert_close(integers(words), reference_words(reference_key(seed), (17,)))


@both
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 3), (5, 1, 3), (2, 3, 2, 4), (1030,)])
def test_random_words_run_through_the_shape_row_by_row(twin, shape):
    words = twin.file("dropout").random_words(twin.key(99), shape)
    assert_close(integers(words), reference_words(reference_key(99), shape))


@both
@pytest.mark.parametrize("number", [0, 1, 11, 2**31 - 1, 2**31, 2**32 - 1])
def test_fold(twin, number):
    for seed in SEEDS:
        folded = twin.file("dropout").fold(twin.key(seed), number)
        assert_close(integers(folded), np.array(reference_fold(reference_key(seed), number)))


@both
def test_fold_of_a_fold(twin):
    """As a model does it: stack, block 3, attention."""
    fold = twin.file("dropout").fold
    folded = fold(fold(fold(twin.key(5), 1), 3), 0)
    expected = reference_fold(reference_fold(reference_fold(reference_key(5), 1), 3), 0)
    assert_close(integers(folded), np.array(expected))
    words = twin.file("dropout").random_words(folded, (2, 3))
    assert_close(integers(words), reference_words(expected, (2, 3)))


def test_fold_of_a_traced_number():
    folded = jax.jit(FLAX.file("dropout").fold)(FLAX.key(5), 3)
    assert_close(integers(folded), np.array(reference_fold(reference_key(5), 3)))


def test_words_under_jit():
    dropout = FLAX.file("dropout")
    words = jax.jit(lambda key: dropout.random_words(key, (3, 5)))(FLAX.key(2**64 - 1))
    assert_close(integers(words), reference_words(reference_key(2**64 - 1), (3, 5)))


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31 - 1))
def test_twins_agree_on_any_seed_and_number(seed, number):
    words = []
    for twin in (TORCH, FLAX):
        dropout = twin.file("dropout")
        words.append(integers(dropout.random_words(dropout.fold(twin.key(seed), number), (5,))))
    assert_close(words[0], words[1])
    assert_close(words[0], reference_words(reference_fold(reference_key(seed), number), (5,)))


def test_streams_differ():
    """Keys of one seed folded with different numbers, and the key itself, give unrelated words."""
    keys = [reference_key(3)] + [reference_fold(reference_key(3), number) for number in range(6)]
    dropout = TORCH.file("dropout")
    words = [integers(dropout.random_words(TORCH.array(np.array(key)), (2000,))) for key in keys]
    assert len(np.unique(np.stack(words))) > 0.999 * 7 * 2000
    found = np.corrcoef(np.stack(words).astype(np.float64))
    assert np.abs(found[~np.eye(7, dtype=bool)]).max() < 5 / np.sqrt(2000)


# ---- dropout


@both
@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_dropout(twin, rate, dtype):
    X = random_array(1, 3, 4, 5).astype(dtype)
    dropped = twin.file("dropout").Dropout(rate)(twin.array(X), rng=twin.key(11))
    assert_close(dropped, reference_dropout(X, rate, reference_key(11)), rtol=2e-16 if dtype is np.float64 else 1e-7)
    assert 0 < (to_numpy(dropped) == 0).sum() < X.size


@both
def test_threshold_is_exact(twin):
    """An element whose word is the threshold itself is kept; one above it the threshold drops it."""
    words = reference_words(reference_key(11), (8,))
    word = int(np.sort(words)[4])
    for threshold, kept in ((word, 4), (word + 1, 3)):
        rate = threshold / 2**32
        assert int(np.floor(rate * 2**32)) == threshold
        dropped = to_numpy(twin.file("dropout").Dropout(rate)(twin.array(np.ones(8)), rng=twin.key(11)))
        assert (dropped != 0).sum() == kept


@both
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_dropout_in_16_bits(twin, dtype):
    """Rate 1/2, so that the factor 2 is exact and the result is the same in every order of rounding."""
    X = random_array(1, 6, 7).astype(dtype)
    dropped = twin.file("dropout").Dropout(0.5)(twin.array(X), rng=twin.key(11))
    assert_close(dropped, reference_dropout(X, 0.5, reference_key(11)), rtol=0)


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_twins_drop_alike_in_bfloat16(rate):
    """A factor that bfloat16 does not hold: both round in the same places."""
    X = random_array(1, 6, 7).astype(ml_dtypes.bfloat16)
    dropped = [twin.file("dropout").Dropout(rate)(twin.array(X), rng=twin.key(11)) for twin in (TORCH, FLAX)]
    assert_close(dropped[0], dropped[1], rtol=0)


@both
def test_rate_zero_or_no_key_leaves_X_unchanged(twin):
    X = random_array(2, 3, 5)
    X[0, 0] = np.nan
    Dropout = twin.file("dropout").Dropout
    for layer, key in ((Dropout(0.5), None), (Dropout(0.0), twin.key(3)), (Dropout(0.0), None)):
        assert to_numpy(layer(twin.array(X), rng=key)).tobytes() == X.tobytes()
    assert to_numpy(Dropout(0.5)(twin.array(X))).tobytes() == X.tobytes()


def test_the_mode_of_the_module_plays_no_part():
    """Nor does PyTorch's gradient mode: the key alone decides."""
    X = random_array(2, 30)
    layer = TORCH.file("dropout").Dropout(0.5)
    for mode in (layer.train(), layer.eval()):
        for gradient_mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with gradient_mode():
                assert_close(mode(TORCH.array(X)), X, rtol=0)
                dropped = mode(TORCH.array(X), rng=TORCH.key(1))
            assert_close(dropped, reference_dropout(X, 0.5, reference_key(1)), rtol=0)


@both
def test_reproducible_and_without_memory(twin):
    """The same key gives the same elements at every call; other keys others; no global generator moves it."""
    X = np.ones((50, 40))
    layer = twin.file("dropout").Dropout(0.5)
    first = to_numpy(layer(twin.array(X), rng=twin.key(1)))
    if twin is TORCH:
        torch.manual_seed(0)
    assert_close(layer(twin.array(X), rng=twin.key(1)), first, rtol=0)
    assert_close(twin.file("dropout").Dropout(0.5)(twin.array(X), rng=twin.key(1)), first, rtol=0)
    other = to_numpy(layer(twin.array(X), rng=twin.key(2)))
    assert 0.4 < (first != other).mean() < 0.6


@pytest.mark.parametrize("rate", [1.0, 1.5, -0.1, float("nan")])
def test_rate_out_of_range(rate):
    """The same error in both, in the same words."""
    refusals = []
    for twin in (TORCH, FLAX):
        with pytest.raises(TwinformerError, match=r"rate: expected a rate in \[0, 1\)") as refusal:
            twin.file("dropout").Dropout(rate)
        refusals.append((type(refusal.value), str(refusal.value)))
    assert refusals[0] == refusals[1]


@both
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.75])
def test_rate_and_mean(twin, rate):
    """The share that is dropped, and the mean that is kept, within five standard errors."""
    count = 40_000
    dropped = to_numpy(twin.file("dropout").Dropout(rate)(twin.array(np.ones((4, 100, 100))), rng=twin.key(12)))
    spread = np.sqrt(rate * (1 - rate) / count)
    assert abs((dropped == 0).mean() - rate) < 5 * spread
    assert abs(dropped.mean() - 1) < 5 * spread / (1 - rate)


@both
def test_one_word_per_element(twin):
    """No element shares its fate with a whole row, head or batch entry: every slice along every axis differs."""
    dropped = to_numpy(twin.file("dropout").Dropout(0.5)(twin.array(np.ones((3, 4, 30, 31))), rng=twin.key(8)))
    for axis in range(4):
        slices = [piece.tobytes() for piece in np.moveaxis(dropped, axis, 0)]
        assert len(set(slices)) == dropped.shape[axis]


@both
def test_nan(twin):
    """A NaN that is dropped is 0, one that is kept stays; the gradient of what is dropped is 0, never NaN."""
    X = np.full(40, np.nan)
    expected = np.where(reference_words(reference_key(4), (40,)) >= 2**31, np.nan, 0.0)
    layer = twin.file("dropout").Dropout(0.5)
    output, grads = gradients(twin, lambda X: layer(X, rng=twin.key(4)), {"X": X}, cotangent=np.arange(1.0, 41.0))
    assert_close(output, expected)
    assert_close(grads["X"], np.where(np.isnan(expected), 2 * np.arange(1.0, 41.0), 0.0))


@both
@pytest.mark.parametrize("rate", [0.25, 0.9])
def test_gradient_is_scaled_by_one_over_one_minus_rate(twin, rate):
    X, cotangent = random_array(3, 6, 8), random_array(4, 6, 8)
    layer = twin.file("dropout").Dropout(rate)
    _, grads = gradients(twin, lambda X: layer(X, rng=twin.key(6)), {"X": X}, cotangent=cotangent)
    assert_close(grads["X"], reference_dropout(cotangent, rate, reference_key(6)), rtol=1e-15)


@both
def test_dropout_can_fail(twin):
    """The comparison tells apart what real ports got wrong: the scale left out or by 1/p, a mask shared by rows."""
    X = random_array(1, 4, 6)
    right = twin.file("dropout").Dropout(0.25)(twin.array(X), rng=twin.key(11))
    kept = reference_words(reference_key(11), X.shape) >= 2**30
    shared = reference_words(reference_key(11), (6,)) >= 2**30
    for wrong in (X * kept, X * kept / 0.25, X * ~kept / 0.75, X * shared / 0.75):
        with pytest.raises(AssertionError):
            assert_close(right, wrong)


def test_the_high_word_from_halves_is_the_high_word():
    """What takes the place of one instruction where there are several devices."""
    edges = [0, 1, 2**16 - 1, 2**16, 2**16 + 1, 2**31, 2**32 - 2**16, 2**32 - 1]
    drawn = np.random.default_rng(0).integers(0, 2**32, 10_000)
    words = np.concatenate([np.array(edges), drawn]).astype(np.uint32)
    for factor in (0xD2511F53, 0xCD9E8D57):
        wanted = (words.astype(np.uint64) * factor >> 32).astype(np.uint32)
        assert np.array_equal(np.asarray(high_word(factor, jnp.asarray(words))), wanted)
