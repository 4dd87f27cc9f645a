"""A batch of steps of every kind is the same steps one by one; threads change nothing but the time."""

import os
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest

import gmemcore
from gmemcore import errors
from gmemcore.engine import kernels as layout
from gmemcore.engine.results import OUTCOMES
from gmemcore.engine.steps import Step
from gmemcore.policy import ABIS
from support.kinds import VM_TYPES, P
from support.paths import JIT_DISABLED

SEEDS, STEPS = (1, 120) if JIT_DISABLED else (3, 400)
BYTES = "none" if JIT_DISABLED else "anonymous"  # moving megabytes is what the compiler is there for
PAGES = 1100  # two blocks of 2 MiB and a short one
KINDS = [
    (abi, vm_type, firmware, running)
    for abi, firmware in (("v5", "today"), ("two-caps", "cipher"), ("v4", "today"), ("v13", "today"))
    for vm_type in VM_TYPES
    for running in (False, True)
]
# Every third kind still has every value of every column.
MET = KINDS[::3] if JIT_DISABLED else KINDS
PRIVATE = {0: None, 1: False, 2: True}


def machine(abi, vm_type, firmware, running, **options):
    vm = gmemcore.create_vm(vm_type, abi=abi, firmware=firmware, seed=5, **options)
    gmem = vm.create_guest_memfd(PAGES * P, flags=3)
    vm.add_memslot(0, 0, gmem.size, gmem)
    if running:
        vm.launch_finish()
    return vm, gmem


def random_steps(seed, abi, n=STEPS):
    """Columns of steps: mostly sound, sometimes unaligned, empty or beyond the end."""
    draw = np.random.default_rng(seed)
    steps = draw.choice(len(Step) - 1, n, p=[0.3, *[0.7 / 11] * 11])
    edges = np.array([0, 63, 64, 65, 511, 512, 513, 1023, 1024, PAGES - 1])
    starts = np.where(draw.random(n) < 0.3, draw.choice(edges, n), draw.integers(0, PAGES, n))
    sizes = np.minimum(draw.choice([1, 2, 64, 65, 512, 513, 700], n), PAGES - starts) * P
    offsets = starts * P
    odd = draw.random(n) < 0.05
    offsets = np.where(odd, offsets + draw.choice([0, 1, 2048, PAGES * P], n), offsets)
    sizes = np.where(odd, draw.choice([0, 1, P, 3 * P], n), sizes)
    attributes = draw.choice([0, 8], n)
    known = [0, *(int(flag.bit) for flag in ABIS[abi].flags)]
    flags = np.where(steps == Step.CONVERT, draw.choice(known, n), 0)
    is_access = (steps == Step.GUEST_READ) | (steps == Step.GUEST_WRITE)
    flags = np.where(is_access, draw.choice(3, n), flags)
    return [column.astype(np.uint64) for column in (steps, offsets, sizes, attributes, flags)]


def single(vm, gmem, step, offset, size, attributes, flags, contents):
    """The step through its own call; without contents an access moves no data."""
    data = np.zeros(size if contents else 0, np.uint8)
    calls = {
        Step.CONVERT: lambda: gmem.set_memory_attributes(offset, size, attributes, flags),
        Step.HOST_READ: lambda: gmem.host_read(offset, size),
        Step.HOST_WRITE: lambda: gmem.host_write(offset, data),
        Step.GUEST_READ: lambda: vm.guest_read(offset, size, PRIVATE[flags]),
        Step.GUEST_WRITE: lambda: vm.guest_write(offset, data, PRIVATE[flags]),
        Step.ACCEPT: lambda: vm.accept(offset, size),
        Step.ALLOCATE: lambda: gmem.fallocate(1, offset, size),
        Step.PUNCH_HOLE: lambda: gmem.fallocate(3, offset, size),
        Step.PIN: lambda: gmem.pin(offset, size),
        Step.UNPIN: lambda: gmem.unpin(offset, size),
        Step.POISON: lambda: gmem.poison(offset),
        Step.POPULATE: lambda: vm.launch_update(offset, size),
    }
    if not contents:
        calls |= dict.fromkeys((Step.HOST_READ, Step.HOST_WRITE), lambda: gmem.host_touch(offset, size))
        calls |= dict.fromkeys(
            (Step.GUEST_READ, Step.GUEST_WRITE), lambda: vm.guest_touch(offset, size, PRIVATE[flags])
        )
    try:
        calls[Step(step)]()
    except errors.GmemError as error:
        return error.outcome, getattr(error, "gpa", error.error_offset)
    return "OK", None


