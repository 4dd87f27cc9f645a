"""Table: a structured array with a title and units, which goes on to pandas, xarray, JSON and notebooks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmemcore.html import table


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A result in rows.

    Attributes
    ----------
    title : str
        What it is about.
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
        return f"Table({self.title!r}, {len(self.rows)} rows of {', '.join(self.columns)})"

    def _repr_html_(self) -> str:
        names = [
            name if self.units.get(name, "1") in ("1", name) else f"{name} ({self.units[name]})"
            for name in self.columns
        ]
        return table(self.title, names, self.rows.tolist())

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
        """Return a pandas DataFrame; its ``attrs`` have title and units.

        Raises
        ------
        ImportError
            pandas isn't installed.
        """
        frame = extra("pandas", "to_pandas()").DataFrame.from_records(self.rows)
        frame.attrs |= {"title": self.title, "units": dict(self.units)}
        return frame

    def to_xarray(self) -> Any:
        """Return an xarray Dataset with a dimension a key; every variable has its unit.

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
    """Put tables of one kind below each other, with a first column that says which is which."""
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


def extra(module: str, what: str) -> Any:
    """Import a module of the ``analysis`` extra.

    Raises
    ------
    ImportError
        It isn't installed; the message says how to get it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{what} needs {module}, which isn't installed; pip install 'gmemcore[analysis]' brings it"
        ) from error
