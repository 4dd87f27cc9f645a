"""Conversion: KVM_SET_MEMORY_ATTRIBUTES2 on one file, from policy to result.

`compile_rules` turns what policy says for one VM and phase into the small array that the kernel reads;
`Store.convert` (store.py) takes the file's lock and runs the kernel over the requests; `check` raises what
the first refused request of a call deserves.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine import kernels as layout
from gmemcore.engine.counters import ENGINE_COUNTERS, Counters, counters_of_row
from gmemcore.engine.state import Plane
from gmemcore.errors import (
    ERRNO_NAMES,
    GmemError,
    InvalidArgumentError,
    OutOfMemoryError,
    PagePinnedError,
    UnsupportedContentModeError,
)
from gmemcore.html import table
from gmemcore.policy import (
    EFFECTS,
    PLATFORMS,
    Abi,
    ByteOperation,
    Operations,
    Rank,
    Tracking,
    byte_operations,
    cell,
    flag_name,
)
from gmemcore.uapi import ContentMode, Direction, Firmware, MemoryAttribute, Phase, VmType

# Byte operations by the number that kernels know them by.
OPERATION_NUMBERS = {
    ByteOperation.NONE: layout.NO_OPERATION,
    ByteOperation.ZERO: layout.ZERO,
    ByteOperation.XOR: layout.XOR,
    ByteOperation.SCRAMBLE: layout.SCRAMBLE,
}

# Planes that a page of each rank has.
RANK_PLANES = {
    Rank.UNALLOCATED: Plane.NONE,
    Rank.ALLOCATED: Plane.ALLOCATED,
    Rank.ASSIGNED: Plane.ALLOCATED | Plane.ASSIGNED,
    Rank.ACCEPTED: Plane.ALLOCATED | Plane.ASSIGNED | Plane.ACCEPTED,
}

TRACKING_COLUMNS = {Tracking.RMP: int(layout.RMP_UPDATES), Tracking.SEPT: int(layout.SEPT_CHANGES)}
"""Result column in which a platform counts assignment."""


class Refusal(NamedTuple):
    """One reason of a kernel, in words."""

    error: type[GmemError]
    reports_offset: bool
    message: str


REFUSALS = {
    int(layout.FLAGS_UNKNOWN): Refusal(InvalidArgumentError, False, "flags {flags:#x}; known here: {known}"),
    int(layout.FLAGS_MANY): Refusal(
        InvalidArgumentError, False, "flags {flags:#x}; one content mode at a time"
    ),
    int(layout.ERROR_OFFSET_SET): Refusal(
        InvalidArgumentError, False, "error_offset is set on input; this abi wants 0"
    ),
    int(layout.RESERVED_SET): Refusal(InvalidArgumentError, False, "a reserved word is set; all must be 0"),
    int(layout.NO_PRIVATE_MEMORY): Refusal(
        InvalidArgumentError, False, "the VM has no private memory; no attribute can be set"
    ),
    int(layout.ATTRIBUTE_UNKNOWN): Refusal(
        InvalidArgumentError, False, "attributes {attributes:#x}; bits of {known_attributes:#x} are accepted"
    ),
    int(layout.RANGE_EMPTY): Refusal(
        InvalidArgumentError, False, "the range is empty or wraps 2^64; at least one page would be accepted"
    ),
    int(layout.RANGE_UNALIGNED): Refusal(
        InvalidArgumentError, False, "the range isn't page aligned; multiples of 0x1000 would be accepted"
    ),
    int(layout.RANGE_BEYOND_END): Refusal(
        InvalidArgumentError, False, "the range isn't within the file; up to {file_size:#x} would be accepted"
    ),
    int(layout.MODE_UNSUPPORTED): Refusal(
        UnsupportedContentModeError,
        True,
        "{names} isn't supported for this VM, direction and phase ({phase})",
    ),
    int(layout.NO_MEMORY): Refusal(OutOfMemoryError, True, "an allocation failed; nothing was changed"),
    int(layout.PAGE_PINNED): Refusal(
        PagePinnedError, True, "the page at {error_offset:#x} is pinned; unpin it, then retry the whole range"
    ),
}
"""Kernel reason -> what is raised for it."""

ERRNO_OF_REASON = np.zeros(len(REFUSALS) + 1, np.int32)
for _reason, _refusal in REFUSALS.items():
    ERRNO_OF_REASON[_reason] = _refusal.error.number


@dataclass(frozen=True, slots=True)
class Rules:
    """What conversions of one VM do, in one launch phase.

    Attributes
    ----------
    abi : Abi
        The revision they were compiled from.
    phase : Phase
        The launch phase.
    table : ndarray of uint64
        The form kernels read, see ``kernels.py``.
    allocating : frozenset of (attributes, flags)
        The conversions that bring pages into being.
    """

    abi: Abi
    phase: Phase
    table: NDArray[np.uint64]

    allocating: frozenset[tuple[int, int]]

    @property
    def known_attributes(self) -> int:
        """Attribute bits that may be set."""
        return int(self.table[layout.KNOWN_ATTRIBUTES])


@cache
def compile_rules(abi: Abi, vm_type: VmType, firmware: Firmware, phase: Phase) -> Rules:
    """Compile policy for one VM and phase: direction × flag -> refusal, precondition, bytes, planes."""
    table = np.zeros(layout.RULES_WORDS, np.uint64)
    # An abi whose plain conversion to shared is invalid takes no attribute at all from this VM.
    takes_any = cell(abi, vm_type, firmware, phase, Direction.TO_SHARED, ContentMode.NONE).outcome == "OK"
    takes_private = (
        cell(abi, vm_type, firmware, phase, Direction.TO_PRIVATE, ContentMode.NONE).outcome == "OK"
    )
    table[layout.KNOWN_FLAGS] = int(abi.known_flags)
    table[layout.KNOWN_ATTRIBUTES] = int(MemoryAttribute.PRIVATE) if takes_private else 0
    table[layout.HAS_PRIVATE_MEMORY] = takes_any
    table[layout.ERROR_OFFSET_CHECKED] = abi.error_offset_must_be_zero
    cells = table[int(layout.CELLS) :].reshape(2, int(layout.FLAG_SLOTS), int(layout.CELL_WORDS))
    allocating = set()
    for to_private, direction in enumerate((Direction.TO_SHARED, Direction.TO_PRIVATE)):
        for flag in (ContentMode.NONE, *(row.bit for row in abi.flags)):
            words = _compile_cell(abi, vm_type, firmware, phase, direction, flag)
            cells[to_private, int(flag).bit_length()] = words
            if words[int(layout.SET)] & Plane.ALLOCATED:
                allocating.add((to_private * int(MemoryAttribute.PRIVATE), int(flag)))
    return Rules(abi, phase, table, frozenset(allocating))


def _compile_cell(
    abi: Abi, vm_type: VmType, firmware: Firmware, phase: Phase, direction: Direction, flag: ContentMode
) -> list[int]:
    """The words of one cell: refusal, precondition, operations, planes to set, planes to clear."""
    answer = cell(abi, vm_type, firmware, phase, direction, flag)
    if answer.effect is None:
        return [int(layout.MODE_UNSUPPORTED), 0, 0, 0, 0]
    unless = Plane.ASSIGNED if answer.unless == "assigned" else Plane.NONE
    operations = pack_operations(byte_operations(answer.effect, vm_type, direction))
    raises_to = EFFECTS[answer.effect].raises_to
    if direction == Direction.TO_PRIVATE:
        set_ = Plane.PRIVATE | RANK_PLANES[raises_to or Rank.UNALLOCATED]
        return [0, int(unless), operations, int(set_), 0]
    return [0, int(unless), operations, 0, int(Plane.PRIVATE | Plane.ASSIGNED | Plane.ACCEPTED)]


def pack_operations(operations: Operations) -> int:
    """Byte operations by rank, four bits each."""
    packed = 0
    for rank, operation in enumerate(operations):
        packed |= int(OPERATION_NUMBERS[operation]) << rank * int(layout.OPERATION_BITS)
    return packed


def tracking_column(vm_type: VmType) -> int:
    """Result column in which a VM type counts assignment (any, for one that assigns nothing)."""
    tracking = PLATFORMS[vm_type].tracking
    return int(layout.RMP_UPDATES) if tracking is None else TRACKING_COLUMNS[tracking]


class ConversionResult:
    """What one accepted conversion did.

    Parameters
    ----------
    counters : Counters or tuple of int
        The events, or the result row that holds them: naming them costs more than a short conversion does,
        so it waits until somebody asks.
    """

    __slots__ = ("_counters",)

    def __init__(self, counters: Counters | tuple[int, ...]) -> None:
        self._counters = counters

    @property
    def counters(self) -> Counters:
        """The events of this call alone."""
        if isinstance(self._counters, tuple):
            self._counters = counters_of_row(self._counters)
        return self._counters

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConversionResult) and self.counters == other.counters

    def __hash__(self) -> int:
        return hash(self.counters)

    def __repr__(self) -> str:
        return f"ConversionResult({self.counters!r})"

    def _repr_html_(self) -> str:
        return self.counters._repr_html_()


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What each request of a batch did; requests that failed changed nothing.

    Attributes
    ----------
    errno : ndarray of int32, shape (n,)
        0, or the errno of the request.
    error_offset : ndarray of uint64, shape (n,)
        The field after the call, bytes.
    counters : ndarray, structured, shape (n,)
        The counters of each request, by name, uint64.
    """

    errno: NDArray[np.int32]
    error_offset: NDArray[np.uint64]
    counters: NDArray[Any]

    @property
    def total(self) -> Counters:
        """Counters of the whole batch."""
        return Counters(*(int(self.counters[name].sum()) for name in ENGINE_COUNTERS))

    def _repr_html_(self) -> str:
        numbers, counts = np.unique(self.errno, return_counts=True)
        outcomes = [
            (ERRNO_NAMES.get(number, str(number)) if number else "OK", count)
            for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)
        ]
        title = f"{len(self.errno):,} requests"
        return table(title, ("outcome", "requests"), outcomes, self.total._repr_html_())


