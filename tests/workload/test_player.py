"""The player against the public interface, called one operation at a time by a naive reader of the stream."""

import random

import numpy as np
import pytest

import gmemcore
from gmemcore import errors
from gmemcore.engine.state import Plane
from gmemcore.engine.steps import Step
from gmemcore.uapi import PageType
from gmemcore.workload import player as player_module
from gmemcore.workload.fill import PIECE, Fill, generated_page
from gmemcore.workload.layout import Layout, Region, spans
from gmemcore.workload.operations import FROM_SOURCE, OPERATION, Access, check_operations, empty_operations
from gmemcore.workload.outcomes import CODES, NAMES, OUTCOME
from gmemcore.workload.player import Player, build, play
from support.kinds import PLANES, P
from support.paths import JIT_DISABLED

LAYOUT = Layout((Region(0x40000, 24 * P), Region(0x10000, 16 * P), Region(0x20000, 20 * P, private=True)))
"""Regions in no order: two that touch, a hole of 12 pages, a third."""


def operations_of(*rows):
    """Operations from (step, gpa, size) with fields by name."""
    operations = empty_operations(len(rows))
    for i, (step, gpa, size, fields) in enumerate(rows):
        operations[i]["step"], operations[i]["gpa"], operations[i]["size"] = step, gpa, size
        for name, value in fields.items():
            operations[i][name] = value
    return operations


def op(step, gpa=0x10000, size=P, **fields):
    return step, gpa, size, fields


# --- the naive reader ---------------------------------------------------------------------------------------
class Naive:
    """One call after another, found by looking at every region for every operation."""

    def __init__(self, vm, files, seed):
        self.vm, self.files, self.contents, self.at = vm, files, Fill(seed), 0

    def run(self, number, row):
        step, gpa, size = Step(row["step"]), int(row["gpa"]), int(row["size"])
        self.at = gpa
        try:
            getattr(self, step.name.lower())(number, row, gpa, size)
        except errors.GmemError as error:
            if isinstance(error, errors.GuestExit):
                self.at = error.gpa
            elif error.error_offset is not None:
                self.at = self.begin + error.error_offset - self.offset
            return CODES[error.outcome], self.at
        return 0, 0

    def pieces(self, gpa, size, hole, aligned=True):
        if size == 0 or gpa + size > 1 << 64 or (aligned and (gpa | size) % P):
            raise errors.InvalidArgumentError("range")
        found, at = [], gpa
        while at < gpa + size:
            for region, gmem in zip(LAYOUT.regions, self.files, strict=True):
                if region.gpa <= at < region.end:
                    end = min(region.end, gpa + size)
                    found.append((at, gmem, at - region.gpa, end - at))
                    break
            else:
                if hole is not None:
                    self.at = at
                    raise hole("hole")
                end = min([region.gpa for region in LAYOUT.regions if region.gpa > at] + [gpa + size])
            at = end
        for begin, gmem, offset, length in found:
            self.at, self.begin, self.offset = begin, begin, offset
            yield gmem, offset, length

    def bytes_of(self, number, start, size):
        return np.concatenate(
            [np.zeros(0, np.uint8)]
            + [
                self.contents.written(number, at, min(PIECE, start + size - at))
                for at in range(start, start + size, PIECE)
            ]
        )

    def private(self, row):
        return {0: None, 1: False, 2: True}[int(row["variant"])]

    def convert(self, _number, row, gpa, size):
        attributes, flags = int(row["attributes"]), int(row["flags"])
        if self.vm.abi.name == "legacy":
            self.vm.set_memory_attributes(gpa, size, attributes, flags)
            for gmem, offset, length in self.pieces(gpa, size, None):
                if attributes & 8:
                    gmem.discard_shared(offset, length)
                else:
                    gmem.fallocate(3, offset, length)
            return
        for gmem, offset, length in self.pieces(
            gpa, size, errors.InvalidArgumentError if attributes & 8 else None
        ):
            gmem.set_memory_attributes(offset, length, attributes, flags)

    def host_read(self, _number, _row, gpa, size):
        for gmem, offset, length in self.pieces(gpa, size, errors.HostAccessError, aligned=False):
            gmem.host_read(offset, length)

    def host_write(self, number, _row, gpa, size):
        for gmem, offset, length in self.pieces(gpa, size, errors.HostAccessError, aligned=False):
            gmem.host_write(offset, self.bytes_of(number, self.at - gpa, length))

    def guest_read(self, _number, row, gpa, size):
        self.vm.guest_read(gpa, size, self.private(row))

    def guest_write(self, number, row, gpa, size):
        if size > 1 << 30:
            self.vm.guest_read(gpa, size, self.private(row))
        self.vm.guest_write(gpa, self.bytes_of(number, 0, size), self.private(row))

    def accept(self, _number, _row, gpa, size):
        self.vm.accept(gpa, size)

    def allocate(self, _number, _row, gpa, size):
        for gmem, offset, length in self.pieces(gpa, size, errors.InvalidArgumentError):
            gmem.fallocate(1, offset, length)

    def punch_hole(self, _number, _row, gpa, size):
        for gmem, offset, length in self.pieces(gpa, size, None):
            gmem.fallocate(3, offset, length)

    def pin(self, _number, _row, gpa, size):
        for gmem, offset, length in self.pieces(gpa, size, errors.BadAddressError):
            gmem.pin(offset, length)

    def unpin(self, _number, _row, gpa, size):
        for gmem, offset, length in self.pieces(gpa, size, None):
            gmem.unpin(offset, length)

    def poison(self, _number, _row, gpa, size):
        for gmem, offset, length in self.pieces(gpa, size, errors.InvalidArgumentError):
            begin = self.at
            for at in range(0, length, P):
                self.at = begin + at
                gmem.poison(offset + at)

    def populate(self, _number, row, gpa, size):
        variant = int(row["variant"])
        page_type = list(PageType)[variant & 0xFF]
        copies = (variant >= FROM_SOURCE or self.vm.abi.name in ("legacy", "v4")) and page_type != "ZERO"
        if size == 0 or (gpa | size) % P or gpa + size > 1 << 64:
            self.vm.launch_update(gpa, size, None, "ZERO")
        for at in range(gpa, gpa + size, P):
            self.at = at
            self.vm.launch_update(
                at, P, generated_page(self.contents.seed, at) if copies else None, page_type
            )

    def launch_finish(self, _number, _row, _gpa, _size):
        self.vm.launch_finish()


