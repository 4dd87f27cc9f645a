"""Every Numba kernel, in one closed file: walks over bits and bytes belong together.

Callers pass validated, C-contiguous arrays.  A kernel never raises, never allocates and never waits;
it says what happened in the result row it was given.

Page state of one file
----------------------
``header``  uint64, one slot a name below: sizes and counters of the file that kernels read and write.
``words``   uint64, one a 2 MiB block of 512 pages: for each plane, how many of the block's pages are set
            (ten bits a plane).  A count of 0 or of the whole block says everything about that plane.
``lines``   uint64, one 48-word record a block: for each plane eight words, one bit a page.  A plane's line
            is *true only while its count is neither 0 nor the whole block* (or while ``header[DENSE]``
            is set), so uniform memory costs eight bytes a block, whatever its size.
``memory``  uint64, 512 a page: DRAM as the bus sees it; empty for a file that holds no bytes.
            The DRAM of a page that isn't allocated is zero.

Page numbers and counts are uint64 and every constant is cast: a signed operand would make the arithmetic
signed (or float), and a signed index would cost the loops over memory their vector registers.
"""

import numpy as np

from gmemcore.engine.jit import kernel

U0, U1, U2, U3, U4, U7, U8 = (np.uint64(n) for n in (0, 1, 2, 3, 4, 7, 8))
U63, U64 = np.uint64(63), np.uint64(64)
ONES = np.uint64(0xFFFF_FFFF_FFFF_FFFF)

PAGE_SHIFT, PAGE_MASK, PAGE_WORDS = np.uint64(12), np.uint64(4095), np.uint64(512)
ROW_SHIFT = np.uint64(6)  # a row: the 64 pages of one word of a line
BLOCK_SHIFT, BLOCK_PAGES = np.uint64(9), np.uint64(512)

# Planes, in the order of their fields in a block's word and of their lines in its record.
PRIVATE, ALLOCATED, ASSIGNED, ACCEPTED, PINNED, POISONED = (np.uint64(n) for n in range(6))
PLANES = np.uint64(6)
FIELD_BITS, FIELD = np.uint64(10), np.uint64(1023)
RECORD_WORDS = np.uint64(48)  # 6 planes of 8 words; not a power of two, which would collide in the caches
PINNED_FIELD = np.uint64(1023 << 40)

# Slots of the header: the file's size, whether all lines are kept true, its key stream's seed and first
# output, calls that transformed bytes, allocations left before one fails, the result column that assignment
# is counted in, and from TOTALS on the counters since creation.
N_PAGES, DENSE, SEED, FIRST_WORD, SCRAMBLES, ALLOCATIONS_LEFT, TRACKING = (np.uint64(n) for n in range(7))
TOTALS = 8
HEADER_SLOTS = 18

# Columns of a result row; counters are those of SPEC 10, in its order.
REASON, ERROR_OFFSET = np.uint64(0), np.uint64(1)
PAGES_CHANGED, BYTES_ZEROED, BYTES_XORED, BYTES_SCRAMBLED, PAGES_ALLOCATED, RMP_UPDATES = (
    np.uint64(n) for n in range(2, 8)
)
SEPT_CHANGES, PAGES_ACCEPTED, BLOCKS_SPLIT, BLOCKS_MERGED = (np.uint64(n) for n in range(8, 12))
RESULT_COLUMNS = 12
COUNTERS_AT, COUNTERS = 2, 10

# Columns of a conversion request.
OFFSET, SIZE, ATTRIBUTES, FLAGS, ERROR_OFFSET_IN, RESERVED = (np.uint64(n) for n in range(6))
REQUEST_COLUMNS = 6
PRIVATE_ATTRIBUTE = np.uint64(8)

# Why a request was refused, in the order of the checks; 0 is success.
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
) = (np.uint64(n) for n in range(1, 13))

