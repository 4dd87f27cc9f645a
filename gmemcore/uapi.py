"""The modelled userspace interface: enumerations, request numbers and structure layouts.

Enumerations follow ``include/uapi/linux/kvm.h`` without its prefixes; ``ContentMode.PRESERVE`` is
``KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE``. Capability *numbers* moved between postings (245, 246, 248, 249 and
250 were seen), so capabilities go by name here.

References
----------
KVM API documentation, sections 4.141 (``KVM_SET_MEMORY_ATTRIBUTES``), 4.142 (``KVM_CREATE_GUEST_MEMFD``) and,
in the in-place series, 4.145 (``KVM_SET_MEMORY_ATTRIBUTES2``); "guest_memfd: in-place conversion", RFC v4
(20260326-gmem-inplace-conversion-v4-0-e202fe950ffd@google.com), RFC v5
(20260428-gmem-inplace-conversion-v5-0-d8608ccfca22@google.com) and v13
(20260910-gmem-inplace-conversion-v13-0-dd6fbf94f4e1@google.com).
"""

import struct
from enum import IntEnum, IntFlag, StrEnum

PAGE_SHIFT = 12
"""log2 of the unit of attributes."""
PAGE_SIZE = 1 << PAGE_SHIFT
"""Bytes in a page, the unit of attributes."""


class VmType(StrEnum):
    """Type of the guest, as ``KVM_CREATE_VM`` takes it (``KVM_X86_*_VM``; pKVM is arm64's)."""

    DEFAULT = "DEFAULT"
    SW_PROTECTED = "SW_PROTECTED"
    SNP = "SNP"
    TDX = "TDX"
    PKVM = "PKVM"


class Firmware(StrEnum):
    """What the trusted firmware below the kernel can do.

    ``CIPHER`` is hypothetical: an SNP or TDX firmware that encrypts and decrypts a page in place after
    launch, as imagined in Michael Roth's mail of 29 Apr 2026 (Re: [RFC v4 10/44]).
    """

    TODAY = "today"
    CIPHER = "cipher"


class ContentWork(StrEnum):
    """When the model does an operation's work on bytes: at once, or when somebody needs the bytes."""

    EAGER = "eager"
    DEFERRED = "deferred"


class Phase(StrEnum):
    """Launch phase: RUNNING begins with ``SNP_LAUNCH_FINISH`` or the finalize of TDX."""

    LAUNCHING = "launching"
    RUNNING = "running"


class Direction(StrEnum):
    """Direction of a conversion: which attribute the range is to have."""

    TO_PRIVATE = "to_private"
    TO_SHARED = "to_shared"


class ContentMode(IntFlag):
    """Content modes: what the caller asks to happen to the bytes (``flags`` of the request).

    ZERO and PRESERVE are bits 0 and 1 of RFC v4 and v5. The others never appeared in a posted version of the
    series; their bits are this model's own.
    """

    NONE = 0
    ZERO = 1
    PRESERVE = 2
    PRESERVE_BEFORE_LAUNCH = 4
    PRESERVE_AFTER_LAUNCH = 8
    CIPHER = 16


class MemoryAttribute(IntFlag):
    """Memory attributes; the value of ``KVM_MEMORY_ATTRIBUTE_PRIVATE``. Shared is the absence of PRIVATE."""

    PRIVATE = 8


class GuestMemfdFlag(IntFlag):
    """Flags of ``KVM_CREATE_GUEST_MEMFD`` (``GUEST_MEMFD_FLAG_*``).

    HUGETLB isn't upstream; its number is that of RFC v2 of "1G page support for guest_memfd" (May 2025).
    """

    MMAP = 1
    INIT_SHARED = 2
    HUGETLB = 4


class MemslotFlag(IntFlag):
    """Flags of ``KVM_SET_USER_MEMORY_REGION2`` (``KVM_MEM_*``); GUEST_MEMFD goes with none of the others."""

    LOG_DIRTY_PAGES = 1
    READONLY = 2
    GUEST_MEMFD = 4


class Protection(IntFlag):
    """Protection of a mapping (``PROT_*``)."""

    READ = 1
    WRITE = 2
    EXEC = 4


class FallocateMode(IntFlag):
    """Modes of ``fallocate(2)`` (``FALLOC_FL_*``); a guest_memfd takes the first two."""

    KEEP_SIZE = 0x01
    PUNCH_HOLE = 0x02
    COLLAPSE_RANGE = 0x08
    ZERO_RANGE = 0x10
    INSERT_RANGE = 0x20
    UNSHARE_RANGE = 0x40
    WRITE_ZEROES = 0x80


