"""Player: runs operations on a Vm, the only thing that does.

Operations go by guest physical address; a player finds the files behind them and calls the public interface,
as a VMM does: in one batch per file wherever order allows, else by single calls. The result is the same.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine import Counters
from gmemcore.engine.arguments import check_aligned
from gmemcore.engine.jit import is_compiled, load
from gmemcore.engine.results import OUTCOMES
from gmemcore.engine.steps import Step
from gmemcore.errors import (
    BadAddressError,
    GmemError,
    GuestExit,
    HostAccessError,
    InvalidArgumentError,
    LaunchUpdateError,
)
from gmemcore.machine import GuestMemfd, Memslot, VmFace, memslot_pieces
from gmemcore.machine.access import check_guest_range
from gmemcore.uapi import (
    PAGE_SIZE,
    Capability,
    Direction,
    FallocateMode,
    GuestMemfdFlag,
    MemoryAttribute,
    PageType,
)
from gmemcore.workload.fill import PIECE, Fill
from gmemcore.workload.layout import Layout
from gmemcore.workload.operations import (
    FROM_SOURCE,
    LOOPS,
    Access,
    Operations,
    as_words,
    check_array,
    check_operations,
)
from gmemcore.workload.outcomes import CODES, OUTCOME, Outcomes

_PUNCH: Final = FallocateMode.KEEP_SIZE | FallocateMode.PUNCH_HOLE
_PAGE_TYPES: Final = tuple(PageType)
_KINDS: Final[dict[int, bool | None]] = {
    Access.AS_ATTRIBUTE: None,
    Access.SHARED: False,
    Access.PRIVATE: True,
}
_BATCH: Final = 10
"""Operations in a row from which on a batch is quicker than single calls."""
_TOUCHES: Final = (
    *(Step.CONVERT, Step.HOST_READ, Step.GUEST_READ, Step.ACCEPT),
    *(Step.ALLOCATE, Step.PUNCH_HOLE, Step.PIN, Step.UNPIN),
)
_WRITES: Final = (Step.HOST_WRITE, Step.GUEST_WRITE)
_GUEST_ACCESSES: Final = (Step.GUEST_READ, Step.GUEST_WRITE)
_IN_BATCH: Final[dict[bool, NDArray[np.bool_]]] = {
    have_bytes: np.isin(np.arange(len(Step)), _TOUCHES if have_bytes else _TOUCHES + _WRITES)
    for have_bytes in (True, False)
}
"""Whether batches take a step, by whether there are bytes; other steps write contents, go on after a refusal
or are the Vm's."""
_VARIANTS_IN_BATCH: Final[dict[bool, NDArray[np.uint64]]] = {
    have_bytes: np.where(
        steps, np.where(np.isin(np.arange(len(Step)), _GUEST_ACCESSES), len(Access), 1), 0
    ).astype(np.uint64)
    for have_bytes, steps in _IN_BATCH.items()
}
"""The variants that batches take, by step."""
_CODE_OF: Final = np.array([CODES[name] for name in OUTCOMES], np.uint16)
_SAYS_WHERE: Final = np.array(
    [
        [name in ("EOPNOTSUPP", "ENOMEM", "EAGAIN") for name in OUTCOMES],
        [name in ("MEMORY_FAULT", "MMIO", "NOT_VALIDATED", "EHWPOISON") for name in OUTCOMES],
    ]
)
"""Whether a refusal has a place of its own: of a conversion, of another step; by outcome."""


def build(
    vm: VmFace, layout: Layout, start: NDArray[np.uint64] | None = None, page_order: int = 0
) -> tuple[GuestMemfd, ...]:
    """Give a Vm the memory of a layout: one guest_memfd per region, and the memslots that hold it, in order.

    A region starts private by the flags of its file, or in `legacy` by the attributes of the Vm. Where the VM
    has no private memory everything starts shared.

    Parameters
    ----------
    vm : Vm or LegacyVm
        Without memory.
    layout : Layout
        Where memory is.
    start : uint64 array of shape (n, 3) or None
        Pages that begin otherwise than their region, as `gmemcore.workload.trace.Trace` has them.
    page_order : int
        Order of the huge pages that files consist of; 0: 4 KiB pages. Files are then as large as whole huge
        pages make them, and those that start shared are converted first.

    Raises
    ------
    GmemError
        Creating a file or a memslot was refused.
    """
    offered = vm.check_cap(Capability.GUEST_MEMFD_FLAGS)
    by_vm = vm.check_cap(Capability.MEMORY_ATTRIBUTES) & MemoryAttribute.PRIVATE
    by_file = vm.check_cap(Capability.GUEST_MEMFD_MEMORY_ATTRIBUTES) & MemoryAttribute.PRIVATE
    files, slots = [], count()
    for region in layout.regions:
        starts_private = region.private and (by_vm or by_file)
        gmem = _new_file(vm, region.size, page_order, offered, private=bool(starts_private))
        for offset, size in memslot_pieces(region.size):
            vm.add_memslot(next(slots), region.gpa + offset, size, gmem, offset)
        if starts_private and by_vm:
            vm.set_memory_attributes(region.gpa, region.size, MemoryAttribute.PRIVATE)
        files.append(gmem)
    if start is not None and len(start) and (by_vm or by_file):
        _begin(vm, layout, files, start)
    return tuple(files)


