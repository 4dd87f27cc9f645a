"""Every Numba kernel, in one closed file: walks over bits and bytes belong together.

Callers pass validated, C-contiguous arrays.  A kernel never raises, never allocates and never waits;
it says what happened in the result column it was given.

Page state of one file
----------------------
``header``  uint64, one slot a name below: sizes and counters of the file that kernels read and write.
``words``   uint64, one a 2 MiB block of 512 pages: for each plane a field of ten bits, how many of the
            block's pages are set.  A count of 0 or of the whole block says everything about that plane.
``lines``   uint64, a bitmap a plane, one bit a page, shape (6, rows).  The eight words of a block, its line
            of that plane, are *true only while its count is neither 0 nor the whole block* (or while
            ``header[DENSE]`` is set), so uniform memory costs eight bytes a block, whatever its size.
``memory``  uint64, 512 a page: DRAM as the bus sees it; empty for a file that holds no bytes.
            The DRAM of a page that isn't allocated is zero.

Several planes at once are a mask of whole fields (``fields_of`` in ``state.py`` makes them), so that one word
of a block answers for all of them.

Page numbers and counts are uint64 and every constant is cast: a signed operand would make the arithmetic
signed (or float), and a signed index would cost the loops over memory their vector registers.
"""

import numpy as np

from gmemcore.engine.jit import inlined, kernel

U0, U1, U2, U3, U4, U7, U8 = (np.uint64(n) for n in (0, 1, 2, 3, 4, 7, 8))
U32, U63, U64 = np.uint64(32), np.uint64(63), np.uint64(64)
ONES = np.uint64(0xFFFF_FFFF_FFFF_FFFF)

PAGE_SHIFT, PAGE_MASK, PAGE_WORDS = np.uint64(12), np.uint64(4095), np.uint64(512)
ROW_SHIFT = np.uint64(6)  # a row: the 64 pages of one word of a line
BLOCK_SHIFT, BLOCK_PAGES, BLOCK_MASK = np.uint64(9), np.uint64(512), np.uint64(511)

# Planes, in the order of their fields in a block's word and of their lines in a record.
PRIVATE, ALLOCATED, ASSIGNED, ACCEPTED, PINNED, POISONED = (np.uint64(n) for n in range(6))
FIELD_BITS, FIELD = np.uint64(10), np.uint64(1023)
FIELD_ONES = np.uint64(
    sum(1 << 10 * plane for plane in range(6))
)  # times a number: that number in all fields
PRIVATE_FIELD, ALLOCATED_FIELD, ASSIGNED_FIELD, ACCEPTED_FIELD, PINNED_FIELD = (
    np.uint64(1023 << 10 * plane) for plane in range(5)
)

# Slots of the header: the file's size, whether all lines are kept true, its key stream's seed and first
# output, calls that transformed bytes, allocations left before one fails, the counter that assignment
# is counted in, whether memory begins at a cache line, and from TOTALS on the counters since creation.
N_PAGES, DENSE, SEED, FIRST_WORD, SCRAMBLES, ALLOCATIONS_LEFT, TRACKING, LINES_ALIGNED = (
    np.uint64(n) for n in range(8)
)
TOTALS = np.uint64(8)
HEADER_SLOTS = 18

# Rows of a result, one column a request; all start as 0, and only what isn't 0 is written: a million results
# are a hundred megabytes, most of which are never touched.  Counters are in the order of ``counters.py``.
REASON, ERROR_OFFSET = np.uint64(0), np.uint64(1)
PAGES_CHANGED, BYTES_ZEROED, BYTES_XORED, BYTES_SCRAMBLED, PAGES_ALLOCATED, RMP_UPDATES = (
    np.uint64(n) for n in range(2, 8)
)
SEPT_CHANGES, PAGES_ACCEPTED, BLOCKS_SPLIT, BLOCKS_MERGED = (np.uint64(n) for n in range(8, 12))
RESULT_ROWS = 12
COUNTERS_AT, COUNTERS = np.uint64(2), 10

PRIVATE_ATTRIBUTE = np.uint64(8)

# A survey of page state: where its answers are, and what it can find.
SURVEY_FOLDED, SURVEY_PAGE, SURVEY_MIXED, SURVEY_TOTALS = (np.uint64(n) for n in (0, 2, 3, 4))
SURVEY_SLOTS = 10
WRONG_COUNT, WRONG_ACCEPTED, WRONG_ASSIGNED, WRONG_PINNED = (np.uint64(n) for n in range(1, 5))
FOLD = np.uint64(0xD6E8_FEB8_6659_FD93)  # an odd number whose bits are spread

