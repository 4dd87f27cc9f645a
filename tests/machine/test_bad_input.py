"""Bad input gets a typed error, and never reaches memory: canaries stand on both sides of the buffer."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gmemcore
from gmemcore.errors import GmemError
from support.bad_calls import BATCH, CALLS, DRAWN, N_PAGES, SIZE, a_call, make_calls


@pytest.mark.parametrize("vm_type", ["SNP", "SW_PROTECTED"])
@pytest.mark.parametrize("abi", ["v5", "legacy"])
@given(calls=st.lists(a_call(), min_size=BATCH, max_size=BATCH))
@settings(DRAWN, max_examples=max(1, CALLS // BATCH // 4))
def test_fuzzed_calls_get_a_typed_error_and_leave_everything_alone(vm_type, abi, calls):
    make_calls(vm_type, abi, calls)


@pytest.mark.parametrize("wrong", [True, np.True_, 1.0, "1", None, b"1", [1]])
def test_wrong_types_are_type_errors(wrong):
    vm = gmemcore.create_vm("SNP")
    gmem = vm.create_guest_memfd(SIZE, 3)
    for call in (
        lambda: gmem.set_memory_attributes(wrong, 4096, 8),
        lambda: gmem.set_memory_attributes(0, wrong, 8),
        lambda: gmem.set_memory_attributes(0, 4096, wrong),
        lambda: gmem.set_memory_attributes(0, 4096, 8, wrong),
        lambda: vm.create_guest_memfd(wrong, 0),
        lambda: vm.guest_read(wrong, 1),
        lambda: gmem.pin(0, wrong),
        lambda: gmem.fallocate(wrong, 0, 4096),
        lambda: vm.accept(0, wrong),
    ):
        with pytest.raises(TypeError, match="must be an integer"):
            call()
    with pytest.raises(TypeError):
        gmemcore.create_vm(3)
    with pytest.raises(TypeError):
        gmemcore.create_vm("SNP", backing=3)


@pytest.mark.parametrize(
    "wrong", [np.zeros(2), np.zeros((2, 2), np.uint64), np.array(["4096"]), [True], [4096.0], 4096, "x", None]
)
def test_arrays_of_other_types_are_type_errors(wrong):
    gmem = gmemcore.create_vm("SNP").create_guest_memfd(SIZE, 3)
    for offsets, sizes in ((wrong, [4096]), ([4096], wrong)):
        with pytest.raises(TypeError):
            gmem.set_memory_attributes_many(offsets, sizes, 8)
    assert gmem.runs() == [(0, N_PAGES, "shared")]


@pytest.mark.parametrize("wrong", [0, False, "", b"", {}, 4096, bytes(4096), np.int8(0)])
def test_what_is_no_list_of_pages_does_not_end_the_launch(wrong):
    """The launch can't be begun again, so nothing that is merely false stands for a VM without vCPUs."""
    vm = gmemcore.create_vm("SNP", backing="none")
    with pytest.raises(TypeError, match="vmsas must be a list of pages, not"):
        vm.launch_finish(wrong)
    assert vm.phase == "launching"
    vm.launch_finish(np.zeros((2, 4096), np.uint8))
    assert vm.phase == "running"


@pytest.mark.parametrize("vm_type", ["SNP", "TDX"])
def test_a_launch_update_that_is_refused_names_its_place(vm_type):
    vm = gmemcore.create_vm(vm_type, backing="none")
    with pytest.raises(GmemError, match="stopped at gpa 0x500000 after 0 pages: EINVAL"):
        vm.launch_update(0x500000, 4096, page_type="ZERO")
    vm.launch_finish()
    with pytest.raises(GmemError, match="stopped at gpa 0x500000 after 0 pages: EINVAL"):
        vm.launch_update(0x500000, 4096, page_type="ZERO")


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_what_is_memory_of_the_process_is_not_copied(copied):
    vm = gmemcore.create_vm("SNP", backing="none")
    gmem = vm.create_guest_memfd(SIZE, 3)
    for each in (vm, gmem, gmem.mmap(0, SIZE)):
        if isinstance(each, (gmemcore.Vm, gmemcore.GuestMemfd)) or copied is not copy.copy:
            with pytest.raises(TypeError, match="can't be copied or pickled"):
                copied(each)
    assert repr(gmem.mmap(4096, 4096)).startswith("HostMapping(offset=0x1000, size=0x1000, gmem=GuestMemfd(")


@pytest.mark.parametrize("exact", [np.uint64(4096), np.int32(4096), np.uint16(4096), np.int64(4096)])
def test_exact_numpy_integers_are_taken(exact):
    gmem = gmemcore.create_vm("SNP").create_guest_memfd(SIZE, 3)
    assert gmem.set_memory_attributes(exact, exact, np.int8(8)).counters.pages_changed == 1
    assert gmem.runs()[1] == (1, 2, "private")


def test_messages_say_what_is_wrong_where_and_what_is_accepted():
    gmem = gmemcore.create_vm("SNP").create_guest_memfd(SIZE, 3)
    for arguments, says in (
        ((0, 1, 8), ["0x0+0x1", "multiples of 0x1000"]),
        ((0, SIZE + 4096, 8), [f"{SIZE + 4096:#x}", f"end at {SIZE:#x} or before"]),
        ((0, 4096, 3), ["attributes must be within 0x8, not 0x3"]),
        ((0, 4096, 8, 64), ["flags 0x40", "ZERO=0x1", "PRESERVE=0x2"]),
        ((0, 4096, 8, 3), ["one content mode at a time"]),
        ((0, 4096, 8, 1), ["ZERO", "launching"]),
        ((-1, 4096, 8), ["-0x1", "64 bits"]),
    ):
        with pytest.raises(GmemError) as raised:
            gmem.set_memory_attributes(*arguments)
        for words in says:
            assert words in str(raised.value)
