"""``gmemcore stress``: fleets of seeded guests, checked, made to fail, and resumed where they were killed."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from gmemcore.cli.common import aligned_lines, console_for_tables, make_table
from gmemcore.cli.page_states import SnapshotOption, require_place
from gmemcore.cli.predictions import CostOption, prediction_lines, read_cost
from gmemcore.errors import GmemError
from gmemcore.units import format_time

if TYPE_CHECKING:
    from gmemcore.machine import VmFace
    from gmemcore.stress.guest import Violation
    from gmemcore.stress.merge import Totals
    from gmemcore.stress.run import Run, Runner, Watch
    from gmemcore.stress.spec import Spec
    from gmemcore.workload.cost import CostFile, Prediction

_LINE_SECONDS = 5.0  # between two lines of progress, where there is no terminal
_CLUSTER = Group("Where it runs", sort_key=1)
_REPLAY = Group("One guest", sort_key=2)


def stress(
    spec: Annotated[Path | None, Parameter(help="The fleet, a TOML file.")] = None,
    /,
    *,
    template: Annotated[bool, Parameter(negative="", help="Print a commented spec, to start from.")] = False,
    log: Annotated[
        Path | None, Parameter(help="Where results are kept; SPEC with .log unless given.")
    ] = None,
    resume: Annotated[bool, Parameter(negative="", help="Go on with the log that is there.")] = False,
    fresh: Annotated[bool, Parameter(negative="", help="Begin anew: first results replace the log.")] = False,
    json: Annotated[Path | None, Parameter(help="Write JSON Lines here, a line a guest.")] = None,
    parquet: Annotated[Path | None, Parameter(help="Write Parquet here, a row a guest.")] = None,
    cost: CostOption = None,
    workers: Annotated[
        int,
        Parameter(
            help="Processes on this machine; more than 1 need the extra distributed, as a scheduler does.",
            group=_CLUSTER,
        ),
    ] = 1,
    scheduler: Annotated[
        str | None, Parameter(help="A Dask scheduler's address, tcp:// or tls://.", group=_CLUSTER)
    ] = None,
    tls_ca_file: Annotated[Path | None, Parameter(help="Who signed its certificate.", group=_CLUSTER)] = None,
    tls_cert: Annotated[Path | None, Parameter(help="This side's certificate.", group=_CLUSTER)] = None,
    tls_key: Annotated[Path | None, Parameter(help="Its key.", group=_CLUSTER)] = None,
    patience: Annotated[
        float, Parameter(help="Seconds without any worker, then the run is given up.", group=_CLUSTER)
    ] = 60.0,
    guest: Annotated[int | None, Parameter(help="Run this guest of the fleet alone.", group=_REPLAY)] = None,
    until: Annotated[int | None, Parameter(help="Up to this operation of it.", group=_REPLAY)] = None,
    snapshot: Annotated[SnapshotOption, Parameter(group=_REPLAY)] = None,
) -> int:
    """Run a fleet of guests; every result follows from the spec alone.

    Results are the same for any number of workers, any chunks, and after any number of resumptions. A log
    beside the spec keeps what is done; after a crash, --resume runs what is left.

    Exit status 0: all held; 1: something did not, and which guest and operation show it; 2: a spec, a log or
    a cluster that can't be used.
    """
    from gmemcore.stress.distributed import ClusterError
    from gmemcore.stress.log import LogError
    from gmemcore.stress.spec import SpecError, read
    from gmemcore.stress.spec import template as spec_template
    from gmemcore.stress.summary import MissingExtraError

    if template:
        print(spec_template(), end="")
        return 0
    try:
        if spec is None:
            raise SpecError("a spec is needed; --template prints one to start from")
        fleet, figures = read(spec), read_cost(cost)
        if any(option is not None for option in (guest, until, snapshot)):
            return _replay(spec, fleet, guest, until, snapshot, figures)
        _check_options(resume, fresh, workers, scheduler, (tls_ca_file, tls_cert, tls_key))
        tls = {"tls_ca_file": tls_ca_file, "tls_cert": tls_cert, "tls_key": tls_key}
        runner = _runner(workers, scheduler, patience=patience, **tls)
        return _run(
            *(spec, fleet, log or spec.with_suffix(".log"), resume, fresh, runner, workers, json, parquet),
            figures,
        )
    except (SpecError, LogError, ClusterError, MissingExtraError) as error:
        return _say(str(error), 2)
    except BrokenPipeError:  # whoever reads the report has seen enough
        raise
    except (GmemError, OSError) as error:
        return _say(str(error.strerror or error) + (f": {error.filename}" if error.filename else ""), 2)
    except KeyboardInterrupt:
        return _say("interrupted; --resume goes on from here", 130)


def _say(text: str, status: int = 0) -> int:
    """Print a line, and return an exit status."""
    print(f"gmemcore stress: {text}", file=sys.stderr, flush=True)
    return status


def _check_options(
    resume: bool, fresh: bool, workers: int, scheduler: str | None, tls: tuple[Path | None, ...]
) -> None:
    """Refuse options that don't go together."""
    from gmemcore.stress.spec import SpecError

    if resume and fresh:
        raise SpecError("--resume keeps the log, --fresh lets it go; one of them would be accepted")
    if not 1 <= workers <= 1024:
        raise SpecError(f"--workers {workers}; 1 to 1024 would be accepted")
    if any(tls) and (scheduler is None or not scheduler.startswith("tls://")):
        raise SpecError("TLS files are for a scheduler; --scheduler tls://… would be accepted with them")


