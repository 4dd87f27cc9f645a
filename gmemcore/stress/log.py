"""Log of a run, from which a run that was killed is resumed.

A file of JSON Lines that is only appended to::

    {"sum": "0f3a…", "record": {"format": "gmemcore stress log 1", "spec": "…", "code": "…"}}
    {"sum": "77b1…", "record": {"guests": [{…}, {…}]}}

``sum`` is 16 hexadecimal digits of SHA-256 over the previous line's sum and the record's bytes, so a line
that was changed, lost, repeated or moved is detected. A record is one ``write`` of a whole line.

**What can be lost.** A process that is killed loses nothing that it wrote. A machine that loses power loses
what wasn't synchronised: at most the last second. An incomplete last line is dropped and its guests run
again; any other line with a wrong sum is damage, and an error. One run at a time writes to a log: it holds a
lock on the file, which the kernel drops with the process. A new log replaces an old one together with its
first results, so a run without results loses nothing.
"""

import errno
import fcntl
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import msgspec

from gmemcore.errors import InputError
from gmemcore.files.reading import check_type
from gmemcore.files.writing import naming
from gmemcore.spelling import switch

FORMAT: Final = "gmemcore stress log 1"
MAX_LINE: Final = 64 << 20
"""Longest line in bytes."""
SYNC_SECONDS: Final = 1.0
"""Longest time between two synchronisations while results arrive."""

_START: Final = "0" * 16  # the first line's previous sum
_HEAD: Final = b'{"sum": "%s", "record": '
_HEAD_LENGTH: Final = len(_HEAD % _START.encode())
_TAIL: Final = b"}\n"


