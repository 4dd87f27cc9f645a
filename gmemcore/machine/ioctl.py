"""Raw ioctls: request numbers and structs, as a program passes them to the kernel."""

from typing import TYPE_CHECKING

from gmemcore.errors import BadAddressError, BadFileError, GmemError, UnknownIoctlError
from gmemcore.uapi import (
    KVM_SET_MEMORY_ATTRIBUTES,
    KVM_SET_MEMORY_ATTRIBUTES2,
    MEMORY_ATTRIBUTES2_ERROR_OFFSET_AT,
    MEMORY_ATTRIBUTES2_STRUCT,
    MEMORY_ATTRIBUTES_STRUCT,
)

if TYPE_CHECKING:
    from gmemcore.machine.guest_memfd import GuestMemfd
    from gmemcore.machine.vm import Vm


def gmem_ioctl(gmem: "GuestMemfd", request: int, argument: bytearray | bytes | None) -> None:
    """Do an ioctl(2) on a guest_memfd; see `GuestMemfd.ioctl`."""
    if gmem.closed:
        raise BadFileError("the guest_memfd is closed")
    if request != KVM_SET_MEMORY_ATTRIBUTES2 or not gmem.vm.rules.has_ioctl:
        raise UnknownIoctlError(f"a guest_memfd has no request {request:#x} under abi {gmem.vm.abi.name}")
    data = _copy_in(argument, MEMORY_ATTRIBUTES2_STRUCT.size)
    offset, size, attributes, flags, error_offset, *reserved = MEMORY_ATTRIBUTES2_STRUCT.unpack(data)
    try:
        gmem.set_memory_attributes(
            offset, size, attributes, flags, error_offset=error_offset, reserved=max(reserved)
        )
    except GmemError as error:
        if error.error_offset is not None:
            _copy_out(argument, error.error_offset)
        raise


def vm_ioctl(vm: "Vm", request: int, argument: bytearray | bytes | None) -> None:
    """Do an ioctl(2) on a VM fd; see `Vm.ioctl`."""
    if request != KVM_SET_MEMORY_ATTRIBUTES:
        raise UnknownIoctlError(f"a VM fd has no request {request:#x} here")
    data = _copy_in(argument, MEMORY_ATTRIBUTES_STRUCT.size)
    vm.set_memory_attributes(*MEMORY_ATTRIBUTES_STRUCT.unpack(data))


def _copy_in(argument: bytearray | bytes | None, size: int) -> bytes:
    if argument is not None and not isinstance(argument, (bytes, bytearray)):
        raise TypeError(f"argument must be a bytearray, bytes or None, not {type(argument).__name__}")
    if argument is None or len(argument) < size:
        raise BadAddressError(f"the argument can't be read; it must be at least {size} bytes")
    return bytes(argument[:size])


def _copy_out(argument: bytearray | bytes | None, error_offset: int) -> None:
    """Write error_offset back, as the kernel does on ENOMEM, EAGAIN and EOPNOTSUPP."""
    if not isinstance(argument, bytearray):
        raise BadAddressError(f"error_offset {error_offset:#x} can't be written back; use a bytearray")
    at = MEMORY_ATTRIBUTES2_ERROR_OFFSET_AT
    argument[at : at + 8] = error_offset.to_bytes(8, "little")
