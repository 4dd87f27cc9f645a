"""The speed that gmemcore is held to, each bar a ratio to a primitive of the same run.

A bar is the median of paired ratios: what is judged and what it is judged by are timed in turn, in an order
drawn anew each round, on one thread by default. Bytes are compared with the best that NumPy, Numba, libc
and, where there is a compiler, C at ``-O3 -march=native`` do to the *same* memory: two buffers of one size
can lie on pages of different kinds below, and differ by a fifth.

Run: ``python bench/bars.py [BAR...] [--memory 2g] [--pairs 20]``; exit status 0 if every bar asked for is
met, else 1. ``--list`` says what there is.
"""

import argparse
import ctypes
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from numba import njit

import gmemcore
from gmemcore.benchmark.axes import Fragmentation, Setting
from gmemcore.benchmark.cases import find, table
from gmemcore.benchmark.expected import Reference
from gmemcore.benchmark.memory import Memory
from gmemcore.benchmark.pairs import paired, ratio, seconds_of, verdict
from gmemcore.benchmark.primitives import CONSTANTS, candidates
from gmemcore.benchmark.scene import new_scene
from gmemcore.engine.host import keep_freed_memory
from gmemcore.results.statistics import quantile
from gmemcore.units import format_size, parse_size

C_SOURCE = """
#include <stddef.h>
#include <stdint.h>
void xor_constant(uint64_t *target, uint64_t constant, size_t n)
{
    for (size_t i = 0; i < n; i++) target[i] ^= constant;
}
void set_zero(uint64_t *target, size_t n)
{
    for (size_t i = 0; i < n; i++) target[i] = 0;
}

/* Every second page, without prefetch and with one of the next page, a line at a time. */
enum { PAGE_WORDS = 512, LINE_WORDS = 8 };
void xor_apart(uint64_t *target, uint64_t constant, size_t n)
{
    for (size_t page = 0; page < n; page += 2 * PAGE_WORDS)
        for (size_t i = page; i < page + PAGE_WORDS; i++) target[i] ^= constant;
}
void xor_apart_ahead(uint64_t *target, uint64_t constant, size_t n)
{
    for (size_t page = 0; page < n; page += 2 * PAGE_WORDS)
        for (size_t line = page; line < page + PAGE_WORDS; line += LINE_WORDS) {
            if (line + 2 * PAGE_WORDS < n) __builtin_prefetch(target + line + 2 * PAGE_WORDS, 1, 3);
            for (size_t i = line; i < line + LINE_WORDS; i++) target[i] ^= constant;
        }
}
void zero_apart(uint64_t *target, uint64_t constant, size_t n)
{
    for (size_t page = 0; page < n; page += 2 * PAGE_WORDS)
        for (size_t i = page; i < page + PAGE_WORDS; i++) target[i] = constant;
}
"""
PRIMITIVE_OF = {"ENCRYPT": "xor", "DECRYPT": "xor", "SCRAMBLE": "xor", "ZERO": "memset"}
GIB, TIB = 1 << 30, 1 << 40
PAGE = 4096
PRIVATE = 8


@dataclass(frozen=True)
class Effort:
    """How much memory, and how many pairs."""

    memory: int
    pairs: int


BARS: dict[str, Callable[[Effort], bool]] = {}


def bar(function: Callable[[Effort], bool]) -> Callable[[Effort], bool]:
    """Register a bar under its function's name."""
    BARS[function.__name__.replace("_", "-")] = function
    return function


# ---- yardsticks ----------------------------------------------------------------------------------


