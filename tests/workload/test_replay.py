"""Replays: what a trace costs and where it is refused, under every revision."""

from dataclasses import replace as changed
from itertools import product

import pytest
from sevsnpmeasure.gctx import GCTX

import gmemcore
from gmemcore import errors
from gmemcore.engine import store as stores
from gmemcore.engine.steps import Step
from gmemcore.policy import ABIS
from gmemcore.uapi import Direction, Firmware, Phase, VmType
from gmemcore.vmm import Vmm
from gmemcore.workload.fill import generated_page
from gmemcore.workload.layout import Layout, Region
from gmemcore.workload.operations import FROM_SOURCE, empty_operations
from gmemcore.workload.replay import FIRST_REFUSALS, Flags, Refusal, Target, replay, targets, with_flags
from gmemcore.workload.trace import Header, Trace
from support import logs
from support.kinds import P
from support.paths import JIT_DISABLED, TRACES

LAUNCH_LOG = TRACES / "qemu-snp-launch.log"


def launch(seed=0):
    (found,) = logs.imported(LAUNCH_LOG.read_bytes(), seed=seed).launches
    return found.trace


def trace_of(*rows, layout=None):
    operations = empty_operations(len(rows))
    for row, fields in zip(operations, rows, strict=True):
        for name, value in fields.items():
            row[name] = value
    return Trace(Header("t", "test", layout or Layout.single(64 * P)), operations)


def op(step, gpa=0, size=P, **fields):
    return {"step": step, "gpa": gpa, "size": size, **fields}


# --- the real launch ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("abi", "seed"), [("v5", 0), ("v13", 7)])
def test_the_launch_log_runs_and_its_digest_is_the_published_tool_s(abi, seed):
    theirs = GCTX()

    def normal(gpa, size):
        contents = b"".join(generated_page(seed, at) for at in range(gpa, gpa + size, P))
        theirs.update_normal_pages(gpa, contents)

    normal(0xFFC00000, 0x400000)
    theirs.update_zero_pages(0x800000, 0x9000)
    theirs.update_zero_pages(0x80A000, 0x3000)
    theirs.update_secrets_page(0x80D000)
    theirs.update_cpuid_page(0x80E000)
    theirs.update_zero_pages(0x80F000, 0x1000)
    normal(0x810000, 0x1000)
    theirs.update_zero_pages(0x811000, 0xF000)

    done = replay(launch(seed), Target(abi, VmType.SNP), backing="anonymous")
    assert done.launch_digest == bytes.fromhex(theirs.hex_ld())
    assert (done.operations, done.refused, done.reasons, done.first_refusals) == (9, 0, {}, ())
    assert done.counters.pages_allocated == done.counters.rmp_updates == done.counters.pages_accepted == 1055
    assert done.counters.bytes_xored == done.peak_memory == 1055 * P

    without = replay(launch(seed), Target(abi, VmType.SNP))
    assert without.launch_digest is None
    assert (without.counters, without.peak_memory) == (done.counters, done.peak_memory)


@pytest.mark.parametrize("backing", ["none", "anonymous"])
def test_the_launch_log_runs_on_every_revision(backing):
    abis = ["v4", "legacy"] if JIT_DISABLED and backing == "anonymous" else list(ABIS)
    digests = set()
    for target in targets(abis, [VmType.SNP]):
        done = replay(launch(), target, backing=backing)
        assert done.refused == 0, target
        digests.add(done.launch_digest)
    assert len(digests) == 1


# --- refusals -----------------------------------------------------------------------------------------------
BOOT = (
    op(Step.HOST_WRITE, 0, 4 * P),
    op(Step.CONVERT, 0, 64 * P, attributes=8, flags=2),
    op(Step.POPULATE, 0, 4 * P),
    op(Step.LAUNCH_FINISH),
    op(Step.ACCEPT, 4 * P, 4 * P),
    op(Step.CONVERT, 4 * P, 2 * P, flags=2),
    op(Step.HOST_READ, 4 * P, P),
    op(Step.CONVERT, 4 * P, 2 * P, attributes=8, flags=2),
)
"""An image written in place, and a bounce buffer."""


def test_refusals_have_number_step_place_and_reason():
    done = replay(trace_of(*BOOT), Target("v5", VmType.SNP))
    assert done.reasons == {("CONVERT", "EOPNOTSUPP"): 2, ("HOST_READ", "SIGBUS"): 1}
    assert done.first_refusals == (
        Refusal(5, "CONVERT", "EOPNOTSUPP", 4 * P, 2 * P, 4 * P, 0, 2),
        Refusal(6, "HOST_READ", "SIGBUS", 4 * P, P, 4 * P, 0, 0),
        Refusal(7, "CONVERT", "EOPNOTSUPP", 4 * P, 2 * P, 4 * P, 8, 2),
    )
    assert (done.abi, done.vm_type, done.firmware, done.refused) == ("v5", "SNP", "today", 3)


