"""Arrays inside the structures that models take and give: named, replaced, and moved between frameworks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]
Arrays = dict[str, Array]


def is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | jax.Array | torch.Tensor)


def is_float(value: Any) -> bool:
    """Whether an array of any of the three kinds holds floating-point numbers."""
    if isinstance(value, torch.Tensor):
        return value.is_floating_point()
    return bool(jax.numpy.issubdtype(value.dtype, np.floating))


def named(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every array in a structure of tuples, lists, mappings and dataclasses, with its dotted path."""
    if is_array(value):
        yield path, value
    else:
        for key, part in _parts(value):
            yield from named(part, f"{path}.{key}" if path else key)


def replaced(value: Any, change: Callable[[str, Any], Any], path: str = "") -> Any:
    """The same structure with every array replaced by ``change(path, array)``; all else stays."""
    if is_array(value):
        return change(path, value)
    parts = {key: replaced(part, change, f"{path}.{key}" if path else key) for key, part in _parts(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **parts)
    if isinstance(value, Mapping):
        made: Any = type(value)
        return made(zip(value.keys(), parts.values(), strict=True))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*parts.values())
    if isinstance(value, tuple | list):
        return type(value)(parts.values())
    return value


def _parts(value: Any) -> list[tuple[str, Any]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(one.name, getattr(value, one.name)) for one in dataclasses.fields(value) if one.init]
    if isinstance(value, Mapping):
        return [(str(key), part) for key, part in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, tuple | list):
        return [(str(place), part) for place, part in enumerate(value)]
    return []


def to_numpy(value: Any) -> Array:
    """A copy in NumPy, in the dtype that it has."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        if value.dtype == torch.bfloat16:
            return np.array(value.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
        value = value.numpy()
    return np.array(value)


def to_torch(array: Array) -> torch.Tensor:
    copy = np.array(array)
    if copy.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(copy.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(copy)


def in_dtype(array: Array, dtype: str) -> Array:
    """Floating-point numbers in ``dtype``; whole numbers and truth values as they are."""
    return array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype) if is_float(array) else array
