"""HTML of small tables, for what objects show in a notebook.

Fragments are built as trees, so that text gets in as text. They set no colours: a notebook's theme, light or
dark, is theirs.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final
from xml.etree.ElementTree import Element, SubElement, tostring

ROWS: Final = 24
"""Rows of a table that are shown; how many were left off is said."""


def facts(title: str, values: Mapping[str, object], *more: str) -> str:
    """Return a title and one line per fact; then what else is given, fragments of this module.

    Parameters
    ----------
    title : str
        What it is.
    values : mapping
        Facts by name; their ``str`` is shown.
    """
    around = Element("div")
    _bold(around, title)
    if values:
        body = SubElement(SubElement(around, "table"), "tbody")
        for name, value in values.items():
            line = SubElement(body, "tr")
            _cell(line, "th", name, left=True)
            _cell(line, "td", str(value), left=True)
    return _joined(around, more)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *more: str) -> str:
    """Return a table with a title; numbers are set to the right, and of many rows the first are shown.

    Parameters
    ----------
    title : str
        What it is of; may be empty.
    columns : sequence of str
        Names of the columns.
    rows : iterable of sequences
        Their ``str`` is shown; ints with thousands apart, floats with four digits.
    """
    around = Element("div")
    if title:
        _bold(around, title)
    drawn = SubElement(around, "table")
    header = SubElement(SubElement(drawn, "thead"), "tr")
    body = SubElement(drawn, "tbody")
    every = list(rows)
    numeric = [bool(every) and isinstance(value, int | float) for value in (every[0] if every else columns)]
    for name, number in zip(columns, numeric, strict=True):
        _cell(header, "th", name, left=not number)
    for row in every[:ROWS]:
        line = SubElement(body, "tr")
        for value, number in zip(row, numeric, strict=True):
            _cell(line, "td", cell_text(value), left=not number)
    if len(every) > ROWS:
        SubElement(around, "div").text = f"and {len(every) - ROWS:,} more rows"
    return _joined(around, more)


def note(text: str) -> str:
    """Return a paragraph."""
    paragraph = Element("div")
    paragraph.text = text
    return _joined(paragraph, ())


def cell_text(value: object) -> str:
    """Return a value as a table shows it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _bold(parent: Element, text: str) -> None:
    SubElement(SubElement(parent, "div"), "b").text = text


def _cell(row: Element, tag: str, text: str, *, left: bool) -> None:
    SubElement(row, tag, style=f"text-align: {'left' if left else 'right'}; padding: 0 0.6em").text = text


def _joined(around: Element, more: Iterable[str]) -> str:
    return "".join([tostring(around, encoding="unicode", method="html"), *more])
