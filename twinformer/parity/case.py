"""What is judged: a configuration, weights, inputs and a cotangent, the same for both twins."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from twinformer.config import DType, ModelConfig
from twinformer.initializers import stream
from twinformer.parameters import Parameter, model_parameters

Arrays = dict[str, npt.NDArray[Any]]

# longest sequence that is drawn: beyond 256, where bfloat16 stops counting
_LONGEST = 264
# but to reach beyond a window, or the largest relative distance, as far as this
_FARTHEST = 1032


@dataclass(frozen=True)
class Case:
    """``inputs`` are the keyword arguments of the model's call, as NumPy arrays.

    ``cotangent`` weights the output in the scalar ``sum(output * cotangent)`` whose gradients are compared. ``finite``:
    weights that are not finite are refused; without it they are what is tested. ``training``: the model is called as a
    trainer calls it, of whose ways some are its own.
    """

    name: str
    config: ModelConfig
    tensors: Arrays
    inputs: Arrays
    cotangent: npt.NDArray[np.float64]
    finite: bool = True
    training: bool = False

    def in_dtype(self, dtype: DType) -> Case:
        """The same case with the arithmetic in ``dtype`` and the weights rounded to it."""
        kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        # the detour over the rounded value keeps float64 truth and low-precision run on the very same weights
        tensors = {path: tensor.astype(kind) for path, tensor in self.tensors.items()}
        return dataclasses.replace(self, config=self.config.with_dtype(dtype), tensors=tensors)


def computing_in(case: Case, dtype: DType) -> Case:
    """The same case with the arithmetic in ``dtype`` and the weights in the dtype that they have."""
    return dataclasses.replace(case, config=case.config.replace(compute_dtype=dtype))


def with_all_digits(case: Case) -> Case:
    """A float64 case whose weights need float64: weights that came from float32 would survive a detour over it."""

    def filled(path: str, tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return tensor * (1 + stream(0, f"digits/{path}").uniform(0, 2.0**-30, tensor.shape))

    return dataclasses.replace(case, tensors={path: filled(path, tensor) for path, tensor in case.tensors.items()})


def random_case(name: str, config: ModelConfig, seed: int = 0, batch: int = 4, length: int | None = None) -> Case:
    """Weights and inputs drawn so that mistakes show: see ``telling_weights`` and ``telling_inputs``."""
    inputs = telling_inputs(config, seed, batch, length)
    return make_case(name, config, telling_weights(config, seed), inputs, seed)


def make_case(name: str, config: ModelConfig, tensors: Mapping[str, Any], inputs: Arrays, seed: int = 0) -> Case:
    """A case with a random cotangent of the output's shape."""
    B, T = inputs["target" if "target" in inputs else "tokens"].shape
    cotangent = stream(seed, "cotangent").standard_normal(config.output_shape(B, T))
    return Case(name, config, dict(tensors), inputs, cotangent)


def telling_weights(config: ModelConfig, seed: int) -> Arrays:
    """Weights under which no choice of the architecture is invisible.

    Initial weights would hide much: with norm weights of 1, biases of 0 and small matrices, a swapped norm, a
    forgotten bias or a wrong GELU changes next to nothing. Here every matrix has a scale and an offset of
    its own, norm weights are away from 1 (or 0 where 1 is added), biases away from 0; among the embeddings
    one row has a mean far above its spread and one a variance near the norm's eps; one unit of each feed-forward
    layer is given exactly 0.
    """
    return {
        path: _telling(path, parameter, config, seed).astype(np.float32)
        for path, parameter in model_parameters(config).items()
    }


def _telling(path: str, parameter: Parameter, config: ModelConfig, seed: int) -> npt.NDArray[np.float64]:
    rng = stream(seed, f"telling/{path}")
    shape = parameter.shape
    if parameter.kind == "norm":
        centre = 1.0 if config.norm_weight == "plain" else 0.0
        return centre + rng.uniform(-0.5, 0.5, shape)
    if parameter.kind == "bias":
        values = rng.normal(rng.uniform(-0.2, 0.2), 0.3, shape)
        if _is_before_activation(path, config):
            values[0] = 0
        return values
    if parameter.kind == "linear":
        inputs = shape[1]
        spread = rng.uniform(0.6, 1.4) / np.sqrt(inputs)
        values = rng.normal(rng.uniform(-0.1, 0.1) * spread, spread, shape)
        if _is_before_activation(path, config):
            values[0] = 0
        return values
    values = rng.normal(0, 1, shape)
    if path.endswith("tokens.weight") and len(values) >= 4:
        values[1] = 30 + 0.01 * values[1]
        values[2] = np.sqrt(config.norm_eps) * values[2]
        values[3] = 4 * values[3] / np.abs(values[3]).max()
    return values


def _is_before_activation(path: str, config: ModelConfig) -> bool:
    """Whether the parameter makes what the activation is given: one unit gets exactly 0 there, at a ReLU's kink."""
    return f".feedforward.{'gate' if config.gated else 'up'}." in path


def telling_inputs(config: ModelConfig, seed: int, batch: int = 4, length: int | None = None) -> Arrays:
    """Token ids with no, left and right padding and one row that is padding only, longer than any window."""
    reach = max(config.window or 0, config.relative_max_distance if config.positions == "relative" else 0)
    T = min(config.context_length, length or max(_LONGEST, min(reach + 8, _FARTHEST)))
    if config.architecture == "encoder-decoder":
        S = max(1, T - 5)
        source, source_mask = _tokens(config.source_vocab_size, seed, "source", batch, S, empty_row=True)
        target, target_mask = _tokens(config.vocab_size, seed, "target", batch, T, empty_row=False)
        return {
            "source": source,
            "target": target,
            "source_padding_mask": source_mask,
            "target_padding_mask": target_mask,
        }
    tokens, mask = _tokens(config.vocab_size, seed, "tokens", batch, T, empty_row=True)
    inputs: Arrays = {"tokens": tokens, "padding_mask": mask}
    if config.num_token_types:
        inputs["token_types"] = stream(seed, "token_types").integers(0, config.num_token_types, tokens.shape)
    return inputs


def _tokens(
    vocabulary: int, seed: int, name: str, batch: int, length: int, *, empty_row: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Row 0 has no padding, row 1 has it on the left, row 2 on the right and between tokens, row 3 nothing else (if
    asked for)."""
    rng = stream(seed, f"inputs/{name}")
    tokens = rng.integers(0, vocabulary, (batch, length))
    for place, token in enumerate((1, 2, 3)):  # the rows of the table that tell most
        if token < vocabulary and place < length:
            tokens[0, place] = token
    real = np.ones((batch, length), np.bool_)
    pad = max(1, length // 3)
    if batch > 1:
        real[1, :pad] = False
    if batch > 2:
        real[2, length - pad :] = False
        real[2, [place for place in (1, length // 2) if 0 < place < length - pad]] = False
    if batch > 3 and empty_row:
        real[3] = False
    return tokens, real
