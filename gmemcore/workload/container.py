"""The one file format: traces and snapshots are named arrays in a checked container.

::

    0     8     magic
    8     4     version, little-endian as everything here
    12    4     bytes of the header, at most 1 MiB
    16    16    checksum of the 16 bytes before and of the header
    32    ...   header, JSON: kind, meta, sections (name, dtype, shape, offset, length, checksum)
    ...   ...   the sections, in the order of the header, without a gap, up to the last byte of the file

A reader believes nothing: each length is held against the size of the file before memory is taken for it.
There is no pickle, no compression and no object dtype. Checksums find damage; they don't prove who wrote it.
What goes in is the caller's choice; no caller here puts in what a guest keeps private, or keys, unasked.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from gmemcore.errors import InputError
from gmemcore.files.kinds import CONTAINER_PREFIX, CONTAINER_SUM, MAGIC, SNAPSHOTS, TRACE, is_not
from gmemcore.files.reading import PathLike, opened
from gmemcore.files.writing import Buffer, replace_file
from gmemcore.workload.operations import OPERATION

KINDS: Final = {"trace": TRACE, "snapshot": SNAPSHOTS}
"""What a container can hold, and how messages call it."""

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    **{name: np.dtype(f"<{name}") for name in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f4", "f8")},
    "operation": OPERATION,
}
"""Element types of sections, by the name that files have for them; every bit pattern of each is a value."""

VERSION: Final = 1
"""Version of the format that is written, and the only one that is read."""
MAX_HEADER: Final = 1 << 20
"""Bytes that a header may have."""
MAX_BYTES: Final = 4 << 30
"""Bytes that a file may have, unless the reader says otherwise."""
CHECKSUM_SIZE: Final = CONTAINER_SUM
"""Bytes of a `checksum`."""

_PREFIX: Final = CONTAINER_PREFIX
_HEADER_AT: Final = _PREFIX.size + CHECKSUM_SIZE
_MAX_DIMENSIONS: Final = 4
_MAX_NAME: Final = 64


class ContainerError(InputError):
    """A file that isn't a whole and undamaged container, or contents that can't be put into one."""


@dataclass(frozen=True, slots=True)
class Container:
    """What a file holds.

    Attributes
    ----------
    kind : str
        One of `KINDS`.
    meta : dict
        JSON-able values about the contents; the kind's reader knows which.
    sections : dict of str to ndarray
        Arrays by name, in their order in the file.
    """

    kind: str
    meta: dict[str, Any]
    sections: dict[str, NDArray[Any]]


class _Section(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int
    checksum: str


class _Header(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    kind: str
    meta: dict[str, Any]
    sections: list[_Section]


def checksum(*parts: Buffer) -> bytes:
    """Sum bytes: SHA-256 of the parts one after another, cut to 16 bytes.

    It is the sum of everything that gmemcore writes and reads again: sections, headers, records of logs.
    """
    summed = hashlib.sha256()
    for part in parts:
        summed.update(part)
    return summed.digest()[:CHECKSUM_SIZE]


# ---- writing ----------------------------------------------------------------------------------------------
def write(path: PathLike, kind: str, meta: Mapping[str, Any], sections: Mapping[str, NDArray[Any]]) -> None:
    """Write a container, whole or not at all; a new one is readable by its owner alone, see `replace_file`.

    Parameters
    ----------
    path : path-like
        Where; a regular file that is there is replaced.
    kind : str
        One of `KINDS`.
    meta : mapping
        JSON-able.
    sections : mapping of str to ndarray
        C-contiguous arrays of a dtype of `DTYPES`, up to 4 dimensions.

    Raises
    ------
    ContainerError
        Something that the format doesn't hold; nothing was written.
    InputError, OSError
        As `replace_file`.
    """
    described, offset = [], 0
    for name, array in sections.items():
        described.append(_described(name, array, offset))
        offset += array.nbytes
    header = _encoded(kind, meta, described)
    prefix = _PREFIX.pack(MAGIC, VERSION, len(header))
    size = len(prefix) + CONTAINER_SUM + len(header) + offset
    if size > MAX_BYTES:  # which `read` would refuse
        raise ContainerError(
            f"{os.fspath(path)}: must be at most {MAX_BYTES:,} bytes, and would have {size:,}; "
            "write fewer snapshots or operations"
        )
    bodies = (_bytes_of(array) for array in sections.values())
    replace_file(path, (prefix, checksum(prefix, header), header, *bodies), mode=0o600)


def _described(name: str, array: NDArray[Any], offset: int) -> _Section:
    """Return the header's entry of a section; its offset counts from the end of the header."""
    if not isinstance(array, np.ndarray):
        raise ContainerError(f"section {name!r} must be an ndarray, not {type(array).__name__}")
    dtype = next((known for known, dtype in DTYPES.items() if dtype == array.dtype), None)
    if dtype is None:
        raise ContainerError(f"section {name!r} has dtype {array.dtype}; known: {', '.join(DTYPES)}")
    if not array.flags.c_contiguous or not 1 <= array.ndim <= _MAX_DIMENSIONS:
        raise ContainerError(
            f"section {name!r} must be a C-contiguous array of 1 to {_MAX_DIMENSIONS} dimensions, "
            f"not of shape {array.shape} and strides {array.strides}"
        )
    if not (isinstance(name, str) and _is_name(name)):
        raise ContainerError(f"a section's name must be 1 to {_MAX_NAME} of a-z, 0-9, _ and -, not {name!r}")
    return _Section(name, dtype, array.shape, offset, array.nbytes, checksum(_bytes_of(array)).hex())


