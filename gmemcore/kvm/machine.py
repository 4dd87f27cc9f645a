"""KvmMachine: what a case of vectors acts on, when it runs on a kernel.

A kernel can't do every step. Which ones, and why, is the table ``RULES``. A step that wasn't done leaves
behind what it would have changed: pages, memslots, the launch phase. Later steps that meet one of these are
not done either, since nobody knows what should come of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gmemcore.kvm.client import KvmFile, KvmVm, check_extension
from gmemcore.kvm.differences import known_difference, size_of
from gmemcore.kvm.probe import Host, VmOffer
from gmemcore.kvm.structs import CAPABILITIES
from gmemcore.kvm.transport import Transport
from gmemcore.policy import PLATFORMS, get_abi
from gmemcore.uapi import (
    KVM_SET_MEMORY_ATTRIBUTES,
    KVM_SET_MEMORY_ATTRIBUTES2,
    PAGE_SIZE,
    GuestMemfdFlag,
    VmType,
)

Step = dict[str, Any]

MOST_PINS = 256
"""Pages of a pin step; each costs a file descriptor."""
_INT_BITS = 32
_IN_PLACE_FLAGS = GuestMemfdFlag.MMAP | GuestMemfdFlag.INIT_SHARED

GUEST_OPS = frozenset({"guest_read", "guest_write"})
HOST_OPS = frozenset({"host_read", "host_write"})
PIN_OPS = frozenset({"pin", "unpin"})
SLOT_OPS = frozenset({"slot_add", "slot_delete"})
GPA_OPS = GUEST_OPS | {"accept", "launch_update"}
READING_OPS = frozenset({"host_read", "guest_read", "check_cap", "mmap", "runs", "counters"})


class KvmMachine:
    """A VM of a kernel, for one case; see `gmemcore.conformance.Machine`.

    Parameters
    ----------
    transport : Transport
        The kernel.
    host : Host
        What it offers, by `probe`.
    vm_type : VmType
        Of the vectors.
    abi : str
        Of the vectors.
    """

    def __init__(self, transport: Transport, host: Host, vm_type: VmType, abi: str) -> None:
        self.transport = transport
        self.host = host
        self.vm_type = vm_type
        self.platform = PLATFORMS[vm_type]
        self.abi = get_abi(abi)
        self.offer: VmOffer | None = host.offers.get(vm_type)
        self.files: dict[str, KvmFile] = {}
        self.vm: Any = None
        if self.offer is not None and self.offer.creation_flags is not None:
            self.vm = KvmVm(transport, vm_type, two_backings=self.abi.legacy)
        self._missed = _Missed()
        self._number = -1

    def check_cap(self, name: str) -> int:
        """Answer a capability without a VM."""
        kvm = self.transport.open()
        try:
            return check_extension(self.transport, kvm, name)
        finally:
            self.transport.close(kvm)

    def skips(self, step: Step) -> str | None:
        """Say why a step can't be done here; None if it can. Asked once of every step, in order."""
        self._number += 1
        why = self._why_not(step)
        if why is not None:
            self._miss(step)
        return why

    def known_difference(self, step: Step, outcome: str) -> str | None:
        """Say why this kernel answers so; None if nothing is known. Then the step counts as not done."""
        row = known_difference(self.transport.release, self.vm, step, outcome)
        if row is None:
            return None
        self._miss(step)
        return row.why

    def close(self) -> None:
        """Close the VM and its files."""
        if self.vm is not None:
            self.vm.close()

    # ---- what can't be done --------------------------------------------------------------------------------

    def _why_not(self, step: Step) -> str | None:
        if self.offer is None:
            return f"VM type {self.vm_type} isn't offered"
        if self.vm is None:
            return f"VM type {self.vm_type} has no guest_memfd"
        context = Context(self, self.offer, step)
        for rule in RULES:
            if step["op"] in rule.ops and rule.applies(context):
                return rule.why(context) if callable(rule.why) else rule.why
        return self._missed.why_depends(step, self._ranges(step))

    # ---- what wasn't done ----------------------------------------------------------------------------------

    def _miss(self, step: Step) -> None:
        """Note what a step that isn't done would have changed."""
        op, coco = step["op"], self.platform.coco
        expected = step.get("expect", "OK") == "OK"
        changes = {
            "accept": coco,
            "launch_update": self.platform.populate is not None,  # even a refused one may have done pages
            "launch_finish": coco and expected,
            "guest_read": coco,  # a refused access assigns its page
            "guest_write": coco or expected,
        }.get(op, expected and op not in READING_OPS)
        if changes:
            self._missed.add(self._number, step, self._ranges(step))

    def _ranges(self, step: Step) -> "list[Range]":
        """What a step is about: byte ranges of files, and of guest physical memory."""
        op = step["op"]
        if op in GPA_OPS:
            return self._guest_ranges(step["gpa"], size_of(step))
        if op == "vm_set":
            return self._guest_ranges(step["address"], step["size"])
        if op == "ioctl":
            return [Range("" if step["fd"] == "vm" else step["fd"], 0, 1 << 64)]
        if op == "create":
            return [Range(step.get("as", "g"), 0, 1 << 64)]
        if op == "slot_add":
            return [Range(step.get("gmem", "g"), 0, 0)]
        if "offset" in step:
            size = PAGE_SIZE if op == "poison" else size_of(step)
            return [Range(step.get("gmem", "g"), step["offset"], step["offset"] + size)]
        return []

    def _guest_ranges(self, gpa: int, size: int) -> "list[Range]":
        ranges = [Range("", gpa, gpa + size)]
        names = {id(gmem): name for name, gmem in self.files.items()}
        for slot in self.vm.memslots.values() if self.vm is not None else ():
            start, end = max(gpa, slot.gpa), min(gpa + size, slot.gpa + slot.size)
            if start < end and id(slot.gmem) in names:
                shift = slot.gmem_offset - slot.gpa
                ranges.append(Range(names[id(slot.gmem)], start + shift, end + shift))
        return ranges


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes of a file, by its name; of guest physical memory, if the name is empty."""

    name: str
    start: int
    end: int

    def meets(self, other: "Range") -> bool:
        """Whether both touch a page in common."""
        if self.name != other.name:
            return False
        return (self.start & -PAGE_SIZE) < other.end and (other.start & -PAGE_SIZE) < self.end


class _Missed:
    """What the steps that weren't done would have changed."""

    def __init__(self) -> None:
        self._ranges: list[tuple[Range, str]] = []
        self._files: dict[str, str] = {}
        self._slots: str | None = None
        self._phase: str | None = None

    def add(self, number: int, step: Step, ranges: list[Range]) -> None:
        """Note a step."""
        op = step["op"]
        what = f"step {number} ({op}), which wasn't done"
        if op == "create":
            self._files[step.get("as", "g")] = what
        elif op in SLOT_OPS:
            self._slots = what
        elif op == "launch_finish":
            self._phase = what
        else:
            self._ranges += [(each, what) for each in ranges]

    def why_depends(self, step: Step, ranges: list[Range]) -> str | None:
        """Say which missed step this one depends on; None if none."""
        op = step["op"]
        if op == "create":
            return None
        what = next((self._files[each.name] for each in ranges if each.name in self._files), None)
        if what is None and op in GPA_OPS | SLOT_OPS:
            what = self._slots
        if what is None and op in GPA_OPS | {"set", "launch_finish"}:
            what = self._phase
        if what is None:
            what = next((why for missed, why in self._ranges for each in ranges if missed.meets(each)), None)
        return None if what is None else f"it depends on {what}"


