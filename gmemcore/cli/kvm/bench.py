"""``gmemcore kvm bench``: what operations of the host's kernel take."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from gmemcore.cli.console import note, say, say_lines, say_records
from gmemcore.cli.kvm.common import hanging, vm_types_of
from gmemcore.cli.options import (
    ForceSwitch,
    JsonSwitch,
    LinesOutput,
    SecondsOption,
    SizeOption,
    VmTypeOption,
    check_force,
)
from gmemcore.cli.tables import print_table
from gmemcore.errors import InvalidArgumentError
from gmemcore.units import format_number, format_size, format_time, size_words

if TYPE_CHECKING:
    from gmemcore.results.bench import BenchCell

MOST_MEMORY = 1 << 30


def bench(
    *,
    memory: Annotated[SizeOption, Parameter(help="Bytes that operations work on, up to 1g.")] = 256 << 20,
    seconds: Annotated[SecondsOption, Parameter(help="Seconds for each operation.")] = 0.5,
    vm_type: Annotated[
        VmTypeOption, Parameter(help="Measure this VM type. [default: all that the host offers]")
    ] = None,
    as_json: Annotated[JsonSwitch, Parameter(help="Print JSON Lines, as bench does.")] = False,
    output: LinesOutput = None,
    force: ForceSwitch = False,
) -> None:
    """Measure what this host's kernel takes for each operation of guest_memfd.

    Creating a file, first touches by the host and by a guest, fallocate, PUNCH_HOLE, munmap, both attribute
    ioctls from 4 KiB to 1 GiB, touches after a conversion, and the whole conversion as a VMM does it; next to
    memcpy and memset of the same run. What the host can't do is listed as not offered, with the reason.

    Measure on a quiet machine. `gmemcore report` makes a page of the JSON.
    """
    from gmemcore.benchmark.kernel import Bench, cells, first_line, measure
    from gmemcore.engine.host import check_available
    from gmemcore.files.records import lines_of
    from gmemcore.files.writing import check_output, replace_file
    from gmemcore.kvm import KernelTransport, probe

    check_force(force, output=output)
    if memory > MOST_MEMORY:
        raise InvalidArgumentError(f"--memory must be at most 1g, not {format_size(memory)}")
    if output is not None:
        check_output(output, force=force)
    check_available(4 * memory)
    with KernelTransport() as transport:
        host = probe(transport)
        found: list[BenchCell] = []
        for kind in vm_types_of(host, vm_type):
            stage = Bench(transport, host, kind, memory)
            actions = stage.actions()
            measure(actions, seconds=seconds, say=lambda action: note("kvm bench", action.words))
            found += cells(stage, actions)
    lines = [*lines_of(first_line(host, memory, seconds, found), found)]
    if output is not None:
        replace_file(output, lines)
    if as_json:
        say_records(lines)
        return
    say(f"Linux {host.release}, {size_words(memory)}")
    for name in dict.fromkeys(cell.vm_type for cell in found):
        _print([cell for cell in found if cell.vm_type == name])


def _print(found: Sequence["BenchCell"]) -> None:
    """Print the figures of a VM type, then what isn't offered and why."""
    say("", f"VM type {found[0].vm_type}")
    rows = [_row(cell) for cell in found if cell.outcome == "OK"]
    print_table(("operation", "range", "call", "ns/page", "95 %"), rows, figures=(1, 2, 3, 4), labels=1)
    missing: dict[str, list[str]] = {}
    for cell in found:
        if cell.outcome != "OK":
            missing.setdefault(cell.why, []).append(cell.operation)
    for why, operations in missing.items():
        say_lines(hanging("not offered  ", f"{'; '.join(dict.fromkeys(operations))} ({why})"))


def _row(cell: "BenchCell") -> tuple[str, ...]:
    direction = cell.direction.replace("_", " ")
    attributes = "" if cell.fragmentation == "uniform" else ", alternating"
    call, page = cell.call_seconds, cell.ns_per_page
    return (
        f"{cell.operation}{f', {direction}{attributes}' if direction else ''}",
        size_words(cell.range),
        "" if call is None else format_time(call.median),
        "" if page is None else format_number(page.median),
        "" if page is None else f"{format_number(page.low)} to {format_number(page.high)}",
    )
