"""The client of real kernels: held to the vectors over the model's ioctls, and run on this host's kernel."""

import contextlib
import errno
import gc
import os
import random
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

import gmemcore
from gmemcore.conformance import (
    OPERATIONS,
    Case,
    ModelMachine,
    VectorError,
    VectorFile,
    perform,
    read_vectors,
    run_case,
)
from gmemcore.engine.backing import BACKINGS
from gmemcore.errors import GmemError, HostAccessError
from gmemcore.kvm import KernelTransport, KvmMachine, KvmUnavailableError, KvmVm, probe
from gmemcore.kvm import structs as kvm
from gmemcore.kvm.addresses import fit
from gmemcore.kvm.child import in_child
from gmemcore.kvm.client import _refusals
from gmemcore.kvm.differences import DIFFERENCES, known_difference, version_of
from gmemcore.kvm.own_memory import place
from gmemcore.uapi import (
    KVM_SET_MEMORY_ATTRIBUTES,
    KVM_SET_MEMORY_ATTRIBUTES2,
    MEMORY_ATTRIBUTES2_STRUCT,
    MEMORY_ATTRIBUTES_STRUCT,
    NUMBERS,
    VmType,
)
from support.kinds import P
from support.model_kernel import ModelTransport, ModelVcpu
from support.paths import VECTORS

GPA = 4 << 30
MMAP, INIT_SHARED = 1, 2
BOTH = MMAP | INIT_SHARED
PRIVATE = 8

has_kvm = pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="needs /dev/kvm, and a user who may use it"
)


def open_files():
    gc.collect()
    return sorted(os.listdir("/proc/self/fd"), key=int)


# ---- a kernel that is the model --------------------------------------------------------------------------

KERNEL_LIKE = ("legacy", "v4", "v5", "v13")
FILES = [
    path
    for path in sorted(VECTORS.glob("*.json"))
    if (vectors := read_vectors(path)).abi in KERNEL_LIKE and vectors.vm_type != VmType.PKVM
]


def run_over_model(path, abi=None, **changes):
    """Run a file over a model kernel of its own abi (or another); the results of its cases."""
    vectors = read_vectors(path)
    transport = ModelTransport(abi or vectors.abi, **changes)
    host = probe(transport)
    results = []
    for case in vectors.cases:
        machine = KvmMachine(transport, host, vectors.vm_type, vectors.abi)
        results.append(run_case(machine, case))
        machine.close()
    assert [fd for fd in transport.files if fd not in transport.beside] == []
    return vectors, results


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_client_passes_the_vectors_over_the_models_ioctls(path):
    _, results = run_over_model(path)
    assert [str(result.wrong) for result in results if result.wrong] == []
    assert sum(result.passed for result in results) > 0


@pytest.mark.parametrize("name", ["conversions-v13", "conversions-v5", "arguments-v13", "random-v13"])
def test_nothing_of_the_selftests_is_left_out(name):
    vectors, results = run_over_model(VECTORS / f"{name}.json")
    assert sum(result.passed for result in results) == sum(len(case.steps) for case in vectors.cases)


@pytest.mark.parametrize("name", ["wrong-contents", "wrong-errno"])
def test_the_client_finds_what_is_wrong_on_purpose(name):
    _, results = run_over_model(VECTORS / "self-check" / f"{name}.json")
    assert all(result.wrong for result in results)


@pytest.mark.parametrize("abi", KERNEL_LIKE)
def test_probe_tells_the_revision_by_calling(abi):
    host = probe(ModelTransport(abi))
    assert {offer.abi for offer in host.offers.values()} == {abi}
    assert all(offer.in_place == (abi != "legacy") for offer in host.offers.values())
    assert host.vm_types == tuple(NUMBERS[VmType].values())
    assert host.offers[VmType.SW_PROTECTED].guest is None
    assert host.offers[VmType.SW_PROTECTED].pins is None
    assert host.offers[VmType.SNP].guest is not None


class EmulatingVcpu(ModelVcpu):
    """A KVM that carries out every access of the guest itself, at the memslot's userspace address."""

    def _address(self, gpa, size):
        slot = next((slot for slot in self._vm.memslots if slot.gpa <= gpa < slot.gpa + slot.size), None)
        if slot is None:
            return self._vm.guest_read(gpa, size)
        return self._transport.userspace[slot.slot] + gpa - slot.gpa

    def read(self, gpa, size):
        return self._transport.load(self._address(gpa, size), size)

    def write(self, gpa, data):
        self._transport.store(self._address(gpa, len(data)), data)


class EmulatingTransport(ModelTransport):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.userspace = {}

    def _set_region(self, vm, slot, flags, gpa, size, address, *rest):
        self.userspace[slot] = address
        return super()._set_region(vm, slot, flags, gpa, size, address, *rest)

    def vcpu(self, vm):
        self.vcpus[vm] = EmulatingVcpu(self, self.files[vm])
        return self.vcpus[vm]


@pytest.mark.parametrize("abi", KERNEL_LIKE)
@pytest.mark.parametrize("vm_type", ["DEFAULT", "SW_PROTECTED"])
def test_a_guest_that_never_reaches_its_file_is_none(abi, vm_type):
    """What the host sees is then its own memory, whatever the guest did."""
    transport = EmulatingTransport(abi)
    offer = probe(transport).offers[VmType(vm_type)]
    assert "reach guest_memfd" in offer.guest
    assert offer.pins is None
    machine = KvmMachine(transport, probe(transport), VmType(vm_type), abi)
    result = run_case(machine, Case("c", [{**CREATE, "flags": 0}, SLOT, guest_write(0), guest_read(0)]))
    machine.close()
    assert [note.step for note in result.skipped] == [2, 3]
    assert "reach guest_memfd" in result.skipped[0].why


def test_probe_lists_only_what_is_offered():
    host = probe(ModelTransport("v13", [VmType.DEFAULT]))
    assert list(host.offers) == [VmType.DEFAULT]
    assert host.offers[VmType.DEFAULT].creation_flags == BOTH


def test_probe_gives_reasons_by_the_errors_name():
    offer = probe(ModelTransport("linux-6.17", release="6.17.0")).offers[VmType.DEFAULT]
    assert {offer.guest, offer.pins} == {"it has no guest_memfd that the host can map: EINVAL"}


def test_an_errno_without_a_class_has_its_message_alone():
    with pytest.raises(GmemError) as refused, _refusals():
        raise OSError(errno.EDOM, "out of domain")
    assert (refused.value.errno, refused.value.strerror) == (errno.EDOM, "out of domain")


def test_error_offset_is_read_back_from_the_struct():
    with KvmVm(ModelTransport("v13"), VmType.SW_PROTECTED) as vm:
        gmem = vm.create_guest_memfd(4 * P, BOTH)
        gmem.pin(2 * P, P)
        with pytest.raises(GmemError) as refused:
            gmem.set_memory_attributes(0, 4 * P, PRIVATE, error_offset=7)
        assert (refused.value.outcome, refused.value.error_offset) == ("EAGAIN", 2 * P)
        with pytest.raises(GmemError) as refused:
            gmem.set_memory_attributes(1, P, PRIVATE, error_offset=7)
        assert (refused.value.outcome, refused.value.error_offset) == ("EINVAL", None)
        with pytest.raises(GmemError) as refused:
            gmem.set_memory_attributes(0, P, PRIVATE, reserved=1)
        assert refused.value.outcome == "EINVAL"


