"""Optimizers: parameters, gradients and state go in, parameters and state come out; nothing is kept.

All three are mappings by path, with the paths of ``twinformer/parameters.py`` (``….weight``, ``….bias``: they say where
weight decay acts). The functions are pure, for ``jax.jit(optimizer.update, donate_argnums=(0, 2))``.

*Wide* is float64 for float64, else float32. State and arithmetic are wide; a parameter that is not (bfloat16) has a
wide master in the state, and is the master rounded.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from flax_impl.linear import Outline, wide_dtype
from twinformer.checks import check_leaves, check_update
from twinformer.learning import OptimizerConfig

Leaves = Mapping[str, Float[Array | np.ndarray, "..."]]
State = Mapping[str, Any]  # "step", and names → leaves
Slots = dict[str, Float[Array, "..."]]  # what the state holds for one path, by name


@dataclass(frozen=True)
class Optimizer:
    """AdamW, SGD or Adafactor, with clipping, masters and a running average, as ``config`` says.

    The state is ``"step"`` (int32) and, by path, ``exp_avg exp_avg_sq`` (AdamW), ``momentum`` (SGD), ``row column`` for
    rank 2 and ``exp_avg_sq`` for others (Adafactor), ``ema``, ``master``; a name without any path is left out.
    """

    config: OptimizerConfig

    def init(self, parameters: Leaves) -> dict[str, Any]:
        """The state before the first step: zeros, the average and the masters at the parameters. Raises InputError."""
        check_leaves("Optimizer.init", "parameters", parameters)
        weights = _arrays(parameters)
        state: dict[str, Any] = {"step": jnp.zeros((), jnp.int32)}
        for name, leaves in self._outline(weights).items():
            if name in ("ema", "master"):
                # copies, each its own: parameters and state are donated together, and no buffer can be given twice
                state[name] = {path: jnp.array(weights[path], like.dtype) for path, like in leaves.items()}
            else:
                state[name] = {path: jnp.zeros(*like) for path, like in leaves.items()}
        return state

    def update(
        self, parameters: Leaves, gradients: Leaves, state: State, lr: float | Float[Array, ""]
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        """One step ``w ← w - lr (d + λ w)`` with the old w: decay decoupled, where ``config.decays``.

        Clips first; d is the optimizer's own direction. Then ``ema ← δ · ema + (1 - δ) w``. ``step`` and ``lr`` may be
        traced. Raises one InputError for all paths, shapes and dtypes that do not match.

        Source: decoupled decay: Loshchilov & Hutter 2019, arXiv:1711.05101.
        """
        config, weights = self.config, _arrays(parameters)
        check_update(
            "Optimizer.update",
            parameters=parameters,
            gradients=gradients,
            state=state,
            wanted={
                name: {path: (like.shape, str(like.dtype)) for path, like in leaves.items()}
                for name, leaves in self._outline(weights).items()
            },
            lr=_seen(lr),
        )
        wide_gradients = {path: jnp.asarray(gradients[path], wide_dtype(w.dtype)) for path, w in weights.items()}
        if config.clip_norm is not None:
            wide_gradients, _ = clip(wide_gradients, config.clip_norm)
        step = jnp.asarray(state["step"], jnp.int32) + 1
        moved: dict[str, Array] = {}
        moved_state: dict[str, Any] = {"step": step}
        for path, g in wide_gradients.items():
            slots = {name: jnp.asarray(state[name][path]) for name in state if name != "step" and path in state[name]}
            w = slots.get("master", weights[path])
            d, new = _DIRECTIONS[config.name](config, step.astype(g.dtype), w, g, slots)
            if config.decays(path):
                d = d + config.weight_decay * w
            w = w - jnp.asarray(lr, w.dtype) * d
            moved[path] = w.astype(weights[path].dtype)
            if "master" in slots:
                new["master"] = w
            if config.ema_decay is not None:
                new["ema"] = config.ema_decay * slots["ema"] + (1 - config.ema_decay) * w
            for name, slot in new.items():
                moved_state.setdefault(name, {})[path] = slot
        return moved, moved_state

    def _outline(self, weights: dict[str, Array]) -> dict[str, dict[str, Outline]]:
        """Shape and dtype of everything in the state but the step: name → path → outline."""
        outline: dict[str, dict[str, Outline]] = {}
        for path, w in weights.items():
            shape, wide = w.shape, wide_dtype(w.dtype)
            match self.config.name:
                case "adamw":
                    slots = {"exp_avg": shape, "exp_avg_sq": shape}
                case "sgd":
                    slots = {"momentum": shape} if self.config.momentum > 0 else {}
                case "adafactor":
                    slots = {"row": shape[:1], "column": shape[1:]} if len(shape) == 2 else {"exp_avg_sq": shape}
            if self.config.ema_decay is not None:
                slots["ema"] = shape
            if w.dtype != wide:
                slots["master"] = shape
            for name, its_shape in slots.items():
                outline.setdefault(name, {})[path] = Outline(its_shape, wide)
        return outline


def global_norm(gradients: Leaves) -> Float[Array, ""]:
    """``sqrt(Σ g²)`` over all leaves, summed wide in the order of sorted paths."""
    check_leaves("global_norm", "gradients", gradients)
    leaves = _arrays(gradients)
    wide = jnp.result_type(jnp.float32, *leaves.values())
    squares = [jnp.sum(leaves[path].astype(wide) ** 2) for path in sorted(leaves)]
    return jnp.sqrt(sum(squares, jnp.zeros((), wide)))


def clip(gradients: Leaves, max_norm: float) -> tuple[dict[str, Array], Float[Array, ""]]:
    """The gradients times ``max_norm / norm`` iff ``norm > max_norm``, and the norm that they had.

    Nothing is added to the norm. With a norm that is not finite all come back as NaN. Multiplied wide, then cast back.

    Source: Pascanu et al. 2013, arXiv:1211.5063, algorithm 1.
    """
    check_leaves("clip", "gradients", gradients, max_norm=_seen(max_norm))
    norm = global_norm(gradients)
    factor = jnp.where(norm > max_norm, max_norm / norm, 1)
    factor = jnp.where(jnp.isfinite(norm), factor, jnp.nan)
    return {path: (g * factor).astype(g.dtype) for path, g in _arrays(gradients).items()}, norm


def _adamw(config: OptimizerConfig, t: Array, w: Array, g: Array, slots: Slots) -> tuple[Array, Slots]:
    """``m ← β₁ m + (1 - β₁) g``, ``v ← β₂ v + (1 - β₂) g²``; ``d = m̂ / (sqrt(v̂) + eps)``, m̂ and v̂ over ``1 - βᵗ``.

    Written out because the ``1 - β₂ᵗ`` of ``optax.scale_by_adam`` is wrong by 1e-5 in float32.
    """
    m = config.beta1 * slots["exp_avg"] + (1 - config.beta1) * g
    v = config.beta2 * slots["exp_avg_sq"] + (1 - config.beta2) * g**2
    m_hat, v_hat = m / _one_minus_power(config.beta1, t), v / _one_minus_power(config.beta2, t)
    return m_hat / (jnp.sqrt(v_hat) + config.eps), {"exp_avg": m, "exp_avg_sq": v}


def _sgd(config: OptimizerConfig, t: Array, w: Array, g: Array, slots: Slots) -> tuple[Array, Slots]:
    """``b ← μ b + g``; ``d = b``, or ``g + μ b`` with nesterov.

    Source: Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning".
    """
    if config.momentum == 0:
        return g, {}
    b = config.momentum * slots["momentum"] + g
    return g + config.momentum * b if config.nesterov else b, {"momentum": b}


def _adafactor(config: OptimizerConfig, t: Array, w: Array, g: Array, slots: Slots) -> tuple[Array, Slots]:
    """``d = max(eps_parameter, rms(w)) · u / max(1, rms(u) / clip_threshold)``, ``u = g / sqrt(v̂)``; no momentum.

    With ``β̂ = 1 - t^(-decay_rate)``, v̂ is the running average of ``s = g² + eps_gradient``, for a matrix only of its
    means by row R and by column C: ``v̂ = R Cᵀ / mean(R)``.

    Source: Shazeer & Stern 2018, arXiv:1804.04235, algorithms 4 and 5.
    """
    weight = t**-config.decay_rate  # 1 - β̂
    s = g**2 + config.eps_gradient

    def average(old: Array, new: Array) -> Array:
        return (1 - weight) * old + weight * new

    if g.ndim == 2:
        R, C = average(slots["row"], s.mean(1)), average(slots["column"], s.mean(0))
        # a root of each factor: the product of two of the size of eps_gradient would be 0 in float32
        u = g / jnp.sqrt(R)[:, None] / jnp.sqrt(C) * jnp.sqrt(R.mean())
        new = {"row": R, "column": C}
    else:
        v = average(slots["exp_avg_sq"], s)
        u, new = g / jnp.sqrt(v), {"exp_avg_sq": v}
    u = u / jnp.maximum(1, _rms(u) / config.clip_threshold)
    return jnp.maximum(config.eps_parameter, _rms(w)) * u, new


_DIRECTIONS = {"adamw": _adamw, "sgd": _sgd, "adafactor": _adafactor}


def _one_minus_power(beta: float, t: Float[Array, ""]) -> Float[Array, ""]:
    """``1 - βᵗ`` without the cancellation that costs it four digits of float32 where β is near 1."""
    return -jnp.expm1(t * (math.log(beta) if beta > 0 else -math.inf))


def _arrays(leaves: Leaves) -> dict[str, Array]:
    return {path: jnp.asarray(leaf) for path, leaf in leaves.items()}


def _seen(number: float | Float[Array, ""]) -> Any:
    """A scalar as a Python number; None while it is traced."""
    if isinstance(number, jax.core.Tracer):
        return None
    return number.item() if isinstance(number, (Array, np.generic, np.ndarray)) and number.size == 1 else number


def _rms(X: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.sqrt(jnp.mean(X**2))
