"""The userspace side: capability probing, conversion across memslots, listeners, flows and the audit."""

from gmemcore.vmm.attributes import (
    CapabilityAssertionError,
    guest_memfd_set_memory_attributes_fd,
    vm_set_memory_attributes,
)
from gmemcore.vmm.guest import GuestProgram
from gmemcore.vmm.probe import Supported, probe
from gmemcore.vmm.ram_block import Listener, RamBlockAttributes
from gmemcore.vmm.undo import UndoError, UndoLog
from gmemcore.vmm.userspace import Converted, Section, Vmm
from gmemcore.vmm.vfio import Vfio

__all__ = [
    "CapabilityAssertionError",
    "Converted",
    "GuestProgram",
    "Listener",
    "RamBlockAttributes",
    "Section",
    "Supported",
    "UndoError",
    "UndoLog",
    "Vfio",
    "Vmm",
    "guest_memfd_set_memory_attributes_fd",
    "probe",
    "vm_set_memory_attributes",
]
