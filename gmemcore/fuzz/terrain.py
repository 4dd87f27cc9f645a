"""What random walks on one VM type of a host can contain, from what `probe` found."""

from dataclasses import dataclass
from typing import Final

from gmemcore.errors import InvalidArgumentError
from gmemcore.kvm.differences import version_of
from gmemcore.kvm.probe import Host, VmOffer
from gmemcore.kvm.structs import CAPABILITIES
from gmemcore.policy import PLATFORMS, Abi, cells, get_abi, release_of
from gmemcore.uapi import Capability, ContentMode, GuestMemfdFlag, VmType

ANCHORS: Final = (0, 1 << 20, 1 << 31, 1 << 32, (1 << 32) + (7 << 12), 1 << 36, (1 << 39) - (8 << 12))


@dataclass(frozen=True, slots=True)
class Terrain:
    """What a walk can do.

    Attributes
    ----------
    vm_type : VmType
        Of the VM.
    abi : Abi
        The revision that the model follows.
    creation_flags : tuple of int
        Combinations of creation flags that this kernel takes.
    in_place, vm_attributes : bool
        Whether it has KVM_SET_MEMORY_ATTRIBUTES2, and KVM_SET_MEMORY_ATTRIBUTES.
    guest : bool
        Whether a guest can be run, and reaches its guest_memfds.
    pins : bool
        Whether pages can be pinned.
    address_bits : int
        Bits of a guest physical address.
    capabilities : tuple of str
        Names that the model and this kernel's numbers agree on.
    """

    vm_type: VmType
    abi: Abi
    creation_flags: tuple[int, ...]
    in_place: bool
    vm_attributes: bool
    guest: bool
    pins: bool
    address_bits: int
    capabilities: tuple[str, ...]

    @property
    def legacy(self) -> bool:
        """Whether shared memory lies beside the guest_memfd."""
        return self.abi.legacy

    @property
    def private_memory(self) -> bool:
        """Whether this VM type has private memory."""
        return PLATFORMS[self.vm_type].private_memory

    @property
    def anchors(self) -> tuple[int, ...]:
        """Guest addresses that memslots are near; none is near the local APIC's page at 0xfee00000."""
        return tuple(anchor for anchor in ANCHORS if anchor < 1 << self.address_bits)

    @property
    def modes(self) -> tuple[int, ...]:
        """Content flags of conversions, known and unknown; none that leaves bytes that nobody can predict."""
        scrambles = any(answer.effect == "SCRAMBLE" for _, answer in cells(self.abi, self.vm_type, flag=0))
        return *(() if scrambles else (0,)), *(int(mode) for mode in ContentMode), 1 << 40


def terrain_of(host: Host, vm_type: VmType) -> Terrain:
    """Return what walks on a VM type of a host can contain.

    Raises
    ------
    InvalidArgumentError
        EINVAL: the host doesn't offer this VM type, or no guest_memfd for it.
    """
    offer = host.offers.get(vm_type)
    if offer is None or offer.creation_flags is None:
        others = ", ".join(fuzzable(host)) or "no VM type"
        raise InvalidArgumentError(f"this host has guest_memfd for {others}, not for VM type {vm_type}")
    return Terrain(
        vm_type=vm_type,
        abi=abi_of(host, offer),
        creation_flags=_combinations(offer.creation_flags),
        in_place=offer.in_place,
        vm_attributes=offer.vm_attributes,
        guest=offer.guest is None,
        pins=offer.pins is None,
        address_bits=offer.guest_address_bits or 40,
        capabilities=tuple(name for name in CAPABILITIES if name in set(Capability)),
    )


def fuzzable(host: Host) -> list[VmType]:
    """Return the VM types of a host that have guest_memfds."""
    return [vm_type for vm_type, offer in host.offers.items() if offer.creation_flags is not None]


def abi_of(host: Host, offer: VmOffer) -> Abi:
    """Return the revision that the model follows: the release's own, where nothing is converted in place."""
    if offer.in_place:
        return get_abi(offer.abi)
    return release_of(version_of(host.release))


def _combinations(offered: int) -> tuple[int, ...]:
    known = [int(flag) for flag in GuestMemfdFlag if flag & offered]
    sums = {0}
    for flag in known:
        sums |= {flag | other for other in sums}
    return tuple(sorted(sums))
