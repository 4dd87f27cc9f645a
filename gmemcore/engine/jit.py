"""Compile the kernels on first use.

``kernels.py`` is plain Python, and so is ``workload/loops.py``. The first use of one of them replaces every
function registered in it by a Numba dispatcher, *in place*. So ``import gmemcore`` doesn't import Numba,
kernels find each other as globals of their module, and ``NUMBA_DISABLE_JIT=1`` runs the same source under a
debugger or coverage.
"""

import os
import threading
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

from gmemcore.engine.compile_options import CALLED_BY_KERNELS, CALLED_BY_PYTHON, INLINED, OPTIONS

F = TypeVar("F", bound=Callable[..., Any])

_registered: dict[str, dict[str, dict[str, bool]]] = {}  # options by module and function
_callbacks: list[str] = []
_compiling = threading.RLock()
os.register_at_fork(  # a child can't finish what another thread of its parent began
    before=_compiling.acquire, after_in_parent=_compiling.release, after_in_child=_compiling.release
)
_kernels: ModuleType | None = None
_loaded: set[str] = set()


def entry(function: F) -> F:
    """Register a function that Python calls; return it unchanged."""
    return _register(function, CALLED_BY_PYTHON)


def kernel(function: F) -> F:
    """Register a function that kernels call; return it unchanged."""
    return _register(function, CALLED_BY_KERNELS)


def inlined(function: F) -> F:
    """Register a function that is inlined into each kernel that calls it; return it unchanged.

    A call passes seven words per array, which costs more than a short function does.
    """
    return _register(function, INLINED)


def _register(function: F, options: dict[str, bool]) -> F:
    _registered.setdefault(function.__module__, {})[function.__name__] = options
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
        _kernels = load("gmemcore.engine.kernels")
    return _kernels


def load(name: str) -> ModuleType:
    """Prepare the registered functions of a module for their first call, which compiles them."""
    module = import_module(name)
    with _compiling:
        if name not in _loaded:
            if is_compiled():
                _compile_in_place(module)
            else:
                _silence_wrapping(module)
            _loaded.add(name)
    return module


def _compile_in_place(kernels: ModuleType) -> None:
    from numba import njit

    from gmemcore.engine import instructions
    from gmemcore.engine.kernel_cache import KernelCache, warn_once

    for name in instructions.NAMES:
        if hasattr(kernels, name):
            setattr(kernels, name, getattr(instructions, name))
    for name, options in _registered[kernels.__name__].items():
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

    for name in _registered[kernels.__name__]:
        setattr(kernels, name, np.errstate(over="ignore")(getattr(kernels, name)))
