"""Behaviours: each has the properties that make it that behaviour, everywhere, for any chunk size."""

import hashlib
import inspect
from collections import Counter
from itertools import islice

import numpy as np
import pytest

import gmemcore
from gmemcore.engine.steps import Step
from gmemcore.errors import InvalidArgumentError
from gmemcore.policy import ABIS
from gmemcore.uapi import PAGE_SIZE, PageType
from gmemcore.workload.behaviours import BEHAVIOURS, Behaviour, Kind, get_behaviour
from gmemcore.workload.behaviours import walk as walk_module
from gmemcore.workload.behaviours.behaviour import COMMON
from gmemcore.workload.behaviours.guest import Grid, SeededGuest, operations
from gmemcore.workload.layout import Layout, Region
from gmemcore.workload.operations import Access, check_operations
from gmemcore.workload.outcomes import CODES
from gmemcore.workload.player import build, play
from gmemcore.workload.seeds import Stream
from gmemcore.workload.streams import limit
from support.kinds import PRIVATE_VM_TYPES
from support.single_calls import SingleCalls

K, M, G = 1 << 10, 1 << 20, 1 << 30
LAYOUT = Layout((Region(0, 48 * M), Region(4 * G, 16 * M)))
MEMORY = 64 * M
SMALL = {
    "snp-boot": {"swiotlb": 4 * M, "image": 256 * K},
    "tdx-boot": {"swiotlb": 4 * M, "image": 256 * K, "accept": 4 * M},
    "kexec": {"run": 64 * K, "rounds": 2},
    "hotplug": {"block": 8 * M},
    "migration-sweep": {"dirty": 0.5},
    "conversion-walk": {"vcpus": 2},
    "balloon": {"target": 0.01},
}


def take(name, n=4000, seed=7, layout=LAYOUT, chunk=1000, **parameters):
    """The first n operations of a behaviour, in one array."""
    stream = BEHAVIOURS[name].operations(layout, seed, chunk=chunk, **{**SMALL.get(name, {}), **parameters})
    return np.concatenate(list(limit(stream, n)))


def of(ops, step, attributes=None):
    chosen = ops[ops["step"] == step]
    return chosen if attributes is None else chosen[chosen["attributes"] == attributes]


