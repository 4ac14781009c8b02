"""aren-transliteration, an encoder-decoder that others trained and published: used, witnessed and judged in both twins.

The witness is CTranslate2, which the model was published for: what its own tests expect, and what the package of
PyPI gives for further words. It computes in float32, so that its log-probabilities of a whole word, up to 6 here, are
within ``BOUND`` of ours in float64; another convention is off by far more.
"""

import functools

import numpy as np
import pytest
import torch

from parity_tests.ctranslate2_reader import FILES, in_our_terms, padded, read_arrays, read_transliteration
from parity_tests.helpers import FLAX, TORCH, assert_close, both, to_numpy
from parity_tests.readers import build, needs_shared, run
from twinformer import WeightsError
from twinformer.decoding import BeamConfig, StopConfig
from twinformer.parity import judge, make_case
from twinformer.parity.evidence import Evidence
from twinformer.parity.rungs import forward
from twinformer.parity.twins import FlaxTwin, TorchTwin

pytestmark = [needs_shared(*FILES), pytest.mark.usefixtures("one_thread")]

BEGINNING, END = 1, 2
STOP = StopConfig(tokens=(END,))
ROOM = 15  # letters that may be written, and the end: more than any answer has
#: the largest difference from CTranslate2's log-probability of a whole word
BOUND = 3e-6

#: python/tests/test_translator.py of CTranslate2, ``test_score_api``: each letter's log-probability, and the end's
PUBLISHED = {
    ("آتزمون", "atzmon"): [-0.106023, -0.065410, -0.056002, -0.447953, -0.230714, -0.092184, -0.063463],
    ("آتشيسون", "achison"): [-0.07266, -0.300309, -0.181187, -0.395671, -0.025631, -0.123466, -0.002034, -0.012639],
}

#: ctranslate2 4.8.5 of PyPI, on one CPU thread: what greedy decoding (``beam_size=1``) writes, and the best four of
#: ``beam_size=4, length_penalty=0``, each with its log-probability by ``score_batch`` and its score in that search
ORACLE = {
    "آتزمون": (
        "atzmon",
        {
            "atzmon": (-1.061749, -1.061709),
            "atzumon": (-2.128291, -2.128251),
            "atzmun": (-2.345808, -2.345766),
            "atzemon": (-2.929187, -2.929146),
        },
    ),
    "آتشيسون": (
        "achison",
        {
            "achison": (-1.113600, -1.113573),
            "acheson": (-2.063193, -2.063165),
            "atchison": (-3.111178, -3.111151),
            "achesson": (-3.376055, -3.376028),
        },
    ),
    "خالد": (
        "khald",
        {
            "khald": (-0.815881, -0.815663),
            "jald": (-1.999402, -1.999184),
            "chald": (-2.415230, -2.415012),
            "khaled": (-2.624360, -2.624142),
        },
    ),
    "إبراهيم": (
        "ibrahim",
        {
            "ibrahim": (-1.062932, -1.062767),
            "ebrahim": (-1.291638, -1.291474),
            "ibrahem": (-3.188397, -3.188233),
            "ebrahem": (-3.249095, -3.248931),
        },
    ),
    "شكسبير": (
        "schaxber",
        {
            "schaxber": (-3.309416, -3.309383),
            "schexber": (-3.752605, -3.752571),
            "shaksber": (-3.765723, -3.765688),
            "schusber": (-3.888485, -3.888453),
        },
    ),
    "واشنطن": (
        "washenten",
        {
            "washnten": (-2.135032, -2.134930),
            "washenten": (-2.161205, -2.161102),
            "wachenten": (-2.540146, -2.540044),
            "wachnten": (-2.554478, -2.554377),
        },
    ),
    "يوسف": (
        "yosf",
        {
            "yosf": (-1.217478, -1.217250),
            "yusf": (-2.175566, -2.175338),
            "yosef": (-2.849886, -2.849658),
            "yusef": (-2.952230, -2.952004),
        },
    ),
    "غاندي": (
        "gandi",
        {
            "gandi": (-1.017588, -1.017584),
            "gandy": (-1.339036, -1.339032),
            "gande": (-1.861994, -1.861990),
            "gandey": (-3.169928, -3.169926),
        },
    ),
    "بيتهوفن": (
        "bethoffffen",
        {
            "bethoven": (-2.377086, -2.377073),
            "bethofffen": (-3.483918, -3.483904),
            "bethofffin": (-3.727368, -3.727355),
            "bethoffffen": (-4.267660, -4.267647),
        },
    ),
    "نيوتن": (
        "neuten",
        {
            "neuten": (-2.013150, -2.013077),
            "neutin": (-2.666046, -2.665972),
            "newten": (-2.688720, -2.688648),
            "newtin": (-2.748634, -2.748561),
        },
    ),
}
PAIRS = [(word, answer) for word, (_, best) in ORACLE.items() for answer in best]


