"""The benchmark room: its one table, its arithmetic, and that what it verifies is really verified."""

import ctypes
import json
import mmap
import random
import re
import subprocess
import sys
import time
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

import gmemcore
from gmemcore.benchmark import expected, loops, run, samples, scene
from gmemcore.benchmark.cases import DEFAULT_SELECTION, Stage, Transfer, find, table
from gmemcore.benchmark.expected import Contents, Pattern, Reference, WrongContentsError, key_stream, pieces
from gmemcore.benchmark.memory import Memory
from gmemcore.benchmark.primitives import CONSTANTS, Primitives, candidates
from gmemcore.benchmark.record import cell_of
from gmemcore.benchmark.run import QUICK, Bench, Effort, headline
from gmemcore.engine import Counters
from gmemcore.engine.host import check_available
from gmemcore.engine.steps import Step
from gmemcore.errors import InvalidArgumentError, OutOfMemoryError
from gmemcore.policy import ABIS, cells
from gmemcore.results.environment import environment
from gmemcore.uapi import PAGE_SIZE, VmType
from gmemcore.units import format_size, parse_size
from support.paths import JIT_DISABLED, ROOT

SMALL = 16 << 10 if JIT_DISABLED else 64 << 10
needs_speed = pytest.mark.skipif(
    JIT_DISABLED, reason="megabytes are too much for kernels that aren't compiled"
)


@pytest.fixture
def memory():
    own = Memory(SMALL)
    yield own
    own.close()


@pytest.fixture
def primitives(memory):
    return Primitives(memory.side(0).words, memory.source())


@pytest.fixture
def bench(memory, primitives):
    return Bench(memory, QUICK, primitives=primitives)


def small_table(*names, **options):
    return table(*names, memory=SMALL, ranges=[PAGE_SIZE, SMALL], **options)


# ---- sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("4k", 4096),
        ("4K", 4096),
        ("2m", 2 << 20),
        ("1g", 1 << 30),
        ("16G", 16 << 30),
        ("1t", 1 << 40),
    ],
)
def test_sizes_are_read_as_selftests_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        *("", "k", "-4k", "+4k", "4.5m", "1e3", "04k", "4k,", "٤k", " 4k", "4k\n", "0x", "4x"),
        *("0", "0k", "1", "4097", "1k", "9223372036854775808", "8388608t", "99999999999999999999t"),
    ],
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InvalidArgumentError, match=r"use 4k, 2m or 1g|must be") as refusal:
        parse_size(text)
    assert refusal.value.outcome == "EINVAL"


@pytest.mark.parametrize("size", [4096, 12 << 10, 2 << 20, 1 << 30, (1 << 30) + 4096, 1 << 40])
def test_sizes_are_written_as_they_are_read(size):
    assert parse_size(format_size(size)) == size


# ---- the table -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("abi", [*ABIS, "merged"])
def test_every_cell_of_policy_is_a_case(abi):
    cases = table(abi, memory=8 << 20)
    covered = {case.key for case in cases}
    expected = [(key, answer) for key, answer in cells(abi) if key.firmware == "today" or key in covered]
    for key, answer in expected:
        own = [case for case in cases if case.key == key]
        sizes = [case.range for case in own if case.pages_allocated_before]
        assert sizes == ([4096, 2 << 20, 8 << 20] if answer.outcome == "OK" else [4096])
        assert all(case.cell == answer for case in own)
    assert covered == {key for key, _ in expected}


def test_other_firmware_is_measured_where_it_matters():
    assert {case.key.firmware for case in table("v5", memory=SMALL)} == {"today"}
    assert {case.key.firmware for case in table("two-caps", memory=SMALL)} == {"today", "cipher"}
    assert {case.key.firmware for case in table("v5", firmware="cipher", memory=SMALL)} == {"cipher"}


def test_default_selection():
    cases = table(memory=8 << 20)
    assert {(case.key.abi, case.key.firmware) for case in cases} == set(DEFAULT_SELECTION)
    for vm_type in VmType:
        assert any(case.key.vm_type == vm_type for case in cases)
    assert len({case.name for case in cases}) == len(cases)


def test_ranges_must_fit():
    assert {case.range for case in table("v5", memory=4096)} == {4096}
    with pytest.raises(InvalidArgumentError, match="larger than the memory"):
        table("v5", memory=4096, ranges=[8192])
    with pytest.raises(InvalidArgumentError, match="known: legacy"):
        table("v99")
    with pytest.raises(LookupError):
        find([], effect="ZERO")


