"""What a twin wrote, against one full forward over it; what it found by beams, against the reference's own search.

The full forward is that of the first twin's model, which the rungs below have judged; tokens, numbers, stopping and
search are the reference's (``sampling_reference.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from twinformer.decoding import Beams, Generated, StopConfig
from twinformer.parity import philox
from twinformer.parity import sampling_reference as reference
from twinformer.parity.case import Case
from twinformer.parity.compare import Comparison, FloatArray, compare, widened
from twinformer.parity.decoders import Decoder
from twinformer.parity.scenarios import PAD, SEED, Scenario, Search, Writing, long_search, scenarios, searches
from twinformer.parity.ties import compare_beams
from twinformer.parity.twins import Twin
from twinformer.parity.writers import Array, Writer

Problems = dict[str, list[str]]
Flags = npt.NDArray[np.bool_]
# values of logits after a processor, and log-probabilities
BOUND = 1e-12
# by how much scores of the same may differ, and choices tie: cached and full forward agree to 1e-13 of logits up to 100
NOISE = 1e-10
# in bfloat16: how many tokens are scored, and two roundings of the largest logit, which a compiler may leave out
SCORED, LOW_BOUND = 6, 2.0**-7


def written(
    twin: Twin, judge: Twin, case: Case, writing: Writing, which: str
) -> tuple[list[Comparison], Problems, int]:
    """What one twin writes in the scenario of that name, and once more with its rows in reverse, by the same generator;
    also how many tokens were looked at."""
    comparisons: list[Comparison] = []
    problems: list[str] = []
    count = 0
    with twin.writers(case) as make:
        writer = make(case)
        for scenario in judge.once("ends", case, lambda: with_ends(judge, case, writing)):
            if scenario.name != which:
                continue
            found = _generated(twin, case, writing, writer, scenario)
            logits = _logits_under(judge, case, writing, found.tokens, _live(found))
            wrong = list(_check_tokens(writing, scenario, found, logits))
            problems += wrong
            count += int(found.lengths.sum())
            if wrong:
                continue
            expected = _logprobs(found.tokens, _live(found), logits)
            label = f"Generator (logprobs, {scenario.name}, {twin.name})"
            comparisons.append(compared(label, found.logprobs, expected))
            again = _generated_again(twin, case, writing, writer, scenario)
            if not np.array_equal(again.tokens, found.tokens):
                logits = _logits_under(judge, case, writing, again.tokens, _live(again))
                expected = _logprobs(again.tokens, _live(again), logits)
            wrong = [f"a second call, {text}" for text in _check_tokens(writing, scenario, again, logits)]
            problems += wrong
            if not wrong:
                label = f"Generator (logprobs, {scenario.name}, a second call, {twin.name})"
                comparisons.append(compared(label, again.logprobs, expected))
    return comparisons, {"Generator": problems} if problems else {}, count


def compared(label: str, found: Array, expected: FloatArray) -> Comparison:
    """Log-probabilities are differences of numbers that are not small: near 0 of a model that is certain they keep the
    rounding of those."""
    return compare(
        label, widened(found), expected, bound=BOUND, scale=max(1.0, float(np.abs(expected).max(initial=0.0)))
    )


def rescored(twin: Twin, judge: Twin, case: Case, writing: Writing) -> tuple[list[Comparison], Problems]:
    """Both texts once more as streams; the greedy one, and what stands after its ends, scored in one call."""
    asked = judge.once("ends", case, lambda: with_ends(judge, case, writing))[:2]
    with judge.writers(case) as make:
        texts = [_generated(judge, case, writing, make(case), one) for one in asked]
    told = _told(texts[0])
    expected = _logprobs(texts[0].tokens, told, _logits_under(judge, case, writing, texts[0].tokens, told))
    problems: list[str] = []
    with twin.writers(case) as make:
        writer = make(case)
        for one, text in zip(asked, texts, strict=True):
            steps = twin.once(
                f"stream {one.name} {one.stop}",
                case,
                partial(writer.stream, writing.prompts, **writing.options(), **one.options()),
            )
            for what, place, wanted in (("tokens", 0, text.tokens), ("live rows", 1, _live(text))):
                got = np.stack([step[place] for step in steps], 1)
                if not np.array_equal(got, wanted):
                    problems.append(f"stream ({one.name}): {what}: {_first_other(got, wanted)}")
        scored = twin.once(
            f"score {asked[0].stop}",
            case,
            lambda: writer.score(writing.prompts, texts[0].tokens, continuation_mask=told, **writing.options()),
        )
    comparisons = [compared(f"score ({asked[0].name}, {twin.name})", scored, expected)]
    return comparisons, {"Generator.stream": problems} if problems else {}


def _first_other(got: Array, wanted: Array) -> str:
    """Where a stream is not what the text has, with what stands there."""
    if got.shape != wanted.shape:
        return f"expected shape {wanted.shape}, got {got.shape}"
    places = np.argwhere(got != wanted)
    row, step = map(int, places[0])
    expected, found = wanted[row, step].item(), got[row, step].item()
    return f"expected {expected}, got {found} in row {row}, step {step}, the first of {len(places)} places"


def _told(text: Generated) -> Flags:
    """What is scored: two rows as they were written, two with what stands after their ends, but for a hole in each."""
    told = _live(text)
    told[1:3] = True
    told[1, 0] = told[2, 1:2] = False
    return told


def scored_low(twin: Twin, judge: Twin, case: Case, writing: Writing) -> tuple[list[Comparison], Problems]:
    """Scores of the model in bfloat16 are wide: of its own logits widened, and not rounded to what bfloat16 has."""
    greedy = judge.once("ends", case, lambda: with_ends(judge, case, writing))[0]
    with judge.writers(case) as make:
        tokens = _generated(judge, case, writing, make(case), greedy).tokens[:, :SCORED]
    low, real = case.in_dtype("bfloat16"), np.ones(tokens.shape, np.bool_)
    with twin.writers(low) as make:
        scored = twin.once(
            f"score {greedy.stop} in bfloat16",
            low,
            lambda: make(low).score(writing.prompts, tokens, continuation_mask=real, **writing.options()),
        )
    if scored.dtype != np.float32:
        return [], {"score": [f"score of a model in bfloat16: expected float32, got {scored.dtype}"]}
    rows = np.arange(len(tokens))
    full = dataclasses.replace(low, inputs=writing.inputs(rows, tokens, real))
    output = twin.once("logits of what is scored", full, partial(twin.plain, full))
    logits = np.take_along_axis(output, writing.places(rows, real)[..., None], 1)
    label, largest = f"score (bfloat16, {twin.name})", float(np.abs(output).max())
    comparison = compare(label, widened(scored), _logprobs(tokens, real, logits), bound=LOW_BOUND, scale=largest)
    told = scored[scored != 0]
    if told.size and np.array_equal(told, told.astype(ml_dtypes.bfloat16).astype(np.float32)):
        return [comparison], {"score": ["score of a model in bfloat16: expected float32, got numbers of bfloat16"]}
    return [comparison], {}


def _generated(twin: Twin, case: Case, writing: Writing, writer: Writer, scenario: Scenario) -> Generated:
    found: Generated = twin.once(
        f"write {scenario.name} {scenario.stop}",
        case,
        lambda: writer.generate(writing.prompts, **writing.options(), **scenario.options()),
    )
    return found


def _generated_again(twin: Twin, case: Case, writing: Writing, writer: Writer, scenario: Scenario) -> Generated:
    """By a generator that has written before, with the last row first; given back with the first row first."""
    prompts, asked = writing.in_reverse(), scenario.in_reverse()
    found: Generated = twin.once(
        f"write {scenario.name} {scenario.stop} in reverse",
        case,
        lambda: writer.generate(prompts.prompts, **prompts.options(), **asked.options()),
    )
    return Generated(**{name: part[::-1] for name, part in vars(found).items()})


def with_ends(judge: Twin, case: Case, writing: Writing) -> list[Scenario]:
    """The scenarios with stop tokens and sequences that end some rows early, found by writing without."""
    greedy, sampled, penalised = scenarios(case.config, writing)
    with judge.writers(case) as make:
        writer = make(case)
        free, drawn = (
            writer.generate(writing.prompts, **writing.options(), **one.options()).tokens for one in (greedy, sampled)
        )
    stop = (int(free[0, min(2, free.shape[1] - 1)]),)
    # sequences end the first two rows, a token the third; the last goes on for as long as it can
    early, last = {*drawn[0, :3].tolist(), *drawn[1, :5].tolist()}, drawn[3].tolist()
    able = [token for token in drawn[2, 3:].tolist() if token not in early] or drawn[2, -1:].tolist()
    ending = max(able, key=lambda token: _first(token, last))
    # another stop token stands before it, which ends no row before it does, the last one as late as may be
    taken = early | set(drawn[2].tolist()[: drawn[2].tolist().index(ending) + 1])
    others = [token for token in range(case.config.vocab_size) if token not in taken]
    tokens = (*(max(others, key=lambda token: _first(token, last)) for _ in others[:1]), ending)
    # the last of these stands across the prompt's end and what is written, where nothing ends
    across = (int(writing.prompts[3, -1]), int(drawn[3, 0]))
    sequences = (tuple(map(int, drawn[0, 1:3])), tuple(map(int, drawn[1, 2:5])), across)
    return [
        greedy.ending(StopConfig(tokens=stop)),
        sampled.ending(StopConfig(tokens=tokens, sequences=tuple(one for one in sequences if one))),
        penalised,
    ]


def _first(token: int, tokens: Sequence[int]) -> int:
    """Where a token stands first; their number where it does not."""
    return tokens.index(token) if token in tokens else len(tokens)


def _live(found: Generated) -> Flags:
    """What a generator wrote before each row's end."""
    return np.arange(found.tokens.shape[1]) < found.lengths[:, None]