# Why a request was refused: the checks of a conversion in their order, then those of other steps; 0: done.
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
) = (np.uint64(n) for n in range(1, 22))

# The rules of one VM and phase: four words, a cell for each direction and flag, a row for each step.
KNOWN_FLAGS, KNOWN_ATTRIBUTES, HAS_PRIVATE_MEMORY, ERROR_OFFSET_CHECKED, CELLS = (
    np.uint64(n) for n in range(5)
)
REFUSAL, UNLESS, OPERATIONS, SET, CLEAR, PLAIN = (np.uint64(n) for n in range(6))
CELL_WORDS = np.uint64(6)  # PLAIN: a conversion that policy always allows, and that touches no byte
FLAG_SLOTS = np.uint64(65)  # no flag, and each of 64 bits

# A step's row: what it asks of the range, what refuses it whole or by page, what stays done of it when a page
# refuses, then bytes and planes.  Three rows a step, for the kinds of a guest's access.
# A term: wanted and unwanted planes, the reason, and the planes that the page it refuses is left with.
STEPS = np.uint64(4 + 2 * 65 * 6)
CONVERT = U0
STEP_VARIANTS, STEP_COUNT = np.uint64(3), 13
ALIGNED, SIGNED, WRAPS, ENDS_BELOW_TOP, BEYOND_END, STEP_REFUSAL, PARTIAL, TERMS = (
    np.uint64(n) for n in range(8)
)
TERM_WORDS, TERM_COUNT = np.uint64(4), 4
STEP_OPERATIONS, STEP_SET, STEP_CLEAR = (np.uint64(n) for n in range(23, 26))
STEP_WORDS = np.uint64(26)
PARTIAL_REFUSED, PARTIAL_DONE = U1, U2  # what was done stays: as a refusal, or as success if there is any

# Operations on the bytes of a page, four bits for each rank of page:
# unallocated, allocated, assigned, accepted (each includes the ones before).
NO_OPERATION, ZERO, XOR, SCRAMBLE, KEYSTREAM = (np.uint64(n) for n in range(5))
OPERATION_BITS, OPERATION = np.uint64(4), np.uint64(15)
ALL_DONE = np.uint64(16)  # no operation of any page: the end of a range
STREAM_PAGES = np.uint64(256)  # a range of a MiB is longer than what caches should keep of it

GOLDEN = np.uint64(0x9E37_79B9_7F4A_7C15)
AHEAD = np.uint64(32)  # requests: the memory of one that far ahead is asked for
NEVER = np.uint64(0xFFFF_FFFF_FFFF_FFFF)  # an allocation budget that never runs out


def prefetch(array, *index):
    """Ask for a word that will be needed soon (`jit.py` makes an instruction of it; here it does nothing)."""


def zero_line(array, index):
    """Zero the eight words of a cache line without reading it first (`jit.py` makes an instruction of it)."""
    array[index : index + U8] = U0


# ---- bits ---------------------------------------------------------------------------------------


@inlined
def popcount(x):
    """Set bits of a word (the compiler knows this form and emits one instruction)."""
    x = x - ((x >> U1) & np.uint64(0x5555_5555_5555_5555))
    x = (x & np.uint64(0x3333_3333_3333_3333)) + ((x >> U2) & np.uint64(0x3333_3333_3333_3333))
    x = (x + (x >> U4)) & np.uint64(0x0F0F_0F0F_0F0F_0F0F)
    return (x * np.uint64(0x0101_0101_0101_0101)) >> np.uint64(56)


@inlined
def lowest_bit(x):
    """Index of the lowest set bit; 64 for no bit."""
    return popcount(~x & (x - U1))


@inlined
def bits_between(low, high):
    """Bits low to high of a word, high excluded; 0 <= low < high <= 64."""
    return (ONES << low) & (ONES >> (U64 - high))


@inlined
def lowest_plane(fields):
    """Number of the first plane of a mask of fields."""
    return lowest_bit(fields) // FIELD_BITS


@inlined
def pages_of_block(n_pages, block):
    """How many pages of the file lie in a block: 512, or what is left for the last."""
    left = n_pages - (block << BLOCK_SHIFT)
    return left if left < BLOCK_PAGES else BLOCK_PAGES


# ---- writing page state -------------------------------------------------------------------------


@kernel
def write_uniform_line(lines, plane, block, pages, value):
    """Make a line true that its block's word alone spoke for: value on the pages that exist."""
    for r in range(8):
        row = (block << U3) + np.uint64(r)
        first = np.uint64(r) << ROW_SHIFT
        if pages >= first + U64:
            lines[plane, row] = value
        else:
            lines[plane, row] = value & bits_between(U0, pages - first) if pages > first else U0


