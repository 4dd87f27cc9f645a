"""Replay: a trace on any Vm: what it costs, and where it is refused."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine import Counters
from gmemcore.engine.steps import Step
from gmemcore.errors import InvalidArgumentError
from gmemcore.machine import VmFace, create_vm
from gmemcore.machine.huge_pages import page_order_of
from gmemcore.names import member
from gmemcore.policy import Abi, cell, check_pages, get_abi
from gmemcore.uapi import (
    PAGE_SIZE,
    ContentMode,
    ContentWork,
    Direction,
    Firmware,
    MemoryAttribute,
    Phase,
    VmType,
)
from gmemcore.units import format_bytes, format_size
from gmemcore.vmm.probe import probe
from gmemcore.workload.layout import Layout
from gmemcore.workload.operations import Operations
from gmemcore.workload.outcomes import NAMES, Outcomes
from gmemcore.workload.player import Player, build
from gmemcore.workload.touches import always_shared
from gmemcore.workload.trace import Trace
from gmemcore.workload.vfio import Mappings, mappings

FIRST_REFUSALS: Final = 20
"""Refusals of a replay that are kept one by one; all of them are counted."""
_CHUNK: Final = 8192
_SAMPLES: Final = 64
_RARELY: Final = 8  # chunks of `legacy` between two counts of its runs, which are lists


class Flags(StrEnum):
    """Which content flag a replay asks for in its conversions."""

    AS_RECORDED = "as-recorded"
    """What the trace has."""
    NONE = "none"
    """None at all: contents are unspecified afterwards."""
    PRESERVE = "preserve"
    """PRESERVE in every conversion: would it have worked?"""
    ZERO = "zero"
    """ZERO to shared, the one direction it is documented for; none to private."""
    BEST = "best"
    """What `gmemcore.vmm.Vmm.convert_keeping` ends up with, by phase and direction: flags that capabilities
    let it believe to keep contents, tried in turn; none where none is believed."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a trace is replayed.

    Attributes
    ----------
    abi : str or Abi
        A revision, `legacy`, or a proposal.
    vm_type : VmType, str or int
        Type of the guest.
    firmware : Firmware or str
        ``today`` or ``cipher``.
    page_size : str or int
        Pages that files consist of: ``"4k"``, or ``"2m"`` and ``"1g"`` under a revision with huge pages.

    Raises
    ------
    InvalidArgumentError
        EINVAL: a page size that the revision or the VM type can't have.
    """

    abi: str | Abi
    vm_type: VmType | str | int
    firmware: Firmware | str = Firmware.TODAY
    page_size: str | int = PAGE_SIZE

    def __post_init__(self) -> None:
        check_pages(get_abi(self.abi), member(VmType, self.vm_type), PAGE_SIZE << self.page_order)

    @property
    def page_order(self) -> int:
        """Order of the pages that files consist of."""
        return page_order_of(self.page_size)


@dataclass(frozen=True, slots=True)
class Refusal:
    """One operation that was refused.

    Attributes
    ----------
    operation : int
        Its number in the trace, from 0.
    step, outcome : str
        What it was, and the errno or exit it ended with.
    gpa, size : int
        Its range, bytes.
    error_gpa : int
        Where it stopped.
    attributes, flags : int
        Of a conversion, as it was asked for.
    """

    operation: int
    step: str
    outcome: str
    gpa: int
    size: int
    error_gpa: int
    attributes: int
    flags: int


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of a replay.

    Attributes
    ----------
    abi, vm_type, firmware : str
        The target.
    operations, refused : int
        How many were run, and how many of them did not end well.
    conversions : int
        How many of them were conversion requests, refused ones included.
    reasons : dict of (step, outcome) to int
        Refusals by step and reason, the most frequent first.
    first_refusals : tuple of Refusal
        The first `FIRST_REFUSALS`.
    counters : Counters
        Events.
    seconds : float
        This model's time on this machine, with making contents and measuring them.
    page_size : int
        Bytes of the pages that files consist of.
    peak_memory : int
        Most guest memory that was allocated, bytes, both sides in `legacy`, whole huge pages where there are
        some; checked after each chunk.
    peak_struct_pages : int
        Most memory that split huge pages needed for their struct pages, bytes; likewise.
    file_memory : int or None
        Size of the files, bytes: the guest's memory, each region rounded up to whole pages.
    peak_mappings : Mappings
        Most DMA mappings that an assigned device needed; checked after each chunk. Pages that are shared all
        the time are not counted: they are the guest's beginning, about which a log says nothing.
    launch_digest : bytes or None
        SNP's, where there are contents and a launch.
    """

    abi: str
    vm_type: str
    firmware: str
    operations: int
    refused: int
    conversions: int
    reasons: dict[tuple[str, str], int]
    first_refusals: tuple[Refusal, ...]
    counters: Counters
    seconds: float
    peak_memory: int
    peak_mappings: Mappings
    launch_digest: bytes | None
    page_size: int = PAGE_SIZE
    peak_struct_pages: int = 0
    file_memory: int | None = None

    def asdict(self) -> dict[str, Any]:
        """Return it as JSON has it, see `gmemcore.results.replay.Replay`."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return plain | {
            "reasons": [
                {"step": step, "outcome": outcome, "operations": count}
                for (step, outcome), count in self.reasons.items()
            ],
            "first_refusals": [asdict(refusal) for refusal in self.first_refusals],
            "counters": self.counters.asdict(),
            "peak_mappings": self.peak_mappings._asdict(),
            "launch_digest": None if self.launch_digest is None else self.launch_digest.hex(),
        }


def kept_bytes(
    backing: str | None, contents: ContentWork | str | None, threads: int = 1
) -> tuple[str, ContentWork]:
    """Return the backing of a guest, and when its contents change.

    Parameters
    ----------
    backing : str or None
        None: attributes only, or anonymous memory if contents are asked for.
    contents : ContentWork, str or None
        None: deferred if the backing has bytes, unless threads ask for eager ones.

    Raises
    ------
    InvalidArgumentError
        EINVAL: deferred contents of a backing without bytes, or with threads.
    """
    asked = None if contents is None else member(ContentWork, contents)
    if backing is None:
        backing = "none" if asked is None else "anonymous"
    if asked == ContentWork.DEFERRED and backing == "none":
        raise InvalidArgumentError("backing none has no contents; use anonymous or memfd")
    if asked == ContentWork.DEFERRED and threads > 1:
        raise InvalidArgumentError("threads work on bytes, which deferred contents leave alone; use eager")
    eager = backing == "none" or threads > 1
    return backing, asked or (ContentWork.EAGER if eager else ContentWork.DEFERRED)


def replay(
    trace: Trace,
    target: Target,
    *,
    seed: int = 0,
    backing: str | None = None,
    contents: ContentWork | str | None = None,
    flags: Flags | str = Flags.AS_RECORDED,
    discard: bool = True,
    threads: int = 1,
    progress: Callable[[int], object] | None = None,
    watch: Callable[[VmFace, int], object] | None = None,
    every: int | None = None,
) -> Replayed:
    """Build a guest as a trace says and run its operations on it.

    Parameters
    ----------
    trace : Trace
        Of one guest.
    target : Target
        Revision, VM type and firmware.
    seed : int
        The Vm's; contents are of the trace's own seed.
    backing : str or None
        ``none`` (attributes only), or one that holds bytes. None: see `kept_bytes`.
    contents : ContentWork, str or None
        When bytes change; affects time and memory only. None: deferred, or eager with several threads.
    flags : Flags or str
        What conversions ask for.
    discard : bool
        Whether the VMM discards the side that a `legacy` conversion left.
    threads : int
        That work on one long range of a guest with bytes; nothing but time depends on it.
    progress : callable or None
        Called with the number of operations run, after each chunk.
    watch : callable or None
        Called with the guest and the number of operations run, at the end; `Series.take` of
        `gmemcore.analysis` is one. Its time counts.
    every : int or None
        Operations between further calls of `watch`, the first of them before the first operation.

    Raises
    ------
    InvalidArgumentError
        EINVAL: operations of several guests, a name that doesn't exist, `every` below 1, or what `kept_bytes`
        refuses.
    OutOfMemoryError
        ENOMEM: the host can't hold the guest.
    """
    if len(np.unique(trace.operations["guest"])) > 1:
        raise InvalidArgumentError("the trace is of several guests; use a trace of one")
    if every is not None and every < 1:
        raise InvalidArgumentError(f"every must be 1 or more operations, not {every}")
    backing, contents = kept_bytes(backing, contents, threads)
    guest = target.vm_type, target.abi, target.firmware, seed, backing
    with closing(create_vm(*guest, threads=threads, contents=contents)) as vm:
        operations = with_flags(trace.operations, vm, member(Flags, flags))
        build(vm, trace.header.layout, trace.start, target.page_order)
        measures = _starts_measurement(vm, operations)
        player = Player(vm, seed=trace.header.seed, discard=discard)
        began = time.perf_counter()
        found, peak, struct_pages, mapped = _run(player, operations, progress, watch, every)
        seconds = time.perf_counter() - began
        refused = np.flatnonzero(found["code"])
        return Replayed(
            vm.abi.name,
            vm.vm_type.value,
            vm.firmware.value,
            len(operations),
            len(refused),
            int(np.count_nonzero(operations["step"] == Step.CONVERT)),
            _reasons(operations[refused], found[refused]),
            tuple(_refusal(int(i), operations[i], found[i]) for i in refused[:FIRST_REFUSALS]),
            player.counters,
            seconds,
            peak,
            _converted(trace, mapped),
            vm.launch_measurement if measures else None,
            PAGE_SIZE << target.page_order,
            struct_pages,
            sum(gmem.size for gmem in vm.files),
        )


def _run(
    player: Player,
    operations: Operations,
    progress: Callable[[int], object] | None,
    watch: Callable[[VmFace, int], object] | None,
    every: int | None,
) -> tuple[Outcomes, int, int, Mappings]:
    """Run everything in chunks; return the outcomes, and the peaks of memory, struct pages and mappings."""
    total = len(operations)
    chunk = min(max(total // _SAMPLES, 64), _CHUNK)
    looks = {total, *(() if every is None else range(0, total, every))}
    outcomes, peak, struct_pages, mapped = [], 0, 0, Mappings()
    for start, end in pairwise([0, *sorted(looks | set(range(0, total, chunk)))]):
        outcomes.append(player.run(operations[start:end]))
        peak = max(peak, sum(sum(gmem.mapped_bytes().values()) for gmem in player.vm.files))
        struct_pages = max(struct_pages, sum(gmem.struct_page_bytes for gmem in player.vm.files))
        if end > start and (not player.vm.abi.legacy or end == total or end // chunk % _RARELY == 0):
            mapped = max(mapped, mappings(player.vm))
        if progress is not None:
            progress(end)
        if watch is not None and end in looks:
            watch(player.vm, end)
    return np.concatenate(outcomes), peak, struct_pages, mapped


def _converted(trace: Trace, mapped: Mappings) -> Mappings:
    """Return the mappings of pages that were ever converted."""
    if not mapped.reach_limit:
        return mapped
    return mapped._replace(pages=mapped.pages - always_shared(trace))


def _starts_measurement(vm: VmFace, operations: Operations) -> bool:
    """Begin a launch digest, where there is one to keep and something to measure."""
    populate = vm.platform.populate
    has_launch = bool((operations["step"] == Step.POPULATE).any())
    measures = has_launch and populate is not None and populate.measures
    if measures and all(gmem.has_bytes for gmem in vm.files):
        vm.start_measurement()
        return True
    return False


# ---- flags -------------------------------------------------------------------------------------------------
def with_flags(operations: Operations, vm: VmFace, flags: Flags) -> Operations:
    """Return operations whose conversions ask for other content flags; see `Flags`."""
    if flags == Flags.AS_RECORDED:
        return operations
    changed = operations.copy()
    converts = changed["step"] == Step.CONVERT
    to_private = (changed["attributes"] & np.uint64(MemoryAttribute.PRIVATE)) > 0
    running = np.logical_or.accumulate(changed["step"] == Step.LAUNCH_FINISH)
    for phase, in_phase in ((Phase.LAUNCHING, ~running), (Phase.RUNNING, running)):
        for direction, that_way in ((Direction.TO_PRIVATE, to_private), (Direction.TO_SHARED, ~to_private)):
            changed["flags"][converts & in_phase & that_way] = _flag(vm, flags, phase, direction)
    return changed


def _flag(vm: VmFace, flags: Flags, phase: Phase, direction: Direction) -> int:
    if flags == Flags.PRESERVE:
        return int(ContentMode.PRESERVE)
    if flags == Flags.ZERO and direction == Direction.TO_SHARED:
        return int(ContentMode.ZERO)
    return _best(vm, phase, direction) if flags == Flags.BEST else 0


def _best(vm: VmFace, phase: Phase, direction: Direction) -> int:
    """The first flag believed that is answered ok; if none of them is, the first, to be refused."""
    believed = [flag.bit for flag in probe(vm).preserving(phase, direction)]
    for bit in believed:
        if cell(vm.abi, vm.vm_type, vm.firmware, phase, direction, bit).outcome == "OK":
            return int(bit)
    return int(believed[0]) if believed else 0


# ---- refusals ----------------------------------------------------------------------------------------------
def _reasons(operations: Operations, outcomes: Outcomes) -> dict[tuple[str, str], int]:
    """Count refusals by step and outcome."""
    pairs: NDArray[np.uint32] = operations["step"].astype(np.uint32) << np.uint32(16) | outcomes["code"]
    values, counts = np.unique(pairs, return_counts=True)
    counted = Counter(
        {
            (Step(value >> 16).name, NAMES[value & 0xFFFF]): count
            for value, count in zip(values.tolist(), counts.tolist(), strict=True)
        }
    )
    return dict(counted.most_common())


def _refusal(number: int, operation: Operations, outcome: Outcomes) -> Refusal:
    step, _, _, gpa, size, attributes, flags, _ = operation.tolist()
    code, error_gpa = outcome.tolist()
    return Refusal(number, Step(step).name, NAMES[code], gpa, size, error_gpa, attributes, flags)


def rounding_note(layout: Layout, page_size: int) -> str | None:
    """Return what to say of files that are larger than the guest's memory; None: they aren't."""
    size = layout.file_memory(page_size)
    if size == layout.size:
        return None
    return (
        f"page size {format_size(page_size)}: files are rounded up to whole pages, "
        f"{format_bytes(size)} for {format_bytes(layout.size)} of memory."
    )


def targets(
    abis: Sequence[str | Abi],
    vm_types: Sequence[VmType | str | int],
    firmware: Firmware | str = Firmware.TODAY,
    page_sizes: Sequence[str | int] = (PAGE_SIZE,),
) -> tuple[Target, ...]:
    """Return every revision on every VM type in pages of every size, by VM type."""
    return tuple(
        Target(get_abi(abi), vm_type, firmware, page_size)
        for vm_type in vm_types
        for abi in abis
        for page_size in page_sizes
    )
