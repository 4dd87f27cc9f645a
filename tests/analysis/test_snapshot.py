"""Snapshots: what they hold, what changed between two, what comes back from a file, what doesn't come in."""

import copy

import numpy as np
import pytest

import gmemcore
from gmemcore.analysis import Series, Snapshot, diff, mapping_sizes, state_mix, take, watch
from gmemcore.analysis.snapshot_file import KIND
from gmemcore.engine.counters import COUNTER_NAMES, Counters
from gmemcore.engine.packed import PLANE_NAMES
from gmemcore.engine.steps import Step
from gmemcore.workload import container
from gmemcore.workload.container import ContainerError
from gmemcore.workload.layout import Layout, Region
from gmemcore.workload.operations import empty_operations
from gmemcore.workload.player import build
from support.guests import KINDS, naive_planes, random_guest
from support.kinds import P
from support.paths import TESTS


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("vm_type", "abi"), KINDS)
def test_planes_and_the_way_through_a_file(vm_type, abi, seed, tmp_path):
    vm = random_guest(vm_type, abi, seed)
    taken = take(vm, at=12, label="here")
    taken.write(tmp_path / "one.gms")
    read = Snapshot.read(tmp_path / "one.gms")
    for snapshot in (taken, read):
        assert (snapshot.vm_type, snapshot.abi, snapshot.phase) == (vm_type, abi, vm.phase.value)
        assert (snapshot.at, snapshot.label, snapshot.legacy) == (12, "here", abi == "legacy")
        assert snapshot.counters == vm.counters
        assert snapshot.n_pages == 2200
        slots = [(s.slot, s.gpa, s.size, s.gmem.index, s.gmem_offset) for s in vm.memslots]
        assert [(s.slot, s.gpa, s.size, s.file, s.offset) for s in snapshot.slots] == slots
        memory = sum(int(gmem.plane("allocated").sum()) for gmem in vm.files)
        if abi == "legacy":
            memory += sum(int(gmem._shared.plane("allocated").sum()) for gmem in vm.files)
        assert snapshot.memory_pages == memory
        assert sum(snapshot.planes(gmem.index).memory_pages for gmem in vm.files) == memory
        for gmem in vm.files:
            assert snapshot.file(gmem.index).counters == gmem.counters
            for name, pages in naive_planes(vm, gmem).items():
                assert np.array_equal(snapshot.planes(gmem.index)[name].bits(), pages), name
    assert not diff(taken, read)
    assert taken.nbytes == read.nbytes


def test_a_terabyte_is_small():
    vm = gmemcore.create_vm("SNP", backing="none")
    gmem = vm.create_guest_memfd(1 << 40)
    gmem.set_memory_attributes(P, P, 0)
    assert take(vm).nbytes == (1 << 19) * 8 + 64  # one word per block, and the line of the mixed one


def test_nothing_of_what_was_in_memory_is_in_the_file(tmp_path):
    seed = 0x0123456789ABCDEF
    vm = gmemcore.create_vm("SW_PROTECTED", seed=seed)
    gmem = vm.create_guest_memfd(4 * P, 3)
    gmem.host_write(0, b"plaintext of the guest")
    take(vm).write(tmp_path / "one.gms")
    written = (tmp_path / "one.gms").read_bytes()
    assert b"plaintext" not in written
    assert seed.to_bytes(8, "little") not in written
    assert str(seed).encode() not in written