def _runner(workers: int, scheduler: str | None, **options: Any) -> "Runner":
    """Who runs the guests: this process, more of this machine, or a cluster."""
    from gmemcore.stress.distributed import Cluster
    from gmemcore.stress.run import serial

    return serial if scheduler is None and workers == 1 else Cluster(workers, scheduler, **options)


def _run(
    path: Path,
    spec: "Spec",
    log: Path,
    resume: bool,
    fresh: bool,
    runner: "Runner",
    workers: int,
    json: Path | None,
    parquet: Path | None,
    figures: "CostFile | None",
) -> int:
    """Run the fleet and report."""
    from gmemcore.benchmark.record import environment
    from gmemcore.stress.run import check_memory, open_log, run
    from gmemcore.stress.summary import import_pyarrow, json_lines, write_parquet

    check_memory(spec, workers)
    with ExitStack() as stack:
        file = None if json is None else stack.enter_context(json.open("w", encoding="utf-8"))
        if parquet is not None:
            import_pyarrow()
        kept = stack.enter_context(open_log(log, spec, resume=resume, fresh=fresh))
        if kept.dropped:
            _say(f"{log}: a torn last record of {kept.dropped} bytes was dropped; its guests are run again")
        with _watching(sys.stderr.isatty()) as watch:
            done = run(spec, log=kept, runner=runner, workers=workers, watch=watch)
        if file is not None:
            file.writelines(f"{line}\n" for line in json_lines(done, environment()))
    if parquet is not None:
        write_parquet(parquet, done)
    _print_report(path, done, figures)
    return 0 if done.violation is None else _print_violation(path, spec, done.violation)


def _replay(
    path: Path,
    spec: "Spec",
    guest: int | None,
    until: int | None,
    snapshot: Path | None,
    figures: "CostFile | None",
) -> int:
    """Run one guest, here."""
    from gmemcore.stress.guest import Violation, run_guest
    from gmemcore.stress.merge import Totals
    from gmemcore.stress.spec import SpecError

    if guest is None:
        option = "--snapshot is the page state" if until is None else "--until is an operation"
        raise SpecError(f"{option} of a guest; --guest says of which")
    if until is not None and until < 0:
        raise SpecError(f"--until {until}; 0 or more would be accepted")
    plan = spec.plan(guest)
    found = run_guest(spec, guest, until=until, watch=_keeping(snapshot, f"guest {guest}"))
    if isinstance(found, Violation):
        return _print_violation(path, spec, found)
    totals = Totals()
    totals.add(found)
    print(f"guest {guest}: {plan.cell}, up to operation {until}" if until else f"guest {guest}: {plan.cell}")
    _print_table({plan.cell: totals}, figures)
    _print_prediction(totals, figures)
    print(f"digest {found.digest}")
    return 0