@inlined
def write_row(lines, plane, row, mask, value):
    """Set or clear bits of one row; returns how many changed."""
    old = lines[plane, row]
    new = (old & ~mask) | (mask & value)
    lines[plane, row] = new
    return popcount(old ^ new)


@inlined
def write_rows(lines, plane, start, end, value):
    """Set (value = all ones) or clear (0) a plane over [start, end) of one block; returns what changed."""
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
    """Count events of request i, and in the file's totals."""
    if amount != U0:
        results[counter, i] += amount
        header[TOTALS + counter - COUNTERS_AT] += amount


@inlined
def tally_plane(header, results, i, plane, value, changed, split, merged):
    """Update the counters of a plane after some of its pages changed."""
    if plane == PRIVATE:
        tally(header, results, PAGES_CHANGED, i, changed)
        tally(header, results, BLOCKS_SPLIT, i, split)
        tally(header, results, BLOCKS_MERGED, i, merged)
    elif plane == ASSIGNED:
        tally(header, results, header[TRACKING], i, changed)
    elif plane == ALLOCATED:
        tally(header, results, PAGES_ALLOCATED, i, changed & value)
    elif plane == ACCEPTED:
        tally(header, results, PAGES_ACCEPTED, i, changed & value)


@inlined
def edit_block(header, words, lines, start, end, set_, clear, results, i):
    """Set and clear whole planes over pages [start, end) of one block."""
    block = start >> BLOCK_SHIFT
    pages = pages_of_block(header[N_PAGES], block)
    word = words[block]
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
            write_uniform_line(lines, plane, block, pages, ~value)
        changed = write_rows(lines, plane, start, end, value)
        after = before + changed if value else before - changed
        word += (after - before) << field
        became_uniform = after == target
        split = U1 if was_uniform and not became_uniform else U0
        merged = U1 if became_uniform and not was_uniform else U0
        tally_plane(header, results, i, plane, value, changed, split, merged)
    words[block] = word


@kernel
def edit_whole_blocks(header, words, lines, block, end_block, set_, clear, results, i):
    """Set and clear whole planes over whole blocks: their words say it all, plane by plane, then at once."""
    run = words[block:end_block]
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
        tally_plane(header, results, i, plane, value, changed, U0, mixed)
    for b in range(run.shape[0]):
        run[b] = (run[b] & keep) | put
    if header[DENSE]:
        write_whole_lines(lines, block << U3, end_block << U3, set_, clear)


@kernel
def write_whole_lines(lines, row, end_row, set_, clear):
    """Keep the lines of whole blocks true."""
    todo = set_ | clear
    while todo != U0:
        plane = lowest_plane(todo)
        field = plane * FIELD_BITS
        todo &= ~(FIELD << field)
        value = ONES if (set_ >> field) & U1 else U0
        for r in range(row, end_row):
            lines[plane, r] = value


@inlined
def edit(header, words, lines, start, end, set_, clear, results, i):
    """Set and clear whole planes over pages [start, end), and count it."""
    while start < end:
        stop = (start | BLOCK_MASK) + U1
        if start & BLOCK_MASK == U0 and stop <= end:
            stop = end & ~BLOCK_MASK
            edit_whole_blocks(
                header, words, lines, start >> BLOCK_SHIFT, stop >> BLOCK_SHIFT, set_, clear, results, i
            )
        else:
            stop = end if end < stop else stop
            edit_block(header, words, lines, start, stop, set_, clear, results, i)
        start = stop


# ---- reading page state -------------------------------------------------------------------------


@inlined
def plane_row(words, lines, n_pages, plane, row):
    """One row of a plane: a bit a page."""
    block = row >> U3
    count = (words[block] >> (plane * FIELD_BITS)) & FIELD
    if count == U0:
        return U0
    if count == pages_of_block(n_pages, block):
        return ONES
    return lines[plane, row]


@inlined
def matching_row(words, lines, n_pages, row, wanted, unwanted):
    """Bits of one row whose pages have every wanted plane set and no unwanted one."""
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
    """Whether the word of a block allows a page with the wanted planes set and the unwanted clear."""
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
def find_page(header, words, lines, start, end, wanted, unwanted):
    """First page of [start, end) with every wanted plane set and no unwanted one; end if there is none."""
    n_pages = header[N_PAGES]
    barren = ~words[start >> BLOCK_SHIFT]  # a word that is known to hold no such page; none yet
    while start < end:
        block = start >> BLOCK_SHIFT
        pages = pages_of_block(n_pages, block)
        stop = (block + U1) << BLOCK_SHIFT
        stop = end if end < stop else stop
        word = words[block]
        if word != barren:
            if block_may_match(word, pages, wanted, unwanted):
                while start < stop:
                    low = start & U63
                    high = stop - (start - low)
                    match = matching_row(words, lines, n_pages, start >> ROW_SHIFT, wanted, unwanted)
                    match &= bits_between(low, high if high < U64 else U64)
                    if match != U0:
                        return (start - low) + lowest_bit(match)
                    start += U64 - low
            elif pages == BLOCK_PAGES:
                barren = word
        start = stop
    return end


