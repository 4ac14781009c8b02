"""Outside witnesses: other people's implementation on the same weights, and published answers.

They speak to what the twins cannot prove alone: that they are not wrong together.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import torch

import flax_impl.losses
import torch_impl.losses
from twinformer.parity.case import make_case
from twinformer.parity.compare import Comparison, FloatArray, compare
from twinformer.parity.evidence import Evidence
from twinformer.parity.judge import CannotJudgeError
from twinformer.parity.original import Answer, Flags, Ids, Original, in_rows
from twinformer.parity.report import Report
from twinformer.parity.sentences import PUBLISHED_SIMILARITIES
from twinformer.parity.subjects import SENTENCE_ENCODER, Subject, encoded
from twinformer.parity.verdict import Rung, rung_of

Witness = Callable[[Evidence, Report], None]
WITNESSES = ("transformers",)

# like the forward rung between the twins, with one order more for another person's order of operations
_BOUND = 1e-11
# published similarities are given to four decimals
_HALF_A_DIGIT = 5e-5


def witnesses_for(subject: Subject, name: str | None) -> list[Witness]:
    """The witnesses that can speak about a subject. Raises CannotJudgeError where the one asked for cannot."""
    found: list[Witness] = []
    original: Original | None = None
    if name is not None:
        if name not in WITNESSES:
            raise CannotJudgeError("witness", [f"expected one of {', '.join(WITNESSES)}, got {name!r}"])
        if subject.directory is None or subject.published is None:
            raise CannotJudgeError(
                "witness", [f"{name}: expected a published model directory to load, got a model of ours"]
            )
        if importlib.util.find_spec("transformers") is None:
            raise CannotJudgeError(
                "witness", ["transformers: expected it installed (pip install 'transformers>=5,<6')"]
            )
        original = Original(subject.directory, subject.published)
        found.append(functools.partial(ask_transformers, original))
    if subject.case.name == SENTENCE_ENCODER:
        found.append(functools.partial(_published_similarities, subject, original))
    return found


def ask_transformers(original: Original, evidence: Evidence, report: Report) -> None:
    """Every state, the output and the loss of both twins against the original's, in float64, at real positions.

    At padded positions the original has values of its own kind, which nothing reads.
    """
    began = time.perf_counter()
    evidence.progress(original.name)
    answer = original.answer(evidence.case.inputs)
    case, runs = evidence.case, evidence.runs("float64")
    if any(not np.array_equal(answer.inputs[name], given) for name, given in case.inputs.items()):
        case = dataclasses.replace(case, inputs=answer.inputs).in_dtype("float64")
        first, second = (twin.run(case) for twin in evidence.twins)
        runs = (first, second)
    seen = _seen(original, answer)
    comparisons: list[Comparison] = []
    problems: list[str] = []
    for twin, run in zip(evidence.twins, runs, strict=True):
        problems += [f"{path}: expected in {twin.name}, got none" for path in answer.states if path not in run.modules]
        pairs = {path: (run.modules[path], state) for path, state in answer.states.items() if path in run.modules}
        pairs["output"] = (run.output, answer.output)
        comparisons += [
            compare(f"{path} of {twin.name}", _at(ours, seen[path]), _at(theirs, seen[path]), bound=_BOUND)
            for path, (ours, theirs) in pairs.items()
        ]
        if answer.labels is not None and answer.loss is not None:
            loss = np.array(_loss(twin.name, original, run.output, answer.labels))
            comparisons.append(compare(f"loss of {twin.name}", loss, np.array(answer.loss), bound=_BOUND))
    places = sum(int(answer.inputs[name].sum()) for name in ("padding_mask", *_SIDES) if name in answer.inputs)
    told = "output and loss" if answer.loss is not None else "output"
    checked = f"{len(answer.states)} states, {told} in float64, {places} real positions"
    rung = rung_of(checked, comparisons, problems)
    rung.notes = [original.name, *_not_compared(original, answer)]
    rung.seconds = time.perf_counter() - began
    report.witnesses["transformers"] = rung


_SIDES = ("source_padding_mask", "target_padding_mask")


def _seen(original: Original, answer: Answer) -> dict[str, Flags]:
    """Which places, or rows, of each state and of the output are compared."""
    inputs, config = answer.inputs, original.config
    if config.architecture == "encoder-decoder":
        source = inputs["source_padding_mask"]
        # a target whose source has nothing to see gets 0 here, and the mean of what is hidden there
        target = inputs["target_padding_mask"] & in_rows(source)[:, None]
        return {path: source if path.startswith(("source", "encoder")) else target for path in answer.states} | {
            "output": target
        }
    real = inputs["padding_mask"]
    output = original.rows(inputs) if answer.output.ndim == 2 else real
    return dict.fromkeys(answer.states, real) | {"output": output}


def _at(array: FloatArray, seen: Flags) -> FloatArray:
    """What is compared; all of it, where the shapes do not fit each other: the comparison says so."""
    return array[seen] if array.shape[: seen.ndim] == seen.shape else array


def _not_compared(original: Original, answer: Answer) -> list[str]:
    """What is left out, and why."""
    inputs, notes = answer.inputs, []
    if original.config.architecture == "encoder-decoder":
        empty = int((~in_rows(inputs["source_padding_mask"])).sum())
        if empty:
            notes.append(f"not compared: {empty} rows whose source is padding only")
    elif answer.output.ndim == 2 and not original.rows(inputs).all():
        empty = int((~original.rows(inputs)).sum())
        kind = "begin with padding" if original.config.architecture == "encoder" else "are padding only"
        notes.append(f"output not compared: {empty} rows that {kind}")
    if answer.loss is None and original.task != "none":
        notes.append("loss not compared: the original has none of ours on these inputs")
    return notes


def _loss(twin: str, original: Original, output: FloatArray, labels: Ids) -> float:
    """The twin's mean loss of its own output, for labels as the original takes them."""
    if output.ndim == 2:
        output, labels = output[:, None], labels[:, None]
    if original.task == "causal":
        output, labels = output[:, :-1], labels[:, 1:]
    real, targets = labels >= 0, np.maximum(labels, 0)
    if twin == "torch_impl":
        given = torch.from_numpy(output.copy()), torch.from_numpy(targets.copy())
        total, count = torch_impl.losses.cross_entropy(*given, real=torch.from_numpy(real))
        return float(torch_impl.losses.mean_loss(total, count))
    summed, places = flax_impl.losses.cross_entropy(jnp.asarray(output), jnp.asarray(targets), real=jnp.asarray(real))
    return float(flax_impl.losses.mean_loss(summed, places))


