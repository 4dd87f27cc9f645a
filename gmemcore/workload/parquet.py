"""Traces as Parquet, which pandas, polars and DuckDB open: a row per operation, in columns of plain types.

==============================  ==========================================================================
``step``                        its name, as ``CONVERT`` (`gmemcore.engine.steps.Step`)
``gpa``, ``size``               bytes
``attributes``, ``flags``       of a conversion: 8 (private) or 0 (shared); its content mode
``access``                      of a guest's access: ``AS_ATTRIBUTE``, ``SHARED``, ``PRIVATE``; else null
``page_type``, ``from_source``  of a launch update: `gmemcore.uapi.PageType`; whether the VMM gives the
                                image; else null
``guest``                       which guest of a fleet; 0 in a trace of one
``time_ns``                     from the start of the trace; 0 if unknown
==============================  ==========================================================================

Numbers are unsigned. The file's metadata has the header as JSON (key ``gmemcore``), and pages that begin
otherwise than their region (key ``gmemcore.start``): gpa, size and attributes as little-endian words,
deflated, in base64. What another program wrote is a trace if it has this metadata and the columns step, gpa
and size.
"""

import base64
import binascii
import os
import zlib
from typing import Any, BinaryIO, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.steps import Step
from gmemcore.errors import GmemError, MissingExtraError
from gmemcore.files.writing import replacing
from gmemcore.uapi import PageType
from gmemcore.workload.container import MAX_HEADER, open_regular
from gmemcore.workload.operations import FROM_SOURCE, OPERATION, Access, Operations
from gmemcore.workload.trace import MAX_OPERATIONS, Header, Trace, TraceError

_KEY: Final = b"gmemcore"
_START_KEY: Final = b"gmemcore.start"
_VERSION: Final = 1
_ROWS: Final = 1 << 20
"""Rows of a row group, which readers hold at a time."""
_NUMBERS: Final = {"gpa": 64, "size": 64, "attributes": 64, "flags": 64, "guest": 32, "time_ns": 64}
"""Columns that are a field of `OPERATION`, and their bits."""
_NAMES: Final = {
    "step": tuple(step.name for step in Step),
    "access": tuple(access.name for access in Access),
    "page_type": tuple(page_type.value for page_type in PageType),
}
"""Columns of names, and the names by the number that each stands for."""
_NEEDED: Final = ("step", "gpa", "size")
_COLUMNS: Final = (
    "step",
    "gpa",
    "size",
    "attributes",
    "flags",
    "access",
    "page_type",
    "from_source",
    "guest",
    "time_ns",
)
_MOST_THRIFT: Final = 1 << 26
"""Bytes of a string, and items of a list, that a file's metadata may have."""
_START_ITEM: Final = 3 * 8


class _Meta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The metadata's header."""

    trace: int
    header: Header