@pytest.mark.parametrize("kind", MET, ids=lambda kind: "-".join(map(str, kind)))
def test_a_batch_is_the_same_steps_one_by_one(kind):
    for seed in range(SEEDS):
        columns = random_steps(seed, kind[0])
        columns[2][columns[0] == Step.POISON] = P  # one page at a time, as the call takes it
        batch_vm, batch_gmem = machine(*kind)
        one_vm, one_gmem = machine(*kind)
        result = batch_gmem.apply_many(*columns)
        for i, request in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
            outcome, where = single(one_vm, one_gmem, *request, contents=True)
            found = OUTCOMES[result.outcome[i]]
            assert found == outcome, (i, Step(request[0]), request)
            if where is not None:
                assert result.error_offset[i] == where, (i, Step(request[0]), request)
        assert batch_vm.counters == one_vm.counters
        for name in ("private", "allocated", "assigned", "accepted", "pinned", "poisoned"):
            assert (batch_gmem.plane(name) == one_gmem.plane(name)).all(), name


@pytest.mark.parametrize("kind", MET, ids=lambda kind: "-".join(map(str, kind)))
def test_beyond_the_end_and_the_numbers_a_batch_agrees_too(kind):
    """Pages before the end of the file refuse first, and a launch update does those that it can."""
    steps = [step for step in Step if step not in (Step.CONVERT, Step.POISON, Step.LAUNCH_FINISH)]
    last = (PAGES - 4) * P
    top = 1 << 64
    ranges = [
        (last, 6 * P),
        (last, top - last),
        (last, top - P),
        (PAGES * P, P),
        (top - P, P),
        (top - P, 2 * P),
        (top // 2 - P, P),
        (P, top // 2 - P),
        (last, top // 2 - last - P),
    ]
    prepared = [
        ([Step.CONVERT, Step.ALLOCATE, Step.POISON], [last, last, last + P], [2 * P, 2 * P, P]),
        ([Step.CONVERT, Step.ACCEPT], [last, last], [4 * P, 2 * P]),
        ([Step.CONVERT], [last], [4 * P]),
        ([], [], []),
    ]
    for before in prepared:
        for step in steps:
            for offset, size in ranges:
                for access in range(3 if step in (Step.GUEST_READ, Step.GUEST_WRITE) else 1):
                    batch_vm, batch_gmem = machine(*kind, backing="none")
                    one_vm, one_gmem = machine(*kind, backing="none")
                    for gmem in (batch_gmem, one_gmem):
                        gmem.apply_many(*before, 8)
                    result = batch_gmem.apply_many(step, [offset], [size], 0, [access])
                    outcome, where = single(one_vm, one_gmem, step, offset, size, 0, access, contents=False)
                    found = OUTCOMES[result.outcome[0]]
                    assert found == outcome, (step, access, hex(offset), hex(size))
                    assert where is None or result.error_offset[0] == where
                    assert batch_vm.counters == one_vm.counters
                    assert batch_gmem.survey() == one_gmem.survey()


@pytest.mark.parametrize("backing", ["memfd", "none"])
@pytest.mark.parametrize("kind", KINDS[::7], ids=lambda kind: "-".join(map(str, kind)))
def test_backings_agree(kind, backing):
    columns = random_steps(7, kind[0])
    vm, gmem = machine(*kind)
    other_vm, other = machine(*kind, backing=backing)
    result, found = gmem.apply_many(*columns), other.apply_many(*columns)
    assert (result.outcome == found.outcome).all()
    assert (result.error_offset == found.error_offset).all()
    assert vm.counters == other_vm.counters
    if backing != "none":
        writes = (columns[0] == Step.HOST_WRITE) | (columns[0] == Step.GUEST_WRITE)
        assert writes.any()
        assert (gmem.memory == other.memory).all()


def committed(gmem):
    """Pages of a memfd that the host has memory for."""
    fd, found, at = gmem._store.backing.data_descriptor, set(), 0
    with suppress(OSError):  # ENXIO: no more of it
        while True:
            low = os.lseek(fd, at, os.SEEK_DATA)
            at = os.lseek(fd, low, os.SEEK_HOLE)
            found |= {*range(low // P, at // P)}
    return found


def test_what_is_refused_takes_no_memory_and_lack_of_it_is_told_last():
    """A sealed memfd has holes: pages that are allocated are committed, others aren't."""
    _vm, gmem = machine("v5", "SNP", "today", True, backing="memfd")
    gmem.apply_many(Step.CONVERT, [10 * P], [P], 8)
    steps = [Step.HOST_WRITE, Step.PIN, Step.ACCEPT, Step.ALLOCATE, Step.GUEST_READ, Step.POPULATE]
    result = gmem.apply_many([*steps, 99], [8 * P] * 7, [4 * P] * 3 + [gmem.size] + [4 * P] * 3)
    names = ["SIGBUS", "EFAULT", "MEMORY_FAULT", "EINVAL", "NOT_VALIDATED", "EIO", "EINVAL"]
    assert [OUTCOMES[outcome] for outcome in result.outcome] == names
    assert committed(gmem) == {
        8,
        10,
    }  # left by the launch update, and by the private access, that were refused
    assert np.flatnonzero(gmem.plane("allocated")).tolist() == [8, 10]
    gmem.apply_many([Step.HOST_WRITE, Step.UNPIN, Step.ALLOCATE], [P] * 3, [P, P, 3 * P])
    assert committed(gmem) == {1, 2, 3, 8, 10}
    gmem._store.header[layout.HOST_STEPS_LEFT] = 0
    before = gmem.survey()
    result = gmem.apply_many([Step.HOST_WRITE, Step.HOST_WRITE, Step.PIN], [8 * P, 20 * P, 0], [4 * P, P, P])
    assert [OUTCOMES[outcome] for outcome in result.outcome] == ["SIGBUS", "ENOMEM", "ENOMEM"]
    assert gmem.survey() == before


def test_every_step_has_a_row_and_says_why_not():
    vm, gmem = machine("v5", "SNP", "today", False)
    result = gmem.apply_many(list(Step), [0] * len(Step), [P] * len(Step), 8)
    named = {Step(i): OUTCOMES[outcome] for i, outcome in enumerate(result.outcome)}
    assert named[Step.CONVERT] == "OK"
    assert named[Step.HOST_READ] == "SIGBUS"
    assert named[Step.GUEST_READ] == "NOT_VALIDATED"
    assert named[Step.ACCEPT] == "OK"
    assert named[Step.PIN] == "EFAULT"
    assert named[Step.LAUNCH_FINISH] == "EINVAL"
    assert OUTCOMES[gmem.apply_many([99], [0], [P]).outcome[0]] == "EINVAL"
    assert OUTCOMES[gmem.apply_many(Step.GUEST_READ, [0], [P], 0, [3]).outcome[0]] == "EINVAL"
    assert vm.counters.memory_faults == 0
    assert gmem.apply_many(Step.GUEST_READ, [0], [P], 0, [1]).total.memory_faults == 1
    assert vm.counters.memory_faults == 1


def test_bad_columns_and_legacy_are_refused():
    _, gmem = machine("v5", "SNP", "today", False)
    with pytest.raises(errors.InvalidArgumentError, match="the same length"):
        gmem.apply_many([0, 1], [0], [P])
    with pytest.raises(TypeError, match="steps"):
        gmem.apply_many([0.5], [0], [P])
    legacy = gmemcore.create_vm("SNP", abi="legacy").create_guest_memfd(P, 1)
    with pytest.raises(errors.UnsupportedOperationError, match="need conversion in place"):
        legacy.apply_many([0], [0], [P])
    gmem.close()
    with pytest.raises(errors.BadFileError):
        gmem.apply_many([0], [0], [P])


# ---- threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [0, 1, 2])
@pytest.mark.parametrize("vm_type", ["SNP", "TDX", "SW_PROTECTED"])
def test_threads_make_the_same_bytes_and_counters(vm_type, flag):
    pages = 3 * 1024 + 700
    found = []
    for threads in (1, 2, 3):
        options = {"seed": 3, "threads": threads, "backing": BYTES}
        vm = gmemcore.create_vm(vm_type, abi="two-caps", firmware="cipher", **options)
        gmem = vm.create_guest_memfd(pages * P, flags=3)
        vm.add_memslot(0, 0, gmem.size, gmem)
        vm.launch_finish()
        draw = np.random.default_rng(1)
        if BYTES == "none":
            gmem.host_touch(0, gmem.size)
        else:
            gmem.host_write(0, draw.integers(0, 256, gmem.size, np.uint8))
        for start, size, attributes in ((5, 900, 8), (3000, 64, 8), (0, pages, 8), (0, pages, 0)):
            request = start * P, size * P, attributes, flag
            try:
                gmem.set_memory_attributes(*request)
            except errors.UnsupportedContentModeError:
                gmem.set_memory_attributes(*request[:3])
            vm.accept(0, 8 * P) if attributes and start == 0 else None
        many = gmem.set_memory_attributes_many([0, 4 * P], [gmem.size, P], [8, 0], [0, 0])
        assert not many.errno.any()
        contents = b"" if BYTES == "none" else gmem.memory.tobytes()
        found.append((contents, vm.counters, gmem.plane("accepted").tobytes()))
        if not JIT_DISABLED and vm_type == "SW_PROTECTED":  # which scrambles whatever is asked for
            assert threads_started(gmem) == threads - 1
    assert found[0] == found[1] == found[2]


def threads_started(gmem):
    """How many threads transformed parts of the last long range."""
    store = gmem._store
    if store.header[layout.THREADS] == 1:
        return 0
    tasks = store._tasks.reshape(-1, int(layout.TASK_WORDS))
    return int(tasks[:, layout.TASK_STARTED].sum())


def test_threads_refuse_alike_and_change_nothing():
    vm = gmemcore.create_vm("SW_PROTECTED", threads=2)
    gmem = vm.create_guest_memfd(16 << 20, flags=3)
    gmem.pin(8 << 20, P)
    with pytest.raises(errors.PagePinnedError) as raised:
        gmem.set_memory_attributes(0, gmem.size, 8)
    assert raised.value.error_offset == 8 << 20
    assert not gmem.plane("private").any()
    for threads in (0, -1, 1025):
        with pytest.raises(errors.InvalidArgumentError, match="1 to 1024"):
            gmemcore.create_vm("SNP", threads=threads)
    with pytest.raises(TypeError):
        gmemcore.create_vm("SNP", threads=1.0)


def test_a_child_of_a_fork_has_threads_of_its_own():
    """In a process of its own, since this one may have threads that no fork should meet."""
    script = """
import os, signal, warnings
import gmemcore
warnings.simplefilter("ignore", DeprecationWarning)
gmem = gmemcore.create_vm("SW_PROTECTED", threads=2).create_guest_memfd(16 << 20, flags=3)
gmem.fallocate(1, 0, gmem.size)
gmem.set_memory_attributes(0, gmem.size, 8)
child = os.fork()
if child == 0:
    signal.alarm(60)
    gmem.set_memory_attributes(0, gmem.size, 0)
    os._exit(int(gmem.plane("private").any()))
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_record_of_page_states_ends_where_numpys_do():
    big = gmemcore.create_vm("SNP", backing="none").create_guest_memfd(16 << 40)
    with pytest.raises(errors.UnsupportedOperationError, match=r"plane\(\) or packed_state\(\)"):
        big.page_states()


@pytest.mark.parametrize("attributes", [1, 2, 8, 9])
@pytest.mark.parametrize("abi", ["v5", "v13"])
def test_a_vm_without_private_memory_knows_no_attribute(abi, attributes):
    _, gmem = machine(abi, "DEFAULT", "today", False)
    with pytest.raises(errors.InvalidArgumentError):
        gmem.set_memory_attributes(0, P, attributes)


@pytest.mark.parametrize(
    ("abi", "named"), [("v5", "known here: ZERO=0x1"), ("v13", "known here: none, must be 0")]
)
def test_a_refusal_says_which_flags_there_are(abi, named):
    _, gmem = machine(abi, "SNP", "today", False)
    with pytest.raises(errors.InvalidArgumentError, match=named):
        gmem.set_memory_attributes(0, P, 8, 1 << 20)
