"""The options that kernels are compiled with; part of the key of their cache."""

from typing import Any, Final

# Kernels allocate nothing, so they need no reference counting. Without it a call between kernels is free;
# with it, converting a short range took 2.5 times as long.
OPTIONS: Final[dict[str, Any]] = {"nogil": True, "_nrt": False}
CALLED_BY_PYTHON: Final = {"no_cfunc_wrapper": True}
CALLED_BY_KERNELS: Final = {"no_cfunc_wrapper": True, "no_cpython_wrapper": True}
INLINED: Final = {**CALLED_BY_KERNELS, "forceinline": True}
