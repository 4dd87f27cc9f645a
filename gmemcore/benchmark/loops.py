"""The memory primitives as plain loops over ranges, compiled by Numba when `primitives` loads them.

Each takes a target and a source (arrays of uint64), the first word of each range, and the words of a range,
so one compiled call covers the same ranges as a batch of conversions. They share nothing with the engine's
kernels.
"""

from typing import Any

import numpy as np

Array = Any

WORD_BITS, LOW_BITS, WORD_SHIFT = np.uint64(64), np.uint64(63), np.uint64(6)
LINE_WORDS = np.uint64(8)
ONES, ONE, NONE = np.uint64(0xFFFF_FFFF_FFFF_FFFF), np.uint64(1), np.uint64(0)


def xor(target: Array, source: Array, starts: Array, size: Any, constant: Any) -> None:
    """XOR every word with a constant, in place."""
    for i in range(starts.shape[0]):
        view = target[starts[i] : starts[i] + size]
        for j in range(view.shape[0]):
            view[j] ^= constant


def fill(target: Array, source: Array, starts: Array, size: Any, constant: Any) -> None:
    """Set every word to a constant."""
    for i in range(starts.shape[0]):
        view = target[starts[i] : starts[i] + size]
        for j in range(view.shape[0]):
            view[j] = constant


def copy(target: Array, source: Array, starts: Array, size: Any, constant: Any) -> None:
    """Copy every word from the same place in the source, which repeats if it is shorter."""
    length = np.uint64(source.shape[0])
    for i in range(starts.shape[0]):
        at, end = starts[i], starts[i] + size
        while at < end:
            offset = at % length
            part = min(end - at, length - offset)
            to, of = target[at : at + part], source[offset : offset + part]
            for j in range(to.shape[0]):
                to[j] = of[j]
            at += part


def set_bits(bits: Array, source: Array, starts: Array, size: Any, value: Any) -> None:
    """Set (value = all ones) or clear (0) a bit per page of each range, in a plain bitmap."""
    for i in range(starts.shape[0]):
        start, end = starts[i], starts[i] + size
        word, last = start >> WORD_SHIFT, (end - ONE) >> WORD_SHIFT
        head, tail = ONES << (start & LOW_BITS), ONES >> (LOW_BITS - ((end - ONE) & LOW_BITS))
        if word == last:
            mask = head & tail
            bits[word] = (bits[word] & ~mask) | (value & mask)
            continue
        bits[word] = (bits[word] & ~head) | (value & head)
        view = bits[word + ONE : last]
        for j in range(view.shape[0]):
            view[j] = value
        bits[last] = (bits[last] & ~tail) | (value & tail)
