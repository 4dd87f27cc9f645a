"""``gmemcore kvm table``: results of ``kvm fuzz --json`` from several kernels as one Markdown table."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from gmemcore.files.text import printable


def table(
    results: Annotated[list[Path], Parameter(help="Files with the output of gmemcore kvm fuzz --json.")],
    /,
) -> int:
    """Print what kernels answered as a Markdown table: a row per operation, a column per kernel and VM type.

    Cells hold how many answers were the model's, how many are known to differ and why, or why the kernel
    wasn't asked.

    Exit status 0: no result has an unexplained difference; 1: one has; 2: a file that can't be read.
    """
    from gmemcore.fuzz.table import kernel_table, read_outcome

    runs = [read_outcome(path) for path in results]
    for line in kernel_table(runs):
        print(printable(line, most=len(line)))
    return int(any(run.difference is not None for run in runs))
