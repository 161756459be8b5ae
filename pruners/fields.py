"""What the field of a method may hold, as its annotation declares it."""

import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Annotated, Any, Literal

_WORDS = {float: "a number", int: "an integer", bool: "true or false", types.NoneType: "None"}


@dataclass(frozen=True)
class Range:
    """Where a number may lie, beside its type: `core_ratio: Annotated[float, Range(0, 1)] = 0.6`."""

    low: float = -inf
    high: float = inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, number: float) -> bool:
        above = number > self.low if self.open_low else number >= self.low
        return above and (number < self.high if self.open_high else number <= self.high)

    def __str__(self) -> str:
        left = "(" if self.open_low or self.low == -inf else "["
        right = ")" if self.open_high or self.high == inf else "]"
        return f"{left}{self.low}, {self.high}{right}"


def fits(hint: Any, value: object) -> bool:
    """Whether a field annotated with `hint` may hold `value`. Numbers are finite, and a bool is none."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in parts
    if origin is Annotated:
        return fits(parts[0], value) and value in parts[1]
    if origin in (typing.Union, types.UnionType):
        return any(fits(part, value) for part in parts)
    if origin is tuple:  # configs give lists
        return (
            isinstance(value, Sequence)
            and not isinstance(value, str)
            and all(fits(parts[0], item) for item in value)
        )
    if hint in (float, int):
        return isinstance(value, int | hint) and not isinstance(value, bool) and isfinite(value)
    return isinstance(value, origin or hint)


def describe(hint: Any) -> str:
    """What fits `hint`, in words."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if origin is Annotated:
        return f"{describe(parts[0])} in {parts[1]}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe, parts))
    if origin is tuple:
        return f"a list with each item {describe(parts[0])}"
    return _WORDS.get(hint, str(hint))
