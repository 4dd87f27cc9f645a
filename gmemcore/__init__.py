"""gmemcore: in-place conversion of guest_memfd memory, as a fast model on NumPy and Numba.

Names and submodules are loaded when they are first used, so ``import gmemcore`` costs no more than it must::

    >>> import gmemcore as gm
    >>> vm = gm.create_vm("snp", abi="v5")
    >>> gmem = vm.create_guest_memfd("2m", "mmap|init_shared")
    >>> gmem.convert(0, 4096, to="private", content="preserve").counters.pages_changed
    1
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_HOMES = {
    "gmemcore.front": ("bench", "read", "replay", "run"),
    "gmemcore.analysis": ("take",),
    "gmemcore.analysis.explorer": ("explore",),
    "gmemcore.machine": ("GuestMemfd", "HugePagePool", "LegacyVm", "Vm", "create_vm"),
    "gmemcore.engine": ("BatchResult", "ConversionResult", "Counters", "warmup"),
    "gmemcore.errors": ("GmemError",),
    "gmemcore.policy": ("ABIS", "Abi"),
    "gmemcore.uapi": (
        *("PAGE_SHIFT", "PAGE_SIZE", "Capability", "ContentMode", "ContentWork", "Direction"),
        *("FallocateMode", "Firmware", "GuestMemfdFlag", "MemoryAttribute", "PageType", "Phase", "VmType"),
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
_SUBMODULES = (
    *("analysis", "benchmark", "conformance", "engine", "errors", "kvm", "machine", "policy"),
    *("stress", "uapi", "units", "vmm", "workload"),
)

__all__ = sorted([*_HOME_OF, "check_cap", "stress"])

if TYPE_CHECKING:
    from gmemcore.analysis import take as take
    from gmemcore.analysis.explorer import explore as explore
    from gmemcore.engine import BatchResult as BatchResult
    from gmemcore.engine import ConversionResult as ConversionResult
    from gmemcore.engine import Counters as Counters
    from gmemcore.engine import warmup as warmup
    from gmemcore.errors import GmemError as GmemError
    from gmemcore.front import bench as bench
    from gmemcore.front import read as read
    from gmemcore.front import replay as replay
    from gmemcore.front import run as run
    from gmemcore.front import stress as stress
    from gmemcore.machine import GuestMemfd as GuestMemfd
    from gmemcore.machine import HugePagePool as HugePagePool
    from gmemcore.machine import LegacyVm as LegacyVm
    from gmemcore.machine import Vm as Vm
    from gmemcore.machine import create_vm as create_vm
    from gmemcore.policy import ABIS as ABIS
    from gmemcore.policy import Abi as Abi
    from gmemcore.uapi import PAGE_SHIFT as PAGE_SHIFT
    from gmemcore.uapi import PAGE_SIZE as PAGE_SIZE
    from gmemcore.uapi import Capability as Capability
    from gmemcore.uapi import ContentMode as ContentMode
    from gmemcore.uapi import ContentWork as ContentWork
    from gmemcore.uapi import Direction as Direction
    from gmemcore.uapi import FallocateMode as FallocateMode
    from gmemcore.uapi import Firmware as Firmware
    from gmemcore.uapi import GuestMemfdFlag as GuestMemfdFlag
    from gmemcore.uapi import MemoryAttribute as MemoryAttribute
    from gmemcore.uapi import PageType as PageType
    from gmemcore.uapi import Phase as Phase
    from gmemcore.uapi import VmType as VmType


def check_cap(name: str, abi: "str | Abi" = "v5") -> int:
    """Ask a capability without a VM, as on /dev/kvm.

    Parameters
    ----------
    name : str
        A capability, with or without ``KVM_CAP_``.
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
    if name in _SUBMODULES:
        return import_module(f"gmemcore.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'gmemcore' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBMODULES, "__version__"})
