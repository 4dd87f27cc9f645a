"""What mutants survived until it was asked: each of these kills one that `mutate.py` found alive."""

import numpy as np
import pytest

import gmemcore
from gmemcore.engine import kernels as layout
from gmemcore.errors import GmemError
from support.kinds import P

GPA = 1 << 32


def machine(vm_type="TDX", abi="tracking", pages=1030, flags=3):
    vm = gmemcore.create_vm(vm_type, abi)
    gmem = vm.create_guest_memfd(pages * P, flags)
    vm.add_memslot(0, GPA, pages * P, gmem)
    return vm, gmem


def outcome(call, *arguments):
    with pytest.raises(GmemError) as refused:
        call(*arguments)
    return refused.value.outcome


def test_a_page_that_is_assigned_and_not_accepted_is_assigned():
    """The precondition of `tracking` on TDX looks at the S-EPT, not at what the guest accepted."""
    vm, gmem = machine()
    gmem.set_memory_attributes(0, 8 * P, 8)
    assert outcome(vm.guest_read, GPA + 3 * P, 1) == "NOT_VALIDATED"
    assert outcome(gmem.set_memory_attributes, 0, 8 * P, 0, 2) == "EOPNOTSUPP"
    gmem.set_memory_attributes(0, 3 * P, 0, 2)
    gmem.set_memory_attributes(4 * P, 4 * P, 0, 2)


@pytest.mark.parametrize(("offset", "size"), [(0, 0), (-P, P), (0, -P), (1 << 63, P), (0, 1 << 63)])
def test_fallocate_looks_at_the_range_before_the_mode(offset, size):
    _, gmem = machine()
    assert outcome(gmem.fallocate, 0, offset, size) == "EINVAL"
    assert outcome(gmem.fallocate, 0, 0, (1 << 63) - P) == "EOPNOTSUPP"


def test_a_capability_is_asked_with_todays_firmware():
    from gmemcore.policy import capability

    post_launch = "two-caps", "MEMORY_ATTRIBUTES2_POST_LAUNCH_FLAGS", "SNP"
    assert capability(*post_launch) == capability(*post_launch, "today") == 1
    assert capability(*post_launch, "cipher") == 3


@pytest.mark.parametrize(
    "wrong", [np.zeros(1), np.array(["0"]), np.zeros((1, 1), np.uint64), np.zeros(1, bool)]
)
def test_columns_are_one_dimensional_arrays_of_integers(wrong):
    _, gmem = machine()
    with pytest.raises(TypeError, match="one-dimensional array of integers"):
        gmem.set_memory_attributes_many(wrong, [P], 8)
    assert len(gmem.set_memory_attributes_many(np.zeros(0), [], 8).errno) == 0  # of no type in particular


def test_memory_is_asked_for_where_a_conversion_allocates_and_nowhere_else():
    vm = gmemcore.create_vm("SNP", "two-caps", "cipher", backing="memfd")
    gmem = vm.create_guest_memfd(4 * P, 3)
    vm.launch_finish()
    gmem._store.header[layout.HOST_STEPS_LEFT] = 0
    gmem.set_memory_attributes(0, P, 8)
    gmem.set_memory_attributes(0, P, 0, 2)
    assert outcome(gmem.set_memory_attributes, 0, P, 8, 2) == "ENOMEM"


def test_signed_columns_may_hold_zero():
    _, gmem = machine()
    batch = gmem.set_memory_attributes_many(np.array([0, 2 * P]), np.array([P, P]), np.array([8, 0]))
    assert batch.errno.tolist() == [0, 0]
    assert outcome(gmem.set_memory_attributes_many, np.array([0, -1]), np.array([P, P]), 8) == "EINVAL"


@pytest.mark.parametrize(("private", "page"), [(True, "shared"), (False, "private")])
def test_a_memory_fault_says_what_the_page_is(private, page):
    vm, gmem = machine("SNP", "v5")
    gmem.set_memory_attributes(0, P, 0 if private else 8)
    with pytest.raises(GmemError, match=f"access to gpa .*: the page is {page}; convert it first"):
        vm.guest_read(GPA, 1, private)


def test_rows_of_policy_cannot_be_changed():
    """They are shared by every Vm of the process."""
    from dataclasses import FrozenInstanceError

    from gmemcore.policy import ABIS, EFFECTS, PLATFORMS

    rows = [*PLATFORMS.values(), *EFFECTS.values(), *ABIS.values()]
    rows += [row.populate for row in PLATFORMS.values() if row.populate]
    for row in rows:
        assert not hasattr(row, "__dict__")
        with pytest.raises((FrozenInstanceError, AttributeError)):
            setattr(row, row.__match_args__[0], None)
        with pytest.raises((FrozenInstanceError, AttributeError, TypeError)):
            row.another = None
