"""``gmemcore bench``: the cost of conversions, next to the memory primitives of the same run."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import cyclopts
from cyclopts import Parameter

from gmemcore.cli.bench_compare import compare
from gmemcore.cli.bench_options import (
    Abis,
    Directions,
    Effects,
    Firmwares,
    Flags,
    Phases,
    VmTypes,
    names_option,
)
from gmemcore.cli.console import note, progress, reporting
from gmemcore.cli.options import (
    ContentsOption,
    ForceSwitch,
    JsonSwitch,
    OptionalSeconds,
    ProposalFiles,
    at_most_one,
    check_force,
)
from gmemcore.cli.predictions import CostOption, read_cost
from gmemcore.errors import OutOfMemoryError
from gmemcore.uapi import ContentWork

if TYPE_CHECKING:
    from gmemcore.benchmark import Case
    from gmemcore.cli.bench_options import Names
    from gmemcore.cli.pictures import PictureFile
    from gmemcore.results.bench import BenchCell, BenchFirst

    Backings = Names
    Fragmentations = Names
    Switches = Names
else:
    Backings = names_option(
        "anonymous", "memfd", "guest_memfd", help="Where the bytes live. [default: anonymous]"
    )
    Fragmentations = names_option(
        "uniform",
        "alternating-allocated",
        "alternating-accepted",
        "random-half",
        "2m-with-holes",
        help="How page state alternates; see gmemcore template axes. [default: uniform]",
    )
    Switches = names_option("on", "off", help="")

app = cyclopts.App(name="bench", help="Measure what conversions cost on this machine.")
app.command(compare)


@dataclass(frozen=True, slots=True)
class Selection:
    """Filters of policy cells; an omitted one selects all."""

    abi: Abis = None
    proposal: ProposalFiles = ()
    vm_type: VmTypes = None
    firmware: Firmwares = None
    phase: Phases = None
    direction: Directions = None
    flag: Flags = None
    effect: Effects = None


@dataclass(frozen=True, slots=True)
class Conditions:
    """Measurement conditions."""

    memory: Annotated[
        str | None,
        Parameter(help="Guest memory. [default: 8 times the last-level cache, at least 256m]"),
    ] = None
    range_: Annotated[
        str | None,
        Parameter(name="--range", help="Sizes of one conversion. [default: 4k,2m and all of the memory]"),
    ] = None
    fragmentation: Fragmentations = None
    backing: Backings = None
    huge_pages: Annotated[
        Switches, Parameter(help="Transparent huge pages, for anonymous memory. [default: on]")
    ] = None
    threads: Annotated[str | None, Parameter(help="Threads of one conversion. [default: 1]")] = None
    enforce: Annotated[
        Switches,
        Parameter(help="Make host accesses to private pages fault (memfd only). [default: off]"),
    ] = None
    page_size: Annotated[
        str | None,
        Parameter(
            help="Page sizes of the guest's file: 4k, 2m, 1g. 2m and 1g need huge-partial, then the default "
            "revision, or huge-rollback. [default: 4k]"
        ),
    ] = None
    contents: Annotated[ContentsOption, Parameter(help="eager: the time of bytes is what is measured.")] = (
        ContentWork.EAGER
    )
    axes: Annotated[Path | None, Parameter(help="TOML file with any of these options.")] = None


@dataclass(frozen=True, slots=True)
class Outputs:
    """Outputs."""

    as_json: JsonSwitch = False
    output: Annotated[Path | None, Parameter(name=("--output", "-o"), help="Write JSON Lines here.")] = None
    pyperf: Annotated[Path | None, Parameter(help="Write a pyperf suite here.")] = None
    plot: Annotated[Path | None, Parameter(help="Draw GB/s per effect here.")] = None
    force: ForceSwitch = False
    full: Annotated[bool, Parameter(help="Print every cell after the verdict.")] = False


@app.default
def bench(
    *,
    selection: Annotated[Selection | None, Parameter(name="*", group="Cells")] = None,
    conditions: Annotated[Conditions | None, Parameter(name="*", group="Conditions")] = None,
    outputs: Annotated[Outputs | None, Parameter(name="*", group="Outputs")] = None,
    cost: CostOption = None,
    seconds: Annotated[OptionalSeconds, Parameter(help="Time to spend per setting. [default: 45]")] = None,
    quick: Annotated[
        bool,
        Parameter(
            help="Run and verify every cell with two samples, in 64m: a quick check, not for publication."
        ),
    ] = False,
) -> int:
    """Measure conversions by VM type, launch phase, direction and flag, and verify every byte.

    Prints a verdict: per effect GB/s, speed relative to memcpy and to the memory primitive of its kind, time
    per page, and where flags are refused. --full prints every cell. Default cells: v5 with today's firmware,
    two-caps with the cipher firmware, and legacy; with --proposal, the proposal's. Options that name values
    take several, with commas.

    Exit status: 0 measured; 1 a byte was wrong; 2 an option or a file that can't be used.
    """
    from gmemcore.benchmark.axes_file import check_contents, read_axes
    from gmemcore.benchmark.expected import WrongContentsError
    from gmemcore.benchmark.memory import check_host, default_memory
    from gmemcore.benchmark.run import QUICK_MEMORY
    from gmemcore.policy.proposal import read_proposals

    asked, under, to = selection or Selection(), conditions or Conditions(), outputs or Outputs()
    with reporting("bench", interrupted="interrupted", wrong=(WrongContentsError,)):
        at_most_one(json=to.as_json, full=to.full)
        at_most_one(json=to.as_json, cost=cost)
        at_most_one(quick=quick, seconds=seconds)
        check_force(to.force, output=to.output, pyperf=to.pyperf, plot=to.plot)
        check_contents(under.contents)
        given = _as_in_file(asked, under)
        axes = read_axes(under.axes, given)
        proposals = read_proposals(asked.proposal)
        cases = axes.cases(QUICK_MEMORY if quick else default_memory(), proposals)
        cases = _fitting(cases, named=axes.abi is not None)
        check_host(case.setting for case in cases)
        figures = read_cost(cost)
        with ExitStack() as stack:
            sinks = _sinks(to, stack)
            began = time.monotonic()
            first, cells = _run(cases, quick, seconds, sinks)
        if not to.as_json:
            from gmemcore.cli.bench_report import print_matrix, print_verdict

            print_verdict(first, cells, time.monotonic() - began)
            if to.full or figures is not None:
                print_matrix(cells, figures)
    return 0


def _as_in_file(asked: Selection, under: Conditions) -> dict[str, Any]:
    """Return the options as keys and values of a file of axes."""
    found: dict[str, Any] = {
        name: getattr(asked, name) for name in Selection.__dataclass_fields__ if name != "proposal"
    }
    found |= {"fragmentation": under.fragmentation, "backing": under.backing, "memory": under.memory}
    for name, switches in (("huge_pages", under.huge_pages), ("enforce", under.enforce)):
        found[name] = None if switches is None else [word == "on" for word in switches]
    found["range"] = under.range_ and under.range_.split(",")
    found["page_size"] = under.page_size and under.page_size.split(",")
    if under.threads is not None:
        words = under.threads.split(",")
        found["threads"] = [int(word) if word.isascii() and word.isdecimal() else word for word in words]
    return {name: value for name, value in found.items() if value is not None}


def _fitting(cases: "list[Case]", *, named: bool) -> "list[Case]":
    """Return the cases that fit the host's memory; without `legacy`, unless it was asked for by name.

    Raises
    ------
    OutOfMemoryError
        ENOMEM: they don't fit, with what is needed.
    """
    from gmemcore.benchmark.run import memory_needed
    from gmemcore.engine.host import check_available

    try:
        check_available(memory_needed(cases))
    except OutOfMemoryError as error:
        left = [case for case in cases if not case.abi.legacy]
        if named or not left or len(left) == len(cases):
            raise
        check_available(memory_needed(left))
        note("bench", f"without legacy, which has two backings: {error.strerror}")
        return left
    return cases


# ---- consumers of records ----------------------------------------------------------------------------------
Sink = Callable[[Any], None]


def _sinks(to: Outputs, stack: ExitStack) -> list[Sink]:
    """Return the consumers of records, after checking that files can be written."""
    sinks = record_sinks(to.output, as_json=to.as_json, force=to.force, stack=stack)
    if to.pyperf is not None:
        sinks.append(_pyperf_sink(to.pyperf, to.force, stack))
    if to.plot is not None:
        sinks.append(_picture_sink(to.plot, to.force, stack))
    return sinks


def record_sinks(output: Path | None, *, as_json: bool, force: bool, stack: ExitStack) -> list[Sink]:
    """Return the consumers that write records to a file and print them, as requested."""
    from gmemcore.files.records import RecordFile

    sinks: list[Sink] = []
    if output is not None:
        sinks.append(stack.enter_context(RecordFile(output, force=force)).write)
    if as_json:
        sinks.append(stack.enter_context(_printed()))
    return sinks


@contextmanager
def _printed() -> Iterator[Sink]:
    """Print records to standard output, and an end record when the block ends, however it ends."""
    from gmemcore.files.records import end_line, line

    count = -1

    def show(record: Any) -> None:
        nonlocal count
        count += 1
        sys.stdout.write(line(record).decode())

    why = ""
    try:
        yield show
    except BaseException as error:
        why = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
        raise
    finally:
        if count >= 0:
            sys.stdout.write(end_line(count, complete=not why, why=why[:500]).decode())


def _pyperf_sink(path: Path, force: bool, stack: ExitStack) -> Sink:
    from gmemcore.benchmark.pyperf_suite import require_pyperf, suite_of
    from gmemcore.files.writing import check_output, replace_file

    check_output(path, force=force)
    require_pyperf()
    return collected(stack, lambda records: replace_file(path, [suite_of(records[0], records[1:])]))


def collected(stack: ExitStack, use: Callable[[list[Any]], None]) -> Sink:
    """Return a consumer that collects records and passes them on if the block ends without an exception."""
    records: list[Any] = []

    def leave(kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and records:
            use(records)

    stack.push(leave)
    return records.append


def _picture_sink(path: Path, force: bool, stack: ExitStack) -> Sink:
    from gmemcore.cli.pictures import PictureFile

    file = PictureFile(path, force=force)
    return collected(stack, lambda records: _draw(file, records))


def _draw(file: "PictureFile", records: list[Any]) -> None:
    """Draw GB/s per effect, or if several settings or patterns were measured, work over all of them."""
    from gmemcore.analysis.runs import Run
    from gmemcore.analysis.speed import bench_axes, bench_effects
    from gmemcore.results.bench_tables import setting_words

    first, *cells = records
    run = Run("bench", first, cells)
    several = len({(setting_words(cell), cell.fragmentation) for cell in cells}) > 1
    try:
        ax = (bench_axes if several else bench_effects)(run)
    except ValueError as error:
        note("bench", f"no picture: {error}")
        return
    file.write(ax.figure)


# ---- the run -----------------------------------------------------------------------------------------------
def _run(
    cases: "Sequence[Case]", quick: bool, seconds: float | None, sinks: Sequence[Sink]
) -> "tuple[BenchFirst, list[BenchCell]]":
    """Run all cases and pass each record on at once."""
    from dataclasses import replace

    from gmemcore.benchmark.run import QUICK, USUAL
    from gmemcore.benchmark.session import records
    from gmemcore.results.bench import BenchCell, BenchFirst

    effort = QUICK if quick else USUAL if seconds is None else replace(USUAL, seconds=seconds)
    first: BenchFirst | None = None
    cells: list[BenchCell] = []
    with progress("bench", 100, "%") as tell:
        settings = {"quick": quick}
        for record in records(
            cases, effort, settings, lambda share, _: tell(int(share * 100)), lambda text: note("bench", text)
        ):
            if isinstance(record, BenchFirst):
                first = record
            else:
                cells.append(record)
            for sink in sinks:
                sink(record)
    assert first is not None
    return first, cells
