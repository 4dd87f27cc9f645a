"""Which steps of a case a kernel isn't asked to do, and why: the table ``RULES``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gmemcore.conformance import OPERATIONS
from gmemcore.kvm.client import KvmFile
from gmemcore.kvm.missed import Step, size_of
from gmemcore.kvm.probe import VmOffer
from gmemcore.kvm.structs import CAPABILITIES
from gmemcore.policy import get_abi
from gmemcore.uapi import (
    KVM_SET_MEMORY_ATTRIBUTES,
    KVM_SET_MEMORY_ATTRIBUTES2,
    MEMORY_ATTRIBUTES_STRUCT,
    PAGE_SIZE,
    FallocateMode,
    GuestMemfdFlag,
)

if TYPE_CHECKING:
    from gmemcore.kvm.machine import KvmMachine

MOST_PINS = 256
"""Pages of a pin step; each costs a file descriptor."""
MOST_ATTRIBUTE_PAGES = 1 << 18
"""Pages of a vm_set step: 1 GiB. KVM stores these attributes page by page, and can't be stopped meanwhile."""
MOST_CALL_BYTES = 1 << 20
"""Bytes of a read or write of a file."""
LOWEST_MAPPED = 1 << 16
"""Nothing is mapped below this (vm.mmap_min_addr)."""
GUEST_OPS = frozenset({"guest_read", "guest_write"})
_IN_PLACE_FLAGS = GuestMemfdFlag.MMAP | GuestMemfdFlag.INIT_SHARED


@dataclass(frozen=True, slots=True)
class Context:
    """What the rules look at."""

    machine: "KvmMachine"
    offer: VmOffer
    step: Step

    @property
    def same_abi(self) -> bool:
        """Whether the vectors are about the revision that this kernel has, by family for released kernels."""
        kernel = get_abi(self.offer.abi)
        return self.machine.abi.name == kernel.name or (self.machine.abi.legacy and kernel.legacy)

    @property
    def expected(self) -> str:
        """The outcome in the vectors."""
        return str(self.step.get("expect", "OK"))

    @property
    def file(self) -> KvmFile | None:
        """The file that the step names, if it exists."""
        return self.machine.files.get(self.step.get("gmem", "g"))

    @property
    def files_behind(self) -> list[KvmFile]:
        """The files behind the step's guest memory."""
        names = {each.name for each in self.machine.ranges(self.step)}
        return [gmem for name, gmem in self.machine.files.items() if name in names]


@dataclass(frozen=True, slots=True)
class Rule:
    """Steps that aren't done, and why."""

    ops: frozenset[str]
    applies: Callable[[Context], bool]
    why: str | Callable[[Context], str]


def _rule(ops: str, applies: Callable[[Context], bool], why: str | Callable[[Context], str]) -> Rule:
    return Rule(frozenset(ops.split()), applies, why)


def _always(_: Context) -> bool:
    return True


def _private_memory(context: Context) -> bool:
    return context.machine.platform.private_memory


def _asks_of_other_revision(context: Context) -> bool:
    """A conversion, by either form: its answer differs between revisions."""
    step = context.step
    asks = step["op"] == "set" or (step["fd"] != "vm" and step["request"] == KVM_SET_MEMORY_ATTRIBUTES2)
    return asks and not context.same_abi


def _refused(context: Context) -> bool:
    return context.expected != "OK"


def _other_revision(context: Context) -> str:
    if not context.offer.in_place:
        return "this kernel has no KVM_SET_MEMORY_ATTRIBUTES2 (called: ENOTTY)"
    return f"the vectors are about {context.machine.abi.name}, this kernel's interface is {context.offer.abi}"


