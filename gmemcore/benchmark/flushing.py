"""Flushing pages from the caches, as a kernel does to pages that cease to be private."""

import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

import numpy as np

from gmemcore.engine.jit import is_compiled

INSTRUCTION: Final = "CLFLUSHOPT"
LINE: Final = 64
"""Bytes of a cache line."""


def flush_seconds(size: int) -> Callable[[], float] | None:
    """Return a function that writes memory, flushes all its cache lines and returns the seconds of the flush.

    Parameters
    ----------
    size : int
        Bytes of memory, a multiple of the page size.

    Returns
    -------
    callable or None
        None if this CPU lacks the instruction, or Numba's compiler is switched off.

    Notes
    -----
    One fence follows the last line, as in Linux (`clflush_cache_range`).
    """
    if not is_compiled():
        return None
    binding: Any = import_module("llvmlite.binding")
    if not binding.get_host_cpu_features().get(INSTRUCTION.lower()):
        return None
    flush = compiled_flush()
    words = np.zeros(size // 8, np.uint64)

    def run() -> float:
        words.fill(time.perf_counter_ns())  # all lines that the caches hold are dirty
        began = time.perf_counter()
        flush(words)
        return time.perf_counter() - began

    return run


def compiled_flush() -> Any:
    """Return a function that flushes all cache lines of an array and waits for it; compiled when called."""
    from numba import njit

    flush_line, fence = _instruction("clflushopt ($0)", 1), _instruction("mfence", 0)

    @njit(nogil=True)
    def flush(words: Any) -> None:
        first = words.ctypes.data
        for at in range(0, words.nbytes, LINE):
            flush_line(first + at)
        fence()

    return flush


def _instruction(text: str, operands: int) -> Any:
    """Return a function for compiled code that is one instruction, with addresses as operands."""
    intrinsic: Any = import_module("numba.extending").intrinsic
    types: Any = import_module("numba.core.types")
    binding: Any = import_module("llvmlite.binding")
    ir: Any = import_module("llvmlite.ir")
    binding.initialize_native_asmparser()  # Numba itself needs none

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [address.type for address in arguments])
        constraints = ",".join(["r"] * operands + ["~{memory}"])
        builder.asm(kind, text, constraints, arguments, side_effect=True)
        return context.get_dummy_value()

    if operands == 0:
        return intrinsic(lambda typing: (types.void(), generate))
    return intrinsic(lambda typing, address: (types.void(address), generate))
