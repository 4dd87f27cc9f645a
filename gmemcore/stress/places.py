"""Where in a guest's stream something is checked or made to fail.

Places are drawn by the stretch of the stream that they lie in, so they don't depend on how the stream is cut
into arrays.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Final, NamedTuple

from gmemcore.stress.faults import FAULTS
from gmemcore.stress.spec import Spec
from gmemcore.workload.operations import Operations
from gmemcore.workload.seeds import Stream

TRIES: Final = 64
"""Operations at which a fault is tried before it is given up."""


FEW: Final = 16
"""Numbers that are drawn in less time one by one than as an array."""


class Event(NamedTuple):
    """What is done at an operation.

    Attributes
    ----------
    kind : str
        ``oracle``, ``invariants``, or a key of `FAULTS`.
    due : int
        The operation's number; for a fault, the number from which it waits for an operation that it can make
        fail.
    """

    kind: str
    due: int


class Places:
    """Places of one guest's events. Arrays of its stream are asked for in order.

    Parameters
    ----------
    spec : Spec
        How often each kind is due.
    stream : Stream
        The guest's random numbers.
    checks : Counter
        Counts faults that were due, as ``pin_due``.
    has_faults : bool
        Whether faults are injected.
    closely : int
        From this operation on, invariants are checked after every one.
    """

    def __init__(
        self, spec: Spec, stream: Stream, checks: "Counter[str]", *, has_faults: bool, closely: int
    ) -> None:
        self._spec, self._stream, self._checks = spec, stream, checks
        self._has_faults, self._closely = has_faults, closely
        self._waiting: dict[str, tuple[int, int]] = {}  # by fault: since when, and tries left
        self._met: dict[str, int] = {}  # by fault: since when the last one that was injected had waited

    def events(self, base: int, operations: Operations) -> list[tuple[int, list[Event]]]:
        """Return the events at operations number base and on, in order.

        Where an operation has several, the first one that is possible is done.
        """
        end, checks = base + len(operations), self._spec.checks
        events: dict[int, list[Event]] = {}
        for kind in FAULTS:
            for position, due in self._checkpoints(kind, base, operations):
                events.setdefault(position, []).append(Event(kind, due))
        every = checks.invariants_every
        last_ones = range((base // every + 1) * every - 1, end, every) if every else ()
        for kind, positions in (
            ("oracle", places(self._stream.split("oracle"), checks.oracle_every, base, end)),
            ("invariants", (*last_ones, *range(max(base, self._closely), end))),
        ):
            for position in positions:
                events.setdefault(position, []).append(Event(kind, position))
        return sorted(events.items())

    def is_open(self, event: Event) -> bool:
        """Return whether an event is still to be done: a fault is injected once."""
        return self._met.get(event.kind) != event.due

    def close(self, event: Event) -> None:
        """Strike a fault off after it was injected."""
        self._met[event.kind] = event.due

    def _checkpoints(self, kind: str, base: int, operations: Operations) -> Iterator[tuple[int, int]]:
        """Operations at which a fault is tried, and since which one it waits; a new one ends the wait."""
        every, end = getattr(self._spec.faults, f"{kind}_every"), base + len(operations)
        if not every or not self._has_faults:
            return
        dues = places(self._stream.split(kind), every, base, end)
        self._checks[f"{kind}_due"] += len(dues)
        candidates = FAULTS[kind].candidates(operations) + base
        first, (due, left) = base, self._waiting.get(kind, (0, 0))
        for until in (*dues, end):
            low, high = candidates.searchsorted((first, until))
            tried = candidates[low:high][:left].tolist()
            yield from ((position, due) for position in tried)
            self._waiting[kind] = due, left - len(tried)
            first, due, left = until, until, TRIES


def places(stream: Stream, every: int, start: int, end: int) -> list[int]:
    """Return the places from start to end of one event in every `every`, each random in its stretch."""
    if not every:
        return []
    first, last = start // every, -(-end // every)
    if last - first < FEW:
        drawn = [stream.one_below(every, i) for i in range(first, last)]
    else:
        drawn = stream.below(every, first, last - first).tolist()
    at = [(first + i) * every + place for i, place in enumerate(drawn)]
    return [place for place in at if start <= place < end]
