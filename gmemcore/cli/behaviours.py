"""``gmemcore behaviours``: what guests do, on whose word, and what a stream of it contains."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.types import PositiveInt
from rich.console import Console

from gmemcore.cli.common import assignments_of, console_for_tables, format_bytes, make_table
from gmemcore.cli.predictions import CostOption, prediction_lines, read_cost
from gmemcore.errors import GmemError
from gmemcore.uapi import VmType
from gmemcore.units import format_size, parse_size

if TYPE_CHECKING:
    from gmemcore.workload.behaviours import Behaviour
    from gmemcore.workload.behaviours.contents import Contents
    from gmemcore.workload.cost import CostFile, Prediction
    from gmemcore.workload.operations import Operations

_ENDLESS = 100_000


def behaviours(
    name: Annotated[
        str | None, Parameter(help="This behaviour: its parameters, and what its stream contains.")
    ] = None,
    /,
    *,
    memory: Annotated[str, Parameter(help="Memory of the guest.")] = "4g",
    assignments: Annotated[
        list[str] | None, Parameter(name="--set", negative="", help="A parameter, as in --set swiotlb=64m.")
    ] = None,
    seed: Annotated[int, Parameter(help="Decides whatever is random.")] = 0,
    limit: Annotated[
        PositiveInt | None, Parameter(help=f"Operations at most; {_ENDLESS:,} for streams without end.")
    ] = None,
    vm_type: Annotated[str, Parameter(help=f"Who runs it: {', '.join(VmType)}.")] = "SNP",
    abi: Annotated[str, Parameter(help="Under which revision.")] = "v5",
    cost: CostOption = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="", help="Print JSON, for programs.")] = False,
) -> int:
    """List the guest behaviours, or run one on a guest without bytes and show what it consists of.

    Exit status 2: a name, a parameter or a value that doesn't exist.
    """
    from gmemcore.workload.behaviours import BEHAVIOURS, get_behaviour

    try:
        if name is None:
            rows = list(BEHAVIOURS.values())
            print(json.dumps([_as_record(row) for row in rows], indent=1)) if as_json else _print_list(rows)
            return 0
        row = get_behaviour(name)
        given = assignments_of(assignments or [])
        figures = read_cost(cost)
        contents = _run(row, parse_size(memory), seed, limit, vm_type, abi, given)
    except GmemError as error:
        print(f"gmemcore behaviours: {error.strerror}", file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps(_as_record(row) | {"contents": _contents_record(contents, figures)}, indent=1))
    else:
        _print_one(row, contents, given)
        for line in () if figures is None else prediction_lines(_predicted(contents, figures), figures.title):
            print(line)
    return 0


def _run(
    row: "Behaviour", memory: int, seed: int, limit: int | None, vm_type: str, abi: str, given: dict[str, str]
) -> "Contents":
    from gmemcore.machine import create_vm
    from gmemcore.workload.behaviours.contents import contents_of
    from gmemcore.workload.layout import Layout
    from gmemcore.workload.streams import limit as limited

    layout = Layout.pc(memory, private=True)  # as guests with private memory start
    stream = row.operations(layout, seed, **dict[str, Any](given))
    if limit is not None or not row.ends:
        limit = _ENDLESS if limit is None else limit
        stream = limited(stream, limit)
    with create_vm(vm_type, abi=abi, backing="none") as vm:
        return contents_of(_with_progress(stream, limit), vm, layout)


def _with_progress(stream: "Iterator[Operations]", total: int | None) -> "Iterator[Operations]":
    """Show how many operations are done, if somebody looks."""
    if not sys.stderr.isatty():
        yield from stream
        return
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("gmemcore behaviours", total=total)
        for operations in stream:
            yield operations
            progress.update(task, advance=len(operations))


# --- output ---------------------------------------------------------------------------------------------
def _as_record(row: "Behaviour") -> dict[str, Any]:
    return {
        "name": row.name,
        "title": row.title,
        "source": row.source,
        "ends": row.ends,
        "hostile": row.hostile,
        "refusals": {step.name: sorted(outcomes) for step, outcomes in row.refusals.items()},
        "parameters": [
            {
                "name": each.name,
                "type": each.kind,
                "unit": each.unit,
                "default": each.default,
                "low": each.low,
                "high": each.high,
                "meaning": each.meaning,
            }
            for each in row.all_parameters
        ],
    }


def _predicted(contents: "Contents", cost: "CostFile") -> "Prediction":
    """Return what the stream takes, each conversion a call."""
    from gmemcore.workload.cost import predict

    calls = sum(count.operations for name, count in contents.steps.items() if name.startswith("CONVERT"))
    return predict(contents.counters, cost, calls=calls)


def _contents_record(contents: "Contents", cost: "CostFile | None") -> dict[str, Any]:
    return {
        "operations": contents.operations,
        "steps": {name: asdict(count) for name, count in contents.steps.items()},
        "memory": contents.memory,
        "shared": contents.shared,
        "counters": contents.counters.asdict(),
    } | ({} if cost is None else {"prediction": _predicted(contents, cost).asdict()})


def _print_list(rows: "Sequence[Behaviour]") -> None:
    from gmemcore.workload.behaviours.behaviour import COMMON

    table = make_table("behaviour", "what the guest does", "parameters")
    for row in rows:
        own = ", ".join(f"{each.name}={each.format(each.default)}" for each in row.parameters)
        table.add_row(row.name, row.title + ("" if row.ends else " …"), own)
    console_for_tables().print(table)
    common = ", ".join(f"{each.name}={each.format(each.default)}" for each in COMMON)
    print(f"…: goes on until it is cut. All of them take {common}.")
    print("gmemcore behaviours NAME shows a behaviour's parameters, its source and what its stream contains.")


def _print_one(row: "Behaviour", contents: "Contents", given: dict[str, str]) -> None:
    console = console_for_tables()
    print(f"{row.name}: {row.title}\nsource: {row.source}\n")
    table = make_table("parameter", "value", "accepted", "unit", "meaning")
    for each in row.all_parameters:
        table.add_row(
            each.name, given.get(each.name, each.format(each.default)), each.accepted, each.unit, each.meaning
        )
    console.print(table)
    table = make_table("step", "operations", "bytes", "smallest", "largest", "refused", right=(1, 2, 3, 4))
    for name, count in contents.steps.items():
        refused = ", ".join(f"{outcome} {n:,}" for outcome, n in count.refused.items())
        sizes = (count.bytes, count.smallest, count.largest)
        table.add_row(name, f"{count.operations:,}", *map(format_bytes, sizes), refused)
    console.print(table)
    share = contents.shared / contents.memory
    print(
        f"{contents.operations:,} operations; at the end {format_bytes(contents.shared)} of "
        f"{format_size(contents.memory)} are shared ({share:.2%})"
    )
    counted = [f"{name} {n:,}" for name, n in contents.counters.asdict().items() if n]
    print(f"counters: {', '.join(counted) or 'none'}")
