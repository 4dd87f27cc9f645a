"""Deterministic random numbers: the same on every version of Python and NumPy, in chunks of any size.

A stream is SplitMix64 read by place: number i is a function of the stream's key and of i alone. Whoever makes
chunk j of guest i's operations asks for the numbers of that chunk and gets the same ones, whatever the size
of chunks, whichever worker asks and in which order. ``numpy.random`` promises that for no distribution: its
`Generator` may change from release to release. Here is exact arithmetic on uint64 and no float anywhere.

These numbers choose places and sizes. They are no cryptography, and not the key stream of guest memory, which
shares the arithmetic and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.arguments import as_int, as_u64
from gmemcore.errors import InvalidArgumentError

Words = NDArray[np.uint64]
"""Random words, or numbers made of them: uint64, shape (n,)."""

_GAMMA: Final = np.uint64(0x9E37_79B9_7F4A_7C15)
_FIRST: Final = np.uint64(0xBF58_476D_1CE4_E5B9)
_SECOND: Final = np.uint64(0x94D0_49BB_1331_11EB)
_U32_MAX: Final = np.uint64(0xFFFF_FFFF)
_U64_MAX: Final = 0xFFFF_FFFF_FFFF_FFFF
_32: Final = np.uint64(32)


@dataclass(frozen=True, slots=True)
class Stream:
    """An endless row of random words, read by place.

    Parameters
    ----------
    key : int
        u64: SplitMix64's seed. All keys read the same cycle of 2^64 words, each from a place of its own;
        `split` gives places that have nothing to do with each other.

    Examples
    --------
    >>> [int(word) for word in Stream(1234567).words(0, 2)]
    [6457827717110365317, 3203168211198807973]
    """

    key: int

    def __post_init__(self) -> None:
        as_u64(self.key, "seed")

    def split(self, *names: str | int) -> "Stream":
        """Return the stream of a part of the work, named by texts and numbers.

        The key is a hash (BLAKE2b) of this stream's key and the names: ``split("guest", 1, "pins")`` has
        nothing to do with ``split("guest", 11, "pins")``, nor with ``split("guest", 1).split("pins")``.

        Raises
        ------
        TypeError
            A name that is neither text nor integer.
        InvalidArgumentError
            EINVAL: a number that isn't unsigned 64 bits.
        """
        digest = blake2b(self.key.to_bytes(8, "little"), digest_size=8, person=b"gmemcore streams")
        for name in names:
            digest.update(_name_bytes(name))
        return Stream(int.from_bytes(digest.digest(), "little"))

    def words(self, start: int, count: int) -> Words:
        """Return words number start to start + count: uint64, shape (count,)."""
        z = np.arange(count, dtype=np.uint64)
        z += np.uint64((as_u64(start, "start") + 1) & 0xFFFF_FFFF_FFFF_FFFF)
        z *= _GAMMA
        z += np.uint64(self.key)
        for shift, factor in ((np.uint64(30), _FIRST), (np.uint64(27), _SECOND)):
            z ^= z >> shift
            z *= factor
        z ^= z >> np.uint64(31)
        return z

    def below(self, bound: int | Words, start: int, count: int) -> Words:
        """Return integers from 0 to bound - 1, one per word.

        Parameters
        ----------
        bound : int or uint64 array of shape (count,)
            1 to 2^64 - 1; an array gives each number a bound of its own.
        start, count : int
            Which words are used.

        Returns
        -------
        uint64 array of shape (count,)
            The high half of word times bound (Lemire's multiplication without its rejection, so that every
            number takes one word). Probabilities of two values differ by 2^-64 at most: for a bound of 2^28
            pages by 1 part in 2^36.

        Raises
        ------
        InvalidArgumentError
            EINVAL: a bound of 0.
        """
        bounds = bound if isinstance(bound, np.ndarray) else np.uint64(as_u64(bound, "bound"))
        if not np.all(bounds):
            raise InvalidArgumentError("a bound must be 1 or more, not 0")
        return _high_half(self.words(start, count), bounds)

    def one_below(self, bound: int, place: int) -> int:
        """Return number `place` of `below(bound, ...)`, in less time than an array takes."""
        z = ((place + 1) * int(_GAMMA) + self.key) & _U64_MAX
        for shift, factor in ((30, int(_FIRST)), (27, int(_SECOND))):
            z = (z ^ z >> shift) * factor & _U64_MAX
        return (z ^ z >> 31) * bound >> 64

    def choices(self, weights: Sequence[int | float | Fraction], start: int, count: int) -> NDArray[np.intp]:
        """Return indices of weights, each as often as its weight says, one per word.

        Weights are taken as the exact fractions they are, so that no rounding of sums decides.

        Raises
        ------
        InvalidArgumentError
            EINVAL: no weights, one that is negative or not finite, or nothing but zeros.
        """
        return np.searchsorted(_thresholds(tuple(weights)), self.words(start, count), side="right")

    def permutation(self, count: int) -> NDArray[np.intp]:
        """Return the numbers below count in random order: words 0 to count decide, ties by place."""
        return np.argsort(self.words(0, as_int(count, "count")), kind="stable")


def _name_bytes(name: str | int) -> bytes:
    """A name so that no two rows of names have the same bytes."""
    if isinstance(name, str):
        text = name.encode()
        return b"s" + len(text).to_bytes(8, "little") + text
    return b"i" + as_u64(name, "name of a stream").to_bytes(8, "little")


def _high_half(words: Words, bounds: Words | np.uint64) -> Words:
    """Bits 64 to 127 of words times bounds, by halves that don't overflow."""
    high: Words = words >> _32
    low: Words = words & _U32_MAX
    bound_high, bound_low = bounds >> _32, bounds & _U32_MAX
    middle: Words = high * bound_low
    carry = middle & _U32_MAX
    low_product = low * bound_low
    low_product >>= _32
    carry += low_product
    middle >>= _32
    if np.any(bound_high):
        carry += low * bound_high
        # low * bound_high is below 2^64 - 2^33 + 2, and what is added to it below 2^33: no overflow.
        middle += high * bound_high
    middle += carry >> _32
    return middle


@lru_cache(maxsize=64)
def _thresholds(weights: tuple[int | float | Fraction, ...]) -> Words:
    """The last word of each index but the last one, plus one."""
    for index, weight in enumerate(weights):
        if not 0 <= weight < float("inf"):
            raise InvalidArgumentError(f"weight {index} must be a finite number, 0 or more, not {weight}")
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact)
    if not total:
        raise InvalidArgumentError("at least one weight must be above 0")
    # Zeros at the end get no threshold: the last index that can come is that of the last weight above 0.
    last = max(index for index, weight in enumerate(exact) if weight)
    sums = (sum(exact[: index + 1], Fraction(0)) for index in range(last))
    thresholds = np.array([int(part / total * (1 << 64)) for part in sums], dtype=np.uint64)
    thresholds.flags.writeable = False  # kept for the next call
    return thresholds
