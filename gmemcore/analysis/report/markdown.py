"""A page as Markdown, for a mail, a pull request or an issue: tables, no pictures."""

from collections.abc import Iterable, Iterator, Sequence

from gmemcore.analysis.report.page import Block, Cell, Facts, Heading, Page, Table, Text, clean


def to_markdown(page: Page) -> str:
    """Return a page as Markdown."""
    return "\n".join(_lines(page)) + "\n"


def _lines(page: Page) -> Iterator[str]:
    yield f"# {_safe(page.title)}"
    for text in (page.lead, page.command and f"`{_plain(page.command)}`"):
        if text:
            yield from ("", _safe(text) if text is page.lead else text)
    yield from _blocks(page.head)
    for section in page.sections:
        blocks = [*_blocks(section.blocks)]
        if blocks:
            yield from ("", f"## {_safe(section.title)}", *blocks)
    yield from ("", _safe(page.footer))


def _blocks(blocks: Iterable[Block]) -> Iterator[str]:
    for block in blocks:
        match block:
            case Text(text, warning):
                yield from ("", f"**{_safe(text)}**" if warning else _safe(text))
            case Facts(facts):
                yield from ("", *(f"* {_safe(name)}: {_safe(value)}" for name, value in facts.items()))
            case Table():
                yield from ("", *_table(block))
            case _:  # a picture
                pass


def _table(table: Table) -> Iterator[str]:
    if table.caption:
        yield from (_safe(table.caption), "")
    yield _row([_safe(name) for name in table.columns])
    yield _row(["---:" if i in table.numbers else "---" for i in range(len(table.columns))])
    for row in table.rows:
        if isinstance(row, Heading):
            yield _row([f"**{_safe(row.text)}**", *[""] * (len(table.columns) - 1)])
            continue
        cells = [cell if isinstance(cell, Cell) else Cell(str(cell)) for cell in row]
        yield _row([_safe(cell.text) for cell in cells])


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _plain(text: str) -> str:
    return clean(text).replace("\n", " ").replace("`", "'")


def _safe(text: str) -> str:
    """Return text that no Markdown reader takes for markup, a link or a row's end."""
    return "".join(f"\\{letter}" if letter in _MARKUP else letter for letter in _plain(text))


_MARKUP = frozenset("\\*_[]<>|#~&")
