"""Cost of ``enforce="mprotect"``: the same conversions with and without it, interleaved.

A range is converted to private and back, in single calls of 4 KiB, of 2 MiB and of the whole memory, over a
memfd that is faulted in; one guest has no host view, one has a view that nobody touched, and one has a
view of which the host touched every page, so there are page table entries to change. KEEP moves no
bytes; ENCRYPT and DECRYPT (``two-caps``, ``cipher`` firmware) move all of them. Each line has
microseconds per conversion and the median of the paired ratios to the guest without enforcement.

Run: ``python bench/enforce.py [--memory 256m] [--pairs 20]``. There is no bar: enforcement is off by default.
"""

import argparse
import time
from functools import partial

import gmemcore
from gmemcore.benchmark.pairs import paired, ratio, verdict
from gmemcore.machine import GuestMemfd
from gmemcore.results.statistics import median
from gmemcore.uapi import FallocateMode, Firmware, GuestMemfdFlag, MemoryAttribute
from gmemcore.units import format_size, parse_size

FLAGS = {"KEEP": 0, "ENCRYPT, DECRYPT": 2}
MAPPABLE = GuestMemfdFlag.MMAP | GuestMemfdFlag.INIT_SHARED
MOST_CALLS = 256
"""Conversions in a row of one sample, where ranges are small."""
PLAIN = "without enforcement"


def new_file(memory: int, *, enforce: str | None = None, touched: bool = False) -> GuestMemfd:
    """A file of a running guest, all of whose pages exist and are shared."""
    vm = gmemcore.create_vm(
        "SNP", "two-caps", Firmware.CIPHER, backing="memfd", prefault=True, enforce=enforce
    )
    gmem = vm.create_guest_memfd(memory, MAPPABLE)
    gmem.fallocate(FallocateMode.KEEP_SIZE, 0, memory)
    vm.launch_finish()
    if touched:
        gmem.mmap(0, memory).array[:] = 1
    return gmem


def seconds_of_conversion(gmem: GuestMemfd, size: int, flag: int) -> float:
    """Convert ranges to private and back, each with a call of its own; returns seconds per conversion."""
    offsets = range(0, gmem.size, max(size, gmem.size // MOST_CALLS // size * size or size))
    convert = gmem.set_memory_attributes
    began = time.perf_counter()
    for attributes in (int(MemoryAttribute.PRIVATE), 0):
        for offset in offsets:
            convert(offset, size, attributes, flag)
    return (time.perf_counter() - began) / (2 * len(offsets))


def measure(memory: int, sizes: list[int], pairs: int) -> None:
    """Print a line for every range, effect and kind of view."""
    files = {
        PLAIN: new_file(memory),
        "view untouched": new_file(memory, enforce="mprotect"),
        "view touched": new_file(memory, enforce="mprotect", touched=True),
    }
    for size in sizes:
        for effect, flag in FLAGS.items():
            runs = {name: partial(seconds_of_conversion, gmem, size, flag) for name, gmem in files.items()}
            seconds = paired(runs, pairs)
            for name in list(files)[1:]:
                own, plain = (median(seconds[each]) * 1e6 for each in (name, PLAIN))
                what = f"{format_size(size):>6} {effect:16} {name:15} {plain:10.1f} -> {own:10.1f} us"
                verdict(what, ratio(seconds, name, PLAIN))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=parse_size, default=parse_size("256m"))
    parser.add_argument("--pairs", type=int, default=20)
    arguments = parser.parse_args()
    gmemcore.warmup()
    sizes = sorted({size for size in (4 << 10, 2 << 20) if size < arguments.memory} | {arguments.memory})
    measure(arguments.memory, sizes, arguments.pairs)


if __name__ == "__main__":
    main()
