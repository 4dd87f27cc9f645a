"""Set up and run one benchmark case, through the public API.

::

    prepare    a fresh Vm in the state that the case starts from                     not timed
    time       one stage over all ranges: conversion, populate or copy, access       timed
    settle     memory is present again, if the stage discarded any                   not timed
    run        every stage, each range converted and its contents brought across     verified, not timed
    check      the new side accepts where it must and reads everything; every byte is compared with `expected`

Ranges are neighbours, from the start of the file, so a primitive over the same ranges walks memory in the
same order, and a small range costs more only because it is small. A stage is one call for all ranges.
"""

import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np

from gmemcore.benchmark.axes import Fragmentation, Mask, runs_of
from gmemcore.benchmark.cases import Case, Stage, Transfer
from gmemcore.benchmark.expected import (
    PIECE,
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
from gmemcore.benchmark.memory import AttributesOnly, Memory
from gmemcore.benchmark.primitives import SOURCE as SOURCE_BYTES
from gmemcore.engine import Counters
from gmemcore.engine import kernels as layout
from gmemcore.engine.backing import discard
from gmemcore.engine.byte_operations import COUNTED
from gmemcore.engine.steps import ACCESS_KINDS, Step
from gmemcore.engine.store import Store
from gmemcore.machine import GuestMemfd, LegacyVm, VmFace, create_vm
from gmemcore.machine.huge_pages import page_order_of
from gmemcore.policy import Rank
from gmemcore.uapi import PAGE_SHIFT, PAGE_SIZE, FallocateMode, GuestMemfdFlag, MemoryAttribute, Phase

CALLS = 64
"""Single calls that are timed together."""
PUNCH_HOLE = FallocateMode.KEEP_SIZE | FallocateMode.PUNCH_HOLE

P = ParamSpec("P")
R = TypeVar("R")


class Stopwatch:
    """Adds up the seconds of calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Make a call and add its time."""
        began = time.perf_counter()
        result = call(*args, **kwargs)
        self.seconds += time.perf_counter() - began
        return result


class Scene:
    """One case, to be run any number of times.

    Parameters
    ----------
    case : Case
        Any case; a refused one can only be prepared.
    memory : Memory or AttributesOnly
        Its bytes; without any, only stages that move no byte can be timed.
    reference : Reference
        The expected contents.
    count : int
        Ranges of one run; they must fit the memory.

    Attributes
    ----------
    vm, gmem : Vm, GuestMemfd
        Those of the last `prepare`.
    touched_share : float
        Share of the ranges' bytes that the conversion writes; 1 if it writes none.
    """

    vm: VmFace
    gmem: GuestMemfd

    def __init__(
        self, case: Case, memory: Memory | AttributesOnly, reference: Reference, count: int = 1
    ) -> None:
        self.case = case
        self.size = case.range * count
        self.accepts = case.accept
        self._memory = memory
        self._reference = reference
        self._before = Counters()
        starts = np.arange(count, dtype=np.uint64) * np.uint64(case.range)
        self._ranges = starts, np.full(count, case.range, np.uint64)
        self._parts: tuple[int, Words] | None = None
        self._mask = case.mask(self.size)
        self.touched_share = case.touched(self.size) / self.size

    @property
    def count(self) -> int:
        """Return the number of ranges."""
        return len(self._ranges[0])

    # ---- before --------------------------------------------------------------------------------

    def prepare(self, stage: Stage = Stage.CONVERT, *, written: bool = True) -> None:
        """Make a fresh Vm in the state in which a stage begins.

        Parameters
        ----------
        stage : Stage
            Stages before it are run.
        written : bool
            Whether the old side's contents are written. Timing alone can do without.
        """
        case = self.case
        self._new_vm(shared=self._starts_shared)
        if case.key.phase == Phase.RUNNING:
            self.vm.launch_finish()
        if not case.uniform:
            self._fragment(written)
        elif case.rank == Rank.UNALLOCATED:
            if isinstance(self._memory, Memory):
                self._memory.side(0).words[: self.size // 8] = 0
        else:
            self._bring(0, self.size, case.rank, written)
        if self._hidden:
            self.gmem.set_memory_attributes(0, self.size, MemoryAttribute.PRIVATE)
        self._before = self.vm.counters
        if stage != Stage.CONVERT:
            self.convert()
        if stage == Stage.ACCESS and case.transfer is not None:
            self._populate()

    @property
    def _starts_shared(self) -> bool:
        """Whether the host writes first."""
        case = self.case
        return case.to_private or not case.platform.private_memory or self._hidden or self._accepted_apart

    @property
    def _accepted_apart(self) -> bool:
        """Whether some pages are accepted by the guest and others hold what the host wrote."""
        return self.case.fragmentation == Fragmentation.ALTERNATING_ACCEPTED

    @property
    def _hidden(self) -> bool:
        """Whether the range is private but holds what the host wrote, and the guest never touched it."""
        case = self.case
        return case.platform.coco and not case.to_private and case.rank == Rank.ALLOCATED

    def _new_vm(self, *, shared: bool) -> None:
        """Make a fresh Vm whose ranges start shared or private."""
        if hasattr(self, "vm"):
            self.vm.close()
        key, lender = self.case.key, self._memory.lender()
        if self.case.setting.enforce and isinstance(self._memory, Memory):
            self._memory.clear()  # bytes in unallocated pages would count as written by the host
        self.vm = create_vm(
            key.vm_type,
            self.case.abi,
            key.firmware,
            seed=self._reference.seed,
            backing=lender,
            threads=self.case.setting.threads,
            enforce="mprotect" if self.case.setting.enforce else None,
        )
        page_order = page_order_of(self.case.setting.page_size)
        flags = GuestMemfdFlag.MMAP
        if page_order:
            flags |= GuestMemfdFlag.HUGETLB
        elif shared:
            flags |= GuestMemfdFlag.INIT_SHARED
        self.gmem = self.vm.create_guest_memfd(self._memory.size, flags, page_order)
        self.vm.add_memslot(0, 0, self._memory.size, self.gmem)
        if page_order and shared:  # HUGETLB excludes INIT_SHARED
            self.gmem.set_memory_attributes(0, self.size, 0)

    # ---- fragmented, run by run ------------------------------------------------------------------

    def _fragment(self, written: bool) -> None:
        """Bring the pages that the fragmentation picks to their rank."""
        starts, sizes = runs_of(self._mask)
        if self._accepted_apart:
            self._bring(0, self.size, Rank.ALLOCATED, written)
            if self.case.to_private:
                self.gmem.set_memory_attributes_many(starts, sizes, MemoryAttribute.PRIVATE)
            else:
                self.gmem.set_memory_attributes(0, self.size, MemoryAttribute.PRIVATE)
            self._bring_runs(starts, sizes, Rank.ACCEPTED, written, shared=False)
            return
        if written and isinstance(self._memory, Memory):  # unallocated pages read as zeros, and stay warm
            pages = self._memory.side(0).words[: self.size // 8].reshape(-1, PAGE_SIZE // 8)
            pages[~self._mask] = 0
        self._bring_runs(starts, sizes, self.case.rank, written, shared=self._starts_shared)

    def _bring_runs(self, starts: Words, sizes: Words, rank: Rank, written: bool, *, shared: bool) -> None:
        """Bring runs of pages to a rank: in one call if nothing is written."""
        if written:
            for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
                self._write(start, size, shared=shared)
            return
        # The old side touches them, because fallocate takes whole huge pages.
        touch = Step.HOST_WRITE if shared else Step.GUEST_WRITE
        step = Step.ACCEPT if rank == Rank.ACCEPTED else touch
        if self.gmem.apply_many(step, starts, sizes).errno.any():
            raise WrongContentsError(f"{self.case.name}: cannot bring its pages into their state")

    def _bring(self, start: int, size: int, rank: Rank, written: bool) -> None:
        """Bring the pages of a range to a rank."""
        starts, sizes = np.array([[start], [size]], np.uint64)
        self._bring_runs(starts, sizes, rank, written, shared=self._starts_shared)

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

    # ---- the stages ----------------------------------------------------------------------------

    def time(self, stage: Stage) -> float:
        """Run a stage over all ranges, batched, and return its seconds; `prepare` it first."""
        if stage == Stage.CONVERT:
            return self.convert()
        return self._populate() if stage == Stage.POPULATE else self._access()

    def call(self) -> float:
        """Return the seconds of one conversion called from Python: the mean over the first ranges."""
        attributes, flag = self._attributes, int(self.case.key.flag)
        convert, size = self.gmem.set_memory_attributes, self.case.range
        starts = self._ranges[0][:CALLS].tolist()
        began = time.perf_counter()
        for start in starts:
            convert(start, size, attributes, flag)
        return (time.perf_counter() - began) / len(starts)

    def settle(self) -> None:
        """Leave all memory present, untimed, for what is timed next."""

    def run(self) -> None:
        """Convert all ranges, and bring contents to the new side where the case needs that."""
        self.convert()
        if self.case.transfer is not None:
            self._populate(expected=True)

    @property
    def _attributes(self) -> int:
        return int(MemoryAttribute.PRIVATE) if self.case.to_private else 0

    def convert(self) -> float:
        """Convert all ranges, in one call; return its seconds."""
        starts, sizes = self._ranges
        flag, watch = int(self.case.key.flag), Stopwatch()
        if len(starts) == 1:
            done = watch(self.gmem.set_memory_attributes, 0, self.size, self._attributes, flag).counters
        else:
            batch = watch(self.gmem.set_memory_attributes_many, starts, sizes, self._attributes, flag)
            if batch.errno.any():
                raise WrongContentsError(f"{self.case.name}: a request of the batch was refused")
            done = batch.total
        self._check_counters(done)
        return watch.seconds

    def _check_counters(self, converted: Counters) -> None:
        """Make sure that the conversion did to bytes what policy says, to all of them and no others."""
        found = {operation: getattr(converted, counter) for operation, counter in COUNTED.items()}
        by_operation = self.case.bytes_by_operation(self.size)
        expected = {kind: by_operation[kind] for kind in found}
        if found != expected:
            raise WrongContentsError(f"{self.case.name}: bytes transformed {found}, not {expected}")

    def _populate(self, *, expected: bool = False) -> float:
        """Populate all ranges; expected: from a source of the expected contents."""
        watch = Stopwatch()
        if self.case.transfer == Transfer.IN_PLACE:
            if watch(self.gmem.apply_many, Step.POPULATE, *self._ranges).errno.any():
                raise WrongContentsError(f"{self.case.name}: a populate of the batch was refused")
            return watch.seconds
        parts, sources = self._sources(expected=expected)
        self._repeat(watch, layout.CALL_OF_LAUNCH, Step.POPULATE, parts, sources)
        return watch.seconds

    def _sources(self, *, expected: bool) -> tuple[tuple[Words, Words], Words]:
        """Return the parts of the ranges that a launch update loads each, and the address of each source.

        The expected contents are in a small buffer, which stays in the caches. Timing reads from memory.
        """
        assert isinstance(self._memory, Memory)
        piece = PIECE if expected else SOURCE_BYTES
        if self._parts is None or self._parts[0] != piece:
            starts = range(0, self.size, self.case.range)
            parts = [part for start in starts for part in pieces(start, start + self.case.range, piece)]
            self._parts = piece, np.array(parts, np.uint64).reshape(-1, 2)
        lows, highs = self._parts[1][:, 0].copy(), self._parts[1][:, 1]
        if not expected:
            source = self._memory.source()
            return (lows, highs - lows), lows % np.uint64(source.nbytes) + np.uint64(source.ctypes.data)
        words = (self._reference.words(Contents(SOURCE), *part) for part in self._parts[1].tolist())
        return (lows, highs - lows), np.array([each.ctypes.data for each in words], np.uint64)

    def _repeat(
        self,
        watch: Stopwatch,
        kind: Any,
        step: Step,
        ranges: tuple[Words, Words],
        data: Words | None = None,
        attributes: int = 0,
    ) -> None:
        """Do one call of the guest, the launch or the VMM per range, batched."""
        owner, slots = self.vm._owner, self.vm._slots()
        addresses = np.zeros_like(ranges[0]) if data is None else data
        if watch(owner.repeat, kind, slots, step, ranges, addresses, attributes=attributes) != len(addresses):
            raise WrongContentsError(f"{self.case.name}: a call of the batch was refused")

    def _access(self) -> float:
        """Let the new side accept where it must, and touch every page."""
        watch = Stopwatch()
        if self.accepts:
            watch(self.gmem.apply_many, Step.ACCEPT, *self._ranges)
        step = Step.GUEST_READ if self.case.to_private else Step.HOST_READ
        kind = ACCESS_KINDS.index(True) if self.case.to_private and self.case.platform.coco else 0
        if watch(self.gmem.apply_many, step, *self._ranges, 0, kind).errno.any():
            raise WrongContentsError(f"{self.case.name}: an access of the batch was refused")
        return watch.seconds

    # ---- after ---------------------------------------------------------------------------------

    def check(self) -> None:
        """Let the new side read everything, and compare every byte and every attribute.

        Raises
        ------
        WrongContentsError
            Naming the first thing that is wrong.
        """
        read = self.vm.guest_read if self.case.to_private else self.gmem.host_read
        for start in range(0, self.size, self.case.range):
            if self.accepts:
                self.vm.accept(start, self.case.range)
        for low, high in pieces(0, self.size):
            self._check_piece(read(low, high - low), low)
        self._check_attributes()

    def counters(self) -> Counters:
        """Return the events since `prepare`."""
        return self.vm.counters - self._before

    def _check_piece(self, data: bytes, start: int) -> None:
        """Compare what the new side read, and under the guest's key also DRAM itself."""
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
        """Compare DRAM of the old side with what was there before, and make sure that nothing was counted.

        Raises
        ------
        WrongContentsError
            Naming the first thing that changed.
        """
        before, where = contents_before(self.case), f"{self.case.name}: after the refusal DRAM holds"
        assert isinstance(self._memory, Memory)
        words = self._memory.side(self._old_side).words
        for start, end in pieces(0, self.size):
            self._reference.check(words[start // 8 : end // 8], before, start, before, where)
        if any(self.counters().values()):
            raise WrongContentsError(f"{self.case.name}: events were counted although it was refused")

    @property
    def _old_side(self) -> int:
        """The memory that holds what the old side wrote."""
        return 0

    def request(self) -> None:
        """Ask for the conversion of the first range, alone: for cases that are refused."""
        self.gmem.set_memory_attributes(0, self.case.range, self._attributes, int(self.case.key.flag))


class LegacyScene(Scene):
    """A case with two backings: the attribute flips, contents are copied across, the old side is discarded.

    The copy crosses once: the new side's writer reads the old side directly. A guest that has to bounce its
    own data through a third place pays twice.
    """

    vm: LegacyVm

    def __init__(
        self, case: Case, memory: Memory | AttributesOnly, reference: Reference, count: int = 1
    ) -> None:
        super().__init__(case, memory, reference, count)
        self.accepts = False  # the copy to private memory needed that already
        self._loads = case.platform.coco and case.key.phase == Phase.LAUNCHING

    def prepare(self, stage: Stage = Stage.CONVERT, *, written: bool = True) -> None:
        """See `Scene.prepare`."""
        case = self.case
        assert isinstance(self._memory, Memory)
        self._new_vm(shared=False)
        if case.key.phase == Phase.RUNNING:
            self.vm.launch_finish()
        shared = case.to_private or not case.platform.private_memory
        if not shared:
            self.vm.set_memory_attributes(0, self.size, MemoryAttribute.PRIVATE)
        if written:
            self._write(0, self.size, shared=shared)
        else:
            self._touch(shared=shared)
        if case.platform.private_memory:
            # The conversion before discarded what is the new side now: its pages are to be faulted in again.
            discard(self._memory.side(0 if case.to_private else 1))
        self._before = self.vm.counters
        if stage == Stage.ACCESS:
            self.run()

    def _touch(self, *, shared: bool) -> None:
        """Bring all ranges into the state after `_write`, whatever their contents."""
        if shared:
            self._take(Stopwatch(), self.gmem.sides.shared, Step.HOST_WRITE)
        elif self.case.platform.coco and self.case.key.phase == Phase.LAUNCHING:
            self._populate()
        else:
            for step in (Step.ACCEPT, Step.GUEST_WRITE):
                self._repeat(Stopwatch(), layout.CALL_OF_GUEST, step, self._ranges)

    def time(self, stage: Stage) -> float:
        """See `Scene.time`."""
        watch = Stopwatch()
        if stage == Stage.CONVERT:
            self._flip(watch)
            self._discard(watch)
        elif stage == Stage.POPULATE:
            if self.case.to_private:
                self._flip(Stopwatch())
            self._copy(watch)
        else:
            return self._access()
        return watch.seconds

    def settle(self) -> None:
        """Take back what the stage discarded.

        Primitives would otherwise fault it in. A hypervisor below may also reclaim memory that stays free,
        and the next sample would be about getting it back.
        """
        assert isinstance(self._memory, Memory)
        for side in range(2):
            self._memory.side(side).words[: self.size // 8 : PAGE_SIZE // 8] = 0

    def call(self) -> float:
        """See `Scene.call`."""
        starts, size, attributes = self._ranges[0][:CALLS].tolist(), self.case.range, self._attributes
        flip = self.vm.set_memory_attributes
        began = time.perf_counter()
        for start in starts:
            flip(start, size, attributes)
        return (time.perf_counter() - began) / len(starts)

    def run(self) -> None:
        """See `Scene.run`."""
        watch = Stopwatch()
        if self.case.to_private:
            self._flip(watch)
            self._copy(watch)
        else:
            self._copy(watch)
            self._flip(watch)
        self._discard(watch)

    def _flip(self, watch: Stopwatch) -> None:
        """Set the attributes of all ranges."""
        self._repeat(watch, layout.CALL_OF_FRAMES, Step.CONVERT, self._ranges, attributes=self._attributes)

    def _discard(self, watch: Stopwatch) -> None:
        """Discard the old side of all ranges."""
        if self.case.transfer is not None:
            private, shared = self.gmem.sides
            self._take(watch, shared if self.case.to_private else private, Step.PUNCH_HOLE)

    def _copy(self, watch: Stopwatch) -> None:
        """Copy all ranges across, once: the new side's writer reads the old side's memory, or the reverse."""
        if self.case.transfer is None:
            return
        assert isinstance(self._memory, Memory)
        shared = self._ranges[0] + np.uint64(self._memory.side(1).words.ctypes.data)
        if not self.case.to_private:
            self._take(watch, self.gmem.sides.shared, Step.HOST_WRITE)  # allocates it
            self._repeat(watch, layout.CALL_OF_GUEST, Step.GUEST_READ, self._ranges, shared)
        elif self._loads:
            self._repeat(watch, layout.CALL_OF_LAUNCH, Step.POPULATE, self._ranges, shared)
        else:
            self._repeat(watch, layout.CALL_OF_GUEST, Step.ACCEPT, self._ranges)
            self._repeat(watch, layout.CALL_OF_GUEST, Step.GUEST_WRITE, self._ranges, shared)

    def _access(self) -> float:
        watch = Stopwatch()
        if self.case.to_private:
            self._repeat(watch, layout.CALL_OF_GUEST, Step.GUEST_READ, self._ranges)
        else:
            self._take(watch, self.gmem.sides.shared, Step.HOST_READ)
        return watch.seconds

    def _take(self, watch: Stopwatch, side: Store, step: Step) -> None:
        """Take a step of one side for each range, batched."""
        if watch(side.repeat, step, self._ranges) != self.count:
            raise WrongContentsError(f"{self.case.name}: a call of the batch was refused")

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
        self.vm.set_memory_attributes(0, self.case.range, self._attributes, int(self.case.key.flag))


def new_scene(case: Case, memory: Memory | AttributesOnly, reference: Reference, count: int = 1) -> Scene:
    """Return the scene that the case's revision needs."""
    kind = LegacyScene if case.abi.legacy else Scene
    return kind(case, memory, reference, count)
