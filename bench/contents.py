"""The bars of deferred contents, each a ratio to a primitive or to eager contents in the same run.

uniform  ENCRYPT and DECRYPT of 1 TiB with contents, by memset of 32 MiB: at most 2 each
ranges   a million random ranges of 1 to 64 pages in 64 GiB with contents, PRESERVE after launch with the
         firmware that can encrypt, by a bare bitmap: at most 6
reading  reading back, as guest and as host, everything that was written: at least 0.8 times the rate of eager
         contents
memory   what 100,000 written pages of 64 GiB take: at most those pages and 5 %

Run: ``python bench/contents.py [BAR...] [--pairs 20]``; exit status 0 if every bar asked for is met, else 1.
``bench/fleet.py`` has the bar of fleets.
"""

import argparse
import sys
from functools import partial

import numpy as np
from bars import GIB, PAGE, PRIVATE, TIB, memset_of_32m, resident, set_ranges

import gmemcore
from gmemcore.benchmark.pairs import paired, ratio, seconds_of, verdict
from gmemcore.engine.host import keep_freed_memory
from gmemcore.results.statistics import quantile

PRESERVE = 2
MIB = 1 << 20


def running(size: int, contents: str = "deferred", backing: str = "anonymous"):
    """A running SNP guest whose firmware can encrypt in place, and its file, which starts shared."""
    vm = gmemcore.create_vm("SNP", "two-caps", "cipher", backing=backing, contents=contents)
    gmem = vm.create_guest_memfd(size, 3)
    vm.add_memslot(0, 0, size, gmem)
    vm.launch_finish()
    return vm, gmem


def uniform(pairs: int) -> bool:
    """ENCRYPT and DECRYPT of 1 TiB, of which 1,000 pages are stored."""
    vm, gmem = running(TIB)
    for page in range(1000):
        gmem.host_write(page * 37 * PAGE, b"0xbeef")
    ways = {"ENCRYPT": PRIVATE, "DECRYPT": 0}

    def run(way: str) -> float:
        gmem.set_memory_attributes(0, TIB, PRIVATE - ways[way], PRESERVE)
        return seconds_of(lambda: gmem.set_memory_attributes(0, TIB, ways[way], PRESERVE))

    timed = {way: partial(run, way) for way in ways}
    seconds = paired({**timed, "memset": memset_of_32m()}, 2 * pairs)
    memset, met = quantile(seconds["memset"], 0.5) * 1e3, True
    for way in ways:
        own = quantile(seconds[way], 0.5) * 1e3
        what = f"{way} of 1t, {own:.2f} ms, by memset of 32m ({memset:.2f} ms)"
        met &= verdict(what, ratio(seconds, way, "memset"), most=2)
    gmem.set_memory_attributes(0, TIB, 0, PRESERVE)
    assert gmem.host_read(999 * 37 * PAGE, 6) == b"0xbeef"
    assert gmem.stored == 1000 * PAGE
    vm.close()
    return met


def ranges(pairs: int) -> bool:
    """A million random ranges; next to them, the same without contents."""
    n, size, draw = 1_000_000, 64 * GIB, np.random.default_rng(1)
    lengths = draw.integers(1, 65, n).astype(np.uint64)
    starts = draw.integers(0, size // PAGE - 64, n).astype(np.uint64)
    columns = starts * np.uint64(PAGE), lengths * np.uint64(PAGE)
    attributes = (draw.integers(0, 2, n) * PRIVATE).astype(np.uint64)
    bits = np.zeros(size // PAGE // 64, np.uint64)
    files = {"deferred": running(size)[1], "without": running(size, "eager", "none")[1]}

    def convert(gmem) -> float:
        return seconds_of(lambda: gmem.set_memory_attributes_many(*columns, attributes, PRESERVE).errno)

    runs = {name: partial(convert, gmem) for name, gmem in files.items()}
    runs["bare"] = lambda: seconds_of(lambda: set_ranges(bits, starts, starts + lengths, attributes))
    seconds = paired(runs, pairs, warmup=2)
    times = {name: f"{quantile(taken, 0.5) / n * 1e9:.1f} ns" for name, taken in seconds.items()}
    what = f"ranges without contents, {times['without']}, by a bare bitmap ({times['bare']})"
    verdict(what, ratio(seconds, "without", "bare"))
    what = f"ranges with deferred contents, {times['deferred']}, by a bare bitmap ({times['bare']})"
    return verdict(what, ratio(seconds, "deferred", "bare"), most=6)


def reading(pairs: int) -> bool:
    """Read 256 MiB that were written by the guest and by the host, in pieces of 1 MiB."""
    size, met = 256 * MIB, True
    guests = {contents: running(size, contents) for contents in ("deferred", "eager")}
    data = np.random.default_rng(1).bytes(MIB)
    for vm, gmem in guests.values():
        gmem.set_memory_attributes(0, size // 2, PRIVATE, PRESERVE)
        for at in range(0, size, MIB):
            (vm.guest_write if at < size // 2 else gmem.host_write)(at, data)

    def read(contents: str, side: str) -> float:
        vm, gmem = guests[contents]
        call = vm.guest_read if side == "guest" else gmem.host_read
        places = range(0, size // 2, MIB) if side == "guest" else range(size // 2, size, MIB)
        assert call(places[0], MIB) == data
        return seconds_of(lambda: [call(at, MIB) for at in places])

    for side in ("guest", "host"):
        seconds = paired({contents: partial(read, contents, side) for contents in guests}, pairs)
        rates = {name: f"{size / 2e9 / quantile(taken, 0.5):.1f} GB/s" for name, taken in seconds.items()}
        what = f"reading as {side}, {rates['deferred']}, by eager contents ({rates['eager']})"
        met &= verdict(what, ratio(seconds, "eager", "deferred"), least=0.8)
    return met


def memory(pairs: int) -> bool:
    """100,000 pages of 64 GiB, written by the guest."""
    vm, gmem = running(64 * GIB)
    gmem.set_memory_attributes(0, 64 * GIB, PRIVATE, PRESERVE)
    places = np.random.default_rng(1).choice(64 * GIB // PAGE, 100_000, replace=False) * PAGE
    vm.guest_write(int(places[0]), b"1")
    before = resident()
    for place in places.tolist():
        vm.guest_write(place, b"1")
    grown = (resident() - before) / gmem.stored
    met = gmem.stored == len(places) * PAGE and grown <= 1.05
    answer = "met" if met else "MISSED"
    print(
        f"memory for {gmem.stored // MIB} MiB stored: {grown:.3f} of it, at most 1.05: {answer}", flush=True
    )
    return met


BARS = {"uniform": uniform, "ranges": ranges, "reading": reading, "memory": memory}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bars", nargs="*", metavar="BAR", help=", ".join(BARS))
    parser.add_argument("--pairs", type=int, default=20)
    arguments = parser.parse_args()
    if unknown := set(arguments.bars) - set(BARS):
        parser.error(f"unknown bar {', '.join(sorted(unknown))}; known: {', '.join(BARS)}")
    gmemcore.warmup()
    keep_freed_memory()
    verdicts = [BARS[name](arguments.pairs) for name in arguments.bars or BARS]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
