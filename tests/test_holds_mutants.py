"""What mutants survived until it was asked: each of these kills one that `mutate.py` found alive."""

import pytest

import gmemcore
from gmemcore.errors import GmemError

P = 4096
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
