"""Where kernels are known to answer otherwise than the vectors, as data: one row per difference.

A row excuses one outcome in place of another, for the kernels and the steps that it names, and for nothing
else. What isn't here is a difference, and ``gmemcore kvm conform`` says so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

from gmemcore.errors import GmemError
from gmemcore.kvm.missed import Step, size_of
from gmemcore.ordinary import USER_END
from gmemcore.uapi import KVM_SET_MEMORY_ATTRIBUTES, PAGE_SIZE

if TYPE_CHECKING:
    from gmemcore.kvm.client import KvmVm
    from gmemcore.kvm.probe import VmOffer

Version = tuple[int, int]

FIRST_KERNEL: Version = (6, 8)
"""The first that had guest_memfd."""
MAX_FILE_SIZE = (1 << 63) - 1
"""Largest offset of the virtual file system (``MAX_LFS_FILESIZE``)."""
FIVE_LEVEL_END = (1 << 56) - PAGE_SIZE
"""End of a process's addresses with five levels of page tables."""
MOST_ADDRESS_BITS = 52
"""Of a physical address of x86."""


class Situation(NamedTuple):
    """A step that came out otherwise: where it was done, and what the VM type offers."""

    vm: "KvmVm"
    step: Step
    offer: "VmOffer | None"


class Follow(Enum):
    """What is done after a known difference, so that model and kernel have the same state again."""

    NOTHING = auto()
    """Neither side changed anything."""
    MODEL_OMITS = auto()
    """The model hasn't done the step, which the kernel refused."""
    MODEL_DELETES = auto()
    """The model deletes the step's memslot, as the kernel did."""
    KERNEL_DELETES = auto()
    """The kernel deletes the step's memslot, which it should have refused."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One known difference.

    Attributes
    ----------
    op : str
        Operation of the step.
    written, found : str
        The outcome in the vectors, and the kernel's. Of two that are the same, gpa or flags differ.
    when : callable
        Whether it applies to a step.
    why : str
        What the kernel does.
    since, before : (major, minor)
        Kernels that answer so, half-open. [default: every known kernel]
    follow : Follow
        What is done about it.
    """

    op: str
    written: str
    found: str
    when: "Callable[[Situation], bool]"
    why: str
    since: Version = FIRST_KERNEL
    before: Version | None = None
    follow: Follow = Follow.NOTHING


def _unaligned_or_empty(at: Situation) -> bool:
    step = at.step
    return bool(step["size"] == 0 or step.get("offset", 0) % PAGE_SIZE)


