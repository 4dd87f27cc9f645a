"""The page of a bench run: what conversions cost, next to the memory primitives of the same run."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final

from gmemcore.analysis.report.blocks import (
    COLUMNS,
    LABELS,
    MODEL,
    PICTURES,
    ROWS,
    command,
    grouped,
    key_values,
    left_off,
    machine,
    muted,
    no_pictures,
    picture,
)
from gmemcore.analysis.report.page import Block, Cell, Facts, Heading, Page, Row, Section, Table, Text
from gmemcore.analysis.runs import BenchCell, BenchFirst, Run
from gmemcore.analysis.speed import bench_cube, bench_effects, cost_by_range, kernel_operations
from gmemcore.results.bench_tables import (
    CONVERSION,
    MATRIX_LEGEND,
    OPERATION_FIGURES,
    OPERATION_HEADS,
    VERDICT_FIGURES,
    VERDICT_HEADS,
    VERDICT_LEGEND,
    counter_words,
    direction_words,
    matrix,
    matrix_figures,
    matrix_heads,
    operation_rows,
    setting_rows,
    verdict_notes,
    verdict_rows,
)
from gmemcore.units import counted, format_number, format_time, size_words

BUSY: Final = 1.0
"""Load per CPU, beyond the run's own processor, above which a machine was busy."""


def page(run: Run) -> Page:
    """Return the page."""
    first: BenchFirst = run.first
    cells: list[BenchCell] = run.records
    if any(cell.operation != CONVERSION for cell in cells):
        return _kernel_page(run)
    measured = [cell for cell in cells if cell.outcome == "OK"]
    unstable = sum(not cell.stable for cell in measured)
    facts = {
        "cells measured": str(len(measured)),
        "refused, as policy says": str(len(cells) - len(measured)),
        "verified byte by byte": f"{format_number(sum(cell.verified_bytes for cell in cells) / 1e9)} GB",
        "unstable, not to be judged": str(unstable),
    }
    sections = [
        Section("Verdict", [*verdict(first), *_settings(run), *_effects(run)]),
        Section("Speed by size", _by_range(run)),
        Section("At a glance", _glances(run)),
        Section("Every cell", [Text(MATRIX_LEGEND), *_details(measured)]),
        Section("Environment", [key_values(first.environment | first.settings)]),
    ]
    head: list[Block] = [Facts(facts), *_warnings(run, unstable), *no_pictures()]
    return Page(
        "Conversion cost", machine(first.environment), command(first.environment), head, sections, MODEL
    )


def _kernel_page(run: Run) -> Page:
    """Return the page of operations of a real kernel."""
    first: BenchFirst = run.first
    by_type = grouped(run.records, lambda cell: (cell.abi, cell.vm_type))
    sections = [
        Section(f"VM type {vm_type}, {abi}", [*_by_operation(run, vm_type), *_operations(cells)])
        for (abi, vm_type), cells in by_type.items()
    ]
    sections.append(Section("Environment", [key_values(first.environment | first.settings)]))
    offered = sum(cell.outcome == "OK" for cell in run.records)
    facts = {"operations measured": str(offered), "not offered": str(len(run.records) - offered)}
    facts |= {f"{name}": f"{format_number(gbps)} GB/s" for name, gbps in first.primitives.items()}
    head: list[Block] = [Facts(facts), *_warnings(run, 0), *no_pictures()]
    lead, words = machine(first.environment), command(first.environment)
    title = f"Operations of Linux {first.settings.get('kernel', '')}".rstrip()
    return Page(title, lead, words, head, sections, KERNEL)


def _by_operation(run: Run, vm_type: str) -> list[Block]:
    draw = partial(kernel_operations, run, vm_type=vm_type)
    return picture(draw, "Time per page of each operation", "Median and 95 % interval at each range.")


def _operations(cells: Sequence[BenchCell]) -> list[Block]:
    rows = [*operation_rows(cells)]
    blocks: list[Block] = [Table(OPERATION_HEADS, rows[:ROWS], frozenset(OPERATION_FIGURES), "Measured")]
    blocks += left_off(len(rows))
    missing = grouped([cell for cell in cells if cell.outcome != "OK"], lambda cell: cell.why)
    for why, own in missing.items():
        names = "; ".join(dict.fromkeys(cell.operation for cell in own))
        blocks.append(Text(f"Not offered ({why}): {names}"))
    return blocks


KERNEL: Final = "Measured on a real kernel by gmemcore. GB = 1e9 bytes of guest memory, counted once."


def verdict(first: BenchFirst) -> Iterator[Block]:
    """Yield the verdict of a run."""
    rows = verdict_rows(first)
    if rows:
        numbers = frozenset(VERDICT_FIGURES)
        yield Table(VERDICT_HEADS, rows, numbers, "Per effect, at the largest range")
        yield Text(VERDICT_LEGEND)
    for text in verdict_notes(first):
        yield Text(text)


def _settings(run: Run) -> Iterator[Table]:
    """Yield the effects of the verdict under every setting, if there are several."""
    if found := setting_rows(run.first, run.records):
        heads, *rows = found
        yield Table(heads, rows, frozenset(range(1, len(heads))), "Under every setting, ns/page")


