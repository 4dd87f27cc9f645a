"""Pages that follow from the source: commands, the Python interface, policy, schemas, examples, notebooks.

Nothing here is edited by hand. `write` makes ``docs/generated`` anew; `conf.py` calls it before each build.
"""

import contextlib
import importlib
import io
import re
import shutil
from collections.abc import Iterable, Iterator
from inspect import isclass, isfunction
from pathlib import Path

from gmemcore.cli import COMMANDS, EPILOGUE, command_line, main
from gmemcore.policy import ABIS

ROOT = Path(__file__).parent.parent

API = {
    "gmemcore": "What `import gmemcore as gm` offers: guests, runs, and what notebooks need.",
    "gmemcore.machine": "Guests, their files and memslots, accesses, launch, raw ioctls.",
    "gmemcore.errors": "Exceptions, each with the errno that a kernel gives.",
    "gmemcore.uapi": "Numbers and names of the interface.",
    "gmemcore.policy": "What each revision and proposal allows, as data.",
    "gmemcore.vmm": "The userspace side: probing, conversion across memslots, listeners.",
    "gmemcore.analysis": "Snapshots, distributions and pictures.",
    "gmemcore.engine": "Results and counters of conversions.",
    "gmemcore.kvm": "The same interface on the host's kernel.",
    "gmemcore.fuzz": "Random walks on the model and on a real kernel.",
    "gmemcore.benchmark": "The table of what is measured.",
    "gmemcore.front": "Results of runs, as notebooks show them.",
}
"""Modules of the Python interface, in the order of the reference: each object is documented once."""

EXPLANATION = "explanation/index"
SCHEMAS = ("bench", "backings", "stress", "replay")
NOTEBOOKS = ("quick_start", "page_states", "qemu_log", "conversion_cost", "huge_pages", "fleet", "proposals")
PAGES = {
    "DESIGN.md": "design.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "tests/vectors/FORMAT.md": "vectors.md",
}
"""Pages of the repository outside this folder, and what they are called here."""


def write(folder: Path) -> None:
    """Write all generated pages into a folder, which is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, text in _pages():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _pages() -> Iterator[tuple[str, str]]:
    yield from _commands()
    yield from _api()
    yield "policy.md", _policy()
    yield "schemas.md", _schemas()
    yield from _examples()
    for name, here in PAGES.items():
        yield here, _moved((ROOT / name).read_text())
    for name in NOTEBOOKS:
        text = (ROOT / "notebooks" / f"{name}.ipynb").read_text()
        text = text.replace("](EXAMPLES.md", "](../../how-to/index.md").replace("](../docs/", "](../../")
        yield f"notebooks/{name}.ipynb", text


def _page(title: str, *blocks: str) -> str:
    return "\n\n".join([f"# {title}", *blocks]) + "\n"


def _toctree(names: Iterable[str]) -> str:
    return "\n".join(["```{toctree}", ":maxdepth: 1", "", *names, "```"])


# ---- commands ----------------------------------------------------------------------------------------------
def _commands() -> Iterator[tuple[str, str]]:
    app = command_line()
    for name in COMMANDS:
        text = app[name].generate_docs(heading_level=1, usage_name=f"gmemcore {name}")
        text = re.sub(r"## Table of Contents\n\n(?:\s*- .*\n)+", "", text)  # the site has its own
        text = text.replace(" *[default: False]*", "").replace(f"# {name}\n", f"# gmemcore {name}\n", 1)
        yield f"commands/{name}.md", text
    yield (
        "commands/index.md",
        _page(
            "Commands",
            f"Every command prints its page with `--help`. In every command, {EPILOGUE}",
            _toctree(COMMANDS),
        ),
    )


# ---- the Python interface ----------------------------------------------------------------------------------
def _api() -> Iterator[tuple[str, str]]:
    seen: set[int] = set()
    for module, summary in API.items():
        yield f"api/{module}.md", _module(module, summary, seen)
    yield (
        "api/index.md",
        _page(
            "Python", "Public modules. Sizes and offsets are bytes unless a name says pages.", _toctree(API)
        ),
    )


def _module(module: str, summary: str, seen: set[int]) -> str:
    """Return the page of a module: what it defines that no page before it has."""
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", None) or [
        name
        for name, value in vars(loaded).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module
    ]
    own, elsewhere = [], []
    for name in sorted(names):
        value = getattr(loaded, name)
        if not (isclass(value) or isfunction(value)):
            continue
        (elsewhere if id(value) in seen else own).append(name)
        seen.add(id(value))
    lines = [f".. currentmodule:: {module}", "", ".. autosummary::", "   :nosignatures:", ""]
    lines += [f"   {name}" for name in own]
    for name in own:
        is_class = isclass(getattr(loaded, name))
        lines += ["", f".. auto{'class' if is_class else 'function'}:: {name}"]
        lines += ["   :members:"] * is_class
    body = "\n".join(["```{eval-rst}", *lines, "```"])
    also = f"Also here: {', '.join(f'`{name}`' for name in elsewhere)}." if elsewhere else ""
    return _page(module, summary, *([also] if also else []), body)


# ---- policy and schemas ------------------------------------------------------------------------------------
def _printed(*words: str) -> str:
    """Return what a command prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main([*words, "--quiet"])
    return output.getvalue().strip()


