"""Several guests in one log: which threads are one guest's, and the choice of one.

A log of a whole host holds every guest on it. Names of guests and ids of processes tell them apart where the
tracer printed them. Thread ids alone do where a name repeats: a process has one "CPU 0/KVM", so two threads
of that name are two guests.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.spelling import option
from gmemcore.units import counted
from gmemcore.workload.logs.forms import Kind
from gmemcore.workload.logs.log import Log
from gmemcore.workload.logs.prefixes import Thread
from gmemcore.workload.trace import TraceError

UNKNOWN: Final = "unknown"
"""Name of the guest of lines that name no thread, beside others that do."""
_SHOWN: Final = 4
"""Threads of a guest, and guests, that a message names."""
_UNIQUE: Final = re.compile(r"main|(?:\w+[ _-])?(?:v?cpu|vp)[ :_-]?\d+(?:/\w*)?", re.IGNORECASE)
"""Names of threads that a process has one of: its main thread (as QEMU names it), and one per vCPU."""
_MAIN: Final = re.compile(r"main$|qemu|cloud-hyp|crosvm$|firecracker|kvmtool|lkvm|openvmm|libkrun|krun")
"""Names of main threads where other threads have names of their own: the VMM's."""


@dataclass(frozen=True, slots=True)
class LoggedGuest:
    """One guest of a log.

    Attributes
    ----------
    name : str
        Name that selects it: the guest's name, or the id of its process or of its first thread.
    threads : tuple of int
        Numbers of its threads in the log.
    events : int
        Number of its events.
    """

    name: str
    threads: tuple[int, ...]
    events: int


def guests_of(log: Log) -> list[LoggedGuest]:
    """Return the guests of a log, in the order in which they appear."""
    groups = _groups(log)
    counts = np.bincount(log.events["thread"], minlength=len(log.threads)).tolist()
    return [LoggedGuest(_name(log, group), tuple(group), sum(counts[i] for i in group)) for group in groups]


def choose(log: Log, wanted: str | None) -> NDArray[np.bool_] | None:
    """Return which events are of one guest; None: all of them.

    Parameters
    ----------
    log : Log
        The log.
    wanted : str or None
        Name of a guest, id of a process or of a thread; or several threads, comma-separated. None: there is
        one guest only.

    Raises
    ------
    TraceError
        The log has several guests and none was chosen, or none has that name; the message lists them.
    """
    guests = guests_of(log)
    if wanted is None:
        if len(guests) > 1:
            raise TraceError(f"{len(guests):,} guests in one log; choose one: {_listed(log, guests)}")
        return None
    threads = _threads_named(log, guests, wanted)
    if not threads:
        raise TraceError(f"no guest {wanted!r} in this log; there is {_listed(log, guests)}")
    return np.isin(log.events["thread"], sorted(threads))


def _threads_named(log: Log, guests: Sequence[LoggedGuest], wanted: str) -> set[int]:
    """Return the threads that a choice names: whole guests, or exactly the threads that are listed."""
    by_name = {i for guest in guests if guest.name == wanted for i in guest.threads}
    if by_name:
        return by_name
    ids = wanted.split(",")
    if len(ids) > 1:
        return {i for i, thread in enumerate(log.threads) if str(thread.tid) in ids}
    return {
        i
        for guest in guests
        if any(wanted in (str(log.threads[j].tid), str(log.threads[j].pid)) for j in guest.threads)
        for i in guest.threads
    }


def _listed(log: Log, guests: Sequence[LoggedGuest]) -> str:
    texts = []
    for guest in guests[:_SHOWN]:
        threads = [str(log.threads[i]) for i in guest.threads]
        more = f" and {len(threads) - _SHOWN:,} more" if len(threads) > _SHOWN else ""
        listed = f"{', '.join(threads[:_SHOWN])}{more}: {counted(guest.events, 'event')}"
        texts.append(f"{option('guest', guest.name)} ({listed})")
    if len(guests) > _SHOWN:
        texts.append(f"and {len(guests) - _SHOWN:,} more")
    return ", ".join(texts)


