"""Spelling and style of every page: ``tests/support/prose.py``; exit status 1 if something is to be mended.

codespell reads pages, source and tests; proselint reads the prose of pages, without code and tables.
"""

import re
import subprocess
import sys
from itertools import count
from pathlib import Path

from proselint.checks import __register__
from proselint.config import DEFAULT
from proselint.registry import CheckRegistry
from proselint.tools import LintFile

ROOT = Path(__file__).parents[2]
SPELLED = (
    "README.md",
    "DESIGN.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs",
    "notebooks",
    "gmemcore",
    "tests",
    "bench",
)
SKIPPED = "*/generated/*,*/site/*,*.ipynb,*.json,*.png,*.pyc,*.js"
NAMES = "NotIn,doesn',positionOf"
"""Words of code that only look like mistakes."""
BLOCKS = re.compile(r"^```.*?^```$|^<!--[^>]*-->$|^\|[^\n]*$", re.M | re.S)
SPANS = re.compile(r"`[^`]*`|\]\([^)]*\)")
UNCHECKED = ("typography", "dates_times")  # pages are written in ASCII; "from 2^32 on" is no date


CheckRegistry().register_many(__register__)


def pages():
    """The pages that people write."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("notebooks/*.md")]
    return sorted(page for page in found if "generated" not in page.parts)


def prose(text):
    """A page without code, every line where it was; headings end in a full stop, as sentences do."""
    without = BLOCKS.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    numbers = count()
    without = SPANS.sub(lambda found: f"code{next(numbers)}" + "\n" * found[0].count("\n"), without)
    return re.sub(r"^(#+ .*\w)$", r"\1.", without, flags=re.M)


def style_of(page):
    """What proselint says of a page: a line per complaint."""
    chosen = DEFAULT["checks"] | dict.fromkeys(UNCHECKED, False)
    for found in LintFile(page, prose(page.read_text())).lint({"max_errors": 1000, "checks": chosen}):
        yield f"{page.name}:{found.pos[0]}: {found.check_result.message}"


def main():
    """Print complaints; return the exit status."""
    spelled = subprocess.run(
        [sys.executable, "-m", "codespell_lib", "--skip", SKIPPED, "-L", NAMES, *SPELLED],
        cwd=ROOT,
        check=False,
    )
    found = [line for page in pages() for line in style_of(page)]
    print(*found, sep="\n", end="\n" * bool(found))
    return bool(found or spelled.returncode)


if __name__ == "__main__":
    sys.exit(main())
