"""Members, names in any case and numbers mean the same wherever one of them is taken."""

import subprocess
import sys

import numpy as np
import pytest

import gmemcore
from gmemcore import names
from gmemcore.engine.steps import Step
from gmemcore.errors import GmemError, InvalidArgumentError
from gmemcore.policy import ABIS, Abi, capability, cell, cells, get_abi
from gmemcore.uapi import (
    NUMBERS,
    Capability,
    ContentMode,
    Direction,
    FallocateMode,
    Firmware,
    GuestMemfdFlag,
    MemoryAttribute,
    PageType,
    Phase,
    VmType,
)
from gmemcore.units import parse_bytes
from gmemcore.vmm import Vmm
from gmemcore.workload.behaviours import BEHAVIOURS, get_behaviour
from gmemcore.workload.layout import Layout, Region
from gmemcore.workload.replay import Target, replay
from gmemcore.workload.trace import Header, record
from support.kinds import PRIVATE_VM_TYPES, P


def spellings(name):
    """A name as people type it."""
    spaced = name.replace("_", " ").replace("-", " ")
    return {name, name.upper(), name.lower(), name.title(), spaced, spaced.replace(" ", "-"), f" {name} "}


def forms(member):
    """Everything that stands for a member of an enumeration."""
    kind = type(member)
    found = [member, *spellings(member.name)]
    if isinstance(member, str):
        found += spellings(member.value)
        found += [n for number, named in NUMBERS.get(kind, {}).items() if named is member
                  for n in (number, np.uint64(number))]  # fmt: skip
    else:
        found += [int(member), np.uint64(member), np.int16(member)]
    return found


def guest(vm_type="SNP", abi="v5"):
    vm = gmemcore.create_vm(vm_type, abi)
    gmem = vm.create_guest_memfd(8 * P, 1 if vm.abi.legacy else 3)
    vm.add_memslot(0, 0, gmem.size, gmem)
    return vm, gmem


def state(gmem):
    return [gmem.plane(name).tolist() for name in ("private", "allocated", "assigned", "accepted", "pinned")]


def created(flags):
    """A file with one flag, which for huge pages needs an order."""
    vm = gmemcore.create_vm("SNP", "huge-partial", backing="none")
    try:
        return vm.create_guest_memfd("2m", flags)
    except gmemcore.errors.InvalidArgumentError:
        return vm.create_guest_memfd("2m", flags, 9)


def converted(call):
    """What a call leaves of a new guest, or the refusal."""
    vm, gmem = guest()
    try:
        call(vm, gmem)
    except GmemError as error:
        return error.outcome, str(error)
    return state(gmem), gmem.counters


def launched(vm, gmem, page_type):
    gmem.convert(0, P, "private")
    vm.launch_update(0, P, page_type=page_type)


PLACES = [
    (VmType, lambda one: gmemcore.create_vm(one).vm_type),
    (VmType, lambda one: cell("v5", one, "today", "running", "to_private", 2)),
    (VmType, lambda one: capability("v5", "MEMORY_ATTRIBUTES2_FLAGS", one)),
    (VmType, lambda one: list(cells("v5", one))),
    (Firmware, lambda one: gmemcore.create_vm("TDX", "cipher", one).firmware),
    (Firmware, lambda one: cell("cipher", "SNP", one, "running", "to_private", 16)),
    (Phase, lambda one: cell("v5", "SNP", "today", one, "to_private", 2)),
    (Direction, lambda one: cell("v5", "SNP", "today", "running", one, 1)),
    (Direction, lambda one: converted(lambda _, gmem: gmem.convert(0, P, one))),
    (ContentMode, lambda one: cell("v5", "PKVM", "today", "running", "to_shared", one)),
    (ContentMode, lambda one: converted(lambda _, gmem: gmem.convert(0, P, "private", one))),
    (ContentMode, lambda one: converted(lambda _, gmem: gmem.set_memory_attributes(0, P, 8, one))),
    (ContentMode, lambda one: converted(lambda _, g: g.set_memory_attributes_many([0], [P], 8, one))),
    (MemoryAttribute, lambda one: converted(lambda _, gmem: gmem.set_memory_attributes(0, P, one))),
    (MemoryAttribute, lambda one: converted(lambda _, gmem: gmem.convert(0, P, one))),
    (MemoryAttribute, lambda one: converted(lambda _, gmem: gmem.apply_many("convert", [0], [P], [one]))),
    (MemoryAttribute, lambda one: guest("SNP", "legacy")[0].set_memory_attributes(0, P, one)),
    (GuestMemfdFlag, lambda one: created(one).flags),
    (FallocateMode, lambda one: converted(lambda _, gmem: gmem.fallocate(one, 0, P))),
    (PageType, lambda one: converted(lambda vm, gmem: launched(vm, gmem, one))),
    (Capability, lambda one: gmemcore.create_vm("SNP").check_cap(one)),
    (Capability, lambda one: gmemcore.check_cap(one)),
    (Step, lambda one: converted(lambda _, gmem: gmem.apply_many(one, [0], [P]))),
]  # fmt: skip


