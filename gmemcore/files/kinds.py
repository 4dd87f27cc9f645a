"""What a file is: its kind by its first bytes, in words for messages.

A reader that is given a file of another kind says so: ``boot.gmem is a trace, not a bench run``.
"""

import os
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import msgspec

from gmemcore.errors import InputError, InvalidArgumentError
from gmemcore.files.reading import PathLike, opened, toml_tree

MAGIC: Final = b"\x89GMEM\r\n\x1a"
"""First bytes of a container: no text, and damaged by transfers that translate line ends."""
CONTAINER_PREFIX: Final = struct.Struct("<8sII")
"""Magic, version, bytes of the header."""
CONTAINER_SUM: Final = 16
"""Bytes of the checksum between prefix and header."""

_LOOKED_AT: Final = 1 << 20  # bytes: the limit of a container's header and of a TOML file

_BEGINNINGS: Final = {
    b"PAR1": "a Parquet file",
    b"\x89PNG": "a picture (PNG)",
    b"%PDF": "a picture (PDF)",
    b"<svg": "a picture (SVG)",
    b"<!doctype html": "a web page",
    b"\x1f\x8b": "compressed (gzip)",
    b"\x28\xb5\x2f\xfd": "compressed (zstd)",
    b"\xfd7zXZ": "compressed (xz)",
    b"BZh": "compressed (bzip2)",
    b"PK\x03\x04": "a ZIP archive",
    b"\x7fELF": "a program",
}
_JSON_KINDS: Final[tuple[tuple[frozenset[str], str], ...]] = (
    (frozenset({"trace", "operations", "layout"}), "a trace in JSON Lines"),
    (frozenset({"environment", "primitives"}), "a bench run"),
    (frozenset({"environment", "comparison"}), "a comparison with two backings"),
    (frozenset({"environment", "spec", "spec_hash"}), "a stress run"),
    (frozenset({"replay", "trace"}), "a replay"),
    (frozenset({"sum", "record"}), "the log of a stress run"),
    (frozenset({"format", "cases"}), "a vector file"),
    (frozenset({"kernel", "coverage", "known"}), "a result of gmemcore kvm fuzz"),
)
"""Keys of the first JSON object -> what the file is."""
_TOML_KINDS: Final[tuple[tuple[frozenset[str], str], ...]] = (
    (frozenset({"behaviour"}), "the spec of a fleet"),
    (frozenset({"guests", "operations"}), "the spec of a fleet"),
    (frozenset({"name", "rules"}), "a proposal"),
    (frozenset({"title", "events"}), "a cost file"),
    (frozenset({"title"}), "a cost file"),
)
"""Top-level keys of TOML -> what the file is; anything else is TOML."""
_CONTAINER: Final = "a gmemcore container"  # cut, or damaged: its reader says where
COMPRESSED: Final = tuple(name for name in _BEGINNINGS.values() if name.startswith("compressed"))
"""Kinds that a log can have."""
RUN_KINDS: Final = ("a bench run", "a comparison with two backings", "a stress run", "a replay")
"""Kinds of run files."""
_UNSPECIFIC: Final = frozenset(
    {"empty", "of no known kind", "a text file", "TOML", "JSON", "JSON Lines"}
    | {"no JSON, though it begins like it"}
)
"""What says less than the error of a reader that can't read it."""


def kind_of(path: PathLike) -> str:
    """Return what a file is, in words with an article: ``a series of 12 snapshots``, ``a bench run``.

    Raises
    ------
    InputError, OSError
        It can't be read: it isn't a regular file, or isn't there.
    """
    with opened(path, pipe=False) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(_LOOKED_AT)
    if not data:
        return "empty"
    if data.startswith(MAGIC):
        return _container(data)
    for beginning, name in _BEGINNINGS.items():
        if data[: len(beginning)].lower() == beginning.lower():
            return name
    if data.lstrip()[:1] in (b"{", b"["):
        return _json(data, whole=size <= len(data))
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        if error.start < len(data) - 4 or size <= len(data):
            return "of no known kind"
        text = data[: error.start].decode()
    if "\0" in text:
        return "of no known kind"
    return _toml(data) if size <= len(data) else "a text file"


def is_not(path: PathLike, wanted: str) -> str:
    """Return the message for a file of another kind: what it is, and what is needed.

    Parameters
    ----------
    path : path-like
        The file, which was read already.
    wanted : str
        What is needed, with its article.
    """
    name = os.fspath(path)
    try:
        found = kind_of(path)
    except (InputError, OSError):  # a pipe was read already
        return f"{name}: must be {wanted}"
    return f"{name} is {found}; must be {wanted}"


@contextmanager
def expecting(path: PathLike, wanted: str, *, kinds: Collection[str] | None = None) -> Iterator[None]:
    """Let the error about a file say what the file is, where it is known to be something else.

    Parameters
    ----------
    path : path-like
        The file that is read in the block.
    wanted : str
        What is needed, with its article.
    kinds : collection of str or None
        Kinds as `kind_of` has them, for which the error stays as it is; None: `wanted`.
    """
    try:
        yield
    except (InputError, InvalidArgumentError) as error:
        try:
            found = kind_of(path)
        except (InputError, OSError):  # a pipe, or it can't be read at all
            raise error from None
        if found in _UNSPECIFIC or found in (kinds or (wanted,)) or found.startswith(_CONTAINER):
            raise
        raise type(error)(f"{os.fspath(path)} is {found}; must be {wanted}") from error


def _container(data: bytes) -> str:
    """Return what a container holds, from its header; it may be damaged."""
    begin = CONTAINER_PREFIX.size + CONTAINER_SUM
    if len(data) < begin:
        return f"{_CONTAINER}, cut off"
    size = CONTAINER_PREFIX.unpack_from(data)[2]
    try:
        header = msgspec.json.decode(data[begin : begin + size], type=dict[str, Any])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return f"{_CONTAINER}, damaged"
    if header.get("kind") == "trace":
        return "a trace"
    meta = header.get("meta")
    snapshots = meta.get("snapshots") if isinstance(meta, dict) else None
    if isinstance(snapshots, list):
        return "a snapshot" if len(snapshots) == 1 else f"a series of {len(snapshots)} snapshots"
    return f"{_CONTAINER} ({header.get('kind')})"


def _json(data: bytes, *, whole: bool) -> str:
    """Return what JSON or JSON Lines is, from its first object."""
    first, _, rest = data.partition(b"\n")
    for text in (first, data):
        try:
            value = msgspec.json.decode(text)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return _named(value, _JSON_KINDS) or ("JSON Lines" if text is first and rest.strip() else "JSON")
        return "JSON"
    return "no JSON, though it begins like it" if whole else "a text file"


def _toml(data: bytes) -> str:
    try:
        tree = toml_tree(data, "")
    except InputError:
        return "a text file"
    return _named(tree, _TOML_KINDS) or "TOML"


def _named(keys: Mapping[str, Any], kinds: tuple[tuple[frozenset[str], str], ...]) -> str | None:
    return next((name for wanted, name in kinds if wanted <= keys.keys()), None)
