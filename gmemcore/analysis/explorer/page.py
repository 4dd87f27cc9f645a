"""The explorer's page: one HTML document with its style, its script and its data, which loads nothing."""

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Final
from xml.etree.ElementTree import Element, SubElement, tostring

KEYS: Final = (
    ("wheel, + and -", "zoom about the pointer"),
    ("drag, Page Up and Page Down", "move"),
    ("f", "show all of memory"),
    ("h", "addresses, or along a Hilbert curve"),
    ("arrow keys on the map", "go from cell to cell"),
    ("click, Enter", "pin a cell, and see its history"),
    ("Shift and drag", "pin a range"),
    ("Escape", "unpin"),
    ("Space", "play"),
    (", and .", "the snapshot before, and after"),
    ("[ and ]", "the first snapshot, and the last"),
    ("1 to 8, and 0", "hide or show a state, and show all"),
    ("?", "this list"),
)
"""What the page does for a key, or for the mouse."""


def page(title: str, lead: str, meta: Mapping[str, Any], blobs: Mapping[str, bytes]) -> str:
    """Return the document.

    Parameters
    ----------
    title, lead : str
        What it is of.
    meta : mapping
        What the script reads as JSON.
    blobs : mapping of str to bytes
        Binary data by the id of its element.
    """
    style, script = (
        (files(__package__) / name).read_text(encoding="utf-8") for name in ("explorer.css", "explorer.js")
    )
    html = Element("html", lang="en")
    head = SubElement(html, "head")
    SubElement(head, "meta", charset="utf-8")
    policy = f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
    policy += "base-uri 'none'; form-action 'none'"
    SubElement(head, "meta", {"http-equiv": "Content-Security-Policy", "content": policy})
    SubElement(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    SubElement(head, "title").text = title
    SubElement(head, "style").text = style
    body = SubElement(html, "body")
    header = SubElement(body, "header")
    SubElement(header, "h1").text = title
    _add(header, "p", lead, "soft")
    _toolbar(body)
    main = SubElement(body, "main")
    _left(SubElement(main, "div", {"class": "left"}))
    _right(SubElement(main, "aside"))
    _help(body)
    data = json.dumps(meta, separators=(",", ":")).replace("<", "\\u003c")
    SubElement(body, "script", type="application/json", id="data-meta").text = data
    for name, blob in blobs.items():
        text = base64.b64encode(blob).decode()
        SubElement(body, "script", type="application/octet-stream", id=f"data-{name}").text = text
    SubElement(body, "script").text = script
    return "<!doctype html>\n" + tostring(html, encoding="unicode", method="html") + "\n"


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _add(parent: Element, tag: str, text: str = "", kind: str = "", **attributes: str) -> Element:
    made = SubElement(parent, tag, {**({"class": kind} if kind else {}), **attributes})
    made.text = text
    return made


def _button(parent: Element, name: str, text: str, label: str = "", pressed: bool | None = None) -> None:
    made = _add(parent, "button", text, type="button", id=name)
    if label:
        made.set("aria-label", label)
        made.set("title", label)
    if pressed is not None:
        made.set("aria-pressed", str(pressed).lower())


def _group(parent: Element, label: str) -> Element:
    return SubElement(parent, "div", {"class": "group", "role": "group", "aria-label": label})


def _toolbar(body: Element) -> None:
    bar = SubElement(body, "div", {"class": "bar", "role": "toolbar", "aria-label": "View"})
    order = _group(bar, "Order of pages")
    _button(order, "address", "Address", "Rows in address order (h)", True)
    _button(order, "hilbert", "Hilbert", "Along a Hilbert curve (h)", False)
    zoom = _group(bar, "Zoom")
    _button(zoom, "wider", "\N{MINUS SIGN}", "Zoom out (-)")
    _button(zoom, "closer", "+", "Zoom in (+)")
    _button(zoom, "fit", "All", "Show all of memory (f)")
    go = SubElement(bar, "form", id="go")
    place = {"placeholder": "go to 0x\N{HORIZONTAL ELLIPSIS}", "aria-label": "Go to a guest physical address"}
    SubElement(
        go, "input", {"type": "text", "id": "gpa", "spellcheck": "false", "autocomplete": "off", **place}
    )
    _button(bar, "every", "Show all states", "Show all states (0)")
    _button(bar, "ask", "?", "Keys")
    _add(bar, "span", kind="soft", id="cell")


def _left(left: Element) -> None:
    _add(left, "canvas", id="strip", role="img", **{"aria-label": "All of guest memory; click to go there"})
    stage = SubElement(left, "div", id="stage")
    _add(stage, "canvas", id="map", **{"aria-hidden": "true"})
    label = "Page states. Arrow keys go from cell to cell, Enter pins one."
    _add(stage, "canvas", id="overlay", tabindex="0", role="application", **{"aria-label": label})
    _add(stage, "div", id="tip", role="tooltip", hidden="hidden")
    _add(stage, "div", id="live", **{"aria-live": "polite"})
    line = SubElement(left, "div", id="timeline")
    _button(line, "play", "Play", "Play (Space)", False)
    _button(line, "before", "\N{LEFTWARDS ARROW}", "The snapshot before (,)")
    SubElement(
        line, "input", {"type": "range", "id": "time", "min": "0", "step": "1", "aria-label": "Snapshot"}
    )
    _button(line, "after", "\N{RIGHTWARDS ARROW}", "The snapshot after (.)")
    _add(line, "span", kind="soft", id="count")
    _add(left, "p", id="now", **{"aria-live": "polite"})


def _right(aside: Element) -> None:
    seen = SubElement(aside, "section")
    _add(seen, "h2", "Memory by state")
    _add(seen, "p", kind="soft", id="span")
    table = SubElement(seen, "table", id="states")
    row = SubElement(SubElement(table, "thead"), "tr")
    for name in ("state", "view", "guest"):
        _add(row, "th", name, scope="col")
    SubElement(table, "tbody", id="states-body")
    _add(seen, "p", kind="soft", id="detail", hidden="hidden")
    large = SubElement(aside, "section")
    _add(large, "h2", "What large entries could map")
    facts = SubElement(large, "dl")
    for name, where in (("2 MiB", "map2m"), ("1 GiB", "map1g")):
        _add(facts, "dt", name)
        _add(facts, "dd", id=where)
    over_time = SubElement(aside, "section", id="over-time")
    _add(over_time, "h2", "Over time")
    label = "Memory by state over time, and what large entries could map; click to go to a time"
    _add(over_time, "canvas", id="trend", role="img", **{"aria-label": label})
    _add(over_time, "p", "Lines: share that 2 MiB (solid) and 1 GiB (dashed) entries could map.", "soft")
    pinned = SubElement(aside, "section", id="pinned", hidden="hidden")
    _add(pinned, "h2", "Pinned")
    _add(pinned, "p", id="pinned-range")
    _add(pinned, "p", id="pinned-states")
    _add(pinned, "p", kind="soft", id="pinned-since")
    _add(pinned, "canvas", id="past", role="img", **{"aria-label": "States of the pinned range over time"})
    bar = SubElement(pinned, "div", {"class": "bar"})
    _button(bar, "show", "Zoom to it")
    _button(bar, "unpin", "Unpin", "Unpin (Escape)")
    _add(pinned, "p", kind="soft", id="history-count")
    scroll = SubElement(pinned, "div", {"class": "scroll", "tabindex": "0", "role": "region"})
    scroll.set("aria-label", "Operations on the pinned range")
    table = SubElement(scroll, "table")
    row = SubElement(SubElement(table, "thead"), "tr")
    for name in ("operation", "step", "by", "range", "outcome"):
        _add(row, "th", name, scope="col")
    SubElement(table, "tbody", id="history-body")


def _help(body: Element) -> None:
    dialog = SubElement(body, "dialog", {"id": "help", "aria-label": "Keys"})
    _add(dialog, "h2", "Keys")
    listed = SubElement(dialog, "dl")
    for keys, meaning in KEYS:
        _add(SubElement(listed, "dt"), "kbd", keys)
        _add(listed, "dd", meaning)
    _button(dialog, "close", "Close")
