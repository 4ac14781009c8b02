"""A run's directory, from nothing to a run that can go: made anew, or found as it was left.

RUN/options.toml       every option, data's proposals filled in
RUN/run.json           identity and configuration; written last, so that what has it is a run
RUN/data/              ids and tokenizer made of the user's file
RUN/checkpoints/       see checkpoints.py
RUN/metrics.jsonl  RUN/tensorboard/  RUN/curves.png  RUN/curves.svg
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from twinformer.checkpoint import read_text, write_atomically
from twinformer.config import ModelConfig
from twinformer.data.batch import Dataset
from twinformer.errors import CheckpointError, ConfigError, Problems
from twinformer.runs import backends
from twinformer.runs.checkpoints import CheckpointStore
from twinformer.runs.data import RunData, open_data, with_defaults
from twinformer.runs.log import CURVES, METRICS_FILE, MetricsLog, draw_curves, read_metrics
from twinformer.runs.loop import Run
from twinformer.runs.model import model_config
from twinformer.runs.options import OPTIONS_FILE, RunOptions, read_toml, resumed
from twinformer.runs.sampling import sampler
from twinformer.runs.screen import Screen

RUN_FILE = "run.json"
CHECKPOINTS = "checkpoints"
DATA = "data"
_LOCK_FILE = ".lock"
_FORMAT = 1


def begin(options: RunOptions, directory: Path, *, screen: Screen) -> Run:
    """A new run. Raises ConfigError where the directory holds something, and for options that do not fit the data."""
    if (directory / RUN_FILE).is_file():
        raise ConfigError(str(directory), ["expected a place for a new run, got a run (--resume goes on with it)"])
    found = {place.name for place in directory.iterdir()} if directory.is_dir() else set()
    if found - {_LOCK_FILE, OPTIONS_FILE, DATA}:
        raise ConfigError(str(directory), ["expected an empty place for a new run, got a directory with other files"])
    options = with_defaults(options)
    options.training()  # what is wrong with it is said before anything is written
    backends.prepare(options.backends, options.dtype)
    with _writing(directory):
        if DATA in found:  # of a beginning that did not become a run
            shutil.rmtree(directory / DATA)
        (directory / DATA).mkdir(parents=True)
        data = open_data(options, directory / DATA)
        config, weights = model_config(options, data.model, data.usual)
        options.write(directory / OPTIONS_FILE)
        identity = {
            "format": _FORMAT,
            "run": secrets.token_hex(8),
            "config": config.to_dict(),
            "data": fingerprint(data),
            "versions": backends.versions(options.backends),
        }
        run = _assemble(options, directory, config, data, identity, screen)
        run.start(weights)
        text = json.dumps(identity, indent=1, allow_nan=False) + "\n"
        write_atomically(directory / RUN_FILE, lambda part: part.write_text(text, encoding="utf-8"))
    return run


def go_on(directory: Path, changes: Mapping[str, Any], *, screen: Screen) -> Run:
    """A run as it was left, from its last complete checkpoint, or from its beginning where it has none yet."""
    identity = read_run(directory)
    options = resumed(RunOptions.from_dict(read_toml(directory / OPTIONS_FILE)), changes)
    backends.prepare(options.backends, options.dtype)
    config = ModelConfig.from_dict(identity["config"])
    with _writing(directory):
        data = open_data(options, directory / DATA)
        if fingerprint(data) != identity["data"]:
            wanted = "expected the batches that the run began with, got others (another version, or files that changed)"
            raise ConfigError(f"data {options.data}", [wanted])
        options.write(directory / OPTIONS_FILE)
        run = _assemble(options, directory, config, data, identity, screen)
        last = run.store.last()
        run.store.sweep(last)
        if last is None:
            run.start(model_config(options, data.model, data.usual)[1])
            screen.say("no checkpoint yet: from the beginning")
        else:
            run.resume(last)
            other = [name for name in options.backends if name not in last.backends]
            by = f", saved by {' and '.join(last.backends)}" if other else ""
            screen.say(f"going on from step {last.step}{by}")
    if options.minutes is not None and "minutes" not in changes:
        screen.say(f"until {options.minutes:g} minutes from now, as this run was told before (--minutes sets others)")
    return run


def _assemble(
    options: RunOptions,
    directory: Path,
    config: ModelConfig,
    data: RunData,
    identity: Mapping[str, Any],
    screen: Screen,
) -> Run:
    training = options.training()
    trainers = {
        name: backends.make_trainer(name, config, training, compile=options.compile) for name in options.backends
    }
    for note in data.notes:
        screen.say(note)
    # two twins share the machine: the ceiling of one says little about both
    ceiling = backends.product_rate(options.backends[0], options.dtype) if len(trainers) == 1 else None
    return Run(
        options,
        config=config,
        trainers=trainers,
        train=data.train,
        valid=data.valid,
        store=CheckpointStore(
            directory / CHECKPOINTS, run=identity["run"], keep=options.keep, beside=data.beside, tell=screen.say
        ),
        log=lambda start: MetricsLog(directory, start=start, tell=screen.say),
        screen=screen,
        record={"options": options.to_dict(), "versions": backends.versions(options.backends)},
        ceiling=ceiling,
        sample=sampler(data.show, options.samples, config, trainers) if data.show and options.samples else None,
    )


def read_run(directory: Path) -> dict[str, Any]:
    """What run.json says. Raises CheckpointError where it is none."""
    file = directory / RUN_FILE
    if not file.is_file():
        raise CheckpointError(str(directory), [f"expected the directory of a run, got one without {RUN_FILE}"])
    problems = Problems(str(file), CheckpointError)
    text = read_text(file)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(file), [f"expected JSON, got text that does not parse: {error}"]) from None
    for key, kind in {"format": int, "run": str, "config": dict, "data": str}.items():
        good = isinstance(found, dict) and isinstance(found.get(key), kind)
        problems.expect(good, f"{key}: expected {kind.__name__}, got none")
    problems.raise_if_any()
    problems.expect(found["format"] == _FORMAT, f"format: expected {_FORMAT}, got {found['format']}")
    problems.raise_if_any()
    return dict(found)


def fingerprint(data: RunData) -> str:
    """Of the first batches: other data, or another order, has another one."""
    digest = hashlib.sha256()
    for part in (data.train, data.valid):
        _digest_batch(digest, part)
    return digest.hexdigest()


def _digest_batch(digest: Any, part: Dataset) -> None:
    batch = part.batch(0)
    arrays = {**batch.inputs, "targets": batch.targets, "real": batch.real}
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape} {part.steps_per_epoch}".encode())
        digest.update(array.tobytes())


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Nobody else trains this run meanwhile. A process that is killed leaves no lock behind."""
    try:
        import fcntl
    except ImportError:  # not on this system: then nothing is held
        yield
        return
    with _writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        handle = (directory / _LOCK_FILE).open("w")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(str(directory), ["expected a run that nobody trains, got one in use"]) from None
        yield


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(str(directory), [f"expected a place that can be written, got: {error}"]) from error


def draw(directory: Path) -> str | None:
    """Draw the curves of a run anew; gives the reason where they cannot be drawn."""
    file = directory / METRICS_FILE
    records = read_metrics(file) if file.is_file() else []
    if not any(record["kind"] == "train" for record in records):
        return None
    try:
        draw_curves(records, [directory / name for name in CURVES], title=directory.name)
    except ImportError:
        return "curves not drawn: matplotlib is not installed (pip install 'twinformer[train]')"
    except OSError as error:
        return f"curves not drawn: {error}"
    return None