# The rules of one VM and phase: four words, then a cell for each direction and flag.
KNOWN_FLAGS, KNOWN_ATTRIBUTES, HAS_PRIVATE_MEMORY, ERROR_OFFSET_CHECKED, CELLS = (
    np.uint64(n) for n in range(5)
)
REFUSAL, UNLESS, OPERATIONS, SET, CLEAR = (np.uint64(n) for n in range(5))
CELL_WORDS = np.uint64(5)
FLAG_SLOTS = np.uint64(65)  # no flag, and each of 64 bits
RULES_WORDS = 4 + 2 * 65 * 5

# Operations on the bytes of a page, four bits for each rank of page:
# unallocated, allocated, assigned, accepted (each includes the ones before).
NO_OPERATION, ZERO, XOR, SCRAMBLE, KEYSTREAM = (np.uint64(n) for n in range(5))
OPERATION_BITS, OPERATION = np.uint64(4), np.uint64(15)

GOLDEN = np.uint64(0x9E37_79B9_7F4A_7C15)
NEVER = np.uint64(0xFFFF_FFFF_FFFF_FFFF)  # an allocation budget that never runs out


# ---- bits ---------------------------------------------------------------------------------------


@kernel
def popcount(x):
    """Set bits of a word (the compiler knows this form and emits one instruction)."""
    x = x - ((x >> U1) & np.uint64(0x5555_5555_5555_5555))
    x = (x & np.uint64(0x3333_3333_3333_3333)) + ((x >> U2) & np.uint64(0x3333_3333_3333_3333))
    x = (x + (x >> U4)) & np.uint64(0x0F0F_0F0F_0F0F_0F0F)
    return (x * np.uint64(0x0101_0101_0101_0101)) >> np.uint64(56)


@kernel
def lowest_bit(x):
    """Index of the lowest set bit; 64 for no bit."""
    return popcount(~x & (x - U1))


@kernel
def bits_between(low, high):
    """Bits low to high of a word, high excluded; 0 <= low < high <= 64."""
    return (ONES << low) & (ONES >> (U64 - high))


@kernel
def pages_of_block(n_pages, block):
    """How many pages of the file lie in a block: 512, or what is left for the last."""
    left = n_pages - (block << BLOCK_SHIFT)
    return left if left < BLOCK_PAGES else BLOCK_PAGES


@kernel
def row_bits(pages, row_in_block, value):
    """A row of a uniform plane: value on the rows' pages that exist."""
    first = row_in_block << ROW_SHIFT
    if pages <= first:
        return U0
    return value & bits_between(U0, pages - first if pages - first < U64 else U64)


@kernel
def write_uniform_line(lines, base, pages, value):
    """Make a line true that its block's word alone spoke for."""
    for row in range(U8):
        lines[base + np.uint64(row)] = row_bits(pages, np.uint64(row), value)


@kernel
def write_bits(header, words, lines, plane, value, start, end):
    """Set (value = all ones) or clear (value = 0) one plane over pages [start, end).

    Returns how many pages changed, and how many blocks ceased and began to be uniform.
    """
    n_pages, dense = header[N_PAGES], header[DENSE]
    field = FIELD_BITS * plane
    sign = ~value | U1
    changed, split, merged = U0, U0, U0
    row, last = start >> ROW_SHIFT, (end - U1) >> ROW_SHIFT
    mask = ONES << (start & U63)
    while row <= last:
        block = row >> U3
        pages = pages_of_block(n_pages, block)
        first_page = block << BLOCK_SHIFT
        word = words[block]
        before = (word >> field) & FIELD
        target = pages & value
        base = block * RECORD_WORDS + (plane << U3)
        next_row = (block + U1) << U3
        if before == target:
            row, mask = next_row, ONES
            continue
        uniform_before = before == U0 or before == pages
        if start <= first_page and end >= first_page + pages:
            step = before if target == U0 else pages - before
            if dense:
                write_uniform_line(lines, base, pages, value)
            row, mask = next_row, ONES
        else:
            if uniform_before:
                write_uniform_line(lines, base, pages, ~value)
            step = U0
            stop = last + U1 if last < next_row else next_row
            while row < stop:
                if row == last:
                    mask &= ONES >> (U63 - ((end - U1) & U63))
                slot = base + (row & U7)
                old = lines[slot]
                new = (old & ~mask) | (mask & value)
                lines[slot] = new
                step += popcount(old ^ new)
                mask = ONES
                row += U1
        after = before + step * sign
        words[block] = word + ((step * sign) << field)
        changed += step
        if uniform_before:
            split += U1 if after != target else U0
        else:
            merged += U1 if after == target else U0
    return changed, split, merged


