"""Where kernels are known to answer otherwise than the vectors, as data: one row per difference.

A row excuses one outcome in place of another, for the kernels and the steps that it names, and for nothing
else. What isn't here is a difference, and ``gmemcore kvm conform`` says so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gmemcore.errors import GmemError
from gmemcore.kvm.missed import Step, size_of
from gmemcore.uapi import PAGE_SIZE

if TYPE_CHECKING:
    from gmemcore.kvm.client import KvmVm

Version = tuple[int, int]

FIRST_KERNEL: Version = (6, 8)
"""The first that had guest_memfd."""
MAX_FILE_SIZE = (1 << 63) - 1
"""Largest offset of the virtual file system (``MAX_LFS_FILESIZE``)."""
MOST_ADDRESS_BITS = 52
"""Of a physical address of x86."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One known difference.

    Attributes
    ----------
    op : str
        Operation of the step.
    written, found : str
        The outcome in the vectors, and the kernel's.
    since, before : (major, minor)
        Kernels that answer so, half-open; before None: all that are known.
    when : callable
        Whether this step of a VM is such a one.
    why : str
        What the kernel does.
    """

    op: str
    written: str
    found: str
    since: Version
    before: Version | None
    when: "Callable[[KvmVm, Step], bool]"
    why: str


def _unaligned_or_empty(_: "KvmVm", step: Step) -> bool:
    return bool(step["size"] == 0 or step.get("offset", 0) % PAGE_SIZE)


def _mapped_beyond_files(_: "KvmVm", step: Step) -> bool:
    end = step.get("offset", 0) + size_of(step)
    return bool(-(-end // PAGE_SIZE) * PAGE_SIZE > MAX_FILE_SIZE)


def _beyond_address_space(_: "KvmVm", step: Step) -> bool:
    return bool(step["size"] >= 1 << 46)


def _free_in_gpa(vm: "KvmVm", step: Step) -> bool:
    start, end = step["gpa"], step["gpa"] + step["size"]
    return all(end <= slot.gpa or slot.gpa + slot.size <= start for slot in vm.memslots.values())


def _beyond_guest_memory(vm: "KvmVm", step: Step) -> bool:
    try:
        bits = vm.vcpu.address_bits
    except GmemError:
        bits = MOST_ADDRESS_BITS
    return bool(step["gpa"] + step["size"] > 1 << bits)


DIFFERENCES = (
    Difference(
        *("slot_add", "EEXIST", "EINVAL", FIRST_KERNEL, (6, 19), _free_in_gpa),
        "a range of the file that is bound already was a wrong argument before it was a conflict",
    ),
    *(
        Difference(
            *("slot_add", written, "EINVAL", FIRST_KERNEL, None, _beyond_guest_memory),
            "a memslot must end within the physical addresses that this host can give a guest; the file, and "
            "what else is bound to it, can come after that",
        )
        for written in ("OK", "EEXIST", "EBADF")
    ),
    *(
        Difference(
            *("mmap", written, "ENOMEM", FIRST_KERNEL, None, _beyond_address_space),
            "the mapping doesn't fit into the address space, which is looked at before the file",
        )
        for written in ("OK", "ENODEV", "EINVAL")
    ),
    *(
        Difference(
            *(op, written, "EOVERFLOW", FIRST_KERNEL, None, _mapped_beyond_files),
            "memory management refuses a mapping that ends beyond 2^63 - 1, before the file is asked",
        )
        for op, written in (
            *(("mmap", "OK"), ("mmap", "ENODEV"), ("mmap", "EINVAL")),
            *(("host_read", "SIGBUS"), ("host_write", "SIGBUS")),
        )
    ),
)
"""The known differences. Observed on Linux 6.18 (the default VM type); the first and its end on 7.3, too."""


def version_of(release: str) -> Version:
    """Major and minor number of a kernel release such as ``6.18.44-generic``; (0, 0) if it isn't one."""
    numbers = release.split("-")[0].split(".")[:2]
    if len(numbers) < 2 or not all(number.isdigit() for number in numbers):
        return 0, 0
    return int(numbers[0]), int(numbers[1])


def known_difference(release: str, vm: "KvmVm", step: Step, outcome: str) -> Difference | None:
    """The row that excuses this outcome of a step on this kernel, or None."""
    version = version_of(release)
    for row in DIFFERENCES:
        if (row.op, row.written, row.found) != (step["op"], step.get("expect", "OK"), outcome):
            continue
        if row.since <= version and (row.before is None or version < row.before) and row.when(vm, step):
            return row
    return None
