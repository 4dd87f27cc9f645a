"""Compiled loops over operations, for fleets: generators, and what a player and a tally ask of a batch.

Each does in one pass what takes NumPy many. Generators are defined by NumPy in ``behaviours/``; these fill
the same operations, and tests compare the two. Nothing here touches page state or guest memory.

Operations come as words, shape (n, 6): step, variant and guest in the first, then gpa, size, attributes,
flags and time.
"""

import numpy as np

from gmemcore.engine.jit import entry, inlined

U0, U1, U3, U12, U16, U32 = (np.uint64(n) for n in (0, 1, 3, 12, 16, 32))
LOW, STEP_MASK = np.uint64(0xFFFF_FFFF), np.uint64(0xFFFF)
GAMMA = np.uint64(0x9E37_79B9_7F4A_7C15)
FIRST, SECOND = np.uint64(0xBF58_476D_1CE4_E5B9), np.uint64(0x94D0_49BB_1331_11EB)
S27, S30, S31, S63 = (np.uint64(n) for n in (27, 30, 31, 63))
PAGE = np.uint64(1 << 12)
PRIVATE = np.uint64(8)


@inlined
def word(key, place):
    """Return a word of a stream (`gmemcore.workload.seeds`)."""
    z = (place + U1) * GAMMA + key
    z = (z ^ (z >> S30)) * FIRST
    z = (z ^ (z >> S27)) * SECOND
    return z ^ (z >> S31)


@inlined
def below(key, place, bound):
    """Return bits 64 to 127 of a word times a bound."""
    z = word(key, place)
    high, low = z >> U32, z & LOW
    bound_high, bound_low = bound >> U32, bound & LOW
    middle = high * bound_low
    carry = (middle & LOW) + ((low * bound_low) >> U32) + low * bound_high
    return high * bound_high + (middle >> U32) + (carry >> U32)


@inlined
def write(out, i, step, gpa, size, attributes):
    """Write one operation."""
    out[i, 0], out[i, 1], out[i, 2], out[i, 3], out[i, 4], out[i, 5] = step, gpa, size, attributes, U0, U0


# ---- generators ----------------------------------------------------------------------------------------
# A grid's ranges: rows of the number of cells up to the end of a range, the first cell's multiple of the
# cell's size less the cells before, start and end.


@inlined
def range_of(ranges, cell):
    """Return the range that a cell is in."""
    r = 0
    while cell >= ranges[r, 0]:
        r += 1
    return r


@entry
def scatter(out, start, places, rest, at, ranges, run_pages):
    """Fill out[start:] with conversions of 1 to `run_pages` pages anywhere; see `sweeps.scatter`."""
    cells = ranges[ranges.shape[0] - 1, 0]
    for k in range(out.shape[0] - start):
        place = at + np.uint64(k)
        cell = below(places, place, cells)
        r = range_of(ranges, cell)
        gpa = (cell + ranges[r, 1]) << U12
        drawn = word(rest, place)
        size = ((((drawn & LOW) * run_pages) >> U32) + U1) << U12
        room = ranges[r, 3] - gpa
        write(out, start + k, U0, gpa, size if size < room else room, (drawn >> S63) << U3)


@entry
def fragment(out, key, low, ranges, cell_size, pieces, run, attributes):
    """Fill `out` with the runs at places `low` and on; return their number; see `sweeps.fragmentation`."""
    cells = ranges[ranges.shape[0] - 1, 0]
    pages = (cell_size >> U12) // pieces
    stride = pages << U12
    longest = (pages - U1) << U12
    longest = run if run < longest else longest
    n = 0
    for k in range(out.shape[0]):
        place = low + np.uint64(k)
        cell, start = place % cells, place // cells * stride
        r = range_of(ranges, cell)
        at = (cell + ranges[r, 1]) * cell_size
        end = at + cell_size
        end = end if end < ranges[r, 3] else ranges[r, 3]
        at = at if at > ranges[r, 2] else ranges[r, 2]
        if start >= end - at:
            continue
        room = end - at - start
        room = room if room < stride else stride
        length = room if room < longest else longest
        ways = (room - length) >> U12
        ways = ways if ways > U1 else U1
        write(out, n, U0, at + start + (below(key, place, ways) << U12), length, attributes)
        n += 1
    return n


