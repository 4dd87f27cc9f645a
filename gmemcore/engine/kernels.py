"""All Numba kernels, in one file: everything that changes page state or guest bytes.

Each operation is one call of an entry point (at the end of this file). It takes the file's lock, checks, acts
and releases the lock. An exception can interrupt Python between any two bytecodes, but never a kernel. So an
operation happens completely or not at all, and no Python code holds a lock. Kernels never raise and never
allocate; they return a reason.

Memory of one file
------------------
``header``  uint64, one slot per name below: lock, sizes, addresses of the rest, counters. Its address
            identifies the file.
``words``   uint64, one per 2 MiB block of 512 pages: for each plane a ten-bit field that counts the block's
            pages in that plane. A count of 0 or of the whole block describes the plane completely.
``lines``   uint64, shape (6, rows): one bitmap per plane, one bit per page. The eight words of a block, its
            line of that plane, are *valid only while the block is mixed* (count neither 0 nor full) or
            ``header[DENSE]`` is set. Uniform memory therefore costs eight bytes per block.
``memory``  uint64, 512 per page: DRAM as the bus sees it; empty for a file without bytes. The DRAM of an
            unallocated page is zero.
``folios``  uint64, one per huge page of a file that has those: the state of its folio. It follows from the
            planes of the pages, and is kept because reading them would take 512 words of a 1 GiB page.
``marks``   uint8, one per block, and a bitmap per plane of contents: only in a file whose contents are
            deferred (see "deferred contents").
``rules``   uint64, the policy compiled for the Vm and its launch phase (``rules.py``, ``steps.py``).

A set of planes is a mask of whole fields (``fields_of`` in ``state.py``): one operation on a block's word
checks all of them.

Page numbers and counts are uint64 and every constant is cast: a signed operand would make the arithmetic
signed (or float), and a signed index would cost the loops over memory their vector registers.
"""

from typing import Any, NamedTuple

import numpy as np

from gmemcore.engine.jit import callback, entry, inlined, kernel
from gmemcore.engine.plain import (
    add_atomically,
    advise,
    bytes_at,
    compare_bytes,
    find_edges,
    join_thread,
    last_error,
    list_resident,
    lock,
    loose_words_at,
    move_bytes,
    prefetch,
    protect,
    seek,
    start_thread,
    table_at,
    this_thread,
    unlock,
    words_at,
    zero_line,
)


def numbers(count, start=0):
    """Return consecutive numbers as uint64."""
    return tuple(np.uint64(n) for n in range(start, start + count))


U0, U1, U2, U3, U4, _, _, U7, U8, U9 = numbers(10)
U32, U63, U64 = np.uint64(32), np.uint64(63), np.uint64(64)
ONES = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
WORD_BYTES = U8

