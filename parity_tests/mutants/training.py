"""A training step: its loss, its sums, its keys, its learning rate, its averages."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from parity_tests.mutants.altered import Altered, alone, optimizer, training, update
from parity_tests.mutants.patching import Patch
from parity_tests.mutants.registry import mutant

_RUNGS = ("training",)
_CASE = "train-decoder"
_UPDATES = ("update of *", "every update")


def _parts(patch: Patch, change: Any) -> None:
    """``change(trainer, total, gradients, count, batches) -> (total, gradients)`` of every micro-batch.

    ``count`` is its number of targets, ``batches`` all of the step's; what is traced sees those of the first step.
    """
    going: list[Any] = []

    def step(call: Any) -> Any:
        def remembering(self: Any, state: Any, batches: Any) -> Any:
            going.append(batches)
            try:
                return call(self, state, batches)
            finally:
                going.pop()

        return remembering

    def torch_part(call: Any) -> Any:
        def gradients(self: Any, state: Any, batch: Any, key: Any) -> Any:
            total, found = call(self, state, batch, key)
            return change(self, total, found, batch.count, going[-1])

        return gradients

    def flax_part(call: Any) -> Any:
        def sums(self: Any, *arguments: Any) -> Any:
            total, count, found = call(self, *arguments)
            total, found = change(self, total, found, count, going[-1])
            return total, count, found

        return sums

    patch.method("training", "Trainer", step, name="step", quiet=True)
    name, part = ("_gradients", torch_part) if patch.is_torch else ("_sums", flax_part)
    patch.method("training", "Trainer", part, name=name)


@mutant("L1", case=_CASE, culprits="loss", rungs=_RUNGS)
def mean_of_means(patch: Patch) -> None:
    """Every micro-batch is averaged by itself, however many targets it has."""

    def change(trainer: Any, total: Any, gradients: Any, count: Any, batches: Any) -> Any:
        every = sum(batch.count for batch in batches) / len(batches)
        factor = (
            every / count
            if isinstance(count, int) and count
            else every / patch.xp.maximum(patch.xp.asarray(count), patch.xp.asarray(1))
        )
        return total * factor, {path: g * factor for path, g in gradients.items()}

    _parts(patch, change)


@mutant("L3", case=_CASE, culprits="gradient norm", rungs=_RUNGS)
def divided_by_the_number_of_micro_batches_too(patch: Patch) -> None:
    """A constant factor, which AdamW does not see."""
    _parts(
        patch,
        lambda trainer, total, gradients, count, batches: (
            total,
            {path: g / trainer.training.accumulation for path, g in gradients.items()},
        ),
    )


def _batches(patch: Patch, change: Any) -> None:
    """Every batch as ``change(batch)`` before a step."""

    def wrong(call: Any) -> Any:
        return lambda self, state, batches: call(self, state, [change(batch) for batch in batches])

    patch.method("training", "Trainer", wrong, name="step")


@mutant("L4", case=_CASE, culprits="count", rungs=_RUNGS)
def padding_counted(patch: Patch) -> None:
    """The mean is over all places, and the padding token is what they should have said."""
    _batches(
        patch,
        lambda batch: dataclasses.replace(
            batch, targets=np.where(batch.real, batch.targets, 0), real=np.ones_like(batch.real)
        ),
    )


def _loss(patch: Patch, change: Any) -> None:
    """``change(original, logits, targets, options)`` in the place of the loss."""

    def wrong(cross_entropy: Any) -> Any:
        return lambda logits, targets, **options: change(cross_entropy, logits, targets, options)

    alone(patch, "training", "cross_entropy", wrong)


@mutant("L5", case=_CASE, culprits="loss", rungs=_RUNGS)
def smoothing_of_ignored_places(patch: Patch) -> None:
    """What smoothing adds is added where nothing counts as well."""

    def change(original: Any, logits: Any, targets: Any, options: dict[str, Any]) -> Any:
        total, count = original(logits, targets, **options)
        smoothing = options.get("smoothing", 0.0)
        ignored = patch.xp.asarray(~options["real"])
        each = patch.xp.log(patch.xp.exp(logits).sum(-1)) - logits.mean(-1)
        return total + smoothing * patch.xp.where(ignored, each, 0.0).sum(), count

    _loss(patch, change)


@mutant("L8", case=_CASE, culprits="loss", rungs=_RUNGS)
def smoothing_without_the_target(patch: Patch) -> None:
    """The uniform part over the V - 1 other tokens."""

    def change(original: Any, logits: Any, targets: Any, options: dict[str, Any]) -> Any:
        V = logits.shape[-1]
        return original(logits, targets, **(options | {"smoothing": options.get("smoothing", 0.0) * V / (V - 1)}))

    _loss(patch, change)


@mutant("T79", case=_CASE, culprits="loss", rungs=_RUNGS)
def z_loss_forgotten(patch: Patch) -> None:
    _loss(patch, lambda original, logits, targets, options: original(logits, targets, **(options | {"z_loss": 0.0})))


@mutant("T80", case=_CASE, culprits="loss", rungs=_RUNGS)
def padding_mask_left_out(patch: Patch) -> None:
    """The model is trained without the mask that it is used with."""
    _batches(
        patch,
        lambda batch: dataclasses.replace(
            batch, inputs={name: value for name, value in batch.inputs.items() if not name.endswith("padding_mask")}
        ),
    )


def _schedule(patch: Patch, rate: Any) -> None:
    """``rate(schedule, step)`` in the place of the learning rate."""
    training(
        patch,
        lambda training: {
            "schedule": Altered(training.schedule, learning_rate=lambda step: rate(training.schedule, step))
        },
    )


@mutant("O12", case=_CASE, culprits="learning rate", rungs=_RUNGS)
def warm_up_from_nothing(patch: Patch) -> None:
    """``peak · s / warmup_steps``: the first step does nothing."""
    _schedule(
        patch,
        lambda schedule, step: (
            schedule.peak * step / schedule.warmup_steps
            if step < schedule.warmup_steps
            else schedule.learning_rate(step)
        ),
    )


@mutant("O14", case=_CASE, culprits="move", rungs=("accumulation",))
def no_warm_up_is_one_step(patch: Patch) -> None:
    """``warmup_steps = 0`` taken for 1, whose only step has the rate 0."""
    _schedule(
        patch,
        lambda schedule, step: 0.0 if schedule.warmup_steps == 0 and step == 0 else schedule.learning_rate(step),
    )


@mutant("T81", case=_CASE, culprits="learning rate", rungs=_RUNGS)
def rate_of_the_next_step(patch: Patch) -> None:
    """Steps of the schedule counted from 1."""
    _schedule(patch, lambda schedule, step: schedule.learning_rate(step + 1))


def _fold(patch: Patch, change: Any) -> None:
    """``change(fold, key, number, is_step)``: the key of a step, folded out of the seed's, and those of its parts."""
    of_steps: list[Any] = []

    def wrong(fold: Any) -> Any:
        def folded(key: Any, number: Any) -> Any:
            is_step = not any(key is known for known in of_steps)
            found = change(fold, key, number, is_step)
            if is_step:
                found = found + 0  # an array of its own
                of_steps.append(found)
            return found

        return folded

    alone(patch, "training", "fold", wrong)


