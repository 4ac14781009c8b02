"""The ``twinformer`` command.

Exit codes: 0 the twins agree, 1 they differ, 2 the question could not be answered (bad input, a missing framework).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from twinformer.checkpoint import write_atomically
from twinformer.errors import TwinformerError
from twinformer.presets import PRESETS, preset

CANNOT_RUN = 2
INTERRUPTED = 130

app = typer.Typer(
    name="twinformer",
    help="One transformer, written twice: PyTorch and Flax, and a judge that proves they agree.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_out = Console()
_err = Console(stderr=True)


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
        typer.Option(help="Only these rungs of the ladder, separated by commas. All that can run if left out."),
    ] = None,
    witness: Annotated[
        str | None, typer.Option(help="Also ask an outside implementation about a published model: 'transformers'.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights (presets) and inputs.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything that was found to FILE.")
    ] = None,
) -> None:
    """Load the same weights into both twins and judge whether they agree.

    Prints the ladder of checks and a verdict. Exit code 0: agree, 1: differ, 2: cannot run or cannot tell.
    """
    with _told_plainly():
        _need("torch", "jax", "flax")
        if json_file is not None:
            _check_writable(json_file)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import jax

        jax.config.update("jax_enable_x64", True)  # type: ignore[no-untyped-call]
        from twinformer.parity.judge import check_rungs, judge
        from twinformer.parity.rungs import RUNNABLE
        from twinformer.parity.subjects import find
        from twinformer.parity.witness import witnesses_for

        wanted = RUNNABLE if rungs is None else tuple(name.strip() for name in rungs.split(",") if name.strip())
        check_rungs(wanted)
        with _err.status("reading the model") as status:
            found = find(subject, seed)
            witnesses = witnesses_for(found, witness)
            report = judge(found.case, rungs=wanted, witnesses=witnesses, progress=status.update)
        if found.published is not None and found.published.left_out:
            report.notes.append(f"in the file but not part of our model: {', '.join(found.published.left_out)}")
        if found.published is not None and found.published.unknown_fields:
            report.notes.append(f"unknown fields of config.json: {', '.join(found.published.unknown_fields)}")
        _out.print(report)
        if json_file is not None:
            text = json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n"
            write_atomically(json_file, lambda part: part.write_text(text, encoding="utf-8"))
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


@contextlib.contextmanager
def _told_plainly() -> Iterator[None]:
    """Expected errors become one message and exit code 2; Ctrl-C ends quietly.

    An error that nobody expected must not look like a verdict: it ends with exit code 2 too, and
    TWINFORMER_TRACEBACK=1 shows where it came from.
    """
    try:
        yield
    except (TwinformerError, OSError) as error:
        _err.print(f"twinformer: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(CANNOT_RUN) from None
    except typer.Exit:
        raise
    except Exception as error:
        if os.environ.get("TWINFORMER_TRACEBACK") == "1":
            raise
        message = f"twinformer: a defect of ours, {type(error).__name__}: {error}"
        _err.print(message, style="red", markup=False, highlight=False)
        _err.print("twinformer: TWINFORMER_TRACEBACK=1 shows where; nothing was judged")
        raise typer.Exit(CANNOT_RUN) from None
    except KeyboardInterrupt:
        _err.print("twinformer: interrupted")
        raise typer.Exit(INTERRUPTED) from None


def _need(*packages: str) -> None:
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    if absent:
        raise TwinformerError(
            "installation",
            [f"{package}: expected it installed (pip install 'twinformer[torch,flax]')" for package in absent],
        )


def _check_writable(file: Path) -> None:
    """Before the work, not after it."""
    problems = []
    if file.is_dir():
        problems.append(f"expected a file to write, got a directory: {file}")
    elif not file.absolute().parent.is_dir():
        problems.append(f"expected a directory to write into, got nothing by that name: {file.absolute().parent}")
    elif not os.access(file.absolute().parent, os.W_OK):
        problems.append(f"expected a directory that can be written, got one that cannot: {file.absolute().parent}")
    if problems:
        raise TwinformerError("--json", problems)


if __name__ == "__main__":
    main()
