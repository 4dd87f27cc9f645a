"""Table: rows with a title, keys and units, on their way to pandas, xarray, Parquet, JSON and notebooks.

A table needs NumPy alone, so the command line and figures work without the ``analysis`` extra. What pandas
and xarray do well (selecting, grouping, joining, reshaping) is left to them: `Table.to_pandas` and
`Table.to_xarray`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.errors import MissingExtraError
from gmemcore.files.writing import replace_file
from gmemcore.html import cell_text, table
from gmemcore.units import counted

_ADDRESSES: Final = frozenset({"address", "gpa"})
"""Columns that are shown in hex."""
PRINTED_ROWS: Final = 24
"""Most rows that are printed; a last line counts the others."""
PRINTED_COLUMNS: Final = 120
"""Longest line that is printed; columns that don't fit are named below the table."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Table:
    """A result in rows.

    Attributes
    ----------
    title : str
        What it shows.
    rows : ndarray, structured, shape (n,)
        The result; ``np.asarray(table)`` gives it too, ``table["pages"]`` one column of it.
    keys : tuple of str
        Columns that name a row: the dimensions of `to_xarray`.
    units : mapping of str to str
        Unit by column, where there is one.
    """

    title: str
    rows: NDArray[Any]
    keys: tuple[str, ...]
    units: Mapping[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self.rows.dtype.names or ())

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)

    def __getitem__(self, column: str) -> NDArray[Any]:
        if column not in self.columns:
            raise KeyError(f"no column {column!r}; there are {', '.join(self.columns)}")
        return np.asarray(self.rows[column])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.rows, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        return "\n".join([f"{self.title}: {counted(len(self.rows), 'row')}", *self._lines()])

    def _lines(self) -> Iterator[str]:
        """Yield the head and the first rows, figures to the right."""
        shown = (self._texts(row) for row in self.rows[:PRINTED_ROWS].tolist())
        texts = [self._heads(), *shown]
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        right = [self.rows.dtype[name].kind in "iufb" for name in self.columns]
        fitting = _fitting(widths)
        for row in texts:
            cells = zip(row[:fitting], widths, right, strict=False)
            yield "  ".join(text.rjust(w) if far else text.ljust(w) for text, w, far in cells).rstrip()
        if len(self.rows) > PRINTED_ROWS:
            yield f"and {len(self.rows) - PRINTED_ROWS:,} more rows"
        if fitting < len(widths):
            yield f"and {len(widths) - fitting} more columns: {', '.join(self.columns[fitting:])}"

    def _texts(self, row: tuple[Any, ...]) -> list[str]:
        """The values of a row as they are shown: addresses in hex."""
        return [
            f"{value:#x}" if name in _ADDRESSES else cell_text(value)
            for name, value in zip(self.columns, row, strict=True)
        ]

    def _heads(self) -> list[str]:
        """Names of the columns, each with its unit where the name doesn't say it."""
        return [
            name
            if name in _ADDRESSES or self.units.get(name, "1") in ("1", name, f"{name}s")
            else f"{name} ({self.units[name]})"
            for name in self.columns
        ]

    def _repr_html_(self) -> str:
        hexed = [i for i, name in enumerate(self.columns) if name in _ADDRESSES]
        rows = [
            tuple(f"{value:#x}" if i in hexed else value for i, value in enumerate(row)) if hexed else row
            for row in self.rows.tolist()
        ]
        return table(self.title, self._heads(), rows)

    def where(self, **values: Any) -> "Table":
        """Keep the rows whose columns have these values."""
        keep = np.ones(len(self.rows), bool)
        for column, value in values.items():
            keep &= self[column] == value
        return Table(self.title, self.rows[keep], self.keys, self.units)

    def records(self) -> list[dict[str, Any]]:
        """Rows as dictionaries of plain Python values, as JSON takes them."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows.tolist()]

    def to_pandas(self) -> Any:
        """Return a pandas DataFrame with the same columns; its ``attrs`` have title and units.

        Raises
        ------
        ImportError
            pandas isn't installed.
        """
        frame = extra("pandas", "to_pandas()").DataFrame.from_records(self.rows)
        frame.attrs |= {"title": self.title, "units": dict(self.units)}
        return frame

    def to_xarray(self) -> Any:
        """Return an xarray Dataset with one dimension per key; every variable has its unit.

        Raises
        ------
        ImportError
            xarray or pandas isn't installed.
        """
        extra("xarray", "to_xarray()")
        data = self.to_pandas().set_index(list(self.keys)).to_xarray()
        data.attrs = {"title": self.title}
        for name, unit in self.units.items():
            data[name].attrs["units"] = unit
        return data

    def to_parquet(self, path: str | Path) -> None:
        """Write the rows as Parquet, title and units as metadata; an old file is replaced whole.

        Raises
        ------
        ImportError
            pyarrow isn't installed.
        OSError
            It can't be written there.
        """
        arrow = extra("pyarrow", "to_parquet()")
        fields = [
            arrow.field(name, arrow.array(self[name][:0]).type, metadata=self._metadata(name))
            for name in self.columns
        ]
        schema = arrow.schema(fields, metadata={"title": self.title, "keys": ",".join(self.keys)})
        write_parquet(arrow.table([arrow.array(self[name]) for name in self.columns], schema=schema), path)

    def _metadata(self, column: str) -> dict[str, str]:
        return {"units": self.units[column]} if column in self.units else {}


def _fitting(widths: Sequence[int]) -> int:
    """Return how many columns fit in a line; at least one."""
    ends = np.cumsum(np.asarray(widths) + 2) - 2
    return max(int(np.searchsorted(ends, PRINTED_COLUMNS, side="right")), 1)


def make_table(
    title: str,
    columns: Sequence[tuple[str, Any]],
    rows: Sequence[tuple[Any, ...]],
    keys: Sequence[str],
    units: Mapping[str, str] | None = None,
) -> Table:
    """Return a table of rows given as tuples; columns are (name, dtype)."""
    return Table(title, np.array(list(rows), np.dtype(list(columns))), tuple(keys), dict(units or {}))


def stacked(tables: Sequence[tuple[Any, Table]], key: str, kind: Any, unit: str = "") -> Table:
    """Concatenate tables with equal columns; a new first column names the table of each row."""
    if not tables:
        raise ValueError("no table to stack; at least one is needed")
    first = tables[0][1]
    dtype = np.dtype([(key, kind), *((name, first.rows.dtype[name]) for name in first.columns)])
    rows = np.empty(sum(len(part) for _, part in tables), dtype)
    begin = 0
    for value, part in tables:
        into = rows[begin : begin + len(part)]
        into[key] = value
        for name in first.columns:
            into[name] = part[name]
        begin += len(part)
    units = {**({key: unit} if unit else {}), **first.units}
    return Table(first.title, rows, (key, *first.keys), units)


def write_parquet(arrow_table: Any, path: str | Path) -> None:
    """Write a pyarrow Table, whole or not at all."""
    file = BytesIO()
    extra("pyarrow.parquet", "to_parquet()").write_table(arrow_table, file)
    replace_file(path, [file.getvalue()])


def extra(module: str, what: str) -> Any:
    """Import a module of the ``analysis`` extra.

    Raises
    ------
    MissingExtraError
        It isn't installed; the message says how to get it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{what} needs {module}, which isn't installed; pip install 'gmemcore[analysis]'"
        ) from error