@kernel
def edit(header, words, lines, start, end, set_, clear, result):
    """Set and clear whole planes over [start, end), counting what SPEC 10 counts."""
    todo = set_ | clear
    while todo != U0:
        plane = lowest_bit(todo)
        bit = U1 << plane
        todo ^= bit
        value = ONES if set_ & bit else U0
        changed, split, merged = write_bits(header, words, lines, plane, value, start, end)
        if plane == PRIVATE:
            result[PAGES_CHANGED] += changed
            result[BLOCKS_SPLIT] += split
            result[BLOCKS_MERGED] += merged
        elif plane == ASSIGNED:
            result[header[TRACKING]] += changed
        elif plane == ALLOCATED:
            result[PAGES_ALLOCATED] += changed & value
        elif plane == ACCEPTED:
            result[PAGES_ACCEPTED] += changed & value


@kernel
def matching_row(words, lines, n_pages, row, wanted, unwanted):
    """Bits of one row whose pages have every wanted plane set and no unwanted one."""
    block = row >> U3
    pages = pages_of_block(n_pages, block)
    word = words[block]
    match = ONES
    for p in range(PLANES):
        plane = np.uint64(p)
        bit = U1 << plane
        if (wanted | unwanted) & bit:
            count = (word >> (FIELD_BITS * plane)) & FIELD
            if count == U0:
                line = U0
            elif count == pages:
                line = ONES
            else:
                line = lines[block * RECORD_WORDS + (plane << U3) + (row & U7)]
            match &= line if wanted & bit else ~line
    return match


@kernel
def block_may_match(word, pages, wanted, unwanted):
    """Whether the word of a block allows a page with the wanted planes set and the unwanted clear."""
    for p in range(PLANES):
        plane = np.uint64(p)
        bit = U1 << plane
        count = (word >> (FIELD_BITS * plane)) & FIELD
        if (wanted & bit and count == U0) or (unwanted & bit and count == pages):
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
    count = U0
    while start < end:
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
        for p in range(PLANES):
            plane = np.uint64(p)
            count = (words[block] >> (FIELD_BITS * plane)) & FIELD
            if count == U0 or count == pages:
                write_uniform_line(lines, block * RECORD_WORDS + (plane << U3), pages, ONES if count else U0)


@kernel
def list_runs(header, words, lines, plane, ends):
    """Write the end page of each run of one plane into ends, as far as it reaches; returns how many."""
    n_pages = header[N_PAGES]
    bit = U1 << plane
    runs, page = 0, U0
    inside = find_page(header, words, lines, U0, U1, bit, U0) == U0
    while page < n_pages:
        if inside:
            page = find_page(header, words, lines, page, n_pages, U0, bit)
        else:
            page = find_page(header, words, lines, page, n_pages, bit, U0)
        inside = not inside
        if runs < ends.shape[0]:
            ends[runs] = page
        runs += 1
    return runs


# ---- bytes --------------------------------------------------------------------------------------


@kernel
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


@kernel
def stream_state(seed, first_word, page):
    """Generator state that makes a page's first output, in the numbering of SPEC 3."""
    return seed + (first_word + page * PAGE_WORDS + U1) * GOLDEN


@kernel
def operate(header, memory, operation, start, end, result):
    """Do one operation to the bytes of pages [start, end), and count it."""
    size = (end - start) << PAGE_SHIFT
    if operation == ZERO:
        result[BYTES_ZEROED] += size
    elif operation == XOR:
        result[BYTES_XORED] += size
    elif operation == SCRAMBLE:
        result[BYTES_SCRAMBLED] += size
    if memory.shape[0] == 0:
        return
    view = memory[start * PAGE_WORDS : end * PAGE_WORDS]
    state = stream_state(header[SEED], header[FIRST_WORD], start)
    if operation == ZERO:
        zero_words(view)
    elif operation == XOR:
        xor_words(view, state)
    elif operation == SCRAMBLE:
        scramble_words(view, state + mix(header[SCRAMBLES] * GOLDEN))
    elif operation == KEYSTREAM:
        keystream_words(view, state)


