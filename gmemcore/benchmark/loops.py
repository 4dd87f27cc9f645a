"""The primitives as plain loops, compiled by Numba when `primitives` loads them."""

from typing import Any

Array = Any


def xor_constant(target: Array, constant: Any) -> None:
    """XOR every word with a constant, in place."""
    for i in range(target.shape[0]):
        target[i] ^= constant


def set_constant(target: Array, constant: Any) -> None:
    """Set every word."""
    for i in range(target.shape[0]):
        target[i] = constant


def copy(target: Array, source: Array) -> None:
    """Copy every word."""
    for i in range(target.shape[0]):
        target[i] = source[i]
