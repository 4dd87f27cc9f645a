"""What a log of a million conversions costs to import: the bars, and the rate beside the reference reader's.

The log is ftrace's, of four vCPUs, with random conversions of 1 to 64 pages and a line of another event after
every tenth. The bars: 3 seconds of CPU time and 400 MiB for the whole import.

Run: ``python bench/logs.py``; exit status 0 if the bars are met.
"""

import argparse
import io
import os
import resource
import sys
import time

from gmemcore.workload.logs import import_log, read_log
from gmemcore.workload.logs.lines import Lines
from gmemcore.workload.logs.log import Collector
from gmemcore.workload.seeds import Stream

LINES = 1_000_000
SECONDS = 3.0
MEMORY = 400 << 20
PART = 20_000
"""Lines that the reference reader, being slow, gets."""


def write_log(descriptor: int) -> None:
    """Write the log, a block of lines at a time."""
    stream = Stream(1)
    with open(descriptor, "w") as file:
        for start in range(0, LINES, PART):
            draws = [stream.split(what).below(n, start, PART).tolist() for what, n in DRAWS.items()]
            for i, (page, pages, private, vcpu) in enumerate(zip(*draws, strict=True), start):
                seconds, fraction = divmod(i, 10**6)
                prefix = (
                    f"       CPU {vcpu}/KVM-425{vcpu}    [{vcpu:03}] ..... {1236 + seconds}.{fraction:06}: "
                )
                frames = f"{page:#016x} -- {page + pages + 1:#016x}"
                file.write(f"{prefix}kvm_vm_set_mem_attributes: {frames} [{8 * private:#x}]\n")
                if i % 10 == 0:
                    file.write(f"{prefix}kvm_exit: vcpu {vcpu} reason npf rip 0xffffffff810b0000 info1 0x0\n")


DRAWS = {"page": 1 << 22, "pages": 64, "private": 2, "vcpu": 4}


def main() -> int:
    """Print the figures; returns the exit status."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    descriptor = os.memfd_create("log")
    child = os.fork()
    if not child:  # so that the log's making is no part of this process's memory
        write_log(descriptor)
        os._exit(0)
    os.waitpid(child, 0)
    with open(descriptor, "rb") as file:
        file.seek(0)
        before = time.process_time()
        log = read_log(file)
        read = time.process_time() - before
        imported = import_log(log, "log")
        seconds = time.process_time() - before
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        file.seek(0)
        part = [next(file) for _ in range(PART)]
    operations = len(imported.launches[0].trace.operations)
    reference, columns = (per_line(reader, part) for reader in (by_reference, by_columns))
    print(f"{log.lines:,} lines, {operations:,} operations")
    print(f"import     {seconds:.2f} s of CPU time (bar {SECONDS:g}), of which reading {read:.2f} s")
    print(f"peak       {peak >> 20} MiB (bar {MEMORY >> 20})")
    print(f"reader     {columns * 1e6:.2f} us per line; the reference {reference * 1e6:.0f} us")
    return int(seconds > SECONDS or peak > MEMORY)


def per_line(reader, part: list[bytes]) -> float:
    """Return the seconds of CPU time per line of the best of five runs."""
    times = []
    for _ in range(5):
        before = time.process_time()
        reader(part)
        times.append(time.process_time() - before)
    return min(times) / len(part)


def by_reference(part: list[bytes]) -> None:
    """Read by the reference reader."""
    lines = Lines(Collector())
    for number, line in enumerate(part, start=1):
        lines.read(number, line.rstrip(b"\n"))


def by_columns(part: list[bytes]) -> None:
    """Read as `read_log` does."""
    read_log(io.BufferedReader(io.BytesIO(b"".join(part))))


if __name__ == "__main__":
    sys.exit(main())
