"""What a stream contains: its operations counted, and what is left of it on a guest."""

from collections.abc import Iterable
from dataclasses import dataclass

from gmemcore.engine import Counters
from gmemcore.machine import VmFace
from gmemcore.uapi import PAGE_SIZE
from gmemcore.workload.counts import StepCount, StepCounts
from gmemcore.workload.layout import Layout
from gmemcore.workload.operations import Operations
from gmemcore.workload.player import Player, build


@dataclass(frozen=True, slots=True)
class Contents:
    """A whole stream, as it ran on a guest.

    Attributes
    ----------
    steps : dict
        A `StepCount` by name; conversions are ``CONVERT to private`` and ``CONVERT to shared``.
    operations : int
        In all.
    shared, memory : int
        Bytes that are shared at the end, and bytes of the guest.
    counters : Counters
        Its events.
    """

    steps: dict[str, StepCount]
    operations: int
    shared: int
    memory: int
    counters: Counters


def contents_of(stream: Iterable[Operations], vm: VmFace, layout: Layout) -> Contents:
    """Play a stream on a Vm that has no memory yet, and count."""
    files = build(vm, layout)
    player = Player(vm)
    counts = StepCounts()
    operations = 0
    for chunk in stream:
        outcomes = player.run(chunk)["code"]
        operations += len(chunk)
        counts.add(chunk, outcomes)
    shared = (
        0
        if vm.abi.legacy
        else sum(end - start for gmem in files for start, end, side in gmem.runs() if side == "shared")
    )
    return Contents(
        counts.counts(),
        operations,
        shared * PAGE_SIZE,
        layout.size,
        player.counters,
    )
