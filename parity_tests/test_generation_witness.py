"""Decoding against an outside witness: `transformers` on tiny random models with the same weights, in float64.

Where both define the same thing the tokens are equal. Where they do not is the table in docs/decoding.md, and
``test_where_definitions_part`` holds each of its lines.
"""

import numpy as np
import pytest
import torch
import transformers
from transformers.generation import logits_process

from parity_tests.helpers import TORCH, assert_close, both, to_numpy
from parity_tests.witness_models import WITNESSES
from twinformer import InputError, ModelConfig
from twinformer.decoding import BeamConfig, SamplingConfig, StopConfig

EOS = 1
NEW = 9


@pytest.fixture(scope="module")
def models():
    """{family: (their model, our config, weights)}"""
    return {name: make(seed=4) for name, make in WITNESSES.items()}


def our_model(twin, config, tensors):
    model = twin.file("models").build(config, seed=None)
    twin.file("weights").load_weights(model, tensors)
    return model


def asked(family, config, seed=0):
    """Left-padded prompts (or sources, right-padded) of lengths 5, 3 and 1: arguments for both."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(2, config.vocab_size, (3, 5))
    real = np.ones((3, 5), bool)
    for row, length in enumerate((5, 3, 1)):
        if family == "t5":
            real[row, length:] = False
        else:
            real[row, : 5 - length] = False
    ids = np.where(real, ids, 0)
    theirs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(real.astype(np.int64))}
    if family == "t5":
        return theirs, (np.zeros((3, 1), np.int64),), {"source": ids, "source_padding_mask": real}
    return theirs, (ids,), {"padding_mask": real}


def their_tokens(output, prompt_length):
    """What was written after the prompt, cut after the first end."""
    rows = []
    for row in to_numpy(output)[:, prompt_length:]:
        end = np.flatnonzero(row == EOS)
        rows.append(row[: end[0] + 1 if len(end) else len(row)].tolist())
    return rows


def our_tokens(tokens, lengths):
    return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


@both
@pytest.mark.parametrize("family", WITNESSES)
def test_greedy(twin, family, models):
    model, config, tensors = models[family]
    generator = twin.file("generation").Generator(our_model(twin, config, tensors))
    said = set()
    for seed in range(4):
        theirs, prompts, ours = asked(family, config, seed)
        written = generator(*prompts, **ours, max_new_tokens=NEW, stop=StopConfig(tokens=(EOS,)))
        output = model.generate(**theirs, max_new_tokens=NEW, do_sample=False, num_beams=1)
        expected = their_tokens(output, 1 if family == "t5" else 5)
        assert our_tokens(written.tokens, written.lengths) == expected
        said |= {tuple(row) for row in expected}
    assert len(said) >= 8  # rows and prompts say different things


@both
@pytest.mark.parametrize("family", WITNESSES)
@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0])
def test_beam_search(twin, family, alpha, models):
    """``early_stopping="never"`` is their exact search; the sum over ``length^length_penalty`` their score."""
    model, config, tensors = models[family]
    mine = our_model(twin, config, tensors)
    for seed in range(2):
        theirs, prompts, ours = asked(family, config, seed)
        found = twin.file("beam").beam_search(
            mine,
            *prompts,
            **ours,
            max_new_tokens=NEW,
            beam=BeamConfig(width=4, num_best=3, length_penalty="mean", alpha=alpha),
            stop=StopConfig(tokens=(EOS,)),
        )
        output = model.generate(
            **theirs,
            max_new_tokens=NEW,
            do_sample=False,
            num_beams=4,
            num_return_sequences=3,
            length_penalty=alpha,
            early_stopping="never",
            output_scores=True,
            return_dict_in_generate=True,
        )
        expected = their_tokens(output.sequences, 1 if family == "t5" else 5)
        lengths = found.lengths.reshape(-1)
        assert our_tokens(found.tokens.reshape(len(lengths), -1), lengths) == expected
        # their scores are float32
        np.testing.assert_allclose(found.scores.reshape(-1), to_numpy(output.sequences_scores), rtol=2e-6)


WARPERS = {
    "temperature": (SamplingConfig(temperature=0.7), [logits_process.TemperatureLogitsWarper(0.7)]),
    "top-k": (SamplingConfig(top_k=5), [logits_process.TopKLogitsWarper(5)]),
    "top-p": (SamplingConfig(top_p=0.8), [logits_process.TopPLogitsWarper(0.8)]),
    "min-p": (SamplingConfig(min_p=0.1), [logits_process.MinPLogitsWarper(0.1)]),
    "repetition": (SamplingConfig(repetition_penalty=1.3), [logits_process.RepetitionPenaltyLogitsProcessor(1.3)]),
    "all": (
        SamplingConfig(temperature=0.8, top_k=12, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
        [
            logits_process.RepetitionPenaltyLogitsProcessor(1.2),
            logits_process.TemperatureLogitsWarper(0.8),
            logits_process.TopKLogitsWarper(12),
            logits_process.TopPLogitsWarper(0.9),
            logits_process.MinPLogitsWarper(0.05),
        ],
    ),
}


def ours_processed(twin, sampling, logits, seen):
    X = twin.array(logits)
    for process in twin.file("sampling").processors(sampling):
        X = process(X, twin.array(seen))
    return to_numpy(X)


@both
@pytest.mark.parametrize("name", WARPERS)
def test_warpers(twin, name):
    """On logits without ties all five filters leave the same tokens with the same logits, alone and in a chain."""
    sampling, theirs = WARPERS[name]
    rng = np.random.default_rng(5)
    changed = 0
    for _ in range(40):
        logits = rng.normal(0, 2.5, (3, 23))
        written = rng.integers(0, 23, (3, 4))
        seen = np.zeros((3, 23), bool)
        np.put_along_axis(seen, written, True, -1)
        expected = torch.from_numpy(logits.copy())
        for warper in theirs:
            expected = warper(torch.from_numpy(written), expected)
        found = ours_processed(twin, sampling, logits, seen)
        assert_close(found, to_numpy(expected), 1e-14)
        changed += int((to_numpy(expected) != logits).any())
    assert changed == 40


@both
def test_where_definitions_part(twin):
    """Each line of the table of differences: what they do, and what we do, on the case that shows it."""
    none = torch.zeros((1, 1), dtype=torch.long)
    seen = np.zeros((1, 4), bool)
    # equal logits at the border of top-k: they keep all of them, here exactly k stay, the first ids first
    tied = np.array([[1.0, 0.0, 0.0, 0.0]])
    theirs = to_numpy(logits_process.TopKLogitsWarper(2)(none, torch.from_numpy(tied.copy())))
    assert np.isfinite(theirs).sum() == 4
    assert np.isfinite(ours_processed(twin, SamplingConfig(top_k=2), tied, seen)).tolist() == [
        [True, True, False, False]
    ]
    # equal logits at the border of top-p: theirs depends on the order in which a sort leaves equals
    equal = np.zeros((1, 4))
    assert np.isfinite(ours_processed(twin, SamplingConfig(top_p=0.5), equal, seen)).tolist() == [
        [True, True, False, False]
    ]
    # their repetition penalty leaves a logit of 0 as it is, and so does ours: no difference, held here
    zero = np.array([[0.0, 1.0, -1.0, 2.0]])
    all_seen = np.ones((1, 4), bool)
    assert_close(
        ours_processed(twin, SamplingConfig(repetition_penalty=2.0), zero, all_seen), [[0.0, 0.5, -2.0, 1.0]], 0.0
    )


def test_the_witness_is_what_we_think():
    """The comparison can fail: another end token, another penalty, other weights give other tokens."""
    model, config, _ = WITNESSES["llama"](seed=4)
    theirs, _, _ = asked("llama", config)
    base = model.generate(**theirs, max_new_tokens=NEW, do_sample=False)
    other = WITNESSES["llama"](seed=5)[0].generate(**theirs, max_new_tokens=NEW, do_sample=False)
    assert their_tokens(base, 5) != their_tokens(other, 5)
    assert transformers.__version__.startswith("5.")


# ---- places that are counted with their padding


@both
@pytest.mark.parametrize("bucket", [1, 4])
@pytest.mark.parametrize("architecture", ["decoder", "encoder-decoder"])
def test_places_stay_where_they_are(twin, architecture, bucket):
    """Each token is what the whole model, called with the padding where it was, thinks likeliest, and scores so; one
    beam writes the same. PyTorch's model says so for both: JAX would compile every operation for every length."""
    config = ModelConfig(
        architecture=architecture,
        vocab_size=23,
        context_length=14,
        model_dim=12,
        key_dim=5,
        hidden_dim=20,
        num_heads=3,
        num_layers=2,
        positions="learned",
        position_counting="places",
        initializer_std=0.6,
        param_dtype="float64",
        compute_dtype="float64",
    )
    model = twin.file("models").build(config, seed=6)
    rng = np.random.default_rng(2)
    prompts = rng.integers(1, 23, (4, 5))
    real = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 0, 0, 1], [0, 1, 1, 0, 0]], bool)
    source = {}
    if architecture == "encoder-decoder":
        hidden = np.arange(7) < np.array([0, 3, 6, 2])[:, None]
        hidden[3, 4:] = True
        source = {"source": rng.integers(1, 23, (4, 7)), "source_padding_mask": ~hidden}
    asked = {"padding_mask": real, "max_new_tokens": NEW} | source
    written = twin.file("generation").Generator(model, bucket=bucket)(prompts, **asked)
    whole_model = TORCH.file("models").build(config, seed=6)
    native = {name: TORCH.array(array) for name, array in source.items()}
    name = "target" if source else "tokens"
    mask_name = "target_padding_mask" if source else "padding_mask"
    moved = 0
    for row, end in enumerate((5, 5, 5, 3)):  # padding after the end plays no part
        one = {key: array[row : row + 1] for key, array in native.items()}
        tokens, mask = prompts[row : row + 1, :end], real[row : row + 1, :end]
        for t in range(NEW):
            logits = to_numpy(whole_model(**one, **{name: TORCH.array(tokens), mask_name: TORCH.array(mask)}))[0, -1]
            assert written.tokens[row, t] == logits.argmax(), (row, t)
            expected = logits.max() - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            assert abs(written.logprobs[row, t] - expected) < 1e-11
            tokens = np.append(tokens, [[logits.argmax()]], 1)
            mask = np.append(mask, [[True]], 1)
        together = {key: array for key, array in one.items() if key != "source_padding_mask"}
        bare = to_numpy(whole_model(**together, **{name: TORCH.array(tokens[mask][None])}))[0, -1]
        whole = to_numpy(whole_model(**one, **{name: TORCH.array(tokens), mask_name: TORCH.array(mask)}))[0, -1]
        moved += int(abs(bare - whole).max() > 1e-4)
    assert moved >= 2  # it matters where the padding was
    scores = to_numpy(twin.file("generation").score(model, prompts, written.tokens, padding_mask=real, **source))
    assert_close(scores, written.logprobs, 1e-10)
    searched = twin.file("beam").beam_search(model, prompts, beam=BeamConfig(width=1), bucket=bucket, **asked)
    assert searched.tokens[:, 0].tolist() == written.tokens.tolist()


