"""Streams of operations: cut, joined, repeated, interleaved and re-chunked, always the same operations.

A stream is an iterator of `Operations` arrays of any lengths. What these functions return depends on the
operations that come in and on the arguments, never on how the streams were chunked.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import count
from typing import Final

import numpy as np

from gmemcore.engine.arguments import as_int
from gmemcore.errors import InvalidArgumentError
from gmemcore.workload.operations import (
    Operations,
    empty_operations,
    end_of_launch,
    join_operations,
    shows_launch,
)
from gmemcore.workload.seeds import Stream

CHUNK: Final = 8192
"""Operations of a chunk, unless another number is asked for: 384 KiB, which stays in a core's cache."""
_DRAWN: Final = 4096
"""Operations whose streams are drawn at a time, by `mix`."""


def rechunk(stream: Iterable[Operations], size: int = CHUNK) -> Iterator[Operations]:
    """Yield the same operations in chunks of one size; only the last may be shorter.

    Raises
    ------
    InvalidArgumentError
        EINVAL: a size below 1.
    """
    if as_int(size, "size of a chunk") < 1:
        raise InvalidArgumentError(f"the size of a chunk must be 1 or more operations, not {size}")
    return _rechunked(stream, size)


def _rechunked(stream: Iterable[Operations], size: int) -> Iterator[Operations]:
    reader = _Reader(iter(stream))
    while len(chunk := reader.take(size)):
        yield chunk


def limit(stream: Iterable[Operations], n: int) -> Iterator[Operations]:
    """Yield the first n operations."""
    left = as_int(n, "limit")
    for operations in stream if left > 0 else ():
        yield operations[:left]
        left -= len(operations)
        if left <= 0:
            return


def concatenate(*streams: Iterable[Operations]) -> Iterator[Operations]:
    """Yield one stream after the other."""
    for stream in streams:
        yield from stream


def running(stream: Iterable[Operations]) -> Iterator[Operations]:
    """Yield the stream of a guest that runs already: its launch has ended, unless it begins with one."""
    stream = iter(stream)
    for first in stream:
        if not shows_launch(first):
            yield end_of_launch()
        yield first
        yield from stream


def repeat(make: Callable[[int], Iterable[Operations]], times: int | None = None) -> Iterator[Operations]:
    """Yield the streams that `make` returns for 0, 1, 2 …; times: how many, None for without end.

    Each turn can be another one: ``repeat(lambda turn: behaviour.operations(layout, seed.split(turn)))``.

    Raises
    ------
    InvalidArgumentError
        EINVAL: without end, and a turn that has no operations.
    """
    for turn in count() if times is None else range(as_int(times, "times")):
        empty = True
        for operations in make(turn):
            empty = empty and not len(operations)
            yield operations
        if empty and times is None:
            raise InvalidArgumentError(
                f"turn {turn} of a repeated stream has no operations: it would never end"
            )


def mix(
    streams: Sequence[Iterable[Operations]],
    weights: Sequence[int | float | Fraction] | None = None,
    seed: int | Stream = 0,
) -> Iterator[Operations]:
    """Interleave streams: each operation comes from one of them, as often as its weight says.

    The order within a stream stays. When one has ended, the others go on in their own proportions.

    Parameters
    ----------
    streams : sequence of streams
        At least one.
    weights : sequence of numbers or None
        One a stream, above 0; None: all alike.
    seed : int or Stream
        Decides the order.

    Raises
    ------
    InvalidArgumentError
        EINVAL: no streams, or weights that aren't one per stream and above 0.
    """
    shares: list[int | float | Fraction] = [1] * len(streams) if weights is None else list(weights)
    if not streams or len(shares) != len(streams) or not all(0 < share < float("inf") for share in shares):
        raise InvalidArgumentError(
            f"weights {shares} for {len(streams)} streams; a number above 0 for each of them is needed"
        )
    return _mixed([_Reader(iter(stream)) for stream in streams], shares, _stream(seed).split("mix"))


def _mixed(
    readers: "list[_Reader]", shares: list[int | float | Fraction], draws: Stream
) -> Iterator[Operations]:
    place = 0
    while readers:
        choices = draws.choices(shares, place, _DRAWN)
        wanted = [np.flatnonzero(choices == i) for i in range(len(readers))]
        taken = [reader.take(len(places)) for reader, places in zip(readers, wanted, strict=True)]
        # Who has ended is first missed at a place; from there on, it is drawn among the others.
        missed = [
            int(places[len(part)]) if len(part) < len(places) else _DRAWN
            for places, part in zip(wanted, taken, strict=True)
        ]
        end = min(missed)
        out = empty_operations(end)
        for reader, places, part in zip(readers, wanted, taken, strict=True):
            used = int(np.searchsorted(places, end))
            out[places[:used]] = part[:used]
            reader.give_back(part[used:])
        if end:
            yield out
        place += end
        if end < _DRAWN:
            gone = missed.index(end)
            del readers[gone], shares[gone]


def _stream(seed: int | Stream) -> Stream:
    return seed if isinstance(seed, Stream) else Stream(seed)


class _Reader:
    """Reads a stream in amounts of one's own."""

    def __init__(self, stream: Iterator[Operations]) -> None:
        self._stream = stream
        self._held: list[Operations] = []
        self._count = 0

    def take(self, n: int) -> Operations:
        """Return the next n operations, fewer only at the end."""
        while self._count < n:
            following = next(self._stream, None)
            if following is None:
                break
            if len(following):
                self._held.append(following)
                self._count += len(following)
        parts, left = [], n
        while left and self._held:
            part = self._held[0]
            parts.append(part[:left])
            if len(part) > left:
                self._held[0] = part[left:]
            else:
                self._held.pop(0)
            left -= len(parts[-1])
        self._count -= n - left
        if len(parts) == 1:
            return parts[0]
        return join_operations(parts)

    def give_back(self, operations: Operations) -> None:
        """Let operations that were taken be the next ones again."""
        if len(operations):
            self._held.insert(0, operations)
            self._count += len(operations)
