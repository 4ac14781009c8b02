"""The errors of the project: every one says what was expected and what was met, all problems at once."""

from __future__ import annotations

from collections.abc import Iterable


class TwinformerError(ValueError):
    """Base of all errors that a user can cause. ``problems`` lists every one that was found."""

    def __init__(self, subject: str, problems: Iterable[str]) -> None:
        self.subject = subject
        self.problems = tuple(problems)
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        count = len(self.problems)
        super().__init__(f"{subject}: {count} problem{'' if count == 1 else 's'}{lines}")

    def __reduce__(self) -> tuple[type[TwinformerError], tuple[str, tuple[str, ...]]]:
        """An error of another process arrives whole."""
        return type(self), (self.subject, self.problems)


class ConfigError(TwinformerError):
    """A configuration that contradicts itself or holds a value of the wrong kind."""


class InputError(TwinformerError):
    """A call with wrong shapes, ranks, dtypes, token ids or lengths."""


class WeightsError(TwinformerError):
    """Weights that are missing, unexpected, mis-shaped or of the wrong kind."""


class CheckpointError(TwinformerError):
    """A model directory that cannot be read or written."""


class Problems:
    """Collects problems, then raises them together.

    >>> problems = Problems("AttentionLayer", InputError)
    >>> problems.expect(X_width == 24, f"expected X of width 24, got {X_width}")
    >>> problems.raise_if_any()
    """

    def __init__(self, subject: str, error: type[TwinformerError]) -> None:
        self.subject = subject
        self.error = error
        self.found: list[str] = []

    def add(self, problem: str) -> None:
        self.found.append(problem)

    def expect(self, condition: bool, problem: str) -> bool:
        """Note ``problem`` unless ``condition`` holds; gives ``condition`` back."""
        if not condition:
            self.found.append(problem)
        return condition

    def raise_if_any(self) -> None:
        if self.found:
            raise self.error(self.subject, self.found)
