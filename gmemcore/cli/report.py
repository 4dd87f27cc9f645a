"""``gmemcore report``: one self-contained HTML page of a run."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def report(
    run: Annotated[Path, Parameter(help="JSON Lines of bench --json or of stress, JSON of replay.")],
    /,
    *,
    output: Annotated[Path, Parameter(name=("--output", "-o"), help="Where the page goes.")] = Path(
        "report.html"
    ),
) -> int:
    """Write one HTML page of a run: environment, tables, pictures, refusals.

    The page loads nothing and runs nothing: it can be mailed, archived, printed. Pictures need the analysis
    extra.

    Exit status 0: the page is written; 2: the file isn't a run, or the page can't be written.
    """
    from gmemcore.analysis.report import report as page_of
    from gmemcore.analysis.runs import RunError, read_run

    try:
        page = page_of(read_run(run))
        output.write_text(page, encoding="utf-8")
    except RunError as error:
        print(f"gmemcore report: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"gmemcore report: {error.filename or run}: {error.strerror or error}", file=sys.stderr)
        return 2
    print(f"{output}: {output.stat().st_size:,} bytes", file=sys.stderr)
    return 0
