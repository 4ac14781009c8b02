"""What all commands share: where they print, how errors are told, and what is looked at before work begins.

Exit codes: 0 yes, 1 no, 2 the question could not be answered (bad input, a missing framework), 130 and 143 stopped.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import typer
from rich.console import Console

from twinformer.checkpoint import write_atomically
from twinformer.errors import TwinformerError

CANNOT_RUN = 2
INTERRUPTED = 130

out = Console()
err = Console(stderr=True)


@contextlib.contextmanager
def told_plainly(after: str = "nothing was judged") -> Iterator[None]:
    """Expected errors become one message and exit code 2; Ctrl-C ends quietly.

    An error that nobody expected must not look like a verdict: it ends with exit code 2 too, and
    TWINFORMER_TRACEBACK=1 shows where it came from. ``after`` says what that means for the work.
    """
    try:
        yield
    except (TwinformerError, OSError) as error:
        err.print(f"twinformer: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(CANNOT_RUN) from None
    except typer.Exit:
        raise
    except Exception as error:
        if os.environ.get("TWINFORMER_TRACEBACK") == "1":
            raise
        message = f"twinformer: a defect of ours, {type(error).__name__}: {error}"
        err.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
        err.print(f"twinformer: TWINFORMER_TRACEBACK=1 shows where; {after}", soft_wrap=True)
        raise typer.Exit(CANNOT_RUN) from None
    except KeyboardInterrupt:
        err.print("twinformer: interrupted")
        raise typer.Exit(INTERRUPTED) from None


def need(*packages: str, extra: str = "torch,flax") -> None:
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    if absent:
        raise TwinformerError(
            "installation",
            [f"{package}: expected it installed (pip install 'twinformer[{extra}]')" for package in absent],
        )


def check_writable(files: Mapping[str, Path | None]) -> None:
    """Before the work, not after it: each option with the file that it names."""
    problems = []
    for option, file in files.items():
        if file is None:
            continue
        if file.is_dir():
            problems.append(f"{option}: expected a file to write, got a directory: {file}")
        elif not file.absolute().parent.is_dir():
            problems.append(
                f"{option}: expected a directory to write into, got nothing by that name: {file.absolute().parent}"
            )
        elif not os.access(file.absolute().parent, os.W_OK):
            problems.append(
                f"{option}: expected a directory that can be written, got one that cannot: {file.absolute().parent}"
            )
    if problems:
        raise TwinformerError("output", problems)


def write(file: Path, text: str) -> None:
    write_atomically(file, lambda part: part.write_text(text, encoding="utf-8"))
