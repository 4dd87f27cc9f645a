"""Oracle: an independent model, in plain Python, of what one operation answers and does to page state.

It shares no code with the engine: no kernel, no bits, no arrays. Pages come in runs of equal state, a state
is a set of planes, and each rule maps the state of a page to its next. The answer to a conversion is looked
up in policy, which is data. Numbers of steps are those of `Step`; the rules are those of docs/spec.md.

It doesn't predict launch updates, nor operations that aren't whole within one region.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Final, NamedTuple

from gmemcore.engine.steps import Step
from gmemcore.policy import PLATFORMS, Abi, cell, get_abi
from gmemcore.uapi import PAGE_SIZE, ContentMode, Direction, Firmware, Phase, VmType
from gmemcore.workload.operations import Access

Planes = frozenset[str]
"""Planes that are set on a page."""


class PageRun(NamedTuple):
    """Consecutive pages of one file in the same state, half-open."""

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
class Context:
    """What an answer depends on, apart from the pages.

    Attributes
    ----------
    vm_type, abi, firmware, phase
        Of the Vm.
    """

    vm_type: VmType
    abi: Abi | str
    firmware: Firmware
    phase: Phase

    @property
    def coco(self) -> bool:
        """Whether pages are assigned and accepted, and the guest chooses the kind of its accesses."""
        return PLATFORMS[self.vm_type].coco


class Answer(NamedTuple):
    """What an operation must do.

    Attributes
    ----------
    outcome : str
        ``OK``, or the name of the refusal.
    page : int or None
        The page at which it stopped, if it did.
    runs : list of PageRun
        Pages of the range afterwards.
    """

    outcome: str
    page: int | None
    runs: list[PageRun]


class _Stopped(Exception):
    """A refusal. Nothing has changed, or what `left` says."""

    def __init__(self, outcome: str, page: int | None = None, left: list[PageRun] | None = None) -> None:
        super().__init__(outcome)
        self.outcome, self.page, self.left = outcome, page, left


def answer(context: Context, request: Request, runs: list[PageRun]) -> Answer:
    """Return what a request must do to these runs, which are of the pages that it touches."""
    try:
        return Answer("OK", None, joined(_RULES[request.step](context, request, runs)))
    except _Stopped as stopped:
        return Answer(stopped.outcome, stopped.page, joined(runs if stopped.left is None else stopped.left))


def joined(runs: list[PageRun]) -> list[PageRun]:
    """Merge neighbours of equal state, and drop empty runs."""
    joined: list[PageRun] = []
    for run in runs:
        if joined and joined[-1].planes == run.planes:
            joined[-1] = joined[-1]._replace(end=run.end)
        elif run.start < run.end:
            joined.append(run)
    return joined


def _changed(runs: list[PageRun], rule: Callable[[Planes], Planes]) -> list[PageRun]:
    """Apply a rule to each page."""
    return [PageRun(start, end, rule(planes)) for start, end, planes in runs]


def _stop_at_first(runs: list[PageRun], refuses: Callable[[Planes], str]) -> None:
    """Refuse at the first page for which `refuses` gives a reason."""
    for run in runs:
        if reason := refuses(run.planes):
            raise _Stopped(reason, run.start)


def _need_pages(request: Request) -> None:
    if request.size == 0 or request.offset % PAGE_SIZE or request.size % PAGE_SIZE:
        raise _Stopped("EINVAL")


# ---- conversion -------------------------------------------------------------------------------------


@cache
def _policy(context: Context, direction: Direction, flag: int) -> tuple[str, str | None, str | None]:
    """Outcome, effect and precondition that policy has for one flag."""
    row = cell(context.abi, context.vm_type, context.firmware, context.phase, direction, ContentMode(flag))
    return row.outcome, row.effect, row.unless


def _convert(context: Context, request: Request, runs: list[PageRun]) -> list[PageRun]:
    abi, flags = get_abi(context.abi), request.flags
    known = {int(flag.bit) for flag in abi.flags}
    if flags and flags not in known:
        raise _Stopped("EINVAL")
    to_private = request.attributes == 8

    if _policy(context, Direction.TO_SHARED, 0)[0] == "EINVAL" or request.attributes not in (0, 8):
        raise _Stopped("EINVAL")
    if to_private and _policy(context, Direction.TO_PRIVATE, 0)[0] == "EINVAL":
        raise _Stopped("EINVAL")
    _need_pages(request)
    direction = Direction.TO_PRIVATE if to_private else Direction.TO_SHARED
    outcome, effect, unless = _policy(context, direction, flags)
    if outcome != "OK" or (unless and any(unless in run.planes for run in runs)):
        raise _Stopped("EOPNOTSUPP", request.offset // PAGE_SIZE)
    if not to_private:
        return _changed(runs, lambda planes: planes - {"private", "assigned", "accepted"})
    _stop_at_first(runs, lambda planes: "EAGAIN" if {"allocated", "pinned"} <= planes else "")
    made = {"allocated", "assigned", "accepted"} if effect == "ENCRYPT" else set()
    return _changed(runs, lambda planes: planes | {"private"} | made)


# ---- the file and the host ---------------------------------------------------------------------------


def _allocate(_: Context, request: Request, runs: list[PageRun]) -> list[PageRun]:
    _need_pages(request)
    return _changed(runs, lambda planes: planes | {"allocated"})


def _punch_hole(_: Context, request: Request, runs: list[PageRun]) -> list[PageRun]:
    _need_pages(request)
    return _changed(runs, lambda planes: planes & {"private"})


def _pin(_: Context, request: Request, runs: list[PageRun]) -> list[PageRun]:
    _need_pages(request)
    _stop_at_first(runs, lambda planes: "EFAULT" if planes & {"private", "poisoned"} else "")
    return _changed(runs, lambda planes: planes | {"allocated", "pinned"})


def _unpin(_: Context, request: Request, runs: list[PageRun]) -> list[PageRun]:
    _need_pages(request)
    return _changed(runs, lambda planes: planes - {"pinned"})


def _poison(_: Context, request: Request, runs: list[PageRun]) -> list[PageRun]:
    """Page by page: those before one that isn't in use stay poisoned."""
    _need_pages(request)
    for i, run in enumerate(runs):
        if "allocated" not in run.planes:
            left = _changed(runs[:i], lambda planes: planes | {"poisoned"})
            raise _Stopped("EINVAL", run.start, left + runs[i:])
    return _changed(runs, lambda planes: planes | {"poisoned"})


