"""Where memory is short or refused, calls end with an exception: no signal, nothing leaked, nothing changed.

cgroup limits are out of reach: they end in the OOM killer, which no process can turn into an exception.
"""

import gc
import mmap
import os
import sys

import numpy as np
import pytest

import gmemcore
from gmemcore.engine import backing as backings
from gmemcore.engine.backing import AnonymousBacking, MemfdBacking
from support.holds import needs_namespaces, resident, run_python, skip_unless_slow, unshare

MIB = 1 << 20

# Each scenario runs in a process of its own under its limit, after everything was compiled and tried once.
PREAMBLE = """
import gc, os, resource, sys
import numpy as np
import gmemcore
from gmemcore.engine import backing as backings
MIB = 1 << 20

def machine(size=MIB, backing="anonymous", **more):
    vm = gmemcore.create_vm("SNP", "two-caps", firmware="cipher", backing=backing, **more)
    gmem = vm.create_guest_memfd(size, 3)
    vm.launch_finish()
    return vm, gmem

def works(backing):
    vm, gmem = machine(backing=backing)
    gmem.host_write(5, b"0xbeef")
    gmem.set_memory_attributes(0, MIB, 8, 2)
    gmem.set_memory_attributes(0, MIB, 0, 2)
    assert gmem.host_read(5, 6) == b"0xbeef"
    vm.close()

def refused(call, outcome="ENOMEM"):
    try:
        call()
    except gmemcore.GmemError as error:
        assert error.outcome == outcome, error
        return str(error)
    raise AssertionError("it passed")

def descriptors():
    gc.collect()
    return sorted(os.listdir("/proc/self/fd"))

def mappings():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[0])

gmemcore.warmup()
for name in ("anonymous", "memfd"):
    works(name)
before = descriptors()
"""
POSTLUDE = """
assert descriptors() == before, (before, descriptors())
print("held")
"""


def held(scenario, **more):
    return run_python(PREAMBLE + scenario + POSTLUDE, **more)[-1] == "held"


@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_address_space_runs_out(backing):
    """RLIMIT_AS: neither creation nor state of a big file; what exists goes on."""
    assert held(f"""
vm, gmem = machine(backing={backing!r})
used = mappings()
resource.setrlimit(resource.RLIMIT_AS, (used * 4096 + 64 * MIB, -1))
for _ in range(3):
    assert "can't" in refused(lambda: vm.create_guest_memfd(4096 * MIB, 3))
    assert mappings() <= used + 256, (mappings(), used)
refused(lambda: machine(1 << 44, backing="none"))  # 1.5 GiB of page state
assert len(vm.files) == 1
gmem.host_write(0, b"x")
gmem.set_memory_attributes(0, MIB, 8, 2)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
vm.create_guest_memfd(64 * MIB, 3).host_write(0, b"x")
gmem.set_memory_attributes(0, MIB, 0, 2)
assert gmem.host_read(0, 1) == b"x"
vm.close()
del vm, gmem
""")


def test_files_may_not_grow():
    """RLIMIT_FSIZE: EFBIG and not SIGXFSZ, which Python ignores."""
    assert held("""
resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, -1))
for _ in range(3):
    assert "File too large" in refused(lambda: machine(2 * MIB, "memfd"))
    assert descriptors() == before
works("memfd")
works("anonymous")
machine(2 * MIB)
""")


def test_no_descriptor_is_left():
    """RLIMIT_NOFILE: memfd_create is refused, or the descriptor that the mapping needs."""
    assert held("""
free = max(map(int, before))  # that of the listing itself, which is closed again
for spare in (0, 1):
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + spare, free + 8))
    assert "Too many open files" in refused(lambda: machine(backing="memfd"))
    machine()[1].host_write(0, b"x")
resource.setrlimit(resource.RLIMIT_NOFILE, (free + 8, free + 8))
works("memfd")
""")


def test_huge_pages_that_are_turned_off_make_no_difference():
    """PR_SET_THP_DISABLE: advice is taken and small pages come; results are the same."""
    assert held("""
import ctypes
assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0
vm, gmem = machine(4 * MIB, huge_pages=True, prefault=True)
gmem.host_write(0, b"0xbeef")
gmem.set_memory_attributes(0, 4 * MIB, 8, 2)
gmem.set_memory_attributes(0, 4 * MIB, 0, 2)
assert gmem.host_read(0, 6) == b"0xbeef"
""")


