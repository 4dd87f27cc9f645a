"""Pictures show what page state says: the artists, their data, labels and legends, not their pixels."""

import re
from itertools import combinations, pairwise

import matplotlib
import numpy as np
import pytest
from msgspec.structs import replace

import gmemcore
from support.guests import random_guest
from support.runs import cell

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from gmemcore.analysis import (
    STATES,
    Series,
    cost_by_page_size,
    heat_map,
    mappability,
    page_map,
    run_lengths,
    state_mix,
    struct_pages_over_time,
    take,
)
from gmemcore.analysis.hilbert import hilbert
from gmemcore.analysis.pictures import (
    PICTURES,
    audit_bars,
    conversion_sizes,
    fleet_outcomes,
    mappability_over_time,
    memory_over_time,
    refusal_map,
    run_length_cdf,
    state_stream,
)
from gmemcore.analysis.pictures.maps import cell_size
from gmemcore.analysis.runs import BenchFirst, Replay, Run, Seconds, StressLast, StressSums
from gmemcore.analysis.speed import bench_axes, bench_cube, bench_effects, cost_by_range, kernel_operations
from gmemcore.analysis.states import state_of_masks, states_of
from gmemcore.analysis.style import STATE_COLOURS
from gmemcore.engine.packed import PLANE_NAMES
from gmemcore.engine.steps import Step
from gmemcore.results.bench import EffectFigure, Primitive, Spread, Verdict
from gmemcore.results.replay import Reason
from gmemcore.units import size_words
from gmemcore.vmm.audit import audit
from gmemcore.workload.layout import Layout
from gmemcore.workload.player import build
from support.kinds import P


def words(legend):
    return [text.get_text() for text in legend.get_texts()]


# ---- the page map ------------------------------------------------------------------------------------


def test_every_state_has_a_colour_of_its_own():
    assert {state.name for state in STATES} == set(STATE_COLOURS)
    assert len(set(STATE_COLOURS.values())) == len(STATES)


def test_every_combination_of_planes_is_a_state():
    """By the table of states, against the words of each."""
    names = [STATES[code].name for code in state_of_masks()]
    for mask, name in enumerate(names):
        planes = {plane for i, plane in enumerate(PLANE_NAMES) if mask >> i & 1}
        order = ["poisoned", "pinned", "accepted", "assigned"]
        expected = next((plane for plane in order if plane in planes), None)
        if expected is None:
            side = "private" if "private" in planes else "shared"
            expected = side + ("" if "allocated" in planes else "-unallocated")
        expected = {"assigned": "assigned-unaccepted", "private": "private-unassigned"}.get(
            expected, expected
        )
        assert name == expected


def drawn_states(ax):
    """The states of the cells of a picture, by their colours; None where nothing is drawn."""
    names = {(*bytes.fromhex(colour[1:]), 255): name for name, colour in STATE_COLOURS.items()}
    grid = ax.get_images()[0].get_array()
    return [[names.get(tuple(cell)) if cell[3] else None for cell in row] for row in np.asarray(grid)]


def guest_of_six_states():
    vm = gmemcore.create_vm("SNP", "v5")
    gmem = vm.create_guest_memfd(8 * P, 3)
    vm.add_memslot(0, 0, gmem.size, gmem)
    gmem.set_memory_attributes(0, 3 * P, 8)
    vm.accept(0, P)
    with pytest.raises(gmemcore.GmemError):
        vm.guest_read(P, 1)
    gmem.host_read(3 * P, 1)
    gmem.pin(4 * P, P)
    gmem.host_read(5 * P, 1)
    gmem.poison(5 * P)
    return vm


def test_a_page_is_named_by_its_most_telling_plane():
    ax = page_map(guest_of_six_states(), columns=4)
    assert drawn_states(ax) == [
        ["accepted", "assigned-unaccepted", "private-unallocated", "shared"],
        ["pinned", "poisoned", "shared-unallocated", "shared-unallocated"],
    ]
    legend = ax.get_legend()
    assert "accepted (12.5 %)" in words(legend)
    assert "shared-unallocated (25.0 %)" in words(legend)
    assert len(words(legend)) == 7  # no state that no page has
    assert ax.get_title(loc="left") == "Page states of 32 KiB: SNP, v5, launching"