def attribute_pages(step: Step) -> int:
    """Return how many pages' attributes an accepted vm_set stores; 0 for one that is refused."""
    address, size = step["address"], step["size"]
    refused = step.get("flags", 0) or (address | size) % PAGE_SIZE or address + size > 1 << 64
    return 0 if refused else int(size // PAGE_SIZE)


def _stores_too_many(context: Context) -> bool:
    step = context.step
    if step["op"] == "ioctl":
        argument = bytes.fromhex(step["argument"] or "")
        if step["request"] != KVM_SET_MEMORY_ATTRIBUTES or len(argument) < MEMORY_ATTRIBUTES_STRUCT.size:
            return False
        fields = MEMORY_ATTRIBUTES_STRUCT.unpack_from(argument)
        step = dict(zip(("address", "size", "attributes", "flags"), fields, strict=True))
    return attribute_pages(step) > MOST_ATTRIBUTE_PAGES


def _allocates_too_many(context: Context) -> bool:
    allocates = context.step["mode"] == FallocateMode.KEEP_SIZE and context.expected == "OK"
    return bool(allocates and context.step["size"] > MOST_ATTRIBUTE_PAGES * PAGE_SIZE)


def _needs_vm_attributes(context: Context) -> bool:
    """An attribute request to the VM fd, where it has none."""
    step = context.step
    asks = step["op"] == "vm_set" or (step["fd"] == "vm" and step["request"] == KVM_SET_MEMORY_ATTRIBUTES)
    return bool(asks) and not context.offer.vm_attributes


def _other_vm_request(context: Context) -> bool:
    known = (KVM_SET_MEMORY_ATTRIBUTES, KVM_SET_MEMORY_ATTRIBUTES2)
    return context.step["fd"] == "vm" and context.step["request"] not in known


def _unoffered_flags(context: Context) -> bool:
    flags = context.step["flags"] & ~(context.offer.creation_flags or 0)
    return not context.same_abi and bool(flags & _IN_PLACE_FLAGS)


def _legacy_elsewhere(context: Context) -> bool:
    return context.machine.abi.legacy and context.offer.in_place


def _mapped_files_differ(context: Context) -> bool:
    """Accesses to a file that the host can map, where the vectors have memory beside it and kernels don't."""
    abi = context.machine.abi
    files = context.files_behind if context.step["op"] in GUEST_OPS else [context.file]
    mapped = (gmem for gmem in files if gmem is not None and gmem.flags & GuestMemfdFlag.MMAP)
    return any(abi.shared_beside(gmem.flags) for gmem in mapped)


def _attributes_elsewhere(context: Context) -> bool:
    return not context.machine.abi.legacy and not context.offer.in_place and _private_memory(context)


def _other_memory_behind(context: Context) -> bool:
    in_place = context.machine.abi.legacy or context.offer.in_place
    return not in_place and not all(gmem.mappable for gmem in context.files_behind)


def _unmappable(context: Context) -> bool:
    return context.file is not None and not context.file.mappable


def _deletes(context: Context) -> bool:
    return context.step["size"] == 0 and context.step["slot"] in context.machine.vm.memslots


def _beyond_guest(context: Context) -> bool:
    return bool(context.step["gpa"] + size_of(context.step) > 1 << context.offer.guest_address_bits)


def _at_unknown_memory(context: Context) -> bool:
    """A guest access through an address that the vectors chose, where the memory isn't known."""
    start = context.step["gpa"]
    end = start + size_of(context.step)
    slots = context.machine.vm.memslots.values()
    reached = (slot for slot in slots if slot.chosen and slot.gpa < end and start < slot.gpa + slot.size)
    return any(
        (slot.gmem is not None and slot.gmem.two_backings)
        or slot.userspace_address + slot.size > LOWEST_MAPPED
        for slot in reached
    )


def _without_memory(context: Context) -> bool:
    """A guest access to an ordinary memslot for which the client maps no memory."""
    start = context.step["gpa"]
    end = start + size_of(context.step)
    return any(
        slot.gmem is None and slot.memory is None and not slot.chosen
        for slot in context.machine.vm.memslots.values()
        if slot.gpa < end and start < slot.gpa + slot.size
    )


def _unsent(context: Context) -> str | None:
    """The field of a step that the system call has no room for."""
    op = context.step["op"]
    for field, (low, high) in (FIELDS | NARROW.get(op, {})).items():
        value, signed = context.step.get(field), SIGNED.get(op, ())
        if isinstance(value, int) and field not in signed and not low <= value < high:
            return f"{field} {value:#x} doesn't fit into the field of the system call"
    return None


def _pin_refused_by_us(context: Context) -> bool:
    refusals = ("OK", "EFAULT") if context.step["op"] == "pin" else ("OK",)
    return context.expected not in refusals


_U64 = (0, 1 << 64)
FIELDS = {
    **dict.fromkeys(("offset", "size", "attributes", "flags", "address", "gpa", "gmem_offset"), _U64),
    "error_offset_in": _U64,
    "slot": (0, 1 << 32),
    "request": (0, 1 << 32),
    "mode": (-(1 << 31), 1 << 31),
    "prot": (0, 1 << 31),
    "userspace_addr": _U64,
}
"""Bounds of the numbers that a system call takes."""
NARROW = {"slot_add": {"flags": (0, 1 << 32)}}
"""The same, where an operation has less room."""
SIGNED = {"create": ("size",), "fallocate": ("offset", "size"), "file_call": ("offset",)}
"""Fields that are signed 64-bit numbers, which the vectors may write either way."""

_TOUCHES = "host_read host_write guest_read guest_write"
_GUEST = "guest_read guest_write"
_ONE_BACKING = "this kernel has one backing where the vectors are about two"

RULES = (
    Rule(frozenset(OPERATIONS), lambda c: _unsent(c) is not None, lambda c: str(_unsent(c))),
    _rule("runs", _always, "no ioctl reads attributes back"),
    _rule("folios", _always, "no call shows the state of huge pages"),
    _rule("fail_allocations", _always, "a kernel's allocations can't be made to fail here"),
    _rule("create", lambda c: "page_order" in c.step, "no release has guest_memfd in huge pages"),
    _rule("counters", _always, "a kernel doesn't count these events"),
    _rule("poison", _always, "it would take memory of this host out of use"),
    _rule("accept launch_update launch_finish", _always, "a launch step: it needs the platform's firmware"),
    _rule("set ioctl", _asks_of_other_revision, _other_revision),
    _rule(
        "vm_set ioctl", _needs_vm_attributes, "this kernel has no KVM_SET_MEMORY_ATTRIBUTES (called: ENOTTY)"
    ),
    _rule("vm_set ioctl", _stores_too_many, "it would keep the kernel busy for minutes, page by page"),
    _rule("fallocate", _allocates_too_many, "it would take more than 1 GiB of this host's memory"),
    _rule("ioctl", _other_vm_request, "only the format's own requests are sent to a VM fd"),
    _rule("check_cap", lambda c: c.step["cap"] not in CAPABILITIES, "the capability's number isn't settled"),
    _rule("check_cap", lambda c: not c.same_abi, _other_revision),
    _rule("create", lambda c: c.expected == "ENOMEM", "the limit on memory is the model's own"),
    _rule("create", _unoffered_flags, "a creation flag isn't offered for this VM type"),
    _rule(
        "fallocate",
        lambda c: c.step.get("interrupted", False),
        "no signal can be timed to interrupt a system call",
    ),
    _rule("file_call", lambda c: c.step.get("size", 1) > MOST_CALL_BYTES, "it would take that much memory"),
    _rule("discard_shared", _refused, "it is no system call, and its refusals are the model's"),
    _rule(f"discard_shared slot_add {_TOUCHES}", _legacy_elsewhere, _ONE_BACKING),
    _rule(f"discard_shared {_TOUCHES}", _mapped_files_differ, _ONE_BACKING),
    _rule(_TOUCHES, lambda c: size_of(c.step) == 0, "it touches nothing"),
    _rule("host_read host_write pin", _unmappable, "the file was created without MMAP"),
    _rule("slot_add", _deletes, "size 0 deletes the memslot"),
    _rule(_GUEST, lambda c: c.offer.guest is not None, lambda c: f"no guest: {c.offer.guest}"),
    _rule(_GUEST, _attributes_elsewhere, "this kernel keeps attributes in the VM, not in the file"),
    _rule(_GUEST, _other_memory_behind, "without MMAP this kernel's guest sees other memory than the file"),
    _rule(_GUEST, _beyond_guest, "it is beyond the physical addresses of a guest here"),
    _rule(_GUEST, _at_unknown_memory, "userspace_addr may be other memory of this process"),
    _rule(_GUEST, _without_memory, "no more than 1 GiB is mapped for an ordinary memslot"),
    _rule("pin unpin", lambda c: c.offer.pins is not None, lambda c: f"no pins: {c.offer.pins}"),
    _rule("pin unpin", _pin_refused_by_us, "it is no system call, and its argument checks are the model's"),
    _rule("pin", lambda c: c.step["size"] > MOST_PINS * PAGE_SIZE, f"it pins more than {MOST_PINS} pages"),
)
"""Steps that a kernel isn't asked to do. The first match counts."""