# ---- what is skipped -------------------------------------------------------------------------------------


def steps_over_model(
    steps, *, vm_type=VmType.SW_PROTECTED, abi="v13", kernel="v13", change=lambda host: host
):
    """Which steps pass, and why the others were skipped, as {number: reason}."""
    transport = ModelTransport(kernel)
    machine = KvmMachine(transport, change(probe(transport)), vm_type, abi)
    result = run_case(machine, Case("c", steps))
    machine.close()
    assert result.wrong is None, result.wrong
    assert result.passed + len(result.skipped) + len(result.known) == len(steps)
    return {note.step: note.why for note in result.skipped}


CREATE = {"op": "create", "size": 4 * P, "flags": BOTH}
SLOT = {"op": "slot_add", "slot": 1, "gpa": GPA, "size": 4 * P}


def to_private(page, **more):
    return {"op": "set", "offset": page * P, "size": P, "attributes": PRIVATE, **more}


def read(page, **more):
    return {"op": "host_read", "offset": page * P, "size": 1, **more}


def guest_write(page, **more):
    return {"op": "guest_write", "gpa": GPA + page * P, "data": "01", **more}


def guest_read(page, **more):
    return {"op": "guest_read", "gpa": GPA + page * P, **more}


def test_a_skipped_conversion_skips_what_meets_its_pages_and_nothing_else():
    steps = [CREATE, SLOT, to_private(1), read(0), read(1, expect="SIGBUS"), guest_write(1), guest_write(2)]
    skipped = steps_over_model(steps, abi="v5")
    assert set(skipped) == {2, 4, 5}
    assert "v5" in skipped[2]
    assert "v13" in skipped[2]
    assert "step 2 (set)" in skipped[4]


def test_a_skipped_refusal_changes_nothing():
    steps = [CREATE, to_private(1, flags=64, expect="EINVAL"), read(1)]
    assert set(steps_over_model(steps, abi="v5")) == {1}


def test_what_is_set_anew_is_known_again():
    """A hole makes bytes known, not an attribute; a file that is created again has nothing unknown."""
    hole = {"op": "fallocate", "mode": 3, "offset": P, "size": 2 * P}
    steps = [CREATE, to_private(1), hole, read(2), read(1), CREATE, read(1)]
    assert set(steps_over_model(steps, abi="v5")) == {1, 4}


def test_a_file_is_closed_whatever_is_unknown_of_it():
    closed = [{"op": "close"}, {"op": "mmap", "size": P, "expect": "EBADF"}, read(1, expect="EBADF")]
    assert set(steps_over_model([CREATE, to_private(1), *closed], abi="v5")) == {1, 4}


def test_bytes_that_are_written_again_are_known_again():
    two = guest_write(1, data="0101")
    steps = [CREATE, SLOT, two, read(1), host_write(1), read(1, data="77"), read(1, size=2)]
    assert set(steps_over_model(steps, change=without_a_guest)) == {2, 3, 6}


def test_a_skipped_memslot_skips_what_meets_it_and_nothing_else():
    """Its id, its guest memory, its range of the file; nothing once it is deleted."""
    lost = {**SLOT, "slot": 2, "gpa": 2 * GPA, "gmem": "h"}
    steps = [
        CREATE,
        {**CREATE, "as": "h", "flags": 0},
        {"op": "host_write", "gmem": "g", "offset": 0, "data": "01"},
        SLOT,
        lost,
        {**lost, "slot": 3, "gpa": 3 * GPA, "expect": "EEXIST"},
        {**SLOT, "slot": 2, "gpa": 3 * GPA, "expect": "EINVAL"},
        {**SLOT, "slot": 4, "gpa": 2 * GPA, "expect": "EEXIST"},
        {**SLOT, "gmem": "none", "slot": 5, "gpa": 5 * GPA, "expect": "EBADF"},
        {"op": "slot_delete", "slot": 2},
        {"op": "slot_delete", "slot": 2, "expect": "EINVAL"},
        {**SLOT, "slot": 2, "gpa": 2 * GPA, "expect": "EEXIST"},
    ]
    steps[1]["flags"] = INIT_SHARED

    def flags_without_init_shared(host):
        offers = {kind: replace(offer, creation_flags=MMAP) for kind, offer in host.offers.items()}
        return replace(host, offers=offers)

    steps[0] = {**CREATE, "flags": MMAP}
    steps[2] = {**steps[2], "expect": "SIGBUS"}
    skipped = steps_over_model(steps, abi="v5", change=flags_without_init_shared)
    assert set(skipped) == {1, 4, 5, 6, 7, 9}


NOT_ASKED = ("runs", "folios", "fail_allocations", "poison")
"""What no kernel is asked."""
USES_A_FILE = [
    {"op": "set", "offset": 0, "size": P, "attributes": 8},
    {"op": "host_read", "offset": 0},
    {"op": "host_write", "offset": 0, "data": "01"},
    {"op": "fallocate", "mode": 1, "offset": 0, "size": P},
    {"op": "mmap", "size": P},
    {"op": "file_call", "call": "read", "expect": "EINVAL"},
    {"op": "pin", "offset": 0, "size": P},
    {"op": "unpin", "offset": 0, "size": P},
    {"op": "poison", "offset": 0},
    {"op": "slot_add", "slot": 1, "gpa": GPA, "size": P},
    {"op": "runs", "runs": []},
    {"op": "folios", "folios": []},
    {"op": "fail_allocations", "after": 0},
    {"op": "discard_shared", "offset": 0, "size": P},
    {"op": "ioctl", "fd": "g", "request": 1, "argument": None, "expect": "ENOTTY"},
    {"op": "close"},
]


def test_a_memslot_that_was_not_added_is_missed_where_it_would_be():
    """One of ordinary memory depends on no file, and its range of a file means nothing."""
    lost = {**CREATE, "flags": BOTH}
    plain = {"op": "slot_add", "slot": 3, "gpa": 3 * GPA, "size": P, "flags": 0}
    steps = [lost, plain, {**SLOT, "gmem": "g"}, {**plain, "slot": 4, "gpa": SLOT["gpa"], "expect": "EEXIST"}]
    assert set(steps_over_model(steps, kernel="legacy")) == {0, 2, 3}


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (
            {"op": "fallocate", "mode": 1, "offset": 0, "size": P, "interrupted": True, "expect": "EINTR"},
            "signal",
        ),
        ({"op": "file_call", "call": "write", "size": 1 << 40, "expect": "EINVAL"}, "memory"),
        ({"op": "mmap", "size": P, "prot": 1 << 31}, "prot"),
        ({"op": "slot_add", "slot": 1, "gpa": GPA, "size": P, "flags": 1 << 32, "expect": "EINVAL"}, "flags"),
        ({"op": "guest_read", "gpa": 5 * GPA, "data": "00", "expect": "EFAULT"}, "userspace_addr"),
    ],
)
def test_what_a_kernel_is_not_asked_of_files_and_memslots(step, why):
    chosen = {"op": "slot_add", "slot": 5, "gpa": 5 * GPA, "size": P, "flags": 0, "userspace_addr": 1 << 32}
    skipped = steps_over_model([CREATE, chosen, step])
    assert set(skipped) == {2}
    assert why in skipped[2]


