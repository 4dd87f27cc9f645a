"""``gmemcore trace``: operations of real and of made-up guests, kept in files."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter
from cyclopts.types import PositiveInt

from gmemcore.cli.common import assignments_of, complaint, console_for_tables, format_bytes, make_table
from gmemcore.errors import InvalidArgumentError
from gmemcore.units import format_time, parse_size

if TYPE_CHECKING:
    from gmemcore.workload.trace import Trace

app = App(name="trace", help="Record, import, convert and describe what happens to guests' memory.")

_ENDLESS = 100_000
_REGIONS_SHOWN = 8

_Output = Annotated[Path, Parameter(help="Where it goes: .jsonl is text, all else the binary form.")]
_Memory = Annotated[str | None, Parameter(help="Memory of the guest, laid out as QEMU's q35 does.")]
_Seed = Annotated[int, Parameter(help="Of contents, and of a behaviour.")]
_Launching = Annotated[bool, Parameter(help="The guest doesn't run yet, though no launch is shown.")]


@app.command
def record(
    what: Annotated[str, Parameter(help="A behaviour (see gmemcore behaviours), or a log to import.")],
    output: _Output,
    /,
    *,
    memory: _Memory = None,
    assignments: Annotated[
        list[str] | None, Parameter(name="--set", help="A behaviour's parameter, as in --set swiotlb=64m.")
    ] = None,
    seed: _Seed = 0,
    limit: Annotated[
        PositiveInt | None, Parameter(help=f"Operations at most; {_ENDLESS:,} for behaviours without end.")
    ] = None,
    launching: _Launching = False,
) -> int:
    """Record what a behaviour does, or what a log shows.

    Logs are QEMU's trace (kvm_convert_memory, kvm_memory_fault, kvm_sev_snp_launch_*), and KVM's
    kvm_vm_set_mem_attributes as ftrace or perf script print it.

    Exit status 0: the trace is written; 2: a name, a value or a line that can't be read.
    """
    from gmemcore.workload.behaviours import BEHAVIOURS
    from gmemcore.workload.trace import write_trace

    with _errors_told() as told:
        if what in BEHAVIOURS:
            given = assignments_of(assignments or [])
            trace = _of_behaviour(what, memory or "4g", seed, limit, given, launching)
        else:
            if not Path(what).exists():
                raise InvalidArgumentError(
                    f"no behaviour and no file {what!r}; there are {', '.join(BEHAVIOURS)}"
                )
            trace = load(Path(what), memory=memory, seed=seed, launching=launching)
        write_trace(output, trace)
        print(
            f"{output}: {len(trace.operations):,} operations, {output.stat().st_size:,} bytes",
            file=sys.stderr,
        )
    return told.status


@app.command
def info(
    trace: Annotated[Path, Parameter(help="A trace, or a log.")],
    /,
    *,
    as_json: Annotated[bool, Parameter(name="--json", help="Print JSON, for programs.")] = False,
) -> int:
    """Show what is in a trace: steps, ranges, layout, duration.

    Exit status 2: the file can't be read.
    """
    with _errors_told() as told:
        found = load(trace)
        described = describe(found)
        print(json.dumps({"file": str(trace), **described}, indent=1)) if as_json else _print_info(described)
    return told.status


@app.command
def convert(
    source: Annotated[Path, Parameter(help="A trace of either form, or a log.")],
    output: _Output,
    /,
    *,
    memory: _Memory = None,
    seed: _Seed = 0,
    launching: _Launching = False,
) -> int:
    """Write a trace in the form that the output's name asks for; memory, seed and launching are about logs.

    Exit status 2: a file that can't be read or written.
    """
    from gmemcore.workload.trace import write_trace

    with _errors_told() as told:
        if output.exists() and output.samefile(source):
            raise InvalidArgumentError(f"{output} is the source; another name would be accepted")
        write_trace(output, load(source, memory=memory, seed=seed, launching=launching))
    return told.status


class _errors_told:  # noqa: N801  # read as a verb, in a with statement
    """Turn what a file or an option deserves into a line and exit status 2."""

    status = 0

    def __enter__(self) -> "_errors_told":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        from gmemcore.workload.container import ContainerError

        if not isinstance(error, (ContainerError, OSError)):
            return False
        text = complaint(error) if isinstance(error, OSError) else str(error)
        print(f"gmemcore trace: {text}", file=sys.stderr)
        self.status = 2
        return True


def load(path: Path, *, memory: str | None = None, seed: int = 0, launching: bool = False) -> "Trace":
    """Read a trace of either form or a log, and say on stderr what an import had to assume.

    Raises
    ------
    ContainerError, OSError
        It can't be read.
    """
    from gmemcore.workload.container import is_container
    from gmemcore.workload.importers import import_log, read_log
    from gmemcore.workload.layout import Layout
    from gmemcore.workload.trace import TraceError, is_text_trace, read_trace

    if is_container(path) or is_text_trace(path):
        return read_trace(path)
    layout = None if memory is None else Layout.pc(parse_size(memory))
    try:
        imported = import_log(read_log(path), path.name, layout=layout, seed=seed, launching=launching)
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from error
    if imported.assumed_running:
        _note(f"{path} shows no launch: the guest was taken to run already (--launching: not yet)")
    if imported.lost:
        _note(f"{path}: its tracer lost {imported.lost:,} events; what follows is not all that happened")
    return imported.trace


def _note(text: str) -> None:
    print(f"gmemcore: {text}", file=sys.stderr)


def _of_behaviour(
    name: str, memory: str, seed: int, limit: int | None, given: dict[str, str], launching: bool
) -> "Trace":
    from gmemcore.workload.behaviours import get_behaviour
    from gmemcore.workload.layout import Layout
    from gmemcore.workload.streams import limit as limited
    from gmemcore.workload.streams import running
    from gmemcore.workload.trace import Header
    from gmemcore.workload.trace import record as record_stream

    behaviour = get_behaviour(name)
    layout = Layout.pc(parse_size(memory))
    stream = behaviour.operations(layout, seed, **dict[str, Any](given))
    stream = stream if launching else running(stream)
    if limit is not None or not behaviour.ends:
        stream = limited(stream, _ENDLESS if limit is None else limit)
    words = [f"{parameter}={value}" for parameter, value in given.items()]
    return record_stream(Header(name, " ".join(["behaviour", name, *words]), layout, seed), stream)


# --- what is in it ------------------------------------------------------------------------------------------
def describe(trace: "Trace") -> dict[str, Any]:
    """Return what is in a trace, as JSON has it."""
    from gmemcore.workload.counts import StepCounts

    counts = StepCounts()
    counts.add(trace.operations)
    header, operations = trace.header, trace.operations
    touching = operations[operations["size"] > 0]
    times = operations["time_ns"]
    return {
        "name": header.name,
        "source": header.source,
        "seed": header.seed,
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
    }


def _ranges(operations: Any) -> Iterator[tuple[int, int]]:
    yield from zip(operations["gpa"].tolist(), operations["size"].tolist(), strict=True)


def printable(text: str) -> str:
    """Return a text from a file without what a terminal would act on."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def _print_info(described: dict[str, Any]) -> None:
    from rich.markup import escape

    print(f"{printable(described['name'])}: {printable(described['source'])}; seed {described['seed']}")
    regions = described["layout"]
    plural = "" if len(regions) == 1 else "s"
    print(f"{format_bytes(described['memory'])} of memory in {len(regions)} region{plural}:")
    for region in regions[:_REGIONS_SHOWN]:
        start = "private" if region["private"] else "shared"
        print(f"  {region['gpa']:#x} + {format_bytes(region['size'])}, {start} at start")
    if len(regions) > _REGIONS_SHOWN:
        print(f"  and {len(regions) - _REGIONS_SHOWN} more")
    table = make_table("step", "operations", "bytes", "smallest", "largest", right=(1, 2, 3, 4))
    for name, count in described["steps"].items():
        figures = (count["bytes"], count["smallest"], count["largest"])
        table.add_row(escape(name), f"{count['operations']:,}", *map(format_bytes, figures))
    console_for_tables().print(table)
    span = ""
    if described["lowest_gpa"] is not None:
        span = f" between {described['lowest_gpa']:#x} and {described['highest_gpa']:#x}"
    duration = "" if described["seconds"] is None else f" in {format_time(described['seconds'])}"
    print(f"{described['operations']:,} operations{span}{duration}")
