"""The machine: guests, their files and memslots, what host and guest see, launch, and the raw ioctls."""

from collections.abc import Callable

from gmemcore.engine.backing import Backing
from gmemcore.machine.guest_memfd import GuestMemfd, HostMapping
from gmemcore.machine.launch import LaunchUpdateResult
from gmemcore.machine.memslots import Memslot, memslot_pieces
from gmemcore.machine.vm import LegacyVm, Vm
from gmemcore.policy import Abi, get_abi
from gmemcore.uapi import Firmware, VmType

VmFace = Vm

__all__ = [
    "GuestMemfd",
    "HostMapping",
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
    huge_pages: bool = False,
    prefault: bool = False,
    enforce: str | None = None,
    threads: int = 1,
) -> Vm:
    """Make the Vm that an abi needs: `Vm`, or `LegacyVm` for one with two backings.

    Parameters
    ----------
    vm_type : VmType, str or int
        DEFAULT, SW_PROTECTED, SNP, TDX or PKVM, in any case, or KVM's number of the type.
    abi : str or Abi
        Revision of the interface, see ``gmemcore policy``; or an `Abi` of your own.
    firmware : Firmware or str
        ``today`` or ``cipher``.
    seed : int
        u64 key of the key stream, which is a cost model and no encryption.
    backing : str or callable
        ``anonymous``, ``memfd``, ``guest_memfd`` or ``none`` (attributes only).
    huge_pages : bool
        Ask for transparent huge pages.
    prefault : bool
        Fault all memory in at creation.
    enforce : {'mprotect'} or None
        Let raw views of the host's mappings (`HostMapping.array`) really fault on private pages; for the
        backings memfd and guest_memfd.
    threads : int
        Threads that transform the bytes of a long range; the bytes are the same for any number.

    Returns
    -------
    Vm or LegacyVm

    Raises
    ------
    InvalidArgumentError
        EINVAL: a name that doesn't exist; the message lists those that do.
    """
    kind = LegacyVm if get_abi(abi).legacy else Vm
    return kind(
        *(vm_type, abi, firmware, seed, backing),
        huge_pages=huge_pages,
        prefault=prefault,
        enforce=enforce,
        threads=threads,
    )
