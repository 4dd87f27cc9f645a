"""KvmMachine: what a case of vectors acts on, when it runs on a kernel.

A kernel can't do every step: `gmemcore.kvm.rules` has those that it isn't asked to do, and
`gmemcore.kvm.missed` those that depend on them.
"""

from typing import Any

from gmemcore.conformance import Answer, Case, perform, signed
from gmemcore.kvm.addresses import fit
from gmemcore.kvm.client import KvmFile, KvmVm, check_extension
from gmemcore.kvm.differences import Difference, Follow, known_difference
from gmemcore.kvm.missed import Missed, Range, Step, is_ordinary, size_of
from gmemcore.kvm.probe import Host, VmOffer
from gmemcore.kvm.rules import GUEST_OPS, RULES, Context
from gmemcore.kvm.transport import Transport
from gmemcore.policy import PLATFORMS, get_abi
from gmemcore.uapi import PAGE_SIZE, Protection, VmType

WHOLE = 1 << 64
GPA_OPS = GUEST_OPS | {"accept", "launch_update"}
READING_OPS = frozenset({"host_read", "guest_read", "check_cap", "mmap", "runs", "counters", "folios"})


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
        self._other_vm: KvmVm | None = None
        self._missed = Missed()
        self._number = -1

    def check_cap(self, name: str) -> int:
        """Answer a capability without a VM."""
        kvm = self.transport.open()
        try:
            return check_extension(self.transport, kvm, name)
        finally:
            self.transport.close(kvm)

    @property
    def other_vm(self) -> KvmVm:
        """See `gmemcore.conformance.Machine`."""
        if self._other_vm is None:
            self._other_vm = KvmVm(self.transport, self.vm_type, two_backings=self.abi.legacy)
        return self._other_vm

    def file_call(self, file: KvmFile, step: Step) -> None:
        """See `gmemcore.conformance.Machine`."""
        file.call(step["call"], signed(step.get("offset", 0)), step.get("size", 1))

    def map_file(self, file: KvmFile, step: Step) -> None:
        """See `gmemcore.conformance.Machine`."""
        protection = Protection(step.get("prot", Protection.READ | Protection.WRITE))
        file.mmap(step.get("offset", 0), step["size"], step.get("shared", True), protection)

    def in_child(self, step: Step) -> Answer:
        """See `gmemcore.conformance.Machine`."""
        plain = {name: value for name, value in step.items() if name != "child"}
        if step.get("other_vm", False):
            _ = self.other_vm  # a VM of the child's own would be another one
        try:
            outcome, seen, data = self.transport.in_child(lambda: _without_bytes(perform(self, plain)))
        except TimeoutError:
            return Answer("TIMEOUT", {})
        except ChildProcessError:
            return Answer("KILLED", {})
        return Answer(outcome, seen if data is None else seen | {"bytes": bytes.fromhex(data)})

    def skips(self, step: Step) -> str | None:
        """Return why a step can't be done here, or None if it can. Asked once about every step, in order."""
        self._number += 1
        why = self._why_not(step)
        if why is not None:
            self._miss(step)
        elif step.get("expect", "OK") == "OK":
            self._missed.settle(step, self.ranges(step))
        return why

    def known_difference(self, step: Step, outcome: str) -> str | None:
        """Return why this kernel answers so, or None if nothing is known.

        A known step counts as not done: a memslot that should have been refused is deleted again.
        """
        row = self.difference(step, outcome)
        if row is None:
            return None
        if row.follow == Follow.KERNEL_DELETES:
            self.vm.delete_memslot(step["slot"])
        else:
            self._miss(step)
        return row.why

    def difference(self, step: Step, outcome: str, written: str | None = None) -> Difference | None:
        """Return the known difference that a step shows; see `known_difference`."""
        return known_difference(
            self.transport.release, self.vm, step, outcome, offer=self.offer, written=written
        )

    def fit(self, case: Case) -> Case:
        """Return a case with its guest addresses moved to where this host has them."""
        return case if self.offer is None else fit(case, self.offer.guest_address_bits)

    def close(self) -> None:
        """Close the VM and its files."""
        for vm in (self.vm, self._other_vm):
            if vm is not None:
                vm.close()

    def ranges(self, step: Step) -> list[Range]:
        """Return what a step is about: byte ranges of files, and of guest physical memory."""
        op = step["op"]
        if op in GPA_OPS:
            return self._guest_ranges(step["gpa"], size_of(step))
        if op == "vm_set":
            return [Range("", step["address"], step["address"] + step["size"])]
        if op == "ioctl":
            return [Range("" if step["fd"] == "vm" else step["fd"], 0, WHOLE)]
        if op == "file_call" or is_ordinary(step):
            return []
        if op in ("create", "slot_add", "runs", "close"):
            return [Range(step.get("as") or step.get("gmem", "g"), 0, WHOLE)]
        if "offset" in step:
            size = PAGE_SIZE if op == "poison" else size_of(step)
            return [Range(step.get("gmem", "g"), step["offset"], step["offset"] + size)]
        return []

    def _guest_ranges(self, gpa: int, size: int) -> list[Range]:
        """Guest memory, and the files behind it, by memslots that are there or should be."""
        names = {id(gmem): name for name, gmem in self.files.items()}
        slots = [
            (slot.gpa, slot.size, names[id(slot.gmem)], slot.gmem_offset)
            for slot in (self.vm.memslots.values() if self.vm is not None else ())
            if id(slot.gmem) in names
        ]
        slots += [
            (slot.gpa, slot.size, slot.name, slot.gmem_offset) for slot in self._missed.slots if slot.name
        ]
        ranges = [Range("", gpa, gpa + size)]
        for start, length, name, offset in slots:
            low, high = max(gpa, start), min(gpa + size, start + length)
            if low < high:
                ranges.append(Range(name, low - start + offset, high - start + offset))
        return ranges

    def _why_not(self, step: Step) -> str | None:
        if self.offer is None:
            return f"VM type {self.vm_type} isn't offered"
        if self.vm is None:
            return f"VM type {self.vm_type} has no guest_memfd"
        context = Context(self, self.offer, step)
        for rule in RULES:
            if step["op"] in rule.ops and rule.applies(context):
                return rule.why(context) if callable(rule.why) else rule.why
        return self._missed.why_depends(step, self.ranges(step))

    def _miss(self, step: Step) -> None:
        """Note what a step that isn't done would have changed."""
        op, coco = step["op"], self.platform.coco
        expected = step.get("expect", "OK") == "OK"
        changes = {
            "accept": coco,
            "launch_update": self.platform.populate is not None,  # even a refused one can have done pages
            "launch_finish": coco and expected,
            "guest_read": coco,  # a refused access assigns its page
            "guest_write": coco or expected,
        }.get(op, expected and op not in READING_OPS)
        if changes:
            everything = coco and op in GUEST_OPS
            self._missed.add(self._number, step, self.ranges(step), everything=everything)


def _without_bytes(answer: Answer) -> tuple[str, dict[str, Any], str | None]:
    """An answer as JSON can have it: outcome, what was seen, and bytes as hex."""
    seen = {name: value for name, value in answer.seen.items() if name != "bytes"}
    data = answer.seen.get("bytes")
    return answer.outcome, seen, None if data is None else data.hex()