# --- random streams -----------------------------------------------------------------------------------------
def random_operations(rng, n):
    """Mostly sensible requests, some at and over the edges of memory, some that nobody should make."""
    weights = dict.fromkeys(Step, 4) | {Step.CONVERT: 40, Step.POISON: 1, Step.LAUNCH_FINISH: 0}
    steps = rng.choices(list(weights), list(weights.values()), k=n)
    if rng.random() < 0.8:
        steps[rng.randrange(n)] = Step.LAUNCH_FINISH
    return operations_of(*(random_operation(rng, step) for step in steps))


def random_operation(rng, step):
    gpa = P * rng.randint(0x0C, 0x60)
    size = P * rng.choice([1, 1, 1, 2, 3, 8, 30, 80])
    access = step in (Step.HOST_READ, Step.HOST_WRITE, Step.GUEST_READ, Step.GUEST_WRITE)
    if access or rng.random() < 0.03:
        gpa, size = gpa + rng.randrange(P), rng.choice([1, 8, 100, P, 3 * P + 5])
    if rng.random() < 0.02:
        gpa, size = rng.choice(
            [(gpa, 0), ((1 << 64) - P, 2 * P), ((1 << 64) - P, P), (0, 1 << 63), (gpa, 1 << 62)]
        )
    fields = {}
    if step == Step.CONVERT:
        fields = {"attributes": rng.choice([0, 0, 8, 8, 8, 1]) if rng.random() < 0.1 else rng.choice([0, 8])}
        fields["flags"] = rng.choice([0, 0, 0, 1, 2, 2, 3, 8, 1 << 40])
    elif step in (Step.GUEST_READ, Step.GUEST_WRITE):
        fields = {"variant": rng.choice([0, 0, 1, 2])}
    elif step == Step.POPULATE:
        fields = {"variant": rng.choice([0, 0, 0, 1, 2, 3, 4, FROM_SOURCE, FROM_SOURCE + 1])}
    return op(step, gpa, size, **fields)


MACHINES = [
    *((vm_type, abi, "today") for abi in ("v5", "v13", "legacy", "v4") for vm_type in gmemcore.VmType),
    ("SNP", "two-caps", "cipher"),
    ("TDX", "two-caps", "cipher"),
    ("TDX", "tracking", "today"),
]


def machines(vm_type, abi, firmware, seed):
    """Two equal guests, each with its files."""
    vms = [gmemcore.create_vm(vm_type, abi, firmware, seed) for _ in range(2)]
    return [(vm, build(vm, LAYOUT)) for vm in vms]


def state_of(vm, files):
    planes = [gmem.plane(name).tobytes() for gmem in files for name in PLANES]
    hosts = [gmem._shared.memory().tobytes() for gmem in files]
    return vm.phase, planes, [gmem.memory.tobytes() for gmem in files], hosts


