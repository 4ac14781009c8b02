"""How a model learns: the optimizer's choices and the schedule of the learning rate, as plain values.

No tensors here: the twins' ``optimizers.py`` do the arithmetic, and both are given the same learning rate, a number
computed here in double precision.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from twinformer.data.batch import Batch
from twinformer.errors import ConfigError, Problems

OptimizerName = Literal["adamw", "sgd", "adafactor"]
ScheduleName = Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"]
Decay = Literal["matrices", "all", "none"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The choices of an optimizer; those of another one are ignored.

    ``weight_decay`` acts on the parameters that ``decay`` names: ``matrices`` are the weights of linear layers and
    embedding tables, without norms and biases. ``clip_norm`` None: no clipping. ``ema_decay`` None: no average.
    """

    name: OptimizerName = "adamw"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    decay: Decay = "matrices"
    momentum: float = 0.9
    nesterov: bool = False
    clip_norm: float | None = 1.0
    ema_decay: float | None = None
    # Adafactor
    decay_rate: float = 0.8
    eps_gradient: float = 1e-30
    eps_parameter: float = 1e-3
    clip_threshold: float = 1.0

    def __post_init__(self) -> None:
        problems = Problems(type(self).__name__, ConfigError)
        _expect_option(problems, self, "name", ("adamw", "sgd", "adafactor"))
        _expect_option(problems, self, "decay", ("matrices", "all", "none"))
        for name in ("beta1", "beta2", "momentum"):
            _expect(problems, self, name, "a number in [0, 1)", lambda x: 0 <= x < 1)
        for name in ("eps", "eps_gradient", "eps_parameter", "clip_threshold", "decay_rate"):
            _expect(problems, self, name, "a positive number", lambda x: x > 0)
        _expect(problems, self, "weight_decay", "0 or a positive number", lambda x: x >= 0)
        _expect(problems, self, "clip_norm", "a positive number or None", lambda x: x > 0, none=True)
        _expect(problems, self, "ema_decay", "a number in [0, 1) or None", lambda x: 0 <= x < 1, none=True)
        problems.expect(
            not self.nesterov or self.momentum > 0, f"nesterov: expected False with momentum={self.momentum}, got True"
        )
        problems.raise_if_any()

    def decays(self, path: str) -> bool:
        """Whether weight decay acts on the parameter of that path."""
        if self.decay == "matrices":
            owner = path.rpartition(".")[0].rpartition(".")[2]
            return path.endswith(".weight") and not owner.endswith("norm")
        return self.decay == "all"


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate by step. Steps count from 0; in warm-up ``lr(s) = peak · (s + 1) / warmup_steps``.

    ``total_steps`` is the length of the run; the rate after warm-up falls to ``final_fraction · peak``, which the last
    step, ``total_steps - 1``, has: ``linear`` in a line, ``cosine`` along half a wave. ``inverse_sqrt``:
    ``peak · sqrt(w / (s + 1))`` with ``w = max(warmup_steps, 1)`` (Vaswani et al. 2017, section 5.3, with the peak
    named). ``wsd`` (warm-up, stable, decay): the peak until ``decay_steps`` before the end, then a line.
    """

    name: ScheduleName = "cosine"
    peak: float = 1e-3
    warmup_steps: int = 0
    total_steps: int = 1000
    final_fraction: float = 0.0
    decay_steps: int = 0

    def __post_init__(self) -> None:
        problems = Problems(type(self).__name__, ConfigError)
        _expect_option(problems, self, "name", ("constant", "linear", "cosine", "inverse_sqrt", "wsd"))
        _expect(problems, self, "peak", "a positive number", lambda x: x > 0)
        _expect(problems, self, "final_fraction", "a number in [0, 1]", lambda x: 0 <= x <= 1)
        for name, least in (("warmup_steps", 0), ("total_steps", 1), ("decay_steps", 0)):
            value = getattr(self, name)
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            problems.expect(is_whole and value >= least, f"{name}: expected a whole number from {least}, got {value!r}")
        if not problems.found:
            used = self.warmup_steps + (self.decay_steps if self.name == "wsd" else 0)
            problems.expect(
                used <= self.total_steps,
                f"total_steps: expected at least warm-up and decay together, {used}, got {self.total_steps}",
            )
        problems.raise_if_any()

    def learning_rate(self, step: int) -> float:
        """The rate of a step. Steps from ``total_steps`` on have that of the last one."""
        if step < 0:
            raise ConfigError("ScheduleConfig", [f"step: expected a whole number from 0, got {step}"])
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        low = self.peak * self.final_fraction
        last = self.total_steps - 1
        match self.name:
            case "constant":
                return self.peak
            case "inverse_sqrt":
                return self.peak * math.sqrt(max(self.warmup_steps, 1) / (step + 1))
            case "linear":
                return low + (self.peak - low) * (1 - self._part(step, self.warmup_steps, last))
            case "cosine":
                wave = (1 + math.cos(math.pi * self._part(step, self.warmup_steps, last))) / 2
                return low + (self.peak - low) * wave
            case "wsd":
                return low + (self.peak - low) * (1 - self._part(step, last - self.decay_steps, last))

    @staticmethod
    def _part(step: int, first: int, last: int) -> float:
        """How much of the way from ``first`` to ``last`` is done."""
        if last <= first:
            return 0.0 if step <= first else 1.0
        return min(1.0, max(0.0, (step - first) / (last - first)))


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): ``W + alpha / rank · B A``, of which A and B are trained.

    ``targets``: names of linear layers (``query``, ``up`` …) whose weights have them.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("query", "value")

    def __post_init__(self) -> None:
        problems = Problems(type(self).__name__, ConfigError)
        is_whole = isinstance(self.rank, int) and not isinstance(self.rank, bool)
        problems.expect(is_whole and self.rank >= 1, f"rank: expected a whole number from 1, got {self.rank!r}")
        _expect(problems, self, "alpha", "a positive number", lambda x: x > 0)
        known = ("query", "key", "value", "output", "up", "gate", "down")
        problems.expect(len(self.targets) > 0, f"targets: expected at least one of {', '.join(known)}, got none")
        for target in self.targets:
            problems.expect(target in known, f"targets: expected one of {', '.join(known)}, got {target!r}")
        problems.raise_if_any()

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def adapts(self, path: str) -> bool:
        """Whether the parameter of that path, if it is the weight of a linear layer, has an adapter."""
        owner, _, leaf = path.rpartition(".")
        return leaf == "weight" and owner.rpartition(".")[2] in self.targets


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained: one optimizer step after ``accumulation`` micro-batches, whose losses and gradients are
    summed, then divided once by the number of targets in all of them.

    ``seed`` is that of the dropout masks (and of the first weights, where none are given). ``dropout`` False trains
    without dropout whatever the model's rates are.
    """

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    accumulation: int = 1
    smoothing: float = 0.0
    z_loss: float = 0.0
    dropout: bool = True
    seed: int = 0
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        problems = Problems(type(self).__name__, ConfigError)
        for name, least in (("accumulation", 1), ("seed", 0)):
            value = getattr(self, name)
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            problems.expect(is_whole and value >= least, f"{name}: expected a whole number from {least}, got {value!r}")
        _expect(problems, self, "smoothing", "a number in [0, 1)", lambda x: 0 <= x < 1)
        _expect(problems, self, "z_loss", "0 or a positive number", lambda x: x >= 0)
        problems.raise_if_any()


