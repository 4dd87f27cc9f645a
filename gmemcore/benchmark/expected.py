"""Expected contents of every byte, in plain NumPy, sharing nothing with the engine's kernels.

Contents are symbolic (a value, and whether the guest's key is applied to it). So 1 GiB is checked in pieces
that stay in the cache, and the key stream is computed only where it matters.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.benchmark.axes import Mask
from gmemcore.benchmark.cases import Case, Transfer
from gmemcore.engine.byte_operations import BYTE_OPERATIONS, Leaves
from gmemcore.policy import Accept, ByteOperation, Rank, byte_operations, cells
from gmemcore.uapi import PAGE_SIZE, ContentMode, Direction

Words = NDArray[np.uint64]

PIECE: Final = 512 << 10
"""Bytes written, read or compared at a time: few calls, and they stay in the second-level cache."""
_PIECE_WORDS: Final = PIECE // 8
_STRIDE: Final = 40503  # odd, so that 2^16 pieces begin at different words
_GOLDEN: Final = np.uint64(0x9E37_79B9_7F4A_7C15)
_STEPS: Final = (
    (np.uint64(30), np.uint64(0xBF58_476D_1CE4_E5B9)),
    (np.uint64(27), np.uint64(0x94D0_49BB_1331_11EB)),
)


class WrongContentsError(Exception):
    """A byte, an attribute or a counter is wrong: a conversion or its model is broken."""

    def __str__(self) -> str:
        return f"wrong contents: {super().__str__()}"


def pieces(start: int, end: int, piece: int = PIECE) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each part of a byte range, cut at multiples of a size."""
    while start < end:
        stop = min(end, (start // piece + 1) * piece)
        yield start, stop
        start = stop


def key_stream(seed: int, offset: int, size: int) -> Words:
    """Return the key stream over a byte range of a Vm's first guest_memfd: SplitMix64, a cost model.

    Parameters
    ----------
    seed : int
        The Vm's seed.
    offset, size : int
        Bytes, multiples of 8.

    Returns
    -------
    ndarray of uint64, shape (size // 8,)
    """
    # Modulo 2^64 throughout: NumPy's arrays wrap by themselves, Python's integers don't.
    state = np.uint64((seed + (offset // 8 + 1) * int(_GOLDEN)) % (1 << 64))
    z = _multiples(size // 8) + state
    for shift, factor in _STEPS:
        z ^= z >> shift
        z *= factor
    z ^= z >> np.uint64(31)
    return z


@lru_cache(maxsize=4)
def _multiples(n: int) -> Words:
    """Return the first n multiples of SplitMix64's increment."""
    return np.arange(n, dtype=np.uint64) * _GOLDEN


class Pattern:
    """Words that differ from place to place, generated piece by piece.

    Parameters
    ----------
    seed : int
        Different seeds give different words everywhere.
    """

    def __init__(self, seed: int) -> None:
        self._words = np.random.default_rng(seed).integers(0, 1 << 64, 2 * _PIECE_WORDS, dtype=np.uint64)
        self._words.flags.writeable = False

    def words(self, start: int, end: int) -> Words:
        """Return the words of a byte range within one piece, a read-only view."""
        number, offset = divmod(start, PIECE)
        first = number * _STRIDE % _PIECE_WORDS + offset // 8  # each piece begins elsewhere
        return self._words[first : first + (end - start) // 8]


WRITTEN: Final = "what the old side wrote"
SOURCE: Final = "what the source holds"
ZEROS: Final = "zeros"
RANDOM: Final = "random words"


@dataclass(frozen=True, slots=True)
class Contents:
    """What DRAM holds: a value, and whether the guest's key is applied to it."""

    value: str
    keyed: bool = False

    def under_key(self) -> "Contents":
        """Return the contents after the key stream was XORed into them."""
        return replace(self, keyed=not self.keyed)


_LEFT: Final[dict[Leaves, Callable[[Contents], Contents]]] = {
    Leaves.UNCHANGED: lambda before: before,
    Leaves.ZEROS: lambda _: Contents(ZEROS),
    Leaves.KEYED: Contents.under_key,
    Leaves.RANDOM: lambda _: Contents(RANDOM),
}


def _after(operation: ByteOperation, before: Contents) -> Contents:
    return _LEFT[BYTE_OPERATIONS[operation].leaves](before)


def contents_before(case: Case, rank: Rank | None = None) -> Contents:
    """Return what DRAM of a page holds before its conversion: zeros if it is unallocated.

    Parameters
    ----------
    case : Case
        Any case.
    rank : Rank or None
        The page's rank; None: `Case.rank`, which is every page's where the case is uniform.
    """
    rank = case.rank if rank is None else rank
    if rank == Rank.UNALLOCATED:
        return Contents(ZEROS)
    written = Contents(WRITTEN, keyed=rank == Rank.ACCEPTED)
    if case.to_private or rank == Rank.ACCEPTED or not case.platform.coco:
        return written
    # The host wrote it, and a conversion to private hid it from the host.
    return _after(_operation_to_private(case), written)


def _operation_to_private(case: Case) -> ByteOperation:
    """Return what a conversion to private without a flag does to the bytes of an allocated page."""
    key = case.key
    for other, answer in cells(
        case.abi, key.vm_type, key.firmware, phase=key.phase, direction=Direction.TO_PRIVATE
    ):
        if other.flag == ContentMode.NONE and answer.effect is not None:
            return byte_operations(answer.effect, key.vm_type, Direction.TO_PRIVATE)[Rank.ALLOCATED]
    return ByteOperation.NONE


def contents_after(case: Case, rank: Rank | None = None) -> Contents:
    """Return what DRAM of a page holds when the new side reads it, all steps done; see `contents_before`."""
    rank = case.rank if rank is None else rank
    if case.abi.legacy:  # each side has its own bytes; the copy brought them to the other one
        return Contents(WRITTEN, keyed=case.to_private and case.platform.coco)
    dram = _after(case.operation_of(rank), contents_before(case, rank))
    if case.transfer == Transfer.FROM_SOURCE:
        dram = Contents(SOURCE)
    if case.transfer is not None:
        return dram.under_key()
    if case.accept and case.platform.accept == Accept.CLEAR and rank != Rank.ACCEPTED:
        return Contents(ZEROS, keyed=True)
    return dram


class Reference:
    """The words that contents stand for, and comparisons with them.

    Parameters
    ----------
    seed : int
        The Vm's seed.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._patterns = {WRITTEN: Pattern(1), SOURCE: Pattern(2)}

    def words(self, contents: Contents, start: int, end: int) -> Words:
        """Return the words of a byte range within one piece; not for random contents."""
        if contents.value == ZEROS:
            words = np.zeros((end - start) // 8, np.uint64)
        else:
            words = self._patterns[contents.value].words(start, end)
        if contents.keyed:
            words = words ^ key_stream(self.seed, start, end - start)
        return words

    def check(
        self,
        found: Words,
        contents: Contents,
        start: int,
        before: Contents,
        where: str,
        pages: Mask | None = None,
    ) -> None:
        """Compare words of a byte range within one piece with what they must be.

        Parameters
        ----------
        pages : ndarray of bool or None
            Which pages of the range to compare; None: all.

        Raises
        ------
        WrongContentsError
            Naming the first wrong word.
        """
        end = start + found.nbytes
        chosen = None if pages is None else np.flatnonzero(np.repeat(pages, PAGE_SIZE // 8))
        if contents.value == RANDOM:
            self._check_random(found, self.words(before, start, end), start, where, chosen)
            return
        expected = self.words(contents, start, end)
        if chosen is None and np.array_equal(found, expected):
            return
        wrong = np.flatnonzero(found != expected)
        if chosen is not None:
            wrong = np.intersect1d(wrong, chosen, assume_unique=True)
        if len(wrong):
            at = int(wrong[0])
            raise WrongContentsError(
                f"{where}, offset {start + at * 8:#x}: must be {expected[at]:#018x} ({contents.value}"
                f"{' under the key' if contents.keyed else ''}), not {found[at]:#018x}"
            )

    def _check_random(
        self, found: Words, before: Words, start: int, where: str, chosen: NDArray[np.int64] | None
    ) -> None:
        """Check that every word changed, that half of the bits are set, and that no two pages are equal."""
        if chosen is not None:
            found, before = found[chosen], before[chosen]
        same = np.flatnonzero(found == before)
        if len(same):
            at = int(same[0] if chosen is None else chosen[same[0]])
            raise WrongContentsError(f"{where}, offset {start + at * 8:#x}: the word did not change")
        ones, n_bits = int(np.bitwise_count(found).sum()), found.size * 64
        if abs(ones - n_bits / 2) > 5 * n_bits**0.5:  # ten standard deviations
            raise WrongContentsError(f"{where}, offset {start:#x}: {ones} of {n_bits} bits are set")
        first_words = found[:: PAGE_SIZE // 8]
        if len(np.unique(first_words)) != len(first_words):
            raise WrongContentsError(f"{where}, offset {start:#x}: two pages have the same first word")
