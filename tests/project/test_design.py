"""DESIGN's data path is the code's: every name in it exists, and each reaches those below it."""

import ast
import re

import pytest

from support.paths import ROOT

DESIGN = (ROOT / "DESIGN.md").read_text()
PATH = re.search(r"## The data path of a conversion\n\n```\n(.*?)```", DESIGN, re.S)[1]

CALLS = (
    ("machine/guest_memfd.py", "set_memory_attributes", "convert"),
    ("machine/guest_memfd.py", "set_memory_attributes_many", "run"),
    ("machine/guest_memfd.py", "apply_many", "run"),
    ("engine/store.py", "convert", "convert_one"),
    ("engine/store.py", "convert", "raise_conversion"),
    ("engine/store.py", "run", "run"),
    *(("engine/kernels.py", entry, name) for entry in ("convert_one", "run") for name in ("enter", "unlock")),
    *(
        ("engine/kernels.py", entry, name)
        for entry in ("convert_one", "run")
        for name in ("convert_short", "convert")
    ),
    ("engine/kernels.py", "convert", "check_conversion"),
    ("engine/kernels.py", "check_conversion", "refusal_of_arguments"),
    ("engine/kernels.py", "check_conversion", "find_page"),
    ("engine/kernels.py", "check_conversion", "takes_allocations"),
    ("engine/kernels.py", "check_conversion", "is_host_ready"),
    ("engine/kernels.py", "check_conversion", "first_pinned"),
    ("engine/kernels.py", "convert", "commit_conversion"),
    ("engine/kernels.py", "convert_folios", "check_part"),
    ("engine/kernels.py", "check_part", "check_conversion"),
    ("engine/kernels.py", "convert_folios", "commit_conversion"),
    ("engine/kernels.py", "commit_conversion", "protect_view"),
    ("engine/kernels.py", "commit_conversion", "transform_all"),
    ("engine/kernels.py", "transform_all", "transform"),
    ("engine/kernels.py", "transform_all", "transform_in_parts"),
    ("engine/kernels.py", "commit_conversion", "finish_conversion"),
    ("engine/kernels.py", "finish_conversion", "edit"),
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
    shown = set(re.findall(r"\w+", PATH))
    helpers = {"enter", "unlock", "transform", "transform_in_parts", "check_part"}  # of the sections around
    assert {name for _, *pair in CALLS for name in pair} - helpers <= shown
    assert "transform_in_parts" in DESIGN


def test_bytes_change_after_the_point_of_no_return_only():
    order = ["check_conversion", "----", "protect_view", "transform_all", "finish_conversion"]
    lines = [line.strip().split()[0] for line in PATH.splitlines()]
    assert [name for name in lines if name in order] == order
    source = (ROOT / "gmemcore/engine/kernels.py").read_text()
    convert = source[source.index("\ndef convert(") : source.index("\ndef convert_short(")]
    places = [
        convert.index(name)
        for name in (
            *("check_conversion(", "changes_view(", "point of no return"),
            *("protect_view(", "transform_all(", "finish_conversion("),
        )
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


def test_every_kernel_releases_the_locks_it_takes():
    """Every entry releases the locks it takes, and returns early only where `enter` took none."""
    entries = [
        node
        for node in functions("engine/kernels.py").values()
        if any(isinstance(mark, ast.Name) and mark.id == "entry" for mark in node.decorator_list)
    ]
    assert len(entries) > 20
    for node in entries:
        calls = [each.func.id for each in ast.walk(node) if is_call(each)]
        if node.name in ("lock_all", "unlock_all"):
            continue
        takes = sum(calls.count(name) for name in ("lock", "enter", "enter_to_check"))
        returns = [each for each in ast.walk(node) if isinstance(each, ast.Return)]
        early = [each for each in returns if each is not node.body[-1]]
        assert takes == calls.count("unlock") - (node.name == "run"), node.name
        assert all(ast.unparse(each.value) in ("CLOSED_FILE", "UNKNOWN_IOCTL") for each in early), node.name


def is_call(node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
