"""Undo: steps that were done, each with the step that takes it back."""

import errno
from collections.abc import Callable
from types import TracebackType

from gmemcore.errors import GmemError


class UndoError(GmemError):
    """EIO: something failed, and taking back what was done before failed too; the cause is chained.

    Attributes
    ----------
    failures : list of Exception
        What could not be taken back, and why.
    """

    number = errno.EIO

    def __init__(self, failures: list[Exception]) -> None:
        reasons = "; ".join(str(failure) for failure in failures)
        super().__init__(f"{len(failures)} steps could not be taken back: {reasons}")
        self.failures = failures


class UndoLog:
    """A block whose steps are taken back, the last one first, if it ends with an exception.

    Examples
    --------
    >>> with UndoLog() as undo:
    ...     undo.done(print, "never printed: the block ends well")

    Notes
    -----
    A step that can't be taken back doesn't keep the others from being: all are tried, then `UndoError` says
    which failed.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def done(self, take_back: Callable[..., object], *arguments: object) -> None:
        """Remember how to take back the step that was just done."""
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
