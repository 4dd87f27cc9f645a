"""Deferred contents: every result is that of eager ones, and memory is taken only by pages that were written.

Two guests, one of each kind, get the same random operations. Outcomes, page state, counters and, at random
moments, every byte must be the same. `-m slow` runs a million operations.
"""

import os
import random

import numpy as np
import pytest

import gmemcore
from gmemcore.engine import kernels as layout
from support.oracle import PAGE, key_stream_page
from support.paths import JIT_DISABLED, needs_compiler

OPERATIONS = 300 if JIT_DISABLED else 6_000
LONG_OPERATIONS = 1_000_000
ROUND = 300  # operations of one pair of guests
FILE_PAGES = (1, 64, 70, 513, 1100)
KINDS = (
    ("SNP", "two-caps", "cipher"),
    ("TDX", "two-caps", "cipher"),
    ("SNP", "v5", "today"),
    ("TDX", "v13", "today"),
    ("SW_PROTECTED", "v5", "today"),
    ("PKVM", "v5", "today"),
    ("SNP", "tracking", "today"),
    ("DEFAULT", "v5", "today"),
    ("SNP", "legacy", "today"),
    ("TDX", "legacy", "today"),
)


def machine(contents, kind=KINDS[0], pages=64, **options):
    vm = gmemcore.create_vm(*kind, seed=1234567, contents=contents, **options)
    flags = vm.check_cap("GUEST_MEMFD_FLAGS") & (1 if kind[1] == "legacy" else 3)
    gmem = vm.create_guest_memfd(pages * PAGE, flags)
    if kind[0] != "DEFAULT" or kind[1] != "legacy":
        vm.add_memslot(0, 0, pages * PAGE, gmem)
    return vm, gmem


def outcome_of(call, *arguments):
    try:
        result = call(*arguments)
    except gmemcore.GmemError as error:
        return type(error), str(error), getattr(error, "error_offset", None)
    return result


def operation(choose, pages):
    """A function of a guest and its file; the same choices for both."""
    count = min(choose.choice((1, 1, 2, 3, 40, 64, 65, 512, pages)), pages)
    offset, size = choose.randrange(pages - count + 1) * PAGE, count * PAGE
    data = choose.randbytes(choose.choice((1, 9, 100, 5000)))
    at, flag, private = (
        choose.randrange(PAGE),
        choose.choice((0, 0, 1, 2, 2)),
        choose.choice((None, True, False)),
    )
    attribute = choose.choice((0, 8))
    source = None if flag == 0 else data[:1] * size
    page_type = choose.choice(("normal", "normal", "zero", "cpuid"))
    return choose.choice(
        (
            *[lambda vm, gmem: gmem.set_memory_attributes(offset, size, attribute, flag).counters] * 4,
            lambda vm, gmem: gmem.set_memory_attributes_many(
                [offset, 0, offset], [size, size, PAGE], [attribute, 8 - attribute, attribute], flag
            ).errno.tolist(),
            *[lambda vm, gmem: gmem.host_write(offset + at, data)] * 2,
            lambda vm, gmem: gmem.host_read(offset + at, size),
            *[lambda vm, gmem: vm.guest_write(offset + at, data, private)] * 2,
            lambda vm, gmem: vm.guest_read(offset + at, size, private),
            lambda vm, gmem: vm.guest_touch(offset, size, private),
            *[lambda vm, gmem: vm.accept(offset, size)] * 2,
            lambda vm, gmem: gmem.fallocate(3 if flag else 1, offset, size),
            *[lambda vm, gmem: vm.launch_update(offset, size, source, page_type)] * 2,
            lambda vm, gmem: (gmem.pin if flag else gmem.unpin)(offset, size),
            lambda vm, gmem: vm.set_memory_attributes(offset, size, attribute, 0).counters,
            lambda vm, gmem: vm.correct_cpuid(data[:64]),
            lambda vm, gmem: gmem.discard_shared(offset, size),
        )
    )


def rare_operation(choose):
    return choose.choice(
        (
            lambda vm, gmem: vm.launch_finish(),
            lambda vm, gmem: gmem.poison(0),
            lambda vm, gmem: vm.delete_memslot(0),
        )
    )


def memory_of(gmem):
    """The DRAM of both sides; leaves deferred contents deferred."""
    return [store.dram(0, gmem.size) for store in gmem._stores()]


def look(choose, gmem, views):
    """What brings bytes up to date, now and then."""
    if choose.random() < 0.02:
        first = choose.randrange(gmem.n_pages)
        gmem.materialize(first * PAGE, choose.randrange(1, gmem.n_pages - first + 1) * PAGE)
    if choose.random() < 0.02:
        views.append(gmem.memory)
    if choose.random() < 0.1:
        views.clear()


def assert_same(eager, deferred, views):
    (one, own), (other, its) = eager, deferred
    assert its.survey() == own.survey()
    assert other.counters == one.counters
    assert memory_of(its) == memory_of(own)
    assert its.contents_sum() == own.contents_sum()
    for view in views:
        assert view.tobytes() == memory_of(own)[0]


