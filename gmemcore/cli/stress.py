"""``gmemcore stress``: run fleets of seeded guests, check them, inject faults, and resume after a kill."""

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter
from cyclopts.validators import Number

from gmemcore.cli.console import complain, is_quiet, note, reporting, say_records, working
from gmemcore.cli.options import (
    ForceSwitch,
    JsonSwitch,
    LinesOutput,
    OptionalSeconds,
    ProposalFiles,
    SnapshotOption,
)
from gmemcore.cli.predictions import CostOption, read_cost
from gmemcore.cli.stress_report import print_fleet, print_guest, progress_text
from gmemcore.errors import InputError
from gmemcore.files.writing import check_output, replace_file

if TYPE_CHECKING:
    from gmemcore.machine import VmFace
    from gmemcore.stress.guest import Violation
    from gmemcore.stress.run import Run, Runner, Watch
    from gmemcore.stress.spec import Spec
    from gmemcore.workload.cost import CostFile

_LINE_SECONDS = 5.0  # between two lines of progress, without a terminal
_PATIENCE = 60.0
_RESUME = "--resume continues from"
_RESULTS = Group("Results", sort_key=1)
_WORKERS = Group("Workers", sort_key=2)
_GUEST = Group("One guest", sort_key=3)


@dataclass(frozen=True, slots=True)
class Results:
    """Where results go."""

    log: Annotated[Path | None, Parameter(help="Log of results. [default: SPEC with the suffix .log]")] = None
    resume: Annotated[bool, Parameter(help="Continue with the guests that the log doesn't have.")] = False
    fresh: Annotated[bool, Parameter(help="Start over; the first results replace the log.")] = False
    as_json: Annotated[JsonSwitch, Parameter(help="Print JSON Lines, see docs/outputs.md.")] = False
    output: LinesOutput = None
    parquet: Annotated[Path | None, Parameter(help="Write a Parquet table here, one row per guest.")] = None


@dataclass(frozen=True, slots=True)
class Workers:
    """Where guests run."""

    workers: Annotated[
        int, Parameter(help="Worker processes on this machine.", validator=Number(gte=1, lte=1024))
    ] = 1
    scheduler: Annotated[
        str | None,
        Parameter(help="Dask scheduler whose workers run the guests: tcp://HOST:PORT or tls://HOST:PORT."),
    ] = None
    tls_ca_file: Annotated[
        Path | None, Parameter(help="Certificate of the CA that signed the scheduler's certificate.")
    ] = None
    tls_cert: Annotated[Path | None, Parameter(help="Certificate of this client.")] = None
    tls_key: Annotated[Path | None, Parameter(help="Private key of this client.")] = None
    patience: Annotated[
        OptionalSeconds,
        Parameter(help=f"Give up after this long without a responding worker. [default: {_PATIENCE:g}]"),
    ] = None

    def runner(self) -> "Runner":
        """Return the runner: this process, others on this machine, or a cluster."""
        from gmemcore.stress.distributed import Cluster
        from gmemcore.stress.processes import Processes
        from gmemcore.stress.run import serial

        patience = _PATIENCE if self.patience is None else self.patience
        if self.scheduler is not None:
            return Cluster(self.scheduler, self.tls_ca_file, self.tls_cert, self.tls_key, patience)
        return serial if self.workers == 1 else Processes(self.workers, patience)


@dataclass(frozen=True, slots=True)
class OneGuest:
    """A single guest of the fleet, run in this process."""

    guest: Annotated[
        int | None, Parameter(help="Run only this guest, without a log.", validator=Number(gte=0))
    ] = None
    until: Annotated[
        int | None, Parameter(help="Stop after the operation with this number.", validator=Number(gte=0))
    ] = None
    snapshot: SnapshotOption = None


def stress(
    spec: Annotated[Path, Parameter(help="The fleet: a TOML file, see gmemcore template fleet.")],
    /,
    *,
    proposal: Annotated[
        ProposalFiles,
        Parameter(
            help="TOML file of a proposal, run next to the abis of the fleet that it isn't one of. "
            "Can be repeated."
        ),
    ] = (),
    cost: CostOption = None,
    force: ForceSwitch = False,
    results: Annotated[Results | None, Parameter(name="*", group=_RESULTS)] = None,
    workers: Annotated[Workers | None, Parameter(name="*", group=_WORKERS)] = None,
    one: Annotated[OneGuest | None, Parameter(name="*", group=_GUEST)] = None,
) -> int:
    """Run a fleet of guests, check every one, and inject faults.

    The same spec gives the same results for any number of workers. They are kept in a log next to the spec;
    after an interruption, --resume runs the missing guests.

    Exit status: 0 every check passed; 1 a check failed, and the guest and operation are printed; 2 a spec,
    log, worker or option can't be used.
    """
    results, workers, one = results or Results(), workers or Workers(), one or OneGuest()
    with reporting("stress"):
        from gmemcore.policy.proposal import read_as_written
        from gmemcore.stress.spec import read

        _check_options(results, workers, one, force=force)
        fleet, figures = read(spec, read_as_written(proposal)), read_cost(cost)
        files = (word for path in proposal for word in ("--proposal", str(path)))
        again = shlex.join(["gmemcore", "stress", str(spec), *files])
        if one.guest is not None:
            return _run_guest(again, fleet, one.guest, one, figures, force=force)
        return _run_fleet(spec, again, fleet, results, workers, figures, force=force)