@mutant("T82", case=_CASE, culprits="loss", rungs=_RUNGS)
def one_key_for_all_micro_batches(patch: Patch) -> None:
    """Every micro-batch of a step drops the same elements."""
    _fold(patch, lambda fold, key, number, is_step: fold(key, number) if is_step else fold(key, number * 0))


@mutant("T83", case=_CASE, culprits="loss", rungs=_RUNGS)
def one_key_for_all_steps(patch: Patch) -> None:
    _fold(patch, lambda fold, key, number, is_step: fold(key, number * 0) if is_step else fold(key, number))


@mutant("T84", case=_CASE, culprits="loss", rungs=_RUNGS)
def steps_of_dropout_counted_from_one(patch: Patch) -> None:
    _fold(patch, lambda fold, key, number, is_step: fold(key, number + 1) if is_step else fold(key, number))


@mutant("T85", case=_CASE, culprits="loss", rungs=_RUNGS)
def trained_without_dropout(patch: Patch) -> None:
    training(patch, lambda training: {"dropout": False})


@mutant("T135", case=_CASE, culprits="average", rungs=("accumulation",))
def average_of_rounded_weights(patch: Patch) -> None:
    """The moving average follows what the model computes with, not the float32 masters."""

    def change(call: Any, self: Any, parameters: Any, gradients: Any, state: Any, lr: Any) -> Any:
        old = {path: leaf + 0 for path, leaf in state.get("ema", {}).items()}
        moved, after = call(self, parameters, gradients, state, lr)
        decay = self.config.ema_decay
        averages = {path: decay * leaf + (1 - decay) * patch.cast(moved[path], "float32") for path, leaf in old.items()}
        return moved, {**after, "ema": averages} if old else after

    update(patch, change)


