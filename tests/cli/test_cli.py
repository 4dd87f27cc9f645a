"""The command line as a whole: every command is listed with what it answers, and tells its options."""

import importlib
import subprocess
import sys

import pytest

import gmemcore
from gmemcore.cli import COMMANDS, main


def run(*words):
    """Exit status of one call."""
    with pytest.raises(SystemExit) as stopped:
        main(words)
    return stopped.value.code


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)], ids=["nothing", "--help", "-h"])
def test_overview_has_a_line_a_command_in_the_order_of_the_table(words, capsys):
    assert run(*words) == 0
    text = capsys.readouterr().out
    places = [text.index(summary) for _, summary in COMMANDS.values()]
    assert places == sorted(places)
    for name, (_, summary) in COMMANDS.items():
        assert any(line.split()[1:2] == [name] and summary in line for line in text.splitlines()), name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_is_its_docstring(name, capsys):
    assert run(name, "--help") == 0
    where, _ = COMMANDS[name]
    module, _, attribute = where.partition(":")
    command = getattr(importlib.import_module(module), attribute)
    text = command.help if hasattr(command, "help") else command.__doc__
    assert text.splitlines()[0].strip() in " ".join(capsys.readouterr().out.split())


def test_version_is_the_package_s(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == gmemcore.__version__


def test_python_m_is_the_same_command_line():
    done = subprocess.run([sys.executable, "-m", "gmemcore", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, gmemcore.__version__)


def test_an_unknown_command_is_one_line(capsys):
    assert run("convert") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("gmemcore: ")
    assert len(captured.err.strip().splitlines()) <= 2


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_nothing_twice(name, capsys):
    """No opposite of a flag that is off, no option that is another name of an argument, no empty default."""
    run(name, "--help")
    text = capsys.readouterr().out
    for noise in ("--no-", "--empty-", "[default: ]", "[default: False]", "[default: None]", "[default: ()]"):
        assert noise not in text, noise
    assert "Exit status" in text or "Commands" in text
