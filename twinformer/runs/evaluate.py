"""What a trained model can do, on data that it did not learn from, beside what rules without learning reach."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from twinformer.data.batch import Dataset
from twinformer.errors import ConfigError, Problems
from twinformer.learning import Evaluation
from twinformer.runs import backends, session
from twinformer.runs.data import KINDS, parse
from twinformer.runs.intervals import wilson
from twinformer.runs.measures import Report
from twinformer.runs.options import RunOptions
from twinformer.runs.subjects import Subject, batches, total


def evaluate(
    subject: Subject,
    *,
    data: str | None = None,
    backend: str = "torch",
    batch_size: int = 32,
    train_file: Path | None = None,
    limit: int | None = None,
    transposition: int | None = None,
    adapt: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Report:
    """Measure a model. ``data`` None: that of its run, the part that it did not learn from.

    ``train_file``: what n-gram baselines learn from, where the model is of no run that says. ``limit``: so many
    sequences, pieces or batches at most. ``transposition`` N: pieces are also measured by the mean of what the
    model says of them moved by -N to +N half-tones; ``adapt``: while the model learns from them. ``tell`` hears how far
    that is. Raises ConfigError where the data does not fit the model.
    """
    spec = data or (subject.options.data if subject.options is not None else None)
    if spec is None:
        raise ConfigError("data", [f"expected a specification ({', '.join(KINDS)}), got none: the model is of no run"])
    kind, file = parse(spec, there=data is not None)
    if subject.config.architecture not in KINDS[kind]:
        wanted = ", ".join(KINDS[kind])
        raise ConfigError(
            "data", [f"{spec}: expected a model that is one of {wanted}, got {subject.config.architecture!r}"]
        )
    problems = Problems("evaluate", ConfigError)
    for name, asked in (("transposition", transposition is not None), ("adapt", adapt)):
        problems.expect(kind == "guitar" or not asked, f"{name}: expected pieces (guitar:FILE), got data {spec}")
    problems.raise_if_any()
    backends.prepare((backend,), subject.config.param_dtype)
    report = Report(f"{subject.directory} on {spec}", {"data": spec, "backend": backend, "step": subject.step})
    if kind == "guitar-tab":
        from twinformer.runs.evaluate_guitar import tablature

        tablature(report, subject, backend, batch_size, limit)
    elif kind == "guitar":
        from twinformer.runs.evaluate_guitar import pieces

        place = None if data is None else file
        pieces(report, subject, backend, batch_size, place, train_file, limit, transposition, adapt, tell)
    else:
        with tempfile.TemporaryDirectory(prefix="twinformer-") as scratch:
            dataset = _texts(kind, subject, None if data is None else file, Path(scratch), batch_size)
            found = total(subject, backend, batches(dataset, limit))
            _add_loss(report, "model", found)
    return report


def _add_loss(report: Report, system: str, found: Evaluation) -> None:
    report.facts["targets"] = found.count
    report.add(system, "nats per target", found.loss)
    report.add(system, "perplexity", math.exp(found.loss) if found.loss < 700 else math.inf)
    report.add(system, "accuracy", found.accuracy, wilson(found.correct, found.count), share=True)


# ---- texts


def _texts(kind: str, subject: Subject, file: Path | None, scratch: Path, batch_size: int) -> Dataset:
    """The data set of a file, in the tokenizer of the model; without one, the validation part of the run."""
    from twinformer.data.masked import MaskedText
    from twinformer.data.pair_files import PairTokens
    from twinformer.data.pairs import Pairs
    from twinformer.data.text import PackedText
    from twinformer.data.tokens import TokenFile
    from twinformer.runs import texts
    from twinformer.tokenization import Tokenizer

    tokenizer = Tokenizer.load(subject.directory)
    if tokenizer.vocab_size != subject.config.vocab_size:
        wanted = f"expected one of {subject.config.vocab_size} tokens, got {tokenizer.vocab_size}"
        raise ConfigError(f"tokenizer of {subject.directory}", [wanted])
    options = subject.options or RunOptions()
    if file is None:
        tokens = TokenFile(cast(Path, subject.run) / session.DATA / "valid.tokens")
    else:
        tokens = texts.write(kind, options, scratch / "tokens", file, tokenizer)
    plain: dict[str, Any] = {"batch_size": batch_size, "shuffle": False, "name": "evaluation"}
    N = subject.config.context_length
    if kind == "text":
        return PackedText(tokens, length=N, **texts.text_choices(tokenizer, options.mode), **plain)
    if kind == "masked":
        return MaskedText(tokens, length=N, **texts.masked_choices(tokenizer), **plain)
    two = subject.config.architecture == "encoder-decoder"
    form, length = ("encoder-decoder", N) if two else ("decoder", (N - 2) // 2)
    return Pairs(PairTokens(tokens), **texts.pair_choices(tokenizer, form, length), **plain)
