"""One backing and two: time and memory of the same work.

A guest's memory holds what the old side wrote, goes to the new side range by range, and must be there when
the new side reads it. In place that is a conversion that preserves contents. With two backings (`legacy`) the
attribute flips, contents are copied across, and the old side is discarded, to be allocated again the next
time, or kept, which takes twice the memory.

Each way runs in its own process (``python -m gmemcore.benchmark.in_place JOB``). Its peak memory is the
kernel's figure (VmHWM), so nothing that another way left behind is in it.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from gmemcore.benchmark.expected import PIECE, WRITTEN, Contents, Reference, WrongContentsError, pieces
from gmemcore.engine import warmup
from gmemcore.engine.host import keep_freed_memory
from gmemcore.errors import GmemError, InvalidArgumentError, UnsupportedOperationError
from gmemcore.machine import GuestMemfd, VmFace, create_vm
from gmemcore.policy import ABIS, OK, PLATFORMS, cells, content_flags, get_abi
from gmemcore.results.backings import Measured
from gmemcore.spelling import option
from gmemcore.uapi import (
    Direction,
    FallocateMode,
    Firmware,
    GuestMemfdFlag,
    MemoryAttribute,
    Phase,
    VmType,
)
from gmemcore.units import format_size

PUNCH_HOLE: Final = FallocateMode.KEEP_SIZE | FallocateMode.PUNCH_HOLE
MOST_POINTS: Final = 200
"""Measurements of memory in one run: enough for a line."""
WAYS: Final = ("in place", "legacy, discarding", "legacy, keeping both")
"""Ways to bring guest memory to the other side."""
WORKS: Final = ("launch", "round trip")
"""The initial image, from the host to the guest; or everything to private and back, repeatedly."""
PREFERRED: Final = (("v5", Firmware.TODAY), ("two-caps", Firmware.CIPHER))
"""Revisions to try, in this order, for a conversion that preserves contents."""


@dataclass(frozen=True, slots=True)
class Job:
    """One way to do one work.

    Attributes
    ----------
    work, way : str
        Of `WORKS` and `WAYS`.
    vm_type, abi, firmware : str
        The guest.
    to_private, to_shared : int
        Content flags that preserve.
    memory, range : int
        Bytes of the guest, and of one conversion.
    rounds : int
        Round trips; a launch is one way.
    backing : str
        ``anonymous``, ``memfd`` or ``guest_memfd``.
    huge_pages : bool
        For anonymous memory.
    """

    work: str
    way: str
    vm_type: str
    abi: str
    firmware: str
    to_private: int
    to_shared: int
    memory: int
    range: int
    rounds: int
    backing: str = "anonymous"
    huge_pages: bool = False


def jobs(
    work: str, vm_type: VmType | str, memory: int, range_: int, rounds: int, backing: str = "anonymous"
) -> list[Job]:
    """Return the ways to do a work, in the order of `WAYS`.

    Raises
    ------
    UnsupportedOperationError
        EOPNOTSUPP: no revision preserves contents of this VM type both ways.
    InvalidArgumentError
        EINVAL: an unknown VM type, or memory that isn't a multiple of the range.
    """
    if memory % range_:
        raise InvalidArgumentError(
            f"{option('memory')} must be a multiple of {option('range', format_size(range_))}, "
            f"not {format_size(memory)}"
        )
    kind = VmType(next(iter(cells("v5", vm_type)))[0].vm_type)  # which says what is wrong with an unknown one
    abi, firmware, flags = _preserving(work, kind)
    common: dict[str, Any] = {
        "work": work,
        "vm_type": str(kind),
        "memory": memory,
        "range": range_,
        "rounds": 1 if work == "launch" else rounds,
        "backing": backing,
        "huge_pages": backing == "anonymous",
    }
    in_place = Job(way=WAYS[0], abi=abi, firmware=firmware, to_private=flags[0], to_shared=flags[1], **common)
    two: dict[str, Any] = {"abi": "legacy", "firmware": str(Firmware.TODAY), "to_private": 0, "to_shared": 0}
    return [in_place, *(Job(way=way, **two, **common) for way in WAYS[1:])]


def _preserving(work: str, vm_type: VmType) -> tuple[str, str, tuple[int, int]]:
    """Return the first revision that preserves contents in all of a work, and its flags."""
    launch = work == "launch"
    if launch and not PLATFORMS[vm_type].coco:
        raise UnsupportedOperationError(
            f"launch needs a VM type with an encrypted launch (SNP, TDX), not {vm_type}"
        )
    phase = Phase.LAUNCHING if launch else Phase.RUNNING
    for abi, firmware in PREFERRED:
        there = _flag(abi, vm_type, firmware, phase, Direction.TO_PRIVATE)
        back = 0 if launch else _flag(abi, vm_type, firmware, phase, Direction.TO_SHARED)
        if there is not None and back is not None and (not launch or ABIS[abi].in_place_populate):
            return abi, str(firmware), (there, back)
    raise UnsupportedOperationError(
        f"{work} of {vm_type}: none of {', '.join(abi for abi, _ in PREFERRED)} preserves its contents"
    )


def _flag(abi: str, vm_type: VmType, firmware: Firmware, phase: Phase, direction: Direction) -> int | None:
    """Return the first content flag that is accepted there and preserves, or None."""
    preserving = {row.bit for row in content_flags(abi) if row.preserves}
    for key, answer in cells(abi, vm_type, firmware):
        if (
            (key.phase, key.direction) == (phase, direction)
            and key.flag in preserving
            and answer.outcome == OK
        ):
            return int(key.flag)
    return None


# ---- the work, in a process of its own ---------------------------------------------------------------------


class MeasuredGuest:
    """A guest, and how its memory is brought to the other side.

    Parameters
    ----------
    job : Job
        The work and the way.
    """

    vm: VmFace
    gmem: GuestMemfd

    def __init__(self, job: Job) -> None:
        self.job = job
        self._legacy = get_abi(job.abi).legacy
        self._coco = PLATFORMS[VmType(job.vm_type)].coco
        self._loads = job.work == "launch"
        self._discards = job.way == WAYS[1]
        options: dict[str, Any] = {"huge_pages": True} if job.huge_pages else {}
        self.vm = create_vm(job.vm_type, job.abi, job.firmware, backing=job.backing, **options)
        flags = GuestMemfdFlag.MMAP | (GuestMemfdFlag(0) if self._legacy else GuestMemfdFlag.INIT_SHARED)
        self.gmem = self.vm.create_guest_memfd(job.memory, flags)
        self.vm.add_memslot(0, 0, job.memory, self.gmem)
        if not self._loads:
            self.vm.launch_finish()

    def to_private(self, start: int, size: int) -> None:
        """Bring a range and its contents to the guest."""
        if not self._legacy:
            self.gmem.set_memory_attributes(start, size, MemoryAttribute.PRIVATE, self.job.to_private)
            if self._loads:
                self.vm.launch_update(start, size)
            return
        self.vm.set_memory_attributes(start, size, MemoryAttribute.PRIVATE)
        if self._coco and not self._loads:
            self.vm.accept(start, size)
        for low, high in pieces(start, start + size):
            data = self.gmem.host_read(low, high - low)
            if self._loads:
                self.vm.launch_update(low, high - low, data)
            else:
                self.vm.guest_write(low, data)
        if self._discards:
            self.gmem.discard_shared(start, size)

    def to_shared(self, start: int, size: int) -> None:
        """Bring a range and its contents to the host."""
        if not self._legacy:
            self.gmem.set_memory_attributes(start, size, 0, self.job.to_shared)
            return
        for low, high in pieces(start, start + size):
            self.gmem.host_write(low, self.vm.guest_read(low, high - low))
        self.vm.set_memory_attributes(start, size, 0)
        if self._discards:
            self.gmem.fallocate(PUNCH_HOLE, start, size)


class Meter:
    """Measures seconds and resident memory of this process from its creation on."""

    def __init__(self, job: Job) -> None:
        self.measured = Measured()
        self._base = _resident()
        self._every = max(
            job.memory // job.range * (1 + (job.work != "launch")) * job.rounds // MOST_POINTS, 1
        )
        self._calls = 0
        self._elapsed = 0.0
        with suppress(OSError):  # not on every kernel; the peak so far is less than a guest
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak

    def leg(self, step: Callable[[int, int], None], job: Job, into: list[float]) -> None:
        """Time one way of all memory to the other side, range by range; its seconds go into a list."""
        began_faults = _faults()
        total = 0.0
        self._note()
        for start in range(0, job.memory, job.range):
            began = time.perf_counter()
            step(start, job.range)
            taken = time.perf_counter() - began
            total, self._elapsed, self._calls = total + taken, self._elapsed + taken, self._calls + 1
            if self._calls % self._every == 0:
                self._note()
        into.append(total)
        self.measured.faults += _faults() - began_faults

    def finish(self) -> Measured:
        """Return what was measured, with the peak."""
        self._note()
        highest = max(resident for _, resident in self.measured.memory)
        self.measured.peak_bytes = max(_peak() - self._base, highest)
        return self.measured

    def _note(self) -> None:
        self.measured.memory.append((self._elapsed, max(_resident() - self._base, 0)))


def run(job: Job) -> Measured:
    """Do a job in this process.

    Raises
    ------
    WrongContentsError
        The new side doesn't read what the old side wrote.
    """
    warmup()
    keep_freed_memory()
    reference, written = Reference(), Contents(WRITTEN)

    def words(low: int, high: int) -> Any:
        return reference.words(written, low, high).view(np.uint8)

    # What the work needs besides the guest is allocated before memory is counted.
    first = MeasuredGuest(replace(job, memory=min(job.range, PIECE)))
    first.gmem.host_write(0, words(0, first.gmem.size))
    first.to_private(0, first.gmem.size)
    if job.work != "launch":
        first.to_shared(0, first.gmem.size)
    first.vm.close()

    meter, guest = Meter(job), MeasuredGuest(job)
    for low, high in pieces(0, job.memory):
        guest.gmem.host_write(low, words(low, high))

    def check(read: Callable[[int, int], bytes], who: str) -> None:
        for low, high in pieces(0, job.memory):
            found = np.frombuffer(read(low, high - low), np.uint64)
            reference.check(found, written, low, written, f"{job.way}: the {who} reads")
            meter.measured.verified_bytes += high - low

    for _ in range(job.rounds):
        meter.leg(guest.to_private, job, meter.measured.to_private)
        check(guest.vm.guest_read, "guest")
        if job.work != "launch":
            meter.leg(guest.to_shared, job, meter.measured.to_shared)
            check(guest.gmem.host_read, "host")
    return meter.finish()


def run_apart(job: Job) -> Measured:
    """Do a job in a new process.

    Raises
    ------
    WrongContentsError
        As `run`.
    GmemError
        EOPNOTSUPP: the process failed; with its last line.
    """
    command = [sys.executable, "-m", "gmemcore.benchmark.in_place", json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  this module
    if done.returncode == 1:
        raise WrongContentsError(done.stderr.strip())
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UnsupportedOperationError(f"{job.way}, {job.vm_type}: exit status {done.returncode}: {last}")
    return msgspec.json.decode(done.stdout, type=Measured)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    figures = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(figures[0]) << 10 if figures else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def main(arguments: list[str]) -> int:
    """Do the job that the one argument describes, and print what it took."""
    try:
        print(msgspec.json.encode(run(Job(**json.loads(arguments[0])))).decode())
    except WrongContentsError as error:
        print(error.args[0], file=sys.stderr)
        return 1
    except GmemError as error:
        print(error.strerror or error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
