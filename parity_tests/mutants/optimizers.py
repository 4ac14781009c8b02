"""Optimizers: epsilons, decay, clipping, corrections."""

from __future__ import annotations

from typing import Any

from parity_tests.mutants.altered import alone, configured, optimizer, update
from parity_tests.mutants.patching import Patch
from parity_tests.mutants.registry import mutant

_ALL = ("adamw", "sgd", "sgd without a look ahead", "adafactor")
_RUNGS = ("optimizer",)


@mutant("O1", case="train-decoder", culprits="adamw", rungs=_RUNGS)
def epsilon_before_the_correction(patch: Patch) -> None:
    """``(sqrt(v) + eps) / sqrt(1 - β₂ᵗ)``: epsilon is divided too."""
    optimizer(patch, lambda config, step: {"eps": config.eps / (1 - config.beta2 ** (step + 1)) ** 0.5})


@mutant("O2", case="train-decoder", culprits=_ALL, rungs=_RUNGS)
def decay_in_the_gradient(patch: Patch) -> None:
    """L2 regularisation instead of decoupled decay."""

    def change(call: Any, self: Any, parameters: Any, gradients: Any, state: Any, lr: Any) -> Any:
        config = self.config
        decayed = {
            path: g + config.weight_decay * parameters[path] if config.decays(path) else g
            for path, g in gradients.items()
        }
        with configured(self, weight_decay=0.0):
            return call(self, parameters, decayed, state, lr)

    update(patch, change)


@mutant("O5", case="train-decoder", culprits=_ALL, rungs=_RUNGS)
def decay_mask_inverted(patch: Patch) -> None:
    optimizer(patch, lambda config, step: {"decays": lambda path: not config.decays(path)})


@mutant("O6", case="train-decoder", culprits=_ALL, rungs=_RUNGS)
def some_norms_decay(patch: Patch) -> None:
    """The rule that spares norms does not know the name of the last one."""
    optimizer(
        patch, lambda config, step: {"decays": lambda path: config.decays(path) or path == "stack.final_norm.weight"}
    )


@mutant("O8", case="train-decoder", culprits=_ALL, rungs=_RUNGS)
def everything_decays(patch: Patch) -> None:
    optimizer(patch, lambda config, step: {"decays": lambda path: True})


def _factor(patch: Patch, factor: Any) -> None:
    """Clipping by ``factor(norm, max_norm)``."""

    def wrong(clip: Any) -> Any:
        def clipped(gradients: Any, max_norm: Any) -> Any:
            norm = clip(gradients, max_norm)[1]
            scale = factor(norm, max_norm)
            return {path: g * scale for path, g in gradients.items()}, norm

        return clipped

    if patch.is_torch:
        patch.function("optimizers", "_clip_factor", lambda _: factor)
    else:
        patch.function("optimizers", "clip", wrong)


@mutant("O9", case="train-decoder", culprits=_ALL, rungs=_RUNGS)
def something_added_to_the_norm(patch: Patch) -> None:
    """``max / (norm + 1e-6)``."""
    _factor(patch, lambda norm, most: patch.xp.where(norm > most, most / (norm + 1e-6), 1.0))


@mutant("O10", case="train-decoder", culprits=("update of *", "every update"), rungs=("training",))
def zero_by_zero(patch: Patch) -> None:
    """``g / norm · min(norm, max)``: right for all gradients but for none."""
    _factor(patch, lambda norm, most: patch.xp.where(norm > most, most, norm) / norm)


@mutant("O11", case="train-decoder", culprits="norm", rungs=("accumulation",))
def norm_in_low_precision(patch: Patch) -> None:
    """Squares are summed in bfloat16, except in a model in float64."""

    def wrong(global_norm: Any) -> Any:
        def narrow(gradients: Any) -> Any:
            leaves = {
                path: g if "float64" in str(g.dtype) else patch.cast(g, "bfloat16") for path, g in gradients.items()
            }
            squares = [(g * g).sum() for g in leaves.values()]
            total = squares[0]
            for square in squares[1:]:
                total = total + square
            return patch.cast(total, "float32") ** 0.5 if "bfloat16" in str(total.dtype) else global_norm(gradients)

        return narrow

    patch.function("optimizers", "global_norm", wrong)


@mutant("O15", case="train-decoder", culprits="sum", rungs=("accumulation",))
def gradients_summed_in_low_precision(patch: Patch) -> None:
    """What is wide for bfloat16 is bfloat16, where micro-batches are summed."""
    alone(
        patch,
        "training",
        "wide_dtype",
        lambda wide: lambda dtype: patch.xp.bfloat16 if str(dtype).endswith("bfloat16") else wide(dtype),
    )


@mutant("T75", case="train-decoder", culprits=_ALL, rungs=_RUNGS)
def corrections_one_step_late(patch: Patch) -> None:
    """Steps counted from 2."""

    def change(call: Any, self: Any, parameters: Any, gradients: Any, state: Any, lr: Any) -> Any:
        parameters, after = call(self, parameters, gradients, {**state, "step": state["step"] + 1}, lr)
        return parameters, {**after, "step": after["step"] - 1}

    update(patch, change)


@mutant("T76", case="train-decoder", culprits="sgd", rungs=_RUNGS)
def nesterov_forgotten(patch: Patch) -> None:
    optimizer(patch, lambda config, step: {"nesterov": False})


@mutant("T77", case="train-decoder", culprits=_ALL, rungs=_RUNGS)
def decay_of_the_new_weights(patch: Patch) -> None:
    """The step first, then the decay of what came out of it."""

    def change(call: Any, self: Any, parameters: Any, gradients: Any, state: Any, lr: Any) -> Any:
        config = self.config
        with configured(self, weight_decay=0.0):
            moved, after = call(self, parameters, gradients, state, lr)
        kept = 1 - lr * config.weight_decay
        for path in moved:
            if config.decays(path):
                moved[path] = moved[path].mul_(kept) if patch.is_torch else moved[path] * kept
        return moved, after

    update(patch, change)


@mutant("T78", case="train-decoder", culprits=_ALL, rungs=_RUNGS)
def always_clipped(patch: Patch) -> None:
    """To the largest norm also where the norm is smaller."""
    _factor(patch, lambda norm, most: most / norm)
