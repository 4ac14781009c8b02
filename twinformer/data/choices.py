"""What the data sets ask of their arguments alike: ids of the vocabulary, and what becomes of what is too long."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from twinformer.data.batch import Ids
from twinformer.data.order import is_whole
from twinformer.errors import Problems

#: something longer than there is room for: cut, a problem, or left out and counted
Long = Literal["cut", "refuse", "skip"]

#: examples that a message names
_NAMED = 5


def check_option(problems: Problems, name: str, options: Any, value: object) -> None:
    """A choice is one of a ``Literal``'s."""
    known = get_args(options)
    problems.expect(value in known, f"{name}: expected one of {', '.join(map(str, known))}, got {value!r}")


def check_ids(problems: Problems, vocab_size: int, **ids: int | None) -> None:
    """Ids of special tokens are ids of the vocabulary, or None."""
    for name, value in ids.items():
        problems.expect(
            value is None or (is_whole(value, 0) and value < vocab_size),
            f"{name}: expected an id from 0 to {vocab_size - 1}, got {value!r}",
        )


def settle_long(
    problems: Problems, notes: list[str], what: str, sizes: Ids, most: int, long: Long
) -> npt.NDArray[np.bool_]:
    """Which of ``what`` ("documents"), of these sizes ``[n]``, are used. Notes what was done, or a problem."""
    fits: npt.NDArray[np.bool_] = sizes <= most
    too_long = np.flatnonzero(~fits)
    if len(too_long) == 0:
        return fits
    told = f"{len(too_long)} of {len(sizes)} {what} longer than {most} tokens"
    if long == "refuse":
        problems.add(
            f"long: expected 'cut' or 'skip' for {told} (the longest {sizes.max()}; the first, counted from 0: "
            f"{', '.join(map(str, too_long[:_NAMED]))})"
        )
    notes.append(f"{told} {'cut' if long == 'cut' else 'left out'}")
    return fits if long == "skip" else np.ones_like(fits)