@pytest.mark.parametrize(
    ("where", "transfer", "accept", "primitive"),
    [
        (("v5", "SNP", "today", "launching", "to_private", "PRESERVE"), Transfer.IN_PLACE, False, "xor"),
        (("v5", "SNP", "today", "launching", "to_private", "NONE"), Transfer.FROM_SOURCE, False, "memcpy"),
        (("v5", "SNP", "today", "running", "to_private", "NONE"), None, True, "bitmap"),
        (("two-caps", "TDX", "cipher", "running", "to_private", "PRESERVE"), None, False, "xor"),
        (("two-caps", "TDX", "cipher", "running", "to_shared", "PRESERVE"), None, False, "xor"),
        (("v5", "TDX", "today", "running", "to_shared", "NONE"), None, False, "memset"),
        (("v5", "PKVM", "today", "running", "to_shared", "ZERO"), None, False, "memset"),
        (("v5", "SW_PROTECTED", "today", "running", "to_private", "NONE"), None, False, "xor"),
        (("legacy", "SNP", "today", "running", "to_private", "NONE"), Transfer.COPY, True, "memcpy"),
        (("legacy", "DEFAULT", "today", "running", "to_shared", "NONE"), None, False, "bitmap"),
    ],
)
def test_the_workload_goes_on_until_the_other_side_can_read(where, transfer, accept, primitive):
    names = ("abi", "vm_type", "firmware", "phase", "direction", "flag_name")
    case = find(table(memory=SMALL), **dict(zip(names, where, strict=True)))
    assert (case.transfer, case.accept, case.primitive) == (transfer, accept, primitive)


@pytest.mark.parametrize(
    ("where", "does"),
    [
        (("v5", "TDX", "today", "running", "to_shared", "NONE"), "ZERO"),  # KEEP by policy
        (("v5", "SNP", "today", "running", "to_shared", "NONE"), "KEEP"),
        (("v5", "SW_PROTECTED", "today", "running", "to_private", "NONE"), "SCRAMBLE"),
        (("two-caps", "TDX", "cipher", "running", "to_private", "PRESERVE"), "ENCRYPT"),
        (("two-caps", "SNP", "cipher", "running", "to_shared", "PRESERVE"), "DECRYPT"),
        (("legacy", "SNP", "today", "running", "to_private", "NONE"), "KEEP"),
        (("v5", "SNP", "today", "running", "to_private", "ZERO"), None),
    ],
)
def test_what_a_cell_really_does(where, does):
    names = ("abi", "vm_type", "firmware", "phase", "direction", "flag_name")
    assert find(table(memory=SMALL), **dict(zip(names, where, strict=True))).does == does


def test_a_platform_that_clears_does_so_only_to_pages_that_were_assigned():
    cases = table("v5", "TDX", memory=8 << 20)
    where = {"direction": "to_shared", "flag_name": "NONE", "phase": "running"}
    assert find(cases, **where, pages_allocated_before=512).does == "ZERO"
    unassigned = find(cases, direction="to_shared", flag_name="ZERO", pages_allocated_before=0)
    assert unassigned.does == "KEEP"


def test_filters():
    every = table("v5", memory=8 << 20)
    for name, kept in (("phases", "running"), ("directions", "to_private"), ("flags", "PRESERVE")):
        attribute = {"phases": "phase", "directions": "direction"}.get(name)
        own = table("v5", memory=8 << 20, **{name: {kept}})
        expected_cases = [
            case for case in every if (getattr(case.key, attribute) if attribute else case.flag_name) == kept
        ]
        assert own == expected_cases
    zeroing = table("v5", memory=8 << 20, effects={"ZERO"})
    assert {case.key.flag for case in zeroing if case.key.vm_type == "TDX"} == {0, 1}
    assert {case.does for case in zeroing} == {"ZERO", "KEEP"}  # KEEP: of memory that nobody touched
    assert not any(case.refused for case in zeroing)


