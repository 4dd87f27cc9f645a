"""A Linux guest comes up: its image, lazily accepted memory, what it shares; and goes, by kexec."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from gmemcore.engine.steps import Step
from gmemcore.errors import InvalidArgumentError
from gmemcore.uapi import PAGE_SIZE, PageType
from gmemcore.units import format_size
from gmemcore.workload.behaviours.guest import (
    BLOCK,
    PRIVATE,
    SHARED,
    Grid,
    Range,
    SeededGuest,
    distinct,
    in_turn,
    operations,
    over,
)
from gmemcore.workload.operations import Operations, join_operations
from gmemcore.workload.seeds import Words

SWIOTLB_LEAST: Final = 64 << 20
SWIOTLB_MOST: Final = 1 << 30
SWIOTLB_SHARE: Final = 6  # percent
SWIOTLB_UNIT: Final = 256 << 10  # IO_TLB_SEGSIZE slots of 2 KiB

# What is populated beside the image: (page type, bytes).
SPECIAL_PAGES: Final = (
    (PageType.ZERO, 9 * PAGE_SIZE),
    (PageType.SECRETS, PAGE_SIZE),
    (PageType.CPUID, PAGE_SIZE),
)
_PAGE_TYPES: Final = list(PageType)


def snp_boot(
    guest: SeededGuest, *, vcpus: int, image: int, swiotlb: int | None, queues: int, ring: int,
    request: int, accept: int, accepted: float, granularity: int,
) -> Iterator[Operations]:  # fmt: skip
    """An SNP guest: populated image with its special pages, GHCBs, chunks made private before PVALIDATE."""
    special = sum(size for _, size in SPECIAL_PAGES)
    launch = _launch(guest, image, SPECIAL_PAGES)
    sizes = [ring] * queues + [PAGE_SIZE] * vcpus
    shared = _shared(guest, image + special, swiotlb, sizes, "rings and GHCBs", granularity)
    yield launch
    yield from _run(guest, shared, image + special, request, accept, accepted, state_change=True)


def tdx_boot(
    guest: SeededGuest, *, image: int, swiotlb: int | None, queues: int, ring: int,
    request: int, accept: int, accepted: float, granularity: int,
) -> Iterator[Operations]:  # fmt: skip
    """A TD: populated image, memory accepted without asking the host first, MapGPA in pieces."""
    launch = _launch(guest, image, ())
    shared = _shared(guest, image, swiotlb, [ring] * queues, "rings", granularity)
    yield launch
    yield from _run(guest, shared, image, request, accept, accepted, state_change=False)


def kexec(
    guest: SeededGuest, *, shared: float, run: int, rounds: int, accept: int, sweep: bool
) -> Iterator[Operations]:
    """Kernels share memory and hand over: at the end of each, what it shared is private again."""
    grid = guest.grid(run)
    n = min(max(1, round(shared * grid.count)), grid.count)
    for number in range(rounds):
        chosen = distinct(guest.stream.split("kernel", number), grid.count, n)
        yield from _share_cells(grid, chosen)
        # Devices are quiet, and what was pinned for them isn't any more: nothing may hold a page back.
        yield over(Step.UNPIN, guest.ranges)
        for low in range(0, n, BLOCK):
            gpa, size = grid[chosen[low : low + BLOCK]]
            yield operations(Step.CONVERT, gpa, size, attributes=PRIVATE)
        if sweep:
            yield over(Step.CONVERT, guest.ranges, PRIVATE)
        yield from _take_back(grid, chosen, accept)


# --- parts --------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Shared:
    """What a guest shares: bounce buffers, and small areas in them (`granularity`) or anywhere else."""

    bounce: Range
    small: list[Range]
    granularity: int


def _shared(
    guest: SeededGuest, image: int, swiotlb: int | None, sizes: Sequence[int], what: str, granularity: int
) -> _Shared:
    """Choose where shared memory is: small areas spread over low memory, or with it in one aligned range."""
    if granularity == PAGE_SIZE:
        bounce = _swiotlb(guest, image, swiotlb)
        name, longest = what.lower(), max(sizes, default=PAGE_SIZE)
        spread = guest.spread(name, _between(guest, image, bounce), len(sizes), longest, what)
        return _Shared(
            bounce, [(gpa, size) for (gpa, _), size in zip(spread, sizes, strict=True)], granularity
        )
    bounce = _swiotlb(guest, image, swiotlb, sum(sizes), granularity)
    starts = bounce[0] + np.cumsum([0, *sizes])
    return _Shared(bounce, [(int(gpa), size) for gpa, size in zip(starts, sizes, strict=False)], granularity)


def _swiotlb(
    guest: SeededGuest, image: int, asked: int | None, more: int = 0, granularity: int = PAGE_SIZE
) -> Range:
    """Where the bounce buffers are, with room for more: at the top of low memory, in whole multiples."""
    start, room = guest.low_range()
    end = (start + room) // granularity * granularity
    usual = min(max(guest.memory * SWIOTLB_SHARE // 100, SWIOTLB_LEAST), SWIOTLB_MOST)
    size = -(-usual // SWIOTLB_UNIT) * SWIOTLB_UNIT if asked is None else asked
    size = -(-(size + more) // granularity) * granularity
    room = end - start - (image if start == guest.ranges[0][0] else 0)
    if size > room:
        raise InvalidArgumentError(
            f"swiotlb of {format_size(size)} doesn't fit next to the image in {format_size(max(room, 0))} of "
            "low memory; use a smaller swiotlb, image or granularity, or more memory"
        )
    return end - size, size


def _between(guest: SeededGuest, image: int, bounce: Range) -> Range:
    """Low memory without the image and the bounce buffers."""
    start, room = guest.low_range()
    used = image if start == guest.ranges[0][0] else 0
    return start + used, room - used - bounce[1]


def _launch(guest: SeededGuest, image: int, special: Sequence[tuple[PageType, int]]) -> Operations:
    """The VMM's part: an image written by the host, made private, populated in place, measured, finished."""
    start, room = guest.ranges[0]
    pages: list[tuple[PageType, Range]] = []
    at = start
    for page_type, size in ((PageType.NORMAL, image), *special):
        pages.append((page_type, (at, size)))
        at += size
    if at - start > room:
        raise InvalidArgumentError(
            f"image of {format_size(image)} and its special pages don't fit in the first "
            f"{format_size(room)}; use a smaller image"
        )
    whole = (start, at - start)
    return join_operations(
        [
            over(Step.CONVERT, [whole], SHARED),
            over(Step.HOST_WRITE, [whole]),
            # What a VMM does for each memory slot: everything starts private, under `legacy` too.
            over(Step.CONVERT, guest.ranges, PRIVATE),
            *(over(Step.POPULATE, [each], variant=_PAGE_TYPES.index(kind)) for kind, each in pages),
            operations(Step.LAUNCH_FINISH, 0, 0, n=1),
        ]
    )