def _encoded(kind: str, meta: Mapping[str, Any], sections: list[_Section]) -> bytes:
    if kind not in KINDS:
        raise ContainerError(f"kind {kind!r}; known: {', '.join(KINDS)}")
    try:
        header = msgspec.json.encode(_Header(kind, dict(meta), sections))
    except (TypeError, ValueError, RecursionError) as error:
        raise ContainerError(f"meta can't be written as JSON: {error}") from error
    if len(header) > MAX_HEADER:
        raise ContainerError(f"a header must have at most {MAX_HEADER:,} bytes, not {len(header):,}")
    return header


# ---- reading ----------------------------------------------------------------------------------------------
def read(path: PathLike, kind: str, *, max_bytes: int = MAX_BYTES) -> Container:
    """Read a container of one kind, checking every byte of it.

    Parameters
    ----------
    path : path-like
        A regular file.
    kind : str
        What is expected, one of `KINDS`.
    max_bytes : int
        The largest file to be taken.

    Returns
    -------
    Container
        Its arrays are the caller's own; memory beyond them is that of the header.

    Raises
    ------
    ContainerError
        Not a container, of another kind or version, damaged, cut off, with bytes too many, or too large. The
        message says what and at which byte.
    OSError
        The file can't be opened or read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            if size > max_bytes:
                raise ContainerError(f"must be at most {max_bytes:,} bytes (max_bytes), not {size:,}")
            if not size:
                raise _OtherKindError
            header, at = _read_header(file, size)
            if header.kind != kind:
                raise _OtherKindError
            _check_sections(header, at, size)
            return Container(header.kind, header.meta, _read_sections(file, header, at))
        except _OtherKindError:
            raise ContainerError(is_not(path, KINDS[kind])) from None
        except ContainerError as error:
            raise ContainerError(f"{os.fspath(path)}: {error}") from None


class _OtherKindError(Exception):
    """The file isn't a container, or holds something else."""


@contextmanager
def open_regular(path: PathLike) -> Iterator[BinaryIO]:
    """Open a regular file for reading; anything else is refused, and nothing is waited for.

    Raises
    ------
    ContainerError
        A pipe, a device, a folder or a socket.
    OSError
        Nothing is there, or it can't be opened.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(opened(path, pipe=False))
        except InputError as error:
            raise ContainerError(str(error)) from error
        yield file


def is_container(path: PathLike) -> bool:
    """Whether a file begins as a container does."""
    with open_regular(path) as file:
        return file.read(len(MAGIC)) == MAGIC


def _read_header(file: BinaryIO, size: int) -> tuple[_Header, int]:
    """Read and check what comes before the sections; returns it and the byte where they begin."""
    prefix = file.read(_PREFIX.size)
    if prefix[: len(MAGIC)] != MAGIC[: len(prefix)]:
        raise _OtherKindError
    if size < _HEADER_AT:
        raise ContainerError(f"cut off: {size} bytes, and {_HEADER_AT} come before the header")
    _, version, header_size = _PREFIX.unpack(prefix)
    if version != VERSION:
        raise ContainerError(f"version must be {VERSION}, not {version} (byte 8)")
    if header_size > MAX_HEADER:
        raise ContainerError(
            f"a header must have at most {MAX_HEADER:,} bytes, not {header_size:,} (byte 12)"
        )
    if _HEADER_AT + header_size > size:
        raise ContainerError(
            f"cut off: the header ends at byte {_HEADER_AT + header_size}, the file at {size}"
        )
    expected, text = file.read(CHECKSUM_SIZE), file.read(header_size)
    if checksum(prefix, text) != expected:
        raise ContainerError(f"damaged: the checksum of the header at bytes 0 to {_HEADER_AT + header_size}")
    try:
        return msgspec.json.decode(text, type=_Header), _HEADER_AT + header_size
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ContainerError(f"malformed header at byte {_HEADER_AT}: {error}") from error


def _check_sections(header: _Header, at: int, size: int) -> None:
    """Check what the header says against itself and against the size of the file."""
    names, offset = set(), 0
    for section in header.sections:
        _check_section(section, offset, size - at)
        if section.name in names:
            raise ContainerError(f"section {section.name!r} twice")
        names.add(section.name)
        offset += section.length
    if at + offset != size:
        raise ContainerError(f"the sections end at byte {at + offset}, the file at {size}")


def _check_section(section: _Section, offset: int, available: int) -> None:
    if not _is_name(section.name):
        raise ContainerError(f"section name {section.name[:_MAX_NAME]!r}")
    where = f"section {section.name!r}"
    if section.dtype not in DTYPES:
        raise ContainerError(f"{where}: dtype {section.dtype[:_MAX_NAME]!r}; known: {', '.join(DTYPES)}")
    if not 1 <= len(section.shape) <= _MAX_DIMENSIONS or min(section.shape) < 0:
        raise ContainerError(f"{where}: shape of {len(section.shape)} dimensions, or below 0")
    if section.offset != offset:
        raise ContainerError(f"{where}: a gap or an overlap: it would begin {offset} bytes after the header")
    if not 0 <= section.length <= available - offset:
        raise ContainerError(f"{where}: cut off: its length goes beyond the end of the file")
    itemsize = DTYPES[section.dtype].itemsize
    if math.prod(section.shape) * itemsize != section.length:
        raise ContainerError(f"{where}: its shape and dtype don't give its length")
    if math.prod(max(n, 1) for n in section.shape) * itemsize >= 1 << 63:
        raise ContainerError(f"{where}: an empty shape beyond 2^63 bytes")


def _read_sections(file: BinaryIO, header: _Header, at: int) -> dict[str, NDArray[Any]]:
    """Read the sections into arrays of their own."""
    arrays = {}
    for section in header.sections:
        array = np.empty(section.shape, DTYPES[section.dtype])
        body = _bytes_of(array)
        if section.length and file.readinto(body) != section.length:  # type: ignore[attr-defined]
            raise ContainerError(f"section {section.name!r}: the file became shorter while it was read")
        if checksum(body).hex() != section.checksum:
            begin = at + section.offset
            end = begin + section.length
            raise ContainerError(f"damaged: the checksum of section {section.name!r}, bytes {begin} to {end}")
        arrays[section.name] = array
    return arrays


def _bytes_of(array: NDArray[Any]) -> memoryview:
    """View a C-contiguous array as bytes."""
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # a buffer at run time


def _is_name(name: str) -> bool:
    return 1 <= len(name) <= _MAX_NAME and all(letter in _NAME_LETTERS for letter in name)


_NAME_LETTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_-")
