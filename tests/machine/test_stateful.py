"""The package and the oracle side by side over random operations; after every operation they must agree.

`Pair.step` is the one core. A hypothesis state machine drives it where a failure should shrink; seeded walks
drive it where numbers count: 25,000 operations by default and, with `-m slow`, a million. A walk that fails
says which GMEMCORE_SEED replays it.
"""

import errno
import os
import random
import struct
from functools import partial
from itertools import chain

import numpy as np
import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

import gmemcore
from support import policy_by_hand as hand
from support.oracle import (
    COUNTERS,
    PAGE,
    PAGE_TYPES,
    PLANES,
    SET_MEMORY_ATTRIBUTES,
    SET_MEMORY_ATTRIBUTES2,
    TOP,
    OracleError,
    OracleVm,
    agrees,
)

INTERPRETED = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
CHECKED = os.environ.get("NUMBA_BOUNDSCHECK", "0") not in ("", "0")
FULL = not (INTERPRETED or CHECKED)
SEED = int(os.environ.get("GMEMCORE_SEED", "20260429"))
WALK_STEPS = 250  # operations of one Vm in a walk
WALK_PARTS = 5
WALK_OPERATIONS = 25_000 if FULL else 10_000 if CHECKED and not INTERPRETED else 2_000
MACHINE_EXAMPLES, MACHINE_STEPS = (100, 50) if FULL else (10, 50)
LONG_OPERATIONS = 1_000_000

FILE_PAGES = (1, 2, 63, 64, 65, 128, 511, 512, 513, 1024, 1600)
EDGES = (0, 1, 63, 64, 65, 511, 512, 513)
VM_SEEDS = (0, 1234567, (1 << 64) - 1)  # few, so that the oracle's key stream pages are found again
SLOT_BASES = (1 << 32, 1 << 44)
WEIRD_FLAGS = (3, 4, 8, 16, 32, 1 << 63)
ODD_MODES = (0, 2, 4, 8, 9, 16, 17, 19, 32, 33, 64, 65, 128, 129, 256, 1 << 31)  # of fallocate
MOST_SLOT_PAGES = (1 << 31) - 1

of_all_contents = pytest.mark.parametrize("contents", ["eager", "deferred"])


@pytest.fixture(scope="session", autouse=True)
def warmed_up():
    getattr(gmemcore, "warmup", lambda: None)()


# --- where choices come from ----------------------------------------------------------------------


class Seeded:
    """Choices from a seeded generator."""

    def __init__(self, seed):
        generator = random.Random(seed)
        self.one_of = generator.choice
        self.between = generator.randint
        self.data = generator.randbytes

    def chance(self, percent):
        return self.between(1, 100) <= percent


class Drawn:
    """Choices that hypothesis makes, and can shrink: the first of several, small numbers, no."""

    def __init__(self, data):
        self.draw = data.draw

    def one_of(self, values):
        return values[self.between(0, len(values) - 1)]

    def between(self, low, high):
        return low if low == high else self.draw(st.integers(low, high))

    def data(self, size):
        return random.Random(self.between(0, 255)).randbytes(size)

    def chance(self, percent):
        return self.between(0, 99) >= 100 - percent


# --- the pair -------------------------------------------------------------------------------------


class File:
    """One guest_memfd on both sides, and where its slot is by default."""

    def __init__(self, gmem, model, base):
        self.gmem = gmem
        self.model = model
        self.n_pages = model.n_pages
        self.base = base

    def bytes_of(self, page):
        return np.frombuffer(self.memory(page * PAGE, PAGE), np.uint8)

    def memory(self, offset=0, size=None):
        """A copy of the file's bytes that leaves deferred contents deferred."""
        return self.gmem._store.dram(offset, self.n_pages * PAGE if size is None else size)


def outcome_of(call):
    """(outcome, result or None, error or None) of a call on either side."""
    try:
        return "OK", call(), None
    except OracleError as error:
        return error.outcome, None, error
    except gmemcore.GmemError as error:
        return error.outcome, None, error


