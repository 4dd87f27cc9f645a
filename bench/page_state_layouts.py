"""Which layout should page state have?  The measurement behind the answer of docs/engine.md.

Converts random ranges of 1 to 64 pages to private and back, attributes only, over five layouts:

flat       one packed bitmap per plane, planes apart
rows       one 64-byte row a 64 pages, holding every plane
rows+word  the same rows, and one summary word per 2 MiB block: the count of set pages of each plane
records    the same words, and a 384-byte record per block: a 64-byte line per plane, valid only while mixed
bitmaps    the same words and lines, the lines of a plane side by side (the engine's)

The last three also answer a uniform conversion of the whole guest from the words alone.

Run: ``python bench/page_state_layouts.py [--ranges N]``
"""

import argparse
import statistics
import time

import numba
import numpy as np

PLANES = 5
PAGES_PER_GIB = 1 << 18
U0, U1, U6, U63, U64 = (np.uint64(n) for n in (0, 1, 6, 63, 64))
U9, U10, U511, U512 = (np.uint64(n) for n in (9, 10, 511, 512))
ONES = np.uint64(0xFFFFFFFFFFFFFFFF)
DETAIL = np.uint64(1 << 63)

jit = numba.njit(nogil=True, _nrt=False)  # as the engine compiles


@jit
def ones_of_row(row, start, end):
    """Bits of pages [start, end) that lie in one row of 64 pages."""
    low = start - row * U64 if start > row * U64 else U0
    high = end - row * U64 if end < (row + U1) * U64 else U64
    return (ONES << low) & (ONES >> (U64 - high))


