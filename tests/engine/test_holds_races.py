"""Races: eight threads convert and access overlapping ranges, and leave what some order of the calls leaves.

Every thread has words of its own in every page. Only it writes them, so the last one it wrote is what it must
read, through whichever side, however often the page was encrypted and decrypted in between (XOR has parity).
"""

import gc
import os
import subprocess
import sys
import threading
import time

import pytest

import gmemcore
from gmemcore.errors import GmemError
from support.holds import skip_unless_slow
from support.kinds import P
from support.paths import TESTS
from support.races import GPA, INTERPRETED, PAGES, PRESERVE, PRIVATE, SHORT, THREADS, race

UNLOCKED = """
from gmemcore.engine import instructions
from numba import njit, types

@njit(nogil=True, _nrt=False)
def nothing(address):
    return 0

instructions.lock = instructions.unlock = nothing
"""
"""What makes kernels, compiled after it, that keep nobody out."""


def test_threads_leave_what_some_order_leaves():
    print(f"{THREADS} threads x {SHORT} operations in {race(SHORT):.1f} s")


@pytest.mark.slow
def test_threads_leave_what_some_order_leaves_after_long(request):
    skip_unless_slow(request)
    print(f"{THREADS} threads x 10,000 operations in {race(10_000):.1f} s")


@pytest.mark.compiles
@pytest.mark.skipif(INTERPRETED, reason="kernels that are plain Python take turns anyway")
def test_without_the_lock_it_is_noticed(tmp_path):
    """In a process of its own, since without locks it may end in any way, with kernels of its own."""
    script = f"{UNLOCKED}\nfrom support import races\nfor _ in range(20): races.race(races.SHORT)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=TESTS,
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


def test_a_finalizer_changes_no_list_of_locks():
    """The collector can run it in the middle of a kernel that walks the list, if that is plain Python."""
    from gmemcore.engine.headers import FILES, Header

    header = Header(64, FILES)
    address = header.address
    del header
    gc.collect()
    assert address in FILES.garbage
    assert address in FILES._memory  # its neighbours in the list lead to it
    other = Header(64, FILES)
    assert address not in FILES.garbage
    assert other.address in FILES._memory
    assert address == other.address or address not in FILES._memory
