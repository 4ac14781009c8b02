"""Configurations and names that say something else, as the code of one twin sees them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from parity_tests.mutants.patching import Patch


class Altered:
    """An object with some attributes changed; values are not looked at, and may be traced."""

    def __init__(self, original: Any, **changes: Any) -> None:
        self._original, self._changes = original, changes

    def __getattr__(self, name: str) -> Any:
        changes = self.__dict__["_changes"]
        return changes[name] if name in changes else getattr(self.__dict__["_original"], name)


def optimizer(patch: Patch, change: Callable[[Any, int], dict[str, Any]]) -> None:
    """While it updates the optimizer's config is as ``change(config, step)`` says."""

    def wrong(call: Any) -> Any:
        def update(self: Any, parameters: Any, gradients: Any, state: Any, lr: Any) -> Any:
            config = self.config
            object.__setattr__(self, "config", Altered(config, **change(config, state["step"])))
            try:
                return call(self, parameters, gradients, state, lr)
            finally:
                object.__setattr__(self, "config", config)

        return update

    patch.method("optimizers", "Optimizer", wrong, name="update")


def training(patch: Patch, change: Callable[[Any], dict[str, Any]]) -> None:
    """A trainer is made with what ``change(training)`` says."""

    def wrong(call: Any) -> Any:
        def init(self: Any, config: Any, training: Any, **options: Any) -> None:
            call(self, config, Altered(training, **change(training)), **options)

        return init

    patch.method("training", "Trainer", wrong, name="__init__")


def alone(patch: Patch, file: str, name: str, faulty: Callable[[Any], Any]) -> None:
    """Replace a name as one file alone sees it."""
    original = getattr(patch.file(file), name)
    wrong = faulty(original)

    @functools.wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        patch.reached()
        return wrong(*args, **kwargs)

    patch._set(patch.file(file), name, counted)
