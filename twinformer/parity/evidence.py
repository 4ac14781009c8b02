"""What the rungs look at, computed once: runs of both twins on a case, by dtype and precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from twinformer.config import DType
from twinformer.parity.case import Case, computing_in
from twinformer.parity.compare import largest_difference
from twinformer.parity.noise import neighbour, nudged, reordered
from twinformer.parity.power import Power, measure, tensors_of
from twinformer.parity.twins import Call, Detail, FlaxTwin, Precision, Run, TorchTwin, Twin

Progress = Callable[[str], None]
# the case itself, the same in another order of summation, or the case with weights nearby
Variant = Literal["plain", "reordered", "neighbour"]


class Evidence:
    """A case, the two twins, and their plain runs, kept so that no rung repeats another's work."""

    def __init__(
        self,
        case: Case,
        twins: tuple[Twin, Twin] | None = None,
        *,
        with_gradients: bool = False,
        progress: Progress = lambda _: None,
    ) -> None:
        """``with_gradients``: some rung will want them, so let every run have them and serve all."""
        self.case = case
        self._with_gradients = with_gradients
        self.twins: tuple[Twin, Twin] = twins or (TorchTwin(), FlaxTwin())
        self.progress = progress
        self._runs: dict[tuple[Any, ...], Run] = {}
        self._power: Power | None = None
        self._noise: dict[bool, list[list[dict[str, float]]]] = {}

    def runs(
        self,
        dtype: DType,
        *,
        gradients: bool = False,
        precision: Precision = "highest",
        variant: Variant = "plain",
        draw: int = 0,
        parameters: DType | None = None,
    ) -> tuple[Run, Run]:
        """Both twins' runs in ``dtype``, with weights rounded to it, or kept in the dtype ``parameters``.

        ``variant`` and ``draw``: see ``noise.py``.
        """
        kept = parameters or dtype
        first, second = (self._run(twin, dtype, kept, gradients, precision, variant, draw) for twin in self.twins)
        return first, second

    def noise(self, *, gradients: bool = False, draws: int = 1) -> list[dict[str, float]]:
        """How far each twin is, in float64, from itself in another order, by the names of ``tensors_of``.

        With dropout the order stays, for other positions would be dropped: then the weights alone are moved, by a
        rounding. Kept are the largest differences, infinite where non-finite values move; the tensors are large. Of
        several ``draws`` the largest counts.
        """
        gradients = gradients or self._with_gradients
        kept = self._noise.setdefault(gradients, [])
        for draw in range(len(kept), draws):
            kept.append([self._moved_by_order(twin, gradients, draw) for twin in self.twins])
        by_twin = zip(*kept[:draws], strict=True)
        return [{name: max(floor[name] for floor in floors) for name in floors[0]} for floors in by_twin]

    def _moved_by_order(self, twin: Twin, gradients: bool, draw: int) -> dict[str, float]:
        before = tensors_of(self._run(twin, "float64", "float64", gradients, "highest"))
        after = tensors_of(self._run(twin, "float64", "float64", gradients, "highest", "reordered", draw))
        return {name: largest_difference(after[name], tensor) for name, tensor in before.items() if name in after}

    def truth(self, weights_in: DType, *, variant: Variant = "plain", draw: int = 0) -> Run:
        """The first twin's float64 run, with gradients, on weights rounded to ``weights_in``.

        Either twin's would do: the rungs below show that they are one in float64.
        """
        exact = variant == "plain" and all(tensor.dtype == np.float32 for tensor in self.case.tensors.values())
        kept: DType = "float64" if weights_in == "float32" and exact else weights_in
        return self._run(self.twins[0], "float64", kept, True, "highest", variant, draw)

    def power(self, bound: float) -> Power:
        """What a change of single weights moves, measured once; ``bound`` is that of rung 1."""
        if self._power is None:
            self.progress("detection power: single weights changed")
            self._power = measure(self, bound=bound, gradients=self._with_gradients)
        return self._power

    def self_attention(self, case: Case) -> Call | None:
        """The first self-attention's call as the first twin makes it; None where there is none."""
        calls = self.twins[0].record(case, gradients=False)
        return next((one for one in calls if one.kind == "AttentionLayer" and ".cross_" not in f".{one.path}"), None)

    def precisions(self) -> tuple[Precision, ...]:
        """The settings of matrix products that can differ here."""
        return ("default",) if all(twin.on_cpu for twin in self.twins) else ("default", "highest")

    def _run(
        self,
        twin: Twin,
        dtype: DType,
        weights_in: DType,
        gradients: bool,
        precision: Precision,
        variant: Variant = "plain",
        draw: int = 0,
    ) -> Run:
        gradients = gradients or self._with_gradients
        key = (twin.name, dtype, weights_in, precision, variant, draw)
        for has_gradients in (True, gradients):  # a run with gradients has all that one without has
            kept = self._runs.get((*key, has_gradients))
            if kept is not None:
                return kept
        what = "forward and gradients" if gradients else "forward"
        which = "" if variant == "plain" else f", {variant}"
        self.progress(f"{twin.name}: {what} in {dtype}, {precision} precision{which}")
        # every module in float64; in low precision, blocks are all that is looked at, and memory is not without end
        is_full = dtype == weights_in == "float64" and variant != "neighbour"
        detail: Detail = "modules" if is_full else "blocks"
        case = self.case.in_dtype(weights_in)
        if variant == "neighbour":
            case = neighbour(case, draw)
        case = case.in_dtype(dtype) if dtype in (weights_in, "float64") else computing_in(case, dtype)
        if variant == "reordered" and "rng" in case.inputs:
            run = twin.run(nudged(case, draw), gradients=gradients, precision=precision, detail=detail)
        elif variant == "reordered":
            other = reordered(case, 1 + draw, last_place=dtype == "float64")
            run = other.restore(twin.run(other.case, gradients=gradients, precision=precision, detail=detail))
        else:
            run = twin.run(case, gradients=gradients, precision=precision, detail=detail)
        if variant == "plain":  # the others are asked for once
            self._runs[(*key, gradients)] = run
        return run
