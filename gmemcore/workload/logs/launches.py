"""Several launches in one log: where each VM begins, and how its launch ended.

QEMU makes a new VM when a confidential guest is reset, and a log may go on over several runs of QEMU. Events
of a launch say where a VM begins: `split` reads them as a state machine.

References
----------
QEMU, ``target/i386/sev.c`` (``sev_common_kvm_init``, ``sev_snp_launch_finish``, ``sev_handle_reset``),
``target/i386/kvm/tdx.c`` (``tdx_handle_reset``). QEMU prints ``…_handle_reset`` behind the launch that the
reset leads to.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from gmemcore.workload.logs.forms import RUNNING, Kind
from gmemcore.workload.logs.log import Events
from gmemcore.workload.trace import TraceError

OPERATIONS: Final = (Kind.CONVERT, Kind.ATTRIBUTES, Kind.FAULT, Kind.BLOCK, Kind.UPDATE, Kind.FINISH)
"""Kinds that become operations."""
_GUEST: Final = (Kind.CONVERT, Kind.FAULT, Kind.BLOCK)
"""What a guest does that runs."""
_LAUNCH: Final = (Kind.INIT, Kind.START, Kind.UPDATE, Kind.FINISH, Kind.STATE, Kind.RESET, Kind.FAILED)


@dataclass(slots=True)
class Span:
    """The events of one VM.

    Attributes
    ----------
    start, end : int
        The first, and the one behind the last.
    finish : int or None
        The event that ended the launch: `Kind.FINISH`, or the state that shows that it has ended.
    failures : list of int
        Events `Kind.FAILED`.
    traces_states : bool
        Whether changes of state are in the log.
    confirmed : bool
        Whether one shows that the launch ended well.
    """

    start: int
    end: int = 0
    finish: int | None = None
    failures: list[int] | None = None
    traces_states: bool = False
    confirmed: bool = False


def split(events: Events) -> list[Span]:
    """Return the VMs of a log, in order; those of which nothing can be replayed are left out.

    Raises
    ------
    TraceError
        A launch begins within another, and nothing shows that the first has ended: two guests, perhaps.
    """
    splitter = _Splitter(events)
    for i in np.flatnonzero(np.isin(events["kind"], _LAUNCH)).tolist():
        splitter.see(i, Kind(int(events["kind"][i])))
    return splitter.spans()


class _Splitter:
    """Reads the events of launches in order; what lies between them it counts."""

    def __init__(self, events: Events) -> None:
        self._events = events
        kinds = events["kind"]
        self._guest = np.flatnonzero(np.isin(kinds, _GUEST))
        # Conversions can prepare a launch; an access is of a guest that runs.
        self._runs = np.flatnonzero(kinds == Kind.FAULT)
        self._operations = np.flatnonzero(np.isin(kinds, OPERATIONS))
        self._finishes = np.flatnonzero(kinds == Kind.FINISH)
        self._starts = np.flatnonzero(np.isin(kinds, (Kind.INIT, Kind.START, Kind.RESET)))
        self._spans: list[Span] = []
        self._begin(0)

    def _begin(self, at: int) -> None:
        if self._spans:
            self._spans[-1].end = at
        self._span = Span(at, failures=[])
        self._spans.append(self._span)
        self._last_update: int | None = None
        self._ended = False

    def _any(self, places: "np.ndarray[tuple[int], np.dtype[np.intp]]", start: int, end: int) -> bool:
        """Whether one of the places is in [start, end)."""
        return int(np.searchsorted(places, start)) < int(np.searchsorted(places, end))

    def see(self, i: int, kind: Kind) -> None:
        """Read one event of a launch."""
        span = self._span
        if self._begins(i, kind):
            # Memslots of the new VM are set before QEMU says that the guest was reset.
            self._begin(self._behind_last(i) if kind == Kind.RESET else i)
            span = self._span
        if kind == Kind.UPDATE:
            self._last_update = i
        elif kind == Kind.FINISH:
            span.finish, self._ended = i, True
        elif kind == Kind.STATE:
            span.traces_states = True
            if int(self._events["value"][i]) == RUNNING:
                span.confirmed = self._ended = True
                if span.finish is None and self._last_update is not None:
                    span.finish = i
        elif kind == Kind.FAILED:
            self._ended = True
            assert span.failures is not None
            span.failures.append(i)

    def _begins(self, i: int, kind: Kind) -> bool:
        """Whether an event is the first of another VM."""
        span = self._span
        has_operations = self._any(self._operations, span.start, i)
        if kind == Kind.RESET:
            return has_operations and self._any(self._guest, span.finish or span.start, i)
        if kind == Kind.INIT:
            return has_operations
        if kind == Kind.START:
            if self._last_update is None or self._ended:
                return has_operations
            if self._any(self._guest, self._last_update, i):
                return True
            line = int(self._events["line"][i])
            raise TraceError(
                f"line {line}: a launch starts before the one before it is finished; "
                "logs of several guests must say which thread wrote each line"
            )
        if kind == Kind.UPDATE and self._ended and span.finish is not None:
            # Without an end of its own it is an update too late, not a launch.
            following = np.searchsorted(self._starts, i)
            until = int(self._starts[following]) if following < len(self._starts) else len(self._events)
            return self._any(self._finishes, i, until)
        if kind == Kind.UPDATE:
            return self._any(self._runs, span.start if self._last_update is None else self._last_update, i)
        return False

    def _behind_last(self, i: int) -> int:
        """Return the event behind the last one before i that isn't of a memslot."""
        kinds = self._events["kind"]
        while i > self._span.start and kinds[i - 1] == Kind.SLOT:
            i -= 1
        return i

    def spans(self) -> list[Span]:
        """Return what was found."""
        self._spans[-1].end = len(self._events)
        return [span for span in self._spans if self._any(self._operations, span.start, span.end)]


def failures_of(span: Span, events: Events, texts: Sequence[str]) -> list[tuple[int, str]]:
    """Return what was refused during a launch: (line, what QEMU printed)."""
    return [(int(events["line"][i]), texts[int(events["value"][i])]) for i in span.failures or ()]