def test_a_memslot_that_no_memory_is_mapped_for_is_not_read():
    slot = {"op": "slot_add", "slot": 5, "gpa": 8 << 30, "flags": 0}
    read = {"op": "guest_read", "gpa": 8 << 30, "data": "00"}
    assert steps_over_model([{**slot, "size": P}, read]) == {}
    skipped = steps_over_model([{**slot, "size": 2 << 30}, read])
    assert set(skipped) == {1}
    assert "no more than 1 GiB" in skipped[1]


def test_every_operation_on_a_file_is_tried():
    with_a_file = {op for op, row in OPERATIONS.items() if {"gmem", "fd"} & (row.needs | row.may)}
    assert with_a_file == {step["op"] for step in USES_A_FILE}


@pytest.mark.parametrize("abi", ["v13", "linux-7.3"])
@pytest.mark.parametrize(
    "step",
    [step for step in USES_A_FILE if step["op"] not in NOT_ASKED],
    ids=lambda step: step["op"],
)
def test_a_closed_file_takes_nothing(step, abi):
    """No call reaches another file, or new memory: its number is free again."""
    vectors = VectorFile(1, "closed", "", abi, VmType.SW_PROTECTED, [])
    transport = ModelTransport(abi)
    kernel = KvmMachine(transport, probe(transport), VmType.SW_PROTECTED, abi)
    with closing(ModelMachine(vectors, 0)) as model, closing(kernel):
        steps = [{**CREATE, "flags": 0 if abi == "linux-7.3" else 3}, {"op": "close"}, step]
        answers = [[perform(machine, each) for each in steps] for machine in (model, kernel)]
    assert answers[0] == answers[1]
    assert answers[0][2].outcome == ("OK" if step["op"] == "close" else "EBADF")


@pytest.mark.parametrize("abi", ["v13", "linux-7.3"])
def test_the_addresses_of_a_memslot_are_nobody_elses(abi):
    """A guest must not reach what is mapped after a file was closed."""
    transport = ModelTransport(abi)
    with KvmVm(transport, VmType.SW_PROTECTED, two_backings=abi != "v13") as vm:
        files = [vm.create_guest_memfd(4 * P, 0 if abi != "v13" else BOTH) for _ in range(2)]
        vm.add_memslot(0, GPA, 4 * P, files[0])
        vm.add_memslot(1, 2 * GPA, P, None, flags=0)
        files[1].host_write(0, b"1")
        addresses = [vm.memslots[slot].userspace_address for slot in (0, 1)]
        before = len(transport.mappings)
        for file in files:
            file.close()
        assert len(transport.mappings) == before - 1  # of the file that no memslot has
        assert transport.mappings[addresses[0]][0] is None
        with pytest.raises(GmemError):
            files[0].host_read(0, 1)
        vm.delete_memslot(1)
        assert addresses[1] not in transport.mappings
    assert not transport.mappings


@pytest.mark.parametrize("step", USES_A_FILE, ids=lambda step: step["op"])
def test_a_file_that_could_not_be_created_skips_whatever_uses_it(step):
    """The vectors are readable all the same, and a file of the same name that was created is used."""
    lost = {**CREATE, "flags": BOTH}
    skipped = steps_over_model([lost, step, {**CREATE, "flags": 0}, read(0)], kernel="legacy")
    assert {0, 1} <= set(skipped)
    assert "step 0" not in skipped.get(3, "")
    with pytest.raises(VectorError, match="not created"):
        steps_over_model([{**CREATE, "as": "other"}, {"op": "host_read", "offset": 0}])


@pytest.mark.parametrize(
    ("step", "field"),
    [
        ({"op": "host_read", "offset": -P, "size": 1, "expect": "EINVAL"}, "offset -0x1000"),
        ({"op": "set", "offset": -P, "size": P, "attributes": 8, "expect": "EINVAL"}, "offset -0x1000"),
        ({"op": "set", "offset": 0, "size": P, "attributes": -1, "expect": "EINVAL"}, "attributes -0x1"),
        ({"op": "vm_set", "address": -P, "size": P, "attributes": 0, "expect": "EINVAL"}, "address -0x"),
        ({"op": "create", "size": P, "flags": -1, "as": "x", "expect": "EINVAL"}, "flags -0x1"),
        ({**SLOT, "slot": -1, "expect": "EINVAL"}, "slot -0x1"),
        ({**SLOT, "slot": 1 << 32, "expect": "EINVAL"}, "slot 0x100000000"),
        ({"op": "slot_delete", "slot": (1 << 32) + 1, "expect": "EINVAL"}, "slot 0x100000001"),
        ({**SLOT, "gpa": -P, "expect": "EINVAL"}, "gpa -0x1000"),
        ({"op": "guest_read", "gpa": -P, "expect": "EINVAL"}, "gpa -0x1000"),
        ({"op": "mmap", "size": -P, "expect": "EINVAL"}, "size -0x1000"),
        ({"op": "pin", "offset": -P, "size": P, "expect": "EFAULT"}, "offset -0x1000"),
        ({"op": "ioctl", "fd": "g", "request": 1 << 40, "argument": None, "expect": "ENOTTY"}, "request 0x"),
        ({"op": "fallocate", "mode": 1 << 31, "offset": 0, "size": P, "expect": "EOPNOTSUPP"}, "mode 0x"),
    ],
    ids=lambda value: value["op"] if isinstance(value, dict) else None,
)
def test_a_number_that_no_system_call_takes_is_not_sent(step, field):
    skipped = steps_over_model([CREATE, SLOT, step])
    assert set(skipped) == {2}
    assert skipped[2] == f"{skipped[2].split(' doesn')[0]} doesn't fit into the field of the system call"
    assert skipped[2].startswith(field)


@pytest.mark.parametrize(
    "step",
    [
        {"op": "vm_set", "address": 0, "size": 1 << 40, "attributes": PRIVATE},
        {
            "op": "ioctl",
            "fd": "vm",
            "request": KVM_SET_MEMORY_ATTRIBUTES,
            "argument": MEMORY_ATTRIBUTES_STRUCT.pack(0, 1 << 52, 0, 0).hex(),
        },
        {"op": "fallocate", "gmem": "huge", "mode": 1, "offset": 0, "size": 1 << 31},
    ],
    ids=["vm_set", "ioctl", "fallocate"],
)
def test_a_kernel_is_spared_what_would_take_it_down(step):
    huge = {"op": "create", "size": 1 << 31, "flags": 0, "as": "huge"}
    skipped = steps_over_model([{**CREATE, "flags": 0}, huge, step], abi="legacy", kernel="legacy")
    assert 2 in skipped
    assert "kernel busy" in skipped[2] or "host's memory" in skipped[2] or "step 1" in skipped[2]


