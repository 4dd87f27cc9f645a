"""Rules: the policy for one VM and launch phase, compiled into an array for kernels."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine import kernels as layout
from gmemcore.engine.byte_operations import BYTE_OPERATIONS
from gmemcore.engine.state import Plane, fields_of
from gmemcore.engine.steps import UNMAPPED, compile_steps, reason_of
from gmemcore.policy import (
    EFFECTS,
    PLATFORMS,
    Abi,
    Cell,
    Operations,
    Rank,
    Tracking,
    byte_operations,
    capability,
    cell,
)
from gmemcore.uapi import Capability, ContentMode, Direction, Firmware, MemoryAttribute, Phase, VmType

# Planes of a page, by its rank.
RANK_PLANES = {
    Rank.UNALLOCATED: Plane.NONE,
    Rank.ALLOCATED: Plane.ALLOCATED,
    Rank.ASSIGNED: Plane.ALLOCATED | Plane.ASSIGNED,
    Rank.ACCEPTED: Plane.ALLOCATED | Plane.ASSIGNED | Plane.ACCEPTED,
}

TRACKING_COLUMNS = {Tracking.RMP: int(layout.RMP_UPDATES), Tracking.SEPT: int(layout.SEPT_CHANGES)}
"""The row of a result that counts assignment, by platform."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The policy of one VM in one launch phase.

    Attributes
    ----------
    abi, vm_type, phase
        The revision, VM type and phase it was compiled for.
    table : ndarray of uint64
        The compiled form, see ``kernels.py``.
    """

    abi: Abi
    vm_type: VmType
    phase: Phase
    table: NDArray[np.uint64]

    @property
    def has_ioctl(self) -> bool:
        """Whether the guest_memfd has the ioctl for conversion in place."""
        return bool(self.table[layout.HAS_IOCTL])

    @property
    def known_attributes(self) -> int:
        """Attribute bits that can be set."""
        return int(self.table[layout.KNOWN_ATTRIBUTES])


@cache
def compile_rules(abi: Abi, vm_type: VmType, firmware: Firmware, phase: Phase) -> Rules:
    """Compile the policy of one VM and phase: what each direction and flag does, and each step."""
    table = np.zeros(int(layout.STEPS), np.uint64)
    # If the plain conversion to shared is invalid, the VM has no attributes under this abi.
    takes_any = cell(abi, vm_type, firmware, phase, Direction.TO_SHARED, ContentMode.NONE).outcome == "OK"
    takes_private = (
        cell(abi, vm_type, firmware, phase, Direction.TO_PRIVATE, ContentMode.NONE).outcome == "OK"
    )
    platform = PLATFORMS[vm_type]
    populate = platform.populate
    table[layout.KNOWN_FLAGS] = int(abi.known_flags)
    table[layout.KNOWN_ATTRIBUTES] = int(MemoryAttribute.PRIVATE) if takes_private else 0
    table[layout.HAS_PRIVATE_MEMORY] = takes_any
    table[layout.ERROR_OFFSET_CHECKED] = abi.error_offset_must_be_zero
    table[layout.HAS_IOCTL] = not abi.legacy
    table[layout.FRAME_ATTRIBUTES] = capability(abi, Capability.MEMORY_ATTRIBUTES, vm_type, firmware)
    table[layout.GUEST_HAS_KEY] = platform.coco
    table[layout.UNMAP_CLEARS] = fields_of(UNMAPPED) if platform.unmapping_removes else 0
    table[layout.UNMAP_OPERATIONS] = pack_operations(platform.to_shared)
    table[layout.ROLLS_BACK] = abi.huge_pages is not None and abi.huge_pages.rolls_back
    table[layout.FINISH_AGAIN] = reason_of(platform.finish_again)
    table[layout.FINISH_AGAIN_WITHOUT_VCPUS] = reason_of(platform.finish_again_without_vcpus)
    if populate is not None:
        table[layout.ENDS_WITH_SLOT] = populate.one_memslot
        table[layout.POPULATE_CLOSED] = reason_of(populate.page_refusal or "EFAULT")
    cells = table[int(layout.CELLS) :].reshape(2, int(layout.FLAG_SLOTS), int(layout.CELL_WORDS))
    for to_private, direction in enumerate((Direction.TO_SHARED, Direction.TO_PRIVATE)):
        for flag in (ContentMode.NONE, *(row.bit for row in abi.flags)):
            cells[to_private, int(flag).bit_length()] = _compile_cell(
                abi, vm_type, firmware, phase, direction, flag
            )
    return Rules(abi, vm_type, phase, np.concatenate([table, compile_steps(abi, vm_type, phase)]))


def _compile_cell(
    abi: Abi, vm_type: VmType, firmware: Firmware, phase: Phase, direction: Direction, flag: ContentMode
) -> list[int]:
    """Return the words of one cell: refusal, precondition, operations, fields to set and clear, PLAIN."""
    answer = cell(abi, vm_type, firmware, phase, direction, flag)
    if answer.effect is None:
        return [int(layout.MODE_UNSUPPORTED), 0, 0, 0, 0, 0]
    unless = Plane.ASSIGNED if answer.unless == "assigned" else Plane.NONE
    operations = pack_operations(byte_operations(answer.effect, vm_type, direction))
    set_, clear = plane_changes(answer, direction)
    plain = not (unless or operations)
    return [0, fields_of(unless), operations, fields_of(set_), fields_of(clear), plain]


def plane_changes(answer: Cell, direction: Direction) -> tuple[Plane, Plane]:
    """Return the planes that an accepted conversion sets on each page, and those it clears."""
    if answer.effect is None:
        return Plane.NONE, Plane.NONE
    if direction == Direction.TO_PRIVATE:
        raises_to = EFFECTS[answer.effect].raises_to
        return Plane.PRIVATE | RANK_PLANES[raises_to or Rank.UNALLOCATED], Plane.NONE
    return Plane.NONE, Plane.PRIVATE | Plane.ASSIGNED | Plane.ACCEPTED


def pack_operations(operations: Operations) -> int:
    """Pack byte operations by rank, four bits each."""
    packed = 0
    for rank, operation in enumerate(operations):
        packed |= BYTE_OPERATIONS[operation].number << rank * int(layout.OPERATION_BITS)
    return packed


def tracking_column(vm_type: VmType) -> int:
    """Return the row of a result that counts assignment on a VM type (any, if it has none)."""
    tracking = PLATFORMS[vm_type].tracking
    return int(layout.RMP_UPDATES) if tracking is None else TRACKING_COLUMNS[tracking]
