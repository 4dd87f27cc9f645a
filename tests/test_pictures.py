"""Pictures show what page state says: the artists, their data, labels and legends, not their pixels."""

import matplotlib
import numpy as np
import pytest
from guests import PAGE, random_guest

import gmemcore

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from gmemcore.analysis import STATES, page_map, state_mix, take
from gmemcore.analysis.hilbert import hilbert
from gmemcore.analysis.pictures import cell_size, fractions
from gmemcore.analysis.style import STATE_COLOURS


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
    assert "shared-unallocated (25 %)" in words(legend)
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
