"""Pictures show what page state says: the artists, their data, labels and legends, not their pixels."""

import matplotlib
import numpy as np
import pytest
from guests import PAGE, random_guest

import gmemcore

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from gmemcore.analysis import STATES, Series, mappability, page_map, run_lengths, state_mix, take
from gmemcore.analysis.hilbert import hilbert
from gmemcore.analysis.pictures import (
    PICTURES,
    cell_size,
    conversion_sizes,
    fractions,
    mappability_over_time,
    memory_over_time,
    refusal_map,
    run_length_cdf,
    state_stream,
)
from gmemcore.analysis.runs import BenchCell, BenchFirst, Replay, Run, Seconds, StressLast, StressSums
from gmemcore.analysis.speed import bench_axes, bench_cube, cost_by_range
from gmemcore.analysis.style import STATE_COLOURS, size_words


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def words(legend):
    return [text.get_text() for text in legend.get_texts()]


# ---- the page map ------------------------------------------------------------------------------------


def test_every_state_has_a_colour_of_its_own():
    assert {state.name for state in STATES} == set(STATE_COLOURS)
    assert len(set(STATE_COLOURS.values())) == len(STATES)


def test_a_page_is_named_by_its_most_telling_plane():
    vm = gmemcore.create_vm("SNP", "v5")
    gmem = vm.create_guest_memfd(8 * PAGE, 3)
    vm.add_memslot(0, 0, gmem.size, gmem)
    gmem.set_memory_attributes(0, 3 * PAGE, 8)
    vm.accept(0, PAGE)
    with pytest.raises(gmemcore.GmemError):
        vm.guest_read(PAGE, 1)
    gmem.host_read(3 * PAGE, 1)
    gmem.pin(4 * PAGE, PAGE)
    gmem.host_read(5 * PAGE, 1)
    gmem.poison(5 * PAGE)
    ax = page_map(gmem, columns=4)
    image = ax.get_images()[0]
    assert image.get_array().shape == (2, 4)
    names = [STATES[code].name for code in image.get_array().ravel()]
    assert names == [
        *("accepted", "assigned-unaccepted", "private-unallocated", "shared", "pinned", "poisoned"),
        *("shared-unallocated", "shared-unallocated"),
    ]
    colours = [matplotlib.colors.to_hex(image.to_rgba(image.get_array())[i // 4, i % 4]) for i in range(8)]
    assert colours == [STATE_COLOURS[name].lower() for name in names]
    legend = ax.get_legend()
    assert "accepted (12.5 %)" in words(legend)
    assert "shared-unallocated (25.0 %)" in words(legend)
    assert len(words(legend)) == 7  # no state that no page has
    assert ax.get_title(loc="left") == "Page states of 32 KiB: SNP, v5, launching"


@pytest.mark.parametrize("order", ["address", "hilbert"])
def test_every_page_is_drawn_once(order):
    snapshot = take(random_guest("TDX", "v5", 2), label="a guest")
    ax = page_map(snapshot, order=order, file=1)
    drawn = ax.get_images()[0].get_array().compressed()
    planes = snapshot.planes(1)
    assert len(drawn) == planes.n_pages == 700
    private = [code for code, state in enumerate(STATES) if state.name.startswith("private")]
    assert np.isin(drawn, private).sum() <= planes.private.count()
    counts = np.bincount(drawn, minlength=len(STATES))
    alone = state_mix(take(random_guest("TDX", "v5", 2).files[1]))
    assert counts.tolist() == alone["pages"].tolist()
    assert "a guest" in ax.get_title(loc="left")


def test_axes_of_the_callers_own():
    figure, own = plt.subplots()
    assert page_map(random_guest("SNP", "v5", 1), own) is own
    assert own.get_xlabel() == "offset within the row (KiB)"
    assert own.get_ylabel() == "offset in the file (MiB)"
    assert plt.get_fignums() == [figure.number]


def test_a_large_guest_is_drawn_by_fractions():
    gmem = gmemcore.create_vm("SNP", backing="none").create_guest_memfd(5 << 30)
    gmem.set_memory_attributes(4 * PAGE, PAGE, 0)
    gmem.set_memory_attributes(4 << 30, 1 << 30, 0)
    ax = page_map(gmem)
    cells = ax.get_images()[0].get_array()
    cell_pages = cell_size(gmem.n_pages)
    assert cell_pages == 2
    assert cells.count() == gmem.n_pages // 2
    assert (cells.ravel()[:4].tolist(), cells.ravel()[-1]) == ([1, 1, 0.5, 1], 0)
    assert ax.figure.axes[1].get_ylabel() == "fraction private of each 8 KiB"
    assert ax.get_ylabel() == "offset in the file (GiB)"


@pytest.mark.parametrize("cell_pages", [2, 64, 512, 2048])
def test_fractions_page_by_page(cell_pages):
    private = take(random_guest("SNP", "v5", 9)).planes(0).private
    pages = private.bits()
    expected = [pages[i : i + cell_pages].mean() for i in range(0, len(pages), cell_pages)]
    assert fractions(private, cell_pages) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"order": "spiral"}, "known: address, hilbert"),
        ({"columns": 0}, "at least one"),
    ],
)
def test_what_can_not_be_drawn(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        page_map(random_guest("SNP", "v5", 1), **options)
    with pytest.raises(ValueError, match="no file to draw"):
        page_map(gmemcore.create_vm("SNP"))


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
        assert sizes[1:].tolist() == (own["length"] * PAGE).tolist()
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
            gmem.set_memory_attributes(step << 24, 3 * PAGE, 0)
            gmem.fallocate(1, step << 24, 3 * PAGE)
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
    gmem = gmemcore.create_vm("SNP", backing="none").create_guest_memfd(4 * PAGE)
    ax = mappability_over_time(Series([take(gmem, at=at) for at in (0, 0)], "s"))
    assert not ax.get_lines()
    assert ax.get_xlabel() == "time (s)"


def test_memory_of_two_runs(series):
    legacy = gmemcore.create_vm("SNP", "legacy", backing="none")
    gmem = legacy.create_guest_memfd(1 << 30)
    legacy.add_memslot(0, 0, gmem.size, gmem)
    both = Series()
    for step in range(3):
        gmem._host.touch(0, 1 << 18)
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
        with pytest.raises(ValueError, match="of 1 snapshots; at least two"):
            draw(one)
    with pytest.raises(ValueError, match="run 'a' of 1 snapshots"):
        memory_over_time({"a": one})
    with pytest.raises(ValueError, match="no run"):
        memory_over_time({})
    with pytest.raises(ValueError, match="different units"):
        memory_over_time({"a": one, "b": Series(unit="s")})


# ---- what conversions cost -------------------------------------------------------------------------------


def cell(flag="NONE", outcome="OK", effect="KEEP", **others):
    values = {
        **{"abi": "v5", "vm_type": "SNP", "firmware": "today", "phase": "running", "direction": "to_shared"},
        **{"memory": 1 << 30, "range": 2 << 20, "pages_allocated_before": 512, "bytes": "none"},
        **dict.fromkeys(("convert_gbps", "populate_gbps", "first_access_gbps", "ratio")),
        **{"seconds": Seconds(5.12e-6, 6e-6, 0.1, 3), "counters": {}, "verified_bytes": 0},
        **others,
    }
    if outcome != "OK":
        values |= {"seconds": Seconds(None, None, None, 0)}
    return BenchCell(flag=flag, outcome=outcome, effect=effect, **values)


def bench_run(*cells):
    return Run("bench", BenchFirst({}, {"memcpy": 12.0, "memset": 12.1, "xor": 25.0}), list(cells))


def test_the_cube():
    run = bench_run(
        cell(range=4096),
        cell(),
        cell(pages_allocated_before=0, seconds=Seconds(1.0, 1.0, 0, 1)),
        cell("ZERO", effect="ZERO", seconds=Seconds(51.2e-6, 6e-5, 0.1, 3)),
        cell("PRESERVE", "EOPNOTSUPP", None),
        cell("CIPHER", "EINVAL", None),
        cell(vm_type="TDX"),
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
    texts = {text.get_position(): text.get_text() for text in ax.texts}
    assert texts == {(0, 0): "KEEP 10", (1, 0): "ZERO 100", (2, 0): "EOPNOTSUPP", (0, 1): "KEEP 10"}
    (hatched,) = [patch for patch in ax.patches if patch.get_hatch()]
    assert hatched.get_xy() == (1.5, -0.5)
    assert "CIPHER" in ax.get_xlabel()
    assert ax.get_title(loc="left") == "v5, firmware today: the largest range"
    assert "ns a 4 KiB page" in ax.figure.axes[1].get_ylabel()
    assert bench_cube(run, size=4096).get_title(loc="left").endswith("ranges of 4 KiB")


def test_speed_below_the_ceilings():
    run = bench_run(
        *(
            cell(vm_type=vm_type, effect="ZERO", bytes="zero", range=size, convert_gbps=speed)
            for size, speeds in ((4096, (4, 6, 8)), (2 << 20, (20, 30, 50)))
            for vm_type, speed in zip(("SNP", "TDX", "PKVM"), speeds, strict=True)
        ),
        cell(abi="legacy", populate_gbps=2.0),
        cell(abi="v5", populate_gbps=9.0),  # no conversion moves these bytes
    )
    ax = cost_by_range(run)
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert words(ax.get_legend()) == ["zero", "copy across (legacy)"]
    assert lines["zero"].get_data()[0].tolist() == [4096, 2 << 20]
    assert lines["zero"].get_data()[1].tolist() == [6, 30]
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (4, 50)
    assert lines["copy across (legacy)"].get_ydata().tolist() == [2]
    ceilings = sorted(line.get_ydata()[0] for line in ax.get_lines()[2:])
    assert ceilings == [12.0, 12.1, 25.0]
    heights = {text.get_text().strip(): text.xy[1] for text in ax.texts}
    assert heights["memcpy 12"] * 1.05 < heights["memset 12.1"] < heights["xor 25"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["4 KiB", "2 MiB"]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert len(cost_by_range(run, abi="legacy").get_lines()) == 4


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
        cell(backing="memfd", huge_pages=False, bytes="random", convert_gbps=8.192, seconds=slow),
    )
    ax = bench_axes(run)
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "anonymous, huge pages: ZERO to shared (zero)",
        "anonymous, huge pages: populate in place",
        "anonymous, huge pages: legacy to shared, copied across",
        "anonymous, huge pages: SNP to shared, attributes",
        "anonymous, huge pages: SNP to shared, legacy, with the discard",
        "memfd, small pages: KEEP to shared (random)",
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
        "legacy to shared, copied across",
        "SNP to shared, legacy, with the discard",
    ]
    with pytest.raises(ValueError, match="every cell was refused"):
        bench_axes(bench_run(cell("ZERO", "EINVAL", None)))


def test_runs_that_can_not_be_drawn():
    for draw in (bench_cube, bench_axes, cost_by_range):
        with pytest.raises(ValueError, match="must be a run of bench, not of stress"):
            draw(Run("stress", None, []))
        with pytest.raises(ValueError, match="no cell"):
            draw(bench_run())
        with pytest.raises(ValueError, match="no cell of 'v4'; it has v5"):
            draw(bench_run(cell()), abi="v4")
    with pytest.raises(ValueError, match="no cell of the run moves bytes"):
        cost_by_range(bench_run(cell()))
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
        )
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
    for name, picture in PICTURES.items():
        figure = picture.draw(inputs[picture.of]).figure
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
    """A run of replay in which so many of 100 operations were refused."""
    replays = [
        Replay(abi, vm_type, "today", 100, count, 0, [], [], {}, 0.0, 0, None)
        for abi, vm_type, count in refused
    ]
    return Run("replay", None, replays)