def positions(snapshot):
    """States of all pages of a guest, by address."""
    found = []
    for slot in snapshot.slots:
        states = states_of(snapshot.planes(slot.file))
        low = slot.offset // P
        bits = {name: pages.bits(low, low + slot.size // P) for name, pages in states.items()}
        found += [next(n for n in bits if bits[n][i]) for i in range(slot.size // P)]
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("vm_type", "abi"), [("TDX", "v5"), ("SNP", "legacy")])
def test_every_page_of_a_guest_is_drawn_at_its_address(vm_type, abi, seed):
    snapshot = take(random_guest(vm_type, abi, seed), label="a guest")
    ax = page_map(snapshot, columns=64)
    rows = drawn_states(ax)
    assert len(rows[0]) == 64
    assert [cell for row in rows for cell in row if cell] == positions(snapshot)
    low, high = 1500 % 64, 700 % 64
    assert [cell is None for cell in rows[1500 // 64]] == [False] * low + [True] * (64 - low)
    assert [cell is None for cell in rows[-1]] == [False] * high + [True] * (64 - high)
    labels = {tick.get_text(): at for tick, at in zip(ax.get_yticklabels(), ax.get_yticks(), strict=True)}
    assert labels["0x0"] == -0.5
    assert labels["0x100000000"] == 1500 // 64 + 1 - 0.5
    for label, at in labels.items():
        gpa = int(label, 16)
        row = gpa // (64 * P) if gpa < 1 << 32 else 1500 // 64 + 1 + (gpa - (1 << 32)) // (64 * P)
        assert row - 0.5 == at
    assert "a guest" in ax.get_title(loc="left")
    assert ax.get_ylabel() == "guest physical address of the row"


@pytest.mark.parametrize("pages", [1, 2, 3, 4, 5, 8, 16, 17, 31, 32, 64, 100, 128, 200, 512, 1000, 2048])
def test_the_hilbert_caption_is_true_for_every_size(pages):
    """The circle is at the first page, the square at the last one, and the caption has their addresses."""
    vm = gmemcore.create_vm("SNP", backing="none")
    gmem = vm.create_guest_memfd(pages * P)
    vm.add_memslot(0, 1 << 30, gmem.size, gmem)
    gmem.convert(0, P, "shared")
    if pages > 1:
        gmem.convert((pages - 1) * P, P, "shared")
    ax = page_map(vm, order="hilbert")
    cells = drawn_states(ax)
    flat = [cell for row in cells for cell in row if cell]
    assert len(flat) == pages
    first, last = ((int(line.get_xdata()[0]), int(line.get_ydata()[0])) for line in ax.get_lines())
    shared = [
        (x, y) for y, row in enumerate(cells) for x, cell in enumerate(row) if cell == "shared-unallocated"
    ]
    assert sorted({first, last}) == sorted(shared)
    assert first == (0, 0)
    assert [line.get_marker() for line in ax.get_lines()] == ["o", "s"]
    end = (1 << 30) + (pages - 1) * P
    caption = f"Hilbert curve from the circle (gpa 0x40000000) to the square ({end:#x})"
    assert ax.get_xlabel() == caption


def test_one_file_by_offset():
    snapshot = take(random_guest("TDX", "v5", 2))
    ax = page_map(snapshot, file=1, columns=100)
    rows = drawn_states(ax)
    states = states_of(snapshot.planes(1))
    assert len(rows) == 7
    for name, pages in states.items():
        assert [cell == name for row in rows for cell in row] == pages.bits().tolist()
    assert ax.get_ylabel() == "offset in the file"
    assert ax.get_title(loc="left") == "Page states of 2.73 MiB, file 1 of 2: TDX, v5, running"
    assert "(offset 0x0)" in page_map(snapshot, file=1, order="hilbert").get_xlabel()


def test_axes_of_the_callers_own():
    figure, own = plt.subplots()
    assert page_map(random_guest("SNP", "v5", 1), own) is own
    assert own.get_xlabel() == "offset within the row"
    assert plt.get_fignums() == [figure.number]


def test_a_large_guest_is_drawn_by_the_mean_of_its_pages():
    vm = gmemcore.create_vm("SNP", backing="none")
    gmem = vm.create_guest_memfd(5 << 30)
    vm.add_memslot(0, 0, gmem.size, gmem)
    gmem.set_memory_attributes(4 * P, P, 0)
    gmem.set_memory_attributes(4 << 30, 1 << 30, 0)
    ax = page_map(vm)
    assert cell_size(gmem.n_pages) == 2
    cells = np.asarray(ax.get_images()[0].get_array()).reshape(-1, 4) / 255
    cells = cells[cells[:, 3] > 0]
    assert len(cells) == gmem.n_pages // 2
    private, shared = (
        np.array(matplotlib.colors.to_rgba(STATE_COLOURS[name]))
        for name in ("private-unallocated", "shared-unallocated")
    )
    assert cells[0] == pytest.approx(private)
    assert cells[2] == pytest.approx((private + shared) / 2, abs=0.51 / 255)  # colours are bytes
    assert cells[-1] == pytest.approx(shared)
    assert "8 KiB per cell" in ax.get_title(loc="left")
    assert words(ax.get_legend()) == ["shared-unallocated (20.0 %)", "private-unallocated (80.0 %)"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"order": "spiral"}, "known: address, hilbert"),
        ({"columns": 0}, "1 or more"),
    ],
)
def test_what_can_not_be_drawn(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        page_map(random_guest("SNP", "v5", 1), **options)
    with pytest.raises(ValueError, match="no file to draw"):
        page_map(gmemcore.create_vm("SNP"))


def test_labels_of_addresses_do_not_lie_over_each_other():
    for regions in ([("2m", "0x0")], [("2m", "0x0"), ("1t", "4g")], [("4k", f"{i}g") for i in range(40)]):
        vm = gmemcore.create_vm("SNP", backing="none")
        for slot, (size, gpa) in enumerate(regions):
            vm.add_memslot(slot, gpa, size, vm.create_guest_memfd(size))
        ax = page_map(vm)
        at = sorted(ax.get_yticks())
        height = ax.get_ylim()[0] - ax.get_ylim()[1]
        assert all(high - low >= height / 20 for low, high in pairwise(at))
        assert ax.get_yticklabels()[0].get_text() == "0x0"


# ---- address against time --------------------------------------------------------------------------------


@pytest.mark.parametrize("show", ["states", "private", "accepted", "shared-unallocated"])
def test_the_heat_map_block_by_block(series, show):
    ax = heat_map(series, show=show, block="128m")
    (mesh,) = ax.collections
    drawn = np.asarray(mesh.get_array())
    palette = {name: np.array(matplotlib.colors.to_rgba(colour)) for name, colour in STATE_COLOURS.items()}
    assert drawn.shape[:2] == (8, 8)
    for column, snapshot in enumerate(series):
        planes = snapshot.planes(0)
        states = {name: pages.bits() for name, pages in states_of(planes).items()}
        for row in range(8):
            part = slice(row << 15, row + 1 << 15)
            if show == "states":
                expected = sum(palette[name] * bits[part].mean() for name, bits in states.items())
            else:
                bits = planes[show].bits() if show in PLANE_NAMES else states[show]
                expected = bits[part].mean() * 100
            assert drawn[row, column] == pytest.approx(expected)
    edges = mesh.get_coordinates()[0, :, 0]
    assert edges.tolist() == [*series.times.tolist(), 32000]
    labels = {
        int(tick.get_text(), 16): at for tick, at in zip(ax.get_yticklabels(), ax.get_yticks(), strict=True)
    }
    assert labels == {row << 27: row for row in range(8)}
    assert ax.get_ylim() == (0, 8)


def test_a_part_of_the_addresses(series):
    ax = heat_map(series, address=("256m", "512m"), block="64m")
    assert np.asarray(ax.collections[0].get_array()).shape[:2] == (4, 8)
    assert ax.get_yticklabels()[0].get_text() == "0x10000000"
    with pytest.raises(ValueError, match="no memory from 0x80000000 to 0xc0000000"):
        heat_map(series, address=("2g", "3g"))
    with pytest.raises(ValueError, match="nothing to show by the name 'dirty'; known: states, private"):
        heat_map(series, show="dirty")
    with pytest.raises(ValueError, match="of 1 snapshot; at least two"):
        heat_map(series[:1])


@pytest.mark.parametrize("order", range(6))
def test_hilberts_curve(order):
    x, y = hilbert(np.arange(4**order), order)
    assert len(set(zip(x.tolist(), y.tolist(), strict=True))) == 4**order
    assert (np.abs(np.diff(x)) + np.abs(np.diff(y)) == 1).all()  # neighbours stay neighbours
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 2**order - 1, 0)
    assert min(x.min(), y.min()) == 0
    assert max(x.max(), y.max()) == 2**order - 1


# ---- runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", ["pages", "runs"])
def test_run_lengths_as_steps(weight):
    vm = random_guest("SNP", "v5", 2)
    ax = run_length_cdf(vm, weight=weight)
    table = run_lengths(vm)
    lines = {line.get_label(): line for line in ax.get_lines()}
    for attribute in ("private", "shared"):
        own = table.where(attribute=attribute)
        sizes, shares = lines[attribute].get_data()
        assert sizes[1:].tolist() == (own["length"] * P).tolist()
        assert shares[1:] == pytest.approx(own[f"cdf_{weight}"])
        assert shares[0] == 0
    assert words(ax.get_legend()) == ["private", "shared"]
    assert ax.get_xscale() == "log"
    assert "MiB" in ax.get_xticklabels()[-1].get_text()


def test_runs_of_several_guests():
    ax = run_length_cdf({seed: random_guest("SNP", "v5", seed) for seed in (1, 2)})
    assert words(ax.get_legend()) == ["1, private", "1, shared", "2, private", "2, shared"]
    with pytest.raises(ValueError, match="pages or runs"):
        run_length_cdf({}, weight="bytes")
    assert run_length_cdf({}).get_legend() is None


# ---- over time -----------------------------------------------------------------------------------------


@pytest.fixture
def series():
    """A guest of 1 GiB that accepts, then shares here and there."""
    vm = gmemcore.create_vm("SNP", backing="none")
    gmem = vm.create_guest_memfd(1 << 30)
    vm.add_memslot(0, 0, gmem.size, gmem)
    taken = Series()
    for step in range(8):
        vm.accept(step << 27, 1 << 27)
        if step > 3:
            gmem.set_memory_attributes(step << 24, 3 * P, 0)
            gmem.fallocate(1, step << 24, 3 * P)
        taken.take(vm, step * 4000)
    return taken


def test_a_stream_adds_up_to_the_guest(series):
    ax = state_stream(series)
    labels = words(ax.get_legend())
    assert labels == ["private-unallocated", "accepted", "shared"]
    table = series.tabulate(state_mix)
    top = np.zeros(len(series))
    for state, area in zip(reversed(labels), ax.collections, strict=True):
        top += table.where(state=state)["bytes"] / (1 << 30)
        drawn = area.get_paths()[0].vertices
        assert drawn[:, 1].max() == pytest.approx(top.max())
        assert set(drawn[:, 0]) == {snapshot.at for snapshot in series}
    assert top == pytest.approx(np.ones(len(series)))
    assert ax.get_ylabel() == "memory (GiB)"
    assert ax.get_xlabel() == "operations"
    assert ax.get_xlim() == (0, 28000)


def test_mappability_of_both_sizes(series):
    ax = mappability_over_time(series)
    table = series.tabulate(mappability)
    for line, size in zip(ax.get_lines(), ("2m", "1g"), strict=True):
        assert line.get_ydata() == pytest.approx(table.where(size=size)["fraction"] * 100)
    assert words(ax.get_legend()) == ["2 MiB", "1 GiB"]
    assert "%" in ax.get_ylabel()


def test_a_guest_without_blocks_has_no_line():
    gmem = gmemcore.create_vm("SNP", backing="none").create_guest_memfd(4 * P)
    ax = mappability_over_time(Series([take(gmem, at=at) for at in (0, 0)], "s"))
    assert not ax.get_lines()
    assert ax.get_xlabel() == "time (s)"


def test_memory_of_two_runs(series):
    legacy = gmemcore.create_vm("SNP", "legacy", backing="none")
    gmem = legacy.create_guest_memfd(1 << 30)
    legacy.add_memslot(0, 0, gmem.size, gmem)
    both = Series()
    for step in range(3):
        gmem._shared.take(Step.ALLOCATE, 0, 1 << 30)
        legacy.set_memory_attributes(0, 1 << 30, 8)
        legacy.accept(0, 1 << 30)
        both.take(legacy, step)
    ax = memory_over_time({"in place": series, "legacy": both})
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert list(lines) == words(ax.get_legend()) == ["in place", "legacy", "size of the guest"]
    assert lines["in place"].get_ydata()[-1] == 1
    assert lines["legacy"].get_ydata().tolist() == [2, 2, 2]
    assert lines["size of the guest"].get_ydata() == [1, 1]
    assert ax.get_ylabel() == "memory in use (GiB)"
    styles = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines.values()}
    assert len(styles) == 3


def test_what_is_no_run():
    one = Series([take(gmemcore.create_vm("SNP"))])
    for draw in (state_stream, mappability_over_time):
        with pytest.raises(ValueError, match="of 1 snapshot; at least two"):
            draw(one)
    with pytest.raises(ValueError, match="run 'a' of 1 snapshot"):
        memory_over_time({"a": one})
    with pytest.raises(ValueError, match="no run"):
        memory_over_time({})
    with pytest.raises(ValueError, match="different units"):
        memory_over_time({"a": one, "b": Series(unit="s")})


# ---- what conversions cost -------------------------------------------------------------------------------


SPEEDS = {"memcpy": (10, 12), "memset": (20, 12.1), "xor": (22, 25), "bitmap": (2000, 8000)}


def spread(median):
    return Spread(median, median * 0.9, median * 1.1, 9)


def bench_run(*cells, effects=()):
    curves = [
        Primitive(name, "libc", size, spread(4.096 * 1000 / speed), speed if name != "bitmap" else None)
        for name, at in SPEEDS.items()
        for size, speed in zip((4096, 2 << 20), at, strict=True)
    ]
    largest = {curve.primitive: curve.gbps for curve in curves if curve.gbps and curve.range == 2 << 20}
    first = BenchFirst({}, largest, verdict=Verdict(list(effects)), primitives_by_range=curves)
    return Run("bench", first, list(cells))


def effect(name, gbps, size=2 << 20):
    moved = (gbps and spread(gbps), spread(12.0), gbps and spread(2.0))
    return EffectFigure(name, "a cell", size, *moved, "xor", spread(1.0), True)


def test_effects_beside_primitives():
    lines = (effect("KEEP", None, 4096), effect("ZERO", 40.0), effect("copy", 5.0))
    ax = bench_effects(bench_run(effects=lines))
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        *("memcpy (libc)", "memset (libc)", "xor (libc)", "ZERO", "copy (two backings)"),
    ]
    assert [bar.get_width() for bar in ax.patches] == [12, 12.1, 25, 40, 5]
    assert [text.get_text() for text in ax.texts] == ["12", "12.1", "25", "40", "5"]
    assert ax.get_lines()[3].get_xdata() == pytest.approx([36, 44])
    assert ax.get_title(loc="left") == "Speed of conversions of 2 MiB"
    with pytest.raises(ValueError, match="no effect that moves bytes"):
        bench_effects(bench_run(effects=(effect("KEEP", None),)))


