"""One page of a run: what was measured, what was refused, where, and how far to trust it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from gmemcore.analysis.report import bench, replay, stress
from gmemcore.analysis.report.page import Page, Text, to_html
from gmemcore.analysis.runs import Run

PAGES: Final[Mapping[str, Callable[[Run], Page]]] = {
    "bench": bench.page,
    "stress": stress.page,
    "replay": replay.page,
}
"""Kind of run -> its page."""


def report(run: Run) -> str:
    """Return the HTML page of a run; one that was cut says so first."""
    page = PAGES[run.kind](run)
    if run.shortfall is not None:
        page = replace(page, head=[Text(f"This run is {run.shortfall}.", warning=True), *page.head])
    return to_html(page)


__all__ = ["PAGES", "report"]
