"""Series: kept by what changed, cut like a list, followed page by page; and the way to pandas."""

import tracemalloc

import numpy as np
import pandas
import pytest
import xarray

import gmemcore
from gmemcore import analysis
from gmemcore.analysis import STATES, Series, by_address, diff, state_mix, take, watch
from gmemcore.analysis.address import ABSENT, GuestMemory, guest_runs, page_masks, plane_runs, states_by_block
from gmemcore.analysis.frames import Change
from gmemcore.analysis.history import EVENT, thinned
from gmemcore.engine.packed import PLANE_NAMES
from gmemcore.engine.steps import Step
from gmemcore.errors import InvalidArgumentError
from gmemcore.workload.behaviours import BEHAVIOURS
from gmemcore.workload.layout import Layout
from gmemcore.workload.operations import empty_operations
from gmemcore.workload.player import Player
from support.guests import (
    PAGES,
    gpa_of,
    page_planes,
    random_guest,
    random_operations,
    recorded,
    two_ranges,
)
from support.kinds import VM_TYPES, P
from support.paths import needs_compiler

# ---- kept by what changed ----------------------------------------------------------------------------


@pytest.mark.parametrize(("vm_type", "abi"), [("SNP", "v5"), ("TDX", "v5"), ("SNP", "legacy")])
def test_snapshots_come_back_as_they_were(vm_type, abi):
    vm, series, taken = two_ranges(vm_type, abi), Series(), []
    player = Player(vm)
    for i, operation in enumerate(np.split(random_operations(3, 60), 60)):
        player.run(operation)
        if i == 30:
            vm.create_guest_memfd(700 * P)
        if i == 45:
            vm.files[0].close()
        taken.append(series.take(vm, i))
    assert len(series) == 60
    order = [*range(60), 59, 0, 30, 31, 29, 12, 12, 58]
    for number in order:
        kept, own = series[number], taken[number]
        assert not diff(own, kept)
        assert (kept.at, kept.phase, kept.slots, kept.counters) == (
            own.at,
            own.phase,
            own.slots,
            own.counters,
        )
        for file, other in zip(own.files, kept.files, strict=True):
            assert np.array_equal(file.state.words, other.state.words)
            assert np.array_equal(file.state.lines, other.state.lines)
            other.state.check()
    assert [one.at for one in series] == list(range(60))
    assert series.times.tolist() == list(range(60))


def test_files_of_one_number_and_another_size():
    series = Series([take(two_ranges(layout=Layout.single(size))) for size in ("2m", "4m", "4m", "2m")])
    assert [one.n_pages for one in series] == [512, 1024, 1024, 512]


def test_what_changes_between_states_of_a_short_last_block():
    vm = gmemcore.create_vm("SNP", backing="none")
    gmem = vm.create_guest_memfd(700 * P)
    states = [gmem.packed_state()]
    for start, n, attributes in ((0, 700, 0), (512, 188, 8), (699, 1, 0), (0, 512, 8), (5, 3, 0)):
        gmem.set_memory_attributes(start * P, n * P, attributes)
        states.append(gmem.packed_state())
    for before in states:
        for after in states:
            again = Change.between(before, after).applied(before)
            assert np.array_equal(again.words, after.words)
            assert np.array_equal(again.lines, after.lines)


@needs_compiler
def test_a_hundred_snapshots_of_a_large_guest_take_little_more_than_one():
    vm = gmemcore.create_vm("SNP", backing="none")
    gmem = vm.create_guest_memfd("256g")
    vm.add_memslot(0, 0, gmem.size, gmem)
    series = Series()
    for i in range(100):
        gmem.convert(i << 30, "8k", "shared")
        series.take(vm, i)
    one = series[0].nbytes
    assert series.nbytes < 3 * one
    assert [snapshot.planes(0).private.count() for snapshot in series[::33]] == [
        gmem.n_pages - 2 * n for n in (1, 34, 67, 100)
    ]
    tracemalloc.start()
    for snapshot in series:
        assert len(snapshot.files) == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * one


