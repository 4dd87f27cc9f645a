"""Counters: exact numbers of events (docs/spec.md, Counters)."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import add, attrgetter, sub
from typing import Any

from gmemcore.html import facts, table


@dataclass(frozen=True, slots=True)
class Counters:
    """Numbers of events.

    Attributes
    ----------
    pages_changed : int
        Pages whose attribute changed.
    bytes_zeroed, bytes_xored, bytes_scrambled : int
        Bytes that conversions (and, for XOR, launch updates) wrote.
    pages_allocated : int
        Pages allocated.
    rmp_updates, sept_changes : int
        Pages assigned or removed, in SNP's RMP and in TDX's S-EPT.
    cache_lines_flushed : int
        Cache lines of the pages that were removed.
    pages_accepted : int
        Pages that became accepted.
    blocks_2m_split, blocks_2m_merged : int
        2 MiB-aligned blocks that became mixed, and that became uniform, in their attribute.
    folios_2m_split, folios_2m_merged, folios_1g_split, folios_1g_merged : int
        Folios of huge pages split into pages, and merged again.
    pages_restructured : int
        Pages of those folios.
    vmemmap_pages_allocated, vmemmap_pages_freed : int
        Pages of struct pages that splits allocated and merges freed (HVO).
    tlb_flushes : int
        TLB flushes because of huge pages.
    psmashes, sept_demotions : int
        Entries of 2 MiB split in SNP's RMP and in TDX's S-EPT.
    memory_faults : int
        KVM_EXIT_MEMORY_FAULT exits.
    notifications : int
        Listener callbacks of the VMM.
    """

    pages_changed: int = 0
    bytes_zeroed: int = 0
    bytes_xored: int = 0
    bytes_scrambled: int = 0
    pages_allocated: int = 0
    rmp_updates: int = 0
    sept_changes: int = 0
    cache_lines_flushed: int = 0
    pages_accepted: int = 0
    blocks_2m_split: int = 0
    blocks_2m_merged: int = 0
    folios_2m_split: int = 0
    folios_2m_merged: int = 0
    folios_1g_split: int = 0
    folios_1g_merged: int = 0
    pages_restructured: int = 0
    vmemmap_pages_allocated: int = 0
    vmemmap_pages_freed: int = 0
    tlb_flushes: int = 0
    psmashes: int = 0
    sept_demotions: int = 0
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
        """Return the counts, in the order of `COUNTER_NAMES`."""
        return _values(self)

    def asdict(self) -> dict[str, int]:
        """Return the counts by name."""
        return dict(zip(COUNTER_NAMES, self.values(), strict=True))


COUNTER_NAMES = tuple(field.name for field in fields(Counters))
"""Names of the counters, in order."""

_values: Callable[[Any], tuple[int, ...]] = attrgetter(*COUNTER_NAMES)

ENGINE_COUNTERS = COUNTER_NAMES[:-2]
"""Counters of kernels, in the order of a result; the rest are counted by the machine and the VMM."""
