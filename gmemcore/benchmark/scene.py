"""A case on the stage: a fresh Vm in the state the case starts from, then its steps, through the public API.

::

    prepare    the old side's contents are there                                     not timed
    run        the conversion, and populate or copy where contents need it           timed, a column each
    check      first access: the new side accepts where it must and reads all        timed, a third column
               every byte compared with `contents`                                   not timed

Ranges are converted in turn from the start of the file, so that a primitive over the same bytes walks memory
in the same order, and what a small range costs is the cost of being small.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import numpy as np

from gmemcore.benchmark.axes import Fragmentation, Mask, runs_of
from gmemcore.benchmark.cases import Case, Transfer
from gmemcore.benchmark.contents import (
    SOURCE,
    WRITTEN,
    Contents,
    Reference,
    Words,
    WrongContentsError,
    contents_after,
    contents_before,
    pieces,
)
from gmemcore.benchmark.memory import Memory
from gmemcore.engine import Counters
from gmemcore.engine.steps import Step
from gmemcore.machine import GuestMemfd, LegacyVm, VmFace, create_vm
from gmemcore.policy import ByteOperation, Rank
from gmemcore.uapi import PAGE_SHIFT, PAGE_SIZE, FallocateMode, GuestMemfdFlag, MemoryAttribute, Phase

TIMED_CALLS = 256
"""Calls a step makes range by range at most; what is left of many small ranges is done at once, untimed."""
PUNCH_HOLE = FallocateMode.KEEP_SIZE | FallocateMode.PUNCH_HOLE

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(slots=True)
class Lap:
    """Time of one step.

    Attributes
    ----------
    seconds : float
        Of all its calls.
    size : int
        Bytes of guest memory it was about, counted once.
    """

    seconds: float = 0.0
    size: int = 0

    def time(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Add the time of a call."""
        began = time.perf_counter()
        result = call(*args, **kwargs)
        self.seconds += time.perf_counter() - began
        return result

    @property
    def gbps(self) -> float:
        """GB/s, GB = 1e9 bytes."""
        return self.size / self.seconds / 1e9


@dataclass(frozen=True, slots=True)
class Steps:
    """Times of one run: the conversion, and populate or copy where the case has it."""

    convert: Lap
    transfer: Lap | None


