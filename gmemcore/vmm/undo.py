"""Undo: a log of steps, each with the step that undoes it."""

import errno
from collections.abc import Callable
from types import TracebackType

from gmemcore.errors import GmemError


class UndoError(GmemError):
    """EIO: a step failed, and so did undoing the steps before it; the first failure is chained.

    Attributes
    ----------
    failures : list of Exception
        What couldn't be undone, and why.
    """

    number = errno.EIO

    def __init__(self, failures: list[Exception]) -> None:
        reasons = "; ".join(str(failure) for failure in failures)
        super().__init__(f"{len(failures)} steps couldn't be undone: {reasons}")
        self.failures = failures


class UndoLog:
    """Context manager that undoes its steps, the last one first, if the block raises.

    Examples
    --------
    >>> with UndoLog() as undo:
    ...     undo.done(print, "never printed: nothing raises")

    Notes
    -----
    If one step can't be undone, the others are still tried; `UndoError` then has those that failed.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def done(self, take_back: Callable[..., object], *arguments: object) -> None:
        """Record how to undo the step just done."""
        self._steps.append(lambda: take_back(*arguments))

    def __enter__(self) -> "UndoLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        failures: list[Exception] = []
        while self._steps:
            try:
                self._steps.pop()()
            except Exception as failure:
                failures.append(failure)
        if failures:
            raise UndoError(failures) from error