def _logits_under(judge: Twin, case: Case, writing: Writing, tokens: Array, real: Flags) -> FloatArray:
    """Of every token after the prompts, ``[B, M, V]``: what the model gives for it in one call."""
    rows = np.arange(len(tokens))
    with judge.decoders(case) as make:
        output = widened(make(case).full(writing.inputs(rows, np.where(real, tokens, 0), real))[0])
    return np.take_along_axis(output, writing.places(rows, real)[..., None], 1)


def _check_tokens(writing: Writing, scenario: Scenario, found: Generated, logits: FloatArray) -> list[str]:
    """Every token, length, end and filler of every row."""
    problems = []
    for b, row in enumerate(found.tokens):
        label = f"{scenario.name}, row {b}"
        length = int(found.lengths[b])
        seen = np.zeros(logits.shape[-1], np.bool_)
        seen[writing.prompts[b][writing.real[b]]] = True
        for t in range(length):
            expected, margin = _expected(scenario, b, t, logits[b, t], seen)
            if expected != row[t] and margin > NOISE:
                problems.append(f"{label}: token {t}: expected {expected}, got {row[t]}, margin {margin:.0e}")
                break
            seen[row[t]] = True
        tokens = [int(token) for token in row[:length]]
        ends = reference.written_length(tokens, scenario.stop)
        if ends[0] != length or ends[1] != found.finished[b]:
            problems.append(
                f"{label}: expected {ends[0]} tokens, {'finished' if ends[1] else 'not finished'}, got {length}, "
                f"finished {bool(found.finished[b])}"
            )
        if not ends[1] and length != scenario.new:
            problems.append(f"{label}: expected {scenario.new} tokens where nothing ends it, got {length}")
        if (row[length:] != PAD).any() or np.any(found.logprobs[b, length:]):
            problems.append(f"{label}: expected {PAD} with log-probability 0 after its end, got others")
    if found.tokens.shape[1] != found.lengths.max():
        problems.append(f"{scenario.name}: expected as many columns as the longest row, got {found.tokens.shape[1]}")
    return problems


