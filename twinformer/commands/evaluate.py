"""``twinformer evaluate``: a model measured on data that it did not learn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from twinformer.commands.common import check_writable, err, out, told_plainly, write


def evaluate(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL_DIR", help="The directory of a run, or of a model.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="guitar-tab, guitar:FILE, text:FILE, pairs:FILE or masked:FILE; left out, what the run kept aside."
        ),
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="Of a run: best, last, or the number of a step.")] = "best",
    backend: Annotated[
        str | None, typer.Option(help="torch or flax; left out, the run's, or the one that is installed.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 32,
    train_file: Annotated[
        Path | None,
        typer.Option("--train", metavar="FILE", help="Pieces that n-gram baselines learn from, if the run has none."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many sequences, pieces or batches.")] = None,
    transposition: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Pieces: measure also the mean of what the model says of them moved by -N to +N half-tones.",
        ),
    ] = None,
    adapt: Annotated[
        bool,
        typer.Option(
            "--adapt",
            help="Pieces: measure also the model that learns from each piece, in nine transpositions, while it "
            "predicts it. Takes minutes.",
        ),
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything that was measured to FILE.")
    ] = None,
) -> None:
    """Measure a trained model, beside what rules without learning reach, with 95 % intervals.

    Tablature: strings right per note and in whole sequences, beside the lowest fret and the cheapest path (Viterbi).
    Pieces: nats per token and per note, beside n-grams; with --transposition 4 also read in nine transpositions at
    once, as the n-grams learn them; with --adapt by dynamic evaluation. Texts, pairs, masked texts: loss, perplexity,
    accuracy.
    """
    with told_plainly("nothing was measured"):
        check_writable({"--json": json_file})
        from rich.table import Table

        from twinformer.errors import ConfigError
        from twinformer.runs.backends import default_backend
        from twinformer.runs.evaluate import evaluate as measure
        from twinformer.runs.measures import as_rows
        from twinformer.runs.subjects import find

        if backend not in (None, "torch", "flax"):
            raise ConfigError("evaluate", [f"--backend: expected torch or flax, got {backend!r}"])
        with err.status("measuring") as status:
            subject = find(
                Path(model), checkpoint=checkpoint, tell=lambda text: err.print(text, markup=False, soft_wrap=True)
            )
            if backend is None:
                backend = subject.options.backends[0] if subject.options is not None else default_backend()
            report = measure(
                subject,
                data=data,
                backend=backend,
                batch_size=batch_size,
                train_file=train_file,
                limit=limit,
                transposition=transposition,
                adapt=adapt,
                tell=status.update,
            )
        rows = as_rows(report)
        table = Table(*rows[0], title=report.title, title_justify="left")
        for row in rows:
            table.add_row(*row.values())
        out.print(table)
        facts = ", ".join(f"{name} {value}" for name, value in report.facts.items() if value is not None)
        out.print(facts, markup=False, highlight=False, soft_wrap=True)
        if json_file is not None:
            write(json_file, json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n")
