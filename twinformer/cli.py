"""The ``twinformer`` command.

Exit codes: 0 the twins agree, 1 they differ, 2 the question could not be answered (bad input, a missing framework).
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from twinformer.commands import bench
from twinformer.commands.common import check_writable as _check_writable
from twinformer.commands.common import err as _err
from twinformer.commands.common import need as _need
from twinformer.commands.common import out as _out
from twinformer.commands.common import told_plainly as _told_plainly
from twinformer.commands.common import write as _write
from twinformer.commands.convert import convert
from twinformer.commands.evaluate import evaluate
from twinformer.commands.generate import generate
from twinformer.commands.inspect import inspect
from twinformer.commands.train import train
from twinformer.errors import TwinformerError
from twinformer.presets import PRESETS, preset

app = typer.Typer(
    name="twinformer",
    help="One transformer, written twice: PyTorch and Flax, and a judge that proves they agree.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command()(train)
app.command()(evaluate)
app.command()(convert)
app.command()(inspect)
app.add_typer(bench.app, name="bench")


@app.callback()
def _root() -> None:
    """One transformer, written twice: PyTorch and Flax, and a judge that proves they agree."""


@app.command()
def parity(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="[DIR|PRESET]",
            help=f"A model directory (ours or a published one), 'sentence-encoder', or a preset: {', '.join(PRESETS)}.",
        ),
    ] = "sentence-encoder",
    rungs: Annotated[
        str | None,
        typer.Option(
            help="Only these rungs of the ladder, separated by commas, or 'all'. If left out, all but the slow ones."
        ),
    ] = None,
    witness: Annotated[
        str | None, typer.Option(help="Also ask an outside implementation about a published model: 'transformers'.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights (presets) and inputs.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything that was found to FILE.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one self-contained page to FILE.")
    ] = None,
) -> None:
    """Load the same weights into both twins and judge whether they agree.

    Prints the ladder of checks and a verdict. Exit code 0: agree, 1: differ, 2: cannot run or cannot tell.
    """
    with _told_plainly():
        _need("torch", "jax", "flax")
        _check_writable({"--json": json_file, "--html": html_file})
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import jax

        jax.config.update("jax_enable_x64", True)  # type: ignore[no-untyped-call]
        from twinformer.memory import keep_freed_memory
        from twinformer.parity.abreast import is_worth_it
        from twinformer.parity.judge import check_rungs, judge
        from twinformer.parity.opened import check_opened
        from twinformer.parity.rungs import BY_DEFAULT, LADDER
        from twinformer.parity.subjects import find
        from twinformer.parity.witness import witnesses_for

        if rungs is None:
            wanted = BY_DEFAULT
        elif rungs == "all":
            wanted = tuple(step.name for step in LADDER)
        else:
            wanted = tuple(name.strip() for name in rungs.split(",") if name.strip())
        check_rungs(wanted)
        keep_freed_memory()
        with _err.status("reading the model") as status:
            found = find(subject, seed)
            witnesses = witnesses_for(found, witness)
            if found.published is not None and found.directory is not None and "persistence" in wanted:
                witnesses.append(functools.partial(check_opened, found.directory))
            report = judge(
                found.case,
                rungs=wanted,
                witnesses=witnesses,
                progress=status.update,
                abreast=is_worth_it(found.case),
            )
        if found.published is not None and found.published.left_out:
            report.notes.append(f"in the file but not part of our model: {', '.join(found.published.left_out)}")
        if found.published is not None and found.published.unknown_fields:
            report.notes.append(f"unknown fields of config.json: {', '.join(found.published.unknown_fields)}")
        report.command = shlex.join(["twinformer", *sys.argv[1:]])
        _out.print(report)
        if json_file is not None:
            _write(json_file, json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n")
        if html_file is not None:
            from twinformer.parity.html import as_html

            _write(html_file, as_html(report))
        raise typer.Exit(report.exit_code)


@app.command()
def mutants(
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Entries of the catalogue; all if none.")
    ] = None,
    twin: Annotated[str | None, typer.Option(help="Only in this twin: torch_impl or flax_impl.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Worker processes; as many as cores if left out.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything that was found to FILE.")
    ] = None,
) -> None:
    """Plant every fault of the catalogue, one twin at a time, and see whether the judge finds it and names its place.

    Exit code 0: all were found, no control alarmed, at least 95 % of the culprits right; 1: not so; 2: cannot run.
    """
    with _told_plainly():
        _need("torch", "jax", "flax")
        _check_writable({"--json": json_file})
        from twinformer.parity.mutation import TWINS
        from twinformer.parity.mutation_report import MutationReport
        from twinformer.parity.mutation_workers import find_catalogue, run

        catalogue = find_catalogue()
        if catalogue is None:
            wanted = "expected a checkout of the project with parity_tests/mutants, got an installed package alone"
            raise TwinformerError("mutants", [wanted])
        wrong = [
            f"expected an id of parity_tests/mutants/catalogue.tsv, got {i!r}" for i in catalogue.unknown(ids or ())
        ]
        if twin not in (None, *TWINS):
            wrong.append(f"--twin: expected one of {', '.join(TWINS)}, got {twin!r}")
        if wrong:
            raise TwinformerError("mutants", wrong)
        chosen = catalogue.chosen(ids or (), twin)
        absent = {i: why for i, why in catalogue.does_not_apply.items() if not ids or i in ids}
        report = MutationReport(len(chosen), absent)
        started, interrupted = time.perf_counter(), False
        found = run(chosen, jobs or os.cpu_count() or 1)
        try:
            with Progress(console=_err, transient=True) as bar:
                task = bar.add_task("planting", total=len(chosen))
                for one in found:
                    report.add(one)
                    bar.update(task, completed=len(report.outcomes), description=f"{one.case:20.20}")
        except KeyboardInterrupt:
            interrupted = True
        finally:
            found.close()
        report.seconds = time.perf_counter() - started
        _out.print(report)
        if json_file is not None:
            _write(json_file, json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n")
        if interrupted:
            raise KeyboardInterrupt
        raise typer.Exit(report.exit_code)


@app.command()
def config(
    name: Annotated[str, typer.Argument(metavar="PRESET", help=f"One of {', '.join(PRESETS)}.")],
) -> None:
    """Print the whole configuration of a preset as config.json, every choice named."""
    with _told_plainly():
        sys.stdout.write(preset(name).to_json())


def main() -> None:
    """Entry point of the command line."""
    app()


if __name__ == "__main__":
    main()
