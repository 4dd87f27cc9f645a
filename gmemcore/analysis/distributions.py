"""Distributions: page state in figures.

Each takes a snapshot, a Vm or a file, and returns a `Table`. Of a series it returns the rows of every
snapshot, with the time as a first key. All of them walk packed words (`Bitmap`) and unpack mixed blocks only.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from typing import Any, Final, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from gmemcore.analysis.address import GuestMemory, block_bytes, states_by_block
from gmemcore.analysis.bitmap import Bitmap
from gmemcore.analysis.parts import SlotState
from gmemcore.analysis.series import Series
from gmemcore.analysis.snapshot import Snapshot, as_snapshot
from gmemcore.analysis.states import STATES, states_of
from gmemcore.analysis.tables import Table, make_table
from gmemcore.engine.packed import BLOCK_PAGES
from gmemcore.machine import GuestMemfd, VmFace
from gmemcore.machine.huge_pages import vmemmap_pages
from gmemcore.policy.huge_pages import ORDERS
from gmemcore.uapi import PAGE_SIZE
from gmemcore.units import format_size, size_words
from gmemcore.workload.layout import Region

Source = Snapshot | VmFace | GuestMemfd
"""What stands for one moment of a guest."""
Sources = Source | Series
"""What a distribution can be of."""
_Distribution = TypeVar("_Distribution", bound=Callable[..., Table])


PAGE_SIZES: Final = {format_size(PAGE_SIZE << order): order for order in (0, *ORDERS)}
"""Sizes of one entry of a page table, and the order of each."""
SIZES: Final = {name: (1 << order) // BLOCK_PAGES for name, order in PAGE_SIZES.items() if order}
"""Sizes above a page that a nested page table maps whole, in 2 MiB blocks."""

QUANTILES: Final = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Quantiles unless others are asked for."""

_DENSE_LENGTHS: Final = 4096
"""Run lengths counted by index; the longer ones, few by their nature, are kept and sorted."""


def over_time(distribution: _Distribution) -> _Distribution:
    """Let a distribution of a snapshot be asked of a series too: its rows for each snapshot, by time."""

    @wraps(distribution)
    def of_either(source: Sources, *arguments: Any, **options: Any) -> Table:
        if not isinstance(source, Series):
            return distribution(source, *arguments, **options)
        return source.tabulate(lambda snapshot: distribution(snapshot, *arguments, **options))

    return cast(_Distribution, of_either)


def one_snapshot(source: Sources) -> Snapshot:
    """Return the snapshot of a source that is one moment; `over_time` has taken series apart before."""
    assert not isinstance(source, Series)
    return as_snapshot(source)


# ---- state mix ---------------------------------------------------------------------------------------


@over_time
def state_mix(source: Sources) -> Table:
    """How many pages are in each state.

    Returns
    -------
    Table
        One row per state of `STATES`: state, pages, bytes, fraction (of the files' pages).
    """
    snapshot = one_snapshot(source)
    return make_table(
        "page states",
        [("state", "U20"), *_MIX_COLUMNS],
        [(name, *_mix(pages, snapshot.n_pages)) for name, pages in snapshot.state_pages().items()],
        ("state",),
        _MIX_UNITS,
    )


_MIX_COLUMNS: Final = (("pages", "<i8"), ("bytes", "<i8"), ("fraction", "<f8"))
_MIX_UNITS: Final = {"pages": "pages", "bytes": "bytes", "fraction": "1"}


def _mix(pages: int, of: int) -> tuple[int, int, float]:
    return pages, pages * PAGE_SIZE, pages / of if of else 0.0


