"""Tables for people, as wide as the terminal and never wider than their words.

A table that has room is printed as it is, without padding after the last column. One that has less room wraps
its words, and then its headings at hyphens, with columns closer together. One whose words still don't fit is
stacked: each row becomes lines of a name and a value. No cell is cut and no column left out at any width.
Where standard output is no terminal and ``COLUMNS`` isn't set, width is no limit.
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from rich.cells import cell_len

from gmemcore.files.text import printable

GAP: Final = 2
"""Blanks between two columns."""
_NARROWEST: Final = 20  # columns that a terminal is taken to have at least
_LEGEND_WIDTH: Final = 100  # columns of a legend where there is no limit
_MOST: Final = 10_000  # letters of a cell


@dataclass(frozen=True, slots=True)
class Heading:
    """A row of words across all columns, above the rows that it is about."""

    text: str


Row = Sequence[object] | Heading


def width_of_output() -> int | None:
    """Return how many columns there are; None: no limit."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isascii() and columns.isdecimal() and int(columns[:9]) > 0:
        return max(int(columns[:9]), _NARROWEST)
    if not sys.stdout.isatty():
        return None
    try:
        return max(os.get_terminal_size(sys.stdout.fileno()).columns, _NARROWEST)
    except OSError:
        return 80


def print_table(
    heads: Sequence[str], rows: Sequence[Row], *, figures: Sequence[int] = (), labels: int = 0
) -> None:
    """Print a table to standard output.

    Parameters
    ----------
    heads : sequence of str
        Names of the columns.
    rows : sequence
        Cells, whose ``str`` is printed, or a `Heading`.
    figures : sequence of int
        Columns of figures: set to the right, and never broken.
    labels : int
        First columns that name a row: where they repeat those of the row above, they stay empty.
    """
    for line in table_lines(heads, rows, figures=figures, labels=labels, width=width_of_output()):
        print(line)


def print_legend(meanings: Mapping[str, str], *, markdown: bool = False) -> None:
    """Print what columns or words mean, one paragraph each, below a table."""
    if markdown:
        print()
        for name, meaning in meanings.items():
            print(f"* {printable(name).replace('*', '&#42;')}: {printable(meaning)}")
        return
    names = max(map(cell_len, meanings))
    width = max((width_of_output() or _LEGEND_WIDTH) - names - GAP, _NARROWEST)
    print()
    for name, meaning in meanings.items():
        for n, line in enumerate(_wrapped(printable(meaning), width)):
            print(f"{'' if n else name:{names}}{' ' * GAP}{line}")


def print_markdown(
    heads: Sequence[str], rows: Iterable[Sequence[object]], *, figures: Iterable[int] = ()
) -> None:
    """Print a table as Markdown; figures: columns that are set to the right."""
    right = frozenset(figures)
    rule = ["---:" if i in right else "---" for i in range(len(heads))]
    for row in (heads, rule, *rows):
        print(
            "| " + " | ".join(re.sub(r"([|*])", r"\\\1", printable(cell, most=_MOST)) for cell in row) + " |"
        )


def table_lines(
    heads: Sequence[str],
    rows: Sequence[Row],
    *,
    figures: Sequence[int] = (),
    labels: int = 0,
    width: int | None = None,
) -> Iterator[str]:
    """Yield the lines of a table; see `print_table`. A width of None is no limit."""
    cells = [
        row if isinstance(row, Heading) else [printable(cell, most=_MOST) for cell in row] for row in rows
    ]
    grid = [row for row in cells if not isinstance(row, Heading)]
    fitted = _fitted(heads, grid, frozenset(figures), width)
    if fitted is None:
        yield from _stacked(heads, cells, _NARROWEST if width is None else width)
        return
    widths, gap = fitted
    yield from _line(
        [list(_wrapped(head, n, "-")) for head, n in zip(heads, widths, strict=True)], widths, gap, figures
    )
    yield "-" * (sum(widths) + gap * (len(widths) - 1))
    above: Sequence[str] = ()
    for number, row in enumerate(cells):
        if isinstance(row, Heading):
            if number:
                yield ""
            yield from _wrapped(printable(row.text), _MOST if width is None else width)
            above = ()
        else:
            same = next((i for i in range(labels) if row[: i + 1] != above[: i + 1]), labels)
            shown = ["" if i < same else cell for i, cell in enumerate(row)]
            columns = [list(_wrapped(cell, n)) for cell, n in zip(shown, widths, strict=True)]
            yield from _line(columns, widths, gap, figures)
            above = row