@functools.cache
def model_of(twin, dtype="float64"):
    config, tensors, *_ = read_transliteration()
    return build(twin, config, tensors, dtype)


def sources(words):
    _, _, arabic, _ = read_transliteration()
    ids, real = padded([arabic.encode(word) for word in words])
    return {"source": ids, "source_padding_mask": real}


def answers(words):
    """The ids of Latin words, each with its end."""
    *_, latin = read_transliteration()
    return padded([[*latin.encode(word), END] for word in words])


def beginnings(count):
    return np.full((count, 1), BEGINNING)


def log_softmax(logits):
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def log_probabilities(twin, model, pairs, *, beginning=BEGINNING, ending=()):
    """Of each letter of each answer, and of its end: ``[B, T]``, 0 after it; by one call of the model."""
    words, texts = zip(*pairs, strict=True)
    _, _, arabic, _ = read_transliteration()
    source, source_real = padded([[*arabic.encode(word), *ending] for word in words])
    written, real = answers(texts)
    target = np.concatenate([np.full((len(pairs), 1), beginning), written[:, :-1]], axis=1)
    logits = run(twin, model, source, target, source_padding_mask=source_real, target_padding_mask=real)
    return np.where(real, np.take_along_axis(log_softmax(logits), written[..., None], axis=-1)[..., 0], 0.0)


