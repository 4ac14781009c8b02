"""Our PyTorch twin."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch.optim.adamw import adamw as adamw_step

import torch_impl
from benchmarks.cases import LEARNING_RATE, WEIGHT_DECAY, Arrays, Case
from benchmarks.systems.shared import BEAM, batch_of, training_config
from benchmarks.systems.torch_work import Call, Written, tensors
from torch_impl.attention import attend
from torch_impl.beam import beam_search
from torch_impl.feedforward import activate
from torch_impl.generation import Generator
from torch_impl.losses import cross_entropy
from torch_impl.masks import causal_mask
from torch_impl.norms import LayerNorm
from twinformer.config import DType


def make(case: Case, weights: Arrays, variant: str) -> Any:
    is_compiled = variant == "compiled"
    if case.kind == "micro":
        return Micro(case)
    if case.kind == "train" or case.name == "dispatch-train":
        return Training(case, weights, is_compiled)
    model = torch_impl.build(case.config, seed=None)
    torch_impl.load_weights(model, weights)
    if case.kind in ("decode", "beam"):
        return decoding(case, model, is_compiled)
    call = torch_impl.compiled(model) if is_compiled else model
    inputs = tensors(case.inputs())
    return Call(lambda: call(**inputs))


def decoding(case: Case, model: Any, is_compiled: bool) -> Any:
    inputs = case.inputs()
    slots = case.T + case.new
    if case.kind == "beam":
        return Written(
            lambda: beam_search(
                model, inputs["target"], source=inputs["source"], max_new_tokens=case.new, beam=BEAM
            ).tokens[:, 0]
        )
    generator = Generator(model, slots=slots, bucket=case.T, compile=is_compiled)
    return Written(lambda: generator(inputs["tokens"], max_new_tokens=case.new).tokens)


class Training:
    """A whole step of ``Trainer``; its metrics are those that a user reads."""

    def __init__(self, case: Case, weights: Arrays, is_compiled: bool) -> None:
        self._trainer = torch_impl.Trainer(case.config, training_config(), compile=is_compiled)
        self._weights, self._case, self._batch = weights, case, batch_of(case)
        self._state = self._trainer.init(weights)

    def outputs(self) -> Arrays:
        model = torch_impl.build(self._case.config, seed=None)
        torch_impl.load_weights(model, self._weights)
        with torch.no_grad():
            logits = model(**tensors(self._case.inputs())).double().numpy()
        self._state, before = self._trainer.step(self._state, [self._batch])
        after = self._trainer.evaluate(self._state, self._batch)
        return {
            "logits": logits,
            "loss": np.array(float(before.loss)),
            "gradient norm": np.array(float(before.gradient_norm)),
            "loss after a step": np.array(after.loss),
        }

    def run(self) -> None:
        self._state, metrics = self._trainer.step(self._state, [self._batch])
        float(metrics.loss)


class Micro:
    """One operation at the reference case's shapes; gradients where the name says so."""

    def __init__(self, case: Case, *, wide: bool = False) -> None:
        config, N = case.config, case.B * case.T
        D, F_, V, A, K = config.model_dim, config.hidden_dim, config.vocab_size, config.num_heads, config.key_dim
        rng = np.random.default_rng(13)
        dtype: DType = "float64" if wide else "float32"

        def drawn(*shape: int) -> torch.Tensor:
            drawn = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
            return drawn.double() if wide else drawn

        x, w, dy = drawn(N, D), drawn(F_, D), drawn(N, F_)
        Q, K_, V_ = drawn(case.B, A, case.T, K), drawn(case.B, A, case.T, K), drawn(case.B, A, case.T, K)
        logits, table, one = drawn(1, N, V), drawn(V, D), drawn(1, D)
        targets = torch.from_numpy(rng.integers(0, V, (1, N)))
        allowed = causal_mask(case.T, case.T)
        norm = LayerNorm(D, param_dtype=dtype, compute_dtype=dtype)
        scale = 1 / math.sqrt(K)
        matrix, gradient, mean, square = drawn(F_, D), drawn(F_, D), torch.zeros(F_, D), torch.zeros(F_, D)

        def attention_gradient() -> torch.Tensor:
            leaves = [X.requires_grad_() for X in (Q, K_, V_)]
            Z = attend(*leaves, scale=scale, allowed=allowed)
            return torch.autograd.grad(Z, leaves, Q.detach())[0]

        def loss() -> torch.Tensor:
            leaf = logits.requires_grad_()
            return torch.autograd.grad(cross_entropy(leaf, targets)[0], leaf)[0]

        def adamw() -> torch.Tensor:
            adamw_step(
                [matrix],
                [gradient],
                [mean],
                [square],
                [],
                [torch.tensor(1.0)],
                fused=True,
                foreach=False,
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=LEARNING_RATE,
                weight_decay=WEIGHT_DECAY,
                eps=1e-8,
                maximize=False,
            )
            return matrix

        operations = {
            "matmul": lambda: F.linear(x, w),
            "matmul-dx": lambda: dy @ w,
            "matmul-dw": lambda: dy.T @ x,
            "matvec": lambda: F.linear(one, table),
            "attention": lambda: attend(Q.detach(), K_.detach(), V_.detach(), scale=scale, allowed=allowed),
            "attention-grad": attention_gradient,
            "norm": lambda: norm(x),
            "gelu": lambda: activate(dy, "gelu"),
            "loss": loss,
            "adamw": adamw,
        }
        self._run = operations[case.op]
        self._no_grad = case.op not in ("attention-grad", "loss")

    def outputs(self) -> Arrays:
        return {"result": self._called().detach().double().numpy()}

    def run(self) -> None:
        self._called()

    def _called(self) -> torch.Tensor:
        with torch.set_grad_enabled(not self._no_grad):
            found: torch.Tensor = self._run()
            return found
