"""README says what the commands say."""

import json
import re
import shlex
import subprocess
import sys
from contextlib import suppress

import pytest
from cyclopts import CycloptsError, MissingArgumentError

import gmemcore
from gmemcore.cli import COMMANDS, VERBOSITY, command_line
from support import readme_picture
from support.paths import ROOT

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / name for name in ("README.md", "DESIGN.md", "CHANGELOG.md", "notebooks/EXAMPLES.md")]
PAGES += sorted(page for page in (ROOT / "docs").rglob("*.md") if "generated" not in page.parts)
COMMANDING = [ROOT / name for name in ("README.md", "DESIGN.md", "notebooks/EXAMPLES.md")]
"""Pages that name commands."""


def test_its_numbers_are_those_of_the_vectors():
    """Cases and steps in all, and steps that were recorded on a kernel."""
    steps = {
        path: [len(case["steps"]) for case in json.loads(path.read_text())["cases"]]
        for path in (ROOT / "tests" / "vectors").glob("*.json")
    }
    recorded = sum(sum(each) for path, each in steps.items() if path.name.startswith(("kernel-", "real-")))
    cases, every = sum(map(len, steps.values())), sum(map(sum, steps.values()))
    assert (
        f"answers {cases:,} cases of behaviour vectors as written, {every:,} steps. {recorded:,} of" in README
    )


def test_it_is_short():
    assert README.count("\n") <= 100


def test_the_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(example.replace("1 << 30", "1 << 21"), "README", "exec"), {})
    assert capsys.readouterr().out == "1 [(0, 1, 'private'), (1, 512, 'shared')]\n"


@pytest.mark.parametrize("what", ["the example", "every public name"])
def test_strict_type_checkers_find_nothing(what, tmp_path):
    """In the README's example, and in code that uses all that ``import gmemcore as gm`` offers."""
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    if what == "every public name":
        names = [f"{name}: object = gm.{name}" for name in gmemcore.__all__]
        example = "\n".join(["import gmemcore as gm", *(f"use_{line}" for line in names)])
    (tmp_path / "example.py").write_text(example)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), "example.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_it_has_the_two_commands_of_a_fresh_machine():
    assert "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/gmemcore bench" in README
    assert "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest" in README


PLACEHOLDERS = {
    "FILE": "snapshot.gmem",
    "VECTORS...": "tests/vectors",
    "LOG": "launch.log",
    "MINE.toml": "mine.toml",
    "KIND": "bench",
    "NAME": "cost",
    "PID": "1",
}


def commands_of(text):
    """Command lines of a page: in code spans, after a prompt, and in blocks of commands."""
    spans = re.findall(r"`(gmemcore [^`\n]+)`", text) + re.findall(r"^\$ (gmemcore [^\n]+)$", text, re.M)
    for kind, block in re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.M | re.S):
        spans += [] if kind else re.findall(r"^(gmemcore [^\n|#]+?) *$", block, re.M)
    return sorted({span.partition(" > ")[0].partition(" && ")[0] for span in spans})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_is_named_can_be_typed(page):
    """It exists, with those options; running them is the matter of other tests."""
    commands = commands_of(page.read_text())
    for command in commands:
        words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command)[1:] if word not in VERBOSITY]
        if len(words) > 1:
            with suppress(MissingArgumentError):  # the name of a command, without all that it needs
                command_line().parse_args(words, exit_on_error=False, print_error=False)
        else:
            assert words[0] in COMMANDS or words[0].startswith("--"), command
    assert commands or page not in COMMANDING


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_reports_are_made_of_results(page):
    """Of what a command of the page wrote with -o; the log of a fleet, for one, is no result."""
    text = page.read_text()
    for command in commands_of(text):
        _, name, *words = shlex.split(command)
        if name == "report" and words and not words[0].isupper():
            assert re.search(rf"-o {re.escape(words[0])}\b", text.replace(command, "")), command


def test_a_command_that_is_not_there_would_be_found():
    assert commands_of("see `gmemcore policy --whyever`") == ["gmemcore policy --whyever"]
    with pytest.raises(CycloptsError):
        command_line().parse_args(["policy", "--whyever"], exit_on_error=False, print_error=False)


def test_pictures_and_pages_that_it_shows_are_there():
    places = re.findall(r"\]\(([^)#]+)\)", README)
    assert any(place.endswith(".png") for place in places)
    for place in places:
        file = ROOT / place
        assert file.exists(), place
        if place.endswith(".png"):
            assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
            assert file.stat().st_size < 200_000
            assert README.index(place) < 1500, "on the first screen"


def test_the_picture_shows_what_its_script_draws():
    """Not its pixels, which are matplotlib's matter: the guest and the refusals behind it."""
    from gmemcore.analysis import state_mix

    fractions = {row["state"]: row["fraction"] for row in state_mix(readme_picture.guest()).records()}
    assert fractions["accepted"] > 0.45
    assert 0.01 < fractions["shared"] < 0.06
    refused = {(one.abi, one.vm_type): one.refused for one in readme_picture.refusals().records}
    assert refused["v5", "SNP"] == refused["v4-squash", "SNP"] > 0, "the guest runs"
    assert refused["two-caps", "TDX"] == refused["pre-cap", "SNP"] == 0, "the firmware can"
    assert refused["tracking", "SNP"] == refused["v5", "PKVM"] == 0 < refused["v13", "PKVM"]


def test_every_command_is_named():
    assert all(f"`gmemcore {name}" in README for name in COMMANDS)


def test_nothing_was_left_to_be_filled_in():
    assert not re.findall(r"@[A-Z]+@|TODO|FIXME", README)