def test_signed_numbers_are_sent_in_either_form():
    steps = [
        CREATE,
        {"op": "create", "size": -P, "flags": 0, "as": "x", "expect": "EINVAL"},
        {"op": "create", "size": (1 << 64) - P, "flags": 0, "as": "x", "expect": "EINVAL"},
        {"op": "fallocate", "mode": 1, "offset": -P, "size": P, "expect": "EINVAL"},
        {"op": "fallocate", "mode": 1, "offset": 0, "size": -P, "expect": "EINVAL"},
    ]
    assert not steps_over_model(steps)


# ---- the vCPU's own memory -------------------------------------------------------------------------------

LOW = 23 * P


def test_own_memory_keeps_out_of_the_way():
    """Whatever the vectors take: its slot id, its guest memory, every attribute around it."""
    own = 999  # the highest that ModelTransport has
    steps = [
        {"op": "create", "size": 64 * P, "flags": 0},
        {**SLOT, "gpa": GPA, "size": P},
        {"op": "guest_read", "gpa": GPA},
        {"op": "vm_set", "address": 0, "size": 1 << 20, "attributes": 8},
        {"op": "guest_read", "gpa": GPA},
        {**SLOT, "slot": own, "gpa": 2 * GPA, "size": P, "gmem_offset": P},
        {"op": "guest_read", "gpa": 2 * GPA},
        {**SLOT, "slot": 2, "gpa": LOW, "size": P, "gmem_offset": 2 * P},
        {"op": "guest_write", "gpa": LOW, "data": "05"},
        {"op": "slot_delete", "slot": own - 1, "expect": "EINVAL"},
        {"op": "guest_read", "gpa": GPA + P, "expect": "MMIO"},
        {"op": "vm_set", "address": 0, "size": 1 << 30, "attributes": 8},
        {"op": "vm_set", "address": GPA, "size": 1 << 30, "attributes": 8},
        {"op": "guest_write", "gpa": GPA, "data": "06"},
        {"op": "vm_set", "address": GPA, "size": P, "attributes": 0},
        {"op": "guest_read", "gpa": LOW, "data": "05"},
        {**SLOT, "slot": 3, "gpa": 3 * GPA, "size": 32 * P, "gmem_offset": 32 * P},
        {"op": "guest_read", "gpa": 3 * GPA + 31 * P, "data": "00"},
    ]
    assert not steps_over_model(steps, abi="legacy", kernel="legacy")


def test_own_memory_gives_borrowed_frames_back():
    """Where every frame is private, some are shared for a while; a memslot there finds them private."""
    transport = ModelTransport("legacy")
    with KvmVm(transport, VmType.SW_PROTECTED, two_backings=True) as vm:
        gmem = vm.create_guest_memfd(64 * P, 0)
        vm.add_memslot(0, GPA, P, gmem)
        vm.set_memory_attributes(0, 1 << 52, PRIVATE)
        vm.guest_write(GPA, b"a")
        model, own = transport.files[vm.fd], vm._own
        assert own.borrowed == ((own.gpa, own.size),)
        assert len(model.private_frames()) == 2
        vm.add_memslot(1, own.gpa, P, gmem, P)
        assert model.private_frames() == [(0, 1 << 40)]
        vm.guest_write(own.gpa, b"b")
        vm.ioctl(KVM_SET_MEMORY_ATTRIBUTES, bytearray(MEMORY_ATTRIBUTES_STRUCT.pack(0, 1 << 52, 0, 0)))
        assert model.private_frames() == []
        assert vm.guest_read(GPA, 1) == bytes(1)


def test_places_for_own_memory():
    def placed(**changes):
        given = {"slots": (), "occupied": (), "private": (), "address_bits": 40, "slot_limit": 8}
        return place(LOW, **{**given, **changes})

    assert placed().slot == 7
    assert placed(slots=[7, 5]).slot == 6
    assert placed(occupied=[(0, GPA)]).gpa == GPA
    assert placed(occupied=[(0, GPA + 1)]).gpa == GPA + P
    assert placed(private=[(0, GPA)]) == (7, GPA, LOW, ())
    assert placed(private=[(0, 1 << 40)]).borrowed == ((LOW, LOW),)
    assert placed(occupied=[(0, 0xFEE00000 - P)]).gpa == 0xFEE00000 + P
    with pytest.raises(GmemError, match="8 memslots"):
        placed(slots=range(8))
    with pytest.raises(GmemError, match="no 0x17000 bytes"):
        placed(occupied=[(0, 1 << 40)])


def without_a_guest(host):
    offers = {vm_type: replace(offer, guest="none here") for vm_type, offer in host.offers.items()}
    return replace(host, offers=offers)


def host_write(page, **more):
    return {"op": "host_write", "offset": page * P, "data": "77", **more}


def test_without_a_guest_its_writes_are_unknown_to_the_host():
    steps = [CREATE, SLOT, guest_write(1), read(1, data="01"), read(0)]
    skipped = steps_over_model(steps, change=without_a_guest)
    assert set(skipped) == {2, 3}
    assert "none here" in skipped[2]


def test_a_missing_creation_flag_skips_the_file_and_its_memslots():
    steps = [CREATE, SLOT, read(0), guest_write(0), {**CREATE, "as": "h", "flags": 0}]
    skipped = steps_over_model(steps, kernel="legacy")
    assert set(skipped) == {0, 1, 2, 3}
    assert "flag" in skipped[0]
    assert "step 0 (create)" in skipped[2]


@pytest.mark.parametrize(
    ("step", "why"),
    [
        ({"op": "runs", "runs": [[0, 4, "private"]]}, "reads attributes back"),
        ({"op": "counters", "values": {"pages_changed": 9}}, "doesn't count"),
        ({"op": "poison", "offset": 0}, "out of use"),
        ({"op": "accept", "gpa": GPA, "size": P}, "the platform's"),
        ({"op": "launch_finish"}, "the platform's"),
        ({"op": "check_cap", "cap": "GUEST_MEMFD_MEMORY_ATTRIBUTES", "value": 8}, "isn't settled"),
        (
            {"op": "ioctl", "fd": "vm", "request": kvm.KVM_CREATE_VCPU, "argument": "00"},
            "format's own",
        ),
        ({"op": "discard_shared", "offset": 0, "size": P, "expect": "EOPNOTSUPP"}, "no system call"),
        ({"op": "pin", "offset": 1, "size": P, "expect": "EINVAL"}, "no system call"),
        ({"op": "pin", "offset": 0, "size": 257 * P}, "more than 256"),
        ({"op": "create", "size": 1 << 60, "flags": 0, "expect": "ENOMEM", "as": "x"}, "limit on memory"),
        ({"op": "guest_read", "gpa": 1 << 52, "expect": "MMIO"}, "beyond the physical"),
        ({"op": "host_read", "offset": 0, "size": 0, "expect": "EINVAL"}, "touches nothing"),
        ({**SLOT, "size": 0, "expect": "EINVAL"}, "deletes"),
    ],
    ids=lambda value: value["op"] if isinstance(value, dict) else None,
)
def test_what_a_kernel_is_not_asked(step, why):
    skipped = steps_over_model([CREATE, SLOT, step])
    assert set(skipped) == {2}
    assert why in skipped[2]


