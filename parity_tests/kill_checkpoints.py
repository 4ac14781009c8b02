"""Kill a run while it saves, many times over, and see whether a complete checkpoint was ever lost or changed.

    python -m parity_tests.kill_checkpoints --kills 200

A child process trains the NumPy trainer and saves after every step; the parent kills it (SIGKILL) at a random moment,
looks at what a reader finds, and lets the next child go on from there. After each kill:

- the last complete checkpoint is found, and is none older than the last that the child had reported as saved;
- its state and its model's weights are, bit for bit, those that a run which was never stopped has at that step;
- ``best.json`` names a complete checkpoint.

At the end the run is finished and must end where the uninterrupted one ends. ``--fault`` plants a mistake in the store,
which this script must find (exit code 1). A kill ends a process, not the machine: that data reaches the disk in order
(fsync) is not seen here.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from rich.console import Console

from parity_tests.numpy_trainer import NumpyTrainer, Tokens, tiny_config
from twinformer.checkpoint import read_model
from twinformer.errors import CheckpointError
from twinformer.runs import records
from twinformer.runs.checkpoints import CheckpointStore
from twinformer.runs.log import MetricsLog
from twinformer.runs.loop import Run
from twinformer.runs.options import RunOptions
from twinformer.runs.screen import Screen
from twinformer.runs.signals import Signals

VOCABULARY = 96
STEPS = 10**9  # more than the children can take: none of them ends by itself


class InPlace(CheckpointStore):
    """The fault: files are written under the final name, one after the other, and hashes are not looked at."""

    def _put(self, part, place):
        place.mkdir()
        for file in sorted(part.iterdir(), reverse=True):
            shutil.copyfile(file, place / file.name)

    def last(self):
        for step, directory in self._directories():
            if (directory / records.RECORD_FILE).is_file():
                return records.Checkpoint(directory, step, json.loads((directory / records.RECORD_FILE).read_text()))
        return None


class RemovesFirst(CheckpointStore):
    """The fault: room is made before the new checkpoint is there."""

    def _put(self, part, place):
        for _, directory in self._directories():
            shutil.rmtree(directory)
        super()._put(part, place)


class OneBehind(CheckpointStore):
    """The fault: the reader takes the checkpoint before the last."""

    def last(self):
        found = [directory for _, directory in self._directories()]
        return records.verify(found[min(1, len(found) - 1)], run=self.run) if found else None


FAULTS = {"none": CheckpointStore, "in-place": InPlace, "removes-first": RemovesFirst, "one-behind": OneBehind}


def make_run(directory, steps, store, report=lambda step: None):
    """A run that validates and saves after every step and ``report``s each checkpoint once it is saved."""

    class Reporting(FAULTS[store]):
        def save(self, step, **rest):
            saved = super().save(step, **rest)
            report(step)
            return saved

    options = RunOptions(
        steps=steps,
        accumulation=2,
        save_every=1,
        valid_every=1,
        log_every=1,
        schedule={"name": "constant", "peak": 0.5},
    )
    return Run(
        options,
        config=tiny_config(VOCABULARY),
        trainers={"torch": NumpyTrainer(tiny_config(VOCABULARY), options.training())},
        train=Tokens(VOCABULARY),
        valid=Tokens(VOCABULARY, seed=1, steps_per_epoch=1),
        store=Reporting(directory / "checkpoints", run="killed", keep=1),
        log=lambda start: MetricsLog(directory, start=start),
        screen=Screen(Console(file=io.StringIO())),
        record={},
    )


def begin(run):
    """As a command does it: go on from the last complete checkpoint, or from the start."""
    last = run.store.last()
    run.store.sweep(last)
    if last is None:
        run.start()
    else:
        run.resume(last)


class Truth:
    """The run that was never stopped: the exported state after each step, worked out when it is asked for."""

    def __init__(self):
        self.run = make_run(Path("unused"), STEPS, "none")
        self.run.start()
        self.found = []

    def after(self, step):
        trainer, state = self.run.trainers["torch"], self.run.states["torch"]
        while len(self.found) < step:
            number = 2 * len(self.found)
            state, _ = trainer.step(state, [self.run.train.batch(number), self.run.train.batch(number + 1)])
            self.found.append(trainer.export_state(state))
        self.run.states["torch"] = state
        return self.found[step - 1]


def killed_child(directory, steps, store, delay):
    """Fork a child that trains, kill it ``delay`` seconds after its first save; the steps that it reported."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)
            run = make_run(directory, steps, store, lambda step: os.write(writing, step.to_bytes(4, "little")))
            begin(run)
            run.go(Signals())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    first = os.read(reading, 4)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    rest = b""
    while more := os.read(reading, 65536):
        rest += more
    os.close(reading)
    reported = [int.from_bytes((first + rest)[i : i + 4], "little") for i in range(0, len(first + rest), 4)]
    return reported, os.waitstatus_to_exitcode(status)


