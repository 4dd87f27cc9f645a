"""One guest's run: its behaviour played, checked, disturbed, and summed up in a small result.

A guest depends on the spec and on its number, and on nothing else: what it meets is drawn by place (see
`gmemcore.workload.seeds`), and batches are cut where something is to be checked or made to fail, which
changes no outcome. So its result is the same in any chunk, on any worker, and when it is run again.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.counters import Counters
from gmemcore.engine.state import Survey
from gmemcore.engine.steps import Step
from gmemcore.machine import GuestMemfd, VmFace, create_vm
from gmemcore.stress import oracle
from gmemcore.stress.invariants import ViolationError, check_file, state_digest
from gmemcore.stress.memory import backing_of
from gmemcore.stress.merge import GuestResult
from gmemcore.stress.spec import Plan, Spec
from gmemcore.uapi import PAGE_SIZE, MemoryAttribute
from gmemcore.workload.behaviours import BEHAVIOURS
from gmemcore.workload.layout import Layout
from gmemcore.workload.operations import Operations, empty_operations, shows_launch
from gmemcore.workload.outcomes import NAMES
from gmemcore.workload.player import Player, build
from gmemcore.workload.seeds import Stream

SIZE_CLASSES: Final = 40
"""Places of the histogram of conversions by size: up to 2^40 pages."""
_SMALL: Final = 4096  # pages of a conversion up to which sizes are counted by the array
_SMALL_CLASSES: Final = 1 << np.arange(12)
_LOOKS: Final = 64  # operations at which a fault is tried before it is given up
_CHUNK: Final = 1 << 16  # operations held at a time; a batch of conversions takes 150 bytes each


class Violation(msgspec.Struct, frozen=True):
    """What did not hold.

    Attributes
    ----------
    guest : int
        Its number in the fleet.
    operation : int
        The number of the operation in the guest's stream after which it did not hold.
    what : str
        What was found, and what was expected.
    """

    guest: int
    operation: int
    what: str


def run_guest(
    spec: Spec,
    number: int,
    *,
    until: int | None = None,
    watch: Callable[[VmFace, int], object] | None = None,
) -> GuestResult | Violation:
    """Run one guest.

    Parameters
    ----------
    spec : Spec
        The fleet.
    number : int
        Which of its guests.
    until : int or None
        Number of the last operation that is run; None: all.
    watch : callable or None
        Called with the guest and the number of the operation that was run last, when it ends: once more
        where a violation is looked for again.

    Returns
    -------
    GuestResult or Violation
        What it did; or the first thing that did not hold, at the very operation.
    """
    found = _attempt(spec, number, until, watch)
    if isinstance(found, GuestResult):
        return found
    # Invariants are looked at now and then: which operation broke them is found by looking after each of the
    # last ones.
    closely = found.operation - spec.checks.invariants_every
    first = _attempt(spec, number, found.operation, watch, closely)
    return first if isinstance(first, Violation) else found


def _attempt(
    spec: Spec,
    number: int,
    until: int | None,
    watch: Callable[[VmFace, int], object] | None,
    closely: int | None = None,
) -> GuestResult | Violation:
    with closing(GuestRun(spec, spec.plan(number), closely)) as run:
        found: GuestResult | Violation
        try:
            found = run.result(until)
        except ViolationError as error:
            found = Violation(number, run.at, str(error))
        if watch is not None:
            watch(run.vm, run.at)
        return found


class Event(NamedTuple):
    """Something that is to happen at an operation.

    Attributes
    ----------
    kind : str
        A key of `_EVENTS`, or of `FAULTS`.
    due : int
        Of a fault: from which operation on it waits for one that meets it.
    """

    kind: str
    due: int


class Fault(NamedTuple):
    """What is made to fail, and which operations can meet it.

    Attributes
    ----------
    steps : tuple of Step
        What can meet it.
    to_private : bool
        Whether conversions to shared can't.
    plants : tuple of Step or None
        What brings it to a page, and what takes it away; None: an allocation that fails.
    plane : str
        What the page is then.
    bears : callable
        Whether a page that an operation would leave with the second planes can be given it, by its first.
    """

    steps: tuple[Step, ...]
    to_private: bool
    plants: tuple[Step, Step] | None
    plane: str
    bears: Callable[[oracle.Planes, oracle.Planes], bool]

    def candidates(self, operations: Operations) -> NDArray[np.intp]:
        """Places of operations that may meet it, whatever the pages are."""
        may = np.isin(operations["step"], self.steps) & (operations["size"] > 0)
        if self.to_private:
            may &= operations["attributes"] == np.uint64(MemoryAttribute.PRIVATE)
        return np.flatnonzero(may)


class Ended(NamedTuple):
    """What came of one operation: its outcome's name, and where it stopped."""

    outcome: str
    gpa: int


