"""Files of results: what kind of run one is, and its records, checked before anything is drawn.

A run comes from elsewhere: its size is bounded, every field has a type, and an error names the line.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from gmemcore.errors import InputError
from gmemcore.files.kinds import is_not
from gmemcore.files.reading import decode_json
from gmemcore.files.records import End, read_lines
from gmemcore.results.bench import BenchCell, BenchFirst, Seconds
from gmemcore.results.kinds import KINDS, SCHEMA, Kind
from gmemcore.results.replay import Replay, ReplayFirst
from gmemcore.results.stress import StressFirst, StressGuest, StressLast, StressSums, Violation

MAX_BYTES: Final = 256 << 20
"""Bytes of a file that are read at most."""


class RunError(ValueError):
    """A file that isn't a run, or a line of one that can't be read."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run that was read.

    Attributes
    ----------
    kind : str
        A name of `gmemcore.results.kinds.KINDS`.
    first : Struct
        Its first line.
    records : list of Struct
        The others.
    last : Struct or None
        The last record, where it is of another type.
    shortfall : str or None
        Why the file isn't the whole run, in words that follow its name; None if it is.
    name : str
        The file.
    end : End or None
        Its end record.
    """

    kind: str
    first: Any
    records: list[Any]
    last: Any = None
    shortfall: str | None = None
    name: str = ""
    end: End | None = None

    def require(self, kind: str) -> None:
        """Raise ValueError if it is a run of another kind."""
        if self.kind != kind:
            raise ValueError(f"must be a run of {kind}, not of {self.kind}")


def read_run(path: str | Path, *, max_bytes: int = MAX_BYTES) -> Run:
    """Read a file of results.

    A file that was cut is read as far as it goes; `Run.shortfall` says so.

    Parameters
    ----------
    path : str or Path
        What ``gmemcore bench``, ``backings``, ``stress`` or ``replay`` wrote.
    max_bytes : int
        A larger file is refused.

    Raises
    ------
    RunError
        Not a run, or a line that can't be read: which one and why.
    OSError
        The file can't be opened.
    """
    try:
        lines = read_lines(path, most=max_bytes)
    except InputError as error:
        raise RunError(str(error)) from None
    kind = _recognise(lines.first, path)
    first = _decode(lines.first, kind.first, path, 1)
    schema = getattr(first, "schema", 1)
    if schema > SCHEMA:
        raise RunError(
            f"{path}: records of schema {schema}, by a newer gmemcore; must be at most schema {SCHEMA}"
        )
    texts, last, shortfall = lines.records, None, lines.shortfall
    if lines.end is None and schema < SCHEMA:  # runs had no end record then
        shortfall = None
    if kind.last is not None:
        last = _last(texts[-1], kind.last) if texts else None
        texts = texts if last is None else texts[:-1]
    records = [_decode(line, kind.record, path, number) for number, line in texts]
    if kind.sums is not None and last is None:
        last, shortfall = kind.sums(records), shortfall or "incomplete: its sums are missing"
    return Run(kind.name, first, records, last, shortfall, str(path), lines.end)


def _last(line: tuple[int, bytes], kind: type[msgspec.Struct]) -> Any:
    """Return the last record; None for a line of another type, where the file was cut before it."""
    try:
        return msgspec.json.decode(line[1], type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _decode(line: bytes, wanted: Any, path: str | Path, number: int) -> Any:
    try:
        return decode_json(line, wanted, f"{path}: line {number}")
    except InputError as error:
        raise RunError(str(error)) from None


def _recognise(line: bytes, path: str | Path) -> Kind:
    try:
        first = decode_json(line, dict[str, Any], str(path))
    except InputError:
        first = {}
    for kind in KINDS:
        if kind.keys <= first.keys():
            return kind
    *names, last = (kind.name for kind in KINDS)
    raise RunError(is_not(path, f"a run of {', '.join(names)} or {last}"))


__all__ = [
    "KINDS",
    "MAX_BYTES",
    "BenchCell",
    "BenchFirst",
    "Replay",
    "ReplayFirst",
    "Run",
    "RunError",
    "Seconds",
    "StressFirst",
    "StressGuest",
    "StressLast",
    "StressSums",
    "Violation",
    "read_run",
]