@mutant("T86", case=_CASE, culprits="optimizer/ema/*", rungs=_RUNGS)
def average_left_as_it_was(patch: Patch) -> None:
    """The running average is made and never brought up to date."""

    def change(call: Any, self: Any, parameters: Any, gradients: Any, state: Any, lr: Any) -> Any:
        old = {path: leaf + 0 for path, leaf in state.get("ema", {}).items()}
        parameters, after = call(self, parameters, gradients, state, lr)
        return parameters, {**after, "ema": old} if old else after

    update(patch, change)


@mutant("T87", case=_CASE, culprits="evaluation: *", rungs=_RUNGS)
def evaluated_without_the_average(patch: Patch) -> None:
    """The last weights are evaluated, those of the average are saved."""
    patch.method("training", "Trainer", _of_the_last_weights, name="evaluate")


@mutant("T205", case=_CASE, culprits="evaluation: log-probabilities", rungs=_RUNGS)
def log_probabilities_without_the_average(patch: Patch) -> None:
    """As T87, where they are asked for one by one."""
    patch.method("training", "Trainer", _of_the_last_weights, name="log_probabilities")


def _of_the_last_weights(call: Any) -> Any:
    def asked(self: Any, state: Any, batch: Any) -> Any:
        return call(self, {**state, "optimizer": {**state["optimizer"], "ema": state["parameters"]}}, batch)

    return asked


@mutant("T206", case=_CASE, culprits="evaluation: log-probabilities", rungs=_RUNGS)
def log_probabilities_of_the_next_target(patch: Patch) -> None:
    """Each place is given that of the target after it."""

    def wrong(call: Any) -> Any:
        def log_probabilities(self: Any, state: Any, batch: Any) -> Any:
            after = np.roll(batch.targets, -1, axis=1)
            counts = np.roll(batch.real, -1, axis=1)  # what stands elsewhere need be no token
            return call(self, state, dataclasses.replace(batch, targets=np.where(counts, after, batch.targets)))

        return log_probabilities

    patch.method("training", "Trainer", wrong, name="log_probabilities")


@mutant("T88", case=_CASE, culprits="gradient norm", rungs=_RUNGS)
def norm_told_after_clipping(patch: Patch) -> None:
    """Nothing is trained otherwise: the curve alone is wrong."""
    most: list[float] = []

    def init(call: Any) -> Any:
        def remembering(self: Any, config: Any, training: Any, **options: Any) -> None:
            most[:] = [training.optimizer.clip_norm or np.inf]
            call(self, config, training, **options)

        return remembering

    def wrong(global_norm: Any) -> Any:
        def clipped(gradients: Any) -> Any:
            norm = global_norm(gradients)
            return patch.xp.where(norm > most[0], norm * 0 + most[0], norm)

        return clipped

    patch.method("training", "Trainer", init, name="__init__", quiet=True)
    alone(patch, "training", "global_norm", wrong)


@mutant("T89", case=_CASE, culprits=_UPDATES, rungs=_RUNGS)
def clipped_before_the_division(patch: Patch) -> None:
    """The largest norm is held against the norm of the sum, as if there was one target."""

    optimizer(patch, lambda config, step: {"clip_norm": config.clip_norm / 10})


@mutant("T90", case="train-encoder-decoder", culprits="loss", rungs=_RUNGS)
def source_mask_left_out(patch: Patch) -> None:
    _batches(
        patch,
        lambda batch: dataclasses.replace(
            batch, inputs={name: value for name, value in batch.inputs.items() if name != "source_padding_mask"}
        ),
    )


@mutant("T91", case="train-encoder", culprits="loss", rungs=_RUNGS)
def token_types_left_out(patch: Patch) -> None:
    _batches(
        patch,
        lambda batch: dataclasses.replace(
            batch, inputs={name: value for name, value in batch.inputs.items() if name != "token_types"}
        ),
    )