_RESULT_ROW = np.dtype(
    [("reason", "<u8"), ("error_offset", "<u8"), *((name, "<u8") for name in ENGINE_COUNTERS)]
)


def batch_result(results: NDArray[np.uint64]) -> BatchResult:
    """The kernel's result rows, named."""
    rows = results.view(_RESULT_ROW)[:, 0]
    return BatchResult(ERRNO_OF_REASON[rows["reason"]], rows["error_offset"], rows[list(ENGINE_COUNTERS)])


def check(rules: Rules, file_size: int, request: tuple[int, ...], row: tuple[int, ...]) -> ConversionResult:
    """Return the result of one request, or raise what its refusal deserves.

    Raises
    ------
    GmemError
        As ``REFUSALS`` says for the kernel's reason; ``error_offset`` is set where the interface writes it.
    """
    if row[0] == 0:
        return ConversionResult(row)
    refusal = REFUSALS[row[0]]
    offset, size, attributes, flags = request[:4]
    detail = refusal.message.format(
        flags=flags,
        known=", ".join(f"{row.name}={int(row.bit):#x}" for row in rules.abi.flags) or "none, must be 0",
        attributes=attributes,
        known_attributes=rules.known_attributes,
        file_size=file_size,
        error_offset=row[1],
        names=flag_name(ContentMode(flags), rules.abi),
        phase=rules.phase,
    )
    raise refusal.error(
        f"conversion of {offset:#x}+{size:#x}: {detail}",
        error_offset=row[1] if refusal.reports_offset else None,
    )
