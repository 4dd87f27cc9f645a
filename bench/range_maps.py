"""Page state beside other structures for ranges: pyroaring's BitMap, a NumPy bool map and intervaltree.

A guest of 64 GiB, attributes only, of more than 200,000 runs. Random ranges of 1 to 64 pages become private
and shared again, in single calls and as a batch. Three works, each the same for every structure and with the
results compared before and after the timing:

conversion   what one conversion answers: refused where a page is pinned (1 % of the ranges), else set, and
             how many pages changed, how many 2 MiB blocks were split or merged
changed      set, and how many pages changed
set          set, and nothing else is asked

Each structure is used as its documentation advises: ``add_range``, ``remove_range`` and
``range_cardinality``; slices and, batched, one array of all pages; ``chop`` and ``add``. Ranges of a batch
lie in blocks of their own, without which nothing but a loop could answer what each of them changed. A
structure without a batch that answers runs its loop.

The bar is the conversion, single and batched: gmemcore must be ahead of each. The other works, and one huge
interval, which is another structure's game, are reported: gmemcore answers everything whatever is asked. A
figure is the median of paired ratios, time of the other over gmemcore's: above 1 is ahead.

Run: ``python bench/range_maps.py [--pairs 20]``; exit status 0 if the bar is met, else 1.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from intervaltree import Interval, IntervalTree
from pyroaring import BitMap

import gmemcore
from gmemcore.benchmark.pairs import paired, ratio, verdict
from gmemcore.errors import GmemError
from gmemcore.results.statistics import median
from gmemcore.uapi import PAGE_SIZE, GuestMemfdFlag, MemoryAttribute

N_PAGES = 16 << 20
BLOCK = 512
STRIDE, FILLED = 128, 64
"""Runs at the start: pages 0 to 63 of every 128 are private."""
RANGES = 20_000
SINGLE, TREE_SHARE = 2_000, 20
"""Single calls of one sample; the tree makes a call for 20 of the others', in batches for 200."""
PINNED_EVERY = 100
PRIVATE = int(MemoryAttribute.PRIVATE)
WORKS = ("conversion", "changed", "set")

Answer = tuple[int, int, int] | None
"""Pages changed, blocks split, blocks merged; None: refused. Works that ask for less answer less."""


class Gmemcore:
    """The public API of an attributes-only guest; what is answered comes with every work."""

    name = "gmemcore"

    def __init__(self, starts: Sequence[int]) -> None:
        flags = GuestMemfdFlag.MMAP | GuestMemfdFlag.INIT_SHARED
        self.vm = gmemcore.create_vm("SNP", "v5", backing="none")
        self.gmem = self.vm.create_guest_memfd(N_PAGES * PAGE_SIZE, flags)
        offsets = np.asarray(starts) * PAGE_SIZE
        self.gmem.set_memory_attributes_many(offsets, np.full(len(offsets), FILLED * PAGE_SIZE), PRIVATE)

    def pin(self, page: int) -> None:
        self.gmem.pin(page * PAGE_SIZE, PAGE_SIZE)

    def convert(self, start: int, end: int, private: bool) -> object:
        try:
            return self.gmem.set_memory_attributes(
                start * PAGE_SIZE, (end - start) * PAGE_SIZE, PRIVATE if private else 0
            )
        except GmemError:
            return None

    changed = set = convert

    def read(self, result: object) -> Answer:
        if result is None:
            return None
        counters = result.counters
        return counters.pages_changed, counters.blocks_2m_split, counters.blocks_2m_merged

    def convert_many(self, starts: np.ndarray, ends: np.ndarray, private: bool) -> object:
        return self.gmem.set_memory_attributes_many(
            starts * PAGE_SIZE, (ends - starts) * PAGE_SIZE, PRIVATE if private else 0
        )

    changed_many = set_many = convert_many

    def read_many(self, result: object) -> list[Answer]:
        names = ("pages_changed", "blocks_2m_split", "blocks_2m_merged")
        columns = [result.counters[name].tolist() for name in names]
        refused = result.errno != 0
        return [
            None if no else answer for no, answer in zip(refused, zip(*columns, strict=True), strict=True)
        ]

    def contents(self) -> np.ndarray:
        return self.gmem.plane("private")

    def n_runs(self) -> int:
        return len(self.gmem.runs())