def wrong_with(directory, store, reported, truth):
    """Everything that is wrong with what a reader finds after a kill."""
    try:
        found = FAULTS[store](directory / "checkpoints", run="killed").last()
    except CheckpointError as error:
        return [f"no complete checkpoint: {error}"]
    newest = max(reported, default=0)
    if found is None or found.step < newest:
        return [f"step {newest} was saved, a reader finds {found and found.step}"]
    problems = []
    try:
        state, (_, weights) = found.state("torch"), read_model(found.directory)
        for name, tensor in truth.after(found.step).items():
            if not np.array_equal(state[name], tensor):
                problems.append(f"step {found.step}: {name} is not what the uninterrupted run has")
        if not np.array_equal(weights["table.weight"], truth.after(found.step)["parameters/table.weight"]):
            problems.append(f"step {found.step}: the model's weights are not those of the state")
    except (ValueError, KeyError) as error:
        problems.append(f"step {found.step} does not read: {error}")
    if (directory / "checkpoints" / "best.json").is_file() and (
        CheckpointStore(directory / "checkpoints", run="killed").best() is None
    ):
        problems.append("best.json names a checkpoint that is not complete")
    return problems


def left_behind(directory):
    """In which phase of saving the kill came, from what lies about."""
    names = [place.name for place in (directory / "checkpoints").iterdir()]
    if any(name.startswith(".saving-") for name in names):
        return "while a checkpoint was written"
    if any(name.startswith(".removing-") for name in names):
        return "while an old one was removed"
    if any(name.startswith(".") for name in names):
        return "while a pointer was written"
    return "elsewhere"


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Kill a run while it saves; look for lost or torn checkpoints.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", help="where to write: another file system, another pace")
    parser.add_argument("--fault", choices=FAULTS, default="none")
    asked = parser.parse_args(arguments)
    chance, phases, problems = random.Random(asked.seed), Counter(), []
    truth = Truth()
    with tempfile.TemporaryDirectory(dir=asked.directory) as place:
        directory, kills, saved = Path(place), 0, 0
        while kills < asked.kills and not problems:
            reported, code = killed_child(directory, STEPS, asked.fault, chance.uniform(0, 0.25))
            if code != -signal.SIGKILL:
                problems.append(f"the child ended by itself with {code}")
                break
            kills, saved = kills + 1, saved + len(reported)
            phases[left_behind(directory)] += 1
            problems = wrong_with(directory, asked.fault, reported, truth)
        if not problems:
            last = FAULTS[asked.fault](directory / "checkpoints", run="killed").last().step
            run = make_run(directory, last + 3, asked.fault)
            begin(run)
            run.go(Signals())
            ended = run.trainers["torch"].export_state(run.states["torch"])
            problems += [
                name for name, tensor in truth.after(last + 3).items() if not np.array_equal(ended[name], tensor)
            ]
            left = [place.name for place in (directory / "checkpoints").iterdir() if place.name.startswith(".")]
            problems += [f"left lying about: {name}" for name in left]
    told = ", ".join(f"{count} {phase}" for phase, count in phases.most_common())
    print(f"{kills} kills after {saved} checkpoints: {told}")  # noqa: T201
    for problem in problems:
        print(f"- {problem}")  # noqa: T201
    print("a complete checkpoint was lost or changed" if problems else "no complete checkpoint was lost or changed")  # noqa: T201
    return 1 if problems else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