@kernel
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


@kernel
def uniform_rank(word, pages):
    """Rank of every page of a block, from its word; 4 if they differ."""
    rank = U0
    for p in range(ALLOCATED, PINNED):
        count = (word >> (FIELD_BITS * np.uint64(p))) & FIELD
        if count == pages:
            rank += U1
        elif count != U0:
            return U4
    return rank


@kernel
def transform(header, words, lines, memory, operations, start, end, result):
    """Do to the bytes of each page of [start, end) what its rank says, in runs as long as they come."""
    n_pages = header[N_PAGES]
    run_operation, run_start, run_end = NO_OPERATION, start, start
    while start < end:
        block = start >> BLOCK_SHIFT
        pages = pages_of_block(n_pages, block)
        stop = (block + U1) << BLOCK_SHIFT
        stop = end if end < stop else stop
        rank = uniform_rank(words[block], pages)
        if rank < U4:
            low, high = U0, stop - start
            operation = (operations >> (rank * OPERATION_BITS)) & OPERATION
            todo = U1 if operation != NO_OPERATION else U0
        else:
            row = start >> ROW_SHIFT
            stop = (row + U1) << ROW_SHIFT
            stop = end if end < stop else stop
            shift = start & U63
            allocated = matching_row(words, lines, n_pages, row, U1 << ALLOCATED, U0)
            assigned = matching_row(words, lines, n_pages, row, U1 << ASSIGNED, U0)
            accepted = matching_row(words, lines, n_pages, row, U1 << ACCEPTED, U0)
            todo = ~operation_bits(operations, NO_OPERATION, allocated, assigned, accepted) >> shift
            todo &= bits_between(U0, stop - start)
        while todo != U0:
            if rank == U4:
                low = lowest_bit(todo)
                operation = operation_of(operations, allocated, assigned, accepted, shift + low)
                same = operation_bits(operations, operation, allocated, assigned, accepted) >> shift
                high = low + lowest_bit(~((same & todo) >> low))
                todo &= ~bits_between(low, high)
            else:
                todo = U0
            if operation != run_operation or start + low != run_end:
                if run_operation != NO_OPERATION:
                    operate(header, memory, run_operation, run_start, run_end, result)
                run_operation, run_start = operation, start + low
            run_end = start + high
        start = stop
    if run_operation != NO_OPERATION:
        operate(header, memory, run_operation, run_start, run_end, result)


@kernel
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
        row = matching_row(words, lines, n_pages, page >> ROW_SHIFT, U1 << PRIVATE, U0)
        if (row >> (page & U63)) & U1:
            state = header[SEED] + (header[FIRST_WORD] + word + U1) * GOLDEN
            xor_words(buffer[word - first_word : stop - first_word], state)
        word = stop


@kernel
def account(header, result):
    """Add the counters of one result row to the file's totals."""
    for i in range(COUNTERS):
        header[TOTALS + i] += result[COUNTERS_AT + i]


# ---- entries: what the engine calls -------------------------------------------------------------


@kernel
def apply(header, words, lines, memory, start, end, operations, set_, clear, result):
    """Bytes by rank, then planes, over [start, end): every change of page state that isn't a conversion."""
    result[:] = U0
    if operations != U0:
        transform(header, words, lines, memory, operations, start, end, result)
    edit(header, words, lines, start, end, set_, clear, result)
    account(header, result)


