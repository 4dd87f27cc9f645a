"""Whether a built site can be read without a network, on a phone: ``tests/support/docs_site.py SITE``.

Pages may link to other sites, but all that they load must be part of this one: scripts, style sheets, fonts,
pictures. Links within the site must lead somewhere. Where there is a browser, pages are opened from disk at
400 pixels: none may be wider, complain, or ask for anything else, and the search must find something.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

sys.path.insert(0, str(Path(__file__).parents[1]))  # `support`, where this is run by itself

from support.browser import CHROMIUM, Browser

LOADING = {
    *(("script", "src"), ("link", "href"), ("img", "src"), ("img", "srcset"), ("iframe", "src")),
    *(("source", "src"), ("source", "srcset"), ("video", "src"), ("audio", "src"), ("object", "data")),
}
CSS_LOADS = re.compile(r"@import\s+(?:url\()?['\"]?([^'\")\s;]+)|url\(\s*['\"]?([^'\")]+)")
NAVIGATION = {"next", "prev", "index", "search", "author", "canonical"}
SEARCHED = "bounce"
PHONE = 400


def loaded_by(css):
    """What a style sheet loads."""
    return [first or second for first, second in CSS_LOADS.findall(css)]


class Resources(HTMLParser):
    """What a page loads, and what it links to."""

    def __init__(self):
        super().__init__()
        self.loaded, self.linked = [], []

    def handle_starttag(self, tag, attrs):
        values = {name: value or "" for name, value in attrs}
        if tag == "link" and set(values.get("rel", "").split()) & NAVIGATION:
            return
        self.loaded += [value for name, value in values.items() if (tag, name) in LOADING]
        self.loaded += loaded_by(values.get("style", ""))
        if tag == "a" and values.get("href"):
            self.linked.append(values["href"])


def pages_of(site):
    """The pages of a site, without the templates that its theme leaves beside its style sheets."""
    return [page for page in sorted(site.rglob("*.html")) if "_static" not in page.relative_to(site).parts]


def problems(site):
    """What is wrong with the files of a site."""
    pages = pages_of(site)
    if not pages:
        yield f"{site}: no pages"
    for page in pages:
        found = Resources()
        found.feed(page.read_text())
        yield from (text for place in found.loaded for text in missing(site, page, place))
        yield from (text for place in found.linked for text in missing(site, page, place, link=True))
    for sheet in sorted(site.rglob("*.css")):
        yield from (text for place in loaded_by(sheet.read_text()) for text in missing(site, sheet, place))


def missing(site, page, place, *, link=False):
    """What is wrong with a place that a page loads, or links to."""
    parts = urlsplit(place)
    name = page.relative_to(site)
    if parts.scheme == "data" or (link and parts.scheme in ("http", "https", "mailto")):
        return
    if parts.scheme or parts.netloc:
        yield f"{name}: {place} is loaded from elsewhere"
    elif parts.path and not (page.parent / unquote(parts.path)).exists():
        yield f"{name}: {place} is not there"


def seen_on_a_phone(site):
    """What is wrong with pages in a browser, opened from disk."""
    with Browser(PHONE, 900) as browser:
        for page in pages_of(site):
            browser.send("Page.navigate", url=page.resolve().as_uri())
            browser.wait_for("document.readyState === 'complete'")
            width = browser.evaluate("document.documentElement.scrollWidth")
            if width > PHONE:
                yield f"{page.relative_to(site)}: {width} pixels wide on a screen of {PHONE}"
        browser.send("Page.navigate", url=f"{(site / 'search.html').resolve().as_uri()}?q={SEARCHED}")
        browser.wait_for("document.readyState === 'complete'")
        browser.wait_for("document.querySelectorAll('#search-results li a').length > 2")
        asked = {url for url in browser.requests if not url.startswith(("file:", "data:"))}
        yield from (f"asked for {url}" for url in sorted(asked))
        yield from (f"the browser says: {text}" for text in dict.fromkeys(browser.errors))


def main():
    """Print what is wrong; return the exit status."""
    site = Path(sys.argv[1])
    found = [*problems(site), *(seen_on_a_phone(site) if CHROMIUM else [])]
    print(*found, sep="\n", end="\n" * bool(found))
    looked = "and seen in a browser" if CHROMIUM else "(no browser to look at them)"
    print(f"{len(pages_of(site))} pages read {looked}, {len(found)} problems")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
