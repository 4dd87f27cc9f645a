"""A self-contained HTML page, built as a tree: text gets in as text, and nothing is escaped by hand.

The page has no script, no style attribute and no address to load from; its content security policy holds it
to that in the reader's browser too.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Final
from xml.etree.ElementTree import Element, SubElement, tostring

TEXT_LIMIT: Final = 2000
"""Characters of one text that are shown."""

_BESIDE: Final = 3  # columns that fit beside each other on a narrow screen
_UNPRINTABLE: Final = {
    code: "\N{REPLACEMENT CHARACTER}"
    for code in (*range(0x20), *range(0x7F, 0xA0), 0xFFFE, 0xFFFF)
    if code not in (0x09, 0x0A)
}


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell that says more than its text.

    Attributes
    ----------
    text : str
        What it says.
    kind : str
        How it looks: ``again`` (as the row above), ``refused``, ``noisy``, ``bad``, ``long`` or nothing.
    share : float or None
        A bar in front of the text, 0 to 1.
    """

    text: str
    kind: str = ""
    share: float | None = None


@dataclass(frozen=True, slots=True)
class Heading:
    """A row of words across all columns, about the rows below it."""

    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph; a warning stands out."""

    text: str
    warning: bool = False


Row = Sequence[str | Cell] | Heading


@dataclass(frozen=True, slots=True)
class Table:
    """A table: its columns, the indices of those with numbers, rows of texts or cells, or headings."""

    columns: Sequence[str]
    rows: Sequence[Row]
    numbers: frozenset[int] = frozenset()
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """A few figures that stand out, each with its name."""

    facts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Picture:
    """An SVG image, what it shows for those who can't see it, and its caption."""

    svg: bytes
    alternative: str
    caption: str = ""


Block = Text | Table | Facts | Picture


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page with a heading of its own."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True, slots=True)
class Page:
    """Everything that a page says, top to bottom."""

    title: str
    lead: str
    command: str
    head: Sequence[Block]
    sections: Sequence[Section]
    footer: str


def to_html(page: Page) -> str:
    """Return the page as one HTML document, which loads nothing and runs nothing."""
    html = Element("html", lang="en")
    _head(SubElement(html, "head"), page.title)
    body = SubElement(html, "body")
    header = SubElement(body, "header")
    _text(header, "h1", page.title)
    _text(header, "p", page.lead, "lead")
    if page.command:
        _text(SubElement(header, "p"), "code", page.command)
    _contents(header, page.sections)
    main = SubElement(body, "main")
    _blocks(main, page.head)
    for number, section in enumerate(page.sections):
        part = SubElement(main, "section", id=f"s{number}")
        _text(part, "h2", section.title)
        _blocks(part, section.blocks)
    _text(SubElement(body, "footer"), "p", page.footer)
    return "<!doctype html>\n" + tostring(html, encoding="unicode", method="html") + "\n"


def clean(text: str) -> str:
    """Return what every browser shows alike: a text of bounded length without control characters."""
    bounded = text if len(text) <= TEXT_LIMIT else text[: TEXT_LIMIT - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return bounded.translate(_UNPRINTABLE)


def _head(head: Element, title: str) -> None:
    """Policy first: it holds for what comes after it."""
    style = (files(__package__) / "page.css").read_text(encoding="utf-8")
    style_hash = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{style_hash}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    SubElement(head, "meta", charset="utf-8")
    SubElement(head, "meta", {"http-equiv": "Content-Security-Policy", "content": policy})
    SubElement(head, "meta", name="referrer", content="no-referrer")
    SubElement(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    SubElement(head, "link", rel="icon", href="data:,")  # else a server would be asked for one
    _text(head, "title", title)
    SubElement(head, "style").text = style  # ours: the only text that isn't escaped


def _contents(parent: Element, sections: Iterable[Section]) -> None:
    entries = SubElement(SubElement(parent, "nav", {"aria-label": "Contents"}), "ul")
    for number, section in enumerate(sections):
        _text(SubElement(entries, "li"), "a", section.title).set("href", f"#s{number}")


def _blocks(parent: Element, blocks: Iterable[Block]) -> None:
    for block in blocks:
        match block:
            case Text(text, warning):
                _text(parent, "p", text, "warning" if warning else "")
            case Table():
                _table(parent, block)
            case Facts(facts):
                _facts(parent, facts)
            case Picture():
                _picture(parent, block)


def _table(parent: Element, table: Table) -> None:
    """Draw a table. On a narrow screen its rows are stacked, each cell with the name of its column."""
    label = clean(table.caption or "Table")
    around = SubElement(
        parent, "div", {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": label}
    )
    drawn = SubElement(around, "table", {"class": "stacks"} if len(table.columns) > _BESIDE else {})
    if table.caption:
        _text(drawn, "caption", table.caption)
    header = SubElement(SubElement(drawn, "thead"), "tr")
    for i, name in enumerate(table.columns):
        _text(header, "th", name, "number" if i in table.numbers else "").set("scope", "col")
    body = SubElement(drawn, "tbody")
    for row in table.rows:
        line = SubElement(body, "tr")
        if isinstance(row, Heading):
            heading = _text(line, "th", row.text, "heading")
            heading.set("colspan", str(len(table.columns)))
            heading.set("scope", "rowgroup")
            continue
        for i, cell in enumerate(row):
            whole = cell if isinstance(cell, Cell) else Cell(cell)
            _cell(line, whole, numeric=i in table.numbers).set("data-column", clean(table.columns[i]))


def _cell(row: Element, cell: Cell, *, numeric: bool) -> Element:
    kinds = " ".join(filter(None, ("number" if numeric else "", cell.kind)))
    if cell.share is None:
        return _text(row, "td", cell.text, kinds)
    drawn = SubElement(row, "td", {"class": kinds} if kinds else {})
    share = min(max(cell.share, 0.0), 1.0)
    SubElement(drawn, "meter", min="0", max="1", value=f"{share:.3f}").tail = clean(cell.text)
    return drawn


def _facts(parent: Element, facts: Mapping[str, str]) -> None:
    drawn = SubElement(parent, "dl", {"class": "facts"})
    for name, value in facts.items():
        pair = SubElement(drawn, "div")
        _text(pair, "dt", name)
        _text(pair, "dd", value)


def _picture(parent: Element, picture: Picture) -> None:
    """As an image, which can run nothing whatever it holds."""
    figure = SubElement(parent, "figure")
    source = "data:image/svg+xml;base64," + base64.b64encode(picture.svg).decode()
    SubElement(figure, "img", src=source, alt=clean(picture.alternative))
    if picture.caption:
        _text(figure, "figcaption", picture.caption)


def _text(parent: Element, tag: str, text: str, kind: str = "") -> Element:
    element = SubElement(parent, tag, {"class": kind} if kind else {})
    element.text = clean(text)
    return element
