"""Conversion: KVM_SET_MEMORY_ATTRIBUTES2 on one file, from policy to result.

`compile_rules` turns what policy says for one VM and phase into the small array that the kernel reads;
`Store.convert_one` and `run_many` (store.py) take the file's lock and run the kernel over the requests;
`check` raises what a refused one deserves.
"""

import errno
import struct
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine import kernels as layout
from gmemcore.engine.counters import ENGINE_COUNTERS, Counters, counters_of_row
from gmemcore.engine.state import Plane, fields_of
from gmemcore.engine.steps import REASONS, compile_steps
from gmemcore.errors import (
    ERRNO_NAMES,
    ERRNO_NUMBERS,
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
    Cell,
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
"""Row of a result in which a platform counts assignment."""


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

_OUTCOME_OF_REASON = (
    {0: "OK"}
    | {int(reason): name for name, reason in REASONS.items()}
    | {reason: ERRNO_NAMES[refusal.error.number] for reason, refusal in REFUSALS.items()}
)
OUTCOMES = tuple(dict.fromkeys(_OUTCOME_OF_REASON.values()))
"""What can become of a request or another step: OK, an errno's name, or an access's SIGBUS and its like."""

OUTCOME_OF_REASON = np.array(
    [OUTCOMES.index(_OUTCOME_OF_REASON[reason]) for reason in range(len(_OUTCOME_OF_REASON))], np.uint8
)
ERRNO_OF_REASON = np.array(
    [
        0 if reason == 0 else ERRNO_NUMBERS.get(_OUTCOME_OF_REASON[reason], errno.EFAULT)
        for reason in range(len(_OUTCOME_OF_REASON))
    ],
    np.int32,
)


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
    """Compile policy for one VM and phase: direction × flag -> refusal, precondition, effect; steps."""
    table = np.zeros(int(layout.STEPS), np.uint64)
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
            if words[int(layout.SET)] & int(layout.ALLOCATED_FIELD):
                allocating.add((to_private * int(MemoryAttribute.PRIVATE), int(flag)))
    table = np.concatenate([table, compile_steps(abi, vm_type, phase)])
    return Rules(abi, phase, table, frozenset(allocating))


def _compile_cell(
    abi: Abi, vm_type: VmType, firmware: Firmware, phase: Phase, direction: Direction, flag: ContentMode
) -> list[int]:
    """The words of one cell: refusal, precondition, operations, fields to set and to clear, plainness."""
    answer = cell(abi, vm_type, firmware, phase, direction, flag)
    if answer.effect is None:
        return [int(layout.MODE_UNSUPPORTED), 0, 0, 0, 0, 0]
    unless = Plane.ASSIGNED if answer.unless == "assigned" else Plane.NONE
    operations = pack_operations(byte_operations(answer.effect, vm_type, direction))
    set_, clear = plane_changes(answer, direction)
    plain = not (unless or operations)
    return [0, fields_of(unless), operations, fields_of(set_), fields_of(clear), plain]


def plane_changes(answer: Cell, direction: Direction) -> tuple[Plane, Plane]:
    """Return the planes that an accepted conversion sets on every page of its range, and those it clears."""
    if answer.effect is None:
        return Plane.NONE, Plane.NONE
    if direction == Direction.TO_PRIVATE:
        raises_to = EFFECTS[answer.effect].raises_to
        return Plane.PRIVATE | RANK_PLANES[raises_to or Rank.UNALLOCATED], Plane.NONE
    return Plane.NONE, Plane.PRIVATE | Plane.ASSIGNED | Plane.ACCEPTED


def pack_operations(operations: Operations) -> int:
    """Byte operations by rank, four bits each."""
    packed = 0
    for rank, operation in enumerate(operations):
        packed |= int(OPERATION_NUMBERS[operation]) << rank * int(layout.OPERATION_BITS)
    return packed


def tracking_column(vm_type: VmType) -> int:
    """Row of a result in which a VM type counts assignment (any, for one that assigns nothing)."""
    tracking = PLATFORMS[vm_type].tracking
    return int(layout.RMP_UPDATES) if tracking is None else TRACKING_COLUMNS[tracking]


RESULT = struct.Struct(f"={layout.RESULT_ROWS}Q")
"""One result as kernels write it: reason, error_offset, counters."""
_DONE = bytes(8)


class ConversionResult:
    """What one accepted conversion did.

    Parameters
    ----------
    counters : Counters or bytes
        The events, or the result that holds them (see `RESULT`): naming them costs more than a short
        conversion does, so it waits until somebody asks.
    """

    __slots__ = ("_counters",)

    def __init__(self, counters: Counters | bytes) -> None:
        self._counters = counters

    @property
    def counters(self) -> Counters:
        """The events of this call alone."""
        if isinstance(self._counters, bytes):
            self._counters = counters_of_row(RESULT.unpack(self._counters))
        return self._counters

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConversionResult) and self.counters == other.counters

    def __hash__(self) -> int:
        return hash(self.counters)

    def __repr__(self) -> str:
        return f"ConversionResult({self.counters!r})"

    def _repr_html_(self) -> str:
        return self.counters._repr_html_()


