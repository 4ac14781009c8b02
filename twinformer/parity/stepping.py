"""Optimizer steps in both frameworks, behind one interface: NumPy in, NumPy out."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import flax_impl
import torch_impl
from twinformer.learning import OptimizerConfig
from twinformer.parity.compare import FloatArray
from twinformer.parity.haste import hurried, little_care

Leaves = dict[str, FloatArray]


def steps(
    name: str,
    config: OptimizerConfig,
    parameters: Leaves,
    gradients: Sequence[Leaves],
    rates: Sequence[float],
    dtype: str = "float64",
) -> list[Leaves]:
    """The parameters before the first and after each step in ``dtype``. ``name`` is that of the twin's package."""
    run = {"torch_impl": _torch_steps, "flax_impl": _flax_steps}[name]
    given = {path: np.array(leaf, dtype) for path, leaf in parameters.items()}
    return run(config, given, [{path: np.array(g, dtype) for path, g in leaves.items()} for leaves in gradients], rates)


def _torch_steps(
    config: OptimizerConfig, parameters: Leaves, gradients: Sequence[Leaves], rates: Sequence[float]
) -> list[Leaves]:
    optimizer = torch_impl.Optimizer(config)
    held = {path: torch.from_numpy(leaf) for path, leaf in parameters.items()}
    state = optimizer.init(held)
    seen = [{path: leaf.numpy().copy() for path, leaf in held.items()}]
    for leaves, rate in zip(gradients, rates, strict=True):
        now = {path: torch.from_numpy(leaf) for path, leaf in leaves.items()}
        held, state = optimizer.update(held, now, state, rate)
        seen.append({path: leaf.detach().numpy().copy() for path, leaf in held.items()})
    return seen


def _flax_steps(
    config: OptimizerConfig, parameters: Leaves, gradients: Sequence[Leaves], rates: Sequence[float]
) -> list[Leaves]:
    # what is asked in float32 is what users get
    is_wide = all(leaf.dtype == np.float64 for leaf in parameters.values())
    with jax.enable_x64(True), hurried(parameters) if is_wide else contextlib.nullcontext():
        optimizer = flax_impl.Optimizer(config)
        held: Any = {path: jnp.asarray(leaf) for path, leaf in parameters.items()}
        state: Any = optimizer.init(held)
        update = jax.jit(optimizer.update, compiler_options=little_care(parameters) if is_wide else {})
        seen = [{path: np.array(leaf) for path, leaf in held.items()}]
        for leaves, rate in zip(gradients, rates, strict=True):
            now = {path: jnp.asarray(leaf) for path, leaf in leaves.items()}
            held, state = update(held, now, state, rate)
            seen.append({path: np.array(leaf) for path, leaf in held.items()})
        return seen
