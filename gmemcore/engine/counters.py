"""Counters: exact events, in one frozen record (docs/spec.md, Counters)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from operator import add, attrgetter, sub
from typing import Any

from gmemcore.html import facts, table


@dataclass(frozen=True, slots=True)
class Counters:
    """What happened, by event.

    Attributes
    ----------
    pages_changed : int
        Pages whose attribute changed.
    bytes_zeroed, bytes_xored, bytes_scrambled : int
        Bytes that conversions (and, for XOR, populate) wrote.
    pages_allocated : int
        Pages that came into being.
    rmp_updates, sept_changes : int
        Pages that became assigned or ceased to be, in SNP's RMP and in TDX's S-EPT.
    pages_accepted : int
        Pages that became accepted.
    blocks_2m_split, blocks_2m_merged : int
        2 MiB-aligned blocks that ceased and that began to have one attribute.
    memory_faults : int
        KVM_EXIT_MEMORY_FAULT exits.
    notifications : int
        Listener call-backs of the userspace side.
    """

    pages_changed: int = 0
    bytes_zeroed: int = 0
    bytes_xored: int = 0
    bytes_scrambled: int = 0
    pages_allocated: int = 0
    rmp_updates: int = 0
    sept_changes: int = 0
    pages_accepted: int = 0
    blocks_2m_split: int = 0
    blocks_2m_merged: int = 0
    memory_faults: int = 0
    notifications: int = 0

    def __add__(self, other: "Counters") -> "Counters":
        return Counters(*map(add, self.values(), other.values()))

    def __sub__(self, other: "Counters") -> "Counters":
        return Counters(*map(sub, self.values(), other.values()))

    def _repr_html_(self) -> str:
        counted = [(name, figure) for name, figure in self.asdict().items() if figure]
        return table("counters", ("event", "count"), counted) if counted else facts("counters: none", {})

    def values(self) -> tuple[int, ...]:
        """The figures, in the order of `COUNTER_NAMES`."""
        return _values(self)

    def asdict(self) -> dict[str, int]:
        """The figures by name."""
        return dict(zip(COUNTER_NAMES, self.values(), strict=True))


COUNTER_NAMES = tuple(field.name for field in fields(Counters))
"""Names of the counters, in their order everywhere."""

_values: Callable[[Any], tuple[int, ...]] = attrgetter(*COUNTER_NAMES)

ENGINE_COUNTERS = COUNTER_NAMES[:10]
"""Those that kernels count, in the order of a result row; the others are the machine's and the VMM's."""


def counters_of_row(row: Sequence[int]) -> Counters:
    """Counters of a kernel's result row (reason, error_offset, then the counters)."""
    return Counters(*row[2:])
