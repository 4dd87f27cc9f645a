"""Output files, put in place whole or not at all.

A file is written next to its final place, flushed to disk and renamed, and the folder is flushed. After an
exception, a full disk or a crash at any time, what was there before is still there. A symbolic link stays,
and its target is replaced. A pipe, a terminal and ``/dev/null`` are written to directly, and so is the
process's own ``/dev/stdout``. Folders, sockets and disks are refused.
"""

import errno
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from gmemcore.errors import GmemError, InputError
from gmemcore.files.reading import PathLike, type_name

Buffer = bytes | bytearray | memoryview

_DESCRIPTOR: Final = re.compile(r"(?:/dev|/proc/(self|thread-self|\d+))/fd/(\d+)")
_MOST_LINKS: Final = 40


class Target(NamedTuple):
    """What a path leads to.

    Attributes
    ----------
    path : str
        As the user wrote it; errors name it.
    place : Path
        Where a regular file is, or will be, with links resolved.
    status : os.stat_result or None
        Of the file, if it exists.
    through : bool
        Whether it is written to directly, instead of being replaced.
    """

    path: str
    place: Path
    status: os.stat_result | None
    through: bool

    @property
    def holds_something(self) -> bool:
        """Whether replacing it would lose anything."""
        return not self.through and self.status is not None and self.status.st_size > 0


def target_of(path: PathLike) -> Target:
    """Return what a path leads to.

    Raises
    ------
    InputError
        A folder, a socket, a disk, or a descriptor of another process.
    OSError
        Its folder doesn't exist or can't be read; its name is too long; it isn't writable.
    """
    text = os.fspath(path)
    if _own_descriptor(text) is not None:
        return Target(text, Path(text), None, through=True)
    try:
        status = os.stat(text)
    except FileNotFoundError:
        status = None
    place = Path(os.path.realpath(text))
    if status is None:
        if text.endswith("/"):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), text)
        with naming(text):
            os.stat(place.parent)
        return Target(text, place, None, through=False)
    if stat.S_ISFIFO(status.st_mode) or stat.S_ISCHR(status.st_mode):
        return Target(text, place, status, through=True)
    if not stat.S_ISREG(status.st_mode):
        kind = "a disk" if stat.S_ISBLK(status.st_mode) else type_name(status.st_mode)
        raise InputError(f"{text}: must be a file, not {kind}")
    if place.is_relative_to("/proc") or not place.exists():
        raise InputError(f"{text}: must be a file, not a descriptor of another process")
    if not os.access(place, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), text)
    return Target(text, place, status, through=False)


def _own_descriptor(path: str) -> int | None:
    """Return the number of this process's descriptor that a path stands for, through any links."""
    for _ in range(_MOST_LINKS):
        found = _DESCRIPTOR.fullmatch(path)
        if found is not None:
            return int(found[2]) if found[1] in (None, "self", "thread-self", str(os.getpid())) else None
        try:
            path = os.path.join(os.path.dirname(path), os.readlink(path))
        except OSError:
            return None
    return None


def check_output(path: PathLike, *, force: bool = False) -> None:
    """Make sure, before any work, that an output file can be written.

    Parameters
    ----------
    path : path-like
        Path of the output.
    force : bool
        Whether it may replace a file that holds something.

    Raises
    ------
    InputError
        The file exists and `force` is off; or as `target_of`.
    OSError
        Nothing can be written there.
    """
    target = target_of(path)
    if target.holds_something and not force:
        raise InputError(f"{target.path} exists; use --force to replace it")
    if not target.through:
        with _beside(target):
            pass


def replace_file(path: PathLike, parts: Iterable[Buffer], *, mode: int | None = None) -> None:
    """Put a file in place, whole or not at all.

    Parameters
    ----------
    path : path-like
        Path of the file; an existing regular file is replaced.
    parts : iterable of bytes-like
        The contents, one part after another.
    mode : int or None
        Permissions of a new file; None: by the umask. A replaced file keeps its own.

    Raises
    ------
    InputError, OSError
        As `target_of`; or it can't be written. ``filename`` is the path.
    """
    with replacing(path, mode=mode) as file:
        for part in parts:
            file.write(part)


@contextmanager
def replacing(path: PathLike, *, mode: int | None = None) -> Iterator[BinaryIO]:
    """Open a file to be written; it takes its place when the block ends without an exception.

    Parameters
    ----------
    path, mode
        As for `replace_file`.

    Raises
    ------
    InputError, OSError
        As `replace_file`.
    """
    target = target_of(path)
    with naming(target.path, unnamed=True):  # outermost: closing writes what is left, and can fail
        if target.through:
            with open(open_through(target), "wb") as file:
                yield file
            return
        with _beside(target, mode) as (file, beside):
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(beside, target.place)
        sync_folder(target.place.parent)


@contextmanager
def _beside(target: Target, mode: int | None = None) -> Iterator[tuple[BinaryIO, Path]]:
    """Open a new file in the folder of a target; remove it afterwards, unless it was renamed."""
    beside = beside_of(target)
    try:
        with open(open_beside(target, beside, mode), "wb") as file:
            yield file, beside
    finally:
        with suppress(FileNotFoundError):
            os.unlink(beside)


def beside_of(target: Target) -> Path:
    """Return an unused path in the folder of a target, short whatever the target is called."""
    return target.place.with_name(f".gmemcore-{os.urandom(8).hex()}.tmp")


def open_beside(target: Target, beside: Path, mode: int | None = None) -> int:
    """Create a file beside a target, with the permissions that the target has or is to have."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_APPEND
    with naming(target.path):
        descriptor = os.open(beside, flags, 0o666 if mode is None else mode)
    if target.status is not None:
        with suppress(PermissionError):
            os.fchown(descriptor, target.status.st_uid, target.status.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(target.status.st_mode))
    return descriptor


def open_through(target: Target) -> int:
    """Open a pipe, a device or an own descriptor to be written to as it is."""
    number = _own_descriptor(target.path)
    if number is not None:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        with naming(target.path):
            return os.dup(number)
    try:
        descriptor = os.open(target.path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise InputError(f"{target.path}: a pipe that nobody reads") from error
        raise
    os.set_blocking(descriptor, True)
    return descriptor


def sync_folder(folder: Path) -> None:
    """Flush a folder to disk, so that a new name in it survives a crash."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # a folder that can be written but not read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems can't, and have no need to
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: str, *, unnamed: bool = False) -> Iterator[None]:
    """Put the path that the user wrote into an OSError; `unnamed`: only into one without a path."""
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, GmemError) or (unnamed and error.filename is not None):
            raise
        raise OSError(error.errno, error.strerror, path) from error
