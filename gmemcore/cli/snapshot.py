"""``gmemcore snapshot``: what snapshots of page state say, what changed between two, and pictures of them."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import cyclopts
from cyclopts import Parameter

from gmemcore.cli.common import complaint
from gmemcore.units import format_bytes, format_number, format_size

if TYPE_CHECKING:
    from gmemcore.analysis import Diff, Series, Snapshot, Table

app = cyclopts.App(name="snapshot", help="Look at snapshots of page state: figures, differences, pictures.")

_Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON, for programs.")]
_Number = Annotated[int, Parameter(help="Which snapshot of a series, from 0; -1 is the last.")]

DISTRIBUTIONS: Final = (
    *("state_mix", "by_slot", "by_region", "run_quantiles", "fragmentation", "mappability", "iommu"),
)
"""What ``info`` prints, by the names of `gmemcore.analysis`."""
ROWS: Final = 24
"""Rows of a table that are printed."""


@app.command
def info(
    files: Annotated[tuple[Path, ...], Parameter(help="Files of snapshots.", negative="")],
    /,
    *,
    number: _Number = -1,
    as_json: _Json = False,
) -> None:
    """Print what is in snapshots: states, runs, fragmentation, large mappings, the IOMMU's share.

    Exit status 0: printed; 2: a file that holds no snapshots, or none of that number.
    """
    with _one_line_errors("info"):
        described = [(path, series, _chosen(series, number, path)) for path, series in _read(files)]
        if as_json:
            print(json.dumps([_as_record(*one) for one in described], indent=1))
        else:
            for one in described:
                _print_info(*one)


@app.command
def diff(
    before: Annotated[Path, Parameter(help="The earlier snapshot; of a series the last, or the first.")],
    after: Annotated[Path | None, Parameter(help="The later one; none: the last of the same series.")] = None,
    /,
    *,
    plane: Annotated[str | None, Parameter(help="List the ranges in which this plane changed.")] = None,
    as_json: _Json = False,
) -> None:
    """Print what changed from one snapshot to a later one: pages by plane, counters, files.

    Exit status 0: printed; 2: files that hold no snapshots, or snapshots of different guests.
    """
    from gmemcore.analysis import diff as compare

    with _one_line_errors("diff"):
        paths = [before] if after is None else [before, after]
        read = _read(paths)
        first = _chosen(read[0][1], 0 if after is None else -1, before)
        changes = compare(first, _chosen(read[-1][1], -1, paths[-1]))
        ranges = None if plane is None else _ranges(changes, plane)
        if as_json:
            print(json.dumps(_diff_record(changes, ranges), indent=1))
        else:
            _print_diff(changes, ranges)


@app.command
def plot(
    files: Annotated[
        tuple[Path, ...],
        Parameter(help="Files of snapshots, or JSON Lines of bench, stress or replay.", negative=""),
    ],
    /,
    *,
    picture: Annotated[
        str | None,
        Parameter(
            help="Of snapshots map, hilbert, bars, runs; of a series stream, heatmap, mappable, memory; "
            "of bench cube, axes, cost; of stress sizes, outcomes; of replay refusals."
        ),
    ] = None,
    output: Annotated[
        Path | None, Parameter(name=("--output", "-o"), help="PNG, SVG or PDF; PICTURE.png.")
    ] = None,
    number: _Number = -1,
    file: Annotated[
        int | None, Parameter(help="Of map and hilbert: which file of the guest; its first.")
    ] = None,
    abi: Annotated[str | None, Parameter(help="Of bench: one revision; its first, or all.")] = None,
) -> None:
    """Draw a picture; without a name, the map of a snapshot, the stream of a series, the first of a run's.

    Exit status 0: drawn; 2: a picture that doesn't exist or that these files can't give, or no matplotlib.
    """
    with _one_line_errors("plot"):
        name = _usual_picture(files) if picture is None else picture
        figure = _drawn(name, files, number, file=file, abi=abi).figure
        place = output or Path(f"{name}.png")
        figure.savefig(place)
        print(f"gmemcore snapshot: {place}: {place.stat().st_size:,} bytes", file=sys.stderr)


# --- input --------------------------------------------------------------------------------------------------
@contextmanager
def _one_line_errors(command: str) -> Iterator[None]:
    """Turn what can't be used into one line on stderr."""
    try:
        yield
    except BrokenPipeError:
        raise  # the reader has seen enough, and `main` knows
    except OSError as error:
        text = complaint(error)
    except KeyError as error:
        text = str(error.args[0])
    except (ValueError, ImportError) as error:
        text = str(error)
    else:
        return
    print(f"gmemcore snapshot {command}: {text}", file=sys.stderr)
    raise SystemExit(2)


