"""Run one guest: play its behaviour, check it, inject faults, and sum it up.

A guest follows from the spec and its number. What is done to it is drawn by place (`gmemcore.stress.places`);
batches are cut there, which changes no outcome. So its result is the same in any chunk and on any worker.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

import msgspec
import numpy as np

from gmemcore.engine.jit import load
from gmemcore.engine.state import Survey
from gmemcore.machine import VmFace, create_vm
from gmemcore.stress.compare import Comparison, Outcome
from gmemcore.stress.faults import FAULTS, inject
from gmemcore.stress.invariants import ViolationError, check_file, state_digest
from gmemcore.stress.memory import backing_of
from gmemcore.stress.merge import GuestResult
from gmemcore.stress.places import Event, Places, Waiting
from gmemcore.stress.promise import Promise
from gmemcore.stress.spec import Plan, Spec
from gmemcore.uapi import ContentWork
from gmemcore.workload.behaviours import BEHAVIOURS
from gmemcore.workload.layout import Layout
from gmemcore.workload.operations import (
    LOOPS,
    Operations,
    as_words,
    empty_operations,
    join_operations,
    shows_launch,
)
from gmemcore.workload.outcomes import NAMES, OUTCOME, Outcomes
from gmemcore.workload.player import Player, build

SIZE_CLASSES: Final = 40
"""Length of the histogram of conversions by size: up to 2^40 pages."""
_SMALL: Final = 256  # conversions of fewer pages are counted by pages first
_CHUNK: Final = 1 << 16  # operations held at a time; a batch of conversions takes 150 bytes each


class Violation(msgspec.Struct, frozen=True):
    """Something that must hold and didn't.

    Attributes
    ----------
    guest : int
        Number of the guest in the fleet.
    operation : int
        Number of the operation in the guest's stream after which it didn't hold.
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
    """Run one guest of a fleet.

    Parameters
    ----------
    spec : Spec
        The fleet.
    number : int
        Number of the guest.
    until : int or None
        Number of the last operation to run; None: all.
    watch : callable or None
        Called at the end, with the guest and the number of the last operation; twice if a violation is
        located by running again.

    Returns
    -------
    GuestResult or Violation
        The guest's result, or the first violation.
    """
    found = _attempt(spec, number, until, watch)
    if isinstance(found, GuestResult):
        return found
    # Invariants are checked now and then. The last interval is run again with a check after every operation.
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