@pytest.mark.parametrize(
    ("abi", "vm_type", "firmware", "reasons"),
    [
        ("v13", "SNP", "today", {("CONVERT", "EINVAL"): 3, ("HOST_READ", "SIGBUS"): 0}),
        ("v4", "SNP", "today", {("CONVERT", "EOPNOTSUPP"): 3}),
        ("v5", "PKVM", "today", {}),
        ("two-caps", "SNP", "cipher", {}),
        ("legacy", "SNP", "today", {("CONVERT", "EINVAL"): 3}),
        ("v5", "DEFAULT", "today", {("CONVERT", "EINVAL"): 2, ("CONVERT", "EOPNOTSUPP"): 1}),
    ],
)
def test_each_revision_answers_in_its_own_way(abi, vm_type, firmware, reasons):
    done = replay(trace_of(*BOOT), Target(abi, VmType(vm_type), Firmware(firmware)))
    converts = {key: n for key, n in done.reasons.items() if key[0] == "CONVERT"}
    assert converts == {key: n for key, n in reasons.items() if key[0] == "CONVERT"}


def test_only_the_first_refusals_are_kept_and_all_are_counted():
    done = replay(trace_of(*[op(Step.GUEST_READ, 1 << 40, 8)] * 300), Target("v5", VmType.SNP))
    assert (done.refused, done.reasons) == (300, {("GUEST_READ", "MMIO"): 300})
    assert [refusal.operation for refusal in done.first_refusals] == list(range(FIRST_REFUSALS))
    assert done.first_refusals[0].error_gpa == 1 << 40


# --- costs --------------------------------------------------------------------------------------------------
def test_memory_is_the_most_that_existed_and_both_sides_in_legacy():
    trace = trace_of(
        op(Step.HOST_WRITE, 0, 64 * P),
        *[op(Step.UNPIN)] * 63,
        op(Step.CONVERT, 0, 32 * P, attributes=8),
        op(Step.GUEST_WRITE, 0, 32 * P),
        *[op(Step.UNPIN)] * 62,
        op(Step.PUNCH_HOLE, 0, 64 * P),
    )
    for abi, discard, expected in (("v5", True, 64), ("legacy", True, 64), ("legacy", False, 96)):
        done = replay(trace, Target(abi, VmType.SW_PROTECTED), discard=discard)
        assert done.peak_memory == expected * P, (abi, discard)


