"""Tablature and pieces measured, beside rules without learning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from twinformer.data.guitar.arpeggio_data import ArpeggioTabs
from twinformer.data.guitar.baselines import lowest_fret, viterbi
from twinformer.data.guitar.fretboard import pitch_of
from twinformer.data.guitar.ngram import NGram, augmented
from twinformer.data.guitar.pieces import GuitarPieces, load_pieces
from twinformer.data.guitar.tokens import count_notes
from twinformer.errors import ConfigError
from twinformer.runs import backends, session
from twinformer.runs.adaptation import Adaptation, Reading, read_total
from twinformer.runs.guitar import predict
from twinformer.runs.intervals import clustered, wilson
from twinformer.runs.measures import Report
from twinformer.runs.subjects import Subject, batches, total


def tablature(report: Report, subject: Subject, backend: str, batch_size: int, limit: int | None) -> None:
    """The test part: strings right per note and in whole sequences, beside the lowest fret and the cheapest path."""

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


def pieces(
    report: Report,
    subject: Subject,
    backend: str,
    batch_size: int,
    file: Path | None,
    train_file: Path | None,
    limit: int | None,
    transposition: int | None,
    adapt: bool,
    tell: Callable[[str], None],
) -> None:
    """Nats per token and per note, every token predicted once, beside n-grams of the training pieces.

    With ``transposition`` also of the model, and of the best n-gram, that read each piece in so many half-tones up and
    down at once; with ``adapt`` also of both as they learn from each piece while they predict it.
    """

    own = None if subject.run is None else subject.run / session.DATA
    file = file or cast(Path, own) / "valid.txt"
    pieces = load_pieces(file)[:limit]
    data = GuitarPieces(pieces, context_length=subject.config.context_length, batch_size=batch_size, training=False)
    if data.vocab_size != subject.config.vocab_size:
        wanted = f"expected a model of {data.vocab_size} note tokens, got one of {subject.config.vocab_size}"
        raise ConfigError(f"data {file}", [wanted])
    found = total(subject, backend, batches(data, None))
    notes = sum(map(count_notes, pieces))
    report.facts |= {"pieces": len(pieces), "tokens": found.count, "notes": notes}

    def add(system: str, nats: float, count: int) -> None:
        report.add(system, "nats per token", nats / count)
        report.add(system, "nats per note", nats / notes)

    add("model", found.total, found.count)
    report.add("model", "accuracy per token", found.accuracy, share=True)
    ids = [data.vocabulary.encode(one) for one in pieces]
    readings: dict[str, Reading] = {}
    if transposition is not None:
        readings["transposed"] = Reading(stride=data.stride, transposition=transposition)
    if adapt:
        readings["adapting"] = Adaptation(stride=min(Adaptation.stride, subject.config.context_length))
    for name, reading in readings.items():
        read = read_total(
            backends.make_trainer(backend, subject.config, reading.training()),
            subject.weights,
            ids,
            reading,
            context_length=subject.config.context_length,
            pad_id=data.pad_id,
            tell=lambda done, of, name=name: tell(f"{name}: {done} of {of} pieces are done"),  # type: ignore[misc]
        )
        add(f"model, {name}", *read)
        report.facts[name] = ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(reading).items())
    learnt = train_file or (own / "train.txt" if own is not None else None)
    if learnt is None:
        report.facts["baselines"] = "none: no training pieces are known"
        return
    examples = augmented([data.vocabulary.encode(one) for one in load_pieces(learnt)])
    for n in (1, 3, 5):
        add(f"{n}-gram" if n > 1 else "unigram", *NGram(examples, data.vocab_size, n).total(ids))
    best = NGram(examples, data.vocab_size, 7, "kneser-ney")
    add("7-gram, Kneser-Ney", *best.total(ids))
    for name, reading in readings.items():
        is_adapting = isinstance(reading, Adaptation)
        add(f"7-gram, {name}", *best.total(ids, transposition=reading.transposition, adapting=is_adapting))