class Pair:
    """A Vm of the package and one of the oracle, given the same operations."""

    def __init__(self, choose, kind=None, contents="eager"):
        vm_type, abi, firmware = kind or (
            choose.one_of(hand.VM_TYPES + hand.COCO),  # the richest ones twice
            choose.one_of((*hand.ABIS, "legacy", "two-caps")),
            choose.one_of(hand.FIRMWARES),
        )
        seed = choose.one_of(VM_SEEDS)
        self.kind = (vm_type, abi, firmware)
        self.vm = gmemcore.create_vm(vm_type, abi=abi, firmware=firmware, seed=seed, contents=contents)
        self.views = []
        self.model = OracleVm(vm_type, abi, firmware, seed)
        self.legacy = self.model.legacy
        self.own_flags = tuple(hand.FLAGS[flag] for flag in hand.KNOWN_FLAGS[abi])
        self.files = []
        self.foreign = OracleVm().create(PAGE), gmemcore.create_vm("DEFAULT").create_guest_memfd(PAGE)
        self.log = [f"create_vm({vm_type!r}, abi={abi!r}, firmware={firmware!r}, seed={seed})"]
        for index in range(2):
            size = choose.one_of(FILE_PAGES) * PAGE
            self._create(size, self._good_flags(choose), choose.one_of(self._free_bases()))
            self._add_slot(choose, index, whole=True)

    def close(self):
        self.compare_all()
        self.vm.close()

    # one operation

    def step(self, choose):
        """Do one operation, chosen by weight, and compare."""
        operation = choose.one_of(self.menu())
        operation(self, choose)
        self.compare(choose)

    def menu(self):
        return LEGACY_MENU if self.legacy else MENU

    def do(self, text, on_model, on_package, atomic=False):
        """The same on both sides; returns both outcome triples. What raises and is atomic changes nothing."""
        self.log.append(text)
        expected = outcome_of(on_model)
        before = self.digest() if atomic and expected[0] != "OK" else None
        found = outcome_of(on_package)
        assert found[0] == expected[0], f"outcome {found[0]} ({found[2]}), expected {expected[0]}"
        if found[2] is not None:
            offset = getattr(found[2], "error_offset", None)
            assert offset == expected[2].error_offset, (
                f"error_offset {offset}, not {expected[2].error_offset}"
            )
            if expected[0] == "MEMORY_FAULT":
                assert (found[2].gpa, found[2].size, found[2].flags) == expected[2].fault
        if before is not None:
            self.assert_unchanged(before)
        return expected, found

    def digest(self):
        return [
            ([file.gmem.plane(plane) for plane in PLANES], np.frombuffer(file.memory(), np.uint8))
            for file in self.files
        ]

    def assert_unchanged(self, before):
        for (old_planes, old_memory), (planes, memory) in zip(before, self.digest(), strict=True):
            for plane, old, new in zip(PLANES, old_planes, planes, strict=True):
                assert np.array_equal(old, new), f"a refused call changed {plane}"
            assert np.array_equal(old_memory, memory), "a refused call changed bytes"

    # comparing

    def compare(self, choose):
        """Counters and page state whole, the bytes of a page or two."""
        assert self.vm.counters.asdict() == self.model.counters
        assert self.vm.phase == self.model.phase
        for file in self.files:
            self.compare_planes(file)
            for page in {choose.between(0, file.n_pages - 1), file.n_pages - 1}:
                self.compare_page(file, page)
        if choose.chance(4):
            self.compare_runs(choose.one_of(self.files))
        if self.vm.contents == "deferred":
            self.compare_views(choose)

    def compare_views(self, choose):
        """Raw views show what is there, whenever they were made, and making them changes nothing."""
        if choose.chance(4) and self.files:
            file = choose.one_of(self.files)
            before = file.memory()
            if choose.chance(50):
                first, count = self._pages(choose, file)
                file.gmem.materialize(first * PAGE, count * PAGE)
            else:
                self.views.append((file, file.gmem.memory))
            assert file.memory() == before
        for file, view in self.views:
            assert file not in self.files or view.tobytes() == file.memory()
        if choose.chance(20):
            self.views.clear()

    def compare_runs(self, file):
        if self.legacy:
            assert self.vm.private_frames() == self.model.private_runs()
        else:
            assert file.gmem.runs() == file.model.runs()

    def compare_planes(self, file):
        found = {plane: file.gmem.plane(plane) for plane in PLANES}
        for plane, bits in found.items():
            if self.legacy and plane == "pinned":
                continue
            wanted = np.frombuffer(getattr(file.model, plane), dtype=np.bool_)
            assert np.array_equal(bits, wanted), f"{plane} at pages {np.flatnonzero(bits != wanted)[:5]}"
        if self.legacy:
            return  # assigned and accepted stay behind there, and pins are the other side's
        # The invariants of page state, on the package's own planes.
        assert not np.any(found["accepted"] & ~found["assigned"])
        assert not np.any(found["assigned"] & ~(found["allocated"] & found["private"]))
        assert not np.any(found["pinned"] & ~(found["allocated"] & ~found["private"]))
        assert not np.any(found["poisoned"] & ~found["allocated"])

    def compare_page(self, file, page):
        state = file.model.memory.pages.get(page)
        if state is not None:
            assert file.bytes_of(page).tobytes() == file.model.memory.dram(page), f"bytes of page {page}"

    def compare_all(self):
        for file in self.files:
            self.compare_runs(file)
            for page in file.model.memory.pages:
                self.compare_page(file, page)
            counters = file.gmem.counters.asdict()
            for name in set(COUNTERS) - {"memory_faults", "notifications"}:
                assert counters[name] == file.model.counters[name], f"{name} of one file"
            if self.legacy:
                for page in file.model.host_memory.pages:
                    expected = file.model.host_read(page * PAGE, PAGE)
                    assert agrees(expected, file.gmem.host_read(page * PAGE, PAGE)), f"host page {page}"
        assert self.vm.counters.asdict() == self.model.counters

    def learn_scrambled(self, before, unit=np.uint8):
        """Scrambled bytes can't be foreseen: all new, and no two pages alike; the oracle then takes them.

        One scramble shows in every byte, and who looks at a single one sees it; two of them in every word.
        """
        new = set()
        for file, page, old in before:
            now = file.bytes_of(page)
            assert not np.any(now.view(unit) == old.view(unit)), f"scrambled page {page} has something it had"
            new.add(now.tobytes())
            file.model.learn(page, now.tobytes())
        assert len(new) == len(before), "two pages scrambled alike"

    def scrambled_pages(self):
        """(file, page, its bytes now) of each page whose bytes the oracle doesn't know."""
        return [
            (file, page, np.array(file.bytes_of(page), copy=True))
            for file in self.files
            for page, state in file.model.memory.pages.items()
            if state.unknown is not None
        ]

    # choosing arguments

    def _good_flags(self, choose):
        """Creation flags that are accepted: mostly mappable, mostly shared from the start."""
        if self.legacy and self.kind[0] != "DEFAULT":
            return choose.one_of((0, 1))
        return choose.one_of((3, 3, 3, 1, 1, 2, 0))

    def _page(self, choose, file):
        """A page of the file, mostly at an edge of a word, a 2 MiB block or the file."""
        last = file.n_pages - 1
        if choose.chance(75):
            return choose.one_of([*(edge for edge in EDGES if edge <= last), last, max(last - 1, 0)])
        return choose.between(0, last)

    def _pages(self, choose, file):
        """(first page, number of pages) inside the file; short, to an edge, or to the end."""
        first = self._page(choose, file)
        left = file.n_pages - first
        if choose.chance(60):
            return first, min(left, choose.one_of((1, 1, 2, 3, 7)))
        if choose.chance(60):
            return first, min(left, choose.one_of((63, 64, 65, 128)))
        return first, min(left, choose.one_of((511, 512, 513, left)))

    def _range(self, choose, file):
        """(offset, size), now and then one that no call takes."""
        first, count = self._pages(choose, file)
        offset, size = first * PAGE, count * PAGE
        if not choose.chance(6):
            return offset, size
        return choose.one_of(
            (
                (offset + 1, size),
                (offset, size + 1),
                (offset, size - 1),
                (offset, 0),
                (offset, file.n_pages * PAGE + PAGE - offset),
                (file.n_pages * PAGE, PAGE),
                (TOP - PAGE, 2 * PAGE),
                (TOP - PAGE, PAGE),
                (offset, TOP - PAGE),
                (offset, (1 << 63) + PAGE),
            )
        )

    def _content_flags(self, choose):
        if choose.chance(4):
            return choose.one_of(WEIRD_FLAGS)
        return choose.one_of((0, *self.own_flags))

    def _attributes(self, choose):
        if choose.chance(2):
            return choose.one_of((1, 9, 16, 1 << 63))
        return choose.one_of((0, 8))

    def _gpa(self, choose, file, page):
        """Guest address of a page of the file: through a slot of it if there is one."""
        slots = [slot for slot in self.model.slots.values() if slot.gmem is file.model]
        if not slots or choose.chance(5):
            return file.base + page * PAGE
        slot = choose.one_of(slots)
        return slot.gpa - slot.gmem_offset + page * PAGE

    def _bytes_range(self, choose, file):
        """(page, offset in it, size) of a small access, often across the page's end."""
        page = self._page(choose, file)
        at, size = choose.one_of(
            ((0, 8), (8, 8), (4088, 8), (4092, 8), (2048, 1), (4095, 2), (1000, 100), (0, PAGE))
        )
        if choose.chance(8):
            size = choose.one_of((PAGE + 1, 2 * PAGE, 3 * PAGE - 1))
        return page, at, size

    def _file(self, choose):
        return choose.one_of(self.files)

    def _gmem_index(self, file):
        return self.files.index(file)

    # operations: creation, slots

    def _free_bases(self):
        """Where a file may begin in guest memory: far from the other one, or right behind it."""
        if not self.files:
            return SLOT_BASES[:1]
        return SLOT_BASES[1], SLOT_BASES[0] + self.files[0].n_pages * PAGE

    def _create(self, size, flags, base):
        expected, found = self.do(
            f"create_guest_memfd({size}, {flags})",
            lambda: self.model.create(size, flags),
            lambda: self.vm.create_guest_memfd(size, flags),
            atomic=True,
        )
        if expected[0] == "OK":
            self.files.append(File(found[1], expected[1], base))

    def op_create(self, choose):
        """Only refused creations: two files are enough."""
        size, flags = choose.one_of(
            ((0, 0), (1, 0), (4097, 1), (TOP - PAGE, 0), (1 << 63, 3), (PAGE, 4), (PAGE, 1 << 63))
        )
        self._create(size, flags, 0)

    def _add_slot(self, choose, slot, whole=False):
        file = self.files[slot % len(self.files)] if whole else self._file(choose)
        first, count = (0, file.n_pages) if whole else self._pages(choose, file)
        gpa, size, offset = file.base + first * PAGE, count * PAGE, first * PAGE
        model, gmem = file.model, file.gmem
        if not whole and choose.chance(25):
            gpa, size, offset = choose.one_of(
                (
                    (gpa + 1, size, offset),
                    (gpa, size + 1, offset),
                    (gpa, size, offset + 1),
                    (gpa, 0, offset),
                    (gpa, size, file.n_pages * PAGE),
                    (TOP - size, size, offset),
                    (gpa, size, TOP - size),
                    (gpa, MOST_SLOT_PAGES * PAGE, offset),
                    (gpa, (MOST_SLOT_PAGES + 1) * PAGE, offset),
                    (gpa, TOP - PAGE, 0),
                )
            )
        if not whole and choose.chance(15):
            model, gmem = choose.one_of(((None, None), self.foreign))
        if not whole and choose.chance(10):
            slot = choose.one_of((32763, 32764, 32767, 1 << 16, (1 << 32) - 1, 1 << 32, -1))
        self.do(
            f"add_memslot({slot}, {gpa}, {size}, {gmem!r}, {offset})",
            lambda: self.model.slot_add(slot, gpa, size, model, offset),
            lambda: self.vm.add_memslot(slot, gpa, size, gmem, offset),
            atomic=True,
        )
        if slot == 32763 and slot in self.model.slots:
            self._delete_slot(slot)

    def op_slot_add(self, choose):
        self._add_slot(choose, choose.between(0, 3))

    def _delete_slot(self, slot):
        self.do(
            f"delete_memslot({slot})",
            lambda: self.model.slot_delete(slot),
            lambda: self.vm.delete_memslot(slot),
            atomic=True,
        )

    def op_slot_delete(self, choose):
        slot = choose.between(0, 3)
        self._delete_slot(slot)
        if choose.chance(60):  # mostly back at once, else nothing is left to do
            self._add_slot(choose, slot, whole=True)

    # operations: conversion

    def op_set(self, choose):
        file = self._file(choose)
        offset, size = self._range(choose, file)
        attributes, flags = self._attributes(choose), self._content_flags(choose)
        caller = choose.one_of((0, 0, 0, 0, PAGE))
        reserved = choose.one_of((0,) * 30 + (1,))
        self._set(file, offset, size, attributes, flags, caller, reserved)

    def _set(self, file, offset, size, attributes, flags, caller=0, reserved=0):
        counters = dict(self.model.counters)
        scrambled = []

        def on_model():
            try:
                file.model.set(offset, size, attributes, flags, caller, (0,) * 10 + (reserved,))
            finally:
                scrambled.extend(self.scrambled_pages())

        _, found = self.do(
            f"file {self._gmem_index(file)}: set_memory_attributes({offset}, {size}, {attributes}, {flags}, "
            f"error_offset={caller}, reserved={reserved})",
            on_model,
            lambda: file.gmem.set_memory_attributes(
                offset, size, attributes, flags, error_offset=caller, reserved=reserved
            ),
            atomic=True,
        )
        self.learn_scrambled(scrambled)
        if found[1] is not None:
            self.compare_counters(found[1].counters, counters)

    def compare_counters(self, result, before):
        """A result's counters are what the Vm's totals grew by."""
        assert result.asdict() == {name: self.model.counters[name] - before[name] for name in COUNTERS}

    def op_set_without_memory(self, choose):
        """A conversion whose allocations are made to fail after some."""
        file = self._file(choose)
        budget = choose.one_of((0, 0, 1, 2, 64))
        self.log.append(f"file {self._gmem_index(file)}: fail_allocations_after({budget})")
        file.model.allocations_left = budget
        file.gmem.fail_allocations_after(budget)
        for _ in range(choose.between(1, 3)):
            self.op_set_on(choose, file)
        file.model.allocations_left = None
        file.gmem.fail_allocations_after(None)

    def op_set_on(self, choose, file):
        offset, size = self._range(choose, file)
        self._set(file, offset, size, self._attributes(choose), self._content_flags(choose))

    def op_set_many(self, choose):
        """A batch is the same requests one by one; attributes and flags are one for all, or one each."""
        file = self._file(choose)
        count = choose.between(0, 8)
        ranges = [self._range(choose, file) for _ in range(count)]
        attributes, flags = self._attributes(choose), self._content_flags(choose)
        wishes = [(attributes, flags)] * count
        if choose.chance(50):
            wishes = [(self._attributes(choose), self._content_flags(choose)) for _ in range(count)]
            attributes, flags = (np.array([wish[i] for wish in wishes], dtype=np.uint64) for i in (0, 1))
        self.log.append(f"file {self._gmem_index(file)}: set_memory_attributes_many({ranges}, {wishes})")
        expected, grown = [], []
        for arguments in zip(ranges, wishes, strict=True):
            before = dict(self.model.counters)
            outcome, _, error = outcome_of(partial(file.model.set, *chain(*arguments)))
            number = 0 if outcome == "OK" else getattr(errno, outcome)
            expected.append((number, (error.error_offset or 0) if error else 0))
            grown.append({name: self.model.counters[name] - before[name] for name in COUNTERS})
        scrambled = self.scrambled_pages()
        offsets, sizes = (np.array([pair[i] for pair in ranges], dtype=np.uint64) for i in (0, 1))
        result = file.gmem.set_memory_attributes_many(offsets, sizes, attributes, flags)
        assert list(zip(result.errno.tolist(), result.error_offset.tolist(), strict=True)) == expected
        for name, column in result.counters.items():
            assert column.tolist() == [wanted[name] for wanted in grown], name
        self.learn_scrambled(scrambled, np.uint64)

    def op_ioctl(self, choose):
        """The struct itself, in a bytearray (updated in place) or in bytes (no result can be copied out)."""
        file = self._file(choose)
        offset, size = self._range(choose, file)
        caller = choose.one_of((0, 0, PAGE))
        words = (offset, size, self._attributes(choose), self._content_flags(choose), caller, *[0] * 11)
        request = choose.one_of((SET_MEMORY_ATTRIBUTES2,) * 9 + (SET_MEMORY_ATTRIBUTES, 0xDEAD))
        argument = choose.one_of((bytearray,) * 4 + (bytes,))(struct.pack("<16Q", *words))
        if choose.chance(5):
            argument = choose.one_of((None, argument[:127]))
        scrambled = []

        def on_model():
            try:
                writable = isinstance(argument, bytearray)
                return file.model.ioctl(request, None if argument is None else bytes(argument), writable)
            finally:
                scrambled.extend(self.scrambled_pages())

        expected, _ = self.do_raw(
            f"file {self._gmem_index(file)}: ioctl({request:#x}, {argument!r})",
            on_model,
            lambda: file.gmem.ioctl(request, argument),
        )
        self.learn_scrambled(scrambled)
        out = expected[1] if expected[2] is None else getattr(expected[2], "argument", None)
        if out is not None:
            assert bytes(argument) == out

    def do_raw(self, text, on_model, on_package):
        """As `do`, for the raw form: the error_offset is in the struct."""
        self.log.append(text)
        expected, found = outcome_of(on_model), outcome_of(on_package)
        assert found[0] == expected[0], f"outcome {found[0]} ({found[2]}), expected {expected[0]}"
        return expected, found

    def _vm_range(self, choose):
        """(address, size); a huge range that is valid is left out, as the oracle holds a frame at a time."""
        file = self._file(choose)
        offset, size = self._range(choose, file)
        address = (file.base + offset) % TOP
        if choose.chance(2):
            address = (TOP - size) % TOP  # ends at 2^64
        valid = address + size < TOP and (address | size) % PAGE == 0
        return address, PAGE if valid and size > 1 << 32 else size

    def op_vm_set(self, choose):
        address, size = self._vm_range(choose)
        attributes = self._attributes(choose)
        flags = choose.one_of((0,) * 20 + (1, 2))
        self.do(
            f"vm.set_memory_attributes({address}, {size}, {attributes}, {flags})",
            lambda: self.model.vm_set(address, size, attributes, flags),
            lambda: self.vm.set_memory_attributes(address, size, attributes, flags),
            atomic=True,
        )

    def op_vm_ioctl(self, choose):
        address, size = self._vm_range(choose)
        argument = bytearray(struct.pack("<4Q", address, size, self._attributes(choose), 0))
        request = choose.one_of((SET_MEMORY_ATTRIBUTES,) * 5 + (SET_MEMORY_ATTRIBUTES2, 1))
        if choose.chance(5):
            argument = choose.one_of((None, argument[:31]))
        self.do_raw(
            f"vm.ioctl({request:#x}, {argument!r})",
            lambda: self.model.ioctl(request, argument),
            lambda: self.vm.ioctl(request, argument),
        )

    # operations: accesses

    def op_host_read(self, choose):
        file = self._file(choose)
        page, at, size = self._bytes_range(choose, file)
        offset = page * PAGE + at
        expected, found = self.do(
            f"file {self._gmem_index(file)}: host_read({offset}, {size})",
            lambda: file.model.host_read(offset, size),
            lambda: file.gmem.host_read(offset, size),
        )
        assert expected[1] is None or agrees(expected[1], found[1]), "host_read data"

    def op_host_write(self, choose):
        file = self._file(choose)
        page, at, size = self._bytes_range(choose, file)
        offset, data = page * PAGE + at, choose.data(size)
        self.do(
            f"file {self._gmem_index(file)}: host_write({offset}, {data[:16].hex()}... {size} bytes)",
            lambda: file.model.host_write(offset, data),
            lambda: file.gmem.host_write(offset, data),
        )

    def op_guest_read(self, choose):
        file = self._file(choose)
        page, at, size = self._bytes_range(choose, file)
        gpa, private = self._gpa(choose, file, page) + at, choose.one_of((None, None, True, False))
        expected, found = self.do(
            f"guest_read({gpa}, {size}, {private})",
            lambda: self.model.guest_read(gpa, size, private),
            lambda: self.vm.guest_read(gpa, size, private),
        )
        assert expected[1] is None or agrees(expected[1], found[1]), "guest_read data"

    def op_guest_write(self, choose):
        file = self._file(choose)
        page, at, size = self._bytes_range(choose, file)
        gpa, private = self._gpa(choose, file, page) + at, choose.one_of((None, None, True, False))
        data = choose.data(size)
        self.do(
            f"guest_write({gpa}, {data[:16].hex()}... {size} bytes, {private})",
            lambda: self.model.guest_write(gpa, data, private),
            lambda: self.vm.guest_write(gpa, data, private),
        )

    def op_accept(self, choose):
        file = self._file(choose)
        first, count = self._private_run(choose, file)
        gpa, size = self._gpa(choose, file, first), count * PAGE
        if choose.chance(4):
            gpa, size = choose.one_of(((gpa + 1, size), (gpa, size + 1)))
        self.do(
            f"accept({gpa}, {size})",
            lambda: self.model.accept(gpa, size),
            lambda: self.vm.accept(gpa, size),
        )

    def _private_run(self, choose, file):
        """Pages for accept and populate: mostly within one private run, where they can succeed."""
        runs = [run for run in file.model.runs() if run[2] == "private"]
        if not runs or choose.chance(25):
            return self._pages(choose, file)
        start, end, _ = choose.one_of(runs)
        first = choose.one_of((start, choose.between(start, end - 1)))
        return first, min(end - first, choose.one_of((1, 2, 64, 65, 513)))

    # operations: the rest of the file

    def op_allocate(self, choose):
        self._fallocate(choose, choose.one_of(ODD_MODES) if choose.chance(15) else 1)

    def op_punch(self, choose):
        self._fallocate(choose, choose.one_of(ODD_MODES) if choose.chance(15) else 3)

    def _fallocate(self, choose, mode):
        file = self._file(choose)
        offset, size = self._range(choose, file)
        if choose.chance(8):
            top = 1 << 63
            offset, size = choose.one_of(
                (
                    (top - PAGE, PAGE),
                    (top - 2 * PAGE, PAGE),
                    (1, top - 1),
                    (1, top - 2),
                    (0, top - PAGE),
                    (top - 1, 1),
                    (-PAGE, PAGE),
                    (0, -PAGE),
                )
            )
        self.do(
            f"file {self._gmem_index(file)}: fallocate({mode}, {offset}, {size})",
            lambda: file.model.fallocate(mode, offset, size),
            lambda: file.gmem.fallocate(mode, offset, size),
            atomic=True,
        )

    def op_discard_shared(self, choose):
        file = self._file(choose)
        first, count = self._pages(choose, file)
        self.do(
            f"file {self._gmem_index(file)}: discard_shared({first * PAGE}, {count * PAGE})",
            lambda: file.model.discard_shared(first * PAGE, count * PAGE),
            lambda: file.gmem.discard_shared(first * PAGE, count * PAGE),
        )

    def op_mmap(self, choose):
        file = self._file(choose)
        size = choose.one_of((0, 1, PAGE, PAGE + 1, file.n_pages * PAGE, 2 * file.n_pages * PAGE))
        offset = choose.one_of((0, 0, 1, PAGE - 1, PAGE, file.n_pages * PAGE))
        shared = choose.one_of((True, True, False))
        self.do(
            f"file {self._gmem_index(file)}: mmap({offset}, {size}, {shared})",
            lambda: file.model.mmap(offset, size, shared),
            lambda: file.gmem.mmap(offset, size, shared) and None,
        )

    def op_pin(self, choose):
        file = self._file(choose)
        first, count = self._pages(choose, file)
        if choose.chance(8):
            count = file.n_pages - first + 1
        self.do(
            f"file {self._gmem_index(file)}: pin({first * PAGE}, {count * PAGE})",
            lambda: file.model.pin(first * PAGE, count * PAGE),
            lambda: file.gmem.pin(first * PAGE, count * PAGE),
            atomic=True,
        )

    def op_unpin(self, choose):
        file = self._file(choose)
        first, count = (0, file.n_pages) if choose.chance(30) else self._pages(choose, file)
        self.do(
            f"file {self._gmem_index(file)}: unpin({first * PAGE}, {count * PAGE})",
            lambda: file.model.unpin(first * PAGE, count * PAGE),
            lambda: file.gmem.unpin(first * PAGE, count * PAGE),
        )

    def op_poison(self, choose):
        file = self._file(choose)
        offset = self._page(choose, file) * PAGE
        self.do(
            f"file {self._gmem_index(file)}: poison({offset})",
            lambda: file.model.poison(offset),
            lambda: file.gmem.poison(offset),
            atomic=True,
        )

    def op_close(self, choose):
        """Close a file whose memslots stay, look at what is there, and begin with another one."""
        if choose.chance(80):
            return self.op_host_write(choose)
        file = self._file(choose)
        self.do(f"file {self._gmem_index(file)}: close()", file.model.close, file.gmem.close)
        assert self.vm.counters.asdict() == self.model.counters
        for slot, old in list(self.model.slots.items()):
            if old.gmem is not file.model:
                continue
            private = choose.one_of((None, True, False))
            self.do(
                f"guest_read({old.gpa}, 8, {private})",
                lambda gpa=old.gpa, private=private: self.model.guest_read(gpa, 8, private),
                lambda gpa=old.gpa, private=private: self.vm.guest_read(gpa, 8, private),
            )
            self.do(
                f"accept({old.gpa}, {PAGE})",
                lambda gpa=old.gpa: self.model.accept(gpa, PAGE),
                lambda gpa=old.gpa: self.vm.accept(gpa, PAGE),
            )
            self.do(
                f"launch_update({old.gpa}, {PAGE}, None, 'ZERO')",
                lambda gpa=old.gpa: self.model.launch_update(gpa, PAGE, None, "ZERO"),
                lambda gpa=old.gpa: self.vm.launch_update(gpa, PAGE, None, "ZERO"),
            )
            self._delete_slot(slot)
        self.files.remove(file)
        self._create(file.model.size, self._good_flags(choose), file.base)
        return self._add_slot(choose, choose.between(0, 3), whole=True)

    # operations: launch

    def op_launch_update(self, choose):
        file = self._file(choose)
        first, count = self._private_run(choose, file)
        gpa, size = self._gpa(choose, file, first), count * PAGE
        source = choose.one_of((None, bytes([0xA5]) * size, choose.data(PAGE) * count))
        if choose.chance(4):
            gpa, size = choose.one_of(((gpa + 1, size), (gpa, size + 1), (gpa, 0)))
        elif choose.chance(4):  # far beyond the memslot, or all that a size can be
            source, size = None, choose.one_of(((1 << 45) + PAGE, TOP - PAGE))
        page_type = choose.one_of(("NORMAL", "NORMAL", *PAGE_TYPES))
        expected, found = self.do(
            f"launch_update({gpa}, {size}, {None if source is None else source[:8].hex()}, {page_type!r})",
            lambda: self.model.launch_update(gpa, size, source, page_type),
            lambda: self.vm.launch_update(gpa, size, source, page_type),
        )
        if expected[0] == "OK":
            assert found[1].pages_done == expected[1]
        elif expected[2].pages_done is not None:
            assert found[2].pages_done == expected[2].pages_done

    def op_correct_cpuid(self, choose):
        """SNP's firmware corrects one CPUID page: refused, and the correction can be read back."""
        if self.kind[0] != "SNP":
            return self.op_launch_update(choose)
        file = self._file(choose)
        gpa = self._gpa(choose, file, self._private_run(choose, file)[0])
        corrected = choose.data(PAGE)
        self.model.cpuid_correction = corrected
        self.vm.correct_cpuid(corrected)
        expected, found = self.do(
            f"correct_cpuid(); launch_update({gpa}, {PAGE}, source, 'CPUID')",
            lambda: self.model.launch_update(gpa, PAGE, bytes(PAGE), "CPUID"),
            lambda: self.vm.launch_update(gpa, PAGE, bytes(PAGE), "CPUID"),
        )
        assert expected[0] in ("EIO", "EINVAL")  # EINVAL: no memslot there
        assert found[2].pages_done == 0
        self.model.cpuid_correction = None
        return self.vm.correct_cpuid(None)

    def op_launch_finish(self, choose):
        if choose.chance(50):  # rarely, so that both phases are long
            return self.op_launch_update(choose)
        vmsas = choose.one_of((None, None, [], [bytes(PAGE)]))
        return self.do(
            f"launch_finish({vmsas and len(vmsas)})",
            lambda: self.model.launch_finish(vmsas),
            lambda: self.vm.launch_finish(vmsas),
        )

    def op_check_cap(self, choose):
        name = choose.one_of(hand.CAPABILITIES)
        expected = self.model.check_cap(name)
        self.do(f"check_cap({name!r})", lambda: expected, lambda: self.vm.check_cap(name))
        assert self.vm.check_cap(name) == expected