@kernel
def count_pages(header, words, lines, start, end, wanted, unwanted):
    """How many pages of [start, end) have every wanted plane set and no unwanted one."""
    n_pages = header[N_PAGES]
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
        count += popcount(match & bits_between(low, high if high < U64 else U64))
        start += U64 - low
    return count


@kernel
def write_lines(header, words, lines):
    """Make every line true, so that the records can be read without their words."""
    n_pages = header[N_PAGES]
    for b in range(words.shape[0]):
        block = np.uint64(b)
        pages = pages_of_block(n_pages, block)
        for p in range(6):
            plane = np.uint64(p)
            count = (words[block] >> (plane * FIELD_BITS)) & FIELD
            if count == U0 or count == pages:
                write_uniform_line(lines, plane, block, pages, ONES if count else U0)


@inlined
def fold(state, value):
    """A state that depends on all that was folded into it, in its order."""
    state = (state ^ value) * FOLD
    return state ^ (state >> U32)


@kernel
def survey(header, words, lines, out):
    """Look at all page state: fold it into two words, count it, and find where it contradicts itself.

    out: the two words, the number of the first page of a block that is wrong, private blocks that are mixed,
    and for each plane its pages.  Returns what is wrong, see `WRONG_COUNT` and those after it; 0: nothing.
    """
    n_pages = header[N_PAGES]
    low, high, mixed_blocks, plain = GOLDEN, n_pages, U0, U0
    for b in range(words.shape[0]):
        block = np.uint64(b)
        word = words[block]
        pages = pages_of_block(n_pages, block)
        low, high = fold(low, word), fold(high, word + GOLDEN)
        if word == U0:
            continue
        if word == pages:  # private and nothing else, as most of a large guest is
            plain += pages
            continue
        for p in range(lines.shape[0]):
            plane = np.uint64(p)
            count = (word >> (plane * FIELD_BITS)) & FIELD
            out[SURVEY_TOTALS + plane] += count
            if count == U0 or count == pages:
                continue
            row, found, sum_low, sum_high = block << U3, U0, U0, U0
            for r in range(8):
                bits = lines[p, row + np.uint64(r)]
                found += popcount(bits)
                key = GOLDEN * np.uint64(2 * r + 1)
                sum_low += (bits ^ (bits >> U32)) * key
                sum_high += (bits ^ (bits << U7)) * (key ^ FOLD)
            low, high = fold(low, sum_low), fold(high, sum_high)
            if p == 0:
                mixed_blocks += U1
            if found != count:
                out[SURVEY_PAGE] = block << BLOCK_SHIFT
                return WRONG_COUNT
        if word >> FIELD_BITS != U0:
            wrong = contradiction(words, lines, n_pages, block)
            if wrong != U0:
                out[SURVEY_PAGE] = block << BLOCK_SHIFT
                return wrong
    out[SURVEY_TOTALS + PRIVATE] += plain
    out[SURVEY_FOLDED], out[SURVEY_FOLDED + U1], out[SURVEY_MIXED] = low, high, mixed_blocks
    return U0


@kernel
def contradiction(words, lines, n_pages, block):
    """Which relation between planes a page of a block breaks; 0: none."""
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
def most_runs(header, words, plane):
    """How many runs of one plane there are at most, by the words of the blocks alone."""
    field, most = plane * FIELD_BITS, U1
    for b in range(words.shape[0]):
        count = (words[b] >> field) & FIELD
        fewer = count if count < BLOCK_PAGES - count else BLOCK_PAGES - count
        most += U2 * fewer + U2
    return most


