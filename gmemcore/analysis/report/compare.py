"""Two bench runs on a page: what changed, cell by cell."""

from gmemcore.analysis.comparison import (
    FIGURES,
    HEADS,
    MEAN_HEADS,
    UNSTABLE_LEGEND,
    Basis,
    Comparison,
    Finding,
    change_rows,
    compare,
    mean_rows,
    run_words,
    summary_words,
    warnings_of,
)
from gmemcore.analysis.report.blocks import MODEL, ROWS, left_off, machine
from gmemcore.analysis.report.page import Block, Cell, Page, Row, Section, Table, Text
from gmemcore.analysis.runs import Run


def page(comparisons: list[Comparison], *, every: bool = False) -> Page:
    """Return the page of comparisons of one run with later ones."""
    sections = [Section(run_words(each.new), blocks(each, every=every)) for each in comparisons]
    old = comparisons[0].old
    lead = f"{run_words(old)}\n{machine(old.first.environment)}"
    return Page("Conversion cost compared", lead, "", [], sections, MODEL)


def section(old: Run, new: Run, basis: Basis | None = None) -> Section:
    """Return the section about what changed from one run to another."""
    title = f"{old.name} to {new.name}"
    try:
        return Section(title, blocks(compare(old, new, basis)))
    except ValueError as error:
        return Section(title, [Text(f"Not compared: {error}.")])


def blocks(comparison: Comparison, *, every: bool = False) -> list[Block]:
    """Return a comparison as blocks: the summary first; every: with what didn't change."""
    found: list[Block] = [Text(summary_words(comparison) + ".")]
    if comparison.counts()[Finding.UNSTABLE]:
        found.append(Text(UNSTABLE_LEGEND))
    found += [Text(f"{text}.", warning=True) for text in warnings_of(comparison)]
    means = mean_rows(comparison)
    if means:
        found.append(Table(MEAN_HEADS, means, frozenset({1}), "Geometric mean by effect; 1 is no change"))
    rows: list[Row] = [
        [Cell(text, "long") if i == len(row) - 1 else text for i, text in enumerate(row)]
        for row in change_rows(comparison, every=every)
    ]
    if rows:
        found.append(Table(HEADS, rows[:ROWS], frozenset(FIGURES), "Every cell" if every else "What changed"))
        found += left_off(len(rows))
    return found
