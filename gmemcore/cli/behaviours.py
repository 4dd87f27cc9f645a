"""``gmemcore behaviours``: what guests do, by which source, and what it consists of."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.types import PositiveInt

from gmemcore.cli.console import progress, reporting, say, say_json, say_lines
from gmemcore.cli.options import (
    AbiOption,
    JsonSwitch,
    ProposalFiles,
    Seed,
    SizeOption,
    VmTypeOption,
    revision_named,
)
from gmemcore.cli.predictions import CostOption, prediction_lines, read_cost
from gmemcore.cli.tables import print_table
from gmemcore.cli.workloads import DEFAULT_MEMORY, Assignments, assignments_of
from gmemcore.errors import InputError
from gmemcore.units import format_bytes, format_size

if TYPE_CHECKING:
    from gmemcore.workload.behaviours import Behaviour
    from gmemcore.workload.behaviours.contents import Contents
    from gmemcore.workload.cost import CostFile, Prediction
    from gmemcore.workload.operations import Operations

COMMAND = "behaviours"


@dataclass(frozen=True, slots=True)
class Run:
    """How a behaviour is run."""

    memory: Annotated[SizeOption, Parameter(help="Guest memory, laid out as QEMU's q35 does.")] = (
        DEFAULT_MEMORY
    )
    assignments: Assignments = ()
    seed: Annotated[Seed, Parameter(help="Seed of whatever is random.")] = 0
    limit: Annotated[
        PositiveInt | None,
        Parameter(help="Stop after this many operations. [default: all, or 100,000 if it doesn't end]"),
    ] = None
    vm_type: Annotated[VmTypeOption, Parameter(help="VM type. [default: the behaviour's own]")] = None
    abi: Annotated[
        AbiOption, Parameter(help="Revision or proposal. [default: v5, or that of --proposal]")
    ] = None
    proposal: ProposalFiles = ()
    cost: CostOption = None


def behaviours(
    name: Annotated[
        str | None, Parameter(help="This behaviour: its parameters, and what its stream contains.")
    ] = None,
    /,
    *,
    run: Annotated[Run | None, Parameter(name="*")] = None,
    as_json: JsonSwitch = False,
) -> None:
    """List the guest behaviours, or run one on a guest without bytes and show what it consists of."""
    from gmemcore.workload.behaviours import BEHAVIOURS, get_behaviour

    with reporting(COMMAND):
        if name is None:
            if run is not None:
                named = ", ".join(_given(run)) or "an option"
                raise InputError(f"{named} needs the name of a behaviour; gmemcore behaviours lists them")
            rows = list(BEHAVIOURS.values())
            say_json([_as_record(row) for row in rows]) if as_json else _print_list(rows)
            return
        row = get_behaviour(name)
        run = run or Run()
        given = assignments_of(run.assignments)
        figures = read_cost(run.cost)
        contents = _contents(row, run, given)
        if as_json:
            say_json(_as_record(row) | {"contents": _contents_record(contents, figures)})
            return
        _print_one(row, contents, given)
        if figures is not None:
            say_lines(prediction_lines(_predicted(contents, figures), figures.title))


def _given(run: Run) -> list[str]:
    """Return the options that were given, as they are typed."""
    names = {"assignments": "--set"}
    return [
        names.get(each.name, f"--{each.name.replace('_', '-')}")
        for each in fields(run)
        if getattr(run, each.name) != each.default
    ]


def _contents(row: "Behaviour", run: Run, given: dict[str, str]) -> "Contents":
    from gmemcore.machine import create_vm
    from gmemcore.workload.behaviours import workload
    from gmemcore.workload.behaviours.contents import contents_of

    abi = revision_named(run.abi, run.proposal)
    header, stream = workload(row, run.memory, seed=run.seed, limit=run.limit, parameters=given)
    with (
        create_vm(run.vm_type or row.vm_type, abi=abi, backing="none") as vm,
        progress(COMMAND, run.limit, "operations") as advance,
    ):
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
    """Return the predicted time of the stream, with one call per conversion."""
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