@dataclass(frozen=True)
class Metrics:
    """What one optimizer step tells.

    ``loss`` is the mean over ``count`` targets, smoothing and z-loss included; ``gradient_norm`` that of the mean's
    gradient before clipping. Numbers, or arrays that become numbers by ``float()``: frameworks compute ahead, and
    asking waits.
    """

    step: int
    loss: Any
    gradient_norm: Any
    count: Any
    learning_rate: float


@dataclass(frozen=True)
class Evaluation:
    """Sums over the targets of some batches, which add up.

    ``total`` of the negative log-likelihood in nats, ``correct`` of targets that have the highest score (the lowest id
    among equals).
    """

    total: float = 0.0
    count: int = 0
    correct: int = 0

    def __add__(self, other: Evaluation) -> Evaluation:
        return Evaluation(self.total + other.total, self.count + other.count, self.correct + other.correct)

    @property
    def loss(self) -> float:
        """Nats per target; NaN where there is none."""
        return self.total / self.count if self.count else math.nan

    @property
    def accuracy(self) -> float:
        """The share of targets with the highest score; NaN where there is none."""
        return self.correct / self.count if self.count else math.nan


class Trainer(Protocol):
    """What both twins' ``training.Trainer`` offer to a training run and to the judge.

    State is the twin's own and plain: it goes in and comes out; nothing is kept in the trainer.
    """

    def init(self, tensors: Mapping[str, Any] | None = None) -> Any:
        """The state before the first step, from weights by path, or from the config's initializer."""

    def step(self, state: Any, batches: Sequence[Batch]) -> tuple[Any, Metrics]:
        """One optimizer step over the micro-batches. The state that went in must not be used again."""

    def evaluate(self, state: Any, batch: Batch) -> Evaluation:
        """Without dropout, smoothing and z-loss; with the averaged weights where the optimizer keeps them."""

    def log_probabilities(self, state: Any, batch: Batch) -> Any:
        """``[B, T]``, NumPy, wide: ln p of each target, as ``evaluate`` sees it; 0 where a target does not count."""

    def export_state(self, state: Any) -> dict[str, Any]:
        """All of it as NumPy arrays by name, in PyTorch's orientation, dtypes kept."""

    def import_state(self, tensors: Mapping[str, Any]) -> Any:
        """The state that ``export_state`` of either twin gave."""

    def weights(self, state: Any) -> dict[str, Any]:
        """The model's weights for a model directory: averaged where there is an average, adapters merged."""


def _expect(
    problems: Problems, config: object, name: str, wanted: str, is_right: object, *, none: bool = False
) -> None:
    value = getattr(config, name)
    if value is None and none:
        return
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    problems.expect(is_number and is_right(value), f"{name}: expected {wanted}, got {value!r}")  # type: ignore[operator]


def _expect_option(problems: Problems, config: object, name: str, options: tuple[str, ...]) -> None:
    value = getattr(config, name)
    problems.expect(value in options, f"{name}: expected one of {', '.join(options)}, got {value!r}")


def to_dict(config: OptimizerConfig | ScheduleConfig | LoraConfig | TrainingConfig) -> dict[str, object]:
    """Every field by name, as plain JSON values."""
    return dataclasses.asdict(config)
