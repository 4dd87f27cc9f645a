"""One guest's run: its behaviour played, checked, disturbed, and summed up in a small result.

A guest depends on the spec and on its number, and on nothing else: what it meets is drawn by place (see
`gmemcore.workload.seeds`), and batches are cut where something is to be checked or made to fail, which
changes no outcome. So its result is the same in any chunk, on any worker, and when it is run again.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from gmemcore.engine.counters import Counters
from gmemcore.engine.state import Survey
from gmemcore.engine.steps import Step
from gmemcore.machine import GuestMemfd, VmFace, create_vm
from gmemcore.stress import oracle
from gmemcore.stress.invariants import ViolationError, check_file, state_digest
from gmemcore.stress.memory import backing_of
from gmemcore.stress.merge import GuestResult
from gmemcore.stress.spec import Plan, Spec
from gmemcore.uapi import PAGE_SIZE
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
    """Something that happens at an operation: a key of `_EVENTS`."""

    position: int
    kind: str


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
        for position, kind in self._events(base, base + len(operations)):
            here = position - base
            self._play(base + done, operations[done:here])
            self.at, done = position, here + 1
            _EVENTS[kind](self, position, operations[here:done])
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

    def _play_one(self, operation: Operations) -> str:
        """Run one operation; its outcome's name."""
        return NAMES[int(self._play(self.at, operation)["code"][0])]

    def _events(self, start: int, end: int) -> list[Event]:
        """What happens at operations start to end, in order; one thing at an operation."""
        kinds = {}
        for kind, every in (
            ("oracle", self.spec.checks.oracle_every),
            ("poison", self.spec.faults.poison_every),
            ("pin", self.spec.faults.pin_every),
            ("allocation_failure", self.spec.faults.allocation_failure_every),
        ):
            for position in _places(self._stream.split(kind), every, start, end):
                kinds[position] = kind
        every = self.spec.checks.invariants_every
        last_ones = range((start // every + 1) * every - 1, end, every) if every else ()
        for position in (*last_ones, *range(max(start, self._closely), end)):
            kinds.setdefault(position, "invariants")
        return [Event(position, kinds[position]) for position in sorted(kinds)]

    # ---- checks ----------------------------------------------------------------------------------

    def _check(self) -> list[Survey]:
        """Everything that must hold after any operation; returns what was seen of each file."""
        self._checks["invariants"] += 1
        if self.vm.abi.legacy:  # SPEC 2 doesn't hold there
            return [gmem.survey() for gmem in self.files]
        return [check_file(gmem) for gmem in self.files]

    def _play_and_check(self, _position: int, operation: Operations) -> None:
        """Run an operation, and look at everything after it."""
        self._play_one(operation)
        self._check()

    def _repeat_by_oracle(self, _position: int, operation: Operations) -> None:
        """Run an operation, and say independently what must come of it."""
        gmem, request = self._within_a_file(operation)
        if gmem is None or self.vm.abi.legacy or request.step not in oracle.STEPS:
            self._play_one(operation)
            return
        machine = oracle.Machine(self.plan.vm_type, self.plan.abi, self.plan.firmware, self.vm.phase)
        first, end = _touched(request)
        window = _window(gmem, first, end)
        runs, counters = _runs(gmem, *window), self.vm.counters
        inside = _clipped(runs, first, end)
        expected = oracle.answer(machine, request, inside)
        outcome = self._play_one(operation)
        wanted = [*_clipped(runs, window[0], first), *expected.runs, *_clipped(runs, end, window[1])]
        _compare(request, "answer", outcome, expected.outcome)
        after = _runs(gmem, *window)
        _compare(request, "page state", _plain(after), _plain(oracle.joined(wanted)))
        self._compare_counters(request, self.vm.counters - counters, oracle.events(inside, expected.runs))
        self._checks["oracle"] += 1

    def _compare_counters(self, request: oracle.Request, seen: Counters, wanted: dict[str, int]) -> None:
        got = {
            "pages_changed": seen.pages_changed,
            "pages_allocated": seen.pages_allocated,
            "assignments": seen.rmp_updates + seen.sept_changes,
        }
        _compare(request, "counters", got, wanted)

    # ---- faults ----------------------------------------------------------------------------------

    def _fail_allocation(self, _position: int, operation: Operations) -> None:
        """The next allocation of a conversion fails; afterwards the same operation is asked for again."""
        for gmem in self.files:
            gmem.fail_allocations_after(0)
        outcome = self._all_or_nothing(operation)
        for gmem in self.files:
            gmem.fail_allocations_after(None)
        self._checks["allocation_failure"] += 1
        self._retry("allocation_failure", operation, outcome, "ENOMEM")

    def _pin_page(self, position: int, operation: Operations) -> None:
        """A page of the range has an unexpected reference while the operation runs."""
        self._with_a_page(position, operation, "pinned", (Step.PIN, Step.UNPIN), ("pin", "EAGAIN"))

    def _poison_page(self, position: int, operation: Operations) -> None:
        """A page of the range has failed; afterwards it is discarded."""
        steps = Step.POISON, Step.PUNCH_HOLE
        self._with_a_page(position, operation, "poisoned", steps, ("poison", "EHWPOISON"))

    def _with_a_page(
        self,
        position: int,
        operation: Operations,
        plane: str,
        steps: tuple[Step, Step],
        fault: tuple[str, str],
    ) -> None:
        """Run an operation while a page of its range is in a plane: what brings it there, and out again."""
        page = self._some_page(position, operation)
        if page is None or self._has_plane(page, plane):
            self._play_one(operation)
            return
        done = self._play_one(_one(steps[0], page)) == "OK"
        outcome = self._all_or_nothing(operation)
        if done:  # a private page can't be pinned, nor one poisoned that doesn't exist
            self._checks[fault[0]] += 1
            self._play_one(_one(steps[1], page))
        self._retry(fault[0], operation, outcome, fault[1])

    def _all_or_nothing(self, operation: Operations) -> str:
        """Run an operation under a fault; a conversion that is refused must have changed nothing."""
        gmem, request = self._within_a_file(operation)
        if gmem is None or request.step != Step.CONVERT:
            return self._play_one(operation)
        before = state_digest(gmem, gmem.survey())
        outcome = self._play_one(operation)
        if outcome != "OK" and state_digest(gmem, gmem.survey()) != before:
            raise ViolationError(
                f"{_words(request)} was refused, {outcome}, and changed page state or contents"
            )
        return outcome

    def _retry(self, fault: str, operation: Operations, outcome: str, refusal: str) -> None:
        """Once the fault is gone, what it refused must be refused no more, or for another reason."""
        if outcome != refusal:
            return
        self._checks[f"{fault}_met"] += 1
        again = self._play_one(operation)
        if again == refusal:
            _, request = self._within_a_file(operation)
            raise ViolationError(f"{_words(request)} is still refused, {refusal}, after the fault is gone")

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

    def _some_page(self, position: int, operation: Operations) -> int | None:
        """Guest physical address of a page of an operation, drawn by its place; None where none is whole."""
        gmem, request = self._within_a_file(operation)
        if gmem is None or not request.size:
            return None
        first, end = _touched(request)
        page = int(self._stream.split("page").below(end - first, position, 1)[0])
        return int(operation["gpa"][0]) // PAGE_SIZE * PAGE_SIZE + page * PAGE_SIZE

    def _has_plane(self, gpa: int, plane: str) -> bool:
        gmem, request = self._within_a_file(_one(Step.PIN, gpa))
        return gmem is None or plane in gmem.state_runs(request.offset, PAGE_SIZE)[0][2]

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


_EVENTS: Final[dict[str, Callable[[GuestRun, int, Operations], None]]] = {
    "invariants": GuestRun._play_and_check,
    "oracle": GuestRun._repeat_by_oracle,
    "allocation_failure": GuestRun._fail_allocation,
    "pin": GuestRun._pin_page,
    "poison": GuestRun._poison_page,
}


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
    """The first array and those after it, so many operations in all; once: up to the end of a round."""
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
    """Places of one event in every so many, each at random in its stretch, from start to end."""
    if not every:
        return []
    first, last = start // every, -(-end // every)
    places = stream.below(every, first, last - first).tolist()
    at = [(first + i) * every + place for i, place in enumerate(places)]
    return [place for place in at if start <= place < end]


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