@cache
def c_loops() -> ctypes.CDLL | None:
    """The loops in C; None without a compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "loops.c"), Path(folder, "loops.so")
        source.write_text(C_SOURCE)
        options = ("-O3", "-march=native", "-shared", "-fPIC")
        subprocess.run([compiler, *options, str(source), "-o", str(library)], check=True)
        loops = ctypes.CDLL(str(library))
    address, count, word = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64
    for name in ("xor_constant", "xor_apart", "xor_apart_ahead", "zero_apart"):
        getattr(loops, name).argtypes = (address, word, count)
    loops.set_zero.argtypes = (address, count)
    return loops


def compiled_c() -> dict[str, Callable]:
    """The primitives in C, as `candidates` has them; nothing without a compiler."""
    loops = c_loops()
    if loops is None:
        return {}
    constant = int(CONSTANTS["xor"])
    return {
        "xor": lambda target: loops.xor_constant(target.ctypes.data, constant, len(target)),
        "memset": lambda target: loops.set_zero(target.ctypes.data, len(target)),
    }


@cache
def ways() -> Mapping[str, Mapping[str, Callable]]:
    """Every way to do each primitive to words."""
    start = np.zeros(1, np.uint64)

    def whole(way, constant):
        return lambda words: way(words, words, start, np.uint64(len(words)), constant)

    found = {
        primitive: {name: whole(way, CONSTANTS[primitive]) for name, way in own.items()}
        for primitive, own in candidates().items()
    }
    for primitive, run in compiled_c().items():
        found[primitive]["gcc"] = run
    return found


@cache
def memory_of(size: int) -> Memory:
    """Guest memory, warm and in huge pages."""
    return Memory(size)


def best(primitive: str, words: np.ndarray, rounds: int = 3) -> tuple[str, Callable[[], float]]:
    """The fastest implementation of a primitive for these words, and a function that times it."""
    timed = {name: partial(seconds_of, partial(run, words)) for name, run in ways()[primitive].items()}
    seconds = paired(timed, rounds)
    name = min(seconds, key=lambda way: quantile(seconds[way], 0.5))
    return name, timed[name]


def memset_of_32m() -> Callable[[], float]:
    """The primitive for bars about page state alone."""
    return best("memset", memory_of(32 << 20).side(0).words, 20)[1]


# ---- bytes ---------------------------------------------------------------------------------------


def conversion(effect: str, size: int, step: int, threads: int = 1, pattern: str = "uniform"):
    """What times the conversion of `memory` bytes with an effect, in calls of a step; and the case."""
    setting = Setting(threads=threads)
    cases = table(
        "two-caps",
        firmware="cipher",
        memory=size,
        ranges=[step],
        fragmentations=[Fragmentation(pattern)],
        settings=[setting],
    )
    case = find(cases, effect=effect, refused=False, fragmentation=Fragmentation(pattern))
    assert case.bytes != "none", f"{case.name} moves no bytes"
    scene = new_scene(case, memory_of(size), Reference(), size // step)

    def run() -> float:
        scene.prepare(written=False)
        if step == size:
            return scene.convert()
        attributes, flag = PRIVATE if case.to_private else 0, int(case.key.flag)
        convert = scene.gmem.set_memory_attributes
        return seconds_of(lambda: [convert(at, step, attributes, flag) for at in range(0, size, step)])

    scene.prepare()
    scene.run()
    scene.check()  # what is fast must also be right
    return run, case


def speed(seconds: list[float], size: int) -> str:
    """GB/s, for people."""
    return f"{size / quantile(seconds, 0.5) / 1e9:.1f} GB/s"


def judge_bytes(effect: str, effort: Effort) -> bool:
    """An effect over all memory in one call, by its primitive: at least 0.95."""
    run, _ = conversion(effect, effort.memory, effort.memory)
    name, primitive = best(PRIMITIVE_OF[effect], memory_of(effort.memory).side(0).words)
    seconds = paired({"own": run, "primitive": primitive}, effort.pairs)
    own, base = (speed(seconds[which], effort.memory) for which in ("own", "primitive"))
    what = f"{effect} {format_size(effort.memory)}, {own}, by {PRIMITIVE_OF[effect]} ({name}, {base})"
    low = 0.90 if PRIMITIVE_OF[effect] == "xor" else None
    return verdict(what, ratio(seconds, "primitive", "own"), least=0.95, least_low=low)


for _effect in PRIMITIVE_OF:
    BARS[_effect.lower()] = partial(judge_bytes, _effect)


@bar
def ranges_of_2m(effort: Effort) -> bool:
    """Each effect in calls of 2 MiB, by its speed over all memory in one call: at least 0.85."""
    met = True
    for effect in PRIMITIVE_OF:
        whole, _ = conversion(effect, effort.memory, effort.memory)
        parts, _ = conversion(effect, effort.memory, 2 << 20)
        seconds = paired({"whole": whole, "parts": parts}, effort.pairs)
        what = f"{effect} in calls of 2m, {speed(seconds['parts'], effort.memory)}, by one call"
        met &= verdict(what, ratio(seconds, "whole", "parts"), least=0.85)
    return met


FRAGMENTED = {
    "ENCRYPT": ("alternating-accepted", ("xor_apart", "xor_apart_ahead"), int(CONSTANTS["xor"])),
    "ZERO": ("alternating-allocated", ("zero_apart",), 0),
}
"""Effect -> fragmentation, C loops that touch the same pages, and the constant that they write."""


@bar
def fragmented(effort: Effort) -> bool:
    """64 MiB of which every second page is touched, by the best C loop over as many pages: at least 0.9."""
    loops = c_loops()
    if loops is None:
        print("fragmented: no C compiler: not judged")
        return True
    size, met = 64 << 20, True
    words = memory_of(size).side(0).words
    for effect, (pattern, names, constant) in FRAGMENTED.items():
        uniform, _ = conversion(effect, size, size)
        every_second, _ = conversion(effect, size, size, pattern=pattern)
        runs = {"uniform": lambda run=uniform: run() / 2, "own": every_second}
        for name in names:
            loop = partial(getattr(loops, name), words.ctypes.data, constant, len(words))
            runs[name] = partial(seconds_of, loop)
        seconds = paired(runs, 2 * effort.pairs)
        for name in (*names, "uniform"):
            verdict(f"{effect}, {pattern}, by {name}", ratio(seconds, name, "own"))
        best_loop = min(names, key=lambda name: quantile(seconds[name], 0.5))
        speeds = [speed(seconds[name], size // 2) for name in ("own", best_loop)]
        what = f"{effect}, {pattern}, {speeds[0]}, by the best C loop ({best_loop}, {speeds[1]})"
        met &= verdict(what, ratio(seconds, best_loop, "own"), least=0.9)
    return met


@bar
def two_threads(effort: Effort) -> bool:
    """ENCRYPT on two threads, by in-place XOR by a constant on two threads: at least 0.9."""
    run, _ = conversion("ENCRYPT", effort.memory, effort.memory, threads=2)
    words = memory_of(effort.memory).side(0).words
    name, _ = best("xor", words)
    xor = ways()["xor"][name]

    halves = np.split(words, 2)

    def primitive() -> float:
        return seconds_of(lambda: [*pool.map(xor, halves)])

    with ThreadPoolExecutor(2) as pool:
        seconds = paired({"own": run, "primitive": primitive}, effort.pairs)
    own, base = (speed(seconds[which], effort.memory) for which in ("own", "primitive"))
    what = f"ENCRYPT on two threads, {own}, by xor on two threads ({name}, {base})"
    return verdict(what, ratio(seconds, "primitive", "own"), least=0.9)


# ---- page state ----------------------------------------------------------------------------------


@njit(nogil=True)
def set_ranges(bits, starts, ends, values):
    """A bare bitmap: set or clear [start, end) of one plane, and nothing else."""
    ones, one, six, low = np.uint64(~np.uint64(0)), np.uint64(1), np.uint64(6), np.uint64(63)
    for i in range(starts.shape[0]):
        word, last = starts[i] >> six, (ends[i] - one) >> six
        head, tail = ones << (starts[i] & low), ones >> (low - ((ends[i] - one) & low))
        if word == last:
            head &= tail
        if values[i]:
            bits[word] |= head
        else:
            bits[word] &= ~head
        if word != last:
            word += one
            while word < last:
                bits[word] = ones if values[i] else np.uint64(0)
                word += one
            if values[i]:
                bits[last] |= tail
            else:
                bits[last] &= ~tail


PINNED = {512: 54 * 512, 64: 4800}
"""Pages of a pinned buffer -> pages of the guest for each, so that 1 % of the ranges meet one."""


class Batch:
    """A million random ranges of 1 to 64 pages of a guest without bytes, 1 % of them refused.

    Pinned buffers are spread over the guest: of 2 MiB, as VFIO pins huge pages, or of 64 pages.
    With an order of huge pages (0: 4 KiB) all memory is allocated.
    """

    RANGES = 1_000_000

    def __init__(self, size: int, pinned: int = 512, order: int | None = None) -> None:
        draw, pages = np.random.default_rng(1), size // PAGE
        lengths = draw.integers(1, 65, self.RANGES).astype(np.uint64)
        self.starts = draw.integers(0, pages - 64, self.RANGES).astype(np.uint64)
        self.ends = self.starts + lengths
        self.offsets, self.sizes = self.starts * np.uint64(PAGE), lengths * np.uint64(PAGE)
        self.attributes = (draw.integers(0, 2, self.RANGES) * PRIVATE).astype(np.uint64)
        self.bits = np.zeros(pages // 64, np.uint64)
        vm = gmemcore.create_vm("SNP", "v5" if order is None else "huge-partial", backing="none")
        vm.launch_finish()
        self.gmem = vm.create_guest_memfd(size, flags=5 if order else 3, page_order=order or 0)
        if order is not None:
            self.gmem.fallocate(1, 0, size)
            self.gmem.set_memory_attributes(0, size, 0)
        for place in draw.choice(pages // pinned, pages // PINNED[pinned], replace=False):
            self.gmem.pin(int(place) * pinned * PAGE, pinned * PAGE)
        refused = np.mean([self._convert().errno != 0 for _ in range(3)])
        assert 0.005 < refused < 0.02, f"{refused:.1%} refused"

    def _convert(self) -> gmemcore.BatchResult:
        return self.gmem.set_memory_attributes_many(self.offsets, self.sizes, self.attributes)

    def convert(self) -> float:
        """Seconds of the call and of reading each errno."""
        return seconds_of(lambda: self._convert().errno)

    def bare(self) -> float:
        """Seconds of the bare bitmap."""
        return seconds_of(lambda: set_ranges(self.bits, self.starts, self.ends, self.attributes))

    def one_by_one(self, n: int = 20_000) -> float:
        """Seconds of the batch in single calls, extrapolated from n."""
        columns = (column[:n].tolist() for column in (self.offsets, self.sizes, self.attributes))
        requests = list(zip(*columns, strict=True))

        def loop() -> None:
            for request in requests:
                with suppress(gmemcore.GmemError):
                    self.gmem.set_memory_attributes(*request)

        return seconds_of(loop) * self.RANGES / n

    def nanoseconds(self, seconds: list[float]) -> str:
        """Time of a range, for people."""
        return f"{quantile(seconds, 0.5) / self.RANGES * 1e9:.1f} ns"


@cache
def batch_of(size: int, pinned: int = 512, order: int | None = None) -> Batch:
    """A batch, made once."""
    return Batch(size, pinned, order)


@bar
def batch(effort: Effort) -> bool:
    """A million random ranges in 64 GiB, by a bare bitmap: at most 2.5; single calls by it: at least 25."""
    own = batch_of(64 * GIB)
    seconds = paired({"own": own.convert, "bare": own.bare, "single": own.one_by_one}, effort.pairs)
    times = {name: own.nanoseconds(samples) for name, samples in seconds.items()}
    what = f"batch, {times['own']} a range, by a bare bitmap ({times['bare']})"
    met = verdict(what, ratio(seconds, "own", "bare"), most=2.5)
    scattered = batch_of(64 * GIB, 64)
    other = paired({"own": scattered.convert, "bare": scattered.bare}, effort.pairs)
    what = f"batch, buffers of 64 pages pinned, {own.nanoseconds(other['own'])}, by a bare bitmap"
    verdict(what, ratio(other, "own", "bare"))
    what = f"single calls, {times['single']} a range, by the batch"
    return verdict(what, ratio(seconds, "single", "own"), least=25) and met


@bar
def batch_in_1t(effort: Effort) -> bool:
    """The same in a 1 TiB guest: at most twice the time of the 64 GiB one."""
    met = True
    for pinned, most in ((512, 2.0), (64, None)):
        small, large = batch_of(64 * GIB, pinned), batch_of(TIB, pinned)
        runs = {"64g": small.convert, "1t": large.convert, "bare": large.bare, "bare 64g": small.bare}
        seconds = paired(runs, effort.pairs)
        times = {name: large.nanoseconds(samples) for name, samples in seconds.items()}
        what = (
            f"batch in 1t, buffers of {pinned} pages pinned, {times['1t']} a range, by 64g ({times['64g']})"
        )
        met &= verdict(what, ratio(seconds, "1t", "64g"), most=most)
    verdict("a bare bitmap in 1t, by 64g", ratio(seconds, "bare", "bare 64g"))
    return met


@bar
def huge_pages(effort: Effort) -> bool:
    """The same in huge pages that are all in use, by pages of 4 KiB: at most 2.5."""
    small, met = batch_of(64 * GIB, 64, 0), True
    for order, name in ((9, "2m"), (18, "1g")):
        huge = batch_of(64 * GIB, 64, order)
        seconds = paired({"huge": huge.convert, "small": small.convert}, effort.pairs)
        times = {each: small.nanoseconds(samples) for each, samples in seconds.items()}
        what = f"batch in {name} pages, {times['huge']} a range, by 4 KiB pages ({times['small']})"
        met &= verdict(what, ratio(seconds, "huge", "small"), most=2.5)
        whole = paired(
            {"huge": lambda huge=huge: both_ways(huge.gmem), "small": lambda: both_ways(small.gmem)},
            effort.pairs,
        )
        what = f"all of 64g in use, there and back, in {name} pages, by 4 KiB pages"
        met &= verdict(what, ratio(whole, "huge", "small"), most=2.5)
    return met


def both_ways(gmem: gmemcore.GuestMemfd) -> float:
    """Seconds of the conversion of a whole file to private and back."""
    gmem.unpin(0, gmem.size)
    return seconds_of(lambda: [gmem.set_memory_attributes(0, gmem.size, to) for to in (PRIVATE, 0)])


def takes_one(words):
    """As many arguments as `kernels.convert_one` has, and nothing done with them."""


@bar
def single_call(effort: Effort) -> bool:
    """A single-page conversion, by a Numba call of as many arguments that does nothing: at most 8."""
    gmem = gmemcore.create_vm("SNP", backing="none").create_guest_memfd(GIB, flags=3)
    words = np.zeros(64, np.uint64)
    nothing = njit(nogil=True, _nrt=False)(takes_one)
    nothing(words)
    n = 2000
    runs = {
        "own": lambda: seconds_of(
            lambda: [gmem.set_memory_attributes(4096, 4096, i & 1 and PRIVATE) for i in range(n)]
        ),
        "empty": lambda: seconds_of(lambda: [nothing(words) for _ in range(n)]),
    }
    seconds = paired(runs, 2 * effort.pairs)
    own, empty = (quantile(seconds[name], 0.5) / n * 1e6 for name in ("own", "empty"))
    what = f"a single-page call, {own:.2f} µs, by an empty call of one argument ({empty:.2f} µs)"
    return verdict(what, ratio(seconds, "own", "empty"), most=8)


@bar
def uniform_1t(effort: Effort) -> bool:
    """A uniform 1 TiB with one foreign page and ragged ends, by memset of 32 MiB: at most 2, either way.

    Also in pages of 2 MiB and 1 GiB, none of them in use.
    """
    met = True
    for order, pages in ((0, ""), (9, " in 2 MiB pages"), (18, " in 1 GiB pages")):
        vm = gmemcore.create_vm("SNP", "huge-partial" if order else "v5", backing="none")
        gmem = vm.create_guest_memfd(TIB, flags=5 if order else 3, page_order=order)
        for attributes, way in ((PRIVATE, "to private"), (0, "to shared")):
            met &= uniform_ratio(gmem, attributes, f"1t {way}{pages}", 2 * effort.pairs)
    return met


def uniform_ratio(gmem: gmemcore.GuestMemfd, attributes: int, what: str, pairs: int) -> bool:
    """Judge a conversion of nearly all of a guest that is uniform but for one page."""

    def run() -> float:
        gmem.set_memory_attributes(0, TIB, PRIVATE - attributes)
        gmem.set_memory_attributes(TIB // 2 + PAGE, PAGE, attributes)
        return seconds_of(lambda: gmem.set_memory_attributes(3 * PAGE, TIB - 8 * PAGE, attributes))

    seconds = paired({"own": run, "memset": memset_of_32m()}, pairs)
    own, memset = (quantile(seconds[name], 0.5) * 1e3 for name in ("own", "memset"))
    return verdict(
        f"{what}, {own:.2f} ms, by memset of 32m ({memset:.2f} ms)", ratio(seconds, "own", "memset"), most=2
    )


@bar
def questions_of_1t(effort: Effort) -> bool:
    """Counting, mappability and a million runs of a 1 TiB guest, by memset of 32 MiB: at most 10 each."""
    gmem = gmemcore.create_vm("SNP", backing="none").create_guest_memfd(TIB, flags=3)
    runs = 500_000
    starts = np.arange(runs, dtype=np.uint64) * np.uint64(TIB // PAGE // runs * PAGE)
    gmem.set_memory_attributes_many(starts, np.full(runs, 77 * PAGE, np.uint64), PRIVATE)
    assert len(gmem.run_ends()) == 2 * runs
    assert gmem.count("private") == 77 * runs
    questions = {
        "count of private pages": partial(gmem.count, "private"),
        "2 MiB and 1 GiB mappability": gmem.mappable_blocks,
        f"listing {2 * runs} runs": gmem.run_ends,
    }
    timed = {name: partial(seconds_of, question) for name, question in questions.items()}
    seconds = paired({**timed, "memset": memset_of_32m()}, 2 * effort.pairs)
    memset, met = quantile(seconds["memset"], 0.5) * 1e3, True
    for name in questions:
        what = f"{name}, {quantile(seconds[name], 0.5) * 1e3:.2f} ms, by memset of 32m ({memset:.2f} ms)"
        met &= verdict(what, ratio(seconds, name, "memset"), most=10)
    return met


@bar
def page_state_of_16t(effort: Effort) -> bool:
    """Memory for the page state of a booted 16 TiB guest: at most 512 MiB."""
    from gmemcore.workload.behaviours import BEHAVIOURS
    from gmemcore.workload.layout import Layout
    from gmemcore.workload.player import Player, build

    before = resident()
    vm = gmemcore.create_vm("SNP", backing="none")
    layout = Layout.pc(16 * TIB)
    build(vm, layout)
    player, done = Player(vm), 0
    for operations in BEHAVIOURS["snp-boot"].operations(layout, seed=1):
        player.run(operations)
        done += len(operations)
    grown = resident() - before
    assert vm.counters.pages_accepted > 0
    met = grown <= 512 << 20
    print(
        f"page state of a 16 TiB guest after an SNP boot of {done} operations: {grown / (1 << 20):.0f} MiB "
        f"resident more, at most 512: {'met' if met else 'MISSED'}"
    )
    return met


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


# ---- start ---------------------------------------------------------------------------------------

FIRST = """
import gmemcore
gmem = gmemcore.create_vm("SNP").create_guest_memfd(4096, flags=3)
assert gmem.set_memory_attributes(0, 4096, 8).counters.pages_changed == 1
"""


def process(script: str | None, *command: str) -> Callable[[], float]:
    """A function that times a process from start to end."""
    line = [sys.executable, *(["-c", script] if script is not None else command)]
    return lambda: seconds_of(lambda: subprocess.run(line, check=True, stdout=subprocess.DEVNULL))


@bar
def start(effort: Effort) -> bool:
    """Start-up times, against those of NumPy, Python and Numba."""
    runs = {
        "import gmemcore": process("import gmemcore"),
        "gmemcore --help": process(None, "-m", "gmemcore", "--help"),
        "a first cached conversion": process(FIRST),
        "import numpy": process("import numpy"),
        "python -c pass": process("pass"),
        "import numba": process("import numba"),
    }
    seconds = {name: quantile(taken, 0.5) for name, taken in paired(runs, effort.pairs).items()}
    limits = {
        "import gmemcore": ("import numpy + 50 ms", seconds["import numpy"] + 0.05),
        "gmemcore --help": ("3 × python -c pass + 0.2 s", 3 * seconds["python -c pass"] + 0.2),
        "a first cached conversion": ("import numba + 0.4 s", seconds["import numba"] + 0.4),
    }
    met = True
    for name, (limit, most) in limits.items():
        holds = seconds[name] <= most
        met &= holds
        answer = "met" if holds else "MISSED"
        print(f"{name}: {seconds[name]:.3f} s, at most {limit} = {most:.3f} s: {answer}")
    return met


def bar_name(text: str) -> str:
    """The name of a bar, for argparse."""
    if text.lower() not in BARS:
        raise argparse.ArgumentTypeError(f"unknown bar {text!r}; known: {', '.join(BARS)}")
    return text.lower()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bars", nargs="*", type=bar_name, metavar="BAR", help="default: all")
    parser.add_argument(
        "--memory", type=parse_size, default=parse_size("2g"), help="bytes that are converted"
    )
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--list", action="store_true", help="what there is")
    arguments = parser.parse_args()
    if arguments.list:
        for name, judge in BARS.items():
            told = judge_bytes if isinstance(judge, partial) else judge
            print(f"{name:18} {told.__doc__.splitlines()[0]}")
        return 0
    gmemcore.warmup()
    keep_freed_memory()
    effort = Effort(arguments.memory, arguments.pairs)
    verdicts = [BARS[name](effort) for name in arguments.bars or BARS]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