def test_a_part_of_a_series_is_a_series():
    series, _ = recorded(two_ranges(), random_operations(1, 60), 10)
    part = series[1:3]
    assert isinstance(part, Series)
    assert (len(part), part.unit, part.times.tolist()) == (2, "operations", [10, 20])
    assert not diff(part[0], series[1])
    assert np.unique(part.events["operation"]).tolist() == list(range(10, 20))
    assert series[-2:].times.tolist() == [50, 60]
    assert series[::3].times.tolist() == [0, 30, 60]
    assert len(series[5:2]) == 0
    assert repr(series[5:2]) == "Series of 0 snapshots"
    with pytest.raises(IndexError):
        series[7]
    with pytest.raises(ValueError, match="back in time"):
        series[::-1]


# ---- distributions of a series --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("state_mix", "by_slot", "by_region", "by_address", "run_lengths", "run_histogram", "run_quantiles"),
        *("mappability", "mapping_sizes", "fragmentation", "iommu"),
    ],
)
def test_a_distribution_of_a_series_is_that_of_each_snapshot(name):
    series, _ = recorded(two_ranges(), random_operations(2, 40), 20)
    distribution = getattr(analysis, name)
    table = distribution(series)
    assert table.keys[0] == table.columns[0] == "operation"
    assert table.units["operation"] == "operations"
    for snapshot in series:
        own = distribution(snapshot)
        part = table.where(operation=snapshot.at)
        assert [row.tolist()[1:] for row in part] == [row.tolist() for row in own]
    with pytest.raises(ValueError, match="at least one"):
        distribution(Series())


