"""What the steps of a case that weren't done leave unknown.

A step that a kernel isn't asked to do would have changed files, memslots, attributes, bytes or pins. A later
step that depends on one of these isn't done either, since nobody knows what should come of it. A step that
is done can make the same thing known again.
"""

from dataclasses import dataclass, replace
from enum import Flag, auto
from typing import Any, NamedTuple

from gmemcore.conformance import OPERATIONS
from gmemcore.uapi import PAGE_SIZE, FallocateMode, MemslotFlag

Step = dict[str, Any]


class Aspect(Flag):
    """What can be unknown about a range of memory."""

    NONE = 0
    BYTES = auto()
    ATTRIBUTES = auto()
    PINS = auto()
    ALL = BYTES | ATTRIBUTES | PINS


class Uses(NamedTuple):
    """What the outcome of an operation depends on, what it changes, and what is known once it succeeded."""

    needs: Aspect = Aspect.NONE
    changes: Aspect = Aspect.NONE
    settles: Aspect = Aspect.NONE


_SEEN = Aspect.BYTES | Aspect.ATTRIBUTES
_GONE = Aspect.BYTES | Aspect.PINS
_PUNCH = FallocateMode.KEEP_SIZE | FallocateMode.PUNCH_HOLE

USES = {
    "set": Uses(Aspect.ATTRIBUTES | Aspect.PINS, Aspect.ATTRIBUTES | Aspect.BYTES, Aspect.ATTRIBUTES),
    "vm_set": Uses(Aspect.NONE, Aspect.ATTRIBUTES, Aspect.ATTRIBUTES),
    "host_read": Uses(_SEEN),
    "host_write": Uses(Aspect.ATTRIBUTES, Aspect.BYTES, Aspect.BYTES),
    "guest_read": Uses(_SEEN),
    "guest_write": Uses(Aspect.ATTRIBUTES, Aspect.BYTES, Aspect.BYTES),
    "discard_shared": Uses(Aspect.NONE, _GONE, _GONE),
    "pin": Uses(Aspect.ATTRIBUTES, Aspect.PINS, Aspect.PINS),
    "unpin": Uses(Aspect.NONE, Aspect.PINS, Aspect.PINS),
    "create": Uses(),
    "close": Uses(),
    "mmap": Uses(),
    "file_call": Uses(),
    "slot_add": Uses(),
    "runs": Uses(Aspect.ATTRIBUTES),
}
"""Operations that are about memory, by name. Those that aren't here need and change everything."""
PUNCHED = Uses(Aspect.NONE, _GONE, _GONE)
UNCERTAIN = Uses(Aspect.ALL, Aspect.ALL)
PHASED = frozenset({"guest_read", "guest_write", "set", "accept", "launch_update", "launch_finish"})
"""Operations whose outcome can depend on the launch phase."""


def uses_of(step: Step) -> Uses:
    """Return what a step needs, changes and settles."""
    if step["op"] == "fallocate":
        return PUNCHED if step["mode"] == _PUNCH else Uses()
    return USES.get(step["op"], UNCERTAIN)


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes of a file, by its name; of guest physical memory if the name is empty.

    Guest physical memory has attributes alone; bytes and pins are those of the files behind it.
    """

    name: str
    start: int
    end: int

    def meets(self, other: "Range", unit: int = PAGE_SIZE) -> bool:
        """Whether both touch a page (or another unit) in common."""
        if self.name != other.name:
            return False
        return (self.start & -unit) < other.end and (other.start & -unit) < self.end

    def without(self, other: "Range") -> "list[Range]":
        """Return what is left of this range outside the other."""
        if self.name != other.name:
            return [self]
        parts = (self.start, min(self.end, other.start)), (max(self.start, other.end), self.end)
        return [Range(self.name, low, high) for low, high in parts if low < high]


@dataclass(frozen=True, slots=True)
class _Unknown:
    range: Range
    aspect: Aspect
    why: str

    def blocks(self, needs: Aspect, ranges: list[Range]) -> bool:
        """Whether a step that needs to know something about these ranges doesn't know it."""
        lacks = needs & self.aspect
        unit = 1 if lacks == Aspect.BYTES else PAGE_SIZE
        return bool(lacks) and any(self.range.meets(each, unit) for each in ranges)


@dataclass(frozen=True, slots=True)
class MissedSlot:
    """A memslot that wasn't added; the file by its name, which is empty for ordinary memory."""

    slot: int
    gpa: int
    size: int
    name: str
    gmem_offset: int
    why: str

    def clashes(self, other: "MissedSlot") -> bool:
        """Whether this one, had it been added, decides what comes of adding the other."""
        here, there = (Range("", each.gpa, each.gpa + each.size) for each in (self, other))
        bound, wanted = (
            Range(each.name, each.gmem_offset, each.gmem_offset + each.size) for each in (self, other)
        )
        same_file = bool(self.name) and bound.meets(wanted)
        return self.slot == other.slot or here.meets(there) or same_file