@kernel
def list_runs(header, words, lines, plane, ends):
    """Write the end page of each run of one plane; returns how many. ends has room for `most_runs`."""
    n_pages = header[N_PAGES]
    field = plane * FIELD_BITS
    before = plane_row(words, lines, n_pages, plane, U0) & U1  # the page before, as the lowest bit
    runs, rows = U0, lines[plane]
    for b in range(words.shape[0]):
        block = np.uint64(b)
        first = block << BLOCK_SHIFT
        count = (words[block] >> field) & FIELD
        if count == U0 or count == pages_of_block(n_pages, block):
            value = U1 if count else U0
            ends[runs] = first
            runs += value ^ before
            before = value
            continue
        for r in range(block << U3, (block + U1) << U3):
            row = rows[r]
            edges = row ^ ((row << U1) | before)
            before = row >> U63
            # Written whether there is one or not: most rows have none or one, and nobody can predict which.
            ends[runs] = first + lowest_bit(edges)
            runs += U1 if edges else U0
            edges &= edges - U1
            while edges != U0:
                ends[runs] = first + lowest_bit(edges)
                runs += U1
                edges &= edges - U1
            first += U64
    while runs and ends[runs - U1] >= n_pages:  # bits beyond the end are clear, an edge that is none
        runs -= U1
    ends[runs] = n_pages
    return runs + U1


# ---- bytes --------------------------------------------------------------------------------------


@inlined
def mix(z):
    """SplitMix64's output function."""
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
    """Zero a view past the caches, which a long range would only push others out of."""
    for line in range(view.shape[0] >> 3):
        zero_line(view, line << 3)


@kernel
def xor_words(view, state):
    """XOR a contiguous view with the key stream that begins at this generator state.

    Here and below the state is added to: as a product of the index it would cost a third multiplication.
    """
    for i in range(view.shape[0]):
        view[i] ^= mix(state)
        state += GOLDEN


@kernel
def keystream_words(view, state):
    """Fill a contiguous view with the key stream: what a guest reads as zeros."""
    for i in range(view.shape[0]):
        view[i] = mix(state)
        state += GOLDEN


@kernel
def scramble_words(view, state):
    """Replace every byte of a view by a random one that differs from it.

    XOR with a stream whose zero bytes are made ones. One multiplication is random enough for that, and two
    would cost more than the memory does. (The test for zero bytes also finds ones; they stay ones.)
    """
    ones, tops = np.uint64(0x0101_0101_0101_0101), np.uint64(0x8080_8080_8080_8080)
    for i in range(view.shape[0]):
        z = (state ^ (state >> np.uint64(32))) * np.uint64(0xBF58_476D_1CE4_E5B9)
        z ^= z >> np.uint64(29)
        view[i] ^= z | (((z - ones) & ~z & tops) >> U7)
        state += GOLDEN


@inlined
def stream_state(seed, first_word, page):
    """Generator state that makes a page's first output (docs/spec.md, Key stream)."""
    return seed + (first_word + page * PAGE_WORDS + U1) * GOLDEN


@inlined
def expect(memory, page, operation):
    """Ask for a page whose bytes are to be read, and that no hardware sees coming behind a gap."""
    if (operation == XOR or operation == SCRAMBLE) and memory.shape[0]:
        for line in range(PAGE_WORDS >> U3):
            prefetch(memory, page * PAGE_WORDS + (line << U3))


@inlined
def operate(header, memory, operation, start, end, streams, results, i):
    """Do one operation to the bytes of pages [start, end), and count it; streams: past the caches."""
    size = (end - start) << PAGE_SHIFT
    if operation == ZERO:
        results[BYTES_ZEROED, i] += size
    elif operation == XOR:
        results[BYTES_XORED, i] += size
    elif operation == SCRAMBLE:
        results[BYTES_SCRAMBLED, i] += size
    if memory.shape[0] == 0:
        return
    view = memory[start * PAGE_WORDS : end * PAGE_WORDS]
    state = stream_state(header[SEED], header[FIRST_WORD], start)
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
    """Bits of a row whose pages' rank has this operation."""
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
def uniform_rank(word, pages):
    """Rank of every page of a block, from its word; 4 if they differ."""
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
def transform(header, words, lines, memory, operations, start, end, results, i):
    """Do to the bytes of each page of [start, end) what its rank says, in runs as long as they come.

    Writes nothing but those bytes and their counters in results, so that parts of a range may be transformed
    at the same time.
    """
    n_pages = header[N_PAGES]
    streams = header[LINES_ALIGNED] != U0 and end - start >= STREAM_PAGES
    run_operation, run_start = NO_OPERATION, start
    last_operation, last_start, last_end = (
        NO_OPERATION,
        start,
        start,
    )  # the run before, which is yet to be done
    row, allocated, assigned, accepted = ONES, U0, U0, U0
    while True:
        block = start >> BLOCK_SHIFT
        operation, stop = ALL_DONE, end
        if start < end:
            stop = (block + U1) << BLOCK_SHIFT
            rank = uniform_rank(words[block], pages_of_block(n_pages, block))
            if rank < U4:
                operation = (operations >> (rank * OPERATION_BITS)) & OPERATION
            else:
                if start >> ROW_SHIFT != row:
                    row = start >> ROW_SHIFT
                    allocated = plane_row(words, lines, n_pages, ALLOCATED, row)
                    assigned = plane_row(words, lines, n_pages, ASSIGNED, row)
                    accepted = plane_row(words, lines, n_pages, ACCEPTED, row)
                shift = start & U63
                operation = operation_of(operations, allocated, assigned, accepted, shift)
                same = operation_bits(operations, operation, allocated, assigned, accepted) >> shift
                length = lowest_bit(~same)
                stop = start + (length if length < U64 - shift else U64 - shift)
            stop = end if end < stop else stop
        if operation != run_operation:
            if run_operation != NO_OPERATION or operation == ALL_DONE:
                if last_operation != NO_OPERATION:
                    expect(memory, run_start, run_operation)
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
    """Operation of one page of a row."""
    rank = ((allocated >> page) & U1) + ((assigned >> page) & U1) + ((accepted >> page) & U1)
    return (operations >> (rank * OPERATION_BITS)) & OPERATION