def off(found, expected):
    """The largest difference; NaN counts as infinite."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert found.size > 0
    return np.nan_to_num(np.abs(found - expected), nan=np.inf).max()


def never_empty():
    """``[1, ROOM, V]``: CTranslate2 writes a letter at least."""
    config, *_ = read_transliteration()
    allowed = np.ones((1, ROOM, config.vocab_size), bool)
    allowed[0, 0, END] = False
    return allowed


# ---- what was published


def test_every_number_of_the_file_is_used_once():
    """(The reader refuses names and shapes that it has no place for.)"""
    config, tensors, *_ = read_transliteration()
    _, arrays = read_arrays()
    assert (len(arrays), sum(array.size for array in tensors.values())) == (200, 182_731)
    used, there = (np.sort(np.concatenate([a.ravel() for a in all_.values()])) for all_ in (tensors, arrays))
    assert used.tobytes() == there.tobytes()
    assert (config.num_encoder_layers, config.num_layers, config.model_dim, config.hidden_dim) == (6, 6, 32, 128)


def test_an_array_by_another_name_is_refused():
    config, *_ = read_transliteration()
    _, arrays = read_arrays()
    name, other = "decoder/layer_5/attention/linear_1/bias", "decoder/layer_5/attention/linear_3/bias"
    with pytest.raises(WeightsError) as caught:
        in_our_terms(config, {other if known == name else known: array for known, array in arrays.items()})
    assert f"{name}: missing" in str(caught.value)
    assert f"{other}: unexpected, of shape (64,)" in str(caught.value)


@both
def test_published_answers(twin):
    """``test_batch_translation`` there, in float32: greedy, and with the beam of two that is the default there."""
    *_, latin = read_transliteration()
    words, expected = zip(*PUBLISHED, strict=True)
    model = model_of(twin, "float32")
    given = {"max_new_tokens": ROOM, "stop": STOP, **sources(words)}
    greedy = twin.file("generation").Generator(model, bucket=1)(beginnings(2), **given)
    assert greedy.finished.all()
    assert [latin.decode(row) for row in greedy.tokens] == list(expected)
    beams = twin.file("beam").beam_search(model, beginnings(2), beam=BeamConfig(width=2), bucket=1, **given)
    assert beams.finished.all()
    assert [latin.decode(row[0]) for row in beams.tokens] == list(expected)
    assert beams.lengths[:, 0].tolist() == [len(text) + 1 for text in expected]
    # of all that was written, the end included
    scores = [sum(PUBLISHED[pair]) for pair in PUBLISHED]
    assert scores[0] == pytest.approx(-1.06175, abs=1e-6)
    assert off(beams.logprobs[:, 0], scores) <= 5e-6
    assert off(greedy.logprobs.sum(axis=-1), scores) <= 5e-6


@both
def test_published_scores_of_every_letter(twin):
    """They have six digits after the point."""
    pairs = list(PUBLISHED)
    tokens, real = answers([text for _, text in pairs])
    given = sources([word for word, _ in pairs])
    with torch.no_grad():
        found = to_numpy(
            twin.file("generation").score(model_of(twin), beginnings(2), tokens, continuation_mask=real, **given)
        )
    for row, there, pair in zip(found, real, pairs, strict=True):
        assert off(row[there], PUBLISHED[pair]) <= 1.5e-6
    assert_close(log_probabilities(twin, model_of(twin), pairs), found, 1e-12)


@both
def test_published_answer_that_begins_as_told(twin):
    """``test_file_translation_with_prefix`` there: what must begin with "ats" goes on to "atsumon"."""
    *_, latin = read_transliteration()
    prompt = np.array([[BEGINNING, *latin.encode("ats")]])
    given = {"max_new_tokens": ROOM, "stop": STOP, **sources(["آتزمون"])}
    greedy = twin.file("generation").Generator(model_of(twin), bucket=1)(prompt, **given)
    assert latin.decode(greedy.tokens[0]) == "umon"
    assert off(greedy.logprobs.sum(), -0.593918) <= BOUND  # ctranslate2 4.8.5


# ---- CTranslate2 itself


@both
def test_scores_are_those_of_ctranslate2(twin):
    """Forty words with their ends, from likely to unlikely."""
    found = log_probabilities(twin, model_of(twin), PAIRS).sum(axis=-1)
    expected = [scored for _, best in ORACLE.values() for scored, _ in best.values()]
    assert len(PAIRS) == 40
    assert off(found, expected) <= BOUND


@both
def test_greedy_decoding_writes_what_ctranslate2_writes(twin):
    """For two words that is not the best of the beam."""
    *_, latin = read_transliteration()
    generator = twin.file("generation").Generator(model_of(twin), bucket=1)
    written = generator(
        beginnings(len(ORACLE)), max_new_tokens=ROOM, stop=STOP, allowed=never_empty(), **sources(ORACLE)
    )
    found = [latin.decode(row) for row in written.tokens]
    assert found == [greedy for greedy, _ in ORACLE.values()]
    assert sum(greedy != next(iter(best)) for greedy, best in ORACLE.values()) == 2


@both
def test_beam_search_finds_what_ctranslate2_finds(twin):
    """The best four in their order. It takes the end out of the first letter's softmax; ours only forbids it."""
    *_, latin = read_transliteration()
    given = sources(ORACLE)
    model = model_of(twin)
    beams = twin.file("beam").beam_search(
        model,
        beginnings(len(ORACLE)),
        beam=BeamConfig(width=4, num_best=4, length_penalty="none"),
        max_new_tokens=ROOM,
        stop=STOP,
        allowed=never_empty(),
        bucket=1,
        **given,
    )
    found = [[latin.decode(one) for one in row] for row in beams.tokens]
    assert found == [list(best) for _, best in ORACLE.values()]
    assert beams.finished.all()
    assert_close(beams.scores, beams.logprobs, 0.0)
    first = run(twin, model, given["source"], beginnings(len(ORACLE)), source_padding_mask=given["source_padding_mask"])
    without_end = np.log1p(-np.exp(log_softmax(first)[:, 0, END]))
    expected = np.array([[score for _, score in best.values()] for _, best in ORACLE.values()])
    assert off(beams.scores - without_end[:, None], expected) <= BOUND
    assert off(beams.scores, expected) > 2e-4