def _minute(**choices):
    sizes = {"vocab_size": 9, "model_dim": 4, "key_dim": 2, "hidden_dim": 4, "num_heads": 1, "num_layers": 1}
    return ModelConfig(architecture="decoder", positions="learned", **sizes, **choices)


@both
def test_no_more_places_than_the_context_has(twin):
    """Two tokens after six places of padding need eight."""
    config = _minute(context_length=8, position_counting="places")
    generator = twin.file("generation").Generator(twin.file("models").build(config))
    prompts, real = np.ones((1, 7), np.int64), np.arange(7)[None] >= 6
    assert generator(prompts, padding_mask=real, max_new_tokens=1).tokens.shape == (1, 1)
    with pytest.raises(InputError, match="7"):
        generator(prompts, padding_mask=real, max_new_tokens=2)


@both
def test_the_last_token_that_is_scored_needs_no_place(twin):
    """As the last that is written needs none: what is written in a full context can be scored."""
    config = _minute(context_length=6).with_dtype("float64")
    model = twin.file("models").build(config)
    score = twin.file("generation").score
    prompts, others = np.array([[1, 2], [4, 5]]), np.array([[3, 4, 5, 6, 7], [1, 2, 3, 4, 8]])
    long = to_numpy(score(model, prompts, others))
    assert_close(long[:, :4], to_numpy(score(model, prompts, others[:, :4])), 1e-12)
    logits = to_numpy(model(twin.array(np.concatenate((prompts, others[:, :4]), 1))))[:, -1]
    expected = np.take_along_axis(logits, others[:, 4:], 1)[:, 0] - np.log(np.exp(logits).sum(-1))
    assert_close(long[:, 4], expected, 1e-12)
    holes = np.array([[True, True, False, True, True, True], [True] * 6])
    with pytest.raises(InputError, match="expected at most 7 tokens"):
        score(model, prompts, np.concatenate((others, others[:, :1]), 1), continuation_mask=holes)
    nothing = score(model, prompts[:, :1], others[:, :1], continuation_mask=np.zeros((2, 1), bool))
    assert to_numpy(nothing).tolist() == [[0.0], [0.0]]
