"""What ``gmemcore bench`` prints: the primitives, a table a revision, refusals, how far to trust it all."""

import resource
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from gmemcore.cli.common import aligned_lines
from gmemcore.cli.predictions import not_priced
from gmemcore.uapi import PAGE_SIZE, Direction, Phase
from gmemcore.units import format_number, format_ratio, format_size, format_time

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from gmemcore.benchmark import Case
    from gmemcore.benchmark.axes import Setting
    from gmemcore.benchmark.primitives import Primitives
    from gmemcore.benchmark.run import Result
    from gmemcore.workload.cost import CostFile

_WIDE = 240  # columns for a table that no terminal limits
_LABELS = 5  # columns that say which cell it is

_COLUMNS: "dict[str, Literal['left', 'right']]" = {
    "VM type": "left",
    "phase": "left",
    "direction": "left",
    "flag": "left",
    "outcome": "left",
    "range": "right",
    "pages": "left",
    "bytes": "left",
    "convert": "right",
    "p95": "right",
    "cv": "right",
    "n": "right",
    "populate": "right",
    "access": "right",
    "ratio": "left",
    "predicted": "right",
    "counters of a range": "left",
}
_WORDS = {Direction.TO_PRIVATE: "to private", Direction.TO_SHARED: "to shared"}
_LEGEND = """\
convert   GB/s where the conversion moves bytes, else the time of a call (legacy: with the discard)
populate  GB/s: launch update in place (PRESERVE) or from a source; legacy: copying across
access    GB/s: the new side accepts where it must, and reads everything
ratio     speed of the step that moves bytes over the primitive's that is named, measured in turn
range     all: the whole memory; +hole: pages that nobody has touched before
pages     how their state alternates, see --axes-template; GB/s are of bytes that the step touches
n         samples, of 50 ms where time allows; =: those of the first row that does the same
GB = 1e9 bytes of guest memory, counted once. Ranges below the whole are converted in batches,
neighbours in turn; populate, access and all of legacy take a call a range, which is what they cost
at 4k. ENCRYPT and DECRYPT are a key stream at the speed of XOR: a cost model, not encryption."""


def print_report(
    primitives: "Primitives", results: "Sequence[Result]", seconds: float, cost: "CostFile | None" = None
) -> None:
    """Print the primitives, a table a revision, and what to think of it all; cost: for predicted times."""
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=_WIDE)
    first = results[0].case
    print(f"memory {format_size(first.memory)}, {first.setting}")
    print(f"primitives over {format_size(primitives.size)}:")
    for name, speed in primitives.gbps().items():
        print(f"  {name:7} {format_number(speed):>5} GB/s  (the best is {primitives.names[name]})")
    columns = _columns(console, results, cost)
    for (setting, abi, firmware), group in groupby(results, key=_heading):
        own = list(group)
        print(f"\n{abi}, firmware {firmware}: {own[0].case.abi.title}{_apart(setting, first.setting)}")
        measured = [result for result in own if not result.case.refused]
        if measured and columns:
            console.print(_table(measured, cost, columns))
        elif measured:
            _print_narrow(measured, cost)
        _print_refused([result.case for result in own if result.case.refused])
    print(f"\n{_legend(results)}")
    if "counters of a range" not in columns:
        print("Counters of a range are shown where there is room, and written by --json.")
    if cost is not None:
        print(_legend_of_cost(results, cost))
    _print_summary(results, seconds)


def _heading(result: "Result") -> "tuple[Setting, str, str]":
    """Return what a table is about."""
    key = result.case.key
    return result.case.setting, key.abi, key.firmware


def _apart(setting: "Setting", first: "Setting") -> str:
    """Return a setting in words where it isn't the one that the report begins with."""
    return "" if setting == first else f"; {setting}"


def _legend(results: "Sequence[Result]") -> str:
    """Return what the columns are, without those that no table has."""
    hidden = _always_hidden(results, None)
    return "\n".join(line for line in _LEGEND.splitlines() if line.split()[0] not in hidden)