def test_the_headline_has_a_case_for_each_effect():
    cases = table(memory=8 << 20)
    lines = headline(cases)
    assert list(lines) == ["KEEP", "ZERO", "SCRAMBLE", "ENCRYPT", "DECRYPT", "populate", "copy"]
    assert lines["KEEP"].range == 4096
    assert all(case.range == 8 << 20 for effect, case in lines.items() if effect != "KEEP")
    assert all(case.uniform and case.pages_allocated_before for case in lines.values())
    assert lines["populate"].transfer == Transfer.IN_PLACE
    assert lines["copy"].abi.legacy
    assert headline([case for case in cases if case.refused]) == {}


# ---- the reference ---------------------------------------------------------------------------------------


def test_key_stream_is_splitmix64():
    assert key_stream(1234567, 0, 24).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]
    whole = key_stream((1 << 64) - 3, 0, 8192)
    assert np.array_equal(whole[512:], key_stream((1 << 64) - 3, 4096, 4096))


def test_pieces_tile_a_range():
    cut = list(pieces(4096, 3 * expected.PIECE + 8192))
    assert cut[0][0] == 4096
    assert cut[-1][1] == 3 * expected.PIECE + 8192
    assert all(end == start for (_, end), (start, _) in pairwise(cut))
    assert all(start // expected.PIECE == (end - 1) // expected.PIECE for start, end in cut)


def test_patterns_differ_from_place_to_place():
    pattern = Pattern(1)
    first, second = pattern.words(0, 4096), pattern.words(expected.PIECE, expected.PIECE + 4096)
    assert not (first == second).any()
    assert not (first == Pattern(2).words(0, 4096)).any()
    assert np.array_equal(pattern.words(0, 8192)[512:], pattern.words(4096, 8192))


def test_reference_notices_one_bit():
    reference, written = Reference(), Contents(expected.WRITTEN, keyed=True)
    words = reference.words(written, 0, 8192).copy()
    reference.check(words, written, 0, written, "here")
    words[700] ^= np.uint64(1 << 40)
    with pytest.raises(WrongContentsError, match=r"here, offset 0x15e0: .* under the key"):
        reference.check(words, written, 0, written, "here")


@pytest.mark.parametrize("spoil", ["a word stays", "ones", "two pages alike"])
def test_reference_notices_poor_scrambling(spoil):
    reference, before = Reference(), Contents(expected.WRITTEN)
    old = reference.words(before, 0, 32768)
    words = old ^ key_stream(5, 0, 32768)
    reference.check(words, Contents(expected.RANDOM), 0, before, "here")
    if spoil == "a word stays":
        words[9] = old[9]
    elif spoil == "ones":
        words |= np.uint64(0x0101010101010101)
    else:
        words[512:1024] = words[:512]
    with pytest.raises(WrongContentsError, match="here"):
        reference.check(words, Contents(expected.RANDOM), 0, before, "here")


# ---- running ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("abi", ["two-caps", "legacy"] if JIT_DISABLED else [*ABIS])
def test_every_cell_of_every_revision_runs_and_is_verified(bench, abi):
    cases = small_table(abi)
    for result in bench.run(cases):
        case = result.case
        # A range alone and then a batch; one range that is all of the memory is run once.
        expected = case.range if case.refused or case.range == SMALL else PAGE_SIZE + SMALL
        assert result.verified_bytes == expected
        cell = cell_of(result)
        assert (cell.seconds.median is None) == (cell.ratio is None) == case.refused
        assert (cell.convert_gbps is None) == (case.bytes == "none" or case.refused)
        if not case.refused:
            assert result.counters.pages_changed == (case.range >> 12 if case.platform.private_memory else 0)


@needs_speed
def test_memory_that_nobody_touched():
    cases = [
        case for case in table("two-caps", "SNP", "cipher", memory=4 << 20) if not case.pages_allocated_before
    ]
    assert {case.cell.effect for case in cases} == {"ZERO", "ENCRYPT", "DECRYPT"}
    bench = Bench(Memory(4 << 20), QUICK)
    for result in bench.run(cases):
        assert result.case.bytes == ("xor" if result.case.cell.effect == "ENCRYPT" else "none")
        assert result.counters.pages_allocated == 512


def test_memfd_backing():
    memory = Memory(SMALL, "memfd")
    results = list(Bench(memory, QUICK).run(small_table(vm_type="TDX")))
    assert sum(not result.case.refused for result in results) > 20
    memory.close()


def test_equal_work_is_sampled_once(bench):
    cases = [case for case in small_table("v5", "PKVM") if not case.refused]
    whole = [case for case in cases if case.cell.effect == "ZERO" and case.range == SMALL]
    first, again = bench.run(whole)
    assert first.case.workload == again.case.workload
    assert again.series[Stage.CONVERT] is first.series[Stage.CONVERT]
    assert len(first.series[Stage.CONVERT].own) == 2


@needs_speed
def test_equal_work_is_verified_in_part_and_counted_whole():
    """A case whose work another one has: its counters are of the whole range all the same."""
    size = 8 << 20
    cases = [case for case in table("v5", "PKVM", memory=size, ranges=[size]) if not case.refused]
    zeroing = [case for case in cases if case.cell.effect == "ZERO"]
    bench = Bench(Memory(size), Effort(0.0, (2, 2), 4 << 20, 1 << 20))
    first, again = bench.run(zeroing)
    assert first.counters == again.counters
    assert again.counters.bytes_zeroed == size
    assert (first.verified_bytes, again.verified_bytes) == (size, 1 << 20)


@needs_speed
def test_stages_and_primitives_are_timed_in_the_same_memory_over_the_same_pages(monkeypatch):
    size = 4 << 20
    bench = Bench(Memory(size), Effort(0.0, (3, 3), 1 << 20, 1 << 20))
    seen = []
    original = bench.primitives._time
    monkeypatch.setattr(
        bench.primitives, "_time", lambda *asked: seen.append((*asked[::2], asked[3])) or original(*asked)
    )
    cases = table("two-caps", "SNP", "cipher", memory=size, ranges=[4096, size], effects={"ENCRYPT", "ZERO"})
    for result in bench.run(cases):
        series, case = result.series[Stage.CONVERT], result.case
        assert len(series.own) == len(series.others[case.primitive]) == 3
        assert series.pages == (1 << 20 if case.range == 4096 else size) >> 12
        assert bool(series.calls) == (case.range == 4096)
    assert bench.primitives._target is bench.memory.side(0).words
    assert {(name, step) for name, _, step in seen} == {
        ("memset", 4096),
        ("memset", size),
        ("xor", 4096),
        ("xor", size),
    }


@needs_speed
def test_attributes_alone_are_timed_on_a_large_guest_without_bytes(bench):
    case = find(table("v5", "PKVM", memory=SMALL, ranges=[SMALL]), effect="KEEP")
    (result,) = bench.run([case])
    series = result.series[Stage.CONVERT]
    assert series.ranges == 16384
    assert series.pages == 16384 * SMALL >> 12
    assert list(series.others) == ["bitmap"]


def test_nothing_comes_between_a_stage_and_its_preparation():
    """A primitive there would fault in what the stage is to fault in, and be charged for it."""
    done = []

    def act(name):
        return lambda *_, **__: done.append(name) or 1.0

    stub = SimpleNamespace(count=1, prepare=act("prepare"), time=act("stage"), settle=act("settle"))
    case = find(table("legacy", "SNP", memory=SMALL, ranges=[SMALL]), direction="to_private", refused=False)
    job = samples.Job(case, Stage.POPULATE, stub, SimpleNamespace(seconds=act("memcpy")), ["memcpy"])
    orders = set()
    for seed in range(10):
        done.clear()
        job.sample(random.Random(seed))
        orders.add(tuple(done))
    assert orders == {("prepare", "stage", "memcpy", "settle"), ("memcpy", "prepare", "stage", "settle")}


def pages_present(words):
    found = np.zeros(words.nbytes >> 12, np.uint8)
    assert not ctypes.CDLL(None).mincore(
        ctypes.c_void_p(words.ctypes.data), ctypes.c_size_t(words.nbytes), ctypes.c_void_p(found.ctypes.data)
    )
    return int(np.count_nonzero(found & 1))


@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize("direction", ["to_private", "to_shared"])
def test_memory_that_two_backings_discarded_is_back_for_the_next_sample(direction, stage):
    memory = Memory(SMALL, huge_pages=False)
    case = find(
        table("legacy", "SNP", memory=SMALL, ranges=[SMALL]),
        direction=direction,
        phase="running",
        refused=False,
    )
    own = scene.new_scene(case, memory, Reference())
    own.prepare(stage)
    own.time(stage)
    present = [pages_present(memory.side(side).words) for side in range(2)]
    own.settle()
    assert [pages_present(memory.side(side).words) for side in range(2)] == [SMALL >> 12] * 2
    assert present != [SMALL >> 12] * 2 or stage != Stage.CONVERT


def test_costly_stages_get_fewer_samples_but_more_time():
    jobs = [SimpleNamespace(cost=cost, share=share) for cost, share in ((1, 1), (4, 1), (4, 0.25), (1e-6, 1))]
    counts = samples._counts(jobs, 100.0, 2, 40)
    assert counts[3] == 40  # the most
    assert counts[0] == pytest.approx(2 * counts[1], abs=2)
    assert counts[2] == pytest.approx(counts[1] / 4, abs=1)
    taken = sum(job.cost * count for job, count in zip(jobs, counts, strict=True))
    assert 90 < taken <= 100
    assert samples._counts(jobs, 0.0, 2, 40) == [2] * 4
    assert samples._counts([], 1.0, 2, 40) == []


@pytest.mark.parametrize("ranges", [1, 8])
@pytest.mark.parametrize(
    ("abi", "where"),
    [
        ("legacy", {"direction": "to_private", "phase": "launching"}),
        ("legacy", {"direction": "to_private", "phase": "running"}),
        ("legacy", {"direction": "to_shared", "phase": "running"}),
        ("v5", {"direction": "to_private", "phase": "launching", "flag_name": "NONE"}),
        ("v5", {"direction": "to_private", "phase": "launching", "flag_name": "PRESERVE"}),
        ("v5", {"direction": "to_shared", "phase": "running", "flag_name": "ZERO"}),
    ],
)
def test_every_stage_takes_as_many_calls_whatever_the_ranges(monkeypatch, abi, where, ranges):
    """A timed stage makes no call from Python per range, so no row is about the interpreter."""
    size = 8 * SMALL
    case = find(table(abi, "SNP", "today", memory=size, ranges=[SMALL]), refused=False, **where)
    own = scene.new_scene(case, Memory(size), Reference(), ranges)
    calls = []
    original = scene.Stopwatch.__call__
    monkeypatch.setattr(
        scene.Stopwatch,
        "__call__",
        lambda watch, call, *more, **named: calls.append(call) or original(watch, call, *more, **named),
    )
    for stage in (each for each in Stage if case.work(each) is not None):
        own.prepare(stage)
        calls.clear()
        assert own.time(stage) > 0
        assert 1 <= len(calls) <= 3
    own.prepare()
    own.run()
    own.check()


@pytest.mark.parametrize("vm_type", VmType)
def test_two_backings_are_timed_in_the_state_that_they_are_verified_in(vm_type):
    """Without contents, which timing can do without, page state and counters are the same."""
    for case in table("legacy", vm_type, memory=SMALL, ranges=[SMALL]):
        if case.refused:
            continue
        states = []
        for written in (True, False):
            own = scene.new_scene(case, Memory(SMALL), Reference())
            own.prepare(written=written)
            planes = [side.records().tobytes() for side in own.gmem.sides]
            own.run()
            states.append((planes, own.counters()))
        assert states[0] == states[1], case.name


def test_a_repeated_call_stops_where_it_is_refused():
    vm = gmemcore.create_vm("SNP", backing="none")
    gmem = vm.create_guest_memfd(8 * 4096, flags=3)
    gmem.set_memory_attributes(5 * 4096, 4096, 8)
    starts = np.arange(8, dtype=np.uint64) * np.uint64(4096)
    ranges = starts, np.full(8, 4096, np.uint64)
    assert gmem.sides.shared.repeat(Step.HOST_WRITE, ranges) == 5
    assert gmem.plane("allocated").tolist() == [True] * 5 + [False] * 3
    gmem.set_memory_attributes(5 * 4096, 4096, 0)
    assert gmem.sides.shared.repeat(Step.HOST_WRITE, ranges) == 8


def records(monkeypatch, bench, **wanted):
    """Run one case of v5; what it raises is what the test is about."""
    return next(bench.run([find(small_table("v5"), refused=False, range=SMALL, **wanted)]))


def test_a_corrupted_byte_is_noticed(monkeypatch, bench):
    convert = scene.Scene.convert

    def corrupting(self):
        seconds = convert(self)
        self._memory.side(0).words[-1] ^= np.uint64(1)
        return seconds

    monkeypatch.setattr(scene.Scene, "convert", corrupting)
    with pytest.raises(WrongContentsError, match=r"v5-PKVM-.*the new side reads, offset " + hex(SMALL - 8)):
        records(monkeypatch, bench, vm_type="PKVM", effect="KEEP", direction="to_shared")


def test_a_kernel_that_does_nothing_is_noticed(monkeypatch, bench):
    from gmemcore.engine import jit

    for name in ("run", "convert_one"):
        monkeypatch.setattr(jit.load_kernels(), name, lambda *arguments: 0)
    for effect, direction in (("ZERO", "to_shared"), ("SCRAMBLE", "to_private"), ("KEEP", "to_private")):
        with pytest.raises(WrongContentsError):
            records(monkeypatch, bench, effect=effect, direction=direction, vm_type="SW_PROTECTED")


def test_a_wrong_key_stream_is_noticed(monkeypatch, bench):
    """Guest view and populate agree with each other, and are both wrong: DRAM tells."""
    original = scene.create_vm
    monkeypatch.setattr(
        scene,
        "create_vm",
        lambda *platform, seed, **options: original(*platform, seed=seed + 1, **options),
    )
    with pytest.raises(WrongContentsError, match="DRAM holds"):
        records(monkeypatch, bench, vm_type="SNP", phase="launching", flag_name="PRESERVE")


def test_a_wrong_attribute_is_noticed(monkeypatch, bench):
    monkeypatch.setattr(scene.Scene, "_private_pages", lambda self: np.array([True, False]))
    with pytest.raises(WrongContentsError, match="attribute"):
        records(monkeypatch, bench, vm_type="PKVM", effect="KEEP", direction="to_private")


def test_a_refusal_must_be_policys_and_change_nothing(monkeypatch, bench):
    case = find(small_table("v5"), vm_type="SNP", outcome="EOPNOTSUPP")
    request = scene.Scene.request
    monkeypatch.setattr(scene.Scene, "request", lambda self: None)
    with pytest.raises(WrongContentsError, match="answered OK, not EOPNOTSUPP"):
        list(bench.run([case]))

    def dirty(self):
        self._memory.side(0).words[3] ^= np.uint64(1)
        request(self)

    monkeypatch.setattr(scene.Scene, "request", dirty)
    with pytest.raises(WrongContentsError, match="after the refusal DRAM holds, offset 0x18"):
        list(bench.run([case]))


def test_wrong_counters_are_noticed(monkeypatch, bench):
    one = find(small_table("v5"), effect="ZERO", range=SMALL)
    place = scene.Scene(one, bench.memory, Reference())
    with pytest.raises(WrongContentsError, match="bytes transformed"):
        place._check_counters(Counters(bytes_zeroed=SMALL - 8))


def test_more_memory_than_there_is():
    with pytest.raises(OutOfMemoryError, match="are available"):
        check_available(1 << 60)
    with pytest.raises(InvalidArgumentError, match="must be one of anonymous"):
        Memory(SMALL, "none")
    assert run.memory_needed(table(memory=1 << 30)) == (2 << 30) + (128 << 20)
    assert run.memory_needed(table("v5", memory=SMALL)) == 2 * SMALL


# ---- primitives and records ------------------------------------------------------------------------------


def aligned(words):
    """A copy that begins at a page, as a guest's memory does."""
    copy = np.frombuffer(mmap.mmap(-1, words.nbytes), np.uint64)
    copy[:] = words
    return copy


def test_primitives_do_what_they_are_called():
    step = 64
    starts = np.array([0, 128, 256], np.uint64)
    picked = np.zeros(512, np.bool_)
    for start in starts.tolist():
        picked[start : start + step] = True
    for primitive, ways in candidates().items():
        if primitive == "bitmap":
            continue
        constant = CONSTANTS[primitive]
        for name, way in ways.items():
            target, source = aligned(np.arange(512, dtype=np.uint64)), np.arange(1000, 1048, dtype=np.uint64)
            way(target, source, starts, np.uint64(step), constant)
            before = np.arange(512, dtype=np.uint64)
            written = {"memcpy": None, "memset": before & np.uint64(0), "xor": before ^ constant}[primitive]
            if written is not None:
                assert np.array_equal(target, np.where(picked, written, before)), (primitive, name)
            else:  # a source that is shorter than the target begins anew
                assert set(target[picked].tolist()) <= set(source.tolist()), name
                assert np.array_equal(target[~picked], before[~picked])


def test_a_plain_bitmap_is_set_and_cleared_by_range():
    draw = np.random.default_rng(4)
    for way in candidates()["bitmap"].values():
        for size in (1, 5, 64, 100):
            bits, expected_bits = np.zeros(16, np.uint64), np.zeros(1024, np.bool_)
            starts = draw.integers(0, 1024 - size, 6).astype(np.uint64)
            for value in (True, False, True):
                chosen = starts if value else starts[:2]
                way(bits, bits, chosen, np.uint64(size), loops.ONES if value else loops.NONE)
                for start in chosen.tolist():
                    expected_bits[start : start + size] = value
            found = np.unpackbits(bits.view(np.uint8), bitorder="little").astype(np.bool_)
            assert np.array_equal(found, expected_bits)


def test_unknown_primitives(primitives):
    with pytest.raises(InvalidArgumentError, match="known: memcpy"):
        primitives.seconds("memmove", 4096, 4096)


def test_the_fastest_way_is_chosen_at_each_size():
    naps = {"slow": 0.1, "quick": 0.001}
    ways = {"memset": {name: lambda *_, nap=nap: time.sleep(nap) for name, nap in naps.items()}}
    words = np.zeros(1 << 16, np.uint64)
    primitives = Primitives(words, words[:8].copy(), ways)
    assert primitives.seconds("memset", 1 << 19, 4096) < 0.1
    primitives.seconds("memset", 1 << 19, 1 << 19)
    assert primitives.names == {("memset", 4096): "quick", ("memset", 1 << 19): "quick"}


def test_records_keep_the_cells_keys(bench):
    result = next(bench.run([find(small_table("v5"), vm_type="SNP", effect="ZERO")]))
    cell = cell_of(result)
    assert cell.flag == cell.does == "ZERO"
    assert cell.seconds.n == len(cell.samples) == len(cell.primitive_samples) == 2
    assert cell.seconds.p95 is None


# ---- the other readers of the table ----------------------------------------------------------------------


def test_the_package_needs_no_benchmark_framework():
    script = (
        "import gmemcore.benchmark.run, sys; print({'asv', 'pytest_benchmark', 'numba'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@needs_speed
def test_asv_reads_the_same_table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from asv_suite.conversion import CASES, Conversion

    configuration = json.loads((ROOT / "asv.conf.json").read_text())
    assert configuration["benchmark_dir"] == "bench/asv_suite"
    accepted = [case for case in table("v5", firmware="today", memory=64 << 20) if not case.refused]
    timed = {case.key for case in CASES.values()}
    assert all(case.key in timed for case in accepted if case.platform.private_memory)
    suite = Conversion()
    with pytest.raises(NotImplementedError, match="policy refuses"):
        suite.setup("v5/SNP", "running", "to_private", "PRESERVE", "4k")
    parameters = ("v5/SNP", "running", "to_shared", "ZERO", "64m")
    suite.setup(*parameters)
    suite.time_convert(*parameters)
    assert suite.track_slowdown(*parameters) > 0
    assert suite.track_nanoseconds_per_page(*parameters) > 0
    assert Conversion.track_slowdown.unit


@pytest.fixture
def _slow(request):
    if "slow" not in request.config.getoption("markexpr"):
        pytest.skip("run with -m slow")


@pytest.mark.slow
@pytest.mark.usefixtures("_slow")
def test_asv_check_passes():
    done = subprocess.run(
        [sys.executable, "-m", "asv", "check", "--python=same"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.bench
@pytest.mark.slow
@pytest.mark.usefixtures("_slow")
def test_bars_are_met():
    done = subprocess.run([sys.executable, "bench/bars.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_speed
def test_bars_print_figures():
    command = [sys.executable, "bench/bars.py", "zero", "single-call", "--memory", "1m", "--pairs", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    zero, single = done.stdout.splitlines()
    assert re.fullmatch(r"ZERO 1m, [\d.]+ GB/s, by memset \(.*\): .* at least 0.95: (met|MISSED)", zero)
    assert re.fullmatch(r"a single-page call, .* at most 8: (met|MISSED)", single)
    assert done.returncode == ("MISSED" in done.stdout)


def test_public_version_is_recorded():
    assert environment().gmemcore == gmemcore.__version__