@dataclass(slots=True)
class _Tally:
    """Sums of outcomes, in the order of operations."""

    operations: int = 0
    codes: Counter[int] = field(default_factory=Counter)
    sizes: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(SIZE_CLASSES, np.int64))
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, operations: Operations, outcomes: Any) -> None:
        self.operations += len(operations)
        self.digest.update(outcomes.tobytes())
        codes = np.ascontiguousarray(outcomes["code"])
        refused = codes[np.flatnonzero(codes)]
        self.codes[0] += len(codes) - len(refused)
        if len(refused):
            for code, count in zip(*np.unique(refused, return_counts=True), strict=True):
                self.codes[int(code)] += int(count)
        converts = operations["step"] == Step.CONVERT
        pages = operations["size"] if converts.all() else operations["size"][converts]
        pages = pages >> np.uint64(12)
        is_small = pages < np.uint64(_SMALL)
        if not is_small.all():
            for large in pages[~is_small].tolist():
                self.sizes[min(large.bit_length(), SIZE_CLASSES) - 1] += 1
            pages = pages[is_small]
        by_pages = np.bincount(pages.view(np.int64), minlength=_SMALL)
        self.sizes[: len(_SMALL_CLASSES)] += np.add.reduceat(by_pages, _SMALL_CLASSES)


