"""The machine: guests, their files and memslots, what host and guest see, launch, and the raw ioctls."""

from collections.abc import Callable, Mapping
from typing import Any

from gmemcore.engine.backing import Backing
from gmemcore.machine.guest_memfd import GuestMemfd, HostMapping
from gmemcore.machine.huge_pages import Folio, FolioCounts, HugePagePool
from gmemcore.machine.launch import LaunchUpdateResult
from gmemcore.machine.memslots import Memslot, memslot_pieces
from gmemcore.machine.vm import LegacyVm, Vm
from gmemcore.policy import Abi, get_abi
from gmemcore.uapi import ContentWork, Firmware, VmType

VmFace = Vm

__all__ = [
    "Folio",
    "FolioCounts",
    "GuestMemfd",
    "HostMapping",
    "HugePagePool",
    "LaunchUpdateResult",
    "LegacyVm",
    "Memslot",
    "Vm",
    "VmFace",
    "create_vm",
    "memslot_pieces",
]


def create_vm(
    vm_type: VmType | str | int,
    abi: str | Abi = "v5",
    firmware: Firmware | str = Firmware.TODAY,
    seed: int = 0,
    backing: str | Callable[..., Backing] = "anonymous",
    *,
    huge_pages: bool | HugePagePool | Mapping[Any, int] | int = False,
    prefault: bool = False,
    enforce: str | None = None,
    threads: int = 1,
    contents: ContentWork | str = ContentWork.EAGER,
    **options: Any,
) -> Vm:
    """Create a guest: a `Vm`, or a `LegacyVm` for the abi ``legacy``.

    Parameters
    ----------
    vm_type : VmType, str or int
        DEFAULT, SW_PROTECTED, SNP, TDX or PKVM, in any case, or KVM's number of the type.
    abi : str or Abi
        Revision of the interface: a name (see ``gmemcore policy``) or an `Abi`.
    firmware : Firmware or str
        ``today`` or ``cipher``.
    seed : int
        u64 key of the key stream, which models the cost of encryption and provides no security.
    backing : str or callable
        ``anonymous``, ``memfd``, ``guest_memfd`` or ``none`` (attributes only).
    huge_pages : bool, HugePagePool, mapping or int
        The host's pool of huge pages for files with HUGETLB: pages by size, as in ``{"1g": 4}``, one number
        for each size, or a `HugePagePool` that several guests share. A bool asks for transparent huge pages
        of the backing instead, and leaves the pool without a limit.
    prefault : bool
        Allocate all memory at creation.
    enforce : {'mprotect'} or None
        Make accesses to private pages through `HostMapping.array` fault, using mprotect; for the backings
        memfd and guest_memfd.
    threads : int
        Number of threads for conversions of long ranges; affects time only.
    contents : ContentWork or {'eager', 'deferred'}
        When operations change bytes: at once, or when somebody needs them; see `Vm`.
    **options : Any
        Further options of the backing.

    Returns
    -------
    Vm or LegacyVm

    Raises
    ------
    InvalidArgumentError
        EINVAL: an unknown name, or options that don't fit each other.
    """
    kind = LegacyVm if get_abi(abi).legacy else Vm
    return kind(
        vm_type,
        abi,
        firmware,
        seed,
        backing,
        huge_pages=huge_pages,
        prefault=prefault,
        enforce=enforce,
        threads=threads,
        contents=contents,
        **options,
    )
