"""The memory primitives: memcpy, memset, in-place XOR with a constant, and setting bits of a plain bitmap.

Each runs in the guest's own memory, over the same ranges in the same order as the conversion that it is
compared with, in one compiled call. The fastest of NumPy, Numba and libc at each size is used.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.benchmark import loops
from gmemcore.benchmark.expected import Words
from gmemcore.engine.jit import is_compiled
from gmemcore.errors import InvalidArgumentError
from gmemcore.results.statistics import median
from gmemcore.uapi import PAGE_SIZE

Way = Callable[[Words, Words, NDArray[np.uint64], Any, Any], Any]
"""Run a primitive once: target, source, first word of each range, words per range, constant."""

SOURCE: Final = 128 << 20
"""Bytes of the buffer that memcpy reads: larger than the caches."""
CONSTANTS: Final = {
    "memcpy": np.uint64(0),
    "memset": np.uint64(0),
    "xor": np.uint64(0x5A5A_5A5A_5A5A_5A5A),
    "bitmap": loops.ONES,
}
"""What each primitive writes or XORs with."""
_ROUNDS: Final = 3
LARGE_RANGE: Final = 1 << 20
"""Smallest range in bytes for NumPy (with smaller ones Python would be timed) and for memset with
non-temporal stores (conversions of smaller ranges leave what they wrote in the caches, too)."""
_LARGE_ONLY: Final = ("numpy", "streaming stores")
_LEAST_PART: Final = 4 << 20


@cache
def candidates() -> dict[str, dict[str, Way]]:
    """Return every implementation, by primitive and name; compiles the loops."""
    found: dict[str, dict[str, Way]] = {
        "memcpy": {"numpy": _numpy_copy},
        "memset": {"numpy": _numpy_fill},
        "xor": {"numpy": _numpy_xor},
        "bitmap": {"numba": loops.set_bits},
    }
    if is_compiled():
        for primitive, ways in _compiled().items():
            found[primitive] |= ways
    return found


def _compiled() -> dict[str, dict[str, Way]]:
    from numba import njit

    from gmemcore.engine.instructions import zero_line

    def compiled(function: Callable[..., Any]) -> Any:
        return njit(nogil=True)(function)

    types: Any = import_module("numba.core.types")
    size = types.uintp
    memcpy = types.ExternalFunction("memcpy", size(size, size, size))
    memset = types.ExternalFunction("memset", size(size, types.intc, size))

    def libc_copy(target: Any, source: Any, starts: Any, words: Any, constant: Any) -> None:
        length, to, of = np.uint64(source.shape[0]), target.ctypes.data, source.ctypes.data
        for i in range(starts.shape[0]):
            at, end = starts[i], starts[i] + words
            while at < end:
                part = min(end - at, length - at % length)
                memcpy(to + at * np.uint64(8), of + at % length * np.uint64(8), part * np.uint64(8))
                at += part

    def libc_fill(target: Any, source: Any, starts: Any, words: Any, constant: Any) -> None:
        to = target.ctypes.data
        for i in range(starts.shape[0]):
            memset(to + starts[i] * np.uint64(8), 0, words * np.uint64(8))

    def stream(target: Any, source: Any, starts: Any, words: Any, constant: Any) -> None:
        for i in range(starts.shape[0]):
            at, end = starts[i], starts[i] + words
            while at < end:
                zero_line(target, at)
                at += loops.LINE_WORDS

    return {
        "memcpy": {"numba": compiled(loops.copy), "libc": compiled(libc_copy)},
        "memset": {
            "numba": compiled(loops.fill),
            "libc": compiled(libc_fill),
            "streaming stores": compiled(stream),
        },
        "xor": {"numba": compiled(loops.xor)},
        "bitmap": {"numba": compiled(loops.set_bits)},
    }


def _numpy_copy(target: Words, source: Words, starts: NDArray[np.uint64], size: Any, constant: Any) -> None:
    for start in starts.tolist():
        for at in range(start, start + int(size), len(source)):
            part = target[at : min(at + len(source), start + int(size))]
            np.copyto(part, source[: len(part)])


def _numpy_fill(target: Words, source: Words, starts: NDArray[np.uint64], size: Any, constant: Any) -> None:
    for start in starts.tolist():
        target[start : start + int(size)].fill(constant)


def _numpy_xor(target: Words, source: Words, starts: NDArray[np.uint64], size: Any, constant: Any) -> None:
    for start in starts.tolist():
        part = target[start : start + int(size)]
        np.bitwise_xor(part, constant, out=part)


class Primitives:
    """The fastest implementation of each primitive at each size, in the given memory.

    Parameters
    ----------
    target : ndarray of uint64
        The guest's memory, warm.
    source : ndarray of uint64
        What memcpy reads: the same kind of memory, at most as large.
    ways : mapping or None
        As `candidates` returns; None: those.
    threads : int
        Threads that share each range, as in a conversion.

    Attributes
    ----------
    names : dict of (str, int) to str
        The fastest implementation, by primitive and range.
    """

    def __init__(
        self,
        target: Words,
        source: Words,
        ways: Mapping[str, Mapping[str, Way]] | None = None,
        threads: int = 1,
    ) -> None:
        self.names: dict[tuple[str, int], str] = {}
        self._target, self._source = target, source
        self._source[:] = CONSTANTS["xor"]
        self._ways = candidates() if ways is None else ways
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def seconds(self, primitive: str, size: int, range_: int) -> float:
        """Time the primitive over the first `size` bytes, in ranges of `range_` bytes.

        Raises
        ------
        InvalidArgumentError
            EINVAL: an unknown primitive.
        """
        if primitive not in self._ways:
            raise InvalidArgumentError(f"unknown primitive {primitive!r}; known: {', '.join(self._ways)}")
        name = self.names.get((primitive, range_))
        if name is None:
            name = self.names[primitive, range_] = self._fastest(primitive, size, range_)
        return self._time(primitive, name, size, range_)

    def bits(self, size: int, range_: int, value: bool) -> float:
        """Time setting or clearing the bits of the pages of `size` bytes, in ranges of `range_` bytes."""
        pages, step = size // PAGE_SIZE, range_ // PAGE_SIZE
        starts = np.arange(0, pages, step, dtype=np.uint64)
        bitmap = np.full(-(-pages // 64), loops.NONE if value else loops.ONES)
        (way,) = self._ways["bitmap"].values()
        way(bitmap[:1], bitmap[:1], starts[:0], np.uint64(step), loops.ONES)  # compiled, if it wasn't
        self.names["bitmap", range_] = next(iter(self._ways["bitmap"]))
        began = time.perf_counter()
        way(bitmap, bitmap, starts, np.uint64(step), loops.ONES if value else loops.NONE)
        return time.perf_counter() - began

    def _fastest(self, primitive: str, size: int, range_: int) -> str:
        """Return the fastest implementation; the first run of each compiles it."""
        ways = self._ways[primitive]
        names = [name for name in ways if name not in _LARGE_ONLY or range_ >= LARGE_RANGE] or [*ways]
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for round_ in range(_ROUNDS + 1):
            for name in names:
                taken = self._time(primitive, name, size, range_)
                if round_:
                    seconds[name].append(taken)
        return min(seconds, key=lambda name: median(seconds[name]))

    def _time(self, primitive: str, name: str, size: int, range_: int) -> float:
        way, constant = self._ways[primitive][name], CONSTANTS[primitive]
        starts = np.arange(0, size // 8, range_ // 8, dtype=np.uint64)
        words = np.uint64(range_ // 8)
        if self._pool is None or range_ < 2 * _LEAST_PART:
            began = time.perf_counter()
            way(self._target, self._source, starts, words, constant)
            return time.perf_counter() - began
        parts = min(self._threads, range_ // _LEAST_PART)
        part = -(-range_ // parts // PAGE_SIZE) * PAGE_SIZE // 8

        def share(start: int, end: int) -> None:
            way(self._target, self._source, np.array([start], np.uint64), np.uint64(end - start), constant)

        began = time.perf_counter()
        for start in starts.tolist():
            end = start + range_ // 8
            shares = [self._pool.submit(share, at, min(at + part, end)) for at in range(start, end, part)]
            for each in shares:
                each.result()
        return time.perf_counter() - began

    def close(self) -> None:
        """Release memory and threads."""
        self._target = self._source = np.zeros(0, np.uint64)
        if self._pool is not None:
            self._pool.shutdown()