@over_time
def by_slot(source: Sources) -> Table:
    """State mix of each memslot.

    Returns
    -------
    Table
        One row per memslot and state: slot, gpa, size, state, pages, bytes, fraction (of the memslot's
        pages).
    """
    snapshot = one_snapshot(source)
    counts = _counts_of_slots(snapshot)
    rows = [
        (slot.slot, slot.gpa, slot.size, name, *_mix(pages, slot.size // PAGE_SIZE))
        for slot, states in zip(snapshot.slots, counts, strict=True)
        for name, pages in states.items()
    ]
    columns = [("slot", "<i8"), ("gpa", "<u8"), ("size", "<u8"), ("state", "U20"), *_MIX_COLUMNS]
    units = {"gpa": "bytes", "size": "bytes", **_MIX_UNITS}
    return make_table("page states by memslot", columns, rows, ("slot", "state"), units)


@over_time
def by_region(source: Sources, regions: Iterable[Region] | None = None) -> Table:
    """State mix of each region of guest physical memory.

    Parameters
    ----------
    source : Snapshot, Vm, GuestMemfd or Series
    regions : iterable of Region, or None
        For instance a `Layout`'s; what no memslot holds of one is left out. None: runs of memslots without a
        hole.

    Returns
    -------
    Table
        One row per region and state: region (from 0), gpa, size, state, pages, bytes, fraction (of the
        pages that memslots hold there).
    """
    snapshot = one_snapshot(source)
    wanted = (
        _contiguous(snapshot.slots) if regions is None else [(region.gpa, region.size) for region in regions]
    )
    rows: list[tuple[Any, ...]] = []
    for number, (gpa, size) in enumerate(wanted):
        pieces = [piece for slot in snapshot.slots if (piece := _clipped(slot, gpa, gpa + size)) is not None]
        totals = dict.fromkeys((state.name for state in STATES), 0)
        for states in _counts_of_slots(snapshot, pieces):
            for name, pages in states.items():
                totals[name] += pages
        of = sum(totals.values())
        rows += [(number, gpa, size, name, *_mix(pages, of)) for name, pages in totals.items()]
    columns = [("region", "<i8"), ("gpa", "<u8"), ("size", "<u8"), ("state", "U20"), *_MIX_COLUMNS]
    units = {"gpa": "bytes", "size": "bytes", **_MIX_UNITS}
    return make_table("page states by region", columns, rows, ("region", "state"), units)


@over_time
def by_address(source: Sources, block: int | str | None = None) -> Table:
    """State mix of each block of guest physical memory.

    Parameters
    ----------
    source : Snapshot, Vm, GuestMemfd or Series
    block : int, str or None
        Bytes of a block, as ``"2m"``; None: the power of two that makes up to 1,024 of them.

    Returns
    -------
    Table
        One row per block and state that occurs there: address (of its first byte), state, pages, bytes,
        fraction (of the pages that memslots hold there). Files without a memslot follow the last one, at
        multiples of 1 GiB.
    """
    snapshot = one_snapshot(source)
    memory = GuestMemory([snapshot])
    blocks = memory.blocks(block_bytes(memory, block))
    counts = states_by_block(memory, snapshot, blocks)
    where, states = np.nonzero(counts)
    pages = counts[where, states]
    rows = np.empty(len(where), [("address", "<u8"), ("state", "U20"), *_MIX_COLUMNS])
    rows["address"] = blocks.gpas[where]
    rows["state"] = np.array([state.name for state in STATES])[states]
    rows["pages"], rows["bytes"] = pages, pages * PAGE_SIZE
    rows["fraction"] = pages / counts.sum(axis=1)[where]
    title = f"page states by {size_words(blocks.size)} of guest memory"
    return Table(title, rows, ("address", "state"), {"address": "bytes", **_MIX_UNITS})


def _counts_of_slots(snapshot: Snapshot, pieces: Sequence[SlotState] | None = None) -> list[dict[str, int]]:
    """Pages by state of each memslot, or piece of one, in order."""
    pieces = snapshot.slots if pieces is None else pieces
    counts: list[dict[str, int]] = [{} for _ in pieces]
    for index in {piece.file for piece in pieces}:
        own = [i for i, piece in enumerate(pieces) if piece.file == index]
        starts = np.array([pieces[i].offset // PAGE_SIZE for i in own])
        ends = starts + [pieces[i].size // PAGE_SIZE for i in own]
        for name, pages in states_of(snapshot.planes(index)).items():
            for i, count in zip(own, pages.counts_before(ends) - pages.counts_before(starts), strict=True):
                counts[i][name] = int(count)
    return counts


def _contiguous(slots: Sequence[SlotState]) -> list[tuple[int, int]]:
    """(gpa, size) of each run of memslots without a hole."""
    runs: list[tuple[int, int]] = []
    for slot in slots:
        if runs and sum(runs[-1]) == slot.gpa:
            runs[-1] = runs[-1][0], runs[-1][1] + slot.size
        else:
            runs.append((slot.gpa, slot.size))
    return runs


def _clipped(slot: SlotState, start: int, end: int) -> SlotState | None:
    """The part of a memslot within a gpa range."""
    low, high = max(slot.gpa, start), min(slot.gpa + slot.size, end)
    if low >= high:
        return None
    return SlotState(slot.slot, low, high - low, slot.file, slot.offset + low - slot.gpa)


def _slots(snapshot: Snapshot) -> tuple[SlotState, ...]:
    """The memslots; without any, each file as if it were bound at an address of its own alignment."""
    return snapshot.slots or tuple(SlotState(0, 0, file.size, file.index, 0) for file in snapshot.files)


# ---- runs --------------------------------------------------------------------------------------------


@over_time
def run_lengths(source: Sources) -> Table:
    """How long the runs of one attribute are: maximal runs of pages of a file, counted by length.

    Returns
    -------
    Table
        One row per attribute and length that occurs, by length: attribute, length (pages), runs, cdf_runs
        (share of the attribute's runs up to this length), cdf_pages (share of its pages in them).
    """
    snapshot = one_snapshot(source)
    counted = [_run_lengths(snapshot.planes(file.index).private) for file in snapshot.files]
    rows: list[tuple[Any, ...]] = []
    for number, attribute in enumerate(("shared", "private")):
        pairs = np.concatenate([np.empty((0, 2), np.int64), *(of_file[number] for of_file in counted)])
        lengths, place = np.unique(pairs[:, 0], return_inverse=True)
        runs = np.bincount(place, pairs[:, 1], len(lengths)).astype(np.int64)
        cdfs = (np.cumsum(sums) / max(sums.sum(), 1) for sums in (runs, lengths * runs))
        rows += zip([attribute] * len(lengths), lengths, runs, *cdfs, strict=True)
    columns = [
        ("attribute", "U7"),
        ("length", "<i8"),
        ("runs", "<i8"),
        ("cdf_runs", "<f8"),
        ("cdf_pages", "<f8"),
    ]
    units = {"length": "pages", "cdf_runs": "1", "cdf_pages": "1"}
    return make_table("run lengths", columns, rows, ("attribute", "length"), units)


def _run_lengths(private: Bitmap) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Length and number of runs of one file, shape (n, 2): those of shared pages, and of private ones."""
    short = np.zeros((2, _DENSE_LENGTHS), np.int64)
    long: tuple[list[NDArray[np.int64]], ...] = ([], [])
    value, previous = int(private.first), 0
    for edges in _with_end(private):
        lengths = np.diff(edges, prepend=previous)
        for kind, own in ((value, lengths[::2]), (1 - value, lengths[1::2])):
            short[kind] += np.bincount(own[own < _DENSE_LENGTHS], minlength=_DENSE_LENGTHS)
            long[kind].append(own[own >= _DENSE_LENGTHS])
        value = (value + len(edges)) % 2
        previous = int(edges[-1])
    shared, private_ = (_counted(short[kind], np.concatenate(long[kind])) for kind in (0, 1))
    return shared, private_


def _with_end(bitmap: Bitmap) -> Iterator[NDArray[np.int64]]:
    """Edges in pieces, none of them empty, and the end of the file as the last."""
    yield from (edges for edges in bitmap.edge_chunks() if len(edges))
    yield np.array([bitmap.n_pages])


def _counted(short: NDArray[np.int64], long: NDArray[np.int64]) -> NDArray[np.int64]:
    occur = np.flatnonzero(short)
    return np.concatenate(
        [np.column_stack([occur, short[occur]]), np.column_stack(np.unique(long, return_counts=True))]
    )


@over_time
def run_histogram(source: Sources) -> Table:
    """Run lengths in powers of two.

    Returns
    -------
    Table
        One row per attribute and bin, without gaps: attribute, from, to (half-open, pages), runs, pages.
    """
    lengths = run_lengths(source)
    rows: list[tuple[Any, ...]] = []
    for attribute in ("shared", "private"):
        own = lengths.where(attribute=attribute)
        if not len(own):
            continue
        bins = np.frexp(own["length"].astype(float))[1] - 1  # exact below 2^53
        runs = np.bincount(bins, own["runs"]).astype(np.int64)
        pages = np.bincount(bins, own["runs"] * own["length"]).astype(np.int64)
        rows += [(attribute, 1 << i, 2 << i, runs[i], pages[i]) for i in range(len(runs))]
    columns = [("attribute", "U7"), ("from", "<i8"), ("to", "<i8"), ("runs", "<i8"), ("pages", "<i8")]
    units = {"from": "pages", "to": "pages", "pages": "pages"}
    return make_table("run lengths in powers of two", columns, rows, ("attribute", "from"), units)


@over_time
def run_quantiles(source: Sources, quantiles: Sequence[float] = QUANTILES) -> Table:
    """Quantiles of run lengths.

    Returns
    -------
    Table
        One row per attribute and quantile: attribute, quantile, of_runs (the shortest length that this share
        of runs doesn't exceed), of_pages (the same for the share of pages that lie in such runs). Pages.
    """
    lengths = run_lengths(source)
    wanted = np.asarray(quantiles, float)
    if not np.all((wanted >= 0) & (wanted <= 1)):
        raise ValueError(f"quantiles must be from 0 to 1, not {list(quantiles)}")
    rows: list[tuple[Any, ...]] = []
    for attribute in ("shared", "private"):
        own = lengths.where(attribute=attribute)
        if len(own):
            places = (np.searchsorted(own[cdf], wanted - 1e-12) for cdf in ("cdf_runs", "cdf_pages"))
            rows += zip(
                [attribute] * len(wanted), wanted, *(own["length"][place] for place in places), strict=True
            )
    columns = [("attribute", "U7"), ("quantile", "<f8"), ("of_runs", "<i8"), ("of_pages", "<i8")]
    units = {"quantile": "1", "of_runs": "pages", "of_pages": "pages"}
    return make_table("quantiles of run lengths", columns, rows, ("attribute", "quantile"), units)


# ---- large mappings ----------------------------------------------------------------------------------


@over_time
def mappability(source: Sources) -> Table:
    """How much of the guest a nested page table could map with 2 MiB and 1 GiB entries.

    A block can be mapped whole if it is naturally aligned in guest physical memory, lies within one memslot
    whose address and file offset agree modulo its size, and has one attribute. Whether the memory behind it
    is contiguous is not asked: guest_memfd's folios are a page each today, and this is what conversions alone
    would cost if they weren't.

    Returns
    -------
    Table
        One row per size: size, blocks (whole aligned ones), private, shared, mixed (of those), outside (pages
        in no such block), fraction (of all pages of memslots, those in blocks of one attribute).

    References
    ----------
    Linux, ``arch/x86/kvm/mmu/mmu.c``: ``hugepage_has_attrs`` and ``kvm_mmu_init_memslot_memory_attributes``;
    ``arch/x86/kvm/x86.c``: ``kvm_alloc_memslot_metadata`` for the alignment of memslots.
    """
    snapshot = one_snapshot(source)
    slots = _slots(snapshot)
    of = sum(slot.size for slot in slots) // PAGE_SIZE
    planes = {file.index: snapshot.planes(file.index).private for file in snapshot.files}
    rows = []
    for name, blocks in SIZES.items():
        pages = blocks * BLOCK_PAGES
        figures = np.array([_blocks_of_slot(planes[slot.file], slot, blocks) for slot in slots], np.int64)
        whole, private, shared = figures.reshape(-1, 3).sum(axis=0).tolist()
        fraction = (private + shared) * pages / of if of else 0.0
        rows.append((name, whole, private, shared, whole - private - shared, of - whole * pages, fraction))
    columns = [
        *[("size", "U2"), ("blocks", "<i8"), ("private", "<i8"), ("shared", "<i8"), ("mixed", "<i8")],
        *[("outside", "<i8"), ("fraction", "<f8")],
    ]
    units = {"blocks": "blocks", "private": "blocks", "shared": "blocks", "mixed": "blocks"}
    units |= {"outside": "pages", "fraction": "1"}
    return make_table("blocks that can be mapped whole", columns, rows, ("size",), units)


def _blocks_of_slot(private: Bitmap, slot: SlotState, blocks: int) -> tuple[int, int, int]:
    """Aligned blocks of a memslot: how many in all, private and shared."""
    size = blocks * BLOCK_PAGES * PAGE_SIZE
    if (slot.gpa - slot.offset) % size:
        return 0, 0, 0
    first, last = -(-slot.offset // size), (slot.offset + slot.size) // size
    all_in, all_out = (uniform[first:last] for uniform in private.uniform_blocks(blocks))
    return max(last - first, 0), int(all_in.sum()), int(all_out.sum())


@over_time
def mapping_sizes(source: Sources) -> Table:
    """How much of the memory in use can be mapped with entries of each size, by the folios that it has.

    A whole folio of a huge page can be mapped with one entry, everything else with entries of 4 KiB.
    `mappability` asks the same of attributes alone, whatever the folios are.

    Returns
    -------
    Table
        One row per size: size, entries, bytes, fraction (of the memory in use), split (huge pages of this
        size that are split to 4 KiB, and counted there), struct_pages (bytes that their struct pages need).

    References
    ----------
    docs/huge-pages.md, Folios and Struct pages.
    """
    snapshot = one_snapshot(source)
    entries, split = dict.fromkeys(PAGE_SIZES.values(), 0), dict.fromkeys(PAGE_SIZES.values(), 0)
    for file in snapshot.files:
        if file.page_order:
            whole, divided = snapshot.count_folios(file)
            entries[file.page_order] += whole
            split[file.page_order] += divided
            entries[0] += divided << file.page_order
        else:
            entries[0] += snapshot.planes(file.index).memory_pages
    in_use = sum(n << order for order, n in entries.items())
    rows = []
    for size, order in PAGE_SIZES.items():
        pages = entries[order] << order
        struct_pages = split[order] * vmemmap_pages(order) * PAGE_SIZE if order else 0
        rows.append(
            (size, entries[order], pages * PAGE_SIZE, pages / max(in_use, 1), split[order], struct_pages)
        )
    columns = [
        *[("size", "U2"), ("entries", "<i8"), ("bytes", "<i8"), ("fraction", "<f8"), ("split", "<i8")],
        ("struct_pages", "<i8"),
    ]
    units = {"entries": "entries", "bytes": "bytes", "fraction": "1", "split": "huge pages"}
    units |= {"struct_pages": "bytes"}
    return make_table("mapping sizes in use", columns, rows, ("size",), units)


@over_time
def fragmentation(source: Sources) -> Table:
    """How broken up private and shared memory are: the kernel's unusable free space index, of attributes.

    The index of an order is the share of pages that can't serve a request of that order, because they lie in
    no whole aligned block: (pages - pages in whole blocks) / pages. mm/ asks it of free memory. Here it is
    asked of private memory, of shared memory and of both, and says which share of it a nested page table must
    map with smaller entries: 0 none of it, 1 all. Chosen over ``extfrag_index``, which tells lack of memory
    from fragmentation after an allocation failed, a question that conversions don't ask; and over the share
    of mixed blocks, which doesn't see which attribute pays. With no memory of a kind it is 0; mm/ says 1.

    Returns
    -------
    Table
        One row per attribute and size: attribute (private, shared, both), size, pages, whole (pages in whole
        blocks), index.

    References
    ----------
    Gorman and Whitcroft, "The What, The Why and the Where To of Anti-Fragmentation", Ottawa Linux Symposium
    2006 (F_u(j)); Linux, ``mm/vmstat.c``: ``unusable_free_index``.
    """
    snapshot = one_snapshot(source)
    slots = _slots(snapshot)
    of = sum(slot.size for slot in slots) // PAGE_SIZE
    private = sum(_pages_of_slot(snapshot, slot) for slot in slots)
    pages = {"private": private, "shared": of - private, "both": of}
    rows = []
    for row in mappability(snapshot).records():
        in_block = SIZES[row["size"]] * BLOCK_PAGES
        whole = {name: row[name] * in_block for name in ("private", "shared")}
        whole["both"] = sum(whole.values())
        for attribute, n in pages.items():
            index = (n - whole[attribute]) / n if n else 0.0
            rows.append((attribute, row["size"], n, whole[attribute], index))
    columns = [("attribute", "U7"), ("size", "U2"), ("pages", "<i8"), ("whole", "<i8"), ("index", "<f8")]
    units = {"pages": "pages", "whole": "pages", "index": "1"}
    return make_table("fragmentation (unusable space index)", columns, rows, ("attribute", "size"), units)


def _pages_of_slot(snapshot: Snapshot, slot: SlotState) -> int:
    """Private pages of a memslot."""
    start = slot.offset // PAGE_SIZE
    bounds = [start, start + slot.size // PAGE_SIZE]
    before = snapshot.planes(slot.file).private.counts_before(bounds)
    return int(before[1] - before[0])


# ---- the IOMMU ---------------------------------------------------------------------------------------


@over_time
def iommu(source: Sources) -> Table:
    """What an IOMMU maps of the guest for assigned devices: pages that are shared or pinned.

    VFIO maps what the RAM's discard manager calls populated, which is what is shared, and pins it. A pin on a
    page that isn't shared (`legacy` allows it) is mapped still.

    Returns
    -------
    Table
        One row: guest, shared, pinned, mapped (pages), mappings (maximal runs of mapped pages of a file: a
        DMA mapping each, of which VFIO's type1 allows 65535 by default), fraction (mapped of guest).

    References
    ----------
    QEMU, ``hw/vfio/listener.c`` and ``system/ram-block-attributes.c``; Linux,
    ``drivers/vfio/vfio_iommu_type1.c``: ``dma_entry_limit``.
    """
    snapshot = one_snapshot(source)
    totals = np.zeros(4, np.int64)
    for file in snapshot.files:
        planes = snapshot.planes(file.index)
        shared = ~planes.private
        mapped = shared | planes.pinned
        totals += [shared.count(), planes.pinned.count(), mapped.count(), _runs_in(mapped)]
    shared_pages, pinned, mapped_pages, mappings = totals.tolist()
    of = snapshot.n_pages
    rows = [(of, shared_pages, pinned, mapped_pages, mappings, mapped_pages / of if of else 0.0)]
    names = ("guest", "shared", "pinned", "mapped", "mappings")
    columns = [*((name, "<i8") for name in names), ("fraction", "<f8")]
    units = dict.fromkeys(("guest", "shared", "pinned", "mapped"), "pages") | {"fraction": "1"}
    return make_table("pages mapped by an IOMMU", columns, rows, ("guest",), units)


def _runs_in(bitmap: Bitmap) -> int:
    """How many maximal runs of pages are in."""
    return (sum(len(edges) for edges in bitmap.edge_chunks()) + 1 + bitmap.first) // 2


# ---- over time ---------------------------------------------------------------------------------------


def splits_and_merges(series: Series) -> Table:
    """2 MiB blocks that ceased and began to have one attribute, between one snapshot and the next.

    Returns
    -------
    Table
        One row per snapshot: operation (or second), split, merged (since the one before; of the first: since
        the Vm's creation), mixed (blocks of files that have both attributes then).
    """
    rows = []
    before = (0, 0)
    for at, snapshot in zip(series.times, series, strict=True):
        now = (snapshot.counters.blocks_2m_split, snapshot.counters.blocks_2m_merged)
        mixed = sum(len(snapshot.planes(file.index).private.mixed) for file in snapshot.files)
        rows.append((at, *(new - old for new, old in zip(now, before, strict=True)), mixed))
        before = now
    time = series.dimension
    columns = [(time, series.times.dtype), ("split", "<i8"), ("merged", "<i8"), ("mixed", "<i8")]
    units = {time: series.unit, "split": "blocks", "merged": "blocks", "mixed": "blocks"}
    return make_table("2 MiB blocks split and merged", columns, rows, (time,), units)


_MIXES: Final = (state_mix, by_slot, by_region)

DISTRIBUTIONS: Final = {
    each.__name__: each for each in (*_MIXES, mapping_sizes, run_quantiles, fragmentation, mappability, iommu)
}
"""What ``gmemcore snapshot info`` prints of a snapshot, by name."""
