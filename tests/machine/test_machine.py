"""The machine as users meet it: files, memslots, accesses, launch, raw ioctls, views, errors."""

import os
import pickle
import struct
import threading
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

import gmemcore
from gmemcore import errors, policy
from gmemcore.engine.backing import (
    BACKINGS,
    AnonymousBacking,
    MemfdBacking,
    check_host_can_hold,
    discard,
    lazy_words,
)
from gmemcore.policy import EFFECTS, ByteOperation, Rule, get_abi
from gmemcore.policy.effects import Effect
from support.kinds import P
from support.oracle import key_stream_page
from support.paths import JIT_DISABLED

GPA = 1 << 32
SET2, SET1 = 0xC080AED2, 0x4020AED2


def machine(vm_type="SNP", abi="v5", pages=16, flags=3, **options):
    vm = gmemcore.create_vm(vm_type, abi, **options)
    gmem = vm.create_guest_memfd(pages * P, flags)
    vm.add_memslot(1, GPA, pages * P, gmem)
    return vm, gmem


def outcome(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except errors.GmemError as error:
        return error.outcome
    return "OK"


# ---- the promise the interface documents ---------------------------------------------------------


def test_0xbeef_written_by_the_host_is_read_by_the_guest():
    vm, gmem = machine()
    gmem.host_write(0, b"\xef\xbe")
    gmem.set_memory_attributes(0, P, 8, 2)
    result = vm.launch_update(GPA, P)
    assert (result.pages_done, result.counters.bytes_xored) == (1, P)
    vm.launch_finish()
    assert vm.guest_read(GPA, 2, private=True) == b"\xef\xbe"
    assert gmem.memory[:2].tobytes() != b"\xef\xbe"


def test_accesses_cross_memslots_and_pages_of_both_kinds():
    vm, first = machine(pages=2)
    second = vm.create_guest_memfd(2 * P, 3)
    vm.add_memslot(2, GPA + 2 * P, 2 * P, second)
    second.set_memory_attributes(0, P, 8)
    vm.accept(GPA + 2 * P, P)
    data = bytes(range(256)) * 40
    vm.guest_write(GPA + P + 77, data)
    assert vm.guest_read(GPA + P + 77, len(data)) == data
    assert first.memory[P + 77 :].tobytes() == data[: P - 77]
    assert second.memory[: P - 1].tobytes() != data[P - 77 :][: P - 1]
    assert second.memory[P : P + 100].tobytes() == data[2 * P - 77 :][:100]


@pytest.mark.parametrize(
    ("private", "expected"),
    [(True, "MEMORY_FAULT"), (False, "MMIO"), (None, "MMIO")],
)
def test_a_hole_counts_as_shared(private, expected):
    vm, _ = machine()
    assert outcome(vm.guest_read, GPA + 15 * P, 2 * P, private) == ("MEMORY_FAULT" if private else expected)
    assert outcome(vm.guest_read, 0, 1, private) == expected


def test_a_memory_fault_tells_page_and_kind():
    vm, gmem = machine()
    gmem.set_memory_attributes(3 * P, P, 8)
    with pytest.raises(errors.MemoryFaultExit) as raised:
        vm.guest_read(GPA + 2 * P + 5, 2 * P, private=False)
    assert (raised.value.gpa, raised.value.size, raised.value.flags) == (GPA + 3 * P, P, 0)
    with pytest.raises(errors.MemoryFaultExit) as raised:
        vm.guest_write(GPA, b"x", private=True)
    assert raised.value.flags == 8
    assert vm.counters.memory_faults == 2


def test_poison_stops_everybody_until_the_hole_is_punched():
    vm, gmem = machine("SW_PROTECTED", "v13")
    gmem.host_write(0, b"x")
    gmem.poison(0)
    assert outcome(gmem.host_read, 0, 1) == "SIGBUS"
    assert outcome(vm.guest_read, GPA, 1) == "EHWPOISON"
    assert outcome(gmem.set_memory_attributes, 0, P, 8) == "OK"
    gmem.fallocate(3, 0, P)
    assert vm.guest_read(GPA, 1) == b"\0"
    assert outcome(gmem.poison, P) == "EINVAL"
    assert outcome(gmem.poison, 99 * P) == "EINVAL"


def test_attributes_survive_a_memslot():
    vm, gmem = machine()
    gmem.set_memory_attributes(0, P, 8)
    assert [slot.slot for slot in vm.memslots] == [1]
    vm.delete_memslot(1)
    assert outcome(vm.delete_memslot, 1) == "EINVAL"
    assert outcome(vm.guest_read, GPA, 1, False) == "MMIO"
    assert gmem.runs() == [(0, 1, "private"), (1, 16, "shared")]


def test_memslots_refuse_what_kvm_refuses():
    vm, gmem = machine(pages=4)
    other = gmemcore.create_vm("SNP").create_guest_memfd(P, 3)
    closed = vm.create_guest_memfd(P, 3)
    closed.close()
    for arguments, expected in (
        ((1, 0, P, gmem), "EINVAL"),
        ((2, 0, P, None), "EBADF"),
        ((2, 0, P, closed), "EBADF"),
        ((2, 0, P, other), "EINVAL"),
        ((2, 0, 0, gmem), "EINVAL"),
        ((2, 1, P, gmem), "EINVAL"),
        ((2, 0, P, gmem, 1), "EINVAL"),
        ((2, 0, P, gmem, 4 * P), "EINVAL"),
        ((2, (1 << 64) - P, 2 * P, gmem), "EINVAL"),
        ((2, GPA + P, P, gmem), "EEXIST"),
        ((2, 0, P, gmem, P), "EEXIST"),
    ):
        assert outcome(vm.add_memslot, *arguments) == expected, arguments
    assert len(vm.memslots) == 1


# ---- launch --------------------------------------------------------------------------------------


def test_a_cpuid_page_is_corrected_once():
    """The retry of the thread: refused, converted back, read by the host, converted, accepted."""
    vm, gmem = machine()
    gmem.host_write(0, b"wrong")
    gmem.set_memory_attributes(0, P, 8, 2)
    vm.correct_cpuid(b"right")
    with pytest.raises(errors.LaunchUpdateError) as raised:
        vm.launch_update(GPA, P, None, "CPUID")
    assert (raised.value.outcome, raised.value.pages_done) == ("EIO", 0)
    gmem.set_memory_attributes(0, P, 0)
    assert gmem.host_read(0, 5) == b"right"
    gmem.set_memory_attributes(0, P, 8, 2)
    assert vm.launch_update(GPA, P, None, "CPUID").pages_done == 1


def test_launch_refuses():
    vm, gmem = machine()
    gmem.set_memory_attributes(0, P, 8)
    for arguments, expected in (
        ((GPA, 0), "EINVAL"),
        ((GPA + 1, P), "EINVAL"),
        ((GPA, P, b"short"), "EINVAL"),
        ((GPA, P, None, "GOLD"), "EINVAL"),
        ((GPA + P, P), "EIO"),
        ((0, P), "EINVAL"),
        ((GPA, P, b"s" * P, "VMSA"), "EINVAL"),
    ):
        assert outcome(vm.launch_update, *arguments) == expected, arguments
    assert vm.launch_update(GPA, 2 * P, b"s" * 2 * P).pages_done == 1
    for vmsa in (b"", b"v" * (P - 1), b"v" * (P + 1)):
        assert outcome(vm.launch_finish, [b"v" * P, vmsa]) == "EINVAL"
    assert vm.phase == "launching"
    vm.launch_finish()
    assert outcome(vm.launch_finish) == "EINVAL"
    assert outcome(gmemcore.create_vm("DEFAULT").launch_update, 0, P) == "EINVAL"
    for correction in (b"", b"x" * 5000):
        with pytest.raises(errors.InvalidArgumentError):
            vm.correct_cpuid(correction)
    vm.correct_cpuid(None)


def test_the_source_wins_and_zero_pages_ignore_it():
    vm, gmem = machine()
    gmem.host_write(0, b"in place")
    gmem.set_memory_attributes(0, 2 * P, 8, 2)
    vm.launch_update(GPA, P, b"s" * P)
    vm.launch_update(GPA + P, P, b"s" * P, "ZERO")
    vm.launch_finish()
    assert vm.guest_read(GPA, P) == b"s" * P
    assert vm.guest_read(GPA + P, P) == bytes(P)


# ---- raw ioctls ----------------------------------------------------------------------------------


def test_error_offset_is_copied_out_and_a_readonly_struct_faults():
    vm, gmem = machine("SW_PROTECTED", "v13")
    gmem.pin(7 * P, P)
    argument = struct.pack("<16Q", 0, 16 * P, 8, *[0] * 13)
    writable = bytearray(argument)
    assert outcome(gmem.ioctl, SET2, writable) == "EAGAIN"
    assert struct.unpack_from("<Q", writable, 32)[0] == 7 * P
    assert outcome(gmem.ioctl, SET2, argument) == "EFAULT"
    assert outcome(gmem.ioctl, SET2, None) == "EFAULT"
    assert outcome(gmem.ioctl, SET1, writable) == "ENOTTY"
    with pytest.raises(TypeError):
        gmem.ioctl(SET2, "text")
    assert outcome(vm.ioctl, SET1, bytearray(struct.pack("<4Q", 0, P, 0, 0))) == "OK"
    assert outcome(vm.ioctl, SET1, bytearray(struct.pack("<4Q", 0, P, 8, 0))) == "EINVAL"
    assert outcome(vm.ioctl, SET2, writable) == "ENOTTY"


def test_the_vm_fd_checks_before_it_does_nothing():
    vm, _ = machine()
    for arguments, expected in (
        ((0, P, 0), "OK"),
        ((0, P, 0, 1), "EINVAL"),
        ((0, P, 8), "EINVAL"),
        ((0, 0, 0), "EINVAL"),
        ((1, P, 0), "EINVAL"),
        (((1 << 64) - P, 2 * P, 0), "EINVAL"),
    ):
        assert outcome(vm.set_memory_attributes, *arguments) == expected, arguments


# ---- two backings --------------------------------------------------------------------------------


def test_legacy_keeps_two_sides_until_one_is_discarded():
    vm, gmem = machine("SW_PROTECTED", "legacy", flags=0)
    vm.guest_write(GPA, b"shared")
    vm.set_memory_attributes(GPA, P, 8)
    assert vm.guest_read(GPA, 6) == bytes(6)
    vm.guest_write(GPA, b"secret")
    assert gmem.host_read(0, 6) == b"shared"
    assert vm.guest_read(GPA - 0, 6) == b"secret"
    gmem.discard_shared(0, P)
    vm.set_memory_attributes(GPA, P, 0)
    assert vm.guest_read(GPA, 6) == bytes(6)
    assert vm.private_frames() == []
    assert outcome(gmem.set_memory_attributes, 0, P, 8) == "ENOTTY"
    assert outcome(gmem.ioctl, SET2, bytearray(128)) == "ENOTTY"
    assert outcome(gmem.discard_shared, 0, 99 * P) == "EINVAL"
    assert outcome(vm.create_guest_memfd, P, 2) == "EINVAL"


def test_legacy_accesses_follow_the_frames_attributes():
    vm, _ = machine("SW_PROTECTED", "legacy", flags=0)
    vm.set_memory_attributes(GPA + P, P, 8)
    vm.set_memory_attributes(GPA + 3 * P, P, 8)
    data = bytes(np.random.default_rng(1).integers(0, 256, 5 * P, np.uint8))
    vm.guest_write(GPA + 9, data)
    assert vm.guest_read(GPA + 9, 5 * P) == data
    assert vm.private_frames() == [(GPA // P + 1, GPA // P + 2), (GPA // P + 3, GPA // P + 4)]
    assert outcome(vm.guest_read, 0, 1) == "MMIO"


@pytest.mark.parametrize("seed", range(3))
def test_private_frames_are_a_set_of_numbers(seed):
    """Against a plain set: runs, pages changed, blocks split and merged."""
    rng = np.random.default_rng(seed)
    vm, plain = gmemcore.create_vm("SNP", "legacy"), set()

    def mixed():
        blocks = {page // 512 for page in plain}
        return {b for b in blocks if not {*range(b * 512, b * 512 + 512)} <= plain}

    for _ in range(60):
        start = int(rng.integers(0, 2000))
        end = start + int(rng.integers(1, 700))
        private = bool(rng.integers(2))
        before, was = set(plain), mixed()
        plain = plain | {*range(start, end)} if private else plain - {*range(start, end)}
        counters = vm.set_memory_attributes(start * P, (end - start) * P, 8 * private).counters
        assert counters.pages_changed == len(before ^ plain)
        assert counters.blocks_2m_split == len(mixed() - was)
        assert counters.blocks_2m_merged == len(was - mixed())
        assert {page for low, high in vm.private_frames() for page in range(low, high)} == plain


def test_any_number_of_private_frames_is_kept():
    """More edges than there is room for at first, set in random order and taken away again."""
    vm, frames = gmemcore.create_vm("SNP", "legacy"), np.random.default_rng(3).permutation(3000)
    for frame in frames.tolist():
        vm.set_memory_attributes(2 * frame * P, P, 8)
    assert vm.private_frames() == [(2 * frame, 2 * frame + 1) for frame in range(3000)]
    assert vm.counters.pages_changed == 3000
    vm.set_memory_attributes(P, (1 << 60) - P, 0)
    assert vm.private_frames() == [(0, 1)]


def test_each_abi_has_its_vm():
    assert isinstance(gmemcore.create_vm("SNP", "legacy"), gmemcore.LegacyVm)
    assert isinstance(gmemcore.create_vm("SNP", "merged"), gmemcore.Vm)
    assert gmemcore.Vm("SNP", "legacy").private_frames() == []
    with pytest.raises(errors.InvalidArgumentError, match="in place"):
        gmemcore.LegacyVm("SNP", "v5")


# ---- files ---------------------------------------------------------------------------------------


def test_mappings_read_and_write_within_themselves():
    _, gmem = machine()
    mapping = gmem.mmap(P, 2 * P)
    mapping.write(5, b"hello")
    assert gmem.host_read(P + 5, 5) == b"hello" == mapping.read(5, 5)
    assert outcome(mapping.read, 2 * P, 1) == "EFAULT"
    words = np.ones(2, np.uint64)  # bytes count, not elements
    mapping.write(2 * P - 16, words)
    assert outcome(mapping.write, 2 * P - 8, words) == "EFAULT"
    assert gmem.host_read(3 * P, 8) == bytes(8)
    assert outcome(gmem.mmap, 0, 0) == "EINVAL"
    assert outcome(gmem.mmap, 1, P) == "EINVAL"


def test_pins_are_all_or_nothing():
    _, gmem = machine()
    gmem.set_memory_attributes(2 * P, P, 8)
    assert outcome(gmem.pin, 0, 4 * P) == "EFAULT"
    assert not gmem.plane("pinned").any()
    assert outcome(gmem.pin, 15 * P, 2 * P) == "EFAULT"
    assert outcome(gmem.unpin, 15 * P, 2 * P) == "EFAULT"
    assert outcome(gmem.pin, 0, 0) == "EINVAL"
    gmem.pin(0, 2 * P)
    with pytest.raises(errors.PagePinnedError) as raised:
        gmem.set_memory_attributes(P, 8 * P, 8)
    assert raised.value.error_offset == P
    assert gmem.set_memory_attributes(0, 2 * P, 0).counters.pages_changed == 0


def test_views_are_live_and_readonly():
    _, gmem = machine(pages=1025)
    states, memory = gmem.page_states(), gmem.memory
    assert states.shape == (1,)
    assert states.dtype.names == ("private", "allocated", "assigned", "accepted", "pinned", "poisoned")
    for view in (states, memory):
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 0
    for start, size in ((0, 1025), (3, 600), (1024, 1)):
        gmem.set_memory_attributes(start * P, size * P, 8)
        bits = np.unpackbits(states["private"].copy().view(np.uint8).ravel(), bitorder="little")[:1025]
        assert (bits == gmem.plane("private")).all()
        gmem.set_memory_attributes(start * P, size * P, 0)
        assert not states["private"].any()
    gmem.host_write(0, b"live")
    assert memory[:4].tobytes() == b"live"


def test_views_keep_memory_alive():
    vm, gmem = machine()
    gmem.host_write(0, b"still here")
    view = gmem.memory
    vm.close()
    vm.close()
    assert view[:10].tobytes() == b"still here"
    for call in (gmem.runs, gmem.page_states, lambda: gmem.host_read(0, 1), lambda: gmem.pin(0, P)):
        assert outcome(call) == "EBADF"
    assert outcome(vm.guest_read, GPA, 1) == "MMIO"
    assert gmem.closed


def test_context_managers_close():
    with gmemcore.create_vm("SNP") as vm, vm.create_guest_memfd(P, 3) as gmem:
        assert "SNP" in repr(vm)
        assert "0x1000" in repr(gmem)
    assert gmem.closed


# ---- attributes only -----------------------------------------------------------------------------


def test_a_guest_larger_than_the_host_has_attributes():
    vm = gmemcore.create_vm("TDX", backing="none")
    gmem = vm.create_guest_memfd(1 << 40, 2)
    result = gmem.set_memory_attributes(1 << 21, (1 << 40) - (1 << 22), 8)
    assert result.counters.pages_changed == (1 << 28) - 1024
    assert gmem.runs() == [
        (0, 512, "shared"),
        (512, (1 << 28) - 512, "private"),
        ((1 << 28) - 512, 1 << 28, "shared"),
    ]
    vm.add_memslot(0, 0, 1 << 40, gmem)
    for call in (
        lambda: gmem.host_read(0, 1),
        lambda: gmem.host_write(0, b"x"),
        lambda: vm.guest_read(0, 1),
        lambda: gmem.memory,
        lambda: vm.launch_update(1 << 21, P, b"x" * P),
    ):
        assert outcome(call) == "ENOTSUP"
    assert vm.launch_update(1 << 21, 2 * P, None).pages_done == 2
    assert gmem.fallocate(1, 0, 1 << 40).pages_allocated == (1 << 28) - 2
    assert gmem.fallocate(3, 0, 1 << 40).sept_changes == 2


def test_more_bytes_than_the_host_has_are_refused():
    vm = gmemcore.create_vm("SNP")
    for backing in ("anonymous", "memfd"):
        with pytest.raises(errors.OutOfMemoryError, match="more than this host"):
            BACKINGS[backing](1 << 60)
    assert outcome(vm.create_guest_memfd, 1 << 60, 3) == "ENOMEM"
    assert outcome(vm.create_guest_memfd, (1 << 60) + 1, 3) == "EINVAL"
    assert not vm.files
    check_host_can_hold(P)
    with pytest.raises(errors.OutOfMemoryError):
        lazy_words(1 << 60)


# ---- backings ------------------------------------------------------------------------------------

NEW_BACKINGS = {
    "anonymous": lambda size: AnonymousBacking(size),
    "anonymous, huge pages": lambda size: AnonymousBacking(size, huge_pages=True),
    "anonymous, prefaulted": lambda size: AnonymousBacking(size, prefault=True),
    "memfd": lambda size: MemfdBacking(size),
    "memfd, prefaulted": lambda size: MemfdBacking(size, prefault=True),
}


@pytest.mark.parametrize("new", NEW_BACKINGS.values(), ids=NEW_BACKINGS)
def test_the_contract_of_backings(new):
    """Zero until written; zero again once released; what is allocated can be written."""
    backing = new(1 << 22)
    assert backing.words.shape == (1 << 19,)
    assert not backing.words.any()
    gmem = gmemcore.create_vm("SNP", backing=lambda _: backing).create_guest_memfd(1 << 22, 3)
    gmem.fallocate(1, P, 2 * P)
    backing.words[:] = 7
    gmem.fallocate(3, P, 2 * P)
    assert not backing.words[512:1536].any()
    assert (backing.words[1536:] == 7).all()
    discard(backing)
    assert not backing.words.any()
    backing.words[:] = 7
    view = backing.words[-1:]
    backing.close()
    backing.close()
    assert view[0] == 7
    assert len(backing.words) == 0


def test_backings_are_chosen_by_name():
    assert machine(backing="memfd", prefault=True)[1].host_read(0, 4) == bytes(4)
    with pytest.raises(errors.InvalidArgumentError, match="unknown backing 'tape'"):
        gmemcore.create_vm("SNP", backing="tape")
    with pytest.raises(errors.InvalidArgumentError, match="huge_pages needs backing anonymous, not none"):
        machine(backing="none", huge_pages=True)
    with pytest.raises(
        errors.InvalidArgumentError, match="prefault needs backing anonymous or memfd or guest"
    ):
        machine(backing="none", prefault=True)


def test_a_backing_with_a_path_is_one_class_and_one_row(monkeypatch, tmp_path):
    """It is listed, takes its options, keeps its bytes in the file, and may raise anything."""

    class Filed(MemfdBacking):
        """A file of a folder."""

        def __init__(self, size, *, prefault=False, fails=False):
            if fails:
                {}[size] += "of its own"
            super().__init__(size, prefault=prefault)

        def open_file(self, size):
            fd = os.open(tmp_path / "guest", os.O_RDWR | os.O_CREAT)
            os.ftruncate(fd, size)
            return fd

    monkeypatch.setitem(BACKINGS, "filed", Filed)
    vm, gmem = machine(backing="filed", prefault=True, enforce="mprotect")
    gmem.host_write(0, b"in the file")
    gmem.mmap(0, P).array[100] = 7
    assert gmem.count("allocated") == 1
    assert (tmp_path / "guest").read_bytes()[:11] == b"in the file"
    gmem.fallocate(3, 0, P)
    assert not any((tmp_path / "guest").read_bytes())
    vm.close()
    with pytest.raises(errors.InvalidArgumentError, match="huge_pages needs backing anonymous, not filed"):
        machine(backing="filed", huge_pages=True)
    with pytest.raises(errors.UnsupportedOperationError, match="needs backing memfd or guest_memfd or filed"):
        machine(enforce="mprotect")
    with pytest.raises(errors.InvalidArgumentError, match=r"known: .*filed"):
        machine(backing="tape")


@pytest.mark.parametrize("raised", [TypeError("its own"), ValueError("5"), OSError(5, "bad"), KeyError("x")])
@pytest.mark.parametrize("abi", ["v5", "legacy"])
@pytest.mark.parametrize("options", ["prefault", "any", "everything"])
def test_what_a_backing_raises_comes_through(monkeypatch, raised, abi, options):
    def fail(*_, **__):
        raise raised

    broken = {
        "prefault": lambda size, *, prefault=False: fail(),
        "any": lambda size, **options: fail(),
        "everything": fail,
    }[options]
    monkeypatch.setitem(BACKINGS, "broken", broken)
    for vm in (
        gmemcore.create_vm("SNP", abi, backing="broken"),
        gmemcore.create_vm("SNP", abi, backing="broken", prefault=True),
        gmemcore.create_vm("SNP", abi, backing=broken),
    ):
        with pytest.raises(type(raised)) as found:
            vm.create_guest_memfd(P, 0 if abi == "legacy" else 3)
        assert found.value is raised
        assert vm.files == []


def test_populate_works_on_kernels_without_the_advice(monkeypatch):
    from gmemcore.engine import backing

    monkeypatch.setattr(backing, "MADV_POPULATE_WRITE", 9999)
    assert not MemfdBacking(1 << 16, prefault=True).words.any()


def test_a_new_effect_is_a_row(monkeypatch):
    """A row of effects, a row of policy: the engine does it without an edit."""
    none, zero = ByteOperation.NONE, ByteOperation.ZERO
    monkeypatch.setitem(EFFECTS, "FORGET", Effect("FORGET", (none, zero, none, none), None, "host bytes go"))
    v5 = get_abi("v5")
    preserve = policy.ABIS["v5"].flags[1]
    rows = [row for row in v5.rules if row.flag != preserve.bit]
    forget = Rule(frozenset({gmemcore.VmType.SNP}), preserve.bit, "FORGET", "why not", "a test")
    vm, gmem = machine(abi=replace(v5, name="forgetful", rules=(*rows, forget)))
    gmem.host_write(0, b"x")
    assert gmem.set_memory_attributes(0, 2 * P, 8, 2).counters.bytes_zeroed == P
    assert not gmem.memory.any()
    assert vm.check_cap("MEMORY_ATTRIBUTES2_FLAGS") == 3


# ---- batches, faults, threads --------------------------------------------------------------------


def test_a_batch_goes_on_after_a_failure():
    _, gmem = machine("SW_PROTECTED", "v5")
    gmem.pin(0, P)
    batch = gmem.set_memory_attributes_many([0, P, 5, 3 * P], [P, P, P, P], [8, 8, 8, 8], [2, 2, 2, 64])
    assert batch.errno.tolist() == [11, 0, 22, 22]
    assert batch.error_offset.tolist() == [0, 0, 0, 0]
    assert batch.counters["pages_changed"].tolist() == [0, 1, 0, 0]
    assert batch.total.pages_changed == 1
    assert len(gmem.set_memory_attributes_many([], [], 8).errno) == 0
    assert outcome(gmem.set_memory_attributes_many, [0], [P, P], 8) == "EINVAL"
    assert outcome(gmem.set_memory_attributes_many, np.array([-1]), [P], 8) == "EINVAL"
    assert gmem.set_memory_attributes_many([1 << 63], np.array([P], ">u8"), 8).errno.tolist() == [22]


def test_results_are_values():
    _, gmem = machine("SW_PROTECTED", "v13")
    first, again = (gmem.set_memory_attributes(0, P, attributes) for attributes in (8, 8))
    assert first != again
    assert again == gmem.set_memory_attributes(0, P, 8)
    assert len({first, again}) == 2
    assert "pages_changed=1" in repr(first)
    assert (first.counters + first.counters - again.counters).asdict()["pages_changed"] == 2


def test_a_failing_allocation_changes_nothing_and_the_next_call_succeeds():
    vm, gmem = machine("SNP", "two-caps", firmware="cipher")
    vm.launch_finish()
    for allowed in range(17):
        gmem.fail_allocations_after(allowed)
        with pytest.raises(errors.OutOfMemoryError) as raised:
            gmem.set_memory_attributes(0, 16 * P, 8, 2)
        assert raised.value.error_offset == 0
        assert gmem.runs() == [(0, 16, "shared")]
        assert not gmem.plane("allocated").any()
    gmem.fail_allocations_after(17)
    assert gmem.set_memory_attributes(0, 16 * P, 8, 2).counters.pages_allocated == 16
    gmem.fail_allocations_after(None)
    gmem.set_memory_attributes(0, 16 * P, 0, 2)
    assert not gmem.memory.any()


@pytest.mark.skipif(JIT_DISABLED, reason="plain Python kernels take turns anyway")
def test_threads_leave_a_state_that_some_order_leaves():
    """XOR an even number of times from 8 threads over overlapping ranges: every word must come back."""
    vm, gmem = machine("SNP", "two-caps", pages=600, firmware="cipher")
    vm.launch_finish()
    content = np.random.default_rng(2).integers(0, 256, 600 * P, np.uint8).tobytes()
    gmem.host_write(0, content)

    def convert(seed):
        rng = np.random.default_rng(seed)
        for _ in range(150):
            start = int(rng.integers(0, 500))
            size = int(rng.integers(1, 100)) * P
            gmem.set_memory_attributes(start * P, size, int(rng.integers(2)) * 8, 2)

    threads = [threading.Thread(target=convert, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    gmem.set_memory_attributes(0, 600 * P, 0, 2)
    assert gmem.host_read(0, 600 * P) == content


def test_errors_travel_between_processes():
    _, gmem = machine()
    for call in (
        lambda: gmem.set_memory_attributes(0, P, 8, 1),
        lambda: gmem.host_read(99 * P, 1),
        lambda: gmem.vm.guest_read(0, 1, True),
        lambda: gmem.vm.launch_update(0, P),
    ):
        with pytest.raises(errors.GmemError) as raised:
            call()
        copy = pickle.loads(pickle.dumps(raised.value))
        assert type(copy) is type(raised.value)
        assert (str(copy), copy.outcome, copy.errno) == (
            str(raised.value),
            raised.value.outcome,
            raised.value.errno,
        )
        assert vars(copy) == vars(raised.value)


def test_data_to_write_is_bytes():
    vm, gmem = machine()
    for data in (bytearray(b"ab"), memoryview(b"ab"), np.array([97, 98], np.uint8)):
        gmem.host_write(0, data)
        assert vm.guest_read(GPA, 2) == b"ab"
    for data in ("ab", 5, None, np.zeros((4, 4), np.uint8)[:, ::2]):
        with pytest.raises(TypeError):
            gmem.host_write(0, data)
    assert outcome(gmem.host_write, 0, b"") == "EINVAL"
    assert outcome(gmem.host_read, 0, 0) == "EINVAL"
    assert outcome(vm.guest_read, 0, 0) == "EINVAL"
    with pytest.raises(TypeError):
        vm.guest_read(GPA, 1, 1)


def test_page_state_depends_on_nothing_that_lay_in_memory_before(monkeypatch):
    """Lines come from memory that isn't cleared: whatever it holds, they are written before they are read."""
    import gmemcore.engine.state as state

    pages = 3 * 512 + 77
    requests = [
        (511, 2, 0),
        (0, 1, 0),
        (1, 511, 0),
        (700, 900, 0),
        (3 * 512, 77, 0),
        (600, 300, 8),
        (0, 3, 8),
    ]
    seen = []
    for garbage in (0, 0xDEAD_BEEF_0BAD_F00D, (1 << 64) - 1):
        monkeypatch.setattr(state, "unwritten_words", lambda n, word=garbage: np.full(n, word, np.uint64))
        gmem = gmemcore.create_vm("SNP", backing="none").create_guest_memfd(pages * 4096)
        for start, count, attributes in requests:
            gmem.set_memory_attributes(start * 4096, count * 4096, attributes)
            gmem.fallocate(3 if attributes else 1, start * 4096, count * 4096)
        planes = [gmem.plane(name).tobytes() for name in ("private", "allocated", "assigned")]
        states = gmem.page_states()
        rows = [states[name].tobytes() for name in states.dtype.names]
        seen.append((gmem.runs(), planes, rows))
    assert seen[0] == seen[1] == seen[2]


def test_page_state_beyond_the_address_space_is_enomem(monkeypatch):
    from gmemcore.engine.backing import unwritten_words

    with pytest.raises(errors.OutOfMemoryError, match="can't map"):
        unwritten_words(1 << 60)
    monkeypatch.setattr(np, "empty", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(errors.OutOfMemoryError, match="can't map"):
        unwritten_words(512)


def test_runs_of_pages_in_one_state_are_those_of_the_planes():
    choose = np.random.default_rng(7)
    for pages in (5, 512, 513, 3 * 512 + 77):
        vm = gmemcore.create_vm("SNP", backing="none")
        gmem = vm.create_guest_memfd(pages * P)
        for step in range(30):
            start = int(choose.integers(pages))
            count = int(choose.integers(1, pages - start + 1))
            if step % 3:
                gmem.set_memory_attributes(start * P, count * P, 8 * (step % 2))
            else:
                gmem.fallocate(3 if step % 4 else 1, start * P, count * P)
            planes = {name: gmem.plane(name) for name in ("private", "allocated")}
            runs = gmem.state_runs(start * P, count * P)
            listed = [names for low, high, names in runs for _ in range(low, high)]
            assert listed == [
                tuple(name for name in planes if planes[name][page]) for page in range(start, start + count)
            ]
            assert all(one[2] != other[2] for one, other in pairwise(runs))
            some = sorted({0, start, start + count // 2, start + count - 1})
            assert gmem.planes_of(some).tolist() == [
                sum(bit for bit, name in enumerate(planes, start=1) if planes[name][page]) for page in some
            ]
            where = np.flatnonzero(planes["private"] & ~planes["allocated"])
            assert gmem.find_page(["private"], ["allocated"]) == (int(where[0]) * P if len(where) else None)


@pytest.mark.parametrize("room", [1, 40_000, 1 << 21])
def test_ends_of_runs_are_where_the_plane_changes(room, monkeypatch):
    """With any room at first: in blocks that are uniform, mixed or short, and groups of them."""
    from gmemcore.engine import store

    monkeypatch.setattr(store, "_MANY_RUNS", room)
    choose = np.random.default_rng(7)
    for pages in (1, 63, 512, 513, 64 * 512, 130 * 512 + 77):
        gmem = gmemcore.create_vm("SNP", backing="none").create_guest_memfd(pages * P, 3)
        for dense in (False, True):
            if dense:
                every_third = np.arange(0, pages, 3, dtype=np.uint64) * np.uint64(P)
                gmem.set_memory_attributes_many(every_third[:3000], np.full(len(every_third[:3000]), P), 8)
            starts = choose.integers(0, pages, 30)
            ends = np.minimum(starts + choose.integers(1, 2000, 30), pages)
            gmem.set_memory_attributes_many(starts * P, (ends - starts) * P, choose.integers(0, 2, 30) * 8)
            plane = gmem.plane("private")
            assert gmem.run_ends().tolist() == [
                *(np.flatnonzero(plane[1:] != plane[:-1]) + 1).tolist(),
                pages,
            ]


def test_a_short_last_block_is_full_by_the_count_of_a_mixed_one():
    gmem = gmemcore.create_vm("SNP", backing="none").create_guest_memfd((512 + 77) * P, 3)
    gmem.set_memory_attributes(100 * P, 77 * P, 8)
    gmem.set_memory_attributes(512 * P, 77 * P, 8)
    private = [(low, high) for low, high, names in gmem.state_runs(0, gmem.size) if "private" in names]
    assert private == [(100, 177), (512, 589)]
    assert outcome(gmem.state_runs, 0, gmem.size + P) == "EINVAL"
    assert (gmem.planes_of([99, 100, 176, 177, 511, 512, 588]) & 1).tolist() == [
        0,
        1,
        1,
        0,
        0,
        1,
        1,
    ]
    assert len(gmem.planes_of([])) == 0
    assert {outcome(gmem.planes_of, [page]) for page in (589, -1, 1 << 64)} == {"EINVAL"}
    assert outcome(gmem.find_page, ["colour"]) == "EINVAL"


@pytest.mark.parametrize("offset", [0, 1, 7, 8, P - 3, 3 * P - 5])
@pytest.mark.parametrize("size", [1, 7, 8, 9, P, 2 * P + 11, (256 << 10) + 13, (512 << 10)])
def test_a_guests_write_is_its_bytes_through_the_key_stream_and_no_other_byte(offset, size):
    """At every alignment, over private and shared pages, in as many parts as it takes."""
    pages = 200
    vm = gmemcore.create_vm("SNP", "two-caps", seed=11)
    gmem = vm.create_guest_memfd(pages * P, 3)
    vm.add_memslot(0, GPA, pages * P, gmem)
    rng = np.random.default_rng(size)
    gmem.host_write(0, rng.bytes(pages * P))
    vm.launch_finish()
    for start in range(0, pages - 3, 7):
        gmem.set_memory_attributes(start * P, 3 * P, 8)
        vm.accept(GPA + start * P, 3 * P)
    private = gmem.plane("private")
    keys = np.frombuffer(b"".join(key_stream_page(11, 0, page) for page in range(pages)), np.uint8)
    expected, data = gmem.memory.copy(), np.frombuffer(rng.bytes(size), np.uint8)
    keyed = data ^ np.where(np.repeat(private, P)[offset : offset + size], keys[offset : offset + size], 0)
    expected[offset : offset + size] = keyed
    vm.guest_write(GPA + offset, data)
    assert gmem.memory.tobytes() == expected.tobytes()
    assert vm.guest_read(GPA + offset, size) == data.tobytes()
