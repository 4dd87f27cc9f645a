"""Tables of runs: records of every kind as flat rows, with the columns that name a row."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from gmemcore.analysis.tables import Table

_UNITS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("memory", "range", "peak_memory", "peak_bytes", "verified_bytes"), "bytes"),
    **dict.fromkeys(("convert_gbps", "populate_gbps", "first_access_gbps", "primitive_gbps"), "GB/s"),
    **dict.fromkeys(("ratio", "ratio_low", "ratio_high"), "1"),
    **dict.fromkeys(("seconds", "seconds.median", "seconds.p95", "predicted.seconds"), "s"),
    "pages_allocated_before": "pages",
}
_NAMING: Final = 3
_CELL: Final = ("behaviour", "vm_type", "abi", "firmware")
_NS_PER_PAGE: Final = "ns per 4 KiB page"


class _Form(NamedTuple):
    """How the records of a kind become rows: the columns that name one, and what is left out."""

    title: str
    keys: tuple[str, ...]
    dropped: frozenset[str]
    row: Callable[[Any], dict[str, Any]]


def _stress_row(record: Any) -> dict[str, Any]:
    flat = flattened(record)
    what = dict(zip(_CELL, flat.pop("cell").split(" "), strict=False))
    return {"guest": flat.pop("guest"), **what, **flat}


def _backings_row(record: Any) -> dict[str, Any]:
    """Name a run of one way; its seconds are those of all conversions together."""
    flat = flattened(record)
    measured = {name: flat.pop(f"measured.{name}") for name in ("to_private", "to_shared", "memory")}
    return {
        **{name.removeprefix("measured."): value for name, value in flat.items()},
        "seconds": sum(measured["to_private"]) + sum(measured["to_shared"]),
    }


FORMS: Final[Mapping[str, _Form]] = {
    "bench": _Form(
        "cost of conversions",
        (
            *("abi", "vm_type", "firmware", "phase", "direction", "flag", "range", "fragmentation"),
            *("backing", "huge_pages", "threads", "enforce", "page_size"),
            *("pages_allocated_before", "operation"),
        ),
        frozenset({"samples", "populate_samples", "primitive_samples"}),
        lambda record: flattened(record),
    ),
    "backings": _Form(
        "memory and time of ways to convert",
        ("work", "way", "vm_type", "abi", "range", "backing", "huge_pages"),
        frozenset(),
        _backings_row,
    ),
    "replay": _Form(
        "replays by revision and VM type",
        ("abi", "vm_type", "firmware", "page_size"),
        frozenset({"reasons", "first_refusals"}),
        lambda record: flattened(record),
    ),
    "stress": _Form("guests of a fleet", ("guest",), frozenset({"sizes"}), _stress_row),
}
"""Kind of run -> its form."""


OVERVIEWS: Final[Mapping[str, tuple[str, ...]]] = {
    "bench": ("outcome", "effect", "ns_per_page", "convert_gbps", "ratio"),
    "backings": ("seconds", "peak_bytes", "faults"),
    "replay": ("operations", "refused", "peak_memory", "seconds", "counters.pages_changed"),
    "stress": (
        "behaviour",
        "vm_type",
        "abi",
        "operations",
        "outcomes.OK",
        "counters.pages_changed",
        "seconds",
    ),
}
"""Kind of run -> columns that printing one shows, after those that name a row."""


def table_of(kind: str, records: Sequence[Any]) -> Table:
    """Return the records of a run as a table, a row per record.

    Nested figures have dotted names, as ``counters.rmp_updates``; what a record lacks is 0, NaN or empty.
    Keys are the columns that tell rows apart, and the first three of the kind in any case.
    """
    form = FORMS[kind]
    rows = [
        {
            name: value
            for name, value in form.row(record).items()
            if name.partition(".")[0] not in form.dropped
        }
        for record in records
    ]
    return _table(form.title, form.keys, rows)


def _table(title: str, key_names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    keys = [name for name in key_names if name in names]
    columns = {
        name: _column(name, [row.get(name) for row in rows]) for name in dict.fromkeys([*keys, *names])
    }
    data = np.empty(len(rows), [(name, column.dtype) for name, column in columns.items()])
    for name, column in columns.items():
        data[name] = column
    telling = [name for i, name in enumerate(keys) if i < _NAMING or len(set(data[name].tolist())) > 1]
    units = {name: unit for name in columns if (unit := _unit(name))}
    return Table(title, data, tuple(telling), units)


def cells_table(cells: Mapping[str, Any]) -> Table:
    """Return the sums of a fleet as a table, a row per kind of guest."""
    rows = []
    for cell, sums in cells.items():
        flat = {name: value for name, value in flattened(sums).items() if name not in ("sizes", "digest")}
        refused = sum(count for outcome, count in sums.outcomes.items() if outcome != "OK")
        what = dict(zip(_CELL, cell.split(" "), strict=False))
        figures = {name: flat.pop(name) for name in ("guests", "operations")}
        rows.append({**what, **figures, "refused": refused, **flat})
    return _table("sums by kind of guest", _CELL, rows)


def flattened(record: Any, prefix: str = "") -> dict[str, Any]:
    """Return a record as a flat mapping; a median with its interval is a figure and its two bounds."""
    return dict(_flat(record, prefix))


def _flat(record: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(record, Mapping):
        fields = record
    else:
        fields = {name: getattr(record, name) for name in record.__struct_fields__}
    if prefix and {"median", "low", "high"} <= fields.keys():
        name = prefix.removesuffix(".")
        yield from (
            (name, fields["median"]),
            (f"{name}_low", fields["low"]),
            (f"{name}_high", fields["high"]),
        )
        return
    for name, value in fields.items():
        if isinstance(value, (Mapping, msgspec.Struct)):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _column(name: str, values: list[Any]) -> NDArray[Any]:
    """Return a column as an array: None is NaN among numbers and empty among words."""
    kinds = {type(value) for value in values if value is not None}
    if not kinds and _unit(name):
        return np.full(len(values), np.nan)
    if all(issubclass(kind, str) for kind in kinds):
        return np.array([str(value or "") for value in values], np.str_)
    if kinds == {bool}:
        return np.array([bool(value) for value in values])
    if kinds == {int} and (None not in values or name.startswith(("counters.", "outcomes.", "checks."))):
        return np.array([value or 0 for value in values], np.int64)
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _unit(name: str) -> str | None:
    last = name.rpartition(".")[2]
    if name.startswith("counters."):
        return "bytes" if last.startswith("bytes_") else "pages" if "pages" in last else "events"
    if "ns_per_page" in name:
        return _NS_PER_PAGE
    if name.startswith("call_seconds"):
        return "s"
    return _UNITS.get(name)
