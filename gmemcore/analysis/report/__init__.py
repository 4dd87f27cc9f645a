"""Pages of runs: what was measured, what was refused, where, and how far to trust it.

`page_of` makes the page of one run, or of several with the comparison of their figures; `to_html` and
`to_markdown` write it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from gmemcore.analysis.report import backings, bench, compare, replay, stress
from gmemcore.analysis.report.blocks import MODEL, machine
from gmemcore.analysis.report.markdown import to_markdown
from gmemcore.analysis.report.page import Block, Page, Section, Text, to_html
from gmemcore.analysis.runs import Run

PAGES: Final[Mapping[str, Callable[[Run], Page]]] = {
    "bench": bench.page,
    "backings": backings.page,
    "stress": stress.page,
    "replay": replay.page,
}
"""Kind of run -> its page."""


def report(*runs: Run) -> str:
    """Return the HTML page of one or several runs."""
    return to_html(page_of(runs))


def page_of(runs: Sequence[Run]) -> Page:
    """Return the page of one run, or of several: their verdicts, what differs, then each of them.

    A run that was cut says so first.
    """
    pages = [_one(run) for run in runs]
    if len(pages) == 1:
        return pages[0]
    sections = [Section("Verdicts", [*_verdicts(runs)]), *_comparisons(runs)]
    for run, page in zip(runs, pages, strict=True):
        lead: list[Block] = [Text(page.lead), *page.head]
        sections.append(Section(f"{run.name}: {page.title}", lead))
        sections += [replace(section, title=f"{run.name}: {section.title}") for section in page.sections]
    machines = list(dict.fromkeys(machine(run.first.environment) for run in runs))
    return Page(f"{len(runs)} runs", "\n".join(machines), "", _shortfalls(runs), sections, MODEL)


def _one(run: Run) -> Page:
    page = PAGES[run.kind](run)
    return replace(page, head=[*_shortfalls([run]), *page.head])


def _shortfalls(runs: Sequence[Run]) -> list[Block]:
    """Return which runs are not whole."""
    return [
        Text(f"{'This run' if len(runs) == 1 else run.name} is {run.shortfall}.", warning=True)
        for run in runs
        if run.shortfall is not None
    ]


def _verdicts(runs: Sequence[Run]) -> Iterator[Block]:
    for run in runs:
        if run.kind == "bench":
            yield Text(f"{run.name}: {machine(run.first.environment)}")
            yield from bench.verdict(run.first)


def _comparisons(runs: Sequence[Run]) -> list[Section]:
    """Return what differs between the first bench run and each later one."""
    of_bench = [run for run in runs if run.kind == "bench"]
    return [compare.section(of_bench[0], other) for other in of_bench[1:]]


__all__ = ["PAGES", "page_of", "report", "to_html", "to_markdown"]
