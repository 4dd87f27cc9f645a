"""Compiling the kernels: late, once, and never fatally.

``kernels.py`` is plain Python.  The first use of any kernel turns every function registered there into a
Numba dispatcher *in place*, so that importing gmemcore costs no Numba import, kernels find each other by
their module's globals, and ``NUMBA_DISABLE_JIT=1`` runs the very same source under a debugger or coverage.

Numba's on-disk cache is a convenience: a directory that can't be written, a full disk or a damaged file
must not reach a conversion as an error.  Loading and saving are guarded here and fail as one warning.
"""

import os
import threading
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_registered: list[str] = []
_compiling = threading.Lock()
_kernels: ModuleType | None = None
_warned = False


def kernel(function: F) -> F:
    """Register a function of ``kernels.py`` for compilation; returns it unchanged."""
    _registered.append(function.__name__)
    return function


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
_OPTIONS: dict[str, Any] = {"nogil": True, "_nrt": False}


def _compile_in_place(kernels: ModuleType) -> None:
    from numba import njit

    for name in _registered:
        function = getattr(kernels, name)
        try:
            dispatcher = njit(cache=True, **_OPTIONS)(function)
        except RuntimeError as error:  # Numba found no directory it may write to
            _warn_once(error)
            dispatcher = njit(**_OPTIONS)(function)
        else:
            dispatcher._cache = _GuardedCache(dispatcher._cache)
        setattr(kernels, name, dispatcher)


def _silence_wrapping(kernels: ModuleType) -> None:
    """Let 64-bit arithmetic wrap silently in plain Python too, as it does compiled."""
    import numpy as np

    for name in _registered:
        setattr(kernels, name, np.errstate(over="ignore")(getattr(kernels, name)))


class _GuardedCache:
    """A Numba function cache whose failures mean "not cached" instead of an exception."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        try:
            return self._cache.load_overload(signature, target_context)
        except Exception as error:  # a pickle that can't be read raises nearly anything
            _warn_once(error)
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        try:
            self._cache.save_overload(signature, data)
        except Exception as error:  # full disk, quota, directory gone
            _warn_once(error)


def _warn_once(error: Exception) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"gmemcore: compiled kernels are not cached ({type(error).__name__}: {error}); each new process "
            "compiles them again. Set NUMBA_CACHE_DIR to a directory of your own to cache them.",
            RuntimeWarning,
            stacklevel=4,
        )
