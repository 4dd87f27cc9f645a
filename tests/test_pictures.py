"""Pictures show what page state says."""

import matplotlib
import numpy as np
import pytest

import gmemcore

matplotlib.use("Agg")

from gmemcore.analysis import page_map
from gmemcore.analysis.pictures import STATES, page_state_codes


def test_a_page_is_named_by_its_most_telling_plane():
    vm = gmemcore.create_vm("SNP", "v5")
    gmem = vm.create_guest_memfd(8 * 4096, 3)
    vm.add_memslot(0, 0, gmem.size, gmem)
    gmem.set_memory_attributes(0, 3 * 4096, 8)
    vm.accept(0, 4096)
    with pytest.raises(gmemcore.GmemError):
        vm.guest_read(4096, 1)
    gmem.host_read(3 * 4096, 1)
    gmem.pin(4 * 4096, 4096)
    gmem.host_read(5 * 4096, 1)
    gmem.poison(5 * 4096)
    names = [*(plane for plane, _, _ in STATES), "unallocated"]
    assert [names[code] for code in page_state_codes(gmem)] == [
        *("accepted", "assigned", "private", "allocated", "pinned", "poisoned"),
        *("unallocated", "unallocated"),
    ]
    ax = page_map(gmem, columns=4)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert "private, accepted" in labels
    assert "poisoned" in labels
    drawn = ax.get_images()[0].get_array()
    assert np.array_equal(drawn.ravel(), page_state_codes(gmem))


def test_pages_that_cannot_be_told_apart_are_refused():
    gmem = gmemcore.create_vm("SNP", backing="none").create_guest_memfd(1 << 33, 2)
    with pytest.raises(ValueError, match="can't be told apart"):
        page_map(gmem)
