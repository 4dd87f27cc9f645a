"""Results of kernels, as counters, outcomes and errnos."""

import errno
import struct
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine import kernels as layout
from gmemcore.engine.counters import ENGINE_COUNTERS, Counters
from gmemcore.errors import ERRNO_NUMBERS
from gmemcore.html import table
from gmemcore.units import counted

OUTCOME_OF_REASON: Final = {
    0: "OK",
    **dict.fromkeys(map(int, range(int(layout.FLAGS_UNKNOWN), int(layout.MODE_UNSUPPORTED))), "EINVAL"),
    int(layout.MODE_UNSUPPORTED): "EOPNOTSUPP",
    int(layout.NO_MEMORY): "ENOMEM",
    int(layout.PAGE_PINNED): "EAGAIN",
    int(layout.INVALID): "EINVAL",
    int(layout.BAD_ADDRESS): "EFAULT",
    int(layout.INPUT_OUTPUT): "EIO",
    int(layout.HOST_FAULT): "SIGBUS",
    int(layout.MEMORY_FAULT): "MEMORY_FAULT",
    int(layout.NO_SLOT): "MMIO",
    int(layout.POISONED_PAGE): "EHWPOISON",
    int(layout.NOT_VALIDATED): "NOT_VALIDATED",
    int(layout.TOO_LARGE): "EFBIG",
}
"""The outcome for each reason of a kernel: OK, the name of an errno, or SIGBUS or an exit for an access."""

OUTCOMES: Final = tuple(dict.fromkeys(OUTCOME_OF_REASON.values()))
"""Outcomes of conversions and other steps."""

_OUTCOMES = np.array([OUTCOMES.index(name) for name in OUTCOME_OF_REASON.values()], np.uint8)
_ERRNOS = np.array(
    [0 if name == "OK" else ERRNO_NUMBERS.get(name, errno.EFAULT) for name in OUTCOME_OF_REASON.values()],
    np.int32,
)

RESULT: Final = struct.Struct(f"={layout.RESULT_ROWS}Q")
"""A result as kernels write it: reason, error_offset, counters."""


_COUNTERS: Final = struct.Struct(f"={layout.COUNTERS}Q")
_COUNTERS_FROM: Final = 8 * int(layout.COUNTERS_AT)


def counters_of(result: bytearray) -> Counters:
    """Return the counters of a result."""
    return _counters_of(bytes(result[_COUNTERS_FROM:]))


@lru_cache(maxsize=1024)
def _counters_of(figures: bytes) -> Counters:
    """Return counters, which are immutable; making them takes longer than most steps, and most are alike."""
    return Counters(*_COUNTERS.unpack(figures))


class ConversionResult:
    """The result of one accepted conversion.

    Parameters
    ----------
    counters : Counters or bytearray
        The events, or the result that contains them (`RESULT`). Making a `Counters` costs more than a short
        conversion, so it is made on demand.
    """

    __slots__ = ("_counters",)

    def __init__(self, counters: Counters | bytearray) -> None:
        self._counters = counters

    @property
    def counters(self) -> Counters:
        """The events of this call alone."""
        if isinstance(self._counters, bytearray):
            self._counters = counters_of(self._counters)
        return self._counters

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConversionResult) and self.counters == other.counters

    def __hash__(self) -> int:
        return hash(self.counters)

    def __repr__(self) -> str:
        return f"ConversionResult({self.counters!r})"

    def _repr_html_(self) -> str:
        return self.counters._repr_html_()


class BatchResult:
    """The results of a batch. Requests that were refused changed nothing.

    Parameters
    ----------
    rows : ndarray of uint64, shape (RESULT_ROWS, n)
        As kernels write them: reasons, error offsets, then one row per counter.
    total : Counters
        Events of the whole batch.
    """

    __slots__ = ("_rows", "total")

    def __init__(self, rows: NDArray[np.uint64], total: Counters) -> None:
        self._rows = rows
        self.total = total

    def __len__(self) -> int:
        return int(self._rows.shape[1])

    def __repr__(self) -> str:
        return f"BatchResult({counted(len(self), 'request')}, {len(self.refused):,} refused, {self.total!r})"

    @property
    def errno(self) -> NDArray[np.int32]:
        """0, or the errno of the request, shape (n,)."""
        errno: NDArray[np.int32] = _ERRNOS.take(self._rows[0].view(np.int64))
        return errno

    @property
    def outcome(self) -> NDArray[np.uint8]:
        """Outcome of each request as an index into `OUTCOMES`, shape (n,)."""
        outcome: NDArray[np.uint8] = _OUTCOMES.take(self._rows[0].view(np.int64))
        return outcome

    @property
    def refused(self) -> NDArray[np.intp]:
        """The indices of the requests that were refused, in order."""
        return np.flatnonzero(self._rows[0])

    def _repr_html_(self) -> str:
        numbers, counts = np.unique(self.outcome, return_counts=True)
        outcomes = [(OUTCOMES[n], count) for n, count in zip(numbers.tolist(), counts.tolist(), strict=True)]
        title = counted(len(self), "request")
        return table(title, ("outcome", "requests"), outcomes, self.total._repr_html_())

    @property
    def error_offset(self) -> NDArray[np.uint64]:
        """The field error_offset after each call, shape (n,); for other steps, the refusing page's offset."""
        offsets: NDArray[np.uint64] = self._rows[1]
        return offsets

    @property
    def counters(self) -> dict[str, NDArray[np.uint64]]:
        """The counters of each request, by name, shape (n,) each; views, not copies."""
        return dict(zip(ENGINE_COUNTERS, self._rows[int(layout.COUNTERS_AT) :], strict=True))
