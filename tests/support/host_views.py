"""Machines whose raw host views are protected, and what the protections of their pages are."""

import zlib

import numpy as np

import gmemcore
from gmemcore.engine.backing import GuestMemfdBacking
from gmemcore.errors import GmemError
from gmemcore.uapi import KVM_SET_MEMORY_ATTRIBUTES2, MEMORY_ATTRIBUTES2_STRUCT
from support.guests import outcome
from support.kinds import PLANES, P

GPA = 1 << 32


def host_has_guest_memfd():
    try:
        GuestMemfdBacking(P).close()
    except GmemError:
        return False
    return True


MAPPED_TWICE = ["memfd"] + ["guest_memfd"] * host_has_guest_memfd()


def machine(pages=64, flags=3, vm_type="SNP", abi="two-caps", firmware="cipher", backing="memfd", **more):
    vm = gmemcore.create_vm(vm_type, abi, firmware, backing=backing, enforce="mprotect", **more)
    gmem = vm.create_guest_memfd(pages * P, flags)
    vm.add_memslot(0, GPA, pages * P, gmem)
    return vm, gmem


def raw(gmem):
    return gmem.mmap(0, gmem.size).array


def inaccessible(array):
    """Which pages of an array can't be touched, by the process's own list of mappings."""
    first = array.ctypes.data
    found = np.zeros(array.nbytes // P, bool)
    covered = 0
    with open("/proc/self/maps") as maps:
        for line in maps:
            where, permissions = line.split()[:2]
            low, high = (int(text, 16) - first for text in where.split("-"))
            low, high = max(low, 0), min(high, array.nbytes)
            if low < high:
                assert permissions in ("rw-s", "---s")
                found[low // P : high // P] = permissions == "---s"
                covered += high - low
    assert covered == array.nbytes
    return found


def state(vm, gmem):
    return vm.counters, zlib.crc32(gmem.memory), *(gmem.plane(name).tobytes() for name in PLANES)


def mappings_of(array):
    """How many mappings of the process an array spans."""
    first, end = array.ctypes.data, array.ctypes.data + array.nbytes
    with open("/proc/self/maps") as maps:
        ranges = [[int(text, 16) for text in line.split()[0].split("-")] for line in maps]
    return sum(low < end and high > first for low, high in ranges)


def protections_are_attributes(gmem, array):
    assert (inaccessible(array) == gmem.plane("private")).all()


def call(gmem, array, name, *arguments):
    """Do one call; touches through the raw view if there is one, else checked as the host does."""
    if name == "fail":
        return gmem.fail_allocations_after(*arguments)
    if name == "many":
        ranges, attributes = arguments
        offsets, sizes = ([part * P for part in column] for column in zip(*ranges, strict=True))
        return gmem.set_memory_attributes_many(offsets, sizes, attributes).errno.tolist()
    if name == "steps":
        steps, attributes = arguments
        offsets, sizes = (
            [part * P for part in column] for column in zip(*(r for _, r in steps), strict=True)
        )
        return gmem.apply_many([int(step) for step, _ in steps], offsets, sizes, attributes).errno.tolist()
    (start, n), *rest = arguments
    offset, size = start * P, n * P
    if name == "convert":
        return outcome(gmem.set_memory_attributes, offset, size, *rest)
    if name == "ioctl":
        words = len(MEMORY_ATTRIBUTES2_STRUCT.unpack(bytes(MEMORY_ATTRIBUTES2_STRUCT.size)))
        argument = bytearray(MEMORY_ATTRIBUTES2_STRUCT.pack(offset, size, *rest, *[0] * (words - 3)))
        return outcome(gmem.ioctl, KVM_SET_MEMORY_ATTRIBUTES2, argument), bytes(argument)
    if name == "touch":
        return touch(gmem, array, start, n, *rest)
    if name == "punch":
        return gmem.fallocate(3, offset, size)
    return outcome(getattr(gmem, name), offset, size)


def touch(gmem, array, start, n, write):
    """Touch the shared pages of a range."""
    for page in start + np.flatnonzero(~gmem.plane("private")[start : start + n]):
        at = int(page) * P
        if array is None and write:
            gmem.host_write(at + 9, b"\x5a" * 40)
        elif array is None:
            gmem.host_read(at, P)
        elif write:
            array[at + 9 : at + 49] = 0x5A
        else:
            assert array[at : at + P].tobytes() == gmem.host_read(at, P)


def twins(calls, vm_type, abi, firmware, running):
    """The same calls with enforcement and, touches being checked, without: nothing else may differ."""
    vm, gmem = machine(64, 3, vm_type, abi, firmware)
    plain = gmemcore.create_vm(vm_type, abi, firmware)
    other = plain.create_guest_memfd(gmem.size, 3)
    if running:
        vm.launch_finish()
        plain.launch_finish()
    array = raw(gmem)
    for each in calls:
        assert call(gmem, array, *each) == call(other, None, *each), each
        protections_are_attributes(gmem, array)
        assert np.count_nonzero(np.diff(gmem.plane("private"))) + 1 == mappings_of(array)
    assert state(vm, gmem) == state(plain, other)
    vm.close()
