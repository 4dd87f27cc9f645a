"""``gmemcore snapshot``: what snapshots of page state hold, what changed between two, and pictures."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import cyclopts
from cyclopts import Parameter

from gmemcore.analysis import PICTURES
from gmemcore.cli.console import note, progress, reporting, say, say_json, working
from gmemcore.cli.options import AbiOption, ForceSwitch, JsonSwitch, choice, one, whole
from gmemcore.cli.pictures import PictureFile
from gmemcore.cli.tables import print_table
from gmemcore.engine.packed import PLANE_NAMES
from gmemcore.errors import InputError
from gmemcore.files.kinds import DRAWN, RUNS_OF, SERIES, SNAPSHOTS, expecting, is_not
from gmemcore.files.text import printable
from gmemcore.files.writing import check_output
from gmemcore.results.bench_tables import CONVERSION
from gmemcore.units import format_bytes, format_number, format_percent, format_size

if TYPE_CHECKING:
    from gmemcore.analysis import Diff, Series, Snapshot, Table
    from gmemcore.analysis.runs import Run

    _Picture = str
    _Plane = str
else:  # choices, for help and completion
    _Picture = Literal[tuple(PICTURES)]
    _Plane = Literal[PLANE_NAMES]

app = cyclopts.App(
    name="snapshot",
    help="Describe and compare snapshots of page state, and draw pictures of them and of runs.",
)

ROWS: Final = 24
"""Rows of a table that are printed."""
_WANTED: Final = {
    **dict.fromkeys(("snapshot", "snapshots"), SNAPSHOTS),
    **dict.fromkeys(("series", "several series"), SERIES),
    **RUNS_OF,
}
"""What a picture is of -> the file that it needs."""
_NUMBERED: Final = frozenset({"snapshot", "snapshots"})
"""What pictures are of that --number chooses."""

_PRINTED_IF: "Final[dict[str, Callable[[Snapshot], bool]]]" = {
    "by_region": lambda snapshot: len(snapshot.slots) > 1,
    "mapping_sizes": lambda snapshot: any(file.page_order for file in snapshot.files),
}
"""Distributions that say nothing new of other snapshots; JSON has them always."""

_Number = Annotated[
    int | None,
    Parameter(
        help="Snapshot of a series, from 0; -1 is the last. [default: -1]",
        converter=one(whole(-(1 << 31), 1 << 31)),
        allow_leading_hyphen=True,
    ),
]


@app.command
def info(
    files: Annotated[tuple[Path, ...], Parameter(help="Files of snapshots.")],
    /,
    *,
    number: _Number = None,
    as_json: JsonSwitch = False,
) -> None:
    """Print what is in snapshots: states, runs, fragmentation, large mappings, the IOMMU's share."""
    with reporting("snapshot info"), progress("snapshot info", len(files), "files") as done:
        described = []
        for path in files:
            series = _series(path)
            described.append((path, series, *_chosen(series, number, path)))
            done(len(described))
        if as_json:
            say_json([_as_record(*each) for each in described])
            return
        for each in described:
            _print_info(*each)


@app.command
def diff(
    before: Annotated[
        Path, Parameter(help="The earlier snapshot: a series' last, or without AFTER its first.")
    ],
    after: Annotated[
        Path | None, Parameter(help="The later snapshot. [default: the last of the same series]")
    ] = None,
    /,
    *,
    plane: Annotated[
        _Plane | None,
        Parameter(help="List the ranges in which this plane changed.", converter=one(choice(PLANE_NAMES))),
    ] = None,
    as_json: JsonSwitch = False,
) -> None:
    """Print what changed from one snapshot to a later one: pages by plane, counters, files."""
    from gmemcore.analysis import diff as compare

    with reporting("snapshot diff"), _input_errors(), working("snapshot diff"):
        series = _series(before)
        first, _ = _chosen(series, 0 if after is None else -1, before)
        last, _ = _chosen(series if after is None else _series(after), -1, after or before)
        changes = compare(first, last)
        ranges = None if plane is None else _ranges(changes, plane)
        if as_json:
            say_json(_diff_record(changes, ranges))
        else:
            _print_diff(changes, ranges)


