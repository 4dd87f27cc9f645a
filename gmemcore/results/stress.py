"""Records of ``gmemcore stress``: one header, one record per guest, one of sums."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import msgspec

from gmemcore.results.fields import SCHEMA, Count, Name, Positive


class StressFirst(msgspec.Struct, frozen=True):
    """First line of a stress run."""

    environment: dict[str, Any]
    code: str
    spec_hash: str
    spec: dict[str, Any]
    kind: str = "stress"
    schema: Count = SCHEMA


class StressGuest(msgspec.Struct, frozen=True):
    """One guest of a stress run."""

    guest: Count
    cell: Name
    operations: Count
    outcomes: dict[Name, Count]
    counters: dict[Name, Count]
    checks: dict[Name, Count]
    sizes: Annotated[list[Count], msgspec.Meta(max_length=64)]
    digest: Name
    seconds: Positive


class StressSums(msgspec.Struct, frozen=True):
    """Sums over guests of a stress run."""

    guests: Count
    operations: Count
    outcomes: dict[Name, Count]
    counters: dict[Name, Count]
    checks: dict[Name, Count]
    sizes: Annotated[list[Count], msgspec.Meta(max_length=64)]
    digest: Name


class Violation(msgspec.Struct, frozen=True):
    """The violation that a stress run ended with."""

    guest: Count
    operation: Count
    what: str


class StressLast(msgspec.Struct, frozen=True):
    """Last record of a stress run."""

    total: StressSums
    cells: dict[Name, StressSums]
    violation: Violation | None


def sums_of(guests: Sequence[StressGuest]) -> StressLast:
    """Return the sums over guests, without a digest: for a run that was cut before it wrote them."""
    cells = dict.fromkeys(guest.cell for guest in guests)
    by_cell = {cell: _sums(guest for guest in guests if guest.cell == cell) for cell in cells}
    return StressLast(_sums(guests), by_cell, None)


def _sums(guests: Iterable[StressGuest]) -> StressSums:
    number = operations = 0
    outcomes, counters, checks, sizes = Counter[str](), Counter[str](), Counter[str](), Counter[int]()
    for guest in guests:
        number, operations = number + 1, operations + guest.operations
        for total, own in ((outcomes, guest.outcomes), (counters, guest.counters), (checks, guest.checks)):
            total.update(own)
        sizes.update(dict(enumerate(guest.sizes)))
    longest = max(sizes, default=-1) + 1
    every = [sizes[place] for place in range(longest)]
    return StressSums(number, operations, dict(outcomes), dict(counters), dict(checks), every, "")
