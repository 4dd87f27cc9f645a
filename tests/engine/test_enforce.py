"""enforce="mprotect": raw views of the host really fault on private pages, and on no other.

What a touch does is seen in a child, where SIGSEGV is a result; what every page's protection is, is read in
/proc/self/maps after random calls, beside a twin without enforcement that must come to the same state.
"""

import gc
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gmemcore
from gmemcore.engine import kernels as layout
from gmemcore.engine.steps import Step
from gmemcore.errors import GmemError
from support.guests import digest, outcome
from support.holds import resident, run_python
from support.host_views import (
    GPA,
    MAPPED_TWICE,
    inaccessible,
    machine,
    protections_are_attributes,
    raw,
    twins,
)
from support.kinds import P
from support.paths import JIT_DISABLED, ROOT, TESTS
from support.policy_by_hand import requests

MIB = 1 << 20


# ---- touches, in a child -------------------------------------------------------------------------

TOUCHING = """
import os, resource, signal, sys
import numpy as np
import gmemcore
from gmemcore.uapi import KVM_SET_MEMORY_ATTRIBUTES2, MEMORY_ATTRIBUTES2_STRUCT as STRUCT
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
P, GPA = 4096, 1 << 32

def machine(*names, flags=3, **more):
    vm = gmemcore.create_vm(*names, backing={backing!r}, enforce="mprotect", **more)
    gmem = vm.create_guest_memfd(16 * P, flags)
    vm.add_memslot(0, GPA, 16 * P, gmem)
    return vm, gmem, gmem.mmap(0, 16 * P).array

def touch(array, page, write):
    child = os.fork()
    if not child:
        if write:
            array[page * P] = 1
        else:
            int(array[page * P])
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def faulting(array):
    found = []
    for page in range(len(array) // P):
        results = {{touch(array, page, write) for write in (False, True)}}
        assert results in ({{0}}, {{-signal.SIGSEGV}}), (page, results)
        if results != {{0}}:
            found.append(page)
    return found

def private(gmem):
    return np.flatnonzero(gmem.plane("private")).tolist()

def held(gmem, array, pages):
    assert faulting(array) == private(gmem) == [*pages], (faulting(array), private(gmem))
"""


@pytest.mark.parametrize("backing", MAPPED_TWICE)
def test_touches_of_private_pages_are_signals_and_others_are_not(backing):
    script = """
every = range(16)
for flags in (1, 3):
    vm, gmem, array = machine("SNP", "v5", flags=flags)
    held(gmem, array, every if flags == 1 else [])
vm, gmem, array = machine("SNP", "two-caps", "cipher")
vm.launch_finish()
array[:] = 7
for flag in (0, 2):  # each direction, with and without ENCRYPT
    gmem.set_memory_attributes(0, 16 * P, 8, flag)
    held(gmem, array, every)
    gmem.set_memory_attributes(0, 16 * P, 0, flag)
    held(gmem, array, [])
gmem.set_memory_attributes(P, 3 * P, 8)
gmem.set_memory_attributes(2 * P, P, 0)
held(gmem, array, [1, 3])
gmem.fallocate(3, 0, 8 * P)  # the attribute stays
held(gmem, array, [1, 3])
argument = bytearray(STRUCT.pack(14 * P, 2 * P, 8, *[0] * (len(STRUCT.unpack(bytes(STRUCT.size))) - 3)))
gmem.ioctl(KVM_SET_MEMORY_ATTRIBUTES2, argument)
held(gmem, array, [1, 3, 14, 15])
gmem.pin(8 * P, P)
batch = gmem.set_memory_attributes_many(
    [0, 8 * P, 10 * P, 10 * P, P, 5], [P, P, 2 * P, P, P, P], [8, 8, 8, 0, 0, 8]
)
assert batch.errno.tolist() == [0, 11, 0, 0, 0, 22]
held(gmem, array, [0, 3, 11, 14, 15])
for call in (
    lambda: gmem.set_memory_attributes(0, 16 * P, 8),  # EAGAIN
    lambda: gmem.set_memory_attributes(0, 16 * P, 8, 1),  # EOPNOTSUPP
    lambda: gmem.set_memory_attributes(0, 17 * P, 0),  # EINVAL
):
    try:
        call()
        raise AssertionError("it passed")
    except gmemcore.GmemError:
        held(gmem, array, [0, 3, 11, 14, 15])
print("held")
"""
    assert run_python(TOUCHING.format(backing=backing) + script) == ["held"]


