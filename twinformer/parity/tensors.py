"""Arrays of NumPy and tensors of PyTorch, the one made of the other in the same dtype, bfloat16 among them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch


def from_torch(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The tensor's values on the CPU; in its own memory, if it lies there."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_torch(array: npt.NDArray[Any]) -> torch.Tensor:
    """A tensor of its own."""
    copy = np.array(array)
    if copy.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(copy.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(copy)
