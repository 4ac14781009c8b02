"""``twinformer inspect``: what a model directory holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from twinformer.commands.common import check_writable, out, told_plainly, write
from twinformer.commands.convert import model_of, pickles

_MEGABYTE = 10**6


def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A published directory, one of ours, or a run.")],
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all of it to FILE.")] = None,
) -> None:
    """Architecture, parameters by part, memory by dtype, and every convention that the checkpoint fixes.

    Only headers are read. A configuration that is not supported is refused with every field and the value met: exit
    code 2.
    """
    with told_plainly("nothing was inspected"):
        from twinformer.errors import CheckpointError
        from twinformer.pretrained.inspection import inspect as look

        check_writable({"--json": json_file})
        if not directory.is_dir():
            raise CheckpointError(str(directory), ["expected a directory, got none by that name"])
        found = look(model_of(directory), open_pickled=pickles())
        config = found.config
        layers = f"{config.num_layers} blocks"
        if config.num_encoder_layers:
            layers = f"{config.num_encoder_layers} + {layers}"
        out.print(
            f"{found.family or 'a directory of ours'}: {config.architecture}, {layers}, width {config.model_dim}, "
            f"{config.num_heads} heads on {config.num_kv_heads}, context {config.context_length}",
            highlight=False,
        )
        table = Table("part", "parameters", title="parameters", title_justify="left")
        table.columns[1].justify = "right"
        for name, count in _gathered(found.counts).items():
            table.add_row(name, f"{count:,}")
        table.add_row("all", f"{found.parameters:,}", style="bold")
        table.add_row("12 L D² (16 where it crosses)", f"{found.estimate:,}", style="dim")
        out.print(table)
        memory = ", ".join(f"{size / _MEGABYTE:,.1f} MB in {dtype}" for dtype, size in found.memory.items())
        out.print(f"weights: {memory}", highlight=False)
        if found.cache_per_token is not None:
            out.print(f"cache: {found.cache_per_token:,} bytes a token in {config.param_dtype}", highlight=False)
        table = Table("convention", "here", title="what this checkpoint fixes", title_justify="left")
        for name, (_, fields) in found.conventions.items():
            table.add_row(name, ", ".join(f"{field}={json.dumps(value)}" for field, value in fields.items()))
        out.print(table)
        if found.left_out:
            out.print(f"in the file but not part of our model: {', '.join(found.left_out)}", markup=False)
        if found.unknown_fields:
            out.print(f"unknown fields of config.json: {', '.join(found.unknown_fields)}", markup=False)
        if json_file is not None:
            write(json_file, json.dumps(found.to_dict(), indent=1) + "\n")


def _gathered(counts: dict[str, int]) -> dict[str, int]:
    """Blocks that follow each other and are equally large are one line."""
    lines: dict[str, int] = {}
    run: list[tuple[str, int]] = []

    def close() -> None:
        if len(run) > 1:
            first, last = run[0][0], run[-1][0].rpartition(".")[2]
            lines[f"{first} … {last}, each {run[0][1]:,}"] = sum(count for _, count in run)
        elif run:
            lines[run[0][0]] = run[0][1]
        run.clear()

    for name, count in counts.items():
        stack = name.rpartition(".")[0] if ".blocks." in name else None
        if run and (stack is None or stack != run[-1][0].rpartition(".")[0] or count != run[-1][1]):
            close()
        run.append((name, count))
    close()
    return lines
