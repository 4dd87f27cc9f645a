"""Compare single operations of a guest with the oracle: answer, page state and counters.

Page state is read without kernels, before and after the operation, with one more page on each side that must
not change.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from gmemcore.engine.counters import Counters
from gmemcore.engine.steps import Step
from gmemcore.machine import GuestMemfd, VmFace
from gmemcore.stress import oracle
from gmemcore.stress.invariants import ViolationError
from gmemcore.uapi import PAGE_SIZE
from gmemcore.workload.layout import Layout
from gmemcore.workload.operations import Operations

_MAX_TEXT = 600  # characters of a value in a message


class Outcome(NamedTuple):
    """Outcome of one operation by name, and the guest physical address at which it stopped."""

    name: str
    gpa: int


class Comparison:
    """Runs operations of one guest and compares each with the oracle.

    Parameters
    ----------
    vm : VmFace
        The guest.
    layout : Layout
        Where its memory is.
    files : sequence of GuestMemfd
        One for each region of the layout.
    play_one : callable
        Runs an array of one operation and returns its `Outcome`.
    """

    def __init__(
        self,
        vm: VmFace,
        layout: Layout,
        files: Sequence[GuestMemfd],
        play_one: Callable[[Operations], Outcome],
    ) -> None:
        self._vm, self._layout, self._files = vm, layout, files
        self._play_one = play_one

    def oracle_can_predict(self, operation: Operations) -> bool:
        """Return whether the oracle predicts an operation: a step it knows, whole within one region."""
        gmem, request = self.locate(operation)
        return gmem is not None and not self._vm.abi.legacy and request.step in oracle.STEPS

    def predict(self, request: oracle.Request, runs: list[oracle.PageRun]) -> oracle.Answer:
        """Return the oracle's answer to a request on pages in these runs."""
        vm = self._vm
        return oracle.answer(oracle.Context(vm.vm_type, vm.abi, vm.firmware, vm.phase), request, runs)

    def locate(self, operation: Operations) -> tuple[GuestMemfd | None, oracle.Request]:
        """Return the file that holds all of an operation (None: no single one) and the request to it."""
        row = operation[0]
        step, variant, gpa, size = (int(row[name]) for name in ("step", "variant", "gpa", "size"))
        attributes, flags = int(row["attributes"]), int(row["flags"])
        for region, gmem in zip(self._layout.regions, self._files, strict=True):
            if region.gpa <= gpa and gpa + max(size, 1) <= region.end:
                return gmem, oracle.Request(step, variant, gpa - region.gpa, size, attributes, flags)
        return None, oracle.Request(step, variant, gpa, size, attributes, flags)

    def run(self, operation: Operations, expected: oracle.Answer | None = None) -> None:
        """Run an operation and compare what it did.

        Parameters
        ----------
        operation : Operations
            Shape (1,); one that the oracle can predict.
        expected : oracle.Answer or None
            None: the oracle's.

        Raises
        ------
        ViolationError
            The answer, the place where it stopped, page state or counters differ.
        """
        gmem, request = self.locate(operation)
        assert gmem is not None
        first, end = pages_of(request)
        window = max(first - 1, 0), min(end + 1, gmem.n_pages)
        runs, counters = page_runs(gmem, *window), self._vm.counters
        inside = clipped(runs, first, end)
        expected = expected or self.predict(request, inside)
        outcome = self._play_one(operation)
        wanted = [*clipped(runs, window[0], first), *expected.runs, *clipped(runs, end, window[1])]
        _compare(request, "answer", outcome.name, expected.outcome)
        if expected.page is not None and expected.outcome not in ("SIGBUS", "EFAULT"):  # they carry no place
            start = int(operation["gpa"][0]) - request.offset
            _compare(request, "stopped at page", (outcome.gpa - start) // PAGE_SIZE, expected.page)
        after = page_runs(gmem, *window)
        _compare(request, "page state", _plain(after), _plain(oracle.joined(wanted)))
        seen = _events(self._vm.counters - counters)
        _compare(request, "counters", seen, oracle.events(inside, expected.runs))


def describe(request: oracle.Request) -> str:
    """Return an operation in words."""
    step = Step(request.step).name
    detail = f" to {'private' if request.attributes else 'shared'}, flags {request.flags:#x}"
    return f"{step} of {request.offset:#x}+{request.size:#x}{detail if request.step == Step.CONVERT else ''}"


def pages_of(request: oracle.Request) -> tuple[int, int]:
    """Return the first and end page that an operation touches."""
    return request.offset // PAGE_SIZE, -(-(request.offset + request.size) // PAGE_SIZE)


def page_runs(gmem: GuestMemfd, first: int, end: int) -> list[oracle.PageRun]:
    """Return the state of the pages first to end."""
    runs = gmem.state_runs(first * PAGE_SIZE, (end - first) * PAGE_SIZE)
    return [oracle.PageRun(low, high, frozenset(planes)) for low, high, planes in runs]


def clipped(runs: list[oracle.PageRun], first: int, end: int) -> list[oracle.PageRun]:
    """Return the parts of runs within the pages first to end."""
    parts = [run._replace(start=max(run.start, first), end=min(run.end, end)) for run in runs]
    return [run for run in parts if run.start < run.end]


def _plain(runs: list[oracle.PageRun]) -> list[tuple[int, int, tuple[str, ...]]]:
    return [(run.start, run.end, tuple(sorted(run.planes))) for run in runs]


def _events(counters: Counters) -> dict[str, int]:
    """Return the counters that the oracle has."""
    return {
        "pages_changed": counters.pages_changed,
        "pages_allocated": counters.pages_allocated,
        "assignments": counters.rmp_updates + counters.sept_changes,
    }


def _compare(request: oracle.Request, what: str, seen: object, expected: object) -> None:
    if seen != expected:
        raise ViolationError(
            f"{describe(request)}: {what} {_short(seen)}; the oracle says {_short(expected)}"
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…"
