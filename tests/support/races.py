"""Threads that convert and access overlapping ranges; each knows what it wrote last."""

import os
import random
import threading
import time

import gmemcore
from gmemcore.engine.state import Plane
from gmemcore.errors import GuestExit, HostAccessError
from support.kinds import P

PAGES = 96  # of each of two files
GPA = 1 << 32
PRIVATE, PRESERVE = 8, 2
THREADS = 8
INTERPRETED = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
SHORT = 20 if INTERPRETED else 2_000
DEADLINE = 60


class Worker(threading.Thread):
    """One thread, and what it knows: its last words and the attribute it last gave each page."""

    def __init__(self, number, vm, operations, barrier):
        super().__init__(daemon=True)
        self.number, self.vm, self.operations, self.barrier = number, vm, operations, barrier
        self.rng = random.Random(number)
        self.words = {}
        self.attributes = {}
        self.changed = 0
        self.failure = None

    def run(self):
        try:
            self.barrier.wait()
            for step in range(self.operations):
                self.rng.choice((self.convert, self.convert, self.write, self.read, self.look))(step)
        except Exception as failure:
            self.failure = failure

    def convert(self, _):
        # Any offset goes with any size, so that mixed-up requests would still be within the file.
        file = self.rng.randrange(2)
        start, size = self.rng.randrange(PAGES // 2), self.rng.randint(1, PAGES // 2)
        attributes = self.rng.choice((0, PRIVATE))
        done = self.vm.files[file].set_memory_attributes(start * P, size * P, attributes, PRESERVE)
        self.changed += done.counters.pages_changed
        for page in range(start, start + size):
            self.attributes[file, page] = attributes

    def place(self):
        file, page = self.rng.randrange(2), self.rng.randrange(PAGES)
        return file, page, page * P + 8 * (self.number + THREADS * self.rng.randrange(60))

    def write(self, step):
        file, page, at = self.place()
        word = (self.number << 48 | step << 1 | 1).to_bytes(8, "little")
        try:
            if self.rng.random() < 0.5:
                self.vm.files[file].host_write(at, word)
            else:
                self.vm.guest_write(GPA + file * PAGES * P + at, word)
        except (HostAccessError, GuestExit):
            return
        self.words[file, page, at] = word

    def read(self, _):
        file, page, at = self.place()
        if self.words and self.rng.random() < 0.8:
            file, page, at = self.rng.choice(list(self.words)[-50:])
        expected = self.words.get((file, page, at), bytes(8))
        try:
            if self.rng.random() < 0.5:
                found = self.vm.files[file].host_read(at, 8)
            else:
                found = self.vm.guest_read(GPA + file * PAGES * P + at, 8)
        except (HostAccessError, GuestExit):
            return
        assert found == expected, f"thread {self.number} reads {found.hex()} for {expected.hex()}"

    def look(self, _):
        """Both files at once, one way or the other: locks of two."""
        if self.rng.random() < 0.5:
            self.vm.guest_read(GPA + (PAGES - 1) * P, 2 * P)
        else:
            gmem = self.vm.files[self.rng.randrange(2)]
            runs = gmem.runs()
            assert [run[0] for run in runs[1:]] == [run[1] for run in runs[:-1]]
            assert runs[-1][1] == PAGES


def race(operations):
    """Run it and check what is left; returns the seconds it took."""
    vm = gmemcore.create_vm("SNP", "two-caps", "cipher", seed=3)
    for file in range(2):
        gmem = vm.create_guest_memfd(PAGES * P, 3)
        vm.add_memslot(file, GPA + file * PAGES * P, PAGES * P, gmem)
    vm.launch_finish()
    barrier = threading.Barrier(THREADS)
    workers = [Worker(number, vm, operations, barrier) for number in range(THREADS)]
    began = time.monotonic()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(0.1, began + DEADLINE - time.monotonic()))
        assert not worker.is_alive(), "a deadlock"
    seconds = time.monotonic() - began
    for worker in workers:
        assert worker.failure is None, repr(worker.failure)
    check(vm, workers)
    return seconds


def check(vm, workers):
    """What is left is what some order of the calls leaves."""
    for file, gmem in enumerate(vm.files):
        plane = {
            name: gmem.plane(name) for name in ("private", "allocated", "assigned", "accepted", "pinned")
        }
        assert not (plane["accepted"] & ~plane["assigned"]).any()
        assert not (plane["assigned"] & ~(plane["allocated"] & plane["private"])).any()
        assert (plane["accepted"] == plane["private"]).all()  # whatever is private got there by ENCRYPT
        for name, bits in plane.items():
            assert gmem._store.count(Plane[name.upper()]) == bits.sum(), name
        for page in range(PAGES):
            last = {worker.attributes[file, page] for worker in workers if (file, page) in worker.attributes}
            assert not last or PRIVATE * int(plane["private"][page]) in last, (
                f"page {page}: nobody's attribute"
            )
    assert vm.counters.pages_changed == sum(worker.changed for worker in workers)
    for file, gmem in enumerate(vm.files):
        gmem.set_memory_attributes(0, PAGES * P, 0, PRESERVE)
        expected = bytearray(PAGES * P)
        for worker in workers:
            for (where, _, at), word in worker.words.items():
                if where == file:
                    expected[at : at + 8] = word
        assert gmem.host_read(0, PAGES * P) == expected, "bytes that no order of the calls leaves"
