"""Outside witnesses: other people's implementation on the same weights, and published answers.

They speak to what the twins cannot prove alone: that they are not wrong together.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from twinformer.parity.compare import Comparison, FloatArray, compare
from twinformer.parity.evidence import Evidence
from twinformer.parity.judge import CannotJudgeError
from twinformer.parity.report import Report
from twinformer.parity.sentences import PUBLISHED_SIMILARITIES
from twinformer.parity.subjects import SENTENCE_ENCODER, Subject
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
    states: dict[str, FloatArray] = {}
    if name is not None:
        if name not in WITNESSES:
            raise CannotJudgeError("witness", [f"expected one of {', '.join(WITNESSES)}, got {name!r}"])
        directory = subject.directory
        if directory is None or subject.published is None:
            raise CannotJudgeError(
                "witness", [f"{name}: expected a published model directory to load, got a model of ours"]
            )
        if importlib.util.find_spec("transformers") is None:
            raise CannotJudgeError(
                "witness", ["transformers: expected it installed (pip install 'transformers>=5,<6')"]
            )
        found.append(lambda evidence, report: _ask_transformers(directory, evidence, report, states))
    if subject.case.name == SENTENCE_ENCODER:
        found.append(lambda evidence, report: _published_similarities(subject, evidence, report, states))
    return found


def _ask_transformers(directory: Path, evidence: Evidence, report: Report, states: dict[str, FloatArray]) -> None:
    """Every layer's hidden states against the original's, in float64, at real positions.

    At padded positions the original has values of its own kind, which nothing reads.
    """
    states |= transformers_states(directory, evidence.case.inputs)
    real = evidence.case.inputs["padding_mask"]
    comparisons: list[Comparison] = []
    for twin, run in zip(evidence.twins, evidence.runs("float64"), strict=True):
        ours = {"embedding": run.modules["embedding"]}
        ours |= {path: seen for path, seen in run.modules.items() if path.split(".")[-2:-1] == ["blocks"]}
        comparisons += [
            compare(f"{path} of {twin.name}", seen[real], states[path][real], bound=_BOUND)
            for path, seen in ours.items()
        ]
    checked = f"{len(states)} layers in float64, {int(real.sum())} real positions"
    report.witnesses["transformers"] = rung_of(checked, comparisons)


def transformers_states(directory: Path, inputs: dict[str, np.ndarray]) -> dict[str, FloatArray]:
    """The original implementation's hidden states in float64, by our paths: embeddings, then each block."""
    import transformers

    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = transformers.AutoModel.from_pretrained(
        directory, local_files_only=True, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    options = {"token_type_ids": torch.from_numpy(inputs["token_types"])} if "token_types" in inputs else {}
    with torch.no_grad():
        output = model(
            input_ids=torch.from_numpy(inputs["tokens"]),
            attention_mask=torch.from_numpy(inputs["padding_mask"].astype(np.int64)),
            output_hidden_states=True,
            **options,
        )
    hidden = [state.numpy() for state in output.hidden_states]
    return {"embedding": hidden[0], **{f"stack.blocks.{i}": state for i, state in enumerate(hidden[1:])}}


def _published_similarities(
    subject: Subject, evidence: Evidence, report: Report, states: dict[str, FloatArray]
) -> None:
    """Sentence similarities, to the four decimals in which they were published."""
    real = evidence.case.inputs["padding_mask"]
    vectors = {
        twin.name: sentence_vectors(run.output, real)
        for twin, run in zip(evidence.twins, evidence.runs("float64"), strict=True)
    }
    if states:
        vectors["transformers"] = sentence_vectors(list(states.values())[-1], real)
    problems = []
    for one, other, published in PUBLISHED_SIMILARITIES:
        i, j = subject.sentences.index(one), subject.sentences.index(other)
        found = {who: float(vector[i] @ vector[j]) for who, vector in vectors.items()}
        report.answers.append({"what": f"\u201c{one}\u201d ~ \u201c{other}\u201d", "published": published, **found})
        problems += [
            f"{who}: similarity of {one!r} and {other!r}: expected {published:.4f}, got {value:.6f}"
            for who, value in found.items()
            if not abs(value - published) <= _HALF_A_DIGIT
        ]
    checked = f"{len(PUBLISHED_SIMILARITIES)} similarities by {len(vectors)} implementations"
    report.witnesses["published answers"] = Rung("differ" if problems else "agree", checked, [], problems)


def sentence_vectors(hidden: FloatArray, real: np.ndarray) -> FloatArray:
    """One unit vector a sentence: the mean of its real tokens' states ``[B, T, D]``, divided by its L2 norm.

    Reimers & Gurevych 2019, arXiv:1908.10084.
    """
    weights = real[:, :, None].astype(np.float64)
    mean = (np.where(weights > 0, hidden, 0.0)).sum(1) / weights.sum(1)
    vectors: FloatArray = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
    return vectors
