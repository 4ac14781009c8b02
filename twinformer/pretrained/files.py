"""The files of a published directory: JSON, and safetensors whole or in shards. Nothing from disk is run.

Tensors are known by their headers first, so that names, dtypes and shapes are judged before any value is read, and are
read one at a time. Pickles are for ``torch_impl.pickled``.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from twinformer.checkpoint import WEIGHTS_FILE, read_text
from twinformer.config import DType
from twinformer.errors import CheckpointError, Problems
from twinformer.pretrained.family import Array, Shape

INDEX_FILE = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "flax_model.msgpack", "tf_model.h5")

#: the dtypes that weights may be stored in, by their names in a safetensors header
FLOAT_DTYPES: dict[str, DType] = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_NUMPY: dict[str, npt.DTypeLike] = {
    **FLOAT_DTYPES,
    "BF16": ml_dtypes.bfloat16,
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}


def read_json(file: Path) -> Any:
    """A JSON file. Raises CheckpointError where it is absent or not JSON."""
    text = read_text(file)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, and whole numbers of too many digits
        raise CheckpointError(str(file), [f"expected JSON, got text that does not parse: {error}"]) from None


def read_json_object(file: Path) -> dict[str, Any]:
    """A JSON file that holds one object. Raises CheckpointError otherwise."""
    values = read_json(file)
    if not isinstance(values, dict):
        raise CheckpointError(str(file), [f"expected a JSON object, got {type(values).__name__}"])
    return values


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file, unread: its dtype and shape by the header, and how to read it.

    ``read()`` gives the array as stored and may be called while ``open_tensors`` holds the file.
    """

    dtype: str
    shape: Shape
    read: Callable[[], Array]


@contextlib.contextmanager
def open_tensors(directory: Path) -> Iterator[dict[str, Stored]]:
    """The tensors of a published directory, by name, unread: ``model.safetensors`` or the shards of its index.

    Raises CheckpointError for files that are absent, truncated or not safetensors, and for an index that is at odds
    with its shards.
    """
    index = None
    if (directory / WEIGHTS_FILE).exists() or not (directory / INDEX_FILE).exists():
        files = [WEIGHTS_FILE]
        if not (directory / WEIGHTS_FILE).is_file():
            present = [name for name in _PICKLES if (directory / name).exists()]
            got = f"only {', '.join(present)}, which take PyTorch to read" if present else "nothing by these names"
            raise CheckpointError(str(directory), [f"expected {WEIGHTS_FILE} or {INDEX_FILE}, got {got}"])
    else:
        index = _read_index(directory / INDEX_FILE)
        files = sorted(set(index.values()))
    problems = Problems(str(directory), CheckpointError)
    with contextlib.ExitStack() as stack:
        found: dict[str, Stored] = {}
        for name in files:
            for tensor, stored in _open_file(directory / name, stack, problems).items():
                problems.expect(
                    index is None or index.get(tensor) == name,
                    f"{tensor}: expected in {index.get(tensor) if index else name} by the index, got it in {name}",
                )
                problems.expect(tensor not in found, f"{tensor}: expected in one shard, got it in several")
                found[tensor] = stored
        if index is not None and not problems.found:
            for tensor in sorted(index.keys() - found.keys()):
                problems.add(f"{tensor}: expected in {index[tensor]} by the index, got no such tensor there")
        problems.raise_if_any()
        yield found


def _open_file(file: Path, stack: contextlib.ExitStack, problems: Problems) -> dict[str, Stored]:
    if not file.is_file():
        problems.add(f"{file.name}: expected a safetensors file, got nothing by that name")
        return {}
    try:
        with safe_open(file, framework="numpy") as handle:  # judges the header as a whole
            headers = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
            kinds = {name: (str(one.get_dtype()), tuple(one.get_shape())) for name, one in headers.items()}
        # read without mapping: what was mapped counts as memory of the process until the file is closed
        source = stack.enter_context(file.open("rb"))
        (length,) = struct.unpack("<Q", source.read(8))
        places = {
            name: entry["data_offsets"] for name, entry in json.loads(source.read(length)).items() if name in kinds
        }
        return {
            name: Stored(dtype, shape, _reader(source, name, dtype, shape, 8 + length + places[name][0]))
            for name, (dtype, shape) in kinds.items()
        }
    except (SafetensorError, OSError) as error:
        problems.add(f"{file.name}: expected a whole safetensors file, got one that does not read: {error}")
        return {}


def _reader(source: BinaryIO, name: str, dtype: str, shape: Shape, start: int) -> Callable[[], Array]:
    def read() -> Array:
        if dtype not in _NUMPY:
            raise CheckpointError(name, [f"expected a dtype of {', '.join(_NUMPY)}, got {dtype}"])
        array: Array = np.empty(shape, _NUMPY[dtype])
        source.seek(start)
        view = memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        if source.readinto(view) != len(view):  # type: ignore[attr-defined]
            raise CheckpointError(name, [f"expected {len(view)} bytes, got a file that ends before"])
        return array

    return read


def has_safetensors(directory: Path) -> bool:
    """Whether weights are there in that format, whole or in shards."""
    return any((directory / name).exists() for name in (WEIGHTS_FILE, INDEX_FILE))


def _read_index(file: Path) -> dict[str, str]:
    """Which shard holds each tensor. Shards lie beside the index: a name that leads elsewhere is refused."""
    index = read_json_object(file).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(str(file), [f"weight_map: expected an object that names tensors, got {index!r}"])
    problems = Problems(str(file), CheckpointError)
    for tensor, name in index.items():
        plain = isinstance(name, str) and name.endswith(".safetensors") and PurePosixPath(name).name == name
        problems.expect(plain, f"{tensor}: expected the name of a .safetensors file beside the index, got {name!r}")
    problems.raise_if_any()
    return index
