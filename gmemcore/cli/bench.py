"""``gmemcore bench``: what every cell of policy costs, next to the memory primitives of the same run."""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

from cyclopts import Parameter

from gmemcore.errors import GmemError
from gmemcore.uapi import PAGE_SIZE, Direction, Phase
from gmemcore.units import format_number, format_ratio, format_size, format_time, parse_size, parse_sizes

if TYPE_CHECKING:
    from gmemcore.benchmark import Case
    from gmemcore.benchmark.primitives import Primitives
    from gmemcore.benchmark.run import Bench, Result

_QUICK_MEMORY = "64m"
_USUAL_MEMORY = "1g"
_WIDE = 240  # columns for a table that no terminal limits
_COUNTERS_FROM = 150  # columns of a terminal that has room for the counters


def bench(
    *,
    abi: Annotated[str | None, Parameter(help="One revision or proposal, see gmemcore policy.")] = None,
    vm_type: Annotated[str | None, Parameter(help="One VM type.")] = None,
    firmware: Annotated[str | None, Parameter(help="today or cipher.")] = None,
    memory: Annotated[str | None, Parameter(help=f"Guest memory; {_USUAL_MEMORY} unless given.")] = None,
    range_: Annotated[
        str | None, Parameter(name="--range", help="Sizes of one conversion; 4k,2m and all of the memory.")
    ] = None,
    json: Annotated[Path | None, Parameter(help="Write JSON Lines here, a line a cell.")] = None,
    quick: Annotated[
        bool,
        Parameter(negative="", help=f"Fewer samples, {_QUICK_MEMORY} of memory: a look, not a measurement."),
    ] = False,
    backing: Annotated[str, Parameter(help="anonymous (huge pages) or memfd.")] = "anonymous",
) -> int:
    """Measure conversions: VM type by phase by direction by flag, at several sizes, every byte verified.

    Without a selection: v5 with today's firmware, two-caps with the cipher firmware, and legacy.

    Exit status 0: all measured; 1: a byte was not what it must be; 2: options that can't be used.
    """
    from gmemcore.benchmark import table
    from gmemcore.benchmark.contents import WrongContentsError

    began = time.monotonic()
    try:
        size = parse_size(memory or (_QUICK_MEMORY if quick else _USUAL_MEMORY))
        ranges = None if range_ is None else parse_sizes(range_)
        cases = table(abi, vm_type, firmware, memory=size, ranges=ranges)
        with nullcontext() if json is None else json.open("w", encoding="utf-8") as file:
            runner, results = _run(cases, backing, quick, file)
    except WrongContentsError as error:
        print(f"gmemcore bench: wrong contents: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("gmemcore bench: interrupted; the JSON file has what was done", file=sys.stderr)
        return 130
    except (GmemError, OSError) as error:
        print(f"gmemcore bench: {error.strerror or error}", file=sys.stderr)
        return 2
    _print_report(runner.primitives, results, time.monotonic() - began)
    return 0


def _run(
    cases: "Sequence[Case]", backing: str, quick: bool, file: TextIO | None
) -> "tuple[Bench, list[Result]]":
    """Run all cases, a line into the file as soon as each is done."""
    from gmemcore.benchmark.memory import Memory
    from gmemcore.benchmark.primitives import BUFFER, Primitives
    from gmemcore.benchmark.record import cell_line, first_line
    from gmemcore.benchmark.run import QUICK, USUAL, Bench, memory_needed
    from gmemcore.engine import warmup
    from gmemcore.engine.host import check_available

    check_available(memory_needed(cases))
    _say("compiling, allocating and warming memory, timing the primitives")
    warmup()
    size = cases[0].memory
    runner = Bench(Memory(size, backing), Primitives(min(size, BUFFER)), QUICK if quick else USUAL)
    if file is not None:
        settings = {"backing": backing, "quick": quick, "seed": runner.reference.seed, "argv": sys.argv[1:]}
        print(first_line(runner.primitives, settings), file=file, flush=True)
    results = []
    for result in _with_progress(cases, runner.results(cases)):
        results.append(result)
        if file is not None:
            print(cell_line(result), file=file, flush=True)
    return runner, results


# --- progress -----------------------------------------------------------------------------------------------
def _say(text: str) -> None:
    """Print a line of progress."""
    print(f"gmemcore bench: {text}", file=sys.stderr, flush=True)


def _with_progress(cases: "Sequence[Case]", results: "Iterator[Result]") -> "Iterator[Result]":
    """Show how far it has come: a bar on a terminal, elsewhere a line for every VM type."""
    return _with_bar(cases, results) if sys.stderr.isatty() else _with_lines(cases, results)


def _with_bar(cases: "Sequence[Case]", results: "Iterator[Result]") -> "Iterator[Result]":
    from rich.console import Console
    from rich.progress import track

    named = ((case, result) for case, result in zip(cases, results, strict=True))
    for _, result in track(
        named, "gmemcore bench", total=len(cases), console=Console(stderr=True), transient=True
    ):
        yield result


def _with_lines(cases: "Sequence[Case]", results: "Iterator[Result]") -> "Iterator[Result]":
    began, done = time.monotonic(), 0
    for (abi, vm_type), group in groupby(cases, key=lambda case: (case.key.abi, case.key.vm_type)):
        taken = time.monotonic() - began
        _say(f"{taken:3.0f} s, {done} of {len(cases)} cases done; now {abi} {vm_type}")
        for _ in group:
            yield next(results)
            done += 1


# --- the report ---------------------------------------------------------------------------------------------
_COLUMNS: "dict[str, Literal['left', 'right']]" = {
    "VM type": "left",
    "phase": "left",
    "direction": "left",
    "flag": "left",
    "outcome": "left",
    "range": "right",
    "bytes": "left",
    "convert": "right",
    "p95": "right",
    "cv": "right",
    "n": "right",
    "populate": "right",
    "access": "right",
    "ratio": "left",
    "counters of a range": "left",
}
_WORDS = {Direction.TO_PRIVATE: "to private", Direction.TO_SHARED: "to shared"}
_LEGEND = """\
convert   the conversion itself: GB/s where it moves bytes, else the time of a call (legacy: with the discard)
populate  GB/s: launch update in place (PRESERVE) or from a source, before launch; legacy: copying across
access    GB/s: the new side accepts where it must, and reads everything
ratio     speed of the step that moves the bytes over that of the primitive named, measured in turn with it
range     all: the whole memory; +hole: pages that nobody has touched before
GB = 1e9 bytes of guest memory, counted once. Ranges below the whole are converted in batches, neighbours in
turn; populate, access and all of legacy take a call a range, which is what they cost at 4k. ENCRYPT and
DECRYPT are a key stream at the speed of XOR: a cost model, not encryption."""


def _print_report(primitives: "Primitives", results: "Sequence[Result]", seconds: float) -> None:
    """Print the primitives, a table a revision, and what to think of it all."""
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=_WIDE)
    print(
        f"memory {format_size(results[0].case.memory)}, one thread; "
        f"primitives over {format_size(primitives.size)}:"
    )
    for name, speed in primitives.gbps().items():
        print(f"  {name:7} {format_number(speed):>5} GB/s  (the best is {primitives.names[name]})")
    by_abi = groupby(results, key=lambda result: (result.case.key.abi, result.case.key.firmware))
    for (abi, firmware), group in by_abi:
        own = list(group)
        print(f"\n{abi}, firmware {firmware}: {own[0].case.abi.title}")
        if any(not result.case.refused for result in own):
            measured = [result for result in own if not result.case.refused]
            console.print(_table(measured, with_counters=console.width >= _COUNTERS_FROM))
        _print_refused([result.case for result in own if result.case.refused])
    print(f"\n{_LEGEND}")
    _print_summary(results, seconds)


