"""``gmemcore trace``: workloads as files: recorded, imported from logs, converted, described."""

import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, cast

from cyclopts import App, Parameter
from cyclopts.types import PositiveInt

from gmemcore.cli.console import note, reporting, say, say_json, say_lines, working
from gmemcore.cli.options import ForceSwitch, JsonSwitch, OptionalSeconds, OptionalSeed, check_force
from gmemcore.cli.tables import print_table
from gmemcore.cli.workloads import STDIN, Options, Workload, load
from gmemcore.errors import InputError, InvalidArgumentError
from gmemcore.files.reading import opened
from gmemcore.files.writing import check_output, replacing
from gmemcore.units import counted, format_bytes, format_time

if TYPE_CHECKING:
    from gmemcore.workload.trace import Trace

app = App(name="trace", help="Record, import, convert and describe what happens to guest memory.")

_REGIONS_SHOWN: Final = 8
_LONGEST: Final = 86_400
"""Seconds of a recording."""

_Output = Annotated[
    Path,
    Parameter(
        name=("--output", "-o"),
        help="Where to write: .jsonl is text, .parquet a table, anything else the binary form.",
    ),
]
_Options = Annotated[Options | None, Parameter(name="*")]
_Seed = Annotated[OptionalSeed, Parameter(help="Seed of contents, and of a behaviour. [default: 0]")]


@app.command
def record(
    what: Annotated[
        str,
        Parameter(
            allow_leading_hyphen=True,
            help="A behaviour (see gmemcore behaviours), a log, or - for a log on stdin.",
        ),
    ],
    /,
    output: _Output,
    *,
    options: _Options = None,
    seed: _Seed = None,
    force: ForceSwitch = False,
) -> None:
    """Record what a behaviour does, or what a log shows.

    Logs are QEMU's trace, and KVM's kvm_vm_set_mem_attributes as ftrace, perf script or trace-cmd report
    print it; `gmemcore trace capture` prints the commands that record them. They can be compressed.
    """
    with reporting("trace record"), working("trace record"):
        _check_output(output, force=force)
        workload = _load(what, options, seed)
        _write(output, workload)
        workload.note_import("trace record")
        size, operations = output.stat().st_size, len(workload.trace.operations)
        note("trace record", f"{output}: {operations:,} operations, {size:,} bytes")


@app.command
def info(
    trace: Annotated[
        str,
        Parameter(allow_leading_hyphen=True, help="A behaviour, a trace, a log, or - for a log on stdin."),
    ],
    /,
    *,
    options: _Options = None,
    seed: _Seed = None,
    as_json: Annotated[JsonSwitch, Parameter(help="Print JSON, a line per launch of a log.")] = False,
) -> None:
    """Show what is in a trace or a log: steps, ranges, layout, duration."""
    with reporting("trace info"), working("trace info"):
        workload = _load(trace, options, seed)
        workload.note_import("trace info")
        for place, found in enumerate(workload.traces):
            described = describe(found)
            if as_json:
                record = {"file": trace, **described, **imported_record(workload, place)}
                say_json(record, indent=1 if len(workload.traces) == 1 else None)
                continue
            if place:
                say()
            if len(workload.traces) > 1:
                say(f"launch {workload.launches[place].number}")
            _print_info(described)


@app.command
def convert(
    source: Annotated[
        str,
        Parameter(
            allow_leading_hyphen=True,
            help="A trace of any form, a behaviour, a log, or - for a log on stdin.",
        ),
    ],
    /,
    output: _Output,
    *,
    options: _Options = None,
    seed: _Seed = None,
    force: ForceSwitch = False,
) -> None:
    """Write a trace in the form that the output's name asks for."""
    with reporting("trace convert"), working("trace convert"):
        if source != STDIN and output.exists() and Path(source).exists() and output.samefile(source):
            raise InvalidArgumentError(f"{output} is the source; the output must be another file")
        _check_output(output, force=force)
        workload = _load(source, options, seed)
        _write(output, workload)
        workload.note_import("trace convert")


@app.command
def capture(
    *,
    run: Annotated[
        OptionalSeconds, Parameter(help="Time to record, by perf or trace-cmd; needs --pid.")
    ] = None,
    pid: Annotated[PositiveInt | None, Parameter(help="The VMM's process.")] = None,
    output: Annotated[
        Path | None, Parameter(name=("--output", "-o"), help="Where the log goes. [default: guest-PID.txt]")
    ] = None,
    force: ForceSwitch = False,
) -> None:
    """Print the commands that record a guest of your own, and what each can show; or record one."""
    from gmemcore.workload.logs import capture as ways

    with reporting("trace capture"):
        if run is None and pid is None and output is None:
            check_force(force, output=output)
            _print_ways()
            return
        if run is None or pid is None:
            raise InvalidArgumentError("recording needs both --run SECONDS and --pid PID")
        if run > _LONGEST:
            raise InvalidArgumentError(f"--run must be at most {_LONGEST:,} seconds, not {run:g}")
        place = output or Path(f"guest-{pid}.txt")
        check_output(place, force=force)
        with replacing(place) as file:
            program = ways.record(file, pid, run)
        _note_captured(place, program)


