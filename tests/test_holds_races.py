"""Races: eight threads convert and access overlapping ranges, and leave what some order of the calls leaves.

Every thread has words of its own in every page. Only it writes them, so the last one it wrote is what it must
read, through whichever side, however often the page was encrypted and decrypted in between (XOR has parity).
"""

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from holds import skip_unless_slow

import gmemcore
from gmemcore.engine.state import Plane
from gmemcore.errors import GmemError, GuestExit, HostAccessError

P = 4096
PAGES = 96  # of each of two files
GPA = 1 << 32
PRIVATE, PRESERVE = 8, 2
THREADS = 8
INTERPRETED = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
SHORT = 20 if INTERPRETED else 2_000
DEADLINE = 60


UNLOCKED = """
from gmemcore.engine import instructions
from numba import njit, types

@njit(nogil=True, _nrt=False)
def nothing(address):
    return 0

instructions.lock = instructions.unlock = nothing
"""
"""What makes kernels, compiled after it, that keep nobody out."""


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


def test_threads_leave_what_some_order_leaves():
    print(f"{THREADS} threads x {SHORT} operations in {race(SHORT):.1f} s")


@pytest.mark.slow
def test_threads_leave_what_some_order_leaves_after_long(request):
    skip_unless_slow(request)
    print(f"{THREADS} threads x 10,000 operations in {race(10_000):.1f} s")


@pytest.mark.skipif(INTERPRETED, reason="kernels that are plain Python take turns anyway")
def test_without_the_lock_it_is_noticed(tmp_path):
    """In a process of its own, since without locks it may end in any way, with kernels of its own."""
    script = f"{UNLOCKED}\nimport test_holds_races as t\nfor _ in range(20): t.race(t.SHORT)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode != 0
    assert done.returncode < 0 or "AssertionError" in done.stderr, done.stderr[-2000:]


CLOSED_MEANWHILE = {
    "host_read": lambda vm, gmem: gmem.host_read(0, 8),
    "host_write": lambda vm, gmem: gmem.host_write(0, b"8 bytes."),
    "guest_read": lambda vm, gmem: vm.guest_read(GPA, 8),
    "guest_write": lambda vm, gmem: vm.guest_write(GPA, b"8 bytes."),
    "convert": lambda vm, gmem: gmem.set_memory_attributes(0, P, PRIVATE, PRESERVE),
    "pin": lambda vm, gmem: gmem.pin(0, P),
    "plane": lambda vm, gmem: gmem.plane("private"),
    "packed_state": lambda vm, gmem: gmem.packed_state(),
}


@pytest.mark.parametrize("name", CLOSED_MEANWHILE)
def test_a_file_closed_while_a_call_is_on_its_way_is_a_typed_error(name):
    """One thread calls in a loop while the file is closed."""
    answers = []

    def loop(vm, gmem):
        try:
            while True:
                CLOSED_MEANWHILE[name](vm, gmem)
                answers.append("OK")
        except GmemError as error:
            answers.append(error.outcome)
        except BaseException as failure:
            answers.append(repr(failure))

    for _ in range(3 if INTERPRETED else 20):
        answers.clear()
        vm = gmemcore.create_vm("SW_PROTECTED")
        gmem = vm.create_guest_memfd(PAGES * P, 3)
        vm.add_memslot(0, GPA, PAGES * P, gmem)
        thread = threading.Thread(target=loop, args=(vm, gmem), daemon=True)
        thread.start()
        while not answers:
            time.sleep(0.0001)
        gmem.close()
        thread.join(60)
        assert answers[-1] in ("EBADF", "MEMORY_FAULT")
        assert set(answers[:-1]) == {"OK"}