def compare(vm_type, abi, firmware, rng, n, chunk):
    (ours, our_files), (theirs, their_files) = machines(vm_type, abi, firmware, seed=5)
    operations = random_operations(rng, n)
    before = theirs.counters
    naive = Naive(theirs, their_files, seed=9)
    played = play(ours, (operations[i : i + chunk] for i in range(0, n, chunk)), seed=9)
    for i, row in enumerate(operations):
        expected = naive.run(i, row)
        assert tuple(played.outcomes[i]) == expected, f"operation {i}: {row}"
    assert played.counters == theirs.counters - before
    assert state_of(ours, our_files) == state_of(theirs, their_files)
    return played


@pytest.mark.parametrize(("vm_type", "abi", "firmware"), MACHINES)
def test_it_does_what_single_calls_do(vm_type, abi, firmware):
    seen = set()
    for seed in range(4):
        rng = random.Random(f"{vm_type} {abi} {seed}")
        played = compare(vm_type, abi, firmware, rng, 150, chunk=rng.choice([1, 7, 150]))
        seen |= set(played.outcomes["code"].tolist())
    assert {0, CODES["EINVAL"]} < seen


@pytest.mark.parametrize("backing", ["none", "anonymous"])
@pytest.mark.parametrize(("vm_type", "abi", "firmware"), [row for row in MACHINES if row[1] != "legacy"])
def test_batches_do_what_single_calls_do(monkeypatch, vm_type, abi, firmware, backing):
    """All that can be in a batch is in one, and is compared with no batch at all."""
    rng = random.Random(f"{vm_type} {abi} batches")
    operations = np.concatenate([random_operations(rng, 80), random_operations(rng, 80)])
    found = []
    for batch in (1, 1 << 30):
        monkeypatch.setattr(player_module, "_BATCH", batch)
        vm = gmemcore.create_vm(vm_type, abi, firmware, backing=backing)
        files = build(vm, LAYOUT)
        played = play(vm, operations)
        planes = [gmem.plane(name).tobytes() for gmem in files for name in PLANES]
        found.append((played.outcomes.tolist(), played.counters, planes))
    assert found[0] == found[1]


def test_a_batch_reports_where_a_page_is_pinned():
    vm = gmemcore.create_vm("SNP")
    build(vm, LAYOUT)
    rows = [op(Step.CONVERT, 0x10000 + i * P, 3 * P, attributes=8) for i in range(12)]
    outcomes = play(vm, operations_of(op(Step.PIN, 0x15000), *rows)).outcomes
    assert NAMES[outcomes["code"][4]] == "EAGAIN"
    assert outcomes["error_gpa"].tolist() == [0] * 4 + [0x15000] * 3 + [0] * 6


# --- what it does at edges ----------------------------------------------------------------------------------
def outcomes_of(vm_type, abi, *rows, layout=LAYOUT, **options):
    vm = gmemcore.create_vm(vm_type, abi, **options)
    build(vm, layout)
    outcomes = play(vm, operations_of(*rows)).outcomes
    return [(NAMES[code], gpa) for code, gpa in outcomes.tolist()], vm


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (op(Step.CONVERT, 0x30000, 40 * P, attributes=8), ("EINVAL", 0x34000)),
        (op(Step.CONVERT, 0x30000, 40 * P), ("OK", 0)),
        (op(Step.PUNCH_HOLE, 0x30000, 40 * P), ("OK", 0)),
        (op(Step.UNPIN, 0x38000, P), ("OK", 0)),
        (op(Step.PIN, 0x38000, P), ("EFAULT", 0x38000)),
        (op(Step.ALLOCATE, 0x30000, 40 * P), ("EINVAL", 0x34000)),
        (op(Step.POISON, 0x38000, P), ("EINVAL", 0x38000)),
        (op(Step.HOST_READ, 0x33FFF, 2), ("SIGBUS", 0x34000)),
        (op(Step.HOST_WRITE, 0, 1), ("SIGBUS", 0)),
        (op(Step.GUEST_READ, 0x38000, 8), ("MMIO", 0x38000)),
        (op(Step.GUEST_WRITE, 0x38000, 8, variant=Access.PRIVATE), ("MEMORY_FAULT", 0x38000)),
    ],
)
def test_holes(row, expected):
    assert outcomes_of("SNP", "v5", row)[0] == [expected]