def test_a_type_that_is_not_offered_skips_everything():
    skipped = steps_over_model([CREATE, read(0)], vm_type=VmType.PKVM)
    assert set(skipped) == {0, 1}
    assert "PKVM isn't offered" in skipped[0]


def test_on_coco_a_guest_step_leaves_its_page_unknown():
    steps = [CREATE, SLOT, {"op": "guest_read", "gpa": GPA}, to_private(0), to_private(1)]
    assert set(steps_over_model(steps, vm_type=VmType.SNP)) == {2, 3}


# ---- known differences -----------------------------------------------------------------------------------


def test_versions():
    assert version_of("6.18.44-fc") == (6, 18)
    assert version_of("7.3.0") == (7, 3)
    assert version_of("next-2026") == (0, 0)


def test_a_difference_is_excused_for_its_kernels_and_steps_only():
    with KvmVm(ModelTransport("v13"), VmType.SW_PROTECTED) as vm:
        gmem = vm.create_guest_memfd(4 * P, BOTH)
        vm.add_memslot(1, GPA, 4 * P, gmem)
        elsewhere = {"op": "slot_add", "slot": 2, "gpa": 2 * GPA, "size": P, "expect": "EEXIST"}
        assert known_difference("6.18.1", vm, elsewhere, "EINVAL") is not None
        assert known_difference("7.3.0", vm, elsewhere, "EINVAL") is None
        assert known_difference("6.18.1", vm, elsewhere, "OK") is None
        assert known_difference("6.18.1", vm, {**elsewhere, "gpa": GPA}, "EINVAL") is None
    assert all(row.why and row.since >= (6, 8) for row in DIFFERENCES)


def test_a_known_difference_is_neither_passed_nor_wrong():
    transport = ModelTransport("v13", release="6.18.0")
    machine = KvmMachine(transport, probe(transport), VmType.SW_PROTECTED, "v13")
    add = transport._set_region

    def as_before_7_3(*arguments):
        try:
            return add(*arguments)
        except GmemError as error:
            raise OSError(errno.EINVAL if error.errno == errno.EEXIST else error.errno, "") from None

    transport._set_region = as_before_7_3
    again = {**SLOT, "slot": 2, "gpa": 2 * GPA, "expect": "EEXIST"}
    result = run_case(machine, Case("c", [CREATE, SLOT, again, {**again, "gpa": GPA}]))
    machine.close()
    assert result.passed == 2
    assert [note.step for note in result.known] == [2]
    assert (result.wrong.step, result.wrong.found) == (3, "EINVAL")


class LaxTransport(ModelTransport):
    """A kernel that takes a range of a file which ends at 2^63, as Linux 6.18 does."""

    def _set_region(self, vm, slot, flags, gpa, size, address, offset, fd, *pad):
        if offset + size == 1 << 63:
            flags, offset = 0, 0
        return super()._set_region(vm, slot, flags, gpa, size, address, offset, fd, *pad)


def test_a_case_goes_on_after_a_known_difference():
    """No later step fails because the kernel has a memslot that the case hasn't."""
    transport = LaxTransport("linux-6.18", [VmType.SW_PROTECTED], release="6.18.0")
    taken = {**SLOT, "size": P, "gmem_offset": (1 << 63) - P, "expect": "EINVAL"}
    steps = [{**CREATE, "flags": 0}, taken, SLOT, {"op": "slot_delete", "slot": 1}]
    with closing(KvmMachine(transport, probe(transport), VmType.SW_PROTECTED, "linux-6.18")) as machine:
        result = run_case(machine, Case("c", steps))
    assert result.wrong is None, result.wrong
    assert [note.step for note in result.known] == [1]
    assert result.skipped == ()


# ---- this host's kernel ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transport():
    with KernelTransport() as kernel:
        yield kernel


@pytest.fixture(scope="module")
def offer(transport):
    """What the default VM type offers; a file that the host can map is the least."""
    found = probe(transport).offers[VmType.DEFAULT]
    if found.creation_flags is None or found.creation_flags & BOTH != BOTH:
        pytest.skip("this kernel has no guest_memfd that the host can map (Linux 6.18 has)")
    return found


@pytest.fixture
def vm(transport, offer):
    with KvmVm(transport) as made:
        yield made


@pytest.fixture
def guest_vm(vm, offer):
    if offer.guest is not None:
        pytest.skip(f"no guest runs here: {offer.guest}")
    return vm


def outcome_of(call, *arguments):
    try:
        call(*arguments)
    except GmemError as error:
        return error.outcome
    return "OK"


@has_kvm
def test_probe_of_this_host(transport):
    host = probe(transport)
    assert host.release == os.uname().release
    assert host.api_version == 12
    assert "DEFAULT" in host.vm_types
    assert host.capabilities["GUEST_MEMFD"] in (0, 1)
    offer = host.offers[VmType.DEFAULT]
    if offer.creation_flags is not None and offer.capabilities["GUEST_MEMFD_FLAGS"]:
        assert offer.creation_flags == offer.capabilities["GUEST_MEMFD_FLAGS"]


@has_kvm
def test_sigbus_is_an_answer(vm):
    gmem = vm.create_guest_memfd(2 * P, BOTH)
    with pytest.raises(HostAccessError):
        gmem.host_read(2 * P, 1)
    with pytest.raises(HostAccessError):
        gmem.host_write(2 * P - 1, b"ab")
    assert gmem.host_read(0, 2 * P) == bytes(2 * P)
    private = vm.create_guest_memfd(2 * P, MMAP)
    assert outcome_of(private.host_read, 0, 1) == "SIGBUS"
    assert outcome_of(private.host_write, P, b"a") == "SIGBUS"


@has_kvm
def test_bytes_that_the_host_wrote_are_there(vm):
    gmem = vm.create_guest_memfd(64 * P, BOTH)
    data = random.Random(1).randbytes(64 * P - 12)
    gmem.host_write(5, data)
    assert gmem.host_read(5, len(data)) == data
    gmem.fallocate(3, P, P)
    assert gmem.host_read(P - 1, P + 2) == data[P - 6 : P - 5] + bytes(P) + data[2 * P - 5 : 2 * P - 4]