def _keeping(path: Path | None, label: str) -> "Callable[[VmFace, int], object] | None":
    """What keeps the page state of a guest, if that was asked for."""
    if path is None:
        return None
    from gmemcore.analysis import take

    require_place(path)
    return lambda vm, at: take(vm, at=at + 1, label=label).write(path)


# --- progress -----------------------------------------------------------------------------------------------
@contextmanager
def _watching(terminal: bool) -> "Iterator[Watch]":
    """Show how far it has come: a bar on a terminal, elsewhere a line now and then."""
    if not terminal:
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("guests {task.fields[text]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4) as progress:
        task = progress.add_task("", total=None, text="")

        def watch(run: "Run") -> None:
            progress.update(
                task, total=run.merger.total, completed=len(run.merger.results), text=_progress_text(run)
            )

        yield watch


class _Lines:
    """Prints a line of progress every few seconds."""

    def __init__(self) -> None:
        self._next = time.monotonic() + 1.0

    def __call__(self, run: "Run") -> None:
        """Tell how far it has come, if it is time."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _LINE_SECONDS
            _say(f"{len(run.merger.results)} of {run.merger.total} guests, {_progress_text(run)}")


def _progress_text(run: "Run") -> str:
    """Rate, time left and counters in a line."""
    if not run.operations:
        return "starting" if not run.resumed else f"{run.resumed} of them from the log"
    left = run.seconds_left
    sums = run.merger.all
    refused = sums.operations - sums.outcomes["OK"]
    parts = [
        f"{_big(run.rate)} operations/s",
        "" if left is None else f"{_clock(left)} left",
        f"{_big(sums.counters['pages_changed'])} pages changed",
        f"{_big(refused)} refused",
        f"{_big(sums.checks['oracle'])} repeated by the oracle",
    ]
    return ", ".join(part for part in parts if part)


def _big(figure: float) -> str:
    """Return a number in three digits and a letter."""
    from gmemcore.units import format_number

    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if figure >= unit:
            return f"{format_number(figure / unit)}{letter}"
    return format_number(figure)


def _clock(seconds: float) -> str:
    """Return a time as h:mm:ss, or seconds alone."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


# --- the report ---------------------------------------------------------------------------------------------
_FIGURES = {
    "changed": "pages_changed",
    "allocated": "pages_allocated",
    "RMP": "rmp_updates",
    "S-EPT": "sept_changes",
    "accepted": "pages_accepted",
    "split": "blocks_2m_split",
    "merged": "blocks_2m_merged",
    "faults": "memory_faults",
}
_MEANINGS = {
    "pages": ("changed", "allocated", "RMP", "S-EPT", "accepted"),
    "blocks of 2 MiB": ("split", "merged"),
    "MEMORY_FAULT exits": ("faults",),
}
_WIDE = 120  # columns for a table that no terminal limits


def _print_report(path: Path, run: "Run", figures: "CostFile | None") -> None:
    """Print a table of what guests are and do, then sums."""
    from gmemcore.units import format_size

    spec, sums = run.spec, run.merger.all
    print(f"{path}: {len(run.merger.results)} of {spec.total} guests of {format_size(spec.memory)}")
    shown = _print_table(run.merger.by_cell(), figures)
    print(_legend(shown))
    print(f"checked: {', '.join(f'{sums.checks[name]} {words}' for name, words in _CHECKS.items())}")
    if faults := ", ".join(_fault_words(sums.checks)):
        print(f"injected: {faults}")
    if run.resumed:
        print(f"{run.resumed} guests were in the log")
    if run.operations:
        workers = f" with {run.workers} workers" if run.workers > 1 else ""
        print(f"{_big(run.operations)} operations in {run.elapsed:.1f} s{workers}: {_big(run.rate)} a second")
    _print_prediction(sums, figures)
    print(f"digest {sums.digest}")


_CHECKS = {"oracle": "operations by the oracle", "invariants": "looks at all page state"}
_FAULTS = {
    "allocation_failure": "allocation failures",
    "pin": "pins",
    "poison": "failed pages",
}


def _fault_words(checks: Mapping[str, int]) -> Iterator[str]:
    """How many of the faults that were due were injected and met."""
    for name, words in _FAULTS.items():
        if due := checks.get(f"{name}_due"):
            yield f"{checks.get(f'{name}_met', 0)} of {due} {words}"


def _print_prediction(sums: "Totals", figures: "CostFile | None") -> None:
    """Print what it would take on other hardware, if that was asked for."""
    if figures is not None:
        print(*prediction_lines(_predicted(sums, figures), figures.title), sep="\n")


def _predicted(sums: "Totals", figures: "CostFile") -> "Prediction":
    from gmemcore.workload.cost import predict

    return predict(sums.counters, figures, calls=sums.conversions)


def _legend(shown: Sequence[str]) -> str:
    """Return what the columns that are shown count."""
    lines = ["operations with injected faults and retries"]
    for meaning, names in _MEANINGS.items():
        if own := [name for name in names if name in shown]:
            lines.append(f"{', '.join(own)}: {meaning}")
    return "\n".join(lines)


def _print_table(cells: "dict[str, Totals]", figures: "CostFile | None") -> list[str]:
    """Print the figures of each kind of guest, and what was refused under it; returns the columns shown."""
    names = _columns(cells)
    rows = [_row(sums, names, figures) for sums in cells.values()]
    predicted = () if figures is None else ("predicted",)
    heads = ["number", "operations", "refused", *predicted, *names]
    console = console_for_tables(_WIDE + 11 * len(predicted))
    table = make_table("guests", *heads, right=range(1, len(heads) + 1))
    for cell, row in zip(cells, rows, strict=True):
        table.add_row(cell, *row)
    unbounded = console.options.update(max_width=10_000)
    if console.measure(table, options=unbounded).maximum <= console.width:
        console.print(table)
    else:
        heads = _print_narrow(cells, heads, rows, console.width)
    for cell, sums in cells.items():
        kinds = sorted(name for name in sums.outcomes if name != "OK")
        if kinds:
            print(f"refused, {cell}: {', '.join(f'{sums.outcomes[name]} {name}' for name in kinds)}")
    return heads


def _columns(cells: "dict[str, Totals]") -> list[str]:
    """Return the counters that counted anything."""
    return [name for name, key in _FIGURES.items() if any(sums.counters[key] for sums in cells.values())]


def _row(sums: "Totals", names: Sequence[str], figures: "CostFile | None") -> list[str]:
    """Return the figures of a kind of guest, a text a column."""
    return [
        *map(_big, (sums.guests, sums.operations, sums.operations - sums.outcomes["OK"])),
        *(() if figures is None else (format_time(_predicted(sums, figures).seconds),)),
        *(_big(sums.counters[_FIGURES[name]]) for name in names),
    ]


def _print_narrow(
    cells: "dict[str, Totals]", heads: list[str], rows: list[list[str]], width: int
) -> list[str]:
    """Print a line for what guests are and one for their figures; returns the columns that fit."""
    fitting = len(heads)
    while fitting > 1:
        head, rule, *lines = aligned_lines(heads[:fitting], [row[:fitting] for row in rows])
        if len(rule) <= width:
            break
        fitting -= 1
    print(f"\n{head}\n{rule}")
    for cell, line in zip(cells, lines, strict=True):
        print(f"{cell}\n{line}")
    print()
    if fitting < len(heads):
        print(f"without room: {', '.join(heads[fitting:])}; --json has all of them")
    return heads[:fitting]


def _print_violation(path: Path, spec: "Spec", found: "Violation") -> int:
    """Say what did not hold, and how to see it again."""
    plan = spec.plan(found.guest)
    _say(f"guest {found.guest} ({plan.cell}, key {plan.stream.key:#x}), operation {found.operation}:")
    print(f"  {found.what}", file=sys.stderr)
    print(f"  again: gmemcore stress {path} --guest {found.guest} --until {found.operation}", file=sys.stderr)
    return 1
