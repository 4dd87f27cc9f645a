"""What a real kernel takes: operations of guest_memfd, timed in turn with memcpy and memset.

Each operation is an `Action`: it is set up, run once under the clock, and taken down again. Actions are
sampled round by round, so a disturbance of the machine is spread over all of them. What a host can't do has
the reason instead of samples.
"""

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from gmemcore.kvm import Host, KernelTransport, KvmFile, KvmUnavailableError, KvmVm, VmOffer, probe
from gmemcore.kvm.transport import Transport
from gmemcore.policy import PLATFORMS
from gmemcore.results.bench import BenchCell, BenchFirst, Seconds, Spread
from gmemcore.results.environment import environment
from gmemcore.results.statistics import interval, p95, ratio, variation
from gmemcore.uapi import (
    PAGE_SIZE,
    Direction,
    FallocateMode,
    Firmware,
    GuestMemfdFlag,
    MemoryAttribute,
    Phase,
    VmType,
)
from gmemcore.units import size_words
from gmemcore.workload.cost import CALL, Figure

PUNCH: Final = FallocateMode.KEEP_SIZE | FallocateMode.PUNCH_HOLE
BOTH: Final = GuestMemfdFlag.MMAP | GuestMemfdFlag.INIT_SHARED
GPA: Final = 4 << 30
RANGES: Final = (PAGE_SIZE, 64 << 10, 2 << 20, 64 << 20, 1 << 30)
"""Bytes of one attribute call, as far as the memory goes."""
MOST_CALLS: Final = 1000
"""Attribute calls of one sample."""
_ALTERNATING: Final = "alternating"
_UNIFORM: Final = "uniform"


@dataclass(slots=True)
class Action:
    """One operation at one size, and its samples.

    Attributes
    ----------
    operation : str
        What is timed.
    range : int
        Bytes of one call, or of the whole where it is no call.
    calls, pages : int
        Calls and pages of one sample; its time is divided by them. 0 where that says nothing.
    sample : callable or None
        Runs it once and returns the seconds; None: not offered.
    direction : Direction or None
        Of a conversion.
    fragmentation : str
        ``uniform`` or ``alternating``: attributes before the call.
    why : str
        Why it isn't offered.
    samples : list of float
        Seconds.
    """

    operation: str
    range: int
    calls: int = 0
    pages: int = 0
    sample: Callable[[], float] | None = None
    direction: Direction | None = None
    fragmentation: str = _UNIFORM
    why: str = ""
    samples: list[float] = field(default_factory=list)

    @property
    def words(self) -> str:
        """Its name, with whatever tells it from others of that name."""
        way = self.direction.replace("_", " ") if self.direction else ""
        shape = "" if self.fragmentation == _UNIFORM else self.fragmentation
        return ", ".join(filter(None, (self.operation, way, shape, size_words(self.range))))


