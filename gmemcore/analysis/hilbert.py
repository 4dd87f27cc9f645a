"""Hilbert's curve: from places along it to cells of a square, and neighbours stay neighbours."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def hilbert(places: ArrayLike, order: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where places along the curve lie.

    Parameters
    ----------
    places : array of int, shape (n,)
        0 to 4^order - 1.
    order : int
        The square has 2^order cells a side.

    Returns
    -------
    x, y : ndarray of int64, shape (n,)
        Cells; the curve begins at (0, 0) and ends at (2^order - 1, 0).

    References
    ----------
    Hilbert, "Über die stetige Abbildung einer Linie auf ein Flächenstück", 1891; Warren, Hacker's Delight,
    chapter 16.
    """
    left = np.array(places, np.int64)
    x, y = np.zeros_like(left), np.zeros_like(left)
    for level in range(order):
        # Two bits name the quadrant: 0 (0, 0), 1 (0, 1), 2 (1, 1), 3 (1, 0).
        right = (left >> 1) & 1
        upper = (left ^ right) & 1
        last = (1 << level) - 1
        # The first quadrant is mirrored at the diagonal, the last at the other one.
        swapped, turned = upper == 0, (upper == 0) & (right == 1)
        x[turned], y[turned] = last - x[turned], last - y[turned]
        x[swapped], y[swapped] = y[swapped], x[swapped]
        x += right << level
        y += upper << level
        left >>= 2
    return x, y