def _effects(run: Run) -> list[Block]:
    if not any(line.gbps for line in run.first.verdict.effects):
        return []
    return picture(lambda: bench_effects(run), "GB/s of each effect, next to memcpy, memset and XOR")


def _warnings(run: Run, unstable: int) -> Iterator[Text]:
    """Yield what makes the figures worth less."""
    environment, cpus = run.first.environment, run.first.environment.get("cpus")
    if run.first.settings.get("quick") or environment.get("quick"):
        yield Text("A quick run: every cell ran and was verified, but the figures mean little.", warning=True)
    ends = {"began": environment.get("load_average"), "ended": run.end.load_average if run.end else None}
    for when, load in ends.items():
        if isinstance(load, int | float) and isinstance(cpus, int) and load - 1 > BUSY * max(cpus - 1, 0.5):
            busy = f"The machine was busy when the run {when}: load {format_number(load)} on {cpus} CPUs."
            yield Text(busy, warning=True)
    if unstable:
        text = (
            f"unstable: {counted(unstable, 'cell')}. The interval of a ratio is wider than 10 % either way."
        )
        yield Text(text, warning=True)


def _by_range(run: Run) -> list[Block]:
    caption = "Median and spread over the cells of one operation on bytes; dotted: memory primitives."
    return picture(lambda: cost_by_range(run), "Speed of conversions by size", caption)


def _glances(run: Run) -> list[Block]:
    """Return a picture and a table per revision: each cell at its largest range, refusals in place."""
    blocks: list[Block] = []
    by_revision = grouped(run.records, lambda cell: (cell.abi, cell.firmware))
    for number, ((abi, firmware), cells) in enumerate(by_revision.items()):
        by_flag = grouped(cells, lambda cell: cell.flag)
        refused = {flag: _refusal_everywhere(column) for flag, column in by_flag.items()}
        answered = [flag for flag, outcome in refused.items() if outcome is None]
        flags = answered[:COLUMNS]
        caption = f"{abi}, firmware {firmware}: what happens, and its cost at the largest range"
        if flags and len(cells) <= LABELS * len(flags) and number < PICTURES:
            draw = partial(bench_cube, Run(run.kind, run.first, cells), abi=abi)
            blocks += picture(draw, f"{caption}, as in the table below")
        rows: list[tuple[str | Cell, ...]] = [
            (*place, *(_glance(row.get(flag, [])) for flag in flags))
            for place, row in _by_place(cells).items()
        ]
        blocks.append(Table(("VM type", "phase", "direction", *flags), muted(rows, 3), caption=caption))
        blocks += left_off(len(answered), COLUMNS, "flags")
        blocks += [
            Text(f"{outcome} everywhere: {', '.join(flag for flag in refused if refused[flag] == outcome)}")
            for outcome in dict.fromkeys(filter(None, refused.values()))
        ]
    return blocks


def _by_place(cells: Sequence[BenchCell]) -> dict[tuple[str, str, str], dict[str, list[BenchCell]]]:
    places = grouped(cells, _place).items()
    return {place: grouped(row, lambda cell: cell.flag) for place, row in places}


def _refusal_everywhere(cells: Sequence[BenchCell]) -> str | None:
    """Return the outcome that all cells are refused with; None if one isn't, or they differ."""
    outcomes = {cell.outcome for cell in cells}
    return outcomes.pop() if len(outcomes) == 1 and all(cell.effect is None for cell in cells) else None


def _place(cell: BenchCell) -> tuple[str, str, str]:
    return cell.vm_type, cell.phase, direction_words(cell)


def _glance(cells: Sequence[BenchCell]) -> Cell:
    """Return one cell of policy in few words."""
    if not cells:
        return Cell("")
    usual = [cell for cell in cells if cell.fragmentation == "uniform"] or cells
    cell = max(usual, key=lambda cell: (cell.pages_allocated_before > 0, cell.range))
    if cell.effect is None:
        return Cell(cell.outcome, "refused")
    return Cell(f"{cell.does or cell.effect} {_cost(cell)} ({size_words(cell.range)})")


def _cost(cell: BenchCell) -> str:
    if cell.convert_gbps is not None:
        return f"{format_number(cell.convert_gbps)} GB/s"
    if cell.ns_per_page is not None:
        return f"{format_number(cell.ns_per_page.median)} ns/page"
    return format_time(cell.seconds.median)


def _details(cells: Sequence[BenchCell]) -> list[Block]:
    """Return a table per setting with every figure; cells with equal figures share their rows."""
    heads = matrix_heads(cells)
    columns = (*heads, "counters of a range")
    blocks: list[Block] = []
    for setting, groups in matrix(cells).items():
        rows: list[Row] = []
        for group in groups:
            rows.append(Heading(group.cells))
            for row, cell in zip(group.rows, group.records, strict=True):
                texts: list[str | Cell] = [_marked(head, text) for head, text in zip(heads, row, strict=True)]
                rows.append([*texts, Cell(counter_words(cell.counters), "long")])
        blocks.append(Table(columns, rows[:ROWS], frozenset(matrix_figures(heads)), setting))
        blocks += left_off(len(rows))
    return blocks


def _marked(head: str, text: str) -> str | Cell:
    return Cell(text, "noisy") if head == "ratio" and text == "unstable" else text
