"""The walk of KVM's private memory conversion selftest, in its order (`private_mem_conversions_test`)."""

from collections.abc import Iterator
from typing import Final

from gmemcore.engine.steps import Step
from gmemcore.errors import InvalidArgumentError
from gmemcore.uapi import PAGE_SIZE
from gmemcore.units import format_size
from gmemcore.workload.behaviours.guest import PRIVATE, SHARED, Range, SeededGuest, over
from gmemcore.workload.operations import Operations, join_operations

_P: Final = PAGE_SIZE
_2M: Final = 2 << 20
REGION: Final = _2M + _P
"""Bytes that each vCPU walks."""
STRIDE: Final = 2 * _2M
"""Bytes from one vCPU's region to the next."""
RANGES: Final = ((0, _P), (0, _2M), (_P, _P), (_P, _2M), (_2M, _P))
"""What is converted in turn: offset in the region, bytes."""


def conversion_walk(guest: SeededGuest, *, vcpus: int, probes: bool) -> Iterator[Operations]:
    """Explicit conversion without and with fallocate, then punched holes, whole regions and precise ones."""
    start, room = max(guest.ranges, key=lambda each: each[1])
    needed = (vcpus - 1) * STRIDE + REGION
    if needed > room:
        raise InvalidArgumentError(
            f"the walk of {vcpus} vCPUs needs {format_size(needed)} in one region, the largest has "
            f"{format_size(room)}; use fewer vCPUs or more memory"
        )
    for vcpu in range(vcpus):
        walk = _Walk(start + vcpu * STRIDE, probes)
        yield over(Step.CONVERT, [walk.region], SHARED)
        for with_fallocate in (False, True):
            yield from walk.explicit_conversion(with_fallocate)
        for precise in (False, True):
            yield from walk.punch_hole(precise)
    # The guest is gone, its file isn't: it can be emptied and filled.
    yield over(Step.PUNCH_HOLE, guest.ranges)
    yield over(Step.ALLOCATE, guest.ranges)


class _Walk:
    """One vCPU's walk: each method is a step of the selftest, in its words."""

    def __init__(self, base: int, probes: bool) -> None:
        self.base, self.probes = base, probes
        self.region: Range = (base, REGION)

    def explicit_conversion(self, with_fallocate: bool) -> Iterator[Operations]:
        """Steps a to d of one run."""
        region = self.region
        yield _guest_fills(region)
        yield _synced_shared(region)
        for offset, size in RANGES:
            part = (self.base + offset, size)
            first_page = (self.base + offset, _P)
            yield over(Step.GUEST_WRITE, [part])
            yield _to_private(part, with_fallocate)
            if size > _P:
                yield over(Step.GUEST_WRITE, [first_page])
            else:
                yield from self._private_page(part)
            yield _to_shared(part, with_fallocate)
            yield over(Step.GUEST_WRITE, [part])
            yield _synced_shared(part)
            # In place, a hole discards what was shared too: first the hole, then the filling.
            yield _to_shared(region, True)
            yield over(Step.GUEST_WRITE, [region])

    def _private_page(self, page: Range) -> Iterator[Operations]:
        """A page alone is filled, checked, and so is everything around it."""
        yield over(Step.GUEST_WRITE, [page])
        yield self._synced_private(page)
        yield over(Step.GUEST_READ, [page])
        around = [(self.base, page[0] - self.base), (page[0] + _P, self.base + REGION - page[0] - _P)]
        yield over(Step.GUEST_READ, [each for each in around if each[1]])
        yield self._synced_private(page)  # frame 0 of the range is even, and the only one

    def punch_hole(self, precise: bool) -> Iterator[Operations]:
        """Holes in private memory read zeros, and stay private."""
        region = self.region
        yield _to_private(region, False)
        for offset, size in RANGES:
            part = (self.base + offset, size)
            filled = part if precise else region
            yield over(Step.PUNCH_HOLE, [region])
            yield over(Step.ACCEPT, [region])
            yield _guest_fills(filled)
            yield over(Step.PUNCH_HOLE, [part])
            yield over(Step.ACCEPT, [part])
            yield over(Step.GUEST_READ, [part])

    def _synced_private(self, part: Range) -> Operations:
        """The host looks at private memory, which in place it mustn't see."""
        return over(Step.HOST_READ, [part] if self.probes else [])


def _guest_fills(part: Range) -> Operations:
    return join_operations([over(Step.GUEST_WRITE, [part]), over(Step.GUEST_READ, [part])])


def _synced_shared(part: Range) -> Operations:
    """The host sees what the guest wrote, writes something else, and the guest sees that."""
    return join_operations(
        [over(step, [part]) for step in (Step.HOST_READ, Step.HOST_WRITE, Step.GUEST_READ)]
    )


def _to_private(part: Range, with_fallocate: bool) -> Operations:
    """Map private: first fallocate, then the attribute; an SNP or TDX guest accepts what it gets."""
    steps = [over(Step.ALLOCATE, [part])] if with_fallocate else []
    steps += [over(Step.CONVERT, [part], PRIVATE), over(Step.ACCEPT, [part])]
    return join_operations(steps)


def _to_shared(part: Range, with_fallocate: bool) -> Operations:
    steps = [over(Step.PUNCH_HOLE, [part])] if with_fallocate else []
    return join_operations([*steps, over(Step.CONVERT, [part], SHARED)])
