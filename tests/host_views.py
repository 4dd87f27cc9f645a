"""Machines whose raw host views are protected, and what the protections of their pages are."""

import zlib

import numpy as np
from kinds import PLANES, P

import gmemcore
from gmemcore.engine.backing import GuestMemfdBacking
from gmemcore.errors import GmemError

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