@entry
def churn(out, key, at, ranges, cell_size, is_on, sizes, steps):
    """Fill `out` with three operations per switched cell; see `devices.bounce_churn`.

    steps: for a cell that comes on, then for one that goes, the steps after its conversion.
    """
    cells = np.uint64(is_on.shape[0])
    for k in range(out.shape[0] // 3):
        cell = below(key, at + np.uint64(k), cells)
        r = range_of(ranges, cell)
        gpa = (cell + ranges[r, 1]) * cell_size
        end = gpa + cell_size
        end = end if end < ranges[r, 3] else ranges[r, 3]
        gpa = gpa if gpa > ranges[r, 2] else ranges[r, 2]
        size = sizes[cell] if sizes[cell] < end - gpa else end - gpa
        is_on[cell] = not is_on[cell]
        row = 0 if is_on[cell] else 1
        write(out, 3 * k, U0, gpa, size, U0 if is_on[cell] else PRIVATE)
        write(out, 3 * k + 1, steps[row, 0], gpa, size, U0)
        write(out, 3 * k + 2, steps[row, 1], gpa, size, U0)


@entry
def set_flags(operations, to_shared, to_private):
    """Set the flags of conversions, by direction; 0: leave them."""
    for k in range(operations.shape[0]):
        if operations[k, 0] & STEP_MASK == U0:
            if operations[k, 3] == U0 and to_shared:
                operations[k, 4] = to_shared
            elif operations[k, 3] == PRIVATE and to_private:
                operations[k, 4] = to_private


# ---- batches -------------------------------------------------------------------------------------------


@entry
def read_batch(operations, slots, variants, columns):
    """Read operations that all are one batch of one file; return the file, or -1 if they aren't.

    slots: rows of gpa, size, offset and file. variants: by step, the variants that a batch takes; 0: not the
    step. columns: rows for steps, offsets, sizes, attributes and flags (of a guest access: its variant).
    """
    of_all, s = -1, 0
    for k in range(operations.shape[0]):
        step = operations[k, 0] & STEP_MASK
        variant = (operations[k, 0] >> U16) & STEP_MASK
        if step >= np.uint64(variants.shape[0]) or variant >= variants[step]:
            return -1
        gpa, size = operations[k, 1], operations[k, 2]
        if not (gpa - slots[s, 0] < slots[s, 1] and size <= slots[s, 1] - (gpa - slots[s, 0])):
            s = 0
            while s < slots.shape[0] and not gpa - slots[s, 0] < slots[s, 1]:
                s += 1
            if s == slots.shape[0] or size > slots[s, 1] - (gpa - slots[s, 0]):
                return -1
        file = np.int64(slots[s, 3])
        if file != of_all and k > 0:
            return -1
        of_all = file
        columns[0, k], columns[1, k] = step, gpa - slots[s, 0] + slots[s, 2]
        columns[2, k], columns[3, k] = size, operations[k, 3]
        columns[4, k] = variant if step else operations[k, 4]
    return of_all


@entry
def count_sizes(operations, by_pages, counts):
    """Count conversions by size: counts[i] of 2^i to 2^(i+1) - 1 pages; none for less than a page.

    by_pages: zeros, a power of two of them. Most conversions are short, and counting them there has no branch
    that depends on their size.
    """
    few, last = np.uint64(by_pages.shape[0]), counts.shape[0] - 1
    for k in range(operations.shape[0]):
        if operations[k, 0] & STEP_MASK == U0:
            pages = operations[k, 2] >> U12
            if pages < few:
                by_pages[pages] += 1
            else:
                i = -1
                while pages:
                    pages >>= U1
                    i += 1
                counts[i if i < last else last] += 1
    low, i = 1, 0
    while low < by_pages.shape[0]:
        for pages in range(low, 2 * low):
            counts[i] += by_pages[pages]
        low, i = 2 * low, i + 1