def _read(paths: Sequence[Path]) -> "list[tuple[Path, Series]]":
    from gmemcore.analysis import Series

    return [(path, Series.read(path)) for path in paths]


def _chosen(series: "Series", number: int, path: Path) -> "Snapshot":
    if not -len(series) <= number < len(series):
        raise ValueError(f"{path}: no snapshot {number}; it holds {len(series)}")
    return series[number]


def _usual_picture(files: Sequence[Path]) -> str:
    from gmemcore.analysis import PICTURES, read_run
    from gmemcore.workload.container import is_container

    if not is_container(files[0]):
        kind = read_run(files[0]).kind
        return next(name for name, picture in PICTURES.items() if picture.of == kind)
    return "stream" if len(_read(files)[0][1]) > 1 else "map"


# --- pictures -----------------------------------------------------------------------------------------------
def _drawn(name: str, files: Sequence[Path], number: int, **options: Any) -> Any:
    from gmemcore.analysis import PICTURES, read_run

    if name not in PICTURES:
        known = "\n".join(f"  {known:9} {one.shows} (of {one.of})" for known, one in PICTURES.items())
        raise ValueError(f"no picture {name!r}; there are\n{known}")
    chosen = PICTURES[name]
    if len(files) > 1 and chosen.of not in ("snapshots", "several series"):
        raise ValueError(f"{name} of {len(files)} files; one is accepted")
    given = {option: value for option, value in options.items() if value is not None}
    accepted = {"snapshot": {"file"}, "bench": {"abi"}}.get(chosen.of, set())
    if surplus := sorted(given.keys() - accepted):
        raise ValueError(f"{name} has no --{surplus[0]}; it is of {chosen.of}")
    prepared: dict[str, Callable[[], Any]] = {
        "snapshot": lambda: _chosen(_read(files)[0][1], number, files[0]),
        "snapshots": lambda: {
            _name_of(path, series): _chosen(series, number, path) for path, series in _read(files)
        },
        "series": lambda: _read(files)[0][1],
        "several series": lambda: {_name_of(path, series): series for path, series in _read(files)},
    }
    prepare = prepared.get(chosen.of, lambda: read_run(files[0]))
    return chosen.draw(prepare(), **given)


def _name_of(path: Path, series: "Series") -> str:
    """What a file is called in a legend: the label of its snapshots, or its own name."""
    return (series[0].label if len(series) else "") or path.stem


# --- figures ------------------------------------------------------------------------------------------------
def _tables(snapshot: "Snapshot") -> "dict[str, Table]":
    from gmemcore import analysis

    return {name: getattr(analysis, name)(snapshot) for name in DISTRIBUTIONS}


def _facts(snapshot: "Snapshot") -> dict[str, Any]:
    names = ("vm_type", "abi", "firmware", "phase", "label", "at", "n_pages", "memory_pages")
    return {name: getattr(snapshot, name) for name in names}


def _as_record(path: Path, series: "Series", snapshot: "Snapshot") -> dict[str, Any]:
    from gmemcore.analysis import splits_and_merges

    tables = _tables(snapshot) | ({"splits_and_merges": splits_and_merges(series)} if len(series) > 1 else {})
    return {
        "file": str(path),
        "snapshots": len(series),
        "unit": series.unit,
        **_facts(snapshot),
        "counters": snapshot.counters.asdict(),
        **{name: table.records() for name, table in tables.items()},
    }


