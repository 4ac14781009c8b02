"""``twinformer train``: a run, begun or gone on with. Its flags are the fields of ``RunOptions``.

Exit codes: 0 it came to its end, 1 it diverged, 2 it could not run, 130 and 143 it was stopped (and saved).
"""

from __future__ import annotations

import inspect
import shutil
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from twinformer.commands.common import err, need, out, told_plainly
from twinformer.errors import ConfigError, TwinformerError

_TABLES = ("model", "optimizer", "schedule", "lora")

#: short flags for the entries of tables that are set most
_SHORT: dict[str, tuple[str, type, str]] = {
    "lr": ("schedule.peak", float, "Learning rate at its peak: schedule.peak."),
    "warmup": ("schedule.warmup_steps", int, "Steps of warm-up: schedule.warmup_steps."),
    "layers": ("model.num_layers", int, "Blocks: model.num_layers."),
    "width": ("model.model_dim", int, "Width of the model: model.model_dim."),
    "heads": ("model.num_heads", int, "Attention heads: model.num_heads."),
}

DIVERGED = 1


def train(**flags: Any) -> None:
    """Train a model: with no options at all, guitar tablature from the data that is built in, in about five minutes.

    Every option can stand in a TOML file (--options) too, and the run keeps all of them in its options.toml. A run that
    was stopped, by Ctrl-C, SIGTERM, --minutes or worse, goes on with --resume, in either twin.
    """
    with told_plainly("the checkpoints of the run are as they were"):
        need("tomli_w", extra="train")
        directory, resume, file, sets = (flags.pop(name) for name in ("out", "resume", "options", "set_"))
        asked = _asked(flags, file, sets)
        _go(directory, resume, asked)


def _asked(flags: Mapping[str, Any], file: Path | None, sets: list[str] | None) -> dict[str, Any]:
    """What was asked for: by the file, over it by flags, over these by --set."""
    from twinformer.runs.options import assignments, merge, read_toml

    asked = read_toml(file) if file is not None else {}
    given = {name: value for name, value in flags.items() if value is not None}
    for short, (path, _, _) in _SHORT.items():
        if short in given:
            table, name = path.split(".")
            asked = merge(asked, {table: {name: given.pop(short)}})
    return merge(merge(asked, given), assignments(sets or []))


def _go(directory: Path | None, resume: Path | None, asked: dict[str, Any]) -> None:
    from twinformer.memory import keep_freed_memory
    from twinformer.runs import session
    from twinformer.runs.backends import default_backend
    from twinformer.runs.loop import DivergedError
    from twinformer.runs.options import RunOptions
    from twinformer.runs.screen import Screen
    from twinformer.runs.signals import Signals

    if directory is not None and resume is not None:
        raise ConfigError("train", ["expected --out for a new run or --resume for one that is there, got both"])
    keep_freed_memory(all_of_it=True)
    screen = Screen(err)
    if resume is not None:
        place = resume
        session.read_run(place)
    else:
        options = RunOptions.from_dict({"backend": default_backend(), **asked})
        place = directory or _free(options.data)
    is_new = not place.exists()
    with session.locked(place):
        try:
            run = (
                session.begin(options, place, screen=screen)
                if resume is None
                else session.go_on(place, asked, screen=screen)
            )
        except TwinformerError:
            if is_new:  # it did not become a run, and takes no name from the next one
                shutil.rmtree(place, ignore_errors=True)
            raise
        screen.say(f"{place}: {_parameters(run)} on {run.options.data} with {' and '.join(run.trainers)}")
        signals = Signals()
        try:
            with signals:
                ending = run.go(signals)
        except DivergedError as error:
            err.print(f"twinformer: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(DIVERGED) from None
        finally:
            problem = session.draw(place)
            if problem is not None:
                screen.say(problem)
    _tell(place, ending)
    if ending.reason == "signal":
        raise typer.Exit(signals.exit_code)


def _parameters(run: Any) -> str:
    from math import prod

    from twinformer.parameters import model_parameters

    count = sum(prod(parameter.shape) for parameter in model_parameters(run.config).values())
    return f"{run.config.architecture} of {count:,} parameters"


def _tell(place: Path, ending: Any) -> None:
    told = {"finished": "finished", "early stop": "stopped early", "time": "time is up", "signal": "stopped"}
    lines = [f"{told[ending.reason]} after step {ending.step}, saved"]
    if ending.best is not None:
        best = ending.best
        lines.append(
            f"best validation at step {best['step']}: loss {best['loss']:.4f}, accuracy {best['accuracy']:.2%}"
        )
    if ending.largest_difference is not None:
        lines.append(f"the twins' losses were apart by at most {ending.largest_difference:.1e} of the larger")
    if ending.reason in ("signal", "time"):
        lines.append(f"go on with: twinformer train --resume {place}")
    else:
        lines.append(f"measure it with: twinformer evaluate {place}")
    for line in lines:
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def _free(data: str) -> Path:
    """The next number in ``runs/`` that is free."""
    kind = data.partition(":")[0]
    number = 1
    while (place := Path("runs") / f"{kind}-{number:03d}").exists():
        number += 1
    return place


def _signature() -> inspect.Signature:
    """The flags: those of this file, then one for each option of a run."""
    from twinformer.runs.options import RunOptions, described

    own: dict[str, tuple[Any, Any]] = {
        "out": (Path | None, typer.Option("--out", metavar="RUN", help="Directory of the new run; left out, runs/….")),
        "resume": (Path | None, typer.Option("--resume", metavar="RUN", help="Go on with the run in this directory.")),
        "options": (Path | None, typer.Option("--options", metavar="FILE", help="A TOML file of options.")),
        "set_": (
            list[str] | None,
            typer.Option("--set", metavar="TABLE.KEY=VALUE", help=f"Any entry of the tables {', '.join(_TABLES)}."),
        ),
    }
    for name, (hint, told) in described().items():
        if name not in _TABLES:
            default = getattr(RunOptions(), name)
            shown = "" if default is None or default is False else f" Default: {default}."
            flag = f"--{name.replace('_', '-')}"
            flags = (f"{flag}/--no-{flag[2:]}",) if hint is bool else (flag,)
            own[name] = (_plain(hint) | None, typer.Option(*flags, help=told.help + shown, show_default=False))
    for short, (_, kind, said) in _SHORT.items():
        own[short] = (kind | None, typer.Option(f"--{short}", help=said, show_default=False))
    return inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])
            for name, (kind, option) in own.items()
        ]
    )


def _plain(hint: Any) -> Any:
    """The type that the command line takes: choices are text here, and looked at with all other options."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    kind = next(option for option in options if option is not types.NoneType)
    return str if typing.get_origin(kind) is Literal else kind


train.__signature__ = _signature()  # type: ignore[attr-defined]
train.__annotations__ = {name: one.annotation for name, one in train.__signature__.parameters.items()}  # type: ignore[attr-defined]
