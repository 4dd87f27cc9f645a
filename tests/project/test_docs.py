"""The documentation's tools find what is wrong; building the site is a step of CI."""

import subprocess
import sys

import pytest

from support import docs_site
from support.paths import ROOT

DOCS = ROOT / "docs"
GOOD = '<link rel="stylesheet" href="site.css"><a href="https://example.org">x</a><a href="b.html#top">b</a>'


@pytest.fixture
def site(tmp_path):
    (tmp_path / "a.html").write_text(GOOD)
    (tmp_path / "b.html").write_text("<p style='background: url(data:x)'>")
    (tmp_path / "site.css").write_text("p { background: url(data:x) }")
    return tmp_path


def test_a_site_that_has_all_that_it_loads_is_good(site):
    assert list(docs_site.problems(site)) == []


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        (
            '<script src="https://cdn.example/x.js">',
            "a.html: https://cdn.example/x.js is loaded from elsewhere",
        ),
        ('<link rel="preload" href="//cdn.example/x">', "a.html: //cdn.example/x is loaded from elsewhere"),
        ('<p style="background: url(http://x/y)">', "a.html: http://x/y is loaded from elsewhere"),
        ('<img src="gone.png">', "a.html: gone.png is not there"),
        ('<a href="gone.html#x">', "a.html: gone.html#x is not there"),
    ],
)
def test_what_a_page_loads_from_elsewhere_is_found(site, page, problem):
    (site / "a.html").write_text(page)
    assert list(docs_site.problems(site)) == [problem]


@pytest.mark.parametrize("sheet", ['@import "https://x/y.css";', "p { src: url('https://x/y.css') }"])
def test_what_a_style_sheet_loads_from_elsewhere_is_found(site, sheet):
    (site / "site.css").write_text(sheet)
    assert list(docs_site.problems(site)) == ["site.css: https://x/y.css is loaded from elsewhere"]


def test_an_empty_site_is_none(tmp_path):
    assert list(docs_site.problems(tmp_path)) == [f"{tmp_path}: no pages"]


def test_pages_that_follow_from_the_source_are_complete(tmp_path):
    """Every command, every schema, every revision, every question has a page or a section."""
    from gmemcore.cli import COMMANDS
    from gmemcore.policy import ABIS

    pages = tmp_path / "pages"
    write = f"from pathlib import Path; import generate; generate.write(Path({str(pages)!r}))"
    subprocess.run([sys.executable, "-c", write], cwd=DOCS, check=True, capture_output=True)
    for name in COMMANDS:
        assert (pages / "commands" / f"{name}.md").read_text().startswith("# gmemcore")
    policy = (pages / "policy.md").read_text()
    assert all(f"\n## {name}\n" in policy for name in ABIS)
    assert (pages / "schemas.md").read_text().count("```json") == 4
    assert len(list((pages / "examples").glob("*.md"))) == 10
    assert ".. autofunction:: create_vm" in (pages / "api" / "gmemcore.md").read_text()
