"""The userspace side: assertions, retries, notifications, and undo for every step that can fail."""

import ast
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gmemcore.vmm
from gmemcore import create_vm
from gmemcore.errors import GmemError, MemoryFaultExit, MmioExit
from gmemcore.machine import GuestMemfd, Vm
from gmemcore.uapi import Phase
from gmemcore.vmm import (
    CapabilityAssertionError,
    GuestProgram,
    RamBlockAttributes,
    UndoError,
    UndoLog,
    Vfio,
    Vmm,
    guest_memfd_set_memory_attributes_fd,
    probe,
    vm_set_memory_attributes,
)
from support.kinds import P

PRIVATE, SHARED = 8, 0
ZERO, PRESERVE = 1, 2
GPA = 1 << 32


class Recorder:
    """A listener that writes down what it is told, in pages, and holds what is shared."""

    def __init__(self, events=None):
        self.events = [] if events is None else events
        self.held = set()

    def populate(self, block, offset, size):
        pages = set(range(offset // P, (offset + size) // P))
        assert not self.held & {(id(block), page) for page in pages}
        self.held |= {(id(block), page) for page in pages}
        self.events.append(("populate", offset // P, (offset + size) // P))

    def discard(self, block, offset, size):
        pages = {(id(block), page) for page in range(offset // P, (offset + size) // P)}
        assert pages <= self.held
        self.held -= pages
        self.events.append(("discard", offset // P, (offset + size) // P))


class Refusing:
    """A listener that refuses its n-th call-back."""

    def __init__(self, n):
        self.calls_left = n

    def populate(self, *_):
        self.calls_left -= 1
        if self.calls_left == 0:
            raise RuntimeError("no")

    discard = populate


def vmm_with_ram(vm_type="SNP", abi="v5", pages=16, *, shared=True, **options):
    vmm = Vmm(create_vm(vm_type, abi, options.pop("firmware", "today")), **options)
    return vmm, vmm.add_ram(GPA, pages * P, shared=shared)


def outcome_of(call, *arguments):
    try:
        call(*arguments)
    except GmemError as error:
        return error.outcome
    return "OK"


def shared_pages(block):
    return set(np.flatnonzero(block.shared()).tolist())


# ---- names and capabilities only -------------------------------------------------------------------


def asks_for_more(source):
    """Attributes and names in a module by which a userspace would know more than names and capabilities."""
    forbidden_attributes = {
        "vm_type",
        "firmware",
        "platform",
        "rules",
        "coco",
        "tracking",
        "runs_of",
        "_store",
    }
    forbidden_imports = {"cell", "cells", "capability", "PLATFORMS", "ABIS", "VmType", "Firmware"}
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in forbidden_attributes:
            found.add(node.attr)
        if isinstance(node, ast.ImportFrom):
            found |= {name.name for name in node.names} & forbidden_imports
    return found


@pytest.mark.parametrize("module", ["probe", "attributes", "ram_block", "vfio", "userspace", "guest", "undo"])
def test_userspace_knows_names_and_capabilities_only(module):
    source = (Path(gmemcore.vmm.__file__).parent / f"{module}.py").read_text()
    assert asks_for_more(source) == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("if vm.vm_type in ('SNP', 'TDX'): pass", "vm_type"),
        ("x = vm.platform.coco", "coco"),
        ("from gmemcore.policy import cell", "cell"),
    ],
)
def test_a_userspace_that_knows_more_is_noticed(source, found):
    assert found in asks_for_more(source)


@pytest.mark.parametrize(
    ("vm_type", "abi", "in_place", "private_memory", "init_shared"),
    [
        ("SNP", "v5", True, True, True),
        ("PKVM", "v13", True, True, True),
        ("TDX", "legacy", False, True, False),
        ("DEFAULT", "v5", False, False, True),
        ("DEFAULT", "legacy", False, False, True),
    ],
)
def test_probe_answers_are_the_vms(vm_type, abi, in_place, private_memory, init_shared):
    supported = probe(create_vm(vm_type, abi))
    assert (supported.in_place, supported.private_memory, supported.init_shared) == (
        in_place,
        private_memory,
        init_shared,
    )


def test_probe_is_asked_once(monkeypatch):
    asked = []
    original = Vm.check_cap
    monkeypatch.setattr(Vm, "check_cap", lambda vm, name: asked.append(name) or original(vm, name))
    vmm, _ = vmm_with_ram(abi="two-caps")
    del asked[:]
    vmm.convert(GPA, P, True, PRESERVE)
    vmm.convert(GPA, P, False)
    assert asked == ["GUEST_MEMFD_FLAGS"] * asked.count("GUEST_MEMFD_FLAGS")  # the kernel's own, at creation


@pytest.mark.parametrize(
    ("vm_type", "abi", "firmware", "phase", "direction", "names"),
    [
        ("SNP", "v4", "today", "launching", "to_private", []),
        ("SNP", "v5", "today", "running", "to_shared", ["PRESERVE"]),  # believed, and not so: the seed's case
        ("SNP", "two-caps", "today", "running", "to_shared", []),
        ("SNP", "two-caps", "cipher", "running", "to_shared", ["PRESERVE"]),
        ("SNP", "before-launch", "today", "launching", "to_private", ["PRESERVE_BEFORE_LAUNCH"]),
        ("SNP", "before-launch", "today", "running", "to_private", []),
        ("PKVM", "after-launch", "today", "running", "to_private", ["PRESERVE_AFTER_LAUNCH", "PRESERVE"]),
        ("SNP", "v13", "today", "launching", "to_private", []),
    ],
)
def test_flags_believed_to_keep_contents(vm_type, abi, firmware, phase, direction, names):
    supported = probe(create_vm(vm_type, abi, firmware))
    assert [row.name for row in supported.preserving(phase, direction)] == names


# ---- the one ioctl ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vm_type", "abi", "attributes", "flags", "phase"),
    [
        ("DEFAULT", "v5", PRIVATE, 0, "launching"),  # no such attribute
        ("SNP", "v5", 1, 0, "launching"),
        ("SNP", "v4", PRIVATE, PRESERVE, "launching"),  # no such flag for this VM
        ("SNP", "two-caps", PRIVATE, PRESERVE, "running"),  # not in this phase
        ("SNP", "v13", SHARED, ZERO, "running"),
        ("SNP", "v5", SHARED, 1 << 40, "running"),
    ],
)
def test_what_no_capability_answered_is_not_asked_for(vm_type, abi, attributes, flags, phase):
    vm = create_vm(vm_type, abi)
    gmem = vm.create_guest_memfd(P, 3)
    with pytest.raises(AssertionError):
        guest_memfd_set_memory_attributes_fd(probe(vm), gmem, 0, P, attributes, flags, phase=Phase(phase))
    assert gmem.runs() == [(0, 1, "shared")]


def test_with_one_capability_the_assertion_passes_and_the_kernel_refuses():
    """The incomplete check of the seed: FLAGS answers PRESERVE, and SNP refuses it after launch."""
    vm = create_vm("SNP", "v5")
    gmem = vm.create_guest_memfd(P, 3)
    vm.launch_finish()
    with pytest.raises(GmemError) as refused:
        guest_memfd_set_memory_attributes_fd(probe(vm), gmem, 0, P, PRIVATE, PRESERVE, phase=vm.phase)
    assert refused.value.outcome == "EOPNOTSUPP"


def test_the_vm_fd_takes_no_flags():
    vm = create_vm("SNP", "legacy")
    with pytest.raises(CapabilityAssertionError):
        vm_set_memory_attributes(probe(vm), vm, 0, P, PRIVATE, ZERO)
    assert vm_set_memory_attributes(probe(vm), vm, 0, P, PRIVATE).pages_changed == 1


@pytest.mark.parametrize("tries_needed", [1, 2, 5])
def test_transient_pins_are_waited_for(tries_needed):
    vm = create_vm("SNP")
    gmem = vm.create_guest_memfd(4 * P, 3)
    gmem.pin(2 * P, P)
    met = []

    def on_busy(file, offset):
        met.append((file, offset))
        if len(met) == tries_needed:
            file.unpin(offset, P)

    counters = guest_memfd_set_memory_attributes_fd(
        probe(vm), gmem, 0, 4 * P, PRIVATE, phase=vm.phase, retries=5, on_busy=on_busy
    )
    assert met == [(gmem, 2 * P)] * tries_needed
    assert counters.pages_changed == 4


@pytest.mark.parametrize("retries", [0, 3])
def test_pins_that_stay_are_reported_after_bounded_tries(retries):
    vm = create_vm("SNP")
    gmem = vm.create_guest_memfd(4 * P, 3)
    gmem.pin(3 * P, P)
    met = []
    with pytest.raises(GmemError) as refused:
        guest_memfd_set_memory_attributes_fd(
            probe(vm),
            gmem,
            0,
            4 * P,
            PRIVATE,
            phase=vm.phase,
            retries=retries,
            on_busy=lambda *at: met.append(at),
        )
    assert (refused.value.outcome, refused.value.error_offset) == ("EAGAIN", 3 * P)
    assert len(met) == retries
    with pytest.raises(ValueError, match="retries"):
        guest_memfd_set_memory_attributes_fd(probe(vm), gmem, 0, P, PRIVATE, phase=vm.phase, retries=-1)


@pytest.mark.parametrize("outcome", ["EINVAL", "ENOMEM", "EOPNOTSUPP"])
def test_other_refusals_are_not_retried(outcome):
    vm = create_vm("SNP")
    gmem = vm.create_guest_memfd(4 * P, 3)
    if outcome == "ENOMEM":
        gmem.fail_allocations_after(0)
    if outcome == "EOPNOTSUPP":
        vm.launch_finish()
    with pytest.raises(GmemError) as refused:
        guest_memfd_set_memory_attributes_fd(
            probe(vm),
            gmem,
            0 if outcome != "EINVAL" else 1,
            P,
            PRIVATE,
            PRESERVE if outcome == "EOPNOTSUPP" else 0,
            phase=vm.phase,
            on_busy=lambda *_: pytest.fail("retried"),
        )
    assert refused.value.outcome == outcome


# ---- undo ------------------------------------------------------------------------------------------


def test_undo_takes_steps_back_last_first():
    events = []

    def steps():
        with UndoLog() as undo:
            for step in "abc":
                undo.done(events.append, step)
            raise KeyError

    with pytest.raises(KeyError):
        steps()
    assert events == ["c", "b", "a"]


def test_undo_keeps_what_ended_well():
    with UndoLog() as undo:
        undo.done(pytest.fail, "taken back")


def test_undo_goes_on_past_what_cannot_be_taken_back():
    events = []

    def stuck():
        raise OSError("stuck")

    def steps():
        with UndoLog() as undo:
            undo.done(events.append, "first")
            undo.done(stuck)
            undo.done(events.append, "last")
            raise KeyError("the reason")

    with pytest.raises(UndoError, match="stuck") as failed:
        steps()
    assert events == ["last", "first"]
    assert isinstance(failed.value.__cause__, KeyError)
    assert len(failed.value.failures) == 1


# ---- RamBlockAttributes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "converted", "shared"),
    [(3, (), range(20)), (1, (), ()), (3, (4, 9), {*range(4), *range(13, 20)})],
)
def test_bitmap_starts_as_the_file_is(flags, converted, shared):
    vmm = Vmm(create_vm("SNP"))
    gmem = vmm.vm.create_guest_memfd(20 * P, flags)
    if converted:
        gmem.set_memory_attributes(converted[0] * P, converted[1] * P, PRIVATE)
    block = vmm.add_slot(GPA, 20 * P, gmem)
    assert shared_pages(block) == set(shared)
    bits = int.from_bytes(block.bitmap.tobytes(), "little")
    assert {page for page in range(64) if bits >> page & 1} == set(shared)


def block_of(bits):
    gmem = create_vm("SNP").create_guest_memfd(len(bits) * P, 3)
    return RamBlockAttributes(gmem, [(page, page + 1) for page, bit in enumerate(bits) if bit])


@settings(deadline=None, max_examples=60)
@given(data=st.data(), bits=st.lists(st.booleans(), min_size=1, max_size=40))
def test_one_notification_a_differing_run(data, bits):
    """Against a naive model: sets of pages, and runs found one by one."""
    block, listener = block_of(bits), Recorder()
    block.register(listener)
    del listener.events[:]
    start = data.draw(st.integers(0, len(bits) - 1))
    end = data.draw(st.integers(start + 1, len(bits)))
    to_discard = data.draw(st.booleans())
    differing, expected = [page for page in range(start, end) if bits[page] == to_discard], []
    for page in differing:
        if expected and expected[-1][2] == page:
            expected[-1] = (*expected[-1][:2], page + 1)
        else:
            expected.append(("discard" if to_discard else "populate", page, page + 1))
    before = block.notifications
    block.state_change(start * P, (end - start) * P, to_discard)
    assert listener.events == expected
    assert block.notifications - before == len(expected)
    after = [(not to_discard) if start <= page < end else bit for page, bit in enumerate(bits)]
    assert block.shared().tolist() == after
    assert {page for _, page in listener.held} == shared_pages(block)


def test_equal_is_silent_and_uniform_is_one():
    block, listener = block_of([1] * 8), Recorder()
    block.register(listener)
    block.state_change(2 * P, 4 * P, to_discard=True)
    block.state_change(2 * P, 4 * P, to_discard=True)
    assert listener.events == [("populate", 0, 8), ("discard", 2, 6)]
    block.state_change(0, 8 * P, to_discard=True)  # mixed: the two runs that differ
    assert listener.events[2:] == [("discard", 0, 2), ("discard", 6, 8)]


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 0), (1, P), (0, P + 1), (0, 9 * P), (8 * P, P), (-P, P), (0, -P)]
)
def test_bad_ranges_are_refused_and_nobody_is_told(offset, size):
    block, listener = block_of([1] * 8), Recorder()
    block.register(listener)
    with pytest.raises(GmemError) as refused:
        block.state_change(offset, size, to_discard=True)
    assert refused.value.outcome == "EINVAL"
    assert len(listener.events) == 1


@pytest.mark.parametrize("to_discard", [True, False])
@pytest.mark.parametrize("refused_call", [1, 2, 3])
def test_a_listeners_refusal_leaves_bitmap_and_the_others_as_they_were(to_discard, refused_call):
    bits = [page % 4 < 2 for page in range(12)]  # three runs to change either way
    block, first, last = block_of(bits), Recorder(), Recorder()
    block.register(first)
    block._listeners.append(Refusing(refused_call))
    block.register(last)
    held = set(first.held)
    with pytest.raises(RuntimeError):
        block.state_change(0, 12 * P, to_discard)
    assert block.shared().tolist() == bits
    assert first.held == last.held == held


def test_register_replays_and_unregister_lets_go():
    block, listener = block_of([1, 1, 0, 0, 1]), Recorder()
    block.register(listener)
    assert listener.events == [("populate", 0, 2), ("populate", 4, 5)]
    block.unregister(listener)
    assert listener.held == set()
    block.state_change(0, P, to_discard=True)
    assert len(listener.events) == 4


def test_a_listener_that_refuses_its_replay_is_not_added():
    block, device = block_of([1, 1, 0, 0, 1]), Vfio()
    block.gmem.set_memory_attributes(4 * P, P, PRIVATE)  # behind the back of the block: it can't be pinned
    with pytest.raises(GmemError):
        block.register(device)
    assert not device.mapped(block).any()
    assert not block.gmem.plane("pinned").any()
    block.state_change(0, P, to_discard=True)  # nobody is told, so nobody objects


# ---- Vfio ------------------------------------------------------------------------------------------


def test_vfio_pins_what_is_shared_and_unpins_before_it_is_private():
    vmm, block = vmm_with_ram()
    device = Vfio()
    vmm.convert(GPA + 4 * P, 4 * P, True)
    vmm.register(device)
    assert device.mapped(block).tolist() == block.gmem.plane("pinned").tolist() == block.shared().tolist()
    vmm.convert(GPA, 16 * P, True)  # would be EAGAIN, if the pins were still there
    assert not block.gmem.plane("pinned").any()
    vmm.convert(GPA + P, 2 * P, False)
    assert device.mapped(block).tolist() == block.gmem.plane("pinned").tolist() == block.shared().tolist()


def test_without_being_told_the_pins_stop_the_conversion():
    """What the order of notification is for."""
    vmm, block = vmm_with_ram()
    vmm.register(Vfio())
    with pytest.raises(GmemError) as refused:
        block.gmem.set_memory_attributes(0, P, PRIVATE)
    assert refused.value.outcome == "EAGAIN"


def test_dma_reaches_what_is_shared_and_nothing_else():
    vmm, block = vmm_with_ram()
    device = Vfio()
    vmm.register(device)
    device.dma_write(block, P - 4, b"across")
    assert block.gmem.host_read(P - 4, 6) == device.dma_read(block, P - 4, 6) == b"across"
    vmm.convert(GPA + P, P, True)
    for access in (partial(device.dma_read, block, P - 4, 6), partial(device.dma_write, block, P, b"x")):
        with pytest.raises(GmemError) as fault:
            access()
        assert fault.value.outcome == "EFAULT"
    with pytest.raises(GmemError) as refused:
        device.populate(block, 0, P)
    assert refused.value.outcome == "EEXIST"


# ---- convert ---------------------------------------------------------------------------------------


@pytest.fixture
def ioctls(monkeypatch):
    """Write every conversion down; a test may append its listeners' events to the same list."""
    events = []
    original = GuestMemfd.set_memory_attributes

    def record(gmem, offset, size, attributes, flags=0, **more):
        events.append(("ioctl", offset // P, (offset + size) // P))
        return original(gmem, offset, size, attributes, flags, **more)

    monkeypatch.setattr(GuestMemfd, "set_memory_attributes", record)
    return events


def test_discard_comes_before_the_ioctl_and_populate_after_it(ioctls):
    vmm, _ = vmm_with_ram()
    vmm.register(Recorder(ioctls))
    del ioctls[:]
    vmm.convert(GPA, 4 * P, True)
    assert ioctls == [("discard", 0, 4), ("ioctl", 0, 4)]
    del ioctls[:]
    vmm.convert(GPA, 4 * P, False)
    assert ioctls == [("ioctl", 0, 4), ("populate", 0, 4)]


def three_slots():
    """Slots of two files over gpa 0..8 with a hole at 4..5, one file's halves the wrong way round."""
    vmm = Vmm(create_vm("SNP"))
    one, two = (vmm.vm.create_guest_memfd(4 * P, 3) for _ in range(2))
    blocks = [
        vmm.add_slot(0, 2 * P, one, 2 * P),
        vmm.add_slot(2 * P, 2 * P, one, 0),
        vmm.add_slot(5 * P, 3 * P, two, P),
    ]
    return vmm, blocks


def test_convert_walks_slots_and_their_offsets():
    vmm, (one, same, two) = three_slots()
    assert one is same
    vmm.convert(P, 2 * P, True)
    assert shared_pages(one) == {1, 2}
    assert one.gmem.runs() == [(0, 1, "private"), (1, 3, "shared"), (3, 4, "private")]
    vmm.convert(6 * P, P, True)
    assert shared_pages(two) == {0, 1, 3}
    assert len(vmm.blocks) == 2


@pytest.mark.parametrize(
    ("start", "size"), [(0, 8 * P), (3 * P, 2 * P), (4 * P, P), (7 * P, 2 * P), (1 << 40, P)]
)
def test_holes_are_skipped_to_shared_and_refused_to_private(start, size):
    vmm, (one, _, two) = three_slots()
    listener = Recorder()
    vmm.register(listener)
    told = list(listener.events)
    with pytest.raises(GmemError) as refused:
        vmm.convert(start, size, True)
    assert refused.value.outcome == "EINVAL"
    assert listener.events == told
    assert shared_pages(one) == shared_pages(two) == set(range(4))
    one.gmem.set_memory_attributes(0, 4 * P, PRIVATE)  # so that the ioctls to shared show
    vmm.convert(start, size, False)
    gpas = {0: 2, 1: 3, 2: 0, 3: 1}  # gpa page of slot 0 and 1 -> file page
    expected = {gpas[gpa] for gpa in gpas if start // P <= gpa < (start + size) // P}
    assert set(np.flatnonzero(~one.gmem.plane("private")).tolist()) == expected


@pytest.mark.parametrize(
    ("start", "size"), [(1, P), (0, 1), (0, 0), (-P, P), (0, -P), ((1 << 64) - P, 2 * P)]
)
@pytest.mark.parametrize("to_private", [True, False])
def test_unaligned_empty_and_wrapping_ranges_are_refused(start, size, to_private):
    vmm, _ = three_slots()
    with pytest.raises(GmemError) as refused:
        vmm.convert(start, size, to_private)
    assert refused.value.outcome == "EINVAL"


@pytest.mark.parametrize("abi", ["v5", "v13", "legacy"])
def test_without_private_memory_nothing_is_converted(abi):
    vmm, _ = vmm_with_ram("DEFAULT", abi)
    with pytest.raises(GmemError) as refused:
        vmm.convert(GPA, P, True)
    assert refused.value.outcome == "EINVAL"


def test_ram_larger_than_a_memslot_has_several(monkeypatch):
    monkeypatch.setattr("gmemcore.machine.memslots._PIECE", 4 * P)
    with Vmm(create_vm("SNP")) as vmm:
        block = vmm.add_ram(GPA, 9 * P)
        assert [slot.size for slot in vmm.vm.memslots] == [4 * P, 4 * P, P]
        assert vmm.blocks == [block]
        assert vmm.convert(GPA, 9 * P, to_private=True).counters.pages_changed == 9


def test_a_slot_of_somebody_else_is_a_hole():
    vmm, _ = vmm_with_ram(pages=4)
    vmm.vm.add_memslot(9, GPA + 4 * P, P, vmm.vm.create_guest_memfd(P, 3))
    with pytest.raises(GmemError) as refused:
        vmm.convert(GPA, 5 * P, True)
    assert refused.value.outcome == "EINVAL"


def test_the_caller_of_convert_learns_offset_and_file():
    vmm, (one, *_) = three_slots()
    one.gmem.pin(0, P)
    with pytest.raises(GmemError) as refused:
        vmm.convert(0, 4 * P, True)
    assert (refused.value.outcome, refused.value.error_offset) == ("EAGAIN", 0)
    assert repr(one.gmem) in refused.value.__notes__[0]


def test_notifications_are_counted():
    vmm, _ = vmm_with_ram()
    vmm.register(Recorder())
    vmm.register(Vfio())
    assert vmm.counters.notifications == 2
    assert vmm.convert(GPA + 2 * P, P, True).counters.notifications == 2
    assert vmm.convert(GPA + 2 * P, P, True).counters.notifications == 0
    result = vmm.convert(GPA, 16 * P, True)
    assert (result.counters.notifications, result.counters.pages_changed) == (4, 15)
    assert vmm.counters.notifications == 8
    assert vmm.vm.counters.notifications == 0


def test_with_two_backings_the_other_one_is_discarded_at_the_end():
    vmm, block = vmm_with_ram("SNP", "legacy")
    block.gmem.host_write(0, b"\xaa" * (2 * P))
    vmm.vm.launch_finish()
    vmm.convert(GPA, 2 * P, True)
    assert block.gmem.host_read(0, 2 * P) == bytes(2 * P)  # gone: it would double memory
    vmm.vm.accept(GPA, P)
    vmm.vm.guest_write(GPA, b"\xbb" * P)
    assert block.gmem.plane("allocated")[0]
    vmm.convert(GPA, 2 * P, False)
    assert not block.gmem.plane("allocated").any()
    assert vmm.vm.guest_read(GPA, P) == bytes(P)


def test_keeping_uses_what_is_offered_and_says_what_was_refused():
    vmm, _ = vmm_with_ram("SNP", "cipher", firmware="cipher")
    assert vmm.convert_keeping(GPA, P, True).flag == PRESERVE
    vmm.vm.launch_finish()
    kept = vmm.convert_keeping(GPA + P, P, True)
    assert (kept.flag, kept.refused) == (
        16,
        ("PRESERVE",),
    )  # believed, since one capability has to say it all
    vmm, _ = vmm_with_ram("SNP", "v13")
    assert vmm.convert_keeping(GPA, P, True).flag == 0
    vmm, _ = vmm_with_ram("SNP", "v5")
    with pytest.raises(GmemError) as refused:
        vmm.convert_keeping(GPA, P, False)
    assert refused.value.outcome == "EOPNOTSUPP"


# ---- undo of convert -------------------------------------------------------------------------------

SECTIONS, SECTION_PAGES = 64, 3


class Fault(Exception):
    """The injected failure."""


class Faults:
    """Counts the steps that can fail, and fails one of them."""

    def __init__(self):
        self.left = None

    def step(self):
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                self.left = None
                raise Fault


class Faulty:
    """A listener whose call-backs can fail."""

    def __init__(self, inner, faults):
        self.inner, self.faults = inner, faults

    def populate(self, *told):
        self.faults.step()
        self.inner.populate(*told)

    def discard(self, *told):
        self.faults.step()
        self.inner.discard(*told)


@pytest.fixture
def faults(monkeypatch):
    """Let every ioctl be a step that can fail."""
    faults = Faults()

    def faulty(original):
        def call(*arguments, **more):
            faults.step()
            return original(*arguments, **more)

        return call

    for kind in (GuestMemfd, Vm):
        monkeypatch.setattr(kind, "set_memory_attributes", faulty(kind.set_memory_attributes))
    return faults


def many_sections(vm_type, abi, faults):
    """64 slots of eight files, some of their pages private already, a device and another listener."""
    vmm = Vmm(create_vm(vm_type, abi, backing="none"))  # bytes are not what is looked at here
    files = [vmm.vm.create_guest_memfd(8 * SECTION_PAGES * P, 1 if abi == "legacy" else 3) for _ in range(8)]
    for section in range(SECTIONS):
        gmem_offset = section // 8 * SECTION_PAGES * P
        vmm.add_slot(section * SECTION_PAGES * P, SECTION_PAGES * P, files[section % 8], gmem_offset)
    device, recorder = Vfio(), Recorder()
    vmm.register(Faulty(device, faults))
    vmm.register(Faulty(recorder, faults))
    for section in range(SECTIONS):  # uniform either way, and mixed
        for page in range(SECTION_PAGES):
            if (section * 5 >> page) & 1:
                vmm.convert((section * SECTION_PAGES + page) * P, P, True)
    return vmm, device, recorder


def everything(vmm, device, recorder):
    """What has to be as before."""
    attributes = (
        vmm.vm.private_frames() if not vmm.supported.in_place else [b.gmem.runs() for b in vmm.blocks]
    )
    return (
        attributes,
        [block.bitmap.tobytes() for block in vmm.blocks],
        [device.mapped(block).tolist() for block in vmm.blocks],
        set(recorder.held),
        [block.gmem._shared.plane("pinned").tolist() for block in vmm.blocks],
    )


@pytest.mark.parametrize("to_private", [True, False], ids=["to_private", "to_shared"])
@pytest.mark.parametrize(
    ("vm_type", "abi"), [("SNP", "v5"), ("SW_PROTECTED", "v5"), ("TDX", "v13"), ("SNP", "legacy")]
)
def test_whichever_step_fails_everything_is_as_before(vm_type, abi, to_private, faults):
    vmm, *listeners = many_sections(vm_type, abi, faults)
    before = everything(vmm, *listeners)
    k = 0
    while True:
        k += 1
        faults.left = k
        try:
            vmm.convert(0, SECTIONS * SECTION_PAGES * P, to_private)
        except Fault:
            assert everything(vmm, *listeners) == before, f"step {k}"
        else:
            break
    assert faults.left is not None, "the last conversion met no fault"
    assert k > 2 * SECTIONS  # an ioctl each, and call-backs of two listeners
    (block_bits,) = {bits for block in vmm.blocks for bits in block.shared().tolist()}
    assert block_bits == (not to_private)


@pytest.mark.parametrize("to_private", [True, False], ids=["to_private", "to_shared"])
def test_a_userspace_that_does_not_undo_is_noticed(to_private, faults, monkeypatch):
    vmm, *listeners = many_sections("SNP", "v5", faults)
    before = everything(vmm, *listeners)
    monkeypatch.setattr(UndoLog, "__exit__", lambda *_: None)
    faults.left = 40
    with pytest.raises(Fault):
        vmm.convert(0, SECTIONS * SECTION_PAGES * P, to_private)
    for part_before, part_after in zip(before, everything(vmm, *listeners), strict=True):
        assert part_before != part_after


@pytest.mark.parametrize("section", [0, 7, 63])
@pytest.mark.parametrize(("to_private", "reason"), [(True, "ENOMEM"), (True, "EAGAIN"), (False, "ENOMEM")])
def test_a_section_that_the_kernel_refuses_is_undone(section, to_private, reason):
    vmm = Vmm(create_vm("SNP"), retries=1)
    blocks = [vmm.add_ram(i * P, P) for i in range(SECTIONS)]
    if not to_private:
        vmm.convert(0, SECTIONS * P, True)
    device, recorder = Vfio(), Recorder()
    if reason == "ENOMEM":
        vmm.register(device)
        blocks[section].gmem.fail_allocations_after(0)
    else:
        blocks[section].gmem.pin(0, P)  # somebody else's, whom nobody tells
    vmm.register(recorder)
    before = everything(vmm, device, recorder)
    with pytest.raises(GmemError) as refused:
        vmm.convert(0, SECTIONS * P, to_private)
    assert refused.value.outcome == reason
    assert everything(vmm, device, recorder) == before


def test_what_the_kernel_does_not_let_be_undone_is_said():
    """One file behind all sections, out of memory for good: the way back fails too."""
    vmm = Vmm(create_vm("SNP"), retries=1)
    gmem = vmm.vm.create_guest_memfd(4 * P, 3)
    for page in range(4):
        vmm.add_slot(page * P, P, gmem, page * P)
    gmem.fail_allocations_after(2)
    with pytest.raises(UndoError) as failed:
        vmm.convert(0, 4 * P, True)
    assert failed.value.__cause__.outcome == "ENOMEM"
    assert [failure.outcome for failure in failed.value.failures] == ["ENOMEM"] * 2
    gmem.fail_allocations_after(None)


@pytest.mark.parametrize("retries", [0, 2])  # on SNP the way back with PRESERVE is refused first
@pytest.mark.parametrize(
    ("vm_type", "flags", "kept"),
    [("SW_PROTECTED", PRESERVE, True), ("SW_PROTECTED", 0, False), ("SNP", PRESERVE, True)],
)
def test_undone_bytes_are_those_of_a_conversion_and_its_way_back(vm_type, flags, kept, retries):
    vmm = Vmm(create_vm(vm_type), retries=retries)
    blocks = [vmm.add_ram(i * P, P) for i in range(2)]
    blocks[0].gmem.host_write(0, b"\xbe\xef" * (P // 2))
    blocks[1].gmem.pin(0, P)
    with pytest.raises(GmemError):
        vmm.convert(0, 2 * P, True, flags)
    assert blocks[0].gmem.runs() == [(0, 1, "shared")]
    assert (blocks[0].gmem.host_read(0, P) == b"\xbe\xef" * (P // 2)) == kept


def test_the_way_back_outlasts_a_shortage_of_memory(monkeypatch):
    vmm = Vmm(create_vm("SNP"), retries=3)
    gmem = vmm.vm.create_guest_memfd(4 * P, 3)
    for page in range(4):
        vmm.add_slot(page * P, P, gmem, page * P)
    gmem.fail_allocations_after(2)
    original, refused = GuestMemfd.set_memory_attributes, []

    def short_for_a_while(file, *arguments):
        try:
            return original(file, *arguments)
        except GmemError:
            refused.append(arguments)
            if len(refused) == 3:
                file.fail_allocations_after(None)
            raise

    monkeypatch.setattr(GuestMemfd, "set_memory_attributes", short_for_a_while)
    with pytest.raises(GmemError) as stopped:
        vmm.convert(0, 4 * P, True)
    assert (stopped.value.outcome, len(refused)) == ("ENOMEM", 3)
    assert gmem.runs() == [(0, 4, "shared")]


def test_an_undone_conversion_with_two_backings_loses_nothing():
    vmm, block = vmm_with_ram("SNP", "legacy")
    block.gmem.host_write(0, b"\xaa" * P)
    vmm.add_ram(GPA + 16 * P, P).register(Refusing(2))
    with pytest.raises(RuntimeError):
        vmm.convert(GPA, 17 * P, True)
    assert block.gmem.host_read(0, P) == b"\xaa" * P


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_listeners_hold_what_is_shared_after_any_conversions(data):
    vm_type = data.draw(st.sampled_from(["SNP", "TDX", "PKVM"]))
    vmm = Vmm(create_vm(vm_type, data.draw(st.sampled_from(["v5", "v13"]))), retries=0)
    blocks = [
        vmm.add_ram(base * P, 6 * P, shared=shared) for base, shared in ((0, True), (6, False), (14, True))
    ]
    recorder = Recorder()
    vmm.register(recorder)
    foreign = data.draw(st.sampled_from([None, 0, 3]))
    if foreign is not None:
        blocks[2].gmem.pin(foreign * P, P)
    for _ in range(8):
        start = data.draw(st.integers(0, 20))
        size = data.draw(st.integers(1, 21 - start))
        before = [block.gmem.runs() for block in blocks]
        outcome = outcome_of(vmm.convert, start * P, size * P, data.draw(st.booleans()))
        assert outcome in ("OK", "EINVAL", "EAGAIN")
        assert outcome == "OK" or [block.gmem.runs() for block in blocks] == before
        held = {(id(block), page) for block in blocks for page in shared_pages(block)}
        assert recorder.held == held
        for block in blocks:
            assert block.shared().tolist() == (~block.gmem.plane("private")).tolist()


# ---- exits -----------------------------------------------------------------------------------------


def test_memory_faults_are_handled_by_converting():
    vmm, block = vmm_with_ram("SNP", "v13")
    vmm.vm.launch_finish()
    guest = GuestProgram(vmm)
    guest.write(GPA + P - 2, b"four", private=True)  # two pages: two faults, two accepts
    assert shared_pages(block) == set(range(2, 16))
    assert vmm.counters.memory_faults == 2
    assert guest.read(GPA + P - 2, 4, private=True) == b"four"
    assert guest.read(GPA, 1, private=False) != b""  # and back
    assert shared_pages(block) == {0, *range(2, 16)}
    assert vmm.counters.memory_faults == 3


def test_a_fault_in_a_hole_stops_the_guest():
    vmm, _ = vmm_with_ram("SNP", "v13", pages=1)
    with pytest.raises(GmemError) as stopped:
        vmm.run(partial(vmm.vm.guest_read, GPA + P, P, True))
    assert stopped.value.outcome == "EINVAL"
    with pytest.raises(MmioExit):
        vmm.run(partial(vmm.vm.guest_read, GPA + P, 1, False))


def test_a_guest_that_never_gets_on_is_stopped():
    vmm, _ = vmm_with_ram("SNP", "v13")
    tries = []

    def fault():
        tries.append(1)
        raise MemoryFaultExit("again", GPA, P, PRIVATE)

    with pytest.raises(MemoryFaultExit):
        vmm.run(fault, exits=5)
    assert len(tries) == 6


def test_a_vmm_closes_its_vm():
    with vmm_with_ram()[0] as vmm:
        pass
    assert vmm.blocks[0].gmem.closed