def test_an_operation_ends_at_the_first_piece_that_is_refused():
    rows = [
        op(Step.PIN, 0x40000),
        op(Step.CONVERT, 0x20000, 20 * P),
        op(Step.CONVERT, 0x10000, 36 * P, attributes=8),
    ]
    adjacent = Layout((Region(0x10000, 16 * P), Region(0x20000, 20 * P), Region(0x34000, 44 * P)))
    rows.append(op(Step.CONVERT, 0x1F000, 60 * P, attributes=8))
    found, vm = outcomes_of("SNP", "v5", *rows, layout=adjacent)
    assert found[2:] == [("OK", 0), ("EAGAIN", 0x40000)]
    assert [gmem.runs() for gmem in vm.files] == [
        [(0, 16, "private")],
        [(0, 20, "private")],
        [(0, 44, "shared")],
    ]


def test_attributes_only_guests_run_everything():
    rows = [
        op(Step.GUEST_WRITE, 0x10000, 3 * P),
        op(Step.HOST_WRITE, 0x13000, 100),
        op(Step.HOST_READ, 0x14000, 100),
        op(Step.POPULATE, 0x20000, 2 * P, variant=FROM_SOURCE),
        op(Step.LAUNCH_FINISH),
        op(Step.GUEST_READ, 0x20000, 2 * P, variant=Access.PRIVATE),
        op(Step.GUEST_READ, 0x22000, 8, variant=Access.PRIVATE),
        op(Step.ACCEPT, 0x22000, 2 * P),
        op(Step.GUEST_WRITE, 0x22000, 8, variant=Access.PRIVATE),
    ]
    for abi in ("v5", "v4", "legacy"):
        without, bare = outcomes_of("SNP", abi, *rows, backing="none")
        with_bytes, vm = outcomes_of("SNP", abi, *rows)
        assert without == with_bytes
        assert [name for name, _ in without].count("OK") == 8
        assert without[6] == ("NOT_VALIDATED", 0x22000)
        assert bare.counters == vm.counters


def test_the_other_side_is_discarded_in_legacy_unless_told_not_to():
    rows = operations_of(op(Step.HOST_WRITE, 0x10000, 4 * P), op(Step.CONVERT, 0x10000, 2 * P, attributes=8))
    for discard, left in ((True, 2), (False, 4)):
        vm = gmemcore.create_vm("SNP", "legacy")
        files = build(vm, LAYOUT)
        play(vm, rows, discard=discard)
        assert files[1]._shared.count(Plane.ALLOCATED) == left


def test_contents_follow_from_seed_and_number():
    rows = operations_of(op(Step.HOST_WRITE, 0x10000, 2 * P), op(Step.GUEST_WRITE, 0x12000, 2 * P))
    wrote = []
    for seed in (1, 1, 2):
        vm = gmemcore.create_vm("SNP")
        files = build(vm, LAYOUT)
        play(vm, rows, seed=seed)
        wrote.append(files[1].memory.tobytes())
    assert wrote[0] == wrote[1] != wrote[2]
    assert wrote[0][: 2 * P] == Fill(1).written(0, 0, 2 * P).tobytes() != wrote[0][2 * P : 4 * P]


def test_a_write_larger_than_a_part_is_seamless():
    layout = Layout.single(4 * PIECE)
    vm = gmemcore.create_vm("SW_PROTECTED")
    (gmem,) = build(vm, layout)
    play(vm, operations_of(op(Step.HOST_WRITE, 100, 2 * PIECE + 77)))
    circle = Fill(0).written(0, 0, PIECE).tobytes()
    assert gmem.memory[100 : 100 + 2 * PIECE + 77].tobytes() == (circle * 3)[: 2 * PIECE + 77]


def test_no_operations_are_no_outcomes():
    vm = gmemcore.create_vm("SNP")
    assert play(vm, []).outcomes.shape == play(vm, empty_operations(0)).outcomes.shape == (0,)
    outcomes = play(vm, operations_of(*[op(Step.CONVERT, attributes=8)] * 9)).outcomes
    assert {NAMES[code] for code in outcomes["code"].tolist()} == {"EINVAL"}  # there is no memory at all


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 13}, "operation 1: step 13 with variant 0x0"),
        ({"step": 65535}, "step 65535"),
        ({"step": Step.GUEST_READ, "variant": 3}, "step 3 with variant 0x3"),
        ({"step": Step.POPULATE, "variant": 6}, "step 11 with variant 0x6"),
        ({"step": Step.POPULATE, "variant": 0x206}, "step 11 with variant 0x206"),
        ({"step": Step.CONVERT, "variant": 1}, "step 0 with variant 0x1"),
    ],
)
def test_operations_that_do_not_exist_are_refused_before_anything_is_done(change, message):
    vm = gmemcore.create_vm("SNP")
    build(vm, LAYOUT)
    operations = operations_of(op(Step.ALLOCATE), op(Step.ALLOCATE))
    for name, value in change.items():
        operations[1][name] = value
    player = Player(vm)
    with pytest.raises(errors.InvalidArgumentError, match=message):
        player.run(operations)
    assert player.done == player.counters.pages_allocated == 0
    for wrong in (operations.tolist(), np.zeros(3, "<u8"), operations.reshape(2, 1)):
        with pytest.raises(TypeError, match="one-dimensional array of OPERATION"):
            check_operations(wrong)


