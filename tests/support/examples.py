"""Worked examples, of notebooks/EXAMPLES.md and the tutorial: each command must print what stands there.

``tests/support/examples.py --write`` puts in what the commands print now; prose and commands are by hand.
Blocks with figures of one machine are marked: of ``console times`` all but times is compared, of
``console figures`` the shape alone.
"""

import os
import re
import shlex
import sys
import tempfile
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from unittest import mock

import pytest

from gmemcore.cli import main

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "notebooks" / "EXAMPLES.md"
TUTORIAL = sorted((ROOT / "docs" / "tutorial").glob("[!i]*.md"))
"""Lessons: the commands of each work on the files that those before them wrote."""
COLUMNS = "110"

BLOCK = re.compile(r"^```console(?: (figures|times))?\n\$ (gmemcore [^\n]*)\n(.*?)^```$", re.M | re.S)
NUMBER = re.compile(r"[-+]?\d[\d.,]*(e[-+]?\d+)?[kMGT]?")
TIME = re.compile(r"\d[\d.,]* (ns|µs|ms|s)\b|\d[\d.,]*[kMG]?/s\b")


@dataclass(frozen=True)
class Example:
    """A command and what the page says it prints."""

    command: str
    printed: str
    kind: str

    def same(self, now):
        """Whether the output is that of the page, as far as its kind says."""
        return COMPARED[self.kind](now) == COMPARED[self.kind](self.printed)


def examples(text):
    """The examples of a page, in order."""
    return [Example(command, printed, kind) for kind, command, printed in BLOCK.findall(text)]


def without_times(text):
    """Lines without times, and without the space that they take."""
    return [re.sub(r"([\s─]|-{3,})+", " ", TIME.sub("#", line)) for line in text.splitlines()]


def shape(text):
    """Lines without figures, their units, warnings about noise, and space."""
    lines = []
    for line in text.splitlines():
        if line.startswith("cv is above"):
            continue
        bare = NUMBER.sub("#", TIME.sub("#", line.replace("~", "")))
        bare = re.sub(r"the best is \w+", "the best is", bare)
        bare = re.sub(r"# ([KMG]iB|=)", "#", bare)
        bare = re.sub(r"(<?#)+", "#", bare)  # bounds of an interval can be equal, and small ones are "<0.01"
        lines.append(re.sub(r"([\s─]|-{3,})+", " ", bare).strip())
    return [line for line in lines if line]


COMPARED = {"": str, "times": without_times, "figures": shape}
"""What is compared of a block, by its mark."""


@contextmanager
def workplace():
    """Run commands where nothing but the project's tests can be seen."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, COLUMNS=COLUMNS), chdir(folder):
        for name in ("tests", "notebooks"):
            Path(name).symlink_to(ROOT / name)
        yield


def run(command):
    """What a command prints; it must end well."""
    words = shlex.split(command)[1:]
    printed, told = StringIO(), StringIO()
    with redirect_stdout(printed), redirect_stderr(told), pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 0, f"{command}: exit status {stopped.value.code}: {told.getvalue()}"
    lines = "\n".join(line.rstrip() for line in printed.getvalue().splitlines()).strip("\n")
    return f"{lines}\n" if lines else ""


def run_alone(command):
    """What a command prints in a workplace of its own."""
    with workplace():
        return run(command)


def rewritten(text):
    """The page with what its commands print now."""

    def again(block):
        example = Example(block[2], block[3], block[1] or "")
        now = run(example.command)
        if example.same(now):  # times and figures stay those of a quiet machine
            return block[0]
        mark = f" {example.kind}" if example.kind else ""
        return f"```console{mark}\n$ {example.command}\n{now}```"

    with workplace():
        return BLOCK.sub(again, text)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/support/examples.py --write")
    for page in (PAGE, *TUTORIAL):
        page.write_text(rewritten(page.read_text()))
