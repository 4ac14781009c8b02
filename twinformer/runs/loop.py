"""The loop of a run: steps, validations, checkpoints, until it is over or somebody wants it to stop.

A run is a function of its options, its data and its state. The batches of step s are ``batch(s · accumulation)`` and
those after it, dropout is keyed by (seed, s), and the state goes in and out of a checkpoint bit by bit: so a run that
was stopped anywhere and went on is the run that was never stopped.

Losses are not asked for at every step: frameworks compute ahead, and asking waits. They are collected and looked at
together every ``log_every`` steps, and always before a validation, before a checkpoint and at the end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy.typing as npt

from twinformer.config import ModelConfig
from twinformer.data.batch import Dataset
from twinformer.errors import CheckpointError, TwinformerError, WeightsError
from twinformer.learning import Evaluation, Metrics, Trainer
from twinformer.runs.checkpoints import CheckpointStore
from twinformer.runs.log import MetricsLog
from twinformer.runs.options import BestBy, RunOptions
from twinformer.runs.records import Checkpoint
from twinformer.runs.screen import Screen
from twinformer.runs.signals import Signals
from twinformer.runs.speed import Speed

Reason = Literal["finished", "early stop", "time", "signal"]


class DivergedError(TwinformerError):
    """A loss, a gradient norm or weights that are no finite numbers. Nothing of it was saved."""


@dataclass(frozen=True)
class Ending:
    """How a run came to its end, and where it stands."""

    reason: Reason
    step: int
    best: Mapping[str, Any] | None
    largest_difference: float | None


@dataclass(frozen=True)
class _Pending:
    """A step whose losses were not asked for yet."""

    step: int
    metrics: Mapping[str, Metrics]


class Run:
    """One run: twins by name, all of which are given the same batches.

    Where there are two, the first decides which checkpoint is the best and gives the model directory its weights.
    ``record`` is put into every checkpoint; ``sample`` gives lines to show at each validation.
    """

    def __init__(
        self,
        options: RunOptions,
        *,
        config: ModelConfig,
        trainers: Mapping[str, Trainer],
        train: Dataset,
        valid: Dataset,
        store: CheckpointStore,
        log: Callable[[int], MetricsLog],
        screen: Screen,
        record: Mapping[str, Any],
        ceiling: float | None = None,
        sample: Callable[[Mapping[str, Any]], Sequence[str]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert options.steps is not None
        self.options, self.config, self.trainers = options, config, dict(trainers)
        self.train, self.valid, self.store, self.screen = train, valid, store, screen
        self.record, self.ceiling, self.sample, self.clock = record, ceiling, sample, clock
        self.steps = options.steps
        self.step = 0
        self.states: dict[str, Any] = {}
        self.best: dict[str, Any] | None = None
        self._best_saved: dict[str, Any] | None = None
        self.without_best = 0
        self.largest_difference: float | None = None
        self._open_log = log
        self._log: MetricsLog | None = None
        self._pending: list[_Pending] = []
        self._validated = self._saved = -1
        self._speed = Speed(clock)

    # ---- where it begins

    def start(self, tensors: Mapping[str, npt.NDArray[Any]] | None = None) -> None:
        """Before the first step: from weights by path, or from those that the config and the seed give."""
        self.states = {name: trainer.init(tensors) for name, trainer in self.trainers.items()}

    def resume(self, checkpoint: Checkpoint) -> None:
        """Where a checkpoint stands. A twin that has no state of its own in it takes that of the other."""
        self.states = {name: trainer.import_state(checkpoint.state(name)) for name, trainer in self.trainers.items()}
        run = checkpoint.record["progress"]
        self.step = self._saved = checkpoint.step
        self.best = self._best_saved = run["best"]
        self.without_best = run["without_best"]
        self.largest_difference, self._validated = run["largest_difference"], run["validated"]

    # ---- the loop

    def go(self, signals: Signals) -> Ending:
        """Train to the end. Raises DivergedError, and CheckpointError where the last state cannot be saved."""
        began = self.clock()
        self._log = self._open_log(self.step)
        try:
            with self.screen.shown(self.step, self.steps):
                self._speed.restart()
                first = True
                while True:
                    reason = self._pause(signals, began)
                    if reason is not None:
                        self._collect()
                        self._save(must=True)
                        return Ending(reason, self.step, self.best, self.largest_difference)
                    self._one_step()
                    if first or self.step % self.options.log_every == 0:
                        self._collect(compiling=first)
                        first = False
        finally:
            self._log.flush()

    def _pause(self, signals: Signals, began: float) -> Reason | None:
        """Between two steps: validate and save where it is due; a reason to end, if there is one."""
        options, last = self.options, self.step >= self.steps
        due = self.step > 0 and (last or self.step % options.valid_every == 0)
        better = due and self._validated != self.step and self._validate(signals)
        if better or (self.step > 0 and self.step % options.save_every == 0):
            self._collect()
            self._save()
        if signals.received is not None:
            return "signal"
        if last:
            return "finished"
        if options.patience is not None and self.without_best >= options.patience:
            return "early stop"
        if options.minutes is not None and self.clock() - began >= 60 * options.minutes:
            return "time"
        return None

    def _one_step(self) -> None:
        first = self.step * self.options.accumulation
        batches = [self.train.batch(first + number) for number in range(self.options.accumulation)]
        metrics = {}
        for name, trainer in self.trainers.items():
            self.states[name], metrics[name] = trainer.step(self.states[name], batches)
        self.step += 1
        self._pending.append(_Pending(self.step, metrics))
        self._speed.add(self.config, batches)

    def _collect(self, *, compiling: bool = False) -> None:
        """Ask for the losses of all steps since the last time: note them, and end the run where one is not finite."""
        if not self._pending:
            return
        assert self._log is not None
        for one in self._pending:
            found = {
                name: {"loss": float(m.loss), "gradient_norm": float(m.gradient_norm)}
                for name, m in one.metrics.items()
            }
            for name, numbers in found.items():
                for what, value in numbers.items():
                    if not math.isfinite(value):
                        self._pending.clear()
                        raise self._diverged(f"{name}: {what.replace('_', ' ')} of step {one.step} is {value}")
            any_of_them = next(iter(one.metrics.values()))
            line: dict[str, Any] = {
                "kind": "train",
                "step": one.step,
                "learning_rate": any_of_them.learning_rate,
                "count": int(any_of_them.count),
                **found,
            }
            if len(found) == 2:
                line["difference"] = _apart(*(numbers["loss"] for numbers in found.values()))
                self.largest_difference = max(self.largest_difference or 0.0, line["difference"])
            self._log.add(line)
        self._pending.clear()
        speed = self._speed.measure(self.ceiling, count=not compiling)
        if speed:
            self._log.add({"kind": "speed", "step": self.step, **speed})
        self._log.flush()
        self.screen.progress(
            self.step,
            losses={name: numbers["loss"] for name, numbers in found.items()},
            largest_difference=self.largest_difference,
            epoch=self.step * self.options.accumulation / self.train.steps_per_epoch,
            **speed,
        )

    # ---- validation and checkpoints

    def _validate(self, signals: Signals) -> bool:
        """Whether it is the best so far. When a signal comes meanwhile it is left, and done again on going on."""
        self._collect()
        assert self._log is not None
        count = min(self.valid.steps_per_epoch, self.options.valid_batches or self.valid.steps_per_epoch)
        found = dict.fromkeys(self.trainers, Evaluation())
        for number in range(count):
            if signals.received is not None:
                return False
            batch = self.valid.batch(number)
            for name, trainer in self.trainers.items():
                found[name] += trainer.evaluate(self.states[name], batch)
        for name, one in found.items():
            if not math.isfinite(one.loss):
                raise self._diverged(f"{name}: validation loss after step {self.step} is {one.loss}")
        line = {name: {"loss": one.loss, "accuracy": one.accuracy} for name, one in found.items()}
        self._log.add({"kind": "valid", "step": self.step, **line})
        self._log.flush()
        numbers = next(iter(line.values()))
        better = self.best is None or _is_better(numbers, self.best, self.options.best_by or "loss")
        if better:
            self.best = {"step": self.step, **numbers}
        self.without_best = 0 if better else self.without_best + 1
        self._validated = self.step
        self.screen.validated(self.step, line, better=better)
        if self.sample is not None:
            for text in self.sample(self.states):
                self.screen.say(text)
        self._speed.restart()
        return better

    def _save(self, *, must: bool = False) -> None:
        """Write a checkpoint. Where that fails the run goes on and tries again at the next, unless it ``must``."""
        if self.step == self._saved:
            return
        name, trainer = next(iter(self.trainers.items()))
        progress = {
            "best": self.best,
            "without_best": self.without_best,
            "largest_difference": self.largest_difference,
            "validated": self._validated,
            "batches": self.step * self.options.accumulation,
        }
        try:
            self.store.save(
                self.step,
                config=self.config,
                weights=trainer.weights(self.states[name]),
                states={name: trainer.export_state(self.states[name]) for name, trainer in self.trainers.items()},
                record={**self.record, "progress": progress},
                best_step=None if self.best is None else self.best["step"],
            )
        except WeightsError as error:
            raise self._diverged(*error.problems) from error
        except CheckpointError as error:
            if must:
                raise
            if self.best is not None and self.best["step"] == self.step:
                self.best = self._best_saved
            self.screen.say(f"not saved, the run goes on and tries again: {error}")
            return
        self._saved = self.step
        self._best_saved = self.best
        self._speed.restart()

    def _diverged(self, *problems: str) -> DivergedError:
        saved = (
            "no checkpoint was written yet"
            if self._saved < 0
            else f"the last good checkpoint is that of step {self._saved}"
        )
        return DivergedError("training has diverged", [*problems, f"{saved}; nothing of this was saved"])


def _is_better(found: Mapping[str, float], best: Mapping[str, float], by: BestBy) -> bool:
    return found["accuracy"] > best["accuracy"] if by == "accuracy" else found["loss"] < best["loss"]


def _apart(one: float, other: float) -> float:
    """Relative to the larger."""
    largest = max(abs(one), abs(other))
    return abs(one - other) / largest if largest else 0.0