def _run(
    guest: SeededGuest, shared: _Shared, image: int, request: int, accept: int, accepted: float,
    *, state_change: bool,
) -> Iterator[Operations]:  # fmt: skip
    """The guest's part: it accepts what it is about to use, shares, and accepts the rest by and by."""
    grid = guest.grid(accept)
    used = [(guest.ranges[0][0], image), *shared.small, shared.bounce]
    early = np.unique(
        np.concatenate([np.arange(each.start, each.stop, dtype=np.uint64) for each in _cells(grid, used)])
    )
    yield from _accept_cells(grid, early, state_change)
    yield from _share(shared, request)
    wanted = max(round(accepted * grid.count) - len(early), 0)
    fresh = np.ones(grid.count, np.bool_)
    fresh[early] = False
    for cells in grid.blocks():
        late = cells[fresh[cells]][:wanted]
        wanted -= len(late)
        yield from _accept_cells(grid, late, state_change)
        if not wanted:
            return


def _cells(grid: Grid, ranges: Sequence[Range]) -> list[range]:
    return [grid.cells_of(*each) for each in ranges]


def _accept_cells(grid: Grid, cells: Words, state_change: bool) -> Iterator[Operations]:
    """Accept cells, and use the first page of each."""
    if not len(cells):
        return
    gpa, size = grid[cells]
    columns = [operations(Step.CONVERT, gpa, size, attributes=PRIVATE)] if state_change else []
    columns.append(operations(Step.ACCEPT, gpa, size))
    columns.append(operations(Step.GUEST_WRITE, gpa, np.minimum(size, np.uint64(PAGE_SIZE))))
    yield in_turn(columns)


def _share(shared: _Shared, request: int) -> Iterator[Operations]:
    """Share the bounce buffers, in requests of a size, then rings and GHCBs, which both sides then use."""
    (start, size), small, unit = shared.bounce, shared.small, shared.granularity
    pieces = Grid([(0, size)] if size else [], -(-request // unit) * unit)
    for cells in pieces.blocks():
        offset, length = pieces[cells]
        yield operations(Step.CONVERT, np.uint64(start) + offset, length)
    if small:
        uses = [over(Step.GUEST_WRITE, small), over(Step.HOST_READ, small)]
        yield in_turn([over(Step.CONVERT, small, SHARED), *uses] if unit == PAGE_SIZE else uses)


def _share_cells(grid: Grid, chosen: Words) -> Iterator[Operations]:
    for low in range(0, len(chosen), BLOCK):
        gpa, size = grid[chosen[low : low + BLOCK]]
        first_page = np.minimum(size, np.uint64(PAGE_SIZE))
        yield in_turn(
            [
                operations(Step.CONVERT, gpa, size),
                operations(Step.HOST_WRITE, gpa, first_page),
                operations(Step.GUEST_READ, gpa, first_page),
            ]
        )


def _take_back(grid: Grid, chosen: Words, accept: int) -> Iterator[Operations]:
    """The next kernel accepts what came back to it, and uses it."""
    pieces = Grid([(int(gpa), int(size)) for gpa, size in zip(*grid[chosen], strict=True)], accept)
    for cells in pieces.blocks():
        yield from _accept_cells(pieces, cells, state_change=False)
