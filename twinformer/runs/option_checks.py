"""Whether an option's value is of its kind and within its bounds, said in the words of the other errors."""

from __future__ import annotations

import math
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

from twinformer.errors import Problems


@dataclass(frozen=True)
class Told:
    """What is said of an option, and its bounds."""

    help: str
    least: float | None = None
    above: float | None = None


def check(problems: Problems, name: str, hint: Any, told: Told, value: Any) -> None:
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    options = tuple(choice for option in options for choice in _alternatives(option))
    good = any(fits(value, option) for option in options)
    if good and value is not None:
        good = (told.least is None or value >= told.least) and (told.above is None or value > told.above)
    wanted = " or ".join(_said(option) for option in options)
    bound = (
        f" from {told.least}" if told.least is not None else f" above {told.above}" if told.above is not None else ""
    )
    problems.expect(good, f"{name}: expected {wanted}{bound}, got {value!r}")


def _alternatives(option: Any) -> tuple[Any, ...]:
    return typing.get_args(option) if typing.get_origin(option) is Literal else (option,)


def fits(value: Any, option: Any) -> bool:
    if isinstance(option, str):
        return bool(value == option)
    if option is types.NoneType:
        return value is None
    if option is bool:
        return isinstance(value, bool)
    if option is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, typing.get_origin(option) or option)


def _said(option: Any) -> str:
    if isinstance(option, str):
        return repr(option)
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "nothing"}
    return plain.get(option, "a table")
