"""README says what the commands say."""

import re
from pathlib import Path

import pytest

from gmemcore.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.parametrize("command", ["policy --markdown", "audit --markdown"])
def test_tables_are_those_of_the_command(command, capsys):
    block = re.search(rf"<!-- gmemcore {command} -->\n(.*?)\n<!-- end -->", README, re.S)
    assert block, f"README has no block for {command}"
    with pytest.raises(SystemExit) as stopped:
        main(command.split())
    assert stopped.value.code == 0
    assert block[1].strip() == capsys.readouterr().out.strip()


def test_the_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(example.replace("1 << 30", "1 << 21"), "README", "exec"), {})
    assert capsys.readouterr().out == "1 [(0, 1, 'private'), (1, 512, 'shared')]\n"


def test_it_has_the_two_commands_of_a_fresh_machine():
    assert "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/gmemcore bench" in README
    assert "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest" in README


def test_nothing_was_left_to_be_filled_in():
    assert not re.findall(r"@[A-Z]+@|TODO|FIXME", README)