def _legend_of_cost(results: "Sequence[Result]", cost: "CostFile") -> str:
    """Return what the predicted times are, and which events they are short of."""
    from gmemcore.workload.cost import predict

    total: Counter[str] = Counter()
    for result in results:
        if not result.case.refused:
            total.update(predict(result.counters, cost, calls=1).not_priced)
    legend = f"predicted conversion of one range, with its populate or accept, by {cost.title!r}"
    return f"{legend}; {not_priced(total)}" if total else legend


# --- tables -------------------------------------------------------------------------------------------------
def _always_hidden(results: "Sequence[Result]", cost: "CostFile | None") -> set[str]:
    """Return the columns that would be empty."""
    uniform = all(result.case.uniform for result in results)
    return ({"pages"} if uniform else set()) | ({"predicted"} if cost is None else set())


def _columns(console: "Console", results: "Sequence[Result]", cost: "CostFile | None") -> tuple[str, ...]:
    """Return the columns that fit in all tables; none: a cell's name needs a line of its own."""
    measured = [result for result in results if not result.case.refused]
    hidden = _always_hidden(results, cost)
    unbounded = console.options.update(max_width=10_000)
    for left_out in (set[str](), {"counters of a range"}):
        columns = tuple(name for name in _COLUMNS if name not in hidden | left_out)
        if console.measure(_table(measured, cost, columns), options=unbounded).maximum <= console.width:
            return columns
    return ()


def _table(results: "Sequence[Result]", cost: "CostFile | None", columns: Sequence[str]) -> "Table":
    """Return the table of the cells that aren't refused."""
    from rich import box
    from rich.table import Table

    lines = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        lines.add_column(name, justify=_COLUMNS[name], no_wrap=True)
    before = ("",) * _LABELS
    for result in results:
        label = _label(result.case)
        # Words that repeat are left out, as long as all before them repeat too.
        pairs = enumerate(zip(label, before, strict=True))
        first = next((i for i, (own, other) in pairs if own != other), _LABELS)
        texts = zip(_COLUMNS, [*[""] * first, *label[first:], *_figures(result, cost)], strict=True)
        lines.add_row(*(text for name, text in texts if name in columns))
        before = label
    return lines


def _print_narrow(results: "Sequence[Result]", cost: "CostFile | None") -> None:
    """Print a line for a cell's name and one for each range of it, without counters."""
    hidden = _always_hidden(results, cost) | {"counters of a range"}
    names = list(_COLUMNS)[_LABELS:]
    kept = [i for i, name in enumerate(names) if name not in hidden]
    rows = [[_figures(result, cost)[i] for i in kept] for result in results]
    heads = [names[i] for i in kept]
    left = [i for i, head in enumerate(heads) if _COLUMNS[head] == "left"]
    head, rule, *lines = aligned_lines(heads, rows, left=left, gap=2)
    print(f"\n{head}\n{rule}")
    labelled = zip((_label(result.case) for result in results), lines, strict=True)
    for (vm_type, phase, direction, flag, outcome), group in groupby(labelled, key=lambda pair: pair[0]):
        print(f"{vm_type}, {phase}, {direction}, {flag}: {outcome}")
        for _, line in group:
            print(line)
    print()


def _label(case: "Case") -> tuple[str, ...]:
    """Return the cell's name, a word a column."""
    key = case.key
    return key.vm_type, key.phase, _WORDS[key.direction], case.flag_name, f"OK {case.cell.effect}"


def _figures(result: "Result", cost: "CostFile | None") -> list[str]:
    """Return the figures of a result, a text a column."""
    from gmemcore.workload.cost import predict

    case, seconds = result.case, result.seconds
    assert seconds is not None
    size = "all" if case.range == case.memory else format_size(case.range)
    return [
        size if case.pages_allocated_before else f"{size}+hole",
        "" if case.uniform else case.fragmentation,
        case.bytes,
        format_time(seconds.median)
        if result.convert_gbps is None
        else f"{format_number(result.convert_gbps)} GB/s",
        format_time(seconds.p95),
        f"{seconds.cv:.0%}{'~' if seconds.noisy else ' '}",
        f"{seconds.n}{' ' if result.timed_as == case.name else '='}",
        *(format_number(speed) for speed in (result.transfer_gbps, result.first_access_gbps)),
        "" if result.ratio is None else f"{format_ratio(result.ratio)} {case.primitive}",
        "" if cost is None else format_time(predict(result.counters, cost, calls=1).seconds),
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
