"""The same work done naively, with NumPy, and by a conversion.

Contents are compared before anything is timed. Sizes are tiny by default, because the naive way is slow;
GMEMCORE_BENCH_SIZE, such as ``64m``, sets another one.
"""

import os
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from gmemcore import warmup
from gmemcore.benchmark.axes import Setting
from gmemcore.benchmark.cases import find, table
from gmemcore.benchmark.expected import (
    Reference,
    contents_after,
    contents_before,
    key_stream,
    pieces,
)
from gmemcore.benchmark.memory import Memory
from gmemcore.benchmark.scene import Scene
from gmemcore.units import parse_size

SIZE = parse_size(os.environ.get("GMEMCORE_BENCH_SIZE", "64k"))
EFFECTS = ("ZERO", "ENCRYPT", "DECRYPT", "SCRAMBLE")
MASK = (1 << 64) - 1
REFERENCE = Reference()


@cache
def memory():
    warmup()
    return Memory(SIZE)


def case_of(effect):
    """A case whose conversion has the effect on all memory."""
    cases = table("two-caps", firmware="cipher", memory=SIZE, ranges=[SIZE])
    return find(cases, effect=effect, refused=False, pages_allocated_before=SIZE // 4096)


def words_before(case):
    parts = [REFERENCE.words(contents_before(case), start, end) for start, end in pieces(0, SIZE)]
    return np.concatenate(parts)


# ---- four ways: each returns what prepares a run, what runs, and what reads the words afterwards ----------


class Naive:
    """A loop over words in Python."""

    def __init__(self, case):
        self.case = case

    def prepare(self):
        self.values = words_before(self.case).tolist()

    def run(self):
        values, operation = self.values, self.case.bytes
        for i in range(len(values)):
            if operation == "zero":
                values[i] = 0
            elif operation == "xor":
                values[i] ^= self.key(i)
            else:
                values[i] ^= self.key(i) | 1

    @staticmethod
    def key(i):
        z = (i + 1) * 0x9E37_79B9_7F4A_7C15 & MASK
        z = (z ^ z >> 30) * 0xBF58_476D_1CE4_E5B9 & MASK
        z = (z ^ z >> 27) * 0x94D0_49BB_1331_11EB & MASK
        return z ^ z >> 31

    def words(self):
        return np.array(self.values, np.uint64)


class WithNumpy(Naive):
    """Whole arrays at a time, the key stream made first."""

    def prepare(self):
        self.array = words_before(self.case)

    def run(self):
        operation = self.case.bytes
        if operation == "zero":
            self.array.fill(0)
        elif operation == "xor":
            np.bitwise_xor(self.array, key_stream(0, 0, SIZE), out=self.array)
        else:
            np.bitwise_xor(self.array, key_stream(0, 0, SIZE) | np.uint64(1), out=self.array)

    def words(self):
        return self.array


class Conversion(Naive):
    """The public API: one call."""

    def prepare(self):
        self.scene = Scene(self.case, memory(), REFERENCE)
        self.scene.prepare()

    def run(self):
        self.scene.convert()

    def words(self):
        return memory().side(0).words


class OnTwoThreads(Conversion):
    """The same call, with two threads where the range is long enough."""

    def __init__(self, case):
        super().__init__(replace(case, setting=Setting(threads=2)))


WAYS = {"naive": Naive, "numpy": WithNumpy, "kernel": Conversion, "threads": OnTwoThreads}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("effect", EFFECTS)
def test_effect(benchmark, effect, way):
    case = case_of(effect)
    work = way(case)
    work.prepare()
    work.run()
    words = work.words()
    for start, end in pieces(0, SIZE):
        found = words[start // 8 : end // 8]
        REFERENCE.check(found, contents_after(case), start, contents_before(case), f"{way.__name__} {effect}")
    benchmark.group = f"{effect}, {SIZE} bytes"
    benchmark.pedantic(work.run, setup=work.prepare, rounds=5)
    if benchmark.stats is not None:  # None under --benchmark-disable and pytest-xdist
        benchmark.extra_info["gbps"] = SIZE / benchmark.stats.stats.median / 1e9


@pytest.mark.parametrize("way", ["one by one", "in a batch"])
@pytest.mark.parametrize("effect", ["KEEP", "ZERO"])
def test_pages(benchmark, effect, way):
    """One request per page."""
    cases = table("v5", "SNP", memory=SIZE, ranges=[4096])
    case = find(cases, effect=effect, direction="to_shared", refused=False)
    scene = Scene(case, memory(), REFERENCE, SIZE // case.range)
    flag = int(case.key.flag)

    def one_by_one():
        for offset in range(0, SIZE, case.range):
            scene.gmem.set_memory_attributes(offset, case.range, 0, flag)

    run = one_by_one if way == "one by one" else scene.convert
    scene.prepare()
    run()
    scene.check()
    benchmark.group = f"{effect}, {SIZE // case.range} pages"
    benchmark.pedantic(run, setup=scene.prepare, rounds=5)