ACCESSES = {
    Pair.op_host_read: 8,
    Pair.op_host_write: 10,
    Pair.op_guest_read: 9,
    Pair.op_guest_write: 11,
    Pair.op_accept: 8,
    Pair.op_allocate: 4,
    Pair.op_punch: 5,
    Pair.op_mmap: 1,
    Pair.op_pin: 6,
    Pair.op_unpin: 3,
    Pair.op_poison: 1,
    Pair.op_slot_add: 2,
    Pair.op_slot_delete: 2,
    Pair.op_launch_update: 6,
    Pair.op_correct_cpuid: 1,
    Pair.op_launch_finish: 2,
    Pair.op_check_cap: 1,
    Pair.op_create: 1,
    Pair.op_close: 1,
}
CONVERSIONS = {
    Pair.op_set: 25,
    Pair.op_set_many: 6,
    Pair.op_set_without_memory: 3,
    Pair.op_ioctl: 4,
    Pair.op_vm_set: 1,
    Pair.op_vm_ioctl: 1,
}
LEGACY_CONVERSIONS = {
    Pair.op_set: 1,
    Pair.op_ioctl: 1,
    Pair.op_vm_set: 25,
    Pair.op_vm_ioctl: 4,
    Pair.op_discard_shared: 5,
}


def menu_of(*weights):
    return [operation for table in weights for operation, weight in table.items() for _ in range(weight)]


