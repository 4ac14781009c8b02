"""Cached decoding where only some blocks have the window: each block sees in steps what it sees in one call.

Cuts, padding and caches of other models are rung 7's (``test_rung_decoding.py``).
"""

import contextlib

import numpy as np
import pytest
import torch

from parity_tests.helpers import assert_close, both, scatter_parameters, set_parameters, to_numpy
from twinformer import InputError, ModelConfig
from twinformer.decoding import BeamConfig

B, T, V = 3, 9, 13
WINDOW = 3
TOKENS = np.random.default_rng(6).integers(0, V, (B, T))
#: none, left, and right with a hole
REAL = np.array([[1] * 9, [0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 1, 0, 0]], bool)


def config_of(**choices):
    sizes = {"vocab_size": V, "context_length": 16, "model_dim": 8, "key_dim": 4, "hidden_dim": 7, "num_heads": 2}
    wide = {"param_dtype": "float64", "compute_dtype": "float64"}
    rotary = {"positions": "rotary", "window_rotary_base": 37.0}
    mixed = {"num_layers": 3, "window": WINDOW, "window_layers": (0, 2), "norm_placement": "sandwich"}
    return ModelConfig(architecture="decoder", **(sizes | wide | rotary | mixed | choices))


def model_of(twin, config):
    model = twin.file("models").build(config, seed=None)
    return model, scatter_parameters(model, 7)


def without_gradients(twin):
    return torch.no_grad() if twin.name == "torch" else contextlib.nullcontext()


def in_steps(twin, model, cut, real):
    cache = twin.file("cache").init_cache(model, B, T)
    found, start = [], 0
    for size in cut:
        here = slice(start, start + size)
        tokens, mask = twin.array(TOKENS[:, here]), twin.array(real[:, here])
        logits, cache = model.step(tokens, cache, padding_mask=mask)
        found.append(to_numpy(logits))
        start += size
    return np.concatenate(found, 1)


@both
@pytest.mark.parametrize("layers", [(0,), (1,), (0, 2)], ids=str)
def test_steps_are_one_call(twin, layers):
    """One prefill, chunks longer and shorter than the window, and token by token; padding is seen by no block."""
    model, values = model_of(twin, config_of(window_layers=layers))
    with without_gradients(twin):
        full = to_numpy(model(twin.array(TOKENS), padding_mask=twin.array(REAL)))
        for cut in ([T], [5, 2, 2], [1] * T):
            assert_close(in_steps(twin, model, cut, REAL)[REAL], full[REAL])
        # a window in all blocks, or in none, is another model
        for other in ({"window_layers": None}, {"window": None, "window_layers": None, "window_rotary_base": None}):
            changed = twin.file("models").build(model.config.replace(**other), seed=None)
            set_parameters(changed, values)
            assert np.abs(to_numpy(changed(twin.array(TOKENS)))[0] - full[0]).max() > 1e-3


@both
def test_only_a_window_in_every_block_makes_room(twin):
    """As many slots as the window has: a ring where no block looks further back, else soon full."""
    tokens = twin.array(TOKENS[:, :1])
    init_cache = twin.file("cache").init_cache
    with without_gradients(twin):
        for layers in (None, (0, 2)):
            model, _ = model_of(twin, config_of(window_layers=layers))
            cache = init_cache(model, B, WINDOW)
            for _ in range(WINDOW):
                _, cache = model.step(tokens, cache)
            if layers is None:
                logits, _ = model.step(tokens, cache)
                assert np.isfinite(to_numpy(logits)).all()
            else:
                with pytest.raises(
                    InputError, match=f"cache: expected room for {WINDOW + 1} positions .*, got {WINDOW} slots"
                ):
                    model.step(tokens, cache)


@both
def test_what_is_written_looks_as_far_back(twin):
    """Greedy texts, and beams of one, longer than the window: the arg max of full calls, with their log-probability."""
    count = 6
    model, _ = model_of(twin, config_of())
    prompts = TOKENS[:, :4]
    tokens, logprobs = prompts, []
    with without_gradients(twin):
        for _ in range(count):
            logits = to_numpy(model(twin.array(tokens)))[:, -1]
            tokens = np.concatenate([tokens, logits.argmax(-1)[:, None]], 1)
            top = logits.max(-1, keepdims=True)
            logprobs.append(-np.log(np.exp(logits - top).sum(-1)))
        written = twin.file("generation").Generator(model, bucket=4)(prompts, max_new_tokens=count)
        beams = twin.file("beam").beam_search(model, prompts, max_new_tokens=count, beam=BeamConfig(width=1), bucket=4)
    assert_close(written.tokens, tokens[:, 4:])
    assert_close(written.logprobs, np.stack(logprobs, 1))
    assert_close(beams.tokens[:, 0], tokens[:, 4:])
    assert_close(beams.logprobs[:, 0], np.stack(logprobs, 1).sum(1))