@both
def test_beam_search_goes_on_where_ctranslate2_stops(twin):
    """Which ends with its fourth finished word, though a likelier one is still being written."""
    *_, latin = read_transliteration()
    words = {"القاهرة": ("qahraha", "qahrah"), "أينشتاين": ("ainchtein", "ensteine")}  # ours, its: the fourth
    beams = twin.file("beam").beam_search(
        model_of(twin),
        beginnings(2),
        beam=BeamConfig(width=4, num_best=4, length_penalty="none"),
        max_new_tokens=ROOM,
        stop=STOP,
        bucket=1,
        **sources(words),
    )
    # by ``score_batch`` of ctranslate2 4.8.5
    by_its_own_account = np.array([[-2.970282, -3.203348], [-3.816858, -5.598252]])
    pairs = [(word, text) for word, texts in words.items() for text in texts]
    assert off(log_probabilities(twin, model_of(twin), pairs).sum(-1).reshape(2, 2), by_its_own_account) <= BOUND
    assert [latin.decode(row[3]) for row in beams.tokens] == [ours for ours, _ in words.values()]


# ---- another convention


def exchanged(tensors, *pairs):
    """Leaves whose paths hold one of a pair's words with the other's values."""
    named = {old: new for pair in pairs for old, new in (pair, pair[::-1])}
    renamed = {}
    for path, values in tensors.items():
        old = next((part for part in named if part in path), None)
        renamed[path if old is None else path.replace(old, named[old])] = values
    assert renamed.keys() == tensors.keys()
    return renamed


def by_heads(tensors, config):
    """Queries, keys and values as if the file stacked them head by head."""
    A, K, D = config.num_heads, config.key_dim, config.model_dim
    changed = dict(tensors)
    for path in tensors:
        if ".attention.query." in path:
            paths = [path.replace("query", part) for part in ("query", "key", "value")]
            stacked = np.concatenate([tensors[p] for p in paths]).reshape(A, 3, K, -1)
            for i, p in enumerate(paths):
                changed[p] = stacked[:, i].reshape(tensors[p].shape)
    assert D == A * K
    return changed


SELF, CROSS = ".attention.", ".cross_attention."
#: what is changed, and by how much the log-probability of one of the forty words moves at least
CONVENTIONS = {
    "positions from 0": ({"position_offset": 0}, 7),
    "sines between cosines": ({"sinusoid_layout": "interleaved"}, 38),
    "the textbook's frequencies": ({"sinusoid_spacing": "textbook"}, 0.29),
    "embeddings not scaled": ({"embedding_scale": None}, 57),
    "scores over sqrt(D)": ({"attention_scale": 32**-0.5}, 9),
    "four heads": ({"num_heads": 4, "num_kv_heads": 4, "key_dim": 8, "value_dim": 8}, 5),
    "GELU": ({"activation": "gelu"}, 2.8),
    "norms behind": ({"norm_placement": "post"}, 94),
    "eps 1e-6": ({"norm_eps": 1e-6}, 1.2e-5),
    "keys as values": (lambda t, c: exchanged(t, (f"{SELF}key", f"{SELF}value")), 34),
    "keys as values of the source": (lambda t, c: exchanged(t, (f"{CROSS}key", f"{CROSS}value")), 50),
    "queries as keys": (lambda t, c: exchanged(t, (f"{SELF}query", f"{SELF}key")), 13),
    "stacked by heads": (by_heads, 29),
    "final norms exchanged": (lambda t, c: exchanged(t, ("encoder.final_norm", "decoder.final_norm")), 13),
    "begun with the end": ({"beginning": END}, 33),
    "source with an end": ({"ending": (END,)}, 6),
    "source with a blank": ({"ending": (0,)}, 7),
}


# all of them in one twin; of the other, which gives the same log-probabilities, those that take no other program
OTHERS = [(TORCH, name) for name in CONVENTIONS] + [
    (FLAX, name) for name, (change, _) in CONVENTIONS.items() if callable(change) or name.startswith(("begun", "eps"))
]


