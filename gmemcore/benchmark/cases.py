"""The table of cases: every cell of policy, at every size and on every axis.

A case has everything that its readers need before it runs: the question and policy's answer, the sizes, the
setting (`axes`), the state that the range starts in, and the steps until the other side can read what the
flag promises. Everything but the sizes and the setting is derived from policy's rows.
"""

from collections.abc import Collection, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from gmemcore.benchmark.axes import DEFAULT_SETTING, Fragmentation, Mask, Setting
from gmemcore.engine.byte_operations import BYTE_OPERATIONS
from gmemcore.errors import InvalidArgumentError
from gmemcore.policy import (
    ASSIGNED,
    DEFAULT_ABI,
    EFFECTS,
    OK,
    PLATFORMS,
    Abi,
    Accept,
    ByteOperation,
    Cell,
    CellKey,
    Platform,
    Rank,
    byte_operations,
    cells,
    content_flags,
    flag_name,
    get_abi,
    has_pages,
)
from gmemcore.spelling import option
from gmemcore.uapi import PAGE_SHIFT, PAGE_SIZE, Direction, Firmware, Phase, VmType
from gmemcore.units import format_size

DEFAULT_MEMORY: Final = 256 << 20
"""Default guest memory where caches are small; see `gmemcore.benchmark.memory.default_memory`."""
SMALL_RANGES: Final = (4 << 10, 2 << 20)
"""Default ranges, in addition to the whole memory: a page and a huge page."""
UNALLOCATED_RANGE: Final = 2 << 20
"""The range at which conversions of unallocated memory are measured as well."""
DEFAULT_SELECTION: Final = (
    (DEFAULT_ABI, Firmware.TODAY),
    ("two-caps", Firmware.CIPHER),  # conversions that encrypt and decrypt
    ("legacy", Firmware.TODAY),  # two backings, the baseline of conversion in place
)
"""Default revisions, each with its firmware."""


class Stage(StrEnum):
    """A separately timed step of a case."""

    CONVERT = "convert"
    POPULATE = "populate"
    """Launch update, or in `legacy` the copy to the other backing."""
    ACCESS = "access"
    """The new side's first access: accept where it must, then one checked access per page."""


class Transfer(StrEnum):
    """How contents reach the new side if the conversion alone doesn't bring them there."""

    IN_PLACE = "in place"
    FROM_SOURCE = "from a source"
    COPY = "copy"