@pytest.mark.parametrize("backing", MAPPED_TWICE)
def test_legacys_host_sees_its_side_whatever_the_attributes_are(backing):
    script = """
vm, gmem, array = machine("SNP", "legacy", flags=1)
assert faulting(array) == []
vm.set_memory_attributes(GPA, 8 * P, 8)
array[5] = 9
assert faulting(array) == []
assert gmem.host_read(5, 1) == b"\\x09"
vm.set_memory_attributes(GPA, 8 * P, 0)
assert faulting(array) == []
print("held")
"""
    assert run_python(TOUCHING.format(backing=backing) + script) == ["held"]


# ---- every page, by /proc/self/maps --------------------------------------------------------------

RANGES = st.tuples(st.integers(0, 63), st.integers(1, 64)).map(lambda r: (r[0], min(r[1], 64 - r[0])))
STEPS = st.sampled_from([Step.CONVERT, Step.HOST_WRITE, Step.PUNCH_HOLE, Step.PIN, Step.UNPIN, Step.ALLOCATE])
CALLS = st.one_of(
    st.tuples(st.just("convert"), RANGES, st.sampled_from([0, 8]), st.sampled_from([0, 1, 2, 64])),
    st.tuples(st.just("many"), st.lists(RANGES, min_size=1, max_size=6), st.sampled_from([0, 8])),
    st.tuples(
        st.just("steps"), st.lists(st.tuples(STEPS, RANGES), min_size=1, max_size=6), st.sampled_from([0, 8])
    ),
    st.tuples(st.just("ioctl"), RANGES, st.sampled_from([0, 8])),
    st.tuples(st.just("punch"), RANGES),
    st.tuples(st.just("touch"), RANGES, st.booleans()),
    st.tuples(st.just("pin"), RANGES),
    st.tuples(st.just("unpin"), RANGES),
    st.tuples(st.just("fail"), st.sampled_from([None, 0, 1])),
)


@pytest.mark.parametrize(
    "kind", [("SNP", "v5", "today"), ("SW_PROTECTED", "v5", "today"), ("TDX", "tracking", "today")]
)
@given(calls=st.lists(CALLS, min_size=4, max_size=12))
@settings(max_examples=6 if JIT_DISABLED else 25, deadline=None, database=None)
def test_protections_are_attributes_and_nothing_else_differs(kind, calls):
    twins(calls, *kind, running=False)


@given(calls=st.lists(CALLS.filter(lambda each: each[0] != "pin"), min_size=4, max_size=12))
@settings(max_examples=6 if JIT_DISABLED else 25, deadline=None, database=None)
def test_the_same_where_conversions_encrypt(calls):
    twins(calls, "SNP", "two-caps", "cipher", running=True)


INTERPRETED = """
from gmemcore.engine import kernels
from support import host_views as t
{script}
"""


def interpreted(script):
    """Run a script with kernels that are plain Python, so that it may take one out."""
    return run_python(INTERPRETED.format(script=script), NUMBA_DISABLE_JIT="1", PYTHONPATH=str(TESTS))


@pytest.mark.parametrize("broken", ["protect_view", "join_view", "notice_writes"])
def test_a_step_left_out_is_noticed(broken):
    script = f"""
calls = [("touch", (3, 2), True), ("convert", (0, 4), 0, 1), ("convert", (2, 4), 8, 0)]
calls.append(("convert", (2, 4), 0, 0))
kernels.{broken} = lambda *_: None
try:
    t.twins(calls, "SNP", "v5", "today", running=False)
except AssertionError:
    print("noticed")
"""
    assert interpreted(script) == ["noticed"]


def test_pages_are_closed_before_their_bytes_change_and_opened_when_they_have():
    script = """
vm, gmem = t.machine(16)
vm.launch_finish()
array = t.raw(gmem)
array[:] = 7
seen = []
transform = kernels.transform
def watched(*arguments):
    seen.append(bool(t.inaccessible(array)[4:8].all()))
    return transform(*arguments)
kernels.transform = watched
for attributes in (8, 0):
    gmem.set_memory_attributes(4 * 4096, 4 * 4096, attributes, 2)
print(seen, t.inaccessible(array).any())
"""
    assert interpreted(script) == ["[True, True] False"]


