"""Input files: regular files and pipes only, of bounded size and depth, strictly decoded.

Whoever reads a file that a user named reads it here. A device, a socket or a folder is refused by name. A
file larger than its kind can be is refused before it is read, a pipe after that many bytes. Errors are
`InputError` with one line, which begins with the path.
"""

import io
import logging
import os
import re
import select
import stat
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Final, TypeVar

import msgspec

from gmemcore.errors import InputError, with_known

PathLike = str | os.PathLike[str]
_Kind = TypeVar("_Kind")

SILENCE: Final = 1.0
"""Seconds that a pipe may be silent before a line says that it is waited for."""
KEY_PARTS: Final = 32
"""Parts of a dotted TOML key; tomllib takes time and memory that grow with their square."""

_LONG_KEY: Final = re.compile(
    rb"""(?<![A-Za-z0-9_-])(?:(?:[A-Za-z0-9_-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){%d}""" % KEY_PARTS
)
_LONG_NUMBER: Final = re.compile(rb"\d{19}")
"""What an integer beyond 64 bits has, and few other lines have."""
_LOG: Final = logging.getLogger("gmemcore")


# ---- opening -----------------------------------------------------------------------------------------------
@contextmanager
def opened(path: PathLike, *, pipe: bool = True) -> Iterator[BinaryIO]:
    """Open a regular file or a pipe for reading.

    Parameters
    ----------
    path : path-like
        Where.
    pipe : bool
        Take a pipe too. One that stays silent is waited for, and a line of the log says so.

    Raises
    ------
    InputError
        A device, a socket, a folder, or a pipe where none can be read.
    OSError
        Nothing is there, or it can't be opened; ``filename`` is the path.
    """
    check_type(path, os.stat(path).st_mode, pipe=pipe)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        mode = os.fstat(descriptor).st_mode
        check_type(path, mode, pipe=pipe)
        raw = _Pipe(descriptor, path) if stat.S_ISFIFO(mode) else io.FileIO(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    with io.BufferedReader(raw) as file:
        yield file


def check_type(path: PathLike, mode: int, *, pipe: bool) -> None:
    """Raise InputError unless a ``st_mode`` is a regular file's, or that of a pipe where one can be used."""
    if stat.S_ISREG(mode) or (pipe and stat.S_ISFIFO(mode)):
        return
    wanted = "a regular file or a pipe" if pipe else "a regular file"
    raise InputError(f"{os.fspath(path)}: must be {wanted}, not {type_name(mode)}")


def type_name(mode: int) -> str:
    """Return what is at a path, by its ``st_mode``."""
    names = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return names.get(stat.S_IFMT(mode), "a device")


class _Pipe(io.RawIOBase):
    """A pipe, read as its bytes come; the first long silence is announced."""

    def __init__(self, descriptor: int, path: PathLike) -> None:
        self._descriptor, self._path = descriptor, os.fspath(path)
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)
        self._announced = False

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def readinto(self, buffer: Any) -> int:
        while True:
            # A pipe that nobody has opened for writing yet reads as ended, and polls as silent.
            if not self._poll.poll(None if self._announced else SILENCE * 1000):
                self._announced = True
                _LOG.warning("waiting for the pipe %s", self._path)
                continue
            try:
                return os.readv(self._descriptor, [buffer])
            except BlockingIOError:  # another reader was quicker
                continue

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


# ---- whole files -------------------------------------------------------------------------------------------
def read_file(path: PathLike, most: int, *, pipe: bool = True) -> bytes:
    """Return the bytes of a file.

    Parameters
    ----------
    path : path-like
        A regular file, or a pipe.
    most : int
        Bytes that a file of this kind has at most.
    pipe : bool
        As for `opened`.

    Raises
    ------
    InputError, OSError
        As `opened`; or the file is larger.
    """
    with opened(path, pipe=pipe) as file:
        check_size(path, os.fstat(file.fileno()).st_size, most)
        try:
            data = file.read(most + 1)
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    if len(data) > most:
        raise InputError(f"{os.fspath(path)}: must be at most {most:,} bytes, and has more")
    return data


def check_size(path: PathLike, size: int, most: int) -> None:
    """Raise `InputError` for a file of more than `most` bytes."""
    if size > most:
        raise InputError(f"{os.fspath(path)}: must be at most {most:,} bytes, not {size:,}")


def decode_json(data: bytes, kind: type[_Kind], name: str) -> _Kind:
    """Return JSON as a value of a type; `name` begins each message.

    Raises
    ------
    InputError
        Not UTF-8, not JSON, nested too deeply, an integer beyond 64 bits, or not of that type.
    """
    try:
        value = msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise InputError(f"{name}: {with_known(error, kind)}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8: {error.reason} at byte {error.start}") from error
    except msgspec.DecodeError as error:
        raise InputError(f"{name}: not JSON: {error}") from error
    except RecursionError as error:
        raise InputError(f"{name}: nested too deeply") from error
    except (ValueError, OverflowError) as error:
        raise InputError(f"{name}: {error}") from error
    if _LONG_NUMBER.search(data) is not None:
        _check_numbers(msgspec.json.decode(data), name)
    return value


def _check_numbers(value: Any, name: str) -> None:
    """Raise for an integer of more than 64 bits, which neither floats nor arrays hold."""
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
        raise InputError(f"{name}: not a 64-bit integer: {hex(value)[:40]}")
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return
    for each in value:
        _check_numbers(each, name)


def decode_toml(data: bytes, kind: type[_Kind], name: str, **options: Any) -> _Kind:
    """Return TOML as a value of a type; `name` begins each message.

    Parameters
    ----------
    options
        Passed on to `msgspec.convert`.

    Raises
    ------
    InputError
        Not UTF-8, not TOML, nested too deeply, or not of that type.
    """
    tree = toml_tree(data, name)
    try:
        value: _Kind = msgspec.convert(tree, kind, **options)
    except msgspec.ValidationError as error:
        raise InputError(f"{name}: {with_known(error, kind)}") from error
    except RecursionError as error:
        raise InputError(f"{name}: nested too deeply") from error
    except (ValueError, OverflowError) as error:
        raise InputError(f"{name}: {error}") from error
    return value


def toml_tree(data: bytes, name: str) -> dict[str, Any]:
    """Return TOML as a dictionary; `name` begins each message.

    Raises
    ------
    InputError
        Not UTF-8, not TOML, or nested too deeply.
    """
    if _LONG_KEY.search(data) is not None:
        raise InputError(f"{name}: a key must have at most {KEY_PARTS} parts")
    try:
        return tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise InputError(f"{name}: nested too deeply") from error
    except (
        ValueError,
        OverflowError,
    ) as error:  # TOMLDecodeError is a ValueError, and so is a number too long
        raise InputError(f"{name}: not TOML: {error}") from error
