"""All or nothing: whichever step of a conversion fails, nothing has changed, and the next call succeeds.

The steps are allocations and the check of each page for pins; of an access, the host's promise of memory.
(The steps of userspace, listeners and sections, are failed in test_vmm.py.)
"""

import os
from itertools import count

import numpy as np
import pytest

import gmemcore
from gmemcore.engine import kernels as layout
from gmemcore.engine.backing import MADV_DONTNEED, MADV_POPULATE_WRITE, AnonymousBacking, Memory
from gmemcore.engine.state import Plane
from gmemcore.engine.steps import Step
from support import policy_by_hand as hand
from support.guests import digest, outcome
from support.kinds import P

PAGES = 64
GPA = 1 << 32
PRIVATE = 8
INTERPRETED = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
ABIS = [abi for abi in hand.ABIS if abi != "legacy"]


class LateAnonymous(AnonymousBacking):
    """Memory that is committed when pages are allocated, as a file's is."""

    memory = Memory(commit=MADV_POPULATE_WRITE, release=MADV_DONTNEED)


def mixed(abi, vm_type, firmware, phase, backing="anonymous"):
    """64 pages and a few around them: private and shared, untouched, allocated, populated or accepted."""
    vm = gmemcore.create_vm(vm_type, abi, firmware, seed=9, backing=backing)
    gmem = vm.create_guest_memfd((PAGES + 8) * P, 3)
    vm.add_memslot(0, GPA, gmem.size, gmem)
    rng = np.random.default_rng(64)
    for page in range(0, PAGES + 8, 3):
        gmem.host_write(page * P, rng.bytes(P))
    if vm_type == "DEFAULT":
        return vm, gmem
    gmem.set_memory_attributes(8 * P, 24 * P, PRIVATE)
    vm.launch_update(GPA + 12 * P, 8 * P, rng.bytes(8 * P))
    if phase == "running":
        vm.launch_finish()
        vm.accept(GPA + 22 * P, 4 * P)
        vm.guest_write(GPA + 23 * P, rng.bytes(2 * P))
    return vm, gmem


def fail_each_step(abi, cell, pins):
    """One request: n = 0, 1, 2 … allocations succeed; then each page is pinned. Returns the failures met."""
    vm_type, firmware, phase, attributes, flag = cell
    vm, gmem = mixed(abi, vm_type, firmware, phase)
    request = (4 * P, PAGES * P, attributes, flag)
    met = 0
    before = digest(vm)
    if attributes:
        for page in pins:
            if outcome(gmem.pin, page * P, P)[0] != "OK":
                continue  # private: there is nothing to check
            before_pinned = digest(vm)
            found = outcome(gmem.set_memory_attributes, *request)
            if found[0] in ("EOPNOTSUPP", "EINVAL"):
                return 0
            assert found == ("EAGAIN", page * P)
            assert digest(vm) == before_pinned, f"{abi} {cell}: pinned page {page}"
            gmem.unpin(page * P, P)
            met += 1
        before = digest(vm)
    for n in count():
        gmem.fail_allocations_after(n)
        found = outcome(gmem.set_memory_attributes, *request)
        if found[0] == "OK":
            break
        assert digest(vm) == before, f"{abi} {cell}: allocation {n}"
        if found[0] != "ENOMEM":
            assert found[0] in ("EOPNOTSUPP", "EINVAL")
            return met
        assert found[1] == 4 * P
        met += 1
    gmem.fail_allocations_after(None)
    assert outcome(gmem.set_memory_attributes, *request)[0] == "OK"
    assert gmem.plane("private")[4 : 4 + PAGES].all() == bool(attributes)
    vm.close()
    return met


def fail_everything(abi, pins):
    met = sum(fail_each_step(abi, cell, pins) for cell in hand.requests(abi))
    print(f"{abi}: {met} failures injected, nothing changed")
    return met


@pytest.mark.parametrize("abi", ABIS)
def test_whichever_step_fails_nothing_has_changed(abi):
    met = fail_everything(abi, (4, 39) if INTERPRETED else range(4, 4 + PAGES))
    assert met > (30 if INTERPRETED else 300)
    if abi in ("cipher", "after-launch", "two-caps", "pre-cap"):
        assert met > 150  # ENCRYPT's pages, one by one


def test_an_engine_that_acts_before_it_looks_is_noticed(monkeypatch):
    from gmemcore.engine.store import Store

    convert = Store.convert

    def hasty(store, *request):
        store.take(Step.ALLOCATE, 4 * P, (1 + store.count(Plane.PRIVATE)) * P)
        return convert(store, *request)

    monkeypatch.setattr(Store, "convert", hasty)
    with pytest.raises(AssertionError, match=r"allocation 0|pinned page"):
        fail_everything("two-caps", (39,))


# ---- accesses, over two files --------------------------------------------------------------------


def two_files(backing):
    """Slots of two files, the second one's pages untouched; a private page at the end of each."""
    vm = gmemcore.create_vm("TDX", "two-caps", "cipher", backing=backing)
    for slot in range(2):
        gmem = vm.create_guest_memfd(8 * P, 3)
        vm.add_memslot(slot, GPA + slot * 8 * P, 8 * P, gmem)
    return vm, *vm.files


ACCESSES = {
    "host_write": lambda vm, gmem: gmem.host_write(P, b"x" * 3 * P),
    "host_read": lambda vm, gmem: gmem.host_read(P, 3 * P),
    "fallocate": lambda vm, gmem: gmem.fallocate(1, P, 3 * P),
    "pin": lambda vm, gmem: gmem.pin(P, 3 * P),
    "guest_write": lambda vm, gmem: vm.guest_write(GPA + P, b"x" * P),
    "guest_read": lambda vm, gmem: vm.guest_read(GPA + P, P),
    "guest_read, two files": lambda vm, gmem: vm.guest_read(GPA, 16 * P),
    "guest_write, two files": lambda vm, gmem: vm.guest_write(GPA, b"x" * 16 * P),
}


def private_accept(vm, gmem):
    for each in vm.files:
        each.set_memory_attributes(0, 8 * P, 8)
    return lambda: vm.accept(GPA, 16 * P)


@pytest.mark.parametrize("name", [*ACCESSES, "accept, two files"])
def test_an_access_without_memory_moves_nothing(name):
    """Whichever file's memory the host can't commit."""
    refused = 0
    for which in range(2):
        for n in count():
            vm, *files = two_files(LateAnonymous)
            call = (
                private_accept(vm, files[0])
                if name.startswith("accept")
                else lambda vm=vm, gmem=files[0]: ACCESSES[name](vm, gmem)
            )
            before = digest(vm)
            files[which]._store.header[layout.HOST_STEPS_LEFT] = n
            found = outcome(call)[0]
            if found == "OK":
                break
            assert found == "ENOMEM"
            assert digest(vm) == before, f"{name}: commit {n} of file {which}"
            files[which]._store.header[layout.HOST_STEPS_LEFT] = int(layout.NEVER)
            assert outcome(call)[0] == "OK"
            refused += 1
    assert refused