TMPFS_FILE = """
import mmap

def open_on_tmpfs(size):
    fd = os.open({folder!r}, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC)
    os.ftruncate(fd, size)
    return fd

backings.open_memfd = open_on_tmpfs
vm, gmem = machine(4 * MIB, "memfd")
vm.add_memslot(0, 1 << 32, 4 * MIB, gmem)
"""
FULL = """
def state():
    return gmem.runs(), [gmem.plane(n).tobytes() for n in ("allocated", "assigned", "accepted", "pinned")]

gmem.host_write(0, bytes(range(256)) * 4096)  # 1 MiB: the file system is full
was = state()
for call in (
    lambda: gmem.host_write(MIB, bytes(range(256)) * 4096),
    lambda: gmem.host_read(2 * MIB, 1),
    lambda: gmem.fallocate(1, 0, 4 * MIB),
    lambda: gmem.pin(MIB, MIB),
    lambda: gmem.set_memory_attributes(0, 4 * MIB, 8, 2),
    lambda: vm.guest_read(1 << 32, 4 * MIB, False),
    lambda: vm.guest_write((1 << 32) + 2 * MIB, b"x", False),
):
    assert any(words in refused(call) for words in ("can't provide", "an allocation failed"))
    assert state() == was
assert gmem.host_read(0, MIB) == bytes(range(256)) * 4096
gmem.set_memory_attributes(0, MIB, 8, 2)
gmem.fallocate(3, 0, 4096 * 8)  # some of it is given back
gmem.host_write(3 * MIB, b"x" * 4096)
gmem.close()
vm.close()
del vm, gmem
"""
FULL_TMPFS = 'mount -t tmpfs -o size={size} none "$1"'


@needs_namespaces
def test_a_full_file_system_is_no_signal(tmp_path):
    """A hole that can't be filled is SIGBUS when it is touched; it is filled before."""
    scenario = TMPFS_FILE.format(folder=str(tmp_path)) + FULL
    assert held(scenario, prefix=unshare(FULL_TMPFS.format(size="1m"), str(tmp_path)))


@needs_namespaces
def test_only_a_conversion_that_allocates_asks_for_memory(tmp_path):
    """And one that can't have it says where, after the checks that come first, and doesn't stop a batch."""
    scenario = (
        TMPFS_FILE.format(folder=str(tmp_path))
        + """
gmem.host_write(0, bytes(range(256)) * 4096)
gmem.set_memory_attributes(0, 4 * MIB, 0)
gmem.set_memory_attributes(0, 4 * MIB, 8)
gmem.set_memory_attributes(0, 4 * MIB, 0, 2)
try:
    gmem.set_memory_attributes(MIB, MIB, 8, 2)
    raise AssertionError("it passed")
except gmemcore.GmemError as error:
    assert (error.outcome, error.error_offset) == ("ENOMEM", MIB), error
batch = gmem.set_memory_attributes_many([0, MIB, 0, MIB], [MIB] * 4, [8] * 4, [2, 2, 1, 1])
assert batch.errno.tolist() == [0, 12, 95, 95], batch.errno
assert batch.error_offset.tolist() == [0, MIB, 0, MIB], batch.error_offset
vm.close()
del vm, gmem
"""
    )
    assert held(scenario, prefix=unshare(FULL_TMPFS.format(size="1m"), str(tmp_path)))


@needs_namespaces
def test_a_file_system_with_room_refuses_nothing(tmp_path):
    """The same on 8 MiB: what was refused above was for want of memory."""
    scenario = TMPFS_FILE.format(folder=str(tmp_path)) + FULL
    with pytest.raises(AssertionError, match="it passed"):
        held(scenario, prefix=unshare(FULL_TMPFS.format(size="8m"), str(tmp_path)))


@needs_namespaces
def test_without_the_promise_it_is_a_signal(tmp_path):
    """Shows that the file system above kills who doesn't ask first."""
    scenario = TMPFS_FILE.format(folder=str(tmp_path))
    scenario += "from gmemcore.engine import kernels\ngmem.sides.private.header[kernels.COMMIT] = 0\n"
    scenario += "gmem.host_write(0, b'x' * 4 * MIB)\n"
    with pytest.raises(AssertionError, match="ended with -7"):
        held(scenario, prefix=unshare(FULL_TMPFS.format(size="1m"), str(tmp_path)))