@kernel
def xor_private(header, words, lines, first_word, buffer):
    """XOR the key stream into the words of a buffer that belong to private pages.

    buffer holds a copy of memory from first_word on; both views of a private page differ by this.
    """
    n_pages = header[N_PAGES]
    word, end = first_word, first_word + np.uint64(buffer.shape[0])
    while word < end:
        page = word // PAGE_WORDS
        stop = (page + U1) * PAGE_WORDS
        stop = end if end < stop else stop
        row = plane_row(words, lines, n_pages, PRIVATE, page >> ROW_SHIFT)
        if (row >> (page & U63)) & U1:
            state = header[SEED] + (header[FIRST_WORD] + word + U1) * GOLDEN
            xor_words(buffer[word - first_word : stop - first_word], state)
        word = stop


# ---- conversion ---------------------------------------------------------------------------------


@inlined
def refusal_of_arguments(rules, file_size, offset, size, attributes, flags, inputs):
    """Checks 3 to 10 (docs/spec.md, Checks in order), which look at the request alone; 0 if all pass."""
    if flags & ~rules[KNOWN_FLAGS]:
        return FLAGS_UNKNOWN
    if flags & (flags - U1):
        return FLAGS_MANY
    if rules[ERROR_OFFSET_CHECKED] and inputs[0]:
        return ERROR_OFFSET_SET
    if inputs[1]:
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
def takes_allocations(header, words, lines, start, end, to_private, allocates):
    """Check 13: whether the budget of allocations that tests set is enough; it is used up by what is made."""
    wanted, unwanted = (U0, PRIVATE_FIELD) if to_private else (PRIVATE_FIELD, U0)
    needed = U1 if find_page(header, words, lines, start, end, wanted, unwanted) < end else U0
    if allocates:
        needed += count_pages(header, words, lines, start, end, U0, ALLOCATED_FIELD)
    if needed > header[ALLOCATIONS_LEFT]:
        return False
    header[ALLOCATIONS_LEFT] -= needed
    return True


@inlined
def first_pinned(header, words, lines, start, end):
    """First pinned page of [start, end); end if there is none, which the words of blocks mostly tell."""
    blocks = words[start >> BLOCK_SHIFT : ((end - U1) >> BLOCK_SHIFT) + U1]
    union = U0
    for b in range(blocks.shape[0]):
        union |= blocks[b]
    if union & PINNED_FIELD == U0:
        return end
    return find_page(header, words, lines, start, end, PINNED_FIELD, U0)


@inlined
def cell_of(attributes, flags):
    """Where the rules of a direction and flag begin."""
    slot = lowest_bit(flags) + U1 if flags else U0
    return CELLS + (slot + (FLAG_SLOTS if attributes & PRIVATE_ATTRIBUTE else U0)) * CELL_WORDS


@inlined
def check_conversion(header, words, lines, rules, offset, size, attributes, flags, inputs, results, i):
    """Checks 3 to 14; whether the conversion passes them all. After that nothing may fail any more."""
    if inputs[0]:
        results[ERROR_OFFSET, i] = inputs[0]
    reason = refusal_of_arguments(
        rules, header[N_PAGES] << PAGE_SHIFT, offset, size, attributes, flags, inputs
    )
    if reason:
        results[REASON, i] = reason
        return False
    cell = cell_of(attributes, flags)
    start, end = offset >> PAGE_SHIFT, (offset + size) >> PAGE_SHIFT
    to_private = attributes & PRIVATE_ATTRIBUTE != U0
    page = start
    if rules[cell + REFUSAL]:
        reason = rules[cell + REFUSAL]
    elif rules[cell + UNLESS] and find_page(header, words, lines, start, end, rules[cell + UNLESS], U0) < end:
        reason = MODE_UNSUPPORTED
    elif header[ALLOCATIONS_LEFT] != NEVER and not takes_allocations(
        header, words, lines, start, end, to_private, rules[cell + SET] & ALLOCATED_FIELD
    ):
        reason = NO_MEMORY
    elif to_private:
        page = first_pinned(header, words, lines, start, end)
        if page < end:
            reason = PAGE_PINNED
    if reason:
        results[REASON, i] = reason
        results[ERROR_OFFSET, i] = page << PAGE_SHIFT
        return False
    return True