@pytest.mark.parametrize("place", range(len(PLACES)))
def test_every_form_means_the_same(place):
    kind, call = PLACES[place]
    for member in kind:
        expected = call(member)
        for form in forms(member):
            assert call(form) == expected, form


def test_directions_by_what_they_set():
    expected = converted(lambda _, gmem: gmem.set_memory_attributes(0, P, 8))
    for form in ("private", "PRIVATE", "to_private", Direction.TO_PRIVATE, MemoryAttribute.PRIVATE, 8):
        assert converted(lambda _, gmem, to=form: gmem.convert(0, P, to)) == expected
        assert converted(lambda _, gmem, to=form: gmem.set_memory_attributes(0, P, to)) == expected
    expected = converted(lambda _, gmem: gmem.set_memory_attributes(0, P, 0))
    for form in ("shared", "Shared", "to shared", Direction.TO_SHARED, 0):
        assert converted(lambda _, gmem, to=form: gmem.convert(0, P, to)) == expected


def test_no_content_mode():
    expected = converted(lambda _, gmem: gmem.set_memory_attributes(0, P, 8))
    for form in (None, "none", "Unspecified", ContentMode.NONE, 0):
        assert converted(lambda _, gmem, mode=form: gmem.convert(0, P, 8, mode)) == expected


def test_several_bits_by_name():
    both = GuestMemfdFlag.MMAP | GuestMemfdFlag.INIT_SHARED
    for text in ("mmap|init_shared", "MMAP, init shared", "init-shared|mmap"):
        assert gmemcore.create_vm("SNP").create_guest_memfd(P, text).flags == both
    _, gmem = guest()
    gmem.fallocate("keep size", 0, P)
    gmem.fallocate("keep_size|punch_hole", 0, P)
    assert gmem.count("allocated") == 0


def test_a_flag_by_the_name_that_a_proposal_gives_it():
    from gmemcore.policy.proposal import shipped_proposals

    (proposal,) = shipped_proposals()
    for abi in (*ABIS.values(), proposal):
        for flag in abi.flags:
            for name in spellings(flag.name):
                assert cell(abi, "SNP", "cipher", "running", "to_private", name) == cell(
                    abi, "SNP", "cipher", "running", "to_private", flag.bit
                )


@pytest.mark.parametrize("text", ["8k", "8K", "8KiB", "8KB", "8 KiB", "0x2000", "8192B"])
def test_sizes_everywhere(text):
    vm = gmemcore.create_vm("snp")
    gmem = vm.create_guest_memfd(text, "mmap|init_shared")
    assert gmem.size == 8192
    vm.add_memslot(0, text, text, gmem, "0x0")
    gmem.host_write("0x0", b"ab")
    assert gmem.host_read("0k", "0x2") == b"ab"
    gmem.pin(0, text)
    gmem.unpin(0, text)
    assert gmem.mmap(0, text).read("4k", "4k") == bytes(4096)
    gmem.convert(0, text, "private")
    vm.launch_update(text, text)
    vm.launch_finish()
    assert vm.guest_read(text, "0x2", True) == b"ab"
    assert gmem.state_runs(0, text) == gmem.state_runs(0, 8192)
    gmem.set_memory_attributes_many(["0x0"], [text], "shared")
    assert Region(text, text) == Region(8192, 8192)
    assert Layout.single(text) == Layout.single(8192)
    assert Layout.pc("6g") == Layout.pc(6 << 30)
    assert Vmm(vm).vm is vm


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        ("0", 0),
        ("17", 17),
        ("4k", 4096),
        ("2M", 2 << 20),
        ("1GiB", 1 << 30),
        ("16 TB", 1 << 44),
        ("0xFf", 255),
    ],
)
def test_bytes(text, bytes_):
    assert parse_bytes(text) == bytes_