def _check_options(results: Results, workers: Workers, one: OneGuest, *, force: bool) -> None:
    """Refuse options that contradict each other or would have no effect."""
    of_fleet, of_guest = {**_given(results), **_given(workers)}, _given(one)
    given = of_fleet | of_guest
    has_workers = workers.workers > 1 or workers.scheduler is not None
    has_tls = (workers.scheduler or "").startswith("tls://")
    for wrong, message in (
        ("--guest" in given and of_fleet, f"--guest runs one guest here, without {', '.join(of_fleet)}"),
        ("--guest" not in given and of_guest, f"{', '.join(of_guest)} needs --guest"),
        (results.resume and results.fresh, "--resume keeps the log and --fresh replaces it; use one of them"),
        (workers.workers > 1 and workers.scheduler, "--workers and --scheduler exclude each other"),
        (
            not has_tls and any("--tls" in name for name in given),
            "TLS files need --scheduler tls://HOST:PORT",
        ),
        (not has_workers and "--patience" in given, "--patience needs --workers or --scheduler"),
        (
            force and not {"--output", "--parquet", "--snapshot"} & given.keys(),
            "--force needs a file: -o, --parquet or --snapshot; --fresh replaces the log",
        ),
    ):
        if wrong:
            raise InputError(message)


def _given(options: Results | Workers | OneGuest) -> dict[str, object]:
    """Return the options of a group that differ from their defaults, by name."""
    values = {field.name: (getattr(options, field.name), field.default) for field in fields(options)}
    return {
        f"--{name.removeprefix('as_').replace('_', '-')}": value
        for name, (value, default) in values.items()
        if value != default
    }


# ---- a fleet -----------------------------------------------------------------------------------------------
def _run_fleet(
    path: Path,
    again: str,
    spec: "Spec",
    results: Results,
    workers: Workers,
    figures: "CostFile | None",
    *,
    force: bool,
) -> int:
    """Run a fleet, write its results and report."""
    from gmemcore.stress.summary import json_lines, write_parquet
    from gmemcore.workload.parquet import import_pyarrow

    for place in (results.output, results.parquet):
        if place is not None:
            check_output(place, force=force)
    if results.parquet is not None:
        import_pyarrow()
    done = _run_with_log(path, spec, results, workers)
    if results.output is not None:
        replace_file(results.output, json_lines(done))
    if results.parquet is not None:
        write_parquet(results.parquet, done)
    if results.as_json:
        say_records(json_lines(done))
    else:
        print_fleet(path, done, figures)
    return 0 if done.violation is None else _print_violation(again, spec, done.violation)


def _run_with_log(path: Path, spec: "Spec", results: Results, workers: Workers) -> "Run":
    """Run the guests that the log doesn't have."""
    from gmemcore.stress.link import ClusterError
    from gmemcore.stress.merge import NotDeterministicError
    from gmemcore.stress.run import check_memory, open_log, run

    runner = workers.runner()
    if (workers.scheduler or "").startswith("tcp://"):
        complain(
            "stress",
            "warning: tcp:// is neither encrypted nor authenticated: whoever reaches the scheduler or a "
            "worker can run code there; use tls://",
        )
    check_memory(spec, workers.workers)
    log = path.with_suffix(".log") if results.log is None else results.log
    with open_log(log, spec, resume=results.resume, fresh=results.fresh) as kept:
        if kept.dropped:
            note("stress", f"{log}: dropped an incomplete last record; its guests run again")
        said = reporting(
            "stress", interrupted=f"interrupted; {_RESUME} {log}", wrong=(NotDeterministicError,)
        )
        with said, _watching() as watch:
            try:
                return run(spec, log=kept, runner=runner, workers=workers.workers, watch=watch)
            except ClusterError as error:
                raise ClusterError(f"{error}; {_RESUME} {log}") from error


@contextmanager
def _watching() -> "Iterator[Watch]":
    """Show progress: a bar on a terminal, elsewhere a line every few seconds."""
    if is_quiet():
        yield lambda run: None
        return
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("guests {task.fields[text]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4) as progress:
        task = progress.add_task("", total=None, text="")

        def watch(run: "Run") -> None:
            progress.update(
                task, total=run.merger.total, completed=len(run.merger.results), text=progress_text(run)
            )

        yield watch


class _Lines:
    """Prints a line of progress every few seconds."""

    def __init__(self) -> None:
        self._next = time.monotonic() + 1.0

    def __call__(self, run: "Run") -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _LINE_SECONDS
            note(
                "stress", f"{len(run.merger.results):,} of {run.merger.total:,} guests, {progress_text(run)}"
            )


# ---- one guest ---------------------------------------------------------------------------------------------
def _run_guest(
    again: str, spec: "Spec", number: int, one: OneGuest, figures: "CostFile | None", *, force: bool
) -> int:
    """Run one guest here and report."""
    from gmemcore.stress.guest import Violation, run_guest

    plan = spec.plan(number)
    watch = _keeping(one.snapshot, f"guest {number}", force=force)
    with working("stress"):
        found = run_guest(spec, number, until=one.until, watch=watch)
    if isinstance(found, Violation):
        return _print_violation(again, spec, found)
    print_guest(plan, one.until, found, figures)
    return 0


def _keeping(path: Path | None, label: str, *, force: bool) -> "Callable[[VmFace, int], object] | None":
    """Return a function that writes a guest's page state to a file; None without a file."""
    if path is None:
        return None
    from gmemcore.analysis import take

    check_output(path, force=force)
    return lambda vm, at: take(vm, at=at + 1, label=label).write(path)


def _print_violation(again: str, spec: "Spec", found: "Violation") -> int:
    """Print a violation and the command that reproduces it; returns the exit status."""
    plan = spec.plan(found.guest)
    complain(
        "stress",
        f"guest {found.guest} ({plan.cell}, key {plan.stream.key:#x}), operation {found.operation}:\n"
        f"  {found.what}\n"
        f"  again: {again} --guest {found.guest} --until {found.operation}",
    )
    return 1
