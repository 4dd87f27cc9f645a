"""The page of a comparison of backings: memory first, then time."""

from collections.abc import Mapping, Sequence
from typing import Any

from gmemcore.analysis.pictures import memory_of_ways
from gmemcore.analysis.report.blocks import (
    LABELS,
    MODEL,
    ROWS,
    command,
    grouped,
    key_values,
    left_off,
    machine,
    no_pictures,
    picture,
)
from gmemcore.analysis.report.page import Block, Heading, Page, Row, Section, Table, Text
from gmemcore.analysis.runs import Run
from gmemcore.results.backings import BackingsRun
from gmemcore.results.backings_tables import FIGURES, HEADS, LEGEND, memory_words, way_rows, work_words


def page(run: Run) -> Page:
    """Return the page."""
    works = grouped(run.records, lambda each: (each.work, each.vm_type, each.memory, each.range))
    rows: list[Row] = []
    for runs in works.values():
        rows.append(Heading(work_words(runs)))
        rows += way_rows(runs)
    table = Table(HEADS, rows[:ROWS], frozenset(FIGURES), "Time of all memory to one side, and memory")
    sections = [
        Section("Memory", [*(Text(memory_words(runs)) for runs in works.values()), *_memory(works)]),
        Section("Time", [table, *left_off(len(rows)), Text(LEGEND)]),
        Section("Environment", [key_values(run.first.environment | run.first.settings)]),
    ]
    environment = run.first.environment
    head: list[Block] = [*no_pictures()]
    return Page("One backing and two", machine(environment), command(environment), head, sections, MODEL)


def _memory(works: Mapping[Any, Sequence[BackingsRun]]) -> list[Block]:
    """Return the picture of resident memory over time, of the first run of each way."""
    if not works or len(works) > LABELS // 20:
        return []
    ways: dict[str, dict[str, list[tuple[float, int]]]] = {}
    for (work, vm_type, *_), runs in works.items():
        for one in runs:
            if one.measured.memory:
                ways.setdefault(f"{work}, {vm_type}", {}).setdefault(one.way, one.measured.memory)
    size = next(iter(works))[2]
    if not ways:
        return []
    return picture(lambda: memory_of_ways(ways, size).axes[0], "Resident memory over time, by way")