class Other:
    """What the other structures share: the order of a conversion, and loops where there is no batch."""

    def convert(self, start: int, end: int, private: bool) -> Answer:
        """A conversion's answer, out of counts of the range and of its block, which holds all of it."""
        if private and self.any_pinned(start, end):
            return None
        block = start // BLOCK * BLOCK
        before = self.count(block, block + BLOCK)
        had = self.count(start, end)
        self.set(start, end, private)
        changed = end - start - had if private else had
        after = before + changed if private else before - changed
        was_mixed, is_mixed = 0 < before < BLOCK, 0 < after < BLOCK
        return changed, is_mixed and not was_mixed, was_mixed and not is_mixed

    def changed(self, start: int, end: int, private: bool) -> int:
        had = self.count(start, end)
        self.set(start, end, private)
        return end - start - had if private else had

    def read(self, result: Answer) -> Answer:
        return result

    read_many = staticmethod(list)

    def _loop(self, one: Callable, starts: np.ndarray, ends: np.ndarray, private: bool) -> list:
        return [one(start, end, private) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]

    def convert_many(self, starts: np.ndarray, ends: np.ndarray, private: bool) -> list:
        return self._loop(self.convert, starts, ends, private)

    def changed_many(self, starts: np.ndarray, ends: np.ndarray, private: bool) -> list:
        return self._loop(self.changed, starts, ends, private)

    def set_many(self, starts: np.ndarray, ends: np.ndarray, private: bool) -> object:
        return self._loop(self.set, starts, ends, private)


class Roaring(Other):
    """A compressed bitmap of private pages and one of pinned pages.

    Its loop of ``add_range`` is its fastest batch: ``update`` with ranges and a union with a bitmap of all
    pages take longer.
    """

    name = "pyroaring"

    def __init__(self, starts: Sequence[int]) -> None:
        self.private, self.pinned = BitMap(), BitMap()
        for start in starts:
            self.private.add_range(start, start + FILLED)

    def pin(self, page: int) -> None:
        self.pinned.add(page)

    def any_pinned(self, start: int, end: int) -> bool:
        return self.pinned.range_cardinality(start, end) > 0

    def count(self, start: int, end: int) -> int:
        return self.private.range_cardinality(start, end)

    def set(self, start: int, end: int, private: bool) -> None:
        if private:
            self.private.add_range(start, end)
        else:
            self.private.remove_range(start, end)

    def contents(self) -> np.ndarray:
        found = np.zeros(N_PAGES, np.bool_)
        found[np.frombuffer(self.private.to_array(), np.uint32)] = True
        return found


