"""Results of guests, and their sum, which doesn't depend on who made them, in which order or how often."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import msgspec

_MODULUS: Final = 1 << 256


class GuestResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one guest did.

    Attributes
    ----------
    guest : int
        Its number in the fleet.
    cell : str
        What it is and does.
    operations : int
        Operations that were run, faults and retries among them.
    outcomes : dict of str to int
        Operations by outcome: ``OK``, an errno's name, or an exit.
    counters : dict of str to int
        Exact events.
    checks : dict of str to int
        Operations that the oracle repeated, invariants checked, faults injected.
    sizes : list of int
        Conversions by size: place i counts those of 2^i to 2^(i+1) - 1 pages.
    digest : str
        SHA-256 of all of the above, of each operation's outcome and of the final page state and contents.
    seconds : float
        How long it took here: the only field that isn't the same everywhere.
    """

    guest: int
    cell: str
    operations: int
    outcomes: dict[str, int]
    counters: dict[str, int]
    checks: dict[str, int]
    sizes: list[int]
    digest: str
    seconds: float


class NotDeterministicError(RuntimeError):
    """A guest was run twice and did not do the same."""


class Totals:
    """Sums over some guests.

    Attributes
    ----------
    guests, operations : int
    seconds : float
        Of all workers together.
    outcomes, counters, checks : Counter
    sizes : list of int
    """

    def __init__(self) -> None:
        self.guests = self.operations = 0
        self.seconds = 0.0
        self.outcomes: Counter[str] = Counter()
        self.counters: Counter[str] = Counter()
        self.checks: Counter[str] = Counter()
        self.sizes: list[int] = []
        self._digest = 0

    def add(self, result: GuestResult) -> None:
        """Add a guest's result; sums alone, so that no order matters."""
        self.guests += 1
        self.operations += result.operations
        self.seconds += result.seconds
        for mine, its in (
            (self.outcomes, result.outcomes),
            (self.counters, result.counters),
            (self.checks, result.checks),
        ):
            mine.update(its)
        self.sizes += [0] * (len(result.sizes) - len(self.sizes))
        for i, count in enumerate(result.sizes):
            self.sizes[i] += count
        self._digest = (self._digest + int(result.digest, 16)) % _MODULUS

    @property
    def conversions(self) -> int:
        """Conversion requests, of all sizes."""
        return sum(self.sizes)

    @property
    def digest(self) -> str:
        """Sum of the guests' digests: equal for equal guests, in whatever order they came."""
        return f"{self._digest:064x}"

    def asdict(self) -> dict[str, Any]:
        """The sums by name, keys in order."""
        return {
            "guests": self.guests,
            "operations": self.operations,
            "outcomes": _sorted(self.outcomes),
            "counters": _sorted(self.counters),
            "checks": _sorted(self.checks),
            "sizes": self.sizes,
            "digest": self.digest,
        }


class Merger:
    """Results of a fleet as they come, each guest once.

    Parameters
    ----------
    total : int
        Guests of the fleet.

    Attributes
    ----------
    results : dict of int to GuestResult
        By guest.
    all : Totals
        Of all that came.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.results: dict[int, GuestResult] = {}
        self.all = Totals()

    def add(self, result: GuestResult) -> bool:
        """Add a result; whether it is new. A task may run twice, and then both results are the same one.

        Raises
        ------
        NotDeterministicError
            They aren't.
        """
        before = self.results.get(result.guest)
        if before is not None:
            if before.digest != result.digest:
                raise NotDeterministicError(
                    f"guest {result.guest} was run twice, with digests {before.digest} and {result.digest}"
                )
            return False
        self.results[result.guest] = result
        self.all.add(result)
        return True

    @property
    def complete(self) -> bool:
        """Whether every guest's result is there."""
        return len(self.results) == self.total

    def pending(self) -> list[int]:
        """Guests whose results aren't there, in order."""
        return [number for number in range(self.total) if number not in self.results]

    def by_cell(self) -> dict[str, Totals]:
        """Sums by what guests are and do, in order of the first guest of each."""
        cells: dict[str, Totals] = {}
        for number in sorted(self.results):
            result = self.results[number]
            cells.setdefault(result.cell, Totals()).add(result)
        return cells


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: counts[name] for name in sorted(counts)}
