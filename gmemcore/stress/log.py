"""Log of a run: what is done, so that a run that was killed goes on where it stopped.

A file of JSON Lines that is only ever appended to::

    {"sum": "0f3a…", "record": {"format": "gmemcore stress log 1", "spec": "…", "code": "…"}}
    {"sum": "77b1…", "record": {"guests": [{…}, {…}]}}

``sum`` is 16 hexadecimal digits of SHA-256 over the sum of the line before and the record's bytes: a line
that was changed, lost, repeated or moved is found, and so is a file that isn't this log's continuation. A
record is one ``write`` of a whole line.

**What may be lost.** A process that is killed loses nothing that it wrote: the kernel has it. A machine that
loses power loses what wasn't synchronised, which happens once a second and at the end. A last line without
its end is dropped, and its guests are run again; any other line with a wrong sum is damage, and refused. One
run at a time writes to a log: it holds a lock on the file, which goes with the process. A log that is begun
anew takes the place of the old one with its first results, so that a run that never gets any loses nothing.
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

FORMAT: Final = "gmemcore stress log 1"
MAX_LINE: Final = 64 << 20
"""Bytes of a line: a longer one was written by nobody."""
SYNC_SECONDS: Final = 1.0
"""Seconds of work that a power loss can cost."""

_START: Final = "0" * 16  # what the first line's sum begins with
_HEAD: Final = b'{"sum": "%s", "record": '
_HEAD_LENGTH: Final = len(_HEAD % _START.encode())
_TAIL: Final = b"}\n"


class LogError(InputError):
    """A log that can't be continued: whose it is, or where it is damaged."""


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """First record of a log.

    Attributes
    ----------
    format : str
        Of the file.
    spec : str
        Hash of the spec, which decides the results.
    code : str
        Version and sources of the gmemcore that made them.
    """

    format: str
    spec: str
    code: str


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every other record: results of some guests."""

    guests: list[dict[str, Any]]


class Log:
    """A log that is open for this run alone.

    Parameters
    ----------
    path : Path
        The file.
    header : Header
        Whose results it holds.
    resume : bool
        Whether to go on with the file that is there, if there is one; otherwise there must be none.
    fresh : bool
        Whether a new log takes the place of one that is there, with its first results.

    Attributes
    ----------
    dropped : int
        Bytes of a torn last record that were cut off.

    Raises
    ------
    LogError
        Another run has it, another spec or gmemcore wrote it, it is damaged, or it is there and wasn't asked
        for.
    OSError
        It can't be read or written.
    """

    def __init__(self, path: Path, header: Header, *, resume: bool = False, fresh: bool = False) -> None:
        self.path, self.dropped = path, 0
        self._sum = _START
        self._synced = time.monotonic()
        self._header_to_replace_by: Header | None = None
        self._guests: list[dict[str, Any]] = []
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND
        self._fd = os.open(path, flags, 0o600)
        try:
            self._lock()
            holds = os.fstat(self._fd).st_size > 0
            if fresh and holds:
                self._require_log()
                self._header_to_replace_by = header
                return
            if not resume and holds:
                raise LogError(f"{path} holds results; --resume continues with them, --fresh starts over")
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
        """Results that the log held when it was opened; they can be taken once."""
        guests, self._guests = self._guests, []
        yield from guests

    def append(self, guests: list[dict[str, Any]]) -> None:
        """Add results, which are there for a later run as soon as this returns.

        Raises
        ------
        OSError
            They can't be written (a full disk); the log is as it was.
        """
        record = msgspec.json.encode(_Record(guests))
        if self._header_to_replace_by is None:
            self._append(record)
        else:
            self._replace(msgspec.json.encode(self._header_to_replace_by), record)
            self._header_to_replace_by = None

    def close(self) -> None:
        """Synchronise and close."""
        if self._fd >= 0:
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1

    # ---- lines -----------------------------------------------------------------------------------

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LogError(f"{self.path} is in use: another run writes to it") from None
        if not os.path.samestat(os.fstat(self._fd), os.stat(self.path)):
            raise LogError(f"{self.path} is in use: another run has just begun it anew")

    def _require_log(self) -> None:
        """Refuse to let go what isn't results."""
        begin = os.pread(self._fd, 2 * _HEAD_LENGTH, 0)
        if begin and f'"format":"{FORMAT[:18]}'.encode() not in begin:
            raise LogError(f"{self.path} is no log of a stress run, and isn't replaced")

    def _replace(self, header: bytes, record: bytes) -> None:
        """Put a log with its first results in the place of the old one, which stays if that fails."""
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
        """Check every line, cut off a torn last one, and return the results; begins a new file."""
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
        """Refuse a wrong line that isn't just what a killed run leaves behind."""
        if before == 0 and not self._line(msgspec.json.encode(header)).startswith(line):
            raise LogError(f"{self.path} is no log of a stress run that began with this spec and gmemcore")
        if at + len(line) < size or line.endswith(b"\n"):
            raise LogError(
                f"{self.path}: line {before + 1}, at byte {at}, is damaged; a last line may lack its end"
            )

    def _record_of(self, line: bytes) -> bytes | None:
        """The record of a line, if its sum is right; the next line's sum begins with it."""
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
            raise LogError(f"{self.path} is no log of a stress run: {error}") from error
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
            written = os.write(self._fd, line)
            if written < len(line):
                raise OSError(errno.ENOSPC, f"{self.path}: {written} of {len(line)} bytes could be written")
        except BaseException:
            os.ftruncate(self._fd, before)
            raise
        self._sum = _sum_of(self._sum, record)
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            os.fsync(self._fd)
            self._synced = time.monotonic()

    def _line(self, record: bytes) -> bytes:
        """The line that would follow the last one."""
        return _HEAD % _sum_of(self._sum, record).encode() + record + _TAIL

    def _synchronise(self, folder: Path) -> None:
        """Make sure that a new file and its name stay."""
        os.fsync(self._fd)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _sum_of(before: str, record: bytes) -> str:
    """16 hexadecimal digits for a record that follows the line with the sum before."""
    return hashlib.sha256(before.encode() + record).hexdigest()[:16]
