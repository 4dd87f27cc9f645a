"""What a file is, what each reader takes, and what to type; for messages.

A reader that is given a file of another kind says so: ``boot.gmem is a trace; must be a cost file, as
gmemcore template cost prints; for a trace, use gmemcore replay boot.gmem``. `_USES` has what a kind of file
is for, and each `Wanted` below what a reader takes.
"""

import os
import re
import shlex
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
    b"PERFILE2": "a perf recording",
    b"\x17\x08Dtracing": "a trace-cmd recording",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
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
"""Top-level keys of TOML -> what the file is; anything else is a file of axes, or TOML."""
AXES: Final = frozenset(
    {"memory", "range", "abi", "vm_type", "firmware", "phase", "direction", "flag", "effect", "fragmentation"}
    | {"backing", "huge_pages", "threads", "enforce", "page_size"}
)
"""Keys that a file of axes has, and no others."""
LOG_EVENTS: Final = re.compile(
    rb"kvm_convert_memory|kvm_vm_set_mem_attributes|kvm_memory_fault|ram_block_attributes_state_change"
    rb"|kvm_sev_(?:snp_launch_\w+|init|change_state)|kvm_set_user_memory|(?:sev|tdx)_handle_reset"
)
"""Events of the log of a host; `gmemcore.workload.logs.forms` has how each is printed."""
_CONTAINER: Final = "a gmemcore container"  # cut, or damaged: its reader says where
_SERIES: Final = "a series of snapshots"
COMPRESSED: Final = tuple(name for name in _BEGINNINGS.values() if name.startswith("compressed"))
"""Kinds that a log can have."""
RUN_KINDS: Final = ("a bench run", "a comparison with two backings", "a stress run", "a replay")
"""Kinds of run files."""
_TRACES: Final = ("a trace", "a trace in JSON Lines", "a Parquet file")

_USES: Final = {
    "a trace": "gmemcore replay FILE",
    "a trace in JSON Lines": "gmemcore replay FILE",
    "a log of a host": "gmemcore replay FILE",
    "a snapshot": "gmemcore snapshot plot FILE",
    _SERIES: "gmemcore snapshot plot FILE",
    **dict.fromkeys(RUN_KINDS, "gmemcore report FILE"),
    "the log of a stress run": "gmemcore stress SPEC --resume -o RUN",
    "a vector file": "gmemcore conform FILE",
    "the spec of a fleet": "gmemcore stress FILE",
    "a proposal": "gmemcore audit --proposal FILE",
    "a cost file": "gmemcore cost show FILE",
    "a file of axes": "gmemcore bench --axes FILE",
    "a result of gmemcore kvm fuzz": "gmemcore kvm table FILE",
    "a perf recording": "perf script -i FILE > LOG",
    "a trace-cmd recording": "trace-cmd report FILE > LOG",
}
"""What a file is -> what to type with it."""

_ANY_TEXT: Final = frozenset({"a text file", "text that isn't UTF-8", "TOML"})
_ANY_JSON: Final = frozenset({"JSON", "JSON Lines", "no JSON, though it begins like it"})
"""Kinds of which a reader of that syntax says more: where it can't be read, and why."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a reader takes.

    Attributes
    ----------
    words : str
        All kinds, with their articles.
    source : str
        What writes one, as the end of a sentence: ``gmemcore bench -o FILE writes``.
    kinds : tuple of str
        The same kinds as `kind_of` has them: the reader's own error says more about these.
    alike : frozenset of str
        Kinds that have its syntax alone: the reader's own error is extended by what is needed.
    """

    words: str
    source: str
    kinds: tuple[str, ...]
    alike: frozenset[str] = frozenset()

    @property
    def binary(self) -> bool:
        """Whether it can be a container."""
        return "a trace" in self.kinds or _SERIES in self.kinds

    def __str__(self) -> str:
        return f"{self.words}, as {self.source}"