@dataclass(frozen=True, slots=True)
class Case:
    """One cell at one size, on one value of each axis.

    Attributes
    ----------
    abi : Abi
        The revision's row block; a proposal of a file has no other place to be found.
    key : CellKey
        The question: abi, VM type, firmware, phase, direction, flag.
    cell : Cell
        Policy's answer.
    memory : int
        Bytes of the guest_memfd.
    range : int
        Bytes of one conversion.
    pages_allocated_before : int
        Allocated pages of a range before its conversion.
    fragmentation : Fragmentation
        How the state of pages alternates.
    setting : Setting
        Memory and threads.
    """

    abi: Abi = field(compare=False, repr=False)  # which `key` names
    key: CellKey
    cell: Cell
    memory: int
    range: int
    pages_allocated_before: int
    fragmentation: Fragmentation = Fragmentation.UNIFORM
    setting: Setting = DEFAULT_SETTING

    @property
    def name(self) -> str:
        """Return a name that is unique within one setting."""
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
        """Return the name of the content flag, NONE for none."""
        return flag_name(self.key.flag, self.abi)

    @property
    def refused(self) -> bool:
        """Return whether policy refuses the cell."""
        return self.cell.outcome != OK

    @property
    def to_private(self) -> bool:
        """Return whether the range becomes private."""
        return self.key.direction == Direction.TO_PRIVATE

    @property
    def platform(self) -> Platform:
        """Return the VM type's row."""
        return PLATFORMS[self.key.vm_type]

    @property
    def preserves(self) -> bool:
        """Return whether the flag promises that the new side reads what the old side wrote."""
        return any(row.preserves for row in content_flags(self.abi) if row.bit == self.key.flag)

    @property
    def uniform(self) -> bool:
        """Return whether every page of the range starts in the same state."""
        return self.fragmentation == Fragmentation.UNIFORM

    def mask(self, size: int) -> Mask:
        """Return which pages of the first `size` bytes the fragmentation picks."""
        return self.fragmentation.mask(size >> PAGE_SHIFT, self.range >> PAGE_SHIFT)

    @property
    def ranks(self) -> tuple[Rank, Rank]:
        """Return the rank before the conversion of the picked pages, and of the others."""
        if self.uniform:
            return self.rank, self.rank
        if self.fragmentation == Fragmentation.ALTERNATING_ACCEPTED:
            return Rank.ACCEPTED, Rank.ALLOCATED
        return self.rank, Rank.UNALLOCATED

    @property
    def fits(self) -> bool:
        """Return whether the cell can start from the fragmentation.

        Single accepted pages are impossible where the cell, or the populate after it, refuses assigned pages.
        `legacy` is always measured uniform, because its attributes aren't the file's.
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
        """Return the rank before the conversion of each page that the fragmentation picks."""
        if not self.pages_allocated_before:
            return Rank.UNALLOCATED
        is_assigned = self.platform.coco and not self.to_private and self.cell.unless != ASSIGNED
        return Rank.ACCEPTED if is_assigned else Rank.ALLOCATED

    def operation_of(self, rank: Rank) -> ByteOperation:
        """Return what the conversion does to the bytes of a page of a rank."""
        if self.cell.effect is None or self.abi.legacy:
            return ByteOperation.NONE
        return byte_operations(self.cell.effect, self.key.vm_type, self.key.direction)[rank]

    @property
    def operation(self) -> ByteOperation:
        """Return what the conversion does to the bytes of the picked pages, or if nothing, of the others."""
        picked, other = map(self.operation_of, self.ranks)
        return other if picked == ByteOperation.NONE else picked

    def bytes_by_operation(self, size: int) -> dict[ByteOperation, int]:
        """Return how many of the first `size` bytes are subject to each byte operation."""
        picked = int(self.mask(size).sum()) * PAGE_SIZE
        found: dict[ByteOperation, int] = dict.fromkeys(ByteOperation, 0)
        for rank, part in zip(self.ranks, (picked, size - picked), strict=True):
            found[self.operation_of(rank)] += part
        return found

    def touched(self, size: int) -> int:
        """Return how many of the first `size` bytes are written by a call; all of them if none is."""
        return size - self.bytes_by_operation(size)[ByteOperation.NONE] or size

    @property
    def bytes(self) -> str:
        """Return what the conversion does to the bytes of the range, in one word."""
        return BYTE_OPERATIONS[self.operation].word

    @property
    def does(self) -> str | None:
        """Return the effect that the bytes really see, by the flag or by the platform; None if refused.

        A conversion to shared without a flag is KEEP by policy, and yet zeroes the pages of a TDX guest.
        """
        if self.refused:
            return None
        return BYTE_OPERATIONS[self.operation].effect or ("ENCRYPT" if self.to_private else "DECRYPT")

    @property
    def accepted_by_conversion(self) -> bool:
        """Return whether the conversion itself leaves the range accepted by the guest."""
        return self.cell.effect is not None and EFFECTS[self.cell.effect].raises_to == Rank.ACCEPTED

    @property
    def transfer(self) -> Transfer | None:
        """Return how contents get to the new side besides the conversion; None if it alone is enough.

        In `legacy` they are copied from one backing to the other. Before launch SNP and TDX load them: in
        place if the flag preserved them, else from a source.
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
        """Return whether the guest must accept the range before it can read it."""
        coco_guest_reads = self.to_private and self.platform.coco
        return coco_guest_reads and self.key.phase == Phase.RUNNING and not self.accepted_by_conversion

    @property
    def workload(self) -> tuple[object, ...]:
        """Return what is executed, sizes aside: cases with equal workloads do the same work."""
        return tuple(self.work(stage) for stage in Stage)

    def work(self, stage: Stage) -> tuple[object, ...] | None:
        """Return what one stage executes, sizes aside; None if the case doesn't have it.

        Stages with equal work take the same time, whatever their cases are called, and are timed once.
        """
        kind = self.platform
        common = (
            *(stage, self.setting, self.fragmentation, self.abi.legacy, kind.private_memory, kind.coco),
            *(self.key.direction, self.ranks, tuple(map(self.operation_of, self.ranks))),
            self.accepted_by_conversion,
        )
        loads = self.abi.legacy and kind.coco and self.to_private and self.key.phase
        if stage == Stage.CONVERT:
            return (*common, loads)
        if stage == Stage.POPULATE:
            return None if self.transfer is None else (*common, loads, self.transfer)
        return (*common, loads, self.transfer, kind.accept if self.accept else None)

    def moves(self, stage: Stage) -> bool:
        """Return whether a stage moves bytes."""
        if stage == Stage.CONVERT:
            return self.bytes != "none"
        clears = self.accept and self.platform.accept == Accept.CLEAR
        return stage == Stage.POPULATE or clears

    @property
    def judged(self) -> Stage:
        """Return the stage that moves the bytes, and is compared with a primitive."""
        moved_later = self.bytes == "none" and self.transfer is not None
        return Stage.POPULATE if moved_later else Stage.CONVERT

    @property
    def primitive(self) -> str:
        """Return the primitive that the judged stage is compared with."""
        return self.primitive_of(self.judged)

    def primitive_of(self, stage: Stage) -> str:
        """Return the primitive that a stage other than ACCESS is compared with."""
        if stage == Stage.CONVERT:
            return BYTE_OPERATIONS[self.operation].primitive
        return "xor" if self.transfer == Transfer.IN_PLACE else "memcpy"


