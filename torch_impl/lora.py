"""Low-rank adapters: each chosen matrix W gets two small ones, B and A, and only these are trained.

Hu et al. 2021, arXiv:2106.09685, section 4.1: ``W + alpha / rank · B A``, with ``W [out, in]``, ``A [rank, in]`` and
``B [out, rank]``. A starts random and B at zero, so that training starts from W itself. The adapters of
``…query.weight`` are ``…query.lora_a`` and ``…query.lora_b``.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from torch_impl.linear import wide_dtype
from twinformer.errors import ConfigError, InputError, Problems
from twinformer.initializers import stream
from twinformer.learning import LoraConfig

Tensors = dict[str, Float[Tensor, "..."]]


def init_adapters(weights: Mapping[str, Float[Tensor, "..."]], config: LoraConfig, seed: int) -> Tensors:
    """The adapters of these weights: A from a normal of standard deviation ``1 / sqrt(in)``, B zero.

    Each A is drawn from the stream of its own path, in float32 as all initial weights are, and has the dtype and place
    of its W. Raises ConfigError where no weight matches the targets.
    """
    adapters = {}
    for path, shape in adapter_shapes({path: tuple(W.shape) for path, W in weights.items()}, config).items():
        W = weights[f"{path.rpartition('.')[0]}.weight"]
        adapters[path] = torch.zeros(shape, dtype=W.dtype, device=W.device)
        if path.endswith(".lora_a"):
            drawn = stream(seed, path).standard_normal(shape) / math.sqrt(shape[1])
            adapters[path].copy_(torch.from_numpy(drawn.astype(np.float32)))
    return adapters


def merge(
    weights: Mapping[str, Float[Tensor, "..."]], adapters: Mapping[str, Float[Tensor, "..."]], config: LoraConfig
) -> Tensors:
    """All weights, those with an adapter as ``W + alpha / rank · B A``: the product wide, rounded once to W's dtype.

    Differentiable in weights and adapters. Raises ConfigError where no weight matches the targets, and one InputError
    with every adapter that is missing, unexpected or of another shape.
    """
    wanted = adapter_shapes({path: tuple(W.shape) for path, W in weights.items()}, config)
    _check(wanted, adapters)
    merged = dict(weights)
    for a in wanted:
        owner, _, leaf = a.rpartition(".")
        if leaf == "lora_a":
            W, A, B = weights[f"{owner}.weight"], adapters[a], adapters[f"{owner}.lora_b"]
            wide = wide_dtype(W.dtype)
            merged[f"{owner}.weight"] = torch.addmm(W.to(wide), B.to(wide), A.to(wide), alpha=config.scale).to(W.dtype)
    return merged


def adapter_shapes(shapes: Mapping[str, tuple[int, ...]], config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """The adapters that weights of these shapes have, by path. Raises ConfigError where there are none."""
    found: dict[str, tuple[int, ...]] = {}
    for path, shape in shapes.items():
        if config.adapts(path) and len(shape) == 2:
            owner = path.removesuffix(".weight")
            found[f"{owner}.lora_a"] = (config.rank, shape[1])
            found[f"{owner}.lora_b"] = (shape[0], config.rank)
    if not found:
        names = ", ".join(config.targets)
        raise ConfigError("LoraConfig", [f"targets: expected the name of a linear layer of the model, got {names}"])
    return found


def _check(wanted: Mapping[str, tuple[int, ...]], adapters: Mapping[str, Any]) -> None:
    problems = Problems("merge", InputError)
    for path in sorted({*wanted, *adapters}):
        if path not in adapters:
            problems.add(f"adapters: {path}: missing, expected shape {wanted[path]}")
        elif path not in wanted:
            problems.add(f"adapters: {path}: unexpected")
        else:
            shape = tuple(adapters[path].shape)
            problems.expect(shape == wanted[path], f"adapters: {path}: expected shape {wanted[path]}, got {shape}")
    problems.raise_if_any()