@pytest.mark.parametrize("abi", ["v4", "v5", "v13", "after-launch", "two-caps", "tracking"])
def test_a_split_that_fails_changes_nothing_for_any_flag(abi):
    """The host's step of a conversion, failed for every cell; then the same call succeeds."""
    vms = {}
    for vm_type, firmware, phase, attributes, flag in requests(abi):
        if vm_type == "DEFAULT":
            continue
        vm, gmem = machine(16, 3, vm_type, abi, firmware)
        gmem.set_memory_attributes(2 * P, 4 * P, 8)
        if phase == "running":
            vm.launch_finish()
        array, request = raw(gmem), (0, 12 * P, attributes, flag)
        before = digest(vm), inaccessible(array).tolist()
        gmem._store.header[layout.HOST_STEPS_LEFT] = 0
        answer = outcome(gmem.set_memory_attributes, *request)
        gmem._store.header[layout.HOST_STEPS_LEFT] = int(layout.NEVER)
        assert answer in (("ENOMEM", 0), ("EOPNOTSUPP", 0))
        assert (digest(vm), inaccessible(array).tolist()) == before
        again = outcome(gmem.set_memory_attributes, *request)
        assert again == (("OK", None) if answer[0] == "ENOMEM" else answer)
        protections_are_attributes(gmem, array)
        vms[answer[0]] = vms.get(answer[0], 0) + 1
        vm.close()
    assert vms["ENOMEM"] > 10


@pytest.mark.parametrize("backing", MAPPED_TWICE)
def test_what_the_host_wrote_raw_is_there_for_everyone(backing):
    """Also for ZERO, which acts on pages that exist: a raw write allocates its page."""
    vm, gmem = machine(1024, backing=backing)
    array = raw(gmem)
    array[5 * P + 1] = 0xBE
    assert gmem.host_read(5 * P, 2) == b"\x00\xbe"
    assert vm.guest_read(GPA + 5 * P, 2, False) == b"\x00\xbe"
    assert np.flatnonzero(gmem.plane("allocated")).tolist() == [5]
    array[700 * P] = 1
    assert gmem.set_memory_attributes(0, gmem.size, 0, 1).counters.bytes_zeroed == 2 * P
    assert not array.any()
    assert gmem.counters.pages_allocated == 2  # a look leaves no trace
    array[9 * P] = 1
    assert gmem.counters.pages_allocated == 3
    array[10 * P] = 1
    assert int(gmem.page_states()["allocated"][0, 0]) & 1 << 10
    array[12 * P] = 1
    assert gmem.packed_state().totals["allocated"] == 5
    array[13 * P] = 1
    assert gmem.find_page(["allocated"]) == 5 * P
    array[14 * P] = 1
    assert gmem.state_runs(14 * P, P) == [(14, 15, ("allocated",))]
    array[15 * P] = 1
    assert gmem.count("allocated") == 8
    array[16 * P] = 1
    assert gmem.allocated == 9 * P
    array[17 * P] = 1
    assert gmem.survey().totals["allocated"] == 10
    array[11 * P] = 1
    gmem.poison(11 * P)
    gmem.fallocate(3, 5 * P, P)
    assert not gmem.plane("allocated")[5]
    assert array[5 * P + 1] == 0


def test_userspace_protects_each_file_and_undoes_that_too():
    """A conversion over two files; then one that a listener refuses at the second."""
    from gmemcore.vmm import Vmm

    vm = gmemcore.create_vm("SNP", "v5", backing="memfd", enforce="mprotect")
    vmm = Vmm(vm)
    for gpa in (GPA, GPA + 16 * P):
        vmm.add_ram(gpa, 16 * P)
    arrays = [raw(gmem) for gmem in vm.files]
    vmm.convert(GPA + 12 * P, 8 * P, True)
    assert [np.flatnonzero(inaccessible(array)).tolist() for array in arrays] == [
        [12, 13, 14, 15],
        [0, 1, 2, 3],
    ]
    vm.files[1].pin(8 * P, P)
    before = [inaccessible(array).tolist() for array in arrays]
    assert outcome(vmm.convert, GPA, 32 * P, True)[0] == "EAGAIN"
    assert [inaccessible(array).tolist() for array in arrays] == before
    vmm.convert(GPA, 24 * P, False)
    assert not any(inaccessible(array).any() for array in arrays)


# ---- the host's limits -------------------------------------------------------------------------