@inlined
def convert(header, words, lines, memory, rules, offset, size, attributes, flags, inputs, results, i):
    """KVM_SET_MEMORY_ATTRIBUTES2 on one file, one request: all or nothing."""
    if not check_conversion(header, words, lines, rules, offset, size, attributes, flags, inputs, results, i):
        return
    # ---- point of no return: nothing below may fail ----
    cell = cell_of(attributes, flags)
    start, end = offset >> PAGE_SHIFT, (offset + size) >> PAGE_SHIFT
    if rules[cell + OPERATIONS]:
        transform(header, words, lines, memory, rules[cell + OPERATIONS], start, end, results, i)
    finish_conversion(header, words, lines, rules, cell, start, end, results, i)


@inlined
def convert_short(header, words, lines, rules, n_whole, offset, size, attributes, flags, results, i):
    """`convert` for what most short requests are, with hardly a branch; whether the request was one of them.

    It is about one or two rows, of whole blocks whose private plane is mixed and the only one that changes,
    and moves no byte; or nothing changes, or a pinned page refuses it. Wherever that isn't so, or might be
    refused otherwise, nothing was done.
    """
    cell = cell_of(attributes, flags)
    wrong = (offset | size) & PAGE_MASK | attributes & ~PRIVATE_ATTRIBUTE | flags & (flags - U1)
    start, end = offset >> PAGE_SHIFT, (offset + size) >> PAGE_SHIFT
    row, last = start >> ROW_SHIFT, (end - U1) >> ROW_SHIFT
    if wrong or not rules[cell + PLAIN] or start >= end or end > n_whole or row + U1 < last:
        return False
    set_ = rules[cell + SET]
    value = U0 - (set_ & U1)  # all ones to private: the direction is the one thing that nobody can predict
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
        return differ & (others | PRIVATE_FIELD) == U0  # nothing is left to do where all is as it should be
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
def finish_conversion(header, words, lines, rules, cell, start, end, results, i):
    """What follows on the bytes: page state, and totals."""
    if rules[cell + OPERATIONS]:
        header[SCRAMBLES] += U1
        total_bytes(header, results, i)
    edit(header, words, lines, start, end, rules[cell + SET], rules[cell + CLEAR], results, i)
    accepted = results[PAGES_ACCEPTED, i]
    if accepted:  # counts what guest or populate accept; a conversion's is bytes_xored
        results[PAGES_ACCEPTED, i] = U0
        header[TOTALS + PAGES_ACCEPTED - COUNTERS_AT] -= accepted


@inlined
def total_bytes(header, results, i):
    """Add the bytes of a request to the file's totals: `transform` itself writes no header."""
    for counter in range(BYTES_ZEROED, BYTES_SCRAMBLED + U1):
        header[TOTALS + counter - COUNTERS_AT] += results[counter, i]


# ---- other steps --------------------------------------------------------------------------------


@inlined
def row_of(step, variant):
    """Where the rules of a step and variant begin."""
    return STEPS + (step * STEP_VARIANTS + variant) * STEP_WORDS


