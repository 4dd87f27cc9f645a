"""The one table of cases: every cell of policy, at every size and on every axis it is measured at.

A case is all that a reader needs to know before running anything: the question and policy's answer, how large
the memory and the converted range are, the setting (`axes`), and, derived from the rows of policy alone, the
state the range starts from and the steps that follow until the other side can read what the flag promises.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from gmemcore.benchmark.axes import DEFAULT_SETTING, Fragmentation, Mask, Setting
from gmemcore.errors import InvalidArgumentError
from gmemcore.policy import (
    ABIS,
    ALIASES,
    ASSIGNED,
    DEFAULT_ABI,
    EFFECTS,
    OK,
    PLATFORMS,
    Abi,
    ByteOperation,
    Cell,
    CellKey,
    Platform,
    Rank,
    byte_operations,
    cells,
    content_flags,
    flag_name,
)
from gmemcore.uapi import PAGE_SHIFT, PAGE_SIZE, Direction, Firmware, Phase, VmType

DEFAULT_MEMORY: Final = 1 << 30
"""Bytes of guest memory, where nothing else is asked for."""
SMALL_RANGES: Final = (4 << 10, 2 << 20)
"""Ranges that are measured beside the whole memory: a page and a huge page."""
UNALLOCATED_RANGE: Final = 2 << 20
"""The range at which conversions of memory that nobody has touched are measured too."""
DEFAULT_SELECTION: Final = (
    (DEFAULT_ABI, Firmware.TODAY),
    ("two-caps", Firmware.CIPHER),  # here a conversion really encrypts and decrypts
    ("legacy", Firmware.TODAY),  # two backings: what conversion in place is compared with
)
"""Revisions that are measured where none is named, each with its firmware."""

BYTES: Final = {
    ByteOperation.NONE: "none",
    ByteOperation.ZERO: "zero",
    ByteOperation.XOR: "xor",
    ByteOperation.SCRAMBLE: "random",
}
"""What a conversion writes, in a word."""
PRIMITIVE_OF: Final = {"zero": "memset", "xor": "xor", "random": "xor"}
"""The primitive that moves bytes in the same way."""


class Transfer(StrEnum):
    """How contents reach the new side where the conversion alone doesn't bring them there."""

    IN_PLACE = "in place"
    FROM_SOURCE = "from a source"
    COPY = "copy"


@dataclass(frozen=True, slots=True)
class Case:
    """One cell at one size, on one value of each axis.

    Attributes
    ----------
    key : CellKey
        The question: abi, VM type, firmware, phase, direction, flag.
    cell : Cell
        Policy's answer.
    memory : int
        Bytes of the guest_memfd.
    range : int
        Bytes that one conversion is asked for.
    pages_allocated_before : int
        Pages of a range that exist before its conversion.
    fragmentation : Fragmentation
        Which pages are in which state.
    setting : Setting
        Memory and threads.
    """

    key: CellKey
    cell: Cell
    memory: int
    range: int
    pages_allocated_before: int
    fragmentation: Fragmentation = Fragmentation.UNIFORM
    setting: Setting = DEFAULT_SETTING

    @property
    def name(self) -> str:
        """The case in one word, unique in the table of one setting."""
        key = self.key
        holes = "" if self.pages_allocated_before else "-unallocated"
        holes += "" if self.uniform else f"-{self.fragmentation}"
        parts = (
            key.abi,
            key.vm_type,
            key.firmware,
            key.phase,
            key.direction,
            self.flag_name,
            str(self.range),
        )
        return "-".join(parts) + holes

    @property
    def flag_name(self) -> str:
        """Name of the content flag, NONE for none."""
        return flag_name(self.key.flag, self.key.abi)

    @property
    def refused(self) -> bool:
        """Whether policy refuses the cell."""
        return self.cell.outcome != OK

    @property
    def to_private(self) -> bool:
        """Whether the range is to become private."""
        return self.key.direction == Direction.TO_PRIVATE

    @property
    def abi(self) -> Abi:
        """The revision's row block."""
        return ABIS[self.key.abi]

    @property
    def platform(self) -> Platform:
        """The VM type's row."""
        return PLATFORMS[self.key.vm_type]

    @property
    def preserves(self) -> bool:
        """Whether the flag promises that the new side reads what the old side wrote."""
        return any(row.preserves for row in content_flags(self.key.abi) if row.bit == self.key.flag)

    @property
    def uniform(self) -> bool:
        """Whether every page of the range starts in the same state."""
        return self.fragmentation == Fragmentation.UNIFORM

    def mask(self, size: int) -> Mask:
        """Return which pages of the first bytes of memory the fragmentation picks."""
        return self.fragmentation.mask(size >> PAGE_SHIFT, self.range >> PAGE_SHIFT)

    @property
    def ranks(self) -> tuple[Rank, Rank]:
        """How far the pages that the fragmentation picks have come before the conversion, and the others."""
        if self.uniform:
            return self.rank, self.rank
        if self.fragmentation == Fragmentation.ALTERNATING_ACCEPTED:
            return Rank.ACCEPTED, Rank.ALLOCATED
        return self.rank, Rank.UNALLOCATED

    @property
    def fits(self) -> bool:
        """Whether the cell can start from the fragmentation.

        Not from pages accepted here and there where it refuses assigned ones, or where a populate follows,
        which does; and `legacy`, whose attributes aren't the file's, is measured uniform.
        """
        if self.uniform:
            return True
        if self.abi.legacy or self.range < self.fragmentation.smallest:
            return False
        if self.fragmentation != Fragmentation.ALTERNATING_ACCEPTED:
            return True
        return self.platform.coco and self.cell.unless != ASSIGNED and self.transfer is None

    @property
    def rank(self) -> Rank:
        """How far each page of the range that the fragmentation picks has come before the conversion."""
        if not self.pages_allocated_before:
            return Rank.UNALLOCATED
        is_assigned = self.platform.coco and not self.to_private and self.cell.unless != ASSIGNED
        return Rank.ACCEPTED if is_assigned else Rank.ALLOCATED

    def operation_of(self, rank: Rank) -> ByteOperation:
        """Return what the conversion does to the bytes of a page of this rank."""
        if self.cell.effect is None or self.abi.legacy:
            return ByteOperation.NONE
        return byte_operations(self.cell.effect, self.key.vm_type, self.key.direction)[rank]

    @property
    def operation(self) -> ByteOperation:
        """What the conversion does to the bytes of the pages picked, or if nothing, to those of the rest."""
        picked, other = map(self.operation_of, self.ranks)
        return other if picked == ByteOperation.NONE else picked

    def bytes_by_operation(self, size: int) -> dict[ByteOperation, int]:
        """Return how many of the first bytes of memory a conversion of them treats in which way."""
        picked = int(self.mask(size).sum()) * PAGE_SIZE
        found: dict[ByteOperation, int] = dict.fromkeys(ByteOperation, 0)
        for rank, part in zip(self.ranks, (picked, size - picked), strict=True):
            found[self.operation_of(rank)] += part
        return found

    def touched(self, size: int) -> int:
        """Return how many of the first bytes of memory a conversion writes; all, if it writes none."""
        return size - self.bytes_by_operation(size)[ByteOperation.NONE] or size

    @property
    def bytes(self) -> str:
        """What the conversion does to the bytes of the range, in a word of `BYTES`."""
        return BYTES[self.operation]

    @property
    def accepted_by_conversion(self) -> bool:
        """Whether the conversion itself leaves the range accepted by the guest."""
        return self.cell.effect is not None and EFFECTS[self.cell.effect].raises_to == Rank.ACCEPTED

    @property
    def transfer(self) -> Transfer | None:
        """How contents get to the new side beside the conversion; None if it alone is enough.

        In `legacy` they are copied from one backing to the other. Before launch SNP and TDX load them:
        what is in place if the flag preserved it, else from a source.
        """
        if self.abi.legacy:
            return Transfer.COPY if self.platform.private_memory else None
        launching = self.key.phase == Phase.LAUNCHING
        if not (self.to_private and self.platform.coco and launching) or self.accepted_by_conversion:
            return None
        in_place = self.preserves and self.abi.in_place_populate
        return Transfer.IN_PLACE if in_place else Transfer.FROM_SOURCE

    @property
    def accept(self) -> bool:
        """Whether the guest must accept the range before it can read it."""
        coco_guest_reads = self.to_private and self.platform.coco
        return coco_guest_reads and self.key.phase == Phase.RUNNING and not self.accepted_by_conversion

    @property
    def workload(self) -> tuple[object, ...]:
        """What is executed, sizes aside: cases that agree in it do the same work, whatever their names."""
        kind = self.platform
        return (
            *(self.setting, self.fragmentation, *map(self.operation_of, self.ranks)),
            *(self.abi.legacy, kind.private_memory, kind.coco, kind.accept if self.accept else None),
            *(
                self.key.direction,
                self.key.phase if self.abi.legacy and kind.coco and self.to_private else None,
            ),
            *(self.rank, self.operation, self.accepted_by_conversion, self.transfer, self.accept),
        )

    @property
    def primitive(self) -> str | None:
        """Primitive that the step which moves the bytes is compared with; None if no byte moves."""
        if self.transfer in (Transfer.COPY, Transfer.FROM_SOURCE):
            return "memcpy"
        return PRIMITIVE_OF.get("xor" if self.transfer == Transfer.IN_PLACE else self.bytes)