@app.command
def plot(
    files: Annotated[
        tuple[Path, ...], Parameter(help="Files of snapshots, or JSON Lines of bench, stress or replay.")
    ],
    /,
    *,
    picture: Annotated[
        _Picture | None,
        Parameter(
            help="Picture to draw. [default: map of a snapshot, stream of a series, the first of a run's]",
            converter=one(choice([*PICTURES])),
        ),
    ] = None,
    output: Annotated[
        Path | None,
        Parameter(
            name=("--output", "-o"),
            help="PNG, SVG or PDF file, by its ending. [default: PICTURE.png]",
        ),
    ] = None,
    force: ForceSwitch = False,
    number: _Number = None,
    file: Annotated[
        int | None,
        Parameter(help="Number of the guest's file, for map and hilbert.", converter=one(whole(0))),
    ] = None,
    abi: Annotated[AbiOption, Parameter(help="Revision to draw, for bench runs.")] = None,
) -> None:
    """Draw a picture of page states or of a run.

    Of a snapshot: map, hilbert, bars, runs. Of a series: stream, heatmap, mappable, memory, struct-pages.
    Of bench: cube, axes, effects, cost. Of kvm bench: operations. Of stress: sizes, outcomes. Of replay:
    refusals, page-sizes.
    """
    with reporting("snapshot plot"), _input_errors():
        name = _usual_picture(files[0]) if picture is None else picture
        place = Path(f"{name}.png") if output is None else output
        drawing = PictureFile(place, force=force)
        with working("snapshot plot"):
            size = drawing.write(_drawn(name, files, number=number, file=file, abi=abi).figure)
        note("snapshot plot", f"{place}: {size:,} bytes")


@app.command
def explore(
    file: Annotated[Path, Parameter(help="File of snapshots.")],
    /,
    *,
    output: Annotated[
        Path | None, Parameter(name=("--output", "-o"), help="Page to write. [default: FILE with .html]")
    ] = None,
    force: ForceSwitch = False,
) -> None:
    """Write a page that explores page states by address and time, in any browser, without a network."""
    from gmemcore.analysis.explorer import Explorer

    with reporting("snapshot explore"), _input_errors():
        place = file.with_suffix(".html") if output is None else output
        check_output(place, force=force)
        with working("snapshot explore"):
            size = Explorer(_series(file), printable(file.name, most=60)).write(place)
        note("snapshot explore", f"{place}: {size:,} bytes")


# --- input --------------------------------------------------------------------------------------------------
@contextmanager
def _input_errors() -> Iterator[None]:
    """Let what analysis can't do with some input be an `InputError`."""
    try:
        yield
    except (InputError, UnicodeError):
        raise
    except ValueError as error:
        raise InputError(str(error)) from error
    except KeyError as error:
        raise InputError(str(error.args[0])) from error


def _series(path: Path) -> "Series":
    from gmemcore.analysis import Series

    return Series.read(path)


def _chosen(series: "Series", number: int | None, path: Path) -> "tuple[Snapshot, int]":
    """Return a snapshot of a series, and its place in it."""
    place = -1 if number is None else number
    if not -len(series) <= place < len(series):
        raise InputError(f"{path}: no snapshot {place}; there are {len(series)}, from 0")
    return series[place], place % len(series)


def _usual_picture(path: Path) -> str:
    from gmemcore.workload.container import is_container

    with expecting(path, DRAWN):
        if is_container(path):
            return "stream" if len(_series(path)) > 1 else "map"
        run = _run(path)
    if run.kind == "bench" and any(cell.operation != CONVERSION for cell in run.records):
        return "operations"
    usual = next((name for name, picture in PICTURES.items() if picture.of == run.kind), None)
    if usual is None:
        raise InputError(is_not(path, DRAWN))
    return usual


def _run(path: Path) -> "Run":
    from gmemcore.analysis import read_run

    return read_run(path)


# --- pictures -----------------------------------------------------------------------------------------------
def _drawn(name: str, files: Sequence[Path], *, number: int | None, **options: Any) -> Any:
    """Return the Axes of a picture; options that mean nothing for it are refused."""
    chosen = PICTURES[name]
    if len(files) > 1 and chosen.of not in ("snapshots", "several series"):
        raise InputError(f"{name} must be of one file, not of {len(files)}")
    given = {option: value for option, value in options.items() if value is not None}
    asked = given.keys() | ({"number"} if number is not None else set())
    known = signature(chosen.draw).parameters.keys() | ({"number"} if chosen.of in _NUMBERED else set())
    if surplus := sorted(asked - known):
        raise InputError(f"--{surplus[0]} means nothing for {name}, which is of {_WANTED[chosen.of].words}")
    return chosen.draw(_prepared(name, chosen.of, files, number), **given)


