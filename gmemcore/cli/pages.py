"""Pages on the terminal, and in files: text, Markdown or HTML."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from cyclopts import Parameter

from gmemcore.cli.console import note, say
from gmemcore.cli.tables import Heading, print_table
from gmemcore.files.writing import check_output, replace_file

if TYPE_CHECKING:
    from gmemcore.analysis.report.page import Block, Cell, Page, Table

Form = Literal["text", "markdown", "html"]
FormOption = Annotated[Form | None, Parameter(name="--format", help="text, markdown or html.")]
OutputOption = Annotated[Path | None, Parameter(name=("--output", "-o"), help="Write here.")]

_FORMS: Final[dict[str, Form]] = {".html": "html", ".htm": "html", ".md": "markdown", ".txt": "text"}


def form_of(form: Form | None, output: Path | None, usual: Form) -> Form:
    """Return the form of a page: what was asked for, else as the file's name says, else the usual one."""
    if form is not None:
        return form
    return usual if output is None else _FORMS.get(output.suffix.lower(), usual)


def check_page_output(output: Path | None, *, force: bool) -> None:
    """Make sure, before any work, that a page can be written there."""
    if output is not None:
        check_output(output, force=force)


def write_page(command: str, page: "Page", form: Form, output: Path | None) -> None:
    """Print a page, or write it to a file."""
    from gmemcore.analysis.report import to_html, to_markdown

    if form == "text" and output is None:
        print_page(page)
        return
    if form == "text":
        text = "\n".join(text_lines(page)) + "\n"
    else:
        text = to_html(page) if form == "html" else to_markdown(page)
    if output is None:
        print(text, end="")
        return
    replace_file(output, [text.encode()])
    note(command, f"{output}: {output.stat().st_size:,} bytes")


def print_page(page: "Page") -> None:
    """Print a page to standard output, its pictures left out."""
    say(page.title)
    for line in page.lead.splitlines():
        say(line)
    for block in page.head:
        _print_block(block)
    for section in page.sections:
        if section.blocks:
            say("", section.title)
            for block in section.blocks:
                _print_block(block)


def text_lines(page: "Page") -> list[str]:
    """Return a page as plain text, as wide as it needs."""
    from contextlib import redirect_stdout
    from io import StringIO

    with redirect_stdout(StringIO()) as printed:
        print_page(page)
    return printed.getvalue().splitlines()


def _print_block(block: "Block") -> None:
    from gmemcore.analysis.report.page import Facts, Table, Text

    match block:
        case Text(text, warning):
            for line in text.splitlines():
                say(f"warning: {line}" if warning else line)
        case Facts(facts):
            for name, value in facts.items():
                say(f"{name}: {value}")
        case Table():
            _print(block)
        case _:
            pass  # a picture


def _print(table: "Table") -> None:
    from gmemcore.analysis.report.page import Heading as PageHeading

    if table.caption:
        say("", table.caption)
    rows: list[Heading | Sequence[str]] = []
    for row in table.rows:
        if isinstance(row, PageHeading):
            rows.append(Heading(row.text))
        else:
            rows.append([_text(cell) for cell in row])
    if rows:
        print_table(table.columns, rows, figures=sorted(table.numbers))


def _text(cell: "str | Cell") -> str:
    if isinstance(cell, str):
        return cell
    return "" if cell.kind == "again" else cell.text
