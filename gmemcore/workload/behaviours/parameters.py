"""Parameters of behaviours: what a user may set, in which unit, between which bounds, and what it means."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from gmemcore.engine.arguments import as_int
from gmemcore.errors import InvalidArgumentError
from gmemcore.uapi import PAGE_SIZE
from gmemcore.units import format_size, parse_size

Value = int | float | bool | None


class Kind(StrEnum):
    """What a parameter is, which decides how it is written and checked."""

    SIZE = "size"
    COUNT = "count"
    SHARE = "share"
    SWITCH = "switch"


_SWITCHES: Final = {"yes": True, "no": False, "true": True, "false": False, "on": True, "off": False}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter.

    Attributes
    ----------
    name : str
        As it is typed.
    kind : Kind
        SIZE: bytes, whole pages (``64m``). COUNT: a whole number. SHARE: 0 to 1 (``6%``). SWITCH: yes or no.
    default : int, float, bool or None
        None: derived from the guest, as ``meaning`` says.
    meaning : str
        What it is.
    low, high : int, float or None
        Bounds, both accepted; None: no bound.
    unit : str
        What a count counts.
    """

    name: str
    kind: Kind
    default: Value
    meaning: str
    low: float | None = None
    high: float | None = None
    unit: str = ""

    def check(self, value: Any, behaviour: str) -> Value:
        """Return the value of a text or of a value of the parameter's own type.

        Raises
        ------
        InvalidArgumentError
            EINVAL: not such a value, or out of bounds; the message says what is accepted.
        """
        if value is None and self.default is None:
            return None
        try:
            read: float = _READERS[self.kind](value)
        except (TypeError, ValueError, InvalidArgumentError):
            raise self._refusal(value, behaviour) from None
        too_low = self.low is not None and read < self.low
        if too_low or (self.high is not None and read > self.high):
            raise self._refusal(value, behaviour)
        return read

    def format(self, value: Value) -> str:
        """Return a value as it would be typed."""
        if value is None:
            return "auto"
        return _FORMATS[self.kind](value)

    @property
    def accepted(self) -> str:
        """What is accepted, in words."""
        if self.kind is Kind.SWITCH:
            return "yes or no"
        low = "" if self.low is None else self.format(self.low)
        high = "" if self.high is None else self.format(self.high)
        return f"{low} or more" if self.high is None else f"{low} to {high}"

    def _refusal(self, value: Any, behaviour: str) -> InvalidArgumentError:
        kind = {Kind.SIZE: "whole pages, ", Kind.COUNT: "a whole number, "}.get(self.kind, "")
        auto = ", or auto" if self.default is None else ""
        return InvalidArgumentError(
            f"{behaviour}: {self.name} must be {kind}{self.accepted}{auto}, not {value!r}"
        )


def _size(value: Any) -> int:
    if isinstance(value, str):
        return 0 if value == "0" else parse_size(value)
    size = as_int(value, "size")
    if size % PAGE_SIZE:
        raise ValueError
    return size


def _count(value: Any) -> int:
    return (
        int(value)
        if isinstance(value, str) and value.isascii() and value.isdigit()
        else as_int(value, "count")
    )


def _share(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    if isinstance(value, str) and value.endswith("%"):
        return float(value[:-1]) / 100
    share = float(value)
    if share != share:
        raise ValueError
    return share


def _switch(value: Any) -> bool:
    return value if isinstance(value, bool) else _SWITCHES[value] if value in _SWITCHES else _no_switch()


def _no_switch() -> bool:
    raise ValueError


_READERS: Final[dict[Kind, Callable[[Any], Any]]] = {
    Kind.SIZE: _size,
    Kind.COUNT: _count,
    Kind.SHARE: _share,
    Kind.SWITCH: _switch,
}
_FORMATS: Final[dict[Kind, Callable[[Any], str]]] = {
    Kind.SIZE: format_size,
    Kind.COUNT: str,
    Kind.SHARE: lambda share: f"{share:g}",
    Kind.SWITCH: lambda on: "yes" if on else "no",
}


def size(name: str, default: str | None, meaning: str, low: str = "4k", high: str | None = None) -> Parameter:
    """Return a parameter in bytes; its figures are written as sizes."""
    limit = None if high is None else _size(high)
    return Parameter(
        name, Kind.SIZE, None if default is None else _size(default), meaning, _size(low), limit, "bytes"
    )


def count(name: str, default: int, meaning: str, unit: str, low: int = 1, high: int = 1 << 32) -> Parameter:
    """Return a parameter that counts something."""
    return Parameter(name, Kind.COUNT, default, meaning, low, high, unit)


def share(name: str, default: float, meaning: str, low: float = 0.0, high: float = 1.0) -> Parameter:
    """Return a parameter that is a part of a whole."""
    return Parameter(name, Kind.SHARE, default, meaning, low, high, "of 1")


def switch(name: str, default: bool, meaning: str) -> Parameter:
    """Return a parameter that is on or off."""
    return Parameter(name, Kind.SWITCH, default, meaning)


def checked(behaviour: str, rows: Sequence[Parameter], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a value for every parameter: those given, checked, and the defaults of the others.

    Raises
    ------
    InvalidArgumentError
        EINVAL: a parameter that doesn't exist, or a value it doesn't take.
    """
    by_name = {row.name: row for row in rows}
    for name in given:
        if name not in by_name:
            raise InvalidArgumentError(f"{behaviour} has no parameter {name!r}; it has {', '.join(by_name)}")
    return {
        name: row.check(_own(given[name]), behaviour) if name in given else row.default
        for name, row in by_name.items()
    }


def _own(value: Any) -> Any:
    """``auto`` is the word for None, where texts are all there is."""
    return None if value == "auto" else value