@kernel
def refusal_of_arguments(rules, file_size, request):
    """Checks 3 to 10 of SPEC 5, those that look at nothing but the request; 0 if it may go on."""
    flags, offset, size = request[FLAGS], request[OFFSET], request[SIZE]
    if flags & ~rules[KNOWN_FLAGS]:
        return FLAGS_UNKNOWN
    if flags & (flags - U1):
        return FLAGS_MANY
    if rules[ERROR_OFFSET_CHECKED] and request[ERROR_OFFSET_IN]:
        return ERROR_OFFSET_SET
    if request[RESERVED]:
        return RESERVED_SET
    if not rules[HAS_PRIVATE_MEMORY]:
        return NO_PRIVATE_MEMORY
    if request[ATTRIBUTES] & ~rules[KNOWN_ATTRIBUTES]:
        return ATTRIBUTE_UNKNOWN
    if size == U0 or offset + size < offset:
        return RANGE_EMPTY
    if (offset | size) & PAGE_MASK:
        return RANGE_UNALIGNED
    if offset >= file_size or offset + size > file_size:
        return RANGE_BEYOND_END
    return U0


@kernel
def refusal_of_state(header, words, lines, rules, cell, start, end, to_private, result):
    """Checks 11 to 14 of SPEC 5, those that look at page state; 0 and nothing may fail any more."""
    result[ERROR_OFFSET] = start << PAGE_SHIFT
    if rules[cell + REFUSAL]:
        return rules[cell + REFUSAL]
    unless = rules[cell + UNLESS]
    if unless and find_page(header, words, lines, start, end, unless, U0) < end:
        return MODE_UNSUPPORTED
    if header[ALLOCATIONS_LEFT] != NEVER:
        target = U1 << PRIVATE
        wanted, unwanted = (U0, target) if to_private else (target, U0)
        needed = U1 if find_page(header, words, lines, start, end, wanted, unwanted) < end else U0
        if rules[cell + SET] & (U1 << ALLOCATED):
            needed += count_pages(header, words, lines, start, end, U0, U1 << ALLOCATED)
        if needed > header[ALLOCATIONS_LEFT]:
            return NO_MEMORY
        header[ALLOCATIONS_LEFT] -= needed
    if to_private:
        pinned = U0
        for block in range(start >> BLOCK_SHIFT, ((end - U1) >> BLOCK_SHIFT) + U1):
            pinned |= words[block] & PINNED_FIELD
        if pinned:
            page = find_page(header, words, lines, start, end, U1 << PINNED, U0)
            if page < end:
                result[ERROR_OFFSET] = page << PAGE_SHIFT
                return PAGE_PINNED
    return U0


@kernel
def convert(header, words, lines, memory, rules, requests, results):
    """KVM_SET_MEMORY_ATTRIBUTES2 on one file: N requests in order, each all or nothing (SPEC 5).

    results[i] is the reason of refusal (0: done), the error_offset and the counters of requests[i].
    """
    file_size = header[N_PAGES] << PAGE_SHIFT
    for i in range(requests.shape[0]):
        request, result = requests[i], results[i]
        result[:] = U0
        result[ERROR_OFFSET] = request[ERROR_OFFSET_IN]
        result[REASON] = refusal_of_arguments(rules, file_size, request)
        if result[REASON]:
            continue
        start = request[OFFSET] >> PAGE_SHIFT
        end = start + (request[SIZE] >> PAGE_SHIFT)
        to_private = request[ATTRIBUTES] & PRIVATE_ATTRIBUTE != U0
        slot = lowest_bit(request[FLAGS]) + U1 if request[FLAGS] else U0
        cell = CELLS + (slot + (FLAG_SLOTS if to_private else U0)) * CELL_WORDS
        result[REASON] = refusal_of_state(header, words, lines, rules, cell, start, end, to_private, result)
        if result[REASON]:
            continue
        # ---- point of no return: nothing below may fail ----
        result[ERROR_OFFSET] = request[ERROR_OFFSET_IN]
        operations = rules[cell + OPERATIONS]
        if operations:
            header[SCRAMBLES] += U1
            transform(header, words, lines, memory, operations, start, end, result)
        edit(header, words, lines, start, end, rules[cell + SET], rules[cell + CLEAR], result)
        result[PAGES_ACCEPTED] = U0  # counts what guest or populate accept; a conversion's is bytes_xored
        account(header, result)
