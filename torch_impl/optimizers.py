"""The optimizers, with everything in sight: parameters, gradients and state are mappings from path to tensor.

Arithmetic and state are wide: a parameter that is not (bfloat16) has a float32 ``master`` in the state, on which the
step is done, and is the master rounded. Decay is decoupled in all of them, acts on the weights as they were, and
only where ``config.decays(path)``. Names of the state that would hold nothing are left out.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from torch_impl.linear import wide_dtype
from twinformer.checks import check_leaves, check_update, dtype_name
from twinformer.learning import OptimizerConfig

Tensors = dict[str, Float[Tensor, "..."]]
Layout = dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]]

PIECE = 2**16  # elements of a gradient whose squares are summed at a time on a CPU
FUSED = ("cpu", "cuda", "xpu")  # where torch has AdamW and SGD as one kernel


class Optimizer:
    """AdamW, SGD or Adafactor, as ``config`` says. It holds its config and nothing else.

    AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101. SGD with momentum: Sutskever et al. 2013. Adafactor:
    Shazeer & Stern 2018, arXiv:1804.04235, algorithms 4 and 5, without momentum.
    """

    def __init__(self, config: OptimizerConfig) -> None:
        self.config = config

    @torch.no_grad()
    def init(self, parameters: Mapping[str, Float[Tensor, "..."]]) -> dict[str, Any]:
        """The state before the first step: ``step`` 0, averages 0, ``master`` and ``ema`` copies of the parameters.

        Raises InputError for a parameter that is no float.
        """
        check_leaves("Optimizer.init", "parameters", parameters)
        state: dict[str, Any] = {"step": 0}
        for name, leaves in self._layout(parameters).items():
            if name in ("master", "ema"):
                state[name] = {path: _copy(parameters[path], kind) for path, (_, kind) in leaves.items()}
            else:
                state[name] = {
                    path: torch.zeros(shape, dtype=kind, device=parameters[path].device)
                    for path, (shape, kind) in leaves.items()
                }
        return state

    @torch.no_grad()
    def update(
        self,
        parameters: Mapping[str, Float[Tensor, "..."]],
        gradients: Mapping[str, Float[Tensor, "..."]],
        state: Mapping[str, Any],
        lr: float,
    ) -> tuple[Tensors, dict[str, Any]]:
        """One step with learning rate ``lr``: parameters and state, changed in place. Gradients stay as they are.

        Clips first when the config has ``clip_norm``. Raises one InputError with every path that is missing, too
        many or of another kind, on any side; nothing is changed then.
        """
        self._check(parameters, gradients, state, lr)
        return self._advance(parameters, gradients, state, lr)

    def _check(
        self,
        parameters: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        state: Mapping[str, Any],
        lr: float,
    ) -> None:
        wanted = {
            name: {path: (shape, str(kind).removeprefix("torch.")) for path, (shape, kind) in leaves.items()}
            for name, leaves in self._layout(parameters).items()
        }
        check_update("Optimizer.update", parameters=parameters, gradients=gradients, state=state, wanted=wanted, lr=lr)

    @torch.no_grad()
    def _advance(
        self,
        parameters: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        state: Mapping[str, Any],
        lr: float,
        norm: Tensor | None = None,
    ) -> tuple[Tensors, dict[str, Any]]:
        """``update`` without its checks. Wide gradients whose ``norm`` is given are clipped in place."""
        paths = sorted(parameters)
        master = state.get("master", {})
        w: Tensors = {path: master.get(path, parameters[path]) for path in paths}
        g: Tensors = {path: gradients[path].to(w[path].dtype) for path in paths}
        if self.config.clip_norm is not None:
            factor = _clip_factor(_norm(g) if norm is None else norm, self.config.clip_norm)
            # the host need not wait for a device; where there is none to wait for, a pass is saved
            if factor.device.type != "cpu" or factor != 1:
                scale = Tensor.mul if norm is None else Tensor.mul_
                g = {path: scale(leaf, factor.to(leaf.device)) for path, leaf in g.items()}
        step: Callable[..., None] = {"adamw": self._adamw, "sgd": self._sgd, "adafactor": self._adafactor}[
            self.config.name
        ]
        step(w, g, state, float(lr))
        for path in master:
            parameters[path].copy_(master[path])
        if self.config.ema_decay is not None:
            for path in paths:
                state["ema"][path].mul_(self.config.ema_decay).add_(w[path], alpha=1 - self.config.ema_decay)
        return dict(parameters), {**state, "step": int(state["step"]) + 1}

    def _layout(self, parameters: Mapping[str, Tensor]) -> Layout:
        """What the state holds besides ``step``: name -> path -> shape and dtype."""
        layout: Layout = {}
        for path in sorted(parameters):
            shape = tuple(parameters[path].shape)
            wide = wide_dtype(parameters[path].dtype)
            held: dict[str, tuple[int, ...]] = {}
            if self.config.name == "adamw":
                held |= {"exp_avg": shape, "exp_avg_sq": shape}
            elif self.config.name == "sgd":
                if self.config.momentum:
                    held |= {"momentum": shape}
            elif len(shape) == 2:
                held |= {"row": shape[:1], "column": shape[1:]}
            else:
                held |= {"exp_avg_sq": shape}
            if parameters[path].dtype != wide:
                held |= {"master": shape}
            if self.config.ema_decay is not None:
                held |= {"ema": shape}
            for name, size in held.items():
                layout.setdefault(name, {})[path] = (size, wide)
        return layout

    def _adamw(self, w: Tensors, g: Tensors, state: Mapping[str, Any], lr: float) -> None:
        """``m ← β₁ m + (1 - β₁) g``, ``v ← β₂ v + (1 - β₂) g²``, ``w ← w - lr (m̂ / (sqrt(v̂) + eps) + λ w)``.

        With ``t = step + 1``, ``m̂ = m / (1 - β₁ᵗ)`` and ``v̂ = v / (1 - β₂ᵗ)``: eps is outside the bias-corrected root.
        """
        config = self.config
        for decays in (True, False):
            paths = [path for path in w if config.decays(path) == decays]
            weights, grads = [w[path] for path in paths], [g[path] for path in paths]
            means, squares = ([state[name][path] for path in paths] for name in ("exp_avg", "exp_avg_sq"))
            fused = _can_fuse(weights, grads, means, squares)
            # torch counts the step itself, in a tensor for each parameter, which lies with it for the fused kernel
            places = [leaf.device if fused else torch.device("cpu") for leaf in weights]
            counters = {
                place: iter(torch.full((len(places),), float(state["step"]), device=place)) for place in {*places}
            }
            steps = [next(counters[place]) for place in places]
            adamw(
                weights,
                grads,
                means,
                squares,
                [],
                steps,
                fused=fused,
                foreach=not fused,
                amsgrad=False,
                beta1=config.beta1,
                beta2=config.beta2,
                lr=lr,
                weight_decay=config.weight_decay if decays else 0.0,
                eps=config.eps,
                maximize=False,
            )

    def _sgd(self, w: Tensors, g: Tensors, state: Mapping[str, Any], lr: float) -> None:
        """``b ← μ b + g``; ``w ← w - lr (d + λ w)`` with ``d = b``, or ``g + μ b`` with nesterov."""
        config = self.config
        for path, leaf in w.items():
            if config.weight_decay and config.decays(path):  # torch's own would go into the momentum
                leaf.mul_(1 - lr * config.weight_decay)
        weights, grads = list(w.values()), list(g.values())
        averages = [state["momentum"][path] for path in w] if config.momentum and w else []
        fused = _can_fuse(weights, grads, averages)
        if config.nesterov and not fused:  # torch would add the momentum to the gradients in place
            grads = [grad.clone() for grad in grads]
        sgd(
            weights,
            grads,
            [*averages] or [None] * len(w),
            fused=fused,
            foreach=not fused,
            weight_decay=0.0,
            momentum=config.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=config.nesterov,
            maximize=False,
        )

    def _adafactor(self, w: Tensors, g: Tensors, state: Mapping[str, Any], lr: float) -> None:
        """``u = g / sqrt(v̂)``, ``u ← u / max(1, rms(u) / d)``, ``w ← w - lr max(eps_parameter, rms(w)) u - lr λ w``.

        ``β̂ = 1 - t^(-decay_rate)``, ``s = g² + eps_gradient``; for a matrix R and C follow the means of s over columns
        and over rows, ``v̂ = R Cᵀ / mean(R)``, with the roots taken before the product, which may be too small for
        float32; otherwise ``v̂ ← β̂ v̂ + (1 - β̂) s``.
        """
        config = self.config
        beta = 1 - float(state["step"] + 1) ** -config.decay_rate
        for path, leaf in w.items():
            s = g[path].square() + config.eps_gradient
            if leaf.ndim == 2:
                row = state["row"][path].mul_(beta).add_(s.mean(1), alpha=1 - beta)
                column = state["column"][path].mul_(beta).add_(s.mean(0), alpha=1 - beta)
                u = g[path] / (row / row.mean()).sqrt()[:, None] / column.sqrt()
            else:
                u = g[path] / state["exp_avg_sq"][path].mul_(beta).add_(s, alpha=1 - beta).sqrt()
            u /= (_rms(u) / config.clip_threshold).clamp(min=1)
            u *= lr * _rms(leaf).clamp(min=config.eps_parameter)
            if config.decays(path):
                leaf.mul_(1 - lr * config.weight_decay)
            leaf.sub_(u)


@torch.no_grad()
def global_norm(gradients: Mapping[str, Float[Tensor, "..."]]) -> Float[Tensor, ""]:
    """``sqrt(Σ g²)``, summed wide over all leaves in the order of sorted paths; 0 for none.

    Raises InputError for a gradient that is no float.
    """
    check_leaves("global_norm", "gradients", gradients)
    return _norm(gradients)


@torch.no_grad()
def clip(gradients: Mapping[str, Float[Tensor, "..."]], max_norm: float) -> tuple[Tensors, Float[Tensor, ""]]:
    """Gradients times ``max_norm / norm`` iff ``norm > max_norm``, each in its own dtype, and the norm before.

    Nothing is added to the norm; where it is not finite all gradients become NaN. Raises InputError for a max_norm
    that is not positive and a gradient that is no float.
    """
    check_leaves("clip", "gradients", gradients, max_norm=max_norm)
    norm = _norm(gradients)
    factor = _clip_factor(norm, max_norm)
    return {path: (g.to(wide_dtype(g.dtype)) * factor.to(g.device)).to(g.dtype) for path, g in gradients.items()}, norm


def _clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """``max_norm / norm`` where the norm is above, else 1; NaN for a norm that is not finite. On the norm's device."""
    return torch.where(norm > max_norm, max_norm / norm, 1.0).masked_fill(~norm.isfinite(), torch.nan)


def _norm(gradients: Mapping[str, Tensor]) -> Tensor:
    ordered = [gradients[path] for path in sorted(gradients)]
    wide = torch.float64 if any(dtype_name(g) == "float64" for g in ordered) else torch.float32
    total = torch.zeros((), dtype=wide, device=ordered[0].device if ordered else None)
    for g in ordered:
        total = total + _sum_of_squares(g.to(wide)).to(total.device)
    return total.sqrt()


def _sum_of_squares(x: Tensor) -> Tensor:
    if x.device.type != "cpu":
        return x.square().sum()
    flat = x.reshape(-1)
    if len(flat) <= PIECE:
        return flat.dot(flat)
    # without a copy of x, and in pieces, whose sums have less rounding than one long sum
    return torch.stack([piece.dot(piece) for piece in torch.split(flat, PIECE)]).sum()


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype, copy=True)


def _can_fuse(*columns: list[Tensor]) -> bool:
    """Whether torch's fused kernel may be used: it takes every tensor for a run of memory, whatever its strides."""
    return all(t.device.type in FUSED and t.is_contiguous() for column in columns for t in column)