def test_the_cube():
    run = bench_run(
        cell(range=4096),
        cell(),
        cell(pages_allocated_before=0, seconds=Seconds(1.0, 1.0, 0, 1)),
        cell("ZERO", effect="ZERO", seconds=Seconds(51.2e-6, 6e-5, 0.1, 3)),
        cell("PRESERVE", "EOPNOTSUPP", None),
        cell("CIPHER", "EINVAL", None),
        cell(vm_type="TDX", does="ZERO", bytes="zero", ns_per_page=spread(120.0)),
        cell("NONE", abi="legacy"),
    )
    ax = bench_cube(run)
    costs = ax.get_images()[0].get_array()
    assert costs.shape == (2, 3)
    assert costs[0, :2].tolist() == pytest.approx([10, 100])
    assert np.ma.getmaskarray(costs).tolist() == [[False, False, True], [False, True, True]]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["NONE", "ZERO", "PRESERVE"]
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "SNP running to shared",
        "TDX running to shared",
    ]
    run.records.append(cell("ZERO", vm_type="TDX", seconds=Seconds(None, None, None, 0)))  # interrupted
    again = bench_cube(run).get_images()[0].get_array()
    assert np.ma.getmaskarray(again).tolist() == np.ma.getmaskarray(costs).tolist()
    texts = {text.get_position(): text.get_text() for text in ax.texts}
    assert texts == {(0, 0): "KEEP 10", (1, 0): "ZERO 100", (2, 0): "EOPNOTSUPP", (0, 1): "ZERO 120"}
    assert costs[0, 1] < costs[1, 0]  # coloured as zeroing, whatever the flag's effect
    (hatched,) = [patch for patch in ax.patches if patch.get_hatch()]
    assert hatched.get_xy() == (1.5, -0.5)
    assert "CIPHER" in ax.get_xlabel()
    assert ax.get_title(loc="left") == "v5, firmware today: the largest range"
    assert "ns per 4 KiB page" in ax.figure.axes[1].get_ylabel()
    assert bench_cube(run, size=4096).get_title(loc="left").endswith("ranges of 4 KiB")


