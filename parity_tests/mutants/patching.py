"""How a fault gets into a twin: functions and methods replaced for as long as a ``with`` block lasts.

Both twins have the same names for the same things, so that one faulty function often serves both. What differs
between the frameworks and is needed here is in ``Patch``.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import torch

import torch_impl

Function = Callable[..., Any]
_INHERITED = object()
# parts of explicit formulas that PyTorch's kernels pass by
_EXPLICIT = ("masked_softmax",)


class Patch:
    """One twin under a fault. ``calls`` counts how often faulty code ran.

    ``xp`` is ``torch`` or ``jax.numpy``: what both spell alike may be used through it.
    """

    def __init__(self, twin: str) -> None:
        self.twin = twin
        self.is_torch = twin == "torch_impl"
        self.xp: Any = torch if self.is_torch else jnp
        self.calls = 0
        self._undo: list[tuple[Any, str, Any]] = []
        self._explicit = contextlib.ExitStack()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, original in reversed(self._undo):
            if original is _INHERITED:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        self._undo.clear()
        self._explicit.close()

    def file(self, name: str) -> Any:
        """The twin's file of this name."""
        return sys.modules[f"{self.twin}.{name}"]

    def function(self, file: str, name: str, faulty: Callable[[Function], Function], *, quiet: bool = False) -> None:
        """Replace a function wherever in the twin its name is bound. ``faulty`` makes the new one from the old."""
        if self.is_torch and name in _EXPLICIT:
            self._explicit.enter_context(torch_impl.fused.explicit_formulas())
        original = getattr(self.file(file), name)
        replacement = self._counting(original, faulty, quiet)
        for owner in self._files():
            for bound, value in list(vars(owner).items()):
                if value is original:
                    self._set(owner, bound, replacement)

    def method(
        self, file: str, cls: str, faulty: Callable[[Function], Function], name: str = "call", *, quiet: bool = False
    ) -> None:
        """Replace a method of a class; ``call`` is ``forward`` or ``__call__``."""
        owner = getattr(self.file(file), cls)
        name = ("forward" if self.is_torch else "__call__") if name == "call" else name
        self._set(owner, name, self._counting(getattr(owner, name), faulty, quiet))

    def bound(self, file: str, module: str, name: str, faulty: Callable[[Function], Function]) -> None:
        """Replace ``module.name`` as one file alone sees it."""
        whole = getattr(self.file(file), module)
        seen = SimpleNamespace(**vars(whole))
        setattr(seen, name, self._counting(getattr(whole, name), faulty, quiet=False))
        self._set(self.file(file), module, seen)

    def reached(self) -> None:
        """Count one run of faulty code, where replacing something does not mean running something wrong."""
        self.calls += 1

    # what the frameworks spell differently

    def array(self, values: Any, like: Any) -> Any:
        """As an array of this framework, of the dtype of ``like``."""
        if self.is_torch:
            return torch.as_tensor(values).to(like.dtype)
        return jnp.asarray(values).astype(like.dtype)

    def cast(self, X: Any, dtype: str) -> Any:
        return X.to(getattr(torch, dtype)) if self.is_torch else X.astype(dtype)

    def stopped(self, X: Any) -> Any:
        """The same values, with no gradient."""
        return X.detach() if self.is_torch else jax.lax.stop_gradient(X)

    def weight(self, linear: Any) -> Any:
        """The matrix of a Linear as ``[out, in]``."""
        return linear.weight if self.is_torch else linear.kernel[...].T

    def arange(self, count: int) -> Any:
        return torch.arange(count) if self.is_torch else jnp.arange(count)

    def flip(self, X: Any, axis: int) -> Any:
        return X.flip(axis) if self.is_torch else jnp.flip(X, axis)

    def _counting(self, original: Any, faulty: Callable[[Function], Function], quiet: bool) -> Function:
        wrong = faulty(original)
        if quiet:
            return wrong

        @functools.wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return wrong(*args, **kwargs)

        return counted

    def _files(self) -> list[ModuleType]:
        return [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == self.twin]

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._undo.append((owner, name, owner.__dict__.get(name, _INHERITED)))
        setattr(owner, name, value)


def halved_gradient(patch: Patch, Y: Any) -> Any:
    """The values of Y, with half its gradient."""
    still = patch.stopped(Y)
    return still + (Y - still) / 2
