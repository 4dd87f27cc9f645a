"""gmemcore: in-place conversion of guest_memfd memory, as a fast model on NumPy and Numba.

Names are loaded when they are first used, so that ``import gmemcore`` costs no more than it must::

    >>> import gmemcore
    >>> vm = gmemcore.create_vm("SNP", abi="v5")
    >>> gmem = vm.create_guest_memfd(2 << 20, flags=3)
    >>> gmem.set_memory_attributes(0, 4096, attributes=8, flags=2).counters.pages_changed
    1
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "gmemcore.machine": ("GuestMemfd", "LegacyVm", "Vm", "create_vm"),
    "gmemcore.engine": ("BatchResult", "ConversionResult", "Counters", "warmup"),
    "gmemcore.errors": ("GmemError",),
    "gmemcore.policy": ("ABIS", "Abi"),
    "gmemcore.uapi": (
        *("PAGE_SHIFT", "PAGE_SIZE", "Capability", "ContentMode", "Direction", "FallocateMode", "Firmware"),
        *("GuestMemfdFlag", "MemoryAttribute", "PageType", "Phase", "VmType"),
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME_OF, "check_cap"])

if TYPE_CHECKING:
    from gmemcore.engine import BatchResult, ConversionResult, Counters, warmup
    from gmemcore.errors import GmemError
    from gmemcore.machine import GuestMemfd, LegacyVm, Vm, create_vm
    from gmemcore.policy import ABIS, Abi
    from gmemcore.uapi import (
        PAGE_SHIFT,
        PAGE_SIZE,
        Capability,
        ContentMode,
        Direction,
        FallocateMode,
        Firmware,
        GuestMemfdFlag,
        MemoryAttribute,
        PageType,
        Phase,
        VmType,
    )


def check_cap(name: str, abi: "str | Abi" = "v5") -> int:
    """Ask a capability without a VM, as on /dev/kvm.

    Parameters
    ----------
    name : str
        Name without ``KVM_CAP_``.
    abi : str or Abi
        Revision of the interface.

    Returns
    -------
    int
        The union over VM types with today's firmware; 0 for a capability that the abi lacks.
    """
    from gmemcore.policy import capability

    return capability(abi, name)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'gmemcore' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
