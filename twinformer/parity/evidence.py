"""What the rungs look at, computed once: runs of both twins on a case, by dtype and precision."""

from __future__ import annotations

from collections.abc import Callable

from twinformer.config import DType
from twinformer.parity.case import Case
from twinformer.parity.twins import FlaxTwin, Precision, Run, TorchTwin, Twin

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

    def runs(
        self,
        dtype: DType,
        *,
        gradients: bool = False,
        precision: Precision = "highest",
        weights_in: DType | None = None,
    ) -> tuple[Run, Run]:
        """Both twins' runs in ``dtype``. ``weights_in``: the weights first rounded to this dtype."""
        first, second = (self._run(twin, dtype, weights_in or dtype, gradients, precision) for twin in self.twins)
        return first, second

    def precisions(self) -> tuple[Precision, ...]:
        """The settings of matrix products that can differ here."""
        return ("default",) if all(twin.on_cpu for twin in self.twins) else ("default", "highest")

    def _run(self, twin: Twin, dtype: DType, weights_in: DType, gradients: bool, precision: Precision) -> Run:
        for has_gradients in (True, gradients):  # a run with gradients has all that one without has
            kept = self._runs.get((twin.name, dtype, weights_in, has_gradients, precision))
            if kept is not None:
                return kept
        what = "forward and gradients" if gradients else "forward"
        self._progress(f"{twin.name}: {what} in {dtype}, {precision} precision")
        run = twin.run(self.case.in_dtype(weights_in).in_dtype(dtype), gradients=gradients, precision=precision)
        self._runs[twin.name, dtype, weights_in, gradients, precision] = run
        return run
