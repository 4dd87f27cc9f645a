"""Faults: make an operation that would succeed fail, and check that it changed nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.steps import Step
from gmemcore.machine import GuestMemfd
from gmemcore.stress import oracle
from gmemcore.stress.compare import Comparison, clipped, describe, page_runs, pages_of
from gmemcore.stress.invariants import ViolationError, state_digest
from gmemcore.uapi import PAGE_SIZE, MemoryAttribute
from gmemcore.workload.operations import Operations, empty_operations
from gmemcore.workload.seeds import Stream


class Fault(NamedTuple):
    """A kind of fault and the operations that it can make fail.

    Attributes
    ----------
    steps : tuple of Step
        Steps that it can make fail.
    to_private : bool
        Whether only conversions to private can fail.
    plants : tuple of Step or None
        Step that brings the fault to a page, and step that removes it; None: an allocation that fails.
    plane : str
        Plane that the fault sets on its page.
    suits : callable
        Whether a page is suitable, by its planes before and after an operation without the fault.
    """

    steps: tuple[Step, ...]
    to_private: bool
    plants: tuple[Step, Step] | None
    plane: str
    suits: Callable[[oracle.Planes, oracle.Planes], bool]

    def candidates(self, operations: Operations) -> NDArray[np.intp]:
        """Return the places of operations that the fault can make fail, whatever the state of their pages."""
        can = np.isin(operations["step"], self.steps) & (operations["size"] > 0)
        if self.to_private:
            can &= operations["attributes"] == np.uint64(MemoryAttribute.PRIVATE)
        return np.flatnonzero(can)


_ACCESSES: Final = (Step.HOST_READ, Step.HOST_WRITE, Step.GUEST_READ, Step.GUEST_WRITE, Step.ACCEPT)
FAULTS: Final = {
    "allocation_failure": Fault(
        steps=(Step.CONVERT,),
        to_private=False,
        plants=None,
        plane="",
        suits=lambda before, after: "private" in before ^ after,
    ),
    "pin": Fault(
        steps=(Step.CONVERT,),
        to_private=True,
        plants=(Step.PIN, Step.UNPIN),
        plane="pinned",
        suits=lambda before, _: "private" not in before,
    ),
    "poison": Fault(
        steps=_ACCESSES,
        to_private=False,
        plants=(Step.POISON, Step.PUNCH_HOLE),
        plane="poisoned",
        suits=lambda before, _: "allocated" in before and "poisoned" not in before,
    ),
}
"""Faults by their key in a spec without ``_every``. Of two at one operation, the first is injected."""


def inject(kind: str, drawn: Stream, due: int, operation: Operations, comparison: Comparison) -> bool:
    """Run an operation with a fault, then without it, and compare both with the oracle.

    Parameters
    ----------
    kind : str
        A key of `FAULTS`.
    drawn : Stream
        Chooses the page of the fault, at place `due`.
    due : int
        Number of the operation at which the fault became due.
    operation : Operations
        Shape (1,).
    comparison : Comparison
        Of the guest.

    Returns
    -------
    bool
        False if the operation can't fail this way; nothing was run.

    Raises
    ------
    ViolationError
        It wasn't refused as the oracle predicts, or the refused operation changed something.
    """
    fault = FAULTS[kind]
    if not comparison.oracle_can_predict(operation):
        return False
    gmem, request = comparison.locate(operation)
    assert gmem is not None
    runs = page_runs(gmem, *pages_of(request))
    page = _page_for(fault, drawn, due, runs, comparison.predict(request, runs))
    if page is None:
        return False
    if fault.plants is None:
        refused = oracle.Answer("ENOMEM", runs[0].start, runs)
    else:
        refused = comparison.predict(request, with_fault(runs, page, fault.plane))
        if refused.outcome == "OK":
            return False
    at = _one_page(int(operation["gpa"][0]) - request.offset + page * PAGE_SIZE)
    with planted(fault, gmem, at, comparison):
        before = state_digest(gmem, gmem.survey())
        comparison.run(operation, refused)
        if state_digest(gmem, gmem.survey()) != before:
            raise ViolationError(
                f"{describe(request)} was refused, {refused.outcome}, and changed page state or contents"
            )
    comparison.run(operation)
    return True


@contextmanager
def planted(fault: Fault, gmem: GuestMemfd, page: Operations, comparison: Comparison) -> Iterator[None]:
    """Bring a fault to a page, and remove it."""
    if fault.plants is None:
        gmem.fail_allocations_after(0)
        yield
        gmem.fail_allocations_after(None)
        return
    plant, remove = fault.plants
    page["step"] = plant
    comparison.run(page)
    yield
    page["step"] = remove
    comparison.run(page)


def with_fault(runs: list[oracle.PageRun], page: int, plane: str) -> list[oracle.PageRun]:
    """Return runs after one of their pages was allocated and given the plane of a fault."""
    [of] = clipped(runs, page, page + 1)
    given = of._replace(planes=of.planes | {"allocated", plane})
    return [*clipped(runs, runs[0].start, page), given, *clipped(runs, page + 1, runs[-1].end)]


def _page_for(
    fault: Fault, drawn: Stream, due: int, runs: list[oracle.PageRun], answer: oracle.Answer
) -> int | None:
    """Draw the page of a fault among the suitable ones; None: the operation has none, or fails anyway."""
    if answer.outcome != "OK":
        return None
    suitable = [
        (start, end)
        for start, end, before, after in oracle.side_by_side(runs, answer.runs)
        if fault.suits(before, after)
    ]
    pages = sum(end - start for start, end in suitable)
    if not pages:
        return None
    place = int(drawn.below(pages, due, 1)[0])
    for start, end in suitable:
        if place < end - start:
            break
        place -= end - start
    return start + place


def _one_page(gpa: int) -> Operations:
    operation = empty_operations(1)
    operation["gpa"], operation["size"] = gpa, PAGE_SIZE
    return operation
