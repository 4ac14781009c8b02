"""Checkpoints of a run: each is a directory that is there whole or not at all, whatever happens while it is written.

``checkpoints/step-00000200/`` is a model directory (config.json, model.safetensors) with the training state beside it
(training.safetensors, one more of the other twin where both are trained) and ``training.json``, which says what the run
was doing and holds the hash of every other file and of itself.

It is written under another name, flushed, and renamed. ``last.json`` and ``best.json`` point to checkpoints for people
and tools; a reader does not rest on them: it takes the newest directory whose hashes are right, and says which newer
ones it left out and why.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import save_file

from twinformer.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    read_text,
    write_atomically,
    write_model,
)
from twinformer.config import ModelConfig
from twinformer.errors import CheckpointError, Problems, TwinformerError, WeightsError
from twinformer.runs.records import FORMAT, NAME, RECORD_FILE, STATE_FILE, Checkpoint, digest, file_hash, verify

LAST_FILE = "last.json"
BEST_FILE = "best.json"

_SAVING, _REMOVING = ".saving-", ".removing-"


class CheckpointStore:
    """The checkpoints of one run. ``run`` is its identity: a checkpoint of another one is refused.

    Kept are the last one, ``keep`` before it, and the best. ``beside``: further files, by name, of each model directory
    (a tokenizer). ``tell`` is given every message for people.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        run: str,
        keep: int = 2,
        beside: Mapping[str, bytes] | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.directory = Path(directory)
        self.run = run
        self.keep = keep
        self.beside = dict(beside or {})
        self.tell = tell

    def save(
        self,
        step: int,
        *,
        config: ModelConfig,
        weights: Mapping[str, npt.NDArray[Any]],
        states: Mapping[str, Mapping[str, npt.NDArray[Any]]],
        record: Mapping[str, Any],
        best_step: int | None = None,
    ) -> Checkpoint:
        """Write the checkpoint of ``step``, have the pointers name it, then remove old ones.

        ``states`` by backend. ``best_step``: that of the best checkpoint so far, this one or an earlier one. Weights or
        state that are not finite are refused (WeightsError); where it cannot be written, CheckpointError says why and
        what is still there. In both cases every checkpoint from before is untouched.
        """
        _check_finite(step, {"weights": weights} | {f"state of {name}": state for name, state in states.items()})
        place = self.directory / f"step-{step:08d}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=f"{_SAVING}{place.name}-", dir=self.directory))
            try:
                part.chmod(0o755)
                written = self._write(part, step, config, weights, states, record)
                self._put(part, place)
            finally:
                shutil.rmtree(part, ignore_errors=True)
            self._point(step, best_step)
        except (OSError, SafetensorError, CheckpointError) as error:
            raise CheckpointError(str(place), [_why(error, self.directory), self._left()]) from error
        self._prune(step, best_step)
        return Checkpoint(place, step, written)

    def _write(
        self,
        part: Path,
        step: int,
        config: ModelConfig,
        weights: Mapping[str, npt.NDArray[Any]],
        states: Mapping[str, Mapping[str, npt.NDArray[Any]]],
        record: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Every file of a checkpoint, flushed to disk; training.json comes last."""
        write_model(part, config, weights)
        files = {}
        for number, (backend, state) in enumerate(states.items()):
            files[backend] = STATE_FILE if number == 0 else f"training-{backend}.safetensors"
            # asarray and not ascontiguousarray, which would give the 0-dimensional step an axis
            tensors = {name: np.asarray(tensor, order="C") for name, tensor in state.items()}
            write_atomically(part / files[backend], lambda file, tensors=tensors: save_file(tensors, file))  # type: ignore[misc]
        for name, data in self.beside.items():
            write_atomically(part / name, lambda file, data=data: file.write_bytes(data))  # type: ignore[misc]
        hashes = {name: file_hash(part / name) for name in (CONFIG_FILE, WEIGHTS_FILE, *files.values(), *self.beside)}
        # through JSON and back, so that the hash is that of what a reader will see
        record = json.loads(json.dumps(record, allow_nan=False))
        whole = {**record, "format": FORMAT, "run": self.run, "step": step, "states": files, "files": hashes}
        whole["digest"] = digest(whole)
        text = json.dumps(whole, indent=1, allow_nan=False) + "\n"
        write_atomically(part / RECORD_FILE, lambda file: file.write_text(text, encoding="utf-8"))
        return whole

    def _put(self, part: Path, place: Path) -> None:
        """Give it its name. What had that name before (a torn one, or the same step once more) makes room first."""
        aside = place.with_name(f"{_REMOVING}{place.name}-{part.name[-8:]}")
        if place.exists():
            place.rename(aside)
        part.rename(place)
        _sync(self.directory)
        shutil.rmtree(aside, ignore_errors=True)

    def _point(self, step: int, best_step: int | None) -> None:
        for file, target in ((LAST_FILE, step), (BEST_FILE, best_step)):
            if target is not None:
                text = json.dumps({"step": target, "directory": f"step-{target:08d}"}) + "\n"
                write_atomically(self.directory / file, lambda part, text=text: part.write_text(text, encoding="utf-8"))  # type: ignore[misc]

    def _prune(self, step: int, best_step: int | None) -> None:
        """Remove old checkpoints: renamed first, so that one half removed does not look like a torn one."""
        earlier = [found for found, _ in self._directories() if found < step]
        kept = {step, best_step, *earlier[: self.keep]}
        for found, directory in self._directories():
            if found not in kept and found < step:
                self._remove(directory)

    def _remove(self, directory: Path) -> None:
        aside = directory.with_name(f"{_REMOVING}{directory.name}")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            directory.rename(aside)
            shutil.rmtree(aside)
        except OSError as error:
            self.tell(f"an old checkpoint could not be removed: {directory.name}: {error}")

    def sweep(self, last: Checkpoint | None) -> None:
        """Before a run goes on: remove what a killed one left half written, and have the pointers name ``last``."""
        for left in (*self.directory.glob(f"{_SAVING}*"), *self.directory.glob(f"{_REMOVING}*")):
            shutil.rmtree(left, ignore_errors=True)
        for left in self.directory.glob(".*.json.*"):
            left.unlink(missing_ok=True)
        if last is not None:
            try:
                self._point(last.step, (last.record.get("best") or {}).get("step"))
            except OSError as error:
                raise CheckpointError(str(self.directory), [_why(error, self.directory)]) from error

    def last(self) -> Checkpoint | None:
        """The newest complete checkpoint, None where there is none at all.

        Newer ones that are torn or not of this run are told with everything that is wrong with them. Raises
        CheckpointError where there are checkpoints, but no complete one.
        """
        refused = []
        for step, directory in self._directories():
            try:
                found = verify(directory, run=self.run)
            except TwinformerError as error:
                refused.append(f"{directory.name}: {'; '.join(error.problems)}")
                continue
            for one in refused:
                self.tell(f"checkpoint left out: {one}")
            if refused:
                self.tell(f"going back to the one before: step {step}")
            return found
        if refused:
            raise CheckpointError(str(self.directory), ["expected a complete checkpoint, found none", *refused])
        return None

    def best(self) -> Checkpoint | None:
        """The checkpoint that best.json names, None where there is none, or it is not complete (which is told)."""
        file = self.directory / BEST_FILE
        if not file.is_file():
            return None
        try:
            return self.at(_pointed(file))
        except TwinformerError as error:
            self.tell(f"the best checkpoint cannot be used: {'; '.join(error.problems)}")
            return None

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of one step. Raises CheckpointError where it is absent or not complete."""
        directory = self.directory / f"step-{step:08d}"
        if not directory.is_dir():
            there = ", ".join(str(found) for found, _ in self._directories()) or "none"
            raise CheckpointError(
                str(self.directory), [f"expected a checkpoint of one of the steps {there}, got {step}"]
            )
        return verify(directory, run=self.run)

    def _directories(self) -> list[tuple[int, Path]]:
        """What is named like a checkpoint, newest first."""
        return sorted(_named(self.directory), reverse=True)

    def _left(self) -> str:
        """What a reader would still find, said in a message; hashes are not read for it."""
        steps = [step for step, _ in self._directories()]
        return (
            f"nothing else was touched; the last checkpoint is that of step {steps[0]}"
            if steps
            else ("there is no checkpoint yet")
        )


def _named(directory: Path) -> Iterator[tuple[int, Path]]:
    if directory.is_dir():
        for place in directory.iterdir():
            found = NAME.fullmatch(place.name)
            if found is not None and place.is_dir():
                yield int(found[1]), place


def _pointed(file: Path) -> int:
    text = read_text(file)
    try:
        step = json.loads(text)["step"]
    except (ValueError, RecursionError, KeyError, TypeError):
        step = None
    if not isinstance(step, int):
        raise CheckpointError(str(file), ["expected a JSON object with a step, got something else"])
    return step


def _check_finite(step: int, trees: Mapping[str, Mapping[str, npt.NDArray[Any]]]) -> None:
    """bfloat16 is no float kind to NumPy: it is widened to be looked at."""
    problems = Problems(f"checkpoint of step {step}", WeightsError)
    for name, tree in trees.items():
        for path, tensor in tree.items():
            if tensor.dtype.kind in "iub":
                continue
            wide = tensor if tensor.dtype.kind == "f" else tensor.astype(np.float32)
            count = int((~np.isfinite(wide)).sum())
            problems.expect(count == 0, f"{name}: {path}: expected finite values, got {count} that are not")
    problems.raise_if_any()


def _why(error: Exception, directory: Path) -> str:
    """Why it could not be written, with the room that is left: a full disk is the usual reason."""
    while isinstance(error.__cause__, (OSError, SafetensorError)):
        error = error.__cause__
    try:
        room = f"; {shutil.disk_usage(directory).free / 1e6:.0f} MB are free there"
    except OSError:
        room = ""
    return f"expected a place that can be written, got: {error}{room}"


def _sync(place: Path) -> None:
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