def _prepared(name: str, of: str, files: Sequence[Path], number: int | None) -> Any:
    """Read what a picture is of."""
    from gmemcore.workload.container import is_container

    wanted, purpose = _WANTED[of], f"the picture {name}"
    for path in files:
        if is_container(path) == (of in RUNS_OF):
            raise InputError(is_not(path, wanted, purpose))
    if of in RUNS_OF:
        run = _run(files[0])
        if run.kind != of:
            raise InputError(is_not(files[0], wanted, purpose))
        if run.shortfall is not None:
            note("snapshot plot", f"{files[0]}: {run.shortfall}")
        return run
    read = [(path, _series(path)) for path in files]
    prepare: dict[str, Callable[[], Any]] = {
        "snapshot": lambda: _chosen(read[0][1], number, files[0])[0],
        "snapshots": lambda: {
            _name_of(path, series): _chosen(series, number, path)[0] for path, series in read
        },
        "series": lambda: read[0][1],
        "several series": lambda: {_name_of(path, series): series for path, series in read},
    }
    return prepare[of]()


def _name_of(path: Path, series: "Series") -> str:
    """Return what a file is called in a legend: the label of its snapshots, or its own name."""
    return printable((series[0].label if len(series) else "") or path.stem, most=60)


# --- figures ------------------------------------------------------------------------------------------------
def _tables(snapshot: "Snapshot") -> "dict[str, Table]":
    from gmemcore.analysis.distributions import DISTRIBUTIONS

    return {name: distribution(snapshot) for name, distribution in DISTRIBUTIONS.items()}


def _facts(snapshot: "Snapshot") -> dict[str, Any]:
    names = ("vm_type", "abi", "firmware", "phase", "label", "at", "n_pages", "memory_pages")
    return {name: getattr(snapshot, name) for name in names}


def _as_record(path: Path, series: "Series", snapshot: "Snapshot", place: int) -> dict[str, Any]:
    from gmemcore.analysis import splits_and_merges

    tables = _tables(snapshot) | ({"splits_and_merges": splits_and_merges(series)} if len(series) > 1 else {})
    return {
        "file": str(path),
        "snapshots": len(series),
        "number": place,
        "unit": series.unit,
        **_facts(snapshot),
        "counters": snapshot.counters.asdict(),
        **{name: table.records() for name, table in tables.items()},
    }


def _print_info(path: Path, series: "Series", snapshot: "Snapshot", place: int) -> None:
    from gmemcore.analysis import splits_and_merges

    which = f", snapshot {place} of 0 to {len(series) - 1}" if len(series) > 1 else ""
    label = f" {snapshot.label!r}" if snapshot.label else ""
    guest = f"{snapshot.vm_type}, {snapshot.abi}, firmware {snapshot.firmware}, {snapshot.phase}"
    say(f"{path}:{label} {guest}{which}, at {snapshot.at:,.10g} {series.unit}")
    in_use = format_bytes(snapshot.memory_pages << 12)
    say(f"files: {len(snapshot.files)}, of {format_size(snapshot.size)}; memory in use: {in_use}", "")
    for name, table in _tables(snapshot).items():
        if name not in _PRINTED_IF or _PRINTED_IF[name](snapshot):
            counting = ("pages",) if name in ("state_mix", "by_slot", "by_region") else ()
            _print_table(table, counting=counting)
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
    say(f"from {before.at:,.10g} ({before.phase}) to {after.at:,.10g} ({after.phase})")
    for word, files in (("new", changes.appeared), ("closed", changes.gone)):
        if files:
            say(f"{word} files: {', '.join(map(str, files))}")
    if changes:
        _print_table(changes.changes)
    else:
        say("no page has changed")
    for table in (ranges or {}).values():
        _print_table(table)
    _print_counters(changes.counters.asdict())


def _print_counters(counters: dict[str, int]) -> None:
    counted = {name: figure for name, figure in counters.items() if figure}
    say("counters: " + (", ".join(f"{name} {figure:,}" for name, figure in counted.items()) or "none"))


def _print_table(table: "Table", *, counting: Sequence[str] = ()) -> None:
    """Print a table for people; counting: columns of which one is not 0 in a row worth showing."""
    records = [row for row in table.records() if not counting or any(row[name] for name in counting)]
    say(table.title + ("" if records else ": none"))
    figures = [i for i, name in enumerate(table.columns) if table.rows.dtype[name].kind in "iuf"]
    if records:
        print_table(
            table.columns,
            [
                tuple(_word(name, value, table.units.get(name)) for name, value in record.items())
                for record in records[:ROWS]
            ],
            figures=figures,
        )
    if len(records) > ROWS:
        say(f"and {len(records) - ROWS:,} more rows; --json has them")
    say()


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
        return format_percent(value) if unit == "1" else format_number(value)
    return str(value)
