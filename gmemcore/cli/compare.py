"""``gmemcore compare``: why in place, as figures: time, memory and page faults beside two backings."""

import json as json_
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

from cyclopts import Parameter
from cyclopts.types import PositiveInt

from gmemcore.cli.common import complaint
from gmemcore.errors import GmemError, UnsupportedOperationError
from gmemcore.units import format_number, format_ratio, format_size, format_time, parse_size

if TYPE_CHECKING:
    from gmemcore.benchmark.in_place import Job, Measured

_USUAL: "tuple[tuple[str, str], ...]" = (("launch", "SNP"), ("round trip", "SNP"), ("round trip", "PKVM"))
_LEGEND = """\
A guest's memory goes to the other side range by range, and all that was written must be read there:
every byte is. In place: a conversion (and launch update) that preserves. legacy: the attribute, a
copy across, and the old side discarded, or kept. Each way ran in processes of its own, in turn.
time      of all memory to the other side, median; x: time of a run over that of in place, paired
peak      resident memory at its highest (VmHWM), over what the process had before the guest
faults    page faults within that time: memory that had to be allocated first, or again"""


def compare(
    *,
    vm_type: Annotated[str | None, Parameter(help="One VM type, both works; else SNP and PKVM.")] = None,
    memory: Annotated[str, Parameter(help="Guest memory.")] = "512m",
    range_: Annotated[str, Parameter(name="--range", help="Bytes of one conversion.")] = "2m",
    rounds: Annotated[PositiveInt, Parameter(help="Ways there and back in a run.")] = 2,
    pairs: Annotated[PositiveInt, Parameter(help="Runs of each way.")] = 3,
    backing: Annotated[str, Parameter(help="anonymous (huge pages), memfd or guest_memfd.")] = "anonymous",
    json: Annotated[Path | None, Parameter(help="Write JSON Lines here, a line a run.")] = None,
    plot: Annotated[Path | None, Parameter(help="Draw memory over time here (analysis extra).")] = None,
) -> int:
    """Compare conversion in place with two backings: what the same work takes in time and memory.

    Exit status 0: all measured; 1: the new side didn't read what was written; 2: options that can't be used.
    """
    from gmemcore.benchmark.contents import WrongContentsError

    try:
        listed = _jobs(vm_type, parse_size(memory), parse_size(range_), rounds, backing)
        draw = _picture_writer(plot)
        with nullcontext() if json is None else json.open("w", encoding="utf-8") as file:
            results = _run(listed, pairs, file)
        draw(results)
    except WrongContentsError as error:
        print(f"gmemcore compare: wrong contents: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("gmemcore compare: interrupted; the JSON file has what was done", file=sys.stderr)
        return 130
    except (GmemError, OSError) as error:
        print(f"gmemcore compare: {complaint(error)}", file=sys.stderr)
        return 2
    _print_report(results)
    return 0


def _jobs(vm_type: str | None, memory: int, range_: int, rounds: int, backing: str) -> "list[list[Job]]":
    """Return the works, each as its ways; refused where this host can't have them."""
    from gmemcore.benchmark.axes import settings
    from gmemcore.benchmark.in_place import WORKS, jobs
    from gmemcore.benchmark.memory import check_host
    from gmemcore.engine.host import check_available

    check_host(settings((backing,)))
    check_available(2 * memory)
    if vm_type is None:
        return [jobs(work, each, memory, range_, rounds, backing) for work, each in _USUAL]
    found = []
    for work in WORKS:
        try:
            found.append(jobs(work, vm_type, memory, range_, rounds, backing))
        except UnsupportedOperationError as error:
            _say(f"left out: {error.strerror}")
    if not found:
        raise UnsupportedOperationError(f"{vm_type} has no work whose contents some revision preserves")
    return found


def _run(listed: "list[list[Job]]", pairs: int, file: TextIO | None) -> "list[dict[Job, list[Measured]]]":
    """Run every way of every work, in turn; a line into the file as soon as each is done."""
    from gmemcore.benchmark.in_place import run_apart
    from gmemcore.benchmark.record import environment

    if file is not None:
        print(json_.dumps({"environment": environment(), "comparison": "in place"}), file=file, flush=True)
    results = []
    for ways in listed:
        taken: dict[Job, list[Measured]] = {job: [] for job in ways}
        for number in range(pairs):
            for job in ways:
                _say(f"{job.work}, {job.vm_type}, {job.way}: run {number + 1} of {pairs}")
                measured = run_apart(job)
                taken[job].append(measured)
                if file is not None:
                    print(json_.dumps(asdict(job) | {"measured": asdict(measured)}), file=file, flush=True)
        results.append(taken)
    return results


def _picture_writer(path: Path | None) -> "Callable[[list[dict[Job, list[Measured]]]], None]":
    """Return what draws results into a file; whether it can is found out before anything is measured."""
    if path is None:
        return lambda results: None
    from gmemcore.cli.pictures import require_picture

    require_picture(path)

    def write(results: "list[dict[Job, list[Measured]]]") -> None:
        from gmemcore.analysis.pictures import memory_of_ways

        works = {
            f"{first.work}, {first.vm_type}": {
                job.way: [(at, int(size)) for at, size in runs[0].memory] for job, runs in taken.items()
            }
            for taken in results
            for first in [next(iter(taken))]
        }
        memory_of_ways(works, next(iter(results[0])).memory).savefig(path, dpi=150)

    return write


def _say(text: str) -> None:
    """Print a line of progress."""
    print(f"gmemcore compare: {text}", file=sys.stderr, flush=True)


# --- the report ---------------------------------------------------------------------------------------------
def _print_report(results: "Sequence[dict[Job, list[Measured]]]") -> None:
    """Print a table of all ways, works as headings, and the series' reason in a sentence a work."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("way", "revision"):
        table.add_column(name, no_wrap=True)
    for name in ("time", "GB/s", "x", "peak", "x guest", "faults"):
        table.add_column(name, justify="right", no_wrap=True)
    for taken in results:
        job = next(iter(taken))
        table.add_row(f"[bold]{job.work}, {job.vm_type}[/bold]")
        for row in _rows(taken):
            table.add_row(*row)
        table.add_section()
    first = next(iter(results[0]))
    print(f"memory {format_size(first.memory)}, ranges of {format_size(first.range)}, {first.backing}")
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    for taken in results:
        print(_sentence(taken))
    print(f"\n{_LEGEND}")


def _rows(taken: "dict[Job, list[Measured]]") -> Iterator[list[str]]:
    """Yield the row of each way."""
    from gmemcore.benchmark.summary import quantile

    for job, runs in taken.items():
        seconds = quantile([leg for run in runs for leg in run.seconds], 0.5)
        peak = quantile([run.peak_bytes for run in runs], 0.5)
        ratio = _times_in_place(taken, job)
        yield [
            job.way,
            f"{job.abi}, {job.firmware}",
            format_time(seconds),
            format_number(job.memory / seconds / 1e9),
            format_ratio(ratio) if ratio < 100 else format_number(ratio),
            f"{format_number(peak / (1 << 20))} MiB",
            format_ratio(peak / job.memory),
            format_number(quantile([run.faults for run in runs], 0.5)),
        ]


def _times_in_place(taken: "dict[Job, list[Measured]]", job: "Job") -> float:
    """Return a way's time over that of in place, the median of the pairs."""
    from gmemcore.benchmark.pairs import ratio

    in_place = next(iter(taken))
    seconds = {way.way: [sum(run.seconds) for run in runs] for way, runs in taken.items()}
    return ratio(seconds, job.way, in_place.way).median


def _sentence(taken: "dict[Job, list[Measured]]") -> str:
    """Return what in place saves, in words."""
    from gmemcore.benchmark.summary import quantile

    in_place, discarding, keeping = taken
    peaks = {job: quantile([run.peak_bytes for run in runs], 0.5) for job, runs in taken.items()}
    saved = [
        f"{in_place.work}, {in_place.vm_type}: in place takes",
        f"{peaks[in_place] / peaks[keeping]:.2f} x the memory of keeping both sides;",
        f"discarding one takes {format_number(_times_in_place(taken, discarding))} x its time,",
        f"keeping both {format_number(_times_in_place(taken, keeping))} x",
    ]
    return " ".join(saved)
