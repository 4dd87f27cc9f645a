"""Byte operations: for each, its number in kernels, its counter, and what bytes are afterwards."""

from enum import StrEnum
from typing import Final, NamedTuple

from gmemcore.engine import kernels as layout
from gmemcore.policy import ByteOperation


class Leaves(StrEnum):
    """What the bytes of a page are after an operation."""

    UNCHANGED = "unchanged"
    ZEROS = "zeros"
    KEYED = "XORed with the key stream, or if they were, as before that"
    RANDOM = "random"


class ByteRow(NamedTuple):
    """One byte operation.

    Attributes
    ----------
    number : int
        Its number in kernels.
    word : str
        What it does to bytes, in one word.
    counter : str or None
        The counter of its bytes, a name of `Counters`; None: not counted.
    counts : str
        What the counter counts.
    primitive : str
        The memory primitive of the same kind; for no operation, setting bits of a plain bitmap.
    leaves : Leaves
        What the bytes are afterwards.
    effect : str or None
        The effect that it amounts to; None: ENCRYPT or DECRYPT, by direction.
    """

    number: int
    word: str
    counter: str | None
    counts: str
    primitive: str
    leaves: Leaves
    effect: str | None


_ZEROED = "a byte that a conversion set to zero"
_XORED = "a byte encrypted or decrypted in place, by conversion or populate"
_SCRAMBLED = "a byte overwritten with random ones"
BYTE_OPERATIONS: Final = {
    ByteOperation.NONE: ByteRow(
        int(layout.NO_OPERATION), "none", None, "", "bitmap", Leaves.UNCHANGED, "KEEP"
    ),
    ByteOperation.ZERO: ByteRow(
        int(layout.ZERO), "zero", "bytes_zeroed", _ZEROED, "memset", Leaves.ZEROS, "ZERO"
    ),
    ByteOperation.XOR: ByteRow(int(layout.XOR), "xor", "bytes_xored", _XORED, "xor", Leaves.KEYED, None),
    ByteOperation.SCRAMBLE: ByteRow(
        int(layout.SCRAMBLE), "random", "bytes_scrambled", _SCRAMBLED, "xor", Leaves.RANDOM, "SCRAMBLE"
    ),
}
"""Every operation that a kernel has; PLATFORM stands for one of them."""

COUNTED: Final = {name: row.counter for name, row in BYTE_OPERATIONS.items() if row.counter is not None}
"""The counters of operations."""
