"""Counts: what a stream or a trace consists of, step by step."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.steps import Step
from gmemcore.policy import flag_name
from gmemcore.uapi import ContentMode, MemoryAttribute, PageType
from gmemcore.workload.operations import FROM_SOURCE, Operations
from gmemcore.workload.outcomes import NAMES

_KINDS: Final[dict[int, tuple[str, ...]]] = {
    Step.CONVERT: ("attributes", "flags"),
    Step.POPULATE: ("variant",),
}
"""Fields by which the operations of a step are told apart."""


@dataclass(frozen=True, slots=True)
class StepCount:
    """Operations of one step (conversions: of one direction and flag; populates: of one page type).

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


class StepCounts:
    """A `StepCount` by name, growing with each chunk."""

    def __init__(self) -> None:
        self._tallies: dict[str, _Tally] = {}

    def add(self, operations: Operations, codes: NDArray[np.uint16] | None = None) -> None:
        """Count a chunk; codes: what came of it, if it was run."""
        found = np.zeros(len(operations), np.uint16) if codes is None else codes
        for name, chosen in _by_step(operations):
            self._tallies.setdefault(name, _Tally()).add(operations["size"][chosen], found[chosen])

    def counts(self) -> dict[str, StepCount]:
        """Return what was counted, by name."""
        return {name: tally.count() for name, tally in sorted(self._tallies.items())}


def _by_step(operations: Operations) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Which operations are of each name."""
    for number in np.unique(operations["step"]):
        of_step = operations["step"] == number
        kinds = _KINDS.get(int(number), ())
        if not kinds:
            yield _name(Step(int(number))), of_step
            continue
        for kind in np.unique(operations[of_step][list(kinds)]):
            same = [operations[name] == kind[name] for name in kinds]
            yield _name(Step(int(number)), *kind), np.logical_and.reduce([of_step, *same])


def _name(step: Step, *kind: int) -> str:
    if step == Step.CONVERT:
        attributes, flags = map(int, kind)
        other = attributes & ~int(MemoryAttribute.PRIVATE)
        side = "private" if attributes & MemoryAttribute.PRIVATE else "shared"
        attribute = f", attributes {attributes:#x}" if other else ""
        return f"CONVERT to {side}{attribute}" + (f", {flag_name(ContentMode(flags))}" if flags else "")
    if step == Step.POPULATE:
        page_type = tuple(PageType)[int(kind[0]) & ~FROM_SOURCE]
        return f"POPULATE {page_type}" + (" from a source" if int(kind[0]) & FROM_SOURCE else " in place")
    return step.name


class _Tally:
    """A `StepCount` that grows."""

    def __init__(self) -> None:
        self._operations = self._bytes = self._largest = 0
        self._smallest = 1 << 64
        self._refused: Counter[str] = Counter()

    def add(self, sizes: NDArray[np.uint64], codes: NDArray[np.uint16]) -> None:
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