class Bench:
    """The actions of one VM type on one host.

    Parameters
    ----------
    transport : Transport
        The kernel.
    host : Host
        What it offers, by `probe`.
    vm_type : VmType
        One that it offers.
    memory : int
        Bytes that actions work on.
    """

    def __init__(self, transport: Transport, host: Host, vm_type: VmType, memory: int) -> None:
        self.transport = transport
        self.offer: VmOffer = host.offers[vm_type]
        self.memory = memory
        self.pages = memory // PAGE_SIZE
        self._private = PLATFORMS[vm_type].private_memory
        self._two = not self.offer.in_place and self._private
        self._source: NDArray[np.uint8] = np.ones(memory, np.uint8)
        self._target: NDArray[np.uint8] = np.ones(memory, np.uint8)

    def actions(self) -> list[Action]:
        """Return everything that is timed, primitives first; what isn't offered has no sample."""
        found = [
            Action("memcpy", self.memory, pages=self.pages, sample=self._memcpy),
            Action("memset", self.memory, pages=self.pages, sample=self._memset),
            Action("create a file", self.memory, calls=1, sample=self._create),
            *self._host_actions(),
            *self._guest_actions(),
            *self._attribute_actions(),
            *self._refaults(),
            *self._whole_conversions(),
        ]
        return [action for action in found if action is not None]

    # ---- what there is -------------------------------------------------------------------------------------

    def _host_actions(self) -> Iterator[Action]:
        for name, sample in (
            ("first touch by the host, 4 KiB steps", self._host_touch),
            ("first touch by the host, MADV_POPULATE_WRITE", self._populate),
            ("munmap of touched memory", self._munmap),
        ):
            yield self._offered(name, self.memory, sample, why=self._why_no_mapping(), pages=self.pages)
        for name, sample in (
            ("fallocate", self._fallocate),
            ("PUNCH_HOLE of allocated memory", self._punch),
        ):
            yield self._offered(name, self.memory, sample, why="", pages=self.pages)

    def _guest_actions(self) -> Iterator[Action]:
        why = self.offer.guest or ""
        yield self._offered(
            "first touch by the guest, shared",
            self.memory,
            lambda: self._guest_touch(private=False),
            why=why,
            pages=self.pages,
        )
        yield self._offered(
            "first touch by the guest, private",
            self.memory,
            lambda: self._guest_touch(private=True),
            why=why or self._why_no_private(),
            pages=self.pages,
        )

    def _attribute_actions(self) -> Iterator[Action]:
        for in_place in (False, True):
            name = f"KVM_SET_MEMORY_ATTRIBUTES{'2' if in_place else ''}"
            for size in (size for size in RANGES if size <= self.memory):
                for direction in Direction:
                    for fragmentation in (_UNIFORM, _ALTERNATING) if size > PAGE_SIZE else (_UNIFORM,):
                        yield self._attribute_action(name, size, direction, fragmentation, in_place)

    def _attribute_action(
        self, name: str, size: int, direction: Direction, fragmentation: str, in_place: bool
    ) -> Action:
        why = self._why_no_private() or self._why_no_attributes(in_place)
        calls = min(self.memory // size, MOST_CALLS)
        return Action(
            operation=name,
            range=size,
            calls=calls,
            pages=calls * size // PAGE_SIZE,
            sample=None if why else lambda: self._attributes(size, calls, direction, fragmentation, in_place),
            direction=direction,
            fragmentation=fragmentation,
            why=why,
        )

    def _refaults(self) -> Iterator[Action]:
        why = self._why_no_private()
        yield self._offered(
            "touch by the host after a conversion",
            self.memory,
            self._host_refault,
            why=why or ("" if self.offer.in_place else "the host's memory isn't converted: it lies beside"),
            pages=self.pages,
        )
        yield self._offered(
            "touch by the guest after a conversion",
            self.memory,
            self._guest_refault,
            why=why or self.offer.guest or "",
            pages=self.pages,
        )

    def _whole_conversions(self) -> Iterator[Action]:
        why = self._why_no_private() or self.offer.guest or ""
        yield self._offered(
            "conversion to private with two backings: attribute, discard, fault, copy",
            self.memory,
            self._convert_two,
            why=why or ("" if self._two else "this kernel converts in place"),
            pages=self.pages,
        )
        yield self._offered(
            "conversion to private in place: one call",
            self.memory,
            self._convert_in_place,
            why=why or ("" if self.offer.in_place else "no KVM_SET_MEMORY_ATTRIBUTES2 (called: ENOTTY)"),
            pages=self.pages,
        )

    def _offered(
        self, name: str, size: int, sample: Callable[[], float], *, why: str, pages: int = 0
    ) -> Action:
        return Action(name, size, pages=pages, sample=None if why else sample, why=why)

    def _why_no_mapping(self) -> str:
        flags = self.offer.creation_flags or 0
        return "" if self._two or flags & BOTH == BOTH else "no guest_memfd that the host can map at once"

    def _why_no_private(self) -> str:
        return "" if self._private else f"VM type {self.offer.vm_type} has no private memory"

    def _why_no_attributes(self, in_place: bool) -> str:
        if in_place:
            return "" if self.offer.in_place else "called: ENOTTY"
        if self.offer.in_place:
            return "attributes belong to the file"
        return "" if self.offer.vm_attributes else "called: ENOTTY"

    # ---- the stage -----------------------------------------------------------------------------------------

    @contextmanager
    def _vm(self, *, slot: bool) -> Iterator[tuple[KvmVm, KvmFile]]:
        """A VM with one file of the whole memory, and a memslot of it if wanted."""
        with KvmVm(self.transport, self.offer.vm_type, two_backings=self._two) as vm:
            gmem = vm.create_guest_memfd(self.memory, 0 if self._two else self._flags)
            if slot:
                vm.add_memslot(0, GPA, self.memory, gmem)
            yield vm, gmem

    @property
    def _flags(self) -> int:
        return int(BOTH) & (self.offer.creation_flags or 0)

    @contextmanager
    def _mapped(self, gmem: KvmFile) -> Iterator[int]:
        address = self.transport.map(gmem.host_fd, 0, self.memory)
        try:
            yield address
        finally:
            self.transport.unmap(address, self.memory)

    def _touch_all(self, address: int) -> float:
        began = time.perf_counter()
        self.transport.touch_pages(address, self.memory)
        return time.perf_counter() - began

    # ---- samples -------------------------------------------------------------------------------------------

    def _memcpy(self) -> float:
        began = time.perf_counter()
        np.copyto(self._target, self._source)
        return time.perf_counter() - began

    def _memset(self) -> float:
        began = time.perf_counter()
        ctypes.memset(self._target.ctypes.data, 1, self.memory)
        return time.perf_counter() - began

    def _create(self) -> float:
        with KvmVm(self.transport, self.offer.vm_type) as vm:
            began = time.perf_counter()
            vm.create_guest_memfd(self.memory, self._flags)
            return time.perf_counter() - began

    def _host_touch(self) -> float:
        with self._vm(slot=False) as (_, gmem), self._mapped(gmem) as address:
            return self._touch_all(address)

    def _populate(self) -> float:
        with self._vm(slot=False) as (_, gmem), self._mapped(gmem) as address:
            began = time.perf_counter()
            self.transport.populate(address, self.memory)
            return time.perf_counter() - began

    def _munmap(self) -> float:
        with self._vm(slot=False) as (_, gmem):
            address = self.transport.map(gmem.host_fd, 0, self.memory)
            self._touch_all(address)
            began = time.perf_counter()
            self.transport.unmap(address, self.memory)
            return time.perf_counter() - began

    def _fallocate(self) -> float:
        with self._vm(slot=False) as (_, gmem):
            began = time.perf_counter()
            gmem.fallocate(FallocateMode.KEEP_SIZE, 0, self.memory)
            return time.perf_counter() - began

    def _punch(self) -> float:
        with self._vm(slot=False) as (_, gmem):
            gmem.fallocate(FallocateMode.KEEP_SIZE, 0, self.memory)
            began = time.perf_counter()
            gmem.fallocate(PUNCH, 0, self.memory)
            return time.perf_counter() - began

    def _guest_touch(self, *, private: bool) -> float:
        with self._vm(slot=True) as (vm, gmem):
            self._convert(vm, gmem, 0, self.memory, private)
            return vm.guest_touch(GPA, self.memory)

    def _convert(self, vm: KvmVm, gmem: KvmFile, offset: int, size: int, private: bool) -> None:
        attributes = int(MemoryAttribute.PRIVATE) if private else 0
        if self.offer.in_place:
            gmem.set_memory_attributes(offset, size, attributes)
        elif self._private:
            vm.set_memory_attributes(GPA + offset, size, attributes)

    def _attributes(
        self, size: int, calls: int, direction: Direction, fragmentation: str, in_place: bool
    ) -> float:
        """Convert ranges one by one, of a guest that has touched none of them."""
        to_private = direction == Direction.TO_PRIVATE
        with self._vm(slot=True) as (vm, gmem):
            if in_place:
                gmem.fallocate(FallocateMode.KEEP_SIZE, 0, calls * size)
            self._convert(vm, gmem, 0, calls * size, not to_private)
            if fragmentation == _ALTERNATING:
                for offset in range(0, calls * size, 2 * PAGE_SIZE):
                    self._convert(vm, gmem, offset, PAGE_SIZE, to_private)
            began = time.perf_counter()
            for offset in range(0, calls * size, size):
                self._convert(vm, gmem, offset, size, to_private)
            return time.perf_counter() - began

    def _host_refault(self) -> float:
        with self._vm(slot=True) as (vm, gmem), self._mapped(gmem) as address:
            self._convert(vm, gmem, 0, self.memory, False)
            self._touch_all(address)
            self._convert(vm, gmem, 0, self.memory, True)
            self._convert(vm, gmem, 0, self.memory, False)
            return self._touch_all(address)

    def _guest_refault(self) -> float:
        with self._vm(slot=True) as (vm, gmem):
            self._convert(vm, gmem, 0, self.memory, True)
            vm.guest_touch(GPA, self.memory)
            self._convert(vm, gmem, 0, self.memory, False)
            self._convert(vm, gmem, 0, self.memory, True)
            return vm.guest_touch(GPA, self.memory)

    def _convert_two(self) -> float:
        """What a VMM does where shared and private memory are two: contents are lost, so they are copied."""
        with self._vm(slot=True) as (vm, gmem), self._mapped(gmem) as address:
            self._touch_all(address)
            began = time.perf_counter()
            vm.set_memory_attributes(GPA, self.memory, int(MemoryAttribute.PRIVATE))
            gmem.discard_shared(0, self.memory)
            calls = time.perf_counter() - began
            return calls + vm.guest_touch(GPA, self.memory) + self._memcpy()

    def _convert_in_place(self) -> float:
        with self._vm(slot=True) as (vm, gmem), self._mapped(gmem) as address:
            self._convert(vm, gmem, 0, self.memory, False)
            self._touch_all(address)
            began = time.perf_counter()
            gmem.set_memory_attributes(0, self.memory, int(MemoryAttribute.PRIVATE))
            return time.perf_counter() - began


def measure(
    actions: list[Action],
    *,
    seconds: float,
    most: int = 100,
    say: Callable[[Action], None] = lambda _: None,
) -> None:
    """Sample actions round by round, for about the given time each; the first sample warms up.

    Parameters
    ----------
    actions : list of Action
        Those that are offered get their samples.
    seconds : float
        For each action.
    most : int
        Samples of each at most. There are at least five.
    say : callable
        Told what is measured for the first time.
    """
    left: dict[int, float] = {}
    offered = [action for action in actions if action.sample is not None]
    for action in offered:
        say(action)
        began = time.perf_counter()
        assert action.sample is not None
        action.sample()
        left[id(action)] = seconds - (time.perf_counter() - began)
    for number in range(most):
        for action in offered:
            assert action.sample is not None
            if number < LEAST_SAMPLES or left[id(action)] > 0:
                began = time.perf_counter()
                action.samples.append(action.sample())
                left[id(action)] -= time.perf_counter() - began


LEAST_SAMPLES: Final = 5
"""Samples that an interval needs to mean anything."""


# ---- records -----------------------------------------------------------------------------------------------
NOT_OFFERED: Final = "not offered"
"""Outcome of what a host can't do."""


def cells(stage: Bench, actions: list[Action]) -> list[BenchCell]:
    """Return actions as records of a bench run; ratios are to memcpy of the same pages."""
    copies = next(action.samples for action in actions if action.operation == "memcpy")
    return [_cell(stage, action, copies) for action in actions]


def _cell(stage: Bench, action: Action, copies: list[float]) -> BenchCell:
    samples = action.samples
    spread = interval(samples) if samples else None
    pages = spread if action.pages else None
    compared = None
    if samples and action.pages:
        paired = min(len(samples), len(copies))
        scale = action.pages / stage.pages
        compared = ratio([copy * scale for copy in copies[:paired]], samples[:paired])
    return BenchCell(
        abi=stage.offer.abi,
        vm_type=stage.offer.vm_type,
        firmware=Firmware.TODAY,
        phase=Phase.LAUNCHING,
        direction=action.direction or "",
        flag="NONE",
        outcome="OK" if samples else NOT_OFFERED,
        effect=None,
        memory=stage.memory,
        range=action.range,
        pages_allocated_before=0,
        bytes="none",
        convert_gbps=None,
        populate_gbps=None,
        first_access_gbps=None,
        ratio=compared.median if compared else None,
        seconds=Seconds(
            median=spread.median if spread else None,
            p95=p95(samples) if samples else None,
            cv=variation(samples) if samples else None,
            n=len(samples),
        ),
        counters={},
        verified_bytes=0,
        fragmentation=action.fragmentation,
        backing="guest_memfd",
        huge_pages=False,
        primitive="memcpy" if compared else None,
        samples=samples,
        operation=action.operation,
        ns_per_page=Spread.of(pages.scaled(1e9 / action.pages)) if pages else None,
        call_seconds=Spread.of(spread.scaled(1 / action.calls)) if spread and action.calls else None,
        ratio_low=compared.low if compared else None,
        ratio_high=compared.high if compared else None,
        stable=spread.stable if spread else True,
        why=action.why,
    )


def first_line(host: Host, memory: int, seconds: float, found: list[BenchCell]) -> BenchFirst:
    """Return the first line of a run."""
    gbps = {
        cell.operation: cell.memory / cell.seconds.median / 1e9
        for cell in found
        if cell.operation in ("memcpy", "memset") and cell.seconds.median
    }
    settings = {
        "command": "kvm bench",
        "kernel": host.release,
        "modules": list(host.modules),
        "memory": memory,
        "seconds": seconds,
        "backing": "guest_memfd",
    }
    return BenchFirst(environment=_environment(), primitives=gbps, settings=settings)


def _environment() -> dict[str, Any]:
    return {name: value for name, value in msgspec.to_builtins(environment()).items() if value is not None}


# ---- cost files --------------------------------------------------------------------------------------------
def kernel_costs(host: Host, found: list[BenchCell], cpu: str) -> dict[str, Figure]:
    """Return the events of a cost file that the measured operations price.

    Parameters
    ----------
    host : Host
        What was measured.
    found : list of BenchCell
        Its figures, of one VM type.
    cpu : str
        Model name of the processor.
    """
    by = f"gmemcore kvm bench on Linux {host.release}, CPU {cpu}, {datetime.now(UTC).date()}"
    costs: dict[str, Figure] = {}
    touches = _pages_of(found, "first touch by the guest, private") or _pages_of(
        found, "first touch by the host, 4 KiB steps"
    )
    if touches is not None:
        costs["pages_allocated"] = Figure(ns=_rounded(touches.ns), source=f"{by}: {touches.name}")
    calls = {
        cell.range: (cell.operation, cell.call_seconds.median * 1e9)
        for cell in found
        if cell.operation.startswith("KVM_SET_MEMORY_ATTRIBUTES")
        and cell.direction == Direction.TO_PRIVATE
        and cell.fragmentation == _UNIFORM
        and cell.call_seconds is not None
    }
    if calls:
        (small, (name, least)), (large, (_, most)) = min(calls.items()), max(calls.items())
        costs[CALL] = Figure(ns=_rounded(least), source=f"{by}: {name} of {size_words(small)}")
        if large > small:
            slope = max(most - least, 0.0) / ((large - small) // PAGE_SIZE)
            source = f"{by}: {name} of {size_words(large)}, beyond one of {size_words(small)}, per page"
            costs["pages_changed"] = Figure(ns=_rounded(slope), source=source)
    return costs


class _Touches(NamedTuple):
    name: str
    ns: float


def _pages_of(found: list[BenchCell], operation: str) -> _Touches | None:
    for cell in found:
        if cell.operation == operation and cell.ns_per_page is not None:
            return _Touches(operation, cell.ns_per_page.median)
    return None


def _rounded(value: float) -> float:
    """Four digits: more would pretend."""
    return float(f"{value:.4g}")


def calibrate_kernel(
    *, memory: int, seconds: float, say: Callable[[str], None] = lambda _: None
) -> tuple[Host, dict[str, Figure]]:
    """Measure this host's kernel for a cost file: of its VM types one with private memory, if it has any.

    Raises
    ------
    KvmUnavailableError
        ENODEV: there is no KVM, or no VM type with a guest_memfd.
    """
    with KernelTransport() as transport:
        host = probe(transport)
        kinds = [vm_type for vm_type, offer in host.offers.items() if offer.creation_flags is not None]
        if not kinds:
            raise KvmUnavailableError("this host's KVM has no VM type with a guest_memfd")
        vm_type = max(kinds, key=lambda kind: PLATFORMS[kind].private_memory)
        stage = Bench(transport, host, vm_type, memory)
        actions = stage.actions()
        measure(actions, seconds=seconds, say=lambda action: say(action.words))
        return host, kernel_costs(host, cells(stage, actions), environment().cpu or "unknown")