class PageType(StrEnum):
    """Page types of a launch update, after the SNP firmware ABI (``KVM_SEV_SNP_PAGE_TYPE_*``)."""

    NORMAL = "NORMAL"
    ZERO = "ZERO"
    UNMEASURED = "UNMEASURED"
    SECRETS = "SECRETS"
    CPUID = "CPUID"
    VMSA = "VMSA"


NUMBERS: dict[type[StrEnum], dict[int, StrEnum]] = {
    VmType: {0: VmType.DEFAULT, 1: VmType.SW_PROTECTED, 4: VmType.SNP, 5: VmType.TDX},
    Direction: {int(MemoryAttribute.PRIVATE): Direction.TO_PRIVATE, 0: Direction.TO_SHARED},
    PageType: {
        **{1: PageType.NORMAL, 2: PageType.VMSA, 3: PageType.ZERO, 4: PageType.UNMEASURED},
        **{5: PageType.SECRETS, 6: PageType.CPUID},
    },
}
"""Members by the interface's own number, for enumerations that go by name here.

``KVM_X86_*_VM``; the attribute that a direction sets; the page types of the SNP firmware ABI.
"""


class Capability(StrEnum):
    """Capabilities by name, without ``KVM_CAP_``.

    ``MEMORY_ATTRIBUTES2_FLAGS`` is RFC v4's and v5's. The two named after a launch phase were only proposed
    (Michael Roth, 29 Apr 2026).
    """

    MEMORY_ATTRIBUTES = "MEMORY_ATTRIBUTES"
    GUEST_MEMFD = "GUEST_MEMFD"
    GUEST_MEMFD_FLAGS = "GUEST_MEMFD_FLAGS"
    GUEST_MEMFD_MEMORY_ATTRIBUTES = "GUEST_MEMFD_MEMORY_ATTRIBUTES"
    MEMORY_ATTRIBUTES2_FLAGS = "MEMORY_ATTRIBUTES2_FLAGS"
    MEMORY_ATTRIBUTES2_PRE_LAUNCH_FLAGS = "MEMORY_ATTRIBUTES2_PRE_LAUNCH_FLAGS"
    MEMORY_ATTRIBUTES2_POST_LAUNCH_FLAGS = "MEMORY_ATTRIBUTES2_POST_LAUNCH_FLAGS"


MEMORY_ATTRIBUTES_STRUCT = struct.Struct("<4Q")
"""``struct kvm_memory_attributes``, 32 bytes: address, size, attributes, flags (KVM API 4.141)."""

MEMORY_ATTRIBUTES2_RESERVED_WORDS = 11
"""Length of ``reserved`` in ``struct kvm_memory_attributes2``."""

MEMORY_ATTRIBUTES2_STRUCT = struct.Struct(f"<5Q{MEMORY_ATTRIBUTES2_RESERVED_WORDS}Q")
"""``struct kvm_memory_attributes2``, 128 bytes: offset, size, attributes, flags, error_offset, reserved[11].

The first four fields lie where ``struct kvm_memory_attributes`` has them (KVM API 4.145; the same since v2).
"""

MEMORY_ATTRIBUTES2_ERROR_OFFSET_AT = 4 * 8
"""Byte position of ``error_offset``, the only field the kernel writes back."""


class _IocDirection(IntEnum):
    """Direction bits of a Linux request number, seen from userspace (``asm-generic/ioctl.h``)."""

    WRITE = 1
    READ = 2
    READ_WRITE = 3


def _ioc(direction: _IocDirection, kind: int, number: int, size: int) -> int:
    """Return a request number: direction (2 bits), argument size (14), kind (8), number (8)."""
    return direction << 30 | size << 16 | kind << 8 | number


KVMIO = 0xAE
"""The kind byte of every KVM request."""

KVM_SET_MEMORY_ATTRIBUTES = _ioc(_IocDirection.WRITE, KVMIO, 0xD2, MEMORY_ATTRIBUTES_STRUCT.size)
"""Request of the VM fd, upstream since 6.8 (KVM API 4.141)."""

KVM_SET_MEMORY_ATTRIBUTES2 = _ioc(_IocDirection.READ_WRITE, KVMIO, 0xD2, MEMORY_ATTRIBUTES2_STRUCT.size)
"""Request of the guest_memfd fd; number 0xd2 since v2 of the series (v1 had 0xd6)."""
