"""What a model is asked to make small: sums with their counts, so that micro-batches add up and are divided once."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Integer

from flax_impl.linear import extremes, wide_dtype
from twinformer.checks import check_cross_entropy, check_next_tokens

Ids = Integer[Array | np.ndarray, "B T"]
Places = Bool[Array | np.ndarray, "B T"]


def cross_entropy(
    logits: Float[Array | np.ndarray, "B T V"],
    targets: Ids,
    *,
    real: Places | None = None,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """``Σ (1 - ε)(-ln p[target]) + ε · mean_v(-ln p[v]) + z · (ln Σ exp logits)²`` over the real places; their number.

    ``p = softmax(logits)``, ε the ``smoothing``, z the ``z_loss``; all computed wide. Where ``real`` (None: everywhere)
    is False nothing plays a part, forward or backward, whatever stands there. Raises InputError for a real target
    outside ``0 … V - 1``; where it cannot be seen, it makes the total and the gradient of its place NaN.

    Source: smoothing: Szegedy et al. 2016, section 7; z: Chowdhery et al. 2022, arXiv:2204.02311, section 5.
    """
    lowest, highest = _real_extremes(targets, real)
    check_cross_entropy(
        "cross_entropy",
        logits=logits,
        targets=targets,
        real=real,
        smoothing=smoothing,
        z_loss=z_loss,
        lowest=lowest,
        highest=highest,
    )
    logits, targets = jnp.asarray(logits), jnp.asarray(targets)
    if targets.dtype.itemsize < 4:  # V need not fit
        targets = targets.astype(jnp.int32)
    if real is not None:
        # before any arithmetic: a gradient of 0 times NaN further down would be NaN
        real = jnp.asarray(real)
        logits = jnp.where(real[..., None], logits, 0)
        targets = jnp.where(real, targets, 0)
    X = logits.astype(wide_dtype(logits.dtype))
    V = X.shape[-1]

    # with the highest logit taken off, -ln p is small where p is near 1, however large the logits are
    peak = jax.lax.stop_gradient(jnp.max(X, axis=-1))
    shifted = X - peak[..., None]
    log_sum = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))
    # a comparison, not a look-up: the gradient of a look-up is a scatter, that of this is one more comparison
    is_target = jnp.arange(V, dtype=targets.dtype) == targets[..., None]
    losses = (1 - smoothing) * (log_sum - jnp.sum(jnp.where(is_target, shifted, 0), axis=-1))
    if smoothing > 0:
        losses = losses + smoothing * (log_sum - jnp.mean(shifted, axis=-1))
    if z_loss > 0:
        losses = losses + z_loss * (log_sum + peak) ** 2

    # a factor, so that the gradient is NaN too
    losses = losses * jnp.where((targets >= 0) & (targets < V), 1, jnp.nan).astype(X.dtype)
    counted = jnp.ones(losses.shape, bool) if real is None else real
    return jnp.sum(jnp.where(counted, losses, 0)), jnp.sum(counted, dtype=jnp.int32)


def mean_loss(total: Float[Array | np.ndarray, ""], count: Integer[Array | np.ndarray, ""] | int) -> Float[Array, ""]:
    """``total / count``, and 0 where ``count`` is 0."""
    total, count = jnp.asarray(total), jnp.asarray(count)
    return jnp.where(count == 0, 0, total / jnp.maximum(count, 1).astype(total.dtype))


def next_tokens(
    tokens: Ids, real: Places | None = None
) -> tuple[Integer[Array, "B T-1"], Integer[Array, "B T-1"], Bool[Array, "B T-1"]]:
    """Inputs ``tokens[:, :-1]``, targets ``tokens[:, 1:]``, and where both are real (all are with ``real`` None).

    Raises InputError.

    Source: book, "Training", of language models: every token is predicted from those before it.
    """
    check_next_tokens("next_tokens", tokens=tokens, real=real)
    tokens = jnp.asarray(tokens)
    real = jnp.ones(tokens.shape, bool) if real is None else jnp.asarray(real)
    return tokens[:, :-1], tokens[:, 1:], real[:, :-1] & real[:, 1:]


def _real_extremes(targets: Ids, real: Places | None) -> tuple[int | None, int | None]:
    """Lowest and highest target where ``real``; None where they cannot be known."""
    if real is None:
        return extremes(targets)
    hidden = isinstance(targets, jax.core.Tracer) or isinstance(real, jax.core.Tracer)
    if hidden or tuple(real.shape) != tuple(targets.shape) or real.dtype != bool:
        return None, None
    return extremes(np.asarray(targets)[np.asarray(real)])
