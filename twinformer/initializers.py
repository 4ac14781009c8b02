"""Initial weights in NumPy, keyed by parameter path: a seed gives both twins the same bits.

Each leaf is drawn from a stream of its own, a Philox generator keyed by (seed, path), so that adding or
removing one parameter leaves all others as they were.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from twinformer.config import Initializer, ModelConfig, NormWeight
from twinformer.parameters import Parameter, model_parameters

# the standard deviation of a unit normal cut off at two standard deviations
_TRUNCATED_STD = 0.87962566103423978


def initial_weights(config: ModelConfig, seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """Every weight of the model in float32, PyTorch's orientation, by path."""
    return draw_weights(
        model_parameters(config),
        seed,
        initializer=config.initializer,
        std=config.initializer_std,
        norm_weight=config.norm_weight,
        residual_scale=1 / math.sqrt(2 * config.num_layers) if config.initializer_scale_residual else 1.0,
    )


def draw_weights(
    parameters: Mapping[str, Parameter],
    seed: int,
    *,
    initializer: Initializer = "xavier_uniform",
    std: float = 0.02,
    norm_weight: NormWeight = "plain",
    residual_scale: float = 1.0,
) -> dict[str, npt.NDArray[np.float32]]:
    """Draw each parameter by its kind, in float32.

    Norm weights start as the identity (1, or 0 where the layer adds 1), biases at 0, embeddings as a normal
    of ``std`` (truncated where the initialiser is). Linear weights follow ``initializer``:

    - ``normal``: N(0, std²);
    - ``truncated_normal``: the same cut off at two standard deviations, rescaled so that the standard
      deviation that results is ``std``;
    - ``xavier_uniform``: U(-a, a), a = sqrt(6 / (in + out)) (Glorot & Bengio 2010, eq. 16).

    ``residual_scale`` multiplies the matrices that add to the residual stream (GPT-2: 1/sqrt(2 L)).
    """
    weights = {}
    for path, parameter in parameters.items():
        weights[path] = _draw(path, parameter, seed, initializer, std, norm_weight, residual_scale)
    return weights


def stream(seed: int, path: str) -> np.random.Generator:
    """The random stream that belongs to one path under one seed."""
    digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def _draw(
    path: str,
    parameter: Parameter,
    seed: int,
    initializer: Initializer,
    std: float,
    norm_weight: NormWeight,
    residual_scale: float,
) -> npt.NDArray[np.float32]:
    shape = parameter.shape
    if parameter.kind == "bias":
        return np.zeros(shape, np.float32)
    if parameter.kind == "norm":
        return np.full(shape, 1.0 if norm_weight == "plain" else 0.0, np.float32)
    rng = stream(seed, path)
    if initializer == "truncated_normal":
        values = _truncated_normal(rng, shape) * (std / _TRUNCATED_STD)
    elif parameter.kind == "embedding" or initializer == "normal":
        values = rng.standard_normal(shape) * std
    else:
        outputs, inputs = shape
        bound = math.sqrt(6 / (inputs + outputs))
        values = rng.uniform(-bound, bound, shape)
    if parameter.residual:
        values = values * residual_scale
    return values.astype(np.float32)


def _truncated_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """A unit normal conditioned on |x| <= 2, by rejection."""
    values = rng.standard_normal(shape)
    while (outside := np.abs(values) > 2).any():
        values[outside] = rng.standard_normal(int(outside.sum()))
    return values