def _name(log: Log, group: Sequence[int]) -> str:
    threads = [log.threads[i] for i in group]
    names = {thread.guest for thread in threads} - {None}
    if len(names) == 1:
        return str(names.pop())
    ids = [number for thread in threads if (number := thread.pid or thread.tid)]
    return str(min(ids)) if ids else UNKNOWN


# ---- grouping ----------------------------------------------------------------------------------------------
def _groups(log: Log) -> list[list[int]]:
    """Return threads by guest: by the guest's name, else by process, else by the names of threads."""
    threads = log.threads
    processes = {thread.tid: thread.pid for thread in threads if thread.tid and thread.pid}
    known: dict[str | int, list[int]] = {}
    rest: dict[int | None, list[int]] = {}
    for i, thread in enumerate(threads):
        key = thread.guest or thread.pid or (processes.get(thread.tid) if thread.tid else None)
        if key is None:
            rest.setdefault(thread.tid, []).append(i)
        else:
            known.setdefault(key, []).append(i)
    nameless = rest.pop(None, [])
    groups = [*known.values(), *_by_thread(log, rest)]
    if len(known) == 1 and len(groups) == 2:
        both = [*groups[0], *groups[1]]
        groups = [both] if _repeats(_names(threads, both)) < 2 else groups
    if nameless and len(groups) == 1:
        groups[0] += nameless
    elif nameless:
        groups.append(nameless)
    return sorted((sorted(group) for group in groups), key=lambda group: group[0])


def _by_thread(log: Log, rest: dict[int | None, list[int]]) -> list[list[int]]:
    """Return threads whose process is unknown, by guest.

    A process starts its threads with ascending ids, its main thread first. So threads in the order of their
    ids are one guest until a name repeats or another main thread comes. If guests were started at the same
    time, their ids are mixed. Then each thread stands alone, and the user has to name all threads of a guest.
    """
    if not rest:
        return []
    ids = sorted(tid for tid in rest if tid is not None)
    name_of = _names(log.threads, [i for tid in ids for i in rest[tid]])
    if not any(map(_UNIQUE.fullmatch, name_of.values())):
        return _by_launch(log, rest, ids)
    groups: list[list[int]] = []
    names: set[str] = set()
    for tid in ids:
        name = name_of.get(tid, "")
        if not groups or name in names or _MAIN.match(name):
            groups.append([])
            names = set()
        groups[-1] += rest[tid]
        names |= {name} if name else set()
    most = _repeats(name_of)
    return groups if most < 2 or len(groups) == most else [rest[tid] for tid in ids]


def _by_launch(log: Log, rest: dict[int | None, list[int]], ids: Sequence[int]) -> list[list[int]]:
    """Return threads without names by guest: launches that overlap in time are of different processes."""
    kinds, threads = log.events["kind"], log.events["thread"]
    launching = np.unique(threads[np.isin(kinds, (Kind.INIT, Kind.START, Kind.FINISH))]).tolist()
    mains = sorted({tid for i in launching if (tid := log.threads[i].tid) in rest and tid is not None})
    spans = []
    for tid in mains:
        places = np.flatnonzero(np.isin(threads, rest[tid]))
        spans.append((int(places[0]), int(places[-1])))
    spans.sort()
    if not any(after[0] < before[1] for before, after in pairwise(spans)):
        return [[i for tid in ids for i in rest[tid]]]
    groups: dict[int, list[int]] = {}
    for tid in ids:
        main = max((main for main in mains if main <= tid), default=mains[0])
        groups.setdefault(main, []).extend(rest[tid])
    return list(groups.values())


def _names(threads: Sequence[Thread], chosen: Sequence[int]) -> dict[int, str]:
    """Return the name of each thread id; that of a vCPU where it has had several."""
    names: dict[int, str] = {}
    for i in chosen:
        tid, name = threads[i].tid, threads[i].name
        if tid is not None and name and not _UNIQUE.fullmatch(names.get(tid, "")):
            names[tid] = name
    return names


def _repeats(names: dict[int, str]) -> int:
    """Return how many threads have the same name of those that a process has once."""
    counts = Counter(name for name in names.values() if _UNIQUE.fullmatch(name))
    return max(counts.values(), default=0)