class Missed:
    """What is unknown, because of the steps that weren't done."""

    def __init__(self) -> None:
        self.slots: list[MissedSlot] = []
        self._memory: list[_Unknown] = []
        self._files: dict[str, str] = {}
        self._phase: str | None = None

    def why_depends(self, step: Step, ranges: list[Range]) -> str | None:
        """Return which missed step this one depends on, or None.

        Parameters
        ----------
        step : dict
            The step.
        ranges : list of Range
            What it is about, in every file and in guest memory.
        """
        what = next((self._files[name] for name in _files_named(step) if name in self._files), None)
        if what is None:
            what = self._slot_needed(step)
        if what is None and step["op"] in PHASED:
            what = self._phase
        if what is None and (needs := uses_of(step).needs):
            what = next((each.why for each in self._memory if each.blocks(needs, ranges)), None)
        return None if what is None else f"it depends on {what}"

    def _slot_needed(self, step: Step) -> str | None:
        if step["op"] == "slot_add":
            new = _slot_of(step, "")
            return next((slot.why for slot in self.slots if slot.clashes(new)), None)
        if step["op"] == "slot_delete":
            return next((slot.why for slot in self.slots if slot.slot == step["slot"]), None)
        if "gpa" in step:
            reached = Range("", step["gpa"], step["gpa"] + size_of(step))
            placed = ((Range("", slot.gpa, slot.gpa + slot.size), slot.why) for slot in self.slots)
            return next((why for place, why in placed if reached.meets(place)), None)
        return None

    def add(self, number: int, step: Step, ranges: list[Range], *, everything: bool) -> None:
        """Note a step that isn't done and would have changed something.

        Parameters
        ----------
        number : int
            Of the step in its case.
        step, ranges
            As for `why_depends`.
        everything : bool
            Whether it would have changed more than its kind of step does elsewhere.
        """
        op = step["op"]
        why = f"step {number} ({op}), which wasn't done"
        if op == "create":
            self._files[step.get("as", "g")] = why
        elif op == "slot_add":
            self.slots.append(_slot_of(step, why))
        elif op == "slot_delete":  # it was never added
            self.slots = [slot for slot in self.slots if slot.slot != step["slot"]]
        elif op == "launch_finish":
            self._phase = why
        else:
            aspect = Aspect.ALL if everything else uses_of(step).changes
            for each in ranges:
                if here := aspect if each.name else aspect & Aspect.ATTRIBUTES:
                    self._memory.append(_Unknown(each, here, why))

    def settle(self, step: Step, ranges: list[Range]) -> None:
        """Note a step that is done, and succeeds: what it sets is known again."""
        if step["op"] == "create":
            name = step.get("as", "g")
            self._files.pop(name, None)
            self._memory = [unknown for unknown in self._memory if unknown.range.name != name]
        elif settles := uses_of(step).settles:
            for each in ranges:
                self._memory = [part for unknown in self._memory for part in _without(unknown, each, settles)]


def _without(unknown: _Unknown, settled: Range, aspect: Aspect) -> list[_Unknown]:
    if not unknown.aspect & aspect:
        return [unknown]
    rest = [replace(unknown, range=part) for part in unknown.range.without(settled)]
    if other := unknown.aspect & ~aspect:
        rest.append(replace(unknown, aspect=other))
    return rest


def _files_named(step: Step) -> list[str]:
    """Names of the files that a step uses."""
    if step["op"] == "ioctl":
        return [] if step["fd"] == "vm" else [step["fd"]]
    if "gmem" not in OPERATIONS[step["op"]].may or is_ordinary(step):
        return []
    return [step.get("gmem", "g")]


def is_ordinary(step: Step) -> bool:
    """Return whether a step adds a memslot of ordinary memory."""
    return (
        step["op"] == "slot_add" and not step.get("flags", MemslotFlag.GUEST_MEMFD) & MemslotFlag.GUEST_MEMFD
    )


def _slot_of(step: Step, why: str) -> MissedSlot:
    name = "" if is_ordinary(step) else step.get("gmem", "g")
    offset = step.get("gmem_offset", 0)
    return MissedSlot(step["slot"], step["gpa"], step["size"], name, offset, why)


def size_of(step: Step) -> int:
    """Return the bytes that a step is about: its size, or that of its data."""
    if "size" in step:
        return int(step["size"])
    digits = next((step[field] for field in ("data", "not_data") if field in step), "00")
    return len(digits) // 2
