"""What a twin wrote, against one full forward over it; what it found by beams, against the reference's own search.

The full forward is that of the first twin's model, which the rungs below have judged; tokens, numbers, stopping and
search are the reference's (``sampling_reference.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from twinformer.decoding import Beams, Generated, StopConfig
from twinformer.parity import philox
from twinformer.parity import sampling_reference as reference
from twinformer.parity.case import Case
from twinformer.parity.compare import Comparison, FloatArray, compare, widened
from twinformer.parity.decoders import Decoder
from twinformer.parity.scenarios import PAD, SEED, Scenario, Search, Writing, scenarios, searches
from twinformer.parity.ties import compare_beams
from twinformer.parity.twins import Twin
from twinformer.parity.writers import Writer

Problems = dict[str, list[str]]
# values of logits after a processor, and log-probabilities
BOUND = 1e-12
# by how much scores of the same may differ, and choices tie: cached and full forward agree to 1e-13 of logits up to 100
NOISE = 1e-10


def written(
    twin: Twin, judge: Twin, case: Case, writing: Writing, which: str
) -> tuple[list[Comparison], Problems, int]:
    """What one twin writes in the scenario of that name; also how many tokens were looked at."""
    comparisons: list[Comparison] = []
    problems: list[str] = []
    count = 0
    with twin.writers(case) as make:
        writer = make(case)
        for scenario in judge.once("ends", case, lambda: with_ends(judge, case, writing)):
            if scenario.name != which:
                continue
            found = _generated(twin, case, writing, writer, scenario)
            logits = _logits_under(judge, case, writing, found)
            wrong = list(_check_tokens(writing, scenario, found, logits))
            problems += wrong
            count += int(found.lengths.sum())
            if not wrong:
                label = f"Generator (logprobs, {scenario.name}, {twin.name})"
                comparisons.append(compare(label, found.logprobs, _logprobs(found, logits), bound=BOUND))
    return comparisons, {"Generator": problems} if problems else {}, count


def rescored(twin: Twin, judge: Twin, case: Case, writing: Writing) -> tuple[list[Comparison], Problems]:
    """The greedy text once more: as a stream, and scored in one call."""
    greedy = judge.once("ends", case, lambda: with_ends(judge, case, writing))[0]
    with judge.writers(case) as make:
        found = _generated(judge, case, writing, make(case), greedy)
    live = np.arange(found.tokens.shape[1]) < found.lengths[:, None]
    expected = _logprobs(found, _logits_under(judge, case, writing, found))
    with twin.writers(case) as make:
        writer = make(case)
        steps = twin.once(
            f"stream {greedy.stop}",
            case,
            lambda: writer.stream(writing.prompts, **writing.options(), **greedy.options()),
        )
        scored = twin.once(
            f"score {greedy.stop}",
            case,
            lambda: writer.score(writing.prompts, found.tokens, continuation_mask=live, **writing.options()),
        )
    problems: list[str] = []
    for what, place, wanted in (("tokens", 0, found.tokens), ("live rows", 1, live)):
        got = np.stack([step[place] for step in steps], 1)
        if not np.array_equal(got, wanted):
            problems.append(f"stream: {what}: expected {wanted.tolist()}, got {got.tolist()}")
    comparisons = [compare(f"score ({greedy.name}, {twin.name})", scored, expected, bound=BOUND)]
    return comparisons, {"Generator.stream": problems} if problems else {}


def _generated(twin: Twin, case: Case, writing: Writing, writer: Writer, scenario: Scenario) -> Generated:
    found: Generated = twin.once(
        f"write {scenario.name} {scenario.stop}",
        case,
        lambda: writer.generate(writing.prompts, **writing.options(), **scenario.options()),
    )
    return found


def with_ends(judge: Twin, case: Case, writing: Writing) -> list[Scenario]:
    """The scenarios with stop tokens and sequences that end some rows early, found by writing without."""
    greedy, sampled = scenarios(case.config, writing)
    with judge.writers(case) as make:
        writer = make(case)
        free, drawn = (
            writer.generate(writing.prompts, **writing.options(), **one.options()).tokens for one in (greedy, sampled)
        )
    stop = (int(free[0, min(2, free.shape[1] - 1)]),)
    # sequences end the first two rows, a token the third; the last goes on for as long as it can
    early, last = {*drawn[0, :3].tolist(), *drawn[1, :5].tolist()}, drawn[3].tolist()
    able = [token for token in drawn[2, 3:].tolist() if token not in early] or drawn[2, -1:].tolist()
    ending = (max(able, key=lambda token: last.index(token) if token in last else len(last)),)
    # the last of these stands across the prompt's end and what is written, where nothing ends
    across = (int(writing.prompts[3, -1]), int(drawn[3, 0]))
    sequences = (tuple(map(int, drawn[0, 1:3])), tuple(map(int, drawn[1, 2:5])), across)
    return [
        greedy.ending(StopConfig(tokens=stop)),
        sampled.ending(StopConfig(tokens=ending, sequences=tuple(one for one in sequences if one))),
    ]


def _logits_under(judge: Twin, case: Case, writing: Writing, found: Generated) -> FloatArray:
    """Of every token that was written, ``[B, M, V]``: what the model gives for it in one call."""
    B, M = found.tokens.shape
    live = np.arange(M) < found.lengths[:, None]
    tokens = np.where(live, found.tokens, 0)
    with judge.decoders(case) as make:
        output = widened(make(case).full(writing.inputs(np.arange(B), tokens, live))[0])
    return np.take_along_axis(output, writing.places(np.arange(B), live)[..., None], 1)


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


def _logprobs(found: Generated, logits: FloatArray) -> FloatArray:
    """Of every token that was written, 0 after a row's end."""
    live = np.arange(found.tokens.shape[1]) < found.lengths[:, None]
    chosen = np.where(live, found.tokens, 0)[..., None]
    return np.where(live, np.take_along_axis(reference.log_softmax(logits), chosen, -1)[..., 0], 0.0)


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
    return {"beam_search": problems} if problems else {}, count


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
                allowed=search.allowed[0],
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