def _host_access(_: Context, request: Request, runs: list[PageRun]) -> list[PageRun]:
    if request.size == 0:
        raise _Stopped("EINVAL")
    _stop_at_first(runs, lambda planes: "SIGBUS" if planes & {"private", "poisoned"} else "")
    return _changed(runs, lambda planes: planes | {"allocated"})


# ---- the guest ----------------------------------------------------------------------------------------


def _guest_access(context: Context, request: Request, runs: list[PageRun]) -> list[PageRun]:
    if request.size == 0:
        raise _Stopped("EINVAL")

    def refuses(planes: Planes) -> str:
        private = "private" in planes
        chosen = context.coco and request.variant != Access.AS_ATTRIBUTE
        if chosen and private != (request.variant == Access.PRIVATE):
            return "MEMORY_FAULT"
        if "poisoned" in planes:
            return "EHWPOISON"
        return "NOT_VALIDATED" if context.coco and private and "accepted" not in planes else ""

    for i, run in enumerate(runs):
        reason = refuses(run.planes)
        if reason == "NOT_VALIDATED":
            page = PageRun(run.start, run.start + 1, run.planes | {"allocated", "assigned"})
            left = [*runs[:i], page, run._replace(start=run.start + 1), *runs[i + 1 :]]
            raise _Stopped(reason, run.start, left)
        if reason:
            raise _Stopped(reason, run.start)
    return _changed(runs, lambda planes: planes | {"allocated"})


def _accept(context: Context, request: Request, runs: list[PageRun]) -> list[PageRun]:
    _need_pages(request)
    if not context.coco:
        return runs

    def refuses(planes: Planes) -> str:
        if "private" not in planes:
            return "MEMORY_FAULT"
        return "EHWPOISON" if "poisoned" in planes else ""

    _stop_at_first(runs, refuses)
    return _changed(runs, lambda planes: planes | {"allocated", "assigned", "accepted"})


_RULES: Final[dict[int, Callable[[Context, Request, list[PageRun]], list[PageRun]]]] = {
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
"""Steps that the oracle predicts."""


# ---- counters -----------------------------------------------------------------------------------------


def events(before: list[PageRun], after: list[PageRun]) -> dict[str, int]:
    """Return counters of what changed between two lists of runs over the same pages."""
    counts = dict.fromkeys(("pages_changed", "pages_allocated", "assignments"), 0)
    for start, end, old, new in side_by_side(before, after):
        pages = end - start
        counts["pages_changed"] += pages * ("private" in (old ^ new))
        counts["pages_allocated"] += pages * ("allocated" in (new - old))
        counts["assignments"] += pages * ("assigned" in (old ^ new))
    return counts


def side_by_side(before: list[PageRun], after: list[PageRun]) -> list[tuple[int, int, Planes, Planes]]:
    """Cut two lists of runs over the same pages alike: (start, end, planes before, planes after)."""
    cuts = sorted({edge for run in (*before, *after) for edge in (run.start, run.end)})
    pieces, i, j = [], 0, 0
    for start, end in pairwise(cuts):
        while before[i].end <= start:
            i += 1
        while after[j].end <= start:
            j += 1
        pieces.append((start, end, before[i].planes, after[j].planes))
    return pieces
