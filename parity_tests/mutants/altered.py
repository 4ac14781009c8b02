"""Configurations and names that say something else, as the code of one twin sees them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from parity_tests.mutants.patching import Patch
from twinformer.learning import OptimizerConfig


class Altered:
    """An object with some attributes changed."""

    def __init__(self, original: Any, **changes: Any) -> None:
        self._original, self._changes = original, changes

    def __getattr__(self, name: str) -> Any:
        changes = self.__dict__["_changes"]
        return changes[name] if name in changes else getattr(self.__dict__["_original"], name)


def altered_config(config: OptimizerConfig, **changes: Any) -> OptimizerConfig:
    """A config of the same kind with other attributes and methods, which are not looked at, and may be traced."""
    other = object.__new__(type(config))
    for name, value in (vars(config) | changes).items():
        object.__setattr__(other, name, value)
    return other


def update(patch: Patch, change: Callable[..., Any]) -> None:
    """``change(call, self, parameters, gradients, state, lr)`` in the place of an optimizer's update."""

    def wrong(call: Any) -> Any:
        def updated(self: Any, parameters: Any, gradients: Any, state: Any, lr: Any, *more: Any) -> Any:
            def going(self: Any, parameters: Any, gradients: Any, state: Any, lr: Any) -> Any:
                return call(self, parameters, gradients, state, lr, *more)

            return change(going, self, parameters, gradients, state, lr)

        return updated

    # in PyTorch a trainer has checked before: what it calls is the update without its checks
    patch.method("optimizers", "Optimizer", wrong, name="_advance" if patch.is_torch else "update")


def optimizer(patch: Patch, change: Callable[[Any, int], dict[str, Any]]) -> None:
    """While it updates the optimizer's config is as ``change(config, step)`` says."""

    def changed(call: Any, self: Any, parameters: Any, gradients: Any, state: Any, lr: Any) -> Any:
        with configured(self, **change(self.config, state["step"])):
            return call(self, parameters, gradients, state, lr)

    update(patch, changed)


@contextlib.contextmanager
def configured(owner: Any, **changes: Any) -> Iterator[None]:
    """Within, the owner's ``config`` has other values; owners may be frozen."""
    config = owner.config
    object.__setattr__(owner, "config", altered_config(config, **changes))
    try:
        yield
    finally:
        object.__setattr__(owner, "config", config)


def training(patch: Patch, change: Callable[[Any], dict[str, Any]]) -> None:
    """A trainer is made with what ``change(training)`` says."""

    def wrong(call: Any) -> Any:
        def init(self: Any, config: Any, training: Any, **options: Any) -> None:
            call(self, config, dataclasses.replace(training, **change(training)), **options)

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
