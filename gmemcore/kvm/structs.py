"""Numbers and layouts of the host's KVM, as far as the client uses them.

Those of the modelled conversion are in `gmemcore.uapi`.

References
----------
``include/uapi/linux/kvm.h`` and ``arch/x86/include/uapi/asm/kvm.h``, Linux 6.18; KVM API documentation.
"""

import struct
from typing import NamedTuple

from gmemcore.uapi import KVMIO, VmType


def _none(number: int) -> int:
    return KVMIO << 8 | number


def _write(number: int, size: int) -> int:
    return 1 << 30 | size << 16 | KVMIO << 8 | number


def _read(number: int, size: int) -> int:
    return 2 << 30 | size << 16 | KVMIO << 8 | number


def _read_write(number: int, size: int) -> int:
    return 3 << 30 | size << 16 | KVMIO << 8 | number


# ---- structures ------------------------------------------------------------------------------------------
CREATE_GUEST_MEMFD_STRUCT = struct.Struct("<QQ6Q")
"""``struct kvm_create_guest_memfd``: size, flags, reserved[6] (KVM API 4.142)."""

USER_MEMORY_REGION2_STRUCT = struct.Struct("<IIQQQQII14Q")
"""``struct kvm_userspace_memory_region2``: slot, flags, gpa, size, userspace address, offset in the
guest_memfd, its fd, pad (KVM API 4.140)."""

REGS_STRUCT = struct.Struct("<18Q")
"""``struct kvm_regs``: rax rbx rcx rdx rsi rdi rsp rbp r8-r15 rip rflags."""

SEGMENT_STRUCT = struct.Struct("<QIH8Bxx")
"""``struct kvm_segment``: base, limit, selector, type, present, dpl, db, s, l, g, avl."""

SREGS_SIZE = 312
"""Bytes of ``struct kvm_sregs``: cs ds es fs gs ss tr ldt, gdt, idt, then `CONTROL_STRUCT`."""
SREGS_TR = 6
"""Which of the segments is the task register; the ones before it are cs and the data segments."""
CONTROL_STRUCT = struct.Struct("<6Q")
"""cr0 cr2 cr3 cr4 cr8 efer."""
CONTROL_AT = 8 * SEGMENT_STRUCT.size + 2 * 16

CPUID_HEADER_STRUCT = struct.Struct("<II")
"""``struct kvm_cpuid2`` without its entries: their number, padding."""
CPUID_ENTRY_STRUCT = struct.Struct("<7I12x")
"""``struct kvm_cpuid_entry2``: function, index, flags, eax, ebx, ecx, edx."""
CPUID_ADDRESS_SIZES = 0x80000008
"""CPUID function whose low byte of eax is the number of physical address bits."""

SIGNAL_MASK_STRUCT = struct.Struct("<I")
"""``struct kvm_signal_mask`` without its set of signals: the bytes of that."""

RUN_IMMEDIATE_EXIT_AT = 1
RUN_EXIT_REASON_AT = 8
RUN_EXIT_AT = 32
"""Byte positions in ``struct kvm_run``."""
MMIO_EXIT_STRUCT = struct.Struct("<Q8sIB")
"""``kvm_run.mmio``: physical address, data, length, is_write."""
MEMORY_FAULT_EXIT_STRUCT = struct.Struct("<QQQ")
"""``kvm_run.memory_fault``: flags, gpa, size."""

# ---- requests --------------------------------------------------------------------------------------------
KVM_GET_API_VERSION = _none(0x00)
KVM_CREATE_VM = _none(0x01)
KVM_CHECK_EXTENSION = _none(0x03)
KVM_GET_VCPU_MMAP_SIZE = _none(0x04)
KVM_GET_SUPPORTED_CPUID = _read_write(0x05, CPUID_HEADER_STRUCT.size)
KVM_CREATE_VCPU = _none(0x41)
KVM_SET_USER_MEMORY_REGION2 = _write(0x49, USER_MEMORY_REGION2_STRUCT.size)
KVM_RUN = _none(0x80)
KVM_SET_REGS = _write(0x82, REGS_STRUCT.size)
KVM_GET_SREGS = _read(0x83, SREGS_SIZE)
KVM_SET_SREGS = _write(0x84, SREGS_SIZE)
KVM_SET_SIGNAL_MASK = _write(0x8B, SIGNAL_MASK_STRUCT.size)
KVM_SET_CPUID2 = _write(0x90, CPUID_HEADER_STRUCT.size)
KVM_CREATE_GUEST_MEMFD = _read_write(0xD4, CREATE_GUEST_MEMFD_STRUCT.size)

KVM_API_VERSION = 12
KVM_MEM_GUEST_MEMFD = 1 << 2
"""Flag of a memory region that has a guest_memfd."""

KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_MEMORY_FAULT = 39


# ---- names -----------------------------------------------------------------------------------------------
class VmTypeNumber(NamedTuple):
    """A VM type of ``KVM_CREATE_VM``: its bit of KVM_CAP_VM_TYPES, its name, and the model's, if any."""

    number: int
    name: str
    modelled: VmType | None


VM_TYPES = (
    VmTypeNumber(0, "DEFAULT", VmType.DEFAULT),
    VmTypeNumber(1, "SW_PROTECTED", VmType.SW_PROTECTED),
    VmTypeNumber(2, "SEV", None),
    VmTypeNumber(3, "SEV_ES", None),
    VmTypeNumber(4, "SNP", VmType.SNP),
    VmTypeNumber(5, "TDX", VmType.TDX),
)
"""``KVM_X86_*_VM``. Elsewhere than on x86 there is no such list, and only the default type is asked for."""

ORDINARY = VmType.DEFAULT
"""The VM type that every KVM has: without private memory, without firmware."""

VM_TYPE_NUMBERS = {row.modelled: row.number for row in VM_TYPES if row.modelled is not None}
"""The model's VM types that a KVM_CREATE_VM of x86 knows."""

CAPABILITIES = {
    "NR_MEMSLOTS": 10,
    "IMMEDIATE_EXIT": 136,
    "USER_MEMORY2": 231,
    "MEMORY_FAULT_INFO": 232,
    "MEMORY_ATTRIBUTES": 233,
    "GUEST_MEMFD": 234,
    "VM_TYPES": 235,
    "PRE_FAULT_MEMORY": 236,
    "GUEST_MEMFD_FLAGS": 244,
}
"""Capabilities whose number is the same in every released kernel, by name without ``KVM_CAP_``."""

MOVED_CAPABILITIES = {
    "GUEST_MEMFD_MEMORY_ATTRIBUTES": (246, 249, 250),
    "MEMORY_ATTRIBUTES2": (245, 248),
    "MEMORY_ATTRIBUTES2_FLAGS": (250,),
}
"""Capabilities whose number moved between postings of the series: a number doesn't tell which one answers.

What they would say is found by calling the ioctl instead.
"""
TAKEN_NUMBERS = {
    245: "ARM_SEA_TO_USER",
    246: "S390_USER_OPEREXEC",
    248: "S390_VSIE_ESAMODE",
    249: "S390_HPAGE_2G",
    250: "PPC_COMPAT_CAPS",
    251: "ARM_PMU_V3_STRICT",
}
"""Whose these numbers, and the next one, are in Linux 7.3."""

SWITCHES = ("gmem_in_place_conversion", "vm_memory_attributes")
"""Names of the module parameter of conversion in place: since v8, and (with the inverse sense) before."""
