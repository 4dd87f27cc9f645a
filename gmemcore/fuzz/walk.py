"""Random walks: mostly valid steps, some of them wrong in one or more ways.

A walk knows what the model answered so far, so its steps use files and memslots that exist. It never
asks for what `gmemcore.kvm.rules` spares a kernel.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final, NamedTuple, TypeVar

from gmemcore.conformance import CHILD_OPERATIONS
from gmemcore.fuzz.terrain import Terrain
from gmemcore.kvm.client import MOST_ORDINARY
from gmemcore.kvm.missed import is_ordinary
from gmemcore.kvm.rules import MOST_ATTRIBUTE_PAGES, attribute_pages
from gmemcore.ordinary import FILE_CALLS
from gmemcore.uapi import (
    KVM_SET_MEMORY_ATTRIBUTES,
    KVM_SET_MEMORY_ATTRIBUTES2,
    MEMORY_ATTRIBUTES2_RESERVED_WORDS,
    MEMORY_ATTRIBUTES2_STRUCT,
    MEMORY_ATTRIBUTES_STRUCT,
    PAGE_SIZE,
    GuestMemfdFlag,
    MemoryAttribute,
    MemslotFlag,
)

Step = dict[str, Any]
_Choice = TypeVar("_Choice")
P = PAGE_SIZE
U64 = (1 << 64) - 1
PRIVATE: Final = int(MemoryAttribute.PRIVATE)
BOTH: Final = int(GuestMemfdFlag.MMAP | GuestMemfdFlag.INIT_SHARED)

FILE_PAGES: Final = (1, 2, 3, 4, 4, 7, 8, 8, 16, 33, 64, 130, 520)
MOST_FILES: Final = 4
NAMES: Final = ("g", "h", "i", "j", "k", "l")
SLOT_FLAGS: Final = (0, 0, 0, 0, 1, 1, 2, 2, 3, 5, 6, 7, 8, 1 << 31)
SMALL: Final = (1, 2, 4, 8, 16, 64)
ACCESS_SIZES: Final = (1, 1, 1, 2, 8, 8, 64, 64, P, 9000)
ODD: Final = (1, 8, P // 2, P - 1, P + 1)
HUGE: Final = (1 << 31, 1 << 43, 1 << 52, 1 << 62, (1 << 63) - P, 1 << 63, U64 + 1 - P, U64)
FALLOCATE_MODES: Final = (
    1,
    1,
    1,
    1,
    1,
    3,
    3,
    3,
    3,
    3,
    3,
    0,
    2,
    4,
    5,
    7,
    8,
    0x10,
    0x11,
    0x20,
    0x40,
    0x80,
    1 << 20,
)
CHILD_CHANCE: Final = 0.001
"""Of a step to be done by a forked child, which costs as much as forty others."""
CHOSEN: Final = (0, P, 2 * P)
"""Userspace addresses where nothing is mapped, whatever the process: below vm.mmap_min_addr."""
REFUSED: Final = (1, P // 2, (1 << 47) - P, 1 << 63, U64 + 1 - P)
"""Userspace addresses that are unaligned, or beyond every process's (with four levels of page tables)."""
MOST_SLOT: Final = 1 << 43
"""Bytes that are too many for a memslot: 2^31 pages."""
LENGTH: Final = 240
"""Steps of a walk: long enough to pay for the VM, short enough to be shrunk quickly."""


class FileNote(NamedTuple):
    """A file that exists: its size in pages, and what the host can map."""

    pages: int
    beside: bool
    mappable: bool
    closed: bool = False


class SlotNote(NamedTuple):
    """A memslot that exists."""

    gpa: int
    size: int
    ordinary: bool