def test_speed_by_size_beside_primitives_at_each_size():
    run = bench_run(
        *(
            cell(vm_type=vm_type, effect="ZERO", bytes="zero", does="ZERO", range=size, convert_gbps=speed)
            for size, speeds in ((4096, (4, 6, 8)), (2 << 20, (20, 30, 50)))
            for vm_type, speed in zip(("SNP", "TDX", "PKVM"), speeds, strict=True)
        ),
        *(
            cell(does="KEEP", range=size, ns_per_page=spread(ns))
            for size, ns in ((4096, 12.0), (2 << 20, 0.5))
        ),
        cell(abi="legacy", populate_gbps=2.0),
        cell(abi="v5", populate_gbps=9.0, does="KEEP", range=4096, ns_per_page=spread(12.0)),
    )
    ax = cost_by_range(run)
    (below,) = [other for other in ax.figure.axes if other is not ax]
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert words(ax.figure.legends[0]) == ["zero", "copy (two backings)", "attributes alone"]
    assert lines["zero"].get_data()[0].tolist() == [4096, 2 << 20]
    assert lines["zero"].get_data()[1].tolist() == [6, 30]
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (4, 50)
    assert lines["copy (two backings)"].get_ydata().tolist() == [2]
    dotted = [list(line.get_ydata()) for line in ax.get_lines()[2:]]
    assert dotted == [pytest.approx(speeds) for speeds in ((10, 12), (20, 12.1), (22, 25))]
    heights = {text.get_text().strip(): text.xy[1] for text in ax.texts}
    assert heights["memcpy"] * 1.05 < heights["memset"] < heights["xor"]
    keep, bitmap = below.get_lines()
    assert keep.get_ydata().tolist() == [12, 0.5]
    assert list(bitmap.get_ydata()) == pytest.approx([4096 / 2000, 4096 / 8000])
    assert [text.get_text().strip() for text in below.texts] == ["bitmap"]
    assert [label.get_text() for label in below.get_xticklabels()] == ["4 KiB", "2 MiB"]
    assert (ax.get_xscale(), ax.get_yscale(), below.get_yscale()) == ("log", "log", "log")
    assert (ax.get_ylabel(), below.get_ylabel()) == ("GB/s", "ns per 4 KiB page")
    assert len(cost_by_range(run, abi="legacy").get_lines()) == 4


