"""What every PyTorch system shares: a training step around a function of the weights, and the gate's outputs of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks.cases import LEARNING_RATE, WEIGHT_DECAY, Arrays, Case


class Step:
    """Cross-entropy over all places, and AdamW, on ``logits()`` of a PyTorch model as users write it."""

    def __init__(self, case: Case, logits: Callable[[], Tensor], parameters: Iterable[Tensor], *, fused: bool) -> None:
        self._logits, self._parameters = logits, list(parameters)
        self._targets = torch.from_numpy(case.targets())
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            betas=(0.9, 0.999),
            eps=1e-8,
            **({"fused": True} if fused else {}),
        )

    def outputs(self) -> Arrays:
        """Logits, loss and norm of the gradient, and the loss after one step."""
        logits = self._logits()
        loss = self._loss(logits)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in self._parameters if p.grad is not None))
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            after = self._loss(self._logits())
        return {
            "logits": logits.detach().double().numpy(),
            "loss": np.array(loss.item()),
            "gradient norm": np.array(norm),
            "loss after a step": np.array(after.item()),
        }

    def run(self) -> None:
        self._optimizer.zero_grad()
        self._loss(self._logits()).backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    def _loss(self, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), self._targets.reshape(-1))


class Call:
    """One forward pass without gradients."""

    def __init__(self, call: Callable[[], Tensor], name: str = "logits") -> None:
        self._call, self._name = call, name

    def outputs(self) -> Arrays:
        with torch.inference_mode():
            return {self._name: self._call().double().numpy()}

    def run(self) -> None:
        with torch.inference_mode():
            self._call()


class Written:
    """Tokens from a function that writes them."""

    def __init__(self, write: Callable[[], Any]) -> None:
        self._write = write

    def outputs(self) -> Arrays:
        return {"tokens": np.asarray(self._write())}

    def run(self) -> None:
        self._write()


def tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
