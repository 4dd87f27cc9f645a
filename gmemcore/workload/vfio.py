"""How many DMA mappings an assigned device needs for the memory that a guest shares.

VFIO maps what is shared. QEMU maps it page by page, because each page may be unmapped alone; at best a run of
pages is one mapping. A container of VFIO's type 1 has `DMA_LIMIT` of them, by default.

References
----------
Linux, ``drivers/vfio/vfio_iommu_type1.c`` (``dma_entry_limit``); QEMU, ``hw/vfio/listener.c``
(``vfio_ram_discard_notify_populate``), ``system/ram-block-attributes.c`` (its granularity is a page).
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from gmemcore.machine import LegacyVm, VmFace
from gmemcore.uapi import PAGE_SHIFT, Capability

DMA_LIMIT: Final = 65_535
"""Mappings of a VFIO container (``dma_entry_limit``)."""


class Mappings(NamedTuple):
    """Mappings of what a guest shares.

    Attributes
    ----------
    pages : int
        Shared pages: QEMU maps each by itself.
    runs : int
        Maximal runs of them: mappings at best.
    """

    pages: int = 0
    runs: int = 0

    @property
    def reach_limit(self) -> bool:
        """Whether QEMU needs all mappings of a container, or more."""
        return self.pages >= DMA_LIMIT

    def __str__(self) -> str:
        return (
            f"VFIO: {self.pages:,} shared pages, each a DMA mapping in QEMU ({self.runs:,} if runs were); "
            f"a container has {DMA_LIMIT:,}"
        )


def mappings(vm: VmFace) -> Mappings:
    """Return the mappings of what a guest shares now; none of a VM without private memory."""
    by_file = vm.check_cap(Capability.GUEST_MEMFD_MEMORY_ATTRIBUTES)
    if not (by_file or vm.check_cap(Capability.MEMORY_ATTRIBUTES)):
        return Mappings()
    if not by_file:
        return _by_frames(vm, sorted((slot.gpa, slot.gpa + slot.size) for slot in vm.memslots))
    pages = runs = 0
    for gmem in vm.files:
        pages += gmem.n_pages - gmem.count("private")
        ends = len(gmem.run_ends("private"))
        first_is_private = gmem.find_page(wanted=("private",)) == 0
        runs += ends // 2 if first_is_private else (ends + 1) // 2
    return Mappings(pages, runs)


def _by_frames(vm: VmFace, ranges: Sequence[tuple[int, int]]) -> Mappings:
    """Count by frame, as `legacy` keeps attributes."""
    assert isinstance(vm, LegacyVm)
    private = vm.private_frames()
    pages = runs = place = 0
    for start, stop in ranges:
        at, end = start >> PAGE_SHIFT, stop >> PAGE_SHIFT
        while place < len(private) and private[place][1] <= at:
            place += 1
        i = place
        while at < end:
            low, high = private[i] if i < len(private) else (end, end)
            if at < low:
                pages += min(low, end) - at
                runs += 1
            at, i = max(high, at), i + 1
    return Mappings(pages, runs)