def test_primitives_are_drawn_as_they_were_timed_in_turn_with_the_cells():
    """On a machine that was slow while primitives were timed alone, nothing passes its primitive."""
    timed = {"convert_gbps": 40.0, "primitive": "memset", "primitive_ns_per_page": 100.0}
    zeroing = [
        cell(effect="ZERO", bytes="zero", does="ZERO", vm_type=name, **timed) for name in ("SNP", "TDX")
    ]
    ax = cost_by_range(bench_run(*zeroing))
    (memset,) = (line for line in ax.get_lines() if line.get_ydata()[0] == 20)
    assert list(memset.get_ydata()) == pytest.approx([20, 40.96])


def test_attributes_alone_by_size():
    ax = cost_by_range(bench_run(cell(does="KEEP", ns_per_page=spread(0.5))))
    assert ax.figure.axes == [ax]
    assert ax.get_ylabel() == "ns per 4 KiB page"
    figure, own = plt.subplots()
    moving = cell(effect="ZERO", bytes="zero", does="ZERO", convert_gbps=3.0)
    assert cost_by_range(bench_run(cell(does="KEEP"), moving), own) is own
    assert len(figure.axes) == 2


def test_one_setting_is_drawn():
    """A run of several backings and fragmentations: the first setting, and uniform memory."""
    slow = Seconds(1.0, 1.0, 0, 1)
    ax = bench_cube(
        bench_run(
            cell(fragmentation="alternate", seconds=slow),
            cell(),
            cell(backing="memfd", range=1 << 30, seconds=slow),
            cell("ZERO", "EINVAL", None, backing="memfd"),
            cell("ZERO", "EOPNOTSUPP", None, direction="to_private"),
        )
    )
    assert ax.get_images()[0].get_array()[0, 0] == pytest.approx(10)
    assert "EINVAL" in [text.get_text() for text in ax.texts]
    only = bench_run(cell(fragmentation="alternate", effect="ZERO", bytes="zero", convert_gbps=3.0))
    assert cost_by_range(only).get_lines()[0].get_ydata().tolist() == [3.0]


def test_work_over_all_axes():
    slow = Seconds(1.0, 1.0, 0, 1)
    run = bench_run(
        cell(range=4096, seconds=Seconds(50e-9, 50e-9, 0, 3)),
        cell(),
        cell("PRESERVE", phase="launching", seconds=Seconds(15.36e-6, 1.0, 0, 3)),
        cell(fragmentation="alternating-allocated", seconds=Seconds(10.24e-6, 1.0, 0, 3)),
        cell("ZERO", effect="ZERO", bytes="zero", convert_gbps=40.96, populate_gbps=4.096, primitive="xor"),
        cell("CIPHER", "EINVAL", None),
        cell(abi="legacy", pages_allocated_before=0, populate_gbps=2.048, seconds=slow),
        cell(
            backing="memfd",
            huge_pages=False,
            bytes="random",
            does="SCRAMBLE",
            convert_gbps=8.192,
            seconds=slow,
        ),
    )
    ax = bench_axes(run)
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "anonymous, THP on: ZERO to shared",
        "anonymous, THP on: populate in place",
        "anonymous, THP on: legacy to shared, copy",
        "anonymous, THP on: SNP to shared, attributes",
        "anonymous, THP on: SNP to shared, legacy, with the discard",
        "memfd, THP off: SCRAMBLE to shared",
    ]
    columns = ["4 KiB", "2 MiB", "2 MiB\nalternating-allocated", "2 MiB\nunallocated"]
    assert [label.get_text() for label in ax.get_xticklabels()] == columns
    costs = ax.get_images()[0].get_array()
    assert costs.tolist() == [
        [None, pytest.approx(100), None, None],
        [None, pytest.approx(1000), None, None],
        [None, None, None, pytest.approx(2000)],
        [pytest.approx(50), pytest.approx(20), pytest.approx(20), None],
        [None, None, None, pytest.approx(1e9 / 512)],
        [None, pytest.approx(500), None, None],
    ]
    assert {text.get_position(): text.get_text() for text in ax.texts}[0, 3] == "50"
    assert [label.get_text() for label in bench_axes(run, abi="legacy").get_yticklabels()] == [
        "legacy to shared, copy",
        "SNP to shared, legacy, with the discard",
    ]
    with pytest.raises(ValueError, match="every cell was refused"):
        bench_axes(bench_run(cell("ZERO", "EINVAL", None)))


