"""Memslots: which file, at which offset, backs a guest physical address."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.arguments import U64_MAX, check_aligned
from gmemcore.engine.headers import new_words
from gmemcore.engine.owner import NO_SLOTS, Slots
from gmemcore.engine.store import Store
from gmemcore.errors import AlreadyExistsError, GmemError, InvalidArgumentError
from gmemcore.uapi import PAGE_SIZE

if TYPE_CHECKING:
    from gmemcore.machine.guest_memfd import GuestMemfd

MAX_MEMSLOTS: Final = 32764
"""Number of memslot ids (KVM_USER_MEM_SLOTS)."""
MAX_MEMSLOT_PAGES: Final = (1 << 31) - 1
"""Most pages of a memslot (KVM_MEM_MAX_NR_PAGES)."""

_PIECE: Final = 4 << 40  # the largest power of two that fits in a memslot


@dataclass(frozen=True, slots=True)
class Memslot:
    """One binding of a gpa range to a range of a file, in bytes."""

    slot: int
    gpa: int
    size: int
    gmem: "GuestMemfd"
    gmem_offset: int
    _deleted: tuple[NDArray[np.uint64], int] = field(
        default_factory=partial(new_words, 1), init=False, repr=False, compare=False
    )

    @property
    def is_deleted(self) -> bool:
        """Whether it was deleted."""
        return bool(self._deleted[0][0])

    @property
    def unmapped(self) -> tuple[Store, int, int, int]:
        """The range of its private side that deleting it unmaps, and the address of the deleted flag."""
        return self.gmem.sides.private, self.gmem_offset, self.gmem_offset + self.size, self._deleted[1]

    @property
    def row(self) -> tuple[int, ...]:
        """The memslot as kernels read it."""
        private, shared = self.gmem.sides
        return self.gpa, self.size, private.address, shared.address, self.gmem_offset, self._deleted[1]


def memslot_pieces(size: int) -> Iterator[tuple[int, int]]:
    """Split RAM into pieces that fit in memslots, as a VMM does: (offset, size) of each, in bytes."""
    for offset in range(0, size, _PIECE):
        yield offset, min(_PIECE, size - offset)


@dataclass(frozen=True, slots=True)
class Memslots:
    """The memslots of one Vm, immutable.

    Attributes
    ----------
    by_gpa : tuple of Memslot
        In the order of their addresses; they never overlap.
    slots : Slots
        The same for kernels.
    """

    by_gpa: tuple[Memslot, ...] = ()
    slots: Slots = NO_SLOTS

    def __iter__(self) -> Iterator[Memslot]:
        return iter(self.by_gpa)

    def __len__(self) -> int:
        return len(self.by_gpa)

    def check_region(self, slot: int, gpa: int, size: int, gmem_offset: int) -> None:
        """Check a new memslot as KVM does before it looks at the file.

        Raises
        ------
        InvalidArgumentError
            EINVAL: an empty, unaligned or wrapping range; too many pages; an invalid or existing id.
        AlreadyExistsError
            EEXIST: it overlaps a memslot in gpa.

        References
        ----------
        kvm_vm_ioctl_set_memory_region, kvm_set_memory_region.
        """
        check_aligned(gpa, size, "memslot gpa range", most=U64_MAX)
        check_aligned(gmem_offset, size, "memslot file range", most=U64_MAX)
        if not 0 <= slot < MAX_MEMSLOTS:
            raise InvalidArgumentError(f"memslot id must be 0 to {MAX_MEMSLOTS - 1}, not {slot}")
        if size // PAGE_SIZE > MAX_MEMSLOT_PAGES:
            raise InvalidArgumentError(
                f"a memslot must be at most {MAX_MEMSLOT_PAGES:#x} pages, not {size // PAGE_SIZE:#x}"
            )
        for other in self.by_gpa:
            if other.slot == slot:
                raise InvalidArgumentError(f"memslot {slot} exists; delete it first")
        for other in self.by_gpa:
            if _overlap(other.gpa, gpa, other.size, size):
                raise AlreadyExistsError(
                    f"memslot gpa range {gpa:#x}+{size:#x} overlaps memslot {other.slot} "
                    f"at {other.gpa:#x}+{other.size:#x}"
                )

    def bound(self, new: Memslot, overlap: type[GmemError] = AlreadyExistsError) -> "Memslots":
        """Add a memslot whose region was checked.

        Parameters
        ----------
        new : Memslot
            The memslot.
        overlap : type of GmemError
            The exception if a range of the file is already in a memslot: EINVAL up to Linux 6.18.

        Returns
        -------
        Memslots
            All memslots.

        Raises
        ------
        InvalidArgumentError
            EINVAL: the range ends beyond the file.
        GmemError
            `overlap`: it overlaps the range of the same file in another memslot.

        References
        ----------
        kvm_gmem_bind.
        """
        if new.gmem_offset + new.size > new.gmem.size:
            raise InvalidArgumentError(
                f"memslot file range {new.gmem_offset:#x}+{new.size:#x} "
                f"must end at {new.gmem.size:#x} or before"
            )
        for slot in self.by_gpa:
            if slot.gmem is new.gmem and _overlap(slot.gmem_offset, new.gmem_offset, slot.size, new.size):
                raise overlap(
                    f"memslot file range {new.gmem_offset:#x}+{new.size:#x} is bound by memslot {slot.slot}"
                )
        at = bisect_left(self.by_gpa, new.gpa, key=lambda slot: slot.gpa)
        row, rows = np.array([new.row], np.uint64), self.slots.rows
        rows = np.concatenate([rows[:at], row, rows[at:]])  # a tenth of the time of np.insert
        by_gpa = (*self.by_gpa[:at], new, *self.by_gpa[at:])
        return Memslots(by_gpa, Slots(rows, self.slots.n_bytes + _bytes_of(new), by_gpa))

    def named(self, slot_id: int) -> Memslot:
        """Return the memslot with an id.

        Raises
        ------
        InvalidArgumentError
            EINVAL: no memslot has it.
        """
        for slot in self.by_gpa:
            if slot.slot == slot_id:
                return slot
        known = ", ".join(str(slot.slot) for slot in self.by_gpa) or "none"
        raise InvalidArgumentError(f"there is no memslot {slot_id}; existing: {known}")

    def existing(self) -> "Memslots":
        """Return the memslots that aren't deleted."""
        deleted = [at for at, slot in enumerate(self.by_gpa) if slot.is_deleted]
        if not deleted:
            return self
        left = tuple(slot for slot in self.by_gpa if not slot.is_deleted)
        rows = np.delete(self.slots.rows, deleted, axis=0)
        return Memslots(left, Slots(rows, sum(map(_bytes_of, left)), left))


def _bytes_of(slot: Memslot) -> int:
    return slot.size if slot.gmem.has_bytes else 0


def _overlap(start: int, other: int, size: int, other_size: int) -> bool:
    return start < other + other_size and other < start + size
