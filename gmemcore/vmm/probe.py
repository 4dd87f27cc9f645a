"""What userspace asks at start, and what it believes from then on.

It knows two things: names (of flags and capabilities, with the limits that their documentation sets for every
VM type alike) and what the capabilities of its VM answered. It never asks for the VM type, nor reads what a
revision allows: `policy.Flag` and `policy.FlagsCapability` are its header file.
"""

from dataclasses import dataclass
from itertools import product

from gmemcore.machine import VmFace
from gmemcore.policy import Flag
from gmemcore.uapi import Capability, Direction, GuestMemfdFlag, MemoryAttribute, Phase


@dataclass(frozen=True, slots=True)
class Supported:
    """What the capabilities of one VM answered, asked once at start.

    Attributes
    ----------
    vm_attributes, gmem_attributes : int
        Attributes that the VM fd and a guest_memfd take; at most one of the two isn't 0.
    gmem_flags : int
        Flags for creating a guest_memfd.
    content : dict of (Phase, Direction) to int
        Content flags advertised by the capabilities that cover a phase and direction.
    flags : tuple of Flag
        The flags that the revision names.
    """

    vm_attributes: int
    gmem_attributes: int
    gmem_flags: int
    content: dict[tuple[Phase, Direction], int]
    flags: tuple[Flag, ...]

    @property
    def private_memory(self) -> bool:
        """Whether memory can be made private."""
        return bool((self.vm_attributes | self.gmem_attributes) & MemoryAttribute.PRIVATE)

    @property
    def in_place(self) -> bool:
        """Whether one backing is converted in place; otherwise there are two, and one is discarded."""
        return bool(self.gmem_attributes & MemoryAttribute.PRIVATE)

    @property
    def init_shared(self) -> bool:
        """Whether a file can start shared."""
        return bool(self.gmem_flags & GuestMemfdFlag.INIT_SHARED)

    def advertised(self, phase: Phase, direction: Direction) -> int:
        """Return the content flags advertised for a phase and direction."""
        return self.content[phase, direction]

    def believes(self, flag: Flag, phase: Phase, direction: Direction) -> bool:
        """Return whether a flag is believed allowed: advertised, and not ruled out by its documentation."""
        documented = phase in flag.phases and direction in flag.directions
        return documented and bool(self.advertised(phase, direction) & flag.bit)

    def preserving(self, phase: Phase, direction: Direction) -> tuple[Flag, ...]:
        """Return the flags believed to keep contents, the most specific name first."""
        believed = [row for row in self.flags if row.preserves and self.believes(row, phase, direction)]
        return tuple(sorted(believed, key=lambda row: len(row.phases) * len(row.directions)))

    @property
    def documents_preserving(self) -> bool:
        """Whether the revision has a flag for keeping contents, advertised or not."""
        return any(row.preserves for row in self.flags)


def probe(vm: VmFace) -> Supported:
    """Ask the capabilities of a VM about attributes, file flags and content flags."""
    content = {
        (phase, direction): _advertised(vm, phase, direction)
        for phase, direction in product(Phase, Direction)
    }
    return Supported(
        vm_attributes=vm.check_cap(Capability.MEMORY_ATTRIBUTES),
        gmem_attributes=vm.check_cap(Capability.GUEST_MEMFD_MEMORY_ATTRIBUTES),
        gmem_flags=vm.check_cap(Capability.GUEST_MEMFD_FLAGS),
        content=content,
        flags=vm.abi.flags,
    )


def _advertised(vm: VmFace, phase: Phase, direction: Direction) -> int:
    """Return the union of what the capabilities that cover a phase and direction answer."""
    bits = 0
    for row in vm.abi.capabilities:
        if phase in row.phases and direction in row.directions:
            bits |= vm.check_cap(row.name)
    return bits
