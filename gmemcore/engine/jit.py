"""Compiling the kernels: late, once, and never fatally.

``kernels.py`` is plain Python.  The first use of any kernel turns every function registered there into a
Numba dispatcher *in place*, so that importing gmemcore costs no Numba import, kernels find each other by
their module's globals, and ``NUMBA_DISABLE_JIT=1`` runs the very same source under a debugger or coverage.

Where compiled kernels are kept, and that no failure of that reaches a conversion, is ``kernel_cache.py``'s.
"""

import os
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_registered: list[str] = []
_inlined: set[str] = set()
_compiling = threading.Lock()
_kernels: ModuleType | None = None


def kernel(function: F) -> F:
    """Register a function of ``kernels.py`` for compilation; returns it unchanged."""
    _registered.append(function.__name__)
    return function


def inlined(function: F) -> F:
    """Register a function that becomes a part of each kernel that calls it; returns it unchanged.

    A call hands over seven words an array, which costs more than a short function does.
    """
    _inlined.add(function.__name__)
    return kernel(function)


def load_kernels() -> ModuleType:
    """The kernels module with every kernel compiled on first call.

    Returns
    -------
    module
        ``gmemcore.engine.kernels``; its functions are Numba dispatchers, or plain Python functions
        when ``NUMBA_DISABLE_JIT`` is set.
    """
    global _kernels
    if _kernels is None:
        from gmemcore.engine import kernels

        with _compiling:
            if _kernels is None:
                if os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0"):
                    _compile_in_place(kernels)
                else:
                    _silence_wrapping(kernels)
                _kernels = kernels
    return _kernels


# Kernels hold no references: without Numba's counting of them a call of one kernel by another costs nothing
# (with it, converting a short range took 2.5 times as long). Kernels allocate nothing, so nothing is lost.
OPTIONS: dict[str, Any] = {"nogil": True, "_nrt": False}


def _compile_in_place(kernels: ModuleType) -> None:
    from numba import njit

    from gmemcore.engine.instructions import prefetch, zero_line
    from gmemcore.engine.kernel_cache import KernelCache, warn_once

    for instruction in (prefetch, zero_line):
        setattr(kernels, instruction.__name__, instruction)
    for name in _registered:
        function = getattr(kernels, name)
        dispatcher = njit(**OPTIONS, forceinline=name in _inlined)(function)
        try:
            dispatcher._cache = KernelCache(function)
        except OSError as error:
            warn_once(error)
        setattr(kernels, name, dispatcher)


def _silence_wrapping(kernels: ModuleType) -> None:
    """Let 64-bit arithmetic wrap silently in plain Python too, as it does compiled."""
    import numpy as np

    for name in _registered:
        setattr(kernels, name, np.errstate(over="ignore")(getattr(kernels, name)))