# ---- the rules ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Context:
    """What the rules look at."""

    machine: KvmMachine
    offer: VmOffer
    step: Step

    @property
    def same_abi(self) -> bool:
        """Whether the vectors are about the revision that this kernel has."""
        return self.machine.abi.name == self.offer.abi

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
        names = {each.name for each in self.machine._ranges(self.step)}
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


def _legacy_with_mmap(context: Context) -> bool:
    files = context.files_behind if context.step["op"] in GUEST_OPS else [context.file]
    mapped = any(gmem is not None and gmem.flags & GuestMemfdFlag.MMAP for gmem in files)
    return context.machine.abi.legacy and mapped


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


def _pin_refused_by_us(context: Context) -> bool:
    refusals = ("OK", "EFAULT") if context.step["op"] == "pin" else ("OK",)
    return context.expected not in refusals


_TOUCHES = "host_read host_write guest_read guest_write"
_GUEST = "guest_read guest_write"
_ONE_BACKING = "this kernel has one backing where the vectors are about two"

RULES = (
    _rule("runs", _always, "no ioctl reads attributes back"),
    _rule("counters", _always, "a kernel doesn't count these events"),
    _rule("poison", _always, "it would take memory of this host out of use"),
    _rule("accept launch_update launch_finish", _always, "it is the platform's, and no call of guest_memfd"),
    _rule("set ioctl", _asks_of_other_revision, _other_revision),
    _rule(
        "vm_set ioctl", _needs_vm_attributes, "this kernel has no KVM_SET_MEMORY_ATTRIBUTES (called: ENOTTY)"
    ),
    _rule("ioctl", _other_vm_request, "a VM fd is sent none but the requests of the format"),
    _rule("check_cap", lambda c: c.step["cap"] not in CAPABILITIES, "the capability's number isn't settled"),
    _rule("check_cap", lambda c: not c.same_abi, _other_revision),
    _rule("create", lambda c: c.expected == "ENOMEM", "how much is too much is the model's own limit"),
    _rule("create", _unoffered_flags, "a creation flag isn't offered for this VM type"),
    _rule("discard_shared", _refused, "it is no system call, and its refusals are the model's"),
    _rule(f"discard_shared slot_add {_TOUCHES}", _legacy_elsewhere, _ONE_BACKING),
    _rule(f"discard_shared {_TOUCHES}", _legacy_with_mmap, _ONE_BACKING),
    _rule(_TOUCHES, lambda c: size_of(c.step) == 0, "it touches nothing"),
    _rule("host_read host_write pin", _unmappable, "the file was created without MMAP"),
    _rule("slot_add", _deletes, "size 0 deletes the memslot"),
    _rule(_GUEST, lambda c: c.offer.guest is not None, lambda c: f"no guest: {c.offer.guest}"),
    _rule(_GUEST, _attributes_elsewhere, "this kernel keeps attributes in the VM, not in the file"),
    _rule(_GUEST, _other_memory_behind, "without MMAP this kernel's guest sees other memory than the file"),
    _rule(_GUEST, _beyond_guest, "it is beyond the physical addresses of a guest here"),
    _rule("pin unpin", lambda c: c.offer.pins is not None, lambda c: f"no pins: {c.offer.pins}"),
    _rule("pin unpin", _pin_refused_by_us, "it is no system call, and its argument checks are the model's"),
    _rule("pin", lambda c: c.step["size"] > MOST_PINS * PAGE_SIZE, f"it pins more than {MOST_PINS} pages"),
    _rule("fallocate", lambda c: c.step["mode"] >> _INT_BITS not in (0, -1), "the mode isn't an int"),
)
"""Steps that a kernel isn't asked to do, first match first."""
