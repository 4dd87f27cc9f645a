"""Oracle: what one operation must answer and do to page state, told once more in plain Python.

It shares nothing with the engine: no kernel, no bit, no array. Pages come in runs of equal state, a state is
a set of planes, and each rule says what becomes of a page. Policy, which is data, is asked for the answer to
a conversion. The numbers are those of `Step`; the rules those of docs/spec.md.

Launch updates, and operations that aren't whole within one region, aren't told here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Final, NamedTuple

from gmemcore.engine.steps import Step
from gmemcore.policy import PLATFORMS, cell, get_abi
from gmemcore.uapi import PAGE_SIZE, ContentMode, Direction, Firmware, Phase, VmType
from gmemcore.workload.operations import Access

Planes = frozenset[str]
"""The planes that are set on a page."""


class Run(NamedTuple):
    """Pages of one file in one state, half-open."""

    start: int
    end: int
    planes: Planes


class Request(NamedTuple):
    """One operation, by offset in its file."""

    step: int
    variant: int
    offset: int
    size: int
    attributes: int
    flags: int


@dataclass(frozen=True)
class Machine:
    """What the answer depends on beside the pages.

    Attributes
    ----------
    vm_type, abi, firmware, phase
        Of the Vm.
    """

    vm_type: VmType
    abi: str
    firmware: Firmware
    phase: Phase

    @property
    def coco(self) -> bool:
        """Whether pages are assigned and accepted, and the guest chooses the kind of its accesses."""
        return PLATFORMS[self.vm_type].coco


class Answer(NamedTuple):
    """What must come of an operation.

    Attributes
    ----------
    outcome : str
        ``OK``, or the name of the refusal.
    page : int or None
        The page that stopped it, where one did.
    runs : list of Run
        The pages of the range afterwards.
    """

    outcome: str
    page: int | None
    runs: list[Run]


class _Stopped(Exception):
    """A refusal, before anything has changed but what is in `left`."""

    def __init__(self, outcome: str, page: int | None = None, left: list[Run] | None = None) -> None:
        super().__init__(outcome)
        self.outcome, self.page, self.left = outcome, page, left


def answer(machine: Machine, request: Request, runs: list[Run]) -> Answer:
    """Say what must come of a request on pages in these runs, which are those that it touches."""
    try:
        return Answer("OK", None, joined(_RULES[request.step](machine, request, runs)))
    except _Stopped as stopped:
        return Answer(stopped.outcome, stopped.page, joined(runs if stopped.left is None else stopped.left))


def joined(runs: list[Run]) -> list[Run]:
    """Runs so that neighbours differ."""
    joined: list[Run] = []
    for run in runs:
        if joined and joined[-1].planes == run.planes:
            joined[-1] = joined[-1]._replace(end=run.end)
        elif run.start < run.end:
            joined.append(run)
    return joined


def _changed(runs: list[Run], rule: Callable[[Planes], Planes]) -> list[Run]:
    """Each page after a rule."""
    return [Run(start, end, rule(planes)) for start, end, planes in runs]


def _stop_at_first(runs: list[Run], refuses: Callable[[Planes], str]) -> None:
    """Refuse at the first page for which there is a reason."""
    for run in runs:
        if reason := refuses(run.planes):
            raise _Stopped(reason, run.start)


def _need_pages(request: Request) -> None:
    if request.size == 0 or request.offset % PAGE_SIZE or request.size % PAGE_SIZE:
        raise _Stopped("EINVAL")


# ---- conversion -------------------------------------------------------------------------------------


@cache
def _policy(machine: Machine, direction: Direction, flag: int) -> tuple[str, str | None, str | None]:
    """Outcome, effect and precondition that policy has for one flag."""
    row = cell(machine.abi, machine.vm_type, machine.firmware, machine.phase, direction, ContentMode(flag))
    return row.outcome, row.effect, row.unless


def _convert(machine: Machine, request: Request, runs: list[Run]) -> list[Run]:
    abi, flags = get_abi(machine.abi), request.flags
    known = {int(flag.bit) for flag in abi.flags}
    if flags and flags not in known:
        raise _Stopped("EINVAL")
    to_private = request.attributes == 8

    if _policy(machine, Direction.TO_SHARED, 0)[0] == "EINVAL" or request.attributes not in (0, 8):
        raise _Stopped("EINVAL")
    if to_private and _policy(machine, Direction.TO_PRIVATE, 0)[0] == "EINVAL":
        raise _Stopped("EINVAL")
    _need_pages(request)
    direction = Direction.TO_PRIVATE if to_private else Direction.TO_SHARED
    outcome, effect, unless = _policy(machine, direction, flags)
    if outcome != "OK" or (unless and any(unless in run.planes for run in runs)):
        raise _Stopped("EOPNOTSUPP", request.offset // PAGE_SIZE)
    if not to_private:
        return _changed(runs, lambda planes: planes - {"private", "assigned", "accepted"})
    _stop_at_first(runs, lambda planes: "EAGAIN" if {"allocated", "pinned"} <= planes else "")
    made = {"allocated", "assigned", "accepted"} if effect == "ENCRYPT" else set()
    return _changed(runs, lambda planes: planes | {"private"} | made)


# ---- the file and the host ---------------------------------------------------------------------------


def _allocate(_: Machine, request: Request, runs: list[Run]) -> list[Run]:
    _need_pages(request)
    return _changed(runs, lambda planes: planes | {"allocated"})


def _punch_hole(_: Machine, request: Request, runs: list[Run]) -> list[Run]:
    _need_pages(request)
    return _changed(runs, lambda planes: planes & {"private"})


def _pin(_: Machine, request: Request, runs: list[Run]) -> list[Run]:
    _need_pages(request)
    _stop_at_first(runs, lambda planes: "EFAULT" if planes & {"private", "poisoned"} else "")
    return _changed(runs, lambda planes: planes | {"allocated", "pinned"})


def _unpin(_: Machine, request: Request, runs: list[Run]) -> list[Run]:
    _need_pages(request)
    return _changed(runs, lambda planes: planes - {"pinned"})


def _poison(_: Machine, request: Request, runs: list[Run]) -> list[Run]:
    """Page by page: those before one that isn't in use stay poisoned."""
    _need_pages(request)
    for i, run in enumerate(runs):
        if "allocated" not in run.planes:
            left = _changed(runs[:i], lambda planes: planes | {"poisoned"})
            raise _Stopped("EINVAL", run.start, left + runs[i:])
    return _changed(runs, lambda planes: planes | {"poisoned"})


