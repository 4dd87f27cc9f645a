"""``gmemcore report``: one self-contained HTML page of a run."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from gmemcore.cli.console import note, progress
from gmemcore.cli.options import ForceSwitch
from gmemcore.files.writing import check_output, replace_file


def report(
    run: Annotated[Path, Parameter(help="JSON Lines of bench, backings, stress or replay.")],
    /,
    *,
    output: Annotated[Path, Parameter(name=("--output", "-o"), help="HTML file to write.")] = Path(
        "report.html"
    ),
    force: ForceSwitch = False,
) -> None:
    """Write one HTML page of a run: environment, tables, pictures, refusals.

    The page loads nothing and runs nothing, so it can be mailed, archived and printed. Pictures need the
    analysis extra.
    """
    from gmemcore.analysis.report import report as page_of
    from gmemcore.analysis.runs import read_run

    check_output(output, force=force)
    read = read_run(run)
    with progress("report", None, "pages"):
        page = page_of(read).encode()
    replace_file(output, [page])
    if (shortfall := getattr(read, "shortfall", None)) is not None:
        note("report", f"{run}: {shortfall}")
    note("report", f"{output}: {len(page):,} bytes")