def _published_similarities(subject: Subject, original: Original | None, evidence: Evidence, report: Report) -> None:
    """Sentence similarities, to the four decimals in which they were published."""
    assert subject.published is not None
    began = time.perf_counter()
    evidence.progress("published similarities")
    sentences = list(dict.fromkeys(sentence for *pair, _ in PUBLISHED_SIMILARITIES for sentence in pair))
    inputs = encoded(subject.published, sentences)
    case = make_case(subject.case.name, subject.case.config, subject.case.tensors, inputs).in_dtype("float64")
    outputs = {twin.name: twin.run(case, detail="blocks").output for twin in evidence.twins}
    if original is not None:
        outputs["transformers"] = original.answer(inputs).output
    vectors = {who: sentence_vectors(output, inputs["padding_mask"]) for who, output in outputs.items()}
    problems = []
    for one, other, published in PUBLISHED_SIMILARITIES:
        i, j = sentences.index(one), sentences.index(other)
        found = {who: float(vector[i] @ vector[j]) for who, vector in vectors.items()}
        report.answers.append({"what": f"\u201c{one}\u201d ~ \u201c{other}\u201d", "published": published, **found})
        problems += [
            f"{who}: similarity of {one!r} and {other!r}: expected {published:.4f}, got {value:.6f}"
            for who, value in found.items()
            if not abs(value - published) <= _HALF_A_DIGIT
        ]
    checked = f"{len(PUBLISHED_SIMILARITIES)} similarities by {len(vectors)} implementations"
    rung = Rung("differ" if problems else "agree", checked, [], problems)
    rung.seconds = time.perf_counter() - began
    report.witnesses["published answers"] = rung


def sentence_vectors(hidden: FloatArray, real: np.ndarray) -> FloatArray:
    """One unit vector a sentence: the mean of its real tokens' states ``[B, T, D]``, divided by its L2 norm.

    Reimers & Gurevych 2019, arXiv:1908.10084.
    """
    weights = real[:, :, None].astype(np.float64)
    mean = (np.where(weights > 0, hidden, 0.0)).sum(1) / weights.sum(1)
    vectors: FloatArray = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
    return vectors
