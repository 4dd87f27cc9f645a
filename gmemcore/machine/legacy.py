"""LegacyVm: two backings. Upstream since 6.8, and the baseline of every cost in place.

Shared memory is ordinary host memory, private memory the guest_memfd; a memslot addresses both. Attributes
belong to the Vm, by guest frame, and start shared. Setting them flips which side the guest sees and nothing
else: each side keeps its bytes, and discarding the other one is the VMM's step (docs/spec.md, Two backings).
"""

from bisect import bisect_left, bisect_right
from typing import Any

from gmemcore.engine.counters import Counters
from gmemcore.engine.store import Store
from gmemcore.errors import InvalidArgumentError
from gmemcore.machine.access import Segment
from gmemcore.machine.vm import VmFace
from gmemcore.policy import Abi
from gmemcore.uapi import PAGE_SHIFT, GuestMemfdFlag, VmType

_BLOCK_FRAMES = 512  # 2 MiB


class LegacyVm(VmFace):
    """One guest with two backings; the same public face as `Vm`."""

    def __init__(
        self, vm_type: VmType | str | int, abi: str | Abi = "legacy", *args: Any, **options: Any
    ) -> None:
        super().__init__(vm_type, abi, *args, **options)
        if not self.abi.legacy:
            raise InvalidArgumentError(
                f"abi {self.abi.name} converts in place; Vm (or create_vm) makes those"
            )
        self._attributes = PrivateFrames()
        self._attribute_counters = Counters()

    @property
    def counters(self) -> Counters:
        """Events of this Vm since its creation, of both sides."""
        with self.lock:
            return super().counters + self._attribute_counters

    def private_frames(self) -> list[tuple[int, int]]:
        """Runs of private guest frames, half-open."""
        with self.lock:
            return self._attributes.runs(0, 1 << 64 - PAGE_SHIFT)

    def _new_stores(self, size: int, flags: GuestMemfdFlag) -> tuple[Store, Store]:
        """Return both sides of a file, or one store twice where the file is the only backing.

        References
        ----------
        kvm_memslot_is_gmem_only.
        """
        alone = self.abi.mapped_alone and bool(flags & GuestMemfdFlag.MMAP)
        store = self._new_store(size, private=not flags & GuestMemfdFlag.INIT_SHARED, host_maps=alone)
        if alone:
            return store, store
        return store, self._new_store(size, private=False, host_maps=True)

    def _resolve(self, gpa: int, size: int, *, private_side: bool = False) -> list[Segment]:
        segments = []
        for start, end, slot in self._memslots.walk(gpa, size):
            for low, high, private in self._by_attribute(start, end):
                if slot is None or slot.gmem.closed:
                    segments.append(Segment(low, high - low, None, 0, private, closed=slot is not None))
                    continue
                store = slot.gmem._store if private or private_side else slot.gmem._host
                offset = low - slot.gpa + slot.gmem_offset
                segments.append(Segment(low, high - low, store, offset, private))
        return segments

    def _by_attribute(self, start: int, end: int) -> list[tuple[int, int, bool]]:
        """Tile a byte range of guest memory into pieces of one attribute."""
        pieces, at = [], start
        for low_frame, high_frame in self._attributes.runs(start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT)):
            low, high = max(low_frame << PAGE_SHIFT, start), min(high_frame << PAGE_SHIFT, end)
            if at < low:
                pieces.append((at, low, False))
            pieces.append((low, high, True))
            at = high
        if at < end:
            pieces.append((at, end, False))
        return pieces

    def _set_vm_attributes(self, address: int, size: int, private: bool) -> Counters:
        with self.lock:
            counters = self._attributes.set(address >> PAGE_SHIFT, (address + size) >> PAGE_SHIFT, private)
            self._attribute_counters += counters
            return counters


class PrivateFrames:
    """The set of private guest frames, as sorted edges: private from each even edge to the next odd one."""

    def __init__(self) -> None:
        self._edges: list[int] = []

    def runs(self, start: int, end: int) -> list[tuple[int, int]]:
        """Private runs within [start, end), clipped."""
        first = bisect_right(self._edges, start)
        first -= first % 2
        last = bisect_left(self._edges, end)
        edges = self._edges[first : last + last % 2]
        return [(max(low, start), min(high, end)) for low, high in zip(edges[::2], edges[1::2], strict=True)]

    def set(self, start: int, end: int, private: bool) -> Counters:
        """Make [start, end) private or shared, and count."""
        had = sum(high - low for low, high in self.runs(start, end))
        first, last = bisect_left(self._edges, start), bisect_right(self._edges, end)
        blocks = {edge // _BLOCK_FRAMES for edge in (start, end - 1, *self._edges[first:last])}
        mixed_before = {block for block in blocks if self._mixed(block)}
        # An edge stays at each end where what lies outside differs from what is set.
        opens, closes = first % 2 == 0, last % 2 == 0
        new = [start] * (opens == private) + [end] * (closes == private)
        self._edges[first:last] = new
        mixed_after = {block for block in blocks if self._mixed(block)}
        return Counters(
            pages_changed=(end - start - had) if private else had,
            blocks_2m_split=len(mixed_after - mixed_before),
            blocks_2m_merged=len(mixed_before - mixed_after),
        )

    def _mixed(self, block: int) -> bool:
        first = bisect_right(self._edges, block * _BLOCK_FRAMES)
        return first < len(self._edges) and self._edges[first] < (block + 1) * _BLOCK_FRAMES