LIMIT = """
import mmap
import numpy as np
import gmemcore
from support.guests import outcome
from support.host_views import inaccessible, machine, raw, state

gmemcore.warmup()  # at the limit no compiler can work
vm, gmem = machine(16)
array = raw(gmem)
gmem.host_write(0, bytes(range(256)) * 256)
vm.launch_finish()
outcome(gmem.set_memory_attributes, 0, 4096, 8, 2)
outcome(gmem.set_memory_attributes, 0, 4096, 0, 2)

spare = []
def fill():
    try:
        while True:
            # shared memory of its own each, which is never merged
            spare.append(mmap.mmap(-1, 4096, mmap.MAP_SHARED, prot=mmap.PROT_READ))
    except OSError:
        pass
"""


def test_a_host_without_mappings_left_refuses_and_nothing_has_changed():
    """vm.max_map_count: a conversion needs at most two more of them; here 0 to 3 are left."""
    script = (
        LIMIT
        + """
for left in range(4):
    before = state(vm, gmem), inaccessible(array).tolist()
    fill()  # what the process has taken or given back meanwhile
    del spare[len(spare) - left :]
    answer = outcome(gmem.set_memory_attributes, 3 * 4096, 4 * 4096, 8, 2)
    if answer[0] == "OK":
        break
    assert answer == ("ENOMEM", 3 * 4096)
    del spare[-16:]  # for what looks
    assert (state(vm, gmem), inaccessible(array).tolist()) == before
    if not left:
        fill()
        batch = gmem.set_memory_attributes_many([5 * 4096, 0, 5 * 4096], [4096] * 3, [8, 0, 8], [2, 0, 1])
        assert batch.errno.tolist() == [12, 0, 95], batch.errno
        del spare[-16:]
        assert (state(vm, gmem), inaccessible(array).tolist()) == before
del spare[-16:]
assert left in (2, 3)  # mmap(2) takes one beyond the limit, a split doesn't
assert (inaccessible(array) == gmem.plane("private")).all() and gmem.plane("private").sum() == 4
print("held", len(spare) > 1000)
"""
    )
    assert run_python(script, PYTHONPATH=str(TESTS))[-1] == "held True"


def test_a_file_of_more_runs_than_mappings_is_refused_by_the_request():
    """Every other page private, until there are no more mappings; what was accepted is protected."""
    script = """
import numpy as np
import gmemcore
from support.host_views import inaccessible, machine, raw
gmemcore.warmup()
vm, gmem = machine(70_000)
array = raw(gmem)
offsets = np.arange(0, 70_000, 2) * 4096
batch = gmem.set_memory_attributes_many(offsets, np.full(len(offsets), 4096), 8)
refused = np.flatnonzero(batch.errno)
assert set(batch.errno[refused]) == {12} and 30_000 < refused[0] < 32_768
assert (batch.error_offset[refused] == offsets[refused]).all()
plane = gmem.plane("private")
gmem.set_memory_attributes(0, gmem.size // 2, 8)  # which gives mappings back
found = inaccessible(array)
assert found[: len(found) // 2].all() and (found == gmem.plane("private")).all()
assert (plane[len(plane) // 2 :] == found[len(found) // 2 :]).all()
print("held")
"""
    with open("/proc/sys/vm/max_map_count") as limit:
        if int(limit.read()) != 65530:
            pytest.skip("the figures are for the usual limit of mappings")
    if JIT_DISABLED:
        pytest.skip("tens of thousands of conversions take too long without the compiler")
    assert run_python(script, PYTHONPATH=str(TESTS)) == ["held"]


# ---- closing, and what is refused ----------------------------------------------------------------


@pytest.mark.parametrize("backing", MAPPED_TWICE)
def test_a_view_outlives_its_file(backing):
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    vm, gmem = machine(backing=backing)
    mapping = gmem.mmap(P, 8 * P)
    view = mapping.array
    view[:4] = 7
    gmem.set_memory_attributes(4 * P, P, 8)
    vm.close()
    with pytest.raises(GmemError, match="closed"):
        mapping.array  # noqa: B018
    del vm, gmem, mapping
    gc.collect()
    assert view[:5].tolist() == [7, 7, 7, 7, 0]
    assert inaccessible(view).tolist() == [False] * 3 + [True] + [False] * 4
    del view
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_nothing_is_left_of_closed_guests():
    def cycle():
        vm, gmem = machine(256)
        raw(gmem)[:] = 1
        gmem.set_memory_attributes(P, P, 8)
        vm.close()

    for _ in range(20):
        cycle()
    gc.collect()
    descriptors, memory = len(os.listdir("/proc/self/fd")), resident()
    for _ in range(50):
        cycle()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert resident() - memory < 2 * MIB