@pytest.mark.parametrize(("twin", "name"), OTHERS, ids=[f"{twin.name}-{name}" for twin, name in OTHERS])
def test_another_convention_is_noticed(twin, name):
    config, tensors, *_ = read_transliteration()
    change, margin = CONVENTIONS[name]
    options = {}
    if callable(change):
        tensors = change(tensors, config)
    elif change.keys() <= {"beginning", "ending"}:
        options = change
    else:
        config = config.replace(**change)
    expected = [scored for _, best in ORACLE.values() for scored, _ in best.values()]
    found = log_probabilities(twin, build(twin, config, tensors), PAIRS, **options).sum(axis=-1)
    assert off(found, expected) > margin > 3 * BOUND


# ---- step by step, and the judge


@both
def test_greedy_decoding_step_by_step(twin):
    """With the cache and one letter at a time: what whole calls without it give."""
    given = sources(ORACLE)
    B, model = len(ORACLE), model_of(twin)
    mask = {"source_padding_mask": given["source_padding_mask"]}
    written = twin.file("generation").Generator(model, bucket=1)(beginnings(B), max_new_tokens=ROOM, stop=STOP, **given)
    target = np.concatenate([beginnings(B), written.tokens], axis=1)
    whole = run(twin, model, given["source"], target[:, :-1], **mask)
    live = np.arange(written.tokens.shape[1]) < written.lengths[:, None]
    assert written.finished.all()
    assert_close(whole.argmax(axis=-1)[live], written.tokens[live])
    second, best = np.sort(whole[live], axis=-1).T[-2:]
    assert (best - second).min() > 5e-4, "no step is decided by rounding"
    own = np.take_along_axis(log_softmax(whole), written.tokens[..., None], axis=-1)[..., 0]
    assert_close(np.where(live, own, 0.0), written.logprobs, 1e-12)

    H_enc = run(twin, model.encode, given["source"], **mask)
    cache = twin.file("cache").init_cache(
        model, B, ROOM + 1, H_enc=twin.array(H_enc), memory_padding_mask=twin.array(given["source_padding_mask"])
    )
    steps = []
    for t in range(written.tokens.shape[1]):
        with torch.no_grad():
            logits, cache = model.step(twin.array(target[:, t : t + 1]), cache)
        steps.append(to_numpy(logits).copy())
    assert_close(np.concatenate(steps, axis=1), whole, 1e-12)


def real_case():
    """Ten real words and what is written for them, padded on the right."""
    config, tensors, *_ = read_transliteration()
    written, real = answers([greedy for greedy, _ in ORACLE.values()])
    target = np.concatenate([beginnings(len(written)), written[:, :-1]], axis=1)
    return make_case(
        "aren-transliteration", config, tensors, sources(ORACLE) | {"target": target, "target_padding_mask": real}
    )


def test_twins_agree():
    case = real_case()
    source, target = case.inputs["source"], case.inputs["target"]
    masks = {name: array for name, array in case.inputs.items() if name.endswith("mask")}
    torch_logits, flax_logits = (run(twin, model_of(twin), source, target, **masks) for twin in (TORCH, FLAX))
    real = masks["target_padding_mask"]
    assert_close(flax_logits[real], torch_logits[real], 1e-12)


RUNGS = ("parameters", "forward", "gradients", "precision")  # its cache: step by step, above


def test_the_judge_agrees_on_real_words():
    report = judge(real_case(), rungs=RUNGS)
    report.assert_agrees()
    assert {name: rung.verdict for name, rung in report.rungs.items()} == dict.fromkeys(RUNGS, "agree")


class OtherEps(TorchTwin):
    """PyTorch, with the eps that the model was trained with in one norm."""

    def _model(self, case, **options):
        model = super()._model(case, **options)
        model.decoder.blocks[3].cross_attention_norm.eps = 1e-6
        return model


def test_the_judge_names_the_module_that_differs():
    rung = forward.check(Evidence(real_case(), (OtherEps(), FlaxTwin())))
    assert rung.verdict == "differ"
    assert rung.culprits == ["decoder.blocks.3.cross_attention_norm"]
