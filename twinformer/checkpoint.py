"""A model directory: config.json + model.safetensors, framework-neutral, in PyTorch's orientation.

The weights file also carries the configuration that it was written with, in its metadata: where a
save was interrupted between the two files, or one of them was edited, reading says so instead of loading
weights under a configuration that is not theirs.

Nothing here runs code from disk: JSON and safetensors only.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (makes bfloat16 known to NumPy)
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from twinformer.config import ModelConfig
from twinformer.errors import CheckpointError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_METADATA_KEY = "twinformer_config"

Tensors = dict[str, npt.NDArray[Any]]


def write_model(directory: str | Path, config: ModelConfig, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write a model directory, whole or not at all.

    A new directory is written beside its place and renamed into it. In one that exists already, each file
    is replaced by a rename. Raises CheckpointError where the place cannot be written.
    """
    directory = Path(directory)
    contiguous = {path: np.ascontiguousarray(tensor) for path, tensor in tensors.items()}
    metadata = {"format": "np", _METADATA_KEY: config.to_json()}

    def write_files(place: Path) -> None:
        write_atomically(place / WEIGHTS_FILE, lambda part: save_file(contiguous, part, metadata))
        write_atomically(place / CONFIG_FILE, lambda part: part.write_text(config.to_json(), encoding="utf-8"))

    try:
        if directory.is_dir():
            write_files(directory)
            return
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        try:
            staging.chmod(0o755)
            write_files(staging)
            staging.rename(directory)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        _sync(directory.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(str(directory), [f"expected a place that can be written, got: {error}"]) from error


def read_config(directory: str | Path) -> ModelConfig:
    """The configuration of a model directory. Raises CheckpointError or ConfigError."""
    return ModelConfig.from_json(read_text(Path(directory) / CONFIG_FILE))


def read_model(directory: str | Path) -> tuple[ModelConfig, Tensors]:
    """The configuration and every tensor of a model directory, by path, as stored.

    Whether the tensors are those that the configuration calls for is the business of ``load_weights``.
    Raises CheckpointError for files that are absent, unreadable or at odds with each other, ConfigError
    for a configuration that is wrong in itself.
    """
    directory = Path(directory)
    config = read_config(directory)
    tensors, metadata = read_safetensors(directory / WEIGHTS_FILE)
    stored = metadata.get(_METADATA_KEY)
    if stored is not None:
        theirs = ModelConfig.from_json(stored).to_dict()
        ours = config.to_dict()
        differing = [name for name in ours if ours[name] != theirs[name]]
        if differing:
            raise CheckpointError(
                str(directory),
                [
                    f"{name}: {CONFIG_FILE} says {ours[name]!r}, {WEIGHTS_FILE} was written with {theirs[name]!r}"
                    for name in differing
                ],
            )
    return config, tensors


def read_safetensors(file: Path) -> tuple[Tensors, dict[str, str]]:
    """Every tensor of a safetensors file and its metadata. Raises CheckpointError with the file's name."""
    if not file.is_file():
        raise CheckpointError(str(file), ["expected a safetensors file, got nothing by that name"])
    try:
        with safe_open(file, framework="np") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, dict(handle.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            str(file), [f"expected a safetensors file, got one that does not read: {error}"]
        ) from error


def read_text(file: Path) -> str:
    """A text file. Raises CheckpointError where it is absent or not UTF-8."""
    if not file.is_file():
        raise CheckpointError(str(file), ["expected a file, got nothing by that name"])
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(str(file), [f"expected UTF-8 text, got: {error}"]) from error


def write_atomically(file: Path, write: Callable[[Path], Any]) -> None:
    """Have ``write`` fill a temporary file beside ``file``, flush it to disk, then rename it into place."""
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        part.chmod(0o644)
        _sync(part)
        part.replace(file)
        _sync(file.parent)
    finally:
        part.unlink(missing_ok=True)


def _sync(place: Path) -> None:
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
