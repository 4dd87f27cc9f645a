"""Compile the kernels on first use.

``kernels.py`` is plain Python. The first use of any kernel replaces every function registered there by a
Numba dispatcher, *in place*. So ``import gmemcore`` doesn't import Numba, kernels find each other as globals
of their module, and ``NUMBA_DISABLE_JIT=1`` runs the same source under a debugger or coverage.
"""

import os
import threading
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_registered: dict[str, dict[str, bool]] = {}
_callbacks: list[str] = []
_compiling = threading.RLock()
os.register_at_fork(  # a child can't finish what another thread of its parent began
    before=_compiling.acquire, after_in_parent=_compiling.release, after_in_child=_compiling.release
)
_kernels: ModuleType | None = None


# Kernels allocate nothing, so they need no reference counting. Without it a call between kernels is free;
# with it, converting a short range took 2.5 times as long.
OPTIONS: dict[str, Any] = {"nogil": True, "_nrt": False}
CALLED_BY_PYTHON = {"no_cfunc_wrapper": True}
CALLED_BY_KERNELS = {"no_cfunc_wrapper": True, "no_cpython_wrapper": True}
INLINED = {**CALLED_BY_KERNELS, "forceinline": True}


def entry(function: F) -> F:
    """Register a function of ``kernels.py`` that Python calls; return it unchanged."""
    _registered[function.__name__] = CALLED_BY_PYTHON
    return function


def kernel(function: F) -> F:
    """Register a function that kernels call; return it unchanged."""
    _registered[function.__name__] = CALLED_BY_KERNELS
    return function


def inlined(function: F) -> F:
    """Register a function that is inlined into each kernel that calls it; return it unchanged.

    A call passes seven words per array, which costs more than a short function does.
    """
    _registered[function.__name__] = INLINED
    return function


def callback(function: F) -> F:
    """Register a function for `callback_address`, which C calls with one word; return it unchanged."""
    _callbacks.append(function.__name__)
    return function


def load_kernels() -> ModuleType:
    """Prepare the kernels for their first call, which compiles them.

    Returns
    -------
    module
        ``gmemcore.engine.kernels``. Its functions are Numba dispatchers, or plain Python functions if
        ``NUMBA_DISABLE_JIT`` is set.
    """
    global _kernels
    if _kernels is None:
        from gmemcore.engine import kernels

        with _compiling:
            if _kernels is None:
                if is_compiled():
                    _compile_in_place(kernels)
                else:
                    _silence_wrapping(kernels)
                _kernels = kernels
    return _kernels


def _compile_in_place(kernels: ModuleType) -> None:
    from numba import njit

    from gmemcore.engine import instructions
    from gmemcore.engine.kernel_cache import KernelCache, warn_once

    for name in instructions.NAMES:
        setattr(kernels, name, getattr(instructions, name))
    for name, options in _registered.items():
        function = getattr(kernels, name)
        dispatcher: Any = njit(**{**OPTIONS, **options})(function)
        try:
            dispatcher._cache = KernelCache(function)
        except OSError as error:
            warn_once(error)
        setattr(kernels, name, dispatcher)


@cache
def callback_address(name: str) -> int:
    """Return the address of a `callback`, compiling it at the first call; 0 if kernels aren't compiled."""
    kernels = load_kernels()
    if not is_compiled():
        return 0
    from gmemcore.engine.kernel_cache import compile_callback

    return compile_callback(getattr(kernels, name))


def is_compiled() -> bool:
    """Return whether kernels are compiled, rather than plain Python."""
    return os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0")


def _silence_wrapping(kernels: ModuleType) -> None:
    """Make 64-bit arithmetic wrap silently in plain Python, as in compiled code."""
    import numpy as np

    for name in _registered:
        setattr(kernels, name, np.errstate(over="ignore")(getattr(kernels, name)))
