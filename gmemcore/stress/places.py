"""Where in a guest's stream something is checked or made to fail.

Each interval of the stream draws its own place, so places don't depend on how the stream is cut into arrays.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from heapq import merge
from itertools import groupby
from operator import itemgetter
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gmemcore.stress.spec import Spec
from gmemcore.workload.operations import Operations
from gmemcore.workload.seeds import Stream

TRIES: Final = 64
"""Operations at which a fault or a promise is tried before it is given up."""
FEW: Final = 16
"""Below this count, single numbers are drawn faster than an array."""


class Event(NamedTuple):
    """What is done at an operation.

    Attributes
    ----------
    kind : str
        ``oracle``, ``invariants``, ``promise``, or a key of `FAULTS`.
    due : int
        The operation's number. A promise or a fault waits from there on for an operation that it applies to.
    """

    kind: str
    due: int


class Waiting(NamedTuple):
    """A kind of event that waits for an operation.

    Attributes
    ----------
    every : int
        Operations per event; 0: none.
    candidates : callable
        Returns the places of operations that it can be done at.
    """

    every: int
    candidates: Callable[[Operations], NDArray[np.intp]]


class Places:
    """Places of one guest's events. Arrays of its stream are asked for in order.

    Parameters
    ----------
    spec : Spec
        How often each kind is due.
    stream : Stream
        The guest's random numbers.
    checks : Counter
        Counts what was due, as ``pin_due``.
    waiting : mapping of str to Waiting
        The kinds of events that wait for an operation.
    closely : int
        From this operation on, invariants are checked after every one.
    """

    def __init__(
        self,
        spec: Spec,
        stream: Stream,
        checks: "Counter[str]",
        *,
        waiting: Mapping[str, Waiting],
        closely: int,
    ) -> None:
        self._spec, self._stream, self._checks = spec, stream, checks
        self._kinds, self._closely = waiting, closely
        self._waiting: dict[str, tuple[int, int]] = {}  # by kind: since when, and tries left
        self._met: dict[str, int] = {}  # by kind: the `due` of the last one that was done

    def events(self, base: int, operations: Operations) -> Iterator[tuple[int, list[Event]]]:
        """Yield the events at operations number base and on, in order.

        If an operation has several, the first possible one is done. Waiting events are generated lazily,
        because most are done at their first operation.
        """
        end, checks = base + len(operations), self._spec.checks
        every = checks.invariants_every
        last_ones = range((base // every + 1) * every - 1, end, every) if every else ()
        at_once = {
            "oracle": places(self._stream.split("oracle"), checks.oracle_every, base, end),
            "invariants": sorted((*last_ones, *range(max(base, self._closely), end))),
        }
        found: list[Iterable[tuple[int, Event]]] = [
            self._checkpoints(kind, base, operations) for kind in self._kinds
        ]
        found += [[(at, Event(kind, at)) for at in positions] for kind, positions in at_once.items()]
        for position, here in groupby(merge(*found, key=itemgetter(0)), itemgetter(0)):
            yield position, [event for _, event in here]

    def is_open(self, event: Event) -> bool:
        """Return whether an event is still to be done; a waiting one is done once."""
        return self._met.get(event.kind) != event.due

    def close(self, event: Event) -> None:
        """Mark a waiting event as done."""
        self._met[event.kind] = event.due

    def _checkpoints(self, kind: str, base: int, operations: Operations) -> Iterator[tuple[int, Event]]:
        """Yield the operations at which an event is tried until it is done; the next due one ends that."""
        (every, candidates_of), end = self._kinds[kind], base + len(operations)
        if not every:
            return
        dues = places(self._stream.split(kind), every, base, end)
        self._checks[f"{kind}_due"] += len(dues)
        candidates = candidates_of(operations) + base
        first, (due, left) = 0, self._waiting.get(kind, (0, 0))
        stops = (*dues, end)
        for until, stop in zip(candidates.searchsorted(stops).tolist(), stops, strict=True):
            tried = candidates[first : min(until, first + left)].tolist()
            event = Event(kind, due)
            for position in tried:
                if not self.is_open(event):
                    break
                yield position, event
            self._waiting[kind] = due, left - len(tried)
            first, due, left = until, stop, TRIES


def places(stream: Stream, every: int, start: int, end: int) -> list[int]:
    """Return the places from start to end of one event per `every` operations, random in each interval."""
    if not every:
        return []
    first, last = start // every, -(-end // every)
    if last - first < FEW:
        drawn = [stream.one_below(every, i) for i in range(first, last)]
    else:
        drawn = stream.below(every, first, last - first).tolist()
    at = [(first + i) * every + place for i, place in enumerate(drawn)]
    return [place for place in at if start <= place < end]