@dataclass(slots=True)
class _Tally:
    """Sums over operations, and a digest of their outcomes in order."""

    operations: int = 0
    codes: Counter[int] = field(default_factory=Counter)
    sizes: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(SIZE_CLASSES, np.int64))
    _waiting: list[tuple[Operations, Outcomes]] = field(default_factory=list)
    _all_ok: int = 0  # operations before the first refused one, while they are few
    _hash: Any = None

    def add(self, operations: Operations, outcomes: Outcomes) -> None:
        """Add operations. `settle` counts them, all at once: events cut batches into many short pieces."""
        self._waiting.append((operations, outcomes))

    def settle(self) -> None:
        """Count what was added."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        operations, outcomes = waiting[0]
        if len(waiting) > 1:
            operations = join_operations([part for part, _ in waiting])
            outcomes = np.concatenate([part.view(np.uint8) for _, part in waiting]).view(OUTCOME)
        self.operations += len(operations)
        words, by_pages = as_words(np.ascontiguousarray(operations)), np.zeros(_SMALL, np.int64)
        load(LOOPS).count_sizes(words, by_pages, self.sizes)
        codes = outcomes["code"]
        refused = np.flatnonzero(codes) if outcomes.view(np.uint8).any() else ()
        self.codes[0] += len(codes) - len(refused)
        if len(refused):
            for code, count in zip(*np.unique(codes[refused], return_counts=True), strict=True):
                self.codes[int(code)] += int(count)
        if self._hash is None and not len(refused) and self._all_ok < _CHUNK:
            self._all_ok += len(operations)
            return
        if self._hash is None:
            self._hash = _hash_of_ok(self._all_ok).copy()
        self._hash.update(outcomes.tobytes())

    @property
    def digest(self) -> bytes:
        """SHA-256 of all outcomes."""
        digest: bytes = (self._hash or _hash_of_ok(self._all_ok)).digest()
        return digest


@lru_cache(maxsize=16)
def _hash_of_ok(count: int) -> Any:
    """Return the SHA-256 of that many operations without a refusal; most guests begin with as many."""
    return hashlib.sha256(bytes(count * OUTCOME.itemsize))


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
        Number of the last operation that was run.
    """

    def __init__(self, spec: Spec, plan: Plan, closely: int | None = None) -> None:
        self._began = time.perf_counter()
        self.spec, self.plan, self.at = spec, plan, 0
        self._stream = plan.stream.split(plan.behaviour.name)
        self._closely = spec.operations if closely is None else closely
        self.vm = create_vm(
            plan.vm_type,
            plan.revision,
            firmware=plan.firmware,
            seed=plan.stream.split("key").key,
            backing=backing_of(spec),
            threads=spec.guest.threads,
            contents=ContentWork.DEFERRED if spec.guest.is_deferred else ContentWork.EAGER,
        )
        layout = spec.layout
        self.files = build(self.vm, layout)
        self._operations, boots = stream_of(spec, plan, layout)
        if not boots:
            self.vm.launch_finish()
        self._player = Player(self.vm, seed=self.vm.seed)
        self._tally = _Tally()
        self._checks: Counter[str] = Counter()
        self._comparison = Comparison(self.vm, layout, self.files, self._play_one)
        self._promise = Promise(self.vm, self._stream.split("promised"))
        waiting = {} if self.vm.abi.legacy else self._waiting()  # the oracle can't predict faults there
        self._places = Places(spec, self._stream, self._checks, waiting=waiting, closely=self._closely)

    def _waiting(self) -> dict[str, Waiting]:
        """Return the kinds of events that wait for an operation."""
        faults, checks = self.spec.faults, self.spec.checks
        kinds = {
            kind: Waiting(getattr(faults, f"{kind}_every"), row.candidates) for kind, row in FAULTS.items()
        }
        if self.spec.guest.has_bytes:
            kinds["promise"] = Waiting(checks.promise_every, self._promise.candidates)
        return kinds

    def close(self) -> None:
        """Free the guest's memory."""
        self.vm.close()
        del self._comparison  # it refers back to this guest, which would wait for the garbage collector

    def result(self, until: int | None = None) -> GuestResult:
        """Run up to an operation and return the result.

        Raises
        ------
        ViolationError
            Something did not hold after operation `at`.
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

    # ---- operations ------------------------------------------------------------------------------

    def _run_chunk(self, base: int, operations: Operations) -> None:
        """Run operations number base and on: batches between events, operations with an event one by one."""
        done = 0
        for position, events in self._places.events(base, operations):
            due = [event for event in events if self._places.is_open(event)]
            if not due:
                continue
            here = position - base
            self._play(base + done, operations[done:here])
            self.at, done = position, here + 1
            operation = operations[here:done]
            if not any(self._run_event(event, operation) for event in due):
                self._play_one(operation)
            if position >= self._closely:
                self._check()
        self._play(base + done, operations[done:])
        self._tally.settle()

    def _play(self, number: int, operations: Operations) -> Any:
        """Run operations and add up their outcomes."""
        if not len(operations):
            return None
        self.at = number + len(operations) - 1
        outcomes = self._player.run(operations)
        self._tally.add(operations, outcomes)
        return outcomes

    def _play_one(self, operation: Operations) -> Outcome:
        code, gpa = self._play(self.at, operation)[0].tolist()
        return Outcome(NAMES[code], gpa)

    # ---- events ----------------------------------------------------------------------------------

    def _run_event(self, event: Event, operation: Operations) -> bool:
        """Run an operation with its event; False if the event can't apply, and nothing was run."""
        if event.kind in FAULTS:
            return self._inject(event, operation)
        if event.kind == "promise":
            return self._hold_to_promise(event, operation)
        _EVENTS[event.kind](self, operation)
        return True

    def _inject(self, event: Event, operation: Operations) -> bool:
        drawn = self._stream.split("page", event.kind)
        if not inject(event.kind, drawn, event.due, operation, self._comparison):
            return False
        self._places.close(event)
        self._checks[f"{event.kind}_met"] += 1
        return True

    def _hold_to_promise(self, event: Event, operation: Operations) -> bool:
        """Run a conversion whose sampled pages must keep their contents; False if none is suitable."""
        gmem, request = self._comparison.locate(operation)
        if gmem is None:
            return False
        gpa = int(operation["gpa"][0]) - request.offset
        written = self._promise.write(gmem, request, gpa, event.due)
        if not written:
            return False
        if self._play_one(operation).name == "OK":
            self._promise.check(gmem, request, gpa, written)
            self._places.close(event)
            self._checks["promise_met"] += 1
        return True

    def _compare(self, operation: Operations) -> None:
        if self._comparison.oracle_can_predict(operation):
            self._comparison.run(operation)
            self._checks["oracle"] += 1
        else:
            self._play_one(operation)

    def _play_and_check(self, operation: Operations) -> None:
        self._play_one(operation)
        self._check()

    def _check(self) -> list[Survey]:
        """Check the invariants of every file; returns their surveys."""
        self._checks["invariants"] += 1
        if self.vm.abi.legacy:  # attributes are the Vm's, so the planes of a file don't keep them
            return [gmem.survey() for gmem in self.files]
        return [check_file(gmem) for gmem in self.files]

    # ---- the result ------------------------------------------------------------------------------

    def _summary(self, found: list[Survey]) -> GuestResult:
        """Return the result; its digest covers everything that is the same everywhere."""
        counters = self._player.counters
        fields: dict[str, Any] = {
            "guest": self.plan.number,
            "cell": self.plan.cell,
            "operations": self._tally.operations,
            "outcomes": {NAMES[code]: self._tally.codes[code] for code in sorted(self._tally.codes)},
            "counters": counters.asdict(),
            "checks": dict(sorted(self._checks.items())),
            "sizes": self._tally.sizes.tolist(),
        }
        # Absent means 0, so that a counter added one day changes no digest.
        counted = fields | {"counters": {name: count for name, count in fields["counters"].items() if count}}
        digest = hashlib.sha256(msgspec.json.encode(counted, order="sorted"))
        digest.update(self._tally.digest)
        for gmem, survey in zip(self.files, found, strict=True):
            digest.update(state_digest(gmem, survey))
        return GuestResult(**fields, digest=digest.hexdigest(), seconds=time.perf_counter() - self._began)


