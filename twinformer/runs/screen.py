"""What a person sees of a run: a line that moves on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Screen:
    """Shows progress on ``console``. Where it is no terminal, a line at most every ``seconds``."""

    def __init__(self, console: Console, *, seconds: float = 5.0) -> None:
        self.console = console
        self.seconds = seconds
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._steps = 0
        self._last = float("-inf")
        self._begun = (0.0, 0)

    @contextlib.contextmanager
    def shown(self, step: int, steps: int) -> Iterator[None]:
        """While the run goes on."""
        self._steps, self._begun, self._last = steps, (time.monotonic(), step), float("-inf")
        if not self.console.is_terminal:
            yield
            return
        columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(bar_width=20), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.description}"), console=self.console, transient=True) as self._bar:
            self._task = self._bar.add_task("compiling", total=steps, completed=step)
            try:
                yield
            finally:
                self._bar = None

    def progress(
        self,
        step: int,
        *,
        losses: Mapping[str, float],
        largest_difference: float | None,
        epoch: float,
        tokens_per_second: float | None = None,
        utilisation: float | None = None,
    ) -> None:
        """Where the run is: ``losses`` of the last step by twin, ``utilisation`` of the measured ceiling."""
        parts = [f"loss {_by_twin(losses)}"]
        if largest_difference is not None:
            parts.append(f"apart at most {largest_difference:.1e}")
        parts.append(f"epoch {epoch:.2f}")
        if tokens_per_second is not None:
            parts.append(f"{tokens_per_second:,.0f} tokens/s")
        if utilisation is not None:
            parts.append(f"MFU {utilisation:.0%}")
        text = "  ".join(parts)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif time.monotonic() - self._last >= self.seconds or step >= self._steps:
            self._last = time.monotonic()
            self.say(f"step {step}/{self._steps}  {text}{self._left(step)}")

    def validated(self, step: int, found: Mapping[str, Mapping[str, float]], *, better: bool) -> None:
        losses = _by_twin({name: numbers["loss"] for name, numbers in found.items()})
        accuracy = next(iter(found.values()))["accuracy"]
        self.say(f"step {step}: validation loss {losses}, accuracy {accuracy:.2%}{'  (best)' if better else ''}")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _left(self, step: int) -> str:
        """How long it will take, from the steps of this call."""
        began, first = self._begun
        if step <= first + 1 or step >= self._steps:
            return ""
        seconds = (time.monotonic() - began) / (step - first) * (self._steps - step)
        return f"  {seconds / 60:.1f} min left"


def _by_twin(numbers: Mapping[str, float]) -> str:
    if len(numbers) == 1:
        return f"{next(iter(numbers.values())):.4f}"
    return " ".join(f"{name} {number:.6f}" for name, number in numbers.items())
