"""Files of records: JSON Lines with a first line about the run, a line per record, and an end record.

::

    {"environment": {…}, …}                    what the run is; the kind decides
    {…}                                        one line per record
    {"end": {"records": 1, "complete": true}}  the last line

A file without its end record was cut, or is still being written. An end record that says ``complete: false``
closes a run that was interrupted; one that counts other records than there are closes a file that lost some.
`Lines.shortfall` says which, and readers pass it on: records that are there can be read all the same.

`RecordFile` writes one as the run goes. A new file grows line by line, each line whole; a file that is
replaced stays until the run ends. `lines_of` is for runs that are over when they are written.
"""

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Final

import msgspec

from gmemcore.errors import InputError
from gmemcore.files.reading import PathLike, check_size, decode_json, opened
from gmemcore.files.writing import (
    beside_of,
    check_output,
    naming,
    open_beside,
    open_through,
    sync_folder,
    target_of,
)
from gmemcore.units import counted

SYNC_SECONDS: Final = 1.0
"""Work that a machine without power loses at most."""
MAX_BYTES: Final = 256 << 20
"""Bytes of a file of records that are read, unless its reader says otherwise."""
MAX_LINE: Final = 16 << 20
"""Bytes of one line."""


class End(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The end record.

    Attributes
    ----------
    records : int
        Lines between the first line and this one.
    complete : bool
        Whether the run came to its end.
    why : str
        What stopped it, if it didn't.
    time : str
        UTC when it ended, ISO 8601.
    load_average : float or None
        Of the machine's last minute then.
    """

    records: Annotated[int, msgspec.Meta(ge=0)]
    complete: bool = True
    why: Annotated[str, msgspec.Meta(max_length=500)] = ""
    time: Annotated[str, msgspec.Meta(max_length=40)] = ""
    load_average: Annotated[float, msgspec.Meta(ge=0)] | None = None


class EndLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The line of the end record."""

    end: End


_MOST_BLANK: Final = 100  # lines at the end
_END: Final = b'{"end":'


def line(value: Any) -> bytes:
    """Return a value as one line of JSON."""
    return msgspec.json.encode(value) + b"\n"


def end_line(records: int, *, complete: bool = True, why: str = "") -> bytes:
    """Return the end record of a file of that many records, which ends now."""
    return line(EndLine(End(records, complete, why, utc_now(), load_average())))


def utc_now() -> str:
    """Return the time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def load_average() -> float:
    """Return the load average of the last minute."""
    return round(os.getloadavg()[0], 2)


def lines_of(first: Any, records: Iterable[Any]) -> Iterator[bytes]:
    """Yield the lines of a run that is over: the first, one per record, the end record."""
    yield line(first)
    count = 0
    for record in records:
        yield line(record)
        count += 1
    yield end_line(count)


# ---- writing as the run goes -------------------------------------------------------------------------------
class RecordFile:
    """A file of records that grows with its run, in a ``with`` block.

    Nothing is created before the first line, so a run that is refused leaves no file. A new file has every
    line as soon as `write` returns. A file that is replaced stays as it is until the block ends; if the block
    ends with an exception after at least one record, the new file takes its place all the same, with an end
    record that says what happened. A line that can't be written (a full disk) leaves the new file as it was
    before that line, and the old one in place.

    Parameters
    ----------
    path : path-like
        Where.
    force : bool
        Whether a file that is there may be replaced.

    Raises
    ------
    InputError, OSError
        As `gmemcore.files.writing.check_output`.
    """

    def __init__(self, path: PathLike, *, force: bool = False) -> None:
        check_output(path, force=force)
        self._path, self._force = path, force
        self._descriptor = -1
        self._lines = 0
        self._failed = False
        self._beside: Path | None = None
        self._synced = time.monotonic()

    def __enter__(self) -> "RecordFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor < 0:
            return
        try:
            if error is None:
                self._append(end_line(self._records))
            elif self._records and not self._failed:
                self._append(end_line(self._records, complete=False, why=_reason(error)))
            with naming(self._target.path, unnamed=True):
                self._settle(keep=not self._failed and (error is None or self._records > 0))
        finally:
            self._close()

    @property
    def _records(self) -> int:
        return max(self._lines - 1, 0)

    def write(self, value: Any) -> None:
        """Add a line: the first is about the run, each other a record.

        Raises
        ------
        OSError
            It can't be written; the file ends with the line before.
        """
        if self._descriptor < 0:
            self._open()
        self._append(line(value))
        self._lines += 1

    def _open(self) -> None:
        target = self._target = target_of(self._path)
        if target.through:
            self._descriptor = open_through(target)
        elif target.holds_something:
            if not self._force:
                raise InputError(f"{target.path} exists; use --force to replace it")
            self._beside = beside_of(target)
            self._descriptor = open_beside(target, self._beside)
        else:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._descriptor = os.open(target.place, flags, 0o666)

    def _append(self, text: bytes) -> None:
        """Write a whole line, or none of it."""
        before = None if self._target.through else os.fstat(self._descriptor).st_size
        try:
            left = memoryview(text)
            while left:
                left = left[os.write(self._descriptor, left) :]
            if before is not None and time.monotonic() - self._synced >= SYNC_SECONDS:
                os.fsync(self._descriptor)
                self._synced = time.monotonic()
        except BaseException as error:
            self._failed = self._failed or isinstance(error, OSError)
            if before is not None:
                os.ftruncate(self._descriptor, before)
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, self._target.path) from error
            raise

    def _settle(self, *, keep: bool) -> None:
        """Flush the file to the disk and put it in place, or let it go."""
        if self._target.through:
            return
        os.fsync(self._descriptor)
        if self._beside is not None:
            if keep:
                os.replace(self._beside, self._target.place)
                self._beside = None
        elif not self._records and not keep:
            os.unlink(self._target.place)
        sync_folder(self._target.place.parent)

    def _close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1
        if self._beside is not None:
            self._beside.unlink(missing_ok=True)


def _reason(error: BaseException) -> str:
    """Return in a few words what ended a run."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, SystemExit):
        return "terminated"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)[:500]