@kernel
def refusal_of_range(rules, row, offset, size):
    """Whether a step's range can be one at all; 0 if it can."""
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
def check_step(header, words, lines, rules, row, offset, size, results, i):
    """Find what refuses a step; changes no page state.

    Returns the end of the pages to process (the start if none), the page that refuses (the end if none), and
    the planes to leave that page with.
    """
    n_pages = header[N_PAGES]
    start = offset >> PAGE_SHIFT
    reason = refusal_of_range(rules, row, offset, size)
    if reason:
        results[REASON, i] = reason
        results[ERROR_OFFSET, i] = offset
        return start, start, U0
    last = offset + size - U1
    end = (last >> PAGE_SHIFT) + U1 if last >= offset else ONES  # a range that wraps goes beyond the end
    if end > n_pages:  # a page that doesn't exist refuses too, if none before it does
        end = n_pages if start < n_pages else start
        reason = rules[row + BEYOND_END]
    stop, mark = end, U0  # the first page that refuses, and what it is left with
    if rules[row + STEP_REFUSAL]:
        reason, stop = rules[row + STEP_REFUSAL], start
    for t in range(TERM_COUNT):
        term = row + TERMS + np.uint64(t) * TERM_WORDS
        if rules[term + U2] and start < stop:
            page = find_page(header, words, lines, start, stop, rules[term], rules[term + U1])
            if page < stop:
                reason, mark, stop = rules[term + U2], rules[term + U3], page
    if reason == U0:
        return end, end, U0
    if rules[row + PARTIAL] != PARTIAL_DONE or stop == start:
        results[REASON, i] = reason
        results[ERROR_OFFSET, i] = stop << PAGE_SHIFT
    return stop if rules[row + PARTIAL] else start, stop, mark


@kernel
def take_step(header, words, lines, memory, rules, row, offset, size, results, i):
    """A step that isn't a conversion: what refuses it by page, then bytes by rank, then planes."""
    start = offset >> PAGE_SHIFT
    end, refused, mark = check_step(header, words, lines, rules, row, offset, size, results, i)
    if mark:
        edit(header, words, lines, refused, refused + U1, mark, U0, results, i)
    if start < end:
        apply_checked(
            header,
            words,
            lines,
            memory,
            start,
            end,
            rules[row + STEP_OPERATIONS],
            rules[row + STEP_SET],
            rules[row + STEP_CLEAR],
            results,
            i,
        )


@kernel
def apply_checked(header, words, lines, memory, start, end, operations, set_, clear, results, i):
    """Bytes by rank, then planes, over [start, end)."""
    if operations != U0:
        transform(header, words, lines, memory, operations, start, end, results, i)
        total_bytes(header, results, i)
    edit(header, words, lines, start, end, set_, clear, results, i)


# ---- entries: what the engine calls, beside those above that it calls for a range in parts ---------


@kernel
def apply(header, words, lines, memory, start, end, operations, set_, clear, results):
    """Change page state over [start, end) in a way that the machine has checked."""
    apply_checked(header, words, lines, memory, start, end, operations, set_, clear, results, U0)


@kernel
def run(header, words, lines, memory, rules, steps, offsets, sizes, attributes, flags, inputs, results):
    """N requests in order; results[:, i] says what became of request i.

    steps, attributes and flags are a number each request, or one for all. A conversion is step 0; the flags
    of any other step are its variant.
    """
    each_step = U1 if steps.shape[0] > 1 else U0
    each_attributes = U1 if attributes.shape[0] > 1 else U0
    each_flags = U1 if flags.shape[0] > 1 else U0
    n, rows = np.uint64(offsets.shape[0]), np.uint64(lines.shape[1])
    # Pages of whole blocks, in which short requests are quick; none if there is more than usual to check.
    is_usual = inputs[0] | inputs[1] == U0 and header[ALLOCATIONS_LEFT] == NEVER
    n_whole = header[N_PAGES] & ~BLOCK_MASK if is_usual else U0
    for k in range(offsets.shape[0]):
        i = np.uint64(k)
        soon = i + AHEAD
        if soon < n:
            row = offsets[soon] >> (PAGE_SHIFT + ROW_SHIFT)
            row = row if row < rows else U0
            prefetch(words, row >> U3)
            prefetch(lines, PRIVATE, row)
            row = (offsets[soon] + sizes[soon] - U1) >> (PAGE_SHIFT + ROW_SHIFT)
            prefetch(lines, PRIVATE, row if row < rows else U0)
            # Whether pins are to be looked at is known when the word is there: from half as far away.
            row = offsets[i + AHEAD // U2] >> (PAGE_SHIFT + ROW_SHIFT)
            row = row if row < rows else U0
            prefetch(lines, PINNED if words[row >> U3] & PINNED_FIELD else PRIVATE, row)
        step, offset, size, flag = steps[i * each_step], offsets[i], sizes[i], flags[i * each_flags]
        if step == CONVERT:
            attribute = attributes[i * each_attributes]
            if not convert_short(
                header, words, lines, rules, n_whole, offset, size, attribute, flag, results, i
            ):
                convert(
                    header, words, lines, memory, rules, offset, size, attribute, flag, inputs, results, i
                )
        elif step < np.uint64(STEP_COUNT) and flag < STEP_VARIANTS:
            row = row_of(step, flag)
            take_step(header, words, lines, memory, rules, row, offset, size, results, i)
        else:
            results[REASON, i] = INVALID
            results[ERROR_OFFSET, i] = offset
