"""Weights in and out: a mapping from parameter path to array <-> this framework's parameters.

A path is the path of attributes that leads to a parameter, and the orientation is PyTorch's own, so that nothing is
renamed or turned here.
"""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from twinformer.checks import check_tensors
from twinformer.config import DType, ModelConfig, NormWeight
from twinformer.initializers import draw_weights, initial_weights
from twinformer.parameters import Kind, Parameter


def load_weights(model: nn.Module, tensors: Mapping[str, Any], *, finite: bool = False) -> None:
    """Set every parameter from ``tensors``: path -> NumPy array or tensor, cast to the parameter's dtype.

    Raises one WeightsError that names every missing, unexpected, mis-shaped and non-float leaf, and with ``finite``
    every one that holds NaN or infinity; nothing is changed then.
    """
    parameters = dict(model.named_parameters())
    check_tensors(
        type(model).__name__,
        tensors,
        {path: tuple(parameter.shape) for path, parameter in parameters.items()},
        non_finite=(lambda tensor: int((~_tensor(tensor).isfinite()).sum())) if finite else None,
    )
    with torch.no_grad():
        for path, parameter in parameters.items():
            parameter.copy_(_tensor(tensors[path]))


def export_weights(model: nn.Module) -> dict[str, npt.NDArray[Any]]:
    """Every parameter by path, as a copy in NumPy in the parameter's dtype (bfloat16 as ``ml_dtypes.bfloat16``)."""
    return {path: _array(parameter.detach().cpu()) for path, parameter in model.named_parameters()}


def _tensor(array: Any, *, copy: bool = True) -> Tensor:
    """``copy`` False: the memory of a contiguous array is the tensor's."""
    if isinstance(array, Tensor):
        return array
    # a copy: PyTorch takes neither read-only memory nor foreign byte order nor negative strides
    held = np.array(array, order="C") if copy or not array.flags.writeable else np.ascontiguousarray(array)
    if held.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(held.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(held.astype(held.dtype.newbyteorder("="), copy=False))


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    if tensor.dtype == torch.bfloat16:
        return np.array(tensor.contiguous().view(torch.int16).numpy()).view(ml_dtypes.bfloat16)
    return np.array(tensor.numpy(), order="C")


def initialize(module: nn.Module, seed: int | None, *, config: ModelConfig | None = None) -> None:
    """Fill the whole tree from ``twinformer.initializers``, by paths from ``module``.

    A model gives its ``config``, which names the initialiser; a building block draws Xavier uniform (Glorot & Bengio
    2010). ``seed=None`` leaves the weights as they are.
    """
    if seed is None:
        return
    if config is not None:
        load_weights(module, initial_weights(config, seed))
        return
    drawn: dict[str, npt.NDArray[np.float32]] = {}
    norm_weights: tuple[NormWeight, ...] = ("plain", "one_plus")
    for norm_weight in norm_weights:
        drawn |= draw_weights(_leaves(module, norm_weight), seed, norm_weight=norm_weight)
    load_weights(module, drawn)


def _leaves(module: nn.Module, norm_weight: NormWeight) -> dict[str, Parameter]:
    """The parameters that are owned by modules of this ``norm_weight``; all but norms count as plain."""
    found = {}
    for prefix, owner in module.named_modules():
        if getattr(owner, "norm_weight", "plain") != norm_weight:
            continue
        for name, parameter in owner.named_parameters(recurse=False):
            kind = cast(Kind, "bias" if name == "bias" else owner.kind)
            found[f"{prefix}.{name}".removeprefix(".")] = Parameter(tuple(parameter.shape), kind)
    return found


def load(
    directory: str | PathLike[str],
    *,
    dtype: DType | None = None,
    device: torch.device | str | None = None,
    finite: bool = False,
) -> nn.Module:
    """The model in a model directory, on ``device``; ``dtype`` sets param_dtype and compute_dtype.

    Raises CheckpointError for a directory that cannot be read, ConfigError and WeightsError for what is in it.
    """
    from torch_impl.models import build
    from twinformer.checkpoint import read_model

    config, tensors = read_model(Path(directory))
    model = build(config if dtype is None else config.with_dtype(dtype), seed=None)
    load_weights(model, tensors, finite=finite)
    return model.to(device)


def from_pretrained(
    directory: str | PathLike[str],
    *,
    dtype: DType | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """The model in a published directory (``twinformer.pretrained``) or in one of ours, on ``device``.

    The dtype is that of the file unless another is asked for. Values are read one tensor at a time, straight into the
    model: no second copy of the weights is held. Raises CheckpointError, ConfigError or WeightsError, each with all its
    problems.
    """
    from torch_impl.models import build
    from torch_impl.pickled import open_pickled
    from twinformer import pretrained

    place = Path(directory)
    if not pretrained.is_published(place):
        return load(place, dtype=dtype, device=device, finite=True)
    with pretrained.open(place, open_pickled=open_pickled) as opened:
        with torch.device("meta"):
            model = build(opened.config if dtype is None else opened.config.with_dtype(dtype), seed=None)
        owners = {
            f"{prefix}.{name}".removeprefix("."): (owner, name)
            for prefix, owner in model.named_modules()
            for name in owner._parameters
        }
        for path, array in opened.leaves():
            owner, name = owners[path]
            held = owner._parameters[name]
            assert held is not None
            assert held.shape == array.shape
            owner._parameters[name] = nn.Parameter(
                _tensor(array, copy=False).to(device=device or "cpu", dtype=held.dtype)
            )
    for owner in model.modules():
        if owner._buffers:  # frequencies of positions, which are no weights: made anew where the model now is
            owner.to_empty(device=device or "cpu", recurse=False)
    kind = torch.device(device or "cpu").type
    assert all(tensor.device.type == kind for tensor in (*model.parameters(), *model.buffers()))
    return model


def save(model: nn.Module, directory: str | PathLike[str]) -> None:
    """Write the model's config and weights as a model directory. Raises CheckpointError where it cannot."""
    from twinformer.checkpoint import write_model

    write_model(Path(directory), cast(ModelConfig, model.config), export_weights(model))
