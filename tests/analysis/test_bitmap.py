"""Bitmaps of pages against arrays of booleans."""

import numpy as np
import pytest

from gmemcore.analysis.bitmap import Bitmap
from gmemcore.engine.packed import existing_bits


def bitmap(pages):
    return Bitmap.from_edges(len(pages), np.flatnonzero(np.diff(pages.astype(np.int8), prepend=0)))


def random_pages(rng, n):
    if rng.integers(3) == 0:
        return rng.random(n) < rng.random()
    pages = np.zeros(n, bool)
    for _ in range(int(rng.integers(5))):
        start, end = sorted(rng.integers(0, n + 1, 2))
        pages[start:end] ^= True
    return pages


def check(made, pages):
    """Everything that a bitmap says, against the pages one by one."""
    assert np.array_equal(made.bits(), pages)
    assert made.count() == pages.sum()
    assert made.first == pages[0]
    blocks = [pages[i : i + 512] for i in range(0, len(pages), 512)]
    assert made.counts().tolist() == [block.sum() for block in blocks]
    assert made.mixed.tolist() == [i for i, block in enumerate(blocks) if block.any() and not block.all()]
    assert not np.any(made.lines & ~existing_bits(made.n_pages, made.mixed))
    assert not made.full[made.mixed].any()
    assert made.edges().tolist() == [i for i in range(1, len(pages)) if pages[i] != pages[i - 1]]
    rebuilt = np.zeros(len(pages), bool)
    for start, end in made.ranges():
        assert pages[start:end].all()
        assert start == 0 or not pages[start - 1]
        assert end == len(pages) or not pages[end]
        rebuilt[start:end] = True
    assert np.array_equal(rebuilt, pages)


@pytest.mark.parametrize("seed", range(60))
def test_against_booleans(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.choice([1, 63, 64, 511, 512, 513, 1024, int(rng.integers(1, 3000))]))
    one, other = random_pages(rng, n), random_pages(rng, n)
    a, b = bitmap(one), bitmap(other)
    check(a, one)
    check(a & b, one & other)
    check(a | b, one | other)
    check(a ^ b, one ^ other)
    check(~a, ~one)
    start, end = sorted(rng.integers(0, n + 1, 2).tolist())
    assert np.array_equal(a.bits(start, end), one[start:end])
    places = rng.integers(0, n + 1, 7)
    assert a.counts_before(places).tolist() == [one[:place].sum() for place in places]


@pytest.mark.parametrize("value", [False, True])
def test_uniform(value):
    check(Bitmap.uniform(1000, value), np.full(1000, value))


def test_groups_of_blocks():
    pages = np.zeros(5 * 512 + 7, bool)
    pages[512 : 3 * 512] = True
    pages[4 * 512] = True
    all_in, all_out = bitmap(pages).uniform_blocks(2)
    assert all_in.tolist() == [False, False]
    assert all_out.tolist() == [False, False]
    all_in, all_out = bitmap(pages).uniform_blocks(1)
    assert all_in.tolist() == [False, True, True, False, False]
    assert all_out.tolist() == [True, False, False, True, False]


def test_edges_come_in_pieces():
    """More blocks than are unpacked together, with an edge at the seam and one just beside it."""
    seam = 4096 * 512
    made = Bitmap.from_edges(2 * seam + 5, [5, seam - 1, seam, seam + 1, 2 * seam])
    assert made.edges().tolist() == [5, seam - 1, seam, seam + 1, 2 * seam]
    assert [len(piece) for piece in made.edge_chunks()] == [2, 2, 1]


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match="10 and 11 pages"):
        Bitmap.uniform(10, True) & Bitmap.uniform(11, True)
