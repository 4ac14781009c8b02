"""What a complete checkpoint is: every file with the hash that it was written with, named by a record with its own."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinformer.checkpoint import CONFIG_FILE, WEIGHTS_FILE, Tensors, read_safetensors, read_text
from twinformer.errors import CheckpointError, Problems

FORMAT = 1
RECORD_FILE = "training.json"
STATE_FILE = "training.safetensors"
#: how the directory of a checkpoint is named
NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk, its hashes found right. ``record`` is what training.json says."""

    directory: Path
    step: int
    record: Mapping[str, Any]

    @property
    def backends(self) -> tuple[str, ...]:
        """Whose training state it holds."""
        return tuple(self.record["states"])

    def state(self, backend: str) -> Tensors:
        """The training state that ``backend`` left, or else the one that is there: either twin reads the other's."""
        states = self.record["states"]
        file = states.get(backend) or next(iter(states.values()))
        return read_safetensors(self.directory / file)[0]


def verify(directory: Path, *, run: str | None = None) -> Checkpoint:
    """A checkpoint whose every file is the one that was written together with the others.

    ``run`` None: that of any run. Raises CheckpointError with everything that is wrong.
    """
    problems = Problems(str(directory), CheckpointError)
    try:
        record = json.loads(read_text(directory / RECORD_FILE))
    except (CheckpointError, ValueError, RecursionError) as error:
        raise CheckpointError(str(directory), [f"{RECORD_FILE}: expected a record that reads, got: {error}"]) from None
    named = NAME.fullmatch(directory.name)
    keys = {"format": int, "run": str, "step": int, "states": dict, "files": dict, "digest": str}
    for key, kind in keys.items():
        good = isinstance(record, dict) and isinstance(record.get(key), kind)
        problems.expect(good, f"{RECORD_FILE}: {key}: expected {kind.__name__}, got none")
    problems.raise_if_any()
    problems.expect(record["format"] == FORMAT, f"{RECORD_FILE}: expected format {FORMAT}, got {record['format']}")
    problems.expect(record["digest"] == digest(record), f"{RECORD_FILE}: its hash is not the one it was written with")
    if named is not None:
        problems.expect(
            record["step"] == int(named[1]), f"{RECORD_FILE}: expected that of the step, got {record['step']}"
        )
    if run is not None:
        problems.expect(record["run"] == run, f"{RECORD_FILE}: expected run {run}, got one of run {record['run']}")
    needed = {CONFIG_FILE, WEIGHTS_FILE, *record["states"].values()}
    problems.expect(len(record["states"]) > 0, f"{RECORD_FILE}: states: expected at least one, got none")
    for name in sorted(needed | set(record["files"])):
        wanted = record["files"].get(name)
        if Path(name).name != name or not (directory / name).is_file():
            problems.add(f"{name}: missing")
            continue
        try:
            got = file_hash(directory / name)
        except OSError as error:
            problems.add(f"{name}: expected a file that reads, got: {error}")
            continue
        problems.expect(got == wanted, f"{name}: expected sha256 {str(wanted)[:12]}…, got {got[:12]}…")
    problems.raise_if_any()
    return Checkpoint(directory, record["step"], record)


def file_hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(record: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()