class GuestRun:
    """A guest while it runs.

    Parameters
    ----------
    spec : Spec
        The fleet.
    plan : Plan
        The guest.
    closely : int or None
        From this operation on, invariants are checked after every one.

    Attributes
    ----------
    at : int
        The number of the operation that was run last.
    """

    def __init__(self, spec: Spec, plan: Plan, closely: int | None = None) -> None:
        self._began = time.perf_counter()
        self.spec, self.plan, self.at = spec, plan, 0
        self._stream = plan.stream.split(plan.behaviour.name)
        self._closely = spec.operations if closely is None else closely
        self.vm = create_vm(
            plan.vm_type,
            plan.abi,
            firmware=plan.firmware,
            seed=plan.stream.split("key").key,
            backing=backing_of(spec),
            threads=spec.guest.threads,
        )
        self.layout = spec.layout
        self.files = build(self.vm, self.layout)
        self._operations, boots = stream_of(spec, plan, self.layout)
        if not boots:
            self.vm.launch_finish()
        self._player = Player(self.vm, seed=self.vm.seed)
        self._before = self.vm.counters
        self._tally = _Tally()
        self._checks: Counter[str] = Counter()
        self._waiting: dict[str, tuple[int, int]] = {}  # by fault: since when, and looks that are left
        self._met: dict[str, int] = {}  # by fault: since when the last one that took effect had waited

    def close(self) -> None:
        """Give its memory back."""
        self.vm.close()

    def result(self, until: int | None = None) -> GuestResult:
        """Run, up to an operation, and return what came of it.

        Raises
        ------
        ViolationError
            Something did not hold; `at` is the operation.
        """
        base = 0
        for operations in self._operations:
            part = operations if until is None else operations[: max(until + 1 - base, 0)]
            if len(part):
                self._run_chunk(base, part)
            base += len(part)
            if len(part) < len(operations):
                break
        return self._summary(self._check())

    # ---- the stream ------------------------------------------------------------------------------

    def _run_chunk(self, base: int, operations: Operations) -> None:
        """Run operations number base and on: batches between events, events one by one."""
        done = 0
        for position, events in self._events(base, operations):
            waiting = [event for event in events if self._met.get(event.kind) != event.due]
            if not waiting:
                continue
            here = position - base
            self._play(base + done, operations[done:here])
            self.at, done = position, here + 1
            operation = operations[here:done]
            if not any(self._happens(event, operation) for event in waiting):
                self._play_one(operation)
            if position >= self._closely:
                self._check()
        self._play(base + done, operations[done:])

    def _play(self, number: int, operations: Operations) -> Any:
        """Run operations and add up what came of them."""
        if not len(operations):
            return None
        self.at = number + len(operations) - 1
        outcomes = self._player.run(operations)
        self._tally.add(operations, outcomes)
        return outcomes

    def _play_one(self, operation: Operations) -> Ended:
        """Run one operation."""
        code, gpa = self._play(self.at, operation)[0].tolist()
        return Ended(NAMES[code], gpa)

    def _events(self, base: int, operations: Operations) -> list[tuple[int, list[Event]]]:
        """What is to happen at operations number base and on, in order; the first at one that can happens."""
        end, checks = base + len(operations), self.spec.checks
        events: dict[int, list[Event]] = {}
        for kind in FAULTS:
            for position, due in self._looks(kind, base, operations):
                events.setdefault(position, []).append(Event(kind, due))
        every = checks.invariants_every
        last_ones = range((base // every + 1) * every - 1, end, every) if every else ()
        for kind, positions in (
            ("oracle", _places(self._stream.split("oracle"), checks.oracle_every, base, end)),
            ("invariants", (*last_ones, *range(max(base, self._closely), end))),
        ):
            for position in positions:
                events.setdefault(position, []).append(Event(kind, position))
        return sorted(events.items())

    def _looks(self, kind: str, base: int, operations: Operations) -> Iterator[tuple[int, int]]:
        """Operations at which a fault is tried, and since which one it waits; a new one ends the wait."""
        every, end = getattr(self.spec.faults, f"{kind}_every"), base + len(operations)
        if not every or self.vm.abi.legacy:  # the oracle doesn't tell what must come of it there
            return
        dues = _places(self._stream.split(kind), every, base, end)
        self._checks[f"{kind}_due"] += len(dues)
        candidates = FAULTS[kind].candidates(operations) + base
        first, (due, left) = base, self._waiting.get(kind, (0, 0))
        for until in (*dues, end):
            low, high = np.searchsorted(candidates, (first, until))
            tried = candidates[low:high][:left].tolist()
            yield from ((position, due) for position in tried)
            self._waiting[kind] = due, left - len(tried)
            first, due, left = until, until, _LOOKS

    def _happens(self, event: Event, operation: Operations) -> bool:
        """Run an operation with what is to happen at it; False: it can't, and nothing was run."""
        if event.kind in FAULTS:
            return self._inject(event, operation)
        _EVENTS[event.kind](self, operation)
        return True

    # ---- checks ----------------------------------------------------------------------------------

    def _check(self) -> list[Survey]:
        """Everything that must hold after any operation; returns what was seen of each file."""
        self._checks["invariants"] += 1
        if self.vm.abi.legacy:  # the invariants of page state don't hold there
            return [gmem.survey() for gmem in self.files]
        return [check_file(gmem) for gmem in self.files]

    def _play_and_check(self, operation: Operations) -> None:
        """Run an operation, and look at everything after it."""
        self._play_one(operation)
        self._check()

    def _repeat_by_oracle(self, operation: Operations) -> None:
        """Run an operation, and say independently what must come of it."""
        if self._told(operation):
            self._compared(operation)
            self._checks["oracle"] += 1
        else:
            self._play_one(operation)

    def _told(self, operation: Operations) -> bool:
        """Whether the oracle tells what must come of an operation."""
        gmem, request = self._within_a_file(operation)
        return gmem is not None and not self.vm.abi.legacy and request.step in oracle.STEPS

    @property
    def _machine(self) -> oracle.Machine:
        return oracle.Machine(self.plan.vm_type, self.plan.abi, self.plan.firmware, self.vm.phase)

    def _compared(self, operation: Operations, expected: oracle.Answer | None = None) -> None:
        """Run an operation and compare its outcome; None: with what the oracle says."""
        gmem, request = self._within_a_file(operation)
        assert gmem is not None
        first, end = _touched(request)
        window = _window(gmem, first, end)
        runs, counters = _runs(gmem, *window), self.vm.counters
        inside = _clipped(runs, first, end)
        expected = expected or oracle.answer(self._machine, request, inside)
        ended = self._play_one(operation)
        wanted = [*_clipped(runs, window[0], first), *expected.runs, *_clipped(runs, end, window[1])]
        _compare(request, "answer", ended.outcome, expected.outcome)
        if expected.page is not None and expected.outcome not in ("SIGBUS", "EFAULT"):  # they don't say where
            start = int(operation["gpa"][0]) - request.offset
            _compare(request, "stopped at page", (ended.gpa - start) // PAGE_SIZE, expected.page)
        after = _runs(gmem, *window)
        _compare(request, "page state", _plain(after), _plain(oracle.joined(wanted)))
        self._compare_counters(request, self.vm.counters - counters, oracle.events(inside, expected.runs))

    def _compare_counters(self, request: oracle.Request, seen: Counters, wanted: dict[str, int]) -> None:
        got = {
            "pages_changed": seen.pages_changed,
            "pages_allocated": seen.pages_allocated,
            "assignments": seen.rmp_updates + seen.sept_changes,
        }
        _compare(request, "counters", got, wanted)

    # ---- faults ----------------------------------------------------------------------------------

    def _inject(self, event: Event, operation: Operations) -> bool:
        """Inject a fault into an operation that would succeed; False: it wouldn't, and nothing was run.

        It must be refused as the oracle says and change nothing; once the fault is gone, what comes of it is
        the oracle's to say again.
        """
        fault = FAULTS[event.kind]
        if not self._told(operation):
            return False
        gmem, request = self._within_a_file(operation)
        assert gmem is not None
        runs = _runs(gmem, *_touched(request))
        page = self._page_for(event, request, runs)
        if page is None:
            return False
        if fault.plants is None:
            refused = oracle.Answer("ENOMEM", runs[0].start, runs)
        else:
            planted = _planted(runs, page, fault.plane)
            refused = oracle.answer(self._machine, request, planted)
            if refused.outcome == "OK":
                return False
        self._met[event.kind] = event.due
        at = _one(Step.CONVERT, int(operation["gpa"][0]) - request.offset + page * PAGE_SIZE)
        with self._planted(fault, gmem, at):
            before = state_digest(gmem, gmem.survey())
            self._compared(operation, refused)
            if state_digest(gmem, gmem.survey()) != before:
                raise ViolationError(
                    f"{_words(request)} was refused, {refused.outcome}, and changed page state or contents"
                )
        self._compared(operation)
        self._checks[f"{event.kind}_met"] += 1
        return True

    @contextmanager
    def _planted(self, fault: Fault, gmem: GuestMemfd, page: Operations) -> Iterator[None]:
        """A fault while it lasts."""
        if fault.plants is None:
            gmem.fail_allocations_after(0)
            yield
            gmem.fail_allocations_after(None)
            return
        for step in fault.plants:
            page["step"] = step
            self._compared(page)
            if step == fault.plants[0]:
                yield

    def _page_for(self, event: Event, request: oracle.Request, runs: list[oracle.Run]) -> int | None:
        """A page of a request that can be given a fault, drawn by its place; None without one."""
        answer = oracle.answer(self._machine, request, runs)
        if answer.outcome != "OK":
            return None
        bears = FAULTS[event.kind].bears
        able = [
            (start, end)
            for start, end, before, after in oracle.side_by_side(runs, answer.runs)
            if bears(before, after)
        ]
        pages = sum(end - start for start, end in able)
        if not pages:
            return None
        drawn = int(self._stream.split("page", event.kind).below(pages, event.due, 1)[0])
        for start, end in able:
            if drawn < end - start:
                break
            drawn -= end - start
        return start + drawn

    # ---- where operations are -----------------------------------------------------------------------

    def _within_a_file(self, operation: Operations) -> tuple[GuestMemfd | None, oracle.Request]:
        """The file that holds an operation whole (None: not one), and the operation by offset in it."""
        row = operation[0]
        step, variant, gpa, size = (int(row[name]) for name in ("step", "variant", "gpa", "size"))
        attributes, flags = int(row["attributes"]), int(row["flags"])
        for region, gmem in zip(self.layout.regions, self.files, strict=True):
            if region.gpa <= gpa and gpa + max(size, 1) <= region.end:
                return gmem, oracle.Request(step, variant, gpa - region.gpa, size, attributes, flags)
        return None, oracle.Request(step, variant, gpa, size, attributes, flags)

    # ---- the result --------------------------------------------------------------------------------

    def _summary(self, found: list[Survey]) -> GuestResult:
        """Sum up, everything that is the same everywhere under one digest."""
        counters = self.vm.counters - self._before
        fields: dict[str, Any] = {
            "guest": self.plan.number,
            "cell": self.plan.cell,
            "operations": self._tally.operations,
            "outcomes": {NAMES[code]: self._tally.codes[code] for code in sorted(self._tally.codes)},
            "counters": counters.asdict(),
            "checks": dict(sorted(self._checks.items())),
            "sizes": self._tally.sizes.tolist(),
        }
        digest = hashlib.sha256(msgspec.json.encode(fields, order="sorted"))
        digest.update(self._tally.digest.digest())
        for gmem, its_state in zip(self.files, found, strict=True):
            digest.update(state_digest(gmem, its_state))
        return GuestResult(**fields, digest=digest.hexdigest(), seconds=time.perf_counter() - self._began)


_EVENTS: Final[dict[str, Callable[[GuestRun, Operations], None]]] = {
    "oracle": GuestRun._repeat_by_oracle,
    "invariants": GuestRun._play_and_check,
}

_ACCESSES: Final = (Step.HOST_READ, Step.HOST_WRITE, Step.GUEST_READ, Step.GUEST_WRITE, Step.ACCEPT)
FAULTS: Final = {
    "allocation_failure": Fault(
        (Step.CONVERT,), False, None, "", lambda before, after: "private" in before ^ after
    ),
    "pin": Fault(
        (Step.CONVERT,), True, (Step.PIN, Step.UNPIN), "pinned", lambda before, _: "private" not in before
    ),
    "poison": Fault(
        *(_ACCESSES, False, (Step.POISON, Step.PUNCH_HOLE), "poisoned"),
        lambda before, _: "allocated" in before and "poisoned" not in before,
    ),
}
"""What can be made to fail, by its key in a spec less ``_every``; of two at one operation the first is."""


def stream_of(spec: Spec, plan: Plan, layout: Layout) -> tuple[Iterator[Operations], bool]:
    """Return a guest's operations, in arrays, and whether they begin with its launch.

    A behaviour that ends is begun again with other numbers, until there are as many operations as the spec
    says; a launch ends the guest when it ends.
    """
    rounds = _rounds(spec, plan, layout)
    first = next(rounds)
    boots = shows_launch(first)
    return _limited(first, rounds, spec.operations, boots), boots


def _rounds(spec: Spec, plan: Plan, layout: Layout) -> Iterator[Operations]:
    """The behaviour, again and again; an empty array after each time."""
    behaviour = BEHAVIOURS[plan.behaviour.name]
    number = 0
    while True:
        stream = plan.stream.split("round", number)
        yield from behaviour.operations(
            layout, stream, chunk=min(_CHUNK, spec.operations), **plan.behaviour.parameters
        )
        yield empty_operations(0)
        number += 1


def _limited(first: Operations, rounds: Iterator[Operations], count: int, once: bool) -> Iterator[Operations]:
    """Join the first array and those after it into `count` operations; once: up to the end of a round."""
    part: Operations | None = first
    barren = 0
    while part is not None and barren < 2:  # rounds of nothing would go on for ever
        if len(part):
            yield part[:count]
        elif once:
            return
        count -= len(part)
        if count <= 0:
            return
        barren = 0 if len(part) else barren + 1
        part = next(rounds, None)


def _places(stream: Stream, every: int, start: int, end: int) -> list[int]:
    """Return the place of one event per stretch of `every` operations, drawn at random in it."""
    if not every:
        return []
    first, last = start // every, -(-end // every)
    places = stream.below(every, first, last - first).tolist()
    at = [(first + i) * every + place for i, place in enumerate(places)]
    return [place for place in at if start <= place < end]


def _planted(runs: list[oracle.Run], page: int, plane: str) -> list[oracle.Run]:
    """Runs after a page of them was allocated and given a plane."""
    [of] = _clipped(runs, page, page + 1)
    given = of._replace(planes=of.planes | {"allocated", plane})
    return [*_clipped(runs, runs[0].start, page), given, *_clipped(runs, page + 1, runs[-1].end)]


def _one(step: Step, gpa: int) -> Operations:
    """One operation on a page."""
    operation = empty_operations(1)
    operation["step"], operation["gpa"], operation["size"] = step, gpa, PAGE_SIZE
    return operation


# ---- what the oracle is compared with ------------------------------------------------------------------


def _touched(request: oracle.Request) -> tuple[int, int]:
    """First and end page that an operation touches."""
    return request.offset // PAGE_SIZE, -(-(request.offset + request.size) // PAGE_SIZE)


def _window(gmem: GuestMemfd, first: int, end: int) -> tuple[int, int]:
    """The pages, and one on each side that nothing may happen to."""
    return max(first - 1, 0), min(end + 1, gmem.n_pages)


def _runs(gmem: GuestMemfd, first: int, end: int) -> list[oracle.Run]:
    runs = gmem.state_runs(first * PAGE_SIZE, (end - first) * PAGE_SIZE)
    return [oracle.Run(low, high, frozenset(planes)) for low, high, planes in runs]


def _clipped(runs: list[oracle.Run], first: int, end: int) -> list[oracle.Run]:
    """The parts of runs between two pages."""
    parts = [run._replace(start=max(run.start, first), end=min(run.end, end)) for run in runs]
    return [run for run in parts if run.start < run.end]


def _plain(runs: list[oracle.Run]) -> list[tuple[int, int, tuple[str, ...]]]:
    return [(run.start, run.end, tuple(sorted(run.planes))) for run in runs]


def _compare(request: oracle.Request, what: str, seen: object, expected: object) -> None:
    if seen != expected:
        raise ViolationError(f"{_words(request)}: {what} {_short(seen)}; the oracle says {_short(expected)}")


def _words(request: oracle.Request) -> str:
    """An operation, to be read."""
    step = Step(request.step).name
    detail = f" to {'private' if request.attributes else 'shared'}, flags {request.flags:#x}"
    return f"{step} of {request.offset:#x}+{request.size:#x}{detail if request.step == Step.CONVERT else ''}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 600 else f"{text[:600]}…"