# ---- reading -----------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Lines:
    """The lines of a file of records.

    Attributes
    ----------
    first : bytes
        The line about the run.
    records : list of (int, bytes)
        The others, each with its number in the file.
    end : End or None
        The end record; None: the file has none.
    """

    first: bytes
    records: list[tuple[int, bytes]]
    end: End | None

    @property
    def shortfall(self) -> str | None:
        """Why the file isn't the whole run, in words that follow its name; None: it is."""
        count = len(self.records)
        records = counted(count, "record")
        if self.end is None:
            return f"incomplete: {records} and no end record; it was cut, or is still being written"
        if self.end.records != count:
            return f"incomplete: {records}, and its end record counts {self.end.records}"
        if not self.end.complete:
            why = f" ({self.end.why})" if self.end.why else ""
            return f"incomplete: the run ended after {records}{why}"
        return None


def read_lines(path: PathLike, *, most: int = MAX_BYTES) -> Lines:
    """Read the lines of a file of records.

    Parameters
    ----------
    path : path-like
        A regular file or a pipe.
    most : int
        Bytes that are read at most.

    Raises
    ------
    InputError
        Empty, too large, a line too long, an empty line between others, or lines after the end record.
    OSError
        It can't be opened or read.
    """
    name = os.fspath(path)
    lines: list[tuple[int, bytes]] = []
    end, left, blank = None, most, 0
    with opened(path) as file:
        check_size(path, os.fstat(file.fileno()).st_size, most)
        for number, text in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
            left -= len(text)
            if left < 0:
                check_size(path, most - left, most)
            if end is not None:
                raise InputError(f"{name}: line {number}: nothing may follow the end record")
            if len(text) > MAX_LINE:
                raise InputError(f"{name}: line {number}: longer than {MAX_LINE:,} bytes")
            if not text.strip():
                blank = blank or number
                if number == 1 or number - blank > _MOST_BLANK:
                    raise InputError(f"{name}: line {number}: empty")
                continue
            if blank:
                raise InputError(f"{name}: line {blank}: empty")
            if text.startswith(_END):
                end = _end_of(text, f"{name}: line {number}")
            elif text.endswith(b"\n") or number == 1 or _is_whole(text):
                lines.append((number, text))
            # else: the line that was being written when the file was cut
    if not lines:
        raise InputError(f"{name}: empty")
    return Lines(lines[0][1], lines[1:], end)


def _is_whole(text: bytes) -> bool:
    """Whether a last line without its line feed is a record all the same."""
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def _end_of(text: bytes, name: str) -> End | None:
    """Return the end record of a line; None for one that was cut."""
    if not text.endswith(b"}}\n") and not text.endswith(b"}}"):
        return None
    return decode_json(text, EndLine, name).end