class Pages:
    """Which pages are shared, by a set of page numbers: what conversions mean, in the simplest way."""

    def __init__(self):
        self.shared = set()

    def convert(self, ops):
        for gpa, size, attributes in zip(
            *(ops[f].tolist() for f in ("gpa", "size", "attributes")), strict=True
        ):
            pages = range(gpa // PAGE_SIZE, (gpa + size) // PAGE_SIZE)
            (self.shared.difference_update if attributes else self.shared.update)(pages)
        return self


def shared_bytes(ops):
    return len(Pages().convert(of(ops, Step.CONVERT)).shared) * PAGE_SIZE


# --- every behaviour ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", BEHAVIOURS)
def test_a_row_is_complete_and_fits_its_generator(name):
    row = BEHAVIOURS[name]
    assert row.name == name
    assert len(row.title) > 20
    assert len(row.source) > 20
    takes = [each.name for each in inspect.signature(row.generate).parameters.values()][1:]
    assert {each.name for each in row.parameters} == set(takes)
    names = [each.name for each in row.all_parameters]
    assert len(set(names)) == len(names)
    assert not {"layout", "seed", "chunk"} & set(names)  # these are arguments of `operations`
    for each in row.all_parameters:
        assert each.meaning
        assert each.check(each.default, name) == each.default
        if each.default is not None:
            assert each.check(each.format(each.default), name) == each.default
            assert each.low is None or each.low <= each.default
            assert each.high is None or each.default <= each.high


DIGESTS = {
    "snp-boot": "297a0dd2f7e7da98",
    "tdx-boot": "1d49e060bb39aa0c",
    "bounce-churn": "bfea36be9fd6ed13",
    "kexec": "944ac461aa9b360d",
    "balloon": "9d2b1f325a72761f",
    "free-page-reporting": "7c79a59dff974b50",
    "hotplug": "c403b5a26cae589e",
    "vfio-pin": "22364bb873bad2d7",
    "migration-sweep": "c872ced6ce6ec4b8",
    "fragmentation": "f6d23b4da6e5d482",
    "scatter": "fbf5559dae2ce505",
    "hostile": "8496b92a2e01f7b7",
    "conversion-walk": "5e88e6b52e756776",
}


def digest(ops):
    return hashlib.sha256(ops.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_streams_are_these(name):
    """The bytes themselves: what was recorded with a seed must come again in every version."""
    assert digest(take(name)) == DIGESTS[name]


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_any_chunk_size_gives_the_same_stream(name):
    whole = take(name, chunk=100_000)
    for chunk in (1, 7, 333, 4096):
        n = 300 if chunk == 1 else 4000
        assert np.array_equal(take(name, n, chunk=chunk), whole[:n])
    sizes = [
        len(part)
        for part in limit(BEHAVIOURS[name].operations(LAYOUT, 7, chunk=100, **SMALL.get(name, {})), 1000)
    ]
    assert set(sizes[:-1]) <= {100}


@pytest.mark.parametrize("name", sorted(set(BEHAVIOURS) - {"conversion-walk"}))
def test_seeds_matter(name):
    assert not np.array_equal(take(name, seed=1), take(name, seed=2))
    assert np.array_equal(take(name, seed=1), take(name, seed=Stream(1)))


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_those_that_end_end_and_others_go_on(name):
    row = BEHAVIOURS[name]
    n = sum(len(part) for part in limit(row.operations(LAYOUT, 0, **SMALL.get(name, {})), 60_000))
    assert (n < 60_000) == row.ends


@pytest.mark.parametrize("name", sorted(name for name, row in BEHAVIOURS.items() if not row.hostile))
def test_requests_are_whole_pages_in_memory(name):
    ops = take(name, 20_000)
    ops = ops[ops["step"] != Step.LAUNCH_FINISH]
    assert not (ops["gpa"] % PAGE_SIZE).any()
    assert not (ops["size"] % PAGE_SIZE).any()
    assert ops["size"].all()
    inside = np.zeros(len(ops), bool)
    for region in LAYOUT.regions:
        inside |= (ops["gpa"] >= region.gpa) & (ops["gpa"] + ops["size"] <= region.gpa + region.size)
    assert inside.all()
    assert not ops["flags"].any()
    assert set(ops["attributes"].tolist()) <= {0, 8}


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_operations_are_some_that_exist(name):
    check_operations(take(name, 50_000))


@pytest.mark.parametrize("abi", ABIS)
@pytest.mark.parametrize("name", sorted(name for name, row in BEHAVIOURS.items() if not row.hostile))
def test_well_behaved_guests_are_refused_nothing_unexpected(name, abi):
    # The cipher firmware, where an abi has flags that it changes.
    firmware = "cipher" if abi in ("after-launch", "cipher", "two-caps", "pre-cap") else "today"
    row = BEHAVIOURS[name]
    ops = take(name, 300)
    for vm_type in PRIVATE_VM_TYPES:
        vm = gmemcore.create_vm(vm_type, abi=abi, firmware=firmware, backing="none")
        with vm:
            outcomes = Counter(SingleCalls(vm, LAYOUT).play([ops]))
        unexpected = [
            (step, outcome)
            for step, outcome in outcomes
            if outcome != "OK" and outcome not in row.refusals.get(step, ())
        ]
        assert not unexpected, f"{vm_type}: {unexpected}"
        assert sum(outcomes.values()) == len(ops)


@pytest.mark.parametrize("abi", ["v5", "legacy"])
@pytest.mark.parametrize("name", sorted(name for name, row in BEHAVIOURS.items() if not row.hostile))
def test_in_batches_the_same_comes_of_it_as_by_single_calls(name, abi):
    ops = take(name, 1000)
    with gmemcore.create_vm("TDX", abi=abi, backing="none") as vm:
        singly = [CODES[outcome] for _, outcome in SingleCalls(vm, LAYOUT).play([ops])]
    with gmemcore.create_vm("TDX", abi=abi, backing="none") as vm:
        build(vm, LAYOUT)
        together = play(vm, [ops[:337], ops[337:]], discard=False).outcomes["code"]
    assert together.tolist() == singly


def test_one_with_contents_too():
    """Accesses that move data are refused no more than those that don't."""
    layout = Layout((Region(0, 8 * M),))
    for vm_type, abi in (("SNP", "v5"), ("TDX", "legacy")):
        with gmemcore.create_vm(vm_type, abi=abi) as vm:
            outcomes = Counter(SingleCalls(vm, layout).play([take("bounce-churn", 60, layout=layout)]))
        assert {outcome for _, outcome in outcomes} == {"OK"}


def test_hostile_guests_are_refused_and_leave_a_sound_state():
    ops = take("hostile", 4000)
    for vm_type in PRIVATE_VM_TYPES:
        with gmemcore.create_vm(vm_type, abi="v5", backing="none") as vm:
            guest = SingleCalls(vm, LAYOUT)
            outcomes = Counter(outcome for _, outcome in guest.play([ops]))
            for _, _, gmem in guest.slots:
                planes = {
                    name: gmem.plane(name)
                    for name in ("private", "allocated", "assigned", "accepted", "pinned")
                }
                assert not (planes["accepted"] & ~planes["assigned"]).any()
                assert not (planes["assigned"] & ~(planes["allocated"] & planes["private"])).any()
                assert not (planes["pinned"] & (planes["private"] | ~planes["allocated"])).any()
        assert set(outcomes) >= {"OK", "EINVAL", "EAGAIN", "EOPNOTSUPP", "OUTSIDE", "EFAULT", "SIGBUS"}
        assert 0.2 < outcomes["OK"] / len(ops) < 0.9


# --- common parameters --------------------------------------------------------------------------------
def test_accesses_can_be_left_out():
    ops = take("bounce-churn", 4000)
    without = take("bounce-churn", 4000, accesses=False)
    moving = np.isin(ops["step"], [Step.HOST_READ, Step.HOST_WRITE, Step.GUEST_READ, Step.GUEST_WRITE])
    assert moving.any()
    assert np.array_equal(ops[~moving], without[: (~moving).sum()])


def test_flags_can_be_set_by_direction():
    ops = take("bounce-churn", 2000, share_flags=1, private_flags="2")
    assert set(of(ops, Step.CONVERT, 0)["flags"].tolist()) == {1}
    assert set(of(ops, Step.CONVERT, 8)["flags"].tolist()) == {2}
    assert not ops["flags"][ops["step"] != Step.CONVERT].any()


# --- one by one ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "special"), [("snp-boot", 11 * PAGE_SIZE), ("tdx-boot", 0)])
def test_boot_populates_an_image_and_finishes_the_launch(name, special):
    ops = take(name, 100_000)
    finish = int(np.flatnonzero(ops["step"] == Step.LAUNCH_FINISH)[0])
    launch, run = ops[:finish], ops[finish + 1 :]
    assert (of(ops, Step.LAUNCH_FINISH)["size"] == 0).all()
    populated = of(launch, Step.POPULATE)
    assert populated["size"].sum() == 256 * K + special
    assert populated[0]["size"] == 256 * K
    assert (np.diff(populated["gpa"].astype(np.int64)) == populated["size"][:-1]).all()
    types = [list(PageType)[i] for i in populated["variant"]]
    assert types == (["NORMAL", "ZERO", "SECRETS", "CPUID"] if special else ["NORMAL"])
    assert not len(of(run, Step.POPULATE))
    assert not len(of(launch, Step.ACCEPT))
    # In place: written while shared, private when it is populated.
    steps = launch["step"].tolist()
    assert steps[:2] == [Step.CONVERT, Step.HOST_WRITE]
    assert shared_bytes(launch) == 0


@pytest.mark.parametrize(
    ("name", "parameters", "small"),
    [
        ("snp-boot", {"vcpus": 3, "queues": 5, "ring": 12 * K}, 3 * PAGE_SIZE + 5 * 12 * K),
        ("snp-boot", {"vcpus": 1, "queues": 0, "swiotlb": 12 * M}, PAGE_SIZE),
        ("tdx-boot", {"queues": 7, "ring": 16 * K}, 7 * 16 * K),
        ("tdx-boot", {"queues": 2, "swiotlb": "0"}, 2 * 12 * K),
    ],
)
def test_boot_shares_exactly_what_was_asked_for(name, parameters, small):
    ops = take(name, 100_000, **parameters)
    swiotlb = {**SMALL[name], **parameters}["swiotlb"]
    assert shared_bytes(ops) == small + int(swiotlb)
    at_last = Pages().convert(of(ops, Step.CONVERT)).shared
    low_end = 48 * M // PAGE_SIZE
    assert at_last >= set(range(low_end - int(swiotlb) // PAGE_SIZE, low_end))


@pytest.mark.parametrize(
    ("memory", "share"),
    [(1 * G, 64 * M), (2 * G, -(-2 * G * 6 // 100 // (256 * K)) * 256 * K), (64 * G, 1 * G)],
)
def test_swiotlb_is_six_percent_between_64m_and_1g(memory, share):
    for name in ("snp-boot", "tdx-boot"):
        parameters = {"queues": 0, "accepted": 0.0, "image": 4 * M, "swiotlb": "auto"}
        ops = take(name, 1_000_000, layout=Layout.single(memory), **parameters)
        ghcbs = 4 * PAGE_SIZE if name == "snp-boot" else 0
        assert shared_bytes(ops) == share + ghcbs


def test_what_a_guest_shares_is_whole_multiples_of_its_granularity():
    layout = Layout((Region(0, 47 * M), Region(4 * G, 15 * M)))
    for name, given, n in (
        ("snp-boot", {"swiotlb": 4 * M}, 6 * M),
        ("tdx-boot", {"swiotlb": 4 * M}, 6 * M),
        ("tdx-boot", {"swiotlb": 4 * M, "queues": 0}, 4 * M),
        ("bounce-churn", {"buffer": 3 * M, "pool": 0.4}, None),
    ):
        ops = take(name, 4000, layout=layout, granularity=2 * M, **given)
        start = 1 + max(np.flatnonzero(ops["step"] == Step.LAUNCH_FINISH), default=1)
        shares = of(ops[start:], Step.CONVERT, 0)
        assert len(shares)
        ends = (shares["gpa"] + shares["size"])[:, None] == [47 * M, 4 * G + 15 * M]
        assert not (shares["gpa"] % (2 * M)).any()
        assert ((shares["size"] % (2 * M) == 0) | ends.any(axis=1)).all()
        if n is None:
            assert set(shares["size"].tolist()) >= {2 * M, 4 * M}
        else:
            assert len(np.unique(shares["gpa"])) == len(shares)
            assert (shares["size"].sum(), shares["gpa"][-1] + shares["size"][-1]) == (n, 46 * M)
            small = of(ops[start:], Step.HOST_READ)
            assert (small["gpa"] >= 46 * M - n).all()
            assert (small["gpa"][1:] >= (small["gpa"] + small["size"])[:-1]).all()
    with pytest.raises(InvalidArgumentError, match=r"doesn't fit.*granularity"):
        take("snp-boot", granularity=1 * G)


def test_fragmentation_splits_huge_pages_of_a_size():
    layout = Layout.single(3 * G)
    ops = take("fragmentation", 7, layout=layout, block=1 * G)
    with gmemcore.create_vm("SNP", "huge-partial", backing="none") as vm:
        gmem = vm.create_guest_memfd(layout.size, 5, 18)
        gmem.fallocate(1, 0, layout.size)
        assert not gmem.apply_many(ops["step"], ops["gpa"], ops["size"], ops["attributes"]).errno.any()
        assert (vm.counters.folios_1g_split, vm.counters.folios_1g_merged) == (3, 3)


@pytest.mark.parametrize("accept", [2 * M, 4 * M, 64 * K])
@pytest.mark.parametrize("name", ["snp-boot", "tdx-boot"])
def test_boot_accepts_in_the_chunk_asked(name, accept):
    ops = take(name, 100_000, accept=accept, accepted=0.75)
    accepted = of(ops, Step.ACCEPT)
    assert set(accepted["size"].tolist()) == {accept}
    assert not (accepted["gpa"] % accept).any()
    assert len(np.unique(accepted["gpa"])) == len(accepted)
    assert accepted["size"].sum() == 0.75 * MEMORY
    # SNP's kernel asks for a page state change of what it validates; TDX's accepts alone.
    before = ops[np.flatnonzero(ops["step"] == Step.ACCEPT) - 1]
    if name == "snp-boot":
        assert (before["step"] == Step.CONVERT).all()
        assert np.array_equal(before[["gpa", "size"]], accepted[["gpa", "size"]])
    else:
        assert not (before["step"] == Step.CONVERT).any()


@pytest.mark.parametrize(
    ("name", "request_size"), [("snp-boot", "506m"), ("tdx-boot", "2m"), ("snp-boot", "64k")]
)
def test_boot_shares_in_requests_of_the_size_asked(name, request_size):
    ops = take(name, 100_000, request=request_size, queues=0)
    size = {"506m": 4 * M, "2m": 2 * M, "64k": 64 * K}[request_size]
    shares = of(ops, Step.CONVERT, 0)
    assert shares["size"][1 : 1 + 4 * M // size].tolist() == [size] * (4 * M // size)  # after the image's


def test_boot_without_room_says_what_would_fit():
    tiny = Layout.single(8 * M)
    with pytest.raises(InvalidArgumentError, match=r"swiotlb of 64m doesn't fit.*smaller swiotlb"):
        take("snp-boot", layout=tiny, swiotlb=None)
    with pytest.raises(InvalidArgumentError, match="image of 16m"):
        take("tdx-boot", layout=tiny, swiotlb=0, image=16 * M, queues=0)
    with pytest.raises(InvalidArgumentError, match="rings of 1m don't fit"):
        take("tdx-boot", layout=tiny, queues=100, ring=1 * M)


def test_bounce_buffers_alternate_and_stay_in_their_pool():
    ops = take("bounce-churn", 30_001, pool=0.25, buffer="64k")
    assert ops[0]["size"] == 16 * M  # a quarter of memory, the top region
    state = {}
    for gpa, size, attributes in zip(
        *(of(ops[1:], Step.CONVERT)[f].tolist() for f in ("gpa", "size", "attributes")), strict=True
    ):
        assert gpa >= 4 * G
        assert gpa + size <= 4 * G + 16 * M
        previous = state.get(gpa, (size, 8))
        assert previous == (size, 8 - attributes)  # the same range, in the other direction
        state[gpa] = (size, attributes)
    assert len({size for size, _ in state.values()}) == 16
    triples = ops[1:].reshape(-1, 3)
    shared = triples["attributes"][:, 0] == 0
    assert (triples["step"][shared] == [Step.CONVERT, Step.HOST_WRITE, Step.GUEST_READ]).all()
    assert (triples["step"][~shared] == [Step.CONVERT, Step.ACCEPT, Step.GUEST_WRITE]).all()


@pytest.mark.parametrize("sweep", [True, False])
def test_after_kexec_nothing_is_shared(sweep):
    ops = take("kexec", 100_000, shared=0.1, sweep=sweep)
    assert shared_bytes(ops) == 0
    first_back = int(np.flatnonzero(ops["step"] == Step.UNPIN)[0])
    assert shared_bytes(ops[:first_back]) == pytest.approx(0.1 * MEMORY, rel=0.02)
    assert len(of(ops, Step.UNPIN)) == 2 * len(LAYOUT.regions)
    # With the sweep also what somebody else had shared is private.
    others = operations(Step.CONVERT, np.array([5 * M, 4 * G], np.uint64), 4096)
    left = shared_bytes(np.concatenate([others, ops]))
    assert left == 0 if sweep else left > 0


def test_what_kexec_took_back_is_accepted():
    ops = take("kexec", 100_000, rounds=1, accept="64k", run="64k")
    shared = {tuple(row) for row in of(ops, Step.CONVERT, 0)[["gpa", "size"]].tolist()}
    accepted = {tuple(row) for row in of(ops, Step.ACCEPT)[["gpa", "size"]].tolist()}
    assert shared == accepted


def test_a_balloon_takes_its_target_and_gives_it_back():
    n = MEMORY // PAGE_SIZE // 8
    ops = take("balloon", len(LAYOUT.regions) + 2 * 3 * n, target=0.125)[len(LAYOUT.regions) :]
    first, second = ops[: 3 * n], ops[3 * n :]
    for turn in (first, second):
        inflated, deflated = turn[:n], turn[n:]
        assert (inflated["step"] == Step.PUNCH_HOLE).all()
        assert len(np.unique(inflated["gpa"])) == n
        assert np.array_equal(of(deflated, Step.ACCEPT)["gpa"], inflated["gpa"])
        assert np.array_equal(of(deflated, Step.GUEST_WRITE)["gpa"], inflated["gpa"])
    assert not np.array_equal(first, second)


def test_reported_blocks_are_discarded_once_and_accepted_on_reuse():
    ops = take("free-page-reporting", 20_000, accept="512k")
    free = set()
    accepted = Counter()
    for step, gpa, size in zip(*(ops[f].tolist() for f in ("step", "gpa", "size")), strict=True):
        if step == Step.PUNCH_HOLE:
            assert size == 2 * M
            assert gpa not in free
            free.add(gpa)
        elif step == Step.ACCEPT:
            assert size == 512 * K
            assert gpa // (2 * M) * 2 * M in free
            accepted[gpa // (2 * M)] += 1
        elif step == Step.GUEST_WRITE:
            assert accepted.pop(gpa // (2 * M)) == 4
            free.remove(gpa)
    assert len(np.unique(of(ops, Step.PUNCH_HOLE)["gpa"])) == MEMORY // 2 // (2 * M)


def test_plugged_memory_comes_and_goes():
    ops = take("hotplug", 20_000, pluggable=0.5, block="8m", shared="256k")
    plugged, shared = [], 0
    for step, gpa, size, attributes in zip(
        *(ops[f].tolist() for f in ("step", "gpa", "size", "attributes")), strict=True
    ):
        if step == Step.CONVERT and attributes and size == 8 * M and gpa not in plugged:
            plugged.append(gpa)
        elif step == Step.CONVERT and not attributes:
            assert size == 256 * K
            shared += 1
        elif step == Step.ACCEPT:
            assert plugged[-1] <= gpa < plugged[-1] + 8 * M
            assert size == 4 * M
        elif step == Step.PUNCH_HOLE:
            assert (gpa, size) == (plugged.pop(), 8 * M)  # last in, first out
    assert shared > 10
    holes = of(ops, Step.PUNCH_HOLE)["gpa"]
    assert holes.min() == 32 * M  # half of memory: 16 MiB of the first region and all of the second
    assert len(np.unique(holes)) == 4


def test_assigned_memory_is_pinned_while_it_is_shared():
    pinned = {}
    for step, gpa, size in take("vfio-pin", 20_000)[["step", "gpa", "size"]].tolist()[1:]:
        if step == Step.PIN:
            assert pinned.setdefault(gpa, size) == size
        elif step == Step.UNPIN:
            assert pinned.pop(gpa) == size
        elif step == Step.CONVERT:
            assert gpa not in pinned
    assert pinned


def test_a_late_unpin_makes_a_conversion_wait():
    ops = take("vfio-pin", 3000, late="100%")
    with gmemcore.create_vm("SNP", abi="v13", backing="none") as vm:
        outcomes = SingleCalls(vm, LAYOUT).play([ops])
    unpins = [i for i, (step, _) in enumerate(outcomes) if step == Step.UNPIN]
    assert unpins
    assert all(
        outcomes[i - 1] == (Step.CONVERT, "EAGAIN") and outcomes[i + 1] == (Step.CONVERT, "OK")
        for i in unpins
    )


def test_migration_goes_over_everything_and_then_over_less():
    ops = take("migration-sweep", 100_000, passes=3, dirty=0.5, piece="2m")
    sent = of(ops, Step.HOST_READ)
    n = MEMORY // (2 * M)
    assert len(sent) == n + n // 2 + n // 4
    assert sent["gpa"][:n].tolist() == [*range(0, 48 * M, 2 * M), *range(4 * G, 4 * G + 16 * M, 2 * M)]
    assert shared_bytes(ops) == 0
    assert set(sent["size"].tolist()) == {2 * M}
    assert set(of(take("migration-sweep", read="8k"), Step.HOST_READ)["size"].tolist()) == {8 * K}


@pytest.mark.parametrize(("pieces", "run"), [(1, "4k"), (8, "16k"), (256, "4k"), (256, "1m")])
def test_fragmentation_splits_every_block_and_merges_it_again(pieces, run):
    blocks = MEMORY // (2 * M)
    ops = take("fragmentation", len(LAYOUT.regions) + 2 * blocks * pieces, pieces=pieces, run=run)
    share, back = ops[2 : 2 + blocks * pieces], ops[2 + blocks * pieces :]
    with gmemcore.create_vm("SNP", abi="v13", backing="none") as vm:
        guest = SingleCalls(vm, LAYOUT)
        guest.play([ops[:2], share])
        assert vm.counters.blocks_2m_split == blocks
        assert vm.counters.blocks_2m_merged == 0
        runs = sum(len(gmem.runs()) for _, _, gmem in guest.slots)
        assert runs >= 2 * blocks * pieces - blocks  # each piece is a run of its own
        guest.play([back])
        assert vm.counters.blocks_2m_merged == blocks
    assert np.array_equal(np.sort(share["gpa"]), np.sort(back["gpa"]))


@pytest.mark.parametrize("pieces", [1, 3, 7, 100, 256])
@pytest.mark.parametrize("pages", [1, 2, 511, 513, 1536])
def test_fragmentation_of_any_memory_is_runs_of_whole_pages_that_do_not_meet(pieces, pages):
    layout = Layout.single(pages * PAGE_SIZE)
    ops = take("fragmentation", 4000, layout=layout, pieces=pieces, run=16 * K)[1:]
    assert not ((ops["gpa"] | ops["size"]) % PAGE_SIZE).any()
    turn = np.flatnonzero(np.diff(ops["attributes"]))[0] + 1
    share, back = ops[:turn], ops[turn : 2 * turn]
    assert not share["attributes"].any()
    assert back["attributes"].all()
    assert np.array_equal(share[["gpa", "size"]], back[["gpa", "size"]])
    in_order = np.sort(share, order="gpa")
    starts, ends = in_order["gpa"], in_order["gpa"] + in_order["size"]
    assert ends[-1] <= layout.size
    gaps = starts[1:] - ends[:-1]
    assert (starts[1:] >= ends[:-1]).all()
    assert (gaps >= PAGE_SIZE).sum() >= len(gaps) - 1  # a place at the end may have one page, and no gap


@pytest.mark.parametrize("pages", [1, 2, 3, 513])
@pytest.mark.parametrize("name", BEHAVIOURS)
def test_generators_have_something_to_do_in_little_memory(name, pages):
    """What a generator makes costs a pass over arrays, so most of them must hold operations."""
    row, layout = BEHAVIOURS[name], Layout.single(pages * PAGE_SIZE)
    guest = SeededGuest.of(layout, Stream(3))
    values = {each.name: each.default for each in row.parameters}
    try:
        arrays = list(islice(row.generate(guest, **values), 2000))
    except InvalidArgumentError:
        return  # it says that it needs more memory
    assert sum(map(len, arrays)) >= len(arrays) / 2


def test_hostile_requests_are_of_all_kinds():
    ops = take("hostile", 20_000)
    ends = [0, 48 * M, 4 * G, 4 * G + 16 * M]
    near = np.isin(ops["gpa"].astype(object) + ops["size"].astype(object), ends).sum()
    repeated = (ops[1:] == ops[:-1]).mean()
    unaligned = ((ops["gpa"] | ops["size"]) % PAGE_SIZE != 0).mean()
    overlapping = (
        (ops["gpa"][1:] > ops["gpa"][:-1]) & (ops["gpa"][1:] < ops["gpa"][:-1] + ops["size"][:-1])
    ).mean()
    assert near > 200
    assert 0.1 < repeated < 0.25
    assert 0.08 < unaligned < 0.25
    assert overlapping > 0.03
    assert {0, 1 << 63, (1 << 64) - PAGE_SIZE} <= set(ops["size"].tolist())
    assert set(ops["step"].tolist()) == set(Step) - {Step.POPULATE, Step.LAUNCH_FINISH}
    assert set(ops["variant"].tolist()) == set(Access)


def test_hostile_weights_decide():
    ops = take("hostile", 4000, valid=1, repeated=0, overlapping=0, boundary=0, unaligned=0, argument=0)
    assert not ((ops["gpa"] | ops["size"]) % PAGE_SIZE).any()
    with pytest.raises(InvalidArgumentError, match="at least one weight must be above 0"):
        take("hostile", valid=0, repeated=0, overlapping=0, boundary=0, unaligned=0, argument=0)


# --- the walk -----------------------------------------------------------------------------------------
def walk_by_hand(base):
    """One vCPU's walk, written out from the selftest's description: (step, offset, size[, attributes])."""
    page, whole = 4 * K, 2 * M + 4 * K
    C, HR, HW, GR, GW = Step.CONVERT, Step.HOST_READ, Step.HOST_WRITE, Step.GUEST_READ, Step.GUEST_WRITE
    AC, AL, PH = Step.ACCEPT, Step.ALLOCATE, Step.PUNCH_HOLE
    ranges = [(0, page), (0, 2 * M), (page, page), (page, 2 * M), (2 * M, page)]
    rows = [(C, 0, whole, 0)]
    for fallocate in (False, True):
        rows += [(GW, 0, whole), (GR, 0, whole), (HR, 0, whole), (HW, 0, whole), (GR, 0, whole)]  # a
        for off, size in ranges:
            rows += [(GW, off, size)]  # b
            rows += [(AL, off, size)] * fallocate + [(C, off, size, 8), (AC, off, size)]
            if size > page:
                rows += [(GW, off, page)]
            else:
                rows += [(GW, off, page), (HR, off, page), (GR, off, page)]
                rows += [(GR, 0, off)] * (off > 0) + [(GR, off + page, whole - off - page)] * (
                    off + page < whole
                )
                rows += [(HR, off, page)]
            rows += [(PH, off, size)] * fallocate + [(C, off, size, 0)]  # c
            rows += [(GW, off, size), (HR, off, size), (HW, off, size), (GR, off, size)]
            rows += [(PH, 0, whole), (C, 0, whole, 0), (GW, 0, whole)]  # d
    for precise in (False, True):
        rows += [(C, 0, whole, 8), (AC, 0, whole)]
        for off, size in ranges:
            filled = (off, size) if precise else (0, whole)
            rows += [(PH, 0, whole), (AC, 0, whole), (GW, *filled), (GR, *filled)]
            rows += [(PH, off, size), (AC, off, size), (GR, off, size)]
    return [(row[0], base + row[1], row[2], row[3] if len(row) > 3 else 0) for row in rows]


def test_the_walk_is_the_selftests():
    layout = Layout((Region(4 * G, 8 * M),))
    ops = take("conversion-walk", 100_000, layout=layout, vcpus=2)
    expected = walk_by_hand(4 * G) + walk_by_hand(4 * G + 4 * M)
    expected += [(Step.PUNCH_HOLE, 4 * G, 8 * M, 0), (Step.ALLOCATE, 4 * G, 8 * M, 0)]
    assert [tuple(row) for row in ops[["step", "gpa", "size", "attributes"]].tolist()] == expected


def test_the_walks_probes_are_what_the_host_may_not_see():
    with gmemcore.create_vm("SW_PROTECTED", abi="v13", backing="none") as vm:
        probed = SingleCalls(vm, LAYOUT).play([take("conversion-walk", 100_000, vcpus=1)])
    refused = [each for each in probed if each[1] != "OK"]
    assert (
        refused == [(Step.HOST_READ, "SIGBUS")] * 12
    )  # three single pages, twice each, without and with fallocate
    unprobed = take("conversion-walk", 100_000, vcpus=1, probes="no")
    assert len(unprobed) == len(probed) - 12


def test_a_walk_without_room_is_refused():
    with pytest.raises(InvalidArgumentError, match="fewer vCPUs"):
        take("conversion-walk", vcpus=100)
    assert walk_module.REGION == 2 * M + 4 * K


# --- the table ----------------------------------------------------------------------------------------
def one_page(guest, *, size):
    """A behaviour of one operation."""
    yield operations(Step.CONVERT, guest.ranges[0][0], size, n=1)


def test_a_row_added_at_run_time_is_seen_by_all_readers(monkeypatch, capsys, tmp_path):
    from gmemcore.cli import main
    from gmemcore.stress.guest import run_guest
    from gmemcore.stress.spec import check as check_spec
    from gmemcore.workload.behaviours.parameters import size
    from gmemcore.workload.trace import read_trace

    row = Behaviour(
        "one-page", "Shares one piece of memory", "this test", one_page, (size("size", "4k", "how much"),)
    )
    monkeypatch.setitem(BEHAVIOURS, "one-page", row)
    assert get_behaviour("one-page") is row
    assert take("one-page", size="8k")["size"].tolist() == [8192]
    with pytest.raises(SystemExit) as ended:
        main(["behaviours", "--json"])
    assert ended.value.code == 0
    assert '"one-page"' in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["behaviours", "one-page", "--set", "size=16k"])
    assert ended.value.code == 0
    assert "16k" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["trace", "record", "one-page", str(tmp_path / "one.trace"), "--set", "size=16k"])
    assert ended.value.code == 0
    _running, *sizes = read_trace(tmp_path / "one.trace").operations["size"].tolist()
    assert set(sizes) == {16 * K}
    fleet = {"guests": 1, "operations": 1, "behaviour": [{"name": "one-page"}], "guest": {"memory": "1m"}}
    run = run_guest(check_spec(fleet), 0)
    assert run.operations == 1


def test_unknown_behaviours_and_parameters_are_named():
    with pytest.raises(InvalidArgumentError, match="no behaviour 'boot'; there are snp-boot"):
        get_behaviour("boot")
    with pytest.raises(
        InvalidArgumentError, match="balloon has no parameter 'size'; it has target, unit, accesses"
    ):
        BEHAVIOURS["balloon"].operations(LAYOUT, size=1)


@pytest.mark.parametrize(
    ("name", "parameter", "value", "accepted"),
    [
        ("balloon", "unit", "3k", "unit must be whole pages, 4k to 1g, not '3k'"),
        ("balloon", "unit", 4097, "4k to 1g"),
        ("balloon", "unit", "2g", "4k to 1g"),
        ("balloon", "unit", True, "4k to 1g"),
        ("balloon", "unit", 4096.0, "4k to 1g"),
        ("balloon", "unit", None, "4k to 1g"),
        ("balloon", "target", "150%", "0 to 1"),
        ("balloon", "target", float("nan"), "0 to 1"),
        ("balloon", "target", True, "0 to 1"),
        ("balloon", "target", "much", "0 to 1"),
        ("snp-boot", "vcpus", "-1", "a whole number, 1 to 65536"),
        ("snp-boot", "vcpus", 0, "1 to 65536"),
        ("snp-boot", "vcpus", 1.5, "1 to 65536"),
        ("snp-boot", "swiotlb", "big", "0 or more, or auto"),
        ("kexec", "sweep", "maybe", "yes or no"),
        ("kexec", "sweep", 1, "yes or no"),
    ],
)  # fmt: skip
def test_values_that_are_refused_say_what_is_accepted(name, parameter, value, accepted):
    with pytest.raises(InvalidArgumentError) as refused:
        BEHAVIOURS[name].operations(LAYOUT, **{parameter: value})
    assert f"{name}: {parameter} must be " in str(refused.value)
    assert str(refused.value).endswith(f", not {value!r}")
    assert accepted in str(refused.value)


def test_texts_and_values_are_the_same():
    for texts, values in (
        ({"target": "10%", "unit": "64k"}, {"target": 0.1, "unit": 65536}),
        ({"target": "0.1", "accesses": "no"}, {"target": 0.1, "accesses": False}),
    ):
        assert np.array_equal(take("balloon", **texts), take("balloon", **values))
    assert BEHAVIOURS["balloon"].defaults() == {
        "target": 0.25,
        "unit": 4096,
        **{row.name: row.default for row in COMMON},
    }
    assert {row.kind for row in BEHAVIOURS["kexec"].all_parameters} == set(Kind)


# --- grids --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ranges", [[(0, 10)], [(3, 4)], [(3, 9), (100, 1), (16, 16)], [(7, 1), (8, 8)]])
def test_a_grid_tiles_its_ranges(ranges):
    ranges = [(start * PAGE_SIZE, size * PAGE_SIZE) for start, size in ranges]
    grid = Grid(ranges, 4 * PAGE_SIZE)
    gpas, sizes = grid[np.arange(grid.count, dtype=np.uint64)]
    pages = [
        page
        for gpa, size in zip(gpas.tolist(), sizes.tolist(), strict=True)
        for page in range(gpa, gpa + size, PAGE_SIZE)
    ]
    assert pages == [page for start, size in ranges for page in range(start, start + size, PAGE_SIZE)]
    cells = gpas // np.uint64(4 * PAGE_SIZE)
    assert ((gpas + sizes - np.uint64(1)) // np.uint64(4 * PAGE_SIZE) == cells).all()
    assert [number for block in grid.blocks() for number in block.tolist()] == list(range(grid.count))
    if ranges == sorted(ranges):
        for number, (gpa, size) in enumerate(zip(gpas.tolist(), sizes.tolist(), strict=True)):
            assert list(grid.cells_of(gpa, size)) == [number]


def test_large_guests_cost_no_more_than_what_is_read():
    """16 TiB: the first operations come without making all of them."""
    layout = Layout.single(16 << 40)
    for name in BEHAVIOURS:
        assert len(list(islice(BEHAVIOURS[name].operations(layout, 1, chunk=10), 3))) == 3
