"""What hosts and guests write: bytes made of a seed, so that every run writes the same."""

import hashlib
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.arguments import as_u64
from gmemcore.uapi import PAGE_SIZE
from gmemcore.workload.seeds import Stream

_POOL_WORDS: Final = 1 << 15
PIECE: Final = _POOL_WORDS * 8
"""Most bytes that `Fill.written` returns at once."""


class Fill:
    """What each operation of a run writes.

    Parameters
    ----------
    seed : int
        u64.

    Notes
    -----
    Operation n writes a pool of 256 KiB, made of the seed, read in a circle from a word that seed and n
    choose. So writing costs a copy and no arithmetic. The pool is made on first use.
    """

    def __init__(self, seed: int) -> None:
        self.seed = as_u64(seed, "seed")

    @cached_property
    def _stream(self) -> Stream:
        return Stream(self.seed).split("contents")

    @cached_property
    def _places(self) -> Stream:
        return self._stream.split("places")

    @cached_property
    def _pool(self) -> NDArray[np.uint8]:
        once = self._stream.words(0, _POOL_WORDS)
        return np.concatenate([once, once]).view(np.uint8)

    def written(self, number: int, start: int, size: int) -> NDArray[np.uint8]:
        """Return bytes start to start + size of what an operation writes: uint8, a view, at most `PIECE`."""
        at = (self._places.one_below(_POOL_WORDS, number) * 8 + start) % PIECE
        return self._pool[at : at + size]

    def image(self, gpa: int, size: int) -> bytes:
        """Return the initial image at a gpa; see `generated_page`."""
        return b"".join(generated_page(self.seed, at) for at in range(gpa, gpa + size, PAGE_SIZE))


def generated_page(seed: int, gpa: int) -> bytes:
    """Return a page of a generated image: SHAKE-256 of seed and gpa, both as little-endian u64."""
    return hashlib.shake_256(seed.to_bytes(8, "little") + gpa.to_bytes(8, "little")).digest(PAGE_SIZE)