def _table(results: "Iterable[Result]", *, with_counters: bool) -> Any:
    """Return the table of the cells that aren't refused."""
    from rich import box
    from rich.table import Table

    lines = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    columns = list(_COLUMNS.items())[: None if with_counters else -1]
    for name, justify in columns:
        lines.add_column(name, justify=justify, no_wrap=True)
    before: tuple[str, ...] = ("",) * 5
    for result in results:
        label = _label(result.case)
        # Words that repeat are left out, as long as all before them repeat too.
        first = next((i for i, (own, other) in enumerate(zip(label, before, strict=True)) if own != other), 5)
        texts = [*[""] * first, *label[first:], *_figures(result)]
        lines.add_row(*texts[: len(columns)])
        before = label
    return lines


def _label(case: "Case") -> tuple[str, ...]:
    """Return the cell's name, a word a column."""
    key = case.key
    return key.vm_type, key.phase, _WORDS[key.direction], case.flag_name, f"OK {case.cell.effect}"


def _figures(result: "Result") -> list[str]:
    """Return the figures of a result, a text a column."""
    case, seconds = result.case, result.seconds
    assert seconds is not None
    size = "all" if case.range == case.memory else format_size(case.range)
    return [
        size if case.pages_allocated_before else f"{size}+hole",
        case.bytes,
        format_time(seconds.median)
        if result.convert_gbps is None
        else f"{format_number(result.convert_gbps)} GB/s",
        format_time(seconds.p95),
        f"{seconds.cv:.0%}{'~' if seconds.noisy else ' '}",
        str(seconds.n),
        *(format_number(speed) for speed in (result.transfer_gbps, result.first_access_gbps)),
        "" if result.ratio is None else f"{format_ratio(result.ratio)} {case.primitive}",
        _events(result),
    ]