def _print_info(path: Path, series: "Series", snapshot: "Snapshot") -> None:
    from gmemcore.analysis import splits_and_merges

    of = f", at {snapshot.at:g} of {len(series)} snapshots ({series.unit})" if len(series) > 1 else ""
    label = f" {snapshot.label!r}" if snapshot.label else ""
    guest = f"{snapshot.vm_type}, {snapshot.abi}, firmware {snapshot.firmware}, {snapshot.phase}"
    print(f"{path}:{label} {guest}{of}")
    in_use = format_bytes(snapshot.memory_pages << 12)
    print(f"files: {len(snapshot.files)}, of {format_size(snapshot.size)}; memory in use: {in_use}\n")
    for name, table in _tables(snapshot).items():
        if name != "by_region" or len(snapshot.slots) > 1:
            _print_table(table, counting=("pages",) if name in ("state_mix", "by_slot", "by_region") else ())
    if len(series) > 1:
        _print_table(splits_and_merges(series), counting=("split", "merged"))
    _print_counters(snapshot.counters.asdict())


def _ranges(changes: "Diff", plane: str) -> "dict[int, Table]":
    shared = {file.index for file in changes.before.files} & {file.index for file in changes.after.files}
    return {index: changes.ranges(plane, index) for index in sorted(shared)}


def _diff_record(changes: "Diff", ranges: "dict[int, Table] | None") -> dict[str, Any]:
    listed = {} if ranges is None else {"ranges": {str(i): table.records() for i, table in ranges.items()}}
    return {
        "before": _facts(changes.before),
        "after": _facts(changes.after),
        "changes": changes.changes.records(),
        "counters": changes.counters.asdict(),
        "appeared": list(changes.appeared),
        "gone": list(changes.gone),
        **listed,
    }


def _print_diff(changes: "Diff", ranges: "dict[int, Table] | None") -> None:
    before, after = changes.before, changes.after
    print(f"from {before.at:g} ({before.phase}) to {after.at:g} ({after.phase})")
    for word, files in (("new", changes.appeared), ("closed", changes.gone)):
        if files:
            print(f"{word} files: {', '.join(map(str, files))}")
    if changes:
        _print_table(changes.changes)
    else:
        print("no page has changed")
    for table in (ranges or {}).values():
        _print_table(table)
    _print_counters(changes.counters.asdict())


def _print_counters(counters: dict[str, int]) -> None:
    counted = {name: figure for name, figure in counters.items() if figure}
    print("counters: " + (", ".join(f"{name} {figure:,}" for name, figure in counted.items()) or "none"))


def _print_table(table: "Table", *, counting: Sequence[str] = ()) -> None:
    """Print a table for people; counting: columns of which one is not 0 in a row worth showing."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    records = [row for row in table.records() if not counting or any(row[name] for name in counting)]
    print(table.title + ("" if records else ": none"))
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in table.columns:
        numeric = table.rows.dtype[name].kind in "iuf"
        drawn.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    for record in records[:ROWS]:
        # Text, not markup: names are the user's.
        drawn.add_row(*(Text(_word(name, value, table.units.get(name))) for name, value in record.items()))
    if records:
        Console(width=None if sys.stdout.isatty() else 160).print(drawn)
    print()
    if len(records) > ROWS:
        print(f"and {len(records) - ROWS:,} more rows; --json has them\n")


def _word(name: str, value: Any, unit: str | None) -> str:
    if name == "gpa":
        return f"{value:#x}"
    if unit == "bytes":
        return format_bytes(value) if value % 4096 == 0 and value < 1 << 52 else f"{value:#x}"
    if isinstance(value, bool):
        return "set" if value else "cleared"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value * 100:.4g} %" if unit == "1" else format_number(value)
    return str(value)