def _print_ways() -> None:
    """Print each way of recording a guest: commands, unbroken, and what is in such a log."""
    from gmemcore.workload.logs.capture import GENERAL, SOURCES

    for source in SOURCES:
        say(f"{source.title}\n")
        say(_wrapped(f"Shows: {source.shows}.", "  "))
        say(_wrapped(f"Doesn't show: {source.lacks}.", "  "))
        say()
        for way in source.ways:
            say(f"  {way.title}")
            for command in way.commands:
                say_lines(f"    {line}" for line in command.splitlines())
            say()
    say(_wrapped(GENERAL))


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 78, initial_indent=indent, subsequent_indent=f"{indent}  " if indent else "")


def _note_captured(place: Path, program: str) -> None:
    from gmemcore.workload.logs import read_log

    if not place.is_file():
        return
    with opened(place) as file:
        log = read_log(cast(BufferedReader, file))
    lost = f"; {program} {log.lost}" if log.lost else ""
    note("trace capture", f"{place}: {len(log.events):,} conversions, recorded by {program}{lost}")
    note("trace capture", f"gmemcore replay {place} --memory SIZE imports it")


def _load(name: str, options: Options | None, seed: int | None) -> Workload:
    """Return the workload of a name; a seed means nothing for a trace, which has its own."""
    workload = load(name, options, seed=0 if seed is None else seed)
    if seed is not None and workload.kind == "a trace":
        raise InputError(f"--seed is for a behaviour and a log; {name} is a trace")
    return workload


def _check_output(output: Path, *, force: bool) -> None:
    """Make sure, before any work, that a trace can be written."""
    from gmemcore.workload.trace import PARQUET_SUFFIX

    check_output(output, force=force)
    if output.suffix.lower() == PARQUET_SUFFIX:
        from gmemcore.workload.parquet import import_pyarrow

        import_pyarrow()


def _write(output: Path, workload: Workload) -> None:
    from gmemcore.workload.trace import write_trace

    write_trace(output, workload.trace)


def imported_record(workload: Workload, place: int) -> dict[str, Any]:
    """Return what an import found, for JSON; nothing of a trace or a behaviour."""
    from gmemcore.workload.logs import launch_record, summary_record

    if workload.imported is None:
        return {}
    return {
        "import": {**summary_record(workload.imported), **launch_record(workload.launches[place])},
    }


# --- what is in it ------------------------------------------------------------------------------------------
def describe(trace: "Trace") -> dict[str, Any]:
    """Return what is in a trace, as JSON has it."""
    from gmemcore.workload.counts import StepCounts

    counts = StepCounts()
    counts.add(trace.operations)
    header, operations = trace.header, trace.operations
    touching = operations[operations["size"] > 0]
    times = operations["time_ns"]
    start = trace.start
    return {
        "name": header.name,
        "source": header.source,
        "seed": header.seed,
        "vm_type": header.vm_type,
        "operations": len(operations),
        "steps": {name: asdict(count) for name, count in counts.counts().items()},
        "lowest_gpa": int(touching["gpa"].min()) if len(touching) else None,
        "highest_gpa": max((gpa + size for gpa, size in _ranges(touching)), default=None),
        "seconds": (int(times.max()) - int(times.min())) / 1e9 if len(times) and times.any() else None,
        "memory": header.layout.size,
        "layout": [
            {"gpa": region.gpa, "size": region.size, "private": region.private}
            for region in header.layout.regions
        ],
        "starts_private": int(start[:, 1][start[:, 2] > 0].sum()),
        "starts_shared": int(start[:, 1][start[:, 2] == 0].sum()),
    }


def _ranges(operations: Any) -> Iterator[tuple[int, int]]:
    yield from zip(operations["gpa"].tolist(), operations["size"].tolist(), strict=True)


def _print_info(described: dict[str, Any]) -> None:
    say(f"{described['name']}: {described['source']}; seed {described['seed']}")
    regions = described["layout"]
    say(f"{format_bytes(described['memory'])} of memory in {counted(len(regions), 'region')}:")
    for region in regions[:_REGIONS_SHOWN]:
        start = "private" if region["private"] else "shared"
        say(f"  {region['gpa']:#x} + {format_bytes(region['size'])}, {start} at start")
    if len(regions) > _REGIONS_SHOWN:
        say(f"  and {len(regions) - _REGIONS_SHOWN} more")
    for state in ("private", "shared"):
        if described[f"starts_{state}"]:
            say(f"  {format_bytes(described[f'starts_{state}'])} of it {state} at start")
    say()
    print_table(
        ("step", "operations", "bytes", "smallest", "largest"),
        [
            (
                name,
                f"{count['operations']:,}",
                *(format_bytes(count[figure]) for figure in ("bytes", "smallest", "largest")),
            )
            for name, count in described["steps"].items()
        ],
        figures=(1, 2, 3, 4),
    )
    say()
    span = ""
    if described["lowest_gpa"] is not None:
        span = f" between {described['lowest_gpa']:#x} and {described['highest_gpa']:#x}"
    duration = "" if described["seconds"] is None else f" in {format_time(described['seconds'])}"
    say(f"{described['operations']:,} operations{span}{duration}")