# --- layouts and numbers of outcomes ------------------------------------------------------------------------
@pytest.mark.parametrize("abi", ["v5", "legacy"])
@pytest.mark.parametrize("vm_type", gmemcore.VmType)
def test_regions_start_as_the_layout_says(vm_type, abi):
    vm = gmemcore.create_vm(vm_type, abi)
    files = build(vm, LAYOUT)
    assert [gmem.size for gmem in files] == [24 * P, 16 * P, 20 * P]
    assert [(slot.slot, slot.gpa) for slot in vm.memslots] == [(1, 0x10000), (2, 0x20000), (0, 0x40000)]
    private = vm_type != "DEFAULT"
    if abi == "legacy":
        assert vm.private_frames() == ([(0x20, 0x34)] if private else [])
    else:
        kinds = [gmem.runs()[0][2] for gmem in files]
        assert kinds == ["shared", "shared", "private" if private else "shared"]


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ([], "a layout must have 1 to 1024 regions, not 0"),
        ([(0, 0)], "empty"),
        ([(1, P)], "page aligned"),
        ([(1 << 63, P)], "at most 2\\^63"),
        ([((1 << 64) - P, 2 * P)], "wraps"),
        ([(0, 2 * P), (P, P)], "overlap"),
    ],
)
def test_layouts_that_cannot_be_are_refused(regions, message):
    with pytest.raises(errors.InvalidArgumentError, match=message):
        Layout(tuple(Region(*region) for region in regions))


def test_figures_of_a_layout():
    assert (LAYOUT.size, LAYOUT.end) == (60 * P, 0x40000 + 24 * P)
    assert Layout.single(P, 2 * P, private=True).regions == (Region(2 * P, P, True),)


def test_spans_are_merged():
    operations = operations_of(
        op(Step.CONVERT, 5 * P, P),
        op(Step.CONVERT, P, 2 * P),
        op(Step.CONVERT, 2 * P, 2 * P),
        op(Step.ACCEPT, 9 * P, 0),
    )
    assert spans(operations) == [(P, 4 * P), (5 * P, 6 * P)]
    assert spans(operations, gap=P) == [(P, 6 * P)]


def test_outcomes_have_numbers_of_their_own():
    assert len(NAMES) == len(CODES)
    assert (CODES["OK"], CODES["EAGAIN"], CODES["EHWPOISON"], CODES["SIGBUS"]) == (0, 11, 133, 1000)
    assert OUTCOME.itemsize == 10
    assert OPERATION.itemsize == 48


def test_a_region_larger_than_a_memslot_has_several():
    """KVM's memslots end at 2^31 - 1 pages; a file and what is done to it don't."""
    terabyte, gpa = 1 << 40, 1 << 44
    with gmemcore.create_vm("SNP", backing="none") as vm:
        (gmem,) = build(vm, Layout.single(9 * terabyte, gpa, private=True))
        slots = [(slot.slot, slot.gpa - gpa, slot.size, slot.gmem_offset) for slot in vm.memslots]
        assert slots == [
            (0, 0, 4 * terabyte, 0),
            (1, 4 * terabyte, 4 * terabyte, 4 * terabyte),
            (2, 8 * terabyte, terabyte, 8 * terabyte),
        ]
        edge = gpa + 4 * terabyte - P
        operations = operations_of(
            op(Step.CONVERT, edge, 2 * P),
            *[op(Step.CONVERT, gpa + n * P, P) for n in range(20)],
            op(Step.POPULATE, gpa + 8 * terabyte - P, 2 * P),
        )
        played = play(vm, operations)
        assert not played.outcomes["code"].any()
        first = 4 * terabyte // P - 1
        if not JIT_DISABLED:  # plain Python looks at a terabyte in two seconds
            assert gmem.runs() == [
                (0, 20, "shared"),
                (20, first, "private"),
                (first, first + 2, "shared"),
                (first + 2, gmem.n_pages, "private"),
            ]
        assert played.counters.pages_accepted == 2
