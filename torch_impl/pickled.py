"""Published weights that are there as pickles only: ``pytorch_model.bin``, whole or in shards.

Read by ``torch.load(weights_only=True)``, which builds tensors and plain containers and refuses all else, so that
nothing in the file is run.
"""

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from torch_impl.weights import _array
from twinformer.errors import CheckpointError, Problems
from twinformer.pretrained.family import Array
from twinformer.pretrained.files import Stored, read_json_object

FILE = "pytorch_model.bin"
INDEX_FILE = "pytorch_model.bin.index.json"

_KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@contextlib.contextmanager
def open_pickled(directory: Path) -> Iterator[dict[str, Stored]]:
    """The tensors of a directory by name. Each is let go when it has been read, so that they are not held twice.

    Raises CheckpointError for files that are absent, do not read or hold anything but tensors.
    """
    index = directory / INDEX_FILE
    names = [FILE] if not index.is_file() or (directory / FILE).exists() else _shards(index)
    problems = Problems(str(directory), CheckpointError)
    found: dict[str, Tensor] = {}
    for name in names:
        for tensor, value in _load(directory / name, problems).items():
            problems.expect(tensor not in found, f"{tensor}: expected in one shard, got it in several")
            found[tensor] = value
    problems.raise_if_any()
    yield {name: _stored(found, name) for name in list(found)}


def _load(file: Path, problems: Problems) -> dict[str, Tensor]:
    if not file.is_file():
        problems.add(f"{file.name}: expected a file of weights, got nothing by that name")
        return {}
    try:
        values: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        OSError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        AssertionError,
        MemoryError,
    ) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        problems.add(f"{file.name}: expected tensors by name and nothing else, got a file that does not read: {first}")
        return {}
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        problems.add(f"{file.name}: expected tensors by name, got {type(values).__name__} of other things")
        return {}
    return {str(name): value for name, value in values.items()}


def _stored(found: dict[str, Tensor], name: str) -> Stored:
    tensor = found[name]

    def read() -> Array:
        return _array(found[name].detach())

    return Stored(_KINDS.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), read)


def _shards(index: Path) -> list[str]:
    """The files that an index names. They lie beside it: a name that leads elsewhere is refused."""
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(str(index), [f"weight_map: expected an object that names tensors, got {names!r}"])
    problems = Problems(str(index), CheckpointError)
    for tensor, name in names.items():
        is_plain = isinstance(name, str) and name.endswith(".bin") and PurePosixPath(name).name == name
        problems.expect(is_plain, f"{tensor}: expected the name of a .bin file beside the index, got {name!r}")
    problems.raise_if_any()
    return sorted(set(names.values()))
