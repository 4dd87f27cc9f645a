"""Cost of a player next to the batch that it makes: the same operations, by gpa and as a bare batch.

Random conversions of 1 to 64 pages on a guest of 64 GiB without bytes, in chunks as streams have them, on one
memslot and on two; and what guests do besides (behaviours), in nanoseconds per operation. The bar:
on one memslot a player runs conversions at half the rate of ``set_memory_attributes_many`` or more.

Run: ``python bench/player.py [--pairs 20]``; exit status 0 if the bar is met.
"""

import argparse
import sys
import time
from functools import partial

import numpy as np

import gmemcore
from gmemcore.benchmark.pairs import paired, ratio, verdict
from gmemcore.results.statistics import median
from gmemcore.uapi import PAGE_SIZE
from gmemcore.workload.behaviours import BEHAVIOURS
from gmemcore.workload.layout import Layout
from gmemcore.workload.operations import Operations, empty_operations
from gmemcore.workload.player import Player, build
from gmemcore.workload.seeds import Stream
from gmemcore.workload.streams import CHUNK, limit

MEMORY = 64 << 30
OPERATIONS = 16 * CHUNK
BAR = 0.5


def conversions() -> Operations:
    """Random conversions of 1 to 64 pages within the guest's first half, which every layout has at 0."""
    operations, stream = empty_operations(OPERATIONS), Stream(1)
    operations["size"] = (stream.split("size").below(64, 0, OPERATIONS) + 1) * PAGE_SIZE
    operations["gpa"] = stream.split("gpa").below(MEMORY // 2 // PAGE_SIZE - 64, 0, OPERATIONS) * PAGE_SIZE
    operations["attributes"] = stream.split("attributes").below(2, 0, OPERATIONS) * 8
    return operations


def new_guest(layout: Layout, vm_type: str = "SNP") -> gmemcore.Vm:
    """A guest that runs."""
    vm = gmemcore.create_vm(vm_type, backing="none")
    build(vm, layout)
    vm.launch_finish()
    return vm


def seconds_of_player(layout: Layout, operations: Operations) -> float:
    """Run operations by gpa on a new guest."""
    with new_guest(layout) as vm:
        player = Player(vm)
        began = time.perf_counter()
        for start in range(0, len(operations), CHUNK):
            player.run(operations[start : start + CHUNK])
        return time.perf_counter() - began


def seconds_of_batch(operations: Operations) -> float:
    """Run the conversions as bare batches of the same size on a new guest."""
    with new_guest(Layout.single(MEMORY)) as vm:
        gmem = vm.files[0]
        began = time.perf_counter()
        for start in range(0, len(operations), CHUNK):
            part = operations[start : start + CHUNK]
            gmem.set_memory_attributes_many(part["gpa"], part["size"], part["attributes"])
        return time.perf_counter() - began


def main() -> int:
    """Print the figures; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    pairs = parser.parse_args().pairs
    gmemcore.warmup()
    operations, half = conversions(), MEMORY // 2
    two = Layout((*Layout.single(half).regions, *Layout.single(half, MEMORY).regions))
    runs = {
        "bare batch": partial(seconds_of_batch, operations),
        "player": partial(seconds_of_player, Layout.single(MEMORY), operations),
        "player, 2 slots": partial(seconds_of_player, two, operations),
    }
    seconds, met = paired(runs, pairs), True
    for name, bar in (("player", BAR), ("player, 2 slots", None)):
        each = median(seconds[name]) / OPERATIONS * 1e9
        met &= verdict(f"{name:16} {each:6.0f} ns", ratio(seconds, "bare batch", name), least=bar)
    layout = Layout.pc(MEMORY)
    for name, row in BEHAVIOURS.items():
        stream = np.concatenate([*limit(row.operations(layout, 1), OPERATIONS)])
        print(f"{name:20} {seconds_of_player(layout, stream) / len(stream) * 1e9:8.0f} ns per operation")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