def _expected(scenario: Scenario, b: int, t: int, logits: FloatArray, seen: npt.NDArray[np.bool_]) -> tuple[int, float]:
    """The token, and by how much it is chosen."""
    x = logits if scenario.allowed is None else np.where(scenario.allowed[b, t], logits, -np.inf)
    if scenario.sampling is None:
        best = np.sort(x[np.isfinite(x)])[-2:]
        return reference.greedy(x), float(best[-1] - best[0]) if len(best) > 1 else np.inf
    x = reference.processed(x, seen, scenario.sampling)
    uniform = float(philox.uniforms(SEED, [scenario.sequences[b]], t)[0])
    return reference.draw(x, uniform), reference.draw_margin(x, uniform)


def _logprobs(tokens: Array, real: Flags, logits: FloatArray) -> FloatArray:
    """Of every token that is real, 0 elsewhere."""
    chosen = np.where(real, tokens, 0)[..., None]
    return np.where(real, np.take_along_axis(reference.log_softmax(logits), chosen, -1)[..., 0], 0.0)


# ---- beams


def searched(twin: Twin, judge: Twin, case: Case, writing: Writing) -> tuple[Problems, int]:
    """What one twin finds by beams; also how many hypotheses were looked at."""
    problems: list[str] = []
    count = 0
    stop = judge.once("ends", case, lambda: with_ends(judge, case, writing))[0].stop.tokens
    for search in searches(case.config, writing, stop):
        asked = _weighted(case, search)
        label = f"{search.name} {search.stop}"
        found = twin.once(f"search {label}", asked, partial(_search, twin, asked, writing, search))
        expected = judge.once(f"search by hand {label}", asked, partial(by_hand, judge, asked, writing, search))
        for b, best in enumerate(expected):
            count += len(best)
            problems += _check_beams(f"{search.name}, row {b}", search, found, b, best)
    long = long_search(case.config, writing)
    if long is not None:
        asked = _weighted(case, long)
        found = twin.once(f"search {long.name}", asked, partial(_search, twin, asked, writing, long))
        count += int((found.lengths > 0).sum())
        problems += _check_sums(judge, asked, writing, long, found)
    return {"beam_search": problems} if problems else {}, count