@has_kvm
def test_refusals_of_the_file(vm):
    gmem = vm.create_guest_memfd(4 * P, BOTH)
    plain = vm.create_guest_memfd(4 * P, 0)
    assert outcome_of(vm.create_guest_memfd, 1, 0) == "EINVAL"
    assert outcome_of(vm.create_guest_memfd, -P, 0) == "EINVAL"
    assert outcome_of(gmem.fallocate, 0, 0, P) == "EOPNOTSUPP"
    assert outcome_of(gmem.fallocate, 1, 4 * P, P) == "EINVAL"
    assert outcome_of(gmem.fallocate, 3, 4 * P, P) == "OK"
    assert outcome_of(gmem.fallocate, 3, (1 << 63) - P, P) == "EFBIG"
    assert outcome_of(gmem.mmap, 0, 16 * P) == "OK"
    assert outcome_of(gmem.mmap, 0, P, False) == "EINVAL"
    assert outcome_of(plain.mmap, 0, P) == "ENODEV"
    assert outcome_of(plain.mmap, 0, 0) == "EINVAL"
    assert outcome_of(gmem.mmap, (1 << 63) - P, P) == "EOVERFLOW"


@has_kvm
def test_refusals_of_memslots(vm, transport):
    gmem = vm.create_guest_memfd(4 * P, BOTH)
    vm.add_memslot(1, GPA, 2 * P, gmem)
    vm.add_memslot(2, 2 * GPA, P, gmem, 3 * P)
    assert outcome_of(vm.add_memslot, 1, 3 * GPA, P, gmem, 2 * P) == "EINVAL"
    assert outcome_of(vm.add_memslot, 3, GPA, P, gmem, 2 * P) == "EEXIST"
    assert outcome_of(vm.add_memslot, 3, 3 * GPA, P, gmem, 1) == "EINVAL"
    assert outcome_of(vm.add_memslot, 3, 3 * GPA, 2 * P, gmem, 3 * P) == "EINVAL"
    assert outcome_of(vm.add_memslot, 3, 3 * GPA, P, None) == "EBADF"
    assert outcome_of(vm.delete_memslot, 3) == "EINVAL"
    with KvmVm(transport) as other:
        assert outcome_of(vm.add_memslot, 3, 3 * GPA, P, other.create_guest_memfd(P, BOTH)) == "EINVAL"
    overlap = {"op": "slot_add", "slot": 3, "gpa": 3 * GPA, "size": P, "expect": "EEXIST"}
    found = outcome_of(vm.add_memslot, 3, 3 * GPA, P, gmem, P)
    assert found == "EEXIST" or known_difference(transport.release, vm, overlap, found)
    vm.delete_memslot(1)
    vm.add_memslot(3, 3 * GPA, P, gmem, P)


@has_kvm
def test_an_argument_ends_where_it_ends(vm, transport, offer):
    """A struct that is short by one byte can't be read, and one that can't be written can't be answered."""
    gmem = vm.create_guest_memfd(P, BOTH)
    whole = bytearray(kvm.CREATE_GUEST_MEMFD_STRUCT.pack(1, 0, *[0] * 6))
    assert outcome_of(vm.ioctl, kvm.KVM_CREATE_GUEST_MEMFD, whole) == "EINVAL"
    assert outcome_of(vm.ioctl, kvm.KVM_CREATE_GUEST_MEMFD, whole[:-1]) == "EFAULT"
    assert outcome_of(vm.ioctl, kvm.KVM_CREATE_GUEST_MEMFD, None) == "EFAULT"
    assert outcome_of(gmem.ioctl, 0xDEAD, bytearray(8)) == "ENOTTY"
    sregs = bytearray(kvm.SREGS_SIZE)
    fd = transport.ioctl(vm.fd, kvm.KVM_CREATE_VCPU, 0)
    try:
        transport.raw_ioctl(fd, kvm.KVM_GET_SREGS, sregs)
        assert any(sregs)
        with pytest.raises(OSError, match=os.strerror(errno.EFAULT)):
            transport.raw_ioctl(fd, kvm.KVM_GET_SREGS, bytes(sregs))
    finally:
        transport.close(fd)


@has_kvm
def test_the_conversion_is_there_or_it_is_not(vm, offer):
    gmem = vm.create_guest_memfd(P, BOTH)
    argument = bytearray(MEMORY_ATTRIBUTES2_STRUCT.pack(0, P, PRIVATE, 0, 0, *[0] * 11))
    # The default type has no private memory: EINVAL where the ioctl exists.
    assert outcome_of(gmem.set_memory_attributes, 0, P, PRIVATE) == ("EINVAL" if offer.in_place else "ENOTTY")
    assert outcome_of(gmem.ioctl, KVM_SET_MEMORY_ATTRIBUTES2, argument) != "OK"
    assert outcome_of(gmem.ioctl, KVM_SET_MEMORY_ATTRIBUTES, bytearray(32)) == "ENOTTY"


@has_kvm
def test_pins(vm, offer):
    if offer.pins is not None:
        pytest.skip(f"no pins here: {offer.pins}")
    before = len(open_files())
    gmem = vm.create_guest_memfd(4 * P, BOTH)
    gmem.pin(0, 2 * P)
    gmem.pin(P, 2 * P)
    assert len(open_files()) == before + 4
    assert outcome_of(gmem.pin, 2 * P, 3 * P) == "EFAULT"
    assert len(open_files()) == before + 4
    gmem.fallocate(3, 0, P)
    gmem.unpin(2 * P, P)
    assert len(open_files()) == before + 2
    gmem.close()
    assert len(open_files()) == before
    assert outcome_of(vm.create_guest_memfd(P, MMAP).pin, 0, P) == "EFAULT"


@has_kvm
@pytest.mark.parametrize("gpa", [0, GPA, 1 << 32 | 7 * P, 1 << 38])
def test_host_and_guest_see_the_same_memory(guest_vm, gpa):
    gmem = guest_vm.create_guest_memfd(64 * P, BOTH)
    guest_vm.add_memslot(5, gpa, 32 * P, gmem, 16 * P)
    data = random.Random(gpa).randbytes(20 * P)
    gmem.host_write(17 * P + 3, data)
    assert guest_vm.guest_read(gpa + P + 3, len(data)) == data
    guest_vm.guest_write(gpa + 2 * P - 3, b"across the page")
    assert gmem.host_read(18 * P - 3, 15) == b"across the page"
    gmem.fallocate(3, 17 * P, P)
    assert guest_vm.guest_read(gpa + P, 8) == bytes(8)


@has_kvm
def test_a_hole_is_mmio_and_moves_nothing(guest_vm):
    gmem = guest_vm.create_guest_memfd(2 * P, BOTH)
    guest_vm.add_memslot(1, GPA, P, gmem)
    assert outcome_of(guest_vm.guest_write, GPA + P - 4, b"12345678") == "MMIO"
    assert outcome_of(guest_vm.guest_read, GPA + 9 * P, 8) == "MMIO"
    assert outcome_of(guest_vm.guest_write, GPA + 9 * P, b"12345678") == "MMIO"
    assert guest_vm.guest_read(GPA, P) == bytes(P)
    guest_vm.guest_write(GPA, b"goes on")
    assert gmem.host_read(0, 7) == b"goes on"
    guest_vm.delete_memslot(1)
    assert outcome_of(guest_vm.guest_read, GPA, 1) == "MMIO"


