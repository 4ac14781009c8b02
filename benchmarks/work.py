"""How much a case must compute and read at least: the roofline's side of a result.

Matrix products only, two operations a multiply-add, in both counting conventions: ``causal`` counts the pairs that a
decoder may see, ``full`` the whole square. Bytes are those that a step of decoding cannot avoid: every weight that it
multiplies with once, and the keys and values written so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.cases import Case
from twinformer.config import ModelConfig
from twinformer.parameters import model_parameters
from twinformer.runs.flops import forward_flops


@dataclass(frozen=True)
class Work:
    """Of one unit of a case (a step, a call, a written token): operations by both conventions, bytes, tokens."""

    flops: int
    flops_full: int
    bytes: int
    tokens: int


class _Shape:
    def __init__(self, *shape: int) -> None:
        self.shape = shape


def work_of(case: Case) -> Work:
    """What one unit of the case is."""
    config = case.config
    if case.kind == "micro":
        return _micro(case)
    inputs: dict[str, Any] = {"tokens": _Shape(case.B, case.T)}
    if config.architecture == "encoder-decoder":
        inputs = {"source": _Shape(case.B, case.S), "target": _Shape(case.B, case.T)}
    if case.kind in ("decode", "beam"):
        flops = _decoded_flops(case)
        return Work(flops, flops, _decoded_bytes(case), case.B * case.new)
    flops = forward_flops(config, inputs)
    full = flops + _hidden_pairs(case)
    times = 3 if case.kind == "train" or case.name == "dispatch-train" else 1
    weights = 4 * sum(_size(p.shape) for p in model_parameters(config).values())
    # AdamW reads weight, gradient and both moments and writes three of them back
    touched = weights * (7 if times == 3 else 1)
    return Work(times * flops, times * full, touched, case.B * case.T)


def _hidden_pairs(case: Case) -> int:
    """What ``causal`` leaves out of self-attention: pairs above the diagonal."""
    config = case.config
    if config.architecture == "encoder":
        return 0
    pairs = case.T * case.T - case.T * (case.T + 1) // 2
    return config.num_layers * 2 * case.B * config.num_heads * (config.key_dim + config.value_dim) * pairs


def _read_per_token(config: ModelConfig) -> int:
    """Weights that writing one token multiplies with: the decoder's matrices and the table of the head."""
    total = 0
    stack = "decoder." if config.architecture == "encoder-decoder" else "stack."
    for path, parameter in model_parameters(config).items():
        # keys and values of the source were computed once
        is_memory = "cross_attention.key" in path or "cross_attention.value" in path
        if path.startswith(stack) and not is_memory:
            total += _size(parameter.shape)
    return total + config.vocab_size * config.model_dim


def _decoded_bytes(case: Case) -> int:
    """All steps together: weights once a step, keys and values as far as they are written."""
    config = case.config
    rows = case.B * (4 if case.kind == "beam" else 1)
    per_place = config.num_layers * config.num_kv_heads * (config.key_dim + config.value_dim)
    places = sum(case.T + step for step in range(case.new)) + case.new * case.S
    return 4 * (case.new * _read_per_token(config) + rows * per_place * places)


def _decoded_flops(case: Case) -> int:
    rows = case.B * (4 if case.kind == "beam" else 1)
    return 2 * rows * case.new * _read_per_token(case.config)


def _micro(case: Case) -> Work:
    config, N = case.config, case.B * case.T
    D, F, V = config.model_dim, config.hidden_dim, config.vocab_size
    A, K, T = config.num_heads, config.key_dim, case.T
    product = 2 * N * D * F
    attention = 4 * case.B * A * K * T * (T + 1) // 2
    full = 4 * case.B * A * K * T * T
    match case.op:
        case "matmul" | "matmul-dx" | "matmul-dw":
            return Work(product, product, 4 * (N * D + D * F + N * F), N)
        case "matvec":
            return Work(2 * D * V, 2 * D * V, 4 * D * V, 1)
        case "attention":
            return Work(attention, full, 16 * N * D, N)
        case "attention-grad":
            return Work(3 * attention, 3 * full, 32 * N * D, N)
        case "norm":
            return Work(0, 0, 8 * N * D, N)
        case "gelu":
            return Work(0, 0, 8 * N * F, N)
        case "loss":
            return Work(0, 0, 4 * 3 * N * V, N)
        case "adamw":
            return Work(0, 0, 28 * D * F, 0)
    raise ValueError(f"op: expected a known operation, got {case.op!r}")


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size
