"""How a fault is written down: one decorated function, whose id leads to its line in ``catalogue.tsv``."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parity_tests.mutants.patching import Patch
from twinformer.parity.mutation import TWINS, USUAL, Control, Mutant, TwinName

ROWS: dict[str, dict[str, str]] = {}
with (Path(__file__).parent / "catalogue.tsv").open(encoding="utf-8", newline="") as _file:
    for _row in csv.DictReader(_file, delimiter="\t"):
        if _row["id"] in ROWS:
            raise ValueError(f"catalogue.tsv: expected every id once, got {_row['id']} twice")
        ROWS[_row["id"]] = _row

MUTANTS: list[Mutant] = []
CONTROLS: list[Control] = []
DOES_NOT_APPLY: dict[str, str] = {}

LOW = ("forward", "rounding")


def mutant(
    name: str,
    *,
    case: str,
    culprits: str | tuple[str, ...] = (),
    rungs: tuple[str, ...] = USUAL,
    twins: tuple[TwinName, ...] = TWINS,
) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    """The decorated function plants the fault ``name`` through the Patch that it is given, in each of ``twins``."""

    def register(plant: Callable[[Patch], None]) -> Callable[[Patch], None]:
        accepted = (culprits,) if isinstance(culprits, str) else culprits
        MUTANTS.extend(Mutant(*_described(name, twin), _planting(twin, plant), case, rungs, accepted) for twin in twins)
        return plant

    return register


def control(
    name: str,
    *,
    case: str,
    rungs: tuple[str, ...] = (*USUAL, "rounding", "precision"),
    twins: tuple[TwinName, ...] = TWINS,
) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    """The decorated function plants a difference that is no fault."""

    def register(plant: Callable[[Patch], None]) -> Callable[[Patch], None]:
        CONTROLS.extend(Control(*_described(name, twin), _planting(twin, plant), case, rungs) for twin in twins)
        return plant

    return register


def does_not_apply(reason: str, *names: str) -> None:
    """These entries of the catalogue cannot be planted, for this reason."""
    for name in names:
        DOES_NOT_APPLY[name] = reason


def _described(name: str, twin: TwinName) -> tuple[str, TwinName, str, str, tuple[str, ...]]:
    row = ROWS[name]
    return name, twin, row["mechanism"], row["source"], tuple(row["classes"].split())


def _planting(twin: TwinName, plant: Callable[[Patch], None]) -> Any:
    @contextmanager
    def planting() -> Iterator[Patch]:
        with Patch(twin) as patch:
            plant(patch)
            yield patch

    return planting
