"""A twin that remembers what it answered: asked the same again, it need not compute anew."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from twinformer.parity.case import Case
from twinformer.parity.twins import Call, Detail, Precision, Run, Twin


class Remembered:
    """A twin whose answers are kept as long as this is: those of a whole case (its configuration and every number),
    and what is asked ``once``. Everything else is asked anew."""

    def __init__(self, twin: Twin) -> None:
        self._twin = twin
        self._answers: dict[Any, Any] = {}

    @property
    def name(self) -> str:
        return self._twin.name

    @property
    def on_cpu(self) -> bool:
        return self._twin.on_cpu

    def leaves(self, case: Case) -> Any:
        return self._once(("leaves", *_key(case)), lambda: self._twin.leaves(case))

    def exported(self, case: Case) -> Any:
        return self._once(("exported", *_key(case)), lambda: self._twin.exported(case))

    def kept(self, case: Case) -> Any:
        return self._once(("kept", *_key(case)), lambda: self._twin.kept(case))

    def run(
        self, case: Case, *, gradients: bool = False, precision: Precision = "highest", detail: Detail = "modules"
    ) -> Run:
        def ask() -> Run:
            return self._twin.run(case, gradients=gradients, precision=precision, detail=detail)

        run: Run = self._once(("run", *_key(case), gradients, precision, detail), ask)
        return run

    def record(self, case: Case, *, gradients: bool = True) -> list[Call]:
        calls: list[Call] = self._once(
            ("record", gradients, *_key(case)), lambda: self._twin.record(case, gradients=gradients)
        )
        return calls

    def once(self, what: str, case: Case, ask: Callable[[], Any]) -> Any:
        return self._once((what, *_key(case)), ask)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._twin, name)

    def _once(self, key: Any, ask: Callable[[], Any]) -> Any:
        if key not in self._answers:
            self._answers[key] = ask()
        return self._answers[key]


def _key(case: Case) -> tuple[Any, ...]:
    """What tells one question from another: the configuration and every number that goes in."""
    digest = hashlib.sha256(case.cotangent.tobytes())
    for arrays in (case.tensors, case.inputs):
        for name, array in arrays.items():
            digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return (case.config, case.training, digest.digest())
