"""Trained models of other people: published activations and published behaviour, in both twins.

gpt-nano-sort: every activation that was published. stories260K: a third implementation, in NumPy, written from the papers.
"""

import itertools
import math

import numpy as np
import pytest

from parity_tests.helpers import FLAX, TORCH, assert_close, both
from parity_tests.readers import (
    build,
    needs_shared,
    read_nano_sort,
    read_nano_sort_partials,
    read_stories,
    run,
    walk,
)

nano_sort = needs_shared("gpt-nano-sort-model.json", "gpt-nano-sort-partials.json")
stories = needs_shared("stories260K.bin", "tok512.bin")


# ---- gpt-nano-sort


#: how far float32 activations may be from the published ones, which are float32 too: a few units in the last place
BLOCKS, LOGITS = 1.2e-6, 1.9e-6


def assert_within(found, published, bound, name):
    """The largest difference, NaN counted as infinite."""
    found, published = found.astype(np.float64), published.astype(np.float64)
    assert found.shape == published.shape, (name, found.shape, published.shape)
    assert published.size > 0, name
    worst = np.nan_to_num(np.abs(found - published), nan=np.inf).max()
    assert worst <= bound, f"{name}: off by {worst:.3e}, allowed {bound:.1e}"


@nano_sort
@both
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nano_sort_gives_the_published_activations(twin, dtype):
    config, tensors = read_nano_sort()
    partials = read_nano_sort_partials()
    model = build(twin, config, tensors, dtype)
    states = walk(twin, model, partials["idx"])
    assert len(states) == 4
    for name, state in zip(["x", "block0", "block1", "block2"], states, strict=True):
        assert str(state.dtype) == dtype
        assert_within(state, partials[name], BLOCKS, name)
    assert_within(run(twin, model.stack.final_norm, states[-1]), partials["ln_f"], 3 * BLOCKS, "ln_f")
    logits = run(twin, model, partials["idx"])
    assert_within(logits, partials["lm_head"], LOGITS, "lm_head")
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    assert_within(e / e.sum(axis=-1, keepdims=True), partials["probs"], 1e-7, "probs")


@nano_sort
@both
def test_nano_sort_gives_the_published_activations_within_its_first_block(twin):
    """Each step on the published input of that step, in float64: what is left is the rounding of the published values."""
    config, tensors = read_nano_sort()
    published = read_nano_sort_partials()
    wide = {name: values.astype(np.float64) for name, values in published.items() if name != "idx"}
    model = build(twin, config, tensors)
    block = model.stack.blocks[0]
    attention, feedforward, masks = block.attention, block.feedforward, twin.file("masks")
    B, T = published["idx"].shape
    A, K = config.num_heads, config.key_dim

    tokens = run(twin, model.embedding.tokens, published["idx"])
    positions = run(twin, model.embedding.positions, np.arange(T)[None])
    assert_close(tokens, wide["tok_emb"], 0.0, name="tok_emb")
    assert_close(positions, wide["pos_emb"], 0.0, name="pos_emb")
    found = {
        "x": tokens + positions,
        "ln1": run(twin, block.attention_norm, wide["x"]),
        "yProj": run(twin, attention.output, wide["y"]),
        "attnResid": wide["x"] + run(twin, attention, wide["ln1"]),
        "ln2": run(twin, block.feedforward_norm, wide["attnResid"]),
        "fc": run(twin, feedforward.up, wide["ln2"]),
        "gelu": run(twin, twin.file("feedforward").activate, wide["fc"], "gelu_tanh"),
        "mlp": run(twin, feedforward.down, wide["gelu"]),
        "mlpResid": wide["attnResid"] + run(twin, feedforward, wide["ln2"]),
        "block0": run(twin, block, wide["x"]),
    }
    qkv = []
    for name, part in (("q", attention.query), ("k", attention.key), ("v", attention.value)):
        projected = run(twin, part, wide["ln1"])
        qkv.append(projected)
        found[name] = projected.reshape(B, T, A, K).swapaxes(1, 2)
    found["qkv"] = np.concatenate(qkv, axis=-1)

    allowed = run(twin, masks.causal_mask, T, T)
    assert_close(np.broadcast_to(allowed, wide["att"].shape), np.isfinite(wide["att"]), name="causal mask")
    scores = np.where(allowed, wide["q"] @ wide["k"].swapaxes(-1, -2) / math.sqrt(K), -np.inf)
    assert_close(scores, wide["att"], 2e-7, name="att")
    found["attSm"] = run(twin, masks.masked_softmax, wide["att"], allowed)
    mixed = run(
        twin,
        twin.file("attention").attend,
        wide["q"],
        wide["k"],
        wide["v"],
        scale=1 / math.sqrt(K),
        softcap=None,
        bias=None,
        allowed=allowed,
        dropout=None,
        rng=None,
    )
    found["y"] = mixed.swapaxes(1, 2).reshape(B, T, A * K)
    for name, values in found.items():
        assert_close(values, wide[name], 3e-7, name=name)
    not_steps = {"tok_emb", "pos_emb", "att", "block1", "block2", "ln_f", "lm_head", "probs"}
    assert set(found) == set(wide) - not_steps, "every published activation is checked, here or above"


