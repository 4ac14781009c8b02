"""How a model learns: the optimizer's choices and the schedule of the learning rate, as plain values.

No tensors here: the twins' ``optimizers.py`` do the arithmetic, and both are given the same learning rate, a number
computed here in double precision.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

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


def to_dict(config: OptimizerConfig | ScheduleConfig) -> dict[str, object]:
    """Every field by name, as plain JSON values."""
    return dataclasses.asdict(config)