class Scene:
    """One case, ready to be run again and again.

    Parameters
    ----------
    case : Case
        Any case; a refused one can only be prepared.
    memory : Memory
        Its bytes.
    reference : Reference
        What they must be.
    count : int
        Ranges to convert in one run; they must fit the memory.

    Attributes
    ----------
    vm, gmem : Vm, GuestMemfd
        Those of the last `prepare`.
    touched_share : float
        Of the ranges' bytes, how many the conversion writes; 1 if none.
    """

    vm: VmFace
    gmem: GuestMemfd

    def __init__(self, case: Case, memory: Memory, reference: Reference, count: int = 1) -> None:
        self.case = case
        self.size = case.range * count
        self.accepts = case.accept
        self._memory = memory
        self._reference = reference
        self._before = Counters()
        starts = np.arange(count, dtype=np.uint64) * np.uint64(case.range)
        self._ranges = starts, np.full(count, case.range, np.uint64)
        self._mask = case.mask(self.size)
        self.touched_share = case.touched(self.size) / self.size

    # ---- before --------------------------------------------------------------------------------

    def prepare(self, *, written: bool = True) -> None:
        """Make a fresh Vm in the state the case starts from.

        Parameters
        ----------
        written : bool
            The old side's contents are written; otherwise the pages hold what was there, which is enough for
            timing and all that it would cost to write is saved.
        """
        case = self.case
        starts_shared = self._starts_shared
        flags = GuestMemfdFlag.MMAP | (GuestMemfdFlag.INIT_SHARED if starts_shared else GuestMemfdFlag(0))
        self._new_vm(flags)
        if case.key.phase == Phase.RUNNING:
            self.vm.launch_finish()
        if not case.uniform:
            self._fragment(written)
        elif case.rank == Rank.UNALLOCATED:
            self._memory.side(0).words[: self.size // 8] = 0
        else:
            self._bring(0, self.size, case.rank, written)
        if self._hidden:
            self.gmem.set_memory_attributes(0, self.size, MemoryAttribute.PRIVATE)
        self._before = self.vm.counters

    @property
    def _starts_shared(self) -> bool:
        """Whether the host is the first to write."""
        case = self.case
        return case.to_private or not case.platform.private_memory or self._hidden or self._accepted_apart

    @property
    def _accepted_apart(self) -> bool:
        """Whether some pages are accepted by the guest and others hold what the host wrote."""
        return self.case.fragmentation == Fragmentation.ALTERNATING_ACCEPTED

    @property
    def _hidden(self) -> bool:
        """Whether the range is private, and yet what the host wrote there, which the guest never touched."""
        case = self.case
        return case.platform.coco and not case.to_private and case.rank == Rank.ALLOCATED

    def _new_vm(self, flags: GuestMemfdFlag) -> None:
        if hasattr(self, "vm"):
            self.vm.close()
        key, lender = self.case.key, self._memory.lender()
        if self.case.setting.enforce:
            self._memory.clear()  # what lies in pages that don't exist would be the host's, written raw
        self.vm = create_vm(
            *(key.vm_type, self.case.abi, key.firmware, self._reference.seed, lender),
            threads=self.case.setting.threads,
            enforce="mprotect" if self.case.setting.enforce else None,
        )
        self.gmem = self.vm.create_guest_memfd(self._memory.size, flags)
        self.vm.add_memslot(0, 0, self._memory.size, self.gmem)

    # ---- fragmented, run by run ------------------------------------------------------------------

    def _fragment(self, written: bool) -> None:
        """Bring the pages that the fragmentation picks into being, or to the guest."""
        starts, sizes = runs_of(self._mask)
        if self._accepted_apart:
            self._bring(0, self.size, Rank.ALLOCATED, written)
            if self.case.to_private:
                self.gmem.set_memory_attributes_many(starts, sizes, MemoryAttribute.PRIVATE)
            else:
                self.gmem.set_memory_attributes(0, self.size, MemoryAttribute.PRIVATE)
            self._bring_runs(starts, sizes, Rank.ACCEPTED, written, shared=False)
            return
        if written:  # what isn't allocated reads zeros, and stays warm
            pages = self._memory.side(0).words[: self.size // 8].reshape(-1, PAGE_SIZE // 8)
            pages[~self._mask] = 0
        self._bring_runs(starts, sizes, self.case.rank, written, shared=self._starts_shared)

    def _bring_runs(self, starts: Words, sizes: Words, rank: Rank, written: bool, *, shared: bool) -> None:
        """Let runs of pages come as far as a rank: what is not written needs no call a run."""
        if written:
            for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
                self._write(start, size, shared=shared)
            return
        step = Step.ACCEPT if rank == Rank.ACCEPTED else Step.ALLOCATE
        if self.gmem.apply_many(step, starts, sizes).errno.any():
            raise WrongContentsError(f"{self.case.name}: its pages can't be brought into their state")

    def _bring(self, start: int, size: int, rank: Rank, written: bool) -> None:
        """Let pages come as far as a rank."""
        if written:
            self._write(start, size, shared=self._starts_shared)
        elif rank == Rank.ACCEPTED:
            self.vm.accept(start, size)
        else:
            self.gmem.fallocate(FallocateMode.KEEP_SIZE, start, size)

    def _write(self, start: int, size: int, *, shared: bool) -> None:
        """Let the old side write: the host, the launch, or the guest."""
        if shared:
            self._write_pieces(self.gmem.host_write, start, size)
        elif self.case.platform.coco and self.case.key.phase == Phase.LAUNCHING:
            self._write_pieces(self._load, start, size)
        else:
            self.vm.accept(start, size)
            self._write_pieces(self.vm.guest_write, start, size)

    def _write_pieces(self, write: Callable[[int, Any], Any], start: int, size: int) -> None:
        for low, high in pieces(start, start + size):
            write(low, self._reference.words(Contents(WRITTEN), low, high).view(np.uint8))

    def _load(self, gpa: int, source: Any) -> None:
        self.vm.launch_update(gpa, len(source), source)

    # ---- the steps -----------------------------------------------------------------------------

    def run(self) -> Steps:
        """Convert all ranges, then bring contents to the new side where the case needs that."""
        convert = self.convert()
        if self.case.transfer is None:
            return Steps(convert, None)
        return Steps(convert, self._populate())

    def convert(self) -> Lap:
        """Convert all ranges: one by one call if there is one, else in one batch."""
        attributes = MemoryAttribute.PRIVATE if self.case.to_private else 0
        starts, sizes = self._ranges
        flag = int(self.case.key.flag)
        lap = Lap(size=self.size)
        if len(starts) == 1:
            converted = lap.time(self.gmem.set_memory_attributes, 0, self.size, attributes, flag).counters
        else:
            batch = lap.time(self.gmem.set_memory_attributes_many, starts, sizes, attributes, flag)
            if batch.errno.any():
                raise WrongContentsError(f"{self.case.name}: a request of the batch was refused")
            converted = batch.total
        self._check_counters(converted)
        return lap

    def _check_counters(self, converted: Counters) -> None:
        """A conversion must have done to bytes what policy says, to all of them and nothing else."""
        found = {
            ByteOperation.ZERO: converted.bytes_zeroed,
            ByteOperation.XOR: converted.bytes_xored,
            ByteOperation.SCRAMBLE: converted.bytes_scrambled,
        }
        by_operation = self.case.bytes_by_operation(self.size)
        expected = {kind: by_operation[kind] for kind in found}
        if found != expected:
            raise WrongContentsError(f"{self.case.name}: bytes transformed {found}, not {expected}")

    def _populate(self) -> Lap:
        lap = Lap()
        in_place = self.case.transfer == Transfer.IN_PLACE
        for start, end in self._calls(lap):
            if in_place:
                lap.time(self.vm.launch_update, start, end - start)
                continue
            for low, high in pieces(start, end):
                source = self._reference.words(Contents(SOURCE), low, high).view(np.uint8)
                lap.time(self.vm.launch_update, low, high - low, source)
        return lap

    def _calls(self, lap: Lap) -> Iterator[tuple[int, int]]:
        """Byte ranges of one call each, timed in a lap; then what is left of small ranges, untimed."""
        step = self.case.range
        timed = min(self.size, step * TIMED_CALLS)
        for start in range(0, timed, step):
            yield start, start + step
        seconds = lap.seconds
        if timed < self.size:
            yield timed, self.size
        lap.seconds, lap.size = seconds, timed  # the rest doesn't count

    # ---- after ---------------------------------------------------------------------------------

    def check(self) -> Lap:
        """Let the new side read everything, and compare every byte and every attribute.

        Raises
        ------
        WrongContentsError
            Naming the first thing that is wrong.
        """
        lap = Lap()
        read = self.vm.guest_read if self.case.to_private else self.gmem.host_read
        for start, end in self._calls(lap):
            if self.accepts:
                lap.time(self.vm.accept, start, end - start)
            for low, high in pieces(start, end):
                self._check_piece(lap.time(read, low, high - low), low)
        self._check_attributes()
        return lap

    def counters(self) -> Counters:
        """Events since `prepare`."""
        return self.vm.counters - self._before

    def _check_piece(self, data: bytes, start: int) -> None:
        """Compare what the new side read, and beneath the guest's key also DRAM itself."""
        found = np.frombuffer(data, np.uint64)
        picked = self._mask[start >> PAGE_SHIFT : (start + len(data)) >> PAGE_SHIFT]
        if self.case.uniform:
            self._check_pages(found, start, self.case.rank, None)
            return
        for rank, pages in zip(self.case.ranks, (picked, ~picked), strict=True):
            if pages.any():
                self._check_pages(found, start, rank, pages)

    def _check_pages(self, found: Words, start: int, rank: Rank, pages: Mask | None) -> None:
        """Compare those pages of a piece that had one rank."""
        case = self.case
        before, dram = contents_before(case, rank), contents_after(case, rank)
        if not (case.to_private and case.platform.coco):
            self._reference.check(found, dram, start, before, f"{case.name}: the new side reads", pages)
            return
        where = f"{case.name}: the guest reads"
        self._reference.check(found, dram.under_key(), start, before.under_key(), where, pages)
        raw = self.gmem.memory[start : start + found.nbytes].view(np.uint64)
        self._reference.check(raw, dram, start, before, f"{case.name}: DRAM holds", pages)

    def _check_attributes(self) -> None:
        if not np.all(self._private_pages() == self.case.to_private):
            raise WrongContentsError(f"{self.case.name}: not every page has the attribute that was asked for")

    def _private_pages(self) -> Any:
        return self.gmem.plane("private")[: self.size >> PAGE_SHIFT]

    # ---- refused cases -------------------------------------------------------------------------

    def check_unchanged(self) -> None:
        """Compare DRAM of the old side with what was there before, and see that no event was counted.

        Raises
        ------
        WrongContentsError
            Naming the first thing that changed.
        """
        before, where = contents_before(self.case), f"{self.case.name}: after the refusal DRAM holds"
        words = self._memory.side(self._old_side).words
        for start, end in pieces(0, self.size):
            self._reference.check(words[start // 8 : end // 8], before, start, before, where)
        if any(self.counters().values()):
            raise WrongContentsError(f"{self.case.name}: was refused, and yet something was counted")

    @property
    def _old_side(self) -> int:
        """Which memory holds what the old side wrote."""
        return 0

    def request(self) -> None:
        """Ask for the conversion of the first range, alone: for cases that are refused."""
        attributes = MemoryAttribute.PRIVATE if self.case.to_private else 0
        self.gmem.set_memory_attributes(0, self.case.range, attributes, int(self.case.key.flag))


class LegacyScene(Scene):
    """A case with two backings: the attribute flips, contents are copied across, the old side is discarded.

    The copy crosses once: the new side's writer reads the old side directly. A guest that has to bounce its
    own data through a third place pays twice.
    """

    vm: LegacyVm

    def __init__(self, case: Case, memory: Memory, reference: Reference, count: int = 1) -> None:
        super().__init__(case, memory, reference, count)
        self.accepts = False  # the copy to private memory needed that already
        self._loads = case.platform.coco and case.key.phase == Phase.LAUNCHING

    def prepare(self, *, written: bool = True) -> None:
        """See `Scene.prepare`; contents are always written, because a discard took the old ones away."""
        case = self.case
        self._new_vm(GuestMemfdFlag.MMAP)
        if case.key.phase == Phase.RUNNING:
            self.vm.launch_finish()
        if not case.platform.private_memory:
            self._write(0, self.size, shared=True)
        else:
            if not case.to_private:
                self.vm.set_memory_attributes(0, self.size, MemoryAttribute.PRIVATE)
            self._write(0, self.size, shared=case.to_private)
            # The conversion before discarded what is the new side now: its pages are to be faulted in again.
            self._memory.side(0 if case.to_private else 1).release(0, self.size)
        self._before = self.vm.counters

    def run(self) -> Steps:
        """Convert the ranges one after the other; the VM-fd ioctl has no batches."""
        convert, copy = Lap(size=self.size), Lap(size=self.size)
        step = self._to_private if self.case.to_private else self._to_shared
        for start in range(0, self.size, self.case.range):
            step(start, convert, copy)
        if self.case.transfer is None:
            return Steps(convert, None)
        # What was discarded is taken back at once, untimed: a hypervisor below may reclaim memory that stays
        # free, and the next run would be about getting it back.
        self._memory.side(1 if self.case.to_private else 0).words[: self.size // 8 : PAGE_SIZE // 8] = 0
        return Steps(convert, copy)

    def _to_private(self, start: int, convert: Lap, copy: Lap) -> None:
        size = self.case.range
        convert.time(self.vm.set_memory_attributes, start, size, MemoryAttribute.PRIVATE)
        if not self._loads:
            copy.time(self.vm.accept, start, size)
        write = self._load if self._loads else self.vm.guest_write
        for low, high in pieces(start, start + size):
            copy.time(write, low, copy.time(self.gmem.host_read, low, high - low))
        convert.time(self.gmem.discard_shared, start, size)

    def _to_shared(self, start: int, convert: Lap, copy: Lap) -> None:
        size = self.case.range
        if self.case.transfer is not None:
            for low, high in pieces(start, start + size):
                copy.time(self.gmem.host_write, low, copy.time(self.vm.guest_read, low, high - low))
        convert.time(self.vm.set_memory_attributes, start, size, 0)
        if self.case.transfer is not None:
            convert.time(self.gmem.fallocate, PUNCH_HOLE, start, size)

    def _private_pages(self) -> Any:
        pages = np.zeros(self.size >> PAGE_SHIFT, np.bool_)
        for start, end in self.vm.private_frames():
            pages[start:end] = True
        return pages

    @property
    def _old_side(self) -> int:
        return 0 if self.case.platform.private_memory and not self.case.to_private else 1

    def request(self) -> None:
        """See `Scene.request`."""
        attributes = MemoryAttribute.PRIVATE if self.case.to_private else 0
        self.vm.set_memory_attributes(0, self.case.range, attributes, int(self.case.key.flag))


def new_scene(case: Case, memory: Memory, reference: Reference, count: int = 1) -> Scene:
    """Return the scene that the case's revision needs."""
    kind = LegacyScene if case.abi.legacy else Scene
    return kind(case, memory, reference, count)