def _fitted(
    heads: Sequence[str], grid: Sequence[Sequence[str]], figures: frozenset[int], width: int | None
) -> tuple[list[int], int] | None:
    """Return the width of each column and the gap between two; None: they don't fit beside each other."""
    columns = [[row[i] for row in grid] for i in range(len(heads))]
    wanted = [max(map(cell_len, (head, *column))) for head, column in zip(heads, columns, strict=True)]
    if width is None:
        return wanted, GAP
    for gap, breaks in ((GAP, ""), (GAP, "-"), (1, "-")):
        least = [
            max(
                _longest_word(head, breaks),
                *(cell_len(cell) if i in figures else _longest_word(cell) for cell in column),
                0,
            )
            for i, (head, column) in enumerate(zip(heads, columns, strict=True))
        ]
        room = width - gap * (len(heads) - 1)
        if sum(least) <= room:
            return _narrowed(wanted, least, room), gap
    return None


def _narrowed(wanted: Sequence[int], least: Sequence[int], room: int) -> list[int]:
    """Take from the widest columns until all fit."""
    widths = list(wanted)
    while sum(widths) > room:
        widths[max((i for i in range(len(widths)) if widths[i] > least[i]), key=widths.__getitem__)] -= 1
    return widths


def _words(text: str, breaks: str = "") -> list[str]:
    """Return the pieces of a text between which a line can end: words, or their parts after a hyphen."""
    return re.findall(r"\s*[^\s-]*-+|\s*[^\s-]+", text) if breaks else re.findall(r"\s*\S+", text)


def _longest_word(text: str, breaks: str = "") -> int:
    return max((cell_len(word.strip()) for word in _words(text, breaks)), default=0)


def _line(
    columns: Sequence[Sequence[str]], widths: Sequence[int], gap: int, figures: Sequence[int]
) -> Iterator[str]:
    """Yield the lines of one row, whose cells are wrapped."""
    for n in range(max(map(len, columns))):
        parts = []
        for i, (column, width) in enumerate(zip(columns, widths, strict=True)):
            text = column[n] if n < len(column) else ""
            blanks = " " * (width - cell_len(text))
            parts.append(blanks + text if i in figures else text + blanks)
        yield (" " * gap).join(parts).rstrip()


def _wrapped(text: str, width: int, breaks: str = "") -> Iterator[str]:
    """Yield a text in lines of a width, broken between words, and within those that are longer."""
    if cell_len(text) <= width:
        yield text
        return
    line = ""
    for word in _words(text, breaks):
        if line and cell_len(line + word) > width:
            yield line
            line = word.lstrip()
        else:
            line = line + word if line else word.lstrip()
        while cell_len(line) > width:
            end = next(i for i in range(len(line), 0, -1) if cell_len(line[:i]) <= width or i == 1)
            yield line[:end]
            line = line[end:]
    yield line


def _stacked(heads: Sequence[str], rows: Sequence[Sequence[str] | Heading], width: int) -> Iterator[str]:
    """Yield each row as lines of a name and a value, rows apart."""
    names = max(map(cell_len, heads))
    words = (_longest_word(cell) for row in rows if not isinstance(row, Heading) for cell in row)
    beside = width - names - GAP >= max(words, default=0)
    for number, row in enumerate(rows):
        if number:
            yield ""
        if isinstance(row, Heading):
            yield from _wrapped(printable(row.text), width)
            continue
        for head, cell in zip(heads, row, strict=True):
            if not cell:
                continue
            if beside:
                lines = _wrapped(cell, width - names - GAP)
                for n, line in enumerate(lines):
                    yield f"{head if not n else '':{names}}{' ' * GAP}{line}".rstrip()
            else:
                yield from _wrapped(f"{head}: {cell}", width)