MENU = menu_of(CONVERSIONS, ACCESSES)
LEGACY_MENU = menu_of(LEGACY_CONVERSIONS, ACCESSES)


# --- seeded walks ---------------------------------------------------------------------------------


def walk(seed, steps, contents):
    """One Vm; a failure says how to run it again."""
    choose = Seeded(seed)
    pair = None
    try:
        pair = Pair(choose, contents=contents)
        for _ in range(steps):
            pair.step(choose)
        pair.close()
    except Exception as error:
        last = "\n  ".join(pair.log[-25:]) if pair else ""
        raise AssertionError(f"{error}\nreplay: GMEMCORE_SEED={seed}\nlast operations:\n  {last}") from error


def walks(first_seed, operations, contents):
    """Run walks until they made `operations`; returns how many were done."""
    done = 0
    while done < operations:
        walk(first_seed + done // WALK_STEPS, WALK_STEPS, contents)
        done += WALK_STEPS
    print(f"{done} operations compared with the oracle, from GMEMCORE_SEED={first_seed}")
    return done


# One Vm of each kind before chance has its say.
KINDS = tuple(
    (vm_type, abi, firmware) for vm_type in hand.VM_TYPES for abi in hand.ABIS for firmware in hand.FIRMWARES
)


@of_all_contents
def test_every_kind_of_vm_agrees_for_a_while(contents):
    for index, kind in enumerate(KINDS):
        choose = Seeded(f"{SEED}-{kind}")
        pair = Pair(choose, kind, contents)
        try:
            for _ in range(20 if FULL else 4):
                pair.step(choose)
            pair.close()
        except Exception as error:
            last = "\n  ".join(pair.log)
            raise AssertionError(f"{error}\nkind {index}, GMEMCORE_SEED={SEED}:\n  {last}") from error


@of_all_contents
@pytest.mark.parametrize("part", range(WALK_PARTS))
def test_random_walks_agree_with_the_oracle(part, contents):
    """Together at least 25,000 operations where kernels are compiled."""
    share = WALK_OPERATIONS // WALK_PARTS
    assert walks(SEED + part * (share // WALK_STEPS + 1), share, contents) >= share


def scrambled_twice(seed, contents):
    """The bytes of two pages after each of two conversions that promise nothing about contents."""
    with gmemcore.create_vm("SW_PROTECTED", abi="v5", seed=seed, contents=contents) as vm:
        gmem = vm.create_guest_memfd(2 * PAGE, 3)
        gmem.host_write(0, bytes(2 * PAGE))
        pictures = []
        for attributes in (8, 0):
            gmem.set_memory_attributes(0, 2 * PAGE, attributes)
            pictures += [gmem.memory[:PAGE].tobytes(), gmem.memory[PAGE:].tobytes()]
    return pictures


def test_scramble_is_the_same_for_a_seed_and_different_for_each_seed_call_and_page():
    assert scrambled_twice(7, "eager") == scrambled_twice(7, "eager") == scrambled_twice(7, "deferred")
    assert len({*scrambled_twice(7, "eager"), *scrambled_twice(8, "eager")}) == 8


def test_legacy_attributes_of_all_guest_memory_are_set_at_once():
    """More frames than the oracle could hold one by one."""
    last = TOP - PAGE  # the last page, which no range can hold: it would end at 2^64
    with gmemcore.create_vm("SNP", abi="legacy") as vm:
        vm.set_memory_attributes(0, last, 8)
        assert vm.private_frames() == [(0, last // PAGE)]
        with pytest.raises(gmemcore.GmemError):
            vm.set_memory_attributes(last, PAGE, 8)
        vm.set_memory_attributes(1 << 63, PAGE, 0)
        hole = (1 << 63) // PAGE
        assert vm.private_frames() == [(0, hole), (hole + 1, last // PAGE)]
        counters = vm.counters
        assert counters.pages_changed == TOP // PAGE
        # The blocks of the last page and of the hole were split.
        assert (counters.blocks_2m_split, counters.blocks_2m_merged) == (2, 0)


class Machine(RuleBasedStateMachine):
    """The same operations, chosen by hypothesis, which shrinks a failure to few of them."""

    contents = "eager"

    @initialize(data=st.data())
    def begin(self, data):
        self.pair = Pair(Drawn(data), contents=self.contents)

    @rule(data=st.data())
    def operate(self, data):
        done = len(self.pair.log)
        try:
            self.pair.step(Drawn(data))
        finally:
            for line in self.pair.log[done:]:
                note(line)

    def teardown(self):
        if hasattr(self, "pair"):
            note(self.pair.log[0])
            self.pair.close()


class DeferredMachine(Machine):
    """The same on deferred contents."""

    contents = "deferred"


@pytest.mark.parametrize("machine", [Machine, DeferredMachine])
def test_state_machine_agrees_with_the_oracle(machine):
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=MACHINE_EXAMPLES,
            stateful_step_count=MACHINE_STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.slow
@of_all_contents
def test_a_million_operations_agree_with_the_oracle(request, contents):
    if "slow" not in request.config.getoption("markexpr"):
        pytest.skip("takes minutes; run with -m slow")
    seed = int(os.environ.get("GMEMCORE_SEED") or random.SystemRandom().randrange(1 << 62))
    assert walks(seed, LONG_OPERATIONS, contents) >= LONG_OPERATIONS
