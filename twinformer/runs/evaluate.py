"""What a trained model can do, on data that it did not learn from, beside what rules without learning reach."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from twinformer import pretrained
from twinformer.checkpoint import CONFIG_FILE, Tensors, read_model
from twinformer.config import ModelConfig
from twinformer.data.batch import Dataset
from twinformer.errors import CheckpointError, ConfigError
from twinformer.learning import Evaluation, TrainingConfig
from twinformer.runs import backends, session
from twinformer.runs.checkpoints import CheckpointStore
from twinformer.runs.data import KINDS, parse
from twinformer.runs.intervals import Interval, clustered, wilson
from twinformer.runs.options import OPTIONS_FILE, RunOptions, read_toml


@dataclass(frozen=True)
class Subject:
    """A model to measure. ``run``: the directory of the run it is of, if it is of one."""

    directory: Path
    config: ModelConfig
    weights: Tensors
    run: Path | None = None
    options: RunOptions | None = None
    step: int | None = None


@dataclass(frozen=True)
class Measure:
    """One line of a report: a share or a number of one system, with a 95 % interval where there is one."""

    system: str
    name: str
    value: float
    interval: Interval | None = None
    share: bool = False


@dataclass
class Report:
    """Everything that was measured. ``facts`` say on what."""

    title: str
    facts: dict[str, Any] = field(default_factory=dict)
    measures: list[Measure] = field(default_factory=list)

    def add(
        self, system: str, name: str, value: float, interval: Interval | None = None, *, share: bool = False
    ) -> None:
        self.measures.append(Measure(system, name, value, interval, share))

    def to_dict(self) -> dict[str, Any]:
        found = [
            {"system": one.system, "name": one.name, "value": one.value, "interval": one.interval}
            for one in self.measures
        ]
        return {"title": self.title, **self.facts, "measures": found}


def find(place: Path, *, checkpoint: str = "best", tell: Callable[[str], None] = lambda _: None) -> Subject:
    """A run's ``best`` (if it has none, last) checkpoint, its ``last``, that of a step; or a model directory."""
    if not (place / session.RUN_FILE).is_file():
        if not (place / CONFIG_FILE).is_file():
            raise CheckpointError(str(place), ["expected a run or a model directory, got neither"])
        if pretrained.is_published(place):
            published = pretrained.read(place)
            return Subject(place, published.config, dict(published.tensors))
        return Subject(place, *read_model(place))
    store = CheckpointStore(place / session.CHECKPOINTS, run=session.read_run(place)["run"], tell=tell)
    if checkpoint == "best":
        found = store.best() or store.last()
    elif checkpoint == "last":
        found = store.last()
    elif checkpoint.isdecimal():
        found = store.at(int(checkpoint))
    else:
        raise ConfigError("checkpoint", [f"expected best, last or a step, got {checkpoint!r}"])
    if found is None:
        raise CheckpointError(str(place), ["expected a run with a checkpoint, got one that has none yet"])
    config, weights = read_model(found.directory)
    options = RunOptions.from_dict(read_toml(place / OPTIONS_FILE))
    return Subject(found.directory, config, weights, place, options, found.step)


def evaluate(
    subject: Subject,
    *,
    data: str | None = None,
    backend: str = "torch",
    batch_size: int = 32,
    train_file: Path | None = None,
    limit: int | None = None,
) -> Report:
    """Measure a model. ``data`` None: that of its run, the part that it did not learn from.

    ``train_file``: what n-gram baselines learn from, where the model is of no run that says. ``limit``: so many
    sequences, pieces or batches at most. Raises ConfigError where the data does not fit the model.
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
    backends.prepare((backend,), subject.config.param_dtype)
    report = Report(f"{subject.directory} on {spec}", {"data": spec, "backend": backend, "step": subject.step})
    if kind == "guitar-tab":
        _tablature(report, subject, backend, batch_size, limit)
    elif kind == "guitar":
        _pieces(report, subject, backend, batch_size, None if data is None else file, train_file, limit)
    else:
        with tempfile.TemporaryDirectory(prefix="twinformer-") as scratch:
            dataset = _texts(kind, subject, None if data is None else file, Path(scratch), batch_size)
            found = total(subject, backend, _batches(dataset, limit))
            _add_loss(report, "model", found)
    return report


def total(subject: Subject, backend: str, batches: Iterable[Any]) -> Evaluation:
    """Sums over batches by the twin's own trainer."""
    trainer = backends.make_trainer(backend, subject.config, TrainingConfig())
    state = trainer.init(subject.weights)
    found = Evaluation()
    for batch in batches:
        found += trainer.evaluate(state, batch)
    return found


def _batches(dataset: Dataset, limit: int | None) -> Iterable[Any]:
    return (dataset.batch(number) for number in range(min(dataset.steps_per_epoch, limit or dataset.steps_per_epoch)))


