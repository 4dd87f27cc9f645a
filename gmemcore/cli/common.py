"""What commands share: assignments, sizes in few letters, plain tables."""

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from gmemcore.errors import InvalidArgumentError
from gmemcore.units import format_bytes as format_bytes


def assignments_of(assignments: Sequence[str]) -> dict[str, str]:
    """Read ``name=value`` texts."""
    given = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise InvalidArgumentError(f"--set {text}: use name=value, as in swiotlb=64m")
        given[name] = value
    return given


def complaint(error: OSError) -> str:
    """Return what is wrong with what, in a line: the file, where there is one, and the reason."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def make_table(*names: str, right: Sequence[int] = ()) -> Table:
    """Return a table without frames; right: columns of figures."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i in right else "left", overflow="fold")
    return table


def console_for_tables(width: int = 160) -> Console:
    """Return the console that tables are printed to; width: where there is no terminal to have one."""
    return Console() if sys.stdout.isatty() else Console(width=width)


def aligned_lines(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (), gap: int = 1
) -> list[str]:
    """Return a head, a rule and one line per row, indented: figures go below names that leave no room.

    Parameters
    ----------
    heads, rows : sequence
        Texts, a column each.
    left : sequence of int
        Columns of words; the others are figures.
    gap : int
        Blanks between columns.
    """
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]

    def line(texts: Sequence[str]) -> str:
        pairs = enumerate(zip(texts, widths, strict=True))
        padded = (text.ljust(width) if i in left else text.rjust(width) for i, (text, width) in pairs)
        return f"  {(' ' * gap).join(padded)}".rstrip()

    rule = "─" * (2 + sum(widths) + gap * (len(widths) - 1))
    return [line(heads), rule, *map(line, rows)]
