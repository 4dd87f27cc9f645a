"""Distributions against counting page by page, in dictionaries and lists, on guests in random states."""

import sys
from collections import Counter
from itertools import groupby

import numpy as np
import pytest

import gmemcore
from gmemcore import analysis
from gmemcore.analysis import Series
from gmemcore.analysis.tables import make_table, stacked
from gmemcore.workload.layout import Region
from support.guests import KINDS, naive_planes, random_guest
from support.kinds import P


def naive_state(planes, page):
    """The state of one page, by asking one plane after the other."""
    has = {name: bool(plane[page]) for name, plane in planes.items()}
    for name in ("poisoned", "pinned", "accepted"):
        if has[name]:
            return name
    if has["assigned"]:
        return "assigned-unaccepted"
    side = "private" if has["private"] else "shared"
    if not has["allocated"]:
        return f"{side}-unallocated"
    return "private-unassigned" if has["private"] else "shared"


class Naive:
    """The slow twin: every page of every file as a word."""

    def __init__(self, vm):
        self.slots = [(s.slot, s.gpa, s.size, s.gmem.index, s.gmem_offset) for s in vm.memslots]
        planes = {gmem.index: naive_planes(vm, gmem) for gmem in vm.files}
        self.states = {
            index: [naive_state(own, page) for page in range(len(own["private"]))]
            for index, own in planes.items()
        }
        self.private = {index: own["private"].tolist() for index, own in planes.items()}
        self.pinned = {index: own["pinned"].tolist() for index, own in planes.items()}

    def at(self, gpa):
        """(file, page) behind a guest page, or None."""
        for _, start, size, file, offset in self.slots:
            if start <= gpa < start + size:
                return file, (gpa - start + offset) // P
        return None


@pytest.fixture(
    params=[(*kind, seed) for kind in KINDS for seed in (1, 2)], ids=lambda p: "-".join(map(str, p))
)
def guest(request):
    vm = random_guest(*request.param)
    return vm, Naive(vm)


def test_state_mix(guest):
    vm, naive = guest
    counted = Counter(state for states in naive.states.values() for state in states)
    table = analysis.state_mix(vm)
    assert dict(zip(table["state"].tolist(), table["pages"].tolist(), strict=True)) == {
        state.name: counted[state.name] for state in analysis.STATES
    }
    assert table["pages"].sum() == 2200
    assert np.array_equal(table["bytes"], table["pages"] * P)
    assert table["fraction"].sum() == pytest.approx(1)