PAGE_SHIFT = np.uint64(12)
CACHE_LINE_SHIFT = np.uint64(6)
PAGE_MASK, PAGE_WORDS = np.uint64((1 << 12) - 1), np.uint64((1 << 12) // 8)
ROW_SHIFT = np.uint64(6)  # a row: the 64 pages of one word of a line
BLOCK_SHIFT = np.uint64(9)
BLOCK_PAGES, BLOCK_MASK = np.uint64(1 << 9), np.uint64((1 << 9) - 1)

# Planes, in the order of their fields in a block's word and of their lines.
PRIVATE, ALLOCATED, ASSIGNED, ACCEPTED, PINNED, POISONED = numbers(6)
PLANES = np.uint64(6)
FIELD_BITS = np.uint64(10)
FIELD = np.uint64((1 << 10) - 1)
FIELD_ONES = np.uint64(sum(1 << 10 * plane for plane in range(6)))  # times a number: it, in all fields
PRIVATE_FIELD, ALLOCATED_FIELD, ASSIGNED_FIELD, PINNED_FIELD = (
    FIELD << FIELD_BITS * plane for plane in (PRIVATE, ALLOCATED, ASSIGNED, PINNED)
)
ALLOCATED_WHOLE = np.uint64(10 + 9)  # the bit of a word that is set if a whole block is allocated

# Planes of deferred contents, and what the mark of a block has for each: two bits.
STORED, KEYED = numbers(2)
INVERTED, HAS_LINE = U1, U2
MARK_BITS, MARK_MASK = U2, U3
KEYED_LINE = HAS_LINE << MARK_BITS

# Every header begins with a lock (a pthread mutex; all zero means free) and the next header in the list of
# locks.
LOCK_WORDS = 8
NEXT = np.uint64(LOCK_WORDS)

# The header of a file: its own address, its memory and the header of its owner; then properties of the file,
# the state of its key stream and budgets, what system calls need, threads, and the counters since creation.
SELF, N_PAGES, WORDS, LINES, MEMORY, MEMORY_WORDS, OWNER, IS_CLOSED = numbers(8, LOCK_WORDS + 1)
DENSE, SEED, FIRST_WORD, SCRAMBLES, ALLOCATIONS_LEFT, TRACKING, MEMORY_ALIGNED = numbers(7, LOCK_WORDS + 9)
HOST_WORK, HOST_VIEW, COMMIT, RELEASE, DESCRIPTOR, RESIDENT, HOST_STEPS_LEFT = numbers(7, LOCK_WORDS + 16)
THREADS, TASKS, PART, ORDER, FOLIOS = numbers(5, LOCK_WORDS + 23)
DEFERRED, DEFERRED_LINES, STORE, MOST_STORED, PAGES_STORED, VIEWED = numbers(6, LOCK_WORDS + 28)
TOTALS = np.uint64(LOCK_WORDS + 34)
COUNTERS = 21
HEADER_SLOTS = np.uint64(LOCK_WORDS + 34 + COUNTERS)

# The header of an owner, shared by its files: the launch phase, the rules of both phases and the number of
# exits; then the launch, and the attributes by guest frame of an owner with two backings.
PHASE, RULES_LAUNCHING, RULES_RUNNING, MEMORY_FAULTS, OWNER_IS_CLOSED = numbers(5, LOCK_WORDS + 1)
LAUNCH_BEGAN, IS_MEASURED, CORRECTION, CORRECTION_SIZE, WITHOUT_VCPUS = numbers(5, LOCK_WORDS + 6)
TWO_BACKINGS, EDGES, N_EDGES, EDGE_ROOM = numbers(4, LOCK_WORDS + 11)
FRAMES_CHANGED, FRAMES_SPLIT, FRAMES_MERGED = numbers(3, LOCK_WORDS + 15)
DIGEST = np.uint64(LOCK_WORDS + 18)
DIGEST_WORDS = np.uint64(6)
OWNER_SLOTS = np.uint64(LOCK_WORDS + 18 + 6)
LAUNCHING, RUNNING = numbers(2)

# Rows of a result, one column per request. They start as 0 and only other values are written: a million
# results take a hundred megabytes, most of them never touched. The counters are in the order of
# ``counters.py``.
REASON, ERROR_OFFSET = numbers(2)
COUNTERS_AT = np.uint64(2)
(
    PAGES_CHANGED,
    BYTES_ZEROED,
    BYTES_XORED,
    BYTES_SCRAMBLED,
    PAGES_ALLOCATED,
    RMP_UPDATES,
    SEPT_CHANGES,
    LINES_FLUSHED,
    PAGES_ACCEPTED,
    BLOCKS_SPLIT,
    BLOCKS_MERGED,
    FOLIOS_2M_SPLIT,
    FOLIOS_2M_MERGED,
    FOLIOS_1G_SPLIT,
    FOLIOS_1G_MERGED,
    PAGES_RESTRUCTURED,
    VMEMMAP_ALLOCATED,
    VMEMMAP_FREED,
    TLB_FLUSHES,
    PSMASHES,
    SEPT_DEMOTIONS,
) = numbers(COUNTERS, 2)
RESULT_ROWS = 2 + COUNTERS
ROWS = np.uint64(RESULT_ROWS)

# The buffer of one call: its own address, the request to a file or to an owner, the result, and counters of
# host writes that were detected on the way.
CALL, FILE, OFFSET, SIZE, ATTRIBUTES, FLAGS, ERROR_OFFSET_GIVEN, RESERVED, STEP, DATA = numbers(10)
GUEST, SLOTS, N_SLOTS, MORE, MOST, ANSWER = numbers(6, 10)
GONE = MORE  # what a refused access found
IS_PAGE, IS_HOLE, IS_CLOSED_FILE = numbers(3)
RESULT, NOTICED = np.uint64(16), np.uint64(16 + RESULT_ROWS)
PHASE_SEEN, FAULTS_SEEN, PLANNED = numbers(3, 16 + 2 * RESULT_ROWS)
DIGEST_BEFORE, DIGEST_AFTER = np.uint64(19 + 2 * RESULT_ROWS), np.uint64(25 + 2 * RESULT_ROWS)
CALL_SLOTS = 32 + 2 * RESULT_ROWS
CALL_BYTES = 4096  # the rest is room for short data
CALL_OF_FILE, CALL_OF_GUEST, CALL_OF_LAUNCH, CALL_OF_FRAMES = numbers(4)  # what `repeat` does for each range
RESULT_AT, NOTICED_AT = RESULT * WORD_BYTES, NOTICED * WORD_BYTES  # bytes

PRIVATE_ATTRIBUTE = np.uint64(8)

# A memslot: guest physical address and size in bytes, the files of its private and its shared side, the
# offset in them, and the address of its deleted flag.
SLOT_GPA, SLOT_SIZE, SLOT_PRIVATE, SLOT_SHARED, SLOT_OFFSET, SLOT_DELETED = numbers(6)
SLOT_WORDS = np.uint64(6)

# The output of `survey_pages`, and the contradictions that it can find.
SURVEY_FOLDED, _, SURVEY_PAGE, SURVEY_MIXED, SURVEY_TOTALS = numbers(5)
SURVEY_SLOTS = 10
WRONG_COUNT, WRONG_ACCEPTED, WRONG_ASSIGNED, WRONG_PINNED, WRONG_FOLIO = numbers(5, 1)
MIX = np.uint64(0xD6E8_FEB8_6659_FD93)  # an odd number whose bits are spread

# Why a request was refused: the checks of a conversion in order, then those of other steps. 0: it was done.
(
    FLAGS_UNKNOWN,
    FLAGS_MANY,
    ERROR_OFFSET_SET,
    RESERVED_SET,
    NO_PRIVATE_MEMORY,
    ATTRIBUTE_UNKNOWN,
    RANGE_EMPTY,
    RANGE_UNALIGNED,
    RANGE_BEYOND_END,
    MODE_UNSUPPORTED,
    NO_MEMORY,
    PAGE_PINNED,
    INVALID,
    BAD_ADDRESS,
    INPUT_OUTPUT,
    HOST_FAULT,
    MEMORY_FAULT,
    NO_SLOT,
    POISONED_PAGE,
    NOT_VALIDATED,
    TOO_LARGE,
    CLOSED_FILE,
    NO_BYTES,
    UNKNOWN_IOCTL,
    NO_ROOM,
    CHANGED,
) = numbers(26, 1)

# The rules of one VM and phase: single words, one cell per direction and flag, one row per step and variant.
KNOWN_FLAGS, KNOWN_ATTRIBUTES, HAS_PRIVATE_MEMORY, ERROR_OFFSET_CHECKED, HAS_IOCTL = numbers(5)
FRAME_ATTRIBUTES, GUEST_HAS_KEY, UNMAP_CLEARS, UNMAP_OPERATIONS = numbers(4, 5)
ENDS_WITH_SLOT, POPULATE_CLOSED, FINISH_AGAIN, FINISH_AGAIN_WITHOUT_VCPUS, ROLLS_BACK = numbers(5, 9)
CELLS = np.uint64(14)
REFUSAL, UNLESS, OPERATIONS, SET, CLEAR, PLAIN = numbers(6)
CELL_WORDS = np.uint64(6)  # PLAIN: policy always allows the conversion, and it changes no byte
FLAG_SLOTS = np.uint64(65)  # no flag, and each of 64 bits

# A step's row: requirements on the range, what refuses all of it or a page, how much remains done when a page
# refuses, then operations on bytes and planes. A term has wanted and unwanted planes, the reason, the planes
# set on the page it refuses, and whether that page gets the source of a launch update. Variants are the kinds
# of a guest access, or the contents of a launch update.
STEPS = CELLS + U2 * FLAG_SLOTS * CELL_WORDS
CONVERT, HOST_READ, HOST_WRITE, GUEST_READ, GUEST_WRITE, ACCEPT, ALLOCATE, PUNCH_HOLE = numbers(8)
PIN, UNPIN, POISON, POPULATE, LAUNCH_FINISH = numbers(5, 8)
STEP_VARIANTS, STEP_COUNT = np.uint64(4), 13
ALIGNED, SIGNED, WRAPS, ENDS_BELOW_TOP, BEYOND_END, STEP_REFUSAL, PARTIAL, TERMS = numbers(8)
TERM_WORDS, TERM_COUNT = np.uint64(5), 4
WANTED, UNWANTED, TERM_REASON, MARK, COPIED = numbers(5)
STEP_OPERATIONS, STEP_SET, STEP_CLEAR = numbers(3, 7 + 5 * 4)
STEP_WORDS = np.uint64(7 + 5 * 4 + 3)
PARTIAL_REFUSED, PARTIAL_DONE = U1, U2  # pages before the refusing one stay done; the second is a success
AS_ATTRIBUTE, AS_SHARED, AS_PRIVATE = numbers(3)
FROM_SOURCE, FROM_PRIVATE_FRAME = U1, U2
OF_PAGES, OF_FOLIOS = numbers(2)  # variants of fallocate, and of ALIGNED less one
RULES_WORDS = STEPS + np.uint64(STEP_COUNT) * STEP_VARIANTS * STEP_WORDS

# Flags of a launch update.
IS_ZERO, IS_CPUID, IN_PLACE, IS_WRITABLE, PLAN_ONLY = (U1 << n for n in numbers(5))

# Operations on the bytes of a page, four bits for each rank of a page: unallocated, allocated, assigned,
# accepted (each includes the ones before).
NO_OPERATION, ZERO, XOR, SCRAMBLE, KEYSTREAM = numbers(5)
OPERATION_BITS, OPERATION = np.uint64(4), np.uint64(15)
ALL_DONE = np.uint64(16)  # not an operation: the end of a range
STREAM_PAGES = np.uint64(256)  # from 1 MiB on, zeros are written past the caches

# One part of a long range, for one thread: the thread, whether it was started, its request and its counters.
TASK_THREAD, TASK_STARTED, TASK_FILE, TASK_OPERATIONS, TASK_START, TASK_END, TASK_RESULT = numbers(7)
TASK_WORDS = np.uint64(6 + RESULT_ROWS)
LEAST_PART = np.uint64(1024)  # minimum pages per thread: below 4 MiB, starting it costs more than its work

# The state of a folio, in the lowest bits of its word. Above them, of a split folio: one of its blocks, which
# had a shared page when it was last looked at.
ABSENT, WHOLE, SPLIT = numbers(3)
FOLIO_STATE, SHARED_BLOCK_SHIFT = np.uint64(3), U8
STRUCT_PAGES_SHIFT = np.uint64(6)  # a page has the struct pages of 64 pages

# Arguments of system calls.
NO_ACCESS, READ_AND_WRITE = np.int32(0), np.int32(3)
DONT_DUMP, DO_DUMP = np.int32(16), np.int32(17)  # advice used only to split and merge mappings
SEEK_DATA, SEEK_HOLE = np.int32(3), np.int32(4)
EINTR, EAGAIN, EINVAL = np.int32(4), np.int32(11), np.int32(22)
RESIDENT_PAGES = np.uint64(4096)  # pages per mincore call

GROUP = np.uint64(64)  # blocks whose edges are found before they are listed: 4 KiB of them
GROUP_ROWS, RUNS_SCRATCH = 64 * 8, 2 * 64 * 8
GOLDEN = np.uint64(0x9E37_79B9_7F4A_7C15)
AHEAD = np.uint64(32)  # requests: how far ahead page state is prefetched
FIRST_LINES = np.uint64(16)  # of a page, to be prefetched: all 64 were as slow as none (docs/benchmark.md)
NEVER = ONES  # an unlimited budget; no address; no descriptor


class Piece(NamedTuple):
    """A range of guest memory in at most one memslot, and with one attribute if the owner has those.

    Length in bytes, file (0: no memslot), offset in it, address of the memslot's deleted flag, and the
    owner's attribute: `AS_PRIVATE`, `AS_SHARED`, or `AS_ATTRIBUTE` where each file has its own.
    """

    length: Any
    file: Any
    offset: Any
    deleted: Any
    kind: Any


class File(NamedTuple):
    """Views of the memory of one file, and its rules."""

    header: Any
    words: Any
    lines: Any
    memory: Any
    rules: Any


@inlined
def file_at(address):
    """Return the open file whose header is at an address."""
    header = words_at(address, HEADER_SLOTS)
    owner = words_at(header[OWNER], OWNER_SLOTS)
    n_blocks = (header[N_PAGES] + BLOCK_MASK) >> BLOCK_SHIFT
    return File(
        header,
        words_at(header[WORDS], n_blocks),
        table_at(header[LINES], PLANES, n_blocks << U3),
        words_at(header[MEMORY], header[MEMORY_WORDS]),
        words_at(owner[RULES_LAUNCHING + owner[PHASE]], RULES_WORDS),
    )


@inlined
def is_closed(address):
    """Return whether the file at an address is closed: its memory is gone."""
    return words_at(address, HEADER_SLOTS)[IS_CLOSED] != U0


# ---- bits ---------------------------------------------------------------------------------------


@inlined
def popcount(x):
    """Count the set bits of a word (the compiler recognises this form and emits one instruction)."""
    x = x - ((x >> U1) & np.uint64(0x5555_5555_5555_5555))
    x = (x & np.uint64(0x3333_3333_3333_3333)) + ((x >> U2) & np.uint64(0x3333_3333_3333_3333))
    x = (x + (x >> U4)) & np.uint64(0x0F0F_0F0F_0F0F_0F0F)
    return (x * np.uint64(0x0101_0101_0101_0101)) >> np.uint64(56)


@inlined
def lowest_bit(x):
    """Return the index of the lowest set bit; 64 if no bit is set."""
    return popcount(~x & (x - U1))


@inlined
def bits_between(low, high):
    """Return a word with bits [low, high) set; 0 <= low < high <= 64."""
    return (ONES << low) & (ONES >> (U64 - high))


@inlined
def lowest_plane(fields):
    """Return the number of the first plane in a mask of fields."""
    return lowest_bit(fields) // FIELD_BITS


@inlined
def smaller(one, other):
    """Return the smaller of two numbers."""
    return one if one < other else other


@inlined
def pages_of_block(n_pages, block):
    """Return how many pages a block has: 512, or fewer for the last block of the file."""
    return smaller(n_pages - (block << BLOCK_SHIFT), BLOCK_PAGES)


# ---- writing page state -------------------------------------------------------------------------


@kernel
def write_uniform_line(lines, plane, block, pages, value):
    """Write the line of a uniform block, which its word alone described: value for each of its pages."""
    for r in range(8):
        row = (block << U3) + np.uint64(r)
        first = np.uint64(r) << ROW_SHIFT
        if pages >= first + U64:
            lines[plane, row] = value
        else:
            lines[plane, row] = value & bits_between(U0, pages - first) if pages > first else U0


@inlined
def write_row(lines, plane, row, mask, value):
    """Set or clear bits of one row; return how many changed."""
    old = lines[plane, row]
    new = (old & ~mask) | (mask & value)
    lines[plane, row] = new
    return popcount(old ^ new)


@inlined
def write_rows(lines, plane, start, end, value):
    """Set (value = all ones) or clear (0) a plane over [start, end) of one block; return how many changed."""
    row, last = start >> ROW_SHIFT, (end - U1) >> ROW_SHIFT
    mask = ONES << (start & U63)
    changed = U0
    while row < last:
        changed += write_row(lines, plane, row, mask, value)
        mask = ONES
        row += U1
    return changed + write_row(lines, plane, row, mask & (ONES >> (U63 - ((end - U1) & U63))), value)


@inlined
def tally(header, results, counter, i, amount):
    """Add events to the counters of request i and of the file."""
    if amount != U0:
        results[counter, i] += amount
        header[TOTALS + counter - COUNTERS_AT] += amount


@inlined
def tally_assigned(header, results, i, value, changed):
    """Count pages that became assigned, or that ceased to be: those are flushed from the caches."""
    tally(header, results, header[TRACKING], i, changed)
    tally(header, results, LINES_FLUSHED, i, (changed & ~value) << (PAGE_SHIFT - CACHE_LINE_SHIFT))


@inlined
def tally_plane(header, results, i, plane, value, changed, split, merged):
    """Update the counters of a plane after some of its pages changed."""
    if plane == PRIVATE:
        tally(header, results, PAGES_CHANGED, i, changed)
        tally(header, results, BLOCKS_SPLIT, i, split)
        tally(header, results, BLOCKS_MERGED, i, merged)
    elif plane == ASSIGNED:
        tally_assigned(header, results, i, value, changed)
    elif plane == ALLOCATED:
        tally(header, results, PAGES_ALLOCATED, i, changed & value)
    elif plane == ACCEPTED:
        tally(header, results, PAGES_ACCEPTED, i, changed & value)


@inlined
def edit_block(file, start, end, set_, clear, results, i):
    """Set and clear whole planes over pages [start, end) of one block."""
    block = start >> BLOCK_SHIFT
    pages = pages_of_block(file.header[N_PAGES], block)
    word = file.words[block]
    todo = word ^ ((word & ~(set_ | clear)) | (pages * FIELD_ONES & set_))
    if todo == U0:
        return
    while todo != U0:
        plane = lowest_plane(todo)
        field = plane * FIELD_BITS
        todo &= ~(FIELD << field)
        value = ONES if (set_ >> field) & U1 else U0
        target = pages & value
        before = (word >> field) & FIELD
        was_uniform = before == U0 or before == pages
        if was_uniform:
            write_uniform_line(file.lines, plane, block, pages, ~value)
        changed = write_rows(file.lines, plane, start, end, value)
        after = before + changed if value else before - changed
        word += (after - before) << field
        became_uniform = after == target
        split = U1 if was_uniform and not became_uniform else U0
        merged = U1 if became_uniform and not was_uniform else U0
        tally_plane(file.header, results, i, plane, value, changed, split, merged)
    file.words[block] = word


@kernel
def edit_whole_blocks(address, block, end_block, set_, clear, results, i):
    """Set and clear whole planes over whole blocks: count plane by plane, then write each word once."""
    file = file_at(address)
    run = file.words[block:end_block]
    union, common = U0, ONES
    for b in range(run.shape[0]):
        union |= run[b]
        common &= run[b]
    full = BLOCK_PAGES * FIELD_ONES
    keep, put = ~(set_ | clear), full & set_
    todo = ((union ^ put) | (common ^ put)) & ~keep
    while todo != U0:
        plane = lowest_plane(todo)
        field = plane * FIELD_BITS
        todo &= ~(FIELD << field)
        count, mixed = U0, U0
        for b in range(run.shape[0]):
            pages = (run[b] >> field) & FIELD
            count += pages
            mixed += U1 if pages & BLOCK_MASK else U0
        value = ONES if (set_ >> field) & U1 else U0
        changed = (np.uint64(run.shape[0]) << BLOCK_SHIFT) - count if value else count
        tally_plane(file.header, results, i, plane, value, changed, U0, mixed)
    for b in range(run.shape[0]):
        run[b] = (run[b] & keep) | put
    if file.header[DENSE]:
        write_whole_lines(file.lines, block << U3, end_block << U3, set_, clear)


@kernel
def write_whole_lines(lines, row, end_row, set_, clear):
    """Write the lines of whole blocks."""
    todo = set_ | clear
    while todo != U0:
        plane = lowest_plane(todo)
        field = plane * FIELD_BITS
        todo &= ~(FIELD << field)
        value = ONES if (set_ >> field) & U1 else U0
        for r in range(row, end_row):
            lines[plane, r] = value


@inlined
def edit(file, start, end, set_, clear, results, i):
    """Set and clear whole planes over pages [start, end), and count the changes."""
    first = start
    while start < end:
        stop = (start | BLOCK_MASK) + U1
        if start & BLOCK_MASK == U0 and stop <= end:
            stop = end & ~BLOCK_MASK
            edit_whole_blocks(
                file.header[SELF], start >> BLOCK_SHIFT, stop >> BLOCK_SHIFT, set_, clear, results, i
            )
        else:
            stop = smaller(stop, end)
            edit_block(file, start, stop, set_, clear, results, i)
        start = stop
    if file.header[ORDER] and first < end:
        restructure(file.header[SELF], first, end, set_, clear, results, i)


# ---- folios of huge pages -------------------------------------------------------------------------
#
# A huge page in use is one folio if all of its pages are private; otherwise it is split to pages.


@inlined
def folio_count(file):
    """Return the number of huge pages of a file."""
    return file.header[N_PAGES] >> file.header[ORDER]


@kernel
def shared_block(address, folio, block):
    """Return the first block of a folio, from a given one on, that has a shared page; `NEVER`: none has.

    The blocks before the given one come last.
    """
    file = file_at(address)
    n = U1 << (file.header[ORDER] - BLOCK_SHIFT)
    words = file.words[folio * n : (folio + U1) * n]
    for k in range(n):
        at = (block + np.uint64(k)) & (n - U1)
        if words[at] & FIELD != BLOCK_PAGES:
            return at
    return NEVER


@inlined
def state_of_used(address, folio, block):
    """Return the word of a folio in use, from its pages; block: the one to look at first."""
    shared = shared_block(address, folio, block)
    return WHOLE if shared == NEVER else SPLIT | shared << SHARED_BLOCK_SHIFT


@inlined
def tally_folios(header, results, i, split, merged):
    """Count folios that were split and merged, and what that does to struct pages and the TLB."""
    order = header[ORDER]
    pages = (U1 << (order - STRUCT_PAGES_SHIFT)) - U1  # all struct pages but those in one page
    if order == BLOCK_SHIFT:
        tally(header, results, FOLIOS_2M_SPLIT, i, split)
        tally(header, results, FOLIOS_2M_MERGED, i, merged)
    else:
        tally(header, results, FOLIOS_1G_SPLIT, i, split)
        tally(header, results, FOLIOS_1G_MERGED, i, merged)
    tally(header, results, PAGES_RESTRUCTURED, i, (split + merged) << order)
    tally(header, results, VMEMMAP_ALLOCATED, i, split * pages)
    tally(header, results, VMEMMAP_FREED, i, merged * pages)
    tally(header, results, TLB_FLUSHES, i, split + merged)


@kernel
def restructure(address, start, end, set_, clear, results, i):
    """Allocate, split, merge and free folios, after planes of pages [start, end) were set and cleared."""
    file = file_at(address)
    folios, order = words_at(file.header[FOLIOS], folio_count(file)), file.header[ORDER]
    split, merged = U0, U0
    low, high = start >> order, ((end - U1) >> order) + U1
    if clear & ALLOCATED_FIELD:  # whole huge pages: the pool gets each as one folio
        for f in range(low, high):
            merged += U1 if folios[f] & FOLIO_STATE == SPLIT else U0
            folios[f] = ABSENT
    elif clear & PRIVATE_FIELD:
        for f in range(low, high):
            was_whole = folios[f] & U1  # of the three states, WHOLE alone is odd
            split += was_whole
            folios[f] += was_whole
    elif set_ & (PRIVATE_FIELD | ALLOCATED_FIELD):
        f, covered, stop = low, high, high  # huge pages that become private as a whole
        if set_ & ALLOCATED_FIELD == U0:
            covered, stop = (start + (U1 << order) - U1) >> order, end >> order
        while f < high:
            if f == covered and f < stop:
                for k in range(f, stop):
                    was_split = (folios[k] >> U1) & U1  # of the three states, SPLIT alone has this bit
                    merged += was_split
                    folios[k] = (folios[k] & FOLIO_STATE) - was_split
                f = stop
            else:
                state = folios[f] & FOLIO_STATE
                if (state == SPLIT and set_ & PRIVATE_FIELD) or (state == ABSENT and set_ & ALLOCATED_FIELD):
                    folios[f] = state_of_used(address, f, folios[f] >> SHARED_BLOCK_SHIFT)
                    is_whole = folios[f] == WHOLE
                    merged += U1 if is_whole and state == SPLIT else U0
                    split += U1 if not is_whole and state == ABSENT else U0
                f += U1
    if split | merged:
        tally_folios(file.header, results, i, split, merged)


@inlined
def prefetch_folio(file, page):
    """Prefetch the word of a page's folio."""
    if file.header[ORDER]:
        prefetch(words_at(file.header[FOLIOS], folio_count(file)), page >> file.header[ORDER])


@inlined
def count_used(file, start, end):
    """Count the huge pages in use that pages [start, end) touch."""
    folios, order, n = words_at(file.header[FOLIOS], folio_count(file)), file.header[ORDER], U0
    for f in range(start >> order, ((end - U1) >> order) + U1):
        n += U1 if folios[f] != ABSENT else U0
    return n


@inlined
def count_cut(file, start, end):
    """Count the wholly assigned blocks that pages [start, end) take a part of."""
    first, last = start >> BLOCK_SHIFT, end >> BLOCK_SHIFT
    assigned, n = BLOCK_PAGES << (ASSIGNED * FIELD_BITS), U0
    if start & BLOCK_MASK and file.words[first] & ASSIGNED_FIELD == assigned:
        n += U1
    is_counted = first == last and start & BLOCK_MASK != U0
    if end & BLOCK_MASK and not is_counted and file.words[last] & ASSIGNED_FIELD == assigned:
        n += U1
    return n


# ---- reading page state -------------------------------------------------------------------------


@inlined
def plane_row(words, lines, n_pages, plane, row):
    """Return one row of a plane: one bit per page."""
    block = row >> U3
    count = (words[block] >> (plane * FIELD_BITS)) & FIELD
    if count == U0:
        return U0
    if count == pages_of_block(n_pages, block):
        return ONES
    return lines[plane, row]


@inlined
def matching_row(words, lines, n_pages, row, wanted, unwanted):
    """Return the bits of one row whose pages have every wanted plane set and no unwanted one."""
    match = ONES
    todo = wanted | unwanted
    while todo != U0:
        plane = lowest_plane(todo)
        field = plane * FIELD_BITS
        todo &= ~(FIELD << field)
        bits = plane_row(words, lines, n_pages, plane, row)
        match &= bits if (wanted >> field) & U1 else ~bits
    return match


@inlined
def block_may_match(word, pages, wanted, unwanted):
    """Return whether a block's word allows a page with the wanted planes set and the unwanted clear."""
    full = pages * FIELD_ONES
    todo = wanted | unwanted
    while todo != U0:
        field = lowest_plane(todo) * FIELD_BITS
        mask = FIELD << field
        todo &= ~mask
        if (word & mask & wanted == U0 and wanted & mask) or (unwanted & mask and word & mask == full & mask):
            return False
    return True


@kernel
def find_page(address, start, end, wanted, unwanted):
    """Return the first page of [start, end) with all wanted planes and no unwanted one; end if none has."""
    file = file_at(address)
    words, lines, n_pages = file.words, file.lines, file.header[N_PAGES]
    barren = ~words[start >> BLOCK_SHIFT]  # the last word found to have no such page; none yet
    while start < end:
        block = start >> BLOCK_SHIFT
        pages = pages_of_block(n_pages, block)
        stop = smaller((block + U1) << BLOCK_SHIFT, end)
        word = words[block]
        if word != barren:
            if block_may_match(word, pages, wanted, unwanted):
                while start < stop:
                    low = start & U63
                    high = stop - (start - low)
                    match = matching_row(words, lines, n_pages, start >> ROW_SHIFT, wanted, unwanted)
                    match &= bits_between(low, smaller(high, U64))
                    if match != U0:
                        return (start - low) + lowest_bit(match)
                    start += U64 - low
            elif pages == BLOCK_PAGES:
                barren = word
        start = stop
    return end


@kernel
def count_pages(address, start, end, wanted, unwanted):
    """Count the pages of [start, end) with all wanted planes and no unwanted one."""
    file = file_at(address)
    words, lines, n_pages = file.words, file.lines, file.header[N_PAGES]
    plane = lowest_plane(wanted | unwanted)
    is_one_plane = (wanted | unwanted) >> (plane * FIELD_BITS) == FIELD
    count = U0
    while start < end:
        block = start >> BLOCK_SHIFT
        pages = pages_of_block(n_pages, block)
        first = block << BLOCK_SHIFT
        if is_one_plane and start == first and end >= first + pages:
            has = (words[block] >> (plane * FIELD_BITS)) & FIELD
            count += has if wanted else pages - has
            start = first + pages
            continue
        low = start & U63
        high = end - (start - low)
        match = matching_row(words, lines, n_pages, start >> ROW_SHIFT, wanted, unwanted)
        count += popcount(match & bits_between(low, smaller(high, U64)))
        start += U64 - low
    return count


@kernel
def write_lines(address):
    """Write every line, which can then be read without the words."""
    file = file_at(address)
    n_pages = file.header[N_PAGES]
    for b in range(file.words.shape[0]):
        block = np.uint64(b)
        pages = pages_of_block(n_pages, block)
        for p in range(PLANES):
            plane = np.uint64(p)
            count = (file.words[block] >> (plane * FIELD_BITS)) & FIELD
            if count == U0 or count == pages:
                write_uniform_line(file.lines, plane, block, pages, ONES if count else U0)


@inlined
def mixed_in(state, value):
    """Mix a word into a running, order-dependent hash."""
    state = (state ^ value) * MIX
    return state ^ (state >> U32)


@inlined
def hash_line(lines, plane, block, rows):
    """Return the number of pages in a block's line of a plane, and two sums that depend on every bit."""
    row, found, sum_low, sum_high = block << U3, U0, U0, U0
    for r in range(rows):
        bits = lines[plane, row + np.uint64(r)]
        found += popcount(bits)
        key = GOLDEN * np.uint64(U2 * r + U1)
        sum_low += (bits ^ (bits >> U32)) * key
        sum_high += (bits ^ (bits << U7)) * (key ^ MIX)
    return found, sum_low, sum_high


@inlined
def rows_of_block(lines):
    """Return 8, which the compiler doesn't know: it unrolls loops of eight, instead of using vectors."""
    return smaller(U8, np.uint64(lines.shape[1]))


@kernel
def survey_pages(address, out):
    """Hash all page state into two words, count it, and find contradictions.

    out: the two words, the first page of an inconsistent block, the number of mixed blocks of the private
    plane, and the pages of each plane. Returns `WRONG_COUNT` or one of those after it; 0: consistent.
    """
    file = file_at(address)
    words, lines, n_pages = file.words, file.lines, file.header[N_PAGES]
    low, high, mixed_blocks, plain, rows = GOLDEN, n_pages, U0, U0, rows_of_block(lines)
    for b in range(words.shape[0]):
        block = np.uint64(b)
        word = words[block]
        pages = pages_of_block(n_pages, block)
        low, high = mixed_in(low, word), mixed_in(high, word + GOLDEN)
        if word == U0:
            continue
        if word == pages:  # private and nothing else, like most of a large guest
            plain += pages
            continue
        if word >> FIELD_BITS == U0:  # shared and private, and nothing else
            found, sum_low, sum_high = hash_line(lines, PRIVATE, block, rows)
            low, high = mixed_in(low, sum_low), mixed_in(high, sum_high)
            plain += word
            mixed_blocks += U1
            if found != word:
                out[SURVEY_PAGE] = block << BLOCK_SHIFT
                return WRONG_COUNT
            continue
        for p in range(lines.shape[0]):
            plane = np.uint64(p)
            count = (word >> (plane * FIELD_BITS)) & FIELD
            out[SURVEY_TOTALS + plane] += count
            if count == U0 or count == pages:
                continue
            found, sum_low, sum_high = hash_line(lines, plane, block, rows)
            low, high = mixed_in(low, sum_low), mixed_in(high, sum_high)
            if p == 0:
                mixed_blocks += U1
            if found != count:
                out[SURVEY_PAGE] = block << BLOCK_SHIFT
                return WRONG_COUNT
        is_doubtful = pages != BLOCK_PAGES or contradicts(lines, word, block, rows)
        wrong = contradiction(words, lines, n_pages, block) if is_doubtful else U0
        if wrong != U0:
            out[SURVEY_PAGE] = block << BLOCK_SHIFT
            return wrong
    if file.header[ORDER]:
        wrong_folio = first_wrong_folio(address)
        if wrong_folio != NEVER:
            out[SURVEY_PAGE] = wrong_folio << file.header[ORDER]
            return WRONG_FOLIO
    out[SURVEY_TOTALS + PRIVATE] += plain
    out[SURVEY_FOLDED], out[SURVEY_FOLDED + U1], out[SURVEY_MIXED] = low, high, mixed_blocks
    return U0


@kernel
def first_wrong_folio(address):
    """Return the first folio whose state doesn't follow from its pages; `NEVER`: none."""
    file = file_at(address)
    folios, order = words_at(file.header[FOLIOS], folio_count(file)), file.header[ORDER]
    for f in range(folios.shape[0]):
        first = np.uint64(f) << order
        end = first + (U1 << order)
        state = ABSENT
        if find_page(address, first, end, ALLOCATED_FIELD, U0) < end:
            state = state_of_used(address, np.uint64(f), U0) & FOLIO_STATE
        if folios[f] & FOLIO_STATE != state:
            return np.uint64(f)
    return NEVER


@inlined
def masks_of(word, plane):
    """Return what makes a line of a whole block its plane's rows: a mask to keep, and bits to set."""
    count = (word >> (plane * FIELD_BITS)) & FIELD
    return U0 - (U1 if count & BLOCK_MASK else U0), U0 - (count >> BLOCK_SHIFT)


@inlined
def contradicts(lines, word, block, rows):
    """Return whether a page of a whole block breaks a relation between planes; all rows at once."""
    private_kept, private_set = masks_of(word, PRIVATE)
    allocated_kept, allocated_set = masks_of(word, ALLOCATED)
    assigned_kept, assigned_set = masks_of(word, ASSIGNED)
    accepted_kept, accepted_set = masks_of(word, ACCEPTED)
    pinned_kept, pinned_set = masks_of(word, PINNED)
    first, wrong = block << U3, U0
    for r in range(rows):
        row = first + np.uint64(r)
        private = lines[PRIVATE, row] & private_kept | private_set
        allocated = lines[ALLOCATED, row] & allocated_kept | allocated_set
        assigned = lines[ASSIGNED, row] & assigned_kept | assigned_set
        pinned = lines[PINNED, row] & pinned_kept | pinned_set
        wrong |= (lines[ACCEPTED, row] & accepted_kept | accepted_set) & ~assigned
        wrong |= assigned & ~(allocated & private) | pinned & ~(allocated & ~private)
    return wrong != U0


@kernel
def contradiction(words, lines, n_pages, block):
    """Return which relation between planes a page of a block breaks; 0: none."""
    for r in range((pages_of_block(n_pages, block) + U63) >> ROW_SHIFT):
        row = (block << U3) + np.uint64(r)
        private = plane_row(words, lines, n_pages, PRIVATE, row)
        allocated = plane_row(words, lines, n_pages, ALLOCATED, row)
        assigned = plane_row(words, lines, n_pages, ASSIGNED, row)
        pinned = plane_row(words, lines, n_pages, PINNED, row)
        if plane_row(words, lines, n_pages, ACCEPTED, row) & ~assigned:
            return WRONG_ACCEPTED
        if assigned & ~(allocated & private):
            return WRONG_ASSIGNED
        if pinned & ~(allocated & ~private):
            return WRONG_PINNED
    return U0


@kernel
def most_runs(words, plane):
    """Return an upper bound of the number of runs of one plane; reads the words alone."""
    field, most = plane * FIELD_BITS, U1
    for b in range(words.shape[0]):
        count = (words[b] >> field) & FIELD
        most += U2 * smaller(count, BLOCK_PAGES - count) + U2
    return most


@kernel
def list_runs(words, lines, n_pages, plane, ends, scratch):
    """Write the end page of each run of one plane; return how many, 0 if there is too little room.

    The edges of a group of blocks are found a line at a time, then listed: no branch depends on where they
    are. scratch: room for `RUNS_SCRATCH` words.
    """
    field = plane * FIELD_BITS
    edges, places = scratch[:GROUP_ROWS], scratch[GROUP_ROWS:]  # of a group: bits, and the rows with any
    before = plane_row(words, lines, n_pages, plane, U0) & U1  # the page before, as the lowest bit
    runs, rows, n_blocks = U0, lines[plane], np.uint64(words.shape[0])
    for g in range((n_blocks + GROUP - U1) // GROUP):
        group, found = np.uint64(g) * GROUP, U0
        stop = smaller(group + GROUP, n_blocks)
        for b in range(group, stop):
            block = np.uint64(b)
            at = (block - group) << U3
            count = (words[block] >> field) & FIELD
            if count == U0 or count == pages_of_block(n_pages, block):
                value = U1 if count else U0
                edges[at] = value ^ before
                places[found] = at
                found += value ^ before
                before = value
                continue
            mask = find_edges(rows, block << U3, before, edges, at)
            before = rows[(block << U3) + U7] >> U63
            n_rows = popcount(mask)
            for k in range(4):  # written unconditionally, as most blocks have few; and again below
                places[found + np.uint64(k)] = at + lowest_bit(mask)
                mask &= mask - U1
            if mask != U0:
                for k in range(4, 8):
                    places[found + np.uint64(k)] = at + lowest_bit(mask)
                    mask &= mask - U1
            found += n_rows
        if runs + ((stop - group) << BLOCK_SHIFT) >= np.uint64(ends.shape[0]):
            return U0
        for k in range(found):
            bits = edges[places[k]]
            first = (group << BLOCK_SHIFT) + (places[k] << ROW_SHIFT)
            ends[runs] = first + lowest_bit(bits)
            bits &= bits - U1
            ends[runs + U1] = first + lowest_bit(bits)
            runs += U1 + (U1 if bits else U0)
            bits &= bits - U1
            while bits != U0:
                ends[runs] = first + lowest_bit(bits)
                runs += U1
                bits &= bits - U1
    while runs and ends[runs - U1] >= n_pages:  # an artefact: bits beyond the end are clear
        runs -= U1
    ends[runs] = n_pages
    return runs + U1


# ---- bytes --------------------------------------------------------------------------------------


@inlined
def mix(z):
    """Return SplitMix64's output for a generator state."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return z ^ (z >> np.uint64(31))


@kernel
def zero_words(view):
    """Zero a contiguous view (compiled to memset)."""
    for i in range(view.shape[0]):
        view[i] = U0


@kernel
def stream_zeros(view):
    """Zero a view past the caches, whose contents a long range would evict."""
    for line in range(view.shape[0] >> 3):
        zero_line(view, line << 3)


@kernel
def xor_words(view, state):
    """XOR a contiguous view with the key stream from a generator state on.

    The state is incremented: computing it from the index would take a third multiplication.
    """
    for i in range(view.shape[0]):
        view[i] ^= mix(state)
        state += GOLDEN


@kernel
def keystream_words(view, state):
    """Fill a contiguous view with the key stream, which a guest reads as zeros."""
    for i in range(view.shape[0]):
        view[i] = mix(state)
        state += GOLDEN


@kernel
def scramble_words(view, state):
    """Replace every byte of a view with a different, random one.

    XOR with a stream in which zero bytes are replaced by ones. One multiplication is random enough, and two
    would cost more than the memory access. (The test for zero bytes also matches ones, which stay ones.)
    """
    ones, tops = np.uint64(0x0101_0101_0101_0101), np.uint64(0x8080_8080_8080_8080)
    for i in range(view.shape[0]):
        z = (state ^ (state >> U32)) * np.uint64(0xBF58_476D_1CE4_E5B9)
        z ^= z >> np.uint64(29)
        view[i] ^= z | (((z - ones) & ~z & tops) >> U7)
        state += GOLDEN


@inlined
def stream_state(header, word):
    """Return the generator state whose output is for a given word of the file."""
    return header[SEED] + (header[FIRST_WORD] + word + U1) * GOLDEN


@inlined
def prefetch_page(memory, moves_bytes, page, operation):
    """Prefetch the first lines of a page behind a gap, where the hardware prefetcher has to start again."""
    if (operation == XOR or operation == SCRAMBLE) and moves_bytes:
        for line in range(FIRST_LINES):
            prefetch(memory, page * PAGE_WORDS + (line << U3))


# ---- deferred contents --------------------------------------------------------------------------
#
# A file whose contents are deferred has two more planes. A page is *stored* if it has host memory, and
# *keyed* if XOR with the key stream is due. Memory of a page that isn't stored is zero. So the DRAM of every
# page is its memory, XORed with the key stream if it is keyed, and an operation on bytes is one on planes.
#
# A plane of contents has no counts, because nothing asks for them. The mark of a block says whether the plane
# has a line there (without one, all bits are clear), and whether its bits are inverted. Toggling a whole
# block changes one bit.


@inlined
def contents_of(header):
    """Return the marks and the lines of a file with deferred contents."""
    n_blocks = (header[N_PAGES] + BLOCK_MASK) >> BLOCK_SHIFT
    return bytes_at(header[DEFERRED], n_blocks), table_at(header[DEFERRED_LINES], U2, n_blocks << U3)


@inlined
def contents_row(marks, lines, plane, row):
    """Return one row of a plane of contents: one bit per page; bits beyond the end are undefined."""
    mark = np.uint64(marks[row >> U3]) >> (plane * MARK_BITS)
    return (lines[plane, row] if mark & HAS_LINE else U0) ^ (U0 - (mark & INVERTED))


@kernel
def find_contents(address, plane, start, end, value):
    """Return the first page of [start, end) whose bit of a plane of contents is set (ONES) or clear (0)."""
    marks, lines = contents_of(words_at(address, HEADER_SLOTS))
    while start < end:
        block = start >> BLOCK_SHIFT
        stop = smaller((block + U1) << BLOCK_SHIFT, end)
        mark = np.uint64(marks[block]) >> (plane * MARK_BITS)
        if mark & HAS_LINE:
            while start < stop:
                low = start & U63
                high = stop - (start - low)
                match = contents_row(marks, lines, plane, start >> ROW_SHIFT) ^ ~value
                match &= bits_between(low, smaller(high, U64))
                if match != U0:
                    return (start - low) + lowest_bit(match)
                start += U64 - low
        elif (mark ^ value) & U1 == U0:
            return start
        start = stop
    return end


@kernel
def edit_contents(address, plane, start, end, keep, put):
    """Replace the bits of a plane of contents over [start, end) by (bits & keep) ^ put, both ONES or 0."""
    header = words_at(address, HEADER_SLOTS)
    marks, lines = contents_of(header)
    shift, n_pages = plane * MARK_BITS, header[N_PAGES]
    while start < end:
        block = start >> BLOCK_SHIFT
        first, stop = block << BLOCK_SHIFT, smaller((block + U1) << BLOCK_SHIFT, end)
        if start == first and (stop == first + BLOCK_PAGES or stop == n_pages):
            end_block = (end if end == n_pages else end & ~BLOCK_MASK) + BLOCK_MASK >> BLOCK_SHIFT
            kept = np.uint8((keep | ~(MARK_MASK << shift)) & np.uint64(255))
            turned = np.uint8((put & U1) << shift)
            for b in range(block, end_block):
                marks[b] = marks[b] & kept ^ turned
            stop = smaller(end_block << BLOCK_SHIFT, end)
        else:
            if not np.uint64(marks[block]) >> shift & HAS_LINE:
                marks[block] |= np.uint8(HAS_LINE << shift)
                for r in range(block << U3, (block + U1) << U3):
                    lines[plane, r] = U0
            inverted = U0 - (np.uint64(marks[block]) >> shift & INVERTED)
            for r in range(start >> ROW_SHIFT, ((stop - U1) >> ROW_SHIFT) + U1):
                at = np.uint64(r) << ROW_SHIFT
                low = start - at if start > at else U0
                mask = bits_between(low, smaller(stop - at, U64))
                bits = lines[plane, r]
                lines[plane, r] = bits & (keep | ~mask) ^ (mask & (put ^ (inverted & ~keep)))
        start = stop


@inlined
def is_viewed(header):
    """Return whether somebody has a raw view of the file's memory, which must stay up to date."""
    return header[VIEWED] != U0


@kernel
def store(address, start, end):
    """Provide host memory for pages [start, end); False: the host has none. Contents stay as they are."""
    header = words_at(address, HEADER_SLOTS)
    while start < end:
        start = find_contents(address, STORED, start, end, U0)
        if start < end:
            stop = find_contents(address, STORED, start, end, ONES)
            if header[PAGES_STORED] + (stop - start) > header[MOST_STORED]:
                return False
            if not provide(address, start, stop, header[STORE]):
                return False
            edit_contents(address, STORED, start, stop, U0, ONES)
            header[PAGES_STORED] += stop - start
            start = stop
    return True


@kernel
def store_operated(address, operations, start, end):
    """Provide host memory for the pages of [start, end) that an operation writes; False: the host lacks it.

    SCRAMBLE writes them. If there is a raw view, so does everything that leaves a page keyed.
    """
    file = file_at(address)
    marks, lines = contents_of(file.header)
    views = ONES if is_viewed(file.header) else U0
    if views == U0 and not has_operation(operations, SCRAMBLE):
        return True
    while start < end:
        row, low = start >> ROW_SHIFT, start & U63
        stop = smaller(start - low + U64, end)
        rank = uniform_rank(file.words[start >> BLOCK_SHIFT], pages_of_block(file.header[N_PAGES], row >> U3))
        if rank < U4:
            operation = (operations >> (rank * OPERATION_BITS)) & OPERATION
            if operation != SCRAMBLE and (views == U0 or (operation != XOR and operation != KEYSTREAM)):
                start = ((row >> U3) + U1) << BLOCK_SHIFT
                continue
        allocated = plane_row(file.words, file.lines, file.header[N_PAGES], ALLOCATED, row)
        assigned = plane_row(file.words, file.lines, file.header[N_PAGES], ASSIGNED, row)
        accepted = plane_row(file.words, file.lines, file.header[N_PAGES], ACCEPTED, row)
        bits = operation_bits(operations, SCRAMBLE, allocated, assigned, accepted)
        bits |= operation_bits(operations, XOR, allocated, assigned, accepted) & views
        bits |= operation_bits(operations, KEYSTREAM, allocated, assigned, accepted) & views
        bits &= bits_between(low, low + (stop - start)) & ~contents_row(marks, lines, STORED, row)
        while bits != U0:
            first = lowest_bit(bits)
            length = lowest_bit(~(bits >> first))
            page = (row << ROW_SHIFT) + first
            if not store(address, page, page + length):
                return False
            bits = bits & (bits + (U1 << first))  # without that run
        start = stop
    return True


@kernel
def drop_stored(address, start, end):
    """Release the host memory of pages [start, end), which are zero or keyed zeros from now on.

    A raw view needs that memory again, so it is zeroed in place if there is one.
    """
    file = file_at(address)
    while start < end:
        start = find_contents(address, STORED, start, end, ONES)
        if start < end:
            stop = find_contents(address, STORED, start, end, U0)
            if is_viewed(file.header):
                zero_words(file.memory[start * PAGE_WORDS : stop * PAGE_WORDS])
            else:
                release(address, start, stop)
                edit_contents(address, STORED, start, stop, U0, U0)
                file.header[PAGES_STORED] -= stop - start
            start = stop


@kernel
def make_zero(address, start, end):
    """Make pages [start, end) of a file with deferred contents zero."""
    drop_stored(address, start, end)
    edit_contents(address, KEYED, start, end, U0, U0)


@kernel
def materialise(address, start, end):
    """Do what is due on the bytes of pages [start, end), which are stored where they are keyed."""
    file = file_at(address)
    while start < end:
        start = find_contents(address, KEYED, start, end, ONES)
        if start < end:
            stop = find_contents(address, KEYED, start, end, U0)
            view = file.memory[start * PAGE_WORDS : stop * PAGE_WORDS]
            xor_words(view, stream_state(file.header, start * PAGE_WORDS))
            edit_contents(address, KEYED, start, stop, U0, U0)
            start = stop


@kernel
def defer(address, operation, start, end):
    """Apply one operation to the deferred contents of pages [start, end)."""
    file = file_at(address)
    if operation == XOR:
        edit_contents(address, KEYED, start, end, ONES, ONES)
    elif operation == SCRAMBLE:
        view = file.memory[start * PAGE_WORDS : end * PAGE_WORDS]
        state = stream_state(file.header, start * PAGE_WORDS)
        scramble_words(view, state + mix(file.header[SCRAMBLES] * GOLDEN))
    else:
        drop_stored(address, start, end)
        edit_contents(address, KEYED, start, end, U0, ONES if operation == KEYSTREAM else U0)
    if is_viewed(file.header):
        materialise(address, start, end)


@inlined
def operate(header, memory, operation, start, end, streams, results, i):
    """Apply one operation to the bytes of pages [start, end), and count it; streams: past the caches."""
    size = (end - start) << PAGE_SHIFT
    if operation == ZERO:
        results[BYTES_ZEROED, i] += size
    elif operation == XOR:
        results[BYTES_XORED, i] += size
    elif operation == SCRAMBLE:
        results[BYTES_SCRAMBLED, i] += size
    if memory.shape[0] == 0:
        return
    if header[DEFERRED]:
        defer(header[SELF], operation, start, end)
        return
    view = memory[start * PAGE_WORDS : end * PAGE_WORDS]
    state = stream_state(header, start * PAGE_WORDS)
    if operation == ZERO:
        if streams:
            stream_zeros(view)
        else:
            zero_words(view)
    elif operation == XOR:
        xor_words(view, state)
    elif operation == SCRAMBLE:
        scramble_words(view, state + mix(header[SCRAMBLES] * GOLDEN))
    elif operation == KEYSTREAM:
        keystream_words(view, state)


@inlined
def operation_bits(operations, operation, allocated, assigned, accepted):
    """Return the bits of a row whose pages have a given operation, by their rank."""
    bits = U0
    if operations & OPERATION == operation:
        bits |= ~allocated
    if (operations >> OPERATION_BITS) & OPERATION == operation:
        bits |= allocated & ~assigned
    if (operations >> (U2 * OPERATION_BITS)) & OPERATION == operation:
        bits |= assigned & ~accepted
    if (operations >> (U3 * OPERATION_BITS)) & OPERATION == operation:
        bits |= accepted
    return bits


@inlined
def has_operation(operations, operation):
    """Return whether pages of some rank have a given operation."""
    for rank in range(4):
        if (operations >> (np.uint64(rank) * OPERATION_BITS)) & OPERATION == operation:
            return True
    return False


@inlined
def end_of_same(words, block, end):
    """Return the end of the blocks from one on whose words are the same; compares 32 at a time."""
    word, block = words[block], block + U1
    while block + U32 <= end:
        differ = U0
        for k in range(32):
            differ |= words[block + np.uint64(k)] ^ word
        if differ:
            break
        block += U32
    while block < end and words[block] == word:
        block += U1
    return block


@inlined
def uniform_rank(word, pages):
    """Return the rank of all pages of a block, from its word; 4 if they differ."""
    allocated = (word >> (ALLOCATED * FIELD_BITS)) & FIELD
    assigned = (word >> (ASSIGNED * FIELD_BITS)) & FIELD
    accepted = (word >> (ACCEPTED * FIELD_BITS)) & FIELD
    if allocated == U0:
        return U0
    if allocated == pages:
        if assigned == U0:
            return U1
        if assigned == pages:
            if accepted == U0:
                return U2
            if accepted == pages:
                return U3
    return U4


@kernel
def transform(address, operations, start, end, results, i):
    """Apply to the bytes of each page of [start, end) the operation of its rank, in maximal runs.

    Writes only those bytes and their counters in results, so parts of a range can be transformed in parallel.
    """
    file = file_at(address)
    header, words, lines, memory = file.header, file.words, file.lines, file.memory
    n_pages = header[N_PAGES]
    streams = header[MEMORY_ALIGNED] != U0 and end - start >= STREAM_PAGES
    moves_bytes = memory.shape[0] != 0 and header[DEFERRED] == U0
    run_operation, run_start = NO_OPERATION, start
    # The run before: it is done once the next one is known, whose first page is prefetched.
    last_operation, last_start, last_end = NO_OPERATION, start, start
    row, allocated, assigned, accepted = ONES, U0, U0, U0
    while True:
        block = start >> BLOCK_SHIFT
        operation, stop = ALL_DONE, end
        if start < end:
            stop = (block + U1) << BLOCK_SHIFT
            rank = uniform_rank(words[block], pages_of_block(n_pages, block))
            if rank < U4:
                operation = (operations >> (rank * OPERATION_BITS)) & OPERATION
                stop = end_of_same(words, block, (end + BLOCK_MASK) >> BLOCK_SHIFT) << BLOCK_SHIFT
            else:
                if start >> ROW_SHIFT != row:
                    row = start >> ROW_SHIFT
                    allocated = plane_row(words, lines, n_pages, ALLOCATED, row)
                    assigned = plane_row(words, lines, n_pages, ASSIGNED, row)
                    accepted = plane_row(words, lines, n_pages, ACCEPTED, row)
                shift = start & U63
                operation = operation_of(operations, allocated, assigned, accepted, shift)
                same = operation_bits(operations, operation, allocated, assigned, accepted) >> shift
                stop = start + smaller(lowest_bit(~same), U64 - shift)
            stop = smaller(stop, end)
        if operation != run_operation:
            if run_operation != NO_OPERATION or operation == ALL_DONE:
                if last_operation != NO_OPERATION:
                    prefetch_page(memory, moves_bytes, run_start, run_operation)
                    operate(header, memory, last_operation, last_start, last_end, streams, results, i)
                last_operation, last_start, last_end = run_operation, run_start, start
            if operation == ALL_DONE:
                if last_operation != NO_OPERATION:
                    operate(header, memory, last_operation, last_start, last_end, streams, results, i)
                return
            run_operation, run_start = operation, start
        start = stop


@inlined
def operation_of(operations, allocated, assigned, accepted, page):
    """Return the operation of one page of a row."""
    rank = ((allocated >> page) & U1) + ((assigned >> page) & U1) + ((accepted >> page) & U1)
    return (operations >> (rank * OPERATION_BITS)) & OPERATION


@callback
def transform_part(address):
    """Run the task at an address, in a thread of its own: `transform` on one part of a range."""
    task = words_at(address, TASK_WORDS)
    results = table_at(address + TASK_RESULT * WORD_BYTES, ROWS, U1)
    transform(task[TASK_FILE], task[TASK_OPERATIONS], task[TASK_START], task[TASK_END], results, U0)
    return U0


@kernel
def transform_in_parts(address, operations, start, end, results, i):
    """Run `transform` on several threads, on parts that begin at block boundaries.

    A part whose thread can't be started is done by the caller's.
    """
    file = file_at(address)
    n = smaller(file.header[THREADS], (end - start) // LEAST_PART)
    low = start
    for k in range(n):
        cut = start + (end - start) * np.uint64(k + 1) // n
        high = cut & ~BLOCK_MASK if np.uint64(k + 1) < n else end
        at = file.header[TASKS] + np.uint64(k) * TASK_WORDS * WORD_BYTES
        task = words_at(at, TASK_WORDS)
        zero_words(task)
        task[TASK_FILE], task[TASK_OPERATIONS] = file.header[SELF], operations
        task[TASK_START], task[TASK_END] = low, high
        if np.uint64(k + 1) < n and start_thread(at, U0, file.header[PART], at) == 0:
            task[TASK_STARTED] = U1
        low = high
    for k in range(n):
        at = file.header[TASKS] + np.uint64(k) * TASK_WORDS * WORD_BYTES
        task = words_at(at, TASK_WORDS)
        if not task[TASK_STARTED]:
            transform(file.header[SELF], operations, task[TASK_START], task[TASK_END], results, i)
    for k in range(n):
        at = file.header[TASKS] + np.uint64(k) * TASK_WORDS * WORD_BYTES
        task = words_at(at, TASK_WORDS)
        if task[TASK_STARTED]:
            join_thread(task[TASK_THREAD], U0)
            for counter in range(BYTES_ZEROED, BYTES_SCRAMBLED + U1):
                results[counter, i] += task[TASK_RESULT + counter]


@inlined
def transform_all(file, operations, start, end, results, i):
    """Run `transform`, on several threads if the range is long, and update the file's totals."""
    zeroed, xored, scrambled = results[BYTES_ZEROED, i], results[BYTES_XORED, i], results[BYTES_SCRAMBLED, i]
    if file.header[THREADS] > U1 and end - start >= U2 * LEAST_PART and file.header[DEFERRED] == U0:
        transform_in_parts(file.header[SELF], operations, start, end, results, i)
    else:
        transform(file.header[SELF], operations, start, end, results, i)
    file.header[TOTALS + BYTES_ZEROED - COUNTERS_AT] += results[BYTES_ZEROED, i] - zeroed
    file.header[TOTALS + BYTES_XORED - COUNTERS_AT] += results[BYTES_XORED, i] - xored
    file.header[TOTALS + BYTES_SCRAMBLED - COUNTERS_AT] += results[BYTES_SCRAMBLED, i] - scrambled


@inlined
def copy_under_key(target, source, length, key):
    """Copy up to eight bytes, XORed with those of a word of the key stream."""
    to, of = bytes_at(target, length), bytes_at(source, length)
    for k in range(length):
        to[k] = of[k] ^ np.uint8(key & np.uint64(255))
        key >>= U8


@kernel
def copy_keyed(header, target, source, offset, length):
    """Copy bytes, XORed with the key stream; offset: where they are in the file."""
    word, lead = offset >> U3, offset & U7
    state = stream_state(header, word)
    if lead:
        head = smaller(U8 - lead, length)
        copy_under_key(target, source, head, mix(state) >> (U8 * lead))
        target, source, length, state = target + head, source + head, length - head, state + GOLDEN
    n = length >> U3
    to, of = loose_words_at(target, n), loose_words_at(source, n)
    for k in range(n):
        to[k] = of[k] ^ mix(state)
        state += GOLDEN
    copy_under_key(target + (n << U3), source + (n << U3), length & U7, mix(state))


@kernel
def zero_bytes(target, length):
    """Zero bytes at an address."""
    bytes_at(target, length)[:] = np.uint8(0)


@kernel
def copy_data(address, step, offset, size, data):
    """Copy between the file and the caller's data, through the key where a guest accesses private pages."""
    file = file_at(address)
    is_read = step == HOST_READ or step == GUEST_READ
    is_keyed = file.rules[GUEST_HAS_KEY] != U0 and (step == GUEST_READ or step == GUEST_WRITE)
    end = offset + size
    while offset < end:
        page, last = offset >> PAGE_SHIFT, ((end - U1) >> PAGE_SHIFT) + U1
        has_key, is_stored = False, True
        if is_keyed:
            has_key = find_page(address, page, page + U1, PRIVATE_FIELD, U0) == page
            wanted, unwanted = (U0, PRIVATE_FIELD) if has_key else (PRIVATE_FIELD, U0)
            last = find_page(address, page, last, wanted, unwanted)
        if file.header[DEFERRED]:
            keyed = ONES if find_contents(address, KEYED, page, page + U1, ONES) == page else U0
            is_stored = find_contents(address, STORED, page, page + U1, ONES) == page
            last = find_contents(address, KEYED, page, last, ~keyed)
            last = find_contents(address, STORED, page, last, U0 if is_stored else ONES)
            has_key = has_key != (keyed != U0)
        stop = smaller(last << PAGE_SHIFT, end)
        memory = file.header[MEMORY] + offset
        target, source = (data, memory) if is_read else (memory, data)
        if not is_stored:  # only a read: what is written has been stored
            zero_bytes(target, stop - offset)
            source = target
        if has_key:
            copy_keyed(file.header, target, source, offset, stop - offset)
        else:
            move_bytes(target, source, stop - offset)  # from an unstored page: onto itself
        data += stop - offset
        offset = stop


# ---- system calls -------------------------------------------------------------------------------
#
# Memory is committed when pages are allocated and released when they are freed. In the host view, private
# pages are inaccessible (``host_view.py``).


@inlined
def takes_host_step(header):
    """Return whether the injected budget of host steps allows another one, and take it."""
    if header[HOST_STEPS_LEFT] == U0:
        return False
    if header[HOST_STEPS_LEFT] != NEVER:
        header[HOST_STEPS_LEFT] -= U1
    return True


@kernel
def commit(address, start, end):
    """Allocate host memory for the unallocated pages of [start, end); False: the host has none.

    Otherwise a write to a hole in the backing file that can't be filled would raise SIGBUS.
    """
    file = file_at(address)
    header = file.header
    if header[COMMIT] == U0 or start >= end:
        return True
    first = find_page(file.header[SELF], start, end, U0, ALLOCATED_FIELD)
    if first >= end:
        return True
    return provide(file.header[SELF], first, end, header[COMMIT])


@kernel
def provide(address, start, end, advice):
    """Fault in the host memory of pages [start, end), by an advice unless that is 0; False: it is refused."""
    file = file_at(address)
    if not takes_host_step(file.header):
        return False
    at, size = file.header[MEMORY] + (start << PAGE_SHIFT), (end - start) << PAGE_SHIFT
    while advice and advise(at, size, np.int32(advice)) != 0:
        error = last_error()
        if error == EINVAL:  # before Linux 5.14: touch one word per page instead
            for page in range(start, end):
                file.memory[np.uint64(page) * PAGE_WORDS] |= U0
            return True
        if error != EINTR and error != EAGAIN:
            return False
    return True


@kernel
def release(address, start, end):
    """Release the host memory of pages [start, end), which then read as zeros."""
    file = file_at(address)
    header = file.header
    if file.memory.shape[0] == 0:
        return
    address, size = header[MEMORY] + (start << PAGE_SHIFT), (end - start) << PAGE_SHIFT
    is_released = header[RELEASE] == U0
    while not is_released:
        if advise(address, size, np.int32(header[RELEASE])) == 0:
            return
        is_released = last_error() != EINTR
    zero_words(file.memory[start * PAGE_WORDS : end * PAGE_WORDS])  # it can't be released: zero it in place


@inlined
def address_in_view(file, page):
    """Return the address of a page in the host view."""
    return file.header[HOST_VIEW] + (page << PAGE_SHIFT)


@kernel
def changes_view(address, start, end, to_private):
    """Return whether a conversion changes which pages are accessible in the host view."""
    file = file_at(address)
    if file.header[HOST_VIEW] == U0:
        return False
    wanted, unwanted = (U0, PRIVATE_FIELD) if to_private else (PRIVATE_FIELD, U0)
    return find_page(file.header[SELF], start, end, wanted, unwanted) < end


@kernel
def split_view(address, start, end):
    """Split pages [start, end) of the host view off into mappings of their own; False: there are too many.

    The advice has no other effect. Only this step can exceed the host's limit of mappings (vm.max_map_count);
    `protect_view` then needs no further mapping.
    """
    file = file_at(address)
    size = (end - start) << PAGE_SHIFT
    if takes_host_step(file.header) and advise(address_in_view(file, start), size, DONT_DUMP) == 0:
        return True
    join_view(file.header[SELF], start, end)
    return False


@kernel
def protect_view(address, start, end, protection):
    """Set the protection of pages [start, end) of the host view, which `split_view` split off."""
    file = file_at(address)
    protect(address_in_view(file, start), (end - start) << PAGE_SHIFT, protection)


@kernel
def join_view(address, start, end):
    """Undo `split_view`. It only merges mappings; one that the kernel leaves separate does no harm."""
    file = file_at(address)
    advise(address_in_view(file, start), (end - start) << PAGE_SHIFT, DO_DUMP)


@kernel
def is_host_ready(address, start, end, to_private, allocates, operations):
    """Do what the host can refuse of a conversion; False: it refused, and nothing has changed."""
    file = file_at(address)
    splits = changes_view(file.header[SELF], start, end, to_private)
    if splits and not split_view(file.header[SELF], start, end):
        return False
    is_ready = not allocates or commit(file.header[SELF], start, end)
    if file.header[DEFERRED]:
        is_ready = store_operated(file.header[SELF], operations, start, end)
    if not is_ready:
        if splits:
            join_view(file.header[SELF], start, end)
        return False
    return True


@kernel
def notice_writes(address, start, end, noticed):
    """Mark as allocated the pages of [start, end) that were written through the host view.

    Such a write isn't reported. But unallocated pages are zero, so one with host memory and other contents
    was written. Checking it allocates nothing.
    """
    file = file_at(address)
    if file.header[HOST_VIEW] == U0:
        return
    while start < end:
        start = find_page(file.header[SELF], start, end, U0, PRIVATE_FIELD | ALLOCATED_FIELD)
        if start < end:
            stop = find_page(file.header[SELF], start, end, PRIVATE_FIELD, U0)
            stop = find_page(file.header[SELF], start, stop, ALLOCATED_FIELD, U0)
            if file.header[DESCRIPTOR] != NEVER:
                notice_by_seeking(file.header[SELF], start, stop, noticed)
            else:
                notice_resident(file.header[SELF], start, stop, noticed)
            start = stop


@kernel
def notice_by_seeking(address, start, end, noticed):
    """Detect writes to unallocated pages of a file that supports SEEK_DATA."""
    file = file_at(address)
    descriptor = np.int32(file.header[DESCRIPTOR])
    while start < end:
        data = seek(descriptor, np.int64(start << PAGE_SHIFT), SEEK_DATA)
        if data < 0 or np.uint64(data) >> PAGE_SHIFT >= end:  # ENXIO: no further data
            return
        hole = seek(descriptor, data, SEEK_HOLE)
        stop = end if hole < 0 else smaller((np.uint64(hole) + PAGE_MASK) >> PAGE_SHIFT, end)
        notice_written(file.header[SELF], np.uint64(data) >> PAGE_SHIFT, stop, noticed)
        start = stop


@kernel
def notice_resident(address, start, end, noticed):
    """Detect writes to unallocated pages of a file whose written pages stay resident."""
    file = file_at(address)
    while start < end:
        stop = smaller(start + RESIDENT_PAGES, end)
        address, size = file.header[MEMORY] + (start << PAGE_SHIFT), (stop - start) << PAGE_SHIFT
        if list_resident(address, size, file.header[RESIDENT]) == 0:
            pages = bytes_at(file.header[RESIDENT], stop - start)
            for k in range(stop - start):
                if pages[k] & np.uint8(1):
                    notice_written(
                        file.header[SELF], start + np.uint64(k), start + np.uint64(k) + U1, noticed
                    )
        start = stop


@kernel
def notice_written(address, start, end, noticed):
    """Mark as allocated those pages of [start, end) that aren't all zero."""
    file = file_at(address)
    for p in range(start, end):
        page = np.uint64(p)
        union = U0
        for word in range(page * PAGE_WORDS, (page + U1) * PAGE_WORDS):
            union |= file.memory[word]
        if union:
            edit(file, page, page + U1, ALLOCATED_FIELD, U0, noticed, U0)


# ---- conversion ---------------------------------------------------------------------------------


@inlined
def refusal_of_arguments(rules, file_size, offset, size, attributes, flags, error_offset, reserved):
    """Return the first check that the arguments alone fail, in the kernel's order; 0: none."""
    if flags & ~rules[KNOWN_FLAGS]:
        return FLAGS_UNKNOWN
    if flags & (flags - U1):
        return FLAGS_MANY
    if rules[ERROR_OFFSET_CHECKED] and error_offset:
        return ERROR_OFFSET_SET
    if reserved:
        return RESERVED_SET
    if not rules[HAS_PRIVATE_MEMORY]:
        return NO_PRIVATE_MEMORY
    if attributes & ~rules[KNOWN_ATTRIBUTES]:
        return ATTRIBUTE_UNKNOWN
    if size == U0 or offset + size < offset:
        return RANGE_EMPTY
    if (offset | size) & PAGE_MASK:
        return RANGE_UNALIGNED
    if offset >= file_size or offset + size > file_size:
        return RANGE_BEYOND_END
    return U0


@kernel
def takes_allocations(address, start, end, to_private, allocates):
    """Return whether the injected allocation budget covers this conversion, and take what it needs."""
    file = file_at(address)
    wanted, unwanted = (U0, PRIVATE_FIELD) if to_private else (PRIVATE_FIELD, U0)
    needed = U1 if find_page(file.header[SELF], start, end, wanted, unwanted) < end else U0
    if allocates:
        needed += count_pages(file.header[SELF], start, end, U0, ALLOCATED_FIELD)
    if file.header[ORDER] and splits_folio(address, start, end, to_private, allocates):
        needed += U1
    if needed > file.header[ALLOCATIONS_LEFT]:
        return False
    file.header[ALLOCATIONS_LEFT] -= needed
    return True


@kernel
def splits_folio(address, start, end, to_private, allocates):
    """Return whether a conversion of pages of one huge page splits its folio, which needs struct pages."""
    file = file_at(address)
    order = file.header[ORDER]
    state = words_at(file.header[FOLIOS], folio_count(file))[start >> order] & FOLIO_STATE
    if not to_private:
        return state == WHOLE
    return allocates and state == ABSENT and not is_rest_private(address, start, end)


@kernel
def is_rest_private(address, start, end):
    """Return whether the pages of a huge page before and after [start, end) are private."""
    order = words_at(address, HEADER_SLOTS)[ORDER]
    first = start >> order << order
    last = first + (U1 << order)
    return (start == first or find_page(address, first, start, U0, PRIVATE_FIELD) == start) and (
        end == last or find_page(address, end, last, U0, PRIVATE_FIELD) == last
    )


@inlined
def first_pinned(file, start, end):
    """Return the first pinned page of [start, end), or end; mostly reads only the words."""
    blocks = file.words[start >> BLOCK_SHIFT : ((end - U1) >> BLOCK_SHIFT) + U1]
    union = U0
    for b in range(blocks.shape[0]):
        union |= blocks[b]
    if union & PINNED_FIELD == U0:
        return end
    return find_page(file.header[SELF], start, end, PINNED_FIELD, U0)


@inlined
def cell_of(attributes, flags):
    """Return where the rules of a direction and flag begin."""
    slot = lowest_bit(flags) + U1 if flags else U0
    return CELLS + (slot + (FLAG_SLOTS if attributes & PRIVATE_ATTRIBUTE else U0)) * CELL_WORDS


@inlined
def check_conversion(file, offset, size, attributes, flags, error_offset, reserved, results, i):
    """Return whether all checks of a conversion pass, and the host provided what it needs.

    Nothing after this may fail.
    """
    rules = file.rules
    if error_offset:
        results[ERROR_OFFSET, i] = error_offset
    file_size = file.header[N_PAGES] << PAGE_SHIFT
    reason = refusal_of_arguments(rules, file_size, offset, size, attributes, flags, error_offset, reserved)
    if reason:
        results[REASON, i] = reason
        return False
    cell = cell_of(attributes, flags)
    start, end = offset >> PAGE_SHIFT, (offset + size) >> PAGE_SHIFT
    to_private = attributes & PRIVATE_ATTRIBUTE != U0
    allocates = rules[cell + SET] & ALLOCATED_FIELD != U0
    page = start
    if rules[cell + REFUSAL]:
        reason = rules[cell + REFUSAL]
    elif rules[cell + UNLESS] and find_page(file.header[SELF], start, end, rules[cell + UNLESS], U0) < end:
        reason = MODE_UNSUPPORTED
    elif file.header[ALLOCATIONS_LEFT] != NEVER and not takes_allocations(
        file.header[SELF], start, end, to_private, allocates
    ):
        reason = NO_MEMORY
    elif file.header[HOST_WORK] and not is_host_ready(
        file.header[SELF], start, end, to_private, allocates, rules[cell + OPERATIONS]
    ):
        reason = NO_MEMORY
    elif to_private:
        page = first_pinned(file, start, end)
        if page < end:
            reason = PAGE_PINNED
            if file.header[HOST_VIEW]:
                join_view(file.header[SELF], start, end)
    if reason:
        results[REASON, i] = reason
        results[ERROR_OFFSET, i] = page << PAGE_SHIFT
        return False
    return True


@inlined
def convert(file, offset, size, attributes, flags, error_offset, reserved, results, i):
    """Do one KVM_SET_MEMORY_ATTRIBUTES2 on one file: all or nothing."""
    if check_conversion(file, offset, size, attributes, flags, error_offset, reserved, results, i):
        commit_conversion(file, offset, size, attributes, flags, results, i)


@inlined
def commit_conversion(file, offset, size, attributes, flags, results, i):
    """Do a conversion whose checks passed."""
    cell = cell_of(attributes, flags)
    start, end = offset >> PAGE_SHIFT, (offset + size) >> PAGE_SHIFT
    to_private = attributes & PRIVATE_ATTRIBUTE != U0
    has_view = file.header[HOST_VIEW] != U0 and changes_view(file.header[SELF], start, end, to_private)
    # ---- point of no return: nothing below may fail ----
    if has_view and to_private:
        protect_view(file.header[SELF], start, end, NO_ACCESS)
    if file.rules[cell + OPERATIONS]:
        transform_all(file, file.rules[cell + OPERATIONS], start, end, results, i)
    finish_conversion(file, cell, start, end, results, i)
    if has_view:
        if not to_private:
            protect_view(file.header[SELF], start, end, READ_AND_WRITE)
        join_view(file.header[SELF], start, end)


@inlined
def convert_short(file, n_whole, offset, size, attributes, flags, results, i):
    """Take the fast, nearly branch-free path of `convert` for short requests; return whether it applied.

    It applies to one or two rows of whole blocks whose private plane is mixed and the only one that changes,
    where no byte is transformed; also if nothing changes, or if a pinned page refuses. Otherwise nothing was
    done.
    """
    header, words, lines, rules = file.header, file.words, file.lines, file.rules
    cell = cell_of(attributes, flags)
    wrong = (offset | size) & PAGE_MASK | attributes & ~PRIVATE_ATTRIBUTE | flags & (flags - U1)
    start, end = offset >> PAGE_SHIFT, (offset + size) >> PAGE_SHIFT
    row, last = start >> ROW_SHIFT, (end - U1) >> ROW_SHIFT
    if wrong or not rules[cell + PLAIN] or start >= end or end > n_whole or row + U1 < last:
        return False
    set_ = rules[cell + SET]
    value = U0 - (set_ & U1)  # all ones to private; without a branch, as the direction is unpredictable
    others = (set_ | rules[cell + CLEAR]) & ~PRIVATE_FIELD
    full = BLOCK_PAGES * FIELD_ONES & set_
    word, last_word = words[row >> U3], words[last >> U3]
    tail = ONES >> (U63 - ((end - U1) & U63))
    head = ONES << (start & U63)
    head, tail = (head & tail, U0) if row == last else (head, tail)
    if (word | last_word) & PINNED_FIELD & value:
        pinned = plane_row(words, lines, n_whole, PINNED, row) & head
        pinned_last = plane_row(words, lines, n_whole, PINNED, last) & tail
        if pinned | pinned_last:
            page = (row << ROW_SHIFT) + lowest_bit(pinned)
            page = page if pinned else (last << ROW_SHIFT) + lowest_bit(pinned_last)
            results[REASON, i] = PAGE_PINNED
            results[ERROR_OFFSET, i] = page << PAGE_SHIFT
            return True
    differ = (word ^ full) | (last_word ^ full)
    is_mixed = word & BLOCK_MASK != U0 and last_word & BLOCK_MASK != U0
    if not is_mixed or differ & others:
        return differ & (others | PRIVATE_FIELD) == U0  # already as requested
    changed = write_row(lines, PRIVATE, row, head, value)
    words[row >> U3] += (changed ^ ~value) - ~value
    changed_last = write_row(lines, PRIVATE, last, tail, value)
    words[last >> U3] += (changed_last ^ ~value) - ~value
    results[PAGES_CHANGED, i] = changed + changed_last
    header[TOTALS + PAGES_CHANGED - COUNTERS_AT] += changed + changed_last
    if words[row >> U3] & BLOCK_MASK == U0 or words[last >> U3] & BLOCK_MASK == U0:
        merged = U1 if words[row >> U3] & BLOCK_MASK == U0 else U0
        merged += U1 if row >> U3 != last >> U3 and words[last >> U3] & BLOCK_MASK == U0 else U0
        tally(header, results, BLOCKS_MERGED, i, merged)
    return True


@inlined
def are_mixed(word, fields):
    """Return whether all planes of a mask of fields are mixed in a whole block."""
    low, high = fields & ~(FIELD_ONES << U9), fields & (FIELD_ONES << U9)
    return ((word & low) + low) & high == high  # a count from 1 to 511 carries into the field's top bit


@inlined
def convert_keyed(file, n_whole, offset, size, attributes, flags, results, i):
    """Take the path of `convert_short` where a conversion toggles the key stream; return whether it applied.

    It applies if no byte is moved (n_whole is 0 otherwise), to one or two rows of whole blocks in which all
    planes that change are mixed, and allocated pages can be all. Otherwise nothing was done.
    """
    header, words, lines, rules = file.header, file.words, file.lines, file.rules
    cell = cell_of(attributes, flags)
    operations, set_, clear = rules[cell + OPERATIONS], rules[cell + SET], rules[cell + CLEAR]
    wrong = (offset | size) & PAGE_MASK | attributes & ~PRIVATE_ATTRIBUTE | flags & (flags - U1)
    wrong |= rules[cell + REFUSAL] | rules[cell + UNLESS] | (set_ if clear else U0)
    start, end = offset >> PAGE_SHIFT, (offset + size) >> PAGE_SHIFT
    row, last = start >> ROW_SHIFT, (end - U1) >> ROW_SHIFT
    if wrong or not operations or start >= end or end > n_whole or row + U1 < last:
        return False
    value, edited = U0 - (set_ & U1), set_ | clear
    block, last_block = row >> U3, last >> U3
    word, last_word = words[block], words[last_block]
    mixed = edited & ~ALLOCATED_FIELD
    has_allocated = word & ALLOCATED_FIELD != U0 and last_word & ALLOCATED_FIELD != U0
    if (word | last_word) & PINNED_FIELD & value or not (
        has_allocated and are_mixed(word, mixed) and are_mixed(last_word, mixed)
    ):
        return False
    tail = ONES >> (U63 - ((end - U1) & U63))
    head = ONES << (start & U63)
    head, tail = (head & tail, U0) if row == last else (head, tail)
    allocated = lines[ALLOCATED, row] | (U0 - (word >> ALLOCATED_WHOLE & U1))
    allocated_last = lines[ALLOCATED, last] | (U0 - (last_word >> ALLOCATED_WHOLE & U1))
    xored, others = keyed_bits(operations, allocated, lines[ASSIGNED, row], lines[ACCEPTED, row], head)
    xored_last, others_last = keyed_bits(
        operations, allocated_last, lines[ASSIGNED, last], lines[ACCEPTED, last], tail
    )
    if others | others_last:
        return False
    if header[DEFERRED]:
        marks, contents = contents_of(header)
        if not np.uint64(marks[block]) & np.uint64(marks[last_block]) & KEYED_LINE:
            return False
        contents[KEYED, row] ^= xored
        contents[KEYED, last] ^= xored_last
    changed, assigned, fresh = edit_keyed(file, row, head, edited, value, allocated)
    changed_last, assigned_last, fresh_last = edit_keyed(file, last, tail, edited, value, allocated_last)
    header[SCRAMBLES] += U1
    size_xored = (popcount(xored) + popcount(xored_last)) << PAGE_SHIFT
    merged = U1 if words[block] & BLOCK_MASK == U0 else U0
    merged += U1 if block != last_block and words[last_block] & BLOCK_MASK == U0 else U0
    tally(header, results, PAGES_CHANGED, i, changed + changed_last)
    tally(header, results, BYTES_XORED, i, size_xored)
    tally(header, results, PAGES_ALLOCATED, i, fresh + fresh_last)
    tally_assigned(header, results, i, value, assigned + assigned_last)
    tally(header, results, BLOCKS_MERGED, i, merged)
    return True


@inlined
def keyed_bits(operations, allocated, assigned, accepted, mask):
    """Return the pages of a row that are XORed, and those with any other operation on bytes."""
    xored = operation_bits(operations, XOR, allocated, assigned, accepted) & mask
    return xored, mask & ~xored & ~operation_bits(operations, NO_OPERATION, allocated, assigned, accepted)


@inlined
def edit_keyed(file, row, mask, edited, value, allocated):
    """Edit the planes of one row that a conversion sets or clears; return three numbers of changed pages.

    Those that changed their attribute, that were assigned or removed, and that were allocated.
    """
    lines, block = file.lines, row >> U3
    sign = ~value
    private = write_row(lines, PRIVATE, row, mask, value)
    assigned = write_row(lines, ASSIGNED, row, mask & (U0 - (edited >> (ASSIGNED * FIELD_BITS) & U1)), value)
    accepted = write_row(lines, ACCEPTED, row, mask & (U0 - (edited >> (ACCEPTED * FIELD_BITS) & U1)), value)
    new = mask & ~allocated & value & (U0 - (edited >> FIELD_BITS & U1))
    fresh = popcount(new)
    if fresh:
        lines[ALLOCATED, row] |= new
    file.words[block] += (
        ((private ^ sign) - sign)
        + (fresh << FIELD_BITS)
        + (((assigned ^ sign) - sign) << (ASSIGNED * FIELD_BITS))
        + (((accepted ^ sign) - sign) << (ACCEPTED * FIELD_BITS))
    )
    return private, assigned, fresh


@inlined
def keyed_pages(file):
    """Return the pages of whole blocks, where `convert_keyed` applies; 0 if conversions move bytes."""
    is_deferred = file.header[DEFERRED] != U0 and not is_viewed(file.header)
    return whole_pages(file) if is_deferred or file.memory.shape[0] == 0 else U0


@inlined
def whole_pages(file):
    """Return the pages of whole blocks, where `convert_short` applies; 0 if the file needs more checks."""
    is_usual = file.header[ALLOCATIONS_LEFT] == NEVER and file.header[HOST_VIEW] == U0
    return file.header[N_PAGES] & ~BLOCK_MASK if is_usual else U0


@inlined
def finish_conversion(file, cell, start, end, results, i):
    """Update page state and counters, after the bytes."""
    if file.rules[cell + OPERATIONS]:
        file.header[SCRAMBLES] += U1
    edit(file, start, end, file.rules[cell + SET], file.rules[cell + CLEAR], results, i)
    accepted = results[PAGES_ACCEPTED, i]
    if accepted:  # pages_accepted is for guests and launch updates; a conversion counts bytes_xored
        results[PAGES_ACCEPTED, i] = U0
        file.header[TOTALS + PAGES_ACCEPTED - COUNTERS_AT] -= accepted


# ---- conversion in a file of huge pages -----------------------------------------------------------


@kernel
def convert_folios(address, offset, size, attributes, flags, error_offset, reserved, results, i):
    """Do one KVM_SET_MEMORY_ATTRIBUTES2 on a file of huge pages: one huge page at a time.

    What is done is done at once, for all huge pages before the first that fails.
    """
    file = file_at(address)
    order = file.header[ORDER]
    start, end = offset >> PAGE_SHIFT, (offset + size) >> PAGE_SHIFT
    is_one = start >> order == (end - U1) >> order
    if not error_offset | reserved and (is_one or has_no_pins(file, start, end)):
        cell = cell_of(attributes, flags)
        if convert_short(file, whole_pages(file), offset, size, attributes, flags, results, i):
            if results[PAGES_CHANGED, i]:
                tally(file.header, results, TLB_FLUSHES, i, count_used(file, start, end))
                restructure(address, start, end, file.rules[cell + SET], file.rules[cell + CLEAR], results, i)
            return
    if is_one or (file.header[ALLOCATIONS_LEFT] == NEVER and not file.header[HOST_WORK]):
        check_part(address, offset, size, attributes, flags, error_offset, reserved, results, i)
        end = end_of_checked(start, end, order, results, i)
    else:
        end = check_parts(address, offset, size, attributes, flags, error_offset, reserved, results, i)
    if start >= end:
        return
    size = (end - start) << PAGE_SHIFT
    if results[REASON, i] and file.rules[ROLLS_BACK]:
        if file.header[HOST_VIEW]:
            join_view(address, start, end)
        tally_undone(address, start, end, attributes & PRIVATE_ATTRIBUTE != U0, results, i)
        return
    if attributes & PRIVATE_ATTRIBUTE == U0:
        cut = PSMASHES if file.header[TRACKING] == RMP_UPDATES else SEPT_DEMOTIONS
        tally(file.header, results, cut, i, count_cut(file, start, end))
    used = count_used(file, start, end)
    commit_conversion(file, offset, size, attributes, flags, results, i)
    if results[PAGES_CHANGED, i]:
        tally(file.header, results, TLB_FLUSHES, i, used)


@inlined
def has_no_pins(file, start, end):
    """Return whether [start, end) is a short range without pins, so that no part of it can fail by itself."""
    if start >= end or end > file.header[N_PAGES] or end - start > BLOCK_PAGES:
        return False
    return (file.words[start >> BLOCK_SHIFT] | file.words[(end - U1) >> BLOCK_SHIFT]) & PINNED_FIELD == U0


@kernel
def check_part(address, offset, size, attributes, flags, error_offset, reserved, results, i):
    """Run `check_conversion` on a range whose parts can't fail one by one, or on one part."""
    return check_conversion(
        file_at(address), offset, size, attributes, flags, error_offset, reserved, results, i
    )


@inlined
def end_of_checked(start, end, order, results, i):
    """Return the end of the huge pages before the one that failed, if one did."""
    if results[REASON, i] == U0:
        return end
    if results[REASON, i] != PAGE_PINNED:
        return start
    return results[ERROR_OFFSET, i] >> (PAGE_SHIFT + order) << order


@kernel
def check_parts(address, offset, size, attributes, flags, error_offset, reserved, results, i):
    """Check huge page by huge page; return the end of those before the first that fails."""
    file = file_at(address)
    rules, cell, order = file.rules, cell_of(attributes, flags), file.header[ORDER]
    file_size = file.header[N_PAGES] << PAGE_SHIFT
    reason = refusal_of_arguments(rules, file_size, offset, size, attributes, flags, error_offset, reserved)
    start, end = offset >> PAGE_SHIFT, (offset + size) >> PAGE_SHIFT
    if reason == U0 and rules[cell + UNLESS]:  # judges the whole range
        found = find_page(address, start, end, rules[cell + UNLESS], U0)
        reason = MODE_UNSUPPORTED if found < end else U0
    if reason:
        results[REASON, i] = reason
        results[ERROR_OFFSET, i] = offset if reason == MODE_UNSUPPORTED else error_offset
        return start
    at = start
    while at < end:
        stop = smaller((at >> order << order) + (U1 << order), end)
        part = (stop - at) << PAGE_SHIFT
        if not check_part(address, at << PAGE_SHIFT, part, attributes, flags, error_offset, U0, results, i):
            return at
        at = stop
    return end


@kernel
def tally_undone(address, start, end, to_private, results, i):
    """Count the work on huge pages that were converted and converted back: it was done twice."""
    file = file_at(address)
    folios, order, restructured = words_at(file.header[FOLIOS], folio_count(file)), file.header[ORDER], U0
    first = start >> order
    for f in range(first, ((end - U1) >> order) + U1):
        state = folios[f] & FOLIO_STATE
        if to_private:  # only the first of them is converted in part
            stop = smaller((first + U1) << order, end)
            is_merged = state == SPLIT and (f != first or is_rest_private(address, start, stop))
            restructured += U1 if is_merged else U0
        else:
            restructured += U1 if state == WHOLE else U0
    if restructured:
        tally_folios(file.header, results, i, restructured, restructured)
    wanted, unwanted = (U0, PRIVATE_FIELD) if to_private else (PRIVATE_FIELD, U0)
    if find_page(address, start, end, wanted, unwanted) < end:
        tally(file.header, results, TLB_FLUSHES, i, U2 * count_used(file, start, end))


# ---- other steps --------------------------------------------------------------------------------


@inlined
def row_of(step, variant):
    """Return where the rules of a step and variant begin."""
    return STEPS + (step * STEP_VARIANTS + variant) * STEP_WORDS


@inlined
def is_step(step, variant):
    """Return whether there are rules for a step and variant."""
    return step < np.uint64(STEP_COUNT) and variant < STEP_VARIANTS


@kernel
def refusal_of_range(rules, row, offset, size):
    """Return why the range of a step is invalid whatever the file; 0: it isn't."""
    if size == U0:
        return INVALID
    if rules[row + SIGNED]:
        if (offset | size) >> U63:
            return INVALID
        if (offset + size) >> U63:
            return TOO_LARGE
    if rules[row + WRAPS] and offset + size - (U1 - rules[row + ENDS_BELOW_TOP]) < offset:
        return rules[row + WRAPS]
    if rules[row + ALIGNED] and (offset | size) & PAGE_MASK:
        return INVALID
    return U0


@inlined
def first_refusal(file, row, start, end):
    """Return the first page of [start, end) that a term of a step matches, and the term; end and 0: none."""
    rules, found = file.rules, U0
    for t in range(TERM_COUNT):
        term = row + TERMS + np.uint64(t) * TERM_WORDS
        if rules[term + TERM_REASON] and start < end:
            page = find_page(file.header[SELF], start, end, rules[term + WANTED], rules[term + UNWANTED])
            if page < end:
                end, found = page, term
    return end, found


@inlined
def find_refusal(file, row, start, end, reason, results, i):
    """Find what refuses pages [start, end) of a step; changes no page state.

    reason: what refuses the page at `end`, if anything. Returns the end of the pages to process (start if
    none), the page that refuses (end if none), and its term (0: none).
    """
    rules, stop = file.rules, end
    if rules[row + STEP_REFUSAL]:
        reason, stop = rules[row + STEP_REFUSAL], start
    stop, term = first_refusal(file, row, start, stop)
    reason = rules[term + TERM_REASON] if term else reason
    if reason == U0:
        return end, end, U0
    if rules[row + PARTIAL] != PARTIAL_DONE or stop == start:
        results[REASON, i] = reason
        results[ERROR_OFFSET, i] = stop << PAGE_SHIFT
    return stop if rules[row + PARTIAL] else start, stop, term


@inlined
def folio_mask(file):
    """Return the bits of an offset that aren't 0 inside a huge page."""
    return (U1 << (file.header[ORDER] + PAGE_SHIFT)) - U1


@inlined
def check_step(file, row, offset, size, results, i):
    """Check the range of a step, then its pages; return what `find_refusal` does."""
    n_pages = file.header[N_PAGES]
    start = offset >> PAGE_SHIFT
    reason = refusal_of_range(file.rules, row, offset, size)
    if reason == U0 and file.rules[row + ALIGNED] > U1 and (offset | size) & folio_mask(file):
        reason = INVALID
    if reason:
        results[REASON, i] = reason
        results[ERROR_OFFSET, i] = offset
        return start, start, U0
    last = offset + size - U1
    end = (last >> PAGE_SHIFT) + U1 if last >= offset else ONES  # a range that wraps goes beyond the end
    if end > n_pages:  # the page beyond the end refuses, if none before it does
        end = n_pages if start < n_pages else start
        reason = file.rules[row + BEYOND_END]
    return find_refusal(file, row, start, end, reason, results, i)


@inlined
def commit_step(file, row, start, end, refused, mark, writes):
    """Commit the pages that a step allocates, and the page that refuses it if that is left allocated.

    With deferred contents, store the pages whose bytes the step writes.
    """
    if file.header[DEFERRED]:
        address, operations = file.header[SELF], file.rules[row + STEP_OPERATIONS]
        return store_operated(address, operations, start, end) and (not writes or store(address, start, end))
    if file.header[COMMIT] == U0:
        return True
    if file.rules[row + STEP_SET] & ALLOCATED_FIELD == U0:
        end = start
    if mark & ALLOCATED_FIELD:
        return commit(file.header[SELF], start if start < end else refused, refused + U1)
    return commit(file.header[SELF], start, end)


@inlined
def finish_step(file, row, start, end, results, i):
    """Process pages: bytes by rank, then planes."""
    operations = file.rules[row + STEP_OPERATIONS]
    if start < end:
        if operations != U0:
            transform_all(file, operations, start, end, results, i)
        edit(file, start, end, file.rules[row + STEP_SET], file.rules[row + STEP_CLEAR], results, i)


@inlined
def leave_refused(file, row, refused, term, results, i):
    """Set the planes that the kernel has set on a page by the time it refuses it."""
    mark = file.rules[term + MARK] if term else U0
    if mark:
        if commit_step(file, row, refused, refused, refused, mark, False):
            edit(file, refused, refused + U1, mark, U0, results, i)
        else:
            results[REASON, i] = NO_MEMORY


@kernel
def take_step(address, step, variant, offset, size, writes, results, i):
    """Take a step of one file other than a conversion; return which term refused it, from 1 (0: none).

    writes: the caller then writes data to those pages.
    """
    file = file_at(address)
    if step == ALLOCATE or step == PUNCH_HOLE:
        variant = OF_FOLIOS if file.header[ORDER] else OF_PAGES
    row, start = row_of(step, variant), offset >> PAGE_SHIFT
    end, refused, term = check_step(file, row, offset, size, results, i)
    mark = file.rules[term + MARK] if term else U0
    if not commit_step(file, row, start, end, refused, mark, writes):
        results[REASON, i] = NO_MEMORY
        results[ERROR_OFFSET, i] = offset
        return U0
    finish_step(file, row, start, end, results, i)
    if mark:
        edit(file, refused, refused + U1, mark, U0, results, i)
    if step == PUNCH_HOLE and start < end:
        if file.header[DEFERRED]:
            make_zero(file.header[SELF], start, end)
        else:
            release(file.header[SELF], start, end)
    if results[REASON, i] == MEMORY_FAULT:
        add_atomically(words_at(file.header[OWNER], OWNER_SLOTS), MEMORY_FAULTS, U1)
    return (term - row - TERMS) // TERM_WORDS + U1 if term else U0


# ---- the guest's view: steps by guest physical address --------------------------------------------


@inlined
def slot_at(slots, gpa, size):
    """Return the length of a range's first memslot or hole, its number, and whether it is a hole."""
    low, high = U0, np.uint64(slots.shape[0])
    while low < high:  # memslots that begin at the address or before
        middle = (low + high) >> U1
        if slots[middle, SLOT_GPA] <= gpa:
            low = middle + U1
        else:
            high = middle
    if low > U0:
        within = gpa - slots[low - U1, SLOT_GPA]
        if within < slots[low - U1, SLOT_SIZE]:
            return smaller(size, slots[low - U1, SLOT_SIZE] - within), low - U1, False
    if low < np.uint64(slots.shape[0]):
        size = smaller(size, slots[low, SLOT_GPA] - gpa)
    return size, low, True


@kernel
def piece_at(owner, slots, gpa, size, private_side):
    """Return the first `Piece` of a range; private_side: always with the file of the private side."""
    length, slot, is_hole = slot_at(slots, gpa, size)
    kind = AS_ATTRIBUTE
    if owner[TWO_BACKINGS]:
        edges = words_at(owner[EDGES], owner[N_EDGES])
        edge = edges_up_to(edges, gpa >> PAGE_SHIFT)
        kind = AS_PRIVATE if edge & U1 else AS_SHARED
        if edge < np.uint64(edges.shape[0]):
            length = smaller(length, (edges[edge] << PAGE_SHIFT) - gpa)
    if is_hole:
        return Piece(length, U0, U0, U0, kind)
    side = SLOT_SHARED if kind == AS_SHARED and not private_side else SLOT_PRIVATE
    offset = gpa - slots[slot, SLOT_GPA] + slots[slot, SLOT_OFFSET]
    return Piece(length, slots[slot, side], offset, slots[slot, SLOT_DELETED], kind)


@inlined
def what_is_at(piece):
    """Return `IS_PAGE`, `IS_HOLE` or `IS_CLOSED_FILE` for a piece whose locks are held."""
    if piece.file == U0 or words_at(piece.deleted, U1)[U0] != U0:
        return IS_HOLE
    return IS_CLOSED_FILE if is_closed(piece.file) else IS_PAGE


@inlined
def pages_of(piece):
    """Return the first and the end page that a piece touches in its file."""
    return piece.offset >> PAGE_SHIFT, ((piece.offset + piece.length - U1) >> PAGE_SHIFT) + U1


@inlined
def edges_up_to(edges, frame):
    """Count the edges at or before a frame."""
    low, high = U0, np.uint64(edges.shape[0])
    while low < high:
        middle = (low + high) >> U1
        if edges[middle] <= frame:
            low = middle + U1
        else:
            high = middle
    return low


@kernel
def next_file(owner, slots, gpa, size, private_side, after):
    """Return the file of a range with the lowest address after a given one; `NEVER`: none.

    Locks are always taken in this order.
    """
    lowest = NEVER
    while size != U0:
        piece = piece_at(owner, slots, gpa, size, private_side)
        if piece.file > after and piece.file < lowest:
            lowest = piece.file
        gpa, size = gpa + piece.length, size - piece.length
    return lowest


@kernel
def lock_files(owner, slots, gpa, size, private_side):
    """Lock all files of a range, each once."""
    address = next_file(owner, slots, gpa, size, private_side, U0)
    while address != NEVER:
        lock(address)
        address = next_file(owner, slots, gpa, size, private_side, address)


@kernel
def unlock_files(owner, slots, gpa, size, private_side):
    """Unlock all files of a range."""
    address = next_file(owner, slots, gpa, size, private_side, U0)
    while address != NEVER:
        unlock(address)
        address = next_file(owner, slots, gpa, size, private_side, address)


@kernel
def check_bytes(owner, slots, gpa, size, private_side, results):
    """Return whether every file of a range has bytes; if one has none, that is the result."""
    while size != U0:
        piece = piece_at(owner, slots, gpa, size, private_side)
        if what_is_at(piece) == IS_PAGE and words_at(piece.file, HEADER_SLOTS)[MEMORY_WORDS] == U0:
            results[REASON, U0] = NO_BYTES
            results[ERROR_OFFSET, U0] = gpa
            return False
        gpa, size = gpa + piece.length, size - piece.length
    return True


@inlined
def refusal_of_hole(rules, row, piece, found):
    """Return why a hole refuses a guest access: the attribute is checked before the memslot."""
    return MEMORY_FAULT if piece.kind == AS_PRIVATE or found == IS_CLOSED_FILE else rules[row + BEYOND_END]


@kernel
def check_guest_step(call, owner, rules, slots, row, private_side, results):
    """Find the first page that refuses a guest's step, and leave it as the kernel does."""
    at, left = call[OFFSET], call[SIZE]
    while left != U0 and results[REASON, U0] == U0:
        piece = piece_at(owner, slots, at, left, private_side)
        found = what_is_at(piece)
        call[ANSWER], call[GONE] = piece.kind, found
        if found != IS_PAGE:
            results[REASON, U0] = refusal_of_hole(rules, row, piece, found)
            results[ERROR_OFFSET, U0] = at & ~PAGE_MASK
        else:
            file = file_at(piece.file)
            start, end = pages_of(piece)
            _, refused, term = find_refusal(file, row, start, end, U0, results, U0)
            if results[REASON, U0]:
                leave_refused(file, row, refused, term, results, U0)
                results[ERROR_OFFSET, U0] = at - piece.offset + (refused << PAGE_SHIFT)
        at, left = at + piece.length, left - piece.length
    if results[REASON, U0] == MEMORY_FAULT:
        add_atomically(owner, MEMORY_FAULTS, U1)


@kernel
def take_guest_step(call, owner, rules, slots, results):
    """Take a guest's access or acceptance over all files of a range: all or nothing."""
    step, gpa, size, data = call[STEP], call[OFFSET], call[SIZE], call[DATA]
    row, private_side = row_of(step, call[FLAGS]), step == ACCEPT
    reason = refusal_of_range(rules, row, gpa, size)
    if reason:
        results[REASON, U0] = reason
        results[ERROR_OFFSET, U0] = gpa
        return
    if data and not check_bytes(owner, slots, gpa, size, private_side, results):
        return
    check_guest_step(call, owner, rules, slots, row, private_side, results)
    if results[REASON, U0]:
        return
    at, left = gpa, size
    while left != U0:
        piece = piece_at(owner, slots, at, left, private_side)
        start, end = pages_of(piece)
        writes = data != U0 and step == GUEST_WRITE
        if not commit_step(file_at(piece.file), row, start, end, end, U0, writes):
            results[REASON, U0] = NO_MEMORY
            results[ERROR_OFFSET, U0] = at
            return
        at, left = at + piece.length, left - piece.length
    # ---- point of no return: nothing below may fail ----
    at, left = gpa, size
    while left != U0:
        piece = piece_at(owner, slots, at, left, private_side)
        start, end = pages_of(piece)
        finish_step(file_at(piece.file), row, start, end, results, U0)
        if data:
            copy_data(piece.file, step, piece.offset, piece.length, data + (at - gpa))
        at, left = at + piece.length, left - piece.length


@kernel
def unmap(address, start, end, results):
    """Unmap pages of a file from the guest. On TDX that removes them from the S-EPT."""
    file = file_at(address)
    clears = file.rules[UNMAP_CLEARS]
    if clears:
        if file.rules[UNMAP_OPERATIONS]:
            transform_all(file, file.rules[UNMAP_OPERATIONS], start, end, results, U0)
        edit(file, start, end, U0, clears, results, U0)


# ---- the launch -----------------------------------------------------------------------------------


@inlined
def variant_of_populate(flags, kind):
    """Return the variant of a launch update of one piece: whether it has contents, and its attribute."""
    variant = U0 if flags & IN_PLACE else FROM_SOURCE
    return variant | FROM_PRIVATE_FRAME if kind == AS_PRIVATE else variant


@inlined
def plan_populate(file, row, start, end, is_corrected):
    """Return the end of the pages of a piece that a launch update populates, why not more, and the term."""
    stop, term = first_refusal(file, row, start, end)
    if is_corrected and start < stop:
        return start, INPUT_OUTPUT, U0
    return stop, file.rules[term + TERM_REASON] if term else U0, term


@inlined
def load(file, flags, start, end, source):
    """Put contents into pages [start, end), in clear."""
    if file.memory.shape[0] == 0 or start >= end:
        return
    if flags & IS_ZERO and file.header[DEFERRED]:
        make_zero(file.header[SELF], start, end)
    elif flags & IS_ZERO:
        zero_words(file.memory[start * PAGE_WORDS : end * PAGE_WORDS])
    elif source:
        move_bytes(file.header[MEMORY] + (start << PAGE_SHIFT), source, (end - start) << PAGE_SHIFT)
        if file.header[DEFERRED]:
            edit_contents(file.header[SELF], KEYED, start, end, U0, U0)


@kernel
def correct_cpuid(address, owner, flags, page, source, results):
    """Refuse a CPUID page as the firmware does, once: its own values are left in the page, in clear.

    KVM copies them to the source too, if that can be written.
    """
    file = file_at(address)
    load(file, flags, page, page + U1, source)
    if file.memory.shape[0]:
        if file.header[DEFERRED]:
            materialise(address, page, page + U1)
        move_bytes(file.header[MEMORY] + (page << PAGE_SHIFT), owner[CORRECTION], owner[CORRECTION_SIZE])
    if source and flags & IS_WRITABLE:
        move_bytes(source, owner[CORRECTION], owner[CORRECTION_SIZE])
    owner[CORRECTION_SIZE] = U0
    edit(file, page, page + U1, ALLOCATED_FIELD, U0, results, U0)


@kernel
def is_digest(call, owner):
    """Return whether the launch digest is still the one that the caller extended."""
    for k in range(DIGEST_WORDS):
        if owner[DIGEST + np.uint64(k)] != call[DIGEST_BEFORE + np.uint64(k)]:
            return False
    return True


@kernel
def is_same(call, piece, copy):
    """Return whether the DRAM of a piece is what was copied from it."""
    header = words_at(piece.file, HEADER_SLOTS)
    if not header[DEFERRED]:
        return compare_bytes(copy, header[MEMORY] + piece.offset, piece.length) == 0
    room = call[CALL] + np.uint64(CALL_SLOTS) * WORD_BYTES
    for page in range(piece.length >> PAGE_SHIFT):
        at = np.uint64(page) << PAGE_SHIFT
        copy_data(piece.file, HOST_READ, piece.offset + at, PAGE_MASK + U1, room)
        if compare_bytes(copy + at, room, PAGE_MASK + U1) != 0:
            return False
    return True


@kernel
def is_as_planned(call, owner, slots, done):
    """Return whether a measured launch update does what was hashed, and extends the current digest."""
    if done != call[PLANNED] or not is_digest(call, owner):
        return False
    at, left = call[OFFSET], done << PAGE_SHIFT
    while left != U0 and call[MORE] != U0:
        piece = piece_at(owner, slots, at, left, True)
        if not is_same(call, piece, call[MORE] + (at - call[OFFSET])):
            return False
        at, left = at + piece.length, left - piece.length
    return True


@inlined
def extend_digest(call, owner):
    """Replace the digest with the caller's extended one."""
    for k in range(DIGEST_WORDS):
        owner[DIGEST + np.uint64(k)] = call[DIGEST_AFTER + np.uint64(k)]


@kernel
def plan_pieces(call, owner, rules, slots, is_corrected):
    """Return how many pages a launch update will do, why not more (0: all of them), and where it stops.

    With `PLAN_ONLY`, copy the contents of those pages if the call asks for them; otherwise commit the memory
    that will be allocated. `NO_MEMORY`: the host has none.
    """
    gpa, flags = call[OFFSET], call[FLAGS]
    done, at, left = U0, gpa, call[SIZE]
    while left != U0:
        piece = piece_at(owner, slots, at, left, True)
        found = what_is_at(piece)
        if found != IS_PAGE:
            return done, rules[POPULATE_CLOSED] if found == IS_CLOSED_FILE else INVALID, at
        file = file_at(piece.file)
        row = row_of(POPULATE, variant_of_populate(flags, piece.kind))
        start, end = pages_of(piece)
        stop, reason, term = plan_populate(file, row, start, end, is_corrected)
        if flags & PLAN_ONLY:
            if call[MORE]:
                copy_data(
                    piece.file, HOST_READ, piece.offset, (stop - start) << PAGE_SHIFT, call[MORE] + (at - gpa)
                )
        else:
            is_left = reason != U0 and (term == U0 or file.rules[term + MARK] & ALLOCATED_FIELD != U0)
            last = stop + U1 if is_left else stop
            if file.header[DEFERRED]:
                writes = (call[DATA] != U0 and not flags & IS_ZERO) or is_corrected or is_viewed(file.header)
                if writes and not store(piece.file, start, last):
                    return U0, NO_MEMORY, at
            elif not commit(piece.file, start, last):
                return U0, NO_MEMORY, at
        done += stop - start
        if reason:
            return done, reason, at + ((stop - start) << PAGE_SHIFT)
        at, left = at + piece.length, left - piece.length
    return done, U0, at


@kernel
def populate_pieces(call, owner, slots, is_corrected, results):
    """Populate pages until one is refused, which is left as the kernel leaves it."""
    gpa, source, flags = call[OFFSET], call[DATA], call[FLAGS]
    at, left = gpa, call[SIZE]
    while left != U0:
        piece = piece_at(owner, slots, at, left, True)
        if what_is_at(piece) != IS_PAGE:
            return
        file = file_at(piece.file)
        row = row_of(POPULATE, variant_of_populate(flags, piece.kind))
        start, end = pages_of(piece)
        stop, refusal, term = plan_populate(file, row, start, end, is_corrected)
        contents = source + (at - gpa) if source else U0
        load(file, flags, start, stop, contents)
        finish_step(file, row, start, stop, results, U0)
        if refusal:
            contents = contents + ((stop - start) << PAGE_SHIFT) if source else U0
            if term == U0:
                correct_cpuid(piece.file, owner, flags, stop, contents, results)
            else:
                edit(file, stop, stop + U1, file.rules[term + MARK], U0, results, U0)
                if file.rules[term + COPIED] and not flags & IS_ZERO:
                    load(file, flags, stop, stop + U1, contents)
            return
        at, left = at + piece.length, left - piece.length


@kernel
def take_populate(call, owner, rules, slots, results):
    """Do a launch update over all files of a range; ANSWER is the number of pages done.

    With `PLAN_ONLY`, only count those pages and copy their contents, for the measurement to hash. In a
    measured launch the update must do what was planned; otherwise, or if the digest has changed since, the
    reason is `CHANGED` and nothing was done.
    """
    is_corrected = call[FLAGS] & IS_CPUID != U0 and owner[CORRECTION_SIZE] != U0
    done, reason, refused_at = plan_pieces(call, owner, rules, slots, is_corrected)
    call[ANSWER] = done
    if call[FLAGS] & PLAN_ONLY:
        return
    if reason != NO_MEMORY and owner[IS_MEASURED] and not is_as_planned(call, owner, slots, done):
        reason = CHANGED
    if reason != NO_MEMORY and reason != CHANGED:
        # ---- point of no return: nothing below may fail ----
        owner[LAUNCH_BEGAN] = U1
        populate_pieces(call, owner, slots, is_corrected, results)
        if owner[IS_MEASURED]:
            extend_digest(call, owner)
        if rules[row_of(POPULATE, U0) + PARTIAL] == PARTIAL_DONE and done != U0:
            reason = U0
    if reason:
        results[REASON, U0] = reason
        results[ERROR_OFFSET, U0] = refused_at


# ---- attributes by guest frame, of an owner with two backings -------------------------------------
#
# Private frames are stored as sorted edges: private from each even edge to the next odd one.


@inlined
def is_edge_within(edges, low, high, block):
    """Return whether one of edges [low, high) is inside a 2 MiB block, which makes the block mixed."""
    k = edges_up_to(edges[low:high], block << BLOCK_SHIFT)
    return low + k < high and edges[low + k] < (block + U1) << BLOCK_SHIFT


@kernel
def set_frames(owner, start, end, private, results, i):
    """Make frames [start, end) private or shared, and count the changes; False: no room for more edges."""
    n = owner[N_EDGES]
    edges = words_at(owner[EDGES], owner[EDGE_ROOM])
    first = edges_up_to(edges[U0:n], start - U1) if start else U0  # edges before the range
    last = edges_up_to(edges[U0:n], end)  # and those that are not beyond it
    # There is an edge at each end where the attribute outside differs.
    has_start = (first & U1 == U0) == (private != U0)
    has_end = (last & U1 == U0) == (private != U0)
    new = (U1 if has_start else U0) + (U1 if has_end else U0)
    if n - (last - first) + new > owner[EDGE_ROOM]:
        return False
    had, split, merged = U0, U0, U0
    at, is_private = start, first & U1 != U0
    for k in range(first, last + U1):
        stop = edges[k] if k < last else end
        stop = smaller(stop, end)
        if stop > at:
            had += stop - at if is_private else U0
            at = stop
        is_private = not is_private
    ends_at_edge = last > first and edges[last - U1] == end
    block_before = ONES
    for k in range(first, last + U2):  # the blocks of the first frame, of each edge and of the last frame
        frame = end if ends_at_edge else end - U1
        if k == first:
            frame = start
        elif k <= last:
            frame = smaller(edges[k - U1], end - U1)
        block = frame >> BLOCK_SHIFT
        if block != block_before:
            block_before = block
            low, high = block << BLOCK_SHIFT, (block + U1) << BLOCK_SHIFT
            was_mixed = is_edge_within(edges, U0, n, block)
            is_mixed = is_edge_within(edges, U0, first, block) or is_edge_within(edges, last, n, block)
            is_mixed = is_mixed or (has_start and low < start < high) or (has_end and low < end < high)
            split += U1 if is_mixed and not was_mixed else U0
            merged += U1 if was_mixed and not is_mixed else U0
    address = owner[EDGES]
    move_bytes(address + (first + new) * WORD_BYTES, address + last * WORD_BYTES, (n - last) * WORD_BYTES)
    if has_start:
        edges[first] = start
    if has_end:
        edges[first + new - U1] = end
    owner[N_EDGES] = n - (last - first) + new
    changed = end - start - had if private else had
    results[PAGES_CHANGED, i], results[BLOCKS_SPLIT, i], results[BLOCKS_MERGED, i] = changed, split, merged
    owner[FRAMES_CHANGED] += changed
    owner[FRAMES_SPLIT] += split
    owner[FRAMES_MERGED] += merged
    return True


@inlined
def refusal_of_frames(rules, address, size, attributes, flags):
    """Return the first check that KVM_SET_MEMORY_ATTRIBUTES on the VM fd fails, in its order; 0: none."""
    if flags:
        return FLAGS_UNKNOWN
    if attributes & ~rules[FRAME_ATTRIBUTES]:
        return ATTRIBUTE_UNKNOWN
    if size == U0 or address + size < address:
        return RANGE_EMPTY
    if (address | size) & PAGE_MASK:
        return RANGE_UNALIGNED
    return U0


# ---- entry points: what the engine calls ----------------------------------------------------------


@inlined
def enter(call):
    """Lock the file of a call; False, and unlocked again, if it is closed."""
    lock(call[FILE])
    if not is_closed(call[FILE]):
        return True
    unlock(call[FILE])
    return False


@inlined
def clear_result(call):
    """Clear the result of the previous call."""
    for k in range(RESULT, PHASE_SEEN):
        call[np.uint64(k)] = U0


@entry
def convert_one(call):
    """Do one conversion of one file."""
    clear_result(call)
    address, results = call[FILE], table_at(call[CALL] + RESULT_AT, ROWS, U1)
    if not enter(call):
        return CLOSED_FILE
    file = file_at(address)
    offset, size, attributes, flags = call[OFFSET], call[SIZE], call[ATTRIBUTES], call[FLAGS]
    error_offset, reserved = call[ERROR_OFFSET_GIVEN], call[RESERVED]
    call[PHASE_SEEN] = words_at(file.header[OWNER], OWNER_SLOTS)[PHASE]
    if not file.rules[HAS_IOCTL]:
        results[REASON, U0] = UNKNOWN_IOCTL
    elif file.header[ORDER]:
        if file.header[HOST_VIEW]:
            notice_range(address, offset, size, table_at(call[CALL] + NOTICED_AT, ROWS, U1))
        convert_folios(address, offset, size, attributes, flags, error_offset, reserved, results, U0)
    elif error_offset | reserved or not (
        convert_short(file, whole_pages(file), offset, size, attributes, flags, results, U0)
        or convert_keyed(file, keyed_pages(file), offset, size, attributes, flags, results, U0)
    ):
        if file.header[HOST_VIEW]:
            notice_range(file.header[SELF], offset, size, table_at(call[CALL] + NOTICED_AT, ROWS, U1))
        convert(file, offset, size, attributes, flags, error_offset, reserved, results, U0)
    unlock(address)
    return results[REASON, U0]


@kernel
def notice_range(address, offset, size, noticed):
    """Run `notice_writes` on the part of a byte range that is inside the file."""
    file = file_at(address)
    start, end = offset >> PAGE_SHIFT, (offset + size + PAGE_MASK) >> PAGE_SHIFT
    if offset + size >= offset and start < file.header[N_PAGES]:
        notice_writes(file.header[SELF], start, smaller(end, file.header[N_PAGES]), noticed)


@entry
def take_one(call):
    """Take one step of one file other than a conversion; data, if any, is what it reads or writes."""
    clear_result(call)
    address, results = call[FILE], table_at(call[CALL] + RESULT_AT, ROWS, U1)
    if not enter(call):
        return CLOSED_FILE
    file = file_at(address)
    step, variant, offset, size, data = call[STEP], call[FLAGS], call[OFFSET], call[SIZE], call[DATA]
    if data and file.memory.shape[0] == 0:
        results[REASON, U0] = NO_BYTES
    elif not is_step(step, variant):
        results[REASON, U0] = INVALID
    else:
        if file.header[HOST_VIEW]:
            notice_range(file.header[SELF], offset, size, table_at(call[CALL] + NOTICED_AT, ROWS, U1))
        writes = data != U0 and step == HOST_WRITE
        call[ANSWER] = take_step(file.header[SELF], step, variant, offset, size, writes, results, U0)
        if data and results[REASON, U0] == U0:
            copy_data(file.header[SELF], step, offset, size, data)
    unlock(address)
    return results[REASON, U0]


@inlined
def prefetch_soon(file, is_keyed, offsets, sizes, i):
    """Prefetch page state for a request after request i; is_keyed: also what `convert_keyed` needs."""
    words, lines = file.words, file.lines
    n, rows = np.uint64(offsets.shape[0]), np.uint64(lines.shape[1])
    soon = i + AHEAD
    if soon < n:
        row = offsets[soon] >> (PAGE_SHIFT + ROW_SHIFT)
        row = row if row < rows else U0
        prefetch(words, row >> U3)
        prefetch(lines, PRIVATE, row)
        prefetch_folio(file, row << ROW_SHIFT)
        row = (offsets[soon] + sizes[soon] - U1) >> (PAGE_SHIFT + ROW_SHIFT)
        row = row if row < rows else U0
        prefetch(lines, PRIVATE, row)
        if is_keyed:
            prefetch(lines, ALLOCATED, row)
            prefetch(lines, ASSIGNED, row)
            prefetch(lines, ACCEPTED, row)
            prefetch(table_at(file.header[DEFERRED_LINES], U2, rows), KEYED, row)
        # Whether the pinned row is needed depends on the word, which is there by now: half as far ahead.
        row = offsets[i + AHEAD // U2] >> (PAGE_SHIFT + ROW_SHIFT)
        row = row if row < rows else U0
        prefetch(lines, PINNED if words[row >> U3] & PINNED_FIELD else PRIVATE, row)


@entry
def run(call, steps, offsets, sizes, attributes, flags, results):
    """Do N requests of one file, in order: results[:, i] for request i, the call's result for all of them.

    steps, attributes and flags have one number per request, or one for all. A conversion is step 0; for any
    other step, flags are its variant.
    """
    clear_result(call)
    address = call[FILE]
    if not enter(call):
        return CLOSED_FILE
    file = file_at(address)
    header = file.header
    if steps.shape[0] == 1 and steps[0] == CONVERT and not file.rules[HAS_IOCTL]:
        unlock(address)
        return UNKNOWN_IOCTL
    each_step = U1 if steps.shape[0] > 1 else U0
    each_attributes = U1 if attributes.shape[0] > 1 else U0
    each_flags = U1 if flags.shape[0] > 1 else U0
    n_whole, n_keyed = whole_pages(file), keyed_pages(file)
    operations = file.rules[cell_of(PRIVATE_ATTRIBUTE, flags[0]) + OPERATIONS] if flags.shape[0] else U0
    is_keyed = n_keyed != U0 and operations != U0
    faults = U0
    total, noticed = table_at(call[CALL] + RESULT_AT, ROWS, U1), table_at(call[CALL] + NOTICED_AT, ROWS, U1)
    for k in range(COUNTERS):
        total[COUNTERS_AT + np.uint64(k), U0] = header[TOTALS + np.uint64(k)]
    for k in range(offsets.shape[0]):
        i = np.uint64(k)
        prefetch_soon(file, is_keyed, offsets, sizes, i)
        step, offset, size, flag = steps[i * each_step], offsets[i], sizes[i], flags[i * each_flags]
        if header[HOST_VIEW]:
            notice_range(file.header[SELF], offset, size, noticed)
        if step == CONVERT:
            attribute = attributes[i * each_attributes]
            if header[ORDER]:
                convert_folios(address, offset, size, attribute, flag, U0, U0, results, i)
            elif not (
                convert_short(file, n_whole, offset, size, attribute, flag, results, i)
                or convert_keyed(file, n_keyed, offset, size, attribute, flag, results, i)
            ):
                convert(file, offset, size, attribute, flag, U0, U0, results, i)
        elif is_step(step, flag):
            take_step(file.header[SELF], step, flag, offset, size, False, results, i)
            faults += U1 if results[REASON, i] == MEMORY_FAULT else U0
        else:
            results[REASON, i] = INVALID
            results[ERROR_OFFSET, i] = offset
    for k in range(COUNTERS):
        counter = COUNTERS_AT + np.uint64(k)
        total[counter, U0] = header[TOTALS + np.uint64(k)] - total[counter, U0] - noticed[counter, U0]
    call[FAULTS_SEEN] = faults
    unlock(address)
    return U0


@entry
def take_guest(call):
    """Take a guest's access or acceptance of a range of its memory."""
    clear_result(call)
    owner = words_at(call[GUEST], OWNER_SLOTS)
    slots = table_at(call[SLOTS], call[N_SLOTS], SLOT_WORDS)
    rules = words_at(owner[RULES_LAUNCHING + owner[PHASE]], RULES_WORDS)
    results, private_side = table_at(call[CALL] + RESULT_AT, ROWS, U1), call[STEP] == ACCEPT
    if owner[TWO_BACKINGS]:  # the owner's attributes select the files
        lock(call[GUEST])
    lock_files(owner, slots, call[OFFSET], call[SIZE], private_side)
    take_guest_step(call, owner, rules, slots, results)
    unlock_files(owner, slots, call[OFFSET], call[SIZE], private_side)
    if owner[TWO_BACKINGS]:
        unlock(call[GUEST])
    return results[REASON, U0]


@entry
def populate(call):
    """Do a launch update of a range of guest memory."""
    clear_result(call)
    owner = words_at(call[GUEST], OWNER_SLOTS)
    slots = table_at(call[SLOTS], call[N_SLOTS], SLOT_WORDS)
    results = table_at(call[CALL] + RESULT_AT, ROWS, U1)
    call[ANSWER] = U0
    lock(call[GUEST])
    rules = words_at(owner[RULES_LAUNCHING + owner[PHASE]], RULES_WORDS)
    reason = rules[row_of(POPULATE, U0) + STEP_REFUSAL]
    if reason == U0 and rules[ENDS_WITH_SLOT]:
        call[SIZE], _, is_hole = slot_at(slots, call[OFFSET], call[SIZE])
        reason = NO_SLOT if is_hole else U0
    if reason:
        results[REASON, U0] = reason
    else:
        gpa, size = call[OFFSET], call[SIZE]
        lock_files(owner, slots, gpa, size, True)
        if not (call[DATA] or owner[IS_MEASURED]) or check_bytes(owner, slots, gpa, size, True, results):
            take_populate(call, owner, rules, slots, results)
        unlock_files(owner, slots, gpa, size, True)
    unlock(call[GUEST])
    return results[REASON, U0]


@entry
def set_attributes(call):
    """Do KVM_SET_MEMORY_ATTRIBUTES on the VM fd. `NO_ROOM`: it needs more room for edges; nothing changed.

    Memory that the call brings along replaces the current room, if it is larger.
    """
    clear_result(call)
    owner, results = words_at(call[GUEST], OWNER_SLOTS), table_at(call[CALL] + RESULT_AT, ROWS, U1)
    lock(call[GUEST])
    address, size, attributes, flags = call[OFFSET], call[SIZE], call[ATTRIBUTES], call[FLAGS]
    rules = words_at(owner[RULES_LAUNCHING + owner[PHASE]], RULES_WORDS)
    results[REASON, U0] = refusal_of_frames(rules, address, size, attributes, flags)
    if results[REASON, U0] == U0 and owner[TWO_BACKINGS]:
        if call[MORE] and call[MOST] > owner[EDGE_ROOM]:
            move_bytes(call[MORE], owner[EDGES], owner[N_EDGES] * WORD_BYTES)
            owner[EDGES], owner[EDGE_ROOM] = call[MORE], call[MOST]
        start, end = address >> PAGE_SHIFT, (address + size) >> PAGE_SHIFT
        if not set_frames(owner, start, end, attributes & PRIVATE_ATTRIBUTE, results, U0):
            results[REASON, U0] = NO_ROOM
    unlock(call[GUEST])
    return results[REASON, U0]


@entry
def repeat(call, kind, offsets, sizes, data):
    """Do a call for each range, in order; return how many were done before one was refused.

    data: the address of the data of each, or 0.
    """
    done, reason = 0, U0
    while done < offsets.shape[0] and reason == U0:
        call[OFFSET], call[SIZE], call[DATA] = offsets[done], sizes[done], data[done]
        if kind == CALL_OF_FILE:
            reason = take_one(call)
        elif kind == CALL_OF_GUEST:
            reason = take_guest(call)
        elif kind == CALL_OF_LAUNCH:
            reason = populate(call)
        else:
            reason = set_attributes(call)
        done += 1 if reason == U0 else 0
    return done


@entry
def copy_edges(call, edges):
    """Copy the edges of private frames, if they fit; return how many there are."""
    owner = words_at(call[GUEST], OWNER_SLOTS)
    lock(call[GUEST])
    n = owner[N_EDGES]
    if n <= np.uint64(edges.shape[0]):
        own = words_at(owner[EDGES], n)
        for k in range(n):
            edges[k] = own[k]
    unlock(call[GUEST])
    return n


@inlined
def copy_owner_counters(call, owner):
    """Copy an owner's own counters into the result: changes of attributes by frame, and exits."""
    clear_result(call)
    results = table_at(call[CALL] + RESULT_AT, ROWS, U1)
    results[PAGES_CHANGED, U0] = owner[FRAMES_CHANGED]
    results[BLOCKS_SPLIT, U0], results[BLOCKS_MERGED, U0] = owner[FRAMES_SPLIT], owner[FRAMES_MERGED]
    call[FAULTS_SEEN] = owner[MEMORY_FAULTS]


@entry
def count_owner(call):
    """Copy the counters of an owner."""
    owner = words_at(call[GUEST], OWNER_SLOTS)
    lock(call[GUEST])
    copy_owner_counters(call, owner)
    unlock(call[GUEST])


@entry
def start_measurement(call):
    """Start keeping a launch digest."""
    owner = words_at(call[GUEST], OWNER_SLOTS)
    lock(call[GUEST])
    reason = INVALID if owner[LAUNCH_BEGAN] or owner[IS_MEASURED] or owner[PHASE] == RUNNING else U0
    if reason == U0:
        owner[IS_MEASURED] = U1
    unlock(call[GUEST])
    return reason


@entry
def finish_launch(call):
    """End the launch phase, and extend the digest; `CHANGED`: it isn't the one that the caller extended.

    flags: the VM has no vCPUs.
    """
    owner = words_at(call[GUEST], OWNER_SLOTS)
    lock(call[GUEST])
    rules = words_at(owner[RULES_LAUNCHING + owner[PHASE]], RULES_WORDS)
    reason = U0
    if owner[PHASE] == RUNNING:
        reason = rules[FINISH_AGAIN_WITHOUT_VCPUS if owner[WITHOUT_VCPUS] else FINISH_AGAIN]
    if reason == U0 and owner[IS_MEASURED]:
        if call[PLANNED] != NEVER and is_digest(call, owner):
            extend_digest(call, owner)
        else:
            reason = CHANGED
    if reason == U0:
        owner[WITHOUT_VCPUS] = owner[WITHOUT_VCPUS] if owner[PHASE] == RUNNING else call[FLAGS]
        owner[PHASE] = RUNNING
    unlock(call[GUEST])
    return reason


@entry
def copy_digest(call):
    """Copy the launch digest into the call."""
    owner = words_at(call[GUEST], OWNER_SLOTS)
    lock(call[GUEST])
    for k in range(DIGEST_WORDS):
        call[DIGEST_BEFORE + np.uint64(k)] = owner[DIGEST + np.uint64(k)]
    unlock(call[GUEST])


@entry
def set_correction(call):
    """Set the values with which the firmware corrects the next CPUID page; none: it accepts the page."""
    owner = words_at(call[GUEST], OWNER_SLOTS)
    lock(call[GUEST])
    move_bytes(owner[CORRECTION], call[DATA], call[SIZE])
    owner[CORRECTION_SIZE] = call[SIZE]
    unlock(call[GUEST])


# Deferred contents. Flags say who needs the bytes of all pages.
KEEPS_VIEW, WRITES_VIEW = U1, U2


@entry
def bring_up_to_date(call):
    """Do what is due on the bytes of a range; ANSWER: how many pages that stores, and MOST how many it may.

    flags: `KEEPS_VIEW`, the caller has a raw view to read, whose end clears `VIEWED`; `WRITES_VIEW`, it will
    have one to write, and from then on the file's contents aren't deferred any more. `NO_MEMORY`: the host
    has none, and no byte has changed.
    """
    if not enter(call):
        return CLOSED_FILE
    header = words_at(call[FILE], HEADER_SLOTS)
    reason, flags = U0, call[FLAGS]
    call[ANSWER] = U0
    if header[DEFERRED]:
        start, end = call[OFFSET] >> PAGE_SHIFT, (call[OFFSET] + call[SIZE]) >> PAGE_SHIFT
        call[ANSWER] = count_due(call[FILE], start, end, flags == WRITES_VIEW)
        if call[ANSWER] > call[MOST] or not store_due(call[FILE], start, end, flags == WRITES_VIEW):
            reason = NO_MEMORY
        else:
            materialise(call[FILE], start, end)
            if flags == KEEPS_VIEW:
                header[VIEWED] = U1
            elif flags == WRITES_VIEW:
                header[DEFERRED], header[COMMIT] = U0, header[STORE]
    unlock(call[FILE])
    return reason


@inlined
def due_row(file, marks, lines, row, with_allocated):
    """Return the bits of a row whose pages need host memory: keyed ones (or all allocated) not stored."""
    bits = contents_row(marks, lines, KEYED, row)
    if with_allocated:
        bits |= plane_row(file.words, file.lines, file.header[N_PAGES], ALLOCATED, row)
    return bits & ~contents_row(marks, lines, STORED, row)


@kernel
def count_due(address, start, end, with_allocated):
    """Count the pages of a range that `store_due` stores."""
    file = file_at(address)
    marks, lines = contents_of(file.header)
    count = U0
    while start < end:
        low = start & U63
        stop = smaller(start - low + U64, end)
        bits = due_row(file, marks, lines, start >> ROW_SHIFT, with_allocated)
        count += popcount(bits & bits_between(low, low + (stop - start)))
        start = stop
    return count


@kernel
def store_due(address, start, end, with_allocated):
    """Provide host memory for keyed pages of a range, or for all allocated ones too; False: it is refused."""
    at = start
    while at < end:
        at = find_contents(address, KEYED, at, end, ONES)
        stop = find_contents(address, KEYED, at, end, U0) if at < end else end
        if at < end and not store(address, at, stop):
            return False
        at = stop
    at = start if with_allocated else end
    while at < end:
        at = find_page(address, at, end, ALLOCATED_FIELD, U0)
        stop = find_page(address, at, end, U0, ALLOCATED_FIELD) if at < end else end
        if at < end and not store(address, at, stop):
            return False
        at = stop
    return True


@entry
def copy_dram(call):
    """Copy the DRAM of a range to the caller's data, without changing anything."""
    if not enter(call):
        return CLOSED_FILE
    copy_data(call[FILE], HOST_READ, call[OFFSET], call[SIZE], call[DATA])
    unlock(call[FILE])
    return U0


@kernel
def hash_page(address, page, is_keyed):
    """Return the sum of the words of a stored page's DRAM, and whether it is the key stream."""
    file = file_at(address)
    view = file.memory[page * PAGE_WORDS : (page + U1) * PAGE_WORDS]
    state, total, differs = stream_state(file.header, page * PAGE_WORDS), U0, U0
    if is_keyed:
        for i in range(view.shape[0]):
            differs |= view[i]
            total += view[i] ^ mix(state)
            state += GOLDEN
    else:
        total, differs = view.sum(), view[0] ^ mix(state)
        if differs == U0:
            for i in range(view.shape[0]):
                differs |= view[i] ^ mix(state)
                state += GOLDEN
    return total, differs == U0


@inlined
def hash_stored(address, row, stored, keyed):
    """Hash the stored pages of a row; return the sum, and the pages that are the key stream."""
    total, streams = U0, U0
    while stored != U0:
        p = lowest_bit(stored)
        stored &= stored - U1
        page = (row << ROW_SHIFT) + p
        found, is_stream = hash_page(address, page, (keyed >> p) & U1 != U0)
        if is_stream:
            streams |= U1 << p
        elif found != U0:
            total += mix(found ^ ((page + U1) * GOLDEN))
    return total, streams


@kernel
def hash_contents(address):
    """Hash all contents into a sum over pages.

    Pages of zeros count nothing, and pages that are the key stream (what encrypted zeros are) only as bits of
    their row. So memory that was never written isn't read, and no key stream is computed for it.
    """
    file = file_at(address)
    header, n_pages, n_blocks = file.header, file.header[N_PAGES], np.uint64(file.words.shape[0])
    is_deferred = header[DEFERRED] != U0
    marks = bytes_at(header[DEFERRED] if is_deferred else header[WORDS], n_blocks)  # unread if eager
    lines = table_at(header[DEFERRED_LINES], U2, n_blocks << U3)
    total, whole, rows = U0, mix(ONES), rows_of_block(lines)
    for b in range(n_blocks):
        block = np.uint64(b)
        pages = pages_of_block(n_pages, block)
        mark = np.uint64(marks[b])
        if (mark if is_deferred else file.words[b] & ALLOCATED_FIELD) == U0:
            continue
        if (
            is_deferred and mark == INVERTED << MARK_BITS and pages == BLOCK_PAGES
        ):  # keyed, and nothing stored
            total += whole * GOLDEN * ((block << U7) + U64)  # the sum of its eight rows
            continue
        if is_deferred and mark & MARK_MASK == U0 and pages == BLOCK_PAGES:  # nothing stored, some keyed
            inverted = U0 - (mark >> MARK_BITS & INVERTED)
            for r in range(rows):
                row = (block << U3) + np.uint64(r)
                total += mix(lines[KEYED, row] ^ inverted) * (GOLDEN * ((row << U1) + U1))
            continue
        for r in range((pages + U63) >> ROW_SHIFT):
            row, first = (block << U3) + np.uint64(r), np.uint64(r) << ROW_SHIFT
            exists = bits_between(U0, smaller(pages - first, U64))
            if is_deferred:
                stored = contents_row(marks, lines, STORED, row) & exists
                keyed = contents_row(marks, lines, KEYED, row) & exists
            else:
                stored, keyed = plane_row(file.words, file.lines, n_pages, ALLOCATED, row) & exists, U0
            found, streams = hash_stored(address, row, stored, keyed)
            total += found + mix(streams | (keyed & ~stored)) * (GOLDEN * ((row << U1) + U1))
    return total


@entry
def sum_contents(call):
    """Hash all contents into 64 bits, without changing anything."""
    if not enter_to_check(call):
        return CLOSED_FILE
    call[ANSWER] = hash_contents(call[FILE])
    unlock(call[FILE])
    return U0


# State checks. Writes through a host view are detected first.


@inlined
def enter_to_check(call):
    """Lock the file of a call, and detect what was written through the host view."""
    if not enter(call):
        return False
    file = file_at(call[FILE])
    notice_writes(file.header[SELF], U0, file.header[N_PAGES], table_at(call[CALL] + NOTICED_AT, ROWS, U1))
    return True


@entry
def find(call):
    """Find the first page of a range with all wanted planes and no unwanted one; its end if none has."""
    if not enter_to_check(call):
        return CLOSED_FILE
    start, end = call[OFFSET], call[SIZE]
    call[ANSWER] = find_page(call[FILE], start, end, call[ATTRIBUTES], call[FLAGS])
    unlock(call[FILE])
    return U0


@entry
def count(call):
    """Count the pages of a range with all wanted planes and no unwanted one."""
    if not enter_to_check(call):
        return CLOSED_FILE
    start, end = call[OFFSET], call[SIZE]
    call[ANSWER] = count_pages(call[FILE], start, end, call[ATTRIBUTES], call[FLAGS])
    unlock(call[FILE])
    return U0


MAPPABLE_1G = np.uint64(48)  # bits: where the second answer begins


@entry
def count_mappable(call):
    """Count the whole 2 MiB blocks, and the 1 GiB blocks, with a single attribute."""
    if not enter(call):
        return CLOSED_FILE
    file = file_at(call[FILE])
    blocks_2m, blocks_1g, in_1g = U0, U0, U0
    n_blocks = file.header[N_PAGES] >> BLOCK_SHIFT
    for b in range(n_blocks):
        pages = file.words[b] & FIELD
        blocks_2m += U1 if pages & BLOCK_MASK == U0 else U0
        in_1g += pages
        if np.uint64(b) & BLOCK_MASK == BLOCK_MASK:
            blocks_1g += U1 if in_1g == U0 or in_1g == BLOCK_PAGES * BLOCK_PAGES else U0
            in_1g = U0
    call[ANSWER] = blocks_2m | blocks_1g << MAPPABLE_1G
    unlock(call[FILE])
    return U0


@entry
def copy_folios(call, states):
    """Copy the state of each folio."""
    if not enter_to_check(call):
        return CLOSED_FILE
    file = file_at(call[FILE])
    if file.header[ORDER]:
        folios = words_at(file.header[FOLIOS], folio_count(file))
        for f in range(states.shape[0]):
            states[f] = np.uint8(folios[f] & FOLIO_STATE)
    unlock(call[FILE])
    return U0


@entry
def survey(call, out):
    """Hash, count and check all page state in one pass."""
    if not enter_to_check(call):
        return CLOSED_FILE
    call[ANSWER] = survey_pages(call[FILE], out)
    unlock(call[FILE])
    return U0


@entry
def copy_runs(call, ends, scratch):
    """List the runs of a plane: how many, and whether the first is in it. `NO_ROOM`: room that is enough."""
    if not enter_to_check(call):
        return CLOSED_FILE
    file, plane, reason = file_at(call[FILE]), call[ATTRIBUTES], U0
    n_pages, call[ANSWER] = file.header[N_PAGES], U0
    if ends.shape[0]:
        call[ANSWER] = list_runs(file.words, file.lines, n_pages, plane, ends, scratch)
    if call[ANSWER]:
        call[MORE] = plane_row(file.words, file.lines, n_pages, plane, U0) & U1
    else:
        call[ANSWER], reason = most_runs(file.words, plane) + (GROUP << BLOCK_SHIFT) + U1, NO_ROOM
    unlock(call[FILE])
    return reason


@entry
def copy_plane(call, rows):
    """Copy one plane as a bitmap; bits beyond the end are clear."""
    if not enter_to_check(call):
        return CLOSED_FILE
    file, plane = file_at(call[FILE]), call[ATTRIBUTES]
    n_pages = file.header[N_PAGES]
    for r in range(rows.shape[0]):
        rows[r] = plane_row(file.words, file.lines, n_pages, plane, np.uint64(r))
    if n_pages & U63:
        rows[rows.shape[0] - 1] &= bits_between(U0, n_pages & U63)
    unlock(call[FILE])
    return U0


@entry
def copy_blocks(call, words, lines):
    """Copy the words and lines of some blocks; lines of uniform blocks are copied unwritten."""
    if not enter_to_check(call):
        return CLOSED_FILE
    file, first = file_at(call[FILE]), call[OFFSET]
    for b in range(words.shape[0]):
        words[b] = file.words[first + np.uint64(b)]
    for plane in range(PLANES):
        for r in range(lines.shape[1]):
            lines[plane, r] = file.lines[plane, (first << U3) + np.uint64(r)]
    unlock(call[FILE])
    return U0


@entry
def keep_lines(call):
    """Write all lines, and keep all of them valid from now on."""
    if not enter_to_check(call):
        return CLOSED_FILE
    file = file_at(call[FILE])
    write_lines(file.header[SELF])
    file.header[DENSE] = U1
    unlock(call[FILE])
    return U0


@inlined
def copy_totals(header, results, i):
    """Copy the counters of a file."""
    for k in range(COUNTERS):
        results[COUNTERS_AT + np.uint64(k), i] = header[TOTALS + np.uint64(k)]


@entry
def count_events(call):
    """Copy the counters of a file into the result; a closed file keeps its last ones."""
    lock(call[FILE])
    header = words_at(call[FILE], HEADER_SLOTS)
    if not is_closed(call[FILE]):
        notice_writes(call[FILE], U0, header[N_PAGES], table_at(call[CALL] + NOTICED_AT, ROWS, U1))
    copy_totals(header, table_at(call[CALL] + RESULT_AT, ROWS, U1), U0)
    unlock(call[FILE])
    return U0


@inlined
def is_mixed_in(word, plane, pages):
    """Return whether a plane is mixed in a block, which makes its line valid."""
    count = (word >> (plane * FIELD_BITS)) & FIELD
    return count != U0 and count != pages


@kernel
def count_mixed(address):
    """Count the valid lines of a file."""
    file = file_at(address)
    lines = U0
    for b in range(file.words.shape[0]):
        pages = pages_of_block(file.header[N_PAGES], np.uint64(b))
        for plane in range(PLANES):
            lines += U1 if is_mixed_in(file.words[b], np.uint64(plane), pages) else U0
    return lines


@kernel
def pack_file(address, words, lines):
    """Copy the words, and the lines of mixed blocks: plane by plane, in each block by block."""
    file = file_at(address)
    n = U0
    for b in range(words.shape[0]):
        words[b] = file.words[b]
    for p in range(PLANES):
        plane = np.uint64(p)
        for b in range(words.shape[0]):
            block = np.uint64(b)
            if is_mixed_in(words[b], plane, pages_of_block(file.header[N_PAGES], block)):
                for r in range(8):
                    lines[n, r] = file.lines[plane, (block << U3) + np.uint64(r)]
                n += U1


# A request to freeze one file: the file, where its words and lines go, and room for how many lines. Its
# result: whether the file is closed, how many lines there are, and its counters.
FROZEN_FILE, FROZEN_WORDS, FROZEN_LINES, FROZEN_ROOM, FROZEN_CLOSED, FROZEN_NEEDED = numbers(6)
FROZEN_RESULT = np.uint64(6)
FROZEN_COLUMNS = np.uint64(6 + RESULT_ROWS)


@entry
def freeze(call, files):
    """Copy the state of several files at one moment; files: one row each, in the order of their addresses.

    `NO_ROOM`: FROZEN_NEEDED and MORE say how much is needed.
    """
    owner = words_at(call[GUEST], OWNER_SLOTS)
    lock(call[GUEST])
    for k in range(files.shape[0]):
        lock(files[k, FROZEN_FILE])
    reason = U0
    for k in range(files.shape[0]):
        row = files[k]
        if is_closed(row[FROZEN_FILE]):
            row[FROZEN_CLOSED], row[FROZEN_NEEDED] = U1, U0
        else:
            file = file_at(row[FROZEN_FILE])
            notice_writes(
                file.header[SELF], U0, file.header[N_PAGES], table_at(call[CALL] + NOTICED_AT, ROWS, U1)
            )
            row[FROZEN_NEEDED] = count_mixed(file.header[SELF])
        reason = NO_ROOM if row[FROZEN_NEEDED] > row[FROZEN_ROOM] else reason
    call[MORE] = owner[N_EDGES]
    reason = NO_ROOM if owner[N_EDGES] > call[MOST] else reason
    if reason == U0:
        move_bytes(call[DATA], owner[EDGES], owner[N_EDGES] * WORD_BYTES)
        for k in range(files.shape[0]):
            row = files[k]
            header = words_at(row[FROZEN_FILE], HEADER_SLOTS)
            for each in range(COUNTERS):
                row[FROZEN_RESULT + COUNTERS_AT + np.uint64(each)] = header[TOTALS + np.uint64(each)]
            if not row[FROZEN_CLOSED]:
                file = file_at(row[FROZEN_FILE])
                words = words_at(row[FROZEN_WORDS], np.uint64(file.words.shape[0]))
                pack_file(file.header[SELF], words, table_at(row[FROZEN_LINES], row[FROZEN_NEEDED], U8))
        copy_owner_counters(call, owner)
        call[PHASE_SEEN] = owner[PHASE]
    for k in range(files.shape[0]):
        unlock(files[k, FROZEN_FILE])
    unlock(call[GUEST])
    return reason


@entry
def unmap_slot(call):
    """Delete a memslot. The call has the file of its private side, the range in it, and the deleted flag."""
    clear_result(call)
    deleted = words_at(call[DATA], U1)
    lock(call[GUEST])
    lock(call[FILE])
    reason = INVALID if deleted[U0] else U0
    if reason == U0:
        deleted[U0] = U1
        if not is_closed(call[FILE]):
            start, end = call[OFFSET] >> PAGE_SHIFT, (call[OFFSET] + call[SIZE]) >> PAGE_SHIFT
            unmap(call[FILE], start, end, table_at(call[CALL] + RESULT_AT, ROWS, U1))
    unlock(call[FILE])
    unlock(call[GUEST])
    return reason


@entry
def close_files(call, files):
    """Close files, in the order of their addresses; flags: with their owner, so nothing is unmapped first."""
    clear_result(call)
    owner = words_at(call[GUEST], OWNER_SLOTS)
    lock(call[GUEST])
    for k in range(files.shape[0]):
        lock(files[k])
    for k in range(files.shape[0]):
        header = words_at(files[k], HEADER_SLOTS)
        if not header[IS_CLOSED] and not call[FLAGS] and not owner[OWNER_IS_CLOSED]:
            unmap(files[k], U0, header[N_PAGES], table_at(call[CALL] + RESULT_AT, ROWS, U1))
        header[IS_CLOSED], header[MEMORY_WORDS], header[HOST_VIEW] = U1, U0, U0
    if call[FLAGS]:
        owner[OWNER_IS_CLOSED] = U1
    for k in range(files.shape[0]):
        unlock(files[k])
    unlock(call[GUEST])


# Lists of all locks. A fork takes them all: no operation is half done in the child, and no lock stays taken.


# How often all locks are taken, by which thread, and the lists in the order in which operations lock them.
LOCKS_TAKEN, LOCKS_THREAD, LOCKS_LISTS = numbers(3)


@inlined
def has_locks(locks):
    """Return whether this thread has all locks: it is about to fork, or just did."""
    return locks[LOCKS_TAKEN] != U0 and locks[LOCKS_THREAD] == this_thread()


@entry
def enlist(locks, list_, address):
    """Insert a header into a list, in the order of addresses."""
    lock(address if has_locks(locks) else list_)
    at = words_at(list_, NEXT + U1)
    while at[NEXT] != U0 and at[NEXT] < address:
        at = words_at(at[NEXT], NEXT + U1)
    words_at(address, NEXT + U1)[NEXT] = at[NEXT]
    at[NEXT] = address
    if not has_locks(locks):
        unlock(list_)


@entry
def delist(locks, list_, address):
    """Remove a header from a list."""
    if not has_locks(locks):
        lock(list_)
    at = words_at(list_, NEXT + U1)
    while at[NEXT] != U0 and at[NEXT] != address:
        at = words_at(at[NEXT], NEXT + U1)
    if at[NEXT] == address:
        at[NEXT] = words_at(address, NEXT + U1)[NEXT]
    if not has_locks(locks):
        unlock(list_)


@entry
def lock_all(locks):
    """Take every lock of each list; the thread that has them can take them again."""
    if has_locks(locks):
        locks[LOCKS_TAKEN] += U1
        return
    for k in range(LOCKS_LISTS, locks.shape[0]):
        address = locks[k]
        while address != U0:
            lock(address)
            address = words_at(address, NEXT + U1)[NEXT]
    locks[LOCKS_TAKEN], locks[LOCKS_THREAD] = U1, this_thread()


@entry
def unlock_all(locks):
    """Release every lock of each list, after as many calls as took them."""
    locks[LOCKS_TAKEN] -= U1
    if locks[LOCKS_TAKEN] == U0:
        for k in range(LOCKS_LISTS, locks.shape[0]):
            address = locks[k]
            while address != U0:
                after = words_at(address, NEXT + U1)[NEXT]
                unlock(address)
                address = after
