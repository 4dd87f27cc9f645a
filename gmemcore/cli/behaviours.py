"""``gmemcore behaviours``: what guests do, by which source, and what it consists of."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.types import PositiveInt

from gmemcore.cli.common import assignments_of
from gmemcore.cli.console import progress, reporting, say, say_json, say_lines
from gmemcore.cli.predictions import CostOption, prediction_lines, read_cost
from gmemcore.cli.tables import print_table
from gmemcore.uapi import VmType
from gmemcore.units import format_bytes, format_size, parse_size

if TYPE_CHECKING:
    from gmemcore.workload.behaviours import Behaviour
    from gmemcore.workload.behaviours.contents import Contents
    from gmemcore.workload.cost import CostFile, Prediction
    from gmemcore.workload.operations import Operations

COMMAND = "behaviours"


def behaviours(
    name: Annotated[
        str | None, Parameter(help="This behaviour: its parameters, and what its stream contains.")
    ] = None,
    /,
    *,
    memory: Annotated[str, Parameter(help="Guest memory, laid out as QEMU's q35 does.")] = "4g",
    assignments: Annotated[
        list[str] | None, Parameter(name="--set", negative="", help="A parameter, as in --set swiotlb=64m.")
    ] = None,
    seed: Annotated[int, Parameter(help="Seed of whatever is random.")] = 0,
    limit: Annotated[
        PositiveInt | None, Parameter(help="Most operations. [default: all, or 100,000 if it doesn't end]")
    ] = None,
    vm_type: Annotated[
        str | None, Parameter(help=f"{', '.join(VmType)}. [default: the behaviour's own]")
    ] = None,
    abi: Annotated[str, Parameter(help="Revision.")] = "v5",
    cost: CostOption = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="", help="Print JSON, for programs.")] = False,
) -> None:
    """List the guest behaviours, or run one on a guest without bytes and show what it consists of.

    Exit status 2: a name, a parameter or a value that doesn't exist.
    """
    from gmemcore.workload.behaviours import BEHAVIOURS, get_behaviour

    with reporting(COMMAND):
        if name is None:
            rows = list(BEHAVIOURS.values())
            say_json([_as_record(row) for row in rows]) if as_json else _print_list(rows)
            return
        row = get_behaviour(name)
        given = assignments_of(assignments or [])
        figures = read_cost(cost)
        contents = _run(
            row, parse_size(memory), seed, limit, row.vm_type if vm_type is None else vm_type, abi, given
        )
        if as_json:
            say_json(_as_record(row) | {"contents": _contents_record(contents, figures)})
            return
        _print_one(row, contents, given)
        if figures is not None:
            say_lines(prediction_lines(_predicted(contents, figures), figures.title))


def _run(
    row: "Behaviour", memory: int, seed: int, limit: int | None, vm_type: str, abi: str, given: dict[str, str]
) -> "Contents":
    from gmemcore.machine import create_vm
    from gmemcore.workload.behaviours import workload
    from gmemcore.workload.behaviours.contents import contents_of

    header, stream = workload(row, memory, seed=seed, limit=limit, parameters=given)
    with create_vm(vm_type, abi=abi, backing="none") as vm, progress(COMMAND, limit, "operations") as advance:
        return contents_of(_counted(stream, advance), vm, header.layout)


def _counted(stream: "Iterator[Operations]", advance: Callable[[int], None]) -> "Iterator[Operations]":
    """Pass a stream on, and say how many operations are done."""
    done = 0
    for operations in stream:
        yield operations
        done += len(operations)
        advance(done)


# --- output ---------------------------------------------------------------------------------------------
def _as_record(row: "Behaviour") -> dict[str, Any]:
    return {
        "name": row.name,
        "title": row.title,
        "source": row.source,
        "vm_type": row.vm_type,
        "starts_private": row.starts_private,
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

    print_table(
        ("behaviour", "what the guest does", "parameters"),
        [
            (
                row.name,
                row.title + ("" if row.ends else " (endless)"),
                ", ".join(f"{each.name}={each.format(each.default)}" for each in row.parameters),
            )
            for row in rows
        ],
    )
    common = ", ".join(f"{each.name}={each.format(each.default)}" for each in COMMON)
    say(
        "",
        f"endless: runs until --limit. All of them take {common}.",
        "gmemcore behaviours NAME shows a behaviour's parameters, its source and what its stream contains.",
    )


def _print_one(row: "Behaviour", contents: "Contents", given: dict[str, str]) -> None:
    say(f"{row.name}: {row.title}", f"source: {row.source}", "")
    print_table(
        ("parameter", "value", "accepted", "unit", "meaning"),
        [
            (
                each.name,
                given.get(each.name, each.format(each.default)),
                each.accepted,
                each.unit,
                each.meaning,
            )
            for each in row.all_parameters
        ],
    )
    say()
    print_table(
        ("step", "operations", "bytes", "smallest", "largest", "refused"),
        [
            (
                name,
                f"{count.operations:,}",
                *map(format_bytes, (count.bytes, count.smallest, count.largest)),
                ", ".join(f"{outcome} {n:,}" for outcome, n in count.refused.items()),
            )
            for name, count in contents.steps.items()
        ],
        figures=(1, 2, 3, 4),
    )
    share = contents.shared / contents.memory
    counted = [f"{name} {n:,}" for name, n in contents.counters.asdict().items() if n]
    say(
        "",
        f"{contents.operations:,} operations; at the end {format_bytes(contents.shared)} of "
        f"{format_size(contents.memory)} are shared ({share:.2%})",
        f"counters: {', '.join(counted) or 'none'}",
    )