def table(
    abi: str | None = None,
    vm_type: VmType | str | None = None,
    firmware: Firmware | str | None = None,
    *,
    memory: int = DEFAULT_MEMORY,
    ranges: Sequence[int] | None = None,
    fragmentations: Sequence[Fragmentation] = (Fragmentation.UNIFORM,),
    settings: Sequence[Setting] = (DEFAULT_SETTING,),
) -> list[Case]:
    """Return the cases of a selection, in the order of policy.

    Parameters
    ----------
    abi : str or None
        One revision or proposal, with every firmware that makes a difference to it; None: those of
        `DEFAULT_SELECTION`.
    vm_type, firmware : str or None
        Narrow the selection.
    memory : int
        Bytes of the guest_memfd.
    ranges : sequence of int or None
        Bytes of one conversion; None: `SMALL_RANGES` where they fit, and the whole memory.
    fragmentations : sequence of Fragmentation
        How the state of pages alternates; one that a case can't start from is left out (`Case.fits`).
    settings : sequence of Setting
        Memory and threads; all cases of one before those of the next.

    Returns
    -------
    list of Case
        A refused cell once, at the smallest range, uniform and under the first setting. Any other cell at
        every range, and where its effect is more than KEEP at `UNALLOCATED_RANGE` also with memory that
        doesn't exist yet.

    Raises
    ------
    InvalidArgumentError
        EINVAL: a name that doesn't exist; a range beyond the memory.
    """
    sizes = _ranges(memory, ranges)
    return [
        case
        for setting in settings
        for name, each_firmware in _selection(abi, firmware)
        for key, answer in cells(name, vm_type, each_firmware)
        if answer.outcome == OK or setting == settings[0]
        for case in _cases_of(key, answer, memory, sizes, fragmentations, setting)
    ]


def _ranges(memory: int, ranges: Sequence[int] | None) -> tuple[int, ...]:
    """Return the ranges in ascending order, each once."""
    chosen = {size for size in SMALL_RANGES if size < memory} | {memory} if ranges is None else set(ranges)
    for size in chosen:
        if size > memory:
            raise InvalidArgumentError(f"range {size:#x} is larger than the memory, {memory:#x}")
    return tuple(sorted(chosen))


def _selection(abi: str | None, firmware: Firmware | str | None) -> Iterator[tuple[str, Firmware | str]]:
    """Yield each revision with its firmware."""
    if abi is None:
        for name, usual in DEFAULT_SELECTION:
            yield name, usual if firmware is None else firmware
        return
    for each in Firmware if firmware is None else (firmware,):
        if firmware is not None or each == Firmware.TODAY or _firmware_matters(abi):
            yield ALIASES.get(abi, abi), each


def _firmware_matters(abi: str) -> bool:
    """Whether a cell of the revision is answered differently under the `cipher` firmware."""
    today, cipher = (
        [(answer.outcome, answer.effect) for _, answer in cells(abi, firmware=each)] for each in Firmware
    )
    return today != cipher


def _cases_of(
    key: CellKey,
    answer: Cell,
    memory: int,
    sizes: tuple[int, ...],
    fragmentations: Sequence[Fragmentation],
    setting: Setting,
) -> Iterator[Case]:
    """Yield the cases of one cell."""
    if answer.outcome != OK:
        yield Case(key, answer, memory, sizes[0], sizes[0] >> PAGE_SHIFT, setting=setting)
        return
    for size in sizes:
        n_pages = size >> PAGE_SHIFT
        for fragmentation in fragmentations:
            case = Case(key, answer, memory, size, n_pages, fragmentation, setting)
            if case.fits:
                yield replace(case, pages_allocated_before=_allocated(case))
        if Fragmentation.UNIFORM in fragmentations and answer.effect != "KEEP" and size == UNALLOCATED_RANGE:
            yield Case(key, answer, memory, size, 0, setting=setting)


def _allocated(case: Case) -> int:
    """Pages of the first range that exist before its conversion."""
    if case.ranks[1] != Rank.UNALLOCATED:
        return case.range >> PAGE_SHIFT
    return int(case.mask(case.range).sum())


def find(cases: Sequence[Case], **wanted: object) -> Case:
    """Return the first case whose key, cell or own attributes have all wanted values.

    Raises
    ------
    LookupError
        There is none.

    Examples
    --------
    >>> find(table("v5", "SNP", memory=4096), effect="ZERO").key.direction.value
    'to_shared'
    """
    for case in cases:
        if all(_attribute(case, name) == value for name, value in wanted.items()):
            return case
    raise LookupError(f"no case with {wanted}")


def _attribute(case: Case, name: str) -> object:
    for part in (case.key, case.cell, case):
        if hasattr(part, name):
            return getattr(part, name)
    raise AttributeError(f"a case has no {name}")