def _mapped_beyond_files(at: Situation) -> bool:
    step = at.step
    end = step.get("offset", 0) + size_of(step)
    return bool(-(-end // PAGE_SIZE) * PAGE_SIZE > MAX_FILE_SIZE)


def _beyond_address_space(at: Situation) -> bool:
    step = at.step
    return bool(step["size"] >= 1 << 46)


def _large_and_private(at: Situation) -> bool:
    return not at.step.get("shared", True) and bool(at.step["size"] >= 1 << 30)


def _free_in_gpa(at: Situation) -> bool:
    step = at.step
    start, end = step["gpa"], step["gpa"] + step["size"]
    return all(end <= slot.gpa or slot.gpa + slot.size <= start for slot in at.vm.memslots.values())


def _beyond_guest_memory(at: Situation) -> bool:
    try:
        bits = at.vm.vcpu.address_bits
    except GmemError:
        bits = MOST_ADDRESS_BITS
    return bool(at.step["gpa"] + at.step["size"] > 1 << bits)


def _stale_mmio(at: Situation) -> bool:
    return at.vm.has_stale_mmio(at.step["gpa"], size_of(at.step))


def _file_range_overflows(at: Situation) -> bool:
    offset = at.step.get("gmem_offset", 0)
    return bool(offset < 1 << 63 <= offset + at.step["size"])


def _without_vm_attributes(at: Situation) -> bool:
    step = at.step
    asks = step["op"] == "vm_set" or (step["fd"] == "vm" and step["request"] == KVM_SET_MEMORY_ATTRIBUTES)
    return bool(asks) and at.offer is not None and not at.offer.vm_attributes


def _needs_five_levels(at: Situation) -> bool:
    end = at.step.get("userspace_addr", 0) + at.step["size"]
    return bool(USER_END < end <= FIVE_LEVEL_END)


def _behind_closed_file(at: Situation) -> bool:
    start = at.step["gpa"]
    end = start + size_of(at.step)
    reached = (slot for slot in at.vm.memslots.values() if slot.gpa < end and start < slot.gpa + slot.size)
    return any(slot.gmem is not None and slot.gmem.closed for slot in reached)


def _in_second_address_space(at: Situation) -> bool:
    return bool(at.step["slot"] >> 16 == 1)


_STALE_ANSWERS = (
    *(("OK", "MEMORY_FAULT"), ("MMIO", "MEMORY_FAULT"), ("MEMORY_FAULT", "MMIO")),
    ("MEMORY_FAULT", "MEMORY_FAULT"),  # with other flags
)

DIFFERENCES = (
    Difference(
        op="slot_add",
        written="EEXIST",
        found="EINVAL",
        before=(6, 19),
        when=_free_in_gpa,
        why="a range of the file that is bound already was EINVAL before it was EEXIST",
    ),
    *(
        Difference(
            op="slot_add",
            written=written,
            found="EINVAL",
            when=_beyond_guest_memory,
            why=(
                "a memslot must end within the guest addresses of this host, which is checked before the file"
            ),
            follow=Follow.MODEL_OMITS if written == "OK" else Follow.NOTHING,
        )
        for written in ("OK", "EEXIST", "EBADF")
    ),
    *(
        Difference(
            op=op,
            written=written,
            found=found,
            when=_stale_mmio,
            why="a bug in kvm_mmu_page_fault: a frame that was MMIO and is private now counts as shared",
            follow=Follow.MODEL_OMITS if (op, written) == ("guest_write", "OK") else Follow.NOTHING,
        )
        for op in ("guest_read", "guest_write")
        for written, found in _STALE_ANSWERS
    ),
    Difference(
        op="slot_add",
        written="EINVAL",
        found="OK",
        since=(6, 18),
        before=(6, 19),
        when=_file_range_overflows,
        why=(
            "a bug in kvm_gmem_bind: the end of the file's range is a signed number, "
            "so 2^63 is below every size"
        ),
        follow=Follow.KERNEL_DELETES,
    ),
    *(
        Difference(
            op="slot_add",
            written="EINVAL",
            found=found,
            when=applies,
            why=why,
            follow=Follow.KERNEL_DELETES if found == "OK" else Follow.NOTHING,
        )
        for found in ("OK", "EEXIST", "EBADF")
        for applies, why in (
            (_needs_five_levels, "with five levels of page tables a process has addresses up to 2^56"),
            (
                _in_second_address_space,
                "memslots of the second address space, that of system management mode, have ids from 65536",
            ),
        )
    ),
    Difference(
        op="mmap",
        written="EPERM",
        found="ENODEV",
        before=(6, 16),
        when=lambda _: True,
        why="a guest_memfd had no inode of its own, and only that makes an executable mapping EPERM",
    ),
    *(
        Difference(
            op=op,
            written="MEMORY_FAULT",
            found="EFAULT",
            when=_behind_closed_file,
            why="the memory next to a closed file is unmapped, which is no memory fault",
        )
        for op in ("guest_read", "guest_write")
    ),
    Difference(
        op="slot_add",
        written="EINVAL",
        found="OK",
        when=lambda at: at.step["size"] == 0,
        why="size 0 deletes the memslot",
        follow=Follow.MODEL_DELETES,
    ),
    *(
        Difference(
            op=op,
            written=written,
            found="ENOTTY",
            when=_without_vm_attributes,
            why="this kernel is built without attributes of a VM (KVM_GENERIC_MEMORY_ATTRIBUTES)",
        )
        for op in ("vm_set", "ioctl")
        for written in ("OK", "EINVAL", "EFAULT")
    ),
    *(
        Difference(
            op="mmap",
            written=written,
            found="ENOMEM",
            when=_beyond_address_space,
            why="the mapping doesn't fit into the address space, which is checked before the file",
        )
        for written in ("OK", "ENODEV", "EINVAL", "EPERM")
    ),
    *(
        Difference(
            op="mmap",
            written=written,
            found="ENOMEM",
            when=_large_and_private,
            why="a private mapping is charged against the host's memory before the file is asked",
        )
        for written in ("ENODEV", "EINVAL")
    ),
    *(
        Difference(
            op=op,
            written=written,
            found="EOVERFLOW",
            when=_mapped_beyond_files,
            why="memory management refuses a mapping that ends beyond 2^63 - 1, before the file is asked",
        )
        for op, written in (
            *(("mmap", "OK"), ("mmap", "ENODEV"), ("mmap", "EINVAL"), ("mmap", "EPERM")),
            *(("host_read", "SIGBUS"), ("host_write", "SIGBUS")),
        )
    ),
)
"""The known differences, observed on Linux 6.12, 6.18, 7.2 and 7.3."""


def version_of(release: str) -> Version:
    """Major and minor number of a kernel release such as ``6.18.44-generic``; (0, 0) if it isn't one."""
    numbers = release.split("-")[0].split(".")[:2]
    if len(numbers) < 2 or not all(number.isdigit() for number in numbers):
        return 0, 0
    return int(numbers[0]), int(numbers[1])


def known_difference(
    release: str,
    vm: "KvmVm",
    step: Step,
    outcome: str,
    *,
    offer: "VmOffer | None" = None,
    written: str | None = None,
) -> Difference | None:
    """Return the row that excuses this outcome of a step on this kernel, or None.

    Parameters
    ----------
    release : str
        Of the kernel.
    vm : KvmVm
        Where the step was done.
    step : dict
        The step.
    outcome : str
        The kernel's.
    offer : VmOffer or None
        What the VM type offers on this host, where that is known.
    written : str or None
        The outcome that the step should have; None: as it says.
    """
    version, at = version_of(release), Situation(vm, step, offer)
    expected = step.get("expect", "OK") if written is None else written
    for row in DIFFERENCES:
        if (row.op, row.written, row.found) != (step["op"], expected, outcome):
            continue
        if row.since <= version and (row.before is None or version < row.before) and row.when(at):
            return row
    return None
