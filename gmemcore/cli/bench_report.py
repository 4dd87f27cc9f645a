"""Output of ``gmemcore bench``: the verdict in at most 15 lines, and with --full every cell."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gmemcore.cli.console import say
from gmemcore.cli.predictions import not_priced
from gmemcore.cli.tables import Heading, print_table
from gmemcore.results.bench_tables import (
    MATRIX_LEGEND,
    VERDICT_FIGURES,
    VERDICT_HEADS,
    VERDICT_LEGEND,
    machine_words,
    matrix,
    matrix_figures,
    matrix_heads,
    setting_rows,
    verdict_notes,
    verdict_rows,
)
from gmemcore.units import counted, format_number, format_time

if TYPE_CHECKING:
    from gmemcore.results.bench import BenchCell, BenchFirst
    from gmemcore.workload.cost import CostFile


def print_verdict(first: "BenchFirst", cells: "Sequence[BenchCell]", seconds: float) -> None:
    """Print the verdict of a run."""
    say(machine_words(first))
    rows = verdict_rows(first)
    if rows:
        print_table(VERDICT_HEADS, rows, figures=VERDICT_FIGURES)
        say(VERDICT_LEGEND)
    if settings := setting_rows(first, cells):
        heads, *rows = settings
        say()
        print_table(heads, rows, figures=range(1, len(heads)), labels=1)
        say()
    for text in verdict_notes(first):
        say(text)
    say(summary_words(cells, seconds))


def summary_words(cells: "Sequence[BenchCell]", seconds: float) -> str:
    """Return how much was measured and verified, and how much is unstable."""
    measured = [cell for cell in cells if cell.outcome == "OK"]
    verified = format_number(sum(cell.verified_bytes for cell in cells) / 1e9)
    unstable = sum(not cell.stable for cell in measured)
    words = (
        f"{counted(len(measured), 'cell')} measured, {len(cells) - len(measured):,} refused, "
        f"{verified} GB verified, {seconds:.0f} s"
    )
    return f"{words}; {unstable} unstable" if unstable else words


def print_matrix(cells: "Sequence[BenchCell]", cost: "CostFile | None" = None) -> None:
    """Print every measured cell, a table per revision; cost: with predicted times."""
    heads = matrix_heads(cells)
    figures = matrix_figures(heads)
    shown = heads if cost is None else (*heads, "predicted")
    for setting, groups in matrix(cells).items():
        say("", setting)
        rows: list[Heading | tuple[str, ...]] = []
        for group in groups:
            rows.append(Heading(group.cells))
            for row, cell in zip(group.rows, group.records, strict=True):
                rows.append(row if cost is None else (*row, _predicted(cell, cost)))
        print_table(shown, rows, figures=figures if cost is None else (*figures, len(heads)))
    say("", MATRIX_LEGEND)
    if cost is not None:
        say(_legend_of_cost(cells, cost))


def _predicted(cell: "BenchCell", cost: "CostFile") -> str:
    from gmemcore.workload.cost import predict

    return format_time(predict(cell.counters, cost, calls=1).seconds)


def _legend_of_cost(cells: "Sequence[BenchCell]", cost: "CostFile") -> str:
    """Return the meaning of predicted times, and the events without a figure."""
    from collections import Counter

    from gmemcore.workload.cost import predict

    total: Counter[str] = Counter()
    for cell in cells:
        if cell.outcome == "OK":
            total.update(predict(cell.counters, cost, calls=1).not_priced)
    legend = f"predicted: conversion of one range, with its populate or accept, by {cost.title!r}"
    return f"{legend}; {not_priced(total)}" if total else legend
