"""``gmemcore report``: runs on one page, as HTML, Markdown or text."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from gmemcore.cli.console import note, working
from gmemcore.cli.options import ForceSwitch, check_force
from gmemcore.cli.pages import FormOption, check_page_output, form_of, write_page


def report(
    run: Annotated[Path, Parameter(help="A run of bench, backings, stress or replay, as -o FILE writes.")],
    /,
    *more: Annotated[Path, Parameter(help="More runs; the page begins with the differences.")],
    form: FormOption = None,
    output: Annotated[
        Path | None, Parameter(name=("--output", "-o"), help="File to write. [default: report.html]")
    ] = None,
    force: ForceSwitch = False,
) -> None:
    """Write a page of one run, or of several: verdicts, what differs, tables, pictures, environment.

    Without --format the name of the output decides. With --format and no output the page is printed. An HTML
    page loads nothing and runs nothing, so it can be mailed, archived and printed. Pictures need the analysis
    extra.
    """
    from gmemcore.analysis.report import page_of
    from gmemcore.analysis.runs import read_run

    if form is None and output is None:
        output = Path("report.html")
    check_force(force, output=output)
    check_page_output(output, force=force)
    with working("report"):
        runs = [read_run(path) for path in (run, *more)]
        write_page("report", page_of(runs), form_of(form, output, "html"), output)
    for each in runs:
        if each.shortfall is not None:
            note("report", f"{each.name}: {each.shortfall}")