@jit
def popcount(x):
    x = x - ((x >> U1) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (x * np.uint64(0x0101010101010101)) >> np.uint64(56)


@jit
def convert_flat(private, allocated, assigned, accepted, pinned, starts, ends, to_private):
    changed = U0
    for i in range(starts.shape[0]):
        start, end = starts[i], ends[i]
        blocked = U0
        for row in range(start >> U6, ((end - U1) >> U6) + U1):
            blocked |= pinned[row] & allocated[row] & ones_of_row(row, start, end)
        if blocked and to_private:
            continue
        for row in range(start >> U6, ((end - U1) >> U6) + U1):
            mask = ones_of_row(row, start, end)
            if to_private:
                changed += popcount(mask & ~private[row])
                private[row] |= mask
            else:
                changed += popcount(mask & private[row])
                private[row] &= ~mask
                assigned[row] &= ~mask
                accepted[row] &= ~mask
    return changed


@jit
def convert_rows(rows, starts, ends, to_private):
    changed = U0
    for i in range(starts.shape[0]):
        start, end = starts[i], ends[i]
        blocked = U0
        for row in range(start >> U6, ((end - U1) >> U6) + U1):
            blocked |= rows[row, 4] & rows[row, 1] & ones_of_row(row, start, end)
        if blocked and to_private:
            continue
        for row in range(start >> U6, ((end - U1) >> U6) + U1):
            mask = ones_of_row(row, start, end)
            if to_private:
                changed += popcount(mask & ~rows[row, 0])
                rows[row, 0] |= mask
            else:
                changed += popcount(mask & rows[row, 0])
                rows[row, 0] &= ~mask
                rows[row, 2] &= ~mask
                rows[row, 3] &= ~mask
    return changed


@jit
def detail(words, rows, block):
    """Write the rows of a block whose word alone said what it holds."""
    word = words[block]
    for plane in range(PLANES):
        count = (word >> (U10 * np.uint64(plane))) & np.uint64(1023)
        for row in range(block * np.uint64(8), block * np.uint64(8) + np.uint64(8)):
            rows[row, plane] = ONES if count else U0
    words[block] = word | DETAIL


@jit
def convert_words(words, rows, starts, ends, to_private):
    changed = U0
    for i in range(starts.shape[0]):
        start, end = starts[i], ends[i]
        blocked = U0
        for block in range(start >> U9, ((end - U1) >> U9) + U1):
            if words[block] >> np.uint64(40) & np.uint64(1023) == U0:
                continue
            low, high = max(start, block * U512), min(end, (block + U1) * U512)
            for row in range(low >> U6, ((high - U1) >> U6) + U1):
                blocked |= rows[row, 4] & ones_of_row(row, low, high)
        if blocked and to_private:
            continue
        for block in range(start >> U9, ((end - U1) >> U9) + U1):
            low, high = max(start, block * U512), min(end, (block + U1) * U512)
            word = words[block]
            if high - low == U512 and not word >> U63:
                before = word & np.uint64(1023)
                word = (word & ~np.uint64(1023)) | (U512 if to_private else U0)
                if not to_private:
                    word &= ~np.uint64(1023 << 20 | 1023 << 30)
                changed += U512 - before if to_private else before
                words[block] = word
                continue
            if not word >> U63:
                detail(words, rows, block)
                word = words[block]
            for row in range(low >> U6, ((high - U1) >> U6) + U1):
                mask = ones_of_row(row, low, high)
                if to_private:
                    new = popcount(mask & ~rows[row, 0])
                    rows[row, 0] |= mask
                    word += new
                    changed += new
                else:
                    old = popcount(mask & rows[row, 0])
                    word -= old
                    changed += old
                    word -= popcount(mask & rows[row, 2]) << np.uint64(20)
                    word -= popcount(mask & rows[row, 3]) << np.uint64(30)
                    rows[row, 0] &= ~mask
                    rows[row, 2] &= ~mask
                    rows[row, 3] &= ~mask
            words[block] = word
    return changed


@jit
def slot_of_records(plane, row, n_rows):
    return (row >> np.uint64(3)) * np.uint64(48) + plane * np.uint64(8) + (row & np.uint64(7))


@jit
def slot_of_bitmaps(plane, row, n_rows):
    return plane * n_rows + row


def converter(slot_of):
    """The conversion over counts and lines, wherever a line lies."""

    @jit
    def set_line(words, lines, block, plane, start, end, value):
        """Set or clear one plane over pages [start, end) of one block; returns how many changed."""
        field = U10 * plane
        word = words[block]
        count = (word >> field) & np.uint64(1023)
        target = U512 if value else U0
        if count == target:
            return U0
        if end - start == U512:
            words[block] = (word & ~(np.uint64(1023) << field)) | (target << field)
            return target - count if value else count
        n_rows = np.uint64(words.shape[0]) << np.uint64(3)
        if count in (U0, U512):
            base = slot_of(plane, block << np.uint64(3), n_rows)
            for i in range(base, base + np.uint64(8)):
                lines[i] = ONES if count else U0
        changed = U0
        row, last = start >> U6, (end - U1) >> U6
        mask = ONES << (start & U63)
        while row <= last:
            if row == last:
                mask &= ONES >> (U63 - ((end - U1) & U63))
            slot = slot_of(plane, row, n_rows)
            old = lines[slot]
            new = old | mask if value else old & ~mask
            lines[slot] = new
            changed += popcount(old ^ new)
            mask = ONES
            row += U1
        words[block] = word + (changed << field) if value else word - (changed << field)
        return changed

    @jit
    def convert(words, lines, starts, ends, to_private):
        changed = U0
        for i in range(starts.shape[0]):
            start, end = starts[i], ends[i]
            first, last = start >> U9, (end - U1) >> U9
            blocked = U0
            for block in range(first, last + U1):
                blocked |= words[block] >> np.uint64(40) & np.uint64(1023)
            if blocked and to_private:
                continue  # the sweep that would look for the pinned page itself
            for block in range(first, last + U1):
                low, high = max(start, block * U512), min(end, (block + U1) * U512)
                changed += set_line(words, lines, block, U0, low, high, to_private)
                if not to_private:
                    set_line(words, lines, block, np.uint64(2), low, high, False)
                    set_line(words, lines, block, np.uint64(3), low, high, False)
        return changed

    return convert


def layouts(n_pages):
    """Name -> (kernel, its arrays); every array is touched once so that no page fault is timed."""
    n_rows, n_blocks = n_pages // 64, n_pages // 512
    flat = tuple(np.ones(n_rows, np.uint64) * 0 for _ in range(PLANES))
    rows = np.ones((n_rows, 8), np.uint64) * 0
    words = np.ones(n_blocks, np.uint64) * 0
    return {
        "flat": (convert_flat, flat),
        "rows": (convert_rows, (rows,)),
        "rows+word": (convert_words, (words, rows)),
        "records": (converter(slot_of_records), (words.copy(), np.ones(n_blocks * 48, np.uint64) * 0)),
        "bitmaps": (converter(slot_of_bitmaps), (words.copy(), np.ones(n_blocks * 48, np.uint64) * 0)),
    }


def seconds(kernel, arrays, starts, ends):
    best = []
    for _ in range(5):
        began = time.perf_counter()
        kernel(*arrays, starts, ends, True)
        kernel(*arrays, starts, ends, False)
        best.append(time.perf_counter() - began)
    return statistics.median(best) / 2


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranges", type=int, default=1_000_000)
    n = parser.parse_args().ranges
    rng = np.random.default_rng(1)
    for gib in (64, 1024):
        n_pages = gib * PAGES_PER_GIB
        starts = rng.integers(0, n_pages - 64, n).astype(np.uint64)
        ends = starts + rng.integers(1, 65, n).astype(np.uint64)
        whole = np.zeros(1, np.uint64), np.full(1, n_pages, np.uint64)
        for name, (kernel, arrays) in layouts(n_pages).items():
            kernel(*arrays, starts[:10], ends[:10], True)
            for array in arrays:
                array[...] = 0
            uniform = seconds(kernel, arrays, *whole)
            scattered = seconds(kernel, arrays, starts, ends)
            print(
                f"{gib:5} GiB  {name:10} {scattered / n * 1e9:7.1f} ns per range uniform "
                f"{uniform * 1e3:7.2f} ms"
            )


if __name__ == "__main__":
    main()