def import_pyarrow() -> tuple[Any, Any]:
    """Return pyarrow and its Parquet module.

    Raises
    ------
    MissingExtraError
        They aren't installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("Parquet needs pyarrow; pip install 'gmemcore[analysis]'") from error
    return pyarrow, parquet


# ---- writing -----------------------------------------------------------------------------------------------
def write(path: str | os.PathLike[str], trace: Trace) -> None:
    """Write a trace, whole or not at all.

    Raises
    ------
    MissingExtraError
        pyarrow isn't installed.
    OSError
        The file can't be written.
    """
    arrow, parquet = import_pyarrow()
    operations = trace.operations
    metadata = {_KEY: msgspec.json.encode(_Meta(_VERSION, trace.header))}
    if len(trace.start):
        metadata[_START_KEY] = base64.b64encode(zlib.compress(trace.start.astype("<u8").tobytes()))
    schema = _columns(arrow, operations[:0]).schema
    options = {"compression": "zstd", "store_schema": False, "write_page_checksum": True}
    with replacing(path, mode=0o600) as file, parquet.ParquetWriter(file, schema, **options) as writer:
        for start in range(0, len(operations), _ROWS):
            writer.write_table(_columns(arrow, operations[start : start + _ROWS]))
        writer.add_key_value_metadata(metadata)


def _columns(arrow: Any, operations: Operations) -> Any:
    """Return operations as a pyarrow Table."""
    step, variant = operations["step"], operations["variant"]
    accesses = (step == Step.GUEST_READ) | (step == Step.GUEST_WRITE)
    populates = step == Step.POPULATE
    columns = {name: arrow.array(np.ascontiguousarray(operations[name])) for name in _NUMBERS}
    columns["step"] = _named(arrow, "step", step, None)
    columns["access"] = _named(arrow, "access", variant, ~accesses)
    columns["page_type"] = _named(arrow, "page_type", variant & ~np.uint16(FROM_SOURCE), ~populates)
    columns["from_source"] = arrow.array(variant & FROM_SOURCE > 0, mask=~populates)
    return arrow.table({name: columns[name] for name in _COLUMNS})


def _named(arrow: Any, column: str, numbers: NDArray[np.uint16], nulls: NDArray[np.bool_] | None) -> Any:
    """Return names for numbers, as strings; null where told."""
    indices = arrow.array(numbers.astype(np.int32), mask=nulls)
    return arrow.array(_NAMES[column]).take(indices)


# ---- reading -----------------------------------------------------------------------------------------------
def read(path: str | os.PathLike[str], max_bytes: int) -> Trace:
    """Read a trace.

    Parameters
    ----------
    path : path-like
        A regular file.
    max_bytes : int
        Bytes that the file may have, and that its operations may take in memory.

    Raises
    ------
    TraceError
        Not a trace, or damaged.
    MissingExtraError
        pyarrow isn't installed.
    OSError
        The file can't be opened.
    """
    arrow, parquet = import_pyarrow()
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise TraceError(f"must be at most {max_bytes:,} bytes (max_bytes), not {size:,}")
        try:
            return _read(arrow, parquet, file, max_bytes)
        except TraceError:
            raise
        except (arrow.ArrowException, OSError, ValueError, OverflowError) as error:
            raise TraceError(f"not Parquet, or damaged: {error}") from error


def _read(arrow: Any, parquet: Any, file: BinaryIO, max_bytes: int) -> Trace:
    limits = {"thrift_string_size_limit": _MOST_THRIFT, "thrift_container_size_limit": _MOST_THRIFT}
    table = parquet.ParquetFile(file, page_checksum_verification=True, **limits)
    most = min(MAX_OPERATIONS, max_bytes // OPERATION.itemsize)
    rows = table.metadata.num_rows
    if not 0 <= rows <= most:
        raise TraceError(f"{rows:,} rows; at most {most:,} are read")
    names = table.schema_arrow.names
    if missing := [name for name in _NEEDED if name not in names]:
        raise TraceError(f"no column {', '.join(missing)}; a trace has {', '.join(_COLUMNS)}")
    if unknown := [name for name in names if name not in _COLUMNS or names.count(name) > 1]:
        raise TraceError(f"unknown column {unknown[0][:40]!r}; a trace has {', '.join(_COLUMNS)}")
    header, start = _metadata(table.schema_arrow.metadata or {}, max_bytes)
    operations, done = np.zeros(rows, OPERATION), 0
    for batch in table.iter_batches(_ROWS):
        if done + len(batch) > rows:
            raise TraceError(f"more rows than the metadata's {rows:,}")
        _fill(arrow, batch, operations[done : done + len(batch)], done)
        done += len(batch)
    if done < rows:
        raise TraceError(f"{done:,} rows; the metadata says {rows:,}")
    return Trace(header, operations, start)


def _metadata(metadata: dict[bytes, bytes], max_bytes: int) -> tuple[Header, NDArray[np.uint64]]:
    text = metadata.get(_KEY)
    if text is None:
        raise TraceError(
            "no metadata 'gmemcore', which says where the guest's memory is; keep it when writing"
        )
    if len(text) > MAX_HEADER:
        raise TraceError(f"the header must be at most {MAX_HEADER:,} bytes")
    try:
        meta = msgspec.json.decode(text, type=_Meta)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TraceError(f"header: {error}") from error
    except GmemError as error:
        raise TraceError(f"header: {error.strerror}") from error
    if meta.trace != _VERSION:
        raise TraceError(f"trace version {meta.trace}; this reads {_VERSION}")
    return meta.header, _start(metadata.get(_START_KEY, b""), max_bytes)


def _start(text: bytes, max_bytes: int) -> NDArray[np.uint64]:
    if not text:
        return np.zeros((0, 3), np.uint64)
    inflate = zlib.decompressobj()
    try:
        data = inflate.decompress(base64.b64decode(text, validate=True), max_bytes)
    except (binascii.Error, zlib.error) as error:
        raise TraceError(f"start of pages: {error}") from error
    if not inflate.eof or inflate.unused_data or len(data) % _START_ITEM:
        raise TraceError("start of pages: cut, or not of whole ranges")
    return np.frombuffer(data, "<u8").astype(np.uint64).reshape(-1, 3)


def _fill(arrow: Any, batch: Any, into: Operations, before: int) -> None:
    """Fill operations from a batch of rows; `before` rows came before it."""
    columns = {name: batch.column(name) for name in batch.schema.names}
    for name, bits in _NUMBERS.items():
        if name in columns:
            column = columns[name]
            if not arrow.types.is_integer(column.type):
                raise TraceError(f"column {name} must be integers, not {column.type}")
            numbers = column.fill_null(0).cast(arrow.uint64()).to_numpy(zero_copy_only=False)
            if bits < 64:
                _refuse(numbers >> bits > 0, before, f"{name} must fit into {bits} bits")
            into[name] = numbers
    nothing = np.full(len(batch), -1)
    step, access, page_type = (_numbers(arrow, columns.get(name), name, before, nothing) for name in _NAMES)
    _refuse(step < 0, before, "step must not be null")
    from_source = np.zeros(len(batch), np.bool_)
    if (column := columns.get("from_source")) is not None:
        if not arrow.types.is_boolean(column.type):
            raise TraceError(f"column from_source must be booleans, not {column.type}")
        from_source = column.fill_null(False).to_numpy(zero_copy_only=False)
    accesses = (step == Step.GUEST_READ) | (step == Step.GUEST_WRITE)
    _refuse((access > 0) & ~accesses, before, "access is of GUEST_READ and GUEST_WRITE")
    populates = step == Step.POPULATE
    _refuse(((page_type > 0) | from_source) & ~populates, before, "page_type and from_source are of POPULATE")
    into["step"] = step
    into["variant"] = np.where(
        accesses, access, np.where(populates, page_type | from_source * FROM_SOURCE, 0)
    ).clip(0)


def _numbers(
    arrow: Any, column: Any, name: str, before: int, nothing: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the numbers that names stand for; -1 for null."""
    if column is None:
        return nothing
    from pyarrow import compute

    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if arrow.types.is_null(column.type):
        return nothing
    column = column.cast(arrow.string())
    numbers: NDArray[np.int64] = (
        compute.index_in(column, value_set=arrow.array(_NAMES[name]))
        .fill_null(-1)
        .to_numpy(zero_copy_only=False)
    ).astype(np.int64)
    wrong = (numbers < 0) & column.is_valid().to_numpy(zero_copy_only=False)
    _refuse(wrong, before, f"{name} must be one of {', '.join(_NAMES[name])}")
    return numbers


def _refuse(wrong: NDArray[np.bool_], before: int, what: str) -> None:
    """Refuse rows that are wrong; the message has the number of the first, from 0."""
    if wrong.any():
        raise TraceError(f"row {before + int(np.argmax(wrong)):,}: {what}")
