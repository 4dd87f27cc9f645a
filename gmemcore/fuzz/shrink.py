"""Shrinking: the fewest steps, and the plainest numbers, that still show a difference.

A candidate counts only if it ends in a difference of the same kind: the same operation and both outcomes. So
a walk isn't shrunk to some other difference.
"""

import time
from collections.abc import Iterator
from typing import Any, Final

from gmemcore.conformance import VectorError
from gmemcore.fuzz.lockstep import Arena, Finding, run
from gmemcore.uapi import PAGE_SIZE

Step = dict[str, Any]

TRIES: Final = 2000
"""Walks run at most to shrink one."""
SECONDS: Final = 600.0
"""The same by the clock: a step that hangs takes ten seconds in each."""
_PLAIN_GPA: Final = 1 << 32
PLAINER: Final[dict[str, tuple[Any, ...]]] = {
    "size": (PAGE_SIZE, 2 * PAGE_SIZE, 1),
    "offset": (0, PAGE_SIZE),
    "gmem_offset": (0, PAGE_SIZE),
    "gpa": (_PLAIN_GPA, 2 * _PLAIN_GPA, _PLAIN_GPA + PAGE_SIZE),
    "address": (_PLAIN_GPA,),
    "slot": (0, 1),
    "flags": (0, 1, 3),
    "data": ("01",),
}
"""What is tried in place of a field's value, plainest first."""


def shrink(arena: Arena, steps: list[Step], finding: Finding) -> tuple[list[Step], Finding]:
    """Return fewer and plainer steps that end in a difference of the same kind, and that difference.

    Parameters
    ----------
    arena : Arena
        Where the walk was run.
    steps : list of dict
        The walk.
    finding : Finding
        What it ended in.
    """
    best = _Best(arena, steps[: finding.number + 1], finding)
    _fewer(best)
    _plainer(best)
    _fewer(best)
    return best.steps, best.finding


class _Best:
    """The best walk so far, and how many tries are left."""

    def __init__(self, arena: Arena, steps: list[Step], finding: Finding) -> None:
        self.steps, self.finding = steps, finding
        self._arena = arena
        self._left, self._end = TRIES, time.monotonic() + SECONDS

    def try_steps(self, steps: list[Step]) -> bool:
        """Take a walk if it ends in the same kind of difference."""
        if self._left == 0 or time.monotonic() > self._end or not steps:
            return False
        self._left -= 1
        try:
            found = run(self._arena, steps).finding
        except VectorError:  # it uses a file that it no longer creates
            return False
        if found is None or found.kind != self.finding.kind:
            return False
        self.steps, self.finding = steps[: found.number + 1], found
        return True


def _fewer(best: _Best) -> None:
    """Leave out runs of steps, half of them first, then ever fewer; the last step stays."""
    length = len(best.steps) // 2
    while length:
        start = 0
        while start < len(best.steps) - 1:
            kept = best.steps[:start] + best.steps[min(start + length, len(best.steps) - 1) :]
            if not best.try_steps(kept):
                start += length
        length //= 2


def _plainer(best: _Best) -> None:
    """Try plainer values, field by field."""
    number = 0
    while number < len(best.steps):
        for plainer in _candidates(best.steps[number]):
            if best.try_steps([*best.steps[:number], plainer, *best.steps[number + 1 :]]):
                break
        number += 1


def _candidates(step: Step) -> Iterator[Step]:
    for field, values in PLAINER.items():
        if field in step:
            before = values[: values.index(step[field])] if step[field] in values else values
            yield from (step | {field: value} for value in before)
    for field in ("flags", "error_offset_in", "reserved"):
        if field in step and step["op"] != "create":
            yield {name: value for name, value in step.items() if name != field}