def _policy() -> str:
    tables = []
    for name in ABIS:
        text = _printed("policy", "--markdown", "--abi", name)
        tables.append(f"## {name}\n\n{text}")
    return _page(
        "Policy tables",
        "Which content flag each VM type takes, by revision and proposal. `gmemcore policy --why` names the\n"
        "source of a cell. The [glossary](../reference/glossary.md) explains the words.",
        "## What the audit counts\n\n" + _printed("audit", "--markdown"),
        *tables,
    )


def _schemas() -> str:
    blocks = [f"## {kind}\n\n```json\n{_printed('schema', kind)}\n```" for kind in SCHEMAS]
    return _page(
        "JSON Schemas",
        "Each line of a run file matches one alternative of the schema of its kind.\n"
        "[Outputs](../outputs.md) explains the fields; `gmemcore schema bench` prints the first of these.",
        *blocks,
    )


# ---- worked examples and pages of the repository -----------------------------------------------------------
def _examples() -> Iterator[tuple[str, str]]:
    """Yield a page for each question of the worked examples, which tests run again."""
    text = (ROOT / "notebooks" / "EXAMPLES.md").read_text()
    for question in text.split("\n## ")[1:]:
        title, _, body = question.partition("\n")
        number, _, title = title.partition(". ")
        yield f"examples/{int(number):02}.md", _page(title, _moved(body.strip()))


def _moved(text: str) -> str:
    """Return a page of the repository with links that hold in this folder."""
    text = re.sub(r"\]\(docs/([^)]*)\)", r"](../\1)", text)
    for name, here in PAGES.items():
        text = re.sub(rf"\]\({re.escape(name)}(#[^)]*)?\)", rf"]({here}\1)", text)
    return text


def on_site(name: str, text: str) -> str:
    """Return a page as the site has it: complete lists, and links that hold here."""
    if name == EXPLANATION:
        return text.replace(
            "../generated/contributing", "\n".join([*_unlisted(), "../generated/contributing"])
        )
    if "/" in name:
        return text
    for page, here in PAGES.items():
        text = text.replace(f"](../{page}", f"](generated/{here}")
    text = text.replace("](../notebooks/EXAMPLES.md", "](how-to/index.md")
    return re.sub(r"\]\(\.\./notebooks/(\w+\.ipynb)", r"](generated/notebooks/\1", text)


def _unlisted() -> list[str]:
    """Return the pages of ``docs`` that no part of the site lists: they explain something."""
    docs = ROOT / "docs"
    lists = "".join(path.read_text() for path in docs.glob("*/index.md"))
    names = [path.stem for path in sorted(docs.glob("*.md")) if path.stem != "index"]
    return [f"../{name}" for name in names if f"../{name}\n" not in lists and f"/{name}\n" not in lists]
