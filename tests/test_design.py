"""DESIGN's data path is the code's: every name in it exists, and each reaches those below it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DESIGN = (ROOT / "DESIGN.md").read_text()
PATH = re.search(r"## The data path of a conversion\n\n```\n(.*?)```", DESIGN, re.S)[1]

CALLS = (
    ("machine/guest_memfd.py", "set_memory_attributes", "convert_one"),
    ("machine/guest_memfd.py", "set_memory_attributes_many", "run_many"),
    ("machine/guest_memfd.py", "apply_many", "run_many"),
    ("engine/store.py", "convert_one", "run"),
    ("engine/store.py", "run_many", "run"),
    ("engine/kernels.py", "run", "convert_short"),
    ("engine/kernels.py", "run", "convert"),
    ("engine/kernels.py", "convert", "check_conversion"),
    ("engine/kernels.py", "check_conversion", "refusal_of_arguments"),
    ("engine/kernels.py", "check_conversion", "find_page"),
    ("engine/kernels.py", "check_conversion", "takes_allocations"),
    ("engine/kernels.py", "check_conversion", "first_pinned"),
    ("engine/kernels.py", "convert", "transform"),
    ("engine/kernels.py", "convert", "finish_conversion"),
    ("engine/kernels.py", "finish_conversion", "edit"),
    ("engine/store.py", "_convert", "check_conversion"),
    ("engine/store.py", "_convert", "_transform"),
    ("engine/store.py", "_transform", "transform"),
    ("engine/store.py", "_convert", "finish_conversion"),
)
"""Who calls whom: file, caller, callee."""


def functions(path):
    """Functions and methods of a file by name."""
    tree = ast.parse((ROOT / "gmemcore" / path).read_text())
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def names_used(function):
    return {
        node.id if isinstance(node, ast.Name) else node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Name | ast.Attribute)
    }


def reached(path, caller):
    """Names that a function uses, itself or through helpers of its own file."""
    own, seen, left = functions(path), set(), [caller]
    while left:
        new = names_used(own[left.pop()]) - seen
        seen |= new
        left += [name for name in new if name.startswith("_") and name in own]
    return seen


@pytest.mark.parametrize(("path", "caller", "callee"), CALLS)
def test_each_reaches_the_next(path, caller, callee):
    assert callee in reached(path, caller)


def test_the_path_names_all_of_them():
    shown = set(re.findall(r"\w+", PATH)) | set(
        re.findall(r"\w+", DESIGN[DESIGN.index("With several threads") :])
    )
    assert {name for _, *pair in CALLS for name in pair} - {"_transform"} <= shown


def test_bytes_change_after_the_point_of_no_return_only():
    lines = [line.strip().split()[0] for line in PATH.splitlines()]
    order = [name for name in lines if name in ("check_conversion", "----", "transform", "finish_conversion")]
    assert order == ["check_conversion", "----", "transform", "finish_conversion"]
    source = (ROOT / "gmemcore/engine/kernels.py").read_text()
    convert = source[source.index("\ndef convert(") : source.index("\ndef convert_short(")]
    places = [
        convert.index(name)
        for name in ("check_conversion(", "point of no return", "transform(", "finish_conversion(")
    ]
    assert places == sorted(places)


# --- where is it decided, and the links of every page --------------------------------------------------
INDEX = re.findall(r"^\| ([^|]+\?) \| ([^|]+) \|$", DESIGN, re.MULTILINE)
PAGES = (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))
PLACE = re.compile(r"`([\w/]+\.py)`(?:, `([A-Za-z_.]+)`)?")


def anchors(page):
    """Anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page):
    """Relative links of a page that lead nowhere."""
    for file, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text()):
        target = page.parent / file if file else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            yield f"{file}#{anchor}"


@pytest.mark.parametrize(("question", "answer"), INDEX, ids=[question for question, _ in INDEX])
def test_what_decides_exists(question, answer):
    places = PLACE.findall(answer)
    for file, name in places:
        path = ROOT / "gmemcore" / file
        assert path.exists(), file
        assert not name or name.split(".")[-1] in path.read_text(), f"{name} isn't in {file}"
    assert places or "](docs/" in answer


def test_the_index_is_there():
    assert len(INDEX) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert not list(broken_links(page))


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "page.md").write_text(
        "# One\n[a](#one) [b](#two) [c](gone.md) [d](page.md#one) [e](https://x.org/#y)"
    )
    assert list(broken_links(tmp_path / "page.md")) == ["#two", "gone.md#"]