_EVENTS: Final[dict[str, Callable[[GuestRun, Operations], None]]] = {
    "oracle": GuestRun._compare,
    "invariants": GuestRun._play_and_check,
}


def stream_of(spec: Spec, plan: Plan, layout: Layout) -> tuple[Iterator[Operations], bool]:
    """Return a guest's operations, as arrays, and whether they begin with its launch.

    A behaviour that ends is started again with other random numbers, until there are as many operations as
    the spec says. A launch isn't: the guest ends with it.
    """
    rounds = _rounds(spec, plan, layout)
    first = next(rounds)
    boots = shows_launch(first)
    return _limited(first, rounds, spec.operations, boots), boots


def _rounds(spec: Spec, plan: Plan, layout: Layout) -> Iterator[Operations]:
    """Yield a behaviour again and again, and an empty array after each time."""
    behaviour = BEHAVIOURS[plan.behaviour.name]
    number = 0
    while True:
        stream = plan.stream.split("round", number)
        yield from behaviour.operations(
            layout, stream, chunk=min(_CHUNK, spec.operations), compiled=True, **plan.behaviour.parameters
        )
        yield empty_operations(0)
        number += 1


def _limited(first: Operations, rounds: Iterator[Operations], count: int, once: bool) -> Iterator[Operations]:
    """Yield `count` operations at most; `once`: up to the end of a round."""
    part: Operations | None = first
    barren = 0
    while part is not None and barren < 2:  # rounds without operations would never end
        if len(part):
            yield part[:count]
        elif once:
            return
        count -= len(part)
        if count <= 0:
            return
        barren = 0 if len(part) else barren + 1
        part = next(rounds, None)
