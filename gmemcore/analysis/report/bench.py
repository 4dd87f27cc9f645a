"""The page of a bench run: what conversions cost, beside the memory primitives of the same run."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

from gmemcore.analysis.report.blocks import (
    COLUMNS,
    LABELS,
    MODEL,
    PICTURES,
    ROWS,
    command,
    counted,
    grouped,
    key_values,
    left_off,
    machine,
    muted,
    no_pictures,
    picture,
)
from gmemcore.analysis.report.page import Block, Cell, Facts, Page, Section, Table, Text
from gmemcore.analysis.runs import BenchCell, Run
from gmemcore.analysis.speed import bench_cube, cost_by_range
from gmemcore.units import NOISY, format_number, format_ratio, format_size, format_time

_DIRECTIONS: Final = {"to_private": "to private", "to_shared": "to shared"}
_COLUMNS: Final = {
    **dict.fromkeys(("VM type", "phase", "direction", "flag", "effect"), False),
    "range": True,
    "pages": False,
    "bytes": False,
    **dict.fromkeys(("GB/s", "a call", "p95", "cv", "n", "populate GB/s", "access GB/s"), True),
    "ratio to its primitive": False,
    "counters of a range": False,
}
_LEGEND: Final = (
    "GB/s: the conversion itself, where it moves bytes; a call: its median time. populate: launch update in "
    "place (PRESERVE) or from a source, before launch; legacy: copying across. access: the new side accepts "
    "where it must, and reads everything. ratio: speed of the step that moves the bytes over that of the "
    "memory primitive of its kind, measured in turn with it. +hole: pages that nobody had touched before; "
    "pages: how their state alternates."
)


def page(run: Run) -> Page:
    """Return the page."""
    cells: list[BenchCell] = run.records
    measured = [cell for cell in cells if cell.effect is not None]
    noisy = [cell for cell in measured if _is_noisy(cell)]
    environment = run.first.environment
    facts = {
        "cases measured": str(len(measured)),
        "refused, as they must be": str(len(cells) - len(measured)),
        "compared byte by byte": f"{format_number(sum(cell.verified_bytes for cell in cells) / 1e9)} GB",
        "noisy (cv above 10 %)": str(len(noisy)),
    }
    sections = [
        Section("Primitives", [_primitives(run.first.primitives, environment)]),
        Section("Cost against size", _by_range(run)),
        Section("At a glance", _glances(run)),
        Section("Every case", [Text(_LEGEND), *_details(measured)]),
        Section("Environment", [key_values(environment)]),
    ]
    head: list[Block] = [Facts(facts), *_warnings(environment, len(noisy)), *no_pictures()]
    return Page("Conversion cost", machine(environment), command(environment), head, sections, MODEL)


def _is_noisy(cell: BenchCell) -> bool:
    return cell.seconds.cv is not None and cell.seconds.cv > NOISY


def _warnings(environment: Mapping[str, Any], noisy: int) -> Iterator[Text]:
    """Say what makes the figures worth less."""
    if environment.get("quick"):
        yield Text("A quick run: every case ran and was verified, but the figures say little.", warning=True)
    load, cpus = environment.get("load_average"), environment.get("cpus")
    if isinstance(load, int | float) and isinstance(cpus, int) and load > max(cpus - 1, 0.5):
        text = f"The machine was busy when the run began: load {format_number(load)} on {cpus} CPUs."
        yield Text(text, warning=True)
    if noisy:
        text = (
            f"Samples of {noisy} cases differ by more than 10 % (~): trust their ratios before their times."
        )
        yield Text(text, warning=True)


def _primitives(speeds: Mapping[str, float], environment: Mapping[str, Any]) -> Table:
    best = max(speeds.values(), default=0) or 1.0
    libraries = environment.get("primitives_by")
    by: Mapping[str, Any] = libraries if isinstance(libraries, dict) else {}
    rows = [
        (name, Cell(format_number(speed), share=speed / best), str(by.get(name, "")))
        for name, speed in speeds.items()
    ]
    return Table(
        ("primitive", "GB/s", "the best is"),
        rows,
        caption="What this machine's memory can do, in the same run",
    )


def _by_range(run: Run) -> list[Block]:
    caption = "Median and spread over the cells of one operation on bytes; dotted: what memory can do."
    return picture(lambda: cost_by_range(run), "Speed of conversions against their size", caption)


def _glances(run: Run) -> list[Block]:
    """Return a picture and a table a revision: cells of policy at their largest range, refusals in place."""
    blocks: list[Block] = []
    by_revision = grouped(run.records, lambda cell: (cell.abi, cell.firmware))
    for number, ((abi, firmware), cells) in enumerate(by_revision.items()):
        by_flag = grouped(cells, lambda cell: cell.flag)
        refused = {flag: _refusal_everywhere(column) for flag, column in by_flag.items()}
        answered = [flag for flag, outcome in refused.items() if outcome is None]
        flags = answered[:COLUMNS]
        rows: list[tuple[str | Cell, ...]] = [
            (*place, *(_glance(row.get(flag, [])) for flag in flags))
            for place, row in _by_place_and_flag(cells).items()
        ]
        caption = f"{abi}, firmware {firmware}: effect and cost of the largest range, or the refusal"
        if flags and len(rows) * len(flags) <= LABELS and number < PICTURES:
            draw = partial(bench_cube, Run(run.kind, run.first, cells), abi=abi)
            blocks += picture(draw, f"{caption}, as in the table below")
        blocks.append(Table(("VM type", "phase", "direction", *flags), muted(rows, 3), caption=caption))
        blocks += left_off(len(answered), COLUMNS, "flags")
        blocks += [
            Text(f"{outcome} everywhere: {', '.join(flag for flag in refused if refused[flag] == outcome)}")
            for outcome in dict.fromkeys(filter(None, refused.values()))
        ]
    return blocks


def _by_place_and_flag(cells: Sequence[BenchCell]) -> dict[tuple[str, str, str], dict[str, list[BenchCell]]]:
    places = grouped(cells, _place).items()
    return {place: grouped(row, lambda cell: cell.flag) for place, row in places}


def _refusal_everywhere(cells: Sequence[BenchCell]) -> str | None:
    """Return the outcome that all cells are refused with; None if one isn't, or they differ."""
    outcomes = {cell.outcome for cell in cells}
    return outcomes.pop() if len(outcomes) == 1 and all(cell.effect is None for cell in cells) else None