class BoolMap(Other):
    """One byte per page, and batched one array of all pages of all ranges."""

    name = "NumPy"

    def __init__(self, starts: Sequence[int]) -> None:
        self.private, self.pinned = np.zeros(N_PAGES, np.bool_), np.zeros(N_PAGES, np.bool_)
        for start in starts:
            self.private[start : start + FILLED] = True

    def pin(self, page: int) -> None:
        self.pinned[page] = True

    def any_pinned(self, start: int, end: int) -> bool:
        return bool(self.pinned[start:end].any())

    def count(self, start: int, end: int) -> int:
        return int(np.count_nonzero(self.private[start:end]))

    def set(self, start: int, end: int, private: bool) -> None:
        self.private[start:end] = private

    @staticmethod
    def _pages(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All pages of all ranges, and where each range begins among them."""
        sizes = ends - starts
        firsts = np.cumsum(sizes) - sizes
        return np.arange(firsts[-1] + sizes[-1]) + np.repeat(starts - firsts, sizes), firsts

    def set_many(self, starts: np.ndarray, ends: np.ndarray, private: bool) -> None:
        pages, _ = self._pages(starts, ends)
        self.private[pages] = private

    def changed_many(self, starts: np.ndarray, ends: np.ndarray, private: bool) -> np.ndarray:
        pages, firsts = self._pages(starts, ends)
        had = np.add.reduceat(self.private[pages], firsts, dtype=np.int64)
        self.private[pages] = private
        return ends - starts - had if private else had

    def convert_many(self, starts: np.ndarray, ends: np.ndarray, private: bool) -> object:
        pages, firsts = self._pages(starts, ends)
        refused = np.zeros(len(starts), np.bool_)
        if private:
            refused = np.logical_or.reduceat(self.pinned[pages], firsts)
            starts, ends = starts[~refused], ends[~refused]
            pages, firsts = self._pages(starts, ends)
        blocks = self.private.reshape(-1, BLOCK)
        own = starts // BLOCK  # of each range, and no other's
        before = np.count_nonzero(blocks[own], axis=1)
        had = np.add.reduceat(self.private[pages], firsts, dtype=np.int64)
        self.private[pages] = private
        changed = ends - starts - had if private else had
        after = before + changed if private else before - changed
        was_mixed, is_mixed = (before > 0) & (before < BLOCK), (after > 0) & (after < BLOCK)
        return refused, changed, is_mixed & ~was_mixed, was_mixed & ~is_mixed

    def read_many(self, result: object) -> list[Answer]:
        refused, *columns = result
        answers = zip(*(column.astype(int).tolist() for column in columns), strict=True)
        return [None if no else next(answers) for no in refused.tolist()]

    def contents(self) -> np.ndarray:
        return self.private


class Tree(Other):
    """Private intervals and pinned ones; `chop` cuts a range out of what it overlaps."""

    name = "intervaltree"

    def __init__(self, starts: Sequence[int]) -> None:
        self.private = IntervalTree(Interval(start, start + FILLED) for start in starts)
        self.pinned = IntervalTree()

    def pin(self, page: int) -> None:
        self.pinned.addi(page, page + 1)

    def any_pinned(self, start: int, end: int) -> bool:
        return self.pinned.overlaps(start, end)

    def count(self, start: int, end: int) -> int:
        found = self.private.overlap(start, end)
        return sum(min(each.end, end) - max(each.begin, start) for each in found)

    def set(self, start: int, end: int, private: bool) -> None:
        self.private.chop(start, end)
        if private:
            self.private.addi(start, end)

    def contents(self) -> np.ndarray:
        found = np.zeros(N_PAGES, np.bool_)
        for each in self.private:
            found[each.begin : each.end] = True
        return found


def new_maps() -> list:
    """Every structure, in the same state."""
    starts = range(0, N_PAGES, STRIDE)
    return [kind(starts) for kind in (Gmemcore, Roaring, BoolMap, Tree)]


def new_ranges() -> tuple[np.ndarray, np.ndarray]:
    """Ranges in random order, each within a block of its own."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 65, RANGES)
    starts = rng.permutation(N_PAGES // BLOCK)[:RANGES] * BLOCK + rng.integers(0, BLOCK - 64, RANGES)
    return starts, starts + sizes


def check_contents(maps: list, when: str) -> None:
    """All structures say the same of every page."""
    expected = maps[0].contents()
    for other in maps[1:]:
        assert np.array_equal(other.contents(), expected), f"{when}: {other.name} and gmemcore differ"


def check_answers(maps: list, starts: np.ndarray, ends: np.ndarray) -> None:
    """All structures answer alike, single and batched, to private and back; 1 % is pinned on the way."""
    for private in (True, False):
        expected = None
        for each in maps:
            answers = each.read_many(each.convert_many(starts, ends, private))
            expected = expected or answers
            assert answers == expected, f"{each.name} answers otherwise"
    for each in maps:
        for start in starts[::PINNED_EVERY].tolist():
            each.pin(start)
    for private in (True, False):
        batched = [each.read_many(each.convert_many(starts, ends, private)) for each in maps[:-1]]
        assert all(answers == batched[0] for answers in batched)
        assert batched[0].count(None) == (RANGES // PINNED_EVERY if private else 0)
    some = slice(0, SINGLE)
    pairs = [*zip(starts[some].tolist(), ends[some].tolist(), strict=True)]
    for private in (True, False):
        single = [[each.read(each.convert(*pair, private)) for pair in pairs] for each in maps[:-1]]
        assert all(answers == single[0] for answers in single)
    few = pairs[: SINGLE // TREE_SHARE]
    for private in (True, False):  # the tree, slow as it is, answers some of them
        single = [[each.read(each.convert(*pair, private)) for pair in few] for each in maps]
        assert all(answers == single[0] for answers in single)
    tree = maps[-1]
    tree.convert_many(starts, ends, False)


def seconds_of_single(each: object, work: str, pairs: Sequence[tuple[int, int]]) -> float:
    """Seconds a range: to private and to shared, a call each."""
    one = getattr(each, work)
    began = time.perf_counter()
    for private in (True, False):
        for start, end in pairs:
            one(start, end, private)
    return (time.perf_counter() - began) / (2 * len(pairs))


def seconds_of_batch(each: object, work: str, starts: np.ndarray, ends: np.ndarray) -> float:
    """Seconds a range, all ranges in one batch to private and one to shared."""
    many = getattr(each, f"{work}_many")
    began = time.perf_counter()
    for private in (True, False):
        many(starts, ends, private)
    return (time.perf_counter() - began) / (2 * len(starts))


def compare(what: str, runs: dict[str, Callable[[], float]], pairs: int, bar: float | None) -> bool:
    """Print a line for each other structure; returns whether all bars are met."""
    seconds = paired(runs, pairs)
    own, *others = runs
    met = True
    for other in others:
        times = [median(seconds[name]) * 1e9 for name in (other, own)]
        line = f"{what:20} {other:12} {times[0]:9.0f} ns / {own} {times[1]:6.0f} ns"
        met &= verdict(line, ratio(seconds, other, own), least=bar)
    return met


def compare_works(maps: list, starts: np.ndarray, ends: np.ndarray, pairs: int) -> bool:
    """Every work, single and batched."""
    single = [*zip(starts[:SINGLE].tolist(), ends[:SINGLE].tolist(), strict=True)]
    met = True
    for work in WORKS:
        method = "convert" if work == "conversion" else work
        bar = 1.0 if work == "conversion" else None
        singles, batches = {}, {}
        for each in maps:
            share = TREE_SHARE if isinstance(each, Tree) else 1
            few = max(len(starts) // (share * 10), 1) if share > 1 else len(starts)
            singles[each.name] = partial(seconds_of_single, each, method, single[: SINGLE // share])
            batches[each.name] = partial(seconds_of_batch, each, method, starts[:few], ends[:few])
        met &= compare(f"{work}, single", singles, pairs, bar)
        met &= compare(f"{work}, batched", batches, pairs, bar)
    return met


def compare_huge(pairs: int) -> None:
    """One interval over all of the guest: reported."""
    maps = [kind(()) for kind in (Gmemcore, Roaring, BoolMap, Tree)]
    whole = [(0, N_PAGES)]
    runs = {each.name: partial(seconds_of_single, each, "set", whole) for each in maps}
    compare("set, all of it", runs, pairs, None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20)
    arguments = parser.parse_args()
    gmemcore.warmup()
    maps, (starts, ends) = new_maps(), new_ranges()
    check_contents(maps, "at the start")
    check_answers(maps, starts, ends)
    check_contents(maps, "after conversions")
    assert maps[0].n_runs() >= 100_000
    print(f"{maps[0].n_runs():,} runs, {N_PAGES:,} pages; ratios above 1: gmemcore is ahead")
    met = compare_works(maps, starts, ends, arguments.pairs)
    check_contents(maps, "after timing")
    compare_huge(arguments.pairs)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
