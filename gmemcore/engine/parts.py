"""Parts: a long range of pages cut at 2 MiB blocks, so that several threads can work on it at once.

Kernels run without the GIL and write nothing but the bytes of their own part and a result of their own, so
the bytes are the same whatever the number of threads.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine import kernels as layout

LEAST_PART: Final = 1024
"""Pages a thread must get at least; below 4 MiB waking it costs more than it does."""

_BLOCK = int(layout.BLOCK_PAGES)


def parts(start: int, end: int, n: int) -> Iterator[tuple[int, int]]:
    """Tile [start, end) with at most n parts of about equal size, cut at blocks.

    Examples
    --------
    >>> list(parts(0, 4096, 2))
    [(0, 2048), (2048, 4096)]
    """
    n = max(1, min(n, (end - start) // LEAST_PART))
    cuts = ((start + (end - start) * k // n) // _BLOCK * _BLOCK for k in range(1, n))
    return pairwise([start, *cuts, end])


def in_parts(
    work: Callable[[int, int, NDArray[np.uint64]], object], start: int, end: int, threads: int
) -> NDArray[np.uint64]:
    """Do work over [start, end) on several threads.

    Parameters
    ----------
    work : callable
        Called with the pages of a part and a result, shape (RESULT_ROWS, 1), of its own.

    Returns
    -------
    ndarray of uint64, shape (RESULT_ROWS, 1)
        The sum of the results.
    """
    tiles = list(parts(start, end, threads))
    if len(tiles) == 1:
        alone: NDArray[np.uint64] = np.zeros((layout.RESULT_ROWS, 1), np.uint64)
        work(start, end, alone)
        return alone
    results: NDArray[np.uint64] = np.zeros((len(tiles), layout.RESULT_ROWS, 1), np.uint64)
    futures = [_pool(threads).submit(work, *tile, own) for tile, own in zip(tiles, results, strict=True)]
    for future in futures:
        future.result()
    total: NDArray[np.uint64] = results.sum(axis=0)
    return total


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "gmemcore")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads
