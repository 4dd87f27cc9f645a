"""Reading a log from a file or a pipe, compressed or not, in blocks of bounded size."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Final

from gmemcore.workload.logs.columns import Columns
from gmemcore.workload.logs.lines import MAX_LINE, Lines
from gmemcore.workload.logs.log import Collector, Log
from gmemcore.workload.trace import TraceError

BLOCK: Final = 1 << 20
"""Bytes that are read at a time: what is made of a block stays in a core's cache."""
_PIECE: Final = 1 << 12
"""Bytes that are asked of a file at a time; a cut takes away what is decompressed behind the last of them."""


def _zstd(file: BinaryIO) -> Any:
    try:
        from compression.zstd import ZstdFile  # type: ignore[import-not-found]  # Python 3.14
    except ImportError:
        pass
    else:
        return ZstdFile(file)
    try:
        import pyarrow as pa
    except ImportError:
        raise TraceError("a zstd file needs pyarrow: pip install 'gmemcore[analysis]'") from None
    return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")


COMPRESSIONS: Final[dict[bytes, Callable[[BinaryIO], Any]]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"\xfd7zXZ\x00": lzma.LZMAFile,
    b"BZh": bz2.BZ2File,
    b"\x28\xb5\x2f\xfd": _zstd,
}
"""First bytes of a compressed file -> what reads it."""

_TOO_LONG: Final = f"line {{}}: longer than {MAX_LINE:,} bytes: not a log"
_DAMAGED: Final = (EOFError, OSError, lzma.LZMAError, zlib.error, ValueError)
"""What decompressors raise for bytes that they didn't write."""


def decompressed(file: io.BufferedReader) -> tuple[BinaryIO, bool]:
    """Return a file as what it holds, and whether it was compressed."""
    head = file.peek(8)[:8]
    for magic, reader in COMPRESSIONS.items():
        if head.startswith(magic):
            return reader(file), True
    return file, False


def read_log(
    file: io.BufferedReader, *, strict: bool = False, progress: Callable[[int], object] | None = None
) -> Log:
    """Read a log.

    Parameters
    ----------
    file : io.BufferedReader
        At its start; compressed by gzip, xz, bzip2 or zstd, or not.
    strict : bool
        Raise at the first line of a known event that can't be read; otherwise such lines are listed.
    progress : callable or None
        Called with the bytes of the file that have been read, after each block.

    Raises
    ------
    TraceError
        A line that can't be read, or compressed data that is damaged or ends early (strict); a line longer
        than `MAX_LINE`.
    InvalidArgumentError
        EINVAL: more events than a trace has operations.
    """
    collector = Collector(strict=strict)
    lines = Lines(collector)
    columns = Columns(collector, lines)
    for block, whole in _blocks(*decompressed(file), collector, lambda: columns.number):
        if whole:
            columns.read(block)
        else:
            columns.number += 1
            lines.read(columns.number, block, cut=True)
        if progress is not None:
            progress(file.tell() if file.seekable() else 0)
    lines.finish()
    log = collector.finish()
    log.lines = columns.number
    return log


def _blocks(
    file: BinaryIO, compressed: bool, collector: Collector, lines: Callable[[], int]
) -> Iterator[tuple[bytes, bool]]:
    """Yield blocks of whole lines, then what follows the last line feed: (bytes, whether lines are whole).

    `lines` returns how many lines have been read of what was yielded.
    """
    kept = b""
    while True:
        data, error = _next(file)
        end = data.rfind(b"\n") + 1
        if end:
            block = kept + data[:end]
            if len(block) > MAX_LINE and block.find(b"\n") > MAX_LINE:
                raise TraceError(_TOO_LONG.format(lines() + 1))
            yield block, True
            kept = b""
        kept += data[end:]
        if len(kept) > MAX_LINE:
            raise TraceError(_TOO_LONG.format(lines() + 1))
        if error is not None and not compressed:
            raise error
        if error is not None:
            collector.unreadable(lines() + 1, f"the compressed data is cut or damaged here ({error})")
        if error is not None or not data:
            break
    if kept:
        yield kept, False


def _next(file: BinaryIO) -> tuple[bytes, Exception | None]:
    """Return the next `BLOCK` bytes or a little more, fewer only at the end or an error, and the error."""
    parts, size = [], 0
    read = getattr(file, "read1", file.read)  # gives what there is before it fails
    try:
        while size < BLOCK:
            part = read(_PIECE)
            if not part:
                break
            parts.append(part)
            size += len(part)
    except _DAMAGED as error:
        return b"".join(parts), error
    return b"".join(parts), None
