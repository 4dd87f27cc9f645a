"""``gmemcore backings``: memory and time with one backing, converted in place, and with two."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from cyclopts import Parameter
from cyclopts.types import PositiveInt

from gmemcore.cli.bench import Sink, collected, record_sinks
from gmemcore.cli.console import note, progress, reporting, say
from gmemcore.cli.options import (
    ForceSwitch,
    JsonSwitch,
    LinesOutput,
    SizeOption,
    VmTypeOption,
    check_force,
    choice,
    one,
)
from gmemcore.cli.tables import Heading, print_table
from gmemcore.errors import UnsupportedOperationError
from gmemcore.units import size_words

if TYPE_CHECKING:
    from gmemcore.benchmark.in_place import Job
    from gmemcore.cli.pictures import PictureFile
    from gmemcore.results.backings import BackingsRun

_BACKINGS: Final = ("anonymous", "memfd", "guest_memfd")
if TYPE_CHECKING:
    _Backing = str
else:  # choices, for help and completion
    _Backing = Literal[_BACKINGS]
_USUAL: "tuple[tuple[str, str], ...]" = (("launch", "SNP"), ("round trip", "SNP"), ("round trip", "PKVM"))


def backings(
    *,
    vm_type: Annotated[
        VmTypeOption, Parameter(help="Measure this VM type alone. [default: SNP and PKVM]")
    ] = None,
    memory: Annotated[SizeOption, Parameter(help="Guest memory.")] = 512 << 20,
    range_: Annotated[SizeOption, Parameter(name="--range", help="Size of one conversion.")] = 2 << 20,
    rounds: Annotated[PositiveInt, Parameter(help="Round trips per run.")] = 2,
    pairs: Annotated[PositiveInt, Parameter(help="Runs of each way.")] = 3,
    backing: Annotated[
        _Backing,
        Parameter(help="Where the bytes live; anonymous has huge pages.", converter=one(choice(_BACKINGS))),
    ] = "anonymous",
    as_json: JsonSwitch = False,
    output: LinesOutput = None,
    plot: Annotated[Path | None, Parameter(help="Draw memory over time here.")] = None,
    force: ForceSwitch = False,
) -> int:
    """Measure the same work with one backing, converted in place, and with two.

    Guest memory is brought to the other side range by range, and every byte is verified there. Each way runs
    in its own processes, interleaved.

    Exit status: 0 measured; 1 the new side didn't read what was written; 2 options that can't be used.
    """
    from gmemcore.benchmark.expected import WrongContentsError

    with reporting("backings", wrong=(WrongContentsError,)):
        check_force(force, output=output, plot=plot)
        listed = _jobs(vm_type, memory, range_, rounds, backing)
        with ExitStack() as stack:
            sinks = record_sinks(output, as_json=as_json, force=force, stack=stack)
            if plot is not None:
                sinks.append(_picture_sink(plot, force, stack))
            runs = _run(listed, pairs, sinks)
        if not as_json:
            _print_report(runs)
    return 0


def _jobs(vm_type: str | None, memory: int, range_: int, rounds: int, backing: str) -> "list[list[Job]]":
    """Return the ways of each work; raise if this host can't do them."""
    from gmemcore.benchmark.axes import settings
    from gmemcore.benchmark.in_place import WORKS, jobs
    from gmemcore.benchmark.memory import check_host
    from gmemcore.engine.host import check_available

    check_host(settings((backing,)))
    check_available(2 * memory)
    if vm_type is None:
        return [jobs(work, each, memory, range_, rounds, backing) for work, each in _USUAL]
    found, reasons = [], []
    for work in WORKS:
        try:
            found.append(jobs(work, vm_type, memory, range_, rounds, backing))
        except UnsupportedOperationError as error:
            reasons.append(str(error.strerror))
    if not found:
        raise UnsupportedOperationError("; ".join(reasons))
    for reason in reasons:
        note("backings", f"left out: {reason}")
    return found


def _run(listed: "list[list[Job]]", pairs: int, sinks: Sequence[Sink]) -> "list[list[BackingsRun]]":
    """Run every way of every work, interleaved, and pass each record on at once."""
    from gmemcore.benchmark.in_place import run_apart
    from gmemcore.results.backings import BackingsFirst, BackingsRun
    from gmemcore.results.environment import as_object, environment

    def put(record: Any) -> None:
        for sink in sinks:
            sink(record)

    put(BackingsFirst(as_object(environment()), settings={"pairs": pairs}))
    works: list[list[BackingsRun]] = []
    done, total = 0, sum(map(len, listed)) * pairs
    with progress("backings", total, "runs") as tell:
        for ways in listed:
            works.append([])
            for _ in range(pairs):
                for job in ways:
                    works[-1].append(BackingsRun(**asdict(job), measured=run_apart(job)))
                    put(works[-1][-1])
                    done += 1
                    tell(done)
    return works


def _picture_sink(path: Path, force: bool, stack: ExitStack) -> Sink:
    from gmemcore.cli.pictures import PictureFile

    file = PictureFile(path, force=force)
    return collected(stack, lambda records: _draw(file, records[1:]))


def _draw(file: "PictureFile", runs: "Sequence[BackingsRun]") -> None:
    from gmemcore.analysis.pictures import memory_of_ways

    works: dict[str, dict[str, list[tuple[float, int]]]] = {}
    for run in runs:
        works.setdefault(f"{run.work}, {run.vm_type}", {}).setdefault(run.way, run.measured.memory)
    file.write(memory_of_ways(works, runs[0].memory))


# ---- the report --------------------------------------------------------------------------------------------
def _print_report(works: "Sequence[Sequence[BackingsRun]]") -> None:
    """Print the memory of each work in a sentence, then all ways as a table."""
    from gmemcore.results.backings_tables import FIGURES, HEADS, LEGEND, memory_words, way_rows, work_words

    first = works[0][0]
    say(f"guest {size_words(first.memory)}, ranges of {size_words(first.range)}, {first.backing}")
    for runs in works:
        say(memory_words(runs))
    say("")
    rows: list[Heading | tuple[str, ...]] = []
    for runs in works:
        rows.append(Heading(work_words(runs)))
        rows += way_rows(runs)
    print_table(HEADS, rows, figures=FIGURES, labels=1)
    say("", LEGEND)
