"""The comparison with other structures for ranges: all answer alike, and one that does not is noticed."""

import importlib.util

import numpy as np
import pytest

from support.paths import JIT_DISABLED, ROOT

PATH = ROOT / "bench" / "range_maps.py"


@pytest.fixture
def range_maps(monkeypatch):
    spec = importlib.util.spec_from_file_location("range_maps", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = {"N_PAGES": 1 << 14, "RANGES": 16, "SINGLE": 8, "TREE_SHARE": 2, "PINNED_EVERY": 4}
    for name, value in sizes.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_all_structures_answer_alike(range_maps):
    maps, (starts, ends) = range_maps.new_maps(), range_maps.new_ranges()
    range_maps.check_contents(maps, "at the start")
    range_maps.check_answers(maps, starts, ends)
    range_maps.check_contents(maps, "after conversions")


@pytest.mark.parametrize("method", ["set", "any_pinned"])
def test_a_structure_that_answers_otherwise_is_noticed(monkeypatch, range_maps, method):
    maps, (starts, ends) = range_maps.new_maps(), range_maps.new_ranges()
    monkeypatch.setattr(range_maps.Roaring, method, lambda self, start, end, *private: False)
    with pytest.raises(AssertionError):
        range_maps.check_answers(maps, starts, ends)


def test_contents_that_differ_are_noticed(range_maps):
    maps = range_maps.new_maps()
    maps[2].private[5] ^= True
    with pytest.raises(AssertionError, match="NumPy and gmemcore differ"):
        range_maps.check_contents(maps, "here")
    assert np.array_equal(maps[1].contents(), maps[0].contents())


@pytest.mark.skipif(JIT_DISABLED, reason="a timing of kernels that aren't compiled says nothing")
def test_every_line_has_a_ratio(range_maps, capsys):
    maps, (starts, ends) = range_maps.new_maps(), range_maps.new_ranges()
    range_maps.compare_works(maps, starts, ends, 1)
    range_maps.compare_huge(1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 * 2 * 3 + 3
    assert sum("at least 1:" in line for line in lines) == 6