# ---- by address ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vm_type", "abi"), [("SNP", "v5"), ("SW_PROTECTED", "legacy")])
@pytest.mark.parametrize("block", ["4k", "8k", "12k", "256k", "2m", "1g"])
def test_states_by_block_page_by_page(vm_type, abi, block):
    vm = random_guest(vm_type, abi, 5)
    snapshot, memory = take(vm), GuestMemory([take(vm)])
    blocks = memory.blocks(gmemcore.units.parse_bytes(block))
    counts = states_by_block(memory, snapshot, blocks)
    expected = {}
    for slot in snapshot.slots:
        states = analysis.distributions.states_of(snapshot.planes(slot.file))
        for page in range(slot.size // P):
            gpa = slot.gpa + page * P
            start = max(gpa // blocks.size * blocks.size, 0 if gpa < 1 << 32 else 1 << 32)
            column = next(
                i for i, state in enumerate(STATES)
                if states[state.name].bits(slot.offset // P + page, slot.offset // P + page + 1)[0]
            )  # fmt: skip
            expected.setdefault(start, [0] * 8)[column] += 1
    assert dict(zip(blocks.gpas.tolist(), counts.tolist(), strict=True)) == expected
    assert blocks.pages.tolist() == counts.sum(axis=1).tolist()
    table = by_address(vm, block)
    assert table["pages"].sum() == counts.sum()
    assert table["pages"].min() > 0


def test_positions_and_addresses():
    memory = GuestMemory([take(two_ranges())])
    assert memory.pages == PAGES
    for position in (0, 1, 599, 600, 601, 899):
        assert memory.gpa_of(position) == gpa_of(position)
        assert memory.position_of(gpa_of(position)) == position
    assert memory.gpa_of(900) == (1 << 32) + 300 * P
    for nowhere in (600 * P, (1 << 32) - 1, (1 << 32) + 300 * P, 1 << 50):
        assert memory.position_of(nowhere) is None


def test_files_without_a_memslot_follow_the_last_one():
    vm = two_ranges()
    vm.create_guest_memfd(10 * P)
    memory = GuestMemory([take(vm)])
    assert memory.loose == {3: 5 << 30}
    assert memory.pages == PAGES + 10
    alone = gmemcore.create_vm("SNP", backing="none")
    alone.create_guest_memfd(3 * P)
    alone.create_guest_memfd(2 * P)
    memory = GuestMemory([take(alone)])
    assert memory.loose == {0: 0, 1: 1 << 30}
    assert by_address(alone, "1g")["pages"].tolist() == [3, 2]
    assert GuestMemory([take(gmemcore.create_vm("SNP"))]).pages == 0


@pytest.mark.parametrize("block", [0, -4096, 1, 6000, "1k"])
def test_blocks_that_are_none(block):
    with pytest.raises(InvalidArgumentError, match="must be a"):
        by_address(two_ranges(), block)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("vm_type", "abi"), [("TDX", "v5"), ("SNP", "legacy")])
def test_runs_of_planes_page_by_page(vm_type, abi, seed):
    vm = random_guest(vm_type, abi, seed)
    snapshot, memory = take(vm), GuestMemory([take(vm)])
    for file in snapshot.files:
        planes = snapshot.planes(file.index)
        bits = sum(planes[name].bits().astype(np.uint8) << i for i, name in enumerate(PLANE_NAMES))
        runs = plane_runs(planes)
        assert np.repeat(runs.masks, np.diff(runs.starts, append=planes.n_pages)).tolist() == bits.tolist()
        assert (runs.masks[1:] != runs.masks[:-1]).all()
    runs = guest_runs(memory, snapshot)
    pages = np.repeat(runs.masks, np.diff(runs.starts, append=memory.pages))
    assert pages.tolist() == page_planes(vm).tolist()


def test_memory_that_is_not_there_yet():
    vm = two_ranges()
    early = take(vm)
    gmem = vm.create_guest_memfd(7 * P, 3)
    vm.add_memslot(9, 1 << 33, gmem.size, gmem)
    late = take(vm, at=1)
    memory = GuestMemory([early, late])
    runs = guest_runs(memory, early)
    assert runs.masks[-1] == ABSENT
    assert (runs.starts[-1], memory.pages) == (PAGES, PAGES + 7)
    assert page_masks([early, late], 1 << 33).tolist() == [ABSENT, 0]


# ---- since when, and why -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("vm_type", VM_TYPES)
def test_since_when_a_page_is_in_its_state(vm_type, seed):
    """Against the state of every page after every single operation."""
    operations = random_operations(seed, 120)
    series, masks = recorded(two_ranges(vm_type), operations, 40)
    assert np.unique(series.events["operation"]).tolist() == list(range(120))
    rng = np.random.default_rng(seed)
    for number in (1, 2, 3):
        done = 40 * number
        for position in rng.choice(PAGES, 60, replace=False).tolist():
            since = series.since(gpa_of(position), number)
            changed = np.flatnonzero(masks[1 : done + 1, position] != masks[:done, position])
            expected = int(changed[-1]) if len(changed) else None
            assert (since.operation, since.exact) == (expected, True), (position, number)
            if expected is not None:
                assert since.step.split()[0] == Step(int(operations["step"][expected])).name
                assert (since.gpa, since.size) == (operations["gpa"][expected], operations["size"][expected])


def test_chunks_do_not_matter():
    operations = random_operations(7, 200)
    one = watch(two_ranges(), operations, every=100)
    other, _ = recorded(two_ranges(), operations, 100)
    assert one.events.tolist() == other.events.tolist()
    assert one.complete


def test_since_is_told_apart_from_last_touched():
    """In `legacy` what a page shows depends on two sides, which aren't followed: the last touch is named."""
    operations = random_operations(3, 90)
    series, _ = recorded(two_ranges("SNP", "legacy"), operations, 30)
    for position in range(0, PAGES, 50):
        since = series.since(gpa_of(position))
        if since.operation is not None:
            touched = operations[since.operation]
            assert touched["gpa"] <= gpa_of(position) < touched["gpa"] + touched["size"] + P
    assert str(series.since(0)).startswith(("operation", "last touched by operation", "since the first"))


def test_a_series_without_operations_knows_nothing():
    vm = two_ranges()
    series = Series([take(vm, at=0), take(vm, at=1)])
    assert series.since(0).operation is None
    assert not series.since(0).exact
    assert str(series.since("0x1000")) == "no operation is known"
    with pytest.raises(ValueError, match="no memory at gpa 0x1000000000"):
        series.since("64g")
    with pytest.raises(ValueError, match="no snapshot 2; the series has 2"):
        series.since(0, 2)


def test_history_of_a_range():
    operations = empty_operations(4)
    operations["step"] = [Step.CONVERT, Step.HOST_WRITE, Step.CONVERT, Step.PIN]
    operations["gpa"] = [0, P, P, 100 * P]
    operations["size"] = [4 * P, P, P, P]
    operations["attributes"] = [0, 0, 8, 0]
    operations["flags"] = [1, 0, 2, 0]
    series = watch(two_ranges("SW_PROTECTED"), operations, every=2)
    assert series.history(P, "4k").rows.tolist() == [
        (0, "CONVERT to shared", "VMM", 0, 4 * P, "ZERO", "OK"),
        (1, "HOST_WRITE", "host", P, P, "", "OK"),
        (2, "CONVERT to private", "VMM", P, P, "PRESERVE", "OK"),
    ]
    assert len(series.history(200 * P)) == 0
    assert series.history(100 * P)["outcome"].tolist() == ["EFAULT"]
    assert str(series.since(P)) == "operation 2: CONVERT to private 0x1000+0x1000 by the VMM"


@pytest.mark.parametrize("seed", range(5))
def test_what_is_kept_of_too_many_operations(seed):
    """Of each stretch between snapshots, the last operation on each page; then on each block."""
    rng = np.random.default_rng(seed)
    events = np.zeros(400, EVENT)
    events["operation"] = np.arange(400)
    events["start"] = rng.integers(0, 3000, 400) * P
    events["end"] = events["start"] + rng.choice([0, 1, 2, 300, 2000], 400).astype(np.uint64) * np.uint64(P)
    at = np.array([0, 150, 399], np.uint64)
    assert len(thinned(events, at, 400)) == 400
    expected = set()
    for low, high in ((0, 150), (150, 399), (399, 400)):
        last = {}
        for event in events[low:high]:
            for page in range(int(event["start"]) // P, int(event["end"]) // P):
                last[page] = int(event["operation"])
        expected |= set(last.values())
    kept = thinned(events, at, len(expected))
    assert set(kept["operation"].tolist()) == expected
    few = thinned(events, at, 20)
    assert len(few) <= 20
    assert few["operation"].tolist() == sorted(few["operation"].tolist())


def test_a_long_run_keeps_what_it_can(monkeypatch):
    monkeypatch.setattr("gmemcore.analysis.series.MOST_EVENTS", 64)
    monkeypatch.setattr("gmemcore.analysis.history.thinned.__defaults__", (64,), raising=False)
    layout = Layout.single("8m", private=True)
    operations = np.concatenate([*BEHAVIOURS["conversion-walk"].operations(layout, 1)])
    series = watch(two_ranges(layout=layout), operations, every=len(operations) // 4)
    assert len(series.events) <= 2 * 64 + len(operations) // 4
    assert not series.complete


# ---- to other libraries ------------------------------------------------------------------------------------


def test_a_series_in_pandas_and_xarray(tmp_path):
    series, _ = recorded(two_ranges(), random_operations(5, 60), 20)
    frame = series.to_pandas()
    assert (frame.index.name, frame.index.tolist()) == ("operation", [0, 20, 40, 60])
    assert frame.index.dtype == np.int64
    data = series.to_xarray("64k")
    assert data["pages"].dims == ("operation", "address", "state")
    assert data["pages"].attrs["units"] == data["block_pages"].attrs["units"] == "pages"
    assert data["address"].attrs["units"] == data["memory"].attrs["units"] == "bytes"
    assert data.attrs["vm_type"] == "SNP"
    assert (data["pages"].sum("state") == data["block_pages"]).all()
    for number, snapshot in enumerate(series):
        mix = state_mix(snapshot)
        for state, pages in zip(mix["state"], mix["pages"], strict=True):
            assert frame[state].iloc[number] == pages
            assert int(data["pages"].isel(operation=number).sel(state=state).sum()) == pages
        assert frame["memory"].iloc[number] == snapshot.memory_pages
        assert int(data["memory"][number]) == snapshot.memory_pages * P
        counters = data["counters"].isel(operation=number).to_series().to_dict()
        assert counters == snapshot.counters.asdict()
    assert data["phase"].values.tolist() == [one.phase for one in series]
    series.to_parquet(tmp_path / "s.parquet")
    again = pandas.read_parquet(tmp_path / "s.parquet")
    pandas.testing.assert_frame_equal(again, frame)
    assert again.attrs["units"]["memory"] == "pages"
    seconds = Series([take(two_ranges(), at=0.5)], "s")
    assert seconds.to_pandas().index.name == "second"
    assert seconds.to_xarray()["second"].attrs["units"] == "s"
    with pytest.raises(ValueError, match="no snapshots"):
        Series().to_xarray()


def test_a_snapshot_in_pandas_and_xarray(tmp_path):
    snapshot = take(random_guest("SNP", "v5", 4))
    frame = snapshot.to_pandas("2m")
    assert frame.index.name == "address"
    assert frame.sum().tolist() == state_mix(snapshot)["pages"].tolist()
    assert frame.attrs["block"] == 2 << 20
    data = snapshot.to_xarray()
    assert set(data["pages"].dims) == {"address", "state"}
    assert isinstance(data, xarray.Dataset)
    assert data["pages"].sum("address").values.tolist() == state_mix(snapshot)["pages"].tolist()
    snapshot.to_parquet(tmp_path / "one.parquet")
    pandas.testing.assert_frame_equal(pandas.read_parquet(tmp_path / "one.parquet"), snapshot.to_pandas())


def test_tables_in_parquet(tmp_path):
    import pyarrow.parquet

    table = by_address(random_guest("SNP", "v5", 4))
    table.to_parquet(tmp_path / "t.parquet")
    schema = pyarrow.parquet.read_schema(tmp_path / "t.parquet")
    assert schema.metadata[b"title"].decode() == table.title
    assert schema.field("bytes").metadata == {b"units": b"bytes"}
    frame = pandas.read_parquet(tmp_path / "t.parquet")
    assert list(frame.columns) == list(table.columns)
    for name in table.columns:
        assert frame[name].tolist() == table[name].tolist()


def test_parquet_replaces_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    path.write_bytes(b"before")
    table = state_mix(random_guest("SNP", "v5", 4))
    monkeypatch.setattr("pyarrow.parquet.write_table", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        table.to_parquet(path)
    assert path.read_bytes() == b"before"


# ---- print shows data --------------------------------------------------------------------------------------


def test_printing_shows_data():
    series, _ = recorded(two_ranges(), random_operations(5, 60), 20)
    most = f"{int(state_mix(series[-1])['pages'].max()):,}"
    for shown in (str(series), str(series[-1]), str(state_mix(series[-1]))):
        assert most in shown
    lines = str(series).splitlines()
    assert lines[0] == "Series of 4 snapshots, 0 to 60 operations"
    assert lines[2].split()[:2] == ["operation", "phase"]
    assert [line.split()[0] for line in lines[3:]] == ["0", "20", "40", "60"]
    assert "0x100000000" in str(by_address(series[-1], "1g"))
    long = str(by_address(two_ranges(layout=Layout.single("1g")), "2m"))
    assert long.splitlines()[-1] == "and 488 more rows"
    assert max(map(len, str(series).splitlines())) < 120