def _events(result: "Result") -> str:
    """Return the counters that counted anything, in few words; bytes as sizes."""
    words = {
        "rmp_updates": "rmp",
        "sept_changes": "sept",
        "blocks_2m_split": "split",
        "blocks_2m_merged": "merged",
    }
    parts = []
    for name, figure in result.counters.asdict().items():
        if figure:
            value = (
                format_size(figure) if name.startswith("bytes_") and figure % PAGE_SIZE == 0 else str(figure)
            )
            parts.append(f"{words.get(name, name.removeprefix('pages_').removeprefix('bytes_'))} {value}")
    return ", ".join(parts)


# --- refused cells ------------------------------------------------------------------------------------------
def _print_refused(cases: "Sequence[Case]") -> None:
    """Print what is refused, a line a VM type; VM types that refuse alike share theirs."""
    lines: dict[str, list[str]] = defaultdict(list)
    for vm_type, group in groupby(cases, key=lambda case: case.key.vm_type):
        lines[_refusals(list(group))].append(vm_type)
    for text, vm_types in lines.items():
        print(f"refused, {', '.join(vm_types)}: {text}")


def _refusals(cases: "Sequence[Case]") -> str:
    """Return the refusals of one VM type in words, by errno and flag."""
    by_outcome: dict[str, dict[str, list[Case]]] = defaultdict(lambda: defaultdict(list))
    for case in cases:
        by_outcome[case.cell.outcome][case.flag_name].append(case)
    return "; ".join(
        f"{outcome} {', '.join(f'{flag}{_where(group)}' for flag, group in by_flag.items())}"
        for outcome, by_flag in sorted(by_outcome.items(), reverse=True)
    )


def _where(cases: "Sequence[Case]") -> str:
    """Return directions and phases in words; nothing if they are all."""
    if len(cases) == len(Direction) * len(Phase):
        return ""
    parts = []
    for direction, group in groupby(
        sorted(cases, key=lambda case: case.key.direction), lambda c: c.key.direction
    ):
        phases = [case.key.phase.value for case in group]
        parts.append(_WORDS[direction] + ("" if len(phases) == len(Phase) else f" {phases[0]}"))
    return f" ({' and '.join(parts)})"


def _print_summary(results: "Sequence[Result]", seconds: float) -> None:
    """Print how much was done, and how far to trust it."""
    refused = sum(result.case.refused for result in results)
    verified = sum(result.verified_bytes for result in results) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(
        f"{len(results) - refused} cases measured, {refused} refused as they must be; {verified:.1f} GB "
        f"compared byte by byte; {seconds:.0f} s, peak memory {peak / 1e9:.2f} GB"
    )
    noisy = sum(result.seconds is not None and result.seconds.noisy for result in results)
    if noisy:
        print(
            f"cv is above 10 % in {noisy} cases (~): "
            "trust their ratios before their times, or a quieter machine"
        )