@nano_sort
@both
@pytest.mark.parametrize(
    "change",
    [
        {"activation": "gelu"},
        {"norm_eps": 1e-6},
        {"attention_scale": 0.26},
        {"num_kv_heads": None, "norm_placement": "post", "final_norm": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_nano_sort_notices_another_convention(twin, change):
    config, tensors = read_nano_sort()
    partials = read_nano_sort_partials()
    model = build(twin, config.replace(**change), tensors, "float32")
    with pytest.raises(AssertionError, match="block0: off by"):
        assert_within(walk(twin, model, partials["idx"])[1], partials["block0"], BLOCKS, "block0")


@nano_sort
@both
def test_nano_sort_sorts_every_sequence(twin):
    """All 729 sequences of six letters from three: six greedy steps give them in order."""
    config, tensors = read_nano_sort()
    model = build(twin, config, tensors, "float32")
    letters = np.array(list(itertools.product(range(3), repeat=6)))
    tokens = np.zeros((729, config.context_length), np.int64)  # what follows is not seen: the model is causal
    tokens[:, :6] = letters
    for step in range(6, 12):
        best = run(twin, model, tokens)[:, step - 1].argmax(axis=-1)
        if step < 11:
            tokens[:, step] = best
    found = np.concatenate([tokens[:, 6:], best[:, None]], axis=1)
    assert_close(found, np.sort(letters, axis=1))


# ---- stories260K


def llama(config, weights, tokens):
    """Llama 2 in NumPy, float64, one sequence ``[T]`` -> logits ``[T, V]``.

    Touvron et al. 2023 (arXiv:2302.13971, section 2.2): RMSNorm (Zhang & Sennrich 2019), SwiGLU (Shazeer 2020), rotary
    positions by complex numbers (Su et al. 2021, section 3.4.2); grouped queries (Ainslie et al. 2023).
    """
    w = {path: values.astype(np.float64) for path, values in weights.items()}
    A, G, K, T = config.num_heads, config.num_kv_heads, config.key_dim, len(tokens)

    def norm(x, weight):
        return weight * x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5)

    turn = np.exp(1j * np.outer(np.arange(T), 10000.0 ** (-np.arange(0, K, 2) / K)))

    def rotated(x, heads):  # [T, heads * K]: each pair of neighbours is one complex number
        pairs = x.reshape(T, heads, K // 2, 2)
        z = (pairs[..., 0] + 1j * pairs[..., 1]) * turn[:, None]
        return np.stack([z.real, z.imag], axis=-1).reshape(T, heads, K)

    table = w["embedding.tokens.weight"]
    x = table[tokens]
    for i in range(config.num_layers):
        p = {name.split(f"blocks.{i}.")[1]: values for name, values in w.items() if f"blocks.{i}." in name}
        h = norm(x, p["attention_norm.weight"])
        q = rotated(h @ p["attention.query.weight"].T, A)
        k = rotated(h @ p["attention.key.weight"].T, G)
        v = (h @ p["attention.value.weight"].T).reshape(T, G, K)
        heads = []
        for a in range(A):
            g = a // (A // G)
            scores = q[:, a] @ k[:, g].T / math.sqrt(K)
            scores[np.triu_indices(T, 1)] = -np.inf
            e = np.exp(scores - scores.max(axis=-1, keepdims=True))
            heads.append(e / e.sum(axis=-1, keepdims=True) @ v[:, g])
        x = x + np.concatenate(heads, axis=-1) @ p["attention.output.weight"].T
        h = norm(x, p["feedforward_norm.weight"])
        gate = h @ p["feedforward.gate.weight"].T
        up = h @ p["feedforward.up.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ p["feedforward.down.weight"].T
    return norm(x, w["stack.final_norm.weight"]) @ table.T


STEPS = 199


def greedy(logits_of, beginning, steps=STEPS):
    """Tokens ``[1 + steps]`` from BOS on, each the likeliest; and the smallest lead of a chosen one over the next best."""
    tokens = np.zeros(1 + steps, np.int64)  # what follows is not seen: the models are causal
    tokens[0] = beginning
    lead = np.inf
    for step in range(steps):
        row = logits_of(tokens)[step]
        second, best = np.argsort(row)[-2:]
        lead = min(lead, row[best] - row[second])
        tokens[step + 1] = best
    return tokens, lead


@pytest.fixture(scope="module")
def story():
    """The story that the NumPy model tells, ``[200]`` tokens, and its logits ``[200, V]``."""
    config, weights, pieces = read_stories()
    tokens, lead = greedy(lambda given: llama(config, weights, given), pieces.beginning)
    return tokens, lead, llama(config, weights, tokens)


@stories
@both
def test_stories_logits_are_those_of_a_third_implementation(twin, story):
    config, weights, _ = read_stories()
    tokens, _, expected = story
    logits = run(twin, build(twin, config, weights), tokens[None])
    assert_close(logits[0], expected, 1e-12)


@stories
def test_stories_twins_agree_in_every_block(story):
    """Also at positions far beyond the story, in a batch with padding on both sides."""
    config, weights, _ = read_stories()
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, config.vocab_size, (3, config.context_length))
    real = np.ones(tokens.shape, bool)
    real[1, 300:] = False
    real[2, :100] = False
    both_states = [walk(twin, build(twin, config, weights), tokens, real) for twin in (TORCH, FLAX)]
    for layer, (torch_state, flax_state) in enumerate(zip(*both_states, strict=True)):
        assert_close(flax_state[real], torch_state[real], 1e-12, name=f"layer {layer}")


@stories
@both
def test_stories_greedy_decoding_tells_the_story(twin, story):
    config, weights, pieces = read_stories()
    expected, lead, _ = story
    assert lead > 1e-4, "no step is decided by rounding"
    model = build(twin, config, weights)
    call = twin.file("models").compiled(model) if twin is FLAX else model
    tokens, _ = greedy(lambda given: run(twin, call, given[None])[0], pieces.beginning)
    assert_close(tokens, expected)
    assert pieces.decode(tokens[1:]).startswith(STORY)


STORY = "Once upon a time"