def table(
    abi: str | Abi | None = None,
    vm_type: VmType | str | None = None,
    firmware: Firmware | str | None = None,
    *,
    memory: int = DEFAULT_MEMORY,
    ranges: Sequence[int] | None = None,
    fragmentations: Sequence[Fragmentation] = (Fragmentation.UNIFORM,),
    settings: Sequence[Setting] = (DEFAULT_SETTING,),
    phases: Collection[str] | None = None,
    directions: Collection[str] | None = None,
    flags: Collection[str] | None = None,
    effects: Set[str] | None = None,
) -> list[Case]:
    """Return the cases of a selection, in the order of policy.

    Parameters
    ----------
    abi : str, Abi or None
        One revision or proposal, with every firmware that makes a difference to it; None: those of
        `DEFAULT_SELECTION`.
    vm_type, firmware : str or None
        Narrow the selection.
    memory : int
        Bytes of the guest_memfd.
    ranges : sequence of int or None
        Bytes of one conversion; None: `SMALL_RANGES` where they fit, and the whole memory.
    fragmentations : sequence of Fragmentation
        How the state of pages alternates; patterns that a case can't start in are left out (`Case.fits`).
    settings : sequence of Setting
        Memory and threads; all cases of one before those of the next.
    phases, directions, flags : collection of str or None
        Keep the cells of these phases, directions and flags (NONE among them).
    effects : set of str or None
        Keep the cells with these effects, by policy's row or by what happens to the bytes (`Case.does`).

    Returns
    -------
    list of Case
        A refused cell once: at the smallest range, uniform, under the first setting. Any other cell at every
        range, and if its effect is more than KEEP also with unallocated memory, at `UNALLOCATED_RANGE`.
        Settings whose pages a cell's guest can't have (`gmemcore.policy.has_pages`) are left out.

    Raises
    ------
    InvalidArgumentError
        EINVAL: an unknown name, a range larger than the memory, or memory that isn't whole pages.
    """
    sizes = _ranges(memory, ranges)
    _check_whole_pages(memory, settings)
    return [
        case
        for setting in settings
        for revision, each_firmware in _selection(abi, firmware)
        for key, answer in cells(revision, vm_type, each_firmware)
        if has_pages(revision, key.vm_type, setting.page_size)
        if answer.outcome == OK or setting == _first_of(settings, revision, key.vm_type)
        if (phases is None or key.phase in phases) and (directions is None or key.direction in directions)
        for case in _cases_of(revision, key, answer, memory, sizes, fragmentations, setting)
        if flags is None or case.flag_name in flags
        if effects is None or not effects.isdisjoint({case.cell.effect, case.does} - {None})
    ]