@has_kvm
def test_two_backings_share_the_memory_beside(transport, offer):
    """Before conversion in place: what is shared lives beside the guest_memfd, here and for the guest."""
    if offer.guest is not None or offer.in_place:
        pytest.skip("needs a guest, and a kernel without conversion in place")
    with KvmVm(transport, two_backings=True) as vm:
        gmem = vm.create_guest_memfd(4 * P, 0)
        vm.add_memslot(1, GPA, 4 * P, gmem)
        gmem.host_write(P, b"beside")
        assert vm.guest_read(GPA + P, 6) == b"beside"
        vm.guest_write(GPA + P, b"BE")
        assert gmem.host_read(P, 6) == b"BEside"
        gmem.fallocate(3, P, P)
        assert gmem.host_read(P, 6) == b"BEside"
        gmem.discard_shared(P, P)
        assert vm.guest_read(GPA + P, 6) == bytes(6)
        assert outcome_of(gmem.host_read, 4 * P, 1) == "SIGBUS"


@has_kvm
def test_nothing_is_left_open(offer):
    before = open_files()
    with KernelTransport() as kernel:
        probe(kernel)
        for _ in range(20):
            with KvmVm(kernel) as vm:
                gmem = vm.create_guest_memfd(4 * P, BOTH)
                vm.add_memslot(1, GPA, 4 * P, gmem)
                gmem.host_write(0, b"a")
                outcome_of(vm.guest_read, GPA, 1)
                outcome_of(gmem.pin, 0, 4 * P)
    assert open_files() == before


@has_kvm
def test_no_file_is_inherited(vm):
    gmem = vm.create_guest_memfd(P, BOTH)
    assert not os.get_inheritable(gmem.fd)
    assert not os.get_inheritable(vm.fd)


def test_a_child_answers_through_its_pipe():
    """Without a kernel: what it saw comes back, and what it raises is no answer."""
    assert in_child(lambda: ("OK", {"value": 3}, "00" * 100_000)) == ["OK", {"value": 3}, "00" * 100_000]
    with pytest.raises(ChildProcessError, match="no answer"):
        in_child(lambda: b"no JSON")
    with pytest.raises(ChildProcessError, match="no answer"):
        in_child(lambda: os._exit(3))


@has_kvm
def test_works_where_warnings_are_errors():
    """In a process of its own, which forks nothing itself and leaves nothing unclosed."""
    script = (
        "import gmemcore.kvm as k\n"
        "with k.KernelTransport() as t, k.KvmVm(t) as vm:\n"
        "    print(len(k.probe(t).offers))\n"
    )
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (done.stdout.strip(), done.stderr) == ("1", "") or int(done.stdout) > 1


def test_without_the_device_the_error_says_so():
    with pytest.raises(KvmUnavailableError, match="can't be opened") as refused:
        probe(KernelTransport("/dev/no-such-kvm"))
    assert refused.value.outcome == "ENODEV"


def test_a_type_that_kvm_does_not_have():
    with pytest.raises(GmemError, match="no VM type PKVM"):
        KvmVm(ModelTransport("v13"), VmType.PKVM)


# ---- backings --------------------------------------------------------------------------------------------

HOLDS_BYTES = [
    pytest.param(name, marks=has_kvm) if name == "guest_memfd" else name
    for name in BACKINGS
    if name != "none"
]


@pytest.fixture(params=HOLDS_BYTES)
def backing(request):
    if request.param == "guest_memfd":
        request.getfixturevalue("offer")
    return request.param


def test_backing_contract(backing):
    before = len(open_files())
    kept = BACKINGS[backing](8 * P)
    words = kept.words
    assert words.dtype == np.uint64
    assert len(words) == P
    assert not words.any()
    gmem = gmemcore.create_vm("SNP", backing={8 * P: kept}.get).create_guest_memfd(8 * P, 3)
    gmem.fallocate(1, 0, 8 * P)
    words[:] = np.arange(P, dtype=np.uint64)
    gmem.fallocate(3, 2 * P, 3 * P)
    assert not words[2 * 512 : 5 * 512].any()
    gmem.fallocate(1, 2 * P, P)
    assert not words[2 * 512 : 5 * 512].any()
    assert words[2 * 512 - 1] == 2 * 512 - 1
    assert words[5 * 512] == 5 * 512
    words[2 * 512] = 7
    kept.close()
    kept.close()
    assert len(kept.words) == 0
    assert words[2 * 512] == 7, "a view that others hold keeps the memory alive"
    gmem.vm.close()
    del words, kept, gmem
    assert len(open_files()) == before


@has_kvm
def test_backing_prefaulted(offer):
    kept = BACKINGS["guest_memfd"](8 * P, prefault=True)
    assert not kept.words.any()
    kept.close()
    with pytest.raises(GmemError) as refused, gmemcore.create_vm("SNP", backing="guest_memfd") as vm:
        vm.create_guest_memfd(1 << 50)
    assert refused.value.outcome == "ENOMEM"


def walk(backing, seed):
    """What comes of a seeded walk through the public API, and the DRAM in the end."""
    chance = random.Random(seed)
    seen = []

    def step(call, *arguments):
        try:
            seen.append(repr(call(*arguments)))
        except GmemError as error:
            seen.append((error.outcome, error.error_offset))

    with gmemcore.create_vm(
        chance.choice(["SW_PROTECTED", "SNP", "TDX"]), "v5", seed=seed, backing=backing
    ) as vm:
        gmem = vm.create_guest_memfd(16 * P, BOTH)
        vm.add_memslot(0, GPA, 16 * P, gmem)
        for _ in range(150):
            page, pages = chance.randrange(16), chance.randrange(1, 6)
            offset, size = page * P, pages * P
            data = chance.randbytes(chance.randrange(1, 3 * P))
            step(
                *chance.choice(
                    [
                        (gmem.host_write, offset + chance.randrange(P), data),
                        (gmem.host_read, offset, min(size, 16 * P)),
                        (vm.guest_write, GPA + offset, data),
                        (vm.guest_read, GPA + offset, size),
                        (
                            gmem.set_memory_attributes,
                            offset,
                            size,
                            chance.choice([0, PRIVATE]),
                            chance.choice([0, 1, 2]),
                        ),
                        (gmem.fallocate, chance.choice([1, 3]), offset, size),
                        (vm.accept, GPA + offset, size),
                        (gmem.pin, offset, P),
                        (gmem.unpin, offset, P),
                        (vm.launch_update, GPA + offset, P),
                    ]
                )
            )
        return seen, gmem.memory.tobytes(), gmem.runs(), vm.counters.asdict()


@pytest.mark.parametrize("seed", range(6))
def test_results_do_not_depend_on_the_backing(backing, seed):
    assert walk(backing, seed) == walk("anonymous", seed)


