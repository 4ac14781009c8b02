"""What the rungs look at, computed once: runs of both twins on a case, by dtype and precision."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from twinformer.config import DType
from twinformer.parity.case import Case
from twinformer.parity.twins import Detail, FlaxTwin, Precision, Run, TorchTwin, Twin

Progress = Callable[[str], None]


class Evidence:
    """A case, the two twins, and their runs, kept so that no rung repeats another's work."""

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
        self._progress = progress
        self._runs: dict[tuple[str, DType, DType, bool, Precision], Run] = {}

    def runs(self, dtype: DType, *, gradients: bool = False, precision: Precision = "highest") -> tuple[Run, Run]:
        """Both twins' runs in ``dtype``, with weights rounded to it."""
        first, second = (self._run(twin, dtype, dtype, gradients, precision) for twin in self.twins)
        return first, second

    def truth(self, weights_in: DType) -> Run:
        """The first twin's float64 run, with gradients, on weights rounded to ``weights_in``.

        Either twin's would do: the rungs below show that they are one in float64.
        """
        exact = all(tensor.dtype == np.float32 for tensor in self.case.tensors.values())
        kept: DType = "float64" if weights_in == "float32" and exact else weights_in
        return self._run(self.twins[0], "float64", kept, True, "highest")

    def precisions(self) -> tuple[Precision, ...]:
        """The settings of matrix products that can differ here."""
        return ("default",) if all(twin.on_cpu for twin in self.twins) else ("default", "highest")

    def _run(self, twin: Twin, dtype: DType, weights_in: DType, gradients: bool, precision: Precision) -> Run:
        gradients = gradients or self._with_gradients
        for has_gradients in (True, gradients):  # a run with gradients has all that one without has
            kept = self._runs.get((twin.name, dtype, weights_in, has_gradients, precision))
            if kept is not None:
                return kept
        what = "forward and gradients" if gradients else "forward"
        self._progress(f"{twin.name}: {what} in {dtype}, {precision} precision")
        # every module in float64; in low precision, blocks are all that is looked at, and memory is not without end
        detail: Detail = "modules" if dtype == weights_in == "float64" else "blocks"
        case = self.case.in_dtype(weights_in).in_dtype(dtype)
        run = twin.run(case, gradients=gradients, precision=precision, detail=detail)
        self._runs[twin.name, dtype, weights_in, gradients, precision] = run
        return run
