"""Results of guests and their sums, which don't depend on order, repetition or who made them."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import msgspec

_MODULUS: Final = 1 << 256


class GuestResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Result of one guest.

    Attributes
    ----------
    guest : int
        Number of the guest in the fleet.
    cell : str
        Its kind: behaviour, VM type, abi, firmware.
    operations : int
        Operations that were run, including faults and retries.
    outcomes : dict of str to int
        Operations by outcome: ``OK``, an errno's name, or an exit.
    counters : dict of str to int
        Counters of the guest.
    checks : dict of str to int
        Operations compared with the oracle, checks of invariants, faults due and injected.
    sizes : list of int
        Conversions by size: entry i counts those of 2^i to 2^(i+1) - 1 pages.
    digest : str
        SHA-256 of everything above, of every operation's outcome, and of the final page state and contents.
    seconds : float
        Time it took; the only field that differs from run to run.
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
    """A guest that was run twice gave different results."""


class Totals:
    """Sums over some guests.

    Attributes
    ----------
    guests, operations : int
    seconds : float
        Time of all workers together.
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
        """Add a guest's result. Only sums are kept, so order doesn't matter."""
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
        """Number of conversion requests."""
        return sum(self.sizes)

    @property
    def digest(self) -> str:
        """Sum of the guests' digests modulo 2^256, which doesn't depend on order."""
        return f"{self._digest:064x}"

    def asdict(self) -> dict[str, Any]:
        """Return the sums by name, with keys in order."""
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
    """Collects results of a fleet, each guest once.

    Parameters
    ----------
    total : int
        Guests of the fleet.

    Attributes
    ----------
    results : dict of int to GuestResult
        By guest.
    all : Totals
        Sums of all results.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.results: dict[int, GuestResult] = {}
        self.all = Totals()

    def add(self, result: GuestResult) -> bool:
        """Add a result and return whether it is new: a chunk can be run twice.

        Raises
        ------
        NotDeterministicError
            The guest's earlier result has another digest.
        """
        before = self.results.get(result.guest)
        if before is not None:
            if before.digest != result.digest:
                raise NotDeterministicError(
                    f"guest {result.guest} gave two results, with digests {before.digest} and {result.digest}"
                )
            return False
        self.results[result.guest] = result
        self.all.add(result)
        return True

    @property
    def complete(self) -> bool:
        """Whether every guest has a result."""
        return len(self.results) == self.total

    def pending(self) -> list[int]:
        """Return the guests without a result, in order."""
        return [number for number in range(self.total) if number not in self.results]

    def by_cell(self) -> dict[str, Totals]:
        """Return sums by kind of guest, in the order of each kind's first guest."""
        cells: dict[str, Totals] = {}
        for number in sorted(self.results):
            result = self.results[number]
            cells.setdefault(result.cell, Totals()).add(result)
        return cells


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: counts[name] for name in sorted(counts)}