def test_the_backing_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr("gmemcore.kvm.kernel.DEVICE", "/dev/no-such-kvm")
    with gmemcore.create_vm("SNP", backing="guest_memfd") as vm, pytest.raises(GmemError) as refused:
        vm.create_guest_memfd(P)
    assert refused.value.outcome == "ENODEV"
    assert "no-such-kvm" in str(refused.value)


# ---- vectors on this kernel ------------------------------------------------------------------------------


def conform_here(transport, steps, vm_type=VmType.DEFAULT, abi="v13"):
    machine = KvmMachine(transport, probe(transport), vm_type, abi)
    try:
        return run_case(machine, Case("c", steps))
    finally:
        machine.close()


@has_kvm
def test_edges_that_kernels_are_known_for(transport, offer):
    steps = [
        CREATE,
        SLOT,
        {**CREATE, "as": "plain", "flags": 0},
        {**SLOT, "slot": 2, "gpa": 2 * GPA, "expect": "EEXIST"},
        {"op": "mmap", "offset": 1 << 63, "size": P},
        {"op": "mmap", "size": 1 << 47},
        {"op": "host_read", "offset": 1 << 63, "size": 1, "expect": "SIGBUS"},
        {**SLOT, "slot": 3, "gpa": 1 << 60, "gmem": "plain"},
        {**SLOT, "slot": 4, "gpa": 1 << 60, "gmem": "g", "expect": "EEXIST"},
        {"op": "fallocate", "mode": 3, "offset": (1 << 63) - P, "size": P, "expect": "EFBIG"},
        {"op": "mmap", "gmem": "plain", "size": 0, "expect": "EINVAL"},
        {**SLOT, "slot": 32764, "gpa": 2 * GPA, "gmem": "plain", "expect": "EINVAL"},
    ]
    result = conform_here(transport, steps)
    assert result.wrong is None, result.wrong
    assert {note.step for note in result.known} | {3} == {3, 4, 5, 6, 7}
    assert {note.step for note in result.skipped} == {8, 11}  # they meet the memslot of step 7


@has_kvm
@pytest.mark.parametrize(
    "step",
    [
        {"op": "fallocate", "mode": 3, "offset": (1 << 63) - P, "size": P},
        {"op": "fallocate", "mode": 64, "offset": (1 << 63) - P, "size": P, "expect": "EOPNOTSUPP"},
        {"op": "mmap", "gmem": "plain", "size": 0, "expect": "ENODEV"},
        {**SLOT, "slot": 40000, "gmem": "plain"},
    ],
    ids=["efbig", "efbig-mode", "mmap-order", "slot-id"],
)
def test_faults_of_the_model_are_not_excused(transport, offer, step):
    steps = [CREATE, {**CREATE, "as": "plain", "flags": 0}, step]
    assert conform_here(transport, steps).wrong is not None


@has_kvm
def test_this_kernel_is_not_excused_from_what_is_written(transport, offer):
    result = conform_here(
        transport, [CREATE, {"op": "host_write", "offset": 0, "data": "01"}, read(0, data="02")]
    )
    assert (result.wrong.step, result.wrong.found) == (2, "01")
    assert conform_here(transport, [{**CREATE, "expect": "EINVAL"}]).wrong is not None
    assert conform_here(transport, [CREATE, read(4)]).wrong.found == "SIGBUS"


@has_kvm
@pytest.mark.parametrize("name", ["files-v13-default", "walk-v13-default-today", "walk-v5-default-today"])
def test_this_kernel_passes_what_it_can_do(transport, offer, name):
    vectors = read_vectors(VECTORS / f"{name}.json")
    host = probe(transport)
    passed = 0
    for case in vectors.cases:
        with contextlib.closing(KvmMachine(transport, host, vectors.vm_type, vectors.abi)) as machine:
            result = run_case(machine, case)
        assert result.wrong is None, f"{case.name}: {result.wrong}"
        passed += result.passed
    assert passed > 20


# ---- guest addresses that a host doesn't have ------------------------------------------------------------


def test_guest_addresses_are_moved_to_where_a_host_has_them():
    """What touches stays together, at the same place within 1 GiB; nothing comes to touch anything else."""
    high, low = 1 << 45, GPA
    steps = [
        CREATE,
        {**SLOT, "gpa": high + 5 * P, "size": 2 * P},
        {**SLOT, "slot": 2, "gpa": high + 7 * P, "size": P, "gmem_offset": 2 * P},
        {"op": "guest_write", "gpa": high + 8 * P - 2, "data": "01020304", "expect": "MMIO"},
        {"op": "vm_set", "address": high + 5 * P, "size": P, "attributes": 0},
        {**SLOT, "slot": 3, "gpa": low, "size": P, "gmem_offset": 3 * P},
        {"op": "guest_read", "gpa": 1 << 51},
        {**SLOT, "slot": 4, "gpa": (1 << 64) - P, "size": P, "expect": "EINVAL"},
        {**SLOT, "slot": 5, "gpa": (1 << 63) + 1, "size": P, "expect": "EINVAL"},
    ]
    fitted = fit(Case("c", steps, seed=7), 40)
    assert (fitted.name, fitted.seed) == ("c", 7)
    gpas = [step.get("gpa", step.get("address")) for step in fitted.steps[1:]]
    start = gpas[0]
    assert start % (1 << 30) == 5 * P
    assert gpas[:4] == [start, start + 2 * P, start + 3 * P - 2, start]
    assert gpas[4] == low
    assert gpas[6] == (1 << 64) - P
    assert gpas[7] % P == 1
    assert max(gpas[:6] + gpas[7:]) < 1 << 40
    assert len({gpa // P for gpa in gpas[:6]}) == 4
    assert fit(Case("c", steps[:1] + steps[5:6]), 40).steps == steps[:1] + steps[5:6]


def test_what_does_not_fit_stays():
    steps = [{"op": "vm_set", "address": 0, "size": 1 << 50, "attributes": 0}]
    assert fit(Case("c", steps), 40).steps == steps


def test_raw_arguments_are_moved_with_the_rest():
    argument = MEMORY_ATTRIBUTES_STRUCT.pack(1 << 45, P, 8, 0).hex() + "ff"
    steps = [
        {"op": "ioctl", "fd": "vm", "request": KVM_SET_MEMORY_ATTRIBUTES, "argument": argument},
        {"op": "ioctl", "fd": "vm", "request": KVM_SET_MEMORY_ATTRIBUTES, "argument": argument[:20]},
        {"op": "guest_read", "gpa": 1 << 45},
    ]
    raw, short, read_ = fit(Case("c", steps), 40).steps
    fields = MEMORY_ATTRIBUTES_STRUCT.unpack_from(bytes.fromhex(raw["argument"]))
    assert fields == (read_["gpa"], P, 8, 0)
    assert read_["gpa"] < 1 << 40
    assert raw["argument"].endswith("ff")
    assert short == steps[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_cases_come_out_the_same_where_they_are_moved(path):
    vectors = read_vectors(path)
    for case in vectors.cases:
        moved = fit(case, 40)
        machine = ModelMachine(vectors, case.seed)
        assert run_case(machine, moved).wrong is None
        machine.close()
