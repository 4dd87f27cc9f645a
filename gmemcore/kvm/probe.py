"""What this host's KVM offers: found by asking, and where numbers moved, by calling."""

import errno
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gmemcore.errors import GmemError, InvalidArgumentError, UnknownIoctlError
from gmemcore.kvm.client import KvmFile, KvmVm, check_extension
from gmemcore.kvm.structs import CAPABILITIES, KVM_GET_API_VERSION, SWITCHES, VM_TYPES
from gmemcore.kvm.transport import Transport
from gmemcore.policy import PLATFORMS
from gmemcore.uapi import PAGE_SIZE, ContentMode, GuestMemfdFlag, MemoryAttribute, VmType

NO_FIRMWARE_LAUNCH = "its guests need a launch by the platform's firmware, which isn't done here"
UNREACHED = "guest accesses don't reach guest_memfd: KVM emulates them, at the memslot's userspace address"
_MODULES = Path("/sys/module")
_PROBE_GPA = 4 << 30
_FLAG_BITS = 64


@dataclass(frozen=True, slots=True)
class VmOffer:
    """What a VM type offers on this host.

    Attributes
    ----------
    vm_type : VmType
        The model's name.
    capabilities : mapping of str to int
        Those with a stable number, as the VM answers.
    creation_flags : int or None
        Flags that KVM_CREATE_GUEST_MEMFD took, each tried alone; None: it has no guest_memfd.
    in_place : bool
        Whether KVM_SET_MEMORY_ATTRIBUTES2 is there: called, and not ENOTTY.
    vm_attributes : bool
        The same of KVM_SET_MEMORY_ATTRIBUTES on the VM fd.
    abi : str
        The revision that this is, by what calls answered; ``legacy`` where nothing is converted in place.
    guest : str or None
        Why no guest can be run; None if one was run, and reached the memory of its guest_memfd.
    guest_address_bits : int
        Bits of a guest physical address; 0 without a guest.
    pins : str or None
        Why pages can't be pinned; None if one was.
    """

    vm_type: VmType
    capabilities: Mapping[str, int]
    creation_flags: int | None
    in_place: bool
    vm_attributes: bool
    abi: str
    guest: str | None
    guest_address_bits: int
    pins: str | None


@dataclass(frozen=True, slots=True)
class Host:
    """What a host's KVM offers.

    Attributes
    ----------
    release : str
        Release of the kernel.
    api_version : int
        KVM_GET_API_VERSION.
    modules : tuple of str
        Modules of KVM that are loaded or built in.
    switches : mapping of str to str
        Module parameters about conversion in place, where they exist and can be read.
    capabilities : mapping of str to int
        Those with a stable number, as /dev/kvm answers.
    vm_types : tuple of str
        VM types on offer, by KVM's names.
    offers : mapping of VmType to VmOffer
        More about those that the model has too.
    """

    release: str
    api_version: int
    modules: tuple[str, ...]
    switches: Mapping[str, str]
    capabilities: Mapping[str, int]
    vm_types: tuple[str, ...]
    offers: Mapping[VmType, VmOffer]


def probe(transport: Transport) -> Host:
    """Find out what a kernel offers; leaves nothing behind.

    Raises
    ------
    KvmUnavailableError
        ENODEV: there is no KVM, or not for this user.
    """
    kvm = transport.open()
    try:
        capabilities = {name: check_extension(transport, kvm, name) for name in CAPABILITIES}
        api_version = transport.ioctl(kvm, KVM_GET_API_VERSION)
    finally:
        transport.close(kvm)
    # Before there was a capability for it, there was one type.
    offered = capabilities["VM_TYPES"] or 1
    types = [row for row in VM_TYPES if offered >> row.number & 1]
    return Host(
        release=transport.release,
        api_version=api_version,
        modules=tuple(sorted(path.name for path in _MODULES.glob("kvm*"))),
        switches=_switches(),
        capabilities=capabilities,
        vm_types=tuple(row.name for row in types),
        offers={row.modelled: _probe_vm(transport, row.modelled) for row in types if row.modelled},
    )


def _switches() -> dict[str, str]:
    found = {}
    for name in SWITCHES:
        with suppress(OSError):
            found[name] = (_MODULES / "kvm/parameters" / name).read_text().strip()
    return found


def _probe_vm(transport: Transport, vm_type: VmType) -> VmOffer:
    with KvmVm(transport, vm_type) as vm:
        capabilities = {name: vm.check_cap(name) for name in CAPABILITIES}
        flags = _creation_flags(vm)
        vm_attributes = _has_ioctl(lambda: vm.set_memory_attributes(0, 0, 0))
        abi = "legacy" if flags is None else _abi(vm)
    guest, bits, pins = _probe_use(transport, vm_type, abi, flags)
    in_place = abi != "legacy"
    return VmOffer(vm_type, capabilities, flags, in_place, vm_attributes, abi, guest, bits, pins)


