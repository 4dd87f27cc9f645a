"""Files of results: what kind of run one is, and its records, checked before anything is drawn.

A run comes from elsewhere: its size is bounded, every field has a type, and an error names the line.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec

from gmemcore.analysis.plots import PLOTS, BenchPlot, ReplayPlot, RunPlot, StressPlot
from gmemcore.analysis.run_tables import OVERVIEWS, cells_table, table_of
from gmemcore.analysis.tables import Table
from gmemcore.errors import InputError
from gmemcore.files.kinds import RUNS, expecting, is_not
from gmemcore.files.reading import decode_json
from gmemcore.files.records import End, Lines, RecordFile, read_lines
from gmemcore.results.bench import BenchCell, BenchFirst, Seconds
from gmemcore.results.fields import SCHEMA
from gmemcore.results.kinds import KINDS, Kind
from gmemcore.results.replay import Replay, ReplayFirst
from gmemcore.results.stress import StressFirst, StressGuest, StressLast, StressSums, Violation

MAX_BYTES: Final = 256 << 20
"""Bytes of a file that are read at most."""


class RunError(InputError):
    """A file that isn't a run, or a line of one that can't be read."""


@dataclass(frozen=True, slots=True, repr=False)
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
            named = f"{self.name}: " if self.name else ""
            raise ValueError(f"{named}must be a run of {kind}, not of {self.kind}")

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        return f"{self._title()}\n{self._overview()!r}"

    def _repr_html_(self) -> str:
        return self._overview()._repr_html_()

    def _title(self) -> str:
        shortfall = "" if self.shortfall is None else f"; {self.shortfall}"
        return f"Run of {self.kind}{f' from {self.name}' if self.name else ''}{shortfall}"

    def _overview(self) -> Table:
        """The columns that people look at first."""
        table = self.table
        names = [*table.keys, *(name for name in OVERVIEWS[self.kind] if name in table.columns)]
        return Table(table.title, table.rows[list(dict.fromkeys(names))], table.keys, table.units)

    @property
    def table(self) -> Table:
        """Its records as a table, a row per record; see `gmemcore.analysis.run_tables`."""
        return table_of(self.kind, self.records)

    @property
    def plot(self) -> RunPlot:
        """Pictures of it."""
        return PLOTS.get(self.kind, RunPlot)(self)

    def to_pandas(self) -> Any:
        """Return its records as a pandas DataFrame, a row per record, nested figures with dotted names.

        Returns
        -------
        DataFrame
            Its ``attrs`` have title, units and the environment of the run.

        Raises
        ------
        ImportError
            pandas isn't installed.
        """
        frame = self.table.to_pandas()
        frame.attrs["environment"] = dict(getattr(self.first, "environment", {}))
        return frame

    def to_xarray(self) -> Any:
        """Return its records as an xarray Dataset, with a dimension per column that tells records apart.

        Raises
        ------
        ImportError
            xarray or pandas isn't installed.
        """
        data = self.table.to_xarray()
        data.attrs["environment"] = str(getattr(self.first, "environment", {}))
        return data

    def to_parquet(self, path: str | Path) -> None:
        """Write its records as Parquet; an old file is replaced whole.

        Raises
        ------
        ImportError
            pyarrow isn't installed.
        OSError
            It can't be written there.
        """
        self.table.to_parquet(path)

    def write(self, path: str | Path) -> None:
        """Write it as a file of results, for `gmemcore.read` and ``gmemcore report``.

        An existing file is replaced whole.

        Raises
        ------
        ValueError
            The run is incomplete, which a file of its own wouldn't say.
        OSError
            It can't be written there.
        """
        if self.shortfall is not None:
            raise ValueError(f"an incomplete run can't be written as a whole one: {self.shortfall}")
        with RecordFile(path, force=True) as file:
            for record in (self.first, *self.records, *(() if self.last is None else (self.last,))):
                file.write(record)


class BenchRun(Run):
    """A bench run."""

    __slots__ = ()

    @property
    def plot(self) -> BenchPlot:
        """Pictures of it."""
        return BenchPlot(self)


class ReplayRun(Run):
    """A replay of one trace on several revisions and VM types."""

    __slots__ = ()

    @property
    def plot(self) -> ReplayPlot:
        """Pictures of it."""
        return ReplayPlot(self)


class StressRun(Run):
    """A fleet."""

    __slots__ = ()

    @property
    def cells(self) -> Table:
        """Sums by kind of guest, a row per behaviour, VM type, revision and firmware."""
        return cells_table(self.last.cells)

    @property
    def plot(self) -> StressPlot:
        """Pictures of it."""
        return StressPlot(self)


_TYPES: Final[Mapping[str, type[Run]]] = {"bench": BenchRun, "replay": ReplayRun, "stress": StressRun}


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
        with expecting(path, RUNS):
            lines = read_lines(path, most=max_bytes)
    except InputError as error:
        raise RunError(str(error)) from None
    return _run_of(lines, str(path))


def run_of(lines: Iterable[bytes]) -> Run:
    """Return a run whose lines were never a file: the first line, the records, the last one if it has one."""
    first, *others = [line for line in lines if not line.startswith(b'{"end":')]
    numbered = list(enumerate(others, start=2))
    return replace(_run_of(Lines(first, numbered, End(len(numbered))), ""), name="", end=None)


def _run_of(lines: Lines, path: str) -> Run:
    kind, versioned = _recognise(lines.first, path)
    first = _decode(lines.first, kind.first, path, 1)
    if not versioned:
        first = msgspec.structs.replace(first, schema=1)
    schema = first.schema
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
    return _TYPES.get(kind.name, Run)(kind.name, first, records, last, shortfall, path, lines.end)


def _last(line: tuple[int, bytes], kind: type[msgspec.Struct]) -> Any:
    """Return the last record; None for a line of another type, where the file was cut before it."""
    try:
        return decode_json(line[1], kind, "")
    except InputError:
        return None


def _decode(line: bytes, wanted: Any, path: str | Path, number: int) -> Any:
    try:
        return decode_json(line, wanted, f"{path}: line {number}")
    except InputError as error:
        raise RunError(str(error)) from None


def _recognise(line: bytes, path: str | Path) -> tuple[Kind, bool]:
    """Return the kind of a run by its first line, and whether that says which schema it has."""
    try:
        first = decode_json(line, dict[str, Any], str(path))
    except InputError:
        first = {}
    for kind in KINDS:
        if kind.keys <= first.keys():
            return kind, "schema" in first
    raise RunError(is_not(path, RUNS))


__all__ = [
    "KINDS",
    "MAX_BYTES",
    "BenchCell",
    "BenchFirst",
    "BenchRun",
    "Replay",
    "ReplayFirst",
    "ReplayRun",
    "Run",
    "RunError",
    "Seconds",
    "StressFirst",
    "StressGuest",
    "StressLast",
    "StressRun",
    "StressSums",
    "Violation",
    "read_run",
]