_SNAPSHOTS_FROM: Final = "gmemcore replay WORKLOAD --series FILE writes"
SNAPSHOTS: Final = Wanted("a snapshot or a series of snapshots", _SNAPSHOTS_FROM, ("a snapshot", _SERIES))
SERIES: Final = Wanted("a series of snapshots", _SNAPSHOTS_FROM, (_SERIES,))
RUNS: Final = Wanted(
    "a run of bench, backings, stress or replay", "-o FILE of these commands writes", RUN_KINDS, _ANY_JSON
)
COUNTED: Final = Wanted(
    "a run of bench, replay or stress", "-o FILE of these commands writes", RUN_KINDS, _ANY_JSON
)
RUNS_OF: Final = {
    "bench": Wanted("a bench run", "gmemcore bench -o FILE writes", RUN_KINDS, _ANY_JSON),
    "stress": Wanted("a stress run", "gmemcore stress SPEC -o FILE writes", RUN_KINDS, _ANY_JSON),
    "replay": Wanted("a replay", "gmemcore replay WORKLOAD -o FILE writes", RUN_KINDS, _ANY_JSON),
}
"""Command -> its runs."""
DRAWN: Final = Wanted(
    "a snapshot, a series of snapshots, or a run of bench, stress or replay",
    "gmemcore replay WORKLOAD --series FILE or -o FILE of these commands writes",
    (*SNAPSHOTS.kinds, *RUN_KINDS),
)
TRACE: Final = Wanted("a trace", "gmemcore trace record writes", _TRACES, _ANY_JSON)
WORKLOAD: Final = Wanted(
    "a trace or a log of a host",
    "gmemcore trace record and gmemcore trace capture write",
    (*_TRACES, "a log of a host", *COMPRESSED),
    _ANY_TEXT,
)
LAUNCHES: Final = Wanted(
    "a log of launches", "gmemcore trace capture records", ("a log of a host", *COMPRESSED), _ANY_TEXT
)
VECTORS: Final = Wanted("a vector file", "gmemcore kvm fuzz writes", ("a vector file",), _ANY_JSON)
FUZZED: Final = Wanted(
    "a result of gmemcore kvm fuzz",
    "gmemcore kvm fuzz --json prints",
    ("a result of gmemcore kvm fuzz",),
    _ANY_JSON,
)
FLEET: Final = Wanted(
    "the spec of a fleet", "gmemcore template fleet prints", ("the spec of a fleet",), _ANY_TEXT
)
PROPOSAL: Final = Wanted("a proposal", "gmemcore template proposal prints", ("a proposal",), _ANY_TEXT)
COST: Final = Wanted("a cost file", "gmemcore template cost prints", ("a cost file",), _ANY_TEXT)
CHOSEN_AXES: Final = Wanted(
    "a file of axes", "gmemcore template axes prints", ("a file of axes", "empty"), _ANY_TEXT
)


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
    if LOG_EVENTS.search(data) is not None and data.lstrip()[:1] not in (b"{", b"["):
        return "a log of a host"
    if data.lstrip()[:1] in (b"{", b"["):
        return _json(data, whole=size <= len(data))
    if b"\0" in data:
        return "a binary file"
    try:
        data.decode()
    except UnicodeDecodeError as error:
        if error.start < len(data) - 4 or size <= len(data):
            return "text that isn't UTF-8"
    return _toml(data) if size <= len(data) else "a text file"


def is_not(path: PathLike, wanted: Wanted, purpose: str = "") -> str:
    """Return the message for a file of another kind: what it is, what is needed, and what to type.

    Parameters
    ----------
    path : path-like
        The file, which was read already.
    wanted : Wanted
        What is needed.
    purpose : str
        What it is needed for.
    """
    name = os.fspath(path)
    need = f"must be {wanted.words}{purpose and f' for {purpose}'}, as {wanted.source}"
    try:
        found = kind_of(path)
    except (InputError, OSError):  # a pipe was read already
        return f"{name}: {need}"
    use = _USES.get(_kind(found), "").replace("FILE", shlex.quote(name))
    return f"{name} is {found}; {need}{use and f'; for {_kind(found)}, use {use}'}"


@contextmanager
def expecting(path: PathLike, wanted: Wanted) -> Iterator[None]:
    """Let the error about a file say what the file is, where it is known to be something else.

    Parameters
    ----------
    path : path-like
        The file that is read in the block.
    wanted : Wanted
        What is needed.
    """
    try:
        yield
    except (InputError, InvalidArgumentError) as error:
        try:
            found = _kind(kind_of(path))
        except (InputError, OSError):  # a pipe, or it can't be read at all
            raise error from None
        text = getattr(error, "strerror", None) or str(error)  # of an OSError without its number
        if found in wanted.kinds or wanted.words in text or (wanted.binary and found.startswith(_CONTAINER)):
            raise
        if found in wanted.alike:
            raise type(error)(f"{text}; must be {wanted}") from error
        raise type(error)(is_not(path, wanted)) from error


def _kind(found: str) -> str:
    """Return the kind alone, without how many."""
    return _SERIES if found.startswith("a series") else found


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
        return "a snapshot" if len(snapshots) == 1 else f"a series of {len(snapshots):,} snapshots"
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
    return _named(tree, _TOML_KINDS) or ("a file of axes" if tree and tree.keys() <= AXES else "TOML")


def _named(keys: Mapping[str, Any], kinds: tuple[tuple[frozenset[str], str], ...]) -> str | None:
    return next((name for wanted, name in kinds if wanted <= keys.keys()), None)
