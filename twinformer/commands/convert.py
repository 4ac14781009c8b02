"""``twinformer convert``: a model from one layout to the other."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from twinformer.commands.common import err, out, told_plainly


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A published directory, one of ours, or that of a run (its best).")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write, which must not exist.")],
    to: Annotated[str | None, typer.Option(help="ours or published; left out, the one that SOURCE is not.")] = None,
    family: Annotated[
        str | None, typer.Option(help="The published family, where SOURCE does not say: gpt2, llama, bert …")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16 or float64; left out, every bit stays as it is.")
    ] = None,
    max_shard_size: Annotated[
        float, typer.Option(min=1e-6, help="Gigabytes (10⁹ bytes) that a file of a published layout has at most.")
    ] = 5.0,
) -> None:
    """Write a model in our layout or in the one that its family is published in, bit for bit.

    What ``transformers`` loads back computes the same. OUT is there as a whole or not at all. Exit code 2 and one
    message where it cannot be done.
    """
    with told_plainly("nothing was written"):
        from twinformer import pretrained
        from twinformer.errors import CheckpointError, ConfigError
        from twinformer.pretrained.convert import convert as write

        problems = []
        if to not in (None, "ours", "published"):
            problems.append(f"--to: expected ours or published, got {to!r}")
        if family is not None and family not in pretrained.FAMILIES:
            problems.append(f"--family: expected one of {', '.join(sorted(pretrained.FAMILIES))}, got {family!r}")
        if dtype not in (None, "float64", "float32", "bfloat16", "float16"):
            problems.append(f"--dtype: expected float64, float32, bfloat16 or float16, got {dtype!r}")
        if problems:
            raise ConfigError("convert", problems)
        if not source.is_dir():
            raise CheckpointError(str(source), ["expected a directory, got none by that name"])
        place = model_of(source)
        layout: Any = to or ("ours" if pretrained.is_published(place) else "published")
        kind: Any = dtype
        with err.status("converting"):
            told = write(
                place,
                target,
                to=layout,
                family=family,
                dtype=kind,
                max_shard_size=round(max_shard_size * 10**9),
                open_pickled=pickles(),
            )
        names = ", ".join(told["files"])
        out.print(f"{target}: {told['parameters']:,} parameters in {told['dtype']}, {told['layout']}", highlight=False)
        out.print(f"family: {told['family'] or 'none'}; files: {names}", markup=False, highlight=False)
        if told["left_out"]:
            out.print(f"in SOURCE but not part of our model: {', '.join(told['left_out'])}", markup=False)


def model_of(source: Path) -> Path:
    """The model directory that is meant: the best one of a run, else the directory itself."""
    from twinformer.runs.session import RUN_FILE
    from twinformer.runs.subjects import find

    if not (source / RUN_FILE).is_file():
        return source
    return find(source).directory


def pickles() -> Any:
    """What reads pickled weights, where PyTorch is installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    return importlib.import_module("torch_impl.pickled").open_pickled
