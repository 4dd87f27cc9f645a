"""The yardsticks: memcpy, memset and in-place XOR by a constant, each the best of NumPy, Numba and libc.

They run on memory of their own, allocated and warmed like the guest's, in the same process and in turn with
what they are compared with. Bytes of the buffer are counted once, as everywhere here.
"""

import ctypes
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from gmemcore.benchmark import loops
from gmemcore.benchmark.axes import DEFAULT_SETTING, Setting
from gmemcore.benchmark.contents import Words
from gmemcore.benchmark.memory import warm_words
from gmemcore.benchmark.summary import Summary, quantile, summarise
from gmemcore.engine.parts import in_parts
from gmemcore.errors import InvalidArgumentError
from gmemcore.uapi import PAGE_SIZE

Primitive = Callable[[Words, Words], Any]
"""What runs once over a target, given a source of the same size."""

BUFFER: Final = 128 << 20
"""Bytes of each of the two buffers: many times what the caches hold."""
CONSTANT: Final = np.uint64(0x5A5A_5A5A_5A5A_5A5A)
LEAST_STEP: Final = 1 << 20
"""Bytes of a call at least; of smaller ones Python would be timed."""
ROUNDS: Final = 5
PAGE_WORDS: Final = PAGE_SIZE // 8


def candidates() -> dict[str, dict[str, Primitive]]:
    """Return the ways to do each primitive, by primitive and library; compiles the loops."""
    from numba import njit

    # Compiled here and not by the engine: these belong to the benchmark, and take no part in a conversion.
    copy, put, xor = (njit(nogil=True)(loop) for loop in (loops.copy, loops.set_constant, loops.xor_constant))
    libc = ctypes.CDLL(None)
    libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    zero = np.uint64(0)
    return {
        "memcpy": {
            "numpy": lambda target, source: np.copyto(target, source),
            "numba": lambda target, source: copy(target, source),
            "libc": lambda target, source: libc.memcpy(target.ctypes.data, source.ctypes.data, target.nbytes),
        },
        "memset": {
            "numpy": lambda target, source: target.fill(zero),
            "numba": lambda target, source: put(target, zero),
            "libc": lambda target, source: libc.memset(target.ctypes.data, 0, target.nbytes),
        },
        "xor": {
            "numpy": lambda target, source: np.bitwise_xor(target, CONSTANT, out=target),
            "numba": lambda target, source: xor(target, CONSTANT),
        },
    }


class Primitives:
    """The best way to do each primitive on this machine, and its speed.

    Parameters
    ----------
    size : int
        Bytes of each buffer, a multiple of the page size.
    ways : mapping or None
        As `candidates` returns; None: those.
    setting : Setting
        Of what kind the buffers' memory is, and how many threads run over a large part of it, as a conversion
        would cut it.

    Attributes
    ----------
    names : dict
        Which library is the best at each primitive.
    summaries : dict
        Seconds of a run of each over the whole buffer.
    """

    def __init__(
        self,
        size: int = BUFFER,
        ways: Mapping[str, Mapping[str, Primitive]] | None = None,
        setting: Setting = DEFAULT_SETTING,
    ) -> None:
        self.size = size
        self._threads = setting.threads
        self._target, self._source = warm_words(size, setting), warm_words(size, setting)
        self._source[:] = CONSTANT
        self.names: dict[str, str] = {}
        self.summaries: dict[str, Summary] = {}
        self._best: dict[str, Primitive] = {}
        for primitive, by_library in (candidates() if ways is None else ways).items():
            self._choose(primitive, by_library)

    def _choose(self, primitive: str, by_library: Mapping[str, Primitive]) -> None:
        """Time the ways to do a primitive in turn and keep the fastest."""
        seconds: dict[str, list[float]] = {library: [] for library in by_library}
        for round_ in range(ROUNDS + 1):
            for library, run in by_library.items():
                taken = self._seconds(run, self._target, self._source)
                if round_:  # the first one compiles
                    seconds[library].append(taken)
        best = min(seconds, key=lambda library: quantile(seconds[library], 0.5))
        self.names[primitive] = best
        self.summaries[primitive] = summarise(seconds[best])
        self._best[primitive] = by_library[best]

    def gbps(self) -> dict[str, float]:
        """GB/s of each primitive over the whole buffer."""
        return {name: self.size / summary.median / 1e9 for name, summary in self.summaries.items()}

    def seconds(self, primitive: str, size: int, step: int) -> float:
        """Time `size` bytes, in calls of `step` bytes or of `LEAST_STEP`.

        A call of gigabytes goes around the caches where one of a range doesn't: no merit of either.
        What is more than the buffer is counted up from what fits it.

        Raises
        ------
        InvalidArgumentError
            EINVAL: no such primitive.
        """
        if primitive not in self._best:
            raise InvalidArgumentError(f"no primitive {primitive!r}; known: {', '.join(self._best)}")
        done = min(size, self.size)
        step_words = max(step, LEAST_STEP) // 8
        taken = sum(
            self._seconds(self._best[primitive], self._target[at:end], self._source[at:end])
            for at in range(0, done // 8, step_words)
            for end in (min(at + step_words, done // 8),)
        )
        return taken * size / done

    def _seconds(self, run: Primitive, target: Words, source: Words) -> float:
        if self._threads == 1:
            began = time.perf_counter()
            run(target, source)
            return time.perf_counter() - began

        def work(start: int, end: int, _: object) -> None:
            words = slice(start * PAGE_WORDS, end * PAGE_WORDS)
            run(target[words], source[words])

        began = time.perf_counter()
        in_parts(work, 0, len(target) // PAGE_WORDS, self._threads)
        return time.perf_counter() - began