def stored_pages(store):
    """Which pages have memory, read from the marks and lines of `kernels.STORED`."""
    marks = store.contents.marks
    lines = np.where((marks & 2).astype(bool)[:, None], store.contents.lines[0].reshape(-1, 8), np.uint64(0))
    bits = np.unpackbits(lines.ravel().view(np.uint8), bitorder="little") ^ np.repeat(marks & 1, 512)
    return bits[: store.n_pages].astype(bool)


def assert_unstored_is_zero(gmem):
    for store in gmem._stores():
        stored = stored_pages(store)
        assert not store.backing.words.reshape(-1, PAGE // 8)[~stored].any()
        assert stored.sum() == store.stored_pages


def run_side_by_side(seed, operations):
    choose, done = random.Random(seed), 0
    while done < operations:
        kind, pages = choose.choice(KINDS), choose.choice(FILE_PAGES)
        eager, deferred = (machine(contents, kind, pages) for contents in ("eager", "deferred"))
        views = []
        for number in range(min(ROUND, operations - done)):
            step = operation(choose, pages) if choose.random() > 0.02 else rare_operation(choose)
            expected, found = (outcome_of(step, *both) for both in (eager, deferred))
            assert found == expected, f"seed {seed}, {kind}, operation {number}"
            look(choose, deferred[1], views)
            if choose.random() < 0.1:
                assert_same(eager, deferred, views)
        assert_same(eager, deferred, views)
        assert_unstored_is_zero(deferred[1])
        for vm, _ in (eager, deferred):
            vm.close()
        done += ROUND


def test_every_byte_and_result_is_that_of_eager_contents():
    run_side_by_side(int(os.environ.get("GMEMCORE_SEED", "20260502")), OPERATIONS)


@pytest.mark.slow
def test_a_million_operations_side_by_side(request):
    if "slow" not in request.config.getoption("markexpr"):
        pytest.skip("takes minutes; run with -m slow")
    run_side_by_side(random.SystemRandom().randrange(1 << 62), LONG_OPERATIONS)


# --- memory ---------------------------------------------------------------------------------------


@needs_compiler
def test_a_file_larger_than_the_hosts_memory_takes_what_was_written():
    size = 1 << 40
    vm, gmem = machine("deferred", pages=size // PAGE)
    vm.launch_finish()
    gmem.host_write(size - 2 * PAGE, b"0xbeef")
    assert gmem.convert(0, size, "private", "preserve").counters.bytes_xored == size
    assert vm.guest_read(size - 2 * PAGE, 6) == b"0xbeef"
    assert vm.guest_read(0, 6) == bytes(6)
    assert gmem.allocated == size
    assert gmem.stored == PAGE
    gmem.convert(0, size, "shared", "preserve")
    assert gmem.host_read(size - 2 * PAGE, 6) == b"0xbeef"
    gmem.fallocate(3, 0, size)
    assert (gmem.stored, gmem.host_read(size - PAGE, 6)) == (0, bytes(6))
    vm.close()


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


@needs_compiler
def test_memory_is_that_of_stored_pages():
    """Every hundredth page of 64 GiB is written: host memory is that of those pages, and 5 %."""
    pages, step = (1 << 36) // PAGE, 100
    vm, gmem = machine("deferred", pages=pages)
    vm.launch_finish()
    gmem.convert(0, pages * PAGE, "private", "preserve")
    vm.guest_write(0, b"1")
    before, planes = resident(), 12 << 20
    for page in range(0, pages // 8, step):
        vm.guest_write(page * PAGE, b"1")
    stored = -(-pages // 8 // step) * PAGE
    assert gmem.stored == stored
    assert resident() - before <= stored * 1.05 + planes
    vm.close()


def test_zeroing_releases_memory():
    vm, gmem = machine("deferred", KINDS[4])
    gmem.host_write(0, b"1" * 8 * PAGE)
    assert gmem.stored == 8 * PAGE
    gmem.set_memory_attributes(0, 4 * PAGE, 0, 1)
    assert (gmem.stored, gmem.allocated) == (4 * PAGE, 8 * PAGE)
    assert gmem.host_read(0, 4 * PAGE) == bytes(4 * PAGE)
    assert_unstored_is_zero(gmem)
    vm.close()


# --- raw views ------------------------------------------------------------------------------------


def test_a_view_is_up_to_date_while_it_exists():
    vm, gmem = machine("deferred")
    vm.launch_finish()
    gmem.host_write(0, b"0xbeef")
    view = gmem.memory[: 2 * PAGE]
    gmem.convert(0, 4 * PAGE, "private", "preserve")
    key = key_stream_page(1234567, 0, 1)
    assert view[PAGE:].tobytes() == key
    gmem.convert(0, 4 * PAGE, "shared", "preserve")
    assert view[:6].tobytes() == b"0xbeef"
    assert gmem.stored == 4 * PAGE
    del view
    gmem.convert(8 * PAGE, 8 * PAGE, "private", "preserve")
    assert gmem.stored == 4 * PAGE  # nobody looks: XOR is due again
    gmem.materialize(8 * PAGE, PAGE)
    assert gmem.stored == 5 * PAGE
    vm.close()


def test_a_writable_view_ends_deferral():
    vm, gmem = machine("deferred", backing="memfd", enforce="mprotect")
    vm.launch_finish()
    gmem.host_write(0, b"0xbeef")
    gmem.convert(0, 2 * PAGE, "private", "preserve")
    gmem.convert(0, 2 * PAGE, "shared", "preserve")
    array = gmem.mmap(0, 4 * PAGE).array
    assert array[:6].tobytes() == b"0xbeef"
    array[3 * PAGE] = 7
    assert gmem.host_read(3 * PAGE, 2) == b"\x07\0"
    gmem.convert(3 * PAGE, PAGE, "private", "preserve")
    assert vm.guest_read(3 * PAGE, 2) == b"\x07\0"
    assert gmem._store.dram(3 * PAGE, 8) == gmem.memory[3 * PAGE :][:8].tobytes() != b"\x07" + bytes(7)
    vm.close()


# --- the host has no memory -----------------------------------------------------------------------


def state_of(vm, gmem):
    planes = [gmem.plane(name).tobytes() for name in ("private", "allocated", "assigned", "accepted")]
    return planes, memory_of(gmem), vm.counters, vm.phase


def scrambling():
    vm, gmem = machine("deferred", KINDS[4])
    gmem.host_touch(0, 8 * PAGE)
    return vm, gmem, lambda: gmem.set_memory_attributes(0, 8 * PAGE, 8)


def host_writing():
    vm, gmem = machine("deferred")
    return vm, gmem, lambda: gmem.host_write(100, b"1" * 2 * PAGE)


def guest_writing():
    vm, gmem = machine("deferred")
    return vm, gmem, lambda: vm.guest_write(100, b"1" * 2 * PAGE)


def launching():
    vm, gmem = machine("deferred")
    gmem.convert(0, 8 * PAGE, "private", "preserve")
    return vm, gmem, lambda: vm.launch_update(0, 8 * PAGE, b"1" * 8 * PAGE)


def keyed():
    vm, gmem = machine("deferred")
    vm.launch_finish()
    gmem.convert(0, 8 * PAGE, "private", "preserve")
    return vm, gmem


def materialising():
    vm, gmem = keyed()
    return vm, gmem, gmem.materialize


def viewing():
    vm, gmem = keyed()
    return vm, gmem, lambda: gmem.memory


def encrypting_what_is_viewed():
    vm, gmem = keyed()
    view = gmem.memory
    return vm, gmem, lambda kept=view: gmem.convert(8 * PAGE, 8 * PAGE, "private", "preserve")


CALLS = (
    *(scrambling, host_writing, guest_writing, launching, materialising, viewing),
    encrypting_what_is_viewed,
)


@pytest.mark.parametrize("setting", CALLS)
def test_a_lack_of_memory_is_found_before_anything_changes(setting):
    vm, gmem, call = setting()
    header, before = gmem._store.header, state_of(vm, gmem)
    header[layout.HOST_STEPS_LEFT] = 0
    with pytest.raises(gmemcore.GmemError) as raised:
        call()
    assert raised.value.outcome == "ENOMEM"
    assert state_of(vm, gmem) == before
    header[layout.HOST_STEPS_LEFT] = int(layout.NEVER)
    call()
    assert state_of(vm, gmem) != before or setting in (materialising, viewing)
    vm.close()


@needs_compiler
def test_materialising_more_than_the_host_has_is_refused():
    size = 1 << 40
    vm, gmem = machine("deferred", pages=size // PAGE)
    vm.launch_finish()
    gmem.convert(0, size, "private", "preserve")
    for call in (gmem.materialize, lambda: gmem.memory):
        with pytest.raises(gmemcore.GmemError, match="need 0x10000000000 bytes of memory") as raised:
            call()
        assert raised.value.outcome == "ENOMEM"
    assert gmem.stored == 0
    vm.close()


def test_a_file_that_the_host_cannot_map_is_refused():
    vm = gmemcore.create_vm("SNP", contents="deferred")
    with pytest.raises(gmemcore.GmemError, match="the host can't map") as raised:
        vm.create_guest_memfd(1 << 55, 3)
    assert raised.value.outcome == "ENOMEM"
    assert vm.files == []


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contents": "lazy"}, "unknown kind of contents 'lazy'; known: eager, deferred"),
        (
            {"contents": "deferred", "backing": "none"},
            "deferred contents need a backing with bytes, not none",
        ),
        ({"contents": "Deferred", "prefault": True}, "take memory page by page; leave prefault out"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(gmemcore.GmemError, match=message):
        gmemcore.create_vm("SNP", **options)


@pytest.mark.parametrize("arguments", [(1, PAGE), (0, 0), (0, 65 * PAGE), (64 * PAGE,)])
def test_ranges_to_materialise_are_whole_pages_of_the_file(arguments):
    vm, gmem = machine("deferred")
    with pytest.raises(gmemcore.GmemError) as raised:
        gmem.materialize(*arguments)
    assert raised.value.outcome == "EINVAL"
    vm.close()
