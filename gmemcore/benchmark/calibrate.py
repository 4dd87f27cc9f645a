"""Calibration: the part of a cost file that this host can measure, without confidential hardware.

It measures the primitives that the engine and the kernel use: a lower bound on the cost of a conversion.
"""

import ctypes
import mmap
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Final

import numpy as np

from gmemcore.benchmark.axes import DEFAULT_SETTING
from gmemcore.benchmark.flushing import INSTRUCTION, LINE, flush_seconds
from gmemcore.benchmark.memory import Memory
from gmemcore.benchmark.primitives import SOURCE, Primitives
from gmemcore.engine import warmup
from gmemcore.machine import create_vm
from gmemcore.results.environment import environment
from gmemcore.results.statistics import median
from gmemcore.uapi import PAGE_SIZE, GuestMemfdFlag, MemoryAttribute
from gmemcore.units import format_size
from gmemcore.workload.cost import CALL, CostFile, Figure

ROUNDS: Final = 20
_CALLS: Final = 10_000
_TOUCHED: Final = 64 << 20
_FLUSHED: Final = 256 << 10  # all of it fits into the second-level cache of a server
_PRIVATE: Final = int(MemoryAttribute.PRIVATE)


def calibrate(
    size: int = SOURCE, *, rounds: int | None = None, say: Callable[[str], None] = lambda _: None
) -> CostFile:
    """Measure on this host what can be measured, and return it as a cost file.

    Parameters
    ----------
    size : int
        Bytes per primitive, a multiple of the page size.
    rounds : int
        Measurements per figure, which is their median; None: `ROUNDS`.
    say : callable
        Called with what is measured next.
    """
    rounds = ROUNDS if rounds is None else rounds
    warmup()
    host = environment()
    by = (
        f"measured by gmemcore {host.gmemcore} on CPU {host.cpu}, {datetime.now(UTC).date()}, "
        f"one thread, median of {rounds}"
    )
    say("zeroing and XOR")
    memory = Memory(size, DEFAULT_SETTING.backing)
    primitives = Primitives(memory.side(0).words, memory.source())
    speeds = {
        name: size / _median(rounds, partial(primitives.seconds, name, size, size)) / 1e9
        for name in ("memset", "xor")
    }
    by_name = {name: primitives.names[name, size] for name in speeds}
    primitives.close()
    memory.close()
    over = f"over {format_size(size)}"
    say("scrambling")
    scrambled = size / _scramble(size, rounds) / 1e9
    say("first touches")
    touch_size = min(size, _TOUCHED)
    touched = _first_touch(touch_size, rounds) / (touch_size // PAGE_SIZE)
    say("cache flushes")
    flush = flush_seconds(_FLUSHED)
    flushed = None if flush is None else _median(rounds, flush) / (_FLUSHED // LINE)
    say("calls")
    conversion, entry = _conversion(rounds), _system_call(rounds)
    return CostFile(
        title=f"{host.cpu}, host side only",
        events={
            "bytes_zeroed": Figure(
                gbps=_figure(speeds["memset"]), source=f"{by}: memset {over} by {by_name['memset']}"
            ),
            "bytes_xored": Figure(
                gbps=_figure(speeds["xor"]),
                source=f"{by}: in-place XOR {over} by {by_name['xor']}, the cost model of a cipher",
            ),
            "bytes_scrambled": Figure(
                gbps=_figure(scrambled), source=f"{by}: SCRAMBLE {over} by gmemcore's kernel"
            ),
            "pages_allocated": Figure(
                ns=_figure(touched * 1e9),
                source=f"{by}: first touch of {format_size(touch_size)} of anonymous memory in 4 KiB pages",
            ),
            **_flush_figure(flushed, by),
            CALL: Figure(
                ns=_figure((conversion + entry) * 1e9),
                source=f"{by}: an empty system call ({entry * 1e9:.0f} ns) and one page's attribute set by "
                f"gmemcore's kernel ({conversion * 1e9:.0f} ns); KVM's own locks and zaps come on top",
            ),
        },
    )


def _flush_figure(flushed: float | None, by: str) -> dict[str, Figure]:
    """Return the event of a flushed cache line by name, or nothing where no line could be flushed."""
    if flushed is None:
        return {}
    source = f"{by}: {INSTRUCTION} over {format_size(_FLUSHED)} of lines written just before"
    return {"cache_lines_flushed": Figure(ns=_figure(flushed * 1e9), source=source)}


def _figure(value: float) -> float:
    """Round to four digits; more would suggest precision that is not there."""
    return float(f"{value:.4g}")


def _median(rounds: int, run: Callable[[], float]) -> float:
    """Return the median of several runs, after one warm-up run."""
    run()
    return median([run() for _ in range(rounds)])


def _scramble(size: int, rounds: int) -> float:
    """Return the seconds of a SCRAMBLE conversion of warm memory."""
    with create_vm("SW_PROTECTED", abi="v5", huge_pages=True, prefault=True) as vm:
        gmem = vm.create_guest_memfd(size, GuestMemfdFlag.MMAP | GuestMemfdFlag.INIT_SHARED)
        gmem.fallocate(1, 0, size)

        def run() -> float:
            began = time.perf_counter()
            done = gmem.set_memory_attributes(0, size, 0)
            taken = time.perf_counter() - began
            assert done.counters.bytes_scrambled == size
            return taken

        return _median(rounds, run)


def _first_touch(size: int, rounds: int) -> float:
    """Return the seconds of touching fresh memory page by page: a fault, an allocation, a zeroed page."""

    def run() -> float:
        with mmap.mmap(-1, size) as memory:
            memory.madvise(mmap.MADV_NOHUGEPAGE)
            pages = np.frombuffer(memory, np.uint8)[::PAGE_SIZE]
            began = time.perf_counter()
            pages[:] = 1
            taken = time.perf_counter() - began
            del pages  # a mapping can't be closed while a view exists
            return taken

    return _median(rounds, run)


def _conversion(rounds: int) -> float:
    """Return the seconds of setting the attribute of one page, batched, without any other work."""
    with create_vm("SNP", abi="v13", backing="none") as vm:
        gmem = vm.create_guest_memfd(2 * _CALLS * PAGE_SIZE, GuestMemfdFlag.MMAP)
        offsets = np.arange(_CALLS, dtype=np.uint64) * np.uint64(2 * PAGE_SIZE)
        sizes = np.full(_CALLS, PAGE_SIZE, np.uint64)
        attributes = 0

        def run() -> float:
            nonlocal attributes
            began = time.perf_counter()
            gmem.set_memory_attributes_many(offsets, sizes, attributes)
            taken = time.perf_counter() - began
            attributes ^= _PRIVATE
            return taken / _CALLS

        return _median(rounds, run)


def _system_call(rounds: int) -> float:
    """Return the seconds of an empty system call, without Python's overhead.

    The overhead is that of a C library call that enters no kernel; it is subtracted.
    """
    libc = ctypes.CDLL(None)
    enter, stay = libc.getppid, libc.ntohl
    stay.argtypes, enter.argtypes = (ctypes.c_uint32,), ()

    def run() -> float:
        began = time.perf_counter()
        for _ in range(_CALLS):
            enter()
        middle = time.perf_counter()
        for _ in range(_CALLS):
            stay(0)
        ended = time.perf_counter()
        return max((middle - began) - (ended - middle), 0.0) / _CALLS

    return _median(rounds, run)
