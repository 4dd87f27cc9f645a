"""Streams: the same operations whatever the chunks, cut, joined, repeated and mixed."""

from itertools import count

import numpy as np
import pytest

from gmemcore.errors import InvalidArgumentError
from gmemcore.workload.layout import Layout, Region
from gmemcore.workload.operations import OPERATION, empty_operations
from gmemcore.workload.seeds import Stream
from gmemcore.workload.streams import CHUNK, concatenate, limit, mix, rechunk, repeat


def numbered(kind, n):
    """N operations that tell where they are from: guest is the kind, gpa the number."""
    ops = empty_operations(n)
    ops["guest"] = kind
    ops["gpa"] = np.arange(n)
    return ops


def cut(ops, *sizes):
    """The operations in chunks of these sizes in turn, empty ones too."""
    at, i = 0, 0
    while at < len(ops):
        size = sizes[i % len(sizes)]
        yield ops[at : at + size]
        at, i = at + size, i + 1


def endless(kind, size):
    return (numbered(kind, size) for _ in count())


def joined(stream):
    parts = list(stream)
    return np.concatenate(parts) if parts else empty_operations(0)


@pytest.mark.parametrize("sizes", [(1,), (3, 0, 5), (1000,), (0, 7)])
@pytest.mark.parametrize("chunk", [1, 4, 99, 100, 101])
def test_rechunk_gives_the_same_operations_in_equal_chunks(sizes, chunk):
    ops = numbered(1, 100)
    parts = list(rechunk(cut(ops, *sizes), chunk))
    assert np.array_equal(joined(parts), ops)
    assert {len(part) for part in parts[:-1]} <= {chunk}
    assert 1 <= len(parts[-1]) <= chunk


def test_rechunk_of_nothing_is_nothing():
    assert list(rechunk([])) == []
    assert list(rechunk([empty_operations(0)])) == []
    assert len(next(rechunk(endless(0, 100)))) == CHUNK
    with pytest.raises(InvalidArgumentError, match="must be 1 or more operations, not 0"):
        rechunk([], 0)


@pytest.mark.parametrize("n", [0, 1, 9, 10, 11, 100, 1000, -1])
def test_limit_cuts_after_n_and_asks_for_no_more(n):
    asked = []

    def stream():
        for i in range(10):
            asked.append(i)
            yield numbered(i, 10)

    assert len(joined(limit(stream(), n))) == max(min(n, 100), 0)
    assert len(asked) == -(-max(min(n, 100), 0) // 10)


def test_concatenate_and_repeat_go_on():
    assert joined(concatenate([numbered(1, 3)], [], [numbered(2, 2)]))["guest"].tolist() == [1, 1, 1, 2, 2]
    assert joined(repeat(lambda turn: [numbered(turn, 2)], 3))["guest"].tolist() == [0, 0, 1, 1, 2, 2]
    assert joined(limit(repeat(lambda turn: [numbered(turn, 2)]), 7))["guest"].tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
    ]
    assert len(joined(repeat(lambda turn: [], 5))) == 0
    with pytest.raises(InvalidArgumentError, match=r"turn 0 .* never end"):
        joined(repeat(lambda turn: [empty_operations(0)]))


@pytest.mark.parametrize("sizes", [(1,), (7, 0, 1000), (100_000,)])
def test_mix_keeps_the_order_within_and_the_proportions_between(sizes):
    parts = [numbered(0, 20_000), numbered(1, 20_000), numbered(2, 500)]
    mixed = joined(mix([cut(part, *sizes) for part in parts], [1, 3, 0.5], seed=5))
    assert mixed.dtype == OPERATION
    assert len(mixed) == 40_500
    for kind, part in enumerate(parts):
        assert np.array_equal(mixed[mixed["guest"] == kind], part)
    # While all three go on: 1 to 3 to a half.
    head = np.bincount(mixed["guest"][:4000], minlength=3) / 4000
    assert np.abs(head - np.array([2, 6, 1]) / 9).max() < 0.04
    # The third has ended, the others go on as 1 to 3.
    third_ends = int(np.flatnonzero(mixed["guest"] == 2)[-1])
    rest = np.bincount(mixed["guest"][third_ends + 1 : third_ends + 10_001], minlength=3) / 10_000
    assert np.abs(rest - np.array([0.25, 0.75, 0])).max() < 0.03


def test_mix_is_the_same_for_any_chunks_and_another_for_another_seed():
    parts = [numbered(kind, 3000 + 500 * kind) for kind in range(4)]
    first = joined(mix([cut(part, 1000) for part in parts], seed=1))
    for sizes in ((1,), (13, 0, 4096), (64_000,)):
        assert np.array_equal(joined(mix([cut(part, *sizes) for part in parts], seed=Stream(1))), first)
    assert not np.array_equal(joined(mix([[part] for part in parts], seed=2)), first)


def test_mix_of_endless_streams_goes_on():
    mixed = joined(limit(mix([endless(0, 10), endless(1, 7)]), 50_000))
    assert abs(int(mixed["guest"].sum()) - 25_000) < 600


def test_mix_of_one_is_itself_and_of_empty_ones_nothing():
    assert np.array_equal(joined(mix([[numbered(3, 10)]])), numbered(3, 10))
    assert len(joined(mix([[], [empty_operations(0)]]))) == 0


@pytest.mark.parametrize(
    ("n", "weights"),
    [(0, None), (2, [1]), (2, [1, 0]), (2, [1, -1]), (1, [float("inf")]), (1, [float("nan")])],
)
def test_mix_refuses_weights_that_say_nothing(n, weights):
    with pytest.raises(InvalidArgumentError, match="a number above 0 for each"):
        mix([[] for _ in range(n)], weights)


def test_a_pc_has_its_hole_below_4_gib():
    gib = 1 << 30
    assert [(region.gpa, region.size) for region in Layout.pc(2 * gib).regions] == [(0, 2 * gib)]
    assert [(r.gpa, r.size) for r in Layout.pc(64 * gib).regions] == [(0, 2 * gib), (4 * gib, 62 * gib)]
    assert Layout.pc(0xB000_0000).regions[1].size == 0x3000_0000
    assert Layout.pc(64 * gib).size == 64 * gib


def test_parts_of_a_layout_tile_it():
    layout = Layout((Region(0, 40960), Region(1 << 32, 20480, True)))
    parts = [layout.part(low, high) for low, high in ((0, 0.5), (0.5, 0.9), (0.9, 1))]
    assert [[(r.gpa, r.size, r.private) for r in part.regions] for part in parts] == [
        [(0, 28672, False)],
        [(28672, 12288, False), (1 << 32, 12288, True)],
        [(4294979584, 8192, True)],
    ]
    for low, high in ((0.5, 0.5), (-0.1, 1), (0, 1.5), (0.6, 0.5)):
        with pytest.raises(InvalidArgumentError, match="of a layout"):
            layout.part(low, high)
    with pytest.raises(InvalidArgumentError, match="regions, not 0"):
        layout.part(0.01, 0.02)