@dataclass(slots=True)
class Scene:
    """What exists, by the answers so far."""

    terrain: Terrain
    files: dict[str, FileNote] = field(default_factory=dict)
    slots: dict[int, SlotNote] = field(default_factory=dict)

    def note(self, step: Step, outcome: str) -> None:
        """Take in what came of a step."""
        if outcome != "OK":
            return
        op = step["op"]
        if op == "create":
            beside = self.terrain.abi.shared_beside(step["flags"])
            mappable = beside or bool(step["flags"] & GuestMemfdFlag.MMAP)
            self.files[step["as"]] = FileNote(step["size"] // P, beside, mappable)
        elif op == "slot_add":
            self.slots[step["slot"]] = SlotNote(step["gpa"], step["size"], is_ordinary(step))
        elif op == "slot_delete":
            self.slots.pop(step["slot"], None)
        elif op == "close":
            self.files[step["gmem"]] = self.files[step["gmem"]]._replace(closed=True)


class Walk:
    """The steps of one walk.

    Parameters
    ----------
    terrain : Terrain
        What it can contain.
    random : Random
        Where its steps are drawn from.
    """

    def __init__(self, terrain: Terrain, random: Random) -> None:
        self.terrain = terrain
        self.scene = Scene(terrain)
        self._random = random
        self._modes, self._anchors = terrain.modes, terrain.anchors
        self._end = (1 << terrain.address_bits) - 16 * P
        self._chance = random.random
        names, weights = zip(*_weights(terrain), strict=True)
        makers: dict[str, Callable[[], Step | None]] = {name: getattr(self, f"_{name}") for name in names}
        self._draws: Iterator[Callable[[], Step | None]] = iter(
            [makers[name] for name in random.choices(names, weights, k=2 * LENGTH)]
        )

    def steps(self) -> Iterator[Step]:
        """Yield the steps. Pass each to `Scene.note` before asking for the next."""
        yield self._create_good()
        yield self._create_good()
        yield self._slot_add()
        made = 3
        for maker in self._draws:
            step = maker()
            if step is not None:
                if self._chance() < CHILD_CHANCE and step["op"] in CHILD_OPERATIONS:
                    step["child"] = True
                yield step
                made += 1
            if made == LENGTH:
                return

    # ---- numbers -------------------------------------------------------------------------------------------

    def _pick(self, choices: Sequence[_Choice]) -> _Choice:
        return choices[int(self._chance() * len(choices))]

    def _below(self, n: int) -> int:
        return int(self._chance() * n)

    def _bent(self, value: int, chance: float = 0.06) -> int:
        """A number, mostly as it is, else slightly off or invalid."""
        if self._chance() > chance:
            return value
        kind = self._below(3)
        if kind == 0:
            return min(value + self._pick(ODD), U64)
        return 0 if kind == 1 else self._pick(HUGE)

    def _data(self, size: int) -> str:
        return self._random.randbytes(size).hex()

    # ---- files ---------------------------------------------------------------------------------------------

    def _name(self) -> str:
        """A file, mostly one that is open."""
        files = self.scene.files
        name = self._pick(list(files))
        return self._pick(list(files)) if files[name].closed and self._chance() < 0.8 else name

    def _place(self, name: str) -> tuple[int, int]:
        """Offset and size in pages, mostly within a file."""
        pages = self.scene.files[name].pages
        start = self._below(pages + 2) if self._chance() < 0.1 else self._below(pages)
        most = pages - start if self._chance() < 0.9 else pages + 3
        return start, 1 + self._below(max(most, 1))

    def _create_good(self) -> Step:
        files = self.scene.files
        closed = (name for name, note in files.items() if note.closed)
        name = next((name for name in (*closed, *NAMES) if name not in files or files[name].closed), NAMES[0])
        flags = self._pick(self.terrain.creation_flags)
        if BOTH in self.terrain.creation_flags and self._chance() < 0.5:
            flags = BOTH
        return {"op": "create", "as": name, "size": self._pick(FILE_PAGES) * P, "flags": flags}

    def _create(self) -> Step | None:
        step = self._create_good()
        if self._chance() < 0.05:
            step["other_vm"] = True
        if (
            sum(not note.closed for note in self.scene.files.values()) >= MOST_FILES or self._chance() < 0.5
        ):  # one that must be refused
            wrong_size = self._pick((0, 1, P - 1, P + 1, 1 << 63, U64 + 1 - P, U64))
            wrong_flags = self._pick((4, 1 << 31, 1 << 63, U64))
            kind = self._below(3)
            step["size"] = wrong_size if kind != 1 else step["size"]
            step["flags"] = wrong_flags if kind != 0 else step["flags"]
        return step

    def _fallocate(self) -> Step:
        name = self._name()
        start, pages = self._place(name)
        offset, size = self._bent(start * P), self._bent(pages * P)
        return {
            "op": "fallocate",
            "gmem": name,
            "mode": self._pick(FALLOCATE_MODES),
            "offset": offset,
            "size": size,
        }

    def _mmap(self) -> Step:
        name = self._name()
        start, pages = self._place(name)
        offset, size = self._bent(start * P, 0.15), self._bent(pages * P, 0.15)
        step = {"op": "mmap", "gmem": name, "offset": offset, "size": size, "shared": self._chance() < 0.8}
        if self._chance() < 0.2:
            step["prot"] = self._below(8)
        return step

    def _close(self) -> Step | None:
        open_files = [name for name, note in self.scene.files.items() if not note.closed]
        return {"op": "close", "gmem": self._pick(open_files)} if len(open_files) > 1 else None

    def _file_call(self) -> Step:
        """A system call on a file that takes none of them."""
        offset = self._pick((0, 1, P, 1 << 40, 1 << 63, U64))
        call, size = self._pick(list(FILE_CALLS)), self._pick((0, 1, P))
        return {"op": "file_call", "gmem": self._name(), "call": call, "offset": offset, "size": size}

    # ---- host and guest accesses ---------------------------------------------------------------------------

    def _mappable(self) -> str | None:
        """A file whose shared memory the host can map."""
        files = self.scene.files.items()
        names = [name for name, note in files if note.mappable and not note.closed]
        return self._pick(names) if names else None

    def _host_place(self) -> tuple[str, int] | None:
        name = self._mappable()
        if name is None:
            return None
        pages = self.scene.files[name].pages
        page = self._below(pages + 2) if self._chance() < 0.15 else self._below(pages)
        return name, page * P + self._within_page()

    def _within_page(self) -> int:
        kind = self._below(4)
        return (0, self._pick(SMALL), P - self._pick(SMALL), self._below(P))[kind]

    def _host_read(self) -> Step | None:
        place = self._host_place()
        if place is None:
            return None
        return {"op": "host_read", "gmem": place[0], "offset": place[1], "size": self._pick(ACCESS_SIZES)}

    def _host_write(self) -> Step | None:
        place = self._host_place()
        if place is None:
            return None
        data = self._data(self._pick(ACCESS_SIZES))
        return {"op": "host_write", "gmem": place[0], "offset": place[1], "data": data}

    def _gpa(self) -> int:
        """Page-aligned, in or near a memslot that a guest can reach, or at an anchor."""
        slots = [slot for slot in self.scene.slots.values() if slot.gpa + slot.size < self._end]
        if not slots or self._chance() < 0.1:
            return self._pick(self._anchors) + self._below(9) * P
        slot = self._pick(slots)
        pages = slot.size // P
        page = self._below(pages + 2) - 1 if self._chance() < 0.15 else self._below(pages)
        return max(slot.gpa + page * P, 0)

    def _guest_read(self) -> Step:
        gpa, size = self._gpa() + self._within_page(), self._pick(ACCESS_SIZES)
        return {"op": "guest_read", "gpa": gpa, "size": size}

    def _guest_write(self) -> Step:
        gpa, data = self._gpa() + self._within_page(), self._data(self._pick(ACCESS_SIZES))
        return {"op": "guest_write", "gpa": gpa, "data": data}

    # ---- memslots ------------------------------------------------------------------------------------------

    def _slot_add(self) -> Step:
        """A memslot that is wrong in any combination of ways, which shows the order of checks."""
        scene, chance = self.scene, self._chance
        name = self._name() if chance() < 0.95 else "none"
        pages = scene.files[name].pages if name in scene.files else 4
        start = self._below(pages)
        size = 1 + self._below(pages - start)
        if chance() < 0.12:
            size += pages  # beyond the end
        gpa = self._pick(self._anchors) + self._below(9) * P
        if scene.slots and chance() < 0.25:
            other = self._pick(list(scene.slots.values()))
            gpa = max(other.gpa + (self._below(other.size // P + size + 1) - size) * P, 0)
        slot = next(number for number in range(1000) if number not in scene.slots)
        if chance() < 0.15:
            slot = self._pick([*scene.slots, 32763, 32764, 32767, 40000, 65535, 65536, 65537, 131072])
        size = self._bent(size * P)
        if size == 0 and slot in scene.slots:  # which would delete it
            size = P
        step = {
            "op": "slot_add",
            "slot": slot,
            "gpa": self._bent(gpa),
            "size": size,
            "gmem": name,
            "gmem_offset": self._bent(start * P),
        }
        if chance() < 0.2:
            self._make_unusual(step)
        return step

    def _make_unusual(self, step: Step) -> None:
        """Flags and an address of a memslot: mostly one of ordinary memory, and then one that may exist."""
        flags, chance = self._pick(SLOT_FLAGS), self._chance
        step["flags"] = flags
        ordinary = [number for number, slot in self.scene.slots.items() if slot.ordinary]
        if ordinary and chance() < 0.4:
            step["slot"] = self._pick(ordinary)
            old = self.scene.slots[step["slot"]]
            step["size"] = old.size if chance() < 0.9 else step["size"]
            step["gpa"] = old.gpa if chance() < 0.5 else step["gpa"]
        if not flags & MemslotFlag.GUEST_MEMFD and MOST_ORDINARY < step["size"] < MOST_SLOT:
            step["size"] = P  # the guest would find no memory there
        if chance() < 0.3:
            # Through an address with memory of this process behind it, a guest could do harm.
            unmapped = flags in (0, MemslotFlag.LOG_DIRTY_PAGES) and step["size"] <= 8 * P
            step["userspace_addr"] = self._pick((*CHOSEN, *REFUSED) if unmapped else REFUSED)

    def _slot_delete(self) -> Step:
        slots = list(self.scene.slots)
        if not slots or self._chance() < 0.1:
            return {"op": "slot_delete", "slot": self._pick((0, 1, 5, 32763, 32764, 65535))}
        return {"op": "slot_delete", "slot": self._pick(slots)}

    # ---- attributes ----------------------------------------------------------------------------------------

    def _attributes(self) -> int:
        return self._pick((1, 4, 9, 16, U64) if self._chance() < 0.06 else (0, PRIVATE))

    def _set(self) -> Step:
        name = self._name()
        start, pages = self._place(name)
        step = {
            "op": "set",
            "gmem": name,
            "offset": self._bent(start * P),
            "size": self._bent(pages * P),
            "attributes": self._attributes(),
        }
        if self._modes[0] or self._chance() < 0.3:
            step["flags"] = self._pick(self._modes)
        if self._chance() < 0.1:
            step["error_offset_in"] = self._pick((1, P, U64))
        if self._chance() < 0.05:
            words = [0] * MEMORY_ATTRIBUTES2_RESERVED_WORDS
            words[self._below(len(words))] = self._pick((1, U64))
            step["reserved"] = words
        return step

    def _vm_set(self) -> Step:
        pages = self._pick((1, 1, 1, 2, 4, 8, 33, 513))
        step = {
            "op": "vm_set",
            "address": self._bent(self._gpa()),
            "size": self._bent(pages * P),
            "attributes": self._attributes(),
        }
        if self._chance() < 0.04:
            step["flags"] = self._pick((1, 8, U64))
        if attribute_pages(step) > MOST_ATTRIBUTE_PAGES:
            step["size"] = pages * P
        return step

    def _ioctl(self) -> Step:
        name = self._name()
        target = name if self._chance() < 0.7 else "vm"
        if self._chance() < 0.5:
            step = self._set()
            request, struct = KVM_SET_MEMORY_ATTRIBUTES2, MEMORY_ATTRIBUTES2_STRUCT
            fields = (step["offset"], step["size"], step["attributes"], step.get("flags", 0))
            argument = struct.pack(*fields, step.get("error_offset_in", 0), *step.get("reserved", [0] * 11))
        else:
            step = self._vm_set()
            request = KVM_SET_MEMORY_ATTRIBUTES
            fields = (step["address"], step["size"], step["attributes"], step.get("flags", 0))
            argument = MEMORY_ATTRIBUTES_STRUCT.pack(*fields)
        text = argument.hex()
        kind = self._below(8)
        if kind == 0:
            return {"op": "ioctl", "fd": target, "request": request, "argument": None}
        if kind == 1:
            text = text[: 2 * self._below(len(argument))]
        if kind == 2 and target != "vm":
            request = self._pick((0xDEAD, 0xAE80, 0x5401, 0x4004AED2))
        return {"op": "ioctl", "fd": target, "request": request, "argument": text}

    # ---- the rest ------------------------------------------------------------------------------------------

    def _pin(self) -> Step | None:
        name = self._mappable()
        if name is None:
            return None
        start, pages = self._place(name)
        return {"op": "pin", "gmem": name, "offset": start * P, "size": min(pages, 4) * P}

    def _unpin(self) -> Step | None:
        name = self._mappable()
        if name is None:
            return None
        pages = self.scene.files[name].pages
        start = self._below(pages)
        return {
            "op": "unpin",
            "gmem": name,
            "offset": start * P,
            "size": (1 + self._below(pages - start)) * P,
        }

    def _discard_shared(self) -> Step | None:
        files = self.scene.files.items()
        beside = [name for name, note in files if note.beside and not note.closed]
        if not beside:
            return None
        name = self._pick(beside)
        pages = self.scene.files[name].pages
        start = self._below(pages)
        size = (1 + self._below(pages - start)) * P
        return {"op": "discard_shared", "gmem": name, "offset": start * P, "size": size}

    def _check_cap(self) -> Step:
        return {"op": "check_cap", "cap": self._pick(self.terrain.capabilities)}


def _weights(terrain: Terrain) -> Iterator[tuple[str, float]]:
    """How often each operation is drawn, where it can be."""
    yield from {"create": 3, "fallocate": 10, "mmap": 5, "host_read": 16, "host_write": 16}.items()
    yield from {"slot_add": 14, "slot_delete": 5, "check_cap": 1, "ioctl": 2}.items()
    yield from {"close": 1, "file_call": 1}.items()
    yield "set", 14 if terrain.in_place else 1
    yield "vm_set", 14 if terrain.legacy and terrain.private_memory and terrain.vm_attributes else 2
    if terrain.guest:
        yield from {"guest_read": 14, "guest_write": 14}.items()
    if terrain.pins:
        yield from {"pin": 3, "unpin": 2}.items()
    if terrain.legacy:
        yield "discard_shared", 2
