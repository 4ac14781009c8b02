"""Weights by path: the names and the orientation of PyTorch and of files on disk, and back.

A path is the path of attributes to a parameter. Flax keeps its own names for the last step, by four rules that
follow the type of the module which owns the leaf (its ``kind``), never the shape of the array:

    linear     weight [out, in]  ↔  kernel [in, out], transposed
    norm       weight            ↔  scale
    embedding  weight            ↔  embedding
    any        bias              ↔  bias

This file is read last, but it comes first in imports: every module fills itself through ``initialize``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

from twinformer.checks import check_tensors
from twinformer.config import DType, ModelConfig, NormWeight
from twinformer.initializers import draw_weights, initial_weights
from twinformer.parameters import Kind, Parameter

if TYPE_CHECKING:
    from flax_impl.models import EncoderDecoder, EncoderModel, LanguageModel

_WEIGHT_NAMES: dict[str, Kind] = {"kernel": "linear", "scale": "norm", "embedding": "embedding"}


class _Leaf(NamedTuple):
    """A parameter where it lives: its owner, its kind, and the array that can be read and set."""

    owner: nnx.Module
    kind: Kind
    param: nnx.Param[jax.Array]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in PyTorch's orientation."""
        shape = tuple(self.param.shape)
        return shape[::-1] if self.kind == "linear" else shape


def load_weights(model: nnx.Module, tensors: Mapping[str, Any], *, finite: bool = False) -> None:
    """Set every parameter from ``tensors``: path → array (NumPy or JAX) in PyTorch's orientation.

    Casts to ``param_dtype``. Raises one WeightsError that names every missing, unexpected, mis-shaped and non-float
    leaf (with ``finite``, every non-finite one too); nothing is changed unless all are right.
    """
    leaves = dict(_leaves(model))
    check_tensors(
        type(model).__name__,
        tensors,
        {path: leaf.shape for path, leaf in leaves.items()},
        non_finite=(lambda tensor: int((~np.isfinite(np.asarray(tensor))).sum())) if finite else None,
    )
    for path, leaf in leaves.items():
        array = np.asarray(tensors[path])
        # turned before JAX has it, which would compile that for every shape; a copy: the caller's memory must not
        # become the model's
        array = np.array(array.T if leaf.kind == "linear" else array, order="C")
        if np.can_cast(array.dtype, leaf.param.dtype):  # without rounding
            array = array.astype(leaf.param.dtype)
        leaf.param.set_value(jnp.asarray(array, leaf.param.dtype))


def export_weights(model: nnx.Module) -> dict[str, npt.NDArray[Any]]:
    """Every parameter by path, a copy in PyTorch's orientation and in ``param_dtype`` (bfloat16 as ml_dtypes')."""
    arrays = {path: (leaf.kind, np.asarray(leaf.param[...])) for path, leaf in _leaves(model)}
    return {path: np.array(array.T if kind == "linear" else array, order="C") for path, (kind, array) in arrays.items()}


def initialize(module: nnx.Module, seed: int, *, config: ModelConfig | None = None) -> None:
    """Fill every parameter from ``twinformer.initializers``, by its path from ``module``.

    With a model's configuration as it says; without one, linear weights are Xavier uniform.
    """
    load_weights(module, _drawn(module, seed) if config is None else initial_weights(config, seed))


def load(
    directory: str | Path, *, dtype: DType | None = None, finite: bool = False
) -> EncoderModel | LanguageModel | EncoderDecoder:
    """The model in a model directory, with parameters and arithmetic in ``dtype`` (None: as its configuration says).

    Raises CheckpointError, ConfigError or WeightsError.
    """
    from flax_impl.models import skeleton
    from twinformer.checkpoint import read_model

    config, tensors = read_model(directory)
    model = skeleton(config if dtype is None else config.with_dtype(dtype))
    load_weights(model, tensors, finite=finite)
    return model


def from_pretrained(
    directory: str | Path, *, dtype: DType | None = None
) -> EncoderModel | LanguageModel | EncoderDecoder:
    """The model in a published directory (``twinformer.pretrained``) or in one of ours.

    The dtype is that of the file unless another is asked for. Values are read one tensor at a time, straight into the
    model: no second copy of the weights is held. Weights that are there as pickles only take PyTorch to read:
    ``twinformer convert`` writes them anew. Raises CheckpointError, ConfigError or WeightsError, each with all its
    problems.
    """
    from flax_impl.models import skeleton
    from twinformer import pretrained

    if not pretrained.is_published(directory):
        return load(directory, dtype=dtype, finite=True)
    with pretrained.open(directory) as opened:
        config = opened.config if dtype is None else opened.config.with_dtype(dtype)
        model = skeleton(config)
        leaves = dict(_leaves(model))
        for path, array in opened.leaves():
            leaf = leaves.pop(path)
            assert leaf.shape == array.shape
            if leaf.kind == "linear":
                array = np.ascontiguousarray(array.T)
            leaf.param.set_value(jnp.asarray(array, leaf.param.dtype))
            del array
        assert not leaves, sorted(leaves)
    return model


def save(model: EncoderModel | LanguageModel | EncoderDecoder, directory: str | Path) -> None:
    """Write a model directory. Raises CheckpointError."""
    from twinformer.checkpoint import write_model

    write_model(directory, model.config, export_weights(model))


def _leaves(module: nnx.Module, prefix: str = "") -> Iterator[tuple[str, _Leaf]]:
    """Every parameter below a module with its path, in the order of construction."""
    for name, part in vars(module).items():
        if isinstance(part, nnx.Param):
            kind = _WEIGHT_NAMES.get(name, "bias")
            assert kind in ("bias", getattr(module, "kind", None)), f"{prefix}{name} in a {type(module).__name__}"
            yield f"{prefix}{'bias' if kind == 'bias' else 'weight'}", _Leaf(module, kind, part)
        elif isinstance(part, nnx.Module):
            yield from _leaves(part, f"{prefix}{name}.")


def _drawn(module: nnx.Module, seed: int) -> dict[str, npt.NDArray[np.float32]]:
    drawn: dict[str, npt.NDArray[np.float32]] = {}
    for path, leaf in _leaves(module):
        norm_weight: NormWeight = getattr(leaf.owner, "norm_weight", "plain")
        drawn |= draw_weights({path: Parameter(leaf.shape, leaf.kind)}, seed, norm_weight=norm_weight)
    return drawn
