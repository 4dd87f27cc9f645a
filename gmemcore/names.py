"""Names: what people type for a member or a number of the interface, read in one place.

A member of an enumeration, its name in any case and its number (where the interface has one) mean the same in
every call: ``VmType.SNP``, ``"snp"`` and ``4``; ``MemoryAttribute.PRIVATE``, ``"private"`` and ``8``. The
words of a name are separated by a space, ``-`` or ``_``, which mean the same.
"""

from collections.abc import Iterable, Mapping
from enum import IntFlag, StrEnum
from functools import cache
from numbers import Integral, Real
from typing import Any, Final, TypeVar

from gmemcore.errors import InvalidArgumentError
from gmemcore.uapi import (
    NUMBERS,
    ContentMode,
    ContentWork,
    Direction,
    FallocateMode,
    Firmware,
    GuestMemfdFlag,
    MemoryAttribute,
    PageType,
    Phase,
    VmType,
)

_Member = TypeVar("_Member", bound=StrEnum)

CALLED: Final[dict[type[Any], str]] = {
    VmType: "VM type",
    Firmware: "firmware",
    ContentWork: "kind of contents",
    Phase: "phase",
    Direction: "direction",
    PageType: "page type",
    MemoryAttribute: "attribute",
    ContentMode: "content mode",
    GuestMemfdFlag: "guest_memfd flag",
    FallocateMode: "fallocate mode",
}
"""What messages call an enumeration."""

_OTHER_NAMES: Final[dict[type[StrEnum], Mapping[str, StrEnum]]] = {
    Direction: {"PRIVATE": Direction.TO_PRIVATE, "SHARED": Direction.TO_SHARED}
}
_ZEROS: Final[dict[type[IntFlag], tuple[str, ...]]] = {
    MemoryAttribute: ("SHARED",),
    ContentMode: ("NONE", "UNSPECIFIED"),
    GuestMemfdFlag: ("NONE",),
}
"""Names of no bit at all."""


def plain(name: str) -> str:
    """Return a name as it is looked up: upper case, words joined by ``_``."""
    return "_".join(name.replace("-", " ").replace("_", " ").upper().split())


def member(kind: type[_Member], value: Any) -> _Member:
    """Return the member of an enumeration that a name, a number or a member stands for.

    Raises
    ------
    TypeError
        Neither a name nor one of the interface's numbers.
    InvalidArgumentError
        EINVAL: a name that doesn't exist; the message has those that do.
    """
    if isinstance(value, kind):
        return value
    what = CALLED.get(kind, kind.__name__.lower())
    if isinstance(value, str):
        if plain(value) not in _members(kind):
            raise InvalidArgumentError(f"unknown {what} {value!r}; known: {', '.join(kind)}")
        named: _Member = _members(kind)[plain(value)]
        return named
    numbers: Mapping[int, Any] = NUMBERS.get(kind, {})
    if is_number(value) and int(value) in numbers:
        numbered: _Member = numbers[int(value)]
        return numbered
    known = "".join(f", {number} ({name})" for number, name in numbers.items())
    raise TypeError(
        f"{what} must be a name{known}, not {value if is_number(value) else type(value).__name__}"
    )


@cache
def _members(kind: type[StrEnum]) -> dict[str, Any]:
    others: Mapping[str, Any] = _OTHER_NAMES.get(kind, {})
    return (
        {plain(each.value): each for each in kind} | {plain(each.name): each for each in kind} | dict(others)
    )


def bits(kind: type[IntFlag], text: str, more: Iterable[tuple[str, int]] = ()) -> int:
    """Return the bits that names stand for, as in ``"mmap|init_shared"``.

    Parameters
    ----------
    kind : type
        The enumeration of the bits.
    text : str
        Names, joined by ``|`` or ``,``.
    more : iterable of (str, int)
        Further names and their bits.

    Raises
    ------
    TypeError
        A number between quotes.
    InvalidArgumentError
        EINVAL: a name that doesn't exist; the message has those that do.
    """
    named = dict.fromkeys(_ZEROS.get(kind, ()), 0) | {str(each.name): int(each) for each in kind if each.name}
    named |= {plain(name): int(bit) for name, bit in more}
    found = 0
    for name in text.replace(",", "|").split("|"):
        if name.strip().isdecimal():
            raise TypeError(f"{CALLED[kind]} must be an integer or a name, not {name!r} in quotes")
        if plain(name) not in named:
            raise InvalidArgumentError(f"unknown {CALLED[kind]} {name!r}; known: {', '.join(named)}")
        found |= named[plain(name)]
    return found


def chosen(kind: type[_Member], value: Any) -> tuple[_Member, ...]:
    """Return the members that one value, a sequence of them or a comma-separated text stands for.

    ``None`` and ``"all"`` stand for every member.

    Raises
    ------
    TypeError, InvalidArgumentError
        As `member`.
    """
    if value is None or (isinstance(value, str) and plain(value) == "ALL"):
        return tuple(kind)
    values = value.split(",") if isinstance(value, str) and not isinstance(value, kind) else value
    if isinstance(value, kind) or not isinstance(values, Iterable):
        values = [value]
    return tuple(dict.fromkeys(member(kind, each) for each in values))


def is_number(value: Any) -> bool:
    """Whether a value is an integer, Python's or NumPy's, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Whether a value is a real number, Python's or NumPy's, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)