def operations():
    """Cells of a real kernel: a call at two sizes, and one that doesn't grow with pages."""
    ioctl = cell(ns_per_page=spread(800.0), operation="KVM_SET_MEMORY_ATTRIBUTES")
    fallocate = replace(ioctl, operation="fallocate", direction="", ns_per_page=spread(1700.0))
    return (
        fallocate,
        replace(ioctl, range=4096, ns_per_page=spread(99_000.0)),
        ioctl,
        replace(ioctl, fragmentation="alternating"),
        replace(fallocate, operation="create a file", ns_per_page=None),
    )


def test_operations_of_a_kernel():
    run = bench_run(*operations())
    ax = kernel_operations(run)
    way = "KVM_SET_MEMORY_ATTRIBUTES, to shared"
    assert [label.get_text().replace("\n", " ") for label in ax.get_yticklabels()] == [
        *("fallocate", way, f"{way}, alternating"),
    ]
    points = {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines()}
    assert points["4 KiB"] == [[99_000, 1]]
    assert points["2 MiB"] == [[1700, 0], [800, 1], [800, 2]]
    intervals = [line.get_xdata() for line in ax.get_lines() if line.get_label().startswith("_")]
    assert sorted(map(tuple, intervals))[-1] == pytest.approx((89_100, 108_900))
    assert ax.get_xscale() == "log"
    with pytest.raises(ValueError, match="no operation of a kernel"):
        kernel_operations(run, vm_type="PKVM")
    with pytest.raises(ValueError, match="no operation of a kernel"):
        kernel_operations(bench_run(cell()))


def test_runs_that_can_not_be_drawn():
    for draw in (bench_cube, bench_axes, cost_by_range):
        with pytest.raises(ValueError, match="must be a run of bench, not of stress"):
            draw(Run("stress", None, []))
        with pytest.raises(ValueError, match="no cell"):
            draw(bench_run())
        with pytest.raises(ValueError, match="no cell of 'v4'; it has v5"):
            draw(bench_run(cell()), abi="v4")
    with pytest.raises(ValueError, match="no conversion was measured"):
        cost_by_range(bench_run(cell("ZERO", "EINVAL", None)))
    with pytest.raises(ValueError, match="no cell was measured at that size; there are 2 MiB"):
        bench_cube(bench_run(cell()), size=4096)


# ---- all of them -----------------------------------------------------------------------------------------


def test_every_picture_fits_into_its_figure(series, tmp_path):
    """Nothing that is written lies beyond the edge of the default figure."""
    run = bench_run(
        *(
            cell(flag, vm_type=vm_type, direction=way, effect="ZERO", bytes="zero", convert_gbps=20.0)
            for flag in ("NONE", "ZERO", "PRESERVE_BEFORE_LAUNCH")
            for vm_type in ("SW_PROTECTED", "SNP")
            for way in ("to_private", "to_shared")
        ),
        effects=[effect(name, 12.0) for name in ("ZERO", "SCRAMBLE", "populate", "copy")],
    )
    guest = take(random_guest("SNP", "v5", 2))
    inputs = {
        "snapshot": guest,
        "snapshots": {"one guest": guest, "another": guest},
        "series": series,
        "several series": {"in place": series, "legacy": series},
        "bench": run,
        "stress": stress_run({"balloon SNP v5 today": [3, 0, 900], "balloon TDX v5 today": [1]}),
        "replay": replay_run(("v5", "SNP", 3), ("v13", "SNP", 0), ("v13", "SW_PROTECTED", 100)),
    }
    of_kernel = {"operations": bench_run(*operations())}
    for name, picture in PICTURES.items():
        figure = picture.draw(of_kernel.get(name, inputs[picture.of])).figure
        figure.savefig(tmp_path / f"{name}.png")
        drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert min(drawn.x0, drawn.y0) > -0.01, name
        assert drawn.x1 < width + 0.01, name
        assert drawn.y1 < height + 0.01, name


def stress_run(sizes):
    """A run of stress whose guests asked for conversions of these sizes."""
    sums = {name: StressSums(1, sum(own), {"OK": sum(own)}, {}, {}, own, "00") for name, own in sizes.items()}
    return Run("stress", None, [], StressLast(next(iter(sums.values())), sums, None))