def _check_sums(judge: Twin, case: Case, writing: Writing, search: Search, found: Beams) -> list[str]:
    """Whether hypotheses are as likely as a search says, by one full forward: too long to be searched for by hand."""
    problems = []
    for i in range(search.beam.num_best):
        tokens = found.tokens[:, i]
        real = np.arange(tokens.shape[1]) < found.lengths[:, i, None]
        sums = _logprobs(tokens, real, _logits_under(judge, case, writing, tokens, real)).sum(1)
        for b, total in enumerate(sums):
            label, length = f"{search.name}, row {b}, rank {i}", int(found.lengths[b, i])
            if length != search.new:
                problems.append(f"{label}: expected {search.new} tokens where nothing ends it, got {length}")
            if not abs(float(found.logprobs[b, i]) - total) <= NOISE * max(1.0, abs(total)):
                problems.append(f"{label}: expected the sum {total:.12g}, got {found.logprobs[b, i]:.12g}")
    return problems


def _search(twin: Twin, case: Case, writing: Writing, search: Search) -> Beams:
    options: dict[str, Any] = {
        "max_new_tokens": search.new,
        "beam": search.beam,
        "stop": StopConfig(tokens=search.stop),
        "allowed": search.allowed,
        "pad_id": PAD,
    }
    with twin.writers(case) as make:
        return make(case).search(writing.prompts, **writing.options(), **options)


def by_hand(judge: Twin, case: Case, writing: Writing, search: Search) -> list[list[reference.Hypothesis]]:
    """The reference's search for every row, with one full forward in each step."""

    def logits_after(decoder: Decoder, b: int, hypotheses: Sequence[tuple[int, ...]]) -> FloatArray:
        rows = np.full(len(hypotheses), b)
        tokens = np.array(hypotheses, np.int64).reshape(len(hypotheses), -1)
        return widened(decoder.full(writing.inputs(rows, tokens, np.ones(tokens.shape, np.bool_)))[0][:, -1])

    with judge.decoders(case) as make:
        decoder = make(case)
        return [
            reference.search(
                partial(logits_after, decoder, b),
                max_new_tokens=search.new,
                beam=search.beam,
                stop=search.stop,
                allowed=search.allowed[b % len(search.allowed)],
            )
            for b in range(len(writing.prompts))
        ]


def _check_beams(
    label: str, search: Search, found: Beams, b: int, expected: Sequence[reference.Hypothesis]
) -> list[str]:
    there = int((found.lengths[b] > 0).sum())
    if there != len(expected):
        return [f"{label}: expected {len(expected)} hypotheses, got {there}"]
    missing = slice(there, None)
    if not (np.isneginf(found.scores[b, missing]).all() and np.isneginf(found.logprobs[b, missing]).all()):
        return [f"{label}: expected -inf where there is no hypothesis, got other scores"]
    ours = [
        (tuple(map(int, found.tokens[b, i, : found.lengths[b, i]])), float(found.scores[b, i])) for i in range(there)
    ]
    theirs = [(one.tokens, one.score) for one in expected]
    if search.weights == "zero":  # here the order is all that there is to see
        problems = [
            f"{label}, rank {i}: expected {list(other[0])}, got {list(one[0])}"
            for i, (one, other) in enumerate(zip(ours, theirs, strict=True))
            if one[0] != other[0]
        ]
    else:
        problems = list(compare_beams(label, ours, theirs, noise=NOISE).problems)
    for i, one in enumerate(expected):
        if ours[i][0] != one.tokens:
            continue
        if bool(found.finished[b, i]) != one.finished:
            problems.append(f"{label}, rank {i}: expected finished {one.finished}, got {bool(found.finished[b, i])}")
        if not abs(float(found.logprobs[b, i]) - one.total) <= NOISE:
            problems.append(f"{label}, rank {i}: expected the sum {one.total:.12g}, got {found.logprobs[b, i]:.12g}")
        if (found.tokens[b, i, len(one.tokens) :] != PAD).any():
            problems.append(f"{label}, rank {i}: expected {PAD} after its end, got others")
    return problems


def _weighted(case: Case, search: Search) -> Case:
    """The case with the weights that a search asks for."""
    if search.weights == "plain":
        return case
    factors = {path: 0.0 if search.weights == "zero" else _flat_factor(path) for path in case.tensors}
    return dataclasses.replace(case, tensors={path: leaf * factors[path] for path, leaf in case.tensors.items()})


def _flat_factor(path: str) -> float:
    """What makes logits small: the head, or the tables that it may be tied to."""
    return 0.02 if path.startswith("head.") or path.endswith("tokens.weight") else 1.0