class BatchResult:
    """What each request of a batch did; requests that failed changed nothing.

    Parameters
    ----------
    rows : ndarray of uint64, shape (RESULT_ROWS, n)
        What the kernel wrote: reasons, error offsets, then a row a counter.
    total : Counters
        Counters of the whole batch.
    """

    __slots__ = ("_rows", "total")

    def __init__(self, rows: NDArray[np.uint64], total: Counters) -> None:
        self._rows = rows
        self.total = total

    def __len__(self) -> int:
        return int(self._rows.shape[1])

    def __repr__(self) -> str:
        refused = int(np.count_nonzero(self._rows[0]))
        return f"BatchResult({len(self)} requests, {refused} refused, {self.total!r})"

    @property
    def errno(self) -> NDArray[np.int32]:
        """0, or the errno of the request, shape (n,)."""
        errno: NDArray[np.int32] = ERRNO_OF_REASON.take(self._rows[0].view(np.int64))
        return errno

    @property
    def outcome(self) -> NDArray[np.uint8]:
        """Outcome of each request as an index into `OUTCOMES`, shape (n,)."""
        outcome: NDArray[np.uint8] = OUTCOME_OF_REASON.take(self._rows[0].view(np.int64))
        return outcome

    def _repr_html_(self) -> str:
        numbers, counts = np.unique(self.outcome, return_counts=True)
        outcomes = [(OUTCOMES[n], count) for n, count in zip(numbers.tolist(), counts.tolist(), strict=True)]
        title = f"{len(self):,} requests"
        return table(title, ("outcome", "requests"), outcomes, self.total._repr_html_())

    @property
    def error_offset(self) -> NDArray[np.uint64]:
        """The field after the call, bytes, shape (n,); of another refused step, the page's offset."""
        offsets: NDArray[np.uint64] = self._rows[1]
        return offsets

    @property
    def counters(self) -> dict[str, NDArray[np.uint64]]:
        """The counters of each request by name, shape (n,) each, without a copy."""
        return dict(zip(ENGINE_COUNTERS, self._rows[int(layout.COUNTERS_AT) :], strict=True))


def check(rules: Rules, file_size: int, request: tuple[int, ...], result: bytes) -> ConversionResult:
    """Return what one request did, or raise what its refusal deserves.

    Raises
    ------
    GmemError
        As ``REFUSALS`` says for the kernel's reason; ``error_offset`` is set where the interface writes it.
    """
    if result.startswith(_DONE):
        return ConversionResult(result)
    reason, error_offset = RESULT.unpack(result)[:2]
    refusal = REFUSALS[reason]
    offset, size, attributes, flags = request[:4]
    detail = refusal.message.format(
        flags=flags,
        known=", ".join(f"{row.name}={int(row.bit):#x}" for row in rules.abi.flags) or "none, must be 0",
        attributes=attributes,
        known_attributes=rules.known_attributes,
        file_size=file_size,
        error_offset=error_offset,
        names=flag_name(ContentMode(flags), rules.abi),
        phase=rules.phase,
    )
    raise refusal.error(
        f"conversion of {offset:#x}+{size:#x}: {detail}",
        error_offset=error_offset if refusal.reports_offset else None,
    )