@pytest.mark.parametrize(
    "text", ["", "k", "4 4k", "-4k", "4kk", "1.5g", "4x", "0x", "04k", "٤k", "4k\n", "1e3"]
)
def test_what_is_no_size(text):
    with pytest.raises(InvalidArgumentError, match="is not a size; use"):
        parse_bytes(text)
    with pytest.raises(InvalidArgumentError, match="is not a size; use"):
        guest()[1].convert(text, 4096, "private")


UNKNOWN = [
    (lambda: gmemcore.create_vm("SEV"), "unknown VM type 'SEV'; known: DEFAULT"),
    (lambda: gmemcore.create_vm("SNP", "v99"), "unknown abi 'v99'; known: legacy"),
    (lambda: gmemcore.create_vm("SNP", firmware="tomorrow"), "unknown firmware 'tomorrow'; known: today"),
    (lambda: gmemcore.create_vm("SNP", backing="tape"), "unknown backing 'tape'; known: anonymous"),
    (lambda: gmemcore.create_vm("SNP").create_guest_memfd(P, "exec"), "unknown guest_memfd flag 'exec'"),
    (lambda: guest()[1].convert(0, P, "secret"), "unknown attribute 'secret'; known: SHARED, PRIVATE"),
    (lambda: guest()[1].convert(0, P, "private", "keep"), "unknown content mode 'keep'; known: NONE"),
    (lambda: guest()[1].set_memory_attributes(0, P, 8, "keep"), "unknown content mode 'keep'"),
    (lambda: guest()[1].fallocate("collapse", 0, P), "unknown fallocate mode 'collapse'"),
    (lambda: guest()[1].apply_many("fly", [0], [P]), "unknown step 'fly'; known: CONVERT"),
    (lambda: guest()[1].plane("dirty"), "unknown plane 'dirty'; known: private"),
    (lambda: guest()[0].launch_update(0, P, page_type="S"), "unknown page type 'S'; known: NORMAL"),
    (lambda: guest()[0].check_cap("WINGS"), "unknown capability 'WINGS'; known: GUEST_MEMFD"),
    (lambda: get_behaviour("sleep"), "no behaviour 'sleep'; there are snp-boot"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(UNKNOWN)))
def test_a_name_that_does_not_exist_is_answered_with_those_that_do(case):
    call, complaint = UNKNOWN[case]
    with pytest.raises(InvalidArgumentError) as raised:
        call()
    assert complaint in str(raised.value)


@pytest.mark.parametrize("wrong", [3, -1, True, 4.0, b"SNP", None, ["SNP"]])
def test_what_is_neither_a_name_nor_a_number_of_the_interface(wrong):
    with pytest.raises(TypeError, match=r"VM type must be a name, 0 \(DEFAULT\), .*, 5 \(TDX\), not "):
        gmemcore.create_vm(wrong)
    with pytest.raises(TypeError, match="phase must be a name, not "):
        cell("v5", "SNP", "today", wrong, "to_private", 0)


@pytest.mark.parametrize("digits", ["1", "8", " 4096 "])
def test_a_number_in_quotes_is_a_mistake(digits):
    _, gmem = guest()
    for call in (
        lambda: gmem.convert(0, P, digits),
        lambda: gmem.convert(0, P, 8, digits),
        lambda: gmem.set_memory_attributes(0, P, 8, digits),
        lambda: gmem.convert(0, digits.strip(), 8),
    ):
        with pytest.raises(TypeError, match="must be an integer"):
            call()