def _ranges(memory: int, ranges: Sequence[int] | None) -> tuple[int, ...]:
    """Return the ranges in ascending order, each once."""
    chosen = {size for size in SMALL_RANGES if size < memory} | {memory} if ranges is None else set(ranges)
    for size in chosen:
        if size > memory:
            raise InvalidArgumentError(
                f"range {format_size(size)} must not be larger than the memory, {format_size(memory)}"
            )
    return tuple(sorted(chosen))


def _check_whole_pages(memory: int, settings: Sequence[Setting]) -> None:
    for size in sorted({setting.page_size for setting in settings}):
        if memory % size:
            pages, least = format_size(size), format_size(-(-memory // size) * size)
            raise InvalidArgumentError(
                f"the memory must be a multiple of its pages of {pages}, not {format_size(memory)}; "
                f"use {option('memory', least)}"
            )


def _first_of(settings: Sequence[Setting], abi: Abi, vm_type: VmType) -> Setting:
    """Return the first setting whose pages a guest can have."""
    return next(setting for setting in settings if has_pages(abi, vm_type, setting.page_size))


def _selection(
    abi: str | Abi | None, firmware: Firmware | str | None
) -> Iterator[tuple[Abi, Firmware | str]]:
    """Yield each revision with its firmware."""
    if abi is None:
        for name, usual in DEFAULT_SELECTION:
            yield get_abi(name), usual if firmware is None else firmware
        return
    revision = get_abi(abi)
    for each in Firmware if firmware is None else (firmware,):
        if firmware is not None or each == Firmware.TODAY or _firmware_matters(revision):
            yield revision, each


def _firmware_matters(abi: Abi) -> bool:
    """Return whether any cell of the revision has another answer under the `cipher` firmware."""
    today, cipher = (
        [(answer.outcome, answer.effect) for _, answer in cells(abi, firmware=each)] for each in Firmware
    )
    return today != cipher


def _cases_of(
    abi: Abi,
    key: CellKey,
    answer: Cell,
    memory: int,
    sizes: tuple[int, ...],
    fragmentations: Sequence[Fragmentation],
    setting: Setting,
) -> Iterator[Case]:
    """Yield the cases of one cell."""
    if answer.outcome != OK:
        yield Case(abi, key, answer, memory, sizes[0], sizes[0] >> PAGE_SHIFT, setting=setting)
        return
    for size in sizes:
        n_pages = size >> PAGE_SHIFT
        for fragmentation in fragmentations:
            case = Case(abi, key, answer, memory, size, n_pages, fragmentation, setting)
            if case.fits:
                yield replace(case, pages_allocated_before=allocated_pages(case))
        if Fragmentation.UNIFORM in fragmentations and answer.effect != "KEEP" and size == UNALLOCATED_RANGE:
            yield Case(abi, key, answer, memory, size, 0, setting=setting)


def allocated_pages(case: Case) -> int:
    """Return the allocated pages of the first range before its conversion."""
    if case.ranks[1] != Rank.UNALLOCATED:
        return case.range >> PAGE_SHIFT
    return int(case.mask(case.range).sum())


def find(cases: Sequence[Case], **wanted: object) -> Case:
    """Return the first case whose key, cell or own attributes have all the given values.

    Raises
    ------
    LookupError
        No case has them.

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