def _place(cell: BenchCell) -> tuple[str, str, str]:
    return cell.vm_type, cell.phase, _DIRECTIONS.get(cell.direction, cell.direction)


def _glance(cells: Sequence[BenchCell]) -> Cell:
    """Return one cell of policy in few words."""
    if not cells:
        return Cell("")
    usual = [cell for cell in cells if cell.fragmentation == "uniform"] or cells
    cell = max(usual, key=lambda cell: (cell.pages_allocated_before > 0, cell.range))
    if cell.effect is None:
        return Cell(cell.outcome, "refused")
    own_step = f" ({cell.bytes})" if cell.effect == "KEEP" and cell.bytes != "none" else ""
    return Cell(f"{cell.effect}{own_step} {_cost(cell)} ({format_size(cell.range)})")


def _cost(cell: BenchCell) -> str:
    if cell.convert_gbps is None:
        return format_time(cell.seconds.median)
    return f"{format_number(cell.convert_gbps)} GB/s"


def _details(cells: Sequence[BenchCell]) -> list[Block]:
    """Return a table a revision with every figure."""
    numbers = frozenset(i for i, numeric in enumerate(_COLUMNS.values()) if numeric)
    blocks: list[Block] = []
    for (abi, firmware, setting), group in grouped(cells, _heading).items():
        rows = muted([_detail(cell) for cell in group[:ROWS]], 5)
        blocks.append(Table(tuple(_COLUMNS), rows, numbers, f"{abi}, firmware {firmware}; {setting}"))
        blocks += left_off(len(group))
    return blocks


def _heading(cell: BenchCell) -> tuple[str, str, str]:
    """Return what the cells of a table have in common: the revision, and the memory they were measured in."""
    huge = "huge pages" if cell.huge_pages else "small pages"
    memory = f"{cell.backing}, {huge}" if cell.backing == "anonymous" else cell.backing
    threads = f"{cell.threads} thread{'s' if cell.threads != 1 else ''}"
    enforced = "kept by mprotect" if cell.enforce else ""
    return cell.abi, cell.firmware, ", ".join(filter(None, (memory, threads, enforced)))


def _detail(cell: BenchCell) -> tuple[str | Cell, ...]:
    seconds = cell.seconds
    size = "all" if cell.range == cell.memory else format_size(cell.range)
    noise = "" if seconds.cv is None else f"{seconds.cv:.0%}{'~' if _is_noisy(cell) else ''}"
    return (
        *(*_place(cell), cell.flag, cell.effect or ""),
        size if cell.pages_allocated_before else f"{size}+hole",
        cell.fragmentation,
        cell.bytes,
        *(format_number(cell.convert_gbps), format_time(seconds.median), format_time(seconds.p95)),
        Cell(noise, "noisy" if _is_noisy(cell) else ""),
        str(seconds.n),
        *(format_number(cell.populate_gbps), format_number(cell.first_access_gbps)),
        Cell(format_ratio(cell.ratio), share=cell.ratio),
        Cell(counted(cell.counters), "long"),
    )