def test_selections():
    assert names.chosen(VmType, None) == names.chosen(VmType, "all") == tuple(VmType)
    assert names.chosen(VmType, "snp") == names.chosen(VmType, 4) == (VmType.SNP,)
    assert (
        names.chosen(VmType, "tdx,snp")
        == names.chosen(VmType, ["TDX", 4, VmType.SNP])
        == (VmType.TDX, VmType.SNP)
    )
    assert list(cells("v5", "snp,tdx")) == [*cells("v5", "SNP"), *cells("v5", "TDX")]


@pytest.mark.parametrize("name", [*ABIS])
def test_revisions_in_any_case(name):
    for form in spellings(name):
        assert get_abi(form) is ABIS[name]
    assert isinstance(get_abi(ABIS[name]), Abi)


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_behaviours_in_any_case(name):
    for form in spellings(name):
        assert get_behaviour(form) is BEHAVIOURS[name]


def test_planes_in_any_case():
    _, gmem = guest()
    gmem.convert(0, "8k", "private")
    assert gmem.count("Private") == gmem.count("private") == int(gmem.plane("PRIVATE").sum()) == 2
    assert gmem.find_page(["PRIVATE"]) == 0
    assert gmem.run_ends("Private").tolist() == gmem.run_ends().tolist()


def test_targets_of_a_replay():
    trace = record(Header("one", "", Layout.single("1m")), [])
    one = replay(trace, Target("V5", "snp", "Today"), flags="As recorded")
    other = replay(trace, Target("v5", VmType.SNP, Firmware.TODAY))
    assert (one.abi, one.vm_type, one.counters) == (other.abi, other.vm_type, other.counters)


def test_userspace_takes_names_too():
    vm = gmemcore.create_vm("snp", backing="NONE")
    vmm = Vmm(vm)
    block = vmm.add_ram(0, 1 << 20)
    assert vmm.convert("4k", "8k", True, "preserve").counters.pages_changed == 2
    assert block.gmem.runs()[1] == (1, 3, "private")


# ---- attributes on the wrong object ------------------------------------------------------------------------


@pytest.mark.parametrize("vm_type", PRIVATE_VM_TYPES)
def test_attributes_that_belong_to_the_file(vm_type):
    vm, gmem = guest(vm_type)
    for call in (
        lambda: vm.set_memory_attributes(0, P, "private"),
        lambda: vm.convert(0, P, "private"),
    ):
        with pytest.raises(InvalidArgumentError, match=r"belong to the guest_memfd; use GuestMemfd\.convert"):
            call()
    assert gmem.count("private") == 0


def test_attributes_that_belong_to_the_vm():
    vm, gmem = guest("SNP", "legacy")
    for call in (lambda: gmem.set_memory_attributes(0, P, 8), lambda: gmem.convert(0, P, "private")):
        with pytest.raises(GmemError, match=r"attributes belong to the Vm, .*use Vm\.convert"):
            call()
    assert vm.convert(0, "8k", "private").counters.pages_changed == 2
    assert vm.private_frames() == [(0, 2)]


@pytest.mark.parametrize("abi", ["v5", "legacy"])
def test_attributes_that_no_object_has(abi):
    vm, _ = guest("DEFAULT", abi)
    with pytest.raises(InvalidArgumentError, match="a DEFAULT VM has no private memory under abi"):
        vm.convert(0, P, "private")


# ---- the namespace -----------------------------------------------------------------------------------------


def test_submodules_are_offered_and_load_no_numba():
    script = (
        "import sys, gmemcore as gm\n"
        "offered = [name for name in dir(gm) if not name.startswith('_')]\n"
        "for name in offered: getattr(gm, name)\n"
        "for name in ('analysis', 'benchmark', 'stress', 'workload', 'vmm', 'policy', 'kvm', 'machine'):\n"
        "    assert getattr(gm, name) is sys.modules['gmemcore.' + name], name\n"
        "    assert name in offered, name\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('numba', 'matplotlib', 'pandas')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