def _new_file(vm: VmFace, size: int, page_order: int, offered: int, *, private: bool) -> GuestMemfd:
    """Create a file whose pages start with an attribute."""
    if not page_order:
        flags = GuestMemfdFlag.MMAP | (0 if private else GuestMemfdFlag.INIT_SHARED)
        return vm.create_guest_memfd(size, flags & offered)
    unit = PAGE_SIZE << page_order
    gmem = vm.create_guest_memfd(
        -(-size // unit) * unit, GuestMemfdFlag.MMAP | GuestMemfdFlag.HUGETLB, page_order
    )
    if not private:
        gmem.convert(0, gmem.size, Direction.TO_SHARED)
    return gmem


def _begin(vm: VmFace, layout: Layout, files: Sequence[GuestMemfd], start: NDArray[np.uint64]) -> None:
    """Bring pages into the state that they begin in."""
    if vm.abi.legacy:
        for gpa, size, attributes in start.tolist():
            vm.set_memory_attributes(gpa, size, attributes)
        return
    for region, gmem in zip(layout.regions, files, strict=True):
        inside = (start[:, 0] >= np.uint64(region.gpa)) & (start[:, 0] < np.uint64(region.end))
        gpa, size, attributes = np.ascontiguousarray(start[inside].T)
        if len(gpa):
            gmem.set_memory_attributes_many(gpa - np.uint64(region.gpa), size, attributes)


@dataclass(frozen=True, slots=True)
class Played:
    """What came of a run.

    Attributes
    ----------
    outcomes : Outcomes
        One per operation, shape (n,).
    counters : Counters
        The events of the run.
    """

    outcomes: Outcomes
    counters: Counters


def play(
    vm: VmFace, operations: Operations | Iterable[Operations], *, seed: int = 0, discard: bool = True
) -> Played:
    """Run operations, an array or a stream of arrays; see `Player`."""
    player = Player(vm, seed=seed, discard=discard)
    chunks = [operations] if isinstance(operations, np.ndarray) else operations
    outcomes = [player.run(chunk) for chunk in chunks]
    return Played(np.concatenate(outcomes) if outcomes else np.zeros(0, OUTCOME), player.counters)


class Player:
    """Runs one guest's operations, in chunks of any size.

    Parameters
    ----------
    vm : Vm or LegacyVm
        The guest, built already.
    seed : int
        u64: what is written follows from it and from the number of the operation.
    discard : bool
        Whether the VMM discards the side that a `legacy` conversion left.

    Notes
    -----
    An operation that crosses memslots is a call each, as for a VMM; the first one refused ends it, and what
    came before it stays. Where there is no memory: a conversion to shared, UNPIN and PUNCH_HOLE skip it; to
    private, ALLOCATE and POISON are EINVAL, PIN is EFAULT and a host access SIGBUS, before anything is done.

    Reads, and writes to files without bytes, touch pages and move no data. An image is loaded from a source
    where the operation says so, or the abi has no populate in place; into files without bytes, as zeros.
    """

    def __init__(self, vm: VmFace, *, seed: int = 0, discard: bool = True) -> None:
        self.vm = vm
        self.done = 0
        """Operations run so far: the number of the next one."""
        self._fill = Fill(seed)
        self._discard = discard
        self._before = vm.counters
        self._slots = _Slots(())

    @property
    def counters(self) -> Counters:
        """Events since this player was made."""
        return self.vm.counters - self._before

    def run(self, operations: Operations) -> Outcomes:
        """Run the next operations.

        Parameters
        ----------
        operations : Operations
            Shape (n,); the field `guest` isn't looked at.

        Returns
        -------
        Outcomes
            Shape (n,).

        Raises
        ------
        InvalidArgumentError
            EINVAL: a step or variant that doesn't exist; nothing was done.
        """
        check_array(operations)
        outcomes = np.zeros(len(operations), OUTCOME)
        slots = self._current_slots()
        if len(operations) < _BATCH:
            check_operations(operations)
            self._run_single(slots, operations, outcomes, 0, len(operations))
            self.done += len(operations)
            return outcomes
        if is_compiled() and not self.vm.abi.legacy:
            gmem, columns = slots.read_batch(operations)
            if gmem is not None:
                _apply(gmem, columns, operations["gpa"], outcomes, slice(None))
                self.done += len(operations)
                return outcomes
        check_operations(operations)
        files, offsets = slots.locate(operations)
        in_batch = _IN_BATCH[slots.have_bytes].take(operations["step"]) & (files >= 0)
        if self.vm.abi.legacy:
            in_batch[:] = False
        for start, end, batch in _stretches(in_batch):
            if batch and end - start >= _BATCH:
                part = slice(start, end)
                _run_batch(slots, operations[part], files[part], offsets[part], outcomes[part])
            else:
                self._run_single(slots, operations, outcomes, start, end)
        self.done += len(operations)
        return outcomes

    def _current_slots(self) -> "_Slots":
        """Return the Vm's memslots, read again only if they are other ones than the last time."""
        memslots = self.vm.memslots
        if memslots is not self._slots.memslots:
            self._slots = _Slots(memslots)
        return self._slots

    def _run_single(
        self, slots: "_Slots", operations: Operations, outcomes: Outcomes, start: int, end: int
    ) -> None:
        """Run operations start to end, a call each."""
        rows = operations[start:end].tolist()
        for i, (step, variant, _guest, gpa, size, attributes, flags, _time) in enumerate(rows, start=start):
            one = _One(variant, gpa, size, attributes, flags, self.done + i, gpa, 0)
            try:
                _RUN[step](self, slots, one)
            except GmemError as error:
                outcomes[i] = CODES[error.outcome], _stopped_at(error, one)

    # ---- one of each step ------------------------------------------------------------------------

    def _convert(self, slots: "_Slots", one: "_One") -> None:
        to_private = bool(one.attributes & MemoryAttribute.PRIVATE)
        if not self.vm.abi.legacy:
            for gmem, offset, size in slots.pages(one, InvalidArgumentError if to_private else None):
                gmem.set_memory_attributes(offset, size, one.attributes, one.flags)
            return
        self.vm.set_memory_attributes(one.gpa, one.size, one.attributes, one.flags)
        if self._discard:
            for gmem, offset, size in slots.pages(one, None):
                if to_private:
                    gmem.discard_shared(offset, size)
                else:
                    gmem.fallocate(_PUNCH, offset, size)

    def _host_read(self, slots: "_Slots", one: "_One") -> None:
        for gmem, offset, size in slots.pieces(one, HostAccessError):
            gmem.host_touch(offset, size)

    def _host_write(self, slots: "_Slots", one: "_One") -> None:
        for gmem, offset, size in slots.pieces(one, HostAccessError):
            if size > PIECE or not slots.have_bytes:
                gmem.host_touch(offset, size)  # all of it or none, before the first part
            if slots.have_bytes:
                for at, part in self._parts(one.number, one.at - one.gpa, size):
                    gmem.host_write(offset + at, part)

    def _guest_read(self, _slots: "_Slots", one: "_One") -> None:
        self.vm.guest_touch(one.gpa, one.size, _KINDS[one.variant])

    def _guest_write(self, slots: "_Slots", one: "_One") -> None:
        if not 0 < one.size <= PIECE or not slots.have_bytes:
            self._guest_read(slots, one)  # all of it or none, before the first part
        if slots.have_bytes:
            for at, part in self._parts(one.number, 0, one.size):
                self.vm.guest_write(one.gpa + at, part, _KINDS[one.variant])

    def _parts(self, number: int, start: int, size: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """What an operation writes from its byte `start` on: parts, and where after it each begins."""
        for at in range(0, size, PIECE):
            yield at, self._fill.written(number, start + at, min(PIECE, size - at))

    def _accept(self, _slots: "_Slots", one: "_One") -> None:
        self.vm.accept(one.gpa, one.size)

    def _allocate(self, slots: "_Slots", one: "_One") -> None:
        for gmem, offset, size in slots.pages(one, InvalidArgumentError):
            gmem.fallocate(FallocateMode.KEEP_SIZE, offset, size)

    def _punch_hole(self, slots: "_Slots", one: "_One") -> None:
        for gmem, offset, size in slots.pages(one, None):
            gmem.fallocate(_PUNCH, offset, size)

    def _pin(self, slots: "_Slots", one: "_One") -> None:
        for gmem, offset, size in slots.pages(one, BadAddressError):
            gmem.pin(offset, size)

    def _unpin(self, slots: "_Slots", one: "_One") -> None:
        for gmem, offset, size in slots.pages(one, None):
            gmem.unpin(offset, size)

    def _poison(self, slots: "_Slots", one: "_One") -> None:
        for gmem, offset, size in slots.pages(one, InvalidArgumentError):
            for at in range(0, size, PAGE_SIZE):
                one.at += PAGE_SIZE if at else 0
                gmem.poison(offset + at)

    def _populate(self, slots: "_Slots", one: "_One") -> None:
        """Load an image, going on where a launch update that ended early left off."""
        check_aligned(one.gpa, one.size, "launch update")
        page_type = _PAGE_TYPES[one.variant & ~FROM_SOURCE]
        if page_type == PageType.VMSA:
            return  # the state of a vCPU, measured when the launch finishes: no guest memory
        needs_source = bool(one.variant & FROM_SOURCE) or not self.vm.abi.in_place_populate
        if needs_source and not slots.have_bytes:
            page_type = PageType.ZERO
        source = needs_source and page_type != PageType.ZERO
        done = 0
        while done < one.size:
            one.at = one.gpa + done
            size = min(one.size - done, PIECE) if source else one.size - done
            image = self._fill.image(one.at, size) if source else None
            try:
                done += self.vm.launch_update(one.at, size, image, page_type).pages_done * PAGE_SIZE
            except LaunchUpdateError as error:
                one.at += error.pages_done * PAGE_SIZE
                raise

    def _launch_finish(self, _slots: "_Slots", _one: "_One") -> None:
        self.vm.launch_finish()


@dataclass(slots=True)
class _One:
    """One operation while it runs; `at` is the gpa it has come to, which stands at `offset` of a file."""

    variant: int
    gpa: int
    size: int
    attributes: int
    flags: int
    number: int
    at: int
    offset: int


def _stopped_at(error: GmemError, one: _One) -> int:
    """Guest physical address at which an operation was refused, as far as anybody knows."""
    if isinstance(error, GuestExit):
        return error.gpa
    return one.at if error.error_offset is None else one.at + error.error_offset - one.offset


_RUN: Final[dict[int, Callable[[Player, "_Slots", _One], None]]] = {
    Step.CONVERT: Player._convert,
    Step.HOST_READ: Player._host_read,
    Step.HOST_WRITE: Player._host_write,
    Step.GUEST_READ: Player._guest_read,
    Step.GUEST_WRITE: Player._guest_write,
    Step.ACCEPT: Player._accept,
    Step.ALLOCATE: Player._allocate,
    Step.PUNCH_HOLE: Player._punch_hole,
    Step.PIN: Player._pin,
    Step.UNPIN: Player._unpin,
    Step.POISON: Player._poison,
    Step.POPULATE: Player._populate,
    Step.LAUNCH_FINISH: Player._launch_finish,
}


class _Slots:
    """The memslots of a Vm, as arrays: finds the files of many operations at once, or the pieces of one."""

    def __init__(self, memslots: tuple[Memslot, ...]) -> None:
        self.memslots = memslots
        self.files = tuple(dict.fromkeys(slot.gmem for slot in memslots))
        self.have_bytes = all(gmem.has_bytes for gmem in self.files)
        self._starts = np.array([slot.gpa for slot in memslots], np.uint64)
        self._sizes = np.array([slot.size for slot in memslots], np.uint64)
        self._offsets = np.array([slot.gmem_offset for slot in memslots], np.uint64)
        self._files = np.array([self.files.index(slot.gmem) for slot in memslots], np.intp)
        files = self._files.astype(np.uint64)
        self._rows = np.stack([self._starts, self._sizes, self._offsets, files], axis=1)

    def locate(self, operations: Operations) -> tuple[NDArray[np.intp], NDArray[np.uint64]]:
        """File (its index in `files`; -1 unless one memslot holds all of it) and offset of each operation."""
        if not self.memslots:
            return np.full(len(operations), -1), np.zeros(len(operations), np.uint64)
        gpa, size = (np.ascontiguousarray(operations[name]) for name in ("gpa", "size"))
        slot = np.zeros(1, np.intp)
        if len(self.memslots) > 1:
            slot = np.searchsorted(self._starts, gpa, side="right") - 1
        within = gpa - self._starts.take(slot)  # below the first memslot this wraps, and is beyond its size
        sizes = self._sizes.take(slot)
        inside = (slot >= 0) & (within < sizes) & (size <= sizes - within)
        return np.where(inside, self._files.take(slot), -1), within + self._offsets.take(slot)

    def read_batch(self, operations: Operations) -> tuple[GuestMemfd | None, NDArray[np.uint64]]:
        """Return operations as columns of one batch and its file; no file: they take more than that."""
        columns = np.empty((5, len(operations)), np.uint64)
        words, variants = as_words(np.ascontiguousarray(operations)), _VARIANTS_IN_BATCH[self.have_bytes]
        file = load(LOOPS).read_batch(words, self._rows, variants, columns)
        return None if file < 0 else self.files[file], columns

    def pages(self, one: _One, hole: type[GmemError] | None) -> Iterator[tuple[GuestMemfd, int, int]]:
        """Tile an operation on pages; see `pieces`.

        Raises
        ------
        InvalidArgumentError
            EINVAL: unaligned too.
        """
        check_aligned(one.gpa, one.size, "range")
        return self.pieces(one, hole)

    def pieces(self, one: _One, hole: type[GmemError] | None) -> Iterator[tuple[GuestMemfd, int, int]]:
        """Tile an operation in order, keeping `at` and `offset` of it: (file, offset, size) in bytes.

        Raises
        ------
        InvalidArgumentError
            EINVAL: empty, or wraps 2^64.
        GmemError
            `hole`, where no memslot is, before the first piece; None skips it.
        """
        check_guest_range(one.gpa, one.size)
        end = one.gpa + one.size
        overlapping = [slot for slot in self.memslots if slot.gpa < end and one.gpa < slot.gpa + slot.size]
        if hole is not None:
            at = one.gpa
            for slot in overlapping:
                if slot.gpa > at:
                    break
                at = slot.gpa + slot.size
            if at < end:
                one.at = at
                raise hole(f"there is no memory at gpa {at:#x}")
        for slot in overlapping:
            one.at = max(slot.gpa, one.gpa)
            one.offset = one.at - slot.gpa + slot.gmem_offset
            yield slot.gmem, one.offset, min(slot.gpa + slot.size, end) - one.at


def _run_batch(
    slots: _Slots,
    operations: Operations,
    files: NDArray[np.intp],
    offsets: NDArray[np.uint64],
    outcomes: Outcomes,
) -> None:
    """Run operations of one memslot each, in one batch per file: files don't know of each other."""
    step, gpa, size, attributes = (
        np.ascontiguousarray(operations[name]) for name in ("step", "gpa", "size", "attributes")
    )
    converts = step == Step.CONVERT
    flags = np.where(converts, operations["flags"], operations["variant"])
    columns = np.array([step, offsets, size, attributes, flags])
    for file, gmem in enumerate(slots.files):
        of_file = np.flatnonzero(files == file)
        if len(of_file):
            _apply(gmem, columns[:, of_file], gpa, outcomes, of_file)


def _apply(
    gmem: GuestMemfd,
    columns: NDArray[np.uint64],
    gpa: NDArray[np.uint64],
    outcomes: Outcomes,
    places: NDArray[np.intp] | slice,
) -> None:
    """Run one batch of a file, and write its outcomes at their places."""
    done = gmem.apply_many(*columns)
    refused = done.refused
    if not len(refused):
        return
    at, why = np.arange(len(outcomes))[places][refused], done.outcome[refused]
    step, offset = columns[0, refused], columns[1, refused]
    says_where = _SAYS_WHERE[np.where(step == Step.CONVERT, 0, 1), why]
    beyond = np.where(says_where, done.error_offset[refused] - offset, np.uint64(0))
    outcomes["code"][at] = _CODE_OF[why]
    outcomes["error_gpa"][at] = gpa[at] + beyond


def _stretches(mask: NDArray[np.bool_]) -> Iterator[tuple[int, int, bool]]:
    """Runs of equal values: (start, end, value)."""
    if mask.all():
        yield 0, len(mask), True
        return
    edges = (np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist()
    for start, end in pairwise([0, *edges, len(mask)]):
        yield start, end, bool(mask[start])