def _host_access(_: Machine, request: Request, runs: list[Run]) -> list[Run]:
    if request.size == 0:
        raise _Stopped("EINVAL")
    _stop_at_first(runs, lambda planes: "SIGBUS" if planes & {"private", "poisoned"} else "")
    return _changed(runs, lambda planes: planes | {"allocated"})


# ---- the guest ----------------------------------------------------------------------------------------


def _guest_access(machine: Machine, request: Request, runs: list[Run]) -> list[Run]:
    if request.size == 0:
        raise _Stopped("EINVAL")

    def refuses(planes: Planes) -> str:
        private = "private" in planes
        chosen = machine.coco and request.variant != Access.AS_ATTRIBUTE
        if chosen and private != (request.variant == Access.PRIVATE):
            return "MEMORY_FAULT"
        if "poisoned" in planes:
            return "EHWPOISON"
        return "NOT_VALIDATED" if machine.coco and private and "accepted" not in planes else ""

    for i, run in enumerate(runs):
        reason = refuses(run.planes)
        if reason == "NOT_VALIDATED":
            page = Run(run.start, run.start + 1, run.planes | {"allocated", "assigned"})
            left = [*runs[:i], page, run._replace(start=run.start + 1), *runs[i + 1 :]]
            raise _Stopped(reason, run.start, left)
        if reason:
            raise _Stopped(reason, run.start)
    return _changed(runs, lambda planes: planes | {"allocated"})


def _accept(machine: Machine, request: Request, runs: list[Run]) -> list[Run]:
    _need_pages(request)
    if not machine.coco:
        return runs

    def refuses(planes: Planes) -> str:
        if "private" not in planes:
            return "MEMORY_FAULT"
        return "EHWPOISON" if "poisoned" in planes else ""

    _stop_at_first(runs, refuses)
    return _changed(runs, lambda planes: planes | {"allocated", "assigned", "accepted"})


_RULES: Final[dict[int, Callable[[Machine, Request, list[Run]], list[Run]]]] = {
    Step.CONVERT: _convert,
    Step.HOST_READ: _host_access,
    Step.HOST_WRITE: _host_access,
    Step.GUEST_READ: _guest_access,
    Step.GUEST_WRITE: _guest_access,
    Step.ACCEPT: _accept,
    Step.ALLOCATE: _allocate,
    Step.PUNCH_HOLE: _punch_hole,
    Step.PIN: _pin,
    Step.UNPIN: _unpin,
    Step.POISON: _poison,
}
STEPS: Final = frozenset(_RULES)
"""Steps that the oracle tells."""


# ---- counters -----------------------------------------------------------------------------------------


def events(before: list[Run], after: list[Run]) -> dict[str, int]:
    """Pages that changed between two lists of runs over the same pages, as counters count them."""
    counts = dict.fromkeys(("pages_changed", "pages_allocated", "assignments"), 0)
    for start, end, old, new in side_by_side(before, after):
        pages = end - start
        counts["pages_changed"] += pages * ("private" in (old ^ new))
        counts["pages_allocated"] += pages * ("allocated" in (new - old))
        counts["assignments"] += pages * ("assigned" in (old ^ new))
    return counts


def side_by_side(before: list[Run], after: list[Run]) -> list[tuple[int, int, Planes, Planes]]:
    """Pieces of pages with the state of both: (start, end, planes before, planes after)."""
    cuts = sorted({edge for run in (*before, *after) for edge in (run.start, run.end)})
    pieces, i, j = [], 0, 0
    for start, end in pairwise(cuts):
        while before[i].end <= start:
            i += 1
        while after[j].end <= start:
            j += 1
        pieces.append((start, end, before[i].planes, after[j].planes))
    return pieces
