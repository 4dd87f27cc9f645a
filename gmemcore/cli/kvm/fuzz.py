"""``gmemcore kvm fuzz``: random walks on the model and on the host's kernel, until they differ."""

import json
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from gmemcore.cli.console import note, progress, reporting, say, say_json, say_lines
from gmemcore.cli.kvm.common import counted_lines, vm_types_of
from gmemcore.cli.options import JsonSwitch, OptionalSeconds, Seed, VmTypeOption, one, whole
from gmemcore.cli.tables import print_table
from gmemcore.units import counted

if TYPE_CHECKING:
    from gmemcore.fuzz import Report
    from gmemcore.kvm import Host

SECONDS = 60.0
_SHOWN = 64  # characters of bytes


def fuzz(
    *,
    steps: Annotated[int | None, Parameter(help="Run this many steps.", converter=one(whole(1)))] = None,
    seconds: Annotated[
        OptionalSeconds, Parameter(help="Run for this long. [default: 60, without --steps]")
    ] = None,
    seed: Annotated[Seed, Parameter(help="Seed of the walks.")] = 0,
    vm_type: Annotated[
        VmTypeOption, Parameter(help="Walk on this VM type. [default: all that the host offers, in turn]")
    ] = None,
    folder: Annotated[Path, Parameter(help="Folder for the current walk and for a difference.")] = Path(
        "kvm-fuzz"
    ),
    as_json: JsonSwitch = False,
) -> int:
    """Run random walks on the host's kernel and on the model, and stop at the first difference.

    Walks contain what the host offers: files, memslots, host and guest accesses, conversions, pins. A
    difference is shrunk to the fewest steps and written as a vector file with both answers. Known
    differences of kernels are counted. Each walk is written to --folder before it runs, so it is still there
    if the host crashes, and gmemcore kvm conform can run it again. Ctrl-C ends the run, and what was seen is
    printed.

    Exit status 0: no difference; 1: one was found; 2: no KVM, or nothing to walk on.
    """
    from gmemcore.engine import warmup
    from gmemcore.fuzz import Limits
    from gmemcore.fuzz import fuzz as fuzz_host
    from gmemcore.kvm import KernelTransport
    from gmemcore.kvm import probe as probe_host

    if steps is None and seconds is None:
        seconds = SECONDS
    seen: list[Report] = []  # empty until a walk ended
    try:
        with (
            reporting("kvm fuzz"),
            KernelTransport() as transport,
            progress("kvm fuzz", *_extent(steps, seconds)) as show,
        ):
            host = probe_host(transport)
            kinds = vm_types_of(host, vm_type)

            def after_walk(report: "Report") -> None:
                seen[:] = [report]
                show(report.steps if seconds is None else int(report.seconds))
                if report.finding is not None:
                    note("kvm fuzz", f"a difference, written to {report.path}; shrinking it")

            warmup()  # compiling, once per machine, takes longer than many a run
            fuzz_host(
                transport,
                host,
                limits=Limits(steps, seconds),
                folder=folder,
                seed=seed,
                vm_types=kinds,
                progress=after_walk,
            )
    finally:  # after Ctrl-C, too
        for report in seen:
            if as_json:
                say_json(_record(report, host))
            else:
                _print(report)
    return int(seen[0].finding is not None)


def _extent(steps: int | None, seconds: float | None) -> tuple[int | None, str]:
    """How long a run is, by its clock if it has one."""
    return (steps, "steps") if seconds is None else (ceil(seconds), "seconds")


def _rate(report: "Report") -> float:
    return report.steps / report.seconds if report.seconds else 0.0


def _print(report: "Report") -> None:
    if report.left_over is not None:
        say(f"An earlier run didn't end. To run its last walk again: gmemcore kvm conform {report.left_over}")
    _print_coverage(report)
    say()
    say_lines(counted_lines("known", report.reasons))
    found = "no difference" if report.finding is None else "a difference"
    say(
        f"{counted(report.steps, 'step')} in {counted(report.walks, 'walk')} on Linux {report.release}, "
        f"seed {report.seed}: {found}"
    )
    say(f"{_rate(report):,.0f} steps per second; {report.known.total():,} answers known to differ")
    if report.finding is not None:
        say("", report.finding.sentences(report.release))
        for number, step in enumerate(report.walk):
            say(f"  {number} {_short(step)}")
        say(f"Written to {report.path}")


def _short(step: dict[str, Any]) -> str:
    """A step in a line; long bytes are in the file."""
    shown = {
        name: f"{value[:_SHOWN]}... ({len(value) // 2} bytes)"
        if isinstance(value, str) and len(value) > _SHOWN
        else value
        for name, value in step.items()
    }
    return json.dumps(shown)


def _print_coverage(report: "Report") -> None:
    """Print the outcomes of each operation, how often they were seen, and those that could be and weren't."""
    seen: dict[tuple[str, str], list[str]] = {}
    unseen: dict[tuple[str, str], list[str]] = {}
    for vm_type, op, outcome, count in report.coverage.rows():
        seen.setdefault((vm_type, op), [])
        if count:
            seen[vm_type, op].append(f"{outcome} {count:,}")
        else:
            unseen.setdefault((vm_type, op), []).append(outcome)
    rows = [(*key, ", ".join(outcomes), ", ".join(unseen.get(key, ()))) for key, outcomes in seen.items()]
    print_table(("VM type", "operation", "seen", "not seen"), rows, labels=1)


def _record(report: "Report", host: "Host") -> dict[str, Any]:
    finding = report.finding
    return {
        "kernel": report.release,
        "seed": report.seed,
        "steps": report.steps,
        "walks": report.walks,
        "seconds": report.seconds,
        "offers": [asdict(offer) for offer in host.offers.values()],
        "coverage": [
            {"vm_type": vm_type, "op": op, "outcome": outcome, "count": count}
            for vm_type, op, outcome, count in report.coverage.rows()
        ],
        "known": [
            {"vm_type": vm_type, "op": row.op, "model": row.written, "kernel": row.found, "why": row.why}
            | {"count": count}
            for (vm_type, row), count in report.known.most_common()
        ],
        "left_over": None if report.left_over is None else str(report.left_over),
        "difference": None
        if finding is None
        else {
            "sentences": finding.sentences(report.release),
            "what": finding.what,
            "steps": report.walk,
            "file": str(report.path),
        },
    }