class LogError(InputError):
    """A log that can't be continued: of another run, or damaged."""


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """First record of a log.

    Attributes
    ----------
    format : str
        Format of the file.
    spec : str
        Hash of the spec.
    code : str
        Version and hash of the sources of gmemcore that wrote it.
    """

    format: str
    spec: str
    code: str


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Any other record: results of some guests."""

    guests: list[dict[str, Any]]


class Log:
    """A log, opened and locked for this run.

    Parameters
    ----------
    path : Path
        The file.
    header : Header
        The run whose results it holds.
    resume : bool
        Continue an existing log. Without `resume` or `fresh`, the log must be new or empty.
    fresh : bool
        Replace an existing log once the first results arrive.

    Attributes
    ----------
    dropped : int
        Bytes of an incomplete last record that were cut off.

    Raises
    ------
    LogError
        Another run has locked it, another spec or gmemcore wrote it, it is damaged, or it holds results and
        neither `resume` nor `fresh` is given.
    InputError
        It isn't a regular file.
    OSError
        It can't be read or written.
    """

    def __init__(self, path: Path, header: Header, *, resume: bool = False, fresh: bool = False) -> None:
        self.path, self.dropped = path, 0
        self._sum = _START
        self._synced = time.monotonic()
        self._new_header: Header | None = None
        self._guests: list[dict[str, Any]] = []
        if path.exists():  # opening a device or a pipe can have effects
            check_type(path, path.stat().st_mode, pipe=False)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY
        self._fd = os.open(path, flags, 0o600)
        try:
            check_type(path, os.fstat(self._fd).st_mode, pipe=False)
            self._lock()
            has_results = os.fstat(self._fd).st_size > 0
            if fresh and has_results:
                self._require_log()
                self._new_header = header
                return
            if not resume and has_results:
                raise LogError(
                    f"{path} holds results; {switch('resume')} continues with them, "
                    f"{switch('fresh')} starts over"
                )
            self._guests = self._read(header)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def take_guests(self) -> Iterator[dict[str, Any]]:
        """Yield the results that the log held when it was opened, once."""
        guests, self._guests = self._guests, []
        yield from guests

    def append(self, guests: list[dict[str, Any]]) -> None:
        """Append results; a later run finds them once this has returned.

        Raises
        ------
        OSError
            They can't be written (a full disk, say); the log is unchanged.
        """
        record = msgspec.json.encode(_Record(guests))
        if self._new_header is None:
            self._append(record)
        else:
            self._replace(msgspec.json.encode(self._new_header), record)
            self._new_header = None

    def close(self) -> None:
        """Synchronise and close."""
        if self._fd < 0:
            return
        try:
            with naming(str(self.path), unnamed=True):
                os.fsync(self._fd)
        finally:
            os.close(self._fd)
            self._fd = -1

    # ---- lines -----------------------------------------------------------------------------------

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LogError(f"{self.path} is in use: another run writes to it") from None
        if not os.path.samestat(os.fstat(self._fd), os.stat(self.path)):
            raise LogError(f"{self.path} is in use: another run has just replaced it")

    def _require_log(self) -> None:
        """Refuse to replace a file that isn't a log."""
        begin = os.pread(self._fd, 2 * _HEAD_LENGTH, 0)
        if begin and f'"format":"{FORMAT[:18]}'.encode() not in begin:
            raise LogError(f"{self.path} isn't a log of a stress run; name another file, or remove it")

    def _replace(self, header: bytes, record: bytes) -> None:
        """Replace the log by one with its first results; if that fails, the old one stays."""
        path, old = self.path.resolve(), self._fd
        self._fd, beside = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, os.O_APPEND)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            os.fchmod(self._fd, stat.S_IMODE(os.fstat(old).st_mode))
            self._append(header)
            self._append(record)
            os.fsync(self._fd)
            os.replace(beside, path)
        except BaseException:
            os.close(self._fd)
            self._fd, self._sum = old, _START
            Path(beside).unlink(missing_ok=True)
            raise
        os.close(old)
        self._synchronise(path.parent)

    def _read(self, header: Header) -> list[dict[str, Any]]:
        """Check every line, cut off an incomplete last one, and return the results; start an empty file."""
        size = os.fstat(self._fd).st_size
        records: list[bytes] = []
        good = 0
        with open(os.dup(self._fd), "rb") as file:
            file.seek(0)
            while line := file.readline(MAX_LINE):
                record = self._record_of(line)
                if record is None:
                    self._check_torn(line, len(records), good, size, header)
                    break
                records.append(record)
                good += len(line)
        if records:
            self._check_header(records[0], header)
        if good < size:
            self.dropped = size - good
            os.ftruncate(self._fd, good)
        if not records:
            self._append(msgspec.json.encode(header))
            self._synchronise(self.path.resolve().parent)
        return [guest for record in records[1:] for guest in self._guests_of(record)]

    def _check_torn(self, line: bytes, before: int, at: int, size: int, header: Header) -> None:
        """Raise unless a line with a wrong sum is the incomplete last line of a killed run."""
        if before == 0 and not self._line(msgspec.json.encode(header)).startswith(line):
            raise LogError(f"{self.path} isn't a log of a stress run of this spec and gmemcore")
        if at + len(line) < size or line.endswith(b"\n"):
            raise LogError(
                f"{self.path}: line {before + 1}, at byte {at}, is damaged; only the last can be incomplete"
            )

    def _record_of(self, line: bytes) -> bytes | None:
        """Return the record of a line and advance the sum; None if the line's sum is wrong."""
        record = line[_HEAD_LENGTH : -len(_TAIL)]
        total = _sum_of(self._sum, record)
        if line != _HEAD % total.encode() + record + _TAIL:
            return None
        self._sum = total
        return record

    def _check_header(self, record: bytes, header: Header) -> None:
        try:
            found = msgspec.json.decode(record, type=Header)
        except msgspec.DecodeError as error:
            raise LogError(f"{self.path} isn't a log of a stress run: {error}") from error
        for what, there, here in (
            ("is of another format", found.format, header.format),
            ("is of another spec", found.spec, header.spec),
            ("was written by another gmemcore", found.code, header.code),
        ):
            if there != here:
                raise LogError(f"{self.path} {what}: {there}, not {here}; name another log")

    def _guests_of(self, record: bytes) -> list[dict[str, Any]]:
        try:
            return msgspec.json.decode(record, type=_Record).guests
        except msgspec.DecodeError as error:
            raise LogError(f"{self.path} has a record that isn't from a stress run: {error}") from error

    def _append(self, record: bytes) -> None:
        line = self._line(record)
        before = os.fstat(self._fd).st_size
        try:
            with naming(str(self.path), unnamed=True):
                written = os.write(self._fd, line)
                if written < len(line):
                    raise OSError(errno.ENOSPC, f"{written} of {len(line)} bytes could be written")
        except BaseException:
            os.ftruncate(self._fd, before)
            raise
        self._sum = _sum_of(self._sum, record)
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            with naming(str(self.path), unnamed=True):
                os.fsync(self._fd)
            self._synced = time.monotonic()

    def _line(self, record: bytes) -> bytes:
        """Return a record as the next line."""
        return _HEAD % _sum_of(self._sum, record).encode() + record + _TAIL

    def _synchronise(self, folder: Path) -> None:
        """Synchronise a new file and its name."""
        os.fsync(self._fd)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _sum_of(before: str, record: bytes) -> str:
    """Return the sum of a record, given the previous line's."""
    return hashlib.sha256(before.encode() + record).hexdigest()[:16]