def test_by_slot(guest):
    vm, naive = guest
    expected = {}
    for slot, gpa, size, file, offset in naive.slots:
        counted = Counter(naive.states[file][offset // P : (offset + size) // P])
        expected |= {
            (slot, gpa, size, state.name): (counted[state.name], counted[state.name] * P / size)
            for state in analysis.STATES
        }
    rows = analysis.by_slot(vm).rows.tolist()
    assert {row[:4]: (row[4], row[6]) for row in rows} == expected


def test_by_region(guest):
    vm, naive = guest
    regions = [(0, 1500 * P), (1 << 32, 700 * P)]
    odd = [(700 * P, 100 * P), (1400 * P, 1 << 33), (1 << 40, P)]
    for given, asked in ((None, regions), (odd, odd)):
        given = given and [Region(gpa, size) for gpa, size in given]
        rows = analysis.by_region(vm, given).rows.tolist()
        for number, (gpa, size) in enumerate(asked):
            counted = Counter()
            for page in range(gpa, min(gpa + size, (1 << 32) + 700 * P), P):
                if page == 1500 * P:
                    break  # a long hole
                place = naive.at(page)
                if place is not None:
                    counted[naive.states[place[0]][place[1]]] += 1
            if (gpa, size) == odd[1]:
                counted += Counter(naive.states[1])
            own = [row for row in rows if row[0] == number]
            assert {row[3]: row[4] for row in own} == {s.name: counted[s.name] for s in analysis.STATES}
            assert own[0][1:3] == (gpa, size)


def test_runs(guest):
    vm, naive = guest
    counted = Counter()
    for private in naive.private.values():
        counted.update((value, len(list(run))) for value, run in groupby(private))
    table = analysis.run_lengths(vm)
    words = {"private": True, "shared": False}
    assert {(words[row[0]], row[1]): row[2] for row in table.rows.tolist()} == counted
    histogram = analysis.run_histogram(vm)
    for attribute, value in words.items():
        lengths = sorted(n for (of, n), runs in counted.items() for _ in range(runs) if of == value)
        own = table.where(attribute=attribute)
        for length, cdf_runs, cdf_pages in zip(own["length"], own["cdf_runs"], own["cdf_pages"], strict=True):
            upto = [n for n in lengths if n <= length]
            assert cdf_runs == pytest.approx(len(upto) / len(lengths))
            assert cdf_pages == pytest.approx(sum(upto) / sum(lengths))
        for _, low, high, runs, pages in histogram.where(attribute=attribute).rows.tolist():
            within = [n for n in lengths if low <= n < high]
            assert (runs, pages) == (len(within), sum(within))
        assert histogram.where(attribute=attribute)["runs"].sum() == len(lengths)
        quantiles = [0.0, 0.1, 0.5, 0.9, 1.0]
        got = analysis.run_quantiles(vm, quantiles).where(attribute=attribute)
        by_page = sorted(n for n in lengths for _ in range(n))
        for q, of_runs, of_pages in zip(quantiles, got["of_runs"], got["of_pages"], strict=bool(lengths)):
            for ordered, figure in ((lengths, of_runs), (by_page, of_pages)):
                assert sum(n <= figure for n in ordered) >= q * len(ordered) - 1e-9
                assert figure == ordered[0] or sum(n < figure for n in ordered) < q * len(ordered)


def naive_blocks(naive, pages):
    """Aligned blocks of guest memory, by walking guest addresses page by page: whole, private, shared."""
    figures = Counter()
    for _, gpa, size, file, offset in naive.slots:
        for start in range(-(-gpa // (pages * P)) * pages * P, gpa + size, pages * P):
            within = start + pages * P <= gpa + size and (gpa - offset) % (pages * P) == 0
            if within:
                first = (start - gpa + offset) // P
                values = set(naive.private[file][first : first + pages])
                figures["whole"] += 1
                figures[{(True,): "private", (False,): "shared"}.get(tuple(values), "mixed")] += 1
    return figures


def test_mappability_and_fragmentation(guest):
    vm, naive = guest
    total = sum(size // P for _, _, size, _, _ in naive.slots)
    private = sum(
        sum(naive.private[file][offset // P : (offset + size) // P])
        for _, _, size, file, offset in naive.slots
    )
    table, index = analysis.mappability(vm), analysis.fragmentation(vm)
    for row in table.records():
        pages = {"2m": 512, "1g": 1 << 18}[row["size"]]
        figures = naive_blocks(naive, pages)
        names = ("private", "shared", "mixed")
        assert [row[name] for name in ("blocks", *names)] == [figures[name] for name in ("whole", *names)]
        assert row["outside"] == total - figures["whole"] * pages
        mappable = (figures["private"] + figures["shared"]) * pages
        assert row["fraction"] == pytest.approx(mappable / total)
        for attribute, of in (("private", private), ("shared", total - private)):
            (own,) = index.where(attribute=attribute, size=row["size"]).records()
            whole = figures[attribute] * pages
            assert (own["pages"], own["whole"]) == (of, whole)
            assert own["index"] == pytest.approx((of - whole) / of if of else 0)
        (both,) = index.where(attribute="both", size=row["size"]).records()
        assert both["index"] == pytest.approx(1 - mappable / total)


def test_iommu(guest):
    vm, naive = guest
    mapped = {
        file: [not private or pinned for private, pinned in zip(naive.private[file], pins, strict=True)]
        for file, pins in naive.pinned.items()
    }
    (row,) = analysis.iommu(vm).records()
    assert row["guest"] == 2200
    assert row["shared"] == sum(not page for pages in naive.private.values() for page in pages)
    assert row["pinned"] == sum(map(sum, naive.pinned.values()))
    assert row["mapped"] == sum(map(sum, mapped.values()))
    assert row["mappings"] == sum(value for pages in mapped.values() for value, _ in groupby(pages))
    assert row["fraction"] == pytest.approx(row["mapped"] / 2200)


# ---- by hand -----------------------------------------------------------------------------------------


def test_a_gigabyte_is_mapped_whole_where_addresses_agree():
    vm = gmemcore.create_vm("SNP", backing="none")
    gmem = vm.create_guest_memfd(5 << 30)
    vm.add_memslot(0, 1 << 30, 2 << 30, gmem, 0)
    vm.add_memslot(1, 4 << 30, 2 << 30, gmem, (2 << 30) + (2 << 20))  # agrees modulo 2 MiB alone
    gmem.set_memory_attributes(0, P, 0)
    two, one = analysis.mappability(vm).records()
    assert (two["blocks"], two["private"], two["shared"], two["mixed"]) == (2048, 2047, 0, 1)
    assert (one["blocks"], one["private"], one["mixed"], one["outside"]) == (2, 1, 1, 1 << 19)
    index = analysis.fragmentation(vm)
    assert index.where(attribute="shared")["index"].tolist() == [1, 1]
    pages = (1 << 20) - 1
    assert index.where(attribute="private")["index"].tolist() == pytest.approx(
        [(pages - 2047 * 512) / pages, (pages - (1 << 18)) / pages]
    )
    gmem.set_memory_attributes(0, P, 8)
    assert analysis.fragmentation(vm).where(attribute="shared")["index"].tolist() == [0, 0]


def test_files_without_memslots_are_looked_at_as_they_are():
    gmem = gmemcore.create_vm("SNP", backing="none").create_guest_memfd((4 << 20) + P)
    assert analysis.mappability(gmem).records()[0]["blocks"] == 2
    assert len(analysis.by_slot(gmem)) == 0
    assert len(analysis.by_region(gmem)) == 0


def test_a_guest_without_memory():
    vm = gmemcore.create_vm("SNP", backing="none")
    assert analysis.state_mix(vm)["pages"].sum() == 0
    assert len(analysis.run_lengths(vm)) == 0
    assert len(analysis.run_histogram(vm)) == 0
    assert len(analysis.run_quantiles(vm)) == 0
    assert analysis.mappability(vm)["fraction"].tolist() == [0, 0]
    assert analysis.fragmentation(vm)["index"].tolist() == [0] * 6
    assert analysis.iommu(vm)["fraction"].tolist() == [0]


def test_splits_and_merges():
    vm = gmemcore.create_vm("SNP", backing="none")
    gmem = vm.create_guest_memfd(8 << 20)
    series = Series()
    series.take(vm, 0)
    gmem.set_memory_attributes(0, P, 0)
    gmem.set_memory_attributes(4 << 20, P, 0)
    series.take(vm, 2)
    gmem.set_memory_attributes(0, P, 8)
    series.take(vm, 3)
    assert analysis.splits_and_merges(series).rows.tolist() == [(0, 0, 0, 0), (2, 2, 0, 2), (3, 0, 1, 1)]


def test_quantiles_are_fractions():
    gmem = gmemcore.create_vm("SNP", backing="none").create_guest_memfd(P)
    with pytest.raises(ValueError, match="must be from 0 to 1"):
        analysis.run_quantiles(gmem, [0.5, 95])


# ---- tables ------------------------------------------------------------------------------------------


def test_a_table_in_all_its_forms():
    vm = random_guest("SNP", "v5", 3)
    table = analysis.by_slot(vm)
    assert np.asarray(table).dtype.names == table.columns
    assert len(table) == len(list(table)) == 3 * len(analysis.STATES)
    assert repr(table).splitlines()[0] == "page states by memslot: 24 rows"
    with pytest.raises(KeyError, match="no column 'colour'; there are slot"):
        table["colour"]
    frame = table.to_pandas()
    assert list(frame.columns) == list(table.columns)
    assert frame["pages"].tolist() == table["pages"].tolist()
    assert frame.attrs["units"]["pages"] == "pages"
    data = table.to_xarray()
    assert dict(data.sizes) == {"slot": 3, "state": len(analysis.STATES)}
    assert data["pages"].attrs["units"] == "pages"
    assert int(data["pages"].sel(slot=7).sum()) == 700
    assert table.records()[0]["state"] == "poisoned"


@pytest.mark.parametrize(("module", "method"), [("pandas", "to_pandas"), ("xarray", "to_xarray")])
def test_what_is_missing_is_named(monkeypatch, module, method):
    monkeypatch.setitem(sys.modules, module, None)
    table = make_table("t", [("a", "<i8")], [(1,)], ("a",))
    with pytest.raises(ImportError, match=rf"needs {module}.*pip install 'gmemcore\[analysis\]'"):
        getattr(table, method)()


def test_nothing_to_stack():
    with pytest.raises(ValueError, match="no table"):
        stacked([], "at", "<f8")
