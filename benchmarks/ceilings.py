"""What the machine can do at all, measured in the same run: products at a case's own shapes, and reading memory.

``python -m benchmarks.ceilings CASE`` prints one line of JSON. Matrix products are timed in PyTorch and in XLA, in the
three orientations of a training step, and the faster framework counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import cases
from benchmarks.cases import Case

REPEATS = 7


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("case")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    case = {one.name: one for one in (cases.QUICK if options.quick else cases.FULL)}[options.case]
    print(json.dumps(measure(case, options.threads)))  # noqa: T201
    return 0


def measure(case: Case, threads: int) -> dict[str, Any]:
    """Operations a second of the best products, by shape, their average weighted by work, and bytes a second."""
    import torch

    torch.set_num_threads(threads)
    by_shape = {}
    total_flops = total_time = 0.0
    for (N, D, F), count in shapes(case).items():
        seconds = sum(products(N, D, F))
        flops = 3 * 2 * N * D * F
        by_shape[f"{N}x{D}x{F}"] = flops / seconds
        total_flops += count * flops
        total_time += count * seconds
    return {
        "products": by_shape,
        "flops": total_flops / total_time,
        "bytes": reading(torch),
        "copy": copying(torch),
    }


def shapes(case: Case) -> dict[tuple[int, int, int], int]:
    """The products of the model, ``[N, D] [D, F]``, and how often each occurs."""
    config, N = case.config, case.B * max(case.T, case.S)
    D, A, K, F, L = config.model_dim, config.num_heads, config.key_dim, config.hidden_dim, config.num_layers
    found: dict[tuple[int, int, int], int] = {}
    for shape, count in (
        ((N, D, A * K), 3 * L),
        ((N, A * K, D), L),
        ((N, D, F), (2 if config.gated else 1) * L),
        ((N, F, D), L),
        ((N, D, config.vocab_size), 1),
    ):
        found[shape] = found.get(shape, 0) + count
    return found


def products(N: int, D: int, F: int) -> list[float]:
    """Seconds of ``X W``, ``dY Wᵀ`` and ``Xᵀ dY``, each the better of both frameworks."""
    import jax
    import jax.numpy as jnp
    import torch

    rng = np.random.default_rng(0)
    X, W, dY = (rng.standard_normal(shape).astype(np.float32) for shape in ((N, D), (D, F), (N, F)))
    x, w, dy = (torch.from_numpy(array) for array in (X, W, dY))
    turned = w.T.contiguous()
    jx, jw, jdy = (jnp.asarray(array) for array in (X, W, dY))
    plain = jax.jit(jnp.matmul)
    with_transpose = jax.jit(lambda a, b: a @ b.T)
    transposed = jax.jit(lambda a, b: a.T @ b)
    return [
        min(best(lambda: x @ turned.T), best(lambda: plain(jx, jw).block_until_ready())),
        min(best(lambda: dy @ turned), best(lambda: with_transpose(jdy, jw).block_until_ready())),
        min(best(lambda: dy.T @ x), best(lambda: transposed(jx, jdy).block_until_ready())),
    ]


def reading(torch: Any) -> float:
    """Bytes a second of a matrix-vector product whose matrix is far larger than any cache: the better of two ways.

    PyTorch's own product does not reach what the memory gives; a batch of products with parts of the matrix does.
    """
    matrix, vector = torch.randn(8192, 8192), torch.randn(8192)
    parts, columns = matrix.view(8, 1024, 8192), vector[:, None].expand(8, 8192, 1)
    quickest = min(best(lambda: matrix @ vector), best(lambda: torch.bmm(parts, columns)))
    return float(4 * matrix.numel() / quickest)


def copying(torch: Any) -> float:
    """Bytes a second, read and written."""
    one = torch.randn(64 * 2**20)
    other = torch.empty_like(one)
    return float(8 * one.numel() / best(lambda: other.copy_(one)))


def best(function: Callable[[], Any]) -> float:
    function()
    found = []
    for _ in range(REPEATS):
        before = time.perf_counter()
        function()
        found.append(time.perf_counter() - before)
    return min(found)


if __name__ == "__main__":
    sys.exit(main())
