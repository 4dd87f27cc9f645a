"""What a stream contains: its operations counted, and what is left of it on a guest."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from gmemcore.engine import Counters
from gmemcore.engine.steps import Step
from gmemcore.machine import VmFace
from gmemcore.uapi import PAGE_SIZE, MemoryAttribute
from gmemcore.workload.layout import Layout
from gmemcore.workload.operations import Operations
from gmemcore.workload.outcomes import NAMES
from gmemcore.workload.player import Player, build


@dataclass(frozen=True, slots=True)
class StepCount:
    """Operations of one step (conversions: of one direction).

    Attributes
    ----------
    operations, bytes : int
        How many, and what they ask for in all.
    smallest, largest : int
        Bytes of one.
    refused : dict
        How many were refused, by outcome.
    """

    operations: int
    bytes: int
    smallest: int
    largest: int
    refused: dict[str, int]


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
    tallies: dict[str, _Tally] = {}
    operations = 0
    for chunk in stream:
        outcomes = player.run(chunk)["code"]
        operations += len(chunk)
        for name, chosen in _by_step(chunk):
            tallies.setdefault(name, _Tally()).add(chunk["size"][chosen], outcomes[chosen])
    shared = (
        0
        if vm.abi.legacy
        else sum(end - start for gmem in files for start, end, side in gmem.runs() if side == "shared")
    )
    return Contents(
        {name: tally.count() for name, tally in sorted(tallies.items())},
        operations,
        shared * PAGE_SIZE,
        layout.size,
        player.counters,
    )


def _by_step(chunk: Operations) -> "Iterable[tuple[str, np.ndarray[tuple[int], np.dtype[np.bool_]]]]":
    """Which operations are of each step, conversions by their direction."""
    private = (chunk["attributes"] & np.uint64(MemoryAttribute.PRIVATE)) != 0
    for number in np.unique(chunk["step"]):
        of_step = chunk["step"] == number
        if number != Step.CONVERT:
            yield Step(number).name, of_step
            continue
        for name, side in (("CONVERT to private", private), ("CONVERT to shared", ~private)):
            if (of_step & side).any():
                yield name, of_step & side


class _Tally:
    """A `StepCount` that grows."""

    def __init__(self) -> None:
        self._operations = self._bytes = self._largest = 0
        self._smallest = 1 << 64
        self._refused: Counter[str] = Counter()

    def add(
        self,
        sizes: "np.ndarray[tuple[int], np.dtype[np.uint64]]",
        codes: "np.ndarray[tuple[int], np.dtype[np.uint16]]",
    ) -> None:
        self._operations += len(sizes)
        # Halves, because hostile sizes wrap 64 bits in a sum.
        self._bytes += (int((sizes >> np.uint64(32)).sum()) << 32) + int(
            (sizes & np.uint64(0xFFFF_FFFF)).sum()
        )
        self._smallest = min(self._smallest, int(sizes.min()))
        self._largest = max(self._largest, int(sizes.max()))
        for code, n in zip(*np.unique(codes[codes != 0], return_counts=True), strict=True):
            self._refused[NAMES[int(code)]] += int(n)

    def count(self) -> StepCount:
        return StepCount(
            self._operations, self._bytes, self._smallest, self._largest, dict(self._refused.most_common())
        )