def replay_run(*refused):
    """A run of replay in which some of 41 conversions were refused, among 120 operations."""
    replays = []
    for abi, vm_type, count in refused:
        reasons = [Reason("CONVERT", "EINVAL", count // 2), Reason("CONVERT", "EAGAIN", count - count // 2)]
        reasons += [Reason("ACCEPT", "EINVAL", 30)]
        replays.append(Replay(abi, vm_type, "today", 120, count + 30, 41, reasons, [], {}, 0.0, 0, None))
    return Run("replay", None, replays)


def test_requests_that_capabilities_predict_wrongly():
    rows = audit()
    ax = audit_bars(rows)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [row.abi for row in rows]
    drawn = {container.get_label(): container for container in ax.containers}
    for i, row in enumerate(rows):
        shares = {name: bars[i].get_width() for name, bars in drawn.items()}
        lost = sum(cell.broken for cell in row.cells)
        assert lost == row.broken
        n = len(row.cells)
        expected = {"contents lost": row.broken, "over-promised": row.lies, "under-promised": row.hidden}
        for name, count in expected.items():
            assert shares[name] == pytest.approx(100 * count / n if n else 0), (row.abi, name)
        assert sum(shares.values()) == pytest.approx(100 if n else 0)
    ends = [text.get_text() for text in ax.texts]
    assert ends[[row.abi for row in rows].index("v5")] == "3 VM-type checks"
    assert ends[[row.abi for row in rows].index("two-caps")] == "1 VM-type check"
    assert ends[[row.abi for row in rows].index("v13")] == "no content flag"
    with pytest.raises(ValueError, match="no revision"):
        audit_bars([])


def test_areas_of_one_colour_are_drawn_in_one_colour(tmp_path):
    """Resampled as floats they would be dithered, and files ten times as large."""
    vm = gmemcore.create_vm("SNP", "v5", backing="none")
    build(vm, Layout.single("4g", private=True))
    for order in ("address", "hilbert"):
        figure = page_map(vm, order=order).figure
        figure.savefig(tmp_path / "p.png", dpi=72)
        pixels = plt.imread(tmp_path / "p.png")
        inside = pixels[pixels.shape[0] // 3 : pixels.shape[0] // 2, 150:250]
        assert len(np.unique(inside.reshape(-1, inside.shape[-1]), axis=0)) == 1


def test_refusals_stand_at_their_revision_and_vm_type():
    """The share of conversions, the same in words and in colour; other operations count for nothing."""
    ax = refusal_map(replay_run(("v5", "SNP", 14), ("v13", "SNP", 0), ("v13", "TDX", 41)))
    assert [text.get_text() for text in ax.get_xticklabels()] == ["SNP", "TDX"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["v5", "v13"]
    image = ax.get_images()[0]
    assert image.get_clim() == (0, 100)
    share = image.get_array()
    assert share.tolist() == [[pytest.approx(1400 / 41), None], [0, 100]]
    said = {text.get_position(): text.get_text() for text in ax.texts}
    assert said == {(0, 0): "34.1 %", (0, 1): "0 %", (1, 1): "100 %"}
    with pytest.raises(ValueError, match="replayed nowhere"):
        refusal_map(replay_run())
    with pytest.raises(ValueError, match="must be a run of replay, not of bench"):
        refusal_map(bench_run())


@pytest.mark.parametrize("sizes", ["4k,2m,1g", "2m"])
def test_labels_of_several_targets_do_not_overlap(sizes):
    abis = ("huge-partial", "huge-rollback")
    asked = {"memory": "64m", "operations": 100, "swiotlb": "16m", "page_sizes": sizes}
    ax = cost_by_page_size(gmemcore.replay("snp-boot", abis, ("SNP", "PKVM"), **asked))
    ax.figure.draw_without_rendering()
    (below,) = ax.child_axes
    names = [text.get_text() for text in below.get_xticklabels()]
    assert names == [f"{abi}\n{vm_type}" for vm_type in ("SNP", "PKVM") for abi in abis]
    texts = (*ax.get_xticklabels(), *below.get_xticklabels(), ax.xaxis.label)
    boxes = [text.get_window_extent() for text in texts]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_what_conversions_cost_by_page_size(tmp_path):
    asked = {"memory": "3g", "operations": 500, "swiotlb": "16m", "page_sizes": "1g,4k,2m"}
    run = gmemcore.replay("snp-boot", "huge-partial", "SNP", **asked)
    ax = cost_by_page_size(run)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["4 KiB", "2 MiB", "1 GiB"]
    lines = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
    by_size = {replay.page_size: replay.counters for replay in run.records}
    small, middle, large = (by_size[P << order] for order in (0, 9, 18))
    splits = [0, middle["folios_2m_split"], large["folios_1g_split"]]
    assert list(lines["huge pages split"]) == splits
    assert splits[1] > splits[2] > 0
    assert list(lines["TLB flushes"]) == [each["tlb_flushes"] for each in (small, middle, large)]
    (tmp_path / "prices.toml").write_text(
        'title = "a test"\n[events.tlb_flushes]\nns = 2000\nsource = "none"\n'
        '[events.pages_restructured]\nns = 10\nsource = "none"\n'
    )
    priced = gmemcore.replay("snp-boot", "huge-partial", "SNP", cost=tmp_path / "prices.toml", **asked)
    drawn = cost_by_page_size(priced)
    heights = {
        container.get_label(): [bar.get_height() for bar in container] for container in drawn.containers
    }
    assert heights["tlb_flushes"] == pytest.approx([lines["TLB flushes"][i] * 2e-3 for i in range(3)])
    assert heights["pages_restructured"][2] == pytest.approx(large["pages_restructured"] * 1e-5)
    two = gmemcore.replay("snp-boot", "huge-partial,huge-rollback", "SNP", **asked)
    ax = cost_by_page_size(two)
    (below,) = ax.child_axes
    assert [text.get_text() for text in below.get_xticklabels()] == ["huge-partial", "huge-rollback"]
    labels = [line.get_label() for line in ax.get_lines() if not line.get_label().startswith("_")]
    assert len(ax.get_lines()) == 2 * len(labels) == 2 * len(lines)
    with pytest.raises(ValueError, match="replayed nowhere"):
        cost_by_page_size(replay_run())


def test_struct_pages_of_two_page_sizes():
    runs = {}
    for size in ("2m", "1g"):
        asked = {"operations": 300, "every": 100, "page_size": size, "swiotlb": "16m"}
        runs[size] = gmemcore.run("snp-boot", "3g", abi="huge-partial", **asked).series
    ax = struct_pages_over_time(runs)
    for line, (name, series) in zip(ax.get_lines(), runs.items(), strict=True):
        assert line.get_label() == name
        needed = [one.counters.vmemmap_pages_allocated - one.counters.vmemmap_pages_freed for one in series]
        assert line.get_ydata() == pytest.approx(np.array(needed) * P / (1 << 20))
    assert max(line.get_ydata().max() for line in ax.get_lines()) > 15
    assert ax.get_ylabel() == "struct pages (MiB)"
    same = runs["1g"].plot.compare({"2m": runs["2m"]}, what="struct pages")
    assert len(same.get_lines()) == 2
    with pytest.raises(gmemcore.GmemError, match="page size must be 4k, 2m or 1g"):
        gmemcore.run("snp-boot", "3g", page_size="8k")


def bars(ax):
    """Widths of the segments of each bar, by legend label."""
    return {
        container.get_label(): [round(bar.get_width(), 6) for bar in container] for container in ax.containers
    }


def test_conversions_by_size_are_summed_over_what_guests_are():
    run = stress_run(
        {
            "balloon SNP v5 today": [30, 0, 600],
            "balloon TDX v5 today": [370],
            "boot SNP v5 today": [0] * 18 + [7],
            "kexec SNP v5 today": [],
        }
    )
    ax = conversion_sizes(run)
    assert bars(ax) == {"4 KiB": [40, 0], "below 64 KiB": [60, 0], "1 GiB and more": [0, 100]}
    assert [label.get_text() for label in ax.get_yticklabels()] == ["balloon", "boot"]
    assert [text.get_text() for text in ax.texts] == ["1,000", "7"]
    assert words(ax.get_legend()) == list(bars(ax))
    with pytest.raises(ValueError, match="no guest asked"):
        conversion_sizes(stress_run({"kexec SNP v5 today": []}))
    with pytest.raises(ValueError, match="must be a run of stress, not of bench"):
        conversion_sizes(bench_run())


def test_outcomes_of_a_fleet():
    sums = {
        name: StressSums(1, 10, outcomes, {}, {}, [], "00")
        for name, outcomes in {"a SNP v5": {"OK": 8, "EAGAIN": 2}, "b SNP v5": {"OK": 1, "EIO": 1}}.items()
    }
    ax = fleet_outcomes(Run("stress", None, [], StressLast(sums["a SNP v5"], sums, None)))
    assert bars(ax) == {"OK": [80, 50], "EAGAIN": [20, 0], "EIO": [0, 50]}
    assert [text.get_text() for text in ax.texts] == ["10", "2"]


def test_axes_start_where_data_lives():
    vm = gmemcore.create_vm("SNP", backing="none")
    gmem = vm.create_guest_memfd("1g")
    vm.add_memslot(0, 0, gmem.size, gmem)
    series = Series()
    for i in range(4):
        gmem.convert(i << 27, "64m", "shared")
        gmem.convert(i << 21, P, "private" if i else "shared")
        series.take(vm, i * 10)
    low, high = mappability_over_time(series).get_ylim()
    figures = mappability(series)["fraction"] * 100
    assert low <= figures.min() <= figures.max() <= high
    assert high - low < 1.3 * max(figures.max() - figures.min(), 5)
    left, right = run_length_cdf(vm).get_xlim()
    lengths = run_lengths(vm)["length"] * P
    assert lengths.min() / 2 < left <= lengths.min()
    assert lengths.max() <= right < lengths.max() * 2
    assert mappability_over_time(series).get_xlim() == (0, 30)


def test_pictures_as_an_accessor(series):
    legacy = Series([take(gmemcore.create_vm("SNP", "legacy"), at=at, label="two backings") for at in (0, 9)])
    one = series[0]
    calls = {
        "Memory by state": series.plot.states,
        "Page states by address and time, 2 MiB per row": series.plot.heatmap,
        "What large entries could map": series.plot.mappable,
        "Memory behind a guest": lambda ax: series.plot.compare(legacy, ax),
        "What 2 MiB entries could map": lambda ax: series.plot.compare(series[2:], ax, what="mappable"),
        "Memory that is shared": lambda ax: series.plot.compare({"late": series[2:]}, ax, what="shared"),
        "Memory in runs of one attribute, up to a length": series.plot.runs,
        "Page states of 1 GiB: SNP, v5, launching": series.plot.hilbert,
        "Runs of one attribute, up to a length": lambda ax: one.plot.runs(ax, weight="runs"),
    }
    for title, draw in calls.items():
        _, ax = plt.subplots()
        assert draw(ax) is ax
        assert ax.get_title(loc="left") == title
    assert one.plot.map().get_title(loc="left") == series.plot.map(number=0).get_title(loc="left")
    assert words(series.plot.compare(legacy).get_legend())[-2:] == ["two backings", "size of the guest"]
    assert len(one.plot.compare(series[-1]).get_yticklabels()) == 2
    assert len(one.plot.states().get_yticklabels()) == 1
    with pytest.raises(ValueError, match="nothing to compare by the name 'colour'; known: memory, mappable"):
        series.plot.compare(legacy, what="colour")
    with pytest.raises(ValueError, match="known: states, runs"):
        one.plot.compare(one, what="colour")


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(
        ImportError, match=r"matplotlib, which isn't installed; pip install 'gmemcore\[analysis\]'"
    ):
        run_length_cdf({})


def test_sizes_of_hostile_requests_have_words():
    words = [size_words(size) for size in (4096, 3 << 19, 5 << 50, 1 << 62)]
    assert words == ["4 KiB", "1.5 MiB", "5 PiB", "4 EiB"]


def test_the_pictures_of_a_thing_are_listed_by_it():
    run = gmemcore.run("balloon", memory="64m", operations=5)
    for plot in (run.plot, run.snapshot.plot):
        listed = re.findall(r"(\w+)\(\)", repr(plot))
        assert listed == [name for name in vars(type(plot)) if not name.startswith("_")]
        assert all(callable(getattr(plot, name)) for name in listed)