@pytest.mark.parametrize("order", [9, 18])
def test_mapping_sizes_are_those_of_the_folios(order, tmp_path):
    size = P << order
    vm = gmemcore.create_vm("SNP", "huge-partial", backing="none")
    small, huge = vm.create_guest_memfd(P), vm.create_guest_memfd(5 * size, 5, order)
    small.fallocate(1, 0, P)
    huge.fallocate(1, 0, 3 * size)
    huge.convert(size - P, 2 * P, 0)  # splits two
    huge.convert(4 * size, P, 0)  # not in use
    huge.convert(size, P, 8)  # merges one
    taken = take(vm)
    taken.write(tmp_path / "one.gms")
    read = Snapshot.read(tmp_path / "one.gms")
    assert [file.page_order for file in read.files] == [0, order]
    struct_pages = huge.struct_page_bytes
    assert struct_pages == ((1 << order) // 64 - 1) * P
    for source in (vm, taken, read):
        table = mapping_sizes(source)
        in_bytes = dict(zip(table["size"], table["bytes"].tolist(), strict=True))
        name = "2m" if order == 9 else "1g"
        assert {in_bytes["4k"], in_bytes[name]} == {size + P, 2 * size}
        assert in_bytes[name] == huge.mapped_bytes()[size]
        assert in_bytes["4k"] == huge.mapped_bytes()[P] + P
        (row,) = table.where(size=name).records()
        assert (row["entries"], row["split"], row["struct_pages"]) == (2, 1, struct_pages)
        assert table["fraction"].sum() == pytest.approx(1)
    assert Series([taken]).tabulate(mapping_sizes)["bytes"].sum() == 3 * size + P
    huge.host_touch(4 * size, P)  # one page, and the whole huge page is in use
    assert take(vm).memory_pages * P == mapping_sizes(vm)["bytes"].sum() == 4 * size + P


def test_a_file_alone():
    vm = random_guest("SNP", "v5", 3)
    alone = take(vm.files[1])
    assert [file.index for file in alone.files] == [1]
    assert [slot.slot for slot in alone.slots] == [7]
    assert alone.counters == vm.files[1].counters
    with pytest.raises(KeyError, match="no file 0 in the snapshot; there are 1"):
        alone.file(0)
    with pytest.raises(KeyError, match="no plane 'dirty'"):
        alone.planes(1)["dirty"]


def test_frames_that_no_memslot_shows():
    vm = gmemcore.create_vm("SNP", "legacy", backing="none")
    vm.create_guest_memfd(4 * P)
    vm.set_memory_attributes(0, 4 * P, 8)
    snapshot = take(vm)
    assert snapshot.private_frames.tolist() == [[0, 4]]
    assert snapshot.planes(0).private.count() == 0


def test_a_snapshot_stays_as_it_was():
    vm = gmemcore.create_vm("SNP", backing="none")
    gmem = vm.create_guest_memfd(1024 * P)
    before = take(vm)
    gmem.set_memory_attributes(0, 100 * P, 0)
    gmem.close()
    assert before.planes(0).private.count() == 1024
    assert before.counters.pages_changed == 0
    assert take(vm).files == ()
    with pytest.raises(gmemcore.GmemError, match="closed"):
        take(gmem)


# ---- differences -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vm_type", "abi"), [("SNP", "v5"), ("SNP", "legacy")])
def test_differences_page_by_page(vm_type, abi):
    vm = random_guest(vm_type, abi, 4)
    before, old = take(vm), [naive_planes(vm, gmem) for gmem in vm.files]
    rng = np.random.default_rng(5)
    for _ in range(20):
        start, n = int(rng.integers(1400)), int(rng.integers(1, 100))
        if abi == "legacy":
            vm.set_memory_attributes(start * P, n * P, 8 * int(rng.integers(2)))
        else:
            vm.files[0].fallocate(3, start * P, n * P)
            vm.files[0].set_memory_attributes(start * P, n * P, 8 * int(rng.integers(2)))
    after = take(vm)
    changes = diff(before, after)
    assert changes.counters == after.counters - before.counters
    expected = {}
    for gmem, was in zip(vm.files, old, strict=True):
        for name, pages in naive_planes(vm, gmem).items():
            changed = pages != was[name]
            if changed.any():
                runs = np.diff(changed.astype(np.int8), prepend=0)
                figures = int((changed & pages).sum()), int((changed & ~pages).sum()), int((runs == 1).sum())
                expected[gmem.index, name] = figures
                ranges = changes.ranges(name, gmem.index)
                rebuilt = was[name].copy()
                for start, end, now in ranges.rows.tolist():
                    assert (rebuilt[start:end] != now).all()
                    rebuilt[start:end] = now
                assert np.array_equal(rebuilt, pages)
                assert ranges["start"].tolist() == sorted(ranges["start"])
    assert expected
    assert {(file, plane): rest for file, plane, *rest in changes.changes.rows.tolist()} == {
        key: list(figures) for key, figures in expected.items()
    }


def test_files_that_come_and_go():
    vm = gmemcore.create_vm("SNP", backing="none")
    first = vm.create_guest_memfd(P)
    before = take(vm)
    first.close()
    vm.create_guest_memfd(2 * P)
    after = take(vm)
    changes = diff(before, after)
    assert (changes.appeared, changes.gone, len(changes.changes)) == ((1,), (0,), 0)
    assert changes


def test_snapshots_of_different_guests():
    ours, others = (gmemcore.create_vm("SNP", backing="none") for _ in range(2))
    ours.create_guest_memfd(P)
    others.create_guest_memfd(2 * P)
    with pytest.raises(ValueError, match="file 0 has 0x1000 and 0x2000 bytes"):
        diff(take(ours), take(others))


# ---- series ------------------------------------------------------------------------------------------


def test_a_series_through_a_file(tmp_path):
    vm = random_guest("TDX", "v5", 6)
    series = Series(unit="s")
    series.take(vm, 0.5)
    vm.files[0].set_memory_attributes(0, 700 * P, 0)
    series.take(vm, 1.5, "after")
    vm.create_guest_memfd(P)
    series.take(vm, 1.5)
    series.write(tmp_path / "all.gms")
    read = Series.read(tmp_path / "all.gms")
    assert (len(read), read.unit, [s.at for s in read]) == (3, "s", [0.5, 1.5, 1.5])
    assert read[1].label == "after"
    assert [len(s.files) for s in read] == [2, 2, 3]
    assert not any(diff(one, other) for one, other in zip(series, read, strict=True))
    stream = read.tabulate(state_mix)
    assert stream.columns[0] == "second"
    assert stream.units["second"] == "s"
    assert np.array_equal(stream.where(second=0.5)["pages"], state_mix(series[0])["pages"])
    with pytest.raises(ContainerError, match="must hold one snapshot, not 3"):
        Snapshot.read(tmp_path / "all.gms")
    with pytest.raises(ValueError, match=r"at 1 after one at 1\.5"):
        series.take(vm, 1)


def test_thousands_fit_into_a_file(tmp_path):
    vm = random_guest("SNP", "v5", 7)
    snapshots = [take(vm, at=i) for i in range(3)]
    series = Series([snapshots[0]] * 3000 + [snapshots[2]])
    series.write(tmp_path / "many.gms")
    assert len(Series.read(tmp_path / "many.gms")) == 3001


def test_the_last_slot_at_the_end_of_memory(tmp_path):
    vm = gmemcore.create_vm("SNP", backing="none")
    gmem = vm.create_guest_memfd(2 * P)
    vm.add_memslot(32763, (1 << 64) - 2 * P, P, gmem)
    take(vm).write(tmp_path / "one.gms")
    (slot,) = Snapshot.read(tmp_path / "one.gms").slots
    assert (slot.slot, slot.gpa) == (32763, (1 << 64) - 2 * P)


# ---- files that aren't what they say ------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path):
    """Contents of a good file, and a way to write them changed and read them again."""
    vm = random_guest("SNP", "legacy", 8)
    take(vm).write(tmp_path / "good.gms")
    good = container.read(tmp_path / "good.gms", KIND)

    def read(change):
        meta, sections = (
            copy.deepcopy(good.meta),
            {name: array.copy() for name, array in good.sections.items()},
        )
        change(meta, sections)
        container.write(tmp_path / "bad.gms", KIND, meta, sections)
        return Series.read(tmp_path / "bad.gms")

    return read


def put(section, place, value):
    def change(_, sections):
        sections[section][place] = value

    return change


def change_meta(**values):
    return lambda meta, _: meta["snapshots"][0].update(values)


def longer(section):
    def change(_, sections):
        sections[section] = np.concatenate([sections[section], sections[section][-1:]])

    return change


DAMAGES = {
    "no lines": (lambda _, sections: sections.pop("lines"), "sections must be counters"),
    "a section of other numbers": (
        lambda _, sections: sections.update(words=sections["words"].astype(np.uint32)),
        "must be u64 of 1 columns",
    ),
    "a section of another shape": (
        lambda _, sections: sections.update(frames=sections["frames"].reshape(-1)),
        "must be u64 of 2 columns",
    ),
    "an unknown field": (change_meta(colour="blue"), "unknown field `colour`"),
    "a text for a number": (change_meta(files="2"), r"Expected `int`"),
    "more files than there are": (change_meta(files=3), "section files must have 3 more rows"),
    "fewer files than there are": (change_meta(files=1), "rows too many|isn't within a file"),
    "huge pages of half of the files": (change_meta(page_orders=[9]), "must be 2 orders or none"),
    "huge pages of no size": (change_meta(page_orders=[0, 4]), "huge pages of order 4"),
    "a file of a part of a huge page": (change_meta(page_orders=[9, 0]), "huge pages of order 9"),
    "less than no slots": (change_meta(slots=-1), "Expected `int` >= 0"),
    "one side only": (change_meta(legacy=False), "only legacy has one"),
    "words left over": (longer("words"), "section words has 1 row too many"),
    "lines left over": (longer("lines"), "section lines has 1 row too many"),
    "counters left over": (longer("counters"), "section counters has 1 row too many"),
    "a file of 2^60 pages": (put("files", (0, 2), 1 << 60), "section words must have"),
    "a file of no pages": (put("files", (0, 2), 0), "block words for 0 pages"),
    "more lines than there are": (put("files", (0, 3), 1 << 40), "section lines must have"),
    "fewer lines than its words say": (put("files", (0, 3), 0), "has 0 lines"),
    "more lines than its words say": (
        lambda _, sections: sections["files"].__setitem__((0, 3), sections["files"][0, 3] + 1),
        "lines; the block words need",
    ),
    "a file twice": (put("files", (1, 0), 0), "a file number twice"),
    "more pages than a block": (put("words", 0, 513), "more pages in a block than the block has"),
    "bits of no plane": (put("words", 0, 1 << 60), "bits that belong to no plane"),
    "a line that its count contradicts": (
        lambda _, sections: np.bitwise_xor(sections["lines"], np.uint64(1), out=sections["lines"]),
        "contradicts",
    ),
    "a memslot beyond its file": (put("slots", (0, 4), 1 << 40), "isn't within a file"),
    "a memslot of no file": (put("slots", (0, 3), 9), "isn't within a file"),
    "an empty memslot": (put("slots", (0, 2), 0), "isn't whole pages"),
    "an unaligned memslot": (put("slots", (0, 1), 12), "isn't whole pages"),
    "a memslot beyond all memory": (put("slots", (2, 1), (1 << 64) - P), "isn't whole pages"),
    "memslots that overlap": (put("slots", (1, 1), 0), "memslots that overlap"),
    "memslots of the same pages": (put("slots", (1, 4), 0), "memslots that overlap"),
    "frames out of order": (
        lambda _, sections: sections.update(frames=sections["frames"][::-1].copy()),
        "must be in order",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_contents_that_contradict_each_other(parts, damage):
    change, complaint = DAMAGES[damage]
    with pytest.raises(ContainerError, match=complaint):
        parts(change)


def test_the_unchanged_contents_are_taken(parts):
    assert len(parts(lambda meta, sections: None)) == 1


FILES = TESTS / "old_files"


def test_files_of_the_first_release_are_read():
    """They name neither counters nor planes."""
    one = Snapshot.read(FILES / "snapshot-0.1.gms")
    assert (one.vm_type, one.abi, one.phase, one.at, one.label) == ("TDX", "v5", "running", 3, "one")
    assert one.counters == Counters(
        pages_changed=2, pages_allocated=1, sept_changes=1, pages_accepted=1, blocks_2m_split=1
    )
    states = state_mix(one)
    assert dict(zip(states["state"], states["pages"], strict=True))["accepted"] == 1
    series = Series.read(FILES / "series-0.1.gms")
    assert [(each.label, each.counters.pages_changed) for each in series] == [("first", 0), ("second", 2)]


def without(name, place):
    """A file by a gmemcore that had no such counter."""

    def change(meta, sections):
        meta["counters"] = [each for each in meta["counters"] if each != name]
        sections["counters"] = np.delete(sections["counters"], place, 1)

    return change


@pytest.mark.parametrize("name", COUNTER_NAMES)
def test_a_counter_that_a_file_does_not_have_is_0(parts, name):
    good = parts(lambda meta, sections: None)[0].counters.asdict()
    read = parts(without(name, COUNTER_NAMES.index(name)))[0].counters.asdict()
    assert read == good | {name: 0}


def test_a_counter_of_a_later_release_is_passed_over(parts):
    def change(meta, sections):
        meta["counters"] = ["pages_dreamt_of", *meta["counters"]]
        sections["counters"] = np.insert(sections["counters"], 0, 17, 1)

    assert parts(change)[0].counters == parts(lambda meta, sections: None)[0].counters


def with_planes(snapshot, names, source, target):
    """Write a file of one snapshot as one that has these planes, in this order."""
    read = container.read(source, KIND)
    words = read.sections["words"]
    read.meta["planes"] = list(names)
    fields = [
        words >> np.uint64(10 * PLANE_NAMES.index(name)) & np.uint64(1023)
        if name in PLANE_NAMES
        else np.zeros_like(words)
        for name in names
    ]
    read.sections["words"] = sum(field << np.uint64(10 * n) for n, field in enumerate(fields))
    lines = []
    for file in snapshot.files:
        for state in (file.state, file.host):
            if state is not None:
                own = {name: rows for name, (_, _, rows) in state.planes().items()}
                lines += [own[name] for name in names if name in own]
    read.sections["lines"] = np.concatenate(lines)
    container.write(target, KIND, read.meta, read.sections)


def same_states(one, other):
    assert len(one.files) == len(other.files)
    for ours, theirs in zip(one.files, other.files, strict=True):
        assert np.array_equal(ours.state.words, theirs.state.words)
        assert np.array_equal(ours.state.lines, theirs.state.lines)


@pytest.mark.parametrize("abi", ["v5", "legacy"])
def test_planes_in_another_order_are_the_same(tmp_path, abi):
    snapshot = take(random_guest("SNP", abi, 8))
    snapshot.write(tmp_path / "good.gms")
    with_planes(snapshot, PLANE_NAMES[::-1], tmp_path / "good.gms", tmp_path / "other.gms")
    same_states(snapshot, Snapshot.read(tmp_path / "other.gms"))


def test_planes_that_a_file_does_not_have_and_those_that_nobody_is_in_are_empty(tmp_path):
    vm = gmemcore.create_vm("DEFAULT", backing="none")
    vm.create_guest_memfd(3 << 20, 3).pin(4096, 8192)
    snapshot = take(vm)
    snapshot.write(tmp_path / "good.gms")
    names = ("dreamt", "pinned", "allocated")
    with_planes(snapshot, names, tmp_path / "good.gms", tmp_path / "other.gms")
    same_states(snapshot, Snapshot.read(tmp_path / "other.gms"))


def test_a_plane_of_a_later_release_is_refused_where_it_says_something(parts):
    def change(meta, sections):
        meta["planes"] = ["dreamt", *meta["planes"][1:]]

    with pytest.raises(ContainerError, match="plane 'dreamt' is of a newer gmemcore"):
        parts(change)


def test_a_line_can_not_speak_of_pages_beyond_the_end(tmp_path):
    vm = gmemcore.create_vm("SNP", backing="none")
    gmem = vm.create_guest_memfd(100 * P)
    gmem.set_memory_attributes(0, P, 0)
    take(vm).write(tmp_path / "one.gms")
    read = container.read(tmp_path / "one.gms", KIND)
    read.sections["lines"][0, 0] -= np.uint64(2)  # a page less, and one beyond the end in its place
    read.sections["lines"][0, 7] = 1
    container.write(tmp_path / "bad.gms", KIND, read.meta, read.sections)
    with pytest.raises(ContainerError, match="contradicts"):
        Snapshot.read(tmp_path / "bad.gms")


def test_time_does_not_run_backwards(tmp_path):
    snapshot = take(gmemcore.create_vm("SNP"))
    Series([snapshot, snapshot]).write(tmp_path / "good.gms")
    read = container.read(tmp_path / "good.gms", KIND)
    read.meta["snapshots"][0]["at"] = 1
    container.write(tmp_path / "bad.gms", KIND, read.meta, read.sections)
    with pytest.raises(ContainerError, match="at 0 after one at 1"):
        Series.read(tmp_path / "bad.gms")


def test_another_kind_of_container(tmp_path):
    container.write(tmp_path / "trace.gmt", "trace", {}, {})
    with pytest.raises(ContainerError, match="must be a snapshot or a series"):
        Snapshot.read(tmp_path / "trace.gmt")


# ---- watching a run ------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_array", [True, False])
def test_a_run_is_watched(as_array):
    vm = gmemcore.create_vm("SNP", backing="none")
    build(vm, Layout((Region(0, 1 << 20),)))
    operations = empty_operations(25)
    operations["step"] = Step.CONVERT
    operations["gpa"] = np.arange(25) * P
    operations["size"] = P
    operations["attributes"] = 8
    series = watch(vm, operations if as_array else iter([operations[:7], operations[7:]]), every=10)
    assert [snapshot.at for snapshot in series] == [0, 10, 20, 25]
    assert [snapshot.planes(0).private.count() for snapshot in series] == [0, 10, 20, 25]
    with pytest.raises(gmemcore.GmemError, match="a chunk must be 1 or more operations, not 0"):
        watch(vm, operations, every=0)
