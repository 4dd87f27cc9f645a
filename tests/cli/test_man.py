"""Manual pages: one per command, with every subcommand and option, in roff that man can show."""

import re
import shutil
import subprocess
import sys

import pytest

from gmemcore.cli import COMMANDS
from gmemcore.cli.man import man_pages
from support.command_tree import ARGUMENTS, TREE

PAGES = man_pages()


def plain(roff):
    """The text of a page, without what roff adds."""
    return re.sub(r"\\f[BIR]", "", roff).replace(r"\-", "-")


def test_there_is_a_page_for_each_command_and_one_above():
    assert PAGES.keys() == {"gmemcore.1", *(f"gmemcore-{name}.1" for name in COMMANDS)}
    for name, (_, summary) in COMMANDS.items():
        assert f"gmemcore-{name} (1)\n{summary}" in plain(PAGES["gmemcore.1"])


@pytest.mark.parametrize("words", TREE, ids=" ".join)
def test_a_page_has_every_argument_with_its_help(words):
    text = plain(PAGES[f"gmemcore-{words[0]}.1"])
    assert f".B gmemcore {' '.join(words)}\n" in text
    assert "\n*\n" not in text
    for each in (argument for argument in ARGUMENTS[words] if argument.show):
        name, explained = each.names[0], " ".join(each.parameter.help.replace("`", "").split())
        assert re.search(rf"^{re.escape(name)}\b.*\n{re.escape(explained)}", text, re.M), name


@pytest.mark.parametrize("page", PAGES)
def test_roff_is_sound(page, tmp_path):
    for line in PAGES[page].splitlines():
        assert not line.startswith(("'", "`"))
        assert not line.startswith(".") or re.match(r"\.(\\\"|TH|SH|TP|PP|BR|B|br)( |$)", line), line
    if (groff := shutil.which("groff")) is not None:
        (tmp_path / page).write_text(PAGES[page])
        done = subprocess.run(
            [groff, "-man", "-Tutf8", "-ww", "-z", str(tmp_path / page)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stderr == ""


def test_they_need_nothing_but_what_the_build_installs():
    """The wheel is built where neither Numba nor an extra is."""
    script = (
        "import sys\n"
        "for name in ('numba', 'pandas', 'xarray', 'matplotlib', 'pyarrow', 'distributed'):\n"
        "    sys.modules[name] = None\n"
        "from gmemcore.cli.man import man_pages\n"
        "print(len(man_pages()))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(PAGES)