@needs_namespaces
def test_prefaulting_a_full_file_system_leaks_nothing(tmp_path):
    assert held(
        f"""
def open_on_tmpfs(size):
    fd = os.open({str(tmp_path)!r}, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC)
    os.ftruncate(fd, size)
    return fd

backings.open_memfd = open_on_tmpfs
for _ in range(20):
    refused(lambda: machine(2 * MIB, "memfd", prefault=True))
    assert descriptors() == before
""",
        prefix=unshare(FULL_TMPFS.format(size="1m"), str(tmp_path)),
    )


def test_huge_pages_that_the_kernel_does_not_have_are_a_clear_error(monkeypatch):
    """An advice that the kernel doesn't know stands for a kernel without transparent huge pages."""
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9999)
    vm = gmemcore.create_vm("SNP", huge_pages=True)
    with pytest.raises(gmemcore.GmemError, match="no transparent huge pages") as refused:
        vm.create_guest_memfd(MIB, 3)
    assert refused.value.outcome == "EOPNOTSUPP"
    assert vm.files == []


@pytest.mark.parametrize("step", ["memfd_create", "ftruncate"])
def test_a_memfd_that_is_refused_closes_nobody_elses_descriptor(step, monkeypatch):
    """The number of a descriptor that was closed may be somebody else's a moment later."""

    def refuse(*_):
        raise OSError(38, "not implemented")

    monkeypatch.setattr(os, step, refuse)
    with pytest.raises(gmemcore.GmemError, match="can't hold a memfd") as refused:
        MemfdBacking(MIB)
    mine = os.open(os.devnull, os.O_RDONLY)  # takes the number that was just given back
    del refused
    gc.collect()
    os.close(mine)


# ---- leaks ---------------------------------------------------------------------------------------


def cycle(backing):
    with gmemcore.create_vm("SNP", "two-caps", firmware="cipher", backing=backing) as vm:
        gmem = vm.create_guest_memfd(MIB, 3)
        vm.add_memslot(0, 1 << 32, MIB, gmem)
        gmem.host_write(0, bytes(range(256)) * (MIB // 256))
        gmem.set_memory_attributes(0, MIB, 8)
        gmem.page_states()
        assert len(gmem.memory) == MIB


def cycles(backing, count):
    for _ in range(50):
        cycle(backing)
    gc.collect()
    descriptors, memory = len(os.listdir("/proc/self/fd")), resident()
    for _ in range(count):
        cycle(backing)
    gc.collect()
    grown = resident() - memory
    print(f"{count} create/close cycles, {backing}: {grown / 1024:.0f} KiB grown")
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert grown < 2 * MIB


@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_nothing_is_left_of_closed_guests(backing):
    cycles(backing, 300)


@pytest.mark.slow
@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_nothing_is_left_of_ten_thousand_closed_guests(backing, request):
    skip_unless_slow(request)
    cycles(backing, 10_000)


def test_a_leak_would_be_seen(monkeypatch):
    """Closed guests that somebody keeps, and whose backing keeps its memory."""
    kept = []
    monkeypatch.setattr(MemfdBacking, "close", lambda backing: kept.append(backing))
    with pytest.raises(AssertionError):
        cycles("memfd", 20)


@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_a_closed_guest_that_is_still_held_holds_no_memory(backing):
    """Closing gives memory and descriptors back, whoever still has the objects."""
    gc.collect()
    descriptors, memory = len(os.listdir("/proc/self/fd")), resident()
    guests = []
    for _ in range(32):
        vm = gmemcore.create_vm("SNP", backing=backing)
        vm.create_guest_memfd(4 * MIB, 3).host_write(0, bytes([1]) * 4 * MIB)
        vm.close()
        guests.append(vm)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert resident() - memory < 32 * MIB
    assert len(guests) == 32


@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_views_keep_their_memory_and_nothing_else_does(backing):
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    vm = gmemcore.create_vm("SNP", backing=backing)
    gmem = vm.create_guest_memfd(MIB, 3)
    gmem.host_write(0, b"0xbeef")
    view, states = gmem.memory, gmem.page_states()
    vm.close()
    del vm, gmem
    gc.collect()
    assert view[:6].tobytes() == b"0xbeef"
    assert int(states["allocated"][0, 0]) == 1
    del view, states
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_anonymous_memory_is_given_back_at_once():
    gc.collect()
    backing = AnonymousBacking(64 * MIB)
    backing.words[:] = np.uint64(1)
    memory = resident()
    backing.close()
    assert memory - resident() > 60 * MIB
    assert sys.getrefcount(backing) > 0
    assert len(backings.lazy_words(0)) == 0