def _creation_flags(vm: KvmVm) -> int | None:
    """Try every flag alone, as the kernel's selftest does; None if there isn't even a file without flags."""
    taken = 0
    try:
        vm.create_guest_memfd(PAGE_SIZE, 0).close()
    except GmemError:
        return None
    for flag in (1 << bit for bit in range(_FLAG_BITS)):
        with suppress(GmemError):
            vm.create_guest_memfd(PAGE_SIZE, flag).close()
            taken |= flag
    return taken


def _has_ioctl(call: Callable[[], None]) -> bool:
    """Whether a call that can't succeed fails otherwise than with ENOTTY."""
    try:
        call()
    except UnknownIoctlError:
        return False
    except GmemError:
        return True
    return True


def _answers_einval(gmem: KvmFile, flags: int, error_offset: int) -> bool:
    try:
        gmem.set_memory_attributes(0, PAGE_SIZE, 0, flags, error_offset=error_offset)
    except InvalidArgumentError:
        return True
    except GmemError:
        return False
    return False


def _abi(vm: KvmVm) -> str:
    """The revision of the interface, by what tells the revisions apart: a flag, then error_offset on input.

    On a VM without private memory v13 refuses even attribute 0 without a flag, and the others take it.
    """
    with vm.create_guest_memfd(PAGE_SIZE) as gmem:
        if not _has_ioctl(lambda: gmem.set_memory_attributes(0, 0, 0)):
            return "legacy"
        flag = ContentMode.ZERO if PLATFORMS[vm.vm_type].private_memory else ContentMode.NONE
        if _answers_einval(gmem, flag, error_offset=0):
            return "v13"
        return "v4" if _answers_einval(gmem, ContentMode.NONE, error_offset=1) else "v5"


def _probe_use(
    transport: Transport, vm_type: VmType, abi: str, flags: int | None
) -> tuple[str | None, int, str | None]:
    """Run a guest and pin a page: why not, the guest's address bits, why not."""
    if flags is None:
        return "it has no guest_memfd", 0, "it has no guest_memfd"
    platform = PLATFORMS[vm_type]
    two_backings = abi == "legacy" and platform.private_memory
    with KvmVm(transport, vm_type, two_backings=two_backings) as vm:
        wanted = GuestMemfdFlag(0) if two_backings else GuestMemfdFlag.MMAP | GuestMemfdFlag.INIT_SHARED
        try:
            gmem = vm.create_guest_memfd(PAGE_SIZE, wanted)
        except GmemError as error:
            why = f"it has no guest_memfd that the host can map: {error.outcome}"
            return why, 0, why
        pins = _why_not(lambda: gmem.pin(0, PAGE_SIZE))
        gmem.unpin(0, PAGE_SIZE)
        if platform.coco:
            return NO_FIRMWARE_LAUNCH, 0, pins
        guest = _why_not(lambda: _run_guest(transport, vm, gmem, private=platform.private_memory))
        bits = vm.vcpu.address_bits if guest is None else 0
    return guest, bits, pins


def _run_guest(transport: Transport, vm: KvmVm, gmem: KvmFile, *, private: bool) -> None:
    """Let a guest read what the host wrote, and the host what the guest wrote; in private memory too.

    The memslot's userspace address is that of other memory: a KVM that emulates the guest's instructions
    reads and writes there, and never reaches the file. With two backings, shared memory belongs there.
    """
    address = transport.memory(PAGE_SIZE)
    try:
        vm.add_memslot(1, _PROBE_GPA, PAGE_SIZE, gmem, userspace_address=address)
        if not vm.two_backings:
            gmem.host_write(1, b"\x5a")
            _expect(vm.guest_read(_PROBE_GPA + 1, 1), b"\x5a", UNREACHED)
            vm.guest_write(_PROBE_GPA, b"\xa5")
            _expect(gmem.host_read(0, 2), b"\xa5\x5a", UNREACHED)
        if private:
            if vm.two_backings:
                vm.set_memory_attributes(_PROBE_GPA, PAGE_SIZE, MemoryAttribute.PRIVATE)
            else:
                gmem.set_memory_attributes(0, PAGE_SIZE, MemoryAttribute.PRIVATE)
            vm.guest_write(_PROBE_GPA, b"\xc3")
            _expect(vm.guest_read(_PROBE_GPA, 1), b"\xc3", "a guest doesn't read what it wrote privately")
        _expect(transport.load(address, 2), bytes(2), UNREACHED)
    finally:
        transport.unmap(address, PAGE_SIZE)


class _Unexpected(GmemError):
    """ENODEV: a guest ran, and other bytes were found than those written."""

    number = errno.ENODEV


def _expect(found: bytes, expected: bytes, why: str) -> None:
    if found != expected:
        raise _Unexpected(why)


def _why_not(call: Callable[[], None]) -> str | None:
    try:
        call()
    except _Unexpected as error:
        return error.strerror
    except GmemError as error:
        return f"tried, and got {error.outcome}: {error.strerror}"
    return None