@pytest.mark.parametrize("backing", ["anonymous", "none"])
def test_memory_that_cannot_be_mapped_twice_is_refused_at_once(backing):
    with pytest.raises(GmemError, match=f"needs backing memfd or guest_memfd, not {backing}") as refused:
        gmemcore.create_vm("SNP", backing=backing, enforce="mprotect")
    assert refused.value.outcome == "EOPNOTSUPP"


def test_a_factory_is_asked_when_it_has_made_a_backing():
    from gmemcore.engine.backing import AnonymousBacking, MemfdBacking

    for make, answer in ((AnonymousBacking, "EOPNOTSUPP"), (MemfdBacking, "OK")):
        vm = gmemcore.create_vm("SNP", backing=lambda size, make=make: make(size), enforce="mprotect")
        assert outcome(vm.create_guest_memfd, P, 3)[0] == answer
        assert len(vm.files) == (answer == "OK")


def test_what_is_asked_wrongly_is_refused():
    with pytest.raises(GmemError, match="enforce must be 'mprotect' or None, not 'mpk'"):
        gmemcore.create_vm("SNP", backing="memfd", enforce="mpk")
    with pytest.raises(TypeError, match="enforce must be a string"):
        gmemcore.create_vm("SNP", backing="memfd", enforce=True)
    with pytest.raises(GmemError, match="unknown backing 'disk'"):
        gmemcore.create_vm("SNP", backing="disk", enforce="mprotect")
    plain = gmemcore.create_vm("SNP", backing="memfd").create_guest_memfd(P, 3)
    with pytest.raises(GmemError, match="needs a Vm with enforce='mprotect'") as refused:
        plain.mmap(0, P).array  # noqa: B018
    assert refused.value.outcome == "EOPNOTSUPP"
    _, gmem = machine(4)
    assert len(gmem.mmap(P, 3 * P).array) == 3 * P
    beyond = gmem.mmap(2 * P, 3 * P)
    with pytest.raises(GmemError, match="must end at the file's end 0x4000") as refused:
        beyond.array  # noqa: B018
    assert refused.value.outcome == "EFAULT"


def test_a_file_that_cannot_be_mapped_costs_no_mapping():
    vm = gmemcore.create_vm("SNP", "v5", backing="memfd", enforce="mprotect")
    gmem = vm.create_guest_memfd(4 * P, 0)
    assert outcome(gmem.mmap, 0, P)[0] == "ENODEV"
    assert gmem._shared.host_view is None
    gmem.set_memory_attributes(0, P, 0)


def test_address_space_that_runs_out_is_an_exception(monkeypatch):
    from gmemcore.engine.backing import MemfdBacking

    def refuse(_):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(MemfdBacking, "map_again", refuse)
    vm = gmemcore.create_vm("SNP", backing="memfd", enforce="mprotect")
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    assert outcome(vm.create_guest_memfd, P, 3)[0] == "ENOMEM"
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_the_engine_is_not_hindered():
    """It writes to private pages, and conversions act on them, whatever the host's view allows."""
    vm, gmem = machine(16, 1, backing="memfd", seed=5)
    vm.launch_update(GPA, 16 * P, bytes(range(256)) * 256)
    vm.launch_finish()
    assert inaccessible(raw(gmem)).all()
    assert vm.guest_read(GPA + P, 256, True) == bytes(range(256))
    gmem.set_memory_attributes(0, 8 * P, 0, 2)
    assert raw(gmem)[P : P + 256].tolist() == [*range(256)]


def test_the_cost_is_in_the_bench(monkeypatch, capsys):
    import importlib.util
    import sys

    path = ROOT / "bench" / "enforce.py"
    if not path.exists():
        pytest.skip("installed without the bench")
    spec = importlib.util.spec_from_file_location("bench_enforce", path)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    sizes = ["4k", "16k"] if JIT_DISABLED else ["4k", "2m", "4m"]
    monkeypatch.setattr(bench, "MOST_CALLS", 4)
    monkeypatch.setattr(sys, "argv", ["enforce.py", "--memory", sizes[-1], "--pairs", "2"])
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [size for size in sizes for _ in range(4)]
    assert all(line.endswith("2 pairs): reported") for line in lines)