def _add_loss(report: Report, system: str, found: Evaluation) -> None:
    report.facts["targets"] = found.count
    report.add(system, "nats per target", found.loss)
    report.add(system, "perplexity", math.exp(found.loss) if found.loss < 700 else math.inf)
    report.add(system, "accuracy", found.accuracy, wilson(found.correct, found.count), share=True)


# ---- guitar


def _tablature(report: Report, subject: Subject, backend: str, batch_size: int, limit: int | None) -> None:
    """The test part: strings right per note and in whole sequences, beside the lowest fret and the cheapest path."""
    from twinformer.data.guitar.arpeggio_data import ArpeggioTabs
    from twinformer.data.guitar.baselines import lowest_fret, viterbi
    from twinformer.data.guitar.fretboard import pitch_of
    from twinformer.runs.guitar import predict

    data = ArpeggioTabs("test", subject.config.architecture, batch_size=batch_size, size=limit)
    if data.vocab_size != subject.config.vocab_size:
        wanted = f"expected a model of {data.vocab_size} tokens, got one of {subject.config.vocab_size}"
        raise ConfigError("data guitar-tab", [wanted])
    chosen = data.sequences
    pitches = [sequence.pitches for sequence in chosen]
    model = backends.make_model(backend, subject.config, subject.weights)
    played = predict(data, chosen, backend, model)
    systems = {
        "model": [[string for string, _ in one] for one in played],
        "viterbi": viterbi(pitches),
        "lowest fret": [lowest_fret(one) for one in pitches],
    }
    sizes = np.array([len(one) for one in pitches])
    report.facts |= {"part": "test", "sequences": len(chosen), "notes": int(sizes.sum())}
    hits = {
        system: np.array([_equal(one, sequence.strings) for one, sequence in zip(found, chosen, strict=True)])
        for system, found in systems.items()
    }
    for system, right in hits.items():
        report.add(system, "string right, per note", right.sum() / sizes.sum(), clustered(right, sizes), share=True)
        whole = int((right == sizes).sum())
        report.add(system, "string right, whole sequence", whole / len(chosen), wilson(whole, len(chosen)), share=True)
    ahead = hits["model"] - hits["viterbi"]
    report.add(
        "model - viterbi", "string right, per note", ahead.sum() / sizes.sum(), clustered(ahead, sizes), share=True
    )
    sounding = [[pitch_of(*place) for place in one] for one in played]
    sounded = np.array([_equal(one, wanted) for one, wanted in zip(sounding, pitches, strict=True)])
    report.add("model", "pitch right, per note", sounded.sum() / sizes.sum(), clustered(sounded, sizes), share=True)


def _equal(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(a == b for a, b in zip(one, other, strict=True))


def _pieces(
    report: Report,
    subject: Subject,
    backend: str,
    batch_size: int,
    file: Path | None,
    train_file: Path | None,
    limit: int | None,
) -> None:
    """Nats per token and per note, every token predicted once, beside n-grams of the training pieces."""
    from twinformer.data.guitar.ngram import NGram, augmented
    from twinformer.data.guitar.pieces import GuitarPieces, load_pieces
    from twinformer.data.guitar.tokens import count_notes

    own = None if subject.run is None else subject.run / session.DATA
    file = file or cast(Path, own) / "valid.txt"
    pieces = load_pieces(file)[:limit]
    data = GuitarPieces(pieces, context_length=subject.config.context_length, batch_size=batch_size, training=False)
    if data.vocab_size != subject.config.vocab_size:
        wanted = f"expected a model of {data.vocab_size} note tokens, got one of {subject.config.vocab_size}"
        raise ConfigError(f"data {file}", [wanted])
    found = total(subject, backend, _batches(data, None))
    notes = sum(map(count_notes, pieces))
    report.facts |= {"pieces": len(pieces), "tokens": found.count, "notes": notes}

    def add(system: str, nats: float, count: int) -> None:
        report.add(system, "nats per token", nats / count)
        report.add(system, "nats per note", nats / notes)

    add("model", found.total, found.count)
    report.add("model", "accuracy per token", found.accuracy, share=True)
    learnt = train_file or (own / "train.txt" if own is not None else None)
    if learnt is None:
        report.facts["baselines"] = "none: no training pieces are known"
        return
    ids = [data.vocabulary.encode(one) for one in pieces]
    examples = augmented([data.vocabulary.encode(one) for one in load_pieces(learnt)])
    for n in (1, 3, 5):
        add(f"{n}-gram" if n > 1 else "unigram", *NGram(examples, data.vocab_size, n).total(ids))


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


def as_rows(report: Report) -> list[Mapping[str, str]]:
    """The measures as text, for a table."""

    def shown(value: float, share: bool) -> str:
        return f"{value:.1%}" if share else f"{value:.4g}"

    return [
        {
            "system": one.system,
            "measure": one.name,
            "value": shown(one.value, one.share),
            "95 % interval": "" if one.interval is None else " to ".join(shown(x, one.share) for x in one.interval),
        }
        for one in report.measures
    ]
