"""Which outcomes of which operations were seen, on which VM types, and how often."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final

from gmemcore.fuzz.terrain import Terrain
from gmemcore.uapi import VmType

OUTCOMES: Final = {
    "create": "OK EINVAL",
    "close": "OK",
    "set": "OK EINVAL EOPNOTSUPP EAGAIN",
    "vm_set": "OK EINVAL",
    "ioctl": "OK EINVAL EFAULT ENOTTY",
    "check_cap": "OK",
    "host_read": "OK SIGBUS",
    "host_write": "OK SIGBUS",
    "guest_read": "OK MEMORY_FAULT MMIO",
    "guest_write": "OK MEMORY_FAULT MMIO",
    "fallocate": "OK EINVAL EOPNOTSUPP EFBIG EBADF",
    "discard_shared": "OK",
    "mmap": "OK EINVAL ENODEV EPERM EBADF",
    "file_call": "EINVAL ESPIPE EBADF",
    "pin": "OK EFAULT",
    "unpin": "OK",
    "slot_add": "OK EINVAL EEXIST EBADF",
    "slot_delete": "OK EINVAL",
}
"""Outcomes that walks can meet, by operation. Others are counted, too."""


def possible(terrain: Terrain, op: str) -> list[str]:
    """Return the outcomes of an operation that walks on a terrain can meet."""
    if (op == "set" and terrain.legacy) or (op == "vm_set" and not terrain.vm_attributes):
        return ["ENOTTY"]
    impossible = set()
    if not terrain.private_memory:
        impossible |= {("set", "OK"), ("set", "EAGAIN"), ("set", "EOPNOTSUPP")}
    if not (terrain.legacy and terrain.private_memory):
        impossible |= {("guest_read", "MEMORY_FAULT"), ("guest_write", "MEMORY_FAULT")}
    if not terrain.abi.flags:
        impossible.add(("set", "EOPNOTSUPP"))
    if not terrain.abi.shared_files:  # nor does such a kernel keep files from being executable
        impossible |= {("mmap", "OK"), ("mmap", "EPERM")}
    if not (terrain.in_place or terrain.vm_attributes):
        impossible |= {("ioctl", outcome) for outcome in ("OK", "EINVAL", "EFAULT")}
    if not (terrain.abi.shared_files or terrain.private_memory):  # no memslot can have a file
        impossible.add(("slot_add", "EBADF"))
    if not terrain.pins:
        impossible.add(("set", "EAGAIN"))
    return [outcome for outcome in OUTCOMES[op].split() if (op, outcome) not in impossible]


class Coverage:
    """Counts of outcomes by VM type and operation."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[VmType, str, str]] = Counter()
        self._terrains: dict[VmType, Terrain] = {}

    def add(self, terrain: Terrain, outcomes: Iterable[tuple[str, str]]) -> None:
        """Count the steps of a walk: operation and outcome of each."""
        self._terrains[terrain.vm_type] = terrain
        self.counts.update((terrain.vm_type, *each) for each in outcomes)

    def rows(self) -> Iterator[tuple[VmType, str, str, int]]:
        """Yield VM type, operation, outcome and count: what was seen, then what could be and wasn't (0)."""
        found: dict[tuple[VmType, str], dict[str, int]] = {}
        for (vm_type, op, outcome), count in self.counts.items():
            found.setdefault((vm_type, op), {})[outcome] = count
        order = list(OUTCOMES)
        for vm_type, op in sorted(found, key=lambda key: (key[0], order.index(key[1]))):
            here = found[vm_type, op]
            for outcome in dict.fromkeys([*possible(self._terrains[vm_type], op), *sorted(here)]):
                yield vm_type, op, outcome, here.get(outcome, 0)