def test_progress_comes_to_the_end():
    seen = []
    trace = trace_of(*[op(Step.GUEST_READ)] * 1000)
    replay(trace, Target("v5", VmType.SNP), progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1000
    assert len(seen) >= 10


@pytest.mark.parametrize(("every", "looks"), [(None, [150]), (60, [0, 60, 120, 150]), (75, [0, 75, 150])])
def test_page_state_is_looked_at_where_it_was_asked_for(every, looks):
    trace = trace_of(*[op(Step.ALLOCATE, i * P) for i in range(150)], layout=Layout([Region(0, 150 * P)]))
    seen = []

    def watch(vm, at):
        seen.append((at, vm.files[0].allocated // P))

    replay(trace, Target("v5", VmType.SNP), watch=watch, every=every)
    assert seen == [(at, at) for at in looks]
    empty = []
    replay(trace_of(), Target("v5", VmType.SNP), watch=lambda _, at: empty.append(at), every=every)
    assert empty == [0]
    with pytest.raises(errors.InvalidArgumentError, match="every must be 1 or more operations, not 0"):
        replay(trace, Target("v5", VmType.SNP), every=0)


def test_results_follow_from_trace_and_seeds():
    rows = [op(Step.HOST_WRITE, 0, 4 * P), op(Step.CONVERT, 0, 4 * P, attributes=8), op(Step.LAUNCH_FINISH)]
    first, again = (
        replay(trace_of(*rows), Target("v5", VmType.SW_PROTECTED), seed=3, backing="memfd") for _ in range(2)
    )
    assert first.counters == again.counters
    assert first.counters.bytes_scrambled == 4 * P


def test_nothing_but_time_depends_on_the_number_of_threads(monkeypatch):
    rows = [op(Step.HOST_WRITE, 0, 16 << 20), op(Step.CONVERT, 0, 16 << 20, attributes=8)]
    asked, number = [], stores.Store._set_threads
    monkeypatch.setattr(
        stores.Store, "_set_threads", lambda store, threads: asked.append(threads) or number(store, threads)
    )
    trace, kept = trace_of(*rows, layout=Layout.single(16 << 20)), {}
    target = Target("v5", VmType.SW_PROTECTED)

    def watch(vm, _):
        kept[threads] = [(gmem.memory.tobytes(), gmem.survey()) for gmem in vm.files]

    found = {}
    for threads in (1, 3):
        done = replay(trace, target, backing="anonymous", threads=threads, watch=watch)
        found[threads] = changed(done, seconds=0.0)
    assert set(asked) == {1, 3}
    assert found[1] == found[3]
    assert kept[1] == kept[3]


def test_an_empty_trace_and_one_of_many_guests():
    assert replay(trace_of(), Target("v5", VmType.SNP)).operations == 0
    with pytest.raises(errors.InvalidArgumentError, match="of several guests"):
        replay(trace_of(op(Step.PIN), op(Step.PIN, guest=1)), Target("v5", VmType.SNP))


def test_a_guest_beyond_this_host_is_refused():
    huge = trace_of(op(Step.PIN), layout=Layout((Region(0, 1 << 60),)))
    with pytest.raises(errors.OutOfMemoryError):
        replay(huge, Target("v5", VmType.SNP), backing="anonymous")


# --- flags --------------------------------------------------------------------------------------------------
PHASES = trace_of(
    op(Step.CONVERT, attributes=8, flags=2),
    op(Step.CONVERT, flags=1),
    op(Step.GUEST_READ, flags=5),
    op(Step.LAUNCH_FINISH),
    op(Step.CONVERT, attributes=8),
    op(Step.CONVERT, flags=2),
    op(Step.LAUNCH_FINISH),
    op(Step.CONVERT, attributes=8, flags=1),
)


@pytest.mark.parametrize(
    ("flags", "abi", "firmware", "expected"),
    [
        ("as-recorded", "v5", "today", [2, 1, 5, 0, 0, 2, 0, 1]),
        ("none", "v5", "today", [0, 0, 5, 0, 0, 0, 0, 0]),
        ("preserve", "v5", "today", [2, 2, 5, 0, 2, 2, 0, 2]),
        ("zero", "v5", "today", [0, 1, 5, 0, 0, 1, 0, 0]),
        ("best", "v5", "today", [2, 2, 5, 0, 2, 2, 0, 2]),
        ("best", "v13", "today", [0, 0, 5, 0, 0, 0, 0, 0]),
        ("best", "legacy", "today", [0, 0, 5, 0, 0, 0, 0, 0]),
        ("best", "two-caps", "today", [2, 2, 5, 0, 0, 0, 0, 0]),
        ("best", "before-launch", "today", [4, 4, 5, 0, 0, 0, 0, 0]),
        ("best", "cipher", "cipher", [2, 2, 5, 0, 16, 16, 0, 16]),
    ],
)
def test_flags_are_chosen_by_phase_and_direction(flags, abi, firmware, expected):
    vm = gmemcore.create_vm("SNP", abi, firmware)
    assert with_flags(PHASES.operations, vm, Flags(flags))["flags"].tolist() == expected
    assert PHASES.operations["flags"].tolist() == [2, 1, 5, 0, 0, 2, 0, 1]


@pytest.mark.parametrize("firmware", Firmware)
@pytest.mark.parametrize("vm_type", VmType)
def test_best_is_what_the_vmm_ends_up_with(vm_type, firmware):
    """The Vmm tries the flags it believes in turn; best is the one it came through with, or its first."""
    for abi, phase, to_private in product(ABIS, Phase, (True, False)):
        vm = gmemcore.create_vm(vm_type, abi, firmware)
        vmm = Vmm(vm)
        if not vmm.supported.private_memory:
            continue
        vmm.add_ram(0, 2 * P)
        vmm.convert(0, 2 * P, not to_private)
        if phase == Phase.RUNNING:
            vm.launch_finish()
        direction = Direction.TO_PRIVATE if to_private else Direction.TO_SHARED
        rows = [op(Step.LAUNCH_FINISH)] * (phase == Phase.RUNNING) + [
            op(Step.CONVERT, attributes=8 * to_private)
        ]
        flag = int(with_flags(trace_of(*rows).operations, vm, Flags.BEST)["flags"][-1])
        try:
            assert vmm.convert_keeping(0, 2 * P, to_private).flag == flag, abi
        except errors.UnsupportedContentModeError:
            assert flag == int(vmm.supported.preserving(phase, direction)[0].bit), abi


def test_targets_are_every_revision_on_every_type():
    found = targets(list(ABIS), list(VmType), Firmware.CIPHER)
    assert len(found) == len(set(found)) == len(ABIS) * len(VmType)
    assert {target.firmware for target in found} == {Firmware.CIPHER}


def test_a_source_is_what_zeroes_stand_in_for_without_bytes():
    rows = [op(Step.CONVERT, attributes=8), op(Step.POPULATE, variant=FROM_SOURCE), op(Step.LAUNCH_FINISH)]
    assert replay(trace_of(*rows), Target("v4", VmType.SNP)).refused == 0