def test_refusals_stand_at_their_revision_and_vm_type():
    ax = refusal_map(replay_run(("v5", "SNP", 3), ("v13", "SNP", 0), ("v13", "TDX", 100)))
    assert [text.get_text() for text in ax.get_xticklabels()] == ["SNP", "TDX"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["v5", "v13"]
    share = ax.get_images()[0].get_array()
    assert share.tolist() == [[3, None], [0, 100]]
    assert {text.get_text() for text in ax.texts} == {"3", "0", "100"}
    with pytest.raises(ValueError, match="replayed nowhere"):
        refusal_map(replay_run())
    with pytest.raises(ValueError, match="must be a run of replay, not of bench"):
        refusal_map(bench_run())


def test_conversions_by_size_are_summed_over_what_guests_are():
    run = stress_run(
        {"balloon SNP v5 today": [3, 0, 900], "balloon TDX v5 today": [1], "kexec SNP v5 today": []}
    )
    (line,) = conversion_sizes(run).get_lines()
    assert line.get_label() == "balloon"
    counts = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
    assert {size: n for size, n in counts.items() if not np.isnan(n)} == {4096: 4, 16384: 900}
    with pytest.raises(ValueError, match="no guest asked"):
        conversion_sizes(stress_run({"kexec SNP v5 today": []}))
    with pytest.raises(ValueError, match="must be a run of stress, not of bench"):
        conversion_sizes(bench_run())


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(
        ImportError, match=r"matplotlib, which isn't installed; pip install 'gmemcore\[analysis\]'"
    ):
        run_length_cdf({})


def test_sizes_of_hostile_requests_have_words():
    words = [size_words(size) for size in (4096, 3 << 19, 5 << 50, 1 << 62)]
    assert words == ["4 KiB", "1.5 MiB", "5 PiB", "4 EiB"]
